"""What every test shares: few threads, and the folder of real data where there is one."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported anywhere, and inherited by the subprocesses of the door tests.
os.environ.setdefault("OMP_NUM_THREADS", "2")

# How fast examples are drawn depends on what else the machine does; it says nothing about the code. The same ones at
# every run, so that a change is judged by what it changes; HYPOTHESIS_PROFILE=explore draws others.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("explore", settings.get_profile("default"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

CHECKOUT = Path(__file__).resolve().parent.parent
REAL_DATA_VARIABLE = "NNUNET_DP_SHARED_DATA"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which are not part of the repository."""
    folder = Path(os.environ.get(REAL_DATA_VARIABLE, CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data are absent: set {REAL_DATA_VARIABLE}, or put them into ../shared/data")
    return folder
