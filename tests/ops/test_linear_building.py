"""Operators built from matrices are read back as they were meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import compute, net, normal

from onnxfuse.ir.editing import PASS_KEY, REPLACES_KEY
from onnxfuse.ir.nodes import Variable
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.ops.linear_building import add_linear

KINDS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "Conv": ("float[N,3,L] x", (2,), {"kernel_shape": [2], "pads": [1, 0]}),
    "Gemm": ("float[N,6] x", (), {}),
    "Gemm transB": ("float[N,6] x", (), {"transB": 1}),
    "MatMul": ("float[N,6] x", (), {}),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_built_is_what_is_read(kind: str, with_bias: bool) -> None:
    x, kernel, attrs = KINDS[kind]
    model = net("y = Relu(z) z = Identity(x)", {}, x, "float[A,B,C] y" if kernel else "float[A,B] y")
    end = model.tensor("z")
    model.remove([node for node in model.nodes if node.op == "Identity"])
    weight, bias = normal(4, 6), normal(4, seed=1) if with_bias else None
    op = kind.split()[0]
    rest: dict[str, Any] = {"kernel": kernel, "attrs": attrs, "by": "t", "replaces": ["z"]}
    node = add_linear(model, op, model.tensor("x"), weight, bias, end, "new", **rest)
    found = linear_op(model, node, model.shapes())
    assert isinstance(found, LinearOp)
    assert found.y == "z"
    np.testing.assert_array_equal(found.weight, weight)
    np.testing.assert_array_equal(found.bias, np.zeros(4) if bias is None else bias)
    assert {t.name for t in model.initializers} == {"new.weight", *(["new.bias"] if with_bias else [])}
    for own in found.nodes:
        assert own.metadata[PASS_KEY] == "t"
        assert own.metadata[REPLACES_KEY] == '["z"]'
    feed = {"x": normal(5, *((3, 7) if kernel else (6,)))}
    (z,) = compute(model, feed, "z")
    rows = feed["x"]
    if kernel:
        padded = np.pad(rows, ((0, 0), (0, 0), (1, 0)))
        rows = np.stack([padded[:, :, i : i + 2].reshape(5, 6) for i in range(7)], axis=1)
        z = z.swapaxes(1, 2)
    np.testing.assert_allclose(z, rows @ weight.T + (0 if bias is None else bias), atol=1e-5)


def test_stored_tensors_are_used_as_they_are() -> None:
    model = net("y = MatMul(x, w)", {"w": (6, 4), "b": (4,)})
    (old,) = model.nodes
    w, b, y = old.inputs[1], model.add_weight("b2", normal(4)), old.outputs[0]
    model.remove([old])
    out = Variable(model.unique_name("sum"))
    node = add_linear(model, "MatMul", model.tensor("x"), w, b, out, "new", inner=("product", "plus"), by="t")
    model.add_node("Relu", [out], [y], by="t")
    assert node.inputs[1] is w
    assert node.outputs[0].name == "product"
    assert [n.name for n in model.nodes] == ["new", "plus", ""]
