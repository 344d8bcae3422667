"""``nnunet-dp card``: a model's folder in, a folder with its privacy card out.

    privacy_card.json    the claim, counted again from the ledger (``card``)
    privacy_card.html    the same for people (``card_page``)
    README.md            the same for a model hub

The files are those that ``export`` puts into an archive, under the names that the archive gives the model. They are
not written into the model's folder: there a ``privacy_card.json`` says that the model was installed from an export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_dp.card import Card, upwards
from nnunet_dp.card_words import strength_in_words
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.export import card_files
from nnunet_dp.released_model import PAGE
from nnunet_dp.replacing import replacing


@dataclass(frozen=True)
class WrittenCard:
    """What was written.

    Attributes:
        folder: that holds the files.
        files: their names.
        card: what they say.
    """

    folder: Path
    files: tuple[str, ...]
    card: Card

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"folder": str(self.folder), "files": list(self.files), "card": json.loads(self.card.content)}

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        return [
            ("claim", self.card.claim),
            ("epsilon", f"{upwards(self.card.epsilon)} at delta {self.card.delta:g} per {self.card.unit}"),
            ("attacker", strength_in_words(self.card)),
            ("NOT covered", "; ".join(self.card.not_covered)),
            ("wrote", ", ".join(str(self.folder / name) for name in self.files)),
            ("next", f"open {self.folder / PAGE} in a browser, or print it"),
        ]


def write_card(model: Path, folder: Path, folds: Sequence[str] = (), overwrite: bool = False) -> WrittenCard:
    """Write a model's privacy card.

    Args:
        model: folder that holds the folds.
        folder: to write to; made where it is missing.
        folds: that are counted together; none counts all that are there.
        overwrite: whether files that differ may be replaced.

    Raises:
        UsageRefusal: for folders that hold no model, models without a guarantee, and files that are there and differ.
        Refusal: for unfinished folds, and a ledger that is missing or does not agree.
    """
    folder = Path(folder)
    if (folder / "plans.json").exists():
        raise UsageRefusal(f"-o should be a folder of its own, found the model {folder}: type for instance -o card")
    card, files = card_files(model, folds)
    _refuse_replacing(folder, files, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(folder / name) as stream:
            stream.write(content)
    return WrittenCard(folder, tuple(files), card)


def _refuse_replacing(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    there = [name for name in files if (folder / name).exists()]
    differing = [name for name in there if (folder / name).read_bytes() != files[name]]
    if differing and not overwrite:
        raise UsageRefusal(
            f"{', '.join(differing)} in {folder} should not exist yet, found other content: choose another folder with "
            "-o, or give --overwrite"
        )
