"""Records of what each command found: plain data, which shows itself and becomes JSON.

A record is a line as `repr`, a few lines as `str`, a small table in a notebook, and `to_json()` is what the
command line prints with `--json`. `FORMAT` is raised when a key changes its meaning or goes away; new keys
may come any time.
"""

from __future__ import annotations

import html
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.pipeline.instruments import json_value
from onnxfuse.wording import counted, in_bytes, in_macs, milliseconds, printable, three_digits, whole

if TYPE_CHECKING:
    from pathlib import Path

    from onnxfuse.analysis.cost import Cost
    from onnxfuse.analysis.layer_similarity import Likeness
    from onnxfuse.analysis.structural_diff import Structure
    from onnxfuse.analysis.summaries import LinearSummary, RegionSummary
    from onnxfuse.channels.summary import GroupSummary
    from onnxfuse.data.calibration import Samples
    from onnxfuse.findings import Json, Skip
    from onnxfuse.growth.plan import GrowthSite
    from onnxfuse.ir.file_size import FileSize
    from onnxfuse.ir.model import Model
    from onnxfuse.ir.shapes import TensorInfo
    from onnxfuse.numerics.significance import PairedDifference
    from onnxfuse.pipeline.records import StepReport
    from onnxfuse.pytorch.training.records import Retraining
    from onnxfuse.runtime.latency import Latency
    from onnxfuse.verification.metrics import MetricChange
    from onnxfuse.verification.promises import Promise
    from onnxfuse.verification.records import Comparison, Divergence, OutputError

FORMAT = 3
_LISTED = 10  # entries of a long list that are shown

FactRows = Iterator[tuple[str, str]]


# --- JSON ---------------------------------------------------------------------------------------------------

_DERIVED = ("passed", "reason", "worst")  # properties that belong to a record as much as its fields


def as_json(value: Any, command: str) -> dict[str, Json]:
    """A record as JSON takes it, headed by the command that made it. NaN and infinities become null."""
    return {"onnxfuse": command, "format": FORMAT, **_plain(value)}


def json_text(value: Any, command: str) -> str:
    """`as_json` as text, indented."""
    return json.dumps(as_json(value, command), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        names = [*(name for name in _DERIVED if hasattr(value, name)), *(f.name for f in fields(value))]
        return {name: _plain(getattr(value, name)) for name in dict.fromkeys(names)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, np.dtype) else json_value(value)


# --- how records show themselves ----------------------------------------------------------------------------


class Shown(ABC):
    """A record that shows itself; subclasses give a headline, facts and the record to be written as JSON."""

    @abstractmethod
    def _headline(self) -> str:
        """The outcome in half a line."""

    @abstractmethod
    def _facts(self) -> FactRows:
        """Names and values, the most important first."""

    @abstractmethod
    def _record(self) -> tuple[Any, str]:
        """The record to be written as JSON, and the command that made it."""

    def to_dict(self) -> dict[str, Json]:
        """The JSON of `--json` as dicts, lists, numbers and strings."""
        return as_json(*self._record())

    def to_json(self) -> str:
        """The text that `--json` prints."""
        return json_text(*self._record())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(self._headline())}>"

    def __str__(self) -> str:
        facts = [(printable(key), printable(value)) for key, value in self._facts()]
        width = max((len(key) for key, _ in facts), default=0)
        return "\n".join([printable(self._headline()), *(f"{key:{width}}  {value}" for key, value in facts)])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align: left'>{_escaped(key)}</th>"
            f"<td style='text-align: left'>{_escaped(value)}</td></tr>"
            for key, value in self._facts()
        )
        return f"<table><caption>{_escaped(self._headline())}</caption>{rows}</table>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _listed(values: Iterable[tuple[str, str]]) -> FactRows:
    """The first of many facts, and how many there are beside them."""
    found = list(values)
    yield from found[:_LISTED]
    if len(found) > _LISTED:
        yield "", f"and {len(found) - _LISTED:,} more"


def _warnings(warnings: Sequence[str]) -> FactRows:
    return _listed(("warning", warning) for warning in warnings)


def cost_rows(
    before: Cost, after: Cost
) -> Iterator[tuple[str, int | None, int | None, Callable[[Any], str]]]:
    """Each figure of two costs: its name, both values, and the function that writes them."""
    yield "parameters", before.parameters, after.parameters, whole
    yield "MACs", before.macs, after.macs, in_macs
    yield "nodes", before.nodes, after.nodes, whole
    yield "weights", before.bytes, after.bytes, in_bytes


def _costs(before: Cost, after: Cost) -> FactRows:
    for name, old, new, shown in cost_rows(before, after):
        ratio = f" (x {new / old:.3f})" if old and new is not None else ""
        yield name, f"{shown(old)} -> {shown(new)}{ratio}"


def _change(name: str, found: PairedDifference) -> tuple[str, str]:
    return name, f"{found.before:.4g} of the original, {found.after:.4g} of the result"


def _differences(found: Comparison) -> FactRows:
    return _listed(
        (f"output '{output.name}'", output.problem or f"relative error {three_digits(output.relative)}")
        for output in found.outputs
    )


# --- compress, grow and retrain -----------------------------------------------------------------------------


@dataclass(frozen=True)
class RunReport:
    """The part that the reports of all runs share.

    Attributes:
        version: of onnxfuse.
        model, output: the files; None where a model was in memory, or nothing was to be written.
        written: whether the output was.
        exit_code, reason: as `RunResult` has them.
        warnings: a line each.
        seed: of everything random.
    """

    version: str
    model: str | None
    output: str | None
    written: bool
    exit_code: int
    reason: str | None
    warnings: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Report(RunReport):
    """One run of `compress` or `grow`. What does not apply to a run, or could not be measured any more when
    it failed, is None.

    Attributes:
        samples: what was fitted, and what held out.
        providers, threads: ONNX Runtime's.
        steps: the passes in order.
        sizes: of each input, the shape of the one sample that `before`, `after` and `latency` are at.
        before, after: costs of the original and the result.
        latency: timings of both, by its own number of threads.
        slower: whether the result takes longer, beyond what chance explains.
        output_bound: what `--max-error` allowed; None where the passes' own bounds applied (their notes say
            which).
        output_error: of the result against the original, on samples that were not fitted.
        metric: of both.
        retrainings: between and after the passes.
        files: sizes on disk of the original and the result.
        seconds: of the whole run.
    """

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


@dataclass(frozen=True)
class RetrainReport(RunReport):
    """One run of `retrain`. `providers` and `threads` are ONNX Runtime's."""

    providers: tuple[str, ...]
    threads: int
    retraining: Retraining
    seconds: float


@dataclass(frozen=True, repr=False)
class RunResult(Shown):
    """A run that makes a model: false if it failed.

    Attributes:
        model: the new model; the given one where the run failed.
        report: of the run.
        exit_code: of the command line; 0 where all went well.
        reason: one line why it is not 0.
        written: where the model was written; None where nothing was.
        command: which made it.
    """

    model: Model
    report: RunReport
    exit_code: int
    reason: str | None
    written: Path | None
    command: str

    @property
    def ok(self) -> bool:
        """Whether the run succeeded."""
        return self.exit_code == 0

    def __bool__(self) -> bool:
        return self.ok

    def _record(self) -> tuple[Any, str]:
        return self.report, self.command

    def _headline(self) -> str:
        if not self.ok:
            return f"{self.command} failed (exit code {self.exit_code}): {self.reason}"
        return f"{self.command} done, " + (f"written to '{self.written}'" if self.written else "not written")


@dataclass(frozen=True, repr=False)
class Result(RunResult):
    """The result of `compress` or `grow`. `exit_code` is 0; 1: a check or a budget failed; 3: no pass had
    anything to do, or one can't be applied."""

    report: Report

    @property
    def steps(self) -> tuple[StepReport, ...]:
        """The report's passes, in order."""
        return self.report.steps

    def _facts(self) -> FactRows:
        found = self.report
        if found.model is not None:
            yield "model", found.model
        for step in found.steps:
            yield step.name, counted(len(step.changes), "change") if step.committed else f"no: {step.reason}"
        yield from _costs(found.before, found.after)
        if found.latency is not None:
            before, after = found.latency.timings
            slower = ", SLOWER" if found.slower else ""
            times = f"{milliseconds(before.median_ms)} -> {milliseconds(after.median_ms)}"
            yield "latency", f"{times} (x {after.ratio:.3f}{slower})"
            if found.latency.unstable is not None:
                yield "", found.latency.unstable
        if found.output_error is not None:
            bound = "" if found.output_bound is None else f", {found.output_bound:g} allowed"
            yield "output error", f"{three_digits(found.output_error.worst)}{bound}"
        if found.metric is not None:
            yield _change(found.metric.name, found.metric.scores)
        yield from _warnings(found.warnings)


@dataclass(frozen=True, repr=False)
class RetrainResult(RunResult):
    """The result of `retrain`. `exit_code` is 0; 1: training never got better than the start, or its result
    failed verification."""

    report: RetrainReport

    def _facts(self) -> FactRows:
        found = self.report.retraining
        if self.report.model is not None:
            yield "model", self.report.model
        yield "trained", f"{found.trained:,} parameters on {counted(found.samples.fitted, 'sample')}"
        yield "best epoch", f"{found.best} of {max(len(found.history) - 1, 0)}"
        if found.loss is not None:
            yield _change("loss", found.loss)
        if found.metric is not None:
            yield _change(found.metric.name, found.metric.scores)
        yield from _warnings(self.report.warnings)


# --- verify and diff ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class VerifyResult(Shown):
    """The result of `verify`: false if a promise was broken.

    Attributes:
        promises: what was checked; without any budget that both models compute the same.
        comparison: output by output.
        divergence: the first tensor that differs, where outputs do that should not, and both models have it.
        max_error: the relative error allowed; None without such a budget.
        metric: of both; None where none was asked for.
        latency: of both; None where it was not bounded.
        samples: `held_out` of them were run; `fitted` were left out, because one of the models was fitted to
            them.
        warnings: a line each.
    """

    promises: tuple[Promise, ...]
    comparison: Comparison
    divergence: Divergence | None
    max_error: float | None
    metric: MetricChange | None
    latency: Latency | None
    samples: Samples
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all promises were kept."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """One line: why the first promise that was broken was; None if all were kept."""
        return next((promise.reason for promise in self.promises if not promise.passed), None)

    @property
    def verdict(self) -> str:
        """The outcome in words: "same" only where nothing but float noise is between the two."""
        broken = [promise.broken for promise in self.promises if not promise.passed]
        kept = [
            promise.name for promise in self.promises[1:]
        ]  # the first, equal interfaces, goes without saying
        return ", ".join(dict.fromkeys(broken or kept))

    def __bool__(self) -> bool:
        return self.passed

    def _record(self) -> tuple[Any, str]:
        return self, "verify"

    def _headline(self) -> str:
        return self.verdict if self.passed else f"{self.verdict}: {self.reason}"

    def _facts(self) -> FactRows:
        yield "samples", self.samples.description
        rule = f"{self.comparison.multiple:g} noise floors"
        names = (promise.name for promise in self.promises[1:])
        yield "allowed", ", ".join(rule if name == "same" else name for name in names)
        yield from _differences(self.comparison)
        if self.metric is not None:
            yield _change(self.metric.name, self.metric.scores)
        if self.latency is not None:
            yield "latency", f"x {self.latency.timings[1].ratio:.3f}"
        if self.divergence is not None:
            yield "first difference", str(self.divergence).removeprefix("first at ")
        yield from _warnings(self.warnings)


@dataclass(frozen=True, repr=False)
class DiffResult(Shown):
    """Two models side by side.

    Attributes:
        structure: nodes and weights.
        costs: of both, at one sample of the first.
        outputs: None where they could not be compared; a warning says why.
        samples: as in `VerifyResult`; None where there are none.
        warnings: a line each.
    """

    structure: Structure
    costs: tuple[Cost, Cost]
    outputs: Comparison | None
    samples: Samples | None
    warnings: tuple[str, ...]

    def _record(self) -> tuple[Any, str]:
        return self, "diff"

    def _headline(self) -> str:
        found = self.structure
        return (
            f"{counted(found.same, 'node')} the same, {len(found.changed)} changed, "
            f"{len(found.only_a)} only in A, {len(found.only_b)} only in B"
        )

    def _facts(self) -> FactRows:
        yield from _costs(*self.costs)
        if self.outputs is not None:
            yield from _differences(self.outputs)
        yield from _warnings(self.warnings)


# --- inspect ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """The result of `inspect`: the contents of a model.

    `sizes` is the shape of every input at which MACs and latency were taken: one sample, or the smallest
    batch that the model takes; empty where there was none. `operators` counts nodes by operator (with its
    domain, if not the default one), bodies included. `channels`, `growth` and `similarity` are None where
    nobody asked for them.
    """

    path: str | None
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    metadata: Mapping[str, str]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: Mapping[str, int]
    cost: Cost
    sizes: Mapping[str, tuple[int, ...]]
    linear: tuple[LinearSummary, ...]
    regions: tuple[RegionSummary, ...]
    skipped: tuple[Skip, ...]
    latency: Latency | None
    channels: tuple[GroupSummary, ...] | None
    warnings: tuple[str, ...]
    growth: tuple[GrowthSite, ...] | None = None
    similarity: tuple[Likeness, ...] | None = None

    def _record(self) -> tuple[Any, str]:
        return self, "inspect"

    def _headline(self) -> str:
        return f"{self.path or 'a model in memory'}, {counted(self.cost.nodes, 'node')}"

    def _facts(self) -> FactRows:
        yield from _listed(("input", f"{info.name}: {described(info)}") for info in self.inputs)
        yield from _listed(("output", f"{info.name}: {described(info)}") for info in self.outputs)
        yield "parameters", f"{self.cost.parameters:,} ({in_bytes(self.cost.bytes)})"
        known = in_macs(self.cost.macs)
        yield "MACs", known if self.cost.macs is not None else f"not known: {self.cost.macs_reason}"
        if self.latency is not None:
            yield "latency", milliseconds(self.latency.timings[0].median_ms)
        yield "operators", ", ".join(f"{count} {op}" for op, count in list(self.operators.items())[:_LISTED])
        yield "linear operators", whole(len(self.linear))
        yield "regions", whole(len(self.regions))
        yield from _warnings(self.warnings)


def described(info: TensorInfo) -> str:
    """Type and dimensions of a tensor: "float32 [batch, 6]"."""
    dtype = "?" if info.dtype is None else "string" if info.dtype.kind == "O" else str(info.dtype)
    dims = "?" if info.shape is None else ", ".join("?" if d is None else str(d) for d in info.shape)
    return printable(f"{dtype} [{dims}]")
