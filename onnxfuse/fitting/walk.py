"""One walk over two networks that re-solves the linear operators of one against the other.

A rewritten network is off at every layer behind a rewrite. Each linear operator y = W x + b can repair some
of that: with x as the *rewritten* network now computes it, and t as the *original* network computed the same
tensor, the best weights are a regression of t on x (FuseInit, Ghods et al. 2020, Theorem 1 with a0 from the
rewritten network). Sites are taken in topological order, so each sees what the sites before it became.

- A *fresh* site (the operator that replaces a fused region) is solved from nothing, under a small ridge.
- A *refit* site is shrunk towards the weights it has. The ridge is chosen on held-out samples, and where the
  weights it has are best there, they stay.
- At a *bias* site the weights are somebody else's too, or zeros and shared values that are to stay: the bias
  alone is solved. A *keep* site is only measured.
- Where y goes into a sum y + r and nowhere else, the regression is of (original sum - rewritten r): the
  branch repairs the skip too.

The networks are not run once for each site. Both advance from one site to the next over all batches, and
only the tensors at the frontier are kept (`Spool`), so the whole walk costs about one inference of each
network, the moments, and the solves. A site's fit samples give the weights, its held-out samples choose the
ridge and measure the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import NotApplicableError
from onnxfuse.findings import Change, Prediction
from onnxfuse.fitting.frontier import Frontier, ReadOnce
from onnxfuse.fitting.sites import RefitSite, channel_axis, unchanged
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.affine import Affine
from onnxfuse.numerics.moments import Moments, add_patches
from onnxfuse.numerics.ridge import (
    RIDGES,
    best_bias,
    choose_ridge,
    generalized_cross_validation,
    per_channel,
    solve,
)
from onnxfuse.numerics.sampling import RowSampler, per_sample, row_shape
from onnxfuse.ops.linear import LinearOp
from onnxfuse.ops.linear_weights import write_weights
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.runtime.observe import Background
from onnxfuse.runtime.session import Runtime
from onnxfuse.runtime.spool import Spool

REFIT_RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
"""Ridges tried where an operator is shrunk towards its own weights."""

WALK_ROWS_PER_COLUMN = 64
"""Sampled rows per unknown of an output; more hardly change the fit."""

LEAST_WALK_ROWS = 1 << 14

CLAIMED_SAMPLES = 64
"""Fit samples, in whole batches, that a prediction is about. It is exact on whatever samples it is made for,
so a wrong one shows on few as well as on all; and to check it, both networks are run over them."""

TRIAL_RIDGE, TRIAL_REFIT_RIDGE = 3e-3, 1e-1
"""Ridges where none is searched for: from nothing, and towards the weights that are there. With few rows only
a strong pull keeps a refit from adding noise."""

EIGEN_COLUMNS = 1536
"""With more columns than this an eigendecomposition costs more than factoring the Gram for a few ridges."""

SETTLED = 1e-10
"""Relative error of float noise: weights that leave no more stay."""

_FEW_RIDGES = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Solved:
    """A site after its solution. Errors are mean squared errors of `site.tensor`, summed over channels.

    Attributes:
        site: the site.
        ridge: relative ridge; None where the weights stayed as they were, infinite where the bias alone
            moved.
        error, variance: of the fit samples; variance is the reference's, about its mean.
        claim: the same of the batches of fit samples that the prediction is about, and their numbers.
        held_error, held_variance: of the held-out samples, or of the fit samples where none are held out.
        held_before: the held-out error of the weights that were there, None for a fresh site.
        positions: sampled in each sample, None for all.
    """

    site: RefitSite
    ridge: float | None
    error: float
    variance: float
    held_error: float
    held_variance: float
    held_before: float | None
    positions: int | None
    claim: tuple[float, float, tuple[int, ...] | None]

    @property
    def relative(self) -> float:
        """Held-out error as a share of the held-out variance."""
        return self.held_error / self.held_variance if self.held_variance > 0 else math.inf

    def prediction(self) -> Prediction:
        """The claim for the verifier."""
        error, variance, batches = self.claim
        return Prediction(
            self.site.tensor,
            self.site.reference,
            error,
            variance,
            self.positions,
            channel_axis(self.site.op),
            self.site.mask,
            self.site.channels,
            batches,
        )


def refit_change(solved: Solved) -> Change:
    """The record of one operator that was solved again."""
    before = (solved.held_before or 0.0) / solved.held_variance if solved.held_variance else 0.0
    what, ridge = ("bias refit", None) if solved.ridge == math.inf else ("refit", solved.ridge)
    return Change(
        (solved.site.op.name,),
        f"{what}: relative error {before:.3g} -> {solved.relative:.3g}",
        {
            "tensor": solved.site.tensor,
            "ridge": ridge,
            "relative_error_before": before,
            "relative_error": solved.relative,
        },
    )


def walk(
    original: Model,
    rewritten: Model,
    sites: Sequence[RefitSite],
    calibration: Calibration,
    runtime: Runtime,
    *,
    seed: int = 0,
    ridge: float | None = None,
    paper: bool = False,
    quick: bool = False,
    progress: Progress | None = None,
) -> list[Solved]:
    """Solve the sites in order, writing the new weights into `rewritten`.

    Args:
        original: gives the targets; is not changed.
        rewritten: its sites' weights are replaced.
        sites: in the topological order of `rewritten`.
        calibration: the fit samples give the weights, the held-out ones choose the ridge (where none are held
            out, generalized cross-validation does).
        runtime: runs both.
        seed: of the sampled positions.
        ridge: for fresh sites; None chooses it on the held-out samples.
        paper: solve fresh convolutions one input channel at a time (FuseInit, Theorem 2).
        quick: for trials: fit samples only and fewer rows of them, products in single precision, ridges not
            searched.
        progress: told of every site.

    Raises:
        NotApplicableError: the activations aren't finite, or the original's tensor has another shape.
        InputError: bad samples; no room for intermediate tensors.
    """
    advance = (progress or NoProgress()).task("fitting", total=len(sites))
    solved: list[Solved] = []
    claimed = None if quick else calibration.fit.numbers(CLAIMED_SAMPLES)
    # ONNX Runtime and BLAS take turns many times a second: two pools of threads on the same cores get in each
    # other's way, and products of this size gain little from more than one.
    with Spool(calibration.budget.spool) as spool, threadpool_limits(1, "blas"), Background() as background:
        needs = [{site.op.x, *filter(None, (site.rest, site.mask))} for site in sites]
        # What both networks compute alike is computed once, by the original.
        right = Frontier(rewritten, needs, unchanged(original, rewritten), "b", spool, runtime)
        asked = [{site.reference} | given for site, given in zip(sites, right.given, strict=True)]
        left = Frontier(original, asked, set(), "a", spool, runtime)
        batches = ReadOnce([calibration.fit] if quick else [calibration.fit, calibration.held_out])
        for step, site in enumerate(sites):
            fit = _SiteFit(site, seed, len(calibration.fit), claimed, quick)
            targets, inputs = left.stretch(step), right.stretch(step)
            for batch, held, feed in batches.feeds(with_inputs=step == 0):
                known = targets.run(batch, feed)
                found = inputs.run(batch, known)
                # The moments of one batch are summed while the networks run the next.
                background.call(fit.add, batch, held, known[site.reference], found)
            background.wait()
            left.finish(step)
            right.finish(step)
            solved.append(fit.solve(rewritten, ridge, paper))
            advance()
    return solved


class _RowVariance:
    """Variance of rows about their mean, summed over channels; streamed."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._sum: np.ndarray | float = 0.0
        self._square = 0.0

    def add(self, rows: np.ndarray, weights: np.ndarray | None) -> None:
        wide = rows.astype(np.float64) if weights is None else rows[weights > 0].astype(np.float64)
        self._rows += len(wide)
        self._sum = self._sum + wide.sum(axis=0)
        self._square += float(np.vdot(wide, wide))

    def merge(self, other: _RowVariance) -> None:
        self._rows += other._rows
        self._sum = self._sum + other._sum
        self._square += other._square

    @property
    def variance(self) -> float:
        mean = self._sum / self._rows
        return max(self._square / self._rows - float(np.vdot(mean, mean)), 0.0)


class _SiteFit:
    """Moments of one site, fitted and held out, and its solution."""

    def __init__(
        self, site: RefitSite, seed: int, batches: int, claimed: tuple[int, ...] | None, quick: bool
    ) -> None:
        """Nothing is counted yet.

        Args:
            site: what is solved for.
            seed: of the sampled positions.
            batches: the number of batches of fit samples.
            claimed: numbers of those that the prediction is about, None for all.
            quick: see `walk`.
        """
        self.site = site
        self.sampler = RowSampler(seed, site.tensor, site.mask)
        self.quick = quick
        op = site.op
        self.moments = [
            Moments(op.columns * op.groups, op.out_features, op.groups, single=quick)
            for _ in range(2 if claimed is None else 3)
        ]
        # Where something is subtracted from it, the reference's spread is not that of the moments' target.
        self.spreads: Sequence[Moments | _RowVariance] = self.moments
        if site.rest is not None:
            self.spreads = [_RowVariance() for _ in self.moments]
        self.batches = batches
        self.claimed = claimed
        self.positions: int | None = None
        self.is_first = True

    def add(self, batch: int, held: bool, reference: np.ndarray, found: Feed) -> None:
        """Take in one batch.

        Args:
            batch: its number.
            held: whether its samples are held out.
            reference: the original's tensor.
            found: the rewritten network's tensors, by name.
        """
        op, x, axis = self.site.op, found[self.site.op.x], channel_axis(self.site.op)
        if self.site.channels is not None:
            reference = np.take(reference, self.site.channels, axis)
        target = self._target(reference, found)
        shape = row_shape(target.shape, axis)
        if self.is_first:
            self.is_first = False
            self.positions = self._positions(shape)
            if self.site.mask is not None and found[self.site.mask].shape != shape:
                self.site = replace(self.site, mask=None)
                self.sampler = replace(self.sampler, mask=None)
        rows = self.sampler.sample(batch, shape, self.positions, found)
        part = 2 if self.claimed is not None and not held and batch in self.claimed else int(held)
        moments, spread = self.moments[part], self.spreads[part]
        if isinstance(spread, _RowVariance):
            spread.add(rows.vectors(reference, axis), rows.weights)
        if op.kind == "conv":
            assert op.pads is not None
            add_patches(
                moments,
                x,
                target,
                rows.positions,
                kernel=op.kernel,
                strides=op.strides,
                dilations=op.dilations,
                pads=op.pads,
            )
            return
        moments.add(rows.vectors(x, -1), rows.vectors(target, -1), rows.weights)

    def _target(self, reference: np.ndarray, found: Feed) -> np.ndarray:
        """The tensor that the operator's output is to equal."""
        if self.site.rest is None:
            return reference
        rest = found[self.site.rest]
        if rest.shape != reference.shape:
            raise NotApplicableError(f"'{self.site.rest}' does not have the shape of '{self.site.tensor}'")
        return reference - rest

    def _positions(self, shape: Sequence[int]) -> int | None:
        """Positions in each sample of batches whose rows are of this shape, None for all."""
        rows = max(LEAST_WALK_ROWS, WALK_ROWS_PER_COLUMN * self.site.op.columns)
        count = per_sample(rows // 8 if self.quick else rows, self.batches * shape[0])
        return count if count < math.prod(shape[1:]) else None

    def solve(self, model: Model, ridge: float | None, paper: bool) -> Solved:
        """Write the best weights into `model`, where they are better than those that are there.

        Args:
            model: the rewritten network.
            ridge, paper: see `walk`.
        """
        op, judge = self.site.op, 1 if self.moments[1].n else 0
        if self.claimed is not None:  # the fit samples are the claimed ones and the others
            self.moments[0].merge(self.moments[2])
            if self.site.rest is not None:
                self.spreads[0].merge(self.spreads[2])  # type: ignore[arg-type]
        fit, held = self.moments[0], self.moments[judge]
        y, prior = op.y, None if self.site.how == "fresh" else op.weight
        before = None if prior is None else held.error(Affine(prior, op.bias))
        used: float | None = None
        settled = before is not None and before <= SETTLED * held.variance
        if self.site.how != "keep" and not settled:
            used, affine = self._solution(fit, held, prior, ridge, paper)
            after = held.error(affine)
            if not math.isfinite(after):
                raise NotApplicableError(f"'{self.site.tensor}' is not finite on the held-out samples")
            if before is None or after < before:
                weight = None if self.site.how == "bias" else affine.weight
                write_weights(model, op, weight, affine.bias, by="refit")
            else:
                used = None
        stored, about = _stored(model, op, y), 0 if self.claimed is None else 2
        return Solved(
            self.site,
            used,
            fit.error(stored),
            self.spreads[0].variance,
            held.error(stored),
            self.spreads[judge].variance,
            before,
            self.positions,
            (self.moments[about].error(stored), self.spreads[about].variance, self.claimed),
        )

    def _solution(
        self, fit: Moments, held: Moments, prior: np.ndarray | None, ridge: float | None, paper: bool
    ) -> tuple[float, Affine]:
        """Ridge and weights, by how the site and the walk's options have them solved."""
        if self.site.how == "bias":
            assert prior is not None
            return math.inf, best_bias(fit, prior)
        if paper and prior is None and self.site.op.kind == "conv":
            return 0.0, per_channel(fit, self.site.op.in_features)
        if prior is None and ridge is not None:
            return ridge, solve(fit, ridge)
        if self.quick:
            used = TRIAL_RIDGE if prior is None else TRIAL_REFIT_RIDGE
            return used, solve(fit, used, prior)
        return _choose(fit, held, prior)


def _stored(model: Model, op: LinearOp, y: str) -> Affine:
    """The weights that the model now holds: rounded to their dtype, the bias perhaps in a new Add."""
    last = model.producer(model.tensor(y))
    now = op if last is op.node else replace(op, bias_node=last)
    return Affine(now.weight, now.bias)


def _choose(fit: Moments, held: Moments, prior: np.ndarray | None) -> tuple[float, Affine]:
    """The ridge with the least held-out error (cross-validated where none are held out), and its solution."""
    ridges = RIDGES if prior is None else REFIT_RIDGES
    if fit.dx // fit.groups > EIGEN_COLUMNS:
        found = [(ridge, solve(fit, ridge, prior)) for ridge in _FEW_RIDGES]
        return found[-1] if held is fit else min(found, key=lambda pair: held.error(pair[1]))
    if held is fit:
        return generalized_cross_validation(fit, ridges, prior)
    return choose_ridge(fit, held, ridges, prior)
