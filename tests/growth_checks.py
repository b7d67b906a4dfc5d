"""What the tests of growing networks share: the graph in float64, and references for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch
from channel_cases import Case, found, parameters
from nets import RUNTIME, Feed
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxfuse.channels.dims import places
from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context
from onnxfuse.pytorch.bridge.importer import to_torch

_WIDE = {TensorProto.FLOAT: TensorProto.DOUBLE, TensorProto.FLOAT16: TensorProto.DOUBLE}


def doubled(model: Model) -> Model:
    """The same graph with every float a float64."""
    proto = model.to_proto()
    _double(proto.graph)
    return Model.load(proto)


def _double(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    factors = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in graph.initializer:
        if tensor.name not in factors:
            tensor.CopyFrom(_wide(tensor))
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        value.type.tensor_type.elem_type = _WIDE.get(kind, kind)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.CopyFrom(_wide(attribute.t))
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _double(attribute.g)
            elif node.op_type == "Cast" and attribute.name == "to":
                attribute.i = _WIDE.get(attribute.i, attribute.i)


def _wide(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in _WIDE:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def wide(feed: Feed) -> Feed:
    return {name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in feed.items()}


def in_float64(model: Model, feed: Feed) -> list[np.ndarray]:
    """The outputs of a graph in float64: by ONNX's own reference implementation, or where that can't, by
    PyTorch."""
    if any(node.op == "ConvTranspose" and node.attrs.get("group", 1) > 1 for node in model.nodes):
        with torch.no_grad():
            found = to_torch(model)(*(torch.from_numpy(feed[info.name]) for info in model.inputs))
        return [found.numpy()]
    return [np.asarray(y) for y in ReferenceEvaluator(model.to_proto()).run(None, dict(feed))]


def case_context(case: Case, model: Model, seed: int = 0) -> Context:
    feeds = [case.feed(model, 4, seed=i) for i in range(4)]
    calibration = Calibration.open(feeds, model, batch_size=4, held_out=0.25)
    return Context(model, calibration, RUNTIME, seed)


def new_elements(case: Case, model: Model, grown: Model) -> dict[str, np.ndarray]:
    """Of each weight of a widened network, which elements are new."""
    masks = {name: np.zeros(value.shape, bool) for name, value in parameters(grown).items()}
    for before, after in zip(found(case, model), found(case, grown), strict=True):
        for old, new in zip(before.leaves, after.leaves, strict=True):
            for touch in after.touches:
                front = np.moveaxis(masks[touch.weight], touch.axis, 0)
                front[places(touch.dim, new)[old.size :]] = True
    return masks


def gradients(module: torch.nn.Module, feed: Feed, names: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Of a random function of the outputs, one gradient for each parameter; the module makes one SGD step."""
    module.zero_grad()
    outputs = module(*(torch.from_numpy(feed[name]) for name in names))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    random = torch.Generator().manual_seed(seed)
    loss = sum(
        (y * torch.randn(y.shape, generator=random, dtype=y.dtype)).sum() + (y**2).sum() for y in outputs
    )
    loss.backward()
    found = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name] = grad.numpy().copy()
            parameter.sub_(1e-2 * grad)
    return found
