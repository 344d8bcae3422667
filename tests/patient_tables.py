"""Tables of patients, real and made up, for the tests of patients and of splits."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import strategies as st

from nnunet_dp.patients import Patients

KEY = b"a key that was chosen before the data"
CASES = ("zebra_left", "zebra_right", "walrus_left")
TABLE = {"zebra_left": "Quilp", "zebra_right": "Quilp", "walrus_left": "Nickleby"}
PRIVATE = ("zebra", "walrus", "yak", "quilp", "nickleby", "pickwick")
LETTERS = st.text("abcdefghij0123456789_,\"' é", min_size=1, max_size=8).map(str.strip).filter(bool)
SHARED_DATA = Path(os.environ.get("NNUNET_DP_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def hemispheres(number: int) -> Patients:
    """Return patients with two cases each."""
    table = {f"{side}_{index}": f"p{index}" for index in range(number) for side in ("left", "right")}
    return Patients("patient", "patient", table)


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "patients.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(error: type[Exception], call, *arguments) -> str:
    """Return the message of a refusal, after checking that neither it nor what it hides names anybody."""
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert not [name for name in PRIVATE if name in message.casefold()]
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def folds_by_patient(splits, patients: Patients) -> dict[str, set[int]]:
    table = patients.case_to_patient
    return {table[case]: {i for i, f in enumerate(splits) if case in f["val"]} for case in table}


def real(dataset: str) -> tuple[Path, set[str], list]:
    """Return the file of cases, the case names of imagesTr, and the splits of a shared dataset."""
    folder = SHARED_DATA / dataset
    if not folder.is_dir():
        pytest.skip(f"{dataset} is not in the folder of shared data; name it in NNUNET_DP_SHARED_DATA")
    cases = {path.name.split(".")[0] for path in (folder / "labelsTr").glob("[!.]*")}
    return folder / "cases.csv", cases, json.loads((folder / "splits_final.json").read_text())
