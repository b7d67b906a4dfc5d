"""What `select` knows of the groups that it cuts, and what it tells of them afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxfuse.analysis.intervals.rules import intervals
from onnxfuse.channels import ratio
from onnxfuse.channels.consumers import Consumer, RowView
from onnxfuse.channels.groups import ChannelGroups, Group, find_groups
from onnxfuse.channels.importance import Ranking, magnitudes, rank
from onnxfuse.channels.moments_seen import SETTLED_ROWS, Known, Statistics
from onnxfuse.findings import Change, Reached, Skip
from onnxfuse.fitting.rewriting import first_feed, seen_in_parts
from onnxfuse.fitting.search import SearchResult
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, PassResult

NOTED = 0.02
"""A layer that misses the ratio by more is named in the notes."""


@dataclass(frozen=True)
class Reading:
    """The groups, rankings and moments by which the channels to be cut are chosen.

    Attributes:
        groups: those that may be cut; `found` are all of the model.
        consumers: for each, who reads it.
        rankings: for each, the order in which channels go.
        dead: of each, the number of channels that are zero for every input; the first to go.
        seen: gives the moments of what the consumers see.
        full: for each, the number of channels that a ratio is of.
        unsettled: what consumers see through too few samples; known once the groups are ranked.
    """

    found: ChannelGroups
    groups: list[Group]
    consumers: Mapping[Group, list[Consumer]]
    rankings: dict[Group, Ranking]
    dead: Mapping[Group, int]
    seen: Seen
    full: Mapping[Group, int]
    unsettled: dict[RowView, Statistics] = field(default_factory=dict)

    def few_samples(self) -> Iterator[str]:
        """A note on the layers that the samples can't settle, and how many samples would."""
        if not self.unsettled:
            return
        need = {
            view: math.ceil(own.samples * SETTLED_ROWS * view.columns / own.rows)
            for view, own in self.unsettled.items()
        }
        worst = max(need, key=lambda view: need[view])
        several = f"{len(need)} tensors" if len(need) > 1 else "a tensor"
        yield (
            f"too few samples to tell the channels of {several} apart, so that less is cut there, and less "
            f"well: '{worst.tensor}' has {worst.columns:,} columns; some {need[worst]:,} samples would do"
        )


class Seen:
    """The moments of what the groups' consumers see; those of a single part are kept."""

    def __init__(
        self,
        model: Model,
        readers: Mapping[Group, list[Consumer]],
        context: Context,
        *,
        mask: str | None,
        wanted: bool,
        judged: int,
    ):
        """Prepare; nothing is run yet.

        Args:
            model: the one at hand.
            readers: of each group.
            context: of the pass.
            mask: see `fitting.rewriting.Mask`.
            wanted: whether anything is ranked or fitted by moments; else there are none.
            judged: see `fitting.rewriting.seen_in_parts`.
        """
        self._model = model
        self._views = {group: [consumer.view for consumer in own] for group, own in readers.items()}
        self._context, self._mask, self._wanted, self._judged = context, mask, wanted, judged
        self._kept: list[tuple[list[Group], Known]] = []

    def parts(self) -> Iterator[tuple[list[Group], Known]]:
        """Groups with the statistics of all their consumers' views."""
        if not self._wanted:
            yield list(self._views), Known({}, {})
            return
        if self._kept:
            yield from self._kept
            return
        parts = seen_in_parts(self._model, self._views, self._mask, self._context, self._judged)
        for number, part in enumerate(parts):
            self._kept = [] if number else [part]
            yield part


def rankings(
    model: Model,
    groups: Sequence[Group],
    reading: Reading,
    known: Mapping[RowView, Statistics] | None,
    dead: Mapping[Group, np.ndarray],
    least: Mapping[Group, int],
) -> dict[Group, Ranking]:
    """The order in which the channels of each group go.

    Args:
        model: the one at hand.
        groups: of it.
        reading: has their consumers.
        known: what these see; None ranks by the size of weights.
        dead: of each group, channels that go first.
        least: of each group, so many stay in any case.
    """
    if known is None:
        return {group: magnitudes(model, group, first=dead[group]) for group in groups}
    return {
        group: rank(model, group.size, reading.consumers[group], known, first=dead[group], least=least[group])
        for group in groups
    }


def full_sizes(
    model: Model, groups: Sequence[Group], skipped: list[Skip], context: Context
) -> dict[Group, int]:
    """The number of channels that a ratio is of, for each group: those in the first turn, where there are
    turns.

    Args:
        model: the one at hand.
        groups: of it.
        skipped: groups that are new since the first turn are added to it; they stay.
        context: of the pass.
    """
    whole = context.whole(model)
    if whole is model:
        return {group: group.size for group in groups}
    before = {group.name: group.size for group in find_groups(whole, first_feed(context), context.runtime)}
    skipped += [
        Skip((group.name,), f"{group.size} channels stay: they are not among those that the ratio is of")
        for group in groups
        if group.name not in before
    ]
    return {group: before[group.name] for group in groups if group.name in before}


def dead_channels(model: Model, groups: Sequence[Group]) -> dict[Group, np.ndarray]:
    """The channels of each group that are zero at every operator that reads them, whatever is fed."""
    known = intervals(model, model.shapes())
    dead = {}
    for group in groups:
        zero = np.full(group.size, bool(group.sinks) and not group.statistics)
        for sink in group.sinks:
            own = known.get(sink.tensor)
            places = np.zeros(sink.dim.size, bool) if own is None else own.zeros(sink.axis, sink.dim.size)
            zero &= places[group.places(sink.dim)].all(axis=1)
        dead[group] = np.flatnonzero(zero)
    return dead


def group_change(group: Group, kept: np.ndarray, reading: Reading) -> Change:
    """The report's line for one group."""
    removed = np.setdiff1d(np.arange(group.size), kept)
    dead = min(reading.dead[group], len(removed))
    idle = min(reading.rankings[group].idle, len(removed)) - dead
    said = [f", {dead} of them zero for every input"] if dead else []
    said += [f", {idle} never active on the samples"] if idle > 0 else []
    nodes = tuple(dict.fromkeys(node for touch in group.touches for node in touch.nodes))
    return Change(
        nodes or (group.name,),
        f"cut '{group.name}' from {group.size} to {len(kept)} channels{''.join(said)}",
        {
            "group": group.name,
            "structure": group.structure,
            "size": group.size,
            "width": len(kept),
            "removed": removed.tolist(),
            "always_zero": dead,
            "idle_on_samples": max(idle, 0),
            "cost": float(reading.rankings[group].cost[len(removed)]),
        },
    )


def ratio_result(
    made: PassResult, reading: Reading, kept: Mapping[Group, np.ndarray], asked: float
) -> SearchResult:
    """A model cut by a ratio, with the shares that were asked for and those that are gone: of each group,
    each layer and all.

    Args:
        made: the model.
        reading: of its groups.
        kept: the channels that stay of each group that was cut.
        asked: the ratio.
    """
    widths = {group: len(kept[group]) if group in kept else group.size for group in reading.groups}
    blocks = ratio.blocks(reading.groups)
    lost = {group: ratio.removed([own], reading.full, widths) for own in blocks for group in own.groups}
    groups = {group.name: group for group in reading.groups}
    changes = [
        _with_ratio(change, widths[groups[name]], reading.full[groups[name]], lost[groups[name]], asked)
        if (name := str(change.detail.get("group"))) in groups
        else change
        for change in made.changes
    ]
    whole = [group for group in reading.groups if not lost[group].gone]
    skipped = [
        Skip((group.name,), f"{group.size} channels stay: that is nearest to {asked:g} gone")
        for group in whole
    ]
    every = ratio.removed(blocks, reading.full, widths)
    note = f"{every.share:.3g} of the channels are gone, {asked:g} asked"
    worst = max(reading.groups, key=lambda group: abs(lost[group].share - asked))
    if abs(lost[worst].share - asked) > NOTED:
        note += f"; farthest off is '{worst.name}', {lost[worst].gone} of {lost[worst].channels}"
    reached = Reached("ratio", "channels", True, asked, every.share)
    result = replace(made, changes=changes, skipped=[*skipped, *made.skipped])
    return SearchResult(result, [note], reached=reached)


def _with_ratio(change: Change, width: int, full: int, layer: ratio.Removed, asked: float) -> Change:
    """The line for one group with the shares that are gone, of the group and of its layer.

    Args:
        change: the line.
        width: of the group, that is left.
        full: the number of channels that it had.
        layer: what is gone of all that it is multiplied with.
        asked: the ratio.
    """
    gone = 1 - width / full
    several = f", {layer.gone} of {layer.channels} of its layer" if layer.channels != full else ""
    return replace(
        change,
        what=f"{change.what}: {gone:.3g} gone{several}, {asked:g} asked",
        detail={**change.detail, "asked": asked, "gone": gone, "layer_gone": layer.share},
    )
