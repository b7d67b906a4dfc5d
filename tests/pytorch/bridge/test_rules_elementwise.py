"""Arithmetic, activations, logic and types: numbers from ONNX Runtime, on tensors and on shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from nets import compute, net, normal
from rule_checks import agrees, agrees_on, compiles_and_exports, is_plain
from torch import fx

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch

VECTOR = {"w": (5,)}
TENSORS = {
    "add": ("y = Add(x, w)", VECTOR),
    "weight first": ("y = Sub(w, x)", VECTOR),
    "broadcast up": ("y = Mul(x, w)", {"w": (3, 1, 1, 5)}),
    "div": ("y = Div(x, w)", VECTOR),
    "pow": ("a = Abs(x)  y = Pow(a, w)", VECTOR),
    "max of three": ("z = Neg(x)  y = Max(x, z, w)", VECTOR),
    "min": ("y = Min(x, w)", VECTOR),
    "sum": ("z = Neg(x)  y = Sum(x, z, w)", VECTOR),
    "mean": ("z = Abs(x)  y = Mean(x, z, w)", VECTOR),
    "one to sum": ("y = Sum(x)", {}),
    "fmod": ("y = Mod<fmod=1>(x, w)", VECTOR),
    "gelu": ("y = Gelu(x)", {}),
    "gelu tanh": ('y = Gelu<approximate="tanh">(x)', {}),
    "elu": ("y = Elu<alpha=0.7>(x)", {}),
    "celu": ("y = Celu<alpha=0.7>(x)", {}),
    "selu": ("y = Selu(x)", {}),
    "selu of its own": ("y = Selu<alpha=1.1, gamma=2.0>(x)", {}),
    "leaky": ("y = LeakyRelu<alpha=0.3>(x)", {}),
    "leaky default": ("y = LeakyRelu(x)", {}),
    "thresholded": ("y = ThresholdedRelu<alpha=0.4>(x)", {}),
    "hard sigmoid": ("y = HardSigmoid(x)", {}),
    "hard sigmoid of torch": ("y = HardSigmoid<alpha=0.1666667>(x)", {}),
    "hard swish": ("y = HardSwish(x)", {}),
    "mish": ("y = Mish(x)", {}),
    "softplus": ("y = Softplus(x)", {}),
    "erf": ("y = Erf(x)", {}),
    "round": ("h = Mul(x, w)  y = Round(h)", {"w": np.float32([0.5])}),
    "clip": ("y = Clip(x, l, h)", {"l": np.float32(-0.5), "h": np.float32(0.7)}),
    "clip below": ("y = Clip(x, l)", {"l": np.float32(-0.5)}),
    "clip above": ("y = Clip(x, , h)", {"h": np.float32(0.5)}),
    "no clip": ("y = Clip(x)", {}),
    "prelu": ("y = PRelu(x, w)", {"w": (4, 1)}),
    "prelu of one slope": ("y = PRelu(x, w)", {"w": (1,)}),
    "where": ("m = Greater(x, w)  y = Where(m, x, w)", VECTOR),
    "softmax": ("y = Softmax<axis=1>(x)", {}),
    "log softmax": ("y = LogSoftmax(x)", {}),
    "hardmax": ("y = Hardmax<axis=-2>(x)", {}),
    "cumsum": ("y = CumSum(x, a)", {"a": np.int64(-1)}),
    "cumsum reverse": ("y = CumSum<reverse=1>(x, a)", {"a": np.int64(1)}),
    "cumsum exclusive": ("y = CumSum<exclusive=1, reverse=1>(x, a)", {"a": np.int64(2)}),
}
HELPED = {"cumsum reverse", "cumsum exclusive", "hardmax"}


@pytest.mark.parametrize("name", TENSORS)
def test_float_tensors(name: str) -> None:
    body, weights = TENSORS[name]
    module = agrees_on(body, weights, (4, 5), opset=20)
    assert is_plain(module) == (name not in HELPED)


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        ("y = Clip<min=-0.5, max=0.5>(x)", 10),
        ("y = Clip<max=0.5>(x)", 7),
        ("y = Softmax(x)", 11),
        ("y = Softmax<axis=2>(x)", 12),
        ("y = LogSoftmax<axis=0>(x)", 9),
        ("y = Hardmax<axis=-1>(x)", 11),
        ("y = Dropout<ratio=0.3>(x)", 7),
    ],
)
def test_older_operator_sets(body: str, opset: int) -> None:
    agrees_on(body, {}, (4, 5), opset)


@pytest.mark.parametrize("body", ["y = Softmax(r)", "y = Softmax<axis=2>(r)", "y = Softmax<axis=-1>(r)"])
def test_softmax_of_unknown_rank(body: str) -> None:
    model = net(f"r = Reshape(x, s)  {body}", {}, "float[24] x, int64[K] s", "float y", 11)
    agrees(model, {"x": normal(24), "s": np.array([2, 3, 4])})


INTEGERS = {
    "div": "y = Div(x, w)",
    "mod": "y = Mod(x, w)",
    "fmod": "y = Mod<fmod=1>(x, w)",
    "max": "y = Max(x, w)",
    "mul": "y = Mul(x, w)",
    "pow": "y = Pow(x, e)",
    "pow by a float": "y = Pow(x, f)",
    "cumsum": "y = CumSum(x, a)",
    "clip": "y = Clip(x, a, a)",
    "unknown type": 'v = Einsum<equation="ij->ij">(x)  y = Div(v, w)',
}


@pytest.mark.parametrize("kind", [np.int64, np.int32])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_tensors(name: str, kind: type) -> None:
    text = np.dtype(kind).name
    weights = {"w": np.array([3, -3, 2, -5], kind), "e": np.array(3, kind), "f": np.float32(2), "a": kind(1)}
    used = {key: value for key, value in weights.items() if f" {key})" in INTEGERS[name].replace(",", ")")}
    model = net(INTEGERS[name], used, f"{text}[N,4] x", f"{text} y", 15)
    agrees(model, {"x": np.array([[7, 7, -7, -8], [-9, 5, 0, 4]], kind)})


def test_division_inside_a_body() -> None:
    body = """t = Constant<value_ints=[0]>()  s = ReduceSum(x)  c = Greater(s, t)
        y = If(c) <then_branch = g () => (int64[N,2] p) { m = MatMul(x, w)  d = Constant<value_int=3>()
                                                         p = Div(m, d) },
                  else_branch = h () => (int64[N,2] q) { q = MatMul(x, w) }>"""
    model = net(body, {"w": np.array([[1, -1], [2, -3]])}, "int64[N,2] x", "int64[N,2] y")
    agrees(model, {"x": np.array([[4, 3], [2, 5]])})


def test_numbers_stand_in_the_code() -> None:
    body = "a = Constant<value_float=2.0>()  b = Mul(a, x)  y = Div(b, c)"
    module = agrees_on(body, {"c": np.float32(3)}, (4,))
    assert "mul = 2.0 * x" in module.code
    assert "mul / c" in module.code


def test_a_number_with_more_axes_than_the_tensor() -> None:
    model = net("a = Constant<value=float[1,1] {2.0}>()  y = Mul(x, a)", {}, "float[N] x", "float[A,B] y")
    agrees(model, {"x": normal(3)})


def test_nothing_but_numbers() -> None:
    numbers = "a = Constant<value=double {2.0}>()  b = Constant<value=double {0.3}>()"
    body = (
        f"{numbers}  c = Div(a, b)  d = Unsqueeze(c, k)  m = Greater(x, a)  w = Where(m, a, b)  y = Mul(w, d)"
    )
    model = net(body, {"k": np.array([0])}, "double[N,5] x", "double[N,5] y")
    agrees(model, {"x": 3 * normal(4, 5).astype(np.float64)}, 1e-12)


# --- logic and types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "y = Greater(x, w)",
        "y = LessOrEqual(w, x)",
        "y = Equal(x, x)",
        "a = Greater(x, w)  b = Less(x, w)  c = Or(a, b)  d = Not(a)  y = And(c, d)",
        "a = Greater(x, w)  b = Cast<to=9>(x)  y = Xor(a, b)",
        "n = Neg(x)  s = Sqrt(n)  y = IsNaN(s)",
        "z = Sub(x, x)  i = Div(x, z)  y = IsInf<detect_negative=0>(i)",
        "z = Sub(x, x)  i = Div(x, z)  y = IsInf(i)",
    ],
)
def test_truth_values(body: str) -> None:
    weights = VECTOR if " w" in body or "(w" in body else {}
    model = net(body, weights, "float[N,4,5] x", "bool y")
    assert is_plain(agrees(model, {"x": normal(3, 4, 5)}))


@pytest.mark.parametrize("target", ["int32", "int64", "uint8", "bool", "double", "float16"])
def test_cast(target: str) -> None:
    code = {"int32": 6, "int64": 7, "uint8": 2, "bool": 9, "double": 11, "float16": 10}[target]
    model = net(f"a = Abs(x)  y = Cast<to={code}>(a)", {}, "float[N,5] x", f"{target}[N,5] y")
    agrees(model, {"x": 3 * normal(4, 5)})


def test_cast_like() -> None:
    body = """k = Constant<value=int64 {3}>()  c = CastLike(k, x)  i = CastLike(x, k)  f = CastLike(i, c)
              y = Mul(f, c)"""
    assert is_plain(agrees_on(body, {}, (4,)))


def test_a_type_that_torch_has_not() -> None:
    model = net("y = Cast<to=17>(x)", {}, "float[N] x", "float8e4m3fn[N] y", 19)
    with pytest.raises(NotApplicableError, match=r"'y' \(Cast\) can't be .* no element type FLOAT8E4M3FN"):
        to_torch(model)


@pytest.mark.parametrize("code", [0, 99, 2**31 - 1])
def test_a_type_that_does_not_exist(code: int) -> None:
    model = net(f"y = Cast<to={code}>(x)", {}, "float[N] x", "float[N] y")
    with pytest.raises(NotApplicableError, match=rf"'y' \(Cast\) can't be .* no element type {code}"):
        to_torch(model)


@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64"])
def test_arithmetic_that_torch_has_not(kind: str) -> None:
    with pytest.raises(NotApplicableError, match=f"torch does no arithmetic on {kind}"):
        to_torch(net("y = Add(x, x)", {}, f"{kind}[N] x", f"{kind}[N] y"))


@pytest.mark.parametrize("body", ["y = BitwiseAnd(x, w)", "y = BitwiseXor(x, w)", "y = BitwiseNot(x)"])
def test_bits(body: str) -> None:
    weights = {"w": np.array([3, -3])} if "w" in body.split("(")[1] else {}
    agrees(net(body, weights, "int64[N,2] x", "int64 y", 18), {"x": np.array([[5, 9], [-1, 12]])})


# --- Dropout ------------------------------------------------------------------------------------------------


def test_dropout_follows_the_mode() -> None:
    module = agrees_on("y = Dropout(x, r)", {"r": np.float32(0.25)}, (40, 50))
    x = torch.ones(8, 40, 50)
    assert torch.equal(module(x), x)
    y = module.train()(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert 0.7 < (y != 0).float().mean() < 0.8
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize(("opset", "kind"), [(7, "float"), (10, "bool"), (13, "bool")])
def test_dropout_mask(opset: int, kind: str) -> None:
    model = net("y, m = Dropout(x)", {}, "float[N,50] x", f"float[N,50] y, {kind}[N,50] m", opset)
    module = to_torch(model)
    assert all(torch.equal(found, torch.ones(30, 50)) for found in module(torch.ones(30, 50)))
    y, mask = module.train()(torch.ones(30, 50))
    assert mask.dtype == {"float": torch.float32, "bool": torch.bool}[kind]
    assert torch.equal(y, 2.0 * mask)
    assert 0.4 < mask.float().mean() < 0.6


def test_no_dropout_is_none() -> None:
    module = to_torch(net("h = Dropout(x, r)  y = Neg(h)", {"r": np.float32(0)}))
    assert [node.op for node in module.graph.nodes] == ["placeholder", "call_function", "output"]


# --- on shapes ----------------------------------------------------------------------------------------------

SIZES = "s = Shape(x)  n = Gather(s, zero)  m = Gather(s, one)  "
NUMBERS = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "seven": np.int64(7)}


def sizes(body: str, kind: str = "int64") -> Model:
    """A model from x (N, M) to y, computed from n = N and m = M."""
    used = {key: value for key, value in NUMBERS.items() if key in SIZES + body}
    return net(SIZES + body, used, "float[N,M] x", f"{kind} y")


def agrees_on_sizes(
    body: str, kind: str = "int64", pairs: Sequence[tuple[int, int]] = ((2, 3), (9, 4), (1, 1), (20, 7))
) -> fx.GraphModule:
    """The import computes from sizes what ONNX Runtime does, and on the host."""
    model = sizes(body, kind)
    module = to_torch(model)
    for rows, columns in pairs:
        x = normal(rows, columns)
        (wanted,) = compute(model, {"x": x})
        found = module(torch.from_numpy(x)).numpy()
        assert (found.dtype, found.shape, found.tolist()) == (wanted.dtype, wanted.shape, wanted.tolist())
    makers = [
        n for n in module.graph.nodes if "torch.tensor" in str(n.target) or "_host_tensor" in str(n.target)
    ]
    assert len(makers) == 1
    assert all(node.op == "output" for node in makers[0].users)
    return module


CHAINS = {
    "mul, add": "a = Mul(n, two)  y = Add(a, m)",
    "sub": "y = Sub(n, m)",
    "truncated": "a = Sub(m, seven)  y = Div(a, two)",
    "floor": "y = Div(n, two)",
    "mod": "a = Sub(m, seven)  y = Mod(a, two)",
    "fmod": "a = Sub(m, seven)  y = Mod<fmod=1>(a, two)",
    "max": "y = Max(n, m, two)",
    "min": "y = Min(n, seven)",
    "neg, abs": "a = Sub(n, m)  b = Neg(a)  y = Abs(b)",
    "pow": "y = Pow(n, two)",
    "where": "c = Greater(n, m)  y = Where(c, n, seven)",
    "logic": "a = Less(n, m)  b = Equal(n, m)  c = Or(a, b)  d = Not(a)  e = And(c, d)  y = Cast<to=7>(e)",
    "size": "a = Size(x)  y = Div(a, m)",
    "vector": "a = Mul(s, two)  b = Concat<axis=0>(a, s)  y = ReduceProd<keepdims=0>(b)",
    "bool": "a = Sub(n, two)  b = Cast<to=9>(a)  y = Where(b, n, seven)",
}


@pytest.mark.parametrize("name", CHAINS)
def test_integers_from_sizes(name: str) -> None:
    agrees_on_sizes(CHAINS[name])


@pytest.mark.parametrize(
    "body",
    [
        "f = Cast<to=1>(n)  y = Sqrt(f)",
        "f = Cast<to=1>(n)  g = Cast<to=1>(m)  y = Div(f, g)",
        "f = Cast<to=1>(n)  r = Sqrt(f)  y = Reciprocal(r)",
        "f = Cast<to=1>(n)  h = Constant<value_float=-0.5>()  y = Pow(f, h)",
        "f = Cast<to=1>(n)  h = Constant<value_float=0.7>()  a = Mul(f, h)  y = Ceil(a)",
    ],
)
def test_floats_from_sizes(body: str) -> None:
    agrees_on_sizes(body, "float")


@pytest.mark.parametrize("factor", [0.7, 0.1, 1.3, 2.0])
def test_floats_are_rounded_as_onnx_does(factor: float) -> None:
    """In double precision, 10 * 0.7 (as a float32) is less than 7."""
    body = f"""f = Cast<to=1>(n)  h = Constant<value_float={factor}>()  a = Mul(f, h)  b = Floor(a)
               y = Cast<to=7>(b)"""
    agrees_on_sizes(body, pairs=[(rows, 1) for rows in range(1, 41)])


@pytest.mark.parametrize(
    "body",
    [
        "a = Constant<value_int=-1>()  c = Equal(n, a)  y = Where(c, seven, m)",
        "a = Constant<value_int=-1>()  c = Less(n, a)  y = Where(c, seven, m)",
        "c = GreaterOrEqual(n, zero)  y = Where(c, m, seven)",
        "c = Equal(n, n)  y = Where(c, m, seven)",
        "y = Max(m, zero)",
        "a = Mul(m, one)  y = Add(a, zero)",
        "a = Mul(n, n)  b = Add(a, two)  c = Greater(b, one)  y = Where(c, m, seven)",
    ],
)
def test_what_a_size_can_not_be(body: str) -> None:
    module = agrees_on_sizes(body)
    calls = [str(node.target) for node in module.graph.nodes if node.op.startswith("call")]
    assert calls[0] == "size"
    assert len(calls) == 3  # besides, the device and the tensor to return


def test_division_by_zero_on_the_host() -> None:
    with pytest.raises(NotApplicableError, match=r"'y' \(Div\) .* it divides by zero"):
        to_torch(sizes("y = Div(n, zero)"))


def test_a_scale_from_a_size() -> None:
    body = "s = Shape(x)  d = Gather(s, l)  f = Cast<to=1>(d)  r = Sqrt(f)  y = Div(x, r)"
    module = agrees_on(body, {"l": np.int64(-1)}, (4, 5))
    assert "x / single" in module.code
    compiles_and_exports(module, (4, 5))


@pytest.mark.parametrize(
    "body",
    [
        "a = Sub(n, seven)  b = Div(a, two)  c = Mod<fmod=1>(b, two)  k = Cast<to=1>(c)",
        "f = Cast<to=1>(n)  h = Constant<value_float=0.7>()  a = Mul(f, h)  k = Floor(a)",
        "l = Less(n, two)  a = Where(l, seven, n)  b = Max(a, seven)  k = Cast<to=1>(b)",
        "a = Mul(n, m)  f = Cast<to=1>(a)  b = Sqrt(f)  k = Reciprocal(b)",
    ],
)
def test_sizes_are_traced(body: str) -> None:
    used = {key: value for key, value in NUMBERS.items() if key in SIZES + body}
    module = agrees_on(f"{SIZES} {body}  y = Add(x, k)", used, (3,))
    compiles_and_exports(module, (3,))
