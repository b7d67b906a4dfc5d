"""Putting one layer's channels in the order of another's: permutations that change no function.

Hidden channels have no order of their own. Two layers that do alike things may keep them in different
orders, and an average over channels that do not belong together is worth little. A permutation of a whole
channel group, producers and consumers alike, changes nothing (`take` with all indices once); which one brings
a layer nearest to another is an assignment problem (Ainsworth et al. 2023, Git Re-Basin, section 3.2). Where
a group lies on several of the weights that are compared, on the rows of one and the columns of the next, one
permutation has to serve them all: their similarities are summed, and groups are solved in turn until none
moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from onnxfuse.channels.groups import ChannelGroups, Group, Touch
from onnxfuse.ir.model import Model

SWEEPS = 8
"""Rounds over all groups at most; two or three do."""


@dataclass(frozen=True)
class _Bond:
    """Two axes that hold the channels of two groups: of a weight, and of the one to be brought near it."""

    anchor: str
    other: str
    theirs: Touch
    own: Touch


def align(model: Model, found: ChannelGroups, pairs: Sequence[tuple[str, str]]) -> dict[Group, np.ndarray]:
    """Permutations of groups that bring the second weight of each pair nearer to the first.

    Groups that lie on the first weight of any pair stay, and so do those that are frozen or whose channels
    are not one run.

    Args:
        model: that the groups were found in.
        found: them.
        pairs: names of weights of equal shape.

    Returns:
        For each group that moves, the old index at every place: a choice for `take`.
    """
    bonds = _bonds(found, pairs)
    weights = {name: _value(model, name) for pair in pairs for name in pair}
    order = {group: np.arange(group.size) for group in bonds}
    for _ in range(SWEEPS):
        moved = False
        for group, own in bonds.items():
            likeness = np.sum([_likeness(weights, bond) for bond in own], axis=0)
            _, best = linear_sum_assignment(-likeness)
            if np.array_equal(best, np.arange(group.size)):
                continue
            # Ties may move a group for ever: only what is nearer counts.
            gain = float(np.trace(likeness[:, best]) - np.trace(likeness))
            if gain <= 1e-9 * abs(float(np.trace(likeness))):
                continue
            moved = True
            order[group] = order[group][best]
            for name, touch in _lies_on(group, weights):
                weights[name] = _permuted(weights[name], touch, best)
        if not moved:
            break
    return {group: own for group, own in order.items() if not np.array_equal(own, np.arange(group.size))}


def _bonds(found: ChannelGroups, pairs: Sequence[tuple[str, str]]) -> dict[Group, list[_Bond]]:
    """The axes that each group that may move is compared on."""
    anchors, others = {anchor for anchor, _ in pairs}, {other for _, other in pairs}
    places: dict[tuple[str, int], list[Touch]] = {}
    movable: list[tuple[Group, Touch]] = []
    for group in found:
        own = [touch for touch in group.touches if touch.weight in others]
        for touch in group.touches:
            places.setdefault((touch.weight, touch.axis), []).append(touch)
        stays = group.frozen or len(group.leaves) > 1 or any(t.weight in anchors for t in group.touches)
        if not stays and len({touch.weight for touch in own}) == len(own):
            movable += ((group, touch) for touch in own)
    bonds: dict[Group, list[_Bond]] = {}
    for group, own_touch in movable:
        for anchor, other in pairs:
            for theirs in places.get((anchor, own_touch.axis), ()) if other == own_touch.weight else ():
                if np.array_equal(own_touch.map, theirs.map):
                    bonds.setdefault(group, []).append(_Bond(anchor, other, theirs, own_touch))
    return bonds


def _likeness(weights: Mapping[str, np.ndarray], bond: _Bond) -> np.ndarray:
    """The inner products (size, size) of the anchor's channels with the other's, relative to both norms."""
    a, b = (_channels(weights[name], t) for name, t in ((bond.anchor, bond.theirs), (bond.other, bond.own)))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return a @ b.T / norm if norm > 0 else np.zeros((len(a), len(b)))


def _channels(weight: np.ndarray, touch: Touch) -> np.ndarray:
    """The weight as (size, all elements of a channel)."""
    first = np.moveaxis(weight, touch.axis, 0)
    return first[touch.map].reshape(len(touch.map), -1)


def _permuted(weight: np.ndarray, touch: Touch, order: np.ndarray) -> np.ndarray:
    first = np.moveaxis(weight, touch.axis, 0).copy()
    first[touch.map] = first[touch.map[order]]
    return np.moveaxis(first, 0, touch.axis)


def _lies_on(group: Group, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Touch]]:
    return ((touch.weight, touch) for touch in group.touches if touch.weight in weights)


def _value(model: Model, name: str) -> np.ndarray:
    value = model.weight(model.tensor(name))
    assert value is not None
    return value.astype(np.float64)
