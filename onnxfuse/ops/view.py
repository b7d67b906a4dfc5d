"""A node as the rules of an analysis see it: the questions that all of them ask.

Each analysis adds its own: flows, bounds, shapes, axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from onnx import NodeProto, numpy_helper

from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.protos import as_default, attribute_value, operator_key
from onnxfuse.ops.table import Key

TO_THE_END = 2**31 - 1
"""A Slice bound of this size or more lies behind every axis."""


class NodeView:
    """A node's operator, its attributes, and which optional inputs are there."""

    @property
    def key(self) -> Key:
        """Domain and name of the operator."""
        raise NotImplementedError

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes that are given, by name."""
        raise NotImplementedError

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the inputs, "" for an optional one that is left out."""
        raise NotImplementedError

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.key[1]

    def has(self, slot: int) -> bool:
        """Whether the node has that input."""
        return slot < len(self.inputs) and bool(self.inputs[slot])

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, a tensor as an array; where it is not given, `default` in ONNX's precision
        (`ir.protos.as_default`)."""
        if name not in self.attributes:
            return as_default(default)
        value = self.attributes[name]
        return value.values if isinstance(value, Constant) else value

    def axis(self, name: str, default: int, rank: int) -> int:
        """An axis attribute, counted from the front.

        Args:
            name: the attribute.
            default: its value where it is not given.
            rank: of the tensor whose axis it is.
        """
        return int(self.attribute(name, default)) % max(rank, 1)

    def integers(self, slot: int, attribute: str) -> list[int] | None:
        """Integers that old operator sets have as an attribute and newer ones as an input; None where there
        is neither, or the input's value is not known."""
        if attribute in self.attributes:
            value = self.attribute(attribute)
            return [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        return self.listed(slot, attribute) if self.has(slot) else None

    def listed(self, slot: int, what: str) -> list[int] | None:
        """The value of an input that lists integers, called `what`; None where it is not known."""
        raise NotImplementedError


class ModelNodeView(NodeView):
    """The view of a `Node` of a model's main graph."""

    node: Node

    @property
    def key(self) -> Key:
        return self.node.key

    @property
    def attributes(self) -> Mapping[str, Any]:
        return self.node.attrs

    @property
    def inputs(self) -> Sequence[str]:
        return [tensor.name for tensor in self.node.inputs]

    def has(self, slot: int) -> bool:
        return slot < len(self.node.inputs) and bool(self.node.inputs[slot].name)

    def tensor(self, slot: int) -> Tensor | None:
        """The input, None where it is left out."""
        return self.node.inputs[slot] if self.has(slot) else None


class ProtoView(NodeView):
    """The view of a `NodeProto`, which may stand in a body."""

    proto: NodeProto

    @property
    def key(self) -> Key:
        return operator_key(self.proto.domain, self.proto.op_type)

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        return {a.name: attribute_value(a, numpy_helper.to_array) for a in self.proto.attribute}

    @property
    def inputs(self) -> Sequence[str]:
        return self.proto.input
