"""Balls in millimetres: equal to the slow footprint, voxel for voxel, and lawful on every mask."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from nnunet_dp import ball_morphology
from nnunet_dp.ball_morphology import (
    bounding_box,
    closed,
    components,
    dilated,
    eroded,
    holes,
    inscribed_radius,
    opened,
)

OPERATIONS = {
    eroded: ndimage.binary_erosion,
    dilated: ndimage.binary_dilation,
    opened: ndimage.binary_opening,
    closed: ndimage.binary_closing,
}
SPACINGS = {2: [(1.0, 1.0), (0.8, 2.5)], 3: [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5), (3.0, 0.7, 1.1)]}
SHAPES = {2: (13, 9), 3: (9, 7, 6)}


def ball(radius_mm, spacing):
    """Offsets at most radius_mm long, as a footprint: written down, not computed by distance transforms."""
    reach = [int(radius_mm * (1 + 1e-6) / step) for step in spacing]
    offsets = np.meshgrid(*[np.arange(-n, n + 1) * step for n, step in zip(reach, spacing, strict=True)], indexing="ij")
    return sum(np.square(offset) for offset in offsets) <= (radius_mm * (1 + 1e-6)) ** 2


def by_footprint(function, mask, radius_mm, spacing):
    """SciPy on a canvas that is wide enough for two balls."""
    footprint = ball(radius_mm, spacing)
    inside = tuple(slice(size, -size) for size in footprint.shape)
    padded = np.pad(mask, [(size, size) for size in footprint.shape])
    return OPERATIONS[function](padded, footprint)[inside]


def grid_radii(spacing):
    """Radii that equal the length of an offset of the grid, where rounding decides."""
    steps = np.stack(np.meshgrid(*[np.arange(4)] * len(spacing)), -1).reshape(-1, len(spacing))
    lengths = np.unique(np.linalg.norm(steps * spacing, axis=1).round(9))
    return [float(length) for length in lengths if 0 < length < 4]


@st.composite
def cases(draw):
    dimensions = draw(st.sampled_from([2, 3]))
    spacing = draw(st.sampled_from(SPACINGS[dimensions]))
    radius = draw(st.one_of(st.sampled_from(grid_radii(spacing)), st.floats(0.3, 4.0)))
    mask = draw(arrays(bool, SHAPES[dimensions], elements=st.booleans(), fill=st.booleans()))
    if draw(st.booleans()):
        mask = ndimage.binary_dilation(mask, ball(max(1.0, radius / 2), spacing))
    return mask, radius, spacing


def blobs(seed, shape, share=0.4):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return noise > np.quantile(noise, 1 - share)


@pytest.mark.parametrize("function", OPERATIONS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_an_operation_equals_its_footprint_reference(function, case):
    assert np.array_equal(function(*case), by_footprint(function, *case))


@pytest.mark.parametrize("function", OPERATIONS)
@pytest.mark.parametrize("spacing", SPACINGS[3])
def test_radii_on_the_grid_equal_the_footprint_reference_on_blobs(function, spacing):
    mask = blobs(3, (22, 20, 14))
    for radius in grid_radii(spacing)[::5]:
        assert np.array_equal(function(mask, radius, spacing), by_footprint(function, mask, radius, spacing))


@pytest.mark.parametrize("function", OPERATIONS)
@pytest.mark.parametrize("slab_voxels", [1, 600, 3000])
def test_slabs_equal_the_whole(function, slab_voxels, monkeypatch):
    mask, spacing = blobs(5, (40, 11, 9)), (0.8, 0.8, 2.5)
    whole = function(mask, 2.6, spacing)
    monkeypatch.setattr(ball_morphology, "SLAB_VOXELS", slab_voxels)
    assert np.array_equal(function(mask, 2.6, spacing), whole)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_opening_never_adds_a_voxel_and_is_idempotent(case):
    mask, radius, spacing = case
    once = opened(mask, radius, spacing)
    assert not (once & ~mask).any()
    assert np.array_equal(opened(once, radius, spacing), once)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_closing_never_removes_a_voxel_stays_in_the_box_and_is_idempotent(case):
    mask, radius, spacing = case
    once = closed(mask, radius, spacing)
    assert not (mask & ~once).any()
    assert bounding_box(once) == bounding_box(mask)
    assert np.array_equal(closed(once, radius, spacing), once)


@pytest.mark.parametrize("function", OPERATIONS)
def test_nothing_wraps_around(function):
    mask = np.zeros((30, 12, 12), bool)
    mask[:4] = True
    assert not function(mask, 3.0, (1.0, 1.0, 1.0))[10:].any()


@pytest.mark.parametrize("function", OPERATIONS)
@pytest.mark.parametrize("layout", ["fortran", "strided", "flipped"])
def test_memory_layout_does_not_matter_and_the_input_is_untouched(function, layout):
    mask = blobs(7, (14, 12, 10))
    others = {"fortran": np.asfortranarray(mask), "strided": np.repeat(mask, 2, 1)[:, ::2], "flipped": mask[::-1]}
    other = others[layout]
    before, plain = other.copy(), np.array(other, order="C")
    assert np.array_equal(function(other, 1.7, (0.8, 0.8, 2.5)), function(plain, 1.7, (0.8, 0.8, 2.5)))
    assert np.array_equal(other, before)


@pytest.mark.parametrize("function", OPERATIONS)
def test_a_ball_of_one_voxel_copies_the_mask(function):
    mask = blobs(1, (8, 9))
    result = function(mask, 0.5, (0.8, 2.5))
    assert np.array_equal(result, mask)
    assert not np.shares_memory(result, mask)


@pytest.mark.parametrize("function", OPERATIONS)
def test_an_empty_mask_stays_empty(function):
    assert not function(np.zeros((5, 6, 7), bool), 2.0, (1.0, 1.0, 1.0)).any()


def test_the_canvas_is_background():
    full = np.ones((9, 9, 9), bool)
    assert eroded(full, 2.0, (1.0, 1.0, 1.0)).sum() == 5**3
    assert not opened(full, 2.0, (1.0, 1.0, 1.0))[0, 0, 0]
    assert closed(full, 2.0, (1.0, 1.0, 1.0)).all()


@settings(max_examples=50, deadline=None)
@given(case=cases(), slab_voxels=st.sampled_from([1, 60, 2**24]))
def test_the_inscribed_radius_is_the_largest_distance_to_background(case, slab_voxels):
    mask, _, spacing = case
    expected = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing).max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ball_morphology, "SLAB_VOXELS", slab_voxels)
        assert inscribed_radius(mask, spacing) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=50, deadline=None)
@example(case=(np.zeros((4, 4), bool), 1.0, (1.0, 1.0)), by_faces=False)
@given(case=cases(), by_faces=st.booleans())
def test_components_are_those_of_scipy(case, by_faces):
    mask = case[0]
    structure = ndimage.generate_binary_structure(mask.ndim, 1 if by_faces else mask.ndim)
    expected, count = ndimage.label(mask, structure)
    labels, volumes = components(mask, by_faces=by_faces)
    pairs = set(zip(expected.ravel().tolist(), labels.ravel().tolist(), strict=True))
    assert len(volumes) == count
    assert len(pairs - {(0, 0)}) == count
    assert volumes.tolist() == [(labels == component + 1).sum() for component in range(count)]


@pytest.mark.parametrize("shape", [(10, 3), (1, 10, 3), (1, 11), (5, 5), (7, 1, 5)])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4])
def test_components_are_right_in_arrays_with_odd_sides(shape, share):
    """Where cc3d 4.1.1 fails on booleans."""
    for seed in range(40):
        mask = np.random.default_rng(seed).random(shape) < share
        labels, volumes = components(mask)
        assert np.array_equal(labels > 0, mask)
        assert len(volumes) == ndimage.label(mask, np.ones([3] * mask.ndim))[1]


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_holes_are_those_of_scipy(case):
    mask = case[0]
    expected = ndimage.binary_fill_holes(mask) & ~mask
    assert np.array_equal(holes(mask, case[2]), expected)
    assert np.array_equal(holes(mask, case[2], largest_mm3=1e9), expected)


def test_background_at_the_border_is_never_a_hole_however_many_volumes_are_tried():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        noise = ndimage.gaussian_filter(generator.random(tuple(generator.integers(1, 10, 3))), 0.6)
        mask = noise > generator.uniform(0.35, 0.55)
        assert np.array_equal(holes(mask, (1.0, 1.0, 1.0)), ndimage.binary_fill_holes(mask) & ~mask)


def test_a_hole_larger_than_the_limit_stays_open():
    mask = np.ones((9, 12), bool)
    mask[1, 1] = mask[4:6, 4:6] = mask[0, 8] = False
    found = holes(mask, (0.5, 2.0), largest_mm3=3.0)
    assert np.argwhere(found).tolist() == [[1, 1]]
    assert holes(mask, (0.5, 2.0), largest_mm3=4.0).sum() == 5
