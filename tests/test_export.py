"""An export holds what the ledger paid for and nothing else, claims what it counts, and is refused where it cannot."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from doors import recounted_epsilon
from ordinary_plans import DATASET
from released import BUDGET, PLAN, SECRETS, STEPS, FakeModel, fake_model, files_of, plans

from nnunet_dp.charges import LedgerError
from nnunet_dp.claim import CLIP_RULES
from nnunet_dp.clipping import RULE_NAMES
from nnunet_dp.dataset_identity import DIGEST, SECRET, identity
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.export import export_model
from nnunet_dp.ledger import Ledger
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.morphology import FILE, classes_from, read_morphology, write_morphology
from nnunet_dp.plans import with_section, write_json
from nnunet_dp.run import FINAL, LEDGER, RunFolder, read_checkpoint
from nnunet_dp.sections import NOT_COVERED, PrivacySection
from nnunet_dp.status import read_status
from nnunet_dp.verify import verify


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """One finished fold."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    made = fake_model(tmp_path)
    made.finish()
    return made


def exported(model: FakeModel, tmp_path: Path, *folds: str, **options) -> tuple[dict, dict[str, bytes]]:
    """The report and the files of an export."""
    report = export_model(model.folder, tmp_path / "model.zip", folds, **options).as_dict()
    return report, files_of((tmp_path / "model.zip").read_bytes())[1]


# ---- what it holds -----------------------------------------------------------------------------------------------


def test_an_export_holds_these_files_and_no_other(model, tmp_path):
    _, files = exported(model, tmp_path)
    weights = {"fold_0/checkpoint_final.pth", "fold_0/weights.safetensors", "fold_0/morphology.json"}
    told = {"plans.json", "dataset.json", "privacy_card.json", "manifest.json", "morphology.json"}
    told |= {"privacy_card.html", "README.md"}
    assert set(files) == weights | told
    assert verify(tmp_path / "model.zip").ok


def test_no_byte_of_it_names_a_case_a_person_a_place_or_a_run(model, tmp_path):
    exported(model, tmp_path)
    content = (tmp_path / "model.zip").read_bytes()
    hashes = [json.loads(line)["hash"] for line in model.ledger.read_text().splitlines()]
    words = [*SECRETS, str(tmp_path), "fold_0/0a", *hashes, "nnUNetPlansDP_eps8__2d"]
    assert not [word for word in words if word.encode() in content]


def test_the_weights_are_those_of_the_model_in_both_files(model, tmp_path):
    _, files = exported(model, tmp_path)
    mine = read_checkpoint(model.folder / "fold_0" / FINAL)["network_weights"]
    loaded = torch.load(io.BytesIO(files["fold_0/checkpoint_final.pth"]), weights_only=True)["network_weights"]
    tensors = safetensors.torch.load(files["fold_0/weights.safetensors"])
    assert mine.keys() == loaded.keys() == tensors.keys()
    assert all(torch.equal(mine[name], loaded[name]) and torch.equal(mine[name], tensors[name]) for name in mine)


def test_the_plans_say_what_prediction_needs_and_nothing_about_the_images(model, tmp_path):
    _, files = exported(model, tmp_path)
    told = json.loads(files["plans.json"])
    assert told["foreground_intensity_properties_per_channel"] == {"0": {}}
    assert not {"original_median_shape_after_transp", "differential_privacy", "experiment_planner_used"} & set(told)
    assert not {"median_image_size_in_voxels", "batch_size", "data_identifier"} & set(told["configurations"]["2d"])
    assert set(json.loads(files["dataset.json"])) == {"channel_names", "labels", "file_ending"}


def test_rules_leave_without_the_line_that_paid_for_them(model, tmp_path):
    _, files = exported(model, tmp_path)
    mine = read_morphology(model.folder / "fold_0" / FILE)
    assert mine.paid_by is not None
    assert json.loads(files["fold_0/morphology.json"])["provenance"] == {}
    assert json.loads(files["morphology.json"])["classes"][0]["operations"][0]["operation"] == "keep_largest"


def test_the_same_model_gives_the_same_bytes(model, tmp_path):
    exported(model, tmp_path)
    first = (tmp_path / "model.zip").read_bytes()
    exported(model, tmp_path, overwrite=True)
    assert (tmp_path / "model.zip").read_bytes() == first


def test_an_archive_that_is_there_needs_overwrite(model, tmp_path):
    exported(model, tmp_path)
    with pytest.raises(UsageRefusal, match="--overwrite"):
        exported(model, tmp_path)


# ---- what it claims ----------------------------------------------------------------------------------------------


def test_epsilon_is_that_of_an_independent_recount(model, tmp_path):
    card = exported(model, tmp_path)[0]["card"]
    lines = [json.loads(line) for line in model.ledger.read_text().splitlines()]
    assert card["epsilon"] == pytest.approx(recounted_epsilon(lines, BUDGET.delta), rel=2e-3)
    assert (card["delta"], card["unit"], card["relation"]) == (BUDGET.delta, "patient", "zero-out")
    assert [(row["purpose"], row["count"]) for row in card["charges"]] == [("morphology", 1), ("training", STEPS)]
    assert card["folds"] == [{"fold": "0", "charges": STEPS + 1, "steps": STEPS}]


def test_several_folds_are_charged_together_and_others_are_not(model, tmp_path):
    model.finish("1")
    model.finish("2")
    lines = [json.loads(line) for line in model.ledger.read_text().splitlines()]
    one = exported(model, tmp_path, "0")[0]["card"]
    two = exported(model, tmp_path, "0", "1", overwrite=True)[0]["card"]
    assert two["epsilon"] == pytest.approx(recounted_epsilon(lines[: 2 * (STEPS + 1)], BUDGET.delta), rel=2e-3)
    assert one["epsilon"] < two["epsilon"] < two["dataset"]["epsilon_total"] == one["dataset"]["epsilon_total"]
    assert one["dataset"]["epsilon_total"] == pytest.approx(recounted_epsilon(lines, BUDGET.delta), rel=2e-3)


def test_a_charge_after_the_training_is_counted_too(model, tmp_path):
    before = exported(model, tmp_path)[0]["card"]["epsilon"]
    ledger = Ledger(model.ledger, f"{model.folder.name}/fold_0/0a", model.digest, None, BUDGET.unit)
    ledger.charge(SubsampledGaussian(2.0).charge("morphology", None))
    assert exported(model, tmp_path, overwrite=True)[0]["card"]["epsilon"] > before


def test_every_trainer_names_its_own_clip_rule():
    from nnunet_dp.trainers import nnUNetTrainerDP as door

    assert {name: getattr(door, name).clip_rule for name in CLIP_RULES} == CLIP_RULES
    assert set(CLIP_RULES.values()) == set(RULE_NAMES)


def test_the_datasets_identity_needs_its_secret(model, tmp_path):
    first = exported(model, tmp_path)[0]["card"]["dataset"]["identity"]
    secret = model.ledger.parent / SECRET
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert exported(model, tmp_path, overwrite=True)[0]["card"]["dataset"]["identity"] == first
    secret.unlink()
    with pytest.raises(Refusal, match=r"privacy_identity\.key in \S+ is lost, .* put it back from a backup; or delete"):
        exported(model, tmp_path, overwrite=True)
    assert not secret.exists()
    secret.with_name(DIGEST).unlink()
    assert exported(model, tmp_path, overwrite=True)[0]["card"]["dataset"]["identity"] != first


def test_a_secret_of_before_its_digest_was_noted_keeps_its_identity_and_another_one_is_refused(tmp_path):
    first = identity(tmp_path, "0" * 64)
    (tmp_path / DIGEST).unlink()
    assert identity(tmp_path, "0" * 64) == first and (tmp_path / DIGEST).exists()
    (tmp_path / SECRET).write_bytes(bytes(32))
    with pytest.raises(Refusal, match="put the first one back"):
        identity(tmp_path, "0" * 64)


def test_a_secret_that_others_may_read_is_refused(tmp_path):
    identity(tmp_path, "0" * 64)
    (tmp_path / SECRET).chmod(0o644)
    with pytest.raises(Refusal, match="chmod 600"):
        identity(tmp_path, "0" * 64)


# ---- for plain nnU-Net -------------------------------------------------------------------------------------------


def test_stock_changes_the_trainers_name_and_keeps_a_plans_name_of_its_own(model, tmp_path):
    report, files = exported(model, tmp_path, stock=True)
    trainer, plans_name, configuration = report["model"].split("__")
    assert (trainer, configuration) == ("nnUNetTrainer", "2d") and plans_name.startswith("nnUNetPlansDP_eps8_")
    loaded = torch.load(io.BytesIO(files["fold_0/checkpoint_final.pth"]), weights_only=True)
    assert loaded["trainer_name"] == "nnUNetTrainer" and "differential_privacy" not in json.loads(files["plans.json"])


@pytest.mark.parametrize("trainer", [name for name in CLIP_RULES if "_Morph" in name])
def test_morphology_inside_the_network_is_refused_for_stock_and_exported_otherwise(tmp_path, monkeypatch, trainer):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    model = fake_model(tmp_path, trainer)
    model.finish()
    with pytest.raises(UsageRefusal, match=f"{trainer} refines inside its network"):
        exported(model, tmp_path, stock=True)
    assert exported(model, tmp_path)[0]["model"].startswith(f"{trainer}__")


def test_the_archive_may_call_the_dataset_otherwise(model, tmp_path):
    report, files = exported(model, tmp_path, dataset="Dataset777_Shared")
    assert report["dataset"] == json.loads(files["plans.json"])["dataset_name"] == "Dataset777_Shared"
    assert DATASET.encode() not in (tmp_path / "model.zip").read_bytes()


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_an_unfinished_fold_is_refused_by_name(model, tmp_path):
    model.finish("1")
    (model.folder / "fold_1" / FINAL).unlink()
    with pytest.raises(Refusal, match=r"fold_1 of .* is not finished"):
        exported(model, tmp_path)
    assert exported(model, tmp_path, "0")[0]["card"]["folds"][0]["fold"] == "0"


@pytest.mark.parametrize("how", ["no variable", "no file"])
def test_a_missing_ledger_is_refused_whatever_the_copy_says(model, tmp_path, monkeypatch, how):
    if how == "no variable":
        monkeypatch.delenv("nnUNet_preprocessed")
    else:
        model.ledger.unlink()
    with pytest.raises(Refusal, match="not at hand"):
        exported(model, tmp_path)
    assert not (tmp_path / "model.zip").exists()


def test_a_ledger_that_is_shorter_than_the_checkpoint_says_is_refused(model, tmp_path):
    for ledger in (model.ledger, model.folder / "fold_0" / LEDGER):
        ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(Refusal, match=f"proves at least {STEPS + 1} charges, found {STEPS}"):
        exported(model, tmp_path)


def test_an_edited_ledger_is_refused(model, tmp_path):
    model.ledger.write_text(model.ledger.read_text().replace('"first_step":2', '"first_step":7'))
    with pytest.raises(LedgerError, match="line 4"):
        exported(model, tmp_path)


@pytest.mark.parametrize("what", ["run", "trainer"])
def test_a_checkpoint_of_another_run_or_trainer_is_refused(model, tmp_path, what):
    run = "another/fold_0/1b" if what == "run" else f"{model.folder.name}/fold_0/0a"
    model.write_weights("0", run, STEPS + 1, STEPS, "nnUNetTrainerDP_NSGD" if what == "trainer" else "")
    with pytest.raises(Refusal, match="another run or trainer"):
        exported(model, tmp_path)


def test_weights_of_another_network_are_refused(model, tmp_path):
    content = read_checkpoint(model.folder / "fold_0" / FINAL)
    content["network_weights"]["memorised"] = torch.ones(3)
    torch.save(content, model.folder / "fold_0" / FINAL)
    with pytest.raises(Refusal, match="memorised is not one of the planned network's"):
        exported(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nnUNetTrainer__nnUNetPlansDP_eps8__2d", "was trained by nnUNetTrainer, without privacy"),
     ("nnUNetTrainerDP_AutoS__nnUNetPlans__2d", "no private section")],
)  # fmt: skip
def test_models_without_a_guarantee_are_refused_by_name(model, tmp_path, name, words):
    moved = model.folder.rename(model.folder.with_name(name))
    if "section" in words:
        write_json(plans(), moved / "plans.json")
    with pytest.raises(UsageRefusal, match=f"{name}.*{words}|{words}"):
        export_model(moved, tmp_path / "model.zip")


def test_rules_that_no_charge_paid_for_are_refused(model, tmp_path):
    file = model.folder / "fold_0" / FILE
    write_morphology(read_morphology(file).model_copy(update={"provenance": {}}), file)
    with pytest.raises(Refusal, match="names no charge"):
        exported(model, tmp_path)


def test_free_rules_are_named_among_the_public_inputs(model, tmp_path):
    rules = classes_from(json.loads((model.folder / "dataset.json").read_text()))
    write_morphology(rules.model_copy(update={"provenance": {"by": SECRETS[1]}}), model.folder / FILE)
    card = exported(model, tmp_path)[0]["card"]
    assert "refinement rules that asked no patient (fixed)" in card["public_inputs"]


@pytest.mark.parametrize("covered", [False, True])
def test_statistics_of_raw_ct_images_leave_only_where_they_are_covered(tmp_path, monkeypatch, covered):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    model = fake_model(tmp_path)
    public = {"public_plans": "phantoms of kind lesion"} if covered else {}
    rest = {"not_covered": NOT_COVERED[1:], "source_plans": "nnUNetPlans", "patients_file_sha256": None}
    section = PrivacySection(budget=BUDGET, patients=170, configurations={"2d": PLAN}, **rest, **public)
    planned = with_section(plans("CTNormalization"), "nnUNetPlansDP_eps8", section, {})
    write_json(planned, model.folder / "plans.json")
    model.finish()
    if not covered:
        with pytest.raises(Refusal, match="intensity statistics of the raw images"):
            exported(model, tmp_path)
        return
    report, files = exported(model, tmp_path)
    told = json.loads(files["plans.json"])["foreground_intensity_properties_per_channel"]
    assert told == {"0": {"mean": 1.5, "std": 2.5, "percentile_00_5": -3.0, "percentile_99_5": 9.0}}
    assert "given the plans" not in report["card"]["claim"]


@pytest.mark.parametrize(("folds", "words"), [(("7",), "has no fold 7: give -f 0"), (("0", "x"), "no fold x")])
def test_unknown_folds_are_refused_with_those_that_are_there(model, tmp_path, folds, words):
    with pytest.raises(UsageRefusal, match=words):
        exported(model, tmp_path, *folds)


# ---- where it is installed ---------------------------------------------------------------------------------------


def installed(archive: Path, results: Path) -> Path:
    from nnunetv2.model_sharing import model_import

    results.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_import, "nnUNet_results", str(results))
        model_import.install_model_from_zip_file(str(archive))
    (folder,) = results.glob("Dataset*/*")
    return folder


@pytest.mark.parametrize("stock", [False, True])
def test_status_of_an_installed_export_points_at_its_card(model, tmp_path, stock):
    exported(model, tmp_path, stock=stock)
    folder = installed(tmp_path / "model.zip", tmp_path / "elsewhere")
    with pytest.raises(UsageRefusal, match=r"installed from an export: its claim is in privacy_card\.json"):
        read_status(folder / "fold_0")


def test_an_installed_export_does_not_stand_in_the_way_of_a_training(model, tmp_path):
    exported(model, tmp_path)
    folder = installed(tmp_path / "model.zip", tmp_path / "elsewhere")
    mine = folder.parent / "nnUNetTrainerDP__nnUNetPlansDP_eps8__2d" / "fold_0"
    RunFolder(mine, tmp_path / "other" / LEDGER, folder.parent).verify_ledger()
    (folder / "privacy_card.json").unlink()
    with pytest.raises(Refusal, match="private models of this dataset exist"):
        RunFolder(mine, tmp_path / "other" / LEDGER, folder.parent).verify_ledger()


def test_it_unpacks_over_no_other_model(model, tmp_path):
    exported(model, tmp_path)
    before = {file: file.read_bytes() for file in model.folder.rglob("*") if file.is_file()}
    from nnunetv2.model_sharing import model_import

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_import, "nnUNet_results", str(model.folder.parents[1]))
        model_import.install_model_from_zip_file(str(tmp_path / "model.zip"))
    assert {file: file.read_bytes() for file in model.folder.rglob("*") if file.is_file()} == before
