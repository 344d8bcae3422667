"""Images of which a part is missing: a broken download, a full disk, a flipped bit.

Most readers refuse them. SimpleITK, with which nnU-Net reads NIfTI, does not: it returns the voxels that are there, and
zeros for all others, without a word. A network would learn from half an image, and refinement would take the rest for
background. So whoever reads an image here asks first whether it is whole.

>>> import gzip, tempfile
>>> file = Path(tempfile.mkdtemp()) / "a.nii.gz"
>>> header = struct.pack("<i36x8h16xh34xf240x", 348, 3, 4, 4, 4, 1, 1, 1, 1, 16, 352.0)  # 4 x 4 x 4 voxels of 2 bytes
>>> whole = gzip.compress(header + bytes(4 * 4 * 4 * 2))
>>> _ = file.write_bytes(whole)
>>> refuse_torn(file)
>>> _ = file.write_bytes(whole[:-9])
>>> refuse_torn(file)
Traceback (most recent call last):
...
nnunet_dp.errors.UsageRefusal: an image should hold all voxels that its header tells of, found one that is cut short ...

Headers: https://nifti.nimh.nih.gov, nifti1.h and nifti2.h.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

from nnunet_dp.errors import UsageRefusal

_ENDINGS = (".nii", ".nii.gz")
_PIECE_BYTES = 1 << 20  # that are unpacked at a time
_LONGEST_HEADER = 540


def refuse_torn(file: Path) -> None:
    """Refuse a NIfTI file that does not hold all its voxels; files of other formats are left to their readers.

    Raises:
        UsageRefusal: without the file's name, which may be a case's.
    """
    if file.name.lower().endswith(_ENDINGS) and not _is_whole(file):
        raise UsageRefusal(
            "an image should hold all voxels that its header tells of, found one that is cut short or damaged: put an "
            "intact copy in its place"
        )


def _is_whole(file: Path) -> bool:
    unpacked = gzip.open if file.name.lower().endswith(".gz") else open
    try:
        with unpacked(file, "rb") as stream:
            header = stream.read(_LONGEST_HEADER)
            held = len(header)
            while piece := stream.read(_PIECE_BYTES):  # to the end, where the checksum is
                held += len(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False
    return held >= _promised_bytes(header)


def _promised_bytes(header: bytes) -> int:
    """Length of the file that a header tells of; 0 for no header that we know, which its reader refuses."""
    for order in "<>":
        for size, layout in ((348, "i36x8h16xh34xf"), (540, "i10xh8q88xq")):
            if len(header) < size or struct.unpack_from(f"{order}i", header)[0] != size:
                continue
            _, *told, offset = struct.unpack_from(order + layout, header)
            bits, (axes, *lengths) = (told[-1], told[:-1]) if size == 348 else (told[0], told[1:])
            return int(offset) + math.prod(lengths[: max(axes, 0)]) * bits // 8
    return 0
