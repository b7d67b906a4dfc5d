"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

ModelFile = Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file; it is never written to.")]
Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="DATA",
        help="Samples: .npz (arrays by input name, rows are samples; labels under 'labels'), a folder of "
        ".npy or .npz, a Polygraphy feed .json, or script.py:load_data. Without: made-up samples.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows in a batch.")]
MostRows = Annotated[
    int, typer.Option(min=1, metavar="N", help="The most rows of a batch; fewer where --memory asks for it.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What a run may take beside the models: 512MB, 2GB; default a quarter of what is free, "
        "1 GB at most.",
    ),
]
Provider = Annotated[str, typer.Option(metavar="NAME", help="ONNX Runtime provider: auto, cpu, cuda, ...")]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads; default all cores, and one for latency.")
]
Rate = Annotated[
    float | None,
    typer.Option("--lr", metavar="X", help="The highest learning rate; default 0.0001, of sgd 0.001."),
]
ReportFolder = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Write report.json and report.txt; for a failed run, too."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="D",
        help="Drop of the metric allowed, on held-out samples: 0.01 is one point of top1.",
    ),
]
Confidence = Annotated[
    str | None,
    typer.Option(
        "--confidence",
        metavar="P|none",
        help="Of the paired interval that must keep to --max-drop; none: only the change itself must; "
        "default 0.95.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="top1, mse, nll (of labels), agreement, cosine (of the original's outputs, no labels needed) or "
        "FILE.py:function; default top1 where labels are class numbers.",
    ),
]


def output_option(suffix: str) -> Any:
    """The option `--output`, whose default is MODEL's name and `suffix`."""
    return typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help=f"Where to write; default NAME-{suffix}.onnx in the current folder. Replaced if it exists.",
    )


def target(output: str | None, model: str, suffix: str) -> str:
    """The path to write to, as `output_option` says.

    Args:
        output: given by the user.
        model: path of the model.
        suffix: see `output_option`.
    """
    return output if output is not None else f"{Path(model).stem}-{suffix}.onnx"


@dataclass(frozen=True)
class Running:
    """How models are run: arguments of the same names of all commands that compare two."""

    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use about N samples; default all.")
    ] = None
    batch_size: MostRows = 64
    memory: Memory = None
    provider: Provider = "auto"
    threads: Threads = None


@dataclass(frozen=True)
class Showing:
    """How a run of passes ends."""

    json: JsonOption = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything, but don't write the model.")] = (
        False
    )
    explain: Annotated[
        bool, typer.Option("--explain", help="List all that was done, and all that was not, with reasons.")
    ] = False
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random; default 0.")] = None
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every change.")] = False
    quiet: Quiet = False


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """The same command with each field of its dataclasses as an option: typer, which reads signatures, knows
    no groups of options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            inner = get_type_hints(groups[name], include_extras=True)
            parameters += [_option(f.name, f.default, inner[f.name]) for f in fields(groups[name])]
        else:
            parameters.append(_option(name, parameter.default, hints[name]))

    @functools.wraps(command)
    def flat(**given: Any) -> int:
        made = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        return command(**given, **made)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
