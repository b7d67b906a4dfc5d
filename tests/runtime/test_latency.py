"""Latencies: statistics against times that are made up, and networks of which one is known to be slower."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from nets import RUNTIME, net
from scipy import stats

from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.runtime import latency as module
from onnxfuse.runtime.latency import Block, Latency, Stopwatch, latency, mean_ratio, timed_block, timings_from
from onnxfuse.runtime.session import Runtime

X = {"x": np.zeros((64, 256), np.float32)}


def chain(length: int) -> Model:
    """So many products of a (64, 256) input with one matrix."""
    names = ["x", *(f"h{i}" for i in range(length - 1)), "y"]
    body = " ".join(f"{b} = MatMul({a}, w)" for a, b in pairwise(names))
    return net(body, {"w": (256, 256)}, "float[64,256] x", "float[64,256] y")


ONE = chain(1)


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that users have, where tests have quick ones."""
    settings = {"BLOCKS": 16, "LEAST_BLOCKS": 6, "CONFIDENCE": 0.95, "CONTROL_CONFIDENCE": 0.99}
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)


Made = Callable[[Sequence[Any]], Latency]


@pytest.fixture
def made(usual: None, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A measurement from blocks that are made up: times (rounds, sessions), wall and thread."""

    def measure(blocks: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> Latency:
        coming = iter(blocks)
        monkeypatch.setattr(module, "timed_block", lambda *_: Block(*next(coming)))
        monkeypatch.setattr(module, "BLOCKS", len(blocks))
        watch = Stopwatch(ONE, RUNTIME, X)
        watch.measure(ONE)
        return watch.latency()

    return measure


def blocks(
    ratio: float, *, count: int = 16, spread: float = 0.01, control: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Times of an original, itself and another, (blocks, 9 rounds, 3): sessions differ by `spread`."""
    random = np.random.default_rng(seed)
    drift = random.lognormal(0, 0.3, (count, 1, 1))
    session = random.lognormal(0, spread, (count, 1, 3)) * np.array([1.0, control, ratio])
    return 1e6 * drift * session * random.lognormal(0, 0.02, (count, 9, 3))


# --- statistics ---------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_t_test() -> None:
    logs = np.random.default_rng(0).normal(-0.3, 0.05, 9)
    mean, low, high = mean_ratio(logs, 0.95)
    expected = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert np.log(mean) == pytest.approx(logs.mean())
    assert np.log([low, high]) == pytest.approx([expected.low, expected.high])
    half = stats.t.ppf(0.995, 8) * np.sqrt(0.04 / 9)
    assert np.log(mean_ratio(logs, 0.99, least=0.04)[1:]) == pytest.approx(
        [logs.mean() - half, logs.mean() + half]
    )


def test_milliseconds_and_ratio_are_one_statistic() -> None:
    times = blocks(0.7)[:, 0]
    first, same, other = timings_from(times)
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    for timing, column in ((same, times[:, 1]), (other, times[:, 2])):
        assert timing.median_ms == pytest.approx(stats.gmean(column) / 1e6)
        assert timing.ratio == pytest.approx(timing.median_ms / first.median_ms, rel=1e-12)
        assert timing.ratio_low < timing.ratio < timing.ratio_high
        assert timing.quartiles_ms == pytest.approx(np.percentile(column, [25, 75]) / 1e6)


def test_the_interval_covers_the_truth_as_often_as_it_says(made: Made) -> None:
    covered = stable = 0
    for seed in range(200):
        found = made([(block, None) for block in blocks(0.9, spread=0.03, seed=seed)])
        covered += found.timings[1].ratio_low <= 0.9 <= found.timings[1].ratio_high
        stable += found.unstable is None
    assert covered >= 186  # 95 % less two standard deviations; that it may be more is in `least`
    assert stable >= 194


def test_what_slows_single_runs_or_whole_blocks_does_not_count(made: Made) -> None:
    times = blocks(0.8, spread=1e-4)
    quiet = made([(block, None) for block in times]).timings[1]
    times[:, ::8, 2] *= 50
    times[::3] *= 7
    assert made([(block, None) for block in times]).timings[1].ratio == pytest.approx(quiet.ratio, rel=0.02)


# --- the control --------------------------------------------------------------------------------------------


def test_a_control_that_excludes_one_is_unstable(made: Made) -> None:
    found = made([(block, None) for block in blocks(0.8, control=1.06)])
    assert found.control.low > 1
    assert str(found.unstable).startswith("unstable: machine busy (the original against itself: x 1.0")
    assert str(found.over(0.9, "--max")).startswith("--max 0.9 can't be decided: latency unstable: machine")
    assert not made([(block, None) for block in blocks(1.5, control=1.06)]).slower


def test_medians_that_contradict_the_ratio_are_unstable(made: Made) -> None:
    cpu = blocks(0.9, spread=0.001)
    wall = cpu * np.array([2.0, 2.0, 4.0])
    found = made(list(zip(wall, cpu, strict=True)))
    assert found.timings[1].ratio == pytest.approx(0.9, rel=0.01)
    assert (found.clock, found.cpu_share) == ("thread", pytest.approx(cpu.sum() / wall.sum(), rel=0.1))
    assert "medians by the wall clock: x 1.79" in str(found.unstable)
    assert "it had a core for 38% of the time" in str(found.unstable)
    assert made(list(zip(2 * cpu, cpu, strict=True))).unstable is None


def test_a_control_that_varies_makes_the_interval_wider(made: Made) -> None:
    times = np.repeat(blocks(0.8, spread=1e-6), 2, axis=0)
    narrow = made([(block, None) for block in times]).timings[1]
    times[::2, :, :2] *= [1.1, 1 / 1.1]
    times[1::2, :, :2] *= [1 / 1.1, 1.1]
    wide = made([(block, None) for block in times])
    assert wide.unstable is None
    assert wide.timings[1].ratio_high - wide.timings[1].ratio_low > 5 * (narrow.ratio_high - narrow.ratio_low)


def test_blocks_before_there_is_a_result_belong_to_the_control(
    usual: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = blocks(0.8, control=1.5, count=8)[:, :, :2]
    coming = iter([*early, *blocks(0.8)])
    monkeypatch.setattr(module, "timed_block", lambda *_: Block(next(coming), None))
    watch = Stopwatch(ONE, RUNTIME, X)
    for _ in early:
        watch.control()
    watch.measure(ONE, part=0.5)
    watch.measure(ONE, part=0.5)
    found = watch.latency()
    assert (found.blocks, found.rounds) == (16, 16 * 9)
    assert found.control.ratio == pytest.approx(1.5 ** (8 / 24), rel=0.02)
    assert found.timings[1].ratio == pytest.approx(0.8, rel=0.02)


@pytest.mark.parametrize(
    ("limit", "said"), [(0.85, None), (0.801, "not surely within"), (0.7, "more than --max-latency 0.7")]
)
def test_a_limit_is_held_on_the_whole_interval(limit: float, said: str | None, made: Made) -> None:
    reason = made([(block, None) for block in blocks(0.8)]).over(limit, "--max-latency")
    assert reason is None if said is None else said in str(reason)


@pytest.mark.parametrize(("ratio", "slower"), [(1.2, True), (1.008, False), (0.8, False)])
def test_slower_is_what_chance_does_not_explain(ratio: float, slower: bool, made: Made) -> None:
    assert made([(block, None) for block in blocks(ratio, spread=1e-3)]).slower is slower
    assert not made([(block, None) for block in blocks(ratio, spread=0.5, seed=1)]).slower


# --- real runs ----------------------------------------------------------------------------------------------


def test_a_heavier_model_takes_longer() -> None:
    found = latency([chain(1), chain(7)], Runtime("cpu"), X)
    assert 3 < found.timings[1].ratio < 14
    assert found.timings[1].median_ms > found.timings[0].median_ms > 0
    assert (found.providers, found.threads, found.clock) == (("CPUExecutionProvider",), 1, "thread")
    assert 0 < (found.cpu_share or 0) <= 1.05
    assert (found.blocks, found.rounds) == (4, 8)


def test_more_threads_are_timed_by_the_wall_clock() -> None:
    found = latency([chain(1)], Runtime("cpu", 2), X)
    assert (found.threads, found.clock, found.cpu_share) == (2, "wall", None)


def test_the_wall_clock_says_the_same_as_the_thread_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROUNDS", 9)
    block = timed_block([(chain(7), X)], RUNTIME, np.random.default_rng(0))
    assert block.cpu is not None
    assert np.all(block.cpu < 1.05 * block.wall)
    start = time.perf_counter()
    session = RUNTIME.session(chain(7))
    took = []
    for _ in range(9):
        start = time.perf_counter()
        session.run(X)
        took.append(time.perf_counter() - start)
    assert block.cpu.min() / 1e9 == pytest.approx(min(took), rel=0.5)


def test_there_are_enough_blocks_whatever_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCKS", 5)
    monkeypatch.setattr(module, "LEAST_BLOCKS", 3)
    assert latency([chain(1)], RUNTIME, X, seconds=0).blocks == 3
    assert latency([chain(1)], RUNTIME, X, seconds=60).blocks == 5


def test_sessions_are_made_anew_for_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = Runtime.session

    def counting(self: Runtime, model: Any, **named: Any) -> Any:
        made.append((model, named["threads"]))
        return real(self, model, **named)

    monkeypatch.setattr(Runtime, "session", counting)
    models = [chain(1), chain(2)]
    latency(models, Runtime("cpu"), X)
    assert [sum(model is own for model, _ in made) for own in models] == [8, 4]
    assert {threads for _, threads in made} == {1}


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(InputError, match="no model"):
        latency([], RUNTIME, {})
    with pytest.raises(InputError, match="no input 'z'"):
        latency([chain(1)], RUNTIME, {"z": X["x"]})
