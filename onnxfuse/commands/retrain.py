"""`retrain`: a model trained further in PyTorch, its graph unchanged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from onnxfuse.commands.loading import ModelSource, PathOrText, check_output, checkpoint_of, load
from onnxfuse.commands.remembering import REFITTED, remember
from onnxfuse.commands.turns import retraining
from onnxfuse.data.calibration import Data
from onnxfuse.errors import VerificationError
from onnxfuse.ops.finite import check_finite
from onnxfuse.results import RetrainReport, RetrainResult
from onnxfuse.runtime.session import Runtime

if TYPE_CHECKING:
    from onnxfuse.progress import Progress
    from onnxfuse.pytorch.training.retraining import Retrained


def retrain(
    model: ModelSource,
    data: Data,
    *,
    teacher: ModelSource | None = None,
    loss: str | None = None,
    epochs: int = 10,
    lr: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float | None = None,
    batch_size: int = 64,
    freeze: Sequence[str] = (),
    match: Sequence[str] = (),
    held_out: float = 0.2,
    patience: int | None = None,
    metric: str | None = None,
    seed: int = 0,
    provider: str = "auto",
    device: str = "auto",
    output: PathOrText | None = None,
    checkpoint: PathOrText | None = None,
    progress: Progress | None = None,
) -> RetrainResult:
    """Train a model in PyTorch, from labels or from another model, and write the weights back to its graph.

    Under torchrun every process calls this alike; the first one alone writes.

    Args:
        model: is left as it is.
        data: samples, as `Calibration.open` takes them, with an array `labels` or without.
        teacher: a model of the same inputs and outputs to learn from: the original of a compressed one.
        loss: "ce", cross-entropy against class numbers; "mse"; "distill", to follow the teacher
            (`onnxfuse.pytorch.training.objective` defines them). None: distill with a teacher, else ce for
            integer labels and mse for floats.
        epochs: passes over the data.
        lr: the highest learning rate; None is 1e-4 for adamw, 1e-3 for sgd; random weights want ten times as
            much.
        optimizer: "adamw" or "sgd" (with Nesterov momentum 0.9).
        weight_decay: of matrices and kernels; None is 1e-2 for adamw, 1e-4 for sgd.
        batch_size: rows of a batch, of all processes together, where model and data leave that open.
        freeze: patterns (fnmatch) of initializers that stay as they are. A BatchNormalization whose scale is
            frozen keeps its statistics, too, and normalizes by them.
        match: inner tensors that are to follow the teacher's, "NAME" or "NAME=NAME IN THE TEACHER".
        held_out: share of the samples that no step sees: they choose the best epoch, and measure it.
        patience: stop once the held-out loss has not improved for so many epochs; None never.
        metric: "top1", "mse", "nll" or "file.py:function"; None takes top1 for class numbers, mse for
            other labels.
        seed: of split, order and dropout: equal seeds give equal bytes.
        provider: of ONNX Runtime, where the teacher runs and the result is judged.
        device: of torch: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1".
        output: where to write the result; None writes nothing.
        checkpoint: keeps the state after each epoch, to go on from after a kill; None is `output` with
            `.checkpoint` behind it. It is removed at the end.
        progress: hears of each step.

    Raises:
        InputError: a bad file, option, sample or label; a teacher that doesn't fit; the output can't be
            written; torch is not installed.
        NotApplicableError: an operator that can't be imported to PyTorch; ONNX Runtime can't run a model.
    """
    start = time.perf_counter()
    module = retraining()
    request = module.Request(
        settings=module.Settings(epochs, optimizer, lr, weight_decay, patience, seed),
        loss=loss,
        batch_size=batch_size,
        held_out=held_out,
        metric=metric,
        freeze=tuple(freeze),
        match=tuple(match),
        device=device,
    )
    loaded = load(model)
    original = None if teacher is None else load(teacher)
    for source in (loaded, *([original] if original is not None else [])):
        check_finite(source)
        if output is not None:
            check_output(output, source)
    place = Path(checkpoint) if checkpoint is not None else None
    if place is None and output is not None:
        place = checkpoint_of(output)
    runtime = Runtime(provider)
    training = request.open(data, loaded)
    found = module.retrain(loaded, training, runtime, teacher=original, checkpoint=place, progress=progress)
    if found.model is not None:
        remember(found.model, found.fitted, training.samples, {"command": "retrain", "seed": seed})
    written = _keep(found, output) if module.started()[0] == 0 else None
    exit_code = 0 if found.model is not None else VerificationError.exit_code
    report = RetrainReport(
        version=version("onnxfuse"),
        model=str(loaded.path) if loaded.path else None,
        output=None if output is None else str(output),
        written=written is not None,
        exit_code=exit_code,
        reason=found.reason,
        warnings=(*([REFITTED] if training.samples.refitted else []), *found.warnings),
        seed=seed,
        providers=tuple(runtime.providers),
        threads=runtime.threads,
        retraining=found.record,
        seconds=time.perf_counter() - start,
    )
    return RetrainResult(found.model or loaded, report, exit_code, found.reason, written, "retrain")


def _keep(found: Retrained, output: PathOrText | None) -> Path | None:
    """Write the model, if there is one, and remove the checkpoint, which is needed no more; the place written
    to."""
    written = None
    if found.model is not None and output is not None:
        found.model.save(output)
        written = Path(output)
    if found.checkpoint is not None:
        found.checkpoint.remove()
    return written
