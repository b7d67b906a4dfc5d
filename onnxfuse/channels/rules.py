"""The table of rules: for each operator, by domain and name, what it does to axes. One that is not in it
freezes all that it touches; nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping

from onnxfuse.channels import (
    rules_attention,
    rules_elementwise,
    rules_linear,
    rules_reducing,
    rules_shaping,
)
from onnxfuse.channels.site import Rule

RULES: Mapping[tuple[str, str], Rule] = {
    **rules_elementwise.RULES,
    **rules_linear.RULES,
    **rules_attention.RULES,
    **rules_reducing.RULES,
    **rules_shaping.RULES,
}
