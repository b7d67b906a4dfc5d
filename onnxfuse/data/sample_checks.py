"""Checks that both kinds of samples go through: their names, their values, and where a fault lies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from onnxfuse.errors import InputError
from onnxfuse.ir.shapes import TensorInfo

LABELS = ("labels", "y", "label", "targets", "target")
"""Names under which an array of labels may come with the samples."""


def label_name(name: str, arrays: Iterable[str], inputs: Sequence[TensorInfo]) -> str | None:
    """The name of the label array, None without one.

    Args:
        name: names the samples in errors.
        arrays: names of the arrays.
        inputs: of the model.

    Raises:
        InputError: an input has no array, or an array is neither an input's nor the labels'.
    """
    wanted = [info.name for info in inputs]
    listed = ", ".join(f"'{w}'" for w in wanted)
    if missing := [w for w in wanted if w not in arrays]:
        got = ", ".join(f"'{a}'" for a in arrays) or "nothing"
        raise InputError(f"{name} has no array '{missing[0]}'; the model's inputs are {listed}, it has {got}")
    extra = [a for a in arrays if a not in wanted]
    label = next((a for a in LABELS if a in extra), None)
    if unknown := [a for a in extra if a != label]:
        raise InputError(
            f"{name} has an array '{unknown[0]}' that is no input; the model's inputs are {listed}, "
            f"and one array of labels may be called {', '.join(LABELS)}"
        )
    return label


def is_one_hot(labels: np.ndarray, axis: int = -1) -> bool:
    """Whether labels are a 1 for the class among zeros for the others, along an axis of two or more."""
    if labels.ndim < 2 or labels.shape[axis] < 2 or labels.dtype.kind not in "biuf" or not labels.size:
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(axis=axis) == 1).all())


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Let an InputError that the block raises begin with the place of the fault."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def require_finite(array: np.ndarray, where: str, rows: np.ndarray | int | None = None) -> None:
    """Raise InputError where an array holds NaN or infinity.

    Args:
        array: of any type.
        where: names it in the message.
        rows: the numbers that its rows have in the data, or that of the one row that it is.
    """
    if array.dtype.kind not in "fc" or np.isfinite(array).all():
        return
    if isinstance(rows, np.ndarray):
        rows = int(rows[np.argwhere(~np.isfinite(array))[0, 0]])
    at = "" if rows is None else f" in row {rows}"
    raise InputError(f"{where} holds NaN or infinity{at}; remove such samples")
