"""The training loop: for retraining, and for passes that learn something.

It takes a module, batches, an objective and settings. It knows nothing of files, of ONNX or of the command
line; whoever wants to show, keep or resume a training hands in what does it.

- The learning rate rises linearly over the first twentieth of all steps and falls along a cosine to zero.
- Weight decay acts on matrices and kernels, not on biases and scales.
- The gradient is clipped to norm `CLIP`: a network that was just rewritten starts with a few steep batches.
- After each epoch the running statistics of BatchNorms are taken anew, from some batches and the weights as
  they are now (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3): averages along the way lag
  behind weights that move, and after an epoch of few steps so far that the held-out loss means nothing.
- Then the held-out loss is taken, in float32; the epoch where it is lowest wins, and the start is
  a candidate, epoch 0.
- Data order and dropout depend on the seed and the number of the epoch alone, and so does the learning rate
  on the number of the step: a resumed training needs no more than weights, optimizer and history to end the
  same.
- Where `torch.distributed` is set up, every process trains on its share of each batch
  (DistributedDataParallel) and evaluates its share of the held-out batches; all come to the same result.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import InputError
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.pytorch.bridge.rules.normalization import BatchNorm
from onnxfuse.pytorch.bridge.tensors import to_tensor
from onnxfuse.pytorch.training.processes import processes
from onnxfuse.pytorch.training.records import Epoch
from onnxfuse.runtime.narrow import as_fed
from onnxfuse.verification.metrics import Metric

CLIP = 1.0
"""The largest norm of a gradient."""

WARM_UP = 0.05
"""Share of the steps during which the learning rate rises."""

RENEWED = 16
"""Batches that the running statistics of BatchNorms are taken from."""

MOMENTUM = 0.9

OPTIMIZERS = {"adamw": (1e-4, 1e-2), "sgd": (1e-3, 1e-4)}
"""Optimizers, and their default learning rate and weight decay. The rates are for weights that are good
already: ten times as much undid a fused ResNet-32 faster than two epochs could mend it."""

State = dict[str, Any]
"""What `train` needs to go on after an epoch; nothing but tensors, numbers, strings, lists and dicts."""


@dataclass(frozen=True)
class Settings:
    """How to train. None takes the optimizer's default; `patience` None never stops early."""

    epochs: int = 10
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    patience: int | None = None
    seed: int = 0

    @property
    def rate(self) -> float:
        return OPTIMIZERS[self.optimizer][0] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        return OPTIMIZERS[self.optimizer][1] if self.weight_decay is None else self.weight_decay


class MiniBatches(Protocol):
    """Mini-batches: `steps` of them in every epoch, which is all that decides what they are."""

    steps: int

    def epoch(self, number: int) -> Iterable[Batch]: ...


class Loss(Protocol):
    """A loss of the module's outputs that are in `tensors`: one value for each sample, or a mean."""

    @property
    def tensors(self) -> Sequence[str]: ...

    def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Trained:
    """The outcome of a training; the module holds the weights of epoch `best`.

    Attributes:
        history: the epochs from 0, the start.
        best: the one with the lowest held-out loss; the last without held-out batches.
        resumed: the epoch after which a former run was taken up, None without one.
        stopped: why it ended early, None if it did not.
        diverged: it ended because the loss, its gradient or a weight was no number any more.
    """

    history: tuple[Epoch, ...]
    best: int
    resumed: int | None
    stopped: str | None
    diverged: bool


class Diverged(Exception):
    """The loss, its gradient or a weight became NaN or infinite."""


def train(
    module: nn.Module,
    batches: MiniBatches,
    objective: Loss,
    settings: Settings,
    *,
    held_out: Iterable[Batch] | None = None,
    metric: Metric | None = None,
    frozen: Collection[nn.Module] = (),
    after_step: Callable[[], None] | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    resume: State | None = None,
    keep: Callable[[State], None] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train the parameters of a module that require gradients.

    Args:
        module: with `meta["inputs"]` and `meta["outputs"]`, as `to_torch` makes it. Ends in eval mode, on the
            CPU.
        batches: what to train on.
        objective: what to minimize.
        settings: how.
        held_out: batches that are evaluated after each epoch, iterated over as often.
        metric: of the outputs on the held-out batches, to be told and nothing else.
        frozen: submodules that stay in eval mode, such as BatchNorms whose statistics are to stay.
        after_step: run after every step of the optimizer, to put back what it must not move.
        device: where to train.
        precision: computes the training steps in float16 or bfloat16 where torch says that is safe.
        resume: what `keep` got in a former run of the same training; the same in all processes.
        keep: gets the state after each epoch, to be stored at once: it holds the tensors that are trained on.
            Called in one of several processes only.
        progress: hears of each step.

    Raises:
        InputError: nothing that is trained has an effect on the loss; a batch of one row where BatchNorm
            needs several; the device is out of memory.
    """
    device = torch.device(device)
    module.to(device)
    devices = [device] if device.type == "cuda" else []
    with _deterministic(), torch.random.fork_rng(devices=devices), _failing_clearly():
        loop = _Loop(
            module, batches, objective, settings, held_out, metric, frozen, after_step, device, precision
        )
        try:
            return loop.train(resume, keep, progress or NoProgress())
        finally:
            module.eval().cpu()


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """The learning rate of a step (module docstring).

    Args:
        settings: say how high it rises.
        step: counted from 0.
        total: steps of the whole training.
    """
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return settings.rate * (step + 1) / warm
    return settings.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """The element type that training steps compute in on a device: bfloat16 on GPUs that have it, float16 on
    others; None, for float32, on CPUs."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class _Named(nn.Module):
    """A module's outputs by name. Those that are not wanted are left out of the graph of gradients, which
    DistributedDataParallel would otherwise wait for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        meta: Any = module.meta
        self.inputs: list[str] = meta["inputs"]
        self.types: list[np.dtype | None] = meta["types"]
        self.outputs: list[str] = meta["outputs"]

    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        found = self.module(*inputs)
        results = found if isinstance(found, tuple) else [found]
        named = zip(self.outputs, results, strict=True)
        return {name: result for name, result in named if name in wanted}


class _Loop:
    """One training."""

    def __init__(
        self,
        module: nn.Module,
        batches: MiniBatches,
        objective: Loss,
        settings: Settings,
        held_out: Iterable[Batch] | None,
        metric: Metric | None,
        frozen: Collection[nn.Module],
        after_step: Callable[[], None] | None,
        device: torch.device,
        precision: torch.dtype | None,
    ) -> None:
        self.module, self.batches, self.objective, self.settings = module, batches, objective, settings
        self.held_out, self.metric, self.frozen = held_out, metric, frozen
        self.after_step = after_step
        self.device, self.precision = device, precision
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("no parameter of the module requires a gradient: there is nothing to train")
        self.named = _Named(module)
        self.optimizer = _optimizer(settings, self.parameters)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        self.rank, self.world = processes()
        self.forward: nn.Module = self.named
        if self.world > 1:
            places = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.named, device_ids=places, find_unused_parameters=True)
        self.history: list[Epoch] = []
        self.best = 0
        self.best_state: dict[str, Tensor] = {}

    def train(
        self, resume: State | None, keep: Callable[[State], None] | None, progress: Progress
    ) -> Trained:
        resumed = self._resume(resume)
        if resumed is None:
            self._finish(Epoch(0, None, *self._evaluate(), 0.0))
        stopped, diverged = self._stalled(), False
        while len(self.history) <= self.settings.epochs and stopped is None:
            number = len(self.history)
            start = time.perf_counter()
            try:
                loss = self._epoch(number, progress.task(self._told(number), total=self.batches.steps))
                if not math.isfinite(loss):
                    raise Diverged("the loss")
            except Diverged as reason:
                stopped, diverged = f"{reason} became NaN or infinite in epoch {number}", True
                break
            self._renew_statistics(number)
            self._finish(Epoch(number, loss, *self._evaluate(), time.perf_counter() - start))
            if keep is not None and self.rank == 0:
                keep(self._state())
            held_out = self.history[-1].held_out
            if held_out is not None and not math.isfinite(held_out):
                stopped, diverged = f"the held-out loss became NaN or infinite in epoch {number}", True
                break
            stopped = self._stalled()
        self.module.load_state_dict(self.best_state)
        return Trained(tuple(self.history), self.best, resumed, stopped, diverged)

    def _finish(self, epoch: Epoch) -> None:
        """Note an epoch, and its weights if they are the best so far."""
        self.history.append(epoch)
        best = self.history[self.best].held_out
        if epoch.held_out is None or epoch.number == 0 or _number(epoch.held_out) < _number(best):
            self.best = epoch.number
            self.best_state = _copied(self.module)

    def _stalled(self) -> str | None:
        patience, number = self.settings.patience, self.history[-1].number
        if patience is None or number - self.best < patience or number == self.settings.epochs:
            return None
        return f"the held-out loss has not improved for {patience} epochs"

    # one epoch

    def _epoch(self, number: int, advance: Callable[[], None]) -> float:
        """Train for one epoch; the mean loss on the way."""
        _seed(self.settings.seed, number, self.rank)
        self.module.train()
        for inner in self.frozen:
            inner.eval()
        total, count = 0.0, 0
        for step, batch in enumerate(self.batches.epoch(number), start=(number - 1) * self.batches.steps):
            rate = learning_rate(self.settings, step, self.settings.epochs * self.batches.steps)
            total += self._step(batch, rate) * batch.samples
            count += batch.samples
            advance()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            raise Diverged("a weight")  # the last step's doing; others show in the loss
        total, count = self._over_processes(total, count)
        return total / count

    def _step(self, batch: Batch, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            outputs = self.forward(self._inputs(batch), self.objective.tensors)
        loss = self.objective(outputs, batch).mean()
        if not loss.requires_grad:
            raise InputError("nothing that is trained has an effect on the loss")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP)
        if not self.scaler.is_enabled() and not math.isfinite(norm):  # the same in all processes
            raise Diverged("the loss" if not math.isfinite(loss.detach()) else "the gradient")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.after_step is not None:
            self.after_step()
        return float(loss.detach())

    def _inputs(self, batch: Batch) -> list[Tensor]:
        named = self.named
        arrays = (
            as_fed(batch.feed[name], dtype) for name, dtype in zip(named.inputs, named.types, strict=True)
        )
        return [to_tensor(array).to(self.device) for array in arrays]

    @torch.no_grad()
    def _renew_statistics(self, number: int) -> None:
        """Running statistics of the weights as they are: the mean over some batches of an epoch."""
        norms = [m for m in self.module.modules() if isinstance(m, BatchNorm) and m.running]
        momenta = {norm: norm.momentum for norm in norms if norm not in self.frozen}
        if not momenta:
            return
        self.module.eval()
        for count, batch in enumerate(islice(self.batches.epoch(number), RENEWED), start=1):
            for norm in momenta:
                norm.train()
                norm.momentum = 1 / count
            self.named(self._inputs(batch), self.objective.tensors)
        for norm, momentum in momenta.items():
            norm.momentum = momentum

    # the held-out batches

    @torch.no_grad()
    def _evaluate(self) -> tuple[float | None, float | None]:
        """The mean loss and metric on the held-out batches; None without any."""
        if self.held_out is None:
            return None, None
        self.module.eval()
        self._share_buffers()
        losses, scores, count = 0.0, 0.0, 0
        for batch in islice(self.held_out, self.rank, None, self.world):
            outputs = self.named(self._inputs(batch), self.named.outputs)
            losses += float(self.objective(outputs, batch).double().mean()) * batch.samples
            if self.metric is not None:
                scores += float(np.sum(self.metric(_arrays(outputs), batch.labels)))
            count += batch.samples
        losses, scores, count = self._over_processes(losses, scores, count)
        return losses / count, scores / count if self.metric is not None else None

    def _share_buffers(self) -> None:
        """The statistics of the first process for all: each has seen its own share."""
        if self.world > 1:
            for buffer in self.module.buffers():
                distributed.broadcast(buffer, 0)

    def _over_processes(self, *sums: float) -> list[Any]:
        if self.world == 1:
            return list(sums)
        together = torch.tensor(sums, dtype=torch.float64, device=self.device)
        distributed.all_reduce(together)
        return together.tolist()

    # state

    def _state(self) -> State:
        return {
            "module": _copied(self.module),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "best_state": self.best_state,
            "history": [asdict(epoch) for epoch in self.history],
        }

    def _resume(self, state: State | None) -> int | None:
        """Take up a state; the epoch it was kept after."""
        if state is None:
            return None
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.best_state = state["best"], state["best_state"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        return self.history[-1].number

    def _told(self, number: int) -> str:
        """The line of a progress bar for an epoch, with the figures of the one before."""
        last = self.history[-1]
        figures = [("loss", last.loss), ("held-out", last.held_out), ("metric", last.metric)]
        said = ", ".join(f"{name} {value:.4g}" for name, value in figures if value is not None)
        return f"epoch {number}/{self.settings.epochs}" + (f" ({said})" if said else "")


def _number(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", copy=True) for key, value in module.state_dict().items()}


def _arrays(outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (value.float() if value.is_floating_point() else value).cpu().numpy()
        for name, value in outputs.items()
    }


def _optimizer(settings: Settings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    vectors = [p for p in parameters if sum(size > 1 for size in p.shape) < 2]
    matrices = [p for p in parameters if sum(size > 1 for size in p.shape) >= 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, settings.decay), (vectors, 0.0))
        if group
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.rate)


def _seed(seed: int, epoch: int, rank: int) -> None:
    (state,) = np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state >> np.uint64(1)))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels where torch has them; it warns where it has not. Leaves torch as it was."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    kept = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling memory that nobody has written to yet only helps to find code that reads it.
    cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = True, False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = kept


@contextlib.contextmanager
def _failing_clearly() -> Iterator[None]:
    """Failures that only training shows, too little or too much of something, as errors of the user's."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            yield
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU is out of memory; a smaller --batch-size takes less") from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "BatchNorm can't train on one sample at a time; give a larger --batch-size, or --freeze it"
        ) from error
