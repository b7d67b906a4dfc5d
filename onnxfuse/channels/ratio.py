"""Widths at which every layer has lost the same share of its channels.

A layer's channels may lie in several groups: heads and what is in a head, the groups of a GroupNorm and the
channels of each, phases and maps of a pixel shuffle. It is their product that is to lose the share, once: a
quarter of the heads and a quarter of every head would be 44 %. Groups that are multiplied with each other are
a *block*. A block of one gets the candidate width that is nearest to the share. Of larger ones all
combinations of candidates are looked at; of those within a hundredth of the share, or else the nearest, the
one is taken that costs the readers least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.channels.dims import products
from onnxfuse.channels.groups import Group

SLACK = 0.01
"""Combinations whose products miss the share by no more than this share of the channels count as equal."""

MOST_COMBINATIONS = 1 << 18
"""Of blocks with more combinations of widths, only some widths, evenly spread, are looked at."""


@dataclass(frozen=True)
class Block:
    """Groups that are multiplied with each other, and the products that they are in (places in `groups`)."""

    groups: tuple[Group, ...]
    products: tuple[tuple[int, ...], ...]

    def sizes(self, widths: Mapping[Group, int]) -> list[int]:
        """The number of channels in each of the products, at these widths."""
        own = [widths[group] for group in self.groups]
        return [math.prod(own[place] for place in product) for product in self.products]


def blocks(groups: Sequence[Group]) -> list[Block]:
    """The groups in blocks, in order; what is no part of any of them counts as given."""
    owner = {leaf: group for group in groups for leaf in group.leaves}
    found: dict[frozenset[Group], None] = {}
    for dim in dict.fromkeys(touch.dim for group in groups for touch in group.touches):
        own = (frozenset(owner[leaf] for leaf in product if leaf in owner) for product in products(dim))
        found.update(dict.fromkeys(members for members in own if members))
    together = {group: {group} for group in groups}
    for members in found:
        whole = set().union(*(together[group] for group in members))
        together.update(dict.fromkeys(whole, whole))
    result = []
    for inside in {id(own): own for own in together.values()}.values():
        ordered = tuple(group for group in groups if group in inside)
        places = {group: place for place, group in enumerate(ordered)}
        multiplied = {tuple(sorted(places[group] for group in own)) for own in found if own <= inside}
        result.append(Block(ordered, tuple(sorted(multiplied))))
    return result


def at_share(
    block: Block, share: float, full: Mapping[Group, int], candidates: Mapping[Group, Sequence[int]]
) -> list[tuple[int, ...]]:
    """The widths of a block's groups at which its products are as near to a share as they can be, the nearest
    first; several are equally good.

    Args:
        block: the groups.
        share: of the channels that is to be left.
        full: of each group, the number of channels that the share is of.
        candidates: of each group, the widths that it may have, in descending order.
    """
    lists = _thinned([list(candidates[group]) for group in block.groups])
    axes = np.meshgrid(*(np.array(own, np.int64) for own in lists), indexing="ij")
    widths = np.stack([axis.reshape(-1) for axis in axes], axis=1)
    wholes = np.array(block.sizes(full), np.float64)
    left = np.stack([np.prod(widths[:, product], axis=1) for product in block.products], axis=1)
    off = np.abs(left - share * wholes).sum(axis=1)
    order = np.argsort(off, kind="stable")  # of equals the widest, as candidates descend
    if len(block.groups) == 1:
        order = order[:1]
    else:
        allowed = max(float(off[order[0]]), SLACK * float(wholes.sum()))
        order = order[off[order] <= allowed * (1 + 1e-12)]
    return [tuple(own) for own in widths[order].tolist()]


def _thinned(lists: list[list[int]]) -> list[list[int]]:
    most = int(MOST_COMBINATIONS ** (1 / len(lists)))
    if math.prod(map(len, lists)) <= MOST_COMBINATIONS:
        return lists
    return [
        own
        if len(own) <= most
        else [own[place] for place in np.linspace(0, len(own) - 1, most).round().astype(int)]
        for own in lists
    ]


@dataclass(frozen=True)
class Removed:
    """Channels that were there and those that are gone, over some products."""

    channels: int
    gone: int

    @property
    def share(self) -> float:
        """The share that is gone."""
        return self.gone / self.channels


def removed(own: Iterable[Block], full: Mapping[Group, int], widths: Mapping[Group, int]) -> Removed:
    """The channels that blocks lose, each of their products counted once.

    Args:
        own: the blocks.
        full: of each group, the number of channels before.
        widths: of each group, the number left.
    """
    before = after = 0
    for block in own:
        before += sum(block.sizes(full))
        after += sum(block.sizes(widths))
    return Removed(before, before - after)
