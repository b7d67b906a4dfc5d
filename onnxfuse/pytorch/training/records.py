"""Records of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxfuse.data.calibration import Samples
from onnxfuse.verification.metrics import MetricChange

if TYPE_CHECKING:
    from onnxfuse.numerics.significance import PairedDifference


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
