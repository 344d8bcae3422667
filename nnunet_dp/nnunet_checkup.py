"""A dataset's checkup: data, patients, split, plans, network, memory and ledger, by the rules that a training will use.

Every check calls what the training calls (``nnunet``, ``nnunet_cases``, ``admission``, ``run``), in the variant that
writes nothing. A check that needs what an earlier one did not find is left out: mend the first problem first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dp import nnunet
from nnunet_dp.admission import refuse_coupling
from nnunet_dp.checkup import LEAST_FREE_BYTES, Finding, disk, examined, in_words, write_into
from nnunet_dp.description import channels, known_labels, read_description
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.raw_dataset import CaseFiles, case_files, raw_folder
from nnunet_dp.forecast import BYTES_PER_PARAMETER, available_memory_bytes, measure
from nnunet_dp.ledger import TornLineWarning, read_ledger
from nnunet_dp.nnunet_cases import CaseReader, describe_faults
from nnunet_dp.nnunet_planning import build_network
from nnunet_dp.nnunet_start import planned_network
from nnunet_dp.patients import Patients
from nnunet_dp.plans import read_json, read_section
from nnunet_dp.run import LEDGER, RunFolder
from nnunet_dp.sections import PrivacySection
from nnunet_dp.torn_images import refuse_torn

CHECKPOINTS = 3  # on disk at once: the finished one, the newest and the one that replaces it
BYTES_PER_CHARGE = 1024  # a line is some 700 bytes long, and lies in two places


@dataclass(frozen=True)
class DatasetCheckup:
    """What is asked about.

    Attributes:
        dataset: id or name.
        configuration: nnU-Net's; None leaves out what depends on it.
        plans_name: of plans in the preprocessed folder.
        cases: raw and preprocessed ones that are opened, from the first.
    """

    dataset: str
    configuration: str | None = None
    plans_name: str = "nnUNetPlans"
    cases: int = 3

    def findings(self) -> tuple[Finding, ...]:
        """All findings, the independent ones first."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TornLineWarning)  # told once, by the ledger's finding
            return tuple(self._findings())

    def _findings(self) -> Iterator[Finding]:
        again = f"nnUNetv2_plan_and_preprocess -d {self.dataset} --verify_dataset_integrity"
        yield examined("raw dataset", self._raw, f"mend the raw dataset, then {again}")
        prepared = examined("preprocessed dataset", self._prepared, again)
        yield prepared
        if not prepared.ok:
            return
        remedy = "mend patients.csv in the raw dataset folder: a header case,patient and a row for each case"
        patients = examined("patients", self._patients, remedy)
        yield patients
        if patients.ok:
            yield examined("split", self._split, "delete splits_final.json, so that it is made by patient, or mend it")
        yield examined("ledger", self._ledger, "put privacy_ledger.jsonl back from a backup")
        yield examined("dataset's folders", self._writable, f"give yourself the right to write to {self.folder.name}")
        planning = f"nnunet-dp plan -d {self.dataset} -c {self.configuration or 'CONFIGURATION'} --epsilon 8"
        plans = examined("plans", self._plans, f"{planning}, and name its plans with -p")
        yield plans
        if plans.ok and self.configuration is not None:
            yield from self._configured(self.configuration, planning)

    def _configured(self, configuration: str, planning: str) -> Iterator[Finding]:
        """What depends on the configuration."""
        preprocess = f"nnUNetv2_preprocess -d {self.dataset} -c {configuration}"
        yield examined("preprocessed cases", lambda: self._cases(configuration), preprocess)
        norms = "take nnU-Net's U-Nets with InstanceNorm: nnUNetv2_plan_experiment, then plan again"
        network = examined("network", lambda: self._network(configuration), norms)
        yield network
        yield examined("batch dice", lambda: self._batch_dice(configuration), planning)
        section = read_section(self._content())
        if section is None or not network.ok:
            return
        yield examined("memory", partial(self._memory, configuration), f"{planning} with a smaller network")
        yield from self._disk(configuration, section)

    # ---- data ----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The preprocessed one."""
        return nnunet.preprocessed_folder(self.dataset)

    def _raw(self) -> str:
        folder = raw_folder(self.dataset)
        description = read_description(folder / "dataset.json")
        files = case_files(folder, description)
        if not files:
            raise UsageRefusal(f"{folder.name} should hold cases in imagesTr and labelsTr, found none")
        reader = determine_reader_writer_from_dataset_json(description, verbose=False)()
        opened = sorted(files)[: self.cases]
        bad = [number for number, case in enumerate(opened, 1) if not _readable(reader, files[case], description)]
        if bad:
            raise Refusal(
                f"{len(bad)} of {len(opened)} opened cases are unreadable, have NaN or unknown labels, or labels of "
                f"another shape: in the order of their names no. {', '.join(map(str, bad))}"
            )
        return f"{folder.name}, {len(files)} cases, {len(opened)} opened"

    def _prepared(self) -> str:
        folder = self.folder
        return f"{folder.name}, {len(nnunet.dataset_cases(folder))} cases"

    def _known_patients(self) -> Patients:
        return nnunet.known_patients(self.folder)[0]

    def _patients(self) -> str:
        patients = self._known_patients()
        cases = len(patients.case_to_patient)
        if patients.unit == "case":
            return f"no patients.csv: the unit is the case ({cases}); add case,patient rows where people have several"
        return f"{patients.number} units ({patients.unit}) with {cases} cases, each case covered"

    def _split(self) -> str:
        folder = self.folder
        splits = nnunet.known_splits(folder, self._known_patients())
        made = "there" if (folder / nnunet.SPLITS).is_file() else "to be made"
        return f"{len(splits)} folds by {self._known_patients().unit}, {made}"

    # ---- plans, network, memory ----------------------------------------------------------------------------------

    def _content(self) -> dict[str, Any]:
        return read_json(self.folder / f"{self.plans_name}.json")

    def _plans(self) -> str:
        plans = self._content()
        section = read_section(plans)
        known = list(plans["configurations"])
        if self.configuration is not None and self.configuration not in known:
            raise UsageRefusal(f"{self.plans_name} have no configuration {self.configuration}, only {', '.join(known)}")
        if section is None:
            return f"{self.plans_name}: ordinary ones; a private trainer plans to epsilon 8 by itself"
        nnunet.patients_of_plan(self.folder, section)
        budget = section.budget
        if self.configuration is not None and self.configuration not in section.configurations:
            raise UsageRefusal(f"{self.plans_name} hold no private schedule for {self.configuration}")
        for planned in section.configurations.values():
            planned.privacy_plan(budget, "flat", 1).verify()
            nnunet.refuse_unpaid_fingerprint(self.folder / LEDGER, planned)
        return f"{self.plans_name}: epsilon {budget.epsilon:g} at delta {budget.delta:g} per {budget.unit}"

    def _cases(self, configuration: str) -> str:
        folder, plans = self.folder, self._content()
        description, data = read_description(folder / "dataset.json"), nnunet.configuration_folder(
            folder, plans, configuration
        )  # fmt: skip
        if not data.is_dir():
            raise Refusal(f"there is no {data.name}: this configuration was not preprocessed")
        dataset_class: Any = infer_dataset_class(str(data))
        names = nnunet.dataset_cases(folder)
        nnunet.refuse_missing(dataset_class, data, names)
        reader = CaseReader(dataset_class, data, folder / "gt_segmentations", description, plans)
        faults = {case: fault for case in names[: self.cases] if (fault := reader.fault(case))}
        if faults:
            raise Refusal(describe_faults(reader, faults, len(names)))
        return f"{len(names)} in {data.name}, {min(self.cases, len(names))} read whole (a training reads all first)"

    def _network(self, configuration: str) -> str:
        plans, description = self._content(), read_description(self.folder / "dataset.json")
        planned = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
        with torch.device("meta"):
            network = build_network(plans, configuration, description, planned, False)
        refuse_coupling(network)
        kinds = sorted({type(module).__name__ for module in network.modules() if "Norm" in type(module).__name__})
        norms = [kind for kind in kinds if kind.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))]
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return f"{', '.join(norms) or 'no norm'}, {parameters:,} parameters; no layer couples patients"

    def _batch_dice(self, configuration: str) -> str:
        asked = PlansManager(self._content()).get_configuration(configuration).batch_dice
        return "on in the plans; the trainers switch it off" if asked else "off"

    def _memory(self, configuration: str) -> str:
        plans, description = self._content(), read_description(self.folder / "dataset.json")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        patch = PlansManager(plans).get_configuration(configuration).patch_size
        network = planned_network(plans, configuration, description)
        section = read_section(plans)
        assert section is not None
        patches = section.configurations[configuration].patches_per_patient
        shape = (channels(description), *patch)
        found = measure(network, shape, device, partial(nnunet.autocast, device))
        parameters = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in network.parameters())
        needed = parameters + patches * (found.memory_bytes - parameters)
        available = available_memory_bytes(device)
        said = f"about {in_words(needed)} needed for one patient's patches on {device}, {in_words(available)} available"
        if needed > available:
            raise Refusal(said)
        return said

    def _disk(self, configuration: str, section: PrivacySection) -> Iterator[Finding]:
        planned = section.configurations[configuration]
        weights = CHECKPOINTS * BYTES_PER_PARAMETER * planned.network.parameters
        charges = BYTES_PER_CHARGE * (planned.steps + 1)
        yield disk("results", LEAST_FREE_BYTES + weights + charges)

    # ---- ledger --------------------------------------------------------------------------------------------------

    def _ledger(self) -> str:
        folder = self.folder
        results = nnunet.results_folder(folder.name)
        with warnings.catch_warnings(record=True) as torn:
            warnings.simplefilter("always", TornLineWarning)
            RunFolder(results / "doctor" / "fold_0", folder / LEDGER, results).verify_ledger()
            entries = read_ledger(folder / LEDGER) if (folder / LEDGER).is_file() else ()
        if not entries:
            return "none yet: nothing was charged on this dataset"
        note = "; its last line is torn by a crash, the next training sets it aside" if torn else ""
        return f"{len(entries)} lines, the chain holds{note}; `nnunet-dp status FOLD_FOLDER` tells what is left"

    def _writable(self) -> str:
        """Where ledger, states and models lie; a training would stop there before its first step."""
        folders = {"preprocessed": self.folder, "results": nnunet.results_folder(self.folder.name)}
        there = {part: folder for part, folder in folders.items() if folder.is_dir()}
        for folder in there.values():
            write_into(folder)
        return f"{' and '.join(there)}, writable"


def _readable(reader: Any, files: CaseFiles, description: dict[str, Any]) -> bool:
    """Whether nnU-Net's reader reads image and labels, and they fit."""
    try:
        for file in (*files.images, files.labels):
            refuse_torn(file)
        image, _ = reader.read_images([str(file) for file in files.images])
        labels, _ = reader.read_seg(str(files.labels))
    except Exception:  # whatever a reader raises; its message names the file
        return False
    known = np.isin(labels, sorted(known_labels(description))).all()
    same = image.shape[1:] == labels.shape[1:] and image.shape[0] == channels(description)
    return bool(same and known and np.isfinite(image).all())
