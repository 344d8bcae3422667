"""Phantom of the hippocampus in T1-weighted MRI: two touching classes, `Anterior` and `Posterior`, at 1 mm.

A curved tapered tube (thick head in front, thin tail behind) lies among structures that look like it
(amygdala, parahippocampal and other cortex: the same grey matter) and structures that frame it (temporal
horn and cisterns: dark fluid; alveus, temporal stem, midbrain: bright white matter). A slightly tilted,
jittered plane cuts head from body and tail. Both hemispheres of a patient share the anatomy and differ as
hemispheres do; both are stored in the orientation of a left one (the right one mirrored), as is usual for
single hippocampi. Axes: x to the midline, y forward, z up.

Where the numbers come from. The figures listed here are published ones, and none is fitted to a dataset
that this package is evaluated on. The layout of the neighbours is drawn by hand after atlases. Slices of
real scans were looked at beside slices of phantoms, to find what was absurd (fluid too black, sulci too
wide).

- volume 3.4 +- 0.45 ml: manual segmentation by the harmonised protocol gives 2.5 to 4 ml (Frisoni et al.
  2015; Boccardi et al. 2015), automatic ones 3 to 4.5 ml (Nobis et al. 2019); the hemispheres differ by
  some per cent (Pedraza et al. 2004).
- crops of 35 x 50 x 36 voxels: the median shape of the Decathlon's task (Isensee et al. 2021).
- length 38 to 45 mm, tilt 20 to 35 degrees, head twice as thick as the tail, wider than high: Duvernoy, The
  Human Hippocampus, 2005.
- the head is cut at the uncal apex and is 35 to 45 % of the length, about half of the volume: Poppenk et
  al. 2013.
- tissue intensities follow from relaxation: T1 of 832 (white matter) and 1331 ms (grey matter) at 3 T,
  Wansapura et al. 1999, about 4000 ms for fluid; proton densities 0.70, 0.82, 1; inversion and repetition
  times of common MPRAGE protocols (Jack et al. 2008). Hence white matter > grey matter > fluid at every
  site. The readout train is neglected.
- bias field 20 to 40 % (Sled 1998; Vovk 2007) over the head, thus less over a crop; Rician noise
  (Gudbjartsson 1995) of 2 to 5 % of white matter, the middle of BrainWeb's 1 to 9 % (Collins et al. 1998).
- sulci 10 to 15 mm apart with a ribbon of 2 to 4 mm: Fischl and Dale 2000.

    >>> scan = KIND.render(Patient(kind="hippocampus", seed=1, index=0), 0, (20, 24, 20))
    >>> scan.image.shape, sorted(set(scan.segmentation.ravel().tolist()))
    ((1, 20, 24, 20), [0, 1, 2])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .anatomy import (
    FloatArray,
    Kind,
    LabelArray,
    Patient,
    Scan,
    Shape,
    bias_field,
    blur,
    coordinates,
    coverage,
    displacement,
    ellipsoid,
    paint,
    pose,
    rician,
    smooth_noise,
    tube,
)

TEMPLATE_SHAPE = (35, 50, 36)  # voxels of 1 mm: a hippocampus with a margin of about 6 mm
SHAPE_JITTER = (3, 5, 4)
SPACING_MM = (1.0, 1.0, 1.0)
ANTERIOR, POSTERIOR = 1, 2
SAMPLES = 18  # balls along the centreline: 2.4 mm apart, less than the smallest radius
CROSS_SECTION = np.array([1.4, 1.0, 0.75], dtype=np.float32)  # wider than high (Duvernoy 2005)
END_BALLS_MM = 8.0  # the balls at both ends of the centreline lengthen the tube by their radii
T1_MS = {"white": 832.0, "grey": 1331.0, "fluid": 4000.0}  # Wansapura et al. 1999, 3 T
PROTON_DENSITY = {"white": 0.70, "grey": 0.82, "fluid": 1.0}


@dataclass(frozen=True)
class Site:
    """One scanner: inversion and repetition time, resolution, noise (fraction of white matter), gain."""

    inversion_ms: float
    repetition_ms: float
    fwhm_voxels: float
    noise: float
    gain: float


SITES = (
    Site(inversion_ms=900, repetition_ms=2300, fwhm_voxels=0.9, noise=0.025, gain=400),
    Site(inversion_ms=1000, repetition_ms=2400, fwhm_voxels=1.2, noise=0.035, gain=900),
    Site(inversion_ms=1100, repetition_ms=2530, fwhm_voxels=1.0, noise=0.045, gain=180),
)


@dataclass(frozen=True)
class Anatomy:
    """What the two hemispheres of a patient share; lengths in mm, angles in degrees."""

    volume_mm3: float
    length_mm: float
    pitch_degrees: float
    yaw_degrees: float
    sag_mm: float
    tail_curl_mm: float
    uncus_mm: float
    head_to_tail: float
    cut: float
    horn_mm: float
    cistern_mm: float


def render(patient: Patient, case: int, shape: Shape | None = None) -> Scan:
    """One hemisphere.

    Args:
        patient: Whose.
        case: 0 is the left, 1 the right hemisphere (stored mirrored), more are further visits.
        shape: Voxels along x, y, z; the anatomy is scaled to fit. None draws a realistic crop of 1 mm
            voxels.

    Returns:
        Scan with image float32 [1, x, y, z] and segmentation uint8 [x, y, z].
    """
    shared, rng = patient.shared(), patient.case(case)
    site, anatomy = SITES[shared.integers(len(SITES))], _draw_anatomy(shared)
    signal = _signals(shared, site)
    size, voxel_mm = _grid(rng, shape)
    points = _bend(shared, rng, coordinates(size, voxel_mm))
    hippocampus = _hippocampus(points, anatomy)
    image = _scene(shared, rng, points, hippocampus, anatomy, signal, voxel_mm)
    image = _acquire(rng, image, site, signal["white"], voxel_mm)
    return Scan(image[None], _labels(rng, points, hippocampus, anatomy, voxel_mm), SPACING_MM)


KIND = Kind(
    name="hippocampus",
    title="PhantomHippocampus",
    description="Phantom of left and right hippocampus in T1-weighted MRI (anterior, posterior)",
    dimensions=3,
    dataset_id=301,
    channel_names=("MRI",),
    labels={"background": 0, "Anterior": ANTERIOR, "Posterior": POSTERIOR},
    file_ending=".nii.gz",
    smallest_shape=(16, 20, 16),
    cases_per_patient=(1, 2),
    render=render,
)


def _draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """The patient's hippocampus and its surroundings; sources in the module docstring."""
    return Anatomy(
        volume_mm3=float(np.clip(rng.normal(3400, 450), 2300, 4500)),
        length_mm=rng.uniform(38, 45),
        pitch_degrees=rng.uniform(20, 35),
        yaw_degrees=rng.uniform(3, 14),
        sag_mm=rng.uniform(1, 4),
        tail_curl_mm=rng.uniform(1, 5),
        uncus_mm=rng.uniform(1, 4),
        head_to_tail=rng.uniform(1.7, 2.4),
        cut=rng.uniform(0.55, 0.65),
        horn_mm=rng.uniform(0.8, 2.6),
        cistern_mm=rng.uniform(0.8, 2.5),
    )


def _signals(rng: np.random.Generator, site: Site) -> dict[str, float]:
    """Inversion-recovery signal of each tissue, T1 varying by 4 % between patients."""
    signals = {}
    for tissue, relaxation in T1_MS.items():
        t1 = relaxation * rng.normal(1, 0.04)
        recovered = 1 - 2 * np.exp(-site.inversion_ms / t1) + np.exp(-site.repetition_ms / t1)
        signals[tissue] = float(abs(PROTON_DENSITY[tissue] * recovered))
    vessels = rng.uniform(0.15, 0.45)  # share of vessels, arachnoid and choroid plexus in these narrow spaces
    signals["fluid"] += vessels * (signals["grey"] - signals["fluid"])
    return signals


def _grid(rng: np.random.Generator, shape: Shape | None) -> tuple[Shape, float]:
    """Size in voxels, and a voxel's size in the anatomy's mm: small shapes hold all of it, coarsely."""
    if shape is None:
        jitter = [int(rng.integers(-most, most + 1)) for most in SHAPE_JITTER]
        return tuple(size + more for size, more in zip(TEMPLATE_SHAPE, jitter, strict=True)), 1.0
    return shape, max(whole / size for whole, size in zip(TEMPLATE_SHAPE, shape, strict=True))


def _bend(shared: np.random.Generator, rng: np.random.Generator, points: FloatArray) -> FloatArray:
    """Random pose of the head, the patient's deformation, and the hemisphere's (coarse and fine)."""
    voxel_mm = float(points[2, 0, 0, 1] - points[2, 0, 0, 0])
    canvas = tuple(np.maximum(np.add(TEMPLATE_SHAPE, SHAPE_JITTER), points.shape[1:]))
    patients_own = displacement(
        shared, canvas, voxel_mm, 0.8, 16.0
    )  # one grid for all: the cases' crops differ
    bent = points + _middle(patients_own, points.shape[1:])
    bent = bent + displacement(rng, points.shape[1:], voxel_mm, 0.4, 12.0)
    bent = bent + displacement(rng, points.shape[1:], voxel_mm, 0.3, 4.0)
    asymmetry = float(np.exp(rng.normal(0, 0.013)))  # 4 % of the volume, before bending
    return pose(bent, rng.normal(0, 5, 3).tolist(), rng.normal(0, 1, 3), asymmetry)


def _middle(field: FloatArray, shape: Shape) -> FloatArray:
    """The central part [axes, *shape] of a field [axes, *larger shape]."""
    starts = [(have - want) // 2 for have, want in zip(field.shape[1:], shape, strict=True)]
    return field[
        (slice(None), *(slice(start, start + want) for start, want in zip(starts, shape, strict=True)))
    ]


def _position(anatomy: Anatomy, along: FloatArray) -> FloatArray:
    """Centreline [samples, axes] in mm; `along` runs from 0 (tail) to 1 (head)."""
    middle, pitch, yaw = along - 0.5, np.deg2rad(anatomy.pitch_degrees), np.deg2rad(anatomy.yaw_degrees)
    straight = (anatomy.length_mm - END_BALLS_MM) * middle
    x = straight * np.sin(yaw) + anatomy.tail_curl_mm * np.exp(-along / 0.12)
    x = x + anatomy.uncus_mm * np.clip((along - 0.7) / 0.3, 0, 1) ** 2
    z = -straight * np.sin(pitch) + anatomy.sag_mm * ((2 * middle) ** 2 - 1 / 3)
    return np.stack([x, straight * np.cos(pitch) * np.cos(yaw), z], axis=1).astype(np.float32)


def _radii(anatomy: Anatomy, along: FloatArray) -> FloatArray:
    """Radius in mm along the tube: tail, body, head and a rounded tip, scaled to the patient's volume."""
    head = 1 / (1 + np.exp(-(along - anatomy.cut) / 0.07))
    profile = 1 + 0.45 * np.clip(along / 0.25, 0, 1) + (anatomy.head_to_tail - 1.45) * head
    profile = profile * (1 - 0.35 * np.clip((along - 0.88) / 0.12, 0, 1) ** 2)
    unstretched = _position(anatomy, along) / CROSS_SECTION  # there the tube is round
    length_mm = float(np.linalg.norm(np.diff(unstretched, axis=0), axis=1).sum())
    return (profile * _radius_scale(anatomy.volume_mm3, length_mm, profile)).astype(np.float32)


def _radius_scale(volume_mm3: float, length_mm: float, profile: FloatArray) -> float:
    """Factor that gives the tube its volume: a cylinder and two half balls; Newton's method."""
    flattening = float(CROSS_SECTION.prod())
    pieces = np.pi * float(np.mean(profile**2)) * length_mm
    ends = 2 / 3 * np.pi * float(profile[0] ** 3 + profile[-1] ** 3)
    scale = 3.0
    for _ in range(6):
        excess = flattening * (pieces * scale**2 + ends * scale**3) - volume_mm3
        scale -= excess / (flattening * (2 * pieces * scale + 3 * ends * scale**2))
    return scale


def _hippocampus(points: FloatArray, anatomy: Anatomy, offset: ArrayLike = (0, 0, 0)) -> FloatArray:
    """Signed distance in mm [x, y, z] to the hippocampus, or to its copy moved by `offset` mm."""
    along = np.linspace(0, 1, SAMPLES, dtype=np.float32)
    stretch = CROSS_SECTION.reshape(3, 1, 1, 1)
    centreline = (_position(anatomy, along) + np.asarray(offset, dtype=np.float32)) / CROSS_SECTION
    return tube(points / stretch, centreline, _radii(anatomy, along))


def _rod(
    points: FloatArray, anatomy: Anatomy, offset: tuple[float, float, float], radius_mm: float
) -> FloatArray:
    """Signed distance to a tube of constant radius beside the hippocampus."""
    along = np.linspace(0.05, 1, SAMPLES, dtype=np.float32)
    return tube(points, _position(anatomy, along) + np.asarray(offset), np.full(SAMPLES, radius_mm))


def _scene(
    shared: np.random.Generator,
    rng: np.random.Generator,
    points: FloatArray,
    hippocampus: FloatArray,
    anatomy: Anatomy,
    signal: dict[str, float],
    voxel_mm: float,
) -> FloatArray:
    """Tissue intensities before acquisition, [x, y, z]; later layers cover earlier ones."""
    size = hippocampus.shape
    around = points + displacement(rng, size, voxel_mm, 1.2, 9.0)  # the surroundings vary more than the organ
    image = np.full(size, signal["white"], dtype=np.float32)
    image = _cortex(rng, image, around, hippocampus, signal, voxel_mm)
    for distance, value in _neighbours(shared, around, points, anatomy, signal):
        image = paint(image, coverage(distance, voxel_mm), value)
    image = paint(image, 0.6 * coverage(hippocampus - 0.6, voxel_mm), signal["white"])  # alveus
    inner = np.clip(
        0.22 * smooth_noise(rng, size, voxel_mm, 2.5), -0.1, 0.5
    )  # strata, dentate gyrus, fimbria
    value = signal["grey"] + inner * (signal["white"] - signal["grey"])
    return _texture(rng, paint(image, coverage(hippocampus, voxel_mm), value), voxel_mm)


def _cortex(
    rng: np.random.Generator,
    image: FloatArray,
    points: FloatArray,
    hippocampus: FloatArray,
    signal: dict[str, float],
    voxel_mm: float,
) -> FloatArray:
    """Folded grey ribbons about thin sulci: the zero set of a smooth field, around the organ."""
    fold = np.abs(smooth_noise(rng, points.shape[1:], voxel_mm, 7.0)) * 4.4  # mm: 1 / mean slope of the field
    above = points[2] + 0.25 * points[1] - 8
    region = coverage(np.maximum(above, 3.5 - hippocampus), 3.0)
    image = paint(image, region * coverage(fold - rng.uniform(2.5, 4.0), voxel_mm), signal["grey"])
    opening = rng.uniform(0.1, 0.6) * (1 + 0.7 * smooth_noise(rng, points.shape[1:], voxel_mm, 6.0))
    return paint(image, region * coverage(fold - opening, voxel_mm), signal["fluid"])


def _neighbours(
    rng: np.random.Generator,
    around: FloatArray,
    points: FloatArray,
    anatomy: Anatomy,
    signal: dict[str, float],
) -> list[tuple[FloatArray, float]]:
    """(signed distance, intensity) of the structures about the hippocampus, bottom layer first."""
    white, grey, fluid = signal["white"], signal["grey"], signal["fluid"]
    head = _position(anatomy, np.ones(1, dtype=np.float32))[0]
    thalamus, putamen = (
        np.array([8, -6, 19]) + rng.normal(0, 1.5, 3),
        np.array([-8, 12, 15]) + rng.normal(0, 2, 3),
    )
    stem, stem_radii = (
        np.array([21, -8, -3]) + rng.normal(0, 1.5, 3),
        np.array([9, 15, 16]) * rng.uniform(0.9, 1.1),
    )
    amygdala = head + np.array([0, 0, 9]) + rng.normal(0, 1, 3)
    horn = anatomy.horn_mm * np.array([-0.8, -0.3, 0.6])  # a crescent is left of the organ's shifted copy
    fissure = anatomy.cistern_mm * np.array([0.6, -0.3, 0.3])
    return [
        (ellipsoid(around, thalamus, rng.uniform([9, 12, 7], [12, 16, 11])), 0.6 * white + 0.4 * grey),
        (ellipsoid(around, putamen, rng.uniform([5, 8, 4], [8, 12, 7])), 0.25 * white + 0.75 * grey),
        (ellipsoid(around, stem, stem_radii + anatomy.cistern_mm), fluid),
        (ellipsoid(around, stem, stem_radii), 0.85 * white + 0.15 * grey),
        (_rod(around, anatomy, (3, 0, -9), 4.5), grey),  # parahippocampal cortex
        (_rod(points, anatomy, (-1, 0, -6.5), 2.2), white),  # its white matter
        (ellipsoid(around, amygdala, rng.uniform([6, 6, 4], [9, 9, 7])), grey),
        (_hippocampus(points, anatomy, horn), fluid),
        (_hippocampus(points, anatomy, fissure), fluid),
    ]


def _texture(rng: np.random.Generator, image: FloatArray, voxel_mm: float) -> FloatArray:
    """Tissue is not flat: 4 % of slow and 3 % of fine variation."""
    slow = smooth_noise(rng, image.shape, voxel_mm, 8.0)
    return image * (1 + 0.04 * slow + 0.03 * smooth_noise(rng, image.shape, voxel_mm, 1.6))


def _acquire(
    rng: np.random.Generator, image: FloatArray, site: Site, white: float, voxel_mm: float
) -> FloatArray:
    """Point spread, coil sensitivity, noise and gain of the site; whole numbers as scanners store them."""
    image = blur(image, site.fwhm_voxels * rng.uniform(0.85, 1.15))
    image = image * bias_field(rng, image.shape, voxel_mm, rng.uniform(0.1, 0.4))
    image = rician(rng, image, site.noise * rng.uniform(0.8, 1.2) * white)
    return np.rint(image / white * site.gain * rng.uniform(0.8, 1.25)).astype(np.float32)


def _labels(
    rng: np.random.Generator, points: FloatArray, hippocampus: FloatArray, anatomy: Anatomy, voxel_mm: float
) -> LabelArray:
    """Inside the surface: posterior, or anterior in front of a jittered plane at the uncal apex."""
    ends = _position(anatomy, np.array([anatomy.cut - 0.2, anatomy.cut, anatomy.cut + 0.2], dtype=np.float32))
    axis = ends[2] - ends[0] + np.append(0, rng.normal(0, 1.5, 2)) + np.array([rng.normal(0, 1.5), 0, 0])
    normal = axis * np.array([1, 1, 0.5])  # raters cut coronal slices: half of the axis' tilt
    ahead = np.tensordot(normal / np.linalg.norm(normal), points - ends[1].reshape(3, 1, 1, 1), axes=1)
    ahead = ahead + 0.4 * smooth_noise(rng, points.shape[1:], voxel_mm, 5.0)
    labels = np.where(ahead > 0, ANTERIOR, POSTERIOR)
    return np.where(hippocampus < 0, labels, 0).astype(np.uint8)
