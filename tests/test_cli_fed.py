"""The commands `nnunet-dp fed` as typed: what they write, say and refuse, without any of Flower's processes."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_dp.cli import main
from nnunet_dp.federated import deployment, simulate
from nnunet_dp.federated.site_settings import read_settings
from nnunet_dp.phantoms import write_dataset

COMMANDS = ("split", "simulate", "status", "init-site", "site", "server", "run")


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    return write_dataset(tmp_path / "raw", "lesion", 6, 3, dataset_id=4, shape=(32, 32))


def told(capsys, *arguments: object, exit_code: int = 0) -> str:
    assert main(["fed", *map(str, arguments)]) == exit_code
    captured = capsys.readouterr()
    return captured.out + captured.err


# ---- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_an_example(command, capsys):
    said = told(capsys, command, "--help")
    assert "Example:" in said and f"nnunet-dp fed {command}" in said


def test_help_imports_neither_torch_nor_nnunet_nor_flower():
    program = (
        "import sys\nfrom nnunet_dp.cli import main\nmain(['fed', 'simulate', '--help'])\n"
        "assert not {'torch', 'nnunetv2', 'flwr', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


# ---- split -------------------------------------------------------------------------------------------------------


def test_split_says_what_it_made_and_what_to_type_next(raw, capsys):
    said = told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 301)
    assert "Dataset301_PhantomLesionSite1: 3 patients" in said
    assert "Next: nnunet-dp fed simulate --datasets 301 302" in said


def test_split_tells_machines_the_same(raw, capsys):
    told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 301, "--by", "dirichlet", "--alpha", 0.3)
    assert main(["fed", "split", "-d", "4", "--sites", "3", "--first-id", "311", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out.splitlines()[-1])["sites"]
    assert [site["id"] for site in sites] == [311, 312, 313] and sum(site["units"] for site in sites) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--first-id", 301), "--sites 4"),
        (("--first-id", 301, "--by", "column"), "--column NAME"),
        (("--first-id", 4, "--sites", 2), "found datasets 4"),
        (("--first-id", 301, "--sites", 2, "--fold", 9), "fold 9"),
    ],
)
def test_split_refuses_in_one_line(raw, capsys, options, words):
    if "--fold" in options:  # nnU-Net's own file of folds
        cases = sorted(file.stem for file in (raw / "labelsTr").iterdir())
        splits = [{"train": [case for case in cases if case != cases[-1]], "val": [cases[-1]]}]
        (raw / "patients.csv").unlink()
        (raw / "splits_final.json").write_text(json.dumps(splits))
    said = told(capsys, "split", "-d", 4, *options, exit_code=2)
    assert words in said and len(said.splitlines()) == 1


# ---- hospitals and coordinator -----------------------------------------------------------------------------------


def test_a_new_site_has_settings_that_teach_and_a_key_that_only_it_can_read(raw, tmp_path, capsys):
    folder = tmp_path / "north"
    said = told(capsys, "init-site", folder, "--name", "north", "-d", 4, "--max-epsilon", 8)
    settings = read_settings(folder / "site.toml")
    assert (settings.name, settings.dataset, settings.max_epsilon, settings.delta) == ("north", "4", 8.0, None)
    assert not settings.allow_no_guarantee and settings.dataset_name() == raw.name
    assert "site_key.pub" in said and f"nnunet-dp fed site {folder} --server" in said
    assert stat.S_IMODE((folder / "site_key").stat().st_mode) == 0o600
    assert (folder / "site.toml").read_text().count("#") >= 8


def test_a_dataset_that_is_not_there_yet_is_noted_with_those_that_are(raw, tmp_path, capsys):
    said = told(capsys, "init-site", tmp_path / "north", "--name", "north", "-d", 5, "--max-epsilon", 8)
    assert "NOTE: '5' should name one dataset" in said and f"there are: {raw.name}" in said
    assert "NOTE" not in told(capsys, "init-site", tmp_path / "south", "--name", "south", "-d", 4, "--max-epsilon", 8)


def test_settings_given_at_once_are_in_the_file(tmp_path, capsys):
    told(capsys, "init-site", tmp_path / "s", "--name", "s", "-d", "Dataset004_X", "--max-epsilon", 3, "--delta", 1e-4,
         "-device", "cuda", "-np", 4)  # fmt: skip
    settings = read_settings(tmp_path / "s" / "site.toml")
    assert (settings.delta, settings.device, settings.processes, settings.max_epsilon) == (1e-4, "cuda", 4, 3.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--name", "../up", "-d", 4, "--max-epsilon", 8), "name"),
        (("--name", "north", "-d", 4, "--max-epsilon", 0), "max_epsilon"),
        (("--name", "north", "-d", "brains", "--max-epsilon", 8), "dataset"),
        (("--name", 'n"\nmax_epsilon = 99', "-d", 4, "--max-epsilon", 8), "name"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, capsys, options, words):
    said = told(capsys, "init-site", tmp_path / "s", *options, exit_code=2)
    assert words in said and not (tmp_path / "s").exists()


def test_a_site_that_exists_is_not_written_again(tmp_path, capsys):
    options = (tmp_path / "s", "--name", "s", "-d", 4, "--max-epsilon", 8)
    told(capsys, "init-site", *options)
    before = (tmp_path / "s" / "site_key").read_bytes()
    assert "another folder" in told(capsys, "init-site", *options, exit_code=2)
    assert (tmp_path / "s" / "site_key").read_bytes() == before


def test_a_lost_key_is_missed_by_name_and_never_replaced_silently(raw, tmp_path, capsys):
    options = (tmp_path / "s", "--name", "s", "-d", 4, "--max-epsilon", 8)
    told(capsys, "init-site", *options)
    (tmp_path / "s" / "ca.pem").write_text("x")
    (tmp_path / "s" / "site_key").unlink()
    said = told(capsys, "site", tmp_path / "s", "--server", "here:9092", exit_code=2)
    assert "put it back from a backup" in said and "init-site NEW_FOLDER --name s -d 4 --max-epsilon 8" in said
    (tmp_path / "s" / "site.toml").unlink()
    before = (tmp_path / "s" / "site_key.pub").read_bytes()
    assert "another folder" in told(capsys, "init-site", *options, exit_code=2)
    assert (tmp_path / "s" / "site_key.pub").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--server", "here"), "HOST:PORT"),
        (("--server", "here:9092"), "ca.pem"),
    ],
)
def test_a_site_does_not_connect_without_knowing_to_whom(raw, tmp_path, capsys, options, words):
    told(capsys, "init-site", tmp_path / "s", "--name", "s", "-d", 4, "--max-epsilon", 8)
    assert words in told(capsys, "site", tmp_path / "s", *options, exit_code=2)


def test_a_certificate_and_insecure_contradict_each_other(raw, tmp_path, capsys):
    told(capsys, "init-site", tmp_path / "s", "--name", "s", "-d", 4, "--max-epsilon", 8)
    (tmp_path / "s" / "ca.pem").write_text("x")
    assert "--insecure" in told(capsys, "site", tmp_path / "s", "--server", "h:1", "--insecure", exit_code=2)


def test_a_server_takes_a_whole_certificate_or_none(tmp_path, capsys):
    (tmp_path / "x.pem").write_text("x")
    said = told(capsys, "server", tmp_path / "c", "--certificate", tmp_path / "x.pem", exit_code=2)
    assert "go together" in said
    said = told(capsys, "server", tmp_path / "c", "--insecure", "--register", tmp_path / "x.pem", exit_code=2)
    assert "neither certificates nor keys" in said


def test_without_a_server_no_run_begins(tmp_path, capsys):
    (tmp_path / "dataset.json").write_text("{}")
    options = ("--sites", 2, "--patients", 100, "--dataset-json", tmp_path / "dataset.json")
    assert "no server runs" in told(capsys, "run", tmp_path, *options, exit_code=2)


def test_a_server_that_ended_does_not_count_as_running(tmp_path):
    note = {"address": "127.0.0.1:9092", "authority": None, "process": {"pid": 2**22 - 1, "started": 1}}
    (tmp_path / deployment.SERVER).write_text(json.dumps(note))
    assert not deployment.is_running(tmp_path)


def test_ctrl_c_stops_a_run_at_its_server_and_says_how_to_go_on(tmp_path, monkeypatch):
    pytest.importorskip("flwr")
    from nnunet_dp.federated import flower_environment, flower_processes

    def interrupted(*_):
        raise KeyboardInterrupt

    asked, said = [], []
    monkeypatch.setattr(flower_environment, "flwr", lambda server, *words: asked.append(words))
    monkeypatch.setattr(flower_processes.FlowerProcesses, "submit", lambda *_: SimpleNamespace(run_id="17"))
    monkeypatch.setattr(flower_processes.FlowerProcesses, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployment.follow(tmp_path, tmp_path / "runs" / "a", None, said.append, tmp_path / "config.json", tmp_path)
    assert asked == [("stop", "17")]
    assert said == [f"interrupted; `nnunet-dp fed run {tmp_path} --resume {tmp_path}/runs/a` goes on"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sites", 2, "--patients", 9), "--dataset-json"),
        (("--resume", "runs/a", "--epsilon", 2), "found --epsilon beside it"),
        (("--resume", "runs/a"), "no server runs"),
    ],
)
def test_run_needs_its_sites_or_a_run_to_go_on_with_and_nothing_beside_that(tmp_path, capsys, options, words):
    assert words in told(capsys, "run", tmp_path, *options, exit_code=2)


def test_status_of_a_coordinators_folder_names_its_runs(tmp_path, capsys):
    (tmp_path / "runs" / "run_a").mkdir(parents=True)
    (tmp_path / "runs" / "run_a" / "config.json").write_text("{}")
    assert f"give one of them: {tmp_path}/runs/run_a" in told(capsys, "status", tmp_path, exit_code=2)


def test_without_the_extra_the_refusal_says_what_to_install(raw, monkeypatch, capsys):
    monkeypatch.setattr(deployment.importlib.util, "find_spec", lambda name: None)
    said = told(capsys, "simulate", "--datasets", 4, exit_code=2)
    assert "pip install 'nnunet-dp[federated]'" in said


# ---- simulate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--datasets"),
        (("--datasets", 4, 4), "once"),
        (("--datasets", 4, 5), "found 0"),
        (("--datasets", 4, "--epsilon", 0), "--epsilon"),
        (("--datasets", 4, "--epsilon", 5000), "--epsilon"),
        (("--datasets", 4, "--minimum-replies", 2), "--minimum-replies"),
        (("--datasets", 4, "--weights", "nobody=1"), "name every site"),
        (("--datasets", 4, "--weights", "north"), "names and numbers"),
        (("--datasets", 4, "-p", "a", "--plans-from", "b"), "exclude"),
        (("--datasets", 4, "--no-patient-overlap"), "--plans-from"),
        (("--datasets", 4, "-o", "a__b"), "double underscore"),
        (("--datasets", 4, "--features", "a"), "--features"),
        (("--resume",), "--resume --folder FOLDER"),
        (("--resume", "--folder", "results"), "folder of a simulation"),
        (("--resume", "--folder", "results", "--rounds", 9, "--epsilon", 2), "found --rounds, --epsilon beside it"),
    ],
)
def test_simulate_refuses_in_one_line_before_anything_starts(raw, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    said = told(capsys, "simulate", *options, exit_code=2)
    assert words in said and len(said.splitlines()) == 1
    assert not any((tmp_path / "results").iterdir())


def test_ctrl_c_before_a_run_is_decided_leaves_a_folder_for_the_next_attempt(raw, tmp_path, monkeypatch, capsys):
    from nnunet_dp.federated import new_run

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(new_run, "find_plans", lambda *_: None)
    monkeypatch.setattr(new_run, "make_run", interrupted)
    run = tmp_path / "run"
    said = told(capsys, "simulate", "--datasets", 4, "--folder", run, exit_code=130)
    assert f"no site was asked yet: the same command with --folder {run} begins again" in said
    write_dataset(raw.parent, "lesion", 2, 3, dataset_id=5, shape=(32, 32)).rename(raw.parent / "Dataset005_Other")
    told(capsys, "simulate", "--datasets", 5, "--folder", run, exit_code=130)
    assert [file.stem for file in (run / "settings").iterdir()] == ["Other"]


def test_a_second_simulation_in_one_folder_is_refused_while_the_first_works(raw, tmp_path, monkeypatch, capsys):
    from nnunet_dp.federated import new_run

    run, tried = tmp_path / "run", []

    def meanwhile(*_):
        settings = {file.name for file in (run / "settings").iterdir()}
        tried.append(told(capsys, "simulate", "--datasets", 5, "--folder", run, exit_code=1))
        assert {file.name for file in (run / "settings").iterdir()} == settings == {"PhantomLesion.toml"}
        (run / "config.json").touch()  # as soon as it is decided
        tried.append(told(capsys, "simulate", "--resume", "--folder", run, exit_code=1))
        raise KeyboardInterrupt

    monkeypatch.setattr(new_run, "find_plans", meanwhile)
    write_dataset(raw.parent, "lesion", 2, 8, dataset_id=5, shape=(32, 32)).rename(raw.parent / "Dataset005_Other")
    told(capsys, "simulate", "--datasets", 4, "--folder", run, exit_code=130)
    assert len(tried) == 2 and all("another simulation works in run: wait for it" in said for said in tried)


def test_datasets_that_are_described_differently_cannot_share_a_network(raw, capsys):
    other = write_dataset(raw.parent, "lesion", 2, 8, dataset_id=5, shape=(32, 32))
    described = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**described, "labels": {"background": 0, "mole": 1}}))
    assert "labels" in told(capsys, "simulate", "--datasets", 4, 5, exit_code=2)


def shared(capsys, *datasets: int) -> str:
    said = told(capsys, "simulate", "--datasets", *datasets, exit_code=2)
    assert "--datasets should share no patients" in said and "pays the sum of both" in said
    return said


def test_sites_of_two_splits_of_one_dataset_are_refused_by_name(raw, capsys):
    told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 301, "--copy")
    told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 311, "--copy")
    for image in raw.parent.glob("Dataset3*/imagesTr/*"):  # as a scanner of their own would have made them
        image.write_bytes(image.read_bytes() + image.parent.parent.name.encode())
    both = "Dataset301_PhantomLesionSite1 and Dataset312_PhantomLesionSite2"
    assert f"{both} come from two splits of {raw.name}" in shared(capsys, 301, 312)
    assert f"Dataset302_PhantomLesionSite2 is a part of {raw.name}" in shared(capsys, 302, 4)
    assert [site.units for site in simulate.read_sites(["301", "302"])] == [3, 3]


def test_a_part_of_a_part_is_known_to_its_whole_and_to_nobody_else(raw, capsys):
    told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 301)
    told(capsys, "split", "-d", 301, "--sites", 2, "--first-id", 311)
    assert len(simulate.read_sites(["311", "312", "302"])) == 3
    assert f"Dataset311_PhantomLesionSite1Site1 is a part of {raw.name}" in shared(capsys, 4, 311)


def test_a_copied_site_is_refused_with_and_without_its_note(raw, capsys):
    told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 301)
    original = raw.parent / "Dataset301_PhantomLesionSite1"
    copy = shutil.copytree(original, raw.parent / "Dataset305_Copy")
    assert f"{original.name} and {copy.name} are the same part of {raw.name}" in shared(capsys, 301, 305)
    (copy / "federated_split.json").unlink()
    assert f"{original.name} and {copy.name} hold the same image" in shared(capsys, 301, 305)


def test_the_note_of_a_split_names_no_patient_and_a_foreign_one_is_refused(raw, capsys):
    told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 301)
    note = raw.parent / "Dataset301_PhantomLesionSite1" / "federated_split.json"
    (part,) = json.loads(note.read_text())
    assert part == {"parent": raw.name, "split": part["split"], "site": 1}
    note.write_text("{}")
    assert "federated_split.json in Dataset301" in told(capsys, "simulate", "--datasets", 301, 302, exit_code=2)


def test_sites_are_called_after_their_datasets(raw, capsys):
    told(capsys, "split", "-d", 4, "--sites", 2, "--first-id", 301)
    sites = simulate.read_sites(["301", "Dataset302_PhantomLesionSite2"])
    assert [site.name for site in sites] == ["PhantomLesionSite1", "PhantomLesionSite2"]
    assert [site.units for site in sites] == [3, 3]


def test_names_that_would_be_equal_are_the_datasets_own(raw):
    write_dataset(raw.parent, "lesion", 2, 8, dataset_id=5, shape=(32, 32))
    names = [site.name for site in simulate.read_sites(["4", "5"])]
    assert names == ["Dataset004_PhantomLesion", "Dataset005_PhantomLesion"]


@pytest.mark.parametrize("mode", ["adp-fl", "paper"])
def test_settings_of_a_simulated_site_are_settings_that_a_site_reads(raw, tmp_path, mode):
    from nnunet_dp.federated.protocol import Mode

    (site,) = simulate.read_sites(["4"])
    asked = simulate.Simulation(("4",), max_epsilon=9.0)
    settings = read_settings(simulate.write_settings(tmp_path, site, asked, Mode(mode), 1e-4))
    assert (settings.name, settings.max_epsilon, settings.delta) == (site.name, 9.0, 1e-4)
    assert settings.allow_no_guarantee == (mode == "paper")
    assert settings.folder("raw") == raw.parent


# ---- status ------------------------------------------------------------------------------------------------------


def test_status_of_any_other_folder_is_refused(tmp_path, capsys):
    said = told(capsys, "status", tmp_path, exit_code=2)
    assert re.search("federated run or model", said)
