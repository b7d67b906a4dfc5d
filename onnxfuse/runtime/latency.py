"""Latency of several models, measured side by side.

It is not predictable from multiply-accumulates (a 5x5 convolution has fewer than two 3x3 and can be slower).
All models are timed interleaved in one run, in an order drawn anew each round, because on a busy machine two
separate timings compare the machine with itself at different moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed
    from onnxfuse.runtime.session import Runtime


@dataclass(frozen=True)
class Timing:
    """One model's times. `median_ms` and the quartiles are of single runs, in milliseconds; `ratio` is the
    median over rounds of its time by the first model's in the same round, `ratio_low` to `ratio_high` a 95%
    bootstrap confidence interval of that median, `ratio_quartiles` the middle half of the rounds."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Latency:
    """Timings of several models, the first of them the yardstick, over `rounds` rounds."""

    timings: tuple[Timing, ...]
    rounds: int
    providers: tuple[str, ...]
    threads: int


def latency(
    models: Sequence[Model],
    runtime: Runtime,
    feed: Feed,
    *,
    repeats: int = 100,
    seconds: float = 10.0,
    warmup: int = 3,
    seed: int = 0,
) -> Latency:
    """Timings of `models` on `feed`, interleaved as the module says.

    Args:
        models: the first is the one that the others are compared with.
        runtime: runs them.
        feed: fits all of them.
        repeats: rounds at most.
        seconds: no new round starts after this time; at least three are made whatever they take.
        warmup: runs of each model before the first round.
        seed: of the orders and of the bootstrap.

    Raises:
        InputError: no models, or the feed does not fit one of them.
        NotApplicableError: a model does not load or run.
    """
    if not models:
        raise InputError("there is no model to time")
    sessions = [runtime.session(model) for model in models]
    runs = [session.bind(feed).run for session in sessions]
    times = interleaved(runs, repeats=repeats, seconds=seconds, warmup=warmup, seed=seed)
    return Latency(timings_from(times, seed), len(times), tuple(sessions[0].providers), runtime.threads)


def interleaved(
    runs: Sequence[Callable[[], Any]], *, repeats: int, seconds: float, warmup: int = 3, seed: int = 0
) -> np.ndarray:
    """Nanoseconds of calls, (rounds, runs).

    Args:
        runs: what is called.
        repeats, seconds, warmup, seed: as in `latency`.
    """
    for run in runs:
        for _ in range(warmup):
            run()
    random = np.random.default_rng(seed)
    deadline = time.perf_counter() + seconds
    times: list[np.ndarray] = []
    while len(times) < max(repeats, 1) and (len(times) < 3 or time.perf_counter() < deadline):
        row = np.zeros(len(runs))
        for index in random.permutation(len(runs)):
            start = time.perf_counter_ns()
            runs[index]()
            row[index] = time.perf_counter_ns() - start
        times.append(row)
    return np.array(times)


def timings_from(times: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[Timing, ...]:
    """Timings from nanoseconds.

    Ratios are taken round by round, so that what slows a whole round (another process) cancels; medians,
    because what slows a single run must not count.

    Args:
        times: (rounds, models).
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    ratios = times / times[:, :1]
    draws = np.random.default_rng(seed).integers(len(times), size=(resamples, len(times)))
    found = []
    for column, ratio in zip(times.T / 1e6, ratios.T, strict=True):
        low, high = np.percentile(np.median(ratio[draws], axis=1), [2.5, 97.5])
        quarter, three = np.percentile(column, [25, 75])
        middle = np.percentile(ratio, [25, 75])
        found.append(
            Timing(
                float(np.median(column)),
                (float(quarter), float(three)),
                float(np.median(ratio)),
                float(low),
                float(high),
                (float(middle[0]), float(middle[1])),
            )
        )
    return tuple(found)
