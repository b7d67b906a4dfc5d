"""Writing a model so that the file appears whole or not at all, and nothing that was read is ever written to.

Files are staged under temporary names in the target's folder, flushed to disk, and renamed into place
together.

The graph is streamed: protobuf lets the initializers of a graph follow its other fields one by one, so a
file is written a tensor at a time instead of from a second copy of the model. What goes to the data file
`OUT.data`: references into another folder than the target's (copied range by range), edited tensors that
were external before, and, when the model would otherwise pass protobuf's 2 GB, every initializer larger
than a kilobyte.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

from onnxfuse.errors import InputError
from onnxfuse.ir import external_data, protos
from onnxfuse.ir.external_data import DataFolder, Reference
from onnxfuse.ir.validation import PROTOBUF_LIMIT

INLINE = 1024  # bytes; smaller tensors never leave the model file
_PAGE = 4096  # alignment of tensors in a data file, so that a runtime can map them


@dataclass(frozen=True)
class StoredWeight:
    """An initializer to write: `proto` as it is, or with `array` for its values."""

    proto: TensorProto
    array: np.ndarray | None = None
    external: bool = False  # the values that `array` replaces were external

    @property
    def nbytes(self) -> int:
        """About the bytes it takes inside a model file."""
        if self.array is None:
            return self.proto.ByteSize()
        return self.array.nbytes + 256


def save(
    path: Path,
    shell: ModelProto,
    weights: Sequence[StoredWeight],
    folder: DataFolder | None,
    source: Path | None,
) -> None:
    """Writes a model atomically.

    Args:
        path: the file to write.
        shell: the model without its dense initializers; the tensors in it may be changed.
        weights: the dense initializers.
        folder: where external references point to, None if there are none.
        source: the file the model was read from.

    Raises:
        InputError: the target is the source or one of its data files, or can't be written.
    """
    try:
        check_target(path, source)
        data_name, moves, kept = _plan(path, shell, weights, folder)
        data_path = path.parent / data_name
        if moves and data_path.exists() and not data_path.is_file():
            raise InputError(f"cannot write '{data_path}': it is not a regular file")
        with _staged([data_path, path] if moves else [path]) as files:
            if moves:
                _write_data(files[0], data_name, moves)
            _write_model(files[-1], shell, kept)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write '{path}': {reason}") from error


def check_target(path: Path, source: Path | None) -> None:
    """Refuses a path that a model can't be written to, so that a long run need not end in vain.

    Raises:
        InputError: the folder is missing or not writable, or the target is a folder, a device, or the source.
    """
    try:
        _check_target(path, source)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from error


def _check_target(path: Path, source: Path | None) -> None:
    if not path.parent.is_dir():
        raise InputError(f"cannot write '{path}': its folder does not exist")
    if not path.name or path.is_dir():
        raise InputError(f"cannot write '{path}': it is a folder")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"cannot write '{path}': it is not a regular file")
    if source is not None and _same(path, source):
        raise InputError(f"the output '{path}' is the input file; choose another name")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write '{path}': its folder is not writable")


def _same(a: Path, b: Path) -> bool:
    """Whether both names mean one file, through links of any kind."""
    return os.path.realpath(a) == os.path.realpath(b) or (
        a.exists() and b.exists() and os.path.samefile(a, b)
    )


@dataclass(frozen=True)
class _Move:
    """Values on their way into the data file, and the protos that will point to them there."""

    protos: list[TensorProto]
    values: "Reference | np.ndarray | TensorProto"


def _plan(
    path: Path, shell: ModelProto, weights: Sequence[StoredWeight], folder: DataFolder | None
) -> tuple[str, list[_Move], list[TensorProto | StoredWeight]]:
    """The data file's name, the values that move into it, and the initializers in order, moved ones too."""
    stay = folder is not None and _same(folder.path, path.parent)
    used: set[Path] = set()
    ranges: dict[Reference, _Move] = {}

    def refer(proto: TensorProto) -> None:
        found = external_data.reference(proto, folder)
        used.add(found.path)
        if not stay or found.linked:
            ranges.setdefault(found, _Move([], found)).protos.append(proto)

    for tensor in external_data.model_tensors(shell):
        if external_data.is_external(tensor):
            refer(tensor)
    overflow = shell.ByteSize() + sum(w.nbytes for w in weights) > PROTOBUF_LIMIT
    values: list[_Move] = []
    kept: list[TensorProto | StoredWeight] = []
    for weight in weights:
        if weight.array is None and external_data.is_external(weight.proto):
            kept.append(proto := _copy(weight.proto))
            refer(proto)
        elif _goes_out(weight, overflow):
            proto = _reference_shell(weight)
            kept.append(proto)
            values.append(_Move([proto], weight.proto if weight.array is None else weight.array))
        else:
            kept.append(weight)
    for file in used:
        if _same(file, path):
            raise InputError(f"the output '{path}' is a data file of the input; choose another name")
    moves = [*ranges.values(), *values]
    return _data_name(path, used), moves, kept


def _goes_out(weight: StoredWeight, overflow: bool) -> bool:
    if weight.array is None:
        fixed = weight.proto.data_type in external_data.BITS
        return overflow and fixed and weight.nbytes > INLINE
    return (weight.external or overflow) and weight.array.nbytes > INLINE


def _data_name(path: Path, used: set[Path]) -> str:
    """`OUT.data`, or `OUT.1.data`, ... when the model still refers to a file of that name."""
    name, count = f"{path.name}.data", 0
    while any(_same(path.parent / name, file) for file in used):
        count += 1
        name = f"{path.name}.{count}.data"
    return name


def _copy(proto: TensorProto) -> TensorProto:
    copied = TensorProto()
    copied.CopyFrom(proto)
    return copied


def _reference_shell(weight: StoredWeight) -> TensorProto:
    """The weight's proto with everything but values; the reference is filled in when they are written."""
    like = weight.proto
    shell = TensorProto(name=like.name, data_type=like.data_type, dims=like.dims)
    protos.copy_notes(like, shell)
    return shell


@contextlib.contextmanager
def _staged(targets: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Files that appear at the targets together when the block ends, and not at all when it fails.

    An older model at the last target is removed before its data is renamed: they must not be seen together.
    """
    staged = [t.parent / f".{t.name[:100]}.{secrets.token_hex(6)}.tmp" for t in targets]
    with contextlib.ExitStack() as stack:
        try:
            files: list[BinaryIO] = [stack.enter_context(open(name, "xb")) for name in staged]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
            if len(targets) > 1:
                targets[-1].unlink(missing_ok=True)
            for name, target in zip(staged, targets, strict=True):
                os.replace(name, target)
            _sync_folder(targets[-1].parent)
        except BaseException:
            with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                stack.close()
            _roll_back(staged, targets)
            raise


def _roll_back(staged: Sequence[Path], targets: Sequence[Path]) -> None:
    """Removes what was staged, and a data file that was renamed when its model was not."""
    if staged[-1].exists() and not staged[0].exists():
        targets[0].unlink(missing_ok=True)
    for name in staged:
        name.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the renames durable where the system can (Windows can't open a folder)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_data(file: BinaryIO, name: str, moves: Sequence[_Move]) -> None:
    position = 0
    for move in moves:
        padding = -position % _PAGE
        file.write(b"\0" * padding)
        start = position + padding
        position = start
        for piece in _pieces(move.values):
            file.write(piece)
            position += len(piece)
        for proto in move.protos:
            external_data.point(proto, name, start, position - start)


def _pieces(values: "Reference | np.ndarray | TensorProto") -> Iterator[bytes | memoryview]:
    """The values as raw little-endian data, a chunk at a time."""
    if isinstance(values, Reference):
        yield from external_data.chunks(values)
    elif isinstance(values, TensorProto):
        if values.HasField("raw_data"):
            yield values.raw_data
        else:
            yield numpy_helper.from_array(external_data.read(values, None)).raw_data
    elif values.dtype.name in ("int4", "uint4", "int2", "uint2", "float4_e2m1fn"):
        yield numpy_helper.from_array(values).raw_data
    else:
        step = max(1, external_data.CHUNK // values.itemsize)
        flat = values.reshape(-1) if values.flags.c_contiguous else values.flat
        for start in range(0, values.size, step):
            yield np.ascontiguousarray(flat[start : start + step]).view(np.uint8).data


_GRAPH = ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = GraphProto.DESCRIPTOR.fields_by_name["initializer"].number


def _write_model(file: BinaryIO, shell: ModelProto, weights: Sequence[TensorProto | StoredWeight]) -> None:
    """Serializes `shell` with the weights as its initializers, one at a time."""
    head = ModelProto()
    protos.copy_fields(shell, head, ("graph",))
    body = shell.graph.SerializeToString()
    tensors = [w if isinstance(w, TensorProto) else _inline(w) for w in weights]
    framed = [(_frame(_INITIALIZER, t.ByteSize()), t) for t in tensors]
    size = len(body) + sum(len(frame) + tensor.ByteSize() for frame, tensor in framed)
    header = head.SerializeToString() + _frame(_GRAPH, size)
    if len(header) + size > PROTOBUF_LIMIT:
        raise InputError(
            "the model is over 2 GB even without its initializers, more than an ONNX file can be"
        )
    file.write(header)
    file.write(body)
    for frame, tensor in framed:
        file.write(frame)
        file.write(tensor.SerializeToString())


def _inline(weight: StoredWeight) -> TensorProto:
    if weight.array is None:
        return weight.proto
    tensor = numpy_helper.from_array(weight.array, weight.proto.name)
    protos.copy_notes(weight.proto, tensor)
    return tensor


def _frame(field: int, length: int) -> bytes:
    """The start of a length-delimited protobuf field."""
    result = bytearray([field << 3 | 2])
    while length > 127:
        result.append(length & 127 | 128)
        length >>= 7
    result.append(length)
    return bytes(result)
