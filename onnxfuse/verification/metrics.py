"""Metrics: how good a model's outputs are, as one score per sample, higher is better.

Scores stay per sample because two models are compared pair by pair: the spread of their difference is far
smaller than the spread of either.

Most metrics hold outputs against labels. Two need none: `agreement` and `cosine` hold them against the
outputs of the original on the same samples, which `evaluate` runs beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.special import logsumexp

from onnxfuse.data.userscript import UserFunction, is_script
from onnxfuse.errors import InputError
from onnxfuse.verification.label_checks import class_numbers

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Batch
    from onnxfuse.numerics.significance import PairedDifference
    from onnxfuse.runtime.session import Session

OutputArrays = Mapping[str, np.ndarray]
Metric = Callable[[OutputArrays, Any], np.ndarray]
"""Outputs, and the labels of their samples (None without), or for `BY_ORIGINAL` the outputs of the
original."""

_FILL = 1e3  # times the largest entry that changed: what masks write into outputs
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


def agreement(outputs: OutputArrays, original: OutputArrays) -> np.ndarray:
    """The share of a sample's places at which the first output has the original's class: 1 or 0 where it has
    one.

    Args:
        outputs: as in `top1`; an output of integers, truth values or texts is taken for the classes
            themselves.
        original: the outputs of the original.

    Returns:
        Scores (n,). NaN agrees with nothing.

    Raises:
        InputError: the first output has less than two scores a place, so that there are no classes.
    """
    name, output, truth = _both("agreement", outputs, original)
    if truth.dtype.kind not in "fc":
        return (output == truth).reshape(len(truth), -1).mean(axis=1)
    found, wanted = _by_place(output), _by_place(truth)
    if wanted.shape[-1] < 2:
        raise InputError(
            f"metric agreement wants scores of classes, and output '{name}' of shape {truth.shape} has one "
            "value a place; bound it with --max-error, or give a metric of your own"
        )
    known = ~(np.isnan(found).any(axis=-1) | np.isnan(wanted).any(axis=-1))
    same = (found.argmax(axis=-1) == wanted.argmax(axis=-1)) & known
    return same.reshape(len(same), -1).mean(axis=1)


def cosine(outputs: OutputArrays, original: OutputArrays) -> np.ndarray:
    """The cosine of the angle between the first output and the original's, all entries of a sample taken as
    one vector.

    Entries that are equal in both, and more than a thousand times as large as any of their sample that is
    not, are left out: masks write such numbers (-1e9, -inf), and next to them nothing else would count.

    Args:
        outputs: the first has a row for each sample.
        original: the outputs of the original.

    Returns:
        Scores (n,) from -1 to 1; 1 where both are zero, 0 where one is, -1 where a number is missing.

    Raises:
        InputError: the first output is not of floating-point numbers, or has one value a sample.
    """
    name, output, truth = _both("cosine", outputs, original)
    rows = [x.reshape(len(x), -1) for x in (output, truth)]
    if truth.dtype.kind != "f" or rows[1].shape[1] < 2:
        raise InputError(
            f"metric cosine wants several floating-point numbers a sample, and output '{name}' is "
            f"{truth.dtype} of shape {truth.shape}; bound it with --max-error, or take the metric agreement"
        )
    found, wanted = (row.astype(np.float64) for row in rows)
    changed = np.where(found == wanted, 0.0, np.abs(wanted)).max(axis=1, keepdims=True)
    fill = (found == wanted) & (np.abs(wanted) > _FILL * changed)
    found, wanted = (_unit(np.where(fill, 0.0, x)) for x in (found, wanted))
    angle = np.clip(np.einsum("ij,ij->i", found, wanted), -1.0, 1.0)
    both_zero = ~found.any(axis=1) & ~wanted.any(axis=1)
    return np.where(np.isnan(angle), -1.0, np.where(both_zero, 1.0, angle))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, or 0 where they are zero; NaN where they are not finite."""
    with np.errstate(invalid="ignore"):
        rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


METRICS: dict[str, Metric] = {"top1": top1, "mse": mse, "nll": nll, "agreement": agreement, "cosine": cosine}

BY_ORIGINAL = ("agreement", "cosine")
"""Metrics that hold the outputs against the original's."""

SHARES = ("top1", "agreement", "cosine")
"""Metrics of which 1 is all there is: a drop is a share."""


def _both(metric: str, outputs: OutputArrays, original: OutputArrays) -> tuple[str, np.ndarray, np.ndarray]:
    """The first output's name, and the two arrays."""
    name, truth = next(iter(original.items()))
    output = outputs.get(name)
    for array in (output, truth):
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise InputError(f"metric {metric} wants a row for each sample; output '{name}' has none")
    assert output is not None
    if output.shape != truth.shape:
        raise InputError(
            f"metric {metric}: output '{name}' has shape {output.shape}, and in the original {truth.shape}"
        )
    return name, output, truth


def _by_place(array: np.ndarray) -> np.ndarray:
    """Scores with the classes on the last axis, as `top1` finds them: (n, *places, classes)."""
    if sum(size > 1 for size in array.shape[1:]) <= 1:
        array = array.reshape(len(array), -1)
    return np.moveaxis(array, 1, -1) if array.ndim > 3 else array


def _classes(metric: str, outputs: OutputArrays, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, places, classes) and class numbers (n, places) of the first output; errors as in `top1`."""
    name, output = next(iter(outputs.items()))
    truth = class_numbers(_labels(metric, labels), output)
    array = _by_place(output if output.ndim else output.reshape(1))
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


def load_metric(spec: str, *, original: bool = True) -> Metric:
    """A metric by its name in `METRICS`, or the user's `file.py:function`.

    The user's function gets the outputs by name and the labels (None where the data has none) of one batch,
    and returns one score per sample, higher is better.

    Args:
        spec: the name, or the function.
        original: whether there is an original for `BY_ORIGINAL` to compare with.

    Raises:
        InputError: no such metric, file or function. The metric itself raises it when the user's function
            raises or returns something else than finite scores.
    """
    if spec in BY_ORIGINAL and not original:
        raise InputError(f"metric {spec} compares with an original; it is for compress and verify")
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


def evaluate(
    session: Session, batches: Iterable[Batch], metric: Metric, original: Session | None = None
) -> np.ndarray:
    """The score of every sample, in the order of the batches: float64 (samples,).

    Args:
        session: runs the model.
        batches: the samples, with labels where the metric needs them.
        metric: gives the scores of a batch.
        original: runs the original, for a metric of `BY_ORIGINAL`; None for others.

    Raises:
        InputError: the metric does not suit outputs and labels, or returns too few or too many scores.
    """
    scores = []
    for batch in batches:
        truth = batch.labels if original is None else original.run(batch.feed)
        found = metric(session.run(batch.feed), truth)
        if len(found) != batch.samples:
            raise InputError(
                f"the metric returned {len(found)} scores for a batch of {batch.samples} samples"
            )
        scores.append(found)
    return np.concatenate(scores) if scores else np.empty(0)


@dataclass(frozen=True)
class MetricChange:
    """A metric before and after, on held-out samples.

    Attributes:
        name: of the metric.
        scores: of both models.
        max_drop: the drop that was allowed; None without a limit.
        held_by: what keeps to it: the whole "interval", the "change" itself, or the change, which is noise
            because both models were proved to be the same ("proof").
    """

    name: str
    scores: PairedDifference
    max_drop: float | None
    held_by: Literal["interval", "change", "proof"] = "change"

    @property
    def reason(self) -> str | None:
        """Why the drop is too large, or can't be told to be small enough; None if it is."""
        found, allowed = self.scores, self.max_drop
        if allowed is None:
            return None
        limit = f"more than --max-drop {allowed:g}"
        if not -found.difference <= allowed:
            moved = f"{found.before:.4g} to {found.after:.4g}"
            return f"{self.name} drops by {-found.difference:.3g}, from {moved}, {limit}"
        if self.held_by != "interval" or found.low >= -allowed:
            return None
        needed = found.samples_for(allowed)
        more = "no number of samples shows that" if needed is None else f"about {needed:,} samples would do"
        return (
            f"{self.name} may drop by {-found.low:.3g}, {limit}: on {found.samples} held-out samples it "
            f"changes by {found.difference:+.3g}, {self._interval} from {found.low:+.3g} to {found.high:+.3g}"
            f"; {more}, or --confidence none goes by the change alone"
        )

    @property
    def _interval(self) -> str:
        return f"{self.scores.confidence * 100:.3g} % interval"

    @property
    def note(self) -> str | None:
        """What a change that was held to `max_drop` by itself leaves open; None if nothing."""
        found, allowed = self.scores, self.max_drop
        if self.held_by != "change" or allowed is None or self.reason is not None or found.low >= -allowed:
            return None
        return (
            f"--max-drop {allowed:g} is finer than {found.samples} held-out samples tell: {self.name} may "
            f"drop by {-found.low:.3g} ({self._interval})"
        )
