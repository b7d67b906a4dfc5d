"""Records of comparisons. Relative errors are defined in `compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxfuse.wording import counted, three_digits

INSENSITIVE = 1e-2
"""Relative noise floor above which a comparison says that the samples test little."""

Floors = Mapping[str, "Floor"]


@dataclass(frozen=True)
class Floor:
    """An output's noise floor in its own unit: root mean square and largest difference from itself."""

    rms: float
    peak: float


Basis = Literal["spread", "size", "spacing"]
"""The unit of a relative error: the reference's spread over the samples; its own size, where it does not
vary; or the spacing of its type's floats at 1, where it is zero throughout."""


@dataclass(frozen=True)
class OutputPart:
    """The elements of one scale, where an output holds several.

    `scale` is the root mean square of the reference in them; `where` says which slices they are, and is empty
    where they are told by their values. The rest is as in `OutputDifference`.
    """

    elements: int
    scale: float
    relative: float
    max_abs: float
    floor: float
    ratio: float
    basis: Basis = "spread"
    where: str = ""

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return f"{counted(self.elements, 'element')}{where} at scale {three_digits(self.scale)}"


@dataclass(frozen=True)
class OutputDifference:
    """One output of two models.

    `relative` and `floor` are relative errors, in the unit that `basis` names; for outputs that are not
    floating-point, `relative` is the share of elements that differ. `max_abs` is in the output's unit.
    `ratio` is the difference in noise floors, the larger of root mean square and peak. Where the output holds
    elements of several scales, `parts` has each by itself, and the figures here are the largest of theirs.
    `nonfinite` counts elements that are infinite or NaN, in both alike. `problem` is a difference of kind:
    NaN, infinity, shape, type.
    """

    name: str
    relative: float
    max_abs: float
    floor: float
    ratio: float
    problem: str | None = None
    parts: tuple[OutputPart, ...] = ()
    basis: Basis = "spread"
    nonfinite: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two models' outputs side by side. `problems` are differences of interface, which leave nothing to
    run."""

    outputs: tuple[OutputDifference, ...]
    multiple: float
    samples: int
    batch_sizes: tuple[int, ...]
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems and all(self._passes(output) for output in self.outputs)

    def _passes(self, output: OutputDifference) -> bool:
        return output.problem is None and output.ratio <= self.multiple

    @property
    def reason(self) -> str | None:
        """One line: why it did not pass; None if it did."""
        if self.problems:
            return self.problems[0]
        failed = [output for output in self.outputs if not self._passes(output)]
        if not failed:
            return None
        worst = max(failed, key=lambda output: (output.problem is not None, output.ratio))
        if worst.problem:
            return f"output {worst.problem}"
        if np.isinf(worst.ratio):
            return f"output '{worst.name}' must be equal and {worst.relative:.2%} of its elements differ"
        at = max(worst.parts, key=lambda part: part.ratio) if worst.parts else worst
        where = f" in {at}" if isinstance(at, OutputPart) else ""
        by = f"{at.relative:.2g} relative ({at.max_abs:.2g} at most)"
        if at.basis == "spacing":
            by = f"{at.max_abs:.2g} at most from zero, which it is throughout"
        return (
            f"output '{worst.name}' differs{where} by {by}, {worst.ratio:.3g} times the noise floor; "
            f"{self.multiple:g} times is allowed"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Weak points of a comparison that passed, such as outputs that these samples hardly determine."""
        noisy = (
            f"output '{output.name}' is noise to {output.floor:.0%} on these samples, which test it little"
            for output in self.outputs
            if output.floor > INSENSITIVE and output.basis == "spread"
        )
        return (*noisy, *(line for output in self.outputs for line in _oddities(output)))


def _oddities(output: OutputDifference) -> Iterator[str]:
    """Lines on what is unusual about how an output was measured."""
    name = f"output '{output.name}'"
    if output.nonfinite:
        number = counted(output.nonfinite, "element")
        yield f"{name} is infinite or NaN in {number}, which must be so in both and are not measured"
    if output.basis == "size":
        yield (
            f"{name} does not vary from sample to sample: its error is relative to its size, not to its "
            "spread; if it should vary, give samples that differ, as the model was made for"
        )
    elif output.basis == "spacing":
        yield (
            f"{name} is zero throughout: its error has no scale, and is in units of the spacing of its "
            "type's floats at 1; if it should vary, give samples as the model was made for"
        )


@dataclass(frozen=True)
class Divergence:
    """The first tensor, in topological order, at which two models differ beyond its own noise floor."""

    tensor: str
    node: str
    op: str
    relative: float
    floor: float
    problem: str | None = None

    def __str__(self) -> str:
        where = f"first at tensor '{self.tensor}' ({self.op} '{self.node}')"
        return f"{where}: {self.problem or f'{self.relative:.2g} relative, noise floor {self.floor:.2g}'}"


@dataclass(frozen=True)
class PredictionCheck:
    """A predicted error, the measured one and how far apart they may be: squared units, summed over
    channels."""

    tensor: str
    predicted: float
    measured: float
    tolerance: float
    variance: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and abs(self.measured - self.predicted) <= self.tolerance

    @property
    def reason(self) -> str | None:
        if self.passed:
            return None
        if self.problem:
            return self.problem
        return (
            f"tensor '{self.tensor}': predicted a mean squared error of {self.predicted:.6g}, measured "
            f"{self.measured:.6g} (tolerance {self.tolerance:.2g})"
        )


@dataclass(frozen=True)
class OutputError:
    """Relative error of each output, over `samples` samples.

    `parts` has the elements of each scale, of outputs that hold several; an output's error is the largest of
    theirs. `notes` are lines on what is unusual about how an output was measured; `fixed` are floating-point
    outputs that do not vary from sample to sample.
    """

    outputs: Mapping[str, float]
    samples: int
    parts: Mapping[str, tuple[OutputPart, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    @classmethod
    def of(cls, outputs: Sequence[OutputDifference], samples: int) -> OutputError:
        """The relative errors of outputs that were compared on so many samples."""
        return cls(
            {output.name: output.relative for output in outputs},
            samples,
            {output.name: output.parts for output in outputs if output.parts},
            tuple(line for output in outputs for line in _oddities(output)),
            tuple(output.name for output in outputs if output.basis != "spread"),
        )

    @property
    def worst(self) -> float:
        """The largest of them; 0 without outputs, infinity where one is no number."""
        return max(map(_number, self.outputs.values()), default=0.0)

    def over(self, bound: float, called: str, where: str = "") -> str | None:
        """Why the worst output breaks a bound; None if it does not.

        Args:
            bound: on the relative error.
            called: the bound in words, "the allowed"; may be empty.
            where: of what the error is, in words.
        """
        if self.worst <= bound:
            return None
        name = max(self.outputs, key=lambda output: _number(self.outputs[output]))
        above = f"{called} {bound:g}".lstrip()
        parts = self.parts.get(name, ())
        inside = f" in {max(parts, key=lambda part: _number(part.relative))}" if parts else ""
        return f"the relative error of output '{name}'{inside}{where} is {self.worst:.3g}, above {above}"


def _number(error: float) -> float:
    """An error that can be compared: NaN is infinitely large."""
    return math.inf if math.isnan(error) else error
