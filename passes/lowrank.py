"""One layer as two thin ones: weights of low rank (APPROXIMATE).

y = W x + b becomes y = A (B x) + b': a convolution of r outputs and one of size 1 behind it, two Gemm or two
MatMul. That is smaller, and fewer multiply-accumulates, where r (columns + outputs) < columns * outputs. How
W is split, and how a budget is spread over all operators, is told in `onnxfuse.factors`; `onnxfuse.walk` then
makes up for what is lost in the layers behind.

An operator that was split before counts as the whole that it was: a budget is a share of what the model has
without factors, and a second run takes more ranks from the pair that is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from onnxfuse.channels.consumers import View
from onnxfuse.channels.importance import Statistics, statistics
from onnxfuse.cost import measure, node_macs, shapes_at
from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.factors import Basis, allocate, randomised, reduced_rank, truncated
from onnxfuse.findings import Change, Skip
from onnxfuse.graph import PASS_KEY, REPLACES_KEY, Model, Node
from onnxfuse.linear import LinearOp, is_shared, linear_op, optional_input, write_weights
from onnxfuse.marks import KEPT_KEY
from onnxfuse.numerics.affine import Array
from onnxfuse.pass_manager import Context, Contract, Pass, PassResult
from onnxfuse.rewriting import (
    OperatorOptions,
    Rewritten,
    linear_ops,
    producer,
    result,
    rewrite_change,
    unmeasurable,
    walked,
    within_bound,
)
from onnxfuse.shapes import TensorInfo
from onnxfuse.walk import Solved, check_mask

MEMORY = 1 << 30
"""Bytes of covariances that are kept at a time; a single operator may take more."""

LEVELS = tuple(level / 100 for level in range(95, 9, -5))
"""Shares of the parameters that are tried where only the error bound says how far to go."""

ATTEMPTS = 4
"""Biases that a refit adds may break a tight budget: it is then tightened by as much, so often."""

Share = Annotated[float, Field(gt=0, lt=1)]


class LowrankOptions(OperatorOptions):
    """Options of `lowrank`."""

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

    @model_validator(mode="after")
    def _one_goal(self) -> LowrankOptions:
        given = [name for name in ("params", "macs", "rank") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of params, macs and rank, not {' and '.join(given)}")
        return self


@dataclass(frozen=True, eq=False)
class _Layer:
    """y = W x + b, by one operator, or by two that an earlier run made of it.

    Attributes:
        first: the operator that reads x.
        last: the one that gives y; of a whole one the same.
        name: that it had as a whole.
    """

    first: LinearOp
    last: LinearOp
    name: str

    @property
    def names(self) -> set[str]:
        """By which a user may mean it."""
        return {self.name, self.first.name, self.last.name}

    @property
    def rank(self) -> int | None:
        """Of the pair; None for a whole one."""
        return None if self.last is self.first else self.first.out_features

    @property
    def unit(self) -> int:
        """Parameters of a rank."""
        return self.first.columns + self.last.out_features

    @property
    def whole(self) -> int:
        """Weights of W."""
        return self.first.columns * self.last.out_features

    @property
    def size(self) -> int:
        """Weights that it has now."""
        return self.whole if self.rank is None else self.rank * self.unit

    @property
    def most(self) -> int:
        """The largest rank that saves anything; 0 if none does."""
        return (self.size - 1) // self.unit

    @property
    def output(self) -> str:
        """What its last node computes, by which it is found in a copy of the model."""
        return str(self.last.node.outputs[0].name)

    def weight(self) -> Array:
        """W (out, columns)."""
        return self.last.weight if self.rank is None else self.last.weight @ self.first.weight

    def bias(self) -> Array:
        """(out,)."""
        own = self.last.bias
        return own if self.rank is None else own + self.last.weight @ self.first.bias


@dataclass(frozen=True)
class _Split:
    """A layer with what is known of it: directions, what is lost at each rank, and W mean x (out,)."""

    layer: _Layer
    basis: Basis
    lost: Array
    mean: Array | None

    def factors(self, rank: int) -> tuple[Array, Array]:
        """See `Basis.factors`."""
        return self.basis.factors(self.layer.weight(), rank)

    def bias(self, rank: int) -> Array:
        """(out,): with what the factors make of the inputs' mean made up for, where that is known."""
        if self.mean is None:
            return self.layer.bias()
        directions = self.basis.directions[:, :rank]
        return self.layer.bias() + self.mean - directions @ (directions.T @ self.mean)


class Lowrank(Pass):
    """Two thin layers in place of one."""

    name = "lowrank"
    contract = Contract.APPROXIMATE
    summary = "split layers into two of low rank, best for the weights or for the outputs"
    Options = LowrankOptions
    options: LowrankOptions
    example: ClassVar[str] = "lowrank:params=0.5"

    def partly(self, share: float, done: float = 0.0) -> Lowrank | None:
        """See `Pass.partly`. A rank that is a number has no way there."""
        goals = {"params": self.options.params, "macs": self.options.macs, "rank": self.options.rank}
        name, goal = next(((name, goal) for name, goal in goals.items() if goal is not None), ("", None))
        if goal is None or isinstance(goal, int) or share <= 0:
            return None
        return self._with(**{name: 1 - share * (1 - goal)})

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite,
        VerificationError for a budget that can't be met."""
        check_mask(model, self.options.mask)
        feed = next(iter(context.calibration.fit)).feed
        layers, skipped = self._layers(model, context, model.shapes(feed))
        if not layers:
            where = "" if self.options.only == "*" else f" with a name matching '{self.options.only}'"
            return PassResult(
                model, skipped=skipped, notes=[f"no operator of this model{where} can be split"]
            )
        splits = list(self._splits(model, layers, context))
        if self.options.rank is not None:
            made, left, notes = self._at_rank(model, splits, self.options.rank, context)
            skipped += left
        elif self.options.params is not None or self.options.macs is not None:
            made, notes = self._within_budget(model, splits, context)
        else:
            made, notes = self._within_error(model, splits, context)
        if made is None or not made.changes:
            return PassResult(model, skipped=skipped, notes=notes or ["no operator gets smaller"])
        return result(made, skipped, notes)

    # Which operators

    def _layers(
        self, model: Model, context: Context, shapes: Mapping[str, TensorInfo]
    ) -> tuple[list[_Layer], list[Skip]]:
        ops, skipped = linear_ops(model, "*", shapes)
        skipped = [skip for skip in skipped if fnmatchcase(skip.nodes[0], self.options.only)]
        layers = []
        for layer in _found(model, ops):
            if not any(fnmatchcase(name, self.options.only) for name in layer.names):
                continue
            reason = _refusal(model, layer)
            if reason is None:
                layers.append(layer)
            else:
                skipped.append(Skip((layer.name,), reason))
        trial = model.copy()
        for layer in layers:
            _replace(trial, layer, np.zeros((layer.last.out_features, 1)), np.zeros((1, layer.first.columns)))
        refused = unmeasurable(model, trial, [layer.output for layer in layers], context)
        skipped += [Skip((layer.name,), refused[layer.output]) for layer in layers if layer.output in refused]
        return [layer for layer in layers if layer.output not in refused], skipped

    # What is lost at which rank

    def _splits(self, model: Model, layers: Sequence[_Layer], context: Context) -> Iterator[_Split]:
        if self.options.method != "data":
            for number, layer in enumerate(layers):
                weight = layer.weight()
                if self.options.method == "svd":
                    basis = truncated(weight)
                else:
                    basis = randomised(weight, layer.most, context.seed + number)
                yield _Split(layer, basis, _losses(layer, basis), None)
            return
        feed = next(iter(context.calibration.fit)).feed
        shapes = model.shapes(feed)
        for part in _affordable(layers):
            views = {layer: _view(layer, shapes) for layer in part}
            known = statistics(
                model,
                views.values(),
                context.calibration.fit,
                context.runtime,
                seed=context.seed,
                mask=self.options.mask,
                progress=context.progress,
            )
            for layer, view in views.items():
                seen: Statistics = known[view]
                if not np.isfinite(seen.covariance).all():
                    raise NotApplicableError(f"'{view.tensor}' is not finite on the samples")
                basis = reduced_rank(layer.weight(), seen.covariance)
                yield _Split(layer, basis, _losses(layer, basis), seen.mean - layer.bias())

    # How far

    def _at_rank(
        self, model: Model, splits: Sequence[_Split], asked: int | float, context: Context
    ) -> tuple[Rewritten | None, list[Skip], list[str]]:
        ranks: list[int | None] = []
        skipped = []
        for split in splits:
            layer = split.layer
            full = min(layer.first.columns, layer.last.out_features)
            rank = asked if isinstance(asked, int) else max(1, round(asked * full))
            ranks.append(rank if rank <= layer.most else None)
            if rank > layer.most:
                reason = f"rank {rank} would not make it smaller: at most {layer.most} does"
                skipped.append(Skip((layer.name,), reason))
        return self._made(model, splits, ranks, context), skipped, []

    def _within_budget(
        self, model: Model, splits: Sequence[_Split], context: Context
    ) -> tuple[Rewritten | None, list[str]]:
        what = "parameters" if self.options.params is not None else "MACs"
        share = self.options.params if self.options.params is not None else self.options.macs
        assert share is not None
        feed = next(iter(context.calibration.fit)).feed
        costs = _Costs.of(model, splits, feed, what)
        goal = share * costs.unfactored
        saving = costs.now - goal
        if saving <= 0:
            return None, [f"{costs.now / costs.unfactored:.3g} of the {what} are left already"]
        for _ in range(ATTEMPTS):
            ranks = allocate([split.lost for split in splits], costs.unit, costs.full, saving)
            if ranks is None:
                break
            made = self._made(model, splits, ranks, context)
            left = _measured(made.model, feed, what)
            if left <= goal:
                return made, [f"{left / costs.unfactored:.3g} of the {what} are left"]
            saving += left - goal
        raise VerificationError(
            f"{share:g} of the {what} can't be met: rank 1 throughout leaves "
            f"{costs.least / costs.unfactored:.3g}"
        )

    def _within_error(
        self, model: Model, splits: Sequence[_Split], context: Context
    ) -> tuple[Rewritten | None, list[str]]:
        """As few parameters as the bound on the output error allows."""
        feed = next(iter(context.calibration.fit)).feed
        costs = _Costs.of(model, splits, feed, "parameters")
        lost = [split.lost for split in splits]
        plans = {}
        for level in LEVELS:
            saving = costs.now - level * costs.unfactored
            plan = allocate(lost, costs.unit, costs.full, saving)
            if saving > 0 and plan is not None:
                plans[level] = plan
        if not plans:
            return None, ["no rank below those that are there makes the model smaller by much"]
        return within_bound(
            list(plans),
            lambda level: self._made(model, splits, plans[level], context),
            context,
            goal="params, macs or rank",
            said=lambda level: f"{level:g} of the parameters",
        )

    # Making it

    def _made(
        self, model: Model, splits: Sequence[_Split], ranks: Sequence[int | None], context: Context
    ) -> Rewritten:
        made = model.copy()
        chosen = [(split, rank) for split, rank in zip(splits, ranks, strict=True) if rank is not None]
        if not chosen:
            return Rewritten(made, [], [], [], [])
        nodes = [_replace(made, split.layer, *split.factors(rank)) for split, rank in chosen]
        made.prune()
        shapes = made.shapes(next(iter(context.calibration.fit)).feed)
        for node, (split, rank) in zip(nodes, chosen, strict=True):
            op = linear_op(made, node, shapes)
            assert isinstance(op, LinearOp)
            write_weights(made, op, None, split.bias(rank), by=self.name)
        solved, skipped = walked(model, made, nodes, self.options, context)
        inner = {producer(made, node.inputs[0].name).name for node in nodes}
        skipped = [skip for skip in skipped if skip.nodes[0] not in inner]
        changes = [
            _change(split, rank, node, solved, self.options.method)
            for node, (split, rank) in zip(nodes, chosen, strict=True)
        ]
        return Rewritten(made, nodes, solved, skipped, changes)


@dataclass(frozen=True)
class _Costs:
    """In parameters or MACs: of the model now and unfactored; of each layer a rank's and the whole's; and the
    least that can be left."""

    now: float
    unfactored: float
    unit: list[float]
    full: list[float]
    least: float

    @classmethod
    def of(cls, model: Model, splits: Sequence[_Split], feed: Mapping[str, np.ndarray], what: str) -> _Costs:
        now = _measured(model, dict(feed), what)
        shapes = shapes_at(model, dict(feed))
        layers = {layer.last.node: layer for layer in _found(model, linear_ops(model, "*", shapes)[0])}
        times: dict[Node, float] = {}
        for node, layer in layers.items():
            times[node] = 1.0
            if what == "MACs":
                count = node_macs([layer.first.node], shapes, model.opset) or 0
                times[node] = count / (layer.first.columns * layer.first.out_features)
        unfactored = now + sum((layer.whole - layer.size) * times[node] for node, layer in layers.items())
        own = [(split.layer, times[split.layer.last.node]) for split in splits]
        unit, full = [layer.unit * n for layer, n in own], [layer.size * n for layer, n in own]
        saved = sum(max(0.0, (layer.size - layer.unit) * n) for layer, n in own)
        return cls(now, unfactored, unit, full, now - saved)


def _measured(model: Model, feed: dict[str, np.ndarray], what: str) -> float:
    cost = measure(model, feed)
    if what == "parameters":
        return cost.parameters
    if cost.macs is None:
        raise NotApplicableError(f"a share of the MACs needs their number: {cost.macs_reason}")
    return cost.macs


def _found(model: Model, ops: Sequence[LinearOp]) -> list[_Layer]:
    """The operators as layers: a pair that an earlier run made is one."""
    by_node = {op.node: op for op in ops}
    pairs: dict[Node, Node] = {}
    for op in ops:
        before = model.producer(op.node.inputs[0])
        if before is not None and before in by_node and _is_pair(model, before, op):
            pairs[op.node] = before
    inner = set(pairs.values())
    layers = []
    for op in ops:
        if op.node in pairs:
            names = json.loads(op.node.metadata.get(REPLACES_KEY, "[]"))
            layers.append(_Layer(by_node[pairs[op.node]], op, names[0] if names else op.name))
        elif op.node not in inner:
            layers.append(_Layer(op, op, op.name))
    return layers


def _is_pair(model: Model, first: Node, last: LinearOp) -> bool:
    made = first.metadata.get(PASS_KEY) == last.node.metadata.get(PASS_KEY) == Lowrank.name
    middle = first.outputs[0]
    alone = model.consumers(middle) == [last.node] and not model.is_output(middle)
    return made and alone and first.op == last.node.op and math.prod(last.kernel) == 1 and last.groups == 1


def _refusal(model: Model, layer: _Layer) -> str | None:
    for op in {layer.first, layer.last}:
        if op.groups > 1:
            return f"it has {op.groups} groups"
        if is_shared(model, op.weight_tensor, op.node):
            return "its weight has other users"
    if layer.most < 1:
        return f"{layer.size} weights: even rank 1 would not make it smaller"
    return None


def _losses(layer: _Layer, basis: Basis) -> Array:
    """At each rank below that of the layer. A pair has nothing beyond its rank to lose."""
    lost = basis.lost()
    return lost if layer.rank is None else np.minimum(lost, 1.0)[: layer.rank + 1]


def _affordable(layers: Sequence[_Layer]) -> Iterator[list[_Layer]]:
    part: list[_Layer] = []
    size = 0
    for layer in layers:
        own = 16 * layer.last.out_features**2
        if part and size + own > MEMORY:
            yield part
            part, size = [], 0
        part.append(layer)
        size += own
    yield part


def _view(layer: _Layer, shapes: Mapping[str, TensorInfo]) -> View:
    """Rows of what the layer gives."""
    op = layer.last
    shape = shapes[op.y].shape
    assert shape is not None
    axis = 1 if op.kind == "conv" else len(shape) - 1
    return View(op.y, axis, op.out_features, token=op.kind == "token")


def _replace(model: Model, layer: _Layer, left: Array, right: Array) -> Node:
    """Put left (out, r) times right (r, columns) in the layer's place; returns the node that gives y.

    `model` may be a copy of the one the layer was found in. The bias stays.
    """
    last = producer(model, layer.output)
    if layer.rank is not None:
        first = producer(model, str(layer.first.node.outputs[0].name))
        for node, op, matrix in ((first, layer.first, right), (last, layer.last, left)):
            node.attrs.pop("alpha", None)
            node.metadata.pop(KEPT_KEY, None)
            model.set_weight(node.inputs[1], _laid_out(op, matrix, op.kernel))
        if len(first.inputs) > 2:  # its bias has become part of the whole's
            first.inputs.pop()
        return last
    op = layer.first
    x, y, own = last.inputs[0], last.outputs[0], optional_input(last, 2)
    attrs = {key: value for key, value in last.attrs.items() if key != "alpha"}
    narrow = {key: value for key, value in attrs.items() if key != "beta"}
    if last.op == "Conv":
        attrs = {"kernel_shape": [1] * len(op.kernel)}
    model.remove([last])

    def stored(label: str, matrix: Array, kernel: Sequence[int]) -> object:
        value = _laid_out(op, matrix, kernel)
        return model.add_weight(f"{layer.name}_{label}.weight", value)

    made = {"by": Lowrank.name, "replaces": [layer.name]}
    inner = model.add_node(
        op.node.op,
        [x, stored("down", right, op.kernel)],  # type: ignore[list-item]
        [f"{layer.name}_down"],
        narrow,
        f"{layer.name}_down",
        **made,  # type: ignore[arg-type]
    )
    inputs = [inner.outputs[0], stored("up", left, [1] * len(op.kernel)), *([own] if own is not None else [])]
    return model.add_node(op.node.op, inputs, [y], attrs, f"{layer.name}_up", **made)  # type: ignore[arg-type]


def _laid_out(op: LinearOp, matrix: Array, kernel: Sequence[int]) -> np.ndarray:
    """A matrix (outputs, columns) as an operator of the same kind stores it."""
    if op.node.op == "Conv":
        matrix = matrix.reshape(len(matrix), -1, *kernel)
    elif op.node.op == "MatMul" or not int(op.node.attrs.get("transB", 0)):
        matrix = matrix.T
    return np.ascontiguousarray(matrix).astype(op.dtype)


def _change(split: _Split, rank: int, node: Node, solved: Sequence[Solved], method: str) -> Change:
    layer = split.layer
    before = "" if layer.rank is None else f", {layer.rank} before"
    full = min(layer.first.columns, layer.last.out_features)
    return rewrite_change(
        [op.name for op in dict.fromkeys((layer.first, layer.last))],
        f"'{layer.name}' in two, of rank {rank} (of {full}{before})",
        [node],
        solved,
        operator=layer.name,
        rank=rank,
        rank_before=layer.rank,
        weights=rank * layer.unit,
        weights_before=layer.size,
        energy_lost=float(split.lost[rank]),
        method=method,
    )
