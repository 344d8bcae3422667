"""Small JSON files that one command leaves for another: which process runs, how a run ended, what was typed.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp()) / "note.json"
>>> _ = file.write_text('[3, "south"]')
>>> read_note(file, tuple[int, str])
(3, 'south')
>>> read_note(file, dict[str, int])
Traceback (most recent call last):
...
nnunet_dp.errors.UsageRefusal: note.json should be as nnunet-dp wrote it, found something else: delete it, ...
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from nnunet_dp.errors import UsageRefusal

Note = TypeVar("Note")


def read_note(file: Path, kind: type[Note]) -> Note:
    """What a note says.

    Args:
        file: JSON.
        kind: of its content, such as a dataclass.

    Raises:
        UsageRefusal: for any other content.
    """
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except ValidationError:
        raise UsageRefusal(
            f"{file.name} should be as nnunet-dp wrote it, found something else: delete it, and type the command that "
            "writes it again"
        ) from None
