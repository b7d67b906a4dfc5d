"""k-means on a line against the optimum by dynamic programming, scikit-learn, and its own definition."""

from __future__ import annotations

import numpy as np
import pytest
from nets import takes

from onnxfuse.numerics.kmeans import kmeans, nearest

RNG = np.random.default_rng(0)
SHAPES = {
    "normal": RNG.standard_normal(3000),
    "heavy tails": RNG.standard_t(3, 3000),
    "far from zero": RNG.laplace(size=2000) + 1000,
    "two heaps": np.concatenate([RNG.normal(-1, 0.1, 1000), RNG.normal(1, 0.1, 1000)]),
    "many alike": RNG.integers(0, 50, 3000) / 7,
}


def error(numbers: np.ndarray, centres: np.ndarray) -> float:
    return float(((numbers - centres[nearest(numbers, centres)]) ** 2).sum())


def optimum(numbers: np.ndarray, count: int) -> float:
    """The least error that `count` centres can leave, over all ways to cut the sorted numbers."""
    points = np.sort(numbers)
    sums, squares = (np.concatenate([[0], np.cumsum(points**power)]) for power in (1, 2))
    stop = np.arange(len(points) + 1)
    sizes = stop[None] - stop[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = (squares[None] - squares[:, None]) - (sums[None] - sums[:, None]) ** 2 / sizes
    cost = np.where(sizes > 0, cost, np.where(sizes == 0, 0.0, np.inf))
    best = cost[0]
    for _ in range(count - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


@pytest.mark.parametrize("count", [2, 3, 8, 20])
@pytest.mark.parametrize("name", SHAPES)
def test_near_the_optimum(name: str, count: int) -> None:
    numbers = SHAPES[name][::10]
    found = kmeans(numbers, count)
    assert len(found) == count
    assert optimum(numbers, count) * (1 - 1e-6) <= error(numbers, found) <= 1.25 * optimum(numbers, count)


@pytest.mark.parametrize("count", [16, 128])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "many alike"])
def test_as_good_as_scikit_learns(name: str, count: int) -> None:
    from sklearn.cluster import KMeans  # takes a second, which workers without this test need not wait

    numbers = SHAPES[name]
    found = kmeans(numbers.astype(np.float32), count)
    theirs = KMeans(count, n_init=1, random_state=0).fit(numbers[:, None])
    assert error(numbers, found) <= 1.15 * theirs.inertia_ + 1e-9


@pytest.mark.parametrize("name", SHAPES)
def test_centres_are_the_means_of_what_is_nearest(name: str) -> None:
    numbers = SHAPES[name]
    centres = kmeans(numbers, 12)
    assert (np.diff(centres) > 0).all()
    index = nearest(numbers, centres)
    np.testing.assert_array_equal(index, np.abs(numbers[:, None] - centres).argmin(axis=1))
    np.testing.assert_allclose(centres, [numbers[index == i].mean() for i in range(12)], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(centres, kmeans(numbers[::-1].reshape(2, -1), 12))


def test_few_numbers_are_their_own_centres() -> None:
    numbers = np.array([3, 1, 1, 2, 3], np.float32)
    for count in (3, 4, 100):
        assert kmeans(numbers, count).tolist() == [1, 2, 3]
    assert kmeans(numbers, 1).tolist() == [2]
    assert kmeans(np.zeros(0), 4).tolist() == []
    assert nearest(numbers, np.array([2.5])).tolist() == [0] * 5


def test_a_million_numbers_take_little_time() -> None:
    numbers = np.random.default_rng(1).standard_normal(1_000_000).astype(np.float32)
    assert takes(lambda: nearest(numbers, kmeans(numbers, 256)), 3)
    best = 2.72 / 256**2 * len(numbers)  # Panter and Dite, for many centres
    assert error(numbers, kmeans(numbers, 256)) < 1.05 * best
