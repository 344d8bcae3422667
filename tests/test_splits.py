"""Folds are by patient, independent of who else is there, and refused where they tear a patient apart."""

import csv
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patient_tables import (
    CASES,
    KEY,
    LETTERS,
    TABLE,
    folds_by_patient,
    hemispheres,
    real,
    refusal,
)
from scipy.stats import chisquare

from nnunet_dp.patients import (
    Patients,
    cases_as_units,
    read_patients,
)
from nnunet_dp.splits import SplitError, check_splits, fold_of, fold_slots, make_splits, training_slots

# --- folds ---


@given(st.sets(LETTERS, min_size=80, max_size=120), st.binary(min_size=1, max_size=80), st.data())
def test_removing_any_one_patient_leaves_every_other_in_its_fold(ids, key, data):
    gone = data.draw(st.sampled_from(sorted(ids)))
    everybody, others = cases_as_units(ids), cases_as_units(ids - {gone})
    before = folds_by_patient(make_splits(everybody, ids, key), everybody)
    after = folds_by_patient(make_splits(others, ids - {gone}, key), others)
    assert after == {patient: fold for patient, fold in before.items() if patient != gone}


def test_the_shuffle_of_nnunet_moves_other_patients_and_is_rejected():
    from sklearn.model_selection import KFold

    def folds(ids):
        parts = KFold(5, shuffle=True, random_state=12345).split(ids)  # nnU-Net's generate_crossval_split
        return {ids[index]: fold for fold, (_, part) in enumerate(parts) for index in part}

    ids = [f"p{i:03d}" for i in range(170)]
    before = folds(ids)
    moved = []
    for gone in ids:
        after = folds([patient for patient in ids if patient != gone])
        moved.append(sum(after[patient] != before[patient] for patient in after))
    assert sorted(moved)[len(moved) // 2] >= 10


def test_two_hemispheres_are_never_split():
    patients = hemispheres(100)
    splits = make_splits(patients, patients.case_to_patient, KEY)
    assert all(len(folds) == 1 for folds in folds_by_patient(splits, patients).values())
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == sorted(patients.case_to_patient)
    check_splits(splits, patients)


def test_splits_do_not_depend_on_the_order_of_the_cases():
    patients = hemispheres(100)
    cases = list(patients.case_to_patient)
    assert make_splits(patients, cases, KEY) == make_splits(patients, cases[::-1], KEY)
    assert make_splits(patients, cases, KEY) != make_splits(patients, cases, KEY + b"!")


def test_two_thousand_patients_are_spread_evenly_over_the_folds():
    ids = [f"p{index}" for index in range(2000)]
    even = Counter(fold_of(patient, KEY) for patient in ids)
    uneven = Counter(fold_of(patient, KEY, 6) % 5 for patient in ids)  # wrong: fold 0 twice as likely
    assert chisquare([even[fold] for fold in range(5)]).pvalue > 1e-3
    assert chisquare([uneven[fold] for fold in range(5)]).pvalue < 1e-6


@pytest.mark.parametrize(("key", "folds"), [(b"", 5), (KEY, 0)])
def test_a_fold_needs_a_key_and_a_number_of_folds(key, folds):
    assert "needs a key" in refusal(ValueError, fold_of, "Quilp", key, folds)


@pytest.mark.parametrize(("number", "folds"), [(0, 5), (1, 5), (3, 5), (100, 1)])
def test_too_few_patients_for_the_folds_are_sent_to_write_the_split_by_hand(number, folds):
    patients = hemispheres(number)
    message = refusal(SplitError, make_splits, patients, patients.case_to_patient, KEY, folds)
    assert f"so few ({number})" in message
    assert '"train"' in message


# --- splits that came with the data ---


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (None, "a list of folds"),
        ([], "a list of folds"),
        ({"train": ["zebra_left"]}, "a list of folds"),
        (["zebra_left"], "Fold 0 of splits_final.json should hold a list `train`"),
        ([{"train": ["zebra_left"]}], "a list `val`"),
        ([{"train": [], "val": ["zebra_left"]}], "a list `train` of at least one"),
        ([{"train": "zebra_left", "val": ["walrus_left"]}], "a list `train`"),
        ([{"train": ["zebra_left"], "val": [7]}], "a list `val`"),
        ([{"train": ["zebra_left"], "val": ["zebra_right"]}], "1 patients on both sides of fold 0"),
        ([{"train": ["zebra_left"], "val": ["zebra_left"]}], "1 patients on both sides of fold 0"),
        ([{"train": ["zebra_left"] * 2, "val": ["walrus_left"]}], "1 cases repeated on one side of fold 0"),
        ([{"train": ["zebra_left"], "val": ["yak_left", "yak_right"]}], "2 cases in fold 0 that belong"),
    ],
)
def test_a_faulty_split_is_refused_by_fold_and_count_without_a_name(splits, expected):
    patients = Patients("patient", "patient", TABLE)
    for call in (check_splits, lambda s, p: fold_slots(s, 0, p), lambda s, p: training_slots(s, 0, p)):
        message = refusal(SplitError, call, splits, patients)
        assert expected in message
        assert "Delete splits_final.json" in message


def test_unknown_cases_on_both_sides_are_not_taken_for_a_patient():
    splits = [{"train": ["zebra_left", "yak_left"], "val": ["walrus_left", "yak_right"]}]
    message = refusal(SplitError, check_splits, splits, Patients("patient", "patient", TABLE))
    assert "found 2 cases in fold 0 that belong to no patient. Delete" in message


def test_every_torn_fold_is_told():
    bad = {"train": ["zebra_left"], "val": ["zebra_right"]}
    good = {"train": ["zebra_left", "zebra_right"], "val": ["walrus_left"]}
    message = refusal(SplitError, check_splits, [bad, good, bad], Patients("patient", "patient", TABLE))
    assert "sides of fold 0; 1 patients on both sides of fold 2." in message


def test_a_fold_names_its_training_patients_and_its_validation_cases():
    patients = Patients("patient", "patient", TABLE)
    splits = [{"train": ["zebra_right", "zebra_left"], "val": ["walrus_left"]}]
    assert fold_slots(splits, 0, patients) == ({"Quilp": ("zebra_left", "zebra_right")}, ["walrus_left"])
    assert training_slots(splits, 0, patients) == 1


def test_held_out_cases_of_a_split_do_not_train():
    splits = [{"train": ["zebra_left"], "val": ["walrus_left"]}]
    slots, _ = fold_slots(splits, 0, Patients("patient", "patient", TABLE))
    assert slots == {"Quilp": ("zebra_left",)}


def test_in_fold_all_everybody_trains_without_a_split():
    patients = Patients("patient", "patient", TABLE)
    slots, validation = fold_slots([], "all", patients)
    assert slots == patients.cases_of(CASES)
    assert validation == sorted(CASES)
    assert training_slots([], "all", patients) == 2


@pytest.mark.parametrize("fold", [5, -1, True, "0"])
def test_a_fold_beyond_the_file_is_refused_since_nnunet_would_draw_one_over_cases(fold):
    patients = hemispheres(100)
    splits = make_splits(patients, patients.case_to_patient, KEY)
    message = refusal(SplitError, fold_slots, splits, fold, patients)
    assert f"fold {fold} asked, the file holds 5 folds 0..4; nnU-Net would draw a random split" in message


# --- real data ---


def test_hippocampus_has_170_inferred_patients_and_136_train_in_fold_0():
    file, cases, splits = real("Task04_Hippocampus")
    patients = read_patients(file, None, cases)
    assert (patients.unit, patients.number, len(cases)) == ("patient (inferred)", 170, 260)
    check_splits(splits, patients)
    assert training_slots(splits, 0, patients) == 136
    assert len(fold_slots(splits, 0, patients)[1]) == 49


def test_the_case_split_of_nnunet_tears_hippocampus_patients_apart_and_is_refused():
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    file, cases, _ = real("Task04_Hippocampus")
    splits = generate_crossval_split(sorted(cases), seed=12345, n_splits=5)
    with pytest.raises(SplitError, match=r"\d+ patients on both sides of fold 0") as caught:
        check_splits(splits, read_patients(file, None, cases))
    assert "hippocampus_" not in str(caught.value)
    assert "subj" not in str(caught.value)


def test_real_patients_are_split_by_hash_without_an_empty_fold():
    file, cases, _ = real("Task04_Hippocampus")
    patients = read_patients(file, None, cases)
    splits = make_splits(patients, cases, KEY)
    assert all(20 <= 170 - training_slots(splits, fold, patients) <= 50 for fold in range(5))
    with file.open() as stream:
        assert len(list(csv.DictReader(stream))) == len(cases)
