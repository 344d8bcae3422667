"""Phantom of a glioblastoma in multi-parametric MRI: T1, T1 with contrast agent, T2, FLAIR; nested regions.

A part of a brain (folded cortex, white matter, ventricles, deep grey matter) holds one tumour in three
shells: a core of necrosis, an enhancing rim of uneven thickness, and oedema that spreads along the white
matter, spares most of the cortex and does not cross the midline. Labels are 1 (oedema), 2 (necrosis and
other core that does not enhance) and 3 (enhancing). What is learnt are nested regions, as in nnU-Net's form
of BraTS: whole tumour (1, 2, 3), tumour core (2, 3), enhancing tumour (3).

Cases of one patient are follow-ups: same brain and tumour, grown, in a new scan registered to the first.
Axes: x to the right, y forward, z up.

Signals follow from relaxation, per tissue and sequence: inversion recovery `1 - 2 exp(-TI / T1) +
exp(-TR / T1)` or saturation recovery, times proton density, times `exp(-TE / T2)`. The contrast agent
shortens T1. Thus the order of the tissues in each sequence comes by itself:

=======  =========================================================================
T1       white > grey matter > oedema, necrosis and fluid darkest
T1ce     as T1, but the rim outshines white matter
T2       fluid > necrosis > oedema > rim > grey > white matter
FLAIR    oedema brightest, fluid nearly black, necrosis between
=======  =========================================================================

Where the numbers come from; none is fitted to a dataset that this package is evaluated on.

- T1 832 and 1331 ms, T2 80 and 110 ms of white and grey matter at 3 T: Wansapura et al. 1999; T1 of about
  4 s for fluid, proton densities as in the phantom of the hippocampus.
- the agent lowers T1 of the enhancing tumour by 838 +- 210 ms and of the oedema by 123 +- 74 ms: Müller et
  al. 2020 (Quantitative T1 mapping indicates tumor infiltration beyond the enhancing part of glioblastomas).
  T1 and T2 of oedema, tumour and necrosis before it (1500 and 160, 1400 and 130, 2500 and 250 ms) are round
  guesses: all longer than those of grey matter, and rising in that direction.
- the core grows by 1.4 % of its volume a day (doubles in 50 days), with a spread: Stensjøen et al. 2015
  (Growth dynamics of untreated glioblastomas in vivo). Its volume before, log-normal with a median of 27 ml,
  follow-ups two to six weeks apart, a rim of 3 to 8 mm and oedema 4 to 15 mm wide are round guesses.
- brain of 132 to 144 x 160 x 176 mm, ribbon of 2.5 mm and more with sulci 10 to 15 mm apart (Fischl and Dale
  2000; drawn thicker, because a voxel is 2 mm), ventricles: layout drawn by hand after atlases.
- skull-stripped, co-registered scans of many protocols, some with thick slices: Menze et al. 2015. That a
  quarter of the patients keeps the skull is a round guess.
- bias field and Rician noise as in the phantom of the hippocampus.

    >>> scan = KIND.render(Patient(kind="mpmri", seed=1, index=0), 0, (24, 24, 18))
    >>> scan.image.shape, sorted(set(scan.segmentation.ravel().tolist()))
    ((4, 24, 24, 18), [0, 1, 2, 3])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

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

TEMPLATE_SHAPE = (64, 64, 48)
SPACING_MM = (2.0, 2.0, 2.0)
OEDEMA, NECROSIS, ENHANCING = 1, 2, 3
SEQUENCES = ("T1", "T1ce", "T2", "FLAIR")
GROWTH_PER_DAY = 0.014  # of the volume, Stensjøen et al. 2015
FOLD_MM = 4.7  # |smooth noise of 7.5 mm knots| times this is about the distance from its zero set
SKULL_MM, SCALP_MM, SKIN_MM = 3.0, 9.0, 15.0  # where bone, fat and air begin, outside the brain


@dataclass(frozen=True)
class Tissue:
    """Relaxation times in ms and proton density; `agent_ms` is how much the contrast agent shortens T1."""

    t1_ms: float
    t2_ms: float
    density: float
    agent_ms: float = 0.0


TISSUES = {
    "white": Tissue(832, 80, 0.70, agent_ms=30),
    "grey": Tissue(1331, 110, 0.82, agent_ms=40),
    "fluid": Tissue(4000, 2000, 1.0),
    "oedema": Tissue(1500, 160, 0.90, agent_ms=123),
    "necrosis": Tissue(2500, 250, 0.95),
    "enhancing": Tissue(1400, 130, 0.88, agent_ms=838),
    "fat": Tissue(370, 100, 0.90),
    "vessel": Tissue(1600, 15, 0.85, agent_ms=1200),  # flowing blood: dark in spin echoes, bright with the agent
    "bone": Tissue(1000, 15, 0.15),
}


@dataclass(frozen=True)
class Sequence:
    """Times of a sequence in ms; `inversion_ms` 0 is saturation recovery."""

    repetition_ms: float
    echo_ms: float
    inversion_ms: float = 0.0


@dataclass(frozen=True)
class Site:
    """One scanner: its four sequences, slices of T2 and FLAIR, resolution, noise (of white matter), skull kept."""

    t1: Sequence
    t2: Sequence
    flair: Sequence
    thick_slices: bool
    fwhm_voxels: float
    noise: float
    gain: float


SITES = (
    Site(Sequence(2300, 3, 900), Sequence(5000, 95), Sequence(9000, 120, 2500), False, 0.9, 0.03, 500),
    Site(Sequence(600, 12), Sequence(4000, 100), Sequence(8000, 125, 2350), True, 1.1, 0.04, 220),
    Site(Sequence(2000, 3, 1000), Sequence(6000, 85), Sequence(5500, 140, 1850), True, 1.0, 0.025, 900),
)


@dataclass(frozen=True)
class Anatomy:
    """What all scans of a patient share; lengths in mm, places from the middle of the brain."""

    half_axes_mm: FloatArray
    centre_mm: FloatArray
    core_mm: float
    elongation: FloatArray
    rim_mm: float
    oedema_mm: float
    septa: float
    growth_per_day: float
    ventricle_mm: float
    sulcus_mm: float
    stripped: bool

    @property
    def side(self) -> float:
        """The tumour's hemisphere: 1 for right, -1 for left."""
        return float(np.sign(self.centre_mm[0]))


def render(patient: Patient, case: int, shape: Shape | None = None) -> Scan:
    """One scan.

    Args:
        patient: Whose.
        case: 0 is the first scan, more are follow-ups.
        shape: Voxels along x, y, z; the same 128 x 128 x 96 mm are drawn more coarsely or finely. None is
            64 x 64 x 48 voxels of 2 mm.

    Returns:
        Scan with image float32 [4, x, y, z] and segmentation uint8 [x, y, z].
    """
    shared, rng = patient.shared(), patient.case(case)
    site, anatomy = SITES[shared.integers(len(SITES))], _draw_anatomy(shared)
    size = TEMPLATE_SHAPE if shape is None else shape
    voxel_mm = max(2.0 * whole / given for whole, given in zip(TEMPLATE_SHAPE, size, strict=True))
    points = _place(shared, rng, coordinates(size, voxel_mm), anatomy, voxel_mm)
    radius_mm = _grown(rng, anatomy, case)
    surface = ellipsoid(points, (0, 0, 0), anatomy.half_axes_mm)
    signal = _signals(shared, site)
    image, refuge = _brain(shared, points, surface, anatomy, radius_mm, signal, voxel_mm)
    tumour = _tumour(shared, rng, points, surface, refuge, anatomy, radius_mm, voxel_mm)
    image = _paint_tumour(rng, image, tumour, anatomy, signal, voxel_mm)
    return Scan(_acquire(rng, image, surface, site, anatomy, signal, voxel_mm), tumour.labels, SPACING_MM)


KIND = Kind(
    name="mpmri",
    title="PhantomGlioma",
    description="Phantom of glioblastoma in multi-parametric MRI (whole tumour, tumour core, enhancing tumour)",
    dimensions=3,
    dataset_id=306,
    channel_names=SEQUENCES,
    labels={
        "background": 0,
        "whole tumour": (OEDEMA, NECROSIS, ENHANCING),
        "tumour core": (NECROSIS, ENHANCING),
        "enhancing tumour": ENHANCING,
    },
    file_ending=".nii.gz",
    smallest_shape=(24, 24, 18),
    cases_per_patient=(1, 2),
    render=render,
    regions_class_order=(OEDEMA, NECROSIS, ENHANCING),  # whole tumour is written first, enhancing tumour last
)


# ---- the patient ---------------------------------------------------------------------------------


def _draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """The patient's brain and tumour; sources in the module docstring."""
    half_axes = rng.uniform([66, 80, 58], [72, 88, 66])
    centre = np.array([rng.choice([-1, 1]) * rng.uniform(24, 44), rng.uniform(-48, 44), rng.uniform(-14, 30)])
    depth = float(np.linalg.norm(centre / half_axes))
    elongation = np.exp(rng.normal(0, 0.15, 3))
    volume_ml = float(np.clip(27 * np.exp(rng.normal(0, 0.6)), 10, 80))
    return Anatomy(
        half_axes_mm=half_axes,
        centre_mm=centre * min(1.0, 0.62 / depth),
        core_mm=10 * (3 * volume_ml / (4 * np.pi)) ** (1 / 3),
        elongation=elongation / elongation.prod() ** (1 / 3),
        rim_mm=rng.uniform(3, 8),
        oedema_mm=rng.uniform(4, 15),
        septa=float(rng.random() < 0.4) * rng.uniform(0.5, 1.5),
        growth_per_day=GROWTH_PER_DAY * rng.gamma(4.0, 0.25),
        ventricle_mm=rng.uniform(3.0, 7.5),
        sulcus_mm=rng.uniform(0.3, 1.1),
        stripped=bool(rng.random() < 0.75),
    )


def _grown(rng: np.random.Generator, anatomy: Anatomy, case: int) -> float:
    """Radius of the core in mm at this case: two to six weeks after the one before, at most 90 ml."""
    days = rng.uniform(14, 42)
    growth = np.exp(anatomy.growth_per_day * days * case / 3)  # of the radius: a third of the volume's rate
    return float(min(anatomy.core_mm * growth, 27.8))


def _place(
    shared: np.random.Generator, rng: np.random.Generator, points: FloatArray, anatomy: Anatomy, voxel_mm: float
) -> FloatArray:
    """Places from the middle of the brain; the field of view lies between it and the tumour, follow-ups nearly so."""
    middle = 0.5 * anatomy.centre_mm + shared.normal(0, 3, 3)
    turned = pose(points, shared.normal(0, 4, 3).tolist(), -middle)
    bent = turned + displacement(shared, points.shape[1:], voxel_mm, 1.5, 24.0)
    return pose(bent, rng.normal(0, 0.7, 3).tolist(), rng.normal(0, 0.5, 3))


def _signals(rng: np.random.Generator, site: Site) -> dict[str, FloatArray]:
    """Signal of each tissue in the four sequences over that of white matter, [4, 1, 1, 1]; T1 and T2 vary by 4 %."""
    values = {}
    for name, tissue in TISSUES.items():
        t1, t2 = tissue.t1_ms * rng.normal(1, 0.04), tissue.t2_ms * rng.normal(1, 0.04)
        agent = np.clip(tissue.agent_ms * rng.normal(1, 0.2), 0, 0.75 * t1)  # 210 of 838 ms, trimmed
        times = (site.t1, t1), (site.t1, t1 - agent), (site.t2, t1), (site.flair, t1)
        values[name] = tissue.density * np.array([_signal(sequence, one, t2) for sequence, one in times])
    return {name: (value / values["white"]).astype(np.float32).reshape(4, 1, 1, 1) for name, value in values.items()}


def _signal(sequence: Sequence, t1_ms: float, t2_ms: float) -> float:
    """Magnitude after inversion or saturation recovery and a (spin) echo, per proton."""
    recovered = 1 - np.exp(-sequence.repetition_ms / t1_ms)
    if sequence.inversion_ms:
        recovered = 1 - 2 * np.exp(-sequence.inversion_ms / t1_ms) + np.exp(-sequence.repetition_ms / t1_ms)
    return float(abs(recovered) * np.exp(-sequence.echo_ms / t2_ms))


# ---- the brain -----------------------------------------------------------------------------------


def _brain(
    rng: np.random.Generator,
    points: FloatArray,
    surface: FloatArray,
    anatomy: Anatomy,
    radius_mm: float,
    signal: dict[str, FloatArray],
    voxel_mm: float,
) -> tuple[FloatArray, FloatArray]:
    """The head without tumour [4, x, y, z], and how little each place takes up oedema, 0 to 1 [x, y, z]."""
    image = np.broadcast_to(signal["white"], (4, *surface.shape))
    pushed = _mass_effect(points, anatomy, radius_mm)
    pushed = np.stack([np.abs(pushed[0]), pushed[1], pushed[2]])  # the hemispheres are alike but for the tumour
    cortex, sulci = _cortex(rng, points, surface, anatomy, voxel_mm)
    image = paint(paint(image, cortex, signal["grey"]), sulci, signal["fluid"])
    veins = np.clip(smooth_noise(rng, surface.shape, voxel_mm, 5.0) - 1.2, 0, 1) * np.maximum(sulci, 0.15 * cortex)
    image = paint(image, veins, signal["vessel"])
    for distance in _nuclei(rng, pushed):
        image = paint(image, 0.8 * coverage(distance, voxel_mm), signal["grey"])
    chambers = coverage(_ventricles(pushed, anatomy), voxel_mm)
    image = paint(image, chambers, signal["fluid"])
    plexus = np.clip(smooth_noise(rng, surface.shape, voxel_mm, 6.0) - 1.0, 0, 1) * chambers
    image = paint(image, plexus, signal["vessel"])
    return _wrap(image, surface, signal, voxel_mm), np.clip(0.8 * cortex + sulci + 2 * chambers, 0, 2)


def _mass_effect(points: FloatArray, anatomy: Anatomy, radius_mm: float) -> FloatArray:
    """Places before the tumour pushed them aside: half of its radius at its surface, less farther away."""
    away = points - anatomy.centre_mm.reshape(3, 1, 1, 1).astype(np.float32)
    distance = np.maximum(np.sqrt(np.square(away).sum(0)), 1e-3)
    push = 0.5 * np.minimum(distance, radius_mm) * np.exp(-np.maximum(distance - radius_mm, 0) / (0.9 * radius_mm))
    return points - away / distance * push


def _cortex(
    rng: np.random.Generator, points: FloatArray, surface: FloatArray, anatomy: Anatomy, voxel_mm: float
) -> tuple[FloatArray, FloatArray]:
    """Fractions of grey matter and of fluid: a ribbon below the surface and along sulci and the great fissure."""
    fold = np.abs(smooth_noise(rng, surface.shape, voxel_mm, 7.5)) * FOLD_MM
    deep = coverage(-surface - 20, 8.0)  # sulci reach some 20 mm down
    # No great fissure where the callosum, the thalami and the third ventricle lie.
    midline = np.abs(points[0]) + 60 * coverage(np.maximum(points[2] - 24, np.abs(points[1]) - 48), 10.0)
    grey = np.maximum(deep * coverage(fold - 2.8, voxel_mm), coverage(-surface - 3.0, voxel_mm))
    grey = np.maximum(grey, coverage(midline - 4.0, voxel_mm))
    opening = anatomy.sulcus_mm * (1 + 0.6 * smooth_noise(rng, surface.shape, voxel_mm, 12.0))
    fluid = np.maximum(deep * coverage(fold - opening, voxel_mm), coverage(midline - anatomy.sulcus_mm, voxel_mm))
    return grey, np.maximum(fluid, coverage(-surface, voxel_mm))


def _nuclei(rng: np.random.Generator, points: FloatArray) -> list[FloatArray]:
    """Signed distances to thalamus, putamen and caudate nucleus; places are counted from the midline."""
    places = ((11, -10, 2), (9, 15, 9)), ((26, 6, 0), (6, 17, 10)), ((13, 22, 6), (5, 10, 8))
    return [ellipsoid(points, np.array(place) + rng.normal(0, 1, 3), radii) for place, radii in places]


def _ventricles(points: FloatArray, anatomy: Anatomy) -> FloatArray:
    """Signed distance to the lateral ventricle (frontal horn, body, atrium) and the third."""
    along = np.linspace(0, 1, 16)
    arch = np.stack([5 + 16 * along**2, 30 - 72 * along, 8 + 9 * np.sin(np.pi * along)], axis=1)
    radii = anatomy.ventricle_mm * (0.8 + 0.5 * along)
    third = ellipsoid(points, (0, -6, -2), (0.4 * anatomy.ventricle_mm, 13, 9))
    return np.minimum(third, tube(points, arch, radii))


def _wrap(image: FloatArray, surface: FloatArray, signal: dict[str, FloatArray], voxel_mm: float) -> FloatArray:
    """Bone, fat of the scalp and air around the brain and its fluid."""
    image = paint(image, coverage(SKULL_MM - surface, voxel_mm), signal["bone"])
    image = paint(image, coverage(SCALP_MM - surface, voxel_mm), signal["fat"])
    return paint(image, coverage(SKIN_MM - surface, voxel_mm), 0.0)


# ---- the tumour ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tumour:
    """Signed distances in mm [x, y, z] (oedema includes the core, the core the necrosis), and the labels."""

    oedema: FloatArray
    core: FloatArray
    necrosis: FloatArray

    @property
    def labels(self) -> LabelArray:
        """Nested by construction: a voxel takes the innermost shell that holds its centre."""
        labels = np.where(self.oedema < 0, OEDEMA, 0)
        return np.where(self.core < 0, np.where(self.necrosis < 0, NECROSIS, ENHANCING), labels).astype(np.uint8)


def _tumour(
    shared: np.random.Generator,
    rng: np.random.Generator,
    points: FloatArray,
    surface: FloatArray,
    refuge: FloatArray,
    anatomy: Anatomy,
    radius_mm: float,
    voxel_mm: float,
) -> Tumour:
    """Core, rim and oedema of one patient, changed a little since the last scan."""
    size = surface.shape
    bent = points + displacement(shared, size, voxel_mm, 2.5, 15.0) + displacement(rng, size, voxel_mm, 0.4, 8.0)
    core = ellipsoid(bent, anatomy.centre_mm, radius_mm * anatomy.elongation)
    core = np.maximum(core + 1.2 * smooth_noise(shared, size, voxel_mm, 6.0), surface + 3)
    rim = anatomy.rim_mm * np.exp(0.35 * smooth_noise(shared, size, voxel_mm, 12.0))
    septa = 1.2 * anatomy.septa - 5 * np.abs(smooth_noise(shared, size, voxel_mm, 9.0))
    necrosis = np.maximum(core + np.clip(rim, 1.2 * voxel_mm, 0.55 * radius_mm), septa)
    deepest = points.reshape(3, -1)[:, int(np.argmin(core))]
    necrosis = np.minimum(necrosis, ellipsoid(points, deepest, [max(2.0, 0.6 * voxel_mm)] * 3))
    fingers = np.clip(1 + 0.5 * smooth_noise(shared, size, voxel_mm, 16.0), 0.2, 2.0)
    across = np.maximum(-anatomy.side * points[0], 0)
    spread = core - np.maximum(anatomy.oedema_mm * fingers * (1 - 0.5 * refuge), 0) + 4 * refuge + 2 * across
    oedema = _attached(np.minimum(np.maximum(spread, surface + 1), core), core)
    return Tumour(oedema=oedema, core=core, necrosis=necrosis)


def _attached(oedema: FloatArray, core: FloatArray) -> FloatArray:
    """The same distances, without islands that do not touch the core."""
    kept = ndimage.binary_propagation(core < 0, mask=oedema < 0)
    return np.where(kept, oedema, np.maximum(oedema, 5.0))


def _paint_tumour(
    rng: np.random.Generator,
    image: FloatArray,
    tumour: Tumour,
    anatomy: Anatomy,
    signal: dict[str, FloatArray],
    voxel_mm: float,
) -> FloatArray:
    """Oedema lets the tissue below shine through, more so at its border; the core is opaque but uneven."""
    inwards = np.clip(-tumour.oedema / (0.6 * anatomy.oedema_mm), 0, 1)
    image = paint(image, (0.6 + 0.35 * inwards) * coverage(tumour.oedema, 2 * voxel_mm), signal["oedema"])
    patches = np.clip(0.8 + 0.15 * smooth_noise(rng, tumour.core.shape, voxel_mm, 7.0), 0.4, 1)
    rim = signal["oedema"] + patches * (signal["enhancing"] - signal["oedema"])
    image = paint(image, coverage(tumour.core, voxel_mm), rim)
    debris = np.clip(0.75 + 0.2 * smooth_noise(rng, tumour.core.shape, voxel_mm, 8.0), 0.3, 1)
    pulp = signal["oedema"] + debris * (signal["necrosis"] - signal["oedema"])
    inside = coverage(np.maximum(tumour.necrosis, tumour.core), voxel_mm)
    return paint(image, inside, pulp)


# ---- the scanner ---------------------------------------------------------------------------------


def _acquire(
    rng: np.random.Generator,
    image: FloatArray,
    surface: FloatArray,
    site: Site,
    anatomy: Anatomy,
    signal: dict[str, FloatArray],
    voxel_mm: float,
) -> FloatArray:
    """Texture, slices, point spread, coil, noise, gain, and the brain mask of stripped scans; whole numbers."""
    slow, fine = (smooth_noise(rng, surface.shape, voxel_mm, knots_mm) for knots_mm in (14.0, 4.0))
    image = image * (1 + 0.03 * slow + 0.03 * fine)
    mask = np.ones(surface.shape, dtype=np.float32)
    if anatomy.stripped:  # the mask's error: a millimetre
        mask = (surface + smooth_noise(rng, surface.shape, voxel_mm, 20.0) < 1.5).astype(np.float32)
    channels = []
    for sequence, channel in zip(SEQUENCES, image, strict=True):
        if site.thick_slices and sequence in ("T2", "FLAIR"):
            channel = ndimage.uniform_filter1d(channel, 3, axis=2, mode="nearest")
        channel = blur(channel, site.fwhm_voxels * rng.uniform(0.85, 1.15))
        channel = channel * bias_field(rng, channel.shape, voxel_mm, rng.uniform(0.1, 0.35))
        channel = rician(rng, channel, site.noise * rng.uniform(0.8, 1.3)) * mask
        channels.append(np.rint(channel * site.gain * rng.uniform(0.7, 1.4)))
    return np.stack(channels).astype(np.float32)
