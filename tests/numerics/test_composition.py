"""compose.py against torch: two convolutions (or dense layers) in a row equal the composed one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxfuse.numerics.composition import ConvShape, border_reason, compose_conv, compose_dense, compose_shape

CONVS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


def convolve(x: np.ndarray, shape: ConvShape, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A padded convolution in float64, by torch; asymmetric pads go on explicitly."""
    axes = shape.axes
    pairs = [(shape.pads[a], shape.pads[axes + a]) for a in reversed(range(axes))]
    padded = torch.nn.functional.pad(torch.from_numpy(x), [p for pair in pairs for p in pair])
    result = CONVS[axes](
        padded,
        torch.from_numpy(weight),
        torch.from_numpy(bias),
        stride=shape.strides,
        dilation=shape.dilations,
        groups=shape.groups,
    )
    return result.numpy()


def conv_shape(kernel, strides=None, dilations=None, pads=None, groups=1) -> ConvShape:
    axes = len(kernel)
    ones = (1,) * axes
    return ConvShape(kernel, strides or ones, dilations or ones, pads or (0,) * 2 * axes, groups)


def pair_error(rng, first, second, channels, sizes, bias1=True) -> float:
    """Largest difference between the pair and its composition over inputs of several sizes."""
    c0, c1, c2 = channels
    w1 = rng.normal(size=(c1, c0 // first.groups, *first.kernel))
    w2 = rng.normal(size=(c2, c1 // second.groups, *second.kernel))
    b1, b2 = rng.normal(size=c1) * bias1, rng.normal(size=c2)
    shape, weight, bias = compose_conv(first, w1, b1, second, w2, b2)
    assert weight.shape == (c2, c0 // shape.groups, *shape.kernel)
    worst = 0.0
    for size in sizes:
        x = rng.normal(size=(2, c0, *size))
        expected = convolve(convolve(x, first, w1, b1), second, w2, b2)
        got = convolve(x, shape, weight, bias)
        assert got.shape == expected.shape
        worst = max(worst, float(np.abs(got - expected).max(initial=0.0) / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize("stride1", [1, 2])
@pytest.mark.parametrize("stride2", [1, 2])
@pytest.mark.parametrize("kernel1", [1, 2, 3])
@pytest.mark.parametrize("kernel2", [1, 2, 3])
def test_valid_second_conv_is_exact_for_odd_and_even_sizes(stride1, stride2, kernel1, kernel2):
    rng = np.random.default_rng(0)
    pad = kernel1 // 2
    first = conv_shape((kernel1,) * 2, (stride1,) * 2, pads=(pad, pad, pad, pad))
    second = conv_shape((kernel2,) * 2, (stride2,) * 2)
    sizes = [(n, m) for n in (11, 12) for m in (13, 14)]
    assert border_reason(first, second, np.ones(1)) is None
    assert pair_error(rng, first, second, (3, 4, 5), sizes) < 1e-12


def test_composed_geometry_is_the_one_derived_by_hand():
    first = conv_shape((3, 5), strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 4))
    second = conv_shape((2, 3), strides=(3, 2), dilations=(2, 1))
    composed = compose_shape(first, second)
    # Rows: taps {0,1,2} + {0,4}: span 6. Columns: taps {0,2,4,6,8} + {0,1,2}: span 10.
    assert composed == conv_shape((7, 11), strides=(6, 2), pads=(1, 2, 0, 4))


def test_taps_on_a_lattice_become_dilation():
    composed = compose_shape(conv_shape((3,), dilations=(2,)), conv_shape((3,), dilations=(4,)))
    assert composed == conv_shape((7,), dilations=(2,))
    strided = compose_shape(conv_shape((1,), strides=(2,)), conv_shape((3,)))
    assert strided == conv_shape((3,), strides=(2,), dilations=(2,))


def test_padded_second_conv_is_exact_behind_a_pointwise_conv_without_bias():
    rng = np.random.default_rng(1)
    first = conv_shape((1, 1), strides=(2, 1))
    second = conv_shape((3, 3), strides=(1, 2), pads=(1, 0, 2, 1))
    assert border_reason(first, second, np.zeros(4)) is None
    sizes = [(7, 8), (8, 7), (9, 9)]
    assert pair_error(rng, first, second, (3, 4, 5), sizes, bias1=False) < 1e-12


def test_padded_second_conv_is_exact_where_the_first_is_padded_in_full():
    rng = np.random.default_rng(6)
    first = conv_shape((3, 2), dilations=(1, 2), pads=(2, 2, 2, 2))
    second = conv_shape((3, 3), strides=(2, 1), pads=(2, 1, 0, 3))
    assert border_reason(first, second, np.zeros(4)) is None
    assert pair_error(rng, first, second, (2, 4, 3), [(6, 7), (7, 6)], bias1=False) < 1e-12
    strided = conv_shape((3,), strides=(3,), pads=(0, 2))
    padded = conv_shape((2,), pads=(1, 1))
    assert border_reason(strided, padded, np.zeros(4)) is None
    assert pair_error(rng, strided, padded, (2, 4, 3), [(n,) for n in range(5, 12)], bias1=False) < 1e-12


def test_separable_pair_is_exact_without_bias():
    rng = np.random.default_rng(2)
    first = conv_shape((1, 3), pads=(0, 1, 0, 1))
    second = conv_shape((3, 1), pads=(1, 0, 1, 0))
    assert border_reason(first, second, np.zeros(4)) is None
    assert pair_error(rng, first, second, (2, 4, 3), [(6, 7)], bias1=False) < 1e-12


@pytest.mark.parametrize(
    ("first", "second", "bias", "reason"),
    [
        (conv_shape((3,), pads=(1, 1)), conv_shape((3,), pads=(1, 1)), np.zeros(2), "differs at the border"),
        (conv_shape((3,)), conv_shape((3,), pads=(0, 1)), np.zeros(2), "differs at the border"),
        (conv_shape((3,), pads=(1, 2)), conv_shape((3,), pads=(1, 1)), np.zeros(2), "differs at the border"),
        (conv_shape((3,), pads=(2, 1)), conv_shape((3,), pads=(1, 1)), np.zeros(2), "differs at the border"),
        (conv_shape((1,)), conv_shape((3,), pads=(1, 1)), np.ones(2), "would have its bias"),
        (conv_shape((1,)), conv_shape((3,), pads=(-1, 0)), np.zeros(2), "negative pads"),
    ],
)
def test_border_cases_are_refused_and_really_differ(first, second, bias, reason):
    assert reason in str(border_reason(first, second, bias))
    if min(second.pads) >= 0:
        error = pair_error(np.random.default_rng(3), first, second, (2, 2, 2), [(9,)], bias1=bool(bias.any()))
        assert error > 1e-3


@pytest.mark.parametrize(
    ("groups1", "groups2", "groups"), [(2, 2, 2), (4, 2, 2), (1, 4, 1), (12, 12, 12), (6, 4, 2)]
)
def test_groups(groups1, groups2, groups):
    rng = np.random.default_rng(4)
    first = conv_shape((3, 3), (2, 1), pads=(1, 1, 1, 1), groups=groups1)
    second = conv_shape((2, 2), groups=groups2)
    assert compose_shape(first, second).groups == groups
    assert pair_error(rng, first, second, (12, 12, 24), [(8, 9)]) < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_pairs(data):
    axes = data.draw(st.integers(1, 3))
    ints = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    first = ConvShape(
        ints(1, 3), ints(1, 3), ints(1, 3), ints(0, 2) + ints(0, 2), data.draw(st.sampled_from([1, 2]))
    )
    second = ConvShape(
        ints(1, 3), ints(1, 2), ints(1, 2), (0,) * 2 * axes, data.draw(st.sampled_from([1, 2, 4]))
    )
    # The smallest input that leaves one output, and a little more.
    hidden = [(k - 1) * d + 1 for k, d in zip(second.kernel, second.dilations, strict=True)]
    least = [
        (h - 1) * s + (k - 1) * d + 1
        for h, s, k, d in zip(hidden, first.strides, first.kernel, first.dilations, strict=True)
    ]
    sizes = [
        tuple(n + extra for n in least)
        for extra in data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=2))
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    assert pair_error(rng, first, second, (2, 4, 4), sizes) < 1e-11


def test_dense():
    rng = np.random.default_rng(5)
    w1, b1, w2, b2 = (rng.normal(size=s) for s in ((4, 3), 4, (5, 4), 5))
    x = rng.normal(size=(7, 3))
    weight, bias = compose_dense((w1, b1), (w2, b2))
    np.testing.assert_allclose(x @ weight.T + bias, (x @ w1.T + b1) @ w2.T + b2, atol=1e-12)
