"""`onnxfuse verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxfuse.cli.options import (
    Calib,
    Confidence,
    JsonOption,
    MaxDrop,
    Metric,
    Quiet,
    ReportFolder,
    Running,
    grouped,
)
from onnxfuse.cli.output import say, show, warn


@grouped
def verify(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help="The reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to be held against it.")],
    calib: Calib = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Relative error allowed of any output: 0.05 is 5 % of its spread. Without this and "
            "--max-drop: what float noise explains.",
        ),
    ] = None,
    max_drop: MaxDrop = None,
    metric: Metric = None,
    confidence: Confidence = None,
    max_latency: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="Latency of B by that of A allowed: 0.8 is 80 %, its interval included."
        ),
    ] = None,
    running: Running,
    report: ReportFolder = None,
    junit: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a test case for each promise, as JUnit XML.")
    ] = None,
    json: JsonOption = False,
    quiet: Quiet = False,
) -> int:
    """Check that a model keeps its promises beside another.

    Exit code 0 if it does, 1 if it doesn't. Without --max-error and --max-drop both must compute the same:
    every difference is within eight times what the reference differs from itself by float noise. Samples that
    one of the models was fitted to are left out; its metadata tells.

    \b
    Examples:
      onnxfuse verify model.onnx smaller.onnx --calib samples.npz --max-error 0.1
      onnxfuse verify model.onnx smaller.onnx --calib samples.npz \\
        --metric agreement --max-drop 0.02 --max-latency 0.8 --junit verify.xml
    """
    from onnxfuse.commands import compare as command
    from onnxfuse.report.compare_view import verify_view

    result = command.verify(
        a,
        b,
        calib=calib,
        max_error=max_error,
        max_drop=max_drop,
        metric=metric,
        confidence=confidence,
        max_latency=max_latency,
        report=report,
        junit=junit,
        **vars(running),
    )
    if json:
        print(result.to_json())
    elif not quiet:
        show(verify_view(result))
    warn(result.warnings)
    if not result.passed:
        say(f"error: {result.reason}")
    return 0 if result.passed else 1
