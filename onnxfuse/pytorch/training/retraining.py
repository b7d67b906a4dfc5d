"""Retraining a model: import, train, write back, and judge what came of it in ONNX Runtime.

Everything that can be wrong with the data, the labels or the teacher is found before the first step. What is
returned was run in ONNX Runtime beside the module that was trained; its loss and metric are measured there,
on held-out samples, which chose the epoch and nothing else.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import fx

from onnxfuse.analysis.normalization import lacks_normalization
from onnxfuse.data.batch_axes import batch_axes, fixed_batch
from onnxfuse.data.calibration import BatchStream, Calibration, Samples
from onnxfuse.data.fitted import Fitted
from onnxfuse.errors import InputError, VerificationError
from onnxfuse.ir.model import Model
from onnxfuse.numerics.significance import PairedDifference
from onnxfuse.progress import Progress
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.bridge.writeback import check_module, copy_with_weights
from onnxfuse.pytorch.training.checkpoint import Checkpoint
from onnxfuse.pytorch.training.fingerprint import fingerprint
from onnxfuse.pytorch.training.freezing import frozen_norms, trained_weights
from onnxfuse.pytorch.training.judging import Judge
from onnxfuse.pytorch.training.keeping import projection
from onnxfuse.pytorch.training.objective import Objective, make_objective
from onnxfuse.pytorch.training.processes import choose_device, on_first, process_group, processes, started
from onnxfuse.pytorch.training.records import Retraining
from onnxfuse.pytorch.training.request import Request, Training
from onnxfuse.pytorch.training.sampling import InOrder, Pool, Shuffled
from onnxfuse.pytorch.training.training import Settings, Trained, mixed_precision, train
from onnxfuse.pytorch.training.warning_lines import collecting, is_of_kernel, is_of_model
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import MetricChange

__all__ = ["Request", "Retrained", "Settings", "retrain", "started"]

NO_NORMALIZATION = (
    "NO NORMALIZATION: a deep network of convolutions retrains badly without it, and exporters fold "
    "BatchNorm away; put it back first: onnxfuse compress MODEL --passes batchnorm --calib DATA"
)

ONE_AT_A_TIME = (
    "the model takes one sample at a time, and so does its training; a dynamic batch axis makes it faster"
)

_COMPARED = 2  # held-out batches that the result is run on beside the module


@dataclass(frozen=True)
class Retrained:
    """The outcome of a retraining: the model with its new weights, or None and the `reason`; the samples that
    it was fitted to, of all that were given. `checkpoint` is to be removed once the model is safe."""

    model: Model | None
    fitted: Fitted
    samples: Calibration
    record: Retraining
    reason: str | None
    warnings: tuple[str, ...]
    checkpoint: Checkpoint | None


def retrain(
    model: Model,
    training: Training,
    runtime: Runtime,
    *,
    teacher: Model | None = None,
    checkpoint: Path | None = None,
    unseen: BatchStream | None = None,
    progress: Progress | None = None,
) -> Retrained:
    """Retrain a model.

    Args:
        model: is left as it is.
        training: on what, and how.
        runtime: where the teacher runs, and the judging is done.
        teacher: what to learn from, if not from labels.
        checkpoint: the file that keeps the state; None keeps none.
        unseen: samples that a later judgement needs to be new to the model: what the data shares with them is
            left out of training.
        progress: hears of each step.

    Raises:
        InputError: bad data, labels, patterns or a teacher that doesn't fit.
        NotApplicableError: an operator that can't be imported, or a model that ONNX Runtime can't run.
    """
    device = choose_device(training.request.device)
    with process_group(device), _threads(runtime.threads):
        return _Retrainer(model, training, runtime, teacher, unseen, progress, device).run(checkpoint)


class _Retrainer:
    """One retraining, from opening the data to judging the result."""

    def __init__(
        self,
        model: Model,
        training: Training,
        runtime: Runtime,
        teacher: Model | None,
        unseen: BatchStream | None,
        progress: Progress | None,
        device: torch.device,
    ) -> None:
        self.start = time.perf_counter()
        request, calibration = training.request, training.samples
        self.model, self.request, self.runtime, self.calibration = model, request, runtime, calibration
        self.teacher, self.progress, self.device = teacher, progress, device
        self.warnings: list[str] = []
        self.weights = trained_weights(model, request.freeze)
        self.module = self._imported([])  # before what takes long: it may be refused
        new = _digests(model, unseen)
        self.pool = Pool(calibration.fit, model.inputs, without=new, progress=progress)
        self.held: Pool | None = None
        if calibration.held_out.samples:
            self.held = Pool(calibration.held_out, model.inputs, progress=progress)
        self._warn_of_shared()
        self.objective: Objective = make_objective(
            request.loss,
            model,
            [self.pool, *([self.held] if self.held is not None else [])],
            runtime,
            size=request.batch_size,
            name=training.labels,
            teacher=teacher,
            match=request.match,
            seed=request.settings.seed,
        )
        if lacks_normalization(model):
            self.warnings.append(NO_NORMALIZATION)
        if fixed_batch(model.inputs, batch_axes(model.inputs)) == 1:
            self.warnings.append(ONE_AT_A_TIME)
        self.judge = self._judge(calibration.labels is not None)
        if set(self.objective.tensors) - set(self.module.meta["outputs"]):
            self.module = self._imported(self.objective.tensors)

    def _warn_of_shared(self) -> None:
        shared = self.pool.shared
        if shared:
            left_out = "they were left out of training"
            fate = left_out if self.pool.leaves_out else "too many to be left out, so their error flatters"
            self.warnings.append(f"{shared} training samples are held out by --calib: {fate}")

    def _judge(self, labeled: bool) -> Judge:
        """The judge of results. It has measured the start: a metric that fails does so now."""
        request = self.request
        names = [info.name for info in self.model.outputs]
        found = Judge(self.runtime, self.objective, self.held, request.batch_size, names)
        spec = request.metric
        if spec is None and labeled and self.held is not None:
            _, labels = next(self.held.labels())
            spec = "mse" if labels.dtype.kind == "f" else "top1"
        if spec is None:
            found.start(self.model)
            return found
        scored = found.with_metric(spec)
        try:
            scored.start(self.model)
        except InputError as error:
            if request.metric is not None:
                raise
            self.warnings.append(f"the labels are not used as a metric: {error}")
            found.start(self.model)
            return found
        return scored

    def _imported(self, inner: Sequence[str]) -> fx.GraphModule:
        """The model as a module that returns its outputs and some inner tensors."""
        outputs = dict.fromkeys([*(info.name for info in self.model.outputs), *inner])
        with collecting(self.warnings, is_of_model):
            return to_torch(
                self.model,
                trainable=lambda weight: (weight.scope, weight.name) in self.weights,
                outputs=list(outputs),
                shared_gradients=True,
            )

    def run(self, path: Path | None) -> Retrained:
        """Train, and judge the result."""
        request = self.request
        rank, world = processes()
        batches = Shuffled(self.pool, request.batch_size, request.settings.seed, rank, world)
        precision = mixed_precision(self.device)
        checkpoint, state = None, None
        if path is not None:
            checkpoint = Checkpoint(path, self._fingerprint(world, precision))
            state, note = on_first(checkpoint.load, self.device)
            self.warnings += [note] if note else []
        with collecting(self.warnings, is_of_kernel):
            trained = train(
                self.module,
                batches,
                self.objective,
                request.settings,
                held_out=InOrder(self.held, request.batch_size) if self.held is not None else None,
                metric=self.judge.of_outputs,
                frozen=frozen_norms(self.module, self.model, request.freeze),
                after_step=projection(self.module, self.model),
                device=self.device,
                precision=precision,
                resume=state,
                keep=checkpoint.save if checkpoint is not None else None,
                progress=self.progress,
            )
        reason = _not_better(trained)
        if trained.diverged and reason is None:
            self.warnings.append(
                f"{trained.stopped}: the weights of epoch {trained.best} are kept; a smaller --lr may help"
            )
        result, loss, metric = None, None, None
        if reason is None:
            try:
                loss, metric = on_first(self._verified, self.device)
                result = copy_with_weights(self.module, self.model)
            except VerificationError as failure:
                reason = str(failure)
        if metric is not None and metric.scores.high < 0:
            before, after = metric.scores.before, metric.scores.after
            self.warnings.append(f"metric {metric.name} FELL, from {before:.4g} to {after:.4g}")
        if self.held is None:
            self.warnings.append("no samples are held out: the result was not measured")
        record = self._record(trained, precision, world, loss, metric)
        feeds = (batch.feed for batch in self.pool.in_order(request.batch_size))
        fitted = Fitted.of(feeds, self.model.inputs)
        warnings = tuple(dict.fromkeys(self.warnings))
        return Retrained(result, fitted, self.calibration, record, reason, warnings, checkpoint)

    def _verified(self) -> tuple[PairedDifference | None, MetricChange | None]:
        """The result's loss and metric beside the start's; ONNX Runtime computes what the module does."""
        result = copy_with_weights(self.module, self.model)
        pool = self.held or self.pool
        batches = list(islice(pool.in_order(self.request.batch_size), _COMPARED))
        check_module(self.module, result, batches, self.runtime)
        return self.judge.change(result)

    def _fingerprint(self, world: int, precision: torch.dtype | None) -> str:
        about, tensors = self.objective.about, self.objective.tensors
        decided = (self.request, about, tensors, world, self.device.type, precision)
        return fingerprint(self.model, self.module, (self.pool, self.held), self.teacher, decided)

    def _record(
        self,
        trained: Trained,
        precision: torch.dtype | None,
        world: int,
        loss: PairedDifference | None,
        metric: MetricChange | None,
    ) -> Retraining:
        settings, calibration = self.request.settings, self.calibration
        teacher = None if self.teacher is None else str(self.teacher.path or "in memory")
        return Retraining(
            samples=Samples(
                calibration.description,
                False,
                self.pool.samples,
                calibration.held_out.samples,
                calibration.labels,
                calibration.budget.total,
                calibration.rows,
            ),
            teacher=teacher,
            objective=self.objective.about,
            trained=sum(p.numel() for p in self.module.parameters() if p.requires_grad),
            optimizer=settings.optimizer,
            lr=settings.rate,
            weight_decay=settings.decay,
            batch_size=self.request.batch_size,
            epochs=settings.epochs,
            device=str(self.device),
            precision=str(precision or torch.float32).removeprefix("torch."),
            processes=world,
            scored=self.judge.scored,
            history=trained.history,
            best=trained.best,
            resumed=trained.resumed,
            stopped=trained.stopped,
            loss=loss,
            metric=metric,
            seconds=time.perf_counter() - self.start,
        )


def _not_better(trained: Trained) -> str | None:
    """The reason why nothing is worth writing, None if something is."""
    if trained.best > 0:
        return None
    said = f"training never got better than the start{_losses(trained)}"
    if trained.diverged:
        return f"{said}; {trained.stopped}, a smaller --lr may help"
    start, *epochs = trained.history
    loss = epochs[0].loss if epochs else None
    if loss is None or start.held_out is None or loss <= start.held_out:
        return said
    return f"{said}; epoch 1 raised the training loss to {loss:.4g}: a smaller --lr may help"


def _losses(trained: Trained) -> str:
    before = trained.history[0].held_out
    after = [(epoch.held_out, epoch.number) for epoch in trained.history[1:] if epoch.held_out is not None]
    finite = [(loss, number) for loss, number in after if math.isfinite(loss)]
    if not finite:
        return ""
    loss, number = min(finite)
    return f": held-out loss {before:.4g} before, {loss:.4g} after epoch {number} at best"


# --- details ------------------------------------------------------------------------------------------------


def _digests(model: Model, batches: BatchStream | None) -> set[bytes]:
    return set() if batches is None else set(batches.digests(model.inputs))


@contextlib.contextmanager
def _threads(most: int) -> Iterator[None]:
    """No more of torch's threads than this process has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)
