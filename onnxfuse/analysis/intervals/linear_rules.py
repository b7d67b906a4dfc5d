"""Intervals through operators that are affine with stored weights.

A bound of y = W x + b takes for each product the bound of x that makes it largest; `rounding.sums` adds them
up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxfuse.analysis.intervals.interval import UNBOUNDED, ZERO, Format, Interval
from onnxfuse.analysis.intervals.node import IntervalNode, IntervalRule
from onnxfuse.analysis.intervals.rounding import scaled_by, sums
from onnxfuse.ops.channel_affine import training_mode
from onnxfuse.ops.linear import WEIGHTED, LinearOp, linear_op

_BLOCK = 1 << 20  # products of weights and bounds in memory at a time
_LARGEST = 1 << 26  # weights of one operator that is looked at


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
        x = x.union(ZERO)  # an edge has fewer terms
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


def _dense(op: LinearOp, x: Interval, bias: np.ndarray, form: Format, extra: int) -> Interval:
    """Bounds per output, (out,)."""
    rows, inner = op.out_features, op.in_features // op.groups
    weight = op.weight.reshape(rows, inner, -1)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return UNBOUNDED.map(lambda bound: np.full(rows, bound))
    grouped = x.map(lambda bound: bound.reshape(op.groups, inner, 1))
    step = max(1, _BLOCK // op.columns)
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = np.arange(rows)[part] // (rows // op.groups)
        used = Interval(grouped.low[groups], grouped.high[groups])
        products = scaled_by(weight[part], used).map(lambda bound: bound.reshape(len(bound), -1))
        own = bias[part]
        if extra > 1:  # then the bias is a product as well
            products = Interval(*(np.column_stack([side, own]) for side in (products.low, products.high)))
            own = np.zeros(len(own))
        parts.append(sums(products, own, form, extra))
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
    scaled = scaled_by(scale, x)
    terms = [np.broadcast_arrays(bound, -scale * mean, beta) for bound in (scaled.low, scaled.high)]
    products = Interval(*(np.stack(parts[:2], -1) for parts in terms))
    y = sums(products, terms[0][2], site.format, 5)
    return y if rank else y.hull()


LINEAR_RULES: Mapping[str, IntervalRule] = {
    **dict.fromkeys(WEIGHTED, _affine),
    "BatchNormalization": _batch_norm,
}
