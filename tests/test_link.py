"""The link, asked as nnU-Net asks it: by its own finder, on copies of its trainer folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_dp import TRAINER_NAMES
from nnunet_dp import link as linking
from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal


@pytest.fixture
def stub_trainers(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Stands in for the trainers, which import torch and nnU-Net."""
    classes = {name: type(name, (), {}) for name in TRAINER_NAMES}
    module = ModuleType(linking.TRAINERS_MODULE)
    vars(module).update(classes)
    monkeypatch.setitem(sys.modules, linking.TRAINERS_MODULE, module)
    return classes


def load_shim(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("a_shim", linking.link(folder))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_trainer_folder(root: Path, package: str) -> Path:
    """A package that resembles nnU-Net's: a module, and a subpackage that must not be imported."""
    folder = root / package / "nnUNetTrainer"
    (folder / "primus").mkdir(parents=True)
    for init in (root / package, folder, folder / "primus"):
        (init / "__init__.py").touch()
    (folder / "nnUNetTrainer.py").write_text("class nnUNetTrainer: pass\n")
    (folder / "primus" / "slow.py").write_text("raise RuntimeError('a subpackage was imported')\n")
    return folder


@pytest.fixture(scope="module")
def nnunet_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed nnunetv2, linked by the command itself; the environment stays as it is."""
    root = tmp_path_factory.mktemp("copy")
    spec = importlib.util.find_spec("nnunetv2")
    assert spec is not None and spec.submodule_search_locations
    ignored = shutil.ignore_patterns("tests", "__pycache__", linking.SHIM_NAME)
    shutil.copytree(next(iter(spec.submodule_search_locations)), root / "nnunetv2", ignore=ignored)
    run_python(root, "import sys; from nnunet_dp.cli import main; sys.exit(main(['link']))")
    return root


def run_python(path: Path, program: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), **variables}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", TRAINER_NAMES)
def test_the_finder_of_nnunet_gets_each_of_our_classes(name, tmp_path, monkeypatch, stub_trainers):
    package = f"fake_{name}"
    linking.link(fake_trainer_folder(tmp_path, package))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = str(tmp_path / package / "nnUNetTrainer")
    found = recursive_find_python_class(folder, name, f"{package}.nnUNetTrainer", str(tmp_path))
    assert found is stub_trainers[name]


@pytest.mark.parametrize(
    "name", ["nnUNetTrainer_5epochs", "nnUNetTrainerDP_", "__path__", "__wrapped__", "__all__"]
)
def test_any_other_name_is_an_attribute_error_and_imports_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, linking.TRAINERS_MODULE, None)  # importing it would fail
    assert not hasattr(load_shim(tmp_path), name)


def test_after_an_uninstall_only_our_names_fail_and_say_which_file_to_delete(tmp_path):
    shim = linking.link(tmp_path)
    program = (
        "import nnunet_dp_link as shim\n"
        "assert not hasattr(shim, 'nnUNetTrainer_5epochs')\n"
        "try: shim.nnUNetTrainerDP_AutoS\n"
        "except ImportError as error: print(type(error).__name__, error)\n"
    )
    # -S leaves site-packages out, and with them this package.
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ImportError nnUNetTrainerDP_AutoS")
    assert "no longer installed" in done.stdout and shim.name in done.stdout


def test_a_missing_dependency_of_the_trainers_is_named_and_not_called_an_uninstall(tmp_path, monkeypatch):
    shim = load_shim(tmp_path)

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'opacus'", name="opacus")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="opacus"):
        _ = shim.nnUNetTrainerDP


def test_the_shim_is_searched_after_the_trainer_of_nnunet_itself():
    assert sorted([linking.SHIM_NAME, "nnUNetTrainer.py"])[0] == "nnUNetTrainer.py"


def test_linking_twice_writes_once(tmp_path):
    written = linking.link(tmp_path).stat().st_mtime_ns
    assert linking.link(tmp_path).stat().st_mtime_ns == written
    assert linking.is_linked(tmp_path)


def test_a_shim_of_another_version_is_replaced(tmp_path):
    shim = tmp_path / linking.SHIM_NAME
    shim.write_text(f"{linking.MARKER}, version 0.0.1.\n")
    assert not linking.is_linked(tmp_path)
    linking.link(tmp_path)
    assert linking.is_linked(tmp_path)


def test_removing_leaves_nothing_behind_and_says_whether_there_was_something(tmp_path):
    load_shim(tmp_path)  # leaves a cached compilation as well
    assert linking.unlink(tmp_path)
    assert not linking.unlink(tmp_path)
    assert not list(tmp_path.rglob("*.py*"))


@pytest.mark.parametrize("act", [linking.link, linking.unlink])
def test_a_file_that_we_did_not_write_is_neither_replaced_nor_removed(act, tmp_path):
    (tmp_path / linking.SHIM_NAME).write_text("precious = True\n")
    with pytest.raises(Refusal, match="move it away"):
        act(tmp_path)
    assert (tmp_path / linking.SHIM_NAME).read_text() == "precious = True\n"


def test_a_read_only_installation_is_told_of_the_environment_variable(tmp_path, monkeypatch):
    def read_only(*_: object) -> None:
        raise PermissionError("Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(Refusal, match="nnunet-dp env"):
        linking.link(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_nnunet_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match="pip install"):
        linking.link()


def test_the_external_path_is_the_trainers_folder_itself():
    folder = linking.external_trainer_path()
    assert folder.is_absolute()
    assert (folder / "nnUNetTrainerDP.py").is_file()


def test_folders_already_named_in_the_variable_are_kept():
    ours = str(linking.external_trainer_path())
    line = linking.external_trainer_export({linking.VARIABLE: os.pathsep.join(["/their trainers", ""])})
    assert line == f"export nnUNet_extTrainer='/their trainers{os.pathsep}{ours}'"
    assert linking.external_trainer_export({linking.VARIABLE: ours}) == f"export nnUNet_extTrainer={ours}"


def test_the_line_for_the_shell_is_understood_by_a_shell(capsys, monkeypatch):
    monkeypatch.setenv(linking.VARIABLE, "/it's theirs")
    assert main(["env"]) == 0
    script = capsys.readouterr().out + 'printf %s "$nnUNet_extTrainer"'
    printed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed == f"/it's theirs{os.pathsep}{linking.external_trainer_path()}"


FIND = "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"


def test_linked_nnunet_finds_our_trainer_without_searching_its_subpackages(nnunet_copy):
    program = FIND + "import sys\nprint(find('nnUNetTrainerDP_AutoS').__module__, 'timm' in sys.modules)"
    assert run_python(nnunet_copy, program).split() == [linking.TRAINERS_MODULE, "False"]


def test_linked_nnunet_finds_its_own_trainers_and_refuses_unknown_names_as_before(nnunet_copy):
    program = FIND + (
        "print(find('nnUNetTrainer').__name__, find('nnUNetTrainer_5epochs').__name__)\n"
        "try: find('nnUNetTrainerUnheardOf')\n"
        "except RuntimeError as error: print(str(error)[:35])\n"
    )
    expected = "nnUNetTrainer nnUNetTrainer_5epochs\nCould not find requested nnunet tra\n"
    assert run_python(nnunet_copy, program) == expected


def test_the_environment_variable_alone_is_enough(nnunet_copy):
    folder = nnunet_copy / "nnunetv2" / "training" / "nnUNetTrainer"
    program = FIND + "print(find('nnUNetTrainerDP_AutoS').__name__)"
    linking.unlink(folder)
    try:
        output = run_python(nnunet_copy, program, nnUNet_extTrainer=str(linking.external_trainer_path()))
    finally:
        linking.link(folder)
    assert output.splitlines()[-1] == "nnUNetTrainerDP_AutoS"
