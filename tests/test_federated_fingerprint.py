"""The federation's fingerprint: what a site releases and is charged, what a coordinator adds up, what follows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from doors import chain_holds
from federation import DATASET, NNUNET
from one_site import DATASET as RAW
from one_site import Site, first_weights, make_site, terms

from nnunet_dp import __version__
from nnunet_dp.accounting import PrivacyBudget, gaussian_mu
from nnunet_dp.charges import epsilon_of
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated import site_fingerprint
from nnunet_dp.federated.new_run import RunOptions
from nnunet_dp.federated.new_survey import plans_by_survey, read_begun
from nnunet_dp.federated.protocol import Code, FingerprintRequest, Mode, Reply
from nnunet_dp.federated.survey import RESULT, VOTES, Survey, SurveyConfig, read_result
from nnunet_dp.fingerprint import mechanism_for
from nnunet_dp.ledger import read_ledger
from nnunet_dp.nnunet_federated import Schedule, Sites
from nnunet_dp.nnunet_fingerprint import ballot_for, measure

pytestmark = pytest.mark.filterwarnings("ignore")
SHARE = 0.1


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def site(original, tmp_path) -> Site:
    return original.copied_to(tmp_path / "site")


def asked(site: Site, **changes):
    described = site.query().reply.dataset_json
    usual = {"run": "0a", "mode": "adp-fl", "epsilon": 8.0, "share": SHARE, "dataset_json": described}
    return site.say("fingerprint", FingerprintRequest(**usual | changes).model_dump_json())


def total(site: Site) -> float:
    return epsilon_of(read_ledger(site.preprocessed / "privacy_ledger.jsonl"), 1e-5)


# ---- a site ------------------------------------------------------------------------------------------------------


def test_votes_are_charged_once_and_sent_again_for_nothing(site):
    first = asked(site)
    assert first.code == "ok", site.log()
    (charge,) = site.charges()
    assert (charge["purpose"], charge["run"], charge["mechanism"]) == ("fingerprint", "fingerprint/0a", "gaussian")
    assert charge["unit"] == "patient" and chain_holds(site.charges())
    budget = PrivacyBudget(epsilon=8.0, delta=first.reply.delta)
    assert 1 / charge["noise_multiplier"] == pytest.approx(np.sqrt(SHARE) * gaussian_mu(budget))
    assert first.reply.epsilon == pytest.approx(total(site))
    again = asked(site)
    assert np.array_equal(again.arrays[VOTES], first.arrays[VOTES]) and len(site.charges()) == 1
    other = asked(site, run="0b")
    assert not np.array_equal(other.arrays[VOTES], first.arrays[VOTES]) and len(site.charges()) == 2


def test_what_leaves_is_the_sum_of_the_patients_votes_with_that_noise(site):
    description = json.loads((site.root / "raw" / RAW / "dataset.json").read_text())
    ballot, values = ballot_for(description), measure(site.root / "raw" / RAW)
    table = (site.root / "raw" / RAW / "patients.csv").read_text().splitlines()[1:]
    patients: dict[str, list] = {}
    for line in table:
        case, patient = line.split(",")[:2]
        patients.setdefault(patient, []).append(values[case])
    exact = sum(ballot.votes(cases) for cases in patients.values())
    sent = asked(site).arrays
    assert set(sent) == {VOTES} and sent[VOTES].shape == (ballot.size,) and len(patients) == 10
    deviation = site.charges()[0]["noise_multiplier"] * ballot.l2_bound
    noise = (sent[VOTES] - exact) / deviation
    assert 0.7 < noise.std() < 1.3 and abs(noise.mean()) < 0.5  # 112 numbers
    free = asked(site.with_settings(allow_no_guarantee=True), run="0f", mode="fedavg").arrays[VOTES]
    assert np.array_equal(free, exact)


def test_a_release_that_was_charged_and_lost_is_made_again_and_both_are_paid(site, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(site_fingerprint.Store, "write_fingerprint", killed)
        with pytest.raises(KeyboardInterrupt):
            asked(site)
    assert len(site.charges()) == 1
    assert asked(site).code == "ok" and len(site.charges()) == 2
    assert site.prepare().code == "ok" and site.train(terms(rounds=1), 0, first_weights(site)).reply.epsilon <= 8.0
    assert 7.9 < total(site) <= 8.0


def test_a_dataset_ledger_that_lost_the_charge_is_noticed(site):
    asked(site)
    (site.preprocessed / "privacy_ledger.jsonl").unlink()
    assert asked(site, run="0b").code == "ledger_refuses" and "put the dataset's ledger back" in site.log()


@pytest.mark.parametrize(
    ("changes", "settings", "code"),
    [
        ({"epsilon": 9.0}, {}, "settings_refuse"),
        ({"mode": "fedavg"}, {}, "settings_refuse"),
        ({"share": 0.6}, {}, "malformed"),
        ({"dataset_json": DATASET}, {}, "plans_mismatch"),
        ({}, {"patients_file": "missing.csv"}, "failed"),
    ],
)
def test_what_a_site_refuses_costs_nothing(site, changes, settings, code):
    request = {"run": "0a", "mode": "adp-fl", "epsilon": 8.0, "share": SHARE}
    request |= {"dataset_json": site.query().reply.dataset_json} | changes
    answer = site.with_settings(**settings).say("fingerprint", json.dumps({"protocol": 1, **request}))
    assert answer.code == code and not answer.arrays
    assert not (site.preprocessed / "privacy_ledger.jsonl").exists()


def test_the_same_run_is_not_asked_with_other_numbers(site):
    asked(site)
    assert asked(site, epsilon=4.0).code == "malformed" and len(site.charges()) == 1


def test_a_spent_budget_ends_it_before_an_image_is_read(site, monkeypatch):
    small = site.with_settings(max_epsilon=8.0)
    for run in range(1, 30):
        if (code := asked(small, run=f"{run:02x}").code) != "ok":
            break
    assert code == "budget_spent" and run in (10, 11) and 7.4 < total(site) <= 8.0  # ten tenths of mu^2
    monkeypatch.setattr(site_fingerprint, "measure", lambda *_: pytest.fail("an image was read"))
    assert asked(small, run="ff").code == "budget_spent"


def test_a_mode_without_guarantee_is_noted(site):
    free = site.with_settings(allow_no_guarantee=True)
    reply = asked(free, mode="fedavg").reply
    assert reply.code is Code.ok and reply.epsilon is None and not (site.preprocessed / "privacy_ledger.jsonl").exists()
    assert (site.preprocessed / "federated" / "NO_GUARANTEE.txt").is_file()


def test_training_is_calibrated_for_what_the_fingerprint_cost(site):
    assert asked(site).code == "ok" and site.prepare().code == "ok", site.log()
    weights = first_weights(site)
    one, two = (site.train(terms(mode="adp-fl", rounds=2), number, weights).reply for number in range(2))
    everything = read_ledger(site.preprocessed / "privacy_ledger.jsonl")
    assert [entry.purpose for entry in everything] == ["fingerprint"] + ["training"] * 4
    assert one.epsilon < two.epsilon == pytest.approx(epsilon_of(everything, two.delta)) and 7.9 < two.epsilon <= 8.0
    without = epsilon_of(everything[1:], two.delta)
    assert without < 7.7  # it left room for the fingerprint
    (site.preprocessed / "federated" / "fingerprint_0a.json").unlink()
    assert asked(site).code == "malformed" and len(site.charges()) == 5  # another would not fit beside it


# ---- a coordinator -----------------------------------------------------------------------------------------------


NUMBERS = ballot_for(DATASET).size


class Voter:
    """A site in memory that votes one everywhere, or does what it is told."""

    def __init__(self, name, votes=None, code=Code.ok, silent=False, **reply):
        self.name, self.code, self.silent, self.reply = name, code, silent, reply
        self.votes = {VOTES: np.ones(NUMBERS)} if votes is None else votes
        self.asked = 0

    def answer(self, kind, header):
        if kind == "query":
            versions = {"nnunet_dp": __version__, "nnunetv2": NNUNET}
            return Reply(code="ok", site=self.name, run="0a", dataset_json=DATASET, versions=versions), {}
        self.asked += 1
        assert kind == "fingerprint" and json.loads(header)["share"] == SHARE
        cost = {"epsilon": 1.0, "delta": 1e-5, "unit": "patient"} | self.reply
        return Reply(code=self.code, site=self.name, run="0a", **cost), self.votes


class Voters:
    def __init__(self, *voters):
        self.voters = {str(number): voter for number, voter in enumerate(voters)}

    def sites(self, minimum, timeout_s):
        return sorted(self.voters)

    def exchange(self, kind, messages, timeout_s):
        told = {node: self.voters[node].answer(kind, messages[node][0]) for node in messages}
        heard = {node for node in told if kind == "query" or not self.voters[node].silent}
        return {node: (told[node][0].model_dump_json(exclude_none=True), told[node][1]) for node in heard}


def config(**changes):
    usual = {"run": "0a", "mode": "adp-fl", "epsilon": 8.0, "share": SHARE, "numbers": NUMBERS, "dataset_json": DATASET}
    return SurveyConfig.model_validate({**usual, "sites": 3, "wait_for_sites_s": 0.0, **changes})


def test_votes_are_added_and_noise_with_them(tmp_path):
    said = []
    voters = Voters(*(Voter(name, {VOTES: np.full(NUMBERS, float(k))}) for k, name in enumerate("abc", 1)))
    result = Survey(config(), voters, tmp_path, said.append).run()
    assert read_result(tmp_path) == result and set(result.votes) == {6.0}
    assert set(result.claims) == set(result.sites) == {"a", "b", "c"}
    ballot = ballot_for(DATASET)
    one = mechanism_for(PrivacyBudget(epsilon=8.0, delta=1e-5), SHARE).noise_multiplier * ballot.l2_bound
    assert result.deviation(ballot, 8.0, SHARE) == pytest.approx(one * np.sqrt(3))
    assert said[-1] == "fingerprint of: a, b, c"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Voter("c", {VOTES: np.full(NUMBERS, np.nan)}), "c sent no fingerprint: not finite"),
        (Voter("c", {VOTES: np.ones(3)}), "c sent no fingerprint: wrong shape"),
        (Voter("c", {}), "c sent no fingerprint: other parameters"),
        (Voter("c", {VOTES: np.ones(NUMBERS, np.float16)}), "c sent no fingerprint: wrong dtype"),
        (Voter("c", epsilon=None), "c sent no fingerprint: no epsilon"),
        (Voter("c", code=Code.budget_spent), "c sent no fingerprint: budget_spent"),
        (Voter("c", silent=True), "c sent no fingerprint: no reply"),
    ],
)
def test_a_site_without_a_usable_answer_is_named_and_can_be_gone_on_without(tmp_path, bad, why):
    said = []
    with pytest.raises(Refusal, match=why):
        Survey(config(), Voters(Voter("a"), Voter("b"), bad), tmp_path, said.append).run()
    assert not (tmp_path / RESULT).exists() and any(why in line for line in said)
    result = Survey(config(go_on_without=True), Voters(Voter("a"), Voter("b"), bad), tmp_path, said.append).run()
    assert set(result.claims) == {"a", "b"} and set(result.votes) == {2.0}


# ---- plans -------------------------------------------------------------------------------------------------------


def options(**changes):
    return RunOptions(**{"schedule": Schedule(Mode.adp_fl, rounds=3), "fingerprint_share": SHARE, **changes})


def test_too_few_patients_are_refused_before_anybody_is_asked(tmp_path):
    with pytest.raises(UsageRefusal, match=r"about [0-9]+ patients or more to be heard above its noise, found 40"):
        plans_by_survey(tmp_path, None, options(), DATASET, Sites(4, 40), (), lambda *_: pytest.fail("asked"))
    assert not any(tmp_path.iterdir())


def test_plans_follow_what_the_patients_have_and_a_broken_survey_goes_on_with_its_run(tmp_path):
    ballot = ballot_for(DATASET)
    one = {f"spacing_{axis}": edge for axis, edge in enumerate((3.0, 0.8, 0.8))} | {"relative_size": 1.0}
    one |= {f"size_{axis}": size for axis, size in enumerate((40.0, 400.0, 400.0))}
    votes = 200 * ballot.votes([one]) + np.random.default_rng(0).normal(0, 5, ballot.size)
    runs = []

    def ask(file, place):
        survey = SurveyConfig.model_validate_json(file.read_text())
        runs.append(survey.run)
        if len(runs) == 1:
            raise KeyboardInterrupt
        claims = {name: {"epsilon": e, "delta": 1e-5, "unit": "patient"} for name, e in (("a", 2.0), ("b", 2.1))}
        told = {"votes": votes.tolist(), "sites": ["a", "b"], "claims": claims}
        (place / RESULT).write_text(json.dumps(told))

    given = (options(), DATASET, Sites(2, 200), (), ask)
    with pytest.raises(KeyboardInterrupt):
        plans_by_survey(tmp_path, Sites(2, 200), *given)
    assert read_begun(tmp_path, Sites) == (Sites(2, 200), options())  # as typed, enums and tuples included
    surveyed = plans_by_survey(tmp_path, Sites(2, 200), *given)
    found, run = surveyed.plans, surveyed.run
    assert surveyed.claims["b"].epsilon == 2.1
    assert runs == [run, run] and found.public and "epsilon 2.1 by itself" in found.source
    whole = found.plans["configurations"]["3d_fullres"]
    assert whole["spacing"] == pytest.approx([3.0, 0.8, 0.8], rel=0.06) and len(set(whole["spacing"])) == 2
    assert whole["median_image_size_in_voxels"] == [40, 400, 400]
    assert plans_by_survey(tmp_path, Sites(2, 200), *given).run == run and len(runs) == 2


def test_a_survey_without_guarantee_says_so(tmp_path):
    votes = 50 * ballot_for(DATASET).votes([{f"spacing_{axis}": 1.0 for axis in range(3)} | {"relative_size": 1.0}
                                            | {f"size_{axis}": 64.0 for axis in range(3)}])  # fmt: skip

    def ask(file, place):
        told = {"votes": votes.tolist(), "sites": ["a"], "claims": {}}
        (place / RESULT).write_text(json.dumps(told))

    free = options(schedule=Schedule(Mode.fedavg, rounds=3))
    found = plans_by_survey(tmp_path, Sites(1, 50), free, DATASET, Sites(1, 50), (), ask).plans
    assert not found.public and found.source == "exact statistics of the images of 1 sites"
