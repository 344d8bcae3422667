"""A site's settings: read strictly, and never raised by anybody else."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.site_settings import SiteSettings, read_settings

LEAST = 'name = "north"\ndataset = 301\nmax_epsilon = 8\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "site.toml"
    file.write_text(text)
    return file


def test_the_least_settings_allow_nothing_special(tmp_path):
    settings = read_settings(written(tmp_path, LEAST))
    assert (settings.name, settings.dataset, settings.max_epsilon) == ("north", "301", 8.0)
    assert (settings.allow_no_guarantee, settings.delta, settings.device) == (False, None, "cpu")


def test_folders_are_relative_to_the_file(tmp_path):
    settings = read_settings(written(tmp_path, LEAST + 'raw = "data/raw"\nresults = "/elsewhere"'))
    assert settings.folder("raw") == tmp_path / "data" / "raw"
    assert settings.folder("results") == Path("/elsewhere")


def test_folders_default_to_nnunets_environment(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/some/raw")
    monkeypatch.delenv("nnUNet_results", raising=False)
    settings = SiteSettings(name="north", dataset="301", max_epsilon=8.0)
    assert settings.folder("raw") == Path("/some/raw")
    with pytest.raises(UsageRefusal, match="export nnUNet_results"):
        settings.folder("results")


def test_the_environment_is_as_before_after_a_message(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_raw", "/mine")
    for part in ("preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{part}", raising=False)
    folders = {part: tmp_path / part for part in ("raw", "preprocessed", "results")}
    with SiteSettings(name="north", dataset="301", max_epsilon=8.0, **folders).as_environment():
        assert os.environ["nnUNet_raw"] == str(tmp_path / "raw")
    assert os.environ["nnUNet_raw"] == "/mine" and "nnUNet_results" not in os.environ


@pytest.mark.parametrize(
    "line",
    [
        'allow_no_guarantee = "no"', "allow_no_guarantee = 1", 'delta = "1e-5"', "delta = 0.0", "delta = 1.0",
        "delta = 0.02", "delta = nan", 'device = "mps"', "processes = -1", "processes = 1.5", "maxepsilon = 3.0",
    ],
)  # fmt: skip
def test_what_is_not_exactly_meant_is_refused(tmp_path, line):
    key = line.split()[0]
    with pytest.raises(UsageRefusal, match=key) as refusal:
        read_settings(written(tmp_path, f"{LEAST}{line}\n"))
    assert "fed init-site" in str(refusal.value)


@pytest.mark.parametrize("epsilon", ["0.0", "-1.0", "inf", "nan", "1001.0", "true", '"8"'])
def test_an_impossible_max_epsilon_is_refused(tmp_path, epsilon):
    with pytest.raises(UsageRefusal, match="max_epsilon"):
        read_settings(written(tmp_path, f'name = "north"\ndataset = 301\nmax_epsilon = {epsilon}\n'))


@pytest.mark.parametrize("name", ["", "../x", "a b", "a" * 41, "a\nb"])
def test_a_site_name_is_a_plain_short_word(name):
    with pytest.raises(ValidationError):
        SiteSettings(name=name, dataset="301", max_epsilon=8.0)


@pytest.mark.parametrize("dataset", ["", "x", "../Dataset301_A", "Dataset301_A/..", "1234", "Dataset301_"])
def test_a_dataset_is_an_id_or_a_full_name(dataset):
    with pytest.raises(ValidationError):
        SiteSettings(name="north", dataset=dataset, max_epsilon=8.0)


def test_max_epsilon_is_needed(tmp_path):
    with pytest.raises(UsageRefusal, match="max_epsilon: Field required"):
        read_settings(written(tmp_path, 'name = "north"\ndataset = 301\n'))


@pytest.mark.parametrize("text", ["name = ", "\x00", "name = 'a'\nname = 'b'"])
def test_what_is_not_toml_is_said(tmp_path, text):
    with pytest.raises(UsageRefusal, match="should be TOML"):
        read_settings(written(tmp_path, text))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UsageRefusal, match=r"site\.toml should be the site's settings, found No such file"):
        read_settings(tmp_path / "site.toml")


def test_a_datasets_name_is_found_by_its_id(tmp_path):
    (tmp_path / "raw" / "Dataset007_Liver").mkdir(parents=True)
    folders = {part: tmp_path / part for part in ("raw", "preprocessed", "results")}
    assert SiteSettings(name="n", dataset="7", max_epsilon=8.0, **folders).dataset_name() == "Dataset007_Liver"
    (tmp_path / "preprocessed" / "Dataset007_Other").mkdir(parents=True)
    with pytest.raises(UsageRefusal, match="found 2"):
        SiteSettings(name="n", dataset="7", max_epsilon=8.0, **folders).dataset_name()
    with pytest.raises(UsageRefusal, match="found 0"):
        SiteSettings(name="n", dataset="8", max_epsilon=8.0, **folders).dataset_name()
