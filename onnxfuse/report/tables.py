"""The parts of reports for people: tables that fit 80 columns, on a terminal, in a pipe or in `report.txt`.

Names come from files that others made. They are shown as they are except for control characters, which
could drive a terminal, and they are never read as markup; long ones keep their end, which tells more than the
start.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxfuse.wording import counted, printable, shortened

if TYPE_CHECKING:
    from onnxfuse.results import Report, RetrainReport
    from onnxfuse.runtime.latency import Latency

WIDTH = 80
SHOWN = 10
"""Entries of a long list."""


class _Console(Console):
    """A closed pipe is for the caller to handle."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(file: IO[str], **kind: Any) -> Console:
    return _Console(file=file, markup=False, emoji=False, highlight=False, **kind)


def print_view(view: Iterable[RenderableType], file: IO[str]) -> None:
    """Print a view: with colors on a terminal, else as plain text."""
    screen = _console(file)
    if screen.is_terminal:
        for part in view:
            screen.print(part)
    else:
        file.write(plain_text(view, screen.width))


def plain_text(view: Iterable[RenderableType], width: int = WIDTH) -> str:
    """A view as text, without colors."""
    buffer = io.StringIO()
    paper = _console(buffer, width=width, color_system=None)
    for part in view:
        paper.print(part)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def make_table(*columns: str, right: Sequence[int] = (), fold: Sequence[int] = ()) -> Table:
    """A table without lines; `right` are aligned right, `fold` may wrap."""
    table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="bold")
    for index, title in enumerate(columns):
        table.add_column(
            title,
            justify="right" if index in right else "left",
            overflow="fold",
            no_wrap=index not in fold,
        )
    return table


def fact_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of two columns, the first in bold."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, Text(value))
    return table


def heading(text: str) -> Text:
    """A line in bold, with an empty one before it."""
    return Text(f"\n{text}", style="bold")


def paragraph(text: str, indent: int = 0) -> Padding:
    """A paragraph; names that would fill a line by themselves are shortened, both of `first..last`."""
    words = (
        word if len(word) < WIDTH else " .. ".join(shortened(part, 36) for part in word.split(".."))
        for word in printable(text).split(" ")
    )
    return Padding(Text(" ".join(words), overflow="fold"), (0, 0, 0, indent), expand=False)


def more(shown: int, total: int, indent: int = 0) -> Iterator[RenderableType]:
    """The end of a list that is shown in part: "and 3 more".

    Args:
        shown: number of entries shown.
        total: number of entries.
        indent: of the line.
    """
    if total > shown:
        yield paragraph(f"and {total - shown:,} more", indent)


def runtime_fact(report: Report | RetrainReport, latency: Latency | None = None) -> tuple[str, str]:
    """The provider, the threads (of `latency`, too, if it had others) and the seed of a run, as a row of
    `fact_table`."""
    provider = report.providers[0].removesuffix("ExecutionProvider")
    own = ""
    if latency is not None and latency.threads != report.threads:
        own = f" ({latency.threads} for latency)"
    return "runtime", f"{provider}, {counted(report.threads, 'thread')}{own}, seed {report.seed}"
