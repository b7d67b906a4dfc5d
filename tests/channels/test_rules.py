"""What freezes a group, which numbers a cut rewrites and how, and what taking refuses."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from channel_cases import (
    CASES,
    POOLED,
    Case,
    check,
    close,
    drawn,
    found,
    ints,
    norm,
    parameters,
    positive,
    sized,
)
from nets import RUNTIME, compute, linear, net, normal, weight
from onnx import numpy_helper

from onnxfuse.channels.dims import leaves
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import Group, find_groups
from onnxfuse.channels.masking import mask
from onnxfuse.channels.summary import summarize_groups
from onnxfuse.ir.editing import PASS_KEY
from onnxfuse.ir.model import Model
from onnxfuse.report.channels_view import channels_view
from onnxfuse.report.tables import plain_text

CONV = "a = Conv(x, w1, b1)"
WEIGHTS = sized("w1:8,3,1,1 b1:8 w2:4,8,1,1 wy:8,4 by:4")
MAPS = "float[A,B,C,D] y"


def reasons(case: Case) -> dict[str, str]:
    return {group.name: group.frozen or "" for group in found(case, case.model())}


# Frozen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{CONV} last = Softmax<axis=1>(a) {POOLED}", "Softmax over it"),
        (f"{CONV} m = ReduceProd<axes=[1]>(a) n = Sub(a, m) y = Conv(n, w2)", "ReduceProd over it"),
        (f"{CONV} i = ArgMax<axis=1>(a) j = Cast<to=1>(i) n = Sub(a, j) y = Conv(n, w2)", "ArgMax over it"),
        (f"{CONV} n = LRN<size=3>(a) y = Conv(n, w2)", "LRN mixes neighboring channels"),
        (f"{CONV} n = CumSum(a, one) y = Conv(n, w2)", "CumSum along it"),
        (f"{CONV} n = Hardmax<axis=1>(a) y = Conv(n, w2)", "Hardmax over it"),
        (f"{CONV} n = Gather<axis=1>(a, pair) y = Conv(n, w3)", "its indices are looked up"),
        (f"{CONV} n, i = TopK<axis=1>(a, eight) y = Conv(n, w2)", "TopK has no rule"),
        (f"""{CONV} n, i = MaxPool<kernel_shape=[2,2]>(a) j = Cast<to=1>(i) k = Add(n, j)
        y = Conv(k, w2)""", "maxima"),
        (f"{CONV} n = Dropout(a, half, true) y = Conv(n, w2)", "Dropout in training mode"),
        (f"{CONV} n = Slice(a, two, minus9, one, minus) y = Conv(n, w3)", "a part of it is taken"),
        (f"{CONV} n = Slice(a, minus9, far, one, two) y = Conv(n, w2b)", "a part of it is taken"),
        (f'{CONV} n = Pad<mode="reflect">(a, wide) y = Conv(n, w10)', "it is padded or cropped"),
        (f"""{CONV} s = Shape(a) r = Cast<to=1>(s) m = ReduceSum(r) n = Mul(a, m)
        y = Conv(n, w2)""", "its length is"),
        (f"""{CONV} s = Shape(a) q = Size(s) n = Identity(a) y = Conv(n, w2)
        z = Identity(s)""", "in the graph output"),
        (f"""{CONV} g = Conv<group=4>(a, w4) h = Conv<group=4>(g, w5) c = Concat<axis=1>(a, h)
        y = Conv<group=2>(c, w7)""",
         "are no whole rows of 10"),
    ],
)  # fmt: skip
def test_frozen(body: str, reason: str) -> None:
    constants = {
        "one": ints(1),
        "two": ints(2),
        "minus": ints(-1),
        "minus9": ints(-9),
        "far": ints(2**40),
        "pair": ints(1, 0, 3),
        "eight": ints(8),
        "half": np.float32(0.5),
        "true": np.array(True),
        "wide": ints(0, 1, 0, 0, 0, 1, 0, 0),
    }
    weights = {name: value for name, value in constants.items() if f" {name}" in body}
    shapes = sized("w3:4,3,1,1 w2b:4,4,1,1 w10:4,10,1,1 w4:8,2,1,1 w5:12,2,1,1 w7:4,10,1,1") | WEIGHTS
    weights |= {name: value for name, value in shapes.items() if name in body}
    outputs = "float[A,B] y" if POOLED in body else MAPS
    outputs += ", int64[Z] z" if "z = " in body else ""
    case = Case(body, weights, (), 0, y=outputs)
    assert reason in reasons(case)["a"], reasons(case)


def test_a_subgraph_freezes_what_it_uses() -> None:
    found_ = reasons(CASES["If on another tensor"])
    assert "If has no rule" in found_["b"]
    assert found_["a"] == ""


def test_a_foreign_operator_freezes_what_it_touches_and_nothing_else() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "other" : 1]>
    g (float[N,5] x) => (float[A,B] y) {
        a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) d = other.Thing(c) y = MatMul(d, w3) }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in {"w1": (5, 8), "w2": (8, 6), "w3": (6, 3)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(normal(*shape), name))
    groups = {group.name: group for group in find_groups(Model.load(proto))}
    assert groups["a"].frozen is None
    assert groups["c"].frozen == "Thing has no rule ('d' (Thing))"


def test_a_cache_of_keys_and_values_is_an_input() -> None:
    case = Case(
        """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        o, keys, values = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, , old_keys, old_values)
        y = MatMul(o, wo)""",
        sized("wq:6,16 wk:6,8 wv:6,10 wo:20,5"),
        (),
        0,
        x="float[N,T,6] x, float[N,2,P,4] old_keys, float[N,2,P,5] old_values",
        y="float[A,B,C] y, float[D,E,F,G] keys, float[H,I,J,K] values",
        opset=23,
    )
    groups = found(case, case.model())
    assert [group.structure for group in groups.free] == ["2 x [2] x 4"]  # query heads to a key head
    assert {
        group.structure: group.frozen for group in groups.frozen if group.name.startswith(("q", "v"))
    } == {
        "[2] x 2 x 4": "graph input 'old_values'",
        "2 x 2 x [4]": "graph input 'old_keys'",
        "[6]": "graph input 'x'",
        "2 x [5]": "graph input 'old_values'",
    }
    check(replace(case, exact=False), case.model(), drawn(groups.free, 0.5))


def test_rows_and_columns_alike() -> None:
    """x times its own transpose, flattened: no cut of the flat axis by one index."""
    case = Case(
        """h = MatMul(x, w1) t = Transpose<perm=[0,2,1]>(h) g = MatMul(t, h) f = Flatten(g)
        y = MatMul(f, w2)""",
        sized("w1:4,6 w2:36,3"),
        (),
        3,
        x="float[N,7,4] x",
    )
    assert "as rows and as columns" in reasons(case)["h"]


def test_only_one_size_of_a_target_can_be_left_open() -> None:
    """Heads and their dimensions are each merged with an axis of dynamic size."""
    case = Case(
        """q = MatMul(x, wq) r = Reshape(q, to) p = Transpose<perm=[0,2,1,3]>(r) s = Shape(x)
        n = Gather(s, zero)
        t = Gather(s, one) nh = Mul(n, three) td = Mul(t, four) nu = Unsqueeze(nh, i0) tu = Unsqueeze(td, i0)
        c = Concat<axis=0>(nu, tu) m = Reshape(p, c) u = Unsqueeze(n, i0) v = Unsqueeze(t, i0)
        d = Concat<axis=0>(u, heads, v, size) b = Reshape(m, d) e = Transpose<perm=[0,2,1,3]>(b)
        f = Flatten<axis=2>(e) y = MatMul(f, w1)""",
        sized("wq:8,12 w1:12,5")
        | {
            "to": ints(0, 0, 3, 4),
            "zero": np.array(0),
            "one": np.array(1),
            "three": np.array(3),
            "four": np.array(4),
            "i0": ints(0),
            "heads": ints(3),
            "size": ints(4),
        },
        (),
        0,
        x="float[N,T,8] x",
    )
    groups = found(case, case.model())
    assert [group.structure for group in groups.free] == ["[3] x 4"]
    assert "'m' computes its input 1[1] from lengths" in reasons(case)["q#2"]
    check(replace(case, exact=False), case.model(), drawn(found(case, case.model()).free, 0.7))


def test_a_sum_over_an_axis_merged_with_a_dynamic_one() -> None:
    case = Case(
        "a = Conv(x, w1) t = Transpose<perm=[0,2,1]>(a) f = Flatten(t) s = ReduceSum(f, one) y = Exp(s)",
        sized("w1:6,3,1") | {"one": ints(1)},
        (),
        2,
        x="float[N,3,T] x",
    )
    assert "axis of dynamic size" in reasons(case)["a"]


def test_without_samples_dynamic_sizes_freeze_only_what_depends_on_them() -> None:
    groups = find_groups(CASES["dynamic sizes"].model())
    assert [group.size for group in groups.free] == [8, 6]
    groups = find_groups(CASES["grouped-query attention"].model())
    assert all(group.frozen for group in groups if group.size == 2)


def test_zero_and_one_dimensional_weights_are_nobodys_channels() -> None:
    case = Case(
        f"{CONV} s = Mul(a, scale) t = Add(s, shift) last = Clip(t, low, high) {POOLED}",
        WEIGHTS | {"scale": np.float32(2), "shift": normal(1), "low": np.float32(-1), "high": np.float32(1)},
        (8,),
        2,
    )
    check(case, case.model(), drawn(found(case, case.model()).free, 0.5))


# Numbers ------------------------------------------------------------------------------------------

HEADS = "q = MatMul(x, wq)"
TOKENS = {"x": "float[N,T,8] x", "y": "float[A,B,C] y"}
NUMBERS = {
    "a shared target": Case(
        f"""{HEADS} r = Reshape(q, to) s = Reshape(r, back) h = MatMul(s, w1) k = Reshape(h, to)
        l = Reshape(k, back)
        y = MatMul(l, w2)""",
        sized("wq:8,16 w1:16,16 w2:16,5") | {"to": ints(0, 0, 4, 4), "back": ints(0, 0, 16)},
        (4, 4, 4, 4),
        2,
        **TOKENS,
    ),
    "a Concat of lengths and constants": Case(
        f"""{HEADS} s = Shape(x) n = Gather(s, zero) t = Gather(s, one) nu = Unsqueeze(n, i0)
        tu = Unsqueeze(t, i0)
        c = Concat<axis=0>(nu, tu, heads, size) r = Reshape(q, c) p = Transpose<perm=[0,2,1,3]>(r)
        u = Transpose<perm=[0,2,1,3]>(p) d = Concat<axis=0>(nu, tu, all) b = Reshape(u, d) e = Reshape(b, c)
        f = Flatten<axis=2>(e) g = Reshape(f, d) y = MatMul(g, w1)""",
        sized("wq:8,12 w1:12,5")
        | {
            "zero": np.array(0),
            "one": np.array(1),
            "i0": ints(0),
            "heads": ints(3),
            "size": ints(4),
            "all": ints(12),
        },
        (3, 4),
        2,
        **TOKENS,
    ),
    "a Concat that is cast": Case(
        f"""{HEADS} s = Shape<end=2>(x) t = Cast<to=6>(s) c = Concat<axis=0>(t, heads, size) d = Cast<to=7>(c)
        e = Identity(d) r = Reshape(q, e) b = Flatten<axis=2>(r) z = Reshape(b, back) y = MatMul(z, w1)""",
        sized("wq:8,12 w1:12,5")
        | {"heads": np.array([3], np.int32), "size": np.array([4], np.int32), "back": ints(-1, 12)},
        (3, 4),
        2,
        x=TOKENS["x"],
    ),
    "a Concat shared by two groups": Case(
        f"""{HEADS} s = Shape<end=2>(x) c = Concat<axis=0>(s, heads, size) d = Concat<axis=0>(s, all)
        r = Reshape(q, c) b = Reshape(r, d) h = MatMul(b, w1) k = Reshape(h, c) l = Reshape(k, d)
        y = MatMul(l, w2)""",
        sized("wq:8,12 w1:12,12 w2:12,5") | {"heads": ints(3), "size": ints(4), "all": ints(12)},
        (3, 4, 3, 4),
        2,
        **TOKENS,
    ),
    "a length computed from another": Case(
        """q = MatMul(x, wq) s = Shape(q) c = Gather(s, last) h = Div(c, three) hu = Unsqueeze(h, i0)
        t = Concat<axis=0>(lead, hu) r = Reshape(q, t) b = Flatten<axis=2>(r) z = Reshape(b, back)
        y = MatMul(z, w1)""",
        sized("wq:8,12 w1:12,5")
        | {
            "last": np.array(2),
            "three": np.array(3),
            "i0": ints(0),
            "lead": ints(0, 0, 3),
            "back": ints(-1, 12),
        },
        (3, 4),
        2,
        x=TOKENS["x"],
    ),
    "batch and heads merged": Case(
        """q = MatMul(x, wq) s = Shape(x) t = Gather(s, zero) n = Gather(s, one) h = Mul(n, three)
        tu = Unsqueeze(t, i0)
        hu = Unsqueeze(h, i0) c = Concat<axis=0>(tu, hu, four) r = Reshape(q, c)
        p = Transpose<perm=[1,0,2]>(r)
        e = Softmax<axis=1>(p) b = Transpose<perm=[1,0,2]>(e) nu = Unsqueeze(n, i0)
        d = Concat<axis=0>(tu, nu, all)
        f = Reshape(b, d) y = MatMul(f, w1)""",
        sized("wq:8,12 w1:12,5")
        | {
            "zero": np.array(0),
            "one": np.array(1),
            "three": np.array(3),
            "i0": ints(0),
            "four": ints(4),
            "all": ints(12),
        },
        (3, 4),
        2,
        x="float[T,N,8] x",
        y=TOKENS["y"],
    ),
    "a length as a number": Case(
        f"""{HEADS} s = Shape(q) c = Gather(s, last) f = Cast<to=1>(c) d = Sqrt(f) z = Div(q, d)
        y = MatMul(z, w1)""",
        sized("wq:8,12 w1:12,5") | {"last": np.array(2)},
        (12,),
        2,
        **TOKENS,
    ),
    "Slice, Split and Pad": Case(
        f"""{CONV} s = Slice(a, two, far, one) p = Pad(s, pads) u, v = Split<axis=1>(p) m = Mul(u, v)
        n = Slice(m, low, high, one) e = Conv(m, w2) f = Conv(n, w3) y = Add(e, f)""",
        sized("w1:8,3,1,1 b1:8 w2:5,4,1,1 w3:5,2,1,1")
        | {
            "one": ints(1),
            "two": ints(2),
            "far": ints(2**40),
            "pads": ints(0, 1, 0, 0, 0, 1, 0, 0),
            "low": ints(-3),
            "high": ints(-1),
        },
        (2, 2, 2),  # never read; in the middle of the product; at its ends, half of it padding
        2,
        y=MAPS,
    ),
    "every other channel": Case(
        f"""{CONV} e = Slice(a, i0, far, i1, i2) o = Slice(a, i1, i8, i1, i2) c = Concat<axis=1>(o, e)
        y = Conv(c, w2)""",
        sized("w1:8,3,1,1 b1:8 w2:4,8,1,1")
        | {"i0": ints(0), "far": ints(2**40), "i1": ints(1), "i2": ints(2), "i8": ints(8)},
        (4,),
        2,
        y=MAPS,
    ),
    "an Expand": Case(
        f"{CONV} s = Reshape(sum, four) e = Expand(s, to) m = Mul(a, e) y = Conv(m, w2)",
        sized("w1:8,3,1,1 b1:8 w2:4,8,1,1")
        | {"sum": normal(1), "four": ints(1, 1, 1, 1), "to": ints(1, 8, 6, 1)},
        (8,),
        2,
        y=MAPS,
    ),
    "a Tile": Case(
        f"{CONV} t = Tile(a, by) n = Tile(one, channels) m = Mul(t, n) y = Conv(m, w2)",
        sized("w1:8,3,1,1 b1:8 w2:4,16,1,1 one:1,1,1,1")
        | {"by": ints(1, 2, 1, 1), "channels": ints(1, 16, 1, 1)},
        (8,),
        2,
        y=MAPS,
    ),
    "initial states made of zeros": Case(
        """t = Transpose<perm=[1,0,2]>(x) s = Shape(x) n = Gather(s, i0) to = Concat<axis=0>(i1, n, i6)
        z = ConstantOfShape(to) o, h, c = LSTM<hidden_size=6>(t, w, r, , , z, z) q = Squeeze(h, i0)
        y = MatMul(q, w2)""",
        sized("w:1,24,8 r:1,24,6 w2:6,3") | {"i0": ints(0), "i1": ints(1), "i6": ints(6)},
        (6,),
        2,
        x=TOKENS["x"],
    ),
    "a Resize to sizes": Case(
        f"""{CONV} s = Shape<end=2>(a) to = Concat<axis=0>(s, larger) r = Resize<mode="nearest">(a, , , to)
        t = Resize<mode="nearest">(r, , , all) y = Conv(t, w2)""",
        sized("w1:8,3,1,1 b1:8 w2:4,8,1,1") | {"larger": ints(9, 9), "all": ints(3, 8, 10, 10)},
        (8,),
        2,
        x="float[3,3,6,6] x",
        y=MAPS,
    ),
    "a sequence": Case(
        f"""{CONV} s = SplitToSequence<axis=1>(a, four) u = SequenceAt(s, i0) v = SequenceAt(s, i1)
        m = Mul(u, v)
        p = SplitToSequence<axis=1>(m, parts) q = SequenceAt(p, i0) r = SequenceAt(p, i1)
        c = Concat<axis=1>(r, q) y = Conv(c, w2)""",
        sized("w1:8,3,1,1 b1:8 w2:4,4,1,1")
        | {"four": np.array(4), "i0": np.array(0), "i1": np.array(1), "parts": ints(1, 3)},
        (3,),  # what has a tensor of its own can't go
        2,
        y=MAPS,
    ),
    "weights reshaped on the way": Case(
        """wt = Reshape(w1, to) h = MatMul(x, wt) r = Relu(h) v = Unsqueeze(w2, i2) u = Squeeze(v, i2)
        y = MatMul(r, u)""",
        sized("w1:8,3,4 w2:12,5") | {"to": ints(8, 12), "i2": ints(2)},
        (3, 4),
        2,
        **TOKENS,
    ),
    "weights computed from weights": Case(
        """sq = Mul(v, v) ss = ReduceSum(sq, over) rs = Sqrt(ss) n = Div(v, rs) w = Mul(n, g) h = MatMul(x, w)
        r = Relu(h) y = MatMul(r, w2)""",
        sized("v:8,12 g:12 w2:12,5") | {"over": ints(0)},
        (12,),
        2,
        **TOKENS,
    ),
    "quantized weights": Case(
        """w = DequantizeLinear<axis=1>(wq, scale, zero) h = MatMul(x, w) r = Relu(h) y = MatMul(r, w2)""",
        sized("w2:12,5")
        | {
            "wq": np.random.default_rng(0).integers(-99, 99, (8, 12)).astype(np.int8),
            "scale": positive(12) / 99,
            "zero": np.zeros(12, np.int8),
        },
        (12,),
        2,
        **TOKENS,
    ),
}
NUMBERS |= {
    f"{name}, opset {opset}": replace(NUMBERS["Slice, Split and Pad"], body=body, opset=opset)
    for name, opset, body in (
        ("attributes", 9, """s = Slice<starts=[2], ends=[9999999999], axes=[1]>(a)
            p = Pad<pads=[0,1,0,0,0,1,0,0]>(s) u, v = Split<axis=1, split=[4,4]>(p) m = Mul(u, v)
            n = Slice<starts=[-3], ends=[-1], axes=[1]>(m) e = Conv(m, w2) f = Conv(n, w3) y = Add(e, f)"""),
        ("even parts", 11, """s = Slice(a, two, far, one) p = Pad(s, pads) u, v = Split<axis=1>(p)
        m = Mul(u, v)
            n = Slice(m, low, high, one) e = Conv(m, w2) f = Conv(n, w3) y = Add(e, f)"""),
        ("parts counted", 18, """s = Slice(a, two, far, one) p = Pad(s, pads)
        u, v = Split<axis=1, num_outputs=2>(p)
            m = Mul(u, v) n = Slice(m, low, high, one) e = Conv(m, w2) f = Conv(n, w3) y = Add(e, f)"""),
    )
    for body in [f"{CONV} {body}"]
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_follow(name: str) -> None:
    case = NUMBERS[name]
    model = case.model()
    groups = found(case, model)
    assert tuple(group.size for group in groups.free) == case.free, [g.frozen for g in groups]
    for group in groups.free:
        for share in (0.7, 0.3):
            check(replace(case, exact=False), model, drawn([group], share))
    check(replace(case, exact=False), model, drawn(groups.free, 0.6, seed=1))


def test_a_list_that_others_use_is_not_touched() -> None:
    case = NUMBERS["a shared target"]
    model = case.model()
    first = found(case, model).free[0]
    take(model, {first: [0, 2]})
    assert weight(model, "to").tolist() == [0, 0, 4, 4]
    r, k = (model.producer(model.tensor(name)) for name in "rk")
    assert r is not None
    assert k is not None
    assert weight(model, r.inputs[1].name).tolist() == [0, 0, 2, 4]
    assert k.inputs[1].name == "to"


def test_a_list_of_one_node_is_changed_in_place() -> None:
    case = CASES["attention"]
    model = case.model()
    heads = found(case, model).free[0]
    assert [str(n.place) for n in heads.numbers] == ["input 1[2]"] * 3
    take(model, {heads: [1]})
    assert weight(model, "back").tolist() == [0, 0, -1]
    lists = {t.name: weight(model, t.name).tolist() for t in model.initializers if t.dtype == np.int64}
    assert lists == {
        "back": [0, 0, -1],
        "heads": [0, 0, 1, 4],
        "heads_1": [0, 0, 1, 4],
        "heads_2": [0, 0, 1, 4],
    }


def test_a_concat_is_cloned_with_its_constants_replaced() -> None:
    case = NUMBERS["a Concat of lengths and constants"]
    model = case.model()
    take(model, {found(case, model).free[0]: [0, 2]}, by="select")
    made = [n for n in model.nodes if n.metadata.get(PASS_KEY) == "select"]
    assert {n.op for n in made} == {"Concat"}
    assert {t.name for t in model.initializers} >= {"size"}


def test_what_the_edits_say() -> None:
    case = CASES["grouped"]
    model = case.model()
    groups = found(case, model)
    edits = take(model, {groups.free[0]: [1, 3], groups.free[1]: [0, 2]})
    assert edits.weights["w0", 0].tolist() == [3, 5, 9, 11]
    assert edits.weights["w1", 0].tolist() == [2, 3, 6, 7]
    assert edits.weights["w1", 1].tolist() == [0, 2]
    assert edits.numbers == (("c", "group", 4, 2),)
    assert weight(model, "w1").shape == (4, 2, 3, 3)


def test_pads_may_vanish() -> None:
    """Of a stage's own channels only those behind the shortcut's are kept."""
    case = CASES["shortcut of Slice and Pad"]
    model = case.model()
    own = next(group for group in found(case, model).free if len(group.leaves) == 2)
    assert own.structure == "[2] + 6 + [4]"
    cut = check(case, model, {own: np.array([2, 3, 4, 5])})
    pad = next(node for node in cut.nodes if node.op == "Pad")
    assert weight(cut, pad.inputs[1].name).tolist() == [0, 0, 0, 0, 0, 4, 0, 0]


# Taking -------------------------------------------------------------------------------------------


def test_positions_of_inner_tensors() -> None:
    """The index maps also tell which part of an activation is left."""
    case = CASES["concat"]
    model = case.model()
    groups = found(case, model)
    choice = drawn(groups.free[:1], 0.5)
    cut = model.copy()
    take(cut, choice)
    feed = case.feed(model, 2)
    (a,), (b,) = compute(model, feed, "a"), compute(cut, feed, "a")
    at = groups.positions("a", choice)
    assert [len(own) for own in at] == list(b.shape)
    np.testing.assert_array_equal(b, a[np.ix_(*at)])
    before, behind = groups.positions("d", choice)[1], groups.positions("c", choice)[1]
    assert before.tolist() == [*at[1], *(behind + 8)]


def test_what_taking_refuses() -> None:
    case = CASES["plain"]
    model = case.model()
    groups = found(case, model)
    before = model.to_proto().SerializeToString(deterministic=True)
    frozen, first = groups.frozen[0], groups.free[0]
    other = found(case, case.model()).free[1]
    for choice, reason in (
        ({frozen: [0]}, "is frozen: graph input 'x'"),
        ({first: [0, 8]}, "has 8 indices"),
        ({first: [-1]}, "has 8 indices"),
        ({first: []}, "would be empty"),
        ({first: [0], other: [0]}, "different models"),
    ):
        with pytest.raises(ValueError, match=reason):
            take(model, choice)
    with pytest.raises(ValueError, match="is repeated"):
        mask(model, {first: [0, 0]})
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert take(model, {}).weights == {}
    assert mask(model, {}).to_proto() == model.to_proto()


def test_groups_hold_for_copies_and_change_nothing() -> None:
    case = CASES["residual"]
    model = case.model()
    before = model.to_proto().SerializeToString(deterministic=True)
    choice = drawn(found(case, model).free, 0.5)
    first, second = model.copy(), model.copy()
    take(first, choice)
    take(second, choice)
    assert first.to_proto() == second.to_proto()
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_cutting_twice_is_cutting_once() -> None:
    case = CASES["inverted residual with SE"]
    model = case.model()
    once, twice = model.copy(), model.copy()
    take(once, {group: np.arange(0, group.size, 4) for group in found(case, once).free})
    for _ in range(2):
        take(twice, {group: np.arange(0, group.size, 2) for group in found(case, twice).free})
    for name, value in parameters(once).items():
        np.testing.assert_array_equal(weight(twice, name), value)


def test_removed_channels_are_not_what_they_would_be_elsewhere() -> None:
    """Zero where channels are summed up, not where they are computed: a sigmoid makes 0.5 of a zero."""
    case = CASES["batch norm"]
    model = case.model()
    group = found(case, model).free[0]
    masked = mask(model, {group: [0, 1, 2]})
    feed = case.feed(model, 2)
    (r,) = compute(masked, feed, "r")
    assert np.abs(r[:, 3:]).min() > 0
    (n,) = (node for node in masked.nodes if node.op == "Mul")
    assert n.inputs[0].name == "r"
    (into,) = compute(masked, feed, n.outputs[0].name)
    assert not into[:, 3:].any()
    np.testing.assert_array_equal(into[:, :3], r[:, :3])


def test_statistics_are_taken_over_what_stays() -> None:
    """The masked LayerNormalization is that of the remaining channels, by numpy."""
    case = CASES["embedding and layer norm"]
    model = case.model()
    hidden = found(case, model).free[0]
    assert hidden.statistics == ("n", "m")
    kept = [0, 3, 4, 7, 11]
    feed = case.feed(model, 2)
    masked = mask(model, {hidden: kept})
    e, n = compute(masked, feed, "e", "n")
    x = e[..., kept].astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    close(n[..., kept], expected * weight(model, "g")[kept] + weight(model, "b")[kept])
    assert found(CASES["plain"], CASES["plain"].model()).free[0].statistics == ()


def test_extremes_are_those_of_what_stays() -> None:
    """Also where all of it is below zero, the value of a channel that is multiplied by zero; by numpy."""
    case = CASES["spatial gate"]
    weights = {**case.weights, "b1": np.linspace(-9, -5, 8, dtype=np.float32)}
    model = replace(case, weights=weights).model()
    gated = found(case, model).free[1]
    assert gated.statistics == ("m", "n", "l")
    kept = [1, 2, 6]
    feed = case.feed(model, 2)
    (b,) = compute(model, feed, "b")
    cut = model.copy()
    take(cut, {gated: kept})
    for other in (cut, mask(model, {gated: kept})):
        for name, extreme in (("m", np.max), ("l", np.min)):
            close(compute(other, feed, name)[0], extreme(b[:, kept], axis=1, keepdims=True))


# Looking ------------------------------------------------------------------------------------------


def test_what_a_group_says() -> None:
    case = CASES["depthwise"]
    groups = found(case, case.model())
    first = groups["a"]
    assert first is groups.free[0]
    assert {(t.weight, t.axis, t.roles, t.nodes) for t in first.touches} == {
        ("w0", 0, ("producer",), ("a",)),
        ("b0", 0, (), ()),
        ("w1", 0, ("along",), ("c",)),
        ("b1", 0, (), ()),
        ("w2", 1, ("consumer",), ("last",)),
    }
    assert [(s.node, s.tensor, s.slot, s.axis) for s in first.sinks] == [("last", "q", 0, 1)]
    np.testing.assert_array_equal(first.places(first.sinks[0].dim), np.arange(8)[:, None])
    with pytest.raises(KeyError):
        groups["nothing"]


def test_normalisations_work_along_the_channels() -> None:
    case = CASES["batch norm"]
    roles = {t.weight: t.roles for t in found(case, case.model()).free[0].touches}
    assert roles == {"w1": ("producer",), "w2": ("consumer",), **dict.fromkeys(norm("n", 1, 0), ("along",))}


def test_both_axes_of_a_recurrent_weight() -> None:
    case = CASES["LSTM"]
    touches = {(t.weight, t.axis): t for t in found(case, case.model()).free[0].touches}
    assert touches["r", 1].roles == ("producer",)
    assert touches["r", 2].roles == ("consumer",)
    assert touches["r", 1].map[2].tolist() == [2, 8, 14, 20]
    assert touches["w2", 0].map[2].tolist() == [2, 8]


def test_the_view() -> None:
    case = CASES["attention"]
    text = plain_text(channels_view(summarize_groups(found(case, case.model()))))
    assert "5 channel groups, 3 can be cut" in text
    assert "q0: 3, [3] x 4" in text
    assert "reads wo axis 0 x 4" in text
    assert "sets input 1[2] of 'q1'" in text
    assert "frozen, it reaches the graph output 'y'" in text
    assert max(map(len, text.splitlines())) <= 80


def chain(count: int) -> Model:
    """Residual blocks of four nodes, all on one stream."""
    body, weights = ["h0 = Conv(x, w)"], {"w": (8, 3, 1, 1)}
    for i in range(1, count // 4 + 1):
        body.append(
            f"""a{i} = Conv(h{i - 1}, u{i}) b{i} = Relu(a{i}) c{i} = Conv(b{i}, v{i})
            h{i} = Add(c{i}, h{i - 1})"""
        )
        weights |= {f"u{i}": (6, 8, 1, 1), f"v{i}": (8, 6, 1, 1)}
    body.append(
        f"last = Relu(h{count // 4}) gap = GlobalAveragePool(last) flat = Flatten(gap) y = Gemm(flat, wy)"
    )
    return net(" ".join(body), weights | {"wy": (8, 4)}, "float[N,3,4,4] x")


def test_time_is_linear_in_the_number_of_nodes() -> None:
    def seconds(count: int) -> float:
        model = chain(count)
        feed: dict[str, Any] = {"x": normal(2, 3, 4, 4)}
        model.shapes()
        start = time.process_time()
        groups = find_groups(model, feed, RUNTIME)
        assert len(groups.free) == count // 4 + 1
        take(model, drawn(groups.free, 0.5))
        return time.process_time() - start

    assert linear(seconds, 1000)


def test_groups_are_data() -> None:
    """Nothing but the group's own fields is needed to know what a cut does to a weight."""
    case = CASES["flatten to dense"]
    model = case.model()
    group: Group = found(case, model).free[0]
    kept = np.array([1, 4, 5])
    expected = {
        t.weight: np.take(weight(model, t.weight), np.sort(t.map[kept].reshape(-1)), t.axis)
        for t in group.touches
    }
    take(model, {group: kept})
    for name, value in expected.items():
        np.testing.assert_array_equal(weight(model, name), value)


@pytest.mark.parametrize(
    ("name", "node", "parts"),
    [
        ("grouped", "c", ["4 x [3]"]),
        ("channel shuffle", "c", ["[3] x 4"]),
        ("the Attention operator", "o", ["2 x 3 x [4]"]),
    ],
)
def test_groups_and_heads_are_summed_up_each_for_itself(name: str, node: str, parts: list[str]) -> None:
    """A sink names the factor of its axis that the operator sums up over."""
    case = CASES[name]
    groups = found(case, case.model())
    sinks = [sink for sink in groups.system.sinks if sink.node == node]
    assert all(sink.part is not sink.dim for sink in sinks)
    summed = [g.structure for g in groups.free if any(set(g.leaves) & set(leaves(s.part)) for s in sinks)]
    assert summed == parts
