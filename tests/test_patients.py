"""The unit of privacy: the file of patients, folds that no patient moves, and errors without names."""

import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patient_tables import CASES, LETTERS, TABLE, real, refusal, write

from nnunet_dp.patients import (
    Patients,
    PatientsFileError,
    cases_as_units,
    digest,
    read_canonical,
    read_patients,
    write_canonical,
)
from nnunet_dp.splits import check_splits

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


# --- real data ---


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
