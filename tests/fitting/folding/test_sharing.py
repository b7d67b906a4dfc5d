"""What reads one weight goes on reading one weight: aliases, equal subexpressions, tied operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from nets import compute, net, normal, stored_in
from onnx import helper, numpy_helper

from onnxfuse.ir.model import Model
from onnxfuse.passes.fold import Fold
from onnxfuse.pipeline.base import PassResult

BN = {name: np.abs(normal(6, seed=i)) + 0.5 for i, name in enumerate("gbmv")}
OTHER = {name: np.abs(normal(6, seed=9 + i)) + 0.5 for i, name in enumerate("hcno")}
IMAGE, MAPS = "float[N,4,5,5] x", "float[A,B,C,D] y"


def fold(model: Model, *feeds: dict[str, np.ndarray]) -> PassResult:
    """Folded, with outputs unchanged and no number more."""
    result = Fold().run(model.copy(), None)  # type: ignore[arg-type]
    before, after = model.to_proto(), result.model.to_proto()
    onnx.checker.check_model(after)
    for one, two in zip(stored_in(before), stored_in(after), strict=True):
        assert two <= one
    for node in after.graph.node:
        del node.metadata_props[:]  # what a node stands for takes a few bytes
    assert after.ByteSize() <= before.ByteSize()
    for feed in feeds:
        for expected, got in zip(compute(model, feed), compute(result.model, feed), strict=True):
            np.testing.assert_allclose(
                got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(initial=1e-6)
            )
    return result


def kinds(result: PassResult) -> list[str]:
    return [node.op for node in result.model.nodes]


def stored(result: PassResult) -> set[str]:
    return {tensor.name for tensor in result.model.initializers}


def reasons(result: PassResult) -> str:
    return "; ".join(skip.reason for skip in result.skipped)


X6 = {"x": normal(3, 6)}
IF = "float[N,6] x, bool c"

ALIASES = {
    "an Identity": "v = Identity(w) h = MatMul(x, w) y = MatMul(h, v)",
    "a chain": "v = Identity(w) u = Identity(v) h = MatMul(x, v) r = Relu(h) y = MatMul(r, u)",
    "a Dropout": "v = Dropout(w) h = MatMul(x, w) y = MatMul(h, v)",
    "a Cast to its type": "v = Cast<to = 1>(w) h = MatMul(x, w) y = MatMul(h, v)",
    "a Reshape to its shape": "v = Reshape(w, s) h = MatMul(x, w) y = MatMul(h, v)",
    "a Squeeze of an Unsqueeze": "u = Unsqueeze(w, a) v = Squeeze(u, a) h = MatMul(x, w) y = MatMul(h, v)",
    "a Transpose of a Transpose": "u = Transpose(w) v = Transpose(u) h = MatMul(x, w) y = MatMul(h, v)",
}


@pytest.mark.parametrize("how", ALIASES)
def test_readers_of_an_alias_read_the_weight(how: str) -> None:
    weights = {"w": (6, 6), "s": np.array([6, 6]), "a": np.array([0])}
    used = {
        name: value
        for name, value in weights.items()
        if f"{name})" in ALIASES[how] or f"{name}," in ALIASES[how]
    }
    result = fold(net(ALIASES[how].replace("h = MatMul(x, w)", "g = MatMul(x, w) h = Tanh(g)"), used), X6)
    assert stored(result) == {"w"}
    assert set(kinds(result)) <= {"MatMul", "Tanh", "Relu"}


def test_an_alias_that_is_an_output_stays_for_that_alone() -> None:
    model = net(
        "v = Identity(w) h = MatMul(x, v) g = Tanh(h) y = MatMul(g, v)",
        {"w": (6, 6)},
        y="float[A,B] y, float[6,6] v",
    )
    result = fold(model, X6)
    assert kinds(result).count("Identity") == 1
    assert [n.inputs[1].name for n in result.model.nodes if n.op == "MatMul"] == ["w", "w"]
    assert stored(result) == {"w"}


BRANCHES = """h = MatMul(x, w) {outer}
    y = If(c) <
        then_branch = a () => (float[A,B] t) {{ {then} }},
        else_branch = b () => (float[A,B] e) {{ e = MatMul(h, w) }}>"""


@pytest.mark.parametrize(
    ("outer", "then"),
    [
        ("v = Identity(w)", "t = MatMul(h, v)"),
        ("", "v = Identity(w) t = MatMul(h, v)"),
        ("v = Identity(w)", "u = Identity(v) s = Relu(h) t = MatMul(s, u)"),
        ("v = Transpose(w) u = Transpose(w)", "s = MatMul(h, v) t = MatMul(s, u)"),
    ],
)
@pytest.mark.parametrize("flag", [True, False])
def test_subgraphs_read_the_weight_too(outer: str, then: str, flag: bool) -> None:
    model = net(BRANCHES.format(outer=outer, then=then), {"w": (6, 6)}, x=IF)
    result = fold(model, {**X6, "c": np.array(flag)})
    assert stored(result) == {"w"}
    assert kinds(result) == ["MatMul", *(["Transpose"] if "Transpose" in outer else []), "If"]
    inside = [node.op_type for body in result.model.nodes[-1].bodies for node in body.node]
    assert "Identity" not in inside


def test_equal_subexpressions_of_one_weight_are_one() -> None:
    """Weight normalization written out at each of two uses: one weight comes of it, read by both."""
    norm = """n{0} = ReduceL2<axes = [1], keepdims = 1>(v) d{0} = Div(v, n{0}) w{0} = Mul(d{0}, g)
        t{0} = Transpose(w{0})"""
    body = f"{norm.format(1)} {norm.format(2)} h = MatMul(x, t1) r = Tanh(h) y = MatMul(r, t2)"
    result = fold(net(body, {"v": (6, 6), "g": (6, 1)}, opset=13), X6)
    assert kinds(result) == ["MatMul", "Tanh", "MatMul"]
    assert len(stored(result)) == 1


def test_literals_are_equal_by_value_and_weights_are_not() -> None:
    same = """s1 = Constant<value_ints = [6, 6]>() s2 = Constant<value_ints = [6, 6]>() a = Reshape(w, s1)
        b = Reshape(w, s2) h = MatMul(x, a) r = Tanh(h) y = MatMul(r, b)"""
    assert len(stored(fold(net(same, {"w": (36,)}), X6))) == 1
    apart = "a = Exp(v) b = Exp(w) h = MatMul(x, a) r = Tanh(h) y = MatMul(r, b)"
    value = normal(6, 6) / 6
    assert len(stored(fold(net(apart, {"v": value, "w": value}), X6))) == 2


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    model = net(
        "a = RandomNormalLike(w) b = RandomNormalLike(w) c = Sub(a, b) y = MatMul(x, c)", {"w": (6, 6)}
    )
    assert kinds(fold(model)).count("RandomNormalLike") == 2


# ---- what would be stored twice ---------------------------------------------------------------------------


IDS = {"ids": np.array([[0, 2, 1]])}
LARGER = {
    "a tied head": (
        "h = Gather(e, ids) t = Transpose<perm = [1, 0]>(e) y = MatMul(h, t)",
        {"e": (9, 4)},
        IDS,
    ),
    "two tied heads": (
        "h = Gather(e, ids) t = Transpose<perm = [1, 0]>(e) u = Transpose<perm = [1, 0]>(e) "
        "g = MatMul(h, t) k = MatMul(h, u) y = Add(g, k)",
        {"e": (9, 4)},
        IDS,
    ),
    "a scalar blown up": (
        "m = Expand(one, s) h = Gather(e, ids) y = Add(h, m)",
        {"one": np.float32(2), "s": np.array([1, 3, 4]), "e": (9, 4)},
        IDS,
    ),
    "a mask of zeros": (
        "m = ConstantOfShape(s) h = Gather(e, ids) y = Add(h, m)",
        {"s": np.array([1, 3, 4]), "e": (9, 4)},
        IDS,
    ),
    "a tile of what stays": (
        "m = Tile(b, s) h = Gather(e, ids) k = Add(h, b) y = Mul(k, m)",
        {"b": (1, 1, 4), "s": np.array([1, 3, 1]), "e": (9, 4)},
        IDS,
    ),
    "another type": (
        "e = Cast<to = 1>(half) h = Gather(e, ids) y = Neg(h)",
        {"half": np.ones((9, 4), np.float16)},
        IDS,
    ),
}


@pytest.mark.parametrize("how", LARGER)
def test_what_would_be_larger_is_left_to_the_graph(how: str) -> None:
    body, weights, feed = LARGER[how]
    model = net(body, weights, x="int64[N,T] ids", y="float[A,B,C] y")
    result = fold(model, feed)
    assert stored(result) == set(weights)
    assert "on top of what stays in use" in reasons(result)
    assert len(result.model.nodes) == len(model.nodes) - (how == "two tied heads")


@pytest.mark.parametrize(
    ("zeros", "goes"),
    [
        ("o = Shape<start = 0, end = 1>(w) k = Expand(zero, o)", True),
        ("t = CastLike(zero, x) o = Constant<value_ints = [6]>() k = Expand(t, o)", True),
        ("o = Constant<value_ints = [6]>() k = ConstantOfShape(o)", True),
        ("o = Constant<value_ints = [6]>() k = Expand(one, o)", False),
    ],
)
def test_a_row_of_zeros_made_for_a_layer_without_a_bias_goes(zeros: str, goes: bool) -> None:
    body = f"{zeros} a = Conv(x, w, k) y = BatchNormalization(a, g, b, m, v)"
    model = net(body, {"w": (6, 4, 3, 3), "zero": np.float32(0), "one": np.float32(1), **BN}, x=IMAGE, y=MAPS)
    result = fold(model, {"x": IMAGES["x"]})
    assert ("BatchNormalization" not in kinds(result)) == goes
    assert ("a bias of zeros" in "; ".join(change.what for change in result.changes)) == goes


def test_an_alias_before_a_function_goes_and_its_body_is_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N,6] x) => (float[A,B] y) {
            v = Identity(w) h = own.twice(x, w) r = Tanh(h) y = own.twice(r, v) }
        <domain: "own", opset_import: ["" : 17]>
        twice (a, p) => (b) { q = Identity(p) c = MatMul(a, q) b = MatMul(c, p) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(normal(6, 6) / 3, "w"))
    result = fold(Model.load(proto), X6)
    assert kinds(result) == ["twice", "Tanh", "twice"]
    assert stored(result) == {"w"}


# ---- operators over one weight ----------------------------------------------------------------------------


SIAMESE = """a = Conv(x, w{b}) p = BatchNormalization(a, g, b, m, v) q = Relu(p)
    d = Conv(z, w{b}) e = BatchNormalization(d, {other}) f = Relu(e) y = Sub(q, f)"""
PAIR = "float[N,4,5,5] x, float[N,4,5,5] z"
IMAGES = {"x": normal(2, 4, 5, 5), "z": normal(2, 4, 5, 5, seed=5)}


@pytest.mark.parametrize("bias", ["", ", k"])
def test_a_siamese_pair_folds_into_one_weight(bias: str) -> None:
    weights: dict[str, Any] = {"w": (6, 4, 3, 3), "k": (6,), **BN}
    if not bias:
        del weights["k"]
    model = net(SIAMESE.format(b=bias, other="g, b, m, v"), weights, x=PAIR, y=MAPS)
    result = fold(model, IMAGES)
    assert kinds(result) == ["Conv", "Relu", "Conv", "Relu", "Sub"]
    assert stored(result) == ({"w", "k"} if bias else {"w", "w_bias"})
    first, second = (node for node in result.model.nodes if node.op == "Conv")
    assert [t is u for t, u in zip(first.inputs[1:], second.inputs[1:], strict=True)] == [True, True]


def test_norms_that_differ_stay_behind_a_tied_weight() -> None:
    model = net(SIAMESE.format(b="", other="h, c, n, o"), {"w": (6, 4, 3, 3), **BN, **OTHER}, x=PAIR, y=MAPS)
    result = fold(model, IMAGES)
    assert result.changes == []
    assert "does not take the same" in reasons(result)


def test_equal_scales_and_other_shifts_are_one_weight_and_two_biases() -> None:
    weights = {"w": (6, 4, 3, 3), **BN, "c": BN["b"] + 1}
    result = fold(net(SIAMESE.format(b="", other="g, c, m, v"), weights, x=PAIR, y=MAPS), IMAGES)
    assert "BatchNormalization" not in kinds(result)
    assert len(stored(result)) == 3


def test_a_third_reader_keeps_the_norms() -> None:
    body = SIAMESE.format(b="", other="g, b, m, v").replace(
        "y = Sub(q, f)", "r = Conv(z, w) i = Sub(q, f) y = Mul(i, r)"
    )
    result = fold(net(body, {"w": (6, 4, 3, 3), **BN}, x=PAIR, y=MAPS), IMAGES)
    assert kinds(result).count("BatchNormalization") == 2


def test_norms_before_tied_layers_go_into_one_weight() -> None:
    body = """r = Relu(x) p = BatchNormalization(r, g, b, m, v) q = Gemm(p, w, k)
        s = Tanh(z) t = BatchNormalization(s, g, b, m, v) u = Gemm(t, w, k) y = Sub(q, u)"""
    model = net(body, {"w": (6, 3), "k": (3,), **BN}, x="float[N,6] x, float[N,6] z")
    result = fold(model, {"x": normal(3, 6), "z": normal(3, 6, seed=2)})
    assert kinds(result) == ["Relu", "Gemm", "Tanh", "Gemm", "Sub"]
    assert stored(result) == {"w", "k"}


def test_tied_dense_layers_take_a_shared_scale() -> None:
    body = "a = MatMul(x, w) p = Mul(a, s) q = Tanh(p) d = MatMul(z, w) e = Mul(s, d) y = Sub(q, e)"
    model = net(body, {"w": (6, 3), "s": (3,)}, x="float[N,6] x, float[N,6] z")
    result = fold(model, {"x": normal(3, 6), "z": normal(3, 6, seed=2)})
    assert kinds(result) == ["MatMul", "Tanh", "MatMul", "Sub"]
    assert stored(result) == {"w"}


def test_tied_pairs_are_joined_alike_and_stay_tied() -> None:
    body = """a = Gemm(x, w, k) b = Gemm(a, v) c = Tanh(b) d = Gemm(z, w, k) e = Gemm(d, v) y = Sub(c, e)"""
    model = net(body, {"w": (6, 9), "k": (9,), "v": (9, 3)}, x="float[N,6] x, float[N,6] z")
    result = fold(model, {"x": normal(3, 6), "z": normal(3, 6, seed=2)})
    assert kinds(result) == ["Gemm", "Tanh", "Gemm", "Sub"]
    first, second = (node for node in result.model.nodes if node.op == "Gemm")
    assert first.inputs[1:] == second.inputs[1:]
    assert len(stored(result)) == 2


def test_a_pair_whose_first_weight_is_tied_stays() -> None:
    body = "a = MatMul(x, w) b = MatMul(a, v) c = Tanh(b) y = MatMul(c, w)"
    result = fold(net(body, {"w": (6, 6), "v": (6, 6)}), X6)
    assert result.changes == []
    assert "the weights of the first one are shared" in reasons(result)


def test_a_number_for_all_channels_is_no_bias_for_each() -> None:
    result = fold(
        net("a = Conv(x, w) y = Add(a, s)", {"w": (6, 4, 3, 3), "s": np.float32(3)}, x=IMAGE, y=MAPS),
        {"x": IMAGES["x"]},
    )
    assert kinds(result) == ["Conv", "Add"]


def test_a_strided_pair_of_fewer_parameters_stays() -> None:
    """One operator would take fewer multiplications, 1600 for 2448 a position, but 1600 numbers for 720."""
    body = "a = Conv(x, w) y = Conv<strides = [2, 2]>(a, v)"
    model = net(body, {"w": (4, 16, 3, 3), "v": (4, 4, 3, 3)}, x="float[N,16,H,W] x", y=MAPS)
    result = fold(model, {"x": normal(1, 16, 9, 9)})
    assert kinds(result) == ["Conv", "Conv"]
    assert "880 numbers more would be stored" in reasons(result)


def test_a_bias_that_others_read_gives_way_to_one_of_the_norm() -> None:
    """Behind a norm of its own each operator has a shift of its own: the common bias tied nothing."""
    body = """a = Conv(x, w, k) p = BatchNormalization(a, g, b, m, v) d = Conv(z, u, k)
        e = BatchNormalization(d, h, c, n, o) y = Sub(p, e)"""
    weights = {"w": (6, 4, 3, 3), "u": (6, 4, 3, 3), "k": (6,), **BN, **OTHER}
    result = fold(net(body, weights, x=PAIR, y=MAPS), IMAGES)
    assert kinds(result) == ["Conv", "Conv", "Sub"]
    scaled = body.replace("BatchNormalization(a, g, b, m, v)", "Mul(a, s)").replace(
        "BatchNormalization(d, h, c, n, o)", "Relu(d)"
    )
    model = net(scaled, {"w": (6, 4, 3, 3), "u": (6, 4, 3, 3), "k": (6,), "s": (6, 1, 1)}, x=PAIR, y=MAPS)
    assert fold(model, IMAGES).changes == []


def test_aliases_that_a_user_may_feed_can_still_be_fed() -> None:
    proto = net("v = Identity(w) h = MatMul(x, w) g = Tanh(h) y = MatMul(g, v)", {"w": (6, 6)}).to_proto()
    proto.graph.input.append(helper.make_tensor_value_info("w", 1, [6, 6]))
    model = Model.load(proto)
    other = {**X6, "w": normal(6, 6, seed=8)}
    assert stored(fold(model, X6, other)) == {"w"}
    assert numpy_helper.to_array(proto.graph.initializer[0]).shape == (6, 6)
