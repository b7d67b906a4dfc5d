"""The table of operators for people: a line for each, with what the analyses know of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxfuse.ops.table import Kind

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.ops.coverage import OperatorInfo

_OWN = {"rule": "rule", "default": "kind"}


def operators_view(infos: Sequence[OperatorInfo]) -> Iterator[RenderableType]:
    """Operators by kind: where each has a rule of its own or of its kind, and what it means to have none."""
    facets = list(infos[0].facets)
    order = list(Kind)
    ordered = sorted(infos, key=lambda info: order.index(Kind[info.kind.upper()]))
    for kind, group in groupby(ordered, key=lambda info: info.kind):
        yield Text(f"\n{kind}: {Kind[kind.upper()].value}", style="bold")
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("operator", overflow="fold", width=38)
        for facet in facets:
            table.add_column(facet, no_wrap=True)
        for info in group:
            name = f"{info.domain}::{info.name}" if info.domain else info.name
            table.add_row(Text(name), *(_OWN.get(info.facets[facet], "-") for facet in facets))
        yield Padding(table, (0, 0, 0, 2))
    yield Text("\nrule: one of its own; kind: that of its kind or traits; -: none, which means", style="bold")
    for facet in facets:
        without = dict.fromkeys(info.facets[facet] for info in infos if info.facets[facet] not in _OWN)
        if without:
            yield Padding(Text(f"{facet}: {', or '.join(without)}"), (0, 0, 0, 2))
