"""Channel groups, and all that a cut of them would touch, as plain data for reports."""

from __future__ import annotations

from dataclasses import dataclass

from onnxfuse.channels.groups import ChannelGroups, Group


@dataclass(frozen=True)
class TouchSummary:
    """An axis of a stored tensor that a cut edits: `per_index` positions for each channel; `roles` as in
    `channels.Touch`."""

    weight: str
    axis: int
    roles: tuple[str, ...]
    per_index: int


@dataclass(frozen=True)
class GroupSummary:
    """One group of coupled channels, as `channels.Group` has it.

    `numbers` are the attributes and list elements that a cut rewrites, each with its node; `sinks` the
    tensors that are summed up over the channels.
    """

    name: str
    size: int
    structure: str
    frozen: str | None
    statistics: tuple[str, ...]
    touches: tuple[TouchSummary, ...]
    numbers: tuple[str, ...]
    sinks: tuple[str, ...]


def summarize_groups(found: ChannelGroups) -> tuple[GroupSummary, ...]:
    """The summaries of all groups, in order."""
    return tuple(map(_summary, found))


def _summary(group: Group) -> GroupSummary:
    return GroupSummary(
        name=group.name,
        size=group.size,
        structure=group.structure,
        frozen=group.frozen,
        statistics=group.statistics,
        touches=tuple(TouchSummary(t.weight, t.axis, t.roles, t.map.shape[1]) for t in group.touches),
        numbers=tuple(f"{number.place} of '{number.place.node}'" for number in group.numbers),
        sinks=tuple(dict.fromkeys(sink.tensor for sink in group.sinks)),
    )
