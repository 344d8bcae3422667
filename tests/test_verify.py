"""Whatever somebody plants into a good archive is found and named, and nothing of it is carried out.

``LEAKS`` are plants in the files of an archive, with a manifest that lists them as if they belonged there;
``FORGERIES`` in the archive itself. Each is found by the sentence that names it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, PngImagePlugin
from released import archive_of, edited, fake_model, files_of

from nnunet_dp.archive import FIRST_DATE, pack, unpack
from nnunet_dp.card import Card, sentence
from nnunet_dp.cli import main
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.export import export_model
from nnunet_dp.inference_plans import canonical_json
from nnunet_dp.released_weights import checkpoint_bytes, safetensors_bytes
from nnunet_dp.sections import NOT_COVERED
from nnunet_dp.verify import verify, verify_content

CHECKPOINT, SAFE = "fold_0/checkpoint_final.pth", "fold_0/weights.safetensors"
Files = dict[str, bytes]
Plant = Callable[[Files], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """An archive without a fault."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(root / "preprocessed"))
        model = fake_model(root)
        model.finish()
        export_model(model.folder, root / "model.zip")
    content = (root / "model.zip").read_bytes()
    shutil.rmtree(root / "results")
    return content


def faults_of(content: bytes) -> str:
    return "\n".join(verify_content(content, "model.zip").faults)


def test_a_good_archive_has_no_fault_and_everything_in_it_is_listed(good):
    found = verify_content(good, "model.zip")
    assert found.ok and found.card is not None
    assert {name for name, _, _ in found.files} == set(zipfile.ZipFile(io.BytesIO(good)).namelist())
    assert all(what for _, _, what in found.files)


# ---- leaks in the files ------------------------------------------------------------------------------------------


def adding(name: str, content: bytes) -> Plant:
    return lambda files: files.update({name: content})


def in_json(name: str, edit: Callable[[Any], Any]) -> Plant:
    def plant(files: Files) -> None:
        content = json.loads(files[name])
        files[name] = canonical_json(edit(content) or content)

    return plant


def in_checkpoint(edit: Callable[[dict[str, Any]], Any]) -> Plant:
    def plant(files: Files) -> None:
        content = torch.load(io.BytesIO(files[CHECKPOINT]), weights_only=True)
        edit(content)
        files[CHECKPOINT] = checkpoint_bytes(content)

    return plant


def in_records(edit: Callable[[Files], Any]) -> Plant:
    def plant(files: Files) -> None:
        records, _ = unpack(files[CHECKPOINT])
        edit(records)
        files[CHECKPOINT] = pack(records)

    return plant


def in_tensors(edit: Callable[[dict[str, torch.Tensor]], Any], metadata: dict[str, str] | None = None) -> Plant:
    def plant(files: Files) -> None:
        tensors = safetensors.torch.load(files[SAFE])
        edit(tensors)
        files[SAFE] = safetensors.torch.save(tensors, metadata)

    return plant


def png_with_text() -> bytes:
    told, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    told.add_text("Patient", "Meier")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(stream, "png", pnginfo=told)
    return stream.getvalue()


class _Code:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch pickled_code_ran",))


def _with_code(files: Files) -> None:
    stream = io.BytesIO()
    content = torch.load(io.BytesIO(files[CHECKPOINT]), weights_only=True)
    torch.save({**content, "logging": _Code()}, stream)
    files[CHECKPOINT] = pack({k: v for k, v in unpack(stream.getvalue())[0].items() if "/." not in k})


def _slack(content: dict[str, Any]) -> None:
    name, tensor = next(iter(content["network_weights"].items()))
    hidden = torch.cat([tensor.reshape(-1), torch.arange(50.0)])
    content["network_weights"][name] = hidden[: tensor.numel()].view(tensor.shape)


def _say_and_drop(records: Files) -> None:
    pickled = records["archive/data.pkl"]
    said = b"X" + struct.pack("<I", 5) + b"Meier0"  # push a string, pop it
    records["archive/data.pkl"] = pickled[:2] + said + pickled[2:]


def _say_a_number(records: Files) -> None:
    """Left on the unpickler's stack, and never looked at."""
    pickled = records["archive/data.pkl"]
    records["archive/data.pkl"] = pickled[:2] + b"K\x07" + pickled[2:]


def _change_weights(files: Files) -> None:
    """In both files alike."""
    in_checkpoint(lambda content: next(iter(content["network_weights"].values())).add_(1))(files)
    changed = torch.load(io.BytesIO(files[CHECKPOINT]), weights_only=True)["network_weights"]
    files[SAFE] = safetensors_bytes(changed)


def card(**changes: Any) -> Plant:
    """Other numbers, with the sentence that goes with them."""

    def plant(files: Files) -> None:
        said = Card.model_validate_json(edited(Card, files["privacy_card.json"], **changes))
        files["privacy_card.json"] = said.model_copy(update={"claim": sentence(said)}).content

    return plant


def architecture_of(plans: dict[str, Any]) -> dict[str, Any]:
    return plans["configurations"]["2d"]["architecture"]


def _without_a_charge(files: Files) -> None:
    said = Card.model_validate_json(files["privacy_card.json"])
    card(charges=said.charges[:1])(files)


def _fewer_charges(files: Files) -> None:
    """Epsilon follows: only the folds and the checkpoints tell."""
    from nnunet_dp.charges import epsilon_of

    said = Card.model_validate_json(files["privacy_card.json"])
    rows = [row.model_copy(update={"count": max(1, row.count - 1)}) for row in said.charges]
    card(charges=rows, epsilon=epsilon_of([row.charge for row in rows], said.delta))(files)


def _fewer_everywhere(files: Files) -> None:
    """The folds of the card follow, too: the checkpoint tells."""
    _fewer_charges(files)
    said = Card.model_validate_json(files["privacy_card.json"])
    folds = [row.model_copy(update={"charges": row.charges - 1}) for row in said.folds]
    files["privacy_card.json"] = said.model_copy(update={"folds": folds}).content


def in_text(name: str, old: str, new: str) -> Plant:
    def plant(files: Files) -> None:
        assert old.encode() in files[name]
        files[name] = files[name].replace(old.encode(), new.encode(), 1)

    return plant


def figures(edit: Callable[[dict[str, Any]], dict[str, Any]] | None = None, **changes: Any) -> Plant:
    def change(content: dict[str, Any]) -> None:
        content["figures"].update(edit(content["figures"]) if edit else changes)

    return in_json("privacy_card.json", change)


def halved(points: str, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda told: {points: [{**point, name: point[name] / 2} for point in told[points]]}


def training(**changes: Any) -> Plant:
    return in_json("privacy_card.json", lambda content: content["training"].update(changes))


def other_version(files: Files) -> None:
    """A page that another version rendered otherwise."""
    in_json("privacy_card.json", lambda content: content["versions"].update(nnunet_dp="9.9"))(files)
    in_text("privacy_card.html", "nnunet_dp 0.1.0", "nnunet_dp 9.9")(files)
    in_text("privacy_card.html", "</main>", "<p>new</p></main>")(files)


LEAKS: dict[str, tuple[Plant, str]] = {
    "another word on the page": (in_text("privacy_card.html", "per patient", "per  patient"), "html is not what"),
    "script on the page": (in_text("privacy_card.html", "</main>", "<script>1</script></main>"), "html is not what"),
    "a smaller number in the README": (in_text("README.md", "| epsilon | 2", "| epsilon | 1"), "README.md is not what"),
    "page of another version": (other_version, "the card is by 9.9, verify with that"),
    "case name in the README": (adding("README.md", b"tube_07 was hard"), "README.md is not what"),
    "no page": (lambda files: files.pop("privacy_card.html"), "privacy_card.html is missing"),
    "a weaker attacker": (figures(attack=[]), "privacy_card.json: figures.attack"),
    "a weaker attacker, drawn": (figures(halved("attack", "true_positive_rate")), "figures.attack are not those"),
    "a cheaper course": (figures(halved("course", "epsilon")), "figures.course are not those"),
    "cheaper prices": (figures(lambda told: {"prices": [0.1] * len(told["prices"])}), "figures.prices are not those"),
    "another schedule": (training(steps=2), "took 5 steps, the schedule has 2"),
    "no schedule": (card(training=None), "its clip rule and its schedule"),
    "fingerprint": (adding("dataset_fingerprint.json", b'{"spacings": [[1, 1]]}'), "fingerprint.json is not declared"),
    "log": (adding("fold_0/training_log_2026_11_23.txt", b"Dice 0.8"), "training_log_2026_11_23.txt is not declared"),
    "debug.json": (adding("fold_0/debug.json", b'{"hostname": "gpu-3"}'), "debug.json is not declared"),
    "splits": (adding("splits_final.json", b'[{"train": ["tube_07"]}]'), "splits_final.json is not declared"),
    "validation summary": (adding("fold_0/validation/summary.json", b"{}"), "validation/summary.json is not declared"),
    "picture with metadata": (adding("fold_0/progress.png", png_with_text()), "progress.png is not declared"),
    "patients' table": (adding("patients.csv", b"case,patient\ntube_07,Meier\n"), "patients.csv is not declared"),
    "ledger": (adding("fold_0/privacy_ledger.jsonl", b"{}\n"), "privacy_ledger.jsonl is not declared"),
    "running state": (adding("fold_0/checkpoint_latest.pth", b"weights"), "checkpoint_latest.pth is not declared"),
    "nnU-Net's pickle": (adding("postprocessing.pkl", pickle.dumps([])), "postprocessing.pkl is not declared"),
    "weights of another fold": (adding("fold_1/checkpoint_final.pth", b""), "folds 0, the archive holds 0, 1"),
    "nested archive": (adding("fold_0/morphology.json", pack({"a": b"1"})), "is an archive in the archive"),
    "case id in plans": (in_json("plans.json", lambda c: c.update(cases=["tube_07"])), "cases is not declared"),
    "case id in a configuration": (
        in_json("plans.json", lambda c: c["configurations"]["2d"].update(excluded="tube_07")),
        "excluded is not declared",
    ),
    "case id in place of a class": (
        in_json("plans.json", lambda c: architecture_of(c).update(network_class_name="tube_07")),
        "network_class_name",
    ),
    "code in plans": (
        in_json("plans.json", lambda c: architecture_of(c)["arch_kwargs"].update(nonlin="os.system")),
        "nonlin",
    ),
    "median shape in plans": (
        in_json("plans.json", lambda c: c.update(original_median_shape_after_transp=[1, 2, 3])),
        "original_median_shape_after_transp is not declared",
    ),
    "intensities in plans": (
        in_json("plans.json", lambda c: c.update(foreground_intensity_properties_per_channel={"0": {"mean": 3.0}})),
        "intensity statistics that normalisation does not read",
    ),
    "raw CT intensities": (
        in_json("plans.json", lambda c: c["configurations"]["2d"].update(normalization_schemes=["CTNormalization"])),
        "intensity statistics of the raw images",
    ),
    "number of cases": (in_json("dataset.json", lambda c: c.update(numTraining=208)), "numTraining is not declared"),
    "list of cases": (in_json("dataset.json", lambda c: c.update(training=["tube_07"])), "training is not declared"),
    "path in dataset.json": (
        in_json("dataset.json", lambda c: c["channel_names"].update({"0": "/data/meier/mri"})),
        "dataset.json says a path of a machine: '/data/meier",
    ),
    "space in JSON": (
        lambda files: files.update({"dataset.json": files["dataset.json"] + b" \t \n"}), "is not written as the schema",
    ),
    "key twice in JSON": (
        lambda files: files.update({"dataset.json": files["dataset.json"].replace(b"{", b'{"file_ending": "7",', 1)}),
        "is not written as the schema",
    ),
    "extra key in the card": (in_json("privacy_card.json", lambda c: c.update(host="gpu-3")), "host is not declared"),
    "path in the card": (
        in_json("privacy_card.json", lambda c: c["public_inputs"].append("C:\\data")), "says a path of a machine",
    ),
    "time in the card": (
        in_json("privacy_card.json", lambda c: c["public_inputs"].append("trained 2026-11-23")), "says a date or time",
    ),
    "other version of the card": (in_json("privacy_card.json", lambda c: c.update(schema_version=2)), "schema_version"),
    "epsilon too low": (card(epsilon=1.0), "epsilon 1 is claimed, the charges compose to"),
    "delta changed": (card(delta=1e-3), "is claimed, the charges compose to"),
    "missing charge": (_without_a_charge, "a charge is missing or added"),
    "fewer charges, epsilon with them": (_fewer_charges, "a charge is missing or added"),
    "fewer charges, card with them": (_fewer_everywhere, "privacy_card.json says others"),
    "charge of no price": (
        in_json("privacy_card.json", lambda c: c["charges"][0].update(mechanism="pure_dp")), "cannot be composed",
    ),
    "a limit left out": (
        in_json("privacy_card.json", lambda c: c["not_covered"].remove(NOT_COVERED[1])),
        "not_covered leaves out what is never covered",
    ),
    "claim in other words": (
        in_json("privacy_card.json", lambda c: c.update(claim="perfectly anonymous")), "the claim should be: Taken",
    ),
    "total below the model's": (
        in_json("privacy_card.json", lambda c: c["dataset"].update(epsilon_total=0.1)), "total is below this model's",
    ),
    "sampler in other words": (card(sampler="poisson"), "the sampler should follow the charges"),
    "provenance of the rules": (
        in_json("morphology.json", lambda c: c.update(provenance={"ledger_run": "fold_0/0a"})), "their provenance",
    ),
    "rules without privacy": (
        in_json("morphology.json", lambda c: c.update(kind="not_private")), "rules that were not released",
    ),
    "rules of other classes": (
        in_json("morphology.json", lambda c: c["classes"][0].update(labels=[7])), "the rules are for other classes",
    ),
    "optimizer state": (
        in_checkpoint(lambda c: c.update(optimizer_state={"momentum": torch.ones(3)})), "optimizer_state should be",
    ),
    "losses and Dice": (in_checkpoint(lambda c: c.update(logging={"dice": [0.8]})), "logging should be empty"),
    "best moving average": (in_checkpoint(lambda c: c.update(_best_ema=0.83)), "_best_ema should be empty"),
    "extra key in the checkpoint": (
        in_checkpoint(lambda c: c.update(rng_state=torch.arange(9))), "the key 'rng_state' is not declared",
    ),
    "tensor in place of 0": (in_checkpoint(lambda c: c.update(current_epoch=torch.ones(9))), "current_epoch should be"),
    "words in place of axes": (
        in_checkpoint(lambda c: c.update(inference_allowed_mirroring_axes=("Meier",))), "mirroring_axes should be axes",
    ),
    "words in place of a count": (in_checkpoint(lambda c: c["init_args"].update(steps="Meier")), "should be numbers"),
    "extra init_args": (in_checkpoint(lambda c: c["init_args"].update(plans={"a": 1})), "found another plans"),
    "extra tensor in the checkpoint": (
        in_checkpoint(lambda c: c["network_weights"].update(patient=torch.ones(9))),
        "patient is not one of the planned network's",
    ),
    "numbers behind a tensor": (in_checkpoint(_slack), "shows only a part of the numbers stored"),
    "record in the checkpoint": (in_records(lambda r: r.update({"archive/log.txt": b"x"})), "log.txt is not declared"),
    "numbers of no tensor": (in_records(lambda r: r.update({"archive/data/999": b"x" * 64})), "belong to no tensor"),
    "string that is dropped": (in_records(_say_and_drop), "its pickle holds code (POP)"),
    "number that is dropped": (
        in_records(_say_a_number), "holds more than is loaded from it",
    ),
    "bytes behind the pickle": (
        in_records(lambda r: r.update({"archive/data.pkl": r["archive/data.pkl"] + b"Meier"})), "behind the end of its",
    ),
    "pickle with code": (_with_code, "its pickle holds code: it imports posix system"),
    "another trainer": (in_checkpoint(lambda c: c.update(trainer_name="mine")), "another fold or trainer"),
    "changed weights in one file": (
        in_tensors(lambda t: next(iter(t.values())).add_(1)), "differs from the checkpoint's",
    ),
    "changed weights in both": (_change_weights, "should end with the digest of the weights"),
    "extra tensor in safetensors": (
        in_tensors(lambda t: t.update(patient=torch.ones(9))), "the tensor patient is not in the checkpoint",
    ),
    "metadata in safetensors": (
        in_tensors(lambda t: None, {"source": "hospital"}), "its header holds metadata",
    ),
    "missing weights": (lambda files: files.pop(SAFE), "weights.safetensors is missing"),
    "missing card": (lambda files: files.pop("privacy_card.json"), "privacy_card.json: is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_found_and_named(good, leak, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plant, words = LEAKS[leak]
    root, files = files_of(good)
    plant(files)
    assert words in faults_of(archive_of(root, files))
    assert not (tmp_path / "pickled_code_ran").exists()


def test_at_least_twenty_leaks_are_planted():
    assert len(LEAKS) + len(FORGERIES) >= 20


def test_a_file_with_another_hash_than_the_manifest_says_is_found(good):
    root, files = files_of(good)
    _change_weights(files)
    assert f"{CHECKPOINT} has another hash than manifest.json says" in faults_of(archive_of(root, files, listed=False))


def test_a_wrong_hash_in_the_manifest_is_found(good):
    root, files = files_of(good)
    in_json("manifest.json", lambda c: c["files"]["plans.json"].update(sha256="0" * 64))(files)
    assert "plans.json has another hash" in faults_of(archive_of(root, files, listed=False))


def test_a_file_that_the_manifest_does_not_list_is_found(good):
    root, files = files_of(good)
    files["notes.txt"] = b"Meier"
    assert "manifest.json does not list notes.txt" in faults_of(archive_of(root, files, listed=False))


# ---- forged archives ---------------------------------------------------------------------------------------------


def entry(name: str = "note.json", content: bytes = b"{}", **fields: Any) -> Callable[[bytes], bytes]:
    """Another entry, appended as any zip tool would."""

    def forge(good: bytes) -> bytes:
        stream = io.BytesIO(good)
        with warnings.catch_warnings(), zipfile.ZipFile(stream, "a") as archive:
            warnings.simplefilter("ignore")  # of duplicates
            info = zipfile.ZipInfo(name, fields.pop("date_time", FIRST_DATE))
            info.external_attr = 0o100644 << 16
            for key, value in fields.items():
                setattr(info, key, value)
            archive.writestr(info, content)
        return stream.getvalue()

    return forge


def _comment(good: bytes) -> bytes:
    stream = io.BytesIO(good)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.comment = b"made for Meier"
    return stream.getvalue()


def _encrypted(good: bytes) -> bytes:
    place = good.rindex(b"PK\x01\x02") + 8
    return good[:place] + b"\x01\x00" + good[place + 2 :]


def _again(good: bytes) -> bytes:
    return entry(zipfile.ZipFile(io.BytesIO(good)).namelist()[0])(good)


FORGERIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "real time stamp": (entry(date_time=(2026, 11, 23, 12, 0, 0)), "note.json has a time stamp"),
    "comment of the archive": (_comment, "a comment of the archive"),
    "comment of an entry": (entry(comment=b"Meier"), "note.json has a comment"),
    "extra field": (entry(extra=b"\x99\x99\x02\x00ab"), "note.json has an extra field"),
    "path traversal": (entry("../../.ssh/authorized_keys"), "(path traversal)"),
    "absolute name": (entry("/etc/cron.d/job"), "(path traversal)"),
    "name for Windows": (entry("..\\..\\job.bat"), "(path traversal)"),
    "symbolic link": (entry("link", b"/etc/passwd", external_attr=0o120777 << 16), "link is a symbolic link"),
    "device": (entry("device", b"", external_attr=0o020666 << 16), "device is no regular file"),
    "folder": (entry("Meier/", b""), "Meier/ is a folder"),
    "duplicate name": (_again, "duplicate"),
    "encrypted entry": (_encrypted, "is encrypted"),
    "compressed entry": (entry(compress_type=zipfile.ZIP_DEFLATED), "is compressed, so that nobody looked inside"),
    "bytes before": (lambda good: b"#!/bin/sh\n" + good, "belong to no file"),
    "bytes behind": (lambda good: good + b"Meier", "belong to no file"),
    "second model": (entry("Dataset001_X/A__B__2d/plans.json"), "no single folder"),
    "no archive": (lambda good: b"Meier", "no zip archive that can be read"),
    "cut off": (lambda good: good[:-30], "no zip archive that can be read"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_archive_is_found_and_named(good, forgery):
    forge, words = FORGERIES[forgery]
    assert words in faults_of(forge(good))


@pytest.mark.parametrize("place", [0.001, 0.2, 0.5, 0.9, 0.999])
def test_any_flipped_byte_is_found(good, place):
    position = int(place * len(good))
    assert faults_of(good[:position] + bytes([good[position] ^ 0x20]) + good[position + 1 :])


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_lists_everything_and_ends_with_0_or_1(good, tmp_path, capsys):
    (tmp_path / "model.zip").write_bytes(good)
    (tmp_path / "bad.zip").write_bytes(entry("note.json")(good))
    assert main(["verify", str(tmp_path / "model.zip")]) == 0
    said = capsys.readouterr().out
    assert all(Path(name).name in said for name in zipfile.ZipFile(io.BytesIO(good)).namelist())
    assert main(["verify", str(tmp_path / "bad.zip"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"] and "note.json is not declared" in told["faults"] and told["card"]["schema_version"] == 1


def test_a_missing_archive_is_a_usage_error(tmp_path):
    assert main(["verify", str(tmp_path / "none.zip")]) == 2
    with pytest.raises(UsageRefusal, match="found none"):
        verify(tmp_path / "none.zip")
