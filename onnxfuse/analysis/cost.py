"""The cost of a model: parameters, multiply-accumulates and bytes (latency: `runtime.latency`).

Multiply-accumulates (MACs) are counted by rules, one for each operator that multiplies by weights or
contracts two tensors; element-wise operators, normalizations, pooling and data movement count as 0, as is
usual. Where a rule needs a size that is not known, or an operator has no rule and could hide work (one that
multiplies, one that is in no table, a local function, a loop of unknown length), the count is None and says
why: a number that leaves something out would be worse. An `If` counts as its heavier branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx

from onnxfuse.ir.external_data import BITS, byte_size
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ir.protos import DEFAULT_DOMAINS, bodies, light_graph, operator_key
from onnxfuse.ir.shapes import Shapes, TensorInfo, info_of
from onnxfuse.ops.facet import Facet, keyed
from onnxfuse.ops.table import OPS, Key, Kind, Op
from onnxfuse.ops.view import ProtoView
from onnxfuse.runtime import observed_shapes

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed
    from onnxfuse.runtime.session import Runtime


DECLARED_ONLY = "MACs are counted at the shapes that the file declares: no run has confirmed them"
"""The warning where `count` gets shapes that are not those of a run."""

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """The cost of a model.

    `parameters` are the elements of all weights in use, a shared one counted once; 64-bit integers, booleans
    and strings (shapes, axes, indices) are not parameters. `bytes` are those of all stored values in use but
    strings. `macs` are for one run at the sizes given to `count`, or None with `macs_reason`.
    """

    parameters: int
    macs: int | None
    nodes: int
    bytes: int
    macs_reason: str | None = None


class _UnknownError(Exception):
    """A MAC count that cannot be made; the message says why."""


class CostNode(ProtoView):
    """A node as the rules see it: what it says, and the shapes of its tensors."""

    def __init__(self, proto: onnx.NodeProto, lookup: Callable[[str], tuple[int, ...]]) -> None:
        self.proto = proto
        self.lookup = lookup

    def input(self, index: int) -> tuple[int, ...]:
        return self.lookup(self.inputs[index])

    def output(self) -> tuple[int, ...]:
        return self.lookup(next(name for name in self.proto.output if name))


CostRule = Callable[[CostNode], int]


def _conv(weight: int) -> CostRule:
    """Every output element takes (C_in / groups) * prod(kernel) products; the weight is (out, in / groups,
    *kernel)."""
    return lambda op: math.prod(op.output()) * math.prod(op.input(weight)[1:])


def _conv_transpose(op: CostNode) -> int:
    """Every input element meets (C_out / groups) * prod(kernel) weights; the weight is (in, out / groups,
    *kernel)."""
    return math.prod(op.input(0)) * math.prod(op.input(1)[1:])


def _matmul(left: int) -> CostRule:
    """Every output element is a sum over the last axis of the left factor."""
    return lambda op: math.prod(op.output()) * op.input(left)[-1]


def _fused_matmul(op: CostNode) -> int:
    if op.attribute("transBatchA", 0) or op.attribute("transBatchB", 0):
        raise _UnknownError("a FusedMatMul of transposed batches has no rule")
    shape = op.input(0)
    return math.prod(op.output()) * shape[-2 if len(shape) > 1 and op.attribute("transA", 0) else -1]


def _gemm(op: CostNode) -> int:
    return math.prod(op.output()) * op.input(0)[0 if op.attribute("transA", 0) else 1]


def _einsum(op: CostNode) -> int:
    """One product for every combination of indices; with more than two factors this is the naive order's
    count."""
    equation = op.attribute("equation").replace(" ", "")
    sizes: dict[str, int] = {}
    for index, term in enumerate(equation.split("->")[0].split(",")):
        shape = op.input(index)
        if "..." in term:
            head, tail = term.split("...")
            dots = len(shape) - len(head) - len(tail)
            letters = [*head, *(f".{dots - i}" for i in range(dots)), *tail]
        else:
            letters = list(term)
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    return math.prod(sizes.values()) * max(1, len(op.inputs) - 1)


def _recurrent(op: CostNode) -> int:
    """Per step, sample and direction: all gates' input and recurrent matrices, (G*H, I) and (G*H, H)."""
    x, w, r = op.input(0), op.input(1), op.input(2)
    return (
        x[0] * x[1] * (math.prod(w) + math.prod(r))
    )  # layout 0 is (steps, batch, I), layout 1 (batch, steps, I)


def _attention(op: CostNode) -> int:
    """ONNX Attention: scores Q K^T, then probabilities times V; q_num_heads is needed where heads are not an
    axis."""
    q, k, v = op.input(0), op.input(1), op.input(2)
    if op.has(4):
        raise _UnknownError("an Attention with a key-value cache has no rule")
    if len(q) == 4:
        batch, heads, rows, width = q
        value_width = v[3]
    else:
        heads, shared = op.attribute("q_num_heads"), op.attribute("kv_num_heads")
        batch, rows, width, value_width = q[0], q[1], q[2] // heads, v[2] // shared
    return batch * heads * rows * k[-2] * (width + value_width)


def _nothing(op: CostNode) -> int:
    """Operators that multiply no tensors."""
    return 0


_RULES: Mapping[str, CostRule] = {
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "DeformConv": _conv(1),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul(0),
    "MatMulInteger": _matmul(0),
    "QLinearMatMul": _matmul(0),
    "Einsum": _einsum,
    "com.microsoft::FusedConv": _conv(1),
    "com.microsoft::FusedGemm": _gemm,
    "com.microsoft::FusedMatMul": _fused_matmul,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
}
_WORK = (Kind.LINEAR, Kind.RECURRENT, Kind.ATTENTION, Kind.CONTROL)


def _default(op: Op) -> CostRule | None:
    return None if op.kind in _WORK else _nothing


def _missing(op: Op) -> str:
    return "counted by its bodies" if op.kind is Kind.CONTROL else "unknown: no rule"


RULES = Facet(keyed(_RULES), _default, _missing)
"""By operator: MACs of one run."""


def is_free(key: Key) -> bool:
    """Whether an operator counts as 0, whatever the shapes."""
    return RULES.get(key) is _nothing


_LOOPS = OPS.of_kind(Kind.CONTROL).names - {"If"}  # which runs one of its bodies, once
_INDEX_TYPES = (
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT64,
    onnx.TensorProto.BOOL,
    onnx.TensorProto.STRING,
)
_SHORT_FORMS = {
    "value_float": onnx.TensorProto.FLOAT,
    "value_floats": onnx.TensorProto.FLOAT,
    "value_int": onnx.TensorProto.INT64,
    "value_ints": onnx.TensorProto.INT64,
    "value_string": onnx.TensorProto.STRING,
    "value_strings": onnx.TensorProto.STRING,
}


# --- counting -----------------------------------------------------------------------------------------------


def dimension_sizes(model: Model, feed: Feed, runtime: Runtime) -> dict[str, int]:
    """The sizes that a run on a feed gives to the model's named dynamic dimensions.

    A name whose sizes in the run contradict each other has none.

    Args:
        model: declares the names.
        feed: fits its inputs.
        runtime: runs the model.

    Raises:
        InputError, NotApplicableError: as `runtime.observed_shapes.run_shapes`.
    """
    return _agreed(model.shapes(), shapes_at(model, feed, runtime))


def _agreed(declared: Shapes, run: Shapes) -> dict[str, int]:
    sizes: dict[str, set[int]] = {}
    for name, info in declared.items():
        for dim, size in zip(info.shape or (), run[name].shape or (), strict=False):
            if isinstance(dim, str) and isinstance(size, int):
                sizes.setdefault(dim, set()).add(size)
    return {dim: own.pop() for dim, own in sizes.items() if len(own) == 1}


def shapes_at(model: Model, feed: Feed, runtime: Runtime) -> dict[str, TensorInfo]:
    """Shapes of all tensors in a run on one feed, whatever the file declares.

    Args:
        model: has the tensors.
        feed: fits its inputs.
        runtime: runs the model.

    Raises:
        InputError, NotApplicableError: as `runtime.observed_shapes.run_shapes`.
    """
    return observed_shapes.run_shapes(model, feed, runtime)


def measure(model: Model, feed: Feed, runtime: Runtime) -> Cost:
    """The cost of a model at the sizes of one feed.

    The shapes are those of a run: what the file declares of them may be wrong (`analysis.declarations`).

    Args:
        model: the model.
        feed: fits its inputs.
        runtime: runs it.

    Raises:
        InputError, NotApplicableError: as `runtime.observed_shapes.run_shapes`.
    """
    run = shapes_at(model, feed, runtime)
    return count(model, run, _agreed(model.shapes(), run))


def count(model: Model, shapes: Shapes, sizes: Sizes | None = None) -> Cost:
    """Parameters, MACs, nodes (bodies included) and bytes of a model.

    Args:
        model: the model.
        shapes: of its tensors, as `Model.shapes` gives them.
        sizes: of dynamic dimensions, by name.
    """
    proto = model.to_proto()
    parameters, stored = _weights(proto)
    macs: int | None
    try:
        known = _concrete(shapes, sizes or {})
        macs, reason = _Counter(proto, known).count(), None
    except _UnknownError as unknown:
        macs, reason = None, str(unknown)
    return Cost(parameters, macs, sum(1 for _ in _all_nodes(proto.graph)), stored, reason)


def node_macs(nodes: Iterable[Node], shapes: Shapes, opset: int) -> int | None:
    """MACs of some nodes of a main graph; None where `count` would not know them either.

    Args:
        nodes: the nodes.
        shapes: of the model's tensors, concrete.
        opset: of the model.
    """
    counts = [proto_macs(node.proto(opset), shapes) for node in nodes]
    return None if None in counts else sum(count for count in counts if count is not None)


def proto_macs(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """`node_macs` of one node."""
    rule = RULES.get(operator_key(node.domain, node.op_type))
    if rule is None or any(True for _ in bodies(node)):
        return None
    try:
        return _applied(rule, node, shapes)
    except _UnknownError:
        return None


def _concrete(shapes: Shapes, sizes: Sizes) -> dict[str, TensorInfo]:
    """The same with named dimensions replaced by their sizes."""

    def sized(info: TensorInfo) -> TensorInfo:
        if info.shape is None:
            return info
        return replace(
            info, shape=tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in info.shape)
        )

    return {name: sized(info) for name, info in shapes.items()}


class _Counter:
    """The MACs of a model and of the bodies in it."""

    def __init__(self, proto: onnx.ModelProto, shapes: Shapes) -> None:
        self.shapes = shapes
        self.functions = {(function.domain, function.name) for function in proto.functions}
        self.root = (
            _with_body_shapes(proto, shapes)
            if any(any(bodies(node)) for node in proto.graph.node)
            else proto.graph
        )

    def count(self) -> int:
        return self._graph(self.root, self.shapes)

    def _graph(self, graph: onnx.GraphProto, shapes: Shapes) -> int:
        return sum(self._node(node, shapes) for node in graph.node)

    def _node(self, node: onnx.NodeProto, shapes: Shapes) -> int:
        label = f"{node.op_type} '{node.name or next(iter(node.output), '')}'"
        if (node.domain, node.op_type) in self.functions:
            raise _UnknownError(f"{label} is a local function, which has no rule")
        rule = RULES.get(operator_key(node.domain, node.op_type))
        foreign = node.domain not in DEFAULT_DOMAINS
        if rule is None and foreign and not node.domain.startswith("ai.onnx."):
            raise _UnknownError(f"{label} of domain '{node.domain}' has no rule")
        branches = [self._graph(body, {**shapes, **_declared(body)}) for body in bodies(node)]
        if branches:
            if node.op_type in _LOOPS and any(branches):
                raise _UnknownError(f"{label} runs its body an unknown number of times")
            return max(branches)
        if rule is None:
            if foreign:
                return 0
            raise _UnknownError(f"{label} has no rule")
        try:
            return _applied(rule, node, shapes)
        except _UnknownError as unknown:
            raise _UnknownError(f"{label}: {unknown}") from None


def _applied(rule: CostRule, node: onnx.NodeProto, shapes: Shapes) -> int:
    """What a rule says of a node.

    Rules count on shapes that ONNX Runtime has accepted, but a model that it refuses is inspected, too.
    """
    try:
        return rule(CostNode(node, lambda name: _known_shape(name, shapes)))
    except (IndexError, TypeError, ValueError):
        raise _UnknownError("it does not take such inputs or attributes") from None


def _known_shape(name: str, shapes: Shapes) -> tuple[int, ...]:
    info = shapes.get(name)
    if info is None or info.shape is None:
        raise _UnknownError(f"the shape of '{name}' is not known")
    found = []
    for dim in info.shape:
        if not isinstance(dim, int):
            size = f"the size of dimension '{dim}'" if dim else "a size"
            raise _UnknownError(f"{size} of '{name}' is not known")
        found.append(dim)
    return tuple(found)


def _all_nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from _all_nodes(body)


def _declared(body: onnx.GraphProto) -> dict[str, TensorInfo]:
    """Shapes that stand in a body itself."""
    values = {value.name: info_of(value) for value in (*body.input, *body.output, *body.value_info)}
    return {**values, **{t.name: TensorInfo(t.name, None, tuple(t.dims)) for t in body.initializer}}


def _with_body_shapes(proto: onnx.ModelProto, shapes: Shapes) -> onnx.GraphProto:
    """The graph with what shape inference, started from the known shapes outside, finds inside its bodies."""
    model = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    model.graph.CopyFrom(light_graph(proto.graph))
    del model.graph.value_info[:]
    listed = {value.name for value in (*model.graph.input, *model.graph.output)}
    for values in (model.graph.input, model.graph.output):
        for value in values:
            _fix_shape(value, shapes.get(value.name))
    for name, info in shapes.items():
        if name not in listed and info.dtype is not None and info.shape is not None:
            model.graph.value_info.append(_value_info(info))
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return proto.graph  # the bodies' sizes stay unknown, and the count says so


def _fix_shape(value: onnx.ValueInfoProto, info: TensorInfo | None) -> None:
    if info is not None and info.dtype is not None and info.shape is not None:
        value.CopyFrom(_value_info(info))


def _value_info(info: TensorInfo) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(info.dtype) if info.dtype is not None else 0
    return onnx.helper.make_tensor_value_info(info.name, kind, info.shape)


def _weights(proto: onnx.ModelProto) -> tuple[int, int]:
    """Elements that are parameters, and bytes of everything, over the stored values that some node or output
    uses."""
    used = {value.name for value in proto.graph.output}
    for node in _all_nodes(proto.graph):
        used.update(node.input)
    tensors = [tensor for tensor in _stored(proto.graph) if tensor.name in used]
    for function in proto.functions:
        tensors.extend(a.t for node in function.node for a in node.attribute if node.op_type == "Constant")
    parameters = sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type not in _INDEX_TYPES)
    return parameters, sum(byte_size(tensor) for tensor in tensors if tensor.data_type in BITS)


def _stored(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    """Initializers and the values of Constant nodes, under the names that nodes use, bodies included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS and node.output:
            yield from _constant_value(node)
        for body in bodies(node):
            yield from _stored(body)


def _constant_value(node: onnx.NodeProto) -> Iterable[onnx.TensorProto]:
    """A Constant node's value as dims and type under the output's name, whichever attribute holds it."""
    for attribute in node.attribute:
        kind = _SHORT_FORMS.get(attribute.name)
        if attribute.name == "value":
            yield onnx.TensorProto(
                name=node.output[0], dims=attribute.t.dims, data_type=attribute.t.data_type
            )
        elif attribute.name == "sparse_value":
            values = attribute.sparse_tensor.values
            yield onnx.TensorProto(name=node.output[0], dims=values.dims, data_type=values.data_type)
        elif kind is not None:
            size = len(attribute.floats) + len(attribute.ints) + len(attribute.strings)
            dims = [size] if attribute.name.endswith("s") else []
            yield onnx.TensorProto(name=node.output[0], dims=dims, data_type=kind)
