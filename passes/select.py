"""Narrower layers: the channels that matter least are cut out, wherever they lie (MASKED, APPROXIMATE).

A channel is a class of positions over many tensors (`onnxfuse.channels`), and only whole classes are cut:

1. **Dead** channels come first: those that are zero wherever they are read, for every input
   (`onnxfuse.analysis.intervals`), and those that carried nothing on the samples.
2. **Rank.** From the moments of what a group's consumers read: what the loss of a channel costs them when
   they make up for it as well as they can, one ranking for all consumers together (`channels.importance`).
3. **Widths.** Each group is tried alone at a few widths to see what that does to the network's *outputs*; the
   ranking's costs fill in the others. A budget is then spent where it costs least
   (`onnxfuse.channels.budget`). Candidates are multiples of a step, since machines compute channels by the
   vector; under a latency budget only widths that this machine runs faster are candidates
   (`channels.timing`).
4. **Cut** (`channels.take`). The result must equal the original with the removed channels multiplied by zero
   (`channels.mask`): checked for every cut, before any weight is fitted. Without `compensate` that is all.
5. **Make up for it.** Consumers get the weights that are best for the original's moments. Then every linear
   operator is solved again in topological order, from the inputs it now gets to what the original computes,
   of which a cut tensor is held against the channels it has kept (`onnxfuse.fitting.walk`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from onnxfuse.analysis.cost import shapes_at
from onnxfuse.analysis.intervals.rules import intervals
from onnxfuse.channels import budget
from onnxfuse.channels.budget import LossCurve, Total, Widths
from onnxfuse.channels.consumers import Consumer, RowView, consumers
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import ChannelGroups, Group, find_groups
from onnxfuse.channels.importance import Ranking, Statistics, magnitudes, rank
from onnxfuse.channels.masking import mask
from onnxfuse.channels.timing import rewarded
from onnxfuse.data.rows import few_rows
from onnxfuse.errors import VerificationError
from onnxfuse.findings import Change, Skip
from onnxfuse.fitting.compensating import compensate
from onnxfuse.fitting.rewriting import (
    Mask,
    finished,
    first_feed,
    named,
    nothing,
    seen_in_parts,
    settled,
    walked,
)
from onnxfuse.fitting.search import SearchResult, error_bound, farthest
from onnxfuse.fitting.sites import check_mask
from onnxfuse.fitting.trials import Trials
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.goals import Goals, Share, gone, left
from onnxfuse.runtime import latency as latency_module

LEAST = 8
"""A group keeps at least one in so many channels."""

TRIED = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a group whose loss is tried; what lies between follows the ranking."""

MOST_WIDTHS = 16
"""Candidate widths of a group, about."""

MAC_LEVELS = tuple(level / 100 for level in range(95, 9, -5))
"""Shares of the MACs that are tried where only the error bound says how far to go."""

LATENCY_ATTEMPTS = 6
"""Cuts that are timed to meet a latency budget."""


class SelectOptions(Goals):
    """Options of `select`."""

    goals: ClassVar = {"ratio": gone, "macs": left, "params": left, "latency": left}

    ratio: float | None = Field(
        None, ge=0, lt=1, description="share of every group's channels to remove; 0: only what is always zero"
    )
    macs: Share | None = Field(None, description="share of the multiply-accumulates that may be left")
    params: Share | None = Field(None, description="share of the parameters that may be left")
    latency: Share | None = Field(
        None, description="share of the latency that may be left, measured on this machine for one sample"
    )
    criterion: Literal["moments", "magnitude"] = Field(
        "moments",
        description="rank channels by what their loss costs their readers, or by the size of their weights",
    )
    compensate: bool = Field(True, description="fit the weights that stay so that they make up for the loss")
    only: str = Field("*", description="pattern: groups with matching names (inspect --channels lists them)")
    step: PositiveInt | None = Field(
        None, description="widths are multiples of it; default: 4 or more for groups of 16 and more channels"
    )
    samples: PositiveInt = Field(768, description="fit samples on which widths are tried")
    mask: Mask = None

    @property
    def reads_moments(self) -> bool:
        """Whether anything is ranked or fitted by what the consumers see."""
        return self.ratio != 0 and (self.criterion == "moments" or self.compensate)


@dataclass(frozen=True)
class _Reading:
    """The groups, rankings and moments by which the channels to be cut are chosen.

    Attributes:
        groups: those that may be cut; `found` are all of the model.
        consumers: for each, who reads it.
        rankings: for each, the order in which channels go.
        dead: of each, the number of channels that are zero for every input; the first to go.
        seen: gives the moments of what the consumers see.
    """

    found: ChannelGroups
    groups: list[Group]
    consumers: Mapping[Group, list[Consumer]]
    rankings: dict[Group, Ranking]
    dead: Mapping[Group, int]
    seen: _Seen


class Select(Pass):
    """Fewer channels in every layer, chosen by what those who read them lose."""

    name = "select"
    contract = Contract.APPROXIMATE
    summary = "cut out the channels that matter least, through all that is coupled, and make up for them"
    Options = SelectOptions
    options: SelectOptions
    example: ClassVar[str] = "select:macs=0.7"

    def __init__(self, options: SelectOptions | None = None, **settings: object) -> None:
        super().__init__(options, **settings)
        if self.options.ratio == 0:
            self.contract = Contract.EXACT
        elif not self.options.compensate:
            self.contract = Contract.MASKED

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite,
        VerificationError for a budget that can't be met."""
        check_mask(model, self.options.mask)
        feed = first_feed(context)
        known = find_groups(model, feed, context.runtime)
        groups, skipped = self._eligible(known)
        if not groups:
            where = named(self.options.only)
            return nothing(model, skipped, f"no channel group of this model{where} can be cut")
        shapes = shapes_at(model, feed, context.runtime)
        readers = {group: consumers(model, group, shapes) for group in groups}
        dead = _dead(model, groups)
        counts = {group: len(own) for group, own in dead.items()}
        seen = _Seen(model, readers, self.options, context)
        reading = _Reading(known, groups, readers, {}, counts, seen)
        curves = self._curves(model, reading, dead, context)
        found = self._chosen(model, reading, curves, context)
        return finished(model, found, skipped, "no channel has to go")

    def _eligible(self, found: ChannelGroups) -> tuple[list[Group], list[Skip]]:
        """The groups that may be cut, and those that may not."""
        groups, skipped = [], []
        for group in found:
            producers = [t for t in group.touches if "producer" in t.roles or "along" in t.roles]
            reason = group.frozen
            if reason is None and group.size < 2:
                reason = "a single channel"
            elif reason is None and not producers and self.options.only == "*":
                reason = "no weights compute it, so what samples lack may matter elsewhere; name it to cut it"
            if reason is not None:
                skipped.append(Skip((group.name,), f"{group.size} channels stay: {reason}"))
            elif fnmatchcase(group.name, self.options.only):
                groups.append(group)
        return groups, skipped

    # Ranking, and what widths cost the outputs

    def _curves(
        self, model: Model, reading: _Reading, dead: Mapping[Group, np.ndarray], context: Context
    ) -> list[LossCurve]:
        """The losses of the groups at their widths, where a goal is to be spent on them; fills in the
        rankings."""
        tried = self.options.ratio is None
        trials = Trials.of(context, self.options.samples) if tried else None
        found: list[LossCurve] = []
        for groups, known in reading.seen.parts():
            for group in groups:
                least = max(1, group.size // LEAST) if tried else self._wanted(group)
                reading.rankings[group] = self._rank(model, group, reading, known, dead[group], least)
            if trials is not None:
                found += self._tried(model, groups, reading, known, trials, context)
        return found

    def _rank(
        self,
        model: Model,
        group: Group,
        reading: _Reading,
        known: Mapping[RowView, Statistics],
        dead: np.ndarray,
        least: int,
    ) -> Ranking:
        """The order in which a group's channels go, down to `least` of them."""
        if self.options.criterion == "magnitude" or self.options.ratio == 0:
            return magnitudes(model, group, first=dead)
        return rank(model, group.size, reading.consumers[group], known, first=dead, least=least)

    def _tried(
        self,
        model: Model,
        groups: Sequence[Group],
        reading: _Reading,
        known: Mapping[RowView, Statistics],
        trials: Trials,
        context: Context,
    ) -> list[LossCurve]:
        """The output change of each group alone at some widths, the others filled in."""
        jobs = [(group, width) for group in groups for width in self._tried_widths(group)]

        def rewritten(job: tuple[Group, int]) -> Model:
            group, width = job
            choice = {group: reading.rankings[group].kept(width)}
            trial = model.copy()
            take(trial, choice, by=self.name)
            if self.options.compensate:
                self._compensate(trial, model, reading, known, choice, set())
            return trial

        changes = trials.changes(jobs, rewritten, context)
        curves = []
        for group in groups:
            points = [(w, c) for (own, w), c in zip(jobs, changes, strict=True) if own is group]
            curves.append(budget.curve(group, self._candidates(group), points, reading.rankings[group]))
        return curves

    def _candidates(self, group: Group) -> list[int]:
        """Widths, from the group's size downwards."""
        step = self._step(group)
        least = max(1, group.size // LEAST)
        return [group.size, *(w for w in range((group.size - 1) // step * step, 0, -step) if w >= least)]

    def _step(self, group: Group) -> int:
        """The number that candidate widths of a group are multiples of."""
        if self.options.step is not None:
            return self.options.step
        if group.size < 16:
            return 1 if group.size < 8 else 2
        return 4 * -(-group.size // (4 * MOST_WIDTHS))

    def _tried_widths(self, group: Group) -> list[int]:
        """The candidate widths that are tried, from the widest downwards."""
        narrower = self._candidates(group)[1:]
        if not narrower:
            return []
        wanted = (group.size * (1 - share) for share in TRIED)
        return sorted({min(narrower, key=lambda w: (abs(w - own), w)) for own in wanted}, reverse=True)

    def _wanted(self, group: Group) -> int:
        """The width that `ratio` asks for: the candidate nearest to it, the larger of two."""
        assert self.options.ratio is not None
        exact = group.size * (1 - self.options.ratio)
        return min(self._candidates(group), key=lambda width: (abs(width - exact), -width))

    # Widths under the goal

    def _chosen(
        self, model: Model, reading: _Reading, curves: Sequence[LossCurve], context: Context
    ) -> SearchResult:
        """The model cut to the widths that the goal asks for, or that the bound allows."""
        options = self.options
        if options.ratio is not None:
            wanted = {group: self._wanted(group) for group in reading.groups}
            return SearchResult(self._cut(model, wanted, reading, context))
        if options.latency is not None:
            return self._within_latency(model, reading, curves, options.latency, context)
        share, what, count = options.macs, "MACs", budget.macs
        if options.params is not None:
            share, what, count = options.params, "parameters", budget.parameters
        total = count(model, reading.found, reading.groups)
        full = total.at({group: group.size for group in reading.groups})
        if share is None:
            return self._within_error(model, reading, curves, total, full, context)
        chosen = budget.choose_widths(curves, total, share * full)
        if chosen is None:
            least = total.at({curve.group: curve.widths[-1] for curve in curves}) / full
            raise VerificationError(
                f"{share:g} of the {what} can't be met: the narrowest widths leave {least:.3g}"
            )
        note = f"{total.at(chosen) / full:.3g} of the {what} are left"
        return SearchResult(self._cut(model, chosen, reading, context), [note])

    def _within_error(
        self,
        model: Model,
        reading: _Reading,
        curves: Sequence[LossCurve],
        total: Total,
        full: float,
        context: Context,
    ) -> SearchResult:
        """The model with as few MACs as the bound on the output error allows.

        Args:
            model: stays as it is.
            reading: of its groups.
            curves: of the groups.
            total: MACs at given widths.
            full: MACs of the whole model.
            context: of the pass.
        """
        plans = {
            level: plan
            for level in MAC_LEVELS
            if (plan := budget.choose_widths(curves, total, level * full)) is not None
        }
        losses = {curve.group: dict(zip(curve.widths, curve.losses, strict=True)) for curve in curves}
        expected = [sum(losses[group][width] for group, width in plan.items()) for plan in plans.values()]

        def said(level: float) -> str:
            kept = {group: len(own) for group, own in self._choice(plans[level], reading).items()}
            rest = total.at({**{group: group.size for group in reading.groups}, **kept})
            return f"{rest / full:.3g} of the MACs are left"

        return farthest(
            list(plans),
            lambda level: self._cut(model, plans[level], reading, context),
            context,
            self.options,
            said=said,
            more=lambda level: f"{level:g}",
            none=lambda within, _: f"not even {1 - MAC_LEVELS[0]:.0%} of the MACs go {within}",
            guess=sum(loss**0.5 <= error_bound(context)[0] for loss in expected),
            event=("select probe", "macs"),
        )

    def _within_latency(
        self,
        model: Model,
        reading: _Reading,
        curves: Sequence[LossCurve],
        share: float,
        context: Context,
    ) -> SearchResult:
        """Widths that this machine runs faster, tightened until the whole network is as fast as asked for."""
        sample = few_rows(model, context.calibration.fit, 1)
        times = rewarded(
            model,
            reading.found,
            {curve.group: curve.widths for curve in curves},
            context.runtime,
            sample,
            seed=context.seed,
            progress=context.progress,
        )
        fast = [curve.at(times[curve.group]) for curve in curves if curve.group in times]
        alone = latency_module.latency([model], context.runtime, sample, seed=context.seed)
        base = alone.timings[0].median_ms
        total = budget.latency_total(times, base)
        goal, reached = share, 1.0
        for _ in range(LATENCY_ATTEMPTS):
            chosen = budget.choose_widths(fast, total, goal * base)
            narrowest = chosen is None
            if chosen is None:
                chosen = {curve.group: curve.widths[-1] for curve in fast}
            trial = model.copy()
            take(trial, self._choice(chosen, reading), by=self.name)
            measured = latency_module.latency([model, trial], context.runtime, sample, seed=context.seed)
            timing = measured.timings[1]
            context.journal("select latency", goal=goal, measured=timing.ratio, unstable=measured.unstable)
            if measured.unstable is not None:
                continue
            reached = min(reached, timing.ratio)
            if timing.ratio_high <= share:
                left = latency_module.interval_text(timing)
                note = f"latency is {left} of what it was (at most {share:g} was asked for)"
                return SearchResult(self._cut(model, chosen, reading, context), [note])
            if narrowest:
                break
            goal *= min(0.99 * share / timing.ratio, 0.98)
        if measured.unstable is not None:
            raise VerificationError(f"a latency of {share:g} can't be decided: {measured.unstable}")
        raise VerificationError(
            f"a latency of {share:g} can't be met: the best that was measured is {reached:.3g}"
        )

    # Cutting

    def _choice(self, wanted: Widths, reading: _Reading) -> dict[Group, np.ndarray]:
        """The indices that are kept: of dead channels none that a candidate width can do without."""
        choice = {}
        for group, width in wanted.items():
            alive = group.size - reading.dead[group]
            width = min(width, *(own for own in self._candidates(group) if own >= alive))
            if width < group.size:
                choice[group] = reading.rankings[group].kept(width)
        return choice

    def _cut(self, model: Model, wanted: Widths, reading: _Reading, context: Context) -> PassResult:
        """The model with groups at these widths."""
        choice = self._choice(wanted, reading)
        cut = model.copy()
        take(cut, choice, by=self.name)
        changes = [_change(group, kept, reading) for group, kept in choice.items()]
        oracle = None if self.contract is Contract.EXACT else mask(model, choice)
        plain = PassResult(cut, changes, oracle=oracle, cut=cut)
        if self.contract is not Contract.APPROXIMATE or not choice:
            return plain
        made, done = cut.copy(), set[object]()
        for _, known in reading.seen.parts():
            self._compensate(made, model, reading, known, choice, done)
        solved, skipped = walked(model, made, context, mask=self.options.mask)
        if not solved:
            return replace(plain, skipped=skipped)
        return replace(settled(made, changes, solved, skipped, every=True), oracle=oracle, cut=cut)

    def _compensate(
        self,
        cut: Model,
        model: Model,
        reading: _Reading,
        known: Mapping[RowView, Statistics],
        choice: Mapping[Group, np.ndarray],
        done: set[object],
    ) -> None:
        """Let the readers of cut groups make up for the loss, see `compensate`."""
        compensate(cut, model, reading.found, reading.consumers, known, choice, done=done, by=self.name)


class _Seen:
    """The moments of what the groups' consumers see; those of a single part are kept."""

    def __init__(
        self, model: Model, readers: Mapping[Group, list[Consumer]], options: SelectOptions, context: Context
    ):
        self._model = model
        self._views = {group: [consumer.view for consumer in own] for group, own in readers.items()}
        self._options = options
        self._context = context
        self._kept: list[tuple[list[Group], dict[RowView, Statistics]]] = []

    def parts(self) -> Iterator[tuple[list[Group], dict[RowView, Statistics]]]:
        """Groups with the statistics of all their consumers' views."""
        if not self._options.reads_moments:
            yield list(self._views), {}
            return
        if self._kept:
            yield from self._kept
            return
        parts = seen_in_parts(self._model, self._views, self._options.mask, self._context)
        for number, part in enumerate(parts):
            self._kept = [] if number else [part]
            yield part


def _dead(model: Model, groups: Sequence[Group]) -> dict[Group, np.ndarray]:
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


def _change(group: Group, kept: np.ndarray, reading: _Reading) -> Change:
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
