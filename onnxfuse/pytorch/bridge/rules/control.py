"""Control flow: If."""

from __future__ import annotations

from typing import Any

from torch import nn

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, is_fixed


class Branches(nn.Module):
    """One of two bodies, chosen when it runs.

    Args:
        then, otherwise: the bodies; each returns a tuple.
        split: how many of the arguments are for the first one.
    """

    def __init__(self, then: nn.Module, otherwise: nn.Module, split: int) -> None:
        super().__init__()
        self.then = then
        self.otherwise = otherwise
        self.split = split

    def forward(self, condition: Any, *arguments: Any) -> Any:
        if condition:
            return self.then(*arguments[: self.split])
        return self.otherwise(*arguments[self.split :])


@rule("If")
def if_(call: Call) -> Any:
    host = call.host(0)
    if host is not None and is_fixed(host):
        return tuple(call.inline("then_branch" if host.reshape(-1)[0] else "else_branch"))
    condition = call.tensor(0) if host is None else host.reshape(-1)[0]
    then, for_then = call.body("then_branch")
    otherwise, for_otherwise = call.body("else_branch")
    result = call.module(Branches(then, otherwise, len(for_then)), condition, *for_then, *for_otherwise)
    return tuple(call.item(result, index) for index in range(call.outputs))
