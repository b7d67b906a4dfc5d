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
from onnxfuse.ir.inference_faults import is_wrong, never_known
from onnxfuse.ir.nodes import Constant
from onnxfuse.ir.shapes import AxisSize, Shapes, TensorInfo, contradicts, info_of, merge


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


def infer(graph: Graph, follows: Shapes) -> Inference:
    """Type and shape of every tensor in the main graph, from the declarations and ONNX shape inference.

    What follows from the inputs and the operators is right; a declaration that contradicts it is dropped.

    Args:
        graph: is not changed.
        follows: `inferred(undeclared(graph))`.
    """
    source, stale = graph.source.graph, graph.stale_names()
    values = [*(v for v in source.value_info if v.name not in stale), *source.output]
    inputs = list(declared_inputs(graph))
    declared = {value.name: info_of(value) for value in (*values, *inputs)}
    named = {d.dim_param for v in (*values, *inputs) for d in v.type.tensor_type.shape.dim}
    proved = _without_placeholders(follows, named)
    fed = {value.name for value in inputs}
    lies = {value.name for value in values if _belied(declared[value.name], proved.get(value.name))}
    unproved = {
        name
        for name, info in declared.items()
        if name not in lies | fed and info.shape is not None and not _follows(info, proved.get(name))
    }
    found = proved
    if unproved and proved:
        found = _without_placeholders(inferred(_weightless(graph, stale | lies, lies)), named)
    result = {}
    for tensor in graph.tensors():
        name = tensor.name
        if isinstance(tensor, Constant):
            result[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        else:
            known = TensorInfo(name, None, None) if name in lies else declared.get(name)
            result[name] = merge(known or TensorInfo(name, None, None), found.get(name))
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


def undeclared(graph: Graph) -> ModelProto:
    """The model as shape inference needs it, without bulky values and without the declared shapes of computed
    tensors."""
    source = graph.source.graph
    return _weightless(
        graph, {value.name for value in source.value_info}, {value.name for value in source.output}
    )


def _weightless(graph: Graph, dropped: Collection[str], open_outputs: Collection[str]) -> ModelProto:
    """The model without bulky values, without the declarations in `dropped`, and without the declared shapes
    of `open_outputs`."""
    graph.sort()
    result = header(graph, "functions", "training_info", "opset_import")
    result.opset_import.extend(protos.light_imports(graph.source.opset_import))
    made = result.graph
    for node in graph.nodes:
        made.node.extend(_inferable(protos.light_node(node.proto(graph.opset))))
    made.input.extend(declared_inputs(graph))
    made.output.extend(graph.source.graph.output)
    for value in made.output:
        if value.name in open_outputs:
            value.type.tensor_type.ClearField("shape")
    made.value_info.extend(v for v in graph.source.graph.value_info if v.name not in dropped)
    made.initializer.extend(map(_light, graph.initializers))
    result.functions.extend(map(protos.light_function, graph.source.functions))
    return result


# Operators of which onnx knows no shapes, most of them ONNX Runtime's: outputs that are like the first input.
_LIKE_FIRST: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "SimplifiedLayerNormalization"): (0,),
    ("", "GroupNormalization"): (0,),  # which onnx knows as a function, from opset 21 on and not of all types
    **{("com.microsoft", name): (0,) for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "ScaledSiLU")},
    **{("com.microsoft", f"Skip{name}LayerNormalization"): (0, 3) for name in ("", "Simplified")},
}


def _inferable(node: NodeProto) -> Iterator[NodeProto]:
    """The node, or what onnx knows to have the same types and shapes; nothing where onnx is known to err."""
    if never_known(node):
        return
    like = _LIKE_FIRST.get((node.domain, node.op_type), ())
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


def inferred(light: ModelProto) -> dict[str, TensorInfo]:
    """Types and shapes by ONNX shape inference; none where it fails.

    A size that it doesn't know is None or a name of its own ("unk__0"), the same wherever it knows two to be
    equal.

    Args:
        light: the model; nodes of which inference is wrong are taken out of it.
    """
    found = _inferred(light)
    wrong = [place for place, node in enumerate(light.graph.node) if is_wrong(node, found)]
    for place in reversed(wrong):
        del light.graph.node[place]
    return _inferred(light) if wrong else found


def _inferred(light: ModelProto) -> dict[str, TensorInfo]:
    for propagate in (True, False):
        try:
            done = onnx.shape_inference.infer_shapes(light, strict_mode=False, data_prop=propagate)
        except Exception:  # comes from C++ as several types; an operator it trips over only costs knowledge
            continue
        values = (*done.graph.input, *done.graph.value_info, *done.graph.output)
        return {value.name: info_of(value) for value in values}
    return {}


def _without_placeholders(found: Shapes, named: Collection[str]) -> dict[str, TensorInfo]:
    """The same with None for the sizes that inference has named itself; `named` are the file's own."""

    def plain(info: TensorInfo) -> TensorInfo:
        if info.shape is None or not any(_placeholder(dim, named) for dim in info.shape):
            return info
        shape = tuple(None if _placeholder(dim, named) else dim for dim in info.shape)
        return TensorInfo(info.name, info.dtype, shape)

    return {name: plain(info) for name, info in found.items()}


def _placeholder(dim: AxisSize, named: Collection[str]) -> bool:
    return isinstance(dim, str) and dim.startswith("unk__") and dim not in named
