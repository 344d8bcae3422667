"""Shapes: phantoms without an organ, for any number of dimensions, channels and classes.

Where no phantom resembles a dataset, a public start can still learn what all segmentation has in common: closed
surfaces, edges under noise, a few objects among many distractors (Billot et al. 2023 train on such images from label
maps; Dey et al. 2024 on shapes that resemble nothing in particular). A case is a field of random regions, some
distractors, and one object made of the classes in order: a bent tube cut into pieces from front to back, a set of
nested shells from outside to inside, or touching lumps in a row. Intensities are random but the same for one class
throughout a case and channel. All sizes are shares of the image: there is no anatomy to be right about.

    >>> scan = kind(dimensions=2, channels=1, classes=2).render(Patient("shapes", seed=1, index=0), 0, (32, 32))
    >>> scan.image.shape, sorted(set(scan.segmentation.ravel().tolist()))
    ((1, 32, 32), [0, 1, 2])

All numbers are round guesses.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .anatomy import (
    FloatArray,
    Kind,
    LabelArray,
    Patient,
    Scan,
    Shape,
    coordinates,
    coverage,
    displacement,
    ellipsoid,
    paint,
    pose,
    smooth_noise,
    tube,
)

DEFAULT_SHAPE = {2: (128, 128), 3: (48, 48, 48)}
SAMPLES = 24  # balls along a tube
FORMS = ("tube", "shells", "lumps")


def kind(dimensions: int, channels: int, classes: int) -> Kind:
    """The family member with these public facts: axes, image channels and foreground classes."""
    return Kind(
        name="shapes",
        title="PhantomShapes",
        description=f"Random shapes: {classes} classes, {channels} channels",
        dimensions=dimensions,
        dataset_id=307,
        channel_names=tuple(f"channel {number}" for number in range(channels)),
        labels={"background": 0, **{f"class {number}": number for number in range(1, classes + 1)}},
        file_ending=".nii.gz" if dimensions == 3 else ".png",
        smallest_shape=(24,) * dimensions,
        cases_per_patient=(1, 1),
        render=partial(_render, dimensions=dimensions, channels=channels, classes=classes),
    )


def _render(
    patient: Patient, case: int, shape: Shape | None = None, *, dimensions: int, channels: int, classes: int
) -> Scan:
    """One image; `shape` in voxels, isotropic by construction."""
    rng, size = patient.case(case), shape or DEFAULT_SHAPE[dimensions]
    voxel = 2 / min(size)  # the shorter edge runs from -1 to 1
    points = coordinates(size, voxel)
    bent = points + displacement(rng, size, voxel, 0.06, 0.5)
    segmentation = _object(rng, _posed(rng, bent, 0.25), classes)
    regions = _regions(rng, points, voxel)
    image = np.stack([_channel(rng, regions, bent, segmentation, voxel, classes) for _ in range(channels)])
    return Scan(image.astype(np.float32), segmentation, (1.0,) * dimensions)


def _posed(rng: np.random.Generator, points: FloatArray, spread: float) -> FloatArray:
    """Turned by up to some 30 degrees and moved a little: front stays front, so that classes can be told apart."""
    angles = rng.normal(0, 15, 1 if len(points) == 2 else 3).tolist()
    return pose(points, angles, rng.normal(0, spread / 2, len(points)), float(np.exp(rng.normal(0, 0.2))))


def _object(rng: np.random.Generator, points: FloatArray, classes: int) -> LabelArray:
    """Labels of the object, by its form."""
    form = FORMS[rng.integers(len(FORMS))]
    radius = rng.uniform(0.35, 0.6)
    if form == "shells":
        radii = radius * rng.uniform(0.8, 1.5, len(points))
        distance = ellipsoid(points, np.zeros(len(points)), radii) / radii.min()
        depth = np.clip(-distance, 0, 0.999)
        return np.where(distance < 0, 1 + np.floor(depth * classes), 0).astype(np.uint8)
    along = np.linspace(-1, 1, SAMPLES if form == "tube" else classes)
    centreline = np.zeros((len(along), len(points)))
    centreline[:, 0] = 0.65 * along
    centreline[:, 1] = rng.normal(0, 0.2) * (along**2 - 0.5)
    sizes = radius * rng.uniform(0.4, 0.7) * np.exp(rng.normal(0, 0.3) * along)
    if form == "lumps":
        return _nearest(points, centreline, np.full(len(along), max(0.45 * radius, 0.8 / classes)))
    inside = tube(points, centreline, sizes) < 0
    cuts = np.sort(np.linspace(-0.65, 0.65, classes + 1)[1:-1] + rng.normal(0, 0.06, classes - 1))
    return np.where(inside, 1 + np.searchsorted(cuts, points[0]), 0).astype(np.uint8)


def _nearest(points: FloatArray, centres: FloatArray, radii: FloatArray) -> LabelArray:
    """Label of the ball whose surface is nearest, inside any ball."""
    distances = np.stack([ellipsoid(points, c, np.full(len(points), r)) for c, r in zip(centres, radii, strict=True)])
    return np.where(distances.min(0) < 0, 1 + distances.argmin(0), 0).astype(np.uint8)


def _regions(rng: np.random.Generator, points: FloatArray, voxel: float) -> LabelArray:
    """Surroundings: each voxel belongs to the largest of a few smooth random fields."""
    knots = rng.uniform(0.2, 0.8)
    fields = [smooth_noise(rng, points.shape[1:], voxel, knots) for _ in range(int(rng.integers(3, 8)))]
    return np.argmax(np.stack(fields), 0).astype(np.uint8)


def _channel(
    rng: np.random.Generator,
    regions: LabelArray,
    points: FloatArray,
    segmentation: LabelArray,
    voxel: float,
    classes: int,
) -> FloatArray:
    """Intensities [*spatial] of one channel: regions, distractors, classes, texture."""
    image = rng.uniform(0, 1, int(regions.max()) + 1)[regions].astype(np.float32)
    for _ in range(int(rng.integers(0, 6))):
        centre, radii = rng.uniform(-1, 1, len(points)), rng.uniform(0.08, 0.4, len(points))
        image = paint(image, coverage(ellipsoid(points, centre, radii), voxel), rng.uniform(0, 1))
    base, spread = rng.uniform(0, 1), rng.choice([0.05, 0.3])
    values = base + rng.normal(0, spread, classes)
    for number, value in enumerate(values, start=1):
        image = np.where(segmentation == number, np.float32(value), image)
    texture = 0.05 * smooth_noise(rng, image.shape, voxel, 4 * voxel)
    return image + texture * rng.uniform(0, 2)
