"""Solves against numpy.linalg.lstsq on augmented rows, and errors against those that the rows show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from onnxfuse.errors import NotApplicableError
from onnxfuse.numerics.affine import Affine
from onnxfuse.numerics.moments import Moments
from onnxfuse.numerics.ridge import (
    RIDGES,
    choose_ridge,
    generalized_cross_validation,
    path,
    per_channel,
    solve,
)


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(11)


def moments_of(x: np.ndarray, y: np.ndarray, **options: Any) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], **options)
    moments.add(x, y)
    return moments


def data(
    rng: Generator, n: int = 400, dx: int = 12, dy: int = 3, noise: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=(n, dx)) @ rng.normal(size=(dx, dx)) + rng.normal(size=dx) * 5
    return x, x @ rng.normal(size=(dx, dy)) + noise * rng.normal(size=(n, dy)) + rng.normal(size=dy)


def reference(x: np.ndarray, y: np.ndarray, ridge: float, prior: np.ndarray | None = None) -> Affine:
    """Ridge by least squares on centred rows with sqrt(r) I below them: no normal equations."""
    mx, my = x.mean(0), y.mean(0)
    xc, yc = x - mx, y - my
    prior = np.zeros((y.shape[1], x.shape[1])) if prior is None else prior
    root = np.sqrt(ridge * (xc**2).sum() / x.shape[1])
    rows = np.concatenate([xc, root * np.eye(x.shape[1])])
    targets = np.concatenate([yc - xc @ prior.T, np.zeros((x.shape[1], y.shape[1]))])
    weight = prior + np.linalg.lstsq(rows, targets, rcond=None)[0].T
    return Affine(weight, my - weight @ mx)


def assert_close(a: Affine, b: Affine, rtol: float = 1e-8) -> None:
    np.testing.assert_allclose(a.weight, b.weight, rtol=rtol, atol=rtol * np.abs(b.weight).max())
    np.testing.assert_allclose(a.bias, b.bias, rtol=rtol, atol=rtol * (1 + np.abs(b.bias).max()))


def measured(affine: Affine, x: np.ndarray, y: np.ndarray) -> float:
    return float(((x @ affine.weight.T + affine.bias - y) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("ridge", [0.0, 1e-12, 1e-8])
def test_small_ridge_is_least_squares(rng: Generator, ridge: float) -> None:
    x, y = data(rng)
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    both = np.linalg.lstsq(design, y, rcond=None)[0].T
    found = solve(moments_of(x, y), ridge)
    assert_close(found, Affine(both[:, :-1], both[:, -1]), rtol=1e-8 if ridge < 1e-9 else 1e-4)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_ridge_and_prior(rng: Generator, ridge: float, with_prior: bool) -> None:
    x, y = data(rng)
    prior = rng.normal(size=(3, 12)) if with_prior else None
    expected = reference(x, y, ridge, prior)
    moments = moments_of(x, y)
    assert_close(solve(moments, ridge, prior), expected)
    assert_close(path(moments, [0.5, ridge], prior)[1], expected)


def test_prior_form_of_the_normal_equations(rng: Generator) -> None:
    x, y = data(rng)
    moments, prior, ridge = moments_of(x, y), rng.normal(size=(3, 12)), 0.03
    weight = solve(moments, ridge, prior).weight
    r = ridge * np.trace(moments.xx) / moments.dx
    left = (moments.xx + r * np.eye(12)) @ weight.T
    np.testing.assert_allclose(left, moments.xy + r * prior.T, rtol=1e-9)


def test_huge_ridge_keeps_the_prior_but_not_the_bias(rng: Generator) -> None:
    x, y = data(rng)
    prior = rng.normal(size=(3, 12))
    found = solve(moments_of(x, y), 1e12, prior)
    np.testing.assert_allclose(found.weight, prior, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.bias, y.mean(0) - prior @ x.mean(0), rtol=1e-6, atol=1e-5)


def test_scale_does_not_matter(rng: Generator) -> None:
    x, y = data(rng)
    small, large = solve(moments_of(x, y), 1e-2), solve(moments_of(1e6 * x, y), 1e-2)
    np.testing.assert_allclose(large.weight * 1e6, small.weight, rtol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("spoil", ["dead", "duplicated", "constant", "few rows", "one row"])
def test_rank_deficiency(rng: Generator, spoil: str, ridge: float) -> None:
    x, y = data(rng, dx=40)
    if spoil == "dead":
        x[:, ::4] = 0.0
    elif spoil == "duplicated":
        x[:, ::4] = x[:, 1::4]
    elif spoil == "constant":
        x[:, ::4] = 0.1
    else:
        x, y = (v[: 15 if spoil == "few rows" else 1] for v in (x, y))
    moments, prior = moments_of(x, y), rng.normal(size=(3, 40))
    for start in (None, prior):
        found = solve(moments, ridge, start)
        assert_close(found, reference(x, y, ridge, start), rtol=1e-5)
        assert moments.error(found) == pytest.approx(
            measured(found, x, y), rel=1e-6, abs=1e-10 * (y**2).sum()
        )
    if spoil == "dead":  # nothing was learnt about these: untouched, not noise
        np.testing.assert_allclose(solve(moments, ridge, prior).weight[:, ::4], prior[:, ::4], atol=1e-12)


def test_constant_inputs_leave_the_bias_to_do_it() -> None:
    y = np.arange(10.0)[:, None]
    for ridge in (0.0, 1e-3):
        found = solve(moments_of(np.full((10, 3), 7.0), y), ridge)
        assert not found.weight.any()
        assert found.bias == pytest.approx([4.5])


def test_constant_target(rng: Generator) -> None:
    found = solve(moments_of(rng.normal(size=(30, 4)), np.full((30, 1), 2.5)), 0.0)
    assert not found.weight.any()
    assert found.bias == pytest.approx([2.5], abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60),
    groups=st.sampled_from([1, 2]),
    p=st.integers(1, 9),
    q=st.integers(1, 3),
    dead=st.booleans(),
    ridge=st.sampled_from([0.0, 1e-10, 1e-6, 1e-2, 10.0]),
)
def test_a_solution_is_a_minimum(
    seed: int, n: int, groups: int, p: int, q: int, dead: bool, ridge: float
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, groups * p)), rng.normal(size=(n, groups * q)) + 3
    if dead:
        x[:, 0] = 0.0
    moments = moments_of(x, y, groups=groups)
    found = solve(moments, ridge)
    assert np.isfinite(found.weight).all()

    def objective(affine: Affine) -> float:
        means = np.trace(moments.stacked()[0], axis1=1, axis2=2) / p
        penalty = ridge * means @ (affine.weight**2).reshape(groups, -1).sum(axis=1) / moments.n
        return moments.error(affine) + float(penalty)

    least = objective(found)
    for _ in range(4):
        step = 1e-3 * rng.normal(size=found.weight.shape)
        other = Affine(found.weight + step, found.bias + 1e-3 * rng.normal(size=found.bias.shape))
        assert objective(other) >= least - 1e-12


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("n", [400, 5])
def test_moments_know_the_error_of_the_solution(rng: Generator, n: int, groups: int) -> None:
    x, y = data(rng, n=n)
    moments = moments_of(x, y, groups=groups)
    expected = sum(
        measured(reference(own, target, 0.0), own, target)
        for own, target in zip(np.split(x, groups, 1), np.split(y, groups, 1), strict=True)
    )
    error = moments.error(solve(moments, 0.0))
    assert error == pytest.approx(expected, rel=1e-8, abs=1e-12 * moments.variance)


def test_error_of_the_paper(rng: Generator) -> None:
    """Corollary 1 as printed, for v = W2 relu(W1 u + b1) + b2: W2 (C_a1 - C_a1a0 C_a0^-1 C_a0a1) W2^T."""
    u = rng.normal(size=(3000, 6))
    w1, b1, w2 = rng.normal(size=(10, 6)), rng.normal(size=10), rng.normal(size=(4, 10))
    a1 = np.maximum(u @ w1.T + b1, 0)
    c = np.cov(np.concatenate([u, a1], axis=1).T, bias=True)
    inner = c[6:, 6:] - c[6:, :6] @ np.linalg.inv(c[:6, :6]) @ c[:6, 6:]
    moments = moments_of(u, a1 @ w2.T + 3.0)
    assert moments.error(solve(moments, 0.0)) == pytest.approx(np.trace(w2 @ inner @ w2.T), rel=1e-9)
    np.testing.assert_allclose(
        solve(moments, 0.0).weight, w2 @ c[6:, :6] @ np.linalg.inv(c[:6, :6]), rtol=1e-8
    )


def test_choose_ridge_takes_the_least_held_out_error(rng: Generator) -> None:
    x, y = data(rng, n=260, dx=40, noise=20.0)
    fit, held = moments_of(x[:60], y[:60]), moments_of(x[60:], y[60:])
    ridge, affine = choose_ridge(fit, held)
    errors = {r: measured(reference(x[:60], y[:60], r), x[60:], y[60:]) for r in RIDGES}
    assert ridge == min(errors, key=errors.__getitem__)
    assert ridge > 1e-6
    assert held.error(affine) == pytest.approx(errors[ridge], rel=1e-8)
    assert_close(affine, solve(fit, ridge))
    # A prior that is the truth wants all the ridge there is; on a tie the larger ridge wins.
    assert choose_ridge(fit, held, prior=reference(x, y, 0.0).weight)[0] == 1.0
    flat = moments_of(np.zeros((5, 2)), y[:5])
    assert choose_ridge(flat, flat, (1e-3, 1e-1, 1e-2))[0] == 1e-1
    with pytest.raises(ValueError, match="no ridges"):
        choose_ridge(fit, held, ())


@pytest.mark.parametrize("ridges", [RIDGES, tuple(np.geomspace(1e-6, 1.0, 400))])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_prior", [False, True])
def test_cross_validation_score(
    rng: Generator, with_prior: bool, groups: int, ridges: tuple[float, ...]
) -> None:
    """Ridges as close as these tell scores apart that are wrong by little."""
    x, y = data(rng, n=60, dx=40, dy=4, noise=20.0)
    prior = rng.normal(size=(4, 40 // groups)) if with_prior else None
    scores = dict.fromkeys(ridges, 0.0)
    parts = list(zip(np.split(x, groups, 1), np.split(y, groups, 1), strict=True))
    priors = [None] * groups if prior is None else np.split(prior, groups, 0)
    for ridge in ridges:
        for (own, target), start in zip(parts, priors, strict=True):
            xc = own - own.mean(0)
            r = ridge * (xc**2).sum() / xc.shape[1]
            hat = np.ones((60, 60)) / 60 + xc @ np.linalg.solve(xc.T @ xc + r * np.eye(xc.shape[1]), xc.T)
            rest = target - (0 if start is None else own @ start.T)
            scores[ridge] += (((np.eye(60) - hat) @ rest) ** 2).sum() * 60 / (60 - np.trace(hat)) ** 2
    ridge, affine = generalized_cross_validation(moments_of(x, y, groups=groups), ridges, prior)
    assert ridge == min(scores, key=scores.__getitem__)
    expected = [
        reference(own, target, ridge, start) for (own, target), start in zip(parts, priors, strict=True)
    ]
    weights, biases = ([getattr(one, name) for one in expected] for name in ("weight", "bias"))
    assert_close(affine, Affine(np.concatenate(weights), np.concatenate(biases)))


def test_cross_validation_does_not_trust_interpolation(rng: Generator) -> None:
    x, y = data(rng, n=20, dx=40, noise=20.0)
    ridge, _ = generalized_cross_validation(moments_of(x, y), (0.0, 1e-2))
    assert ridge == 1e-2


def test_per_channel_is_optimal_only_for_uncorrelated_channels(rng: Generator) -> None:
    blocks = [rng.normal(size=(4000, 4)) @ rng.normal(size=(4, 4)) for _ in range(3)]
    x = np.concatenate(blocks, axis=1) - np.mean(np.concatenate(blocks, axis=1), axis=0)
    for channel in (1, 2):  # exactly uncorrelated channels
        other, mine = x[:, : 4 * channel], x[:, 4 * channel : 4 * channel + 4]
        mine -= other @ np.linalg.lstsq(other, mine, rcond=None)[0]
    x += 2.0
    y = x @ rng.normal(size=(12, 2)) + rng.normal(size=(4000, 2))
    moments = moments_of(x, y)
    assert_close(per_channel(moments, 3), solve(moments, 0.0), rtol=1e-7)

    shared = x + 5 * rng.normal(size=(4000, 1))
    alone, joint = moments_of(shared, y), per_channel(moments_of(shared, y), 3)
    assert alone.error(joint) > 1.05 * alone.error(solve(alone, 0.0))
    for channel in range(3):  # each channel's taps are those of a regression on it alone
        part = slice(4 * channel, 4 * channel + 4)
        expected = reference(shared[:, part], y, 0.0).weight
        np.testing.assert_allclose(joint.weight[:, part], expected, rtol=1e-7)
    np.testing.assert_allclose(joint.bias, y.mean(0) - joint.weight @ shared.mean(0), rtol=1e-9)


def test_per_channel_refuses_what_is_not_channels(rng: Generator) -> None:
    x, y = data(rng)
    for moments, channels in ((moments_of(x, y), 5), (moments_of(x, y, groups=3), 3)):
        with pytest.raises(ValueError, match="channels"):
            per_channel(moments, channels)


def test_groups_have_their_own_scale(rng: Generator) -> None:
    x, y = rng.normal(size=(200, 6)), rng.normal(size=(200, 3))
    x[:, 2:4] *= 1e4
    x[:, 4:] = 1.0
    moments = moments_of(x, y, groups=3)
    prior = rng.normal(size=(3, 2))
    for found in (
        solve(moments, 0.1, prior),
        *path(moments, [0.1], prior),
    ):
        for g in range(2):
            part = reference(x[:, 2 * g : 2 * g + 2], y[:, g : g + 1], 0.1, prior[g : g + 1])
            np.testing.assert_allclose(found.weight[g], part.weight[0], rtol=1e-7, atol=1e-10)
        np.testing.assert_array_equal(found.weight[2], prior[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_activations_that_are_not_finite_are_refused(rng: Generator, bad: float) -> None:
    x, y = data(rng)
    x[7, 3] = bad
    for ridge in (0.0, 1e-3):
        with pytest.raises(NotApplicableError, match="not finite"):
            solve(moments_of(x, y), ridge)


def test_bad_arguments_are_refused(rng: Generator) -> None:
    x, y = data(rng)
    moments = moments_of(x, y)
    with pytest.raises(NotApplicableError, match="no calibration rows"):
        solve(Moments(3, 1), 1e-3)
    with pytest.raises(ValueError, match="at least 0"):
        solve(moments, -1e-3)
    with pytest.raises(ValueError, match="prior"):
        solve(moments, 1e-3, np.zeros((12, 3)))


def test_solving_leaves_the_moments_and_the_prior_alone(rng: Generator) -> None:
    x, y = data(rng)
    moments, prior = moments_of(x, y), rng.normal(size=(3, 12))
    before, kept = moments.state(), prior.copy()
    solve(moments, 1e-3, prior)
    path(moments, (0.0, 1e-3), prior)
    per_channel(moments, 3)
    assert all(np.array_equal(before[key], value) for key, value in moments.state().items())
    assert np.array_equal(prior, kept)
