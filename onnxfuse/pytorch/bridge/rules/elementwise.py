"""Arithmetic on each element: of two or more inputs, of one, and cumulated along an axis."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onnxfuse.pytorch.bridge import hostmath
from onnxfuse.pytorch.bridge.operands import broadcasted, like, number, operands, plain, refuse_wide_unsigned
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Value

# --- arithmetic ---------------------------------------------------------------------------------------------


def _binary(kind: str, function: Callable[..., Any], host: hostmath.Scalar) -> None:
    @rule(kind, host=hostmath.arithmetic(host))
    def convert(call: Call) -> Value:
        return broadcasted(call, call.emit(function, *operands(call)), call.dtype(0))


_binary("Add", operator.add, hostmath.add)
_binary("Sub", operator.sub, hostmath.subtract)
_binary("Mul", operator.mul, hostmath.multiply)


@rule("Div", host=hostmath.arithmetic(hostmath.divide))
def divide(call: Call) -> Value:
    dtype = call.dtype(0)
    if dtype is None:
        node = call.emit(divided, call.tensor(0), call.tensor(1))
    elif dtype.is_floating_point:
        node = call.emit(operator.truediv, *operands(call))
    else:
        refuse_wide_unsigned(call)
        node = call.emit(torch.div, call.tensor(0), _second(call), rounding_mode="trunc")
    return broadcasted(call, node, dtype)


def divided(x: Tensor, y: Tensor) -> Tensor:
    """ONNX's Div of tensors of any type: integers are truncated."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _second(call: Call) -> Any:
    other = plain(call, 1)
    return call.tensor(1) if other is None else other


@rule("Mod", host=hostmath.arithmetic(hostmath.remainder))
def remainder(call: Call) -> Value:
    refuse_wide_unsigned(call)
    function = torch.fmod if call.attr("fmod", 0) else torch.remainder
    return broadcasted(call, call.emit(function, call.tensor(0), _second(call)), call.dtype(0))


@rule("Pow", host=hostmath.arithmetic(hostmath.power))
def power(call: Call) -> Value:
    refuse_wide_unsigned(call)
    # An exponent that torch knows is much faster, so that even an initializer is read here.
    exponent = number(call, 1) if (call.rank(1) or 0) <= (call.rank(0) or 0) else None
    base = call.tensor(0)
    node = call.emit(operator.pow, base, call.tensor(1) if exponent is None else exponent)
    if call.dtype(0) is None:
        node = call.method("type_as", node, base)
    elif call.dtype(0) != call.dtype(1):
        node = call.method("to", node, call.dtype(0))
    return broadcasted(call, node, call.dtype(0))


def _extreme(kind: str, function: Callable[..., Any], bound: str, host: hostmath.Scalar) -> None:
    @rule(kind, host=hostmath.arithmetic(host))
    def convert(call: Call) -> Value:
        refuse_wide_unsigned(call)
        for index in (0, 1) if len(call.inputs) == 2 else ():
            limit = plain(call, index)
            if limit is not None and not isinstance(limit, fx.Node):
                node = call.emit(torch.clamp, call.tensor(1 - index), **{bound: limit})
                return broadcasted(call, node, call.dtype(0))
        node, *rest = call.tensors()
        for other in rest:
            node = call.emit(function, node, other)
        return broadcasted(call, node, call.dtype(0))


_extreme("Max", torch.maximum, "min", hostmath.maximum)
_extreme("Min", torch.minimum, "max", hostmath.minimum)


@rule("Sum")
def add_all(call: Call) -> Value:
    return broadcasted(call, _total(call), call.dtype(0))


@rule("Mean")
def mean_of_all(call: Call) -> Value:
    return broadcasted(call, call.emit(operator.truediv, _total(call), len(call.inputs)), call.dtype(0))


def _total(call: Call) -> fx.Node:
    total, *rest = call.tensors()
    for node in rest:
        total = call.emit(operator.add, total, node)
    return total


# --- one input ----------------------------------------------------------------------------------------------


def _unary(kind: str, function: Callable[..., Any], host: hostmath.Scalar | None = None) -> None:
    @rule(kind, host=None if host is None else hostmath.one_by_one(host))
    def convert(call: Call) -> Value:
        refuse_wide_unsigned(call)
        return like(call, call.emit(function, call.tensor(0)))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "HardSwish": F.hardswish,
    "Log": torch.log,
    "Mish": F.mish,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
for _kind, _function in _FUNCTIONS.items():
    _unary(_kind, _function)
_unary("Abs", torch.abs, hostmath.absolute)
_unary("Ceil", torch.ceil, hostmath.ceil)
_unary("Floor", torch.floor, hostmath.floor)
_unary("Neg", torch.neg, hostmath.negate)
_unary("Reciprocal", torch.reciprocal, hostmath.reciprocal)
_unary("Sqrt", torch.sqrt, hostmath.square_root)


# --- along an axis ------------------------------------------------------------------------------------------


def _running(kind: str, function: Callable[..., Any], general: Callable[..., Any]) -> None:
    @rule(kind)
    def convert(call: Call) -> Value:
        refuse_wide_unsigned(call)
        axis = int(call.static(1).reshape(()))
        exclusive, reverse = bool(call.attr("exclusive", 0)), bool(call.attr("reverse", 0))
        if exclusive or reverse or call.dtype(0) is None:
            return like(call, call.emit(general, call.tensor(0), axis, exclusive, reverse))
        return like(call, call.emit(function, call.tensor(0), axis, dtype=call.dtype(0)))


def running_sum(x: Tensor, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    """The sum up to each element, with or without it, from either end."""
    x = x.flip(axis) if reverse else x
    y = x.cumsum(axis, dtype=x.dtype)
    y = torch.cat([torch.zeros_like(y.narrow(axis, 0, 1)), _without_last(y, axis)], axis) if exclusive else y
    return y.flip(axis) if reverse else y


def running_product(x: Tensor, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    """The product up to each element, with or without it, from either end."""
    x = x.flip(axis) if reverse else x
    y = x.cumprod(axis, dtype=x.dtype)
    y = torch.cat([torch.ones_like(y.narrow(axis, 0, 1)), _without_last(y, axis)], axis) if exclusive else y
    return y.flip(axis) if reverse else y


def _without_last(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 0, x.size(axis) - 1)


_running("CumSum", torch.cumsum, running_sum)
_running("CumProd", torch.cumprod, running_product)
