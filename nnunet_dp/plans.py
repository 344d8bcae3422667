"""nnU-Net's plans with a ``differential_privacy`` section: reading, shrinking, writing.

A private plan is an ordinary plans file: the same preprocessing (``data_identifier`` unchanged, so nothing is
preprocessed twice), a smaller network, and one more section (``sections.PrivacySection``). The predictor rebuilds the
network from it without knowing about privacy.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.replacing import replacing
from nnunet_dp.sections import ConfigurationPlan, PrivacySection, as_first_written

SECTION = "differential_privacy"
_PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
_KNOWN_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")


def read_section(plans: dict[str, Any]) -> PrivacySection | None:
    """The plans' privacy section, or None for ordinary plans.

    Raises:
        Refusal: for a section that this version does not understand.
    """
    if SECTION not in plans:
        return None
    try:
        return PrivacySection.model_validate(plans[SECTION])
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise Refusal(
            f"the plans' {SECTION} section is not one this version of nnunet_dp writes (fields: {fields}): "
            "make it again with `nnunet-dp plan ... --overwrite`"
        ) from None


def read_private_plans(folder: Path, name: str) -> tuple[dict[str, Any], PrivacySection]:
    """Private plans of a preprocessed dataset, and their section.

    Raises:
        UsageRefusal: where there are none of that name, or they are ordinary ones.
        Refusal: for a section that this version does not understand.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        raise UsageRefusal(f"{folder.name} has no plans {name}: make them with `nnunet-dp plan`")
    plans = read_json(file)
    section = read_section(plans)
    if section is None:
        raise UsageRefusal(f"{name} are plans without privacy: make private ones with `nnunet-dp plan`")
    return plans, section


def plans_name(source: str, epsilon: float) -> str:
    """Name of the private plans: nnUNetPlans and 8 give nnUNetPlansDP_eps8."""
    return f"{source}DP_eps{epsilon:g}"


def shrunk_architecture(architecture: dict[str, Any], features: tuple[int, ...]) -> dict[str, Any]:
    """The architecture entry of a configuration, cut to the first stages and narrowed.

    Args:
        architecture: nnU-Net's entry (``network_class_name``, ``arch_kwargs``, ``_kw_requires_import``).
        features: features of each stage to keep.

    Raises:
        Refusal: for a network class that is not known to be safe and shrinkable.
    """
    name = architecture["network_class_name"].rsplit(".", 1)[-1]
    if name not in _KNOWN_NETWORKS:
        raise Refusal(f"network {name} is not supported; expected one of {', '.join(_KNOWN_NETWORKS)}")
    smaller = copy.deepcopy(architecture)
    arguments, depth = smaller["arch_kwargs"], len(features)
    for key in _PER_STAGE:
        if key in arguments:
            arguments[key] = list(arguments[key])[:depth]
    arguments["n_conv_per_stage_decoder"] = list(arguments["n_conv_per_stage_decoder"])[: depth - 1]
    arguments["n_stages"] = depth
    arguments["features_per_stage"] = list(features)
    return smaller


def with_section(
    plans: dict[str, Any], name: str, section: PrivacySection, architectures: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """A copy of the plans under a new name, with the section and the shrunk architectures in place."""
    private = copy.deepcopy(plans)
    private["plans_name"] = name
    for configuration, architecture in architectures.items():
        private["configurations"][configuration]["architecture"] = architecture
    private[SECTION] = section.model_dump(mode="json")
    return private


def for_one_configuration(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """What one configuration's model depends on: the plans without the other configurations."""
    one = copy.deepcopy(plans)
    one["configurations"] = {configuration: one["configurations"][configuration]}
    if SECTION in one:
        planned = one[SECTION]["configurations"].get(configuration)
        one[SECTION]["configurations"] = {configuration: as_first_written(planned) if planned else planned}
    return json.loads(json.dumps(without_patients_digest(one)))


def without_patients_digest(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans as they may lie beside a model: the unsalted digest would confirm a guessed list of patients."""
    shared = copy.deepcopy(plans)
    if SECTION in shared:
        shared[SECTION]["patients_file_sha256"] = None
    return shared


def configuration_plan(section: PrivacySection, configuration: str) -> ConfigurationPlan:
    """The section's plan of one configuration.

    Raises:
        UsageRefusal: when it was not planned, with the command that plans it.
    """
    if configuration not in section.configurations:
        raise UsageRefusal(
            f"these plans hold no private schedule for {configuration} (only {', '.join(section.configurations)}): "
            f"add it with `nnunet-dp plan -c {configuration} ...` and the same budget"
        )
    return section.configurations[configuration]


def json_sha256(content: Any) -> str:
    """SHA-256 of a value's JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(file: Path) -> Any:
    """The content of a JSON file that nnU-Net or this package wrote.

    Raises:
        UsageRefusal: when it cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise UsageRefusal(f"{file} should be readable, found: {error.strerror or error}: put it back") from None
    except (ValueError, RecursionError):
        raise UsageRefusal(
            f"{file} should hold JSON, found something else: put it back from a backup, or let the command that wrote "
            "it write it again"
        ) from None


def read_plans(file: Path) -> dict[str, Any]:
    """A file of plans, private or not.

    Raises:
        UsageRefusal: when it cannot be read, is not JSON, or does not name its dataset and configurations.
    """
    plans = read_json(file)
    expected = {"dataset_name": str, "configurations": dict}
    if not isinstance(plans, dict) or not all(isinstance(plans.get(key), kind) for key, kind in expected.items()):
        raise UsageRefusal(
            f"{file} should be plans with {' and '.join(expected)}, found something else: put it back from a backup, "
            "or plan again"
        )
    return plans


def write_json(content: Any, file: Path) -> None:
    """Write JSON whole or not at all."""
    with replacing(file) as stream:
        stream.write(json.dumps(content, indent=4).encode())
