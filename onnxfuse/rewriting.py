"""What passes share that replace the weights of single operators: which, how far, and the walk after.

Such a pass takes stored weights one by one (a weight that several operators share is one), rewrites them, and
leaves the rest to `onnxfuse.walk`: rewritten operators keep their weights and get the bias that is best for
them, everything else behind is solved again. Each rewritten operator is a site of that walk, so each comes
with a prediction of its error; one that can't be a site is refused beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np
from pydantic import Field

from onnxfuse.graph import Model, Node, Tensor
from onnxfuse.linear import LINEAR, LinearOp, linear_op, weight_type
from onnxfuse.pass_manager import Change, Context, Json, PassOptions, PassResult, Skip
from onnxfuse.regions import site_name
from onnxfuse.shapes import TensorInfo
from onnxfuse.trials import Made, error_bound, longest, probe
from onnxfuse.walk import Solved, refit_change, refit_sites, walk

Level = TypeVar("Level", bound=float)
M = TypeVar("M", bound=Made)


class OperatorOptions(PassOptions):
    """Options that these passes share."""

    only: str = Field("*", description="pattern: operators with matching names")
    refit: bool = Field(
        True, description="refit the operators behind, and the biases of those that are rewritten"
    )
    mask: str | None = Field(
        None, description="graph input that is 0 where a token is padding; those rows are left out"
    )


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored weight, and all operators that multiply by it, as of one model."""

    tensor: str
    ops: tuple[LinearOp, ...]
    size: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the operators."""
        return tuple(op.name for op in self.ops)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the operators' nodes compute, by which they are found in a copy of the model."""
        return tuple(op.node.outputs[0].name for op in self.ops)

    def read(self, model: Model) -> np.ndarray:
        """Its value, in the operators' own layout."""
        value = model.weight(model.tensor(self.tensor))
        assert value is not None
        return value

    def nodes(self, model: Model) -> list[Node]:
        """The operators' nodes in a copy of the model."""
        return [producer(model, name) for name in self.outputs]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten model, its nodes that got other weights, what the walk made of it, and what is worth saying
    of each."""

    model: Model
    nodes: Collection[Node]
    solved: list[Solved]
    skipped: list[Skip]
    changes: list[Change]


def producer(model: Model, tensor: str) -> Node:
    """The node that computes it."""
    node = model.producer(model.tensor(tensor))
    assert node is not None
    return node


def linear_ops(
    model: Model, only: str, shapes: Mapping[str, TensorInfo]
) -> tuple[list[LinearOp], list[Skip]]:
    """The operators of a name that have stored weights; and those of that kind that have none, and why."""
    found: list[LinearOp] = []
    skipped: list[Skip] = []
    for node in model.nodes:
        if node.op not in LINEAR or not fnmatchcase(site_name(node), only):
            continue
        op = linear_op(model, node, shapes)
        if isinstance(op, str):
            skipped.append(Skip((site_name(node),), op))
        else:
            found.append(op)
    return found, skipped


def stored_weights(model: Model, only: str, context: Context) -> tuple[list[Weight], list[Skip]]:
    """The weights that can be replaced by others of the same shape, in the order of their first operators."""
    feed = next(iter(context.calibration.fit)).feed
    ops, skipped = linear_ops(model, only, model.shapes(feed))
    by_tensor: dict[Tensor, list[LinearOp]] = {}
    for op in ops:
        by_tensor.setdefault(op.weight_tensor, []).append(op)
    weights: list[Weight] = []
    for tensor, own in by_tensor.items():
        if reason := _other_user(model, tensor, own):
            skipped += [Skip((op.name,), f"its weight is also {reason}") for op in own]
        else:
            weights.append(Weight(tensor.name, tuple(own), math.prod(weight_type(model, tensor)[1])))
    trial = model.copy()
    for weight in weights:
        trial.set_weight(trial.tensor(weight.tensor), np.zeros_like(weight.read(model)))
    outputs = [name for weight in weights for name in weight.outputs]
    refused = unmeasurable(model, trial, outputs, context)
    usable = []
    for weight in weights:
        reasons = [
            Skip((op.name,), refused[y])
            for op, y in zip(weight.ops, weight.outputs, strict=True)
            if y in refused
        ]
        skipped += reasons
        if not reasons:
            usable.append(weight)
    return usable, skipped


def _other_user(model: Model, tensor: Tensor, ops: Collection[LinearOp]) -> str | None:
    """What else a weight is, beside the weight of these operators."""
    known = {op.node for op in ops}
    if model.is_output(tensor):
        return "an output of the graph"
    if model.captured(tensor):
        return "used by the body of another node"
    for node in model.consumers(tensor):
        if node not in known or sum(1 for used in node.inputs if used is tensor) > 1:
            return f"used by {node.label}"
    return None


def unmeasurable(model: Model, trial: Model, outputs: Sequence[str], context: Context) -> dict[str, str]:
    """Which rewritten operators of `trial`, by what their nodes compute, can't be told how far off they are;
    and why."""
    feed = next(iter(context.calibration.fit)).feed
    nodes = {producer(trial, name): name for name in outputs}
    sites, skipped = refit_sites(context.original, trial, (), None, feed, before=model, fixed=nodes)
    measured = {nodes.get(site.op.node) for site in sites}
    reasons = {skip.nodes[0]: skip.reason for skip in skipped}
    unknown = "its output can't be compared with the original's"
    return {
        name: reasons.get(site_name(node), unknown) for node, name in nodes.items() if name not in measured
    }


def walked(
    before: Model, rewritten: Model, nodes: Collection[Node], options: OperatorOptions, context: Context
) -> tuple[list[Solved], list[Skip]]:
    """Solve what is behind the rewritten `nodes`, and their biases; without `refit` only measure them."""
    feed = next(iter(context.calibration.fit)).feed
    sites, skipped = refit_sites(
        context.original, rewritten, (), options.mask, feed, before=before, fixed=nodes
    )
    if not options.refit:
        sites, skipped = [replace(site, how="keep") for site in sites if site.op.node in nodes], []
    solved = walk(
        context.original,
        rewritten,
        sites,
        context.calibration,
        context.runtime,
        seed=context.seed,
        progress=context.progress,
    )
    return solved, skipped


def rewrite_change(
    names: Sequence[str], what: str, nodes: Collection[Node], solved: Sequence[Solved], **detail: Json
) -> Change:
    """The report's line for one rewritten weight: what became of it, and how far the worst of its operators'
    outputs is off."""
    relative = max(item.relative for item in solved if item.site.op.node in nodes)
    return Change(
        tuple(names), f"{what}, relative error {relative:.3g}", {**detail, "relative_error": relative}
    )


def within_bound(
    levels: Sequence[Level],
    make: Callable[[Level], M],
    context: Context,
    *,
    goal: str,
    said: Callable[[Level], str],
) -> tuple[M | None, list[str]]:
    """What `make` makes of the last of `levels`, which go from mild to harsh, that the bound on the output
    error allows: by bisection; and notes.

    Args:
        goal: name of the option that would say how far to go.
        said: a level in words.
    """
    if not context.calibration.held_out.samples:
        return None, [f"no held-out samples to hold the error bound on; give {goal} instead"]
    bound, which = error_bound(context)
    errors: dict[int, float] = {}

    def attempt(count: int) -> M | None:
        made, errors[count] = probe(lambda: make(levels[count - 1]), context)
        context.journal("probe", level=levels[count - 1], output_error=errors[count])
        return made if errors[count] <= bound else None

    best, count = longest(len(levels), (len(levels) + 1) // 2, attempt)
    if best is None:
        return None, [f"not even {said(levels[0])} is within {bound:g} ({which})"]
    note = f"{said(levels[count - 1])}: held-out output error within {bound:g} ({which})"
    if count + 1 in errors:
        note += f"; with {said(levels[count])} it would be {errors[count + 1]:.3g}"
    return best, [note]


def result(made: Rewritten, skipped: Sequence[Skip], notes: list[str]) -> PassResult:
    """The pass's result. Every rewritten operator comes with a prediction, and so does all that the walk
    moved."""
    own = set(made.nodes)
    claimed = [item for item in made.solved if item.ridge is not None or item.site.op.node in own]
    refits = [refit_change(item) for item in claimed if item.site.op.node not in own]
    return PassResult(
        made.model,
        made.changes + refits,
        list(dict.fromkeys([*skipped, *made.skipped])),
        [item.prediction() for item in claimed],
        notes,
    )
