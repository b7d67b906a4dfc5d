"""Edits of a graph: nodes and weights that come, change and go.

Whatever an edit leaves alone is exported from the original proto, so doc strings, metadata_props, subgraphs,
functions, quantization annotations, external data references and order survive every rewrite that does not
concern them. Names are identity, and every new node says which pass made it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto

from onnxfuse.ir import protos
from onnxfuse.ir.graph import Graph, read_only
from onnxfuse.ir.nodes import Constant, Node, Tensor, Variable
from onnxfuse.ir.protos import DEFAULT_DOMAINS

# metadata_props of a new node: the pass that made it, and a JSON list of the nodes it stands for.
PASS_KEY = "onnxfuse.pass"
REPLACES_KEY = "onnxfuse.replaces"


class EditableGraph(Graph):
    """A graph and the ways to edit it.

    Nodes are edited through their lists and dicts (`node.inputs[1] = tensor`, `node.attrs["axis"] = 1`) and
    through the methods here. A graph input, a graph output and a tensor that a body captures must keep
    their names.
    """

    def set_note(self, key: str, text: str) -> None:
        """Replaces or adds an entry of the model's metadata_props."""
        self._notes[key] = text

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
        """Replaces a subgraph of a node; what it captures from outside is noted anew.

        Args:
            node: the node.
            key: the attribute that holds the subgraph.
            body: the new one.
        """
        self._forget_captures(node)
        node.attrs[key] = body
        self._names.update(protos.inner_names(body))
        self._note_captures(node)
        self._sorted = False

    def _forget_captures(self, node: Node) -> None:
        for name in node.captured:
            self._captures.get(name, {}).pop(node, None)

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


def _native(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order, as a read-only view."""
    array = np.asarray(array)
    return read_only(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
