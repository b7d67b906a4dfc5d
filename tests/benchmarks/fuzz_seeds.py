"""Networks that `bench_fuzz.py` damages: the shipped ones, and small ones of every kind that exporters make.

`DATA` lies beside each of them, for the one whose weights are external.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, SparseTensorProto, TensorProto, numpy_helper

from onnxfuse.ir import external_data

MODELS = Path(__file__).resolve().parents[2] / "models"
DATA_FILE = "weights.bin"
DATA = np.random.default_rng(7).standard_normal(512).astype(np.float32).tobytes()

CNN = """cnn (float[N,3,8,8] x) => (float[N,5] y) {
  c = Conv<pads=[1,1,1,1]>(x, w3x3, b8)  n = BatchNormalization(c, one8, zero8, zero8, one8)  r = Relu(n)
  d = Conv<group=8, pads=[1,1,1,1]>(r, w8x1, b8)  k = Clip(d, low, high)  p = Conv(k, w8x8)  s = Add(p, r)
  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)  g = GlobalAveragePool(m)  f = Flatten(g)
  y = Gemm<transB=1>(f, w5x8, b5) }"""

UNET = """unet (float[N,4,12,12] x) => (float[N,8,A,B] y) {
  c = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w8x4)  a = PRelu(c, slope)
  i = InstanceNormalization(a, one8, zero8)
  u = Resize<mode="nearest">(i, , scales)  t = ConvTranspose<strides=[2,2]>(i, w8x4t)
  o = Concat<axis=1>(u, t)  h = Shape(o)  q = Reshape(o, h)  z, e = Split<axis=1, num_outputs=2>(q)
  j = Pad<mode="constant">(z, pads)  y = Sigmoid(j) }"""

TRANSFORMER = """transformer (int64[N,T] tokens) => (float[N,T,11] logits) {
  e = Gather(table, tokens)  l = LayerNormalization(e, one12, zero12)
  q0 = MatMul(l, wq)  k0 = MatMul(l, wk)  v0 = MatMul(l, wv)
  q1 = Reshape(q0, heads)  k1 = Reshape(k0, heads)  v1 = Reshape(v0, heads)
  q = Transpose<perm=[0,2,1,3]>(q1)  k = Transpose<perm=[0,2,3,1]>(k1)  v = Transpose<perm=[0,2,1,3]>(v1)
  s0 = MatMul(q, k)  s1 = Mul(s0, scale)  p = Softmax<axis=-1>(s1)  o0 = MatMul(p, v)
  o1 = Transpose<perm=[0,2,1,3]>(o0)  o2 = Reshape(o1, join)  o = MatMul(o2, wo)  h = Add(e, o)
  m0 = MatMul(h, w1)  m1 = Gelu(m0)  m = MatMul(m1, w2)  f = Add(h, m)
  head = Transpose<perm=[1,0]>(table)  logits = MatMul(f, head) }"""

RECURRENT = """recurrent (float[T,N,6] x, float[1,N,4] start) => (float[T,N,4] y, float[1,N,4] last) {
  a, h, c = LSTM<hidden_size=4>(x, wl, rl, bl)  s = Squeeze(a, one)
  g, last = GRU<hidden_size=4, linear_before_reset=1>(s, wg, rg, , , start)  y = Squeeze(g, one) }"""

CONTROL = """control (float[N,6] x, bool flag, int64 count) => (float[N,6] y, float[N,6] z, float[N,6] last) {
  a = If(flag) <then_branch = yes () => (float[N,6] p) { p = MatMul(x, w6) },
                else_branch = no () => (float[N,6] q) { t = MatMul(x, v6)  q = Relu(t) }>
  true = Constant<value = bool {1}>()
  y = Loop(count, true, a) <body = turn (int64 i, bool go, float[N,6] v) => (bool on, float[N,6] w)
      { on = Identity(go)  u = MatMul(v, w6)  w = Tanh(u) }>
  zero = Constant<value = float[6] {0, 0, 0, 0, 0, 0}>()
  last, z = Scan(zero, y) <num_scan_inputs=1, body = step (float[6] s, float[6] r) => (float[6] t, float[6] k)
      { t = Add(s, r)  k = Mul(t, b6) }> }"""

QUANTIZED = """quantized (float[N,6] x) => (float[N,4] y) {
  q = QuantizeLinear(x, sx, zx)  d = DequantizeLinear(q, sx, zx)  w = DequantizeLinear<axis=1>(wq, sw, zw)
  h = MatMul(d, w)  r = Relu(h)  u, su, zu = DynamicQuantizeLinear(r)  m = MatMulInteger(u, mq, zu)
  f = Cast<to=1>(m)  y = Mul(f, su) }"""

SHAPES = """shapes (float[A,B,6] x) => (float[A,B,3] y, int64[K] k, float[A,1] m) {
  s = Shape(x)  n = Gather(s, zero)  u = Unsqueeze(n, axis)  t = Concat<axis=0>(u, minus, six)
  r = Reshape(x, t)  e = Einsum<equation="abc,cd->abd">(r, w)  o = Expand(b3, e_shape)  c = Where(yes, e, e)
  y = Add(c, o)  l = Slice(r, begin, end, axis)  f = Flatten(l)  v, k0 = TopK<axis=-1>(f, one)
  k = Reshape(k0, minus)
  i = Identity(v)  m = ReduceMean<keepdims=1>(i, one)  nz = NonZero(k0)  rg = Range(zero0, n, one0) }"""

SEQUENCES = """sequences (float[N,4] x, float[N,4] z) => (float[M,4] y, int64 n) {
  s = SequenceConstruct(x, z)  n = SequenceLength(s)  a = SequenceAt(s, zero)  r = MatMul(a, w4)
  t = SequenceInsert(s, r)  y = ConcatFromSequence<axis=0>(t) }"""

FUNCTIONS = """<ir_version: 10, opset_import: ["" : 18, "mine" : 1]>
functions (float[N,6] x) => (float[N,6] y) {
  a = mine.Dense(x, w6, b6)  b = mine.Twice<alpha=0.2>(a)  c = mine.Dense(b, w6, b6)  y = Add(c, x) }
<domain: "mine", opset_import: ["" : 18]> Dense (v, w, b) => (o) { m = MatMul(v, w)  o = Add(m, b) }
<domain: "mine", opset_import: ["" : 18, "mine" : 1]> Twice <alpha: float = 0.1> (v) => (o) {
  r = LeakyRelu<alpha: float = @alpha>(v)  o = mine.Scale(r) }
<domain: "mine", opset_import: ["" : 18]> Scale (v) => (o) {
  k = Constant<value = float {2.0}>()  o = Mul(v, k) }"""

MICROSOFT = """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
microsoft (float[N,T,8] x) => (float[N,T,8] y) {
  l, m, i, s = com.microsoft.SkipLayerNormalization(x, x, one8, zero8, zero8)
  g = com.microsoft.BiasGelu(l, zero8)  f = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(g, w8x8m)
  y = com.microsoft.QuickGelu(f) }"""

HALF = """half (float16[N,6] x) => (float16[N,4] y, double[N,4] d) {
  h = MatMul(x, w16)  r = Elu(h)  c = Cast<to=11>(r)  d = MatMul(c, w64)  y = LogSoftmax(r) }"""

STORED = """stored (float[N,16] x) => (float[N,16] y) {
  h = MatMul(x, outside)  s = Add(h, edge)  i = Identity(outside)  g = MatMul(s, i)  y = Mul(g, sparse) }"""


def _normal(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape) / 3).astype(np.float32)


def _whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _ones(size: int) -> dict[str, np.ndarray]:
    return {f"one{size}": np.ones(size, np.float32), f"zero{size}": np.zeros(size, np.float32)}


_BYTES = np.random.default_rng(1).integers(-90, 90, (6, 5)).astype(np.int8)

_NETS: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "cnn": (
        CNN,
        {
            **_ones(8),
            "w3x3": _normal(8, 3, 3, 3),
            "b8": _normal(8),
            "w8x1": _normal(8, 1, 3, 3),
            "w8x8": _normal(8, 8, 1, 1),
            "w5x8": _normal(5, 8),
            "b5": _normal(5),
            "low": np.float32(0),
            "high": np.float32(6),
        },
    ),
    "unet": (
        UNET,
        {
            **_ones(8),
            "w8x4": _normal(8, 4, 3, 3),
            "slope": _normal(8, 1, 1),
            "scales": np.array([1, 1, 2, 2], np.float32),
            "w8x4t": _normal(8, 8, 2, 2),
            "pads": _whole(0, 0, 1, 1, 0, 0, 1, 1),
        },
    ),
    "transformer": (
        TRANSFORMER,
        {
            **_ones(12),
            "table": _normal(11, 12),
            **{name: _normal(12, 12) for name in ("wq", "wk", "wv", "wo")},
            "heads": _whole(0, 0, 3, 4),
            "join": _whole(0, 0, 12),
            "scale": np.float32(0.5),
            "w1": _normal(12, 24),
            "w2": _normal(24, 12),
        },
    ),
    "recurrent": (
        RECURRENT,
        {
            "wl": _normal(1, 16, 6),
            "rl": _normal(1, 16, 4),
            "bl": _normal(1, 32),
            "wg": _normal(1, 12, 4),
            "rg": _normal(1, 12, 4),
            "one": _whole(1),
        },
    ),
    "control flow": (CONTROL, {"w6": _normal(6, 6), "v6": _normal(6, 6), "b6": _normal(6)}),
    "quantized": (
        QUANTIZED,
        {
            "sx": np.float32(0.02),
            "zx": np.uint8(128),
            "wq": _BYTES,
            "sw": np.full(5, 0.01, np.float32),
            "zw": np.zeros(5, np.int8),
            "mq": _BYTES[:5, :4].copy(),
        },
    ),
    "shapes": (
        SHAPES,
        {
            "zero": np.int64(0),
            "axis": _whole(0),
            "minus": _whole(-1),
            "six": _whole(6),
            "w": _normal(6, 3),
            "b3": _normal(3),
            "e_shape": _whole(1, 1, 3),
            "yes": np.array(True),
            "begin": _whole(0),
            "end": _whole(1),
            "one": _whole(1),
            "zero0": np.int64(0),
            "one0": np.int64(1),
        },
    ),
    "sequences": (SEQUENCES, {"zero": np.int64(0), "w4": _normal(4, 4)}),
    "functions": (FUNCTIONS, {"w6": _normal(6, 6), "b6": _normal(6)}),
    "microsoft": (MICROSOFT, {**_ones(8), "w8x8m": _normal(8, 8)}),
    "half": (HALF, {"w16": _normal(6, 4).astype(np.float16), "w64": _normal(4, 4).astype(np.float64)}),
}


@functools.cache
def seeds() -> dict[str, tuple[bytes, int]]:
    """Files by name, each with how often it is drawn, in parts: of small ones more can be tried."""
    found = {name: (_made(text, weights), 4) for name, (text, weights) in _NETS.items()}
    found["external and sparse"] = (_stored(), 4)
    for path in sorted(MODELS.glob("*.onnx")):
        found[path.stem] = (path.read_bytes(), 1)
    return found


def _made(text: str, weights: dict[str, np.ndarray]) -> bytes:
    proto = _parsed(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()
    )
    return proto.SerializeToString()


def _parsed(text: str) -> ModelProto:
    header = "" if text.startswith("<") else '<ir_version: 10, opset_import: ["" : 20]> '
    return onnx.parser.parse_model(header + text)


def _stored() -> bytes:
    """Weights outside (two ranges of `DATA_FILE`), and a sparse one."""
    proto = _parsed(STORED)
    for name, dims, offset in (("outside", (16, 16), 0), ("edge", (16,), 1024)):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
        external_data.point(tensor, DATA_FILE, offset, int(np.prod(dims)) * 4)
        proto.graph.initializer.append(tensor)
    values = numpy_helper.from_array(_normal(3), "sparse")
    indices = numpy_helper.from_array(_whole(1, 5, 9), "sparse_indices")
    proto.graph.sparse_initializer.append(SparseTensorProto(values=values, indices=indices, dims=[16]))
    return proto.SerializeToString()
