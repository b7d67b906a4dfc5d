"""Metrics: per-sample scores against ones worked out by hand, and what a user's own metric may do wrong."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch

from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.numerics.significance import paired_difference
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import METRICS, MetricChange, evaluate, load_metric

HeldBy = Literal["interval", "change", "proof"]
SCORES = {"logits": np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5]], np.float32)}


def test_top1() -> None:
    top1 = METRICS["top1"]
    np.testing.assert_array_equal(top1(SCORES, np.array([1, 0, 0])), [1, 1, 0])
    np.testing.assert_array_equal(top1(SCORES, np.array([[1], [2], [2]], np.uint8)), [1, 0, 1])
    pooled = {"logits": SCORES["logits"].reshape(3, 3, 1, 1)}
    np.testing.assert_array_equal(top1(pooled, np.array([1, 0, 0])), [1, 1, 0])


def test_top1_takes_the_first_output() -> None:
    other = np.zeros((3, 2), np.float32)
    np.testing.assert_array_equal(METRICS["top1"]({**SCORES, "other": other}, np.array([1, 0, 2])), [1, 1, 1])


def test_top1_counts_nan_as_wrong() -> None:
    """argmax would point at the NaN, which may be where the label is."""
    broken = {"logits": np.array([[np.nan, 1.0], [0.0, 1.0]], np.float32)}
    np.testing.assert_array_equal(METRICS["top1"](broken, np.array([0, 1])), [0, 1])


@pytest.mark.parametrize(
    ("shape", "axis", "places"),
    [((6, 5, 4), 2, (6, 5)), ((6, 4, 5, 3), 1, (6, 5, 3)), ((6, 1, 4), 2, (6, 1)), ((6, 4, 1, 1), 1, (6,))],
)
def test_labels_for_each_place(shape: tuple[int, ...], axis: int, places: tuple[int, ...]) -> None:
    """A sample's score is the mean over its places, against torch's cross entropy, which wants classes on
    axis 1."""
    random = np.random.default_rng(0)
    logits = random.normal(size=shape).astype(np.float32)
    labels = random.integers(0, 4, places)
    first = torch.from_numpy(np.moveaxis(logits, axis, 1)).double()
    truth = torch.from_numpy(labels).reshape(first.select(1, 0).shape)
    hits = (first.argmax(1) == truth).double().reshape(6, -1).mean(1)
    losses = torch.nn.functional.cross_entropy(first, truth, reduction="none").reshape(6, -1).mean(1)
    np.testing.assert_allclose(METRICS["top1"]({"y": logits}, labels), hits)
    np.testing.assert_allclose(METRICS["nll"]({"y": logits}, labels), -losses)


def test_nll() -> None:
    """Logits, their softmax and its logarithm say the same, and even odds cost log 3."""
    nll, labels = METRICS["nll"], np.array([1, 0, 0])
    logits = np.random.default_rng(0).normal(size=(3, 3))
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log(odds[[0, 1, 2], labels])
    for scores in (logits, odds, np.log(odds), logits + 7, odds.astype(np.float32)):
        np.testing.assert_allclose(nll({"y": scores}, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(nll({"y": np.zeros((2, 3))}, np.array([0, 2])), [-np.log(3)] * 2)
    certain = nll({"y": np.array([[0.0, 1.0], [1.0, 0.0]])}, np.array([0, 0]))
    assert np.isfinite(certain).all()
    assert certain[0] < -80
    assert certain[1] == pytest.approx(0, abs=1e-12)


def test_mse() -> None:
    outputs = {"y": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)}
    scores = METRICS["mse"](outputs, np.array([[1.0, 0.0], [3.0, 5.0]]))
    np.testing.assert_allclose(scores, [-2.0, -0.5])
    column = {"y": np.array([[1.0], [3.0]], np.float32)}
    np.testing.assert_allclose(METRICS["mse"](column, np.array([1.0, 1.0])), [0.0, -4.0])


REFUSED = {
    "top1 without labels": ("top1", None, "needs labels: give them as an array 'labels'"),
    "top1 of floats": (
        "top1",
        np.array([1.0, 0.0, 0.0]),
        r"wants 3 integers as labels for output .*, got float64",
    ),
    "top1 of too few": ("top1", np.array([1, 0]), "wants 3 integers as labels"),
    "top1 past the classes": ("top1", np.array([1, 0, 3]), r"outside 0\.\.2"),
    "top1 below 0": ("top1", np.array([1, 0, -1]), r"outside 0\.\.2"),
    "nll without labels": ("nll", None, "metric nll needs labels"),
    "nll past the classes": ("nll", np.array([1, 0, 3]), r"metric nll: a label is outside 0\.\.2"),
    "mse without labels": ("mse", None, "needs labels"),
    "mse of another shape": ("mse", np.zeros((3, 2)), r"shape of output 'logits', \(3, 3\), got \(3, 2\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_do_not_fit(case: str) -> None:
    name, labels, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        METRICS[name](SCORES, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.zeros((2, 4), int), np.zeros((2, 3))])
def test_labels_that_do_not_fit_a_map(labels: np.ndarray) -> None:
    wanted = r"wants integers of shape \(2, 3\) as labels for output 'map' of shape \(2, 3, 4\), got "
    with pytest.raises(InputError, match=wanted):
        METRICS["top1"]({"map": np.zeros((2, 3, 4), np.float32)}, labels)


# --- against the original -----------------------------------------------------------------------------------


def test_agreement() -> None:
    agreement = METRICS["agreement"]
    moved = SCORES["logits"] * np.float32(1.5) + np.array([0, 0, 0.6], np.float32)
    np.testing.assert_array_equal(agreement({"logits": moved}, SCORES), [1, 1, 1])
    np.testing.assert_array_equal(agreement({"logits": SCORES["logits"][[1, 1, 2]]}, SCORES), [0, 1, 1])
    broken = SCORES["logits"].copy()
    broken[0, 1] = np.nan
    np.testing.assert_array_equal(agreement({"logits": broken}, SCORES), [0, 1, 1])


@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 4), 2), ((6, 4, 5, 3), 1), ((6, 4, 1, 1), 1)])
def test_agreement_at_places(shape: tuple[int, ...], axis: int) -> None:
    """It is top1 with the original's classes for labels."""
    random = np.random.default_rng(0)
    first, noise = random.normal(size=(2, *shape)).astype(np.float32)
    second = first + noise
    expected = METRICS["top1"]({"y": second}, first.argmax(axis=axis))
    found = METRICS["agreement"]({"y": second}, {"y": first})
    np.testing.assert_array_equal(found, expected)
    assert len(set(found)) > 1


def test_agreement_of_outputs_that_are_classes() -> None:
    for first, second in (
        (np.array([1, 2, 3]), np.array([1, 5, 3])),
        (np.array(list("abc")), np.array(list("axc"))),
    ):
        np.testing.assert_array_equal(METRICS["agreement"]({"y": second}, {"y": first}), [1, 0, 1])


def test_cosine() -> None:
    random = np.random.default_rng(1)
    first, second = random.normal(size=(2, 5, 3, 4)).astype(np.float32)
    a, b = torch.from_numpy(first).flatten(1).double(), torch.from_numpy(second).flatten(1).double()
    expected = torch.nn.functional.cosine_similarity(a, b)
    found = METRICS["cosine"]({"y": second}, {"y": first})
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(METRICS["cosine"]({"y": 3 * first}, {"y": first}), 1)
    rows = np.array([[0, 0], [0, 0], [1, 2]], np.float32)
    other = np.array([[0, 0], [1, 0], [1, np.nan]], np.float32)
    np.testing.assert_array_equal(METRICS["cosine"]({"y": other}, {"y": rows}), [1, 0, -1])


@pytest.mark.parametrize("fill", [-1e9, float(np.finfo(np.float32).min), -np.inf])
@pytest.mark.parametrize("masked", [1, 8])
def test_cosine_sees_what_lies_beside_a_mask(fill: float, masked: int) -> None:
    first, second = np.random.default_rng(1).normal(size=(2, 5, 10)).astype(np.float32)
    expected = METRICS["cosine"]({"y": second[:, masked:]}, {"y": first[:, masked:]})
    first[:, :masked] = second[:, :masked] = fill
    np.testing.assert_allclose(METRICS["cosine"]({"y": second}, {"y": first}), expected)


@pytest.mark.parametrize(
    ("metric", "first", "second", "said"),
    [
        ("agreement", np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32), "one value a place"),
        ("cosine", np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32), "bound it with --max-error"),
        ("cosine", np.zeros((3, 4), int), np.zeros((3, 4), int), "take the metric agreement"),
        ("cosine", np.zeros((3, 4), np.float32), np.zeros((3, 5), np.float32), r"has shape \(3, 5\)"),
        ("agreement", [np.zeros(3)], [np.zeros(3)], "wants a row for each sample"),
    ],
)
def test_outputs_that_can_not_be_held_against_the_original(
    metric: str, first: Any, second: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        METRICS[metric]({"y": second}, {"y": first})


def test_there_must_be_an_original() -> None:
    with pytest.raises(InputError, match="metric cosine compares with an original"):
        load_metric("cosine", original=False)


# --- the drop that is allowed -------------------------------------------------------------------------------


def change(lost: int, won: int, samples: int, allowed: float, held_by: HeldBy) -> MetricChange:
    before = np.r_[np.ones(lost), np.zeros(won), np.ones(samples - lost - won)]
    after = np.r_[np.zeros(lost), np.ones(won), np.ones(samples - lost - won)]
    return MetricChange("top1", paired_difference(before, after), allowed, held_by)


def test_a_drop_is_held_to_by_the_whole_interval() -> None:
    found = change(0, 0, 60, 0.01, "interval")
    said = str(found.reason)
    assert said.startswith(
        "top1 may drop by 0.0602, more than --max-drop 0.01: on 60 held-out samples it changes by +0"
    )
    assert "95 % interval from -0.0602 to +0.0602" in said
    assert "about 38" in said  # z^2 (1 - 0.01) / 0.01 = 380
    assert "--confidence none" in said
    assert change(0, 0, 400, 0.01, "interval").reason is None
    assert change(3, 3, 400, 0.01, "interval").reason is not None
    assert change(3, 3, 400, 0.02, "interval").reason is None
    assert "no number of samples" in str(change(1, 1, 60, 0.0, "interval").reason)


def test_a_drop_is_held_to_by_itself() -> None:
    found = change(1, 1, 60, 0.01, "change")
    assert found.reason is None
    assert str(found.note).startswith(
        "--max-drop 0.01 is finer than 60 held-out samples tell: top1 may drop by "
    )
    assert change(1, 1, 60, 0.01, "proof").note is None
    kinds: tuple[HeldBy, ...] = ("interval", "change", "proof")
    for held_by in kinds:
        said = str(change(3, 0, 60, 0.01, held_by).reason)
        assert said == "top1 drops by 0.05, from 1 to 0.95, more than --max-drop 0.01"
    assert change(1, 1, 60, 0.5, "change").note is None


# --- metrics of one's own -----------------------------------------------------------------------------------


def test_a_metric_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("SCALE = 2\n")
    script = tmp_path / "mine.py"
    script.write_text(
        "from helper import SCALE\n"
        "def metric(outputs, labels):\n    return [0, 1, 2]\n"
        "def margin(outputs, labels):\n    return SCALE * outputs['logits'].max(axis=1)\n"
    )
    np.testing.assert_allclose(load_metric(f"{script}:margin")(SCORES, None), [1.8, 1.6, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(load_metric(str(script))(SCORES, None), [0, 1, 2])
    assert load_metric("top1") is METRICS["top1"]


@pytest.mark.parametrize("spec", ["top5", "metric.txt:fn"])
def test_unknown_metrics(spec: str) -> None:
    with pytest.raises(
        InputError,
        match=r"unknown metric .*; choose from top1, mse, nll, agreement, cosine, or give file\.py:function",
    ):
        load_metric(spec)


OWN = {
    "raises": ("raise ValueError('two\\nlines')", r"m\.py:fn' raised ValueError: two lines"),
    "scalar": ("return 0.5", r"must return one finite score per sample, a vector; it returned shape \(\)"),
    "matrix": ("return outputs['logits']", r"returned shape \(3, 3\)"),
    "nothing": ("return None", "it returned shape|returned a NoneType"),
    "text": ("return 'good'", "returned a str, not one score per sample"),
    "nan": ("return [1, 2, float('nan')]", "it returned NaN or infinity"),
}


@pytest.mark.parametrize("case", OWN)
def test_what_a_metric_of_ones_own_may_do_wrong(tmp_path: Path, case: str) -> None:
    body, message = OWN[case]
    script = tmp_path / "m.py"
    script.write_text(f"def fn(outputs, labels):\n    {body}\n")
    with pytest.raises(InputError, match=message) as error:
        load_metric(f"{script}:fn")(SCORES, None)
    assert "\n" not in str(error.value)
    assert str(script) in str(error.value)


def test_scripts_that_do_not_load(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.py"):
        load_metric(str(tmp_path / "none.py"))
    (tmp_path / "m.py").write_text("x = 1")
    with pytest.raises(InputError, match=r"m\.py' defines no function 'fn'"):
        load_metric(f"{tmp_path / 'm.py'}:fn")


def test_printing_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.py").write_text("print('loaded')\ndef fn(o, y):\n    print('called')\n    return [1]\n")
    load_metric(f"{tmp_path / 'm.py'}:fn")(SCORES, None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "loaded\ncalled\n"


def test_evaluate_scores_every_sample_in_order(tmp_path: Path) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[batch,3] x) => (float[batch,3] y) { y = Neg(x) }'
    )
    model = Model.load(onnx.parser.parse_model(text))
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 3, 50)
    calibration = Calibration.open({"x": x, "labels": labels}, model, batch_size=8)
    session = Runtime("cpu").session(model)
    for batches in (calibration.fit, calibration.held_out):
        scores = evaluate(session, batches, METRICS["top1"])
        kept = [batch.feed["x"] for batch in batches]
        found = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
        np.testing.assert_array_equal(scores, np.concatenate(kept).argmin(axis=1) == found)
    (tmp_path / "m.py").write_text("def fn(outputs, labels):\n    return [1.0]\n")
    with pytest.raises(InputError, match="returned 1 scores for a batch of 8 samples"):
        evaluate(session, calibration.fit, load_metric(f"{tmp_path / 'm.py'}:fn"))
    assert evaluate(session, [], METRICS["top1"]).shape == (0,)
