"""Passes and what they are given: the contract, the context, options and result."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

import pydantic

from onnxfuse.findings import Change, Prediction, Reached, Skip
from onnxfuse.progress import Journal, NoProgress, Progress, no_journal

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Calibration
    from onnxfuse.ir.model import Model
    from onnxfuse.runtime.session import Runtime


class Contract(enum.Enum):
    """The promise of a pass on what it preserves; decides how its result is verified."""

    EXACT = "exact"
    MASKED = "masked"
    APPROXIMATE = "approximate"


@dataclass
class PassResult:
    """The result of a pass: its rewritten copy, changes, refusals with reasons, and predicted errors.

    `oracle` is the masked model that a MASKED pass is compared with. An APPROXIMATE pass that cuts channels
    and then fits weights has one too, and `cut`, its model before the fit, which is compared with that.
    `reached` says how far it came, where a share was asked for.
    """

    model: Model
    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    oracle: Model | None = None
    cut: Model | None = None
    reached: Reached | None = None


@dataclass
class Context:
    """Everything that a pass may use beside the model: original, samples, runtime, seed and error budget.

    `max_error` is the relative output error (see `verification.compare.output_error`) that APPROXIMATE passes
    must stay within, against `original` on held-out samples; None means no such budget. `first` is set where
    passes run by turns: the model that this pass was given in its first turn, of which its goal is a share.
    """

    original: Model
    calibration: Calibration
    runtime: Runtime
    seed: int = 0
    max_error: float | None = None
    progress: Progress = field(default_factory=NoProgress)
    journal: Journal = no_journal
    first: Model | None = None

    def whole(self, model: Model) -> Model:
        """The model that goals are shares of: `model`, the one at hand, but in later turns `first`."""
        return model if self.first is None else self.first


class PassOptions(pydantic.BaseModel):
    """Base of every pass's options: unknown names are refused, values are fixed once validated."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    def partly(self, share: float, done: float = 0.0) -> Mapping[str, object] | None:
        """The settings with which the pass comes to `share` of its way; None if there is no such step (see
        `Pass.partly`)."""
        return None


P = TypeVar("P", bound="Pass")


class Pass(ABC):
    """One rewrite. Subclasses set `name`, `contract`, `summary`, may set `Options`, and implement `run`.

    `Fuse(kernel=3)` and `Fuse(Fuse.Options(kernel=3))` are the same. A pass whose contract depends on its
    options sets `self.contract` in its own `__init__`.

    Attributes:
        packed: its results are smaller only when packed (gzipped).
        grows: it is there to make a model larger; if another pass does, the report warns.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    packed: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    contract: Contract
    Options: ClassVar[type[PassOptions]] = PassOptions
    options: PassOptions

    def __init__(self, options: PassOptions | None = None, **settings: object) -> None:
        self.options = self.Options.model_validate(settings) if options is None else options

    @abstractmethod
    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite `model`, a copy made for this call, freely. OnnxfuseError: refused, with the reason."""

    def partly(self: P, share: float, done: float = 0.0) -> P | None:
        """The pass on its way: with its goal scaled to `share` (0 to 1) of the whole, for schedules that
        alternate compression and retraining. None: the pass has no goal that can be reached in steps, or
        none that is further than `done`.

        Args:
            share: how far along it is to come.
            done: how far along it was before, on the model that this one will be given. Passes that can tell
                from the model itself ignore it.
        """
        settings = self.options.partly(share, done)
        return None if settings is None else self._with(**settings)

    def _with(self: P, **settings: object) -> P:
        """The same pass with some options changed, and validated."""
        return type(self)(self.Options.model_validate({**self.options.model_dump(), **settings}))
