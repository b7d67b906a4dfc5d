"""The smallest weights become zero (APPROXIMATE).

Unstructured magnitude pruning, with one threshold for all operators or the same share in each. It is the
plainest comparator there is: nothing is asked of the samples but how far it may go and what the biases, and
the operators that are not pruned, can make up for.

Shapes stay, so neither latency nor the plain file shrinks; the packed (gzipped) one does. Operators with
zeros are marked (`onnxfuse.marks`), so that whoever fits or trains them later keeps the zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from onnxfuse.findings import Json
from onnxfuse.graph import Model, Node
from onnxfuse.marks import ZEROS, keep
from onnxfuse.pass_manager import Context, Contract, Pass, PassResult
from onnxfuse.rewriting import (
    OperatorOptions,
    Rewritten,
    Weight,
    result,
    rewrite_change,
    stored_weights,
    walked,
    within_bound,
)
from onnxfuse.walk import check_mask

LEVELS = tuple(level / 100 for level in range(5, 100, 5))
"""Shares that are tried where only the error bound says how far to go."""


class PruneOptions(OperatorOptions):
    """Options of `prune`."""

    amount: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the weights that is zero afterwards; default: as the error bound allows"
    )
    scope: Literal["global", "layer"] = Field(
        "global", description="the smallest of all weights, or the same share of each operator's"
    )


class Prune(Pass):
    """Zeros in place of the smallest weights."""

    name = "prune"
    contract = Contract.APPROXIMATE
    summary = "set the smallest weights to zero; smaller only when packed"
    Options = PruneOptions
    options: PruneOptions
    packed = True
    example: ClassVar[str] = "prune:amount=0.5"

    def partly(self, share: float, done: float = 0.0) -> Prune | None:
        """See `Pass.partly`; zeros that are there already count."""
        amount = self.options.amount
        return None if amount is None or share <= 0 else self._with(amount=amount * share)

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite."""
        check_mask(model, self.options.mask)
        weights, skipped = stored_weights(model, self.options.only, context)
        if not weights:
            where = "" if self.options.only == "*" else f" with a name matching '{self.options.only}'"
            return PassResult(model, skipped=skipped, notes=[f"no weight of this model{where} can be pruned"])
        made: Rewritten | None
        notes: list[str] = []
        if self.options.amount is not None:
            made = self._made(model, weights, self.options.amount, context)
        else:
            made, notes = within_bound(
                LEVELS,
                lambda amount: self._made(model, weights, amount, context),
                context,
                goal="amount",
                said=lambda amount: f"{amount:g} of the weights zero",
            )
        if made is None or not made.changes:
            return PassResult(model, skipped=skipped, notes=notes or ["as many weights are zero already"])
        zeros = sum(int(np.count_nonzero(weight.read(made.model) == 0)) for weight in weights)
        total = sum(weight.size for weight in weights)
        packed = "neither latency nor the plain file shrinks, the packed one does"
        notes.append(f"{zeros} of {total} weights are zero: {packed}")
        return result(made, skipped, notes)

    def _made(self, model: Model, weights: Sequence[Weight], amount: float, context: Context) -> Rewritten:
        made = model.copy()
        sizes = [magnitudes(weight.read(model)) for weight in weights]
        if self.options.scope == "global":
            chosen = smallest(np.concatenate(sizes), round(amount * sum(map(len, sizes))))
            zero = np.split(chosen, np.cumsum([len(own) for own in sizes])[:-1])
        else:
            zero = [smallest(own, round(amount * len(own))) for own in sizes]
        by_weight: dict[Weight, list[Node]] = {}
        for weight, own in zip(weights, zero, strict=True):
            if not own.any():
                continue
            value = weight.read(model).copy()
            value.reshape(-1)[own] = 0
            made.set_weight(made.tensor(weight.tensor), value)
            by_weight[weight] = weight.nodes(made)
            for node in by_weight[weight]:
                keep(node, ZEROS)
        nodes = [node for own in by_weight.values() for node in own]
        pruned = [(w, own) for w, own, old in zip(weights, zero, sizes, strict=True) if old[own].any()]
        if not pruned:
            return Rewritten(made, nodes, [], [], [])
        solved, skipped = walked(model, made, nodes, self.options, context)
        changes = []
        for weight, own in pruned:
            zeros = int(np.count_nonzero(own))
            what = f"{zeros / weight.size:.3g} of {weight.size} weights zero"
            detail: dict[str, Json] = {"weight": weight.tensor, "zeros": zeros, "size": weight.size}
            changes.append(rewrite_change(weight.names, what, by_weight[weight], solved, **detail))
        return Rewritten(made, nodes, solved, skipped, changes)


def magnitudes(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """|value|, flat, in a type that NumPy sorts."""
    return np.abs(value.reshape(-1).astype(np.float64 if value.dtype == np.float64 else np.float32))


def smallest(sizes: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
    """Which of `sizes` are the `count` smallest; of equal ones the first."""
    if count == 0:
        return np.zeros(len(sizes), bool)
    edge = np.partition(sizes, count - 1)[count - 1]
    found = sizes < edge
    ties = np.flatnonzero(sizes == edge)
    found[ties[: count - np.count_nonzero(found)]] = True
    return found
