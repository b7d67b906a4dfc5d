"""linear.py: every layout read and written must say what the operator computes."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.ops.linear import LinearOp, channel_vector, linear_op
from onnxfuse.ops.linear_weights import write_weights

RNG = np.random.default_rng(0)


def build(nodes, inputs, weights, outputs=("y",), opset=17, dtype=np.float32) -> onnx.ModelProto:
    """A model with float inputs {name: shape}, weights {name: array} and outputs of unknown shape."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, dtype), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def evaluate(proto: onnx.ModelProto, **feed: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def only_op(model: Model, kind: str, **options: bool) -> LinearOp:
    node = next(n for n in model.nodes if n.op == kind)
    op = linear_op(model, node, model.shapes(), **options)
    assert isinstance(op, LinearOp), op
    return op


def dense_model(nodes, weights, rank=2) -> onnx.ModelProto:
    return build(nodes, {"x": ["n", *[5] * (rank - 2), 3]}, weights)


NODE = helper.make_node
DENSE = {
    "gemm": dense_model([NODE("Gemm", ["x", "w", "c"], ["y"])], {"w": normal(3, 4), "c": normal(4)}),
    "gemm transposed": dense_model([NODE("Gemm", ["x", "w"], ["y"], transB=1)], {"w": normal(4, 3)}),
    "gemm scaled": dense_model(
        [NODE("Gemm", ["x", "w", "c"], ["y"], alpha=0.5, beta=-2.0, transB=1)],
        {"w": normal(4, 3), "c": normal(1, 4)},
    ),
    "gemm beta 0": dense_model(
        [NODE("Gemm", ["x", "w", "c"], ["y"], beta=0.0)], {"w": normal(3, 4), "c": normal(4)}
    ),
    "gemm scalar bias": dense_model(
        [NODE("Gemm", ["x", "w", "c"], ["y"])], {"w": normal(3, 4), "c": normal(1)}
    ),
    "gemm and add": dense_model(
        [NODE("Gemm", ["x", "w", "c"], ["h"]), NODE("Add", ["a", "h"], ["y"])],
        {"w": normal(3, 4), "c": normal(4), "a": normal(1, 4)},
    ),
    "matmul": dense_model([NODE("MatMul", ["x", "w"], ["y"])], {"w": normal(3, 4)}),
    "matmul and add": dense_model(
        [NODE("MatMul", ["x", "w"], ["h"]), NODE("Add", ["h", "a"], ["y"])],
        {"w": normal(3, 4), "a": normal(4)},
    ),
    "matmul per token": dense_model(
        [NODE("MatMul", ["x", "w"], ["h"]), NODE("Add", ["h", "a"], ["y"])],
        {"w": normal(3, 4), "a": np.float32(0.5)},
        rank=3,
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_layouts(case):
    model = Model.load(DENSE[case])
    op = only_op(model, "Gemm" if "gemm" in case else "MatMul")
    x = normal(*((2, 3) if op.kind == "dense" else (2, 5, 3)))
    assert op.kind == ("token" if "token" in case else "dense")
    assert (op.x, op.y, op.in_features, op.out_features, op.columns) == ("x", "y", 3, 4, 3)
    np.testing.assert_allclose(x @ op.weight.T + op.bias, evaluate(DENSE[case], x=x), rtol=1e-5, atol=1e-6)

    weight, bias = RNG.normal(size=(4, 3)), RNG.normal(size=4)
    write_weights(model, op, weight, bias)
    written = model.to_proto()
    np.testing.assert_allclose(evaluate(written, x=x), x @ weight.T + bias, rtol=1e-5, atol=1e-6)
    again = only_op(model, op.node.op)
    np.testing.assert_allclose(again.weight, weight, atol=1e-6)
    np.testing.assert_allclose(again.bias, bias, atol=1e-6)
    assert {t.name for t in DENSE[case].graph.initializer} <= {t.name for t in written.graph.initializer}
    assert again.y == "y"


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("added", [False, True])
def test_conv_layouts(axes, groups, op_type, added):
    transposed = op_type == "ConvTranspose"
    kernel = (3, 2, 2)[:axes]
    shape = (4, 6 // groups) if transposed else (6, 4 // groups)
    nodes = [NODE(op_type, ["x", "w", "b"], ["h" if added else "y"], group=groups)]
    weights = {"w": normal(*shape, *kernel), "b": normal(6)}
    if added:
        nodes.append(NODE("Add", ["h", "a"], ["y"]))
        weights["a"] = normal(6, *[1] * axes)
    proto = build(nodes, {"x": [2, 4, *[4] * axes]}, weights)
    model = Model.load(proto)
    assert "not a linear operator" in str(linear_op(model, model.nodes[0])) or not transposed
    op = only_op(model, op_type, transposed=transposed)
    assert (op.in_features, op.out_features, op.groups, op.kernel) == (4, 6, groups, kernel)
    assert op.weight.shape == (6, 4 // groups * np.prod(kernel))
    np.testing.assert_allclose(op.bias, weights["b"] + (weights["a"].reshape(-1) if added else 0), rtol=1e-6)
    # Row o of the matrix belongs to output channel o alone, whatever the layout.
    weight, bias = op.weight.copy(), op.bias.copy()
    scale, shift = RNG.normal(size=6), RNG.normal(size=6)
    write_weights(model, op, weight * scale[:, None], bias * scale + shift)
    x = normal(2, 4, *[4] * axes)
    spread = lambda v: v.reshape(-1, *[1] * axes)  # noqa: E731
    expected = evaluate(proto, x=x) * spread(scale) + spread(shift)
    np.testing.assert_allclose(evaluate(model.to_proto(), x=x), expected, rtol=1e-4, atol=1e-5)


def test_conv_matrix_is_in_im2col_order():
    weight = normal(5, 3, 2, 4)
    model = Model.load(build([NODE("Conv", ["x", "w"], ["y"])], {"x": [1, 3, 6, 6]}, {"w": weight}))
    op = only_op(model, "Conv")
    np.testing.assert_array_equal(op.weight, weight.reshape(5, -1).astype(np.float64))
    assert (op.strides, op.dilations, op.pads) == ((1, 1), (1, 1), (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "size", "stride", "pads"),
    [
        ("VALID", "n", 2, (0, 0)),
        ("SAME_UPPER", "n", 1, (1, 2)),
        ("SAME_LOWER", "n", 1, (2, 1)),
        ("SAME_UPPER", 7, 2, (1, 2)),
        ("SAME_UPPER", 8, 2, (1, 1)),
        ("SAME_UPPER", "n", 2, None),
    ],
)
def test_auto_pad(mode, size, stride, pads):
    node = NODE("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[stride])
    proto = build([node], {"x": [1, 1, size]}, {"w": normal(1, 1, 4)})
    op = only_op(Model.load(proto), "Conv")
    assert op.pads == pads
    if pads is not None and isinstance(size, int):
        padded = build(
            [NODE("Conv", ["x", "w"], ["y"], pads=pads, strides=[stride])], {"x": [1, 1, size]}, {}, opset=17
        )
        padded.graph.initializer.extend(proto.graph.initializer)
        x = normal(1, 1, size)
        np.testing.assert_allclose(evaluate(padded, x=x), evaluate(proto, x=x), rtol=1e-6)


def refusal(proto: onnx.ModelProto, **options: bool) -> str:
    model = Model.load(proto)
    reason = linear_op(model, model.nodes[0], model.shapes(), **options)
    assert isinstance(reason, str), reason
    return reason


def test_reasons():
    two = {"x": ["n", 3], "v": [3, 4]}
    assert "not a linear operator" in refusal(build([NODE("Relu", ["x"], ["y"])], {"x": [2]}, {}))
    assert "computed" in refusal(build([NODE("MatMul", ["x", "v"], ["y"])], two, {}))
    assert "rank 3" in refusal(
        build([NODE("MatMul", ["x", "w"], ["y"])], {"x": [2, 3]}, {"w": normal(1, 3, 4)})
    )
    gemm = NODE("Gemm", ["x", "w"], ["y"], transA=1)
    assert "transposed input" in refusal(build([gemm], {"x": [3, 2]}, {"w": normal(3, 4)}))
    zero = NODE("Gemm", ["x", "w"], ["y"], alpha=0.0)
    assert "alpha = 0" in refusal(build([zero], {"x": [2, 3]}, {"w": normal(3, 4)}))
    biased = NODE("Gemm", ["x", "w", "b"], ["y"])
    assert "bias of Gemm is computed" in refusal(build([biased], {**two, "b": [4]}, {"w": normal(3, 4)}))
    wide = build([biased], {"x": [2, 3]}, {"w": normal(3, 4), "b": normal(2, 4)})
    assert "8 values for 4 outputs" in refusal(wide)
    whole = build([NODE("MatMul", ["x", "w"], ["y"])], {"x": [2, 3]}, {"w": np.ones((3, 4))}, dtype=np.int32)
    assert "int32" in refusal(whole)
    other = NODE("Conv", ["x", "w"], ["y"], domain="com.example")
    custom = build([other], {"x": [1, 1, 3]}, {"w": normal(1, 1, 3)})
    custom.opset_import.append(helper.make_opsetid("com.example", 1))
    assert "not a linear operator" in refusal(custom)


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((), True),
        ((4,), True),
        ((1, 4), True),
        ((1,), True),
        ((5, 1), False),
        ((1, 1, 1, 4), False),
        ((5, 4), False),
    ],
)
def test_which_adds_are_a_bias(shape, taken):
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Add", ["h", "a"], ["y"])]
    model = Model.load(build(nodes, {"x": ["n", 5, 3]}, {"w": normal(3, 4), "a": normal(*shape)}))
    assert (only_op(model, "MatMul").bias_node is not None) == taken


def test_an_add_is_no_bias_where_the_sum_without_it_is_seen():
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Add", ["h", "a"], ["y"])]
    weights = {"w": normal(3, 4), "a": normal(4)}
    as_output = build(nodes, {"x": ["n", 3]}, weights, outputs=("y", "h"))
    assert only_op(Model.load(as_output), "MatMul").bias_node is None
    twice = build([*nodes, NODE("Relu", ["h"], ["z"])], {"x": ["n", 3]}, weights, outputs=("y", "z"))
    assert only_op(Model.load(twice), "MatMul").bias_node is None


def test_channel_vector_needs_the_rank():
    assert channel_vector((4, 1, 1), 4, 1, 4)
    assert channel_vector((1, 4, 1, 1), 4, 1, 4)
    assert not channel_vector((4,), 4, 1, 4)
    assert not channel_vector((4, 1), 4, 1, 4)
    assert not channel_vector((3, 1, 1), 1, 1, 4)  # would make one channel into three
    assert channel_vector((4,), 4, -1, None)
    assert not channel_vector((1, 4), 4, -1, None)


def test_a_shared_weight_is_reported_and_left_alone():
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("MatMul", ["h", "w"], ["y"])]
    weights = {"w": normal(3, 3)}
    model = Model.load(build(nodes, {"x": ["n", 3]}, weights))
    first, second = (linear_op(model, n, model.shapes()) for n in model.nodes)
    assert isinstance(first, LinearOp)
    assert isinstance(second, LinearOp)
    assert first.shared
    assert second.shared
    write_weights(model, second, np.eye(3))
    model.prune()
    np.testing.assert_array_equal(only_op(model, "MatMul").weight, weights["w"].T)
    x = normal(2, 3)
    np.testing.assert_allclose(evaluate(model.to_proto(), x=x), x @ weights["w"], rtol=1e-6)
    assert not only_op(model, "MatMul").shared


@pytest.mark.parametrize("use", ["output", "captured", "twice"])
def test_what_else_makes_a_weight_shared(use):
    nodes = [NODE("Gemm", ["x", "w", "w" if use == "twice" else "b"], ["y"])]
    proto = build(nodes, {"x": [1, 1]}, {"w": normal(1, 1), "b": normal(1)})
    assert use == "twice" or not only_op(Model.load(proto), "Gemm").shared
    if use == "output":
        proto.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [1, 1]))
    if use == "captured":
        info = helper.make_tensor_value_info
        bodies = [helper.make_graph([NODE("Neg", ["w"], [t])], t, [], [info(t, 1, None)]) for t in "st"]
        proto.graph.node.append(NODE("If", ["c"], ["z"], then_branch=bodies[0], else_branch=bodies[1]))
        proto.graph.input.append(info("c", TensorProto.BOOL, []))
        proto.graph.output.append(info("z", TensorProto.FLOAT, None))
    assert only_op(Model.load(proto), "Gemm").shared


@pytest.mark.parametrize("form", ["value", "initializer", "listed as input"])
def test_where_the_weight_is_stored(form):
    weight = normal(3, 4)
    nodes = [NODE("MatMul", ["x", "w"], ["y"])]
    if form == "value":
        nodes.insert(0, NODE("Constant", [], ["w"], value=numpy_helper.from_array(weight)))
    proto = build(nodes, {"x": ["n", 3]}, {} if form == "value" else {"w": weight})
    if form == "listed as input":
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 4]))
    model = Model.load(proto)
    write_weights(model, only_op(model, "MatMul"), np.ones((4, 3)))
    written = model.to_proto()
    assert len(written.graph.node) == len(nodes)
    assert len(written.graph.initializer) == len(proto.graph.initializer)
    np.testing.assert_allclose(evaluate(written, x=np.eye(3, dtype=np.float32)), np.ones((3, 4)))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_dtype_is_kept(kind):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    proto = build([NODE("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3]}, {"w": normal(3, 4)}, dtype=dtype)
    model = Model.load(proto)
    op = only_op(model, "MatMul")
    write_weights(model, op, op.weight * 2)
    assert model.to_proto().graph.initializer[0].data_type == kind
    np.testing.assert_allclose(
        op.weight.T, 2 * numpy_helper.to_array(proto.graph.initializer[0]).astype(float)
    )


def test_overflow_is_refused_before_anything_changes():
    weights = {"w": normal(3, 4), "a": normal(4)}
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Add", ["h", "a"], ["y"])]
    model = Model.load(build(nodes, {"x": ["n", 3]}, weights, dtype=np.float16))
    op, before = only_op(model, "MatMul"), model.to_proto().SerializeToString()
    with pytest.raises(NotApplicableError, match="overflow float16"):
        write_weights(model, op, op.weight * 0, np.full(4, 1e6))
    with pytest.raises(ValueError, match="weight is"):
        write_weights(model, op, np.ones((3, 4)))
    with pytest.raises(ValueError, match="bias is"):
        write_weights(model, op, op.weight, np.ones(3))
    assert model.to_proto().SerializeToString() == before


def test_a_bias_alone_leaves_the_weight_as_it_is_stored():
    """Gemm's alpha too, so that a shared weight stays shared; and the other way round."""
    weights = {"w": normal(4, 3), "c": normal(4)}
    node = NODE("Gemm", ["x", "w", "c"], ["y"], alpha=0.5, beta=-2.0, transB=1)
    proto = build([node], {"x": ["n", 3]}, weights)
    x, bias, new = normal(2, 3), RNG.normal(size=4), RNG.normal(size=(4, 3))
    model = Model.load(proto)
    write_weights(model, only_op(model, "Gemm"), None, bias)
    assert model.nodes[0].attrs["alpha"] == 0.5
    np.testing.assert_array_equal(model.weight(model.tensor("w")), weights["w"])
    expected = 0.5 * x @ weights["w"].T + bias
    np.testing.assert_allclose(evaluate(model.to_proto(), x=x), expected, rtol=1e-5, atol=1e-6)
    model = Model.load(proto)
    write_weights(model, only_op(model, "Gemm"), new)
    assert model.nodes[0].attrs["beta"] == -2.0
    np.testing.assert_array_equal(model.weight(model.tensor("c")), weights["c"])
    np.testing.assert_allclose(
        evaluate(model.to_proto(), x=x), x @ new.T - 2 * weights["c"], rtol=1e-5, atol=1e-6
    )
