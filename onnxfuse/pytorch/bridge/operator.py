"""Nodes as rules see them, be they of the main graph or of a body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from onnxfuse.ir.nodes import Constant, Node
from onnxfuse.ir.protos import operator_key
from onnxfuse.ops.table import Key


@dataclass(frozen=True)
class Operator:
    """A node of the main graph or of a body, as far as a rule needs it."""

    op: str
    domain: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The key of its rule."""
        return operator_key(self.domain, self.op)

    @property
    def kind(self) -> str:
        """The operator's name in messages: "Conv", "com.acme::Op"."""
        return f"{self.domain}::{self.op}" if self.domain else self.op


def of_node(node: Node) -> Operator:
    """A node of the main graph as a rule sees it; tensors among its attributes become arrays."""
    attributes = {
        key: value.values if isinstance(value, Constant) else value
        for key, value in node.attrs.items()
        if not node.constant_form
    }
    inputs, outputs = (tuple(t.name for t in tensors) for tensors in (node.inputs, node.outputs))
    return Operator(node.op, node.domain, node.label, inputs, outputs, attributes, node.metadata)


def of_proto(node: NodeProto) -> Operator:
    """A node of a body as a rule sees it."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    label = f"'{node.name or (node.output[0] if node.output else '')}' ({node.op_type})"
    attributes = {a.name: _plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}
    return Operator(node.op_type, domain, label, tuple(node.input), tuple(node.output), attributes)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, (list, tuple)) or type(value).__name__.startswith("Repeated"):
        return [_plain(item) for item in value]
    return value


def constant_value(node: NodeProto) -> np.ndarray | None:
    """The value of a Constant node in a body, None of other nodes (and of forms that hold no numbers)."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value" and value.data_type != TensorProto.STRING:
            return numpy_helper.to_array(value)
        if attribute.name in ("value_float", "value_floats"):
            return np.array(value, np.float32)
        if attribute.name in ("value_int", "value_ints"):
            return np.array(value, np.int64)
    return None
