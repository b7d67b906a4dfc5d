"""How alike layers are, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxfuse.analysis.layer_similarity import nearest_layers, shown
from onnxfuse.report.tables import WIDTH, heading, make_table, paragraph
from onnxfuse.wording import counted, shortened

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.analysis.layer_similarity import Likeness

_MATRIX = 8  # layers of which the distances of all pairs fit a line
_PARTNERS = 3
_CELL = 7  # columns of a distance, with the space before it
_PARTNER = 11  # of a number and a distance


def similarity_view(found: Sequence[Likeness]) -> Iterator[RenderableType]:
    """Of each class all distances, or the nearest partners of each layer where there are many."""
    if not found:
        yield heading("no two layers can be compared")
    for likeness in found:
        own = len(likeness.names)
        what = "head" if "heads" in likeness.role else "layer"
        yield heading(f"{likeness.title}: {likeness.criterion} distance of {counted(own, what)}")
        yield _matrix(likeness) if own <= _MATRIX else _partners(likeness)
    if any(len(likeness.names) > _MATRIX for likeness in found):
        yield paragraph("Of many the nearest others are shown; --json has all.")


def _matrix(likeness: Likeness) -> RenderableType:
    """The lower triangle; columns are named by number."""
    size = len(likeness.names)
    table = make_table("", "", *map(str, range(1, size)), right=range(2, size + 1))
    for row, name in enumerate(likeness.names):
        values = [shown(value) for value in likeness.distances[row][:row]]
        table.add_row(f"  {row + 1}", shortened(name, WIDTH - 5 - _CELL * (size - 1)), *values)
    return table


def _partners(likeness: Likeness) -> RenderableType:
    table = make_table("", "", *("nearest" if not place else "" for place in range(_PARTNERS)))
    for row, name in enumerate(likeness.names):
        near = nearest_layers(likeness, row)[:_PARTNERS]
        cells = [f"{other + 1}: {shown(value)}" for value, other in near] or ["-"]
        table.add_row(f"  {row + 1}", shortened(name, WIDTH - 7 - _PARTNERS * (_PARTNER + 2)), *cells)
    return table
