"""A patient whose data cannot be used brings an empty record; an expectation that is wrong for all is refused."""

import numpy as np
import pytest

from nnunet_dp.errors import Refusal
from nnunet_dp.unusable import EmptyWhereUnusable


def source(cases: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 4, 4), np.float32)


@pytest.mark.parametrize(("shape", "labels"), [((1, 2, 4, 4), None), ((1, 1, 4, 4), {0})])
def test_a_wrong_expectation_is_refused_before_all_patients_count_as_nothing(shape, labels):
    with pytest.warns(UserWarning, match="counts as nothing"), pytest.raises(Refusal, match="nnunet-dp doctor"):
        EmptyWhereUnusable(source, (1, 1, 4, 4), (shape,), labels).refuse_fault(("case",))


def test_a_right_expectation_is_not():
    EmptyWhereUnusable(source, (1, 1, 4, 4), ((1, 1, 4, 4),), {0, 1}).refuse_fault(("case",))
