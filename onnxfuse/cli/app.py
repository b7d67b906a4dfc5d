"""The program: its commands, and the exit codes and messages of their errors.

Exit codes: 0 done; 1 verification or a budget failed; 2 usage or bad input; 3 a model that the request can't
be applied to; 70 a bug of ours; 130 interrupted. What the user can solve is one line on stderr; anything else
is a bug and a traceback. Only what was asked for goes to stdout; with `--json` that includes the error.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from onnxfuse.cli.compress import compress
from onnxfuse.cli.diff import diff
from onnxfuse.cli.grow import grow
from onnxfuse.cli.inspect import inspect
from onnxfuse.cli.operators import operators
from onnxfuse.cli.output import PROGRAM, say, say_as_json
from onnxfuse.cli.passes import passes
from onnxfuse.cli.retrain import retrain
from onnxfuse.cli.verify import verify
from onnxfuse.errors import InputError, NotApplicableError, OnnxfuseError

COMMANDS = (compress, grow, retrain, inspect, verify, diff, passes, operators)
"""In the order of the help."""

_BUG = 70  # EX_SOFTWARE of sysexits.h: apart from 1, which says that a check has failed
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
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _left_alone()
    except (Exception, KeyboardInterrupt) as error:
        return _ended(error, given)


def _ended(error: BaseException, arguments: Sequence[str]) -> int:
    """Say why a command came to no result, on stderr and where JSON is wanted on stdout; the exit code."""
    if isinstance(error, MemoryError):
        error = NotApplicableError(
            f"out of memory ({error}); fewer --samples or a smaller --batch-size need less"
        )
    if isinstance(error, OnnxfuseError):
        kind, code, said = type(error).__name__, error.exit_code, f"error: {error}"
    elif isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else PROGRAM
        kind, code = "UsageError", InputError.exit_code
        said = f"error: {error.format_message().rstrip('.')} (try '{where} --help')"
    elif isinstance(error, KeyboardInterrupt):
        kind, code, said = "Interrupted", _INTERRUPTED, "interrupted; no model was written"
    else:
        kind, code, said = "Bug", _BUG, _bug_line(error)
    trace = "".join(traceback.format_exception(error)) if code == _BUG else None
    if "--json" in arguments:
        try:
            say_as_json(arguments[0], kind, code, said.removeprefix("error: "), trace)
        except BrokenPipeError:
            _left_alone()
    elif trace is not None:
        print(trace, end="", file=sys.stderr)
    say(said)
    return code


def _bug_line(error: BaseException) -> str:
    found = "".join(traceback.format_exception_only(error))
    return (
        f"error: this is a bug in {PROGRAM}, not in what you gave it: {found}. Nothing was proved. Please "
        "report it to the maintainers, with the traceback, the command and, if you can, the model"
    )


def _left_alone() -> int:
    """Whoever read stdout has gone. Python would complain when it flushes stdout at exit."""
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
    2 usage or bad input; 3 a model that the request can't be applied to;
    70 a bug in onnxfuse.

    \b
    Example:
      onnxfuse compress model.onnx --calib samples.npz --max-error 0.05
    """


for _command in COMMANDS:
    app.command()(_command)
