"""A finished model and its archive, of which one file was edited, damaged or mixed up: the commands that read them.

As ``test_fuzzed_files``, through the command line: whatever is refused is a ``Refusal``; no other exception.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from released import archive_of, fake_model, files_of

from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal
from nnunet_dp.export import export_model
from nnunet_dp.morphology import FILE as RULES
from nnunet_dp.released_model import DESCRIPTION, MANIFEST, PLANS
from nnunet_dp.run import CARD, FINAL, LEDGER

Files = dict[str, bytes]


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A user's folders."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        for part in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{part}", f"{root}/{part}")
        yield Path(root)


@functools.cache
def _good() -> tuple[Files, str, Files]:
    """Every file of a user who has trained a model; the model's folder in its archive, and the files there."""
    with _place() as root:
        model = fake_model(root)
        model.finish()
        export_model(model.folder, root / "model.zip")
        name, released = files_of((root / "model.zip").read_bytes())
        folder = root.rglob("*")
        return {str(file.relative_to(root)): file.read_bytes() for file in folder if file.is_file()}, name, released


def _run(*arguments: object) -> None:
    """Type a command; only a refusal may end it early."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Refusal):
        assert main(["--debug", *map(str, arguments)]) in (0, 1)


SMALL = (CARD, PLANS, DESCRIPTION, MANIFEST, RULES)


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(data=st.data())
def test_verify_lists_the_faults_of_any_archive(name, data):
    """Without weights, which are missed and named; they take most of the time."""
    _, root, released = _good()
    files = {name: content for name, content in released.items() if not name.startswith("fold_")}
    content = archive_of(root, files | {name: data.draw(damaged(released[name]))}, listed=name != MANIFEST)
    with _place() as place:
        (place / "model.zip").write_bytes(content)
        _run("verify", place / "model.zip", *data.draw(st.sampled_from([(), ("--json",)])))


@settings(max_examples=50)
@given(data=st.data())
def test_verify_lists_the_faults_of_a_damaged_archive(data):
    _, root, released = _good()
    with _place() as place:
        (place / "model.zip").write_bytes(data.draw(damaged(archive_of(root, released))))
        _run("verify", place / "model.zip")


@pytest.mark.parametrize("name", [PLANS, DESCRIPTION, f"fold_0/{RULES}", f"fold_0/{FINAL}", f"fold_0/{LEDGER}"])
@pytest.mark.parametrize("command", ["status", "card"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(data=st.data())
def test_a_model_is_counted_or_refused_in_words(name, command, data):
    files, _, _ = _good()
    with _place() as place:
        for file, content in files.items():
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(content)
            (place / file).chmod(0o600)  # as the dataset's secret must be
        (model,) = (file.parent for file in place.glob(f"results/*/*/{PLANS}"))
        (model / name).write_bytes(data.draw(damaged((model / name).read_bytes())))
        _run("status", model / "fold_0") if command == "status" else _run("card", "-m", model, "-o", place / "card")
