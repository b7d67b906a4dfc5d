"""Flows through operators that rearrange: they move, cut, join, repeat or drop axes and elements.

A map stays one as long as its layout can be told, tokens as long as the last axis is whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxfuse.analysis.regions.facts import Entry, FlowResult, RegionNode, join, sample
from onnxfuse.analysis.regions.view import DataView, Flow, Layout, Shape
from onnxfuse.ir.shapes import AxisSize
from onnxfuse.numerics.receptive_field import WindowAxis
from onnxfuse.ops.view import TO_THE_END


def _transpose(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    perm = site.attribute("perm")
    if flow.view is DataView.TOKEN:
        same_last = perm is not None and perm[-1] == len(perm) - 1
        return flow._replace(aligned=False, features=flow.features if same_last else None)
    if perm is None or flow.rank is None or perm[0] != 0:
        return "a Transpose moves the batch axis"
    if flow.view is DataView.SAMPLE:
        return flow
    return flow._replace(layout=tuple(flow.layout[p] for p in perm))


def _reshape(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    source = site.facts.shape(site.node.inputs[0])
    result = site.facts.shape(site.node.outputs[0])
    target = site.integers(1, "shape")
    if flow.view is DataView.TOKEN:
        rank = len(target) if target is not None else None if result is None else len(result)
        last = (target or [0])[-1] if target is not None else (result or (None,))[-1]
        features = last if isinstance(last, int) and last > 0 else None
        return flow._replace(aligned=False, rank=rank, features=features)
    if not _keeps_batch(source, result, target):
        return "a Reshape whose batch axis is not certain"
    layout = _moved_units(flow, source, result) if flow.view is DataView.MAP else None
    if layout is not None:
        return flow._replace(layout=layout, rank=len(layout))
    rank = len(target) if target is not None else None if result is None else len(result)
    return sample(flow, "a Reshape folds the spatial axes", rank=rank, tail=flow.tail)


def _keeps_batch(source: Shape | None, result: Shape | None, target: list[int] | None) -> bool:
    """Whether axis 0 before a Reshape is axis 0 after it."""
    if target and target[0] == 0:
        return True
    rest = None if source is None else _product_of(source[1:])
    if target and target[0] == -1 and rest is not None and source is not None:
        copied = [source[i] if t == 0 and i < len(source) else t for i, t in enumerate(target)]
        return _product_of(copied[1:]) == rest
    if source is None or result is None or not source or not result:
        return False
    if source[0] is not None and source[0] == result[0]:
        return True
    return rest is not None and rest == _product_of(result[1:])


def _product_of(dims: Sequence[AxisSize]) -> int | None:
    sizes = [d for d in dims if isinstance(d, int) and d > 0]
    return math.prod(sizes) if len(sizes) == len(dims) else None


def _moved_units(flow: Flow, source: Shape | None, result: Shape | None) -> Layout | None:
    """The layout after a Reshape that only adds, drops or moves axes of size 1; None if it does more."""
    if source is None or result is None or len(source) != len(flow.layout) or flow.layout[0] != "N":
        return None
    if _product_of(source[1:]) is None or _product_of(result[1:]) is None:
        return None
    pairs = list(zip(flow.layout[1:], source[1:], strict=True))
    wide = [(label, size) for label, size in pairs if size != 1]
    units = [label for label, size in pairs if size == 1 and label is not None]
    if [size for _, size in wide] != [d for d in result[1:] if d != 1]:
        return None
    if len(units) > sum(d == 1 for d in result[1:]):
        return None
    labels, spare = iter([label for label, _ in wide]), iter(units)
    return ("N", *(next(spare, None) if d == 1 else next(labels) for d in result[1:]))


def _flatten(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    axis = site.axis_of("axis", 1, flow.rank)
    if flow.view is DataView.TOKEN:
        same = flow.rank == 2 and axis == 1
        return flow._replace(rank=2, aligned=flow.aligned and same, features=flow.features if same else None)
    if axis != 1:
        return "a Flatten that folds the batch axis"
    return sample(flow, "a Flatten folds the spatial axes", rank=2, tail=flow.tail)


def _squeeze(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    axes = site.integers(1, "axes")
    if flow.view is DataView.TOKEN:
        return flow._replace(aligned=False, rank=_less(flow.rank, axes), features=None)
    if axes is None or flow.rank is None:
        return "a Squeeze of axes that are not given"
    dropped = {a % flow.rank for a in axes}
    if 0 in dropped:
        return "a Squeeze of the batch axis"
    rank = flow.rank - len(dropped)
    if flow.view is DataView.MAP and all(_is_unit(site, flow, a) for a in dropped):
        layout = tuple(label for a, label in enumerate(flow.layout) if a not in dropped)
        return flow._replace(layout=layout, rank=rank)
    return sample(flow, "a Squeeze drops a spatial axis", rank=rank, tail=flow.tail)


def _is_unit(site: RegionNode, flow: Flow, axis: int) -> bool:
    """Whether an axis of a map, other than batch and channels, has size 1 in every run."""
    label = flow.layout[axis]
    return label is None or (label != "C" and site.facts.static_size(site.node.inputs[0], axis) == 1)


def _less(rank: int | None, axes: list[int] | None) -> int | None:
    return None if rank is None or axes is None else rank - len(axes)


def _unsqueeze(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    axes = site.integers(1, "axes")
    if axes is None or flow.rank is None:
        return (
            flow._replace(aligned=False, rank=None)
            if flow.view is DataView.TOKEN
            else "an Unsqueeze of unknown axes"
        )
    rank = flow.rank + len(axes)
    new = {a % rank for a in axes}
    if flow.view is DataView.TOKEN:
        return flow._replace(aligned=False, rank=rank, features=1 if rank - 1 in new else flow.features)
    if 0 in new:
        return "an Unsqueeze before the batch axis"
    if flow.view is DataView.SAMPLE:
        return flow._replace(rank=rank)
    old = iter(flow.layout)
    return flow._replace(layout=tuple(None if a in new else next(old) for a in range(rank)), rank=rank)


def _concat(site: RegionNode) -> FlowResult:
    flows = site.data()
    first = flows[0]
    axis = site.axis_of("axis", 1, first.rank)
    for index, tensor in site.others():
        if site.foreign(index, tensor):
            return f"'{tensor.name}' enters from outside"
    met = join(flows)
    if isinstance(met, str):
        return met
    widths = [_width(site, i, axis) for i in range(len(site.node.inputs))]
    known = [w for w in widths if w is not None]
    features = sum(known) if len(known) == len(widths) else None
    if met.view is DataView.TOKEN:
        last = axis is not None and met.rank is not None and axis == met.rank - 1
        aligned = last and all(f.aligned for f in flows)
        return met._replace(aligned=aligned, features=features if last else met.features, tail=False)
    if axis is None or axis == 0:
        return "a Concat over the batch axis"
    if met.view is DataView.MAP and met.layout[axis] == "C":
        if len(flows) < len(widths):
            return "a Concat with constant channels"
        return met._replace(features=features, tail=False)
    return sample(met, "a Concat along a spatial axis", rank=met.rank)


def _width(site: RegionNode, index: int, axis: int | None) -> int | None:
    """Size along a Concat's axis of one operand."""
    flow = site.flow(index)
    if flow is not None and flow.features is not None and axis is not None:
        if flow.view is DataView.MAP and flow.layout[axis] == "C":
            return flow.features
        if flow.view is DataView.TOKEN and flow.rank is not None and axis == flow.rank - 1:
            return flow.features
    shape = site.facts.shape(site.node.inputs[index])
    size = None if shape is None or axis is None or axis >= len(shape) else shape[axis]
    return size if isinstance(size, int) else None


def _split(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    axis = site.axis_of("axis", 0, flow.rank)
    count = len(site.node.outputs)
    sizes: Sequence[int | None] = [None] * count
    given = site.integers(1, "split")
    if given is not None and len(given) == count:
        sizes = given
    last = axis is not None and flow.rank is not None and axis == flow.rank - 1
    if flow.view is DataView.TOKEN:
        if given is None and last and flow.features is not None and flow.features % count == 0:
            sizes = [flow.features // count] * count
        one = flow._replace(tail=False, aligned=flow.aligned and last)
        return [one._replace(features=size if last else flow.features) for size in sizes]
    if axis is None or axis == 0:
        return "a Split of the batch axis"
    if flow.view is DataView.MAP and flow.layout[axis] == "C":
        if given is None and flow.features is not None and flow.features % count == 0:
            sizes = [flow.features // count] * count
        return [flow._replace(tail=False, features=size) for size in sizes]
    return [sample(flow, "a Split along a spatial axis", rank=flow.rank) for _ in sizes]


def _slice(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    if flow.view is DataView.TOKEN:
        return flow._replace(tail=False, aligned=False, features=_last_size(site))
    starts, ends = site.integers(1, "starts"), site.integers(2, "ends")
    if starts is None or ends is None or flow.rank is None:
        return "a Slice whose bounds are computed at run time"
    axes = site.integers(3, "axes") or list(range(len(starts)))
    steps = site.integers(4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut = _cut(site, flow, axis % flow.rank, start, end, step)
        if isinstance(cut, str):
            return cut
        flow = cut
    return flow._replace(tail=False)


def _last_size(site: RegionNode) -> int | None:
    shape = site.facts.shape(site.node.outputs[0])
    last = shape[-1] if shape else None
    return last if isinstance(last, int) else None


def _cut(site: RegionNode, flow: Flow, axis: int, start: int, end: int, step: int) -> Flow | str:
    """The flow after a slice of one axis."""
    size = site.facts.static_size(site.node.inputs[0], axis)
    label = flow.layout[axis] if flow.view is DataView.MAP else ("N" if axis == 0 else None)
    if label == "C" and flow.features is not None:
        size = flow.features
    whole = start == 0 and step == 1 and (end >= TO_THE_END or (size is not None and end >= size))
    if whole or (flow.view is DataView.SAMPLE and axis != 0):
        return flow
    if label in ("N", None):
        return "a Slice of the batch axis" if label == "N" else "a Slice of an axis of size 1"
    if size is not None:
        kept = range(size)[start:end:step]
        start, end = kept.start, kept.stop
        if label == "C":
            return flow._replace(features=len(kept))
    if step < 1 or label == "C":
        return "a Slice that runs backwards" if step < 1 else "a Slice of an unknown number of channels"
    if start < 0 or (0 <= end < TO_THE_END and size is None):
        return "a Slice whose place depends on the size of a dynamic axis"
    crop = end - size if size is not None else min(end, 0)
    axes = list(flow.axes)
    assert isinstance(label, int)
    axes[label] = axes[label].then(WindowAxis(1, step, -start, crop if crop < 0 else 0))
    return flow._replace(axes=tuple(axes))


def _pad(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    pads = site.integers(1, "pads")
    if pads is None or flow.rank is None:
        return "a Pad whose amounts are computed at run time"
    tensor = site.tensor(3)
    axes = list(range(flow.rank)) if tensor is None else site.integers(3, "axes")
    if axes is None or len(pads) != 2 * len(axes):
        return "a Pad of unknown axes"
    for i, axis in enumerate(a % flow.rank for a in axes):
        padded = _padded(flow, axis, pads[i], pads[i + len(axes)])
        if isinstance(padded, str):
            return padded
        flow = padded
    return flow._replace(tail=False)


def _padded(flow: Flow, axis: int, begin: int, end: int) -> Flow | str:
    if begin == 0 and end == 0:
        return flow
    if flow.view is DataView.TOKEN:
        last = axis == (flow.rank or 0) - 1
        features = flow.features + begin + end if last and flow.features is not None else flow.features
        return flow._replace(aligned=flow.aligned and last, features=features)
    label = flow.layout[axis] if flow.view is DataView.MAP else ("N" if axis == 0 else None)
    if label == "N":
        return "a Pad of the batch axis"
    if flow.view is DataView.SAMPLE:
        return flow
    if label == "C":
        return flow._replace(features=None if flow.features is None else flow.features + begin + end)
    if label is None:
        return "a Pad of an axis of size 1"
    axes = list(flow.axes)
    assert isinstance(label, int)
    axes[label] = axes[label].then(WindowAxis(1, 1, begin, end))
    return flow._replace(axes=tuple(axes))


def _gather(site: RegionNode) -> FlowResult:
    flow = site.flow()
    if flow is None:
        return "an embedding: its data are indices"
    axis = site.axis_of("axis", 0, flow.rank)
    tensor = site.tensor(1)
    indices = None if tensor is None else site.facts.value(tensor)
    if flow.view is DataView.TOKEN:
        return flow._replace(tail=False, aligned=False, rank=None, features=None)
    if indices is None or axis is None or axis == 0:
        return "a Gather of the batch axis or with unknown indices"
    if flow.view is DataView.MAP and flow.layout[axis] == "C" and indices.ndim == 1:
        return flow._replace(tail=False, features=len(indices))
    rank = None if flow.rank is None else flow.rank + indices.ndim - 1
    return sample(flow, "a Gather picks positions", rank=rank)


def _expand(site: RegionNode) -> FlowResult:
    flow = site.flow()
    assert flow is not None
    source, result = site.facts.shape(site.node.inputs[0]), site.facts.shape(site.node.outputs[0])
    if flow.view is DataView.TOKEN:
        rank = None if result is None else len(result)
        return flow._replace(tail=False, aligned=False, rank=rank, features=_last_size(site))
    if source and result and len(source) == len(result) and source[0] is not None and source[0] == result[0]:
        return sample(flow, f"{site.node.op} repeats positions", rank=len(result))
    return f"{site.node.op} whose batch axis is not certain"


def _resized(site: RegionNode) -> FlowResult:
    return f"{site.node.op} enlarges the image: no convolution with a stride can stand for it"


SHAPE_RULES = {
    "Transpose": Entry(_transpose),
    "Reshape": Entry(_reshape),
    "Flatten": Entry(_flatten),
    "Squeeze": Entry(_squeeze),
    "Unsqueeze": Entry(_unsqueeze),
    "Concat": Entry(_concat, every_input=True),
    "Split": Entry(_split),
    "Slice": Entry(_slice),
    "Pad": Entry(_pad),
    "Gather": Entry(_gather),
    "Expand": Entry(_expand),
    **dict.fromkeys(("ConvTranspose", "Resize", "Upsample", "DepthToSpace", "MaxUnpool"), Entry(_resized)),
}
