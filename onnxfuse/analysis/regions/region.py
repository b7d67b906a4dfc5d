"""The record of a region, and its description in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnxfuse.analysis.regions.view import Shape
from onnxfuse.ir.nodes import Node
from onnxfuse.numerics.receptive_field import Geometry

RegionKind = Literal["conv", "dense", "flatten", "token"]


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes between u and v, and the affine operator that can stand for them.

    Attributes:
        nodes: the nodes inside, topologically ordered. Constants and shape computations that hang on other
            tensors are not among them; what nothing uses once the region is replaced, `Model.prune` drops.
        u, v: names of the tensors that enter and leave.
        kind: "conv": one Conv of strides `geometry.strides`, any kernel for which `geometry.pads_for` has
            pads; "dense": Gemm on (N, F); "token": MatMul and Add on the last axis of (..., F);
            "flatten": Flatten and Gemm, u of shape (N, C, *S) with fixed C and S.
        in_features, out_features: columns and rows of the operator; of "conv", channels.
        geometry: receptive field, strides, pads; None unless kind is "conv".
        linear_ops: number of linear operators with weights inside, at least 2.
        residual: a sum inside adds up branches with different linear operators: a skip, or a projected one.
        has_nonlinearity: whether anything inside is not affine.
        u_shape, v_shape: as far as known.
        sites: names of the linear operators inside.
        sides: other data tensors that enter (attention masks, shapes of tensors that don't depend on u); the
            replacement does without them.
    """

    nodes: tuple[Node, ...]
    u: str
    v: str
    kind: RegionKind
    in_features: int
    out_features: int
    geometry: Geometry | None
    linear_ops: int
    residual: bool
    has_nonlinearity: bool
    u_shape: Shape | None
    v_shape: Shape | None
    sites: tuple[str, ...]
    sides: tuple[str, ...] = ()


def site_name(node: Node) -> str:
    """The node's name, or its first output's where it has none."""
    return str(node.name or node.outputs[0].name)


def describe_region(region: Region) -> str:
    """One line for tables: `conv1..conv2 (2 Conv, skip) 16->16 s1 rf5`."""
    linear = [n for n in region.nodes if site_name(n) in region.sites]
    kinds = sorted({n.op for n in linear}, key=[n.op for n in linear].index)
    counts = [f"{sum(n.op == kind for n in linear)} {kind}" for kind in kinds]
    notes = ", ".join([*counts, *(["skip"] if region.residual else [])])
    text = f"{region.sites[0]}..{region.sites[-1]} ({notes}) {region.in_features}->{region.out_features}"
    if region.geometry is None:
        return f"{text} {region.kind}"
    return f"{text} s{_times(region.geometry.strides)} rf{_times(region.geometry.kernel)}"


def _times(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else "x".join(map(str, numbers))
