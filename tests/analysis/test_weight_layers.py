"""The layers of a network: which weights are one's, what role it has, and what can share a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from nets import net, normal
from onnx import numpy_helper

from onnxfuse.analysis.weight_layers import WeightLayer, find_weight_layers, heads, kin
from onnxfuse.ir.model import Model

MODELS = Path(__file__).parents[2] / "models"
PROJECTED = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
SQUARE = dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8))
TOKENS = {"x": "float[N,5,8] x", "y": "float[A,B,C] y"}


def layers_of(model: Model) -> list[WeightLayer]:
    found, skips = find_weight_layers(model)
    assert not skips
    return found


def roles(model: Model) -> dict[str, str]:
    return {layer.tensor.name: layer.role for layer in layers_of(model)}


def reasons(model: Model) -> list[tuple[tuple[str, ...], str]]:
    return [(skip.nodes, skip.reason) for skip in find_weight_layers(model)[1]]


def attention(scores: str, **more: object) -> Model:
    """Projections by wq, wk and wv; `scores` computes c from q, k and v; wo reads c."""
    weights = {**SQUARE, "half": np.float32(0.5), **more}
    return net(f"{PROJECTED} {scores} y = MatMul(c, wo)", weights, **TOKENS, opset=18)


ATTENTION = {"wq": "query", "wk": "key", "wv": "value", "wo": "output"}
NO_ATTENTION = dict.fromkeys(ATTENTION, "token")


def test_plain_layers() -> None:
    model = net(
        "h = Gemm<transB = 1>(x, a, bias) r = Relu(h) i = MatMul(r, b) y = Gemm<transB = 1>(i, c)",
        {"a": (8, 6), "bias": (8,), "b": (8, 6), "c": (8, 6)},
    )
    first, second, third = layers_of(model)
    assert [(layer.name, layer.role, layer.index) for layer in (first, second, third)] == [
        ("h", "dense", 0),
        ("i", "dense", 1),
        ("y", "dense", 2),
    ]
    assert first.tensor is model.tensor("a")
    np.testing.assert_array_equal(second.matrix, model.weight(model.tensor("b")).T)
    assert second.matrix.dtype == np.float64
    assert kin([first, second, third]) == [[first, third], [second]]


def test_what_differs() -> None:
    model = net(
        """a = Conv<pads = [1, 1, 1, 1]>(x, wa)
        b = Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>(a, wb)
        c = Conv<pads = [1, 1, 1, 1], group = 2>(b, wc)
        d = Conv<pads = [1, 1, 1, 1], group = 4>(c, wd)
        e = Conv<pads = [0, 1, 0, 1]>(d, we)
        f = Conv<pads = [1, 0, 1, 0]>(e, wf)
        g = ConvTranspose<pads = [1, 1, 1, 1]>(f, wg)
        h = Flatten(g)
        i = Gemm(h, wi) j = Gemm<alpha = 0.5>(i, wj) k = Gemm<transB = 1>(j, wk) y = Gemm(k, wl)""",
        {
            "wa": (4, 4, 3, 3),
            "wb": (4, 4, 3, 3),
            "wc": (4, 2, 3, 3),
            "wd": (4, 1, 3, 3),
            "we": (4, 4, 1, 3),
            "wf": (4, 4, 3, 1),
            "wg": (4, 4, 3, 3),
            "wi": (64, 64),
            "wj": (64, 64),
            "wk": (64, 64),
            "wl": (64, 8),
        },
        x="float[N,4,4,4] x",
    )
    a, b, c, d, e, f, g, i, j, k, y = layers_of(model)
    assert [layer.role for layer in (a, g, i)] == ["conv", "conv_transpose", "dense"]
    assert d.matrix.shape == (4, 9)
    assert kin([a, b]) == [[a, b]]
    for first, second in ((a, c), (c, d), (a, e), (e, f), (a, g), (i, j), (i, k), (i, y)):
        assert kin([first, second]) == [[first], [second]]
    assert [len(own) for own in kin([a, b, c, d, e, f, g, i, j, k, y])] == [2, *[1] * 9]


def test_types_differ() -> None:
    model = net(
        "a = MatMul(x, wa) d = Cast<to = 11>(a) b = MatMul(d, wb) y = Cast<to = 1>(b)",
        {"wa": (6, 6), "wb": normal(6, 6).astype(np.float64)},
    )
    assert [len(own) for own in kin(layers_of(model))] == [1, 1]


def test_tied_weights_are_one_layer() -> None:
    model = net("h = MatMul(x, w) r = Relu(h) i = MatMul(r, v) y = MatMul(i, w)", {"w": (6, 6), "v": (6, 6)})
    first, second = layers_of(model)
    assert [op.name for op in first.ops] == ["h", "y"]
    assert (first.index, second.index, second.name) == (0, 1, "i")


def test_other_readers() -> None:
    tied = net(
        "e = Gather(table, i) t = Transpose<perm = [1, 0]>(table) y = MatMul(e, w) z = MatMul(y, t)",
        {"table": (9, 6), "w": (6, 6)},
        x="int64[N,5] i",
        y="float[A,B,C] z",
    )
    assert reasons(tied) == [(("z",), "its weight table is also used by 'e' (Gather)")]
    assert [layer.tensor.name for layer in find_weight_layers(tied)[0]] == ["w"]
    untransposed = net(
        "e = Gather(table, i) y = MatMul(e, table)",
        {"table": (6, 6)},
        x="int64[N,5] i",
        y="float[A,B,C] y",
    )
    assert reasons(untransposed) == [(("y",), "its weight table is also used by 'e' (Gather)")]
    both = net("h = MatMul(x, w) y = Gemm<transB = 1>(h, w)", {"w": (6, 6)})
    assert reasons(both) == [(("h", "y"), "its weight w is used as different matrices")]
    twice = net("y = Gemm(x, w, w)", {"w": (6, 6)}, x="float[6,6] x")
    assert find_weight_layers(twice)[0] == []


def test_not_linear() -> None:
    model = net(
        "a = MatMul(w, x) b = MatMul(a, stack) y = MatMul(b, b)",
        {"w": (6, 6), "stack": (2, 6, 6)},
        x="float[6,6] x",
        y="float[A,B,C] y",
    )
    assert reasons(model) == [
        (("a",), "MatMul has its weight first"),
        (("b",), "the weight of MatMul has rank 3"),
    ]
    model = net(
        """t = Transpose<perm=[1,0,2]>(x) s, h = GRU<hidden_size=6>(t, w, r) q = Squeeze(s, i1)
        e = Einsum<equation="tni,ij->tnj">(q, m) y = MatMul(e, v)""",
        {"w": (1, 18, 5), "r": (1, 18, 6), "m": (6, 6), "v": (6, 3), "i1": np.array([1])},
        x="float[N,T,5] x",
        y="float[A,B,C] y",
    )
    assert reasons(model) == [
        (("s",), "GRU is not a linear operator"),
        (("e",), "Einsum is not a linear operator"),
    ]


def test_a_weight_that_is_an_output_or_in_a_body() -> None:
    body = """h = MatMul(x, w)
    y = If(c) <
        then_branch = a () => (float[A,B] t) { t = MatMul(h, w) },
        else_branch = b () => (float[A,B] e) { e = MatMul(h, v) }>"""
    inside = net(body, {"w": (6, 6), "v": (6, 6), "c": np.array(True)})
    assert find_weight_layers(inside)[0] == []
    ((nodes, reason),) = reasons(inside)
    assert nodes == ("h",)
    assert reason == "its weight w is also used by a body of 'y' (If)"
    shown = net("h = MatMul(x, w)", {"w": (6, 6)}, y="float[A,B] h, float[6,6] w")
    assert reasons(shown) == [(("h",), "its weight w is also an output of the graph")]


def test_every_way_to_store_a_weight() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,2] x, float[2,2] listed = {1, 2, 3, 4}) => (float[A,B] y)
    <float[2,2] plain = {1, 2, 3, 4}> {
        inner = Constant<value = float[2,2] {5, 6, 7, 8}>()
        a = MatMul(x, listed) b = MatMul(a, plain) y = MatMul(b, inner)
    }"""
    first, second, third = layers_of(Model.load(onnx.parser.parse_model(text)))
    assert kin([first, second, third]) == [[first, second, third]]
    np.testing.assert_array_equal(third.matrix, [[5, 7], [6, 8]])


# ---- attention -------------------------------------------------------------------------------------------


def test_the_shipped_transformer() -> None:
    model = Model.load(MODELS / "tiny_transformer.onnx")
    found = layers_of(model)
    expected = [f"/layers.{block}.{part}/MatMul" for block in range(4) for part in PARTS]
    assert [layer.name for layer in found] == [*expected, "/classify/Gemm"]
    assert [layer.role for layer in found] == [*PARTS.values()] * 4 + ["dense"]
    assert [heads(model, layer) for layer in found] == [4, 4, 4, 4, None, None] * 4 + [None]
    assert [len(own) for own in kin(found)] == [4] * 6 + [1]


PARTS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "project": "output",
    "expand": "token",
    "contract": "token",
}


@pytest.mark.parametrize("how", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["bert", "gpt", "vit", "llama"])
def test_exported_transformers(name: str, how: str, exported: Callable[[str, str], Path]) -> None:
    """Packed or apart, split by Split or by Gather, rotated, masked, with fewer key heads."""
    model = Model.load(exported(name, how))
    found = [(layer.role, heads(model, layer)) for layer in layers_of(model)]
    packed = [("query+key+value", 4), ("output", 4), ("token", None), ("token", None)]
    apart = [("query", 4), ("key", 2), ("value", 2), ("output", 4), *[("token", None)] * 3]
    block = apart if name == "llama" else packed
    start = 1 if name == "vit" else 0
    assert found[start : start + 2 * len(block)] == 2 * block
    assert all("query" not in role and role != "output" for role, _ in found[start + 2 * len(block) :])


SCORES = {
    "matmul": "t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) p = Softmax(s) c = MatMul(p, v)",
    "scaled": """t = Transpose<perm = [0, 2, 1]>(k) h = Mul(q, half) s = MatMul(h, t)
        m = Add(s, half) p = Softmax<axis = 2>(m) d = Dropout(p) c = MatMul(d, v)""",
    "keys first": """t = Transpose<perm = [0, 2, 1]>(q) s = MatMul(k, t)
        u = Transpose<perm = [0, 2, 1]>(s) p = Softmax(u) c = MatMul(p, v)""",
    "values first": """t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) p = Softmax(s)
        r = Transpose<perm = [0, 2, 1]>(p) u = Transpose<perm = [0, 2, 1]>(v) w = MatMul(u, r)
        c = Transpose<perm = [0, 2, 1]>(w)""",
    "einsum": """s = Einsum<equation = "bid, bjd -> bij">(q, k) p = Softmax(s)
        c = Einsum<equation = "bij,bjd->bid">(p, v)""",
    "einsum, keys first": """s = Einsum<equation = "bjd,bid->bij">(k, q) p = Softmax(s)
        c = Einsum<equation = "bjd,bij->bid">(v, p)""",
}


@pytest.mark.parametrize("scores", SCORES)
def test_attention_is_recognised(scores: str) -> None:
    assert roles(attention(SCORES[scores])) == ATTENTION


NOT_ATTENTION = {
    "no softmax": "t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) c = MatMul(s, v)",
    "over the wrong axis": """t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t)
        p = Softmax<axis = 1>(s) c = MatMul(p, v)""",
    "a sum of two": "z = Add(q, k) p = Softmax(z) c = Mul(p, v)",
    "implicit einsum": 's = Einsum<equation = "bid,bjd">(q, k) p = Softmax(s) c = MatMul(p, v)',
}


@pytest.mark.parametrize("scores", NOT_ATTENTION)
def test_what_only_looks_like_attention(scores: str) -> None:
    found = roles(attention(NOT_ATTENTION[scores]))
    assert {role for name, role in found.items() if name in ("wq", "wk", "wo")} == {"token"}


def test_unlike_sources_have_none() -> None:
    mixed = attention(
        "z = Add(q, x) u = Add(k, q) t = Transpose<perm = [0, 2, 1]>(u) s = MatMul(z, t) p = Softmax(s) "
        "w = MatMul(p, v) c = Mul(w, q)"
    )
    assert roles(mixed) == {"wq": "query", "wk": "token", "wv": "value", "wo": "token"}
    # What was mixed stays so: a third source doesn't become the only one.
    mixed = attention(
        "z = Add(q, k) u = Add(z, v) t = Transpose<perm = [0, 2, 1]>(u) s = MatMul(q, t) p = Softmax(s) "
        "c = MatMul(p, k)"
    )
    assert roles(mixed) == {"wq": "query", "wk": "value", "wv": "token", "wo": "output"}


def test_packed_projections() -> None:
    model = net(
        """a = MatMul(x, w) q, k, v = Split<axis = 2>(a, sizes) t = Transpose<perm = [0, 2, 1]>(k)
        s = MatMul(q, t) p = Softmax(s) c = MatMul(p, v) y = MatMul(c, wo)""",
        {"w": (8, 24), "wo": (8, 8), "sizes": np.array([8, 8, 8])},
        **TOKENS,
    )
    assert roles(model) == {"w": "query+key+value", "wo": "output"}
    model = net(
        """q = MatMul(x, wq) a = MatMul(x, w) k, v = Split<axis = 2>(a, sizes)
        t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, v)""",
        {"wq": (8, 8), "w": (8, 16), "sizes": np.array([8, 8])},
        **TOKENS,
    )
    assert roles(model) == {"wq": "query", "w": "key+value"}


def load(text: str, *square: str, opset: int = 23, size: tuple[int, int] = (8, 8)) -> Model:
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{header} g (float[N,5,8] x) => (float[A,B,C] y) {{ {text} }}")
    proto.graph.initializer.extend(numpy_helper.from_array(normal(*size), name) for name in square)
    return Model.load(proto)


def test_attention_operators() -> None:
    text = f"{PROJECTED} c = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v) y = MatMul(c, wo)"
    proto = load(text, *SQUARE)
    assert roles(proto) == ATTENTION
    assert [heads(proto, layer) for layer in layers_of(proto)] == [4, 2, 2, 4]
    text = f"{PROJECTED} c = com.microsoft.MultiHeadAttention<num_heads = 4>(q, k, v) y = MatMul(c, wo)"
    assert roles(load(text, *SQUARE)) == ATTENTION
    text = "a = MatMul(x, w) c = com.microsoft.MultiHeadAttention<num_heads = 4>(a) y = MatMul(c, v)"
    assert roles(load(text, "w", "v")) == {"w": "query+key+value", "v": "output"}
    unknown = "t = Transpose<perm = [0, 2, 1]>(k) s = com.microsoft.FusedMatMul(q, t) p = Softmax(s)"
    model = load(f"{PROJECTED} {unknown} c = MatMul(p, v) y = MatMul(c, wo)", *SQUARE)
    assert roles(model) == NO_ATTENTION


@pytest.mark.parametrize(
    ("split", "count"),
    [
        ("shape = Constant<value = int64[4] {0, 0, 2, 4}>() h = Reshape(q, shape)", 2),
        ("shape = Constant<value = int64[4] {0, 5, -1, 2}>() h = Reshape(q, shape)", 4),
        (
            """n = Shape<start = 0, end = 1>(x) tail = Constant<value = int64[3] {5, 4, 2}>()
            shape = Concat<axis = 0>(n, tail) h = Reshape(q, shape)""",
            4,
        ),
        ("h = Relu(q)", None),
        ("shape = Constant<value = int64[3] {0, 5, 8}>() h = Reshape(q, shape)", None),
        ("shape = Constant<value = int64[2] {-1, 40}>() h = Reshape(q, shape)", None),
        (
            """shape = Constant<value = int64[4] {0, 5, 2, 4}>() g = Reshape(q, shape)
            other = Constant<value = int64[4] {0, 5, 4, 2}>() h = Reshape(q, other) u = Relu(g)""",
            None,
        ),
    ],
)
def test_heads(split: str, count: int | None) -> None:
    scores = "t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) p = Softmax(s) c = MatMul(p, v)"
    model = net(
        f"{PROJECTED} {split} {scores} y = MatMul(c, wo)",
        SQUARE,
        x="float[N,5,8] x",
        y="float[A,B,C] y",
        opset=18,
    )
    query = layers_of(model)[0]
    assert query.role == "query"
    assert heads(model, query) == count
