"""What coordinator and sites can say to each other is closed: fields, words, finite numbers, short names."""

import doctest

import numpy as np
import pytest
from pydantic import ValidationError

from nnunet_dp.federated import protocol
from nnunet_dp.federated.protocol import (
    KINDS,
    Code,
    Mode,
    PrepareRequest,
    QueryRequest,
    Reply,
    Terms,
    TrainRequest,
    arrays_sha256,
)

SHA = "ab" * 32
TERMS = {"run": "0a", "mode": "adp-fl", "epsilon": 8.0, "rounds": 4, "plans_sha256": SHA, "configuration": "2d"}
SAID = {
    Terms: TERMS,
    QueryRequest: {"run": "0a"},
    PrepareRequest: {"run": "0a", "plans": {}, "dataset_json": {}, "configuration": "2d", "plans_sha256": SHA},
    TrainRequest: {"terms": TERMS, "round": 0, "weights_sha256": SHA},
    Reply: {"code": "ok", "site": "north", "run": "0a"},
}
every = pytest.mark.parametrize("model", SAID)


@every
def test_a_message_survives_its_json(model):
    message = model.model_validate(SAID[model])
    assert model.model_validate_json(message.model_dump_json()) == message


@every
@pytest.mark.parametrize("more", ["loss", "dice", "num_examples", "patients", "message"])
def test_nothing_can_be_added_to_a_message(model, more):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model.model_validate(SAID[model] | {more: 1})


@every
def test_a_message_of_another_protocol_is_refused(model):
    with pytest.raises(ValidationError, match="protocol"):
        model.model_validate(SAID[model] | {"protocol": 2})


@every
def test_a_message_does_not_change_after_it_was_checked(model):
    message = model.model_validate(SAID[model])
    with pytest.raises(ValidationError, match="frozen"):
        message.protocol = 1


def test_a_reply_has_no_field_for_counts_losses_dice_or_texts():
    said = {"protocol", "code", "site", "run", "round", "dataset_json", "versions", "plans_sha256"}
    assert set(Reply.model_fields) == said | {"epsilon", "delta", "unit", "bound"}


def test_the_words_for_how_it_went_are_these():
    told = {"ok", "budget_spent", "settings_refuse", "version_mismatch", "plans_mismatch", "not_prepared"}
    assert {code.value for code in Code} == told | {"ledger_refuses", "busy", "malformed", "failed"}
    with pytest.raises(ValidationError, match="code"):
        Reply.model_validate(SAID[Reply] | {"code": "patient 17 has no mask"})


@pytest.mark.parametrize("field", ["epsilon", "delta", "bound"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_of_a_reply_are_finite_and_not_negative(field, value):
    with pytest.raises(ValidationError, match=field):
        Reply.model_validate(SAID[Reply] | {field: value})


@pytest.mark.parametrize("site", ["", ".", "..", "../x", "a/b", "-x", "a b", "a\n", "x" * 41, "north;rm"])
def test_a_sites_name_can_stand_in_a_file_name(site):
    with pytest.raises(ValidationError, match="site"):
        Reply.model_validate(SAID[Reply] | {"site": site})


@pytest.mark.parametrize("run", ["", "0A", "g", "0a/..", "0" * 65])
def test_a_runs_identifier_is_hex(run):
    with pytest.raises(ValidationError, match="run"):
        QueryRequest.model_validate({"run": run})


def test_a_units_name_is_short():
    with pytest.raises(ValidationError, match="unit"):
        Reply.model_validate(SAID[Reply] | {"unit": "x" * 41})


def test_laplace_noise_without_the_full_batch_has_no_price():
    with pytest.raises(ValidationError, match="full batch"):
        Terms.model_validate(TERMS | {"noise": "laplace", "sampling_probability": 0.5})
    assert Terms.model_validate(TERMS | {"noise": "laplace"}).rule == "quantile_l1"


@pytest.mark.parametrize("mode", Mode)
def test_only_two_modes_have_a_guarantee(mode):
    assert Terms.model_validate(TERMS | {"mode": mode}).private is (mode.value in ("dp-fedavg", "adp-fl"))


def test_noise_is_calibrated_for_every_local_step_of_every_round():
    assert Terms.model_validate(TERMS | {"rounds": 7, "local_steps": 3}).steps == 21


def test_the_digest_of_weights_sees_names_types_shapes_and_bytes_and_no_order():
    one = {"a": np.zeros((2, 3), np.float32), "b": np.ones(1, np.float32)}
    others = [
        {**one, "a": np.zeros((3, 2), np.float32)},
        {**one, "a": np.zeros((2, 3), np.float64)},
        {**one, "a": np.full((2, 3), 1e-30, np.float32)},
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"]},
    ]
    assert arrays_sha256(dict(reversed(one.items()))) == arrays_sha256(one)
    assert arrays_sha256(one | {"a": np.asfortranarray(one["a"])}) == arrays_sha256(one)
    assert len({arrays_sha256(arrays) for arrays in [one, *others]}) == 6


def test_the_docstring_has_a_runnable_example_and_names_every_kind():
    examples = [test for test in doctest.DocTestFinder().find(protocol) if test.examples]
    assert examples and not any(doctest.DocTestRunner(verbose=False).run(test).failed for test in examples)
    assert all(f"``{kind}``" in (protocol.__doc__ or "") for kind in KINDS)
