"""Records of a run of passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxfuse.analysis.cost import Cost
from onnxfuse.findings import Change, Json, Prediction, Reached, Skip
from onnxfuse.pipeline.base import Contract
from onnxfuse.verification.records import Comparison, Divergence, OutputError, PredictionCheck

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model


@dataclass(frozen=True)
class Verification:
    """The outcome of the checks after a pass, by its contract; parts that do not apply are empty."""

    passed: bool
    reason: str | None = None
    comparison: Comparison | None = None
    divergence: Divergence | None = None
    predictions: tuple[PredictionCheck, ...] = ()
    output_error: OutputError | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepReport:
    """One pass of a run. A pass that was not committed left no trace in the model; `reason` says why.

    `exit_code` is 0 for a committed pass, that of the error for one that refused, 1 for one that broke its
    contract. `seconds` is the pass alone, `verify_seconds` its checks. `before` and `after` are costs at the
    sizes of one calibration sample (the whole first batch where it cannot be cut); after a roll-back they are
    equal. `reached` is None where no share was asked for, or nothing was committed.
    """

    name: str
    contract: Contract
    options: Mapping[str, Json]
    committed: bool
    reason: str | None
    exit_code: int
    seconds: float
    verify_seconds: float
    changes: tuple[Change, ...]
    skipped: tuple[Skip, ...]
    predictions: tuple[Prediction, ...]
    notes: tuple[str, ...]
    verification: Verification | None
    before: Cost
    after: Cost
    reached: Reached | None = None


@dataclass(frozen=True)
class Outcome:
    """A run of a pass manager: the model after the last committed pass, and every step."""

    model: Model
    steps: tuple[StepReport, ...]
