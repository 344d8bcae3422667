"""A site's own settings: which dataset takes part, and what no coordinator may ask of its patients.

They stand in a TOML file that only the site writes; nothing in a message can raise them.

>>> settings = SiteSettings(name="north", dataset="301", max_epsilon=8.0)
>>> settings.allow_no_guarantee, settings.device
(False, 'cpu')

A file may hold::

    name = "north"          # public: it stands in the coordinator's progress lines
    dataset = 301           # nnU-Net's id or name
    max_epsilon = 8.0       # of the whole dataset, over every run ever charged to its ledger
    delta = 1e-5            # left out: follows the number of patients

Design note: types are strict. In a lax reading ``allow_no_guarantee = "no"`` would be one word away from a yes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, ValidationError

from nnunet_dp.accounting import LARGEST_EPSILON
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.protocol import LARGEST_DELTA, SiteName

if sys.version_info >= (3, 11):
    import tomllib
else:  # the extra `federated` brings it
    import tomli as tomllib

_EXAMPLE = "`nnunet-dp fed init-site` writes one; it needs name, dataset and max_epsilon"
_FOLDERS = ("raw", "preprocessed", "results")


def _as_word(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class SiteSettings(BaseModel):
    """What a site decides for itself.

    Attributes:
        name: public name.
        dataset: nnU-Net's id or name.
        max_epsilon: most that the dataset's ledger may add up to, at this site's delta; also the most that one run
            may ask for.
        delta: of that epsilon; None follows the number of units.
        raw: nnU-Net's folder; None takes ``nnUNet_raw`` of the environment. So do ``preprocessed`` and ``results``.
        preprocessed: see ``raw``.
        results: see ``raw``.
        device: where to train.
        processes: that preprocess, and load patients beside the training where it is more than one.
        max_plans: most plans that coordinators may have this dataset preprocessed with, ever: whether preprocessing
            succeeds is one word about the images, and costs no budget.
        allow_no_guarantee: whether modes without any privacy guarantee may use this dataset.
        patients_file: says which case belongs to whom; None takes the dataset's own ``patients.csv``.
        patients_column: its column that names the unit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: SiteName
    dataset: Annotated[str, BeforeValidator(_as_word), Field(pattern=r"^(\d{1,3}|Dataset\d{3}_[A-Za-z0-9_.-]+)$")]
    max_epsilon: StrictFloat = Field(gt=0, le=LARGEST_EPSILON)
    delta: StrictFloat | None = Field(default=None, gt=0, lt=LARGEST_DELTA)
    raw: Path | None = None
    preprocessed: Path | None = None
    results: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    processes: int = Field(default=1, ge=1, le=64, strict=True)
    max_plans: int = Field(default=5, ge=1, strict=True)
    allow_no_guarantee: StrictBool = False
    patients_file: Path | None = None
    patients_column: str | None = None

    def folder(self, part: str) -> Path:
        """One of nnU-Net's three folders (``raw``, ``preprocessed``, ``results``).

        Raises:
            UsageRefusal: when neither the settings nor the environment name it.
        """
        own = getattr(self, part) or os.environ.get(f"nnUNet_{part}")
        if not own:
            raise UsageRefusal(f"the site's settings should name a folder {part}: add it, or export nnUNet_{part}")
        return Path(own)

    @contextmanager
    def as_environment(self) -> Iterator[None]:
        """nnU-Net's environment variables name this site's folders inside the block."""
        before = dict(os.environ)
        os.environ.update({f"nnUNet_{part}": str(self.folder(part)) for part in _FOLDERS})
        try:
            yield
        finally:
            for part in _FOLDERS:
                os.environ.pop(f"nnUNet_{part}")
            os.environ.update({key: before[key] for key in before if key.startswith("nnUNet_")})

    def dataset_name(self) -> str:
        """DatasetXXX_Name; found without importing nnU-Net.

        Raises:
            UsageRefusal: for an id that no dataset has, or several have.
        """
        if self.dataset.startswith("Dataset"):
            return self.dataset
        pattern = f"Dataset{int(self.dataset):03d}_*"
        names = {file.name for part in _FOLDERS[:2] for file in self.folder(part).glob(pattern) if file.is_dir()}
        if len(names) != 1:
            raise UsageRefusal(
                f"dataset = {self.dataset} should name one dataset below raw and preprocessed, found {len(names)}: "
                'write its full name, dataset = "DatasetXXX_Name"'
            )
        return names.pop()


def read_settings(path: Path) -> SiteSettings:
    """Read a site's settings from its TOML file; folders in it are relative to the file.

    Raises:
        UsageRefusal: for a missing or malformed file, and for settings that are unknown or impossible.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageRefusal(f"{path.name} should be the site's settings, found {error.strerror}: {_EXAMPLE}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageRefusal(f"{path.name} should be TOML, found: {error}; {_EXAMPLE}") from None
    for key in (*_FOLDERS, "patients_file"):
        if isinstance(content.get(key), str):
            content[key] = str(path.resolve().parent / Path(content[key]).expanduser())
    try:
        return SiteSettings.model_validate(content)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        raise UsageRefusal(f"{path.name} should hold the site's settings, found {wrong}. {_EXAMPLE}") from None
