"""Two models side by side, for people: `verify` and `diff`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from onnxfuse.report.compress_view import latency_rows
from onnxfuse.report.retrain_view import metric_row
from onnxfuse.report.tables import SHOWN, fact_table, heading, make_table, more, paragraph
from onnxfuse.results import cost_rows
from onnxfuse.wording import counted, printable, shortened, three_digits

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from onnxfuse.analysis.structural_diff import NodeChange, NodeSummary, WeightChange
    from onnxfuse.results import DiffResult, VerifyResult
    from onnxfuse.verification.records import Comparison, OutputDifference, OutputPart


def verify_view(result: VerifyResult) -> Iterator[RenderableType]:
    """A view of the comparison of two models, output by output."""
    yield fact_table([("samples", printable(result.samples.description))])
    if result.comparison.outputs:
        by_error = result.max_error is not None or any(p.name == "same" for p in result.promises)
        yield Text()
        yield from _comparison(result.comparison, result.max_error, judged=by_error)
    if result.metric is not None or result.latency is not None:
        yield Text()
        yield _figures(result)
    if result.divergence is not None:
        yield heading("first difference")
        yield paragraph(str(result.divergence).removeprefix("first at "), 2)
    yield Text()
    yield Text(printable(result.verdict), style="bold green" if result.passed else "bold red")


def _figures(result: VerifyResult) -> Table:
    """What was measured beside the outputs."""
    table = make_table("", "A", "B", "change", right=(1, 2), fold=(3,))
    if result.metric is not None:
        table.add_row(*metric_row(result.metric))
    if result.latency is not None:
        for row in latency_rows(result.latency, result.latency.slower):
            table.add_row(*row)
    return table


def _comparison(
    found: Comparison, max_error: float | None, *, judged: bool = True
) -> Iterator[RenderableType]:
    """The outputs, one a row.

    Args:
        found: the comparison.
        max_error: the error allowed; None where the noise floor decides.
        judged: whether either decides.
    """
    table = make_table("output", "largest", "relative", "noise floor", "floors", "", right=(1, 2, 3, 4))
    for output in found.outputs:
        rows: list[tuple[str, OutputDifference | OutputPart]] = [(shortened(output.name, 28), output)]
        rows += [(f"  {part.elements:,} at scale {three_digits(part.scale)}", part) for part in output.parts]
        for name, row in rows:
            within = row.ratio <= found.multiple if max_error is None else row.relative <= max_error
            fine = within and output.problem is None
            verdict = Text("ok" if fine else "differs", style="green" if fine else "red")
            table.add_row(
                name,
                three_digits(row.max_abs),
                three_digits(row.relative),
                three_digits(row.floor),
                f"{row.ratio:.3g}" if math.isfinite(row.ratio) else "-",
                verdict if judged else Text(),
            )
    yield table
    yield from (paragraph(str(output.problem), 2) for output in found.outputs if output.problem)
    named = ((output.name, part) for output in found.outputs for part in output.parts if part.where)
    yield from (paragraph(f"{shortened(name, 40)}, {part}", 2) for name, part in named)
    sizes = ", ".join(map(str, found.batch_sizes))
    rule = f"{found.multiple:g} noise floors" if max_error is None else f"a relative error of {max_error:g}"
    yield paragraph(f"batches of {sizes}; allowed: {rule}" if judged else f"batches of {sizes}", 2)


def diff_view(result: DiffResult, names: tuple[str, str]) -> Iterator[RenderableType]:
    """Two models side by side; `names` are what the user called them."""
    found = result.structure
    yield fact_table([("A", printable(names[0])), ("B", printable(names[1]))])
    yield Text()
    table = make_table("", "A", "B", "B / A", right=(1, 2, 3))
    for key, before, after, show in cost_rows(*result.costs):
        ratio = f"{after / before:.3f}" if before and after is not None else ""
        table.add_row(key, show(before), show(after), ratio)
    yield table
    yield Text()
    yield paragraph(
        f"{counted(found.same, 'node')} the same, {len(found.changed)} changed, "
        f"{len(found.only_a)} only in A, {len(found.only_b)} only in B"
    )
    yield from _only("only in A", found.only_a)
    yield from _only("only in B", found.only_b)
    if found.changed:
        yield heading("changed")
        for change in found.changed[: 2 * SHOWN]:
            yield from _node_change(change)
        yield from more(2 * SHOWN, len(found.changed), 2)
    if result.outputs is not None:
        yield heading("outputs")
        if result.samples is not None:
            yield paragraph(f"samples: {result.samples.description}", 2)
        yield from (paragraph(problem, 2) for problem in result.outputs.problems)
        if result.outputs.outputs:
            yield from _comparison(result.outputs, None)


def _only(title: str, nodes: Sequence[NodeSummary]) -> Iterator[RenderableType]:
    if nodes:
        yield heading(title)
        for node in nodes[: 2 * SHOWN]:
            yield paragraph(f"{node.op} {shortened(node.key, 60)}", 2)
        yield from more(2 * SHOWN, len(nodes), 2)


def _node_change(change: NodeChange) -> Iterator[RenderableType]:
    yield paragraph(f"{change.op} {shortened(change.key, 60)}", 2)
    for what in (*change.what, *map(_weight_change, change.weights)):
        yield paragraph(what, 6)


def _weight_change(change: WeightChange) -> str:
    name = shortened(change.name, 40)
    if change.shape_a != change.shape_b:
        return f"{name}: {list(change.shape_a)} -> {list(change.shape_b)}"
    if change.relative is None:
        return f"{name}: another type or other values"
    return f"{name} {list(change.shape_a)}: changed by {change.relative:.2g} relative"
