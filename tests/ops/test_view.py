"""What all views of a node answer alike, in a main graph and in a body."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from nets import net
from onnx import NodeProto, helper

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ops.facet import Facet, keyed
from onnxfuse.ops.table import Op
from onnxfuse.ops.view import ModelNodeView, NodeView, ProtoView


class InModel(ModelNodeView):
    """The view of a node whose listed inputs are stored."""

    def __init__(self, model: Model, node: Node) -> None:
        self.model, self.node = model, node

    def listed(self, slot: int, what: str) -> list[int] | None:
        tensor = self.tensor(slot)
        value = None if tensor is None else self.model.weight(tensor)
        return None if value is None else value.reshape(-1).tolist()


class InBody(ProtoView):
    def __init__(self, proto: NodeProto) -> None:
        self.proto = proto


def views(body: str) -> list[NodeView]:
    model = net(body, {"axes": np.array([1, 2])}, "float[N,4,6] x", "float[A,B,C] y", opset=18)
    return [InModel(model, model.nodes[-1]), InBody(model.nodes[-1].proto(18))]


def test_attributes_inputs_and_axes() -> None:
    for view in views("y = ReduceLogSum<keepdims=0, noop_with_empty_axes=1>(x, axes)"):
        assert view.key == ("", "ReduceLogSum")
        assert view.op == "ReduceLogSum"
        assert list(view.inputs) == ["x", "axes"]
        assert [view.has(slot) for slot in range(3)] == [True, True, False]
        assert view.attribute("keepdims", 1) == 0
        assert view.attribute("axes") is None
        assert view.attribute("axes", 7) == 7
        assert view.axis("axis", -1, 3) == 2
        assert view.axis("axis", 1, 0) == 0
    for view in views("y = Clip(x, , axes)"):
        assert [view.has(slot) for slot in range(3)] == [True, False, True]


def test_a_tensor_attribute_is_an_array() -> None:
    text = "g (float[2] x) => (float[2] y) { c = Constant<value = float[2] {1, 2}>() y = Add(x, c) }"
    model = Model.load(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}'))
    for view in (InModel(model, model.nodes[0]), InBody(model.nodes[0].proto(17))):
        np.testing.assert_array_equal(view.attribute("value"), [1, 2])


def test_integers_of_an_attribute_or_an_input() -> None:
    first = views("y = ReduceLogSum(x, axes)")[0]
    assert first.integers(1, "axes") == [1, 2]
    assert first.integers(2, "axes") is None
    node = helper.make_node("Any", ["x"], ["y"], domain="com.acme", axes=[0, 1], axis=-1)
    assert InBody(node).integers(1, "axes") == [0, 1]
    assert InBody(node).integers(1, "axis") == [-1]
    assert InBody(node).key == ("com.acme", "Any")


def test_a_facet_knows_its_rules_its_defaults_and_why_there_is_neither() -> None:
    def default(op: Op) -> str | None:
        return "by its traits" if op.operands == 1 else None

    facet = Facet(keyed({"Add": "own", "com.acme::Any": "foreign"}), default, lambda op: f"no {op.name}")
    assert facet.get(("", "Add")) == "own"
    assert facet.get(("", "Relu")) == "by its traits"
    assert facet.get(("", "Mul")) is None
    assert facet.get(("com.acme", "Any")) == "foreign"
    assert facet.get(("com.acme", "Other")) is None
    found = [facet.coverage(("", name)) for name in ("Add", "Relu", "Mul")]
    assert found == ["rule", "default", "no Mul"]
    with pytest.raises(KeyError):
        facet.coverage(("com.acme", "Other"))
