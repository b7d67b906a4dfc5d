"""What Conv and the pools share: a window that slides over spatial axes, and padding that torch has not.

torch pads both ends alike; ONNX gives each end its own number, or has SAME_UPPER and SAME_LOWER, which depend
on the size of the input wherever the stride is not 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from onnxfuse.pytorch.bridge.values import Call


@dataclass(frozen=True)
class Window:
    """A sliding window: numbers for each spatial axis.

    Attributes:
        before, after: padding at either end; of no meaning where `same` says that it depends on the input.
        same: "SAME_UPPER" or "SAME_LOWER" if so, else "".
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    same: str = ""

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def extent(self) -> tuple[int, ...]:
        """The reach of the window along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def symmetric(self) -> bool:
        """Whether both ends are padded alike, as torch does."""
        return not self.same and self.before == self.after and min(self.before, default=0) >= 0


def known_shape(call: Call, index: int) -> tuple[int, ...] | None:
    """The shape of an input, if all of it is known at import."""
    found = call.known_sizes(index) if call.has(index) else None
    sizes = [size for size in found or () if size is not None]
    return None if found is None or len(sizes) < len(found) else tuple(sizes)


def window(call: Call, kernel: Sequence[int]) -> Window:
    """The window that strides, dilations, pads and auto_pad describe."""
    rank = len(kernel)
    strides = tuple(call.attr("strides") or [1] * rank)
    dilations = tuple(call.attr("dilations") or [1] * rank)
    pads = call.attr("pads") or [0] * (2 * rank)
    automatic = call.attr("auto_pad") or "NOTSET"
    if automatic == "NOTSET":
        before, after = tuple(pads[:rank]), tuple(pads[rank:])
    else:
        before = after = (0,) * rank
    found = Window(tuple(kernel), strides, dilations, before, after)
    if not automatic.startswith("SAME"):
        return found
    if any(stride != 1 for stride in strides):
        return Window(found.kernel, strides, dilations, before, after, automatic)
    small, large = zip(*(((e - 1) // 2, e // 2) for e in found.extent), strict=True)
    ends = (small, large) if automatic == "SAME_UPPER" else (large, small)
    return Window(found.kernel, strides, dilations, *ends)


def convolution(call: Call, index: int) -> Window:
    """The window of a convolution by the weight in that input.

    A kernel whose size nobody knows before the module runs counts as one of 0.
    """
    shape = known_shape(call, index)
    kernel = shape[2:] if shape is not None else call.attr("kernel_shape")
    if kernel is None:
        rank = call.rank(index) or call.rank(0)
        if rank is None:
            call.refuse("how many axes it has is not known")
        kernel = (0,) * (rank - 2)
    if len(kernel) not in (1, 2, 3):
        call.refuse(f"torch has no convolution over {len(kernel)} axes")
    return window(call, kernel)


def is_same(call: Call) -> bool:
    """Whether auto_pad asks for as many outputs as there are inputs, or strides."""
    return (call.attr("auto_pad") or "NOTSET").startswith("SAME")


def check_same(call: Call, frame: Window) -> None:
    """Refuse what auto_pad can't be known to mean."""
    if is_same(call) and 0 in frame.kernel:
        call.refuse("the size of its kernel, which auto_pad needs, is not known")
    if frame.same and any(e + 1 < s for e, s in zip(frame.extent, frame.strides, strict=True)):
        call.refuse("with strides beyond the window, ONNX and ONNX Runtime differ in what auto_pad is")


def padded(call: Call, x: fx.Node, frame: Window, value: float = 0.0) -> fx.Node:
    """The input with all of its padding."""
    if frame.same:
        upper = frame.same == "SAME_UPPER"
        return call.emit(pad_same, x, frame.extent, frame.strides, upper, value)
    return call.emit(F.pad, x, flat(frame.before, frame.after), "constant", value)


def told(**settings: Any) -> dict[str, Any]:
    """The settings, such as strides and padding, that have to be said, since torch's default is another."""
    defaults = {"padding": 0, "output_padding": 0, "ceil_mode": False, "count_include_pad": True}
    return {name: value for name, value in settings.items() if not _all_equal(value, defaults.get(name, 1))}


def _all_equal(value: Any, number: int) -> bool:
    return all(item == number for item in value) if isinstance(value, tuple) else value == number


def flat(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Padding in the order of F.pad: last axis first."""
    return [number for ends in zip(reversed(before), reversed(after), strict=True) for number in ends]


def pad_same(
    x: torch.Tensor, extent: Sequence[int], strides: Sequence[int], upper: bool, value: float
) -> torch.Tensor:
    """Padding with which a window of that extent is put down ceil(size / stride) times."""
    before, after = same_ends(x, extent, strides, upper)
    return F.pad(x, flat(before, after), "constant", value)


def same_ends(
    x: torch.Tensor, extent: Sequence[int], strides: Sequence[int], upper: bool
) -> tuple[list[int], list[int]]:
    """The padding of `pad_same` at either end of each spatial axis."""
    sizes = zip(x.shape[2:], extent, strides, strict=True)
    totals = [max((-(-size // stride) - 1) * stride + reach - size, 0) for size, reach, stride in sizes]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (small, large) if upper else (large, small)


def ceil_ends(
    x: torch.Tensor,
    extent: Sequence[int],
    strides: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> list[int]:
    """The padding at the end with which the last window of ceil_mode just fits: one that starts inside."""
    found = []
    for size, reach, stride, begin, end in zip(x.shape[2:], extent, strides, before, after, strict=True):
        steps = -(-(size + begin + end - reach) // stride)
        if steps * stride >= size + begin:
            steps -= 1
        found.append(steps * stride + reach - size - begin)
    return found
