"""Comparisons, truth values, bits, and conversions between element types."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch

from onnxfuse.pytorch.bridge import hostmath
from onnxfuse.pytorch.bridge.operands import broadcasted, operands, plain, refuse_wide_unsigned
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.tensors import torch_type
from onnxfuse.pytorch.bridge.values import Call, Host, Value


def _comparison(kind: str, function: Callable[..., Any], host: hostmath.Scalar) -> None:
    @rule(kind, host=hostmath.predicate(host))
    def convert(call: Call) -> Value:
        return broadcasted(call, call.emit(function, *operands(call)), torch.bool)


_comparison("Equal", operator.eq, hostmath.equal)
_comparison("Less", operator.lt, hostmath.less)
_comparison("LessOrEqual", operator.le, hostmath.less_or_equal)
_comparison("Greater", operator.gt, lambda call, a, b: hostmath.less(call, b, a))
_comparison("GreaterOrEqual", operator.ge, lambda call, a, b: hostmath.less_or_equal(call, b, a))


def _logical(kind: str, function: Callable[..., Any], host: hostmath.Scalar) -> None:
    @rule(kind, host=hostmath.predicate(host))
    def convert(call: Call) -> Value:
        return broadcasted(call, call.emit(function, *call.tensors()), torch.bool)


_logical("And", torch.logical_and, hostmath.both)
_logical("Or", torch.logical_or, hostmath.either)
_logical("Not", torch.logical_not, hostmath.invert)


@rule("Xor")
def exclusive_or(call: Call) -> Value:
    return broadcasted(call, call.emit(torch.logical_xor, *call.tensors()), torch.bool)


def _bitwise(kind: str, function: Callable[..., Any]) -> None:
    @rule(kind)
    def convert(call: Call) -> Value:
        refuse_wide_unsigned(call)
        return broadcasted(call, call.emit(function, *call.tensors()), call.dtype(0))


_bitwise("BitwiseAnd", torch.bitwise_and)
_bitwise("BitwiseOr", torch.bitwise_or)
_bitwise("BitwiseXor", torch.bitwise_xor)
_bitwise("BitwiseNot", torch.bitwise_not)


@rule("BitShift")
def bit_shift(call: Call) -> Value:
    refuse_wide_unsigned(call)
    left = call.attr("direction") == "LEFT"
    function = torch.bitwise_left_shift if left else torch.bitwise_right_shift
    return broadcasted(call, call.emit(function, *call.tensors()), call.dtype(0))


@rule("IsNaN")
def is_nan(call: Call) -> Value:
    return Value("", torch.bool, call.rank(0), call.emit(torch.isnan, call.tensor(0)))


@rule("IsInf")
def is_infinite(call: Call) -> Value:
    positive, negative = call.attr("detect_positive", 1), call.attr("detect_negative", 1)
    x = call.tensor(0)
    if positive and negative:
        node = call.emit(torch.isinf, x)
    elif positive or negative:
        node = call.emit(torch.isposinf if positive else torch.isneginf, x)
    else:
        node = call.emit(torch.zeros_like, x, dtype=torch.bool)
    return Value("", torch.bool, call.rank(0), node)


# --- Where --------------------------------------------------------------------------------------------------


def _where_host(call: Call, condition: Host, x: Host, y: Host) -> Value | None:
    result = hostmath.elementwise(call, hostmath.select, [condition, x, y])
    return None if result is None else hostmath.hosted(result, call.dtype(1))


@rule("Where", host=_where_host)
def where(call: Call) -> Value:
    choices = [plain(call, index) for index in (1, 2)]
    if None not in choices:  # torch would have to guess their type
        choices[0] = None
    nodes = [call.tensor(index) if one is None else one for index, one in enumerate(choices, 1)]
    return broadcasted(call, call.emit(torch.where, call.tensor(0), *nodes), call.dtype(1))


# --- types --------------------------------------------------------------------------------------------------


def target_type(call: Call, code: int) -> torch.dtype:
    """The torch type of an ONNX element type."""
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    if names.get(code, "UNDEFINED") == "UNDEFINED":
        call.refuse(f"there is no element type {code}")
    found = None
    if code != onnx.TensorProto.STRING:
        found = torch_type(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code)))
    if found is None:
        call.refuse(f"torch has no element type {names[code]}")
    return found


def _converted(call: Call, array: Host, target: torch.dtype | None) -> Value | None:
    if target not in (*hostmath.INTEGERS, *hostmath.FLOATS, torch.bool):
        return None
    source = call.dtype(0)

    def convert(call: Call, element: Any) -> Any:
        return hostmath.convert(call, element, source, target)

    result = hostmath.elementwise(call, convert, [array])
    return None if result is None else hostmath.hosted(result, target)


def _cast_host(call: Call, array: Host) -> Value | None:
    return _converted(call, array, target_type(call, call.attr("to")))


@rule("Cast", host=_cast_host)
def cast(call: Call) -> Value:
    target = target_type(call, call.attr("to"))
    if call.dtype(0) == target:
        return call.value(0)
    return Value("", target, call.rank(0), call.method("to", call.tensor(0), target))


@rule("CastLike")
def cast_like(call: Call) -> Value:
    value, target = call.value(0), call.dtype(1)
    if target is None:
        return Value("", None, value.rank, call.method("type_as", call.tensor(0), call.tensor(1)))
    if value.dtype == target:
        return value
    array = None if _is_weight(value) else call.host(0)
    converted = None if array is None else _converted(call, array, target)
    return converted or Value("", target, value.rank, call.method("to", call.tensor(0), target))


def _is_weight(value: Value) -> bool:
    return value.key is not None and value.dtype is not None and value.dtype.is_floating_point


@rule("BitCast")
def bit_cast(call: Call) -> Value:
    target = target_type(call, call.attr("to"))
    return Value("", target, call.rank(0), call.method("view", call.tensor(0), target))
