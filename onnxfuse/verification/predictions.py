"""The check of a pass's predictions: measured on the samples and positions that they are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.data.batch_rows import tensor_bytes
from onnxfuse.data.rows import first_rows
from onnxfuse.numerics.sampling import RowSampler, row_shape
from onnxfuse.runtime.memory import in_budget
from onnxfuse.verification.noise import FEW_ROWS, MULTIPLE, known_floors
from onnxfuse.verification.records import Floors, PredictionCheck
from onnxfuse.verification.tally import mismatch, widened

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Batch, Calibration
    from onnxfuse.findings import Prediction
    from onnxfuse.ir.model import Model
    from onnxfuse.runtime.session import Runtime


PREDICTION_TOLERANCE = 1e-3
"""Relative difference allowed between a predicted and a measured error, beside what float noise explains."""


def check_predictions(
    original: Model,
    result: Model,
    predictions: Sequence[Prediction],
    calibration: Calibration,
    runtime: Runtime,
    seed: int,
) -> list[PredictionCheck]:
    """The predicted errors beside the measured ones: both whole models, tapped, over the batches of the fit
    samples and at the positions that are claimed.

    A prediction holds when |measured - predicted| <= `PREDICTION_TOLERANCE` * predicted + 2 n sqrt(predicted)
    + n^2, where n is the length of the float noise on a row: `MULTIPLE` noise floors of the reference, times
    the square root of the number of channels. (With e the error of a row and n noise on it, |e + n|^2 differs
    from |e|^2 by at most 2 |e| |n| + |n|^2.)

    Args:
        original: has the references.
        result: has the tensors.
        predictions: the claims.
        calibration: its fit samples are measured on.
        runtime: runs both.
        seed: of the sampled positions, that of the claims.

    Raises:
        InputError: a prediction names a tensor that is not there.
    """
    if not predictions:
        return []
    checks: list[PredictionCheck] = []
    for part in _parts(original, result, predictions, calibration, runtime):
        checks += _checked(original, result, part, calibration, runtime, seed)
    return checks


def _parts(
    original: Model,
    result: Model,
    predictions: Sequence[Prediction],
    calibration: Calibration,
    runtime: Runtime,
) -> Iterator[list[Prediction]]:
    """Runs of predictions whose tensors of a batch fit into memory."""
    feed = next(iter(calibration.fit)).feed
    ours, theirs = (tensor_bytes(model, feed, runtime) for model in (original, result))

    def needs(claim: Prediction) -> dict[tuple[bool, str], int]:
        reference, tensor = claim.reference, claim.tensor
        return {(False, reference): ours.get(reference, 0), (True, tensor): theirs.get(tensor, 0)}

    return in_budget(predictions, needs, calibration.budget.taps)


def _checked(
    original: Model,
    result: Model,
    predictions: Sequence[Prediction],
    calibration: Calibration,
    runtime: Runtime,
    seed: int,
) -> list[PredictionCheck]:
    references = list(dict.fromkeys(p.reference for p in predictions))
    tensors = list(dict.fromkeys(p.tensor for p in predictions))
    before = runtime.session(original, taps=references, outputs=())
    after = runtime.session(result, taps=tensors, outputs=())
    floors: Floors = {}
    measured = [_Measured(prediction, seed) for prediction in predictions]
    asked = [prediction.batches for prediction in predictions]
    several = None if None in asked else {number for own in asked for number in own or ()}
    for batch in calibration.fit if several is None else calibration.fit.numbered(several):
        floors = floors or known_floors(
            original, before, first_rows(original, batch, FEW_ROWS) or batch.feed, runtime
        )
        outputs = before.run(batch.feed)
        rewritten = after.run(batch.feed)
        for item in measured:
            item.add(batch, outputs[item.claim.reference], rewritten[item.claim.tensor])
    return [item.check(floors) for item in measured]


class _Measured:
    """The error of one prediction's tensor, streamed. `problem` says why there is none."""

    def __init__(self, claim: Prediction, seed: int) -> None:
        self.claim = claim
        self.sampler = RowSampler(seed, claim.tensor, claim.mask)
        self.rows = 0
        self.channels = 0
        self.error = 0.0
        self.total: np.ndarray | float = 0.0
        self.square = 0.0
        self.problem: str | None = None

    def add(self, batch: Batch, reference: np.ndarray, tensor: np.ndarray) -> None:
        claim = self.claim
        if claim.batches is not None and batch.index not in claim.batches:
            return
        if claim.channels is not None:
            reference = np.take(reference, claim.channels, claim.channel_axis)
        self.problem = self.problem or mismatch(
            claim.tensor, reference, tensor, ("the original", "the result")
        )
        if self.problem:
            return
        shape = row_shape(reference.shape, claim.channel_axis)
        rows = self.sampler.sample(batch.index, shape, claim.positions, batch.feed)
        both = (np.moveaxis(x, claim.channel_axis, 1) for x in (reference, tensor))
        a, b = (rows.without_padding(widened(rows.vectors(x))) for x in both)
        self.rows += a.shape[0]
        self.channels = a.shape[1]
        self.error += float(np.vdot(a - b, a - b))
        self.total = self.total + a.sum(axis=0)
        self.square += float(np.vdot(a, a))

    def check(self, floors: Floors) -> PredictionCheck:
        claim = self.claim
        if self.problem or not self.rows:
            problem = f"tensor {self.problem}" if self.problem else "there are no samples to measure it on"
            return PredictionCheck(claim.tensor, claim.error, np.nan, 0.0, claim.variance, problem)
        noise = MULTIPLE * floors[claim.reference].rms * np.sqrt(self.channels)
        error = max(claim.error, 0.0)
        tolerance = PREDICTION_TOLERANCE * error + 2 * noise * np.sqrt(error) + noise**2
        variance = (self.square - float(np.vdot(self.total, self.total)) / self.rows) / self.rows
        return PredictionCheck(claim.tensor, claim.error, self.error / self.rows, float(tolerance), variance)
