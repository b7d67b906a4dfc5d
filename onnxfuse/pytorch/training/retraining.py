"""Retraining a model: import, train, write back, and judge what came of it in ONNX Runtime.

Everything that can be wrong with the data, the labels or the teacher is found before the first step. What is
returned was run in ONNX Runtime beside the module that was trained; its loss and metric are measured there,
on held-out samples, which chose the epoch and nothing else.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from onnxfuse.analysis.normalization import lacks_normalization
from onnxfuse.data.batch_axes import batch_axes, fixed_batch
from onnxfuse.data.calibration import Batch, BatchStream, Calibration, Data, Samples
from onnxfuse.errors import InputError, ModelWarning, NotApplicableError, VerificationError, unknown_name
from onnxfuse.ir.marks import KEPT_KEY
from onnxfuse.ir.model import Model
from onnxfuse.ir.protos import light_graph
from onnxfuse.numerics.significance import PairedDifference, paired_difference
from onnxfuse.progress import Progress
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.bridge.rules.normalization import BatchNorm
from onnxfuse.pytorch.bridge.weights import Weight, is_trainable, stored, to_tensor
from onnxfuse.pytorch.bridge.writeback import check, write_weights
from onnxfuse.pytorch.training.checkpoint import Checkpoint
from onnxfuse.pytorch.training.keeping import projection
from onnxfuse.pytorch.training.objective import KINDS, Objective, make_objective
from onnxfuse.pytorch.training.processes import choose_device, joined, on_first, processes, started
from onnxfuse.pytorch.training.records import Retraining
from onnxfuse.pytorch.training.sampling import Pool, Shuffled, sample_digests
from onnxfuse.pytorch.training.training import OPTIMIZERS, Settings, Trained, mixed_precision, train
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import Metric, MetricChange, load_metric

__all__ = ["Request", "Retrained", "Settings", "retrain", "started"]

NO_NORMALIZATION = (
    "NO NORMALIZATION: a deep network of convolutions retrains badly without it, and exporters fold "
    "BatchNorm away; put it back first: onnxfuse compress MODEL --passes batchnorm --calib DATA"
)

ONE_AT_A_TIME = (
    "the model takes one sample at a time, and so does its training; a dynamic batch axis makes it faster"
)

_MOST = 1e9  # what nobody means; torch fails on numbers beyond float32
_COMPARED = 2  # held-out batches that the result is run on beside the module
_NARROW = ("float16", "bfloat16")


@dataclass(frozen=True)
class Request:
    """How to retrain; `onnxfuse.retrain` says what each means.

    Raises:
        InputError: a number out of range, or a name that there isn't.
    """

    settings: Settings = field(default_factory=Settings)
    loss: str | None = None
    batch_size: int = 64
    held_out: float = 0.2
    metric: str | None = None
    freeze: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        given = self.settings
        _check("--epochs must be at least 1", given.epochs, given.epochs >= 1)
        rate, decay = given.lr, given.weight_decay
        _check(f"--lr must be above 0 and at most {_MOST:g}", rate, rate is None or 0 < rate <= _MOST)
        _check(f"--weight-decay must be between 0 and {_MOST:g}", decay, decay is None or 0 <= decay <= _MOST)
        _check("--patience must be at least 1", given.patience, given.patience is None or given.patience >= 1)
        _check("--seed must be at least 0", given.seed, given.seed >= 0)
        _check("--batch-size must be at least 1", self.batch_size, self.batch_size >= 1)
        if given.optimizer not in OPTIMIZERS:
            raise InputError(unknown_name("optimizer", given.optimizer, list(OPTIMIZERS)))
        if self.loss is not None and self.loss not in KINDS:
            raise InputError(unknown_name("loss", self.loss, KINDS))
        if not self.held_out and (given.patience is not None or self.metric is not None):
            what = "--patience" if given.patience is not None else "a metric"
            raise InputError(f"{what} needs held-out samples: give --held-out a share above 0")

    def open(self, data: Data, model: Model) -> Training:
        """These settings with samples for a model of these inputs.

        Raises:
            InputError: bad samples, or none.
        """
        if data is None:
            raise InputError("retraining needs samples: give --data")
        calibration = Calibration.open(
            data, model, batch_size=self.batch_size, held_out=self.held_out, seed=self.settings.seed
        )
        whole = f"'{data}'" if isinstance(data, (str, Path)) else "the samples"
        return Training(self, calibration, f"{whole} array '{calibration.labels}'")


@dataclass(frozen=True)
class Training:
    """What to train on, and how; `labels` is what messages call the array of labels."""

    request: Request
    samples: Calibration
    labels: str


def _check(rule: str, value: float | None, holds: bool) -> None:
    if not holds:
        raise InputError(f"{rule}, not {value:g}")


@dataclass(frozen=True)
class Retrained:
    """What came of it: the model with its new weights, or None and the `reason`. `checkpoint` is to be
    removed once the model is safe."""

    model: Model | None
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
    with joined(device), _threads(runtime.threads):
        return _Retraining(model, training, runtime, teacher, unseen, progress, device).run(checkpoint)


class _Retraining:
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
        self.weights = _trained_weights(model, request.freeze)
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

    def _judge(self, labelled: bool) -> _Judge:
        """What results are measured by. It has measured the start: a metric that fails does so now."""
        request = self.request
        names = [info.name for info in self.model.outputs]
        found = _Judge(self.runtime, self.objective, self.held, request.batch_size, names)
        spec = request.metric
        if spec is None and labelled and self.held is not None:
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
        with _collecting(self.warnings, _is_of_model):
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
        with _collecting(self.warnings, _is_of_kernel):
            trained = train(
                self.module,
                batches,
                self.objective,
                request.settings,
                held_out=_Again(self.held, request.batch_size) if self.held is not None else None,
                metric=self.judge.of_outputs,
                frozen=self._frozen_norms(),
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
                result = write_weights(self.module, self.model)
            except VerificationError as failure:
                reason = str(failure)
        if metric is not None and metric.scores.high < 0:
            before, after = metric.scores.before, metric.scores.after
            self.warnings.append(f"metric {metric.name} FELL, from {before:.4g} to {after:.4g}")
        if self.held is None:
            self.warnings.append("no samples are held out: the result was not measured")
        record = self._record(trained, precision, world, loss, metric)
        return Retrained(result, record, reason, tuple(dict.fromkeys(self.warnings)), checkpoint)

    def _frozen_norms(self) -> list[nn.Module]:
        """BatchNorms whose scale is frozen: they normalise by their statistics, which stay, as in eval
        mode."""
        if not self.request.freeze:
            return []
        frozen = {weight.key for weight in _frozen(self.model, self.request.freeze)}
        found: list[nn.Module] = []
        for node in self.module.graph.nodes:
            if node.op != "call_module":
                continue
            norm = self.module.get_submodule(str(node.target))
            if isinstance(norm, BatchNorm) and _attribute(node.args[1]) in frozen:
                found.append(norm)
        return found

    def _verified(self) -> tuple[PairedDifference | None, MetricChange | None]:
        """The result's loss and metric beside the start's; ONNX Runtime computes what the module does."""
        result = write_weights(self.module, self.model)
        pool = self.held or self.pool
        check(self.module, result, islice(pool.in_order(self.request.batch_size), _COMPARED), self.runtime)
        return self.judge.change(result, self.request.settings.seed)

    def _fingerprint(self, world: int, precision: torch.dtype | None) -> str:
        """Of everything that decides what the training does."""
        digest = hashlib.sha256()
        parts = (
            self.request,
            self.objective.about,
            self.objective.tensors,
            world,
            self.device.type,
            precision,
        )
        digest.update(repr((*parts, torch.__version__, self.module.code)).encode())
        digest.update(repr([node.metadata.get(KEPT_KEY) for node in self.model.nodes]).encode())
        for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for pool in (self.pool, self.held):
            if pool is not None:
                digest.update(f"{pool.digest} {pool.items}".encode())
        if self.teacher is not None:
            _digest_model(digest, self.teacher)
        return digest.hexdigest()

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
    """Why there is nothing worth writing, None if there is."""
    if trained.best > 0:
        return None
    said = f"training never got better than the start{_losses(trained)}"
    return f"{said}; {trained.stopped}, a smaller --lr may help" if trained.diverged else said


def _losses(trained: Trained) -> str:
    before = trained.history[0].held_out
    after = [(epoch.held_out, epoch.number) for epoch in trained.history[1:] if epoch.held_out is not None]
    finite = [(loss, number) for loss, number in after if math.isfinite(loss)]
    if not finite:
        return ""
    loss, number = min(finite)
    return f": held-out loss {before:.4g} before, {loss:.4g} after epoch {number} at best"


@dataclass(frozen=True)
class _Again:
    """The batches of a pool, in order, as often as they are asked for."""

    pool: Pool
    size: int

    def __iter__(self) -> Iterator[Batch]:
        return self.pool.in_order(self.size)


class _Judge:
    """Loss and metric of a model in ONNX Runtime, sample by sample, on the held-out samples."""

    def __init__(
        self, runtime: Runtime, objective: Objective, pool: Pool | None, size: int, outputs: Sequence[str]
    ) -> None:
        self._runtime, self._objective, self._pool, self._size = runtime, objective, pool, size
        self._outputs = outputs
        self.scored: str | None = None
        self._metric: Metric | None = None
        self._before: tuple[np.ndarray, np.ndarray] | None = None

    def with_metric(self, spec: str) -> _Judge:
        found = _Judge(self._runtime, self._objective, self._pool, self._size, self._outputs)
        found.scored, found._metric = spec, load_metric(spec)
        return found

    @property
    def of_outputs(self) -> Metric | None:
        """The metric of the model's outputs, which may be among other tensors."""
        metric = self._metric
        if metric is None:
            return None
        return lambda outputs, labels: metric({name: outputs[name] for name in self._outputs}, labels)

    def start(self, model: Model) -> None:
        """Note what the model is worth before training."""
        self._before = self._measure(model)

    def change(self, model: Model, seed: int) -> tuple[PairedDifference | None, MetricChange | None]:
        after = self._measure(model)
        if self._before is None or after is None:
            return None, None
        loss = paired_difference(self._before[0], after[0], seed=seed)
        if self.scored is None:
            return loss, None
        return loss, MetricChange(self.scored, paired_difference(self._before[1], after[1], seed=seed), None)

    def _measure(self, model: Model) -> tuple[np.ndarray, np.ndarray] | None:
        """(losses, scores) of the held-out samples."""
        if self._pool is None:
            return None
        session = self._runtime.session(model, taps=self._objective.tensors)
        losses, scores = [], []
        for batch in self._pool.in_order(self._size):
            outputs = session.run(batch.feed)
            tensors = {name: to_tensor(outputs[name]) for name in self._objective.tensors}
            losses.append(self._objective(tensors, batch).double().numpy())
            if self.of_outputs is not None:
                scores.append(_one_each(self.of_outputs(outputs, batch.labels), batch))
        return np.concatenate(losses), np.concatenate(scores) if scores else np.empty(0)


def _one_each(scores: np.ndarray, batch: Batch) -> np.ndarray:
    if len(scores) != batch.samples:
        raise InputError(f"the metric returned {len(scores)} scores for a batch of {batch.samples} samples")
    return scores


# --- which weights ------------------------------------------------------------------------------------------


def _trained_weights(model: Model, freeze: Sequence[str]) -> set[tuple[Any, str]]:
    """The weights to train, by scope and name.

    Raises:
        InputError: a pattern matches no weight, or all of them are frozen.
        NotApplicableError: there is nothing to train, or only in a type too narrow for it.
    """
    trainable = [weight for weight in stored(model) if is_trainable(weight)]
    if not trainable:
        raise NotApplicableError("the model has no weights that could be trained")
    frozen = {(weight.scope, weight.name) for weight in _frozen(model, freeze)}
    left = [weight for weight in trainable if (weight.scope, weight.name) not in frozen]
    if not left:
        raise InputError("--freeze leaves nothing to train")
    for weight in left:
        if weight.dtype.name in _NARROW:
            raise NotApplicableError(
                f"weight '{weight.name}' is {weight.dtype}, too narrow to train; "
                "convert the model to float32 first"
            )
    return {(weight.scope, weight.name) for weight in left}


def _frozen(model: Model, patterns: Sequence[str]) -> list[Weight]:
    weights = stored(model)
    names = [weight.name for weight in weights]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.strip("*?"), names, n=3, cutoff=0.4)
            shown = ", ".join(f"'{name}'" for name in near or names[:3])
            raise InputError(f"--freeze {pattern}: no weight has such a name; there are {shown}, ...")
    return [weight for weight in weights if any(_matches(weight.name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _attribute(node: Any) -> str | None:
    """The weight that a node of torch.fx fetches, through a change of its type."""
    while isinstance(node, fx.Node) and node.op == "call_method":
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


# --- details ------------------------------------------------------------------------------------------------


def _digests(model: Model, batches: BatchStream | None) -> set[bytes]:
    if batches is None:
        return set()
    return {digest for batch in batches for digest in sample_digests(batch.feed, model.inputs)}


def _digest_model(digest: hashlib._Hash, model: Model) -> None:
    """Graph and weights; external ones are read one at a time."""
    digest.update(light_graph(model.to_proto().graph).SerializeToString(deterministic=True))
    for tensor in model.initializers:
        array = model.weight(tensor)
        assert array is not None
        digest.update(
            np.ascontiguousarray(array).tobytes() if array.dtype.kind != "O" else repr(array).encode()
        )


@contextlib.contextmanager
def _threads(most: int) -> Iterator[None]:
    """No more of torch's threads than this process has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _collecting(into: list[str], wanted: Callable[[warnings.WarningMessage], bool]) -> Iterator[None]:
    """Warnings of one kind as lines; others go on to where they would have gone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ModelWarning)
        yield
    for warning in caught:
        if wanted(warning):
            into.append(" ".join(str(warning.message).split()))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _is_of_model(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, ModelWarning)


def _is_of_kernel(warning: warnings.WarningMessage) -> bool:
    """Whether torch says that an operator has no deterministic kernel on the device."""
    return "deterministic" in str(warning.message)
