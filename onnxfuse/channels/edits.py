"""Taking channels: the one edit behind cutting, growing and merging.

`take` keeps the given indices of some groups, in the given order, as often as they are given. Every axis that
a group lies on is an expression over leaves (`dims`), so all edits are one evaluation: a weight is indexed by
what its axes evaluate to, a number becomes the length of its axis. A shared weight is edited once.

Numbers that belong to a node alone are changed in place; a list of lengths that others use too (exporters
merge equal constants) gets a private copy for this node. Where the list is a Concat of constants and computed
lengths, perhaps cast, the node gets a Concat of its own, with the constants replaced; where it is computed in
another way, one of its elements and of constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress, groupby

import numpy as np

from onnxfuse.channels import dims as algebra
from onnxfuse.channels.dims import Axis, Kept
from onnxfuse.channels.groups import Choice
from onnxfuse.channels.lengths import COPYING, dims_of
from onnxfuse.channels.site import EvenSplit, FlatView, Number, Pin, System
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ops.view import TO_THE_END


@dataclass(frozen=True)
class Edits:
    """The edits that `take` has made.

    Attributes:
        weights: by tensor and axis, the old positions on it in their new order.
        numbers: node, place, old and new value.
    """

    weights: Mapping[tuple[str, int], np.ndarray]
    numbers: tuple[tuple[str, str, int, int], ...]


def take(model: Model, choice: Choice, *, by: str = "take") -> Edits:
    """Keep these indices of these groups, in this order, with repetitions where there are any.

    The groups, found in this model or one it is a copy of, no longer describe the model afterwards. What
    duplicates a channel doubles what its consumers get from it: to scale them is the caller's.

    Args:
        model: edited in place.
        choice: for each group the indices to keep.
        by: name of the pass, kept in new nodes.

    Raises:
        ValueError: a group is frozen, an index is out of range, groups are of different models, or an axis
            would have no index left; nothing was edited.
    """
    system, kept = chosen(choice)
    if system is None:
        return Edits({}, ())
    weights: dict[tuple[str, int], np.ndarray] = {}
    for group in choice:
        for touch in group.touches:
            key = touch.weight, touch.axis
            if key not in weights:
                weights[key] = algebra.indices(touch.dim, kept)
                if not weights[key].size:
                    raise ValueError(f"axis {touch.axis} of '{touch.weight}' would be empty")
    axes: dict[str, list[tuple[int, np.ndarray]]] = {}
    for (name, axis), places in weights.items():
        axes.setdefault(name, []).append((axis, places))
    for name, own in axes.items():
        tensor = model.tensor(name)
        value = model.weight(tensor)
        assert value is not None
        changed = [(a, p) for a, p in own if not np.array_equal(p, np.arange(value.shape[a]))]
        for axis, places in changed:
            value = np.take(value, places, axis)
        if changed:
            model.set_weight(tensor, np.ascontiguousarray(value))
    numbers = _rewrite(model, system, kept, by)
    _note_maps(model, system, kept)
    model.prune()
    return Edits(weights, tuple(numbers))


def chosen(choice: Choice) -> tuple[System | None, Kept]:
    """The groups' common system, and what is kept of each leaf.

    Raises:
        ValueError: a group is frozen, an index out of range, or groups are of different models.
    """
    kept: dict[Axis, np.ndarray] = {}
    system: System | None = None
    for group, indices in choice.items():
        if group.frozen is not None:
            raise ValueError(f"group '{group.name}' is frozen: {group.frozen}")
        if system is not None and group.system is not system:
            raise ValueError("the groups were found in different models")
        system = group.system
        kept.update(group.spread(indices))
    return system, kept


def _note_maps(model: Model, system: System, kept: Kept) -> None:
    """Note in the model which indices the computed tensors now have, composed with what was taken before."""
    known: dict[Axis, np.ndarray | None] = {}

    def moved(dim: Axis) -> np.ndarray | None:
        dim = algebra.find(dim)
        if dim not in known:
            places = algebra.indices(dim, kept)
            known[dim] = None if np.array_equal(places, np.arange(dim.size)) else places
        return known[dim]

    for tensor, axes in system.axes.items():
        touched = [any(leaf in kept for leaf in algebra.leaves(dim)) for dim in axes]
        if not any(touched) or system.model.is_weight(tensor):
            continue
        before = model.index_maps.get(tensor.name, (None,) * len(axes))
        if before is None or any(map(algebra.is_dynamic, compress(axes, touched))):
            model.index_maps[tensor.name] = None
            continue
        after = [moved(dim) if own else None for dim, own in zip(axes, touched, strict=True)]
        both = tuple(b if a is None else a if b is None else b[a] for a, b in zip(after, before, strict=True))
        if any(places is not None for places in both):
            model.index_maps[tensor.name] = both


# Numbers ------------------------------------------------------------------------------------------


def _rewrite(model: Model, system: System, kept: Kept, by: str) -> list[tuple[str, str, int, int]]:
    done = []
    lists: dict[tuple[str, int], dict[int, int]] = {}
    for number in system.written:
        about = {number.dim, *dims_of(number.tag)}
        if all(algebra.length(dim, kept) == dim.size for dim in about):
            continue
        old = number.sign * number.dim.size
        value = _value_of(number, kept)
        place = number.place
        node = _node(model, place.node)
        done.append((node.site_name, str(place), old, value))
        if place.attribute is not None:
            _set_attribute(node, place.attribute, place.entry, value)
        else:
            assert place.slot is not None
            assert place.entry is not None
            lists.setdefault((place.node, place.slot), {})[place.entry] = value
    for (output, slot), entries in lists.items():
        node = _node(model, output)
        node.inputs[slot] = _with_entries(model, system, node.inputs[slot], entries, node, by)
    for pin in system.pins:
        if any(algebra.length(dim, kept) != dim.size for dim in pin.dims):
            _keep_value(model, system, pin)
    for view in system.views:
        done.extend(_write_view(model, view, kept))
    for split in system.splits:
        done.extend(_write_split(model, split, kept))
    return done


def _keep_value(model: Model, system: System, pin: Pin) -> None:
    node = _node(model, pin.node)
    if pin.slot is not None:
        tensor = node.inputs[pin.slot]
        node.inputs[pin.slot] = model.add_weight(tensor.name, system.numbers[tensor.name].value)
    elif pin.attribute is not None:
        node.attrs.setdefault(pin.attribute, pin.value)


def _value_of(number: Number, kept: Kept) -> int:
    if algebra.is_dynamic(number.dim):
        return -1
    size = algebra.length(number.dim, kept)
    if number.sign < 0 and not size:
        return TO_THE_END  # for minus 0 would be the beginning
    return number.sign * size


def _node(model: Model, output: str) -> Node:
    node = model.producer(model.tensor(output))
    assert node is not None
    return node


def _set_attribute(node: Node, name: str, entry: int | None, value: int) -> None:
    if entry is None:
        node.attrs[name] = value
    else:
        node.attrs[name] = [value if i == entry else old for i, old in enumerate(node.attrs[name])]


def _with_entries(
    model: Model, system: System, tensor: Tensor, entries: Mapping[int, int], user: Node | None, by: str
) -> Tensor:
    """A tensor like this one with some elements replaced, for one user; without, for a new node."""
    known = system.numbers.get(tensor.name)
    computed = not model.is_weight(tensor) and known is not None and not known.fixed
    producer = model.producer(tensor) if computed else None
    if producer is not None and producer.key in COPYING:
        inner = _with_entries(model, system, producer.inputs[0], entries, None, by)
        return model.add_node(producer.op, [inner], [tensor.name], producer.attrs, by=by).outputs[0]
    if producer is not None and producer.op == "Concat":
        pieces, offset = [], 0
        for piece in producer.inputs:
            size = _value(model, system, piece).size
            own = {e - offset: v for e, v in entries.items() if offset <= e < offset + size}
            pieces.append(_with_entries(model, system, piece, own, None, by) if own else piece)
            offset += size
        made = model.add_node("Concat", pieces, [tensor.name], {"axis": 0}, by=by)
        return made.outputs[0]
    value = _value(model, system, tensor).copy()
    if computed and value.size > len(entries):
        return _patched(model, tensor, value, entries, by)
    for entry, number in entries.items():
        value.reshape(-1)[entry] = number
    alone = user is not None and model.consumers(tensor) == [user] and user.inputs.count(tensor) == 1
    if alone and model.is_weight(tensor):
        model.set_weight(tensor, value)
        return tensor
    return model.add_weight(tensor.name, value)


def _patched(model: Model, tensor: Tensor, value: np.ndarray, entries: Mapping[int, int], by: str) -> Tensor:
    """A computed list with some elements replaced: runs of its own elements, and constants between them."""
    pieces: list[Tensor] = []
    for replaced, run in groupby(range(value.size), entries.__contains__):
        places = np.array(list(run))
        if replaced:
            own = np.array([entries[entry] for entry in places.tolist()], value.dtype)
            pieces.append(model.add_weight(f"{tensor.name}_sizes", own))
        else:
            where = model.add_weight(f"{tensor.name}_places", places)
            pieces.append(
                model.add_node("Gather", [tensor, where], [f"{tensor.name}_part"], by=by).outputs[0]
            )
    return model.add_node("Concat", pieces, [tensor.name], {"axis": 0}, by=by).outputs[0]


def _value(model: Model, system: System, tensor: Tensor) -> np.ndarray:
    value = model.weight(tensor)
    return system.numbers[tensor.name].value if value is None else value


def _write_view(model: Model, view: FlatView, kept: Kept) -> list[tuple[str, str, int, int]]:
    """A Gather at places that are counted through becomes the Reshape that it is."""
    old = [dim.size for dim in view.dims]
    sizes = [algebra.length(dim, kept) for dim in view.dims]
    if sizes == old:
        return []
    node = _node(model, view.node)
    asked = [-1 if algebra.is_dynamic(dim) else size for dim, size in zip(view.dims, sizes, strict=True)]
    node.op = "Reshape"
    node.attrs.clear()
    node.inputs[1] = model.add_weight(f"{view.node}_shape", np.array(asked, np.int64))
    pairs = enumerate(zip(old, sizes, strict=True))
    return [(node.site_name, f"shape[{place}]", a, b) for place, (a, b) in pairs if a != b]


def _write_split(model: Model, split: EvenSplit, kept: Kept) -> list[tuple[str, str, int, int]]:
    """A Split without sizes needs them once its parts differ."""
    old = [dim.size for dim in split.dims]
    sizes = [algebra.length(dim, kept) for dim in split.dims]
    if sizes == old:
        return []
    node = _node(model, split.node)
    if node.op == "Split" and len(set(sizes)) == len(set(old)) == 1:
        return []
    if model.opset < 13 and node.op == "Split":
        node.attrs["split"] = sizes
    else:
        node.attrs.pop("num_outputs", None)
        if len(node.inputs) > 1:
            node.inputs.pop()
        node.inputs.append(model.add_weight(f"{split.node}_sizes", np.array(sizes, np.int64)))
    return [(node.site_name, f"split[{i}]", a, b) for i, (a, b) in enumerate(zip(old, sizes, strict=True))]
