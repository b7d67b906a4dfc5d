"""The rules: for each operator what it does to axes. One that has none freezes all that it touches; nothing
is guessed."""

from __future__ import annotations

from onnxfuse.channels import (
    rules_attention,
    rules_elementwise,
    rules_linear,
    rules_reducing,
    rules_shaping,
)
from onnxfuse.ops.facet import Facet
from onnxfuse.ops.table import Kind, Op

_DEFAULTS = {**rules_elementwise.DEFAULTS, **rules_reducing.DEFAULTS}


def _missing(op: Op) -> str:
    return "frozen: its bodies are not followed" if op.kind is Kind.CONTROL else "frozen: no rule"


RULES = Facet(
    {
        **rules_elementwise.RULES,
        **rules_linear.RULES,
        **rules_attention.RULES,
        **rules_reducing.RULES,
        **rules_shaping.RULES,
    },
    lambda op: _DEFAULTS.get(op.kind),
    _missing,
)
"""By operator: the axes of its outputs."""
