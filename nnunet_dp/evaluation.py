"""Folders of segmentations in, metrics with intervals out: ``nnunet-dp evaluate``.

==========================  ==================================================================
part                        says
==========================  ==================================================================
``segmentations``           which files belong together, and what is read from them
``label_scheme``            what a class is
``segmentation_metrics``    Dice, HD95, NSD and ASSD, and what an empty mask counts as
``case_measurements``       the metrics of every class of every case
``bootstrap``               means, and their intervals over patients
this file                   the order of these steps, and the report
==========================  ==================================================================

Cases only in the reference are counted and left out. The conventions on empty masks and ignored voxels are said in
every output; no output names a case.

Design note: the numbers describe the reference data and are not differentially private.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dp.bootstrap import LEVEL, Summary, paired_bootstrap
from nnunet_dp.case_measurements import CaseFiles, measure_cases
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.label_scheme import SegmentedClass, find_scheme
from nnunet_dp.patients import Patients, cases_as_units, read_patients
from nnunet_dp.segmentation_metrics import Metrics
from nnunet_dp.segmentations import find_segmentations, unit_of_length
from nnunet_dp.workers import Progress

_CONVENTIONS = {
    "empty_in_both": "left out of every mean",
    "empty_in_one": "dice 0, nsd 0, hd95 and assd the image's diagonal",
    "ignore_label": "voxels that the reference ignores are in neither mask",
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one folder, or of two and their difference. Printing it shows no case.

    Attributes:
        classes: C of them.
        predictions: means over the cases of ``-p``.
        compare: the same for the other folder.
        difference: predictions minus compare; a positive Dice difference says that predictions are better.
        cases: names, sorted, for plots; never printed.
        values: ``[folders, cases, classes, metrics]``, NaN where both masks are empty.
        one_empty: ``[folders, cases, classes]``, whether exactly one of the masks is empty.
        patients: number of units drawn.
        unit: what a unit is: case, patient, ...
        length_unit: mm or pixels, of distances and of the tolerance.
        labels_from: where the meaning of the labels comes from.
    """

    classes: tuple[SegmentedClass, ...]
    predictions: Summary
    compare: Summary | None
    difference: Summary | None
    cases: tuple[str, ...] = field(repr=False)
    values: npt.NDArray[np.float64] = field(repr=False)
    one_empty: npt.NDArray[np.bool_] = field(repr=False)
    cases_only_in_reference: int
    patients: int
    unit: str
    tolerance_mm: float
    length_unit: str
    labels_from: str
    resamples: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: no names of cases."""
        content = {
            **self._folder(self.predictions, 0),
            "cases": len(self.cases),
            "cases_only_in_reference": self.cases_only_in_reference,
            "patients": self.patients,
            "unit": self.unit,
            "tolerance_mm": self.tolerance_mm,
            "length_unit": self.length_unit,
            "labels_from": self.labels_from,
            "conventions": _CONVENTIONS,
            "bootstrap": {"level": LEVEL, "over": self.unit, "resamples": self.resamples, "seed": self.seed},
        }
        if self.compare and self.difference:
            content["compare"] = self._folder(self.compare, 1)
            content["difference"] = {"meaning": "predictions minus compare", **self._folder(self.difference, None)}
        return content

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        left_out = f"; {self.cases_only_in_reference} only in the reference, left out"
        units = "" if self.unit == "case" else f" of {self.patients} units ({self.unit})"
        lines = [
            ("cases", f"{len(self.cases)}{units}{left_out * bool(self.cases_only_in_reference)}"),
            ("labels", self.labels_from),
            ("lengths", f"in {self.length_unit}; NSD at a tolerance of {self.tolerance_mm:g} {self.length_unit}"),
            ("intervals", f"95 %, bootstrap over each {self.unit}, {self.resamples} resamples"),
            *self._table("", self.predictions, 0),
        ]
        if self.compare and self.difference:
            lines += self._table("compare: ", self.compare, 1)
            lines.append(
                ("difference", "predictions minus compare, paired: a positive dice says predictions are better")
            )
            lines += self._rows("difference: ", self.difference, "+")
        return lines

    def _folder(self, summary: Summary, folder: int | None) -> dict[str, Any]:
        per_class = {
            one.key: {
                "name": one.name,
                "labels": list(one.labels),
                **_plain_row(summary, row),
                **({} if folder is None else self._counts(folder, row)),
            }
            for row, one in enumerate(self.classes)
        }
        return {"per_class": per_class, "mean": _plain_row(summary, -1)}

    def _counts(self, folder: int, row: int | slice) -> dict[str, int]:
        empty = np.isnan(self.values[folder, :, row, 0])
        return {
            "cases": int((~empty).sum()),
            "empty_in_both": int(empty.sum()),
            "empty_in_one": int(self.one_empty[folder, :, row].sum()),
        }

    def _table(self, prefix: str, summary: Summary, folder: int) -> Iterator[tuple[str, str]]:
        found = self._counts(folder, slice(None))
        both = f"in both images: {found['empty_in_both']} times, {_CONVENTIONS['empty_in_both']}"
        one = f"in one: {found['empty_in_one']} times, {_CONVENTIONS['empty_in_one']}"
        yield f"{prefix}empty class", f"{both}; {one}"
        yield from self._rows(prefix, summary)

    def _rows(self, prefix: str, summary: Summary, sign: str = "") -> Iterator[tuple[str, str]]:
        for row, one in enumerate(self.classes):
            name = one.key if one.key == one.name else f"{one.key} ({one.name})"
            yield f"{prefix}{name}", _line(summary, row, self.length_unit, sign)
        yield f"{prefix}mean", _line(summary, -1, self.length_unit, sign)


def evaluate_folders(
    reference: Path,
    predictions: Path,
    compare: Path | None = None,
    *,
    dataset_json: Path | None = None,
    tolerance_mm: float = 1.0,
    patients: Path | None = None,
    patient_column: str | None = None,
    resamples: int = 2000,
    processes: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the segmentations of a folder, and what they are better or worse at than those of another.

    Args:
        reference: folder of reference segmentations; cases without a prediction are counted and left out.
        predictions: folder of predicted segmentations, named like their references.
        compare: another folder with predictions of the same cases.
        dataset_json: names, regions, ignore label and file ending; default: that of ``predictions``, else the one
            beside ``reference``, else the integers that the files hold.
        tolerance_mm: of the surface Dice (pixels where images have no spacing).
        patients: CSV of case,patient; more rows than cases are fine. Default: every case is its own unit.
        patient_column: see ``patients.read_patients``.
        resamples: draws of the bootstrap.
        processes: images are read and measured in so many processes.
        seed: the same seed gives the same intervals.
        progress: told (cases done, cases in all) after each case.

    Returns:
        The metrics with their intervals.

    Raises:
        UsageRefusal: predictions without a reference, folders that do not fit together, images that differ in shape
            or spacing, labels that are no integers or unknown, a patients file that does not fit.
    """
    _require_settings(tolerance_mm, resamples, processes)
    scheme = find_scheme(dataset_json, predictions, reference)
    references, found = find_segmentations(reference, predictions, compare, scheme.file_ending)
    cases = tuple(found[0])
    units = _units(patients, patient_column, cases)
    files = [
        CaseFiles(f"case {number} of {len(cases)} by name", references[case], [each[case] for each in found])
        for number, case in enumerate(cases, 1)
    ]
    measured = measure_cases(files, scheme, tolerance_mm, processes, progress)
    summaries = paired_bootstrap(measured.values, [units.case_to_patient[case] for case in cases], resamples, seed)
    return Evaluation(
        classes=measured.classes,
        predictions=summaries[0],
        compare=summaries[1],
        difference=summaries[2],
        cases=cases,
        values=measured.values,
        one_empty=measured.one_empty,
        cases_only_in_reference=len(references) - len(cases),
        patients=units.number,
        unit=units.unit,
        tolerance_mm=tolerance_mm,
        length_unit=unit_of_length(files[0].reference),
        labels_from=scheme.source,
        resamples=resamples,
        seed=seed,
    )


def _require_settings(tolerance_mm: float, resamples: int, processes: int) -> None:
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise UsageRefusal(f"--tolerance should be a length of 0 or more, found {tolerance_mm}; type: --tolerance 1")
    for name, number in (("resamples", resamples), ("processes", processes)):
        if number < 1:
            raise UsageRefusal(f"{name} should be 1 or more, found {number}; leave it out for the default")


def _units(file: Path | None, column: str | None, cases: Collection[str]) -> Patients:
    """Whose each case is; rows of cases that are not evaluated are fine."""
    return cases_as_units(cases) if file is None else read_patients(file, column, cases, _cases_in(file))


def _cases_in(file: Path) -> set[str]:
    """The cases a CSV names; of what is wrong with it, ``read_patients`` speaks."""
    try:
        rows = list(csv.reader(io.StringIO(file.read_text("utf-8-sig", "replace"), newline=""), skipinitialspace=True))
    except (OSError, csv.Error):
        return set()
    header = [cell.strip() for cell in rows[0]] if rows else []
    column = header.index("case") if "case" in header else len(header)
    return {row[column].strip() for row in rows[1:] if len(row) > column}


def _plain_row(summary: Summary, row: int) -> dict[str, Any]:
    """One row for JSON: NaN becomes None."""
    estimate, low, high = ([*map(_plain, each[row])] for each in (summary.estimate, summary.low, summary.high))
    intervals = {name: bounds for name, *bounds in zip(Metrics._fields, low, high, strict=True)}
    return {**dict(zip(Metrics._fields, estimate, strict=True)), "intervals": intervals}


def _line(summary: Summary, row: int, length_unit: str, sign: str = "") -> str:
    """One row for people."""
    cells = zip(Metrics._fields, summary.estimate[row], summary.low[row], summary.high[row], strict=True)
    return "  ".join(_cell(*cell, length_unit, sign) for cell in cells)


def _plain(number: float) -> float | None:
    return None if np.isnan(number) else float(number)


def _cell(metric: str, estimate: float, low: float, high: float, length_unit: str, sign: str) -> str:
    """Such as ``dice 0.8812 [0.8700, 0.8921]``."""
    if np.isnan(estimate):
        return f"{metric} -"
    is_length = metric in ("hd95", "assd")
    form = f"{sign}.3f" if is_length else f"{sign}.4f"
    interval = "" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]"
    return f"{metric} {estimate:{form}}{interval}{f' {length_unit}' * is_length}"
