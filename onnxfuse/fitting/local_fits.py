"""Moments of all candidate regions from one tapped run of the network.

Candidates that start at the same tensor share its patches and its Gram matrix: one `Moments` for each
distinct input view (tensor, kernel, stride, pads), with the targets of all its candidates side by side. A
handful of sampled positions per sample is enough to rank candidates; the weights that are used in the end are
solved by the walk, from more. Where the matrices of all views, or the tensors that they tap, would together
take too much memory, there are several runs, each for some of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from onnxfuse.analysis.regions.region import Region
from onnxfuse.data.batch_rows import tensor_bytes
from onnxfuse.data.calibration import Batch, Calibration
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.affine import Affine
from onnxfuse.numerics.moments import Moments, add_patches
from onnxfuse.numerics.ridge import solve
from onnxfuse.numerics.sampling import RowSampler, per_sample, row_shape
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.runtime.memory import in_budget
from onnxfuse.runtime.observe import Background, TappedModel, observe
from onnxfuse.runtime.session import Runtime

LOCAL_ROWS_PER_COLUMN = 8
"""Sampled rows per column: enough to tell a good candidate from a bad one."""

LEAST_LOCAL_ROWS = 1 << 10
"""Sampled rows at least: the held errors of a few are noise."""

LOCAL_RIDGE = 3e-3
"""Relative ridge of a local fit, which only serves to rank."""


@dataclass(frozen=True)
class Candidate:
    """A region and the operator that may replace it: its dtype and, of a convolution, kernel and pads."""

    region: Region
    dtype: np.dtype
    kernel: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        """Unknowns per output."""
        return self.region.in_features * math.prod(self.kernel)

    @property
    def view(self) -> tuple[object, ...]:
        """A key to the rows of its inputs: candidates of equal views share their Gram matrix."""
        region = self.region
        strides = region.geometry.strides if region.geometry is not None else ()
        return (region.u, region.kind, self.kernel, self.pads, strides)


@dataclass(frozen=True)
class Fit:
    """A candidate's local fit, with its relative errors on the fitted and on the held-out samples."""

    candidate: Candidate
    affine: Affine
    fitted: float
    held: float


class _View:
    """Moments of one input view against the targets of all its candidates."""

    def __init__(self, candidates: Sequence[Candidate], batches: int, seed: int, mask: str | None) -> None:
        first = candidates[0]
        self.candidates = candidates
        self.targets = list(dict.fromkeys(c.region.v for c in candidates))
        self.widths = {c.region.v: c.region.out_features for c in candidates}
        self.moments = [Moments(first.columns, sum(self.widths.values()), single=True) for _ in range(2)]
        self.batches = batches
        self.positions: int | None = None
        self.sampler = RowSampler(seed, first.region.u, mask if first.region.kind == "token" else None)

    def add(self, batch: Batch, held: bool, found: Feed) -> None:
        """Take in one batch.

        Args:
            batch: the batch.
            held: whether its samples are held out.
            found: the tensors by name.
        """
        first = self.candidates[0]
        region, x = first.region, found[first.region.u]
        y = [found[name] for name in self.targets]
        moments = self.moments[held]
        if self.positions is None:
            self.positions = per_sample(
                max(LEAST_LOCAL_ROWS, LOCAL_ROWS_PER_COLUMN * first.columns), self.batches * len(x)
            )
        shape = row_shape(y[0].shape, 1 if region.kind == "conv" else -1)
        rows = self.sampler.sample(batch.index, shape, self.positions, batch.feed)
        if region.kind == "conv":
            assert region.geometry is not None
            target = np.concatenate(y, axis=1) if len(y) > 1 else y[0]
            add_patches(
                moments,
                x,
                target,
                rows.positions,
                kernel=first.kernel,
                strides=region.geometry.strides,
                dilations=(1,) * len(first.kernel),
                pads=first.pads,
            )
            return
        inputs = x.reshape(len(x), -1) if region.kind == "flatten" else rows.vectors(x, -1)
        moments.add(inputs, np.concatenate([rows.vectors(t, -1) for t in y], axis=1), rows.weights)

    def fits(self, ridge: float) -> list[Fit]:
        """The fits of all its candidates."""
        fit, held = self.moments
        if not held.n:
            held = fit
        affine = solve(fit, ridge)
        errors = [moments.errors(affine) for moments in (fit, held)]
        spreads = [moments.yy / moments.n for moments in (fit, held)]
        result, start, where = [], 0, {}
        for name in self.targets:
            where[name] = slice(start, start + self.widths[name])
            start += self.widths[name]
        for candidate in self.candidates:
            part = where[candidate.region.v]
            relative = [
                float(e[part].sum() / s[part].sum()) if s[part].sum() > 0 else math.inf
                for e, s in zip(errors, spreads, strict=True)
            ]
            result.append(
                Fit(candidate, Affine(affine.weight[part], affine.bias[part]), relative[0], relative[1])
            )
        return result


def fit_locally(
    model: Model,
    candidates: Sequence[Candidate],
    calibration: Calibration,
    runtime: Runtime,
    *,
    seed: int = 0,
    ridge: float = LOCAL_RIDGE,
    mask: str | None = None,
    progress: Progress | None = None,
) -> list[Fit]:
    """The local fit of every candidate, in the given order: inputs and targets from one run over the samples.

    Args:
        model: the candidates' own.
        candidates: regions, and what may replace each.
        calibration: the fit samples are fitted, the held-out ones judge.
        runtime: runs the model.
        seed: of the sampled positions.
        ridge: relative, of every fit.
        mask: graph input that is 0 where a token is padding, None without one.
        progress: told of every batch.

    Raises:
        InputError: bad samples.
        NotApplicableError: activations that are not finite.
    """
    grouped: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        grouped.setdefault(candidate.view, []).append(candidate)
    runs = _runs(model, list(grouped.values()), calibration, runtime)
    total = len(runs) * (len(calibration.fit) + len(calibration.held_out))
    advance = (progress or NoProgress()).task("calibrating", total=total)
    fits: dict[int, Fit] = {}
    for groups in runs:
        names = [name for group in groups for c in group for name in (c.region.u, c.region.v)]
        tapped = TappedModel(model, names, runtime)
        views = [_View(group, len(calibration.fit), seed, mask) for group in groups]
        with threadpool_limits(1, "blas"), Background() as background:
            for held, part in ((False, calibration.fit), (True, calibration.held_out)):
                # The moments of one batch are summed while the network runs the next.
                add = partial(background.call, _add, views, held)
                observe(tapped, part, [add], advance)
            background.wait()
            fits.update((id(fit.candidate), fit) for view in views for fit in view.fits(ridge))
    return [fits[id(candidate)] for candidate in candidates]


def _runs(
    model: Model, groups: Sequence[list[Candidate]], calibration: Calibration, runtime: Runtime
) -> list[list[list[Candidate]]]:
    """The groups in runs whose Gram matrices and taps fit into memory."""
    if not groups:
        return []
    budget = calibration.budget
    sizes = tensor_bytes(model, next(iter(calibration.fit)).feed, runtime)

    def grams(group: list[Candidate]) -> dict[object, int]:
        return {group[0].view: 16 * group[0].columns ** 2}  # two float64 matrices, fitted and held out

    def taps(group: list[Candidate]) -> dict[object, int]:
        return {name: sizes.get(name, 0) for c in group for name in (c.region.u, c.region.v)}

    parts = in_budget(groups, grams, budget.sums)
    return [run for part in parts for run in in_budget(part, taps, budget.taps)]


def _add(views: Sequence[_View], held: bool, batch: Batch, found: Feed) -> None:
    for view in views:
        view.add(batch, held, found)
