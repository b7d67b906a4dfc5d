"""The rules that one analysis has for operators, and the defaults that it takes from their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from onnxfuse.ops.table import OPS, Key, Op, parse_key

R = TypeVar("R")


def keyed(rules: Mapping[str, R]) -> dict[Key, R]:
    """Rules by key, from rules by operators as `parse_key` reads them."""
    return {parse_key(operator): rule for operator, rule in rules.items()}


@dataclass(frozen=True)
class Facet(Generic[R]):
    """The rules of an analysis, by operator.

    Attributes:
        rules: what is written for single operators.
        default: from the row of an operator that has none, the rule that its kind or traits give, or None.
        missing: from a row without any rule, what that means, in a few words.
    """

    rules: Mapping[Key, R]
    default: Callable[[Op], R | None]
    missing: Callable[[Op], str]

    def get(self, key: Key) -> R | None:
        """The rule of an operator: its own, else the default; None where there is neither."""
        if key in self.rules:
            return self.rules[key]
        op = OPS.get(*key)
        return None if op is None else self.default(op)

    def coverage(self, key: Key) -> str:
        """For an operator of the table "rule" or "default", or the reason why there is neither."""
        if key in self.rules:
            return "rule"
        op = OPS.get(*key)
        if op is None:
            raise KeyError(key)
        return "default" if self.default(op) is not None else self.missing(op)
