"""The package as it is shipped: what the wheel holds, who imports whom, what the tree does not say."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
CORE = CHECKOUT / "nnunet_dp"
DOORS = {"trainers": "nnunet_dp/trainers", "postprocessing": "nnunet_dp/postprocessing"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("nnunet_dp", *DOORS):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (CHECKOUT / file).is_file():
            shutil.copy(CHECKOUT / file, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(source / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    return next((source / "dist").glob("nnunet_dp-*.whl"))


def source_files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*.py")) if "__pycache__" not in file.parts)


def imported_modules(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_wheel_holds_the_core_and_both_doors(wheel):
    expected = {str(file.relative_to(CHECKOUT)) for file in source_files(CORE)}
    for door, place in DOORS.items():
        folder = CHECKOUT / door
        expected |= {f"{place}/{file.relative_to(folder)}" for file in source_files(folder)}
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.endswith(".py")}
    assert shipped == expected


def test_the_wheel_carries_the_templates_of_the_card(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if "/templates/" in name}
    assert shipped == {f"nnunet_dp/templates/{file.name}" for file in (CORE / "templates").iterdir()} and shipped


def test_the_wheel_carries_the_licence_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "nnunet-dp = nnunet_dp.cli:main" in archive.read(entry_points).decode()
    assert any(name.endswith("LICENSE") for name in names)


def test_an_installed_wheel_finds_its_doors_inside_itself(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import nnunet_dp.postprocessing, nnunet_dp.trainers\n"
        "from nnunet_dp.link import external_trainer_path\n"
        "print(nnunet_dp.trainers.__file__, nnunet_dp.postprocessing.__file__)\n"
        "print(external_trainer_path())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    inside = tmp_path / "nnunet_dp"
    expected = [inside / "trainers/__init__.py", inside / "postprocessing/__init__.py", inside / "trainers"]
    assert done.stdout.split() == [str(path) for path in expected]


def test_only_the_files_named_after_it_import_nnunet():
    users = {file.name for file in source_files(CORE) if any(map(is_nnunet, imported_modules(file)))}
    named = {"files", "planning", "start", "site", "federated", "public_plans", "fingerprint", "dataset_fingerprint"}
    named |= {"inference", "cases", "checkup", "audit"}
    assert users <= {"nnunet.py", *(f"nnunet_{what}.py" for what in named)}


def is_nnunet(module: str) -> bool:
    return module.split(".")[0] == "nnunetv2"


def test_no_core_file_imports_a_door():
    doors = ("nnunet_dp.trainers", "nnunet_dp.postprocessing")
    for file in source_files(CORE):
        assert not [module for module in imported_modules(file) if module.startswith(doors)], file.name


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, nnunet_dp; sys.exit(bool({'torch', 'nnunetv2', 'numpy', 'typer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_every_module_says_what_it_is():
    for file in (*source_files(CORE), *(file for door in DOORS for file in source_files(CHECKOUT / door))):
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file.name} has no module docstring"


def text_files() -> Iterator[tuple[str, str]]:
    """What git would hold of this checkout, with the files not yet added; (relative name, text)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        try:
            yield name, (CHECKOUT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue


def test_no_file_tells_where_it_was_written():
    here = re.compile(rf"(?<![\w.]){re.escape(str(CHECKOUT))}(?!\w)|/(?:home|Users)/\w+")
    assert [name for name, text in text_files() if here.search(text)] == []


@pytest.mark.parametrize(
    "script", sorted((CHECKOUT / "setup_scripts").glob("*.sh")), ids=lambda file: file.name
)
def test_a_script_is_executable_and_parses(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_the_environment_script_makes_folders_and_survives_an_apostrophe(tmp_path):
    base = tmp_path / "a patient's folder"
    program = f'eval "$({CHECKOUT}/setup_scripts/environment.sh "$1")"; printf %s "$nnUNet_raw"'
    done = subprocess.run(["sh", "-c", program, "sh", str(base)], capture_output=True, text=True, check=True)
    assert done.stdout == str(base / "nnUNet_raw")
    assert (base / "nnUNet_preprocessed").is_dir() and (base / "nnUNet_results").is_dir()


def test_continuous_integration_runs_exactly_the_test_script():
    commands = (CHECKOUT / ".ci" / "run").read_text().splitlines()
    assert commands[-1] == "./setup_scripts/test.sh" and os.access(CHECKOUT / ".ci" / "run", os.X_OK)
