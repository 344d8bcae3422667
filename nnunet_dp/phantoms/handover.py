r"""From a phantom dataset's folder to private plans: the lines to type, in a shell that may know nothing of nnU-Net.

A Decathlon task is converted by nnU-Net's own command, which leaves ``patients.csv`` behind: it is copied after it.

>>> environment = {"nnUNet_raw": "/raw", "nnUNet_preprocessed": "/preprocessed", "nnUNet_results": "/results"}
>>> print("\n".join(commands(Path("data/Task301_PhantomHippocampus"), 3, environment)))
nnUNetv2_convert_MSD_dataset -i data/Task301_PhantomHippocampus
cp data/Task301_PhantomHippocampus/patients.csv /raw/Dataset301_PhantomHippocampus
nnUNetv2_plan_and_preprocess -d 301 -c 3d_fullres
nnunet-dp plan -d 301 -c 3d_fullres --epsilon 8
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def commands(folder: Path, dimensions: int, environment: Mapping[str, str]) -> list[str]:
    """Lines for a shell.

    Args:
        folder: of the phantom dataset, as ``write_dataset`` returned it.
        dimensions: of its images.
        environment: variables of the shell; nnU-Net's folders that it does not name are put beside the dataset.
    """
    kind, number, title = re.fullmatch(r"(Task|Dataset)(\d+)_(.*)", folder.name).groups()  # pyright: ignore
    base, converted = folder.parent.resolve(), kind == "Task"
    places = {name: environment.get(name) or str(base / name) for name in _FOLDERS}
    if not converted:
        places["nnUNet_raw"] = str(base)
    configuration = "2d" if dimensions == 2 else "3d_fullres"
    raw = Path(places["nnUNet_raw"]) / f"Dataset{int(number):03d}_{title}"
    conversion = [
        f"nnUNetv2_convert_MSD_dataset -i {quote(str(folder))}",
        f"cp {quote(str(folder / 'patients.csv'))} {quote(str(raw))}",
    ]
    return [
        *(f"export {name}={quote(place)}" for name, place in places.items() if environment.get(name) != place),
        *(conversion if converted else []),
        f"nnUNetv2_plan_and_preprocess -d {int(number)} -c {configuration}",
        f"nnunet-dp plan -d {int(number)} -c {configuration} --epsilon 8",
    ]
