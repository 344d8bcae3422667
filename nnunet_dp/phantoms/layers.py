"""Phantom of the macula in optical coherence tomography (OCT): grey B-scans, seven stacked layers.

From the dark vitreous (top) to the choroid (bottom): `NFL`, `GCL-IPL`, `INL`, `OPL`, `ONL-ISM`, `ISE`,
`OS-RPE`, the layers which Chiu et al. (2015) outline. A table gives the thickness of each layer by its
distance from the fovea, towards the nose and away from it; patients vary about it; the layers are stacked
on Bruch's membrane, which is tilted, bent and may carry drusen. Cases of one patient are neighbouring
B-scans of one eye: the next one lies 0.12 mm further along the retina.

The image is made as the instrument makes it: intensity backscattered by each layer, speckle on it, shadows
of vessels below them, a noise floor, then the logarithm. Rows run down, columns along the retina.

Design note: there is no class for fluid, though Chiu et al. have one. Every case must hold every class, and
eyes of which all are diseased would teach that fluid is always there; healthy eyes are the better start.

Where the numbers come from; none is fitted to a dataset that this package is evaluated on.

- thickness of the layers in the foveal, pericentral and peripheral rings, nasal and temporal, with their
  spread of 6 to 15 %: BMC Ophthalmology 2018, 18:169, table 6 (Spectralis). A ring stands for its mean
  radius: 1/3, 1.08 and 2.33 mm. The foveola itself is a round guess after its textbook look: hardly any
  inner retina.
- that table has one number from the external limiting membrane to the end of the pigment epithelium; 18 %
  of it for the inner segments' myoid (ISM), 27 % for the ellipsoid (ISE) and 55 % for OS-RPE is a round
  guess.
- order of brightness: NFL, ISE and pigment epithelium brightest, plexiform layers brighter than nuclear
  ones, ONL darkest, vitreous darker still (Chen et al. 2013, Quantitative analysis of retinal layer optical
  intensities). The decibels are round guesses within the 35 to 40 dB which instruments show.
- speckle: intensities are exponentially distributed (Schmitt, Xiang and Yung 1999), hence gamma after
  averaging of `looks` frames.
- vessels of 40 to 130 micrometres outside a foveal avascular zone of about 0.5 mm; tilt, curvature and
  drusen (bumps of 20 to 70 micrometres, in a fifth of the eyes): round guesses.

    >>> scan = KIND.render(Patient(kind="layers", seed=1, index=0), 0, (48, 64))
    >>> scan.image.shape, sorted(set(scan.segmentation.ravel().tolist()))
    ((1, 48, 64), [0, 1, 2, 3, 4, 5, 6, 7])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from .anatomy import FloatArray, Kind, LabelArray, Patient, Scan, Shape, blur, coverage, paint, smooth_noise

TEMPLATE_SHAPE = (128, 192)
NAMES = ("NFL", "GCL-IPL", "INL", "OPL", "ONL-ISM", "ISE", "OS-RPE")
BSCAN_STEP_MM = 0.12  # Spectralis volumes: 60 to 240 micrometres
FOVEOLA_MM = 0.1  # the floor of the pit is round, not pointed
KNOTS_MM = np.array([0, 1 / 3, 1.08, 2.33, 3.6])  # foveola, mean radii of the three rings, beyond
# Thickness in micrometres at the knots (BMC Ophthalmology 2018, 18:169; first and last column: see above). Outermost
# segments and pigment epithelium (last row) are still in one.
NASAL_UM = np.array(
    [
        [3, 10.8, 20.1, 46.1, 65],
        [8, 30.6, 92.5, 71.7, 55],
        [5, 15.3, 38.5, 35.1, 31],
        [12, 23.5, 31.9, 28.2, 27],
        [105, 88.4, 72.5, 55.9, 51],
        [93, 90.2, 83.9, 79.8, 78],
    ]
)
TEMPORAL_UM = np.array(
    [
        [3, 10.8, 16.8, 19.2, 19],
        [8, 30.6, 87.7, 69.5, 54],
        [5, 15.3, 36.5, 33.9, 31],
        [12, 23.5, 31.1, 26.4, 25],
        [105, 88.4, 70.0, 55.8, 50],
        [93, 90.2, 82.6, 79.8, 78],
    ]
)
PHOTORECEPTOR_SHARES = np.array([0.18, 0.27, 0.55])  # ISM (counted with the ONL), ISE, OS-RPE
SPREAD = np.array([0.15, 0.08, 0.09, 0.12, 0.12, 0.06, 0.05])  # between patients, relative; the table's
LAYER_DB = np.array([27.0, 19.0, 14.0, 20.5, 10.0, 27.5, 20.0])  # above the noise floor
LIMITING_MEMBRANE_DB, PIGMENT_DB, CHOROID_DB = 16.0, 29.0, 21.0


@dataclass(frozen=True)
class Site:
    """One instrument: frames averaged, lateral and axial resolution, decibels shown, strength of the signal."""

    looks: float
    fwhm_voxels: float
    range_db: float
    signal_db: float


SITES = (
    Site(looks=12.0, fwhm_voxels=1.0, range_db=34.0, signal_db=0.0),
    Site(looks=4.0, fwhm_voxels=1.3, range_db=38.0, signal_db=-2.0),
    Site(looks=6.0, fwhm_voxels=0.8, range_db=36.0, signal_db=2.0),
)


@dataclass(frozen=True)
class Eye:
    """What the B-scans of one eye share; lengths in mm or micrometres as the names say.

    Attributes:
        nasal_side: 1 if the nose is to the right, else -1.
        relative: Thickness of each layer over the table's, [7].
        width_mm: Part of the retina that a B-scan shows.
        depth_um: Depth that it shows.
        first_scan_mm: Distance of case 0 from the fovea.
        fovea_mm: Distance of the fovea from the middle of the B-scan.
        tilt_um, sag_um: How far Bruch's membrane drops from side to side, and bends between.
        drusen: Number of them.
        vessels: Number of them.
    """

    nasal_side: int
    relative: FloatArray
    width_mm: float
    depth_um: float
    first_scan_mm: float
    fovea_mm: float
    tilt_um: float
    sag_um: float
    drusen: int
    vessels: int


def render(patient: Patient, case: int, shape: Shape | None = None) -> Scan:
    """One B-scan.

    Args:
        patient: Whose eye.
        case: Which B-scan; they are neighbours.
        shape: Pixels in depth and along the retina; None is 128 x 192. Other shapes show the same field.

    Returns:
        Scan with image float32 [1, depth, along], whole numbers from 0 to 255, and segmentation uint8.
    """
    shared, rng = patient.shared(), patient.case(case)
    site, eye = SITES[shared.integers(len(SITES))], _draw_eye(shared)
    size = TEMPLATE_SHAPE if shape is None else shape
    depth_um = (np.arange(size[0], dtype=np.float32)[:, None] + 0.5) * (eye.depth_um / size[0])
    along_mm = (np.arange(size[1], dtype=np.float32) + 0.5) * (eye.width_mm / size[1]) - eye.width_mm / 2
    surfaces_um = _surfaces(shared, rng, eye, along_mm, case)
    signal_db = _reflectivity(rng, depth_um, surfaces_um, eye)
    signal_db = signal_db - _shadows(shared, eye, depth_um, along_mm, surfaces_um, case)
    return Scan(_acquire(rng, signal_db, site)[None], _labels(depth_um, surfaces_um), (1.0, 1.0))


KIND = Kind(
    name="layers",
    title="PhantomLayers",
    description="Phantom of the layers of the macula in optical coherence tomography",
    dimensions=2,
    dataset_id=305,
    channel_names=("OCT",),
    labels={"background": 0, **{name: value for value, name in enumerate(NAMES, start=1)}},
    file_ending=".png",
    smallest_shape=(48, 48),
    cases_per_patient=(1, 3),
    render=render,
)


# ---- anatomy -------------------------------------------------------------------------------------


def _draw_eye(rng: np.random.Generator) -> Eye:
    """The patient's eye; sources in the module docstring."""
    common = rng.normal(0, 0.03)  # total thickness varies by 5 to 6 % in the table
    return Eye(
        nasal_side=int(rng.choice([-1, 1])),
        relative=np.clip(np.exp(common + SPREAD * rng.normal(0, 1, len(SPREAD))), 0.6, 1.6),
        width_mm=rng.uniform(5.0, 6.2),
        depth_um=rng.uniform(620, 740),
        first_scan_mm=rng.uniform(-0.6, 0.4),
        fovea_mm=rng.normal(0, 0.35),
        tilt_um=float(np.clip(rng.normal(0, 35), -80, 80)),
        sag_um=rng.uniform(-10, 45),
        drusen=int(rng.integers(1, 5)) if rng.random() < 0.2 else 0,
        vessels=int(rng.integers(3, 8)),
    )


def _surfaces(
    shared: np.random.Generator, rng: np.random.Generator, eye: Eye, along_mm: FloatArray, case: int
) -> FloatArray:
    """Depth in micrometres of the eight surfaces between and around the layers, [8, columns], top first."""
    thickness = _thickness(eye, along_mm, case) * _unevenness(shared, rng, eye, along_mm)
    bruch = _bruch(shared, eye, along_mm) + 4 * _along(rng, along_mm, 1.5)
    drusen = _drusen(shared, eye, along_mm, case)
    thickness[6] += drusen  # between Bruch's membrane and the pigment epithelium
    thickness[4] = np.maximum(thickness[4] - 0.7 * drusen, 0.3 * thickness[4])  # the ONL thins above them
    above = np.cumsum(thickness[::-1], axis=0)[::-1]  # from the top of each layer down to Bruch's membrane
    return np.concatenate([bruch - above, bruch[None]])


def _thickness(eye: Eye, along_mm: FloatArray, case: int) -> FloatArray:
    """Thickness of the seven layers in micrometres, [7, columns], smooth in the two directions of the retina."""
    across_mm = eye.first_scan_mm + BSCAN_STEP_MM * case
    beside_mm = along_mm - eye.fovea_mm
    eccentricity = np.hypot(beside_mm, np.hypot(across_mm, FOVEOLA_MM))
    towards_nose = 0.5 + 0.5 * eye.nasal_side * beside_mm / eccentricity
    nasal, temporal = (_profile(table, eccentricity) for table in (NASAL_UM, TEMPORAL_UM))
    six = towards_nose * nasal + (1 - towards_nose) * temporal
    outer = PHOTORECEPTOR_SHARES[:, None] * six[5]
    seven = np.concatenate([six[:4], six[4:5] + outer[:1], outer[1:]])
    return eye.relative[:, None] * seven


def _profile(table: FloatArray, eccentricity_mm: FloatArray) -> FloatArray:
    """A table's thickness at some distance from the fovea, monotone between its knots, [6, columns]."""
    mirrored = np.concatenate([-KNOTS_MM[:0:-1], KNOTS_MM])  # flat at the foveola
    values = np.concatenate([table[:, :0:-1], table], axis=1)
    return PchipInterpolator(mirrored, values, axis=1)(np.minimum(eccentricity_mm, KNOTS_MM[-1]))


def _unevenness(
    shared: np.random.Generator, rng: np.random.Generator, eye: Eye, along_mm: FloatArray
) -> FloatArray:
    """Relative variation along each layer, [7, columns]: 6 % of the eye's own, 2 % of the B-scan's."""
    own = np.stack([_along(shared, along_mm, 0.8) for _ in SPREAD])
    new = np.stack([_along(rng, along_mm, 0.5) for _ in SPREAD])
    return np.clip(1 + 0.06 * own + 0.02 * new, 0.6, 1.4)


def _along(rng: np.random.Generator, along_mm: FloatArray, knots_mm: float) -> FloatArray:
    """A smooth random function of the place along the retina, variance 1, [columns]."""
    return smooth_noise(rng, along_mm.shape, float(along_mm[1] - along_mm[0]), knots_mm)


def _bruch(shared: np.random.Generator, eye: Eye, along_mm: FloatArray) -> FloatArray:
    """Depth of Bruch's membrane in micrometres, [columns]: tilted, bent, a little wavy."""
    relative = 2 * along_mm / eye.width_mm
    wave = 5 * _along(shared, along_mm, 1.2)
    level = 0.68 * eye.depth_um
    return level + 0.5 * eye.tilt_um * relative - eye.sag_um * (relative**2 - 1 / 3) + wave


def _drusen(shared: np.random.Generator, eye: Eye, along_mm: FloatArray, case: int) -> FloatArray:
    """Height in micrometres of the bumps under the pigment epithelium, [columns]."""
    height = np.zeros_like(along_mm)
    for _ in range(eye.drusen):
        place, across = shared.uniform(-2, 2), shared.uniform(0, 0.3)
        peak, radius = shared.uniform(20, 70), shared.uniform(0.08, 0.25)
        distance = np.hypot(along_mm - place, BSCAN_STEP_MM * case - across)
        height = np.maximum(height, peak * np.exp(-0.5 * np.square(distance / radius)))
    return height


def _labels(depth_um: FloatArray, surfaces_um: FloatArray) -> LabelArray:
    """1 for the uppermost layer to 7 for the lowest, 0 above and below; a pixel belongs where its centre lies."""
    passed = (depth_um[None] >= surfaces_um[:, None]).sum(0)
    return np.where(passed > len(NAMES), 0, passed).astype(np.uint8)


# ---- image ---------------------------------------------------------------------------------------


def _reflectivity(
    rng: np.random.Generator, depth_um: FloatArray, surfaces_um: FloatArray, eye: Eye
) -> FloatArray:
    """Decibels above the noise floor before speckle, [depth, along]."""
    size = (len(depth_um), surfaces_um.shape[1])
    pixel_um = float(depth_um[1, 0] - depth_um[0, 0])
    image = np.full(size, rng.uniform(-14, -6), dtype=np.float32)  # vitreous: next to nothing
    levels = LAYER_DB + rng.normal(0, 0.8, len(LAYER_DB))
    for top, level in zip(surfaces_um, levels, strict=False):  # each layer covers all that lies below its top
        image = paint(image, coverage(top - depth_um, pixel_um), level)
    below = np.maximum(depth_um - surfaces_um[-1], 0)
    image = paint(image, coverage(surfaces_um[-1] - depth_um, pixel_um), _choroid(rng, below, eye, pixel_um))
    for line, level, thickness in _bands(surfaces_um, eye):
        image = paint(image, coverage(np.abs(depth_um - line) - thickness / 2, pixel_um), level)
    return image + 0.8 * _texture(rng, size)


def _bands(surfaces_um: FloatArray, eye: Eye) -> list[tuple[FloatArray, float, FloatArray | float]]:
    """(depth, decibels, thickness in micrometres) of what is drawn inside layers and is no class of its own."""
    plexiform = 0.45 * (surfaces_um[2] - surfaces_um[1])
    limiting_membrane = surfaces_um[5] - 17.0
    pigment = surfaces_um[6] + 34.0 * eye.relative[6]  # above drusen, if there are any
    return [
        (surfaces_um[2] - plexiform / 2, LAYER_DB[1] + 1.8, plexiform),  # the IPL outshines the GCL
        (limiting_membrane, LIMITING_MEMBRANE_DB, 6.0),
        (pigment, PIGMENT_DB, 18.0),  # 16 to 18 micrometres in the table
    ]


def _choroid(rng: np.random.Generator, below_um: FloatArray, eye: Eye, pixel_um: float) -> FloatArray:
    """Decibels under Bruch's membrane: mottled by vessels, fading as light is absorbed."""
    fading = rng.uniform(6, 16) * below_um / 200
    lumens = smooth_noise(rng, below_um.shape, pixel_um, 22.0)  # dark vessels, wider than deep in the eye
    mottle = 3.0 * lumens * np.clip(below_um / 25, 0, 1)
    return (CHOROID_DB - fading + np.clip(mottle, -7, 3)).astype(np.float32)


def _texture(rng: np.random.Generator, size: Shape) -> FloatArray:
    """Slow variation of the signal, from side to side more than in depth."""
    lateral = smooth_noise(rng, size[1:], 1.0, size[1] / 4)
    return 1.5 * lateral[None] + smooth_noise(rng, size, 1.0, 4.0)


def _shadows(
    shared: np.random.Generator,
    eye: Eye,
    depth_um: FloatArray,
    along_mm: FloatArray,
    surfaces_um: FloatArray,
    case: int,
) -> FloatArray:
    """Decibels lost below inner vessels (gained inside them, where blood scatters), [depth, along]."""
    lost = np.zeros((len(depth_um), len(along_mm)), dtype=np.float32)
    pixel_um = float(depth_um[1, 0] - depth_um[0, 0])
    for _ in range(eye.vessels):
        side, away = shared.choice([-1, 1]), shared.uniform(0.45, 2.9)
        slope, diameter_um = shared.normal(0, 0.6), shared.uniform(40, 130)
        strength, place = shared.uniform(3, 9), eye.fovea_mm + side * away
        beside_um = 1000 * (along_mm - place - slope * BSCAN_STEP_MM * case)
        dark = np.exp(-0.5 * np.square(beside_um / (0.45 * diameter_um)))
        centre = 0.6 * surfaces_um[1] + 0.4 * surfaces_um[0] + 0.2 * diameter_um
        lost += strength * dark * coverage(centre - depth_um, 2 * pixel_um)
        lumen = coverage(np.hypot(beside_um, depth_um - centre) - diameter_um / 3, 2 * pixel_um)
        lost -= 0.7 * strength * lumen
    return lost


def _acquire(rng: np.random.Generator, signal_db: FloatArray, site: Site) -> FloatArray:
    """Point spread, speckle, noise floor and logarithm; float32 [depth, along] of whole numbers, 0 to 255."""
    intensity = blur(10 ** ((signal_db + site.signal_db) / 10), site.fwhm_voxels)
    looks = site.looks * rng.uniform(0.8, 1.3)
    floor = rng.gamma(looks, 1 / looks, intensity.shape)
    seen = intensity * rng.gamma(looks, 1 / looks, intensity.shape) + floor
    shown = 10 * np.log10(np.maximum(seen, 1e-3)) + rng.uniform(1.5, 4.5)  # the operator's brightness
    return np.rint(np.clip(shown / site.range_db, 0, 1) * 255).astype(np.float32)
