"""A run of `retrain`, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from onnxfuse.report.tables import SHOWN, fact_table, heading, make_table, paragraph, runtime_fact
from onnxfuse.wording import printable, shortened

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from onnxfuse.numerics.significance import PairedDifference
    from onnxfuse.pytorch.training.records import Epoch, Retraining
    from onnxfuse.results import RetrainReport
    from onnxfuse.verification.metrics import MetricChange


def retrain_view(report: RetrainReport) -> Iterator[RenderableType]:
    """A run of `retrain`."""
    found = report.retraining
    facts = [("model", printable(report.model or "in memory"))]
    if found.teacher is not None:
        facts.append(("teacher", printable(found.teacher)))
    facts.append(("samples", printable(found.samples.description)))
    facts.append(runtime_fact(report))
    yield fact_table(facts)
    yield from retraining_view(found)
    table = make_table("", "before", "after", "change", right=(1, 2), fold=(3,))
    if found.loss is not None:
        table.add_row(*_loss_row(found.loss))
        if found.metric is not None:
            table.add_row(*metric_row(found.metric))
        yield heading(f"in ONNX Runtime, on {found.loss.samples} held-out samples")
        yield table


def retraining_view(found: Retraining, which: str = "") -> Iterator[RenderableType]:
    """One retraining: tensors, samples, optimizer, epochs. `which` goes behind its title."""
    yield heading(f"retraining{which}")
    yield from (paragraph(about, 2) for about in found.objective)
    where = found.device if found.processes == 1 else f"{found.processes} x {found.device}"
    decay = f", weight decay {found.weight_decay:g}" if found.weight_decay else ""
    yield paragraph(
        f"{found.trained:,} parameters on {found.samples.fitted:,} samples, batches of {found.batch_size}, "
        f"{found.optimizer} at {found.lr:g}{decay}, {where}, {found.precision}",
        2,
    )
    if found.resumed is not None:
        yield paragraph(f"resumed after epoch {found.resumed}", 2)
    yield Text()
    yield _epochs(found)
    if found.stopped is not None:
        yield paragraph(f"stopped early: {found.stopped}", 2)


def _epochs(found: Retraining) -> Table:
    scored = [shortened(found.scored, 20)] if found.scored is not None else []
    titles = ("  epoch", "loss", "held-out loss", *scored, "seconds", "")
    table = make_table(*titles, right=range(len(titles) - 1))
    for epoch in _some(found.history, found.best):
        figures = [epoch.loss, epoch.held_out, *([epoch.metric] if scored else [])]
        shown = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        mark = "best" if epoch.number == found.best else "start" if epoch.number == 0 else ""
        table.add_row(str(epoch.number), *shown, f"{epoch.seconds:.1f}", mark)
    return table


def _some(history: Sequence[Epoch], best: int) -> list[Epoch]:
    """The epochs to show: all of a short training; of a long one the first, last, best and some between."""
    step = -(-len(history) // (2 * SHOWN))
    wanted = {*range(0, len(history), step), best, len(history) - 1}
    return [epoch for epoch in history if epoch.number in wanted]


def _loss_row(loss: PairedDifference) -> tuple[str, str, str, str]:
    said = f"{loss.difference:+.4g} ({loss.confidence * 100:g}%: {loss.low:+.4g} to {loss.high:+.4g})"
    return "loss", f"{loss.before:.4g}", f"{loss.after:.4g}", said


def metric_row(metric: MetricChange) -> tuple[str, str, str, str]:
    """A row of the table of costs: name, before, after, change."""
    scores = metric.scores
    said = f"{scores.difference:+.4f} ({scores.confidence * 100:g}%: {scores.low:+.4f} to {scores.high:+.4f}"
    said += ")" if scores.p_value is None else f"; p = {scores.p_value:.2g})"
    return printable(metric.name), f"{scores.before:.4f}", f"{scores.after:.4f}", said
