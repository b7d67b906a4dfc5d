"""How candidate rewrites are judged before any is made: by what they do to the network's outputs.

A trial is fitted on some of the fit samples and judged on others of them, so that the samples which the
report quotes have decided nothing.

Outputs are compared on the scale of `verification.compare.output_error`, squared: of rewrites in different
places the squared errors about add up, so a sum of changes foretells the squared error of all of them
together.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits

from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.pipeline.base import Context
from onnxfuse.progress import NoProgress
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import differences

Measure = Literal["error", "kl"]
Job = TypeVar("Job")

MOST_WORKERS = 4
"""Trials that run side by side: each keeps tensors of its own."""


@dataclass(frozen=True)
class Trials:
    """Samples for trials, some of the fit samples, and the original's outputs on those to judge by.

    Attributes:
        calibration: the samples.
        feeds: those to judge on, batch by batch.
        samples: number of samples in each batch.
        outputs: what the original makes of each batch.
        measure: squared relative error, or Kullback-Leibler divergence of classes whose logits they are.
    """

    calibration: Calibration
    feeds: list[Feed]
    samples: list[int]
    outputs: list[Feed]
    measure: Measure

    @classmethod
    def of(cls, context: Context, samples: int, measure: Measure = "error") -> Trials:
        """Trials on some of the fit samples.

        Args:
            context: of the pass.
            samples: about so many.
            measure: see `Trials`.
        """
        few = context.calibration.part(samples)
        batches = list(few.held_out)
        feeds = [batch.feed for batch in batches]
        base = context.runtime.session(context.original)
        outputs = [base.run(feed) for feed in feeds]
        return cls(few, feeds, [batch.samples for batch in batches], outputs, measure)

    def change(self, trial: Model, runtime: Runtime) -> float:
        """The distance of the outputs of `trial` from the original's.

        Raises:
            NotApplicableError: the network fails.
        """
        session = runtime.session(trial)
        outputs = [session.run(feed) for feed in self.feeds]
        return output_change(self.outputs, outputs, self.samples, self.measure)

    def changes(
        self,
        jobs: Sequence[Job],
        rewrite: Callable[[Job], Model],
        context: Context,
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
            fit: fits a job's model further, side by side with others, in a context of the job's own whose
                samples are those of the trials.
            task: what to call it where progress is shown.
        """
        advance = context.progress.task(task, total=len(jobs))
        single = context.runtime.single()
        alone = replace(context, calibration=self.calibration, progress=NoProgress(), runtime=single)
        lock = threading.Lock()  # models keep caches, so that no two threads may read or copy one at a time

        def change(job: Job) -> float:
            with lock:
                made = rewrite(job)
                own = replace(alone, original=alone.original.copy()) if fit is not None else alone
            try:
                return self.change(made if fit is None else fit(job, made, own), single)
            except NotApplicableError:
                return math.inf
            finally:
                advance()

        workers = min(context.runtime.threads, MOST_WORKERS)
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
            return list(pool.map(change, jobs))


def output_change(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    samples: Sequence[int],
    measure: Measure,
) -> float:
    """The distance of outputs from the original's, summed over them; infinite where they are not finite or of
    another shape.

    Args:
        before: the original's outputs, batch by batch.
        after: those of a rewritten network.
        samples: number of samples in each batch.
        measure: "error": squared relative error (`verification.compare.output_error`); "kl": divergence of
            classes.
    """
    found = differences(zip(before, after, samples, strict=True))
    if any(output.problem for output in found):
        return math.inf
    if measure == "error":
        return sum(output.relative**2 for output in found)
    names = [name for name, value in before[0].items() if np.issubdtype(np.asarray(value).dtype, np.floating)]
    return sum(_divergence([x[name] for x in before], [y[name] for y in after]) for name in names)


def _divergence(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """Mean Kullback-Leibler divergence of softmax(after) from softmax(before), rows of logits (..., classes)
    in batches."""
    width = before[0].shape[-1] if before[0].ndim else 1
    a, b = (
        np.concatenate([own.reshape(-1, width) for own in batches]).astype(np.float64)
        for batches in (before, after)
    )
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    likely = np.exp(p)
    # What a mask has made impossible, at minus infinity, is as impossible in both.
    apart = np.subtract(p, q, out=np.zeros_like(p), where=likely > 0)
    return float(np.mean(np.sum(likely * apart, axis=1)))
