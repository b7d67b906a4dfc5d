"""Passes on their way: goals scaled so that steps add up to the whole."""

from __future__ import annotations

import itertools

import pytest

from onnxfuse.passes.fold import Fold
from onnxfuse.passes.fuse import Fuse
from onnxfuse.passes.select import Select


@pytest.mark.parametrize("goal", ["macs", "params", "latency"])
def test_shares_that_may_be_left(goal: str) -> None:
    whole = Select(**{goal: 0.4})
    half = whole.partly(0.5)
    rest = whole.partly(1.0, 0.5)
    assert half is not None
    assert rest is not None
    assert getattr(half.options, goal) == pytest.approx(0.7)
    assert getattr(rest.options, goal) == pytest.approx(0.4)  # of the model before the first step, both
    assert getattr(whole.partly(1.0).options, goal) == pytest.approx(0.4)  # type: ignore[union-attr]


def test_a_share_that_goes() -> None:
    whole = Select(ratio=0.5, only="a*")
    half, rest = whole.partly(0.5), whole.partly(1.0, 0.5)
    assert half is not None
    assert rest is not None
    assert half.options.only == "a*"
    assert half.options.ratio == pytest.approx(0.25)
    assert rest.options.ratio == pytest.approx(0.5)  # of the first model's channels, both


def test_blocks_add_up() -> None:
    whole = Fuse(max_blocks=5)
    points = (0.0, 0.3, 0.6, 1.0)
    steps = [whole.partly(b, a) for a, b in itertools.pairwise(points)]
    assert sum(step.options.max_blocks or 0 for step in steps if step) == 5
    assert whole.partly(0.01).options.max_blocks == 1  # type: ignore[union-attr]
    assert whole.partly(0.02, 0.01) is None


def test_without_a_goal_there_is_no_way() -> None:
    assert Select().partly(0.5) is None
    assert Select(ratio=0).partly(0.5) is None
    assert Select(macs=0.5).partly(0.5, 0.5) is None
    assert Fuse().partly(0.5) is None
    assert Fold().partly(0.5) is None
