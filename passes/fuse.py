"""Replace regions of a network by one affine operator each (APPROXIMATE).

FuseInit (Ghods et al. 2020, Theorem 1) replaces two layers u -> v by the affine map that is closest to them
in mean square, W = C_vu C_u^-1 and b = mean(v) - W mean(u). The same holds for any region with one entry and
one exit: more layers, pooling and normalisation inside, a residual block with its skip, the MLP or attention
block of a transformer per token. For a convolution the columns are patches, and all columns are solved
jointly; the paper's Theorem 2 solves each input channel alone, which supposes that channels are uncorrelated.
They are not, and the result is useless; it is there as `mode=paper`.

Four steps:

1. **Survey.** One tapped run of the network gives the moments of all candidates, hence each one's local fit.
2. **Rank** by the change of the network's *outputs*, per multiply-accumulate saved; local errors say little
   about that. First with each candidate's local fit in place, one forward run each; then, for the best
   disjoint ones, with everything behind it refitted, on a few samples.
3. **Walk** (`onnxfuse.walk`): the chosen regions are solved again in topological order, from the inputs that
   the rewritten network gives them, and every linear operator behind them is refitted.
4. **Bound.** Without a number of blocks, the longest prefix of the ranking is fused whose output change on
   held-out samples stays within the error bound; found by bisection, each probe a walk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from threadpoolctl import threadpool_limits

from onnxfuse.cost import node_macs, shapes_at
from onnxfuse.errors import NotApplicableError
from onnxfuse.findings import Change, Json, Skip
from onnxfuse.graph import Model, Node
from onnxfuse.numerics.affine import Affine
from onnxfuse.pass_manager import Context, Contract, Pass, PassOptions, PassResult
from onnxfuse.progress import NoProgress
from onnxfuse.regions import Region, check_geometry, describe, find_regions, site_name
from onnxfuse.shapes import TensorInfo
from onnxfuse.survey import Candidate, Fit, survey
from onnxfuse.trials import Trials, error_bound, longest, probe
from onnxfuse.walk import MOST_COLUMNS, Solved, check_mask, kept_channels, refit_change, refit_sites, walk

AUTO_KERNEL = 3
"""Largest kernel that is chosen unasked: a larger one costs more than the two 3x3 it replaces."""


MOST_OPS = {"conv": 3, "flatten": 3, "dense": 3, "token": 6}
"""Linear operators in a region, unasked: a residual block with a projected skip, a transformer layer."""

MOST_TRIALS = 4
"""Trials that run side by side: each keeps tensors of its own."""

MANY_COLUMNS = 2048
"""Unknowns for each output that are fitted from fewer samples than that."""


class FuseOptions(PassOptions):
    """Options of `fuse`."""

    max_blocks: PositiveInt | None = Field(
        None,
        description="fuse this many regions, whatever the error; default: as many as the error bound allows",
    )
    kernel: PositiveInt | Literal["auto", "composed"] = Field(
        "auto",
        description="kernel size of a fused convolution: a number, 'composed' (the whole receptive field) or "
        "'auto' (3, or the receptive field where that is smaller)",
    )
    max_ops: PositiveInt | None = Field(
        None, description="most linear operators in one region; default: 3, per token 6 (a transformer layer)"
    )
    only: str = Field("*", description="pattern: regions all of whose linear operators have matching names")
    ridge: PositiveFloat | None = Field(
        None,
        description="ridge relative to the mean diagonal of the Gram; default: the best on held-out samples",
    )
    refit: bool = Field(True, description="refit the linear operators behind a fused region")
    shortlist: PositiveInt = Field(16, description="most regions whose fusion is tried with refits")
    rank: Literal["error", "kl"] = Field(
        "error",
        description="rank by squared change of the outputs, or, where they are logits of classes, by kl",
    )
    samples: PositiveInt = Field(768, description="fit samples on which candidates are ranked")
    mode: Literal["joint", "paper"] = Field(
        "joint",
        description="paper: solve each input channel alone (FuseInit, Theorem 2); for comparison only",
    )
    mask: str | None = Field(
        None, description="graph input that is 0 where a token is padding; those rows are left out"
    )


@dataclass(frozen=True)
class _Ranked:
    """A candidate with the output change that it alone causes and the share of MACs that it saves."""

    fit: Fit
    change: float
    saved: float

    def order(self) -> tuple[float, str]:
        """By change per MAC saved."""
        return self.change / self.saved, self.fit.candidate.region.v


class Fuse(Pass):
    """Fewer, affine operators in place of whole regions."""

    name = "fuse"
    contract = Contract.APPROXIMATE
    summary = "replace regions (layer pairs, residual blocks, transformer blocks) by one affine operator"
    Options = FuseOptions
    options: FuseOptions
    example: ClassVar[str] = "fuse:max_blocks=4,kernel=3"

    def partly(self, share: float, done: float = 0.0) -> Fuse | None:
        """See `Pass.partly`: the regions that are fused at `share`, less those that were at `done`."""
        most = self.options.max_blocks
        if most is None or share <= 0:
            return None
        blocks = max(1, round(share * most)) - (max(1, round(done * most)) if done > 0 else 0)
        return self._with(max_blocks=blocks) if blocks > 0 else None

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite."""
        check_mask(model, self.options.mask)
        candidates, skipped = self._candidates(model, context)
        if not candidates:
            where = "" if self.options.only == "*" else f" with all names matching '{self.options.only}'"
            return PassResult(model, skipped=skipped, notes=[f"no region of this model{where} can be fused"])
        fits = survey(
            model,
            [candidate for candidate, _ in candidates],
            context.calibration,
            context.runtime,
            seed=context.seed,
            mask=self.options.mask,
            progress=context.progress,
        )
        trials = Trials.of(context, self.options.samples, self.options.rank)
        shortlist, refused = self._shortlist(model, fits, [saved for _, saved in candidates], context, trials)
        skipped += refused
        chosen = self._rank(model, shortlist, context, trials)
        for place, item in enumerate(chosen, start=1):
            context.journal(
                "fuse candidate",
                place=place,
                region=describe(item.fit.candidate.region),
                relative_error=item.fit.held,
                output_change=item.change,
            )
        found, notes = self._choose(model, chosen, context)
        if found is None:
            return PassResult(model, skipped=skipped + _left(chosen, "see the notes"), notes=notes)
        fused = {item.fit.candidate.region.v for item in found.fused}
        left = [item for item in chosen if item.fit.candidate.region.v not in fused]
        skipped += _left(left, "beyond the bound or number of blocks")
        why = " (mode=paper supposes uncorrelated channels)" if self.options.mode == "paper" else ""
        return _result(found, skipped, notes, why)

    def _candidates(self, model: Model, context: Context) -> tuple[list[tuple[Candidate, float]], list[Skip]]:
        """Regions with the operator that may replace them and the share of the model's MACs that it saves."""
        batch = next(iter(context.calibration.fit))
        most = self.options.max_ops
        regions, skipped = find_regions(
            model, model.shapes(batch.feed), max_ops=most or max(MOST_OPS.values())
        )
        shapes = shapes_at(model, batch.feed)
        known = context.original.shapes(batch.feed)
        total = sum(node_macs([node], shapes, model.opset) or 0 for node in model.nodes)
        found: list[tuple[Candidate, float]] = []
        for region in _widest(regions):
            if not all(fnmatchcase(site, self.options.only) for site in region.sites):
                continue
            if region.linear_ops > (most or MOST_OPS[region.kind]):
                continue
            candidate = self._candidate(region, shapes)
            saved = None if isinstance(candidate, str) else _saved(model, candidate, shapes)
            if isinstance(candidate, str):
                skipped.append(Skip(region.sites, candidate))
            elif region.v not in known:
                skipped.append(Skip(region.sites, f"its output '{region.v}' is not a tensor of the original"))
            elif isinstance(cut := kept_channels(model, region.v, 1 if region.kind == "conv" else -1), str):
                skipped.append(Skip(region.sites, cut))
            elif candidate.columns > MOST_COLUMNS:
                skipped.append(
                    Skip(
                        region.sites,
                        f"{candidate.columns} unknowns for each output are too many to solve for",
                    )
                )
            elif candidate.columns > max(MANY_COLUMNS, rows := _rows(region, shapes, context)):
                skipped.append(
                    Skip(
                        region.sites,
                        f"{candidate.columns} unknowns for each output are more than the "
                        f"{rows} rows of the fit samples can settle",
                    )
                )
            elif saved is None:
                skipped.append(Skip(region.sites, "its multiply-accumulates can't be counted"))
            elif saved <= 0:
                more = -saved / max(total, 1)
                skipped.append(
                    Skip(region.sites, f"one operator in its place would cost more: {more:+.1%} of all MACs")
                )
            else:
                found.append((candidate, saved / max(total, 1)))
        return found, skipped

    def _candidate(self, region: Region, shapes: dict[str, TensorInfo]) -> Candidate | str:
        dtype, leaves = shapes[region.u].dtype, shapes[region.v].dtype
        if dtype is None or dtype != leaves:
            return f"'{region.u}' is {dtype} and '{region.v}' {leaves}"
        if region.geometry is None:
            return Candidate(region, dtype)
        wanted = self.options.kernel
        field = region.geometry.kernel
        # Where nothing inside is padded, a smaller kernel than the receptive field would need a crop.
        sizes = {"composed": [max(field)], "auto": range(min(AUTO_KERNEL, max(field)), max(field) + 1)}
        for size in [wanted] if isinstance(wanted, int) else sizes[wanted]:
            kernel = tuple(min(size, extent) for extent in field)
            pads = region.geometry.pads_for(kernel)
            if pads is not None:
                return Candidate(region, dtype, kernel, pads)
        return f"no pads give a kernel of {wanted} the same output size for every input"

    def _shortlist(
        self, model: Model, fits: Sequence[Fit], saved: Sequence[float], context: Context, trials: Trials
    ) -> tuple[list[_Ranked], list[Skip]]:
        """The best disjoint candidates by the output change of their local fits; and why not the others."""
        skipped: list[Skip] = []
        usable: list[tuple[Fit, float]] = []
        for fit, share in zip(fits, saved, strict=True):
            if math.isfinite(fit.held) and fit.held < 1.0:
                usable.append((fit, share))
            else:
                reason = f"no affine map does better than a constant (relative error {fit.held:.3g})"
                skipped.append(Skip(fit.candidate.region.sites, reason))
        advance = context.progress.task("trying", total=len(usable))
        ranked = []
        for fit, share in usable:
            advance()
            trial = model.copy()
            _replace(trial, fit.candidate, fit.affine, self.name)
            try:
                change = trials.change(trial, context.runtime)
            except NotApplicableError as failure:
                skipped.append(Skip(fit.candidate.region.sites, f"the network fails without it: {failure}"))
                continue
            if change > 0:
                ranked.append(_Ranked(fit, change, share))
            else:
                reason = "the outputs don't depend on it on these samples, so nothing would tell a bad fit"
                skipped.append(Skip(fit.candidate.region.sites, reason))
        chosen, overlapping = _disjoint(ranked)
        skipped += overlapping
        size = max(self.options.shortlist, self.options.max_blocks or 0)
        skipped += _left(chosen[size:], f"not among the {size} best (shortlist)")
        shortlist = []
        for item in chosen[:size]:
            candidate = item.fit.candidate
            kernels = [candidate.kernel] if candidate.kernel else None
            check = check_geometry(
                model, candidate.region, context.runtime, trials.feeds[:1], kernels=kernels
            )
            if check.passed:
                shortlist.append(item)
            else:
                skipped.append(Skip(candidate.region.sites, f"its sizes don't hold: {check.reason}"))
        return shortlist, skipped

    def _rank(
        self, model: Model, shortlist: Sequence[_Ranked], context: Context, trials: Trials
    ) -> list[_Ranked]:
        """The shortlist by the output change that each alone leaves, with all behind it refitted.

        Walks on a few of the fit samples; the change is measured on others of them.
        """
        advance = context.progress.task("ranking", total=len(shortlist))
        # Trials are many and small: side by side, on a core each, they take the least time.
        single = context.runtime.single()
        alone = replace(context, calibration=trials.calibration, progress=NoProgress(), runtime=single)
        # Models keep caches: each trial has copies of its own, made here, so that no two threads share one.
        copies = [(model.copy(), replace(alone, original=context.original.copy())) for _ in shortlist]

        def tried(item: _Ranked, own: tuple[Model, Context]) -> _Ranked:
            change = trials.change(self._fuse(own[0], [item], own[1], quick=True).model, single)
            advance()
            return replace(item, change=change)

        workers = min(context.runtime.threads, MOST_TRIALS)
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
            return sorted(pool.map(tried, shortlist, copies), key=_Ranked.order)

    def _choose(
        self, model: Model, ranked: Sequence[_Ranked], context: Context
    ) -> tuple[_Fused | None, list[str]]:
        """The rewritten model with as many regions fused as asked for, or as the bound allows."""
        if self.options.max_blocks is not None:
            count = min(self.options.max_blocks, len(ranked))
            notes = [
                f"fused {count} of {len(ranked)} regions, as asked for (max_blocks={self.options.max_blocks})"
            ]
            return (self._fuse(model, ranked[:count], context) if count else None), notes
        if not context.calibration.held_out.samples:
            return None, ["no held-out samples to hold the error bound on; give max_blocks instead"]
        bound, which = error_bound(context)
        # One that breaks the bound alone would end the prefix, however many MACs it saves: it goes last.
        ranked = sorted(ranked, key=lambda item: self.options.rank == "error" and item.change > bound**2)
        errors: dict[int, float] = {}

        def attempt(count: int) -> _Fused | None:
            fused, errors[count] = self._probe(model, ranked[:count], context)
            return fused if errors[count] <= bound else None

        guess = sum(math.sqrt(total) <= bound for total in accumulate(item.change for item in ranked))
        best, count = longest(len(ranked), guess, attempt)
        note = f"fused {count} of {len(ranked)} regions: held-out output error within {bound:g} ({which})"
        if count + 1 in errors:
            note += f"; with one more it would be {errors[count + 1]:.3g}"
        return best, [note]

    def _probe(
        self, model: Model, ranked: Sequence[_Ranked], context: Context
    ) -> tuple[_Fused | None, float]:
        """These regions fused, and the held-out output error; infinite where that fails."""
        fused, error = probe(lambda: self._fuse(model, ranked, context), context)
        context.journal("fuse probe", blocks=len(ranked), output_error=error)
        return fused, error

    def _fuse(
        self, model: Model, ranked: Sequence[_Ranked], context: Context, *, quick: bool = False
    ) -> _Fused:
        """Replace these regions, then walk."""
        rewritten = model.copy()
        fresh = [
            (_replace(rewritten, item.fit.candidate, item.fit.affine, self.name), item.fit.candidate.region.v)
            for item in ranked
        ]
        feed = next(iter(context.calibration.fit)).feed
        sites, skipped = refit_sites(
            context.original, rewritten, fresh, self.options.mask, feed, before=model
        )
        if not self.options.refit:
            sites, skipped = [site for site in sites if site.how == "fresh"], []
        solved = walk(
            context.original,
            rewritten,
            sites,
            context.calibration,
            context.runtime,
            seed=context.seed,
            ridge=self.options.ridge,
            paper=self.options.mode == "paper",
            quick=quick,
            progress=context.progress,
        )
        return _Fused(rewritten, list(ranked), solved, skipped)


@dataclass(frozen=True)
class _Fused:
    """A rewritten model and how it came about."""

    model: Model
    fused: list[_Ranked]
    solved: list[Solved]
    skipped: list[Skip]


def _result(found: _Fused, skipped: list[Skip], notes: list[str], why: str) -> PassResult:
    by_tensor = {item.fit.candidate.region.v: item for item in found.fused}
    changes, notes = [], list(notes)
    for solved in found.solved:
        if solved.site.how != "fresh":
            if solved.ridge is not None:
                changes.append(refit_change(solved))
            continue
        ranked = by_tensor[solved.site.tensor]
        region = ranked.fit.candidate.region
        detail: dict[str, Json] = {
            "region": describe(region),
            "tensor": region.v,
            "operator": solved.site.op.name,
            "ridge": solved.ridge,
            "relative_error": solved.relative,
            "relative_error_fitted": solved.error / solved.variance if solved.variance else 0.0,
            "relative_error_alone": ranked.fit.held,
            "output_change_alone": ranked.change,
            "macs_saved": ranked.saved,
        }
        made = f"fused {describe(region)} into one {_operator(ranked.fit.candidate)}"
        what = f"{made}, relative error {solved.relative:.3g}"
        changes.append(Change(tuple(map(site_name, region.nodes)), what, detail))
        if solved.relative > 1.0:
            notes.append(
                f"warning: '{region.v}' has relative error {solved.relative:.3g}, worse than a constant{why}"
            )
    return PassResult(
        found.model,
        changes,
        skipped + found.skipped,
        [item.prediction() for item in found.solved if item.ridge is not None],
        notes,
    )


def _operator(candidate: Candidate) -> str:
    kind = candidate.region.kind
    return f"{_times(candidate.kernel)} Conv" if kind == "conv" else "MatMul" if kind == "token" else "Gemm"


def _times(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def _left(ranked: Sequence[_Ranked], why: str) -> list[Skip]:
    return [
        Skip(
            item.fit.candidate.region.sites,
            f"left: relative error {item.fit.held:.3g}, output change {item.change:.3g} alone; {why}",
        )
        for item in ranked
    ]


def _widest(regions: Sequence[Region]) -> Iterator[Region]:
    """Of regions with the same entry and linear operators, the last: it takes in the skip, at no error."""
    last = {(region.u, region.kind, region.sites): region for region in regions}
    return iter(last.values())


def _rows(region: Region, shapes: dict[str, TensorInfo], context: Context) -> int:
    """Rows that the fit samples give: one for each position of a map, each token, or else each sample."""
    shape = shapes[region.v].shape or ()
    sizes = shape[2:] if region.kind == "conv" else shape[1:-1]
    return context.calibration.fit.samples * math.prod(s for s in sizes if isinstance(s, int))


def _saved(model: Model, candidate: Candidate, shapes: dict[str, TensorInfo]) -> int | None:
    """MACs of the region less those of what replaces it."""
    region = candidate.region
    before = node_macs(region.nodes, shapes, model.opset)
    after = shapes[region.v].shape
    if before is None or after is None or not all(isinstance(size, int) for size in after):
        return None
    return before - math.prod(int(size) for size in after if size is not None) * candidate.columns


def _disjoint(ranked: Sequence[_Ranked]) -> tuple[list[_Ranked], list[Skip]]:
    """Sorted, and of those that share a node the better one."""
    taken: set[Node] = set()
    chosen, skipped = [], []
    for item in sorted(ranked, key=_Ranked.order):
        region = item.fit.candidate.region
        if taken.isdisjoint(region.nodes):
            taken.update(region.nodes)
            chosen.append(item)
        else:
            skipped.append(Skip(region.sites, "overlaps a region that ranks higher"))
    return chosen, skipped


def _replace(model: Model, candidate: Candidate, affine: Affine, by: str) -> Node:
    """Put one affine operator in the region's place; returns the node that holds the weights.

    `model` may be a copy of the one the region was found in: nodes are found by what they compute.
    """
    region = candidate.region
    u, v = model.tensor(region.u), model.tensor(region.v)
    made = {node.outputs[0].name for node in region.nodes}
    old = [node for node in model.nodes if node.outputs and node.outputs[0].name in made]
    names = [node.name for node in old if node.name]
    base = region.sites[-1]
    dtype = candidate.dtype
    model.remove(old)
    label = f"{base}_fused"
    bias = model.add_weight(f"{label}.bias", affine.bias.astype(dtype))

    def add(op: str, inputs: list[object], output: object, name: str, **attrs: object) -> Node:
        return model.add_node(op, inputs, [output], attrs, name, by=by, replaces=names)  # type: ignore[arg-type, list-item]

    if region.kind == "conv":
        assert region.geometry is not None
        shape = (region.out_features, region.in_features, *candidate.kernel)
        weight = model.add_weight(f"{label}.weight", affine.weight.reshape(shape).astype(dtype))
        node = add(
            "Conv",
            [u, weight, bias],
            v,
            label,
            kernel_shape=list(candidate.kernel),
            strides=list(region.geometry.strides),
            pads=list(candidate.pads),
        )
    elif region.kind == "token":
        weight = model.add_weight(f"{label}.weight", affine.weight.T.astype(dtype))
        node = add("MatMul", [u, weight], f"{label}_product", label)
        add("Add", [node.outputs[0], bias], v, f"{label}_bias")
    else:
        weight = model.add_weight(f"{label}.weight", affine.weight.astype(dtype))
        x = u
        if region.kind == "flatten":
            x = add("Flatten", [u], f"{label}_flat", f"{label}_flatten", axis=1).outputs[0]
        node = add("Gemm", [x, weight, bias], v, label, transB=1)
    model.prune()
    return node
