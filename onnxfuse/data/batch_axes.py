"""The axis of each input along which samples lie, as the model declares it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from onnxfuse.ir.shapes import TensorInfo

_BATCH_NAME = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)


def batch_axes(inputs: Sequence[TensorInfo]) -> dict[str, int | None]:
    """The axis of each input that counts samples; None for an input that is the same for all of them.

    If some dimension is named like a batch, it is the axis so named: 1 for [2, batch, 128]. Otherwise it is
    the axis named like the first axis of the first input with a name there, or else axis 0 where it is
    dynamic, since some exporters give every dimension a name of its own. If no first axis is dynamic, it is
    axis 0 of every input that has as many rows as the first.
    """
    shapes = {info.name: info.shape for info in inputs}
    leading = [shape[0] for shape in shapes.values() if shape]
    dims = {dim for shape in shapes.values() for dim in shape or () if isinstance(dim, str)}
    batch: set[str | None] = {dim for dim in dims if _BATCH_NAME.search(dim)}
    first = next((dim for dim in leading if isinstance(dim, str)), None)
    dynamic = batch or first or None in leading or None in shapes.values()
    fixed = leading[0] if leading and not dynamic else None

    def axis(shape: tuple[int | str | None, ...] | None) -> int | None:
        if shape is None:
            return 0
        named = [i for i, dim in enumerate(shape) if dim is not None and dim in (batch or {first})]
        if named or not shape:
            return named[0] if named else None
        unnamed = shape[0] is None or (isinstance(shape[0], str) and not batch)
        return 0 if unnamed or (fixed is not None and shape[0] == fixed) else None

    return {name: axis(shape) for name, shape in shapes.items()}


def fixed_batch(inputs: Sequence[TensorInfo], axes: Mapping[str, int | None]) -> int | None:
    """The number of rows that the model declares for a batch, None where any will do."""
    for info in inputs:
        axis = axes[info.name]
        if axis is not None and info.shape is not None:
            dim = info.shape[axis]
            if isinstance(dim, int):
                return dim
    return None
