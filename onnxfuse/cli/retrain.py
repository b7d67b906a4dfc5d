"""`onnxfuse retrain`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from onnxfuse.cli.options import (
    BatchSize,
    JsonOption,
    ModelFile,
    Provider,
    Quiet,
    Rate,
    output_option,
    target,
)
from onnxfuse.cli.output import finish, progress, say
from onnxfuse.errors import OnnxfuseError


def retrain(
    model: ModelFile,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Samples: .npz (arrays by input name, rows are samples; labels under 'labels'), a folder of "
            ".npy or .npz, a Polygraphy feed .json, or script.py:load_data.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="A model of the same inputs and outputs to learn from."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="ce|mse|distill",
            help="Cross-entropy or squared error of the labels, or divergence from the teacher (mse: squared "
            "error); default distill with a teacher, else by the type of the labels.",
        ),
    ] = None,
    output: Annotated[str | None, output_option("retrained")] = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the samples.")] = 10,
    lr: Rate = None,
    optimizer: Annotated[str, typer.Option(metavar="adamw|sgd", help="How weights are updated.")] = "adamw",
    weight_decay: Annotated[
        float | None, typer.Option(metavar="X", help="Of matrices and kernels; default 0.01, of sgd 0.0001.")
    ] = None,
    batch_size: BatchSize = 64,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Weights to leave as they are: a name, or with * and ?. Repeatable."
        ),
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TENSOR[=THEIRS]", help="An inner tensor that is to follow the teacher's. Repeatable."
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of samples that choose and measure the best epoch.")
    ] = 0.2,
    patience: Annotated[
        int | None, typer.Option(metavar="N", help="Stop when N epochs brought nothing; default never.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="top1, mse, nll or FILE.py:function; default by the type of the labels.",
        ),
    ] = None,
    provider: Provider = "auto",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where PyTorch trains.")] = "auto",
    json: JsonOption = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything random.")] = 0,
    quiet: Quiet = False,
) -> int:
    """Train a model further in PyTorch.

    From labels, or from another model, the original of a compressed one for instance, on samples without
    labels. The weights of the best epoch go back to the same graph; nothing is written unless one is better
    than the start. A run that was killed goes on after its last epoch when the same command is given again.
    For several GPUs: torchrun --nproc-per-node 4 -m onnxfuse retrain ...

    \b
    Examples:
      onnxfuse retrain model.onnx --data train.npz --epochs 5
      onnxfuse retrain small.onnx --data images.npz --teacher big.onnx -o out.onnx
    """
    from onnxfuse.commands import retrain as command
    from onnxfuse.report.retrain_view import retrain_view

    place = target(output, model, "retrained")
    silent = int(os.environ.get("RANK", 0)) > 0  # torchrun: the first process speaks for all
    try:
        with progress(quiet or silent) as bars:
            result = command.retrain(
                model,
                data,
                teacher=teacher,
                loss=loss,
                epochs=epochs,
                lr=lr,
                optimizer=optimizer,
                weight_decay=weight_decay,
                batch_size=batch_size,
                freeze=freeze or (),
                match=match or (),
                held_out=held_out,
                patience=patience,
                metric=metric,
                seed=seed,
                provider=provider,
                device=device,
                output=place,
                progress=bars,
            )
    except OnnxfuseError as error:
        if silent:
            return error.exit_code
        raise
    except KeyboardInterrupt:
        if Path(f"{place}.checkpoint").exists():
            say(f"the same command goes on from '{place}.checkpoint'")
        raise
    if silent:
        return result.exit_code
    return finish(result, retrain_view(result.report), place, json=json, quiet=quiet)
