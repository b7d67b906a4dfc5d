"""The verdict at the end of a run: the whole result against the whole original, on samples that no pass has
fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from onnxfuse.errors import InputError, NotApplicableError, VerificationError
from onnxfuse.numerics.significance import CONFIDENCE, paired_difference
from onnxfuse.pipeline.base import Contract
from onnxfuse.verification import compare
from onnxfuse.verification.label_checks import label_doubts
from onnxfuse.verification.metrics import (
    BY_ORIGINAL,
    SHARES,
    Metric,
    MetricChange,
    evaluate,
    load_metric,
)

if TYPE_CHECKING:
    from onnxfuse.data.calibration import BatchStream
    from onnxfuse.ir.model import Model
    from onnxfuse.pipeline.base import Context
    from onnxfuse.pipeline.records import Outcome, StepReport
    from onnxfuse.runtime.latency import Latency, Stopwatch
    from onnxfuse.runtime.session import Runtime, Session
    from onnxfuse.verification.records import OutputError

_DEFAULT_METRIC = "top1"
_RATIO = 10  # of latencies, which nobody means to allow


Confidence = float | str | None
"""Of the interval that must keep to `max_drop`: a number, "none" for the change itself, None for 0.95."""


def check_limits(
    max_error: float | None,
    max_drop: float | None,
    seed: int,
    metric: str | None = None,
    max_latency: float | None = None,
) -> None:
    """Check the numbers that a user allows.

    Args:
        max_error: relative output error, None without a limit.
        max_drop: drop of the metric, None without a limit.
        seed: of everything random.
        metric: that may drop, None for the default one.
        max_latency: ratio to the latency of the original, None without a limit.

    Raises:
        InputError: one is out of range, or of another unit than was probably meant.
    """
    if max_error is not None and not 0 < max_error < np.inf:
        raise InputError(f"--max-error must be a number above 0, not {max_error:g}")
    if max_error is not None and max_error > 1:
        raise InputError(
            f"--max-error {max_error:g} would allow anything: it is relative, and an output that is always "
            f"the mean has an error of 1; {_percent('--max-error', max_error)}"
        )
    if max_drop is not None and not 0 <= max_drop < np.inf:
        raise InputError(f"--max-drop must be a number of at least 0, not {max_drop:g}")
    if max_drop is not None and max_drop >= 1 and (metric or _DEFAULT_METRIC) in SHARES:
        raise InputError(
            f"--max-drop {max_drop:g} would allow anything: {metric or _DEFAULT_METRIC} is at most 1; "
            f"{_percent('--max-drop', max_drop)}"
        )
    if max_latency is not None and not 0 < max_latency < np.inf:
        raise InputError(f"--max-latency must be a number above 0, not {max_latency:g}")
    if max_latency is not None and max_latency >= _RATIO:
        raise InputError(
            f"--max-latency {max_latency:g} would allow anything: it is a ratio, and 1 is the latency of the "
            f"original; {_percent('--max-latency', max_latency)}"
        )
    if seed < 0:
        raise InputError(f"--seed must be at least 0, not {seed}")


def _percent(option: str, value: float) -> str:
    """What was probably meant by a share that is no share."""
    return f"for {value:g} % write {option} {value / 100:g}" if value < 100 else "5 % is written 0.05"


def confidence_of(asked: Confidence) -> float | None:
    """The confidence at which `max_drop` is held; None where the change itself is.

    Raises:
        InputError: it is neither a number from 0.5 to 1 nor "none".
    """
    if asked is None or asked == "none":
        return None if asked else CONFIDENCE
    try:
        value = float(asked)
    except ValueError:
        value = np.nan
    if 0.5 <= value < 1:
        return value
    meant = f"; for {value:g} % write --confidence {value / 100:g}" if 50 <= value < 100 else ""
    raise InputError(
        f"--confidence must be a number from 0.5 to 1, such as 0.95, or none, not {asked}{meant}"
    )


# --- the metric ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowance:
    """The drop that a run allows.

    Attributes:
        metric: of what; None takes top1 where there are labels that it can use.
        max_drop: how much; None without a limit.
        confidence: of the interval that must keep to it; None: the change itself must.
    """

    metric: str | None
    max_drop: float | None
    confidence: float | None

    @property
    def binding(self) -> bool:
        """Whether a metric, or a limit to its drop, was asked for."""
        return self.metric is not None or self.max_drop is not None


@dataclass(frozen=True)
class Scorer:
    """The metric of a run, if it has one, and the original's score of every sample that counts."""

    name: str
    metric: Metric | None
    before: np.ndarray
    allowed: Allowance
    batches: BatchStream
    original: Session | None = None
    note: str | None = None

    @classmethod
    def make(
        cls, allowed: Allowance, batches: BatchStream, labels: str | None, original: Model, runtime: Runtime
    ) -> Scorer:
        """The scorer of a run. It scores the original before any pass runs, so that a metric that fails does
        so at once.

        Args:
            allowed: what was asked for.
            batches: the samples that are scored, none of them fitted.
            labels: the name of the label array, None without.
            original: what the result is held against.
            runtime: where it runs.

        Raises:
            InputError: a metric that there isn't, that fails, or that has nothing to be measured on.
        """
        unscored = cls("", None, np.empty(0), allowed, batches)
        if allowed.metric is None and not labels:
            if allowed.max_drop is not None:
                raise InputError(
                    "--max-drop needs labels in the calibration data, or a metric that needs none: --metric "
                    "agreement (samples that keep the original's class), cosine or file.py:function"
                )
            return unscored
        if not batches.samples:
            if allowed.binding:
                raise InputError("a metric needs held-out samples: give --held-out a share above 0")
            return replace(unscored, note="the labels are not used: no samples are held out")
        name = allowed.metric or _DEFAULT_METRIC
        metric = load_metric(name)
        session = runtime.session(original)
        reference = session if name in BY_ORIGINAL else None
        try:
            before = evaluate(session, batches, metric, reference)
        except InputError as error:
            if allowed.binding:
                raise
            reason = (
                f"the labels are not used: {error}; array '{labels}' was taken for labels, leave "
                "it out if it holds something else"
            )
            return replace(unscored, note=reason)
        doubts = label_doubts(name, before, session, batches)
        if allowed.max_drop is not None and (chance := next((d for d in doubts if "CHANCE" in d), None)):
            raise InputError(f"--max-drop can't be held: {chance}")
        return cls(name, metric, before, allowed, batches, reference, "; ".join(doubts) or None)

    def change(self, result: Model, runtime: Runtime, exact: bool) -> MetricChange | None:
        """The metric of the original and of the result, None without a metric.

        Args:
            result: the other model.
            runtime: where it runs.
            exact: whether it was proved to compute the same: then the metric can't drop, whatever number of
                samples shows it, and the change itself is held to the limit.
        """
        if self.metric is None:
            return None
        after = evaluate(runtime.session(result), self.batches, self.metric, self.original)
        wanted = self.allowed.confidence
        scores = paired_difference(self.before, after, confidence=wanted or CONFIDENCE)
        held_by: Literal["interval", "change", "proof"] = (
            "proof" if exact else "interval" if wanted else "change"
        )
        return MetricChange(self.name, scores, self.allowed.max_drop, held_by)


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
        return self.latency is not None and self.latency.slower


def conclude(
    outcome: Outcome, result: Model, trained: bool, context: Context, scorer: Scorer, watch: Stopwatch
) -> Verdict:
    """The verdict on a finished run.

    Args:
        outcome: of the passes.
        result: what they made, trained or not.
        trained: whether it was trained.
        context: the original, the samples and the budget that the whole run is held to.
        scorer: of the metric.
        watch: times the result, half before the other checks and half after them.
    """
    failed = next((step for step in outcome.steps if not step.committed), None)
    if failed is not None:
        return Verdict(failed.exit_code, f"pass '{failed.name}': {failed.reason}")
    if not is_changed(outcome.steps):
        return Verdict(NotApplicableError.exit_code, _idle(outcome.steps))
    watch.measure(result, part=0.5)
    try:
        error = _whole_error(outcome, result, trained, context)
    except VerificationError as failure:
        return Verdict(VerificationError.exit_code, str(failure))
    exact = not trained and all(step.contract is Contract.EXACT for step in outcome.steps if step.changes)
    scores = scorer.change(result, context.runtime, exact)
    reason = _over_budget(error, context, scores)
    if reason is not None:
        return Verdict(VerificationError.exit_code, reason, error, scores)
    watch.measure(result, part=0.5)
    return Verdict(0, None, error, scores, watch.latency())


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
    return None if scores is None else scores.reason


def is_changed(steps: Sequence[StepReport]) -> bool:
    """Whether all passes were committed and some has changed the model."""
    return all(step.committed for step in steps) and any(step.changes for step in steps)
