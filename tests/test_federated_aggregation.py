"""Fixed public weights, and replies that are left out by name."""

import re
from pathlib import Path

import numpy as np
import pytest

from nnunet_dp.federated import aggregation
from nnunet_dp.federated.aggregation import (
    Rejection,
    fault_of_claim,
    fault_of_header,
    fault_of_weights,
    parse,
    weighted_mean,
)
from nnunet_dp.federated.protocol import Code, Reply

EXPECTED = {"w": (2, 2)}


def weights(**changes):
    return {"w": np.ones((2, 2), np.float32)} | changes


def test_the_mean_is_the_slow_and_obvious_one():
    rng = np.random.default_rng(0)
    updates = {site: {"w": rng.normal(size=(3, 4)).astype(np.float32)} for site in "abcd"}
    public = {"a": 1.0, "b": 2.0, "c": 3.5, "d": 0.25}
    slow = sum(public[s] * updates[s]["w"].astype(np.float64) for s in "abcd") / sum(public.values())
    np.testing.assert_allclose(weighted_mean(updates, public)["w"], slow, rtol=1e-6)


def test_a_missing_site_leaves_the_ratio_of_the_others():
    updates = {"a": {"w": np.array([1.0], np.float32)}, "b": {"w": np.array([4.0], np.float32)}}
    assert weighted_mean(updates, {"a": 2.0, "b": 1.0, "gone": 100.0})["w"] == pytest.approx(2.0)


def test_the_order_in_which_replies_come_does_not_matter():
    rng = np.random.default_rng(1)
    updates = {site: {"w": rng.normal(size=100).astype(np.float32)} for site in "abc"}
    shuffled = {site: updates[site] for site in "cab"}
    public = dict.fromkeys("abc", 1.0)
    assert weighted_mean(updates, public)["w"].tobytes() == weighted_mean(shuffled, public)["w"].tobytes()


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({}, Rejection.names),
        (weights(more=np.ones(1, np.float32)), Rejection.names),
        ({"w": np.ones((2, 3), np.float32)}, Rejection.shape),
        ({"w": np.ones((2, 2))}, Rejection.dtype),
        ({"w": np.full((2, 2), np.nan, np.float32)}, Rejection.not_finite),
        ({"w": np.full((2, 2), np.inf, np.float32)}, Rejection.not_finite),
    ],
)
def test_weights_that_were_not_asked_for_are_named(arrays, why):
    assert fault_of_weights(arrays, EXPECTED) is why


def test_weights_that_were_asked_for_pass():
    assert fault_of_weights(weights(), EXPECTED) is None


@pytest.mark.parametrize(
    "header", ["", "{}", "[]", "null", '{"code": "ok"}', '{"code": 1, "run": "0a"}', "[" * 10_000, '{"epsilon": NaN}']
)
def test_a_header_that_is_no_reply_is_malformed(header):
    assert parse(header) is Rejection.header


def test_a_reply_with_anything_more_is_malformed():
    good = Reply(code=Code.ok, site="a", run="0a").model_dump_json()
    assert parse(good[:-1] + ', "loss": 0.3}') is Rejection.header


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"run": "0b"}, Rejection.run), ({"round": 1}, Rejection.round), ({"site": "eve"}, Rejection.site), ({}, None)],
)
def test_a_reply_to_something_else_is_named(changes, why):
    reply = Reply(**({"code": Code.ok, "site": "a", "run": "0a", "round": 2} | changes))
    assert fault_of_header(reply, "0a", 2, "a") is why


def test_a_code_that_nobody_knows_is_named():
    assert parse('{"code": "well", "site": "a", "run": "0a"}') is Rejection.code


def test_a_unit_that_would_write_on_a_terminal_is_malformed():
    assert parse(Reply(code=Code.ok, site="a", run="0a", unit="x\nround 9/9").model_dump_json()) is Rejection.header


@pytest.mark.parametrize("missing", ["epsilon", "delta", "unit"])
def test_a_site_that_trained_privately_says_what_it_cost(missing):
    said = {"epsilon": 1.0, "delta": 1e-5, "unit": "patient"}
    whole = Reply(code=Code.ok, site="a", run="0a", **said)
    assert fault_of_claim(whole) is None
    assert fault_of_claim(whole.model_copy(update={missing: None})) is Rejection.epsilon


@pytest.mark.parametrize("said", [{"epsilon": 0.0}, {"delta": 0.5}])
def test_a_site_cannot_train_for_nothing_or_promise_nothing(said):
    whole = {"epsilon": 1.0, "delta": 1e-5, "unit": "patient"}
    assert fault_of_claim(Reply(code=Code.ok, site="a", run="0a", **(whole | said))) is Rejection.epsilon


def test_a_mean_of_many_sites_is_summed_in_double_precision():
    updates = {f"s{k:04}": {"w": np.array([1.0 if k == 0 else 1e-8], np.float32)} for k in range(2001)}
    found = weighted_mean(updates, dict.fromkeys(updates, 1.0))["w"][0]
    assert found == np.float32((1.0 + 2000 * np.float64(np.float32(1e-8))) / 2001)
    assert found != np.float32(1.0 / 2001)  # what a sum in float32 would give


def test_no_source_of_the_coordinator_weights_by_what_sites_count():
    package = Path(aggregation.__file__).parent
    for name in ("aggregation", "coordinator", "client_level", "enrolment", "progress", "flower_transport"):
        found = re.findall(r"num.?examples|numTraining|len\(drawn|MetricRecord", (package / f"{name}.py").read_text())
        assert found == []
