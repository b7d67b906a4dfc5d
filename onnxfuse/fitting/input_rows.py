"""The inputs of linear operators as rows to train on: those sampled of a convolution are patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting.memory import in_budget
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.sampling import RowSampler, output_size, patches, per_sample
from onnxfuse.ops.linear import LinearOp
from onnxfuse.pipeline.base import Context
from onnxfuse.runtime.observe import TappedModel, observe

TRAINING_ROWS_PER_COLUMN, LEAST_TRAINING_ROWS = 16, 1 << 13
"""Sampled rows per column of an operator, and the least."""

ROWS_MEMORY = 1 << 28
"""Bytes of rows that are kept at a time; a single operator's may take more."""

SplitRows = tuple[np.ndarray, np.ndarray]
"""Rows (n, columns) float32 of the fit samples, and of the held-out ones."""


def input_rows(
    model: Model, ops: Sequence[LinearOp], mask: str | None, context: Context
) -> Iterator[tuple[LinearOp, SplitRows]]:
    """Operators with the rows of their inputs, in as many runs as memory asks for.

    Args:
        model: the operators' own.
        ops: operators.
        mask: graph input that is 0 where a token is padding, None without one.
        context: of the pass.

    Raises:
        NotApplicableError: rows that aren't finite, or all of them padding.
    """
    for part in in_budget(ops, lambda op: {op: 4 * op.columns * _wanted(op)}, ROWS_MEMORY):
        yield from _rows(model, part, mask, context).items()


def _wanted(op: LinearOp) -> int:
    """Number of rows to sample, as far as memory allows."""
    return min(
        max(LEAST_TRAINING_ROWS, TRAINING_ROWS_PER_COLUMN * op.columns),
        max(ROWS_MEMORY // (4 * op.columns), 1),
    )


def _rows(
    model: Model, ops: Sequence[LinearOp], mask: str | None, context: Context
) -> dict[LinearOp, SplitRows]:
    """Rows of operators, all at a time."""
    tapped = TappedModel(model, sorted({op.x for op in ops}), context.runtime)
    parts = context.calibration.fit, context.calibration.held_out
    found: list[dict[LinearOp, np.ndarray]] = []
    for part in parts:
        collected = [_Collected(op, len(parts[0]), mask, context.seed) for op in ops]
        observe(tapped, part, [own.add for own in collected])
        found.append({own.op: own.rows() for own in collected})
    fitted, held = found
    for op in ops:
        if not all(np.isfinite(own[op]).all() for own in found):
            raise NotApplicableError(f"'{op.x}' is not finite on the samples")
        if not len(fitted[op]):
            raise NotApplicableError(f"all rows of '{op.x}' are padding")
    return {op: (fitted[op], held[op]) for op in ops}


class _Collected:
    """Rows of one operator's input at sampled positions; padding tokens are left out."""

    def __init__(self, op: LinearOp, batches: int, mask: str | None, seed: int) -> None:
        self.op = op
        self._batches = batches
        self._sampler = RowSampler(seed, op.y, mask if op.kind == "token" else None)
        self._found = [np.empty((0, op.columns), np.float32)]

    def add(self, batch: Batch, seen: Feed) -> None:
        op, x = self.op, seen[self.op.x]
        count = per_sample(_wanted(op), self._batches * len(x))
        geometry: dict[str, Any] = {
            "kernel": op.kernel,
            "strides": op.strides,
            "dilations": op.dilations,
            "pads": op.pads,
        }
        inner = output_size(x.shape[2:], **geometry) if op.kind == "conv" else x.shape[1:-1]
        rows = self._sampler.sample(batch.index, (len(x), *inner), count, batch.feed)
        found = patches(x, rows.positions, **geometry) if op.kind == "conv" else rows.vectors(x, -1)
        self._found.append(rows.without_padding(found.astype(np.float32, copy=False)))

    def rows(self) -> np.ndarray:
        """The rows (n, columns), float32."""
        return np.concatenate(self._found)
