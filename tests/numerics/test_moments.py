"""Moments against direct sums over the rows."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from onnxfuse.errors import NotApplicableError
from onnxfuse.numerics.affine import Affine
from onnxfuse.numerics.moments import Moments, add_patches
from onnxfuse.numerics.ridge import solve
from onnxfuse.numerics.sampling import gather, patches, sample_positions


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(7)


def centred(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    w = np.ones(len(a)) if weights is None else weights
    da, db = (v - np.average(v, axis=0, weights=w) for v in (a.astype(float), b.astype(float)))
    return (da * w[:, None]).T @ db


def filled(x: np.ndarray, y: np.ndarray, *, step: int | None = None, **options: Any) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], **options)
    step = step or len(x)
    for start in range(0, len(x), step):
        moments.add(x[start : start + step], y[start : start + step])
    return moments


def assert_same(a: Moments, b: Moments, rtol: float = 1e-10) -> None:
    assert a.n == pytest.approx(b.n, rel=1e-12)
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        left, right = getattr(a, name), getattr(b, name)
        np.testing.assert_allclose(
            left, right, rtol=rtol, atol=rtol * max(1e-300, np.abs(right).max()), err_msg=name
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32])
@pytest.mark.parametrize("step", [1, 37, 1024, 5000])
def test_matches_direct_sums(rng: Generator, dtype: type, step: int) -> None:
    x: np.ndarray = (10 * rng.normal(size=(2500, 7)) + 3).astype(dtype)
    y: np.ndarray = (5 * rng.normal(size=(2500, 2)) - 1).astype(dtype)
    moments = filled(x, y, step=step)
    assert moments.n == 2500
    np.testing.assert_allclose(moments.xx, centred(x, x), rtol=1e-11, atol=1e-7)
    np.testing.assert_allclose(moments.xy, centred(x, y), rtol=1e-11, atol=1e-7)
    np.testing.assert_allclose(moments.yy, np.diag(centred(y, y)), rtol=1e-11)
    np.testing.assert_allclose(moments.mean_x, x.mean(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(moments.mean_y, y.mean(0, dtype=float), rtol=1e-12)


def test_reading_in_between_changes_nothing(rng: Generator) -> None:
    x, y = rng.normal(size=(3000, 6)) + 100, rng.normal(size=(3000, 3))
    moments = Moments(6, 3)
    for start in range(0, 3000, 250):
        moments.add(x[start : start + 250], y[start : start + 250])
        assert np.array_equal(moments.xx, moments.xx.T)
    assert_same(moments, filled(x, y))


def test_large_mean_costs_no_precision(rng: Generator) -> None:
    x, y = rng.normal(size=(4000, 5)) + 1e6, rng.normal(size=(4000, 1)) - 1e7
    np.testing.assert_allclose(filled(x, y, step=64).xx, centred(x, x), rtol=1e-8, atol=1e-5)


def test_first_rows_unlike_the_rest(rng: Generator) -> None:
    x, y = rng.normal(size=(20000, 3)) + 1e4, rng.normal(size=(20000, 1))
    x[:8] = 0.0
    np.testing.assert_allclose(filled(x, y, step=8).xx, centred(x, x), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_columns_are_exactly_zero(rng: Generator, dtype: type) -> None:
    """Rounding left over here would be all there is, and a solve would take it for data."""
    x: np.ndarray = np.full((3000, 3), 0.1, dtype=dtype)
    weights = rng.random(3000)
    moments = Moments(3, 1)
    for start in range(0, 3000, 7):
        part = slice(start, start + 7)
        moments.add(x[part], x[part, :1] * 3, weights[part])
    assert not moments.xx.any()
    assert not moments.xy.any()
    assert not moments.yy.any()
    assert moments.variance == 0.0
    assert np.array_equal(moments.mean_x, x[0])


@pytest.mark.parametrize("single", [False, True])
def test_weights(rng: Generator, single: bool) -> None:
    x, y, w = rng.normal(size=(2300, 4)) + 5, rng.normal(size=(2300, 3)), rng.integers(0, 4, size=2300) / 2.0
    x[w == 0] = np.nan  # a row of weight 0 is absent, whatever it holds
    weighted, repeated = Moments(4, 3, single=single), Moments(4, 3)
    weighted.add(x[:1000], y[:1000], w[:1000])
    weighted.add(x[1000:], y[1000:], w[1000:])
    times = (2 * w).astype(int)
    repeated.add(np.repeat(x, times, axis=0), np.repeat(y, times, axis=0))
    assert weighted.n == pytest.approx(w.sum())
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-3} if single else {"rtol": 1e-10, "atol": 1e-9}
    np.testing.assert_allclose(2 * weighted.xx, repeated.xx, **tolerance)
    np.testing.assert_allclose(2 * weighted.xy, repeated.xy, **tolerance)
    np.testing.assert_allclose(weighted.mean_x, repeated.mean_x, rtol=1e-6 if single else 1e-12)
    assert weighted.variance == pytest.approx(repeated.variance, rel=1e-6 if single else 1e-12)


def test_mask_equals_leaving_out(rng: Generator) -> None:
    x, y, keep = rng.normal(size=(500, 4)), rng.normal(size=(500, 2)), rng.random(500) < 0.6
    masked = Moments(4, 2)
    masked.add(x, y, keep)
    assert_same(masked, filled(x[keep], y[keep]), rtol=1e-14)


@pytest.mark.parametrize("weights", [[-1.0, 1, 1], [np.nan, 1, 1], [np.inf, 1, 1], [1.0, 1]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Moments(1, 1).add(np.ones((3, 1)), np.ones((3, 1)), weights)


@pytest.mark.parametrize(("x", "y"), [((3, 2), (3, 2)), ((3, 1), (4, 1)), ((3,), (3, 1)), ((3, 1), (3, 2))])
def test_bad_shapes_are_refused(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows"):
        Moments(1, 1).add(np.ones(x), np.ones(y))


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups"):
        Moments(6, 4, groups=3)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_groups_are_separate_regressions(rng: Generator, groups: int) -> None:
    x, y = rng.normal(size=(2100, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(2100, 6)) + 2
    y += x[:, :6]
    moments = filled(x, y, step=300, groups=groups)
    affine = solve(moments, 1e-3)
    assert affine.weight.shape == (6, 12 // groups)
    direct = ((affine(x, groups) - y) ** 2).mean(axis=0)
    np.testing.assert_allclose(moments.errors(affine), direct, rtol=1e-10)
    for g in range(groups):
        p, q = slice(g * 12 // groups, (g + 1) * 12 // groups), slice(g * 6 // groups, (g + 1) * 6 // groups)
        alone = filled(x[:, p], y[:, q])
        np.testing.assert_allclose(moments.xx[g], alone.xx, rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(affine.weight[q], solve(alone, 1e-3).weight, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(affine.bias[q], solve(alone, 1e-3).bias, rtol=1e-9)
    assert_same(filled(x[:900], y[:900], groups=groups) + filled(x[900:], y[900:], groups=groups), moments)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    order=st.randoms(use_true_random=False),
    mean=st.sampled_from([0.0, 1.0, 1e3]),
    dx=st.integers(1, 5),
    dy=st.integers(1, 3),
)
def test_merge_order_does_not_matter(
    seed: int, cuts: list[int], order: Any, mean: float, dx: int, dy: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(300, dx)) + mean, rng.normal(size=(300, dy)) - mean
    edges = [0, *sorted(cuts), 300]
    parts = [
        filled(x[a:b], y[a:b], step=50) if b > a else Moments(dx, dy) for a, b in itertools.pairwise(edges)
    ]
    order.shuffle(parts)
    total = Moments(dx, dy)
    for part in parts:
        before = part.state()
        total = total + part if order.random() < 0.5 else part + total
        assert all(np.array_equal(before[key], value) for key, value in part.state().items())
    assert_same(total, filled(x, y))


def test_rows_after_a_merge(rng: Generator) -> None:
    x, y = rng.normal(size=(900, 4)), rng.normal(size=(900, 2)) + 9
    moments = filled(x[:300], y[:300])
    moments.merge(filled(x[300:600], y[300:600]))
    moments.add(x[600:], y[600:])
    assert_same(moments, filled(x, y))


def test_merge_of_different_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="sizes"):
        Moments(2, 1).merge(Moments(1, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_state_through_npz(rng: Generator, groups: int) -> None:
    x, y = rng.normal(size=(400, 4)), rng.normal(size=(400, 2))
    moments = filled(x[:300], y[:300], groups=groups)
    file = io.BytesIO()
    np.savez(file, **moments.state())  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file) as saved:
        back = Moments.from_state(saved)
    assert_same(back, moments, rtol=0)
    back.add(x[300:], y[300:])
    assert_same(back, filled(x, y, groups=groups))
    empty = Moments.from_state(Moments(3, 1).state())
    assert empty.n == 0
    with pytest.raises(ValueError, match="fit"):
        Moments.from_state({**moments.state(), "yy": np.zeros(5)})


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 200),
    dx=st.integers(1, 8),
    dy=st.integers(1, 4),
    mean=st.sampled_from([0.0, 10.0, -300.0]),
)
def test_error_of_any_affine_is_the_measured_one(seed: int, n: int, dx: int, dy: int, mean: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, dx)) + mean, rng.normal(size=(n, dy)) * 3 - mean
    affine = Affine(rng.normal(size=(dy, dx)), rng.normal(size=dy))
    direct = ((x @ affine.weight.T + affine.bias - y) ** 2).mean(axis=0)
    moments = filled(x, y, step=33)
    np.testing.assert_allclose(moments.errors(affine), direct, rtol=1e-9)
    assert moments.error(affine) == pytest.approx(direct.sum(), rel=1e-9)


def test_relative_error_of_a_constant_target(rng: Generator) -> None:
    moments = filled(rng.normal(size=(50, 3)), np.full((50, 1), 0.3))
    assert moments.relative_error(solve(moments, 1e-3)) == 0.0
    assert moments.relative_error(Affine(np.ones((1, 3)), np.zeros(1))) == float("inf")
    varied = filled(rng.normal(size=(50, 3)), rng.normal(size=(50, 1)))
    assert varied.relative_error(Affine(np.zeros((1, 3)), varied.mean_y)) == pytest.approx(1.0)


def test_without_rows_there_is_no_error() -> None:
    moments = Moments(2, 1)
    moments.add(np.ones((3, 2)), np.ones((3, 1)), np.zeros(3))
    with pytest.raises(NotApplicableError, match="no calibration rows"):
        moments.error(Affine(np.zeros((1, 2)), np.zeros(1)))


def test_single_precision_is_within_its_promise(rng: Generator) -> None:
    mix = rng.normal(size=(60, 60)) * np.logspace(0, -2, 60)
    x = np.maximum(rng.normal(size=(8000, 60)) @ mix + 20, 0).astype(np.float32)
    y = (x @ rng.normal(size=(60, 8)) + rng.normal(size=(8000, 8))).astype(np.float32)
    double, single = filled(x, y, step=100), filled(x, y, step=100, single=True)
    assert single.xx.dtype == np.float64
    assert not np.array_equal(single.xx, double.xx)
    for ridge in (0.0, 1e-6, 1e-3):
        affine = solve(single, ridge)
        assert abs(single.error(affine) - double.error(affine)) < 1e-6 * double.variance
        assert double.error(affine) - double.error(solve(double, ridge)) < 1e-6 * double.variance
    assert (single + double).rounding == single.rounding


@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("budget", [1, 200, 1 << 22])
def test_add_patches_in_pieces(
    rng: Generator, monkeypatch: pytest.MonkeyPatch, count: int | None, budget: int
) -> None:
    monkeypatch.setattr("onnxfuse.numerics.moments._PATCH_ELEMENTS", budget)
    x, y = rng.normal(size=(4, 2, 6, 6)), rng.normal(size=(4, 3, 3, 3))
    geometry: dict[str, Any] = {
        "kernel": (3, 3),
        "strides": (2, 2),
        "dilations": (1, 1),
        "pads": (1, 1, 0, 0),
    }
    at = sample_positions(1, "v", 2, 4, 9, count)
    moments = Moments(18, 3)
    add_patches(moments, x, y, at, **geometry)
    assert_same(moments, filled(patches(x, at, **geometry), gather(y, at)))
    with pytest.raises(ValueError, match="target of size"):
        add_patches(moments, x, y[..., :2], at, **geometry)
