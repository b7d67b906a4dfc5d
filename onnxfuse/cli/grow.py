"""`onnxfuse grow`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer

from onnxfuse.cli.options import (
    Calib,
    ModelFile,
    ReportFolder,
    Running,
    Showing,
    grouped,
    output_option,
    target,
)
from onnxfuse.cli.output import finish, progress
from onnxfuse.errors import InputError

SiteValue = TypeVar("SiteValue", int, float)


@grouped
def grow(
    *,
    model: ModelFile,
    widen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE=RATIO",
            help="So many times as many channels, neurons or heads. Repeatable.",
        ),
    ] = None,
    deepen: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE[=COUNT]", help="So many more layers or residual blocks. Repeatable."),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE=SIZE", help="Kernels of that size along every axis. Repeatable."),
    ] = None,
    scheme: Annotated[
        str, typer.Option(metavar="NAME", help="r2r or net2net; to widen, also netmorph.")
    ] = "r2r",
    noise: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="How far net2net's copies differ; default 0.1 of the weights' spread."
        ),
    ] = None,
    output: Annotated[str | None, output_option("grown")] = None,
    calib: Calib = None,
    running: Running,
    report: ReportFolder = None,
    showing: Showing,
) -> int:
    """Make a network wider or deeper, its function unchanged.

    Or its kernels larger; for training further. SITE is the name of an operator, a pattern, or all;
    'onnxfuse inspect --grow' lists what there is, 'onnxfuse passes' all options of widen, deepen and kernel,
    which compress takes, too.

    \b
    Examples:
      onnxfuse grow model.onnx --widen all=1.5 --calib samples.npz
      onnxfuse grow model.onnx --deepen 'layer1*' --kernel conv1=5 \\
        --scheme net2net -o out.onnx
    """
    from onnxfuse.commands import grow as command
    from onnxfuse.report.compress_view import compress_view

    place = target(output, model, "grown")
    with progress(showing.quiet) as bars:
        result = command.grow(
            model,
            widen=_sites(widen, "--widen", float),
            deepen=_sites(deepen, "--deepen", int, default=1),
            kernel=_sites(kernel, "--kernel", int),
            scheme=scheme,
            noise=noise,
            output=place,
            calib=calib,
            seed=showing.seed,
            report=report,
            dry_run=showing.dry_run,
            progress=bars,
            instruments=[bars],
            **vars(running),
        )
    view = compress_view(result.report, verbose=showing.verbose, explain=showing.explain)
    return finish(result, view, place, json=showing.json, quiet=showing.quiet)


def _sites(
    asked: Sequence[str] | None,
    option: str,
    kind: Callable[[str], SiteValue],
    default: SiteValue | None = None,
) -> dict[str, SiteValue]:
    """`SITE=VALUE`, each, as a mapping; without a value the default, if there is one."""
    found: dict[str, SiteValue] = {}
    for text in asked or ():
        site, equals, value = text.rpartition("=")
        if not equals and default is not None:
            found[text] = default
            continue
        try:
            found[site] = kind(value)
        except ValueError:
            raise InputError(f"{option} '{text}' is not of the form SITE=NUMBER") from None
    return found
