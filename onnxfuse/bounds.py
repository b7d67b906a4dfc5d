"""Interval analysis: bounds of every tensor that hold whatever is fed.

Each operator maps bounds of its inputs to bounds of its outputs, in one walk over the graph. The outcome is a
proof: a channel whose upper bound in front of a ReLU is 0 is dead for every input, and can go without any
change of the function. An operator without a rule gives (-inf, inf); nothing is guessed.

**What is claimed.** `low <= value <= high` for the numbers that a runtime really computes, at the sizes that
the given shapes state, for all inputs and all inner values that are finite: an overflow in the middle of a
network voids the bounds behind it. So 0 times an unbounded value is 0, and a weight of 0 contributes [0, 0].
An initializer that is also listed among the inputs counts as the value stored.

**Rounding.** A sum in floating point, in any order, is monotone in each of its terms, because every single
addition is. So the computed y = sum w_i x_i is at most what the same additions give for the largest terms
t_i = max(w_i low_i, w_i high_i), and that is at most

    sum t_i + n u sum |t_i|,         n terms that are not 0, u the unit roundoff

(Jeannerod and Rump 2013; we take 2 n eps = 4 n u, which covers this module's float64 as well). Three cases
are decided without the second summand, and they are what makes "exactly 0 after the ReLU" decidable:

- Terms that are all <= 0 have a computed sum <= 0, whatever is rounded.
- Without any product there is only the bias, and it is not rounded.
- If all t_i are multiples of one power of two q, and sum |t_i| <= q / u, then no addition rounds.

A single operation on bounds is widened by one eps unless its result is a number of the type; it keeps the
sign. Approximations of curves (exp, tanh, erf) get 16 eps, relative and absolute.

The claims on signs also hold where a device multiplies in less than the type's precision (TF32), the others
need the precision of the type. A convolution by Winograd's or a Fourier transform keeps neither: there a dead
channel is 0 up to float noise, while the function that the graph states is still exactly 0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from onnx.reference import ReferenceEvaluator
from scipy import special

from onnxfuse.affine import training_mode
from onnxfuse.constants import integers
from onnxfuse.graph import Model
from onnxfuse.ir import Node, Tensor
from onnxfuse.linear import WEIGHTED, LinearOp, Shapes, is_main_domain, linear_op, weight_type
from onnxfuse.ops.facet import Facet, keyed
from onnxfuse.ops.table import OPS, Kind, Op, Trait
from onnxfuse.ops.view import ModelNodeView
from onnxfuse.shapes import Dim, TensorInfo

LIMIT = 1 << 18
"""The most indices that bounds of one tensor are kept for; a larger tensor gets one pair for all."""

_BLOCK = 1 << 20  # products of weights and bounds in memory at a time
_LARGEST = 1 << 26  # weights of one operator that is looked at
_POSITIONS = 1 << 22  # values that a mean over an unknown number of positions is taken to add up
_CURVE, _DIP = 16, 128  # roundings of a curve's approximation, and of a product with one

Dims = tuple[Dim, ...]


class _Format(NamedTuple):
    """Of a floating type: distance of 1 to the next number, the least normal number, the error of an
    operation that underflows, the largest number."""

    eps: float
    normal: float
    tiny: float
    largest: float


_FORMATS = {
    "float16": _Format(2.0**-10, 2.0**-14, 2.0**-24, 65504.0),
    "bfloat16": _Format(2.0**-7, 2.0**-126, 2.0**-126, float.fromhex("0x1.fep127")),
    "float32": _Format(2.0**-23, 2.0**-126, 2.0**-126, float(np.finfo(np.float32).max)),
    "float64": _Format(2.0**-52, 2.0**-1022, 2.0**-1022, float(np.finfo(np.float64).max)),
}


@dataclass(frozen=True, eq=False)
class Interval:
    """`low <= tensor <= high`: float64 arrays of one shape, which broadcasts against the tensor's.

    The rank is the tensor's (0 where that is unknown); an axis has size 1, if the bound holds for all its
    indices, or the tensor's own size.
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both arrays."""
        return self.low.shape

    def hull(self, axes: Iterable[int] | None = None) -> Interval:
        """One pair for all indices of some axes, which keep size 1; by default for everything, of rank 0."""
        if axes is None:
            return Interval(np.asarray(self.low.min()), np.asarray(self.high.max()))
        over = tuple(axes)
        return Interval(self.low.min(over, keepdims=True), self.high.max(over, keepdims=True))

    def union(self, other: Interval) -> Interval:
        """What holds for values that are in either."""
        return Interval(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """A function that does not decrease, and rounds nothing, applied to both."""
        return Interval(function(self.low), function(self.high))

    def zeros(self, axis: int, size: int) -> np.ndarray:
        """Which indices of an axis of `size` are 0 whatever is fed, as a mask (size,)."""
        if not self.shape:
            return np.full(size, bool(self.low == 0 == self.high))
        zero = (self.low == 0) & (self.high == 0)
        return np.broadcast_to(np.moveaxis(zero, axis, 0).reshape(zero.shape[axis], -1).all(1), (size,))


def intervals(model: Model, shapes: Shapes) -> dict[str, Interval]:
    """Bounds of every tensor of the main graph, by name.

    Args:
        model: the model.
        shapes: of its tensors, as `Model.shapes` or `cost.shapes_at` gives them. They are believed: where
            they have the sizes of one feed, the bounds hold for feeds of those sizes. Where a file may
            declare inner tensors wrongly, `constants.proven_shapes` is the one to give.
    """
    known: dict[str, Interval] = {}
    with np.errstate(all="ignore"):
        for tensor in model.tensors():
            if model.is_weight(tensor):
                known[tensor.name] = _stored(model, tensor)
            elif model.producer(tensor) is None:
                known[tensor.name] = _everything(_info(shapes, tensor))
        for node in model.nodes:
            if node.constant_form is None:
                results = _results(IntervalNode(model, node, shapes, known))
                for tensor, found in zip(node.outputs, results, strict=False):
                    known[tensor.name] = _fitted(found, _info(shapes, tensor), node.key in _SELECTING)
    known.pop("", None)
    return known


@dataclass(frozen=True, eq=False)
class IntervalNode(ModelNodeView):
    """A node, and what is known where it stands."""

    model: Model
    node: Node
    shapes: Shapes
    known: Mapping[str, Interval]

    def at(self, slot: int) -> Interval:
        """Bounds of an input."""
        tensor = self.tensor(slot)
        return _UNBOUNDED if tensor is None else self.known.get(tensor.name, _UNBOUNDED)

    def operands(self) -> list[Interval]:
        """Bounds of all inputs, for broadcasting."""
        return [self.at(slot) for slot in range(len(self.node.inputs)) if self.has(slot)]

    def dims(self, slot: int) -> Dims | None:
        """Sizes of an input; those that bounds are kept for are known in any case."""
        found = _info(self.shapes, self.node.inputs[slot]).shape
        if found is None:
            return None
        return tuple(n if n > 1 else dim for n, dim in zip(self.at(slot).shape, found, strict=True))

    @property
    def format(self) -> _Format:
        dtype = _info(self.shapes, self.node.outputs[0]).dtype
        return _FORMATS["bfloat16" if dtype is None or dtype.name not in _FORMATS else dtype.name]

    def constant(self, slot: int) -> np.ndarray | None:
        tensor = self.tensor(slot)
        return None if tensor is None else self.model.weight(tensor)

    def listed(self, slot: int, what: str) -> list[int] | None:
        return integers(self.model, self.tensor(slot))

    @property
    def padded(self) -> bool:
        """Whether a window may reach beyond the input."""
        auto = self.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "")
        return auto or any(self.attribute("pads", ())) or bool(self.attribute("ceil_mode", 0))


Found = Interval | Sequence[Interval | None] | None
IntervalRule = Callable[[IntervalNode], Found]


def _results(site: IntervalNode) -> list[Interval | None]:
    rule = RULES.get(site.key)
    try:
        found = None if rule is None else rule(site)
    except (ValueError, IndexError):  # sizes that contradict each other, from a file that declares wrong ones
        found = None
    results = [found] if found is None or isinstance(found, Interval) else list(found)
    return results + [None] * (len(site.node.outputs) - len(results))


def _info(shapes: Shapes, tensor: Tensor) -> TensorInfo:
    return shapes.get(tensor.name) or TensorInfo(tensor.name, None, None)


def _stored(model: Model, tensor: Tensor) -> Interval:
    """A constant: its values, or the least and the largest of a large one."""
    dtype, shape = weight_type(model, tensor)
    value = model.weight(tensor) if dtype.kind in "biuf" or dtype.name in _FORMATS else None
    if value is None or value.size == 0:
        return _everything(TensorInfo(tensor.name, None, shape))
    if value.size > LIMIT:
        exact = Interval(*(np.full((1,) * value.ndim, float(v)) for v in (value.min(), value.max())))
    else:
        array = value.astype(np.float64)
        exact = Interval(array, array)
    return _clean(exact.low, exact.high)


# ---- bounds ----------------------------------------------------------------------------------------------


def _constant(low: float, high: float, rank: int = 0) -> Interval:
    return Interval(np.full((1,) * rank, low, np.float64), np.full((1,) * rank, high, np.float64))


_UNBOUNDED = _constant(-math.inf, math.inf)
_ZERO = _constant(0, 0)


def _everything(info: TensorInfo) -> Interval:
    """What the type alone tells."""
    rank = 0 if info.shape is None else len(info.shape)
    kind = "" if info.dtype is None else info.dtype.kind
    if kind == "b":
        return _constant(0, 1, rank)
    if info.dtype is not None and kind in ("i", "u"):
        return _constant(float(np.iinfo(info.dtype).min), float(np.iinfo(info.dtype).max), rank)
    return _constant(-math.inf, math.inf, rank)


def _fitted(found: Interval | None, info: TensorInfo, selecting: bool) -> Interval:
    """Bounds as a tensor of that type and shape can have them; `selecting` says that its operator computes
    no new integers, which may wrap around."""
    everything = _everything(info)
    form = None if info.dtype is None else _FORMATS.get(info.dtype.name)
    integral = info.dtype is not None and info.dtype.kind in "biu" and selecting
    if found is None or 0 in found.shape or not (form or integral):
        return everything
    found = _clean(found.low, found.high)
    if form is not None:
        low = np.where(found.low < -form.largest, -math.inf, found.low)
        found = Interval(low, np.where(found.high > form.largest, math.inf, found.high))
    elif found.low.min() < everything.low.min() or found.high.max() > everything.high.max():
        return everything
    if info.shape is None or found.low.ndim > len(info.shape):
        return found.hull().union(_constant(math.inf, -math.inf, len(info.shape or ())))
    missing = (1,) * (len(info.shape) - found.low.ndim)
    found = found.map(lambda bound: bound.reshape((*missing, *bound.shape)))
    sizes = zip(found.shape, info.shape, strict=True)
    wrong = [i for i, (n, dim) in enumerate(sizes) if n != 1 and isinstance(dim, int) and n != dim]
    return found.hull(range(len(info.shape)) if found.low.size > LIMIT else wrong)


def _clean(low: np.ndarray, high: np.ndarray) -> Interval:
    """Where a bound is no number, there is none."""
    return Interval(np.where(np.isnan(low), -math.inf, low), np.where(np.isnan(high), math.inf, high))


def _up(high: np.ndarray, form: _Format) -> np.ndarray:
    """Bound of one operation's rounded result, from that of its exact result."""
    whole = np.frexp(high)[0] * (2 / form.eps) % 1 == 0
    wide = high + form.eps * np.abs(high) + form.tiny
    wide = np.where(high <= 0, np.minimum(wide, 0), wide)
    return np.where(np.isinf(high) | (whole & (np.abs(high) >= form.normal)), high, wide)


def _rounded(low: np.ndarray, high: np.ndarray, form: _Format) -> Interval:
    found = _clean(low, high)
    return Interval(-_up(-found.low, form), _up(found.high, form))


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where((a == 0) | (b == 0), 0, a * b)


def _corners(function: Callable[[Any, Any], np.ndarray], a: Interval, b: Interval, form: _Format) -> Interval:
    values = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return _rounded(functools.reduce(np.minimum, values), functools.reduce(np.maximum, values), form)


def _sum_up(products: np.ndarray, bias: np.ndarray, form: _Format, extra: int) -> np.ndarray:
    """The largest computed sum over the last axis, see the module; `extra` roundings make a product."""
    total = products.sum(-1) + bias
    size = np.abs(products).sum(-1) + np.abs(bias)
    nonzero = np.count_nonzero(products, -1)
    steps = np.where(nonzero == 0, 0, nonzero + (bias != 0) - 1 + extra)
    exact = steps == 0
    if extra <= 1:
        quantum = np.exp2(np.ceil(np.log2(size))) * form.eps / 2
        parts = np.concatenate([products, bias[..., None]], -1) / quantum[..., None]
        exact |= (parts == np.rint(parts)).all(-1) & (quantum >= form.normal)
    high = np.where(exact, total, total + steps * (2 * form.eps * size + form.tiny))
    high = np.where((products <= 0).all(-1) & (bias <= 0), np.fmin(high, 0), high)
    return np.where(np.isnan(high), math.inf, high)


def _sums(products: Interval, bias: np.ndarray, form: _Format, extra: int) -> Interval:
    low = -_sum_up(-products.low, -bias, form, extra)
    return Interval(low, _sum_up(products.high, bias, form, extra))


def _scaled(weight: np.ndarray, x: Interval) -> Interval:
    """Exact bounds of products with weights."""
    ends = _times(weight, x.low), _times(weight, x.high)
    return Interval(np.minimum(*ends), np.maximum(*ends))


def _mean(x: Interval, axes: tuple[int, ...], count: int, form: _Format) -> Interval:
    """Of `count` values, whose bounds vary along `axes`."""

    def upper(high: np.ndarray) -> np.ndarray:
        size = np.abs(high).mean(axes, keepdims=True)
        mean = high.mean(axes, keepdims=True) + 2 * form.eps * (count + 1) * size + form.tiny
        return np.where((high <= 0).all(axes, keepdims=True), np.fmin(mean, 0), mean)

    return _clean(-upper(-x.low), upper(x.high))


# ---- operators with weights ------------------------------------------------------------------------------


def _affine(site: IntervalNode) -> Interval | None:
    op = linear_op(site.model, site.node, site.shapes, transposed=True)
    if isinstance(op, str) or op.out_features * op.columns > _LARGEST:
        return None
    alpha, beta = (float(site.attribute(name, 1.0)) for name in ("alpha", "beta"))
    bias = _bias(op, beta)
    last = site.node.op == "MatMul"
    x = _features(site.at(0), -1 if last else 1, op.in_features)
    if bias is None:
        return None
    if op.pads is None or any(op.pads):  # None: transposed, or not known
        x = x.union(_ZERO)  # an edge has fewer terms
    y = _dense(op, x, bias, site.format, 1 if alpha == beta == 1 else 3)
    leading = (1,) * (site.at(0).low.ndim - 1 if last else 1)
    return y.map(lambda bound: bound.reshape((*leading, -1, *[1] * len(op.kernel))))


def _bias(op: LinearOp, beta: float) -> np.ndarray | None:
    """Per output; None where it differs between rows."""
    bias = np.zeros(op.out_features)
    if op.own_bias is None:
        return bias
    value = op.model.weight(op.own_bias)
    if value is None or (value.size > 1 and value.shape[-1] != op.out_features):
        return None
    return bias + beta * value.astype(np.float64).reshape(-1)


def _features(x: Interval, axis: int, size: int) -> Interval:
    """Bounds along one axis, (size,)."""
    rank = x.low.ndim
    if rank == 0 or x.shape[axis] not in (1, size):
        return x.hull().map(lambda bound: np.full(size, bound))
    flat = x.hull(i for i in range(rank) if i != axis % rank)
    return flat.map(lambda bound: np.broadcast_to(bound.reshape(-1), (size,)))


def _dense(op: LinearOp, x: Interval, bias: np.ndarray, form: _Format, extra: int) -> Interval:
    """Bounds per output, (out,)."""
    rows, inner = op.out_features, op.in_features // op.groups
    weight = op.weight.reshape(rows, inner, -1)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return _UNBOUNDED.map(lambda bound: np.full(rows, bound))
    grouped = x.map(lambda bound: bound.reshape(op.groups, inner, 1))
    step = max(1, _BLOCK // op.columns)
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = np.arange(rows)[part] // (rows // op.groups)
        used = Interval(grouped.low[groups], grouped.high[groups])
        products = _scaled(weight[part], used).map(lambda bound: bound.reshape(len(bound), -1))
        own = bias[part]
        if extra > 1:  # then the bias is a product as well
            products = Interval(*(np.column_stack([side, own]) for side in (products.low, products.high)))
            own = np.zeros(len(own))
        parts.append(_sums(products, own, form, extra))
    return Interval(np.concatenate([p.low for p in parts]), np.concatenate([p.high for p in parts]))


def _batch_norm(site: IntervalNode) -> Interval | None:
    x = site.at(0)
    values = [site.constant(slot) for slot in range(1, 5)]
    found = [v.astype(np.float64) for v in values if v is not None]
    if len(found) < 4 or training_mode(site.node) or not site.attribute("spatial", 1):
        return None
    rank = x.low.ndim
    gamma, beta, mean, variance = (v.reshape(-1, *[1] * (rank - 2)) for v in found)
    scale = gamma / np.sqrt(variance + float(site.attribute("epsilon", 1e-5)))
    if not all(np.isfinite(v).all() for v in (scale, beta, mean)):
        return None
    scaled = _scaled(scale, x)
    terms = [np.broadcast_arrays(bound, -scale * mean, beta) for bound in (scaled.low, scaled.high)]
    products = Interval(*(np.stack(parts[:2], -1) for parts in terms))
    y = _sums(products, terms[0][2], site.format, 5)
    return y if rank else y.hull()


# ---- element by element ----------------------------------------------------------------------------------


_LINEAR_RULES: Mapping[str, IntervalRule] = {
    **dict.fromkeys(WEIGHTED, _affine),
    "BatchNormalization": _batch_norm,
}


def _add(a: Interval, b: Interval, form: _Format) -> Interval:
    return _rounded(a.low + b.low, a.high + b.high, form)


def _neg(x: Interval) -> Interval:
    return Interval(-x.high, -x.low)


def _total(site: IntervalNode) -> Interval:
    terms = site.operands()
    if len(terms) < 3:
        return functools.reduce(lambda a, b: _add(a, b, site.format), terms)
    sides = (np.broadcast_arrays(*(t.low for t in terms)), np.broadcast_arrays(*(t.high for t in terms)))
    products = Interval(*(np.stack(side, -1) for side in sides))
    return _sums(products, np.zeros(products.shape[:-1]), site.format, 0)


def _mul(site: IntervalNode) -> Interval:
    a, b = site.node.inputs
    if a is b:
        return _squared(site)
    for gate, other in ((a, 1), (b, 0)):
        source = site.model.producer(gate)
        if source is None or source.op != "Sigmoid" or not is_main_domain(source):
            continue
        if source.inputs[0] is site.node.inputs[other]:
            return _dip(site.at(other), site.format, *_SWISH, keeps=True)
    x, y = site.operands()
    return _corners(_times, x, y, site.format)


def _div(site: IntervalNode) -> Interval:
    a, b = site.operands()
    zero = (b.low <= 0) & (b.high >= 0)

    def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        found = np.where((x == 0) | np.isinf(y), 0, x / y)  # inf / inf: the other corners have the ends
        return np.where(zero, 0, found)

    found = _corners(divide, a, b, site.format)
    below = zero & ~(((a.low >= 0) & (b.low >= 0)) | ((a.high <= 0) & (b.high <= 0)))
    above = zero & ~(((a.low >= 0) & (b.high <= 0)) | ((a.high <= 0) & (b.low >= 0)))
    return Interval(np.where(below, -math.inf, found.low), np.where(above, math.inf, found.high))


def _absolute(x: Interval) -> Interval:
    return Interval(np.maximum(np.maximum(x.low, -x.high), 0), np.maximum(-x.low, x.high))


def _squared(site: IntervalNode) -> Interval:
    x = _absolute(site.at(0))
    return _rounded(_times(x.low, x.low), _times(x.high, x.high), site.format)


def _pow(site: IntervalNode) -> Interval | None:
    exponent = site.constant(1)
    return _squared(site) if exponent is not None and exponent.size == 1 and exponent.item() == 2 else None


def _extreme(pick: np.ufunc) -> IntervalRule:
    def rule(site: IntervalNode) -> Interval:
        found = site.operands()
        low, high = ([getattr(x, side) for x in found] for side in ("low", "high"))
        return Interval(functools.reduce(pick, low), functools.reduce(pick, high))

    return rule


def _clip(site: IntervalNode) -> Interval:
    x, ends = site.at(0), []
    for slot, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        value = float(site.attribute(name, default))
        ends.append(site.at(slot) if site.has(slot) else _constant(value, value))
    least, most = ends
    low = np.minimum(np.maximum(x.low, least.low), most.low)
    return Interval(low, np.minimum(np.maximum(x.high, least.high), most.high))


def _leaky(site: IntervalNode) -> Interval:
    alpha = float(site.attribute("alpha", 0.01))
    x, slope = site.operands() if site.node.op == "PRelu" else (site.at(0), _constant(alpha, alpha))
    positive = x.map(lambda bound: np.maximum(bound, 0))
    negative = _corners(_times, x.map(lambda bound: np.minimum(bound, 0)), slope, site.format)
    high = np.maximum(positive.high, negative.high)
    low = np.where(x.low >= 0, positive.low, negative.low)
    return Interval(low, np.where(x.low >= 0, positive.high, np.where(x.high <= 0, negative.high, high)))


def _widened(
    low: np.ndarray, high: np.ndarray, form: _Format, number: float, x: Interval, root: bool = False
) -> Interval:
    """Bounds of an approximated function. It is taken never to cross 0 by its error; `root` says f(0) = 0."""
    error = number * form.eps
    wide_low, wide_high = low - error * (1 + np.abs(low)), high + error * (1 + np.abs(high))
    wide_low = np.where(low >= 0, np.fmax(wide_low, 0), wide_low)
    wide_high = np.where((x.high <= 0) & root, np.fmin(wide_high, 0), wide_high)
    return _clean(np.where(np.isinf(low), low, wide_low), np.where(np.isinf(high), high, wide_high))


Curve = Callable[[IntervalNode, np.ndarray], np.ndarray]


def _curve(function: Curve) -> IntervalRule:
    """A function that does not decrease, as far as its parameters are not negative."""

    def rule(site: IntervalNode) -> Interval | None:
        alpha, beta, gamma = (float(site.attribute(name, 0)) for name in ("alpha", "beta", "gamma"))
        if min(alpha, gamma) < 0:
            return None
        x, number = site.at(0), _CURVE * (1 + alpha + abs(beta) + gamma)
        root = bool(function(site, np.zeros(())) == 0)
        return _widened(function(site, x.low), function(site, x.high), site.format, number, x, root)

    return rule


def _exponential(site: IntervalNode, x: np.ndarray) -> np.ndarray:
    """Elu, Celu and Selu."""
    scaled = site.node.op == "Selu"
    alpha = float(site.attribute("alpha", 1.6732632 if scaled else 1.0))
    bend = alpha if site.node.op == "Celu" else 1.0
    y = np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / bend)
    return float(site.attribute("gamma", 1.0507010)) * y if scaled else y


def _hard_sigmoid(site: IntervalNode, x: np.ndarray) -> np.ndarray:
    return np.clip(float(site.attribute("alpha", 0.2)) * x + float(site.attribute("beta", 0.5)), 0, 1)


_CURVES: Mapping[str, Curve] = {
    "Sigmoid": lambda site, x: special.expit(x),
    "Tanh": lambda site, x: np.tanh(x),
    "Erf": lambda site, x: special.erf(x),
    "Exp": lambda site, x: np.exp(x),
    "Log": lambda site, x: np.log(np.maximum(x, 0)),
    "Sqrt": lambda site, x: np.sqrt(np.maximum(x, 0)),
    "Softplus": lambda site, x: np.logaddexp(0, x),
    "Softsign": lambda site, x: np.where(np.isinf(x), np.sign(x), x / (1 + np.abs(x))),
    "HardSigmoid": _hard_sigmoid,
    **dict.fromkeys(("Elu", "Celu", "Selu"), _exponential),
}

# Functions with one dip: f, a place right of the dip from which on f increases, the least value.
_SWISH = (lambda x: x * special.expit(x), -1.27, -0.278465)
_HARD_SWISH = (lambda x: x * np.clip(x / 6 + 0.5, 0, 1), -1.5, -0.375)
_GELU = (lambda x: x * special.ndtr(x), -0.75, -0.169972)
_GELU_TANH = (lambda x: x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))), -0.75, -0.170041)


def _dip(
    x: Interval, form: _Format, f: Callable[[Any], Any], turn: float, least: float, keeps: bool = False
) -> Interval:
    """`keeps` says that it is a product with a factor that is not negative, and so keeps the sign."""
    low = np.where(x.low < turn, least, f(x.low))
    return _widened(low, np.where(x.high <= 0, 0, f(x.high)), form, _DIP, x, keeps)


def _gelu(site: IntervalNode) -> Interval:
    curve = _GELU_TANH if site.attribute("approximate", "none") == "tanh" else _GELU
    return _dip(site.at(0), site.format, *curve)


def _swish(site: IntervalNode) -> Interval | None:
    """Swish and QuickGelu: x sigmoid(alpha x), which is swish(alpha x) / alpha."""
    alpha = float(site.attribute("alpha", 1.702 if site.op == "QuickGelu" else 1.0))
    if alpha <= 0:
        return None
    found = _silu(site, _constant(alpha, alpha))
    return _rounded(found.low / alpha, found.high / alpha, site.format)


def _scaled_silu(site: IntervalNode) -> Interval:
    alpha = float(site.attribute("alpha", 1.0))
    return _silu(site, site.at(1) if site.has(1) else _constant(alpha, alpha))


def _silu(site: IntervalNode, scale: Interval) -> Interval:
    """z sigmoid(z) of z = scale x."""
    return _dip(_corners(_times, site.at(0), scale, site.format), site.format, *_SWISH, keeps=True)


def _where(site: IntervalNode) -> Interval:
    condition, a, b = site.operands()
    both, yes, no = a.union(b), condition.low > 0, condition.high <= 0
    low = np.where(yes, a.low, np.where(no, b.low, both.low))
    return Interval(low, np.where(yes, a.high, np.where(no, b.high, both.high)))


def _cast(site: IntervalNode) -> Interval | None:
    x, source = site.at(0), _info(site.shapes, site.node.inputs[0]).dtype
    target = _info(site.shapes, site.node.outputs[0]).dtype
    if source is None or target is None or target.kind == "b":
        return None
    if target.kind in "iu":
        return x.map(np.trunc) if np.abs(x.high).max() < 2.0**63 else None
    return _rounded(x.low, x.high, site.format)


def _dropout(site: IntervalNode) -> Interval | None:
    training = site.constant(2)
    return site.at(0) if not site.has(2) or (training is not None and not training.any()) else None


def _increasing(site: IntervalNode) -> Interval | None:
    """A monotone function of one input: what ONNX's reference implementation gives for the bounds."""
    numbers = [value for value in site.attributes.values() if isinstance(value, (int, float))]
    if min(numbers, default=0) < 0:
        return None
    x, opset = site.at(0), site.model.opset
    slack = site.format.eps if numbers else 0.0  # a parameter may be rounded to the tensor's type
    low = np.where(np.isinf(x.low), x.low, x.low - slack * np.abs(x.low))
    high = np.where(np.isinf(x.high), x.high, x.high + slack * np.abs(x.high))
    try:
        evaluator = ReferenceEvaluator(site.node.proto(opset), opsets={"": opset})
        (least,), (most,) = (evaluator.run(None, {site.inputs[0]: bound}) for bound in (low, high))
    except Exception:  # what the reference implementation lacks costs knowledge, no more
        return None
    number = _CURVE * (1 + sum(numbers))
    return _widened(np.asarray(least), np.asarray(most), site.format, number, x, site.key in _KEEPING_ZERO)


_ELEMENTWISE_RULES: Mapping[str, IntervalRule] = {
    "Dropout": _dropout,
    "Relu": lambda site: site.at(0).map(lambda bound: np.maximum(bound, 0)),
    "Max": _extreme(np.maximum),
    "Min": _extreme(np.minimum),
    "Clip": _clip,
    "Where": _where,
    "Cast": _cast,
    **dict.fromkeys(("Add", "Sum"), _total),
    "Sub": lambda site: _add(site.operands()[0], _neg(site.operands()[1]), site.format),
    "Mul": _mul,
    "Div": _div,
    "Neg": lambda site: _neg(site.at(0)),
    "Abs": lambda site: _absolute(site.at(0)),
    "Pow": _pow,
    **{op: _curve(function) for op, function in _CURVES.items()},
    **dict.fromkeys(("LeakyRelu", "PRelu"), _leaky),
    "HardSwish": lambda site: _dip(site.at(0), site.format, *_HARD_SWISH, keeps=True),
    "Gelu": _gelu,
    "com.microsoft::Gelu": _gelu,
    "Swish": _swish,
    "com.microsoft::QuickGelu": _swish,
    "com.microsoft::ScaledSiLU": _scaled_silu,
    "Softmax": lambda site: _widened(np.zeros(()), np.ones(()), site.format, _CURVE, _UNBOUNDED),
}


def _filled(site: IntervalNode) -> Interval:
    stored = site.attribute("value")
    value = 0.0 if stored is None else float(stored.item())
    return _constant(value, value)


# ---- windows and reductions ------------------------------------------------------------------------------


def _spatial(x: Interval) -> range:
    return range(min(2, x.low.ndim), x.low.ndim)


def _max_pool(site: IntervalNode) -> Interval:
    found = site.at(0).hull(_spatial(site.at(0)))
    dilated = any(d > 1 for d in site.attribute("dilations", ()))
    return Interval(found.low - math.inf, found.high) if dilated and site.padded else found


def _average_pool(site: IntervalNode) -> Interval:
    x = site.at(0).hull(_spatial(site.at(0)))
    dilated = any(d > 1 for d in site.attribute("dilations", ()))
    if site.padded and (site.attribute("count_include_pad", 0) or dilated):
        x = x.union(_ZERO)
    return _mean(x, (), math.prod(site.attribute("kernel_shape", ())), site.format)


def _count(site: IntervalNode, axes: Iterable[int]) -> int | None:
    """How many values lie along these axes of the first input."""
    dims = site.dims(0)
    sizes = None if dims is None else _static([dims[axis] for axis in axes])
    return None if sizes is None else math.prod(sizes)


def _reduced(site: IntervalNode, x: Interval, axes: tuple[int, ...]) -> Interval:
    count, form = _count(site, axes), site.format
    if site.node.op in ("ReduceMax", "GlobalMaxPool"):
        return x.map(lambda bound: bound.max(axes, keepdims=True))
    if site.node.op == "ReduceMin":
        return x.map(lambda bound: bound.min(axes, keepdims=True))
    mean = _mean(x, axes, count or _POSITIONS, form)
    if site.node.op in ("ReduceMean", "GlobalAveragePool"):
        return mean
    many = np.asarray(math.inf if count is None else count)
    total = mean.map(lambda bound: _times(bound, many))
    return total if count is not None else total.union(_ZERO)


def _global_pool(site: IntervalNode) -> Interval:
    x = site.at(0)
    return _reduced(site, x, tuple(_spatial(x)))


def _reduce(site: IntervalNode) -> Interval | None:
    x = site.at(0)
    rank = x.low.ndim
    axes = site.integers(1, "axes")
    if axes is None and site.has(1):
        return x.hull() if site.node.op in ("ReduceMax", "ReduceMin") else None
    if not axes and site.attribute("noop_with_empty_axes", 0):
        return x
    if _info(site.shapes, site.node.inputs[0]).shape is None:
        return _reduced(site, x, ())
    over = tuple(sorted({axis % rank for axis in axes})) if axes else tuple(range(rank))
    found = _reduced(site, x, over)
    return found if site.attribute("keepdims", 1) else found.map(lambda bound: bound.squeeze(over))


# ---- moving values ---------------------------------------------------------------------------------------


def _concat(site: IntervalNode) -> Interval:
    parts = [site.at(slot) for slot in range(len(site.node.inputs))]
    rank = parts[0].low.ndim
    if rank == 0 or any(part.low.ndim != rank for part in parts):
        return functools.reduce(Interval.union, [part.hull() for part in parts])
    axis = site.axis("axis", 1, rank)
    sizes = _static([dims[axis] if (dims := site.dims(slot)) else None for slot in range(len(parts))])
    others = np.broadcast_shapes(*(part.hull([axis]).shape for part in parts))
    if sizes is None or sum(sizes) * math.prod(others) > LIMIT:
        return functools.reduce(Interval.union, [part.hull([axis]) for part in parts])
    shapes = [(*others[:axis], size, *others[axis + 1 :]) for size in sizes]

    def joined(bounds: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.broadcast_to(b, s) for b, s in zip(bounds, shapes, strict=True)], axis)

    return Interval(joined(part.low for part in parts), joined(part.high for part in parts))


def _split(site: IntervalNode) -> list[Interval]:
    x, outputs = site.at(0), site.node.outputs
    if x.low.ndim == 0:
        return [x] * len(outputs)
    axis = site.axis("axis", 0, x.low.ndim)
    shapes = [_info(site.shapes, tensor).shape for tensor in outputs]
    sizes = site.integers(1, "split") or _static([s[axis] if s else None for s in shapes])
    if sizes is None or len(sizes) != len(outputs) or sum(sizes) != x.shape[axis]:
        return [x.hull([axis])] * len(outputs)
    cuts = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(x.low, cuts, axis), np.split(x.high, cuts, axis), strict=True)
    return [Interval(low, high) for low, high in pairs]


def _slice(site: IntervalNode) -> Interval:
    x = site.at(0)
    starts, ends = (site.integers(i, name) for i, name in ((1, "starts"), (2, "ends")))
    axes, steps = site.integers(3, "axes"), site.integers(4, "steps")
    unknown = (axes is None and site.has(3)) or (steps is None and site.has(4))
    if starts is None or ends is None or unknown or x.low.ndim == 0:
        return x.hull()
    window = [slice(None)] * x.low.ndim
    for i, axis in enumerate(axes or range(len(starts))):
        if x.shape[axis] != 1:
            window[axis] = slice(starts[i], ends[i], steps[i] if steps else 1)
    return x.map(lambda bound: bound[tuple(window)])


def _gather(site: IntervalNode) -> Interval:
    x, indices = site.at(0), site.constant(1)
    shape = _info(site.shapes, site.node.inputs[1]).shape if indices is None else indices.shape
    if x.low.ndim == 0 or shape is None:
        return x.hull()
    axis = site.axis("axis", 0, x.low.ndim)
    if indices is None or x.shape[axis] == 1:
        x, indices = x.hull([axis]), np.zeros((1,) * len(shape), np.int64)
    return x.map(lambda bound: bound.take(indices, axis))


def _pad(site: IntervalNode) -> Interval:
    x, rank = site.at(0), site.at(0).low.ndim
    filled = site.attribute("mode", "constant") == "constant"
    number = float(site.attribute("value", 0.0))
    value = site.at(2).hull() if site.has(2) else _constant(number, number)
    pads, axes = site.integers(1, "pads"), site.integers(3, "axes")
    if pads is None or rank == 0 or (axes is None and site.has(3)):
        return x.hull().union(value) if filled else x.hull()
    places = range(rank) if axes is None else [axis % rank for axis in axes]
    sides = [(a, pads[i], pads[i + len(places)]) for i, a in enumerate(places)]
    for axis, before, after in sorted(sides, key=lambda side: side[0] == 1):  # channels are laid out last
        if filled:
            x = _extended(x, axis, (before, after), value, (site.dims(0) or ())[axis])
        elif before or after:
            x = x.hull([axis])
    return x


def _extended(x: Interval, axis: int, sides: tuple[int, int], value: Interval, dim: Dim) -> Interval:
    """An axis with `value` before and behind: index by index if it is the channels' or has its own bounds."""
    if sides == (0, 0):
        return x
    size = x.shape[axis] if x.shape[axis] != 1 or axis != 1 else dim
    if not isinstance(size, int) or (size == 1 and axis != 1) or max(sides) + size > LIMIT:
        return x.hull([axis]).union(value)
    first, last = max(-sides[0], 0), size - max(-sides[1], 0)

    def laid(bound: np.ndarray, fill: np.ndarray) -> np.ndarray:
        full = np.broadcast_to(bound, (*bound.shape[:axis], size, *bound.shape[axis + 1 :]))
        kept = full.take(np.arange(first, last), axis)
        widths = [(0, 0)] * axis + [(max(sides[0], 0), max(sides[1], 0))] + [(0, 0)] * (bound.ndim - axis - 1)
        return np.pad(kept, widths, constant_values=float(fill))

    return Interval(laid(x.low, value.low), laid(x.high, value.high))


def _resize(site: IntervalNode) -> Interval | None:
    x, mode = site.at(0), site.attribute("mode", "nearest")
    corner = site.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    if mode not in ("nearest", "linear", "bilinear") or corner or site.attribute("antialias", 0):
        return None
    before, after = site.dims(0), _info(site.shapes, site.node.outputs[0]).shape
    if before is None or after is None:
        found = x.hull()
    else:
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is None or a != b]
        found = x.hull(changed)
    return found if mode == "nearest" else _mean(found, (), 32, site.format)


def _transpose(site: IntervalNode) -> Interval:
    x = site.at(0)
    return x if x.low.ndim == 0 else x.map(lambda bound: bound.transpose(site.attribute("perm", None)))


def _reshape(site: IntervalNode) -> Interval:
    """Reshape, Flatten, Squeeze, Unsqueeze: axes that come through whole keep their bounds; those that are
    joined or cut are written out, if their sizes are known."""
    x, before = site.at(0), site.dims(0)
    after = _info(site.shapes, site.node.outputs[0]).shape
    if before is None or after is None:
        return x.hull()
    inner: list[int] = []
    outer: list[int] = []
    for old, new in _matched(before, after):
        sizes, fresh = list(x.shape[old]), [1] * len(after[new])
        whole, written = _static(before[old]), _static(after[new])
        if any(n != 1 for n in sizes):
            if len(sizes) == len(fresh) == 1:
                fresh = sizes
            elif whole is not None and written is not None:
                sizes, fresh = whole, written
            else:
                sizes = [1] * len(sizes)
        inner, outer = inner + sizes, outer + fresh
    if math.prod(inner) > LIMIT:
        return x.hull()
    x = x.hull(i for i, n in enumerate(inner) if n == 1)
    return x.map(lambda bound: np.broadcast_to(bound, inner).reshape(outer))


def _static(dims: Iterable[Dim]) -> list[int] | None:
    """Sizes that are all numbers."""
    sizes = list(dims)
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None


def _matched(before: Dims, after: Dims) -> list[tuple[slice, slice]]:
    """Runs of axes that hold the same indices, from the left and, behind what is unknown, from the right."""
    left = _prefixes(before, after)
    i, j = left[-1] if left else (0, 0)
    right = _prefixes(before[i:][::-1], after[j:][::-1])
    ends = [(len(before) - a, len(after) - b) for a, b in reversed(right)]
    marks = [(0, 0), *left, *ends, (len(before), len(after))]
    pairs = itertools.pairwise(marks)
    return [(slice(a, c), slice(b, d)) for (a, b), (c, d) in pairs if (a, b) != (c, d)]


def _prefixes(before: Dims, after: Dims) -> list[tuple[int, int]]:
    """Lengths of first axes that have equal products."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        p, q = before[i], after[j]
        i, j = i + 1, j + 1
        while p != q and isinstance(p, int) and isinstance(q, int):
            longer, k = (before, i) if p < q else (after, j)
            factor = longer[k] if k < len(longer) else None
            if not isinstance(factor, int):
                return found
            p, q, i, j = (p * factor, q, i + 1, j) if p < q else (p, q * factor, i, j + 1)
        if p is None or p != q:
            return found
        found.append((i, j))
    return found


# ---- the rules -------------------------------------------------------------------------------------------


def _picked(site: IntervalNode) -> Interval:
    return site.at(0).hull()


def _picked_or_zero(site: IntervalNode) -> Interval:
    return site.at(0).hull().union(_ZERO)


_SHAPE_RULES: Mapping[str, IntervalRule] = {
    **dict.fromkeys(("Identity", "Expand"), lambda site: site.at(0)),
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Tile", "GatherElements", "GatherND", "Compress"), _picked),
    "ConstantOfShape": _filled,
    "MaxPool": _max_pool,
    "GlobalMaxPool": _global_pool,
    "ReduceMax": _reduce,
    "ReduceMin": _reduce,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
}


# Operators that compute no new integers, which may wrap around; what a cast can't hold its own rule drops.
_SELECTING = {*OPS.having(Trait.SELECTS), ("", "Cast")}
_KEEPING_ZERO = OPS.having(Trait.KEEPS_ZERO)


def _default(op: Op) -> IntervalRule | None:
    if op.operands != 1:
        return None
    if op.kind is Kind.MOVE and Trait.SELECTS in op.traits:
        return _picked if Trait.SAME_ELEMENTS in op.traits else _picked_or_zero
    return _increasing if Trait.MONOTONE in op.traits else None


RULES = Facet(
    keyed({**_LINEAR_RULES, **_ELEMENTWISE_RULES, **_SHAPE_RULES}),
    _default,
    lambda op: "those of its type alone: no rule",
)
"""By operator: bounds of its outputs, None for what is not known."""

__all__ = ["LIMIT", "RULES", "Interval", "intervals"]
