"""Single-entry single-exit regions u -> v of a graph that one affine operator can stand for.

`u` is a tensor; `v` is a *pre-activation* tensor computed from it: the output of a linear operator, or of the
bias, BatchNorm, scale or residual sum behind it. Everything in between is used only in between. FuseInit
(Ghods et al., 2020) replaces two layers; any region will do, for the fit (its Theorem 1) needs nothing but
samples of u and v.

**Search.** From each candidate u a region grows forward in topological order (`growing`), up to a bounded
number of nodes, hence the search is linear in the size of the graph.

**Canonical regions.** u is the data input of a linear operator, or a tensor that several nodes read (where a
residual block starts); Identity and Dropout in front are passed over. A u whose region is the same as a later
tensor's, with only an activation in between, is left out. Of a linear operator's output and the tensors after
its bias, scale and BatchNorm, v is the last.

**Geometry** is carried along by the flows (`view`); `check.check_geometry` confirms it by running both the
region and its replacement.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxfuse.analysis.regions.growing import RegionGrowth
from onnxfuse.analysis.regions.indexed_graph import IndexedGraph, natural_view
from onnxfuse.analysis.regions.linear_rules import TRANSPARENT
from onnxfuse.analysis.regions.region import Region, site_name
from onnxfuse.analysis.regions.view import DataView
from onnxfuse.findings import Skip
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Tensor
from onnxfuse.ir.shapes import Shapes
from onnxfuse.ops.table import OPS, Kind

_COUNTING = OPS.of_kind(Kind.SHAPE)

NOTHING_FOLLOWS = "no linear operator follows that could end a region"


def find_regions(
    model: Model,
    shapes: Shapes | None = None,
    *,
    max_ops: int = 8,
    max_nodes: int = 512,
) -> tuple[list[Region], list[Skip]]:
    """All canonical regions that one affine operator can stand for, in topological order of u, then of v.

    Args:
        model: is not changed.
        shapes: of `runtime.observed_shapes.shapes_on`; None takes `Model.shapes()`, which may leave per-token
            regions with reshapes undecided.
        max_ops: most linear operators in a region.
        max_nodes: most nodes in a growth.

    Returns:
        The regions, nested and overlapping ones all listed, and for each linear operator that is in none of
        them a Skip with the reason.
    """
    graph = IndexedGraph(model, dict(shapes) if shapes is not None else model.shapes())
    return _Search(graph, max_ops, max_nodes).run()


class _Search:
    """The loop over the tensors at which a region may start."""

    def __init__(self, graph: IndexedGraph, max_ops: int, max_nodes: int) -> None:
        self.graph = graph
        self.max_ops = max_ops
        self.max_nodes = max_nodes

    def run(self) -> tuple[list[Region], list[Skip]]:
        regions: list[Region] = []
        own: dict[int, str] = {}
        reached: dict[int, str] = {}
        for u, views in self.candidates().items():
            for view in views:
                growth = RegionGrowth(self.graph, u, view, max_ops=self.max_ops, max_nodes=self.max_nodes)
                growth.run()
                regions += growth.regions()
                for start in growth.starts:
                    own[start] = growth.blocked.pop(start, NOTHING_FOLLOWS)
                for index, reason in growth.blocked.items():
                    reached.setdefault(index, reason)
        covered = {node for region in regions for node in region.nodes}
        skips = [
            Skip((site_name(node),), _reason(own.get(i), reached.get(i)))
            for i, node in enumerate(self.graph.nodes)
            if self.graph.is_linear(node) and node not in covered
        ]
        return regions, skips

    def candidates(self) -> dict[Tensor, list[DataView]]:
        """Tensors at which a region may start, in topological order, each with the views to try."""
        found: dict[Tensor, set[DataView]] = {}
        for node in self.graph.nodes:
            if self.graph.is_linear(node):
                found.setdefault(self.entrance(node.inputs[0]), set()).add(natural_view(node))
        for tensor in self.tensors():
            if len(self.data_readers(tensor)) > 1:
                flat = self.graph.rank(tensor) in (None, 1, 2)
                views = {DataView.TOKEN} if flat else {DataView.MAP, DataView.TOKEN}
                found.setdefault(self.entrance(tensor), set()).update(views)
        places = {t: self.place(t) for t in found if self.is_float(t)}
        ordered = sorted(places, key=lambda t: (places[t], t.name))
        return {t: [v for v in (DataView.MAP, DataView.TOKEN) if v in found[t]] for t in ordered}

    def tensors(self) -> Iterator[Tensor]:
        """Data tensors: the graph's inputs and the nodes' outputs."""
        for info in self.graph.model.inputs:
            yield self.graph.model.tensor(info.name)
        for node in self.graph.nodes:
            yield from (t for t in node.outputs if t.name and not self.graph.facts.is_data_free(t))

    def data_readers(self, tensor: Tensor) -> list[int]:
        return [i for i in self.graph.readers(tensor) if self.graph.nodes[i].key not in _COUNTING]

    def entrance(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or the one before Identity and Dropout."""
        producer = self.graph.model.producer(tensor)
        while producer is not None and producer.key in TRANSPARENT and tensor is producer.outputs[0]:
            tensor = producer.inputs[0]
            producer = self.graph.model.producer(tensor)
        return tensor

    def place(self, tensor: Tensor) -> int:
        producer = self.graph.model.producer(tensor)
        return -1 if producer is None else self.graph.index[producer]

    def is_float(self, tensor: Tensor) -> bool:
        info = self.graph.facts.shapes.get(tensor.name)
        return info is None or info.dtype is None or np.issubdtype(info.dtype, np.floating)


def _reason(own: str | None, reached: str | None) -> str:
    """Why a linear operator is in no region: as the first one of a region, and as a later one."""
    if own is None:
        return "the tensor that enters it is not of a floating-point type"
    return own if reached in (None, own) else f"{own}; in a region from further up: {reached}"
