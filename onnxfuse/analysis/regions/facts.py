"""The facts about tensors that rules of regions may ask for, and a node as these rules see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx.reference import ReferenceEvaluator

from onnxfuse.analysis.regions.view import COUNTING, DRAWING, FOLDED_ELEMENTS, DataView, Flow, Shape
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.numerics.receptive_field import WindowAxis, unite
from onnxfuse.ops.view import ModelNodeView


@dataclass
class GraphFacts:
    """A graph's shapes and constants, and which of its tensors hold no data.

    `shapes` is what is known of every tensor, a run's sizes included; `static` holds only sizes that are the
    same in every run. A tensor is `constant` if it depends on weights alone and `data_free` if it depends on
    weights and shapes alone. Built in one pass over the nodes.
    """

    model: Model
    shapes: dict[str, TensorInfo]
    static: dict[str, TensorInfo]
    constants: set[Tensor] = field(default_factory=set)
    data_free: set[Tensor] = field(default_factory=set)
    _values: dict[Tensor, np.ndarray | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.model.nodes:
            if node.bodies or node.key in DRAWING:
                continue
            inputs = [t for t in node.inputs if t.name]
            if all(self.is_constant(t) for t in inputs):
                self.constants.update(node.outputs)
                self.data_free.update(node.outputs)
            elif node.key in COUNTING or all(self.is_data_free(t) for t in inputs):
                self.data_free.update(node.outputs)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on weights alone."""
        return isinstance(tensor, Constant) or tensor in self.constants

    def is_data_free(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on weights and on shapes alone."""
        return isinstance(tensor, Constant) or tensor in self.data_free

    def shape(self, tensor: Tensor) -> Shape | None:
        """Shape with whatever is known, a run's sizes included."""
        info = self.shapes.get(tensor.name)
        return None if info is None else info.shape

    def static_size(self, tensor: Tensor, axis: int) -> int | None:
        """Size of an axis, the batch axis 0 excepted, if it is the same in every run."""
        info = self.static.get(tensor.name)
        if info is None or info.shape is None or not 0 < axis < len(info.shape):
            return None
        size = info.shape[axis]
        return size if isinstance(size, int) else None

    def value(self, tensor: Tensor) -> np.ndarray | None:
        """Value of a small tensor that depends on weights alone; None for others."""
        if tensor not in self._values:
            self._values[tensor] = self._evaluate(tensor)
        return self._values[tensor]

    def _evaluate(self, tensor: Tensor) -> np.ndarray | None:
        if not self.is_constant(tensor):
            return None
        if self.model.is_weight(tensor):
            shape = self.shape(tensor)
            if shape is not None and math.prod(d for d in shape if isinstance(d, int)) > FOLDED_ELEMENTS:
                return None
            return self.model.weight(tensor)
        node = self.model.producer(tensor)
        if node is None:
            return None
        feed = {t.name: self.value(t) for t in node.inputs if t.name}
        if any(v is None for v in feed.values()):
            return None
        names = [t.name for t in node.outputs]
        evaluator = ReferenceEvaluator(node.proto(self.model.opset), opsets={"": self.model.opset})
        try:
            return dict(zip(names, evaluator.run(None, feed), strict=False)).get(tensor.name)
        except Exception:  # the reference implementation lacks some types; then the value is simply not known
            return None


@dataclass
class RegionNode(ModelNodeView):
    """One node as a rule sees it: for each input, a flow if it depends on u through the region, else None.

    `bit` is the bit in `Flow.linears` that this node gets if it proves to be a linear operator.
    """

    facts: GraphFacts
    node: Node
    flows: Sequence[Flow | None]
    bit: int = 0

    @property
    def opset(self) -> int:
        return self.facts.model.opset

    def flow(self, index: int = 0) -> Flow | None:
        """Flow of a data input; None for one that carries shapes only."""
        found = self.flows[index] if index < len(self.flows) else None
        return None if found is None or found.view is DataView.SHAPE else found

    def data(self) -> list[Flow]:
        """Flows of all data inputs."""
        return [f for f in map(self.flow, range(len(self.flows))) if f is not None]

    def others(self) -> Iterator[tuple[int, Tensor]]:
        """Inputs that carry none of the region's data."""
        for index in range(len(self.node.inputs)):
            tensor = self.tensor(index)
            if tensor is not None and self.flow(index) is None:
                yield index, tensor

    def foreign(self, index: int, tensor: Tensor) -> bool:
        """Whether an input without the region's data carries some other data."""
        return self.flows[index] is None and not self.facts.is_data_free(tensor)

    def constant_shape(self, index: int) -> tuple[int, ...] | None:
        """Shape of a constant operand (a weight), None if it is not constant or its shape is unknown."""
        tensor = self.tensor(index)
        if tensor is None or not self.facts.is_constant(tensor):
            return None
        shape = self.facts.shape(tensor)
        if shape is None:
            value = self.facts.value(tensor)
            return None if value is None else value.shape
        ints = tuple(d for d in shape if isinstance(d, int))
        return ints if len(ints) == len(shape) else None

    def listed(self, slot: int, what: str) -> list[int] | None:
        tensor = self.tensor(slot)
        value = None if tensor is None else self.facts.value(tensor)
        return None if value is None else [int(v) for v in np.asarray(value).reshape(-1)]

    def axis_of(self, name: str, default: int, rank: int | None) -> int | None:
        """An axis attribute counted from the front; None if it is negative and the rank unknown.

        Args:
            name: the attribute.
            default: its value where it is not given.
            rank: of the tensor, None if unknown.
        """
        axis = int(self.attribute(name, default))
        if axis >= 0:
            return axis
        return None if rank is None else axis + rank


FlowResult = Flow | str | list[Flow | None]
RegionRule = Callable[[RegionNode], FlowResult]


@dataclass(frozen=True)
class Entry:
    """A rule, and whether the region's data may come in by every input or by the first alone."""

    rule: RegionRule
    every_input: bool = False


def sample(flow: Flow, reason: str, *, rank: int | None, curved: bool = False, tail: bool = False) -> Flow:
    """A flow with its geometry lost.

    Args:
        flow: that of the operand.
        reason: why it is lost.
        rank: of the result.
        curved: whether the operator is not affine.
        tail: whether the result can be v.
    """
    return flow._replace(
        view=DataView.SAMPLE,
        layout=(),
        axes=(),
        rank=rank,
        features=None,
        lost=flow.lost or reason,
        curved=flow.curved or curved,
        tail=tail,
    )


def join(flows: Sequence[Flow]) -> Flow | str:
    """The flow of tensors that meet element by element, or the reason why they can't meet."""
    first = flows[0]
    for second in flows[1:]:
        met = _meet(first, second)
        if isinstance(met, str):
            return met
        first = met
    return first


def _meet(a: Flow, b: Flow) -> Flow | str:
    known = [f for f in (a.features, b.features) if f is not None]
    ranks = [r for r in (a.rank, b.rank) if r is not None]
    both = a._replace(
        rank=max(ranks, default=None),
        features=max(known, default=None) if len(known) == 2 or max(known, default=0) > 1 else None,
        linears=a.linears | b.linears,
        curved=a.curved or b.curved,
        residual=a.residual or b.residual,
        scores=a.scores or b.scores,
        aligned=a.aligned or b.aligned,
        tail=False,
        lost=a.lost or b.lost,
    )
    if a.view is DataView.TOKEN:
        return both
    if a.rank is None or a.rank != b.rank:
        return "tensors of different ranks meet, the batch axis is not certain"
    if a.view is DataView.SAMPLE or b.view is DataView.SAMPLE:
        return sample(both, both.lost, rank=a.rank)
    if len(a.axes) != len(b.axes) or any(
        x != y and x is not None and y is not None for x, y in zip(a.layout, b.layout, strict=True)
    ):
        return sample(both, "tensors with different axis orders meet", rank=a.rank)
    axes = [unite(x, y) for x, y in zip(a.axes, b.axes, strict=True)]
    reason = next((x for x in axes if isinstance(x, str)), None)
    if reason is not None:
        return sample(both, reason, rank=a.rank)
    layout = tuple(y if x is None else x for x, y in zip(a.layout, b.layout, strict=True))
    return both._replace(layout=layout, axes=tuple(x for x in axes if isinstance(x, WindowAxis)))
