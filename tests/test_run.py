"""A run on disk: one training per folder, old charges kept, checkpoints whole and without code."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_dp.charges import Charge, LedgerError, epsilon_of
from nnunet_dp.errors import Refusal
from nnunet_dp.ledger import Ledger
from nnunet_dp.morphology import FILE as RULES
from nnunet_dp.run import FINAL, LATEST, LEDGER, RunFolder, read_checkpoint, write_checkpoint

MODEL = "nnUNetTrainerDP__nnUNetPlansDP_eps8__2d"
PLAN = "0a"


def run_folder(root: Path, fold: int = 0, model: str = MODEL) -> RunFolder:
    results = root / "results"
    folder = results / model / f"fold_{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    return RunFolder(folder, root / LEDGER, results)


def charge(ledger: Ledger, steps: int = 3) -> None:
    for step in range(steps):
        ledger.charge(Charge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, first_step=step))


def trained(root: Path, fold: int = 0, model: str = MODEL) -> RunFolder:
    """A folder in which a run charged three steps and left its files."""
    run = run_folder(root, fold, model)
    charge(run.start(PLAN, continuing=False))
    write_checkpoint(state_of(run), run.folder / LATEST)
    write_checkpoint({"network_weights": {}}, run.folder / FINAL)
    return run


def state_of(run: RunFolder) -> dict[str, Any]:
    newest = Ledger(run.dataset_ledger, "reader", PLAN).entries[-1]
    return {"run": newest.run, "plan": newest.plan}


def cut_last_line(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


# ---- one training per folder -------------------------------------------------------------------------------------


def test_a_run_is_named_by_model_and_fold(tmp_path):
    run = run_folder(tmp_path)
    assert run.name == f"{MODEL}/fold_0" and repr(run) == f"RunFolder({MODEL}/fold_0)"


def test_a_second_training_in_the_folder_is_refused(tmp_path):
    first, second = run_folder(tmp_path), run_folder(tmp_path)
    first.lock()
    with pytest.raises(Refusal, match="another training is writing"):
        second.lock()


def test_the_folder_stays_locked_when_nobody_holds_the_value_any_more(tmp_path):
    run_folder(tmp_path).lock()
    with pytest.raises(Refusal, match="another training is writing"):
        run_folder(tmp_path).lock()


def test_another_fold_may_train_meanwhile(tmp_path):
    first, second = run_folder(tmp_path, 0), run_folder(tmp_path, 1)
    first.lock()
    second.lock()


def test_the_lock_dies_with_its_process(tmp_path):
    run = run_folder(tmp_path)
    program = (
        "import os, sys; from pathlib import Path; from nnunet_dp.run import RunFolder\n"
        "folder = Path(sys.argv[1]); RunFolder(folder, folder, folder).lock(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(run.folder)]).returncode == 9
    run.lock()


# ---- starting and continuing -------------------------------------------------------------------------------------


def test_a_charge_stands_in_the_dataset_and_beside_the_model(tmp_path):
    run = trained(tmp_path)
    assert run.dataset_ledger.read_bytes() == (run.folder / LEDGER).read_bytes()
    assert run.dataset_ledger.read_bytes().count(b"\n") == 3


def test_two_runs_in_one_folder_have_different_names(tmp_path):
    run = run_folder(tmp_path)
    assert run.start(PLAN, False).run != run.start(PLAN, False).run


def test_continuing_where_nothing_was_begun_starts_anew(tmp_path):
    assert run_folder(tmp_path).start(PLAN, continuing=True).entries == ()


def test_continuing_without_the_checkpoint_is_refused_once_charges_exist(tmp_path):
    run = trained(tmp_path)
    (run.folder / LATEST).unlink()
    with pytest.raises(Refusal, match=f"{LATEST} is missing"):
        run.start(PLAN, continuing=True)
    assert (run.folder / FINAL).is_file()  # nothing was archived on the way


def test_continuing_one_fold_is_not_confused_by_the_charges_of_another(tmp_path):
    trained(tmp_path, fold=1)
    assert run_folder(tmp_path, fold=0).start(PLAN, continuing=True).run.startswith(f"{MODEL}/fold_0/")


def test_fold_1_is_not_confused_with_fold_10(tmp_path):
    trained(tmp_path, fold=10)
    run_folder(tmp_path, fold=1).start(PLAN, continuing=True)


def test_resuming_continues_the_same_run(tmp_path):
    run = trained(tmp_path)
    ledger = run.resume(state_of(run))
    charge(ledger, 1)
    assert len(ledger.entries_of(ledger.run)) == 4


@pytest.mark.parametrize("copy_is_there", [True, False])
def test_resuming_without_the_datasets_ledger_is_refused(copy_is_there, tmp_path):
    run = trained(tmp_path)
    state = state_of(run)
    run.dataset_ledger.unlink()
    if not copy_is_there:
        (run.folder / LEDGER).unlink()
    with pytest.raises(Refusal, match="put"):
        run.resume(state)


# ---- archive -----------------------------------------------------------------------------------------------------


def test_starting_anew_archives_the_old_model_and_keeps_its_charges(tmp_path):
    run = trained(tmp_path)
    old = {file.name: file.read_bytes() for file in run.folder.iterdir()}
    ledger = run.start(PLAN, continuing=False)
    (archived,) = (tmp_path / "results" / MODEL / "archive").iterdir()
    assert {file.name: file.read_bytes() for file in archived.iterdir()} == old
    charge(ledger, 2)
    assert len(ledger.entries) == 5 and len(ledger.entries_of(ledger.run)) == 2
    assert epsilon_of(ledger.entries, 1e-5) > epsilon_of(ledger.entries_of(ledger.run), 1e-5)


def test_archives_do_not_collide_and_are_not_mistaken_for_folds(tmp_path):
    run = trained(tmp_path)
    for _ in range(3):
        charge(run.start(PLAN, continuing=False), 1)
    run.start(PLAN, continuing=False)
    model = tmp_path / "results" / MODEL
    assert len(list((model / "archive").iterdir())) == 4
    assert [folder.name for folder in model.iterdir() if folder.name.startswith("fold_")] == ["fold_0"]


def test_the_lock_and_the_new_log_stay_in_the_folder(tmp_path):
    run = trained(tmp_path)
    run.lock()
    log = run.folder / "training_log_now.txt"
    log.write_text("new")
    run.start(PLAN, continuing=False, keep=log)
    assert sorted(file.name for file in run.folder.iterdir()) == ["training.lock", "training_log_now.txt"]
    with pytest.raises(Refusal):
        run_folder(tmp_path).lock()


def test_a_folder_that_holds_only_a_log_is_not_archived(tmp_path):
    run = run_folder(tmp_path)
    (run.folder / "training_log_refused.txt").write_text("a refusal")
    run.start(PLAN, continuing=False)
    assert not (tmp_path / "results" / MODEL / "archive").exists()


@pytest.mark.parametrize("name", [LEDGER, RULES])
def test_what_an_older_run_left_is_archived_even_if_only_its_rules_or_its_lines_are_there(name, tmp_path):
    run = run_folder(tmp_path)
    (run.folder / name).touch()
    (run.folder / "progress.png").touch()
    run.start(PLAN, continuing=False)
    assert run.archived is not None and not any(run.folder.iterdir())
    left = {file.name for file in (tmp_path / "results" / MODEL / run.archived).iterdir()}
    assert left == {name, "progress.png"}


# ---- a ledger that lost lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [cut_last_line, Path.unlink])
@pytest.mark.parametrize("other", [MODEL, "nnUNetTrainerDP_AutoS__nnUNetPlansDP_eps1__3d_fullres"])
def test_no_training_starts_when_the_ledger_lost_charges_of_any_model(spoil, other, tmp_path):
    trained(tmp_path, fold=2, model=other)
    run = run_folder(tmp_path)
    spoil(run.dataset_ledger)
    with pytest.raises(Refusal, match=r"[13] charges in .*fold_2.* are missing"):
        run.start(PLAN, continuing=False)


def test_no_training_starts_when_the_ledger_lost_charges_of_an_archived_model(tmp_path):
    run = trained(tmp_path)
    run.start(PLAN, continuing=False)
    run.dataset_ledger.unlink()
    with pytest.raises(Refusal, match="are missing"):
        run_folder(tmp_path, fold=1).start(PLAN, continuing=False)


def test_a_torn_last_line_of_a_copy_is_no_lost_charge(tmp_path):
    run = trained(tmp_path)
    with open(run.folder / LEDGER, "ab") as copy:
        copy.write(b'{"purpose": "tr')
    run.verify_ledger()


def test_an_edited_ledger_is_refused(tmp_path):
    run = trained(tmp_path)
    lines = run.dataset_ledger.read_bytes()
    run.dataset_ledger.write_bytes(lines.replace(b'"noise_multiplier":5', b'"noise_multiplier":9'))
    with pytest.raises(LedgerError, match="line 1"):
        run.start(PLAN, continuing=False)


def test_refusals_name_no_folder_of_this_machine(tmp_path):
    trained(tmp_path).dataset_ledger.unlink()
    with pytest.raises(Refusal) as refusal:
        run_folder(tmp_path).verify_ledger()
    assert str(tmp_path) not in str(refusal.value)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def checkpoint() -> dict[str, Any]:
    return {"weights": [torch.arange(600.0)], "step": 3, "optimizer": {"state": {}}, "mirroring": (0, 1), "best": None}


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path):
    write_checkpoint(checkpoint(), tmp_path / LATEST)
    found = read_checkpoint(tmp_path / LATEST)
    assert torch.equal(found.pop("weights")[0], torch.arange(600.0))
    assert found == {key: value for key, value in checkpoint().items() if key != "weights"}


def test_a_checkpoint_that_could_not_be_written_leaves_the_old_one(tmp_path):
    write_checkpoint(checkpoint(), tmp_path / LATEST)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        write_checkpoint({"lock": threading.Lock()}, tmp_path / LATEST)
    assert read_checkpoint(tmp_path / LATEST)["step"] == 3


def test_a_checkpoint_does_not_know_where_it_was_written(tmp_path):
    write_checkpoint(checkpoint(), tmp_path / LATEST)
    assert str(tmp_path).encode() not in (tmp_path / LATEST).read_bytes()


class Bomb:
    """Pickled, it is a call that makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def save_plain_pickle(content: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, save_plain_pickle])
def test_code_in_a_checkpoint_is_refused_and_not_run(write, tmp_path):
    write({"private": Bomb(tmp_path / "exploded")}, tmp_path / LATEST)
    with pytest.raises(Refusal, match="put an intact copy back"):
        read_checkpoint(tmp_path / LATEST)
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_would_go_off_elsewhere(tmp_path):
    torch.save({"private": Bomb(tmp_path / "exploded")}, tmp_path / LATEST)
    torch.load(tmp_path / LATEST, weights_only=False)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_cut_checkpoint_is_refused(share, tmp_path):
    write_checkpoint(checkpoint(), tmp_path / LATEST)
    content = (tmp_path / LATEST).read_bytes()
    (tmp_path / LATEST).write_bytes(content[: int(share * len(content))])
    with pytest.raises(Refusal, match="put an intact copy back"):
        read_checkpoint(tmp_path / LATEST)


def test_a_checkpoint_with_a_flipped_bit_in_its_weights_is_refused(tmp_path):
    write_checkpoint(checkpoint(), tmp_path / LATEST)
    content = bytearray((tmp_path / LATEST).read_bytes())
    content[content.find(torch.tensor([300.0, 301.0]).numpy().tobytes())] ^= 1
    (tmp_path / LATEST).write_bytes(content)
    with pytest.raises(Refusal, match="put an intact copy back"):
        read_checkpoint(tmp_path / LATEST)


@pytest.mark.parametrize("content", [b"no checkpoint at all", b"\x80\x02.", b"\x00" * 100, b"PK\x03\x04" + b"a" * 50])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / LATEST).write_bytes(content)
    with pytest.raises(Refusal, match="put an intact copy back"):
        read_checkpoint(tmp_path / LATEST)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(Refusal, match="put an intact copy back"):
        read_checkpoint(tmp_path / LATEST)
