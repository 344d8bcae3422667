"""The unit of privacy: which cases belong to one patient, and which patients train in a fold.

nnU-Net knows cases (one image and its label). Privacy is promised to people, and one person often has several
cases (two hippocampi, two visits). A `Patients` value joins the two; its `unit` is the word printed wherever
epsilon is printed, and it comes from the data:

| what the data say | `unit` |
|---|---|
| no file at all | `case` |
| a column `patient` | `patient` |
| another column, such as `privacy_unit` | `privacy_unit` |
| a source column that says `inferred` in any row | `patient (inferred)`, `privacy_unit (inferred)` |

Folds are slots that are fixed before any image is read. A patient's fold is a keyed hash of its own id and of
nothing else, never a shuffle over the list of patients: nnU-Net's KFold moves a median of 30 other patients
when one of 170 is removed, so that one person's presence would show in everybody's fold.

>>> patients = Patients("patient", "patient", {"left_1": "anna", "right_1": "anna", "left_2": "bert"})
>>> patients
Patients(unit='patient', column='patient')
>>> patients.number
2
>>> splits = make_splits(patients, patients.case_to_patient, key=b"ours", folds=2)
>>> sorted(fold["val"] for fold in splits)
[['left_1', 'right_1'], ['left_2']]
>>> training_slots(splits, 0, patients), training_slots(splits, "all", patients)
(1, 2)

The file is CSV in UTF-8 with a header (`case,patient`; more columns are ignored). Case names and patient ids
are private: no error here prints one. Rows are named by their line in the file, everything else by a count.

Design note: `write_canonical` copies the table beside the preprocessed data, since raw data are often absent
where people train, and the plan holds its SHA-256; `read_canonical` refuses a file that is gone or changed.
The digest is not salted: whoever holds it can confirm a guessed table, so a released model must not carry it.

Design note: a split is accepted or refused as it stands, never repaired, and one with an empty fold is not
drawn again under another key: a key chosen by its result would let patients move each other's folds.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from nnunet_dp.errors import UsageRefusal

Splits: TypeAlias = list[dict[str, list[str]]]
Fold: TypeAlias = int | Literal["all"]

_INFERRED = " (inferred)"
_RESERVED_COLUMNS = ("case", "source", "patient_source")
_NAMED_AT_MOST = 10
_SPLITS_EXAMPLE = '[{"train": ["case_a", "case_b"], "val": ["case_c"]}, ...]'
_SPLITS_REMEDY = (
    "Delete splits_final.json in the preprocessed dataset folder, so that it is made by patient, or put one "
    f"there that keeps all cases of a patient on one side of every fold: {_SPLITS_EXAMPLE}"
)


class PatientsFileError(UsageRefusal):
    """The file of patients is missing or does not say for each case whose it is."""


class SplitError(UsageRefusal):
    """The split into folds is malformed, cannot be made, or tears a patient apart."""


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
    _replace(file, content)
    return hashlib.sha256(content).hexdigest()


def digest(file: Path) -> str:
    """Return the SHA-256 of a file of patients, in hex.

    Raises:
        PatientsFileError: There is no such file.
    """
    return hashlib.sha256(_bytes_of(file)).hexdigest()


def fold_of(patient: str, key: bytes, folds: int = 5) -> int:
    """Return the fold in which a patient validates.

    Formal guarantee: it depends on the patient's own id, the key and the number of folds, and on no other
    patient.

    Args:
        patient: Patient id.
        key: Any non-empty key, chosen before and independently of the data.
        folds: Number of folds, at least 1.

    Returns:
        A number in `range(folds)`, uniform up to a bias of folds / 2^256.

    Raises:
        ValueError: The key is empty or there is no fold.
    """
    if not key or folds < 1:
        raise ValueError(f"fold_of needs a key and 1 or more folds; found {len(key)} bytes, {folds} folds.")
    message = b"nnunet_dp.fold\0" + patient.encode("utf-8", "surrogatepass")  # file names hold surrogates
    return int.from_bytes(hmac.new(key, message, hashlib.sha256).digest(), "big") % folds


def make_splits(patients: Patients, cases: Iterable[str], key: bytes, folds: int = 5) -> Splits:
    """Split by patient, in the form of nnU-Net's splits_final.json.

    Formal guarantee: all cases of one patient stand on one side of every fold, and a patient who comes or
    goes moves nobody else.

    Args:
        patients: Whose case each case is.
        cases: Cases to split.
        key: Key of the hash, see `fold_of`.
        folds: Number of folds.

    Returns:
        One dict per fold with the sorted lists `train` and `val`.

    Raises:
        SplitError: A fold has nobody to train on or nobody to validate on.
        PatientsFileError: A case belongs to nobody.
    """
    groups = patients.cases_of(cases)
    fold_by_patient = {patient: fold_of(patient, key, folds) for patient in groups}
    sizes = Counter(fold_by_patient.values())
    empty = sum(sizes[fold] in (0, len(groups)) for fold in range(folds))
    if empty:
        raise SplitError(
            f"Each of {folds} folds should have a {patients.column} to train on and one to validate on; with "
            f"so few ({len(groups)}) the keyed hash leaves {empty} folds without. Write splits_final.json in "
            f"the preprocessed dataset folder by hand, by {patients.column}: {_SPLITS_EXAMPLE}"
        )
    return [_split(groups, fold_by_patient, fold) for fold in range(folds)]


def check_splits(splits: object, patients: Patients) -> None:
    """Refuse what splits_final.json holds if it is malformed or has one patient on both sides of a fold.

    Cases that appear in no fold are fine: they are held out.

    Raises:
        SplitError: Says how many and in which fold, never who.
    """
    _checked_sides(splits, patients)


def fold_slots(
    splits: object, fold: Fold, patients: Patients
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return who trains and which cases validate in a fold.

    Args:
        splits: What splits_final.json holds; not looked at for fold `all`.
        fold: Number of the fold, or `all`.
        patients: Whose case each case is.

    Returns:
        Training patients with their cases, and the sorted validation cases. For `all` everybody trains and,
        as in nnU-Net, every case validates too.

    Raises:
        SplitError: The fold is not in the file, or the split is refused by `check_splits`.
    """
    if fold == "all":
        return patients.cases_of(patients.case_to_patient), sorted(patients.case_to_patient)
    folds = _checked_sides(splits, patients)
    if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < len(folds):
        raise SplitError(
            f"fold {fold} asked, the file holds {len(folds)} folds 0..{len(folds) - 1}; nnU-Net would draw a "
            "random split over cases, which tears patients apart. Ask for one of these folds, for `all`, or "
            "add the fold to splits_final.json."
        )
    train, validation = folds[fold]
    return patients.cases_of(train), sorted(validation)


def training_slots(splits: object, fold: Fold, patients: Patients) -> int:
    """Return the public number of patients that train in a fold.

    Raises:
        SplitError: As in `fold_slots`.
    """
    return len(fold_slots(splits, fold, patients)[0])


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
            r"column: comm -23 <(ls imagesTr | sed 's/_[0-9]\{4\}\..*//' | sort -u) "
            r"<(tail -n +2 patients.csv | cut -d, -f1 | sort -u)"
        )


def _render(patients: Patients) -> str:
    """Write the table as canonical CSV."""
    text = io.StringIO(newline="")
    source, value = (("source",), ("inferred",)) if patients.inferred else ((), ())
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", patients.column, *source))
    writer.writerows((case, patient, *value) for case, patient in sorted(patients.case_to_patient.items()))
    return text.getvalue()


def _replace(file: Path, content: bytes) -> None:
    """Put the content under the name at once, or not at all, and wait until the disk has it."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # a rename is durable only when its folder is synced
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _split(
    groups: Mapping[str, Sequence[str]], fold_by_patient: Mapping[str, int], fold: int
) -> dict[str, list[str]]:
    """Put the patients of one fold on the validation side, the others on the training side."""
    sides: dict[str, list[str]] = {"train": [], "val": []}
    for patient, cases in groups.items():
        sides["val" if fold_by_patient[patient] == fold else "train"].extend(cases)
    return {side: sorted(cases) for side, cases in sides.items()}


def _checked_sides(splits: object, patients: Patients) -> list[tuple[list[str], list[str]]]:
    """Return training and validation cases of every fold, or say by count what is wrong."""
    if not isinstance(splits, (list, tuple)) or not splits:
        raise SplitError(f"splits_final.json should hold a list of folds; it does not. {_SPLITS_REMEDY}")
    folds = [(_side(fold, entry, "train"), _side(fold, entry, "val")) for fold, entry in enumerate(splits)]
    problems = [line for fold, sides in enumerate(folds) for line in _fold_problems(fold, *sides, patients)]
    if problems:
        more = f" and {len(problems) - _NAMED_AT_MOST} more" * (len(problems) > _NAMED_AT_MOST)
        raise SplitError(
            f"In every fold of splits_final.json the cases of a {patients.column} should be known and stand "
            f"on one side, each once; found {'; '.join(problems[:_NAMED_AT_MOST])}{more}. {_SPLITS_REMEDY}"
        )
    return folds


def _side(fold: int, entry: object, side: str) -> list[str]:
    """Return the cases on one side of a fold."""
    cases = entry.get(side) if isinstance(entry, Mapping) else None
    if not isinstance(cases, (list, tuple)) or not cases or not all(isinstance(case, str) for case in cases):
        raise SplitError(
            f"Fold {fold} of splits_final.json should hold a list `{side}` of at least one case name; it "
            f"does not. {_SPLITS_REMEDY}"
        )
    return list(cases)


def _fold_problems(fold: int, train: list[str], validation: list[str], patients: Patients) -> Iterator[str]:
    """Say in counts what is wrong with one fold."""
    table = patients.case_to_patient
    unknown = sum(case not in table for case in {*train, *validation})
    doubled = len(train) - len(set(train)) + len(validation) - len(set(validation))
    torn = {table.get(case) for case in train} & {table.get(case) for case in validation} - {None}
    if unknown:
        yield f"{unknown} cases in fold {fold} that belong to no {patients.column}"
    if doubled:
        yield f"{doubled} cases repeated on one side of fold {fold}"
    if torn:
        yield f"{len(torn)} {patients.column}s on both sides of fold {fold}"
