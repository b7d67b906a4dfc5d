"""Integers that grow by even steps along each axis, and views of flat tensors that are read by them.

Exporters write a view of a tensor (torch's as_strided) as a Gather of the flat one at computed places:
Range(samples) * 16 along one axis, 0 to 15 along another, added up. Where such places run through all of the
flat tensor in order, the Gather is a Reshape, whatever the number of samples. That is told from the steps
alone; the places themselves are never computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxfuse.channels.dims import Axis, is_dynamic
from onnxfuse.channels.lengths import Numbers
from onnxfuse.ir.nodes import Node

LARGEST_TABLE = 1 << 16
"""Elements of a stored table of places that is worth reading."""

GRID_OPERATORS = frozenset(("Range", "Identity", "Cast", "Unsqueeze", "Add", "Mul"))
"""Those, in ONNX's own domain, that `evaluate_grid` knows."""


@dataclass(frozen=True)
class Grid:
    """Integers start + i * steps[0] + j * steps[1] + ... at the place (i, j, ...).

    Attributes:
        start: the first.
        steps: along each axis.
        sizes: of the axes, in one run.
        tags: for each axis the one whose length it has; None for one of the same size in every run.
    """

    start: int
    steps: tuple[int, ...]
    sizes: tuple[int, ...]
    tags: tuple[Axis | None, ...]

    def counts(self, size: int) -> bool:
        """Whether it is 0, 1, 2, ... up to a size, in row-major order, in every run: of the axes of more than
        one place none but the first may differ from run to run."""
        wanted: int | None = 1
        for step, own, tag in reversed(_axes(self)):
            if own == 1 and tag is None:
                continue
            if step != wanted:
                return False
            wanted = wanted * own if tag is None else None
        return self.start == 0 and math.prod(self.sizes) == size


def of_table(value: np.ndarray) -> Grid | None:
    """The grid that stored integers are, None where they are none."""
    if value.dtype.kind not in "iu" or not 0 < value.size <= LARGEST_TABLE:
        return None
    start = int(value.flat[0])
    ends = [np.take(value, min(1, size - 1), axis).flat[0] for axis, size in enumerate(value.shape)]
    steps = tuple(int(end) - start for end in ends)
    made = np.array(start)
    for axis, step in enumerate(steps):
        places = step * np.arange(value.shape[axis])
        made = made + places.reshape(-1, *(1,) * (value.ndim - axis - 1))
    if not np.array_equal(np.broadcast_to(made, value.shape), value):
        return None
    return Grid(start, steps, value.shape, (None,) * value.ndim)


def evaluate_grid(node: Node, inputs: Sequence[Grid | None], known: Sequence[Numbers | None]) -> Grid | None:
    """The grid that a node computes, None where it computes something else.

    Args:
        node: of ONNX's own domain.
        inputs: its inputs, where they are grids.
        known: its inputs, where they are small tensors of numbers.
    """
    first = inputs[0] if inputs else None
    if node.op == "Range":
        return _range(known)
    if node.op in ("Identity", "Cast"):
        return first
    if first is None or (node.op != "Unsqueeze" and len(inputs) < 2):
        return None
    if node.op == "Unsqueeze":
        listed = known[1] if len(known) > 1 else None
        axes = node.attrs.get("axes") if listed is None else listed.value.reshape(-1).tolist()
        return None if axes is None else _unsqueezed(first, axes)
    second = inputs[1]
    if second is None:
        return None
    if node.op == "Add":
        return _sum(first, second)
    if node.op == "Mul":
        return _scaled(first, second) or _scaled(second, first)
    return None


def _range(known: Sequence[Numbers | None]) -> Grid | None:
    start, limit, delta = known
    if start is None or limit is None or delta is None or not (start.fixed and delta.fixed):
        return None
    if limit.value.dtype.kind not in "iu":
        return None
    begin, end, step = (int(own.value.reshape(())) for own in (start, limit, delta))
    tag = limit.tags.reshape(-1)[0]
    if tag is None or not any(map(is_dynamic, limit.depends())):
        return Grid(begin, (step,), (len(range(begin, end, step)),), (None,))
    plain = isinstance(tag, Axis) and begin == 0 and step == 1
    return Grid(0, (1,), (end,), (tag,)) if plain else None


def _unsqueezed(grid: Grid, axes: Sequence[int]) -> Grid:
    rank = len(grid.sizes) + len(axes)
    new = {axis % rank for axis in axes}
    own = iter(zip(grid.steps, grid.sizes, grid.tags, strict=True))
    made = [(0, 1, None) if axis in new else next(own) for axis in range(rank)]
    steps, sizes, tags = zip(*made, strict=True)
    return Grid(grid.start, steps, sizes, tags)


def _scaled(grid: Grid, factor: Grid) -> Grid | None:
    if math.prod(factor.sizes) != 1 or any(tag is not None for tag in factor.tags):
        return None
    wide = _broadcast(grid, len(factor.sizes))
    scale = factor.start
    return replace(wide, start=wide.start * scale, steps=tuple(step * scale for step in wide.steps))


def _sum(first: Grid, second: Grid) -> Grid | None:
    rank = max(len(first.sizes), len(second.sizes))
    one, two = _broadcast(first, rank), _broadcast(second, rank)
    axes = []
    for a, b in zip(_axes(one), _axes(two), strict=True):
        if b[1:] == (1, None):
            axes.append(a)
        elif a[1:] == (1, None):
            axes.append(b)
        elif a[1:] == b[1:]:
            axes.append((a[0] + b[0], *a[1:]))
        else:
            return None
    steps, sizes, tags = zip(*axes, strict=True) if axes else ((), (), ())
    return Grid(first.start + second.start, steps, sizes, tags)


def _axes(grid: Grid) -> list[tuple[int, int, Axis | None]]:
    return list(zip(grid.steps, grid.sizes, grid.tags, strict=True))


def _broadcast(grid: Grid, rank: int) -> Grid:
    """The grid with axes of size 1 before its own, up to a rank."""
    more = max(rank - len(grid.sizes), 0)
    return Grid(grid.start, (0,) * more + grid.steps, (1,) * more + grid.sizes, (None,) * more + grid.tags)
