"""A federation from the split to the prediction, as its users meet it.

The tests look at one run whose messages are handed over in this process; ``test_doors_federated_slow.py`` types the
commands, which start Flower's own processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doors import read_lines, recounted_epsilon, segmentations
from one_site import coordinator_plans

from nnunet_dp.cli import main
from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.export import export_model
from nnunet_dp.federated import simulate as simulation
from nnunet_dp.federated.coordinator import Coordinator
from nnunet_dp.federated.new_run import RunOptions, Schedule, Sites, find_plans, make_run, not_covered
from nnunet_dp.federated.protocol import Mode
from nnunet_dp.federated.run_config import read_config
from nnunet_dp.federated.site import handle, public_part
from nnunet_dp.federated.site_settings import read_settings
from nnunet_dp.federated.split import Dealing, split_dataset
from nnunet_dp.federated.summary import read_summary
from nnunet_dp.nnunet_federated import PublicPlans
from nnunet_dp.phantoms import write_dataset
from nnunet_dp.run import RunFolder
from nnunet_dp.verify import verify

LEDGER = "privacy_ledger.jsonl"


class Hand:
    """Hands messages over in this process: the sites' real answers, without an engine."""

    def __init__(self, folder: Path) -> None:
        self.settings = {file.stem: read_settings(file) for file in sorted((folder / "settings").glob("*.toml"))}

    def sites(self, minimum: int, timeout_s: float) -> list[str]:
        return list(self.settings)

    def exchange(self, kind: str, messages: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        return {node: handle(kind, *message, self.settings[node]) for node, message in messages.items()}


def small_options(mode: str = "adp-fl", rounds: int = 2, **more: Any) -> RunOptions:
    schedule = Schedule(Mode(mode), rounds, start=False, features=(4, 8, 8))
    return RunOptions(schedule, configuration="2d", **more)


def new_run(options: RunOptions, folder: Path, datasets: tuple[str, ...] = ("301", "302")):
    """A run with plans by hand, which no phantom had to be drawn for, and its sites' settings."""
    sites = simulation.read_sites(datasets)
    described = public_part(dict(sites[0].dataset.description))
    run = make_run(
        folder, options, described, "2d", Sites(len(sites), sum(site.units for site in sites)),
        PublicPlans(coordinator_plans(), "plans by hand", True), sites[0].dataset.folder.name, folder,
        torch.device("cpu"),
    )  # fmt: skip
    for site in sites:
        simulation.write_settings(folder, site, simulation.Simulation(datasets), options.schedule.mode, options.delta)
    return run


def run_here(options: RunOptions, folder: Path, datasets: tuple[str, ...] = ("301", "302")):
    run = new_run(options, folder, datasets)
    said: list[str] = []
    Coordinator(read_config(run.config), Hand(folder), folder, said.append).run()
    return run, said


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """Two site datasets of four patients each; nnU-Net's folders in the environment."""
    root = tmp_path_factory.mktemp("federation")
    with pytest.MonkeyPatch.context() as patch:
        for part in ("raw", "preprocessed", "results"):
            (root / part).mkdir()
            patch.setenv(f"nnUNet_{part}", str(root / part))
        patch.setenv("nnUNet_extTrainer", str(Path(__file__).parent.parent / "trainers"))
        write_dataset(root / "raw", "lesion", 8, 3, dataset_id=4, shape=(32, 32), test_patients=2)
        split_dataset("4", Dealing("random", 2), 301)
        yield root


@pytest.fixture(scope="module")
def finished(place):
    """Two rounds of adp-fl."""
    run, said = run_here(small_options(), place / "results" / "federated_runs" / "first")
    return place, run, said


def charges(place: Path, number: int) -> list[dict[str, Any]]:
    (folder,) = (place / "preprocessed").glob(f"Dataset{number}_*")
    return read_lines(folder / LEDGER)


# ---- what comes out ----------------------------------------------------------------------------------------------


def test_each_site_is_charged_in_its_own_ledger_and_nobody_else(finished):
    place, _, _ = finished
    assert [len(charges(place, number)) for number in (301, 302)] == [2, 2]
    assert not (place / "preprocessed" / "Dataset004_PhantomLesion").exists()


def test_the_summary_is_what_an_auditor_counts_from_each_ledger(finished):
    place, run, _ = finished
    summary = read_summary(run.folder)
    for number, site in zip((301, 302), summary.sites, strict=True):
        counted = recounted_epsilon(charges(place, number), site.delta or 0)
        assert site.recounted == site.epsilon == pytest.approx(counted, rel=0.01) and site.rounds == 2
    assert summary.epsilon == max(site.spent or 0 for site in summary.sites) <= 8.0


def test_the_summary_says_who_is_covered_and_who_pays_twice(finished):
    _, run, _ = finished
    summary = read_summary(run.folder)
    assert "per patient, the largest of the sites'" in summary.guarantee
    assert "costs add for a patient known to several sites" in summary.guarantee
    assert "charges_for_the_same_patient_at_other_sites" in summary.not_covered
    assert "plans_from_raw_fingerprint" not in summary.not_covered  # these plans were given as public


def test_the_summary_of_the_model_is_that_of_its_run(finished):
    _, run, _ = finished
    told = read_summary(run.model_folder).as_dict()
    assert told == read_summary(run.folder).as_dict() == read_summary(run.model_folder / "fold_all").as_dict()


def test_machines_get_one_line_with_what_issue_and_docs_promise(finished, capsys):
    _, run, _ = finished
    assert main(["fed", "status", str(run.model_folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["model_folder"] == str(run.model_folder)
    assert {"name", "epsilon_spent", "delta", "rounds"} <= set(told["sites"][0]) and told["complete"]


def test_people_get_a_table_and_the_command_that_predicts(finished, capsys):
    _, run, _ = finished
    assert main(["fed", "status", str(run.folder)]) == 0
    said = capsys.readouterr().out
    assert "counted from its ledger" in said
    assert "nnUNetv2_predict -d Dataset301_PhantomLesionSite1 -c 2d -f all" in said
    assert "NOT covered         " in said and "A patient who is known to several sites: that patient's costs" in said
    assert "charges_for_the_same_patient" not in said


def test_the_model_names_no_path_no_case_and_no_count(finished):
    place, run, _ = finished
    rows = (place / "raw" / "Dataset004_PhantomLesion" / "patients.csv").read_text().split()[1:]
    texts = [file.read_text() for file in run.model_folder.rglob("*.json")]
    words = {word for row in rows for word in row.split(",")} | {str(place)}
    assert texts and not [word for text in texts for word in words if word in text]


def test_the_model_predicts_by_nnunets_own_predictor(finished, tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    place, run, _ = finished
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, verbose=False)
    predictor.initialize_from_trained_model_folder(str(run.model_folder), ("all",))
    images = sorted((place / "raw" / "Dataset004_PhantomLesion" / "imagesTs").glob("*_0000.png"))
    predictor.predict_from_files_sequential([[str(images[0])]], [str(tmp_path / "case")], save_probabilities=False)
    (segmentation,) = segmentations(tmp_path).values()
    assert segmentation.shape == (32, 32) and set(np.unique(segmentation)) <= {0, 1}


def test_refined_prediction_says_what_to_type_and_then_refines_by_free_rules(finished, tmp_path, capsys):
    place, run, _ = finished
    trainer, plans, configuration = run.model_folder.name.split("__")
    words = ["-d", "301", "-c", configuration, "-tr", trainer, "-p", plans]
    images = str(place / "raw" / "Dataset004_PhantomLesion" / "imagesTs")
    predict = ["predict", *words, "-f", "all", "-i", images, "-o", str(tmp_path), "-device", "cpu", "-npp", "1"]
    assert main(predict) == 2
    learn = f"morph learn {' '.join(words)} --per-image"
    assert f"or place free rules first, `nnunet-dp {learn}`" in capsys.readouterr().err
    assert main(learn.split()[:-1]) == 2 and "sites paid for no vote" in capsys.readouterr().err
    assert main(learn.split()) == 0
    try:
        assert main([*predict, "-nps", "1"]) == 0 and "(per_image rules)" in capsys.readouterr().out
        assert main(["fed", "status", str(run.folder)]) == 0 and "Next: nnunet-dp predict" in capsys.readouterr().out
    finally:
        for file in ("morphology.json", "postprocessing.pkl"):
            (run.model_folder / file).unlink()
    assert {file.shape for file in segmentations(tmp_path).values()} == {(32, 32)}


def test_the_model_may_lie_at_a_dataset_that_was_never_charged(finished, tmp_path):
    _, run, _ = finished
    results = tmp_path / "Dataset004_PhantomLesion"
    shutil.copytree(run.model_folder, results / run.model_folder.name)
    RunFolder(results / "nnUNetTrainerDP__x__2d" / "fold_0", tmp_path / LEDGER, results).verify_ledger()
    (results / run.model_folder.name / "federated.json").unlink()
    with pytest.raises(Refusal, match="private models of this dataset exist"):
        RunFolder(results / "nnUNetTrainerDP__x__2d" / "fold_0", tmp_path / LEDGER, results).verify_ledger()


def test_status_of_the_model_names_the_command_that_knows(finished, capsys):
    _, run, _ = finished
    assert main(["status", str(run.model_folder / "fold_all")]) == 2
    assert "nnunet-dp fed status" in capsys.readouterr().err


def test_a_later_training_on_a_sites_dataset_is_not_disturbed(finished):
    place, _, _ = finished
    for number in (301, 302):
        (preprocessed,) = (place / "preprocessed").glob(f"Dataset{number}_*")
        results = place / "results" / preprocessed.name
        RunFolder(results / "nnUNetTrainerDP__x__2d" / "fold_0", preprocessed / LEDGER, results).verify_ledger()


def test_status_of_a_sites_own_run_works_as_for_any_training(finished, capsys):
    place, _, _ = finished
    (fold,) = (place / "results").glob("Dataset302_*/nnUNetTrainerDP_Federated__*/fold_all")
    assert main(["status", str(fold), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_done"] == 2


def test_each_round_is_one_line_with_replies_threshold_and_epsilon(finished):
    _, _, said = finished
    rounds = [line for line in said if line.startswith("round ")]
    assert len(rounds) == 2 and all("threshold" in line and "epsilon" in line for line in rounds)


# ---- an export of it -----------------------------------------------------------------------------------------------


def test_an_export_has_a_row_for_each_site_counted_from_its_ledger(finished, tmp_path):
    place, run, _ = finished
    report = export_model(run.model_folder, tmp_path / "model.zip", stock=True)
    for number, row in zip((301, 302), report.card.sites, strict=True):
        assert row.counted == "from its ledger" and row.rounds == 2 == len(row.thresholds)
        assert row.epsilon == pytest.approx(recounted_epsilon(charges(place, number), row.delta), rel=0.01)
    assert report.card.epsilon == max(row.epsilon for row in report.card.sites) and report.card.dataset is None
    assert verify(tmp_path / "model.zip").ok and report.model.startswith("nnUNetTrainer__")
    assert not [name for name in ("site_301", "site_302", "lesion_0") if name in report.card.content.decode()]


def test_an_export_where_the_sites_ledgers_are_not_says_that_epsilon_is_as_reported(finished, tmp_path, monkeypatch):
    _, run, _ = finished
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    report = export_model(run.model_folder, tmp_path / "model.zip")
    assert {row.counted for row in report.card.sites} == {"as reported"} and not report.card.sites[0].charges
    assert "as far as sites reported what they spent" in report.card.claim
    assert dict(verify(tmp_path / "model.zip").lines())["NOT recounted"].startswith("sites 1, 2")


def test_an_export_of_another_runs_weights_is_refused(finished, tmp_path):
    _, run, _ = finished
    copy = shutil.copytree(run.model_folder, tmp_path / "Dataset004_X" / run.model_folder.name)
    told = json.loads((copy / "federated.json").read_text())
    (copy / "federated.json").write_text(json.dumps({**told, "run": "0b"}))
    with pytest.raises(Refusal, match=r"another run than federated\.json says"):
        export_model(copy, tmp_path / "model.zip")


# ---- what may go wrong -------------------------------------------------------------------------------------------


def test_a_report_beyond_its_ledger_is_refused(finished, tmp_path):
    _, run, _ = finished
    copy = shutil.copytree(run.folder, tmp_path / "run")
    result = json.loads((copy / "federated_result.json").read_text())
    result["sites"][0]["epsilon_spent"] += 1
    (copy / "federated_result.json").write_text(json.dumps(result))
    with pytest.raises(Refusal, match="proves only"):
        read_summary(copy)


def test_a_model_that_exists_is_not_written_over(finished, tmp_path):
    _, run, _ = finished
    name = run.model_folder.name.split("__")[1]
    with pytest.raises(UsageRefusal, match="exists already"):
        new_run(small_options(output=name), tmp_path / "again")


def test_terms_without_a_price_are_refused(place, tmp_path):
    schedule = Schedule(Mode.adp_fl, 2, sampling_probability=0.5, noise="laplace", start=False, features=(4, 8, 8))
    with pytest.raises(UsageRefusal, match="the full batch"):
        new_run(RunOptions(schedule, configuration="2d"), tmp_path / "none")
    assert not (tmp_path / "none" / "config.json").exists()


@pytest.mark.parametrize(("declared", "covered"), [(False, False), (True, True)])
def test_plans_of_a_dataset_are_public_only_if_somebody_declares_it(tmp_path, monkeypatch, declared, covered):
    folder = tmp_path / "Dataset009_Other"
    folder.mkdir()
    (folder / "dataset.json").write_text("{}")
    (folder / "nnUNetPlans.json").write_text(json.dumps(coordinator_plans()))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    found = find_plans(small_options(plans_from=folder.name, no_patient_overlap=declared), {})
    assert ("plans_from_raw_fingerprint" not in not_covered(found)) == covered == ("declared" in found.source)


def test_a_site_without_budget_for_a_run_says_so_before_its_first_round_and_is_charged_nothing(finished, tmp_path):
    place, _, _ = finished
    before = [charges(place, number) for number in (301, 302)]
    run = new_run(small_options(rounds=1), tmp_path / "second")
    _, spent = simulation.read_sites(("301", "302"))
    frugal = simulation.Simulation(("301", "302"), max_epsilon=8.0)
    simulation.write_settings(run.folder, spent, frugal, Mode.adp_fl, None)
    with pytest.raises(BudgetRefusal, match=f"no budget is left at {spent.name}: begin a new run"):
        Coordinator(read_config(run.config), Hand(run.folder), run.folder, lambda line: None).run()
    assert [charges(place, number) for number in (301, 302)] == before


def test_a_run_that_has_not_finished_has_a_summary_too(place, tmp_path):
    run = new_run(small_options(rounds=5), tmp_path / "begun")
    summary = read_summary(run.folder)
    assert (summary.rounds, summary.complete, summary.planned) == (0, False, (8.0, 5))
    assert summary.guarantee == "nothing spent yet" and summary.model_folder is None


# ---- without a guarantee -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fedavg", "paper"])
def test_a_mode_without_a_guarantee_says_so_everywhere_and_charges_nothing(finished, tmp_path, mode):
    place, _, _ = finished
    before = [charges(place, number) for number in (301, 302)]
    run, said = run_here(small_options(mode, rounds=1), tmp_path / mode)
    assert [charges(place, number) for number in (301, 302)] == before
    trainer, plans, _ = run.model_folder.name.split("__")
    assert trainer == "nnUNetTrainer" and "NoGuarantee" in plans
    summary = read_summary(run.model_folder)
    assert summary.epsilon is None and summary.guarantee.startswith("no guarantee")
    assert next(line for line in said if line.startswith("round 1")).count("NO GUARANTEE") == 1
    with pytest.raises(UsageRefusal, match=f"was trained by {mode}, without a guarantee"):
        export_model(run.model_folder, tmp_path / "model.zip")
