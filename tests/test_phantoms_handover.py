"""What is printed after a phantom dataset was drawn can be typed as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_dp.cli import main
from nnunet_dp.phantoms.handover import commands


def test_lines_for_a_decathlon_task_run_in_a_shell_that_knows_nothing_and_bring_the_patients_along(tmp_path, capsys):
    place = tmp_path / "my data"
    words = ["phantom", str(place), "--kind", "hippocampus", "--patients", "2", "--seed", "1", "--shape", "24,32,24"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.delenv(name, raising=False)
        assert main(words) == 0
    lines = capsys.readouterr().out.partition("Next:\n")[2].splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["nnUNetv2_plan_and_preprocess", "nnunet-dp"]
    shell = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    shell |= {"PATH": f"{Path(sys.executable).parent}:{shell['PATH']}", "nnUNet_def_n_proc": "1"}
    subprocess.run(["sh", "-euc", "\n".join(lines[:-2])], env=shell, check=True, capture_output=True, timeout=300)
    raw = place / "nnUNet_raw" / "Dataset301_PhantomHippocampus"
    cases = {file.name.removesuffix(".nii.gz") for file in (raw / "labelsTr").iterdir()}
    assert {row.split(",")[0] for row in (raw / "patients.csv").read_text().split()[1:]} == cases


@pytest.mark.parametrize(("name", "dimensions", "configuration"), [("Lesion", 2, "2d"), ("MpMRI", 3, "3d_fullres")])
def test_raw_data_need_no_conversion_and_are_found_where_they_lie(tmp_path, name, dimensions, configuration):
    elsewhere = {"nnUNet_raw": "/elsewhere", "nnUNet_preprocessed": "/p", "nnUNet_results": "/r"}
    lines = commands(tmp_path / f"Dataset017_{name}", dimensions, elsewhere)
    assert lines == [
        f"export nnUNet_raw={tmp_path}",
        f"nnUNetv2_plan_and_preprocess -d 17 -c {configuration}",
        f"nnunet-dp plan -d 17 -c {configuration} --epsilon 8",
    ]
