"""Types and shapes as a run shows them, where inference leaves them open.

`Model.shapes` knows what the file declares and what ONNX infers. The sizes that a feed gives to dynamic
dimensions, and the types behind operators that inference does not know, take a run: the model is tapped, a
few tensors at a time.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.protos import DEFAULT_DOMAINS
from onnxfuse.ir.shapes import TensorInfo, fill
from onnxfuse.runtime.handover import runnable
from onnxfuse.runtime.session import Runtime

TAPS_AT_ONCE = 64
_OPSET = 13  # of Shape, where the model has no operator of ONNX itself


def shapes_on(model: Model, feed: Feed | None, runtime: Runtime) -> dict[str, TensorInfo]:
    """Type and shape of every tensor of the main graph, by name: `Model.shapes`, completed by a run.

    The model remembers the latest runs until it is edited, so the same feed is not run twice.

    Args:
        model: is not changed.
        feed: gives what is still unknown the concrete sizes that it has there; None leaves that open.
        runtime: where the model is run if it has to be.

    Raises:
        InputError: a feed that does not fit the inputs.
        NotApplicableError: ONNX Runtime can't run the model.
    """
    found = model.shapes()
    if feed is None or (all(info.complete for info in found.values()) and not model.unproved()):
        return found
    runs = model.observations()
    run = next((result for known, result in runs if _same_arrays(known, feed)), None)
    if run is None:
        run = observed(model, found, feed, runtime)
        runs[:] = [(dict(feed), run), *runs[:1]]
    return {name: fill(info, run.get(name)) for name, info in found.items()}


def observed(
    model: Model, found: dict[str, TensorInfo], feed: Feed, runtime: Runtime
) -> dict[str, TensorInfo]:
    """Types and shapes on this feed, of the inputs and of what `found` leaves unknown or only the file says.

    The tensors are fetched a few at a time, so memory stays near that of a plain run.

    Args:
        model: is not changed.
        found: what is known without a run, by name.
        feed: what is run.
        runtime: where it is run.
    """
    unproved = model.unproved()
    unknown = (n for n, info in found.items() if (not info.complete or n in unproved) and n not in feed)
    wanted = [name for name in unknown if not model.is_weight(model.tensor(name))]
    result = {name: TensorInfo(name, array.dtype, array.shape) for name, array in feed.items()}
    session = runtime.session(model, taps=wanted, optimize=False)
    for start in range(0, len(wanted), TAPS_AT_ONCE):
        for name, array in session.run(feed, wanted[start : start + TAPS_AT_ONCE]).items():
            if isinstance(array, np.ndarray):  # else a sequence or a map
                result[name] = TensorInfo(name, array.dtype, array.shape)
    return result


def run_shapes(model: Model, feed: Feed, runtime: Runtime) -> dict[str, TensorInfo]:
    """Type and shape of every tensor of the main graph as one run on a feed has them.

    Whatever the file declares counts for nothing here: declarations may be wrong. The shapes are computed in
    the graph, by a Shape node for each tensor, so that no tensor has to be kept for its shape. Only of
    element types that ONNX Runtime has no Shape for (float8, integers of 4 bits) is the declaration believed.

    Args:
        model: is not changed; it remembers the latest runs until it is edited.
        feed: what is run.
        runtime: where it is run.

    Raises:
        InputError: a feed that does not fit the inputs.
        NotApplicableError: ONNX Runtime can't run the model.
    """
    runs: list[tuple[Feed, dict[str, TensorInfo]]] = model.cached("run shapes", list)
    run = next((result for known, result in runs if _same_arrays(known, feed)), None)
    if run is None:
        run = _computed(model, feed, runtime)
        runs[:] = [(dict(feed), run), *runs[:1]]
    return dict(run)


def _computed(model: Model, feed: Feed, runtime: Runtime) -> dict[str, TensorInfo]:
    declared = model.shapes()
    weights = {tensor.name for tensor in model.tensors() if model.is_weight(tensor)}
    asked = [name for name, info in declared.items() if name not in feed and name not in weights]
    typed = [name for name in asked if _has_shape(declared[name])]
    untyped = {name: TensorInfo(name, None, None) for name in asked if declared[name].dtype is None}
    found = {name: info for name, info in declared.items() if name not in untyped}
    found.update({name: TensorInfo(name, array.dtype, array.shape) for name, array in feed.items()})
    if typed:
        proto, folder = runnable(model)
        taps = _with_shapes(proto, typed)
        session = runtime.session(proto, folder=folder, optimize=False)
        for name, lengths in zip(typed, session.run(feed, taps).values(), strict=True):
            found[name] = TensorInfo(name, declared[name].dtype, tuple(lengths.tolist()))
    if untyped:
        found.update(observed(model, untyped, feed, runtime))
    return {name: found.get(name, TensorInfo(name, None, None)) for name in declared}


def _has_shape(info: TensorInfo) -> bool:
    """Whether ONNX Runtime has a Shape for tensors of this type. NumPy knows all those but one."""
    return info.dtype is not None and (info.dtype.kind != "V" or info.dtype.name == "bfloat16")


def _with_shapes(proto: ModelProto, tensors: list[str]) -> list[str]:
    """Puts the shapes of these tensors in place of a model's outputs: the shapes' names."""
    graph = proto.graph
    used = {name for node in graph.node for name in node.output}
    base = "shape of "
    while any(name.startswith(base) for name in used):
        base = f"the {base}"
    names = [f"{base}{number}" for number in range(len(tensors))]
    if not any(opset.domain in DEFAULT_DOMAINS for opset in proto.opset_import):
        proto.opset_import.add(domain="", version=_OPSET)
    del graph.output[:]
    for tensor, name in zip(tensors, names, strict=True):
        graph.node.append(NodeProto(op_type="Shape", input=[tensor], output=[name]))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, None))
    return names


def _same_arrays(a: Feed, b: Feed) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
