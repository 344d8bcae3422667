"""Refinement: classes meet by the stated rules, nothing else moves, and doing it twice is doing it once."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nnunet_dp import refinement
from nnunet_dp.ball_morphology import holes, inscribed_radius, opened
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.morphology import ClassRefinement, Closing, FillHoles, KeepLargest, Morphology, Opening, RemoveSmall
from nnunet_dp.refinement import refine

SPACING = (0.8, 0.8, 2.5)
OPERATIONS = (
    Opening(radius_mm=1.0),
    Opening(radius_mm=2.6, least_kept=0.5),
    Opening(inscribed_share=0.6),
    Closing(radius_mm=1.0),
    Closing(inscribed_share=0.8),
    FillHoles(),
    FillHoles(largest_mm3=4.0),
    RemoveSmall(below_share=0.3),
    RemoveSmall(below_mm3=5.0),
    KeepLargest(),
)
NESTED = {"whole": (1, 2, 3), "core": (2, 3), "edge": (3,), "apart": (5,)}


def ordinary(*lists, ignore_label=None):
    """Class k has label k and the k-th list of operations."""
    classes = tuple(
        ClassRefinement(name=f"class {k}", labels=(k,), writes=k, operations=tuple(operations))
        for k, operations in enumerate(lists, 1)
    )
    return Morphology(kind="fixed", classes=classes, ignore_label=ignore_label)


def nested(*lists):
    classes = tuple(
        ClassRefinement(name=name, labels=labels, writes=labels[0], operations=tuple(operations))
        for (name, labels), operations in zip(NESTED.items(), lists, strict=True)
    )
    return Morphology(kind="fixed", regions=True, ignore_label=9, classes=classes)


def blobs(seed, shape, labels, smooth=1.0):
    """Each voxel takes the label whose smooth noise is highest there, with some salt."""
    generator = np.random.default_rng(seed)
    noise = np.stack([ndimage.gaussian_filter(generator.normal(size=shape), smooth) for _ in labels])
    image = np.array(labels, np.uint8)[noise.argmax(0)]
    salt = generator.random(shape) < 0.03
    image[salt] = generator.choice(labels, salt.sum())
    return image


operation_lists = st.lists(st.sampled_from(OPERATIONS), max_size=3)
images = st.builds(
    blobs,
    st.integers(0, 10**6),
    st.sampled_from([(9, 8, 7), (14, 12), (1, 15, 12), (12, 11, 2), (5, 1), (20, 3, 9)]),
    st.sampled_from([[0, 1, 2, 3], [0, 0, 1, 2, 3, 5, 9], [1, 2, 3], [0, 3], [0, 0, 0, 2, 3, 7]]),
    st.sampled_from([0.0, 0.7, 1.5]),
)
rule_books = st.one_of(
    st.builds(ordinary, operation_lists, operation_lists, operation_lists, ignore_label=st.sampled_from([None, 9])),
    st.builds(nested, operation_lists, operation_lists, operation_lists, operation_lists),
)
ordinary_books = st.builds(ordinary, operation_lists, operation_lists, operation_lists)


def spacing_of(image):
    return SPACING[-image.ndim :]


@settings(max_examples=300, deadline=None)
@given(image=images, rules=rule_books)
def test_refining_twice_is_refining_once(image, rules):
    before = image.copy()
    once = refine(image, rules, spacing_of(image))
    assert np.array_equal(refine(once, rules, spacing_of(image)), once)
    assert once.dtype == image.dtype
    assert once.shape == image.shape
    assert np.array_equal(image, before)


@settings(max_examples=150, deadline=None)
@given(image=images, rules=rule_books, data=st.data())
def test_flipping_before_or_after_is_the_same(image, rules, data):
    axes = data.draw(st.sets(st.sampled_from(range(image.ndim)), min_size=1))
    flipped = np.flip(image, tuple(axes))
    expected = np.flip(refine(image, rules, spacing_of(image)), tuple(axes))
    assert np.array_equal(refine(flipped, rules, spacing_of(image)), expected)


@settings(max_examples=150, deadline=None)
@given(image=images, lists=st.tuples(*[operation_lists] * 3), order=st.permutations([1, 2, 3]))
def test_relabelling_before_or_after_is_the_same(image, lists, order):
    renamed = np.arange(256, dtype=np.uint8)
    renamed[[1, 2, 3]] = order
    permuted = [lists[order.index(label)] for label in (1, 2, 3)]
    expected = renamed[refine(image, ordinary(*lists), spacing_of(image))]
    assert np.array_equal(refine(renamed[image], ordinary(*permuted), spacing_of(image)), expected)


@settings(max_examples=100, deadline=None)
@given(image=images, rules=rule_books)
def test_the_ignore_label_and_foreign_labels_are_untouched(image, rules):
    known = {label for rule in rules.classes for label in rule.labels}
    refined = refine(image, rules, spacing_of(image))
    for label in {5, 7, 9} - known:
        assert np.array_equal(refined == label, image == label)


@settings(max_examples=100, deadline=None)
@given(image=images, rules=ordinary_books)
def test_a_class_that_is_there_does_not_vanish(image, rules):
    refined = refine(image, rules, spacing_of(image))
    assert set(np.unique(image)) - {0} == set(np.unique(refined)) - {0}


@settings(max_examples=100, deadline=None)
@given(image=images, rules=ordinary_books)
def test_rules_that_only_add_change_background_alone(image, rules):
    adding = [[step for step in rule.operations if isinstance(step, Closing | FillHoles)] for rule in rules.classes]
    refined = refine(image, ordinary(*adding), spacing_of(image))
    assert np.array_equal(refined[image != 0], image[image != 0])


def oracle_round(image, rules, spacing):
    """One round of rules that only remove, written out voxel by voxel."""
    kept = {}
    for rule in rules.classes:
        mask = image == rule.writes
        for operation in rule.operations:
            mask = removed(mask, operation, spacing)
        kept[rule.writes] = mask
    result = image.copy()
    for label, mask in kept.items():
        pieces, count = ndimage.label((image == label) & ~mask)
        for piece in range(1, count + 1):
            result[pieces == piece] = home(image, pieces == piece, label, kept)
    return result


def removed(mask, operation, spacing):
    if isinstance(operation, Opening):
        after = opened(mask, operation.radius_mm, spacing)
    else:
        labels, count = ndimage.label(mask, np.ones([3] * mask.ndim))
        volumes = [(labels == k + 1).sum() for k in range(count)]
        share = operation.below_share if isinstance(operation, RemoveSmall) else 1.0
        after = np.isin(labels, [k + 1 for k in range(count) if volumes[k] >= share * max(volumes)])
    return after if after.any() else mask


def home(image, piece, own, kept):
    votes = dict.fromkeys([0, *kept], 0)
    for place in np.argwhere(piece):
        for axis, step in itertools.product(range(image.ndim), (-1, 1)):
            other = place.copy()
            other[axis] += step
            if 0 <= other[axis] < image.shape[axis]:
                label = int(image[tuple(other)])
                votes[label] += label == 0 or (label != own and kept[label][tuple(other)])
    best = [label for label, faces in votes.items() if faces == max(votes.values())]
    return best[0] if len(best) == 1 else 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rules=st.builds(
        ordinary,
        *[st.sampled_from([(), (KeepLargest(),), (RemoveSmall(below_share=0.5),), (Opening(radius_mm=1.0),)])] * 3,
    ),
)
def test_pieces_go_where_the_slow_rule_says(seed, rules):
    image = blobs(seed, (8, 7, 6), [0, 1, 2, 3], 0.8)
    expected, seen = image, []
    while not any(np.array_equal(expected, before) for before in seen):
        seen.append(expected)
        expected = oracle_round(expected, rules, SPACING)
    if np.array_equal(expected, seen[-1]):  # else the rounds go in circles, which the oracle does not resolve
        assert np.array_equal(refine(image, rules, SPACING), expected)


def test_rounds_seldom_run_out(monkeypatch):
    """In most images the first stage ends in a fixed point; those that do not still end (tested above)."""
    stages = []
    plain = refinement._repeated
    monkeypatch.setattr(
        refinement, "_repeated", lambda *args, **options: stages.append(options) or plain(*args, **options)
    )
    rules = ordinary((Opening(radius_mm=1.0), KeepLargest()), (Closing(radius_mm=1.7), FillHoles()), (KeepLargest(),))
    for seed in range(40):
        refine(blobs(seed, (16, 14, 10), [0, 0, 0, 1, 2, 3], 1.5), rules, SPACING)
    assert sum("only_give_up" in options for options in stages) <= 2


def test_images_that_go_in_circles_settle(monkeypatch):
    """With no rounds for the first stage, everything is left to the stages that must end."""
    monkeypatch.setattr(refinement, "ROUNDS", 0)
    rules = ordinary(*[(Opening(radius_mm=1.0), Closing(radius_mm=1.7), KeepLargest())] * 3)
    for seed in range(20):
        once = refine(blobs(seed, (10, 9, 8), [0, 1, 2, 3], 0.8), rules, SPACING)
        assert np.array_equal(refine(once, rules, SPACING), once)


@settings(max_examples=100, deadline=None)
@given(image=images, lists=st.tuples(*[operation_lists] * 4))
def test_nested_regions_follow_their_masks(image, lists):
    rules = nested(*lists)
    refined = refine(image, rules, spacing_of(image))
    untouched = refine(image, nested((), (), (), ()), spacing_of(image))
    assert np.array_equal(untouched, image)
    assert set(np.unique(refined)) <= set(np.unique(image)) | {0, 1, 2}


def test_a_child_is_cut_to_its_parent_and_gives_up_voxels_to_it():
    image = np.zeros((6, 12), np.uint8)
    image[1:5, 1:6] = 1
    image[2:4, 2:4] = 2
    image[2, 5] = 2
    image[4, 10] = 2
    refined = refine(image, nested((KeepLargest(),), (KeepLargest(),), (), ()), (1.0, 1.0))
    assert refined[4, 10] == 0
    assert refined[2, 5] == 1
    assert (refined[2:4, 2:4] == 2).all()


def test_a_parent_of_children_alone_is_refined():
    image = np.array([[3, 3, 0, 0, 3], [3, 3, 0, 2, 0]], np.uint8)
    refined = refine(image, nested((KeepLargest(),), (), (), ()), (1.0, 1.0))
    assert refined.tolist() == [[3, 3, 0, 0, 0], [3, 3, 0, 0, 0]]


def test_a_region_fills_its_hole_but_not_the_ignored_voxel_in_it():
    image = np.ones((5, 7), np.uint8)
    image[2, 2:4] = 0, 9
    refined = refine(image, nested((FillHoles(),), (), (), ()), (1.0, 1.0))
    assert refined[2, 2:4].tolist() == [1, 9]


def test_regions_do_not_take_voxels_of_regions_apart():
    image = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.uint8)
    assert np.array_equal(refine(image, nested((FillHoles(),), (), (), ()), (1.0, 1.0)), image)


def test_classes_claim_background_only():
    image = np.array([[1, 1, 1, 1], [1, 0, 2, 1], [1, 7, 9, 1], [1, 1, 1, 1]], np.uint8)
    refined = refine(image, ordinary((FillHoles(),), (), ignore_label=9), (1.0, 1.0))
    assert refined[1:3, 1:3].tolist() == [[1, 2], [7, 9]]


def test_what_two_classes_claim_stays_background():
    image = np.zeros((5, 5), np.uint8)
    image[2, 1] = image[2, 3] = 1
    image[1, 2] = image[3, 2] = 2
    closing = (Closing(radius_mm=1.5),)
    assert refine(image, ordinary(closing, ()), (1.0, 1.0))[2, 2] == 1
    assert refine(image, ordinary(closing, closing), (1.0, 1.0))[2, 2] == 0


def test_a_speck_inside_another_class_becomes_that_class():
    image = np.full((7, 9), 2, np.uint8)
    image[3, 2], image[1:6, 5:8] = 1, 1
    assert refine(image, ordinary((KeepLargest(),), ()), (1.0, 1.0))[3, 2] == 2


def test_a_piece_between_two_classes_becomes_background():
    image = np.zeros((3, 9), np.uint8)
    image[1] = 2, 2, 2, 1, 3, 3, 0, 1, 1
    image[0] = image[2] = 7
    assert refine(image, ordinary((KeepLargest(),), (), ()), (1.0, 1.0))[1, 3] == 0


def test_opening_takes_a_spur_and_keeps_the_body():
    image = np.zeros((15, 15, 15), np.int16)
    image[2:9, 2:9, 2:9] = image[5, 5, 9:14] = 4
    classes = (ClassRefinement(name="body", labels=(4,), writes=4, operations=(Opening(radius_mm=1.5),)),)
    refined = refine(image, Morphology(kind="fixed", classes=classes), (1.0, 1.0, 1.0))
    assert not refined[5, 5, 9:].any()
    assert np.array_equal(refined == 4, opened(image == 4, 1.5, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("guard", [Opening(radius_mm=9.0), Opening(radius_mm=1.0, least_kept=0.99)])
def test_an_opening_that_would_take_too_much_is_skipped(guard):
    image = np.zeros((12, 12), np.uint8)
    image[3:8, 3:8] = image[5, 8:11] = 1
    assert np.array_equal(refine(image, ordinary((guard,)), (1.0, 1.0)), image)


def test_removal_of_small_components_never_removes_the_largest():
    image = np.array([[1, 1, 0, 1]], np.uint8).repeat(2, 0)
    assert np.array_equal(refine(image, ordinary((RemoveSmall(below_mm3=100.0),)), (1.0, 1.0)), image)
    assert refine(image, ordinary((RemoveSmall(below_mm3=4.0),)), (1.0, 1.0))[0].tolist() == [1, 1, 0, 0]


def test_the_largest_of_equals_all_stay():
    image = np.array([[1, 1, 0, 1, 1, 0, 1]], np.uint8).repeat(2, 0)
    assert refine(image, ordinary((KeepLargest(),)), (1.0, 1.0))[0].tolist() == [1, 1, 0, 1, 1, 0, 0]


def test_a_radius_can_follow_the_image():
    image = np.zeros((60, 40), np.uint8)
    image[2:31, 2:31] = image[16, 31:38] = image[40:51, 4:30] = 1
    refined = refine(image, ordinary((Opening(inscribed_share=0.5),)), (1.0, 1.0))
    body = opened(image == 1, 7.5, (1.0, 1.0))
    assert inscribed_radius(image == 1, (1.0, 1.0)) == 15.0
    assert np.array_equal(refined == 1, body)
    assert body[16, 16] and not body[16, 31:].any() and not body[40:].any()


def test_a_plane_is_refined_as_a_plane():
    image = blobs(4, (30, 24), [0, 1, 2], 1.5)
    rules = ordinary((Opening(radius_mm=2.0),), (FillHoles(), KeepLargest()))
    flat = refine(image, rules, (0.8, 2.5))
    assert not np.array_equal(flat, image)
    assert np.array_equal(refine(image[None], rules, (5.0, 0.8, 2.5)), flat[None])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_the_type_is_kept_and_does_not_matter(dtype):
    image = blobs(2, (12, 10, 6), [0, 1, 2, 3])
    rules = ordinary(*[(Opening(radius_mm=1.0), FillHoles())] * 3)
    refined = refine(image.astype(dtype), rules, SPACING)
    assert refined.dtype == dtype
    assert np.array_equal(refined, refine(image, rules, SPACING))


def test_negative_and_large_labels_of_no_class_are_left_alone():
    image = np.array([[1, 1, -1], [1, 0, 70000], [1, 1, 1]], np.int32)
    refined = refine(image, ordinary((FillHoles(), Closing(radius_mm=1.5), KeepLargest())), (1.0, 1.0))
    assert refined[:2, 2].tolist() == [-1, 70000]


def test_many_classes_fit():
    image = np.arange(320, dtype=np.int16).reshape(16, 20)
    assert np.array_equal(refine(image, ordinary(*[(KeepLargest(),)] * 319), (1.0, 1.0)), image)


def test_several_labels_of_one_class_are_refined_together_and_keep_their_labels():
    classes = (ClassRefinement(name="both", labels=(1, 2), writes=1, operations=(FillHoles(), KeepLargest())),)
    image = np.array([[1, 1, 2, 0, 2], [1, 0, 2, 0, 0], [1, 2, 2, 0, 0]], np.uint8)
    refined = refine(image, Morphology(kind="fixed", classes=classes), (1.0, 1.0))
    assert refined.tolist() == [[1, 1, 2, 0, 0], [1, 1, 2, 0, 0], [1, 2, 2, 0, 0]]


@pytest.mark.parametrize("layout", ["fortran", "strided", "read-only"])
def test_memory_layout_does_not_matter(layout):
    image = blobs(6, (12, 10, 6), [0, 1, 2, 3])
    rules = ordinary(*[(Opening(radius_mm=1.0), Closing(radius_mm=1.7))] * 3)
    other = {"fortran": np.asfortranarray(image), "strided": image.repeat(2, 2)[..., ::2], "read-only": image}[layout]
    other.setflags(write=False)
    assert np.array_equal(refine(other, rules, SPACING), refine(image.copy(), rules, SPACING))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(6, 5, 4), (1, 6, 5), (1, 1, 1), (0, 3), (7, 1)])
@pytest.mark.parametrize("content", ["empty", "full", "one voxel"])
def test_empty_full_and_single_voxel_images_come_through(operation, shape, content):
    image = np.full(shape, int(content == "full"), np.uint8)
    if content == "one voxel" and image.size:
        image[tuple(size // 2 for size in shape)] = 1
    refined = refine(image, ordinary((operation,)), SPACING[-len(shape) :])
    assert refined.any() == image.any()
    assert content == "full" or np.array_equal(refined, image)


def test_holes_are_filled_in_the_right_place():
    image = blobs(9, (14, 14, 10), [0, 1, 1], 1.0)
    refined = refine(image, ordinary((FillHoles(),)), SPACING)
    assert np.array_equal(refined == 1, (image == 1) | holes(image == 1, SPACING))


@pytest.mark.parametrize(
    ("image", "spacing"),
    [
        (np.zeros((3, 3)), (1.0, 1.0)),
        (np.zeros((3, 3), bool), (1.0, 1.0)),
        (np.zeros((3, 3), int), (1.0, 1.0, 1.0)),
        (np.zeros((3, 3), int), (1.0, 0.0)),
        (np.zeros((3, 3), int), (1.0, float("nan"))),
        (np.zeros((2, 3, 4, 5), int), (1.0,) * 4),
        (np.zeros(4, int), (1.0,)),
    ],
)
def test_images_that_make_no_sense_are_refused(image, spacing):
    with pytest.raises(UsageRefusal, match="should"):
        refine(image, ordinary(()), spacing)


@pytest.mark.parametrize(
    ("regions", "classes"),
    [
        (False, [((1,), 2), ((2,), 2)]),
        (False, [((1,), 300)]),
        (False, [((300,), 300)]),
        (True, [((2, 3), 2), ((1, 2, 3), 1)]),
        (True, [((1, 2), 1), ((2, 3), 3)]),
        (True, [((1, 2), 2), ((2,), 2)]),
    ],
)
def test_rules_whose_result_could_not_be_read_back_are_refused(regions, classes):
    rules = tuple(ClassRefinement(name=f"{k}", labels=labels, writes=w) for k, (labels, w) in enumerate(classes))
    with pytest.raises(UsageRefusal, match="should"):
        refine(np.zeros((3, 3), np.uint8), Morphology(kind="fixed", regions=regions, classes=rules), (1.0, 1.0))
