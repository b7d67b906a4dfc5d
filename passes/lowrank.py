"""One layer as two thin ones: weights of low rank (APPROXIMATE).

y = W x + b becomes y = A (B x) + b': a convolution of r outputs and one of size 1 behind it, two Gemm or two
MatMul. That is smaller, and fewer multiply-accumulates, where r (columns + outputs) < columns * outputs. How
W is split, and how a budget is spread over all operators, is told in `onnxfuse.numerics.low_rank`; how the
two are put in, in `onnxfuse.fitting.factoring`; `onnxfuse.fitting.walk` then makes up for what is lost in the
layers behind.

An operator that was split before counts as the whole that it was: a budget is a share of what the model has
without factors, and a second run takes more ranks from the pair that is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from onnxfuse.channels.consumers import RowView
from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.findings import Change, Reached, Skip
from onnxfuse.fitting.factoring import Product, find_products, measured, put_factors, rank_costs
from onnxfuse.fitting.rewriting import (
    OperatorOptions,
    finished,
    first_feed,
    linear_ops,
    named,
    nothing,
    rewrite_change,
    seen_in_parts,
    settled,
    unmeasurable,
    walked,
    within_bound,
)
from onnxfuse.fitting.search import SearchResult
from onnxfuse.fitting.sites import check_mask
from onnxfuse.fitting.walk import Solved
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.numerics.affine import Array
from onnxfuse.numerics.low_rank import Basis, allocate, randomized, reduced_rank, truncated
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.ops.linear_weights import write_weights
from onnxfuse.ops.shared_weights import producer
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.goals import Share, left_of_all
from onnxfuse.runtime.observed_shapes import shapes_on

PARAMETER_LEVELS = tuple(level / 100 for level in range(95, 9, -5))
"""Shares of the parameters that are tried where only the error bound says how far to go."""

BUDGET_ATTEMPTS = 4
"""Biases that a refit adds may break a tight budget: so often ranks are chosen that leave room for them."""


def _rank(goal: int | float, share: float, done: float) -> float | None:
    """A share of the full rank on its way; a rank that is a number has no way there."""
    return None if isinstance(goal, int) else left_of_all(goal, share, done)


class LowrankOptions(OperatorOptions):
    """Options of `lowrank`."""

    goals: ClassVar = {"params": left_of_all, "macs": left_of_all, "rank": _rank}

    params: Share | None = Field(
        None,
        description="share of the parameters that may be left, of those that the model has unfactored; "
        "without params, macs and rank: as few as the error bound allows",
    )
    macs: Share | None = Field(None, description="the same share of the multiply-accumulates")
    rank: PositiveInt | Share | None = Field(
        None, description="rank of every operator, or its share of the full rank"
    )
    method: Literal["svd", "randomised", "data"] = Field(
        "data",
        description="least error of the weights (svd; randomised: nearly so, and fast for large ones) or of "
        "the outputs on the samples (data)",
    )


@dataclass(frozen=True)
class _Split:
    """A product, and the best factors for it.

    Attributes:
        product: the operator, or the pair.
        basis: directions of its outputs.
        mean: W mean x (out,), where the inputs' mean is known.
    """

    product: Product
    basis: Basis
    mean: Array | None

    @property
    def lost(self) -> Array:
        """The share (ranks + 1,) of energy that is lost at each rank. A pair has nothing beyond its rank to
        lose."""
        lost, rank = self.basis.lost(), self.product.rank
        return lost if rank is None else np.minimum(lost, 1.0)[: rank + 1]

    def bias(self, rank: int) -> Array:
        """The bias (out,); it makes up for what the factors lose of the inputs' mean where that is known."""
        if self.mean is None:
            return self.product.bias()
        directions = self.basis.directions[:, :rank]
        return self.product.bias() + self.mean - directions @ (directions.T @ self.mean)


class Lowrank(Pass):
    """Two thin layers in place of one."""

    name = "lowrank"
    contract = Contract.APPROXIMATE
    summary = "split layers into two of low rank, best for the weights or for the outputs"
    Options = LowrankOptions
    options: LowrankOptions
    example: ClassVar[str] = "lowrank:params=0.5"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite,
        VerificationError for a budget that can't be met."""
        check_mask(model, self.options.mask)
        products, skipped = self._products(model, context)
        if not products:
            where = named(self.options.only)
            return nothing(model, skipped, f"no operator of this model{where} can be split")
        splits = list(self._splits(model, products, context))
        if self.options.rank is not None:
            found = self._at_rank(model, splits, self.options.rank, context)
        elif self.options.params is not None or self.options.macs is not None:
            found = self._within_budget(model, splits, context)
        else:
            found = self._within_error(model, splits, context)
        return finished(model, found, skipped, "no operator gets smaller")

    # Which operators

    def _products(self, model: Model, context: Context) -> tuple[list[Product], list[Skip]]:
        """The products that may be split, and those that may not."""
        only = self.options.only
        ops, skipped = linear_ops(model, "*", shapes_on(model, first_feed(context), context.runtime))
        skipped = [skip for skip in skipped if fnmatchcase(skip.nodes[0], only)]
        trial = model.copy()
        nodes: dict[Node, Product] = {}
        for product in find_products(model, ops, self.name):
            if not any(fnmatchcase(name, only) for name in (product.name, *product.names)):
                continue
            if reason := product.obstacle(model):
                skipped.append(Skip((product.name,), reason))
            else:
                left, right = np.zeros((product.last.out_features, 1)), np.zeros((1, product.first.columns))
                nodes[put_factors(trial, product, left, right, self.name)] = product
        refused = unmeasurable(model, trial, nodes, context)
        skipped += [Skip((nodes[node].name,), reason) for node, reason in refused.items()]
        return [product for node, product in nodes.items() if node not in refused], skipped

    # What is lost at which rank

    def _splits(self, model: Model, products: Sequence[Product], context: Context) -> Iterator[_Split]:
        """The products with the best factors of each by the method."""
        if self.options.method != "data":
            for number, product in enumerate(products):
                weight = product.weight()
                if self.options.method == "svd":
                    basis = truncated(weight)
                else:
                    basis = randomized(weight, product.most, context.seed + number)
                yield _Split(product, basis, None)
            return
        shapes = shapes_on(model, first_feed(context), context.runtime)
        views = {product: _view(product.last, shapes) for product in products}
        readers = {product: [view] for product, view in views.items()}
        for part, known in seen_in_parts(model, readers, self.options.mask, context):
            for product in part:
                seen = known.every[views[product]]
                if not np.isfinite(seen.covariance).all():
                    raise NotApplicableError(f"'{views[product].tensor}' is not finite on the samples")
                basis = reduced_rank(product.weight(), seen.covariance)
                yield _Split(product, basis, seen.mean - product.bias())

    # How far

    def _at_rank(
        self, model: Model, splits: Sequence[_Split], asked: int | float, context: Context
    ) -> SearchResult:
        """Every product at this rank, or at this share of its full rank."""
        ranks: list[int | None] = []
        left = []
        for product in (split.product for split in splits):
            rank = asked if isinstance(asked, int) else max(1, round(asked * product.full))
            ranks.append(rank if rank <= product.most else None)
            if rank > product.most:
                reason = f"rank {rank} would not make it smaller: at most {product.most} does"
                left.append(Skip((product.name,), reason))
        made = self._factored(model, splits, ranks, context)
        return SearchResult(replace(made, skipped=left + made.skipped))

    def _within_budget(self, model: Model, splits: Sequence[_Split], context: Context) -> SearchResult:
        """A share of the parameters or of the MACs."""
        what = "parameters" if self.options.params is not None else "MACs"
        share = self.options.params if self.options.params is not None else self.options.macs
        assert share is not None
        costs = rank_costs(model, [split.product for split in splits], context, what, self.name)
        name = "params" if what == "parameters" else "macs"

        def told(rest: float, already: str = "") -> tuple[list[str], Reached]:
            left = rest / costs.unfactored
            note = f"{left:.3g} of the {what} are left{already}, {share:g} asked"
            return [note], Reached(name, what, False, share, left)

        goal = share * costs.unfactored
        if costs.now <= goal:
            notes, reached = told(costs.now, " already")
            return SearchResult(None, notes, reached=reached)
        biases = 0.0
        for _ in range(BUDGET_ATTEMPTS):
            saving = costs.now - goal + biases
            ranks = allocate([split.lost for split in splits], costs.unit, costs.full, saving)
            if ranks is None:
                break
            made = self._factored(model, splits, ranks, context)
            rest = measured(made.model, context, what)
            if rest <= goal:
                notes, reached = told(rest)
                return SearchResult(made, notes, reached=reached)
            biases = rest - (costs.now - costs.saved(ranks))
        raise VerificationError(
            f"{share:g} of the {what} can't be met: rank 1 throughout leaves "
            f"{costs.least / costs.unfactored:.3g}"
        )

    def _within_error(self, model: Model, splits: Sequence[_Split], context: Context) -> SearchResult:
        """The model with as few parameters as the bound on the output error allows."""
        products = [split.product for split in splits]
        costs = rank_costs(model, products, context, "parameters", self.name)
        lost = [split.lost for split in splits]
        plans = {}
        for level in PARAMETER_LEVELS:
            saving = costs.now - level * costs.unfactored
            plan = allocate(lost, costs.unit, costs.full, saving)
            if saving > 0 and plan is not None:
                plans[level] = plan
        if not plans:
            return SearchResult(None, ["no rank below those that are there makes the model smaller by much"])
        return within_bound(
            list(plans),
            lambda level: self._factored(model, splits, plans[level], context),
            context,
            self.options,
            lambda level: f"{level:g} of the parameters",
        )

    # Making it

    def _factored(
        self, model: Model, splits: Sequence[_Split], ranks: Sequence[int | None], context: Context
    ) -> PassResult:
        """The model with products at these ranks, None for those that stay as they are."""
        made = model.copy()
        chosen = {}
        for split, rank in zip(splits, ranks, strict=True):
            if rank is not None:
                factors = split.basis.factors(split.product.weight(), rank)
                chosen[put_factors(made, split.product, *factors, self.name)] = split, rank
        if not chosen:
            return PassResult(made)
        made.prune()
        shapes = shapes_on(made, first_feed(context), context.runtime)
        for node, (split, rank) in chosen.items():
            op = linear_op(made, node, shapes)
            assert isinstance(op, LinearOp)
            write_weights(made, op, None, split.bias(rank), by=self.name)
        solved, skipped = walked(
            model, made, context, mask=self.options.mask, refit=self.options.refit, fixed=chosen
        )
        inner = {producer(made, node.inputs[0].name).name for node in chosen}
        skipped = [skip for skip in skipped if skip.nodes[0] not in inner]
        changes = [
            _change(split, rank, node, solved, self.options.method) for node, (split, rank) in chosen.items()
        ]
        return settled(made, changes, solved, skipped, own=chosen)


def _view(op: LinearOp, shapes: Mapping[str, TensorInfo]) -> RowView:
    """Rows of what an operator gives."""
    shape = shapes[op.y].shape
    assert shape is not None
    axis = 1 if op.kind == "conv" else len(shape) - 1
    return RowView(op.y, axis, op.out_features, token=op.kind == "token")


def _change(split: _Split, rank: int, node: Node, solved: Sequence[Solved], method: str) -> Change:
    """The report's line for one product."""
    product = split.product
    before = "" if product.rank is None else f", {product.rank} before"
    return rewrite_change(
        product.names,
        f"'{product.name}' in two, of rank {rank} (of {product.full}{before})",
        [node],
        solved,
        operator=product.name,
        rank=rank,
        rank_before=product.rank,
        weights=rank * product.unit,
        weights_before=product.size,
        energy_lost=float(split.lost[rank]),
        method=method,
    )
