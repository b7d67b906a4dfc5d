"""similarity.py against POT, closed forms and the invariances that it claims."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import ot
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nets import takes

from onnxfuse.numerics import similarity
from onnxfuse.numerics.similarity import (
    CRITERIA,
    RIDGE,
    Criterion,
    alignment,
    distance,
    divergence,
    freeze_share,
    needs_equal_rows,
    rotation,
)

TRANSPORT: tuple[Criterion, ...] = ("euclidean", "wasserstein", "aligned", "centroids")
SHAPES = ((5, 3), (3, 5), (4, 4), (1, 6), (6, 1), (1, 1), (40, 7), (7, 40))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(draw(size, size, seed=seed))[0]


def gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.cov(rows.T, bias=True).reshape(rows.shape[1], rows.shape[1])


def moment(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows / len(rows)


def textbook_kl(first: np.ndarray, second: np.ndarray) -> float:
    ratio = np.linalg.solve(second, first)
    return (np.trace(ratio) - np.linalg.slogdet(ratio)[1] - len(first)) / 2


def with_ridge(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = moment(a), moment(b)
    ridge = RIDGE * np.trace(first + second) / 2 / len(first) * np.eye(len(first))
    return first + ridge, second + ridge


pairs = st.builds(
    lambda shape, rows, seed: (draw(*shape, seed=seed), draw(rows, shape[1], seed=seed + 1)),
    st.sampled_from(SHAPES),
    st.integers(1, 30),
    st.integers(0, 10**6),
)
equal_pairs = st.builds(
    lambda shape, seed: (draw(*shape, seed=seed), draw(*shape, seed=seed + 1)),
    st.sampled_from(SHAPES),
    st.integers(0, 10**6),
)
FEW = settings(max_examples=25, deadline=None)


# ---- against others' numbers -----------------------------------------------------------------------------


@FEW
@given(st.integers(1, 8), st.integers(20, 30), st.integers(20, 40), st.integers(0, 10**6))
def test_wasserstein_of_gaussians_as_pot_has_it(columns: int, n: int, m: int, seed: int) -> None:
    a, b = draw(n, columns, seed=seed) + 0.5, 3 * draw(m, columns, seed=seed + 1)
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(a), gaussian(b)
    expected = float(ot.gaussian.bures_wasserstein_distance(mean_a, mean_b, cov_a, cov_b))
    assert similarity.wasserstein(a, b) == pytest.approx(expected, rel=1e-7)


@FEW
@given(pairs)
def test_wasserstein_without_full_rank(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair  # POT's roots of matrices need full rank; eigenvalues of C_A C_B are squares of what (5) sums
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(a), gaussian(b)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    squared = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * roots
    assert similarity.wasserstein(a, b) ** 2 == pytest.approx(squared, abs=1e-5)


def test_wasserstein_where_covariances_commute() -> None:
    # Four rows +-(s1, 0), +-(0, s2) times a root: mean zero, covariance diag(s1^2, s2^2) / 2.
    def cross(s1: float, s2: float, shift: float) -> np.ndarray:
        return np.array([[s1, 0], [-s1, 0], [0, s2], [0, -s2]]) + shift

    found = similarity.wasserstein(cross(2, 5, 0), cross(3, 1, 2))
    assert found**2 == pytest.approx(2 * 2**2 + (2 - 3) ** 2 / 2 + (5 - 1) ** 2 / 2)
    assert similarity.wasserstein([[1.0], [3.0]], [[-4.0], [8.0]]) == pytest.approx(5)  # N(2, 1), N(2, 6^2)


def printed_bures(first: np.ndarray, second: np.ndarray) -> float:
    """(5) as print has it, without the root inside the last term."""
    root = scipy.linalg.sqrtm(first).real
    return float(np.trace(first) + np.trace(second) - 2 * np.trace(root @ second @ root))


def test_the_printed_formula_lacks_a_root() -> None:
    cov = gaussian(3 * draw(50, 4))[1]
    assert printed_bures(cov, cov) == pytest.approx(2 * np.trace(cov) - 2 * np.trace(cov @ cov))
    assert printed_bures(cov, cov) < -100  # a squared distance, of a matrix to itself
    assert distance(3 * draw(50, 4), 3 * draw(50, 4), "wasserstein") < 1e-12


@FEW
@given(equal_pairs)
def test_aligned_is_exact_transport_of_the_rows(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    even = np.full(len(a), 1 / len(a))
    expected = math.sqrt(max(ot.emd2(even, even, ot.dist(a, b)), 0))
    assert similarity.aligned(a, b) == pytest.approx(expected, abs=1e-7)
    order = alignment(a, b)
    assert sorted(order) == list(range(len(a)))
    assert np.sum((a - b[order]) ** 2) / len(a) == pytest.approx(expected**2, abs=1e-7)


@FEW
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 5), st.integers(0, 10**6))
def test_few_rows_are_their_own_centroids(n: int, m: int, columns: int, seed: int) -> None:
    a, b = draw(n, columns, seed=seed), draw(m, columns, seed=seed + 1)
    cost = ot.emd2(np.full(n, 1 / n), np.full(m, 1 / m), ot.dist(a, b))
    assert similarity.centroids(a, b) == pytest.approx(math.sqrt(cost), abs=1e-7)
    assert similarity.centroids(np.repeat(a, 3, 0), b) == pytest.approx(math.sqrt(cost), abs=1e-7)


def test_many_rows_by_their_centroids() -> None:
    # Sixteen tight clumps of unlike sizes, moved by one: the centroids are the clumps' means.
    corners = 100.0 * np.array([[i, j] for i in range(4) for j in range(4)])
    sizes = np.arange(2, 18)
    a = np.repeat(corners, sizes, 0) + 0.01 * draw(sizes.sum(), 2)
    b = np.repeat(corners + np.array([1, 0]), sizes[::-1], 0) + 0.01 * draw(sizes.sum(), 2, seed=1)
    clumps = [
        (np.array([part.mean(0) for part in np.split(rows, np.cumsum(counts)[:-1])]), counts / counts.sum())
        for rows, counts in ((a, sizes), (b, sizes[::-1]))
    ]
    (x, mass_x), (y, mass_y) = clumps
    expected = math.sqrt(ot.emd2(mass_x, mass_y, ot.dist(x, y)))
    found = [similarity.centroids(a, b, seed=seed) for seed in range(10)]
    assert min(abs(value - expected) for value in found) < 1e-6  # k-means may end in another optimum
    assert similarity.centroids(a, b, seed=3) == found[3]
    assert len(set(found)) > 1


@FEW
@given(pairs)
def test_divergence_by_the_textbook(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    first, second = with_ridge(a, b)
    assert divergence(a, b) == pytest.approx(textbook_kl(first, second), rel=1e-8, abs=1e-9)
    both = (textbook_kl(first, second) + textbook_kl(second, first)) / 2 / a.shape[1]
    assert distance(a, b, "kl") == pytest.approx(both, rel=1e-8, abs=1e-9)


def test_divergence_of_scalars() -> None:
    # Variances 4 and 1 with a ridge of 0.0025; half of (r - ln r - 1).
    ratio = (4 + RIDGE * 2.5) / (1 + RIDGE * 2.5)
    assert divergence([[2.0], [-2.0]], [[1.0]]) == pytest.approx((ratio - math.log(ratio) - 1) / 2)
    assert divergence([[1.0]], [[2.0]]) == pytest.approx((1 / ratio + math.log(ratio) - 1) / 2)


@FEW
@given(pairs)
def test_covariance_by_its_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    first, second = moment(a), moment(b)
    cosine = np.trace(first @ second) / np.linalg.norm(first) / np.linalg.norm(second)
    assert distance(a, b, "covariance") == pytest.approx(1 - cosine, abs=1e-12)


@FEW
@given(pairs)
def test_freeze_share_by_its_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair[0], 0.9 * pair[1] if len(pair[0]) > 1 else pair[1]
    first, second = with_ridge(a, b)
    middle = (first + second) / 2
    expected = (textbook_kl(first, middle) + textbook_kl(second, middle)) / 2 / a.shape[1]
    assert freeze_share(a, b) == pytest.approx(min(expected, 1), rel=1e-8, abs=1e-9)
    assert freeze_share(a, b) == pytest.approx(freeze_share(b, a), abs=1e-12)
    assert freeze_share(a, a) == pytest.approx(0, abs=1e-12)


def test_freeze_share_is_cut_at_one() -> None:
    assert freeze_share([[1e3]], [[1e-3]]) == 1


@FEW
@given(equal_pairs)
def test_rotation_is_orthogonal_procrustes(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    found = rotation(a, b)
    np.testing.assert_allclose(found @ found.T, np.eye(len(a)), atol=1e-10)
    reference = scipy.linalg.orthogonal_procrustes(b.T, a.T)[0].T
    assert np.linalg.norm(a - found @ b) == pytest.approx(np.linalg.norm(a - reference @ b), abs=1e-9)
    turn = orthogonal(len(a), seed=7)
    np.testing.assert_allclose(rotation(turn @ b, b) @ b, turn @ b, atol=1e-9)


# ---- what `distance` claims ------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@FEW
@given(pair=equal_pairs)
@example(pair=(draw(6, 1, seed=867), draw(6, 1, seed=868)))  # two rows as near as a solver's tolerance
def test_self_symmetry_and_range(criterion: Criterion, pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    found = distance(a, b, criterion)
    assert isinstance(found, float)
    assert distance(a, a, criterion) == pytest.approx(0, abs=1e-10)
    assert distance(b, a, criterion) == pytest.approx(found, rel=1e-7, abs=1e-9)
    assert found > 0 or (criterion == "covariance" and a.shape[1] == 1)
    if criterion != "kl":
        assert found <= (1 if criterion == "covariance" else math.sqrt(2)) + 1e-9


@pytest.mark.parametrize("criterion", CRITERIA)
@FEW
@given(pair=equal_pairs, seed=st.integers(0, 10**6))
def test_invariances(criterion: Criterion, pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    a, b = pair
    random = np.random.default_rng(seed)

    def same(x: np.ndarray, y: np.ndarray) -> bool:
        return distance(x, y, criterion) == pytest.approx(distance(a, b, criterion), rel=1e-6, abs=1e-8)

    turn, order = orthogonal(a.shape[1], seed), random.permutation(len(a))
    rows, other = (orthogonal(len(a), seed=seed + number) for number in (1, 2))
    assert same(a @ turn, b @ turn)
    assert same(a[order], b[order])
    assert same(1e-3 * a, 1e-3 * b)
    if criterion != "euclidean":
        assert same(a, b[order])
    if criterion in ("covariance", "kl"):
        assert same(rows @ a, other @ b)
    if criterion == "euclidean":
        assert same(rows @ a, rows @ b)
    if criterion == "covariance":
        assert same(a, -7 * b)


@FEW
@given(equal_pairs)
def test_finer_criteria_see_more(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    gaussians, clouds, places = (distance(a, b, c) for c in ("wasserstein", "aligned", "euclidean"))
    assert gaussians <= clouds + 1e-9
    assert clouds <= places + 1e-9


def test_what_has_nothing_in_common_is_at_one() -> None:
    a, b = np.eye(4)[:2], np.eye(4)[2:]
    for criterion in ("covariance", "euclidean", "aligned", "centroids"):
        assert distance(a, b, criterion) == pytest.approx(1)
    signs = [[1.0, 0], [-1.0, 0]], [[0, 3.0], [0, -3.0]]  # of mean zero
    assert distance(*signs, "wasserstein") == pytest.approx(1)
    assert distance(np.eye(3), -np.eye(3), "euclidean") == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_size_does_not_count(criterion: Criterion) -> None:
    a, b = draw(6, 4), draw(6, 4, seed=1)
    assert distance(np.tile(a, (3, 1)), np.tile(b, (3, 1)), criterion) == pytest.approx(
        distance(a, b, criterion)
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_zero_and_rank_deficient(criterion: Criterion) -> None:
    zero, one, flat = np.zeros((3, 4)), np.ones((3, 4)), np.outer([1.0, 2, 3], [1.0, 0, 2, 0])
    assert distance(zero, zero, criterion) == 0
    for other in (one, flat):
        assert 0 < distance(zero, other, criterion) < math.inf
        assert distance(zero, other, criterion) == pytest.approx(distance(other, zero, criterion))
        assert distance(other, other, criterion) == pytest.approx(0, abs=1e-10)
    if criterion != "kl":
        assert distance(zero, flat, criterion) == pytest.approx(1)
    assert 0 < distance(one, flat, criterion) < math.inf
    assert freeze_share(zero, zero) == 0
    assert 0 < freeze_share(zero, flat) <= 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_shapes(criterion: Criterion) -> None:
    with pytest.raises(ValueError, match="4 and 5 columns can't be compared"):
        distance(draw(3, 4), draw(3, 5), criterion)
    assert needs_equal_rows(criterion) == (criterion in ("euclidean", "aligned"))
    if needs_equal_rows(criterion):
        with pytest.raises(ValueError, match="3 and 2 rows can't be compared"):
            distance(draw(3, 4), draw(2, 4), criterion)
    else:
        assert distance(draw(3, 4), draw(2, 4, seed=1), criterion) > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((0, 4)), "shape .0, 4. is not a matrix with entries"),
        (np.zeros(4), "is not a matrix"),
        (np.full((2, 4), np.nan), "not finite"),
        (np.full((2, 4), np.inf), "not finite"),
    ],
)
def test_what_is_no_matrix(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(draw(2, 4), bad, "covariance")
    with pytest.raises(ValueError, match=message):
        freeze_share(bad, draw(2, 4))


def test_unknown_criterion() -> None:
    with pytest.raises(ValueError, match="'cosine' is none of euclidean, covariance"):
        distance(draw(2, 2), draw(2, 2), "cosine")  # type: ignore[arg-type]


def test_convolutions_take_milliseconds() -> None:
    a, b = draw(64, 576), draw(64, 576, seed=1)
    for criterion in CRITERIA:
        assert takes(partial(distance, a, b, criterion), 0.5), criterion
