"""Axes through ONNX's Attention operator: heads, and dimensions of a head, of queries, keys and values.

With grouped queries every key head serves several query heads in a row, so the query heads are a product, key
heads x repeats. The scores are scaled by the root of a head's size, which must stay what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from onnxfuse.channels.dims import Axis, factor, product_of
from onnxfuse.channels.rules.elementwise import broadcast
from onnxfuse.channels.site import Axes, ChannelNode, ChannelRule, Pin, StopRuleError
from onnxfuse.ops.table import Key


def _attention(site: ChannelNode) -> list[Axes | None]:
    queries, keys, values = (_heads(site, slot) for slot in range(3))
    batch, heads, rows, size = queries
    _, key_heads, columns, key_size = keys
    for first, second in ((key_heads, values[1]), (columns, values[2]), (size, key_size)):
        site.same(first, second)
    if heads.size % key_heads.size:
        raise StopRuleError("its query heads are no multiple of its key heads")
    served, _ = site.divided(factor, heads, [key_heads.size, heads.size // key_heads.size])
    site.same(served, key_heads)
    site.freeze((rows, columns), "its places attend to each other")
    for slot, (axis, own) in {4: (3, size), 5: (3, values[3])}.items():
        if site.has(slot):  # keys and values of the past
            site.same(site.axes(slot)[1], key_heads)
            site.same(site.axes(slot)[axis], own)
    for slot in (0, 1):
        site.sums(slot, len(site.axes(slot)) - 1, part=size)
    if "scale" not in site.node.attrs:
        scale = 1 / math.sqrt(size.size)
        site.system.pins.append(Pin(site.output, frozenset((size,)), attribute="scale", value=scale))
    scores: Axes = (batch, heads, rows, columns)
    if site.has(3):
        broadcast(site, [scores, site.axes(3)])
    result: Axes = (batch, heads, rows, values[3])
    if len(site.axes(0)) == 3:
        site.number(heads, attribute="q_num_heads")
        site.number(key_heads, attribute="kv_num_heads")
        result = (batch, rows, product_of([heads, values[3]]))
    past = (site.sizes(1)[2], site.sizes(2)[2]) if site.used_output(1) else (columns, columns)
    kept = [(batch, key_heads, past[0], size), (batch, key_heads, past[1], values[3])]
    return [result, *kept, scores]


def _heads(site: ChannelNode, slot: int) -> tuple[Axis, Axis, Axis, Axis]:
    """Batch, heads, places and size of a head of an input, which has them apart or heads and size merged."""
    axes = site.axes(slot)
    if len(axes) == 4:
        return axes[0], axes[1], axes[2], axes[3]
    count = int(site.attribute("q_num_heads" if slot == 0 else "kv_num_heads"))
    heads, size = site.divided(factor, axes[2], [count, axes[2].size // count])
    return axes[0], heads, axes[1], size


RULES: Mapping[Key, ChannelRule] = {("", "Attention"): _attention}
