"""Refinement of a body-sized volume against SciPy's opening with the same ball as a footprint, in one run.

    python benchmarks/morphology.py [--full] [--json]

A volume of 512 x 512 x 400 voxels at 0.8 x 0.8 x 2.5 mm holds five organ-like classes (a liver, two kidneys, a spleen,
an aorta; rough ellipsoids and a rough tube). Printed: processor seconds (both sides run in one thread, and a busy
machine hardly changes them) of ``refine`` with one opening of 5 mm for each class, and of
``scipy.ndimage.binary_opening`` with that ball as footprint on the same masks: on each class's bounding box (all
classes timed), and on the whole volume (one class timed and multiplied by the classes; SciPy's time there hardly
depends on the class). Memory is ``ru_maxrss`` of a fresh process less that after its imports, so it includes the input.
The volume is made and measured by processes that this one starts while it is small, because a process inherits its
parent's peak.

With --full, specks in two opposite corners make the first class's bounding box the whole volume, and it alone is
refined.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from nnunet_dp.morphology import ClassRefinement, Morphology, Opening
from nnunet_dp.refinement import refine

SHAPE = (512, 512, 400)
SPACING_MM = (0.8, 0.8, 2.5)
RADIUS_MM = 5.0
# Centre and half axes in millimetres.
ORGANS = {
    "liver": ((170, 150, 560), (110, 85, 120)),
    "left kidney": ((240, 300, 430), (40, 45, 80)),
    "right kidney": ((240, 105, 420), (40, 45, 80)),
    "spleen": ((220, 340, 590), (55, 40, 75)),
    "aorta": ((290, 205, 520), (20, 20, 330)),
}


def rough(shape, generator):
    """Smooth noise of about unit spread, several voxels wide."""
    coarse = generator.normal(size=[size // 4 + 2 for size in shape])
    return ndimage.zoom(coarse, 4, order=1)[tuple(slice(size) for size in shape)]


def volume(full: bool) -> np.ndarray:
    image, generator = np.zeros(SHAPE, np.uint8), np.random.default_rng(0)
    for label, (name, (centre, axes)) in enumerate(ORGANS.items(), 1):
        places = list(zip(centre, axes, SPACING_MM, SHAPE, strict=True))
        box = tuple(
            slice(max(0, int((c - 1.2 * a) / step)), min(size, int((c + 1.2 * a) / step) + 1))
            for c, a, step, size in places
        )
        grid = np.ogrid[box]
        scaled = [((index * step - c) / a) ** 2 for index, (c, a, step, _) in zip(grid, places, strict=True)]
        distance = scaled[0] + scaled[1] + (0 if name == "aorta" else scaled[2])
        mask = distance + 0.12 * rough(image[box].shape, generator) < 1
        image[box][mask & (image[box] == 0)] = label
    if full:
        image[0, 0, 0] = image[-1, -1, -1] = 1
    return image


def rules(full: bool) -> Morphology:
    classes = [
        ClassRefinement(name=name, labels=(label,), writes=label, operations=(Opening(radius_mm=RADIUS_MM),))
        for label, name in enumerate(ORGANS, 1)
    ]
    return Morphology(kind="fixed", classes=tuple(classes[:1] if full else classes))


def footprint() -> np.ndarray:
    reach = [int(RADIUS_MM * (1 + 1e-6) / step) for step in SPACING_MM]
    grid = np.ogrid[tuple(slice(-n, n + 1) for n in reach)]
    squared = sum((index * step) ** 2 for index, step in zip(grid, SPACING_MM, strict=True))
    return squared <= (RADIUS_MM * (1 + 1e-6)) ** 2


def seconds(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def print_peak(file: Path, full: bool) -> None:
    """In a fresh process: bytes per voxel that reading and refining add to the imports."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = np.load(file)
    refine(image, rules(full), SPACING_MM)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(1024 * (after - before) / image.size)  # Linux counts kibibytes


def measure(full: bool) -> dict[str, float | int | str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "volume.npy"
        flags = ["--full"] if full else []
        subprocess.run([sys.executable, __file__, "--write", str(file), *flags], check=True)
        command = [sys.executable, __file__, "--peak", str(file), *flags]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        image = np.load(file)
    ball, count = footprint(), len(rules(full).classes)
    boxes = ndimage.find_objects(image, max_label=count)
    ours = seconds(lambda: refine(image, rules(full), SPACING_MM))
    crops = [image[box] == label for label, box in enumerate(boxes, 1)]
    in_boxes = sum(seconds(lambda crop=crop: ndimage.binary_opening(crop, ball)) for crop in crops)
    whole = seconds(lambda: ndimage.binary_opening(image == 1, ball))
    return {
        "shape": "x".join(map(str, SHAPE)),
        "classes": count,
        "share_of_volume_in_classes": float((image > 0).mean()),
        "share_of_volume_in_bounding_boxes": sum(image[box].size for box in boxes) / image.size,
        "voxels_of_the_ball": int(ball.sum()),
        "refine_seconds": ours,
        "scipy_seconds_bounding_boxes": in_boxes,
        "scipy_seconds_whole_volume": whole * count,
        "scipy_whole_volume": f"one class timed ({whole:.1f} s), times {count}",
        "ratio_to_scipy_bounding_boxes": in_boxes / ours,
        "ratio_to_scipy_whole_volume": whole * count / ours,
        "peak_bytes_per_voxel": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="one class whose bounding box is the whole volume")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        np.save(options.write, volume(options.full))
    elif options.peak:
        print_peak(options.peak, options.full)
    else:
        found = measure(options.full)
        print(json.dumps(found) if options.json else "\n".join(f"{key:<38} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
