"""The program: its commands, and the exit codes and messages of their errors.

Exit codes: 0 done; 1 verification or a budget failed; 2 usage or bad input; 3 a model that the request can't
be applied to; 130 interrupted. What the user can solve is one line on stderr; anything else is a bug and a
traceback. Only what was asked for goes to stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from onnxfuse.cli.compress import compress
from onnxfuse.cli.diff import diff
from onnxfuse.cli.grow import grow
from onnxfuse.cli.inspect import inspect
from onnxfuse.cli.operators import operators
from onnxfuse.cli.output import PROGRAM, say
from onnxfuse.cli.passes import passes
from onnxfuse.cli.retrain import retrain
from onnxfuse.cli.verify import verify
from onnxfuse.errors import InputError, OnnxfuseError

COMMANDS = (compress, grow, retrain, inspect, verify, diff, passes, operators)
"""In the order of the help."""

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
        say(f"error: {error}")
        return error.exit_code
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else PROGRAM
        say(f"error: {error.format_message().rstrip('.')} (try '{where} --help')")
        return InputError.exit_code
    except KeyboardInterrupt:
        say("interrupted; no model was written")
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


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
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


for _command in COMMANDS:
    app.command()(_command)
