"""The graph of a model: its nodes and tensors, linked, and the questions that can be asked of it.

It is made of the original proto and of linked nodes and tensors (`nodes`). `editing` changes it, `export`
makes protos of it, `model` is what everybody works with. Weights may be initializers, initializers that are
also listed as inputs, or outputs of `Constant` nodes in any form; `weight` treats them alike, and nothing is
loaded before it is asked for.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto

from onnxfuse.ir import protos, shapes
from onnxfuse.ir.external_data import DataFolder
from onnxfuse.ir.nodes import CONSTANT_FORMS, Constant, Node, StoredValues, Tensor, Variable
from onnxfuse.ir.protos import DEFAULT_DOMAINS
from onnxfuse.ir.shapes import TensorInfo

T = TypeVar("T")
G = TypeVar("G", bound="Graph")
IndexMap = tuple[np.ndarray | None, ...]


class CycleError(ValueError):
    """Nodes depend on each other in a circle: a bad file, or after an edit a bug of that edit."""


class Graph:
    """The linked nodes and tensors of a model.

    Attributes:
        path: the file it came from, if any.
        data: where its external data is looked for.
        source: the proto it came from; not to be modified.
        initializers: in the file's order; a dict for its order, the values mean nothing.
        listed: the initializers that the file also lists as inputs, by name.
        declared: what the file declares of inputs, outputs and inner tensors, by name.
        index_maps: of every computed tensor that no longer has the indices it was loaded with, for each axis
            the old positions in their new order, None where they are all there; None for a tensor of which
            no fixed positions can be told. Kept by `channels.take`.
    """

    def __init__(self, source: ModelProto, path: Path | None, data: DataFolder | None) -> None:
        """The nodes and tensors of a proto, linked.

        Args:
            source: the proto; it is kept, and not to be modified.
            path: the file it came from, None if it came from none.
            data: where its external data lies.
        """
        self.path = path
        self.data = data
        self.source = source
        self.initializers: dict[Constant, None] = {}
        self.listed: dict[str, Constant] = {}
        self.declared: dict[str, ValueInfoProto] = {}
        self.index_maps: dict[str, IndexMap | None] = {}
        self._notes: dict[str, str] = {}
        self._nodes: list[Node] = []
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._external = False
        self._unused_at_load: set[Constant] = set()
        self._dead_at_load: set[Node] = set()
        self._tensors: dict[str, Tensor] = {}
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}
        self._captures: dict[str, dict[Node, None]] = {}
        self._removed: set[Node] = set()
        self._sorted = True
        self._caches: dict[str, tuple[Any, Any]] = {}

    def _import(self) -> None:
        graph = self.source.graph
        for stored in (*graph.initializer, *graph.sparse_initializer):
            name = stored.values.name if isinstance(stored, SparseTensorProto) else stored.name
            self._tensors[name] = constant = Constant(name, StoredValues(stored, self.data))
            self.initializers[constant] = None
        self.declared = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
        for value in graph.input:
            tensor = self._tensor_named(value.name)
            if isinstance(tensor, Constant):
                self.listed[value.name] = tensor
            else:
                self._inputs.append(tensor)
        self._nodes = [self._import_node(n) for n in graph.node]
        self._outputs = [self._tensor_named(v.name) for v in graph.output]
        self._names.update(self._tensors)
        for node in self._nodes:
            for body in node.bodies:
                self._names.update(protos.inner_names(body))
            self._note_captures(node)
        self._sorted = False

    def _import_node(self, proto: NodeProto) -> Node:
        node = Node(
            proto.op_type,
            proto.name,
            {a.name: protos.attribute_value(a, self._attribute_tensor) for a in proto.attribute},
            [self._tensor_named(n) for n in proto.input],
            [self._tensor_named(n) for n in proto.output],
            "" if proto.domain in DEFAULT_DOMAINS else proto.domain,
            {p.key: p.value for p in proto.metadata_props},
        )
        node.origin, node.baseline = proto, node.signature()
        return node

    def _attribute_tensor(self, proto: TensorProto) -> Constant:
        return Constant(proto.name, StoredValues(proto, self.data))

    def _tensor_named(self, name: str) -> Tensor:
        if not name:
            return Variable("")
        found = self._tensors.get(name)
        if found is None:
            self._tensors[name] = found = Variable(name)
        return found

    @property
    def nodes(self) -> list[Node]:
        """The main graph's nodes in topological order. Copy the list before editing in a loop over it."""
        if not self._sorted:
            self.sort()
        return self._nodes

    @property
    def inputs(self) -> list[TensorInfo]:
        """The tensors that a user feeds; initializers that are also listed as inputs are not among them."""
        return [shapes.info_of(self.declared[t.name]) for t in self._inputs]

    @property
    def outputs(self) -> list[TensorInfo]:
        """The tensors that a user gets, in order."""
        return [shapes.info_of(v) for v in self.source.graph.output]

    @property
    def opset(self) -> int:
        """The version of the default operator set; 0 if the model does not import it."""
        return next((o.version for o in self.source.opset_import if o.domain in DEFAULT_DOMAINS), 0)

    @property
    def external_dir(self) -> Path | None:
        """The folder of the external data; None if the model as loaded has none."""
        return self.folder if self._external else None

    @property
    def folder(self) -> Path | None:
        """The folder in which external data is looked for; None for a model that came from none."""
        return self.data.path if self.data is not None else None

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            KeyError: there is none in the main graph.
        """
        found = self._tensors.get(name)
        if found is None or found.name != name or not self._attached(found):
            self._reindex()
            found = self._tensors[name]
        return found

    def _attached(self, tensor: Tensor) -> bool:
        return bool(tensor.inputs or tensor.outputs) or tensor in self.initializers or tensor in self._inputs

    def _reindex(self) -> None:
        self._tensors = {t.name: t for t in self.tensors()}
        self._names.update(self._tensors)

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of the main graph once: initializers, inputs, then in the order of the nodes."""
        found: dict[Tensor, None] = dict.fromkeys((*self.initializers, *self._inputs))
        for node in self._nodes:
            if node not in self._removed:
                found.update(dict.fromkeys(t for t in (*node.inputs, *node.outputs) if t.name))
        return found

    def producer(self, tensor: Tensor) -> Node | None:
        """The node that computes the tensor; None for inputs and initializers."""
        return tensor.inputs[0] if tensor.inputs else None

    def consumers(self, tensor: Tensor) -> list[Node]:
        """The nodes that use the tensor, each once; a node whose body captures it is one of them."""
        return list(dict.fromkeys((*tensor.outputs, *self._captures.get(tensor.name, ()))))

    def captured(self, tensor: Tensor) -> bool:
        """Whether the body of some node uses the tensor from outside."""
        return bool(self._captures.get(tensor.name))

    def is_output(self, tensor: Tensor) -> bool:
        """Whether it is an output of the graph."""
        return tensor in self._outputs

    def _used(self, tensor: Tensor) -> bool:
        return bool(tensor.outputs) or self.captured(tensor) or self.is_output(tensor)

    def _note_captures(self, node: Node) -> None:
        for name in node.captured:
            self._captures.setdefault(name, {})[node] = None

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether `weight` would give a value; nothing is loaded."""
        producer = self.producer(tensor)
        return isinstance(tensor, Constant) or (producer is not None and producer.constant_form is not None)

    def weight(self, tensor: Tensor, *, writable: bool = False) -> np.ndarray | None:
        """The value of an initializer, or of a Constant node in whatever form; None for other tensors.

        Each call reads the value anew, of external data only its own range, and nothing stays in memory.
        The array is read-only unless `writable` asks for a private one; `set_weight` changes the model.

        Raises:
            InputError: the external data is gone or has become too short.
        """
        if isinstance(tensor, Constant):
            array, private = tensor.values, tensor.stored is not None
        else:
            producer = self.producer(tensor)
            form = producer.constant_form if producer is not None else None
            if producer is None or form is None:
                return None
            value = producer.attrs[form]
            array = CONSTANT_FORMS[form](value)
            private = not (isinstance(value, Constant) and value.stored is None)
        if writable:
            return array if private else array.copy()
        return read_only(array)

    def _live(self, roots: Iterable[Node]) -> set[Node]:
        """The nodes that the graph outputs, or these roots, depend on."""
        stack = [n for t in self._outputs for n in t.inputs]
        stack.extend(n for n in roots if n not in self._removed)
        live: set[Node] = set()
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack.extend(self._sources(node))
        return live

    def _sources(self, node: Node) -> Iterator[Node]:
        """The nodes that this one needs the outputs of."""
        for tensor in node.inputs:
            yield from tensor.inputs
        for name in node.captured:
            yield from self.tensor(name).inputs

    def sort(self) -> None:
        """Puts the nodes in topological order: those that come too late for a node move right before it.

        Raises:
            CycleError: there is no such order.
        """
        done: set[Node] = set(self._removed)
        open_: set[Node] = set()
        order: list[Node] = []
        for first in self._nodes:
            stack = [] if first in done else [(first, self._sources(first))]
            open_.update(node for node, _ in stack)
            while stack:
                node, sources = stack[-1]
                source = next((s for s in sources if s not in done), None)
                if source is None:
                    stack.pop()
                    open_.discard(node)
                    done.add(node)
                    order.append(node)
                elif source in open_:
                    raise CycleError(f"the graph has a cycle through node {source.label}")
                else:
                    stack.append((source, self._sources(source)))
                    open_.add(source)
        self._removed.clear()
        self._nodes[:] = order
        self._sorted = True

    def note(self, key: str) -> str | None:
        """An entry of the model's metadata_props, None without."""
        return self.notes().get(key)

    def notes(self) -> dict[str, str]:
        """All entries of the model's metadata_props."""
        return {**{entry.key: entry.value for entry in self.source.metadata_props}, **self._notes}

    def copy(self: G) -> G:
        """An independent structure over the same weights: edits of either do not show in the other."""
        with without_collector():
            return self._copy()

    def _copy(self: G) -> G:
        other = type(self)(self.source, self.path, self.data)
        constants = {t: t.twin() for t in self.initializers}
        twins: dict[Tensor, Tensor] = dict(constants)

        def twin(tensor: Tensor) -> Tensor:
            if tensor not in twins:
                twins[tensor] = tensor.twin() if isinstance(tensor, Constant) else Variable(tensor.name)
            return twins[tensor]

        nodes = {n: n.twin(map(twin, n.inputs), map(twin, n.outputs)) for n in self.nodes}
        other._nodes = list(nodes.values())
        other._inputs, other._outputs = list(map(twin, self._inputs)), list(map(twin, self._outputs))
        other.initializers = dict.fromkeys(constants.values())
        other.listed = {name: constants.get(t, t) for name, t in self.listed.items()}
        other.declared, other._external = self.declared, self._external
        other.index_maps, other._notes = dict(self.index_maps), dict(self._notes)
        other._unused_at_load = {constants[t] for t in self._unused_at_load if t in constants}
        other._dead_at_load = {nodes[n] for n in self._dead_at_load if n in nodes}
        other._tensors = {t.name: t for t in twins.values() if t.name}
        other._names, other._counts = set(self._names), dict(self._counts)
        for node in other._nodes:
            other._note_captures(node)
        other._caches = dict(self._caches)
        return other

    def unique_name(self, base: str) -> str:
        """`base`, or `base_1`, `base_2`, ...: a name that nothing in the graph or its bodies ever had."""
        name, count = base, self._counts.get(base, 0)
        while name in self._names or not name:
            count += 1
            name = f"{base}_{count}"
        self._counts[base] = max(0, count - 1)
        return name

    def stale_names(self) -> set[str]:
        """Names of the tensors downstream of an edit, whose declared shapes may hold no longer.

        Integers may be sizes, so other values of them count as an edit.
        """
        stale = {
            tensor.name
            for tensor in self.initializers
            if tensor.retyped or (tensor.stored is None and tensor.dtype.kind in "iu")
        }
        for node in self.nodes:
            if (
                node.edited
                or any(t.name in stale for t in node.inputs)
                or any(n in stale for n in node.captured)
            ):
                stale.update(tensor.name for tensor in node.outputs if tensor.name)
        return stale

    def cached(self, key: str, compute: Callable[[], T]) -> T:
        """The value of `compute`, kept until the graph is edited."""
        mark = [n.state() for n in self.nodes], [(t.name, t.stamp) for t in self.initializers]
        found = self._caches.get(key)
        if found is None or found[0] != mark:
            found = self._caches[key] = mark, compute()
        value: T = found[1]
        return value


class without_collector:
    """Python's cyclic collector off: it would scan a growing graph of live objects again and again."""

    def __enter__(self) -> None:
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_on:
            gc.enable()


def read_only(array: np.ndarray) -> np.ndarray:
    """A view of the array that can't be written to."""
    view = array.view()
    view.flags.writeable = False
    return view
