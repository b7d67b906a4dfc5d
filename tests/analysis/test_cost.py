"""Counts against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from nets import RUNTIME
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.analysis.cost import Cost, count, dimension_sizes, measure
from onnxfuse.ir.model import Model


def parsed(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return Model.load(proto)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def macs(text: str, **weights: np.ndarray) -> int | None:
    model = parsed(text, **weights)
    found = count(model, model.shapes())
    assert (found.macs is None) == (found.macs_reason is not None)
    return found.macs


# --- MACs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights", "expected"),
    [
        (
            "c (float[2,3,9,9] x) => (float[2,8,5,5] y) { y = Conv<strides=[2,2], pads = [1,1,1,1]>(x, w) }",
            {"w": zeros(8, 3, 3, 3)},
            2 * 8 * 5 * 5 * 3 * 9,
        ),
        (
            "c (float[1,8,9] x) => (float[1,8,7] y) { y = Conv<group = 8>(x, w) }",
            {"w": zeros(8, 1, 3)},
            8 * 7 * 3,
        ),
        (
            "c (float[1,4,5,5] x) => (float[1,6,10,10] y) { y = ConvTranspose<strides = [2, 2]>(x, w) }",
            {"w": zeros(4, 6, 2, 2)},
            4 * 25 * 6 * 4,
        ),
        ("g (float[7,5] x) => (float[7,3] y) { y = Gemm<transB = 1>(x, w) }", {"w": zeros(3, 5)}, 7 * 3 * 5),
        ("g (float[5,7] x) => (float[7,3] y) { y = Gemm<transA = 1>(x, w) }", {"w": zeros(5, 3)}, 7 * 3 * 5),
        ("m (float[2,7,5] x) => (float[2,7,3] y) { y = MatMul(x, w) }", {"w": zeros(5, 3)}, 2 * 7 * 5 * 3),
        ("m (float[5] x, float[5] z) => (float y) { y = MatMul(x, z) }", {}, 5),
        (
            "m (float[8,7,5] x) => (float[8,7,7] y) { t = Transpose<perm = [0,2,1]>(x) y = MatMul(x, t) }",
            {},
            8 * 49 * 5,
        ),
        (
            'e (float[2,7,5] x) => (float[2,7,3] y) { y = Einsum<equation = "btc,cd->btd">(x, w) }',
            {"w": zeros(5, 3)},
            2 * 7 * 5 * 3,
        ),
        (
            'e (float[2,7,5] x) => (float[2,7,3] y) { y = Einsum<equation = "...c,cd->...d">(x, w) }',
            {"w": zeros(5, 3)},
            2 * 7 * 5 * 3,
        ),
        (
            "l (float[11,2,5] x) => (float[11,1,2,6] y) { y = LSTM<hidden_size = 6>(x, w, r) }",
            {"w": zeros(1, 24, 5), "r": zeros(1, 24, 6)},
            11 * 2 * 4 * 6 * (5 + 6),
        ),
        (
            "g (float[11,2,5] x) => (float[11,2,2,6] y)"
            '{ y = GRU<hidden_size = 6, direction = "bidirectional">(x, w, r) }',
            {"w": zeros(2, 18, 5), "r": zeros(2, 18, 6)},
            2 * 11 * 2 * 3 * 6 * (5 + 6),
        ),
        ("r (float[2,8] x) => (float[2,8] y) { a = Relu(x) y = Softmax(a) }", {}, 0),
    ],
)
def test_macs_of_one_operator(text: str, weights: dict[str, np.ndarray], expected: int) -> None:
    assert macs(text, **weights) == expected


def test_macs_scale_with_the_sizes_given_to_dynamic_dimensions() -> None:
    model = parsed("m (float[N,T,5] x) => (float[N,T,3] y) { y = MatMul(x, w) }", w=zeros(5, 3))
    assert dimension_sizes(model, {"x": zeros(2, 7, 5)}, RUNTIME) == {"N": 2, "T": 7}
    assert measure(model, {"x": zeros(2, 7, 5)}, RUNTIME).macs == 2 * 7 * 15
    unknown = count(model, model.shapes(), {"N": 2})
    assert unknown.macs is None
    assert unknown.macs_reason == "MatMul 'y': the size of dimension 'T' of 'y' is not known"


def branching(then_out: int, else_out: int, opset: int = 17) -> Model:
    """If(c): x @ (5, then_out) summed, else x @ (5, else_out) summed; the second weight is captured from
    outside."""

    def body(name: str, width: int, inner: bool) -> onnx.GraphProto:
        weight = f"w_{name}"
        nodes = [
            helper.make_node("MatMul", ["x", weight], [f"m_{name}"]),
            helper.make_node("ReduceSum", [f"m_{name}"], [f"y_{name}"], keepdims=0),
        ]
        output = helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, [])
        own = [numpy_helper.from_array(zeros(5, width), weight)] if inner else []
        return helper.make_graph(nodes, name, [], [output], own)

    node = helper.make_node(
        "If",
        ["c"],
        ["y"],
        name="choice",
        then_branch=body("then", then_out, True),
        else_branch=body("else", else_out, False),
    )
    graph = helper.make_graph(
        [node],
        "branching",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(zeros(5, else_out), "w_else")],
    )
    return Model.load(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)]))


@pytest.mark.parametrize(("then_out", "else_out"), [(3, 8), (8, 3)])
def test_an_if_counts_as_its_heavier_branch_and_both_sets_of_weights(then_out: int, else_out: int) -> None:
    found = measure(branching(then_out, else_out), {"c": np.array(True), "x": zeros(7, 5)}, RUNTIME)
    assert found.macs == 7 * 5 * 8
    assert found.parameters == 5 * 11
    assert found.nodes == 5


def test_work_in_a_loop_is_refused_and_a_loop_without_work_is_not() -> None:
    text = """l (int64 n, bool c, float[5,5] x) => (float[5,5] y) {{
        y = Loop<body = b (int64 i, bool go, float[5,5] s) => (bool go_on, float[5,5] t) {{
            go_on = Identity(go)
            t = {}
        }}>(n, c, x)
    }}"""
    assert macs(text.format("Relu(s)")) == 0
    busy = parsed(text.format("MatMul(s, s)"))
    assert "unknown number of times" in (count(busy, busy.shapes()).macs_reason or "")


def test_what_has_no_rule_is_refused_by_name() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    m (float[4,8] x) => (float[4,8] y) { y = com.microsoft.TransposeMatMul(x, x) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.node[0].name = "odd"
    model = Model.load(proto)
    found = count(model, model.shapes())
    assert found.macs is None
    assert found.macs_reason == "TransposeMatMul 'odd' of domain 'com.microsoft' has no rule"


# --- parameters ---------------------------------------------------------------------------------------------


def test_parameters_are_counted_once_whatever_form_they_have() -> None:
    text = """p (float[2,4] x) => (float[2,4] y) {
        k = Constant<value = float[4] {1, 2, 3, 4}>()
        s = Constant<value_float = 2.0>()
        f = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
        i = Constant<value_ints = [2, 4]>()
        a = MatMul(x, w)
        b = MatMul(a, w)
        c = Add(b, k)
        d = Mul(c, s)
        e = Add(d, f)
        y = Reshape(e, i)
    }"""
    model = parsed(text, w=zeros(4, 4), unused=zeros(100))
    found = count(model, model.shapes())
    assert found == Cost(16 + 4 + 1 + 4, 2 * 2 * 16, 10, 4 * (16 + 4 + 1 + 4) + 2 * 8, None)


def test_quantised_weights_are_parameters_and_take_a_byte() -> None:
    text = """q (float[2,4] x) => (float[2,3] y) {
        d = DequantizeLinear(w, s)
        y = MatMul(x, d)
    }"""
    found = measure(parsed(text, w=np.zeros((4, 3), np.int8), s=np.float32(1)), {"x": zeros(2, 4)}, RUNTIME)
    assert (found.parameters, found.bytes) == (13, 16)


def test_a_dimension_that_only_the_output_names_is_told_by_a_run() -> None:
    model = parsed("m (float[N,3] x) => (float[rows,1] y) <float[3,1] w = {1, 2, 3}> { y = MatMul(x, w) }")
    feed = {"x": zeros(5, 3)}
    assert dimension_sizes(model, feed, RUNTIME) == {"N": 5, "rows": 5}
    assert measure(model, feed, RUNTIME).macs == 15


def test_an_attribute_that_is_no_text_leaves_the_count_open() -> None:
    """ONNX Runtime refuses such a model, but it is inspected."""
    text = 'g (float[2,3] x) => (float[2,2] y) { y = Einsum<equation = "ij,kj->ik">(x, x) }'
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>{text}')
    proto.graph.node[0].attribute[0].s = b"\xff\xfe"
    model = Model.load(proto)
    assert count(model, model.shapes()).macs is None
