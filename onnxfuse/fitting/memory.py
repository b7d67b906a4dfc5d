"""Work in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def in_budget(items: Iterable[T], needs: Callable[[T], Mapping[K, int]], budget: int) -> Iterator[list[T]]:
    """Runs of `items`, in order, each as long as its needs together stay within the budget.

    Args:
        items: what is to be divided.
        needs: bytes by what takes them; what several items of a run need is counted once.
        budget: bytes; an item that needs more by itself is a run by itself.
    """
    run: list[T] = []
    held: dict[K, int] = {}
    for item in items:
        own = needs(item)
        held |= own
        if run and sum(held.values()) > budget:
            yield run
            run, held = [], {**own}
        run.append(item)
    if run:
        yield run
