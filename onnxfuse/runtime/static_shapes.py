"""Types and shapes at the sizes of a feed, without a run of the model.

ONNX's inference starts from the sizes that the feed gives to the inputs. It stops where a shape is computed
by operators that it does not follow: there the numbers of that chain, which depend on nothing but constants
and known shapes, are computed by themselves and put in as constants, and inference goes on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ir.protos import SMALL
from onnxfuse.ir.shape_inference import inferred, undeclared
from onnxfuse.ir.shapes import Shapes, TensorInfo
from onnxfuse.runtime.session import Runtime

ROUNDS = 8
"""Times that numbers are computed and inference goes on: shapes whose numbers depend on such shapes."""

_RANDOM = ("Random", "Multinomial", "Bernoulli", "Dropout")  # what their names begin with


def static_shapes(model: Model, feed: Feed) -> dict[str, TensorInfo]:
    """Types and shapes of computed tensors at the sizes of a feed, as far as they follow from these alone.

    No declaration of the file but the inputs' types counts, that of an output as little as any other. Where
    a size is not known it is None or a name that inference made up.

    Args:
        model: is not changed.
        feed: fits its inputs.
    """
    light = undeclared(model)
    for value in light.graph.input:
        if value.name in feed:
            _fix(value, feed[value.name].shape)
    known = inferred(light)
    stored: set[str] = set()
    for _ in range(ROUNDS):
        values = _values(model, known, stored)
        if not values:
            break
        _store(light, values)
        stored |= values.keys()
        known = inferred(light)
    return known


def is_fixed(info: TensorInfo | None) -> bool:
    """Whether type and every size are known as numbers."""
    if info is None or info.dtype is None or info.shape is None:
        return False
    return all(isinstance(size, int) for size in info.shape)


def _fix(value: ValueInfoProto, shape: Iterable[int]) -> None:
    declared = value.type.tensor_type.shape
    declared.Clear()
    declared.SetInParent()  # else no axes would mean no shape
    for size in shape:
        declared.dim.add(dim_value=size)


def _store(light: ModelProto, values: Mapping[str, np.ndarray]) -> None:
    """Puts constants in place of the nodes that compute these tensors and nothing else."""
    for node in light.graph.node:
        if len(node.output) == 1 and node.output[0] in values:
            name = node.output[0]
            node.Clear()
            node.op_type = "Constant"
            node.output.append(name)
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(values[name])))


def _values(model: Model, known: Shapes, stored: Collection[str]) -> dict[str, np.ndarray]:
    """The numbers by which shapes that are not known are computed, as far as they can be had.

    Args:
        model: computes them.
        known: what is known of its tensors.
        stored: the tensors that need none any more.
    """
    read = {
        tensor
        for node in model.nodes
        if any(tensor.name and not is_fixed(known.get(tensor.name)) for tensor in node.outputs)
        for tensor in node.inputs
        if tensor.name not in stored and not model.is_weight(tensor)
    }
    if not read:
        return {}
    chain = _Chain(model, known)
    found = {tensor.name: chain.shapes[tensor] for tensor in read if tensor in chain.shapes}
    found.update(chain.evaluate([tensor for tensor in read if tensor in chain.computed]))
    return {name: value for name, value in found.items() if value.nbytes <= SMALL}


class _Chain:
    """The part of a model that computes with nothing but small constants and known shapes.

    Attributes:
        shapes: values of the tensors that are known shapes, or parts of them.
        computed: the other tensors, with the nodes that compute them.
    """

    def __init__(self, model: Model, known: Shapes) -> None:
        self._model = model
        self.shapes: dict[Tensor, np.ndarray] = {}
        self.computed: dict[Tensor, Node] = {}
        for node in model.nodes:
            if node.key in (("", "Shape"), ("", "Size")):
                self._note_shape(node, known.get(node.inputs[0].name))
            elif self._follows(node, known):
                self.computed.update(dict.fromkeys((t for t in node.outputs if t.name), node))

    def _note_shape(self, node: Node, info: TensorInfo | None) -> None:
        if not is_fixed(info):
            return
        assert info is not None
        sizes = np.array(info.shape, np.int64)
        if node.op == "Size":
            self.shapes[node.outputs[0]] = np.array(sizes.prod(), np.int64)
        else:
            self.shapes[node.outputs[0]] = sizes[node.attrs.get("start") : node.attrs.get("end")]

    def _follows(self, node: Node, known: Shapes) -> bool:
        """Whether a node can be computed by itself, and what it gives is small, or of a size not known."""
        if node.domain or node.bodies or node.op.startswith(_RANDOM) or not any(t.name for t in node.inputs):
            return False
        if not all(self._has(tensor) for tensor in node.inputs if tensor.name):
            return False
        outputs = [known.get(tensor.name) for tensor in node.outputs if tensor.name]
        return all(not is_fixed(info) or _bytes(info) <= SMALL for info in outputs)

    def _has(self, tensor: Tensor) -> bool:
        if tensor in self.computed or tensor in self.shapes:
            return True
        return self._model.is_weight(tensor) and self._is_small(tensor)

    def _is_small(self, tensor: Tensor) -> bool:
        producer = self._model.producer(tensor)
        held = tensor if producer is None else producer.attrs.get("value")
        if not isinstance(held, Constant):  # a number, or a short list, of a Constant node
            return producer is not None and "sparse_value" not in producer.attrs
        return held.dtype.kind in "biuf" and math.prod(held.shape) * held.dtype.itemsize <= SMALL

    def evaluate(self, tensors: list[Tensor]) -> dict[str, np.ndarray]:
        """The values of some of the computed tensors; none where ONNX Runtime fails on them."""
        if not tensors:
            return {}
        nodes: set[Node] = set()
        ends: dict[Tensor, None] = {}
        stack = list(tensors)
        while stack:
            tensor = stack.pop()
            node = self.computed.get(tensor)
            if node is None:
                ends[tensor] = None
            elif node not in nodes:
                nodes.add(node)
                stack.extend(t for t in node.inputs if t.name)
        opset = self._model.opset
        proto = ModelProto(ir_version=self._model.source.ir_version)
        proto.opset_import.add(domain="", version=opset)
        proto.graph.name = "numbers"
        proto.graph.node.extend(node.proto(opset) for node in self._model.nodes if node in nodes)
        proto.graph.initializer.extend(numpy_helper.from_array(self._value(t), t.name) for t in ends)
        proto.graph.output.extend(ValueInfoProto(name=tensor.name) for tensor in tensors)
        try:
            return Runtime("cpu", threads=1).session(proto, optimize=False).run({})
        except NotApplicableError:
            return {}  # a run of the model will show what these were for, or fail for the same reason

    def _value(self, tensor: Tensor) -> np.ndarray:
        found = self.shapes[tensor] if tensor in self.shapes else self._model.weight(tensor)
        assert found is not None
        return found


def _bytes(info: TensorInfo | None) -> int:
    assert info is not None
    assert info.dtype is not None
    return math.prod(size for size in info.shape or () if isinstance(size, int)) * info.dtype.itemsize
