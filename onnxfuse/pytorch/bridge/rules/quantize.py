"""Integers that stand for floating-point numbers: quantized tensors, and products of them.

Products are computed in double precision, which is exact for 8-bit factors and runs on any device. Rounding
has no gradient: what comes before a QuantizeLinear doesn't train.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.rules.windows import check_same, convolution, padded
from onnxfuse.pytorch.bridge.values import Call

_TYPES = {2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32}
"""ONNX's numbers of the types that may stand for numbers."""
_LISTED = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES.values())


def _layout(call: Call) -> dict[str, Any]:
    """The axis along which scales differ, and the number of neighbors that share one."""
    found = {"axis": call.attr("axis", 1), "block": call.attr("block_size", 0)}
    return {} if call.rank(1) == 0 else found if found["block"] else {"axis": found["axis"]}


@rule("DequantizeLinear")
def dequantize_rule(call: Call) -> fx.Node:
    if call.dtype(0) not in _TYPES.values():
        call.refuse(f"floats from {call.type_name(0)} are not supported, only from {_LISTED}")
    return call.emit(dequantize, call.tensor(0), call.tensor(1), call.optional(2), **_layout(call))


@rule("QuantizeLinear")
def quantize_rule(call: Call) -> fx.Node:
    dtype = call.dtype(2) if call.has(2) else _TYPES.get(call.attr("output_dtype", 0) or 2)
    if dtype not in _TYPES.values():
        name = (
            call.type_name(2)
            if call.has(2)
            else TensorProto.DataType.Name(call.attr("output_dtype", 0)).lower()
        )
        call.refuse(f"{name} from floats is not supported, only {_LISTED}")
    return call.emit(quantize, call.tensor(0), call.tensor(1), call.optional(2), dtype=dtype, **_layout(call))


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point broadcast to x: one for all, by index along an axis, or by blocks of it."""
    if parameter.dim() == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    axis = axis % x.dim()
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.size(axis))
    return parameter.reshape(-1, *[1] * (x.dim() - axis - 1))


def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1, block: int = 0) -> Tensor:
    """(x - zero) * scale, of the type of the scale."""
    y = x.float() if zero is None else x.float() - _spread(zero.float(), x, axis, block)
    return (y * _spread(scale.float(), x, axis, block)).to(scale.dtype)


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, axis: int = 1, block: int = 0
) -> Tensor:
    """x / scale + zero, rounded to even, within what the type can hold."""
    y = torch.round(x.to(scale.dtype) / _spread(scale, x, axis, block)).float()
    return _saturated(y if zero is None else y + _spread(zero.float(), x, axis, block), dtype)


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return x.double().clamp(limits.min, limits.max).to(dtype)


@rule("DynamicQuantizeLinear")
def dynamic_quantize_rule(call: Call) -> Any:
    result = call.emit(dynamic_quantize, call.tensor(0))
    return tuple(call.item(result, index) for index in range(3))


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 over the range of the data, zero included: the numbers, their scale and zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round((-low / scale).nan_to_num()).clamp(0, 255)
    return _saturated(torch.round((x / scale).nan_to_num()) + zero, torch.uint8), scale, zero.to(torch.uint8)


def _less_zero_point(x: Tensor, zero: Tensor | None, trailing: int) -> Tensor:
    """x - zero in double precision; a zero point for each row, with so many axes after it."""
    if zero is None:
        return x.double()
    return x.double() - (zero.double().reshape(-1, *[1] * trailing) if zero.numel() > 1 else zero.double())


@rule("MatMulInteger")
def matmul_integer_rule(call: Call) -> fx.Node:
    return call.emit(matmul_integer, call.tensor(0), call.tensor(1), call.optional(2), call.optional(3))


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
    """(a - a_zero) @ (b - b_zero) as int32; zero points by row of a, by column of b."""
    return (_less_zero_point(a, a_zero, 1) @ _less_zero_point(b, b_zero, 0)).to(torch.int32)


@rule("QLinearMatMul")
def qlinear_matmul_rule(call: Call) -> fx.Node:
    return call.emit(qlinear_matmul, *(call.tensor(index) for index in range(8)))


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """The product of two quantized matrices, quantized."""
    product = _less_zero_point(a, a_zero, 1) @ _less_zero_point(b, b_zero, 0)
    rows = a_scale.double().reshape(-1, 1) if a_scale.numel() > 1 else a_scale.double()
    y = torch.round(product * rows * b_scale.double() / y_scale.double())
    return _saturated(y + y_zero.double(), y_zero.dtype)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _convolution(call: Call, x: fx.Node, weight: int) -> tuple[fx.Node, dict[str, Any]]:
    """The input with its padding, and the other settings of a convolution by the weight in that input."""
    frame = convolution(call, weight)
    check_same(call, frame)
    settings = {"stride": frame.strides, "dilation": frame.dilations, "groups": call.attr("group", 1)}
    return padded(call, x, frame), settings


@rule("ConvInteger")
def conv_integer_rule(call: Call) -> fx.Node:
    x = call.emit(_less_zero_point, call.tensor(0), call.optional(2), 0)
    x, settings = _convolution(call, x, 1)
    return call.emit(conv_integer, x, call.tensor(1), call.optional(3), **settings)


def conv_integer(x: Tensor, weight: Tensor, zero: Tensor | None, **settings: Any) -> Tensor:
    """The convolution of x, from which its zero point is taken already, as int32."""
    centered = _less_zero_point(weight, zero, weight.dim() - 1)
    return _CONV[weight.dim() - 2](x, centered, None, **settings).to(torch.int32)


@rule("QLinearConv")
def qlinear_conv_rule(call: Call) -> fx.Node:
    x = call.emit(_less_zero_point, call.tensor(0), call.tensor(2), 0)
    x, settings = _convolution(call, x, 3)
    rest = [call.optional(index) for index in (1, 3, 4, 5, 6, 7, 8)]
    return call.emit(qlinear_conv, x, *rest, **settings)


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None,
    **settings: Any,
) -> Tensor:
    """The convolution of x, from which its zero point is taken already, quantized."""
    rank = weight.dim() - 2
    centered = _less_zero_point(weight, weight_zero, rank + 1)
    y = _CONV[rank](x, centered, None if bias is None else bias.double(), **settings)
    scale = x_scale.double() * weight_scale.double().reshape(-1, *[1] * rank) / y_scale.double()
    return _saturated(torch.round(y * scale) + y_zero.double(), y_zero.dtype)
