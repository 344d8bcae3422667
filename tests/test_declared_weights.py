"""A model of the same patients is not public, and a declaration is said to be one."""

import json

import pytest
from released import fake_model

from nnunet_dp.declared_weights import refuse_charged_weights
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.plans import read_section
from nnunet_dp.run import FINAL
from nnunet_dp.sections import DECLARED_WEIGHTS, not_covered


def test_a_model_of_this_datasets_ledger_is_not_public_and_one_of_another_may_be(tmp_path):
    ours, theirs = fake_model(tmp_path / "ours"), fake_model(tmp_path / "theirs")
    ours.finish()
    theirs.finish(run="their/fold_0/1")
    refuse_charged_weights(theirs.folder / "fold_0" / FINAL, ours.ledger.parent)
    with pytest.raises(UsageRefusal, match="was trained on the patients of"):
        refuse_charged_weights(ours.folder / "fold_0" / FINAL, ours.ledger.parent)


def test_a_dataset_that_was_never_charged_and_files_of_others_are_no_reason(tmp_path):
    ours = fake_model(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"of somebody")
    refuse_charged_weights(tmp_path / "weights.pth", ours.ledger.parent)
    ours.finish()
    refuse_charged_weights(tmp_path / "weights.pth", ours.ledger.parent)


@pytest.mark.parametrize("declared", [None, "ab" * 32])
def test_declared_weights_are_named_among_what_is_not_covered(tmp_path, declared):
    model = fake_model(tmp_path, public_weights_sha256=declared)
    section = read_section(json.loads((model.folder / "plans.json").read_text()))
    assert section is not None and (DECLARED_WEIGHTS in not_covered(section, "2d")) == bool(declared)
