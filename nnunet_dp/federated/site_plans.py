"""Plans at a site: which ones it lets in, and the private section that it writes itself.

What is let in is a closed list, because plans name classes to import and folders to write.

nnU-Net trusts its plans: ``network_class_name`` is imported, whatever it is, and called; the preprocessor deletes the
folder that ``data_identifier`` names. From a coordinator that is one step from running its code on the hospital's
machine. So a site copies what it knows, by name and type, and refuses the rest.

>>> admit({"plans_name": "../../etc"}, "2d", "Dataset301_Liver", "mine")
Traceback (most recent call last):
nnunet_dp.errors.Refusal: the coordinator's plans should be nnU-Net's own for its U-Nets, found another plans_name

The section is the site's: the coordinator asks for steps and an epsilon, the site calibrates its own noise to its own
delta, and trains by what it wrote.

Formal guarantee:
    What nnU-Net does with admitted plans imports only classes of ``torch.nn``, of nnU-Net and of its U-Nets, and
    writes only below the folder that the site chose. All planned releases of a private section cost at most the terms'
    epsilon at the smaller of the terms' and the site's delta.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.errors import Refusal
from nnunet_dp.federated.local import first_rule, private_plan
from nnunet_dp.federated.protocol import Terms
from nnunet_dp.federated.site_store import may_name_a_folder
from nnunet_dp.planning import patches_per_patient
from nnunet_dp.plans import with_section
from nnunet_dp.sections import NOT_COVERED, ConfigurationPlan, FingerprintPlan, NetworkPlan, PrivacySection, RulePlan

_TORCH = re.compile(r"torch\.nn\.(?:modules\.(?:conv|instancenorm|activation)\.)?[A-Z][A-Za-z0-9]+")
_NETWORKS = tuple(
    f"dynamic_network_architectures.architectures.{kind}"
    for kind in ("unet.PlainConvUNet", "unet.ResidualEncoderUNet", "residual_unet.ResidualEncoderUNet")
)
_UNUSED = 1.0  # noise multiplier in the plan of a run that has no noise
_IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")
_KNOWN_ARGUMENTS = frozenset((
    "n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage",
    "n_conv_per_stage_decoder", "conv_bias", "norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs", *_IMPORTED,
))  # fmt: skip
_RESAMPLING = {  # nnU-Net's own, to the letter: an option that fails only on some image would tell of that image
    what: {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
}
_SPACING_MM = (0.01, 100.0)
_NORMALIZATION = (
    "ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization",
)  # fmt: skip
_READERS = (
    "SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO", "Tiff3DIO",
)  # fmt: skip
_CONFIGURATION = frozenset((
    "data_identifier", "preprocessor_name", "batch_size", "patch_size", "median_image_size_in_voxels", "spacing",
    "normalization_schemes", "use_mask_for_norm", "batch_dice", "architecture", "next_stage",
    *(f"resampling_fn_{what}{end}" for what in ("data", "seg", "probabilities") for end in ("", "_kwargs")),
))  # fmt: skip
_PLANS = (
    "original_median_spacing_after_transp", "original_median_shape_after_transp", "image_reader_writer",
    "transpose_forward", "transpose_backward", "experiment_planner_used", "label_manager",
    "foreground_intensity_properties_per_channel",
)  # fmt: skip


def admit(plans: Mapping[str, Any], configuration: str, dataset: str, data_identifier: str) -> dict[str, Any]:
    """The plans of one configuration as this site will use them: known keys only, its own dataset and folder.

    Args:
        plans: from the coordinator.
        configuration: nnU-Net's name.
        dataset: the site's own, DatasetXXX_Name.
        data_identifier: folder for the preprocessed cases, named by the site.

    Raises:
        Refusal: naming what is not admitted.
    """
    _require(may_name_a_folder(plans.get("plans_name")), "plans_name")
    _require(may_name_a_folder(configuration), "configuration")
    configurations = plans.get("configurations")
    found = configurations.get(configuration) if isinstance(configurations, dict) else None
    if not isinstance(found, dict):
        raise Refusal(f"the coordinator's plans should hold the configuration {configuration}, found none")
    _require_kinds(plans, found)
    admitted = {key: copy.deepcopy(plans[key]) for key in _PLANS if key in plans}
    own = {**copy.deepcopy(found), "data_identifier": data_identifier, "batch_dice": False}
    own.pop("next_stage", None)
    named_here = {"dataset_name": dataset, "plans_name": plans["plans_name"]}
    return {**named_here, **admitted, "configurations": {configuration: own}}


def _require_kinds(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    for key in set(configuration) - _CONFIGURATION:
        raise Refusal(f"the coordinator's plans should hold only what this version knows, found {key!r:.60}")
    _require(plans.get("image_reader_writer") in _READERS, "image_reader_writer")
    _require(plans.get("label_manager", "LabelManager") == "LabelManager", "label_manager")
    _require(configuration.get("preprocessor_name") == "DefaultPreprocessor", "preprocessor_name")
    schemes = configuration.get("normalization_schemes")
    _require(isinstance(schemes, list) and all(scheme in _NORMALIZATION for scheme in schemes), "normalization_schemes")
    for what, options in _RESAMPLING.items():
        _require(configuration.get(f"resampling_fn_{what}") == "resample_data_or_seg_to_shape", f"resampling_fn_{what}")
        _require(configuration.get(f"resampling_fn_{what}_kwargs") == options, f"resampling_fn_{what}_kwargs")
    spacing = configuration.get("spacing")
    _require(isinstance(spacing, list) and all(map(_is_spacing, spacing)), "spacing")
    _require_architecture(configuration.get("architecture"))


def _require_architecture(architecture: Any) -> None:
    _require(isinstance(architecture, dict), "architecture")
    _require(architecture.get("network_class_name") in _NETWORKS, "architecture.network_class_name")
    arguments, imported = architecture.get("arch_kwargs"), architecture.get("_kw_requires_import")
    _require(isinstance(arguments, dict) and set(arguments) <= _KNOWN_ARGUMENTS, "architecture.arch_kwargs")
    _require(isinstance(imported, list) and set(imported) <= set(_IMPORTED), "architecture._kw_requires_import")
    for key in _IMPORTED:
        value = arguments.get(key)
        _require(value is None or _TORCH.fullmatch(str(value)) is not None, f"arch_kwargs.{key}")


def _is_spacing(edge: Any) -> bool:
    return type(edge) in (int, float) and _SPACING_MM[0] <= edge <= _SPACING_MM[1]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Refusal(f"the coordinator's plans should be nnU-Net's own for its U-Nets, found another {what}")


# ---- the site's own section --------------------------------------------------------------------------------------


def private_plans(
    plans: dict[str, Any],
    terms: Terms,
    budget: PrivacyBudget,
    patients: int,
    patients_sha256: str | None,
    parameters: int,
    fingerprint: FingerprintPlan | None = None,
) -> dict[str, Any]:
    """Admitted plans with this site's private section.

    Args:
        plans: as admitted.
        terms: of the run.
        budget: the site's own target.
        patients: units in the whole dataset, all of which train.
        patients_sha256: of the canonical table of units, if there is one.
        parameters: trainable ones of the planned network.
        fingerprint: what the run was charged for it.
    """
    architecture = plans["configurations"][terms.configuration]["architecture"]
    planned = configuration_plan(plans, terms, budget, patients, parameters, fingerprint)
    section = PrivacySection(
        budget=budget,
        patients=patients,
        patients_file_sha256=patients_sha256,
        source_plans=plans["plans_name"],
        not_covered=(*NOT_COVERED, "charges_for_the_same_patient_at_other_sites"),
        configurations={terms.configuration: planned},
    )
    return with_section(plans, plans["plans_name"], section, {terms.configuration: architecture})


def configuration_plan(
    plans: Mapping[str, Any], terms: Terms, budget: PrivacyBudget, patients: int, parameters: int,
    fingerprint: FingerprintPlan | None = None,
) -> ConfigurationPlan:
    """The schedule that the terms ask for, with noise calibrated to the budget (``local.private_plan``)."""
    configured = plans["configurations"][terms.configuration]
    median = tuple(round(edge) for edge in plans.get("original_median_shape_after_transp", ()))
    features = configured["architecture"]["arch_kwargs"]["features_per_stage"]
    paid = (fingerprint.charge,) if fingerprint else ()
    constants = {key: value for key, value in asdict(first_rule(terms)).items() if isinstance(value, float)}
    return ConfigurationPlan(
        steps=terms.steps,
        sampling_probability=terms.sampling_probability,
        noise_multiplier=private_plan(terms, patients, budget, paid).noise_multiplier or _UNUSED,
        patches_per_patient=patches_per_patient(tuple(configured["patch_size"]), median),
        augmentation="none",
        average_share=0.1,
        momentum=terms.momentum,
        decay_power=terms.decay_power,
        network=NetworkPlan(features_per_stage=tuple(features), parameters=parameters),
        compute="full",
        clip_rules={terms.rule: RulePlan(constants=constants, learning_rate=terms.learning_rate)},
        fingerprint=fingerprint,
    )
