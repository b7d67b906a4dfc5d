"""What a run of `compress` or `retrain` leaves behind for machines: plain dataclasses, and JSON made of them.

`format` is raised when a key changes its meaning or goes away; new keys may come any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.instruments import plain

if TYPE_CHECKING:
    from onnxfuse.cost import Cost, Latency
    from onnxfuse.pass_manager import Json, StepReport
    from onnxfuse.significance import PairedDifference
    from onnxfuse.verification import OutputError

FORMAT = 2


@dataclass(frozen=True)
class Samples:
    """The calibration samples of a run: how many were fitted and how many held out; `labels` is the name of
    the label array."""

    description: str
    synthetic: bool
    fitted: int
    held_out: int
    labels: str | None


@dataclass(frozen=True)
class MetricChange:
    """A metric before and after, on held-out samples; `max_drop` is the drop that was allowed."""

    name: str
    scores: PairedDifference
    max_drop: float | None


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training: its mean loss, and loss and metric on the held-out samples after it. Epoch 0
    is the model before training."""

    number: int
    loss: float | None
    held_out: float | None
    metric: float | None
    seconds: float


@dataclass(frozen=True)
class Retraining:
    """One retraining.

    `objective` says which tensors were trained for what, a line each; `trained` counts the parameters that
    were; `scored` names the metric. `history` begins with epoch 0, the start; the weights are those of epoch
    `best`. `resumed` is the epoch after which a run that was killed was taken up, `stopped` why training
    ended early. `loss` and `metric` are measured in ONNX Runtime on the held-out samples, before and after;
    of the loss, less is better.
    """

    samples: Samples
    teacher: str | None
    objective: tuple[str, ...]
    trained: int
    optimizer: str
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    device: str
    precision: str
    processes: int
    scored: str | None
    history: tuple[Epoch, ...]
    best: int
    resumed: int | None
    stopped: str | None
    loss: PairedDifference | None
    metric: MetricChange | None
    seconds: float


@dataclass(frozen=True)
class RetrainReport:
    """One run of `retrain`. `providers` and `threads` are ONNX Runtime's."""

    version: str
    model: str | None
    output: str | None
    written: bool
    exit_code: int
    reason: str | None
    warnings: tuple[str, ...]
    seed: int
    providers: tuple[str, ...]
    threads: int
    retraining: Retraining
    seconds: float


@dataclass(frozen=True)
class FileSize:
    """Bytes of a model on disk, external data included, and of the same gzipped (None: not measured)."""

    bytes: int
    gzipped: int | None


@dataclass(frozen=True)
class Report:
    """One run of `compress`.

    `before` and `after` are costs, `latency` timings of the original and the result, at the shapes `sizes` of
    one sample. `output_error` is the result against the original on samples that were not fitted.
    `output_bound` is what `--max-error` allowed, None where the passes' own bounds applied (their notes say
    which). `retrainings` are those between and after the passes. `files` are the sizes on disk of the
    original and the result. What does not apply to a run, or could not be measured any more when it failed,
    is None.
    """

    version: str
    model: str | None
    output: str | None
    written: bool
    exit_code: int
    reason: str | None
    warnings: tuple[str, ...]
    seed: int
    samples: Samples
    providers: tuple[str, ...]
    threads: int
    steps: tuple[StepReport, ...]
    sizes: Mapping[str, tuple[int, ...]]
    before: Cost
    after: Cost
    latency: Latency | None
    slower: bool
    output_bound: float | None
    output_error: OutputError | None
    metric: MetricChange | None
    retrainings: tuple[Retraining, ...]
    files: tuple[FileSize, FileSize] | None
    seconds: float


def as_json(value: Any, command: str) -> dict[str, Json]:
    """A report, inspection, ... as JSON takes it, headed by the command that made it. NaN and infinities
    become null."""
    return {"onnxfuse": command, "format": FORMAT, **_plain(value)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        names = [*(name for name in _DERIVED if hasattr(value, name)), *(f.name for f in fields(value))]
        return {name: _plain(getattr(value, name)) for name in dict.fromkeys(names)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, np.dtype) else plain(value)


_DERIVED = ("passed", "reason", "worst")  # properties that belong to a record as much as its fields
