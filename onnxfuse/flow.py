"""How a tensor inside a region depends on the tensor that enters it, and what each operator does to that.

Regions are found by abstract interpretation: `u`, the tensor that enters, gets a `Flow`; each operator has a
rule that makes its outputs' flows from its inputs'; and what a tensor's flow says decides whether it can be
`v`. There are three views of the data, chosen at `u`:

- a *map* (N, C, *S): the tensor's axes are known one by one (`layout`: "N", "C", the number of a spatial
  axis, or None for an axis of size 1 that some Unsqueeze made), and each spatial axis has its window on u
  (`axes`, see `geometry`). Transposes to channels-last, a MatMul on the channel axis, a LayerNorm over
  channels are all fine.
- a *sample*: what a map becomes where its geometry is lost (flattened, pooled over the whole image). Only the
  batch axis is still known, as axis 0. A fully connected operator on the flattened u can stand for it.
- *tokens* (..., F): features on the last axis. Everything may happen in between, mixing of tokens included,
  for the fit is per token; `aligned` says that the leading axes are still u's, else shapes have to tell.

Rules are data: `RULES` has the rules by operator. A rule returns flows, or the reason why the operator
cannot be inside a region. An operator without a rule ends every region; nothing is guessed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator

from onnxfuse.geometry import Axis, unite, window
from onnxfuse.graph import Model
from onnxfuse.ir import Constant, Node, Tensor
from onnxfuse.ops.facet import Facet, keyed
from onnxfuse.ops.table import OPS, Kind, Op, Trait
from onnxfuse.ops.view import ModelNodeView
from onnxfuse.shapes import Dim, TensorInfo

Shape = tuple[Dim, ...]
Layout = tuple[str | int | None, ...]
UNBOUNDED = 2**31 - 1  # a Slice end of this size or more means "to the end"
_COUNTING, _DRAWING = OPS.of_kind(Kind.SHAPE), OPS.of_kind(Kind.RANDOM)
FOLDED_ELEMENTS = 2**16  # plumbing values are small; anything larger is not worth evaluating here


class View(enum.Enum):
    """What is known of the axes of a tensor inside a region."""

    MAP = "map"
    SAMPLE = "sample"
    TOKEN = "token"
    SHAPE = "shape"


@dataclass(frozen=True)
class Flow:
    """A tensor inside a region as seen from u.

    Attributes:
        view: what is known of its axes.
        layout, axes: of a map, see the module's docstring.
        rank, features: of the tensor, where known.
        lost: of a sample, why it is no map.
        linears: bit i is set if the region's i-th linear operator is among its ancestors.
        tail: it is an affine function of a linear operator's output or a residual sum: it can be v.
        curved: something non-linear is among its ancestors.
        residual: branches with different linear operators are added up among its ancestors.
        scores: it holds attention scores or probabilities, where masks from outside may enter.
        aligned: of tokens, its leading axes are u's.
    """

    view: View
    layout: Layout = ()
    axes: tuple[Axis, ...] = ()
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
    return Flow(View.MAP, ("N", "C", *spatial), tuple(Axis() for _ in spatial), rank, features)


def token_flow(rank: int | None, features: int | None) -> Flow:
    """u as tokens (..., F)."""
    return Flow(View.TOKEN, rank=rank, features=features, aligned=True)


@dataclass
class Facts:
    """What rules may ask about a graph: shapes, constants, and which tensors hold no data.

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
            if node.bodies or node.key in _DRAWING:
                continue
            inputs = [t for t in node.inputs if t.name]
            if all(self.is_constant(t) for t in inputs):
                self.constants.update(node.outputs)
                self.data_free.update(node.outputs)
            elif node.key in _COUNTING or all(self.is_data_free(t) for t in inputs):
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

    facts: Facts
    node: Node
    flows: Sequence[Flow | None]
    bit: int = 0

    @property
    def opset(self) -> int:
        return self.facts.model.opset

    def flow(self, index: int = 0) -> Flow | None:
        """Flow of a data input; None for one that carries shapes only."""
        found = self.flows[index] if index < len(self.flows) else None
        return None if found is None or found.view is View.SHAPE else found

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
        """An axis attribute counted from the front; None if it is negative and the rank unknown."""
        axis = int(self.attribute(name, default))
        if axis >= 0:
            return axis
        return None if rank is None else axis + rank


Result = Flow | str | list[Flow | None]
RegionRule = Callable[[RegionNode], Result]


@dataclass(frozen=True)
class Entry:
    """A rule, and whether the region's data may come in by every input or by the first alone."""

    rule: RegionRule
    every_input: bool = False


def sample(flow: Flow, reason: str, *, rank: int | None, curved: bool = False, tail: bool = False) -> Flow:
    """The flow with its geometry lost, for a reason."""
    return replace(
        flow,
        view=View.SAMPLE,
        layout=(),
        axes=(),
        rank=rank,
        features=None,
        lost=flow.lost or reason,
        curved=flow.curved or curved,
        tail=tail,
    )


def join(flows: Sequence[Flow]) -> Flow | str:
    """Tensors that meet element by element, as one flow, or the reason why they can't meet."""
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
    both = replace(
        a,
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
    if a.view is View.TOKEN:
        return both
    if a.rank is None or a.rank != b.rank:
        return "tensors of different ranks meet, the batch axis is not certain"
    if a.view is View.SAMPLE or b.view is View.SAMPLE:
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
    return replace(both, layout=layout, axes=tuple(x for x in axes if isinstance(x, Axis)))


# Element-wise operators ---------------------------------------------------------------------------

_POINTWISE = OPS.of_kind(Kind.ACTIVATION, Kind.ELEMENTWISE)
AFFINE = _POINTWISE.having(Trait.AFFINE)
SCALING = _POINTWISE.having(Trait.SCALES)
CURVED = _POINTWISE - AFFINE - SCALING
TRANSPARENT = _POINTWISE.having(Trait.SAME_ELEMENTS)
_SUMS = AFFINE - AFFINE.unary()
_MASKING = {"Add", "Sub", "Mul", "Where", "Min", "Max"}  # by which masks of attention scores come in


def _pointwise(site: RegionNode) -> Result:
    """Operators that work element by element, with constants and with other tensors of the region."""
    op, key = site.op, site.key
    if op == "Dropout" and not _inference(site):
        return "Dropout in training mode"
    flows = site.data()
    met = join(flows)
    if isinstance(met, str):
        return met
    operands = list(site.others())
    for index, tensor in operands:
        if site.foreign(index, tensor) and not (met.scores and op in _MASKING):
            return f"'{tensor.name}' enters from outside"
        fitted = _broadcast(site, met, tensor)
        if isinstance(fitted, str):
            return fitted
        met = fitted
    alone = len(flows) == 1
    scaled = key in SCALING and alone and (op == "Mul" or site.flow(0) is not None)
    affine = key in AFFINE or scaled
    branched = key in _SUMS and len({f.linears for f in flows}) > 1
    return replace(
        met,
        tail=affine and (branched or all(f.tail for f in flows)),
        curved=met.curved or not affine,
        residual=met.residual or branched,
    )


def _inference(site: RegionNode) -> bool:
    tensor = site.tensor(2)
    value = False if tensor is None else site.facts.value(tensor)
    return value is not None and not bool(np.any(value))


def _broadcast(site: RegionNode, flow: Flow, operand: Tensor) -> Flow | str:
    """The flow after an element-wise operator with an operand that carries none of its data."""
    shape = site.facts.shape(operand)
    if flow.view is View.TOKEN:
        longer = shape is None or flow.rank is None or len(shape) > flow.rank
        last = shape[-1] if shape else 1
        wider = isinstance(last, int) and flow.features is not None and last > flow.features
        features = last if wider and isinstance(last, int) else flow.features
        return replace(flow, features=features, aligned=flow.aligned and not (longer and shape != ()))
    if shape is None:
        return f"the shape of '{operand.name}' is not known"
    if flow.rank is None or len(shape) > flow.rank:
        return f"'{operand.name}' has more axes than the tensor it meets"
    offset = flow.rank - len(shape)
    sizes = {offset + i: d for i, d in enumerate(shape) if d != 1}
    if 0 in sizes and (flow.view is View.SAMPLE or flow.layout[0] == "N"):
        return f"'{operand.name}' differs from sample to sample of a batch"
    if flow.view is View.SAMPLE:
        return flow
    features = flow.features
    for axis, size in sizes.items():
        label = flow.layout[axis]
        if label == "C":
            features = size if isinstance(size, int) and features in (1, size) else features
        elif label in ("N", None):
            return f"'{operand.name}' widens an axis of size 1"
        elif not isinstance(size, int) or _static_of(site, flow, axis) not in (None, size):
            return f"'{operand.name}' widens a spatial axis"
    return replace(flow, features=features)


def _static_of(site: RegionNode, flow: Flow, axis: int) -> int | None:
    """Static size of an axis of the site's data input that has the flow's rank."""
    for index, tensor in enumerate(site.node.inputs):
        found = site.flow(index)
        if found is not None and found.rank == flow.rank:
            return site.facts.static_size(tensor, axis)
    return None


# Linear operators ---------------------------------------------------------------------------------


def _linear(site: RegionNode, flow: Flow, **changes: Any) -> Flow:
    return replace(flow, linears=flow.linears | site.bit, tail=True, **changes)


def _conv(site: RegionNode) -> Result:
    flow, weight = site.flow(), site.constant_shape(1)
    if flow is None or weight is None:
        return "its weights are not constant"
    if flow.view is View.TOKEN:
        return "a convolution among per-token operators"
    if flow.view is View.SAMPLE:
        return _linear(site, sample(flow, flow.lost, rank=flow.rank), features=weight[0])
    kernel = list(site.attribute("kernel_shape", weight[2:]))
    windowed = _windowed(site, flow, kernel)
    return windowed if isinstance(windowed, str) else _linear(site, windowed, features=weight[0])


def _windowed(site: RegionNode, flow: Flow, kernel: Sequence[int]) -> Flow | str:
    """The flow after a Conv or pooling: one more window on every spatial axis."""
    if flow.layout[:2] != ("N", "C") or len(flow.layout) != len(kernel) + 2:
        return "its input is not laid out as (N, C, spatial...) of the tensor that enters"
    count = len(kernel)
    strides = site.attribute("strides") or [1] * count
    dilations = site.attribute("dilations") or [1] * count
    pads = site.attribute("pads") or [0] * (2 * count)
    axes = list(flow.axes)
    for i, label in enumerate(flow.layout[2:]):
        step = window(
            kernel[i],
            strides[i],
            dilations[i],
            pads[i],
            pads[i + count],
            auto_pad=site.attribute("auto_pad", "NOTSET"),
            ceil_mode=bool(site.attribute("ceil_mode", 0)),
            size=site.facts.static_size(site.node.inputs[0], i + 2),
        )
        if isinstance(step, str):
            return step
        if isinstance(label, int):
            axes[label] = axes[label].then(step)
        elif step.size(1) != 1:
            return "it changes an axis of size 1 that is not the entering tensor's"
    return replace(flow, axes=tuple(axes))


def _matmul(site: RegionNode) -> Result:
    left, right = site.flow(0), site.flow(1)
    if left is not None and right is not None:
        return _product(left, right)
    if left is None:
        return _mixing(site, right) if right is not None else "no data enters"
    weight = site.constant_shape(1)
    if weight is None:
        return "its weights are not constant"
    if len(weight) != 2:
        return "its weight is not a matrix"
    if left.view is View.MAP and left.layout[-1] != "C":
        left = sample(left, "a MatMul over another axis than channels", rank=left.rank)
    if left.view is View.SAMPLE and (left.rank is None or left.rank < 2):
        return "a MatMul over the batch axis"
    return _linear(site, left, features=weight[1])


def _product(left: Flow, right: Flow) -> Result:
    """A product of two tensors of the region: attention scores, or probabilities times values."""
    union = replace(left, linears=left.linears | right.linears, tail=False, curved=True)
    if left.view is View.TOKEN:
        scores = not (left.scores or right.scores)
        return replace(union, features=right.features, aligned=False, scores=scores)
    if left.rank is None or left.rank != right.rank or left.rank < 3:
        return "a product whose batch axis is not certain"
    return sample(union, "a product of two tensors mixes positions", rank=left.rank)


def _mixing(site: RegionNode, flow: Flow) -> Result:
    """A constant matrix from the left mixes tokens or positions."""
    weight = site.constant_shape(0)
    if weight is None:
        return "its weights are not constant"
    if flow.rank is None or flow.rank < 3 or len(weight) > 2:
        return "a constant matrix mixes the samples of a batch"
    if flow.view is View.TOKEN:
        return replace(flow, aligned=False, tail=False)
    return sample(flow, "a constant matrix mixes positions", rank=flow.rank)


def _gemm(site: RegionNode) -> Result:
    flow, weight = site.flow(), site.constant_shape(1)
    if flow is None or weight is None or len(weight) != 2:
        return "its weights are not constant"
    if site.attribute("transA", 0):
        return "it transposes its input"
    if flow.view is View.MAP:
        return "its input is a feature map"
    return _linear(site, flow, features=weight[0] if site.attribute("transB", 0) else weight[1])


def _einsum(site: RegionNode) -> Result:
    """Einsum as per-token models use it: with a weight it is linear, of two tensors it is a product."""
    flows = site.data()
    if any(f.view is not View.TOKEN for f in flows):
        return "Einsum on a feature map"
    if len(flows) == 2:
        return _product(*flows)
    if len(site.node.inputs) != 2 or any(not site.facts.is_constant(t) for _, t in site.others()):
        return "its weights are not constant"
    return _linear(site, flows[0], features=None, rank=None, aligned=False)


def _attention(site: RegionNode) -> Result:
    """ONNX Attention: queries, keys and values from the region, a mask from anywhere, no cache."""
    if any(site.flow(i) is None for i in range(3)) or any(site.tensor(i) is not None for i in (4, 5)):
        return "attention with keys, values or a cache from outside"
    met = join(site.data()[:3])
    if isinstance(met, str) or met.view is not View.TOKEN:
        return "attention on a feature map"
    return replace(met, tail=False, curved=True, aligned=False, scores=False)


# Pooling, normalisation, reduction ----------------------------------------------------------------


_AVERAGING = OPS.of_kind(Kind.POOL, Kind.REDUCE).having(Trait.AFFINE)
_SOFTMAX = OPS.of_kind(Kind.SOFTMAX)


def _pool(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    if flow.view is View.TOKEN:
        return "a pooling among per-token operators"
    curved = site.key not in _AVERAGING
    if flow.view is View.SAMPLE:
        return sample(flow, flow.lost, rank=flow.rank, curved=curved)
    windowed = _windowed(site, flow, list(site.attribute("kernel_shape", ())))
    if isinstance(windowed, str):
        return windowed
    return replace(windowed, tail=False, curved=flow.curved or curved)


def _global(site: RegionNode) -> Result:
    """Operators that take in the whole image: no window, but a sample all the same."""
    flow = site.flow()
    assert flow is not None
    if flow.view is View.TOKEN:
        return f"{site.node.op} among per-token operators"
    curved = site.key not in _AVERAGING
    return sample(flow, f"{site.node.op} takes in the whole image", rank=flow.rank, curved=curved)


def _batch_normalization(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    if site.attribute("training_mode", 0):
        return "BatchNormalization in training mode"
    if flow.view is View.MAP and flow.layout[1] != "C":
        return "BatchNormalization over another axis than channels"
    return flow


def _over_axis(site: RegionNode) -> Result:
    """Softmax and LayerNormalization: one axis, or all from it on, seen together."""
    flow = site.flow()
    assert flow is not None
    op = site.node.op
    coerced = site.key in _SOFTMAX and site.opset < 13
    default = 1 if coerced else -1
    axis = site.axis_of("axis", default, flow.rank)
    if flow.view is View.TOKEN:
        return replace(flow, curved=True, tail=False)
    if axis is None or axis == 0:
        return f"{op} over the batch axis"
    onwards = coerced or op.endswith("LayerNormalization")
    labels = flow.layout[axis:] if onwards else flow.layout[axis : axis + 1]
    if flow.view is View.MAP and all(label in ("C", None) for label in labels):
        return replace(flow, curved=True, tail=False)
    return sample(flow, f"{op} takes in the whole image", rank=flow.rank, curved=True)


def _across_channels(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    if flow.view is View.MAP and flow.layout[1] != "C":
        return f"{site.node.op} over another axis than channels"
    return replace(flow, curved=True, tail=False)


def _reduce(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    op = site.node.op
    curved = site.key not in _AVERAGING
    axes = site.integers(1, "axes")
    if flow.view is View.TOKEN:
        last = axes is not None and (axes == [-1] or (flow.rank is not None and axes == [flow.rank - 1]))
        kept = bool(site.attribute("keepdims", 1))
        rank = None if flow.rank is None or axes is None else flow.rank - (0 if kept else len(axes))
        aligned = flow.aligned and last and kept
        return replace(
            flow,
            curved=flow.curved or curved,
            tail=False,
            aligned=aligned,
            rank=rank,
            features=1 if kept else None,
        )
    if axes is None or flow.rank is None:
        return f"{op} over the batch axis"
    axes = [a % flow.rank for a in axes]
    if 0 in axes or not axes:
        return f"{op} over the batch axis"
    kept = bool(site.attribute("keepdims", 1))
    if flow.view is View.MAP and kept and all(flow.layout[a] in ("C", None) for a in axes):
        features = 1 if any(flow.layout[a] == "C" for a in axes) else flow.features
        return replace(flow, curved=flow.curved or curved, tail=False, features=features)
    rank = flow.rank if kept else flow.rank - len(axes)
    return sample(flow, f"{op} takes in the whole image", rank=rank, curved=curved)


# Axes moved, cut and joined -----------------------------------------------------------------------


_LINEAR_DEFAULTS = {
    **dict.fromkeys((Kind.ACTIVATION, Kind.ELEMENTWISE), Entry(_pointwise, every_input=True)),
    Kind.REDUCE: Entry(_reduce),
    Kind.SOFTMAX: Entry(_over_axis),
}
_LINEAR_RULES = {
    "Conv": Entry(_conv),
    "MatMul": Entry(_matmul, every_input=True),
    "Gemm": Entry(_gemm),
    "Einsum": Entry(_einsum, every_input=True),
    "Attention": Entry(_attention, every_input=True),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), Entry(_pool)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), Entry(_global)),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), Entry(_global)),
    "BatchNormalization": Entry(_batch_normalization),
    **dict.fromkeys(("LpNormalization", "LayerNormalization", "RMSNormalization"), Entry(_over_axis)),
    "com.microsoft::LayerNormalization": Entry(_over_axis),
    "SimplifiedLayerNormalization": Entry(_over_axis),
    "LRN": Entry(_across_channels),
}


def _transpose(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    perm = site.attribute("perm")
    if flow.view is View.TOKEN:
        same_last = perm is not None and perm[-1] == len(perm) - 1
        return replace(flow, aligned=False, features=flow.features if same_last else None)
    if perm is None or flow.rank is None or perm[0] != 0:
        return "a Transpose moves the batch axis"
    if flow.view is View.SAMPLE:
        return flow
    return replace(flow, layout=tuple(flow.layout[p] for p in perm))


def _reshape(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    source = site.facts.shape(site.node.inputs[0])
    result = site.facts.shape(site.node.outputs[0])
    target = site.integers(1, "shape")
    if flow.view is View.TOKEN:
        rank = len(target) if target is not None else None if result is None else len(result)
        last = (target or [0])[-1] if target is not None else (result or (None,))[-1]
        features = last if isinstance(last, int) and last > 0 else None
        return replace(flow, aligned=False, rank=rank, features=features)
    if not _keeps_batch(source, result, target):
        return "a Reshape whose batch axis is not certain"
    layout = _moved_units(flow, source, result) if flow.view is View.MAP else None
    if layout is not None:
        return replace(flow, layout=layout, rank=len(layout))
    rank = len(target) if target is not None else None if result is None else len(result)
    return sample(flow, "a Reshape folds the spatial axes", rank=rank, tail=flow.tail)


def _keeps_batch(source: Shape | None, result: Shape | None, target: list[int] | None) -> bool:
    """Whether axis 0 before a Reshape is axis 0 after it."""
    if target and target[0] == 0:
        return True
    rest = None if source is None else _product_of(source[1:])
    if target and target[0] == -1 and rest is not None and source is not None:
        copied = [source[i] if t == 0 and i < len(source) else t for i, t in enumerate(target)]
        return _product_of(copied[1:]) == rest
    if source is None or result is None or not source or not result:
        return False
    if source[0] is not None and source[0] == result[0]:
        return True
    return rest is not None and rest == _product_of(result[1:])


def _product_of(dims: Sequence[Dim]) -> int | None:
    sizes = [d for d in dims if isinstance(d, int) and d > 0]
    return math.prod(sizes) if len(sizes) == len(dims) else None


def _moved_units(flow: Flow, source: Shape | None, result: Shape | None) -> Layout | None:
    """The layout after a Reshape that only adds, drops or moves axes of size 1; None if it does more."""
    if source is None or result is None or len(source) != len(flow.layout) or flow.layout[0] != "N":
        return None
    if _product_of(source[1:]) is None or _product_of(result[1:]) is None:
        return None
    pairs = list(zip(flow.layout[1:], source[1:], strict=True))
    wide = [(label, size) for label, size in pairs if size != 1]
    units = [label for label, size in pairs if size == 1 and label is not None]
    if [size for _, size in wide] != [d for d in result[1:] if d != 1]:
        return None
    if len(units) > sum(d == 1 for d in result[1:]):
        return None
    labels, spare = iter([label for label, _ in wide]), iter(units)
    return ("N", *(next(spare, None) if d == 1 else next(labels) for d in result[1:]))


def _flatten(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    axis = site.axis_of("axis", 1, flow.rank)
    if flow.view is View.TOKEN:
        same = flow.rank == 2 and axis == 1
        return replace(flow, rank=2, aligned=flow.aligned and same, features=flow.features if same else None)
    if axis != 1:
        return "a Flatten that folds the batch axis"
    return sample(flow, "a Flatten folds the spatial axes", rank=2, tail=flow.tail)


def _squeeze(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    axes = site.integers(1, "axes")
    if flow.view is View.TOKEN:
        return replace(flow, aligned=False, rank=_less(flow.rank, axes), features=None)
    if axes is None or flow.rank is None:
        return "a Squeeze of axes that are not given"
    dropped = {a % flow.rank for a in axes}
    if 0 in dropped:
        return "a Squeeze of the batch axis"
    rank = flow.rank - len(dropped)
    if flow.view is View.MAP and all(_is_unit(site, flow, a) for a in dropped):
        layout = tuple(label for a, label in enumerate(flow.layout) if a not in dropped)
        return replace(flow, layout=layout, rank=rank)
    return sample(flow, "a Squeeze drops a spatial axis", rank=rank, tail=flow.tail)


def _is_unit(site: RegionNode, flow: Flow, axis: int) -> bool:
    """Whether an axis of a map, other than batch and channels, has size 1 in every run."""
    label = flow.layout[axis]
    return label is None or (label != "C" and site.facts.static_size(site.node.inputs[0], axis) == 1)


def _less(rank: int | None, axes: list[int] | None) -> int | None:
    return None if rank is None or axes is None else rank - len(axes)


def _unsqueeze(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    axes = site.integers(1, "axes")
    if axes is None or flow.rank is None:
        return (
            replace(flow, aligned=False, rank=None)
            if flow.view is View.TOKEN
            else "an Unsqueeze of unknown axes"
        )
    rank = flow.rank + len(axes)
    new = {a % rank for a in axes}
    if flow.view is View.TOKEN:
        return replace(flow, aligned=False, rank=rank, features=1 if rank - 1 in new else flow.features)
    if 0 in new:
        return "an Unsqueeze before the batch axis"
    if flow.view is View.SAMPLE:
        return replace(flow, rank=rank)
    old = iter(flow.layout)
    return replace(flow, layout=tuple(None if a in new else next(old) for a in range(rank)), rank=rank)


def _concat(site: RegionNode) -> Result:
    flows = site.data()
    first = flows[0]
    axis = site.axis_of("axis", 1, first.rank)
    for index, tensor in site.others():
        if site.foreign(index, tensor):
            return f"'{tensor.name}' enters from outside"
    met = join(flows)
    if isinstance(met, str):
        return met
    widths = [_width(site, i, axis) for i in range(len(site.node.inputs))]
    known = [w for w in widths if w is not None]
    features = sum(known) if len(known) == len(widths) else None
    if met.view is View.TOKEN:
        last = axis is not None and met.rank is not None and axis == met.rank - 1
        aligned = last and all(f.aligned for f in flows)
        return replace(met, aligned=aligned, features=features if last else met.features, tail=False)
    if axis is None or axis == 0:
        return "a Concat over the batch axis"
    if met.view is View.MAP and met.layout[axis] == "C":
        if len(flows) < len(widths):
            return "a Concat with constant channels"
        return replace(met, features=features, tail=False)
    return sample(met, "a Concat along a spatial axis", rank=met.rank)


def _width(site: RegionNode, index: int, axis: int | None) -> int | None:
    """Size along a Concat's axis of one operand."""
    flow = site.flow(index)
    if flow is not None and flow.features is not None and axis is not None:
        if flow.view is View.MAP and flow.layout[axis] == "C":
            return flow.features
        if flow.view is View.TOKEN and flow.rank is not None and axis == flow.rank - 1:
            return flow.features
    shape = site.facts.shape(site.node.inputs[index])
    size = None if shape is None or axis is None or axis >= len(shape) else shape[axis]
    return size if isinstance(size, int) else None


def _split(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    axis = site.axis_of("axis", 0, flow.rank)
    count = len(site.node.outputs)
    sizes: Sequence[int | None] = [None] * count
    given = site.integers(1, "split")
    if given is not None and len(given) == count:
        sizes = given
    last = axis is not None and flow.rank is not None and axis == flow.rank - 1
    if flow.view is View.TOKEN:
        if given is None and last and flow.features is not None and flow.features % count == 0:
            sizes = [flow.features // count] * count
        one = replace(flow, tail=False, aligned=flow.aligned and last)
        return [replace(one, features=size if last else flow.features) for size in sizes]
    if axis is None or axis == 0:
        return "a Split of the batch axis"
    if flow.view is View.MAP and flow.layout[axis] == "C":
        if given is None and flow.features is not None and flow.features % count == 0:
            sizes = [flow.features // count] * count
        return [replace(flow, tail=False, features=size) for size in sizes]
    return [sample(flow, "a Split along a spatial axis", rank=flow.rank) for _ in sizes]


def _slice(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    if flow.view is View.TOKEN:
        return replace(flow, tail=False, aligned=False, features=_last_size(site))
    starts, ends = site.integers(1, "starts"), site.integers(2, "ends")
    if starts is None or ends is None or flow.rank is None:
        return "a Slice whose bounds are computed at run time"
    axes = site.integers(3, "axes") or list(range(len(starts)))
    steps = site.integers(4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut = _cut(site, flow, axis % flow.rank, start, end, step)
        if isinstance(cut, str):
            return cut
        flow = cut
    return replace(flow, tail=False)


def _last_size(site: RegionNode) -> int | None:
    shape = site.facts.shape(site.node.outputs[0])
    last = shape[-1] if shape else None
    return last if isinstance(last, int) else None


def _cut(site: RegionNode, flow: Flow, axis: int, start: int, end: int, step: int) -> Flow | str:
    """The flow after a slice of one axis."""
    size = site.facts.static_size(site.node.inputs[0], axis)
    label = flow.layout[axis] if flow.view is View.MAP else ("N" if axis == 0 else None)
    if label == "C" and flow.features is not None:
        size = flow.features
    whole = start == 0 and step == 1 and (end >= UNBOUNDED or (size is not None and end >= size))
    if whole or (flow.view is View.SAMPLE and axis != 0):
        return flow
    if label in ("N", None):
        return "a Slice of the batch axis" if label == "N" else "a Slice of an axis of size 1"
    if size is not None:
        kept = range(size)[start:end:step]
        start, end = kept.start, kept.stop
        if label == "C":
            return replace(flow, features=len(kept))
    if step < 1 or label == "C":
        return "a Slice that runs backwards" if step < 1 else "a Slice of an unknown number of channels"
    if start < 0 or (0 <= end < UNBOUNDED and size is None):
        return "a Slice whose place depends on the size of a dynamic axis"
    crop = end - size if size is not None else min(end, 0)
    axes = list(flow.axes)
    assert isinstance(label, int)
    axes[label] = axes[label].then(Axis(1, step, -start, crop if crop < 0 else 0))
    return replace(flow, axes=tuple(axes))


def _pad(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    pads = site.integers(1, "pads")
    if pads is None or flow.rank is None:
        return "a Pad whose amounts are computed at run time"
    tensor = site.tensor(3)
    axes = list(range(flow.rank)) if tensor is None else site.integers(3, "axes")
    if axes is None or len(pads) != 2 * len(axes):
        return "a Pad of unknown axes"
    for i, axis in enumerate(a % flow.rank for a in axes):
        padded = _padded(flow, axis, pads[i], pads[i + len(axes)])
        if isinstance(padded, str):
            return padded
        flow = padded
    return replace(flow, tail=False)


def _padded(flow: Flow, axis: int, begin: int, end: int) -> Flow | str:
    if begin == 0 and end == 0:
        return flow
    if flow.view is View.TOKEN:
        last = axis == (flow.rank or 0) - 1
        features = flow.features + begin + end if last and flow.features is not None else flow.features
        return replace(flow, aligned=flow.aligned and last, features=features)
    label = flow.layout[axis] if flow.view is View.MAP else ("N" if axis == 0 else None)
    if label == "N":
        return "a Pad of the batch axis"
    if flow.view is View.SAMPLE:
        return flow
    if label == "C":
        return replace(flow, features=None if flow.features is None else flow.features + begin + end)
    if label is None:
        return "a Pad of an axis of size 1"
    axes = list(flow.axes)
    assert isinstance(label, int)
    axes[label] = axes[label].then(Axis(1, 1, begin, end))
    return replace(flow, axes=tuple(axes))


def _gather(site: RegionNode) -> Result:
    flow = site.flow()
    if flow is None:
        return "an embedding: its data are indices"
    axis = site.axis_of("axis", 0, flow.rank)
    tensor = site.tensor(1)
    indices = None if tensor is None else site.facts.value(tensor)
    if flow.view is View.TOKEN:
        return replace(flow, tail=False, aligned=False, rank=None, features=None)
    if indices is None or axis is None or axis == 0:
        return "a Gather of the batch axis or with unknown indices"
    if flow.view is View.MAP and flow.layout[axis] == "C" and indices.ndim == 1:
        return replace(flow, tail=False, features=len(indices))
    rank = None if flow.rank is None else flow.rank + indices.ndim - 1
    return sample(flow, "a Gather picks positions", rank=rank)


def _expand(site: RegionNode) -> Result:
    flow = site.flow()
    assert flow is not None
    source, result = site.facts.shape(site.node.inputs[0]), site.facts.shape(site.node.outputs[0])
    if flow.view is View.TOKEN:
        rank = None if result is None else len(result)
        return replace(flow, tail=False, aligned=False, rank=rank, features=_last_size(site))
    if source and result and len(source) == len(result) and source[0] is not None and source[0] == result[0]:
        return sample(flow, f"{site.node.op} repeats positions", rank=len(result))
    return f"{site.node.op} whose batch axis is not certain"


def _resized(site: RegionNode) -> Result:
    return f"{site.node.op} enlarges the image: no convolution with a stride can stand for it"


_SHAPE_RULES = {
    "Transpose": Entry(_transpose),
    "Reshape": Entry(_reshape),
    "Flatten": Entry(_flatten),
    "Squeeze": Entry(_squeeze),
    "Unsqueeze": Entry(_unsqueeze),
    "Concat": Entry(_concat, every_input=True),
    "Split": Entry(_split),
    "Slice": Entry(_slice),
    "Pad": Entry(_pad),
    "Gather": Entry(_gather),
    "Expand": Entry(_expand),
    **dict.fromkeys(("ConvTranspose", "Resize", "Upsample", "DepthToSpace", "MaxUnpool"), Entry(_resized)),
}
_MEETING = {"Attention", *_MASKING}  # where data from outside may meet the region's


def _missing(op: Op) -> str:
    if op.kind in (Kind.SHAPE, Kind.FILL, Kind.RANDOM):
        return "stays outside: holds none of a region's data"
    return "ends a region: no rule"


RULES = Facet(keyed({**_LINEAR_RULES, **_SHAPE_RULES}), lambda op: _LINEAR_DEFAULTS.get(op.kind), _missing)
"""By operator: how its outputs' flows come from its inputs'."""


def apply(site: RegionNode) -> list[Flow | None] | str:
    """Flows of a node's outputs, or the reason why the node can't be inside a region."""
    node = site.node
    entry = RULES.get(node.key)
    if entry is None:
        return f"no rule for operator {node.domain + '::' if node.domain else ''}{node.op}"
    for index, tensor in site.others():
        if node.op not in _MEETING and site.foreign(index, tensor):
            return f"'{tensor.name}' enters from outside"
    if not entry.every_input and any(site.flow(i) is not None for i in range(1, len(site.flows))):
        return "its parameters depend on the data"
    result = entry.rule(site)
    if isinstance(result, str):
        return result
    if isinstance(result, Flow):
        return [result, *([None] * (len(node.outputs) - 1))]
    return result
