"""Phantom of the heart in cine MRI: short-axis stacks, three classes: right ventricle, myocardium, left ventricle.

The cavity of the left ventricle is a truncated ellipsoid, the myocardium a second one around it, thinner towards the
apex. The right ventricle is what a larger, shorter ellipsoid holds outside of that: a crescent that hugs the septum.
Classes follow the usual contours: cavities are blood pools, papillary muscles and trabeculae belong to the cavity, the
thin wall of the right ventricle to no class, and nothing above the base plane is labelled.

The cases of a patient are phases of one heart beat: 0 is end-diastole, 1 end-systole, more lie between. They share
everything but noise and contraction, also the slips between slices, because each slice is one breath hold that covers
the whole beat. In systole the cavities empty by the ejection fraction, the base plane descends towards a resting apex,
and the wall thickens by as much as keeps its volume.

Axes: x to the right (towards the right ventricle), y to the front, z from apex to base. A slice is 8 to 10 mm thick; it
is the mean of three thin ones, so that walls which run obliquely through it are blurred as in scans. Shapes may be bent
by fields whose bumps have as many voxels along z as in the plane.

Where the numbers come from; none is fitted to a dataset that this package is evaluated on.

- volumes at end-diastole and ejection fractions of healthy men and women (left 166 +- 32 and 124 +- 21 ml, 58 and 61 %;
  right 182 +- 36 and 130 +- 24 ml, 54 and 58 %): Petersen et al. 2017 (UK Biobank).
- wall of 5.3 +- 0.9 (women) and 6.3 +- 1.1 mm (men) on average at mid-cavity in diastole, at most 7 and 9 mm: Kawel et
  al. 2012 (MESA). Basal thickness is drawn a little above that average, the apex has 0.6 of it (round guess).
- hypertrophic: a wall of 15 mm and more somewhere: Elliott et al. 2014 (ESC guideline); mostly the septum. Dilated:
  a large left ventricle that ejects little: Pinto et al. 2016. How far those and an overloaded right ventricle depart
  from health, and that half of the patients are healthy, are round guesses.
- the base descends by 12 to 16 mm in health: Carlsson et al. 2007 (round figures), less where little is ejected.
- length of the cavity 80 to 98 mm, thickness 2 to 4 mm of the right ventricle's wall, papillary muscles, slips of
  1.5 mm between slices, fat, lung, vessels and the places of all neighbours: round guesses after atlases.
- contrast: the signal of balanced steady-state free precession for short repetition times, `sin a / (1 + cos a +
  (1 - cos a) T1 / T2)` (Scheffler and Lehnhardt 2003), with T1 and T2 of blood, heart, muscle and liver at 1.5 and 3 T
  of Stanisz et al. 2005, of fat and spleen of de Bazelaire et al. 2004, rounded. Blood that flows in is brighter by up
  to 30 % (round guess). Dark bands off resonance are not drawn.
- noise (Gudbjartsson 1995) of 1.5 to 5 % of blood, bias field as in the phantom of the hippocampus and a surface coil
  in front: round guesses.

    >>> scan = KIND.render(Patient(kind="heart", seed=1, index=0), 1, (32, 32, 6))
    >>> scan.image.shape, sorted(set(scan.segmentation.ravel().tolist()))
    ((1, 32, 32, 6), [0, 1, 2, 3])
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

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

TEMPLATE_SHAPE = (96, 96, 11)
FIELD_MM = (138.0, 138.0, 104.0)  # what a given shape covers; sites vary about it
RIGHT, MYOCARDIUM, LEFT = 1, 2, 3
THIN = 3  # thin slices in each slice; odd, so that one lies in its middle
CONDITIONS = ("healthy", "dilated", "hypertrophic", "overloaded")
CONDITION_SHARES = (0.5, 0.2, 0.15, 0.15)
APEX_MM = -46.0  # where the cavity of the left ventricle ends
RELAXATION_MS = {  # (T1, T2) at 1.5 T, at 3 T; Stanisz et al. 2005, de Bazelaire et al. 2004
    "blood": ((1441, 290), (1932, 275)),
    "heart": ((1030, 40), (1471, 47)),
    "muscle": ((1008, 44), (1412, 50)),
    "liver": ((576, 46), (812, 42)),
    "spleen": ((1057, 79), (1328, 61)),
    "fat": ((343, 58), (382, 68)),
}


@dataclass(frozen=True)
class Site:
    """One scanner: field (index of `RELAXATION_MS`), flip angle, voxels, resolution, noise (of blood), gain."""

    field: int
    flip_degrees: float
    pixel_mm: float
    slice_mm: float
    fwhm_voxels: float
    noise: float
    gain: float


SITES = (
    Site(0, 60, pixel_mm=1.37, slice_mm=9.0, fwhm_voxels=1.0, noise=0.020, gain=260),
    Site(0, 75, pixel_mm=1.56, slice_mm=10.0, fwhm_voxels=1.2, noise=0.030, gain=600),
    Site(1, 45, pixel_mm=1.41, slice_mm=8.0, fwhm_voxels=1.1, noise=0.035, gain=150),
)


@dataclass(frozen=True)
class Anatomy:
    """One heart; volumes in ml, lengths in mm at end-diastole, angles in degrees."""

    left_ml: float
    left_ejection: float
    right_ml: float
    right_ejection: float
    length_mm: float
    descent_mm: float
    wall_mm: float
    septum_mm: float  # further thickness of the septum
    flattening: float  # width over depth of the left ventricle
    free_wall_mm: float
    fat_mm: float
    papillary_mm: float
    turn_degrees: float
    trabeculae: float


@dataclass(frozen=True)
class Ventricles:
    """Signed distances in mm [x, y, thin slices] at one phase, height of the base plane, radius of the left cavity."""

    cavity: FloatArray
    outside: FloatArray
    right: FloatArray
    base_mm: float
    radius_mm: float


@dataclass(frozen=True)
class Stack:
    """The grid: voxels, their size, places [3, x, y, thin slices] in mm, and the unbent height of each thin slice."""

    size: Shape
    spacing_mm: tuple[float, float, float]
    points: FloatArray
    height_mm: FloatArray

    @property
    def thin_size(self) -> Shape:
        """Voxels of the thin slices."""
        return (*self.size[:2], THIN * self.size[2])

    @property
    def voxel_mm(self) -> float:
        """Edge in the plane."""
        return max(self.spacing_mm[:2])


def render(patient: Patient, case: int, shape: Shape | None = None) -> Scan:
    """One phase of one heart beat.

    Args:
        patient: Whose.
        case: 0 is end-diastole, 1 end-systole, more are random phases between.
        shape: Voxels along x, y, z; the same 138 x 138 x 104 mm are drawn with larger or smaller voxels. None is
            96 x 96 x 10 to 13 voxels of the site's size.

    Returns:
        Scan with image float32 [1, x, y, z] and segmentation uint8 [x, y, z].
    """
    shared, rng = patient.shared(), patient.case(case)
    site, anatomy = SITES[shared.integers(len(SITES))], _draw_anatomy(shared)
    stack = _stack(shared, anatomy, site, shape)
    contraction = (0.0, 1.0)[case] if case < 2 else rng.uniform(0, 1)
    bent = stack.points + displacement(rng, stack.thin_size, stack.voxel_mm, 0.6, 13.0)
    ventricles = _ventricles(bent, anatomy, contraction, stack)
    image = _scene(shared, stack, bent, ventricles, anatomy, _signals(shared, site))
    labels = _labels(rng, ventricles, stack)
    return Scan(_acquire(shared, rng, image, stack, site)[None], labels, stack.spacing_mm)


KIND = Kind(
    name="heart",
    title="PhantomHeart",
    description="Phantom of the heart in short-axis cine MRI (right ventricle, myocardium, left ventricle)",
    dimensions=3,
    dataset_id=303,
    channel_names=("MRI",),
    labels={"background": 0, "right ventricle": RIGHT, "myocardium": MYOCARDIUM, "left ventricle": LEFT},
    file_ending=".nii.gz",
    smallest_shape=(24, 24, 5),
    cases_per_patient=(1, 2),
    render=render,
)


# ---- the patient ---------------------------------------------------------------------------------


def _draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """The patient's heart; sources in the module docstring."""
    male, condition = rng.random() < 0.5, CONDITIONS[rng.choice(len(CONDITIONS), p=CONDITION_SHARES)]
    left_ml, right_ml = rng.normal((166, 182), (32, 36)) if male else rng.normal((124, 130), (21, 24))
    healthy = Anatomy(
        left_ml=float(np.clip(left_ml, 80, 230)),
        left_ejection=float(np.clip(rng.normal(0.58 if male else 0.61, 0.05), 0.48, 0.72)),
        right_ml=float(np.clip(right_ml, 85, 250)),
        right_ejection=float(np.clip(rng.normal(0.54 if male else 0.58, 0.06), 0.42, 0.70)),
        length_mm=rng.uniform(80, 92) + 6 * male,
        descent_mm=rng.uniform(12, 16),
        wall_mm=float(np.clip(rng.normal(7.3, 1.0) if male else rng.normal(6.3, 0.9), 5, 10)),
        septum_mm=rng.uniform(0, 1.5),
        flattening=rng.uniform(0.93, 1.03),
        free_wall_mm=rng.uniform(2, 4),
        fat_mm=min(rng.gamma(3.0, 1.4), 9.0),
        papillary_mm=rng.uniform(3.5, 5.5),
        turn_degrees=rng.normal(0, 12),
        trabeculae=rng.uniform(0.3, 1.0),
    )
    return _diseased(rng, healthy, condition)


def _diseased(rng: np.random.Generator, heart: Anatomy, condition: str) -> Anatomy:
    """The heart as the condition leaves it."""
    if condition == "dilated":
        ejected, larger = rng.uniform(0.15, 0.38), min(heart.left_ml * rng.uniform(1.3, 1.9), 270)
        return replace(heart, left_ml=larger, left_ejection=ejected, descent_mm=rng.uniform(4, 9))
    if condition == "hypertrophic":
        thicker = heart.wall_mm + rng.uniform(2, 4)
        septum = max(rng.uniform(2, 9), 15 - thicker)
        return replace(heart, wall_mm=thicker, septum_mm=septum, left_ejection=rng.uniform(0.60, 0.75))
    if condition == "overloaded":
        larger = min(heart.right_ml * rng.uniform(1.2, 1.6), 270)
        return replace(
            heart, right_ml=larger, right_ejection=rng.uniform(0.25, 0.45), flattening=rng.uniform(0.8, 0.95)
        )
    return heart


def _signals(rng: np.random.Generator, site: Site) -> dict[str, float]:
    """Steady-state signal of each tissue over that of blood; T1 and T2 vary by 5 % between patients."""
    angle = np.deg2rad(site.flip_degrees * rng.uniform(0.85, 1.1))
    signals = {}
    for tissue, fields in RELAXATION_MS.items():
        t1, t2 = np.array(fields[site.field]) * rng.normal(1, 0.05, 2)
        signals[tissue] = float(np.sin(angle) / (1 + np.cos(angle) + (1 - np.cos(angle)) * t1 / t2))
    signals["blood"] *= rng.uniform(1.0, 1.3)  # blood that flows in has not been saturated
    signals["fat"] *= rng.uniform(0.7, 1.0)  # has fewer protons in a voxel, and some scans suppress it
    return {name: value / signals["blood"] for name, value in signals.items()} | {"lung": rng.uniform(0.02, 0.08)}


def _stack(rng: np.random.Generator, anatomy: Anatomy, site: Site, shape: Shape | None) -> Stack:
    """The grid, turned, slipped from slice to slice, and bent by the patient's deformation."""
    if shape is None:
        size: Shape = (*TEMPLATE_SHAPE[:2], int(np.ceil(FIELD_MM[2] / site.slice_mm)))
        spacing = (site.pixel_mm, site.pixel_mm, site.slice_mm)
    else:
        size, plane_mm = shape, max(FIELD_MM[0] / shape[0], FIELD_MM[1] / shape[1])
        spacing = (plane_mm, plane_mm, FIELD_MM[2] / shape[2])
    thin = (*size[:2], THIN * size[2])
    scale = np.array([spacing[0], spacing[1], spacing[2] / THIN], dtype=np.float32).reshape(3, 1, 1, 1)
    points = coordinates(thin, 1.0) * scale
    height = points[2, 0, 0] + np.float32(rng.normal(0, 2))
    middle = np.array([-20 + 0.08 * (166 - anatomy.left_ml), 2, 0]) + np.append(rng.normal(0, 4, 2), 0)
    slips = np.repeat(rng.normal(0, 1.5, (2, size[2])), THIN, axis=1)
    points[:2] += slips.reshape(2, 1, 1, -1).astype(np.float32)
    points[2] = height
    placed = pose(points, [0, 0, anatomy.turn_degrees], middle)
    return Stack(size, spacing, placed + displacement(rng, thin, max(spacing[:2]), 1.8, 25.0), height)


# ---- the ventricles ------------------------------------------------------------------------------


def _ventricles(points: FloatArray, anatomy: Anatomy, contraction: float, stack: Stack) -> Ventricles:
    """Surfaces at one phase: 0 is end-diastole, 1 end-systole."""
    length = anatomy.length_mm - contraction * anatomy.descent_mm
    volume = 1000 * anatomy.left_ml * (1 - contraction * anatomy.left_ejection)
    inner = _half_axes(volume, length)
    wall = _wall_mm(anatomy, inner, length)
    equator = np.array([0, 0, APEX_MM + inner[1]])
    oval = np.array([np.sqrt(anatomy.flattening), 1 / np.sqrt(anatomy.flattening)])
    cavity = ellipsoid(points, equator, [*(oval * inner[0]), inner[1]])
    outside = ellipsoid(points, equator, [*(oval * inner[0] + wall), inner[1] + 0.6 * wall])
    towards = points[0] / np.maximum(np.hypot(points[0], points[1]), 1e-3)  # cosine of the angle from the septum
    septum = anatomy.septum_mm * (1 + 0.4 * contraction) * np.clip(towards, 0, 1) ** 2
    outside = np.minimum(outside - septum * coverage(cavity - 2 * inner[0], 20), cavity - 1.1 * stack.voxel_mm)
    base = APEX_MM + length
    right = _right(points, anatomy, contraction, inner[0] + wall, base, outside, stack)
    return Ventricles(cavity, outside, right, base, inner[0])


def _half_axes(volume_mm3: float, length_mm: float) -> tuple[float, float]:
    """(radius, depth below the equator) of an ellipsoid cut at 0.3 of that depth above the equator."""
    depth = length_mm / 1.3
    return float(np.sqrt(volume_mm3 / _truncated(1.0, depth, 0.3 * depth))), depth


def _truncated(radius_mm: float, depth_mm: float, above_mm: float) -> float:
    """Volume in mm^3 of an ellipsoid of revolution up to a plane `above_mm` its equator."""
    cut = min(above_mm / depth_mm, 1.0)
    return np.pi * radius_mm**2 * depth_mm * (2 / 3 + cut - cut**3 / 3)


def _wall_mm(anatomy: Anatomy, inner: tuple[float, float], length_mm: float) -> float:
    """Thickness that gives the wall its volume at end-diastole: muscle is not compressed; bisection."""

    def volume(axes: tuple[float, float], whole_mm: float, wall: float) -> float:
        radius, depth = axes
        above = whole_mm - depth
        return _truncated(radius + wall, depth + 0.6 * wall, above) - _truncated(radius, depth, above)

    resting = _half_axes(1000 * anatomy.left_ml, anatomy.length_mm)
    wanted = volume(resting, anatomy.length_mm, anatomy.wall_mm)
    low, high = anatomy.wall_mm / 2, 4 * anatomy.wall_mm
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if volume(inner, length_mm, middle) < wanted else (low, middle)
    return (low + high) / 2


def _right(
    points: FloatArray,
    anatomy: Anatomy,
    contraction: float,
    radius_mm: float,
    base_mm: float,
    outside: FloatArray,
    stack: Stack,
) -> FloatArray:
    """Signed distance to the right cavity: an ellipsoid without the left ventricle, grown to its volume."""
    centre = np.array([0.85 * radius_mm, 0.15 * radius_mm, base_mm - 8])
    radii = np.array([0.85 * radius_mm, 1.1 * radius_mm, 0.78 * (base_mm - APEX_MM)])
    whole = ellipsoid(points, centre, radii)
    volume = 1000 * anatomy.right_ml * (1 - contraction * anatomy.right_ejection)
    free = (outside > 0) & (stack.height_mm < base_mm)
    voxels = min(int(volume * THIN / np.prod(stack.spacing_mm)), np.count_nonzero(free) - 1)
    level = np.partition(whole[free], voxels)[voxels]
    return np.maximum(whole - level, -outside)


def _labels(rng: np.random.Generator, ventricles: Ventricles, stack: Stack) -> LabelArray:
    """What raters draw: whole slices below the base plane, the middle of each slice deciding."""
    middle = slice(THIN // 2, None, THIN)
    cavity, outside, right = (d[..., middle] for d in (ventricles.cavity, ventricles.outside, ventricles.right))
    height = stack.height_mm[middle]
    labels = np.where(right < 0, RIGHT * (height < ventricles.base_mm + rng.normal(2, 2)), 0)
    left = np.where(cavity < 0, LEFT, MYOCARDIUM) * (height < ventricles.base_mm + rng.normal(0, 1.5))
    return np.where(outside < 0, left, labels).astype(np.uint8)


# ---- the scene -----------------------------------------------------------------------------------


def _scene(
    rng: np.random.Generator,
    stack: Stack,
    points: FloatArray,
    ventricles: Ventricles,
    anatomy: Anatomy,
    signal: dict[str, float],
) -> FloatArray:
    """Signal over that of blood before acquisition [x, y, thin slices]; later layers cover earlier ones."""
    width, below = stack.voxel_mm, coverage(stack.height_mm - ventricles.base_mm, 4.0)
    free_wall = ventricles.right - anatomy.free_wall_mm
    heart = np.minimum(ventricles.outside, free_wall)
    image = _chest(rng, stack, signal)
    fat = heart - anatomy.fat_mm * np.clip(1 + 0.9 * smooth_noise(rng, stack.thin_size, width, 22.0), 0.1, 3)
    image = paint(image, coverage(fat, width), signal["fat"])
    image = paint(image, coverage(heart + 0.5, width) * (1 - below), 0.6 * signal["fat"] + 0.4 * signal["heart"])
    for distance in _above(rng, points, anatomy):
        image = paint(image, coverage(distance - 2, width) * (1 - below), signal["heart"])
        image = paint(image, coverage(distance, width) * (1 - below), 1.0)
    image = paint(image, coverage(free_wall, width) * below, signal["heart"])
    blood = 1 - _trabeculae(rng, stack, ventricles.right, anatomy)
    image = paint(image, coverage(ventricles.right, width) * below, blood)
    image = paint(image, coverage(ventricles.outside, width) * below, signal["heart"])
    image = paint(image, coverage(ventricles.cavity, width) * below, 1.0)
    muscles = coverage(_papillary(points, ventricles, anatomy), width) * coverage(ventricles.cavity, width) * below
    image = paint(image, muscles, 0.8 * signal["heart"] + 0.2)
    slow, fine = (smooth_noise(rng, stack.thin_size, width, knots_mm) for knots_mm in (12.0, 4.0))
    return image * (1 + 0.04 * slow + 0.03 * fine)


def _trabeculae(rng: np.random.Generator, stack: Stack, right: FloatArray, anatomy: Anatomy) -> FloatArray:
    """How much darker than blood the right ventricle is: strands of muscle, mostly near the wall."""
    strands = np.clip(smooth_noise(rng, stack.thin_size, stack.voxel_mm, 5.0) - 0.3, 0, 1)
    return 0.6 * anatomy.trabeculae * strands * coverage(-right - 5.0, 6.0)


def _papillary(points: FloatArray, ventricles: Ventricles, anatomy: Anatomy) -> FloatArray:
    """Signed distance to the two papillary muscles: rods along the lateral and the lower wall, half as long."""
    length, share = ventricles.base_mm - APEX_MM, np.linspace(0.12, 0.58, 8)
    radius, depth = ventricles.radius_mm, length / 1.3
    distances = []
    for degrees in (140.0, 235.0):  # from the septum; front-lateral and lower-middle
        height = APEX_MM + share * length
        reach = 0.72 * radius * np.sqrt(np.clip(1 - ((height - APEX_MM - depth) / depth) ** 2, 0, 1))
        angle = np.deg2rad(degrees)
        line = np.stack([reach * np.cos(angle), reach * np.sin(angle), height], axis=1)
        distances.append(tube(points, line, anatomy.papillary_mm * (1.1 - 0.5 * share)))
    return np.minimum(*distances)


def _above(rng: np.random.Generator, points: FloatArray, anatomy: Anatomy) -> list[FloatArray]:
    """Signed distances to the chambers above the base plane: atria, aortic root, outflow of the right ventricle."""
    base = APEX_MM + anatomy.length_mm
    places = (
        ((-8, -18, 14), (26, 20, 26)),  # left atrium
        ((38, -16, 10), (22, 24, 28)),  # right atrium
        ((12, 8, 20), (14, 14, 60)),  # aortic root
        ((24, 32, 10), (15, 13, 40)),  # outflow of the right ventricle
    )
    moved = ((np.add(place, (0, 0, base)) + rng.normal(0, 2, 3), radii) for place, radii in places)
    return [ellipsoid(points, place, np.array(radii) * rng.uniform(0.85, 1.1)) for place, radii in moved]


def _chest(rng: np.random.Generator, stack: Stack, signal: dict[str, float]) -> FloatArray:
    """Lung with vessels, and what borders on it: chest wall in front, liver, stomach and spleen below, the aorta."""
    points, width, size = stack.points, stack.voxel_mm, stack.thin_size
    vessels = np.clip(smooth_noise(rng, size, width, 4.0) - 2.0, 0, 1)
    image = (signal["lung"] + 0.6 * vessels).astype(np.float32)
    ripple = 3 * smooth_noise(rng, size, width, 25.0)
    for distance, value in _neighbours(rng, points, signal):
        image = paint(image, coverage(distance + ripple, width), value)
    aorta = ellipsoid(points[:2], np.array([-38, -48]) + rng.normal(0, 4, 2), np.full(2, rng.uniform(9, 13)))
    image = paint(image, coverage(aorta - 2, width), signal["heart"])
    return paint(image, coverage(aorta, width), 1.0)


def _neighbours(
    rng: np.random.Generator, points: FloatArray, signal: dict[str, float]
) -> list[tuple[FloatArray, float]]:
    """(signed distance, signal) of organs and of the layers of the chest wall, bottom layer first."""
    below = np.deg2rad(rng.uniform(-8, 8))
    dome = points[1] * np.cos(below) + points[0] * np.sin(below) + rng.uniform(40, 52) + 0.15 * points[2]
    front = -(0.55 * points[0] + 0.83 * points[1]) + rng.uniform(56, 70)
    gas = ellipsoid(points, np.array([-30, -66, 0]) + rng.normal(0, 6, 3), rng.uniform([14, 8, 20], [24, 16, 50]))
    return [
        (dome - 3, signal["fat"]),
        (dome, signal["liver"]),
        (np.maximum(dome, points[0] + rng.uniform(5, 25)), signal[("spleen", "fat")[int(rng.integers(2))]]),
        (np.maximum(gas, dome + 3), signal["lung"]),
        (front - 3, signal["fat"]),
        (front + 2, signal["muscle"]),
        (front + rng.uniform(8, 14), signal["fat"]),
        (front + rng.uniform(30, 45), signal["lung"]),
    ]


# ---- the scanner ---------------------------------------------------------------------------------


def _acquire(
    shared: np.random.Generator, rng: np.random.Generator, image: FloatArray, stack: Stack, site: Site
) -> FloatArray:
    """Slices, point spread in the plane, coil, noise, gain; whole numbers [x, y, z]."""
    thick = image.reshape(*stack.size, THIN).mean(-1)
    sharpness = site.fwhm_voxels * shared.uniform(0.85, 1.15)
    thick = np.stack([blur(plane, sharpness) for plane in np.moveaxis(thick, -1, 0)], axis=-1)
    front = stack.points[1].reshape(*stack.size, THIN)[..., THIN // 2]
    coil = np.exp(front / shared.uniform(120, 400))
    field = coil * bias_field(shared, stack.size, stack.voxel_mm, shared.uniform(0.1, 0.4))
    gain = site.gain * shared.uniform(0.7, 1.4)
    noisy = rician(rng, thick * field, site.noise * shared.uniform(0.75, 1.4))
    return np.rint(noisy * gain).astype(np.float32)
