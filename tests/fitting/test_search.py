"""The search for how far the bound on the output error allows."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from nets import context, net, normal, weight

from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting.search import SearchResult, farthest, longest
from onnxfuse.pipeline.base import Context, PassResult
from onnxfuse.pipeline.goals import Goals


class Options(Goals):
    goals: ClassVar = {"a": None, "b": None, "c": None}
    a: int | None = None
    b: int | None = None
    c: int | None = None


MODEL = net("y = MatMul(x, w)", {"w": (6, 4)})
LEVELS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


def scaled(level: float) -> PassResult:
    """Off by `level`, relatively."""
    model = MODEL.copy()
    model.set_weight(model.tensor("w"), weight(MODEL, "w") * np.float32(1 + level))
    return PassResult(model)


def search(ctx: Context, make: Any = scaled, **more: Any) -> SearchResult:
    return farthest(
        LEVELS,
        make,
        ctx,
        Options(),
        said=lambda level: f"level {level}",
        none=lambda within, error: f"nothing {within}: {error:.2g}",
        **more,
    )


@pytest.mark.parametrize("guess", [None, 0, 1, 3, 6, 9])
@pytest.mark.parametrize("count", range(7))
def test_the_last_level_within_the_bound(count: int, guess: int | None) -> None:
    bound = (0.005, 0.015, 0.03, 0.06, 0.12, 0.24, 0.5)[count]
    ctx = context(MODEL, {"x": normal(64, 6)}, max_error=bound)
    found = search(ctx, guess=guess)
    assert found.count == count
    (note,) = found.notes
    if not count:
        assert found.made is None
        assert note.startswith("nothing within 0.005 (--max-error): 0.01")
        return
    assert found.made is not None
    factors = weight(found.made.model, "w") / weight(MODEL, "w")
    np.testing.assert_allclose(factors, 1 + LEVELS[count - 1], 1e-5)
    expected = f"level {LEVELS[count - 1]}: held-out output error within {bound:g} (--max-error)"
    if count == len(LEVELS):
        assert note == expected
        return
    within, beyond = note.split(" it would be ")
    assert within == f"{expected}; with level {LEVELS[count]}"
    assert float(beyond) > bound
    assert float(beyond) == pytest.approx(LEVELS[count], rel=0.3)


def test_a_level_that_fails_is_beyond_the_bound() -> None:
    def make(level: float) -> PassResult:
        if level > 0.03:
            raise NotApplicableError("too far")
        return scaled(level)

    events: list[tuple[str, dict[str, Any]]] = []
    ctx = context(MODEL, {"x": normal(64, 6)})
    ctx.journal = lambda event, **figures: events.append((event, figures))  # type: ignore[assignment]
    found = search(ctx, make, event=("tried", "far"))
    assert found.count == 2
    assert "within 0.1 (the careful default); with level 0.04 it would be inf" in found.notes[0]
    assert ("probe failed", {"failure": "too far"}) in events
    assert {figures["far"] for event, figures in events if event == "tried"} >= {0.02, 0.04}


def test_without_held_out_samples_the_goals_are_named() -> None:
    found = search(context(MODEL, {"x": normal(64, 6)}, held_out=0.0))
    assert found == SearchResult(
        None, ["no held-out samples to hold the error bound on; give a, b or c instead"], 0
    )


@pytest.mark.parametrize("count", range(8))
def test_longest_finds_the_longest_prefix_from_any_guess(count: int) -> None:
    for limit in range(count + 1):
        for guess in range(count + 2):
            probes: list[int] = []

            def probe(length: int, limit: int = limit, probes: list[int] = probes) -> Any:
                probes.append(length)
                return f"result {length}" if length <= limit else None

            found, length = longest(count, guess, probe)
            assert length == limit
            assert found == (f"result {limit}" if limit else None)
            assert len(set(probes)) == len(probes)
            if limit == guess:
                assert len(probes) <= 2


def test_one_goal_at_most() -> None:
    assert Options(b=2).goal == ("b", 2)
    assert Options().goal is None
    with pytest.raises(ValueError, match="give one of a, b and c, not a and c"):
        Options(a=1, c=2)
