"""Costs of losing channels, and what makes up for them, against numpy's least squares on the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from channel_cases import sized
from nets import RUNTIME, Feed, columns, compute, least_squares, net, normal, rows

from onnxfuse.analysis.cost import shapes_at
from onnxfuse.channels import moments_seen
from onnxfuse.channels.consumers import Consumer, RowView, consumers
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import Group, find_groups
from onnxfuse.channels.importance import Ranking, compensation, rank
from onnxfuse.channels.moments_seen import RIDGES, Statistics, statistics
from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Model


def seen(model: Model, feed: Feed, name: str) -> tuple[Group, list[Consumer], dict[Any, Statistics]]:
    groups = find_groups(model, feed, RUNTIME)
    group = groups[name]
    readers = consumers(model, group, shapes_at(model, feed, RUNTIME))
    batches = Calibration.open(feed, model, held_out=0.0).fit
    return group, readers, statistics(model, [c.view for c in readers], batches, RUNTIME).every


def ranked(model: Model, feed: Feed, name: str, **more: Any) -> tuple[Group, Ranking]:
    group, readers, known = seen(model, feed, name)
    return group, rank(model, group.size, readers, known, **more)


def relative(x: np.ndarray, y: np.ndarray, stay: np.ndarray) -> float:
    """Error of the best affine map from some columns, relative to the variance of the target."""
    weight, bias = least_squares(x[:, stay], y)
    return float(((x[:, stay] @ weight.T + bias - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_seen, "RIDGES", (1e-9,))


def test_costs_of_a_convolution() -> None:
    body = "a = Conv(x, w0, b0) r = Relu(a) y = Conv<pads=[1,0,0,1], strides=[2,1]>(r, w1, b1)"
    model = net(body, sized("w0:8,3,1,1 b0:8 w1:4,8,3,2 b1:4"), "float[N,3,7,6] x", "float[A,B,C,D] y")
    feed = {"x": normal(60, 3, 7, 6)}
    _, found = ranked(model, feed, "a")
    r, y = compute(model, feed, "r", "y")
    patches, target = columns(r, (3, 2), (2, 1), (1, 0, 0, 1)), rows(y)
    for gone in range(1, 7):
        stay = np.setdiff1d(np.arange(48), (found.order[:gone, None] * 6 + np.arange(6)).reshape(-1))
        assert found.cost[gone] == pytest.approx(relative(patches, target, stay), rel=2e-3, abs=1e-5)


def test_costs_of_flattened_maps_and_of_two_who_read() -> None:
    body = """a = Conv(x, w0, b0) r = Relu(a) f = Flatten(r) p = Gemm(f, w1) g = GlobalAveragePool(r)
        h = Flatten(g) q = Gemm<transB=1>(h, w2, b2) y = Concat<axis=1>(p, q)"""
    model = net(body, sized("w0:6,3,1,1 b0:6 w1:24,5 w2:4,6 b2:4"), "float[N,3,2,2] x")
    feed = {"x": normal(400, 3, 2, 2)}
    _, found = ranked(model, feed, "a")
    f, h, p, q = (value.astype(float) for value in compute(model, feed, "f", "h", "p", "q"))
    for gone in range(1, 5):
        stay = np.sort(found.order[gone:])
        total = relative(f, p, (stay[:, None] * 4 + np.arange(4)).reshape(-1)) + relative(h, q, stay)
        assert found.cost[gone] == pytest.approx(total, rel=2e-3, abs=1e-5)


def test_costs_of_a_grouped_convolution() -> None:
    body = "a = Conv(x, w0, b0) r = Relu(a) y = Conv<group=2>(r, w1)"
    model = net(body, sized("w0:8,3,1,1 b0:8 w1:6,4,2,2"), "float[N,3,5,5] x", "float[A,B,C,D] y")
    feed = {"x": normal(60, 3, 5, 5)}
    groups = find_groups(model, feed, RUNTIME)
    inner = next(group for group in groups.free if group.size == 4)
    _, found = ranked(model, feed, inner.name)
    r, y = compute(model, feed, "r", "y")
    patches, target = columns(r, (2, 2), (1, 1), (0,) * 4), rows(y)
    error = 0.0
    stay = np.setdiff1d(np.arange(16), (found.order[:1, None] * 4 + np.arange(4)).reshape(-1))
    for half in range(2):
        own = target[:, 3 * half : 3 * half + 3]
        error += (
            relative(patches[:, 16 * half : 16 * half + 16], own, stay) * ((own - own.mean(0)) ** 2).sum()
        )
    assert found.cost[1] == pytest.approx(error / ((target - target.mean(0)) ** 2).sum(), rel=2e-3)


def test_compensation_is_least_squares() -> None:
    body = "a = Gemm(x, w0, b0) r = Relu(a) y = Gemm(r, w1, b1)"
    model = net(body, sized("w0:6,8 b0:8 w1:8,4 b1:4"))
    feed = {"x": normal(500, 6)}
    _, (consumer,), known = seen(model, feed, "a")
    gone = np.array([1, 4, 5])
    stay = np.setdiff1d(np.arange(8), gone)
    found = compensation(consumer, model, known[consumer.view], gone)
    assert found is not None
    r, y = (value.astype(float) for value in compute(model, feed, "r", "y"))
    weight, bias = least_squares(r[:, stay], y)
    assert consumer.op is not None
    np.testing.assert_allclose(found[0][:, stay], weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(consumer.op.bias + found[1], bias, rtol=1e-3, atol=1e-4)
    assert not found[0][:, gone].any()


@pytest.mark.parametrize(
    ("body", "weights", "x", "y"),
    [
        (
            "a = Conv(x, w0, b0) r = Relu(a) y = ConvTranspose<strides=[2,2]>(r, w1, b1)",
            "w0:6,3,1,1 b0:6 w1:6,4,2,2 b1:4",
            (3, 4, 4),
            "float[A,B,C,D] y",
        ),
        (
            "a = MatMul(x, w0) r = Relu(a) y, h, c = LSTM<hidden_size=3>(r, w1, w2)",
            "w0:5,6 w1:1,12,6 w2:1,12,3",
            (4, 5),
            "float[A,B,C,D] y",
        ),
    ],
)
def test_those_whose_weights_are_only_stored_make_up_for_a_twin(
    body: str, weights: str, x: tuple[int, ...], y: str
) -> None:
    model = net(body, sized(weights), f"float[N,{','.join(map(str, x))}] x", y)
    w0 = np.array(model.weight(model.tensor("w0")))
    axis = 0 if w0.ndim == 4 else 1
    np.moveaxis(w0, axis, 0)[4] = 2 * np.moveaxis(w0, axis, 0)[1]  # a channel that is twice another
    model.set_weight(model.tensor("w0"), w0)
    if "b0" in weights:
        model.set_weight(model.tensor("b0"), np.zeros(6, np.float32))
    feed = {"x": normal(50, *x)}
    group, (consumer, *_), known = seen(model, feed, "a")
    choice = {group: np.array([0, 1, 2, 3, 5])}
    cut = model.copy()
    take(cut, choice)
    found = compensation(consumer, model, known[consumer.view], consumer.places[4].reshape(-1))
    assert found is not None
    assert consumer.writable(model)
    plain = compute(cut, feed, "y")[0]
    consumer.write(cut, *found, find_groups_of(group), choice, by="test")
    expected = compute(model, feed, "y")[0]
    np.testing.assert_allclose(compute(cut, feed, "y")[0], expected, atol=1e-3)
    assert np.abs(plain - expected).max() > 0.05


def find_groups_of(group: Group) -> Any:
    from onnxfuse.channels.groups import ChannelGroups

    return ChannelGroups((group,), group.system)


def test_channels_without_a_place_in_any_product() -> None:
    """Two computed tensors are multiplied: what counts is how much of them a channel carries."""
    body = """k = MatMul(x, w0) q = MatMul(x, w1) t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t)
        p = Softmax(s) y = MatMul(p, x)"""
    w0, w1 = normal(5, 4, seed=1), normal(5, 4, seed=2)
    w0[:, 2], w1[:, 2] = w0[:, 2] / 50, w1[:, 2] / 50
    model = net(body, {"w0": w0, "w1": w1}, "float[N,6,5] x", "float[A,B,C] y")
    _, found = ranked(model, {"x": normal(80, 6, 5)}, "k")
    assert found.order[0] == 2


def test_too_many_columns_are_taken_to_be_uncorrelated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxfuse.channels.consumers.MOST_CORRELATED_COLUMNS", 10)
    body = "a = Conv(x, w0, b0) r = Relu(a) y = Conv(r, w1)"
    model = net(body, sized("w0:8,3,1,1 b0:8 w1:4,8,2,2"), "float[N,3,5,5] x", "float[A,B,C,D] y")
    feed = {"x": normal(60, 3, 5, 5)}
    group, (consumer,), known = seen(model, feed, "a")
    assert not consumer.view.correlated
    found = rank(model, group.size, [consumer], known)
    (r,) = compute(model, feed, "r")
    weights = np.array(model.weight(model.tensor("w1")))
    energy = r.astype(float).var(axis=(0, 2, 3)) * (weights**2).sum(axis=(0, 2, 3))
    assert found.order.tolist() == np.argsort(energy).tolist()
    assert compensation(consumer, model, known[consumer.view], np.array([1])) is None


def test_padding_tokens_are_left_out() -> None:
    body = "a = MatMul(x, w0) r = Relu(a) y = MatMul(r, w1)"
    model = net(body, sized("w0:5,6 w1:6,4"), "float[N,7,5] x, float[N,7] m", "float[A,B,C] y")
    mask = (np.arange(7) < 4).astype(np.float32)[None].repeat(40, 0)
    x = normal(40, 7, 5)
    x[:, 4:] = 100
    feed = {"x": x, "m": mask}
    groups = find_groups(model, feed, RUNTIME)
    (consumer,) = consumers(model, groups["a"], shapes_at(model, feed, RUNTIME))
    batches = Calibration.open(feed, model, held_out=0.0).fit
    known = statistics(model, [consumer.view], batches, RUNTIME, mask="m").every
    (r,) = compute(model, feed, "r")
    kept = r[:, :4].reshape(-1, 6).astype(float)
    np.testing.assert_allclose(known[consumer.view].mean, kept.mean(0), rtol=1e-4)
    np.testing.assert_allclose(
        known[consumer.view].covariance, np.cov(kept.T, bias=True), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(("alike", "low", "high"), [(False, 700, 1300), (True, 70, 130)])
def test_rows_of_a_sample_that_are_alike_count_once(alike: bool, low: float, high: float) -> None:
    """100 samples of ten rows each: as many rows as there are, or one for each sample."""
    model = net("y = MatMul(x, w)", {"w": (12, 3)}, "float[N,10,12] x", "float[A,B,C] y")
    x = normal(100, 1, 12).repeat(10, axis=1) if alike else normal(100, 10, 12)
    samples = Calibration.open({"x": x}, model, held_out=0.3)
    view = RowView("x", 2, 12)
    known = statistics(model, [view], samples.fit, RUNTIME, judged=samples.held_out)
    assert low < known.every[view].rows < high
    assert known.apart[view].rows == pytest.approx(0.7 * known.every[view].rows)
    np.testing.assert_allclose(
        known.every[view].covariance, np.cov(x.reshape(-1, 12).T, bias=True), atol=1e-6
    )


@pytest.mark.parametrize("count", [30, 60, 150, 2000])
def test_the_ridge_tells_unseen_columns_best(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the errors on fresh rows of each column, told by a ridge regression on all others."""
    monkeypatch.setattr(moments_seen, "RIDGES", RIDGES)
    mixing = normal(8, 40, seed=1).astype(float)

    def draw(rows: int, seed: int) -> np.ndarray:
        return normal(rows, 8, seed=seed) @ mixing + normal(rows, 40, seed=seed + 1)

    x, fresh = draw(count, 2), draw(4000, 4)
    covariance = np.cov(x.T, bias=True)
    errors = []
    for ridge in RIDGES:
        inverse = np.linalg.inv(covariance + ridge * np.trace(covariance) / 40 * np.eye(40))
        told = (fresh - x.mean(0)) @ inverse / np.diag(inverse)  # what is left of each column
        errors.append(float((told**2).sum()))
    chosen = RIDGES.index(moments_seen._ridge(covariance, count))
    assert errors[chosen] < 1.1 * min(errors)
