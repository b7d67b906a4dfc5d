"""From a model under edit back to protos: the whole, a part of it, or its bare bones.

What was not edited is copied from the original proto. What an edit makes untrue is corrected: the declared
type of an initializer that changed its shape, and the declared shapes downstream of an edited node, which
are checked against a new inference and dropped where that can't tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxfuse.errors import InputError
from onnxfuse.ir import protos, shapes
from onnxfuse.ir.graph import Graph
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.saving import StoredWeight
from onnxfuse.ir.shapes import Shapes, TensorInfo

ShapesOf = Callable[[], Shapes]
"""A source of all tensors' shapes, asked for only if an edit makes a declared one doubtful."""

_CONTENTS = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")


def model(graph: Graph, shapes_of: ShapesOf) -> ModelProto:
    """The whole graph."""
    result = shell(graph, shapes_of)
    result.graph.initializer.extend(t.proto() for t in graph.initializers if not is_sparse(t))
    return result


def shell(graph: Graph, shapes_of: ShapesOf) -> ModelProto:
    """The model without its dense initializers."""
    graph.sort()
    result = header(graph, "quantization_annotation")
    made = result.graph
    made.node.extend(node.proto(graph.opset) for node in graph.nodes)
    made.input.extend(declared_inputs(graph))
    made.output.extend(graph.source.graph.output)
    made.sparse_initializer.extend(_sparse_protos(graph.initializers))
    present = {tensor.name for tensor in graph.tensors()}
    annotations = graph.source.graph.quantization_annotation
    made.quantization_annotation.extend(a for a in annotations if a.tensor_name in present)
    made.value_info.extend(_value_infos(graph, present, shapes_of))
    return result


def weights(graph: Graph) -> list[StoredWeight]:
    """The dense initializers as `saving.save` takes them, edited values not yet turned into protos."""
    return [_weight(tensor) for tensor in graph.initializers if not is_sparse(tensor)]


def _weight(tensor: Constant) -> StoredWeight:
    if tensor.stored is not None or tensor.dtype == object:
        return StoredWeight(tensor.proto())
    elem_type = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    proto = TensorProto(name=tensor.name, data_type=elem_type, dims=tensor.shape)
    tensor.copy_notes(proto)
    return StoredWeight(proto, tensor.values, tensor.origin is not None and tensor.origin.external)


def between(
    graph: Graph, inputs: Sequence[str], outputs: Sequence[str], type_of: Callable[[str], TensorInfo]
) -> ModelProto:
    """The part of the model from some tensors to others, as a model (see `Model.extract`).

    Args:
        graph: is not changed.
        inputs, outputs: names of tensors.
        type_of: gives the type and shape of a tensor, for the declarations of inputs.

    Raises:
        KeyError, InputError: as `Model.extract`.
    """
    graph.sort()
    sources = [graph.tensor(name) for name in dict.fromkeys(inputs)]
    targets = [graph.tensor(name) for name in dict.fromkeys(outputs)]
    nodes, used = _between(graph, sources, targets)
    result = header(graph, "training_info", "quantization_annotation")
    made = result.graph
    names = {tensor.name for tensor in sources}
    made.node.extend(_beside(graph, node, names) for node in graph.nodes if node in nodes)
    for tensor in sources:
        info = type_of(tensor.name)
        if info.dtype is None:
            raise InputError(f"the type of tensor '{tensor.name}' is unknown, so no model can start there")
        made.input.append(shapes.value_info(info))
    made.output.extend(ValueInfoProto(name=tensor.name) for tensor in targets)
    chosen = [tensor for tensor in graph.initializers if tensor in used]
    made.initializer.extend(_inline(tensor) for tensor in chosen if not is_sparse(tensor))
    made.sparse_initializer.extend(_sparse_protos(chosen))
    return result


def _between(
    graph: Graph, sources: Iterable[Tensor], targets: Sequence[Tensor]
) -> tuple[set[Node], set[Tensor]]:
    """The nodes on the way from the sources to the targets, and the initializers that they use."""
    nodes: set[Node] = set()
    used: set[Tensor] = set()
    seen = set(sources)
    stack = list(targets)
    while stack:
        tensor = stack.pop()
        if tensor in seen or not tensor.name:
            continue
        seen.add(tensor)
        if isinstance(tensor, Constant):
            used.add(tensor)
        elif not tensor.inputs:
            names = ", ".join(f"'{t.name}'" for t in targets)
            raise InputError(f"{names} depends on '{tensor.name}' too, which is not among the inputs")
        for node in tensor.inputs:
            if node not in nodes:
                nodes.add(node)
                stack.extend(node.inputs)
                stack.extend(graph.tensor(name) for name in node.captured)
    return nodes, used


def _beside(graph: Graph, node: Node, names: set[str]) -> NodeProto:
    """The node's proto; an output that is fed from outside (`names`) gets another name."""
    proto = node.proto(graph.opset)
    if names.isdisjoint(proto.output):
        return proto
    result = NodeProto()
    result.CopyFrom(proto)
    result.output[:] = [graph.unique_name(name) if name in names else name for name in proto.output]
    return result


def _inline(tensor: Constant) -> TensorProto:
    external = tensor.stored is not None and tensor.stored.external
    return numpy_helper.from_array(tensor.values, tensor.name) if external else tensor.proto()


def header(graph: Graph, *leave: str) -> ModelProto:
    """The original without its nodes, tensors, inputs and outputs, and without the fields in `leave`."""
    result = ModelProto()
    protos.copy_fields(graph.source, result, ("graph", *leave))
    result.graph.SetInParent()
    if graph.notes() != {entry.key: entry.value for entry in graph.source.metadata_props}:
        del result.metadata_props[:]
        for key, text in graph.notes().items():
            result.metadata_props.add(key=key, value=text)
    protos.copy_fields(graph.source.graph, result.graph, (*_CONTENTS, *leave))
    return result


def declared_inputs(graph: Graph) -> Iterator[ValueInfoProto]:
    """The graph inputs in the file's order, with the initializers that are listed among them."""
    for value in graph.source.graph.input:
        constant = graph.listed.get(value.name)
        if constant is None or (constant in graph.initializers and not constant.retyped):
            yield value
        elif constant in graph.initializers:
            changed = ValueInfoProto()
            changed.CopyFrom(value)
            changed.type.CopyFrom(shapes.value_info(_info(constant)).type)
            yield changed
    if graph.source.ir_version < 4:  # which wants every initializer to be an input
        yield from (shapes.value_info(_info(t)) for t in graph.initializers if t.origin is None)


def _info(tensor: Constant) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.dtype, tuple(tensor.shape))


def _value_infos(graph: Graph, present: set[str], shapes_of: ShapesOf) -> Iterator[ValueInfoProto]:
    """The declared inner tensors that are still there, corrected or left out where an edit belies them."""
    declared = [value for value in graph.source.graph.value_info if value.name in present]
    stale = graph.stale_names() if declared else set()
    known = shapes_of() if any(value.name in stale for value in declared) else {}
    for value in declared:
        info = known.get(value.name)
        if value.name not in stale or shapes.agrees(shapes.info_of(value), info):
            yield value
        elif info is not None and info.dtype is not None and info.shape is not None:
            yield shapes.value_info(info)


def is_sparse(tensor: Constant) -> bool:
    """Whether it is stored as a sparse tensor."""
    return tensor.stored is not None and tensor.stored.sparse


def _sparse_protos(tensors: Iterable[Constant]) -> Iterator[Any]:
    return (tensor.stored.tensor for tensor in tensors if tensor.stored is not None and tensor.stored.sparse)
