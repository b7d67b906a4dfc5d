"""Agglomeration against scipy's average linkage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist, squareform

from onnxfuse.numerics.agglomeration import Merger, agglomerate, clusters_after


def distances(count: int, seed: int = 0) -> np.ndarray:
    return squareform(pdist(np.random.default_rng(seed).standard_normal((count, 3))))


@pytest.mark.parametrize("count", [2, 5, 12])
def test_it_is_average_linkage(count: int) -> None:
    found = agglomerate(distances(count))
    expected = linkage(squareform(distances(count)), "average")
    np.testing.assert_allclose([step.height for step in found], expected[:, 2])
    assert [len(step.members) + len(step.others) for step in found] == expected[:, 3].astype(int).tolist()
    assert clusters_after(found) == [tuple(range(count))]


def test_neighbours_alone_make_runs() -> None:
    far = distances(8, seed=1)
    for count in range(1, 8):
        for cluster in clusters_after(agglomerate(far, adjacent=True)[:count]):
            assert cluster == tuple(range(cluster[0], cluster[-1] + 1))
    runs = agglomerate(far, adjacent=True)
    assert [step.height for step in runs] == sorted(step.height for step in runs)
    first = min(range(7), key=lambda i: far[i, i + 1])
    assert runs[0] == Merger((first,), (first + 1,), far[first, first + 1])


def test_the_infinitely_far_never_meet() -> None:
    far = np.full((4, 4), np.inf)
    far[0, 2] = far[2, 0] = 1.0
    assert agglomerate(far) == [Merger((0,), (2,), 1.0)]
    assert clusters_after(agglomerate(far)) == [(0, 2)]
    assert agglomerate(np.zeros((1, 1))) == []
