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

import numpy as np

from onnxfuse.analysis.intervals import interval
from onnxfuse.analysis.intervals.elementwise_rules import ELEMENTWISE_RULES, increasing
from onnxfuse.analysis.intervals.interval import FORMATS, Interval
from onnxfuse.analysis.intervals.linear_rules import LINEAR_RULES
from onnxfuse.analysis.intervals.node import IntervalNode, IntervalRule, type_info
from onnxfuse.analysis.intervals.rounding import clean, fitted, unbounded
from onnxfuse.analysis.intervals.shape_rules import SHAPE_RULES, picked, picked_or_zero
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Tensor
from onnxfuse.ir.shapes import Shapes, TensorInfo
from onnxfuse.ops.facet import Facet, keyed
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.table import OPS, Kind, Op, Trait


def intervals(model: Model, shapes: Shapes) -> dict[str, Interval]:
    """Bounds of every tensor of the main graph, by name.

    Args:
        model: the model.
        shapes: of its tensors, as `Model.shapes` or `analysis.cost.shapes_at` gives them. They are believed:
            where they have the sizes of one feed, the bounds hold for feeds of those sizes. Where a file may
            declare inner tensors wrongly, `Model.proven` is the one to give.
    """
    known: dict[str, Interval] = {}
    with np.errstate(all="ignore"):
        for tensor in model.tensors():
            if model.is_weight(tensor):
                known[tensor.name] = _stored(model, tensor)
            elif model.producer(tensor) is None:
                known[tensor.name] = unbounded(type_info(shapes, tensor))
        for node in model.nodes:
            if node.constant_form is None:
                results = node_results(IntervalNode(model, node, shapes, known))
                for tensor, found in zip(node.outputs, results, strict=False):
                    known[tensor.name] = fitted(found, type_info(shapes, tensor), node.key in _SELECTING)
    known.pop("", None)
    return known


def node_results(site: IntervalNode) -> list[Interval | None]:
    """Bounds of each output of a node, None for what its rule does not tell."""
    rule = RULES.get(site.key)
    try:
        found = None if rule is None else rule(site)
    except (ValueError, IndexError):  # sizes that contradict each other, from a file that declares wrong ones
        found = None
    results = [found] if found is None or isinstance(found, Interval) else list(found)
    return results + [None] * (len(site.node.outputs) - len(results))


def _stored(model: Model, tensor: Tensor) -> Interval:
    """A constant: its values, or the least and the largest of a large one."""
    dtype, shape = weight_type(model, tensor)
    value = model.weight(tensor) if dtype.kind in "biuf" or dtype.name in FORMATS else None
    if value is None or value.size == 0:
        return unbounded(TensorInfo(tensor.name, None, shape))
    if value.size > interval.MOST_INDICES:
        exact = Interval(*(np.full((1,) * value.ndim, float(v)) for v in (value.min(), value.max())))
    else:
        array = value.astype(np.float64)
        exact = Interval(array, array)
    return clean(exact.low, exact.high)


# Operators that compute no new integers, which may wrap around; what a cast can't hold its own rule drops.
_SELECTING = {*OPS.having(Trait.SELECTS), ("", "Cast")}


def _default(op: Op) -> IntervalRule | None:
    if op.operands != 1:
        return None
    if op.kind is Kind.MOVE and Trait.SELECTS in op.traits:
        return picked if Trait.SAME_ELEMENTS in op.traits else picked_or_zero
    return increasing if Trait.MONOTONE in op.traits else None


RULES = Facet(
    keyed({**LINEAR_RULES, **ELEMENTWISE_RULES, **SHAPE_RULES}),
    _default,
    lambda op: "those of its type alone: no rule",
)
"""By operator: bounds of its outputs, None for what is not known."""
