"""Subgraphs that read other tensors than before."""

from __future__ import annotations

import onnx.parser
from onnx import GraphProto

from onnxfuse.ir.bodies import reading, without_aliases
from onnxfuse.ir.protos import captured_names


def graph(text: str) -> GraphProto:
    return onnx.parser.parse_graph(text)


def nodes(body: GraphProto | None) -> list[tuple[str, list[str]]]:
    assert body is not None
    return [(node.op_type, list(node.input)) for node in body.node]


NESTED = """g () => (float[A] y) { h = Neg(v)
    y = If(c) <
        then_branch = a () => (float[A] t) { t = Add(v, h) },
        else_branch = b () => (float[A] e) { e = Abs(h) }>
}"""


def test_reading_another_tensor_reaches_subgraphs_of_subgraphs() -> None:
    body = graph(NESTED)
    changed = reading(body, "v", "w")
    assert changed is not None
    assert captured_names(body) == {"v", "c"}
    assert captured_names(changed) == {"w", "c"}


def test_a_name_of_its_own_or_an_output_is_in_the_way() -> None:
    body = graph(NESTED)
    assert reading(body, "v", "h") is None
    assert reading(body, "v", "t") is None
    handed_on = graph("g () => (float[A] y) { y = Neg(v) }")
    handed_on.output[0].name = "v"
    assert reading(handed_on, "v", "w") is None


def test_aliases_go_and_outputs_stay() -> None:
    body = graph("g () => (float[A] y, float[A] u) { u = Identity(w) v = Identity(u) y = Add(v, u) }")
    assert nodes(without_aliases(body)) == [("Identity", ["w"]), ("Add", ["w", "w"])]
    assert without_aliases(graph("g () => (float[A] y) { y = Identity(w) }")) is None
    inner = without_aliases(graph(NESTED.replace("h = Neg(v)", "h = Identity(v)")))
    assert inner is not None
    assert captured_names(inner) == {"v", "c"}
    assert [node.op_type for node in inner.node] == ["If"]
