"""Observers of a run: when they do what they do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from nets import RUNTIME, net, normal

from onnxfuse.pipeline.instruments import LatencyControl
from onnxfuse.pipeline.recipe import make_passes
from onnxfuse.runtime.latency import Stopwatch


@pytest.mark.parametrize(
    ("count", "idle", "after"),
    [
        (1, [], [1]),
        (1, [1], []),
        (3, [], [1, 2, 3]),
        (3, [1], [2, 3]),
        (4, [], [1, 2, 3, 4]),
        (9, [], [1, 4, 7]),
        (9, [1, 2], [3, 6, 9]),
        (40, [], [1, 11, 21, 31]),
    ],
)
def test_the_control_is_spread_over_the_passes_that_change_something(
    count: int, idle: list[int], after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    model = net("y = Relu(x)", {})
    control = LatencyControl(Stopwatch(model, RUNTIME, {"x": normal(1, 6)}))
    passes = make_passes(count * ["fold"])
    control.started(passes, model)
    for index in range(1, count + 1):
        monkeypatch.setattr(Stopwatch, "control", lambda _, index=index: taken.append(index))
        step = SimpleNamespace(committed=True, changes=() if index in idle else ("something",))
        control.after(index, step, model)  # type: ignore[arg-type]
    assert taken == after
