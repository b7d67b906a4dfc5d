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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from onnxfuse.analysis.cost import shapes_at
from onnxfuse.channels import budget, ratio
from onnxfuse.channels.budget import LossCurve, Total, Widths
from onnxfuse.channels.consumers import RowView, consumers
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import ChannelGroups, Group, find_groups
from onnxfuse.channels.importance import Ranking
from onnxfuse.channels.masking import mask
from onnxfuse.channels.moments_seen import Statistics
from onnxfuse.channels.timing import rewarded
from onnxfuse.data.rows import few_rows
from onnxfuse.errors import VerificationError
from onnxfuse.findings import Reached, Skip
from onnxfuse.fitting.compensating import compensate
from onnxfuse.fitting.factoring import measured
from onnxfuse.fitting.rewriting import (
    Mask,
    finished,
    first_feed,
    named,
    nothing,
    settled,
    walked,
)
from onnxfuse.fitting.search import SearchResult, error_bound, farthest
from onnxfuse.fitting.selecting import (
    Reading,
    Seen,
    dead_channels,
    full_sizes,
    group_change,
    rankings,
    ratio_result,
)
from onnxfuse.fitting.sites import check_mask
from onnxfuse.fitting.trials import Trials
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.goals import Goals, Share, gone_of_all, left_of_all
from onnxfuse.runtime import latency as latency_module

LEAST = 8
"""A group keeps at least one in so many channels, but under a ratio, which may leave a single one."""

TRIED = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a group whose loss is tried; what lies between follows the ranking."""

MOST_WIDTHS = 16
"""Candidate widths of a group, about."""

MAC_LEVELS = tuple(level / 100 for level in range(95, 9, -5))
"""Shares of the MACs that are tried where only the error bound says how far to go."""

NEAR = 0.01
"""Where a step leaves more than this share of a budget unspent, some groups get widths between the steps."""

BUDGET_ATTEMPTS = 4
"""Biases that make up for lost channels may break a tight budget: so often widths are chosen
that leave room for them."""

LATENCY_ATTEMPTS = 6
"""Cuts that are timed to meet a latency budget."""


class SelectOptions(Goals):
    """Options of `select`."""

    goals: ClassVar = {
        "ratio": gone_of_all,
        "macs": left_of_all,
        "params": left_of_all,
        "latency": left_of_all,
    }

    ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of every layer's channels to remove, to the nearest width, one channel at least "
        "stays; of a layer that several groups make up, their product; 0: only what is always zero",
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
        None,
        description="widths are multiples of it; default: 1 under a ratio, else 4 or more for groups of 16 "
        "and more channels, and 1 for what would leave more than 0.01 of a budget unspent",
    )
    samples: PositiveInt = Field(768, description="fit samples on which widths are tried")
    mask: Mask = None

    @property
    def reads_moments(self) -> bool:
        """Whether anything is ranked or fitted by what the consumers see."""
        return self.ratio != 0 and (self.criterion == "moments" or self.compensate)


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
        full = {group: group.size for group in groups}
        if self.options.ratio is not None:
            full = full_sizes(model, groups, skipped, context)
            groups = list(full)
        if not groups:
            where = named(self.options.only)
            return nothing(model, skipped, f"no channel group of this model{where} can be cut")
        shapes = shapes_at(model, feed, context.runtime)
        readers = {group: consumers(model, group, shapes) for group in groups}
        dead = dead_channels(model, groups)
        counts = {group: len(own) for group, own in dead.items()}
        options = self.options
        seen = Seen(
            model,
            readers,
            context,
            mask=options.mask,
            wanted=options.reads_moments,
            judged=options.samples if options.ratio is None else 0,
        )
        reading = Reading(known, groups, readers, {}, counts, seen, full)
        curves = self._curves(model, reading, dead, context)
        found = self._chosen(model, reading, curves, context)
        found = replace(found, notes=[*found.notes, *reading.few_samples()])
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
        self, model: Model, reading: Reading, dead: Mapping[Group, np.ndarray], context: Context
    ) -> list[LossCurve]:
        """The losses of the groups at their widths, where a goal is to be spent on them; fills in the
        rankings."""
        tried = self.options.ratio is None
        trials = Trials.of(context, self.options.samples) if tried else None
        least = {group: max(1, group.size // LEAST) for group in reading.groups}
        if not tried:
            for block in ratio.blocks(reading.groups):
                widths = zip(*self._at_ratio(block, reading), strict=True)
                least.update((group, min(own)) for group, own in zip(block.groups, widths, strict=True))
        found: list[LossCurve] = []
        by_moments = self.options.criterion == "moments" and self.options.ratio != 0
        for groups, known in reading.seen.parts():
            reading.unsettled.update((view, own) for view, own in known.every.items() if not own.settled)
            every, apart = (known.every, known.apart) if by_moments else (None, None)
            reading.rankings.update(rankings(model, groups, reading, every, dead, least))
            if trials is not None:
                # What a trial cuts is chosen without the samples that it is judged on.
                own = rankings(model, groups, reading, apart, dead, least)
                found += self._tried(model, groups, reading, known.apart, own, trials, context)
        return found

    def _tried(
        self,
        model: Model,
        groups: Sequence[Group],
        reading: Reading,
        known: Mapping[RowView, Statistics],
        ranked: Mapping[Group, Ranking],
        trials: Trials,
        context: Context,
    ) -> list[LossCurve]:
        """The output change of each group alone at some widths, the others filled in."""
        jobs = [(group, width) for group in groups for width in self._tried_widths(group)]

        def rewritten(job: tuple[Group, int]) -> Model:
            group, width = job
            choice = {group: ranked[group].kept(width)}
            trial = model.copy()
            take(trial, choice, by=self.name)
            if self.options.compensate:
                self._compensate(trial, model, reading, known, choice, set())
            return trial

        changes = trials.changes(jobs, rewritten, context, model)
        curves = []
        for group in groups:
            points = [(w, c) for (own, w), c in zip(jobs, changes, strict=True) if own is group]
            curves.append(budget.curve(group, self._candidates(group), points, ranked[group]))
        return curves

    def _candidates(self, group: Group) -> list[int]:
        """Widths, from the group's size downwards."""
        step = self._step(group)
        least = 1 if self.options.ratio else max(1, group.size // LEAST)
        return [group.size, *(w for w in range((group.size - 1) // step * step, 0, -step) if w >= least)]

    def _step(self, group: Group) -> int:
        """The number that candidate widths of a group are multiples of."""
        if self.options.step is not None:
            return self.options.step
        if self.options.ratio:
            return 1
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

    def _at_ratio(self, block: ratio.Block, reading: Reading) -> list[tuple[int, ...]]:
        """The widths of a block's groups that come nearest to the ratio, the nearest first."""
        assert self.options.ratio is not None
        candidates = {group: self._candidates(group) for group in block.groups}
        return ratio.at_share(block, 1 - self.options.ratio, reading.full, candidates)

    # Widths under the goal

    def _chosen(
        self, model: Model, reading: Reading, curves: Sequence[LossCurve], context: Context
    ) -> SearchResult:
        """The model cut to the widths that the goal asks for, or that the bound allows."""
        options = self.options
        if options.ratio is not None:
            return self._within_ratio(model, reading, options.ratio, context)
        if options.latency is not None:
            return self._within_latency(model, reading, curves, options.latency, context)
        share, what, count = options.macs, "MACs", budget.macs
        if options.params is not None:
            share, what, count = options.params, "parameters", budget.parameters
        total = count(model, reading.found, reading.groups)
        if share is not None:
            return self._within_budget(model, reading, curves, total, share, what, context)
        full = total.at({group: group.size for group in reading.groups})
        return self._within_error(model, reading, curves, total, full, context)

    def _within_budget(
        self,
        model: Model,
        reading: Reading,
        curves: Sequence[LossCurve],
        total: Total,
        share: float,
        what: str,
        context: Context,
    ) -> SearchResult:
        """The model with at most a `share` of the MACs or parameters left, as counted on the result.

        Args:
            model, reading, curves, context: of the pass.
            total: the cost at given widths, up to what these don't change.
            share, what: what may be left, of "MACs" or "parameters".
        """
        rest = -total.at({group: group.size for group in reading.groups})
        whole, now = (measured(own, context, what) for own in (context.whole(model), model))
        rest += now
        goal, added = share * whole, 0.0
        for _ in range(BUDGET_ATTEMPTS):
            target = goal - rest - added
            chosen = budget.choose_widths(curves, total, target)
            if chosen is None:
                break
            if self.options.step is None and target - total.at(chosen) > NEAR * whole:
                finer = [budget.finer(own, reading.rankings[own.group]) for own in curves]
                chosen = budget.filled(finer, chosen, total, target)
            made = self._cut(model, chosen, reading, context)
            left = measured(made.model, context, what)
            if left <= goal:
                name = "params" if what == "parameters" else "macs"
                reached = Reached(name, what, False, share, left / whole)
                note = f"{left / whole:.3g} of the {what} are left, {share:g} asked"
                return SearchResult(made, [note], reached=reached)
            added = max(left - rest - total.at(chosen), added + left - goal)
        least = (total.at({curve.group: curve.widths[-1] for curve in curves}) + rest) / whole
        raise VerificationError(
            f"{share:g} of the {what} can't be met: the narrowest widths leave {least:.3g} (a group keeps "
            f"one channel in {LEAST}, and widths are multiples of a step)"
        )

    def _within_ratio(self, model: Model, reading: Reading, asked: float, context: Context) -> SearchResult:
        """The model in which every layer has lost its share of the channels, as nearly as widths allow."""
        wanted: Widths = {}
        for block in ratio.blocks(reading.groups):
            costs = [reading.rankings[group].cost[::-1] for group in block.groups]  # by width
            near = self._at_ratio(block, reading)
            lost = [sum(float(own[w]) for own, w in zip(costs, ws, strict=True)) for ws in near]
            wanted.update(zip(block.groups, near[lost.index(min(lost))], strict=True))
        made = self._cut(model, wanted, reading, context)
        if asked == 0:
            return SearchResult(made)
        return ratio_result(made, reading, self._choice(wanted, reading), asked)

    def _within_error(
        self,
        model: Model,
        reading: Reading,
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
        reading: Reading,
        curves: Sequence[LossCurve],
        share: float,
        context: Context,
    ) -> SearchResult:
        """Widths that this machine runs faster, tightened until the whole network is as fast as asked for."""
        sample = few_rows(model, context.calibration.fit, 1, context.runtime)
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
        whole = context.whole(model)
        base = (
            latency_module.latency([whole], context.runtime, sample, seed=context.seed).timings[0].median_ms
        )
        total = budget.latency_total(times, base)
        goal, reached = share, 1.0
        for _ in range(LATENCY_ATTEMPTS):
            chosen = budget.choose_widths(fast, total, goal * base)
            narrowest = chosen is None
            if chosen is None:
                chosen = {curve.group: curve.widths[-1] for curve in fast}
            trial = model.copy()
            take(trial, self._choice(chosen, reading), by=self.name)
            measured = latency_module.latency([whole, trial], context.runtime, sample, seed=context.seed)
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

    def _choice(self, wanted: Widths, reading: Reading) -> dict[Group, np.ndarray]:
        """The indices that are kept: of dead channels none that a candidate width can do without."""
        choice = {}
        for group, width in wanted.items():
            alive = group.size - reading.dead[group]
            width = min(width, *(own for own in self._candidates(group) if own >= alive))
            if width < group.size:
                choice[group] = reading.rankings[group].kept(width)
        return choice

    def _cut(self, model: Model, wanted: Widths, reading: Reading, context: Context) -> PassResult:
        """The model with groups at these widths."""
        choice = self._choice(wanted, reading)
        cut = model.copy()
        take(cut, choice, by=self.name)
        changes = [group_change(group, kept, reading) for group, kept in choice.items()]
        oracle = None if self.contract is Contract.EXACT else mask(model, choice)
        plain = PassResult(cut, changes, oracle=oracle, cut=cut)
        if self.contract is not Contract.APPROXIMATE or not choice:
            return plain
        made, done = cut.copy(), set[object]()
        for _, known in reading.seen.parts():
            self._compensate(made, model, reading, known.every, choice, done)
        solved, skipped = walked(model, made, context, mask=self.options.mask)
        if not solved:
            return replace(plain, skipped=skipped)
        return replace(settled(made, changes, solved, skipped, every=True), oracle=oracle, cut=cut)

    def _compensate(
        self,
        cut: Model,
        model: Model,
        reading: Reading,
        known: Mapping[RowView, Statistics],
        choice: Mapping[Group, np.ndarray],
        done: set[object],
    ) -> None:
        """Let the readers of cut groups make up for the loss, see `compensate`."""
        compensate(cut, model, reading.found, reading.consumers, known, choice, done=done, by=self.name)
