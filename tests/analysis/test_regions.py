"""Regions: what is found, what is refused and why, and that the geometry found is the region's own."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.analysis.regions.check import check_geometry
from onnxfuse.analysis.regions.growing import RegionGrowth
from onnxfuse.analysis.regions.region import Region, describe_region
from onnxfuse.analysis.regions.search import find_regions
from onnxfuse.ir.model import Model
from onnxfuse.runtime.session import Runtime

RUNTIME = Runtime("cpu", threads=1)
Weights = Mapping[str, "tuple[int, ...] | np.ndarray"]


def build(
    body: str,
    weights: Weights,
    x: str = "float[N,3,H,W] x",
    y: str = "float[A,B,C,D] y",
    opset: int = 17,
    dims: bool = True,
) -> Model:
    """A model from nodes in ONNX text; a weight given as a shape is filled at random."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({x}) => ({y}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    for name, value in weights.items():
        array = (
            value if isinstance(value, np.ndarray) else generator.standard_normal(value).astype(np.float32)
        )
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.load(proto)


def found(model: Model, **options: int) -> dict[tuple[str, str], Region]:
    return {(r.u, r.v): r for r in find_regions(model, **options)[0]}


def only(model: Model) -> Region:
    regions, _ = find_regions(model)
    assert len(regions) == 1, [describe_region(r) for r in regions]
    return regions[0]


def reasons(model: Model) -> dict[str, str]:
    regions, skips = find_regions(model)
    assert not regions, [describe_region(r) for r in regions]
    return {s.nodes[0]: s.reason for s in skips}


def ops(region: Region) -> list[str]:
    return [n.op for n in region.nodes]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# Structure ----------------------------------------------------------------------------------------


def test_dense_pair_ends_after_the_bias():
    model = build(
        "h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) k = MatMul(r, w2) c = Add(b2, k) y = Tanh(c)",
        {"w1": (8, 16), "b1": (16,), "w2": (16, 4), "b2": (4,)},
        x="float[N,8] x",
        y="float[N,4] y",
    )
    region = only(model)
    assert (region.u, region.v, region.kind) == ("x", "c", "dense")
    assert (region.in_features, region.out_features, region.linear_ops) == (8, 4, 2)
    assert ops(region) == ["MatMul", "Add", "Relu", "MatMul", "Add"]
    assert region.has_nonlinearity
    assert not region.residual
    assert region.geometry is None
    assert region.sites == ("h", "k")
    assert (region.u_shape, region.v_shape) == (("N", 8), ("N", 4))
    assert check_geometry(model, region, RUNTIME).passed


def test_all_spans_of_a_deep_net_up_to_max_ops():
    body = " ".join(f"h{i} = Gemm(r{i - 1}, w) r{i} = Relu(h{i})" for i in range(1, 6)).replace("r0", "x")
    model = build(f"{body} y = Identity(r5)", {"w": (8, 8)}, x="float[N,8] x", y="float[N,8] y")
    spans = {(r.u, r.v): r.linear_ops for r in find_regions(model)[0]}
    tensors = ["x", "r1", "r2", "r3", "r4"]
    expected = {(tensors[i], f"h{j}"): j - i for i in range(5) for j in range(i + 2, 6)}
    assert spans == expected
    assert {r.linear_ops for r in found(model, max_ops=3).values()} == {2, 3}


def test_u_is_not_between_an_operator_and_its_normalisation_and_dropout_is_passed_over():
    model = build(
        """c = Conv<pads=[1,1,1,1]>(x, w1) n = BatchNormalization(c, s, s, s, s) r = Relu(n) d = Dropout(r)
           i = Identity(d) e = Conv(i, w2) m = BatchNormalization(e, s, s, s, s) t = Relu(m) f = Conv(t, w2)
           y = Relu(f)""",
        {"w1": (4, 3, 3, 3), "w2": (4, 4, 3, 3), "s": np.ones(4, np.float32)},
    )
    regions = found(model)
    assert set(regions) == {("x", "m"), ("x", "f"), ("r", "f")}
    assert ops(regions["r", "f"]) == ["Dropout", "Identity", "Conv", "BatchNormalization", "Relu", "Conv"]
    assert regions["x", "m"].geometry is not None
    assert (regions["x", "m"].geometry.kernel, regions["x", "m"].geometry.pads) == ((5, 5), (1, 1, 1, 1))


@pytest.mark.parametrize(("axes", "x"), [(1, "N,3,L"), (2, "N,3,H,W"), (3, "N,3,D,H,W")])
def test_conv_conv_in_any_dimension(axes, x):
    kernel, twos = (3,) * axes, [2] * axes
    model = build(
        f"""c = Conv<pads={[1] * 2 * axes}>(x, w1) r = LeakyRelu(c)
            p = MaxPool<kernel_shape={twos}, strides={twos}>(r)
            d = Conv<group=2, dilations={twos}>(p, w2) y = Relu(d)""",
        {"w1": (4, 3, *kernel), "w2": (6, 2, *kernel)},
        x=f"float[{x}] x",
        y="float[" + ",".join("ABCDE"[: axes + 2]) + "] y",
    )
    region = only(model)
    assert region.geometry is not None
    # 3, then pooling of 2: 4, then a dilated 5 at stride 2: 4 + 4 * 2.
    assert (region.geometry.kernel, region.geometry.strides) == ((12,) * axes, (2,) * axes)
    assert region.geometry.pads == (1,) * 2 * axes
    check = check_geometry(model, region, RUNTIME)
    assert check.passed, check
    assert len(check.sizes) > 2


def test_conv_dense_is_flattened():
    body = """c = Conv(x, w1) r = Relu(c) p = Transpose<perm=[0,2,3,1]>(r) f = Flatten(p) g = Gemm(f, w2, b)
              y = Relu(g)"""
    weights = {"w1": (4, 3, 3, 3), "w2": (64, 5), "b": (5,)}
    model = build(body, weights, x="float[N,3,6,6] x", y="float[N,5] y")
    region = only(model)
    assert (region.kind, region.in_features, region.out_features) == ("flatten", 108, 5)
    assert check_geometry(model, region, RUNTIME).passed
    # With a size that may change there is nothing fixed to flatten.
    why = reasons(build(body, weights, x="float[N,3,H,6] x", y="float[N,5] y"))
    assert "dynamic size" in why["g"]


@pytest.mark.parametrize("target", [(0, -1), (-1, 64), (0, 64)])
def test_reshape_flattens_too(target):
    model = build(
        "c = Conv(x, w1) r = Relu(c) f = Reshape(r, t) g = Gemm(f, w2) y = Relu(g)",
        {"w1": (4, 3, 3, 3), "w2": (64, 5), "t": ints(*target)},
        x="float[N,3,6,6] x",
        y="float[N,5] y",
    )
    assert only(model).kind == "flatten"


def test_reshape_that_moves_samples_is_refused():
    model = build(
        "c = Conv(x, w1) r = Relu(c) f = Reshape(r, t) g = Gemm(f, w2) y = Relu(g)",
        {"w1": (4, 3, 3, 3), "w2": (32, 5), "t": ints(-1, 32)},
        x="float[N,3,6,6] x",
        y="float[M,5] y",
    )
    assert "batch axis is not certain" in reasons(model)["c"]


RESIDUAL = """c1 = Conv<pads=[1,1,1,1]>(u, w) n1 = BatchNormalization(c1, s, s, s, s) r1 = Relu(n1)
              c2 = Conv<pads=[1,1,1,1]>(r1, w) a = Add(c2, u) y = Relu(a)"""


def test_residual_block_with_and_without_its_skip():
    model = build("u = Relu(x) " + RESIDUAL, {"w": (3, 3, 3, 3), "s": np.ones(3, np.float32)})
    regions = found(model)
    assert set(regions) == {("u", "c2"), ("u", "a")}
    block, branch = regions["u", "a"], regions["u", "c2"]
    assert block.residual
    assert not branch.residual
    assert ops(block) == ["Conv", "BatchNormalization", "Relu", "Conv", "Add"]
    assert block.geometry == branch.geometry
    assert describe_region(block) == "c1..c2 (2 Conv, skip) 3->3 s1 rf5"
    assert describe_region(branch) == "c1..c2 (2 Conv) 3->3 s1 rf5"


def test_residual_sum_that_starts_with_the_normalisation():
    """Pre-activation blocks: u is read by a BatchNorm and by the sum."""
    model = build(
        """v = Conv(x, w1) n = BatchNormalization(v, s, s, s, s) r = Relu(n) c = Conv<pads=[1,1,1,1]>(r, w)
           q = Relu(c) d = Conv<pads=[1,1,1,1]>(q, w) a = Add(v, d) y = Relu(a)""",
        {"w1": (4, 3, 1, 1), "w": (4, 4, 3, 3), "s": np.ones(4, np.float32)},
    )
    assert set(found(model)) == {("x", "a"), ("v", "a"), ("r", "d")}


@pytest.mark.parametrize(
    ("shortcut", "weights"),
    [
        ("s = Conv<strides=[2,2]>(u, ws)", {"ws": (6, 3, 1, 1)}),
        (
            """z1 = Slice(u, i0, far, two, i2) z = Slice(z1, i0, far, three, i2)
               k = Constant<value_ints=[2]>() o = ConstantOfShape<value = int64[1] {0}>(k)
               p = Concat<axis=0>(lead, o) m = Constant<value_ints=[-1,2]>() q = Reshape(p, m)
               e = Transpose<perm=[1,0]>(q) l = Constant<value_ints=[-1]>() h = Reshape(e, l)
               g = Cast<to=7>(h) s = Pad(z, g)""",
            {
                "i0": ints(0),
                "far": ints(2**63 - 1),
                "two": ints(2),
                "three": ints(3),
                "i2": ints(2),
                # Pairs (begin, end), of no use to Pad before they are transposed: channels get 1 and 2.
                "lead": ints(0, 0, 1, 2, 0, 0),
            },
        ),
        ("z = AveragePool<kernel_shape=[2,2], strides=[2,2]>(u) s = Conv(z, ws)", {"ws": (6, 3, 1, 1)}),
    ],
    ids=["projection", "slice and pad", "pool and projection"],
)
def test_downsampling_blocks(shortcut, weights):
    model = build(
        f"""u = Relu(x) c1 = Conv<pads=[1,1,1,1], strides=[2,2]>(u, w1) r1 = Relu(c1)
            c2 = Conv<pads=[1,1,1,1]>(r1, w2) {shortcut} a = Add(c2, s) y = Relu(a)""",
        {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), **weights},
        x="float[N,3,32,32] x" if "AveragePool" in shortcut else "float[N,3,H,W] x",
    )
    regions = found(model)
    assert set(regions) == {("u", "c2"), ("u", "a")}
    block = regions["u", "a"]
    assert block.residual
    assert (block.in_features, block.out_features) == (3, 6)
    assert block.geometry is not None
    assert (block.geometry.kernel, block.geometry.strides) == ((7, 7), (2, 2))
    assert block.geometry.pads[:2] == (3, 3)
    check = check_geometry(model, block, RUNTIME)
    assert check.passed, check


@pytest.mark.parametrize(
    ("activation", "weights"),
    [
        ("p = Add(c, three) q = Clip(p, zero, six) m = Mul(c, q) r = Div(m, six)", {}),
        ("q = Sigmoid(c) r = Mul(q, c)", {}),
        ("p = Div(c, two) q = Erf(p) o = Add(q, one) m = Mul(c, o) r = Mul(m, half)", {}),
        ("r = PRelu(c, slope)", {"slope": (4, 1, 1)}),
        ("p = Greater(c, zero) r = Where(p, c, zero)", {}),
        ("p = Split<axis=1>(c, twice) q = Tanh(p) r = Concat<axis=1>(q, b)", None),
    ],
)
def test_decomposed_activations_are_inside_and_no_entrance(activation, weights):
    scalars = {"zero": 0, "one": 1, "two": 2, "three": 3, "six": 6, "half": 0.5}
    if weights is None:
        activation = "p, b = Split<axis=1>(c, twice) q = Tanh(p) r = Concat<axis=1>(q, b)"
        weights = {"twice": ints(2, 2)}
    used = {k: np.array(v, np.float32) for k, v in scalars.items() if k in activation}
    model = build(
        f"c = Conv(x, w1) {activation} d = Conv(r, w2) y = Relu(d)",
        {"w1": (4, 3, 3, 3), "w2": (4, 4, 1, 1), **used, **weights},
    )
    region = only(model)
    assert (region.u, region.v) == ("x", "d")
    assert region.has_nonlinearity
    assert not region.residual
    check = check_geometry(model, region, RUNTIME)
    assert check.passed, check


def test_scale_and_shift_after_an_operator_belong_to_it():
    model = build(
        """c = Conv(x, w1) m = Mul(g, c) a = Add(m, g) r = Relu(a) d = Conv(r, w2) n = Div(d, g) o = Sub(g, n)
           y = Relu(o)""",
        {"w1": (4, 3, 3, 3), "w2": (4, 4, 3, 3), "g": (4, 1, 1)},
    )
    assert only(model).v == "o"


def test_u_may_be_used_elsewhere_and_branches_fail_by_themselves():
    model = build(
        """u = Relu(x) c = Conv<pads=[1,1,1,1]>(u, w) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w) e = Relu(d)
           k = Concat<axis=1>(e, u) up = ConvTranspose<strides=[2,2]>(u, wt) y = Conv(k, w2) z = Relu(up)""",
        {"w": (3, 3, 3, 3), "w2": (4, 6, 1, 1), "wt": (3, 3, 2, 2)},
        y="float[A,B,C,D] y, float[E,F,G,I] z",
    )
    assert set(found(model)) == {("u", "d"), ("u", "y")}


def test_inception_block_unites_receptive_fields():
    model = build(
        """u = Relu(x) a = Conv(u, w1) b0 = Conv(u, w1) b1 = Relu(b0) b = Conv<pads=[2,2,2,2]>(b1, w5)
           m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(u) k = Concat<axis=1>(a, b, m) r = Relu(k)
           c = Conv(r, w9) y = Relu(c)""",
        {"w1": (3, 3, 1, 1), "w5": (3, 3, 5, 5), "w9": (4, 9, 1, 1)},
    )
    block = found(model)["u", "c"]
    assert block.geometry is not None
    assert (block.geometry.kernel, block.geometry.pads) == ((5, 5), (2, 2, 2, 2))
    assert (block.linear_ops, block.out_features) == (4, 4)


def test_channels_last_and_added_axes_are_followed():
    """A ConvNeXt-like block, and a 1-D convolution dressed as 2-D, as exporters write them."""
    block = build(
        """u = Relu(x) c = Conv<pads=[3,3,3,3], group=3>(u, w7) t = Transpose<perm=[0,2,3,1]>(c)
           n = LayerNormalization(t, s, s) h = MatMul(n, w1) g = Sigmoid(h) k = MatMul(g, w2) b = Add(k, s)
           p = Transpose<perm=[0,3,1,2]>(b) a = Add(u, p) y = Relu(a)""",
        {"w7": (3, 1, 7, 7), "w1": (3, 12), "w2": (12, 3), "s": (3,)},
    )
    regions = found(block)
    assert {k: r.kind for k, r in regions.items() if r.geometry} == {("u", "p"): "conv", ("u", "a"): "conv"}
    assert regions["u", "a"].geometry == regions["u", "p"].geometry
    assert regions["u", "a"].geometry.kernel == (7, 7)
    # Inside, channels-last, the MLP is a per-token region of its own.
    assert regions["n", "b"].kind == "token"
    for region in regions.values():
        assert check_geometry(block, region, RUNTIME).passed

    line = build(
        """e = Unsqueeze(x, two) c = Conv<pads=[0,1,0,1], strides=[1,2]>(e, w1) s = Squeeze(c, two)
           r = Relu(s) f = Unsqueeze(r, two) d = Conv(f, w2) g = Squeeze(d, two) y = Relu(g)""",
        {"w1": (4, 3, 1, 3), "w2": (4, 4, 1, 3), "two": ints(2)},
        x="float[N,3,L] x",
        y="float[A,B,C] y",
    )
    region = only(line)
    assert (region.u, region.v) == ("e", "d")
    assert region.geometry is not None
    assert (region.geometry.kernel, region.geometry.strides) == ((1, 7), (1, 2))
    assert region.geometry.pads == (0, 1, 0, 1)
    assert check_geometry(line, region, RUNTIME).passed


def test_weights_in_any_form():
    model = build(
        """w1 = Constant<value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>() t = Transpose(w2)
           h = MatMul(x, w1) r = Relu(h) k = MatMul(r, t) y = Relu(k)""",
        {"w2": (2, 4)},
        x="float[N,4] x, float[2,4] w2",
        y="float[N,2] y",
    )
    assert (only(model).u, only(model).out_features) == ("x", 2)


# Tokens -------------------------------------------------------------------------------------------

ATTENTION = """q0 = MatMul(n, wq) k0 = MatMul(n, wk) v0 = MatMul(n, wv) q1 = Reshape(q0, split)
    k1 = Reshape(k0, split) v1 = Reshape(v0, split) q = Transpose<perm=[0,2,1,3]>(q1)
    k = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1) s = MatMul(q, k) m = {masked}
    p = Softmax<axis=-1>(m) o = MatMul(p, v) o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, whole)
    o3 = MatMul(o2, wo) o4 = Add(o3, b)"""
ATTENTION_WEIGHTS = {
    **dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8)),
    "b": (8,),
    "split": ints(0, 0, 2, 4),
    "whole": ints(0, 0, 8),
}
MLP = "f = MatMul({n}, w1) g = Gelu(f) h = MatMul(g, w2)"


def test_mlp_attention_and_layer_of_a_transformer():
    model = build(
        f"""n = LayerNormalization(x, b, b) {ATTENTION.format(masked="Add(s, bias)")} a = Add(x, o4)
            n2 = LayerNormalization(a, b, b) {MLP.format(n="n2")} z = Add(h, a) y = Tanh(z)""",
        {**ATTENTION_WEIGHTS, "w1": (8, 32), "w2": (32, 8)},
        x="float[N,T,8] x, float[N,1,1,T] mask, float[N,1,1,T] bias",
        y="float[A,B,C] y",
        opset=20,
    )
    regions = found(model)
    expected = {
        ("n", "o4"): (4, False),
        ("x", "a"): (4, True),
        ("x", "z"): (6, True),
        ("n2", "h"): (2, False),
        ("a", "z"): (2, True),
    }
    assert {k: (r.linear_ops, r.residual) for k, r in regions.items()} == expected
    assert {r.kind for r in regions.values()} == {"token"}
    assert regions["x", "z"].sides == ("bias",)
    assert regions["n2", "h"].sides == ()
    feed = {
        "x": np.ones((2, 5, 8), np.float32),
        "mask": np.ones((2, 1, 1, 5), np.float32),
        "bias": np.ones((2, 1, 1, 5), np.float32),
    }
    for region in regions.values():
        check = check_geometry(model, region, RUNTIME, [feed])
        assert check.passed, check
    assert not check_geometry(model, regions["x", "z"], RUNTIME).passed  # the mask is missing


def test_data_from_outside_may_be_a_mask_and_nothing_else():
    model = build(
        f"{ATTENTION.format(masked='Identity(s)')} y = Tanh(o4)".replace(
            "v0 = MatMul(n, wv)", "v0 = MatMul(other, wv)"
        ),
        ATTENTION_WEIGHTS,
        x="float[N,T,8] n, float[N,T,8] other",
        y="float[A,B,C] y",
    )
    why = reasons(model)
    assert "'v' enters from outside" in why["q0"]
    assert "enters from outside" in why["v0"]


def test_decomposed_layer_norm_and_gelu_inside():
    model = build(
        """u = Tanh(x) m = ReduceMean<axes=[-1]>(u) d = Sub(u, m) e = Pow(d, two) v = ReduceMean<axes=[-1]>(e)
           f = Add(v, eps) s = Sqrt(f) n0 = Div(d, s) n1 = Mul(n0, g) n = Add(n1, g)
           h = MatMul(n, w1) k = Mul(h, h) i = Mul(k, h) j = Add(h, i) t = Tanh(j) o = Mul(h, t)
           p = MatMul(o, w2) a = Add(u, p) y = Relu(a)""",
        {
            "two": np.array(2, np.float32),
            "eps": np.array(1e-5, np.float32),
            "g": (8,),
            "w1": (8, 16),
            "w2": (16, 8),
        },
        x="float[N,T,8] x",
        y="float[N,T,8] y",
    )
    regions = found(model)
    assert set(regions) == {("n", "p"), ("u", "a")}
    assert not regions["n", "p"].residual  # h + h^3 is part of an activation
    assert regions["u", "a"].residual


def test_tokens_moved_to_other_axes_are_refused():
    body = "h = MatMul(x, w) t = Transpose<perm=[1,0,2]>(h) r = Relu(t) k = MatMul(r, w) y = Relu(k)"
    model = build(body, {"w": (8, 8)}, x="float[N,T,8] x", y="float[A,B,C] y")
    assert "leading axes" in reasons(model)["h"]
    # Not refused for good: a second Transpose puts them back.
    back = build(
        body.replace("k = MatMul(r, w)", "b = Transpose<perm=[1,0,2]>(r) k = MatMul(b, w)"),
        {"w": (8, 8)},
        x="float[N,T,8] x",
        y="float[A,B,C] y",
    )
    assert only(back).v == "k"


def test_a_picked_token_is_refused():
    model = build(
        "h = MatMul(x, w) r = Relu(h) t = Gather<axis=1>(r, i) k = MatMul(t, w) y = Relu(k)",
        {"w": (8, 8), "i": np.array(0, np.int64)},
        x="float[N,T,8] x",
        y="float[A,C] y",
    )
    assert "leading axes" in reasons(model)["h"]


# Refusals -----------------------------------------------------------------------------------------

PAIR = "c = Conv<pads=[1,1,1,1]>(x, w) {middle} d = Conv(r, w) y = Relu(d)"


@pytest.mark.parametrize(
    ("middle", "weights", "reason"),
    [
        ("r = ConvTranspose(c, w)", {}, "enlarges"),
        ("r = Resize(c, , scales)", {"scales": np.array([1, 1, 2, 2], np.float32)}, "enlarges"),
        ("g = GlobalAveragePool(c) s = Sigmoid(g) r = Mul(c, s)", {}, "takes in the whole image"),
        ("g = ReduceMean<axes=[2,3]>(c) r = Sub(c, g)", {}, "takes in the whole image"),
        ("r = InstanceNormalization(c, s, s)", {"s": (3,)}, "takes in the whole image"),
        ("r = Softmax<axis=3>(c)", {}, "takes in the whole image"),
        ("r = Transpose<perm=[0,1,3,2]>(c)", {}, "in another order"),
        ("r = Transpose<perm=[0,2,1,3]>(c)", {}, "not laid out"),
        ("r = CumSum(c, two)", {"two": np.array(2, np.int64)}, "no rule for operator CumSum"),
        ("r = Mul(c, x2)", {}, "'x2' enters from outside"),
        ("r = Mul(c, map)", {"map": (1, 1, 7, 1)}, None),
        ('r = MaxPool<kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER">(c)', {}, "dynamic"),
        (
            "t = Relu(c) e = AveragePool<kernel_shape=[2,2], strides=[2,2]>(c) r = Add(t, e)",
            {},
            "strides 1 and 2",
        ),
        ("t = Conv(c, w) r = Add(t, c)", {}, "different sizes"),
        ("r = BatchNormalization<training_mode=1>(c, s, s, s, s)", {"s": (3,)}, "training mode"),
        ("r, i = MaxPool<kernel_shape=[1,1]>(c) j = Cast<to=1>(i) k = Relu(j)", {}, "its output 'i' is used"),
        (
            "r = Slice(c, last, far, two)",
            {"last": ints(-9), "far": ints(2**62), "two": ints(2)},
            "dynamic axis",
        ),
        ("r = Slice(c, zero, one, zero)", {"zero": ints(0), "one": ints(1)}, "Slice of the batch axis"),
        ("r = Concat<axis=0>(c, c)", {}, "batch axis"),
        ("r = Transpose<perm=[1,0,2,3]>(c)", {}, "moves the batch axis"),
        ("m = ReduceMean<axes=[0]>(c) r = Sub(c, m)", {}, "over the batch axis"),
        ("e = Unsqueeze(c, zero) r = Squeeze(e, zero)", {"zero": ints(0)}, "before the batch axis"),
        (
            "e = Unsqueeze(c, two) f = Conv<pads=[1,0,0,1,0,0]>(e, w5) r = ReduceMax<axes=[2]>(f)",
            {"two": ints(2), "w5": (3, 3, 1, 1, 1)},
            "changes an axis of size 1",
        ),
        ("r = Concat<axis=2>(c, c)", {}, "along a spatial axis"),
    ],
)
def test_refusals_say_why(middle, weights, reason):
    model = build(
        PAIR.format(middle=middle),
        {"w": (3, 3, 3, 3), **weights},
        x="float[N,3,H,W] x, float[N,3,H,W] x2",
    )
    if reason is None:  # a constant over positions changes no size: the fit has to cope
        assert only(model).v == "d"
        return
    why = reasons(model)
    assert reason in why["c"], why


def test_global_context_is_refused_at_a_fixed_size_too():
    """A dense operator on the flattened u could see it all, but would not give a feature map."""
    body = PAIR.format(middle="g = GlobalAveragePool(c) s = Sigmoid(g) r = Mul(c, s)")
    model = build(body, {"w": (3, 3, 3, 3)}, x="float[N,3,9,9] x")
    assert "takes in the whole image" in reasons(model)["c"]


def test_gemm_as_it_may_and_may_not_be():
    body = "h = Gemm<transB=1>(x, w1) r = Relu(h) k = Gemm{}(r, w2{}) y = Relu(k)"
    weights = {"w1": (8, 5), "w2": (8, 8)}

    def dense(*details: str) -> Model:
        return build(body.format(*details), weights, x="float[8,5] x", y="float[8,8] y")

    region = only(dense("", ""))
    assert (region.in_features, region.out_features) == (5, 8)
    assert "transposes its input" in reasons(dense("<transA=1>", ""))["h"]
    assert "parameters depend on the data" in reasons(dense("", ", h"))["h"]


def test_axes_that_change_places_and_come_back():
    model = build(
        """c = Conv(x, wide) t = Transpose<perm=[0,1,3,2]>(c) r = Relu(t) d = Conv(r, wide)
           v = Transpose<perm=[0,1,3,2]>(d) y = Relu(v)""",
        {"wide": (3, 3, 1, 5)},
    )
    region = found(model)["x", "v"]
    assert region.geometry is not None
    assert region.geometry.kernel == (5, 5)
    lopsided = build(
        """t = Transpose<perm=[0,1,3,2]>(x) r = Relu(t) c = Conv(r, wide) q = Relu(c)
           b = Transpose<perm=[0,1,3,2]>(q) d = Conv(b, wide) p = Transpose<perm=[0,1,3,2]>(d) y = Relu(p)""",
        {"wide": (3, 3, 1, 5)},
    )
    region = found(lopsided)["r", "p"]
    assert region.geometry is not None
    assert region.geometry.kernel == (5, 5)
    check = check_geometry(lopsided, region, RUNTIME)
    assert check.passed, check


def test_a_product_of_branches_is_no_residual_sum():
    model = build(
        """u = Relu(x) a = Conv(u, w) b = Conv(u, w) s = Sigmoid(b) m = Mul(a, s) d = Conv(m, w)
           y = Relu(d)""",
        {"w": (3, 3, 3, 3)},
    )
    region = only(model)
    assert (region.linear_ops, region.residual, region.has_nonlinearity) == (3, False, True)


def test_same_padding_and_ceil_mode_on_fixed_sizes():
    body = PAIR.format(
        middle="""p = MaxPool<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(c)
                  r = AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(p)"""
    )
    for size in (21, 22, 23, 24):
        model = build(body, {"w": (3, 3, 3, 3)}, x=f"float[N,3,{size},{size}] x")
        check = check_geometry(model, only(model), RUNTIME)
        assert check.passed, check


def test_inner_outputs_and_captured_tensors_end_a_region():
    body = PAIR.format(middle="r = Relu(c)")
    inner = build(body, {"w": (3, 3, 3, 3)}, y="float[A,B,C,D] y, float[E,F,G,I] r")
    assert "'r' is an output of the graph" in reasons(inner)["c"]
    # The same beside a branch that goes on.
    beside = build(
        body + " o = Conv(x, w) p = Relu(o) q = Relu(p) s = Relu(q) t = Conv(s, w) z = Relu(t)",
        {"w": (3, 3, 3, 3)},
        y="float[A,B,C,D] y, float[E,F,G,I] r, float[J,K,L,M] z",
    )
    assert only(beside).v == "t"

    branch = helper.make_graph(
        [helper.make_node("Neg", ["r"], ["z1"])],
        "then",
        [],
        [helper.make_tensor_value_info("z1", TensorProto.FLOAT, None)],
    )
    proto = build(body, {"w": (3, 3, 3, 3)}, x="float[N,3,H,W] x, bool flag").to_proto()
    proto.graph.node.append(helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    assert "used by the body of another node" in reasons(Model.load(proto))["c"]


def test_shape_computations_of_inner_tensors_stay_inside_or_end_the_region():
    body = """h = MatMul(x, w) r = Relu(h) s = Shape(r) p = Reshape(r, s) k = MatMul(p, w) y = Relu(k)"""
    model = build(body, {"w": (8, 8)}, x="float[N,T,8] x", y="float[N,T,8] y")
    region = found(model)["x", "k"]
    assert ops(region) == ["MatMul", "Relu", "Shape", "Reshape", "MatMul"]
    assert check_geometry(model, region, RUNTIME).passed

    leaking = build(
        body + " z = ConstantOfShape(s)",
        {"w": (8, 8)},
        x="float[N,T,8] x",
        y="float[N,T,8] y, float[A,B,C] z",
    )
    assert ("x", "k") not in found(leaking)


def test_every_linear_operator_left_over_is_named_once():
    model = build(
        """e = Gather(table, ids) h = Gemm(e, w) r = Relu(h) c = CumSum(r, one) k = Gemm(c, w) y = Relu(k)
           i = Cast<to=7>(y)""",
        {"table": (9, 8), "w": (8, 8), "one": np.array(1, np.int64)},
        x="int64[N] ids",
        y="float[N,8] y",
    )
    regions, skips = find_regions(model)
    assert not regions
    assert [s.nodes for s in skips] == [("h",), ("k",)]
    assert all(s.reason for s in skips)


# Numbers ------------------------------------------------------------------------------------------


@st.composite
def chains(draw, padded: bool):
    """Affine operators one after another, some of them branching and meeting again."""
    body, weights, tensor = [], {}, "x"
    for i in range(draw(st.integers(2, 4))):
        kinds = ["conv", "branch", "average", "scale", *(["crop"] if padded else [])]
        kind = draw(st.sampled_from(kinds if i else kinds[:2]))  # regions begin at an operator or a branch
        out = f"t{i}"
        k, s = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        b, e = (draw(st.integers(0, 2)), draw(st.integers(0, 2))) if padded else (0, 0)
        if kind == "conv":
            d = draw(st.integers(1, 2))
            weights[f"w{i}"] = (2, 2, k)
            body.append(f"{out} = Conv<strides=[{s}], dilations=[{d}], pads=[{b},{e}]>({tensor}, w{i})")
        elif kind == "average":
            b, e = min(b, k - 1), min(e, k - 1)
            body.append(f"{out} = AveragePool<kernel_shape=[{k}], strides=[{s}], pads=[{b},{e}]>({tensor})")
        elif kind == "scale":
            weights[f"g{i}"] = (2, 1)
            body.append(f"{out} = Mul({tensor}, g{i})")
        elif kind == "crop":
            weights |= {f"a{i}": ints(b), f"z{i}": ints(-e or 2**62), f"two{i}": ints(2), f"s{i}": ints(s)}
            body.append(f"{out} = Slice({tensor}, a{i}, z{i}, two{i}, s{i})")
        else:
            # Equal sizes for every input: the second branch is a cropped, or padded, 1-tap one.
            weights |= {f"w{i}": (2, 2, k), f"v{i}": (2, 2, 1)}
            crop = k - 1 - b - e
            left = draw(st.integers(min(0, crop), max(0, crop)))
            weights |= {f"p{i}": ints(0, 0, -left, 0, 0, left - crop)}
            body.append(
                f"p{i}x = Pad({tensor}, p{i}) q{i} = Conv(p{i}x, v{i}) "
                f"r{i} = Conv<pads=[{b},{e}]>({tensor}, w{i}) {out} = Add(q{i}, r{i})"
            )
        tensor = out
    weights["last"] = (3, 2, 1)
    body.append(f"v = Conv({tensor}, last) y = Relu(v)")
    return body, weights


def run(model: Model, region: Region, x: np.ndarray) -> np.ndarray:
    return RUNTIME.session(model.extract([region.u], [region.v])).run({region.u: x})[region.v]


def chain_region(chain: tuple[list[str], Weights]) -> tuple[Model, Region]:
    body, weights = chain
    model = build(" ".join(body), weights, x="float[N,2,L] x", y="float[A,B,C] y")
    return model, found(model, max_ops=12)["x", "v"]


@settings(max_examples=40, deadline=None)
@given(chains(padded=False), st.integers(0, 6))
def test_unpadded_affine_regions_are_exactly_the_convolution_found(chain, extra):
    """Impulses on one receptive field give the only possible weights; they hold everywhere, at any size."""
    model, region = chain_region(chain)
    assert not region.has_nonlinearity
    geometry = region.geometry
    assert geometry is not None
    (kernel,), (stride,) = geometry.kernel, geometry.strides
    if kernel > 60:
        return
    zero = run(model, region, np.zeros((1, 2, kernel), np.float32))
    assert zero.shape == (1, 3, 1)
    impulses = np.eye(2 * kernel, dtype=np.float32).reshape(2 * kernel, 2, kernel)
    answers = run(model, region, impulses)[:, :, 0]
    weight = (answers - zero[:, :, 0]).T.reshape(3, 2, kernel)
    x = np.random.default_rng(1).standard_normal((2, 2, kernel + stride + extra)).astype(np.float32)
    wanted = run(model, region, x)
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=2)[:, :, ::stride]
    got = np.einsum("ocp,nclp->nol", weight.astype(np.float64), windows) + zero
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * max(1, np.abs(wanted).max()))


@settings(max_examples=40, deadline=None)
@given(chains(padded=True))
def test_padded_regions_keep_their_size_and_read_their_window(chain):
    model, region = chain_region(chain)
    geometry = region.geometry
    assert geometry is not None
    inner = [node.outputs[0].name for node in region.nodes]
    session = RUNTIME.session(model.extract([region.u], [region.v]), taps=inner)
    (axis,) = geometry.axes
    for n in range(8, 30):
        try:
            tensors = session.run({"x": np.zeros((1, 2, n), np.float32)})
        except Exception:
            continue  # too small for some operator inside
        if any(tensor.size == 0 for tensor in tensors.values()):
            continue  # a Slice left nothing of it
        base = tensors["v"]
        assert base.shape[2] == axis.size(n)
        if n % 7:
            continue
        impulses = np.zeros((n, 2, n), np.float32)
        impulses[np.arange(n), :, np.arange(n)] = 1
        touched = np.abs(session.run({"x": impulses})["v"] - base).max(axis=1) > 1e-6
        for tap, position in zip(*np.nonzero(touched), strict=True):
            first = position * axis.stride - axis.begin
            assert first <= tap < first + axis.kernel


def test_check_geometry_catches_a_wrong_geometry():
    model = build(PAIR.format(middle="r = Relu(c)"), {"w": (3, 3, 3, 3)})
    region = only(model)
    assert check_geometry(model, region, RUNTIME).passed
    geometry = region.geometry
    assert geometry is not None
    for change in ({"pads": (1, 1, 2, 1)}, {"strides": (1, 2)}, {"kernel": (5, 4)}):
        wrong = dataclasses.replace(region, geometry=dataclasses.replace(geometry, **change))
        check = check_geometry(model, wrong, RUNTIME)
        assert not check.passed
        assert "gives 'd' of" in (check.reason or "")
    for change in ({"out_features": 4}, {"in_features": 4}):
        assert not check_geometry(model, dataclasses.replace(region, **change), RUNTIME).passed
    assert "no kernel" in (check_geometry(model, region, RUNTIME, kernels=[1]).reason or "")


# Size ---------------------------------------------------------------------------------------------


def long_model(nodes: int) -> Model:
    body = []
    tensor = "x"
    for i in range(nodes // 5):
        body.append(
            f"a{i} = Conv({tensor}, w) b{i} = Relu(a{i}) c{i} = Conv(b{i}, w) d{i} = Add(c{i}, {tensor}) "
            f"r{i} = Relu(d{i})"
        )
        tensor = f"r{i}"
    return build(f"{' '.join(body)} y = Identity({tensor})", {"w": (3, 3, 1, 1)})


def count_steps(monkeypatch: pytest.MonkeyPatch, model: Model) -> tuple[int, int]:
    """Regions found, and nodes looked at on the way."""
    steps = 0
    original = RegionGrowth.step

    def counted(self: Any, index: int) -> Any:
        nonlocal steps
        steps += 1
        return original(self, index)

    monkeypatch.setattr(RegionGrowth, "step", counted)
    count = len(find_regions(model)[0])
    monkeypatch.undo()
    return count, steps


def test_the_search_is_linear_in_the_number_of_nodes(monkeypatch):
    few, short = count_steps(monkeypatch, long_model(200))
    many, long = count_steps(monkeypatch, long_model(800))
    assert 3.5 < many / few < 4.5
    assert 3.5 < long / short < 4.5


def test_activations_alone_are_not_searched_far(monkeypatch):
    body = " ".join(f"s{i} = Sigmoid(x{i}) x{i + 1} = Mul(s{i}, x{i})" for i in range(200))
    model = build(f"x0 = Relu(x) {body} y = Relu(x200)", {})
    regions, steps = count_steps(monkeypatch, model)
    assert regions == 0
    assert steps <= 2 * len(model.nodes)


@pytest.mark.slow
def test_ten_thousand_nodes_take_seconds():
    model = long_model(10_000)
    shapes = model.shapes()
    start = time.perf_counter()
    regions, skips = find_regions(model, shapes)
    assert time.perf_counter() - start < 30
    assert len(regions) > 2000
    assert not skips


# Wild models --------------------------------------------------------------------------------------

SHARED = os.environ.get("ONNXFUSE_SHARED")


@pytest.mark.skipif(SHARED is None, reason="ONNXFUSE_SHARED is not set")
def test_the_blocks_of_a_resnet():
    model = Model.load(Path(SHARED or "") / "models" / "cifar_resnet32.onnx")
    regions = find_regions(model)[0]
    blocks = [r for r in regions if r.residual and r.linear_ops == 2 and r.kind == "conv"]
    assert len(blocks) == 15
    down = [r for r in blocks if r.geometry is not None and r.geometry.strides == (2, 2)]
    assert [(r.in_features, r.out_features) for r in down] == [(16, 32), (32, 64)]
    for region in blocks:
        check = check_geometry(model, region, RUNTIME)
        assert check.passed, check
