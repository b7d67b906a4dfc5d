"""The output of commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from onnxfuse.wording import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.report.live import LiveProgress
    from onnxfuse.results import RunResult

PROGRAM = "onnxfuse"


def say(message: str) -> None:
    """Print one line on stderr, without anything that could drive a terminal."""
    print(f"{PROGRAM}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def say_as_json(command: str, kind: str, exit_code: int, reason: str, traceback: str | None) -> None:
    """Print on stdout, as JSON, why a command came to no result.

    Args:
        command: its name.
        kind: the class of the error: "InputError", "NotApplicableError", "VerificationError", "UsageError",
            "Interrupted" or "Bug".
        exit_code: of the program.
        reason: the line that goes to stderr, without the program's name.
        traceback: of a bug; None for other errors.
    """
    from onnxfuse.results import json_text

    found = {"error": kind, "exit_code": exit_code, "reason": printable(" ".join(reason.split()))}
    print(json_text({**found, **({} if traceback is None else {"traceback": traceback})}, command))
    sys.stdout.flush()


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on stderr, once all of stdout is there."""
    sys.stdout.flush()
    for warning in warnings:
        say(f"warning: {warning}")


def show(view: Iterable[RenderableType]) -> None:
    """Print a view on stdout."""
    from onnxfuse.report.tables import print_view

    print_view(view, sys.stdout)


def progress(quiet: bool) -> LiveProgress:
    """Progress bars on stderr, where that is a terminal."""
    from rich.console import Console

    from onnxfuse.report.live import LiveProgress

    return LiveProgress(Console(stderr=True, quiet=quiet))


def finish(result: RunResult, view: Iterable[RenderableType], target: str, *, json: bool, quiet: bool) -> int:
    """Print the end of a run that makes a model; the exit code.

    Args:
        result: of the run.
        view: of its report, for people.
        target: where the model was to be written.
        json: print that instead.
        quiet: print warnings and errors only.
    """
    if json:
        print(result.to_json())
    elif not quiet:
        show(view)
    warn(result.report.warnings)
    if not result.ok:
        say(f"error: {result.reason}; no model was written")
    elif not (json or quiet):
        print(f"\nwrote {result.written}" if result.written else f"\ndry run: would have written {target}")
    return result.exit_code
