"""Work divided into what fits in memory."""

from __future__ import annotations

from onnxfuse.fitting.memory import in_budget


def test_runs_are_as_long_as_the_budget_allows() -> None:
    assert list(in_budget([3, 4, 2, 9, 1, 1], lambda n: {object(): n}, 7)) == [[3, 4], [2], [9], [1, 1]]
    assert list(in_budget([], lambda n: {n: 1}, 7)) == []


def test_what_several_need_counts_once() -> None:
    needs = {"a": {"x": 4}, "b": {"x": 4, "y": 3}, "c": {"y": 3, "z": 1}}
    assert list(in_budget(needs, lambda name: needs[name], 7)) == [["a", "b"], ["c"]]
    assert list(in_budget(needs, lambda name: needs[name], 8)) == [["a", "b", "c"]]
