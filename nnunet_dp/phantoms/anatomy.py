"""What every phantom is made of: random streams, smooth fields, signed distances, paint, and a scanner.

A phantom is drawn the way a picture is: place points in millimetres, bend them (`pose`, `displacement`),
ask each structure how far its surface is (`ellipsoid`, `tube`: negative inside), turn distance into the
fraction of the voxel that is covered (`coverage`, which *is* the partial volume), lay intensities over one
another (`paint`), then let the scanner spoil the result (`bias_field`, `blur`, `rician`). Distances stay in
millimetres, so one description serves every resolution. A new kind is one file with one function
`render(patient, case, shape) -> Scan` and one `Kind`.

    >>> import numpy as np
    >>> rng = Patient(kind="demo", seed=7, index=0).case(0)
    >>> points = coordinates((16, 16), 1.0) + displacement(rng, (16, 16), 1.0, 0.5, 6.0)
    >>> disc = coverage(ellipsoid(points, (0.0, 0.0), (5.0, 3.0)), 1.0)
    >>> disc.shape, bool(disc.max() == 1.0), bool(disc.min() == 0.0)
    ((16, 16), True, True)

Random numbers come from `Patient`: a stream per (kind, seed, patient, case), so that no patient's content
depends on how many others are drawn, or in which order.

References:
    Rueckert et al., IEEE TMI 1999 (free-form deformation by cubic B-splines).
    Gudbjartsson and Patz, MRM 1995 (Rician noise of magnitude images).
    Sled et al., IEEE TMI 1998; Vovk et al., IEEE TMI 2007 (smooth multiplicative bias field).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

FloatArray = NDArray[np.floating[Any]]
LabelArray = NDArray[np.uint8]
Shape = tuple[int, ...]

FWHM_PER_SIGMA = 2.3548200450309493  # full width at half maximum of a Gaussian, 2 sqrt(2 ln 2)
SPLINE_VARIANCE = 151 / 315  # mean over a knot interval of the sum of squared cubic B-spline weights


@dataclass(frozen=True)
class Scan:
    """One case.

    Attributes:
        image: Intensities, float32 [channels, *spatial].
        segmentation: Labels, uint8 [*spatial].
        spacing_mm: Size of a voxel along each spatial axis, millimetres.
    """

    image: FloatArray
    segmentation: LabelArray
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True)
class Patient:
    """The random streams of one patient.

    Attributes:
        kind: Name of the phantom kind; different kinds draw different numbers.
        seed: Seed of the dataset, >= 0.
        index: Number of the patient, from 0.
        held_out: Test patients have streams of their own: growing the training set never turns one into the
            other.
    """

    kind: str
    seed: int
    index: int
    held_out: bool = False

    def shared(self) -> np.random.Generator:
        """What all cases of the patient have in common; every call starts anew, with the same numbers."""
        return self._stream(0)

    def case(self, case: int) -> np.random.Generator:
        """What belongs to one case only, such as pose and noise; every call starts anew."""
        return self._stream(1, case)

    def number_of_cases(self, lowest: int, highest: int) -> int:
        """How many cases the patient has, uniform on [lowest, highest]."""
        return int(self._stream(2).integers(lowest, highest + 1))

    def _stream(self, *purpose: int) -> np.random.Generator:
        key = (zlib.crc32(self.kind.encode()), int(self.held_out), self.index, *purpose)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


Render = Callable[[Patient, int, Shape | None], Scan]


@dataclass(frozen=True)
class Kind:
    """A family of phantoms.

    Attributes:
        name: The word a user types, and the stem of the case names.
        title: Last part of the dataset's folder name, in CamelCase, without underscore.
        description: One sentence for dataset.json.
        dimensions: 3 (NIfTI) or 2 (PNG, grey or RGB).
        dataset_id: Default number of the dataset.
        channel_names: Names of the image channels, in order.
        labels: Class name -> label value, or for a region the values that it unites; 0 is background, values are
            consecutive.
        file_ending: ".nii.gz" or ".png".
        smallest_shape: Below this size, per axis, a class could vanish.
        cases_per_patient: Default (lowest, highest) number of cases a patient has.
        render: (patient, number of the case, shape or None for the realistic one) -> Scan. A pure function.
        regions_class_order: For kinds with regions: the value that nnU-Net writes for each region, later ones over
            earlier ones. None: plain classes.
    """

    name: str
    title: str
    description: str
    dimensions: int
    dataset_id: int
    channel_names: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    file_ending: str
    smallest_shape: Shape
    cases_per_patient: tuple[int, int]
    render: Render
    regions_class_order: tuple[int, ...] | None = None

    @property
    def label_values(self) -> tuple[int, ...]:
        """All values that segmentations of this kind hold, 0 included, in rising order."""
        values = (value if isinstance(value, tuple) else (value,) for value in self.labels.values())
        return tuple(sorted({one for several in values for one in several}))

    @property
    def render_module(self) -> str:
        """Name of the module whose code draws this kind."""
        return str(getattr(self.render, "func", self.render).__module__)

    @property
    def decathlon(self) -> bool:
        """Whether it is written as a Decathlon task: 3D, and no regions, which that form cannot carry."""
        return self.dimensions == 3 and self.regions_class_order is None


# ---- places --------------------------------------------------------------------------------------


def coordinates(shape: Shape, voxel_mm: float) -> FloatArray:
    """Voxel centres in millimetres about the middle of the grid, float32 [axes, *shape]."""
    axes = [(np.arange(size, dtype=np.float32) - (size - 1) / 2) * voxel_mm for size in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def pose(
    points: FloatArray, angles_degrees: Sequence[float], shift_mm: ArrayLike, scale: float = 1.0
) -> FloatArray:
    """Rigid motion and isotropic scaling of points.

    Args:
        points: Places in mm, [axes, *spatial].
        angles_degrees: One angle in 2D; three in 3D, about the axes in turn.
        shift_mm: Where the origin of the structure lies, [axes].
        scale: 1.1 draws the structure 10 % larger. Distances measured afterwards are those of the unscaled
            structure.

    Returns:
        The same points in the frame of the structure, [axes, *spatial].
    """
    moved = points - _column(np.asarray(shift_mm, dtype=np.float32), points)
    inverse = (rotation(angles_degrees).T / scale).astype(np.float32)
    return np.einsum("ij,j...->i...", inverse, moved, optimize=True)


def rotation(angles_degrees: Sequence[float]) -> NDArray[np.float64]:
    """Rotation matrix [axes, axes]: one angle in 2D, three (about the axes in turn) in 3D."""
    if len(angles_degrees) == 1:
        return _plane_rotation(2, 0, 1, angles_degrees[0])
    about_x, about_y, about_z = angles_degrees
    return (
        _plane_rotation(3, 1, 2, about_x)
        @ _plane_rotation(3, 2, 0, about_y)
        @ _plane_rotation(3, 0, 1, about_z)
    )


def smooth_noise(rng: np.random.Generator, shape: Shape, voxel_mm: float, knots_mm: float) -> FloatArray:
    """Random smooth field of mean 0 and variance 1: a uniform cubic B-spline with Gaussian control points.

    Args:
        rng: Source of randomness.
        shape: Size of the field.
        voxel_mm: Size of a voxel.
        knots_mm: Distance of the control points; bumps are about two of them wide. Kept above half a voxel.

    Returns:
        float32 [*shape].
    """
    step = max(knots_mm / voxel_mm, 0.5)
    weights = [_spline_weights(size, step, rng.random()) for size in shape]
    field = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    for w in weights:  # each axis is contracted in front and reappears at the back: the order survives
        field = np.tensordot(field, w, axes=(0, 1))
    return (field / SPLINE_VARIANCE ** (len(shape) / 2)).astype(np.float32)


def displacement(
    rng: np.random.Generator, shape: Shape, voxel_mm: float, amplitude_mm: float, knots_mm: float
) -> FloatArray:
    """Free-form deformation (Rueckert 1999): a smooth random displacement, to be added to points.

    Args:
        rng: Source of randomness.
        shape: Size of the grid.
        voxel_mm: Size of a voxel.
        amplitude_mm: Standard deviation of the displacement along each axis. Below a fifth of `knots_mm`
            the map practically never folds (Choi and Lee 2000 bound it by 0.48 of the knot distance).
        knots_mm: Distance of the control points.

    Returns:
        Displacement in mm, [axes, *shape].
    """
    return np.float32(amplitude_mm) * np.stack([smooth_noise(rng, shape, voxel_mm, knots_mm) for _ in shape])


# ---- shapes: signed distances in mm, negative inside ---------------------------------------------


def ellipsoid(points: FloatArray, centre: ArrayLike, radii: ArrayLike) -> FloatArray:
    """Signed distance to an ellipsoid (ellipse in 2D), first order in the distance from the surface.

    Args:
        points: Places in mm, [axes, *spatial].
        centre: Centre in mm, [axes].
        radii: Half axes in mm, [axes].

    Returns:
        Distance in mm, [*spatial].
    """
    half_axes = _column(np.asarray(radii, dtype=np.float32), points)
    unit = (points - _column(np.asarray(centre, dtype=np.float32), points)) / half_axes
    length = np.sqrt(np.square(unit).sum(0))
    slope = np.sqrt(np.square(unit / half_axes).sum(0))
    inside = -float(half_axes.min())  # the centre itself, where the quotient is 0 / 0
    return np.where(length > 1e-6, length * (length - 1) / np.maximum(slope, 1e-6), inside)


def tube(points: FloatArray, centreline: ArrayLike, radii: ArrayLike) -> FloatArray:
    """Signed distance to the union of balls along a curve: a bent tube whose radius may vary.

    Args:
        points: Places in mm, [axes, *spatial].
        centreline: Points of the curve in mm, [samples, axes]; closer to each other than the radius.
        radii: Radius in mm at each sample, [samples].

    Returns:
        Distance in mm, [*spatial].
    """
    centres, sizes = np.asarray(centreline, dtype=np.float32), np.asarray(radii, dtype=np.float32)
    flat = points.reshape(len(points), -1)
    squared = np.square(flat).sum(0) + np.square(centres).sum(1)[:, None] - 2 * (centres @ flat)
    distance = np.sqrt(np.maximum(squared, 0)) - sizes[:, None]
    return distance.min(0).reshape(points.shape[1:])


def coverage(distance: FloatArray, width_mm: float) -> FloatArray:
    """Fraction of each voxel inside a surface: 1 inside, 0 outside, linear over `width_mm` between."""
    return np.clip(0.5 - distance / np.float32(width_mm), 0, 1)


def paint(image: FloatArray, fraction: FloatArray, value: ArrayLike) -> FloatArray:
    """Lay `value` over `image` where `fraction` is 1, mix in between; `value` broadcasts against `image`."""
    return (image + fraction * (np.asarray(value, dtype=np.float32) - image)).astype(np.float32)


# ---- the scanner ---------------------------------------------------------------------------------


def bias_field(
    rng: np.random.Generator, shape: Shape, voxel_mm: float, strength: float, knots_mm: float = 60.0
) -> FloatArray:
    """Smooth multiplicative field whose values span 1 - strength/2 to 1 + strength/2 (Sled 1998).

    A strength of 0.2 to 0.4 is the non-uniformity of BrainWeb's "20 %" and "40 %" settings (Collins et al.
    1998).
    """
    field = smooth_noise(rng, shape, voxel_mm, knots_mm)
    middle, half_range = (field.max() + field.min()) / 2, max((field.max() - field.min()) / 2, 1e-6)
    return (1 + strength / 2 * (field - middle) / half_range).astype(np.float32)


def rician(rng: np.random.Generator, image: FloatArray, sigma: float) -> FloatArray:
    """Magnitude of the image plus complex Gaussian noise of deviation `sigma` (Gudbjartsson 1995)."""
    real, imaginary = rng.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(sigma)
    return np.hypot(image + real, imaginary)


def blur(image: FloatArray, fwhm_voxels: float) -> FloatArray:
    """Gaussian point spread function of the given full width at half maximum, along every axis."""
    return ndimage.gaussian_filter(image, fwhm_voxels / FWHM_PER_SIGMA, mode="nearest", truncate=3.0)


# ---- internals -----------------------------------------------------------------------------------


def _column(vector: NDArray[np.float32], points: FloatArray) -> NDArray[np.float32]:
    """A vector [axes] shaped to broadcast against points [axes, *spatial]."""
    return vector.reshape(-1, *([1] * (points.ndim - 1)))


def _plane_rotation(axes: int, first: int, second: int, degrees: float) -> NDArray[np.float64]:
    """Rotation in the plane of two axes."""
    matrix, angle = np.eye(axes), np.deg2rad(degrees)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def _spline_weights(size: int, step: float, phase: float) -> FloatArray:
    """Cubic B-spline weights [size, control points], a knot every `step` voxels from `phase` on."""
    position = np.arange(size) / step + phase + 1
    control = np.arange(int(position[-1]) + 3)
    away = np.abs(position[:, None] - control[None])
    near, far = (4 - 6 * away**2 + 3 * away**3) / 6, np.clip(2 - away, 0, None) ** 3 / 6
    return np.where(away < 1, near, far).astype(np.float32)
