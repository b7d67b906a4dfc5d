"""Steps that passes share which rewrite linear operators: which ones, the walk after, and the result.

A pass that replaces weights one by one (a weight that several operators share is one) leaves the rest to
`onnxfuse.fitting.walk`: rewritten operators keep their weights and get the bias that is best for them,
everything else behind is solved again. Each rewritten operator is a site of that walk, so each comes with a
prediction of its error; one that can't be a site is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, TypeVar

from pydantic import Field

from onnxfuse.channels.consumers import RowView
from onnxfuse.channels.moments_seen import Known, statistics
from onnxfuse.data.rows import few_rows
from onnxfuse.findings import Change, Json, Skip
from onnxfuse.fitting.search import Level, SearchResult, farthest
from onnxfuse.fitting.sites import RefitSite, refit_sites
from onnxfuse.fitting.walk import Solved, refit_change, walk
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.linear import LINEAR_OPERATORS, LinearOp, is_main_domain, linear_op
from onnxfuse.ops.shared_weights import multiplied
from onnxfuse.pipeline.base import Context, PassResult
from onnxfuse.pipeline.goals import Goals
from onnxfuse.runtime.memory import in_budget
from onnxfuse.runtime.observed_shapes import shapes_on

ROWS = 2
"""Samples for shapes: with one alone its axis would look like one that is broadcast."""

T = TypeVar("T")

Mask = Annotated[
    str | None,
    Field(description="graph input that is 0 where a token is padding; those rows are left out"),
]


class OperatorOptions(Goals):
    """Options that passes over single operators share."""

    only: str = Field("*", description="pattern: operators with matching names")
    refit: bool = Field(
        True, description="refit the operators behind, and the biases of those that are rewritten"
    )
    mask: Mask = None


def first_feed(context: Context) -> Feed:
    """The first of the fit samples, for shapes: few of them, for they may have to be run."""
    return few_rows(context.original, context.calibration.fit, ROWS, context.runtime)


def known_shapes(context: Context) -> dict[str, TensorInfo]:
    """Types and shapes of the original's tensors, completed by a run of the first fit samples."""
    return shapes_on(context.original, first_feed(context), context.runtime)


def named(only: str, how: str = "with a name") -> str:
    """The words " `how` matching `only`"; none where all match."""
    return "" if only == "*" else f" {how} matching '{only}'"


# Which operators ------------------------------------------------------------------------------------


def linear_ops(
    model: Model, only: str, shapes: Mapping[str, TensorInfo]
) -> tuple[list[LinearOp], list[Skip]]:
    """The linear operators with stored weights; and those of their kind that have none, and whatever else
    has weights, with the reason that it isn't one.

    Args:
        model: is left as it is.
        only: pattern that their names match.
        shapes: see `ops.linear.linear_op`.
    """
    found: list[LinearOp] = []
    skipped: list[Skip] = []
    for node in model.nodes:
        linear = is_main_domain(node) and node.op in LINEAR_OPERATORS
        if not (linear or multiplied(model, node)) or not fnmatchcase(node.site_name, only):
            continue
        op = linear_op(model, node, shapes)
        if isinstance(op, str):
            skipped.append(Skip((node.site_name,), op))
        else:
            found.append(op)
    return found, skipped


def unmeasurable(model: Model, trial: Model, nodes: Collection[Node], context: Context) -> dict[Node, str]:
    """The rewritten operators whose error can't be predicted, and why.

    Args:
        model: before.
        trial: after, perhaps with other numbers than in the end.
        nodes: the rewritten operators of `trial`.
        context: of the pass.
    """
    sites, skipped = refit_sites(
        context.original, trial, (), None, known_shapes(context), before=model, fixed=nodes
    )
    measured = {site.op.node for site in sites}
    reasons = {skip.nodes[0]: skip.reason for skip in skipped}
    unknown = "its output can't be compared with the original's"
    return {node: reasons.get(node.site_name, unknown) for node in nodes if node not in measured}


# What they see ------------------------------------------------------------------------------------


def seen_in_parts(
    model: Model,
    views: Mapping[T, Sequence[RowView]],
    mask: str | None,
    context: Context,
    judged: int = 0,
) -> Iterator[tuple[list[T], Known]]:
    """Readers with the statistics of what they read over the fit samples, in as many runs as memory asks for.

    Args:
        model: to run.
        views: what each reader reads.
        mask: see `Mask`.
        context: of the pass.
        judged: what trials are given as their number of samples (`Trials.of`), 0 without any.

    Raises:
        InputError: bad samples.
        NotApplicableError: activations that are not finite.
    """
    samples = context.calibration.apart(judged) if judged else None
    budget = context.calibration.budget
    for part in in_budget(views, lambda reader: _covariances(views[reader]), budget.sums):
        yield (
            part,
            statistics(
                model,
                [view for reader in part for view in views[reader]],
                context.calibration.fit if samples is None else samples.fit,
                context.runtime,
                judged=None if samples is None else samples.held_out,
                seed=context.seed,
                mask=mask,
                budget=budget,
                progress=context.progress,
            ),
        )


def _covariances(views: Sequence[RowView]) -> dict[RowView, int]:
    return {view: 16 * view.columns**2 for view in views if view.correlated}


# The walk, and what comes of it -------------------------------------------------------------------


def walked(
    before: Model,
    rewritten: Model,
    context: Context,
    *,
    mask: str | None,
    refit: bool = True,
    fixed: Collection[Node] = (),
    kept: Collection[Node] = (),
    fresh: Sequence[tuple[Node, str]] = (),
    ridge: float | None = None,
    paper: bool = False,
    quick: bool = False,
) -> tuple[list[Solved], list[Skip]]:
    """Solve what is behind a rewrite; the sites, and the operators behind that are none.

    Args:
        before: the model that was rewritten.
        rewritten: the result; gets new weights.
        context: of the pass.
        mask: see `Mask`.
        refit: without it fresh operators are solved, fixed ones measured, and nothing else is touched.
        fixed: see `fitting.sites.refit_sites`.
        kept: nodes that are fixed and keep their biases, too: they are only measured.
        fresh: see `fitting.sites.refit_sites`.
        ridge: see `fitting.walk.walk`.
        paper: see `fitting.walk.walk`.
        quick: see `fitting.walk.walk`.

    Raises:
        InputError: bad samples.
        NotApplicableError: activations that are not finite.
    """
    sites, skipped = refit_sites(
        context.original, rewritten, fresh, mask, known_shapes(context), before=before, fixed=[*fixed, *kept]
    )
    sites = [replace(site, how="keep") if site.op.node in kept else site for site in sites]
    if not refit:
        sites, skipped = _alone(sites, [*fixed, *kept]), []
    solved = walk(
        context.original,
        rewritten,
        sites,
        context.calibration,
        context.runtime,
        seed=context.seed,
        ridge=ridge,
        paper=paper,
        quick=quick,
        progress=context.progress,
    )
    return solved, skipped


def _alone(sites: Sequence[RefitSite], fixed: Collection[Node]) -> list[RefitSite]:
    own = (site for site in sites if site.how == "fresh" or site.op.node in fixed)
    return [site if site.how == "fresh" else replace(site, how="keep") for site in own]


def rewrite_change(
    names: Sequence[str],
    what: str,
    nodes: Collection[Node],
    solved: Sequence[Solved],
    others: Mapping[Node, float] | None = None,
    **detail: Json,
) -> Change:
    """The report's line for one rewritten weight.

    Args:
        names: of its operators.
        what: the rewrite in words.
        nodes: its operators' nodes; the line gives the worst of their relative errors.
        solved: sites of the walk.
        others: relative errors of nodes that are no sites.
        detail: figures.
    """
    errors = {item.site.op.node: item.relative for item in solved} | dict(others or {})
    relative = max(errors[node] for node in nodes)
    return Change(
        tuple(names), f"{what}, relative error {relative:.3g}", {**detail, "relative_error": relative}
    )


def settled(
    model: Model,
    changes: Sequence[Change],
    solved: Sequence[Solved],
    skipped: Sequence[Skip],
    *,
    own: Collection[Node] = (),
    every: bool = False,
) -> PassResult:
    """A result in which every rewritten operator, and all that the walk moved, comes with a prediction.

    Args:
        model: the rewritten one.
        changes: lines for what the pass did.
        solved: sites of the walk.
        skipped: operators behind that are no sites.
        own: nodes whose errors `changes` give; what else was moved gets a line of its own.
        every: whether sites that stayed as they were come with a prediction, too.
    """
    moved = [item for item in solved if item.ridge is not None]
    lines = [refit_change(item) for item in moved if item.site.op.node not in own]
    claims = [
        item.prediction() for item in solved if every or item.ridge is not None or item.site.op.node in own
    ]
    return PassResult(model, [*changes, *lines], list(skipped), claims)


def within_bound(
    levels: Sequence[Level],
    make: Callable[[Level], PassResult],
    context: Context,
    options: Goals,
    said: Callable[[Level], str],
) -> SearchResult:
    """The outcome of `search.farthest` with notes that name levels by the words of `said`.

    Args:
        levels: from mild to harsh.
        make: the result at a level.
        context: of the pass.
        options: of the pass.
        said: how far a level goes, in words.
    """
    none = f"not even {said(levels[0])} is"
    return farthest(levels, make, context, options, said=said, none=lambda within, _: f"{none} {within}")


def finished(model: Model, found: SearchResult, skipped: Sequence[Skip], idle: str = "") -> PassResult:
    """The result of a pass.

    Args:
        model: the one it was given.
        found: what it made of that, if anything, and how far that is.
        skipped: what it refused beforehand.
        idle: the note where nothing was done and nothing is said of why.
    """
    made = found.made
    every = list(dict.fromkeys([*skipped, *([] if made is None else made.skipped)]))
    if made is None or not made.changes:
        return PassResult(model, skipped=every, notes=found.notes or [idle], reached=found.reached)
    return replace(made, skipped=every, notes=[*found.notes, *made.notes], reached=found.reached)


def nothing(model: Model, skipped: Sequence[Skip], note: str) -> PassResult:
    """The result of a pass that has nothing to do.

    Args:
        model: the one it was given.
        skipped: what it refused.
        note: why there is nothing to do.
    """
    return PassResult(model, skipped=list(skipped), notes=[note])
