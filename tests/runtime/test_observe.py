"""Tapped runs hand over what ONNX Runtime computes, in order; sums beside them are made one at a time."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from nets import RUNTIME, Feed, compute, context, net, normal

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.runtime.observe import Background, TappedModel, observe


@pytest.fixture
def model() -> Model:
    return net("h = Gemm(x, w1) r = Relu(h) y = Gemm(r, w2)", {"w1": (6, 5), "w2": (5, 3)})


def test_taps_are_inner_tensors_and_inputs_alike(model: Model) -> None:
    feed = {"x": normal(4, 6)}
    seen = TappedModel(model, ["r", "x", "y", "r"], RUNTIME).run(feed)
    assert set(seen) == {"x", "r", "y"}
    assert seen["x"] is feed["x"]
    for name, expected in zip(("r", "y"), compute(model, feed, "r", "y"), strict=True):
        np.testing.assert_array_equal(seen[name], expected)
    with pytest.raises(InputError, match="no tensor named 'z'"):
        TappedModel(model, ["z"], RUNTIME)


def test_inputs_alone_need_no_session(model: Model) -> None:
    class Refusing:
        def session(self, *args: Any, **options: Any) -> Any:
            raise AssertionError("a session was made")

    feed = {"x": normal(4, 6)}
    tapped = TappedModel(model, ["x"], Refusing())  # type: ignore[arg-type]
    assert tapped.run(feed) == feed
    assert tapped.run(feed) is not feed


def test_every_observer_sees_every_batch_in_order(model: Model) -> None:
    ctx = context(model, {"x": normal(30, 6)}, batch_size=7)
    calls: list[tuple[str, int]] = []
    sums = np.zeros(5)

    def first(batch: Batch, seen: Feed) -> None:
        nonlocal sums
        calls.append(("first", batch.index))
        sums = sums + seen["r"].sum(axis=0)

    def second(batch: Batch, seen: Feed) -> None:
        calls.append(("second", batch.index))

    steps: list[float] = []
    tapped = TappedModel(model, ["r"], RUNTIME)
    observe(tapped, ctx.calibration.fit, [first, second], lambda amount=1: steps.append(amount))
    indices = [batch.index for batch in ctx.calibration.fit]
    assert calls == [(name, index) for index in indices for name in ("first", "second")]
    assert steps == [1] * len(indices)
    whole = np.concatenate([batch.feed["x"] for batch in ctx.calibration.fit])
    np.testing.assert_allclose(sums, compute(model, {"x": whole}, "r")[0].sum(axis=0), rtol=1e-5)


def test_background_calls_come_one_after_the_other() -> None:
    done: list[tuple[int, int]] = []

    def note(number: int, seconds: float) -> None:
        time.sleep(seconds)
        done.append((number, threading.get_ident()))

    with Background() as background:
        for number, seconds in enumerate((0.02, 0.0, 0.01)):
            background.call(note, number, seconds)
            assert len(done) >= number  # the call before is over
        background.wait()
        assert [number for number, _ in done] == [0, 1, 2]
        background.wait()
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_what_a_background_call_raises_is_raised_by_the_next() -> None:
    def fail() -> None:
        raise ValueError("not finite")

    with Background() as background:
        background.call(fail)
        with pytest.raises(ValueError, match="not finite"):
            background.call(print)
        background.wait()
        background.call(fail)
        with pytest.raises(ValueError, match="not finite"):
            background.wait()
