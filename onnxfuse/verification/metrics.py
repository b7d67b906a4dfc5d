"""Metrics: how good a model's outputs are, as one score per sample, higher is better.

Scores stay per sample because two models are compared pair by pair: the spread of their difference is far
smaller than the spread of either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from onnxfuse.data.userscript import UserFunction, is_script
from onnxfuse.errors import InputError
from onnxfuse.verification.label_checks import class_numbers

if TYPE_CHECKING:
    from onnxfuse.numerics.significance import PairedDifference

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Batch
    from onnxfuse.runtime.session import Session

OutputArrays = Mapping[str, np.ndarray]
Metric = Callable[[OutputArrays, "np.ndarray | None"], np.ndarray]

_PROBABILITY = 1e-3  # how far from 1 the probabilities of a place may add up to


def top1(outputs: OutputArrays, labels: np.ndarray | None) -> np.ndarray:
    """The share of a sample's labels that the first output's largest entry is at: 1 or 0 where it has one.

    Args:
        outputs: the first is (n, classes), or has scores for each of many places: (n, places, classes), and
            with more axes (n, classes, *places). Axes of size 1 do not count.
        labels: class numbers, (n,), or one for each place, (n, *places); or one-hot, of the output's shape.

    Returns:
        Scores (n,).

    Raises:
        InputError: no labels, or they are no class numbers of that output.
    """
    scores, truth = _classes("top1", outputs, labels)
    hit = (scores.argmax(axis=2) == truth) & ~np.isnan(scores).any(axis=2)
    return hit.mean(axis=1)


def nll(outputs: OutputArrays, labels: np.ndarray | None) -> np.ndarray:
    """Minus the mean negative log-likelihood of a sample's labels, in nats: exp(-score) is the
    perplexity of a sample.

    The first output holds logits, log-probabilities, or probabilities: entries from 0 that add up to 1 at
    each place. Arguments and errors as in `top1`.

    Returns:
        Scores (n,).
    """
    scores, truth = _classes("nll", outputs, labels)
    scores = scores.astype(np.float64)
    if scores.min(initial=0.0) >= 0 and np.abs(scores.sum(axis=2) - 1).max(initial=0.0) < _PROBABILITY:
        scores = np.log(np.maximum(scores, np.finfo(np.float32).tiny))
    likelihood = scores - logsumexp(scores, axis=2, keepdims=True)
    return np.take_along_axis(likelihood, truth[:, :, None].astype(np.int64), axis=2).mean(axis=(1, 2))


def mse(outputs: OutputArrays, labels: np.ndarray | None) -> np.ndarray:
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


METRICS: dict[str, Metric] = {"top1": top1, "mse": mse, "nll": nll}


def _classes(metric: str, outputs: OutputArrays, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, places, classes) and class numbers (n, places) of the first output; errors as in `top1`."""
    name, output = next(iter(outputs.items()))
    truth = class_numbers(_labels(metric, labels), output)
    array = output if output.ndim else output.reshape(1)
    if sum(size > 1 for size in array.shape[1:]) <= 1:
        array = array.reshape(len(array), -1)
    if array.ndim > 3:
        array = np.moveaxis(array, 1, -1)
    places, classes = array.shape[:-1], array.shape[-1]
    if truth.dtype.kind not in "iub" or _squeezed(truth.shape) != _squeezed(places):
        wanted = f"{places[0]} integers" if len(places) == 1 else f"integers of shape {places}"
        raise InputError(
            f"metric {metric} wants {wanted} as labels for output '{name}' of shape {output.shape}, "
            f"got {truth.dtype} of shape {truth.shape}"
        )
    if truth.min(initial=0) < 0 or truth.max(initial=0) >= classes:
        raise InputError(
            f"metric {metric}: a label is outside 0..{classes - 1}, the classes of output '{name}'"
        )
    each = len(array), math.prod(places[1:])
    return array.reshape(*each, classes), truth.reshape(each)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


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

    def metric(outputs: OutputArrays, labels: np.ndarray | None) -> np.ndarray:
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

    Args:
        session: runs the model.
        batches: the samples, with labels where the metric needs them.
        metric: gives the scores of a batch.

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


@dataclass(frozen=True)
class MetricChange:
    """A metric before and after, on held-out samples; `max_drop` is the drop that was allowed."""

    name: str
    scores: PairedDifference
    max_drop: float | None
