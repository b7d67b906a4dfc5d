"""layouts.py: what a chain of layouts makes of a stored tensor, held against ONNX Runtime."""

from __future__ import annotations

import math

import numpy as np
import pytest
from nets import compute, net, normal

from onnxfuse.ir.model import Model
from onnxfuse.ops.layouts import is_shared, readers, stored_weight
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.ops.linear_weights import write_weights
from onnxfuse.ops.shared_weights import multiplied

CHAINS = {
    "transposed": ("v = Transpose<perm=[1,0]>(w)", (4, 6)),
    "reversed by default": ("v = Transpose(w)", (4, 6)),
    "aliases": ("a = Identity(w) b = Identity(a) v = Transpose<perm=[1,0]>(b)", (4, 6)),
    "reshaped": ("v = Reshape(w, sizes)", (2, 3, 4)),
    "a size copied": ("v = Reshape(w, copied)", (6, 2, 2)),
    "flattened": ("t = Transpose<perm=[2,0,1]>(w) v = Flatten<axis=1>(t)", (2, 2, 6)),
    "squeezed": ("s = Squeeze(w, one) v = Transpose<perm=[1,0]>(s)", (4, 1, 6)),
    "squeezed of all": ("v = Squeeze(w)", (1, 6, 1, 4)),
    "unsqueezed and back": ("u = Unsqueeze(w, one) v = Squeeze(u, one)", (6, 4)),
    "cast to what it is": ("c = Cast<to=1>(w) v = Transpose<perm=[1,0]>(c)", (4, 6)),
}
LISTS = {"sizes": np.array([6, -1]), "copied": np.array([0, 4]), "one": np.array([1])}


def chained(chain: str, shape: tuple[int, ...], more: str = "") -> Model:
    weights = {"w": shape, **{name: value for name, value in LISTS.items() if f", {name})" in chain + more}}
    return net(f"{chain} y = MatMul(x, v) {more}", weights)


def op_of(model: Model) -> LinearOp:
    found = linear_op(model, next(node for node in model.nodes if node.op == "MatMul"))
    assert isinstance(found, LinearOp), found
    return found


@pytest.mark.parametrize("case", CHAINS)
def test_a_weight_is_read_and_written_through_its_layout(case: str) -> None:
    model, x = chained(*CHAINS[case]), normal(5, 6)
    op = op_of(model)
    assert (op.weight_tensor.name, op.in_features, op.out_features, op.shared) == ("w", 6, 4, False)
    np.testing.assert_allclose(compute(model, {"x": x})[0], x @ op.weight.T, rtol=1e-5, atol=1e-6)
    new = normal(4, 6, seed=9)
    nodes = [node.op for node in model.nodes]
    write_weights(model, op, new.astype(np.float64))
    np.testing.assert_allclose(compute(model, {"x": x})[0], x @ new.T, rtol=1e-5, atol=1e-6)
    assert [node.op for node in model.nodes] == nodes
    assert [t.name for t in model.initializers if t.dtype == np.float32] == ["w"]
    assert multiplied(model, op.node) == [model.tensor("w")]


@pytest.mark.parametrize(
    "chain",
    [
        "c = Cast<to=10>(w) d = Cast<to=1>(c) v = Transpose(d)",
        "s = Sqrt(w) v = Transpose(s)",
        "v = Transpose(x)",
        "n = Shape(x) v = Reshape(w, n)",
    ],
)
def test_what_is_computed_is_no_stored_weight(chain: str) -> None:
    model = net(
        f"{chain} y = MatMul(x, v)", {"w": (4, 6)}, x="float[6,4] x" if "n =" in chain else "float[4,6] x"
    )
    assert stored_weight(model, model.tensor("v")) is None
    found = linear_op(model, next(node for node in model.nodes if node.op == "MatMul"))
    assert found == "the weight of MatMul is computed, not constant"


@pytest.mark.parametrize(
    "more",
    ["z = MatMul(x, v)", "z = Neg(t)", "z = Neg(w)", "z = Identity(t)"],
)
def test_another_reader_anywhere_on_the_chain_shares_it(more: str) -> None:
    model = net(
        f"t = Transpose<perm=[1,0]>(w) v = Identity(t) y = MatMul(x, v) {more}",
        {"w": (4, 6)},
        y="float[A,B] y, float[C,D] z",
    )
    op = op_of(model)
    assert op.shared
    assert is_shared(model, op.weight_input, op.node)
    before = compute(model, {"x": normal(5, 6)})[1]
    write_weights(model, op, np.zeros((4, 6)))
    y, z = compute(model, {"x": normal(5, 6)})
    assert not y.any()
    np.testing.assert_array_equal(z, before)


def test_readers_behind_layouts() -> None:
    model = net(
        "t = Transpose<perm=[1,0]>(w) a = MatMul(x, t) b = MatMul(a, w) u = Unsqueeze(w, one) y = Add(b, u)",
        {"w": (4, 6), "one": np.array([0])},
        y="float[A,B,C] y",
    )
    found = {node.outputs[0].name: read.name for node, read in readers(model, model.tensor("w"))}
    assert found == {"a": "t", "b": "w", "y": "u"}


def test_a_bias_behind_a_layout() -> None:
    """torch writes the bias of a convolution that was taken apart so."""
    model = net(
        "h = Conv(x, w) r = Reshape(b, column) y = Add(h, r)",
        {"w": (4, 3, 1, 1), "b": normal(4), "column": np.array([-1, 1, 1])},
        x="float[N,3,5,5] x",
        y="float[A,B,C,D] y",
    )
    op = linear_op(model, model.nodes[0], model.shapes())
    assert isinstance(op, LinearOp)
    np.testing.assert_allclose(op.bias, normal(4), rtol=1e-6)
    write_weights(model, op, None, np.arange(4.0))
    x = normal(2, 3, 5, 5)
    wanted = np.einsum("nchw,oc->nohw", x, op.weight) + np.arange(4.0).reshape(-1, 1, 1)
    np.testing.assert_allclose(compute(model, {"x": x})[0], wanted, rtol=1e-4, atol=1e-5)
    assert math.prod(model.tensor("b").shape) == 4
