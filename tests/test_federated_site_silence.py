"""What a site's replies must not tell: nothing about one patient by failing, nothing less than was spent."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from one_site import DATASET, LEDGER, Site, coordinator_plans, first_weights, make_site, terms
from PIL import Image

from nnunet_dp.federated import site_round
from nnunet_dp.federated.protocol import FingerprintRequest, Mode
from nnunet_dp.federated.summary import Summary, recounted
from nnunet_dp.status import read_status
from nnunet_dp.unusable import EmptyWhereUnusable


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Site:
    site = make_site(tmp_path_factory.mktemp("site"))
    assert site.prepare().code == "ok", site.log()
    return site


@pytest.fixture
def site(prepared, tmp_path) -> Site:
    return prepared.copied_to(tmp_path / "site")


@pytest.fixture(scope="module")
def weights(prepared):
    return first_weights(prepared)


# ---- a patient who cannot be used --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a training case cannot be used")
@pytest.mark.parametrize("mode", ["dp-fedavg", "adp-fl"])
def test_a_label_that_does_not_exist_counts_as_nothing_and_the_reply_is_as_always(tmp_path, mode):
    site = make_site(tmp_path / "site")
    label = sorted((site.root / "raw" / DATASET / "labelsTr").glob("*.png"))[0]
    Image.fromarray(np.where(np.asarray(Image.open(label)) > 0, 7, 0).astype(np.uint8)).save(label)
    assert site.prepare().code == "ok", site.log()
    answer = site.train(terms(mode=mode), 0, first_weights(site))
    assert answer.code == "ok", site.log()
    assert all(np.isfinite(array).all() for array in answer.arrays.values())


@pytest.mark.filterwarnings("ignore:a training case cannot be used")
def test_a_file_that_cannot_be_read_counts_as_nothing_and_the_reply_is_as_always(site, weights):
    data = next(site.preprocessed.glob("federated_*_2d"))
    for file in sorted(data.glob("*.b2nd"))[:2]:
        file.write_bytes(b"torn")
    answer = site.train(terms(), 0, weights)
    assert answer.code == "ok", site.log()


def test_an_empty_record_has_the_shapes_of_a_full_one_and_a_full_one_is_untouched():
    data, targets = np.ones((2, 3, 8, 8), np.float32), [np.ones((2, 1, 8, 8)), np.ones((2, 1, 4, 4))]
    shapes = tuple(target.shape for target in targets)
    good = EmptyWhereUnusable(lambda cases: (data, targets), data.shape, shapes, {0, 1})
    assert good(("a",))[0] is data and good(("a",))[1] is targets
    for spoil in (lambda t: [t[0] * 9, t[1]], lambda t: [t[0], t[1][:1]], lambda t: [t[0]]):
        with pytest.warns(UserWarning, match="counts as nothing"):
            empty, zeros = EmptyWhereUnusable(lambda cases, s=spoil: (data, s(targets)), data.shape, shapes, {0, 1})(())
        assert np.isnan(empty).all() and [zero.shape for zero in zeros] == list(shapes)


# ---- a coordinator does not choose how images are read -----------------------------------------------------------


@pytest.mark.parametrize("changed", ["normalization_schemes", "image_reader_writer"])
def test_plans_that_read_or_normalise_otherwise_than_the_description_are_declined(tmp_path, changed):
    site, plans = make_site(tmp_path / "site"), coordinator_plans()
    if changed == "image_reader_writer":
        plans[changed] = "SimpleITKIO"
    else:
        plans["configurations"]["2d"][changed] = ["RGBTo01Normalization"] * 3
    assert site.prepare(plans).code == "plans_mismatch" and "as the description of this dataset says" in site.log()
    assert not list(site.preprocessed.glob("federated/plans_tried.json"))


# ---- nothing less than was spent ---------------------------------------------------------------------------------


def test_weights_that_are_not_finite_stay_but_what_they_cost_is_said(site, weights, monkeypatch):
    broken = {name: np.full_like(array, np.nan) for name, array in weights.items()}
    with monkeypatch.context() as spoiled:
        spoiled.setattr(site_round, "weights_of", lambda network: broken)
        answer = site.train(terms(), 0, weights)
    assert answer.code == "failed" and not answer.arrays and 0 < answer.reply.epsilon < 8


def test_a_site_nobody_heard_of_is_counted_from_its_ledger(site, weights):
    spent = site.train(terms(), 0, weights).reply.epsilon
    silent = Summary(terms().run, Mode.dp_fedavg, 0, complete=False, sites=())
    (found,) = recounted(silent, {"north": (site.root / "results" / DATASET, site.preprocessed)}).sites
    assert (found.name, found.rounds, found.recounted, found.unit) == ("north", 0, spent, "patient")
    other = Summary("ff", Mode.dp_fedavg, 0, complete=False, sites=())
    assert recounted(other, {"north": (site.root / "results" / DATASET, site.preprocessed)}).sites == ()


def test_a_run_whose_record_and_folder_are_lost_does_not_begin_from_zero(site, weights):
    assert site.train(terms(), 0, weights).code == "ok"
    shutil.rmtree(site.root / "results")
    for file in (site.preprocessed / "federated").glob("run_*.json"):
        file.unlink()
    assert site.train(terms(), 1, weights).code == "ledger_refuses" and "put them back" in site.log()
    assert len(site.charges()) == 2


def test_an_exact_fingerprint_and_a_private_training_are_not_one_run(site, weights):
    allowed = site.with_settings(allow_no_guarantee=True)
    described = allowed.query().reply.dataset_json
    exact = FingerprintRequest(run="0a", mode="fedavg", epsilon=8.0, share=0.1, dataset_json=described)
    assert allowed.say("fingerprint", exact.model_dump_json()).code == "ok", site.log()
    assert allowed.train(terms(), 0, weights).code == "malformed" and site.charges() == []
    assert allowed.train(terms(run="0b"), 0, weights).code == "ok"


@pytest.mark.parametrize("left", ["preprocessed", "results"])
def test_status_claims_no_total_once_the_dataset_was_used_without_a_guarantee(site, weights, monkeypatch, left):
    monkeypatch.setenv("nnUNet_preprocessed", str(site.root / "preprocessed"))
    assert site.train(terms(), 0, weights).code == "ok"
    before = read_status(site.fold)
    assert before.epsilon_dataset_total == pytest.approx(before.epsilon_spent)
    free = site.with_settings(allow_no_guarantee=True)
    assert free.train(terms(run="0b", mode="fedavg"), 0, weights).code == "ok"
    lost = site.preprocessed if left == "results" else site.root / "results" / DATASET
    (lost / "federated" / "NO_GUARANTEE.txt").unlink()
    if left == "preprocessed":
        shutil.rmtree(site.model("nnUNetTrainer_FedNoGuarantee"))
    after = read_status(site.fold)
    assert after.epsilon_dataset_total is None and after.released_without_guarantee
    assert any("WITHOUT ANY GUARANTEE" in value for _, value in after.lines())


def test_status_of_a_site_counts_the_fingerprint_of_its_run(site, weights, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(site.root / "preprocessed"))
    described = site.query().reply.dataset_json
    request = FingerprintRequest(run="0a", mode="dp-fedavg", epsilon=8.0, share=0.1, dataset_json=described)
    assert site.say("fingerprint", request.model_dump_json()).code == "ok", site.log()
    spent = site.train(terms(), 0, weights).reply.epsilon
    found = read_status(site.fold)
    assert found.epsilon_spent == pytest.approx(spent) == found.epsilon_dataset_total
    assert "the plans, which follow a noised fingerprint" in found.covers
    kept = (site.preprocessed / LEDGER).read_bytes().splitlines(keepends=True)
    (site.preprocessed / LEDGER).write_bytes(b"".join(kept[1:]))
    with pytest.raises(Exception, match=r"edited|missing|chain|lost|previous"):
        read_status(site.fold)
