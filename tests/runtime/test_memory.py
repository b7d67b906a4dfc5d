"""The memory budget, and work divided into what fits in it."""

from __future__ import annotations

import pytest

from onnxfuse.errors import InputError
from onnxfuse.runtime import memory
from onnxfuse.runtime.memory import Budget, free_memory, in_budget


def test_a_budget_is_read_from_words() -> None:
    assert [Budget.of(text).total for text in ("512MB", "1.5 GB", "2gb", "1000KB")] == [
        512_000_000,
        1_500_000_000,
        2_000_000_000,
        1_000_000,
    ]


@pytest.mark.parametrize("text", ["", "512", "1 TB", "MB", "-1GB", "1e3MB", "10KB"])
def test_what_is_no_size_or_too_small_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="memory must be"):
        Budget.of(text)


@pytest.mark.parametrize(
    ("free", "total"),
    [(None, 10**9), (32 * 10**9, 10**9), (4 * 10**9, 10**9), (3_900_000_000, 1 << 29), (5, 10**6)],
)
def test_the_default_is_steady(free: int | None, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    assert Budget.of(None).total == total
    if free is not None and 10**7 < free < 4 * 10**9:  # a little more or less is free the next time
        monkeypatch.setattr(memory, "free_memory", lambda: int(0.9 * free))
        assert Budget.of(None).total == total


def test_the_shares_stay_within_the_whole() -> None:
    budget = Budget(10**9)
    assert budget.batch + budget.sums + budget.spool <= budget.total


def test_free_memory_is_that_of_this_machine() -> None:
    free = free_memory()
    assert free is None or 10**6 < free < 2**50


def test_runs_are_as_long_as_the_budget_allows() -> None:
    assert list(in_budget([3, 4, 2, 9, 1, 1], lambda n: {object(): n}, 7)) == [[3, 4], [2], [9], [1, 1]]
    assert list(in_budget([], lambda n: {n: 1}, 7)) == []


def test_what_several_need_counts_once() -> None:
    needs = {"a": {"x": 4}, "b": {"x": 4, "y": 3}, "c": {"y": 3, "z": 1}}
    assert list(in_budget(needs, lambda name: needs[name], 7)) == [["a", "b"], ["c"]]
    assert list(in_budget(needs, lambda name: needs[name], 8)) == [["a", "b", "c"]]
