"""What prediction needs of nnU-Net's plans and dataset.json, by name and type: the whitelist of what is released.

nnU-Net's plans tell more than a prediction asks for: median shapes and spacings of the images, means and extremes of
their intensities, folders, batch sizes. Written down as a closed schema, the same text reduces them at export and
finds at ``nnunet-dp verify`` whatever else somebody put in. It also lists the classes that plans may name, because
nnU-Net imports them, whatever they are.

>>> description = {"labels": {"background": 0, "front": 1}, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
>>> reduced_description({**description, "numTraining": 12, "training": ["case_07"]}).labels
{'background': 0, 'front': 1}
>>> faults(DatasetDescription, {**description, "numTraining": 12})
('numTraining is not declared',)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from nnunet_dp.errors import Refusal

NETWORKS = tuple(
    f"dynamic_network_architectures.architectures.{kind}"
    for kind in ("unet.PlainConvUNet", "unet.ResidualEncoderUNet", "residual_unet.ResidualEncoderUNet")
)
NORMALIZATIONS = (
    "ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization",
)  # fmt: skip
READERS = (
    "SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO", "Tiff3DIO",
)  # fmt: skip
TORCH_CLASS = r"torch\.nn\.(?:modules\.(?:conv|instancenorm|activation)\.)?[A-Z][A-Za-z0-9]+"
CT = "CTNormalization"  # the one scheme that reads statistics of the training images



def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("should hold printable characters alone")
    return text


Plain = Annotated[
    str, StringConstraints(min_length=1, max_length=300, pattern=r"^[^/\\]+$"), AfterValidator(_printable)
]
"""A line of text that is no path."""
Name = Annotated[str, StringConstraints(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]
DatasetName = Annotated[str, StringConstraints(max_length=100, pattern=r"^Dataset[0-9]{3}_[A-Za-z0-9][\w.\-]*$")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Edge = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_TorchClass = Annotated[str, StringConstraints(pattern=f"^{TORCH_CLASS}$")]
_Number = Annotated[int, Field(ge=-16, le=16)] | Annotated[float, Field(ge=-16, le=16, allow_inf_nan=False)]
_Option = bool | _Number | Literal["linear", "nearest", "bilinear", "trilinear", "nearest-exact"] | None
_Options = dict[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")], _Option]
_Width = Annotated[int, Field(ge=1, le=4096)]
_Voxels = Annotated[list[_Width], Field(min_length=2, max_length=3)]
_Few = Annotated[int, Field(ge=1, le=32)]
_Convolutions = Annotated[list[_Few], Field(max_length=16)] | _Few


class Released(BaseModel):
    """A part of what is released: closed, and written in one way only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def content(self) -> bytes:
        """The one way to write it as a file."""
        return canonical_json(self.model_dump(mode="json", exclude_unset=True))


def canonical_json(content: Any) -> bytes:
    """JSON in one way: the order as given, indented by one."""
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


class NetworkArguments(Released):
    """Arguments of nnU-Net's U-Nets."""

    n_stages: Annotated[int, Field(ge=1, le=16)]
    features_per_stage: Annotated[list[_Width], Field(max_length=16)]
    conv_op: _TorchClass
    kernel_sizes: list[_Voxels]
    strides: list[_Voxels]
    n_conv_per_stage: _Convolutions | None = None
    n_blocks_per_stage: _Convolutions | None = None
    n_conv_per_stage_decoder: _Convolutions
    conv_bias: bool
    norm_op: _TorchClass | None
    norm_op_kwargs: _Options | None
    dropout_op: _TorchClass | None
    dropout_op_kwargs: _Options | None
    nonlin: _TorchClass | None
    nonlin_kwargs: _Options | None


class Architecture(Released):
    """The network: its class and arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    network_class_name: Literal[NETWORKS]  # pyright: ignore[reportInvalidTypeForm]
    arch_kwargs: NetworkArguments
    imported: list[Literal["conv_op", "norm_op", "dropout_op", "nonlin"]] = Field(alias="_kw_requires_import")


class InferenceConfiguration(Released):
    """One configuration: preprocessing, patches, network."""

    preprocessor_name: Literal["DefaultPreprocessor"]
    patch_size: _Voxels
    spacing: Annotated[list[_Edge], Field(min_length=2, max_length=3)]
    normalization_schemes: list[Literal[NORMALIZATIONS]]  # pyright: ignore[reportInvalidTypeForm]
    use_mask_for_norm: list[bool]
    resampling_fn_data: Name
    resampling_fn_data_kwargs: _Options
    resampling_fn_seg: Name
    resampling_fn_seg_kwargs: _Options
    resampling_fn_probabilities: Name
    resampling_fn_probabilities_kwargs: _Options
    architecture: Architecture


class Intensity(Released):
    """What CT normalisation reads; empty for every other scheme."""

    mean: _Finite | None = None
    std: _Finite | None = None
    percentile_00_5: _Finite | None = None
    percentile_99_5: _Finite | None = None


class InferencePlans(Released):
    """nnU-Net's plans with one configuration, for prediction alone."""

    dataset_name: DatasetName
    plans_name: Name
    configurations: dict[Name, InferenceConfiguration] = Field(min_length=1, max_length=1)
    image_reader_writer: Literal[READERS]  # pyright: ignore[reportInvalidTypeForm]
    transpose_forward: Annotated[list[Literal[0, 1, 2]], Field(min_length=2, max_length=3)]
    transpose_backward: Annotated[list[Literal[0, 1, 2]], Field(min_length=2, max_length=3)]
    label_manager: Literal["LabelManager"] = "LabelManager"
    foreground_intensity_properties_per_channel: dict[Annotated[str, StringConstraints(pattern=r"^\d+$")], Intensity]

    @property
    def content(self) -> bytes:
        """The one way to write it as a file."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_unset=True))

    @property
    def configuration(self) -> tuple[str, InferenceConfiguration]:
        """The one configuration and its name."""
        ((name, configuration),) = self.configurations.items()
        return name, configuration

    @property
    def surplus_intensities(self) -> bool:
        """Whether a channel that is not normalised as CT has statistics."""
        schemes = self.configuration[1].normalization_schemes
        known = self.foreground_intensity_properties_per_channel
        return any(
            known[channel].model_fields_set and (int(channel) >= len(schemes) or schemes[int(channel)] != CT)
            for channel in known
        )


class DatasetDescription(Released):
    """dataset.json: channels, labels and file ending, nothing about cases."""

    channel_names: dict[Annotated[str, StringConstraints(pattern=r"^\d+$")], Plain] = Field(min_length=1)
    labels: dict[Plain, int | Annotated[list[int], Field(min_length=1)]]
    regions_class_order: list[int] | None = None
    file_ending: Annotated[str, StringConstraints(pattern=r"^(\.[A-Za-z0-9]{1,8}){1,2}$")]
    overwrite_image_reader_writer: Literal[READERS] | None = None  # pyright: ignore[reportInvalidTypeForm]


# ---- reducing ----------------------------------------------------------------------------------------------------


def reduced_plans(
    plans: Mapping[str, Any], configuration: str, resolved: Mapping[str, Any], name: str, dataset: str
) -> InferencePlans:
    """Plans with nothing but what prediction with one configuration needs.

    Args:
        plans: nnU-Net's.
        configuration: its name.
        resolved: the configuration, with what it inherits.
        name: of the new plans.
        dataset: DatasetXXX_Name.

    Raises:
        Refusal: for plans that nnU-Net's own planners do not write.
    """
    known = plans.get("foreground_intensity_properties_per_channel", {})
    schemes = resolved["normalization_schemes"]
    statistics = tuple(Intensity.model_fields)
    intensities = {
        str(channel): {key: known[str(channel)][key] for key in statistics} if scheme == CT else {}
        for channel, scheme in enumerate(schemes)
    }
    own = {key: resolved[key] for key in InferenceConfiguration.model_fields if key in resolved}
    kept = {key: plans[key] for key in InferencePlans.model_fields if key in plans}
    chosen = {"dataset_name": dataset, "plans_name": name, "configurations": {configuration: own}}
    statistics_of = {"foreground_intensity_properties_per_channel": intensities}
    return _valid(InferencePlans, {**kept, **chosen, **statistics_of}, "the plans")


def reduced_description(dataset_json: Mapping[str, Any]) -> DatasetDescription:
    """dataset.json with nothing but what prediction needs.

    Raises:
        Refusal: for a description that nnU-Net does not know.
    """
    named = {"channel_names": dataset_json["modality"]} if "modality" in dataset_json else {}
    kept = {key: dataset_json[key] for key in DatasetDescription.model_fields if key in dataset_json}
    return _valid(DatasetDescription, {**named, **kept}, "dataset.json")


def _valid(kind: Any, content: Mapping[str, Any], what: str) -> Any:
    wrong = faults(kind, json.loads(json.dumps(content)))
    if wrong:
        raise Refusal(f"{what} should be what nnU-Net's own planners write, to be released; found: {'; '.join(wrong)}")
    return kind.model_validate(json.loads(json.dumps(content)))


def faults(kind: type[BaseModel], content: Any) -> tuple[str, ...]:
    """What a closed schema does not know in some JSON, in words; none where it is known whole."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        return tuple(dict.fromkeys(_fault(part) for part in error.errors()))
    return ()


def _fault(part: Any) -> str:
    where = ".".join(map(str, part["loc"])) or "the whole"
    return f"{where} is not declared" if part["type"] == "extra_forbidden" else f"{where}: {part['msg']}"
