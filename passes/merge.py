"""Layers that are alike share one weight (APPROXIMATE).

O'Neill et al. 2021 ("Layer fusion") rank pairs of layers by the similarity of their weights and let the most
alike share one. In the file both nodes then read one initializer, and in PyTorch they have one Parameter: the
file gets smaller, the network does not get faster.

1. **Alike** (`onnxfuse.alike`): convolutions, dense layers, and in attention queries, keys, values and
   outputs, each with its like, of one shape and layout.
2. **Rank.** Clusters grow by average distance: that of the weights, by one of the paper's criteria
   (`onnxfuse.similarity`), or what sharing does to the network's outputs, one forward run for each pair.
3. **Align** (`channels.aligning`). Hidden channels have no order of their own: those of one layer are put in
   that of the other, which changes no function, and is checked to change none.
4. **Share.** The weight of a cluster is the mean of its members' ("mean"), that of the member nearest to the
   middle of the network ("freeze"), each number of a member drawn at random ("mix"), or the one that is best
   for the inputs that all of them see ("fit"): with C_s the covariance of a member's input and v_s the
   variance of its output,

       W = (sum_s W_s C_s / v_s + r W0) (sum_s C_s / v_s + r I)^-1,       W0 the mean,

   which minimises the summed relative error of all outputs (RegMean, Jin et al. 2023, equation 2, for the
   layers of one network instead of the same layer of several). Biases are averaged and shared likewise;
   BatchNormalization stays each layer's own.
5. **Make up for it.** Every operator that shares a weight gets the bias that is best for it alone, and those
   behind it that share nothing are solved again against the original (`onnxfuse.walk`).
6. **Retrain.** Nodes note what share the gradient through each has in that of the weight (`onnxfuse.marks`):
   equal ones, or for "freeze" gamma and 1 - gamma (equation 6). Weights that start as one and move by one
   gradient stay one, so that the paper's averaging at the end has nothing left to do.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from threadpoolctl import threadpool_limits

from onnxfuse.alike import WeightLayer, find_weight_layers, kin
from onnxfuse.channels import ChannelGroups, find_groups, take
from onnxfuse.channels.aligning import align
from onnxfuse.channels.consumers import View, rows_of
from onnxfuse.channels.importance import Statistics, statistics
from onnxfuse.clusters import Step, agglomerate, joined
from onnxfuse.cost import count as cost_of
from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.graph import Model, Node
from onnxfuse.linear import LINEAR, LinearOp, can_share_bias, linear_op, share_weights
from onnxfuse.marks import GRADIENT_KEY, kept
from onnxfuse.pass_manager import Change, Context, Contract, Pass, PassResult, Skip
from onnxfuse.rewriting import OperatorOptions, unmeasurable, walked
from onnxfuse.shapes import TensorInfo
from onnxfuse.similarity import Criterion, distance, freeze_share
from onnxfuse.trials import Trials, error_bound, longest, probe
from onnxfuse.walk import Solved, check_mask, refit_change

RIDGE = 1e-3
"""Of "fit", relative to the mean diagonal of the summed covariances."""

MOST_TRIALS = 2000
"""Pairs of layers that are tried at most: each is one run of the network over some samples."""

SMALLER_NOT_FASTER = "the file shrinks; latency does not: every layer still runs, on a weight that it shares"

Share = Annotated[float, Field(gt=0, lt=1)]


class MergeOptions(OperatorOptions):
    """Options of `merge`."""

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
    mode: Literal["fit", "mean", "freeze", "mix"] = Field(
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

    @model_validator(mode="after")
    def _one_goal(self) -> MergeOptions:
        if self.layers is not None and self.params is not None:
            raise ValueError("give one of layers and params, not both")
        return self


@dataclass(frozen=True)
class _Plan:
    """What may share a weight, and in which order.

    Attributes:
        layers: those that have another like them, class by class.
        steps: of all classes, the nearest first; members are places in `layers`.
        total: number of weights that the layers asked for had in the original.
        already: how many of these have been given up before.
        middle: place of the middle of the network, between layers.
        groups: coupled channels, None where nothing is to be aligned.
    """

    layers: list[WeightLayer]
    steps: list[Step]
    total: int
    already: int
    middle: float
    groups: ChannelGroups | None

    def clusters(self, count: int) -> list[list[WeightLayer]]:
        """After so many steps. In each the layer nearest to the middle of the network comes first: it stays
        where it is, for layers near input and output are the more salient ones (O'Neill et al., "Fusing
        layers")."""
        found = [[self.layers[i] for i in cluster] for cluster in joined(self.steps[:count])]
        return [sorted(cluster, key=self.far) for cluster in found]

    def far(self, layer: WeightLayer) -> tuple[float, int]:
        return abs(layer.index - self.middle), layer.index


@dataclass(frozen=True)
class _Made:
    """A network in which some layers share: as it was after aligning, and in the end."""

    cut: Model | None
    model: Model
    changes: list[Change]
    solved: list[Solved]
    skipped: list[Skip]


class Merge(Pass):
    """Fewer weights, each used by several layers."""

    name = "merge"
    contract = Contract.APPROXIMATE
    summary = "let layers that are alike share one weight: a smaller file, the same latency"
    Options = MergeOptions
    options: MergeOptions
    example: ClassVar[str] = "merge:layers=0.25"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite,
        VerificationError for a budget that can't be met."""
        check_mask(model, self.options.mask)
        found, skipped = find_weight_layers(model)
        layers = self._eligible(model, found, skipped, context)
        plan = self._plan(model, layers, (len(found) - 1) / 2, context)
        if not plan.steps:
            return PassResult(model, skipped=skipped, notes=[self._idle(plan)])
        made, notes = self._chosen(model, plan, context)
        if made is None:
            return PassResult(model, skipped=skipped, notes=notes)
        moved = [item for item in made.solved if item.ridge is not None]
        return PassResult(
            made.model,
            made.changes + [refit_change(item) for item in moved],
            skipped + made.skipped,
            [item.prediction() for item in made.solved],
            [*notes, SMALLER_NOT_FASTER],
            oracle=None if made.cut is None else model,
            cut=made.cut,
        )

    def __init__(self, options: MergeOptions | None = None, **settings: object) -> None:
        super().__init__(options, **settings)
        if self.options.layers == 0:
            self.contract = Contract.EXACT

    def partly(self, share: float, done: float = 0.0) -> Pass | None:
        if self.options.layers:
            return self._with(layers=self.options.layers * share)
        if self.options.params is not None:
            left, before = (1 - (1 - self.options.params) * part for part in (share, done))
            return self._with(params=left / before)
        return None

    # What may share, in which order

    def _eligible(
        self, model: Model, found: Sequence[WeightLayer], skipped: list[Skip], context: Context
    ) -> list[WeightLayer]:
        layers = []
        outputs = [
            str(op.node.outputs[0].name) for layer in found for op in layer.ops if op.node.op in LINEAR
        ]
        # An exact merge predicts nothing.
        exact = self.contract is Contract.EXACT
        refused = {} if exact else unmeasurable(model, model.copy(), outputs, context)
        for layer in found:
            reasons = [refused[y] for op in layer.ops if (y := op.node.outputs[0].name) in refused]
            transposed = [op.node.op for op in layer.ops if op.node.op not in LINEAR]
            if any(kept(op.node) for op in layer.ops):
                skipped.append(Skip((layer.name,), "it is pruned or clustered, which sharing would undo"))
            elif transposed:
                skipped.append(Skip((layer.name,), f"the error of {transposed[0]} can't be predicted"))
            elif reasons:
                skipped.append(Skip((layer.name,), reasons[0]))
            elif any(fnmatchcase(op.name, self.options.only) for op in layer.ops):
                layers.append(layer)
        return layers

    def _plan(self, model: Model, layers: Sequence[WeightLayer], middle: float, context: Context) -> _Plan:
        classes = [own for own in kin(layers) if len(own) > 1]
        groups = None
        if classes and self.options.align and self.contract is not Contract.EXACT:
            groups = find_groups(model, next(iter(context.calibration.fit)).feed)
        everything = [layer for own in classes for layer in own]
        already = _shared_already(layers)
        plan = _Plan(everything, [], len(layers) + already, already, middle, groups)
        pairs = [pair for own in classes for pair in combinations(own, 2)]
        found = dict(zip(pairs, self._compared(model, plan, pairs, context), strict=True))
        steps: list[Step] = []
        first = 0
        for own in classes:
            distances = np.full((len(own), len(own)), np.inf)
            for i, j in combinations(range(len(own)), 2):
                distances[i, j] = distances[j, i] = found[own[i], own[j]]
            for step in agglomerate(distances, adjacent=self.options.pairs == "adjacent"):
                members, others = (tuple(first + i for i in part) for part in (step.members, step.others))
                steps.append(Step(members, others, step.height))
            first += len(own)
        order = sorted(range(len(steps)), key=lambda place: (self._worth(steps[place], everything), place))
        plan.steps.extend(steps[place] for place in order)
        for place, step in enumerate(plan.steps, start=1):
            names = [everything[i].name for i in (*step.members, *step.others)]
            context.journal("merge candidate", place=place, layers=names, distance=step.height)
        return plan

    def _worth(self, step: Step, layers: Sequence[WeightLayer]) -> float:
        """What decides between steps of different classes: where parameters count, what outputs lose for each
        that is saved."""
        if self.options.criterion != "output" or self.options.layers is not None:
            return step.height
        return step.height / _size(layers[step.others[0]])

    def _compared(
        self,
        model: Model,
        plan: _Plan,
        pairs: Sequence[tuple[WeightLayer, WeightLayer]],
        context: Context,
    ) -> list[float]:
        """How far two layers are from each other, for each pair.

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
        """What sharing of each pair alone does to the outputs."""
        if len(pairs) > MOST_TRIALS:
            raise NotApplicableError(
                f"{len(pairs)} pairs of layers are too many to try each; give a criterion on weights, such "
                "as criterion=wasserstein, or only="
            )
        if not pairs:
            return []
        trials = Trials.of(context, self.options.samples)
        advance = context.progress.task("trying", total=len(pairs))
        single = context.runtime.single()
        mode = "mean" if self.options.mode == "fit" else self.options.mode
        lock = threading.Lock()  # models keep caches, so that no two threads may copy one at a time

        def change(pair: tuple[WeightLayer, WeightLayer]) -> float:
            cluster = sorted(pair, key=plan.far)
            with lock:
                trial, _ = self._aligned(model, plan, [cluster])
                self._share(trial, [cluster], mode, {}, context.seed)
            try:
                return trials.change(trial, single)
            except NotApplicableError:
                return math.inf
            finally:
                advance()

        with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(context.runtime.threads, 4)) as pool:
            return list(pool.map(change, pairs))

    def _idle(self, plan: _Plan) -> str:
        where = "" if self.options.only == "*" else f" with names matching '{self.options.only}'"
        return f"no two layers{where} are alike enough in role, shape and layout to share a weight"

    # How many

    def _chosen(self, model: Model, plan: _Plan, context: Context) -> tuple[_Made | None, list[str]]:
        if self.contract is Contract.EXACT:
            return self._merged(model, plan, len(plan.steps), context), []
        if self.options.layers is not None:
            total = plan.total
            wanted = max(round(self.options.layers * total) - plan.already, 0)
            if wanted > len(plan.steps):
                raise VerificationError(
                    f"{self.options.layers:g} of {total} layers can't share: only "
                    f"{plan.already + len(plan.steps)} have another that is like them"
                )
            if not wanted:
                return None, [f"{plan.already} of {total} layers share already"]
            made = self._merged(model, plan, wanted, context)
            return made, [f"{plan.already + wanted} of {total} layers have no weight of their own"]
        if self.options.params is not None:
            return self._within_params(model, plan, self.options.params, context)
        return self._within_error(model, plan, context)

    def _within_params(
        self, model: Model, plan: _Plan, share: float, context: Context
    ) -> tuple[_Made | None, list[str]]:
        full = cost_of(model, {}).parameters
        left = full - np.cumsum([_size(plan.layers[step.others[0]]) for step in plan.steps])
        enough = np.flatnonzero(left <= share * full)
        if not len(enough):
            least = left[-1] / full
            raise VerificationError(
                f"{share:g} of the parameters can't be met: {least:.3g} are left when all share that can"
            )
        count = int(enough[0]) + 1
        made = self._merged(model, plan, count, context)
        return made, [f"{cost_of(made.model, {}).parameters / full:.3g} of the parameters are left"]

    def _within_error(self, model: Model, plan: _Plan, context: Context) -> tuple[_Made | None, list[str]]:
        if not context.calibration.held_out.samples:
            return None, ["no held-out samples to hold the error bound on; give layers or params"]
        bound, which = error_bound(context)
        errors: dict[int, float] = {}

        def attempt(count: int) -> _Made | None:
            made, errors[count] = probe(lambda: self._merged(model, plan, count, context), context)
            context.journal("merge probe", merged=count, output_error=errors[count])
            return made if errors[count] <= bound else None

        best, count = longest(len(plan.steps), 1, attempt)
        more = f"; with one more it would be {errors[count + 1]:.3g}" if count + 1 in errors else ""
        if best is None:
            one = f"one alone would cost {errors[1]:.3g}" if 1 in errors else "none was tried"
            return None, [f"no two layers can share within {bound:g} ({which}): {one}"]
        return best, [
            f"{count} layers lost their own weight: held-out output error within {bound:g} ({which}){more}"
        ]

    # Making it

    def _merged(self, model: Model, plan: _Plan, count: int, context: Context) -> _Made:
        clusters = plan.clusters(count)
        if self.contract is Contract.EXACT:
            made = model.copy()
            changes, _ = self._share(made, clusters, "freeze", {}, context.seed)
            return _Made(None, made, changes, [], [])
        made, moved = self._aligned(model, plan, clusters)
        cut = made.copy() if moved else None
        known: dict[str, Statistics] = {}
        if self.options.mode == "fit":
            known = self._seen(made, clusters, context)
        changes, nodes = self._share(made, clusters, self.options.mode, known, context.seed)
        solved, skipped = walked(model, made, nodes, self.options, context)
        return _Made(cut, made, changes, solved, skipped)

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
            pairs += [(first.weight.name, other.weight.name) for other in others]
        order = align(model, plan.groups, pairs)
        if order:
            take(made, order, by=self.name)
        return made, bool(order)

    def _seen(
        self, model: Model, clusters: Sequence[Sequence[WeightLayer]], context: Context
    ) -> dict[str, Statistics]:
        """The moments of what each merged operator of a model reads, by its output."""
        shapes = model.shapes(next(iter(context.calibration.fit)).feed)
        views: dict[str, View] = {}
        for op in (_now(model, op, shapes) for own in clusters for layer in own for op in layer.ops):
            view = rows_of(op, shapes)
            if view is not None:
                views[op.y] = view
        found = statistics(
            model,
            views.values(),
            context.calibration.fit,
            context.runtime,
            seed=context.seed,
            mask=self.options.mask,
            progress=context.progress,
        )
        return {y: found[view] for y, view in views.items()}

    def _share(
        self,
        model: Model,
        clusters: Sequence[Sequence[WeightLayer]],
        mode: str,
        known: Mapping[str, Statistics],
        seed: int,
    ) -> tuple[list[Change], list[Node]]:
        """Give each cluster one weight, in place; what was done, and the nodes that share now."""
        shapes = model.shapes()
        changes: list[Change] = []
        nodes: list[Node] = []
        for cluster in clusters:
            members = [[_now(model, op, shapes) for op in layer.ops] for layer in cluster]
            weights = [ops[0].weight for ops in members]
            ops = [op for own in members for op in own]
            weight = _shared(weights, mode, members, known, np.random.default_rng([seed, cluster[0].index]))
            bias = None
            if not self.options.refit and self.contract is not Contract.EXACT and can_share_bias(model, ops):
                bias = np.mean([op.bias for op in ops], axis=0)
            share_weights(model, ops, weight, bias)
            if self.contract is not Contract.EXACT:
                for op, gradient in zip(ops, _gradients(members, weights, mode), strict=True):
                    op.node.metadata[GRADIENT_KEY] = f"{gradient:.6g}"
            nodes += [op.node for op in ops]
            changes.append(_change(cluster, weights, weight))
        model.sort()
        model.prune()
        return changes, nodes


def _shared_already(layers: Sequence[WeightLayer]) -> int:
    """How many weights operators have given up for one of these before."""
    marked = (sum(GRADIENT_KEY in op.node.metadata for op in layer.ops) for layer in layers)
    return sum(max(count - 1, 0) for count in marked)


def _now(model: Model, op: LinearOp, shapes: Mapping[str, TensorInfo]) -> LinearOp:
    """The same operator in a copy of its model."""
    node = model.producer(model.tensor(op.node.outputs[0].name))
    assert node is not None
    found = linear_op(model, node, shapes)
    assert isinstance(found, LinearOp)
    return found


def _size(layer: WeightLayer) -> int:
    return layer.ops[0].out_features * layer.ops[0].columns


def _shared(
    weights: Sequence[np.ndarray],
    mode: str,
    members: Sequence[Sequence[LinearOp]],
    known: Mapping[str, Statistics],
    random: np.random.Generator,
) -> np.ndarray:
    """The weight (out, columns) of a cluster, whose kept layer comes first. Every operator counts once."""
    if mode == "freeze":
        return weights[0]
    if mode == "mix":
        drawn = random.integers(len(weights), size=weights[0].shape)
        return np.take_along_axis(np.stack(weights), drawn[None], 0)[0]
    counts = [len(own) for own in members]
    mean = np.average(weights, axis=0, weights=counts)
    if mode == "mean":
        return mean
    seen = [
        (weight, known[op.y])
        for weight, own in zip(weights, members, strict=True)
        for op in own
        if op.y in known
    ]
    return _fitted(seen, mean, members[0][0].groups)


def _fitted(seen: Sequence[tuple[np.ndarray, Statistics]], mean: np.ndarray, groups: int) -> np.ndarray:
    """The weight with the least summed relative error over the operators whose inputs were seen."""
    rows, columns = len(mean) // groups, mean.shape[1]
    left = np.zeros((groups, columns, columns))
    right = np.zeros((groups, rows, columns))
    for weight, found in seen:
        own = weight.reshape(groups, rows, columns)
        wide = found.covariance.reshape(groups, columns, groups, columns)
        every = np.arange(groups)
        covariance = wide[every, :, every]
        product = own @ covariance
        variance = float(np.vdot(product, own))
        if variance > 0:
            left += covariance / variance
            right += product / variance
    diagonal = np.einsum("gii->gi", left)
    ridge = RIDGE * diagonal.mean(axis=1, keepdims=True)
    ridge[ridge == 0] = 1.0  # an input that never moves says nothing: the mean stays
    diagonal += ridge
    right += ridge[:, :, None] * mean.reshape(groups, rows, columns)
    return np.linalg.solve(left, right.swapaxes(1, 2)).swapaxes(1, 2).reshape(mean.shape)


def _gradients(
    members: Sequence[Sequence[LinearOp]], weights: Sequence[np.ndarray], mode: str
) -> list[float]:
    """What share each operator's gradient has in that of the weight: equal ones, or (O'Neill et al., equation
    6) gamma for the layer that was kept, the others together what is left."""
    number = sum(map(len, members))
    if mode != "freeze":
        return [1 / number] * number
    kept = float(np.mean([freeze_share(weights[0], other) for other in weights[1:]]))
    rest = number - len(members[0])
    return [kept / len(members[0])] * len(members[0]) + [(1 - kept) / rest] * rest


def _change(cluster: Sequence[WeightLayer], weights: Sequence[np.ndarray], weight: np.ndarray) -> Change:
    norms = [float(np.linalg.norm(own)) for own in weights]
    moved = [
        float(np.linalg.norm(weight - own)) / norm if norm else None
        for own, norm in zip(weights, norms, strict=True)
    ]
    names = [op.name for layer in cluster for op in layer.ops]
    return Change(
        tuple(names),
        f"{len(cluster)} {cluster[0].role} layers share '{cluster[0].weight.name}'",
        {
            "weight": cluster[0].weight.name,
            "role": cluster[0].role,
            "layers": [layer.name for layer in cluster],
            "weights_moved_by": moved,
            "parameters_saved": (len(cluster) - 1) * int(weight.size),
        },
    )
