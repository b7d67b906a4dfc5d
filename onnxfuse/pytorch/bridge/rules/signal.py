"""Fourier transforms and windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call


@rule("DFT")
def dft_rule(call: Call) -> fx.Node:
    if call.opset >= 20:
        axis = int(call.static(2).reshape(-1)[0]) if call.has(2) else -2
    else:
        axis = call.attr("axis", 1)
    length = _size(call, 1) if call.has(1) else None
    inverse, onesided = bool(call.attr("inverse", 0)), bool(call.attr("onesided", 0))
    return call.emit(dft, call.tensor(0), length, axis, inverse, onesided)


def _size(call: Call, index: int) -> Any:
    """A single number, or the node that yields it."""
    found = call.sizes(index)
    return found[0] if isinstance(found, list) else found


def dft(x: Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    """ONNX's DFT: the last axis holds a real number, or real and imaginary part.

    Args:
        length: what the signal is cut or filled up to.
    """
    axis = axis % x.dim()
    signal = torch.view_as_complex(x.contiguous()) if x.size(-1) == 2 else x.squeeze(-1)
    if inverse and onesided:
        return torch.fft.irfft(signal, length, axis).unsqueeze(-1)
    if onesided:
        return torch.view_as_real(torch.fft.rfft(signal, length, axis))
    return torch.view_as_real((torch.fft.ifft if inverse else torch.fft.fft)(signal, length, axis))


@rule("STFT")
def stft_rule(call: Call) -> fx.Node:
    window = call.optional(2)
    length = _size(call, 3) if call.has(3) else None
    return call.emit(stft, call.tensor(0), _size(call, 1), window, length, bool(call.attr("onesided", 1)))


def stft(x: Tensor, step: int, window: Tensor | None, length: int | None, onesided: bool) -> Tensor:
    """ONNX's STFT of (batch, time, 1 or 2): (batch, frames, frequencies, 2)."""
    if length is None:
        length = x.size(1) if window is None else window.size(0)
    signal = torch.view_as_complex(x.contiguous()) if x.size(-1) == 2 else x.squeeze(-1)
    frames = signal.unfold(1, length, step)
    if window is not None:
        frames = frames * window
    return torch.view_as_real((torch.fft.rfft if onesided else torch.fft.fft)(frames))


_HAMMING = {"alpha": 25 / 46, "beta": 21 / 46}
_WINDOWS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "HannWindow": (torch.hann_window, {}),
    "HammingWindow": (torch.hamming_window, _HAMMING),
    "BlackmanWindow": (torch.blackman_window, {}),
}


@rule(*_WINDOWS)
def window_rule(call: Call) -> fx.Node:
    function, settings = _WINDOWS[call.operator.op]
    dtype = _FLOATS.get(call.attr("output_datatype", 1))
    if dtype is None:
        call.refuse("its output is no floating-point number")
    periodic = bool(call.attr("periodic", 1))
    return call.emit(function, _size(call, 0), periodic, dtype=dtype, device=call.device(), **settings)


_FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
