"""affine.py by itself: scales and shifts against the operators' definitions."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxfuse.ir.model import Model
from onnxfuse.ops.channel_affine import ChannelAffine, affine_input, channel_affine

NODE = helper.make_node
RNG = np.random.default_rng(0)
CONSTANTS = {
    "k": RNG.normal(size=(3, 1)).astype(np.float32),
    "g": RNG.normal(size=3).astype(np.float32),
    "b": RNG.normal(size=3).astype(np.float32),
    "m": RNG.normal(size=3).astype(np.float32),
    "v": RNG.uniform(0.5, 2, size=3).astype(np.float32),
    "zero": np.zeros(3, np.float32),
    "one": np.float32(1.5),
}
CASES = {
    "BatchNormalization": NODE("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"], epsilon=0.2),
    "Mul": NODE("Mul", ["x", "k"], ["y"]),
    "Mul left": NODE("Mul", ["k", "x"], ["y"]),
    "Add scalar": NODE("Add", ["x", "one"], ["y"]),
    "Sub": NODE("Sub", ["x", "k"], ["y"]),
    "Sub left": NODE("Sub", ["k", "x"], ["y"]),
    "Div": NODE("Div", ["x", "k"], ["y"]),
    "Neg": NODE("Neg", ["x"], ["y"]),
}


def build(node: onnx.NodeProto) -> onnx.ModelProto:
    used = [n for n in node.input if n in CONSTANTS]
    info = helper.make_tensor_value_info
    inputs = [info(n, TensorProto.FLOAT, None) for n in node.input if n not in CONSTANTS]
    weights = [numpy_helper.from_array(np.asarray(CONSTANTS[n]), n) for n in dict.fromkeys(used)]
    graph = helper.make_graph([node], "g", inputs, [info("y", TensorProto.FLOAT, None)], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def affine(node: onnx.NodeProto, channels=3, axis=1, rank=3) -> ChannelAffine | str:
    model = Model.load(build(node))
    return channel_affine(model, model.nodes[0], channels, axis, rank)


@pytest.mark.parametrize("case", CASES)
def test_scale_and_shift_say_what_the_operator_does(case):
    found = affine(CASES[case])
    assert isinstance(found, ChannelAffine)
    assert found.scale.dtype == found.shift.dtype == np.float64
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    expected = ReferenceEvaluator(build(CASES[case])).run(None, {"x": x})[0]
    np.testing.assert_allclose(
        x * found.scale[:, None] + found.shift[:, None], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (NODE("Div", ["k", "x"], ["y"]), "a constant is divided"),
        (NODE("Div", ["x", "zero"], ["y"]), "no value per channel"),
        (NODE("Mul", ["x", "z"], ["y"]), "does not scale or shift one tensor by constants"),
        (NODE("Relu", ["x"], ["y"]), "does not scale or shift"),
        (
            NODE("BatchNormalization", ["x", "z", "b", "m", "v"], ["y"]),
            "'z' of BatchNormalization is computed",
        ),
        (NODE("BatchNormalization", ["x", "k", "b", "m", "v"], ["y"]), r"shape \[3, 1\], not \[3\]"),
        (NODE("BatchNormalization", ["x", "g", "b", "m", "zero"], ["y"], epsilon=0.0), "not finite"),
    ],
)
def test_reasons(node, reason):
    import re

    found = affine(node)
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_the_batch_norm_axis():
    assert "does not normalize the axis" in str(affine(CASES["BatchNormalization"], axis=-1, rank=3))
    assert "does not normalize the axis" in str(affine(CASES["BatchNormalization"], axis=-1, rank=None))
    assert isinstance(affine(CASES["BatchNormalization"], axis=-1, rank=2), ChannelAffine)


def test_affine_input():
    model = Model.load(build(CASES["Mul left"]))
    tensor = affine_input(model, model.nodes[0])
    assert tensor is not None
    assert tensor.name == "x"
