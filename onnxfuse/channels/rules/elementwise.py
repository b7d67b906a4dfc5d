"""Axes through operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxfuse.channels.dims import Axis
from onnxfuse.channels.site import Axes, ChannelNode, ChannelRule, StopRuleError
from onnxfuse.ops.channel_affine import training_mode
from onnxfuse.ops.table import OPS, Key, Kind


def broadcast(site: ChannelNode, operands: Sequence[Axes]) -> Axes:
    """The axes of tensors that meet element by element: aligned at the end, those of size 1 repeated."""
    rank = max(map(len, operands), default=0)
    result: list[Axis] = []
    for axis in range(-rank, 0):
        own = [axes[axis] for axes in operands if len(axes) >= -axis]
        wide = [dim for dim in own if dim.size != 1] or own[:1]
        for dim in wide[1:]:
            site.same(wide[0], dim)
        result.append(wide[0])
    return tuple(result)


def _elementwise(site: ChannelNode) -> list[Axes | None]:
    row = OPS.get(*site.key)
    assert row is not None
    count = row.operands
    operands = [site.axes(slot) for slot in site.data() if count is None or slot < count]
    if site.opset < 7 and len(set(map(len, operands))) > 1:
        raise StopRuleError("broadcasting by the rules of an old operator set")
    return [broadcast(site, operands)]


def _dropout(site: ChannelNode) -> list[Axes | None]:
    if site.has(2):
        training = site.numbers(2)
        if training is None or not training.fixed or training.value.any():
            raise StopRuleError("Dropout in training mode")
    return [site.axes(0), site.axes(0)]


def _batch_norm(site: ChannelNode) -> list[Axes | None]:
    if training_mode(site.node):
        raise StopRuleError("BatchNormalization in training mode mixes its statistics from batches")
    axes = site.axes(0)
    if len(axes) < 2:
        raise StopRuleError("BatchNormalization of a vector")
    for slot in range(1, 5):
        site.same(axes[1], site.axes(slot)[0])
        site.weight(slot, 0, "along")
    return [axes]


def _quantized(site: ChannelNode) -> list[Axes | None]:
    """QuantizeLinear and DequantizeLinear, a scale for the whole tensor or for each index of an axis."""
    axes = site.axes(0)
    if site.attribute("block_size", 0):
        raise StopRuleError("blocked quantization")
    for slot in (1, 2):
        if site.has(slot) and len(site.axes(slot)) == 1 and site.axes(slot)[0].size != 1:
            site.same(axes[site.axis("axis", 1, len(axes))], site.axes(slot)[0])
    return [axes]


DEFAULTS: Mapping[Kind, ChannelRule] = dict.fromkeys((Kind.ACTIVATION, Kind.ELEMENTWISE), _elementwise)

RULES: Mapping[Key, ChannelRule] = {
    ("", "Dropout"): _dropout,
    ("", "BatchNormalization"): _batch_norm,
    ("", "QuantizeLinear"): _quantized,
    ("", "DequantizeLinear"): _quantized,
}
