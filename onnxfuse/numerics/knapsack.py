"""The cheapest set of things that together are worth just enough (a covering knapsack).

Solved exactly, as two mixed-integer programs of a binary variable each (HiGHS, `scipy.optimize.milp`): the
first finds the least worth that is enough; the second, of all sets that are worth no more than a little
beyond, the cheapest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def cheapest(
    worth: Sequence[int],
    costs: Sequence[float],
    need: float,
    slack: float,
    before: Mapping[int, Collection[int]],
) -> list[int] | None:
    """The places of the set of least cost among those worth `need` to `need` + `slack`, or, where there are
    none, among those of the least worth that is enough; None where all together are not enough.

    Args:
        worth: of each thing, positive.
        costs: of each thing, finite.
        need: worth that is needed.
        slack: worth beyond it that counts as none.
        before: a thing can only be had with all that stand here for it.
    """
    if need <= 0:
        return []
    if sum(worth) < need:
        return None
    sizes = np.array(worth, np.float64)
    order = [_pair(len(worth), thing, other) for thing, own in before.items() for other in own]
    enough = np.ceil(need)
    nearest = _least(sizes, [*order, LinearConstraint(sizes / enough, 1.0, np.inf)])
    most = max(float(sizes[nearest].sum()), need + slack)
    within = LinearConstraint(sizes / enough, 1.0, most / enough)
    scale = max(np.max(costs), np.finfo(float).tiny)
    return _least(np.array(costs) / scale, [*order, within])


def _pair(count: int, thing: int, other: int) -> LinearConstraint:
    row = np.zeros(count)
    row[other], row[thing] = 1.0, -1.0
    return LinearConstraint(row, 0.0, np.inf)


def _least(costs: np.ndarray, constraints: Sequence[LinearConstraint]) -> list[int]:
    found = milp(
        costs,
        constraints=constraints,
        bounds=Bounds(0, 1),
        integrality=np.ones(len(costs), np.int64),
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, found.message
    return np.flatnonzero(found.x > 0.5).tolist()
