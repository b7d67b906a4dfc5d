"""Sites of the walk: the operators that can be solved again, and what each is held against."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from onnx import NodeProto

from onnxfuse.errors import InputError
from onnxfuse.findings import Skip
from onnxfuse.ir.marks import promises
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.protos import DEFAULT_DOMAINS
from onnxfuse.ir.shapes import Shapes, TensorInfo, contradicts, fill
from onnxfuse.ops.linear import LINEAR_OPERATORS, LinearOp, linear_op

MOST_UNKNOWNS = 6144
"""More unknowns for each output than this are not solved for: two Gram matrices of that size take 600 MB."""


How = Literal["fresh", "refit", "bias", "keep"]


@dataclass(frozen=True)
class RefitSite:
    """A linear operator of the rewritten model, and what it is solved for.

    Attributes:
        op: the operator; its weights are replaced.
        tensor: the tensor that is compared: the operator's output, or the sum it is a branch of.
        reference: the tensor of the original that `tensor` should equal.
        rest: the other operand of that sum, None without one.
        how: "fresh" solves from nothing, "refit" from the weights the operator has, "bias" solves for the
            bias alone; "keep" leaves the operator as it is.
        mask: name of a graph input. Where it has the leading dimensions of `tensor`, rows where it is 0 are
            left out.
        channels: the channels of `reference` that `tensor` has, None for all.
    """

    op: LinearOp
    tensor: str
    reference: str
    rest: str | None = None
    how: How = "refit"
    mask: str | None = None
    channels: tuple[int, ...] | None = None


def unchanged(original: Model, rewritten: Model) -> set[str]:
    """Names of the tensors that both models compute in the same way, inputs among them."""
    same = {info.name for info in original.inputs} & {info.name for info in rewritten.inputs}
    before = {node.outputs[0].name: node for node in original.nodes if node.outputs}
    for node in rewritten.nodes:
        twin = before.get(node.outputs[0].name) if node.outputs else None
        if twin is not None and _alike(original, twin, rewritten, node, same):
            same.update(tensor.name for tensor in node.outputs if tensor.name)
    return same


def _alike(a: Model, first: Node, b: Model, second: Node, same: set[str]) -> bool:
    """Whether the two nodes say the same and read the same. Weights may have other names."""
    if _operation(first, a.opset) != _operation(second, b.opset) or len(first.inputs) != len(second.inputs):
        return False
    pairs = [(a.tensor(name), b.tensor(name)) for name in first.captured]
    pairs += zip(first.inputs, second.inputs, strict=True)
    return all(
        (x.name == y.name and (not x.name or x.name in same)) or _equal_weights(a, b, x, y) for x, y in pairs
    )


def _operation(node: Node, opset: int) -> tuple[object, ...]:
    """A key to the operation of a node, whatever it reads and is called."""
    proto = NodeProto()
    proto.CopyFrom(node.proto(opset))
    proto.ClearField("input")
    proto.ClearField("name")
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")
    if proto.domain in DEFAULT_DOMAINS:
        proto.ClearField("domain")  # absent, empty or spelled out
    proto.attribute.sort(key=lambda attribute: attribute.name)
    return (proto.SerializeToString(deterministic=True),)


def _equal_weights(a: Model, b: Model, x: Tensor, y: Tensor) -> bool:
    if not (a.is_weight(x) and b.is_weight(y)):
        return False
    if isinstance(x, Constant) and isinstance(y, Constant) and x.stamp == y.stamp:
        return True  # one and the same value: no need to read it
    ours, theirs = a.weight(x), b.weight(y)
    return ours is not None and theirs is not None and np.array_equal(ours, theirs)


def tensors_read(model: Model, node: Node) -> list[Tensor]:
    """All tensors that a node depends on, those that its bodies capture among them."""
    return [*(t for t in node.inputs if t.name), *(model.tensor(name) for name in node.captured)]


def nodes_behind(
    model: Model, names: Iterable[str], shared: Collection[str], done: Collection[Node] = ()
) -> dict[Node, None]:
    """The nodes that compute some tensors from shared ones.

    Args:
        model: has them.
        names: of the tensors.
        shared: names of tensors that are there already.
        done: nodes whose outputs are there already.
    """
    nodes: dict[Node, None] = {}
    stack = [model.tensor(name) for name in names if name not in shared]
    while stack:
        node = model.producer(stack.pop())
        if node is not None and node not in done and node not in nodes:
            nodes[node] = None
            stack.extend(tensor for tensor in tensors_read(model, node) if tensor.name not in shared)
    return nodes


def refit_sites(
    original: Model,
    rewritten: Model,
    fresh: Sequence[tuple[Node, str]] = (),
    mask: str | None = None,
    known: Mapping[str, TensorInfo] | None = None,
    before: Model | None = None,
    fixed: Collection[Node] = (),
) -> tuple[list[RefitSite], list[Skip]]:
    """The linear operators of `rewritten` that are worth solving again, in topological order.

    Args:
        original: what to solve for.
        rewritten: what to solve.
        fresh: nodes to be solved from nothing, each with the tensor of both models that it stands for.
        mask: see `RefitSite`.
        known: types and shapes of the original's tensors, as `runtime.observed_shapes.shapes_on` has them;
            None takes what can be inferred.
        before: what `rewritten` was made from, where that isn't the original; what it computes alike is left.
        fixed: nodes whose weights are to stay as they are. Each is a site, behind a change or not: a place to
            solve for its bias, or, where it has none, to measure. The weights of nodes that are marked so
            (`marks`) stay too.

    Returns:
        The sites: the fresh and the fixed ones, and every linear operator behind a change whose output (or
        the sum that its output goes into) exists in the original; where its weight has other users, for its
        bias alone. And a Skip with the reason for each linear operator behind a change that is none.
    """
    same = unchanged(before or original, rewritten)
    known = original.shapes() if known is None else known
    shapes = _completed(rewritten, known)
    new = dict(fresh)
    asked = set(fixed)
    stay = asked | {node for node in rewritten.nodes if promises(node)}
    ops: list[tuple[LinearOp, How]] = []
    skipped: list[Skip] = []
    for node in rewritten.nodes:
        if node.op not in LINEAR_OPERATORS or (node.outputs[0].name in same and node not in asked):
            continue
        op = linear_op(rewritten, node, shapes)
        if isinstance(op, str):
            skipped.append(Skip((node.site_name,), op))
        elif reason := _unsolvable(op, owned=node in new or node in stay):
            skipped.append(Skip((op.name,), reason))
        else:
            ops.append((op, _how(op, node in new, node in stay)))
    last_site = _last_sites(rewritten, {op.y: number for number, (op, _) in enumerate(ops)})
    sites: list[RefitSite] = []
    for number, (op, how) in enumerate(ops):
        if op.node in new:
            tensor, rest = new[op.node], None
            channels = kept_channels(rewritten, tensor, channel_axis(op))
            assert not isinstance(channels, str)
        else:
            target = _target(rewritten, op, number, last_site, shapes, known)
            if isinstance(target, str):
                skipped.append(Skip((op.name,), target))
                continue
            tensor, rest, channels = target
        own = mask if op.kind == "token" else None
        sites.append(RefitSite(op, tensor, tensor, rest, how, own, channels))
    return sites, skipped


def _unsolvable(op: LinearOp, owned: bool) -> str | None:
    """The reason why an operator can't be solved again, if any. `owned`: its weights are the caller's."""
    if op.shared and not op.has_bias and not owned:
        return "its weight has other users, which a refit would change"
    if op.kind == "conv" and op.pads is None:
        return "its pads depend on an input size that isn't static"
    if op.columns > MOST_UNKNOWNS:
        return f"{op.columns} unknowns for each output are too many to solve for"
    return None


def _target(
    model: Model,
    op: LinearOp,
    number: int,
    last_site: Mapping[str, int],
    shapes: Mapping[str, TensorInfo],
    known: Mapping[str, TensorInfo],
) -> tuple[str, str | None, tuple[int, ...] | None] | str:
    """The tensor that an operator is solved for, the other operand where that is a sum, and the original's
    channels that it has; or why there is none.

    Args:
        model: the operator's own, rewritten.
        op: an operator that isn't fresh.
        number: the operator's, in topological order.
        last_site: by tensor, the last operator that it depends on; one that depends on this operator or a
            later one isn't final when this one is solved, and can't be subtracted from a sum.
        shapes: of the model's tensors.
        known: of the original's tensors.
    """
    axis = channel_axis(op)
    found = _sum_with(model, op, shapes)
    if found is not None and last_site.get(found[1], -1) < number:
        channels = comparable_channels(model, found[0], axis, shapes, known)
        if not isinstance(channels, str):
            return *found, channels
    channels = comparable_channels(model, op.y, axis, shapes, known)
    return channels if isinstance(channels, str) else (op.y, None, channels)


def _how(op: LinearOp, is_new: bool, stays: bool) -> How:
    if is_new:
        return "fresh"
    if op.shared or stays:
        return "bias" if op.has_bias else "keep"
    return "refit"


def check_mask(model: Model, mask: str | None) -> None:
    """Raise InputError unless `mask` is None or a graph input."""
    names = [info.name for info in model.inputs]
    if mask is not None and mask not in names:
        raise InputError(f"mask: the model has no input '{mask}'; its inputs are {', '.join(names)}")


def _last_sites(model: Model, sites: Mapping[str, int]) -> dict[str, int]:
    """The place of the last site that each tensor depends on, by name; absent without one."""
    last: dict[str, int] = {}
    for node in model.nodes:
        reach = max((last[t.name] for t in tensors_read(model, node) if t.name in last), default=-1)
        for tensor in node.outputs:
            found = max(reach, sites.get(tensor.name, -1))
            if found >= 0:
                last[tensor.name] = found
    return last


def _sum_with(model: Model, op: LinearOp, shapes: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The sum of equal shapes that is all the operator's output goes into, and its other operand, if so."""
    y = model.tensor(op.y)
    readers = model.consumers(y)
    if len(readers) != 1 or readers[0].op != "Add" or model.is_output(y) or model.captured(y):
        return None
    add = readers[0]
    rest = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
    total = add.outputs[0].name
    if rest is y or model.is_weight(rest):
        return None
    infos = [shapes.get(name) for name in (op.y, rest.name, total)]
    found = [info.shape for info in infos if info is not None and info.shape is not None]
    if len(found) < 3 or len({len(shape) for shape in found}) != 1:
        return None
    # A size that broadcasts would make the rest too small to subtract from the sum.
    if any(1 in sizes and len(set(sizes)) > 1 for sizes in zip(*found, strict=True)):
        return None
    return total, rest.name


def channel_axis(op: LinearOp) -> int:
    """The axis of an operator's output that its channels are on: 1 of a convolution, else the last."""
    return 1 if op.kind == "conv" else -1


def kept_channels(model: Model, name: str, axis: int) -> tuple[int, ...] | str | None:
    """The channels of the original's tensor that the model's of the same name has left, None for all; or why
    that is no matter of one axis.

    Args:
        model: the one that was cut.
        name: of the tensor.
        axis: of its channels.
    """
    maps = model.index_maps.get(name, ())
    if maps is None:
        return f"which indices of '{name}' are left differs from run to run"
    changed = {number: places for number, places in enumerate(maps) if places is not None}
    if not changed:
        return None
    if set(changed) != {axis % len(maps)}:
        return f"'{name}' was cut along other axes than its channels"
    return tuple(changed[axis % len(maps)].tolist())


def _completed(model: Model, known: Shapes) -> dict[str, TensorInfo]:
    """Types and shapes of the model's tensors, with what those of the original tell of their namesakes. Where
    the two contradict each other, what the model's own operators show is right, what its file says is not."""
    unproved, found = model.unproved(), model.shapes()
    theirs = {name: _cut_info(model, known.get(name)) for name in found}
    return {
        name: info if name not in unproved and contradicts(info, theirs[name]) else fill(info, theirs[name])
        for name, info in found.items()
    }


def _cut_info(model: Model, info: TensorInfo | None) -> TensorInfo | None:
    """Type and shape of the original's tensor, with the sizes of the model's cut one of the same name."""
    maps = None if info is None else model.index_maps.get(info.name, ())
    if info is None or info.shape is None or not maps:
        return info if maps is not None else None
    sizes = (size if own is None else len(own) for size, own in zip(info.shape, maps, strict=True))
    return replace(info, shape=tuple(sizes))


def comparable_channels(
    model: Model,
    name: str,
    axis: int,
    shapes: Mapping[str, TensorInfo],
    known: Mapping[str, TensorInfo],
) -> tuple[int, ...] | str | None:
    """`kept_channels` of a tensor, or why it can't be compared with the original's of the same name."""
    if name not in known:
        return f"its output '{name}' is not a tensor of the original"
    ours, theirs = shapes[name].shape, known[name].shape
    if ours is None or theirs is None:
        return f"the shape of its output '{name}' is not known"
    if len(ours) < 2:
        return f"its output '{name}' has no batch axis"
    channels = kept_channels(model, name, axis)
    if isinstance(channels, str):
        return channels
    sizes = list(theirs)
    if channels is not None:
        sizes[axis] = len(channels)
    clash = any(
        a != b and isinstance(a, int) and isinstance(b, int) for a, b in zip(ours, sizes, strict=False)
    )
    if clash or len(ours) != len(theirs):
        return f"its output '{name}' has another shape in the original"
    return channels
