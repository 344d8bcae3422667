"""Phantom of a pigmented skin lesion in dermoscopy: RGB, one class `lesion`, one image a case.

Colour is made as skin makes it: light passes twice through melanin and blood, so that each channel is
`light * exp(-(melanin * a + blood * b))` (Beer and Lambert; Tsumura et al. 1999 separate real skin so). A
lesion is a place with more melanin, or more blood, uneven inside and with a more or less fuzzy, irregular
border: the A, B, C, D of the ABCD rule (Stolz et al. 1994) are its random parameters. Over it lie the
artefacts which Bissoto et al. (2019) counted in the ISIC archive: dark corners, hair, gel border, gel
bubbles, rulers, ink, coloured patches. Cases of one patient share skin and camera, not the lesion.

Where the numbers come from; none is fitted to a dataset that this package is evaluated on.

- melanin absorbs as wavelength^-3.33, blood mostly green and blue (Jacques 2013; oxyhaemoglobin after
  Prahl).
- diameter: log-normal, median 7 mm, in a field of view of 12 to 22 mm: melanomas
  are mostly above 6 mm, common naevi below (Abbasi et al. 2004); a contact dermoscope shows about 20 mm.
- one lesion an image, colours from pink to black, artefacts in a good part of the images: Codella et al.
  2018 (ISIC 2017), Bissoto et al. 2019. How often each artefact occurs is a round guess.
- the contour runs along the outer limit of the pigment, where a twentieth of the excess is left: a
  convention.

    >>> scan = KIND.render(Patient(kind="lesion", seed=1, index=0), 0, (48, 48))
    >>> scan.image.shape, sorted(set(scan.segmentation.ravel().tolist()))
    ((3, 48, 48), [0, 1])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .anatomy import (
    FloatArray,
    Kind,
    Patient,
    Scan,
    Shape,
    blur,
    coordinates,
    coverage,
    displacement,
    ellipsoid,
    paint,
    pose,
    smooth_noise,
)

TEMPLATE_SHAPE = (128, 128)
MELANIN = np.array([0.41, 0.61, 1.0], dtype=np.float32)  # (wavelength / 465 nm)^-3.33 at 610 and 540 nm
BLOOD = np.array([0.03, 1.0, 0.70], dtype=np.float32)  # oxyhaemoglobin at the same wavelengths, Prahl
INK = np.array([0.35, 0.15, 0.55], dtype=np.float32)  # gentian violet
PATCHES = np.array([[0.35, 0.75, 0.70], [0.90, 0.60, 0.25], [0.80, 0.80, 0.85]], dtype=np.float32)


@dataclass(frozen=True)
class Site:
    """One clinic's camera: its colours, sharpness and noise, and how often which artefact occurs."""

    white_balance: tuple[float, float, float]
    gamma: float
    fwhm_voxels: float
    noise: float
    dark_corners: float
    polarised: bool
    ruler: float


SITES = (
    Site((1.00, 0.97, 0.92), 1.0, 0.8, 0.010, dark_corners=0.5, polarised=False, ruler=0.1),
    Site((1.03, 0.92, 0.93), 1.1, 1.1, 0.015, dark_corners=0.1, polarised=True, ruler=0.1),
    Site((0.94, 0.96, 1.00), 0.9, 0.9, 0.020, dark_corners=0.2, polarised=True, ruler=0.5),
)


@dataclass(frozen=True)
class Skin:
    """What all images of a patient share: optical densities of melanin and blood, number of naevi."""

    melanin: float
    blood: float
    naevi: int


def render(patient: Patient, case: int, shape: Shape | None = None) -> Scan:
    """One image of one lesion.

    Args:
        patient: Whose: skin and clinic.
        case: Which lesion.
        shape: Pixels along the rows and columns; None is 128 x 128.

    Returns:
        Scan with image float32 [3, rows, columns], whole numbers from 0 to 255, and segmentation uint8.
    """
    shared, rng = patient.shared(), patient.case(case)
    site, skin = SITES[shared.integers(len(SITES))], _draw_skin(shared)
    size = TEMPLATE_SHAPE if shape is None else shape
    pixel_mm = rng.uniform(12, 22) / min(size)
    points = coordinates(size, pixel_mm)
    distance = _lesion(rng, points, pixel_mm, 0.75 * min(size) * pixel_mm)
    image = _absorb(*_pigments(rng, points, distance, skin, pixel_mm), rng)
    image = _artefacts(rng, image, points, pixel_mm, site)
    return Scan(_photograph(rng, image, points, site), (distance < 0).astype(np.uint8), (1.0, 1.0))


KIND = Kind(
    name="lesion",
    title="PhantomLesion",
    description="Phantom of pigmented skin lesions in dermoscopy",
    dimensions=2,
    dataset_id=302,
    channel_names=("R", "G", "B"),
    labels={"background": 0, "lesion": 1},
    file_ending=".png",
    smallest_shape=(32, 32),
    cases_per_patient=(1, 2),
    render=render,
)


def _draw_skin(rng: np.random.Generator) -> Skin:
    """Fitzpatrick types I to IV, as in the archive (Codella et al. 2018: mostly fair skin)."""
    return Skin(melanin=rng.gamma(3.0, 0.08), blood=rng.uniform(0.05, 0.25), naevi=int(rng.integers(0, 3)))


def _lesion(rng: np.random.Generator, points: FloatArray, pixel_mm: float, most_mm: float) -> FloatArray:
    """Signed distance in mm [rows, columns] to a blob: an ellipse, its contour waved, bent at two scales."""
    diameter = float(np.clip(7 * np.exp(rng.normal(0, 0.4)), 2.5, most_mm))
    elongation, border = rng.uniform(1, 1.6), rng.gamma(2.0, 0.5)  # border irregularity of the ABCD rule
    placed = pose(points, [rng.uniform(0, 360)], rng.normal(0, 0.07 * most_mm, 2))
    placed = placed + displacement(rng, points.shape[1:], pixel_mm, 0.05 * border * diameter, diameter / 3)
    placed = placed + displacement(rng, points.shape[1:], pixel_mm, 0.12 * border, 0.8)
    angle, order = np.arctan2(placed[1], placed[0]), np.arange(2, 7).reshape(-1, 1, 1)
    waves = np.cos(order * angle + rng.uniform(0, 2 * np.pi, order.shape))
    contour = (rng.normal(0, 0.12, order.shape) / order * waves).sum(0) * border
    half = diameter / 2 * np.array([np.sqrt(elongation), 1 / np.sqrt(elongation)])
    return (ellipsoid(placed, (0, 0), half) - diameter / 2 * np.clip(contour, -0.4, 0.4)).astype(np.float32)


def _pigments(
    rng: np.random.Generator, points: FloatArray, distance: FloatArray, skin: Skin, pixel_mm: float
) -> tuple[FloatArray, FloatArray]:
    """Optical densities of melanin and blood, each [rows, columns]."""
    size, fuzz_mm = distance.shape, rng.gamma(2.0, 0.25) + 0.15
    inside = 1 / (1 + np.exp(np.clip((distance + 0.8 * fuzz_mm) * 4 / fuzz_mm, -30, 30)))
    melanin = skin.melanin * (1 + 0.12 * smooth_noise(rng, size, pixel_mm, 2.0))
    melanin = melanin * (1 + 0.10 * smooth_noise(rng, size, pixel_mm, 0.25))
    blood = skin.blood * np.exp(0.15 * smooth_noise(rng, size, pixel_mm, 1.5))
    excess = float(np.clip(0.25 + rng.gamma(2.0, 0.45), 0.25, 3.0))
    redness = rng.gamma(1.0, 0.15)
    melanin = melanin + inside * excess * _variegation(rng, points, distance, pixel_mm)
    blood = blood + inside * redness * np.exp(0.3 * smooth_noise(rng, size, pixel_mm, 0.8))
    return np.maximum(melanin + _naevi(rng, points, skin, pixel_mm), 0), blood


def _variegation(
    rng: np.random.Generator, points: FloatArray, distance: FloatArray, pixel_mm: float
) -> FloatArray:
    """Relative melanin in the lesion, about 1: zones, blotches, network or globules (Stolz 1994)."""
    size, unevenness = distance.shape, rng.gamma(2.0, 0.25)
    zones = np.exp(unevenness * 0.6 * smooth_noise(rng, size, pixel_mm, 2.0))
    grain = 1 + 0.35 * unevenness * smooth_noise(rng, size, pixel_mm, 0.3)
    mesh = np.abs(smooth_noise(rng, size, pixel_mm, 0.35))
    network = 1 + rng.uniform(-0.3, 0.5) * (0.8 - mesh) * (rng.random() < 0.6)
    centre = points.reshape(2, -1)[:, int(np.argmin(distance))]
    blotch = ellipsoid(points, centre + rng.normal(0, 1, 2), rng.uniform(0.5, 2, 2))
    blotch = 1 + rng.uniform(-0.4, 0.9) * coverage(blotch, 0.8)
    return np.clip(zones * grain * network * blotch, 0.15, 3.5).astype(np.float32)


def _naevi(rng: np.random.Generator, points: FloatArray, skin: Skin, pixel_mm: float) -> FloatArray:
    """Melanin of small freckles, lentigines and naevi beside the lesion, which are not labelled."""
    freckles = np.clip(smooth_noise(rng, points.shape[1:], pixel_mm, 0.7) - 2.2, 0, 1) * rng.uniform(0, 0.4)
    for _ in range(int(rng.integers(0, skin.naevi + 1))):
        away = rng.uniform(0.30, 0.48) * points.shape[1] * pixel_mm
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.8, 2)
        spot = coverage(ellipsoid(points, away * np.array([np.cos(angle), np.sin(angle)]), radius), 0.5)
        freckles = freckles + rng.uniform(0.1, 0.7) * spot
    return freckles.astype(np.float32)


def _absorb(melanin: FloatArray, blood: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Light [3, rows, columns] that passes both absorbers, and a few per cent reflected at the surface."""
    density = MELANIN.reshape(3, 1, 1) * melanin + BLOOD.reshape(3, 1, 1) * blood
    return (rng.uniform(0.02, 0.07) + rng.uniform(0.85, 0.97) * np.exp(-density)).astype(np.float32)


# ---- artefacts (Bissoto et al. 2019) -------------------------------------------------------------


def _artefacts(
    rng: np.random.Generator, image: FloatArray, points: FloatArray, pixel_mm: float, site: Site
) -> FloatArray:
    """Each artefact with the odds of its site, in the order in which they lie over the skin."""
    if rng.random() < 0.06:
        image = _ink(rng, image, points, pixel_mm)
    if rng.random() < 0.05:
        image = _patch(rng, image, points, pixel_mm)
    if rng.random() < 0.35:
        image = _hairs(rng, image, points, pixel_mm)
    if rng.random() < site.ruler:
        image = _ruler(rng, image, points, pixel_mm)
    if not site.polarised and rng.random() < 0.5:
        image = _gel(rng, image, points, pixel_mm)
    if rng.random() < site.dark_corners:
        image = _dark_corners(rng, image, points, pixel_mm)
    return image


def _arc(rng: np.random.Generator, points: FloatArray, most_mm: float) -> tuple[FloatArray, FloatArray]:
    """A random parabola through the image: (distance from it, place along it), both mm."""
    along, across = pose(points, [rng.uniform(0, 360)], rng.uniform(-most_mm, most_mm, 2))
    bend = rng.normal(0, 0.04)
    return np.abs(across - bend * along**2) / np.sqrt(1 + (2 * bend * along) ** 2), along


def _hairs(rng: np.random.Generator, image: FloatArray, points: FloatArray, pixel_mm: float) -> FloatArray:
    """Two to twelve dark hairs, 0.05 to 0.15 mm thick."""
    colour = (np.array([0.30, 0.20, 0.13]) * rng.uniform(0.3, 1.6)).reshape(3, 1, 1)
    for _ in range(int(rng.integers(2, 13))):
        distance, along = _arc(rng, points, 0.45 * points.shape[1] * pixel_mm)
        thickness, length = rng.uniform(0.05, 0.15), rng.uniform(4, 14)
        hair = np.clip((thickness - distance) / pixel_mm + 0.5, 0, min(1.0, thickness / pixel_mm))
        image = paint(image, hair * (np.abs(along) < length / 2), colour)
    return image


def _ruler(rng: np.random.Generator, image: FloatArray, points: FloatArray, pixel_mm: float) -> FloatArray:
    """Millimetre ticks along a line near one edge, every fifth longer."""
    edge = rng.uniform(0.36, 0.46) * points.shape[1] * pixel_mm
    turned = pose(points, [rng.integers(4) * 90 + rng.uniform(-15, 15)], (0, 0))
    along, across = turned[0], turned[1] - edge
    tick, number = np.abs((along + 0.5) % 1 - 0.5), np.rint(along)
    reach = np.where(number % 5 == 0, 1.2, 0.7)
    marks = coverage(tick - 0.05, pixel_mm) * ((across > 0) & (across < reach))
    marks = np.maximum(marks, coverage(np.abs(across) - 0.05, pixel_mm)) * (np.abs(along) < rng.uniform(3, 9))
    return paint(image, 0.8 * marks, rng.uniform(0.1, 0.3))


def _gel(rng: np.random.Generator, image: FloatArray, points: FloatArray, pixel_mm: float) -> FloatArray:
    """Bubbles in the immersion gel: bright rings; and small highlights."""
    for _ in range(int(rng.integers(1, 8))):
        radius, reach = rng.uniform(0.15, 0.9), 0.5 * points.shape[1] * pixel_mm
        bubble = ellipsoid(points, rng.uniform(-reach, reach, 2), (radius, radius))
        image = paint(image, 0.45 * coverage(np.abs(bubble) - 0.06, 2 * pixel_mm), 0.95)
        image = paint(image, 0.08 * coverage(bubble, pixel_mm), 0.95)
    glint = np.clip(smooth_noise(rng, points.shape[1:], pixel_mm, 0.3) - 2.6, 0, 1)
    return paint(image, glint, 1.0)


def _ink(rng: np.random.Generator, image: FloatArray, points: FloatArray, pixel_mm: float) -> FloatArray:
    """Violet marks of a surgical pen around the lesion."""
    worn = np.clip(0.7 + 0.5 * smooth_noise(rng, points.shape[1:], pixel_mm, 0.4), 0, 1)
    for _ in range(int(rng.integers(1, 4))):
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.38, 0.5) * points.shape[1] * pixel_mm
        place = away * np.array([np.cos(angle), np.sin(angle)])
        mark = ellipsoid(pose(points, [rng.uniform(0, 360)], place), (0, 0), (rng.uniform(0.8, 3), 0.35))
        image = paint(image, 0.75 * worn * coverage(mark, 0.3), INK.reshape(3, 1, 1))
    return image


def _patch(rng: np.random.Generator, image: FloatArray, points: FloatArray, pixel_mm: float) -> FloatArray:
    """A coloured sticker that reaches into the image from one side."""
    angle, side = rng.uniform(0, 2 * np.pi), points.shape[1] * pixel_mm
    radii = rng.uniform(0.15, 0.3, 2) * side
    centre = (0.42 * side + radii.max() * 0.6) * np.array([np.cos(angle), np.sin(angle)])
    sticker = ellipsoid(points, centre, radii)
    cloth = 1 + 0.05 * smooth_noise(rng, points.shape[1:], pixel_mm, 0.2)
    return paint(image, coverage(sticker, pixel_mm), PATCHES[rng.integers(3)].reshape(3, 1, 1) * cloth)


def _dark_corners(
    rng: np.random.Generator, image: FloatArray, points: FloatArray, pixel_mm: float
) -> FloatArray:
    """The round field of view of a dermoscope: black outside."""
    radius = rng.uniform(0.50, 0.66) * points.shape[1] * pixel_mm
    outside = 1 - coverage(ellipsoid(points, rng.normal(0, 0.3, 2), (radius, radius)), rng.uniform(0.3, 1.5))
    return paint(image, outside, 0.02)


def _photograph(rng: np.random.Generator, image: FloatArray, points: FloatArray, site: Site) -> FloatArray:
    """Vignetting, exposure, colour, blur and noise; float32 [3, rows, columns] of whole numbers."""
    eccentricity = np.square(points).sum(0) / np.square(points).sum(0).max()
    brightness = float(np.percentile(image.mean(0), 80))
    exposure = rng.uniform(0.60, 0.85) / brightness  # the camera's own control
    image = image * (1 - rng.uniform(0.05, 0.35) * eccentricity) * exposure
    balance = np.array(site.white_balance) * rng.normal(1, 0.03, 3)
    image = np.clip(image * balance.reshape(3, 1, 1), 0, 1) ** (site.gamma * rng.uniform(0.85, 1.15))
    image = np.stack([blur(channel, site.fwhm_voxels * rng.uniform(0.7, 1.5)) for channel in image])
    noise = rng.normal(0, site.noise, image.shape) * np.sqrt(image + 0.1)  # of photons and of read-out
    noisy = image + noise
    return np.rint(np.clip(noisy, 0, 1) * 255).astype(np.float32)
