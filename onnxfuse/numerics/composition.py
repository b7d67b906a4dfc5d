"""Two affine operators with nothing between them are one: the numbers of that, without any graph.

    dense   W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)
    conv    a convolution whose taps are all sums of a tap of the first and one of the second (`compose_conv`)

The identity for convolutions holds for every input size, output size included, except where the second one
pads: it pads *hidden* positions with zero, while a single convolution sees there what the first would have
computed. `border_reason` says when the two coincide all the same. Everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ConvShape:
    """A Conv's attributes: per spatial axis kernel, stride, dilation and pads (begin..., end...); groups."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int = 1

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)


def compose_dense(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2), for weights (out, in) and biases (out,)."""
    return second[0] @ first[0], second[0] @ first[1] + second[1]


def border_reason(first: ConvShape, second: ConvShape, bias: np.ndarray) -> str | None:
    """Why second(first(x)) is not one convolution at the border, or None if it is one everywhere.

    The second convolution pads *hidden* positions with zero. One convolution has there what the first would
    have computed, which is zero if it adds no bias and sees nothing but padding. The hidden position before
    the first one covers inputs up to -s1 - p1 + d1(k1-1), which must be negative; the one after the last
    covers, in the worst case over input sizes n, inputs from n + p1' - d1(k1-1) on (p1' the end pad), which
    must not be below n.

    Args:
        first, second: the convolutions.
        bias: of the first one, (C1,).
    """
    axes = first.axes
    for axis in range(axes):
        begin, end = second.pads[axis], second.pads[axes + axis]
        span = (first.kernel[axis] - 1) * first.dilations[axis]
        if begin < 0 or end < 0:
            return "the second convolution has negative pads"
        sees_input = (begin and first.pads[axis] + first.strides[axis] <= span) or (
            end and first.pads[axes + axis] < span
        )
        if sees_input:
            return (
                "the second convolution pads what the first computes: one convolution differs at the border"
            )
        if (begin or end) and np.any(bias):
            return "the second convolution pads with zeros where the first would have its bias"
    return None


def compose_shape(first: ConvShape, second: ConvShape) -> ConvShape:
    """The convolution that equals second(first(x)) (see `compose_conv`), where `border_reason` has no
    objection.
    """
    kernel, strides, dilations, begin, end = [], [], [], [], []
    axes = first.axes
    for axis in range(axes):
        step1 = first.dilations[axis]
        step2 = second.dilations[axis] * first.strides[axis]
        span1, span2 = (first.kernel[axis] - 1) * step1, (second.kernel[axis] - 1) * step2
        # Taps lie on the lattice that both steps generate; an axis with one tap has no step of its own.
        lattice = math.gcd(step1 if span1 else 0, step2 if span2 else 0) or 1
        kernel.append((span1 + span2) // lattice + 1)
        strides.append(first.strides[axis] * second.strides[axis])
        dilations.append(lattice)
        begin.append(first.pads[axis] + second.pads[axis] * first.strides[axis])
        end.append(first.pads[axes + axis] + second.pads[axes + axis] * first.strides[axis])
    return ConvShape(
        tuple(kernel),
        tuple(strides),
        tuple(dilations),
        (*begin, *end),
        math.gcd(first.groups, second.groups),
    )


def compose_conv(
    first: ConvShape,
    weight1: np.ndarray,
    bias1: np.ndarray,
    second: ConvShape,
    weight2: np.ndarray,
    bias2: np.ndarray,
) -> tuple[ConvShape, np.ndarray, np.ndarray]:
    """Shape, weight and bias of the one convolution that two in a row are.

    Per axis, with stride s, dilation d, begin pad p:
        h[q] = sum_t W1[t] x[q s1 + t d1 - p1],    y[r] = sum_u W2[u] h[r s2 + u d2 - p2]
             = sum_{t,u} W2[u] W1[t] x[r s1 s2 + (t d1 + u d2 s1) - (p1 + p2 s1)]
    so the stride is s1 s2, tap (t, u) sits at t d1 + u d2 s1, and the pad is p1 + p2 s1. With the same rule
    for the end pad the output size floor((floor((n + P1 - d1(k1-1) - 1) / s1) + P2 - d2(k2-1)) / s2) + 1 is
    that of the one convolution for every n, because floor((floor(a / s1) + m) / s2) = floor((a + m s1) /
    (s1 s2)). Groups: every group of either lies inside one of gcd(g1, g2) blocks of channels, so the result
    has that many.

    Args:
        first, second: the convolutions; `border_reason` must have no objection.
        weight1: (C1, C0/g1, *k1).
        bias1: (C1,).
        weight2: (C2, C1/g2, *k2).
        bias2: (C2,).
    """
    shape = compose_shape(first, second)
    w1 = _regroup(weight1, first.groups, shape.groups)
    w2 = _regroup(weight2, second.groups, shape.groups)
    blocks, inner = shape.groups, w1.shape[2]
    rows = w2.shape[1]
    result = np.zeros((blocks, rows, inner, *shape.kernel))
    flat1 = w1.reshape(blocks, w1.shape[1], -1)
    for tap in np.ndindex(*second.kernel):
        product = (w2[(slice(None),) * 3 + tap] @ flat1).reshape(blocks, rows, inner, *first.kernel)
        result[(slice(None),) * 3 + _placed(tap, first, second, shape)] += product
    hidden = bias1.reshape(blocks, -1, 1)
    pushed = w2.sum(axis=tuple(range(3, 3 + second.axes))) @ hidden
    return shape, result.reshape(blocks * rows, inner, *shape.kernel), pushed.reshape(-1) + bias2


def _placed(
    tap: tuple[int, ...], first: ConvShape, second: ConvShape, composed: ConvShape
) -> tuple[slice, ...]:
    """The part of the composed kernel that the first one fills, read through `tap` of the second."""
    slices = []
    for axis, index in enumerate(tap):
        lattice = composed.dilations[axis]
        start = index * second.dilations[axis] * first.strides[axis] // lattice
        step = max(first.dilations[axis] // lattice, 1)
        slices.append(slice(start, start + (first.kernel[axis] - 1) * step + 1, step))
    return tuple(slices)


def _regroup(weight: np.ndarray, groups: int, blocks: int) -> np.ndarray:
    """(out, in/groups, *k) as (blocks, out/blocks, in/blocks, *k), block-diagonal where groups > blocks."""
    out, inner, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    per, rows = groups // blocks, out // groups
    split = weight.reshape(blocks, per, rows, inner, *kernel)
    full = np.zeros((blocks, per, rows, per, inner, *kernel), dtype=np.float64)
    index = np.arange(per)
    full[:, index, :, index] = split.swapaxes(0, 1)
    return full.reshape(blocks, per * rows, per * inner, *kernel)
