"""Small tensors of integers, and which of their elements are lengths of axes.

Reshape targets, Split sizes, Slice bounds come as constants, or are put together from `Shape`, `Gather`,
`Concat` and arithmetic. A cut must know of each such number whether it follows the axis by itself. So these
tensors are evaluated on the side, by ONNX's reference implementation at the sizes of one run, and every
element carries a tag: None, it is the same in every run; a `Axis`, it is the length of that axis; a `Mixed`,
it is computed from lengths in some other way.

Operators that only move elements (`MOVING`) are applied to the elements' places too, which tells where each
tag goes. After element-wise ones a tag depends on all it meets, but for the choices of a `Where` and
comparisons that no length can pass. A tensor whose own shape depends on lengths is none of these lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxfuse.channels.dims import Axis
from onnxfuse.ir.nodes import Constant, Node
from onnxfuse.ops.table import OPS, Kind, Trait

LARGEST = 4096
"""Elements of a tensor worth evaluating."""

_STORED = 256  # elements of a stored integer tensor that may be such a list
_SCALAR_TYPES = "fiub"

_EVALUATED = OPS.having(Trait.SIZES)

MOVING = (_EVALUATED.of_kind(Kind.MOVE) | _EVALUATED.having(Trait.SAME_ELEMENTS)).names
"""Operators that only move elements of their data: all inputs of Concat, the first of others."""

COPYING = _EVALUATED.of_kind(Kind.ELEMENTWISE).having(Trait.CARRIES_WEIGHTS)
"""Operators that hand a list on as it is, perhaps in another type."""

_ELEMENTWISE = _EVALUATED.of_kind(Kind.ELEMENTWISE, Kind.ACTIVATION).names - MOVING
_MAKING = _EVALUATED.of_kind(Kind.FILL).names


@dataclass(frozen=True)
class Mixed:
    """A number computed from the lengths of these axes, but the length of none."""

    dims: frozenset[Axis]


Tag = Axis | Mixed | None


@dataclass(frozen=True)
class Numbers:
    """A tensor evaluated on the side: its value at the sizes of one run, and a tag for each element."""

    value: np.ndarray
    tags: np.ndarray

    def depends(self) -> frozenset[Axis]:
        """The axes whose lengths the value depends on."""
        return frozenset().union(*map(dims_of, self.tags.flat))

    @property
    def fixed(self) -> bool:
        """Whether it is the same in every run."""
        return all(tag is None for tag in self.tags.flat)


def dims_of(tag: Tag) -> frozenset[Axis]:
    """The axes that a tag is about."""
    if tag is None:
        return frozenset()
    return frozenset((tag,)) if isinstance(tag, Axis) else tag.dims


def of_constant(value: np.ndarray) -> Numbers:
    """A constant."""
    return Numbers(value, np.full(value.shape, None, object))


def worth_reading(dtype: np.dtype, shape: Sequence[int]) -> bool:
    """Whether a stored tensor of this type and shape may hold lengths, bounds or a factor for them."""
    size = math.prod(shape)
    return (dtype.kind in "iub" and dtype.itemsize != 1 and size <= _STORED) or (
        dtype.kind in _SCALAR_TYPES and size == 1
    )


def of_shape(axes: Sequence[Axis]) -> Numbers:
    """The output of Shape."""
    tags = np.empty(len(axes), object)
    tags[:] = axes
    return Numbers(np.array([d.size for d in axes], np.int64), tags)


def size_product(shape: Numbers) -> Numbers:
    """The output of Size."""
    dims = shape.depends()
    tag = Mixed(dims) if dims else None
    return Numbers(np.array(shape.value.prod(), np.int64), np.array(tag, object))


def evaluate_lengths(node: Node, inputs: Sequence[Numbers | None], opset: int) -> list[Numbers] | None:
    """The outputs of a node for small tensors of numbers; None where some input is not known or the operator
    is not one for such tensors.

    Args:
        node: the node.
        inputs: its inputs; None for one that is absent or not known.
        opset: of the model.
    """
    if node.key not in _EVALUATED:
        return None
    data = len(inputs) if node.op in _ELEMENTWISE or node.op == "Concat" else 0 if node.op in _MAKING else 1
    if any(n is not None and not n.fixed for n in inputs[data:]):
        return None
    feed = {t.name: n.value for t, n in zip(node.inputs, inputs, strict=True) if n is not None}
    outputs = _run(node, feed, opset)
    if outputs is None or any(value.size > LARGEST for value in outputs):
        return None
    known = [n for n in inputs[:data] if n is not None]
    if all(n.fixed for n in known):
        return [of_constant(value) for value in outputs]
    if node.op in MOVING:
        moved = _moved(node, inputs[:data], feed, opset)
        return None if moved is None else list(map(Numbers, outputs, moved))
    if node.op in _ELEMENTWISE:
        return [Numbers(outputs[0], _met(node, known, outputs[0]))]
    tag = Mixed(known[0].depends())
    return [Numbers(value, np.full(value.shape, tag, object)) for value in outputs]


def _run(node: Node, feed: Mapping[str, np.ndarray], opset: int) -> list[np.ndarray] | None:
    proto = helper.make_node(
        node.op, [t.name for t in node.inputs], [t.name or f"unused {i}" for i, t in enumerate(node.outputs)]
    )
    for key, value in node.attrs.items():
        if isinstance(value, Constant):
            value = numpy_helper.from_array(value.values)
        proto.attribute.append(helper.make_attribute(key, value))
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(proto, opsets={"": opset}).run(None, dict(feed))
    except Exception:  # the reference implementation lacks some forms; then the value is simply not known
        return None
    return [np.asarray(value) for value in found]


def _moved(
    node: Node, data: Sequence[Numbers | None], feed: Mapping[str, np.ndarray], opset: int
) -> list[np.ndarray] | None:
    """The tags where the operator puts them: it is run on the elements' places instead of the elements."""
    placed = dict(feed)
    tags: list[Tag] = []
    for tensor, known in zip(node.inputs, data, strict=False):
        # One tensor in two places keeps the first numbers: they stand for the same tags.
        if known is not None and placed[tensor.name] is known.value:
            placed[tensor.name] = np.arange(known.value.size).reshape(known.value.shape) + len(tags)
            tags.extend(known.tags.flat)
    places = _run(node, placed, opset)
    if places is None:
        return None
    flat = np.empty(len(tags), object)
    flat[:] = tags
    return [flat[p.astype(np.int64).reshape(-1)].reshape(p.shape) for p in places]


def _met(node: Node, known: Sequence[Numbers], result: np.ndarray) -> np.ndarray:
    """Tags after an element-wise operator."""
    shape = result.shape
    tags = [np.broadcast_to(n.tags, shape) for n in known]
    values = [np.broadcast_to(n.value, shape) for n in known]
    found = np.empty(shape, object)
    for at in np.ndindex(shape):
        found[at] = _tag(node.op, [t[at] for t in tags], [v[at] for v in values])
    return found


def _tag(op: str, tags: Sequence[Any], values: Sequence[Any]) -> Tag:
    if op == "Where" and tags[0] is None:
        return tags[1] if values[0] else tags[2]
    if op == "Cast":
        return tags[0]
    if op == "Equal" and any(t is None and v < 0 for t, v in zip(tags, values, strict=True)):
        return None  # no length is negative
    dims: frozenset[Axis] = frozenset().union(*map(dims_of, tags))
    return Mixed(dims) if dims else None
