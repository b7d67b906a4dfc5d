"""Intervals through element-wise operators.

Monotone functions take the bounds of their operand; those that first fall and then rise (Swish, Gelu) need
their turning point and least value too. Curves are widened by the error of a runtime's approximation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator
from scipy import special

from onnxfuse.analysis.intervals.interval import CURVE, DIP, UNBOUNDED, Format, Interval, constant
from onnxfuse.analysis.intervals.node import IntervalNode, IntervalRule, type_info
from onnxfuse.analysis.intervals.rounding import clean, corners, rounded_bounds, sums, times
from onnxfuse.ops.linear import is_main_domain
from onnxfuse.ops.table import OPS, Trait


def _add(a: Interval, b: Interval, form: Format) -> Interval:
    return rounded_bounds(a.low + b.low, a.high + b.high, form)


def _neg(x: Interval) -> Interval:
    return Interval(-x.high, -x.low)


def _total(site: IntervalNode) -> Interval:
    terms = site.operands()
    if len(terms) < 3:
        return functools.reduce(lambda a, b: _add(a, b, site.format), terms)
    sides = (np.broadcast_arrays(*(t.low for t in terms)), np.broadcast_arrays(*(t.high for t in terms)))
    products = Interval(*(np.stack(side, -1) for side in sides))
    return sums(products, np.zeros(products.shape[:-1]), site.format, 0)


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
    return corners(times, x, y, site.format)


def _div(site: IntervalNode) -> Interval:
    a, b = site.operands()
    zero = (b.low <= 0) & (b.high >= 0)

    def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        found = np.where((x == 0) | np.isinf(y), 0, x / y)  # inf / inf: the other corners have the ends
        return np.where(zero, 0, found)

    found = corners(divide, a, b, site.format)
    below = zero & ~(((a.low >= 0) & (b.low >= 0)) | ((a.high <= 0) & (b.high <= 0)))
    above = zero & ~(((a.low >= 0) & (b.high <= 0)) | ((a.high <= 0) & (b.low >= 0)))
    return Interval(np.where(below, -math.inf, found.low), np.where(above, math.inf, found.high))


def _absolute(x: Interval) -> Interval:
    return Interval(np.maximum(np.maximum(x.low, -x.high), 0), np.maximum(-x.low, x.high))


def _squared(site: IntervalNode) -> Interval:
    x = _absolute(site.at(0))
    return rounded_bounds(times(x.low, x.low), times(x.high, x.high), site.format)


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
        ends.append(site.at(slot) if site.has(slot) else constant(value, value))
    least, most = ends
    low = np.minimum(np.maximum(x.low, least.low), most.low)
    return Interval(low, np.minimum(np.maximum(x.high, least.high), most.high))


def _leaky(site: IntervalNode) -> Interval:
    alpha = float(site.attribute("alpha", 0.01))
    x, slope = site.operands() if site.node.op == "PRelu" else (site.at(0), constant(alpha, alpha))
    positive = x.map(lambda bound: np.maximum(bound, 0))
    negative = corners(times, x.map(lambda bound: np.minimum(bound, 0)), slope, site.format)
    high = np.maximum(positive.high, negative.high)
    low = np.where(x.low >= 0, positive.low, negative.low)
    return Interval(low, np.where(x.low >= 0, positive.high, np.where(x.high <= 0, negative.high, high)))


def _widened(
    low: np.ndarray, high: np.ndarray, form: Format, number: float, x: Interval, root: bool = False
) -> Interval:
    """Bounds of an approximated function. It is taken never to cross 0 by its error; `root` says f(0) = 0."""
    error = number * form.eps
    wide_low, wide_high = low - error * (1 + np.abs(low)), high + error * (1 + np.abs(high))
    wide_low = np.where(low >= 0, np.fmax(wide_low, 0), wide_low)
    wide_high = np.where((x.high <= 0) & root, np.fmin(wide_high, 0), wide_high)
    return clean(np.where(np.isinf(low), low, wide_low), np.where(np.isinf(high), high, wide_high))


CurveFunction = Callable[[IntervalNode, np.ndarray], np.ndarray]


def _curve(function: CurveFunction) -> IntervalRule:
    """A function that does not decrease, as far as its parameters are not negative."""

    def rule(site: IntervalNode) -> Interval | None:
        alpha, beta, gamma = (float(site.attribute(name, 0)) for name in ("alpha", "beta", "gamma"))
        if min(alpha, gamma) < 0:
            return None
        x, number = site.at(0), CURVE * (1 + alpha + abs(beta) + gamma)
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


_CURVES: Mapping[str, CurveFunction] = {
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
    x: Interval, form: Format, f: Callable[[Any], Any], turn: float, least: float, keeps: bool = False
) -> Interval:
    """`keeps` says that it is a product with a factor that is not negative, and so keeps the sign."""
    low = np.where(x.low < turn, least, f(x.low))
    return _widened(low, np.where(x.high <= 0, 0, f(x.high)), form, DIP, x, keeps)


def _gelu(site: IntervalNode) -> Interval:
    curve = _GELU_TANH if site.attribute("approximate", "none") == "tanh" else _GELU
    return _dip(site.at(0), site.format, *curve)


def _swish(site: IntervalNode) -> Interval | None:
    """Swish and QuickGelu: x sigmoid(alpha x), which is swish(alpha x) / alpha."""
    alpha = float(site.attribute("alpha", 1.702 if site.op == "QuickGelu" else 1.0))
    if alpha <= 0:
        return None
    found = _silu(site, constant(alpha, alpha))
    return rounded_bounds(found.low / alpha, found.high / alpha, site.format)


def _scaled_silu(site: IntervalNode) -> Interval:
    alpha = float(site.attribute("alpha", 1.0))
    return _silu(site, site.at(1) if site.has(1) else constant(alpha, alpha))


def _silu(site: IntervalNode, scale: Interval) -> Interval:
    """z sigmoid(z) of z = scale x."""
    return _dip(corners(times, site.at(0), scale, site.format), site.format, *_SWISH, keeps=True)


def _where(site: IntervalNode) -> Interval:
    condition, a, b = site.operands()
    both, yes, no = a.union(b), condition.low > 0, condition.high <= 0
    low = np.where(yes, a.low, np.where(no, b.low, both.low))
    return Interval(low, np.where(yes, a.high, np.where(no, b.high, both.high)))


def _cast(site: IntervalNode) -> Interval | None:
    x, source = site.at(0), type_info(site.shapes, site.node.inputs[0]).dtype
    target = type_info(site.shapes, site.node.outputs[0]).dtype
    if source is None or target is None or target.kind == "b":
        return None
    if target.kind in "iu":
        return x.map(np.trunc) if np.abs(x.high).max() < 2.0**63 else None
    return rounded_bounds(x.low, x.high, site.format)


def _dropout(site: IntervalNode) -> Interval | None:
    training = site.constant(2)
    return site.at(0) if not site.has(2) or (training is not None and not training.any()) else None


def increasing(site: IntervalNode) -> Interval | None:
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
    number = CURVE * (1 + sum(numbers))
    return _widened(np.asarray(least), np.asarray(most), site.format, number, x, site.key in _KEEPING_ZERO)


ELEMENTWISE_RULES: Mapping[str, IntervalRule] = {
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
    "Softmax": lambda site: _widened(np.zeros(()), np.ones(()), site.format, CURVE, UNBOUNDED),
}
_KEEPING_ZERO = OPS.having(Trait.KEEPS_ZERO)
