"""Stored weights behind operators that only lay their elements out anew.

PyTorch's exporter writes a linear layer without bias as MatMul(x, Transpose(W)); others put a Reshape, an
Unsqueeze or an Identity in between. Such a chain computes nothing: what is stored is the layer's weight, in
another layout. This module follows the chain up to the stored tensor, and takes values through it both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxfuse.ir.external_data import numpy_dtype
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node, Tensor

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One operator of a chain: a permutation of the axes, or other sizes for the same elements in order.

    Attributes:
        before: sizes of what it reads.
        after: sizes of what it gives.
        perm: the permutation, None where the elements keep their order.
    """

    before: Sizes
    after: Sizes
    perm: Sizes | None = None


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A stored tensor as a node reads it.

    Attributes:
        tensor: the stored one: an initializer, or the output of a Constant.
        dtype: of both.
        shape: as the node reads it.
        steps: from the stored tensor to the node.
    """

    tensor: Tensor
    dtype: np.dtype[Any]
    shape: Sizes
    steps: tuple[Step, ...] = ()

    def laid_out(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The values that the node reads where these are stored."""
        for step in self.steps:
            stored = stored.reshape(step.after) if step.perm is None else stored.transpose(step.perm)
        return stored

    def stored(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The values to store so that the node reads these."""
        for step in reversed(self.steps):
            if step.perm is None:
                values = values.reshape(step.before)
            else:
                values = values.transpose(np.argsort(step.perm))
        return values


def stored_weight(model: Model, tensor: Tensor) -> StoredWeight | None:
    """The stored tensor that a tensor's elements are, each once; None where they are computed.

    Args:
        model: has the tensor.
        tensor: what a node reads.
    """
    first = source(model, tensor)
    if not model.is_weight(first):
        return None
    dtype, shape = weight_type(model, first)
    steps = []
    for node in reversed(list(_chain(model, tensor))):
        step = _LAYOUTS[node.op](model, node, shape, dtype)
        if step is None:
            return None
        if step.perm is not None or step.before != step.after:
            steps.append(step)
        shape = step.after
    return StoredWeight(first, dtype, shape, tuple(steps))


def source(model: Model, tensor: Tensor) -> Tensor:
    """What a tensor's elements are, before everything that may lay them out anew.

    Args:
        model: has the tensor.
        tensor: what a node reads.
    """
    chain = list(_chain(model, tensor))
    return chain[-1].inputs[0] if chain else tensor


def is_stored(model: Model, tensor: Tensor) -> bool:
    """Whether a tensor's elements are those of a stored one, laid out anew perhaps."""
    return model.is_weight(tensor) or stored_weight(model, tensor) is not None


def is_shared(model: Model, tensor: Tensor, node: Node) -> bool:
    """Whether a weight has any user but one input of a node, before or behind what lays it out.

    Args:
        model: has both.
        tensor: the weight, as the node reads it.
        node: the node that reads it.
    """
    for layer in (node, *_chain(model, tensor)):
        read = tensor if layer is node else layer.inputs[0]
        uses = sum(1 for t in layer.inputs if t is read)
        others = any(user is not layer for user in read.outputs)
        if others or uses > 1 or model.captured(read) or model.is_output(read):
            return True
    return False


def readers(model: Model, tensor: Tensor) -> Iterator[tuple[Node, Tensor]]:
    """The nodes that use a stored tensor, each with what it reads: the tensor itself, or what a chain of
    layouts makes of it. A node whose body captures it comes with it, too, and a layout that is an output.

    Args:
        model: has the tensor.
        tensor: a stored one.
    """
    stack = [tensor]
    while stack:
        read = stack.pop()
        for user in model.consumers(read):
            laid = _is_layout(user) and user.inputs[0] is read and read.name not in user.captured
            if laid and stored_weight(model, user.outputs[0]) is not None:
                stack.append(user.outputs[0])
                if not model.is_output(user.outputs[0]):
                    continue
            yield user, read


def weight_type(model: Model, tensor: Tensor) -> tuple[np.dtype[Any], Sizes]:
    """dtype and shape of a stored tensor, without reading its values. ValueError if it is none."""
    stored = tensor
    producer = model.producer(tensor)
    if producer is not None and isinstance(producer.attrs.get("value"), Constant):
        stored = producer.attrs["value"]
    if isinstance(stored, Constant):
        return stored.dtype, tuple(stored.shape)
    value = model.weight(tensor)
    if value is None:
        raise ValueError(f"{tensor.name} is not a weight")
    return value.dtype, value.shape


def _chain(model: Model, tensor: Tensor) -> Iterator[Node]:
    """The operators above a tensor that may be layouts, the nearest first."""
    while (node := model.producer(tensor)) is not None and _is_layout(node):
        yield node
        tensor = node.inputs[0]


def _is_layout(node: Node) -> bool:
    return not node.domain and node.op in _LAYOUTS and bool(node.inputs) and bool(node.inputs[0].name)


# ---- one rule for each operator --------------------------------------------------------------------------


def _integers(model: Model, node: Node, attribute: str) -> list[int] | None:
    """A list that is an attribute in old operator sets and a stored input in new ones; None without one."""
    if attribute in node.attrs:
        return [int(value) for value in node.attrs[attribute]]
    value = model.weight(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if value is None else [int(v) for v in value.reshape(-1)]


def _has_list(node: Node, attribute: str) -> bool:
    return attribute in node.attrs or (len(node.inputs) > 1 and bool(node.inputs[1].name))


def _identity(model: Model, node: Node, shape: Sizes, dtype: np.dtype[Any]) -> Step | None:
    return Step(shape, shape)


def _cast(model: Model, node: Node, shape: Sizes, dtype: np.dtype[Any]) -> Step | None:
    return Step(shape, shape) if numpy_dtype(int(node.attrs["to"])) == dtype else None


def _transpose(model: Model, node: Node, shape: Sizes, dtype: np.dtype[Any]) -> Step | None:
    perm = tuple(int(p) for p in node.attrs.get("perm", range(len(shape))[::-1]))
    if sorted(perm) != list(range(len(shape))):  # of a model that ONNX Runtime refuses
        return None
    return Step(shape, tuple(shape[p] for p in perm), None if perm == tuple(sorted(perm)) else perm)


def _reshape(model: Model, node: Node, shape: Sizes, dtype: np.dtype[Any]) -> Step | None:
    target = _integers(model, node, "shape")
    if target is None:
        return None
    if not node.attrs.get("allowzero", 0):
        if any(size == 0 and place >= len(shape) for place, size in enumerate(target)):
            return None
        target = [shape[place] if size == 0 else size for place, size in enumerate(target)]
    known = math.prod(size for size in target if size != -1)
    if -1 in target and known:
        target[target.index(-1)] = math.prod(shape) // known
    after = tuple(target)
    return Step(shape, after) if -1 not in after and math.prod(after) == math.prod(shape) else None


def _flatten(model: Model, node: Node, shape: Sizes, dtype: np.dtype[Any]) -> Step | None:
    axis = int(node.attrs.get("axis", 1))
    return Step(shape, (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _squeeze(model: Model, node: Node, shape: Sizes, dtype: np.dtype[Any]) -> Step | None:
    axes = _integers(model, node, "axes")
    if axes is None:
        if _has_list(node, "axes"):
            return None
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    gone = {axis % len(shape) for axis in axes}
    return Step(shape, tuple(size for axis, size in enumerate(shape) if axis not in gone))


def _unsqueeze(model: Model, node: Node, shape: Sizes, dtype: np.dtype[Any]) -> Step | None:
    axes = _integers(model, node, "axes")
    if axes is None:
        return None
    rank = len(shape) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(shape)
    return Step(shape, tuple(1 if axis in new else next(rest) for axis in range(rank)))


_Rule = Callable[[Model, Node, Sizes, np.dtype[Any]], Step | None]

_LAYOUTS: Mapping[str, _Rule] = {
    "Identity": _identity,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
