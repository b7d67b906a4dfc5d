"""A run of `compress` or `grow`, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from onnxfuse.report.explain_view import changes_view, skips_view
from onnxfuse.report.retrain_view import metric_row, retraining_view
from onnxfuse.report.tables import SHOWN, fact_table, heading, make_table, more, paragraph, runtime_fact
from onnxfuse.results import cost_rows
from onnxfuse.runtime.latency import interval_text
from onnxfuse.wording import counted, in_bytes, milliseconds, printable, shortened, three_digits

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from onnxfuse.ir.file_size import FileSize
    from onnxfuse.pipeline.records import StepReport
    from onnxfuse.results import Report
    from onnxfuse.runtime.latency import Latency


def compress_view(
    report: Report, *, verbose: bool = False, explain: bool = False
) -> Iterator[RenderableType]:
    """A view of a run of `compress`.

    Args:
        report: of the run.
        verbose: list every change.
        explain: list also what was not done, and why.
    """
    yield fact_table(_run_facts(report))
    yield Text()
    yield _steps(report.steps)
    yield from (
        paragraph(f"{step.name}: {note}", 2)
        for step in report.steps
        for note in step.notes
        if not note.startswith("warning: ")
    )
    for number, found in enumerate(report.retrainings, start=1):
        several = f", {number} of {len(report.retrainings)}" if len(report.retrainings) > 1 else ""
        yield from retraining_view(found, several)
    if report.output_error is not None or report.before != report.after:
        yield Text()
        yield _costs(report)
    if report.output_error is not None:
        yield from _output_errors(report)
    for step in report.steps:
        if (verbose or explain) and step.changes:
            yield from changes_view(step)
        if explain and step.skipped:
            yield from skips_view(step.name, step.skipped)


def _run_facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "model", printable(report.model or "in memory")
    yield "samples", printable(report.samples.description)
    yield "memory", f"{report.samples.memory / 1e6:,.0f} MB, batches of {report.samples.batch}"
    yield runtime_fact(report, report.latency)


def _steps(steps: Sequence[StepReport]) -> Table:
    table = make_table(
        "pass", "contract", "changes", "not done", "checked", "seconds", right=(2, 3, 5), fold=(4,)
    )
    for step in steps:
        table.add_row(
            step.name,
            step.contract.value,
            str(len(step.changes)),
            str(len(step.skipped)),
            Text(_outcome(step), style="" if step.committed else "red"),
            f"{step.seconds + step.verify_seconds:.1f}",
        )
    return table


def _outcome(step: StepReport) -> str:
    if not step.committed:
        return "rolled back" if step.verification is not None else "refused"
    found = step.verification
    if found is None:
        return "nothing to do"
    said = []
    if found.comparison is not None:
        ratio = max((output.ratio for output in found.comparison.outputs), default=0.0)
        what = "cut = masked" if found.predictions else "same"
        said.append(f"{what} to {ratio:.1f} noise floors" if ratio else "bit for bit the same")
    if found.predictions:
        said.append(f"{counted(len(found.predictions), 'predicted error')} = measured")
    return ", ".join(said)


def _costs(report: Report) -> Table:
    table = make_table("", "before", "after", "change", right=(1, 2), fold=(3,))
    for key, before, after, show in cost_rows(report.before, report.after):
        ratio = f"x {after / before:.3f}" if before and after is not None else ""
        table.add_row(key, show(before), show(after), ratio)
    if report.files is not None:
        for key, sizes in _file_rows(*report.files):
            table.add_row(key, *map(in_bytes, sizes), f"x {sizes[1] / sizes[0]:.3f}")
    if report.latency is not None:
        for row in latency_rows(report.latency, report.slower):
            table.add_row(*row)
    if report.metric is not None:
        table.add_row(*metric_row(report.metric))
    return table


def _file_rows(before: FileSize, after: FileSize) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "file", (before.bytes, after.bytes)
    if before.gzipped is not None and after.gzipped is not None:
        yield "gzipped", (before.gzipped, after.gzipped)


def latency_rows(latency: Latency, slower: bool) -> Iterator[tuple[str, str, str, Text]]:
    """The latency of both models, and what the original differs from itself."""
    before, after = latency.timings
    verdict = f"{interval_text(after)} SLOWER" if slower else interval_text(after)
    times = milliseconds(before.median_ms), milliseconds(after.median_ms)
    yield "latency", *times, Text(verdict, style="red" if slower else "")
    control = latency.control
    itself = f"x {control.ratio:.3f} (99%: {control.low:.3f} to {control.high:.3f})"
    shown = itself if latency.unstable is None else f"{itself}; {latency.unstable}"
    yield "  A/A control", "", "", Text(shown, style="" if latency.unstable is None else "red")


def _output_errors(report: Report) -> Iterator[RenderableType]:
    error = report.output_error
    if error is None:
        return
    where = "held-out samples" if report.samples.held_out else "samples"
    bound = "" if report.output_bound is None else f", {report.output_bound:g} allowed"
    yield heading(f"relative output error on {error.samples} {where}{bound}")
    yield from _output_table({name: three_digits(value) for name, value in error.outputs.items()})
    for name in list(error.outputs)[:SHOWN]:
        for part in error.parts.get(name, ()):
            yield paragraph(f"{shortened(name, 40)}, {part}: {three_digits(part.relative)}", 4)


def _output_table(values: Mapping[str, str]) -> Iterator[RenderableType]:
    table = make_table("", "")
    for name, value in list(values.items())[:SHOWN]:
        table.add_row(f"  {shortened(name, 60)}", value)
    yield table
    yield from more(SHOWN, len(values), 2)
