"""Channel groups for people: what each would touch if it were cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxfuse.report.tables import heading, paragraph
from onnxfuse.wording import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.channels.summary import GroupSummary, TouchSummary


def channels_view(groups: Sequence[GroupSummary]) -> Iterator[RenderableType]:
    """Every group that can be cut with all that a cut touches, then the others with the reason."""
    free = [group for group in groups if group.frozen is None]
    yield heading(f"{counted(len(groups), 'channel group')}, {len(free)} can be cut")
    for group in free:
        yield paragraph(_heading(group), 2)
        for title, touches in _by_role(group):
            yield paragraph(f"{title} {', '.join(map(_place, touches))}", 6)
        if group.numbers:
            yield paragraph(f"sets {', '.join(group.numbers)}", 6)
        if group.statistics:
            yield paragraph(f"changes the statistics of {', '.join(group.statistics)}", 6)
    for group in groups:
        if group.frozen is not None:
            yield paragraph(f"{_heading(group)}: frozen, {group.frozen}", 2)


def _heading(group: GroupSummary) -> str:
    blocks = "" if group.structure == f"[{group.size}]" else f", {group.structure}"
    return f"{group.name}: {group.size}{blocks}"


def _by_role(group: GroupSummary) -> Iterator[tuple[str, list[TouchSummary]]]:
    reads = [t for t in group.touches if "consumer" in t.roles]
    makes = [t for t in group.touches if t not in reads]
    yield from ((title, own) for title, own in (("makes", makes), ("reads", reads)) if own)


def _place(touch: TouchSummary) -> str:
    each = f" x {touch.per_index}" if touch.per_index > 1 else ""
    return f"{touch.weight} axis {touch.axis}{each}"
