"""`inspect`: the inside of a model.

Everything that is true of the file is always told. What needs a run (sizes of dynamic dimensions, hence
multiply-accumulates and latency) is left out where ONNX Runtime can't run the model, and a warning says why.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from onnxfuse.analysis import layer_similarity
from onnxfuse.analysis.cost import DECLARED_ONLY, Cost, count, measure, node_macs, shapes_at
from onnxfuse.analysis.declarations import contradiction_warnings
from onnxfuse.analysis.regions.region import Region, describe_region
from onnxfuse.analysis.regions.search import find_regions
from onnxfuse.analysis.summaries import LinearSummary, RegionSummary
from onnxfuse.channels.groups import find_groups
from onnxfuse.channels.summary import summarize_groups
from onnxfuse.commands.loading import ModelSource, PathOrText, file_of, load
from onnxfuse.data.calibration import Calibration, Data
from onnxfuse.data.rows import few_rows
from onnxfuse.errors import InputError, NotApplicableError, OnnxfuseError, unknown_name
from onnxfuse.growth import plan as growing
from onnxfuse.ir.model import Model
from onnxfuse.ir.protos import DEFAULT_DOMAINS, bodies
from onnxfuse.numerics.similarity import CRITERIA, Criterion
from onnxfuse.ops.finite import check_finite
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.report import plots
from onnxfuse.results import Inspection
from onnxfuse.runtime.latency import Latency, latency
from onnxfuse.runtime.observed_shapes import shapes_on
from onnxfuse.runtime.session import Runtime

if TYPE_CHECKING:
    import onnx

    from onnxfuse.ir.model import Feed


def inspect(
    model: ModelSource,
    *,
    calib: Data = None,
    measure_latency: bool = True,
    channels: bool = False,
    growth: bool = False,
    similarity: str | None = None,
    heads: bool = False,
    plot: PathOrText | None = None,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> Inspection:
    """The inside of a model: header, operators, cost, linear operators, regions that could be fused.

    What needs a run is left out where ONNX Runtime can't run the model, and a warning says why. The time is
    linear in the number of nodes, but for `channels`, `growth` and `similarity`.

    Args:
        model: is left as it is.
        calib: samples whose sizes count for MACs and latency; None makes one up. A model that can't be run
            on made-up samples is inspected without.
        measure_latency: whether to run the model for its latency.
        channels: whether to find the groups of coupled channels, too.
        growth: whether to find where the network can grow, too.
        similarity: the criterion by which to tell how alike the layers are, too; of
            `onnxfuse.numerics.similarity.CRITERIA`.
        heads: whether to take the layers of attentions apart into heads for that.
        plot: where to write a picture of it, a .png; needs Matplotlib.
        provider, threads: of ONNX Runtime.
        seed: of made-up samples, and of the criterion "centroids".

    Raises:
        InputError: a bad file or bad samples; the picture can't be drawn or written.
    """
    criterion = _criterion(similarity, heads, plot)
    found = load(model)
    if plot is not None:
        plots.check_plot(Path(plot), file_of(found))
    runtime = Runtime(provider, threads)
    several, feed, warnings = _feeds(found, calib, runtime, seed)
    groups = find_groups(found, several, runtime) if channels or growth else None
    alike = None if criterion is None else layer_similarity.similarities(found, criterion, heads, seed)
    if plot is not None and alike:
        plots.heat_maps(alike, Path(plot))
    elif plot is not None:
        warnings.append("no two layers can be compared: nothing was plotted")
    warnings += _weight_warnings(found)
    feed, cost, unknown = _cost(found, feed, runtime, tried=calib is None)
    regions, skipped = find_regions(found, shapes_on(found, feed, runtime))
    source = found.source
    return Inspection(
        path=str(found.path) if found.path else None,
        ir_version=source.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in source.opset_import},
        producer=f"{source.producer_name} {source.producer_version}".strip(),
        metadata=found.notes(),
        inputs=tuple(found.inputs),
        outputs=tuple(found.outputs),
        operators=_operators(source.graph),
        cost=cost,
        sizes={name: array.shape for name, array in (feed or {}).items()},
        linear=_linear(found, feed, cost, runtime),
        regions=tuple(_region(region) for region in regions),
        skipped=tuple(skipped),
        latency=_latency(found, feed, runtime) if measure_latency else None,
        channels=summarize_groups(groups) if groups is not None and channels else None,
        warnings=(*warnings, *unknown),
        growth=growing.growth_sites(found, groups) if groups is not None and growth else None,
        similarity=alike,
    )


def _feeds(
    model: Model, calib: Data, runtime: Runtime, seed: int
) -> tuple[Feed | None, Feed | None, list[str]]:
    """A batch of samples, one sample, and warnings; None for both where none can be made up."""
    limit = None if calib is not None else 2
    try:
        calibration = Calibration.open(calib, model, limit=limit, held_out=0.0, seed=seed)
        several = next(iter(calibration.fit)).feed
        return several, few_rows(model, calibration.fit, 1, runtime), []
    except OnnxfuseError as error:
        if calib is not None:
            raise
        return None, None, [str(error)]


def _weight_warnings(model: Model) -> list[str]:
    try:
        check_finite(model)
    except InputError as error:
        return [f"{error}: compress will refuse the model"]
    return []


def _cost(
    model: Model, feed: Feed | None, runtime: Runtime, *, tried: bool
) -> tuple[Feed | None, Cost, list[str]]:
    """The cost at the sizes of `feed`, with `feed` and warnings: None where the model doesn't run on it.

    Args:
        model: the model.
        feed: one sample, None without.
        runtime: runs it.
        tried: whether the model is known to run on it, as on made-up samples.
    """
    said = []
    if feed is not None:
        try:
            if not tried:
                runtime.session(model, optimize=False).run(feed)
            cost = measure(model, feed, runtime)
            return feed, cost, contradiction_warnings(model, feed, runtime)
        except NotApplicableError as error:
            said.append(str(error))
    cost = count(model, model.shapes())
    if cost.macs is not None:
        said.append(DECLARED_ONLY)
    return None, cost, said


def _latency(model: Model, feed: Feed | None, runtime: Runtime) -> Latency | None:
    return None if feed is None else latency([model], runtime, feed, seconds=1.0)


def _criterion(name: str | None, heads: bool, plot: PathOrText | None) -> Criterion | None:
    """The criterion of that name; refuses what only means something with one."""
    for asked, option in ((heads, "heads"), (plot is not None, "plot")):
        if asked and name is None:
            raise InputError(f"--{option} needs --similarity")
    found = next((criterion for criterion in CRITERIA if criterion == name), None)
    if name is not None and found is None:
        raise InputError(unknown_name("criterion", name, CRITERIA))
    return found


def _operators(graph: onnx.GraphProto) -> dict[str, int]:
    """Nodes by operator, the most frequent first."""
    counts: Counter[str] = Counter()
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            counts[node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}"] += 1
            stack.extend(bodies(node))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _linear(model: Model, feed: Feed | None, cost: Cost, runtime: Runtime) -> tuple[LinearSummary, ...]:
    shapes = model.shapes() if feed is None else shapes_at(model, feed, runtime)
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
    return RegionSummary(
        describe_region(region), region.u, region.v, region.kind, region.linear_ops, region.sites
    )
