"""`verify` and `diff`: two models side by side."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from onnxfuse.analysis.cost import DECLARED_ONLY, Cost, count, measure
from onnxfuse.analysis.declarations import contradiction_warnings
from onnxfuse.analysis.structural_diff import structure
from onnxfuse.commands.judge import check_limits
from onnxfuse.commands.loading import MADE_UP, ModelSource, load, samples_of
from onnxfuse.data.calibration import Calibration, Data
from onnxfuse.data.rows import few_rows
from onnxfuse.errors import InputError, OnnxfuseError
from onnxfuse.results import DiffResult, VerifyResult
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import compare
from onnxfuse.verification.divergence import first_divergence
from onnxfuse.verification.records import OutputError

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.verification.records import Comparison


def verify(
    a: ModelSource,
    b: ModelSource,
    *,
    calib: Data = None,
    max_error: float | None = None,
    samples: int | None = None,
    batch_size: int = 64,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> VerifyResult:
    """The comparison of two models: a result that is false if they don't compute the same.

    Args:
        a: the reference, whose noise floor counts.
        b: the other.
        calib: samples for both; None makes some up, with a warning.
        max_error: pass if the relative error of every output is at most this; None: if every difference is
            within `verification.noise.MULTIPLE` noise floors of `a`.
        samples, batch_size: how many samples, and rows in a batch.
        provider, threads: of ONNX Runtime.
        seed: of made-up samples.

    Raises:
        InputError: a bad file or bad samples.
        NotApplicableError: ONNX Runtime can't load one of the models, or `a` fails on a sample.
    """
    check_limits(max_error, None, seed)
    first, second = load(a), load(b)
    runtime = Runtime(provider, threads)
    calibration = Calibration.open(
        calib, first, limit=samples, batch_size=batch_size, held_out=0.0, seed=seed
    )
    comparison = compare(first, second, calibration.fit, runtime, labels=_labels(first, second))
    reason = comparison.reason if max_error is None else _error_reason(comparison, max_error)
    divergence = None
    if reason is not None and not comparison.problems:
        batch = next(iter(calibration.fit))
        divergence = first_divergence(first, second, batch, runtime, labels=_labels(first, second))
    warnings = (*([MADE_UP] if calibration.synthetic else []), *comparison.notes)
    return VerifyResult(
        reason is None, reason, comparison, divergence, max_error, samples_of(calibration), warnings
    )


def diff(
    a: ModelSource,
    b: ModelSource,
    *,
    calib: Data = None,
    samples: int | None = None,
    batch_size: int = 64,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> DiffResult:
    """Two models side by side: structure, cost, outputs. Models that can't be run are compared in structure
    alone.

    Args:
        a: the reference, whose noise floor counts.
        b: the other.
        calib: samples for both; None makes some up, with a warning.
        samples, batch_size: how many samples, and rows in a batch.
        provider, threads: of ONNX Runtime.
        seed: of made-up samples.

    Raises:
        InputError: a bad file or bad samples.
    """
    first, second = load(a), load(b)
    runtime = Runtime(provider, threads)
    warnings: list[str] = []
    outputs, feed = None, None
    try:
        calibration = Calibration.open(
            calib, first, limit=samples, batch_size=batch_size, held_out=0.0, seed=seed
        )
        warnings += [MADE_UP] if calibration.synthetic else []
        feed = few_rows(first, calibration.fit, 1)
        outputs = compare(first, second, calibration.fit, runtime, labels=_labels(first, second))
        warnings += outputs.notes
    except OnnxfuseError as error:
        if calib is not None and isinstance(error, InputError):
            raise
        warnings.append(f"the outputs are not compared: {error}")
    costs = _cost(first, feed, runtime, warnings), _cost(second, feed, runtime, warnings)
    return DiffResult(structure(first, second), costs, outputs, tuple(dict.fromkeys(warnings)))


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


def _error_reason(comparison: Comparison, max_error: float) -> str | None:
    """The reason why a comparison exceeds the error that the user allows; None if it does not."""
    if comparison.problems:
        return comparison.problems[0]
    for output in comparison.outputs:
        if output.problem:
            return f"output {output.problem}"
    errors = {output.name: output.relative for output in comparison.outputs}
    return OutputError(errors, comparison.samples).over(max_error, "")
