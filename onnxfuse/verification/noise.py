"""The noise floor: how far a model is from itself when nothing but rounding differs.

`compare` says why it is the unit of tolerance and how large it may be; here are the variants that ought to
compute the same, and the sums over them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.errors import NotApplicableError
from onnxfuse.verification.records import Floor, Floors
from onnxfuse.verification.tally import Differences

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.runtime.session import Runtime, Session
    from onnxfuse.verification.populations import Population


MULTIPLE = 8.0
"""The most noise floors that a difference may reach; `compare` has the evidence."""

NOISE_SAMPLES = 16
"""Samples on which a model's floors are measured at first. A root mean square over the elements of so many is
near enough to pass a comparison by; one that fails by it is judged by the floors on all of its samples."""

BATCH_SIZES = (1, 3)
"""Rows that the first batch is cut to, beside its full size, where the model's batch axis is dynamic."""

_NUDGES = 3  # draws of moved inputs
FEW_ROWS = 4  # rows of a batch that a search for a divergence and a tensor's noise floor begin with
Run = Callable[["Feed"], dict[str, Any]]


def floor_of(population: Population, eps: float, first: int) -> Floor:
    """The noise floor of elements of one scale.

    Args:
        population: the elements.
        eps: spacing of their type's floats at 1; elements that are all zero differ by no less than that.
        first: the first of the streams in which the model is held against itself.
    """
    spacing = population.square * eps**2 / max(population.elements, 1)
    noise = population.squares[first:] / np.maximum(population.seen[first:], 1.0)
    rms = math.sqrt(max(spacing, *noise, 0.0))
    peak = max(population.peak * eps, *population.peaks[first:], 0.0)
    least = 0.0 if population.square else eps
    return Floor(max(rms * population.unit, least), max(peak * population.unit, least))


class NoiseFloors:
    """Streaming noise floor of one model's tensors, from variants that ought to compute the same."""

    def __init__(self, variants: Sequence[Run]) -> None:
        self.variants = variants
        self._pair = Differences(("itself", "itself"), len(variants))

    def add(self, feed: Feed, outputs: Mapping[str, Any]) -> None:
        self._pair.add(outputs, (variant(feed) for variant in self.variants), 0)  # no spreads are wanted

    def result(self) -> dict[str, Floor]:
        """The largest floor of any scale that a tensor holds, by name."""
        floors = {}
        for leaf, tally in self._pair.tallies.items():
            found = [floor_of(population, tally.eps, 0) for population in tally.populations()]
            if found:
                floors[leaf] = Floor(max(f.rms for f in found), max(f.peak for f in found))
        return floors


def known_floors(model: Model, tapped: Session, feed: Feed, runtime: Runtime) -> Floors:
    """The noise floors of what a session hands out, by name. The model remembers them until it is edited.

    Args:
        model: has the tensors.
        tapped: a session of it that hands them out, and no outputs else.
        feed: they are measured on it.
        runtime: made the session.
    """
    content = hashlib.sha256()
    for name, array in sorted(feed.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    key = (content.digest(), runtime.providers[0], runtime.threads)
    kept: dict[object, dict[str, Floor]] = model.cached("noise floors", dict)
    known = kept.setdefault(key, {})
    names = [name for name in tapped.output_names if name not in known]
    if names:
        kind: dict[str, Any] = {"taps": names, "outputs": ()}
        base = runtime.session(model, **kind) if known else tapped
        noise = NoiseFloors(noise_variants(model, runtime, base, **kind))
        noise.add(feed, base.run(feed))
        known.update(noise.result())
    return known


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
        runs.extend([lambda feed: _run_nudged(base, feed, random)] * _NUDGES)
    return runs


def _run_nudged(base: Session, feed: Feed, random: np.random.Generator) -> dict[str, Any]:
    """A run on moved inputs; on the inputs themselves where one must be exact, such as a scale of 1."""
    try:
        return base.run(_nudged(feed, random))
    except NotApplicableError:
        return base.run(feed)
