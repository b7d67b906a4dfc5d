"""How candidate rewrites are judged before any is made: by what they do to the network's outputs.

A trial is fitted on some of the fit samples and judged on others of them, so that nothing is judged on
samples that its moments have seen, and the samples which the report quotes have decided nothing.

Outputs are compared on the scale of `verification.compare.output_error`, squared: of rewrites in different
places the squared errors about add up, so a sum of changes foretells the squared error of all of them
together.

Trials are many, and alike in most of the network. So only what lies behind a rewrite is run: the tensors
there are kept from one run of the network that is rewritten (`_Base`). And a trial takes no more samples than
its figure needs: a few at a time, until the figure's standard error is small beside it, or it is plain that
nothing is left of the outputs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits

from onnxfuse.data.calibration import BatchStream, Calibration
from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting.sites import nodes_behind, tensors_read, unchanged
from onnxfuse.ir.model import Feed, Model
from onnxfuse.pipeline.base import Context
from onnxfuse.progress import NoProgress
from onnxfuse.runtime.session import Runtime
from onnxfuse.runtime.spool import Spool
from onnxfuse.verification.compare import output_differences
from onnxfuse.verification.tally import Differences

Measure = Literal["error", "kl"]
Job = TypeVar("Job")

MOST_WORKERS = 4
"""Trials that run side by side: each keeps tensors of its own."""

WAVE = 32
"""Trials whose tensors at the cut are kept at a time."""

ROWS = 16
"""Samples that are judged at a time."""

LEAST_STEPS = 4
"""So often at least, before the standard error of a figure says anything."""

ENOUGH = 0.1
"""Standard error, relative to the figure, that is small enough."""

HOPELESS = 4.0
"""Squared relative error after the first samples that needs no closer look: a constant would have 1."""


@dataclass(frozen=True)
class Trials:
    """Samples for trials, some of the fit samples.

    Attributes:
        calibration: the samples that trials are fitted on; held out are those that they are judged on.
        measure: squared relative error, or Kullback-Leibler divergence of classes whose logits they are.
    """

    calibration: Calibration
    measure: Measure

    @classmethod
    def of(cls, context: Context, samples: int, measure: Measure = "error") -> Trials:
        """Trials on some of the fit samples.

        Args:
            context: of the pass.
            samples: about so many.
            measure: see `Trials`.
        """
        return cls(context.calibration.part(samples), measure)

    @property
    def feed(self) -> Feed:
        """The first of the feeds that trials are judged on."""
        return next(self.calibration.held_out.cut(ROWS).feeds())

    def changes(
        self,
        jobs: Sequence[Job],
        rewrite: Callable[[Job], Model],
        context: Context,
        base: Model,
        *,
        fit: Callable[[Job, Model, Context], Model] | None = None,
        task: str = "trying",
    ) -> list[float]:
        """The distance of each job's outputs from the original's; infinite where the network fails.

        Trials are many and small: side by side, on a core each, they take the least time.

        Args:
            jobs: what is tried.
            rewrite: gives a job's model; no two run at a time.
            context: of the pass.
            base: the model that is rewritten.
            fit: fits a job's model further, side by side with others, in a context of the job's own whose
                samples are those of the trials.
            task: what to call it where progress is shown.
        """
        advance = context.progress.task(task, total=len(jobs))
        single = context.runtime.single()
        alone = replace(context, calibration=self.calibration, progress=NoProgress(), runtime=single)
        lock = threading.Lock()  # models keep caches, so that no two threads may read or copy one at a time

        def prepared(job: Job) -> _Trial | None:
            with lock:
                made = rewrite(job)
                own = replace(alone, original=alone.original.copy()) if fit is not None else alone
            try:
                if fit is not None:
                    made = fit(job, made, own)
                with lock:
                    return _Trial(base, made)
            except NotApplicableError:
                return None

        def change(trial: _Trial | None) -> float:
            try:
                return math.inf if trial is None else trial.change(kept, single, self.measure)
            except NotApplicableError:
                return math.inf
            finally:
                advance()

        workers = min(context.runtime.threads, MOST_WORKERS)
        found: list[float] = []
        with (
            Spool(context.calibration.budget.spool) as spool,
            threadpool_limits(1, "blas"),
            ThreadPoolExecutor(workers) as pool,
        ):
            kept = _Base(context.original, base, self.calibration.held_out.cut(ROWS), single, spool)
            for start in range(0, len(jobs), WAVE):
                # What isn't fitted needs no threads: copies and edits hold the interpreter.
                wave = jobs[start : start + WAVE]
                trials = list(pool.map(prepared, wave) if fit is not None else map(prepared, wave))
                kept.hold({name for trial in trials if trial is not None for name in trial.taken})
                found += pool.map(change, trials)
        return found


class _Trial:
    """A rewritten model, and the part of it that lies behind the rewrite.

    Attributes:
        taken: the tensors that both models compute alike and that this one's part reads, or that are outputs.
    """

    def __init__(self, base: Model, made: Model) -> None:
        """Find the part.

        Args:
            base: what was rewritten.
            made: the result.
        """
        self._made = made
        outputs = [info.name for info in made.outputs]
        same = {name for name in unchanged(base, made) if _can_be_fed(base, name)}
        reads = {
            tensor.name
            for node in nodes_behind(made, outputs, same)
            for tensor in tensors_read(made, node)
            if tensor.name in same and not made.is_weight(tensor)
        }
        self._reads = sorted(reads)
        self._outputs = [name for name in outputs if name not in same]
        self._equal = [name for name in outputs if name in same]
        self.taken = reads | set(self._equal)

    def change(self, base: _Base, runtime: Runtime, measure: Measure) -> float:
        """The distance of its outputs from the original's, from as many samples as that takes.

        Args:
            base: has the tensors that it takes.
            runtime: runs it.
            measure: see `Trials`.

        Raises:
            NotApplicableError: the network fails.
        """
        session = None
        if self._outputs:
            session = runtime.session(self._made.extract(self._reads, self._outputs))
        distance = Distance(measure)
        figures: list[float] = []
        for chunk in base.chunks:
            found = base.tensors(self._equal, chunk)
            if session is not None:
                found.update(session.run(base.tensors(self._reads, chunk)))
            distance.add(base.outputs(chunk), found, base.samples[chunk])
            figures.append(distance.value)
            if _is_enough(figures):
                break
        return figures[-1]


def _can_be_fed(model: Model, name: str) -> bool:
    """Whether a tensor can be an input of a model: it is a tensor, of a type that is known."""
    info = model.shapes().get(name)
    return info is not None and info.dtype is not None


class _Base:
    """The network that is rewritten, and the original, over the samples that trials are judged on.

    Attributes:
        chunks: numbers of the batches, in the order in which they are to be looked at: any few of them are
            spread over all.
        samples: of each batch.
    """

    def __init__(
        self, original: Model, model: Model, batches: BatchStream, runtime: Runtime, spool: Spool
    ) -> None:
        """Read the samples.

        Args:
            original: gives the outputs to compare with.
            model: is rewritten.
            batches: the samples.
            runtime: runs both.
            spool: where tensors wait.
        """
        self._runtime, self._spool, self._lock = runtime, spool, threading.RLock()
        self._original, self._model = runtime.session(original), model
        self._run: Callable[[Feed], Feed] | None = None
        self._held: set[str] = set()
        self._done: set[tuple[str, int]] = set()
        self._inputs: list[str] = []
        self.samples: list[int] = []
        for number, batch in enumerate(batches):
            self._inputs = list(batch.feed)
            self.samples.append(batch.samples)
            for name, array in batch.feed.items():
                spool.put(f"input:{name}", number, array)
        self.chunks = _spread_order(len(self.samples))

    def hold(self, names: Iterable[str]) -> None:
        """Let go of the tensors held so far, and hold these."""
        for name in self._held:
            self._spool.drop(f"tensor:{name}")
        self._done = {done for done in self._done if done[0] == ""}
        self._held = set(names) - set(self._inputs)
        wanted = sorted(self._held)
        self._run = self._runtime.session(self._model, taps=wanted, outputs=()).run if wanted else None

    def tensors(self, names: Sequence[str], chunk: int) -> Feed:
        """Tensors of one batch that are held, or inputs."""
        with self._lock:
            if not self._held.isdisjoint(names):
                self._once("held", chunk, "tensor", self._run)
            return {
                name: self._spool.get(f"{'tensor' if name in self._held else 'input'}:{name}", chunk)
                for name in names
            }

    def outputs(self, chunk: int) -> dict[str, Any]:
        """What the original makes of one batch."""
        with self._lock:
            self._once("", chunk, "output", self._original.run)
            return {name: self._spool.get(f"output:{name}", chunk) for name in self._original.output_names}

    def _once(self, what: str, chunk: int, kind: str, run: Callable[[Feed], Feed] | None) -> None:
        """Run a batch, unless that was done, and keep what comes of it."""
        if (what, chunk) in self._done or run is None:
            return
        self._done.add((what, chunk))
        feed = {name: self._spool.get(f"input:{name}", chunk) for name in self._inputs}
        for name, array in run(feed).items():
            self._spool.put(f"{kind}:{name}", chunk, array)


def _spread_order(count: int) -> list[int]:
    """The numbers below `count`, so that any first few of them are spread over all (van der Corput)."""
    width = max(count - 1, 1).bit_length()
    return sorted(range(count), key=lambda number: int(f"{number:0{width}b}"[::-1], 2))


def _is_enough(figures: Sequence[float]) -> bool:
    """Whether the last figure will do.

    Args:
        figures: after each step, each of all samples so far. What a step alone would have given follows from
            it and the one before, up to how the outputs' own spread differs between steps.
    """
    count, last = len(figures), figures[-1]
    if not math.isfinite(last) or (count == 1 and last > HOPELESS):
        return True
    if count < LEAST_STEPS:
        return False
    steps = np.diff(np.array([0.0, *figures]) * np.arange(count + 1))
    return float(np.std(steps, ddof=1)) <= ENOUGH * last * math.sqrt(count)


class Distance:
    """The distance of outputs from the original's, summed over them, batch by batch."""

    def __init__(self, measure: Measure) -> None:
        """Nothing is taken in yet; `measure` as in `Trials`."""
        self._measure = measure
        self._pair = Differences(("the original", "the result"))
        self._divergence: dict[str, list[float]] = {}  # sum and number of rows

    def add(self, before: Mapping[str, Any], after: Mapping[str, Any], samples: int) -> None:
        """Take in one batch.

        Args:
            before: the original's outputs.
            after: those of a rewritten network.
            samples: number of samples.
        """
        self._pair.add(before, [after], samples)
        if self._measure == "kl" and self._whole:
            for name, value in before.items():
                if np.issubdtype(np.asarray(value).dtype, np.floating):
                    total = self._divergence.setdefault(name, [0.0, 0.0])
                    rows = _divergences(value, after[name])
                    total[0] += float(rows.sum())
                    total[1] += len(rows)

    @property
    def _whole(self) -> bool:
        return not any(tally.problem for tally in self._pair.tallies.values())

    @property
    def value(self) -> float:
        """The distance so far; infinite where outputs are not finite or of another shape."""
        if not self._whole:
            return math.inf
        if self._measure == "kl":
            return sum(total / rows for total, rows in self._divergence.values())
        return sum(output.relative**2 for output in output_differences(self._pair))


def _divergences(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of softmax(after) from softmax(before) for each row of logits (...,
    classes)."""
    width = before.shape[-1] if before.ndim else 1
    p, q = (log_softmax(own.reshape(-1, width).astype(np.float64), axis=1) for own in (before, after))
    likely = np.exp(p)
    # What a mask has made impossible, at minus infinity, is as impossible in both.
    apart = np.subtract(p, q, out=np.zeros_like(p), where=likely > 0)
    return np.asarray(np.sum(likely * apart, axis=1))
