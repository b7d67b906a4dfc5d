"""`onnxfuse operators`."""

from __future__ import annotations

from onnxfuse.cli.options import JsonOption
from onnxfuse.cli.output import show


def operators(json: JsonOption = False) -> int:
    """List the operators, and what is known of each.

    \b
    Example:
      onnxfuse operators --json
    """
    from onnxfuse.commands.operators import operators as list_operators
    from onnxfuse.report.operators_view import operators_view
    from onnxfuse.results import json_text

    found = list_operators()
    if json:
        print(json_text({"operators": found}, "operators"))
    else:
        show(operators_view(found))
    return 0
