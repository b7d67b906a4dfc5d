"""Flows through operators that compute: linear ones, pooling, normalization, element-wise ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxfuse.analysis.regions.facts import Entry, FlowResult, RegionNode, join, sample
from onnxfuse.analysis.regions.view import DataView, Flow
from onnxfuse.ir.nodes import Tensor
from onnxfuse.numerics.receptive_field import window
from onnxfuse.ops.table import OPS, Kind, Trait

# Element-wise operators ---------------------------------------------------------------------------

_POINTWISE = OPS.of_kind(Kind.ACTIVATION, Kind.ELEMENTWISE)
AFFINE = _POINTWISE.having(Trait.AFFINE)
SCALING = _POINTWISE.having(Trait.SCALES)
CURVED = _POINTWISE - AFFINE - SCALING
TRANSPARENT = _POINTWISE.having(Trait.SAME_ELEMENTS)
_SUMS = AFFINE - AFFINE.unary()
MASKING = {"Add", "Sub", "Mul", "Where", "Min", "Max"}  # by which masks of attention scores come in


def _pointwise(site: RegionNode) -> FlowResult:
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
        if site.foreign(index, tensor) and not (met.scores and op in MASKING):
            return f"'{tensor.name}' enters from outside"
        fitted = _broadcast(site, met, tensor)
        if isinstance(fitted, str):
            return fitted
        met = fitted
    alone = len(flows) == 1
    scaled = key in SCALING and alone and (op == "Mul" or site.flow(0) is not None)
    affine = key in AFFINE or scaled
    branched = key in _SUMS and len({f.linears for f in flows}) > 1
    return met._replace(
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
    if flow.view is DataView.TOKEN:
        longer = shape is None or flow.rank is None or len(shape) > flow.rank
        last = shape[-1] if shape else 1
        wider = isinstance(last, int) and flow.features is not None and last > flow.features
        features = last if wider and isinstance(last, int) else flow.features
        return flow._replace(features=features, aligned=flow.aligned and not (longer and shape != ()))
    if shape is None:
        return f"the shape of '{operand.name}' is not known"
    if flow.rank is None or len(shape) > flow.rank:
        return f"'{operand.name}' has more axes than the tensor it meets"
    offset = flow.rank - len(shape)
    sizes = {offset + i: d for i, d in enumerate(shape) if d != 1}
    if 0 in sizes and (flow.view is DataView.SAMPLE or flow.layout[0] == "N"):
        return f"'{operand.name}' differs from sample to sample of a batch"
    if flow.view is DataView.SAMPLE:
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
    return flow._replace(features=features)


def _static_of(site: RegionNode, flow: Flow, axis: int) -> int | None:
    """Static size of an axis of the site's data input that has the flow's rank."""
    for index, tensor in enumerate(site.node.inputs):
        found = site.flow(index)
        if found is not None and found.rank == flow.rank:
            return site.facts.static_size(tensor, axis)
    return None


# Linear operators ---------------------------------------------------------------------------------


def _linear(site: RegionNode, flow: Flow, **changes: Any) -> Flow:
    return flow._replace(linears=flow.linears | site.bit, tail=True, **changes)


def _conv(site: RegionNode) -> FlowResult:
    flow, weight = site.flow(), site.constant_shape(1)
    if flow is None or weight is None:
        return "its weights are not constant"
    if flow.view is DataView.TOKEN:
        return "a convolution among per-token operators"
    if flow.view is DataView.SAMPLE:
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
    return flow._replace(axes=tuple(axes))


def _matmul(site: RegionNode) -> FlowResult:
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
    if left.view is DataView.MAP and left.layout[-1] != "C":
        left = sample(left, "a MatMul over another axis than channels", rank=left.rank)
    if left.view is DataView.SAMPLE and (left.rank is None or left.rank < 2):
        return "a MatMul over the batch axis"
    return _linear(site, left, features=weight[1])


def _product(left: Flow, right: Flow) -> FlowResult:
    """A product of two tensors of the region: attention scores, or probabilities times values."""
    union = left._replace(linears=left.linears | right.linears, tail=False, curved=True)
    if left.view is DataView.TOKEN:
        scores = not (left.scores or right.scores)
        return union._replace(features=right.features, aligned=False, scores=scores)
    if left.rank is None or left.rank != right.rank or left.rank < 3:
        return "a product whose batch axis is not certain"
    return sample(union, "a product of two tensors mixes positions", rank=left.rank)


def _mixing(site: RegionNode, flow: Flow) -> FlowResult:
    """A constant matrix from the left mixes tokens or positions."""
    weight = site.constant_shape(0)
    if weight is None:
        return "its weights are not constant"
    if flow.rank is None or flow.rank < 3 or len(weight) > 2:
        return "a constant matrix mixes the samples of a batch"
    if flow.view is DataView.TOKEN:
        return flow._replace(aligned=False, tail=False)
    return sample(flow, "a constant matrix mixes positions", rank=flow.rank)


def _gemm(site: RegionNode) -> FlowResult:
    flow, weight = site.flow(), site.constant_shape(1)
    if flow is None or weight is None or len(weight) != 2:
        return "its weights are not constant"
    if site.attribute("transA", 0):
        return "it transposes its input"
    if flow.view is DataView.MAP:
        return "its input is a feature map"
    return _linear(site, flow, features=weight[0] if site.attribute("transB", 0) else weight[1])


def _einsum(site: RegionNode) -> FlowResult:
    """Einsum as per-token models use it: with a weight it is linear, of two tensors it is a product."""
    flows = site.data()
    if any(f.view is not DataView.TOKEN for f in flows):
        return "Einsum on a feature map"
    if len(flows) == 2:
        return _product(*flows)
    if len(site.node.inputs) != 2 or any(not site.facts.is_constant(t) for _, t in site.others()):
        return "its weights are not constant"
    return _linear(site, flows[0], features=None, rank=None, aligned=False)


def _attention(site: RegionNode) -> FlowResult:
    """ONNX Attention: queries, keys and values from the region, a mask from anywhere, no cache."""
    if any(site.flow(i) is None for i in range(3)) or any(site.tensor(i) is not None for i in (4, 5)):
        return "attention with keys, values or a cache from outside"
    met = join(site.data()[:3])
    if isinstance(met, str) or met.view is not DataView.TOKEN:
        return "attention on a feature map"
    return met._replace(tail=False, curved=True, aligned=False, scores=False)


# Pooling, normalization, reduction ----------------------------------------------------------------


_AVERAGING = OPS.of_kind(Kind.POOL, Kind.REDUCE).having(Trait.AFFINE)
_SOFTMAX = OPS.of_kind(Kind.SOFTMAX)


def _pool(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    if flow.view is DataView.TOKEN:
        return "a pooling among per-token operators"
    curved = site.key not in _AVERAGING
    if flow.view is DataView.SAMPLE:
        return sample(flow, flow.lost, rank=flow.rank, curved=curved)
    windowed = _windowed(site, flow, list(site.attribute("kernel_shape", ())))
    if isinstance(windowed, str):
        return windowed
    return windowed._replace(tail=False, curved=flow.curved or curved)


def _global(site: RegionNode) -> FlowResult:
    """Operators that take in the whole image: no window, but a sample all the same."""
    flow = site.flow()
    assert flow is not None
    if flow.view is DataView.TOKEN:
        return f"{site.node.op} among per-token operators"
    curved = site.key not in _AVERAGING
    return sample(flow, f"{site.node.op} takes in the whole image", rank=flow.rank, curved=curved)


def _batch_normalization(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    if site.attribute("training_mode", 0):
        return "BatchNormalization in training mode"
    if flow.view is DataView.MAP and flow.layout[1] != "C":
        return "BatchNormalization over another axis than channels"
    return flow


def _over_axis(site: RegionNode) -> FlowResult:
    """Softmax and LayerNormalization: one axis, or all from it on, seen together."""
    flow = site.flow()
    assert flow is not None
    op = site.node.op
    coerced = site.key in _SOFTMAX and site.opset < 13
    default = 1 if coerced else -1
    axis = site.axis_of("axis", default, flow.rank)
    if flow.view is DataView.TOKEN:
        return flow._replace(curved=True, tail=False)
    if axis is None or axis == 0:
        return f"{op} over the batch axis"
    onwards = coerced or op.endswith("LayerNormalization")
    labels = flow.layout[axis:] if onwards else flow.layout[axis : axis + 1]
    if flow.view is DataView.MAP and all(label in ("C", None) for label in labels):
        return flow._replace(curved=True, tail=False)
    return sample(flow, f"{op} takes in the whole image", rank=flow.rank, curved=True)


def _across_channels(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    if flow.view is DataView.MAP and flow.layout[1] != "C":
        return f"{site.node.op} over another axis than channels"
    return flow._replace(curved=True, tail=False)


def _reduce(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    op = site.node.op
    curved = site.key not in _AVERAGING
    axes = site.integers(1, "axes")
    if flow.view is DataView.TOKEN:
        last = axes is not None and (axes == [-1] or (flow.rank is not None and axes == [flow.rank - 1]))
        kept = bool(site.attribute("keepdims", 1))
        rank = None if flow.rank is None or axes is None else flow.rank - (0 if kept else len(axes))
        aligned = flow.aligned and last and kept
        return flow._replace(
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
    if flow.view is DataView.MAP and kept and all(flow.layout[a] in ("C", None) for a in axes):
        features = 1 if any(flow.layout[a] == "C" for a in axes) else flow.features
        return flow._replace(curved=flow.curved or curved, tail=False, features=features)
    rank = flow.rank if kept else flow.rank - len(axes)
    return sample(flow, f"{op} takes in the whole image", rank=rank, curved=curved)


LINEAR_DEFAULTS = {
    **dict.fromkeys((Kind.ACTIVATION, Kind.ELEMENTWISE), Entry(_pointwise, every_input=True)),
    Kind.REDUCE: Entry(_reduce),
    Kind.SOFTMAX: Entry(_over_axis),
}
LINEAR_RULES = {
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
