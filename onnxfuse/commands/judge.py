"""The verdict at the end of a run: the whole result against the whole original, on samples that no pass has
fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.errors import InputError, NotApplicableError, VerificationError
from onnxfuse.numerics.significance import paired_difference
from onnxfuse.pipeline.base import Contract
from onnxfuse.runtime.latency import latency
from onnxfuse.verification import compare
from onnxfuse.verification.label_checks import label_doubts
from onnxfuse.verification.metrics import Metric, MetricChange, evaluate, load_metric

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Calibration
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.pipeline.base import Context
    from onnxfuse.pipeline.records import Outcome, StepReport
    from onnxfuse.runtime.latency import Latency
    from onnxfuse.runtime.session import Runtime
    from onnxfuse.verification.records import OutputError

_TIMED_ROUNDS, _TIMED_SECONDS, _TIMED_ATTEMPTS = 1000, 4.0, 3
_SAME_LATENCY = 1.01  # what two sessions of one model may differ by


def check_limits(max_error: float | None, max_drop: float | None, seed: int) -> None:
    """Check the numbers that a user allows.

    Args:
        max_error: relative output error, None without a limit.
        max_drop: drop of the metric, None without a limit.
        seed: of everything random.

    Raises:
        InputError: one is out of range.
    """
    if max_error is not None and not 0 < max_error < np.inf:
        raise InputError(f"--max-error must be a number above 0, not {max_error:g}")
    if max_drop is not None and not 0 <= max_drop < np.inf:
        raise InputError(f"--max-drop must be a number of at least 0, not {max_drop:g}")
    if seed < 0:
        raise InputError(f"--seed must be at least 0, not {seed}")


# --- the metric ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """The metric of a run, if it has one, and the original's score of every held-out sample."""

    name: str
    metric: Metric | None
    before: np.ndarray
    max_drop: float | None
    note: str | None = None

    @classmethod
    def make(
        cls,
        spec: str | None,
        max_drop: float | None,
        calibration: Calibration,
        original: Model,
        runtime: Runtime,
    ) -> Scorer:
        """The scorer of a run. It scores the original before any pass runs, so that a metric that fails does
        so at once.

        Args:
            spec: the metric that was asked for; None takes top1 where there are labels that it can use.
            max_drop: the drop allowed; needs a metric.
            calibration: of which the held-out samples are scored.
            original: what the result is held against.
            runtime: where it runs.

        Raises:
            InputError: a metric that there isn't, that fails, or that has nothing to be measured on.
        """
        held_out = calibration.held_out
        if spec is None and not calibration.labels:
            if max_drop is not None:
                raise InputError(
                    "--max-drop needs labels in the calibration data, or a --metric file.py:function"
                )
            return cls("", None, np.empty(0), None)
        if not held_out.samples:
            if spec is not None or max_drop is not None:
                raise InputError("a metric needs held-out samples: give --held-out a share above 0")
            return cls("", None, np.empty(0), None, "the labels are not used: no samples are held out")
        name = spec or "top1"
        metric = load_metric(name)
        try:
            before = evaluate(runtime.session(original), held_out, metric)
        except InputError as error:
            if spec is not None or max_drop is not None:
                raise
            reason = (
                f"the labels are not used: {error}; array '{calibration.labels}' was taken for labels, leave "
                "it out if it holds something else"
            )
            return cls("", None, np.empty(0), None, reason)
        doubts = label_doubts(name, before, runtime.session(original), held_out)
        if max_drop is not None and (chance := next((line for line in doubts if "CHANCE" in line), None)):
            raise InputError(f"--max-drop can't be held: {chance}")
        return cls(name, metric, before, max_drop, "; ".join(doubts) or None)

    def change(self, result: Model, context: Context) -> MetricChange | None:
        """The metric of the original and of the result, None without a metric."""
        if self.metric is None:
            return None
        after = evaluate(context.runtime.session(result), context.calibration.held_out, self.metric)
        return MetricChange(
            self.name, paired_difference(self.before, after, seed=context.seed), self.max_drop
        )


# --- the verdict --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The whole-model check at the end of a run, as far as it came."""

    exit_code: int = 0
    reason: str | None = None
    output_error: OutputError | None = None
    metric: MetricChange | None = None
    latency: Latency | None = None

    @property
    def slower(self) -> bool:
        """Whether the result takes longer than the original, beyond what chance explains."""
        return self.latency is not None and _is_slower(self.latency)


def conclude(
    outcome: Outcome, result: Model, trained: bool, context: Context, scorer: Scorer, sample: Feed
) -> Verdict:
    """The verdict on a finished run.

    Args:
        outcome: of the passes.
        result: what they made, trained or not.
        trained: whether it was trained.
        context: the original, the samples and the budget that the whole run is held to.
        scorer: of the metric.
        sample: what latency is taken at.
    """
    failed = next((step for step in outcome.steps if not step.committed), None)
    if failed is not None:
        return Verdict(failed.exit_code, f"pass '{failed.name}': {failed.reason}")
    if not is_changed(outcome.steps):
        return Verdict(NotApplicableError.exit_code, _idle(outcome.steps))
    try:
        error = _whole_error(outcome, result, trained, context)
    except VerificationError as failure:
        return Verdict(VerificationError.exit_code, str(failure))
    scores = scorer.change(result, context)
    reason = _over_budget(error, context, scores)
    if reason is not None:
        return Verdict(VerificationError.exit_code, reason, error, scores)
    timed = _timed([context.original, result], context, sample)
    return Verdict(0, None, error, scores, timed)


def _idle(steps: Sequence[StepReport]) -> str:
    """The reason why there is nothing to write, from the notes of all passes."""
    said = [f"{step.name}: {step.notes[-1] if step.notes else 'nothing to do'}" for step in steps]
    return f"no pass changed the model ({'; '.join(said)})"


def _whole_error(outcome: Outcome, result: Model, trained: bool, context: Context) -> OutputError | None:
    """The output error on held-out samples; where there are none, on the fitted ones if nothing did fit."""
    changed = [step for step in outcome.steps if step.changes]
    last = changed[-1].verification
    if not trained and last is not None and last.output_error is not None:
        return last.output_error
    batches = context.calibration.held_out
    if not batches.samples:
        if trained or any(step.contract is Contract.APPROXIMATE for step in changed):
            return None
        batches = context.calibration.fit
    return compare.output_error(context.original, result, batches, context.runtime)


def _over_budget(error: OutputError | None, context: Context, scores: MetricChange | None) -> str | None:
    bound = context.max_error
    if bound is not None and error is None:
        return "there are no held-out samples to hold --max-error on"
    if bound is not None and error is not None and (reason := error.over(bound, "--max-error")):
        return reason
    if scores is None or scores.max_drop is None:
        return None
    drop = scores.scores.before - scores.scores.after
    if not drop <= scores.max_drop:
        found = f"{scores.scores.before:.4g} to {scores.scores.after:.4g}"
        return f"{scores.name} drops by {drop:.3g}, from {found}, more than --max-drop {scores.max_drop:g}"
    return None


def is_changed(steps: Sequence[StepReport]) -> bool:
    """Whether all passes were committed and some has changed the model."""
    return all(step.committed for step in steps) and any(step.changes for step in steps)


def _timed(models: Sequence[Model], context: Context, sample: Feed) -> Latency:
    """Latency of the original and the result; one that says "slower" counts if it can be repeated.

    Two sessions of one model differ by up to a percent, and a busy machine can favor one for a while: both
    look like a difference in a single measurement.
    """
    for _ in range(_TIMED_ATTEMPTS):
        found = latency(
            models, context.runtime, sample, repeats=_TIMED_ROUNDS, seconds=_TIMED_SECONDS, seed=context.seed
        )
        if not _is_slower(found):
            break
    return found


def _is_slower(found: Latency) -> bool:
    return found.timings[1].ratio_low > _SAME_LATENCY
