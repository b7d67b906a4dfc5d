"""Operators on shapes, layout and places: numbers from ONNX Runtime, and code without helpers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import compute, net, normal
from rule_checks import agrees, agrees_on, compiles_and_exports, is_plain

from onnxfuse.errors import NotApplicableError
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.bridge.writeback import from_torch

FAR, BACK = 2**63 - 1, -(2**63)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


Weights = dict[str, Any]
PLAIN: dict[str, tuple[str, Weights]] = {
    "reshape": ("y = Reshape(x, s)", {"s": ints(0, 0, -1, 2)}),
    "reshape to one axis": ("y = Reshape(x, s)", {"s": ints(-1)}),
    "flatten": ("y = Flatten(x)", {}),
    "flatten at 0": ("y = Flatten<axis=0>(x)", {}),
    "flatten at 2": ("y = Flatten<axis=2>(x)", {}),
    "flatten at the end": ("y = Flatten<axis=4>(x)", {}),
    "flatten from the right": ("y = Flatten<axis=-1>(x)", {}),
    "transpose": ("y = Transpose(x)", {}),
    "swap": ("y = Transpose<perm=[0,3,2,1]>(x)", {}),
    "permute": ("y = Transpose<perm=[0,2,3,1]>(x)", {}),
    "nothing to permute": ("a = Transpose<perm=[0,1,2,3]>(x)  y = Neg(a)", {}),
    "unsqueeze": ("y = Unsqueeze(x, a)", {"a": ints(1)}),
    "unsqueeze several": ("y = Unsqueeze(x, a)", {"a": ints(5, 0, 3)}),
    "unsqueeze from the right": ("y = Unsqueeze(x, a)", {"a": ints(-2, -1, -4)}),
    "unsqueeze mixed": ("y = Unsqueeze(x, a)", {"a": ints(-1, 1)}),
    "squeeze": ("u = Unsqueeze(x, a)  y = Squeeze(u, a)", {"a": ints(1, -1)}),
    "concat": ("z = Neg(x)  y = Concat<axis=-2>(x, z, x)", {}),
    "concat of one": ("c = Concat<axis=1>(x)  y = Neg(c)", {}),
    "split": ("a, b = Split<axis=1>(x, s)  y = Concat<axis=1>(b, a)", {"s": ints(1, 2)}),
    "split alike": ("a, b = Split<axis=-1, num_outputs=2>(x)  y = Concat<axis=2>(b, a)", {}),
    "split with a rest": ("a, b = Split<axis=1, num_outputs=2>(x)  y = Concat<axis=1>(b, a)", {}),
    "slice": ("y = Slice(x, b, e, a)", {"b": ints(1, -3), "e": ints(3, -1), "a": ints(1, 3)}),
    "slice from the right": ("y = Slice(x, b, e, a)", {"b": ints(1), "e": ints(FAR), "a": ints(-1)}),
    "slice without axes": ("y = Slice(x, b, e)", {"b": ints(0, 1), "e": ints(FAR, 3)}),
    "slice beyond": ("y = Slice(x, b, e, a)", {"b": ints(-99), "e": ints(99), "a": ints(2)}),
    "slice to nothing": ("y = Slice(x, b, e, a)", {"b": ints(3), "e": ints(2), "a": ints(2)}),
    "slice in steps": ("y = Slice(x, b, e, a, t)", {"b": ints(1), "e": ints(9), "a": ints(3), "t": ints(2)}),
    "flip": ("y = Slice(x, b, e, a, t)", {"b": ints(-1), "e": ints(BACK), "a": ints(1), "t": ints(-1)}),
    "flip, stride": (
        "y = Slice(x, b, e, a, t)",
        {"b": ints(FAR), "e": ints(BACK), "a": ints(3), "t": ints(-2)},
    ),
    "tile": ("y = Tile(x, r)", {"r": ints(1, 2, 1, 3)}),
    "expand": ("y = Expand(x, s)", {"s": ints(2, 1, 1, 4, 1)}),
    "expand fewer": ("y = Expand(x, s)", {"s": ints(4, 6)}),
    "expand to itself": ("e = Expand(x, s)  y = Neg(e)", {"s": ints(1, 1)}),
    "pad": ("y = Pad(x, p)", {"p": ints(0, 1, 2, 0, 0, 0, 1, 3)}),
    "pad with a value": ("y = Pad(x, p, v)", {"p": ints(0, 0, 1, 0, 0, 0, 1, 0), "v": np.float32(-np.inf)}),
    "pad axes": ("y = Pad(x, p, , a)", {"p": ints(1, 2, 3, 0), "a": ints(-1, 1)}),
    "crop": ("y = Pad(x, p)", {"p": ints(0, 0, -1, 2, 0, 0, -1, -3)}),
    "reflect": ('y = Pad<mode="reflect">(x, p)', {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}),
    "edge": ('y = Pad<mode="edge">(x, p)', {"p": ints(0, 0, 0, 2, 0, 0, 0, 7)}),
    "edge of three axes": ('y = Pad<mode="edge">(x, p)', {"p": ints(0, 1, 1, 2, 0, 0, 3, 0)}),
    "wrap": ('y = Pad<mode="wrap">(x, p)', {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}),
    "no pad": ("q = Pad(x, p)  y = Neg(q)", {"p": ints(*[0] * 8)}),
    "gather one": ("y = Gather<axis=1>(x, i)", {"i": np.int64(-1)}),
    "gather some": ("y = Gather<axis=-1>(x, i)", {"i": ints(5, 0, -2, 5)}),
    "gather a run": ("y = Gather<axis=3>(x, i)", {"i": ints(2, 3, 4)}),
    "gather around": ("y = Gather<axis=3>(x, i)", {"i": ints(-1, 0, 1)}),
    "gather a matrix": ("y = Gather<axis=2>(x, i)", {"i": np.array([[0, 1], [-1, 2]])}),
    "depth to space": ("c = Concat<axis=1>(x, x, x, x)  y = DepthToSpace<blocksize=2, mode=\"CRD\">(c)", {}),
    "nonzero": ("r = Relu(x)  i = NonZero(r)  y = Cast<to=1>(i)", {}),
    "argmax": ("i = ArgMax<axis=2, keepdims=0>(x)  y = Cast<to=1>(i)", {}),
    "argmin": ("i = ArgMin<axis=-1>(x)  y = Cast<to=1>(i)", {}),
    "triangle": ("y = Trilu<upper=0>(x, k)", {"k": np.int64(-1)}),
    "upper triangle": ("y = Trilu(x)", {}),
    "einsum": ('y = Einsum<equation="nchw,ncgw->nhg">(x, x)', {}),
}  # fmt: skip
HELPED: dict[str, tuple[str, Weights]] = {
    "step back": ("y = Slice(x, b, e, a, t)", {"b": ints(3), "e": ints(0), "a": ints(2), "t": ints(-1)}),
    "step back twice": (
        "y = Slice(x, b, e, a, t)",
        {"b": ints(-2, 9, 1), "e": ints(-7, -9, 3), "a": ints(3, 2, 1), "t": ints(-2, -1, 1)},
    ),
    "reflect batches": ('y = Pad<mode="reflect">(x, p)', {"p": ints(1, 0, 1, 2, 0, 1, 3, 0)}),
    "edge, cropped": ('y = Pad<mode="edge">(x, p)', {"p": ints(0, 0, -1, 2, 0, 0, 3, 0)}),
    "wrap channels": ('y = Pad<mode="wrap">(x, p)', {"p": ints(0, 2, 1, 2, 0, 3, 3, 6)}),
    "gather elements": ("y = GatherElements<axis=0>(w, i)", {"w": (4, 3), "i": np.array([[1, -1, 2]])}),
    "gather nd": ("y = GatherND(w, i)", {"w": (4, 3, 2), "i": np.array([[1, -1], [-4, 0]])}),
    "gather nd, batches": (
        "y = GatherND<batch_dims=1>(w, i)",
        {"w": (2, 3, 2), "i": np.array([[[1]], [[-1]]])},
    ),
    "depth to space": ("c = Concat<axis=1>(x, x, x, x)  y = DepthToSpace<blocksize=2>(c)", {}),
    "space to depth": ("y = SpaceToDepth<blocksize=2>(x)", {}),
    "top": ("v, i = TopK(x, k)  f = Cast<to=1>(i)  y = Concat<axis=1>(v, f)", {"k": ints(2)}),
    "last argmax": (
        "r = Relu(x)  i = ArgMax<axis=3, select_last_index=1>(r)  y = Cast<to=1>(i)",
        {},
    ),
    "one hot": ("a = ArgMax<axis=1>(x)  y = OneHot<axis=1>(a, d, v)", {"d": np.int64(3), "v": (2,)}),
    "center": ("y = CenterCropPad<axes=[2,3]>(x, s)", {"s": ints(7, 3)}),
    "compress": ("y = Compress<axis=1>(x, c)", {"c": np.array([False, True])}),
    "reverse sequence": ("y = ReverseSequence<batch_axis=1, time_axis=0>(x, l)", {"l": ints(1, 2, 2)}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_torch(name: str) -> None:
    body, weights = PLAIN[name]
    module = agrees_on(body, weights, (3, 4, 6), opset=19)
    assert is_plain(module)


@pytest.mark.parametrize("name", HELPED)
def test_what_torch_has_not(name: str) -> None:
    body, weights = HELPED[name]
    agrees_on(body, weights, (3, 4, 6), opset=18)


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        ("y = Slice<starts=[1,-2], ends=[3,9], axes=[1,2]>(x)", 9),
        ("u = Unsqueeze<axes=[0,3]>(x)  y = Squeeze<axes=[0]>(u)", 11),
        ("a, b = Split<axis=1, split=[1,3]>(x)  y = Concat<axis=1>(b, a)", 11),
        ("a, b = Split<axis=1>(x)  y = Concat<axis=1>(b, a)", 8),
        ("y = Pad<pads=[0,1,0,0,0,2], value=0.5>(x)", 10),
        ('y = Pad<mode="reflect", pads=[0,0,1,0,0,2]>(x)', 7),
        ("y, i = TopK<k=2, axis=1>(x)", 7),
        ("y = Flatten<axis=2>(x)", 7),
    ],
)
def test_older_operator_sets(body: str, opset: int) -> None:
    agrees_on(body, {}, (4, 6), opset)


# --- exporters' chains --------------------------------------------------------------------------------------

CHAINS: dict[str, tuple[str, Weights, str]] = {
    "heads": (
        """s = Shape(x)  b = Gather(s, zero)  u = Unsqueeze(b, zeros)  m = Constant<value=int64[2] {2,-1}>()
           t = Concat<axis=0>(u, m)  y = Reshape(x, t)""",
        {"zero": np.int64(0), "zeros": ints(0)},
        "reshape([size, 2, -1])",
    ),
    "expand with -1": (
        """s = Shape(x)  a = Slice(s, zero, two)  l = Constant<value=int64[1] {1}>()
           t = Concat<axis=0>(l, l, a)  n = Constant<value=int64[1] {4}>()
           one = ConstantOfShape<value=int64[1] {1}>(n)  m = Constant<value_int=-1>()  k = Mul(one, m)
           c = Equal(t, k)  w = Where(c, one, t)  y = Expand(x, w)""",
        {"zero": ints(0), "two": ints(2)},
        "expand",
    ),
    "split sizes": (
        "s = Shape(x)  b, c = Split<axis=0>(s)  t = Concat<axis=0>(b, o, c)  y = Reshape(x, t)",
        {"o": ints(1)},
        "reshape([size, 1, size_1])",
    ),
    "product": (
        """s = Shape<start=0, end=-1>(x)  p = ReduceProd<keepdims=1>(s)  e = Shape<start=-1>(x)
           t = Concat<axis=0>(p, e)  y = Reshape(x, t)""",
        {},
        "reshape([size, size_1])",
    ),
    "positions": (
        """s = Shape(x)  n = Gather(s, one)  z = Constant<value_int=0>()  o = Constant<value_int=1>()
           r = Range(z, n, o)  p = Gather(w, r)  t = Transpose(p)  y = Add(x, t)""",
        {"one": np.int64(1), "w": (9, 1)},
        "torch.arange(0, size_1, 1",
    ),
    "mask": (
        """s = Shape(x)  o = ConstantOfShape<value=float[1] {-2.0}>(s)  t = Trilu(o)  y = Add(x, t)""",
        {},
        "torch.full([size, size_1], -2.0",
    ),
    "half": (
        """s = Shape(x)  n = Gather(s, one)  h = Div(n, two)  u = Unsqueeze(h, zeros)
           a = Slice(x, zeros, u, ones)  b = Slice(x, u, far, ones)  c = Neg(b)  y = Concat<axis=-1>(c, a)""",
        {"one": np.int64(1), "two": np.int64(2), "zeros": ints(0), "ones": ints(1), "far": ints(FAR)},
        "size_1 // 2",
    ),
    "pad to a size": (
        """s = Shape(x)  n = Gather(s, one)  k = Constant<value_int=9>()  d = Sub(k, n)
           u = Unsqueeze(d, zeros)  t = Concat<axis=0>(three, u)  y = Pad(x, t)""",
        {"one": np.int64(1), "zeros": ints(0), "three": ints(0, 0, 0)},
        "pad(x, [0, sub]",
    ),
    "order of pads": (
        """p = Constant<value=int64[2] {1,2}>()  n = Constant<value=int64[1] {2}>()
           z = ConstantOfShape<value=int64[1] {0}>(n)
           a = Concat<axis=0>(p, z)  b = Reshape(a, pairs)  c = Slice(b, last, start, zeros, last)
           d = Transpose<perm=[1,0]>(c)  e = Reshape(d, last)  f = Cast<to=7>(e)  y = Pad(x, f)""",
        {"pairs": ints(-1, 2), "last": ints(-1), "start": ints(BACK), "zeros": ints(0)},
        "pad(x, [1, 2],",
    ),
    "tile": (
        """s = Shape(x)  n = Gather<axis=0>(s, ones)  o = Constant<value=int64[1] {1}>()
           t = Concat<axis=0>(o, n)  y = Tile(x, t)""",
        {"ones": ints(1)},
        "repeat([1, size_1])",
    ),
    "one size less": (
        """s = Shape(x)  a, b = Split<axis=0>(s)  o = Constant<value=int64[1] {1}>()  q = Sub(b, o)
           k = Squeeze(q)  u = Unsqueeze(k, zeros)  y, i = TopK(x, u)""",
        {"zeros": ints(0)},
        "size_1 - 1",
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_on_shapes_vanish(name: str) -> None:
    body, weights, code = CHAINS[name]
    model = net(body, weights, "float[N,M] x", "float y")
    for shape in ((2, 4), (5, 6)):
        module = agrees(model, {"x": normal(*shape)})
    assert code in module.code
    assert "_host_tensor" not in module.code
    compiles_and_exports(module, (4,))


def test_the_shape_of_a_weight_is_a_number() -> None:
    body = "s = Shape(w)  n = Slice(s, one, two)  t = Concat<axis=0>(minus, n)  y = Reshape(x, t)"
    weights = {"w": (2, 6), "one": ints(1), "two": ints(2), "minus": ints(-1)}
    module = agrees_on(body, weights, (4, 3))
    assert "reshape([-1, 6])" in module.code


# --- what is only known when the module runs ----------------------------------------------------------------

UNKNOWN = {
    "transpose": "y = Transpose(r)",
    "swap": "y = Transpose<perm=[0,2,1]>(r)",
    "flatten": "y = Flatten<axis=2>(r)",
    "flatten from the right": "y = Flatten<axis=-1>(r)",
    "shape": "t = Shape<start=1>(r)  y = ConstantOfShape<value=float[1] {2.0}>(t)",
    "size": "n = Size(r)  u = Unsqueeze(n, zero)  y = Reshape(x, u)",
    "squeeze": "u = Unsqueeze(r, zero)  y = Squeeze(u)",
    "unsqueeze": "y = Unsqueeze(r, last)",
    "gather": "y = Gather<axis=-2>(r, last)",
    "slice": "y = Slice(r, last, far, last)",
    "slice both ways": "y = Slice(r, b, far2, axes)",
    "split": "p, q = Split<axis=-1>(r)  y = Concat<axis=1>(p, q)",
    "expand": "y = Expand(r, big)",
    "arithmetic": "y = Add(r, r)",
    "softmax": "y = Softmax<axis=1>(r)",
    "sum": "y = ReduceSum(r)",
    "max": "y = ReduceMax(r)",
    "mean": "y = ReduceMean<keepdims=0>(r)",
    "product": "y = ReduceProd<keepdims=0>(r)",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_rank(name: str) -> None:
    weights = {
        "zero": ints(0), "last": ints(-1), "far": ints(FAR), "b": ints(1, 1), "far2": ints(FAR, FAR),
        "axes": ints(0, -1), "big": ints(5, 1, 1, 1),
    }  # fmt: skip
    body = UNKNOWN[name]
    used = {key: value for key, value in weights.items() if f", {key}" in body}
    model = net(f"r = Reshape(x, s)  {body}", used, "float[24] x, int64[K] s", "float y")
    agrees(model, {"x": normal(24), "s": ints(2, 3, 4)})


COMPUTED = {
    "reshape": ("y = Reshape(x, a)", (0, -1)),
    "reshape, zeros too": ("y = Reshape<allowzero=1>(x, a)", (3, 8)),
    "expand": ("u = Unsqueeze(x, z)  y = Expand(u, a)", (5, 1, 1)),
    "tile": ("y = Tile(x, a)", (2, 3)),
    "pad": ("y = Pad(x, a)", (0, 1, 2, 0)),
    "pad edges": ('y = Pad<mode="edge">(x, a)', (0, 1, 2, 0)),
    "zeros": ("c = ConstantOfShape(a)  y = Add(c, x)", (3, 4, 6)),
    "split": ("p, q = Split<axis=1>(x, a)  y = Concat<axis=0>(p, q)", (3, 3)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_numbers_computed_from_data(name: str) -> None:
    body, values = COMPUTED[name]
    model = net(body, {"z": ints(0)} if " z)" in body else {}, "float[N,6] x, int64[K] a", "float y")
    agrees(model, {"x": normal(4, 6), "a": ints(*values)})


def test_slice_by_data() -> None:
    inputs = "float[N,6] x, int64[K] b, int64[K] e, int64[K] t"
    model = net("y = Slice(x, b, e, a, t)", {"a": ints(1, 0)}, inputs, "float y")
    for bounds in ((1, 3, 2), (-1, -99, -2), (4, 1, -1)):
        agrees(model, {"x": normal(7, 6), **{key: ints(v, v) for key, v in zip("bet", bounds, strict=True)}})


def test_steps_of_a_size() -> None:
    body = "s = Shape(x)  n = Slice(s, b, t)  y = Slice(x, b, e, t, n)"
    agrees_on(body, {"b": ints(0), "e": ints(FAR), "t": ints(1)}, (9,))


def test_range_by_data() -> None:
    model = net("r = Range(b, e, t)  y = Mul(r, x)", {}, "float x, float b, float e, float t", "float[N] y")
    feed = {"x": 1.0, "b": -1.0, "e": 2.0, "t": 0.75}
    agrees(model, {key: np.array(value, np.float32) for key, value in feed.items()})


def test_axes_by_data_are_refused() -> None:
    model = net("y = Unsqueeze(x, a)", {}, "float[N] x, int64[1] a", "float[A,B] y")
    with pytest.raises(NotApplicableError, match=r"'y' \(Unsqueeze\) .* input 'a' must be a constant"):
        to_torch(model)


# --- edges --------------------------------------------------------------------------------------------------


def test_no_elements() -> None:
    model = net("y = Reshape<allowzero=1>(x, s)", {"s": ints(3, 0)}, "float[N,3] x", "float y")
    agrees(model, {"x": normal(0, 3)})
    agrees(net("y = Flatten(x)", {}, "float[N,3,2] x", "float y"), {"x": normal(0, 3, 2)})


def test_scalars() -> None:
    model = net(
        "u = Unsqueeze(x, a)  v = Add(u, x)  w = Squeeze(v)  y = Mul(w, x)",
        {"a": ints(0)},
        "float x",
        "float y",
    )
    agrees(model, {"x": np.array(3, np.float32)})


def test_what_is_not_contiguous() -> None:
    body = "t = Transpose<perm=[0,2,1]>(x)  r = Reshape(t, s)  y = Flatten(r)"
    module = agrees_on(body, {"s": ints(0, 2, -1)}, (4, 6))
    x = torch.randn(6, 4, 3).permute(2, 1, 0)
    assert torch.equal(module(x), module(x.contiguous()))


def test_an_embedding_is_looked_up_and_trains() -> None:
    model = net("y = Gather(w, i)", {"w": (5, 3)}, "int64[N,2] i", "float[N,2,3] y")
    module = agrees(model, {"i": np.array([[0, 4], [-1, 2]])})
    table = module.get_parameter("w")
    module(torch.tensor([[1, -4]])).sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [[0.0] * 3, [2.0] * 3, *[[0.0] * 3] * 3]


def test_an_index_that_is_none() -> None:
    model = net(
        "s = Shape(x)  n = Gather(s, i)  y = Reshape(x, n)", {"i": ints(4)}, "float[N,3] x", "float[A] y"
    )
    with pytest.raises(NotApplicableError, match=r"'n' \(Gather\) .* an index is out of range"):
        to_torch(model)


def test_what_torch_does_not_fold() -> None:
    weights = {"s": ints(4), "k": ints(2)}
    with pytest.raises(NotApplicableError, match="blocks of two axes"):
        to_torch(net("y = Col2Im(x, s, k)", weights, "float[1,2,3] x", "float[1,1,4] y", 18))


@pytest.mark.parametrize("shape", [(2, 1), (1, 3)])
def test_an_empty_list_of_axes_squeezes_all(shape: tuple[int, ...]) -> None:
    """As no list does, in ONNX Runtime."""
    body = "y = Squeeze(x, none)"
    model = net(body, {"none": np.zeros(0, np.int64)}, f"float[{shape[0]},{shape[1]}] x", "float y")
    agrees(model, {"x": normal(*shape)})


def test_a_sequence_as_an_output() -> None:
    proto = net(
        "s = SplitToSequence<axis=1>(x, sizes)",
        {"sizes": np.array([1, 3])},
        "float[N,4] x",
        "seq(float[N,A]) s",
    )
    wanted = compute(proto, {"x": normal(2, 4)})[0]
    found = to_torch(proto)(torch.from_numpy(normal(2, 4)))
    assert isinstance(found, list)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    from_torch(to_torch(proto), proto)


def test_sequences() -> None:
    body = """q = SplitToSequence<axis=1>(x, two)  a = SequenceAt(q, one)  b = SequenceAt(q, zero)
              c = SequenceConstruct(a, b)  d = SequenceInsert(c, a, zero)  e = SequenceErase(d, minus)
              y = ConcatFromSequence<axis=1>(e)"""
    weights = {"two": np.int64(2), "one": np.int64(1), "zero": np.int64(0), "minus": np.int64(-1)}
    agrees_on(body, weights, (4, 3))


def test_scattering() -> None:
    for kind in ("none", "add", "mul", "max", "min"):
        body = f"""e = ScatterElements<axis=1, reduction="{kind}">(x, i, x)
                   y = ScatterND<reduction="{kind}">(e, p, u)"""
        weights = {"i": np.array([[0, -1, 1], [2, 0, 1]]), "p": np.array([[1], [-2]]), "u": (2, 3)}
        model = net(body, weights, "float[2,3] x", "float[2,3] y", 18)
        agrees(model, {"x": normal(2, 3)})
