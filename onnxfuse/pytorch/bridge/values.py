"""What flows through an import: values, and the call that a rule sees.

An ONNX tensor becomes one of three things on its way to PyTorch:

- a *tensor*: a torch.fx node that yields a `torch.Tensor`;
- a *host* value: an object array of Python numbers, or of torch.fx nodes that yield them. Shapes are such
  values. Shape -> Gather -> Mul -> Concat -> Reshape then costs nothing when the module runs: what is left
  of it is `x.reshape([x.size(0) * 2, -1])`. Batches stay dynamic, and torch.export sees plain sizes;
- a *stored* value: an initializer or Constant, fetched as a Parameter or buffer where a tensor is wanted, and
  read at import where an operator wants plain numbers (axes, pads, shapes).

NumPy moves host values about (take, concatenate, reshape), whatever their elements are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import fx, nn

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.protos import as_default
from onnxfuse.pytorch.bridge.operator import Operator

Host = np.ndarray
"""An object array of numbers and of torch.fx nodes that yield numbers."""

MOST_ON_HOST = 1024
"""Elements of an integer constant up to which it may become a host value."""


@dataclass(eq=False)
class Value:
    """One ONNX tensor during an import; `rank` and `dtype` are None where nothing says.

    Attributes:
        node: the tensor; for a stored or host value, once it was wanted as one.
        host: the numbers, where they are known on the host.
        load: reads a stored value.
        key: where a stored value is registered in the module.
        trainable: whether it is a Parameter.
        sizes: its shape, of a stored value, or what the file says of it; None for an open axis.
    """

    name: str
    dtype: torch.dtype | None = None
    rank: int | None = None
    node: fx.Node | None = None
    host: Host | None = None
    load: Callable[[], np.ndarray] | None = None
    key: str | None = None
    trainable: bool = False
    sizes: tuple[int | None, ...] | None = None

    @property
    def stored(self) -> bool:
        return self.load is not None


def object_array(elements: Any) -> Host:
    """An object array of nested sequences of numbers and nodes, never of sequences."""
    array = np.empty(_shape_of(elements), object)
    array[...] = elements
    return array


def _shape_of(elements: Any) -> tuple[int, ...]:
    if isinstance(elements, np.ndarray):
        return elements.shape
    if isinstance(elements, (list, tuple)):
        return (len(elements), *(_shape_of(elements[0]) if elements else ()))
    return ()


def is_fixed(host: Host) -> bool:
    """Whether all elements are numbers already."""
    return not any(isinstance(element, fx.Node) for element in host.flat)


class Scope(Protocol):
    """The graph being built, as far as a rule needs it."""

    graph: fx.Graph

    def tensor(self, value: Value) -> fx.Node:
        """The value as a tensor."""

    def host(self, value: Value) -> Host | None:
        """The numbers of the value, if they are known on the host: shapes, and small constants."""

    def size(self, node: fx.Node, axis: int) -> fx.Node:
        """The node that yields one size of a tensor."""

    def module(self, module: nn.Module, operator: Operator, args: tuple[Any, ...]) -> fx.Node:
        """A call of a module, registered under the name of its node."""

    def body(self, key: str, operator: Operator) -> tuple[fx.GraphModule, list[Any]]:
        """A body as a module, and the arguments to call it with: what it captures."""

    def inline(self, key: str, operator: Operator) -> list[Value]:
        """The outputs of a body that is run right here."""

    def device(self) -> fx.Node:
        """The node that yields the device of the first input."""


class Call:
    """One node being imported, as its rule sees it: inputs by position, attributes, ways to emit torch."""

    def __init__(self, scope: Scope, operator: Operator, inputs: Sequence[Value | None], opset: int) -> None:
        self.scope = scope
        self.operator = operator
        self.inputs = list(inputs)
        self.opset = opset

    # what the node says

    def has(self, index: int) -> bool:
        """Whether the optional input is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            self.refuse(f"input {index} is missing")
        return found

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute; where it is not given, the default in ONNX's precision (`ir.protos.as_default`)."""
        attributes = self.operator.attributes
        return attributes[name] if name in attributes else as_default(default)

    @property
    def outputs(self) -> int:
        """The number of outputs listed, optional ones that are left out included."""
        return len(self.operator.outputs)

    def wants(self, index: int) -> bool:
        """Whether some node may use that output."""
        return index < self.outputs and bool(self.operator.outputs[index])

    def refuse(self, reason: str) -> NoReturn:
        """Raise a NotApplicableError that names the node."""
        raise NotApplicableError(f"node {self.operator.label} can't be imported to PyTorch: {reason}")

    def rank(self, index: int) -> int | None:
        return self.value(index).rank

    def known_sizes(self, index: int) -> tuple[int | None, ...] | None:
        """The sizes of an input as far as the import knows them: for what depends on one being 0 or 1."""
        return self.value(index).sizes

    def dtype(self, index: int) -> torch.dtype | None:
        return self.value(index).dtype

    def type_name(self, index: int) -> str:
        """The element type of an input in messages, also where torch lacks it."""
        found = self.value(index)
        if found.dtype is not None:
            return str(found.dtype).removeprefix("torch.")
        return str(found.load().dtype) if found.load is not None else "an unknown type"

    # inputs in the form that a rule wants

    def tensor(self, index: int) -> fx.Node:
        """The input as a tensor."""
        return self.scope.tensor(self.value(index))

    def optional(self, index: int) -> fx.Node | None:
        """The input as a tensor, None where it is left out."""
        return self.tensor(index) if self.has(index) else None

    def tensors(self) -> list[fx.Node]:
        return [self.tensor(index) for index in range(len(self.inputs)) if self.has(index)]

    def host(self, index: int) -> Host | None:
        """The input's numbers where they are known on the host, else None."""
        return self.scope.host(self.value(index))

    def numbers(self, index: int) -> list[Any]:
        """A 1-D (or 0-D) input as a list of numbers, or of nodes that yield them.

        Raises:
            NotApplicableError: it is computed from tensors.
        """
        found = self.host(index)
        if found is None and self.value(index).stored:
            found = object_array(self.static(index).tolist())
        if found is None:
            self.refuse(f"input '{self.value(index).name}' must not be computed from data")
        return list(found.reshape(-1))

    def sizes(self, index: int) -> list[Any] | fx.Node:
        """The list of `numbers`; for what is computed from tensors, a node that yields it when it runs."""
        if self.host(index) is None and not self.value(index).stored:
            return self.method("tolist", self.tensor(index))
        return self.numbers(index)

    def static(self, index: int) -> np.ndarray:
        """The value of an input that has to be known at import.

        Raises:
            NotApplicableError: it is not.
        """
        found = self.value(index)
        if found.load is not None:
            return found.load()
        host = self.scope.host(found)
        if host is None or not is_fixed(host):
            self.refuse(f"input '{found.name}' must be a constant")
        return np.array(host.tolist())

    def axes(self, index: int = 1) -> list[int] | None:
        """Axes, which older operator sets give as an attribute and newer ones as an input; None without."""
        if self.has(index):
            return [int(axis) for axis in self.static(index).reshape(-1)]
        found = self.attr("axes")
        return None if found is None else [int(axis) for axis in found]

    # torch

    def emit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function when the module runs."""
        return self.scope.graph.call_function(function, args, kwargs)

    def method(self, name: str, *args: Any) -> fx.Node:
        """A call of a method of the first argument."""
        return self.scope.graph.call_method(name, args)

    def module(self, module: nn.Module, *args: Any) -> fx.Node:
        """A call of a module that holds no weights: where train and eval mode differ, or for bodies."""
        return self.scope.module(module, self.operator, args)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One element of what a node yields."""
        return self.emit(operator.getitem, node, index)

    def device(self) -> fx.Node:
        """The node that yields the device of this graph's tensors."""
        return self.scope.device()

    def shape(self, index: int) -> list[fx.Node] | None:
        """The sizes of an input, as nodes; None where not even its rank is known."""
        rank = self.rank(index)
        if rank is None:
            return None
        return [self.scope.size(self.tensor(index), axis) for axis in range(rank)]

    def body(self, key: str) -> tuple[nn.Module, list[Any]]:
        """The body in that attribute as a module of its own, and the arguments to call it with."""
        return self.scope.body(key, self.operator)

    def inline(self, key: str) -> list[Value]:
        """The outputs of the body in that attribute, run right here."""
        return self.scope.inline(key, self.operator)
