"""Refinement of a segmentation by the rules of a ``morphology.json``: pure, and free of privacy cost.

Each class's operations run on its own mask, in order, in its bounding box. Then classes meet:

====================  =============================================================================================
what                  ordinary labels
====================  =============================================================================================
claims                closing and hole filling take background only; what two classes claim stays background
given-up pieces       (opening residue, removed components; joined by faces) take the label they share most faces
                      with, among background and what other classes keep; ties, and no neighbour: background
other labels          the ignore label and labels of no class are never touched, and are nobody's neighbours
====================  =============================================================================================

====================  =============================================================================================
what                  regions (nested labels)
====================  =============================================================================================
nesting               a child is cut to its refined parent, so it vanishes where its parent does
painting              in the order of the classes; what a child gives up is its parent's
claims                background and ancestors only; of two regions that claim a voxel the first painted has it
other labels          never touched
====================  =============================================================================================

An operation that would empty a class is skipped, and one that keeps less than its ``least_kept`` of it too. A radius
given as ``inscribed_share`` follows the class in the image at hand; no radius counts for more than half the longest
side of the image. Axes of length one are no axes, so [1, H, W] is an image in the plane.

Design note: refining twice must equal refining once, though a piece that one class gives up may make another class
give it back. ``refine`` therefore repeats whole rounds, each a function of the image alone, until one changes nothing:
the result is a fixed point, and refining it again finds that at once. If after ``ROUNDS`` rounds, or as soon as an
image recurs, none is found, given-up pieces go to background and nothing is claimed until no class gives up anything
(voxels only leave, so this ends); ordinary rounds then only add, because a class that gives up nothing makes its
claims under the condition that it will not give up anything afterwards (so this ends too, in a fixed point).

>>> from nnunet_dp.morphology import KeepLargest
>>> rule = ClassRefinement(name="lesion", labels=(1,), writes=1, operations=(KeepLargest(),))
>>> image = np.array([[1, 1, 0, 0], [1, 1, 0, 1]], np.uint8)
>>> refine(image, Morphology(kind="fixed", classes=(rule,)), (1.0, 1.0)).tolist()
[[1, 1, 0, 0], [1, 1, 0, 0]]
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from nnunet_dp.ball_morphology import (
    VOLUME_TOLERANCE,
    Box,
    closed,
    components,
    holes,
    in_chunks,
    inscribed_radius,
    opened,
)
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.morphology import (
    ClassRefinement,
    Closing,
    FillHoles,
    KeepLargest,
    Morphology,
    Opening,
    Operation,
    RemoveSmall,
)

ROUNDS = 16


def refine(segmentation: np.ndarray, morphology: Morphology, spacing_mm: Sequence[float]) -> np.ndarray:
    """Refine one segmentation.

    Args:
        segmentation: integers [*spatial], 2D or 3D (axes of length one are dropped meanwhile).
        morphology: the rules.
        spacing_mm: millimetres between voxels, one number per axis of the segmentation.

    Returns:
        A new array of the same shape and type.

    Raises:
        UsageRefusal: an array, a spacing or rules that do not fit together.

    Formal guarantee:
        Nothing but the arguments is read, so refining a private model's prediction costs no privacy.
        Refining the result again, with the same rules and spacing, changes nothing.
        Voxels of the ignore label and of labels of no class come back as they were.
        An ordinary class that is there does not vanish.
    """
    _require_image(segmentation, spacing_mm)
    if not segmentation.size:
        return segmentation.copy()
    axes = image_axes(segmentation.shape)
    image = segmentation.reshape([segmentation.shape[axis] for axis in axes])
    scheme = _scheme(image, morphology, [float(spacing_mm[axis]) for axis in axes])
    codes = _encoded(image, scheme)
    boxes = _boxes(codes, scheme)
    operated = [index for index, rule in enumerate(scheme.rules) if rule.operations]
    around = _hull([box for code, box in enumerate(boxes, 1) if scheme.inside[operated, code].any()])
    if around is None:
        return segmentation.copy()
    around = _widened(around)
    codes = _settled(codes[around], scheme)
    result = np.array(image, order="C")
    _decode(result[around], codes, scheme)
    return result.reshape(segmentation.shape)


@dataclass(frozen=True)
class _Scheme:
    """What stays the same during one call. Voxels carry codes: 0 background, k + 1 the (innermost) class k, then other.

    Attributes:
        rules: of the classes.
        regions: whether they are nested.
        spacing_mm: one per axis.
        longest_radius_mm: half the longest side.
        lowest: label of the table's second entry.
        table: code of each label; its ends stand for all labels beyond.
        inside: bool [classes, codes]: voxels of this code lie in the class.
    """

    rules: tuple[ClassRefinement, ...]
    regions: bool
    spacing_mm: list[float]
    longest_radius_mm: float
    lowest: int
    table: np.ndarray
    inside: np.ndarray

    @property
    def other(self) -> int:
        return len(self.rules) + 1

    @property
    def nowhere(self) -> int:
        return len(self.rules) + 2

    def parent(self, index: int) -> int | None:
        """Innermost region around a region; None at the root and for ordinary labels."""
        labels = set(self.rules[index].labels)
        around = [k for k, rule in enumerate(self.rules) if labels < set(rule.labels)]
        return min(around, key=lambda k: len(self.rules[k].labels), default=None)

    def room(self, index: int) -> np.ndarray:
        """Codes that a class may claim: bool [codes]. Background, and voxels of ancestors alone."""
        free = np.zeros(self.nowhere, bool)
        labels = set(self.rules[index].labels)
        free[1 : self.other] = [labels < set(rule.labels) for rule in self.rules]
        free[0] = True
        return free


def _require_image(segmentation: np.ndarray, spacing_mm: Sequence[float]) -> None:
    if not np.issubdtype(segmentation.dtype, np.integer):
        raise UsageRefusal(f"a segmentation should hold integers, found {segmentation.dtype}; convert it first")
    if len(image_axes(segmentation.shape)) not in (2, 3):
        raise UsageRefusal(f"a segmentation should have 2 or 3 axes, found {segmentation.ndim}; pass one image a time")
    if len(spacing_mm) != segmentation.ndim or not all(0 < step < math.inf for step in spacing_mm):
        found = ", ".join(map(str, spacing_mm))
        raise UsageRefusal(f"spacing_mm should be {segmentation.ndim} positive numbers, found ({found}); one per axis")


def image_axes(shape: Sequence[int]) -> list[int]:
    """Axes longer than one voxel; the last ones as well until there are two."""
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    short = [axis for axis, size in enumerate(shape) if size == 1]
    return sorted(axes + short[len(short) - max(0, min(len(short), 2 - len(axes))) :])


def _scheme(image: np.ndarray, morphology: Morphology, spacing_mm: list[float]) -> _Scheme:
    rules = morphology.classes
    labels = [0, *(label for rule in rules for label in rule.labels)]
    lowest, codes = min(labels), len(rules) + 2
    table = np.full(max(labels) - lowest + 3, codes - 1, np.min_scalar_type(codes))
    table[1 - lowest] = 0
    for index, rule in enumerate(rules):
        table[np.array(rule.labels) - lowest + 1] = index + 1
    _require_order(rules, [int(table[min(max(rule.writes - lowest + 1, 0), table.size - 1)]) for rule in rules])
    _require_room_for_labels(rules, image.dtype)
    inside = np.zeros((len(rules), codes), bool)
    for index, rule in enumerate(rules):
        inside[index, 1:-1] = [set(inner.labels) <= set(rule.labels) for inner in rules]
    longest = max((step * size for step, size in zip(spacing_mm, image.shape, strict=True)), default=0.0) / 2
    return _Scheme(rules, morphology.regions, spacing_mm, longest, lowest, table, inside)


def _require_order(rules: Sequence[ClassRefinement], codes_written: Sequence[int]) -> None:
    """Refuse rules whose result could not be read back: overlaps in part, children painted over, foreign labels."""
    for index, rule in enumerate(rules):
        for earlier in rules[:index]:
            shared = set(rule.labels) & set(earlier.labels)
            if shared and not set(rule.labels) <= set(earlier.labels):
                raise UsageRefusal(
                    f"regions should be nested or apart and parents should come first, found {earlier.name!r} before "
                    f"{rule.name!r}; order the classes as in regions_class_order"
                )
        if codes_written[index] != index + 1:
            raise UsageRefusal(
                f"class {rule.name!r} should write a label of its own (and of no child), found {rule.writes}; "
                "change `writes` in the morphology file"
            )


def _require_room_for_labels(rules: Sequence[ClassRefinement], dtype: np.dtype) -> None:
    for rule in rules:
        if not np.iinfo(dtype).min <= rule.writes <= np.iinfo(dtype).max:
            raise UsageRefusal(f"label {rule.writes} should fit the segmentation, found {dtype}; convert it to int32")


def _codes(labels: np.ndarray, scheme: _Scheme) -> np.ndarray:
    if labels.dtype == np.uint8:
        return _codes(np.arange(256), scheme)[labels]
    first, last = scheme.lowest - 1, scheme.lowest + scheme.table.size - 2
    return scheme.table[np.clip(labels, *_representable(labels.dtype, first, last)).astype(np.int64) - first]


def _representable(dtype: np.dtype, first: int, last: int) -> tuple[int, int]:
    return max(first, int(np.iinfo(dtype).min)), min(last, int(np.iinfo(dtype).max))


def _encoded(image: np.ndarray, scheme: _Scheme) -> np.ndarray:
    codes = np.empty(image.shape, scheme.table.dtype)
    for planes in in_chunks(image.shape):
        codes[planes] = _codes(image[planes], scheme)
    return codes


def _decode(labels: np.ndarray, codes: np.ndarray, scheme: _Scheme) -> None:
    """Change the labels to those of the codes; a voxel whose code is that of its label keeps it."""
    writes = np.array([0, *(rule.writes for rule in scheme.rules), 0], labels.dtype)
    for planes in in_chunks(labels.shape):
        moved = _codes(labels[planes], scheme) != codes[planes]
        labels[planes][moved] = writes[codes[planes][moved]]


def _settled(codes: np.ndarray, scheme: _Scheme) -> np.ndarray:
    """Rounds until nothing changes, in the stages of the design note."""
    codes, found = _repeated(codes, scheme, rounds=ROUNDS)
    if not found:
        codes, _ = _repeated(codes, scheme, only_give_up=True)
        codes, _ = _repeated(codes, scheme)
    return codes


def _repeated(
    codes: np.ndarray, scheme: _Scheme, *, only_give_up: bool = False, rounds: float = math.inf
) -> tuple[np.ndarray, bool]:
    """Repeat one round; also says whether a fixed point was found before rounds ran out or an image recurred."""
    one_round = _round_of_regions if scheme.regions else _round_of_labels
    seen: set[bytes] = set()
    quiet = frozenset(index for index, rule in enumerate(scheme.rules) if not rule.operations)
    while len(seen) < rounds:
        codes, changed, quiet = one_round(codes, scheme, quiet, only_give_up)
        if not changed or len(quiet) == len(scheme.rules):
            return codes, True
        state = hashlib.blake2b(np.ascontiguousarray(codes).data).digest()
        if state in seen:
            return codes, False
        seen.add(state)
    return codes, False


def _round_of_labels(
    codes: np.ndarray, scheme: _Scheme, quiet: frozenset[int], only_give_up: bool
) -> tuple[np.ndarray, bool, frozenset[int]]:
    """All classes at once, from the same image: where each voxel goes is first written beside the codes.

    Args:
        codes: changed in place.
        scheme: of the call.
        quiet: classes whose operations are known to leave their present mask alone.
        only_give_up: no claims, and what is given up becomes background.

    Returns:
        The codes, whether any changed, and the classes that are quiet now.
    """
    change, boxes = np.zeros_like(codes), _boxes(codes, scheme)
    wishes = {
        index: _wish(codes[box], change[box], scheme, index, only_give_up)
        for index, box in enumerate(boxes)
        if box is not None and index not in quiet
    }
    for index, wish in wishes.items():
        if wish.claims and not wish.gives_up:
            box = boxes[index] or ()
            wishes[index] = _without_regret(codes[box], change[box], scheme, index, wish)
    if not only_give_up:
        for index, wish in wishes.items():
            if wish.gives_up:
                _find_homes(codes, change, scheme, index, boxes)
    changed, receivers, contested = _carry_out(codes, change, scheme)
    disturbed = {index for index, wish in wishes.items() if wish.refused or (contested and wish.claims)}
    disturbed |= {index for index, wish in wishes.items() if wish.changes and not _settles_at_once(scheme.rules[index])}
    loud = (receivers & {index for index, rule in enumerate(scheme.rules) if rule.operations}) | disturbed
    return codes, changed, frozenset(range(len(scheme.rules))) - loud


class _Wish(NamedTuple):
    """What a class's operations ask for in a round."""

    gives_up: bool
    claims: bool
    refused: bool

    @property
    def changes(self) -> bool:
        return self.gives_up or self.claims


def _wish(codes: np.ndarray, change: np.ndarray, scheme: _Scheme, index: int, only_give_up: bool) -> _Wish:
    """Run the class's operations in its box and note in ``change`` what it gives up and claims."""
    result = _result(codes == index + 1, scheme, index)
    wish = _Wish(False, False, False)
    for planes in in_chunks(codes.shape):
        here, there = codes[planes], change[planes]
        gives_up, added = (here == index + 1) & ~result[planes], (here != index + 1) & result[planes]
        claims = added & (here == 0) & (not only_give_up)
        contested = claims & (there != 0)
        there[claims] = index + 1
        there[gives_up | contested] = scheme.nowhere
        found = bool(gives_up.any()), bool(claims.any()), bool((added & ~claims).any())
        wish = _Wish(*(before or now for before, now in zip(wish, found, strict=True)))
    return wish


def _without_regret(codes: np.ndarray, change: np.ndarray, scheme: _Scheme, index: int, wish: _Wish) -> _Wish:
    """Withdraw the claims of a class if, having got them, it would give something up."""
    rule = scheme.rules[index]
    claims = change == index + 1
    if _only_adds(rule) or not (claims & (codes == 0)).any():
        return wish
    enlarged = claims | (codes == index + 1)
    if (_result(enlarged, scheme, index) | ~enlarged).all():
        return wish
    change[claims] = scheme.nowhere
    return wish._replace(claims=False, refused=True)


def _find_homes(
    codes: np.ndarray, change: np.ndarray, scheme: _Scheme, index: int, boxes: Sequence[Box | None]
) -> None:
    """Write in ``change`` which class each piece goes to that a class gives up."""
    wide = _widened(boxes[index] or ())
    if not any(_overlap(wide, box) for other, box in enumerate(boxes) if other != index and box is not None):
        return
    codes, change = codes[wide], change[wide]
    pieces = components((codes == index + 1) & (change != 0), by_faces=True)
    surfaces = _surfaces(pieces.labels, len(pieces.volumes), codes, change, scheme, index + 1)
    most = surfaces.max(1)
    is_clear = (surfaces == most[:, None]).sum(1) == 1
    homes = np.where(is_clear & (most > 0), surfaces.argmax(1), 0)
    homes = np.where(homes, homes, scheme.nowhere).astype(change.dtype)
    for planes in in_chunks(codes.shape):
        given = pieces.labels[planes] > 0
        change[planes][given] = homes[pieces.labels[planes][given]]


def _surfaces(
    pieces: np.ndarray, count: int, codes: np.ndarray, change: np.ndarray, scheme: _Scheme, own: int
) -> np.ndarray:
    """Faces that each piece shares with each code, where it is background or kept by another class."""
    surfaces = np.zeros((count + 1, scheme.other + 1), np.int64)
    for planes in in_chunks(pieces.shape):
        place = list(np.nonzero(pieces[planes]))
        place[0] = place[0] + planes.start
        piece = pieces[tuple(place)]
        for neighbours, inside in _neighbours(place, pieces.shape):
            code, moved = codes[neighbours], change[neighbours] != 0
            counts = (code == 0) | (~moved & (code != own) & (code != scheme.other))
            np.add.at(surfaces, (piece[inside][counts], code[counts]), 1)
    return surfaces


def _neighbours(place: list[np.ndarray], shape: Sequence[int]) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Face neighbours within the array, one direction after the other, and which voxels have them."""
    for axis, size in enumerate(shape):
        for step in (-1, 1):
            moved = place[axis] + step
            inside = (moved >= 0) & (moved < size)
            yield tuple((moved if k == axis else place[k])[inside] for k in range(len(shape))), inside


def _widened(box: Box) -> Box:
    """The box and its face neighbours."""
    return tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)


def _overlap(one: Box, other: Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def _carry_out(codes: np.ndarray, change: np.ndarray, scheme: _Scheme) -> tuple[bool, set[int], bool]:
    """Change the codes; says whether any did, which classes received pieces and whether a claim was contested."""
    changed, contested, receivers = False, False, set()
    for planes in in_chunks(codes.shape):
        here, there = codes[planes], change[planes]
        moved = there != 0
        if not moved.any():
            continue
        old, new = here[moved], there[moved]
        contested |= bool((new[old == 0] == scheme.nowhere).any())
        receivers |= {int(code) - 1 for code in np.unique(new[old != 0]) if code != scheme.nowhere}
        new[new == scheme.nowhere] = 0
        changed |= bool((new != old).any())
        here[moved] = new
    return changed, receivers, contested


def _round_of_regions(
    codes: np.ndarray, scheme: _Scheme, quiet: frozenset[int], only_give_up: bool
) -> tuple[np.ndarray, bool, frozenset[int]]:
    """Regions one by one, parents first, each painted over what its parent became; as :func:`_round_of_labels`."""
    painted = np.where(codes == scheme.other, codes, codes.dtype.type(0))
    boxes, loud = _boxes(codes, scheme), set()
    for index, rule in enumerate(scheme.rules):
        box = _hull([boxes[code] for code in np.flatnonzero(scheme.inside[index, 1:-1])])
        if box is None:
            continue
        mask = scheme.inside[index][codes[box]]
        result = mask if index in quiet else _result(mask, scheme, index)
        refined = _cut(mask, result, codes[box], painted[box], scheme, index, only_give_up)
        painted[box][refined] = index + 1
        unchanged = np.array_equal(result, mask) or _settles_at_once(rule)
        if rule.operations and not (unchanged and np.array_equal(refined, result)):
            loud.add(index)
    return painted, not np.array_equal(codes, painted), frozenset(range(len(scheme.rules))) - loud


def _cut(
    mask: np.ndarray,
    result: np.ndarray,
    codes: np.ndarray,
    painted: np.ndarray,
    scheme: _Scheme,
    index: int,
    only_give_up: bool,
) -> np.ndarray:
    """What a region may have of its result: inside its refined parent, and no claims on others."""
    parent, room = scheme.parent(index), scheme.room(index)
    refined = result & (mask | (room[codes] & room[painted] & (not only_give_up)))
    if parent is not None:
        refined &= scheme.inside[parent][painted]
    if _only_adds(scheme.rules[index]) or (mask & ~result).any() or not (refined & ~mask).any():
        return refined
    return refined if (_result(refined, scheme, index) | ~refined).all() else refined & mask


def _hull(boxes: Sequence[Box | None]) -> Box | None:
    """Smallest box around boxes."""
    sides = list(zip(*[box for box in boxes if box is not None], strict=True))
    return tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in sides) or None


def _boxes(codes: np.ndarray, scheme: _Scheme) -> list[Box | None]:
    found = ndimage.find_objects(codes, max_label=len(scheme.rules))
    return [tuple(box) if box is not None else None for box in found]


def _settles_at_once(rule: ClassRefinement) -> bool:
    """Whether a second run is sure to change nothing: each operation is idempotent, unless its radius moves along."""
    return not rule.operations or (
        len(rule.operations) == 1 and getattr(rule.operations[0], "inscribed_share", None) is None
    )


def _only_adds(rule: ClassRefinement) -> bool:
    return all(isinstance(operation, Closing | FillHoles) for operation in rule.operations)


def _result(mask: np.ndarray, scheme: _Scheme, index: int) -> np.ndarray:
    """The class after its operations, bool like the mask; the mask itself where nothing of it would be left."""
    result = mask
    for operation in scheme.rules[index].operations:
        result = _operated(operation, result, mask, scheme)
    return result if result is mask or (result & mask).any() else mask


def _operated(operation: Operation, mask: np.ndarray, original: np.ndarray, scheme: _Scheme) -> np.ndarray:
    match operation:
        case Opening():
            return _kept(operation, mask, opened(mask, _radius_mm(operation, original, scheme), scheme.spacing_mm))
        case Closing():
            return closed(mask, _radius_mm(operation, original, scheme), scheme.spacing_mm)
        case FillHoles():
            return mask | holes(mask, scheme.spacing_mm, operation.largest_mm3)
        case RemoveSmall() | KeepLargest():
            return _kept(operation, mask, _without_small(operation, mask, scheme))


def _kept(operation: Opening | RemoveSmall | KeepLargest, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What is left, unless that is too little."""
    kept = np.count_nonzero(after)
    return after if kept and kept >= operation.least_kept * np.count_nonzero(before) else before


def _radius_mm(ball: Opening | Closing, original: np.ndarray, scheme: _Scheme) -> float:
    if ball.radius_mm is not None:
        return min(ball.radius_mm, scheme.longest_radius_mm)
    return min((ball.inscribed_share or 0.0) * inscribed_radius(original, scheme.spacing_mm), scheme.longest_radius_mm)


def _without_small(operation: RemoveSmall | KeepLargest, mask: np.ndarray, scheme: _Scheme) -> np.ndarray:
    labels, volumes = components(mask)
    smallest = volumes.max()
    if isinstance(operation, RemoveSmall) and operation.below_share is not None:
        smallest = operation.below_share * smallest
    if isinstance(operation, RemoveSmall) and operation.below_mm3 is not None:
        smallest = operation.below_mm3 / math.prod(scheme.spacing_mm)
    stays = np.append(False, volumes >= smallest * (1 - VOLUME_TOLERANCE))
    return stays[labels] if stays.any() else mask
