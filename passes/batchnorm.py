"""batchnorm: put BatchNormalization back behind convolutions, without a change of the function (EXACT).

Exporters fold BatchNormalization into the convolution before it, and deep networks without it retrain badly.
With m and s^2 the mean and variance of a channel of the convolution's output y over the calibration samples,

    y = scale (y - m) / sqrt(s^2 + eps) + bias    for    scale = sqrt(s^2 + eps), bias = m,

so a BatchNormalization with these four is the identity as long as it uses its running statistics, and behaves
as one that was trained as soon as it uses those of a batch. `fold` removes it again.

All statistics come from one run of the network, which keeps nothing but sums.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
from pydantic import Field

from onnxfuse.analysis.normalization import CONVOLUTIONS, normalized_by
from onnxfuse.data.batch_axes import batch_axes
from onnxfuse.data.calibration import Batch
from onnxfuse.data.rows import first_rows
from onnxfuse.errors import NotApplicableError
from onnxfuse.findings import Change, Json, Skip
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Variable
from onnxfuse.ops.linear import LinearOp, is_main_domain, linear_op
from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult
from onnxfuse.runtime.observe import TappedModel, observe

NAME = "batchnorm"
NAMED = CONVOLUTIONS.names | {"Gemm"}

EPSILON = float(np.float32(1e-5))
"""PyTorch's default, as the attribute stores it."""

BN_MOMENTUM = 0.9
"""The share of a running statistic that a training step leaves: PyTorch's default, 0.1, by its other name."""

TAPPED = 256 << 20
"""Bytes of outputs that one run may return; larger batches are fed in pieces."""

_BLOCK = 1 << 16  # elements widened to float64 at a time, so that they stay in the cache


class BatchnormOptions(PassOptions):
    """Options of `batchnorm`."""

    only: str | None = Field(
        None,
        description="pattern: operators (Conv, ConvTranspose, Gemm) with matching names; "
        "default: every Conv and ConvTranspose",
    )


class Batchnorm(Pass):
    """An identity BatchNormalization behind each chosen operator that has none."""

    name = NAME
    contract = Contract.EXACT
    grows = True
    summary = "puts a BatchNormalization that changes nothing behind convolutions, for retraining"
    Options = BatchnormOptions
    options: BatchnormOptions
    example: ClassVar[str] = "batchnorm:only=layer1*"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for a model that ONNX Runtime can't run."""
        sites, skipped = self._sites(model)
        changes: list[Change] = []
        for op, moments in zip(sites, _output_moments(model, sites, context), strict=True):
            parameters = _parameters(moments, op.dtype)
            if isinstance(parameters, str):
                skipped.append(Skip((op.name,), parameters))
            else:
                changes.append(_insert(model, op, parameters))
        return PassResult(model, changes, skipped, notes=[] if changes else [self._idle(skipped)])

    def _sites(self, model: Model) -> tuple[list[LinearOp], list[Skip]]:
        """The operators to put one behind, and those that can't or need not have one."""
        sites: list[LinearOp] = []
        skipped: list[Skip] = []
        for node in model.nodes:
            if not self._is_chosen(node.site_name, node.op) or not is_main_domain(node):
                continue
            op = linear_op(model, node, transposed=True)
            if isinstance(op, str):
                skipped.append(Skip((node.site_name,), op))
            elif op.dtype.kind != "f":
                skipped.append(Skip((op.name,), f"statistics of {op.dtype} are not kept"))
            elif normalizer := normalized_by(model, op.nodes[-1].outputs[0]):
                skipped.append(Skip((op.name,), f"{normalizer} follows already"))
            else:
                sites.append(op)
        return sites, skipped

    def _is_chosen(self, name: str, op: str) -> bool:
        if self.options.only is None:
            return op in CONVOLUTIONS.names
        return op in NAMED and fnmatchcase(name, self.options.only)

    def _idle(self, skipped: Sequence[Skip]) -> str:
        """The reason why there was nothing to do."""
        if skipped:
            first = f"'{skipped[0].nodes[0]}', {skipped[0].reason}"
            return f"nowhere to insert one; the first of {len(skipped)} operators is {first}"
        if self.options.only is None:
            return "the main graph has no Conv or ConvTranspose"
        return (
            f"no Conv, ConvTranspose or Gemm of the main graph has a name that matches '{self.options.only}'"
        )


class _Moments:
    """Mean and variance of each channel (axis 1), streamed in float64.

    The sums are about the mean of the first values: about a point amid the data, squares lose no digits to a
    mean that is large beside the spread.
    """

    def __init__(self) -> None:
        self.n = 0
        self._shift = self._sum = self._square = np.zeros(0)

    def add(self, y: np.ndarray) -> None:
        """Take in (N, C) or (N, C, *S)."""
        if not y.size:
            return
        values = y.reshape(*y.shape[:2], -1)
        step = max(1, _BLOCK // values[0].size)
        for start in range(0, len(values), step):
            block = values[start : start + step].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):  # what isn't finite is refused in the end
                if not self.n:
                    self._shift = block.mean(axis=(0, 2))
                    self._sum, self._square = np.zeros((2, len(self._shift)))
                block -= self._shift[:, None]
                self._sum += np.einsum("ncp->c", block)
                self._square += np.einsum("ncp,ncp->c", block, block)
            self.n += block.shape[0] * block.shape[2]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (C,) of the population, as BatchNormalization has it."""
        with np.errstate(invalid="ignore", over="ignore"):
            offset = self._sum / self.n
            return self._shift + offset, np.maximum(self._square / self.n - offset**2, 0.0)


def _output_moments(model: Model, sites: Sequence[LinearOp], context: Context) -> list[_Moments]:
    """Moments of the output of every site over the fit samples."""
    if not sites:
        return []
    batches = context.calibration.fit
    advance = context.progress.task("calibrating", total=len(batches))
    found = {op.y: _Moments() for op in sites}
    tapped = TappedModel(model, found, context.runtime)

    def add(batch: Batch, seen: Feed) -> None:
        for name, moments in found.items():
            moments.add(seen[name])

    rows: int | None = None
    for batch in batches:
        rows = rows or _rows_at_once(model, tapped, list(found), batch)
        observe(tapped, _pieces(model, batch, rows), [add])
        advance()
    return [found[op.y] for op in sites]


def _rows_at_once(model: Model, tapped: TappedModel, tensors: Sequence[str], batch: Batch) -> int:
    """The number of samples that give about `TAPPED` bytes; no limit where the model takes no single one."""
    one = first_rows(model, batch, 1)
    if one is not None:
        with contextlib.suppress(NotApplicableError):  # a Reshape inside can fix the size of a batch
            seen = tapped.run(one)
            return max(1, TAPPED // max(sum(seen[name].nbytes for name in tensors), 1))
    return sys.maxsize


def _pieces(model: Model, batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in pieces of at most `rows` samples."""
    if rows >= batch.samples:
        yield batch
        return
    axes = batch_axes(model.inputs)
    for start in range(0, batch.samples, rows):
        part = range(start, min(start + rows, batch.samples))
        feed = dict(batch.feed)
        for name, axis in axes.items():
            if axis is not None and feed[name].ndim > axis:  # an input of unknown rank may be a scalar
                feed[name] = feed[name].take(part, axis=axis)
        yield replace(batch, feed=feed, samples=len(part))


def _parameters(moments: _Moments, dtype: np.dtype) -> tuple[np.ndarray, ...] | str:
    """Scale, bias, mean and variance (C,) as stored, or why they can't be."""
    if not moments.n:
        return "its output is empty on the calibration samples"
    mean, variance = moments.result()
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        return "its output is not finite on the calibration samples"
    with np.errstate(over="ignore"):
        scale = np.sqrt(variance + EPSILON).astype(dtype)
        # The variance whose root the rounded scale is: their quotient is then 1 to half a place, and folding
        # gives every weight back as it was.
        variance = np.maximum(scale.astype(np.float64) ** 2 - EPSILON, 0.0).astype(dtype)
        mean = mean.astype(dtype)
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        return f"its mean or variance is beyond what {dtype} can hold"
    return scale, mean, mean, variance


def _insert(model: Model, op: LinearOp, parameters: tuple[np.ndarray, ...]) -> Change:
    """Put the BatchNormalization behind the operator. It takes over the output's name, so all that reads the
    output reads it: nodes, bodies, the user."""
    site, last = op.name, op.nodes[-1]  # a nameless node is called by its output, which is about to change
    y = last.outputs[0]
    raw = last.outputs[0] = Variable(model.unique_name(f"{y.name}_before_bn"))
    names = ("weight", "bias", "running_mean", "running_var")
    weights = [model.add_weight(f"{site}.bn.{n}", a) for n, a in zip(names, parameters, strict=True)]
    attrs = {"epsilon": EPSILON, "momentum": BN_MOMENTUM}
    model.add_node("BatchNormalization", [raw, *weights], [y], attrs, f"{site}.bn", by=NAME)
    detail: dict[str, Json] = {"tensor": y.name, "channels": op.out_features}
    return Change((site,), f"BatchNormalization behind {op.node.op}", detail)
