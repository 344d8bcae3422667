"""Phantoms for a dataset are found by public facts, and shapes fit every dataset."""

import numpy as np
import pytest

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.phantoms import KINDS, Patient, shapes
from nnunet_dp.phantoms.matching import SHAPES, PublicFacts, facts_of, find_kind, matching_kinds

FACTS = PublicFacts(dimensions=3, channels=1, calibrated=False, classes=2, regions=False)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_kind_resembles_its_own_dataset(name):
    assert name in matching_kinds(facts_of(KINDS[name]))


def test_a_ct_is_not_resembled_by_an_mri():
    ct = PublicFacts(dimensions=3, channels=1, calibrated=True, classes=2, regions=False)
    assert not set(matching_kinds(FACTS)) & set(matching_kinds(ct))


def test_where_nothing_resembles_there_are_shapes():
    assert matching_kinds(PublicFacts(2, 7, False, 5, False)) == (SHAPES,)


@pytest.mark.parametrize("name", ["lesion", "mpmri"])
def test_a_kind_that_the_network_cannot_take_is_refused(name):
    with pytest.raises(UsageRefusal, match="--phantom shapes"):
        find_kind(name, FACTS)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UsageRefusal, match=r"hippocampus.*shapes"):
        find_kind("liver", FACTS)


@pytest.mark.parametrize(("dimensions", "channels", "classes"), [(2, 3, 1), (2, 1, 7), (3, 4, 3), (3, 1, 2)])
def test_shapes_hold_all_classes_in_nearly_all_cases(dimensions, channels, classes):
    kind, edge = shapes.kind(dimensions, channels, classes), 48 if dimensions == 2 else 32
    found = []
    for index in range(12):
        scan = kind.render(Patient("shapes", 2, index), 0, (edge,) * dimensions)
        assert scan.image.shape == (channels, *(edge,) * dimensions) and np.isfinite(scan.image).all()
        assert scan.segmentation.max() <= classes
        found.append(len(np.unique(scan.segmentation)) - 1)
    assert np.mean(found) > 0.85 * classes


def test_shapes_are_the_same_every_time_and_differ_between_patients():
    kind = shapes.kind(2, 1, 2)
    one, same, other = (kind.render(Patient("shapes", 2, index), 0, (32, 32)).image for index in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
