"""Replace regions of a network by one affine operator each (APPROXIMATE).

FuseInit (Ghods et al. 2020, Theorem 1) replaces two layers u -> v by the affine map that is closest to them
in mean square, W = C_vu C_u^-1 and b = mean(v) - W mean(u). The same holds for any region with one entry and
one exit: more layers, pooling and normalization inside, a residual block with its skip, the MLP or attention
block of a transformer per token. For a convolution the columns are patches, and all columns are solved
jointly; the paper's Theorem 2 solves each input channel alone, which supposes that channels are uncorrelated.
They are not, and the result is useless; it is there as `mode=paper`.

A region is a candidate only if one operator in its place takes fewer multiply-accumulates and no more
parameters or bytes than go with the region: weights that are tied to others don't.

Four steps:

1. **Survey.** One tapped run of the network gives the moments of all candidates, hence each one's local fit.
2. **Rank** by the change of the network's *outputs*, per multiply-accumulate saved; local errors say little
   about that. First with each candidate's local fit in place, one forward run each; then, for the best
   disjoint ones, with everything behind it refitted, on a few samples.
3. **Walk** (`onnxfuse.fitting.walk`): the chosen regions are solved again in topological order, from the
   inputs that the rewritten network gives them, and every linear operator behind them is refitted.
4. **Bound.** Without a number of blocks, the longest prefix of the ranking is fused whose output change on
   held-out samples stays within the error bound; found by bisection, each probe a walk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from onnxfuse.analysis.cost import node_macs, shapes_at
from onnxfuse.analysis.regions.check import check_geometry
from onnxfuse.analysis.regions.region import Region, describe_region
from onnxfuse.analysis.regions.search import find_regions
from onnxfuse.findings import Change, Json, Skip
from onnxfuse.fitting.local_fits import Candidate, Fit, fit_locally
from onnxfuse.fitting.rewriting import Mask, finished, first_feed, named, nothing, walked
from onnxfuse.fitting.search import SearchResult, error_bound, farthest
from onnxfuse.fitting.sites import MOST_UNKNOWNS, check_mask, kept_channels
from onnxfuse.fitting.trials import Trials
from onnxfuse.fitting.walk import Solved, refit_change
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.numerics.affine import Affine
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear_building import add_linear
from onnxfuse.ops.shared_weights import own_weights
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.goals import Goals, number_taken
from onnxfuse.runtime.observed_shapes import shapes_on

AUTO_KERNEL = 3
"""Largest kernel that is chosen unasked: a larger one costs more than the two 3x3 it replaces."""

MOST_OPS = {"conv": 3, "flatten": 3, "dense": 3, "token": 6}
"""Linear operators in a region, unasked: a residual block with a projected skip, a transformer layer."""

MANY_COLUMNS = 2048
"""Unknowns for each output that are fitted from fewer samples than that."""


class FuseOptions(Goals):
    """Options of `fuse`."""

    goals: ClassVar = {"max_blocks": number_taken}

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
    mask: Mask = None


@dataclass(frozen=True)
class _Ranked:
    """A candidate with the output change that it alone causes and the share of MACs that it saves."""

    fit: Fit
    change: float
    saved: float

    @property
    def region(self) -> Region:
        """The region that is replaced."""
        return self.fit.candidate.region

    def order(self) -> tuple[float, str]:
        """The key to sort by: the output change per MAC saved."""
        return self.change / self.saved, self.region.v


class Fuse(Pass):
    """Fewer, affine operators in place of whole regions."""

    name = "fuse"
    contract = Contract.APPROXIMATE
    summary = "replace regions (layer pairs, residual blocks, transformer blocks) by one affine operator"
    Options = FuseOptions
    options: FuseOptions
    example: ClassVar[str] = "fuse:max_blocks=4,kernel=3"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite."""
        check_mask(model, self.options.mask)
        candidates, skipped = self._candidates(model, context)
        if not candidates:
            where = named(self.options.only, "with all names")
            return nothing(model, skipped, f"no region of this model{where} can be fused")
        fits = fit_locally(
            model,
            [candidate for candidate, _ in candidates],
            context.calibration.apart(self.options.samples),  # trials are judged on what no fit has seen
            context.runtime,
            seed=context.seed,
            mask=self.options.mask,
            progress=context.progress,
        )
        trials = Trials.of(context, self.options.samples, self.options.rank)
        shortlist, refused = self._shortlist(model, fits, [saved for _, saved in candidates], context, trials)
        skipped += refused
        ranked = self._ranked(model, shortlist, context, trials)
        found, order = self._farthest(model, ranked, context)
        fused = {item.region.v for item in order[: found.count]}
        left = [item for item in ranked if item.region.v not in fused]
        why = "beyond the bound or number of blocks" if fused else "see the notes"
        return finished(model, found, skipped + _left(left, why))

    def _candidates(self, model: Model, context: Context) -> tuple[list[tuple[Candidate, float]], list[Skip]]:
        """Regions with the operator that may replace them and the share of the model's MACs that it saves."""
        feed = first_feed(context)
        most = self.options.max_ops
        regions, skipped = find_regions(
            model, shapes_on(model, feed, context.runtime), max_ops=most or max(MOST_OPS.values())
        )
        shapes = shapes_at(model, feed, context.runtime)
        known = shapes_on(context.original, feed, context.runtime)
        total = max(sum(node_macs([node], shapes, model.opset) or 0 for node in model.nodes), 1)
        found: list[tuple[Candidate, float]] = []
        for region in _widest(regions):
            if not all(fnmatchcase(site, self.options.only) for site in region.sites):
                continue
            if region.linear_ops > (most or MOST_OPS[region.kind]):
                continue
            candidate = self._candidate(region, shapes)
            saved = None if isinstance(candidate, str) else _saved(model, candidate, shapes)
            rows = context.calibration.fit.samples * _positions(region, shapes)
            if isinstance(candidate, str):
                reason = candidate
            elif region.v not in known:
                reason = f"its output '{region.v}' is not a tensor of the original"
            elif isinstance(cut := kept_channels(model, region.v, 1 if region.kind == "conv" else -1), str):
                reason = cut
            elif candidate.columns > MOST_UNKNOWNS:
                reason = f"{candidate.columns} unknowns for each output are too many to solve for"
            elif candidate.columns > max(MANY_COLUMNS, rows):
                reason = (
                    f"{candidate.columns} unknowns for each output are more than the "
                    f"{rows} rows of the fit samples can settle"
                )
            elif saved is None:
                reason = "its multiply-accumulates can't be counted"
            elif saved <= 0:
                reason = f"one operator in its place would cost more: {-saved / total:+.1%} of all MACs"
            elif grown := _grown(model, candidate):
                reason = grown
            else:
                found.append((candidate, saved / total))
                continue
            skipped.append(Skip(region.sites, reason))
        return found, skipped

    def _candidate(self, region: Region, shapes: dict[str, TensorInfo]) -> Candidate | str:
        """The operator that may replace a region, or why none may."""
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
        changes = trials.changes(
            [fit for fit, _ in usable], lambda fit: self._alone(model, fit), context, model
        )
        ranked = []
        for (fit, share), change in zip(usable, changes, strict=True):
            if math.isinf(change):
                skipped.append(Skip(fit.candidate.region.sites, "the network fails without it"))
            elif change > 0:
                ranked.append(_Ranked(fit, change, share))
            else:
                reason = "the outputs don't depend on it on these samples, so nothing would tell a bad fit"
                skipped.append(Skip(fit.candidate.region.sites, reason))
        chosen, overlapping = _disjoint(ranked)
        skipped += overlapping
        size = max(self.options.shortlist, self.options.max_blocks or 0)
        skipped += _left(chosen[size:], f"not among the {size} best (shortlist)")
        shortlist, feeds = [], [trials.feed]
        for item in chosen[:size]:
            candidate = item.fit.candidate
            kernels = [candidate.kernel] if candidate.kernel else None
            check = check_geometry(model, candidate.region, context.runtime, feeds, kernels=kernels)
            if check.passed:
                shortlist.append(item)
            else:
                skipped.append(Skip(candidate.region.sites, f"its sizes don't hold: {check.reason}"))
        return shortlist, skipped

    def _alone(self, model: Model, fit: Fit) -> Model:
        """The model with one region replaced by its local fit."""
        trial = model.copy()
        _replace(trial, fit.candidate, fit.affine, self.name)
        return trial

    def _ranked(
        self, model: Model, shortlist: Sequence[_Ranked], context: Context, trials: Trials
    ) -> list[_Ranked]:
        """The shortlist by the output change that each alone leaves, with all behind it refitted.

        Walks on a few of the fit samples; the change is measured on others of them.
        """
        changes = trials.changes(
            shortlist,
            lambda item: model.copy(),
            context,
            model,
            fit=lambda item, own, alone: self._fused(own, [item], alone, quick=True).model,
            task="ranking",
        )
        found = [replace(item, change=own) for item, own in zip(shortlist, changes, strict=True)]
        found.sort(key=_Ranked.order)
        for place, item in enumerate(found, start=1):
            context.journal(
                "fuse candidate",
                place=place,
                region=describe_region(item.region),
                relative_error=item.fit.held,
                output_change=item.change,
            )
        return found

    def _farthest(
        self, model: Model, ranked: Sequence[_Ranked], context: Context
    ) -> tuple[SearchResult, list[_Ranked]]:
        """The model with as many regions fused as asked for, or as the bound allows, and the order in which
        they are taken."""
        most, order = self.options.max_blocks, list(ranked)
        if most is not None:
            number = min(most, len(order))
            notes = [f"fused {number} of {len(order)} regions, as asked for (max_blocks={most})"]
            made = self._fused(model, order[:number], context) if number else None
            return SearchResult(made, notes, number), order
        bound = error_bound(context)[0]
        # One that breaks the bound alone would end the prefix, however many MACs it saves: it goes last.
        order.sort(key=lambda item: self.options.rank == "error" and item.change > bound**2)
        of = f"of {len(order)} regions"
        found = farthest(
            range(1, len(order) + 1),
            lambda number: self._fused(model, order[:number], context),
            context,
            self.options,
            said=lambda number: f"fused {number} {of}",
            more=lambda number: "one more",
            none=lambda within, error: (
                f"fused 0 {of}: held-out output error {within}"
                + (f"; with one more it would be {error:.3g}" if order else "")
            ),
            guess=sum(math.sqrt(total) <= bound for total in accumulate(item.change for item in order)),
            event=("fuse probe", "blocks"),
        )
        return found, order

    def _fused(
        self, model: Model, chosen: Sequence[_Ranked], context: Context, *, quick: bool = False
    ) -> PassResult:
        """The model with these regions replaced, and all behind them solved again.

        Args:
            model: stays as it is.
            chosen: regions that share no node.
            context: of the pass, or of a trial.
            quick: see `fitting.walk.walk`.
        """
        made = model.copy()
        fresh = [(_replace(made, i.fit.candidate, i.fit.affine, self.name), i.region.v) for i in chosen]
        solved, skipped = walked(
            model,
            made,
            context,
            mask=self.options.mask,
            refit=self.options.refit,
            fresh=fresh,
            ridge=self.options.ridge,
            paper=self.options.mode == "paper",
            quick=quick,
        )
        by_tensor = {item.region.v: item for item in chosen}
        moved = [item for item in solved if item.ridge is not None]
        changes = [
            _change(by_tensor[item.site.tensor], item) if item.site.how == "fresh" else refit_change(item)
            for item in moved
        ]
        why = " (mode=paper supposes uncorrelated channels)" if self.options.mode == "paper" else ""
        bad = (item for item in moved if item.site.how == "fresh" and item.relative > 1.0)
        notes = [
            f"warning: '{i.site.tensor}' has relative error {i.relative:.3g}, worse than a constant{why}"
            for i in bad
        ]
        return PassResult(made, changes, skipped, [item.prediction() for item in moved], notes)


def _change(ranked: _Ranked, solved: Solved) -> Change:
    """The report's line for one region."""
    region = ranked.region
    made = f"fused {describe_region(region)} into one {_operator(ranked.fit.candidate)}"
    detail: dict[str, Json] = {
        "region": describe_region(region),
        "tensor": region.v,
        "operator": solved.site.op.name,
        "ridge": solved.ridge,
        "relative_error": solved.relative,
        "relative_error_fitted": solved.error / solved.variance if solved.variance else 0.0,
        "relative_error_alone": ranked.fit.held,
        "output_change_alone": ranked.change,
        "macs_saved": ranked.saved,
    }
    what = f"{made}, relative error {solved.relative:.3g}"
    return Change(tuple(node.site_name for node in region.nodes), what, detail)


def _operator(candidate: Candidate) -> str:
    """The operator that replaces a region, in words."""
    kind = candidate.region.kind
    size = "x".join(map(str, candidate.kernel))
    return f"{size} Conv" if kind == "conv" else "MatMul" if kind == "token" else "Gemm"


def _left(ranked: Sequence[_Ranked], why: str) -> list[Skip]:
    """Skips for candidates that were ranked and not taken."""
    return [
        Skip(
            item.region.sites,
            f"left: relative error {item.fit.held:.3g}, output change {item.change:.3g} alone; {why}",
        )
        for item in ranked
    ]


def _widest(regions: Sequence[Region]) -> Iterator[Region]:
    """The last of all regions with the same entry and linear operators: it takes in the skip, at no error."""
    last = {(region.u, region.kind, region.sites): region for region in regions}
    return iter(last.values())


def _positions(region: Region, shapes: dict[str, TensorInfo]) -> int:
    """Rows that a sample gives: one for each position of a map, each token, or else one."""
    shape = shapes[region.v].shape or ()
    sizes = shape[2:] if region.kind == "conv" else shape[1:-1]
    return math.prod(s for s in sizes if isinstance(s, int))


def _saved(model: Model, candidate: Candidate, shapes: dict[str, TensorInfo]) -> int | None:
    """MACs of the region less those of what replaces it."""
    region = candidate.region
    before = node_macs(region.nodes, shapes, model.opset)
    after = shapes[region.v].shape
    if before is None or after is None or not all(isinstance(size, int) for size in after):
        return None
    return before - math.prod(int(size) for size in after if size is not None) * candidate.columns


def _grown(model: Model, candidate: Candidate) -> str | None:
    """Why a region stays whose operator would have more parameters or bytes than go with it; None if not."""
    region = candidate.region
    types = [weight_type(model, tensor) for tensor in own_weights(model, region.nodes, region.u)]
    before = sum(math.prod(shape) for _, shape in types)
    after = (candidate.columns + 1) * region.out_features
    if after > before:
        return f"one operator in its place would have {after:,} parameters, more than the {before:,} that go"
    stored = sum(math.prod(shape) * dtype.itemsize for dtype, shape in types)
    size = after * candidate.dtype.itemsize
    if size > stored:
        return f"one operator in its place would take {size:,} bytes, more than the {stored:,} that go"
    return None


def _disjoint(ranked: Sequence[_Ranked]) -> tuple[list[_Ranked], list[Skip]]:
    """Sorted, and of those that share a node the better one."""
    taken: set[Node] = set()
    chosen, skipped = [], []
    for item in sorted(ranked, key=_Ranked.order):
        if taken.isdisjoint(item.region.nodes):
            taken.update(item.region.nodes)
            chosen.append(item)
        else:
            skipped.append(Skip(item.region.sites, "overlaps a region that ranks higher"))
    return chosen, skipped


def _replace(model: Model, candidate: Candidate, affine: Affine, by: str) -> Node:
    """Put one affine operator in the region's place; returns the node that holds the weights.

    Args:
        model: may be a copy of the one the region was found in: nodes are found by what they compute.
        candidate: the region and the operator.
        affine: its weights.
        by: name of the pass.
    """
    region = candidate.region
    u, v = model.tensor(region.u), model.tensor(region.v)
    made = {node.outputs[0].name for node in region.nodes}
    old = [node for node in model.nodes if node.outputs and node.outputs[0].name in made]
    names = [node.name for node in old if node.name]
    model.remove(old)
    label = f"{region.sites[-1]}_fused"
    weight, bias = (np.asarray(own).astype(candidate.dtype) for own in (affine.weight, affine.bias))
    stored = model.add_weight(f"{label}.bias", bias)
    op = {"conv": "Conv", "token": "MatMul"}.get(region.kind, "Gemm")
    attrs: dict[str, Any] = {}
    if region.geometry is not None:
        attrs = {
            "kernel_shape": list(candidate.kernel),
            "strides": list(region.geometry.strides),
            "pads": list(candidate.pads),
        }
    elif op == "Gemm":
        attrs = {"transB": 1}
    kind: dict[str, Any] = {"by": by, "replaces": names}
    if region.kind == "flatten":
        flat = model.add_node("Flatten", [u], [f"{label}_flat"], {"axis": 1}, f"{label}_flatten", **kind)
        u = flat.outputs[0]
    node = add_linear(model, op, u, weight, stored, v, label, kernel=candidate.kernel, attrs=attrs, **kind)
    model.prune()
    return node
