"""Sites made from one dataset: nobody is divided, nobody is lost, and the original stays as it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated import split
from nnunet_dp.federated.raw_dataset import read_raw, training_patients
from nnunet_dp.federated.split import Dealing, deal_at_random, deal_by_dirichlet, split_dataset
from nnunet_dp.patients import PatientsFileError
from nnunet_dp.phantoms import write_dataset
from nnunet_dp.splits import SplitError

NAME = "Dataset004_PhantomLesion"


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """Sixteen patients with one or two images each, below nnUNet_raw."""
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    return write_dataset(tmp_path / "raw", "lesion", 16, 3, dataset_id=4, shape=(32, 32))


def table(folder: Path) -> dict[str, str]:
    lines = (folder / "patients.csv").read_text().split()
    return dict(line.split(",")[:2] for line in lines[1:])


def cases_in(folder: Path) -> set[str]:
    images = {file.name[: -len("_0000.png")] for file in (folder / "imagesTr").iterdir()}
    assert images == {file.name[: -len(".png")] for file in (folder / "labelsTr").iterdir()}
    return images


def add_column(raw: Path, name: str, value_of) -> None:
    lines = (raw / "patients.csv").read_text().split()
    rows = [f"{lines[0]},{name}"] + [f"{line},{value_of(*line.split(','))}" for line in lines[1:]]
    (raw / "patients.csv").write_text("\n".join(rows) + "\n")


# ---- who goes where ----------------------------------------------------------------------------------------------


@given(st.sets(st.text(min_size=1), min_size=2, max_size=40), st.integers(2, 6), st.integers(0, 99))
def test_random_sites_hold_everybody_once_and_differ_by_one_at_most(patients, sites, seed):
    dealt = deal_at_random(patients, sites, seed)
    assert sorted(name for site in dealt for name in site) == sorted(patients)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_another_seed_deals_differently_and_the_same_does_not():
    patients = [f"p{k}" for k in range(30)]
    assert deal_at_random(patients, 3, 1) == deal_at_random(reversed(patients), 3, 1) != deal_at_random(patients, 3, 2)


@given(
    st.dictionaries(st.text(min_size=1), st.floats(0, 1), min_size=6, max_size=40), st.integers(2, 6),
    st.sampled_from([0.01, 0.5, 100.0]), st.integers(0, 99),
)  # fmt: skip
def test_dirichlet_sites_hold_everybody_once_and_none_is_empty(shares, sites, alpha, seed):
    dealt = deal_by_dirichlet(shares, sites, alpha, seed)
    assert sorted(name for site in dealt for name in site) == sorted(shares)
    assert all(dealt) and len(dealt) == sites


def test_a_small_alpha_makes_sites_that_differ_in_size_and_kind():
    shares = {f"p{k:03}": k / 200 for k in range(200)}

    def spread(alpha: float) -> tuple[float, float]:
        dealt = deal_by_dirichlet(shares, 4, alpha, seed=1)
        means = [sum(shares[name] for name in site) / len(site) for site in dealt]
        return max(map(len, dealt)) - min(map(len, dealt)), max(means) - min(means)

    (size, kind), (even_size, even_kind) = spread(0.1), spread(1000.0)
    assert size > 2 * even_size and kind > 2 * even_kind


# ---- datasets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dealing", [Dealing("random", 3), Dealing("dirichlet", 3, alpha=0.2)])
def test_all_cases_of_a_patient_go_to_one_site_and_no_case_is_lost(raw, dealing):
    sites = split_dataset("4", dealing, 301)
    whole = table(raw)
    assert [site.folder.name for site in sites] == [f"Dataset{300 + k}_PhantomLesionSite{k}" for k in (1, 2, 3)]
    assert {case: whole[case] for site in sites for case in cases_in(site.folder)} == whole
    owners = [set(table(site.folder).values()) for site in sites]
    assert sum(map(len, owners)) == len(set(whole.values())) == sum(site.units for site in sites)
    assert all(table(site.folder).keys() == cases_in(site.folder) for site in sites)


def test_a_new_dataset_describes_itself_and_nobody_else(raw):
    (site, other) = split_dataset(NAME, Dealing("random", 2), 301)
    described = json.loads((site.folder / "dataset.json").read_text())
    assert described["numTraining"] == site.cases and described["name"] == "PhantomLesionSite1"
    text = (site.folder / "dataset.json").read_text()
    assert not [case for case in cases_in(other.folder) if case in text]


def test_images_are_hard_links_never_symbolic_ones(raw):
    (site, _) = split_dataset("4", Dealing("random", 2), 301)
    for file in (site.folder / "imagesTr").iterdir():
        assert not file.is_symlink() and file.samefile(raw / "imagesTr" / file.name)


def test_without_links_the_original_is_out_of_reach(raw):
    (site, _) = split_dataset("4", Dealing("random", 2), 301, links=False)
    changed = next((site.folder / "imagesTr").iterdir())
    changed.write_bytes(b"")
    assert (raw / "imagesTr" / changed.name).stat().st_size > 0


def test_where_links_are_impossible_files_are_copied(raw, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refused)
    (site, _) = split_dataset("4", Dealing("random", 2), 301)
    for file in (site.folder / "labelsTr").iterdir():
        assert not file.samefile(raw / "labelsTr" / file.name)
        assert file.read_bytes() == (raw / "labelsTr" / file.name).read_bytes()


def test_cases_listed_in_dataset_json_are_found_and_named_as_nnunet_names_them(raw):
    described = json.loads((raw / "dataset.json").read_text())
    cases = sorted(cases_in(raw))
    for case in cases:
        (raw / "imagesTr" / f"{case}_0000.png").rename(raw / f"photo_of_{case}.png")
    described["dataset"] = {
        case: {"images": [f"photo_of_{case}.png"], "label": f"labelsTr/{case}.png"} for case in cases
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    sites = split_dataset("4", Dealing("random", 2), 301)
    assert sorted(case for site in sites for case in cases_in(site.folder)) == cases
    assert "dataset" not in json.loads((sites[0].folder / "dataset.json").read_text())


def test_without_a_table_of_patients_every_case_is_its_own_unit(raw):
    (raw / "patients.csv").unlink()
    sites = split_dataset("4", Dealing("random", 2), 301)
    assert all(site.unit == "case" and site.units == site.cases for site in sites)
    assert not (sites[0].folder / "patients.csv").exists()


def test_the_table_that_a_plan_was_made_with_is_remembered(raw, monkeypatch):
    kept = raw.parent.parent / "preprocessed" / raw.name
    kept.mkdir(parents=True)
    (raw / "patients.csv").rename(kept / "patients.csv")
    monkeypatch.setenv("nnUNet_preprocessed", str(kept.parent))
    sites = split_dataset("4", Dealing("random", 2), 301)
    assert all(site.unit != "case" and (site.folder / "patients.csv").is_file() for site in sites)


def test_an_inferred_grouping_stays_inferred_at_the_sites(raw):
    add_column(raw, "patient_source", lambda case, patient: "inferred")
    (site, _) = split_dataset("4", Dealing("random", 2), 301)
    assert read_raw(site.folder).patients.unit == site.unit == "patient (inferred)"


# ---- by a column -------------------------------------------------------------------------------------------------


def test_a_column_makes_one_site_of_each_value(raw):
    add_column(raw, "scanner", lambda case, patient: "new" if patient < "P0004" else "old")
    new, old = split_dataset("4", Dealing("column", column="scanner"), 301)
    assert (new.value, old.value, new.units, old.units) == ("new", "old", 3, 13)
    assert set(table(new.folder).values()) == {"P0001", "P0002", "P0003"}


def test_a_column_that_divides_a_patient_is_refused_without_naming_anybody(raw):
    seen: dict[str, int] = {}
    add_column(raw, "visit", lambda case, patient: seen.setdefault(patient, 0) or seen.update({patient: 1}) or case[-1])
    with pytest.raises(UsageRefusal, match="choose another column") as refused:
        split_dataset("4", Dealing("column", column="visit"), 301)
    assert not [word for pair in table(raw).items() for word in pair if word in str(refused.value)]


@pytest.mark.parametrize("column", ["vendor", None])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(raw, column):
    add_column(raw, "scanner", lambda case, patient: "new")
    with pytest.raises(UsageRefusal, match=f"found {column}; there are: patient, scanner"):
        split_dataset("4", Dealing("column", column=column), 301)


def test_a_first_line_that_may_be_a_patients_row_is_not_repeated(raw):
    (raw / "patients.csv").write_text("\n".join((raw / "patients.csv").read_text().split()[1:]))
    with pytest.raises(PatientsFileError) as refused:
        split_dataset("4", Dealing("column", column="vendor"), 301)
    assert "P0001" not in str(refused.value)


# ---- one fold's training patients --------------------------------------------------------------------------------


def test_a_fold_leaves_its_validation_patients_out(raw, tmp_path):
    whole = table(raw)
    judged = {case for case, patient in whole.items() if patient in ("P0001", "P0002")}
    splits = [{"train": sorted(set(whole) - judged), "val": sorted(judged)}]
    (tmp_path / "preprocessed" / NAME).mkdir()
    (tmp_path / "preprocessed" / NAME / "splits_final.json").write_text(json.dumps(splits))
    sites = split_dataset("4", Dealing("random", 2), 301, fold=0)
    assert {case for site in sites for case in cases_in(site.folder)} == set(whole) - judged


def test_the_folds_are_those_that_a_training_would_make(raw):
    from nnunet_dp.splits import make_splits

    dataset = read_raw(raw)
    folds = make_splits(dataset.patients, dataset.files, f"nnunet_dp splits 1 {NAME}".encode())
    for fold, made in enumerate(folds):
        assert sorted(case for mine in training_patients(dataset, fold).values() for case in mine) == made["train"]


def test_a_fold_that_is_not_there_is_refused(raw):
    with pytest.raises(SplitError, match="fold 7"):
        split_dataset("4", Dealing("random", 2), 301, fold=7)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dealing", "words"),
    [
        (Dealing("random"), "--sites"),
        (Dealing("random", 1), "at least 2"),
        (Dealing("random", 50), "fewer than 50"),
        (Dealing("column"), "--column NAME"),
        (Dealing("random", 2, column="scanner"), "--by column"),
        (Dealing("dirichlet", 2, alpha=0.0), "--alpha"),
    ],
)
def test_options_without_sense_are_refused_before_anything_is_written(raw, dealing, words):
    with pytest.raises(UsageRefusal, match=words):
        split_dataset("4", dealing, 301)
    assert [folder.name for folder in raw.parent.iterdir()] == [NAME]


def test_numbers_that_are_taken_anywhere_are_refused(raw, tmp_path):
    (tmp_path / "results" / "Dataset302_Old").mkdir()
    with pytest.raises(UsageRefusal, match="found datasets 302"):
        split_dataset("4", Dealing("random", 2), 301)


def test_a_killed_split_leaves_no_half_dataset(raw, monkeypatch):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(split, "write_canonical", die)
    with pytest.raises(KeyboardInterrupt):
        split_dataset("4", Dealing("random", 2), 301)
    assert [folder.name for folder in raw.parent.iterdir()] == [NAME]


@pytest.mark.parametrize("name", ["5", "Dataset005_No", "", "../raw"])
def test_an_unknown_dataset_is_refused(raw, name):
    with pytest.raises(UsageRefusal, match="should name one dataset"):
        split_dataset(name, Dealing("random", 2), 301)
