"""The command line: parse, call `onnxfuse.api`, print, exit code.

Exit codes: 0 done; 1 verification or a budget failed; 2 usage or bad input; 3 a model that the request can't
be applied to; 130 interrupted. What the user can solve is one line on stderr; anything else is a bug and a
traceback. Only what was asked for goes to stdout. ONNX and ONNX Runtime are imported by the commands that
need them, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from onnxfuse.errors import InputError, OnnxfuseError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.api import Result

Number = TypeVar("Number", int, float)
PROGRAM = "onnxfuse"
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BROKEN_PIPE = 141  # 128 + SIGPIPE

# The base of all errors in usage: click's, of which newer versions of typer have a copy of their own.
_UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="DATA",
        help="Samples: .npz (arrays by input name, rows are samples; labels under 'labels'), a folder of "
        ".npy or .npz, a Polygraphy feed .json, or script.py:load_data. Without: made-up samples.",
    ),
]
Samples = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use about N samples; default all.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows in a batch.")]
Provider = Annotated[str, typer.Option(metavar="NAME", help="ONNX Runtime provider: auto, cpu, cuda, ...")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; default all cores.")]
Rate = Annotated[
    float | None,
    typer.Option("--lr", metavar="X", help="The highest learning rate; default 0.0001, of sgd 0.001."),
]
ReportFolder = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Write report.json and report.txt; for a failed run, too."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Do everything, but don't write the model.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="List all that was done, and all that was not, with reasons.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every change.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. `arguments` are those of the process unless given."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names from a model, in a locale that lacks them
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except OnnxfuseError as error:
        _say(f"error: {error}")
        return error.exit_code
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else PROGRAM
        _say(f"error: {error.format_message().rstrip('.')} (try '{where} --help')")
        return InputError.exit_code
    except KeyboardInterrupt:
        _say("interrupted; no model was written")
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has gone. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _run(arguments: Sequence[str]) -> int:
    """Without typer's own `main`, which prints usage errors in several lines and hides interrupts."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, list(arguments) or ["--help"]) as context:
            result = command.invoke(context)
    except typer.Exit as leaving:
        return int(leaving.exit_code)
    return int(result or 0)


def _say(message: str) -> None:
    """One line on stderr, without anything that could drive a terminal."""
    line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"{PROGRAM}: {shown}", file=sys.stderr, flush=True)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}")


def _show(view: Iterable[RenderableType]) -> None:
    from onnxfuse.report.console import show

    show(view, sys.stdout)


def _print_json(value: Any, command: str) -> None:
    import json

    from onnxfuse.report.record import as_json

    print(json.dumps(as_json(value, command), indent=2, allow_nan=False))


def _print_version(wanted: bool) -> None:
    if wanted:
        from onnxfuse import __version__

        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """Rewrite ONNX models and prove the result in ONNX Runtime.

    \b
    Exit codes: 0 done; 1 verification or a budget failed, nothing written;
    2 usage or bad input; 3 a model that the request can't be applied to.

    \b
    Example:
      onnxfuse compress model.onnx --calib samples.npz --max-error 0.05
    """


@app.command()
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file; it is never written to.")],
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
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Where to write; default NAME-compressed.onnx in the current folder. Replaced if it exists.",
        ),
    ] = None,
    calib: Calib = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Relative error of any output allowed, on held-out samples."),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="D", help="Drop of the metric allowed, on held-out samples.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="top1, mse, nll or FILE.py:function; default top1 where labels are class numbers.",
        ),
    ] = None,
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
    samples: Samples = None,
    batch_size: BatchSize = 64,
    provider: Provider = "auto",
    threads: Threads = None,
    report: ReportFolder = None,
    dump: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the model after every pass, and a journal.")
    ] = None,
    json: Json = False,
    dry_run: DryRun = False,
    explain: Explain = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random; default 0.")] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Run passes over a model, check every one, and write the result.

    Each pass works on a copy, which is checked in ONNX Runtime against what the pass promises. If any check
    or budget fails, nothing is written.

    \b
    Examples:
      onnxfuse compress model.onnx --calib samples.npz
      onnxfuse compress model.onnx --passes fold,fuse:max_blocks=4 -o out.onnx
      onnxfuse compress model.onnx --calib samples.npz --max-drop 0.01 --explain
      onnxfuse compress model.onnx --calib samples.npz --retrain train.npz
      onnxfuse compress model.onnx --passes merge:layers=0.5 --calib samples.npz \\
        --retrain train.npz --schedule exponential:steps=4
    """
    from rich.console import Console

    from onnxfuse import api
    from onnxfuse.report.live import LiveProgress

    target = output if output is not None else f"{Path(model).stem}-compressed.onnx"
    with LiveProgress(Console(stderr=True, quiet=quiet)) as progress:
        result = api.compress(
            model,
            passes,
            recipe=recipe,
            output=target,
            calib=calib,
            held_out=held_out,
            samples=samples,
            batch_size=batch_size,
            max_error=max_error,
            max_drop=max_drop,
            metric=metric,
            retrain=retrain,
            epochs=epochs,
            lr=lr,
            schedule=schedule,
            provider=provider,
            threads=threads,
            seed=seed,
            report=report,
            dump=dump,
            dry_run=dry_run,
            progress=progress,
            instruments=[progress],
        )
    return _finish(result, "compress", target, json=json, quiet=quiet, verbose=verbose, explain=explain)


def _finish(
    result: Result, command: str, target: str, *, json: bool, quiet: bool, verbose: bool, explain: bool
) -> int:
    """Print what came of passes; the exit code."""
    from onnxfuse.report.console import compress_view

    if json:
        _print_json(result.report, command)
    elif not quiet:
        _show(compress_view(result.report, verbose=verbose, explain=explain))
    sys.stdout.flush()
    _warn(result.report.warnings)
    if not result.ok:
        _say(f"error: {result.reason}; no model was written")
    elif not (json or quiet):
        print(f"\nwrote {result.written}" if result.written else f"\ndry run: would have written {target}")
    return result.exit_code


@app.command()
def grow(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file; it is never written to.")],
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
    scheme: Annotated[str, typer.Option(metavar="NAME", help="r2r, net2net, or to widen netmorph.")] = "r2r",
    noise: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="How far net2net's copies differ; default 0.1 of the weights' spread."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Where to write; default NAME-grown.onnx in the current folder. Replaced if it exists.",
        ),
    ] = None,
    calib: Calib = None,
    samples: Samples = None,
    batch_size: BatchSize = 64,
    provider: Provider = "auto",
    threads: Threads = None,
    report: ReportFolder = None,
    json: Json = False,
    dry_run: DryRun = False,
    explain: Explain = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the new weights; default 0.")] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Make a network wider or deeper, its function unchanged.

    Or its kernels larger; for training further. SITE is the name of an operator, a pattern, or all;
    'onnxfuse inspect --grow' lists what there is, 'onnxfuse passes' all options of widen, deepen and kernel,
    which compress takes, too.

    \b
    Examples:
      onnxfuse grow model.onnx --widen all=1.5 --calib samples.npz
      onnxfuse grow model.onnx --deepen 'layer1*' --kernel conv1=5 --scheme net2net -o out.onnx
    """
    from rich.console import Console

    from onnxfuse import api
    from onnxfuse.report.live import LiveProgress

    target = output if output is not None else f"{Path(model).stem}-grown.onnx"
    with LiveProgress(Console(stderr=True, quiet=quiet)) as progress:
        result = api.grow(
            model,
            widen=_sites(widen, "--widen", float),
            deepen=_sites(deepen, "--deepen", int, default=1),
            kernel=_sites(kernel, "--kernel", int),
            scheme=scheme,
            noise=noise,
            output=target,
            calib=calib,
            samples=samples,
            batch_size=batch_size,
            provider=provider,
            threads=threads,
            seed=seed,
            report=report,
            dry_run=dry_run,
            progress=progress,
            instruments=[progress],
        )
    return _finish(result, "grow", target, json=json, quiet=quiet, verbose=verbose, explain=explain)


def _sites(
    asked: Sequence[str] | None, option: str, kind: Callable[[str], Number], default: Number | None = None
) -> dict[str, Number]:
    """`SITE=VALUE`, each, as a mapping; without a value the default, if there is one."""
    found: dict[str, Number] = {}
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


@app.command()
def retrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file; it is never written to.")],
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
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Where to write; default NAME-retrained.onnx in the current folder. Replaced if it exists.",
        ),
    ] = None,
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
    json: Json = False,
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
    from rich.console import Console

    from onnxfuse import api
    from onnxfuse.report.console import retrain_view
    from onnxfuse.report.live import LiveProgress

    target = output if output is not None else f"{Path(model).stem}-retrained.onnx"
    silent = int(os.environ.get("RANK", 0)) > 0  # torchrun: the first process speaks for all
    try:
        with LiveProgress(Console(stderr=True, quiet=quiet or silent)) as progress:
            result = api.retrain(
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
                output=target,
                progress=progress,
            )
    except OnnxfuseError as error:
        if silent:
            return error.exit_code
        raise
    except KeyboardInterrupt:
        if Path(f"{target}.checkpoint").exists():
            _say(f"the same command goes on from '{target}.checkpoint'")
        raise
    if silent:
        return result.exit_code
    if json:
        _print_json(result.report, "retrain")
    elif not quiet:
        _show(retrain_view(result.report))
    sys.stdout.flush()
    _warn(result.report.warnings)
    if not result.ok:
        _say(f"error: {result.reason}; no model was written")
    elif not (json or quiet):
        print(f"\nwrote {result.written}")
    return result.exit_code


@app.command()
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
        bool, typer.Option("--heads", help="With --similarity: the layers of attentions head by head.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="With --similarity: draw heat maps of it.")
    ] = None,
    provider: Provider = "auto",
    threads: Threads = None,
    json: Json = False,
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
    from onnxfuse import api
    from onnxfuse.report.channels_view import channels_view
    from onnxfuse.report.console import inspect_view
    from onnxfuse.report.growth_view import growth_view
    from onnxfuse.report.similarity_view import similarity_view

    if criterion is not None and not similarity:
        raise InputError("--criterion needs --similarity")
    found = api.inspect(
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
        _print_json(found, "inspect")
    else:
        _show(inspect_view(found))
        if found.channels is not None:
            _show(channels_view(found.channels))
        if found.growth is not None:
            _show(growth_view(found.growth))
        if found.similarity is not None:
            _show(similarity_view(found.similarity))
    sys.stdout.flush()
    _warn(found.warnings)
    return 0


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to be held against it.")],
    calib: Calib = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Relative error allowed; default: what float noise explains."),
    ] = None,
    samples: Samples = None,
    batch_size: BatchSize = 64,
    provider: Provider = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check that two models compute the same.

    Exit code 0 if they do, 1 if they don't. What counts as the same: a difference within eight times what the
    reference differs from itself by float noise, or a relative error of at most --max-error.

    \b
    Example:
      onnxfuse verify model.onnx smaller.onnx --calib samples.npz --max-error 0.1
    """
    from onnxfuse import api
    from onnxfuse.report.console import verify_view

    result = api.verify(
        a,
        b,
        calib=calib,
        max_error=max_error,
        samples=samples,
        batch_size=batch_size,
        provider=provider,
        threads=threads,
    )
    if json:
        _print_json(result, "verify")
    elif not quiet:
        _show(verify_view(result))
    sys.stdout.flush()
    _warn(result.warnings)
    if not result.passed:
        _say(f"error: {result.reason}")
    return 0 if result.passed else 1


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="One model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.")],
    calib: Calib = None,
    samples: Samples = None,
    batch_size: BatchSize = 64,
    provider: Provider = "auto",
    threads: Threads = None,
    json: Json = False,
) -> int:
    """Show two models side by side.

    Nodes, weights, cost, and outputs on the same samples.

    \b
    Example:
      onnxfuse diff model.onnx smaller.onnx --calib samples.npz
    """
    from onnxfuse import api
    from onnxfuse.report.console import diff_view

    result = api.diff(
        a, b, calib=calib, samples=samples, batch_size=batch_size, provider=provider, threads=threads
    )
    if json:
        _print_json(result, "diff")
    else:
        _show(diff_view(result, (a, b)))
    sys.stdout.flush()
    _warn(result.warnings)
    return 0


@app.command()
def passes(json: Json = False) -> int:
    """List the passes and their options.

    \b
    Example:
      onnxfuse passes --json
    """
    from onnxfuse import api
    from onnxfuse.report.console import passes_view

    found = api.passes()
    if json:
        _print_json({"passes": found}, "passes")
    else:
        _show(passes_view(found))
    return 0
