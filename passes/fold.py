"""fold: every simplification that leaves the function as it is, to a fixed point.

1. Constants (`onnxfuse.constants`): what depends on nothing but constants, and shapes that are static.
2. BatchNormalization, and scaling or shifting by a constant per channel, into the linear operator before it,
   or into the one behind it. With y = W x + b in front, scale s and shift t per channel of y,
       s (W x + b) + t = (diag(s) W) x + (s b + t),
   and behind it, W (s x + t) + b = (W diag(s)) x + (W t + b): the latter for a convolution only if it does
   not pad or t = 0, since what it pads with is zero, not t.
3. Operators that do nothing (`onnxfuse.noops`): Identity, Dropout in inference, a Reshape to the same shape;
   Transposes and Reshapes in a row.
4. Two linear operators with nothing between them become one where that is exact (`onnxfuse.compose`) and
   takes no more multiplications. A factorised pair d -> r -> d stays a pair, an expanded one is contracted.

The walk keeps a list of nodes still to look at. A rule only decides; its edit is made afterwards, and puts
the nodes around it back on the list. Every edit removes a node or moves a constant towards its operator, so
the number of looks is linear in that of the nodes. Numbers are float64 until they are stored.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from onnxfuse.analysis.constant_folding import GROWTH, fold_constants, integers, label, overridable
from onnxfuse.analysis.noops import OPERATORS, handed_on, permutation
from onnxfuse.findings import Change, Json, Skip
from onnxfuse.ir.editing import PASS_KEY, REPLACES_KEY
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.numerics.composition import ConvShape, border_reason, compose_conv, compose_dense, compose_shape
from onnxfuse.ops.channel_affine import (
    AFFINE_OPERATORS,
    CARRIERS,
    ChannelAffine,
    affine_input,
    carried_channels,
    channel_affine,
    training_mode,
)
from onnxfuse.ops.linear import (
    LINEAR_OPERATORS,
    LinearOp,
    is_main_domain,
    is_shared,
    linear_op,
    optional_input,
    output_axis,
    weight_type,
)
from onnxfuse.ops.linear_weights import overflow, write_weights
from onnxfuse.ops.table import OPS, Kind, Trait
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult

NAME = "fold"
MAX_CARRIERS = 6  # operators looked through between a BatchNormalization and the linear operator behind it


@dataclass(frozen=True)
class Edit:
    """One decided rewrite: what it is, for the report, and how to make it.

    `make` returns the nodes around which there may be more to do.
    """

    nodes: tuple[str, ...]
    what: str
    make: Callable[[], Iterable[Node]]
    detail: Mapping[str, Json] = field(default_factory=dict)


class Fold(Pass):
    """Constants, BatchNorms, operators that do nothing and linear pairs, folded away; exact."""

    name = NAME
    contract = Contract.EXACT
    summary: ClassVar[str] = (
        "folds constants, BatchNorms and no-ops away; joins linear pairs where exact and cheaper"
    )

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite `model` until nothing more can be folded."""
        folding = Folding(model)
        folding.run()
        return PassResult(
            model=model,
            changes=folding.changes,
            skipped=folding.skips(),
            notes=folding.notes(),
        )


class Folding:
    """One run of the pass over one model: what is still to be looked at, and what was done and refused."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shapes: dict[str, TensorInfo] = {}
        self.changes: list[Change] = []
        self._reasons: dict[Node, Skip] = {}
        self._uncomputed: dict[Node, Skip] = {}
        self._queue: deque[Node] = deque()
        self._queued: set[Node] = set()
        self._overridden: dict[str, None] = {}
        self._growth = 0

    def run(self) -> None:
        """Fold constants, then everything else, until a round changes nothing."""
        done = -1
        while done != len(self.changes):
            done = len(self.changes)
            self._reasons.clear()
            self._uncomputed.clear()
            self._fold_constants()
            self._walk()
            self.model.prune()

    def skips(self) -> list[Skip]:
        """What was refused, in the order of the nodes."""
        return [
            found[n] for n in self.model.nodes for found in (self._uncomputed, self._reasons) if n in found
        ]

    def notes(self) -> list[str]:
        """What the user should know besides."""
        if not self._overridden:
            return []
        names = ", ".join(f"'{n}'" for n in list(self._overridden)[:3])
        more = f" and {len(self._overridden) - 3} more" if len(self._overridden) > 3 else ""
        return [f"initializers that are also graph inputs were folded at their stored values: {names}{more}"]

    # ---- the walk ----------------------------------------------------------------------------------------

    def _fold_constants(self) -> None:
        folded = fold_constants(self.model, GROWTH - self._growth)
        self.shapes = folded.shapes
        self._growth += folded.growth
        self._overridden.update(dict.fromkeys(folded.overridden))
        for node, reason in folded.refused.items():
            self._uncomputed[node] = Skip((label(node),), reason)
        if folded.shape_nodes:
            names = tuple(folded.shape_nodes)
            self.changes.append(Change(names, "static shapes became constants"))
        if folded.evaluated:
            detail: dict[str, Json] = {
                "nodes": len(folded.evaluated),
                "stored": folded.stored,
                "bytes": folded.growth,
            }
            self.changes.append(Change(tuple(folded.evaluated), "constants computed once", detail))

    def _walk(self) -> None:
        self._enqueue(self.model.nodes)
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(node)
            if node.outputs:
                self._look_at(node)

    def _enqueue(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.outputs and node not in self._queued:
                self._queued.add(node)
                self._queue.append(node)

    def _look_at(self, node: Node) -> None:
        self._reasons.pop(node, None)
        for rule in RULES.get(node.op, ()) if is_main_domain(node) else ():
            outcome = rule(self, node)
            if isinstance(outcome, Edit):
                self.changes.append(Change(outcome.nodes, outcome.what, outcome.detail))
                self._enqueue(self._around(outcome.make()))
                return
            if outcome is not None:
                self._reasons[node] = outcome

    def _around(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes, what feeds them and what they feed."""
        found: dict[Node, None] = {}
        for node in nodes:
            found[node] = None
            for tensor in node.inputs:
                found.update(dict.fromkeys(tensor.inputs))
            for tensor in node.outputs:
                found.update(dict.fromkeys(self.model.consumers(tensor)))
        return list(found)

    # ---- looking -----------------------------------------------------------------------------------------

    def shape(self, tensor: Tensor) -> tuple[int | str | None, ...] | None:
        info = self.shapes.get(tensor.name)
        return None if info is None else info.shape

    def rank(self, tensor: Tensor) -> int | None:
        shape = self.shape(tensor)
        return None if shape is None else len(shape)

    def pinned(self, tensor: Tensor) -> bool:
        """Whether the tensor must go on existing under its name: a graph output, or seen by a subgraph."""
        return self.model.is_output(tensor) or self.model.captured(tensor)

    def only_user(self, tensor: Tensor) -> Node | None:
        """The one node that sees the tensor, through one of its inputs; None if there are other uses."""
        return None if self.pinned(tensor) or len(tensor.outputs) != 1 else tensor.outputs[0]

    def linear_before(self, tensor: Tensor, user: Node) -> LinearOp | str:
        """The linear operator whose output `tensor` is, as `user` sees it; or why there is none."""
        node = self.model.producer(tensor)
        if node is None:
            return f"'{tensor.name}' is not computed by a linear operator"
        op = linear_op(self.model, node, self.shapes, transposed=True)
        if isinstance(op, LinearOp):
            return replace(op, bias_node=None) if op.bias_node is user else op
        if node.op == "Add":
            for operand in node.inputs:
                source = self.model.producer(operand)
                if source is None:
                    continue
                biased = linear_op(self.model, source, self.shapes, transposed=True)
                if isinstance(biased, LinearOp) and biased.bias_node is node:
                    return biased
        return op

    # ---- editing -----------------------------------------------------------------------------------------

    def read_instead(self, old: Tensor, new: Tensor) -> list[Node]:
        """Let every node that reads `old` read `new`; returns those nodes."""
        users = list(dict.fromkeys(old.outputs))
        for user in users:
            for index, tensor in enumerate(user.inputs):
                if tensor is old:
                    user.inputs[index] = new
        return users

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Remove the nodes whose outputs have no use any more, upwards from `tensors`."""
        stack = list(tensors)
        while stack:
            node = self.model.producer(stack.pop())
            if node is None or any(t.outputs or self.pinned(t) for t in node.outputs):
                continue
            stack.extend(t for t in node.inputs if t.name)
            self.model.remove([node])

    def store(self, op: LinearOp, weight: np.ndarray | None, bias: np.ndarray | None, cost: int) -> None:
        """Write new weights, which make the file `cost` bytes larger."""
        self._growth += cost
        self.overriding(t for t in (op.weight_tensor, op.own_bias, op.added_bias) if t is not None)
        write_weights(self.model, op, weight, bias, by=NAME)

    def copy_cost(self, op: LinearOp) -> int:
        """Bytes that new weights for `op` take besides the old ones: all, where those have other users."""
        shared = is_shared(self.model, op.weight_tensor, op.node)
        return op.out_features * op.columns * op.dtype.itemsize if shared else 0

    def beyond_budget(self, cost: int) -> str | None:
        """Why the file may not grow by that many bytes more, if it may not."""
        if cost <= 0 or self._growth + cost <= GROWTH:
            return None
        return f"the weights are shared with other operators, and a copy would take {cost / 1e6:.1f} MB"

    def overriding(self, tensors: Iterable[Tensor]) -> None:
        """Remember which of these weights, now folded, a user could have fed."""
        self._overridden.update(dict.fromkeys(t.name for t in tensors if overridable(self.model, t)))


def mark(node: Node, replaced: Iterable[str]) -> None:
    """Note in the node's metadata that this pass made it stand for the nodes named `replaced` as well."""
    names = json.loads(node.metadata.get(REPLACES_KEY, "[]"))
    node.metadata[PASS_KEY] = NAME
    node.metadata[REPLACES_KEY] = json.dumps(list(dict.fromkeys([*names, *replaced])))


Outcome = Edit | Skip | None
Rule = Callable[[Folding, Node], Outcome]


def refuse(node: Node, reason: str) -> Skip:
    return Skip((label(node),), reason)


# ---- operators that do nothing -----------------------------------------------------------------------------


def remove_no_op(folding: Folding, node: Node) -> Outcome:
    """Take out a node whose output is its input."""
    source = handed_on(folding.model, node, folding.shapes)
    return None if source is None else bypass(folding, node, source, f"{node.op} does nothing here: removed")


def bypass(folding: Folding, node: Node, source: Tensor, what: str) -> Outcome:
    """Let everything that reads the node's output read `source` instead.

    An output that is pinned to its name is taken over by the source's producer, if that can give its own up.
    """
    model, target = folding.model, node.outputs[0]
    if not folding.pinned(target):
        if not target.outputs:  # dead as it came; not ours to clean up
            return None

        def make() -> list[Node]:
            folding.overriding(node.inputs)
            users = folding.read_instead(target, source)
            dropped = list(node.inputs)
            model.remove([node])
            folding.release(dropped)
            return users

        return Edit((label(node),), what, make)
    producer = model.producer(source)
    if producer is None or model.is_weight(source) or folding.pinned(source):
        return refuse(
            node, f"{node.op} does nothing, but connects '{source.name}' to '{target.name}': both stay"
        )

    def rename() -> list[Node]:
        assert producer is not None
        folding.overriding(node.inputs)
        dropped = [t for t in node.inputs if t is not source]
        model.remove([node])
        producer.outputs[next(i for i, t in enumerate(producer.outputs) if t is source)] = target
        users = folding.read_instead(source, target)
        folding.release(dropped)
        return [producer, *users]

    return Edit((label(node),), what, rename)


# ---- rearrangements in a row -------------------------------------------------------------------------------


def join_transposes(folding: Folding, node: Node) -> Outcome:
    """Two Transposes in a row are one: output axis i is axis first[second[i]] of the input."""
    before = folding.model.producer(node.inputs[0])
    if before is None or before.op != "Transpose" or not is_main_domain(before):
        return None
    first, second = permutation(before, folding.shapes), permutation(node, folding.shapes)
    if first is None or second is None or len(first) != len(second):
        return None
    perm = [first[p] for p in second]
    if perm == sorted(perm):
        return bypass(folding, node, before.inputs[0], "a Transpose undoes the one before it: removed")
    if folding.only_user(node.inputs[0]) is not node:
        return None
    names = (label(before), label(node))

    def make() -> list[Node]:
        between = node.inputs[0]
        node.attrs["perm"] = perm
        node.inputs[0] = before.inputs[0]
        mark(node, names)
        folding.release([between])
        return [node]

    return Edit(names, "two Transposes joined", make)


_SAME_ORDER = OPS.of_kind(Kind.MOVE).having(Trait.SAME_ORDER)


def join_reshapes(folding: Folding, node: Node) -> Outcome:
    """A Reshape need not care for what shape its input had, unless it copies sizes from it."""
    before = folding.model.producer(node.inputs[0])
    if before is None or before.key not in _SAME_ORDER:
        return None
    target = integers(folding.model, optional_input(node, 1))
    if target is None or 0 in target or folding.only_user(node.inputs[0]) is not node:
        return None
    names = (label(before), label(node))

    def make() -> list[Node]:
        between = node.inputs[0]
        node.inputs[0] = before.inputs[0]
        mark(node, names)
        folding.release([between])
        return [node]

    return Edit(names, f"{before.op} before Reshape removed", make)


# ---- scale and shift into a linear operator --------------------------------------------------------------


def fold_affine(folding: Folding, node: Node) -> Outcome:
    """BatchNormalization, Mul, Add, ... into the linear operator before or behind."""
    x = affine_input(folding.model, node)
    if x is None:
        return None
    before = _into_previous(folding, node, x)
    if isinstance(before, Edit):
        return before
    behind = _into_next(folding, node, x)
    if isinstance(behind, Edit) or node.op != "BatchNormalization":
        return behind if isinstance(behind, Edit) else None
    if training_mode(node):
        return refuse(node, "BatchNormalization is in training mode")
    return refuse(
        node, f"BatchNormalization stays. Not into what is before it: {before}. Nor behind it: {behind}"
    )


def _into_previous(folding: Folding, node: Node, x: Tensor) -> Edit | str:
    op = folding.linear_before(x, node)
    if isinstance(op, str):
        return op
    if folding.only_user(x) is not node:
        return f"'{x.name}' is a graph output or has other users"
    axis, rank = output_axis(op, folding.shapes)
    affine = channel_affine(folding.model, node, op.out_features, axis, rank)
    if isinstance(affine, str):
        return affine
    if node.op in ("Add", "Sub") and op.node.op == "MatMul" and op.bias_node is None and affine.scale[0] == 1:
        return "it is the bias of a MatMul already"
    scaled = op.weight * affine.scale[:, None]
    # As stored: a scale that is 1 but for rounding must not break ties.
    with np.errstate(over="ignore"):  # `overflow` below tells
        scales = not np.array_equal(scaled.astype(op.dtype), op.weight.astype(op.dtype))
    cost = folding.copy_cost(op) if scales else 0
    weight = scaled if scales else None
    bias = op.bias * affine.scale + affine.shift
    if reason := _too_dear(folding, node, cost) or overflow(op, weight, bias):
        return reason
    names = (*map(label, op.nodes), label(node))

    def make() -> list[Node]:
        target = node.outputs[0]
        last = op.nodes[-1]
        folding.overriding(node.inputs)
        folding.model.remove([node])
        last.outputs[0] = target
        mark(op.node, names)
        folding.store(op, weight, bias, cost)
        return [op.node, last]

    return Edit(names, f"{node.op} into {op.node.op}", make, {"channels": op.out_features})


def _too_dear(folding: Folding, node: Node, cost: int) -> str | None:
    """Why a tie of weights is not worth breaking, if it has to be: an element-wise operator costs little."""
    if cost and node.op != "BatchNormalization":
        return "the weights it would go into are shared with other operators"
    return folding.beyond_budget(cost)


def _into_next(folding: Folding, node: Node, x: Tensor) -> Edit | str:
    path, op = _linear_behind(folding, node)
    if isinstance(op, str):
        return op
    # LayerNorm written out ends in Mul and Add, GELU in Mul: runtimes recognise them only as a whole.
    if node.op != "BatchNormalization" and (op.kind != "conv" or path or _ends_gelu(folding, x)):
        return "only BatchNormalization is folded into a dense layer, or behind a GELU"
    affine = _input_affine(folding, node, x, path, op)
    if isinstance(affine, str):
        return affine
    if op.kind == "conv" and np.any(affine.shift) and (op.pads is None or any(op.pads)):
        return "the convolution behind pads with zeros, which the shift would not be added to"
    weight, bias = _rescale_inputs(op, affine)
    cost = folding.copy_cost(op)
    if reason := _too_dear(folding, node, cost) or overflow(op, weight, bias):
        return reason
    names = (label(node), *map(label, op.nodes))

    def make() -> list[Node]:
        folding.overriding(node.inputs)
        folding.read_instead(node.outputs[0], x)
        folding.model.remove([node])
        mark(op.node, names)
        folding.store(op, weight, bias if np.any(affine.shift) else None, cost)
        return [*path, op.node]

    return Edit(names, f"{node.op} into the {op.node.op} behind it", make, {"channels": op.in_features})


def _ends_gelu(folding: Folding, x: Tensor) -> bool:
    """Whether `x` is h * (1 + erf(..)) or h * (1 + tanh(..)), with a constant factor still to come."""
    product = folding.model.producer(x)
    if product is None or product.op != "Mul":
        return False
    sums = [n for t in product.inputs for n in t.inputs if n.op == "Add"]
    return any(n.op in ("Erf", "Tanh") for s in sums for t in s.inputs for n in t.inputs)


def _linear_behind(folding: Folding, node: Node) -> tuple[list[Node], LinearOp | str]:
    """The nodes behind that keep channels apart, then the linear operator that alone reads the last."""
    path: list[Node] = []
    tensor = node.outputs[0]
    while True:
        user = folding.only_user(tensor)
        if user is None:
            return path, f"'{tensor.name}' is a graph output or has several users"
        if user.op not in CARRIERS or not is_main_domain(user) or len(path) == MAX_CARRIERS:
            break
        path.append(user)
        tensor = user.outputs[0]
    op = linear_op(folding.model, user, folding.shapes)
    if isinstance(op, LinearOp) and op.node.inputs[0] is not tensor:
        return path, "it is not the input of the linear operator"
    return path, op


def _input_affine(
    folding: Folding, node: Node, x: Tensor, path: list[Node], op: LinearOp
) -> ChannelAffine | str:
    """Scale and shift for each input feature of `op`."""
    rank = folding.rank(x)
    if not path:
        axis, rank = (1, len(op.kernel) + 2) if op.kind == "conv" else (-1, rank)
        return channel_affine(folding.model, node, op.in_features, axis, rank)
    channels = math.prod(weight_type(folding.model, node.inputs[1])[1])
    affine = channel_affine(folding.model, node, channels, 1, rank)
    if isinstance(affine, str):
        return affine
    origin = carried_channels(path, channels, op, folding.shapes, increasing=bool((affine.scale > 0).all()))
    if isinstance(origin, str):
        return origin
    return ChannelAffine(affine.scale[origin], affine.shift[origin])


def _rescale_inputs(op: LinearOp, affine: ChannelAffine) -> tuple[np.ndarray, np.ndarray]:
    """W diag(s) and W t + b, with s and t for each input channel."""
    taps = math.prod(op.kernel)
    grouped = op.weight.reshape(op.groups, op.out_features // op.groups, -1, taps)
    scale, shift = (v.reshape(op.groups, 1, -1, 1) for v in (affine.scale, affine.shift))
    weight = (grouped * scale).reshape(op.out_features, op.columns)
    return weight, op.bias + (grouped * shift).sum(axis=(2, 3)).reshape(-1)


# ---- linear pairs ----------------------------------------------------------------------------------------


def join_linear(folding: Folding, node: Node) -> Outcome:
    """Two linear operators with nothing between them into one, where it is exact and not dearer."""
    second = linear_op(folding.model, node, folding.shapes)
    if isinstance(second, str):
        return None
    between = node.inputs[0]
    first = folding.linear_before(between, node)
    if isinstance(first, str) or first.kind == "conv_transpose":
        return None
    if (first.kind == "conv") != (second.kind == "conv"):
        return None
    names = tuple(map(label, (*first.nodes, *second.nodes)))
    joined = _join(folding, first, second)
    return Skip(names, f"not joined: {joined}") if isinstance(joined, str) else replace(joined, nodes=names)


def _join(folding: Folding, first: LinearOp, second: LinearOp) -> Edit | str:
    between = second.node.inputs[0]
    if folding.only_user(between) is not second.node:
        return f"'{between.name}' between them is a graph output or has other users"
    shapes = _conv_shapes(first, second) if second.kind == "conv" else None
    if isinstance(shapes, str):
        return shapes
    ratio = _cost_ratio(folding, first, second, shapes)
    if ratio > 1:
        return f"one operator would take {ratio:.2g} times the multiplications of the two"
    if shapes is None:
        weight, bias = compose_dense((first.weight, first.bias), (second.weight, second.bias))
        joined = replace(second, in_features=first.in_features)
    else:
        composed, kernel, bias = compose_conv(
            shapes[0], _kernel(first), first.bias, shapes[1], _kernel(second), second.bias
        )
        weight = kernel.reshape(second.out_features, -1)
        joined = replace(
            second,
            in_features=first.in_features,
            groups=composed.groups,
            kernel=composed.kernel,
            strides=composed.strides,
            dilations=composed.dilations,
            pads=composed.pads,
        )
    cost = folding.copy_cost(joined)
    if reason := folding.beyond_budget(cost) or overflow(second, weight, bias):
        return reason

    def make() -> list[Node]:
        node = second.node
        node.inputs[0] = first.node.inputs[0]
        if joined.kind == "conv":
            _set_geometry(node, joined)
        mark(node, map(label, (*first.nodes, *second.nodes)))
        folding.store(joined, weight, bias, cost)
        folding.release([between])
        return [node]

    what = f"{first.node.op} and {second.node.op} joined into one {second.node.op}"
    return Edit((), what, make, {"cost": round(ratio, 4)})


def _kernel(op: LinearOp) -> np.ndarray:
    return op.weight.reshape(op.out_features, -1, *op.kernel)


def _conv_shapes(first: LinearOp, second: LinearOp) -> tuple[ConvShape, ConvShape] | str:
    if len(first.kernel) != len(second.kernel):
        return "they have different numbers of spatial axes"
    if first.pads is None or second.pads is None:
        return "the pads depend on the input size (auto_pad)"
    one, two = (
        ConvShape(op.kernel, op.strides, op.dilations, op.pads or (), op.groups) for op in (first, second)
    )
    return border_reason(one, two, first.bias) or (one, two)


def _cost_ratio(
    folding: Folding, first: LinearOp, second: LinearOp, shapes: tuple[ConvShape, ConvShape] | None
) -> float:
    """Multiplications of the joined operator over those of the two."""
    if shapes is None:
        pair = first.columns * first.out_features + second.columns * second.out_features
        return first.in_features * second.out_features / pair
    composed = compose_shape(*shapes)
    rows = _hidden_rows(folding, first, second)
    pair_cost = rows * first.columns * first.out_features + second.columns * second.out_features
    columns = first.in_features // composed.groups * math.prod(composed.kernel)
    return columns * second.out_features / pair_cost


def _hidden_rows(folding: Folding, first: LinearOp, second: LinearOp) -> float:
    """Positions that the first convolution computes for each that the second does."""
    hidden, out = (folding.shape(op.node.outputs[0]) for op in (first, second))
    counts = [
        math.prod(d for d in shape[2:] if isinstance(d, int))
        for shape in (hidden, out)
        if shape is not None and all(isinstance(d, int) and d > 0 for d in shape[2:])
    ]
    # Without sizes: what large inputs tend to.
    return counts[0] / counts[1] if len(counts) == 2 else float(math.prod(second.strides))


def _set_geometry(node: Node, op: LinearOp) -> None:
    """Write a convolution's geometry into its attributes; defaults that were not spelled out stay so."""
    ones, zeros = [1] * len(op.kernel), [0] * 2 * len(op.kernel)
    node.attrs.pop("auto_pad", None)
    for name, value, default in (
        ("kernel_shape", list(op.kernel), None),
        ("strides", list(op.strides), ones),
        ("dilations", list(op.dilations), ones),
        ("pads", list(op.pads or ()), zeros),
        ("group", op.groups, 1),
    ):
        if name in node.attrs or (value != default and default is not None):
            node.attrs[name] = value


# ---- control flow ----------------------------------------------------------------------------------------


def constant_if(folding: Folding, node: Node) -> Outcome:
    """Say so where a branch can never run."""
    constant = folding.model.is_weight(node.inputs[0])
    return refuse(node, "the condition is constant, but branches are not inlined") if constant else None


RULES: dict[str, tuple[Rule, ...]] = dict.fromkeys(OPERATORS, (remove_no_op,))
for _name in AFFINE_OPERATORS:
    RULES[_name] = (*RULES.get(_name, ()), fold_affine)
for _name in LINEAR_OPERATORS:
    RULES[_name] = (join_linear,)
RULES["Transpose"] += (join_transposes,)
RULES["Reshape"] += (join_reshapes,)
RULES["If"] = (constant_if,)
