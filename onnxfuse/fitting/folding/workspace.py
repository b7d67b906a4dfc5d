"""A graph that is being folded: what rules ask of it, and the edits that they make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from onnxfuse.analysis.constant_folding import GROWTH, overridable
from onnxfuse.findings import Json, Skip
from onnxfuse.ir.editing import PASS_KEY, REPLACES_KEY
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.layouts import is_shared
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.ops.linear_weights import write_weights


@dataclass(frozen=True)
class Edit:
    """One decided rewrite, and how to make it.

    Attributes:
        nodes: names of the nodes it concerns, for the report.
        what: the rewrite in words.
        make: edits the graph; returns the nodes around which there may be more to do.
        detail: figures for the report.
    """

    nodes: tuple[str, ...]
    what: str
    make: Callable[[], Iterable[Node]]
    detail: Mapping[str, Json] = field(default_factory=dict)


class Workspace:
    """A graph with what is known of its tensors, and how much larger folding has made the file.

    Attributes:
        model: the graph, edited in place.
        shapes: types and shapes of its tensors by name.
        overridden: names of folded weights that are graph inputs, too, in the order of their folding.
        growth: bytes by which weights have grown.
    """

    def __init__(self, model: Model, by: str) -> None:
        """`by` is the name of the pass, noted in the nodes it rewrites."""
        self.model = model
        self.shapes: dict[str, TensorInfo] = {}
        self.overridden: dict[str, None] = {}
        self.growth = 0
        self._by = by

    # Looking

    def shape(self, tensor: Tensor) -> tuple[int | str | None, ...] | None:
        """The shape of a tensor, None where not even the rank is known."""
        info = self.shapes.get(tensor.name)
        return None if info is None else info.shape

    def rank(self, tensor: Tensor) -> int | None:
        """The number of axes of a tensor, None where it is not known."""
        shape = self.shape(tensor)
        return None if shape is None else len(shape)

    def pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor must go on existing under its name: a graph output, or seen by a subgraph."""
        return self.model.is_output(tensor) or self.model.captured(tensor)

    def only_user(self, tensor: Tensor) -> Node | None:
        """The one node that sees the tensor, through one of its inputs; None if there are other uses."""
        return None if self.pinned(tensor) or len(tensor.outputs) != 1 else tensor.outputs[0]

    def linear_before(self, tensor: Tensor, user: Node) -> LinearOp | str:
        """The linear operator that computes `tensor`, as `user` sees it; or why there is none."""
        node = self.model.producer(tensor)
        if node is None:
            return f"'{tensor.name}' is not computed by a linear operator"
        op = linear_op(self.model, node, self.shapes, transposed=True)
        if isinstance(op, LinearOp):
            return replace(op, bias_node=None) if op.bias_node is user else op
        if node.op == "Add":
            for operand in node.inputs:
                source = self.model.producer(operand)
                if source is None:
                    continue
                biased = linear_op(self.model, source, self.shapes, transposed=True)
                if isinstance(biased, LinearOp) and biased.bias_node is node:
                    return biased
        return op

    # Editing

    def read_instead(self, old: Tensor, new: Tensor) -> list[Node]:
        """Let every node that reads `old` read `new`; returns those nodes."""
        users = list(dict.fromkeys(old.outputs))
        for user in users:
            for index, tensor in enumerate(user.inputs):
                if tensor is old:
                    user.inputs[index] = new
        return users

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Remove the nodes whose outputs have no use any more, upwards from `tensors`."""
        stack = list(tensors)
        while stack:
            node = self.model.producer(stack.pop())
            if node is None or any(t.outputs or self.pinned(t) for t in node.outputs):
                continue
            stack.extend(t for t in node.inputs if t.name)
            self.model.remove([node])

    def store(self, op: LinearOp, weight: np.ndarray | None, bias: np.ndarray | None, cost: int) -> None:
        """Write new weights.

        Args:
            op: their operator.
            weight: see `write_weights`; None: as it is.
            bias: None: as it is.
            cost: bytes by which they make the file larger.
        """
        self.growth += cost
        self.overriding(t for t in (op.weight_tensor, op.own_bias, op.added_bias) if t is not None)
        write_weights(self.model, op, weight, bias, by=self._by)

    def copy_cost(self, op: LinearOp) -> int:
        """Bytes that new weights for `op` take besides the old ones: all, where those have other users."""
        shared = is_shared(self.model, op.weight_input, op.node)
        return op.out_features * op.columns * op.dtype.itemsize if shared else 0

    def beyond_budget(self, cost: int) -> str | None:
        """The reason why the file may not grow by that many bytes more; None if it may."""
        if cost <= 0 or self.growth + cost <= GROWTH:
            return None
        return f"the weights are shared with other operators, and a copy would take {cost / 1e6:.1f} MB"

    def overriding(self, tensors: Iterable[Tensor]) -> None:
        """Remember which of these weights, now folded, a user could have fed."""
        self.overridden.update(dict.fromkeys(t.name for t in tensors if overridable(self.model, t)))

    def mark(self, node: Node, replaced: Iterable[str]) -> None:
        """Note in the node's metadata that the pass made it stand for the nodes named `replaced` as well."""
        names = json.loads(node.metadata.get(REPLACES_KEY, "[]"))
        node.metadata[PASS_KEY] = self._by
        node.metadata[REPLACES_KEY] = json.dumps(list(dict.fromkeys([*names, *replaced])))


Decision: TypeAlias = Edit | Skip | None
Rule: TypeAlias = Callable[[Workspace, Node], Decision]


def refuse(node: Node, reason: str) -> Skip:
    """The refusal of a rule at one node."""
    return Skip((node.site_name,), reason)
