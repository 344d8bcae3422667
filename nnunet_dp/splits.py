"""Who trains and who validates in each fold: slots that are fixed before any image is read.

A patient's fold is a keyed hash of its own id and of nothing else, never a shuffle over the list of patients: nnU-Net's
KFold moves a median of 30 other patients when one of 170 is removed, so that one person's presence would show in
everybody's fold.

>>> from nnunet_dp.patients import Patients
>>> patients = Patients("patient", "patient", {"left_1": "anna", "right_1": "anna", "left_2": "bert"})
>>> splits = make_splits(patients, patients.case_to_patient, key=b"ours", folds=2)
>>> sorted(fold["val"] for fold in splits)
[['left_1', 'right_1'], ['left_2']]
>>> training_slots(splits, 0, patients), training_slots(splits, "all", patients)
(1, 2)

Design note: a split is accepted or refused as it stands, never repaired, and one with an empty fold is not drawn again
under another key: a key chosen by its result would let patients move each other's folds.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.patients import Patients

Splits: TypeAlias = list[dict[str, list[str]]]
Fold: TypeAlias = int | Literal["all"]

_NAMED_AT_MOST = 10
_SPLITS_EXAMPLE = '[{"train": ["case_a", "case_b"], "val": ["case_c"]}, ...]'
_SPLITS_REMEDY = (
    "Delete splits_final.json in the preprocessed dataset folder, so that it is made by patient, or put one "
    f"there that keeps all cases of a patient on one side of every fold: {_SPLITS_EXAMPLE}"
)


class SplitError(UsageRefusal):
    """The split into folds is malformed, cannot be made, or tears a patient apart."""


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
