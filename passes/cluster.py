"""Few distinct values in each weight (APPROXIMATE).

Weight sharing (Han et al. 2016): the weights of an operator are clustered by k-means on the line
(`onnxfuse.quantisation`), and each becomes its cluster's centre. Shapes stay, so latency does. The file
shrinks when packed (gzipped), or, with a codebook, as it is: the operator's weight is then computed as
table[index], which ONNX Runtime does once, when it loads the model.

Operators that are clustered are marked (`onnxfuse.marks`), so that whoever fits or trains them later keeps
equal weights equal. One that is clustered already stays as it is, and zeros of a pruned one stay zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from pydantic import Field

from onnxfuse.graph import Model, Node
from onnxfuse.linear import LINEAR
from onnxfuse.marks import VALUES, ZEROS, keep, kept
from onnxfuse.pass_manager import Context, Contract, Json, Pass, PassResult
from onnxfuse.quantisation import kmeans, nearest
from onnxfuse.regions import site_name
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

LEVELS = tuple(2**bits for bits in range(8, 0, -1))
"""Numbers of values that are tried where only the error bound says how few."""


class ClusterOptions(OperatorOptions):
    """Options of `cluster`."""

    values: Annotated[int, Field(ge=2, le=65536)] | None = Field(
        None, description="distinct values in each weight; default: as few as the error bound allows"
    )
    amount: float = Field(
        1.0, gt=0, le=1, description="share of the weights that is clustered, operators of least error first"
    )
    codebook: bool = Field(
        False,
        description="store a table and indices in place of the weights: the plain file shrinks too, but to "
        "later passes such a weight is computed, and most refuse it (fold makes it a constant again)",
    )


@dataclass(frozen=True, eq=False)
class _Clustered:
    """A weight with its new value, the number of different ones in it, and its squared error relative to that
    of zeros."""

    weight: Weight
    value: npt.NDArray[Any]
    count: int
    error: float


class Cluster(Pass):
    """A few shared values in place of all weights."""

    name = "cluster"
    contract = Contract.APPROXIMATE
    summary = "let weights share a few values by k-means; smaller only when packed, or by a codebook"
    Options = ClusterOptions
    options: ClusterOptions
    packed = True
    example: ClassVar[str] = "cluster:values=16"

    def partly(self, share: float, done: float = 0.0) -> Cluster | None:
        """See `Pass.partly`; operators that are clustered already count."""
        return None if share <= 0 else self._with(amount=self.options.amount * share)

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite."""
        check_mask(model, self.options.mask)
        weights, skipped = stored_weights(model, self.options.only, context)
        done, coded = _coded(model, self.options.only, context)
        skipped = [skip for skip in skipped if skip.nodes[0] not in coded]
        if not weights and not coded:
            where = "" if self.options.only == "*" else f" with a name matching '{self.options.only}'"
            return PassResult(
                model, skipped=skipped, notes=[f"no weight of this model{where} can be clustered"]
            )
        made: Rewritten | None
        notes: list[str] = []
        if self.options.values is not None:
            made = self._made(model, weights, done, self.options.values, context)
        else:
            made, notes = within_bound(
                LEVELS,
                lambda values: self._made(model, weights, done, values, context),
                context,
                goal="values",
                said=lambda values: f"{values} values",
            )
        if made is None or not made.changes:
            return PassResult(model, skipped=skipped, notes=notes or ["as much is clustered already"])
        if self.options.codebook:
            for weight in weights:
                if VALUES in kept(weight.nodes(made.model)[0]):
                    _code(made.model, weight)
            made.model.prune()
            notes.append("weights are stored as tables and indices: the file shrinks, latency does not")
        else:
            notes.append("neither latency nor the plain file shrinks, the packed one does")
        return result(made, skipped, notes)

    def _made(
        self, model: Model, weights: Sequence[Weight], done: int, values: int, context: Context
    ) -> Rewritten:
        total = done + sum(weight.size for weight in weights)
        fresh = []
        for weight in weights:
            if _is_done(model, weight, values):
                done += weight.size
            else:
                fresh.append(_clustered(model, weight, values))
        chosen = []
        for item in sorted(fresh, key=lambda item: item.error):
            if done < self.options.amount * total * (1 - 1e-9):
                chosen.append(item)
                done += item.weight.size
        made = model.copy()
        if not chosen:
            return Rewritten(made, [], [], [], [])
        by_weight: dict[Weight, list[Node]] = {}
        for item in chosen:
            made.set_weight(made.tensor(item.weight.tensor), item.value)
            by_weight[item.weight] = item.weight.nodes(made)
            for node in by_weight[item.weight]:
                keep(node, VALUES)
        nodes = [node for own in by_weight.values() for node in own]
        solved, skipped = walked(model, made, nodes, self.options, context)
        changes = []
        for item in chosen:
            weight = item.weight
            detail: dict[str, Json] = {"weight": weight.tensor, "size": weight.size}
            detail |= {"values": item.count, "weight_error": item.error}
            what = f"{item.count} values for {weight.size} weights"
            changes.append(rewrite_change(weight.names, what, by_weight[weight], solved, **detail))
        return Rewritten(made, nodes, solved, skipped, changes)


def _is_done(model: Model, weight: Weight, values: int) -> bool:
    """Whether an earlier run has left it with no more values than that."""
    if not any(VALUES in kept(node) for node in weight.nodes(model)):
        return False
    return len(np.unique(weight.read(model))) <= values


def _clustered(model: Model, weight: Weight, values: int) -> _Clustered:
    value = weight.read(model)
    flat = value.reshape(-1).astype(np.float64)
    pruned = any(ZEROS in kept(node) for node in weight.nodes(model))
    stays = (flat == 0) & pruned
    centres = kmeans(flat[~stays], values - int(stays.any()))
    centres = np.unique(centres.astype(value.dtype).astype(np.float64))
    table = np.union1d(centres, [0.0]) if stays.any() else centres
    index = np.full(len(flat), np.searchsorted(table, 0.0))
    index[~stays] = np.searchsorted(table, centres)[nearest(flat[~stays], centres)]
    scale, off = float(np.vdot(flat, flat)), flat - table[index]
    error = float(np.vdot(off, off)) / scale if scale > 0 else 0.0
    return _Clustered(weight, table[index].astype(value.dtype).reshape(value.shape), len(table), error)


def _coded(model: Model, only: str, context: Context) -> tuple[int, set[str]]:
    """How many weights an earlier run has put into codebooks, and the operators that they belong to."""
    shapes = model.shapes(next(iter(context.calibration.fit)).feed)
    sizes: dict[str, int] = {}
    names: set[str] = set()
    for node in model.nodes:
        if node.op not in LINEAR or VALUES not in kept(node) or not fnmatchcase(site_name(node), only):
            continue
        shape = shapes[node.inputs[1].name].shape
        if not model.is_weight(node.inputs[1]) and shape is not None:
            names.add(site_name(node))
            sizes[node.inputs[1].name] = math.prod(size for size in shape if isinstance(size, int))
    return sum(sizes.values()), names


def _code(model: Model, weight: Weight) -> None:
    """Put a table and indices in a weight's place."""
    value = weight.read(model)
    table, index = np.unique(value.reshape(-1).astype(np.float64), return_inverse=True)
    small = np.uint8 if len(table) <= 256 else np.uint16
    nodes = weight.nodes(model)
    made: dict[str, Any] = {"by": Cluster.name, "replaces": [site_name(node) for node in nodes]}
    stored = model.add_weight(f"{weight.tensor}_index", index.astype(small).reshape(value.shape))
    names = [f"{weight.tensor}_{what}" for what in ("index_cast", "values")]
    # Gather takes no small integers.
    wide = model.add_node("Cast", [stored], names[:1], {"to": TensorProto.INT32}, names[0], **made)
    entries = [model.add_weight(f"{weight.tensor}_table", table.astype(value.dtype)), wide.outputs[0]]
    values = model.add_node("Gather", entries, names[1:], {"axis": 0}, names[1], **made)
    for node in nodes:
        node.inputs[1] = values.outputs[0]
