"""Local fits of all candidates from one run, against least squares on rows gathered by torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import RUNTIME, columns, compute, context, fitted, held, least_squares, net, normal, rows

from onnxfuse.analysis.regions.search import find_regions
from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting import local_fits as module
from onnxfuse.fitting.local_fits import LOCAL_RIDGE, Candidate, Fit, fit_locally
from onnxfuse.ir.model import Model
from onnxfuse.runtime.memory import Budget

FLOAT = np.dtype(np.float32)


def candidates(model: Model, **options: int) -> dict[tuple[str, str], Candidate]:
    """All regions by (u, v), with a 3-wide kernel."""
    found = {}
    for region in find_regions(model, **options)[0]:
        if region.geometry is None:
            found[region.u, region.v] = Candidate(region, FLOAT)
        else:
            kernel = (3,) * len(region.geometry.kernel)
            pads = region.geometry.pads_for(kernel)
            assert pads is not None
            found[region.u, region.v] = Candidate(region, FLOAT, kernel, pads)
    return found


def relative(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    error = ((x @ weight.T + bias - y) ** 2).sum()
    return float(error / ((y - y.mean(0)) ** 2).sum())


def check(fit: Fit, fit_rows: tuple[np.ndarray, ...], held_rows: tuple[np.ndarray, ...]) -> None:
    weight, bias = least_squares(*fit_rows, LOCAL_RIDGE)
    np.testing.assert_allclose(fit.affine.weight, weight, atol=2e-4)
    np.testing.assert_allclose(fit.affine.bias, bias, atol=2e-4)
    assert fit.fitted == pytest.approx(relative(weight, bias, *fit_rows), rel=1e-3)
    assert fit.held == pytest.approx(relative(weight, bias, *held_rows), rel=1e-3)
    assert fit.held > 0.01


MLP = """h1 = Gemm(x, w1) r1 = Relu(h1) h2 = Gemm(r1, w2) r2 = Tanh(h2) h3 = Gemm(r2, w3) y = Relu(h3)"""
MLP_WEIGHTS = {"w1": (6, 12), "w2": (12, 8), "w3": (8, 4)}


def test_dense_fits_are_ridge_regressions_each_on_its_own_target() -> None:
    model = net(MLP, MLP_WEIGHTS)
    ctx = context(model, {"x": normal(300, 6)}, batch_size=37)
    found = candidates(model)
    assert set(found) == {("x", "h2"), ("x", "h3"), ("r1", "h3")}
    assert found["x", "h2"].view == found["x", "h3"].view != found["r1", "h3"].view
    for key, fit in zip(
        found, fit_locally(model, list(found.values()), ctx.calibration, RUNTIME), strict=True
    ):
        assert fit.candidate is found[key]
        check(fit, tuple(compute(model, fitted(ctx), *key)), tuple(compute(model, held(ctx), *key)))


def test_conv_fits_are_regressions_on_real_padded_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCAL_ROWS_PER_COLUMN", 12)
    model = net(
        """h1 = Conv<pads = [1,1,1,1]>(x, w1) r1 = Relu(h1)
        h2 = Conv<pads = [1,1,1,1], strides = [2,2]>(r1, w2) y = Relu(h2)""",
        {"w1": (5, 2, 3, 3), "w2": (4, 5, 3, 3)},
        x="float[N,2,7,6] x",
        y="float[A,B,C,D] y",
    )
    ctx = context(model, {"x": normal(16, 2, 7, 6)}, batch_size=5)
    (candidate,) = candidates(model).values()
    (fit,) = fit_locally(model, [candidate], ctx.calibration, RUNTIME)

    def patches(feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return columns(feed["x"], (3, 3), (2, 2), candidate.pads), rows(compute(model, feed, "h2")[0])

    # 12 rows for each of 18 columns are more than all positions of 16 samples.
    check(fit, patches(fitted(ctx)), patches(held(ctx)))


def test_sampled_positions_come_near_all_of_them_and_depend_on_the_seed() -> None:
    model = net(
        "h1 = Conv<pads = [1,1]>(x, w1) r1 = Relu(h1) h2 = Conv<pads = [1,1]>(r1, w2) y = Relu(h2)",
        {"w1": (5, 2, 3), "w2": (4, 5, 3)},
        x="float[N,2,64] x",
        y="float[A,B,C] y",
    )
    ctx = context(model, {"x": normal(30, 2, 64)}, batch_size=10)
    (candidate,) = candidates(model).values()
    one, same, other = (
        fit_locally(model, [candidate], ctx.calibration, RUNTIME, seed=seed)[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.affine.weight, same.affine.weight)
    assert np.abs(one.affine.weight - other.affine.weight).max() > 1e-4
    assert one.held == pytest.approx(other.held, rel=0.5)


def test_padding_rows_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCAL_ROWS_PER_COLUMN", 1000)  # all positions
    model = net(
        "h1 = MatMul(x, w1) r1 = Relu(h1) h2 = MatMul(r1, w2) y = Relu(h2)",
        {"w1": (6, 12), "w2": (12, 5)},
        x="float[N,T,6] x, int64[N,T] mask",
        y="float[A,B,C] y",
    )
    x, mask = normal(60, 9, 6), np.random.default_rng(0).integers(0, 3, (60, 9))
    x[mask == 0] *= 30
    ctx = context(model, {"x": x, "mask": mask}, batch_size=7)
    (candidate,) = candidates(model).values()
    (fit,) = fit_locally(model, [candidate], ctx.calibration, RUNTIME, mask="mask")

    def present(feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        chosen = feed["mask"] != 0  # a mask of 2 counts as much as one of 1
        return feed["x"][chosen], compute(model, feed, "h2")[0][chosen]

    check(fit, present(fitted(ctx)), present(held(ctx)))


def test_one_run_while_memory_allows_several_when_not() -> None:
    model = net(MLP, MLP_WEIGHTS)
    ctx = context(model, {"x": normal(100, 6)})
    found = list(candidates(model).values())[::-1]
    sessions: list[Any] = []

    class Counting:
        def session(self, *args: Any, **options: Any) -> Any:
            if options.get("taps"):  # else it is run for shapes
                sessions.append(options["taps"])
            return RUNTIME.session(*args, **options)

    at_once = fit_locally(model, found, ctx.calibration, Counting())  # type: ignore[arg-type]
    assert len(sessions) == 1
    ctx.calibration.budget = Budget(4 * 2 * 8 * 12**2)  # a quarter is for Gram matrices
    in_turn = fit_locally(model, found, ctx.calibration, Counting())  # type: ignore[arg-type]
    assert len(sessions) == 3  # one more for each of two views; x is fed, so it is no tap
    assert sorted(map(sorted, sessions[1:])) == [["h2", "h3"], ["h3", "r1"]]
    for one, other in zip(at_once, in_turn, strict=True):
        assert one.candidate is other.candidate
        np.testing.assert_array_equal(one.affine.weight, other.affine.weight)
        assert (one.fitted, one.held) == (other.fitted, other.held)


def test_without_held_out_samples_the_fitted_error_stands_in() -> None:
    model = net(MLP, MLP_WEIGHTS)
    ctx = context(model, {"x": normal(100, 6)}, held_out=0.0)
    for fit in fit_locally(model, list(candidates(model).values()), ctx.calibration, RUNTIME):
        assert fit.held == fit.fitted


def test_activations_that_are_not_finite_are_refused() -> None:
    model = net(
        "s = Sqrt(x) h1 = Gemm(s, w1) r1 = Relu(h1) h2 = Gemm(r1, w2) y = Relu(h2)",
        {"w1": (6, 12), "w2": (12, 8)},
    )
    ctx = context(model, {"x": normal(100, 6)})
    with pytest.raises(NotApplicableError, match="not finite"):
        fit_locally(model, list(candidates(model).values()), ctx.calibration, RUNTIME)


def test_a_target_that_never_moves_has_no_relative_error() -> None:
    model = net(
        "h1 = Gemm(x, w1) r1 = Relu(h1) h2 = Gemm(r1, w2) y = Relu(h2)",
        {"w1": (6, 12), "w2": np.zeros((12, 3), np.float32)},
    )
    ctx = context(model, {"x": normal(100, 6)})
    (fit,) = fit_locally(model, list(candidates(model).values()), ctx.calibration, RUNTIME)
    assert fit.held == np.inf
