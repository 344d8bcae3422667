"""The unit of privacy: which cases belong to one patient.

nnU-Net knows cases (one image and its label). Privacy is promised to people, and one person often has several
cases (two hippocampi, two visits). A `Patients` value joins the two; its `unit` is the word printed wherever
epsilon is printed, and it comes from the data:

| what the data say | `unit` |
|---|---|
| no file at all | `case` |
| a column `patient` | `patient` |
| another column, such as `privacy_unit` | `privacy_unit` |
| a source column that says `inferred` in any row | `patient (inferred)`, `privacy_unit (inferred)` |

>>> patients = Patients("patient", "patient", {"left_1": "anna", "right_1": "anna", "left_2": "bert"})
>>> patients
Patients(unit='patient', column='patient')
>>> patients.number
2

The file is CSV in UTF-8 with a header (`case,patient`; more columns are ignored). Case names and patient ids
are private: no error here prints one. Rows are named by their line in the file, everything else by a count.

Design note: `write_canonical` copies the table beside the preprocessed data, since raw data are often absent
where people train, and the plan holds its SHA-256; `read_canonical` refuses a file that is gone or changed.
The digest is not salted: whoever holds it can confirm a guessed table, so a released model must not carry it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.replacing import replacing

_INFERRED = " (inferred)"
_RESERVED_COLUMNS = ("case", "source", "patient_source")
_NAMED_AT_MOST = 10


class PatientsFileError(UsageRefusal):
    """The file of patients is missing or does not say for each case whose it is."""


@dataclass(frozen=True)
class Patients:
    """Whose case each case is. Printing it shows neither cases nor patients.

    Attributes:
        unit: What epsilon protects, as printed: the column's name, with ` (inferred)` where a source says so.
        column: The column of the file that names the unit; `case` where there is no file.
        case_to_patient: Patient id of every training case of the dataset.
    """

    unit: str
    column: str
    case_to_patient: Mapping[str, str] = field(repr=False, hash=False)

    def __post_init__(self) -> None:
        """Keep a copy of the table, so that nobody changes it from outside."""
        object.__setattr__(self, "case_to_patient", dict(self.case_to_patient))

    @property
    def number(self) -> int:
        """Number of distinct units, N."""
        return len(set(self.case_to_patient.values()))

    @property
    def table_sha256(self) -> str:
        """Digest of the unit's name and of the whole table, hex."""
        content = json.dumps([self.unit, sorted(self.case_to_patient.items())])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def inferred(self) -> bool:
        """Whether the grouping was inferred and not published."""
        return self.unit == self.column + _INFERRED

    def cases_of(self, cases: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Group cases by patient, both sorted, whatever their order; a case named twice counts once.

        Raises:
            PatientsFileError: A case belongs to nobody.
        """
        wanted = sorted(set(cases))
        unknown = sum(case not in self.case_to_patient for case in wanted)
        if unknown:
            raise PatientsFileError(
                f"Every case should belong to a {self.column}; {unknown} of {len(wanted)} cases do not. Add "
                "their rows to patients.csv and plan again: nnunet-dp plan ... --patients FILE"
            )
        groups: dict[str, list[str]] = {}
        for case in wanted:
            groups.setdefault(self.case_to_patient[case], []).append(case)
        return {patient: tuple(groups[patient]) for patient in sorted(groups)}


def cases_as_units(cases: Iterable[str]) -> Patients:
    """Make every case its own unit, called `case`, for a dataset without a file of patients."""
    return Patients("case", "case", {case: case for case in cases})


def read_patients(
    file: Path, column: str | None, cases: Collection[str], held_out: Collection[str] = ()
) -> Patients:
    """Read whose case each case of the dataset is.

    Args:
        file: CSV with a header, UTF-8 with or without a byte order mark.
        column: Column of the unit. None: `patient`, or the only column besides `case` and a source.
        cases: Training cases of the dataset: each needs exactly one row.
        held_out: Cases that may have a row but need none (those of imagesTs); they are not in the table.

    Returns:
        The table, for exactly the training cases.

    Raises:
        PatientsFileError: The file is missing, unreadable or empty, lacks a column, has rows that are blank,
            doubled, too long or unknown to the dataset (by line), or cases have no row (by count).
    """
    return _parse(_bytes_of(file), file, column, set(cases), set(held_out))


def read_columns(file: Path) -> list[str]:
    """Names of a table's columns that may tell patients apart or group them; none where its first line may be a row.

    Raises:
        PatientsFileError: The file is missing or unreadable.
    """
    records = list(_records(_bytes_of(file), file))
    header = records[0][1] if records else []
    return _other_columns(header) if "case" in header else []


def read_canonical(file: Path, sha256: str, cases: Collection[str]) -> Patients:
    """Read the canonical copy, and only if it is the one that the plan was made with.

    Args:
        file: The copy that `write_canonical` wrote.
        sha256: The hex digest that the plan holds.
        cases: Training cases of the dataset.

    Returns:
        The Patients that were written.

    Raises:
        PatientsFileError: The file is gone or changed, or does not fit the cases.
    """
    content = _bytes_of(file)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise PatientsFileError(
            f"{file} should be the file that the privacy plan was made with; its SHA-256 is another. Put the "
            "original back, or plan anew beside the old plan: nnunet-dp plan ... -o NAME --patients FILE"
        )
    return _parse(content, file, None, set(cases), set())


def write_canonical(patients: Patients, file: Path) -> str:
    r"""Write the canonical copy: sorted by case, `\n` line ends, renamed into place and synced to disk.

    Formal guarantee: read back with `column=None`, the copy is the same Patients; equal Patients give equal
    bytes.

    Args:
        patients: The table, as made by `read_patients`.
        file: Where the copy goes; an older one is replaced.

    Returns:
        SHA-256 of the written bytes, in hex.

    Raises:
        PatientsFileError: The table cannot be read back: its unit is `case`, or an id is blank or padded.
    """
    content = _render(patients).encode()
    if _parse(content, file, None, set(patients.case_to_patient), set()) != patients:
        raise PatientsFileError(
            f"{file} should read back as the table it was written from; it does not. Use read_patients."
        )
    with replacing(file) as stream:
        stream.write(content)
    return hashlib.sha256(content).hexdigest()


def canonical_digest(patients: Patients) -> str:
    """Return the digest that the table's canonical copy has, in hex."""
    return hashlib.sha256(_render(patients).encode()).hexdigest()


def digest(file: Path) -> str:
    """Return the SHA-256 of a file of patients, in hex.

    Raises:
        PatientsFileError: There is no such file.
    """
    return hashlib.sha256(_bytes_of(file)).hexdigest()


class _Row(NamedTuple):
    """One row of the file, by its first line."""

    line: int
    case: str
    patient: str
    inferred: bool
    surplus: bool


def _bytes_of(file: Path) -> bytes:
    """Read a file, or say that it is not there."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise PatientsFileError(
            f"{file} should be the CSV that says whose case each case is (header: case,patient); there is no "
            "such file. Put it back, or name another: nnunet-dp plan ... --patients FILE"
        ) from None


def _parse(content: bytes, file: Path, column: str | None, cases: set[str], held_out: set[str]) -> Patients:
    """Turn the bytes of a file into Patients, or say everything that is wrong with its rows."""
    records = list(_records(content, file))
    if len(records) < 2:
        found = "only a header" if records else "nothing"
        raise PatientsFileError(f"{file} should hold a header, case,patient, and rows; it holds {found}.")
    header = records[0][1]
    unit = _unit_column(header, file, column, cases)
    rows = _rows(header, unit, records[1:])
    problems = [*_faulty_rows(rows, header, unit, cases | held_out), *_missing(rows, cases)]
    if problems:
        listed = "\n- ".join(problems)
        raise PatientsFileError(f"{file} should give each case once, with its {unit}; found\n- {listed}")
    table = {row.case: row.patient for row in rows if row.case in cases}
    return Patients(unit + _INFERRED * any(row.inferred for row in rows), unit, table)


def _records(content: bytes, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield first line and stripped cells of every record that is not an empty line."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PatientsFileError(f"{file} should be UTF-8 text; it is not. Save it as `CSV UTF-8`.") from None
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cells) or len(cells) > 1:
                yield line, [cell.strip() for cell in cells]
            line = reader.line_num + 1
    except csv.Error:
        raise PatientsFileError(
            f"{file} should be CSV with balanced quotes; the row that starts in line {line} is not. Mend it."
        ) from None


def _unit_column(header: Sequence[str], file: Path, column: str | None, cases: set[str]) -> str:
    """Choose the column of the unit, or say which columns there are."""
    if column in _RESERVED_COLUMNS:
        raise PatientsFileError(
            f"The unit should be a column that names patients; `{column}` has another meaning. Name one: "
            "--patient-column NAME (or leave the file out, and every case is its own unit)"
        )
    unit = column or _default_column(header)
    if header.count("case") == 1 and header.count(unit) == 1:
        return unit
    found = _describe(header, unit, cases)
    raise PatientsFileError(f"{file} should have one column `case` and one column `{unit}`; found {found}")


def _default_column(header: Sequence[str]) -> str:
    """Return `patient`, or the only column beside `case` (a file without `case` may start with names)."""
    others = _other_columns(header)
    alone = len(others) == 1 and "case" in header
    return others[0] if alone else "patient"


def _other_columns(header: Sequence[str]) -> list[str]:
    """Return the columns that could name a unit."""
    sources = {*_RESERVED_COLUMNS, *(f"{word}_source" for word in header)}
    return [word for word in header if word and word not in sources]


def _describe(header: Sequence[str], unit: str, cases: set[str]) -> str:
    """Say what stands in the header; its words only where it cannot be a row of names."""
    for delimiter, word in ((";", "semicolon"), ("\t", "tab"), ("|", "bar")):
        if any(delimiter in cell for cell in header):
            return f"a {word}, a wrong delimiter. Separate the columns by commas."
    known = {*_RESERVED_COLUMNS, "patient", unit}
    if not known & {word.casefold() for word in header} or (cases - known) & set(header):
        return f"{len(header)} other cells, perhaps a row of data. Put a header above: case,{unit}"
    return (
        f"the columns {', '.join(header)}. Rename them (`Case` is not `case`), or choose the unit: "
        "--patient-column NAME"
    )


def _rows(header: Sequence[str], unit: str, records: Iterable[tuple[int, list[str]]]) -> list[_Row]:
    """Pick the cells that matter; ids are composed (NFC), lest one accent make two people of one."""
    source_words = (f"{unit}_source", "patient_source", "source")
    sources = [index for index, word in enumerate(header) if word in source_words]
    rows = []
    for line, cells in records:
        padded = [*cells, *[""] * (len(header) - len(cells))]
        inferred = any("inferred" in padded[index].casefold() for index in sources)
        patient = unicodedata.normalize("NFC", padded[header.index(unit)])
        rows.append(_Row(line, padded[header.index("case")], patient, inferred, any(cells[len(header) :])))
    return rows


def _faulty_rows(rows: Sequence[_Row], header: Sequence[str], unit: str, known: set[str]) -> Iterator[str]:
    """Say by line what is wrong with rows, and the remedy."""
    times = Counter(row.case for row in rows if row.case)
    others = [word for word in _other_columns(header) if word != unit]
    choice = f", or choose among {', '.join(others)} with --patient-column NAME" if others else ""
    faults: tuple[tuple[str, str, Callable[[_Row], bool]], ...] = (
        ("with a blank case", "Fill it in or delete the row", lambda row: not row.case),
        (f"with a blank {unit}", f"Fill it in{choice}", lambda row: not row.patient),
        ("longer than the header", 'Put values that hold commas in "quotes"', lambda row: row.surplus),
        ("with an invisible character", "Retype it", lambda row: not (row.case + row.patient).isprintable()),
        ("of a case that has two or more", "Keep one of them", lambda row: times[row.case] > 1),
        (
            "of a case unknown to the dataset",
            "Write the image's name without _0000 and file ending, or delete the row",
            lambda row: bool(row.case) and row.case not in known,
        ),
    )
    for what, remedy, is_faulty in faults:
        lines = [row.line for row in rows if is_faulty(row)]
        if lines:
            yield f"{len(lines)} rows {what}: {_lines(lines)}. {remedy}."


def _lines(lines: Sequence[int]) -> str:
    """Name the first ten lines of the file and count the rest."""
    more = f" and {len(lines) - _NAMED_AT_MOST} more" if len(lines) > _NAMED_AT_MOST else ""
    return f"line {', '.join(map(str, lines[:_NAMED_AT_MOST]))}{more}"


def _missing(rows: Sequence[_Row], cases: set[str]) -> Iterator[str]:
    """Count the cases without a row and say how to find them, for their names are private."""
    missing = len(cases - {row.case for row in rows})
    if missing:
        yield (
            f"no row for {missing} of the dataset's {len(cases)} cases. See which, `case` being the first "
            r"column: comm -23 <(ls RAW_DATASET/imagesTr | sed 's/_[0-9]\{4\}\..*//' | sort -u) "
            r"<(tail -n +2 PATIENTS_FILE | tr -d '\r' | cut -d, -f1 | sort -u)"
        )


def _render(patients: Patients) -> str:
    """Write the table as canonical CSV."""
    text = io.StringIO(newline="")
    source, value = (("source",), ("inferred",)) if patients.inferred else ((), ())
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", patients.column, *source))
    writer.writerows((case, patient, *value) for case, patient in sorted(patients.case_to_patient.items()))
    return text.getvalue()
