"""`onnxfuse compress`."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxfuse.cli.options import (
    Calib,
    Confidence,
    MaxDrop,
    Metric,
    ModelFile,
    Rate,
    ReportFolder,
    Running,
    Showing,
    grouped,
    output_option,
    target,
)
from onnxfuse.cli.output import finish, progress


@grouped
def compress(
    *,
    model: ModelFile,
    passes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Passes in order, with options; default fold,fuse. 'onnxfuse passes' lists them.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE.yaml", help="Passes and settings from a file instead.")
    ] = None,
    output: Annotated[str | None, output_option("compressed")] = None,
    calib: Calib = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Relative error allowed of any output, on held-out samples: 0.05 is 5 % of its spread.",
        ),
    ] = None,
    max_drop: MaxDrop = None,
    metric: Metric = None,
    confidence: Confidence = None,
    retrain: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Retrain the passes' result on these samples, with MODEL as teacher. --max-error and "
            "--max-drop then hold for the retrained model.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Passes over the samples of --retrain; default 10.")
    ] = None,
    lr: Rate = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:steps=N",
            help="Passes and retraining by turns: uniform:steps=4, or exponential:steps=4 (each turn goes "
            "half as far as the one before and trains twice as long). --epochs counts all turns.",
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of samples that errors are measured on.")
    ] = 0.2,
    running: Running,
    report: ReportFolder = None,
    dump: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the model after every pass, and a journal.")
    ] = None,
    showing: Showing,
) -> int:
    """Run passes over a model, check every one, and write the result.

    Each pass works on a copy, which is checked in ONNX Runtime against what the pass promises. If any check
    or budget fails, nothing is written.

    \b
    Examples:
      onnxfuse compress model.onnx --calib samples.npz
      onnxfuse compress model.onnx --passes fold,fuse:max_blocks=4 -o out.onnx
      onnxfuse compress model.onnx --calib samples.npz --max-drop 0.01 \\
        --metric agreement --explain
      onnxfuse compress model.onnx --calib samples.npz --retrain train.npz
      onnxfuse compress model.onnx --passes merge:layers=0.5 --calib samples.npz \\
        --retrain train.npz --schedule exponential:steps=4
    """
    from onnxfuse.commands import compress as command
    from onnxfuse.report.compress_view import compress_view

    place = target(output, model, "compressed")
    with progress(showing.quiet) as bars:
        result = command.compress(
            model,
            passes,
            recipe=recipe,
            output=place,
            calib=calib,
            held_out=held_out,
            max_error=max_error,
            max_drop=max_drop,
            metric=metric,
            confidence=confidence,
            retrain=retrain,
            epochs=epochs,
            lr=lr,
            schedule=schedule,
            seed=showing.seed,
            report=report,
            dump=dump,
            dry_run=showing.dry_run,
            progress=bars,
            instruments=[bars],
            **vars(running),
        )
    view = compress_view(result.report, verbose=showing.verbose, explain=showing.explain)
    return finish(result, view, place, json=showing.json, quiet=showing.quiet)
