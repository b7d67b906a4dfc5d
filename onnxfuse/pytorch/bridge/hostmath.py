"""Arithmetic on host values: at once on numbers, and emitted for torch.fx nodes that yield numbers.

What can be known at import is: a size is at least 0, so `size == -1` is False, and the chains that exporters
write around Expand and Reshape vanish. ONNX computes in float32 where Python has doubles, so results are
rounded: a size may hang on it (`floor(size * 0.7)`). Functions that are called when the module runs take
SymInts and SymFloats too, so that torch.export can trace them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import fx

from onnxfuse.pytorch.bridge.values import MOST_ON_HOST, Call, Host, Value, is_fixed

INTEGERS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.float64)

Scalar = Callable[..., Any]
"""A function of the call and of elements (numbers or nodes), to an element."""


def hosted(array: Host, dtype: torch.dtype | None) -> Value | None:
    """A rule's result on the host; None if it is too large to be kept there."""
    if array.size > MOST_ON_HOST:
        return None
    return Value("", dtype, array.ndim, host=array)


def as_host(elements: Any) -> Host:
    """The result of NumPy on an object array, as an array: NumPy hands out single elements bare."""
    if isinstance(elements, np.ndarray):
        return elements
    array = np.empty((), object)
    array[()] = elements
    return array


def fixed(array: Host | None) -> np.ndarray | None:
    """The numbers of a host value, None where some are only known when the module runs."""
    if array is None or not is_fixed(array):
        return None
    return np.array(array.tolist())


def elementwise(call: Call, function: Scalar, arrays: Sequence[Host]) -> Host | None:
    """The function on each element, with NumPy's broadcasting."""
    if np.broadcast(*arrays).size > MOST_ON_HOST:
        return None
    spread = np.broadcast_arrays(*arrays)
    result = np.empty(spread[0].shape, object)
    for index in np.ndindex(result.shape):
        result[index] = function(call, *(array[index] for array in spread))
    return result


def arithmetic(function: Scalar) -> Callable[..., Value | None]:
    """A host rule from a function of two elements; of several inputs, they are combined from the left."""
    return one_by_one(lambda call, *elements: reduce(lambda a, b: function(call, a, b), elements))


def one_by_one(function: Scalar) -> Callable[..., Value | None]:
    """A host rule from a function of an element of each input, for an operator that keeps their type."""

    def host(call: Call, *arrays: Host) -> Value | None:
        dtype = call.dtype(0)
        if dtype not in INTEGERS + FLOATS:
            return None
        result = elementwise(call, function, arrays)
        if dtype == torch.float32 and result is not None:
            result = elementwise(call, rounded, [result])
        return None if result is None else hosted(result, dtype)

    return host


def predicate(function: Scalar) -> Callable[..., Value | None]:
    """A host rule from a function of elements that yields truth values."""

    def host(call: Call, *arrays: Host) -> Value | None:
        result = elementwise(call, function, arrays)
        return None if result is None else hosted(result, torch.bool)

    return host


# --- elements -----------------------------------------------------------------------------------------------


def apply(call: Call, function: Callable[..., Any], *elements: Any) -> Any:
    """The function of numbers at once, of nodes when the module runs."""
    if any(isinstance(element, fx.Node) for element in elements):
        return call.emit(function, *elements)
    return function(*elements)


def _is(element: Any, number: float) -> bool:
    return not isinstance(element, fx.Node) and element == number


def rounded(call: Call, element: Any) -> Any:
    """A float of single precision."""
    if not isinstance(element, fx.Node):
        return float(np.float32(element))
    if element.target in (operator.neg, abs, torch.sym_float, torch.sym_max, torch.sym_min):
        return element  # nothing to round, as long as sizes are below 2**24
    return call.emit(single, element)


def add(call: Call, a: Any, b: Any) -> Any:
    if _is(a, 0):
        return b
    return a if _is(b, 0) else apply(call, operator.add, a, b)


def subtract(call: Call, a: Any, b: Any) -> Any:
    return a if _is(b, 0) else apply(call, operator.sub, a, b)


def multiply(call: Call, a: Any, b: Any) -> Any:
    if _is(a, 1):
        return b
    return a if _is(b, 1) else apply(call, operator.mul, a, b)


def divide(call: Call, a: Any, b: Any) -> Any:
    """ONNX's Div: integers are truncated."""
    if _is(b, 1):
        return a
    if _is(b, 0):
        call.refuse("it divides by zero")
    if call.dtype(0) in FLOATS:
        return apply(call, operator.truediv, a, b)
    truncated = operator.floordiv if lower(a) >= 0 and lower(b) >= 0 else divide_truncated
    return apply(call, truncated, a, b)


def remainder(call: Call, a: Any, b: Any) -> Any:
    """ONNX's Mod: the sign is that of the divisor, with `fmod` that of the dividend."""
    if _is(b, 0):
        call.refuse("it divides by zero")
    if call.attr("fmod", 0) and not (lower(a) >= 0 and lower(b) >= 0):
        return apply(call, math.fmod if call.dtype(0) in FLOATS else remainder_truncated, a, b)
    return apply(call, operator.mod, a, b)


def power(call: Call, a: Any, b: Any) -> Any:
    return a if _is(b, 1) else apply(call, operator.pow, a, b)


def maximum(call: Call, a: Any, b: Any) -> Any:
    if lower(a) >= upper(b):
        return a
    return b if lower(b) >= upper(a) else apply(call, torch.sym_max, a, b)


def minimum(call: Call, a: Any, b: Any) -> Any:
    if upper(a) <= lower(b):
        return a
    return b if upper(b) <= lower(a) else apply(call, torch.sym_min, a, b)


def negate(call: Call, a: Any) -> Any:
    return apply(call, operator.neg, a)


def absolute(call: Call, a: Any) -> Any:
    return a if lower(a) >= 0 else apply(call, abs, a)


def reciprocal(call: Call, a: Any) -> Any:
    if _is(a, 0):
        call.refuse("it divides by zero")
    return apply(call, operator.truediv, 1.0, a)


def square_root(call: Call, a: Any) -> Any:
    return call.emit(torch.sym_sqrt, a) if isinstance(a, fx.Node) else float(np.sqrt(a))


def floor(call: Call, a: Any) -> Any:
    if not isinstance(a, fx.Node):
        return float(np.floor(a))
    return call.emit(torch.sym_float, call.emit(math.floor, a))


def ceil(call: Call, a: Any) -> Any:
    if not isinstance(a, fx.Node):
        return float(np.ceil(a))
    return call.emit(torch.sym_float, call.emit(math.ceil, a))


def equal(call: Call, a: Any, b: Any) -> Any:
    if a is b:
        return True
    if lower(a) > upper(b) or lower(b) > upper(a):
        return False
    return apply(call, operator.eq, a, b)


def less(call: Call, a: Any, b: Any) -> Any:
    if upper(a) < lower(b):
        return True
    return False if lower(a) >= upper(b) or a is b else apply(call, operator.lt, a, b)


def less_or_equal(call: Call, a: Any, b: Any) -> Any:
    if upper(a) <= lower(b) or a is b:
        return True
    return False if lower(a) > upper(b) else apply(call, operator.le, a, b)


def both(call: Call, a: Any, b: Any) -> Any:
    for one, other in ((a, b), (b, a)):
        if not isinstance(one, fx.Node):
            return other if one else False
    return call.emit(operator.and_, a, b)


def either(call: Call, a: Any, b: Any) -> Any:
    for one, other in ((a, b), (b, a)):
        if not isinstance(one, fx.Node):
            return True if one else other
    return call.emit(operator.or_, a, b)


def invert(call: Call, a: Any) -> Any:
    return call.emit(torch.sym_not, a) if isinstance(a, fx.Node) else not a


def select(call: Call, condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, fx.Node):
        return a if condition else b
    if a is b or (not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b):
        return a
    return call.emit(choose, condition, a, b)


def convert(call: Call, a: Any, source: torch.dtype | None, target: torch.dtype) -> Any:
    """A number of another type: floats are cut off to integers."""
    if target == torch.bool:
        return apply(call, operator.ne, a, 0)
    if target in INTEGERS:
        if not isinstance(a, fx.Node):
            return int(a)
        if source in INTEGERS:
            return a
        whole = a.target == torch.sym_float and source in FLOATS
        return a.args[0] if whole and isinstance(a.args[0], fx.Node) else call.emit(torch.sym_int, a)
    number = apply(call, torch.sym_float, a) if source not in FLOATS else a
    return rounded(call, number) if target == torch.float32 else number


# --- bounds -------------------------------------------------------------------------------------------------


def single(number: Any) -> Any:
    """A double rounded to the 24 bits of single precision, by arithmetic alone (Veltkamp's splitting)."""
    high = number * 536870913.0  # 2**29 + 1
    return high - (high - number)


_NEVER_NEGATIVE = {
    operator.mul,
    operator.floordiv,
    operator.truediv,
    operator.mod,
    operator.pow,
    math.floor,
    math.ceil,
    torch.sym_float,
    torch.sym_int,
    torch.sym_sqrt,
    torch.sym_min,
    single,
}


def lower(element: Any) -> float:
    """A lower bound of a number."""
    if not isinstance(element, fx.Node):
        return element
    if element.op == "call_method" and element.target in ("size", "numel"):
        return 0
    if element.target is operator.add:
        return sum(lower(argument) for argument in element.args)
    if element.target is torch.sym_max:
        return max(lower(argument) for argument in element.args)
    never = element.target in _NEVER_NEGATIVE and all(lower(argument) >= 0 for argument in element.args)
    return 0 if never or element.target is abs else -math.inf


def upper(element: Any) -> float:
    """An upper bound of a number."""
    return math.inf if isinstance(element, fx.Node) else element


# --- when the module runs -----------------------------------------------------------------------------------


def divide_truncated(a: Any, b: Any) -> Any:
    """Integer division towards zero; that of SymInts must not ask for the sign of the dividend."""
    if b < 0:
        a, b = -a, -b
    return torch.sym_max(a, 0) // b - torch.sym_max(-a, 0) // b


def remainder_truncated(a: Any, b: Any) -> Any:
    """The remainder of `divide_truncated`."""
    return a - b * divide_truncated(a, b)


def choose(condition: Any, a: Any, b: Any) -> Any:
    """One of two numbers."""
    return a if condition else b
