"""A site as a coordinator meets it: messages in, replies out, and what is on its disk in between.

The dataset is preprocessed once; every test spoils a copy of it. What must survive between messages is tested with a
process for each message; the rest in this process, where nothing may survive either.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from doors import chain_holds, read_lines, recounted_epsilon, wait_until
from one_site import DATASET, LEDGER, Answer, Site, coordinator_plans, first_weights, make_site, terms, train_header

from nnunet_dp import dpsgd, loading, nnunet
from nnunet_dp.federated import site_round
from nnunet_dp.federated.protocol import Mode, Reply, Terms, arrays_sha256
from nnunet_dp.federated.site import public_part
from nnunet_dp.federated.site_store import SITE_TRAINER, _holding
from nnunet_dp.federated.summary import SiteSummary, Summary, recounted
from nnunet_dp.gradients import trainable
from nnunet_dp.ledger import Ledger
from nnunet_dp.plans import json_sha256
from nnunet_dp.run import LATEST, read_checkpoint

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Site:
    site = make_site(tmp_path_factory.mktemp("site"))
    assert site.prepare().code == "ok", site.log()
    return site


@pytest.fixture
def site(prepared, tmp_path) -> Site:
    return prepared.copied_to(tmp_path / "site")


@pytest.fixture(scope="module")
def weights(prepared) -> Weights:
    return first_weights(prepared)


def moved(weights: Weights, by: float = 0.01) -> Weights:
    return {name: array + np.float32(by) for name, array in weights.items()}


def differ(one: Weights, other: Weights) -> bool:
    return any(not np.array_equal(one[name], other[name]) for name in one)


def state_of(site: Site) -> dict:
    return read_checkpoint(site.fold / LATEST)["private"]


# ---- rounds ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(prepared, weights, tmp_path_factory) -> Iterator[tuple[Site, list, list]]:
    """Two rounds of adp-fl with momentum, each in a process of its own; states after each."""
    root = tmp_path_factory.mktemp("apart")
    site, asked = prepared.copied_to(root / "site"), terms(mode="adp-fl", momentum=0.5)
    answers, states = [], []
    for number in range(2):
        sent = answers[-1].arrays if answers else weights
        answers.append(site.train_apart(root / f"message_{number}", asked, number, sent))
        states.append(state_of(site))
    yield site, answers, states


def test_two_rounds_in_two_processes_change_the_weights(apart, weights):
    _, (first, second), _ = apart
    assert (first.code, second.code) == ("ok", "ok")
    assert set(first.arrays) == set(second.arrays) == set(weights)
    assert differ(first.arrays, weights) and differ(second.arrays, first.arrays)
    assert all(array.dtype == np.float32 for array in second.arrays.values())


def test_each_local_step_is_one_gaussian_line_in_the_ledger(apart):
    site, _, _ = apart
    lines = site.charges()
    assert chain_holds(lines) and [line["first_step"] for line in lines] == [0, 1, 2, 3]
    said = {(line["mechanism"], line["purpose"], line["unit"]) for line in lines}
    assert said == {("gaussian", "training", "patient")}
    assert len({line["run"] for line in lines}) == 1
    assert read_lines(site.fold / LEDGER) == lines


def test_the_epsilon_in_the_reply_is_what_an_auditor_counts_from_the_ledger(apart):
    site, answers, _ = apart
    replies = [answer.reply for answer in answers]
    counted = [recounted_epsilon(site.charges()[: 2 * k], replies[0].delta) for k in (1, 2)]
    assert [reply.epsilon for reply in replies] == pytest.approx(counted, rel=0.01)
    assert replies[0].delta == 1e-5 and replies[0].unit == "patient"


def test_threshold_and_momentum_survive_between_processes(apart):
    _, answers, (first, second) = apart
    assert [answer.reply.bound for answer in answers] == [first["bound"], second["bound"]]
    assert first["bound"] != 1.0 and second["bound"] != first["bound"]
    assert (first["step"], second["step"]) == (2, 4)
    buffers = [
        torch.cat([part["momentum_buffer"].flatten() for part in state["optimizer"]["state"].values()])
        for state in (first, second)
    ]
    assert buffers[0].norm() > 0 and not torch.equal(*buffers)


def test_status_reads_the_run_of_a_site_as_any_other(apart, monkeypatch):
    from nnunet_dp import status

    site, answers, _ = apart
    monkeypatch.setattr(status, "TRAINER_NAMES", (*status.TRAINER_NAMES, SITE_TRAINER))  # the door is added elsewhere
    monkeypatch.setenv("nnUNet_preprocessed", str(site.root / "preprocessed"))
    found = status.read_status(site.fold)
    assert found.epsilon_spent == found.epsilon_dataset_total == answers[-1].reply.epsilon
    assert (found.steps_done, found.steps_planned, found.unit) == (4, 6, "patient")
    assert "charges_for_the_same_patient_at_other_sites" in found.not_covered


def test_momentum_of_the_round_before_moves_the_weights_of_the_next(site, weights, monkeypatch):
    """Without gradients and without noise only the remembered momentum can move anything."""
    asked = terms(momentum=0.5, rounds=8, local_steps=1)
    assert site.train(asked, 0, weights).code == "ok"
    monkeypatch.setattr(dpsgd.SubsampledGaussian, "release", _nothing)
    answer = site.train(asked, 1, weights)
    assert answer.code == "ok" and differ(answer.arrays, weights)
    assert not differ(site.copied_to(site.root / "x").train(terms(run="0b", local_steps=1), 0, weights).arrays, weights)


def _nothing(mechanism, clipped, receipt, generator):
    receipt.spend(mechanism.event)
    return dpsgd.NoisedSum(tuple(torch.zeros_like(tensor) for tensor in clipped.tensors), clipped.l2_bound)


def test_global_weights_replace_those_of_the_site(site, weights, monkeypatch):
    monkeypatch.setattr(dpsgd.SubsampledGaussian, "release", _nothing)
    site.train(terms(), 0, weights)
    other = moved(weights)
    assert not differ(site.train(terms(), 1, other).arrays, other)


def test_a_round_at_a_site_is_private_training_on_the_same_data_to_the_bit(site, weights, tmp_path, monkeypatch):
    """Against the trainer's own network, loss, transforms and loader, with draws and noise from fixed generators."""
    asked = terms(sampling_probability=0.5, momentum=0.3, local_steps=3)
    fixed(monkeypatch)
    answer = site.train(asked, 0, weights)
    assert answer.code == "ok", site.log()
    fixed(monkeypatch)
    central = trained_centrally(site, asked, weights, tmp_path, monkeypatch)
    assert not differ(answer.arrays, central) and differ(central, weights)


def fixed(monkeypatch) -> None:
    """The same draws, patches and noise at every start."""
    keys = iter(range(1000))
    monkeypatch.setattr(dpsgd, "fresh_generator", lambda device: torch.Generator(device).manual_seed(next(keys)))
    monkeypatch.setattr(loading, "fresh_key", lambda: b"k" * 32)


def trained_centrally(site: Site, asked: Terms, weights: Weights, folder: Path, monkeypatch) -> Weights:
    from nnunet_dp.trainers.nnUNetTrainerDP import nnUNetTrainerDP

    for part in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{part}", str(site.root / part))
    monkeypatch.setenv("nnUNet_results", str(folder / "central"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = json.loads((site.fold.parent / "plans.json").read_text())
    dataset_json = json.loads((site.root / "raw" / DATASET / "dataset.json").read_text())
    trainer = nnUNetTrainerDP(plans, "2d", "all", dataset_json, torch.device("cpu"))
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    plan = trainer.private_plan.privacy_plan(trainer.section.budget, "flat", len(trainer._slots()[0]))
    ledger = Ledger(folder / LEDGER, "central", plan.digest())
    schedule = trainer.private_plan.schedule("flat")
    execution = dpsgd.Execution(autocast=partial(nnunet.autocast, torch.device("cpu")))
    training = dpsgd.PrivateTraining(trainer.network.train(), trainer.loss, plan, schedule, execution, ledger)
    names, parameters = trainable(trainer.network)
    with torch.no_grad():
        for name, parameter in zip(names, parameters, strict=True):
            parameter.copy_(torch.from_numpy(weights[name]))
    for _ in range(asked.local_steps):
        training.advance(loader.records)
    return {name: parameter.detach().numpy() for name, parameter in zip(names, parameters, strict=True)}


# ---- lost uploads, crashes ---------------------------------------------------------------------------------------


def test_a_finished_round_is_sent_again_for_nothing(site, weights):
    first = site.train(terms(), 0, weights)
    before = site.charges()
    again = site.train(terms(), 0, weights)
    assert again.header == first.header and not differ(again.arrays, first.arrays)
    assert site.charges() == before and len(before) == 2


def test_a_repeated_round_with_other_weights_is_charged_afresh(site, weights):
    first = site.train(terms(), 0, weights)
    other = site.train(terms(), 0, moved(weights))
    assert other.code == "ok" and differ(first.arrays, other.arrays) and len(site.charges()) == 4


def test_no_sequence_of_repeats_takes_more_steps_than_planned(site, weights):
    asked = terms(rounds=2, local_steps=3)
    codes = [site.train(asked, 0, moved(weights, 0.001 * k)).code for k in range(4)]
    assert codes == ["ok", "ok", "budget_spent", "budget_spent"] and len(site.charges()) == asked.steps


def test_a_site_that_is_killed_among_its_steps_goes_on_and_stays_charged(site, weights, tmp_path):
    asked = terms(rounds=2, local_steps=25)
    process = site.with_settings(processes=2).started(tmp_path / "killed", asked, 0, weights)
    try:
        wait_until(lambda: len(site.charges()) >= 3, process)
        process.kill()  # its loaders live on for a moment, and hold the lock with it
    finally:
        process.kill()
        process.wait()
    charged = len(site.charges())
    assert 3 <= charged < 25 and state_of(site)["step"] == 0
    answers = [site.train(asked, number, weights) for number in (0, 1, 1)]
    assert [answer.code for answer in answers] == ["ok", "ok", "ok"]  # the last one is the second again
    assert len(site.charges()) == asked.steps and chain_holds(site.charges())
    assert state_of(site)["step"] == asked.steps - charged
    assert answers[-1].reply.epsilon <= 8 and site.train(asked, 1, moved(weights)).code == "budget_spent"


@pytest.mark.parametrize("moment", ["before the checkpoint", "after the checkpoint"])
def test_a_kill_around_the_checkpoint_costs_a_round_or_nothing(site, weights, monkeypatch, moment):
    from nnunet_dp.federated import site_round

    assert site.train(terms(), 0, weights).code == "ok"

    def dies(content, file):
        if moment == "after the checkpoint":
            write(content, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        write = site_round.write_checkpoint
        patched.setattr(site_round, "write_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            site.train(terms(), 1, weights)
    assert len(site.charges()) == 4
    answer = site.train(terms(), 1, weights)
    assert answer.code == "ok" and len(site.charges()) == (6 if moment == "before the checkpoint" else 4)
    saved = dict(zip(answer.arrays, state_of(site)["weights"], strict=True))
    assert all(np.array_equal(saved[name].numpy(), array) for name, array in answer.arrays.items())


def test_a_run_that_died_before_its_first_charge_begins_as_if_nothing_had_been(site, weights, monkeypatch):
    from nnunet_dp.federated.site_store import Store

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_run_record", _die)
        with pytest.raises(KeyboardInterrupt):
            site.train(terms(), 0, weights)
    assert site.charges() == [] and site.train(terms(), 0, weights).code == "ok"


def _die(*arguments) -> None:
    raise KeyboardInterrupt


# ---- what the settings protect -----------------------------------------------------------------------------------


def test_terms_above_the_settings_are_refused_before_any_charge(site, weights):
    answer = site.with_settings(max_epsilon=7.9).train(terms(), 0, weights)
    assert answer.code == "settings_refuse" and answer.arrays == {}
    assert site.charges() == [] and not site.fold.exists()


def test_settings_lowered_in_the_middle_of_a_run_end_it(site, weights):
    site.train(terms(), 0, weights)
    assert site.with_settings(max_epsilon=4.0).train(terms(), 1, weights).code == "settings_refuse"
    assert len(site.charges()) == 2


def test_the_smaller_delta_of_terms_and_settings_is_the_one_that_is_promised(site, weights):
    own = site.with_settings(delta=1e-6)
    assert own.train(terms(), 0, weights).reply.delta == 1e-6
    assert own.train(terms(run="0b", delta=1e-4), 0, weights).reply.delta == 1e-6
    assert own.train(terms(run="0c", delta=1e-7), 0, weights).reply.delta == 1e-7


def test_the_datasets_total_over_all_runs_stays_within_the_settings(site, weights):
    bounded = site.with_settings(max_epsilon=9.0)
    assert [bounded.train(terms(), number, weights).code for number in range(3)] == ["ok", "ok", "ok"]
    codes = [bounded.train(terms(run="0b"), number, weights).code for number in range(3)]
    assert codes[-1] == "budget_spent"
    assert recounted_epsilon(site.charges(), 1e-5) <= 9.0
    assert recounted_epsilon([*site.charges(), site.charges()[0]], 1e-5) > 9.0


def test_a_run_that_no_budget_is_left_for_is_declined_before_it_is_prepared_and_charges_nothing(site, weights):
    assert [site.train(terms(), number, weights).code for number in range(3)] == ["ok", "ok", "ok"]
    before, other = site.charges(), with_edit(*TWO, "spacing", to=[1.0, 1.1])
    asked = terms(run="0b", plans_sha256=json_sha256(other))
    answer = site.prepare(other, asked=asked)
    assert set(json.loads(answer.header)) == {"protocol", "code", "site", "run"} and answer.code == "budget_spent"
    assert site.charges() == before and len(list(site.preprocessed.glob("federated_*_2d"))) == 1
    assert site.prepare(asked=terms(run="0b")).code == site.train(terms(run="0b"), 0, weights).code == "budget_spent"


def test_a_run_that_some_steps_fit_is_prepared_and_so_is_one_that_has_begun(site, weights):
    bounded = site.with_settings(max_epsilon=9.0)
    assert [bounded.train(terms(), number, weights).code for number in range(3)] == ["ok", "ok", "ok"]
    assert bounded.prepare(asked=terms(run="0b")).code == "ok"
    assert site.prepare(asked=terms()).code == "ok" and len(site.charges()) == 6


def test_terms_above_the_settings_are_refused_before_anything_is_preprocessed(site, weights):
    assert site.with_settings(max_epsilon=7.9).prepare(asked=terms()).code == "settings_refuse"
    assert site.prepare(asked=terms(mode="paper")).code == "settings_refuse"
    assert site.prepare(asked=terms()).code == "ok"


@pytest.mark.parametrize("other", [{"run": "0b"}, {"configuration": "3d_fullres"}, {"plans_sha256": "00"}])
def test_terms_of_another_run_are_malformed(site, other):
    plans, described = coordinator_plans(), site.query().reply.dataset_json
    request = {"run": "0a", "plans": plans, "dataset_json": described, "configuration": "2d"}
    asked = terms(**other).model_dump(mode="json")
    header = json.dumps({**request, "plans_sha256": json_sha256(plans), "terms": asked})
    assert site.say("prepare", header).code == "malformed"


def test_a_spent_budget_is_told_with_what_was_spent(site, weights):
    asked = terms(rounds=1)
    spent = site.train(asked, 0, weights).reply.epsilon
    answer = site.train(asked, 0, moved(weights))
    assert (answer.code, answer.reply.epsilon, answer.arrays) == ("budget_spent", spent, {})


def test_other_terms_under_one_run_are_refused(site, weights):
    site.train(terms(), 0, weights)
    for changed in ({"mode": "adp-fl"}, {"bound": 2.0}, {"epsilon": 4.0}, {"rounds": 30}, {"local_steps": 1}):
        assert site.train(terms(**changed), 1, weights).code == "malformed"
    assert len(site.charges()) == 2


@pytest.mark.parametrize("mode", ["fedavg", "paper"])
def test_modes_without_a_guarantee_need_the_sites_permission(site, weights, mode):
    answer = site.train(terms(mode=mode), 0, weights)
    assert answer.code == "settings_refuse" and not site.model("nnUNetTrainer_FedNoGuarantee").exists()


@pytest.mark.parametrize("mode", ["fedavg", "paper"])
def test_a_run_without_guarantee_is_marked_and_leaves_the_ledger_alone(site, weights, mode):
    allowed, asked = site.with_settings(allow_no_guarantee=True), terms(mode=mode, momentum=0.9)
    answers = [allowed.train(asked, number, weights) for number in (0, 1, 1, 2)]
    assert [answer.code for answer in answers] == ["ok"] * 4, site.log()
    assert differ(answers[0].arrays, weights) and not differ(answers[1].arrays, answers[2].arrays)
    assert {answer.reply.epsilon for answer in answers} == {answer.reply.bound for answer in answers} == {None}
    assert allowed.train(asked, 2, moved(weights)).code == "budget_spent"  # all planned steps are taken
    model = site.model("nnUNetTrainer_FedNoGuarantee")
    assert "no" in (model / "fold_all" / "NO_GUARANTEE.txt").read_text() and (model / "NO_GUARANTEE.txt").exists()
    assert "differential_privacy" not in json.loads((model / "plans.json").read_text())
    assert site.charges() == [] and not site.fold.exists()


def test_runs_with_and_without_guarantee_do_not_disturb_each_other(site, weights):
    allowed = site.with_settings(allow_no_guarantee=True)
    asked = [terms(), terms(run="0b", mode="fedavg")]
    codes = [allowed.train(one, number, weights).code for number in range(3) for one in asked]
    assert codes == ["ok"] * 6 and len(site.charges()) == 6


def counted(site: Site, answer: Answer) -> SiteSummary:
    told = SiteSummary("one", 1, answer.reply.epsilon, answer.reply.delta, answer.reply.unit)
    whole = Summary(terms().run, Mode.dp_fedavg, 1, complete=False, sites=(told,))
    (found,) = recounted(whole, {"one": (site.root / "results" / DATASET, site.preprocessed)}).sites
    return found


def test_the_recount_includes_a_line_that_the_copy_beside_the_weights_lacks(site, weights):
    answer = site.train(terms(), 0, weights)
    copy = site.fold / LEDGER
    copy.write_bytes(b"".join(copy.read_bytes().splitlines(keepends=True)[:-1]))  # killed between the two writes
    assert counted(site, answer).recounted == answer.reply.epsilon > 0


def test_after_a_run_without_guarantee_no_total_of_the_dataset_is_claimed(site, weights):
    answer = site.train(terms(), 0, weights)
    before = counted(site, answer)
    assert before.dataset_total == answer.reply.epsilon and not before.released_without_guarantee
    allowed = site.with_settings(allow_no_guarantee=True)
    assert allowed.train(terms(run="0b", mode="fedavg"), 0, weights).code == "ok"
    after = counted(site, answer)
    assert after.dataset_total is None and after.released_without_guarantee and "NO GUARANTEE" in after.line(True)
    assert after.spent == before.spent


@pytest.mark.parametrize(("mode", "mechanisms"), [("dp-fedavg", {"laplace"}), ("adp-fl", {"laplace", "gaussian"})])
def test_laplace_noise_is_charged_as_such_and_keeps_the_budget(site, weights, mode, mechanisms):
    asked = terms(mode=mode, noise="laplace")
    answers = [site.train(asked, number, weights) for number in range(3)]
    assert [answer.code for answer in answers] == ["ok"] * 3, site.log()
    assert {line["mechanism"] for line in site.charges()} == mechanisms
    assert 7.8 < (answers[-1].reply.epsilon or 0) <= 8
    assert site.train(asked, 2, moved(weights)).code == "budget_spent"


# ---- what is malformed, lost or busy -----------------------------------------------------------------------------


def spoilt(weights: Weights, how: str) -> Weights:
    name = next(iter(weights))
    first = weights[name].copy()
    if how == "nan":
        first.flat[0] = np.nan
    return {
        "nan": {**weights, name: first},
        "shape": {**weights, name: first.reshape(-1)},
        "double": {**weights, name: first.astype(np.float64)},
        "missing": {key: array for key, array in weights.items() if key != name},
        "extra": {**weights, "extra": first},
    }[how]


@pytest.mark.parametrize(
    ("how", "code"),
    [("nan", "malformed"), ("double", "malformed"), ("shape", "plans_mismatch"), ("missing", "plans_mismatch"),
     ("extra", "plans_mismatch")],
)  # fmt: skip
def test_global_weights_that_do_not_fit_are_refused_before_any_charge(site, weights, how, code):
    assert site.train(terms(), 0, spoilt(weights, how)).code == code
    assert site.charges() == [] and site.train(terms(), 0, weights).code == "ok"


def test_weights_with_another_hash_are_refused(site, weights):
    answer = site.train(terms(), 0, weights, weights_sha256=arrays_sha256(moved(weights)))
    assert answer.code == "malformed" and site.charges() == []


@pytest.mark.parametrize("header", ["", "{", "[]", "7", '{"run": 7}', '{"terms": "x"}', '{"run": "0a", "extra": 1}'])
@pytest.mark.parametrize("kind", ["query", "prepare", "train", "x"])
def test_whatever_comes_in_is_answered_with_a_reply(site, kind, header):
    answer = site.say(kind, header)
    assert (answer.code, answer.arrays) == ("malformed", {})


def test_another_protocol_is_a_version_mismatch(site):
    assert site.say("query", '{"protocol": 2, "run": "0a"}').code == "version_mismatch"


def test_a_round_beyond_the_last_is_malformed(site, weights):
    assert site.train(terms(), 3, weights).code == "malformed"


def test_a_lost_ledger_is_refused(site, weights):
    site.train(terms(), 0, weights)
    (site.preprocessed / LEDGER).unlink()
    assert site.train(terms(), 1, weights).code == "ledger_refuses"
    assert site.train(terms(run="0b"), 0, weights).code == "ledger_refuses"
    assert not (site.preprocessed / LEDGER).exists()


@pytest.mark.parametrize("lost", ["checkpoint", "record"])
def test_a_run_whose_state_was_lost_does_not_begin_a_second_time(site, weights, lost):
    site.train(terms(), 0, weights)
    (site.fold / LATEST if lost == "checkpoint" else site.preprocessed / "federated" / "run_0a.json").unlink()
    assert site.train(terms(), 1, weights).code == "ledger_refuses" and len(site.charges()) == 2


def test_an_older_checkpoint_put_back_is_refused(site, weights):
    site.train(terms(), 0, weights)
    older = (site.fold / LATEST).read_bytes()
    assert [site.train(terms(), number, weights).code for number in (1, 2)] == ["ok", "ok"]
    (site.fold / LATEST).write_bytes(older)
    assert site.train(terms(), 2, moved(weights)).code == "ledger_refuses" and len(site.charges()) == 6


def test_charges_per_other_units_are_refused(site, weights):
    site.train(terms(), 0, weights)
    file = site.root / "raw" / DATASET / "patients.csv"
    rows = [line.split(",") for line in file.read_text().split()]
    file.write_text("\n".join(",".join([row[0], row[0] if k else row[1]]) for k, row in enumerate(rows)))
    assert site.train(terms(run="0b"), 0, weights).code == "ledger_refuses" and len(site.charges()) == 2


def test_a_second_message_while_one_is_worked_on_is_told_busy(site, weights, monkeypatch):
    from nnunet_dp.federated import site_store

    monkeypatch.setattr(site_store, "_PATIENCE_SECONDS", 0.2)
    for lock in (site.preprocessed / "federated" / "site.lock", site.fold / "training.lock"):
        with _holding(lock):
            began = time.monotonic()
            assert site.train(terms(), 0, weights).code == "busy" and time.monotonic() - began < 30
    assert site.train(terms(), 0, weights).code == "ok"


def test_plans_must_be_prepared_first(site, weights, tmp_path):
    assert site.train(terms(plans_sha256="0" * 64), 0, weights).code == "plans_mismatch"
    (site.preprocessed / "federated").rename(tmp_path / "away")
    assert site.train(terms(), 0, weights).code == "not_prepared"


def test_a_fault_within_is_a_code_and_a_line_in_the_sites_own_log(site, weights, monkeypatch):
    from nnunet_dp import nnunet_site

    def break_down(*arguments):
        raise OSError("disk on fire at les_0001")

    monkeypatch.setattr(nnunet_site, "open_model", break_down)
    answer = site.train(terms(), 0, weights)
    assert answer.code == "failed" and "disk" not in answer.header and "disk on fire" in site.log()


# ---- what a reply says -------------------------------------------------------------------------------------------

ALLOWED = {
    "query": {"protocol", "code", "site", "run", "dataset_json", "versions"},
    "prepare": {"protocol", "code", "site", "run", "plans_sha256"},
    "train": {"protocol", "code", "site", "run", "round", "plans_sha256", "epsilon", "delta", "unit"},
    "adp-fl": {"protocol", "code", "site", "run", "round", "plans_sha256", "epsilon", "delta", "unit", "bound"},
}


def test_replies_hold_nothing_but_what_the_protocol_allows(site, weights, apart):
    answers = {
        "query": site.query(), "prepare": site.prepare(), "train": site.train(terms(), 0, weights),
        "adp-fl": apart[1][0],
    }  # fmt: skip
    assert {kind: set(json.loads(answer.header)) for kind, answer in answers.items()} == ALLOWED
    words = private_words_of(site)
    assert len(words) > 10
    for answer in answers.values():
        said = answer.header.encode() + b"".join(name.encode() + a.tobytes() for name, a in answer.arrays.items())
        assert not [word for word in words if word.encode() in said]


def private_words_of(site: Site) -> list[str]:
    rows = (site.root / "raw" / DATASET / "patients.csv").read_text().split()[1:]
    return sorted({word for row in rows for word in row.split(",")})


def test_declined_messages_say_only_their_code(site, weights):
    answer = site.train(terms(epsilon=80.0), 2, weights)
    assert set(json.loads(answer.header)) == {"protocol", "code", "site", "run", "round"}


def test_a_query_tells_neither_names_nor_counts(site):
    file = site.root / "raw" / DATASET / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"name": "St Mary's", "licence": "x", "dataset": {"anna": {}}}))
    assert set(site.query().reply.dataset_json or {}) <= {*content} - {"numTraining", "name"}


def test_the_public_part_of_a_description_keeps_what_must_agree():
    assert public_part({"labels": {"a": 1}, "channel_names": {"0": "CT"}, "numTraining": 9}) == {
        "labels": {"a": 1}, "channel_names": {"0": "CT"},
    }  # fmt: skip


# ---- preparation -------------------------------------------------------------------------------------------------


def test_preparing_twice_preprocesses_once(site):
    data = next((site.preprocessed).glob("federated_*_2d"))
    times = {file.name: file.stat().st_mtime_ns for file in data.iterdir()}
    assert site.prepare().code == "ok"
    assert {file.name: file.stat().st_mtime_ns for file in data.iterdir()} == times and len(times) > 20


def test_other_labels_or_channels_are_a_plans_mismatch(site):
    own = site.query().reply.dataset_json or {}
    assert site.prepare(dataset_json={**own, "labels": {"background": 0, "nevus": 1}}).code == "plans_mismatch"
    assert site.prepare(dataset_json={**own, "channel_names": {"0": "CT"}}).code == "plans_mismatch"
    assert "labels" in site.log() and "channel_names" in site.log()


def with_edit(*path: str, to: object) -> dict:
    plans = coordinator_plans()
    entry = plans
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = to
    return plans


TWO = ("configurations", "2d")
HOSTILE = [
    with_edit("plans_name", to="../../../x"),
    with_edit("plans_name", to="a__b"),
    with_edit("image_reader_writer", to="subprocess.Popen"),
    with_edit("label_manager", to="Popen"),
    with_edit(*TWO, "preprocessor_name", to="x"),
    with_edit(*TWO, "inherits_from", to="2d"),
    with_edit(*TWO, "resampling_fn_data", to="os"),
    with_edit(*TWO, "resampling_fn_data_kwargs", "order", to=99),  # would fail only where an image is resampled
    with_edit(*TWO, "resampling_fn_seg", to="no_resampling_hack"),
    with_edit(*TWO, "spacing", to=[1.0, 1e-9]),
    with_edit(*TWO, "spacing", to=[1.0, "1.0"]),
    with_edit(*TWO, "normalization_schemes", to=["os"] * 3),
    with_edit(*TWO, "architecture", "network_class_name", to="subprocess.Popen"),
    with_edit(*TWO, "architecture", "arch_kwargs", "nonlin", to="subprocess.Popen"),
    with_edit(*TWO, "architecture", "arch_kwargs", "args", to=["touch", "x"]),
    with_edit(*TWO, "architecture", "_kw_requires_import", to=["features_per_stage"]),
    with_edit("configurations", to={}),
    with_edit("configurations", to=[]),
]


@pytest.mark.parametrize("plans", HOSTILE, ids=range(len(HOSTILE)))
def test_plans_that_name_foreign_classes_or_folders_are_refused(site, plans):
    before = sorted(site.root.rglob("*"))
    assert site.prepare(plans).code == "plans_mismatch"
    after = {file.name for file in set(site.root.rglob("*")) - set(before)}
    assert after <= {"results", DATASET, "federated_log.txt"}


def test_no_more_plans_are_tried_than_the_settings_allow_whether_they_succeed_or_not(site, monkeypatch):
    from nnunet_dp import nnunet_site

    tried = [with_edit(*TWO, "spacing", to=[1.0, 1.0 + k / 10]) for k in (1, 2, 3)]

    def fails(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(nnunet_site, "preprocess", fails)
        before = len(json.loads((site.preprocessed / "federated" / "plans_tried.json").read_text()))
        codes = [site.with_settings(max_plans=before + 2).prepare(plans).code for plans in (*tried, tried[0])]
    assert codes == ["failed", "failed", "settings_refuse", "failed"]


def test_subnormal_numbers_are_flushed_during_a_round_and_not_after_it(site, weights, monkeypatch):
    def product() -> float:
        return float(torch.tensor(1e-45) * 1)

    during = []
    monkeypatch.setattr(site_round, "load_weights", lambda arrays, network: during.append(product()))
    assert site.train(terms(), 0, weights).code == "ok"
    assert during == [0.0] and product() > 0


def test_a_header_that_nests_too_deeply_is_answered(site):
    assert site.say("train", "[" * 200_000).code in ("malformed", "failed")


def test_the_folder_that_plans_name_is_never_touched(site):
    precious = site.preprocessed / "precious"
    precious.mkdir()
    (precious / "file").touch()
    assert site.prepare(with_edit(*TWO, "data_identifier", to="precious")).code == "ok"
    assert (precious / "file").exists() and list(precious.iterdir()) == [precious / "file"]


def test_the_datasets_own_plans_are_never_overwritten(site, weights):
    own = site.preprocessed / "nnUNetPlans.json"
    own.write_text("{}")
    plans = coordinator_plans(plans_name="nnUNetPlans")
    assert site.prepare(plans).code == "ok"
    assert site.train(terms(plans_sha256=json_sha256(plans)), 0, weights).code == "ok" and own.read_text() == "{}"


def test_a_reply_is_valid_whatever_the_header_was(site, weights):
    header = train_header(terms(), 0, weights)
    for cut in range(0, len(header), 37):
        reply = Reply.model_validate_json(site.say("train", header[:cut]).header)
        assert reply.code.value == "malformed" and reply.site == "north"
