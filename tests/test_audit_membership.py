"""Membership inference on phantom-trained models, and its report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from nnunet_dp.accounting import epsilon as accounted
from nnunet_dp.audit import membership, phantom_audit, statistics
from nnunet_dp.audit.membership import Attacked, Model, attack_settings, lira, phantom_slice, private_plan
from nnunet_dp.audit.phantom_audit import BOUNDS_PER_SETTING, FAMILY_ERROR, refuse_private_data, run_audit
from nnunet_dp.audit.reconstruction import Inverted
from nnunet_dp.audit.report import lines, page, write_report
from nnunet_dp.charges import content_hash
from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal, UsageRefusal

TINY = Attacked(patients=10, models=3, steps=2, start_iterations=2, iterations=2, features=(4, 8), guessed=0.4)


@pytest.fixture(scope="module")
def report() -> dict:
    return run_audit([1.0], TINY, seed=1, processes=1, canaries=30, inverted=Inverted(patients=1, iterations=1))


# ---- attacks -----------------------------------------------------------------------------------------------------


def test_lira_finds_a_patient_whose_loss_falls_when_it_is_a_member_and_nothing_where_it_does_not():
    rng = np.random.default_rng(1)
    included = rng.random((12, 80)) < 0.5
    hard = rng.normal(0.8, 0.2, 80)  # some patients are hard, whoever is a member: the plain loss cannot tell
    losses = np.abs(hard + rng.normal(0, 0.03, included.shape) - 0.12 * included)
    plain = statistics.auc(-losses.ravel(), included.ravel())
    found = statistics.auc(lira(losses, included).ravel(), included.ravel())
    assert found > 0.95 and found > plain + 0.1
    blind = np.abs(hard + rng.normal(0, 0.03, included.shape))
    assert 0.4 < statistics.auc(lira(blind, included).ravel(), included.ravel()) < 0.6


def test_lira_does_not_look_at_the_coins_of_the_model_that_it_attacks():
    rng = np.random.default_rng(2)
    losses, included = rng.random((5, 9)), rng.random((5, 9)) < 0.5
    turned = included.copy()
    turned[3] = ~turned[3]
    assert np.array_equal(lira(losses, included)[3], lira(losses, turned)[3])


def test_lira_bears_a_patient_who_was_in_all_models_or_in_none():
    losses = np.random.default_rng(3).random((4, 3))
    included = np.array([[True, False, True]] * 4)
    assert np.isfinite(lira(losses, included)).all()


def test_attacks_find_the_members_of_models_that_remember_them():
    """Scores as a model gives them that has learnt its members by heart: the audit must refute a small epsilon."""
    rng = np.random.default_rng(4)
    models = []
    for _ in range(6):
        included = rng.random(60) < 0.5
        models.append(Model(included, {"loss": included - 2.0, "labels": included * 1.0}, ()))
    sizes = Attacked(patients=60, models=6, guessed=1.0)
    attacks = {a["attack"]: a for a in membership._setting(None, models, sizes, 1)["attacks"]}
    assert attacks["loss"]["auc"] == 1.0 and attacks["loss"]["at"][0]["true_positive_rate"] == 1.0
    assert attacks["loss"]["epsilon_at_least"] > 1.0


def test_a_phantom_slice_shows_both_classes_and_nobody_held_out_is_in_the_pool():
    record = phantom_slice(1, 0)
    assert set(record.target.unique().tolist()) == {0, 1, 2}
    assert not any((phantom_slice(1, k, held_out=True).data == record.data).all() for k in range(4))


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_a_private_plan_costs_training_and_vote_together_at_most_its_epsilon(epsilon):
    plan = private_plan(epsilon, TINY)
    plan.verify()
    assert 0.98 * epsilon <= accounted(plan.events, TINY.delta) <= epsilon


def test_too_few_models_for_shadows_are_refused():
    with pytest.raises(UsageRefusal, match="at least 3 models"):
        replace(TINY, models=2)


# ---- the report --------------------------------------------------------------------------------------------------


def test_the_protocol_is_hashed_and_every_setting_is_attacked(report):
    assert content_hash(report["protocol"]) == report["protocol_sha256"]
    assert [setting["setting"] for setting in report["membership"]] == ["without privacy", "epsilon 1"]
    private = report["membership"][1]
    assert 0 < private["epsilon"] <= 1.0
    names = {attack["attack"] for attack in private["attacks"]}
    assert {"loss", "loss_class_1", "boundary", "lira", "labels", "labels_fixed"} <= names
    assert len(report["canaries"][0]["ledger_epsilon"]) == phantom_audit.CANARY_STEPS


def test_bounds_are_corrected_for_at_least_as_many_as_are_made(report):
    most = max(len(setting["attacks"]) for setting in report["membership"]) + 3
    assert most <= BOUNDS_PER_SETTING
    assert report["canaries"][0]["corrected"]["confidence"] == pytest.approx(1 - FAMILY_ERROR / BOUNDS_PER_SETTING)


def test_a_bound_above_the_ledger_is_said_to_refute_it(report):
    planted = [run | {"corrected": run["corrected"] | {"one_run": 3.0}} for run in report["canaries"]]
    assert "epsilon at least 3" in phantom_audit._refuted(planted, [], 1e-5)[0]
    sure = {"canaries": 400, "guesses": 400, "right": 400}
    attacked = [report["membership"][1] | {"attacks": [report["membership"][1]["attacks"][0] | {"guesses": sure}]}]
    assert len(phantom_audit._refuted(report["canaries"], attacked, 1e-5)) == 1


def test_the_html_needs_nothing_else_and_says_what_an_audit_is_not(report, tmp_path):
    files = write_report(report, tmp_path / "out")
    html = (tmp_path / "out" / "audit.html").read_text()
    assert set(files) == {"audit.json", "audit.html", "canaries.png", "roc.png"}
    assert "does not prove privacy" in html and report["protocol_sha256"] in html
    assert "http" not in html and "<script" not in html
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["note"] == report["note"]
    assert (tmp_path / "out" / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_html_escapes_what_it_shows(report):
    text = page(report | {"refuted": ["<b>bold</b>"]}, {"canaries": b"", "roc": b""})
    assert "<b>bold" not in text and "&lt;b&gt;" in text


def test_the_report_in_lines_names_the_best_attack(report):
    found = dict(lines(report))
    assert found["membership, epsilon 1"].startswith("best AUC") and "note" in found


def test_patients_data_are_refused_by_name(capsys):
    with pytest.raises(Refusal, match="audits run on phantoms"):
        refuse_private_data("4")
    assert main(["audit", "-d", "4"]) == 1
    said = capsys.readouterr().err
    assert "audits run on phantoms; found dataset 4" in said and "ledger" in said


def test_claims_that_are_no_numbers_are_wrong_usage(capsys):
    for text in ("one", "0", "-1", ""):
        assert main(["audit", "--epsilon", text]) == 2
    assert "type for instance --epsilon 1,8" in capsys.readouterr().err


def test_the_command_writes_the_report_and_ends_with_1_where_a_claim_is_refuted(monkeypatch, report, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(phantom_audit, "run_audit", lambda *given: asked.append(given) or dict(report))
    assert main(["audit", "--epsilon", "1", "-o", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refuted"] == [] and asked[0][0] == [1.0]
    broken = report | {"refuted": ["canaries: epsilon at least 9"]}
    monkeypatch.setattr(phantom_audit, "run_audit", lambda *given: dict(broken))
    assert main(["audit", "-o", str(tmp_path / "b")]) == 1


@pytest.mark.slow
def test_attacks_succeed_without_privacy_and_stay_below_the_ledgers_bound_with_it():
    without, private = attack_settings([None, 1.0], Attacked(models=6), seed=1, processes=2)
    best = {attack["attack"]: attack["auc"] for attack in without["attacks"]}
    assert max(best.values()) > 0.7
    assert all(attack["epsilon_at_least"] <= 1.0 for attack in private["attacks"])
