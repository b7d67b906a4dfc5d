"""Shape inference over a graph under edit.

ONNX's inference reads the values of a few small integer tensors (a Reshape's target, a Slice's bounds) and
nothing but type and dims of the rest. So bulky tensors go into it without their values, which keeps it
fast and lets it work on models past protobuf's 2 GB. Where it gives up, a run knows
(`runtime.observed_shapes`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxfuse.ir import protos
from onnxfuse.ir.export import declared_inputs, header, is_sparse
from onnxfuse.ir.graph import Graph
from onnxfuse.ir.nodes import Constant
from onnxfuse.ir.shapes import AxisSize, TensorInfo, contradicts, info_of, merge


@dataclass(frozen=True)
class Inference:
    """What is known of the tensors of a main graph without a run.

    Attributes:
        shapes: types and shapes by name.
        belied: the computed tensors whose declared shapes the inputs and operators contradict. ONNX Runtime
            only warns of that, and fails later.
        unproved: those of which the file says more than follows from inputs and operators; it may be stale.
    """

    shapes: dict[str, TensorInfo]
    belied: frozenset[str]
    unproved: frozenset[str]


def infer(graph: Graph) -> Inference:
    """Type and shape of every tensor in the main graph, from the declarations and ONNX shape inference.

    What follows from the inputs and the operators is right; a declaration that contradicts it is dropped.
    """
    light = weightless(graph, graph.stale_names())
    values = (*light.graph.value_info, *light.graph.output)
    declared = {value.name: info_of(value) for value in (*values, *light.graph.input)}
    named = {d.dim_param for v in (*values, *light.graph.input) for d in v.type.tensor_type.shape.dim}
    proved = _inferred(_undeclared(light), named)
    fed = {value.name for value in light.graph.input}
    lies = {value.name for value in values if _belied(declared[value.name], proved.get(value.name))}
    unproved = {
        name
        for name, info in declared.items()
        if name not in lies | fed and info.shape is not None and not _follows(info, proved.get(name))
    }
    inferred = _inferred(_undeclared(light, lies), named) if unproved and proved else proved
    result = {}
    for tensor in graph.tensors():
        name = tensor.name
        if isinstance(tensor, Constant):
            result[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        else:
            known = TensorInfo(name, None, None) if name in lies else declared.get(name)
            result[name] = merge(known or TensorInfo(name, None, None), inferred.get(name))
    return Inference(result, frozenset(lies), frozenset(unproved))


def _belied(declared: TensorInfo, proved: TensorInfo | None) -> bool:
    """Whether a declared shape can't be right, or fixes a size that is an input's to choose: what is left
    where somebody has made the batch axis of the inputs dynamic."""
    if proved is None or declared.shape is None or proved.shape is None:
        return False
    return contradicts(declared, proved) or any(
        isinstance(a, int) and isinstance(b, str) for a, b in zip(declared.shape, proved.shape, strict=True)
    )


def _follows(declared: TensorInfo, proved: TensorInfo | None) -> bool:
    """Whether all that is declared of a shape is proved."""
    return proved is not None and merge(declared, proved).shape == proved.shape


def _undeclared(light: ModelProto, names: Collection[str] | None = None) -> ModelProto:
    """The model without the declared shapes of these computed tensors; None for all of them."""
    if names is not None and not names:
        return light
    result = ModelProto()
    result.CopyFrom(light)
    del result.graph.value_info[:]
    result.graph.value_info.extend(
        v for v in light.graph.value_info if names is not None and v.name not in names
    )
    for value in result.graph.output:
        if names is None or value.name in names:
            value.type.tensor_type.ClearField("shape")
    return result


def weightless(graph: Graph, stale: set[str]) -> ModelProto:
    """The model as shape inference needs it: without bulky values and without the declarations in `stale`."""
    graph.sort()
    result = header(graph, "functions", "training_info", "opset_import")
    result.opset_import.extend(protos.light_imports(graph.source.opset_import))
    made = result.graph
    for node in graph.nodes:
        made.node.extend(_inferable(protos.light_node(node.proto(graph.opset)), graph.opset))
    made.input.extend(declared_inputs(graph))
    made.output.extend(graph.source.graph.output)
    made.value_info.extend(v for v in graph.source.graph.value_info if v.name not in stale)
    made.initializer.extend(map(_light, graph.initializers))
    result.functions.extend(map(protos.light_function, graph.source.functions))
    return result


# Operators that ONNX Runtime adds, of which onnx knows no shapes: outputs that are like the first input.
_LIKE_FIRST: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "SimplifiedLayerNormalization"): (0,),
    **{("com.microsoft", name): (0,) for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "ScaledSiLU")},
    **{("com.microsoft", f"Skip{name}LayerNormalization"): (0, 3) for name in ("", "Simplified")},
}


def _inferable(node: NodeProto, opset: int) -> Iterator[NodeProto]:
    """The node, or what onnx knows to have the same types and shapes."""
    like = _LIKE_FIRST.get((node.domain, node.op_type), ())
    if (node.domain, node.op_type) == ("", "GroupNormalization") and opset < 21:  # withdrawn
        like = (0,)
    if not like:
        yield node
    for place in like:
        if place < len(node.output) and node.output[place]:
            yield NodeProto(op_type="Identity", input=node.input[:1], output=[node.output[place]])


def _light(tensor: Constant) -> TensorProto:
    """The tensor with its values only if they are few; a sparse one as the dense tensor it stands for."""
    if tensor.stored is not None and not tensor.stored.external and not is_sparse(tensor):
        return protos.light_tensor(tensor.proto())
    if tensor.dtype != object and math.prod(tensor.shape) * tensor.dtype.itemsize <= protos.SMALL:
        return numpy_helper.from_array(tensor.values, tensor.name)
    elem_type = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    return TensorProto(name=tensor.name, data_type=elem_type, dims=tensor.shape)


def _inferred(light: ModelProto, named: set[str]) -> dict[str, TensorInfo]:
    """Types and shapes by ONNX shape inference; none where it fails.

    `named` are the dynamic dimensions that the file itself names: inference has placeholders of its own
    ("unk__0"), which only say that a size is unknown and become None.
    """
    for propagate in (True, False):
        try:
            done = onnx.shape_inference.infer_shapes(light, strict_mode=False, data_prop=propagate)
            break
        except Exception:  # comes from C++ as several types; an operator it trips over only costs knowledge
            continue
    else:
        return {}
    result = {}
    for value in (*done.graph.input, *done.graph.value_info, *done.graph.output):
        info = info_of(value)
        if info.shape is not None:
            shape = tuple(None if _placeholder(d, named) else d for d in info.shape)
            info = TensorInfo(info.name, info.dtype, shape)
        result[info.name] = info
    return result


def _placeholder(dim: AxisSize, named: set[str]) -> bool:
    return isinstance(dim, str) and dim.startswith("unk__") and dim not in named
