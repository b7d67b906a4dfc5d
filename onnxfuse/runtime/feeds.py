"""Checks of a feed against a model's inputs, before ONNX Runtime sees it.

Samples are checked with the same functions when they are opened, long before the first run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxfuse.errors import InputError
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.narrow import NARROW, stands_for

NO_TENSOR = (
    "input '{name}' is not a tensor but a sequence, a map or the like, which can't be fed: give the model a "
    "tensor there (onnx.utils.extract_model cuts it behind that input)"
)
"""What an input is refused with that no array can feed."""


def check_feed(feed: Mapping[str, np.ndarray], inputs: Sequence[TensorInfo]) -> None:
    """Raise InputError unless `feed` has exactly `inputs`, each of its type, rank and fixed sizes."""
    names = [info.name for info in inputs]
    if unknown := [name for name in feed if name not in names]:
        raise InputError(f"the model has no input '{unknown[0]}'; its inputs are {_listed(names)}")
    if missing := [name for name in names if name not in feed]:
        raise InputError(f"no array for input '{missing[0]}'; the model's inputs are {_listed(names)}")
    for info in inputs:
        array = feed[info.name]
        if not isinstance(array, np.ndarray):
            raise InputError(f"input '{info.name}' wants a NumPy array, got {type(array).__name__}")
        check_type(info, array.dtype, array.shape)


def check_type(info: TensorInfo, dtype: np.dtype, shape: Sequence[int]) -> None:
    """Raise InputError unless an array can be fed to an input. Nothing is cast but to types that NumPy lacks
    (`narrow.stands_for`).

    Args:
        info: the input.
        dtype, shape: those of the array.
    """
    if info.dtype is None:
        raise InputError(NO_TENSOR.format(name=info.name))
    is_text = info.dtype == object and dtype.kind in "US"
    if dtype != info.dtype and not is_text and not stands_for(dtype, info.dtype):
        advice = f"convert it with .astype('{info.dtype}')"
        if info.dtype in NARROW:
            advice = f"give float32, which is rounded to it, or its bits as uint{8 * info.dtype.itemsize}"
        raise InputError(f"input '{info.name}' wants {info.dtype}, got {dtype}; {advice}")
    if info.shape is None:
        return
    fits = len(shape) == len(info.shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(info.shape, shape, strict=True)
    )
    if not fits:
        wanted, got = format_shape(info.shape), format_shape(shape)
        raise InputError(f"input '{info.name}' wants shape {wanted}, got {got}")


def format_shape(shape: Sequence[int | str | None]) -> str:
    """A shape for people: `[batch, 3, ?, ?]`."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
