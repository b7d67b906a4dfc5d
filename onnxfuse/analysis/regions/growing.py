"""One growth of a region: from u forward, a node at a time, noting every v on the way.

Nodes reached from u form *parts*, one for each branch at first; a node that reads several parts merges them.
A part knows how many edges leave its tensors to nodes not yet reached. When the last node leaves a tensor t
whose edges are the only open ones, every path out of the part goes through t, so (u, t) has a single exit. A
node that cannot be inside (no rule, data from elsewhere) closes the parts it reads: a tensor leaves them
there. Other branches go on. So u may be used elsewhere too, as the skip of a U-net is. A growth ends after
`max_ops` linear operators or `max_nodes` nodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from onnxfuse.analysis.regions.facts import RegionNode
from onnxfuse.analysis.regions.indexed_graph import IndexedGraph, natural_view
from onnxfuse.analysis.regions.linear_rules import TRANSPARENT
from onnxfuse.analysis.regions.region import Region, RegionKind, site_name
from onnxfuse.analysis.regions.rules import apply_rule
from onnxfuse.analysis.regions.view import DataView, Flow, Layout, Shape, map_flow, token_flow
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.numerics.receptive_field import Geometry


@dataclass
class _Part:
    """A connected set of nodes reached from u, see the module's docstring.

    `gated`: all paths so far lead through one tensor w with no linear operator before it, so the region from
    w on is the same but for an activation.
    """

    nodes: list[int] = field(default_factory=list)
    open_edges: int = 0
    closed: str | None = None
    linears: int = 0
    gated: bool = False
    merged_into: _Part | None = None

    def root(self) -> _Part:
        part = self
        while part.merged_into is not None:
            part = part.merged_into
        return part

    def absorb(self, other: _Part) -> None:
        self.nodes += other.nodes
        self.open_edges += other.open_edges
        self.linears |= other.linears
        self.closed = self.closed or other.closed
        self.gated = False
        other.merged_into = self
        other.nodes = []


class RegionGrowth:
    """The growth of regions from one u (see the module's docstring)."""

    def __init__(
        self, graph: IndexedGraph, u: Tensor, view: DataView, *, max_ops: int, max_nodes: int
    ) -> None:
        """Nothing is reached yet.

        Args:
            graph: where the region grows.
            u: the tensor that enters.
            view: how u is looked at.
            max_ops: most linear operators in a region.
            max_nodes: most nodes in the growth.
        """
        self.graph = graph
        self.facts = graph.facts
        self.u = u
        self.view = view
        self.max_ops = max_ops
        self.max_nodes = max_nodes
        self.flows: dict[Tensor, Flow] = {}
        self.parts: dict[Tensor, _Part] = {}
        self.found: dict[Tensor, Region] = {}
        self.starts: list[int] = []
        self.blocked: dict[int, str] = {}  # linear operators that were reached in vain, and why
        self.bits = 0

    def run(self) -> None:
        readers = self.graph.readers(self.u)
        self.starts = [i for i in readers if self.starts_here(self.graph.nodes[i])]
        rank, features = self.graph.rank(self.u), self.features_of_u()
        if self.view is DataView.MAP:
            if rank is None or rank < 3:
                self.blame(self.starts, f"the rank of '{self.u.name}' is not known")
                return
            start = map_flow(rank, features)
        else:
            start = token_flow(rank, features)
        self.flows[self.u] = start
        queue = list(readers)
        waiting = set(queue)  # nodes that read u itself and were not reached yet
        heapq.heapify(queue)
        queued = set(queue)
        parts: list[_Part] = []
        reached = 0
        while queue and reached < self.max_nodes:
            index = heapq.heappop(queue)
            waiting.discard(index)
            reached += 1
            part = self.step(index)
            if part is not None:
                parts.append(part)
                for tensor in self.graph.nodes[index].outputs:
                    for reader in self.graph.readers(tensor):
                        if reader not in queued:
                            queued.add(reader)
                            heapq.heappush(queue, reader)
            if not waiting and all(p.root().gated or p.root().closed is not None for p in parts):
                break

    def starts_here(self, node: Node) -> bool:
        """Whether a linear operator reads u, in this growth's view."""
        return self.graph.is_linear(node) and natural_view(node) is self.view

    def features_of_u(self) -> int | None:
        """Size of u's feature axis, from its shape or else from the weight of an operator that reads it."""
        shape = self.facts.shape(self.u)
        axis = 1 if self.view is DataView.MAP else -1
        if shape and len(shape) > 1 and isinstance(shape[axis], int):
            return int(shape[axis] or 0) or None
        for index in self.graph.readers(self.u):
            node = self.graph.nodes[index]
            weight = (
                RegionNode(self.facts, node, []).constant_shape(1) if self.graph.is_linear(node) else None
            )
            if weight is None or node.inputs[0] is not self.u:
                continue
            if node.op == "Conv" and self.view is DataView.MAP:
                return weight[1] * int(node.attrs.get("group", 1))
            if node.op in ("Gemm", "MatMul") and self.view is DataView.TOKEN and len(weight) == 2:
                return weight[1] if node.attrs.get("transB", 0) else weight[0]
        return None

    def step(self, index: int) -> _Part | None:
        """Take one node in; its part, or None if it stays outside."""
        node = self.graph.nodes[index]
        inner = list(dict.fromkeys(t for t in node.inputs if t in self.parts))
        parts = list({id(p): p for p in (self.parts[t].root() for t in inner)}.values())
        for tensor in inner:
            self.parts[tensor].root().open_edges -= 1
        result = self.evaluate(node, parts)
        if result is None:
            return None
        if isinstance(result, str):
            reason = f"{node.label}: {result}" if result else ""
            if not parts and index in self.starts:
                self.blame([index], reason)
            for part in parts:
                self.close(part, reason)
            return None
        return self.admit(index, node, parts, result)

    def blame(self, indices: Iterable[int], reason: str) -> None:
        """Note why linear operators among these nodes are in no region, unless there is an earlier reason."""
        for index in indices:
            if reason and self.graph.is_linear(self.graph.nodes[index]):
                self.blocked.setdefault(index, reason)

    def close(self, part: _Part, reason: str) -> None:
        if part.closed is None:
            part.closed = reason
            self.blame(part.nodes, reason)

    def evaluate(self, node: Node, parts: Sequence[_Part]) -> list[Flow | None] | str | None:
        """Flows of the node's outputs; a reason for refusal; None for a shape computation outside."""
        if any(p.closed is not None for p in parts):
            return ""
        if all(self.facts.is_data_free(t) for t in node.outputs if t.name) and not node.bodies:
            shape = Flow(DataView.SHAPE, linears=0)
            return [shape] * len(node.outputs) if parts else None
        flows = [self.flows.get(t) if t.name else None for t in node.inputs]
        if not any(f is not None and f.view is not DataView.SHAPE for f in flows):
            return "" if not parts else "it uses the shape of an inner tensor as data"
        result = apply_rule(RegionNode(self.facts, node, flows, bit=1 << self.bits))
        if isinstance(result, str):
            return result
        for tensor, flow in zip(node.outputs, result, strict=False):
            if flow is None and self.is_used(tensor):
                return f"its output '{tensor.name}' is used"
        return result

    def is_used(self, tensor: Tensor) -> bool:
        return bool(tensor.name) and (bool(self.graph.readers(tensor)) or tensor.name in self.graph.outputs)

    def admit(self, index: int, node: Node, parts: Sequence[_Part], result: Sequence[Flow | None]) -> _Part:
        """The part that a node is in once it is taken in; regions that end at it are noted.

        Args:
            index, node: the node.
            parts: those it reads, which become one.
            result: the flows of its outputs.
        """
        part = parts[0] if parts else _Part()
        was_gated = part.gated and len(parts) == 1 and self.u not in node.inputs
        for other in parts[1:]:
            part.absorb(other)
        part.gated = was_gated
        part.nodes.append(index)
        linear = any(f is not None and f.linears & (1 << self.bits) for f in result)
        if linear:
            part.linears |= 1 << self.bits
            self.bits += 1
        live: list[tuple[Tensor, Flow]] = []
        for tensor, flow in zip(node.outputs, result, strict=False):
            if not tensor.name:
                continue
            self.parts[tensor] = part
            if flow is not None:
                self.flows[tensor] = flow
                part.open_edges += len(self.graph.readers(tensor))
                live.append((tensor, flow))
        self.consider(part, node, live)
        if part.linears.bit_count() > self.max_ops:
            self.close(part, "")
        for tensor, _ in live:
            if tensor.name in self.graph.outputs:
                self.close(part, f"'{tensor.name}' is an output of the graph")
            elif self.graph.model.captured(tensor):
                self.close(part, f"'{tensor.name}' is used by the body of another node")
        return part

    def consider(self, part: _Part, node: Node, live: Sequence[tuple[Tensor, Flow]]) -> None:
        """Note the region that ends at a node, if one does.

        Args:
            part: the node's.
            node: the last of the part.
            live: its outputs with their flows.
        """
        used = [(t, f) for t, f in live if self.is_used(t)]
        if len(used) != 1 or part.open_edges != len(self.graph.readers(used[0][0])):
            return
        tensor, flow = used[0]
        if not part.linears:
            only_transparent = all(self.graph.nodes[i].key in TRANSPARENT for i in part.nodes)
            part.gated = part.gated or not only_transparent
            return
        count = part.linears.bit_count()
        if part.gated or not flow.tail or count < 2 or count > self.max_ops:
            return
        region = self.region(part, tensor, flow)
        if isinstance(region, str):
            self.blame(part.nodes, region)
            return
        data = [t for t in node.inputs if t in self.flows and self.flows[t].view is not DataView.SHAPE]
        same = len(data) == 1 and self.flows[data[0]].linears == flow.linears
        if same and len(self.graph.readers(data[0])) == 1:
            # The bias, scale or BatchNorm of a linear operator takes the place of that operator's output.
            self.found.pop(data[0], None)
        self.found[tensor] = region

    def region(self, part: _Part, v: Tensor, flow: Flow) -> Region | str:
        """The region that ends at v, or why no affine operator of ours can stand for it.

        Args:
            part: its nodes.
            v: the tensor that leaves.
            flow: that of v.
        """
        kind = self.kind(v, flow)
        if isinstance(kind, _Reason):
            return kind.text
        u_shape, v_shape = self.facts.shape(self.u), self.facts.shape(v)
        inside = self.flows[self.u].features
        width = None if not v_shape else v_shape[1 if kind == "conv" else -1]
        outside = width if isinstance(width, int) else flow.features
        if kind == "flatten":
            inside = self.flat_size()
        if inside is None or outside is None:
            tensor = self.u if inside is None else v
            return f"the number of features of '{tensor.name}' is not known"
        order = sorted(part.nodes)
        nodes = tuple(self.graph.nodes[i] for i in order)
        return Region(
            nodes=nodes,
            u=self.u.name,
            v=v.name,
            kind=kind,
            in_features=inside,
            out_features=outside,
            geometry=Geometry.of(flow.axes) if kind == "conv" else None,
            linear_ops=part.linears.bit_count(),
            residual=flow.residual,
            has_nonlinearity=flow.curved,
            u_shape=u_shape,
            v_shape=v_shape,
            sites=tuple(site_name(n) for n in nodes if self.graph.is_linear(n)),
            sides=self.sides(nodes),
        )

    def kind(self, v: Tensor, flow: Flow) -> RegionKind | _Reason:
        start = self.flows[self.u]
        if flow.view is DataView.MAP:
            if _restored(flow.layout, start.layout) != start.layout:
                return _Reason(f"the axes of '{v.name}' are in another order than those of '{self.u.name}'")
            return "conv"
        if flow.view is DataView.SAMPLE:
            if flow.rank != 2:
                return _Reason(flow.lost)
            if self.flat_size() is None:
                return _Reason(f"'{self.u.name}' has a dynamic size, so it can't be flattened ({flow.lost})")
            return "flatten"
        u_shape, v_shape = self.facts.shape(self.u), self.facts.shape(v)
        if not _same_leading(u_shape, v_shape, flow.aligned):
            return _Reason(f"the leading axes of '{v.name}' may not be those of '{self.u.name}'")
        return "dense" if start.rank == 2 else "token"

    def flat_size(self) -> int | None:
        """Elements of one sample of u, if they are the same in every run."""
        sizes = [self.facts.static_size(self.u, axis) for axis in range(1, self.flows[self.u].rank or 0)]
        known = [s for s in sizes if s is not None]
        return math.prod(known) if known and len(known) == len(sizes) else None

    def sides(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """Tensors from outside, other than u and what depends on u and weights alone."""
        inside = {t for node in nodes for t in node.outputs}
        found: dict[str, None] = {}
        for tensor in (t for node in nodes for t in node.inputs if t.name):
            if not self.hangs_on(tensor, inside):
                found[tensor.name] = None
        return tuple(found)

    def hangs_on(self, tensor: Tensor, inside: set[Tensor]) -> bool:
        """Whether a tensor follows from u, the region's tensors and weights, as a shape of u does."""
        stack, seen = [tensor], {tensor}
        while stack:
            one = stack.pop()
            if one is self.u or one in inside or self.facts.is_constant(one):
                continue
            producer = self.graph.model.producer(one)
            if producer is None or not self.facts.is_data_free(one):
                return False
            fresh = [t for t in producer.inputs if t.name and t not in seen]
            seen.update(fresh)
            stack += fresh
        return True

    def regions(self) -> list[Region]:
        return list(self.found.values())


def _restored(layout: Layout, start: Layout) -> Layout:
    """The layout with axes of size 1 that were dropped and put back as what they were."""
    missing = iter([label for label in start if label not in layout])
    return tuple(next(missing, None) if label is None else label for label in layout)


@dataclass(frozen=True)
class _Reason:
    text: str


def _same_leading(u: Shape | None, v: Shape | None, aligned: bool) -> bool:
    """Whether all axes but the last are the same, as far as is known.

    Beside a name there may stand a size, from a run. Two names for one axis need `aligned`, the evidence of
    the operators in between; so do shapes that are not known at all.
    """
    if u is None or v is None:
        return aligned
    pairs = zip(u[:-1], v[:-1], strict=False)
    return len(u) == len(v) and all(
        a == b or type(a) is not type(b) or (aligned and isinstance(a, str)) for a, b in pairs
    )
