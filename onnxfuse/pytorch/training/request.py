"""What a retraining is asked to do, checked before anything is opened or run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from onnxfuse.data.calibration import Calibration, Data
from onnxfuse.errors import InputError, unknown_name
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.training.objective import KINDS
from onnxfuse.pytorch.training.training import OPTIMIZERS, Settings

_MOST = 1e9  # what nobody means; torch fails on numbers beyond float32


@dataclass(frozen=True)
class Request:
    """The options of a retraining; `onnxfuse.retrain` says what each means.

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
    """A request with the samples to train on; `labels` is what messages call the array of labels."""

    request: Request
    samples: Calibration
    labels: str


def _check(rule: str, value: float | None, holds: bool) -> None:
    if not holds:
        raise InputError(f"{rule}, not {value:g}")
