"""The changes of a pass and what it left undone, for people: one line a reason, however often it came up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from onnxfuse.report.tables import WIDTH, heading, more, paragraph
from onnxfuse.wording import counted, shortened

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.findings import Skip
    from onnxfuse.pipeline.records import StepReport

_PLACES = 8  # places shown for one reason


def changes_view(step: StepReport) -> Iterator[RenderableType]:
    """A view of all changes that a pass made."""
    yield heading(f"{step.name}: {counted(len(step.changes), 'change')}")
    for what, places in _grouped((change.what, change.nodes) for change in step.changes):
        yield from _group(what, places)


def skips_view(name: str, skipped: Sequence[Skip]) -> Iterator[RenderableType]:
    """A view of all that `name`, a pass for instance, left undone, with the reasons."""
    yield heading(f"{name}: {len(skipped):,} not done")
    for reason, places in _grouped((skip.reason, skip.nodes) for skip in skipped):
        yield from _group(reason, places)


# A number that stands by itself, not one that is part of a name or a shape.
_NUMBER = re.compile(r"(?<![^\s(+-])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?=[%)]?(?:[\s;,:]|$))")


def _grouped(
    entries: Iterable[tuple[str, tuple[str, ...]]],
) -> Iterator[tuple[str, list[tuple[str, tuple[str, ...]]]]]:
    """Texts that differ in nothing but numbers become one, with ranges; each place keeps its own numbers."""
    groups: dict[tuple[str, ...], list[tuple[list[str], tuple[str, ...]]]] = {}
    for text, nodes in entries:
        groups.setdefault(tuple(_NUMBER.split(text)), []).append((_NUMBER.findall(text), nodes))
    for words, found in groups.items():
        columns = list(zip(*(numbers for numbers, _ in found), strict=True))
        ranges = [*map(_range, columns), ""]
        varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
        shared = "".join(word + between for word, between in zip(words, ranges, strict=True))
        yield shared, [(", ".join(numbers[index] for index in varying), nodes) for numbers, nodes in found]


def _range(numbers: Sequence[str]) -> str:
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low}..{high}"


def _group(text: str, places: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[RenderableType]:
    """One reason, how often it came up, and where."""
    times = f"{len(places)} x " if len(places) > 1 else ""
    only = _place(places[0][1]) if len(places) == 1 else ""
    if only and len(text) + len(only) + 4 <= WIDTH:
        yield paragraph(f"{text}  {only}", 2)
        return
    yield paragraph(f"{times}{text}", 2)
    for numbers, nodes in places[:_PLACES]:
        if nodes:
            yield paragraph(f"{_place(nodes)}: {numbers}" if numbers else _place(nodes), 6)
    yield from more(_PLACES, len(places), 6)


def _place(nodes: tuple[str, ...]) -> str:
    if len(nodes) <= 2:
        return " .. ".join(shortened(node, 34 if len(nodes) == 2 else 72) for node in nodes)
    return f"{shortened(nodes[0], 28)} .. {shortened(nodes[-1], 28)} ({len(nodes)} nodes)"
