"""A dataset's description, nnU-Net's dataset.json: read, and refused where it lacks what everything else needs.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp()) / "dataset.json"
>>> _ = file.write_text('{"labels": {"background": 0}, "file_ending": ".png"}')
>>> read_description(file)
Traceback (most recent call last):
...
nnunet_dp.errors.UsageRefusal: dataset.json should name channel_names, found none: add it (nnU-Net's dataset format ...
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.plans import read_json

FILE = "dataset.json"
_HOW = "(nnU-Net's dataset format says how), in nnUNet_raw and in nnUNet_preprocessed"


def read_description(file: Path) -> dict[str, Any]:
    """A dataset.json with channels, labels and a file ending.

    Raises:
        UsageRefusal: when it cannot be read, is not JSON, or lacks one of them or numbers for labels.
    """
    return checked(read_json(file))


def checked(content: Any) -> dict[str, Any]:
    """The same description, or the refusal of ``read_description``."""
    if not isinstance(content, dict):
        raise UsageRefusal(f"{FILE} should hold an object, found a {type(content).__name__}: write it anew {_HOW}")
    names = {"channel_names": ("channel_names", "modality"), "labels": ("labels",), "file_ending": ("file_ending",)}
    missing = [name for name, words in names.items() if not any(content.get(word) for word in words)]
    if missing:
        raise UsageRefusal(f"{FILE} should name {', '.join(missing)}, found none: add it {_HOW}")
    try:
        known = known_labels(content)
    except (TypeError, ValueError, AttributeError):
        raise UsageRefusal(
            f'labels in {FILE} should be such as {{"background": 0, "tumour": 1}}: mend it {_HOW}'
        ) from None
    if 0 not in known or len(known) < 2:
        raise UsageRefusal(f"labels in {FILE} should hold background 0 and a class, found {len(known)}: mend it {_HOW}")
    return content


def known_labels(description: Mapping[str, Any]) -> set[int]:
    """All integers that dataset.json gives a name, regions' parts and the ignore label included."""
    return {one for value in description["labels"].values() for one in integers_of(value)}


def integers_of(label: Any) -> tuple[int, ...]:
    """The integers of a label, or of a region of several.

    Raises:
        TypeError, ValueError: for what is no integer, such as 0.7 or an infinity, and for a region of none.
    """
    several = label if isinstance(label, (list, tuple)) else (label,)
    if not several or any(isinstance(one, float) and not one.is_integer() for one in several):
        raise ValueError("a label should be an integer, or a region of several")
    return tuple(int(one) for one in several)


def channels(description: Mapping[str, Any]) -> int:
    """Number of image channels."""
    return len(description.get("channel_names", description.get("modality", ())))
