"""Folding constants: the part of a graph that depends on nothing but constants, computed once and stored.

Two kinds of nodes go. `Shape` and `Size` of static dimensions (also `Gather` or `Slice` of a `Shape` where
just the dimensions picked are static: a batch that stays dynamic does no harm). And nodes all of whose
inputs are constants, evaluated together in one ONNX Runtime session on the CPU.

What is folded is decided before anything is computed, from the shapes, by `analysis.constant_choice`: the
choice that leaves the fewest parameters, and of those the fewest bytes. So the model never grows. A
ConstantOfShape, an Expand, or the transpose of an embedding that is also used as it is stay in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from onnxfuse.analysis.constant_choice import State, Step, cheapest, parts
from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.shapes import Shapes, TensorInfo
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import is_main_domain, optional_input
from onnxfuse.ops.table import OPS, Kind, Trait
from onnxfuse.runtime.session import Runtime

LARGE = 1 << 20
"""Bytes from which a tensor in an external data file is left there."""

RANDOM = OPS.of_kind(Kind.RANDOM).names | {"Dropout"}  # which draws numbers in training
# Weights in a compact form: evaluating them would undo the compression.
_COMPACT = OPS.of_kind(Kind.QUANTIZE).names
# Operators whose result has at most as many bytes as their first input, whatever shape it takes.
_NOT_LARGER = OPS.having(Trait.SAME_ELEMENTS).names | {"Slice", "Compress"}
_HEADER = 16
"""Bytes that the file spends on an initializer or a node beside values, contents and name, about."""
_SMALL = 256
"""Bytes of integers that are not worth following to all that share them."""


@dataclass
class Folded:
    """The outcome of `fold_constants`.

    `shape_nodes` and `evaluated` name the nodes that are gone, `stored` the tensors that became initializers,
    `overridden` the initializers among the inputs that a user could have fed; `refused` says why nodes
    stayed; `shapes` are `Model.proven` afterwards.
    """

    shapes: dict[str, TensorInfo]
    shape_nodes: list[str] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    refused: dict[Node, str] = field(default_factory=dict)
    overridden: list[str] = field(default_factory=list)


def fold_constants(model: Model, shapes: dict[str, TensorInfo] | None = None) -> Folded:
    """Replace the tensors that `model` computes from constants by initializers of the same names.

    Neither the parameters nor the bytes of the model become more. Results whose size shape inference cannot
    tell yet are left for another call, after which more shapes may be known.

    Args:
        model: edited in place.
        shapes: its `Model.proven`, where that is known already.
    """
    known = model.proven() if shapes is None else shapes
    failed: dict[Node, str] = {}
    while True:
        choice = _Choice(model, known, failed)
        wanted = choice.wanted()
        values, errors = _evaluate(choice.trial(), [t.name for t in wanted]) if wanted else ({}, {})
        if not errors:
            break
        failed |= {node: errors[t.name] for t, node in wanted.items() if t.name in errors}
    folded = Folded(known, refused=choice.refused | failed)
    if choice.gone():
        _store(model, choice, values, folded)
        folded.shapes = model.proven()
    return folded


def integers(model: Model, tensor: Tensor | None) -> list[int] | None:
    """The value of a small integer constant as a flat list; None for anything else."""
    if tensor is None or not model.is_weight(tensor):
        return None
    dtype, shape = weight_type(model, tensor)
    if dtype.kind not in "iu" or math.prod(shape) > 64:
        return None
    value = model.weight(tensor)
    return None if value is None else [int(v) for v in value.reshape(-1)]


def overridable(model: Model, tensor: Tensor) -> bool:
    """Whether it is an initializer that a user may feed: one listed as an input too (IR 4 on)."""
    return model.source.ir_version >= 4 and model.listed.get(tensor.name) is tensor


def to_initializer(model: Model, tensor: Tensor, value: np.ndarray) -> None:
    """Turn a tensor whose producer was removed into an initializer of the same name.

    Bodies that capture it find it by that name.

    Args:
        model: edited in place.
        tensor: has no producer.
        value: is stored.

    Raises:
        ValueError: it still has a producer.
    """
    if tensor.inputs:
        raise ValueError(f"'{tensor.name}' is computed")
    constant = Constant(tensor.name, value)
    for node in dict.fromkeys(tensor.outputs):
        for index, used in enumerate(node.inputs):
            if used is tensor:
                node.inputs[index] = constant
    model.initializers[constant] = None


# ---- shapes ----------------------------------------------------------------------------------------------


def static_value(model: Model, node: Node, shapes: Shapes) -> np.ndarray | None:
    """The value of a node that reads a shape, None where a dimension that it needs is not static.

    Args:
        model: has the node.
        node: a Shape or Size, or a Gather or Slice of a Shape.
        shapes: of the model's tensors.
    """
    if node.op == "Shape":
        dims = _shape_read(node, shapes)
        return _integers(dims, (len(dims),)) if dims is not None else None
    if node.op == "Size":
        info = shapes.get(node.inputs[0].name)
        known = _integers(info.shape) if info is not None and info.shape is not None else None
        return None if known is None else np.array(math.prod(known.tolist()), np.int64)
    if node.op not in ("Gather", "Slice"):
        return None
    source = model.producer(node.inputs[0])
    if source is None or source.op != "Shape" or not is_main_domain(source):
        return None
    dims = _shape_read(source, shapes)
    if dims is None:
        return None
    return _gathered(model, node, dims) if node.op == "Gather" else _sliced(model, node, dims)


def _shape_read(node: Node, shapes: Shapes) -> tuple[int | str | None, ...] | None:
    info = shapes.get(node.inputs[0].name)
    if info is None or info.shape is None:
        return None
    return info.shape[node.attrs.get("start") : node.attrs.get("end")]


def _gathered(model: Model, node: Node, dims: Sequence[int | str | None]) -> np.ndarray | None:
    indices = integers(model, node.inputs[1])
    if indices is None or any(not -len(dims) <= i < len(dims) for i in indices):
        return None
    return _integers([dims[i] for i in indices], weight_type(model, node.inputs[1])[1])


def _sliced(model: Model, node: Node, dims: Sequence[int | str | None]) -> np.ndarray | None:
    start, end = (param(model, node, i, name) for i, name in ((1, "starts"), (2, "ends")))
    steps = [1] if optional_input(node, 4) is None else integers(model, node.inputs[4])
    if start is None or end is None or steps is None or not len(start) == len(end) == len(steps) == 1:
        return None
    if steps[0] < 1:
        return None
    picked = dims[start[0] : end[0] : steps[0]]
    return _integers(picked, (len(picked),))


def param(model: Model, node: Node, index: int, name: str) -> list[int] | None:
    """A list of integers that older opsets have as an attribute, newer ones as an input; None if unknown.

    Args:
        model: has the node.
        node: the node.
        index: of the input.
        name: of the attribute.
    """
    if name in node.attrs:
        value = node.attrs[name]
        return [int(v) for v in value] if isinstance(value, list) else [int(value)]
    return integers(model, optional_input(node, index))


def _integers(dims: Iterable[int | str | None], shape: tuple[int, ...] | None = None) -> np.ndarray | None:
    values = list(dims)
    if any(not isinstance(d, int) for d in values):
        return None
    array = np.array(values, np.int64)
    return array if shape is None else array.reshape(shape)


# ---- nodes with constant inputs --------------------------------------------------------------------------


class _Amount(NamedTuple):
    """What a tensor counts for: parameters (see `analysis.cost.Cost`), and bytes in the file."""

    parameters: int
    bytes: int


def _amount(dtype: np.dtype, shape: Iterable[int], name: str) -> _Amount:
    elements = math.prod(shape)
    index = dtype.kind in "bO" or (dtype.kind in "iu" and dtype.itemsize == 8)
    return _Amount(0 if index else elements, elements * dtype.itemsize + len(name) + _HEADER)


class _Choice:
    """The nodes that could be computed once, and what is to become of each.

    Attributes:
        static: values of the nodes that read a static shape.
        members: all such nodes, with what each of their outputs takes to store.
        states: what becomes of them.
        refused: why other nodes, and those that are kept, stay.
    """

    def __init__(self, model: Model, shapes: Shapes, failed: Mapping[Node, str]) -> None:
        self._model = model
        self.static: dict[Node, np.ndarray] = {}
        self.members: dict[Node, dict[Tensor, _Amount]] = {}
        self.refused: dict[Node, str] = {}
        self._weights: dict[Tensor, _Amount] = {}
        self._gather(shapes, failed)
        self.states = self._decide()

    def gone(self) -> list[Node]:
        """The nodes that are stored or dropped."""
        return [node for node, state in self.states.items() if state is not State.KEPT]

    def wanted(self) -> dict[Tensor, Node]:
        """The tensors to evaluate, and the nodes that compute them."""
        gone = set(self.gone())
        return {
            tensor: node
            for node, state in self.states.items()
            if state is State.STORED and node not in self.static
            for tensor in self.members[node]
            if any(user not in gone for user in self._model.consumers(tensor))
        }

    def trial(self) -> Model:
        """A copy of the model in which static shapes are constants."""
        trial = self._model.copy()
        for node, value in self.static.items():
            tensor = trial.tensor(node.outputs[0].name)
            trial.remove(tensor.inputs[:1])
            to_initializer(trial, tensor, value)
        return trial

    def _gather(self, shapes: Shapes, failed: Mapping[Node, str]) -> None:
        """Find the members, in topological order."""
        model, sizes = self._model, self._weights.copy()
        for node in model.nodes:
            if node in failed or not is_main_domain(node) or any(map(model.is_output, node.outputs)):
                continue
            if not any(model.consumers(t) for t in node.outputs):
                continue  # dead as it came
            value = static_value(model, node, shapes)
            inputs = [t for t in node.inputs if t.name]
            constant = is_deterministic(node) and all(t in sizes or model.is_weight(t) for t in inputs)
            for tensor in inputs if constant or value is not None else ():
                if tensor not in sizes and model.is_weight(tensor):
                    sizes[tensor] = self._weights[tensor] = _amount(*weight_type(model, tensor), tensor.name)
            if value is not None:
                self.static[node] = value
                outputs = {node.outputs[0]: _amount(value.dtype, value.shape, node.outputs[0].name)}
            elif constant and node.op not in _COMPACT:
                reason, outputs = _weigh(node, sizes, shapes)
                if reason is not None:
                    self.refused[node] = reason
                    continue
            else:
                continue
            self.members[node] = outputs
            sizes.update(outputs)

    def _decide(self) -> dict[Node, State]:
        """The states of the members: part by part the cheapest choice, if it makes the file no larger."""
        amounts, steps = self._steps()
        nodes = list(self.members)
        states: dict[Node, State] = {}
        first = len(steps) - len(nodes)
        for part in parts(steps):
            own = {place: index for index, place in enumerate(part)}
            local = [replace(steps[p], parents=[own[q] for q in steps[p].parents]) for p in part]
            found = cheapest(local)
            growth = sum(_growth(amounts[p], s, p < first) for p, s in zip(part, found, strict=True))
            if growth > 0:
                found = [State.KEPT] * len(part)
            for place, state in zip(part, found, strict=True):
                if place >= first:
                    states[nodes[place - first]] = state
        for place, node in enumerate(nodes, start=first):
            if states[node] is State.KEPT and steps[place].needed:
                numbers = f"the {amounts[place][0].parameters:,} numbers that {node.op} computes"
                self.refused[node] = f"{numbers} would come on top of what stays in use: left in the graph"
        return {node: states[node] for node in nodes}

    def _steps(self) -> tuple[list[tuple[_Amount, int]], list[Step]]:
        """What each step takes to store, with the bytes of its node; and the steps: weights, then members."""
        model, opset = self._model, self._model.opset
        places: dict[Tensor, int] = {}
        amounts: list[tuple[_Amount, int]] = []
        needed: list[bool] = []
        parents: list[list[int]] = []
        for tensor, amount in self._weights.items():
            users = [user for user in model.consumers(tensor) if user in self.members]
            # What stays in any case costs nothing, and axes and sizes would tie everything together.
            small = len(users) > 1 and not amount.parameters and amount.bytes <= _SMALL
            if not small and len(users) == len(model.consumers(tensor)) and not model.is_output(tensor):
                places[tensor] = len(amounts)
                amounts.append((amount, 0))
                needed.append(False)
                parents.append([])
        for node, outputs in self.members.items():
            parents.append(list(dict.fromkeys(places[t] for t in node.inputs if t in places)))
            places.update(dict.fromkeys(outputs, len(amounts)))
            used = [amount for tensor, amount in outputs.items() if model.consumers(tensor)]
            total = _Amount(sum(a.parameters for a in used), sum(a.bytes for a in used))
            amounts.append((total, node.proto(opset).ByteSize() + _HEADER))
            needed.append(any(user not in self.members for t in outputs for user in model.consumers(t)))
        scale = 1 + sum(amount.bytes + keep for amount, keep in amounts)
        costs = [(amount.parameters * scale + amount.bytes, keep) for amount, keep in amounts]
        steps = [
            Step(store, keep or None, need, own)
            for (store, keep), need, own in zip(costs, needed, parents, strict=True)
        ]
        return amounts, steps


def _growth(amount: tuple[_Amount, int], state: State, weight: bool) -> int:
    """Bytes by which a step makes the file larger; a weight is stored before, a member's node is there."""
    stored = amount[0].bytes if state is State.STORED else 0
    kept = amount[1] if state is State.KEPT else 0
    return stored + kept - (amount[0].bytes if weight else amount[1])


def is_deterministic(node: Node) -> bool:
    """Whether a node computes the same from the same inputs, by itself."""
    return is_main_domain(node) and bool(node.inputs) and node.op not in RANDOM and not node.bodies


def _weigh(
    node: Node, sizes: Mapping[Tensor, _Amount], shapes: Shapes
) -> tuple[str | None, dict[Tensor, _Amount]]:
    """(why the node can't be evaluated, what each of its outputs takes)."""
    if any(_stored_outside(t) and sizes[t].bytes > LARGE for t in node.inputs if t.name):
        return "its input is a large tensor in an external data file", {}
    outputs: dict[Tensor, _Amount] = {}
    for tensor in node.outputs:
        if not tensor.name:
            continue
        info = shapes.get(tensor.name)
        if info is None or info.dtype is None or info.dtype.kind not in "biuf":
            return f"the type of what {node.op} computes is unknown or not one that can be read back", {}
        known = None if info.shape is None else _integers(info.shape)
        if known is not None:
            outputs[tensor] = _amount(info.dtype, known.tolist(), tensor.name)
        elif node.op in _NOT_LARGER:
            outputs[tensor] = sizes[node.inputs[0]]
        else:
            return f"the size of what {node.op} computes is unknown", {}
    return None, outputs


def _stored_outside(tensor: Tensor) -> bool:
    return isinstance(tensor, Constant) and tensor.stored is not None and tensor.stored.external


def _store(model: Model, choice: _Choice, values: Mapping[str, np.ndarray], folded: Folded) -> None:
    """Put values in the place of the nodes that are gone."""
    gone = choice.gone()
    names = {node: node.site_name for node in gone}
    wanted = choice.wanted()
    folded.overridden += [t.name for node in gone for t in node.inputs if t.name and overridable(model, t)]
    fixed = {node.outputs[0]: choice.static[node] for node in gone if node in choice.static}
    model.remove([*dict.fromkeys(wanted.values()), *(node for node in gone if node in choice.static)])
    for tensor in (*fixed, *wanted):
        to_initializer(model, tensor, fixed[tensor] if tensor in fixed else values[tensor.name])
    model.prune()
    folded.stored += [tensor.name for tensor in wanted]
    left = set(model.nodes)
    for node, name in names.items():
        if node not in left:
            (folded.shape_nodes if node in choice.static else folded.evaluated).append(name)


def _evaluate(model: Model, names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The values of tensors that depend on constants alone, and why some could not be computed."""
    runtime = Runtime("cpu", threads=1)
    try:
        return runtime.session(model.extract([], names), optimize=False).run({}), {}
    except NotApplicableError as error:
        if len(names) == 1:
            return {}, {names[0]: str(error)}
    values: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    for name in names:  # one of them fails; find out which, so that the others go through
        done, reason = _evaluate(model, [name])
        values.update(done)
        failed.update(reason)
    return values, failed


__all__ = [
    "Folded",
    "fold_constants",
    "integers",
    "is_deterministic",
    "overridable",
    "param",
    "to_initializer",
]
