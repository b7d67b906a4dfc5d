"""Labels given otherwise than wanted, and labels that a model knows nothing of."""

from __future__ import annotations

import numpy as np
import pytest
from nets import RUNTIME, net, normal
from scipy.stats import binom

from onnxfuse.data.calibration import Calibration
from onnxfuse.verification.label_checks import at_chance, class_numbers, label_doubts
from onnxfuse.verification.metrics import evaluate, top1

MODEL = net("y = MatMul(x, w)", {"w": (6, 10)}, x="float[N,6] x")


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 5), 1), ((8, 3, 5), 2), ((8, 5, 3, 2), 1), ((8, 5, 1, 1), 1), ((8, 1, 5), 2)]
)
def test_one_hot_labels_are_taken_for_the_classes(shape: tuple[int, ...], axis: int) -> None:
    scores = normal(*shape)
    numbers = np.random.default_rng(0).integers(0, 5, tuple(np.delete(shape, axis)))
    for dtype in ("float32", "int64", "bool"):
        labels = np.moveaxis(np.eye(5)[numbers], -1, axis).astype(dtype)
        np.testing.assert_array_equal(class_numbers(labels, scores), numbers)
        np.testing.assert_array_equal(top1({"y": scores}, labels), top1({"y": scores}, numbers))


def test_other_labels_stay_as_they_are() -> None:
    scores = normal(8, 5)
    for labels in (np.arange(8) % 5, normal(8, 5), np.ones((8, 5)), np.zeros((8, 5), int)):
        assert class_numbers(labels, scores) is labels


def test_a_score_is_chance_where_guessing_does_as_well() -> None:
    for classes, samples in ((2, 40), (10, 60), (1000, 30)):
        for right in range(samples + 1):
            scores = np.arange(samples) < right
            expected = binom.sf(right - 1, samples, 1 / classes) > 0.05
            assert at_chance(scores.astype(float), classes) is bool(
                expected and right / samples < 0.5 + 0.5 / classes
            )
    assert at_chance(np.array([1.0] * 5 + [0.0] * 55), 10)
    assert not at_chance(np.ones(2), 2)  # too few to tell, and all right
    assert not at_chance(np.zeros(9), 1)


def said(labels: np.ndarray, metric: str = "top1") -> list[str]:
    calibration = Calibration.open({"x": normal(200, 6), "labels": labels}, MODEL)
    session = RUNTIME.session(MODEL)
    scores = evaluate(session, calibration.held_out, top1)
    return label_doubts(metric, scores, session, calibration.held_out)


def test_labels_at_chance_level_are_told_loudly() -> None:
    right = (normal(200, 6) @ MODEL.weight(MODEL.tensor("w"))).argmax(1)
    assert said(right) == []
    (line,) = said(np.random.default_rng(1).integers(0, 10, 200))
    assert line.startswith("NO BETTER THAN CHANCE: top1 of the original is ")
    assert "guessing among 10 classes gives 0.1: most likely the samples are not preprocessed" in line
    assert said(np.random.default_rng(1).integers(0, 10, 200), "nll") == []
    assert said(np.eye(10, dtype=np.float32)[right]) == [
        "the labels are one-hot: the place of each 1 is taken for the class"
    ]
