"""Nodes and tensors: GraphSurgeon's classes, each with the proto it was read from.

This is the only module that imports GraphSurgeon. Its round trip drops metadata, doc strings and much
else, and rewrites every node. Here its classes only carry the *edits*: a node knows what its original
proto says (`baseline`) and compares itself with that on export. Where nothing changed, the original goes
out, byte for byte; where something did, only those fields are replaced.

Three things differ from plain GraphSurgeon, because in a graph under edit identity is what matters:

- Nodes and tensors compare and hash by identity.
- A subgraph (the body of an `If`, `Loop`, `Scan`) stays a `GraphProto` in its attributes, not to be changed
  but replaced (`Model.set_body`). The names that it captures from outside count as uses by its node.
- Reading a `Constant` loads its values and keeps nothing: a model costs what its edits cost.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, SparseTensorProto, TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxfuse.ir import external_data, protos
from onnxfuse.ir.external_data import DataFolder

# Where a Constant node keeps its value, and how each form becomes an array.
CONSTANT_FORMS: dict[str, Callable[[Any], np.ndarray]] = {
    "value": lambda value: value.values,
    "sparse_value": lambda value: external_data.dense(value.sparse_tensor, None),
    "value_float": lambda value: np.array(value, np.float32),
    "value_floats": lambda value: np.array(value, np.float32),
    "value_int": lambda value: np.array(value, np.int64),
    "value_ints": lambda value: np.array(value, np.int64),
    "value_string": lambda value: np.array(value, object),
    "value_strings": lambda value: np.array(value, object),
}
_stamps = itertools.count()


class StoredValues(LazyValues):
    """Values that still lie in the proto, or the data file, that they came from."""

    def __init__(self, tensor: TensorProto | SparseTensorProto, folder: DataFolder | None) -> None:
        self.tensor = tensor
        self.folder = folder
        self.shape = tuple(tensor.dims)
        self.dtype = external_data.numpy_dtype(self.values_proto.data_type)

    @property
    def values_proto(self) -> TensorProto:
        """The tensor itself, or a sparse one's values."""
        return self.tensor.values if isinstance(self.tensor, SparseTensorProto) else self.tensor

    @property
    def sparse(self) -> bool:
        return isinstance(self.tensor, SparseTensorProto)

    @property
    def external(self) -> bool:
        return isinstance(self.tensor, TensorProto) and external_data.is_external(self.tensor)

    def load(self) -> np.ndarray:
        """The values as a new array."""
        if isinstance(self.tensor, SparseTensorProto):
            return external_data.dense(self.tensor, self.folder)
        return external_data.read(self.tensor, self.folder)


class Tensor(gs.Tensor):
    """A tensor: `inputs` are its producers (at most one), `outputs` the nodes that list it as an input."""

    name: str
    inputs: "list[Node]"
    outputs: "list[Node]"
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Variable(Tensor, gs.Variable):
    """A tensor that is computed or fed. Its type and shape are `Model.shapes`' to tell."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Constant(Tensor, gs.Constant):
    """A tensor with a stored value: `Model.weight` is the way to read it, `Model.set_weight` to write it."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    _values: np.ndarray | StoredValues

    def __init__(self, name: str, values: np.ndarray | StoredValues) -> None:
        super().__init__(name, values)
        self.origin = values if isinstance(values, StoredValues) else None
        self.stamp = next(_stamps)  # differs between any two values that a constant ever had

    @property
    def stored(self) -> StoredValues | None:
        """The values as they lie in the file; None once they were replaced."""
        return self._values if isinstance(self._values, StoredValues) else None

    @property
    def values(self) -> np.ndarray:
        return self._values.load() if isinstance(self._values, StoredValues) else self._values

    @values.setter
    def values(self, array: np.ndarray) -> None:
        self._values = array
        self.stamp = next(_stamps)

    @property
    def retyped(self) -> bool:
        """Whether its type or shape is another than in the file (a new one has none there)."""
        if self.origin is None:
            return True
        return self._values is not self.origin and (
            (self.dtype, self.shape) != (self.origin.dtype, self.origin.shape)
        )

    def twin(self) -> "Constant":
        """Another Constant over the same values."""
        other = Constant(self.name, self._values)
        other.origin, other.stamp = self.origin, self.stamp
        return other

    def proto(self) -> TensorProto:
        """The original under its present name, or the edited values with the notes of the original."""
        if self.stored is None:
            result = numpy_helper.from_array(self.values, self.name)
            self.copy_notes(result)
            return result
        original = self.stored.values_proto
        if original.name == self.name:
            return original
        result = TensorProto()
        result.CopyFrom(original)
        result.name = self.name
        return result

    def copy_notes(self, target: TensorProto) -> None:
        """Copies what the original says about itself besides its values."""
        if self.origin is not None and not self.origin.sparse:
            protos.copy_notes(self.origin.values_proto, target)


class Node(gs.Node):
    """An operator. `domain` is "" for the default one; `metadata` holds its metadata_props."""

    op: str
    name: str
    domain: str
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        op: str,
        name: str,
        attrs: dict[str, Any],
        inputs: Iterable[Tensor],
        outputs: Iterable[Tensor],
        domain: str = "",
        metadata: dict[str, str] | None = None,
    ) -> None:
        """A node that no proto stands behind yet.

        Args:
            op, domain: the operator; "" is the default domain.
            name: may be empty, and need not be unique.
            attrs: plain values by name.
            inputs, outputs: its tensors; `Variable("")` for an optional one that is left out.
            metadata: its metadata_props.
        """
        super().__init__(op, name, attrs, list(inputs), list(outputs), domain)
        self.metadata = metadata or {}
        self.origin: NodeProto | None = None
        self.baseline: tuple[Any, ...] | None = None  # the signature of the origin
        self._exported: tuple[tuple[Any, ...], NodeProto] | None = None
        self._captured: tuple[list[GraphProto], tuple[str, ...]] = ([], ())

    def twin(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> "Node":
        """Another node that says the same about other tensors."""
        attrs = {key: _twin_attribute(value) for key, value in self.attrs.items()}
        other = Node(self.op, self.name, attrs, inputs, outputs, self.domain, dict(self.metadata))
        other.origin, other.baseline = self.origin, self.baseline
        other._exported, other._captured = self._exported, self._captured
        return other

    @property
    def bodies(self) -> list[GraphProto]:
        """The subgraphs that this node runs."""
        found = []
        for value in self.attrs.values():
            if isinstance(value, GraphProto):
                found.append(value)
            elif isinstance(value, list) and value and isinstance(value[0], GraphProto):
                found.extend(value)
        return found

    @property
    def captured(self) -> tuple[str, ...]:
        """Names of outer tensors that the bodies use, sorted."""
        bodies = self.bodies
        if bodies != self._captured[0]:
            names = set[str]().union(*map(protos.captured_names, bodies))
            self._captured = bodies, tuple(sorted(names))
        return self._captured[1]

    @property
    def constant_form(self) -> str | None:
        """The attribute in which a Constant node keeps its value; None for other operators."""
        if self.op != "Constant" or self.domain:
            return None
        return next((form for form in CONSTANT_FORMS if form in self.attrs), None)

    @property
    def key(self) -> tuple[str, str]:
        """Domain ("" for ONNX's own) and name of its operator, the key of rules and of `ops.table`."""
        return protos.operator_key(self.domain, self.op)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute; where it is not given, the default in ONNX's precision (`protos.as_default`)."""
        return self.attrs[name] if name in self.attrs else protos.as_default(default)

    @property
    def site_name(self) -> str:
        """The name by which users mean the node: its own, or its first output's where it has none."""
        return self.name or next((tensor.name for tensor in self.outputs if tensor.name), "")

    @property
    def label(self) -> str:
        """The node in messages: its `site_name` and its operator."""
        return f"'{self.site_name}' ({self.op})"

    @property
    def edited(self) -> bool:
        """Whether it is new or says anything else than the proto it was read from."""
        return self.state() is not self.baseline

    def signature(self) -> tuple[Any, ...]:
        """All it says, comparable: equal signatures export alike."""
        for key, value in self.attrs.items():
            if isinstance(value, np.ndarray):
                self.attrs[key] = Constant(key, value)
        return (
            self.op,
            self.domain,
            self.name,
            [t.name for t in self.inputs],
            [t.name for t in self.outputs],
            {key: _comparable(value) for key, value in self.attrs.items()},
            dict(self.metadata),
        )

    def state(self) -> tuple[Any, ...]:
        """The signature; the baseline itself while nothing was edited, so that many copies cost no memory."""
        now = self.signature()
        return self.baseline if now == self.baseline and self.baseline is not None else now

    def proto(self, opset: int) -> NodeProto:
        """Its original, or a copy with only what changed replaced, or a new proto. Not to be modified."""
        now = self.state()
        if self.origin is not None and now is self.baseline:
            return self.origin
        if self._exported is None or self._exported[0] != now:
            self._exported = now, self._export(now, opset)
        return self._exported[1]

    def _export(self, now: tuple[Any, ...], opset: int) -> NodeProto:
        result = NodeProto()
        if self.origin is not None:
            result.CopyFrom(self.origin)
        for field in ("input", "output", "attribute", "domain"):
            result.ClearField(field)
        result.op_type, result.name = self.op, self.name
        if self.domain:
            result.domain = self.domain
        result.input.extend(now[3])
        result.output.extend(now[4])
        old = {} if self.origin is None else {a.name: a for a in self.origin.attribute}
        unchanged = {} if self.baseline is None else self.baseline[5]
        for key, value in self.attrs.items():
            if key in old and unchanged[key] == now[5][key]:
                result.attribute.append(old[key])
                continue
            kind = old[key].type if key in old else protos.schema_kind(self.op, self.domain, opset, key)
            if isinstance(value, Constant):
                value = value.proto() if kind in (None, AttributeProto.TENSOR) else value.values
            result.attribute.append(protos.attribute_proto(key, value, kind))
        if {p.key: p.value for p in result.metadata_props} != self.metadata:
            del result.metadata_props[:]
            for key, text in self.metadata.items():
                result.metadata_props.add(key=key, value=text)
        return result


def _comparable(value: Any) -> Any:
    """An attribute value such that equal means the same: 1 is not 1.0, and a tensor is one by its stamp."""
    if isinstance(value, Constant):
        return ("tensor", value.stamp)
    if isinstance(value, (list, tuple)):
        return [_comparable(v) for v in value]
    return (type(value), value)


def _twin_attribute(value: Any) -> Any:
    if isinstance(value, Constant):
        return value.twin()
    return list(value) if isinstance(value, list) else value
