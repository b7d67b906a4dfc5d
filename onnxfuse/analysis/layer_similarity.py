"""Distances between the layers of a model that can be compared.

Layers are held against those of the same role, kernel and number of inputs: then the columns of their
matrices mean the same kind of thing. They need not have equally many rows where the criterion doesn't.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxfuse.analysis.weight_layers import WeightLayer, find_weight_layers, heads
from onnxfuse.ir.model import Model
from onnxfuse.numerics.similarity import Criterion, distance, needs_equal_rows

Distances = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Likeness:
    """Layers, or heads of them, and their distances from each other.

    Attributes:
        role: of all of them, as in `WeightLayer`; "heads" is added where they are heads.
        criterion: that of the distances.
        names: of the layers; heads are numbered in brackets.
        shapes: of their matrices.
        distances: by the criterion, in the order of the names; None where it can't compare.
    """

    role: str
    criterion: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    distances: Distances

    @property
    def title(self) -> str:
        """The role and the shape, rows first: "conv, 16 x 144"."""
        rows = sorted({shape[0] for shape in self.shapes})
        return f"{self.role}, {'/'.join(map(str, rows))} x {self.shapes[0][1]}"


def similarities(model: Model, criterion: Criterion, by_heads: bool, seed: int) -> tuple[Likeness, ...]:
    """Distances between all layers that have others to be compared with, in the order of the graph.

    Args:
        model: is left as it is.
        criterion: one of `numerics.similarity.CRITERIA`.
        by_heads: whether to take the layers of attentions apart into heads, where the graph tells them.
        seed: of the criterion.
    """
    classes: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}
    for layer in find_weight_layers(model)[0]:
        for role, name, matrix in _parts(model, layer, by_heads):
            op = layer.ops[0]
            key = role, op.groups > 1, op.kernel, matrix.shape[1]
            own = classes.setdefault(key, {})
            own[name if name not in own else f"{name}#{len(own) + 1}"] = matrix
    return tuple(
        Likeness(
            role=key[0],
            criterion=criterion,
            names=tuple(own),
            shapes=tuple(matrix.shape for matrix in own.values()),
            distances=_distances(list(own.values()), criterion, seed),
        )
        for key, own in classes.items()
        if len(own) > 1
    )


def _parts(model: Model, layer: WeightLayer, by_heads: bool) -> Iterator[tuple[str, str, np.ndarray]]:
    """Role, name and matrix of a layer, or of each of its heads.

    In a matrix that makes several parts, each part is a role of its own: which is which its rows don't say.
    """
    matrix = layer.matrix
    count = heads(model, layer) if by_heads else None
    if count is None:
        yield layer.role, layer.name, matrix
        return
    if layer.role == "output":
        for number, head in enumerate(np.split(matrix, count, axis=1)):
            yield "output heads", f"{layer.name}[{number}]", head
        return
    parts = layer.role.count("+") + 1
    for place, rows in enumerate(np.split(matrix, parts)):
        role = f"{layer.role} heads" + (f", part {place + 1} of {parts}" if parts > 1 else "")
        for number, head in enumerate(np.split(rows, count)):
            yield role, f"{layer.name}[{number}]", head


def _distances(matrices: list[np.ndarray], criterion: Criterion, seed: int) -> Distances:
    size = len(matrices)
    found: list[list[float | None]] = [[None] * size for _ in matrices]
    finite = [bool(np.isfinite(matrix).all()) for matrix in matrices]
    for i, a in enumerate(matrices):
        for j, b in enumerate(matrices[:i]):
            if finite[i] and finite[j] and (len(a) == len(b) or not needs_equal_rows(criterion)):
                found[i][j] = found[j][i] = distance(a, b, criterion, seed)
        found[i][i] = 0.0 if finite[i] else None
    return tuple(map(tuple, found))


def nearest_layers(likeness: Likeness, layer: int) -> list[tuple[float, int]]:
    """The other layers that a layer can be compared with, the nearest first: (distance, place) of each."""
    known = enumerate(likeness.distances[layer])
    return sorted((value, other) for other, value in known if value is not None and other != layer)


def shown(value: float | None) -> str:
    """A distance, in five characters where it is below 1e100."""
    if value is None:
        return "-"
    if value < 100:
        return f"{value:.2f}"
    return f"{value:.0f}" if value < 1e5 else f"{value:.0e}"
