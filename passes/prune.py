"""The smallest weights become zero (APPROXIMATE).

Unstructured magnitude pruning, with one threshold for all operators or the same share in each. It is the
plainest comparator there is: nothing is asked of the samples but how far it may go and what the biases, and
the operators that are not pruned, can make up for.

Shapes stay, so neither latency nor the plain file shrinks; the packed (gzipped) one does. Operators with
zeros are marked (`onnxfuse.ir.marks`), so that whoever fits or trains them later keeps the zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from onnxfuse.findings import Json
from onnxfuse.fitting.rewriting import (
    OperatorOptions,
    finished,
    named,
    nothing,
    within_bound,
)
from onnxfuse.fitting.search import SearchResult
from onnxfuse.fitting.sites import check_mask
from onnxfuse.fitting.stored_values import made_up_for, value_weights
from onnxfuse.ir.marks import ZEROS, keep
from onnxfuse.ir.model import Model
from onnxfuse.ops.shared_weights import AnyWeight
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.goals import Share, gone_of_all

SPARSITY_LEVELS = tuple(level / 100 for level in range(5, 100, 5))
"""Shares that are tried where only the error bound says how far to go."""


class PruneOptions(OperatorOptions):
    """Options of `prune`."""

    goals: ClassVar = {"amount": gone_of_all}

    amount: Share | None = Field(
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

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite."""
        check_mask(model, self.options.mask)
        weights, skipped = value_weights(model, self.options.only, context)
        if not weights:
            where = named(self.options.only)
            return nothing(model, skipped, f"no weight of this model{where} can be pruned")
        if self.options.amount is not None:
            found = SearchResult(self._pruned(model, weights, self.options.amount, context))
        else:
            found = within_bound(
                SPARSITY_LEVELS,
                lambda amount: self._pruned(model, weights, amount, context),
                context,
                self.options,
                lambda amount: f"{amount:g} of the weights zero",
            )
        return finished(model, found, skipped, "as many weights are zero already")

    def _pruned(
        self, model: Model, weights: Sequence[AnyWeight], amount: float, context: Context
    ) -> PassResult:
        """The model with this share of the weights zero."""
        made = model.copy()
        sizes = [absolute_values(weight.read(model)) for weight in weights]
        if self.options.scope == "global":
            chosen = smallest_mask(np.concatenate(sizes), round(amount * sum(map(len, sizes))))
            zero = np.split(chosen, np.cumsum([len(own) for own in sizes])[:-1])
        else:
            zero = [smallest_mask(own, round(amount * len(own))) for own in sizes]
        for weight, own in zip(weights, zero, strict=True):
            if own.any():
                value = weight.read(model).copy()
                value.reshape(-1)[own] = 0
                made.set_weight(made.tensor(weight.tensor.name), value)
                for node in weight.nodes(made):
                    keep(node, ZEROS)
        if not any(old[own].any() for own, old in zip(zero, sizes, strict=True)):
            return PassResult(made)
        nodes = [
            n for weight, own in zip(weights, zero, strict=True) if own.any() for n in weight.nodes(made)
        ]
        after = made_up_for(model, made, nodes, context, mask=self.options.mask, refit=self.options.refit)
        changes = []
        for weight, own, old in zip(weights, zero, sizes, strict=True):
            if old[own].any():
                zeros = int(np.count_nonzero(own))
                what = f"{zeros / weight.size:.3g} of {weight.size} weights zero"
                detail: dict[str, Json] = {"weight": weight.tensor.name, "zeros": zeros, "size": weight.size}
                changes.append(after.change(weight, what, **detail))
        result = after.result(changes)
        count = sum(int(np.count_nonzero(weight.read(made) == 0)) for weight in weights)
        total = sum(weight.size for weight in weights)
        packed = "neither latency nor the plain file shrinks, the packed one does"
        result.notes.append(f"{count} of {total} weights are zero: {packed}")
        return result


def absolute_values(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """|value|, flat, in a type that NumPy sorts."""
    return np.abs(value.reshape(-1).astype(np.float64 if value.dtype == np.float64 else np.float32))


def smallest_mask(sizes: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
    """A mask of the `count` smallest of `sizes` (n,); of equal ones the first."""
    if count == 0:
        return np.zeros(len(sizes), bool)
    edge = np.partition(sizes, count - 1)[count - 1]
    found = sizes < edge
    ties = np.flatnonzero(sizes == edge)
    found[ties[: count - np.count_nonzero(found)]] = True
    return found
