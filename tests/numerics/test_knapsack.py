"""Covering knapsacks against enumeration of all sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxfuse.numerics.knapsack import cheapest


def sets(worth: list[int], before: dict[int, set[int]]) -> list[tuple[int, ...]]:
    every = (own for n in range(len(worth) + 1) for own in itertools.combinations(range(len(worth)), n))
    return [own for own in every if all(before.get(thing, set()) <= set(own) for thing in own)]


@pytest.mark.parametrize("seed", range(12))
def test_the_cheapest_of_all_sets(seed: int) -> None:
    random = np.random.default_rng(seed)
    worth = (random.choice([2304, 9216, 36864, 500], 9) + random.integers(0, 3, 9)).tolist()
    costs = random.exponential(size=9).tolist()
    before = {1: {0}, 2: {1}, 5: {3}, 6: {2, 5}}
    for share in (0.1, 0.35, 0.7, 0.97):
        need, slack = share * sum(worth), 0.01 * sum(worth)
        found = cheapest(worth, costs, need, slack, before)
        enough = [own for own in sets(worth, before) if sum(worth[i] for i in own) >= need]
        least = min(sum(worth[i] for i in own) for own in enough)
        near = [own for own in enough if sum(worth[i] for i in own) <= max(least, need + slack)]
        best = min(sum(costs[i] for i in own) for own in near)
        assert tuple(found or ()) in near
        assert sum(costs[i] for i in found or ()) == pytest.approx(best)


def test_a_worth_that_is_met_to_the_last_unit() -> None:
    worth = [10_000_001, 20_000_000, 30_000_003]
    assert cheapest(worth, [1.0, 1.0, 1.0], 30_000_003, 0, {}) == [2]
    assert cheapest(worth, [1.0, 1.0, 9.0], 30_000_001, 0, {}) == [0, 1]
    assert cheapest(worth, [0.0, 0.0, 0.0], 60_000_004, 0, {}) == [0, 1, 2]


def test_nothing_needed_and_too_much_needed() -> None:
    assert cheapest([3, 4], [1.0, 1.0], 0, 1, {}) == []
    assert cheapest([3, 4], [1.0, 1.0], 7.5, 1, {}) is None
    assert cheapest([], [], 1, 1, {}) is None
