"""Metrics: how good a model's outputs are, as one score per sample, higher is better.

Scores stay per sample because two models are compared pair by pair: the spread of their difference is far
smaller than the spread of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.errors import InputError
from onnxfuse.userscript import UserFunction, is_script

if TYPE_CHECKING:
    from onnxfuse.calibration import Batch
    from onnxfuse.runtime import Session

Outputs = Mapping[str, np.ndarray]
Metric = Callable[[Outputs, "np.ndarray | None"], np.ndarray]


def top1(outputs: Outputs, labels: np.ndarray | None) -> np.ndarray:
    """1 where the first output's largest entry is at the label, else 0.

    Args:
        outputs: the first is (n, classes); axes of size 1 do not count.
        labels: class numbers, (n,).

    Returns:
        Scores (n,).

    Raises:
        InputError: no labels, or they are no class numbers of that output.
    """
    name, output = next(iter(outputs.items()))
    truth = _labels("top1", labels)
    scores = output.reshape(len(output), -1) if output.ndim else output.reshape(1, 1)
    classes = scores.shape[1]
    if truth.dtype.kind not in "iub" or truth.size != len(scores):
        wanted = f"{len(scores)} integers"
        raise InputError(f"metric top1 wants {wanted} as labels, got {truth.dtype} of shape {truth.shape}")
    if sum(size > 1 for size in output.shape[1:]) > 1:
        raise InputError(f"metric top1 wants an output of shape (n, classes); '{name}' is {output.shape}")
    truth = truth.reshape(-1)
    if truth.min(initial=0) < 0 or truth.max(initial=0) >= classes:
        raise InputError(f"metric top1: a label is outside 0..{classes - 1}, the classes of output '{name}'")
    hit = (scores.argmax(axis=1) == truth) & ~np.isnan(scores).any(axis=1)
    return hit.astype(np.float64)


def mse(outputs: Outputs, labels: np.ndarray | None) -> np.ndarray:
    """Minus the mean squared error of the first output against the labels, which have its shape.

    Returns:
        Scores (n,).

    Raises:
        InputError: no labels, or of another shape.
    """
    name, output = next(iter(outputs.items()))
    truth = _labels("mse", labels)
    if truth.size != output.size or truth.shape[:1] != output.shape[:1]:
        raise InputError(
            f"metric mse wants labels of the shape of output '{name}', {output.shape}, got {truth.shape}"
        )
    error = output.astype(np.float64).reshape(len(output), -1) - truth.reshape(len(output), -1)
    return -np.mean(error**2, axis=1)


METRICS: dict[str, Metric] = {"top1": top1, "mse": mse}


def _labels(metric: str, labels: np.ndarray | None) -> np.ndarray:
    if labels is None:
        raise InputError(
            f"metric {metric} needs labels: give them as an array 'labels' in the calibration data"
        )
    return labels


def load_metric(spec: str) -> Metric:
    """A metric by its name in `METRICS`, or the user's `file.py:function`.

    The user's function gets the outputs by name and the labels (None where the data has none) of one batch,
    and returns one score per sample, higher is better.

    Raises:
        InputError: no such metric, file or function. The metric itself raises it when the user's function
            raises or returns something else than finite scores.
    """
    if spec in METRICS:
        return METRICS[spec]
    if not is_script(spec):
        choices = ", ".join(METRICS)
        raise InputError(f"unknown metric '{spec}'; choose from {choices}, or give file.py:function")
    function = UserFunction.load(spec, default="metric")

    def metric(outputs: Outputs, labels: np.ndarray | None) -> np.ndarray:
        return _scores(spec, function(outputs, labels))

    return metric


def _scores(who: str, value: Any) -> np.ndarray:
    try:
        scores = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"metric '{who}' returned a {type(value).__name__}, not one score per sample"
        ) from error
    if scores.ndim != 1 or not np.isfinite(scores).all():
        said = f"shape {scores.shape}" if scores.ndim != 1 else "NaN or infinity"
        raise InputError(
            f"metric '{who}' must return one finite score per sample, a vector; it returned {said}"
        )
    return scores


def evaluate(session: Session, batches: Iterable[Batch], metric: Metric) -> np.ndarray:
    """The score of every sample, in the order of the batches: float64 (samples,).

    Raises:
        InputError: the metric does not suit outputs and labels, or returns too few or too many scores.
    """
    scores = []
    for batch in batches:
        found = metric(session.run(batch.feed), batch.labels)
        if len(found) != batch.samples:
            raise InputError(
                f"the metric returned {len(found)} scores for a batch of {batch.samples} samples"
            )
        scores.append(found)
    return np.concatenate(scores) if scores else np.empty(0)
