"""Narrower layers: the channels that matter least are cut out, wherever they lie (MASKED, APPROXIMATE).

A channel is a class of positions over many tensors (`onnxfuse.channels`), and only whole classes are cut:

1. **Dead** channels come first: those that are zero wherever they are read, for every input
   (`onnxfuse.bounds`), and those that carried nothing on the samples.
2. **Rank.** From the moments of what a group's consumers read: what the loss of a channel costs them when
   they make up for it as well as they can, one ranking for all consumers together (`channels.importance`).
3. **Widths.** Each group is tried alone at a few widths to see what that does to the network's *outputs*; the
   ranking's costs fill in the others. A budget is then spent where it costs least (`onnxfuse.widths`).
   Candidates are multiples of a step, since machines compute channels by the vector; under a latency budget
   only widths that this machine runs faster are candidates (`channels.timing`).
4. **Cut** (`channels.take`). The result must equal the original with the removed channels multiplied by zero
   (`channels.mask`): checked for every cut, before any weight is fitted. Without `compensate` that is all.
5. **Make up for it.** Consumers get the weights that are best for the original's moments. Then every linear
   operator is solved again in topological order, from the inputs it now gets to what the original computes,
   of which a cut tensor is held against the channels it has kept (`onnxfuse.walk`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from threadpoolctl import threadpool_limits

from onnxfuse import bounds, cost, widths
from onnxfuse.channels import ChannelGroups, Choice, Group, find_groups, mask, take
from onnxfuse.channels.consumers import Consumer, View, consumers
from onnxfuse.channels.importance import Ranking, Statistics, compensation, magnitudes, rank, statistics
from onnxfuse.channels.timing import rewarded
from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.graph import Model
from onnxfuse.pass_manager import Change, Context, Contract, Pass, PassOptions, PassResult, Skip
from onnxfuse.trials import Trials, error_bound, longest, probe
from onnxfuse.verification import few_rows
from onnxfuse.walk import Solved, check_mask, refit_change, refit_sites, walk
from onnxfuse.widths import Curve, Term, Total, Widths

MEMORY = 1 << 30
"""Bytes of covariances that are kept at a time; a single group may take more."""

LEAST = 8
"""A group keeps at least one in so many channels."""

TRIED = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a group whose loss is tried; what lies between follows the ranking."""

MOST_WIDTHS = 16
"""Candidate widths of a group, about."""

LEVELS = tuple(level / 100 for level in range(95, 9, -5))
"""Shares of the MACs that are tried where only the error bound says how far to go."""

ATTEMPTS = 6
"""Cuts that are timed to meet a latency budget."""

Share = Annotated[float, Field(gt=0, lt=1)]


class SelectOptions(PassOptions):
    """Options of `select`."""

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
    mask: str | None = Field(
        None, description="graph input that is 0 where a token is padding; those rows are left out"
    )

    @property
    def reads_moments(self) -> bool:
        """Whether anything is ranked or fitted by what the consumers see."""
        return self.ratio != 0 and (self.criterion == "moments" or self.compensate)

    @model_validator(mode="after")
    def _one_goal(self) -> SelectOptions:
        given = [name for name in ("ratio", "macs", "params", "latency") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of ratio, macs, params and latency, not {' and '.join(given)}")
        return self


@dataclass(frozen=True)
class _Reading:
    """What is known of the groups that may be cut.

    Attributes:
        groups: them; `found` are all of the model.
        consumers: of each, who reads it.
        rankings: of each, the order in which channels go.
        dead: of each, the number of channels that are zero for every input; the first to go.
        observer: gives the moments of what the consumers see.
    """

    found: ChannelGroups
    groups: list[Group]
    consumers: Mapping[Group, list[Consumer]]
    rankings: dict[Group, Ranking]
    dead: Mapping[Group, int]
    observer: _Observer


@dataclass(frozen=True)
class _Made:
    """A network cut to some widths: as it was right after the cut, and in the end."""

    choice: dict[Group, np.ndarray]
    cut: Model
    model: Model
    solved: list[Solved]
    skipped: list[Skip]


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

    def partly(self, share: float, done: float = 0.0) -> Select | None:
        """See `Pass.partly`: goals are shares of the model at hand, so what was done before counts apart."""
        options = self.options
        goals = {name: getattr(options, name) for name in ("macs", "params", "latency")}
        goals["left"] = None if options.ratio is None else 1 - options.ratio
        name, goal = next(((name, goal) for name, goal in goals.items() if goal is not None), ("", 1.0))
        if goal == 1.0 or share <= done:
            return None
        left = (1 - share * (1 - goal)) / (1 - done * (1 - goal))
        return self._with(**({"ratio": 1 - left} if name == "left" else {name: left}))

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite,
        VerificationError for a budget that can't be met."""
        check_mask(model, self.options.mask)
        feed = next(iter(context.calibration.fit)).feed
        found = find_groups(model, feed)
        groups, skipped = self._eligible(found)
        if not groups:
            where = "" if self.options.only == "*" else f" with a name matching '{self.options.only}'"
            return PassResult(
                model, skipped=skipped, notes=[f"no channel group of this model{where} can be cut"]
            )
        shapes = cost.shapes_at(model, feed)
        readers = {group: consumers(model, group, shapes) for group in groups}
        dead = _dead(model, groups)
        counts = {group: len(own) for group, own in dead.items()}
        observer = _Observer(model, readers, self.options, context)
        reading = _Reading(found, groups, readers, {}, counts, observer)
        curves = self._curves(model, reading, dead, context)
        made, notes = self._made(model, reading, curves, context)
        if made is None or not made.choice:
            return PassResult(model, skipped=skipped, notes=notes or ["no channel has to go"])
        changes = [_change(group, kept, reading) for group, kept in made.choice.items()]
        moved = [item for item in made.solved if item.ridge is not None]
        return PassResult(
            made.model,
            changes + [refit_change(item) for item in moved],
            skipped + made.skipped,
            [item.prediction() for item in made.solved],
            notes,
            None if self.contract is Contract.EXACT else mask(model, made.choice),
            made.cut,
        )

    def _eligible(self, found: ChannelGroups) -> tuple[list[Group], list[Skip]]:
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
    ) -> list[Curve]:
        """Fills in the rankings; where a goal has to be spent on widths, what they cost."""
        tried = self.options.ratio is None
        trials = Trials.of(context, self.options.samples) if tried else None
        found: list[Curve] = []
        for groups, known in reading.observer.parts():
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
        known: Mapping[View, Statistics],
        dead: np.ndarray,
        least: int,
    ) -> Ranking:
        if self.options.criterion == "magnitude" or self.options.ratio == 0:
            return magnitudes(model, group, first=dead)
        return rank(model, group.size, reading.consumers[group], known, first=dead, least=least)

    def _tried(
        self,
        model: Model,
        groups: Sequence[Group],
        reading: _Reading,
        known: Mapping[View, Statistics],
        trials: Trials,
        context: Context,
    ) -> list[Curve]:
        """The output change of each group alone at some widths, the others filled in."""
        jobs = [(group, width) for group in groups for width in self._tried_widths(group)]
        advance = context.progress.task("trying", total=len(jobs))
        single = context.runtime.single()
        lock = threading.Lock()  # models keep caches, so that no two threads may copy one at a time

        def change(job: tuple[Group, int]) -> float:
            group, width = job
            choice = {group: reading.rankings[group].kept(width)}
            with lock:
                trial = model.copy()
                take(trial, choice, by=self.name)
                if self.options.compensate:
                    _compensate(trial, model, reading, known, choice)
            try:
                return trials.change(trial, single)
            except NotApplicableError:
                return float("inf")
            finally:
                advance()

        with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(context.runtime.threads, 4)) as pool:
            changes = list(pool.map(change, jobs))
        curves = []
        for group in groups:
            points = [(w, c) for (own, w), c in zip(jobs, changes, strict=True) if own is group]
            curves.append(_curve(group, self._candidates(group), points, reading.rankings[group]))
        return curves

    def _candidates(self, group: Group) -> list[int]:
        """Widths, from the group's size downwards."""
        step = self._step(group)
        least = max(1, group.size // LEAST)
        return [group.size, *(w for w in range((group.size - 1) // step * step, 0, -step) if w >= least)]

    def _step(self, group: Group) -> int:
        if self.options.step is not None:
            return self.options.step
        if group.size < 16:
            return 1 if group.size < 8 else 2
        return 4 * -(-group.size // (4 * MOST_WIDTHS))

    def _tried_widths(self, group: Group) -> list[int]:
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

    def _made(
        self, model: Model, reading: _Reading, curves: Sequence[Curve], context: Context
    ) -> tuple[_Made | None, list[str]]:
        options = self.options
        if options.ratio is not None:
            wanted = {group: self._wanted(group) for group in reading.groups}
            return self._cut(model, wanted, reading, context), []
        if options.latency is not None:
            return self._within_latency(model, reading, curves, options.latency, context)
        share: float | None
        if options.params is not None:
            total, share = widths.parameters(model, reading.found, reading.groups), options.params
        else:
            total, share = widths.macs(model, reading.found, reading.groups), options.macs
        what = "MACs" if options.params is None else "parameters"
        full = total.at({group: group.size for group in reading.groups})
        if share is None:
            return self._within_error(model, reading, curves, total, full, context)
        chosen = widths.choose(curves, total, share * full)
        if chosen is None:
            least = total.at({curve.group: curve.widths[-1] for curve in curves}) / full
            raise VerificationError(
                f"{share:g} of the {what} can't be met: the narrowest widths leave {least:.3g}"
            )
        return self._cut(model, chosen, reading, context), [
            f"{total.at(chosen) / full:.3g} of the {what} are left"
        ]

    def _within_error(
        self,
        model: Model,
        reading: _Reading,
        curves: Sequence[Curve],
        total: Total,
        full: float,
        context: Context,
    ) -> tuple[_Made | None, list[str]]:
        """As few MACs as the bound on the output error allows, by bisection."""
        if not context.calibration.held_out.samples:
            return None, [
                "no held-out samples to hold the error bound on; give ratio, macs, params or latency"
            ]
        bound, which = error_bound(context)
        plans = [plan for level in LEVELS if (plan := widths.choose(curves, total, level * full)) is not None]
        losses = {curve.group: dict(zip(curve.widths, curve.losses, strict=True)) for curve in curves}
        expected = [sum(losses[group][width] for group, width in plan.items()) for plan in plans]
        errors: dict[int, float] = {}

        def attempt(count: int) -> _Made | None:
            plan = plans[count - 1]
            made, errors[count] = probe(lambda: self._cut(model, plan, reading, context), context)
            context.journal("select probe", macs=LEVELS[count - 1], output_error=errors[count])
            return made if errors[count] <= bound else None

        guess = sum(loss**0.5 <= bound for loss in expected)
        best, count = longest(len(plans), guess, attempt)
        if best is None:
            return None, [f"not even {1 - LEVELS[0]:.0%} of the MACs go within {bound:g} ({which})"]
        left = total.at(
            {**{g: g.size for g in reading.groups}, **{g: len(k) for g, k in best.choice.items()}}
        )
        note = f"{left / full:.3g} of the MACs are left: held-out output error within {bound:g} ({which})"
        if count + 1 in errors:
            note += f"; with {LEVELS[count]:g} it would be {errors[count + 1]:.3g}"
        return best, [note]

    def _within_latency(
        self,
        model: Model,
        reading: _Reading,
        curves: Sequence[Curve],
        share: float,
        context: Context,
    ) -> tuple[_Made | None, list[str]]:
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
        fast = [_only(curve, times[curve.group]) for curve in curves if curve.group in times]
        base = (
            cost.latency([model], context.runtime, sample, seconds=2.0, seed=context.seed)
            .timings[0]
            .median_ms
        )
        total = _milliseconds(times, base)
        goal, reached = share, 1.0
        for _ in range(ATTEMPTS):
            chosen = widths.choose(fast, total, goal * base)
            narrowest = chosen is None
            if chosen is None:
                chosen = {curve.group: curve.widths[-1] for curve in fast}
            trial = model.copy()
            take(trial, self._choice(chosen, reading), by=self.name)
            timing = cost.latency(
                [model, trial], context.runtime, sample, repeats=400, seconds=3.0, seed=context.seed
            ).timings[1]
            reached = min(reached, timing.ratio)
            context.journal("select latency", goal=goal, measured=timing.ratio)
            if timing.ratio_high <= share:
                note = f"latency is {timing.ratio:.3g} of what it was (at most {share:g} was asked for)"
                return self._cut(model, chosen, reading, context), [note]
            if narrowest:
                break
            goal *= min(0.99 * share / timing.ratio, 0.98)
        raise VerificationError(
            f"a latency of {share:g} can't be met: the best that was measured is {reached:.3g}"
        )

    # Cutting

    def _choice(self, wanted: Widths, reading: _Reading) -> dict[Group, np.ndarray]:
        """What is kept: of dead channels none that a candidate width can do without."""
        choice = {}
        for group, width in wanted.items():
            alive = group.size - reading.dead[group]
            width = min(width, *(own for own in self._candidates(group) if own >= alive))
            if width < group.size:
                choice[group] = reading.rankings[group].kept(width)
        return choice

    def _cut(self, model: Model, wanted: Widths, reading: _Reading, context: Context) -> _Made:
        choice = self._choice(wanted, reading)
        cut = model.copy()
        take(cut, choice, by=self.name)
        if self.contract is not Contract.APPROXIMATE or not choice:
            return _Made(choice, cut, cut, [], [])
        feed = next(iter(context.calibration.fit)).feed
        made, done = cut.copy(), set[object]()
        for _, known in reading.observer.parts():
            _compensate(made, model, reading, known, choice, done)
        sites, skipped = refit_sites(context.original, made, (), self.options.mask, feed, before=model)
        if not sites:
            return _Made(choice, cut, cut, [], skipped)
        solved = walk(
            context.original,
            made,
            sites,
            context.calibration,
            context.runtime,
            seed=context.seed,
            progress=context.progress,
        )
        return _Made(choice, cut, made, solved, skipped)


class _Observer:
    """What the groups' consumers see: from one run, or from one run for each part that memory allows."""

    def __init__(
        self, model: Model, readers: Mapping[Group, list[Consumer]], options: SelectOptions, context: Context
    ):
        self._model = model
        self._readers = readers
        self._options = options
        self._context = context
        self._only: dict[View, Statistics] | None = None

    def parts(self) -> Iterator[tuple[list[Group], dict[View, Statistics]]]:
        """Groups with the statistics of all their consumers' views."""
        groups = list(self._readers)
        if not self._options.reads_moments:
            yield groups, {}
        elif self._only is not None:
            yield groups, self._only
        else:
            parts = list(self._affordable())
            for part in parts:
                known = self._seen(part)
                if len(parts) == 1:
                    self._only = known
                yield part, known

    def _affordable(self) -> Iterator[list[Group]]:
        part: list[Group] = []
        views: set[View] = set()
        for group, readers in self._readers.items():
            own = {consumer.view for consumer in readers if consumer.view.correlated}
            if part and sum(16 * view.columns**2 for view in views | own) > MEMORY:
                yield part
                part, views = [], set()
            part.append(group)
            views |= own
        yield part

    def _seen(self, groups: Sequence[Group]) -> dict[View, Statistics]:
        return statistics(
            self._model,
            [consumer.view for group in groups for consumer in self._readers[group]],
            self._context.calibration.fit,
            self._context.runtime,
            seed=self._context.seed,
            mask=self._options.mask,
            progress=self._context.progress,
        )


def _dead(model: Model, groups: Sequence[Group]) -> dict[Group, np.ndarray]:
    """Channels that are zero at every operator that reads them, whatever is fed."""
    known = bounds.intervals(model, model.shapes())
    dead = {}
    for group in groups:
        zero = np.full(group.size, bool(group.sinks) and not group.statistics)
        for sink in group.sinks:
            own = known.get(sink.tensor)
            places = np.zeros(sink.dim.size, bool) if own is None else own.zeros(sink.axis, sink.dim.size)
            zero &= places[group.places(sink.dim)].all(axis=1)
        dead[group] = np.flatnonzero(zero)
    return dead


def _compensate(
    cut: Model,
    model: Model,
    reading: _Reading,
    known: Mapping[View, Statistics],
    choice: Choice,
    done: set[object] | None = None,
) -> None:
    """Give those who read the cut groups, and are in `known` but not `done`, the weights that are best
    without them; `cut` is `model` cut by `choice`."""
    done = set() if done is None else done
    # A recurrent operator reads by two weights, its input and its own state: each is a reader by itself.
    readers: dict[object, list[tuple[Consumer, np.ndarray]]] = {}
    for group, kept in choice.items():
        gone = np.setdiff1d(np.arange(group.size), kept)
        for consumer in reading.consumers[group]:
            key = consumer.node, consumer.view, consumer.stored
            readers.setdefault(key, []).append((consumer, consumer.places[gone].reshape(-1)))
    for reader, own in readers.items():
        consumer = own[0][0]
        if consumer.view not in known or reader in done or not consumer.writable(model):
            continue
        done.add(reader)
        gone = np.unique(np.concatenate([places for _, places in own]))
        fitted = compensation(consumer, model, known[consumer.view], gone)
        if fitted is not None:
            consumer.write(cut, *fitted, reading.found, choice, by=Select.name)


def _curve(
    group: Group, candidates: Sequence[int], points: Sequence[tuple[int, float]], ranking: Ranking
) -> Curve:
    """The loss at all candidate widths from that at some: between them it goes like the ranking's costs."""
    removed = np.array([0, *(group.size - width for width, _ in points)])
    changes = np.array([0.0, *(change for _, change in points)])
    at = group.size - np.array(candidates)
    costs = ranking.cost[removed]
    if np.all(np.isfinite(changes)) and len(points) and costs[1] > 0:
        factors = changes[1:] / costs[1:]
        losses = ranking.cost[at] * np.interp(at, removed[1:], factors)
    else:
        losses = np.interp(at, removed, changes)
    return Curve(group, candidates, np.maximum.accumulate(np.nan_to_num(losses, nan=np.inf)).tolist())


def _only(curve: Curve, times: Mapping[int, float]) -> Curve:
    """The curve at those widths that have a time."""
    kept = [(w, loss) for w, loss in zip(curve.widths, curve.losses, strict=True) if w in times]
    return Curve(curve.group, [w for w, _ in kept], [loss for _, loss in kept])


def _milliseconds(times: Mapping[Group, Mapping[int, float]], base: float) -> Total:
    """Latency as that of the whole network less what each group saves by itself."""

    def term(group: Group) -> Term:
        own = times[group]
        return Term(
            (group,), lambda kept: own[sum(len(kept[leaf]) for leaf in group.leaves)] - own[group.size]
        )

    return Total([Term((), lambda kept: base), *map(term, times)], list(times))


def _change(group: Group, kept: np.ndarray, reading: _Reading) -> Change:
    gone = np.setdiff1d(np.arange(group.size), kept)
    dead = min(reading.dead[group], len(gone))
    idle = min(reading.rankings[group].idle, len(gone)) - dead
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
            "removed": gone.tolist(),
            "always_zero": dead,
            "idle_on_samples": max(idle, 0),
            "cost": float(reading.rankings[group].cost[len(gone)]),
        },
    )
