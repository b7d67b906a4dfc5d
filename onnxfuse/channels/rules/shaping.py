"""Axes through operators that move elements: reshaping, joining, dividing, resizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxfuse.channels.dims import (
    Axis,
    AxisKind,
    ClashError,
    factor,
    find,
    is_dynamic,
    is_position,
    kind,
    leaves,
    product_of,
    segment,
    sum_of,
)
from onnxfuse.channels.lengths import dims_of
from onnxfuse.channels.site import (
    SINGLE,
    Axes,
    ChannelNode,
    ChannelRule,
    EvenSplit,
    StopRuleError,
)
from onnxfuse.ops.table import Key
from onnxfuse.ops.view import TO_THE_END


def _settled(dim: Axis) -> bool:
    """Whether nothing of it can be taken any more, so that following its parts is of no use."""
    return all(leaf.frozen for leaf in leaves(dim))


def _like(site: ChannelNode, size: int, dims: Sequence[Axis]) -> Axis:
    """A frozen axis made from frozen ones."""
    every = [leaf for dim in dims for leaf in leaves(dim)]
    telling = sorted(every, key=lambda leaf: (leaf.position, leaf.size == 1))  # stable: the first that tells
    reason = telling[0].frozen if telling else SINGLE
    made = site.fresh(size, position=all(map(is_position, dims)), frozen=reason)
    made.dynamic = any(map(is_dynamic, dims))
    return made


# Reshaping ----------------------------------------------------------------------------------------


def arranged(site: ChannelNode, dims: Sequence[Axis], sizes: Sequence[Axis]) -> Axes:
    """The axes of a tensor with the same elements in the same order: where a run of axes has as many elements
    as a run of new ones, these are its factors.

    Args:
        site: the node.
        dims: the axes of its input.
        sizes: the new axes, as `site.sizes` gives them.
    """
    result: list[Axis] = []
    ins, outs = list(dims), list(sizes)
    while outs:
        if ins and ins[0].size == outs[0].size:
            result.append(ins.pop(0))
            outs.pop(0)
            continue
        if outs[0].size == 1:
            result.append(outs.pop(0))
            continue
        have, want = [], [outs.pop(0)]
        left, right = 1, want[0].size
        while left != right:
            if left < right and ins:
                have.append(ins.pop(0))
                left *= have[-1].size
            elif left > right and outs:
                want.append(outs.pop(0))
                right *= want[-1].size
            else:
                raise StopRuleError("it has not as many elements as before")
        result.extend(_refactored(site, have, want))
    for dim in ins:  # of size 1
        site.freeze((dim,), "a single index is merged with others")
    return tuple(result)


def _refactored(site: ChannelNode, have: Sequence[Axis], want: Sequence[Axis]) -> Sequence[Axis]:
    if all(map(_settled, have)):
        return _alike(site, have, want)
    try:
        made = factor(product_of(have), [dim.size for dim in want])
    except ClashError as clash:
        site.freeze(have, str(clash))
        return _alike(site, have, want)
    for dim, size in zip(made, want, strict=True):
        if kind(dim) is AxisKind.LEAF and not size.dynamic:
            find(dim).dynamic = False  # rows of a dynamic axis, of a size that is written down
    return made


def _alike(site: ChannelNode, have: Sequence[Axis], want: Sequence[Axis]) -> list[Axis]:
    """Frozen axes of these sizes, made from frozen ones; those of sizes that are written down are static."""
    made = [_like(site, dim.size, have) for dim in want]
    for dim, size in zip(made, want, strict=True):
        dim.dynamic = dim.dynamic and size.dynamic
    return made


def _reshape(site: ChannelNode) -> list[Axes | None]:
    axes, sizes = site.axes(0), site.sizes()
    asked = site.numbers(1)
    if asked is not None and asked.value.size == len(sizes):
        for dim, size, tag in zip(sizes, asked.value.flat, asked.tags.flat, strict=True):
            dim.dynamic = dim.dynamic and not (size > 0 and tag is None)
    result = arranged(site, axes, sizes)
    if "shape" in site.node.attrs:
        for entry, (size, dim) in enumerate(zip(site.attribute("shape"), result, strict=True)):
            if size > 0:
                site.number(dim, attribute="shape", entry=entry)
        return [result]
    target = site.numbers(1)
    if target is None or target.value.size != len(result):
        raise StopRuleError("its target is computed from data")
    values = target.value.tolist()
    for entry, (size, dim) in enumerate(zip(values, result, strict=True)):
        copied = size == 0 and not site.attribute("allowzero", 0)
        if copied and find(axes[entry]) is not find(dim):
            site.freeze((axes[entry], dim), "a size is copied to another axis")
        if size != -1 and not copied:
            site.number(dim, slot=1, entry=entry, inferable=-1 not in values)
    return [result]


def _flatten(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    axis = int(site.attribute("axis", 1))
    axis += len(axes) if axis < 0 else 0
    return [(product_of(axes[:axis]), product_of(axes[axis:]))]


def _squeeze(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    listed = site.integers(1, "axes")
    gone = {a % len(axes) for a in listed} if listed else {i for i, d in enumerate(axes) if d.size == 1}
    return [tuple(dim for i, dim in enumerate(axes) if i not in gone)]


def _unsqueeze(site: ChannelNode) -> list[Axes | None]:
    axes = list(site.axes(0))
    listed = site.integers(1, "axes") or []
    rank = len(axes) + len(listed)
    new = {axis % rank for axis in listed}
    return [tuple(site.fresh(1, frozen=SINGLE) if i in new else axes.pop(0) for i in range(rank))]


def _transpose(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    return [tuple(axes[int(i)] for i in site.attribute("perm", range(len(axes))[::-1]))]


def _depth_to_space(site: ChannelNode) -> list[Axes | None]:
    axes, sizes = site.axes(0), site.sizes()
    block = int(site.attribute("blocksize"))
    channels = axes[1].size // block**2
    if site.attribute("mode", "DCR") == "DCR":
        *blocks, dim = site.divided(factor, axes[1], [block, block, channels])
    else:
        dim, *blocks = site.divided(factor, axes[1], [channels, block, block])
    site.places([*blocks, *axes[2:]], "it becomes rows and columns")
    return [(axes[0], dim, *sizes[2:])]


def _space_to_depth(site: ChannelNode) -> list[Axes | None]:
    axes, sizes = site.axes(0), site.sizes()
    block = int(site.attribute("blocksize"))
    site.freeze(axes[2:], "rows and columns become channels")
    inner = site.fresh(block**2, position=True, frozen="rows and columns that became channels")
    return [(axes[0], product_of([inner, axes[1]]), *sizes[2:])]


# Joining and dividing -----------------------------------------------------------------------------


def _concat(site: ChannelNode) -> list[Axes | None]:
    operands = [site.axes(slot) for slot in site.data()]
    rank = len(operands[0])
    axis = site.axis("axis", 1, rank)
    result = []
    for position in range(rank):
        own = [axes[position] for axes in operands]
        if position == axis:
            settled = all(map(_settled, own))
            size = sum(dim.size for dim in own)
            result.append(_like(site, size, own) if settled and len(own) > 1 else sum_of(own))
            continue
        for dim in own[1:]:
            site.same(own[0], dim)
        result.append(own[0])
    return [tuple(result)]


def _split(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    axis = site.axis("axis", 0, len(axes))
    sizes = [site.sizes(i)[axis].size for i in range(len(site.node.outputs))]
    pieces = _pieces(site, axes[axis], sizes)
    if "split" in site.node.attrs:
        for entry, dim in enumerate(pieces):
            site.number(dim, attribute="split", entry=entry)
    elif site.has(1):
        known = site.numbers(1)
        if known is None or known.value.size != len(pieces):
            raise StopRuleError("its sizes are computed from data")
        for entry, dim in enumerate(pieces):
            site.number(dim, slot=1, entry=entry)
    else:
        site.system.splits.append(EvenSplit(site.output, tuple(pieces)))
    return [(*axes[:axis], piece, *axes[axis + 1 :]) for piece in pieces]


def _pieces(site: ChannelNode, dim: Axis, sizes: Sequence[int]) -> Sequence[Axis]:
    """Parts of an axis, some of them perhaps empty."""
    if _settled(dim):
        return [_like(site, size, [dim]) for size in sizes]
    found = iter(site.divided(segment, dim, [size for size in sizes if size]))
    return [next(found) if size else site.fresh(0, frozen="empty") for size in sizes]


def _split_to_sequence(site: ChannelNode) -> list[Axes | None]:
    axes = site.axes(0)
    axis = site.axis("axis", 0, len(axes))
    size = axes[axis].size
    split, known = site.integers(1, "split"), site.numbers(1)
    if split is None or known is None:
        raise StopRuleError("it is taken apart index by index")
    if known.value.ndim:
        pieces = _pieces(site, axes[axis], split)
        for entry, dim in enumerate(pieces):
            site.number(dim, slot=1, entry=entry)
    else:
        pieces = _pieces(site, axes[axis], [min(split[0], size - at) for at in range(0, size, split[0])])
        site.system.splits.append(EvenSplit(site.output, tuple(pieces)))
    made = [(*axes[:axis], piece, *axes[axis + 1 :]) for piece in pieces]
    site.system.sequences[site.node.outputs[0]] = made
    return [None]


def _sequence_at(site: ChannelNode) -> list[Axes | None]:
    elements = site.system.sequences.get(site.node.inputs[0])
    at = site.integers(1, "position")
    if elements is None or not at:
        raise StopRuleError("what the sequence holds is unknown")
    return [elements[at[0]]]


def _slice(site: ChannelNode) -> list[Axes | None]:
    axes = list(site.axes(0))
    starts, ends = site.integers(1, "starts"), site.integers(2, "ends")
    if starts is None or ends is None:
        raise StopRuleError("its bounds are missing")
    listed = site.integers(3, "axes")
    steps = site.integers(4, "steps") or [1] * len(starts)
    for entry, axis in enumerate(range(len(starts)) if listed is None else listed):
        axes[axis] = _sliced(site, axes[axis % len(axes)], starts[entry], ends[entry], steps[entry], entry)
    return [tuple(axes)]


def _slice_or_freeze(site: ChannelNode) -> list[Axes | None]:
    """A Slice whose bounds differ from run to run takes from axes that can't be cut any more."""
    try:
        return _slice(site)
    except StopRuleError:
        axes = site.axes(0)
        listed = site.integers(3, "axes")
        sliced = {a % len(axes) for a in (range(len(axes)) if listed is None else listed)}
        site.freeze((axes[a] for a in sliced), "its bounds are computed")
        sizes = site.sizes()
        for axis in sliced:
            sizes[axis].position = is_position(axes[axis])
        return [tuple(sizes[i] if i in sliced else dim for i, dim in enumerate(axes))]


def _sliced(site: ChannelNode, dim: Axis, start: int, end: int, step: int, entry: int) -> Axis:
    size = dim.size
    first, last, stride = slice(start, end, step).indices(size)
    count = len(range(first, last, stride))
    if count == 0 or is_dynamic(dim):
        site.freeze((dim,), "a part of it is taken")
        return _like(site, count, [dim])
    whole = step > 1 and start >= 0 and size % step == 0 and count == size // step
    if _settled(dim) or step < 1 or (step > 1 and not whole):
        site.freeze((dim,), "a part of it is taken")
        return _like(site, count, [dim])
    if step > 1:
        outer, inner = site.divided(factor, dim, [count, step])
        site.freeze((inner,), f"one index in {step} is taken")
        if 0 < end < TO_THE_END:
            _bound(site, dim, 2, entry)
        return outer
    before, after = first, size - last
    found = iter(site.divided(segment, dim, [s for s in (before, count, after) if s]))
    head = [next(found)] if before else []
    middle = next(found)
    tail = [next(found)] if after else []
    if start < 0:
        if start >= -size:
            _bound(site, sum_of([middle, *tail]), 1, entry, -1)
    elif start > 0:
        _bound(site, sum_of(head), 1, entry)
    if end < 0:
        _bound(site, sum_of(tail), 2, entry, -1)
    elif end < TO_THE_END:
        _bound(site, sum_of([*head, middle]), 2, entry)
    return middle


def _bound(site: ChannelNode, dim: Axis, slot: int, entry: int, sign: int = 1) -> None:
    name = "starts" if slot == 1 else "ends"
    if name in site.node.attrs:
        site.number(dim, attribute=name, entry=entry, sign=sign)
    else:
        site.number(dim, slot=slot, entry=entry, sign=sign)


def _pad(site: ChannelNode) -> list[Axes | None]:
    axes, sizes = list(site.axes(0)), site.sizes()
    name = "pads" if "pads" in site.node.attrs else "paddings"
    listed = site.integers(3, "axes")
    if listed is None and site.has(3):
        raise StopRuleError("its axes are computed from data")
    chosen = list(range(len(axes))) if listed is None else [axis % len(axes) for axis in listed]
    pads = _pads(site, name)
    if len(pads) != 2 * len(chosen):
        raise StopRuleError("its pads are missing")
    constant = str(site.attribute("mode", "constant")) == "constant"
    for entry, axis in enumerate(chosen):
        begin, end = pads[entry], pads[entry + len(chosen)]
        dim = axes[axis]
        if begin == 0 and end == 0:
            continue
        if begin is None or end is None:
            site.freeze((dim,), "it is padded by a computed number")
            sizes[axis].position = is_position(dim)
            axes[axis] = sizes[axis]
            continue
        if _settled(dim) or not constant or min(begin, end) < 0 or is_dynamic(dim):
            site.freeze((dim,), "it is padded or cropped")
            axes[axis] = _like(site, dim.size + begin + end, [dim])
            continue
        sides = [site.fresh(begin), site.fresh(end)]
        for side, index in zip(sides, (entry, entry + len(chosen)), strict=True):
            if side.size and name in site.node.attrs:
                site.number(side, attribute=name, entry=index)
            elif side.size:
                site.number(side, slot=1, entry=index)
        axes[axis] = sum_of([sides[0], dim, sides[1]])
    return [tuple(axes)]


def _pads(site: ChannelNode, name: str) -> list[int | None]:
    """The pads, begin then end; None for those that differ from run to run."""
    if name in site.node.attrs:
        return [int(pad) for pad in site.node.attrs[name]]
    known = site.numbers(1)
    if known is None:
        raise StopRuleError("its pads are computed from data")
    pairs = zip(known.value.flat, known.tags.flat, strict=True)
    return [None if any(map(is_dynamic, dims_of(tag))) else int(pad) for pad, tag in pairs]


# Resizing -----------------------------------------------------------------------------------------


def _resize(site: ChannelNode) -> list[Axes | None]:
    axes, sizes = site.axes(0), site.sizes()
    slot = 3 if site.has(3) else None
    listed = site.attribute("axes")
    chosen = list(range(len(axes))) if listed is None else [int(a) % len(axes) for a in listed]
    if slot is not None and site.numbers(slot) is None:
        raise StopRuleError("its sizes are computed from data")
    result = list(axes)
    for entry, axis in enumerate(chosen):
        dim = axes[axis]
        same = dim.size == sizes[axis].size and str(site.attribute("coordinate_transformation_mode")) != (
            "tf_crop_and_resize"
        )
        if axis > 1 or not same:
            site.freeze((dim,), "it is resized")
            result[axis] = sizes[axis]
        elif slot is not None:
            site.number(dim, slot=slot, entry=entry)
    return [tuple(result)]


def _sampled(site: ChannelNode) -> list[Axes | None]:
    """GridSample and RoiAlign: channels stay, places come from another input."""
    axes, sizes = site.axes(0), site.sizes()
    site.freeze(axes[2:], "places of it are looked up")
    batch = axes[0] if site.op == "GridSample" else sizes[0]
    return [(batch, axes[1], *sizes[2:])]


# Making -------------------------------------------------------------------------------------------


def _new(site: ChannelNode) -> list[Axes | None]:
    """Operators whose result says nothing about axes; what lengths went into it, its numbers know."""
    return [site.sizes()]


RULES: Mapping[Key, ChannelRule] = {
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _flatten,
    ("", "Squeeze"): _squeeze,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Transpose"): _transpose,
    ("", "DepthToSpace"): _depth_to_space,
    ("", "SpaceToDepth"): _space_to_depth,
    ("", "Concat"): _concat,
    ("", "Split"): _split,
    ("", "SplitToSequence"): _split_to_sequence,
    ("", "SequenceAt"): _sequence_at,
    ("", "Slice"): _slice_or_freeze,
    ("", "Pad"): _pad,
    ("", "Resize"): _resize,
    ("", "Upsample"): _resize,
    ("", "GridSample"): _sampled,
    ("", "RoiAlign"): _sampled,
    ("", "Shape"): _new,
    ("", "Size"): _new,
    ("", "Range"): _new,
}
