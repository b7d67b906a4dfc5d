"""What was fitted, and what is new: noted in the output of a run, and heeded when models are compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from onnxfuse.data.calibration import BatchStream, Calibration, Samples
from onnxfuse.data.fitted import Fitted, data_digest
from onnxfuse.pipeline.base import Contract

if TYPE_CHECKING:
    from onnxfuse.findings import Json
    from onnxfuse.ir.model import Model
    from onnxfuse.ir.shapes import TensorInfo
    from onnxfuse.pipeline.records import StepReport

REFITTED = (
    "ALL SAMPLES WERE FITTED in an earlier run, those held out now as well: what is measured on them "
    "flatters the "
    "result; give others"
)
ALL_FITTED = (
    "ALL SAMPLES WERE FITTED by the run that made one of these models: what is measured on them flatters "
    "it; give "
    "others"
)
_LOST_HERE = (
    "THESE SAMPLES WERE FITTED, and the model's record of which can't be read any more: what is measured on "
    "them "
    "flatters it; give others"
)
_LOST = (
    "one of these models was fitted to samples, and its record of them can't be read any more: if they are "
    "among "
    "these, what is measured flatters it"
)


def remember(model: Model, fitted: Fitted, calibration: Calibration, run: dict[str, Json]) -> None:
    """Note in a model's metadata what a run has fitted, beside what earlier runs have.

    Args:
        model: the output of the run.
        fitted: the samples.
        calibration: all samples of the run.
        run: what else is worth knowing: the command, the seed.
    """
    data = data_digest(chain(calibration.fit.feeds(), calibration.held_out.feeds()), model.inputs)
    counts: dict[str, Json] = {"fitted": calibration.fit.samples, "held_out": calibration.held_out.samples}
    Fitted.read(model).joined(fitted.of_run({**run, **counts, "data": data})).note(model)


def was_fitted(steps: Iterable[StepReport]) -> bool:
    """Whether some pass has learned from the samples: those that change nothing of the function have not."""
    return any(step.changes and step.contract is not Contract.EXACT for step in steps)


def unseen(calibration: Calibration, first: Model, second: Model) -> tuple[BatchStream, Samples, list[str]]:
    """The samples that neither of two models was fitted to, the record of them, and warnings.

    Args:
        calibration: all samples, none held out.
        first, second: the models.
    """
    every, found = calibration.fit, Fitted.read(first, second)
    stream, warnings = every, []
    if found.lost:
        lost_here = data_digest(every.feeds(), first.inputs) in [run.get("data") for run in found.runs]
        warnings.append(_LOST_HERE if lost_here else _LOST)
    if found:
        stream, refused = _fresh(every, found, first.inputs)
        warnings += refused
    left_out = every.samples - stream.samples
    description = f"{every.name}: {stream.samples} samples"
    if left_out:
        description += f"; {left_out} others are left out, as fitted by the run that made one of the models"
    record = Samples(
        description,
        calibration.synthetic,
        left_out,
        stream.samples,
        calibration.labels,
        calibration.budget.total,
        calibration.rows,
    )
    return stream, record, warnings


def _fresh(every: BatchStream, found: Fitted, inputs: Sequence[TensorInfo]) -> tuple[BatchStream, list[str]]:
    fresh = every.fresh(found, inputs)
    if fresh.all():
        return every, []
    rest = every.only(fresh)
    return (every, [ALL_FITTED]) if rest is None else (rest, [])
