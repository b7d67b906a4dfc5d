"""Labels that are given otherwise than metrics want them, or that a model knows nothing of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.data.sample_checks import is_one_hot

if TYPE_CHECKING:
    from onnxfuse.data.calibration import BatchStream
    from onnxfuse.runtime.session import Session

_CHANCE = 0.05  # probability that guessing does as well, above which a score counts as guessing


def class_numbers(labels: np.ndarray, output: np.ndarray) -> np.ndarray:
    """The labels, as numbers of classes where they are one-hot.

    Args:
        labels: of the samples of an output.
        output: the scores of classes: on axis 1 where it has more than three, else on the last.
    """
    if output.ndim < 2 or labels.shape != output.shape:
        return labels
    axis = class_axis(output)
    return labels.argmax(axis) if is_one_hot(labels, axis) else labels


def class_axis(output: np.ndarray) -> int:
    """The axis of an output on which its classes lie, as `metrics.top1` finds them."""
    wide = [axis for axis, size in enumerate(output.shape) if axis and size > 1]
    if len(wide) == 1:
        return wide[0]
    return 1 if output.ndim > 3 else output.ndim - 1


def label_doubts(metric: str, scores: np.ndarray, session: Session, batches: BatchStream) -> list[str]:
    """What is to be said of labels that `top1` took, a line each; nothing of other metrics.

    Args:
        metric: its name.
        scores: of the samples.
        session: of the model.
        batches: the samples, at least one.
    """
    if metric != "top1":
        return []
    batch = next(iter(batches))
    output = next(iter(session.run(batch.feed).values()))
    found = []
    if batch.labels is not None and class_numbers(batch.labels, output) is not batch.labels:
        found.append("the labels are one-hot: the place of each 1 is taken for the class")
    if at_chance(scores, classes := output.shape[class_axis(output)] if output.ndim > 1 else 1):
        found.append(
            f"NO BETTER THAN CHANCE: top1 of the original is {scores.mean():.3g} on {len(scores)} samples, "
            f"and guessing among {classes} classes gives {1 / classes:.3g}: most likely the samples are not "
            "preprocessed as in training (scale, mean, order of channels), or the classes are numbered "
            "otherwise; errors and the metric say nothing until that is right"
        )
    return found


def at_chance(scores: np.ndarray, classes: int) -> bool:
    """Whether guessing would do about as well: it would in one case of twenty, and the score is nearer to
    guessing than to 1.

    Args:
        scores: from 0 to 1, of each sample.
        classes: their number.
    """
    from scipy.special import bdtrc

    if classes < 2 or not len(scores):
        return False
    right, chance = round(float(scores.sum())), 1 / classes
    as_well = 1.0 if right == 0 else float(bdtrc(right - 1, len(scores), chance))
    return as_well > _CHANCE and float(scores.mean()) < (1 + chance) / 2
