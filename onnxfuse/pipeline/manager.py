"""Passes, what they promise, and the manager that holds them to it.

A pass rewrites a copy of a model and declares, by its contract, what the rewrite preserves:

- `EXACT`: the function, up to float noise. Checked: outputs before = outputs after.
- `MASKED`: the function of the model before with some channels multiplied by zero. The pass hands that masked
  model over as its `oracle`; checked: outputs of the oracle = outputs after. A pass that then fits weights
  hands over the `cut` model that it had before, too, and both contracts are checked.
- `APPROXIMATE`: nothing exactly, but the pass knows by how much it is off: every rewritten tensor comes with
  a `Prediction` of its error. Checked: predicted = measured, on the same samples and positions.

The manager is transactional. A pass works on a copy; the copy must be a valid graph, must load in ONNX
Runtime and must keep its contract there; then it is committed, otherwise rolled back with the reason in its
`StepReport`. Nothing is written to disk by the manager itself, so an interrupted run leaves nothing behind.
Progress, dumps and the journal live in instruments (`onnxfuse.pipeline.instruments`) around a pass, not
inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from onnxfuse.analysis.cost import Cost, measure
from onnxfuse.data.rows import few_rows
from onnxfuse.errors import OnnxfuseError, VerificationError
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.records import Outcome, StepReport, Verification
from onnxfuse.verification import compare as comparing
from onnxfuse.verification.compare import compare
from onnxfuse.verification.divergence import first_divergence
from onnxfuse.verification.interface import structure_problem
from onnxfuse.verification.predictions import check_predictions
from onnxfuse.verification.records import OutputError

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.pipeline.instruments import Instrument


VERIFIED_SAMPLES = 32
"""Samples, spread over the fitted ones, and as many of the held-out ones, on which an EXACT or MASKED pass is
compared. A difference is in root mean squares over all elements of the outputs: more samples hardly change
it, and what it can't see on so many it doesn't see on all."""

UNSEEN = (
    "inner tensors changed and the outputs do not at all: on these samples they do not depend on what was "
    "rewritten, so nothing is proved; give samples that the model was made for"
)
FIXED = (
    "the outputs are the same for all held-out samples, so what the pass changed can't be told from them; "
    "give samples that differ, as the model was made for"
)
UNSEEN_ERROR = 1e-6
"""Relative squared error of a tensor above which some output must change."""


class Between(Protocol):
    """A step between passes, retraining for instance: from the steps so far, the model after them and the
    context, it gives the model and the context to go on with. The graph stays the same."""

    def __call__(
        self, steps: tuple[StepReport, ...], model: Model, context: Context
    ) -> tuple[Model, Context]: ...


class PassManager:
    """Runs passes one after the other, each as a transaction (module docstring)."""

    def __init__(self, passes: Sequence[Pass], instruments: Sequence[Instrument] = ()) -> None:
        self.passes = list(passes)
        self.instruments = list(instruments)

    def run(self, model: Model, context: Context, between: Between | None = None) -> Outcome:
        """The outcome of all passes on `model`, which stays as it is.

        A pass that refuses with an OnnxfuseError or breaks its contract is rolled back and the next one runs;
        any other exception is a bug and propagates, and so does KeyboardInterrupt.

        Args:
            model: for the first pass.
            context: of all passes.
            between: is asked after every pass what the next one gets.
        """
        steps: list[StepReport] = []
        try:
            for instrument in self.instruments:
                instrument.started(self.passes, model)
            sample = few_rows(model, context.calibration.fit, 1, context.runtime)
            cost = measure(model, sample, context.runtime)
            for index, pass_ in enumerate(self.passes, start=1):
                for instrument in self.instruments:
                    instrument.before(index, pass_, model)
                model, step = _step(pass_, model, context, sample, cost)
                cost = step.after
                steps.append(step)
                for instrument in self.instruments:
                    instrument.after(index, step, model)
                if between is not None:
                    model, context = between(tuple(steps), model, context)
        finally:
            for instrument in self.instruments:
                instrument.finished()
        return Outcome(model, tuple(steps))


def _step(
    pass_: Pass, model: Model, context: Context, sample: Feed, before: Cost
) -> tuple[Model, StepReport]:
    """One transaction: the model to go on with, and the report."""
    start = time.perf_counter()
    result: PassResult | None = None
    error: OnnxfuseError | None = None
    try:
        result = pass_.run(model.copy(), context)
    except OnnxfuseError as refusal:
        error = refusal
    middle = time.perf_counter()
    checked = None
    if result is not None and result.changes:
        checked = verify_pass(pass_.contract, model, result, context)
    end = time.perf_counter()
    committed = error is None and (checked is None or checked.passed)
    reason = str(error) if error is not None else checked.reason if checked is not None else None
    changed = result is not None and committed and checked is not None
    after = result.model if changed and result is not None else model
    found = result if result is not None else PassResult(model)
    cost = measure(after, sample, context.runtime) if changed else before
    return after, StepReport(
        name=pass_.name,
        contract=pass_.contract,
        options=pass_.options.model_dump(mode="json"),
        committed=committed,
        reason=reason,
        exit_code=0 if committed else error.exit_code if error is not None else VerificationError.exit_code,
        seconds=middle - start,
        verify_seconds=end - middle,
        changes=tuple(found.changes),
        skipped=tuple(found.skipped),
        predictions=tuple(found.predictions),
        notes=(*found.notes, *(() if pass_.grows else _grown(before, cost))),
        verification=checked,
        before=before,
        after=cost,
        reached=found.reached if committed else None,
    )


def _grown(before: Cost, after: Cost) -> Iterator[str]:
    """A warning where a step has made the model larger."""
    counts = (
        ("parameters", before.parameters, after.parameters),
        ("bytes of weights", before.bytes, after.bytes),
    )
    grown = [f"{one:,} {what} became {two:,}" for what, one, two in counts if two > one]
    if grown:
        yield f"warning: THE MODEL GREW: {' and '.join(grown)}"


def verify_pass(contract: Contract, before: Model, result: PassResult, context: Context) -> Verification:
    """The verdict on a pass's result by its contract.

    Args:
        contract: of the pass.
        before: the model that it was given.
        result: of the pass.
        context: of the pass.
    """
    if problem := structure_problem(before, result.model, context.runtime):
        return Verification(False, problem)
    try:
        return _CHECKS[contract](before, result, context)
    except OnnxfuseError as error:
        return Verification(False, str(error))


def _check_exact(before: Model, result: PassResult, context: Context) -> Verification:
    return _same_function(before, result.model, context)


def _check_masked(before: Model, result: PassResult, context: Context) -> Verification:
    if result.oracle is None:
        return Verification(False, "the pass gave no masked model to compare its result with")
    return _same_function(result.oracle, result.cut or result.model, context)


def _same_function(reference: Model, after: Model, context: Context) -> Verification:
    calibration = context.calibration
    batches = calibration.fit.some(VERIFIED_SAMPLES).joined(calibration.held_out.some(VERIFIED_SAMPLES))
    found = compare(reference, after, batches, context.runtime)
    if found.passed:
        return Verification(True, comparison=found, notes=found.notes)
    divergence = first_divergence(reference, after, next(iter(batches)), context.runtime)
    reason = f"{found.reason}; {divergence}" if divergence else found.reason
    return Verification(False, reason, found, divergence)


def _check_approximate(before: Model, result: PassResult, context: Context) -> Verification:
    fitted = result.cut is None or result.model is not result.cut
    if fitted and not result.predictions:
        return Verification(False, "the pass changed the model and predicted no error")
    masked = None if result.oracle is None else _check_masked(before, result, context)
    if masked is not None and not masked.passed:
        return masked
    comparison, notes = (None, ()) if masked is None else (masked.comparison, masked.notes)
    checks = tuple(
        check_predictions(
            context.original,
            result.model,
            result.predictions,
            context.calibration,
            context.runtime,
            context.seed,
        )
    )
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        return Verification(False, failed.reason, comparison, predictions=checks, notes=notes)
    held_out = context.calibration.held_out
    if not held_out.samples:
        budget = "there are no held-out samples to measure the output error on"
        passed = context.max_error is None
        reason = None if passed else budget
        return Verification(passed, reason, comparison, predictions=checks, notes=(*notes, budget))
    error = comparing.output_error(context.original, result.model, held_out, context.runtime)
    reason = UNSEEN if _is_unseen(result, error) else FIXED if _is_fixed(result, error) else None
    if context.max_error is not None:
        reason = error.over(context.max_error, "the allowed", " on held-out samples") or reason
    return Verification(
        reason is None, reason, comparison, predictions=checks, output_error=error, notes=notes
    )


def _is_unseen(result: PassResult, error: OutputError) -> bool:
    """Whether tensors changed and floating-point outputs did not, not by a last place: nothing was tested.

    Outputs of other types, such as classes, stay the same rightly.
    """
    if error.worst > 0 or any(info.dtype is None or info.dtype.kind != "f" for info in result.model.outputs):
        return False
    return _moved(result)


def _moved(result: PassResult) -> bool:
    """Whether some tensor changed by more than float noise."""
    return any(claim.error > UNSEEN_ERROR * claim.variance for claim in result.predictions)


def _is_fixed(result: PassResult, error: OutputError) -> bool:
    """Whether tensors changed, and every output is floating-point and does not vary from sample to sample."""
    return len(error.fixed) == len(result.model.outputs) and _moved(result)


_CHECKS: Mapping[Contract, Callable[[Model, PassResult, Context], Verification]] = {
    Contract.EXACT: _check_exact,
    Contract.MASKED: _check_masked,
    Contract.APPROXIMATE: _check_approximate,
}
