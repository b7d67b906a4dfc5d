"""Observers of a run: when they do what they do."""

from __future__ import annotations

import pytest
from nets import RUNTIME, net, normal

from onnxfuse.pipeline.instruments import LatencyControl
from onnxfuse.pipeline.recipe import make_passes
from onnxfuse.runtime.latency import Stopwatch


@pytest.mark.parametrize(
    ("count", "before"), [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (9, [1, 4, 7]), (40, [1, 11, 21, 31])]
)
def test_the_control_is_spread_over_the_passes(
    count: int, before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    model = net("y = Relu(x)", {})
    control = LatencyControl(Stopwatch(model, RUNTIME, {"x": normal(1, 6)}))
    passes = make_passes(count * ["fold"])
    control.started(passes, model)
    for index, pass_ in enumerate(passes, start=1):
        monkeypatch.setattr(Stopwatch, "control", lambda _, index=index: taken.append(index))
        control.before(index, pass_, model)
    assert taken == before
