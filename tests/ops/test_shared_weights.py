"""Operators by their weights, and who else reads one."""

from __future__ import annotations

import numpy as np
from nets import net

from onnxfuse.ir.model import Model
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.ops.shared_weights import SharedWeight, own_weights, shared_weights


def weights_of(model: Model) -> list[SharedWeight]:
    ops = (linear_op(model, node, model.shapes()) for node in model.nodes)
    return shared_weights(op for op in ops if isinstance(op, LinearOp))


def test_operators_are_grouped_in_the_order_of_the_graph() -> None:
    model = net(
        "a = MatMul(x, w) b = MatMul(a, v) c = MatMul(b, w) y = Gemm<transB = 1>(c, w)",
        {"w": (6, 6), "v": (6, 6)},
    )
    first, second = weights_of(model)
    assert (first.names, second.names) == (("a", "c", "y"), ("b",))
    assert (first.name, first.size) == ("a", 36)
    assert [node.outputs[0].name for node in first.nodes(model.copy())] == ["a", "c", "y"]
    np.testing.assert_array_equal(first.matrix, first.read(model).T)
    assert [weight.other_use() for weight in (first, second)] == [None, None]
    apart = shared_weights(first.ops, kind=lambda op: op.node.op)
    assert [weight.names for weight in apart] == [("a", "c"), ("y",)]


def test_other_uses() -> None:
    def use(body: str, y: str = "float[A,B] y") -> str | None:
        model = net(body, {"w": (6, 6), "v": (6, 6), "c": np.array(True)}, y=y, x="float[N,6] x")
        return weights_of(model)[0].other_use()

    assert use("h = MatMul(x, w) y = Add(h, w)") == "used by 'y' (Add)"
    assert use("h = MatMul(w, w) y = MatMul(x, h)") == "used by 'h' (MatMul)"
    assert use("h = MatMul(x, w)", "float[A,B] h, float[6,6] w") == "an output of the graph"
    inside = """h = MatMul(x, w)
    y = If(c) <
        then_branch = a () => (float[A,B] t) { t = MatMul(h, w) },
        else_branch = b () => (float[A,B] e) { e = MatMul(h, v) }>"""
    assert use(inside) == "used by a body of 'y' (If)"


def test_weights_that_go_with_nodes() -> None:
    """What only they need goes, through operators before, too; not what is tied to others."""
    body = """p = Transpose(v) q = Exp(k) h = MatMul(x, w) r = MatMul(h, p) s = Add(r, q) t = MatMul(s, u)
        y = MatMul(t, u)"""
    model = net(body, dict.fromkeys("vwu", (6, 6)) | {"k": (6,)})
    nodes = [node for node in model.nodes if node.outputs[0].name in "hrst"]
    assert {tensor.name for tensor in own_weights(model, nodes, "x")} == {"w", "v", "k"}
    assert {tensor.name for tensor in own_weights(model, model.nodes, "x")} == {"w", "v", "k", "u"}
    assert own_weights(model, nodes[1:2], "h") == [model.tensor("v")]
