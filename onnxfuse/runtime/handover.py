"""Models on their way to a session: cut down to the outputs wanted, and passed on whatever their size.

A model is handed to ONNX Runtime as the bytes of one protobuf message, of 2 GiB at most. Of a larger one the
large initializers go apart, as values that the session options carry.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto, numpy_helper

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.external_data import DataFolder, is_external, model_tensors, point, reference
from onnxfuse.runtime.onnx_runtime import ort

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model

_Message = onnx.ModelProto | onnx.GraphProto
_PROTOBUF_LIMIT = 2**31 - 1
# Of a model too large for one protobuf, tensors up to this size stay inside: shapes, axes, scales.
_KEPT_BYTES = 2**16


def runnable(model: Model) -> tuple[onnx.ModelProto, Path | None]:
    """A model as a proto of its own that ONNX Runtime runs as it is, and the folder of its external data;
    None without any."""
    proto = model.to_proto()
    if proto.graph.value_info:
        _drop_shapes(proto, model.belied())
    if model.external_dir is None or model.data is None:
        return proto, None
    return proto, _data_folder(proto, model.data)


def _data_folder(proto: onnx.ModelProto, data: DataFolder) -> Path:
    """The folder in which ONNX Runtime finds the external data of a model.

    It refuses links that leave that folder, so where `data` allows some, the files behind them are named.

    Args:
        proto: the model; locations in it are changed where there are links.
        data: where the files lie.
    """
    external = [tensor for tensor in model_tensors(proto) if is_external(tensor)]
    found = [(tensor, reference(tensor, data)) for tensor in external]
    if not any(place.linked for _, place in found):
        return data.path
    targets = [os.path.realpath(place.path) for _, place in found]
    folder = os.path.commonpath([os.path.dirname(target) for target in targets])
    for (tensor, place), target in zip(found, targets, strict=True):
        point(tensor, Path(os.path.relpath(target, folder)).as_posix(), place.offset, place.length)
    return Path(folder)


def _drop_shapes(proto: onnx.ModelProto, names: Collection[str]) -> None:
    """Forget the declared shapes of inner tensors: ONNX Runtime plans its memory by stale ones, and fails."""
    for value in proto.graph.value_info:
        if value.name in names:
            value.type.tensor_type.ClearField("shape")


def set_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make `names` the model's outputs; new ones go untyped, ORT infers their types."""
    graph = proto.graph
    declared = {value.name: value for value in graph.output}
    known = {name for node in graph.node for name in node.output}
    known.update(item.name for item in (*graph.input, *graph.initializer))
    known.update(item.values.name for item in graph.sparse_initializer)
    if missing := [name for name in names if not name or name not in known]:
        raise InputError(f"the model has no tensor named '{missing[0]}'")
    del graph.output[:]
    graph.output.extend(declared.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    if not declared.keys() <= set(names):
        _drop_dead_nodes(graph)


def _drop_dead_nodes(graph: onnx.GraphProto) -> None:
    """Remove nodes that no output needs; ORT would run them all the same."""
    needed = {value.name for value in graph.output}
    live = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_used_names(node))
            live.append(node)
    nodes = live[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def _used_names(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node's inputs or anything in its bodies mention: at least the outer tensors it needs."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from _used_names(inner)


def _serialized(proto: onnx.ModelProto) -> bytes | None:
    """The model's bytes; None where it is larger than one protobuf message can be, 2 GiB."""
    try:
        data = proto.SerializeToString()
    except EncodeError:
        return None
    return data if len(data) <= _PROTOBUF_LIMIT else None


def handed_over(proto: onnx.ModelProto, options: ort.SessionOptions) -> tuple[bytes, list[ort.OrtValue]]:
    """The bytes of a model, and the values that are handed over apart from them.

    A model that fits one message has none of these. Of a larger one they are the large initializers. They
    are put in `options`; keep them until the session is made.

    Raises:
        NotApplicableError: it is too large even without its large initializers.
    """
    data = _serialized(proto)
    if data is not None:
        return data, []
    shell = onnx.ModelProto()
    _copy_fields(proto, shell, but="graph")
    _copy_fields(proto.graph, shell.graph, but="initializer")
    names: list[str] = []
    values: list[ort.OrtValue] = []
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.ByteSize() <= _KEPT_BYTES:
            shell.graph.initializer.append(tensor)
            continue
        stub = shell.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        stub.data_location = TensorProto.EXTERNAL
        stub.external_data.add(key="location", value="detached")
        names.append(tensor.name)
        array = np.asarray(numpy_helper.to_array(tensor), order="C")
        values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type))
    data = _serialized(shell)
    if data is None:
        raise NotApplicableError(
            "even without its initializers the model is over 2 GiB, ONNX Runtime's limit"
        )
    options.add_external_initializers(names, values)
    return data, values


def _copy_fields(source: _Message, target: _Message, *, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        container = getattr(target, field.name)
        if hasattr(container, "MergeFrom"):
            container.MergeFrom(value)
        else:
            setattr(target, field.name, value)
