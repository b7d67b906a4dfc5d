"""A few rows of a batch, for what needs a run but no statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.data.batch_axes import batch_axes, fixed_batch
from onnxfuse.errors import NotApplicableError

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Batch
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.runtime.session import Runtime


def first_rows(model: Model, batch: Batch, size: int) -> Feed | None:
    """The first rows of a batch, cut along the dynamic batch axes of the inputs; None where that is no cut.

    Args:
        model: whose inputs are fed.
        batch: the batch.
        size: the number of rows.
    """
    every = batch_axes(model.inputs)
    axes = {name: axis for name, axis in every.items() if axis is not None}
    rows = {batch.feed[name].shape[axis] for name, axis in axes.items() if batch.feed[name].ndim > axis}
    if rows != {batch.samples} or size >= batch.samples or fixed_batch(model.inputs, every) is not None:
        return None
    cut = {name: np.take(batch.feed[name], range(size), axis=axis) for name, axis in axes.items()}
    return {**batch.feed, **cut}


def few_rows(model: Model, batches: Iterable[Batch], size: int, runtime: Runtime) -> Feed:
    """The first rows of the first batch, or all of it where that is no cut, or where the model fails on so
    few: a Reshape to fixed sizes takes whole batches alone.

    Args:
        model: whose inputs are fed; it remembers the rows until it is edited.
        batches: at least one.
        size: the number of rows.
        runtime: where it is tried.
    """
    known: list[tuple[Iterable[Batch], int, Feed]] = model.cached("few rows", list)
    feed = next((own for source, rows, own in known if source is batches and rows == size), None)
    if feed is None:
        feed = _few_rows(model, next(iter(batches)), size, runtime)
        known[:] = [(batches, size, feed), *known[:1]]
    return feed


def _few_rows(model: Model, batch: Batch, size: int, runtime: Runtime) -> Feed:
    rows = first_rows(model, batch, size)
    if rows is None:
        return batch.feed
    try:
        runtime.session(model, optimize=False).run(rows)
    except NotApplicableError:
        return batch.feed
    return rows
