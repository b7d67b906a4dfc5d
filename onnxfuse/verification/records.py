"""Records of comparisons. Relative errors are defined in `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

INSENSITIVE = 1e-2
"""Relative noise floor above which a comparison says that the samples test little."""

Floors = Mapping[str, "Floor"]


@dataclass(frozen=True)
class Floor:
    """An output's noise floor in its own unit: root mean square and largest difference from itself."""

    rms: float
    peak: float


@dataclass(frozen=True)
class OutputDifference:
    """One output of two models.

    `relative` and `floor` are relative errors; for outputs that are not floating-point, `relative` is the
    share of elements that differ. `max_abs` is in the output's unit. `ratio` is the difference in noise
    floors, the larger of root mean square and peak. `problem` is a difference of kind: NaN, shape, type.
    """

    name: str
    relative: float
    max_abs: float
    floor: float
    ratio: float
    problem: str | None = None


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
        return (
            f"output '{worst.name}' differs by {worst.relative:.2g} relative ({worst.max_abs:.2g} at most), "
            f"{worst.ratio:.3g} times the noise floor; {self.multiple:g} times is allowed"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Weak points of a comparison that passed: outputs that these samples hardly determine."""
        return tuple(
            f"output '{output.name}' is noise to {output.floor:.0%} on these samples, which test it little"
            for output in self.outputs
            if output.floor > INSENSITIVE
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
    """Relative error of each output, over `samples` samples."""

    outputs: Mapping[str, float]
    samples: int

    @property
    def worst(self) -> float:
        """The largest of them; 0 without outputs."""
        return max(self.outputs.values(), default=0.0)

    def over(self, bound: float, called: str, where: str = "") -> str | None:
        """Why the worst output breaks a bound; None if it does not.

        Args:
            bound: on the relative error.
            called: the bound in words, "the allowed"; may be empty.
            where: of what the error is, in words.
        """
        if self.worst <= bound:
            return None
        name = max(self.outputs, key=lambda output: self.outputs[output])
        above = f"{called} {bound:g}".lstrip()
        return f"the relative error of output '{name}'{where} is {self.worst:.3g}, above {above}"
