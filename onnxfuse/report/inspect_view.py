"""The inside of a model, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxfuse.report.explain_view import skips_view
from onnxfuse.report.tables import SHOWN, WIDTH, fact_table, heading, make_table, more, paragraph
from onnxfuse.results import described
from onnxfuse.wording import counted, in_bytes, in_macs, milliseconds, printable, shortened

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.analysis.summaries import LinearSummary
    from onnxfuse.results import Inspection


def inspect_view(found: Inspection) -> Iterator[RenderableType]:
    """An inspection, but for channels, growth and similarity, which have views of their own."""
    yield fact_table(_header(found))
    yield heading(counted(found.cost.nodes, "node"))
    yield paragraph(", ".join(f"{count} {op}" for op, count in found.operators.items()), 2)
    if found.linear:
        yield from _linear(found.linear)
    # Of regions with the same linear operators, the last takes in the residual sum.
    regions = list({(region.u, region.sites): region for region in found.regions}.values())
    nested = ", nested ones included" if len(regions) > 1 else ""
    yield heading(f"regions that one affine operator can stand for: {len(regions)}{nested}")
    for region in regions[:SHOWN]:
        yield paragraph(region.text, 2)
    yield from more(SHOWN, len(regions), 2)
    if not found.regions:
        yield from skips_view("linear operators", found.skipped)


def _header(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "model", printable(found.path or "in memory")
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    producer = f", by {found.producer}" if found.producer else ""
    yield "format", printable(f"IR {found.ir_version}, opset {opsets}{producer}")
    if found.metadata:
        yield "metadata", printable(", ".join(found.metadata))
    for kind, infos in (("inputs", found.inputs), ("outputs", found.outputs)):
        for index, info in enumerate(infos[:SHOWN]):
            yield "" if index else kind, f"{printable(info.name)}: {described(info)}"
        if len(infos) > SHOWN:
            yield "", f"and {len(infos) - SHOWN} more"
    yield "parameters", f"{found.cost.parameters:,} ({in_bytes(found.cost.bytes)})"
    at = ", ".join(f"{name} {list(shape)}" for name, shape in found.sizes.items())
    if found.cost.macs is None:
        yield "MACs", printable(f"not known: {found.cost.macs_reason}")
    else:
        yield "MACs", printable(f"{in_macs(found.cost.macs)}" + (f" at {at}" if at else ""))
    if found.latency is not None:
        timing, threads = found.latency.timings[0], counted(found.latency.threads, "thread")
        provider = found.latency.providers[0].removesuffix("ExecutionProvider")
        low, high = (f"{value:.4g}" for value in timing.quartiles_ms)
        yield "latency", f"{milliseconds(timing.median_ms)} ({low} to {high}), {provider}, {threads}"


def _linear(linear: Sequence[LinearSummary]) -> Iterator[RenderableType]:
    yield heading(f"linear operators: {len(linear)}")
    ordered = sorted(linear, key=lambda op: -(op.macs or 0))
    titles = ("  name", "operator", "in -> out", "kernel", "MACs", "share")
    rows = [_linear_row(op) for op in ordered[:SHOWN]]
    columns = zip(titles[1:], *rows, strict=True)
    taken = sum(max(map(len, column)) + 2 for column in columns)
    table = make_table(*titles, right=(4, 5))
    for op, row in zip(ordered, rows, strict=False):
        table.add_row(f"  {shortened(op.name, WIDTH - taken - 2)}", *row)
    yield table
    rest = ordered[SHOWN:]
    if rest:
        shares = [op.share for op in rest if op.share is not None]
        yield paragraph(f"and {len(rest)} more" + (f", {sum(shares):.1%}" if shares else ""), 2)


def _linear_row(op: LinearSummary) -> tuple[str, ...]:
    return (
        op.op if op.kind != "token" else f"{op.op}/token",
        f"{op.in_features} -> {op.out_features}" + (f" /{op.groups}" if op.groups > 1 else ""),
        "x".join(map(str, op.kernel)) + _strides(op.strides),
        in_macs(op.macs),
        "" if op.share is None else f"{op.share:.1%}",
    )


def _strides(strides: tuple[int, ...]) -> str:
    return "" if all(stride == 1 for stride in strides) else f" s{'x'.join(map(str, dict.fromkeys(strides)))}"
