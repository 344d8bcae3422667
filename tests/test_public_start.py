"""The public start: it learns, is found again, and is refused when somebody touched it."""

import json
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunet_dp.errors import Refusal
from nnunet_dp.public_start import (
    LabelledImage,
    Phantoms,
    crop,
    learn,
    only_one,
    read_start,
    start_file,
    write_start,
)
from nnunet_dp.sections import PublicStart

RECIPE = PublicStart(kinds=("shapes",), images=4, iterations=60, batch=4, learning_rate=1e-2, seed=3)


def discs(number: int, edge: int = 24) -> list[LabelledImage]:
    rng, found = np.random.default_rng(0), []
    for _ in range(number):
        x, y = np.indices((edge, edge)) - rng.uniform(8, 16, (2, 1, 1))
        labels = (x**2 + y**2 < rng.uniform(4, 7) ** 2).astype(np.int16)
        found.append(LabelledImage((3 * labels + rng.normal(0, 0.3, labels.shape)).astype(np.float32)[None], labels))
    return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 5, padding=2))


def test_it_learns_to_segment_phantoms():
    phantoms = Phantoms(discs(8), (24, 24), (1.0, 1.0), (True,))
    model = network()
    weights = learn(model, functional.cross_entropy, phantoms, RECIPE, torch.device("cpu"))
    held_out = phantoms.batch(16, torch.Generator().manual_seed(9))
    fresh, trained = network(), network()
    trained.load_state_dict(weights)
    losses = [float(functional.cross_entropy(m(held_out[0]), held_out[1]).detach()) for m in (fresh, trained)]
    assert losses[1] < 0.75 * losses[0]


def test_the_same_recipe_gives_the_same_weights():
    phantoms = Phantoms(discs(4), (16, 16), (1.0, 1.0), (True,))
    recipe = RECIPE.model_copy(update={"iterations": 3})
    one, two = (
        learn(network(), functional.cross_entropy, phantoms, recipe, torch.device("cpu")) for _ in range(2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_progress_counts_every_iteration():
    told = []
    recipe = RECIPE.model_copy(update={"iterations": 4})
    phantoms = Phantoms(discs(2), (16, 16), (1.0, 1.0), (True,))
    cpu = torch.device("cpu")
    learn(network(), functional.cross_entropy, phantoms, recipe, cpu, progress=lambda *x: told.append(x))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_small_image_lies_in_the_middle_of_zeros():
    labelled = LabelledImage(np.ones((2, 4, 6), np.float32), np.ones((4, 6), np.int16))
    image, labels = crop(labelled, (8, 6), np.random.default_rng(0))
    assert image.shape == (2, 8, 6) and image[:, 2:6].all() and not image[:, :2].any() and not image[:, 6:].any()
    assert np.array_equal(labels, image[0])


def test_crops_of_a_large_image_mostly_hold_foreground_and_stay_inside():
    labels = np.zeros((100, 100), np.int16)
    labels[10:14, 90:94] = 1
    labelled = LabelledImage(np.indices((100, 100)).astype(np.float32), labels)
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        image, found = crop(labelled, (32, 32), rng)
        hits += found.any()
        assert np.array_equal(np.diff(image[0], axis=0), np.ones((31, 32)))  # one piece, in order
    assert 30 < hits < 60


def test_a_plane_patch_of_a_volume_is_one_of_its_slices():
    volume = np.arange(5 * 8 * 8).reshape(5, 8, 8)
    labelled = LabelledImage(volume[None].astype(np.float32), volume.astype(np.int16))
    image, labels = crop(labelled, (8, 8), np.random.default_rng(0))
    assert any(np.array_equal(labels, volume[k]) for k in range(5)) and np.array_equal(labels, image[0])


def test_the_file_is_named_after_all_facts(tmp_path):
    one, same, other = (start_file(tmp_path, "2d", facts) for facts in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}))
    assert one == same != other and one.name.startswith("2d_")


def test_what_is_written_is_read_again_with_its_provenance(tmp_path):
    file = tmp_path / "public_starts" / "2d_1.pth"
    weights = {"w": torch.arange(3.0)}
    write_start(file, weights, {"recipe": {"kinds": ["shapes"]}})
    found, provenance = read_start(file, {"recipe": {"kinds": ("shapes",)}})
    assert torch.equal(found["w"], weights["w"]) and provenance["recipe"] == {"kinds": ["shapes"]}


@pytest.mark.parametrize("touch", ["weights", "provenance", "no provenance"])
def test_a_start_that_somebody_touched_is_refused(tmp_path, touch):
    file = tmp_path / "2d_1.pth"
    write_start(file, {"w": torch.zeros(2)}, {})
    if touch == "weights":
        torch.save({"network_weights": {"w": torch.ones(2)}}, file)
    elif touch == "provenance":
        file.with_suffix(".json").write_text(json.dumps({"sha256": "0" * 64}))
    else:
        file.with_suffix(".json").unlink()
    with pytest.raises(Refusal, match="delete both"):
        read_start(file, {})


def test_a_start_by_another_recipe_is_refused_under_the_planned_name(tmp_path):
    """A start from an undeclared checkpoint, renamed to the name that the plan expects."""
    file = tmp_path / "2d_1.pth"
    write_start(file, {"w": torch.zeros(2)}, {"recipe": {"public_weights_sha256": "undeclared"}})
    with pytest.raises(Refusal, match="delete both"):
        read_start(file, {"recipe": {"public_weights_sha256": None}})


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(Refusal, match="not finite"):
        write_start(tmp_path / "2d_1.pth", {"w": torch.tensor([1.0, float("nan")])}, {})
    assert not list(tmp_path.iterdir())


def test_whoever_comes_second_waits_for_the_first(tmp_path):
    file, order = tmp_path / "starts" / "2d_1.pth", []

    def second() -> None:
        with only_one(file):
            order.append("second")

    with only_one(file):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join(5)
    assert order == ["first", "second"]