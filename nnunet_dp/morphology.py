"""Refinement rules as a file: ``morphology.json`` beside the model, per class the operations in order, in millimetres.

What a rule may say is a closed list of operations; where rules came from is said in ``kind`` and ``provenance``:

============  ====================================================================================
kind          the rules came from
============  ====================================================================================
private       one noised release of the training masks, charged to the ledger (``shape_votes``)
fixed         a person or a public paper, written by hand
phantom       masks of artificial patients, without noise and free
per_image     public constants; radii follow the image's own prediction
not_private   un-noised training masks: for comparison only, never to be shared
============  ====================================================================================

A class is a set of labels: one label of ordinary datasets, several of a region (nested labels). Nothing here touches a
voxel; ``refinement.refine`` does.

>>> rule = ClassRefinement(name="lesion", labels=(1,), writes=1, operations=(KeepLargest(),))
>>> morphology = Morphology(kind="fixed", classes=(rule,))
>>> Morphology.model_validate_json(morphology.model_dump_json()) == morphology
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nnunet_dp.description import integers_of
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.replacing import replacing

FILE = "morphology.json"
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Ball(_Frozen):
    """Radius of the ball: in millimetres, or as a share of the inscribed radius of the image's own class."""

    radius_mm: _Positive | None = None
    inscribed_share: _Positive | None = None

    @model_validator(mode="after")
    def _require_one_radius(self) -> _Ball:
        if (self.radius_mm is None) == (self.inscribed_share is None):
            raise ValueError("give radius_mm or inscribed_share, and not both")
        return self


class _Remover(_Frozen):
    """What takes voxels away: ``least_kept`` of the class must survive in an image, else it is left as it is there."""

    least_kept: _Share = 0.0


class Opening(_Ball, _Remover):
    """Erosion then dilation by a ball: takes away what no ball fits into."""

    operation: Literal["opening"] = "opening"


class Closing(_Ball):
    """Dilation then erosion by a ball: fills background that no ball fits into."""

    operation: Literal["closing"] = "closing"


class FillHoles(_Frozen):
    """Fills background that the class encloses; ``largest_mm3`` (mm2 in 2D) leaves larger holes open."""

    operation: Literal["fill_holes"] = "fill_holes"
    largest_mm3: _Positive | None = None


class RemoveSmall(_Remover):
    """Removes connected components below a share of the largest one's volume, or below a volume (mm2 in 2D)."""

    operation: Literal["remove_small"] = "remove_small"
    below_share: Annotated[float, Field(gt=0, le=1)] | None = None
    below_mm3: _Positive | None = None

    @model_validator(mode="after")
    def _require_one_bound(self) -> RemoveSmall:
        if (self.below_share is None) == (self.below_mm3 is None):
            raise ValueError("give below_share or below_mm3, and not both")
        return self


class KeepLargest(_Remover):
    """Removes all connected components but the largest (all of the largest ones, where several are equal)."""

    operation: Literal["keep_largest"] = "keep_largest"


Operation = Annotated[Opening | Closing | FillHoles | RemoveSmall | KeepLargest, Field(discriminator="operation")]


class ClassRefinement(_Frozen):
    """The rules of one class.

    Attributes:
        name: as in dataset.json.
        labels: integer labels that make up the class; several for a region.
        writes: label painted where the class is (a region's entry in regions_class_order).
        operations: in order; empty leaves the class alone.
    """

    name: str
    labels: tuple[int, ...] = Field(min_length=1)
    writes: int
    operations: tuple[Operation, ...] = ()


class Morphology(_Frozen):
    """The content of ``morphology.json``.

    Attributes:
        version: of this format.
        units: lengths in millimetres, volumes in cubic (2D: square) millimetres.
        kind: where the rules came from; see the module.
        regions: whether classes are nested regions, painted one over the other in the order of ``classes``.
        ignore_label: never touched.
        classes: in the order of dataset.json (regions: of regions_class_order).
        provenance: ledger entries and released numbers, or a sentence; public.
    """

    version: Literal[1] = 1
    units: Literal["mm"] = "mm"
    kind: Literal["private", "fixed", "phantom", "per_image", "not_private"]
    regions: bool = False
    ignore_label: int | None = None
    classes: tuple[ClassRefinement, ...]
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _require_distinct_classes(self) -> Morphology:
        labels = [label for rule in self.classes for label in rule.labels]
        if not self.regions and len(labels) != len(set(labels)):
            raise ValueError("each label belongs to one class, unless regions is true")
        if 0 in labels or self.ignore_label in labels:
            raise ValueError("background and the ignore label are no classes")
        return self

    @property
    def paid_by(self) -> tuple[str, int] | None:
        """Run and sequence number of the ledger line that paid for rules learnt from masks."""
        run, sequence = self.provenance.get("ledger_run"), self.provenance.get("ledger_sequence")
        return (run, sequence) if isinstance(run, str) and isinstance(sequence, int) else None

    @property
    def free(self) -> bool:
        """Whether the rules look at no patient, so that they cost nothing and belong to no run."""
        return self.kind not in ("private", "not_private")

    def with_operations(self, operations: Sequence[tuple[Operation, ...]]) -> Morphology:
        """The same classes with other operations, one tuple for each class."""
        classes = zip(self.classes, operations, strict=True)
        return self.model_copy(
            update={"classes": tuple(rule.model_copy(update={"operations": chosen}) for rule, chosen in classes)}
        )

    def without_operations(self) -> Morphology:
        """The classes alone."""
        return self.with_operations([()] * len(self.classes)).model_copy(update={"provenance": {}})


def classes_from(dataset_json: Mapping[str, Any]) -> Morphology:
    """A dataset's classes without operations, by nnU-Net's rules for regions and the ignore label.

    Raises:
        UsageRefusal: for regions without ``regions_class_order``.
        TypeError, ValueError: for labels that are no integers.
    """
    named = {name: label for name, label in dataset_json["labels"].items() if name not in ("background", "ignore")}
    regions = any(isinstance(label, list | tuple) and len(label) > 1 for label in named.values())
    sets = [integers_of(label) for label in named.values()]
    order = [integers_of([label])[0] for label in dataset_json.get("regions_class_order", ())]
    order = order if regions else [labels[0] for labels in sets]
    if len(order) != len(sets):
        raise UsageRefusal(f"dataset.json has {len(sets)} regions and a regions_class_order of {len(order)}: mend it")
    classes = [
        ClassRefinement(name=name, labels=labels, writes=writes)
        for name, labels, writes in zip(named, sets, order, strict=True)
    ]
    ignored = dataset_json["labels"].get("ignore")
    ignore_label = None if ignored is None else integers_of(ignored)[0]
    return Morphology(kind="fixed", regions=regions, ignore_label=ignore_label, classes=tuple(classes))


def agreed(several: Sequence[Morphology]) -> Morphology:
    """The operations that all files have for a class: what folds agree on, for an ensemble of them.

    Raises:
        UsageRefusal: when they do not speak of the same classes.
    """
    first = several[0]
    if any(other.without_operations() != first.without_operations() for other in several):
        raise UsageRefusal("morphology files of different classes or kinds cannot be joined: learn each fold anew")
    rows = zip(*([rule.operations for rule in other.classes] for other in several), strict=True)
    provenance = first.provenance if len(several) == 1 else {"agreement_of": [other.provenance for other in several]}
    return first.with_operations([_common(row) for row in rows]).model_copy(update={"provenance": provenance})


def _common(lists: Sequence[tuple[Operation, ...]]) -> tuple[Operation, ...]:
    return tuple(operation for operation in lists[0] if all(operation in other for other in lists))


def read_morphology(file: Path) -> Morphology:
    """Read a ``morphology.json``.

    Raises:
        UsageRefusal: naming the fields that are not understood.
    """
    try:
        return Morphology.model_validate_json(Path(file).read_bytes())
    except FileNotFoundError:
        raise UsageRefusal(f"there is no {file}: learn one with `nnunet-dp morph learn`, or write one") from None
    except ValidationError as error:
        where = "; ".join(f"{'.'.join(map(str, part['loc'])) or 'file'}: {part['msg']}" for part in error.errors())
        raise UsageRefusal(f"{Path(file).name} is not a morphology file ({where})") from None


def write_morphology(morphology: Morphology, file: Path) -> None:
    """Write it whole or not at all."""
    with replacing(Path(file)) as stream:
        stream.write(morphology.model_dump_json(indent=2, exclude_none=True).encode() + b"\n")
