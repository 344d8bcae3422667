"""Which phantoms resemble a dataset, by public facts alone: dataset.json and the plans' normalisation.

>>> matching_kinds(PublicFacts(dimensions=3, channels=1, calibrated=False, classes=2, regions=False))
('hippocampus',)
>>> matching_kinds(PublicFacts(dimensions=3, channels=2, calibrated=False, classes=5, regions=False))
('shapes',)

Axes, number of channels, CT or not, number of classes and whether they are regions must agree; then the classes of
phantom and dataset have the same numbers, and the output layer can start from the phantoms, too. Where nothing agrees,
``shapes`` has what every segmentation has in common.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_dp.errors import UsageRefusal

from . import KINDS, shapes
from .anatomy import Kind

SHAPES = "shapes"


@dataclass(frozen=True)
class PublicFacts:
    """What is public about a dataset's images and labels.

    Attributes:
        dimensions: axes of the images, 2 or 3.
        channels: image channels.
        calibrated: whether intensities mean something by themselves, as in CT.
        classes: foreground label values.
        regions: whether classes are unions of label values.
    """

    dimensions: int
    channels: int
    calibrated: bool
    classes: int
    regions: bool


def matching_kinds(facts: PublicFacts) -> tuple[str, ...]:
    """Names of the kinds that resemble such a dataset; ``shapes`` where none does."""
    return tuple(sorted(name for name, kind in KINDS.items() if facts_of(kind) == facts)) or (SHAPES,)


def resemble(kinds: tuple[str, ...]) -> bool:
    """Whether what was learnt from these phantoms is near the dataset's task: there are some, and not only shapes."""
    return any(name != SHAPES for name in kinds)


def facts_of(kind: Kind) -> PublicFacts:
    """The facts of a kind's own dataset."""
    return PublicFacts(
        dimensions=kind.dimensions,
        channels=len(kind.channel_names),
        calibrated="CT" in kind.channel_names,
        classes=len(kind.label_values) - 1,
        regions=kind.regions_class_order is not None,
    )


def find_kind(name: str, facts: PublicFacts) -> Kind:
    """The kind of that name, fit for a dataset with these facts.

    Raises:
        UsageRefusal: for unknown names, and kinds whose axes or channels the network could not take or whose label
            values it has no output for.
    """
    if name == SHAPES:
        return shapes.kind(facts.dimensions, facts.channels, facts.classes)
    if name not in KINDS:
        raise UsageRefusal(f"kind should be one of {', '.join(sorted((*KINDS, SHAPES)))}; found {name!r}")
    own = facts_of(KINDS[name])
    if (own.dimensions, own.channels) != (facts.dimensions, facts.channels) or own.classes > facts.classes:
        raise UsageRefusal(
            f"phantoms of kind {name} have {own.dimensions} axes, {own.channels} channels and {own.classes} classes, "
            f"the dataset {facts.dimensions}, {facts.channels} and {facts.classes}: --phantom {SHAPES} fits all"
        )
    return KINDS[name]
