"""Receptive-field arithmetic: what a path of convolutions, poolings, crops and pads amounts to.

One axis at a time. An operator on an axis of size n is four numbers: window k (dilation included), stride s,
pads b and e; its output at position p reads the inputs p s - b .. p s - b + k - 1, and there are

    out(n) = floor((n + b + e - k) / s) + 1

of them. Write slack a = b + e - k.

**Composition is exact.** Let (k1, s1, b1, e1) be followed by (k2, s2, b2, e2). Position p of the second reads
positions q = p s2 - b2 .. p s2 - b2 + k2 - 1 of the first, hence inputs from p s1 s2 - (b1 + b2 s1) on,
k1 + (k2 - 1) s1 of them. And floor((floor(x / s1) + m) / s2) = floor((x + m s1) / (s1 s2)) for any integer
m, so

    out2(out1(n)) = floor((floor((n + a1) / s1) + 1 + a2) / s2) + 1
                  = floor((n + a1 + s1 (1 + a2)) / (s1 s2)) + 1.

Both are the formulas of one operator (`WindowAxis.then`)

    k = k1 + (k2 - 1) s1,   s = s1 s2,   b = b1 + b2 s1,   e = e1 + e2 s1,

because b + e - k = a1 + s1 (b2 + e2 - k2 + 1). It holds for every n for which the path runs at all, whatever
the order of strides; a strided slice is an operator with k = 1, and a crop is a negative pad.

**Branches that meet** in an element-wise operator (`unite`) must have one stride; the window of the sum is
the union of both windows, at the places where they really are. Sizes agree for every n if the slacks are
equal. If the slacks differ by less than the stride, sizes agree for some n and the model fails for the
others, or broadcasts a branch of size 1 over a larger one: the larger slack is right in each case. If they
differ by more, sizes never agree.

**Any kernel size** (`WindowAxis.pads_for`). A fitted window k' of the same stride has the same output size
for every n if and only if its slack is the same (floor((n + a) / s) for all n determines a): b' + e' = a +
k'. The split is free; the best one has the window's center, (k' - 1) / 2 - b', on the center of the receptive
field, (k - 1) / 2 - b. A half-pixel mismatch (k - k' odd) goes to the smaller begin. Pads may not be
negative, so a field without padding has no smaller window than itself: that would need a crop as well.

The composed pads describe *where* windows lie, not the border's values: composing two padded convolutions
pads the inner tensor with zeros, not with what the first would compute there. A fit on real padded patches
absorbs that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WindowAxis:
    """One axis of an operator or path: window (dilation included), stride, pads; a negative pad crops."""

    kernel: int = 1
    stride: int = 1
    begin: int = 0
    end: int = 0

    @property
    def slack(self) -> int:
        """Pads minus window, which decides output sizes."""
        return self.begin + self.end - self.kernel

    def size(self, n: int) -> int:
        """Output size for an input of size n; less than 1 where the path does not run."""
        return (n + self.slack) // self.stride + 1

    def then(self, after: WindowAxis) -> WindowAxis:
        """This operator followed by `after`, as one."""
        return WindowAxis(
            self.kernel + (after.kernel - 1) * self.stride,
            self.stride * after.stride,
            self.begin + after.begin * self.stride,
            self.end + after.end * self.stride,
        )

    def pads_for(self, kernel: int) -> tuple[int, int] | None:
        """Pads (begin, end) of a window of `kernel` with this path's output size for every input size.

        The window lies inside the receptive field (or around it, where it is larger), as near its center as
        pads that are not negative allow. None if there are no such pads.
        """
        total = self.slack + kernel
        spare = self.kernel - kernel
        ends = sorted((self.begin - spare, self.begin))
        lowest, highest = max(ends[0], 0), min(ends[1], total)
        if kernel < 1 or lowest > highest:
            return None
        centered = (2 * self.begin - spare) // 2
        begin = min(max(centered, lowest), highest)
        return begin, total - begin


@dataclass(frozen=True)
class Geometry:
    """Spatial side of a path as one convolution: receptive field, strides and pads, one entry an axis.

    `pads` are in ONNX order, all begins, then all ends; those of the composed operator may be negative.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]

    @classmethod
    def of(cls, axes: Sequence[WindowAxis]) -> Geometry:
        """From one WindowAxis for each spatial axis."""
        pads = (*(a.begin for a in axes), *(a.end for a in axes))
        return cls(tuple(a.kernel for a in axes), tuple(a.stride for a in axes), pads)

    @property
    def axes(self) -> tuple[WindowAxis, ...]:
        begins, ends = self.pads[: len(self.kernel)], self.pads[len(self.kernel) :]
        return tuple(
            WindowAxis(*numbers) for numbers in zip(self.kernel, self.strides, begins, ends, strict=True)
        )

    def size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Output sizes for input sizes."""
        return tuple(a.size(n) for a, n in zip(self.axes, spatial, strict=True))

    def pads_for(self, kernel: int | Sequence[int]) -> tuple[int, ...] | None:
        """ONNX pads of one plain convolution of `kernel`, centered in the receptive field, whose output size
        is this path's for *every* input size; None if that needs a negative pad.

        Its strides are `strides`, its dilations 1. An integer is the same kernel on every axis.
        """
        sizes = (kernel,) * len(self.kernel) if isinstance(kernel, int) else tuple(kernel)
        pairs = [a.pads_for(k) for a, k in zip(self.axes, sizes, strict=True)]
        found = [p for p in pairs if p is not None]
        if len(found) < len(pairs):
            return None
        return (*(b for b, _ in found), *(e for _, e in found))


def unite(first: WindowAxis, second: WindowAxis) -> WindowAxis | str:
    """Two branches of one tensor that meet element by element, as one operator, or why they can't meet."""
    if first.stride != second.stride:
        return f"branches with strides {first.stride} and {second.stride} meet"
    if abs(first.slack - second.slack) >= first.stride:
        return "branches of different sizes meet"
    begin = max(first.begin, second.begin)
    kernel = begin + max(first.kernel - first.begin, second.kernel - second.begin)
    end = max(first.slack, second.slack) + kernel - begin
    return WindowAxis(kernel, first.stride, begin, end)


def window(
    kernel: int,
    stride: int = 1,
    dilation: int = 1,
    begin: int = 0,
    end: int = 0,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: bool = False,
    size: int | None = None,
) -> WindowAxis | str:
    """One axis of an ONNX Conv or pooling, or the reason why it is no fixed window.

    Args:
        kernel, stride, dilation, begin, end: the operator's attributes for this axis.
        auto_pad, ceil_mode: ONNX attributes.
        size: the input's size, if it is the same in every run. SAME padding with a stride, and ceil_mode with
            a large pad, depend on it.
    """
    extent = dilation * (kernel - 1) + 1
    if auto_pad != "NOTSET":
        pads = _auto_pads(auto_pad, extent, stride, size)
        if isinstance(pads, str):
            return pads
        if ceil_mode and stride > 1:
            return f"ceil_mode with auto_pad {auto_pad}"
        begin, end = pads
    elif ceil_mode and stride > 1:
        ceiled = _ceil_end(extent, stride, begin, end, size)
        if isinstance(ceiled, str):
            return ceiled
        end = ceiled
    return WindowAxis(extent, stride, begin, end)


def _auto_pads(auto_pad: str, extent: int, stride: int, size: int | None) -> tuple[int, int] | str:
    """SAME_* makes the output ceil(n / s), so the total pad follows from n; with stride 1 it is k - 1."""
    if auto_pad == "VALID":
        return 0, 0
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        return f"auto_pad {auto_pad} is unknown"
    if stride == 1:
        total = extent - 1
    elif size is None:
        return f"auto_pad {auto_pad} with stride {stride} shifts with the input's size, which is dynamic"
    else:
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    small = total // 2
    return (small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small)


def _ceil_end(extent: int, stride: int, begin: int, end: int, size: int | None) -> int | str:
    """End pad that turns ceil_mode into the plain formula: ceil(x / s) = floor((x + s - 1) / s).

    A last window that starts beyond the input and its begin pad is dropped by the runtime. That can't happen
    if extent > end + s - 1, for (out - 1) s <= n + begin + (end + s - 1 - extent). Else the size must be
    known.
    """
    if extent > end + stride - 1:
        return end + stride - 1
    if size is None:
        return "ceil_mode with a pad as large as the window, on a dynamic size"
    out = -(-(size + begin + end - extent) // stride) + 1
    if (out - 1) * stride >= size + begin:
        out -= 1
    return (out - 1) * stride + extent - size - begin
