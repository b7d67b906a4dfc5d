"""Few distinct values in each weight (APPROXIMATE).

Weight sharing (Han et al. 2016): the weights of an operator are clustered by k-means on the line
(`onnxfuse.numerics.kmeans`), and each becomes its cluster's center. Shapes stay, so latency does. The file
shrinks when packed (gzipped), or, with a codebook, as it is: the operator's weight is then computed as
table[index], which ONNX Runtime does once, when it loads the model.

Operators that are clustered are marked (`onnxfuse.ir.marks`), so that whoever fits or trains them later keeps
equal weights equal. One that is clustered already stays as it is, and zeros of a pruned one stay zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from pydantic import Field

from onnxfuse.findings import Json
from onnxfuse.fitting.rewriting import (
    OperatorOptions,
    finished,
    first_feed,
    named,
    nothing,
    within_bound,
)
from onnxfuse.fitting.search import SearchResult
from onnxfuse.fitting.sites import check_mask
from onnxfuse.fitting.stored_values import made_up_for, value_weights
from onnxfuse.ir.editing import PASS_KEY
from onnxfuse.ir.marks import VALUES, ZEROS, keep, promises
from onnxfuse.ir.model import Model
from onnxfuse.numerics.kmeans import kmeans, nearest
from onnxfuse.ops.layouts import source
from onnxfuse.ops.shared_weights import AnyWeight
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.runtime.observed_shapes import shapes_on

CODEBOOK_LEVELS = tuple(2**bits for bits in range(8, 0, -1))
"""Numbers of values that are tried where only the error bound says how few."""


class ClusterOptions(OperatorOptions):
    """Options of `cluster`."""

    goals: ClassVar = {"values": None}

    values: Annotated[int, Field(ge=2, le=65536)] | None = Field(
        None, description="distinct values in each weight; default: as few as the error bound allows"
    )
    amount: float = Field(
        1.0, gt=0, le=1, description="share of the weights that is clustered, operators of least error first"
    )
    codebook: bool = Field(
        False,
        description="store a table and indices in place of the weights: the plain file shrinks too, but to "
        "later passes such a weight is computed, and most refuse it",
    )

    def partly(self, share: float, done: float = 0.0) -> Mapping[str, object] | None:
        """See `PassOptions.partly`; operators that are clustered already count."""
        return {"amount": self.amount * share} if share > done else None


@dataclass(frozen=True, eq=False)
class _Clustered:
    """A weight with few values.

    Attributes:
        weight: the weight.
        value: its new value, in the operators' own layout.
        count: number of different values.
        error: squared error of the weight, relative to that of zeros.
    """

    weight: AnyWeight
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

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite."""
        check_mask(model, self.options.mask)
        weights, skipped = value_weights(model, self.options.only, context)
        done, coded = _coded(model, self.options.only, context)
        skipped = [skip for skip in skipped if skip.nodes[0] not in coded]
        if not weights and not coded:
            where = named(self.options.only)
            return nothing(model, skipped, f"no weight of this model{where} can be clustered")
        if self.options.values is not None:
            found = SearchResult(self._clustered(model, weights, done, self.options.values, context))
        else:
            found = within_bound(
                CODEBOOK_LEVELS,
                lambda values: self._clustered(model, weights, done, values, context),
                context,
                self.options,
                lambda values: f"{values} values",
            )
        if found.made is not None and found.made.changes:
            found.notes.append(self._stored(found.made.model, weights))
        return finished(model, found, skipped, "as much is clustered already")

    def _clustered(
        self, model: Model, weights: Sequence[AnyWeight], done: int, values: int, context: Context
    ) -> PassResult:
        """The model with so many values in each weight, as far as `amount` goes.

        Args:
            model: stays as it is.
            weights: those that may be clustered.
            done: number of elements that an earlier run has put into codebooks.
            values: most in each weight.
            context: of the pass.
        """
        total = done + sum(weight.size for weight in weights)
        fresh = []
        for weight in weights:
            if _is_done(model, weight, values):
                done += weight.size
            else:
                fresh.append(_by_kmeans(model, weight, values))
        chosen = []
        for item in sorted(fresh, key=lambda item: item.error):
            if done < self.options.amount * total * (1 - 1e-9):
                chosen.append(item)
                done += item.weight.size
        made = model.copy()
        if not chosen:
            return PassResult(made)
        for item in chosen:
            made.set_weight(made.tensor(item.weight.tensor.name), item.value)
            for node in item.weight.nodes(made):
                keep(node, VALUES)
        nodes = [node for item in chosen for node in item.weight.nodes(made)]
        after = made_up_for(model, made, nodes, context, mask=self.options.mask, refit=self.options.refit)
        changes = []
        for item in chosen:
            weight = item.weight
            detail: dict[str, Json] = {"weight": weight.tensor.name, "size": weight.size}
            detail |= {"values": item.count, "weight_error": item.error}
            what = f"{item.count} values for {weight.size} weights"
            changes.append(after.change(weight, what, **detail))
        return after.result(changes)

    def _stored(self, made: Model, weights: Sequence[AnyWeight]) -> str:
        """Put clustered weights into codebooks, if asked for; a note on what shrinks."""
        if not self.options.codebook:
            return "neither latency nor the plain file shrinks, the packed one does"
        for weight in weights:
            if VALUES in promises(weight.nodes(made)[0]):
                _code(made, weight)
        made.prune()
        return "weights are stored as tables and indices: the file shrinks, latency does not"


def _is_done(model: Model, weight: AnyWeight, values: int) -> bool:
    """Whether an earlier run has left a weight with no more values than that."""
    if not any(VALUES in promises(node) for node in weight.nodes(model)):
        return False
    return len(np.unique(weight.read(model))) <= values


def _by_kmeans(model: Model, weight: AnyWeight, values: int) -> _Clustered:
    """A weight with at most so many values; zeros of a pruned one are one of them."""
    value = weight.read(model)
    flat = value.reshape(-1).astype(np.float64)
    pruned = any(ZEROS in promises(node) for node in weight.nodes(model))
    stays = (flat == 0) & pruned
    centers = kmeans(flat[~stays], values - int(stays.any()))
    centers = np.unique(centers.astype(value.dtype).astype(np.float64))
    table = np.union1d(centers, [0.0]) if stays.any() else centers
    index = np.full(len(flat), np.searchsorted(table, 0.0))
    index[~stays] = np.searchsorted(table, centers)[nearest(flat[~stays], centers)]
    scale, off = float(np.vdot(flat, flat)), flat - table[index]
    error = float(np.vdot(off, off)) / scale if scale > 0 else 0.0
    return _Clustered(weight, table[index].astype(value.dtype).reshape(value.shape), len(table), error)


def _coded(model: Model, only: str, context: Context) -> tuple[int, set[str]]:
    """Number of elements that an earlier run has put into codebooks, and names of their operators."""
    shapes = shapes_on(model, first_feed(context), context.runtime)
    sizes: dict[str, int] = {}
    names: set[str] = set()
    for node in model.nodes:
        if VALUES not in promises(node) or not fnmatchcase(node.site_name, only):
            continue
        for tensor in (source(model, tensor) for tensor in node.inputs):
            codebook = model.producer(tensor)
            if codebook is None or codebook.op != "Gather" or codebook.metadata.get(PASS_KEY) != Cluster.name:
                continue
            shape = shapes[tensor.name].shape
            if shape is not None:
                names.add(node.site_name)
                sizes[tensor.name] = math.prod(size for size in shape if isinstance(size, int))
    return sum(sizes.values()), names


def _code(model: Model, weight: AnyWeight) -> None:
    """Put a table and indices in a weight's place."""
    value = weight.read(model)
    table, index = np.unique(value.reshape(-1).astype(np.float64), return_inverse=True)
    small = np.uint8 if len(table) <= 256 else np.uint16
    nodes, old = weight.nodes(model), model.tensor(weight.tensor.name)
    made: dict[str, Any] = {"by": Cluster.name, "replaces": [node.site_name for node in nodes]}
    stored = model.add_weight(f"{weight.tensor.name}_index", index.astype(small).reshape(value.shape))
    names = [f"{weight.tensor.name}_{what}" for what in ("index_cast", "values")]
    # Gather takes no small integers.
    wide = model.add_node("Cast", [stored], names[:1], {"to": TensorProto.INT32}, names[0], **made)
    entries = [model.add_weight(f"{weight.tensor.name}_table", table.astype(value.dtype)), wide.outputs[0]]
    values = model.add_node("Gather", entries, names[1:], {"axis": 0}, names[1], **made)
    for user in model.consumers(old):
        user.inputs = [values.outputs[0] if tensor is old else tensor for tensor in user.inputs]
