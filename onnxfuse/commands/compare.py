"""`verify` and `diff`: two models side by side."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxfuse.analysis.cost import DECLARED_ONLY, Cost, count, measure
from onnxfuse.analysis.declarations import contradiction_warnings
from onnxfuse.analysis.structural_diff import structure
from onnxfuse.commands.judge import Allowance, Confidence, Scorer, check_limits, confidence_of
from onnxfuse.commands.loading import MADE_UP, ModelSource, PathOrText, load
from onnxfuse.commands.remembering import unseen
from onnxfuse.data.calibration import BatchStream, Calibration, Data
from onnxfuse.data.rows import few_rows
from onnxfuse.data.sufficiency import doubts_of
from onnxfuse.errors import InputError, OnnxfuseError
from onnxfuse.report.files import check_folder, write_verification
from onnxfuse.report.junit import write_junit
from onnxfuse.results import DiffResult, VerifyResult
from onnxfuse.runtime.latency import latency
from onnxfuse.runtime.memory import Budget
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import compare, output_error
from onnxfuse.verification.divergence import first_divergence
from onnxfuse.verification.promises import Promise

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.verification.records import Comparison


def verify(
    a: ModelSource,
    b: ModelSource,
    *,
    calib: Data = None,
    max_error: float | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    confidence: Confidence = None,
    max_latency: float | None = None,
    samples: int | None = None,
    batch_size: int = 64,
    memory: str | None = None,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    report: PathOrText | None = None,
    junit: PathOrText | None = None,
) -> VerifyResult:
    """The comparison of two models: a result that is false if a promise is broken.

    Samples that one of the models was fitted to, as its metadata says, are left out.

    Args:
        a: the reference, whose noise floor counts.
        b: the other.
        calib: samples for both; None makes some up, with a warning.
        max_error: the relative error of every output is at most this. Without it, and without `max_drop`,
            every difference must be within `verification.noise.MULTIPLE` noise floors of `a`.
        max_drop: the metric of `b` is at most this much below that of `a`, in its own unit.
        metric: as in `compress`.
        confidence: of the paired interval whose low end is held to `max_drop`, as in `compress`; "none" also
            holds the median of the latency, not the end of its interval, to `max_latency`.
        max_latency: the latency of `b` is at most this many times that of `a`.
        samples, batch_size: how many samples, and the most rows of a batch.
        memory: as in `compress`.
        provider, threads: of ONNX Runtime.
        seed: of made-up samples.
        report: folder for `report.json` and `report.txt`.
        junit: where to write the promises as test cases, in the XML of JUnit that CI systems read.

    Raises:
        InputError: a bad file, bad samples or limits; a report can't be written.
        NotApplicableError: ONNX Runtime can't load one of the models, or `a` fails on a sample.
    """
    if junit is not None:
        check_folder(Path(junit).absolute().parent)
    if report is not None:
        check_folder(Path(report))
    try:
        check_limits(max_error, max_drop, seed, metric, max_latency)
        wanted = _Wanted(max_error, Allowance(metric, max_drop, confidence_of(confidence)), max_latency)
        first, second = load(a), load(b)
        runtime = Runtime(provider, threads)
        calibration = _samples(calib, first, samples, batch_size, memory, seed)
        result = _verified(first, second, calibration, runtime, wanted, seed)
    except OnnxfuseError as error:
        if junit is not None:
            write_junit(Path(junit), error)
        raise
    if junit is not None:
        write_junit(Path(junit), result)
    if report is not None:
        write_verification(Path(report), result)
    return result


@dataclass(frozen=True)
class _Wanted:
    """What a model is held to beside another: the error, the drop and the latency that are allowed; None
    where one does not count."""

    max_error: float | None
    allowed: Allowance
    max_latency: float | None


def _verified(
    first: Model, second: Model, calibration: Calibration, runtime: Runtime, wanted: _Wanted, seed: int
) -> VerifyResult:
    batches, record, warnings = unseen(calibration, first, second)
    warnings += doubts_of(calibration, first.inputs, approximate=False)
    allowed = wanted.allowed
    scorer = Scorer.make(allowed, batches, calibration.labels if allowed.binding else None, first, runtime)
    labels = _labels(first, second)
    comparison = compare(first, second, batches, runtime, labels=labels)
    broken = comparison.problems[0] if comparison.problems else None
    damage = broken or next((f"output {o.problem}" for o in comparison.outputs if o.problem), None)
    promises = [Promise("same inputs and outputs", "different", broken)]
    change, timed, divergence = None, None, None
    if wanted.max_error is not None:
        reason = damage
        if damage is None:
            comparison, reason = _bounded(first, second, comparison, batches, runtime, wanted.max_error)
        promises.append(_promise(f"within {wanted.max_error:g}", reason))
    elif allowed.max_drop is None:
        promises.append(Promise("same", "different", broken or comparison.reason))
    if promises[-1].reason is not None and broken is None:
        divergence = first_divergence(first, second, next(iter(batches)), runtime, labels=labels)
    if scorer.metric is not None and damage is None:
        change = scorer.change(second, runtime, comparison.passed)
        warnings += [change.note] if change is not None and change.note is not None else []
    if allowed.max_drop is not None:
        reason = damage if change is None else change.reason
        promises.append(_promise(f"{scorer.name} down by at most {allowed.max_drop:g}", reason))
    if wanted.max_latency is not None:
        reason = broken
        if broken is None:
            timed = latency([first, second], runtime, few_rows(first, batches, 1, runtime), seed=seed)
            surely = allowed.confidence is not None
            reason = timed.over(wanted.max_latency, "--max-latency", surely=surely)
        promises.append(_promise(f"latency at most {wanted.max_latency:g}", reason))
    return VerifyResult(
        promises=tuple(promises),
        comparison=comparison,
        divergence=divergence,
        max_error=wanted.max_error,
        metric=change,
        latency=timed,
        samples=record,
        warnings=(*([MADE_UP] if calibration.synthetic else []), *warnings, *comparison.notes),
    )


def _promise(name: str, reason: str | None) -> Promise:
    return Promise(name, f"not {name}", reason)


def _bounded(
    first: Model,
    second: Model,
    comparison: Comparison,
    batches: BatchStream,
    runtime: Runtime,
    max_error: float,
) -> tuple[Comparison, str | None]:
    """The comparison with the errors that `compress` would report of these samples, and why they exceed what
    is allowed; None if they don't."""
    found = output_error(first, second, batches, runtime)
    outputs = tuple(
        replace(
            output,
            relative=found.outputs.get(output.name, output.relative),
            parts=found.parts.get(output.name, output.parts),
        )
        for output in comparison.outputs
    )
    return replace(comparison, outputs=outputs), found.over(max_error, "the allowed")


def _samples(
    calib: Data, model: Model, limit: int | None, batch_size: int, memory: str | None, seed: int
) -> Calibration:
    """The samples of a comparison: none is held out.

    Args:
        calib, batch_size, memory, seed: as in `verify`.
        model: whose inputs they must fit.
        limit: use about this many.
    """
    return Calibration.open(
        calib,
        model,
        limit=limit,
        batch_size=batch_size,
        budget=Budget.of(memory),
        held_out=0.0,
        seed=seed,
    )


def diff(
    a: ModelSource,
    b: ModelSource,
    *,
    calib: Data = None,
    samples: int | None = None,
    batch_size: int = 64,
    memory: str | None = None,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> DiffResult:
    """Two models side by side: structure, cost, outputs. Models that can't be run are compared in structure
    alone. Samples that one of the models was fitted to, as its metadata says, are left out.

    Args:
        a: the reference, whose noise floor counts.
        b: the other.
        calib: samples for both; None makes some up, with a warning.
        samples, batch_size: how many samples, and the most rows of a batch.
        memory: as in `compress`.
        provider, threads: of ONNX Runtime.
        seed: of made-up samples.

    Raises:
        InputError: a bad file or bad samples.
    """
    first, second = load(a), load(b)
    runtime = Runtime(provider, threads)
    warnings: list[str] = []
    outputs, feed, record = None, None, None
    try:
        calibration = _samples(calib, first, samples, batch_size, memory, seed)
        warnings += [MADE_UP] if calibration.synthetic else []
        batches, record, said = unseen(calibration, first, second)
        warnings += said
        feed = few_rows(first, batches, 1, runtime)
        outputs = compare(first, second, batches, runtime, labels=_labels(first, second))
        warnings += outputs.notes
    except OnnxfuseError as error:
        if calib is not None and isinstance(error, InputError):
            raise
        warnings.append(f"the outputs are not compared: {error}")
    costs = _cost(first, feed, runtime, warnings), _cost(second, feed, runtime, warnings)
    return DiffResult(structure(first, second), costs, outputs, record, tuple(dict.fromkeys(warnings)))


def _cost(model: Model, feed: Feed | None, runtime: Runtime, warnings: list[str]) -> Cost:
    """The costs of a model, at the sizes of `feed` if the model takes it; adds to the warnings what the file
    declares wrongly, or that its declarations had to be believed."""
    if feed is not None:
        with contextlib.suppress(OnnxfuseError):
            cost = measure(model, feed, runtime)
            warnings += contradiction_warnings(model, feed, runtime)
            return cost
    cost = count(model, model.shapes())
    if cost.macs is not None:
        warnings.append(DECLARED_ONLY)
    return cost


def _labels(a: Model, b: Model) -> tuple[str, str]:
    """The names of two models in messages."""
    if a.path and b.path and a.path != b.path:
        return f"'{a.path}'", f"'{b.path}'"
    return "the first model", "the second model"
