"""A network of two dense layers, samples for it, and passes that do what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from nets import MLP as TEXT
from onnx import numpy_helper

import onnxfuse
from onnxfuse.data.calibration import Calibration
from onnxfuse.findings import Change, Prediction
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.results import Result
from onnxfuse.runtime.latency import Control, Latency, Timing

RANDOM = np.random.default_rng(3)
W1 = RANDOM.standard_normal((6, 16)).astype(np.float32)
W2 = RANDOM.standard_normal((16, 4)).astype(np.float32)
X = RANDOM.standard_normal((200, 6)).astype(np.float32)


def reference(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    return np.maximum(x @ W1, 0) @ (scale * W2)


# Right for about nine samples in ten.
LABELS = np.where(RANDOM.random(200) < 0.9, reference(X).argmax(axis=1), 0)


def network(text: str = TEXT, *, w1: np.ndarray = W1, w2: np.ndarray = W2) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend([numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(w2, "w2")])
    return proto


def run(model: Path | onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model.read_bytes()
    (y,) = ort.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(y)


def held_out(model: Path) -> tuple[np.ndarray, np.ndarray]:
    """The samples that `compress` holds out, and their labels."""
    calibration = Calibration.open({"x": X, "labels": LABELS}, Model.load(model))
    batches = list(calibration.held_out)
    return np.concatenate([b.feed["x"] for b in batches]), np.concatenate([b.labels for b in batches])


def timed(ratio: float) -> Latency:
    """A measurement that found a millisecond and so many times as much, without a doubt."""
    timings = [Timing(t, (t, t), t, t, t) for t in (1.0, ratio)]
    control = Control(1.0, 0.99, 1.01)
    return Latency(tuple(timings), control, 16, 100, ("CPUExecutionProvider",), 1, "thread", 1.0, None)


class Scale(Pass):
    """Multiplies the last weight by a factor; says so, or lies."""

    name = "scale"
    contract = Contract.APPROXIMATE
    summary = "a pass for tests"

    def __init__(self, factor: float, claim: Callable[[float], float] = lambda error: error) -> None:
        super().__init__()
        self.factor = factor
        self.claim = claim

    def run(self, model: Model, context: Context) -> PassResult:
        y = np.concatenate([reference(batch.feed["x"]) for batch in context.calibration.fit])
        error = float(np.mean(np.sum(((self.factor - 1) * y) ** 2, axis=1)))
        variance = float(np.sum(y.var(axis=0)))
        model.set_weight(model.tensor("w2"), (W2 * self.factor).astype(np.float32))
        change = Change(("y",), f"scaled by {self.factor}")
        return PassResult(model, [change], predictions=[Prediction("y", "y", self.claim(error), variance)])


class Refusing(Pass):
    name = "refusing"
    contract = Contract.EXACT
    summary = "a pass for tests"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def run(self, model: Model, context: Context) -> PassResult:
        raise self.error


def compress(model: Any, passes: Any = "fold", **arguments: Any) -> Result:
    """`onnxfuse.compress` on the CPU with the samples above, if no others are given."""
    given = {"calib": {"x": X, "labels": LABELS}, "provider": "cpu", **arguments}
    return onnxfuse.compress(model, passes, **given)
