"""The model under edit: its nodes and tensors, and what may be done to them.

A `Model` is the original proto plus a graph of linked nodes and tensors (`ir`). Passes walk and edit that
graph; whatever they leave alone is exported from the original proto (`export`), so doc strings,
metadata_props, subgraphs, functions, quantization annotations, external data references and order survive
every rewrite that does not concern them. Names are identity, and every new node says which pass made it.

Weights may be initializers, initializers that are also listed as inputs, or outputs of `Constant` nodes in
any form; `weight` and `set_weight` treat them alike, and nothing is loaded before it is asked for.
"""

import gc
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto

from onnxfuse.errors import InputError
from onnxfuse.ir import export, external_data, protos, saving
from onnxfuse.ir.nodes import CONSTANT_FORMS, Constant, Node, Stored, Tensor, Variable
from onnxfuse.ir.protos import DEFAULT_DOMAINS
from onnxfuse.ir.shape_inference import infer
from onnxfuse.ir.shapes import TensorInfo, fill, info_of
from onnxfuse.ir.validation import (
    PARAMETERS,
    check_functions,
    check_names,
    check_operators,
    check_tensors,
    check_versions,
    find_nonfinite,
    nonfinite,
    parse,
    read_file,
)
from onnxfuse.runtime import observed_shapes

__all__ = [
    "DEFAULT_DOMAINS",
    "PASS_KEY",
    "REPLACES_KEY",
    "Constant",
    "CycleError",
    "Feed",
    "Model",
    "Node",
    "Source",
    "Tensor",
    "TensorInfo",
    "Variable",
]

Feed = dict[str, np.ndarray]
Source = str | os.PathLike[str] | bytes | ModelProto
T = TypeVar("T")

# metadata_props of a new node: the pass that made it, and a JSON list of the nodes it stands for.
PASS_KEY = "onnxfuse.pass"
REPLACES_KEY = "onnxfuse.replaces"


IndexMap = tuple[np.ndarray | None, ...]


class CycleError(ValueError):
    """Nodes depend on each other in a circle: a bad file, or after an edit a bug of that edit."""


class Model:
    """A model under edit; `Model.load` makes one.

    Nodes are edited through their lists and dicts (`node.inputs[1] = tensor`, `node.attrs["axis"] = 1`) and
    through the methods here. A graph input, a graph output and a tensor that a body captures must keep
    their names.

    Attributes:
        path: the file it came from, if any.
        folder: where its external data is looked for.
        source: the proto it came from; not to be modified.
        initializers: in the file's order; a dict for its order, the values mean nothing.
        listed: the initializers that the file also lists as inputs, by name.
        declared: what the file declares of inputs, outputs and inner tensors, by name.
        index_maps: of every computed tensor that no longer has the indices it was loaded with, for each axis
            the old positions in their new order, None where they are all there; None for a tensor of which
            no fixed positions can be told. Kept by `channels.take`.
    """

    def __init__(self, source: ModelProto, path: Path | None, folder: Path | None) -> None:
        self.path = path
        self.folder = folder
        self.source = source
        self.initializers: dict[Constant, None] = {}
        self.listed: dict[str, Constant] = {}
        self.declared: dict[str, ValueInfoProto] = {}
        self.index_maps: dict[str, IndexMap | None] = {}
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

    # Loading

    @classmethod
    def load(cls, source: Source, folder: Path | None = None) -> "Model":
        """A model from a path, the bytes of a file, or a ModelProto (which is copied).

        External data is only looked at for its place and size; of what is no path, it lies in `folder`. Nodes
        that are out of order are sorted.

        Raises:
            InputError: the file is missing, damaged, no ONNX model, not valid, or too new; or its external
                data is missing, too short, outside the model's folder or behind a symbolic link.
        """
        path, what = None, "the model"
        if isinstance(source, ModelProto):
            proto = ModelProto()
            proto.CopyFrom(source)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            proto = parse(bytes(source), what)
        else:
            path = Path(source)
            what = f"'{path}'"
            proto = parse(read_file(path), what)
        check_names(proto, what)
        check_versions(proto, what)
        check_functions(proto, what)
        model = cls(proto, path, Path(os.path.abspath(path)).parent if path is not None else folder)
        model._external = check_tensors(proto, model.folder)
        with _without_collector():
            model._import()
        try:
            nodes = model.nodes
        except CycleError as error:
            raise InputError(f"{what} is not valid: {error}") from error
        check_operators(proto, [n.origin for n in nodes if n.origin is not None], what)
        live = model._live(())
        model._dead_at_load = {n for n in nodes if n not in live}
        model._unused_at_load = {t for t in model.initializers if not model._used(t)}
        return model

    def _import(self) -> None:
        graph = self.source.graph
        for stored in (*graph.initializer, *graph.sparse_initializer):
            name = stored.values.name if isinstance(stored, SparseTensorProto) else stored.name
            self._tensors[name] = constant = Constant(name, Stored(stored, self.folder))
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
        return Constant(proto.name, Stored(proto, self.folder))

    def _tensor_named(self, name: str) -> Tensor:
        if not name:
            return Variable("")
        found = self._tensors.get(name)
        if found is None:
            self._tensors[name] = found = Variable(name)
        return found

    # Looking

    @property
    def nodes(self) -> list[Node]:
        """The main graph's nodes in topological order. Copy the list before editing in a loop over it."""
        if not self._sorted:
            self.sort()
        return self._nodes

    @property
    def inputs(self) -> list[TensorInfo]:
        """What a user feeds: initializers that are also listed as inputs are not among them."""
        return [info_of(self.declared[t.name]) for t in self._inputs]

    @property
    def outputs(self) -> list[TensorInfo]:
        """What a user gets, in order."""
        return [info_of(v) for v in self.source.graph.output]

    @property
    def opset(self) -> int:
        """The version of the default operator set; 0 if the model does not import it."""
        return next((o.version for o in self.source.opset_import if o.domain in DEFAULT_DOMAINS), 0)

    @property
    def external_dir(self) -> Path | None:
        """The folder of the external data; None if the model as loaded has none."""
        return self.folder if self._external else None

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

    def _forget_captures(self, node: Node) -> None:
        for name in node.captured:
            self._captures.get(name, {}).pop(node, None)

    # Weights

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
        return _read_only(array)

    def set_weight(self, tensor: Tensor, array: np.ndarray) -> None:
        """Replaces the value of an initializer or Constant node, for all its consumers; the name stays.

        The model keeps the array itself, not a copy: don't change it afterwards.

        Raises:
            ValueError: the tensor is no weight.
        """
        if isinstance(tensor, Constant):
            tensor.values = _native(array)
            return
        producer = self.producer(tensor)
        form = producer.constant_form if producer is not None else None
        if producer is None or form is None:
            raise ValueError(f"'{tensor.name}' is not a weight")
        old = producer.attrs.pop(form)
        constant = old.twin() if isinstance(old, Constant) else Constant(tensor.name, _native(array))
        constant.values = _native(array)
        producer.attrs["value"] = constant

    def add_weight(self, name: str, array: np.ndarray) -> Constant:
        """A new initializer, its name made unique from `name`. The model keeps the array itself."""
        constant = Constant(self.unique_name(name), _native(array))
        self.initializers[constant] = None
        self._register(constant)
        return constant

    def check_finite(self) -> None:
        """Streams all stored values; refuses NaN anywhere, and Inf where an operator computes with it as a
        parameter (`checks.PARAMETERS`; in a mask or a bound an infinity is meant).

        Raises:
            InputError: names the tensor.
        """
        for tensor in self.initializers:
            self._check_finite(tensor.name, tensor, self.consumers(tensor))
        for node in self.nodes:
            for key, value in node.attrs.items():
                if isinstance(value, Constant) and node.constant_form:
                    self._check_finite(node.outputs[0].name, value, self.consumers(node.outputs[0]))
                elif isinstance(value, Constant):
                    self._check_finite(f"{key} of {node.label}", value, ())
        bodies = (external_data.graph_tensors(body) for node in self.nodes for body in node.bodies)
        functions = (external_data.node_tensors(n) for f in self.source.functions for n in f.node)
        for proto in itertools.chain.from_iterable((*bodies, *functions)):
            if find_nonfinite(proto, self.folder) == "NaN":
                raise InputError(f"tensor '{proto.name}' has a NaN value")

    def _check_finite(self, name: str, tensor: Constant, users: Iterable[Node]) -> None:
        stored = tensor.stored
        if stored is None:
            found = nonfinite(tensor.values)
        else:
            found = find_nonfinite(stored.values_proto, stored.folder)
        if found == "NaN" or (found and any(n.key in PARAMETERS for n in users)):
            raise InputError(f"weight '{name}' has {'a NaN' if found == 'NaN' else 'an infinite'} value")

    # Editing

    def unique_name(self, base: str) -> str:
        """`base`, or `base_1`, `base_2`, ...: a name that nothing in the graph or its bodies ever had."""
        name, count = base, self._counts.get(base, 0)
        while name in self._names or not name:
            count += 1
            name = f"{base}_{count}"
        self._counts[base] = max(0, count - 1)
        return name

    def _register(self, tensor: Tensor) -> None:
        if tensor.name:
            self._tensors[tensor.name] = tensor
            self._names.add(tensor.name)

    def add_node(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor | str],
        attrs: Mapping[str, Any] | None = None,
        name: str = "",
        *,
        domain: str = "",
        by: str,
        replaces: Sequence[str] = (),
    ) -> Node:
        """A new node, placed where the order stays topological.

        Args:
            op: operator type.
            inputs: tensors; `Variable("")` for an optional input left out.
            outputs: existing tensors that have no producer, or fresh names (made unique; "" leaves one out).
            attrs: plain values (numbers, lists, strings, arrays, GraphProto), cast to the schema's types.
            name: of the node; it need not be unique.
            domain: must be imported by the model.
            by: the pass, kept in the node's metadata_props.
            replaces: names of the nodes it stands for, kept there as a JSON list.

        Raises:
            ValueError: an output already has a producer or value, or the domain is not imported.
        """
        imported = {"" if o.domain in DEFAULT_DOMAINS else o.domain for o in self.source.opset_import}
        if domain not in imported:
            raise ValueError(f"the model does not import domain '{domain}'")
        targets = [o if isinstance(o, Tensor) else self._fresh(o) for o in outputs]
        for target in targets:
            if target.inputs or isinstance(target, Constant) or target in self._inputs:
                raise ValueError(f"'{target.name}' already has a producer or value")
        metadata = {PASS_KEY: by}
        if replaces:
            metadata[REPLACES_KEY] = json.dumps(list(replaces), ensure_ascii=False)
        node = Node(op, name, dict(attrs or {}), inputs, targets, domain, metadata)
        for tensor in (*inputs, *targets):
            self._register(tensor)
        self._nodes.append(node)
        self._note_captures(node)
        self._sorted = False
        return node

    def _fresh(self, base: str) -> Variable:
        variable = Variable(self.unique_name(base) if base else "")
        self._register(variable)
        return variable

    def set_body(self, node: Node, key: str, body: GraphProto) -> None:
        """Replaces a subgraph of a node; what it captures from outside is noted anew."""
        self._forget_captures(node)
        node.attrs[key] = body
        self._names.update(protos.inner_names(body))
        self._note_captures(node)
        self._sorted = False

    def remove(self, nodes: Iterable[Node]) -> None:
        """Detaches nodes from their tensors. The tensors stay, so that a new node can produce them."""
        for node in nodes:
            node.inputs.clear()
            node.outputs.clear()
            self._forget_captures(node)
            self._removed.add(node)
            self._sorted = False

    def prune(self) -> None:
        """Drops nodes and initializers that edits have left without use; what the file left unused stays."""
        live = self._live(self._dead_at_load)
        self.remove([n for n in self.nodes if n not in live])
        kept = (t for t in self.initializers if t in self._unused_at_load or self._used(t))
        self.initializers = dict.fromkeys(kept)
        self._reindex()

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

    def copy(self) -> "Model":
        """An independent structure over the same weights: edits of either do not show in the other."""
        with _without_collector():
            return self._copy()

    def _copy(self) -> "Model":
        other = Model(self.source, self.path, self.folder)
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
        other.index_maps = dict(self.index_maps)
        other._unused_at_load = {constants[t] for t in self._unused_at_load if t in constants}
        other._dead_at_load = {nodes[n] for n in self._dead_at_load if n in nodes}
        other._tensors = {t.name: t for t in twins.values() if t.name}
        other._names, other._counts = set(self._names), dict(self._counts)
        for node in other._nodes:
            other._note_captures(node)
        other._caches = dict(self._caches)
        return other

    # Shapes

    def _cached(self, key: str, compute: Callable[[], T]) -> T:
        """The value of `compute`, kept until the graph is edited."""
        mark = [n.state() for n in self.nodes], [(t.name, t.stamp) for t in self.initializers]
        found = self._caches.get(key)
        if found is None or found[0] != mark:
            found = self._caches[key] = mark, compute()
        value: T = found[1]
        return value

    def shapes(self, feed: Feed | None = None) -> dict[str, TensorInfo]:
        """Type and shape of every tensor of the main graph, by name.

        They come from the file's declarations and ONNX shape inference. Where a feed is given, what is
        still unknown comes from running ONNX Runtime on it, with the concrete sizes it has there.

        Raises:
            InputError: a feed that does not fit the inputs.
            NotApplicableError: a model that ONNX Runtime can't run, if it has to.
        """
        found = self._cached("shapes", lambda: infer(self))
        if feed is None or all(info.complete for info in found.values()):
            return dict(found)
        runs = self._runs()
        run = next((result for known, result in runs if _same_arrays(known, feed)), None)
        if run is None:
            run = observed_shapes.run(self, found, feed)
            runs[:] = [(dict(feed), run), *runs[:1]]
        return {name: fill(info, run.get(name)) for name, info in found.items()}

    def _runs(self) -> list[tuple[Feed, dict[str, TensorInfo]]]:
        """The latest feeds run for shapes, and what they showed."""
        return self._cached("runs", list)

    def type_of(self, name: str) -> TensorInfo:
        """Like `shapes()[name]`; where that knows no type, with the type and rank that a run has shown."""
        info = self.shapes()[name]
        for _, run in self._runs() if info.dtype is None else ():
            shown = run.get(name)
            if shown is not None and shown.shape is not None:
                return TensorInfo(name, shown.dtype, (None,) * len(shown.shape))
        return info

    # Exporting

    def to_proto(self) -> ModelProto:
        """The model as a proto of its own; external references stay references."""
        return export.model(self)

    def extract(self, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
        """A model of the nodes between, complete with the weights they need (external ones brought in).

        Its inputs are declared with what `shapes()` knows, so dynamic dimensions stay dynamic; the type of
        a tensor that only a run has shown counts, its sizes don't.

        Args:
            inputs: names of tensors that become the graph inputs.
            outputs: names of tensors that become the graph outputs.

        Raises:
            KeyError: no tensor of that name.
            InputError: an output depends on something else, or the type of an input is unknown.
        """
        return export.between(self, inputs, outputs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model atomically: the file appears whole or not at all.

        External references keep pointing to the same file if it lies in the target's folder, else their
        data is copied, range by range, into `OUT.data` beside it. Edited tensors stay where they were,
        inline or external; a model that would pass 2 GB gets its initializers moved to `OUT.data` too.

        Raises:
            InputError: the target is the input or one of its data files (through links, too), or can't be
                written.
        """
        source = self.folder / self.path.name if self.folder and self.path else None
        saving.save(Path(path), export.shell(self), export.weights(self), self.folder, source)


def _same_arrays(a: Feed, b: Feed) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


class _without_collector:
    """Python's cyclic collector off: it would scan a growing graph of live objects again and again."""

    def __enter__(self) -> None:
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_on:
            gc.enable()


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _native(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order, as a read-only view."""
    array = np.asarray(array)
    return _read_only(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
