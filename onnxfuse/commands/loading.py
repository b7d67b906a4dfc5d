"""Files that commands are given: models, samples, places to write to."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from onnxfuse.data.calibration import Calibration, Samples
from onnxfuse.ir import saving
from onnxfuse.ir.model import LoadableModel, Model
from onnxfuse.runtime.versions import check_runs

ModelSource = Model | LoadableModel
PathOrText = str | PathLike[str]

MADE_UP = (
    "NO CALIBRATION DATA: everything is fitted to and measured on made-up samples, which say little about "
    "real data; give real ones with --calib"
)


def load(source: ModelSource) -> Model:
    """A model from a path, the bytes of a file or a ModelProto; a `Model` is passed through.

    Raises:
        InputError: the file is missing, damaged, no ONNX model, not valid or too new, or so is its external
            data.
    """
    if isinstance(source, Model):
        return source
    model = Model.load(source)
    check_runs(model)
    return model


def save(model: Model, path: PathOrText) -> None:
    """Write a model; the file appears whole or not at all.

    Raises:
        InputError: the target is the file that the model came from, or can't be written.
    """
    model.save(path)


def file_of(model: Model) -> Path | None:
    """The file that a model came from, None for one from memory."""
    return model.folder / model.path.name if model.folder and model.path else None


def check_output(output: PathOrText, model: Model) -> None:
    """Refuse, before a long run, a place where the result can't be written.

    Raises:
        InputError: the reason.
    """
    saving.check_target(Path(output), file_of(model))


def checkpoint_of(output: PathOrText) -> Path:
    """The file beside an output that keeps the state of its training."""
    return Path(f"{output}.checkpoint")


def samples_of(calibration: Calibration) -> Samples:
    """The record of some calibration samples."""
    return Samples(
        calibration.description,
        calibration.synthetic,
        calibration.fit.samples,
        calibration.held_out.samples,
        calibration.labels,
        calibration.budget.total,
        calibration.rows,
    )
