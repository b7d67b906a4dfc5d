"""Activations, Softmax and Dropout."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onnxfuse.pytorch.bridge.operands import like, number, refuse_wide_unsigned
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Value

# --- activations with parameters ----------------------------------------------------------------------------


def _activation(kind: str, function: Callable[..., Any], **defaults: float) -> None:
    """A rule for a function whose further arguments are the attributes, in this order."""

    @rule(kind)
    def convert(call: Call) -> Value:
        values = [call.attr(name, float(default)) for name, default in defaults.items()]
        return like(call, call.emit(function, call.tensor(0), *values))


_activation("LeakyRelu", F.leaky_relu, alpha=0.01)
_activation("Elu", F.elu, alpha=1.0)
_activation("Celu", F.celu, alpha=1.0)

_SELU = (1.67326319217681884765625, 1.05070102214813232421875)


@rule("Selu")
def selu(call: Call) -> Value:
    alpha, gamma = call.attr("alpha", _SELU[0]), call.attr("gamma", _SELU[1])
    if math.isclose(alpha, _SELU[0], rel_tol=1e-7) and math.isclose(gamma, _SELU[1], rel_tol=1e-7):
        return like(call, call.emit(torch.selu, call.tensor(0)))
    return like(call, call.emit(operator.mul, call.emit(F.elu, call.tensor(0), alpha), gamma))


@rule("ThresholdedRelu")
def thresholded_relu(call: Call) -> Value:
    return like(call, call.emit(F.threshold, call.tensor(0), call.attr("alpha", 1.0), 0.0))


@rule("HardSigmoid")
def hard_sigmoid(call: Call) -> Value:
    alpha, beta = call.attr("alpha", 0.2), call.attr("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return like(call, call.emit(F.hardsigmoid, call.tensor(0)))
    line = call.emit(operator.add, call.emit(operator.mul, call.tensor(0), alpha), beta)
    return like(call, call.emit(torch.clamp, line, 0.0, 1.0))


@rule("Gelu", "com.microsoft::Gelu")
def gelu(call: Call) -> Value:
    approximate = call.attr("approximate", "none")
    return like(call, call.emit(F.gelu, call.tensor(0), approximate=approximate))


@rule("Swish")
def swish(call: Call) -> Value:
    alpha = call.attr("alpha", 1.0)
    if alpha == 1:
        return like(call, call.emit(F.silu, call.tensor(0)))
    gate = call.emit(torch.sigmoid, call.emit(operator.mul, call.tensor(0), alpha))
    return like(call, call.emit(operator.mul, call.tensor(0), gate))


@rule("Shrink")
def shrink(call: Call) -> Value:
    limit, bias = call.attr("lambd", 0.5), call.attr("bias", 0.0)
    return like(call, call.emit(shrunk, call.tensor(0), limit, bias))


def shrunk(x: Tensor, limit: float, bias: float) -> Tensor:
    """The elements beyond +-limit, moved by the bias towards 0; all else is 0."""
    moved = torch.where(x < -limit, x + bias, x - bias).to(x.dtype)
    return torch.where((x < -limit) | (x > limit), moved, torch.zeros_like(x))


@rule("PRelu")
def prelu(call: Call) -> Value:
    x, slope = call.tensor(0), call.tensor(1)
    shape, rank = call.known_sizes(1), call.rank(0)
    if shape is not None and rank is not None and rank > 1:
        along = (*[1] * (rank - len(shape)), *shape)
        if len(along) == rank and all(size == 1 for axis, size in enumerate(along) if axis != 1):
            slope = slope if len(shape) == 1 else call.method("flatten", slope)
            return like(call, call.emit(F.prelu, x, slope))
    return like(call, call.emit(leaky, x, slope))


def leaky(x: Tensor, slope: Tensor) -> Tensor:
    """PRelu with a slope that broadcasts."""
    return torch.where(x < 0, x * slope, x)


@rule("Clip")
def clip(call: Call) -> Value:
    refuse_wide_unsigned(call)
    if call.opset < 11:
        bounds: list[Any] = [call.attr("min"), call.attr("max")]
    else:
        bounds = [number(call, index) if call.has(index) else None for index in (1, 2)]
        missing = [call.has(index) and bounds[index - 1] is None for index in (1, 2)]
        if any(missing):  # torch takes numbers or tensors, no mixture
            bounds = [call.optional(1), call.optional(2)]
    if bounds == [None, None]:
        return call.value(0)
    return like(call, call.emit(torch.clamp, call.tensor(0), *bounds))


# --- over an axis -------------------------------------------------------------------------------------------


def _over_an_axis(kind: str, function: Callable[..., Any]) -> None:
    @rule(kind)
    def convert(call: Call) -> Value:
        x, rank = call.tensor(0), call.rank(0)
        axis = call.attr("axis", -1 if call.opset >= 13 else 1)
        if call.opset >= 13 or axis == -1 or axis + 1 == rank:
            return like(call, call.emit(function, x, axis))
        # Before opset 13, all axes from that one on count as one.
        flat = call.emit(function, call.emit(torch.flatten, x, axis), -1)
        return like(call, call.method("view_as", flat, x))


def hardmax(x: Tensor, axis: int) -> Tensor:
    """1 where the first largest element along the axis is, else 0."""
    zeros = torch.zeros_like(x)
    return zeros.scatter(axis, x.argmax(axis, keepdim=True), 1) if x.numel() else zeros


_over_an_axis("Softmax", torch.softmax)
_over_an_axis("LogSoftmax", torch.log_softmax)
_over_an_axis("Hardmax", hardmax)


# --- Dropout ------------------------------------------------------------------------------------------------


@rule("Dropout")
def dropout(call: Call) -> Any:
    """Follows the module's train and eval mode, whatever the file says of training."""
    if call.opset < 12:
        ratio = call.attr("ratio", 0.5)
    else:
        ratio = float(call.static(1).reshape(())) if call.has(1) else 0.5
    if not call.wants(1):
        return like(call, call.module(nn.Dropout(ratio), call.tensor(0))) if ratio else call.value(0)
    both = call.module(MaskedDropout(ratio, torch.bool if call.opset >= 10 else None), call.tensor(0))
    return like(call, call.item(both, 0)), call.item(both, 1)


class MaskedDropout(nn.Module):
    """Dropout that also returns which elements it kept, in the tensor's own type if none is given."""

    def __init__(self, ratio: float, mask: torch.dtype | None) -> None:
        super().__init__()
        self.ratio = ratio
        self.mask = mask

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.ones_like(x, dtype=self.mask)
        if not self.training:
            return x, kept
        mask = F.dropout(torch.ones_like(x), self.ratio)
        return x * mask, mask.to(kept.dtype).ne(0).to(kept.dtype)
