"""`--report DIR`: `report.json` for machines and `report.txt`, the tables of the console as plain text."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from onnxfuse.errors import InputError
from onnxfuse.report.compress_view import compress_view
from onnxfuse.report.tables import plain_text
from onnxfuse.results import json_text

if TYPE_CHECKING:
    from onnxfuse.results import Report


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
    """Write both files, each whole or not at all.

    Args:
        folder: is made where it is missing.
        report: of a run.
        command: that made it.

    Raises:
        InputError: they can't be written.
    """
    said = [
        *(f"WARNING: {warning}" for warning in report.warnings),
        *([report.reason] if report.reason else []),
    ]
    lines = "".join(f"{line}\n" for line in said)
    text = f"{plain_text(compress_view(report, verbose=True, explain=True))}\n{lines}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = json_text(report, command) + "\n"
        for name, content in (("report.json", record), ("report.txt", text)):
            write_whole(folder / name, content.encode("utf-8", errors="backslashreplace"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
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
