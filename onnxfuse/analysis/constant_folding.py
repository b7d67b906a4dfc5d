"""Folding constants: the part of a graph that depends on nothing but constants, computed once and stored.

Two kinds of nodes go. `Shape` and `Size` of static dimensions (also `Gather` or `Slice` of a `Shape` where
just the dimensions picked are static: a batch that stays dynamic does no harm). And nodes all of whose
inputs are constants, evaluated together in one ONNX Runtime session on the CPU.

What is folded is decided before anything is computed, from the shapes. The file must not grow: a result is
charged its size, less that of the constants nobody needs any more, and all results together may cost
`GROWTH` bytes. That keeps a ConstantOfShape, an Expand, or the transpose of an embedding that is also used
as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.shape_inference import weightless
from onnxfuse.ir.shapes import Shapes, TensorInfo, info_of
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import is_main_domain, optional_input
from onnxfuse.ops.table import OPS, Kind, Trait
from onnxfuse.runtime.session import Runtime

GROWTH = 1 << 20

_RANDOM = OPS.of_kind(Kind.RANDOM).names | {"Dropout"}  # which draws numbers in training
# Weights in a compact form: evaluating them would undo the compression.
_COMPACT = OPS.of_kind(Kind.QUANTIZE).names
# Operators whose result has at most as many bytes as their first input, whatever shape it takes.
_NOT_LARGER = OPS.having(Trait.SAME_ELEMENTS).names | {"Slice", "Compress"}


@dataclass
class Folded:
    """The outcome of `fold_constants`.

    `shape_nodes` and `evaluated` name the nodes that are gone, `stored` the tensors that became initializers,
    `overridden` the initializers among the inputs that a user could have fed; `refused` says why nodes
    stayed; `growth` is in bytes; `shapes` are `proven_shapes` afterwards.
    """

    shapes: dict[str, TensorInfo]
    shape_nodes: list[str] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    growth: int = 0
    refused: dict[Node, str] = field(default_factory=dict)
    overridden: list[str] = field(default_factory=list)


def fold_constants(model: Model, budget: int = GROWTH) -> Folded:
    """Replace the tensors that `model` computes from constants by initializers of the same names.

    `budget` bounds the growth of the file, in bytes. Results whose size shape inference cannot tell yet are
    left for another call, after which more shapes may be known.
    """
    folded = Folded(shapes=proven_shapes(model))
    _fold_shapes(model, folded)
    if folded.shape_nodes:
        model.prune()
        folded.shapes = proven_shapes(model)
    if chosen := _choose(model, budget, folded):
        _store(model, chosen, folded)
        folded.shapes = proven_shapes(model)
    return folded


def proven_shapes(model: Model) -> dict[str, TensorInfo]:
    """Types and shapes of computed tensors, as they follow from the inputs' declarations alone.

    What the file declares of other tensors may be wrong: a batch of one there often survives from an export
    whose inputs were made dynamic afterwards. Whoever folds by a shape must not believe it.
    """
    light = weightless(model, {value.name for value in model.source.graph.value_info})
    for output in light.graph.output:
        output.type.tensor_type.ClearField("shape")
    for propagate in (True, False):
        try:
            done = onnx.shape_inference.infer_shapes(light, strict_mode=False, data_prop=propagate)
        except Exception:  # comes from C++ as several types; what inference trips over only costs knowledge
            continue
        values = (*done.graph.input, *done.graph.value_info, *done.graph.output)
        return {value.name: info_of(value) for value in values}
    return {}


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


def _fold_shapes(model: Model, folded: Folded) -> None:
    for node in list(model.nodes):
        if not is_main_domain(node) or not node.outputs:
            continue
        value = static_value(model, node, folded.shapes)
        if value is None or model.is_output(node.outputs[0]):
            continue
        tensor = node.outputs[0]
        folded.shape_nodes.append(node.site_name)
        model.remove([node])
        to_initializer(model, tensor, value)


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


def _choose(model: Model, budget: int, folded: Folded) -> list[Node]:
    """The nodes to evaluate, in topological order, within the budget."""
    chosen: list[Node] = []
    sizes: dict[Tensor, int] = {}
    users: dict[Tensor, int] = {}
    for node in model.nodes:
        if not _is_candidate(model, node):
            continue
        inputs = list(dict.fromkeys(t for t in node.inputs if t.name))
        if not all(t in sizes or model.is_weight(t) for t in inputs):
            continue
        for tensor in inputs:
            if tensor not in sizes:
                dtype, shape = weight_type(model, tensor)
                sizes[tensor] = math.prod(shape) * dtype.itemsize
            if tensor not in users:
                users[tensor] = len(model.consumers(tensor)) + model.is_output(tensor)
        reason, outputs = _weigh(model, node, sizes, folded.shapes)
        freed = sum(sizes[t] for t in inputs if users[t] == 1)
        growth = sum(outputs.values()) - freed
        if reason is None and growth > 0 and folded.growth + growth > budget:
            reason = f"the constant that {node.op} computes would make the file {growth / 1e6:.1f} MB larger"
        if reason is not None:
            folded.refused[node] = reason
            continue
        chosen.append(node)
        sizes.update(outputs)
        folded.growth += growth
        for tensor in inputs:
            users[tensor] -= 1
    return chosen


def _is_candidate(model: Model, node: Node) -> bool:
    return (
        is_main_domain(node)
        and bool(node.inputs)
        and node.op not in _RANDOM | _COMPACT
        and not node.bodies
        and not any(model.is_output(t) for t in node.outputs)
    )


def _weigh(
    model: Model, node: Node, sizes: Mapping[Tensor, int], shapes: Shapes
) -> tuple[str | None, dict[Tensor, int]]:
    """(why the node can't be evaluated, bytes of each of its outputs)."""
    if any(_stored_outside(t) and sizes[t] > GROWTH for t in node.inputs if t.name):
        return "its input is a large tensor in an external data file", {}
    outputs: dict[Tensor, int] = {}
    for tensor in node.outputs:
        if not tensor.name:
            continue
        info = shapes.get(tensor.name)
        if info is None or info.dtype is None or info.dtype.kind not in "biuf":
            return f"the type of what {node.op} computes is unknown or not one that can be read back", {}
        known = None if info.shape is None else _integers(info.shape)
        if known is not None:
            outputs[tensor] = math.prod(known.tolist()) * info.dtype.itemsize
        elif node.op in _NOT_LARGER:
            outputs[tensor] = sizes[node.inputs[0]]
        else:
            return f"the size of what {node.op} computes is unknown", {}
    return None, outputs


def _stored_outside(tensor: Tensor) -> bool:
    return isinstance(tensor, Constant) and tensor.stored is not None and tensor.stored.external


def _store(model: Model, chosen: list[Node], folded: Folded) -> None:
    """Evaluate the chosen nodes and store those of their results that other nodes need."""
    inside = set(chosen)
    wanted = [
        (tensor, node)
        for node in chosen
        for tensor in node.outputs
        if tensor.name and any(user not in inside for user in model.consumers(tensor))
    ]
    values, failed = _evaluate(model, [tensor.name for tensor, _ in wanted])
    for tensor, node in wanted:
        if tensor.name in failed:
            folded.refused[node] = failed[tensor.name]
    names = {node: node.site_name for node in chosen}
    folded.overridden += [t.name for node in chosen for t in node.inputs if t.name and overridable(model, t)]
    failing = {node for tensor, node in wanted if tensor.name in failed}
    model.remove({node for _, node in wanted} - failing)
    for tensor, node in wanted:
        if node not in failing:
            to_initializer(model, tensor, values[tensor.name])
            folded.stored.append(tensor.name)
    model.prune()
    left = set(model.nodes)
    folded.evaluated += [name for node, name in names.items() if node not in left]


def _evaluate(model: Model, names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The values of tensors that depend on constants alone, and why some could not be computed."""
    if not names:
        return {}, {}
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
    "GROWTH",
    "Folded",
    "fold_constants",
    "integers",
    "overridable",
    "param",
    "proven_shapes",
    "to_initializer",
]
