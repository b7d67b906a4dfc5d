"""The noise floor: how far a model is from itself when nothing but rounding differs.

`compare` says why it is the unit of tolerance and how large it may be; here are the variants that ought to
compute the same, and the sums over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.verification.records import Floor
from onnxfuse.verification.tally import Differences, is_float, named_arrays, widened

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.runtime.session import Runtime, Session


MULTIPLE = 8.0
"""The most noise floors that a difference may reach; `compare` has the evidence."""

BATCH_SIZES = (1, 3)
"""Rows that the first batch is cut to, beside its full size, where the model's batch axis is dynamic."""

_NUDGES = 3  # draws of moved inputs
FEW_ROWS = 4  # rows of a batch that a search for a divergence and a tensor's noise floor begin with
Run = Callable[["Feed"], dict[str, Any]]


def _epsilon(dtype: np.dtype) -> float:
    """Spacing of floats at 1; eight bits of mantissa are taken for types that NumPy does not know."""
    return float(np.finfo(dtype).eps) if dtype.kind in "fc" else 2.0**-7


class NoiseFloors:
    """Streaming noise floor of one model's outputs, from variants that ought to compute the same."""

    def __init__(self, variants: Sequence[Run]) -> None:
        self.variants = variants
        self.pairs = [Differences(("itself", "itself")) for _ in variants]
        self.smallest: dict[str, tuple[float, float, int]] = {}  # sum of squares, peak, count, in last places

    def add(self, feed: Feed, outputs: Mapping[str, Any]) -> None:
        for variant, pair in zip(self.variants, self.pairs, strict=True):
            again = variant(feed)
            pair.add({name: outputs[name] for name in again}, again)
        for name, value in outputs.items():
            for leaf, array in named_arrays(name, value):
                if is_float(array) and array.size:
                    size = np.abs(widened(array)) * _epsilon(array.dtype)
                    square, peak, count = self.smallest.get(leaf, (0.0, 0.0, 0))
                    entry = (
                        square + float(np.vdot(size, size)),
                        max(peak, float(size.max())),
                        count + size.size,
                    )
                    self.smallest[leaf] = entry

    def result(self) -> dict[str, Floor]:
        floors = {}
        for leaf, (square, peak, count) in self.smallest.items():
            seen = [pair.tallies[leaf] for pair in self.pairs if leaf in pair.tallies]
            rms = max([float(np.sqrt(square / count)), *(tally.rms for tally in seen)])
            floors[leaf] = Floor(rms, max([peak, *(tally.peak for tally in seen)]))
        return floors


def _nudged(feed: Feed, random: np.random.Generator) -> Feed:
    """Every floating-point input moved to a neighboring float, up or down at random."""

    def nudge(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f":
            return array
        toward = np.where(random.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype)
        return np.asarray(np.nextafter(array, toward))

    return {name: nudge(array) for name, array in feed.items()}


def noise_variants(model: Model, runtime: Runtime, base: Session, **kind: Any) -> list[Run]:
    """Runs that ought to give the same as a session.

    Args:
        model: the session's model.
        runtime: made the session.
        base: the session.
        **kind: the options that it was made with.
    """
    random = np.random.default_rng(0)
    runs: list[Run] = [runtime.session(model, optimize=False, **kind).run]
    if runtime.threads > 1:
        runs.append(runtime.session(model, threads=1, **kind).run)
    if any(info.dtype is not None and info.dtype.kind == "f" for info in base.inputs):
        runs.extend([lambda feed: base.run(_nudged(feed, random))] * _NUDGES)
    return runs
