"""Axes through reductions, normalizations, softmax and pooling.

A sum over channels does not see a channel that is zero. A mean does, by its divisor: there, and in
normalizations built on means, the channels that are left get the statistics of those that are left, and the
site says so ("mean", "norm", "rms norm"). A maximum or minimum becomes that of the channels that are left. A
softmax or a product over channels is another function without some of them: those channels are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxfuse.channels.dims import factor
from onnxfuse.channels.site import SINGLE, Axes, ChannelNode, ChannelRule, SinkKind, StopRuleError
from onnxfuse.ops.table import Key, Kind

_COMBINED: Mapping[str, SinkKind] = {
    "ReduceSum": "sum",
    "ReduceL1": "sum",
    "ReduceL2": "sum",
    "ReduceSumSquare": "sum",
    "ReduceLogSum": "sum",
    "ReduceMean": "mean",
    "ReduceMax": "max",
    "ReduceMin": "min",
}


def _reduce(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    listed = site.integers(1, "axes")
    if not listed:
        if site.attribute("noop_with_empty_axes", 0):
            return [axes]
        listed = list(range(len(axes)))
    reduced = {axis % len(axes) for axis in listed}
    for axis in sorted(reduced):
        if site.op in _COMBINED:
            site.sums(0, axis, _COMBINED[site.op])
        else:
            site.freeze((axes[axis],), f"{site.op} over it")
    if site.attribute("keepdims", 1):
        return [tuple(site.fresh(1, frozen=SINGLE) if i in reduced else d for i, d in enumerate(axes))]
    return [tuple(d for i, d in enumerate(axes) if i not in reduced)]


def _arg(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    axis = site.axis("axis", 0, len(axes))
    if site.used_output(0):
        site.freeze((axes[axis],), f"{site.op} over it")
    kept = (site.fresh(1, frozen=SINGLE),) if site.attribute("keepdims", 1) else ()
    return [(*axes[:axis], *kept, *axes[axis + 1 :])]


def _softmax(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    if site.opset >= 13:
        over = axes[site.axis("axis", -1, len(axes)) :][:1]
    else:
        over = axes[site.axis("axis", 1, len(axes)) :]
    site.freeze(over, f"{site.op} over it")
    return [axes]


def _along(site: ChannelNode) -> list[Axes | None]:
    """CumSum, CumProd: they mix the positions of one axis and leave the tensor's shape."""
    axes = site.axes(0)
    axis = (site.integers(1, "axis") or [0])[0] % len(axes)
    site.freeze((axes[axis],), f"{site.op} along it")
    return [axes]


def _lp_normalization(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    site.sums(0, site.axis("axis", -1, len(axes)))
    return [axes]


def _layer_norm(site: ChannelNode) -> list[Axes | None]:
    """LayerNormalization and RMSNormalization: over the last axes, from `axis` on."""
    axes = site.axes(0)
    kind: SinkKind = "norm" if site.op == "LayerNormalization" else "rms norm"
    first = site.axis("axis", -1, len(axes))
    if site.used_output(1) or site.used_output(2):
        site.freeze(axes[first:], "its mean or deviation is used elsewhere")
    for axis in range(first, len(axes)):
        site.sums(0, axis, kind)
        for slot in (1, 2):
            own = site.axes(slot) if site.has(slot) else ()
            offset = axis - len(axes)
            if len(own) >= -offset and own[offset].size != 1:
                site.same(axes[axis], own[offset])
                site.weight(slot, len(own) + offset, "along")
    return [axes, None, None]


def _instance_norm(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    for axis in range(2, len(axes)):
        site.sums(0, axis, "norm")
    for slot in (1, 2):
        site.same(axes[1], site.axes(slot)[0])
        site.weight(slot, 0, "along")
    return [axes]


def _group_norm(site: ChannelNode) -> list[Axes | None]:
    """Whole groups can go; a channel of a group has a share in the statistics of the others. Scale and bias
    have a value for each group before opset 21, then for each channel."""
    axes = site.axes(0)
    groups = int(site.attribute("num_groups"))
    group, inner = site.divided(factor, axes[1], [groups, axes[1].size // groups])
    site.freeze((inner,), "GroupNormalization takes statistics over it")
    site.number(group, attribute="num_groups")
    for slot in (1, 2):
        site.same(group if site.opset < 21 else axes[1], site.axes(slot)[0])
        site.weight(slot, 0, "along")
    return [axes]


def _local_response(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    site.freeze(axes[1:2], "LRN mixes neighboring channels")
    return [axes]


def _mean_variance(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    for axis in site.attribute("axes", [0, 2, 3]):
        site.freeze((axes[int(axis)],), "MeanVarianceNormalization takes statistics over it")
    return [axes]


def _pool(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    if site.used_output(1):
        raise StopRuleError("MaxPool tells where it found its maxima, counted over all channels")
    site.freeze(axes[2:], "a window slides over it")
    places = () if site.op.startswith("Global") else axes[2:]
    return [(*axes[:2], *site.sizes(of=places)[2:]), None]


DEFAULTS: Mapping[Kind, ChannelRule] = {
    Kind.REDUCE: _reduce,
    Kind.SOFTMAX: _softmax,
    Kind.CUMULATIVE: _along,
    Kind.POOL: _pool,
}

RULES: Mapping[Key, ChannelRule] = {
    **{("", op): _arg for op in ("ArgMax", "ArgMin")},
    **{(domain, "LayerNormalization"): _layer_norm for domain in ("", "com.microsoft")},
    ("", "RMSNormalization"): _layer_norm,
    ("", "SimplifiedLayerNormalization"): _layer_norm,
    ("", "InstanceNormalization"): _instance_norm,
    ("", "GroupNormalization"): _group_norm,
    ("", "LpNormalization"): _lp_normalization,
    ("", "LRN"): _local_response,
    ("", "MeanVarianceNormalization"): _mean_variance,
}
