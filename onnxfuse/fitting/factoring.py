"""Linear operators as products of two: which are there, what their ranks cost, and how they are put in.

y = W x + b becomes y = A (B x) + b: a convolution and one of size 1 behind it, two Gemm or two MatMul. What
was split before counts as the whole that it was, and gets other factors in the same two operators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxfuse.analysis.cost import measure, node_macs, shapes_at
from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting.rewriting import first_feed, linear_ops
from onnxfuse.ir.editing import PASS_KEY, REPLACES_KEY
from onnxfuse.ir.marks import KEPT_KEY
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.numerics.affine import Array
from onnxfuse.ops.layouts import is_shared
from onnxfuse.ops.linear import LinearOp, optional_input
from onnxfuse.ops.linear_building import add_linear, laid_out
from onnxfuse.ops.shared_weights import producer
from onnxfuse.pipeline.base import Context


@dataclass(frozen=True, eq=False)
class Product:
    """y = W x + b, by one operator, or by two that an earlier run made of it.

    Attributes:
        first: the operator that reads x.
        last: the one that gives y; of a whole one the same.
        name: the name that it had as a whole.
    """

    first: LinearOp
    last: LinearOp
    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its operators."""
        return tuple(dict.fromkeys((self.first.name, self.last.name)))

    @property
    def rank(self) -> int | None:
        """Rank of the pair; None for a whole one."""
        return None if self.last is self.first else self.first.out_features

    @property
    def full(self) -> int:
        """Rank that a matrix of W's shape can have."""
        return min(self.first.columns, self.last.out_features)

    @property
    def unit(self) -> int:
        """Parameters of a rank."""
        return self.first.columns + self.last.out_features

    @property
    def whole(self) -> int:
        """Elements of W."""
        return self.first.columns * self.last.out_features

    @property
    def size(self) -> int:
        """Weights that it has now."""
        return self.whole if self.rank is None else self.rank * self.unit

    @property
    def most(self) -> int:
        """The largest rank that saves anything; 0 if none does."""
        return (self.size - 1) // self.unit

    def weight(self) -> Array:
        """W (out, columns)."""
        return self.last.weight if self.rank is None else self.last.weight @ self.first.weight

    def bias(self) -> Array:
        """b (out,)."""
        own = self.last.bias
        return own if self.rank is None else own + self.last.weight @ self.first.bias

    def obstacle(self, model: Model) -> str | None:
        """The reason why it can't be split, or None."""
        for op in dict.fromkeys((self.first, self.last)):
            if op.groups > 1:
                return f"it has {op.groups} groups"
            if is_shared(model, op.weight_input, op.node):
                return "its weight has other users"
        if self.most < 1:
            return f"{self.size} weights: even rank 1 would not make it smaller"
        return None


def find_products(model: Model, ops: Sequence[LinearOp], by: str) -> list[Product]:
    """Linear operators of a model as products; a pair that was split before is one.

    Args:
        model: of the operators.
        ops: linear operators, in the order of the graph.
        by: name of the pass that makes pairs.
    """
    by_node = {op.node: op for op in ops}
    pairs: dict[Node, Node] = {}
    for op in ops:
        before = model.producer(op.node.inputs[0])
        if before is not None and before in by_node and _is_pair(model, before, op, by):
            pairs[op.node] = before
    inner = set(pairs.values())
    found = []
    for op in ops:
        if op.node in pairs:
            names = json.loads(op.node.metadata.get(REPLACES_KEY, "[]"))
            found.append(Product(by_node[pairs[op.node]], op, names[0] if names else op.name))
        elif op.node not in inner:
            found.append(Product(op, op, op.name))
    return found


def _is_pair(model: Model, first: Node, last: LinearOp, by: str) -> bool:
    made = first.metadata.get(PASS_KEY) == last.node.metadata.get(PASS_KEY) == by
    middle = first.outputs[0]
    alone = model.consumers(middle) == [last.node] and not model.is_output(middle)
    return made and alone and first.op == last.node.op and math.prod(last.kernel) == 1 and last.groups == 1


def put_factors(model: Model, product: Product, left: Array, right: Array, by: str) -> Node:
    """Let left (out, r) times right (r, columns) take the place of W; returns the node that gives y. The bias
    stays.

    Args:
        model: may be a copy of the one the product was found in.
        product: the operator or pair.
        left: A.
        right: B.
        by: name of the pass.
    """
    last = producer(model, product.last.node.outputs[0].name)
    if product.rank is not None:
        first = producer(model, product.first.node.outputs[0].name)
        for node, op, matrix in ((first, product.first, right), (last, product.last, left)):
            node.attrs.pop("alpha", None)
            node.metadata.pop(KEPT_KEY, None)
            transposed = bool(node.attrs.get("transB", 0))
            stored = laid_out(node.op, matrix.astype(op.dtype), op.kernel, transposed=transposed)
            model.set_weight(node.inputs[1], stored)
        if len(first.inputs) > 2:  # its bias has become part of the whole's
            first.inputs.pop()
        return last
    op, name = product.first, product.name
    x, y, own = last.inputs[0], last.outputs[0], optional_input(last, 2)
    behind = {key: value for key, value in last.attrs.items() if key != "alpha"}
    front = {key: value for key, value in behind.items() if key != "beta"}
    ones = [1] * len(op.kernel)
    if last.op == "Conv":
        behind = {"kernel_shape": ones}
    model.remove([last])
    left, right = left.astype(op.dtype), right.astype(op.dtype)
    down, up = f"{name}_down", f"{name}_up"
    inner = add_linear(
        model, last.op, x, right, None, down, down, kernel=op.kernel, attrs=front, by=by, replaces=[name]
    )
    return add_linear(
        model, last.op, inner.outputs[0], left, own, y, up, kernel=ones, attrs=behind, by=by, replaces=[name]
    )


@dataclass(frozen=True)
class RankCosts:
    """Costs of ranks, in parameters or multiply-accumulates.

    Attributes:
        now: of the model as it is.
        unfactored: of the model without factors.
        unit: for each product that of a rank.
        full: for each product that of what it is now.
        least: the least that can be left.
    """

    now: float
    unfactored: float
    unit: list[float]
    full: list[float]
    least: float

    def saved(self, ranks: Sequence[int | None]) -> float:
        """The cost that is saved at these ranks, None for products that stay, without what a refit adds."""
        own = zip(self.full, self.unit, ranks, strict=True)
        return sum(full - unit * rank for full, unit, rank in own if rank is not None)


def rank_costs(model: Model, products: Sequence[Product], context: Context, what: str, by: str) -> RankCosts:
    """The costs of some products of a model, at the sizes of the first fit samples.

    Args:
        model: of the products.
        products: those that ranks are chosen for.
        context: of the pass.
        what: "parameters" or "MACs".
        by: see `find_products`.

    Raises:
        NotApplicableError: the MACs can't be counted.
    """
    now = measured(model, context, what)
    shapes = shapes_at(model, first_feed(context), context.runtime)
    every = {p.last.node: p for p in find_products(model, linear_ops(model, "*", shapes)[0], by)}
    times: dict[Node, float] = {}
    for node, product in every.items():
        times[node] = 1.0
        if what == "MACs":
            count = node_macs([product.first.node], shapes, model.opset) or 0
            times[node] = count / (product.first.columns * product.first.out_features)
    unfactored = now + sum((own.whole - own.size) * times[node] for node, own in every.items())
    pairs = [(product, times[product.last.node]) for product in products]
    unit, full = [own.unit * n for own, n in pairs], [own.size * n for own, n in pairs]
    saved = sum(max(0.0, (own.size - own.unit) * n) for own, n in pairs)
    return RankCosts(now, unfactored, unit, full, now - saved)


def measured(model: Model, context: Context, what: str) -> float:
    """The number of parameters or multiply-accumulates.

    Args:
        model: is left as it is.
        context: of the pass.
        what: "parameters" or "MACs".

    Raises:
        NotApplicableError: the MACs can't be counted.
    """
    cost = measure(model, first_feed(context), context.runtime)
    if what == "parameters":
        return cost.parameters
    if cost.macs is None:
        raise NotApplicableError(f"a share of the MACs needs their number: {cost.macs_reason}")
    return cost.macs
