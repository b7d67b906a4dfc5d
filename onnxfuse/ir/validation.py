"""Checks that a file is a model that onnxfuse can work on, made once, when it is loaded.

The ONNX checker sees a weightless copy with its nodes in topological order, so it neither follows
references to external data nor meets protobuf's 2 GB limit. What it knows best is left to it: operators
and their attributes, subgraphs, functions. Files, versions, stored tensors and the main graph's wiring are
checked here, where the message can name the node or tensor.
"""

import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxfuse.errors import InputError
from onnxfuse.ir import external_data, protos
from onnxfuse.ir.external_data import DataFolder

PROTOBUF_LIMIT = 2**31 - 1
DEEPEST_CALL = 64  # of functions in functions
MOST_NODES = 10**6  # after the expansion of functions
OLDEST_IR = 3  # the first that names operator sets
OLDEST_OPSET = 7  # the oldest whose operators ONNX Runtime guarantees
# What ONNX Runtime runs in ONNX's own domain and the checker refuses, in these operator sets: an operator
# that onnx does not list, and one whose first form it has withdrawn.
_RUNTIMES_OWN = {
    "SimplifiedLayerNormalization": range(OLDEST_OPSET, 2**31),
    "GroupNormalization": range(18, 21),
}
_UNCHECKED = "onnxfuse.unchecked"  # a domain that the checker does not know, so it leaves what is in it alone


def read_file(path: Path) -> bytes:
    """A model file's bytes.

    Raises:
        InputError: it is missing, unreadable, empty, no regular file, or too large for a protobuf message.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"'{path}' is a folder, not an ONNX file")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"'{path}' is not a regular file")
        if status.st_size > PROTOBUF_LIMIT:
            raise InputError(f"'{path}' is over 2 GB, which only external data can be, not an ONNX file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such file: '{path}'") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise InputError(f"'{path}' is empty")
    return data


def parse(data: bytes, what: str) -> ModelProto:
    """Bytes as a ModelProto. `what` names the model in errors.

    Raises:
        InputError: the bytes are no ONNX model, or a truncated one.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, whose module differs between implementations
        raise InputError(f"{what} is not an ONNX model, or it is truncated") from error
    if not proto.HasField("graph"):
        raise InputError(f"{what} is not an ONNX model: it has no graph")
    return proto


def check_versions(proto: ModelProto, what: str) -> None:
    """Refuses IR and opset versions that the installed onnx does not know.

    Raises:
        InputError: a version is missing, too old or too new.
    """
    if proto.ir_version > onnx.IR_VERSION:
        raise InputError(
            f"{what} has ONNX IR version {proto.ir_version}; the installed onnx {onnx.__version__} knows up "
            f"to {onnx.IR_VERSION}: upgrade onnx, or export the model for an older version"
        )
    versions = {o.domain: o.version for o in proto.opset_import}
    if not proto.ir_version:
        raise InputError(
            f"{what} does not say which version of ONNX's format it has (ir_version is missing); "
            "it is damaged, or what wrote it has to set ir_version"
        )
    if proto.ir_version < OLDEST_IR:
        raise InputError(
            f"{what} has ONNX IR version {proto.ir_version}, from before 2017: export the model again"
        )
    if not versions:
        raise InputError(
            f"{what} does not say which operator set it uses (opset_import is empty); it is damaged"
        )
    opset = versions.get("", versions.get("ai.onnx"))
    if opset is None:
        return
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise InputError(
            f"{what} uses opset {opset}; the installed onnx {onnx.__version__} knows up to {newest}: "
            "upgrade onnx, or export the model with an older opset"
        )
    if opset < OLDEST_OPSET:
        raise InputError(
            f"{what} uses opset {opset}, older than {OLDEST_OPSET}, the oldest supported: "
            "convert it with onnx.version_converter"
        )


def check_tensors(proto: ModelProto, folder: DataFolder | None) -> bool:
    """Checks every stored tensor against its type and shape, and returns whether any is external.

    Raises:
        InputError: a tensor's data do not fit, or its external reference is bad.
    """
    external = False
    for tensor in external_data.model_tensors(proto):
        external_data.check(tensor, folder)
        external |= external_data.is_external(tensor)
    return external


def check_names(proto: ModelProto, what: str) -> None:
    """Checks the main graph's wiring: every name is text and defined once, every name used is defined, also
    by subgraphs.

    Raises:
        InputError: names what is wrong and where.
    """
    graph = proto.graph
    stored = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    fed = [v.name for v in graph.input]
    made = [name for node in graph.node for name in node.output if name]
    given = [v.name for v in graph.output]
    if not _is_text(proto):
        raise InputError(f"{what} is damaged: it has text that is not UTF-8")
    if not given:
        raise InputError(f"{what} has no outputs")
    if "" in stored or "" in fed:
        raise InputError(f"{what} has an input or initializer without a name")
    _check_unique("an initializer", stored, what)
    _check_unique("an input", fed, what)
    _check_unique("an output", given, what)
    _check_unique("produced", [*made, *{*stored, *fed}], what)
    defined = {*stored, *fed, *made}
    for node in graph.node:
        captured = (name for body in protos.bodies(node) for name in sorted(protos.captured_names(body)))
        for name in (*node.input, *captured):
            if name and name not in defined:
                place = f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
                raise InputError(f"{what} is not valid: {place} reads '{name}', which nothing produces")
    for name in given:
        if name not in defined:
            raise InputError(f"{what} is not valid: nothing produces its output '{name}'")


def check_attributes(graph: GraphProto, what: str) -> None:
    """Refuses attributes that refer to one of the function around, where there is none around.

    ONNX Runtime takes such an attribute as if it were absent; the checker of onnx lets it pass.

    Raises:
        InputError: names the node and the attribute.
    """
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                place = f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
                raise InputError(
                    f"{what} is not valid: attribute '{attribute.name}' of {place} refers to "
                    f"'{attribute.ref_attr_name}' of a function, and is in none"
                )
        for body in protos.bodies(node):
            check_attributes(body, what)


def check_functions(proto: ModelProto, what: str) -> None:
    """Refuses functions that call each other in a circle, or so often that their expansion would never end.

    Raises:
        InputError: they recurse, nest deeper than `DEEPEST_CALL` or expand to over `MOST_NODES` nodes.
    """
    functions = {(f.domain, f.name): f.node for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Iterable[NodeProto], depth: int) -> int:
        """The number of nodes once every call is replaced by the function's nodes."""
        total = 0
        for node in nodes:
            total += 1 + sum(size(body.node, depth) for body in protos.bodies(node))
            key = (node.domain, node.op_type)
            if key in functions and key not in sizes:
                if depth == DEEPEST_CALL:
                    raise InputError(
                        f"{what} is not valid: function '{node.op_type}' is recursive or nested too deeply"
                    )
                sizes[key] = size(functions[key], depth + 1)
            total += sizes.get(key, 0)
        return total

    if functions and size(proto.graph.node, 0) > MOST_NODES:
        raise InputError(f"{what} has functions that expand to over {MOST_NODES:,} nodes")


def _is_text(message: Message) -> bool:
    """Whether every text field is UTF-8; those that are not, protobuf hands out as bytes."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            if isinstance(value, bytes) or (
                not isinstance(value, str) and any(isinstance(text, bytes) for text in value)
            ):
                return False
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for part in (value,) if isinstance(value, Message) else value:
                if isinstance(
                    part, TensorProto
                ):  # its other fields are long, and checked where they are used
                    if isinstance(part.name, bytes) or isinstance(part.doc_string, bytes):
                        return False
                elif not _is_text(part):
                    return False
    return True


def _check_unique(role: str, names: Sequence[str], what: str) -> None:
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise InputError(f"{what} is not valid: '{name}' is {role} more than once")


def check_operators(proto: ModelProto, nodes: Sequence[NodeProto], what: str) -> None:
    """Runs the ONNX checker over a weightless copy with the main graph's nodes in topological order.

    Operators that only ONNX Runtime knows, in domains of its own or in ONNX's, are left alone: whether they
    can run is its word.

    Args:
        proto: the model.
        nodes: those of its main graph, in topological order.
        what: names the model in errors.

    Raises:
        InputError: an unknown operator, a bad attribute, an invalid subgraph or function.
    """
    graph = proto.graph
    names = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    names = list(dict.fromkeys((*names, *(v.name for v in graph.input))))
    shell = ModelProto(ir_version=proto.ir_version)
    shell.opset_import.extend(protos.light_imports(proto.opset_import))
    shell.functions.extend(protos.light_function(f, keep_dims=False) for f in proto.functions)
    shell.graph.CopyFrom(
        GraphProto(
            name=graph.name or "graph",
            input=map(_any_value, names),
            output=(_any_value(v.name) for v in graph.output),
            node=(protos.light_node(n, keep_dims=False) for n in nodes),
        )
    )
    _leave_unchecked(shell, shell.graph.node)
    for function in shell.functions:
        _leave_unchecked(function, function.node)
    try:
        onnx.checker.check_model(shell)
    except onnx.checker.ValidationError as error:
        raise InputError(f"{what} is not a valid model: {_one_line(str(error))}") from error


def _leave_unchecked(owner: ModelProto | FunctionProto, nodes: Iterable[NodeProto]) -> None:
    """Moves operators that only ONNX Runtime knows out of the domain that is checked, those of bodies too.

    Args:
        owner: says which operator sets the nodes are of; is changed, like the nodes.
        nodes: in it.
    """
    opset = next((o.version for o in owner.opset_import if not o.domain), 0)
    moved = False
    for node in nodes:
        if not node.domain and opset in _RUNTIMES_OWN.get(node.op_type, ()):
            node.domain, moved = _UNCHECKED, True
        for body in protos.bodies(node):
            _leave_unchecked(owner, body.node)
    if moved and all(o.domain != _UNCHECKED for o in owner.opset_import):
        owner.opset_import.add(domain=_UNCHECKED, version=1)


def _any_value(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [])


def _one_line(text: str) -> str:
    """The checker's complaint with the innermost place it gives, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["?"]
    mark = "==> Context: "
    places = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
    return lines[0] + "".join(f" [{place.removeprefix('Bad node spec for ')}]" for place in places[:1])


def find_nonfinite(tensor: TensorProto, folder: DataFolder | None) -> str | None:
    """ "NaN" or else "Inf" where a stored tensor has one, None where it has neither; streamed in chunks."""
    dtype = external_data.numpy_dtype(tensor.data_type)
    if dtype is None or not _is_float(dtype):
        return None
    if external_data.is_external(tensor):
        source = external_data.reference(tensor, folder)
        return _worst(np.frombuffer(piece, dtype) for piece in external_data.chunks(source))
    if tensor.HasField("raw_data"):
        return nonfinite(np.frombuffer(tensor.raw_data, dtype))
    return nonfinite(external_data.read(tensor, folder))


def nonfinite(array: np.ndarray) -> str | None:
    """ "NaN" or else "Inf" where an array has one, None where it has neither."""
    if not _is_float(array.dtype):
        return None
    flat = array.reshape(-1)
    step = external_data.CHUNK // array.itemsize
    return _worst(flat[start : start + step] for start in range(0, flat.size, step))


def _is_float(dtype: np.dtype) -> bool:
    """Whether the type has a NaN: numpy's floats and complexes, and the wider ones of ml_dtypes."""
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat16", "float8"))


def _worst(pieces: Iterable[np.ndarray]) -> str | None:
    found = None
    for piece in pieces:
        if not np.isfinite(piece).all():
            if np.isnan(piece).any():
                return "NaN"
            found = "Inf"
    return found
