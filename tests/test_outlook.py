"""The verdict: better with more budget, patients, fewer parameters and a public start."""

import pytest

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.outlook import outlook

ORDER = ["hopeless", "doubtful", "comfortable"]


def verdict(epsilon=1.0, patients=136, parameters=340_000, start=False) -> int:
    found = outlook(PrivacyBudget(epsilon=epsilon, delta=1e-5), patients, parameters, start)
    return ORDER.index(found.verdict)


@pytest.mark.parametrize(
    "better", [{"epsilon": 8.0}, {"patients": 1600}, {"parameters": 30_000}, {"start": True}], ids=str
)
def test_what_helps_never_worsens_the_verdict(better):
    for epsilon in (0.5, 1.0, 3.0):
        assert verdict(**{"epsilon": epsilon, **better}) >= verdict(epsilon)


def test_the_usual_cases_span_all_verdicts():
    assert verdict(0.5, 24) == 0 and verdict(1.0, 136) == 1 and verdict(8.0, 136) == 2


def test_whoever_has_too_little_is_told_what_to_do():
    budget = PrivacyBudget(epsilon=0.5, delta=1e-5)
    assert "public start" in outlook(budget, 24, 340_000, start=False).next_step
    assert "training patients" in outlook(budget, 24, 340_000, start=True).next_step
    assert outlook(PrivacyBudget(epsilon=8, delta=1e-5), 1600, 480_000, start=True).next_step == "train"
