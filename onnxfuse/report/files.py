"""`--report DIR`: `report.json` for machines and `report.txt`, the tables of the console as plain text."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxfuse.errors import InputError
from onnxfuse.report.compare_view import verify_view
from onnxfuse.report.compress_view import compress_view
from onnxfuse.report.tables import plain_text
from onnxfuse.results import json_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.results import Report, VerifyResult


def check_folder(folder: Path) -> None:
    """Refuses, before a long run, a place where no report can be written.

    Raises:
        InputError: it is no folder, or can't be written to.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise InputError(f"cannot write the report to '{folder}': '{existing}' is not a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"cannot write the report to '{folder}': '{existing}' is not writable")


def write_report(folder: Path, report: Report, command: str) -> None:
    """Write both files about a run.

    Args:
        folder: is made where it is missing.
        report: of a run.
        command: that made it.

    Raises:
        InputError: they can't be written.
    """
    view = compress_view(report, verbose=True, explain=True)
    _write(folder, view, json_text(report, command), report.warnings, report.reason)


def write_verification(folder: Path, result: VerifyResult) -> None:
    """Write both files about a verification; the folder is made where it is missing.

    Raises:
        InputError: they can't be written.
    """
    _write(folder, verify_view(result), result.to_json(), result.warnings, result.reason)


def _write(
    folder: Path,
    view: Iterable[RenderableType],
    record: str,
    warnings: Sequence[str],
    reason: str | None,
) -> None:
    """Write both files, each whole or not at all."""
    said = [*(f"WARNING: {warning}" for warning in warnings), *([reason] if reason else [])]
    lines = "".join(f"{line}\n" for line in said)
    text = f"{plain_text(view)}\n{lines}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("report.json", record + "\n"), ("report.txt", text)):
            write_whole(folder / name, content.encode("utf-8", errors="backslashreplace"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write the report to '{folder}': {reason}") from error


def write_whole(path: Path, content: bytes) -> None:
    """The file appears whole or not at all.

    Raises:
        OSError, ValueError: it can't be written.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        staged.write_bytes(content)
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
