"""Agglomeration by average distance: many things become one, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Merger:
    """Two clusters that become one; `height` is the mean distance between their members, no less than that
    of any step before it in its class."""

    members: tuple[int, ...]
    others: tuple[int, ...]
    height: float


def agglomerate(distances: np.ndarray, *, adjacent: bool = False) -> list[Merger]:
    """All steps from single things to one cluster, the nearest two clusters first.

    Args:
        distances: (n, n), symmetric; infinite where two must not meet.
        adjacent: whether only neighbors in the given order can meet, so that clusters are runs.

    Returns:
        At most n - 1 steps; members are indices, in order. On ties the earliest in order meet first.
    """
    clusters: list[tuple[int, ...]] = [(index,) for index in range(len(distances))]
    steps: list[Merger] = []
    height = 0.0
    while len(clusters) > 1:
        pairs = [
            (float(distances[np.ix_(clusters[i], clusters[j])].mean()), i, j)
            for i in range(len(clusters))
            for j in range(i + 1, min(i + 2, len(clusters)) if adjacent else len(clusters))
        ]
        nearest, i, j = min(pairs)
        if not np.isfinite(nearest):
            break
        height = max(height, nearest)
        steps.append(Merger(clusters[i], clusters[j], height))
        clusters[i] = tuple(sorted(clusters[i] + clusters[j]))
        del clusters[j]
    return steps


def clusters_after(steps: Sequence[Merger]) -> list[tuple[int, ...]]:
    """The clusters of several members that some first steps of an agglomeration leave."""
    found: list[tuple[int, ...]] = []
    for step in steps:
        whole = tuple(sorted(step.members + step.others))
        found = [cluster for cluster in found if not set(cluster) <= set(whole)]
        found.append(whole)
    return sorted(found)
