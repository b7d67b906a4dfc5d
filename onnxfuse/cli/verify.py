"""`onnxfuse verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxfuse.cli.options import Calib, JsonOption, Quiet, Running, grouped
from onnxfuse.cli.output import say, show, warn


@grouped
def verify(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help="The reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to be held against it.")],
    calib: Calib = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Relative error allowed; default: what float noise explains."),
    ] = None,
    running: Running,
    json: JsonOption = False,
    quiet: Quiet = False,
) -> int:
    """Check that two models compute the same.

    Exit code 0 if they do, 1 if they don't. What counts as the same: a difference within eight times what the
    reference differs from itself by float noise, or a relative error of at most --max-error.

    \b
    Example:
      onnxfuse verify model.onnx smaller.onnx --calib samples.npz --max-error 0.1
    """
    from onnxfuse.commands import compare as command
    from onnxfuse.report.compare_view import verify_view

    result = command.verify(a, b, calib=calib, max_error=max_error, **vars(running))
    if json:
        print(result.to_json())
    elif not quiet:
        show(verify_view(result))
    warn(result.warnings)
    if not result.passed:
        say(f"error: {result.reason}")
    return 0 if result.passed else 1
