"""`onnxfuse diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxfuse.cli.options import Calib, JsonOption, Running, grouped
from onnxfuse.cli.output import show, warn


@grouped
def diff(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help="One model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.")],
    calib: Calib = None,
    running: Running,
    json: JsonOption = False,
) -> int:
    """Show two models side by side.

    Nodes, weights, cost, and outputs on the same samples.

    \b
    Example:
      onnxfuse diff model.onnx smaller.onnx --calib samples.npz
    """
    from onnxfuse.commands import compare as command
    from onnxfuse.report.compare_view import diff_view

    result = command.diff(a, b, calib=calib, **vars(running))
    if json:
        print(result.to_json())
    else:
        show(diff_view(result, (a, b)))
    warn(result.warnings)
    return 0
