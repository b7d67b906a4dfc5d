"""From a model under edit back to protos: the whole, a part of it, or its bare bones.

What was not edited is copied from the original proto. What an edit makes untrue is corrected: the declared
type of an initializer that changed its shape, and the declared shapes downstream of an edited node, which
are checked against a new inference and dropped where that can't tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxfuse.errors import InputError
from onnxfuse.ir import protos, shapes
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.saving import Weight
from onnxfuse.ir.shapes import TensorInfo

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model

_CONTENTS = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")


def model(model: Model) -> ModelProto:
    """The whole model."""
    result = shell(model)
    result.graph.initializer.extend(t.proto() for t in model.initializers if not _sparse(t))
    return result


def shell(model: Model) -> ModelProto:
    """The model without its dense initializers."""
    model.sort()
    result = _header(model, "quantization_annotation")
    graph = result.graph
    graph.node.extend(node.proto(model.opset) for node in model.nodes)
    graph.input.extend(_inputs(model))
    graph.output.extend(model.source.graph.output)
    graph.sparse_initializer.extend(_sparse_protos(model.initializers))
    present = {tensor.name for tensor in model.tensors()}
    annotations = model.source.graph.quantization_annotation
    graph.quantization_annotation.extend(a for a in annotations if a.tensor_name in present)
    graph.value_info.extend(_value_infos(model, present))
    return result


def weights(model: Model) -> list[Weight]:
    """The dense initializers as `saving.save` takes them, edited values not yet turned into protos."""
    return [_weight(tensor) for tensor in model.initializers if not _sparse(tensor)]


def _weight(tensor: Constant) -> Weight:
    if tensor.stored is not None or tensor.dtype == object:
        return Weight(tensor.proto())
    elem_type = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    proto = TensorProto(name=tensor.name, data_type=elem_type, dims=tensor.shape)
    tensor.copy_notes(proto)
    return Weight(proto, tensor.values, tensor.origin is not None and tensor.origin.external)


def between(model: Model, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    """The part of the model from some tensors to others (see `Model.extract`)."""
    model.sort()
    sources = [model.tensor(name) for name in dict.fromkeys(inputs)]
    targets = [model.tensor(name) for name in dict.fromkeys(outputs)]
    nodes, used = _between(model, sources, targets)
    result = _header(model, "training_info", "quantization_annotation")
    graph = result.graph
    names = {tensor.name for tensor in sources}
    graph.node.extend(_beside(model, node, names) for node in model.nodes if node in nodes)
    for tensor in sources:
        info = model.type_of(tensor.name)
        if info.dtype is None:
            raise InputError(f"the type of tensor '{tensor.name}' is unknown, so no model can start there")
        graph.input.append(shapes.value_info(info))
    graph.output.extend(ValueInfoProto(name=tensor.name) for tensor in targets)
    chosen = [tensor for tensor in model.initializers if tensor in used]
    graph.initializer.extend(_inline(tensor) for tensor in chosen if not _sparse(tensor))
    graph.sparse_initializer.extend(_sparse_protos(chosen))
    return result


def _between(
    model: Model, sources: Iterable[Tensor], targets: Sequence[Tensor]
) -> tuple[set[Node], set[Tensor]]:
    """The nodes on the way from the sources to the targets, and the initializers they use."""
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
                stack.extend(model.tensor(name) for name in node.captured)
    return nodes, used


def _beside(model: Model, node: Node, names: set[str]) -> NodeProto:
    """The node's proto; an output that is fed from outside (`names`) gets another name."""
    proto = node.proto(model.opset)
    if names.isdisjoint(proto.output):
        return proto
    result = NodeProto()
    result.CopyFrom(proto)
    result.output[:] = [model.unique_name(name) if name in names else name for name in proto.output]
    return result


def _inline(tensor: Constant) -> TensorProto:
    external = tensor.stored is not None and tensor.stored.external
    return numpy_helper.from_array(tensor.values, tensor.name) if external else tensor.proto()


def weightless(model: Model, stale: set[str]) -> ModelProto:
    """The model as shape inference needs it: without bulky values and without the declarations in `stale`."""
    model.sort()
    result = _header(model, "functions", "training_info", "opset_import")
    result.opset_import.extend(protos.light_imports(model.source.opset_import))
    graph = result.graph
    graph.node.extend(protos.light_node(node.proto(model.opset)) for node in model.nodes)
    graph.input.extend(_inputs(model))
    graph.output.extend(model.source.graph.output)
    graph.value_info.extend(v for v in model.source.graph.value_info if v.name not in stale)
    graph.initializer.extend(map(_light, model.initializers))
    result.functions.extend(map(protos.light_function, model.source.functions))
    return result


def _light(tensor: Constant) -> TensorProto:
    """The tensor with its values only if they are few; a sparse one as the dense tensor it stands for."""
    if tensor.stored is not None and not tensor.stored.external and not _sparse(tensor):
        return protos.light_tensor(tensor.proto())
    if tensor.dtype != object and math.prod(tensor.shape) * tensor.dtype.itemsize <= protos.SMALL:
        return numpy_helper.from_array(tensor.values, tensor.name)
    elem_type = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    return TensorProto(name=tensor.name, data_type=elem_type, dims=tensor.shape)


def stale_names(model: Model) -> set[str]:
    """Names of tensors downstream of an edit, whose declared shapes may hold no longer."""
    stale = {tensor.name for tensor in model.initializers if tensor.retyped}
    for node in model.nodes:
        if node.edited or any(t.name in stale for t in node.inputs) or any(n in stale for n in node.captured):
            stale.update(tensor.name for tensor in node.outputs if tensor.name)
    return stale


def _header(model: Model, *leave: str) -> ModelProto:
    """The original without its nodes, tensors, inputs and outputs, and without the fields in `leave`."""
    result = ModelProto()
    protos.copy_fields(model.source, result, ("graph", *leave))
    result.graph.SetInParent()
    protos.copy_fields(model.source.graph, result.graph, (*_CONTENTS, *leave))
    return result


def _inputs(model: Model) -> Iterator[ValueInfoProto]:
    """The graph inputs in the file's order, with the initializers that are listed among them."""
    for value in model.source.graph.input:
        constant = model.listed.get(value.name)
        if constant is None or (constant in model.initializers and not constant.retyped):
            yield value
        elif constant in model.initializers:
            changed = ValueInfoProto()
            changed.CopyFrom(value)
            changed.type.CopyFrom(shapes.value_info(_info(constant)).type)
            yield changed
    if model.source.ir_version < 4:  # which wants every initializer to be an input
        yield from (shapes.value_info(_info(t)) for t in model.initializers if t.origin is None)


def _info(tensor: Constant) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.dtype, tuple(tensor.shape))


def _value_infos(model: Model, present: set[str]) -> Iterator[ValueInfoProto]:
    """The declared inner tensors that are still there, corrected or left out where an edit belies them."""
    declared = [value for value in model.source.graph.value_info if value.name in present]
    stale = stale_names(model) if declared else set()
    known = model.shapes() if any(value.name in stale for value in declared) else {}
    for value in declared:
        info = known.get(value.name)
        if value.name not in stale or shapes.agrees(shapes.info_of(value), info):
            yield value
        elif info is not None and info.dtype is not None and info.shape is not None:
            yield shapes.value_info(info)


def _sparse(tensor: Constant) -> bool:
    return tensor.stored is not None and tensor.stored.sparse


def _sparse_protos(tensors: Iterable[Constant]) -> Iterator[Any]:
    return (tensor.stored.tensor for tensor in tensors if tensor.stored is not None and tensor.stored.sparse)
