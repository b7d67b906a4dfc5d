"""New values in stored weights: which ones may get some, and what comes of it.

Whatever multiplies by a stored weight will do: linear operators, which are sites of `onnxfuse.fitting.walk`
and come with a prediction of their error; and others, LSTM, ConvTranspose, Einsum, which are not. What these
give is run and compared instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from onnxfuse.findings import Change, Json, Prediction, Skip
from onnxfuse.fitting.rewriting import first_feed, known_shapes, rewrite_change, settled, unmeasurable, walked
from onnxfuse.fitting.sites import comparable_channels
from onnxfuse.fitting.walk import Solved
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.linear import LINEAR_OPERATORS, LinearOp, linear_op
from onnxfuse.ops.shared_weights import MULTIPLYING, AnyWeight, multiplied
from onnxfuse.ops.table import OPS, Kind, Trait
from onnxfuse.pipeline.base import Context, PassResult
from onnxfuse.runtime.observed_shapes import shapes_on
from onnxfuse.verification.predictions import check_predictions

_WEIGHTLESS = OPS.of_kind(Kind.LINEAR) - MULTIPLYING
_CONVOLVING = OPS.of_kind(Kind.LINEAR).having(Trait.CONVOLVES)


# Which weights ------------------------------------------------------------------------------------


def value_weights(model: Model, only: str, context: Context) -> tuple[list[AnyWeight], list[Skip]]:
    """The weights that can be replaced by others of the same shape, in the order of the first nodes that
    multiply by them, and the nodes whose weights can't.

    Args:
        model: is left as it is.
        only: pattern that the nodes' names match.
        context: of the pass.
    """
    shapes = shapes_on(model, first_feed(context), context.runtime)
    users: dict[Tensor, list[Node]] = {}
    skipped: list[Skip] = []
    for node in model.nodes:
        if not fnmatchcase(node.site_name, only):
            continue
        own = multiplied(model, node)
        for tensor in own:
            users.setdefault(tensor, []).append(node)
        if not own and (node.key in MULTIPLYING or node.key in _WEIGHTLESS):
            skipped.append(Skip((node.site_name,), _without(model, node, shapes)))
    weights: list[AnyWeight] = []
    for tensor, nodes in users.items():
        weight = AnyWeight(tensor, model, tuple(nodes))
        if reason := weight.other_use():
            skipped += [Skip((name,), f"its weight is also {reason}") for name in weight.names]
        else:
            weights.append(weight)
    trial = model.copy()
    for weight in weights:
        trial.set_weight(trial.tensor(weight.tensor.name), np.zeros_like(weight.read(model)))
    refused = _refused(model, trial, {n: None for w in weights for n in w.nodes(trial)}, shapes, context)
    usable = []
    for weight in weights:
        nodes_ = zip(weight.names, weight.nodes(trial), strict=True)
        reasons = [Skip((name,), refused[node]) for name, node in nodes_ if node in refused]
        skipped += reasons
        if not reasons:
            usable.append(weight)
    return usable, list(dict.fromkeys(skipped))


def _without(model: Model, node: Node, shapes: Mapping[str, TensorInfo]) -> str:
    """The reason why a node that multiplies has no weight to replace."""
    if node.key in _WEIGHTLESS:
        return f"the weight of {node.op} is not in floating point"
    op = linear_op(model, node, shapes) if node.op in LINEAR_OPERATORS else ""
    return op if isinstance(op, str) and op else f"the weight of {node.op} is computed, not constant"


def _refused(
    model: Model, trial: Model, nodes: Collection[Node], shapes: Mapping[str, TensorInfo], context: Context
) -> dict[Node, str]:
    """The nodes whose error could not be told, and why."""
    sites = _sites(trial, nodes, shapes)
    found = unmeasurable(model, trial, sites, context)
    known = known_shapes(context)
    for node in nodes:
        if node not in sites:
            axis = _axis(node)
            reason = comparable_channels(model, _result(node), axis, shapes, known)
            if isinstance(reason, str):
                found[node] = reason
    return found


def _sites(model: Model, nodes: Collection[Node], shapes: Mapping[str, TensorInfo]) -> list[Node]:
    """Those of the nodes that the walk knows."""
    linear = (node for node in nodes if node.op in LINEAR_OPERATORS)
    return [node for node in linear if isinstance(linear_op(model, node, shapes), LinearOp)]


def _result(node: Node) -> str:
    """Name of the tensor that a node is judged by: its first output."""
    return str(next(tensor.name for tensor in node.outputs if tensor.name))


def _axis(node: Node) -> int:
    return 1 if node.key in _CONVOLVING else -1


# What comes of it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewValues:
    """What came of new values in the weights of some nodes.

    Attributes:
        model: the rewritten one.
        nodes: the nodes.
        solved: sites of the walk.
        skipped: operators behind that are no sites.
        claims: by node that is none itself, its error.
    """

    model: Model
    nodes: Sequence[Node]
    solved: Sequence[Solved]
    skipped: Sequence[Skip]
    claims: Mapping[Node, Prediction]

    def change(self, weight: AnyWeight, what: str, /, **detail: Json) -> Change:
        """The report's line for one weight.

        Args:
            weight: the weight.
            what: the rewrite in words.
            detail: figures.
        """
        own = weight.nodes(self.model)
        known = {node: _share(claim) for node, claim in self.claims.items()}
        return rewrite_change(weight.names, what, own, self.solved, known, **detail)

    def result(self, changes: Sequence[Change]) -> PassResult:
        """The result of the pass, with these lines for what it did."""
        found = settled(self.model, changes, self.solved, self.skipped, own=self.nodes)
        return replace(found, predictions=[*found.predictions, *self.claims.values()])


def made_up_for(
    before: Model, made: Model, nodes: Sequence[Node], context: Context, *, mask: str | None, refit: bool
) -> NewValues:
    """Solve what is behind new values in weights, and tell the error of each node that has some.

    Args:
        before: the model that was rewritten.
        made: the result; gets new weights.
        nodes: those of `made` whose weights have new values.
        context: of the pass.
        mask: see `fitting.rewriting.Mask`.
        refit: without it nothing else is touched.

    Raises:
        InputError: bad samples.
        NotApplicableError: activations that are not finite.
    """
    nodes = list(dict.fromkeys(nodes))
    shapes = shapes_on(made, first_feed(context), context.runtime)
    sites = _sites(made, nodes, shapes)
    solved, skipped = walked(before, made, context, mask=mask, refit=refit, fixed=sites)
    others = [node for node in nodes if node not in sites]
    own = {node.site_name for node in others}
    skipped = [skip for skip in skipped if skip.nodes[0] not in own]
    return NewValues(made, nodes, solved, skipped, _measured(made, others, shapes, context))


def _measured(
    made: Model, nodes: Sequence[Node], shapes: Mapping[str, TensorInfo], context: Context
) -> dict[Node, Prediction]:
    """For each node the error of what it gives, over the fit samples."""
    known = known_shapes(context)
    asked = []
    for node in nodes:
        name, axis = _result(node), _axis(node)
        channels = comparable_channels(made, name, axis, shapes, known)
        assert not isinstance(channels, str)
        asked.append(Prediction(name, name, 0.0, 0.0, None, axis, None, channels))
    found = check_predictions(
        context.original, made, asked, context.calibration, context.runtime, context.seed
    )
    return {
        node: replace(claim, error=check.measured, variance=check.variance)
        for node, claim, check in zip(nodes, asked, found, strict=True)
    }


def _share(claim: Prediction) -> float:
    """The error as a share of the variance."""
    return claim.error / claim.variance if claim.variance > 0 else np.inf
