"""What a retrained model is worth: loss and metric in ONNX Runtime, on the held-out samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.numerics.significance import PairedDifference, paired_difference
from onnxfuse.pytorch.bridge.tensors import to_tensor
from onnxfuse.pytorch.training.objective import Objective
from onnxfuse.pytorch.training.sampling import Pool
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import Metric, MetricChange, load_metric


class Judge:
    """Loss and metric of a model in ONNX Runtime, sample by sample, on the held-out samples."""

    def __init__(
        self, runtime: Runtime, objective: Objective, pool: Pool | None, size: int, outputs: Sequence[str]
    ) -> None:
        self._runtime, self._objective, self._pool, self._size = runtime, objective, pool, size
        self._outputs = outputs
        self.scored: str | None = None
        self._metric: Metric | None = None
        self._before: tuple[np.ndarray, np.ndarray] | None = None

    def with_metric(self, spec: str) -> Judge:
        found = Judge(self._runtime, self._objective, self._pool, self._size, self._outputs)
        found.scored, found._metric = spec, load_metric(spec, original=False)
        return found

    @property
    def of_outputs(self) -> Metric | None:
        """The metric of the model's outputs, which may be among other tensors."""
        metric = self._metric
        if metric is None:
            return None
        return lambda outputs, labels: metric({name: outputs[name] for name in self._outputs}, labels)

    def start(self, model: Model) -> None:
        """Note what the model is worth before training."""
        self._before = self._measure(model)

    def change(self, model: Model) -> tuple[PairedDifference | None, MetricChange | None]:
        after = self._measure(model)
        if self._before is None or after is None:
            return None, None
        loss = paired_difference(self._before[0], after[0])
        if self.scored is None:
            return loss, None
        return loss, MetricChange(self.scored, paired_difference(self._before[1], after[1]), None)

    def _measure(self, model: Model) -> tuple[np.ndarray, np.ndarray] | None:
        """(losses, scores) of the held-out samples."""
        if self._pool is None:
            return None
        session = self._runtime.session(model, taps=self._objective.tensors)
        losses, scores = [], []
        for batch in self._pool.in_order(self._size):
            outputs = session.run(batch.feed)
            tensors = {name: to_tensor(outputs[name]) for name in self._objective.tensors}
            losses.append(self._objective(tensors, batch).double().numpy())
            if self.of_outputs is not None:
                scores.append(_one_each(self.of_outputs(outputs, batch.labels), batch))
        return np.concatenate(losses), np.concatenate(scores) if scores else np.empty(0)


def _one_each(scores: np.ndarray, batch: Batch) -> np.ndarray:
    if len(scores) != batch.samples:
        raise InputError(f"the metric returned {len(scores)} scores for a batch of {batch.samples} samples")
    return scores
