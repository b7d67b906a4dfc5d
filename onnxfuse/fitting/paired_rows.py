"""Rows to train an operator on: what it reads in a rewritten network, and what the original computes there.

Both networks are looked at in the same places. Rows of a convolution's input are patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting.sites import RefitSite, channel_axis
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.sampling import RowSampler, patches, per_sample, row_shape
from onnxfuse.ops.linear import LinearOp
from onnxfuse.pipeline.base import Context
from onnxfuse.runtime.observe import TappedModel

TRAINING_ROWS_PER_COLUMN, LEAST_TRAINING_ROWS = 16, 1 << 13
"""Sampled rows per column of an operator, and the least."""

ROWS_MEMORY = 1 << 28
"""Bytes of an operator's rows at most."""


@dataclass(frozen=True)
class PairedRows:
    """Rows of one operator, float32.

    Attributes:
        x: inputs (n, columns), as the rewritten network computes them.
        rest: what is added to the operator's output (n, out), where it is a branch of a sum; else 0.
        target: the original's output (n, out), or sum.
    """

    x: np.ndarray
    rest: np.ndarray | float
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def paired_rows(
    original: Model, rewritten: Model, op: LinearOp, site: RefitSite, context: Context
) -> tuple[PairedRows, PairedRows]:
    """Rows of the fit samples, and of the held-out ones. Rows of padding are left out.

    Args:
        original: gives the targets.
        rewritten: gives the inputs.
        op: the operator whose inputs are taken.
        site: what its output is held against.
        context: of the pass.

    Raises:
        NotApplicableError: rows that aren't finite, or all of them padding.
    """
    read = sorted({op.x, *filter(None, (site.rest,))})
    ours = TappedModel(rewritten, read, context.runtime)
    theirs = TappedModel(original, [site.reference], context.runtime)
    calibration = context.calibration
    fitted, held = (
        _rows(op, site, len(part), ((b, ours.run(b.feed), theirs.run(b.feed)) for b in part), context.seed)
        for part in (calibration.fit, calibration.held_out)
    )
    for part in (fitted, held):
        for name, rows in ((op.x, part.x), (site.rest, part.rest), (site.reference, part.target)):
            if not np.isfinite(rows).all():
                raise NotApplicableError(f"'{name}' is not finite on the samples")
    if not len(fitted):
        raise NotApplicableError(f"all rows of '{op.x}' are padding")
    return fitted, held


def _rows(
    op: LinearOp, site: RefitSite, batches: int, seen: Iterable[tuple[Batch, Feed, Feed]], seed: int
) -> PairedRows:
    """The rows of some batches, each with what the rewritten and what the original network computes."""
    sampler, axis = RowSampler(seed, op.y, site.mask), channel_axis(op)
    geometry: dict[str, Any] = {
        "kernel": op.kernel,
        "strides": op.strides,
        "dilations": op.dilations,
        "pads": op.pads,
    }
    xs = [np.empty((0, op.columns), np.float32)]
    rests, targets = ([np.empty((0, op.out_features), np.float32)] for _ in range(2))
    for batch, ours, theirs in seen:
        target, x = theirs[site.reference], ours[op.x]
        if site.channels is not None:
            target = np.take(target, site.channels, axis)
        count = per_sample(_wanted(op), batches * len(x))
        rows = sampler.sample(batch.index, row_shape(target.shape, axis), count, batch.feed)

        def taken(found: np.ndarray, rows: Any = rows) -> np.ndarray:
            return rows.without_padding(found.astype(np.float32, copy=False))

        xs.append(taken(patches(x, rows.positions, **geometry) if op.kind == "conv" else rows.vectors(x, -1)))
        targets.append(taken(rows.vectors(target, axis)))
        if site.rest is not None:
            rests.append(taken(rows.vectors(ours[site.rest], axis)))
    rest: np.ndarray | float = 0.0 if site.rest is None else np.concatenate(rests)
    return PairedRows(np.concatenate(xs), rest, np.concatenate(targets))


def _wanted(op: LinearOp) -> int:
    """Number of rows to sample, as far as memory allows."""
    return min(
        max(LEAST_TRAINING_ROWS, TRAINING_ROWS_PER_COLUMN * op.columns),
        max(ROWS_MEMORY // (4 * op.columns), 1),
    )
