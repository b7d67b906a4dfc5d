"""Axes as expressions over channels: the algebra of index maps.

An axis of a tensor is one of three things:

- a *leaf*: n channels that can be taken one by one;
- a *sum* of axes laid one after the other, as Concat and Split make them: position = offset + position in the
  part;
- a *product* of axes in row-major order, as Reshape and grouped convolutions make them: with two factors,
  position = outer * size of the inner + inner. Twelve heads of 64 are a product, a flattened feature map is
  channels x rows x columns, the four gates of an LSTM are a sum of four times the same leaf.

Two axes that an operator ties to each other are *unified*; what one of them is made of, the other then is
too, so a leaf may become a sum or a product later. All operators together are a system of equations, and
solving it is nothing but unification. What it leaves as leaves are the coupled channels of the network.

Everything else is evaluation. `indices` of an expression, given which channels of some leaves are kept (in
which order, how often), are the old positions on that axis in their new order; `length` is how many. One
function, for cutting, growing, duplicating and permuting, on every axis of every weight.

Sizes are those of one run: an axis whose size is not the same in every run is a leaf that is `dynamic`, and
frozen.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Sized

import numpy as np

Kept = Mapping["Axis", np.ndarray]
NOTHING_TAKEN: Kept = {}


class AxisKind(enum.Enum):
    """The kind of an axis: channels, or axes side by side or merged."""

    LEAF = "leaf"
    SUM = "sum"
    PRODUCT = "product"


class ClashError(Exception):
    """Two ways to divide one axis that have no common refinement."""


class Axis:
    """An axis, or a part of one. Unified axes are found through `find`; identity is what counts.

    Attributes:
        size: number of positions.
        frozen: why its channels can't be taken; only a leaf's counts.
        dynamic: its size differs from run to run; such a leaf is frozen.
        position: it counts places (rows, columns, time steps) that an operator slides over, not channels.
        channel: a linear operator computes or reads it by weights.
    """

    __slots__ = ("_kind", "_link", "_parts", "channel", "dynamic", "frozen", "position", "size")

    def __init__(
        self,
        size: int,
        *,
        frozen: str | None = None,
        dynamic: bool = False,
        position: bool = False,
        channel: bool = False,
    ) -> None:
        self.size = size
        self.frozen = frozen
        self.dynamic = dynamic
        self.position = position
        self.channel = channel
        self._link: Axis | None = None
        self._kind = AxisKind.LEAF
        self._parts: tuple[Axis, ...] = ()


def find(dim: Axis) -> Axis:
    """The dim that stands for all those unified with this one."""
    top = dim
    while top._link is not None:
        top = top._link
    while dim is not top:
        dim._link, dim = top, dim._link or top
    return top


def kind(dim: Axis) -> AxisKind:
    """The kind of an axis: a leaf, a sum or a product."""
    return find(dim)._kind


def parts(dim: Axis) -> list[Axis]:
    """The parts of a sum or product, in order, none of the same kind; a leaf has none."""
    dim = find(dim)
    found: list[Axis] = []
    stack = list(reversed(dim._parts))
    while stack:
        part = find(stack.pop())
        if part._kind is dim._kind:
            stack.extend(reversed(part._parts))
        else:
            found.append(part)
    dim._parts = tuple(found)
    return found


def leaves(dim: Axis) -> list[Axis]:
    """The leaves that an axis is made of, each once, in the order of their first place."""
    found: dict[Axis, None] = {}
    stack = [find(dim)]
    while stack:
        top = stack.pop()
        if top._kind is AxisKind.LEAF:
            found[top] = None
        else:
            stack.extend(reversed(parts(top)))
    return list(found)


def is_dynamic(dim: Axis) -> bool:
    """Whether its size differs from run to run."""
    return any(leaf.dynamic for leaf in leaves(dim))


def is_position(dim: Axis) -> bool:
    """Whether it counts nothing but places."""
    return all(leaf.position for leaf in leaves(dim))


def freeze_leaves(dim: Axis, reason: str) -> None:
    """No channel of it may be taken; the first reason stays."""
    for leaf in leaves(dim):
        leaf.frozen = leaf.frozen or reason


def mark_channel(dim: Axis) -> None:
    """Some linear operator's weights have this axis."""
    for leaf in leaves(dim):
        leaf.channel = True


# Building and dividing ----------------------------------------------------------------------------


def sum_of(dims: Sequence[Axis]) -> Axis:
    """The axes one after the other; those without any positions don't count."""
    dims = [d for d in dims if d.size]
    return _composite(AxisKind.SUM, dims, sum(d.size for d in dims))


def product_of(dims: Sequence[Axis]) -> Axis:
    """The axes merged in row-major order. A static axis of size 1 does not show in the product, so it can
    neither be cut nor grown any more."""
    visible = [d for d in dims if d.size != 1 or is_dynamic(d)]
    for dim in dims:
        if dim not in visible:
            freeze_leaves(dim, "an axis of size 1 is merged with others")
    if not visible:
        return Axis(1, frozen="a single index")
    return _composite(AxisKind.PRODUCT, visible, math.prod(d.size for d in visible))


def _composite(kind_: AxisKind, dims: Sequence[Axis], size: int) -> Axis:
    if len(dims) == 1:
        return find(dims[0])
    result = Axis(size)
    result._kind, result._parts = kind_, tuple(dims)
    return result


def _divide(leaf: Axis, kind_: AxisKind, sizes: Sequence[int]) -> list[Axis]:
    """A leaf becomes a sum or product of leaves like itself."""
    pieces = [
        Axis(s, frozen=leaf.frozen, dynamic=leaf.dynamic, position=leaf.position, channel=leaf.channel)
        for s in sizes
    ]
    leaf._kind, leaf._parts = kind_, tuple(pieces)
    return pieces


def segment(dim: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The axis as a sum of parts of these sizes (positive, together its own).

    Raises:
        ClashError: a boundary lies inside a row of a product.
    """
    dim = find(dim)
    if sum(sizes) != dim.size or min(sizes) < 1:
        raise ClashError(f"{dim.size} positions can't be split into {_listed(sizes)}")
    if len(sizes) == 1:
        return [dim]
    if dim._kind is AxisKind.LEAF:
        return _divide(dim, AxisKind.SUM, sizes)
    if dim._kind is AxisKind.PRODUCT:
        return _segment_product(dim, sizes)
    queue = parts(dim)[::-1]
    result = []
    for size in sizes:
        piece: list[Axis] = []
        while size:
            part = queue.pop()
            if part.size > size:
                part, rest = segment(part, [size, part.size - size])
                queue.append(rest)
            piece.append(part)
            size -= part.size
        result.append(sum_of(piece))
    return result


def _segment_product(dim: Axis, sizes: Sequence[int]) -> list[Axis]:
    outer, *rest = parts(dim)
    row = math.prod(d.size for d in rest)
    if any(size % row for size in sizes):
        raise ClashError(f"a split into {_listed(sizes)} does not fit blocks of {row}")
    return [product_of([piece, *rest]) for piece in segment(outer, [size // row for size in sizes])]


def factor(dim: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The axis as a product of factors of these sizes (together its own).

    Raises:
        ClashError: they don't fit the factors or parts it has already.
    """
    dim = find(dim)
    if math.prod(sizes) != dim.size:
        raise ClashError(f"{dim.size} positions can't be arranged as {_listed(sizes, ' x ')}")
    if 1 in sizes:
        visible = iter(factor(dim, [s for s in sizes if s != 1] or [dim.size]))
        return [Axis(1, frozen="a single index") if s == 1 else next(visible) for s in sizes]
    if len(sizes) == 1:
        return [dim]
    if dim._kind is AxisKind.LEAF:
        return _divide(dim, AxisKind.PRODUCT, sizes)
    if dim._kind is AxisKind.SUM:
        return _factor_sum(dim, sizes)
    queue = parts(dim)[::-1]
    result = []
    for size in sizes:
        piece: list[Axis] = []
        while size > 1:
            part = queue.pop()
            if part.size > size:
                if part.size % size:
                    raise ClashError(f"rows of {_listed(sizes, ' x ')} don't fit a factor of {part.size}")
                part, rest = factor(part, [size, part.size // size])
                queue.append(rest)
            elif size % part.size:
                raise ClashError(f"rows of {_listed(sizes, ' x ')} don't fit a factor of {part.size}")
            piece.append(part)
            size //= part.size
        result.append(product_of(piece))
    if queue:  # dynamic axes that had size 1 in the run
        result[-1] = product_of([result[-1], *queue[::-1]])
    return result


def _factor_sum(dim: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Rows of a sum: every part must be a whole number of rows, and all rows are alike."""
    row = dim.size // sizes[0]
    pieces = parts(dim)
    if any(part.size % row for part in pieces):
        raise ClashError(f"parts of {_listed([p.size for p in pieces])} are no whole rows of {row}")
    divided = [factor(part, [part.size // row, row]) for part in pieces]
    for _, inner in divided[1:]:
        unify(divided[0][1], inner)
    for outer, _ in divided:
        if outer.size == 1:
            freeze_leaves(outer, "one of several parts stacked on an axis of their own")
    return [sum_of([outer for outer, _ in divided]), *factor(divided[0][1], sizes[1:])]


def _listed(sizes: Iterable[int], between: str = " + ") -> str:
    return between.join(map(str, sizes))


# Solving ------------------------------------------------------------------------------------------


def unify(first: Axis, second: Axis) -> None:
    """Make two axes one from now on.

    Raises:
        ClashError: they can't be; some parts of them may have become the same nevertheless.
    """
    a, b = find(first), find(second)
    if a is b:
        return
    if a.size != b.size:
        raise ClashError(f"axes of {a.size} and {b.size} meet")
    if b._kind is AxisKind.LEAF:
        a, b = b, a
    if a._kind is AxisKind.LEAF:
        _bind(a, b)
        return
    if a._kind is AxisKind.PRODUCT and b._kind is AxisKind.SUM:
        a, b = b, a
    divide = segment if a._kind is AxisKind.SUM else factor
    ours = parts(a)
    theirs = divide(b, [part.size for part in ours])
    for x, y in zip(ours, theirs, strict=True):
        unify(x, y)
    a, b = find(a), find(b)
    if a is not b:
        a._link = b


def _bind(leaf: Axis, dim: Axis) -> None:
    if dim._kind is AxisKind.LEAF:
        dim.position = dim.position and leaf.position
    elif leaf in leaves(dim):
        raise ClashError("an axis is part of itself")
    leaf._link = dim
    for other in leaves(dim):
        other.frozen = other.frozen or leaf.frozen
        other.dynamic = other.dynamic or leaf.dynamic
        other.channel = other.channel or leaf.channel


def equal(first: Axis, second: Axis) -> bool:
    """Whether both are made of the same leaves in the same way."""
    a, b = find(first), find(second)
    if a is b:
        return True
    if a._kind is not b._kind or a._kind is AxisKind.LEAF or a.size != b.size:
        return False
    ours, theirs = parts(a), parts(b)
    return len(ours) == len(theirs) and all(map(equal, ours, theirs))


def crossed(dim: Axis) -> list[Axis]:
    """Leaves that a product has in more than one factor: rows and columns alike, as in x times its own
    transpose. Taking some of them is no rectangular cut of the axis in terms of one index."""
    found: list[Axis] = []
    stack = [find(dim)]
    while stack:
        top = stack.pop()
        if top._kind is AxisKind.LEAF:
            continue
        pieces = parts(top)
        stack.extend(pieces)
        if top._kind is AxisKind.PRODUCT:
            seen: set[Axis] = set()
            for piece in pieces:
                own = leaves(piece)
                found.extend(leaf for leaf in own if leaf in seen)
                seen.update(own)
    return found


def products(dim: Axis) -> set[frozenset[Axis]]:
    """The sets of leaves that are multiplied with each other, one for each product that the axis is a sum of;
    a leaf by itself is one."""
    dim = find(dim)
    if dim._kind is AxisKind.LEAF:
        return {frozenset((dim,))}
    own = [products(part) for part in parts(dim)]
    if dim._kind is AxisKind.SUM:
        return set().union(*own)
    return {frozenset[Axis]().union(*factors) for factors in itertools.product(*own)}


# Evaluating ---------------------------------------------------------------------------------------


def length(dim: Axis, kept: Mapping[Axis, Sized]) -> int:
    """Number of positions on the axis when of the leaves in `kept` these channels are taken."""
    dim = find(dim)
    if dim._kind is AxisKind.LEAF:
        return len(kept[dim]) if dim in kept else dim.size
    sizes = [length(part, kept) for part in parts(dim)]
    return sum(sizes) if dim._kind is AxisKind.SUM else math.prod(sizes)


def indices(dim: Axis, kept: Kept) -> np.ndarray:
    """Old positions on the axis in their new order, int64, when of the leaves in `kept` these channels are
    taken; all of the others."""
    dim = find(dim)
    if dim._kind is AxisKind.LEAF:
        return np.asarray(kept[dim], np.int64) if dim in kept else np.arange(dim.size)
    pieces = parts(dim)
    if dim._kind is AxisKind.SUM:
        offsets = np.cumsum([0, *(part.size for part in pieces[:-1])])
        moved = [indices(part, kept) + offset for part, offset in zip(pieces, offsets, strict=True)]
        return np.concatenate(moved)
    found = np.zeros(1, np.int64)
    for part in pieces:
        found = (found[:, None] * part.size + indices(part, kept)).reshape(-1)
    return found


def multiplicity(dim: Axis, leaf: Axis) -> int:
    """On how many positions of the axis each channel of a leaf lies."""
    dim, leaf = find(dim), find(leaf)
    if dim._kind is AxisKind.LEAF:
        return int(dim is leaf)
    own = [multiplicity(part, leaf) for part in parts(dim)]
    if dim._kind is AxisKind.SUM:
        return sum(own)
    return sum(m * dim.size // part.size for m, part in zip(own, parts(dim), strict=True))


def places(dim: Axis, leaf: Axis, kept: Kept = NOTHING_TAKEN) -> np.ndarray:
    """The index map of a leaf on an axis: int64 (indices, positions per index), each row ascending.

    Args:
        dim: the axis.
        leaf: one of its leaves.
        kept: channels taken of some leaves: the map after that. It has a row for each entry of `kept[leaf]`,
            so that two copies of one channel are told apart.
    """
    leaf = find(leaf)
    labels = _labels(dim, leaf, kept)
    order = np.argsort(labels, kind="stable")
    hits = order[np.count_nonzero(labels < 0) :]
    rows = length(leaf, kept)
    return hits.reshape(rows, hits.size // max(rows, 1))


def _labels(dim: Axis, leaf: Axis, kept: Kept) -> np.ndarray:
    """For each position the leaf's index there, or -1."""
    dim = find(dim)
    if dim._kind is AxisKind.LEAF:
        size = length(dim, kept)
        return np.arange(size) if dim is leaf else np.full(size, -1)
    labels = [_labels(part, leaf, kept) for part in parts(dim)]
    if dim._kind is AxisKind.SUM:
        return np.concatenate(labels)
    found = np.full(1, -1)
    for own in labels:
        found = np.maximum(found[:, None], own).reshape(-1)
    return found


def structure_text(dim: Axis, members: Sequence[Axis] = ()) -> str:
    """The structure in one line, the leaves among `members` in brackets: `[12] x 64`."""
    dim = find(dim)
    if dim._kind is AxisKind.LEAF:
        return f"[{dim.size}]" if dim in members else str(dim.size)
    texts = []
    for part in parts(dim):
        text = structure_text(part, members)
        texts.append(f"({text})" if part._kind is AxisKind.SUM else text)
    return (" + " if dim._kind is AxisKind.SUM else " x ").join(texts)
