"""Views and flows: how a tensor of a region lies over its input (see `rules`)."""

from __future__ import annotations

import enum
from typing import NamedTuple

from onnxfuse.ir.shapes import AxisSize
from onnxfuse.numerics.receptive_field import WindowAxis
from onnxfuse.ops.table import OPS, Kind

Shape = tuple[AxisSize, ...]
Layout = tuple[str | int | None, ...]
COUNTING, DRAWING = OPS.of_kind(Kind.SHAPE), OPS.of_kind(Kind.RANDOM)
FOLDED_ELEMENTS = 2**16  # plumbing values are small; anything larger is not worth evaluating here


class DataView(enum.Enum):
    """The axes of a tensor inside a region as far as they are known (see `rules`)."""

    MAP = "map"
    SAMPLE = "sample"
    TOKEN = "token"
    SHAPE = "shape"


class Flow(NamedTuple):
    """A tensor inside a region as seen from u.

    Attributes:
        view: what is known of its axes.
        layout, axes: of a map, see `rules`.
        rank, features: of the tensor, where known.
        lost: of a sample, why it is no map.
        linears: bit i is set if the region's i-th linear operator is among its ancestors.
        tail: it is an affine function of a linear operator's output or a residual sum: it can be v.
        curved: something non-linear is among its ancestors.
        residual: branches with different linear operators are added up among its ancestors.
        scores: it holds attention scores or probabilities, where masks from outside may enter.
        aligned: of tokens, its leading axes are u's.
    """

    view: DataView
    layout: Layout = ()
    axes: tuple[WindowAxis, ...] = ()
    rank: int | None = None
    features: int | None = None
    lost: str = ""
    linears: int = 0
    tail: bool = False
    curved: bool = False
    residual: bool = False
    scores: bool = False
    aligned: bool = False


def map_flow(rank: int, features: int | None) -> Flow:
    """u as a map (N, C, *S)."""
    spatial = range(rank - 2)
    return Flow(DataView.MAP, ("N", "C", *spatial), tuple(WindowAxis() for _ in spatial), rank, features)


def token_flow(rank: int | None, features: int | None) -> Flow:
    """u as tokens (..., F)."""
    return Flow(DataView.TOKEN, rank=rank, features=features, aligned=True)
