"""The graph of a model as the search for regions walks it: by numbers, in topological order."""

from __future__ import annotations

from onnxfuse.analysis.regions.facts import GraphFacts
from onnxfuse.analysis.regions.view import DataView
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.linear import LINEAR_OPERATORS, is_main_domain

_CONTRACTING = LINEAR_OPERATORS | {"Einsum"}


class IndexedGraph:
    """A graph whose nodes are numbered in topological order, with what its analysis asks of it.

    Attributes:
        facts: what is known of its tensors.
        nodes: in topological order.
        index: the place of each node in `nodes`.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: Model, shapes: dict[str, TensorInfo]) -> None:
        self.model = model
        self.facts = GraphFacts(model, shapes, shapes if _fixed_inputs(model) else model.shapes())
        self.nodes = list(model.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self._readers: dict[Tensor, list[int]] = {}
        self.outputs = {t.name for t in model.outputs}

    def readers(self, tensor: Tensor) -> list[int]:
        """Indices of the nodes that use the tensor, those whose bodies capture it included."""
        found = self._readers.get(tensor)
        if found is None:
            found = [self.index[n] for n in self.model.consumers(tensor)]
            self._readers[tensor] = found
        return found

    def is_linear(self, node: Node) -> bool:
        """Whether it multiplies data by constant weights."""
        if node.op not in _CONTRACTING or not is_main_domain(node) or len(node.inputs) < 2:
            return False
        return self.facts.is_constant(node.inputs[1]) and not self.facts.is_data_free(node.inputs[0])

    def rank(self, tensor: Tensor) -> int | None:
        shape = self.facts.shape(tensor)
        return None if shape is None else len(shape)


def natural_view(node: Node) -> DataView:
    """The view of its data that a linear operator takes."""
    return DataView.MAP if node.op == "Conv" else DataView.TOKEN


def _fixed_inputs(model: Model) -> bool:
    """Whether only the batch axis varies: then any other size seen in a run is a fixed one."""
    return all(
        info.shape is not None and all(isinstance(d, int) for d in info.shape[1:]) for info in model.inputs
    )
