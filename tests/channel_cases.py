"""Graphs with coupled channels of every kind, and what a cut of them is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.shape_inference
from nets import RUNTIME, Feed, compute, net, normal, weight
from onnx import helper

from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import ChannelGroups, Group, find_groups
from onnxfuse.channels.masking import mask
from onnxfuse.ir.model import Model


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(normal(*shape, seed=seed)) + 0.5


@dataclass(frozen=True)
class Case:
    """A graph, the sizes of the groups that can be cut, in order, and how many can't.

    `exact` says that all sinks are products with weights, so that zeroing their columns is an oracle of its
    own and that duplicates can be scaled away; `more` are further inputs.
    """

    body: str
    weights: dict[str, Any]
    free: tuple[int, ...]
    frozen: int
    x: str = "float[N,3,6,6] x"
    y: str = "float[A,B] y"
    exact: bool = True
    opset: int = 17
    more: dict[str, np.ndarray] = field(default_factory=dict)
    edit: Callable[[onnx.ModelProto], None] | None = None

    def model(self) -> Model:
        model = net(self.body, self.weights, self.x, self.y, self.opset)
        if self.edit is None:
            return model
        proto = model.to_proto()
        self.edit(proto)
        return Model.load(proto)

    def feed(self, model: Model, batch: int, seed: int = 0) -> Feed:
        """Dynamic sizes but the batch are 8."""
        random = np.random.default_rng(seed)
        feed: Feed = dict(self.more)
        for info in model.inputs:
            if info.name in feed:
                continue
            assert info.shape is not None
            shape = [d if isinstance(d, int) else batch if i == 0 else 8 for i, d in enumerate(info.shape)]
            if info.dtype == np.int64:
                feed[info.name] = random.integers(0, 10, shape)
            else:
                feed[info.name] = random.standard_normal(shape).astype(info.dtype)
        return feed


def sized(text: str) -> dict[str, Any]:
    """Shapes of random weights, `w:8,3,3,3 b:8`."""
    pairs = (word.split(":") for word in text.split())
    return {name: tuple(map(int, sizes.split(","))) for name, sizes in pairs}


def norm(name: str, channels: int, seed: int) -> dict[str, np.ndarray]:
    """Parameters of a BatchNormalization that is not the identity."""
    values = (1 + normal(channels, seed=seed) / 4, normal(channels, seed=seed + 1) / 2)
    statistics = (normal(channels, seed=seed + 2) / 4, positive(channels, seed=seed + 3))
    return dict(zip((f"{name}g", f"{name}b", f"{name}m", f"{name}v"), (*values, *statistics), strict=True))


def constant_nodes(proto: onnx.ModelProto) -> None:
    """All initializers as Constant nodes."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes += proto.graph.node
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)


def listed_as_inputs(proto: onnx.ModelProto) -> None:
    """All initializers listed among the inputs, as old exporters do."""
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def declared(proto: onnx.ModelProto) -> None:
    """All inferred shapes declared."""
    proto.CopyFrom(onnx.shape_inference.infer_shapes(proto, data_prop=True))


POOLED = "gap = GlobalAveragePool(last) flat = Flatten(gap) y = Gemm(flat, wy, by)"
PLAIN = f"a = Conv<pads=[1,1,1,1]>(x, w1, b1) ar = Relu(a) b = Conv(ar, w2) last = Sigmoid(b) {POOLED}"
PLAIN_WEIGHTS = sized("w1:8,3,3,3 b1:8 w2:6,8,3,3 wy:6,4 by:4")
SHORTCUT = """t = Constant<value_ints=[2]>() z = ConstantOfShape<value = int64[1] {0}>(t)
    p1 = Concat<axis=0>(lead, z) sh = Constant<value_ints=[-1,2]>() p2 = Reshape(p1, sh)
    p3 = Transpose<perm=[1,0]>(p2) flatten = Constant<value_ints=[-1]>() p4 = Reshape(p3, flatten)
    pads = Cast<to=7>(p4) half = Slice(u, i0, far, i2, i2) quarter = Slice(half, i0, far, i3, i2)
    s = Pad(quarter, pads)"""

CASES = {
    "plain": Case(PLAIN, PLAIN_WEIGHTS, (8, 6), 2),
    "dense": Case(
        """h = MatMul(x, w1) a = Add(h, b1) r = Tanh(a) k = Gemm<transB=1>(r, w2, b2) s = Softplus(k)
        y = MatMul(s, w3)""",
        sized("w1:5,12 b1:12 w2:7,12 b2:7 w3:7,3"),
        (12, 7),
        2,
        x="float[N,5] x",
    ),
    "batch norm": Case(
        f"""a = Conv(x, w1) n = BatchNormalization(a, ng, nb, nm, nv) r = Sigmoid(n) b = Conv(r, w2, b2)
        m = BatchNormalization(b, mg, mb, mm, mv) last = Elu(m) {POOLED}""",
        sized("w1:8,3,3,3 w2:6,8,3,3 b2:6 wy:6,4 by:4") | norm("n", 8, 1) | norm("m", 6, 5),
        (8, 6),
        2,
    ),
    "residual": Case(
        f"""a = Conv<pads=[1,1,1,1]>(x, w0) u = Relu(a) c = Conv<pads=[1,1,1,1]>(u, w1, b1) r = Relu(c)
        d = Conv<pads=[1,1,1,1]>(r, w2) s = Add(d, u) v = Relu(s) e = Conv(v, w3, b3) q = Conv(v, w4)
        last = Add(e, q) {POOLED}""",
        sized("w0:8,3,3,3 w1:10,8,3,3 b1:10 w2:8,10,3,3 w3:5,8,1,1 b3:5 w4:5,8,1,1 wy:5,4 by:4"),
        (8, 10, 5),
        2,
    ),
    "shortcut of Slice and Pad": Case(
        f"""a = Conv<pads=[1,1,1,1]>(x, w0, b0) u = Relu(a) c = Conv<pads=[1,1,1,1], strides=[2,2]>(u, w1, b1)
        r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w2, b2) {SHORTCUT} e = Add(d, s) last = Relu(e) {POOLED}""",
        sized("w0:6,3,3,3 b0:6 w1:12,6,3,3 b1:12 w2:12,12,3,3 b2:12 wy:12,4 by:4")
        | {
            "i0": ints(0),
            "far": ints(2**63 - 1),
            "i2": ints(2),
            "i3": ints(3),
            "lead": ints(0, 0, 2, 4, 0, 0),
        },
        (6, 12, 6),  # the second stage's own channels lie before and behind those of the first
        2,
    ),
    "concat": Case(
        f"""a = Conv<pads=[1,1,1,1]>(x, w0, b0) b = BatchNormalization(a, ng, nb, nm, nv) br = Relu(b)
        c = Conv<pads=[1,1,1,1]>(br, w1, b1) d = Concat<axis=1>(a, c)
        e = BatchNormalization(d, mg, mb, mm, mv)
        er = Sigmoid(e) f = Conv<pads=[1,1,1,1]>(er, w2) last = Concat<axis=1>(d, f) {POOLED}""",
        sized("w0:8,3,3,3 b0:8 w1:4,8,3,3 b1:4 w2:4,12,3,3 wy:16,4 by:4")
        | norm("n", 8, 1)
        | norm("m", 12, 5),
        (8, 4, 4),
        2,
    ),
    "U-net": Case(
        """a = Conv<pads=[1,1,1,1]>(x, w0, b0) ar = Relu(a) d = MaxPool<kernel_shape=[2,2], strides=[2,2]>(ar)
        b = Conv<pads=[1,1,1,1]>(d, w1, b1) br = Relu(b) u = ConvTranspose<strides=[2,2]>(br, wt, bt)
        c = Concat<axis=1>(u, ar) e = Conv<pads=[1,1,1,1]>(c, w2, b2) er = Relu(e)
        p = Resize<mode="linear">(er, , scales) y = Conv(p, w3)""",
        sized("w0:6,3,3,3 b0:6 w1:8,6,3,3 b1:8 wt:8,5,2,2 bt:5 w2:7,11,3,3 b2:7 w3:2,7,1,1")
        | {"scales": np.array([1, 1, 2, 2], np.float32)},
        (6, 8, 5, 7),
        2,
        y="float[A,B,C,D] y",
    ),
    "grouped": Case(
        f"""a = Conv(x, w0, b0) r = Relu(a) c = Conv<pads=[1,1,1,1], group=4>(r, w1, b1) last = Sigmoid(c)
        {POOLED}""",
        sized("w0:12,3,1,1 b0:12 w1:8,3,3,3 b1:8 wy:8,4 by:4"),
        (4, 3, 2),  # groups, inputs of a group, outputs of a group
        2,
    ),
    "grouped, transposed": Case(
        f"""a = Conv(x, w0, b0) r = Relu(a) c = ConvTranspose<strides=[2,2], group=2>(r, w1, b1)
        last = Sigmoid(c) {POOLED}""",
        sized("w0:6,3,1,1 b0:6 w1:6,4,2,2 b1:8 wy:8,4 by:4"),
        (2, 3, 4),
        2,
    ),
    "depthwise": Case(
        f"""a = Conv(x, w0, b0) r = Relu(a) c = Conv<pads=[1,1,1,1], group=8>(r, w1, b1) q = Sigmoid(c)
        last = Conv(q, w2) {POOLED}""",
        sized("w0:8,3,1,1 b0:8 w1:8,1,3,3 b1:8 w2:5,8,1,1 wy:5,4 by:4"),
        (8, 5),
        2,
    ),
    "inverted residual with SE": Case(
        f"""s = Conv(x, w0) e = Conv(s, w1) n = BatchNormalization(e, ng, nb, nm, nv) h = HardSwish(n)
        d = Conv<pads=[1,1,1,1], group=12>(h, w2) m = BatchNormalization(d, mg, mb, mm, mv) k = Relu(m)
        q = ReduceMean<axes=[2,3]>(k) q1 = Conv(q, w3, b3) q2 = Sigmoid(q1) q3 = Conv(q2, w4, b4)
        q4 = HardSigmoid(q3) t = Mul(k, q4) p = Conv(t, w5) last = Add(p, s) {POOLED}""",
        sized("w0:6,3,1,1 w1:12,6,1,1 w2:12,1,3,3 w3:4,12,1,1 b3:4 w4:12,4,1,1 b4:12 w5:6,12,1,1 wy:6,4 by:4")
        | norm("n", 12, 1)
        | norm("m", 12, 5),
        (6, 12, 4),
        2,
    ),
    "flatten to dense": Case(
        """a = Conv(x, w1, b1) r = Relu(a) f = Flatten(r) h = Gemm(f, w2, b2) s = Relu(h) y = Gemm(s, w3)""",
        sized("w1:8,3,3,3 b1:8 w2:128,9 b2:9 w3:9,4"),
        (8, 9),
        2,
    ),
    "channels last, flattened by a reshape": Case(
        """a = Conv(x, w1, b1) r = Relu(a) t = Transpose<perm=[0,2,3,1]>(r) f = Reshape(t, to)
        y = MatMul(f, w2)""",
        sized("w1:8,3,3,3 b1:8 w2:128,4") | {"to": ints(-1, 128)},
        (8,),
        2,
    ),
    "channel shuffle": Case(
        f"""a = Conv(x, w0, b0) r = Relu(a) s = Reshape(r, apart) t = Transpose<perm=[0,2,1,3,4]>(s)
        u = Reshape(t, back) c = Conv<pads=[1,1,1,1], group=4>(u, w1) last = Relu(c) {POOLED}""",
        sized("w0:12,3,1,1 b0:12 w1:8,3,3,3 wy:8,4 by:4")
        | {"apart": ints(0, 3, 4, 6, 6), "back": ints(0, -1, 6, 6)},
        (3, 4, 2),
        2,
    ),
    "split into gates": Case(
        """a = Conv(x, w0, b0) p, q = Split<axis=1>(a) s = Sigmoid(q) m = Mul(p, s) n = Conv(m, w1, b1)
        u, v, w = Split<axis=1>(n, parts) ur = Relu(u) vr = Sigmoid(v) wr = Tanh(w)
        last = Concat<axis=1>(wr, ur, vr) gap = GlobalAveragePool(last) flat = Flatten(gap)
        y = Gemm(flat, wy)""",
        sized("w0:12,3,1,1 b0:12 w1:9,6,1,1 b1:9 wy:9,4") | {"parts": ints(2, 3, 4)},
        (6, 9),  # the three parts lie side by side on the same axes
        2,
    ),
    "tied weights": Case(
        """h = MatMul(x, w) r = Relu(h) k = MatMul(r, v) s = Relu(k) l = MatMul(s, v) t = Relu(l)
        wt = Transpose<perm=[1,0]>(w) m = MatMul(t, wt) y = Sigmoid(m)""",
        sized("w:5,12 v:12,12"),
        (12,),
        1,
        x="float[N,5] x",
        exact=False,  # one weight both computes and reads the channels
    ),
    "two branches with shared weights": Case(
        """a = Conv(x, w1, b1) ar = Relu(a) b = Conv(z, w1, b1) br = Relu(b) c = Concat<axis=1>(ar, br)
        d = Conv(c, w2, b2) last = Relu(d) gap = GlobalMaxPool(last) flat = Flatten(gap)
        y = Gemm(flat, wy)""",
        sized("w1:6,3,3,3 b1:6 w2:5,12,3,3 b2:5 wy:5,4"),
        (6, 5),
        2,
        x="float[N,3,6,6] x, float[N,3,6,6] z",
    ),
    "dynamic sizes": Case(PLAIN, PLAIN_WEIGHTS, (8, 6), 2, x="float[N,3,H,W] x"),
    "weights in Constant nodes": Case(PLAIN, PLAIN_WEIGHTS, (8, 6), 2, edit=constant_nodes),
    "weights listed as inputs": Case(PLAIN, PLAIN_WEIGHTS, (8, 6), 2, edit=listed_as_inputs),
    "half precision": Case(
        "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)",
        sized("") | {"w1": normal(5, 12).astype(np.float16), "w2": normal(12, 3).astype(np.float16)},
        (12,),
        2,
        x="float16[N,5] x",
        y="float16[A,B] y",
    ),
    "If on another tensor": Case(
        """a = Gemm(x, w1, b1) r = Relu(a) b = Gemm(r, w2) u = Relu(b)
        c = If(flag) <then_branch = t () => (float[A,B] p) { p = Neg(u) },
                      else_branch = e () => (float[A,B] q) { q = Exp(u) }>
        y = Gemm(c, w3)""",
        sized("w1:5,12 b1:12 w2:12,6 w3:6,3"),
        (12,),
        4,  # what the subgraph uses, and what it gives
        x="float[N,5] x, bool flag",
        more={"flag": np.array(True)},
    ),
    "embedding and layer norm": Case(
        """e = Gather(table, x) n = LayerNormalization(e, g, b) h = MatMul(n, w1)
        r = Gelu<approximate="tanh">(h)
        k = MatMul(r, w2) s = Add(n, k) m = LayerNormalization(s, g2, b2) y = MatMul(m, w3)""",
        sized("table:10,12 b:12 w1:12,20 w2:20,12 b2:12 w3:12,4")
        | {"g": positive(12), "g2": positive(12, seed=3)},
        (12, 20),
        1,
        x="int64[N,T] x",
        y="float[A,B,C] y",
        exact=False,
        opset=20,
    ),
    "layer norm written out": Case(
        """h = MatMul(x, w1) m = ReduceMean<axes=[-1]>(h) d = Sub(h, m) q = Pow(d, two)
        v = ReduceMean<axes=[-1]>(q)
        ve = Add(v, eps) sd = Sqrt(ve) n = Div(d, sd) ng = Mul(n, g) nb = Add(ng, b) y = MatMul(nb, w2)""",
        sized("w1:5,12 g:12 b:12 w2:12,4") | {"two": np.float32(2), "eps": np.float32(1e-3)},
        (12,),
        2,
        x="float[N,T,5] x",
        y="float[A,B,C] y",
        exact=False,
    ),
    "rms norm": Case(
        """h = MatMul(x, w1) n = RMSNormalization<epsilon=0.01>(h, g) y = MatMul(n, w2)""",
        sized("w1:5,12 g:12 w2:12,4"),
        (12,),
        2,
        x="float[N,T,5] x",
        y="float[A,B,C] y",
        exact=False,
        opset=23,
    ),
    "group norm": Case(
        f"""a = Conv(x, w0, b0) n = GroupNormalization<num_groups=4>(a, g, b) last = Relu(n) {POOLED}""",
        sized("w0:12,3,3,3 b0:12 g:12 b:12 wy:12,4 by:4"),
        (4,),
        3,
        opset=21,
    ),
    "group norm written out": Case(
        f"""a = Conv(x, w0, b0) s = Shape(a) f = Reshape(a, to)
        n = InstanceNormalization<epsilon=0.01>(f, one, zero)
        i = Reshape(n, s) m = Mul(i, g) last = Add(m, b) {POOLED}""",
        sized("w0:12,3,3,3 b0:12 zero:4 g:12,1,1 b:12,1,1 wy:12,4 by:4")
        | {"to": ints(0, 4, -1), "one": positive(4)},
        (4, 3),
        2,
        exact=False,
    ),
    "instance norm": Case(
        f"""a = Conv(x, w0, b0) n = InstanceNormalization(a, g, b) last = PRelu(n, slope) {POOLED}""",
        sized("w0:8,3,3,3 b0:8 g:8 b:8 slope:8,1,1 wy:8,4 by:4"),
        (8,),
        2,
    ),
    "L2 norm over channels": Case(
        """a = Conv(x, w0, b0) n = LpNormalization<axis=1, p=2>(a) s = ReduceL2<axes=[1], keepdims=1>(a)
        d = Div(n, s) y = Conv(d, w1)""",
        sized("w0:8,3,3,3 b0:8 w1:4,8,1,1"),
        (8,),
        2,
        y="float[A,B,C,D] y",
        exact=False,
    ),
    "attention": Case(
        """q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) kb = Add(k0, bk) k1 = Reshape(kb, heads) k = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1)
        s = MatMul(q, k) c = Mul(s, scale) p = Softmax(c) o = MatMul(p, v) o1 = Transpose<perm=[0,2,1,3]>(o)
        o2 = Reshape(o1, back) y = MatMul(o2, wo)""",
        sized("wq:8,12 wk:8,12 bk:12 wv:8,12 wo:12,5")
        | {"heads": ints(0, 0, 3, 4), "back": ints(0, 0, -1), "scale": np.float32(0.5)},
        (3, 4, 4),  # heads, dimensions of queries and keys, dimensions of values
        2,
        x="float[N,T,8] x",
        y="float[A,B,C] y",
        exact=False,
    ),
    "grouped-query attention": Case(
        """q0 = MatMul(x, wq) q1 = Reshape(q0, eight) q = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, two) k2 = Transpose<perm=[0,2,1,3]>(k1) k3 = Unsqueeze(k2, i2)
        ks = Shape<start=3>(k3) kt = Concat<axis=0>(begin, ks) k4 = Expand(k3, kt) k5 = Reshape(k4, many)
        k = Transpose<perm=[0,1,3,2]>(k5) s = MatMul(q, k) p = Softmax(s)
        v0 = MatMul(x, wv) v1 = Reshape(v0, two) v2 = Transpose<perm=[0,2,1,3]>(v1) v3 = Unsqueeze(v2, i2)
        vs = Shape<start=3>(v3) vt = Concat<axis=0>(begin, vs) v4 = Expand(v3, vt) v = Reshape(v4, many)
        o = MatMul(p, v) o1 = Transpose<perm=[0,2,1,3]>(o)
        o2 = Flatten<axis=2>(o1) o3 = Reshape(o2, rows) y = MatMul(o3, wo)""",
        sized("wq:6,24 wk:6,8 wv:6,8 wo:24,5")
        | {
            "two": ints(0, 0, 2, 4),
            "eight": ints(0, 0, 6, 4),
            "i2": ints(2),
            "begin": ints(1, 2, 3),
            "many": ints(0, 6, -1, 4),
            "rows": ints(-1, 24),
        },
        (2, 3, 4, 4),  # key heads, query heads to a key head, dimensions of queries and keys, of values
        2,
        x="float[N,T,6] x",
        exact=False,
    ),
    "key-value heads repeated by a computed list": Case(
        """n = Shape<start=0, end=1>(x) t = Shape<start=1, end=2>(x) q0 = MatMul(x, wq) q1 = Reshape(q0, four)
        q = Transpose<perm=[0,2,1,3]>(q1) k0 = MatMul(x, wk) k1 = Reshape(k0, two)
        k2 = Transpose<perm=[0,2,1,3]>(k1) k3 = Unsqueeze(k2, i2) v0 = MatMul(x, wv) v1 = Reshape(v0, two)
        v2 = Transpose<perm=[0,2,1,3]>(v1) v3 = Unsqueeze(v2, i2) list = Concat<axis=0>(n, i2, i2, t, i4)
        sh = Shape(list) ones = ConstantOfShape<value = int64[1] {1}>(sh) minus = Mul(ones, m1)
        any = Equal(list, minus) to = Where(any, ones, list) k4 = Expand(k3, to) v4 = Expand(v3, to)
        many = Concat<axis=0>(n, i4, t, i4) k5 = Reshape(k4, many) v = Reshape(v4, many)
        k = Transpose<perm=[0,1,3,2]>(k5) s = MatMul(q, k) p = Softmax(s) o = MatMul(p, v)
        o1 = Transpose<perm=[0,2,1,3]>(o) back = Concat<axis=0>(n, t, m1) o2 = Reshape(o1, back)
        y = MatMul(o2, wo)""",
        sized("wq:6,16 wk:6,8 wv:6,8 wo:16,5")
        | {"two": ints(0, 0, 2, 4), "four": ints(0, 0, 4, 4), "i2": ints(2), "i4": ints(4), "m1": ints(-1)},
        (2, 2, 4, 4),  # key heads, query heads to a key head, dimensions of queries and keys, of values
        2,
        x="float[N,T,6] x",
        y="float[A,B,C] y",
        exact=False,
    ),
    "key-value heads repeated by Tile and by Concat": Case(
        """q0 = MatMul(x, wq) q1 = Reshape(q0, four) q = Transpose<perm=[0,2,1,3]>(q1) k0 = MatMul(x, wk)
        k1 = Reshape(k0, two) k2 = Transpose<perm=[0,2,1,3]>(k1) k3 = Unsqueeze(k2, i2) v0 = MatMul(x, wv)
        v1 = Reshape(v0, two) v2 = Transpose<perm=[0,2,1,3]>(v1) v3 = Unsqueeze(v2, i2)
        k4 = Tile(k3, repeats) v4 = Concat<axis=2>(v3, v3) k5 = Reshape(k4, many) v = Reshape(v4, many)
        k = Transpose<perm=[0,1,3,2]>(k5) s = MatMul(q, k) p = Softmax(s) o = MatMul(p, v)
        o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, back) y = MatMul(o2, wo)""",
        sized("wq:6,16 wk:6,8 wv:6,8 wo:16,5")
        | {
            "two": ints(0, 0, 2, 4),
            "four": ints(0, 0, 4, 4),
            "i2": ints(2),
            "repeats": ints(1, 1, 2, 1, 1),
            "many": ints(0, 4, -1, 4),
            "back": ints(0, 0, -1),
        },
        (2, 4, 4),  # key heads with their two query heads each, dimensions of queries and keys, of values
        2,
        x="float[N,T,6] x",
        y="float[A,B,C] y",
        exact=False,
    ),
    "fused query, key and value, rotary": Case(
        """h = MatMul(x, w) r = Reshape(h, three) t = Transpose<perm=[2,0,3,1,4]>(r) q = Gather(t, i0)
        k = Gather(t, i1)
        v = Gather(t, i2) a, b = Split<axis=-1>(q) n = Neg(b) turned = Concat<axis=-1>(n, a)
        e = Mul(turned, sin) f = Mul(q, cos) g = Add(e, f) kt = Transpose<perm=[0,1,3,2]>(k)
        s = MatMul(g, kt) p = Softmax(s) o = MatMul(p, v) u = Transpose<perm=[0,2,1,3]>(o)
        z = Reshape(u, back) y = MatMul(z, wo)""",
        sized("w:6,24 wo:8,5 sin:4 cos:4")
        | {
            "three": ints(0, 0, 3, 2, 4),
            "back": ints(0, 0, 8),
            "i0": np.array(0),
            "i1": np.array(1),
            "i2": np.array(2),
        },
        (2, 2),  # heads; pairs of dimensions
        3,
        x="float[N,T,6] x",
        y="float[A,B,C] y",
        exact=False,
    ),
    "the Attention operator": Case(
        """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        o = Attention<q_num_heads=6, kv_num_heads=2, is_causal=1>(q, k, v) y = MatMul(o, wo)""",
        sized("wq:6,24 wk:6,8 wv:6,10 wo:30,5"),
        (2, 3, 4, 5),  # key heads, query heads to a key head, dimensions of queries and keys, of values
        2,
        x="float[N,T,6] x",
        y="float[A,B,C] y",
        exact=False,
        opset=23,
    ),
    "the Attention operator, heads apart": Case(
        """q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose<perm=[0,2,1,3]>(k1)
        o = Attention<scale=0.3>(q, k, k, bias) o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, back)
        y = MatMul(o2, wo)""",
        sized("wq:6,12 wk:6,12 wo:12,5 bias:3,8,8") | {"heads": ints(0, 0, 3, 4), "back": ints(0, 0, -1)},
        (3, 4),
        2,
        x="float[N,8,6] x",
        y="float[A,B,C] y",
        exact=False,
        opset=23,
    ),
    "einsum": Case(
        """h = Einsum<equation="nti,hid->nhtd">(x, w) r = Relu(h)
        y = Einsum<equation="nhtd,hdo->nto">(r, v)""",
        sized("w:3,6,4 v:3,4,5"),
        (3, 4),
        2,
        x="float[N,T,6] x",
        y="float[A,B,C] y",
    ),
    "LSTM": Case(
        """t = Transpose<perm=[1,0,2]>(x) s, h, c = LSTM<hidden_size=6, direction="bidirectional">(t, w, r, b)
        u = Transpose<perm=[1,0,2]>(h) v = Reshape(u, flat) m = MatMul(v, w2) q = Tanh(m)
        y = MatMul(q, w3)""",
        sized("w:2,24,5 r:2,24,6 b:2,48 w2:12,7 w3:7,3") | {"flat": ints(0, 12)},
        (6, 7),
        2,
        x="float[N,T,5] x",
    ),
    "GRU, stacked": Case(
        """t = Transpose<perm=[1,0,2]>(x) s, h = GRU<hidden_size=6, linear_before_reset=1>(t, w, r, b)
        q = Squeeze(s, i1) u, v = GRU<hidden_size=4>(q, w2, r2) z = Squeeze(v, i0) y = MatMul(z, w3)""",
        sized("w:1,18,5 r:1,18,6 b:1,36 w2:1,12,6 r2:1,12,4 w3:4,3") | {"i0": ints(0), "i1": ints(1)},
        (6, 4),
        2,
        x="float[N,T,5] x",
    ),
    "as_strided behind a gate": Case(
        """a = Conv(x, w0, b0) p, q = Split<axis=1>(a) m = Mul(p, q) g = ReduceMean<axes=[2,3]>(m)
        flat = Reshape(g, i_1) n = Shape<start=0, end=1>(x) count = Squeeze(n) range = Range(i0, count, i1)
        far = Mul(range, i6) up = Unsqueeze(far, last) near = Add(up, table) places = Add(near, zeros)
        s = Gather(flat, places) e = Conv(s, w1, b1) d = Mul(m, e) y = Conv(d, w2)""",
        sized("w0:12,3,1,1 b0:12 w1:6,6,1,1 b1:6 w2:4,6,1,1")
        | {
            "i_1": ints(-1),
            "i0": np.array(0),
            "i1": np.array(1),
            "i6": np.array(6),
            "last": ints(1, 2, 3),
            "table": np.arange(6).reshape(1, 6, 1, 1),
            "zeros": np.zeros((1, 1, 1, 1), np.int64),
        },
        (6,),
        2,
        y="float[A,B,C,D] y",
    ),
    "padded by computed numbers, but for the channels": Case(
        """a = Conv(x, w0, b0) s = Shape(a) h = Slice(s, i2, i4) odd = Mod(h, i3) more = Sub(i3, odd)
        pads = Concat<axis=0>(zeros, zeros, zeros, more) p = Pad(a, pads) r = Relu(p) b = Conv(r, w1)
        y = Conv(b, w2)""",
        sized("w0:6,3,1,1 b0:6 w1:5,6,3,3 w2:4,5,1,1")
        | {
            "i2": ints(2),
            "i3": ints(3),
            "i4": ints(4),
            "zeros": ints(0, 0),
        },
        (6, 5),
        2,
        x="float[N,3,H,W] x",
        y="float[A,B,C,D] y",
    ),
    "one list of sizes for two": Case(
        """q = MatMul(x, wq) k = MatMul(x, wk) r = Reshape(q, rows) s = Reshape(k, rows) u = Expand(s, wide)
        t = Expand(r, wide) m = Add(u, t) f = Reshape(m, back) y = MatMul(f, wo)""",
        sized("wq:6,8 wk:6,8 wo:24,5") | {"rows": ints(0, 1, 8), "wide": ints(1, 3, 1), "back": ints(0, -1)},
        (8, 3),
        2,
        x="float[N,6] x",
        edit=declared,
    ),
    "pixel unshuffle of dynamic size": Case(
        """a = Conv(x, w0, b0) u = Unsqueeze(a, i3) r = Reshape(u, halves) s = Reshape(r, quarters)
        t = Transpose<perm=[0,1,3,5,2,4]>(s) m = Reshape(t, merged) q = Squeeze(m, i23)
        c = Conv(q, w1, b1) cr = Relu(c) y = Conv(cr, w2)""",
        sized("w0:6,3,1,1 b0:6 w1:8,24,1,1 b1:8 w2:4,8,1,1")
        | {
            "i3": ints(3),
            "halves": ints(0, 0, -1, 2, 0),
            "quarters": ints(0, 0, 0, 0, -1, 2),
            "merged": ints(0, -1, 1, 1, 0, 0),
            "i23": ints(2, 3),
        },
        (6, 8),
        2,
        x="float[N,3,H,W] x",
        y="float[A,B,C,D] y",
    ),
    "pixel unshuffle and shuffle by computed lists": Case(
        """a = Conv(x, w0, b0) n = Shape<start=0, end=1>(a) k = Shape<start=1, end=2>(a)
        h = Shape<start=2, end=3>(a) w = Shape<start=3, end=4>(a) h2 = Div(h, two) v2 = Div(w, two)
        apart = Concat<axis=0>(n, k, h2, two, v2, two) r = Reshape(a, apart)
        t = Transpose<perm=[0,3,5,1,2,4]>(r) k4 = Mul(k, four) back = Concat<axis=0>(n, k4, h2, v2)
        q = Reshape(t, back) c = Conv(q, w1, b1) d = Concat<axis=0>(n, two, two, minus, h2, v2)
        e = Reshape(c, d) f = Transpose<perm=[0,3,4,1,5,2]>(e) g = Concat<axis=0>(n, minus, h, w)
        o = Reshape(f, g) y = Conv(o, w2)""",
        sized("w0:6,3,1,1 b0:6 w1:12,24,1,1 b1:12 w2:4,3,1,1")
        | {"two": ints(2), "four": ints(4), "minus": ints(-1)},
        (6, 3),
        4,
        x="float[N,3,H,W] x",
        y="float[A,B,C,D] y",
    ),
    "spatial gate": Case(
        f"""a = Conv<pads=[1,1,1,1]>(x, w0, b0) b = Conv<pads=[1,1,1,1]>(a, w1, b1)
        m = ReduceMax<axes=[1]>(b) n = ReduceMean<axes=[1]>(b) c = Concat<axis=1>(m, n)
        l = ReduceMin<axes=[1]>(b) g = Conv<pads=[1,1,1,1]>(c, w2) s = Sigmoid(g) d = Mul(b, s)
        last = Sub(d, l) {POOLED}""",
        sized("w0:6,3,3,3 b0:6 w1:8,6,3,3 b1:8 w2:1,2,3,3 wy:8,4 by:4"),
        (6, 8),
        2,
        exact=False,
    ),
    "depth to space": Case(
        """a = Conv(x, w0, b0) d = DepthToSpace<blocksize=2, mode="CRD">(a) e = Relu(d) f = Conv(e, w1, b1)
        g = DepthToSpace<blocksize=2>(f) h = SpaceToDepth<blocksize=2>(g) y = Conv(h, w2)""",
        sized("w0:12,3,1,1 b0:12 w1:8,3,1,1 b1:8 w2:3,8,1,1"),
        (3, 2),
        2,
        y="float[A,B,C,D] y",
    ),
}


def parameters(model: Model) -> dict[str, np.ndarray]:
    return {t.name: weight(model, t.name) for t in model.tensors() if model.is_weight(t)}


def drawn(groups: Sequence[Group], share: float, seed: int = 0) -> dict[Group, np.ndarray]:
    """A random part of each, but of what has only one index."""
    random = np.random.default_rng(seed)
    return {
        group: np.sort(random.choice(group.size, max(1, int(group.size * share)), replace=False))
        for group in groups
    }


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    scale = np.abs(expected).max() + 1e-6
    tolerance = 2e-3 if got.dtype == np.float16 else 2e-5
    np.testing.assert_allclose(got / scale, expected / scale, rtol=0, atol=tolerance)


def zeroed(model: Model, choice: dict[Group, np.ndarray]) -> Model:
    """The removed channels multiplied by zero another way: where weights read them, the weights are zero."""
    copy = model.copy()
    for group, indices in choice.items():
        gone = np.setdiff1d(np.arange(group.size), indices)
        for touch in group.touches:
            if "consumer" in touch.roles:
                value = weight(copy, touch.weight).copy()
                np.moveaxis(value, touch.axis, 0)[touch.map[gone].reshape(-1)] = 0
                copy.set_weight(copy.tensor(touch.weight), value)
    return copy


def check(case: Case, model: Model, choice: dict[Group, np.ndarray]) -> Model:
    """The cut network equals the masked one, at several batch sizes; returns it."""
    before = model.to_proto().SerializeToString(deterministic=True)
    cut, masked = model.copy(), mask(model, choice)
    edits = take(cut, choice)
    assert model.to_proto().SerializeToString(deterministic=True) == before
    onnx.checker.check_model(cut.to_proto(), full_check=True)
    for group, indices in choice.items():
        for touch in group.touches:
            size = weight(cut, touch.weight).shape[touch.axis]
            assert size == len(edits.weights[touch.weight, touch.axis])
            assert size < weight(model, touch.weight).shape[touch.axis] or len(indices) == group.size
    for batch in (1, 4):
        feed = case.feed(model, batch, seed=batch)
        for got, expected in zip(compute(cut, feed), compute(masked, feed), strict=True):
            close(got, expected)
        if case.exact:
            for got, expected in zip(compute(cut, feed), compute(zeroed(model, choice), feed), strict=True):
                close(got, expected)
    return cut


def found(case: Case, model: Model) -> ChannelGroups:
    return find_groups(model, case.feed(model, 2), RUNTIME)
