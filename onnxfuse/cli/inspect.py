"""`onnxfuse inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxfuse.cli.options import Calib, JsonOption, Provider, Threads
from onnxfuse.cli.output import show, warn
from onnxfuse.errors import InputError


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file.")],
    calib: Calib = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", show_default=False, help="Time the model on one sample.")
    ] = True,
    channels: Annotated[
        bool, typer.Option("--channels", help="List the groups of coupled channels and all they touch.")
    ] = False,
    growth: Annotated[
        bool,
        typer.Option("--grow", help="List where the network can become wider, deeper, its kernels larger."),
    ] = False,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Tell how alike layers of one kind are.")
    ] = False,
    criterion: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of --similarity: euclidean, covariance, kl, aligned, centroids or (default) wasserstein.",
        ),
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="With --similarity: compare attention layers head by head.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="With --similarity: draw heat maps of it.")
    ] = None,
    provider: Provider = "auto",
    threads: Threads = None,
    json: JsonOption = False,
) -> int:
    """Show what is in a model.

    Operators, cost, linear operators, and the regions that could be fused; with --channels the groups of
    channels that only make sense together; with --grow the sites of 'onnxfuse grow'; with --similarity how
    far the weights of layers are from each other.

    \b
    Examples:
      onnxfuse inspect model.onnx --no-latency
      onnxfuse inspect model.onnx --similarity --criterion kl --plot kl.png
    """
    from onnxfuse.commands import inspect as command
    from onnxfuse.report.channels_view import channels_view
    from onnxfuse.report.growth_view import growth_view
    from onnxfuse.report.inspect_view import inspect_view
    from onnxfuse.report.similarity_view import similarity_view

    if criterion is not None and not similarity:
        raise InputError("--criterion needs --similarity")
    found = command.inspect(
        model,
        calib=calib,
        measure_latency=latency,
        channels=channels,
        growth=growth,
        similarity=(criterion or "wasserstein") if similarity else None,
        heads=heads,
        plot=plot,
        provider=provider,
        threads=threads,
    )
    if json:
        print(found.to_json())
    else:
        show(inspect_view(found))
        if found.channels is not None:
            show(channels_view(found.channels))
        if found.growth is not None:
            show(growth_view(found.growth))
        if found.similarity is not None:
            show(similarity_view(found.similarity))
    warn(found.warnings)
    return 0
