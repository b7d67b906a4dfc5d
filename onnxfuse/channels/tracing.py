"""From a model to the system of equations between its axes, solved.

One pass over the nodes in topological order: each node's rule says how its outputs' axes come from its
inputs', unifying what is the same. Then everything that can't follow a cut is frozen, with the reason: axes
of graph inputs and outputs, of tensors that a body captures, of what an operator without a rule touches, and
lengths that are computed into numbers which can't be rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from onnxfuse.channels import lengths
from onnxfuse.channels.dims import Axis, crossed, equal, freeze_leaves, is_dynamic, leaves
from onnxfuse.channels.grids import GRID_OPERATORS, evaluate_grid
from onnxfuse.channels.rules import RULES
from onnxfuse.channels.site import SINGLE, Axes, ChannelNode, Number, Pin, StopRuleError, System
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo, fill, merge
from onnxfuse.ops.linear import is_main_domain
from onnxfuse.ops.table import OPS, Kind
from onnxfuse.runtime.observed_shapes import run_shapes
from onnxfuse.runtime.session import Runtime

_COUNTING = OPS.of_kind(Kind.SHAPE)

USED_AS_NUMBER = "its length is a number in a computation"


def trace(model: Model, feed: Feed | None, runtime: Runtime | None) -> System:
    """The axes of all tensors and what ties them.

    Args:
        model: stays as it is.
        feed: inputs for shapes that can't be inferred, None to do without.
        runtime: runs them.

    Raises:
        InputError, NotApplicableError: as `runtime.observed_shapes.run_shapes`.
    """
    system = System(model, *_sizes(model, feed, runtime))
    for node in model.nodes:
        if node.constant_form is None:
            _apply(system, node, ran=feed is not None)
    _freeze_ends(system)
    _freeze_crossed(system)
    _freeze_numbers(system)
    return system


def _sizes(
    model: Model, feed: Feed | None, runtime: Runtime | None
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """The sizes of all tensors in one run, and those that are the same in every run.

    They follow from the inputs' declarations and from the run. What the file declares of other tensors may be
    wrong (a batch of one often survives there), so it counts only without a run, where nothing else is known.
    """
    declared = model.shapes()
    static = {name: TensorInfo(name, None, None) for name in declared}
    static.update({t.name: declared[t.name] for t in model.initializers})
    static.update(model.proven())
    if feed is None:
        return {name: merge(info, declared.get(name)) for name, info in static.items()}, static
    sizes: dict[str, int] = {}
    clashing: set[str] = set()  # one name for several sizes says nothing
    for info in model.inputs:
        for dim, size in zip(info.shape or (), feed[info.name].shape, strict=False):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                clashing.add(dim)
    for dim in clashing:
        del sizes[dim]
    found = {
        name: TensorInfo(
            name,
            info.dtype,
            info.shape and tuple(sizes.get(d) if isinstance(d, str) else d for d in info.shape),
        )
        for name, info in static.items()
    }
    if all(info.complete for info in found.values()):
        return found, static
    if runtime is None:
        raise ValueError("sizes that only a run shows need a runtime")
    run = run_shapes(model, feed, runtime)
    return {name: fill(info, run.get(name)) for name, info in found.items()}, static


# One node at a time -------------------------------------------------------------------------------


def _apply(system: System, node: Node, ran: bool) -> None:
    """Play one node through: its numbers if it computes some, and its axes.

    Rules count on ranks that ONNX Runtime has accepted. Where nothing has run, others are a reason to stop.
    """
    site = ChannelNode(system, node)
    computed = _evaluated(site)
    rule = RULES.get(node.key)
    result: list[Axes | None] = []
    reason = "" if rule is not None else f"{node.op} has no rule"
    if rule is not None:
        try:
            result = _checked(site, rule(site))
        except StopRuleError as stop:
            reason = str(stop)
        except IndexError:
            if ran:
                raise
            reason = f"{node.op} takes no inputs of these ranks"
    if reason and not computed:
        _stop(site, f"{reason} ({node.label})")
    for index, tensor in enumerate(node.outputs):
        if tensor.name and tensor not in system.sequences:
            own = result[index] if index < len(result) else None
            _put(system, tensor, own, f"{reason or node.op} ({node.label})")
    _note_roots(system, node)
    if not computed:
        _pin_used_lengths(site)


def _put(system: System, tensor: Tensor, axes: Axes | None, reason: str) -> None:
    if axes is None:
        axes = system.positions(tensor, reason, position=False)
    if axes is not None:
        system.axes[tensor] = axes
        for dim in axes:
            if dim.size == 1:
                freeze_leaves(dim, SINGLE)


def _note_roots(system: System, node: Node) -> None:
    """Note which stored tensors the node's outputs come from, where they depend on such alone."""
    inputs = [t for t in node.inputs if t.name]
    if inputs and not node.bodies and all(map(system.is_constant, inputs)):
        roots = tuple(dict.fromkeys(root for t in inputs for root in system.roots.get(t, (t,))))
        system.roots.update(dict.fromkeys(node.outputs, roots))


def _evaluated(site: ChannelNode) -> list[lengths.Numbers]:
    """The numbers that the node computes, also put down for those who read them; none of other nodes."""
    computed = _numbers_of(site) if is_main_domain(site.node) and not site.node.bodies else None
    for tensor, own in zip(site.node.outputs, computed or (), strict=False):
        site.system.numbers[tensor.name] = own
    if is_main_domain(site.node) and site.node.op in GRID_OPERATORS:
        inputs = [t for t in site.node.inputs if t.name]
        grids, known = map(site.system.grid_of, inputs), map(site.system.numbers_of, inputs)
        site.system.grids[site.output] = evaluate_grid(site.node, list(grids), list(known))
    return computed or []


def _numbers_of(site: ChannelNode) -> list[lengths.Numbers] | None:
    system, node = site.system, site.node
    if node.key in _COUNTING:
        listed = system.numbers_of(node.inputs[0])
        axes = system.axes_of(node.inputs[0])
        if axes is None:
            return None
        shape = lengths.of_shape(axes)
        if listed is not None:  # how many numbers there are in a list does not depend on lengths
            shape = lengths.of_constant(np.array(listed.value.shape, np.int64))
        if node.op == "Shape":
            part = slice(site.attribute("start"), site.attribute("end"))
            return [lengths.Numbers(shape.value[part], shape.tags[part])]
        return [lengths.size_product(shape)]
    known = [system.numbers_of(t) if t.name else None for t in node.inputs]
    if any(own is None and t.name for own, t in zip(known, node.inputs, strict=True)):
        return None
    return lengths.evaluate_lengths(node, known, system.model.opset)


def _checked(site: ChannelNode, result: list[Axes | None]) -> list[Axes | None]:
    """The rule's result, if it agrees with the shapes that are known; what contradicts them is frozen."""
    for tensor, axes in zip(site.node.outputs, result, strict=False):
        info = site.system.shapes.get(tensor.name)
        if axes is None or info is None or info.shape is None:
            continue
        if len(axes) != len(info.shape):
            raise StopRuleError(f"its result has {len(info.shape)} axes, not {len(axes)}")
        for dim, size in zip(axes, info.shape, strict=True):
            if isinstance(size, int) and size != dim.size:
                site.freeze((dim,), f"its size should be {dim.size} and is {size}")
    return result


def _stop(site: ChannelNode, reason: str) -> None:
    """Nothing that the node touches can be taken."""
    model = site.system.model
    for tensor in (*site.node.inputs, *map(model.tensor, site.node.captured)):
        _freeze_tensor(site.system, tensor, reason, f"{USED_AS_NUMBER} ({site.node.label})")


def _freeze_tensor(system: System, tensor: Tensor, reason: str, as_number: str) -> None:
    """Freeze all axes of a tensor, and those whose lengths it holds."""
    known = system.numbers_of(tensor)
    for dim in known.depends() if known is not None else ():
        freeze_leaves(dim, as_number)
    for axes in (system.axes_of(tensor), *system.sequences.get(tensor, ())):
        for dim in axes or ():
            freeze_leaves(dim, reason)


def _pin_used_lengths(site: ChannelNode) -> None:
    """Lengths that the node uses for anything but what its rule has declared: they keep their values."""
    for slot, tensor in enumerate(site.node.inputs):
        known = site.system.numbers_of(tensor)
        if known is None or known.fixed:
            continue
        declared = [(slot, entry) in site.declared for entry in range(known.tags.size)]
        tags = zip(known.tags.flat, declared, strict=True)
        used = frozenset(dim for tag, own in tags if not own for dim in lengths.dims_of(tag))
        if used and (any(declared) or any(map(is_dynamic, known.depends()))):
            site.freeze(used, USED_AS_NUMBER)
        elif used:
            site.system.pins.append(Pin(site.output, used, slot))


# What can't be cut --------------------------------------------------------------------------------


def _freeze_ends(system: System) -> None:
    model = system.model
    for tensor in (*system.axes, *system.sequences):
        name = tensor.name
        if model.is_output(tensor):
            as_number = f"its length is in the graph output '{name}'"
            _freeze_tensor(system, tensor, f"it reaches the graph output '{name}'", as_number)
        elif model.captured(tensor):
            _freeze_tensor(system, tensor, f"a subgraph uses '{name}'", f"a subgraph uses '{name}'")


def _freeze_crossed(system: System) -> None:
    """An axis that has a leaf as rows and as columns can't be cut by one index; an axis merged with one of
    dynamic size has no fixed places for a mask."""
    for name, dim in _edited(system):
        for leaf in crossed(dim):
            freeze_leaves(leaf, f"'{name}' has it as rows and as columns")
    for sink in system.sinks:
        if is_dynamic(sink.dim):
            freeze_leaves(sink.dim, f"'{sink.tensor}' merges it with an axis of dynamic size")


def _edited(system: System) -> Iterator[tuple[str, Axis]]:
    """Every axis that a cut would evaluate, with a name for it."""
    for tensor, axes in system.axes.items():
        if system.model.is_weight(tensor):
            yield from ((tensor.name, dim) for dim in axes)
    yield from ((sink.tensor, sink.dim) for sink in system.sinks)
    yield from ((number.place.node, number.dim) for number in system.written)


def _freeze_numbers(system: System) -> None:
    """Numbers that follow by themselves are none to write; those that can't be written freeze."""
    kept = []
    inferred: set[str] = set()
    for number in system.written:
        about = {leaf for dim in (number.dim, *lengths.dims_of(number.tag)) for leaf in leaves(dim)}
        follows = isinstance(number.tag, Axis) and number.sign == 1 and equal(number.tag, number.dim)
        if follows or all(leaf.frozen for leaf in about):
            continue
        node = number.place.node
        if is_dynamic(number.dim) and number.inferable and node not in inferred and _writable(system, number):
            inferred.add(node)
        elif is_dynamic(number.dim) or not _writable(system, number):
            _freeze_all(about, f"'{node}' computes its {number.place} from lengths")
            continue
        kept.append(number)
    system.written = kept


def _freeze_all(dims: Iterable[Axis], reason: str) -> None:
    for dim in dims:
        freeze_leaves(dim, reason)


def _writable(system: System, number: Number) -> bool:
    place = number.place
    if place.slot is None or place.entry is None:
        return True
    producer = system.model.producer(system.model.tensor(place.node))
    assert producer is not None
    return _replaceable(system, producer.inputs[place.slot])


def _replaceable(system: System, tensor: Tensor) -> bool:
    """Whether `edits` can replace one element of a list of numbers: the list is the same in every run, or is
    put together anew from its other elements."""
    known = system.numbers_of(tensor)
    return known is not None and (known.fixed or known.value.ndim == 1 or known.value.size == 1)
