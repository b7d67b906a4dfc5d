"""Reports for people: tables that fit 80 columns, on a terminal, in a pipe or in `report.txt`.

Names come from files that others made. They are shown as they are except for control characters, which
could drive a terminal, and they are never read as markup; long ones keep their end, which tells more than the
start.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from onnxfuse.api import DiffResult, PassInfo, VerifyResult
    from onnxfuse.cost import Cost, Latency
    from onnxfuse.difference import NodeChange, NodeSummary, WeightChange
    from onnxfuse.inspection import Inspection, LinearSummary
    from onnxfuse.pass_manager import Skip, StepReport
    from onnxfuse.report.record import Epoch, FileSize, MetricChange, Report, Retraining, RetrainReport
    from onnxfuse.shapes import TensorInfo
    from onnxfuse.significance import PairedDifference
    from onnxfuse.verification import Comparison

WIDTH = 80
_SHOWN = 10  # entries of a long list
_PLACES = 8  # places shown for one reason


class _Console(Console):
    """A closed pipe is for the caller to handle."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(file: IO[str], **kind: Any) -> Console:
    return _Console(file=file, markup=False, emoji=False, highlight=False, **kind)


def show(view: Iterable[RenderableType], file: IO[str]) -> None:
    """Print a view: with colours on a terminal, else as plain text."""
    screen = _console(file)
    if screen.is_terminal:
        for part in view:
            screen.print(part)
    else:
        file.write(plain_text(view, screen.width))


def plain_text(view: Iterable[RenderableType], width: int = WIDTH) -> str:
    """What a view looks like without colours."""
    buffer = io.StringIO()
    paper = _console(buffer, width=width, color_system=None)
    for part in view:
        paper.print(part)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


# --- words --------------------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """The text without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _name(text: object, width: int) -> str:
    shown = printable(text)
    return shown if len(shown) <= width else f"...{shown[3 - width :]}"


def _scaled(value: float, units: Sequence[str], step: float) -> str:
    index = 0
    while value >= step and index < len(units) - 1:
        value, index = value / step, index + 1
    return f"{value:.0f} {units[index]}".strip() if index == 0 else f"{value:.3g} {units[index]}"


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"), 1000)


def _macs(value: float | None) -> str:
    return "?" if value is None else _scaled(value, ("", "k", "M", "G", "T"), 1000)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


def _shape(info: TensorInfo) -> str:
    dtype = "?" if info.dtype is None else "string" if info.dtype.kind == "O" else str(info.dtype)
    dims = "?" if info.shape is None else ", ".join("?" if d is None else str(d) for d in info.shape)
    return printable(f"{dtype} [{dims}]")


def _count(number: int, what: str, many: str = "") -> str:
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def _table(*columns: str, right: Sequence[int] = (), fold: Sequence[int] = ()) -> Table:
    """A table without lines; `right` are aligned right, `fold` may wrap."""
    table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="bold")
    for index, title in enumerate(columns):
        table.add_column(
            title,
            justify="right" if index in right else "left",
            overflow="fold",
            no_wrap=index not in fold,
        )
    return table


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, Text(value))
    return table


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _line(text: str, indent: int = 0) -> Padding:
    """A paragraph; names that would fill a line by themselves are shortened, both of `first..last`."""
    words = (
        word if len(word) < WIDTH else " .. ".join(_name(part, 36) for part in word.split(".."))
        for word in printable(text).split(" ")
    )
    return Padding(Text(" ".join(words), overflow="fold"), (0, 0, 0, indent), expand=False)


def _more(shown: int, total: int, indent: int = 0) -> Iterator[RenderableType]:
    if total > shown:
        yield _line(f"and {total - shown:,} more", indent)


# --- compress -----------------------------------------------------------------------------------------------


def compress_view(
    report: Report, *, verbose: bool = False, explain: bool = False
) -> Iterator[RenderableType]:
    """A run of `compress`. `verbose` lists every change, `explain` also what was not done and why."""
    yield _facts(_run_facts(report))
    yield Text()
    yield _steps(report.steps)
    yield from (
        _line(f"{step.name}: {note}", 2)
        for step in report.steps
        for note in step.notes
        if not note.startswith("warning: ")
    )
    for number, found in enumerate(report.retrainings, start=1):
        several = f", {number} of {len(report.retrainings)}" if len(report.retrainings) > 1 else ""
        yield from _retraining(found, several)
    if report.output_error is not None or report.before != report.after:
        yield Text()
        yield _costs(report)
    if report.output_error is not None:
        yield from _output_errors(report)
    for step in report.steps:
        if (verbose or explain) and step.changes:
            yield from _changes(step)
        if explain and step.skipped:
            yield from _skips(step.name, step.skipped)


def _run_facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "model", printable(report.model or "in memory")
    yield "samples", printable(report.samples.description)
    provider = report.providers[0].removesuffix("ExecutionProvider")
    yield "runtime", f"{provider}, {_count(report.threads, 'thread')}, seed {report.seed}"


def _steps(steps: Sequence[StepReport]) -> Table:
    table = _table(
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
        said.append(f"{_count(len(found.predictions), 'predicted error')} = measured")
    return ", ".join(said)


def _costs(report: Report) -> Table:
    table = _table("", "before", "after", "change", right=(1, 2), fold=(3,))
    for key, before, after, show in _cost_rows(report.before, report.after):
        ratio = f"x {after / before:.3f}" if before and after is not None else ""
        table.add_row(key, show(before), show(after), ratio)
    if report.files is not None:
        for key, sizes in _file_rows(*report.files):
            table.add_row(key, *map(_bytes, sizes), f"x {sizes[1] / sizes[0]:.3f}")
    if report.latency is not None:
        table.add_row(*_latency_row(report.latency, report.slower))
    if report.metric is not None:
        table.add_row(*_metric_row(report.metric))
    return table


def _cost_rows(before: Cost, after: Cost) -> Iterator[tuple[str, int | None, int | None, Any]]:
    def whole(value: int) -> str:
        return f"{value:,}"

    yield "parameters", before.parameters, after.parameters, whole
    yield "MACs", before.macs, after.macs, _macs
    yield "nodes", before.nodes, after.nodes, whole
    yield "weights", before.bytes, after.bytes, _bytes


def _file_rows(before: FileSize, after: FileSize) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "file", (before.bytes, after.bytes)
    if before.gzipped is not None and after.gzipped is not None:
        yield "gzipped", (before.gzipped, after.gzipped)


def _latency_row(latency: Latency, slower: bool) -> tuple[str, str, str, Text]:
    before, after = latency.timings
    interval = f"x {after.ratio:.3f} (95%: {after.ratio_low:.3f} to {after.ratio_high:.3f})"
    verdict = f"{interval} SLOWER" if slower else interval
    times = _milliseconds(before.median_ms), _milliseconds(after.median_ms)
    return "latency", *times, Text(verdict, style="red" if slower else "")


def _metric_row(metric: MetricChange) -> tuple[str, str, str, str]:
    scores = metric.scores
    said = f"{scores.difference:+.4f} (95%: {scores.low:+.4f} to {scores.high:+.4f}"
    said += ")" if scores.p_value is None else f"; p = {scores.p_value:.2g})"
    return printable(metric.name), f"{scores.before:.4f}", f"{scores.after:.4f}", said


def _output_errors(report: Report) -> Iterator[RenderableType]:
    error = report.output_error
    if error is None:
        return
    where = "held-out samples" if report.samples.held_out else "samples"
    bound = "" if report.output_bound is None else f", {report.output_bound:g} allowed"
    yield _title(f"relative output error on {error.samples} {where}{bound}")
    yield from _output_table({name: _number(value) for name, value in error.outputs.items()})


def _output_table(values: Mapping[str, str]) -> Iterator[RenderableType]:
    table = _table("", "")
    for name, value in list(values.items())[:_SHOWN]:
        table.add_row(f"  {_name(name, 60)}", value)
    yield table
    yield from _more(_SHOWN, len(values), 2)


def _changes(step: StepReport) -> Iterator[RenderableType]:
    yield _title(f"{step.name}: {_count(len(step.changes), 'change')}")
    for what, places in _grouped((change.what, change.nodes) for change in step.changes):
        yield from _group(what, places)


def _skips(name: str, skipped: Sequence[Skip]) -> Iterator[RenderableType]:
    yield _title(f"{name}: {len(skipped):,} not done")
    for reason, places in _grouped((skip.reason, skip.nodes) for skip in skipped):
        yield from _group(reason, places)


# A number that stands by itself, not one that is part of a name or a shape.
_NUMBER = re.compile(r"(?<![^\s(+-])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?=[%)]?(?:[\s;,:]|$))")


def _grouped(
    entries: Iterable[tuple[str, tuple[str, ...]]],
) -> Iterator[tuple[str, list[tuple[str, tuple[str, ...]]]]]:
    """Texts that differ in nothing but numbers become one, with ranges; each place keeps its own numbers."""
    groups: dict[tuple[str, ...], list[tuple[list[str], tuple[str, ...]]]] = {}
    for text, nodes in entries:
        groups.setdefault(tuple(_NUMBER.split(text)), []).append((_NUMBER.findall(text), nodes))
    for words, found in groups.items():
        columns = list(zip(*(numbers for numbers, _ in found), strict=True))
        ranges = [*map(_range, columns), ""]
        varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
        shared = "".join(word + between for word, between in zip(words, ranges, strict=True))
        yield shared, [(", ".join(numbers[index] for index in varying), nodes) for numbers, nodes in found]


def _range(numbers: Sequence[str]) -> str:
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low}..{high}"


def _group(text: str, places: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[RenderableType]:
    """One reason, how often it came up, and where."""
    times = f"{len(places)} x " if len(places) > 1 else ""
    only = _place(places[0][1]) if len(places) == 1 else ""
    if only and len(text) + len(only) + 4 <= WIDTH:
        yield _line(f"{text}  {only}", 2)
        return
    yield _line(f"{times}{text}", 2)
    for numbers, nodes in places[:_PLACES]:
        if nodes:
            yield _line(f"{_place(nodes)}: {numbers}" if numbers else _place(nodes), 6)
    yield from _more(_PLACES, len(places), 6)


def _place(nodes: tuple[str, ...]) -> str:
    if len(nodes) <= 2:
        return " .. ".join(_name(node, 34 if len(nodes) == 2 else 72) for node in nodes)
    return f"{_name(nodes[0], 28)} .. {_name(nodes[-1], 28)} ({len(nodes)} nodes)"


# --- retrain ------------------------------------------------------------------------------------------------


def retrain_view(report: RetrainReport) -> Iterator[RenderableType]:
    """A run of `retrain`."""
    found = report.retraining
    provider = report.providers[0].removesuffix("ExecutionProvider")
    facts = [("model", printable(report.model or "in memory"))]
    if found.teacher is not None:
        facts.append(("teacher", printable(found.teacher)))
    facts.append(("samples", printable(found.samples.description)))
    facts.append(("runtime", f"{provider}, {_count(report.threads, 'thread')}, seed {report.seed}"))
    yield _facts(facts)
    yield from _retraining(found)
    table = _table("", "before", "after", "change", right=(1, 2), fold=(3,))
    if found.loss is not None:
        table.add_row(*_loss_row(found.loss))
        if found.metric is not None:
            table.add_row(*_metric_row(found.metric))
        yield _title(f"in ONNX Runtime, on {found.loss.samples} held-out samples")
        yield table


def _retraining(found: Retraining, which: str = "") -> Iterator[RenderableType]:
    """What was trained, how, and how it went."""
    yield _title(f"retraining{which}")
    yield from (_line(about, 2) for about in found.objective)
    where = found.device if found.processes == 1 else f"{found.processes} x {found.device}"
    decay = f", weight decay {found.weight_decay:g}" if found.weight_decay else ""
    yield _line(
        f"{found.trained:,} parameters on {found.samples.fitted:,} samples, batches of {found.batch_size}, "
        f"{found.optimizer} at {found.lr:g}{decay}, {where}, {found.precision}",
        2,
    )
    if found.resumed is not None:
        yield _line(f"resumed after epoch {found.resumed}", 2)
    yield Text()
    yield _epochs(found)
    if found.stopped is not None:
        yield _line(f"stopped early: {found.stopped}", 2)


def _epochs(found: Retraining) -> Table:
    scored = [_name(found.scored, 20)] if found.scored is not None else []
    titles = ("  epoch", "loss", "held-out loss", *scored, "seconds", "")
    table = _table(*titles, right=range(len(titles) - 1))
    for epoch in _some(found.history, found.best):
        figures = [epoch.loss, epoch.held_out, *([epoch.metric] if scored else [])]
        shown = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        mark = "best" if epoch.number == found.best else "start" if epoch.number == 0 else ""
        table.add_row(str(epoch.number), *shown, f"{epoch.seconds:.1f}", mark)
    return table


def _some(history: Sequence[Epoch], best: int) -> list[Epoch]:
    """All epochs of a short training; of a long one the first, the last, the best, and some between."""
    step = -(-len(history) // (2 * _SHOWN))
    wanted = {*range(0, len(history), step), best, len(history) - 1}
    return [epoch for epoch in history if epoch.number in wanted]


def _loss_row(loss: PairedDifference) -> tuple[str, str, str, str]:
    said = f"{loss.difference:+.4g} (95%: {loss.low:+.4g} to {loss.high:+.4g})"
    return "loss", f"{loss.before:.4g}", f"{loss.after:.4g}", said


# --- inspect ------------------------------------------------------------------------------------------------


def inspect_view(found: Inspection) -> Iterator[RenderableType]:
    """What is in a model."""
    yield _facts(_header(found))
    yield _title(_count(found.cost.nodes, "node"))
    yield _line(", ".join(f"{count} {op}" for op, count in found.operators.items()), 2)
    if found.linear:
        yield from _linear(found.linear)
    # Of regions with the same linear operators, the last takes in the residual sum.
    regions = list({(region.u, region.sites): region for region in found.regions}.values())
    nested = ", nested ones included" if len(regions) > 1 else ""
    yield _title(f"regions that one affine operator can stand for: {len(regions)}{nested}")
    for region in regions[:_SHOWN]:
        yield _line(region.text, 2)
    yield from _more(_SHOWN, len(regions), 2)
    if not found.regions:
        yield from _skips("linear operators", found.skipped)


def _header(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "model", printable(found.path or "in memory")
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    producer = f", by {found.producer}" if found.producer else ""
    yield "format", printable(f"IR {found.ir_version}, opset {opsets}{producer}")
    if found.metadata:
        yield "metadata", printable(", ".join(found.metadata))
    for kind, infos in (("inputs", found.inputs), ("outputs", found.outputs)):
        for index, info in enumerate(infos[:_SHOWN]):
            yield "" if index else kind, f"{printable(info.name)}: {_shape(info)}"
        if len(infos) > _SHOWN:
            yield "", f"and {len(infos) - _SHOWN} more"
    yield "parameters", f"{found.cost.parameters:,} ({_bytes(found.cost.bytes)})"
    at = ", ".join(f"{name} {list(shape)}" for name, shape in found.sizes.items())
    if found.cost.macs is None:
        yield "MACs", printable(f"not known: {found.cost.macs_reason}")
    else:
        yield "MACs", printable(f"{_macs(found.cost.macs)}" + (f" at {at}" if at else ""))
    if found.latency is not None:
        timing, threads = found.latency.timings[0], _count(found.latency.threads, "thread")
        provider = found.latency.providers[0].removesuffix("ExecutionProvider")
        low, high = (f"{value:.3g}" for value in timing.quartiles_ms)
        yield "latency", f"{_milliseconds(timing.median_ms)} ({low} to {high}), {provider}, {threads}"


def _linear(linear: Sequence[LinearSummary]) -> Iterator[RenderableType]:
    yield _title(f"linear operators: {len(linear)}")
    ordered = sorted(linear, key=lambda op: -(op.macs or 0))
    titles = ("  name", "operator", "in -> out", "kernel", "MACs", "share")
    rows = [_linear_row(op) for op in ordered[:_SHOWN]]
    columns = zip(titles[1:], *rows, strict=True)
    taken = sum(max(map(len, column)) + 2 for column in columns)
    table = _table(*titles, right=(4, 5))
    for op, row in zip(ordered, rows, strict=False):
        table.add_row(f"  {_name(op.name, WIDTH - taken - 2)}", *row)
    yield table
    rest = ordered[_SHOWN:]
    if rest:
        shares = [op.share for op in rest if op.share is not None]
        yield _line(f"and {len(rest)} more" + (f", {sum(shares):.1%}" if shares else ""), 2)


def _linear_row(op: LinearSummary) -> tuple[str, ...]:
    return (
        op.op if op.kind != "token" else f"{op.op}/token",
        f"{op.in_features} -> {op.out_features}" + (f" /{op.groups}" if op.groups > 1 else ""),
        "x".join(map(str, op.kernel)) + _strides(op.strides),
        _macs(op.macs),
        "" if op.share is None else f"{op.share:.1%}",
    )


def _strides(strides: tuple[int, ...]) -> str:
    return "" if all(stride == 1 for stride in strides) else f" s{'x'.join(map(str, dict.fromkeys(strides)))}"


# --- verify and diff ----------------------------------------------------------------------------------------


def verify_view(result: VerifyResult) -> Iterator[RenderableType]:
    """Whether two models compute the same, output by output."""
    yield _facts([("samples", printable(result.samples.description))])
    if result.comparison.outputs:
        yield Text()
        yield from _comparison(result.comparison, result.max_error)
    if result.divergence is not None:
        yield _title("first difference")
        yield _line(str(result.divergence).removeprefix("first at "), 2)
    yield Text()
    yield Text("same" if result.passed else "different", style="bold green" if result.passed else "bold red")


def _comparison(found: Comparison, max_error: float | None) -> Iterator[RenderableType]:
    table = _table("output", "largest", "relative", "noise floor", "floors", "", right=(1, 2, 3, 4))
    for output in found.outputs:
        within = (
            output.ratio <= found.multiple if max_error is None else output.relative <= max_error
        ) and output.problem is None
        table.add_row(
            _name(output.name, 28),
            _number(output.max_abs),
            _number(output.relative),
            _number(output.floor),
            f"{output.ratio:.3g}" if math.isfinite(output.ratio) else "-",
            Text("ok" if within else "differs", style="green" if within else "red"),
        )
    yield table
    yield from (_line(str(output.problem), 2) for output in found.outputs if output.problem)
    sizes = ", ".join(map(str, found.batch_sizes))
    rule = f"{found.multiple:g} noise floors" if max_error is None else f"a relative error of {max_error:g}"
    yield _line(f"batches of {sizes}; allowed: {rule}", 2)


def diff_view(result: DiffResult, names: tuple[str, str]) -> Iterator[RenderableType]:
    """Two models side by side; `names` are what the user called them."""
    found = result.structure
    yield _facts([("A", printable(names[0])), ("B", printable(names[1]))])
    yield Text()
    table = _table("", "A", "B", "B / A", right=(1, 2, 3))
    for key, before, after, show in _cost_rows(*result.costs):
        ratio = f"{after / before:.3f}" if before and after is not None else ""
        table.add_row(key, show(before), show(after), ratio)
    yield table
    yield Text()
    yield _line(
        f"{_count(found.same, 'node')} the same, {len(found.changed)} changed, "
        f"{len(found.only_a)} only in A, {len(found.only_b)} only in B"
    )
    yield from _only("only in A", found.only_a)
    yield from _only("only in B", found.only_b)
    if found.changed:
        yield _title("changed")
        for change in found.changed[: 2 * _SHOWN]:
            yield from _node_change(change)
        yield from _more(2 * _SHOWN, len(found.changed), 2)
    if result.outputs is not None:
        yield _title("outputs")
        yield from (_line(problem, 2) for problem in result.outputs.problems)
        if result.outputs.outputs:
            yield from _comparison(result.outputs, None)


def _only(title: str, nodes: Sequence[NodeSummary]) -> Iterator[RenderableType]:
    if nodes:
        yield _title(title)
        for node in nodes[: 2 * _SHOWN]:
            yield _line(f"{node.op} {_name(node.key, 60)}", 2)
        yield from _more(2 * _SHOWN, len(nodes), 2)


def _node_change(change: NodeChange) -> Iterator[RenderableType]:
    yield _line(f"{change.op} {_name(change.key, 60)}", 2)
    for what in (*change.what, *map(_weight_change, change.weights)):
        yield _line(what, 6)


def _weight_change(change: WeightChange) -> str:
    name = _name(change.name, 40)
    if change.shape_a != change.shape_b:
        return f"{name}: {list(change.shape_a)} -> {list(change.shape_b)}"
    if change.relative is None:
        return f"{name}: another type or other values"
    return f"{name} {list(change.shape_a)}: changed by {change.relative:.2g} relative"


# --- passes -------------------------------------------------------------------------------------------------


def passes_view(infos: Sequence[PassInfo]) -> Iterator[RenderableType]:
    """What passes there are, and their options."""
    for index, info in enumerate(infos):
        head = Text("\n" if index else "").append(info.name, style="bold").append(f"  ({info.contract})")
        yield Group(head, _line(info.summary, 2))
        if info.options:
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for option in info.options:
                said = f"{option.help} ({option.type}; default {option.default})"
                table.add_row(f"    {option.name}", Text(said))
            yield table
        yield _line(f"example: --passes {info.example}", 2)
