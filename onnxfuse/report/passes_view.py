"""The installed passes and their options, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from onnxfuse.report.tables import paragraph

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.pipeline.catalog import PassInfo


def passes_view(infos: Sequence[PassInfo]) -> Iterator[RenderableType]:
    """Each pass with its options and an example."""
    for index, info in enumerate(infos):
        head = Text("\n" if index else "").append(info.name, style="bold").append(f"  ({info.contract})")
        yield Group(head, paragraph(info.summary, 2))
        if info.options:
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for option in info.options:
                said = f"{option.help} ({option.type}; default {option.default})"
                table.add_row(f"    {option.name}", Text(said))
            yield table
        yield paragraph(f"example: --passes {info.example}", 2)
