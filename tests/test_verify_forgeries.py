"""What a careful forger plants, who knows the schemas: consistent lies, and room where nobody looks."""

from __future__ import annotations

import collections
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from released import archive_of, edited, fake_model, files_of
from test_verify import (
    CHECKPOINT,
    SAFE,
    Files,
    Plant,
    architecture_of,
    card,
    faults_of,
    good,  # noqa: F401
    in_checkpoint,
    in_json,
)

from nnunet_dp.card import Card, CardCharge, ClipRow, SiteRow, sentence
from nnunet_dp.charges import epsilon_of
from nnunet_dp.errors import Refusal
from nnunet_dp.export import export_model
from nnunet_dp.plans import write_json
from nnunet_dp.released_weights import safetensors_bytes
from nnunet_dp.verify import Verified


class Attributed(collections.OrderedDict):
    """Pickled by its base's name, with attributes."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"patients": ["tube_07"]}, None, iter(self.items())


def with_attributes(name: str) -> Plant:
    return in_checkpoint(lambda content: content.update({name: Attributed(content[name])}))


def in_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Plant:
    """In both files alike."""

    def plant(files: Files) -> None:
        in_checkpoint(lambda content: edit(content["network_weights"]))(files)
        content = torch.load(io.BytesIO(files[CHECKPOINT]), weights_only=True)
        files[SAFE] = safetensors_bytes(content["network_weights"])

    return plant


def _first(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights if weights[name].dim() > 1)


def _not_finite(weights: dict[str, torch.Tensor]) -> None:
    weights[_first(weights)].view(-1)[0] = float("nan")


def _apart(weights: dict[str, torch.Tensor]) -> None:
    """Two names of one tensor, of which nnU-Net uses the last that it loads."""
    twin = next(name for name in weights if name.startswith("decoder.encoder."))
    weights[twin] = weights[twin].clone() + 1


def _charges(said: Card, rows: list[CardCharge], folds: list[Any]) -> dict[str, Any]:
    epsilon = epsilon_of([row.charge for row in rows], said.delta)
    total = said.dataset.model_copy(update={"epsilon_total": epsilon}) if said.dataset else None
    return {"charges": rows, "folds": folds, "epsilon": epsilon, "dataset": total}


def _one_charge_for_all_steps(files: Files) -> None:
    said = Card.model_validate_json(files["privacy_card.json"])
    (row,) = (row for row in said.charges if row.purpose == "training")
    fold = said.folds[0].model_copy(update={"charges": 1, "steps": 300})
    card(**_charges(said, [row.model_copy(update={"count": 1})], [fold]))(files)


def _no_training_at_all(files: Files) -> None:
    said = Card.model_validate_json(files["privacy_card.json"])
    row = said.charges[0].model_copy(update={"purpose": "fingerprint", "count": 1})
    fold = said.folds[0].model_copy(update={"charges": 0, "steps": 300})
    card(**_charges(said, [row], [fold]))(files)


def _at_sites(files: Files) -> None:
    site = SiteRow(
        site=1, epsilon=0.01, delta=1e-9, unit="patient", rounds=5, counted="as reported", charges=[],
        epsilon_total=None, thresholds=[],
    )  # fmt: skip
    card(charges=[], dataset=None, clip=None, epsilon=0.01, delta=1e-9, sampler=None, sites=[site])(files)


def _given_nothing(files: Files) -> None:
    said = Card.model_validate_json(files["privacy_card.json"])
    card(not_covered=[what for what in said.not_covered if what != "plans_from_raw_fingerprint"])(files)


def _padded_header(files: Files) -> None:
    content = files[SAFE]
    length = int.from_bytes(content[:8], "little")
    files[SAFE] = (length + 800).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 800 + content[8 + length :]


def _batch_norm(plans: dict[str, Any]) -> None:
    arguments = architecture_of(plans)["arch_kwargs"]
    arguments.update(norm_op="torch.nn.BatchNorm2d", norm_op_kwargs={})


PROSE = "patient, certified by the data protection office; epsilon is (0.1, 1e-09) when audited"
FORGERIES: dict[str, tuple[Plant, str]] = {
    "attributes of the weights": (with_attributes("network_weights"), "code (BUILD)"),
    "attributes of the arguments": (with_attributes("init_args"), "code (BUILD)"),
    "doubles": (
        in_weights(lambda w: w.update({name: tensor.double() for name, tensor in w.items()})), "is torch.float64, the",
    ),
    "integers": (in_weights(lambda w: w.update({_first(w): w[_first(w)].long()})), "is torch.int64, the network"),
    "not finite": (in_weights(_not_finite), "holds numbers that are not finite"),
    "a second network under the twins' names": (in_weights(_apart), "which the network knows as the same"),
    "BatchNorm": (in_json("plans.json", _batch_norm), "couples patients or keeps un-noised statistics"),
    "one charge for all steps": (_one_charge_for_all_steps, "took 300 steps on 1 charges"),
    "no training charge": (_no_training_at_all, "the charges count 0 training steps"),
    "sites in place of a ledger": (_at_sites, "nnUNetTrainerDP_AutoS should not be charged at sites"),
    "given nothing": (_given_nothing, "plans_from_raw_fingerprint should be in not_covered"),
    "prose for a unit": (in_json("privacy_card.json", lambda c: c.update(unit=PROSE)), "unit: String should match"),
    "prose for a rule": (
        in_json("privacy_card.json", lambda c: c["clip"].update(rule="no clipping at all")), "clip.rule: Input should",
    ),
    "constants of no rule": (card(clip=ClipRow(rule="flat", constants={"bound": 1.0, "k": 2.5})), "clip: clip rule"),
    "many constants": (
        in_json("privacy_card.json", lambda c: c["clip"].update(constants={f"k{i}": 1.1 * i for i in range(5000)})),
        "clip.constants: Dictionary should have at most",
    ),
    "blanks in the header of safetensors": (_padded_header, "is not written as safetensors writes"),
    "many spacings": (
        in_json("plans.json", lambda c: c["configurations"]["2d"].update(spacing=[1.5] * 3000)), "at most 3 items",
    ),
    "many channels": (
        in_json("plans.json", lambda c: c["foreground_intensity_properties_per_channel"].update({"7": {}})),
        "intensity properties of its 1 channels",
    ),
    "a thousand convolutions": (
        in_json("plans.json", lambda c: architecture_of(c)["arch_kwargs"].update(n_conv_per_stage=1500)),
        "less than or equal to 32",
    ),
    "a text that hides itself": (
        in_json("privacy_card.json", lambda c: c["public_inputs"].append("a\u202eb")), "printable characters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_careful_forgery_is_found_and_named(good, forgery):  # noqa: F811
    plant, words = FORGERIES[forgery]
    root, files = files_of(good)
    plant(files)
    assert words in faults_of(archive_of(root, files))


def test_an_archive_says_nothing_to_the_terminal():
    found = Verified("model.zip", (("\x1b[2K\x1b[1Aharmless", 1, None),), ("\x1b[2Kfault",), None)
    assert all(text.isprintable() for line in found.lines() for text in line)


# ---- what an export is made from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["delta", "epsilon"])
def test_plans_that_the_run_was_not_charged_under_are_not_exported(tmp_path, monkeypatch, name):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    model = fake_model(tmp_path)
    model.finish()
    plans = json.loads((model.folder / "plans.json").read_text())
    plans["differential_privacy"]["budget"][name] *= 2
    write_json(plans, model.folder / "plans.json")
    with pytest.raises(Refusal, match="another budget, schedule or fingerprint than its ledger lines"):
        export_model(model.folder, tmp_path / "model.zip")
    assert not (tmp_path / "model.zip").exists()


def test_weights_that_no_network_computes_with_are_not_exported(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    model = fake_model(tmp_path)
    model.finish()
    final = model.folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(final, weights_only=True)
    _not_finite(content["network_weights"])
    torch.save(content, final)
    with pytest.raises(Refusal, match="not finite"):
        export_model(model.folder, tmp_path / "model.zip")


def test_the_claim_follows_the_numbers_of_the_card(good):  # noqa: F811
    said = Card.model_validate_json(files_of(good)[1]["privacy_card.json"])
    other = Card.model_validate_json(edited(Card, said.content, epsilon=2 * said.epsilon))
    assert sentence(other) != said.claim == sentence(said)
