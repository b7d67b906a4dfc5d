"""The bytes of stored tensors, inline or in data files beside the model.

A `TensorProto` keeps its values inline (`raw_data` or a typed field) or as a reference into a data file
beside the model (`external_data`: location, offset, length). A reference is never followed unless somebody
asks for the values: `read` reads exactly one tensor's range, `chunks` streams it.

A model file is untrusted input, and a location that leaves the model's folder (absolute, `..`), or goes
through a symbolic link that does, would read files that its sender should not see: it is refused. A link may
lead to a file beside the one that the model's own name leads to: in the cache of Hugging Face all names are
links into one folder, `blobs`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError

CHUNK = 16 << 20
_NARROW = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
# Bits per element of every type that has a fixed size; strings have none.
BITS = {
    number: _NARROW.get(name) or helper.tensor_dtype_to_np_dtype(number).itemsize * 8
    for name, number in TensorProto.DataType.items()
    if name not in ("UNDEFINED", "STRING")
}
# The typed field of each element type that does not use int32_data, and how many entries an element takes.
_TYPED_FIELDS: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.STRING: ("string_data", 1),
}
_VALUE_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "external_data",
)


@dataclass(frozen=True)
class DataFolder:
    """Where the data files of a model lie.

    Attributes:
        path: the folder in which they are looked for.
        real: the one that holds the model file, once links are followed.
    """

    path: Path
    real: Path

    @classmethod
    def of_model(cls, file: Path) -> DataFolder:
        """That of a model file."""
        return cls(Path(os.path.abspath(file)).parent, Path(os.path.realpath(file)).parent)

    def holds(self, target: Path) -> bool:
        """Whether links may lead to a file: into the folder, or beside the model file."""
        return target.parent == self.real or target.is_relative_to(os.path.realpath(self.path))


@dataclass(frozen=True)
class Reference:
    """A range of bytes in a data file; `linked`: its name goes through a symbolic link."""

    path: Path
    offset: int
    length: int
    linked: bool = False


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's values lie in a data file."""
    return tensor.data_location == TensorProto.EXTERNAL


def numpy_dtype(elem_type: int) -> np.dtype | None:
    """The numpy type of an ONNX element type (from ml_dtypes where numpy has none); None for unknown ones."""
    if elem_type not in BITS and elem_type != TensorProto.STRING:
        return None
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))


def byte_size(tensor: TensorProto) -> int:
    """The bytes that the tensor's type and dims ask for, as raw data.

    Raises:
        InputError: unknown or variable-sized type, or a negative dimension.
    """
    bits = BITS.get(tensor.data_type)
    if bits is None:
        raise InputError(f"tensor '{tensor.name}': its element type ({tensor.data_type}) has no fixed size")
    if any(d < 0 for d in tensor.dims):
        raise InputError(f"tensor '{tensor.name}' has a negative dimension: {list(tensor.dims)}")
    return (math.prod(tensor.dims) * bits + 7) // 8


def check(tensor: TensorProto, folder: DataFolder | None) -> None:
    """Refuses a tensor without exactly the data that its type and dims ask for; external data is not read.

    Raises:
        InputError: it has not, or its external reference is bad (see `reference`).
    """
    name = tensor.name
    if tensor.data_type not in BITS and tensor.data_type != TensorProto.STRING:
        raise InputError(f"tensor '{name}' has an unknown element type ({tensor.data_type})")
    if tensor.HasField("segment"):
        raise InputError(f"tensor '{name}' is stored in segments, which ONNX Runtime does not support")
    if is_external(tensor):
        reference(tensor, folder)
        return
    if any(d < 0 for d in tensor.dims):
        raise InputError(f"tensor '{name}' has a negative dimension: {list(tensor.dims)}")
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        found, need, unit = len(tensor.raw_data), byte_size(tensor), "bytes"
    else:
        field, entries = _TYPED_FIELDS.get(tensor.data_type, ("int32_data", 1))
        per_entry = 8 // BITS[tensor.data_type] if BITS.get(tensor.data_type, 8) < 8 else 1
        found, unit = len(getattr(tensor, field)), "values"
        need = -(-math.prod(tensor.dims) * entries // per_entry)
    if found != need:
        raise InputError(f"tensor '{name}' has {found} {unit}; its shape {list(tensor.dims)} needs {need}")


def _entry(tensor: TensorProto, key: str) -> str:
    return next((e.value for e in tensor.external_data if e.key == key), "")


def _number(tensor: TensorProto, key: str, default: int) -> int:
    text = _entry(tensor, key)
    if not text:
        return default
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20):
        raise InputError(f"tensor '{tensor.name}': external data {key} {text!r} is not a size")
    return int(text)


def location(tensor: TensorProto) -> str:
    """The data file's path relative to the model's folder, checked to stay inside it.

    Raises:
        InputError: no location, or one that is absolute or climbs out of the folder.
    """
    text = _entry(tensor, "location")
    if not isinstance(text, str) or "\0" in text or PurePosixPath(text) == PurePosixPath():
        raise InputError(f"tensor '{tensor.name}': external data without a file name")
    windows = PureWindowsPath(text)
    if windows.drive or windows.root or ".." in windows.parts:
        raise InputError(
            f"tensor '{tensor.name}': external data '{text}' is outside the model's folder; refused"
        )
    return text


def reference(tensor: TensorProto, folder: DataFolder | None) -> Reference:
    """The byte range that an external tensor points to, checked against the file system.

    Raises:
        InputError: no folder, a location outside it, also through a link, a file that is missing, too short
            or can't be looked at.
    """
    text = location(tensor)
    if folder is None:
        raise InputError(
            f"tensor '{tensor.name}' is in the external data file '{text}', and only a model loaded from a "
            "path has a folder to look for it in"
        )
    path = folder.path / text
    target = Path(os.path.realpath(path))
    linked = target != Path(os.path.realpath(folder.path)) / PurePosixPath(text)
    if linked and not folder.holds(target):
        raise InputError(
            f"tensor '{tensor.name}': external data '{text}' is a symbolic link to '{target}', outside the "
            "model's folder; refused"
        )
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:  # a name too long, a folder that may not be read
        raise InputError(f"tensor '{tensor.name}': external data file '{path}': {error.strerror}") from error
    if size is None:
        raise InputError(f"tensor '{tensor.name}': external data file '{path}' is missing or not a file")
    need = byte_size(tensor)
    offset, length = _number(tensor, "offset", 0), _number(tensor, "length", need)
    if length != need:
        shape = list(tensor.dims)
        raise InputError(
            f"tensor '{tensor.name}': {length} bytes of external data; its shape {shape} needs {need}"
        )
    if size < offset + length:
        raise InputError(f"tensor '{tensor.name}': external data file '{path}' is too short (truncated?)")
    return Reference(path, offset, length, linked)


def read(tensor: TensorProto, folder: DataFolder | None) -> np.ndarray:
    """A tensor's values as a new array; of an external tensor only its own range of the file is read.

    Raises:
        InputError: values that do not fit the type and dims, or a bad external reference.
    """
    dtype, shape = numpy_dtype(tensor.data_type), tuple(tensor.dims)
    if dtype is None:
        raise InputError(f"tensor '{tensor.name}' has an unknown element type ({tensor.data_type})")
    if not is_external(tensor):
        try:
            return np.array(numpy_helper.to_array(tensor))
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(
                f"tensor '{tensor.name}': its data do not fit its shape {list(shape)}"
            ) from error
    source = reference(tensor, folder)
    raw = np.empty(source.length, np.uint8)
    done = 0
    for piece in chunks(source):
        raw[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    if BITS[tensor.data_type] < 8:  # packed: several values share a byte
        return numpy_helper.to_array(
            TensorProto(data_type=tensor.data_type, dims=shape, raw_data=raw.tobytes())
        )
    return raw.view(dtype).reshape(shape)


def chunks(source: Reference, step: int = CHUNK) -> Iterator[bytes]:
    """The range's bytes, `step` at a time."""
    with open(source.path, "rb", buffering=0) as file:
        file.seek(source.offset)
        left = source.length
        while left:
            piece = file.read(min(step, left))
            if not piece:
                raise InputError(f"external data file '{source.path}' is too short (truncated?)")
            left -= len(piece)
            yield piece


def point(tensor: TensorProto, file_name: str, offset: int, length: int) -> None:
    """Makes `tensor` a reference into a data file, without any inline values.

    Args:
        tensor: is changed.
        file_name: the data file, relative to the model's folder.
        offset, length: the range, in bytes.
    """
    for field in _VALUE_FIELDS:
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file_name), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def model_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor stored in a model: initializers, attributes, subgraphs and functions included."""
    yield from graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from node_tensors(node)


def graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor in a graph: its initializers and those in its nodes' attributes, subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from node_tensors(node)


def node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    """Every tensor in a node's attributes, subgraphs included."""
    for attribute in node.attribute:
        kind = attribute.type
        if kind == AttributeProto.TENSOR and not attribute.ref_attr_name:
            yield attribute.t
        elif kind == AttributeProto.TENSORS:
            yield from attribute.tensors
        elif kind == AttributeProto.SPARSE_TENSOR and not attribute.ref_attr_name:
            yield attribute.sparse_tensor.values
            yield attribute.sparse_tensor.indices
        elif kind == AttributeProto.GRAPH:
            yield from graph_tensors(attribute.g)
        elif kind == AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                yield from graph_tensors(graph)


def dense(sparse: onnx.SparseTensorProto, folder: DataFolder | None) -> np.ndarray:
    """A sparse tensor's values as a dense array.

    Raises:
        InputError: indices that do not fit the dims.
    """
    values, indices = read(sparse.values, folder), read(sparse.indices, folder)
    try:
        result = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 1:
            result.reshape(-1)[indices] = values
        else:
            result[tuple(indices.T)] = values
    except (IndexError, ValueError) as error:
        raise InputError(f"sparse tensor '{sparse.values.name}': its indices do not fit its shape") from error
    except MemoryError as error:
        raise InputError(f"sparse tensor '{sparse.values.name}' is too large to be made dense") from error
    return result
