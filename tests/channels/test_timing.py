"""Widths that this machine rewards."""

from __future__ import annotations

import numpy as np
import pytest
from channel_cases import CASES, found, sized
from nets import RUNTIME, net, normal

from onnxfuse.channels import timing
from onnxfuse.channels.groups import find_groups
from onnxfuse.channels.timing import FASTER, rewarded


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCKS", 1)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_group_can_be_timed_at_every_width(name: str) -> None:
    case = CASES[name]
    model = case.model()
    groups = found(case, model)
    widths = {group: [group.size, *range(group.size - 1, 0, -3)] for group in groups.free}
    times = rewarded(model, groups, widths, RUNTIME, case.feed(model, 2))
    assert set(times) == set(groups.free)
    for group, own in times.items():
        assert next(iter(own)) == group.size
        assert set(own) <= set(widths[group])
        assert all(time > 0 for time in own.values())
        fastest = [min(list(own.values())[:place], default=np.inf) for place in range(len(own))]
        assert all(time <= FASTER * best for time, best in zip(own.values(), fastest, strict=True))


def test_equal_blocks_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    body = """a = Conv(x, w0) r = Relu(a)
        h = Conv<pads=[1,1,1,1]>(r, w1) g = Relu(h) i = Conv(g, w2) s = Add(i, r)
        k = Conv<pads=[1,1,1,1]>(s, w3) l = Relu(k) m = Conv(l, w4) y = Add(m, s)"""
    weights = sized("w0:4,3,1,1 w1:8,4,3,3 w2:4,8,1,1 w3:8,4,3,3 w4:4,8,1,1")
    model = net(body, weights, "float[N,3,5,5] x", "float[A,B,C,D] y")
    groups = find_groups(model, {"x": normal(2, 3, 5, 5)}, RUNTIME)
    calls = []
    real = timing._timed
    monkeypatch.setattr(timing, "_timed", lambda *given: calls.append(given[1].name) or real(*given))
    times = rewarded(
        model, groups, {groups[n]: [8, 4] for n in ("h", "k")}, RUNTIME, {"x": normal(1, 3, 5, 5)}
    )
    assert calls == ["h"]
    assert times[groups["h"]] is times[groups["k"]]


def test_a_width_that_is_faster_is_found() -> None:
    body = "a = MatMul(x, w0) r = Relu(a) y = MatMul(r, w1)"
    model = net(body, sized("w0:512,2048 w1:2048,512"), "float[N,512] x")
    groups = find_groups(model, {"x": normal(2, 512)}, RUNTIME)
    times = rewarded(model, groups, {groups["a"]: [2048, 256]}, RUNTIME, {"x": normal(8, 512)})
    assert list(times[groups["a"]]) == [2048, 256]
