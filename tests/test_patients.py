"""The unit of privacy: the file of patients, folds that no patient moves, and errors without names."""

import csv
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from nnunet_dp.patients import (
    Patients,
    PatientsFileError,
    SplitError,
    cases_as_units,
    check_splits,
    digest,
    fold_of,
    fold_slots,
    make_splits,
    read_canonical,
    read_patients,
    training_slots,
    write_canonical,
)

KEY = b"a key that was chosen before the data"
CASES = ("zebra_left", "zebra_right", "walrus_left")
TABLE = {"zebra_left": "Quilp", "zebra_right": "Quilp", "walrus_left": "Nickleby"}
PRIVATE = ("zebra", "walrus", "yak", "quilp", "nickleby", "pickwick")
LETTERS = st.text("abcdefghij0123456789_,\"' é", min_size=1, max_size=8).map(str.strip).filter(bool)
SHARED_DATA = Path(os.environ.get("NNUNET_DP_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def hemispheres(number: int) -> Patients:
    """Return patients with two cases each."""
    table = {f"{side}_{index}": f"p{index}" for index in range(number) for side in ("left", "right")}
    return Patients("patient", "patient", table)


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "patients.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(error: type[Exception], call, *arguments) -> str:
    """Return the message of a refusal, after checking that neither it nor what it hides names anybody."""
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert not [name for name in PRIVATE if name in message.casefold()]
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def folds_by_patient(splits, patients: Patients) -> dict[str, set[int]]:
    table = patients.case_to_patient
    return {table[case]: {i for i, f in enumerate(splits) if case in f["val"]} for case in table}


# --- the table ---


def test_printing_patients_shows_no_case_and_no_patient():
    patients = Patients("patient", "patient", TABLE)
    assert repr(patients) == str(patients) == "Patients(unit='patient', column='patient')"


def test_the_table_cannot_be_changed_from_outside_and_survives_a_process():
    table = dict(TABLE)
    patients = Patients("patient", "patient", table)
    table.clear()
    assert patients.number == 2
    assert pickle.loads(pickle.dumps(patients)) == patients


@given(st.permutations(CASES))
def test_cases_are_grouped_the_same_in_any_order(cases):
    groups = Patients("patient", "patient", TABLE).cases_of(cases)
    assert list(groups.items()) == [("Nickleby", ("walrus_left",)), ("Quilp", ("zebra_left", "zebra_right"))]


def test_grouping_an_unknown_case_counts_it_without_naming_it():
    message = refusal(PatientsFileError, Patients("patient", "patient", TABLE).cases_of, ["yak_1", *CASES])
    assert "1 of 4 cases" in message


def test_without_a_file_every_case_is_a_unit_called_case():
    patients = cases_as_units(CASES)
    assert (patients.unit, patients.number, patients.inferred) == ("case", 3, False)


# --- reading ---


@pytest.mark.parametrize(
    "text",
    [
        "case,patient\nzebra_left,Quilp\nzebra_right,Quilp\nwalrus_left,Nickleby\n",
        "\ufeffcase,patient\r\nzebra_left,Quilp\r\nzebra_right,Quilp\r\nwalrus_left,Nickleby\r\n",
        "case , patient\n zebra_left , Quilp \n zebra_right,\tQuilp\nwalrus_left,  Nickleby",
        '"patient","case"\n"Quilp","zebra_left"\n\nQuilp,zebra_right\nNickleby,"walrus_left"\n\n',
        "case,site,patient,note\nzebra_left,X,Quilp\nzebra_right,X,Quilp,\nwalrus_left,X,Nickleby,,,\n",
    ],
    ids=["plain", "BOM and CRLF", "spaces", "quotes, order, empty lines", "other columns, ragged ends"],
)
def test_the_same_table_is_read_from_any_usual_csv(tmp_path, text):
    assert read_patients(write(tmp_path, text), None, CASES) == Patients("patient", "patient", TABLE)


def test_a_quoted_comma_belongs_to_the_name(tmp_path):
    file = write(tmp_path, 'case,patient\na,"Quilp, Daniel"\nb, "Quilp, Daniel"\n')
    assert read_patients(file, "patient", ["a", "b"]).cases_of(["a", "b"]) == {"Quilp, Daniel": ("a", "b")}


def test_one_accent_written_in_two_ways_is_one_patient(tmp_path):
    file = write(tmp_path, "case,patient\na,Jos\u00e9\nb,Jose\u0301\n")
    assert read_patients(file, None, ["a", "b"]).number == 1


@pytest.mark.parametrize(
    ("text", "column", "unit"),
    [
        ("case,patient,site\na,p,inferred\nb,p,\n", None, "patient"),
        ("case,patient,patient_source\na,p,published\nb,p,\n", None, "patient"),
        ("case,patient,patient_source\na,p,published\nb,p,Inferred by us\n", None, "patient (inferred)"),
        ("case,patient,source\na,p,inferred\nb,p,\n", "patient", "patient (inferred)"),
        ("case,unit,unit_source\na,p,inferred\nb,p,\n", "unit", "unit (inferred)"),
        ("case,unit,unit_source\na,p,inferred\nb,p,\n", None, "unit (inferred)"),
        ("case,unit,patient_source\na,p,inferred\nb,p,\n", "unit", "unit (inferred)"),
        ("case,unit,other_source\na,p,inferred\nb,p,\n", "unit", "unit"),
        ("case,patient,unit\na,,p\nb,,p\n", "unit", "unit"),
        ("case,unit\na,p\nb,p\n", None, "unit"),
        ("case,foo_source\na,p\nb,p\n", None, "foo_source"),
    ],
)
def test_the_unit_is_named_by_the_column_and_by_how_it_was_found(tmp_path, text, column, unit):
    assert read_patients(write(tmp_path, text), column, ["a", "b"]).unit == unit


def test_held_out_cases_may_have_rows_and_are_no_units(tmp_path):
    file = write(tmp_path, "case,patient\na,p1\nb,p2\ntest_1,p3\n")
    assert read_patients(file, None, ["a", "b"], held_out=["test_1", "test_2"]).number == 2
    assert "1 rows of a case unknown to the dataset: line 4." in refusal(
        PatientsFileError, read_patients, file, None, ["a", "b"]
    )


GOOD = "zebra_left,Quilp\nzebra_right,Quilp\nwalrus_left,Nickleby\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it holds nothing"),
        ("\n \n", "it holds nothing"),
        ("case,patient\n", "it holds only a header"),
        (GOOD.replace(",", ";"), "a wrong delimiter"),
        ("case;patient\n" + GOOD.replace(",", ";"), "a semicolon, a wrong delimiter"),
        ("case\tpatient\n" + GOOD.replace(",", "\t"), "a tab, a wrong delimiter"),
        (GOOD, "2 other cells, perhaps a row of data. Put a header above: case,patient"),
        ("zebra_left,patient\nzebra_right,Quilp\n", "2 other cells, perhaps a row of data"),
        ("Case,Patient\n" + GOOD, "found the columns Case, Patient. Rename them"),
        ("case,subject,site\nzebra_left,Quilp,X\n", "found the columns case, subject, site. Rename them"),
        ("case,patient,patient\n" + GOOD, "one column `patient`; found the columns case, patient, patient"),
        ("case,patient\n,Quilp\n" + GOOD, "1 rows with a blank case: line 2. Fill"),
        ("case,patient\n" + GOOD.replace("Quilp", " "), "2 rows with a blank patient: line 2, 3. Fill"),
        ("case,patient\nzebra_left\nzebra_right,Quilp\n", "1 rows with a blank patient: line 2."),
        ("case,patient\n" + GOOD.replace("Quilp", "Quilp, D"), "2 rows longer than the header: line 2, 3."),
        ("case,patient\n" + GOOD.replace("Quilp", "Q\u200bp"), "2 rows with an invisible character: line 2"),
        ("case,patient\n" + GOOD + "zebra_left,Pickwick\n", "2 rows of a case that has two or more: line 2"),
        ("case,patient\n" + GOOD + "yak_left,Pickwick\n", "1 rows of a case unknown to the dataset: line 5."),
        ("case,patient\nzebra_left,Quilp\n", "no row for 2 of the dataset's 3 cases"),
        ('case,patient\nzebra_left,"Quilp\n', "the row that starts in line 2 is not"),
        ("case,patient\nzebra_left,Quilp\n".encode("utf-16"), "should be UTF-8 text"),
        ("case,patient\nzebra_left,Jos\xe9 Quilp\n".encode("latin-1"), "should be UTF-8 text"),
    ],
)
def test_a_faulty_file_is_refused_by_line_and_count_without_a_name(tmp_path, text, expected):
    assert expected in refusal(PatientsFileError, read_patients, write(tmp_path, text), None, CASES)


def test_all_faults_are_told_at_once(tmp_path):
    file = write(tmp_path, "case,patient\nzebra_left,\nyak_left,Quilp\n")
    message = refusal(PatientsFileError, read_patients, file, None, CASES)
    assert message.count("\n- ") == 3


def test_lines_are_those_of_the_file_although_a_quoted_cell_breaks_them(tmp_path):
    file = write(tmp_path, 'case,note,patient\r\nzebra_left,"two\r\nlines",Quilp\r\n\r\nzebra_right,,\r\n')
    assert "blank patient: line 5." in refusal(PatientsFileError, read_patients, file, None, CASES)


def test_ten_lines_are_named_and_the_rest_counted(tmp_path):
    cases = [f"yak_{i}" for i in range(30)]
    file = write(tmp_path, "case,patient\n" + "".join(f"{case},\n" for case in cases))
    message = refusal(PatientsFileError, read_patients, file, None, cases)
    assert "30 rows with a blank patient: line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 20 more." in message


@pytest.mark.parametrize("column", ["case", "source", "patient_source"])
def test_a_column_with_another_meaning_is_no_unit(tmp_path, column):
    file = write(tmp_path, f"case,{column}\na,b\n")
    assert "has another meaning" in refusal(PatientsFileError, read_patients, file, column, ["a"])


def test_a_missing_file_is_refused_with_what_to_type(tmp_path):
    for call in (lambda: read_patients(tmp_path / "no.csv", None, CASES), lambda: digest(tmp_path)):
        assert "--patients FILE" in refusal(PatientsFileError, call)


# --- the canonical copy ---


@given(
    st.dictionaries(LETTERS, LETTERS, min_size=1, max_size=12),
    st.sampled_from(["patient", "privacy_unit", "foo_source", "a,b", "patient (inferred)"]),
    st.booleans(),
)
def test_the_canonical_copy_reads_back_as_the_same_patients(tmp_path_factory, table, column, inferred):
    file = tmp_path_factory.mktemp("copy") / "patients.csv"
    table = {case.replace('"', "''"): patient for case, patient in table.items()}
    patients = Patients(column + " (inferred)" * inferred, column, table)
    assert write_canonical(patients, file) == digest(file)
    assert read_patients(file, None, table) == read_canonical(file, digest(file), table) == patients


def test_the_canonical_copy_does_not_depend_on_the_order_of_rows_or_line_ends(tmp_path):
    rows = GOOD.splitlines()
    digests = set()
    for lines, end in ((rows, "\n"), (rows[::-1], "\r\n")):
        patients = read_patients(write(tmp_path, end.join(["case,patient", *lines])), None, CASES)
        digests.add(write_canonical(patients, tmp_path / "copy.csv"))
    assert len(digests) == 1
    assert (tmp_path / "copy.csv").read_text() == "\n".join(["case,patient", *sorted(rows), ""])


@pytest.mark.parametrize(
    "patients",
    [
        cases_as_units(CASES),
        Patients("patient", "patient", {"a": ""}),
        Patients("patient", "patient", {"a": " Quilp"}),
        Patients("patient", "patient", {"a": "Qui\rlp"}),
        Patients("somebody", "patient", {"a": "Quilp"}),
        Patients("patient", "patient", {}),
    ],
    ids=["case", "blank", "padded", "carriage return", "unit of its own", "empty"],
)
def test_a_table_that_would_not_read_back_is_not_written(tmp_path, patients):
    refusal(PatientsFileError, write_canonical, patients, tmp_path / "copy.csv")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_copy_and_no_debris(tmp_path, monkeypatch):
    file = tmp_path / "copy.csv"
    before = write_canonical(Patients("patient", "patient", TABLE), file)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_canonical(Patients("patient", "patient", {"a": "b"}), file)
    assert [digest(found) for found in tmp_path.iterdir()] == [before]


def test_a_changed_canonical_copy_is_refused(tmp_path):
    file = tmp_path / "copy.csv"
    sha256 = write_canonical(Patients("patient", "patient", TABLE), file)
    file.write_bytes(file.read_bytes() + b"\n")
    assert "its SHA-256 is another" in refusal(PatientsFileError, read_canonical, file, sha256, CASES)


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


def real(dataset: str) -> tuple[Path, set[str], list]:
    """Return the file of cases, the case names of imagesTr, and the splits of a shared dataset."""
    folder = SHARED_DATA / dataset
    if not folder.is_dir():
        pytest.skip(f"{dataset} is not in the folder of shared data; name it in NNUNET_DP_SHARED_DATA")
    cases = {path.name.split(".")[0] for path in (folder / "labelsTr").glob("[!.]*")}
    return folder / "cases.csv", cases, json.loads((folder / "splits_final.json").read_text())


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


def test_isic_has_no_patients_and_says_which_column_to_choose():
    file, cases, _ = real("Dataset117_ISIC2017")
    with pytest.raises(PatientsFileError) as caught:
        read_patients(file, None, cases)
    message = str(caught.value)
    assert "2000 rows with a blank patient: line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 1990 more." in message
    assert "site, privacy_unit, age" in message
    assert "ISIC_0" not in message


def test_isic_has_1997_privacy_units_and_the_canonical_copy_keeps_them(tmp_path):
    file, cases, splits = real("Dataset117_ISIC2017")
    patients = read_patients(file, "privacy_unit", cases)
    assert (patients.unit, patients.number) == ("privacy_unit", 1997)
    check_splits(splits, patients)
    write_canonical(patients, tmp_path / "patients.csv")
    assert read_patients(tmp_path / "patients.csv", None, cases) == patients


def test_real_patients_are_split_by_hash_without_an_empty_fold():
    file, cases, _ = real("Task04_Hippocampus")
    patients = read_patients(file, None, cases)
    splits = make_splits(patients, cases, KEY)
    assert all(20 <= 170 - training_slots(splits, fold, patients) <= 50 for fold in range(5))
    with file.open() as stream:
        assert len(list(csv.DictReader(stream))) == len(cases)
