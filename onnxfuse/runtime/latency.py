"""Latency of several models, measured side by side.

It is not predictable from multiply-accumulates (a 5x5 convolution has fewer than two 3x3 and can be slower),
and two timings one after the other compare the machine with itself at different moments. So:

- *Blocks.* Times are taken in blocks, which callers spread over a run. A block makes its sessions anew: where
  the memory of a session comes to lie makes two sessions of one model differ by a percent for as long as they
  live. In a block the sessions take turns; they are made, and run, in an order drawn anew each time.
- *One statistic.* A model's time in a block is the median over the rounds, its latency the geometric mean
  over blocks. Then the ratio of two latencies is the geometric mean of the blocks' ratios, and its interval
  is Student's t for the mean of their logarithms: what differs from block to block is in it, drifts too.
- *Control.* The original has two sessions in every block. Its time is the mean of both; the ratio of the two
  is 1 but for chance, and what it differs by from block to block is the least that any interval believes.
- *Clock.* With one thread on the CPU a model runs in the thread that calls it, and that thread's own clock
  does not count the time for which other processes had the core. Else there is only the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.runtime.providers import CPU_PROVIDER

if TYPE_CHECKING:
    import onnx

    from onnxfuse.ir.model import Feed
    from onnxfuse.runtime.session import Runtime

BLOCKS, SECONDS = 16, 4.0
"""Blocks of a measurement, and after how long no further one begins once there are `LEAST_BLOCKS`."""

LEAST_BLOCKS = 6
"""Blocks at least, whatever they take: with fewer, t intervals are too wide to be of use."""

BLOCK_SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 0.12, 25, 2
"""What the rounds of a block may take together, and how many there are."""

READING_SECONDS = 5e-4
"""What a reading of the clock takes at least: of a fast model, several runs."""

WARMUP, WARMUP_SECONDS = 3, 0.1
"""Runs of a session before it is timed, and after how long there are no further ones."""

CONFIDENCE, CONTROL_CONFIDENCE = 0.95, 0.99
"""Of the intervals of ratios, and of the control's: one measurement in a hundred may be called unstable by
chance."""

SAME = 0.01
"""Relative difference of two latencies that counts as none."""

UNSTABLE = "unstable: machine busy"

_ORIGINAL_VARIANCE = 0.75
"""Variance of log b - (log a + log a') / 2 by that of log a' - log a, where all three vary alike."""


@dataclass(frozen=True)
class Timing:
    """One model's times.

    Attributes:
        median_ms: milliseconds of a run: the geometric mean over blocks of the median in each.
        quartiles_ms: the middle half of the blocks' medians.
        ratio: `median_ms` by the first model's.
        ratio_low, ratio_high: the interval of `ratio`, with a confidence of 95%.
    """

    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Control:
    """The original against itself: its second session's time by the first's, and the interval of that, with a
    confidence of 99%. Without a fault of the machine it holds 1."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Timings of several models, the first of them the yardstick.

    Attributes:
        timings: of each model.
        control: of the first, over all blocks, also those before there were others.
        blocks, rounds: how many there were with all models; `rounds` in all of them.
        providers, threads: ONNX Runtime's.
        clock: "thread" (CPU time of the one thread) or "wall".
        cpu_share: share of the wall time for which the one thread had a core; None by the wall clock.
        unstable: why the ratios are not to be believed; None where they are.
    """

    timings: tuple[Timing, ...]
    control: Control
    blocks: int
    rounds: int
    providers: tuple[str, ...]
    threads: int
    clock: str
    cpu_share: float | None
    unstable: str | None

    @property
    def slower(self) -> bool:
        """Whether the second model takes longer than the first, by more than chance and `SAME` explain."""
        return self.unstable is None and self.timings[1].ratio_low > 1 + SAME

    def over(self, limit: float, option: str, *, surely: bool = True) -> str | None:
        """The reason why the second model's latency is not shown to be within a limit; None if it is. An
        unstable measurement shows nothing.

        Args:
            limit: of the ratio.
            option: that set it, for the reason.
            surely: whether the whole interval must be within, or the ratio itself.
        """
        if self.unstable is not None:
            return f"{option} {limit:g} can't be decided: latency {self.unstable}"
        found = self.timings[1]
        if (found.ratio_high if surely else found.ratio) <= limit:
            return None
        much = "more than" if found.ratio_low > limit or not surely else "not surely within"
        return f"latency is {interval_text(found)} of the original's, {much} {option} {limit:g}"


def interval_text(found: Timing) -> str:
    """A ratio with its interval: "x 0.746 (95%: 0.736 to 0.753)"."""
    return f"x {found.ratio:.3f} (95%: {found.ratio_low:.3f} to {found.ratio_high:.3f})"


def latency(
    models: Sequence[Model], runtime: Runtime, feed: Feed, *, seconds: float = SECONDS, seed: int = 0
) -> Latency:
    """Timings of `models` on `feed`, as the module says, with `runtime.timing_threads`.

    Args:
        models: the first is the one that the others are compared with.
        runtime: runs them.
        feed: fits all of them.
        seconds: no block beyond `LEAST_BLOCKS` begins after this time.
        seed: of the orders.

    Raises:
        InputError: no models, or the feed does not fit one of them.
        NotApplicableError: a model does not load or run.
    """
    if not models:
        raise InputError("there is no model to time")
    watch = Stopwatch(models[0], runtime, feed, seed=seed)
    watch.measure(*models[1:], seconds=seconds)
    return watch.latency()


class Stopwatch:
    """A measurement whose blocks can be spread over a run."""

    def __init__(self, original: Model, runtime: Runtime, feed: Feed, *, seed: int = 0) -> None:
        """Begin without any block.

        Args:
            original: what others are compared with.
            runtime: runs the models, with `timing_threads`.
            feed: fits all of them.
            seed: of the orders.
        """
        self._original, self._runtime, self._feed = original, runtime, feed
        self._random = np.random.default_rng(seed)
        self._controls: list[Block] = []
        self._blocks: list[Block] = []

    def control(self) -> None:
        """Take a block of the original against itself, before there are others. Raises as `latency`."""
        self._controls.append(self._block(()))

    def measure(self, *others: Model, part: float = 1.0, seconds: float = SECONDS) -> None:
        """Take blocks of the original against itself and the others. Raises as `latency`.

        Args:
            others: the same in every call.
            part: share of the blocks and of the time, where several calls make one measurement.
            seconds: of the whole measurement, as in `latency`.
        """
        deadline = time.perf_counter() + part * seconds
        for count in range(round(part * BLOCKS)):
            if count >= part * LEAST_BLOCKS and time.perf_counter() > deadline:
                break
            self._blocks.append(self._block(others))

    def _block(self, others: Sequence[Model]) -> Block:
        models = (self._original, self._original, *others)
        return timed_block([(model, self._feed) for model in models], self._runtime, self._random)

    def latency(self) -> Latency:
        """The outcome of the blocks that were measured."""
        times = np.array([block.medians for block in self._blocks])
        pairs = np.array([block.medians[:2] for block in (*self._controls, *self._blocks)])
        differences = np.log(pairs[:, 1] / pairs[:, 0])
        control = Control(*mean_ratio(differences, CONTROL_CONFIDENCE))
        columns = np.column_stack([np.sqrt(times[:, 0] * times[:, 1]), times[:, 2:]])
        timings = timings_from(columns, _ORIGINAL_VARIANCE * float(differences.var(ddof=1)))
        shares = [block.cpu_share for block in self._blocks if block.cpu_share is not None]
        share = float(np.mean(shares)) if shares else None
        walls = np.concatenate([block.wall for block in self._blocks])
        return Latency(
            timings,
            control,
            len(self._blocks),
            len(walls),
            tuple(self._runtime.providers),
            self._runtime.timing_threads,
            "wall" if share is None else "thread",
            share,
            _fault(timings, control, walls, share),
        )


# --- one block ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Nanoseconds of a run, (rounds, sessions): `wall` by the wall clock, `cpu` by the thread's own; None
    where that can't be had."""

    wall: np.ndarray
    cpu: np.ndarray | None

    @property
    def medians(self) -> np.ndarray:
        """The time of each session, (sessions,)."""
        median: np.ndarray = np.median(self.wall if self.cpu is None else self.cpu, axis=0)
        return median

    @property
    def cpu_share(self) -> float | None:
        """Share of the wall time for which the thread had a core."""
        return None if self.cpu is None else float(self.cpu.sum() / self.wall.sum())


def timed_block(
    models: Sequence[tuple[Model | onnx.ModelProto, Feed]], runtime: Runtime, random: np.random.Generator
) -> Block:
    """The times of sessions that take turns, made for this alone.

    Args:
        models: with what each is fed.
        runtime: runs them, with `timing_threads`.
        random: draws the order in which sessions are made, and that of each round.

    Raises:
        InputError: a feed does not fit.
        NotApplicableError: a model does not load or run.
    """
    threads = runtime.timing_threads
    exact = time.get_clock_info("thread_time").resolution <= 1e-6  # not on Windows
    own_clock = exact and threads == 1 and runtime.providers == [CPU_PROVIDER]
    clock = time.thread_time_ns if own_clock else time.perf_counter_ns
    runs: dict[int, Callable[[int], None]] = {}
    expected = np.zeros(len(models))
    for place in random.permutation(len(models)):
        model, feed = models[place]
        session = runtime.session(model, threads=threads)
        # A copy: where the samples lie counts as well as where the weights do.
        runs[place] = session.bind({name: array.copy() for name, array in feed.items()}).run
        expected[place] = _warm(runs[place], clock)
    calls = int(np.ceil(READING_SECONDS / expected.min()))
    rounds = int(np.clip(BLOCK_SECONDS / (calls * expected.sum()), LEAST_ROUNDS, MOST_ROUNDS))
    wall, cpu = np.zeros((2, rounds, len(runs)))
    for row in range(rounds):
        for place in random.permutation(len(runs)):
            own, start = time.thread_time_ns(), time.perf_counter_ns()
            runs[place](calls)
            wall[row, place] = (time.perf_counter_ns() - start) / calls
            cpu[row, place] = (time.thread_time_ns() - own) / calls
    return Block(wall, cpu if own_clock else None)


def _warm(run: Callable[[int], None], clock: Callable[[], int]) -> float:
    """Seconds of a run by a clock, the least of some for warming up."""
    end = time.perf_counter() + WARMUP_SECONDS
    took: list[float] = []
    while len(took) < WARMUP and (not took or time.perf_counter() < end):
        start = clock()
        run(1)
        took.append((clock() - start) / 1e9)
    return max(min(took), 1e-6)


# --- statistics ---------------------------------------------------------------------------------------------


def mean_ratio(logs: np.ndarray, confidence: float, least: float = 0.0) -> tuple[float, float, float]:
    """The geometric mean of ratios, and the ends of its interval, by Student's t.

    Args:
        logs: logarithms of the ratios of at least two blocks, (blocks,).
        confidence: of the interval.
        least: the variance of the logarithms is taken to be at least this.
    """
    from scipy.special import stdtrit

    mean, variance = float(logs.mean()), max(float(logs.var(ddof=1)), least)
    half = float(stdtrit(len(logs) - 1, (1 + confidence) / 2)) * np.sqrt(variance / len(logs))
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


def timings_from(times: np.ndarray, least: float = 0.0) -> tuple[Timing, ...]:
    """Timings from the times of blocks.

    Args:
        times: nanoseconds, (blocks, models).
        least: as in `mean_ratio`.
    """
    logs = np.log(times)
    found = []
    for place, column in enumerate(logs.T):
        quarter, three = np.percentile(times[:, place], [25, 75]) / 1e6
        ratio = mean_ratio(column - logs[:, 0], CONFIDENCE, least) if place else (1.0, 1.0, 1.0)
        found.append(Timing(float(np.exp(column.mean()) / 1e6), (float(quarter), float(three)), *ratio))
    return tuple(found)


def _fault(timings: Sequence[Timing], control: Control, walls: np.ndarray, share: float | None) -> str | None:
    """The reason why a measurement is not to be believed; None if it is."""
    evidence = "" if share is None else f"; it had a core for {share:.0%} of the time"
    if not control.low <= 1 <= control.high:
        against = f"the original against itself: x {control.low:.3f} to {control.high:.3f}"
        return f"{UNSTABLE} ({against}{evidence})"
    medians = np.median(walls, axis=0)
    for timing, median in zip(timings[1:], medians[2:], strict=True):
        seen = float(median / np.sqrt(medians[0] * medians[1]))
        if (timing.ratio_high < 1 and seen > 1 + SAME) or (timing.ratio_low > 1 and seen < 1 - SAME):
            against = f"medians by the wall clock: x {seen:.3f}, blocks: {interval_text(timing)}"
            return f"{UNSTABLE} ({against}{evidence})"
    return None
