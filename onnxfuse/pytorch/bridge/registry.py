"""Rules, one for each ONNX operator: how it is said with plain torch functions.

A rule is a function of a `Call`. It returns what the node's outputs are: one torch.fx node, or a tuple with
one for each output. `@rule("Relu")` puts it in the table. Beside the function, a rule says

- which inputs are *weight slots*, where a stored float tensor is something to train: those of the operator's
  row in `ops.table`;
- how it computes on *host* values (shapes), where it can: a function of the call and its inputs as object
  arrays, used whenever all of them are known on the host.

What a rule can't do it refuses with `call.refuse(reason)`: there is no guessing.

The modules of `rules` fill the table. Whoever reads it, or adds to it from outside, imports it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onnxfuse.ops.table import OPS, Key, Kind, parse_key
from onnxfuse.pytorch.bridge.values import Call

Function = Callable[[Call], Any]
HostFunction = Callable[..., Any]


@dataclass(frozen=True)
class TorchRule:
    """The rule of one operator (module docstring). `elementwise`: its weight slots may also hold masks."""

    function: Function
    weights: tuple[int, ...] = ()
    host: HostFunction | None = None
    elementwise: bool = False


TABLE: dict[Key, TorchRule] = {}
"""Rules by operator."""


def rule(*kinds: str, host: HostFunction | None = None) -> Callable[[Function], Function]:
    """Decorator: the rule of these operators, "Conv" or "com.microsoft::Gelu"; `ops.table` has their rows."""

    def add(function: Function) -> Function:
        for key in map(parse_key, kinds):
            row = OPS.get(*key)
            assert row is not None, key
            TABLE[key] = TorchRule(function, row.weights, host, row.kind is Kind.ELEMENTWISE)
        return function

    return add


def register(kind: str, function: Callable[..., Any], *, weights: Sequence[int] = ()) -> None:
    """Teach the import an operator.

        onnxfuse.pytorch.register("com.acme::Swish", lambda x, beta=1.0: x * torch.sigmoid(beta * x))

    Args:
        kind: "domain::Op", or "Op" for the default domain; replaces a rule that is there.
        function: of the node's inputs, tensors (None for an optional one that is left out), and of its
            attributes as keyword arguments. It returns a tensor, or a tuple of one for each output.
        weights: the inputs where a stored float tensor is something to train.
    """

    def call_function(call: Call) -> Any:
        inputs = [call.optional(index) for index in range(len(call.inputs))]
        result = call.emit(function, *inputs, **call.operator.attributes)
        if call.outputs == 1:
            return result
        return tuple(call.item(result, index) for index in range(call.outputs))

    TABLE[parse_key(kind)] = TorchRule(call_function, tuple(weights))
