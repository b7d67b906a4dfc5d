"""Types and shapes at the sizes of a feed.

`Model.shapes` knows what the file declares and what ONNX infers for any feed. Here are those of one feed.
They follow from the sizes of the inputs (`runtime.static_shapes`); what does not follow takes a run, of the
part of the model that it depends on. Whatever the file declares of other tensors, outputs included, counts
for nothing: declarations may be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto

from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Constant
from onnxfuse.ir.protos import DEFAULT_DOMAINS
from onnxfuse.ir.shapes import TensorInfo, fill
from onnxfuse.runtime.feeds import check_feed
from onnxfuse.runtime.handover import runnable, set_outputs
from onnxfuse.runtime.session import Runtime
from onnxfuse.runtime.static_shapes import is_fixed, static_shapes

TAPS_AT_ONCE = 64
"""Tensors that are fetched in one run, where only that shows their type."""

_OPSET = 13  # of Shape, where the model has no operator of ONNX itself


def shapes_on(model: Model, feed: Feed | None, runtime: Runtime) -> dict[str, TensorInfo]:
    """Type and shape of every tensor of the main graph, by name: `Model.shapes`, completed by `run_shapes`.

    Args:
        model: is not changed.
        feed: gives what is still unknown the concrete sizes that it has there; None leaves that open.
        runtime: where the model is run if it has to be.

    Raises:
        InputError: a feed that does not fit the inputs.
        NotApplicableError: ONNX Runtime can't run what has to be run.
    """
    found = model.shapes()
    if feed is None or (all(info.complete for info in found.values()) and not model.unproved()):
        return found
    run = run_shapes(model, feed, runtime)
    return {name: fill(info, run.get(name)) for name, info in found.items()}


def run_shapes(model: Model, feed: Feed, runtime: Runtime) -> dict[str, TensorInfo]:
    """Type and shape of every tensor of the main graph as a run on a feed has them.

    Only of element types that ONNX Runtime has no Shape for (float8, integers of 4 bits), where inference
    doesn't know the shape either, is the declaration believed.

    Args:
        model: is not changed; it remembers the shapes of the latest feeds until it is edited.
        feed: gives the sizes. It is run where they don't tell all shapes, so let it be small.
        runtime: where it is run.

    Raises:
        InputError: a feed that does not fit the inputs.
        NotApplicableError: ONNX Runtime can't run what has to be run.
    """
    runs = model.observations()
    run = next((result for known, result in runs if _same_arrays(known, feed)), None)
    if run is None:
        run = _shapes_at(model, feed, runtime)
        runs[:] = [(dict(feed), run), *runs[:1]]
    return dict(run)


def _shapes_at(model: Model, feed: Feed, runtime: Runtime) -> dict[str, TensorInfo]:
    check_feed(feed, model.inputs)
    known = static_shapes(model, feed)
    found: dict[str, TensorInfo] = {}
    for tensor in model.tensors():
        name = tensor.name
        if isinstance(tensor, Constant):
            found[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        elif name in feed:
            found[name] = TensorInfo(name, feed[name].dtype, feed[name].shape)
        else:
            found[name] = known.get(name, TensorInfo(name, None, None))
    unknown = [name for name, info in found.items() if not is_fixed(info)]
    return found | (_observed(model, unknown, feed, runtime) if unknown else {})


def _observed(model: Model, names: Sequence[str], feed: Feed, runtime: Runtime) -> dict[str, TensorInfo]:
    """Types and shapes of tensors in a run of what they depend on.

    Shapes are computed in the graph, by a Shape node for each tensor, so that no tensor has to be kept for
    its shape. Those of unknown type are fetched, a few at a time.

    Args:
        model: is not changed.
        names: of the tensors.
        feed: what is run.
        runtime: where it is run.
    """
    declared = model.shapes()
    result = {name: declared[name] for name in names}
    typed = [name for name in names if _has_shape(declared[name])]
    untyped = [name for name in names if declared[name].dtype is None]
    if not typed and not untyped:
        return result
    proto, folder = runnable(model)
    shapes = _with_shapes(proto, typed, untyped)
    session = runtime.session(proto, folder=folder, optimize=False)
    if typed:
        for name, sizes in zip(typed, session.run(feed, shapes).values(), strict=True):
            result[name] = TensorInfo(name, declared[name].dtype, tuple(sizes.tolist()))
    for start in range(0, len(untyped), TAPS_AT_ONCE):
        for name, array in session.run(feed, untyped[start : start + TAPS_AT_ONCE]).items():
            dense = isinstance(array, np.ndarray)  # else a sequence or a map
            result[name] = TensorInfo(name, array.dtype if dense else None, array.shape if dense else None)
    return result


def _has_shape(info: TensorInfo) -> bool:
    """Whether ONNX Runtime has a Shape for tensors of this type. NumPy knows all those but one."""
    return info.dtype is not None and (info.dtype.kind != "V" or info.dtype.name == "bfloat16")


def _with_shapes(proto: ModelProto, tensors: Sequence[str], others: Sequence[str]) -> list[str]:
    """Puts the shapes of these tensors, then some tensors, in place of a model's outputs: the shapes'
    names."""
    graph = proto.graph
    used = {name for node in graph.node for name in node.output}
    base = "shape of "
    while any(name.startswith(base) for name in used):
        base = f"the {base}"
    names = [f"{base}{number}" for number in range(len(tensors))]
    if tensors and not any(opset.domain in DEFAULT_DOMAINS for opset in proto.opset_import):
        proto.opset_import.add(domain="", version=_OPSET)
    for tensor, name in zip(tensors, names, strict=True):
        graph.node.append(NodeProto(op_type="Shape", input=[tensor], output=[name]))
    set_outputs(proto, [*names, *others])
    return names


def _same_arrays(a: Feed, b: Feed) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
