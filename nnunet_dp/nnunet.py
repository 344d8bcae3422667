"""Everything this package asks of nnU-Net: the only core file that imports ``nnunetv2``.

Datasets and their units, private plans from ordinary ones, patches of one patient, the network's admission, what a
finished checkpoint may hold. The trainers (``nnunet_dp.trainers``) call these functions and contain no algorithm.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunet_dp.accounting import PrivacyBudget, default_delta
from nnunet_dp.attacker import true_positive_rate
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import read_ledger, refuse_other_units
from nnunet_dp.morphology import classes_from
from nnunet_dp.outlook import Outlook, outlook
from nnunet_dp.patients import (
    Patients,
    canonical_digest,
    cases_as_units,
    digest,
    read_canonical,
    read_patients,
    write_canonical,
)
from nnunet_dp.phantoms.matching import PublicFacts, matching_kinds
from nnunet_dp.planning import (
    MORPHOLOGY_SHARE,
    NOT_COVERED,
    TRAINING_SHARE,
    ByHand,
    Compute,
    ConfigurationPlan,
    PrivacySection,
    plan_configuration,
)
from nnunet_dp.plans import (
    SECTION,
    for_one_configuration,
    plans_name,
    read_section,
    shrunk_architecture,
    with_section,
    write_json,
)
from nnunet_dp.report import describe
from nnunet_dp.run import LEDGER
from nnunet_dp.splits import Splits, check_splits, make_splits

PATIENTS = "patients.csv"
SPLITS = "splits_final.json"
DEFAULT_EPSILON = 8.0
LARGEST_EPSILON = 1000.0  # beyond it nobody is protected, and accountants run out of range


# ---- datasets and their units ------------------------------------------------------------------------------------


def preprocessed_folder(dataset: str) -> Path:
    """The dataset's preprocessed folder; ``dataset`` is an id or a name.

    Raises:
        UsageRefusal: when nnU-Net does not know the dataset or it was not planned.
    """
    if not nnUNet_preprocessed.is_set():
        raise UsageRefusal("nnUNet_preprocessed is not set: export nnUNet_raw, nnUNet_preprocessed, nnUNet_results")
    try:
        name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    except (RuntimeError, ValueError):
        raise UsageRefusal(f"nnU-Net knows no dataset {dataset!r} below nnUNet_raw or nnUNet_preprocessed") from None
    folder = Path(str(nnUNet_preprocessed)) / name
    if not (folder / "dataset.json").is_file():
        raise UsageRefusal(f"{name} is not preprocessed: run `nnUNetv2_plan_and_preprocess -d {dataset}` first")
    return folder


def dataset_cases(folder: Path) -> list[str]:
    """All training cases of a preprocessed dataset, sorted: the public slots.

    Raises:
        UsageRefusal: when the folder holds no reference segmentations yet.
    """
    ending = json.loads((folder / "dataset.json").read_text())["file_ending"]
    references = folder / "gt_segmentations"
    names = [file.name for file in references.glob(f"*{ending}")] if references.is_dir() else []
    if not names:
        raise UsageRefusal(f"{folder.name} holds no gt_segmentations: run `nnUNetv2_plan_and_preprocess` first")
    return sorted(name[: -len(ending)] for name in names)


def find_patients(folder: Path, file: Path | None = None, column: str | None = None, replace: bool = False) -> Patients:
    """The dataset's units, with the canonical ``patients.csv`` kept in the preprocessed folder.

    The file is looked for as given, then in the raw dataset folder, then in the preprocessed folder. Without any, every
    case is its own unit.

    Args:
        folder: the preprocessed dataset folder.
        file: a file named by the user.
        column: its column that names the unit.
        replace: whether a differing copy may be replaced (never once the ledger holds charges).
    """
    cases, kept = dataset_cases(folder), folder / PATIENTS
    raw = Path(str(nnUNet_raw)) / folder.name / PATIENTS if nnUNet_raw.is_set() else None
    source = file or (raw if raw is not None and raw.is_file() else None)
    if source is None:
        found = read_patients(kept, None, cases) if kept.is_file() else cases_as_units(cases)
        _refuse_other_units(found, folder)
        return found
    if file is None and column is None and kept.is_file():
        column = read_patients(kept, None, cases).column  # the column chosen when the copy was made
    patients = read_patients(source, column, cases, _held_out(folder))
    _refuse_other_units(patients, folder)
    _keep_patients(patients, kept, replace)
    return patients


def _refuse_other_units(patients: Patients, folder: Path) -> None:
    ledger = folder / LEDGER
    if ledger.is_file():
        refuse_other_units(read_ledger(ledger), patients.unit, patients.table_sha256)


def _held_out(folder: Path) -> set[str]:
    """Cases of the raw dataset's imagesTs: they may have rows in a patients file, and are no training slots."""
    ending = json.loads((folder / "dataset.json").read_text())["file_ending"]
    images = Path(str(nnUNet_raw)) / folder.name / "imagesTs" if nnUNet_raw.is_set() else None
    files = images.glob(f"*_0000{ending}") if images is not None and images.is_dir() else ()
    return {file.name.removesuffix(f"_0000{ending}") for file in files}


def _keep_patients(patients: Patients, kept: Path, replace: bool) -> None:
    if kept.is_file() and digest(kept) == canonical_digest(patients):
        return
    if kept.is_file() and not replace:
        raise UsageRefusal(f"{PATIENTS} in {kept.parent.name} groups cases differently: give --overwrite")
    write_canonical(patients, kept)


def patients_of_plan(folder: Path, section: PrivacySection) -> Patients:
    """The units that a plan was made for, as kept in the preprocessed folder.

    A model's own copy of the plan carries no digest of the table; the ledger's charges do, and are compared when it is
    opened.

    Raises:
        Refusal: when their number or name changed since.
    """
    cases, kept = dataset_cases(folder), folder / PATIENTS
    expected = section.patients_file_sha256
    if expected:
        patients = read_canonical(kept, expected, cases)
    elif section.budget.unit != "case" and kept.is_file():
        patients = read_patients(kept, None, cases)
    else:
        patients = cases_as_units(cases)
    if (patients.number, patients.unit) != (section.patients, section.budget.unit):
        raise Refusal(
            f"the plan was made for {section.patients} units ({section.budget.unit}), the dataset has "
            f"{patients.number} ({patients.unit}): make the plan again"
        )
    return patients


def find_splits(folder: Path, patients: Patients) -> Splits:
    """The dataset's splits, made by patient with a keyed hash where none exist.

    Raises:
        Refusal: for a split with one patient on both sides.
    """
    file, cases = folder / SPLITS, dataset_cases(folder)
    if not file.is_file():
        write_json(make_splits(patients, cases, key=f"nnunet_dp splits 1 {folder.name}".encode()), file)
    try:
        splits = json.loads(file.read_text())
    except ValueError:
        raise UsageRefusal(f"{SPLITS} is not JSON: delete it, so that it is made by patient, or mend it") from None
    check_splits(splits, patients)
    return splits


# ---- private plans -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanReport:
    """What ``nnunet-dp plan`` decided and where it wrote it."""

    plans_name: str
    file: Path
    changed: bool
    configuration: str
    section: PrivacySection
    spent: float

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        plan = self.section.configurations[self.configuration]
        return {
            "plans_name": self.plans_name,
            "file": str(self.file),
            "changed": self.changed,
            "configuration": self.configuration,
            "epsilon": self.section.budget.epsilon,
            "epsilon_planned": self.spent,
            "delta": self.section.budget.delta,
            "unit": self.section.budget.unit,
            "relation": self.section.budget.relation,
            "patients": self.section.patients,
            "accountant": self.section.accountant,
            "not_covered": list(self.section.not_covered),
            **plan.model_dump(mode="json"),
            **self.expected(),
        }

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        expected, gains = self.outlook, self.attacker_gains()
        attacker = "; ".join(f"{rate:.1%} at {alpha:.0%} false positives" for alpha, rate in gains.items())
        return [
            ("plans", self.plans_name),
            *describe(self.section, self.configuration, None),
            ("attacker", f"tells whether a {self.section.budget.unit} took part, at most: {attacker}"),
            ("verdict", f"{expected.verdict}: {expected.reason}; {expected.next_step}"),
        ]

    def expected(self) -> dict[str, Any]:
        """Signal to noise, verdict and attacker's gain, for ``--json``."""
        gains = {f"true_positive_rate_at_{alpha:g}": rate for alpha, rate in self.attacker_gains().items()}
        return {"signal_to_noise": self.outlook.signal_to_noise, "verdict": self.outlook.verdict, **gains}

    def attacker_gains(self) -> dict[float, float]:
        """Highest true-positive rate of a membership test at 1 % and 5 % false positives, by the planned releases."""
        plan = self.section.configurations[self.configuration]
        events = plan.privacy_plan(self.section.budget, "flat", 1).events
        return {alpha: true_positive_rate(events, alpha) for alpha in (0.01, 0.05)}

    @property
    def outlook(self) -> Outlook:
        """What to expect of a fold with the usual share of the patients."""
        plan = self.section.configurations[self.configuration]
        patients = int(TRAINING_SHARE * self.section.patients)
        return outlook(self.section.budget, patients, plan.network.parameters, plan.start is not None)


def plan_dataset(
    dataset: str,
    configuration: str,
    epsilon: float,
    delta: float | None = None,
    *,
    patients_file: Path | None = None,
    patient_column: str | None = None,
    plans: str = "nnUNetPlans",
    output: str | None = None,
    compute: Compute = "full",
    public_weights: Path | None = None,
    morphology_share: float = MORPHOLOGY_SHARE,
    public_start: bool = True,
    by_hand: ByHand = ByHand(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> PlanReport:
    """Write private plans beside nnU-Net's; a pure function of the budget and public facts.

    The same arguments again change nothing; another configuration is added to the file.

    Raises:
        UsageRefusal: for unknown datasets, plans or configurations, and for a differing plan of that name without
            ``overwrite``.
    """
    draft = _Draft(
        dataset, configuration, delta, patients_file, patient_column, plans, output, compute, public_weights,
        morphology_share, public_start, by_hand, overwrite,
    )  # fmt: skip
    private, report = draft.plan(epsilon)
    changed = _merge_into(report.file, private, report.section, configuration, overwrite)
    return replace(report, changed=changed)


def plan_curve(dataset: str, configuration: str, epsilons: Sequence[float], **options: Any) -> list[PlanReport]:
    """Plans for several budgets, side by side; nothing is written.

    Args:
        dataset: id or name.
        configuration: nnU-Net's name.
        epsilons: the budgets.
        options: those of ``plan_dataset``.
    """
    if not epsilons:
        raise UsageRefusal("--curve should name budgets, found none: try --curve 1,3,8,20")
    draft = _Draft(dataset, configuration, **options)
    return [draft.plan(epsilon)[1] for epsilon in epsilons]


@dataclass(frozen=True)
class _Draft:
    """What ``nnunet-dp plan`` was asked for, but for epsilon."""

    dataset: str
    configuration: str
    delta: float | None = None
    patients_file: Path | None = None
    patient_column: str | None = None
    plans: str = "nnUNetPlans"
    output: str | None = None
    compute: Compute = "full"
    public_weights: Path | None = None
    morphology_share: float = MORPHOLOGY_SHARE
    public_start: bool = True
    by_hand: ByHand = ByHand()  # noqa: RUF009 (frozen)
    overwrite: bool = False

    def plan(self, epsilon: float) -> tuple[dict[str, Any], PlanReport]:
        """The private plans for one epsilon, not yet written."""
        self._refuse_meaningless(epsilon)
        folder = preprocessed_folder(self.dataset)
        source = _read_plans(folder, self.plans)
        _refuse_configuration(source, self.configuration)
        patients = find_patients(folder, self.patients_file, self.patient_column, self.overwrite)
        budget = self._budget(epsilon, patients)
        dataset_json = json.loads((folder / "dataset.json").read_text())
        private, section = _private(
            source, self.configuration, dataset_json, folder, patients, budget, self.compute, self.public_weights,
            self.morphology_share, self.public_start, self.by_hand,
        )  # fmt: skip
        name = self.output or plans_name(self.plans, epsilon)
        private["plans_name"] = name
        spent = _planned_epsilon(section, self.configuration)
        return private, PlanReport(name, folder / f"{name}.json", False, self.configuration, section, spent)

    def _refuse_meaningless(self, epsilon: float) -> None:
        output, delta = self.output, self.delta
        if not 0 < epsilon <= LARGEST_EPSILON:
            raise UsageRefusal(f"epsilon should lie in (0, {LARGEST_EPSILON:g}], found {epsilon:g}: try --epsilon 8")
        if output is not None and (not output or Path(output).name != output or output.endswith(".json")):
            raise UsageRefusal(f"-o should be a name without folder and .json, found {output!r}: try -o myplans")
        if delta is not None and not 0 < delta < 1:
            raise UsageRefusal(f"delta should lie between 0 and 1, found {delta:g}: try 1e-5")

    def _budget(self, epsilon: float, patients: Patients) -> PrivacyBudget:
        delta = default_delta(patients.number) if self.delta is None else self.delta
        if delta * patients.number >= 1:
            raise UsageRefusal(
                f"delta should be below 1 / {patients.number} {patients.unit}s, found {delta:g}: try 1e-5"
            )
        return PrivacyBudget(epsilon=epsilon, delta=delta, unit=patients.unit)


def self_configured(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> dict[str, Any]:
    """Ordinary plans turned private in memory, to the default budget and under their own name.

    Without a public start, so that a training that nobody planned begins at once.
    """
    folder = preprocessed_folder(plans["dataset_name"])
    _refuse_configuration(plans, configuration)
    patients = find_patients(folder)
    budget = PrivacyBudget(epsilon=DEFAULT_EPSILON, delta=default_delta(patients.number), unit=patients.unit)
    return _private(plans, configuration, dataset_json, folder, patients, budget, "full", None, public_start=False)[0]


def public_facts(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> PublicFacts:
    """What decides which phantoms resemble a dataset, from its plans and its dataset.json."""
    schemes = next(iter(plans["configurations"].values())).get("normalization_schemes", ())
    shape = plans.get("original_median_shape_after_transp", ())
    values = {int(v) for label in dataset_json["labels"].values() for v in np.atleast_1d(label)}
    ignored = {dataset_json["labels"]["ignore"]} if "ignore" in dataset_json["labels"] else set()
    return PublicFacts(
        dimensions=2 if len(shape) == 3 and round(shape[0]) == 1 else 3,
        channels=len(dataset_json.get("channel_names", dataset_json.get("modality", {}))),
        calibrated="CTNormalization" in schemes,
        classes=len(values - {0} - ignored),
        regions=bool(PlansManager(dict(plans)).get_label_manager(dict(dataset_json)).has_regions),
    )


def _refuse_configuration(plans: dict[str, Any], configuration: str) -> None:
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise UsageRefusal(f"plans {plans['plans_name']} have no configuration {configuration}; they have: {known}")
    if PlansManager(plans).get_configuration(configuration).previous_stage_name is not None:
        raise Refusal("the cascade's second stage is not supported: it sees predictions of an earlier private model")


def _private(
    source: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    folder: Path,
    patients: Patients,
    budget: PrivacyBudget,
    compute: Compute,
    public_weights: Path | None,
    morphology_share: float = MORPHOLOGY_SHARE,
    public_start: bool = True,
    by_hand: ByHand = ByHand(),  # noqa: B008 (frozen)
) -> tuple[dict[str, Any], PrivacySection]:
    manager = PlansManager(source).get_configuration(configuration)
    architecture = manager.configuration["architecture"]
    plan = plan_configuration(
        budget,
        patients.number,
        tuple(manager.patch_size),
        architecture["arch_kwargs"]["strides"],
        lambda features: count_parameters(source, configuration, dataset_json, features),
        compute,
        tuple(round(edge) for edge in source.get("original_median_shape_after_transp", ())),
        morphology_share,
        len(classes_from(dataset_json).classes),
        matching_kinds(public_facts(source, dataset_json)) if public_start and public_weights is None else (),
        by_hand,
    )
    kept = folder / PATIENTS
    section = PrivacySection(
        budget=budget,
        patients=patients.number,
        patients_file_sha256=digest(kept) if kept.is_file() else None,
        source_plans=source["plans_name"],
        public_weights_sha256=file_sha256(public_weights) if public_weights else None,
        not_covered=NOT_COVERED,
        configurations={configuration: plan},
    )
    shrunk = {configuration: shrunk_architecture(architecture, plan.network.features_per_stage)}
    return with_section(source, source["plans_name"], section, shrunk), section


def _merge_into(
    file: Path, private: dict[str, Any], section: PrivacySection, configuration: str, overwrite: bool
) -> bool:
    """Write the private plans, keeping what the file already plans for other configurations; whether it changed."""
    if file.is_file():
        old = json.loads(file.read_text())
        before = read_section(old)
        if before is None:
            raise UsageRefusal(f"{file.name} holds plans without privacy: choose another name with -o")
        same_budget = before.model_copy(update={"configurations": {}}) == section.model_copy(
            update={"configurations": {}}
        )
        known = before.configurations.get(configuration)
        if known is not None and for_one_configuration(old, configuration) == for_one_configuration(
            private, configuration
        ):
            return False
        if not overwrite and not (same_budget and known is None):
            raise UsageRefusal(
                f"{file.name} already plans {configuration if same_budget else 'another budget'} differently: "
                "give --overwrite to replace it, or another name with -o"
            )
        if same_budget:
            for other, plan in before.configurations.items():
                if other != configuration:
                    private["configurations"][other] = old["configurations"][other]
                    private[SECTION]["configurations"][other] = plan.model_dump(mode="json")
    write_json(private, file)
    return True


def _read_plans(folder: Path, plans: str) -> dict[str, Any]:
    file = folder / f"{plans}.json"
    if not file.is_file():
        found = ", ".join(sorted(f.stem for f in folder.glob("*lans*.json"))) or "none"
        raise UsageRefusal(f"{folder.name} has no plans {plans}; found: {found}. Run nnUNetv2_plan_and_preprocess")
    content = json.loads(file.read_text())
    if read_section(content) is not None:
        raise UsageRefusal(f"{plans} are private plans already: start from the plans they were made from")
    return content


def _planned_epsilon(section: PrivacySection, configuration: str) -> float:
    plan: ConfigurationPlan = section.configurations[configuration]
    return plan.privacy_plan(section.budget, "flat", 1).epsilon


def count_parameters(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], features: tuple[int, ...]
) -> int:
    """Trainable parameters of the configuration's network with these features per stage; no memory is allocated."""
    manager = PlansManager(plans)
    configured = manager.get_configuration(configuration)
    architecture = shrunk_architecture(configured.configuration["architecture"], features)
    with torch.device("meta"):
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            determine_num_input_channels(manager, configured, dataset_json),
            manager.get_label_manager(dataset_json).num_segmentation_heads,
            allow_init=False,
            deep_supervision=True,
        )
    return sum(parameter.numel() for parameter in network.parameters())


# ---- segmentations on disk -------------------------------------------------------------------------------------------


def as_labels(segmentation: np.ndarray) -> np.ndarray:
    """Labels as whole numbers; nnU-Net's readers give them as float32.

    Raises:
        UsageRefusal: for values that are no labels.
    """
    if np.issubdtype(segmentation.dtype, np.integer):
        return segmentation
    with np.errstate(invalid="ignore"):
        labels = segmentation.astype(np.int16)
    if not np.array_equal(labels, segmentation):
        raise UsageRefusal("a segmentation should hold whole numbers below 32768, found other values: is it an image?")
    return labels


class SegmentationFiles:
    """Reads and writes label maps the way nnU-Net does, with the reader of the dataset.

    Args:
        dataset_json: of the dataset, for the file ending.
        plans: name the reader; without them it is found from the file ending.
    """

    def __init__(self, dataset_json: Mapping[str, Any], plans: Mapping[str, Any] | None = None) -> None:
        self.file_ending = dataset_json["file_ending"]
        name = (plans or {}).get("image_reader_writer") or dataset_json.get("overwrite_image_reader_writer")
        found = recursive_find_reader_writer_by_name(name) if name else None
        self._io = (found or determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False))()

    def read(self, file: Path) -> tuple[np.ndarray, tuple[float, ...], dict[str, Any]]:
        """Labels [*spatial], spacing in millimetres and what ``write`` needs to know."""
        segmentation, properties = self._io.read_seg(str(file))
        return as_labels(segmentation[0]), tuple(float(edge) for edge in properties["spacing"]), properties

    def write(self, segmentation: np.ndarray, file: Path, properties: dict[str, Any]) -> None:
        """Write labels [*spatial] with the geometry they were read with."""
        self._io.write_seg(segmentation, str(file), properties)


def input_cases(folder: Path, file_ending: str) -> list[str]:
    """Names of the cases whose images lie in a folder, in nnU-Net's order (which its ``-num_parts`` divides)."""
    return [str(case) for case in get_identifiers_from_splitted_dataset_folder(str(folder), file_ending)]


def predict(arguments: list[str]) -> None:
    """Run ``nnUNetv2_predict`` with these arguments, in this process."""
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    before = sys.argv
    sys.argv = ["nnUNetv2_predict", *arguments]
    try:
        predict_entry_point()
    finally:
        sys.argv = before


def model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """Folder of a model, whether it exists or not.

    Raises:
        UsageRefusal: when nnU-Net does not know the dataset or nnUNet_results is not set.
    """
    if not nnUNet_results.is_set():
        raise UsageRefusal("nnUNet_results is not set: export nnUNet_raw, nnUNet_preprocessed, nnUNet_results")
    try:
        return Path(get_output_folder(dataset, trainer, plans, configuration))
    except (RuntimeError, ValueError):
        raise UsageRefusal(f"nnU-Net knows no dataset {dataset!r}") from None


def configuration_spacing(plans: Mapping[str, Any], configuration: str) -> tuple[float, ...]:
    """Voxel edges of a configuration, in millimetres."""
    return tuple(float(edge) for edge in PlansManager(dict(plans)).get_configuration(configuration).spacing)


def configuration_folder(folder: Path, plans: Mapping[str, Any], configuration: str) -> Path:
    """Where a configuration's preprocessed cases lie."""
    return folder / PlansManager(dict(plans)).get_configuration(configuration).data_identifier


def common_spacing(folder: Path) -> tuple[float, ...] | None:
    """The spacing of all images, if it is one."""
    file = folder / "dataset_fingerprint.json"
    spacings: list[list[float]] = json.loads(file.read_text()).get("spacings", []) if file.is_file() else []
    if not spacings or not np.allclose(spacings, spacings[0], rtol=1e-3):
        return None
    return tuple(float(edge) for edge in spacings[0])


# ---- patches of one patient --------------------------------------------------------------------------------------


class _ChosenCases(nnUNetDataLoader):
    """nnU-Net's loader, told which cases to load instead of drawing them."""

    chosen: list[str]

    def get_indices(self) -> list[str]:
        return self.chosen


class PatchSource:
    """A patient's cases -> K patches with their targets, by nnU-Net's own cropping, oversampling and transforms.

    Foreground oversampling is a rule inside the patient: each patch tosses its own coin, from the patient's stream.

    Args:
        dataset: nnU-Net dataset holding the cases.
        patches: number K of patches.
        initial_patch_size: voxels cropped before the transforms.
        patch_size: voxels delivered.
        label_manager: nnU-Net's.
        oversample: probability that a patch is centred on foreground.
        transforms: nnU-Net's.
    """

    def __init__(
        self,
        dataset: Any,
        patches: int,
        initial_patch_size: Iterable[int],
        patch_size: Iterable[int],
        label_manager: Any,
        oversample: float,
        transforms: Any,
    ) -> None:
        self._patches = patches
        self._loader = _ChosenCases(
            dataset,
            patches,
            tuple(initial_patch_size),
            tuple(patch_size),
            label_manager,
            oversample,
            probabilistic_oversampling=True,
            transforms=transforms,
        )

    def __call__(self, cases: tuple[str, ...]) -> tuple[np.ndarray, Any]:
        """Images [K, channels, *spatial] and targets; cases are visited evenly, in an order drawn anew."""
        order = np.random.permutation(len(cases))
        self._loader.chosen = [cases[order[k % len(cases)]] for k in range(self._patches)]
        batch = self._loader.generate_train_batch()
        target = batch["target"]
        arrays = [t.numpy() for t in target] if isinstance(target, list) else target.numpy()
        return batch["data"].numpy(), arrays


# ---- flags, files, checkpoints ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallingOptions:
    """Flags of ``nnUNetv2_train`` that nnU-Net does not tell its trainers."""

    pretrained_weights: str | None = None
    val_with_best: bool = False
    disable_checkpointing: bool = False
    only_run_validation: bool = False
    num_gpus: int = 1
    from_command_line: bool = False


def calling_options() -> CallingOptions:
    """The flags of the ``run_training`` call that made this trainer, read from its stack frame."""
    frame, found, command_line = inspect.currentframe(), None, False
    while frame is not None:
        spec = frame.f_globals.get("__spec__")  # under `python -m` the module's name is __main__
        if "nnunetv2.run.run_training" in (frame.f_globals.get("__name__"), getattr(spec, "name", None)):
            if frame.f_code.co_name == "run_training":
                found = {
                    k: frame.f_locals[k] for k in inspect.signature(CallingOptions).parameters if k in frame.f_locals
                }
            command_line |= frame.f_code.co_name == "run_training_entry"
        frame = frame.f_back
    return CallingOptions(**{**(found or {}), "from_command_line": command_line})


def file_sha256(file: Path | str) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def refuse_missing(dataset_class: Any, folder: Path, cases: Iterable[str]) -> None:
    """Refuse a fold whose training and validation cases were not all preprocessed for this configuration.

    Raises:
        Refusal: saying how many are missing; their names are private.
    """
    missing = set(cases) - set(dataset_class.get_identifiers(str(folder)))
    if missing:
        raise Refusal(f"{len(missing)} cases of this fold are not in {folder.name}: run nnUNetv2_preprocess for it")


def data_digest(folder: Path, slots: Mapping[str, tuple[str, ...]], plan: ConfigurationPlan) -> str:
    """Digest of what a resumed run must find unchanged: slots, their files' names and sizes, and the plan.

    Args:
        folder: the configuration's preprocessed folder.
        slots: the training patients and their cases.
        plan: the configuration's private plan.
    """
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    mine = {case for cases in slots.values() for case in cases}
    files = {name: size for name, size in sizes.items() if name.rsplit(".", 1)[0].removesuffix("_seg") in mine}
    content = [plan.model_dump(mode="json"), {k: list(v) for k, v in slots.items()}, files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively: recent cards, processors with AMX tiles."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


_PUBLIC_IN_DATASET_JSON = (
    "name", "channel_names", "modality", "labels", "regions_class_order", "file_ending", "numTraining",
    "overwrite_image_reader_writer",
)  # fmt: skip


def public_dataset_json(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """The part of dataset.json that prediction needs; lists of training files, for one, name cases."""
    return {key: dataset_json[key] for key in _PUBLIC_IN_DATASET_JSON if key in dataset_json}


def results_folder(dataset: str) -> Path:
    """nnU-Net's results folder of a dataset."""
    return Path(str(nnUNet_results)) / dataset


def final_checkpoint(
    weights: dict[str, torch.Tensor],
    trainer: str,
    configuration: str,
    fold: int | str,
    mirroring: Any,
    run: str,
    charges: int,
    steps: int,
) -> dict[str, Any]:
    """What a finished checkpoint may hold: averaged weights and what nnU-Net needs to load them; neutral elsewhere.

    The run's name and the numbers of its charges and steps let ``nnunet-dp status`` notice a ledger that lost lines.
    """
    return {
        "network_weights": {name: tensor.cpu() for name, tensor in weights.items()},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": mirroring,
        "init_args": {"configuration": configuration, "fold": fold, "run": run, "charges": charges, "steps": steps},
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
    }
