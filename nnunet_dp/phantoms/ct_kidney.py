"""Phantom of a kidney with a tumour in computed tomography: Hounsfield units, two classes, `kidney` and `tumour`.

A bean (a bent tube with a sinus of fat, vessels and urine cut from its middle) lies in fat between spine, muscles of
the back, bowel, and liver or spleen; a lump grows in or on it. Each patient is scanned in one contrast phase: without
agent, cortex brighter than medulla, both equally bright, or urine brightest. Tumours look as their kind:

===========  ==============================================================
clear cell   uneven, as bright as cortex at first, with necrosis when large
papillary    even and dark in all phases
oncocytic    even, moderately bright, sometimes with a central scar
cystic       fluid, in a wall with septa that take up agent
===========  ==============================================================

`kidney` is cortex and medulla without the sinus; `tumour` covers it. Cases of one patient are the left and the right
kidney (which one comes first is random): same size, phase and scanner, each with a tumour of its own. Axes: x to the
right, y to the front, z up. A field of 102 x 102 x 128 mm is drawn about each kidney.

Where the numbers come from; none is fitted to a dataset that this package is evaluated on.

- length 108.5 +- 12.2 (right) and 111.3 +- 12.6 mm (left), here with the spread halved so that kidneys fit into the
  field, cortex 6.6 +- 1.9 mm: Glodny et al. 2009 (2068 kidneys in CT).
- parenchyma of 138 ml in women and 174 ml in men (median; quartiles 121 to 197): a population's MRI, J. Clin. Med.
  2024, 13(3):769.
- hypervascular tumours 34, 173, 149 and 98 HU (without agent, corticomedullary, nephrographic, excretory phase), +- 36:
  Urologia 2013, doi 10.5301/uj.5000256. Clear cell brightest, then oncocytoma, chromophobe, papillary (by some 54 HU
  brighter than without agent): Young et al. 2013. Their values in the other phases, and those of cortex and medulla,
  are round figures in the same order; phases as in Cohan et al. 1995.
- tumour wholly inside, less or more than half outside: the E of the RENAL score, Kutikov and Uzzo 2009; equal odds, a
  diameter of 34 mm (log-normal, 14 to 60), and odds of kinds are round guesses. Most are clear cell.
- fat -100, muscle 55, liver 50 to 110, spleen 45 to 120, bone 150 to 500, gas -900, water 0 HU: round textbook figures.
  The layout of the neighbours is drawn by hand after atlases.
- noise of 8 to 22 HU, shaped by the reconstruction kernel (Riederer et al. 1978: little at low frequencies), pixels of
  1.45 to 1.75 mm and slices of 2.8 to 3.6 mm (scans resampled to such): round guesses.

    >>> scan = KIND.render(Patient(kind="ct_kidney", seed=1, index=0), 0, (24, 24, 20))
    >>> scan.image.shape, sorted(set(scan.segmentation.ravel().tolist()))
    ((1, 24, 24, 20), [0, 1, 2])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .anatomy import (
    FWHM_PER_SIGMA,
    FloatArray,
    Kind,
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

TEMPLATE_SHAPE = (64, 64, 40)
FIELD_MM = (102.4, 102.4, 128.0)
KIDNEY, TUMOUR = 1, 2
SAMPLES = 14  # balls along the kidney
FLATTENING = np.array([1.25, 1.0, 1.0], dtype=np.float32)  # from hilum to edge over from front to back
AIR_HU, FAT_HU, URINE_HU, LOWEST_HU, HIGHEST_HU = -1000.0, -100.0, 5.0, -1024, 3071
TUMOURS = ("clear cell", "papillary", "oncocytic", "cystic")
TUMOUR_SHARES = (0.5, 0.2, 0.15, 0.15)


@dataclass(frozen=True)
class Phase:
    """Mean HU of the tissues that take up agent, by the time after its injection."""

    cortex: float
    medulla: float
    urine: float
    vessel: float
    liver: float
    spleen: float
    muscle: float
    tumours: tuple[float, ...]  # as in `TUMOURS`; of a cystic one its wall


PHASES = (
    Phase(35, 32, 5, 40, 55, 45, 50, tumours=(34, 34, 34, 30)),  # no agent
    Phase(190, 85, 5, 220, 75, 115, 58, tumours=(160, 75, 125, 90)),  # corticomedullary
    Phase(175, 165, 10, 150, 105, 115, 62, tumours=(130, 85, 110, 95)),  # nephrographic
    Phase(140, 135, 450, 120, 90, 95, 60, tumours=(95, 75, 85, 80)),  # excretory
)
PHASE_SHARES = (0.1, 0.4, 0.35, 0.15)


@dataclass(frozen=True)
class Site:
    """One scanner: width of the kernel (voxels), deviation of the noise (HU), voxel (mm)."""

    fwhm_voxels: float
    noise_hu: float
    pixel_mm: float
    slice_mm: float


SITES = (
    Site(fwhm_voxels=1.4, noise_hu=11, pixel_mm=1.60, slice_mm=3.2),
    Site(fwhm_voxels=1.0, noise_hu=18, pixel_mm=1.50, slice_mm=3.0),
    Site(fwhm_voxels=1.7, noise_hu=9, pixel_mm=1.70, slice_mm=3.4),
)


@dataclass(frozen=True)
class Anatomy:
    """What both kidneys of a patient share; lengths in mm, HU after contrast."""

    parenchyma_ml: float
    length_mm: float
    bend_mm: float
    cortex_mm: float
    fat_mm: float
    wall_mm: float
    left_first: bool
    tissue: Phase


@dataclass(frozen=True)
class Growth:
    """One tumour: kind, radius and necrosis in mm; `depth` of its centre in radii below the kidney's surface."""

    kind: str
    radius_mm: float
    depth: float
    roughness_mm: float
    necrosis: float


@dataclass(frozen=True)
class Grid:
    """Voxels and their size, and places [3, x, y, z] in mm, mirrored so that x runs from the spine to the flank."""

    size: Shape
    spacing_mm: tuple[float, float, float]
    points: FloatArray

    @property
    def width_mm(self) -> float:
        """Over which a surface is blurred by the voxels."""
        return float(np.mean(self.spacing_mm))

    def noise(self, rng: np.random.Generator, knots_mm: float) -> FloatArray:
        """Smooth field [x, y, z]; its bumps have as many voxels along z as in the plane."""
        return smooth_noise(rng, self.size, self.spacing_mm[0], knots_mm)


@dataclass(frozen=True)
class Organ:
    """Signed distances in mm [x, y, z]: the bean with its sinus filled, the sinus, the tumour."""

    bean: FloatArray
    sinus: FloatArray
    tumour: FloatArray


def render(patient: Patient, case: int, shape: Shape | None = None) -> Scan:
    """One kidney.

    Args:
        patient: Whose.
        case: 0 and 1 are the two sides, in random order; more are further scans of either, with other tumours.
        shape: Voxels along x, y, z; the same 102 x 102 x 128 mm are drawn with larger or smaller voxels. None is
            64 x 64 x 40 voxels of about 1.6 x 1.6 x 3.2 mm.

    Returns:
        Scan with image float32 [1, x, y, z], whole Hounsfield units, and segmentation uint8 [x, y, z].
    """
    shared, rng = patient.shared(), patient.case(case)
    site, anatomy = SITES[shared.integers(len(SITES))], _draw_anatomy(shared)
    left = anatomy.left_first == (case % 2 == 0)
    grid = _grid(rng, site, shape, -1.0 if left else 1.0)
    growth = _draw_growth(rng, grid)
    organ = _organ(shared, rng, grid, anatomy, growth, left)
    image = _surroundings(rng, grid, organ, anatomy, left)
    image = _paint_kidney(rng, image, grid, organ, anatomy)
    image = _paint_tumour(rng, image, grid, organ, anatomy, growth)
    kidney = (organ.bean < 0) & (organ.sinus > 0)
    labels = np.where(organ.tumour < 0, TUMOUR, KIDNEY * kidney).astype(np.uint8)
    return Scan(_acquire(rng, image, grid, site)[None], labels, grid.spacing_mm)


KIND = Kind(
    name="ct_kidney",
    title="PhantomKidney",
    description="Phantom of kidneys with a tumour in computed tomography (kidney, tumour)",
    dimensions=3,
    dataset_id=304,
    channel_names=("CT",),
    labels={"background": 0, "kidney": KIDNEY, "tumour": TUMOUR},
    file_ending=".nii.gz",
    smallest_shape=(20, 20, 16),
    cases_per_patient=(1, 2),
    render=render,
)


# ---- the patient ---------------------------------------------------------------------------------


def _draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Both kidneys of a patient; sources in the module docstring."""
    male = rng.random() < 0.6
    volume = np.clip(rng.normal(174 if male else 140, 28), 95, 250)
    return Anatomy(
        parenchyma_ml=float(volume),
        length_mm=float(np.clip(rng.normal(110, 6) + 0.12 * (volume - 157), 95, 122)),
        bend_mm=rng.uniform(3, 9),
        cortex_mm=float(np.clip(rng.normal(6.6, 1.0), 4.5, 9)),
        fat_mm=rng.gamma(4.0, 2.5),
        wall_mm=rng.uniform(8, 16),
        left_first=bool(rng.random() < 0.5),
        tissue=_draw_phase(rng),
    )


def _draw_phase(rng: np.random.Generator) -> Phase:
    """A phase, hit earlier or later and with more or less agent: uptake over the plain scan varies by 15 %."""
    plain, chosen = PHASES[0], PHASES[rng.choice(len(PHASES), p=PHASE_SHARES)]

    def varied(before: float, after: float) -> float:
        return float(before + rng.normal(0, 4) + (after - before) * np.clip(rng.normal(1, 0.15), 0.6, 1.4))

    names = ("cortex", "medulla", "urine", "vessel", "liver", "spleen", "muscle")
    tissues = {name: varied(getattr(plain, name), getattr(chosen, name)) for name in names}
    return Phase(**tissues, tumours=tuple(varied(*pair) for pair in zip(plain.tumours, chosen.tumours, strict=True)))


def _draw_growth(rng: np.random.Generator, grid: Grid) -> Growth:
    """A tumour of random kind, size and seat; at least some voxels large, however coarse these are."""
    kind = TUMOURS[rng.choice(len(TUMOURS), p=TUMOUR_SHARES)]
    radius = float(np.clip(17 * np.exp(rng.normal(0, 0.4)), 7, 30))
    inside, half, outside = (0.7, 1.3), (0.05, 0.6), (-0.55, -0.05)
    depth = rng.uniform(*(inside, half, outside)[rng.integers(3)])
    return Growth(
        kind=kind,
        radius_mm=max(radius, 1.4 * max(grid.spacing_mm)),
        depth=depth,
        roughness_mm=min(rng.gamma(2.0, 0.4), 0.08 * radius),
        necrosis=rng.uniform(0, 1) * float(np.clip((radius - 10) / 10, 0, 1)),
    )


def _grid(rng: np.random.Generator, site: Site, shape: Shape | None, side: float) -> Grid:
    """Voxels of the site (a few per cent more or less) or those that a given shape asks for."""
    if shape is None:
        zoom = rng.uniform(0.97, 1.04)
        plane_mm, size = site.pixel_mm * zoom, TEMPLATE_SHAPE
        spacing = (plane_mm, plane_mm, site.slice_mm * rng.uniform(0.95, 1.05))
    else:
        plane_mm = max(FIELD_MM[0] / shape[0], FIELD_MM[1] / shape[1])
        size, spacing = shape, (plane_mm, plane_mm, FIELD_MM[2] / shape[2])
    points = coordinates(size, 1.0) * np.array(spacing, dtype=np.float32).reshape(3, 1, 1, 1)
    points[0] *= side
    return Grid(size, spacing, points + rng.normal(0, 3, (3, 1, 1, 1)).astype(np.float32))


# ---- the kidney and its tumour -------------------------------------------------------------------


def _organ(
    shared: np.random.Generator, rng: np.random.Generator, grid: Grid, anatomy: Anatomy, growth: Growth, left: bool
) -> Organ:
    """Bean, sinus and tumour, each bent by fields of the patient and of the side."""
    points = grid.points + displacement(shared, grid.size, grid.spacing_mm[0], 1.2, 22.0)
    points = points + displacement(rng, grid.size, grid.spacing_mm[0], 0.6, 10.0)
    # The upper pole leans back and to the spine, the hilum looks forward.
    angles = (rng.normal(8, 4), rng.normal(-12, 5), rng.normal(-35, 10))
    placed = pose(points, angles, (0, 0, 0), (1.02 if left else 1.0) * rng.normal(1, 0.01))
    sinus = _sinus(rng, placed, anatomy)
    bean = _bean(placed, anatomy, sinus, grid)
    return Organ(bean, sinus, _tumour(rng, grid, bean, growth))


def _bean(points: FloatArray, anatomy: Anatomy, sinus: FloatArray, grid: Grid) -> FloatArray:
    """Signed distance to a bent tube with round poles, thickened until what is not sinus has the patient's volume."""
    along = np.linspace(-1, 1, SAMPLES)
    profile = np.sqrt(1 - (0.88 * along) ** 2)
    radius = 21.0
    z = along * (anatomy.length_mm / 2 - radius * profile[-1])
    x = anatomy.bend_mm * (1 - 2 * along**2) / 1.5
    line = np.stack([x, np.zeros(SAMPLES), z], axis=1) / FLATTENING
    bean = tube(points / FLATTENING.reshape(3, 1, 1, 1), line, radius * profile)
    parenchyma = bean[sinus > 0]
    voxels = min(int(1000 * anatomy.parenchyma_ml / np.prod(grid.spacing_mm)), len(parenchyma) - 1)
    return bean - np.partition(parenchyma, voxels)[voxels]


def _sinus(rng: np.random.Generator, points: FloatArray, anatomy: Anatomy) -> FloatArray:
    """Signed distance to the hilum: a flat cavity, open towards the spine, with calyces that reach out of it."""
    hall = ellipsoid(points, (-19, 0, 0), (rng.uniform(17, 21), rng.uniform(6, 9), rng.uniform(17, 22)))
    calyces = []
    for height in (-0.42, 0.0, 0.42):
        end = np.array([rng.uniform(-6, 2), rng.normal(0, 3), height * anatomy.length_mm * rng.uniform(0.6, 0.9)])
        line = np.linspace((-14, 0, 0.4 * end[2]), end, 8)
        calyces.append(tube(points, line, np.linspace(5.5, rng.uniform(3, 5), 8)))
    return np.minimum(hall, np.minimum.reduce(calyces))


def _tumour(rng: np.random.Generator, grid: Grid, bean: FloatArray, growth: Growth) -> FloatArray:
    """Signed distance to a lump whose centre lies at the wanted depth, on the side away from the spine."""
    wanted = np.abs(bean + growth.depth * growth.radius_mm)
    wanted = wanted + 100 * (np.abs(grid.points[2]) > 45) + 100 * (grid.points[0] < -4)
    places = np.flatnonzero(wanted.ravel() <= wanted.min() + 1.5)
    centre = grid.points.reshape(3, -1)[:, places[rng.integers(len(places))]]
    stretch = np.exp(rng.normal(0, 0.12, 3))
    bent = grid.points + displacement(rng, grid.size, grid.spacing_mm[0], 0.06 * growth.radius_mm, 12.0)
    lump = ellipsoid(bent, centre, growth.radius_mm * stretch / stretch.prod() ** (1 / 3))
    return lump + growth.roughness_mm * grid.noise(rng, 8.0)


# ---- the scene in Hounsfield units ---------------------------------------------------------------


def _surroundings(rng: np.random.Generator, grid: Grid, organ: Organ, anatomy: Anatomy, left: bool) -> FloatArray:
    """Everything around the kidney [x, y, z], then the fat that it lies in."""
    points = grid.points + displacement(rng, grid.size, grid.spacing_mm[0], 1.5, 20.0)
    image = FAT_HU + 8 * grid.noise(rng, 8.0)
    for distance, value in _organs(rng, points, anatomy.tissue, left):
        image = paint(image, coverage(distance, grid.width_mm), value + 4 * grid.noise(rng, 6.0))
    for _ in range(int(rng.integers(2, 5))):
        image = _bowel(rng, image, points, grid, anatomy.tissue)
    own = np.minimum(organ.bean, organ.tumour) - anatomy.fat_mm * np.clip(1 + 0.6 * grid.noise(rng, 20.0), 0.15, 2.5)
    strands = np.clip(grid.noise(rng, 4.0) - 1.6, 0, 1) * rng.uniform(0, 90)
    image = paint(image, coverage(own, grid.width_mm), FAT_HU + 5 * grid.noise(rng, 8.0) + strands)
    for distance, value in _back(rng, points, anatomy):
        image = paint(image, coverage(distance, grid.width_mm), value)
    return _vessels(rng, image, points, grid, anatomy.tissue)


def _organs(rng: np.random.Generator, points: FloatArray, tissue: Phase, left: bool) -> list[tuple[FloatArray, float]]:
    """(signed distance, HU) of what lies in front of and above a kidney: liver, or spleen, pancreas and stomach."""
    shift = rng.normal(0, 4, 3)
    if left:
        spleen = ellipsoid(points, np.array([46, 2, 48]) + shift, rng.uniform([20, 26, 34], [30, 36, 48]))
        pancreas = ellipsoid(points, np.array([-8, 44, 34]) + shift, rng.uniform([30, 8, 8], [42, 13, 14]))
        stomach = ellipsoid(points, np.array([12, 56, 62]) + shift, (34, 18, 26))
        return [(spleen, tissue.spleen), (stomach, rng.uniform(0, 50)), (pancreas, 0.6 * tissue.liver + 30)]
    liver = ellipsoid(points, np.array([34, 48, 46]) + shift, rng.uniform([58, 36, 52], [72, 48, 74]))
    duodenum = ellipsoid(points, np.array([-26, 36, 4]) + shift, rng.uniform([10, 9, 24], [15, 13, 36]))
    return [(liver, tissue.liver), (duodenum, 0.5 * tissue.muscle + 15)]


def _bowel(rng: np.random.Generator, image: FloatArray, points: FloatArray, grid: Grid, tissue: Phase) -> FloatArray:
    """One loop in front: a wall, and stool or fluid with gas above it (patients lie on their backs)."""
    centre = np.array([rng.uniform(-30, 48), rng.uniform(34, 54), rng.uniform(-62, 20)])
    loop = ellipsoid(points, centre, rng.uniform([8, 8, 14], [16, 14, 34]))
    content = rng.uniform(-60, 40) + rng.uniform(5, 60) * grid.noise(rng, 5.0)
    image = paint(image, coverage(loop, grid.width_mm), tissue.muscle + 10)
    image = paint(image, coverage(loop + 2.5, grid.width_mm), content)
    level = centre[1] + rng.uniform(-9, 14) - points[1]
    return paint(image, coverage(np.maximum(loop + 3.0, level), grid.width_mm), rng.uniform(-960, -850))


def _back(rng: np.random.Generator, points: FloatArray, anatomy: Anatomy) -> list[tuple[FloatArray, float]]:
    """(signed distance, HU) of muscles of the back, flank with ribs, skin and vertebrae."""
    muscle, plane = anatomy.tissue.muscle, points[:2]
    psoas = tube(points, np.linspace((-33, -6, 36), (-26, 2, -74), 16), np.linspace(6, 17, 16))
    quadratus = ellipsoid(plane, np.array([-8, -42]) + rng.normal(0, 2, 2), rng.uniform([18, 7], [24, 10]))
    erector = ellipsoid(plane, np.array([-30, -58]) + rng.normal(0, 2, 2), rng.uniform([24, 17], [30, 22]))
    flank = -ellipsoid(plane, (-56, 8), (rng.uniform(108, 122), rng.uniform(62, 72)))
    slope = points[2] + 0.5 * points[1] + rng.uniform(0, 30)
    rib = np.maximum(np.abs(flank + 0.4 * anatomy.wall_mm) - 3.5, np.abs((slope + 15) % 30 - 15) - 6)
    rib = np.maximum(rib, -points[2] - 5)  # the lower half of a kidney lies below the last rib
    return [
        (flank, muscle),
        (flank + anatomy.wall_mm, FAT_HU),
        (flank + anatomy.wall_mm + rng.uniform(15, 50), AIR_HU),
        (erector, muscle - 8),
        (quadratus, muscle),
        (psoas, muscle),
        (rib, rng.uniform(250, 500)),
        *_vertebrae(rng, points),
    ]


def _vertebrae(rng: np.random.Generator, points: FloatArray) -> list[tuple[FloatArray, float]]:
    """(signed distance, HU) of bodies with a dense shell, discs between them, and a transverse process."""
    body = ellipsoid(points[:2], (-56, -12), rng.uniform([20, 16], [24, 20]))
    level = np.abs((points[2] + rng.uniform(0, 34)) % 34 - 17)  # 0 in the middle of a body, 17 in a disc
    spongy = rng.uniform(130, 240)
    bone = np.maximum(body, level - 13)
    process = np.maximum(ellipsoid(points[:2], (-40, -32), (22, 5)), level - 5)
    return [(process, 1.4 * spongy), (body, 85.0), (bone, rng.uniform(350, 500)), (bone + 2.5, spongy)]


def _vessels(rng: np.random.Generator, image: FloatArray, points: FloatArray, grid: Grid, tissue: Phase) -> FloatArray:
    """Great vessel beside the spine, and renal artery and vein from it to the hilum."""
    height, trunk = rng.normal(2, 5), np.array([-46.0, 20.0])
    great = ellipsoid(points[:2], trunk, np.full(2, rng.uniform(9, 12)))
    image = paint(image, coverage(great, grid.width_mm), tissue.vessel)
    for radius, lift in ((rng.uniform(3.5, 5.5), 3.0), (rng.uniform(2, 3), -4.0)):
        line = np.linspace((-46, 18, height + lift), (-14, 9, lift), 12) + rng.normal(0, 0.8, (12, 3))
        image = paint(image, coverage(tube(points, line, np.full(12, radius)), grid.width_mm), tissue.vessel)
    return image


def _paint_kidney(
    rng: np.random.Generator, image: FloatArray, grid: Grid, organ: Organ, anatomy: Anatomy
) -> FloatArray:
    """Cortex at the rim and in columns between the pyramids of the medulla; sinus with fat, vessels and urine."""
    tissue, width = anatomy.tissue, grid.width_mm
    pyramids = coverage(organ.bean + anatomy.cortex_mm, width) * coverage(-0.4 - 4 * grid.noise(rng, 9.0), 4.0)
    parenchyma = tissue.cortex + pyramids * (tissue.medulla - tissue.cortex)
    image = paint(image, coverage(organ.bean, width) * coverage(-organ.sinus, width), parenchyma)
    inside = coverage(np.maximum(organ.bean, organ.sinus), width)
    image = paint(image, inside, FAT_HU + 30)
    image = paint(image, inside * coverage(-0.6 - 2.5 * grid.noise(rng, 6.0), width), 0.8 * tissue.vessel)
    urine = np.maximum(organ.sinus + 3, organ.bean + 2) + 2 * grid.noise(rng, 7.0)
    return paint(image, 0.9 * coverage(urine + 1, width), tissue.urine)


def _paint_tumour(
    rng: np.random.Generator, image: FloatArray, grid: Grid, organ: Organ, anatomy: Anatomy, growth: Growth
) -> FloatArray:
    """The tumour by its kind: unevenness, necrosis, scar, or cyst with septa."""
    lump, width = organ.tumour, grid.width_mm
    value = anatomy.tissue.tumours[TUMOURS.index(growth.kind)]
    uneven = {"clear cell": 0.22, "papillary": 0.05, "oncocytic": 0.08, "cystic": 0.1}[growth.kind]
    image = paint(image, coverage(lump, width), 25 + (value - 25) * (1 + uneven * grid.noise(rng, 7.0)))
    if growth.kind == "cystic":
        septa = 1.5 - 7 * np.abs(grid.noise(rng, 0.8 * growth.radius_mm))
        fluid = np.maximum(lump + rng.uniform(1.5, 3.5), septa)
        return paint(image, coverage(fluid, width), rng.uniform(5, 25))
    if growth.kind == "clear cell":
        dead = lump + growth.radius_mm * (1 - 0.75 * growth.necrosis) + 2.5 * grid.noise(rng, 8.0)
        return paint(image, coverage(dead, 2 * width), rng.uniform(10, 35))
    scar = lump + growth.radius_mm * 0.8 + 3 * np.abs(grid.noise(rng, 8.0))
    return paint(image, float(growth.kind == "oncocytic" and rng.random() < 0.4) * coverage(scar, 2 * width), 40)


# ---- the scanner ---------------------------------------------------------------------------------


def _acquire(rng: np.random.Generator, image: FloatArray, grid: Grid, site: Site) -> FloatArray:
    """Texture, kernel, noise that the kernel shapes; whole Hounsfield units of twelve bits."""
    sigma = site.fwhm_voxels * rng.uniform(0.85, 1.15) / FWHM_PER_SIGMA
    sharp = ndimage.gaussian_filter(image, (sigma, sigma, 0.35), mode="nearest", truncate=3.0)
    grain = rng.standard_normal(grid.size, dtype=np.float32)
    fine, coarse = (ndimage.gaussian_filter(grain, (s, s, 0.35), mode="wrap", truncate=3.0) for s in (sigma, 3 * sigma))
    grain = fine - 0.7 * coarse  # filtered back projection leaves little noise at low frequencies
    deviation = site.noise_hu * rng.uniform(0.75, 1.25) * np.exp(0.12 * grid.noise(rng, 40.0))
    return np.rint(np.clip(sharp + deviation * grain / grain.std(), LOWEST_HU, HIGHEST_HU)).astype(np.float32)
