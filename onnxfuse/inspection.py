"""What is in a model: header, operators, cost, linear operators, regions that could be fused.

Everything that is true of the file is always told. What needs a run (sizes of dynamic dimensions, hence
multiply-accumulates and latency) is left out where ONNX Runtime can't run the model, and a warning says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxfuse.channels.summary import GroupSummary
from onnxfuse.cost import Cost, Latency, count, dimension_sizes, latency, node_macs, shapes_at
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.graph import DEFAULT_DOMAINS, Feed, Model, TensorInfo
from onnxfuse.growth import GrowthSite
from onnxfuse.likeness import Likeness
from onnxfuse.linear import LinearOp, linear_op
from onnxfuse.protos import bodies
from onnxfuse.regions import Region, describe, find_regions

if TYPE_CHECKING:
    import onnx

    from onnxfuse.findings import Skip
    from onnxfuse.runtime import Runtime


@dataclass(frozen=True)
class LinearSummary:
    """One operator that multiplies by constant weights. `macs` at the inspected sizes, None where unknown;
    `share` of the model's."""

    name: str
    op: str
    kind: str
    in_features: int
    out_features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int
    macs: int | None
    share: float | None


@dataclass(frozen=True)
class RegionSummary:
    """One region that an affine operator could stand for: the text of `regions.describe`, its tensors, and
    the linear operators inside. Regions nest and overlap, so there are more than can be fused."""

    text: str
    u: str
    v: str
    kind: str
    linear_ops: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

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


def examine(
    model: Model,
    feed: Feed | None,
    runtime: Runtime | None,
    channels: tuple[GroupSummary, ...] | None,
    warnings: tuple[str, ...],
    growth: tuple[GrowthSite, ...] | None = None,
    similarity: tuple[Likeness, ...] | None = None,
) -> Inspection:
    """Gather everything, in time linear in the number of nodes.

    Args:
        model: is not changed.
        feed: one sample of every input; None leaves out what needs a run.
        runtime: where latency is measured; None leaves it out.
        channels: the groups of coupled channels, if somebody asked for them.
        warnings: to go with the result.
        growth: where the network can grow, if somebody asked for it.
        similarity: how alike its layers are, if somebody asked for it.
    """
    try:
        model.check_finite()
    except InputError as error:
        warnings = (*warnings, f"{error}: compress will refuse the model")
    try:
        cost = count(model, model.shapes(feed), dimension_sizes(model, feed or {}))
    except NotApplicableError as error:
        warnings, feed = (*warnings, str(error)), None
        cost = count(model, model.shapes())
    linear = _linear(model, feed, cost)
    regions, skipped = find_regions(model, model.shapes(feed))
    timed = None
    if feed is not None and runtime is not None:
        timed = latency([model], runtime, feed, repeats=50, seconds=3.0)
    source = model.source
    return Inspection(
        path=str(model.path) if model.path else None,
        ir_version=source.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in source.opset_import},
        producer=f"{source.producer_name} {source.producer_version}".strip(),
        metadata={p.key: p.value for p in source.metadata_props},
        inputs=tuple(model.inputs),
        outputs=tuple(model.outputs),
        operators=_operators(source.graph),
        cost=cost,
        sizes={name: array.shape for name, array in (feed or {}).items()},
        linear=linear,
        regions=tuple(_region(region) for region in regions),
        skipped=tuple(skipped),
        latency=timed,
        channels=channels,
        warnings=warnings,
        growth=growth,
        similarity=similarity,
    )


def _operators(graph: onnx.GraphProto) -> dict[str, int]:
    """Nodes by operator, the most frequent first."""
    counts: Counter[str] = Counter()
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            counts[node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}"] += 1
            stack.extend(bodies(node))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _linear(model: Model, feed: Feed | None, cost: Cost) -> tuple[LinearSummary, ...]:
    shapes = model.shapes() if feed is None else shapes_at(model, feed)
    found = []
    for node in model.nodes:
        op = linear_op(model, node, shapes, transposed=True)
        if isinstance(op, LinearOp):
            macs = node_macs([node], shapes, model.opset)
            share = macs / cost.macs if macs is not None and cost.macs else None
            found.append(_summary(op, macs, share))
    return tuple(found)


def _summary(op: LinearOp, macs: int | None, share: float | None) -> LinearSummary:
    return LinearSummary(
        name=op.name,
        op=op.node.op,
        kind=op.kind,
        in_features=op.in_features,
        out_features=op.out_features,
        kernel=op.kernel,
        strides=op.strides,
        groups=op.groups,
        macs=macs,
        share=share,
    )


def _region(region: Region) -> RegionSummary:
    return RegionSummary(describe(region), region.u, region.v, region.kind, region.linear_ops, region.sites)
