"""Bases and ranks against numpy's SVD, the closed form by a matrix square root, and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg

from onnxfuse.numerics.low_rank import Basis, allocate, randomized, reduced_rank, truncated

RNG = np.random.default_rng(0)
WIDE, TALL = RNG.standard_normal((9, 20)), RNG.standard_normal((20, 9))


def rows(columns: int, count: int = 400) -> np.ndarray:
    """Samples whose columns are correlated, of very different spread, and not centred."""
    mix = RNG.standard_normal((columns, columns)) * np.geomspace(3, 0.01, columns)
    return RNG.standard_normal((count, columns)) @ mix.T + 2


def product(basis: Basis, weight: np.ndarray, rank: int) -> np.ndarray:
    left, right = basis.factors(weight, rank)
    assert left.shape == (len(weight), rank)
    assert right.shape == (rank, weight.shape[1])
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1))
    return left @ right


@pytest.mark.parametrize("weight", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_truncated_is_the_best_of_its_rank(weight: np.ndarray, rank: int) -> None:
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    basis = truncated(weight)
    np.testing.assert_allclose(product(basis, weight, rank), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12)
    left = np.linalg.norm(weight - product(basis, weight, rank)) ** 2
    assert basis.lost()[rank] * (weight**2).sum() == pytest.approx(left, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_randomized_is_nearly_so(rank: int) -> None:
    u, _ = np.linalg.qr(RNG.standard_normal((120, 80)))
    v, _ = np.linalg.qr(RNG.standard_normal((300, 80)))
    weight = (u * np.arange(1, 81) ** -0.7) @ v.T  # falls off slowly
    best = truncated(weight)
    basis = randomized(weight, rank, seed=1)
    error = np.linalg.norm(weight - product(basis, weight, rank)) ** 2
    assert best.lost()[rank] <= basis.lost()[rank] * (1 + 1e-12)
    assert error == pytest.approx(best.lost()[rank] * best.total, rel=5e-3)
    assert basis.lost()[rank] * basis.total == pytest.approx(error)
    again = randomized(weight, rank, seed=1)
    np.testing.assert_array_equal(basis.directions, again.directions)
    assert not np.array_equal(basis.directions, randomized(weight, rank, seed=2).directions)


@pytest.mark.parametrize("weight", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_data_is_reduced_rank_regression(weight: np.ndarray, rank: int) -> None:
    """In the whitened space it is the SVD of W C^1/2, undone by C^-1/2."""
    x = rows(weight.shape[1])
    covariance = np.cov(x.T, bias=True)
    root = scipy.linalg.sqrtm(covariance).real
    u, s, v = np.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)
    basis = reduced_rank(weight, weight @ covariance @ weight.T, ridge=0.0)
    found = product(basis, weight, rank)
    np.testing.assert_allclose(found, expected, atol=1e-6)

    def error(other: np.ndarray) -> float:
        return float((((x - x.mean(0)) @ (weight - other).T) ** 2).sum(1).mean())

    assert error(found) == pytest.approx((s[rank:] ** 2).sum())
    assert basis.lost()[rank] == pytest.approx((s[rank:] ** 2).sum() / (s**2).sum(), abs=1e-12)
    assert error(found) < error(product(truncated(weight), weight, rank))
    for seed in range(20):  # nor does anything near it do better
        left, right = (
            np.random.default_rng(seed).standard_normal(f.shape) for f in basis.factors(weight, rank)
        )
        a, b = basis.factors(weight, rank)
        assert error((a + 1e-3 * left) @ (b + 1e-3 * right)) > error(found)


def test_a_ridge_goes_towards_the_svd() -> None:
    covariance = WIDE @ np.cov(rows(20).T) @ WIDE.T
    strong = product(reduced_rank(WIDE, covariance, ridge=1e9), WIDE, 3)
    np.testing.assert_allclose(strong, product(truncated(WIDE), WIDE, 3), atol=1e-6)


def test_what_never_moves_loses_nothing() -> None:
    assert not reduced_rank(WIDE, np.zeros((9, 9))).lost().any()
    assert not truncated(np.zeros((4, 3))).lost().any()


def test_ranks_are_as_good_as_any_but_for_the_last_step() -> None:
    """Against all choices of ranks for three matrices."""
    spectra = [np.sort(RNG.uniform(size=k) ** 3)[::-1] for k in (4, 5, 3)]
    lost = [1 - np.concatenate([[0.0], np.cumsum(s)]) / s.sum() for s in spectra]
    unit, full = [10.0, 14.0, 7.0], [35.0, 60.0, 20.0]
    options = [
        [(0.0, 0.0), *((whole - r * each, own[r]) for r in range(1, len(own)) if r * each < whole)]
        for own, each, whole in zip(lost, unit, full, strict=True)
    ]
    every = [tuple(map(sum, zip(*picks, strict=True))) for picks in itertools.product(*options)]
    most = max(saved for saved, _ in every)
    for asked in np.linspace(1, most, 60):
        ranks = allocate(lost, unit, full, asked)
        assert ranks is not None
        pairs = [
            (whole - r * each, own[r])
            for r, own, each, whole in zip(ranks, lost, unit, full, strict=True)
            if r is not None
        ]
        saved, loss = map(sum, zip(*pairs, strict=True))
        assert saved >= asked - 1e-9
        best = min(other for amount, other in every if amount >= asked - 1e-9)
        # What the greedy order wastes is less than its last step.
        further = min(other for amount, other in every if amount >= min(asked + max(full), most) - 1e-9)
        assert best - 1e-9 <= loss <= further + 1e-9
    assert allocate(lost, unit, full, most + 0.1) is None
    assert allocate(lost, unit, full, 0.0) == [None, None, None]


def test_one_matrix_gets_the_largest_rank_that_saves_enough() -> None:
    lost = np.linspace(1, 0, 11) ** 2
    for asked, rank in ((1, 9), (10, 9), (11, 8), (20, 8), (90, 1)):
        expected = [rank] if rank > 1 or asked == 90 else None
        found = allocate([lost], [10.0], [100.0], float(asked))
        assert found == expected
    assert allocate([lost], [10.0], [100.0], 90.1) is None


def test_a_first_step_that_saves_little_is_not_held_against_those_behind_it() -> None:
    """Rank 9 of a flat spectrum saves 1 of 91 for a tenth of the energy; rank 4 saves 51 for six tenths, and
    is better than what the other matrix has to offer."""
    flat, other = np.linspace(1, 0, 11), np.array([1.0, 0.7, 0.0])
    assert allocate([flat, other], [10.0, 50.0], [91.0, 100.0], 50.0) == [4, None]
    assert allocate([flat, other], [10.0, 50.0], [91.0, 100.0], 131.0) == [1, 1]
