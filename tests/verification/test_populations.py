"""Outputs that hold numbers of several scales: each is measured in units of its own, and ordinary outputs are
measured as a whole. Everything is held against sums by NumPy over all samples at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from onnxfuse.verification.compare import differences
from onnxfuse.verification.records import OutputDifference

RANDOM = np.random.default_rng(5)


def compared(a: np.ndarray, b: np.ndarray, sizes: Sequence[int] = (1, 7, 32, 24)) -> OutputDifference:
    """The difference of two outputs, taken in batch by batch."""
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == len(a)
    cuts = [slice(*pair) for pair in pairwise(edges)]
    runs = [({"y": a[cut]}, {"y": b[cut]}, size) for cut, size in zip(cuts, sizes, strict=True)]
    (found,) = differences(runs)
    return found


def relative(a: np.ndarray, b: np.ndarray, chosen: np.ndarray | None = None) -> float:
    """Root mean square difference over root mean square deviation from the mean of each feature over the
    samples, of the chosen elements."""
    weight = np.ones(a.shape) if chosen is None else chosen.astype(float)
    wide, other = (np.where(weight > 0, x, 0).astype(np.float64) for x in (a, b))
    mean = (wide * weight).sum(0) / np.maximum(weight.sum(0), 1)
    return float(np.sqrt((weight * (wide - other) ** 2).sum() / (weight * (wide - mean) ** 2).sum()))


def softmax(x: np.ndarray) -> np.ndarray:
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


LOGITS = RANDOM.normal(0, 3, (64, 10))
FILLS = [
    (-1e4, "float32"),
    (-1e9, "float32"),
    (float(np.finfo("float32").min), "float32"),
    (float(np.finfo("float64").min), "float64"),
    (float(np.finfo("float16").min), "float16"),
    (-1e4, "float16"),
    (1e6, "float32"),
]


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize(("fill", "dtype"), FILLS)
def test_a_mask_hides_no_error_of_the_rest(fill: float, dtype: str, by_sample: bool) -> None:
    masked = (
        RANDOM.random(LOGITS.shape) < 0.3 if by_sample else np.broadcast_to(np.arange(10) < 3, LOGITS.shape)
    )
    a, b = (np.where(masked, fill, LOGITS * factor).astype(dtype) for factor in (1, 1.5))
    found = compared(a, b)
    assert found.relative == pytest.approx(relative(a, b, ~masked), rel=1e-6)
    assert found.max_abs == pytest.approx(np.abs(a - b)[~masked].max(), rel=1e-2)
    rest, filled = found.parts
    assert (rest.elements, filled.elements) == (np.count_nonzero(~masked), np.count_nonzero(masked))
    assert (filled.relative, filled.basis) == (0, "size")
    assert filled.scale == pytest.approx(abs(fill), rel=1e-3)
    assert found.ratio > 1e2
    assert compared(a, a).relative == 0
    for one, other in zip(found.parts, compared(a, b, (24, 1, 32, 7)).parts, strict=True):
        assert (one.elements, one.scale) == (other.elements, pytest.approx(other.scale))
        assert one.relative == pytest.approx(other.relative)


def test_a_mask_that_is_added() -> None:
    masked = RANDOM.random(LOGITS.shape) < 0.3
    for fill in (-1e4, -1e9):
        a, b = ((LOGITS * factor + masked * fill).astype(np.float32) for factor in (1, 1.2))
        found = compared(a, b)
        assert found.parts[0].relative == pytest.approx(relative(a, b, ~masked), rel=1e-5)
        assert found.relative == pytest.approx(found.parts[0].relative, rel=0.2)


def test_another_fill_is_a_difference() -> None:
    masked = np.broadcast_to(np.arange(10) < 3, LOGITS.shape)
    found = compared(np.where(masked, -1e9, LOGITS), np.where(masked, -1e8, LOGITS))
    assert found.relative == pytest.approx(0.9)


def boxes(anchors: int = 20, scores: int = 3) -> np.ndarray:
    """A detector's output: four rows of pixels beside rows of scores, (64, rows, anchors)."""
    centers = RANDOM.uniform(8, 632, (64, 2, anchors))
    sizes = np.exp(RANDOM.normal(4, 0.6, (64, 2, anchors)))
    return np.concatenate([centers, sizes, 1 / (1 + np.exp(RANDOM.normal(3, 2, (64, scores, anchors))))], 1)


@pytest.mark.parametrize("scores", [1, 3, 30])
@pytest.mark.parametrize("last", [False, True])
def test_pixels_hide_no_error_of_scores(scores: int, last: bool) -> None:
    a = boxes(scores=scores)
    b = a.copy()
    b[:, 4:] *= 1.5
    axis = 2 if last else 1
    a, b = (np.moveaxis(x, 1, axis).astype(np.float32) for x in (a, b))
    place = np.broadcast_to((np.arange(4 + scores) >= 4).reshape((-1, 1) if axis == 1 else (-1,)), a.shape)
    found = compared(a, b)
    assert relative(a, b) < 0.01 < found.relative
    assert found.relative == pytest.approx(relative(a, b, place), rel=1e-6)
    names = [part.where for part in found.parts]
    assert names == [f"axis {axis}: " + ("4" if scores == 1 else f"4-{3 + scores}"), f"axis {axis}: 0-3"]


def test_rows_of_detections_whose_number_varies() -> None:
    runs = []
    for count in (3, 9, 1, 5):
        row = RANDOM.uniform((0, 0, 0, 0, 0.2), (640, 640, 640, 640, 1), (count, 5))
        runs.append(({"y": row}, {"y": row * [1, 1, 1, 1, 1.3]}, 2))
    (found,) = differences(runs)
    a, b = (np.concatenate([run[side]["y"] for run in runs])[:, 4] for side in (0, 1))
    assert found.relative == pytest.approx(np.sqrt(((a - b) ** 2).mean()) / a.std(), rel=1e-6)


ORDINARY = {
    "logits": LOGITS,
    "a rare class": softmax(LOGITS - 12.0 * (np.arange(10) == 4)),
    "winners of a sharp softmax": softmax(40 * LOGITS),
    "log-probabilities": np.log(softmax(12 * LOGITS)),
    "one-hot": np.eye(10)[LOGITS.argmax(1)],
    "a dead channel of a Relu": np.maximum(10 * LOGITS * np.where(np.arange(10) == 2, 1e-4, 1), 0),
    "a constant column": np.where(np.arange(10) == 2, 0.0, LOGITS),
    "rounding beside numbers": np.where(np.arange(10) == 2, 1e-9 * LOGITS, LOGITS),
    "offsets": LOGITS + 200 * np.arange(10),
    "pixels": RANDOM.uniform(0, 1280, (64, 4)),
    "white pixels": 255 / (1 + np.exp(-20 * LOGITS)),
    "a map of features": np.maximum(
        RANDOM.normal(0, np.exp(RANDOM.normal(0, 1, (12, 1, 1))), (64, 12, 4, 4)), 0
    ),
    "texts, places by words": softmax(RANDOM.normal(0, 4, (64, 5, 50))),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_output_is_measured_as_a_whole(kind: str) -> None:
    a = ORDINARY[kind].astype(np.float32)
    b = (a + 0.1 * RANDOM.normal(0, a.std(), a.shape)).astype(np.float32)
    found = compared(a, b)
    assert found.parts == ()
    assert found.relative == pytest.approx(relative(a, b), rel=1e-6)


def test_infinities_and_nan_are_left_out_where_both_have_them() -> None:
    masked = RANDOM.random(LOGITS.shape) < 0.3
    for fill in (-np.inf, np.inf, np.nan):
        a, b = (np.where(masked, fill, LOGITS * factor) for factor in (1, 1.5))
        found = compared(a, b)
        assert found.problem is None
        assert found.nonfinite == np.count_nonzero(masked)
        assert found.relative == pytest.approx(relative(a, b, ~masked), rel=1e-9)
    other = np.where(masked, -np.inf, LOGITS)
    assert "has infinity in" in str(compared(np.where(masked, np.inf, LOGITS), other).problem)
    more = other.copy()
    more[3, np.flatnonzero(~masked[3])[0]] = -np.inf
    assert "'y' of the result has infinity in 1 of 70 elements" in str(compared(other, more).problem)
    assert "'y' of the original has infinity in 1 of 70 elements" in str(compared(more, other).problem)


def test_an_output_that_is_zero_or_does_not_vary() -> None:
    zero, eps = np.zeros((64, 3), np.float32), np.finfo(np.float32).eps
    found = compared(zero, zero + np.float32(1e-3))
    assert (found.basis, found.relative) == ("spacing", pytest.approx(1e-3 / eps, rel=1e-5))
    assert found.ratio == found.relative
    assert compared(zero, zero).ratio == 0
    same = np.full((64, 3), 0.5, np.float32)
    found = compared(same, same * np.float32(1.1))
    assert (found.basis, found.relative) == ("size", pytest.approx(0.1, rel=1e-5))


def test_outputs_without_a_number() -> None:
    for same in (np.full((64, 3), np.nan), np.full((64, 3), -np.inf), np.zeros((64, 0))):
        found = compared(same, same)
        assert (found.problem, found.relative, found.ratio, found.floor) == (None, 0, 0, 0)
        assert found.nonfinite == same.size
        assert found.basis == "spread"  # nothing is said to be zero


def test_complex_numbers() -> None:
    a = LOGITS[:, :5] + 1j * LOGITS[:, 5:]
    b = a * 1.1
    expected = np.sqrt((np.abs(a - b) ** 2).sum() / (np.abs(a - a.mean(0)) ** 2).sum())
    assert compared(a.astype(np.complex64), b.astype(np.complex64)).relative == pytest.approx(
        expected, rel=1e-5
    )
