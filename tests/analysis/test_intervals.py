"""Bounds hold for what ONNX Runtime computes, are as tight as worked out by hand, and find dead channels."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Feed, compute, net, normal
from onnx import helper

from onnxfuse.analysis.intervals.interval import FORMATS, Interval
from onnxfuse.analysis.intervals.rules import intervals
from onnxfuse.analysis.intervals.shape_rules import _matched
from onnxfuse.ir.model import Model
from onnxfuse.ir.shapes import TensorInfo

IMAGE = "float[N,4,6,6] x"
MAP = "float[] y"
ROWS = "float[N,6] x"
UP = 2.0**-23


def found(model: Model) -> dict[str, Interval]:
    return intervals(model, model.shapes())


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def feeds(model: Model, number: int = 12, batch: int = 2) -> list[Feed]:
    """Inputs of many sizes: of one sign, constant, almost 0, 0, -0, large."""
    random = np.random.default_rng(0)
    result = []
    for index in range(number):
        feed: Feed = {}
        for info in model.inputs:
            assert info.shape is not None
            assert info.dtype is not None
            shape = [d if isinstance(d, int) else batch if i == 0 else 6 for i, d in enumerate(info.shape)]
            x = random.standard_normal(shape)
            draws = (x, 10 * x, 1e3 * x, 1e-3 * x, 1e-41 * x, abs(x), -abs(x), 0 * x, 0 * x - 0.0)
            more = (np.sign(x) * 3e4, 3e4 + 0 * x, -3e4 + 0 * x)
            value = (*draws, *more)[index % 12]
            if info.dtype.kind in "iu":
                value = random.integers(0, 200, shape)
            feed[info.name] = np.asarray(value > 0 if info.dtype.kind == "b" else value).astype(info.dtype)
        result.append(feed)
    return result


def check_held(
    model: Model, these: list[Feed] | None = None, known: dict[str, Interval] | None = None
) -> None:
    """Every tensor of every run lies within its bounds, whose shapes are as promised."""
    known = known or found(model)
    shapes = model.shapes()
    names = [t.name for n in model.nodes for t in n.outputs if t.name]
    assert known.keys() == {t.name for t in model.tensors()}
    checked = 0
    for feed in these or feeds(model):
        values = dict(zip(names, compute(model, feed, *names), strict=True)) | feed
        if not all(np.isfinite(v.astype(np.float64)).all() for v in values.values()):
            continue
        checked += 1
        for name, value in values.items():
            low, high = known[name].low, known[name].high
            assert low.dtype == high.dtype == np.float64
            assert low.shape == high.shape
            assert low.ndim == (0 if shapes[name].shape is None else value.ndim), name
            assert all(n in (1, size) for n, size in zip(low.shape, value.shape, strict=False)), name
            value = value.astype(np.float64)
            assert (low <= high).all(), name
            assert (low <= value).all(), f"{name}: {(low - value).max()} below"
            assert (value <= high).all(), f"{name}: {(value - high).max()} above"
    assert checked


SMALL = {"lo": np.float32(-2), "hi": np.float32(3)}
POOLED = "c = Clip(x, lo, hi)"

# Operators behind a Clip to [-2, 3]: nodes, weights, more of `net`. Their bounds must be finite.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Conv": ("y = Conv(c, w, b)", {"w": (5, 4, 3, 3), "b": (5,)}, {}),
    "Conv padded": ("y = Conv<pads=[1,0,2,1], strides=[2,1]>(c, w)", {"w": (5, 4, 3, 3)}, {}),
    "Conv SAME": ('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(c, w)', {"w": (5, 4, 3, 3)}, {}),
    "Conv VALID": ('y = Conv<auto_pad="VALID", dilations=[2,2]>(c, w)', {"w": (5, 4, 2, 2)}, {}),
    "Conv grouped": ("y = Conv<group=2, pads=[1,1,1,1]>(c, w, b)", {"w": (6, 2, 3, 3), "b": (6,)}, {}),
    "Conv depthwise": ("y = Conv<group=4>(c, w)", {"w": (8, 1, 3, 3)}, {}),
    "ConvTranspose": ("y = ConvTranspose<strides=[2,2]>(c, w, b)", {"w": (4, 5, 3, 3), "b": (5,)}, {}),
    "ConvTranspose grouped": ("y = ConvTranspose<group=2, pads=[1,1,1,1]>(c, w)", {"w": (4, 3, 3, 3)}, {}),
    "Gemm": ("y = Gemm(c, w, b)", {"w": (6, 5), "b": (5,)}, {"x": ROWS}),
    "Gemm scaled": (
        "y = Gemm<alpha=0.3, beta=-1.7, transB=1>(c, w, b)",
        {"w": (5, 6), "b": (1, 5)},
        {"x": ROWS},
    ),
    "MatMul": ("y = MatMul(c, w)", {"w": (6, 5)}, {"x": "float[N,3,6] x"}),
    "MatMul of a vector": ("y = MatMul(c, w)", {"w": (6, 5)}, {"x": "float[6] x"}),
    "BatchNormalization": (
        "y = BatchNormalization(c, g, b, m, v)",
        {"g": (4,), "b": (4,), "m": (4,), "v": np.abs(normal(4)) + vector(0.1)},
        {},
    ),
    "Add": ("y = Add(c, k)", {"k": (4, 1, 1)}, {}),
    "Sub": ("y = Sub(k, c)", {"k": (6,)}, {}),
    "Mul": ("y = Mul(c, k)", {"k": (1, 4, 1, 1)}, {}),
    "Div": ("y = Div(c, k)", {"k": (4, 1, 1)}, {}),
    "Div by an interval": ("e = Exp(c) y = Div(c, e)", {}, {}),
    "Sum": ("a = Neg(c) b = Abs(c) y = Sum(a, b, c, k)", {"k": (4, 1, 1)}, {}),
    "Max": ("y = Max(c, k)", {"k": (4, 1, 1)}, {}),
    "Min": ("y = Min(c, k, z)", {"k": (4, 1, 1), "z": np.float32(0.3)}, {}),
    "Clip to intervals": ("s = ReduceMax<keepdims=0>(c) n = Neg(s) y = Clip(c, n, s)", {}, {}),
    "Clip by attributes": ("y = Clip<min=-1.0, max=0.7>(c)", {}, {"opset": 9}),
    "Relu": ("y = Relu(c)", {}, {}),
    "LeakyRelu": ("y = LeakyRelu<alpha=0.2>(c)", {}, {}),
    "LeakyRelu falling": ("y = LeakyRelu<alpha=-1.7>(c)", {}, {}),
    "PRelu": ("y = PRelu(c, k)", {"k": (4, 1, 1)}, {}),
    "Elu": ("y = Elu<alpha=150.0>(c)", {}, {}),
    "Selu": ("y = Selu<alpha=2.0, gamma=120.0>(c)", {}, {}),
    "Selu as is": ("y = Selu(c)", {}, {}),
    "Celu": ("y = Celu<alpha=0.3>(c)", {}, {}),
    **{
        op: (f"y = {op}(c)", {}, {})
        for op in (
            *("Neg", "Abs", "Softplus", "Sigmoid", "Tanh", "Erf", "Exp", "Softsign", "Softmax", "Identity"),
            *("HardSwish", "HardSigmoid", "GlobalAveragePool", "GlobalMaxPool", "ReduceMax", "ReduceMin"),
        )
    },
    "HardSigmoid steep": ("y = HardSigmoid<alpha=3.1, beta=-2.3>(c)", {}, {}),
    "Sqrt and Log": ("a = Abs(c) p = Add(a, k) s = Sqrt(a) l = Log(p) y = Add(s, l)", {"k": vector(0.1)}, {}),
    "Gelu": ("y = Gelu(c)", {}, {"opset": 20}),
    "Swish of one operator": ("y = Swish(c)", {}, {"opset": 24}),
    "Swish, steep": ("y = Swish<alpha=2.5>(c)", {}, {"opset": 24}),
    "Sinh": ("y = Sinh(c)", {}, {}),
    "Asin": ("h = Clip(c, half, one) y = Asin(h)", {"half": np.float32(-0.5), "one": np.float32(1)}, {}),
    "Trilu": ("y = Trilu(c)", {}, {}),
    "ReverseSequence": (
        "y = ReverseSequence<batch_axis=0, time_axis=1>(c, s)",
        {"s": ints(1, 3)},
        {},
    ),
    "SpaceToDepth": ("y = SpaceToDepth<blocksize=2>(c)", {}, {}),
    "Gelu by tanh": ('y = Gelu<approximate="tanh">(c)', {}, {"opset": 20}),
    "Swish": ("s = Sigmoid(c) y = Mul(s, c)", {}, {}),
    "gate": ("s = Sigmoid(c) n = Neg(c) y = Mul(n, s)", {}, {}),
    "square": ("y = Mul(c, c)", {}, {}),
    "Pow": ("y = Pow(c, two)", {"two": np.float32(2)}, {}),
    "Where": ("q = Greater(c, k) y = Where(q, c, k)", {"k": (4, 1, 1)}, {}),
    "Where of constants": (
        "y = Where(q, c, k)",
        {"q": np.arange(4).reshape(4, 1, 1) > 1, "k": (4, 1, 1)},
        {},
    ),
    "Cast": ("h = Cast<to=10>(c) d = Cast<to=11>(h) y = Cast<to=1>(d)", {}, {}),
    "Cast to integers": (
        "i = Cast<to=7>(c) j = Clip(i, p, q) y = Cast<to=1>(j)",
        {"p": ints(-1)[0], "q": ints(1)[0]},
        {},
    ),
    "Dropout": ("y = Dropout(c)", {}, {}),
    "Dropout switched off": ("y = Dropout(c, r, t)", {"r": np.float32(0.5), "t": np.array(False)}, {}),
    "Expand": ("y = Expand(c, s)", {"s": ints(2, 1, 4, 6, 6)}, {}),
    "ConstantOfShape": ("s = Shape(c) k = ConstantOfShape<value=float[1] {2.5}>(s) y = Add(c, k)", {}, {}),
    "MaxPool": ("y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)", {}, {}),
    "AveragePool": ("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)", {}, {}),
    "AveragePool of pads": (
        "p = Add(c, k) y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(p)",
        {"k": vector(7)},
        {},
    ),
    "ReduceMean": ("p = Mul(c, k) y = ReduceMean<axes=[1,-1], keepdims=0>(p)", {"k": (4, 1, 1)}, {}),
    "ReduceMean of all": ("y = ReduceMean<keepdims=0>(c)", {}, {}),
    "ReduceMean of dynamic axes": ("y = ReduceMean<axes=[2]>(c)", {}, {"x": "float[N,4,H] x"}),
    "ReduceSum": ("p = Mul(c, k) y = ReduceSum(p, a)", {"k": (4, 1, 1), "a": ints(1, 2)}, {}),
    "ReduceSum by default": ("y = ReduceSum<noop_with_empty_axes=1>(c)", {}, {}),
    "Concat": ("m = Mul(c, k) y = Concat<axis=1>(m, c, k2)", {"k": (4, 1, 1), "k2": (2, 2, 6, 6)}, {}),
    "Concat of rows": ("m = Mul(c, k) y = Concat<axis=-2>(c, m)", {"k": (4, 1, 1)}, {}),
    "Split": ("m = Mul(c, k) y, b = Split<axis=1>(m, s)", {"k": (4, 1, 1), "s": ints(1, 3)}, {}),
    "Split evenly": ("m = Mul(c, k) y, b = Split<axis=1>(m)", {"k": (4, 1, 1)}, {}),
    "Split unevenly": (
        "m = Mul(c, k) y, b, d = Split<axis=1, num_outputs=3>(m)",
        {"k": (5, 1, 1)},
        {"x": "float[N,5,2,1] x", "opset": 18},
    ),
    "Slice": (
        "m = Mul(c, k) y = Slice(m, s, e, a, t)",
        {"k": (4, 1, 6), "s": ints(-1, 1), "e": ints(-(2**62), 2**62), "a": ints(1, -1), "t": ints(-2, 2)},
        {},
    ),
    "Slice by attributes": (
        "m = Mul(c, k) y = Slice<starts=[1], ends=[3], axes=[1]>(m)",
        {"k": (4, 1, 1)},
        {"opset": 9},
    ),
    "Slice of computed ends": (
        "m = Mul(c, k) e = Shape(m) s = Sub(e, e) y = Slice(m, s, e)",
        {"k": (4, 1, 1)},
        {},
    ),
    "Pad": (
        "m = Mul(c, k) y = Pad(m, p, v)",
        {"k": (4, 1, 1), "p": ints(0, 1, 2, 0, 0, 3, 0, 1), "v": np.float32(9)},
        {},
    ),
    "Pad some axes": (
        "m = Mul(c, k) y = Pad(m, p, , a)",
        {"k": (4, 1, 6), "p": ints(1, -1, 2, 2), "a": ints(-1, 1)},
        {"opset": 18},
    ),
    "Pad by attributes": ("y = Pad<pads=[0,1,0,0,0,0,0,0], value=5.0>(c)", {}, {"opset": 10}),
    "Pad by reflection": (
        'm = Mul(c, k) y = Pad<mode="reflect">(m, p)',
        {"k": (4, 1, 6), "p": ints(0, 1, 0, 2, 0, 0, 0, 2)},
        {},
    ),
    "Reshape": ("m = Mul(c, k) y = Reshape(m, s)", {"k": (4, 1, 1), "s": ints(0, 2, 2, -1)}, {}),
    "Reshape of all": ("m = Mul(c, k) y = Reshape(m, s)", {"k": (4, 1, 1), "s": ints(-1, 144)}, {}),
    "Reshape across": ("m = Mul(c, k) y = Reshape(m, s)", {"k": (4, 1, 1), "s": ints(-1, 2, 3)}, {}),
    "Reshape of dynamic axes": (
        "m = Mul(c, k) y = Reshape(m, s)",
        {"k": (4, 1, 1), "s": ints(0, 4, -1)},
        {"x": "float[N,4,H,W] x"},
    ),
    "Flatten": ("m = Mul(c, k) y = Flatten(m)", {"k": (4, 1, 6)}, {}),
    "Flatten in the middle": ("m = Mul(c, k) y = Flatten<axis=2>(m)", {"k": (4, 1, 1)}, {}),
    "Transpose": (
        "m = Mul(c, k) t = Transpose<perm=[0,2,3,1]>(m) y = Add(t, b)",
        {"k": (4, 1, 1), "b": (4,)},
        {},
    ),
    "Transpose reversed": ("m = Mul(c, k) y = Transpose(m)", {"k": (4, 1, 6)}, {}),
    "Squeeze": (
        "m = Mul(c, k) g = GlobalMaxPool(m) y = Squeeze(g, a)",
        {"k": (4, 1, 1), "a": ints(2, -1)},
        {},
    ),
    "Unsqueeze": ("m = Mul(c, k) y = Unsqueeze(m, a)", {"k": (6,), "a": ints(1, 3)}, {"x": ROWS}),
    "Gather": (
        "m = Mul(c, k) y = Gather<axis=1>(m, i)",
        {"k": (4, 1, 1), "i": np.array([[3, -4], [1, 1]])},
        {},
    ),
    "Gather one": ("m = Mul(c, k) y = Gather<axis=1>(m, i)", {"k": (4, 1, 1), "i": np.array(2)}, {}),
    "Gather computed": (
        "m = Mul(c, k) h = Cast<to=7>(s) i = Identity(h) y = Gather<axis=1>(m, i)",
        {"k": (4, 1, 1), "s": vector(3, 0)},
        {},
    ),
    "Tile": ("m = Mul(c, k) y = Tile(m, t)", {"k": (4, 1, 1), "t": ints(1, 2, 1, 1)}, {}),
    "DepthToSpace": ("m = Mul(c, k) y = DepthToSpace<blocksize=2>(m)", {"k": (4, 1, 1)}, {}),
    "Resize": ("m = Mul(c, k) y = Resize(m, , s)", {"k": (4, 1, 6), "s": vector(1, 1, 2, 1.5)}, {}),
    "Resize linear": (
        'm = Mul(c, k) y = Resize<mode="linear">(m, , s)',
        {"k": (4, 1, 6), "s": vector(1, 1, 2, 1.7)},
        {},
    ),
}


def case(name: str) -> Model:
    body, weights, more = CASES[name]
    options = {"x": IMAGE, "y": MAP} | more
    clip = "c = Clip<min=-2.0, max=3.0>(x)" if options.get("opset", 17) < 11 else POOLED
    return net(f"{clip} {body}", weights | ({} if options.get("opset", 17) < 11 else SMALL), **options)


def test_padding_that_depends_on_an_unknown_size() -> None:
    body = f'{POOLED} a = Abs(c) y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(a, w)'
    model = net(body, {"w": -np.ones((1, 4, 3, 3), np.float32)} | SMALL, "float[N,4,H,W] x", MAP)
    check_held(model)
    assert ends(found(model)["y"]) == [(-108, 0)]


@pytest.mark.parametrize("name", CASES)
def test_bounds_hold_and_are_finite(name: str) -> None:
    model = case(name)
    known = found(model)
    check_held(model, known=known)
    assert np.isfinite(known["y"].low).all()
    assert np.isfinite(known["y"].high).all()


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("Clip by attributes",)])
def test_unbounded_inputs_make_no_false_bounds(name: str) -> None:
    body, weights, more = CASES[name]
    options = {"x": IMAGE, "y": MAP} | more
    model = net(body.replace("(c", "(x").replace(" c)", " x)").replace(" c,", " x,"), weights, **options)
    check_held(model)


POINTWISE = {
    "Relu": "Relu",
    "Abs": "Abs",
    "Neg": "Neg",
    "Softplus": "Softplus",
    "Sigmoid": "Sigmoid",
    "Tanh": "Tanh",
    "Erf": "Erf",
    "Exp": "Exp",
    "Softsign": "Softsign",
    "HardSigmoid": "HardSigmoid",
    "HardSwish": "HardSwish",
    "Gelu": "Gelu",
    "Elu": "Elu<alpha=2.5>",
    "Selu": "Selu",
    "Celu": "Celu<alpha=0.4>",
    "LeakyRelu": "LeakyRelu<alpha=0.2>",
    "falling LeakyRelu": "LeakyRelu<alpha=-0.3>",
    "ThresholdedRelu": "ThresholdedRelu<alpha=0.5>",
    "Asinh": "Asinh",
    "Atan": "Atan",
    "Ceil": "Ceil",
    "Floor": "Floor",
    "Round": "Round",
    "Sign": "Sign",
}


@pytest.mark.parametrize(
    "ends", [(-2.0, 3.0), (-4.0, -0.25), (0.5, 3.0), (-20.0, 20.0), (-1.0, 0.0), (0.0, 1.0)]
)
@pytest.mark.parametrize("op", POINTWISE)
def test_a_function_s_range_is_met(op: str, ends: tuple[float, float]) -> None:
    low, high = ends
    body = f"c = Clip(x, lo, hi) y = {POINTWISE[op]}(c)"
    model = net(body, {"lo": np.float32(low), "hi": np.float32(high)}, "float[N] x", MAP, opset=20)
    grid = np.concatenate([np.linspace(low, high, 40001), [-0.7518, -1.2785, -1.5]]).astype(np.float32)
    check_held(model, [{"x": grid}])
    y = compute(model, {"x": grid})[0].astype(np.float64)
    bound = found(model)["y"]
    dips = op in ("HardSwish", "Gelu") and low < -1
    assert bound.low.item() == pytest.approx(
        min(y.min(), {"HardSwish": -0.375, "Gelu": -0.17}[op] if dips else 9), rel=1e-5, abs=1e-3
    )
    assert bound.high.item() == pytest.approx(max(y.max(), 0.0 if dips else y.max()), rel=1e-5, abs=1e-3)


@pytest.mark.parametrize(
    "op", [o for o in POINTWISE if o not in ("Softplus", "Sigmoid", "Exp", "HardSigmoid")]
)
def test_a_function_through_0_keeps_signs(op: str) -> None:
    """Among all float magnitudes, too, as ONNX Runtime computes it; only Gelu claims it on one side only."""
    grid = np.geomspace(1e-45, 1e30, 20000).astype(np.float32)
    for sign in (-1, 1):
        body = f"r = Relu(x) s = Mul(r, q) y = {POINTWISE[op]}(s)"
        model = net(body, {"q": np.float32(sign)}, "float[N] x", MAP, opset=20)
        check_held(model, [{"x": np.append(grid, grid[:1] * 0)}])
        bound = found(model)["y"]
        if op != "Gelu" or sign > 0:
            assert 0.0 in (bound.low.item(), bound.high.item())


# ---- exact values ----------------------------------------------------------------------------------------


def ends(bound: Interval) -> list[tuple[float, float]]:
    return list(zip(bound.low.reshape(-1).tolist(), bound.high.reshape(-1).tolist(), strict=True))


def affine(weight: Any, bias: Any = None, low: float = -1, high: float = 2, more: str = "") -> Interval:
    """Bounds of a Gemm of inputs in [low, high]."""
    weights = {"w": np.array(weight, np.float32), "lo": np.float32(low), "hi": np.float32(high)}
    if bias is not None:
        weights["b"] = np.array(bias, np.float32)
    end = "" if bias is None else ", b"
    return found(net(f"c = Clip(x, lo, hi) y = Gemm{more}(c, w{end})", weights, f"float[N,{len(weight)}] x"))[
        "y"
    ]


def test_a_sum_that_cannot_round_has_exact_bounds() -> None:
    """-1 .. 2 times 1, -0.5, 0 and a bias of 0.25: terms that are multiples of one power of two."""
    assert ends(affine([[1], [-0.5], [0]], [0.25])) == [(-1 - 1 + 0.25, 2 + 0.5 + 0.25)]
    assert affine([[1], [-0.5], [0]], [0.25]).shape == (1, 1)


def test_a_sum_that_can_round_is_widened_by_its_size() -> None:
    a, b = float(np.float32(0.1)), float(np.float32(0.3))
    (low, high) = ends(affine([[0.1], [-0.3]], [1]))[0]
    size = 2 * a + b + 1  # three terms: two additions and a product's rounding
    assert high == pytest.approx(2 * a + b + 1 + 3 * 2 * UP * size, abs=1e-12)
    assert low == pytest.approx(-a - 2 * b + 1 - 3 * 2 * UP * (a + 2 * b + 1), abs=1e-12)


def test_what_underflows_keeps_its_sign_and_may_round_up() -> None:
    assert -1e-37 < affine([[-1e-30]], [0], 1e-10, 1).high.item() <= 0
    weights = {
        "lo": np.float32(0),
        "hi": np.float32(2.0**-100),
        "k": np.float32(2.0**-30 * (1 + 3 * 2.0**-21)),
    }
    check_held(net("c = Clip(x, lo, hi) y = Mul(c, k)", weights, ROWS), [{"x": np.ones((1, 6), np.float32)}])


def test_terms_that_are_0_at_their_bound_round_nothing() -> None:
    """With inputs >= 0 and weights <= 0 the bias is the upper bound, to the last bit."""
    (low, high) = ends(affine([[-0.1], [-0.3]], [0.7], 0, math.inf))[0]
    assert (low, high) == (-math.inf, float(np.float32(0.7)))


def test_a_weight_of_0_takes_nothing_from_an_unbounded_input() -> None:
    assert ends(affine([[0, 0, 1], [0, 0, 0]], [0.1, 0, 0], -math.inf, math.inf)) == [
        (float(np.float32(0.1)),) * 2,
        (0, 0),
        (-math.inf, math.inf),
    ]


def test_factors_of_gemm_count() -> None:
    bound = affine([[1, 2]], [4, 4], more="<alpha=2.0, beta=0.5>")
    assert bound.low.reshape(-1).tolist() == pytest.approx([-2 + 2, -4 + 2], abs=1e-5)
    assert bound.high.reshape(-1).tolist() == pytest.approx([4 + 2, 8 + 2], abs=1e-5)
    assert (bound.high.reshape(-1) > [6, 10]).all()
    check_held(net("y = Gemm<beta=0.3>(x, w, b)", {"w": np.zeros((6, 99), np.float32), "b": normal(99)}))
    high = ends(affine([[0]], [4], more="<beta=0.3>"))[0][1]
    assert 1.2 < high == pytest.approx(1.2, abs=2e-6)
    assert ends(affine([[0]], [-4], more="<beta=0.3>"))[0][1] < 0


def test_a_bias_for_each_row_is_none_for_each_feature() -> None:
    body = f"{POOLED} y = Gemm(c, w, b)"
    known = found(net(body, {"w": (6, 5), "b": (5, 1)} | SMALL, "float[5,6] x"))["y"]
    assert ends(known) == [(-math.inf, math.inf)]


def test_a_product_per_token() -> None:
    known = found(
        net(
            f"{POOLED} y = MatMul(c, w)", {"w": np.eye(6, 3, dtype=np.float32)} | SMALL, "float[N,T,6] x", MAP
        )
    )["y"]
    assert known.shape == (1, 1, 3)
    assert ends(known) == [(-2, 3)] * 3


def conv(attributes: str, op: str = "Conv", low: float = 1.0, channels: int = 1, **weights: Any) -> Interval:
    """Bounds of a convolution of inputs in [low, 2]."""
    all_weights = {"lo": np.float32(low), "hi": np.float32(2)} | weights
    body = f"c = Clip(x, lo, hi) y = {op}{attributes}(c, w)"
    return found(net(body, all_weights, f"float[N,{channels},5,5] x", MAP))["y"]


ONES = np.ones((1, 1, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("attributes", "low"),
    [
        ("", 9),
        ("<pads=[0,0,0,1]>", 0),
        ('<auto_pad="SAME_LOWER">', 0),
        ('<auto_pad="SAME_LOWER", strides=[2,2]>', 0),
        ('<auto_pad="VALID">', 9),
    ],
)
def test_padding_can_take_any_tap_away(attributes: str, low: float) -> None:
    assert ends(conv(attributes, w=ONES)) == [(low, 18)]
    assert ends(conv(attributes, w=-ONES)) == [(-18, -low)]


def test_a_transposed_convolution_can_lose_any_tap() -> None:
    assert ends(conv("<strides=[2,2]>", "ConvTranspose", w=ONES)) == [(0, 18)]


def test_groups_read_their_own_channels() -> None:
    """Channels in [-1, 2], the first two doubled."""
    double = vector(2, 2, 1, 1).reshape(4, 1, 1)
    weight = vector(1, 1, 1, -1, 1, 0, -1, -1).reshape(4, 2, 1, 1)
    body = "c = Clip(x, lo, hi) m = Mul(c, double) y = Conv<group=2>(m, w)"
    known = found(
        net(body, {"lo": np.float32(-1), "hi": np.float32(2), "double": double, "w": weight}, IMAGE, MAP)
    )
    assert known["m"].shape == (1, 4, 1, 1)
    assert ends(known["y"]) == [(-4, 8), (-6, 6), (-1, 2), (-4, 2)]
    assert known["y"].shape == (1, 4, 1, 1)


def test_groups_of_a_transposed_convolution() -> None:
    """(in, out / groups): outputs 0, 1 read inputs 0, 1; outputs 2, 3 read inputs 2, 3."""
    weight = vector(1, 2, 1, 0, 3, 0, 0, -1).reshape(4, 2, 1, 1)
    bound = conv("<group=2>", "ConvTranspose", low=-1, channels=4, w=weight)
    assert ends(bound) == [(-2, 4), (-2, 4), (-3, 6), (-2, 1)]


def test_batch_norm_maps_the_bounds_by_the_sign_of_the_scale() -> None:
    weights = {"g": vector(2, -3, 0), "b": vector(1, 1, -5), "m": vector(0.5, 0, 9), "v": vector(4, 1, 1)}
    body = "c = Clip(x, lo, hi) y = BatchNormalization<epsilon=0.0>(c, g, b, m, v)"
    known = found(net(body, weights | SMALL, "float[N,3,2] x", MAP))["y"]
    assert known.shape == (1, 3, 1)
    assert known.low.reshape(-1).tolist() == pytest.approx([-2 - 0.5 + 1, -9 + 1, -5], abs=1e-4)
    assert known.high.reshape(-1).tolist() == pytest.approx([3 - 0.5 + 1, 6 + 1, -5], abs=1e-4)
    assert ends(known)[2] == (-5, -5)


HALF = "k = Constant<value_float=0.5>() a = Abs(c) p = Min(a, k)"


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        ("y = Add(c, c)", -4, 6),
        ("y = Sub(c, c)", -5, 5),
        ("y = Mul(c, c)", 0, 9),
        ("n = Identity(c) y = Mul(c, n)", -6, 9),
        ("y = Neg(c)", -3, 2),
        ("y = Abs(c)", 0, 3),
        ("y = Sum(c, c, c)", -6, 9),
        ("k = Constant<value_float=4.0>() y = Div(c, k)", -0.5, 0.75),
        ("k = Constant<value_float=-4.0>() y = Div(c, k)", -0.75, 0.5),
        ("k = Constant<value_float=1.0>() a = Abs(c) d = Add(a, k) y = Div(d, d)", 0.25, 4),
        ("a = Abs(c) y = Div(a, a)", 0, math.inf),
        (f"{HALF} y = Div(p, a)", 0, math.inf),
        (f"{HALF} q = Neg(p) y = Div(q, a)", -math.inf, 0),
        (f"{HALF} n = Neg(a) y = Div(p, n)", -math.inf, 0),
        (f"{HALF} n = Neg(a) q = Neg(p) y = Div(q, n)", 0, math.inf),
        (f"{HALF} y = Div(a, p)", 0, math.inf),
        ("k = Constant<value_float=1.0>() a = Abs(c) d = Add(a, k) y = Div(d, c)", -math.inf, math.inf),
        ("h = Constant<value_ints=[1]>() y = Gather<axis=1>(c, h)", -2, 3),
        ("a = Abs(c) n = Neg(a) y = Div(n, a)", -math.inf, 0),
        ("a = Abs(c) n = Neg(a) y = Div(a, n)", -math.inf, 0),
        ("y = Div(c, c)", -math.inf, math.inf),
        ("k = Constant<value_float=2.0>() y = Pow(c, k)", 0, 9),
        ("k = Constant<value_float=3.0>() y = Pow(c, k)", -math.inf, math.inf),
        ("k = Constant<value_float=0.5>() y = Max(c, k)", 0.5, 3),
        ("k = Constant<value_float=0.5>() y = Min(c, k)", -2, 0.5),
        ("y = LeakyRelu<alpha=0.5>(c)", -1, 3),
        ("y = LeakyRelu<alpha=-2.0>(c)", 0, 4),
        ("y = GlobalMaxPool(c)", -2, 3),
        ("y = ReduceMin(c)", -2, 3),
        ("y = Transpose(c)", -2, 3),
        ("y = CumSum(c, k)", -math.inf, math.inf),
        ("y = Sin(c)", -math.inf, math.inf),
        ("y = Elu<alpha=-2.0>(c)", -math.inf, math.inf),
        ("y = Dropout(c, r, t)", -math.inf, math.inf),
        ('y = Resize<mode="cubic">(c, , s)', -math.inf, math.inf),
        ("y = MaxPool<kernel_shape=[2,2], dilations=[5,5], pads=[1,1,1,1]>(c)", -math.inf, 3),
        ("y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(c)", -2, 3),
    ],
)
def test_bounds_of_inputs_from_minus_2_to_3(body: str, low: float, high: float) -> None:
    weights = {"r": np.float32(0.5), "t": np.array(True), "k": np.array(1), "s": vector(1, 1, 2, 2)}
    used = {
        name: value for name, value in weights.items() if f", {name})" in body and f"{name} =" not in body
    }
    if ", r, t)" in body:
        used = {"r": weights["r"], "t": weights["t"]}
    model = net(f"{POOLED} {body}", used | SMALL, IMAGE, MAP)
    bound = found(model)["y"]
    assert ends(bound) == [(low, high)]
    assert bound.shape == (1, 1, 1, 1)


def test_a_single_operation_is_widened_by_one_rounding() -> None:
    k = np.float32(0.1)
    known = found(net(f"{POOLED} y = Add(c, k)", {"k": k} | SMALL, "float[N] x", MAP))["y"]
    exact = 3 + float(k)
    assert exact < known.high.item() == pytest.approx(exact * (1 + UP), rel=1e-12)


def test_a_sum_of_both_signs_may_round_above_0() -> None:
    """10 inputs in 0..0.1 with weight 0.1, and a bias of -0.1: exactly 0 at best, but not in float32."""
    known = affine(np.full((10, 1), 0.1), [-0.1], 0, 0.1)
    assert known.high.item() > -0.1 + 10 * 0.01 - 1e-9
    size = 10 * float(np.float32(0.1)) ** 2
    bias = np.float32(-size)
    above = affine(np.full((10, 1), 0.1), [bias], 0, 0.1)
    assert above.high.item() > 0


def test_means_and_sums() -> None:
    k = vector(1, 2, -1, 0).reshape(4, 1, 1)
    body = f"""{POOLED} m = Mul(c, k) a = ReduceMean<axes=[1,2]>(m) b = ReduceSum(m, two)
        d = ReduceMax<axes=[1]>(m) e = ReduceMin<axes=[1]>(m) g = GlobalAveragePool(m)
        f = AveragePool<kernel_shape=[2,2]>(m) y = Add(a, b)"""
    known = found(net(body, {"k": k, "two": ints(1, 2)} | SMALL, IMAGE, MAP))
    assert known["a"].high.item() == pytest.approx((3 + 6 + 2) / 4, rel=1e-4)
    assert known["a"].low.item() == pytest.approx((-2 - 4 - 3) / 4, rel=1e-4)
    assert known["b"].high.item() == pytest.approx((3 + 6 + 2) * 6, rel=1e-4)
    assert ends(known["d"]) == [(0, 6)]
    assert ends(known["e"]) == [(-4, 0)]
    for name in "fg":
        assert known[name].shape == (1, 4, 1, 1)
        assert known[name].high.reshape(-1).tolist() == pytest.approx([3, 6, 2, 0], rel=1e-4)
        assert ends(known[name])[3] == (0, 0)
    body = f"{POOLED} r = Exp(c) n = Neg(r) z = ReduceSum(n, a) y = ReduceSum(r, a)"
    known = found(net(body, {"a": ints(0)} | SMALL, ROWS))
    assert ends(known["y"]) == [(0, math.inf)]
    assert ends(known["z"]) == [(-math.inf, 0)]


@pytest.mark.parametrize(
    "op",
    [
        "AveragePool<kernel_shape=[3,3]>(c)",
        "GlobalAveragePool(c)",
        "ReduceMean<axes=[2,3]>(c)",
        "ReduceSum(c, a)",
        'Resize<mode="linear">(c, , s)',
    ],
)
def test_a_mean_of_equal_numbers_is_another_number(op: str) -> None:
    """It is where ONNX Runtime's sums round, and then it is within the bounds."""
    k = normal(64, 1, 1)
    weights = {"zero": np.float32(0), "k": k, "a": ints(2, 3), "s": vector(1, 1, 1.7, 1.3)}
    used = {name: v for name, v in weights.items() if name in "zerok" or f", {name})" in op}
    model = net(f"z = Mul(x, zero) c = Add(z, k) y = {op}", used, "float[N,64,7,7] x", MAP)
    check_held(model)
    known = found(model)
    assert np.array_equal(known["c"].low, known["c"].high)
    assert known["y"].low == pytest.approx(known["y"].high, rel=1e-4)


def test_a_mean_over_unknown_positions_stays_finite_and_keeps_its_sign() -> None:
    bound = found(net("r = Sigmoid(x) y = GlobalAveragePool(r)", {}, "float[N,3,H,W] x", MAP))["y"]
    assert bound.low.item() == 0
    assert 1.5 <= bound.high.item() <= 3


def test_padding_lays_channels_out() -> None:
    weights = {"p": ints(0, 1, 0, 0, 0, 2, 0, 0), "v": np.float32(-9)}
    known = found(net(f"{POOLED} y = Pad(c, p, v)", weights | SMALL, IMAGE, MAP))["y"]
    assert ends(known) == [(-9, -9), *[(-2, 3)] * 4, (-9, -9), (-9, -9)]
    weights["p"] = ints(0, -1, 1, 0, 0, 1, 0, 0)
    known = found(net(f"{POOLED} y = Pad(c, p, v)", weights | SMALL, IMAGE, MAP))["y"]
    assert ends(known) == [*[(-9, 3)] * 3, (-9, -9)]
    mirrored = 'y = Pad<mode="edge">(c, p)'
    known = found(net(f"{POOLED} {mirrored}", {"p": weights["p"]} | SMALL, IMAGE, MAP))["y"]
    assert ends(known) == [(-2, 3)]


def test_padding_by_edges_mixes_indices_even_if_the_size_stays() -> None:
    k = vector(1, 2, 3, 4).reshape(4, 1, 1)
    body = f'{POOLED} m = Mul(c, k) y = Pad<mode="edge">(m, p)'
    model = net(body, {"k": k, "p": ints(0, 1, 0, 0, 0, -1, 0, 0)} | SMALL, IMAGE, MAP)
    assert ends(found(model)["y"]) == [(-8, 12)]
    body = f"{POOLED} m = Mul(c, k) v = ReduceMin<keepdims=0>(c) y = Pad(m, p, v)"
    model = net(body, {"k": k, "p": ints(0, 1, 0, 0, 0, 0, 0, 0)} | SMALL, IMAGE, MAP)
    check_held(model)
    assert ends(found(model)["y"]) == [(-2, 3), *[(-2 * n, 3 * n) for n in (1, 2, 3, 4)]]


def moved(body: str, weights: dict[str, Any] | None = None, x: str = "float[N,4,2,3] x") -> Interval:
    """Bounds of `body` of a tensor `m` in [0, 1], [0, 2], [0, 3], [0, 4] by channel."""
    k = vector(1, 2, 3, 4).reshape(4, 1, 1)
    start = "c = Clip(x, lo, hi) m = Mul(c, k)"
    more = {"k": k, "lo": np.float32(0), "hi": np.float32(1)}
    return found(net(f"{start} {body}", more | (weights or {}), x, MAP))["y"]


MOVES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], list[float]]] = {
    "Flatten": ("y = Flatten(m)", {}, (1, 24), [v for v in (1, 2, 3, 4) for _ in range(6)]),
    "Reshape to flat": (
        "y = Reshape(m, s)",
        {"s": ints(-1, 24)},
        (1, 24),
        [v for v in (1, 2, 3, 4) for _ in range(6)],
    ),
    "Reshape of positions": ("y = Reshape(m, s)", {"s": ints(0, 4, -1)}, (1, 4, 1), [1, 2, 3, 4]),
    "Reshape of channels": ("y = Reshape(m, s)", {"s": ints(0, 2, 2, 2, 3)}, (1, 2, 2, 1, 1), [1, 2, 3, 4]),
    "Reshape across samples": ("y = Reshape(m, s)", {"s": ints(-1, 6)}, (1, 1), [4]),
    "Transpose": ("y = Transpose<perm=[1,3,0,2]>(m)", {}, (4, 1, 1, 1), [1, 2, 3, 4]),
    "shuffle": (
        "a = Reshape(m, s) b = Transpose<perm=[0,2,1,3,4]>(a) y = Reshape(b, t)",
        {"s": ints(0, 2, 2, 2, 3), "t": ints(0, 4, 2, 3)},
        (1, 4, 1, 1),
        [1, 3, 2, 4],
    ),
    "Squeeze": ("g = GlobalMaxPool(m) y = Squeeze(g, a)", {"a": ints(2, 3)}, (1, 4), [1, 2, 3, 4]),
    "Unsqueeze": ("y = Unsqueeze(m, a)", {"a": ints(1, 5)}, (1, 1, 4, 1, 1, 1), [1, 2, 3, 4]),
    "Slice": (
        "y = Slice(m, s, e, a, t)",
        {"s": ints(-1), "e": ints(-9), "a": ints(1), "t": ints(-2)},
        (1, 2, 1, 1),
        [4, 2],
    ),
    "Gather": ("y = Gather<axis=1>(m, i)", {"i": np.array([[3, -4]])}, (1, 1, 2, 1, 1), [4, 1]),
    "Concat": ("y = Concat<axis=1>(m, c)", {}, (1, 8, 1, 1), [1, 2, 3, 4, 1, 1, 1, 1]),
    "Concat elsewhere": (
        "y = Concat<axis=2>(m, c)",
        {},
        (1, 4, 4, 1),
        [v for v in (1, 2, 3, 4) for v in (v, v, 1, 1)],
    ),
    "Split": ("z, y = Split<axis=1>(m, s)", {"s": ints(1, 3)}, (1, 3, 1, 1), [2, 3, 4]),
    "Split evenly": ("z, y = Split<axis=-3>(m)", {}, (1, 2, 1, 1), [3, 4]),
    "Resize": ("y = Resize(m, , s)", {"s": vector(1, 1, 2, 2)}, (1, 4, 1, 1), [1, 2, 3, 4]),
    "Resize of channels": ("y = Resize(m, , s)", {"s": vector(1, 2, 1, 1)}, (1, 1, 1, 1), [4]),
    "ReduceMax": ("y = ReduceMax<axes=[-1,2], keepdims=0>(m)", {}, (1, 4), [1, 2, 3, 4]),
    "Where": (
        "y = Where(q, m, c)",
        {"q": np.array([True, False] * 2).reshape(4, 1, 1)},
        (1, 4, 1, 1),
        [1, 1, 3, 1],
    ),
    "MaxPool": ("y, i = MaxPool<kernel_shape=[2,2]>(m)", {}, (1, 4, 1, 1), [1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", MOVES)
def test_indices_keep_their_bounds(name: str) -> None:
    body, weights, shape, high = MOVES[name]
    bound = moved(body, weights)
    assert bound.shape == shape
    assert bound.high.reshape(-1).tolist() == high
    assert not bound.low.any()


def test_flattening_unknown_sizes_takes_the_hull() -> None:
    bound = moved("y = Flatten(m)", x="float[N,4,H,W] x")
    assert ends(bound) == [(0, 4)]


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        (("N", 4, 2, 3), ("N", 24), [(1, 1), (4, 2)]),
        ((None, 4, 2, 3), (None, 24), [(1, 1), (4, 2)]),
        (("N", 4, "H", "W"), ("N", 4, None), [(1, 1), (2, 2), (4, 3)]),
        (("N", 8, "H"), ("N", 2, 4, "H"), [(1, 1), (2, 3), (3, 4)]),
        (("N", 4, 1, 1), ("N", 4), [(1, 1), (2, 2), (4, 2)]),
        (("N", 4), ("N", 1, 4), [(1, 1), (2, 3)]),
        ((6, 4), (4, 6), [(2, 2)]),
        ((2, 3), (), [(2, 0)]),
        (("N", 3), ("M", 3), [(1, 1), (2, 2)]),
    ],
)
def test_runs_of_axes_that_hold_the_same_indices(
    before: Any, after: Any, runs: list[tuple[int, int]]
) -> None:
    matched = _matched(before, after)
    assert [(old.stop, new.stop) for old, new in matched] == runs


# ---- types and inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE])
def test_other_types_round_by_their_own_eps(code: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(code)
    name = {10: "float16", 11: "double"}[code]
    weights = {
        "w": normal(6, 5).astype(dtype),
        "b": normal(5).astype(dtype),
        "lo": dtype.type(-2),
        "hi": dtype.type(3),
    }
    body = "c = Clip(x, lo, hi) g = Gemm(c, w, b) t = Tanh(g) s = Softmax(t) y = Mul(s, g)"
    model = net(body, weights, f"{name}[N,6] x", f"{name}[A,B] y")
    check_held(model)
    assert np.isfinite(found(model)["y"].high).all()


def test_every_type_has_its_numbers() -> None:
    for name, form in FORMATS.items():
        info = ml_dtypes.finfo(getattr(ml_dtypes, name, name))
        assert form.eps == info.eps
        assert form.normal == info.smallest_normal
        assert form.largest == float(info.max)


def test_an_overflow_is_infinite_not_large() -> None:
    body = f"{POOLED} a = Mul(c, k) y = Mul(a, a)"
    known = found(net(body, {"k": np.float32(1e30)} | SMALL, ROWS))
    assert ends(known["y"]) == [(0, math.inf)]
    known = found(net(f"{POOLED} a = Mul(c, k) q = Mul(a, k) y = Mul(q, c)", {"k": np.float32(1e30)} | SMALL))
    assert ends(known["q"]) == [(-math.inf, math.inf)]


def test_integers_have_the_range_of_their_type() -> None:
    body = "f = Cast<to=1>(x) y = Div(f, k)"
    known = found(net(body, {"k": np.float32(256)}, "uint8[N,3] x"))
    assert ends(known["x"]) == [(0, 255)]
    assert ends(known["y"]) == [(0, 255 / 256)]
    known = found(
        net("i = Cast<to=3>(x) j = Cast<to=2>(i) k = Cast<to=3>(j) y = Cast<to=1>(k)", {}, "uint8[N,3] x")
    )
    assert [ends(known[name])[0] for name in "ijk"] == [(-128, 127), (0, 255), (-128, 127)]
    known = found(net("a = Add(x, x) y = Cast<to=1>(a)", {}, "uint8[N,3] x"))
    assert ends(known["a"]) == [(0, 255)]  # it wraps around
    known = found(net("a = Relu(x) i = Cast<to=6>(a) b = Cast<to=9>(x) y = Cast<to=1>(b)", {}, ROWS))
    assert ends(known["i"]) == [(-(2**31), 2**31 - 1)]  # beyond it, anything
    assert ends(known["y"]) == [(0, 1)]


def test_integers_are_cut_and_no_operator_computes_new_ones() -> None:
    weights = {"lo": np.float32(-1.5), "hi": np.float32(7.5), "two": ints(2), "four": ints(4)}
    body = "c = Clip(x, lo, hi) i = Cast<to=7>(c) j = Max(i, four) d = Div(j, two) y = Cast<to=1>(d)"
    model = net(body, weights, ROWS)
    check_held(model)
    known = found(model)
    assert ends(known["i"]) == [(-1, 7)]
    assert ends(known["j"]) == [(4, 7)]
    assert ends(known["d"]) == [(-(2.0**63), 2.0**63)]


def test_an_output_without_a_name_is_no_tensor() -> None:
    model = net(", y = RNN<hidden_size=2>(x, w, r)", {"w": (1, 2, 6), "r": (1, 2, 2)}, "float[T,N,6] x", MAP)
    assert found(model).keys() == {"x", "w", "r", "y"}


def test_weights_of_bfloat16() -> None:
    value = normal(6).astype(ml_dtypes.bfloat16)
    known = found(net("y = Add(x, k)", {"k": value}, "bfloat16[N,6] x", "bfloat16[] y"))
    assert np.array_equal(known["k"].low, value.astype(np.float64))


def test_inputs_and_weights() -> None:
    w = normal(6, 5)
    model = net("y = MatMul(x, w)", {"w": w, "empty": np.zeros((0, 3), np.float32)})
    known = found(model)
    assert ends(known["x"]) == [(-math.inf, math.inf)]
    assert known["x"].shape == (1, 1)
    assert np.array_equal(known["w"].low, w)
    assert np.array_equal(known["w"].high, w)
    assert ends(known["empty"]) == [(-math.inf, math.inf)]


def test_a_large_constant_gets_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxfuse.analysis.intervals.interval.MOST_INDICES", 20)
    w, k = normal(6, 5), normal(30)
    known = found(net("m = MatMul(x, w) y = Add(m, k)", {"w": w[:, :1], "k": k}))
    assert ends(known["k"]) == [(k.min(), k.max())]
    assert known["y"].shape == (1, 1)
    assert known["w"].shape == (6, 1)
    weights = {"z": np.float32(0), "k": (6, 1), "q": (6,)}
    known = found(net("m = Mul(x, z) a = Add(m, k) y = Add(a, q)", weights, "float[6,6] x"))
    assert known["a"].shape == (6, 1)
    assert known["y"].shape == (1, 1)
    known = found(
        net("r = Abs(x) m = Mul(r, k) y = Flatten(m)", {"k": np.ones((4, 1, 1), np.float32)}, IMAGE)
    )
    assert known["m"].shape == (1, 4, 1, 1)
    assert ends(known["y"]) == [(0, math.inf)]


def test_large_weights_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = case("Conv grouped")
    whole = found(model)["y"]
    monkeypatch.setattr("onnxfuse.analysis.intervals.linear_rules._BLOCK", 40)
    parts = found(model)["y"]
    assert np.array_equal(whole.low, parts.low)
    assert np.array_equal(whole.high, parts.high)
    monkeypatch.setattr("onnxfuse.analysis.intervals.linear_rules._LARGEST", 40)
    assert ends(found(model)["y"]) == [(-math.inf, math.inf)]


def test_infinite_constants_give_no_numbers_that_are_none() -> None:
    mask = vector(0, -math.inf, 0, 1, 2, 3)
    known = found(
        net(f"{POOLED} a = Add(c, mask) s = Softmax(a) y = MatMul(a, mask)", {"mask": mask} | SMALL, ROWS)
    )
    assert ends(known["s"])[0] == (0, 1 + 2 * 16 * UP)
    assert not any(np.isnan(v.low).any() or np.isnan(v.high).any() for v in known.values())
    weights = {"zero": np.float32(0), "w": np.full((6, 2), math.inf, np.float32)}
    known = found(net("m = Mul(x, zero) y = MatMul(m, w)", weights, ROWS))
    assert ends(known["y"]) == [(-math.inf, math.inf)] * 2


def test_what_has_no_rule_is_unbounded() -> None:
    body = """a = Relu(x) b = LayerNormalization(a, k) d = Cos(a) e = Add(b, d)
        s, i = TopK(e, n) y = Relu(s)"""
    known = found(net(body, {"k": np.ones(6, np.float32), "n": ints(3)}, ROWS))
    assert ends(known["s"]) == [(-math.inf, math.inf)]
    assert ends(known["y"]) == [(0, math.inf)]
    assert ends(known["i"]) == [(-(2.0**63), 2.0**63)]


def test_an_operator_of_another_domain_is_not_taken_for_onnx_s_own() -> None:
    model = net("y = Relu(x)", {}, ROWS)
    proto = model.to_proto()
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    assert ends(found(Model.load(proto))["y"]) == [(-math.inf, math.inf)]


def test_an_unknown_rank_gives_bounds_of_rank_0() -> None:
    body = """c = Clip(x, lo, hi) r = Reshape(c, s) a = Relu(r) m = MatMul(a, w) g = GlobalAveragePool(r)
        q = Squeeze(a) k = Concat<axis=1>(a, r) p = Pad(r, s) t = Transpose(r)
        n = BatchNormalization(r, o, o, o, o) u = ReduceMax<keepdims=0>(r) v = ReduceSum(r, z)
        h = Split<axis=1>(a) j = Add(a, w)
        b = Slice(a, z, z) e = Gather(a, z) aa = Conv(r, f) y = Identity(aa)"""
    weights = {"w": vector(1, -1, 1, 1).reshape(2, 2), "z": ints(0), "o": vector(1, 2), "f": (3, 2, 1, 1)}
    model = net(body, weights | SMALL, "float[N,2] x, int64[K] s", MAP)
    shapes = model.shapes() | {n: TensorInfo(n, np.dtype("float32"), None) for n in "ramgqkptnuvhjbe"}
    shapes["aa"] = TensorInfo("aa", np.dtype("float32"), (None, 3, None, None))
    known = intervals(model, shapes)
    assert ends(known["a"]) == [(0, 3)]
    assert known["a"].shape == known["j"].shape == known["n"].shape == ()
    assert ends(known["m"]) == [(-3, 6)]
    assert ends(known["j"]) == [(-1, 4)]
    assert ends(known["k"]) == [(-2, 3)]
    assert ends(known["v"]) == [(-math.inf, math.inf)]
    assert known["aa"].shape == (1, 3, 1, 1)


def test_shapes_that_contradict_each_other_cost_bounds_only() -> None:
    body = "a = Abs(x) m = Mul(a, k) f = Flatten(m) s = Add(f, b) y = Relu(s)"
    model = net(body, {"k": (4, 1, 1), "b": (144,)}, IMAGE)
    wrong = model.shapes() | {"f": TensorInfo("f", np.dtype("float32"), ("N", 100))}
    known = intervals(model, wrong)
    assert ends(known["f"]) == [(-math.inf, math.inf)]
    assert known["y"].low.min() == 0
    known = intervals(model, model.shapes() | {"m": TensorInfo("m", np.dtype("float32"), ("N", 5, 6, 6))})
    assert known["m"].shape == (1, 1, 1, 1)


# ---- dead channels ---------------------------------------------------------------------------------------


def dead(body: str, weights: dict[str, Any], x: str = "float[N,3,5,5] x", tensor: str = "r") -> list[int]:
    """The channels of `tensor` that are 0 whatever is fed; ONNX Runtime agrees, bit by bit."""
    model = net(f"{body} y = Identity({tensor})", weights, x, MAP)
    check_held(model)
    channels = next(s for s in compute(model, feeds(model)[0], tensor)).shape[1]
    mask = found(model)[tensor].zeros(1, channels)
    for feed in feeds(model):
        value = compute(model, feed, tensor)[0]
        assert not value[:, mask].any()
    return np.flatnonzero(mask).tolist()


def zero_filters(*channels: int) -> np.ndarray:
    weight = normal(4, 3, 3, 3)
    weight[list(channels)] = 0
    return weight


PADDED = "<pads=[1,1,1,1]>"


def test_a_zero_filter_without_a_positive_bias_is_dead() -> None:
    body = f"a = Conv{PADDED}(x, w, b) r = Relu(a)"
    weights = {"w": zero_filters(0, 1, 2), "b": vector(0, -0.3, 1e-38, -5)}
    assert dead(body, weights) == [0, 1]
    assert dead(f"a = Conv{PADDED}(x, w) r = Relu(a)", {"w": zero_filters(3)}) == [3]


def test_weights_that_are_not_positive_on_inputs_that_are_not_negative() -> None:
    weight = normal(4, 3, 3, 3)
    weight[[1, 2]] = -np.abs(weight[[1, 2]])
    body = f"p = Relu(x) a = Conv{PADDED}(p, w, b) r = Relu(a)"
    assert dead(body, {"w": weight, "b": vector(0, 0, -1, 0)}) == [1, 2]
    assert dead(body, {"w": weight, "b": vector(0, 1e-30, -1, 0)}) == [2]
    weight[1, 0, 0, 0] = 1e-30
    assert dead(body, {"w": weight, "b": vector(0, 0, -1, 0)}) == [2]
    assert dead(body.replace("p = Relu(x)", "p = Sigmoid(x)"), {"w": weight, "b": vector(0, -1, -1, 0)}) == [
        1,
        2,
    ]


def test_dead_by_a_bias_that_bounded_inputs_do_not_reach() -> None:
    """Sums up to 12.5 of inputs in [0, 6]."""
    weight = np.zeros((4, 3, 1, 1), np.float32)
    weight[:, 0], weight[:, 1] = 2, 0.1
    body = "p = Clip(x, lo, hi) a = Conv(p, w, b) r = Relu(a)"
    weights = {"w": weight, "lo": np.float32(0), "hi": np.float32(6)}
    assert dead(body, weights | {"b": vector(-12.7, -12.5, -13, 0)}) == [0, 2]
    weight[:, 1] = 0.25  # no rounding: 13.5 exactly
    assert dead(body, weights | {"b": vector(-13.5, -13.499999, -13.6, 0)}) == [0, 2]


def batch_norm(**values: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "g": vector(1, 1, 1, 1),
        "s": vector(0, 0, 0, 0),
        "m": vector(0, 0, 0, 0),
        "v": vector(1, 1, 1, 1),
    } | values


def test_dead_through_batch_norm() -> None:
    body = f"a = Conv{PADDED}(x, w, b) n = BatchNormalization(a, g, s, m, v) r = Relu(n)"
    weights: dict[str, Any] = {"w": zero_filters(0, 1, 2), "b": vector(0, -1, 1, 0)}
    assert dead(body, weights | batch_norm()) == [0, 1]
    assert dead(body, weights | batch_norm(g=vector(-1, -1, -1, -1))) == [0, 2]
    assert dead(body, weights | batch_norm(s=vector(1e-30, 0.5, -2, 0))) == [1, 2]
    assert dead(body, weights | batch_norm(m=vector(1, -2, 3, 0))) == [0, 2]
    assert dead(body, weights | batch_norm(g=vector(1, 1, 1, 0), s=vector(1, 1, 1, -1))) == [3]


def test_batch_norm_in_training_mode_is_not_known() -> None:
    weights = {"g": vector(1, 1), "b": vector(0, 0), "m": vector(0, 0), "v": vector(1, 1)}
    body = f"{POOLED} y, p, q = BatchNormalization<training_mode=1>(c, g, b, m, v)"
    known = found(net(body, weights | SMALL, "float[N,2] x", MAP))
    assert all(ends(known[name])[0] == (-math.inf, math.inf) for name in "ypq")


def test_alive_again_behind_batch_norm() -> None:
    body = f"a = Conv{PADDED}(x, w) r0 = Relu(a) n = BatchNormalization(r0, g, s, m, v) r = Relu(n)"
    weights = {"w": zero_filters(0, 1)} | batch_norm(s=vector(0, 0.1, 0, 0))
    assert dead(body, weights) == [0]
    assert dead(body, weights, tensor="r0") == [0, 1]


def test_dead_through_residual_sums() -> None:
    body = """a = Conv(x, w) ra = Relu(a) b = Conv(x, u) rb = Relu(b) s = Add(ra, rb) r = Relu(s)"""
    weights = {"w": zero_filters(0, 1), "u": zero_filters(1, 2)}
    assert dead(body, weights) == [1]
    assert dead(body.replace("rb = Relu(b)", "rb = Identity(b)"), weights) == [1]
    assert dead(body.replace("Add", "Sub"), weights) == [0, 1]  # -relu under the ReLU
    assert dead(body.replace("Add", "Mul"), weights) == [0, 1, 2]


def test_dead_through_what_follows_in_networks() -> None:
    body = f"""a = Conv{PADDED}(x, w, b) p = Relu(a) m = MaxPool<kernel_shape=[2,2]>(p)
        g = GlobalAveragePool(m) q = Sigmoid(g) se = Mul(m, q) av = AveragePool<kernel_shape=[2,2]>(se)
        cat = Concat<axis=1>(av, av)
        up = Resize<mode="linear">(cat, , sc) pad = Pad(up, pads) r = LeakyRelu(pad)"""
    weights = {"w": zero_filters(0, 2), "b": vector(0, 0, -1, 1), "sc": vector(1, 1, 2, 2)}
    weights["pads"] = ints(0, 1, 1, 1, 0, 0, 1, 1)
    assert dead(body, weights) == [0, 1, 3, 5, 7]


def test_dead_features_of_dense_layers() -> None:
    body = "a = Conv(x, w) p = Relu(a) f = Flatten(p) h = Gemm(f, u, b) r = Relu(h)"
    u = np.zeros((36, 3), np.float32)
    u[:9] = 1  # all of channel 0
    u[9:18, 1] = -1  # all of channel 1
    u[18, 2] = 1
    weights = {"w": zero_filters(0), "u": u, "b": vector(0, 0, 0)}
    assert dead(body, weights) == [0, 1]


def test_a_transposed_convolution_with_zero_filters() -> None:
    weight = normal(3, 4, 3, 3)
    weight[:, 2] = 0
    assert dead(
        "a = ConvTranspose<strides=[2,2]>(x, w, b) r = Relu(a)", {"w": weight, "b": vector(0, 0, 0, -9)}
    ) == [2]


def test_zeros_reads_any_axis_and_broadcast_bounds() -> None:
    zero, some = Interval(np.zeros((1, 1)), np.zeros((1, 1))), Interval(np.zeros((2, 3)), np.zeros((2, 3)))
    some.high[1, 2] = 1
    assert zero.zeros(1, 4).tolist() == [True] * 4
    assert some.zeros(0, 2).tolist() == [True, False]
    assert some.zeros(-1, 3).tolist() == [True, True, False]
    assert Interval(np.zeros(()), np.zeros(())).zeros(1, 2).tolist() == [True, True]
    assert Interval(np.zeros(()), np.ones(())).zeros(1, 2).tolist() == [False, False]


def test_numpy_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    for name in CASES:
        found(case(name))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


# ---- random graphs ---------------------------------------------------------------------------------------

UNARY = [
    *("Relu", "Abs", "Neg", "Sigmoid", "Tanh", "Exp", "Softplus", "HardSwish", "LeakyRelu", "Elu", "Erf"),
    *("Softsign", "Identity", "GlobalAveragePool", "GlobalMaxPool", "Softmax", "HardSigmoid", "Selu"),
]
BINARY = ["Add", "Sub", "Mul", "Max", "Min", "Sum", "Div"]
WEIGHTED = {
    "Conv<pads=[1,1,1,1]>": (4, 4, 3, 3),
    "Conv<group=2>": (4, 2, 1, 1),
    "Conv<group=4, pads=[1,1,1,1]>": (4, 1, 3, 3),
    "ConvTranspose<pads=[1,1,1,1]>": (4, 4, 3, 3),
    "Add": (4, 1, 1),
    "Mul": (4, 1, 1),
    "PRelu": (4, 1, 1),
    "Max": (1,),
}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, dict[str, np.ndarray]]:
    """Up to 8 nodes over maps (N, 4, 3, 3) or (N, 4, 1, 1), with weights on a coarse grid or not."""
    nodes, weights, tensors = [], {}, ["x"]
    for i in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from([*UNARY, *BINARY, *WEIGHTED]))
        inputs = [draw(st.sampled_from(tensors[-3:]))]
        if op in WEIGHTED and draw(st.booleans()) | (op not in BINARY):
            random = np.random.default_rng(draw(st.integers(0, 999)))
            value = random.standard_normal(WEIGHTED[op])
            value *= random.random(value.shape) > draw(st.sampled_from([0, 0.5, 0.9]))
            value = draw(st.sampled_from([lambda v: v, np.rint, lambda v: -abs(v), lambda v: 100 * v]))(value)
            weights[f"w{i}"] = value.astype(np.float32)
            inputs.append(f"w{i}")
        elif op in BINARY:
            inputs.append(draw(st.sampled_from(tensors)))
        nodes.append(f"t{i} = {op}({', '.join(inputs)})")
        tensors.append(f"t{i}")
    return f"{' '.join(nodes)} y = Identity({tensors[-1]})", weights


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs())
def test_bounds_of_random_graphs_hold(graph: tuple[str, dict[str, np.ndarray]]) -> None:
    body, weights = graph
    model = net(body, weights, "float[N,4,3,3] x", MAP)
    names = [t.name for n in model.nodes for t in n.outputs if t.name]
    runs = [f for f in feeds(model) if all(np.isfinite(v).all() for v in compute(model, f, *names))]
    if runs:
        check_held(model, runs)
