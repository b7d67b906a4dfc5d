"""Between ONNX protos and plain Python values: attributes, subgraph captures, weightless copies."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    helper,
    numpy_helper,
)

from onnxfuse.ir.external_data import is_external

DEFAULT_DOMAINS = ("", "ai.onnx")
# Bytes: inference needs the values of small tensors (a Reshape's target, a Slice's bounds), nobody of others.
SMALL = 4096

_FIELDS: dict[int, str] = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.GRAPH: "g",
    AttributeProto.GRAPHS: "graphs",
}
_LISTS = (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.GRAPHS)
# Python's 1 is a valid value of a float attribute, and numpy's numbers of any: cast by the declared type.
_CASTS: dict[int, Callable[[Any], Any]] = {
    AttributeProto.FLOAT: float,
    AttributeProto.INT: int,
    AttributeProto.FLOATS: lambda values: [float(v) for v in values],
    AttributeProto.INTS: lambda values: [int(v) for v in values],
    AttributeProto.TENSOR: lambda v: (
        v if isinstance(v, TensorProto) else numpy_helper.from_array(np.asarray(v))
    ),
}


def attribute_value(attribute: AttributeProto, of_tensor: Callable[[TensorProto], Any]) -> Any:
    """An attribute as a plain value, a tensor as `of_tensor` makes it; a proto if it has no plain form."""
    kind = attribute.type
    if attribute.ref_attr_name:
        return attribute
    if kind in _FIELDS:
        value = getattr(attribute, _FIELDS[kind])
        return list(value) if kind in _LISTS else value
    if kind == AttributeProto.STRING:
        return _text(attribute.s)
    if kind == AttributeProto.STRINGS:
        return [_text(s) for s in attribute.strings]
    if kind == AttributeProto.TENSOR:
        return of_tensor(attribute.t)
    return attribute


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def attribute_proto(key: str, value: Any, kind: int | None) -> AttributeProto:
    """A plain value as an attribute.

    Args:
        key: its name.
        value: a number, list, string, array or proto; an AttributeProto is returned as it is.
        kind: its type; None (no schema) lets the value's own type decide.
    """
    if isinstance(value, AttributeProto):
        return value
    if isinstance(value, np.ndarray) and kind is None:
        kind = AttributeProto.TENSOR
    if kind in _CASTS:
        value = _CASTS[kind](value)
    return helper.make_attribute(key, value, attr_type=kind)


def as_default(value: Any) -> Any:
    """The default of an attribute as ONNX means it: numbers of single precision, 1e-5f, whatever the data."""
    return float(np.float32(value)) if isinstance(value, float) else value


def schema_kind(op: str, domain: str, opset: int, key: str) -> int | None:
    """The type that an operator's schema gives an attribute; None for unknown operators or attributes.

    Args:
        op, domain: the operator.
        opset: the version of the domain's operator set.
        key: the attribute's name.
    """
    try:
        attribute = onnx.defs.get_schema(op, opset, domain).attributes.get(key)
    except onnx.defs.SchemaError:
        return None
    return None if attribute is None else int(attribute.type)  # type: ignore[call-overload]


def operator_key(domain: str | None, name: str) -> tuple[str, str]:
    """The key of an operator: its domain, "" for ONNX's own under either of its names, and its name."""
    return "" if domain is None or domain in DEFAULT_DOMAINS else domain, name


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def captured_names(graph: GraphProto) -> set[str]:
    """Names that a subgraph uses from outside, those of its own subgraphs included."""
    local = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    local |= {s.values.name for s in graph.sparse_initializer}
    used = {v.name for v in graph.output}
    for node in graph.node:
        local.update(node.output)
        used.update(node.input)
        for body in bodies(node):
            used |= captured_names(body)
    return used - local - {""}


def inner_names(graph: GraphProto) -> Iterator[str]:
    """Names that a subgraph gives to tensors of its own."""
    yield from (v.name for v in (*graph.input, *graph.initializer))
    yield from (s.values.name for s in graph.sparse_initializer)
    for node in graph.node:
        yield from node.output
        for body in bodies(node):
            yield from inner_names(body)


def light_tensor(tensor: TensorProto, keep_dims: bool = True) -> TensorProto:
    """The tensor, without its values if they are bulky or external; without `keep_dims` a valid empty one."""
    if not is_external(tensor) and tensor.ByteSize() <= SMALL:
        return tensor
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims if keep_dims else [0])


def light_node(node: NodeProto, keep_dims: bool = True) -> NodeProto:
    """The node as onnx takes it: the default domain as "", bulky or external tensors without values."""
    if node.domain != "ai.onnx" and not any(a.type in _HEAVY for a in node.attribute):
        return node
    result = NodeProto(op_type=node.op_type, input=node.input, output=node.output, name=node.name)
    if node.domain not in DEFAULT_DOMAINS:
        result.domain = node.domain
    if node.overload:
        result.overload = node.overload
    for attribute in node.attribute:
        if attribute.type not in _HEAVY or attribute.ref_attr_name:
            result.attribute.append(attribute)
            continue
        light = result.attribute.add(name=attribute.name, type=attribute.type)
        if attribute.type == AttributeProto.TENSOR:
            light.t.CopyFrom(light_tensor(attribute.t, keep_dims))
        elif attribute.type == AttributeProto.GRAPH:
            light.g.CopyFrom(light_graph(attribute.g, keep_dims))
        elif attribute.type == AttributeProto.TENSORS:
            light.tensors.extend(light_tensor(t, keep_dims) for t in attribute.tensors)
        else:
            light.graphs.extend(light_graph(g, keep_dims) for g in attribute.graphs)
    return result


_HEAVY = (AttributeProto.TENSOR, AttributeProto.GRAPH, AttributeProto.TENSORS, AttributeProto.GRAPHS)


def light_graph(graph: GraphProto, keep_dims: bool = True) -> GraphProto:
    """The graph without bulky or external values, subgraphs included; `keep_dims` as in `light_tensor`."""
    return GraphProto(
        name=graph.name,
        node=[light_node(n, keep_dims) for n in graph.node],
        initializer=[light_tensor(t, keep_dims) for t in graph.initializer],
        sparse_initializer=graph.sparse_initializer,
        input=graph.input,
        output=graph.output,
        value_info=graph.value_info,
    )


def light_imports(imports: Iterable[OperatorSetIdProto]) -> list[OperatorSetIdProto]:
    """The operator sets with the default domain under its short name, the only one that onnx knows."""
    return [
        OperatorSetIdProto(domain="" if i.domain == "ai.onnx" else i.domain, version=i.version)
        for i in imports
    ]


def light_function(function: onnx.FunctionProto, keep_dims: bool = True) -> onnx.FunctionProto:
    """The function without bulky or external values; `keep_dims` as in `light_tensor`."""
    result = onnx.FunctionProto(
        name=function.name,
        domain=function.domain,
        overload=function.overload,
        input=function.input,
        output=function.output,
        attribute=function.attribute,
        attribute_proto=function.attribute_proto,
        opset_import=light_imports(function.opset_import),
        value_info=function.value_info,
    )
    result.node.extend(light_node(n, keep_dims) for n in function.node)
    return result


def copy_fields(source: Any, target: Any, leave: tuple[str, ...]) -> None:
    """Copies all strings, numbers and lists of a message to another of its type.

    Args:
        source, target: the messages.
        leave: names of fields that are not copied.
    """
    for field, value in source.ListFields():
        if field.name in leave:
            continue
        if isinstance(value, (str, bytes, int)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)


def copy_notes(source: TensorProto, target: TensorProto) -> None:
    """Copies what a tensor says about itself besides its values."""
    if source.doc_string:
        target.doc_string = source.doc_string
    target.metadata_props.extend(source.metadata_props)
