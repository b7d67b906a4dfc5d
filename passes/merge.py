"""Layers that are alike share one weight (APPROXIMATE).

O'Neill et al. 2021 ("Layer fusion") rank pairs of layers by the similarity of their weights and let the most
alike share one. In the file both nodes then read one initializer, and in PyTorch they have one Parameter: the
file gets smaller, the network does not get faster.

1. **Alike** (`onnxfuse.analysis.weight_layers`): convolutions, dense layers, and in attention queries, keys,
   values and outputs, each with its like, of one shape and layout.
2. **Rank.** Clusters grow by average distance: that of the weights, by one of the paper's criteria
   (`onnxfuse.numerics.similarity`), or what sharing does to the network's outputs, one forward run for each
   pair.
3. **Align** (`channels.aligning`). Hidden channels have no order of their own: those of one layer are put in
   that of the other, which changes no function, and is checked to change none.
4. **Share.** The weight of a cluster is the mean of its members' ("mean"), that of the member nearest to the
   middle of the network ("freeze"), each number of a member drawn at random ("mix"), or the one that is best
   for the inputs that all of them see ("fit"; `numerics.weight_sharing`). Biases are averaged and shared
   likewise; BatchNormalization stays each layer's own.
5. **Make up for it.** Every operator that shares a weight gets the bias that is best for it alone, and those
   behind it that share nothing are solved again against the original (`onnxfuse.fitting.walk`).
6. **Retrain.** Nodes note what share the gradient through each has in that of the weight
   (`onnxfuse.ir.marks`): equal ones, or for "freeze" gamma and 1 - gamma (equation 6). Weights that start as
   one and move by one gradient stay one, so that the paper's averaging at the end has nothing left to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxfuse.analysis.cost import count as cost_of
from onnxfuse.analysis.weight_layers import WeightLayer, find_weight_layers, kin
from onnxfuse.channels.aligning import align
from onnxfuse.channels.consumers import rows_of
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import ChannelGroups, find_groups
from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.findings import Change, Reached, Skip
from onnxfuse.fitting.rewriting import (
    OperatorOptions,
    finished,
    first_feed,
    named,
    nothing,
    seen_in_parts,
    settled,
    unmeasurable,
    walked,
)
from onnxfuse.fitting.search import SearchResult, farthest
from onnxfuse.fitting.sites import check_mask
from onnxfuse.fitting.trials import Trials
from onnxfuse.ir.marks import GRADIENT_KEY, promises
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.numerics.agglomeration import Merger, agglomerate, clusters_after
from onnxfuse.numerics.knapsack import cheapest
from onnxfuse.numerics.similarity import Criterion, distance
from onnxfuse.numerics.weight_sharing import Mode, gradient_shares, one_weight
from onnxfuse.ops.linear import LINEAR_OPERATORS, LinearOp, linear_op
from onnxfuse.ops.linear_weights import can_share_bias, share_weights
from onnxfuse.ops.shared_weights import producer
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.goals import Share, gone_of_all, left_of_all
from onnxfuse.runtime.observed_shapes import shapes_on

MOST_TRIALS = 2000
"""Pairs of layers that are tried at most: each is one run of the network over some samples."""

NEAR = 0.01
"""Results that are this share of the parameters below the budget at most count as equally near to it."""

BUDGET_ATTEMPTS = 4
"""Biases that a refit adds may break a tight budget: so often steps are chosen that leave room for them."""

SMALLER_NOT_FASTER = "the file shrinks; latency does not: every layer still runs, on a weight that it shares"


class MergeOptions(OperatorOptions):
    """Options of `merge`."""

    goals: ClassVar = {"layers": gone_of_all, "params": left_of_all}

    layers: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the layers that lose a weight of their own; 0: only those whose weight another "
        "has, too",
    )
    params: Share | None = Field(None, description="share of the model's parameters that may be left")
    criterion: Literal[Criterion, "output"] = Field(
        "output",
        description="rank pairs by a distance of their weights, or by what sharing does to the outputs",
    )
    mode: Mode = Field(
        "fit",
        description="the shared weight: best for the inputs of all, the mean, that of the layer nearest to "
        "the middle of the network, or number by number that of one drawn at random",
    )
    pairs: Literal["global", "adjacent"] = Field(
        "global", description="adjacent: only layers that follow each other among those alike"
    )
    align: bool = Field(True, description="put hidden channels of merged layers in the same order first")
    samples: Annotated[int, Field(gt=0)] = Field(
        768, description="fit samples on which pairs are tried (criterion=output)"
    )


@dataclass(frozen=True)
class _Plan:
    """The layers that may share a weight, and in which order.

    Attributes:
        layers: those that have another like them, class by class.
        steps: of all classes, the nearest first; members are places in `layers`.
        total: number of weights that the layers asked for had in the original.
        already: how many of these have been given up before.
        middle: place of the middle of the network, between layers.
        groups: coupled channels, None where nothing is to be aligned.
    """

    layers: list[WeightLayer]
    steps: list[Merger]
    total: int
    already: int
    middle: float
    groups: ChannelGroups | None

    def clusters(self, count: int) -> list[list[WeightLayer]]:
        """Clusters after so many steps. In each the layer nearest to the middle of the network is first: it
        stays where it is, for layers near input and output are the more salient ones (O'Neill et al.,
        "Fusing layers")."""
        found = [[self.layers[i] for i in cluster] for cluster in clusters_after(self.steps[:count])]
        return [sorted(cluster, key=self.far) for cluster in found]

    def only(self, places: Sequence[int]) -> _Plan:
        """The plan with these steps alone, in their order."""
        return replace(self, steps=[self.steps[place] for place in places])

    def far(self, layer: WeightLayer) -> tuple[float, int]:
        """Distance from the middle of the network; of two equal ones the first layer is nearer."""
        return abs(layer.index - self.middle), layer.index


class Merge(Pass):
    """Fewer weights, each used by several layers."""

    name = "merge"
    contract = Contract.APPROXIMATE
    summary = "let layers that are alike share one weight: a smaller file, the same latency"
    Options = MergeOptions
    options: MergeOptions
    example: ClassVar[str] = "merge:layers=0.25"

    def __init__(self, options: MergeOptions | None = None, **settings: object) -> None:
        super().__init__(options, **settings)
        if self.options.layers == 0:
            self.contract = Contract.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite,
        VerificationError for a budget that can't be met."""
        check_mask(model, self.options.mask)
        found, skipped = find_weight_layers(model)
        layers = self._eligible(model, found, skipped, context)
        plan = self._plan(model, layers, (len(found) - 1) / 2, context)
        if not plan.steps:
            where = named(self.options.only, "with names")
            note = f"no two layers{where} are alike enough in role, shape and layout to share a weight"
            return nothing(model, skipped, note)
        return finished(model, self._chosen(model, plan, context), skipped)

    # What may share, in which order

    def _eligible(
        self, model: Model, found: Sequence[WeightLayer], skipped: list[Skip], context: Context
    ) -> list[WeightLayer]:
        """Those of the layers that may share a weight; the others are added to `skipped`."""
        layers = []
        nodes = [op.node for layer in found for op in layer.ops if op.node.op in LINEAR_OPERATORS]
        # An exact merge predicts nothing.
        exact = self.contract is Contract.EXACT
        refused = {} if exact else unmeasurable(model, model, nodes, context)
        for layer in found:
            reasons = [refused[op.node] for op in layer.ops if op.node in refused]
            transposed = [op.node.op for op in layer.ops if op.node.op not in LINEAR_OPERATORS]
            if any(promises(op.node) for op in layer.ops):
                skipped.append(Skip((layer.name,), "it is pruned or clustered, which sharing would undo"))
            elif transposed:
                skipped.append(Skip((layer.name,), f"the error of {transposed[0]} can't be predicted"))
            elif reasons:
                skipped.append(Skip((layer.name,), reasons[0]))
            elif any(fnmatchcase(op.name, self.options.only) for op in layer.ops):
                layers.append(layer)
        return layers

    def _plan(self, model: Model, layers: Sequence[WeightLayer], middle: float, context: Context) -> _Plan:
        """The order in which layers come to share."""
        classes = [own for own in kin(layers) if len(own) > 1]
        groups = None
        if classes and self.options.align and self.contract is not Contract.EXACT:
            groups = find_groups(model, first_feed(context), context.runtime)
        everything = [layer for own in classes for layer in own]
        already = _shared_already(layers)
        plan = _Plan(everything, [], len(layers) + already, already, middle, groups)
        pairs = [pair for own in classes for pair in combinations(own, 2)]
        found = dict(zip(pairs, self._compared(model, plan, pairs, context), strict=True))
        steps: list[Merger] = []
        first = 0
        for own in classes:
            distances = np.full((len(own), len(own)), np.inf)
            for i, j in combinations(range(len(own)), 2):
                distances[i, j] = distances[j, i] = found[own[i], own[j]]
            for step in agglomerate(distances, adjacent=self.options.pairs == "adjacent"):
                members, others = (tuple(first + i for i in part) for part in (step.members, step.others))
                steps.append(Merger(members, others, step.height))
            first += len(own)
        order = sorted(range(len(steps)), key=lambda place: (self._worth(steps[place], everything), place))
        plan.steps.extend(steps[place] for place in order)
        for place, step in enumerate(plan.steps, start=1):
            names = [everything[i].name for i in (*step.members, *step.others)]
            context.journal("merge candidate", place=place, layers=names, distance=step.height)
        return plan

    def _worth(self, step: Merger, layers: Sequence[WeightLayer]) -> float:
        """The cost by which steps of different classes compare: where parameters count, the change of outputs
        for each that is saved."""
        if self.options.criterion != "output" or self.options.layers is not None:
            return step.height
        return step.height / layers[step.others[0]].size

    def _compared(
        self,
        model: Model,
        plan: _Plan,
        pairs: Sequence[tuple[WeightLayer, WeightLayer]],
        context: Context,
    ) -> list[float]:
        """The distance between the layers of each pair.

        Raises:
            NotApplicableError: too many pairs to try each.
        """
        criterion, exact = self.options.criterion, self.contract is Contract.EXACT
        if criterion == "output" and not exact:
            return self._tried(model, plan, pairs, context)
        matrices = {layer: layer.matrix for layer in plan.layers}
        if exact:
            return [0.0 if np.array_equal(matrices[a], matrices[b]) else math.inf for a, b in pairs]
        assert criterion != "output"
        return [distance(matrices[a], matrices[b], criterion, context.seed) for a, b in pairs]

    def _tried(
        self,
        model: Model,
        plan: _Plan,
        pairs: Sequence[tuple[WeightLayer, WeightLayer]],
        context: Context,
    ) -> list[float]:
        """The change of the outputs where each pair alone shares.

        Raises:
            NotApplicableError: too many pairs to try each.
        """
        if len(pairs) > MOST_TRIALS:
            raise NotApplicableError(
                f"{len(pairs)} pairs of layers are too many to try each; give a criterion on weights, such "
                "as criterion=wasserstein, or only="
            )
        if not pairs:
            return []
        mode: Mode = "mean" if self.options.mode == "fit" else self.options.mode

        def rewritten(pair: tuple[WeightLayer, WeightLayer]) -> Model:
            cluster = sorted(pair, key=plan.far)
            trial, _ = self._aligned(model, plan, [cluster])
            self._share(trial, [cluster], mode, {}, context.seed)
            return trial

        return Trials.of(context, self.options.samples).changes(pairs, rewritten, context, model)

    # How many

    def _chosen(self, model: Model, plan: _Plan, context: Context) -> SearchResult:
        """The model with as many layers merged as asked for, or as the bound allows."""
        if self.contract is Contract.EXACT:
            return SearchResult(self._merged(model, plan, len(plan.steps), context))
        if self.options.layers is not None:
            return self._within_layers(model, plan, self.options.layers, context)
        if self.options.params is not None:
            return self._within_params(model, plan, self.options.params, context)
        return farthest(
            range(1, len(plan.steps) + 1),
            lambda count: self._merged(model, plan, count, context),
            context,
            self.options,
            said=lambda count: f"{count} layers lost their own weight",
            more=lambda count: "one more",
            none=lambda within, error: f"no two layers can share {within}: one alone would cost {error:.3g}",
            guess=1,
            event=("merge probe", "merged"),
        )

    def _within_layers(self, model: Model, plan: _Plan, share: float, context: Context) -> SearchResult:
        """The model in which this share of the layers has lost a weight of its own."""
        wanted = max(round(share * plan.total) - plan.already, 0)
        if wanted > len(plan.steps):
            raise VerificationError(
                f"{share:g} of {plan.total} layers can't share: only "
                f"{plan.already + len(plan.steps)} have another that is like them"
            )
        if not wanted:
            return SearchResult(None, [f"{plan.already} of {plan.total} layers share already"])
        note = f"{plan.already + wanted} of {plan.total} layers have no weight of their own"
        return SearchResult(self._merged(model, plan, wanted, context), [note])

    def _within_params(self, model: Model, plan: _Plan, share: float, context: Context) -> SearchResult:
        """The model with at most this share of the parameters left, and as near to it as layers allow."""
        full, now = cost_of(context.whole(model), {}).parameters, cost_of(model, {}).parameters
        gains = [plan.layers[step.others[0]].size for step in plan.steps]
        if now <= share * full:
            reached = Reached("params", "parameters", False, share, now / full)
            return SearchResult(None, [_said(now / full, share, " already")], reached=reached)
        biases = 0
        for _ in range(BUDGET_ATTEMPTS):
            chosen = self._steps_saving(plan, gains, now + biases - share * full, NEAR * full)
            if chosen is None:
                break
            made = self._merged(model, plan.only(chosen), len(chosen), context)
            left = cost_of(made.model, {}).parameters
            if left <= share * full:
                reached = Reached("params", "parameters", False, share, left / full)
                note = _said(left / full, share)
                if left < (share - NEAR) * full:
                    note += ": no set of layers that can share comes nearer"
                return SearchResult(made, [note], reached=reached)
            biases = left - (now - sum(gains[place] for place in chosen))
        least = (now - sum(gains)) / full
        raise VerificationError(
            f"{share:g} of the parameters can't be met: {least:.3g} are left when all share that can"
        )

    def _steps_saving(self, plan: _Plan, gains: Sequence[int], need: float, slack: float) -> list[int] | None:
        """The steps that save enough, and no more than `slack` beyond that or as little as there is, at the
        least loss; None where all together are not enough."""
        before: dict[int, set[int]] = {}
        last: dict[int, int] = {}
        for place, step in enumerate(plan.steps):
            before[place] = {last[layer] for layer in (*step.members, *step.others) if layer in last}
            last.update(dict.fromkeys((*step.members, *step.others), place))
        heights = [step.height for step in plan.steps]
        return cheapest(gains, heights, need, slack, before)

    # Making it

    def _merged(self, model: Model, plan: _Plan, count: int, context: Context) -> PassResult:
        """The model after so many steps of the plan."""
        clusters = plan.clusters(count)
        if self.contract is Contract.EXACT:
            made = model.copy()
            changes, _ = self._share(made, clusters, "freeze", {}, context.seed)
            return PassResult(made, changes, notes=[SMALLER_NOT_FASTER])
        made, moved = self._aligned(model, plan, clusters)
        cut = made.copy() if moved else None
        known = self._covariances(made, clusters, context) if self.options.mode == "fit" else {}
        changes, nodes = self._share(made, clusters, self.options.mode, known, context.seed)
        solved, skipped = walked(
            model, made, context, mask=self.options.mask, refit=self.options.refit, fixed=nodes
        )
        result = settled(made, changes, solved, skipped, every=True)
        return replace(result, notes=[SMALLER_NOT_FASTER], oracle=model if moved else None, cut=cut)

    def _aligned(
        self, model: Model, plan: _Plan, clusters: Sequence[Sequence[WeightLayer]]
    ) -> tuple[Model, bool]:
        """A copy in which the hidden channels of each cluster are in the order of those of its first layer in
        the network, and whether any had to move. (The first of all clusters: so that of two blocks with two
        merged layers each, the same one gives the order to both.)"""
        made = model.copy()
        if plan.groups is None:
            return made, False
        pairs = []
        for cluster in clusters:
            first, *others = sorted(cluster, key=lambda layer: layer.index)
            pairs += [(first.tensor.name, other.tensor.name) for other in others]
        order = align(model, plan.groups, pairs)
        if order:
            take(made, order, by=self.name)
        return made, bool(order)

    def _covariances(
        self, model: Model, clusters: Sequence[Sequence[WeightLayer]], context: Context
    ) -> dict[str, np.ndarray]:
        """The covariance of what each merged operator of a model reads, by its output."""
        shapes = shapes_on(model, first_feed(context), context.runtime)
        ops = [_now(model, op, shapes) for own in clusters for layer in own for op in layer.ops]
        views = {op.y: view for op in ops if (view := rows_of(op, shapes)) is not None}
        parts = seen_in_parts(model, {y: [view] for y, view in views.items()}, self.options.mask, context)
        return {y: known.every[views[y]].covariance for part, known in parts for y in part}

    def _share(
        self,
        model: Model,
        clusters: Sequence[Sequence[WeightLayer]],
        mode: Mode,
        known: Mapping[str, np.ndarray],
        seed: int,
    ) -> tuple[list[Change], list[Node]]:
        """Give each cluster one weight, in place; what was done, and the nodes that share now."""
        shapes = model.shapes()
        changes: list[Change] = []
        nodes: list[Node] = []
        for cluster in clusters:
            members = [[_now(model, op, shapes) for op in layer.ops] for layer in cluster]
            weights = [own[0].weight for own in members]
            counts = [len(own) for own in members]
            ops = [op for own in members for op in own]
            seen = [[known[op.y] for op in own if op.y in known] for own in members]
            random = np.random.default_rng([seed, cluster[0].index])
            weight = one_weight(weights, mode, counts, seen, ops[0].groups, random)
            bias = None
            if not self.options.refit and self.contract is not Contract.EXACT and can_share_bias(model, ops):
                bias = np.mean([op.bias for op in ops], axis=0)
            share_weights(model, ops, weight, bias)
            if self.contract is not Contract.EXACT:
                for op, gradient in zip(ops, gradient_shares(weights, mode, counts), strict=True):
                    op.node.metadata[GRADIENT_KEY] = f"{gradient:.6g}"
            nodes += [op.node for op in ops]
            changes.append(_change(cluster, weights, weight))
        model.sort()
        model.prune()
        return changes, nodes


def _said(left: float, asked: float, already: str = "") -> str:
    """The note on the share of the parameters that is left."""
    return f"{left:.3g} of the parameters are left{already}, {asked:g} asked"


def _shared_already(layers: Sequence[WeightLayer]) -> int:
    """Number of weights that operators have given up for one of these before."""
    marked = (sum(GRADIENT_KEY in op.node.metadata for op in layer.ops) for layer in layers)
    return sum(max(count - 1, 0) for count in marked)


def _now(model: Model, op: LinearOp, shapes: Mapping[str, TensorInfo]) -> LinearOp:
    """The same operator in a copy of its model."""
    found = linear_op(model, producer(model, op.node.outputs[0].name), shapes)
    assert isinstance(found, LinearOp)
    return found


def _change(cluster: Sequence[WeightLayer], weights: Sequence[np.ndarray], weight: np.ndarray) -> Change:
    """The report's line for one cluster."""
    norms = [float(np.linalg.norm(own)) for own in weights]
    moved = [
        float(np.linalg.norm(weight - own)) / norm if norm else None
        for own, norm in zip(weights, norms, strict=True)
    ]
    names = [op.name for layer in cluster for op in layer.ops]
    return Change(
        tuple(names),
        f"{len(cluster)} {cluster[0].role} layers share '{cluster[0].tensor.name}'",
        {
            "weight": cluster[0].tensor.name,
            "role": cluster[0].role,
            "layers": [layer.name for layer in cluster],
            "weights_moved_by": moved,
            "parameters_saved": (len(cluster) - 1) * int(weight.size),
        },
    )
