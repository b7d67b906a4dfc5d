"""Axes through operators that repeat elements, or look them up."""

from __future__ import annotations

from collections.abc import Mapping

from onnxfuse.channels.dims import Axis, equal, is_dynamic, product_of
from onnxfuse.channels.lengths import dims_of
from onnxfuse.channels.rules.shaping import arranged
from onnxfuse.channels.site import SINGLE, Axes, ChannelNode, ChannelRule, FlatView, StopRuleError
from onnxfuse.ops.table import Key


def _made_of(site: ChannelNode, slot: int, entry: int, size: Axis) -> Axis:
    """An axis whose length is an element of an input: that of another axis, or one of its own."""
    known = site.numbers(slot)
    assert known is not None
    tag = known.tags.reshape(-1)[entry]
    if isinstance(tag, Axis):
        own = tag
    elif any(map(is_dynamic, dims_of(tag))):
        own = size
    else:
        own = site.fresh(size.size, frozen=SINGLE if size.size == 1 else None)
    site.number(own, slot=slot, entry=entry)
    return own


def _constant_of_shape(site: ChannelNode) -> list[Axes | None]:
    known, sizes = site.numbers(0), site.sizes()
    if known is None or known.value.size != len(sizes):
        return [sizes]
    return [tuple(_made_of(site, 0, entry, size) for entry, size in enumerate(sizes))]


def _expand(site: ChannelNode) -> list[Axes | None]:
    axes, sizes = site.axes(0), site.sizes()
    known = site.numbers(1)
    if known is None or known.value.size > len(sizes):
        raise StopRuleError("its shape is computed from data")
    result = []
    for axis in range(-len(sizes), 0):
        entry = known.value.size + axis
        own = axes[axis] if len(axes) >= -axis else None
        if own is not None and (own.size != 1 or sizes[axis].size == 1):
            result.append(own)
            if entry >= 0 and known.value[entry] != 1:
                site.number(own, slot=1, entry=entry)
        else:
            result.append(_made_of(site, 1, entry, sizes[axis]))
    return [tuple(result)]


def _tile(site: ChannelNode) -> list[Axes | None]:
    axes, sizes = site.axes(0), site.sizes()
    known = site.numbers(1)
    if known is None:
        raise StopRuleError("its repeats are computed from data")
    result = []
    for entry, dim in enumerate(axes):
        times = int(known.value[entry])
        if times == 1:
            result.append(dim)
        elif dim.size == 1 and not is_dynamic(dim):
            result.append(_made_of(site, 1, entry, sizes[entry]))
        else:
            repeated = site.fresh(times, position=True, frozen="repeats of Tile")
            repeated.dynamic = known.tags[entry] is not None
            result.append(product_of([repeated, dim]))
    return [tuple(result)]


def _viewed(site: ChannelNode) -> Axes | None:
    """The axes of a Gather that reads a flat tensor from its first element to its last; None of others."""
    data, grid = site.axes(0), site.system.grid_of(site.node.inputs[1])
    if len(data) != 1 or grid is None or not grid.counts(data[0].size):
        return None
    made = arranged(site, data, site.sizes())
    for dim, tag in zip(made, grid.tags, strict=True):
        if is_dynamic(dim) and (tag is None or not equal(dim, tag)):
            return None
    site.system.views.append(FlatView(site.output, made))
    return made


def _gather(site: ChannelNode) -> list[Axes | None]:
    if (made := _viewed(site)) is not None:
        return [made]
    data, indices = site.axes(0), site.axes(1)
    axis = site.axis("axis", 0, len(data))
    site.freeze((data[axis],), "its indices are looked up")
    for other in range(len(data)):
        if other != axis:
            site.weight(0, other, "producer")
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _trilu(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    site.freeze(axes[-2:], "Trilu depends on places")
    return [axes]


RULES: Mapping[Key, ChannelRule] = {
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Expand"): _expand,
    ("", "Tile"): _tile,
    ("", "Gather"): _gather,
    ("", "Trilu"): _trilu,
}
