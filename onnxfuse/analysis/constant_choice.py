"""The choice of constants to compute once and store: the one that makes a model smallest, as a minimum cut.

A value that depends on nothing but constants may be stored, may be left to its node (kept), or may be of no
use any more, once everything that reads it is stored (dropped). A kept node needs all its inputs; what others
need is stored or kept. Storing a value costs its size, keeping a node costs that of the node, and keeping a
constant that was stored before costs its size again. So the cheapest choice is a minimum cut between the
constants and the readers (Picard 1976, "Maximal closure of a graph and applications to combinatorial
problems"), found by Dinic's algorithm. Keeping everything is one of the choices, so the best one is no
larger.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


class State(enum.Enum):
    """What becomes of a value."""

    STORED = "stored"
    KEPT = "kept"
    DROPPED = "dropped"


@dataclass
class Step:
    """A value that is constant.

    Attributes:
        store: cost of storing it.
        keep: cost of its node's staying; None for a constant, which is stored or dropped.
        needed: whether something that is no step reads it.
        parents: places of the steps that its node reads.
    """

    store: int
    keep: int | None
    needed: bool = False
    parents: list[int] = field(default_factory=list)


def cheapest(steps: Sequence[Step]) -> list[State]:
    """The state of every step in the choice of least cost; of equal ones, in that which keeps the fewest.

    Args:
        steps: parents before children.
    """
    count = len(steps)
    source, sink = 2 * count, 2 * count + 1
    network = _Network(2 * count + 2)
    endless = 1 + sum(step.store + (step.keep or 0) for step in steps)
    for place, step in enumerate(steps):
        enter, leave = 2 * place, 2 * place + 1
        network.connect(source, enter, endless if step.keep is None else step.keep)
        network.connect(enter, leave, step.store)
        for parent in step.parents:
            network.connect(2 * parent + 1, enter, endless)
        if step.needed:
            network.connect(leave, sink, endless)
    behind = network.behind(source, sink)
    return [
        State.KEPT if enter else State.STORED if leave else State.DROPPED
        for enter, leave in zip(behind[0:-2:2], behind[1:-2:2], strict=True)
    ]


def parts(steps: Sequence[Step]) -> list[list[int]]:
    """The places of steps that hang together, part by part, each in its order."""
    owner = list(range(len(steps)))

    def root(place: int) -> int:
        while owner[place] != place:
            owner[place] = owner[owner[place]]
            place = owner[place]
        return place

    for place, step in enumerate(steps):
        for parent in step.parents:
            owner[root(place)] = root(parent)
    found: dict[int, list[int]] = {}
    for place in range(len(steps)):
        found.setdefault(root(place), []).append(place)
    return list(found.values())


class _Network:
    """A directed graph with capacities; edges and their reverses lie side by side, as 2 k and 2 k + 1."""

    def __init__(self, size: int) -> None:
        self._edges: list[list[int]] = [[] for _ in range(size)]
        self._target: list[int] = []
        self._left: list[int] = []

    def connect(self, start: int, end: int, capacity: int) -> None:
        for one, other, left in ((start, end, capacity), (end, start, 0)):
            self._edges[one].append(len(self._target))
            self._target.append(other)
            self._left.append(left)

    def behind(self, source: int, sink: int) -> list[bool]:
        """Whether each vertex lies on the sink's side of the minimum cut that is closest to the sink."""
        while (levels := self._levels(source))[sink] is not None:
            self._block(source, sink, levels)
        found = [False] * len(self._edges)
        found[sink], stack = True, [sink]
        while stack:
            for edge in self._edges[stack.pop()]:
                start = self._target[edge]
                if self._left[edge ^ 1] and not found[start]:
                    found[start] = True
                    stack.append(start)
        return found

    def _levels(self, source: int) -> list[int | None]:
        levels: list[int | None] = [None] * len(self._edges)
        levels[source] = 0
        queue = deque([source])
        while queue:
            start = queue.popleft()
            for edge in self._edges[start]:
                end = self._target[edge]
                if self._left[edge] and levels[end] is None:
                    levels[end] = (levels[start] or 0) + 1
                    queue.append(end)
        return levels

    def _block(self, source: int, sink: int, levels: list[int | None]) -> None:
        """Push flow along shortest paths until none is left."""
        following = [0] * len(self._edges)
        path: list[int] = []
        while True:
            start = self._target[path[-1]] if path else source
            if start == sink:
                amount = min(self._left[edge] for edge in path)
                for edge in path:
                    self._left[edge] -= amount
                    self._left[edge ^ 1] += amount
                path.clear()
                continue
            edges = self._edges[start]
            while following[start] < len(edges):
                edge = edges[following[start]]
                end = self._target[edge]
                if self._left[edge] and levels[end] == (levels[start] or 0) + 1:
                    path.append(edge)
                    break
                following[start] += 1
            else:
                if not path:
                    return
                following[self._target[path.pop() ^ 1]] += 1
