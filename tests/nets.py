"""Tiny networks for tests, and references that share no code with onnxfuse: ONNX Runtime as it comes,
torch's unfold, numpy's least squares."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import torch
from onnx import numpy_helper

from onnxfuse.data.calibration import Calibration
from onnxfuse.findings import Prediction
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Pass, PassResult
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.records import StepReport
from onnxfuse.runtime.session import Runtime

RUNTIME = Runtime("cpu", threads=1)
Feed = dict[str, np.ndarray]


MLP = """<ir_version: 8, opset_import: ["" : 17]>
mlp (float[batch,6] x) => (float[batch,4] y) {
    h = MatMul(x, w1)
    r = Relu(h)
    i = Identity(r)
    y = MatMul(i, w2)
}"""
"""Two dense layers, weights `w1` (6, hidden) and `w2` (hidden, 4) to be added."""


DENSE = "a = Gemm<transB=1>(x, w0, b0) r = Relu(a) h = Gemm<transB=1>(r, w1, b1) g = Relu(h) y = Gemm(g, w2)"
DENSE_WEIGHTS = {"w0": (24, 6), "b0": (24,), "w1": (20, 24), "b1": (20,), "w2": (20, 3)}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def net(
    body: str, weights: Mapping[str, Any], x: str = "float[N,6] x", y: str = "float[A,B] y", opset: int = 17
) -> Model:
    """A model from nodes in ONNX text. A weight given as a shape is random, scaled to keep the variance."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({x}) => ({y}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for number, (name, value) in enumerate(weights.items()):
        array = value
        if isinstance(value, tuple):
            fan = max(int(np.prod(value[1:] if len(value) > 2 else value[:1])), 1)
            array = (normal(*value, seed=number + 1) / np.sqrt(fan)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return Model.load(proto)


def context(
    model: Model, feed: Feed | Sequence[Feed], *, batch_size: int = 16, held_out: float = 0.25, **more: Any
) -> Context:
    """Samples for `model`; a list of feeds is taken batch by batch."""
    calibration = Calibration.open(feed, model, batch_size=batch_size, held_out=held_out)
    return Context(model, calibration, RUNTIME, **more)


def dense(count: int = 400, **weights: np.ndarray) -> tuple[Model, Context]:
    """Three dense layers (`DENSE`), some weights perhaps given, and so many samples."""
    model = net(DENSE, {**DENSE_WEIGHTS, **weights})
    return model, context(model, {"x": normal(count, 6, seed=3)})


def one_step(kind: type[Pass], model: Model, ctx: Context, **options: Any) -> tuple[Model, StepReport]:
    """A pass run by the manager, which verifies it: the model after, and the report."""
    outcome = PassManager([kind(**options)]).run(model, ctx)
    return outcome.model, outcome.steps[0]


def alone(kind: type[Pass], model: Model, ctx: Context, **options: Any) -> PassResult:
    """A pass run by itself, on a copy."""
    return kind(**options).run(model.copy(), ctx)


def compute(model: Model, feed: Feed, *names: str) -> list[np.ndarray]:
    """Some tensors of a model (its outputs without any names), by a session of the test's own."""
    proto = model.to_proto()
    have = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(names) or None, feed)


def stored_in(proto: onnx.ModelProto) -> tuple[int, int]:
    """Numbers that are parameters (not int64 or bool), and bytes of all, of initializers and Constants."""
    nodes, tensors = [*proto.graph.node], [*proto.graph.initializer]
    while nodes:
        node = nodes.pop()
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                nodes += body.node
                tensors += body.initializer
            if node.op_type == "Constant" and attribute.name == "value":
                tensors.append(attribute.t)
    arrays = [numpy_helper.to_array(tensor) for tensor in tensors]
    indices = (np.dtype(np.int64), np.dtype(bool))
    return sum(a.size for a in arrays if a.dtype not in indices), sum(a.nbytes for a in arrays)


def takes(run: Callable[[], object], seconds: float) -> bool:
    """Whether `run` takes less processor time than this, once in three times: other work slows it too."""

    def taken() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return any(taken() < seconds for _ in range(3))


def linear(seconds: Callable[[int], float], size: int) -> bool:
    """Whether four times the size takes less than eight times the processor time, once in three times.

    Each size is timed beside the other: what else the machine does then slows both.
    """
    return any(seconds(4 * size) < 8 * seconds(size) for _ in range(3))


def fitted(context: Context) -> Feed:
    """All fit samples as one feed."""
    return _joined([batch.feed for batch in context.calibration.fit])


def claimed_feeds(context: Context, claim: Prediction) -> list[Feed]:
    """The batches of fit samples that a prediction is about."""
    fit = context.calibration.fit
    return [batch.feed for batch in fit if claim.batches is None or batch.index in claim.batches]


def claimed(context: Context, claim: Prediction) -> Feed:
    """The fit samples that a prediction is about as one feed."""
    return _joined(claimed_feeds(context, claim))


def held(context: Context) -> Feed:
    """All held-out samples as one feed."""
    return _joined([batch.feed for batch in context.calibration.held_out])


def _joined(feeds: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def columns(x: np.ndarray, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int]) -> np.ndarray:
    """Zero-padded patches by torch: (N * positions, C * prod(kernel)), float64."""
    axes = len(kernel)
    sides = [pads[end] for axis in reversed(range(axes)) for end in (axis, axes + axis)]
    view = torch.nn.functional.pad(torch.from_numpy(x).double(), sides)
    for axis in range(axes):
        view = view.unfold(2 + axis, kernel[axis], strides[axis])
    order = [0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)]
    return view.permute(order).reshape(-1, x.shape[1] * int(np.prod(kernel))).numpy()


def rows(y: np.ndarray) -> np.ndarray:
    """Channel vectors of a feature map (N, C, *S) at all positions: (N * positions, C), float64."""
    return np.moveaxis(y, 1, -1).reshape(-1, y.shape[1]).astype(np.float64)


def least_squares(
    x: np.ndarray, y: np.ndarray, ridge: float = 0.0, prior: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (out, in) and bias (out,) that minimise sum |W x + b - y|^2 + n r s |W - prior|^2, with s the
    mean variance of the inputs: the ridge as rows of their own."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    start = np.zeros((y.shape[1], x.shape[1])) if prior is None else prior.astype(np.float64)
    root = np.sqrt(ridge * len(x) * (x - mean_x).var(0).mean())
    left = np.vstack([x - mean_x, root * np.eye(x.shape[1])])
    right = np.vstack([y - mean_y, root * start.T])
    weight = np.linalg.lstsq(left, right, rcond=None)[0].T
    return weight, mean_y - weight @ mean_x


def weight(model: Model, name: str) -> np.ndarray:
    value = model.weight(model.tensor(name))
    assert value is not None
    return value


def perturbed(model: Model, *names: str, amount: float = 0.3) -> Model:
    """A copy with noise on some weights: an approximate rewrite."""
    copy = model.copy()
    for number, name in enumerate(names):
        value = weight(copy, name)
        noise = normal(*value.shape, seed=100 + number) * value.std() * amount
        copy.set_weight(copy.tensor(name), (value + noise).astype(value.dtype))
    return copy
