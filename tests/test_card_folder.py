"""``nnunet-dp card`` as it is typed: three files of a finished model, which the export holds, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from released import SECRETS, FakeModel, fake_model, files_of

from nnunet_dp.card import Card, miscounted
from nnunet_dp.cli import main
from nnunet_dp.export import export_model
from nnunet_dp.plans import write_json
from nnunet_dp.run import FINAL

CHECKOUT = Path(__file__).resolve().parent.parent
FILES = {"privacy_card.json", "privacy_card.html", "README.md"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """Two finished folds."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.chdir(tmp_path)
    made = fake_model(tmp_path)
    made.finish("0")
    made.finish("1")
    return made


def card(model: FakeModel, *options: object) -> int:
    return main(["card", "-m", str(model.folder), *map(str, options)])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_writes_what_an_export_holds(model, tmp_path, capsys):
    assert card(model) == 0
    assert "differentially private per patient" in capsys.readouterr().out
    written = contents(tmp_path / "privacy_card")
    export_model(model.folder, tmp_path / "model.zip")
    _, held = files_of((tmp_path / "model.zip").read_bytes())
    assert set(written) == FILES and written == {name: held[name] for name in FILES}


def test_json_says_what_the_file_says(model, tmp_path, capsys):
    assert card(model, "-o", tmp_path / "told", "-f", 1, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    said = Card.model_validate_json((tmp_path / "told" / "privacy_card.json").read_bytes())
    assert told["card"] == json.loads(said.content) and set(told["files"]) == FILES
    assert [row.fold for row in said.folds] == ["1"] and not list(miscounted(said))


def test_no_byte_names_a_case_a_person_a_place_or_a_time(model, tmp_path):
    assert card(model) == 0
    content = b"".join(contents(tmp_path / "privacy_card").values())
    hashes = [json.loads(line)["hash"] for line in model.ledger.read_text().splitlines()]
    assert not [word for word in (*SECRETS, *hashes, str(tmp_path), "fold_0/0a") if word.encode() in content]


def test_the_same_again_changes_nothing_and_other_content_needs_overwrite(model, tmp_path, capsys):
    assert (card(model), card(model)) == (0, 0)
    before = contents(tmp_path / "privacy_card")
    assert card(model, "-f", 0) == 2 and "--overwrite" in capsys.readouterr().err
    assert contents(tmp_path / "privacy_card") == before
    assert card(model, "-f", 0, "--overwrite") == 0 and contents(tmp_path / "privacy_card") != before


def test_a_readme_of_somebody_else_is_kept(model, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert card(model, "-o", tmp_path) == 2 and "README.md" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "privacy_card.json").exists()


def test_it_is_not_written_into_the_model(model, capsys):
    assert card(model, "-o", model.folder) == 2
    assert "a folder of its own" in capsys.readouterr().err and not (model.folder / "privacy_card.json").exists()


@pytest.mark.parametrize(("options", "words"), [(("-f", 7), "has no fold 7"), ((7,), "after -f")])
def test_wrong_folds_are_wrong_usage(model, capsys, options, words):
    assert card(model, *options) == 2 and words in capsys.readouterr().err


def test_an_unfinished_fold_has_no_card(model, tmp_path, capsys):
    (model.folder / "fold_1" / FINAL).unlink()
    assert card(model) == 1 and "is not finished" in capsys.readouterr().err
    assert not (tmp_path / "privacy_card").exists()


def test_labels_are_text_in_every_file(model, tmp_path):
    description = json.loads((model.folder / "dataset.json").read_text())
    description["labels"] = {"background": 0, "<script>alert(1)<": 1, "{{ 7 * 7 }}": 2}
    write_json(description, model.folder / "dataset.json")
    assert card(model) == 0
    written = contents(tmp_path / "privacy_card")
    assert b"<script" not in written["privacy_card.html"] + written["README.md"]
    page = written["privacy_card.html"].decode()
    assert "&lt;script&gt;alert(1)&lt;" in page and "{{ 7 * 7 }}" in page


def test_the_published_schema_is_that_of_the_models():
    script = CHECKOUT / "setup_scripts" / "write_schema.py"
    done = subprocess.run([sys.executable, str(script), "--print"], capture_output=True, text=True, check=True)
    written = json.loads((CHECKOUT / "docs" / "schemas" / "privacy_card_v1.schema.json").read_text())
    assert json.loads(done.stdout) == written, "type: python setup_scripts/write_schema.py"
    assert set(written["properties"]) == set(Card.model_fields) and written["additionalProperties"] is False
