"""The one release that refinement learns from: what a patient can change, what is noised, and what it decides."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from nnunet_dp.charges import MORPHOLOGY, LedgerError
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.morphology import ClassRefinement, FillHoles, KeepLargest, Opening
from nnunet_dp.shape_votes import (
    ERROR_RATE_Z,
    GRID,
    PRESENCE_WEIGHT,
    WANTED_SHARE,
    Answer,
    Ballot,
    answers,
    decide,
    learn,
    questions,
    questions_for,
    without_noise,
)

FLAT, CUBE = (0.8, 1.5), (0.8, 0.8, 2.5)
NAMES = ("keep_largest", "fill_holes", "opening")


def labels(*names) -> tuple[ClassRefinement, ...]:
    return tuple(ClassRefinement(name=name, labels=(k,), writes=k) for k, name in enumerate(names, 1))


def nested() -> tuple[ClassRefinement, ...]:
    sets = {"whole": (1, 2, 3), "core": (2, 3), "edge": (3,)}
    return tuple(ClassRefinement(name=name, labels=part, writes=part[0]) for name, part in sets.items())


def ballot_of(kind: str, spacing_mm=FLAT) -> Ballot:
    chosen = questions(spacing_mm)
    if kind == "regions":
        return Ballot(nested(), chosen, regions=True, ignore_label=4)
    return Ballot(labels("a", "b", "c"), chosen, ignore_label=4 if kind == "ignore" else None)


def by_name(ballot: Ballot, votes: np.ndarray, row: int = 0) -> dict[str, float]:
    return dict(zip([question.name for question in ballot.questions], votes[row], strict=False))


def ledger_in(folder, run="model/fold_0/1") -> Ledger:
    return Ledger(folder / "privacy_ledger.jsonl", run, "0a")


# ---- nasty masks -------------------------------------------------------------------------------------------------


def noise(shape, seed: int, top: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, shape).astype(np.uint8)


def solid(shape, label: int) -> np.ndarray:
    """A box that all questions leave as it is."""
    image = np.zeros(shape, np.uint8)
    image[tuple(slice(size // 4, size - size // 4) for size in shape)] = label
    return image


def with_one_voxel(shape, label: int) -> np.ndarray:
    image = np.zeros(shape, np.uint8)
    image[tuple(size // 2 for size in shape)] = label
    return image


def nasty_patients(shape) -> dict[str, list[np.ndarray]]:
    hollow = solid(shape, 1)
    hollow[tuple(size // 2 for size in shape)] = 0
    return {
        "no case": [],
        "empty": [np.zeros(shape, np.uint8)],
        "full": [np.full(shape, 1, np.uint8)],
        "full of another": [np.full(shape, 3, np.uint8)],
        "one voxel": [with_one_voxel(shape, 2)],
        "only ignored": [np.full(shape, 4, np.uint8)],
        "a label of no class": [np.full(shape, 9, np.uint8)],
        "salt of all labels": [noise(shape, 0, 6)],
        "hollow": [hollow],
        "several cases": [solid(shape, 1), noise(shape, 1, 3), np.zeros(shape, np.uint8)],
        "thirty cases": [noise(shape, seed, 4) for seed in range(30)],
    }


KINDS = ("labels", "ignore", "regions")
PLANES = ((12, 12), FLAT), ((8, 9, 6), CUBE)


def votes_of(ballot: Ballot, masks, spacing_mm) -> np.ndarray:
    return ballot.votes((mask, spacing_mm) for mask in masks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "spacing_mm"), PLANES)
def test_zeroing_a_patient_changes_the_sum_by_that_patients_votes_and_within_the_bound(kind, shape, spacing_mm):
    ballot = ballot_of(kind, spacing_mm)
    slots = [votes_of(ballot, masks, spacing_mm) for masks in nasty_patients(shape).values()]
    (everybody,) = ballot.total(slots).tensors
    nobody = votes_of(ballot, [], spacing_mm)
    assert not nobody.any()
    for index, own in enumerate(slots):
        (without,) = ballot.total([*slots[:index], nobody, *slots[index + 1 :]]).tensors
        assert np.array_equal(everybody.numpy() - without.numpy(), own)
        assert np.linalg.norm(own) <= ballot.l2_bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", nasty_patients((12, 12)))
def test_votes_are_minus_one_zero_or_one_and_an_absent_class_has_none_and_no_presence(kind, name):
    masks, ballot = nasty_patients((12, 12))[name], ballot_of(kind)
    votes = votes_of(ballot, masks, FLAT)
    for row, rule in enumerate(ballot.classes):
        present = any(np.isin(mask, rule.labels).any() for mask in masks)
        assert votes[row, -1] == PRESENCE_WEIGHT * present
        assert (np.abs(votes[row, :-1]) == present).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.builds(noise, st.just((6, 7)), st.integers(0, 10**6), st.integers(1, 7)), max_size=4),
)
def test_no_patient_contributes_more_than_the_bound_whatever_the_masks_hold(kind, masks):
    ballot = ballot_of(kind)
    assert np.linalg.norm(votes_of(ballot, masks, FLAT)) <= ballot.l2_bound


@pytest.mark.parametrize(("classes", "asked"), list(itertools.product([1, 2, 5, 30], [0, 1, 2, 3])))
def test_the_bound_is_reached_and_not_wider_than_it_must_be(classes, asked):
    ballot = Ballot(labels(*map(str, range(classes))), questions(FLAT)[:asked])
    everything = np.concatenate([np.ones((classes, asked)), np.full((classes, 1), PRESENCE_WEIGHT)], 1)
    assert np.linalg.norm(everything) == pytest.approx(ballot.l2_bound, rel=1e-15)
    assert ballot.total([everything, -everything]).l2_bound == ballot.l2_bound


def test_votes_beyond_the_bound_never_enter_a_sum():
    ballot = ballot_of("labels")
    with pytest.raises(AssertionError, match="keep the bound"):
        ballot.total([np.full((3, 4), 1.01)])
    with pytest.raises(AssertionError, match="keep the bound"):
        ballot.total([np.full((3, 4), np.nan)])


# ---- what a vote says --------------------------------------------------------------------------------------------


def test_a_patient_with_several_cases_counts_once():
    ballot = ballot_of("labels")
    once = votes_of(ballot, [solid((12, 12), 1)], FLAT)
    assert np.array_equal(votes_of(ballot, [solid((12, 12), 1)] * 5, FLAT), once)


def test_one_changed_case_is_a_vote_against_and_a_case_without_the_class_is_none():
    ballot, empty = ballot_of("labels"), np.zeros((12, 12), np.uint8)
    specks = solid((12, 12), 1)
    specks[0, 0:3] = 1
    assert by_name(ballot, votes_of(ballot, [solid((12, 12), 1), specks], FLAT))["keep_largest"] == -1
    assert by_name(ballot, votes_of(ballot, [solid((12, 12), 1), empty], FLAT))["keep_largest"] == 1


def square(rows=slice(5, 25), columns=slice(5, 25)) -> np.ndarray:
    """A square, of which something is erased or to which something is added."""
    image = np.zeros((30, 90), np.uint8)
    image[rows, columns] = 1
    return image


@pytest.mark.parametrize(
    ("question", "place", "value"),
    [
        ("keep_largest", np.s_[5:25, 18:20], 0),  # cuts the square in two
        ("fill_holes", np.s_[12:18, 12:18], 0),
        ("opening", np.s_[15, 25:65], 1),  # a whisker of a tenth of the volume
        ("opening", np.s_[5:20:2, 5:25], 0),  # lines, which the guard of the operation would save in a prediction
    ],
)
def test_each_question_is_answered_by_the_shape_it_asks_about(question, place, value):
    ballot, spoilt = Ballot(labels("a"), questions((1.0, 1.0))), square()
    spoilt[place] = value
    assert set(by_name(ballot, votes_of(ballot, [square()], (1.0, 1.0))).values()) == {1.0}
    assert by_name(ballot, votes_of(ballot, [spoilt], (1.0, 1.0)))[question] == -1


@pytest.mark.parametrize("kind", KINDS)
def test_an_opening_that_would_empty_the_class_is_a_vote_against_it(kind):
    thin = np.zeros((12, 12), np.uint8)
    thin[6, 2:10] = 3
    ballot = Ballot(ballot_of(kind).classes, questions((1.0, 1.0)), kind == "regions")
    assert by_name(ballot, votes_of(ballot, [thin], (1.0, 1.0)), 2) == {
        "keep_largest": -1,
        "fill_holes": 1,
        "opening": -1,
    }


@pytest.mark.parametrize("width", [1, 5])
def test_what_falls_apart_without_a_voxel_votes_against_keeping_its_largest_piece(width):
    """Two squares on a bridge: one piece in the mask, two in many a prediction if the bridge is thin."""
    joined = np.zeros((20, 40), np.uint8)
    joined[5:15, 3:15] = joined[5:15, 25:37] = joined[8 : 8 + width, 15:25] = 1
    ballot = Ballot(labels("a"), questions((1.0, 1.0)))
    found = by_name(ballot, votes_of(ballot, [joined], (1.0, 1.0)))
    assert found["keep_largest"] == found["opening"] == (1 if width > 1 else -1)


@pytest.mark.parametrize("name", NAMES)
def test_a_vote_on_one_class_does_not_depend_on_the_shape_of_its_neighbours(name):
    ballot = ballot_of("labels", (1.0, 1.0))
    alone, crowded = np.zeros((30, 30), np.uint8), np.full((30, 30), 2, np.uint8)
    crowded[::3, ::3] = 3
    alone[8:20, 8:20] = crowded[8:20, 8:20] = 1
    found = [by_name(ballot, votes_of(ballot, [image], (1.0, 1.0)))[name] for image in (alone, crowded)]
    assert found == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(6))
def test_the_vote_on_opening_is_that_of_the_slow_and_obvious_opening(seed):
    ballot = ballot_of("regions", (1.0, 1.0))
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(4, 24, 24)), (0, 1.5 + seed / 2, 2))
    image = smooth.argmax(0).astype(np.uint8)
    for row, rule in enumerate(ballot.classes):
        mask = np.isin(image, rule.labels)
        core = core_by_hand(mask, [[0, 1, 0], [1, 1, 1], [0, 1, 0]])
        expected = 1.0 if 2 * core.sum() >= 0.95 * (mask.sum() + core.sum()) else -1.0
        assert by_name(ballot, votes_of(ballot, [image], (1.0, 1.0)), row)["opening"] == expected


def core_by_hand(mask: np.ndarray, ball: list[list[int]]) -> np.ndarray:
    left = ndimage.binary_opening(np.pad(mask, 3), ball)[3:-3, 3:-3]
    pieces, number = ndimage.label(left, np.ones((3, 3)))
    return pieces == 1 + np.bincount(pieces.ravel())[1:].argmax() if number else left


def keep_largest_by_hand(mask: np.ndarray) -> np.ndarray:
    pieces, _ = ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(pieces.ravel())[1:]
    return np.isin(pieces, 1 + np.flatnonzero(sizes == sizes.max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_the_vote_on_keep_largest_is_that_of_the_slow_and_obvious_count(kind, seed):
    ballot = ballot_of(kind)
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(4, 24, 24)), (0, 2, 2))
    image = smooth.argmax(0).astype(np.uint8)
    for row, rule in enumerate(ballot.classes):
        mask = np.isin(image, rule.labels)
        kept, core = keep_largest_by_hand(mask), core_by_hand(mask, [[1], [1], [1]])  # FLAT has longer columns
        same = 2 * (mask & kept).sum() >= 0.98 * (mask.sum() + kept.sum())
        firm = 2 * core.sum() >= 0.8 * (mask.sum() + core.sum())
        expected = 1.0 if same and firm else -1.0
        assert by_name(ballot, votes_of(ballot, [image], FLAT), row)["keep_largest"] == expected


@pytest.mark.parametrize("name", NAMES)
def test_solid_nested_regions_are_left_as_they_are_by_every_question(name):
    image = np.zeros((40, 40), np.uint8)
    image[4:36, 4:36], image[10:30, 10:30], image[15:25, 15:25] = 1, 2, 3
    ballot = Ballot(nested(), questions((1.0, 1.0)), regions=True)
    votes = votes_of(ballot, [image], (1.0, 1.0))
    assert [by_name(ballot, votes, row)[name] for row in range(3)] == [1.0, 1.0, 1.0]


def test_a_hole_of_a_region_that_shows_its_parent_is_a_vote_against_filling_holes():
    image = np.zeros((40, 40), np.uint8)
    image[4:36, 4:36], image[10:30, 10:30], image[15:25, 15:25] = 1, 2, 1
    ballot = Ballot(nested(), questions((1.0, 1.0)), regions=True)
    votes = votes_of(ballot, [image], (1.0, 1.0))
    assert by_name(ballot, votes, 0)["fill_holes"] == 1
    assert by_name(ballot, votes, 1)["fill_holes"] == -1


def test_voxels_of_the_ignore_label_belong_to_no_class():
    image = solid((12, 12), 1)
    image[6, 6] = 4  # a hole, were it background
    votes = votes_of(ballot_of("ignore"), [image], FLAT)
    assert by_name(ballot_of("ignore"), votes)["fill_holes"] == 1
    assert not votes[1:].any()


# ---- which questions are asked -----------------------------------------------------------------------------------


def number_asked(units, noise_multiplier, classes=2) -> int:
    return len(questions_for(units, noise_multiplier, classes, FLAT))


def test_the_radius_is_the_shortest_edge_and_the_names_are_the_known_ones():
    asked = questions((3.0, 0.7, 1.1))
    assert tuple(question.name for question in asked) == NAMES
    assert [q.operation.radius_mm for q in asked if isinstance(q.operation, Opening)] == [0.7]


def test_more_patients_or_less_noise_never_ask_fewer_questions():
    for classes in (1, 2, 4):
        by_units = [number_asked(units, 6.0, classes) for units in range(1, 200)]
        by_noise = [number_asked(200, 0.2 * k, classes) for k in range(1, 400)]
        assert by_units == sorted(by_units) and set(by_units) == {0, 1, 2, 3}
        assert by_noise == sorted(by_noise, reverse=True) and len(set(by_noise)) == 4


def test_more_classes_never_ask_more_questions_and_the_most_useful_stay():
    found = [questions_for(150, 6.0, classes, FLAT) for classes in range(1, 60)]
    assert [len(asked) for asked in found] == sorted(map(len, found), reverse=True)
    assert all(asked == questions(FLAT)[: len(asked)] for asked in found)


def test_what_is_asked_depends_on_public_numbers_alone():
    assert questions_for(150, 6.0, 2, FLAT) == questions_for(150, 6.0, 2, FLAT)
    assert list(questions_for.__annotations__) == ["units", "noise_multiplier", "classes", "spacing_mm", "return"]


# ---- the noise ---------------------------------------------------------------------------------------------------

MANY = Ballot(labels(*map(str, range(400))), questions(FLAT)[:2])


def released_noise(folder, mechanism, votes) -> tuple[np.ndarray, np.ndarray]:
    """Noise on the balances and on the presences of several releases, each of a run of its own."""
    exact = np.sum(votes, axis=0)
    balances, presences = [], []
    for run in range(5):
        given = learn(MANY, mechanism, iter(votes), ledger_in(folder, f"run {run}")).provenance["answers"]
        found = np.array([[answer["balance"] for answer in row] for row in given.values()])
        presences.append(PRESENCE_WEIGHT * np.array([row[0]["present"] for row in given.values()]) - exact[:, -1])
        balances.append(found - exact[:, :-1])
    return np.concatenate(balances).ravel(), np.concatenate(presences)


def fits(found: np.ndarray, deviation: float) -> float:
    """Two-sided p-value of the sample's variance."""
    tail = stats.chi2(found.size).cdf(np.square(found / deviation).sum())
    return 2 * min(tail, 1 - tail)


@pytest.mark.parametrize("noise_multiplier", [0.5, 6.0])
def test_every_released_number_carries_the_planned_noise_and_no_other(tmp_path, noise_multiplier):
    generator = np.random.default_rng(5)
    votes = [np.concatenate([generator.choice([-1.0, 1.0], (400, 2)), np.full((400, 1), 0.5)], 1) for _ in range(20)]
    deviation = noise_multiplier * MANY.l2_bound
    for found in released_noise(tmp_path, SubsampledGaussian(noise_multiplier), votes):
        assert fits(found, deviation) > 1e-5
        assert stats.kstest(found, stats.norm(scale=deviation).cdf).pvalue > 1e-5
        assert fits(found, deviation * 2 / 3) < 1e-9
        assert fits(found, deviation * 3 / 2) < 1e-9


def test_the_file_names_its_noise_its_bound_and_its_line_in_the_ledger(tmp_path):
    ballot, ledger = ballot_of("labels"), ledger_in(tmp_path)
    ledger.charge(SubsampledGaussian(9.0).charge("training", 0))
    found = learn(ballot, SubsampledGaussian(2.0), [], ledger)
    (paid,) = (entry for entry in read_ledger(ledger.path) if entry.purpose == MORPHOLOGY)
    said = found.provenance
    assert (said["ledger_run"], said["ledger_sequence"], said["unit"]) == (paid.run, 2, "patient")
    assert (said["noise_multiplier"], said["l2_bound"]) == (paid.noise_multiplier, ballot.l2_bound)
    assert said["noise_standard_deviation"] == 2.0 * ballot.l2_bound
    assert (found.kind, found.ignore_label, found.regions) == ("private", None, False)


@pytest.mark.parametrize("noise_multiplier", [0.01, 2.0, 300.0])
def test_what_is_released_lies_on_a_grid_a_thousandth_of_the_noise(tmp_path, noise_multiplier):
    ballot = ballot_of("labels")
    votes = [votes_of(ballot, [solid((12, 12), 1)], FLAT)] * 7
    said = learn(ballot, SubsampledGaussian(noise_multiplier), votes, ledger_in(tmp_path)).provenance
    step = GRID * said["noise_standard_deviation"]
    given = [answer for row in said["answers"].values() for answer in row]
    numbers = np.array([[answer["balance"], PRESENCE_WEIGHT * answer["present"]] for answer in given])
    assert GRID == 1e-3 and np.abs(numbers / step - np.round(numbers / step)).max() < 1e-6
    assert len(np.unique(numbers)) > 9  # noise, and not the grid, tells them apart


def test_two_releases_of_the_same_votes_differ(tmp_path):
    given = [learn(ballot_of("labels"), SubsampledGaussian(2.0), [], ledger_in(tmp_path, run)) for run in "ab"]
    assert given[0].provenance["answers"] != given[1].provenance["answers"]


# ---- the charge --------------------------------------------------------------------------------------------------


def test_one_line_pays_for_all_classes_and_questions_before_they_are_released(tmp_path):
    learn(ballot_of("labels"), SubsampledGaussian(3.0), [], ledger_in(tmp_path), checkpoint="abc")
    (paid,) = read_ledger(tmp_path / "privacy_ledger.jsonl")
    assert (paid.purpose, paid.mechanism, paid.noise_multiplier, paid.count) == (MORPHOLOGY, "gaussian", 3.0, 1)
    assert (paid.first_step, paid.sampling_probability, paid.checkpoint) == (None, 1.0, "abc")


def test_when_the_ledger_cannot_be_written_nothing_is_released(tmp_path):
    ledger, given = ledger_in(tmp_path), []
    ledger.path.mkdir()  # no file can be written there
    with pytest.raises((LedgerError, OSError)):
        given.append(learn(ballot_of("labels"), SubsampledGaussian(3.0), [], ledger))
    assert given == [] and not any(ledger.path.iterdir())


def test_a_full_disk_leaves_no_released_number(tmp_path, monkeypatch):
    ledger, given = ledger_in(tmp_path), []

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(LedgerError, match="nothing was released"):
        given.append(learn(ballot_of("labels"), SubsampledGaussian(3.0), [], ledger))
    assert given == []


def test_a_second_learning_of_the_same_run_is_refused_and_charges_nothing(tmp_path):
    ballot, ledger = ballot_of("labels"), ledger_in(tmp_path)
    learn(ballot, SubsampledGaussian(3.0), [], ledger)
    for again in (ledger, ledger_in(tmp_path)):
        with pytest.raises(Refusal, match="charged already"):
            learn(ballot, SubsampledGaussian(3.0), [], again)
    learn(ballot, SubsampledGaussian(3.0), [], ledger_in(tmp_path, "model/fold_1/1"))
    assert len(read_ledger(ledger.path)) == 2


def test_a_crash_while_masks_are_read_costs_nothing(tmp_path):
    ballot = ballot_of("labels")

    def dies_at_the_third():
        yield from [np.zeros((3, 4))] * 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(ballot, SubsampledGaussian(3.0), dies_at_the_third(), ledger_in(tmp_path))
    assert ledger_in(tmp_path).entries == ()
    learn(ballot, SubsampledGaussian(3.0), [], ledger_in(tmp_path))


def test_votes_of_a_drawn_subset_are_refused_before_they_are_counted(tmp_path):
    counted = iter([np.zeros((3, 4))])
    with pytest.raises(UsageRefusal, match="full batch"):
        learn(ballot_of("labels"), SubsampledGaussian(3.0, 0.5), counted, ledger_in(tmp_path))
    assert next(counted) is not None and ledger_in(tmp_path).entries == ()


# ---- decisions ---------------------------------------------------------------------------------------------------

DRAWS = 40_000


def share_accepted(ballot: Ballot, deviation: float, balance: float, present: float) -> float:
    """Share of noise draws that accept one question of the first class."""
    generator = np.random.default_rng(11)
    numbers = generator.normal([balance, PRESENCE_WEIGHT * present], deviation, (DRAWS, 2))
    rows = Ballot(ballot.classes[:1] * DRAWS, ballot.questions[:1])
    return float(np.mean([row[0].accepted for row in answers(rows, numbers, deviation)]))


def at_the_limit(units: int, classes: int, asked: int) -> tuple[Ballot, float]:
    """A ballot and the deviation of its noise, as large as ``questions_for`` permits for these questions."""
    lowest, highest = 0.0, 1e4
    for _ in range(80):
        middle = (lowest + highest) / 2
        enough = number_asked(units, middle, classes) >= asked
        lowest, highest = (middle, highest) if enough else (lowest, middle)
    ballot = Ballot(labels(*map(str, range(classes))), questions(FLAT)[:asked])
    return ballot, lowest * ballot.l2_bound


@pytest.mark.parametrize(("units", "classes", "asked"), [(136, 2, 3), (40, 1, 1), (1600, 5, 2)])
def test_a_unanimous_vote_is_heard_in_more_than_nine_of_ten_noise_draws_even_at_the_limit(units, classes, asked):
    ballot, deviation = at_the_limit(units, classes, asked)
    found = share_accepted(ballot, deviation, units, units)
    assert stats.binomtest(round(found * DRAWS), DRAWS, 0.93, alternative="less").pvalue > 1e-4


@pytest.mark.parametrize("deviations", [0.3, 1, 3.29, 6, 12, 100])
def test_where_patients_are_evenly_divided_at_most_5_percent_of_noise_draws_accept(deviations):
    found = share_accepted(ballot_of("labels"), 10.0, 0.0, 10.0 * deviations)
    assert stats.binomtest(round(found * DRAWS), DRAWS, 0.0501, alternative="greater").pvalue > 1e-4


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45])
def test_an_operation_that_changes_most_patients_masks_is_accepted_more_rarely_still(share):
    balance = (2 * share - 1) * 100
    assert share_accepted(ballot_of("labels"), 20.0, balance, 100) < 0.05


def test_an_absent_class_is_left_alone_in_95_percent_of_noise_draws():
    assert share_accepted(ballot_of("labels"), 10.0, 0.0, 0.0) < 0.053


def test_clear_noise_decides_at_the_wanted_share():
    assert share_accepted(ballot_of("labels"), 0.5, 0.95 * 2000 - 0.05 * 2000, 2000) > 0.99
    assert share_accepted(ballot_of("labels"), 0.5, 0.85 * 2000 - 0.15 * 2000, 2000) < 0.01


def exact(ballot: Ballot, for_it: int, against: int) -> bool:
    balance, present = for_it - against, PRESENCE_WEIGHT * (for_it + against)
    row = [float(balance)] * len(ballot.questions) + [present]
    given = answers(ballot, np.array([row] * len(ballot.classes)), 0.0)
    assert len({answer.accepted for answers_of_class in given for answer in answers_of_class}) == 1
    return given[0][0].accepted


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 400))
def test_exact_sums_accept_from_the_wanted_share_on_and_not_below(for_it, against):
    accepted = exact(ballot_of("labels"), for_it, against)
    assert WANTED_SHARE == 0.9
    assert accepted == (for_it > 0 and 10 * for_it >= 9 * (for_it + against))


@pytest.mark.parametrize("tens", range(1, 60))
def test_exactly_nine_of_ten_is_enough(tens):
    assert exact(ballot_of("labels"), 9 * tens, tens)
    assert not exact(ballot_of("labels"), 9 * tens - 1, tens + 1)


def test_what_is_not_supported_leaves_the_class_alone_and_the_classes_are_kept():
    ballot = ballot_of("ignore")
    found = without_noise(ballot, [np.zeros((3, 4))], "phantom")
    assert found.classes == ballot.classes and found.ignore_label == 4
    assert all(rule.operations == () for rule in found.classes)


def test_a_class_is_opened_first_then_loses_components_then_holes():
    ballot = Ballot(labels("a", "b"), questions((1.0, 1.0)))
    given = [[Answer(q.name, 1.0, 1.0, yes) for q in ballot.questions] for yes in (True, False)]
    first, second = decide(ballot, given)
    assert first == (Opening(radius_mm=1.0, least_kept=0.9), KeepLargest(least_kept=0.3), FillHoles())
    assert second == ()


def test_exact_and_noised_sums_of_clear_patients_decide_alike(tmp_path):
    ballot = ballot_of("labels")
    votes = [votes_of(ballot, [solid((12, 12), 1)], FLAT)] * 60
    exactly = without_noise(ballot, votes, "not_private")
    noised = learn(ballot, SubsampledGaussian(0.05), votes, ledger_in(tmp_path))
    assert noised.classes[0] == exactly.classes[0] and exactly.kind == "not_private"
    assert KeepLargest(least_kept=0.3) in noised.classes[0].operations
    assert ERROR_RATE_Z == pytest.approx(stats.norm.ppf(0.95), abs=1e-3)
