"""The rules of coupled channels: for each operator what it does to axes.

An operator that has none freezes all that it touches; nothing is guessed. Only `RULES` is imported from here;
the modules have the rules by family of operators.

Stands within `channels`, above `pipeline`.
"""

from __future__ import annotations

from onnxfuse.channels.rules import attention, elementwise, linear, reducing, repeating, shaping
from onnxfuse.ops.facet import Facet
from onnxfuse.ops.table import Kind, Op

_DEFAULTS = {**elementwise.DEFAULTS, **reducing.DEFAULTS}


def _missing(op: Op) -> str:
    return "frozen: its bodies are not followed" if op.kind is Kind.CONTROL else "frozen: no rule"


RULES = Facet(
    {
        **elementwise.RULES,
        **linear.RULES,
        **attention.RULES,
        **reducing.RULES,
        **shaping.RULES,
        **repeating.RULES,
    },
    lambda op: _DEFAULTS.get(op.kind),
    _missing,
)
"""By operator: the axes of its outputs."""
