"""Lends our trainers to the installed nnU-Net: ``-tr nnUNetTrainerDP`` works without an environment variable.

nnU-Net looks for a trainer by importing the modules that lie directly in ``nnunetv2/training/nnUNetTrainer``,
in alphabetical order, and asking each with ``hasattr``; only then does it descend into subpackages. ``link``
writes one *shim* module there. The shim is inert and lazy: a module-level ``__getattr__`` that answers to our
names alone.

===============================  ===========================================================================
asked for                        the shim answers
===============================  ===========================================================================
one of ``TRAINER_NAMES``         imports the trainers and hands out the class
one of them, package removed     ImportError: reinstall, or delete this file
any other name, ``__path__``...  AttributeError, at once and without importing anything
===============================  ===========================================================================

So other people's trainers never notice it, not even after ``pip uninstall nnunet-dp``. It lies beside
``nnUNetTrainer.py`` rather than in ``variants/``, because the subpackage ``primus`` is searched before
``variants`` and imports timm, which takes seconds.

Where the installation is read-only there is a second way, ``nnUNet_extTrainer``: a variable that names
folders of trainer modules. It must name the trainers folder itself: with a parent folder, nnU-Net imports the
classes a second time under another module name and ``isinstance`` fails.

Example:
    >>> print(shim_text().splitlines()[0].startswith(MARKER))
    True
"""

import importlib.util
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from nnunet_dp import TRAINER_NAMES, __version__
from nnunet_dp.errors import Refusal
from nnunet_dp.replacing import replacing

MARKER = "# Written by `nnunet-dp link`"
"""How a file that we wrote, and may therefore replace or delete, begins."""

SHIM_NAME = "nnunet_dp_link.py"
"""Sorts after ``nnUNetTrainer.py``, so that stock nnU-Net finds its own trainer first."""

TRAINERS_MODULE = "nnunet_dp.trainers.nnUNetTrainerDP"

VARIABLE = "nnUNet_extTrainer"

_SHIM = '''\
{marker}, version {version}. Remove with `nnunet-dp link --remove`, or delete this file.
"""Answers to the trainer names of nnunet-dp alone, and imports it only when asked for one of them."""

_TRAINER_NAMES = {names!r}


def __getattr__(name):
    if name not in _TRAINER_NAMES:
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    import importlib

    try:
        module = importlib.import_module({module!r})
    except ModuleNotFoundError as error:
        if error.name not in ("nnunet_dp", "nnunet_dp.trainers", {module!r}):
            raise  # a dependency is missing: its own name says more
        raise ImportError(
            f"{{name}} belongs to the package nnunet-dp, which is no longer installed here. "
            f"Install it again (pip install nnunet-dp), or delete {{__file__}}"
        ) from error
    return getattr(module, name)
'''


def shim_text() -> str:
    """Returns the source of the shim; until one of our names is asked it needs only the standard library."""
    return _SHIM.format(marker=MARKER, version=__version__, names=TRAINER_NAMES, module=TRAINERS_MODULE)


def link(folder: Path | None = None) -> Path:
    """Writes the shim into nnU-Net's trainer folder; a shim that is already right is left untouched.

    Args:
        folder: nnU-Net's trainer folder; None finds the one of the installed nnunetv2.

    Returns:
        Where the shim lies.

    Raises:
        Refusal: nnU-Net is not installed, its folder is read-only, or a file of that name is not ours.
    """
    shim = _shim_path(folder)
    if shim.exists() and _own_text(shim) == shim_text():
        return shim
    try:
        with replacing(shim) as stream:  # a training that starts meanwhile never imports half a file
            stream.write(shim_text().encode())
    except OSError as error:
        raise _read_only(shim.parent) from error
    return shim


def unlink(folder: Path | None = None) -> bool:
    """Removes the shim.

    Args:
        folder: nnU-Net's trainer folder; None finds the one of the installed nnunetv2.

    Returns:
        Whether there was one to remove.

    Raises:
        Refusal: nnU-Net is not installed, its folder is read-only, or the file is not ours.
    """
    shim = _shim_path(folder)
    if not shim.exists():
        return False
    _own_text(shim)
    try:
        shim.unlink()
        Path(importlib.util.cache_from_source(str(shim))).unlink(missing_ok=True)
    except OSError as error:
        raise _read_only(shim.parent) from error
    return True


def is_linked(folder: Path | None = None) -> bool:
    """Returns whether nnU-Net finds our trainers by a shim of exactly this version."""
    shim = _shim_path(folder)
    return shim.exists() and shim.read_text() == shim_text()


def external_trainer_path() -> Path:
    """Returns the absolute folder of our trainers, for ``nnUNet_extTrainer``."""
    spec = importlib.util.find_spec("nnunet_dp.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise Refusal("nnunet_dp.trainers should be installed, found none; type: pip install nnunet-dp")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def external_trainer_export(environment: Mapping[str, str]) -> str:
    """Returns the shell line that adds our trainers to ``nnUNet_extTrainer`` and keeps what it names already.

    Args:
        environment: The caller's environment, such as ``os.environ``.

    Example:
        >>> external_trainer_export({}).startswith("export nnUNet_extTrainer=")
        True
    """
    ours = str(external_trainer_path())
    folders = [folder for folder in environment.get(VARIABLE, "").split(os.pathsep) if folder.strip()]
    if ours not in folders:
        folders.append(ours)
    return f"export {VARIABLE}={shlex.quote(os.pathsep.join(folders))}"


def _shim_path(folder: Path | None) -> Path:
    return (folder or _trainer_folder()) / SHIM_NAME


def _trainer_folder() -> Path:
    """Finds the trainer folder of the installed nnU-Net without importing it, which would take seconds."""
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise Refusal(
            "nnU-Net v2 should be installed here, found none; type: pip install 'nnunetv2>=2.8.1,<2.9'"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "training" / "nnUNetTrainer"


def _own_text(shim: Path) -> str:
    text = shim.read_text()
    if not text.startswith(MARKER):
        raise Refusal(
            f"{shim} should be a file that nnunet-dp wrote, found another one; "
            "move it away and type again: nnunet-dp link"
        )
    return text


def _read_only(folder: Path) -> Refusal:
    return Refusal(
        f"nnU-Net's trainer folder should be writable, but {folder} could not be changed; "
        'use the environment variable instead: eval "$(nnunet-dp env)"'
    )
