"""from_torch: the weights of a module back into the graph they came from.

A byte copy: where a stored tensor and its counterpart in the module differ, it is replaced; nothing else is.
The module may be wrapped (torch.compile, DistributedDataParallel), or be any module with those names in its
state_dict.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper
from torch import fx, nn

from onnxfuse.data.calibration import Batch, BatchStream, Calibration, Data
from onnxfuse.errors import InputError, VerificationError
from onnxfuse.ir.model import LoadableModel, Model
from onnxfuse.pytorch.bridge.tensors import any_array, to_array, to_tensor, torch_type
from onnxfuse.pytorch.bridge.weights import Weight, stored
from onnxfuse.runtime.narrow import as_fed
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import compare_run

_WRAPPERS = ("_orig_mod.", "module.")
_SAMPLES = 4


def from_torch(
    module: nn.Module, model: Model | LoadableModel, *, calib: Data = None, provider: str = "auto"
) -> Model:
    """A copy of the model with the module's weights, its BatchNorm statistics included.

    ONNX Runtime then runs the copy beside the module, in eval mode, on a few samples.

    Args:
        module: imported from `model` by `to_torch`, trained or not; wrapped or not.
        model: is left as it is.
        calib: samples to compare on; None makes some up.
        provider: of ONNX Runtime.

    Raises:
        InputError: the module lacks a weight, or has it in another shape or type, or with NaN or infinity.
        VerificationError: module and model compute different things, beyond float noise.
        NotApplicableError: ONNX Runtime can't run the model.
    """
    original = model if isinstance(model, Model) else Model.load(model)
    result = copy_with_weights(module, original)
    runtime = Runtime(provider)
    samples = Calibration.open(calib, original, limit=_SAMPLES, batch_size=_SAMPLES, held_out=0.0)
    check_module(module, result, samples.fit, runtime)
    return result


def copy_with_weights(module: nn.Module, model: Model) -> Model:
    """A copy of the model with the module's weights, not checked in ONNX Runtime.

    Raises:
        InputError: the module lacks a weight, or has it in another shape or type, or with NaN.
    """
    state = _unwrapped(module.state_dict())
    result = model.copy()
    bodies: dict[str, dict[tuple[tuple[str, str], ...], dict[str, np.ndarray]]] = {}
    for weight in stored(model):
        if weight.key not in state:
            if weight.initializer:
                raise InputError(f"the module has no '{weight.key}' to write to the model's '{weight.name}'")
            continue
        array = _checked(weight, state[weight.key])
        if array.tobytes() == np.ascontiguousarray(weight.load()).tobytes():
            continue
        if not weight.scope:
            result.set_weight(result.tensor(weight.name), array)
        else:
            bodies.setdefault(weight.scope[0][0], {}).setdefault(weight.scope, {})[weight.name] = array
    for output, changed in bodies.items():
        _write_bodies(result, output, changed)
    return result


def _unwrapped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state without the prefixes that wrappers put in front of all its names."""
    found = dict(state)
    for _ in range(len(_WRAPPERS)):
        for prefix in _WRAPPERS:
            if found and all(key.startswith(prefix) for key in found):
                found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def _checked(weight: Weight, tensor: torch.Tensor) -> np.ndarray:
    if tuple(tensor.shape) != weight.shape or tensor.dtype != torch_type(weight.dtype):
        raise InputError(
            f"'{weight.key}' is {tensor.dtype} {list(tensor.shape)} in the module, "
            f"the model's '{weight.name}' is {weight.dtype} {list(weight.shape)}"
        )
    array = to_array(tensor, weight.dtype)
    if weight.is_float and np.isnan(array.astype(np.float32, copy=False)).any():
        raise InputError(f"'{weight.key}' has a NaN value in the module")
    return array


# --- bodies ------------------------------------------------------------------------------------------------


def _write_bodies(
    model: Model, output: str, changed: Mapping[tuple[tuple[str, str], ...], Mapping[str, np.ndarray]]
) -> None:
    """Replace values in the bodies of the node with that first output."""
    node = model.tensor(output).inputs[0]
    for key in dict.fromkeys(scope[0][1] for scope in changed):
        body = GraphProto()
        body.CopyFrom(node.attrs[key])
        for scope, values in changed.items():
            if scope[0][1] == key:
                _write(_inner(body, scope[1:]), values)
        model.set_body(node, key, body)


def _inner(body: GraphProto, scope: Sequence[tuple[str, str]]) -> GraphProto:
    for output, key in scope:
        node = next(n for n in body.node if n.output and n.output[0] == output)
        body = next(a.g for a in node.attribute if a.name == key)
    return body


def _write(body: GraphProto, values: Mapping[str, np.ndarray]) -> None:
    for proto in body.initializer:
        if proto.name in values:
            _replace(proto, values[proto.name])
    for node in body.node:
        if node.op_type == "Constant" and node.output[0] in values:
            _replace_constant(node, values[node.output[0]])


def _replace(proto: TensorProto, array: np.ndarray) -> None:
    new = numpy_helper.from_array(array, proto.name)
    new.doc_string = proto.doc_string
    proto.CopyFrom(new)


def _replace_constant(node: NodeProto, array: np.ndarray) -> None:
    for attribute in node.attribute:
        if attribute.name == "value":
            _replace(attribute.t, array)
        elif attribute.name == "value_floats":
            attribute.floats[:] = array.tolist()


# --- the check ---------------------------------------------------------------------------------------------


def check_module(
    module: nn.Module, model: Model, batches: Collection[Batch] | BatchStream, runtime: Runtime
) -> None:
    """Check that the module, in eval mode, computes what the model does in ONNX Runtime.

    Args:
        module: imported from `model`, wrapped or not.
        model: with the module's weights.
        batches: to run both on.
        runtime: where the model runs.

    Raises:
        VerificationError: an output differs by more than `verification.noise.MULTIPLE` noise floors of the
            model.
    """
    names = _outputs(module) or [info.name for info in model.outputs]
    modes = {inner: inner.training for inner in module.modules()}
    module.eval()
    try:
        run = partial(run_module, module, model, names)
        found = compare_run(model, run, batches, runtime, tensors=names)
    finally:
        for inner, training in modes.items():
            inner.training = training
    if not found.passed:
        raise VerificationError(f"the module does not compute what the model computes: {found.reason}")


def _outputs(module: nn.Module) -> list[str] | None:
    """The names of the tensors that an imported module returns, whatever it is wrapped in."""
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            names: list[str] | None = inner.meta.get("outputs")
            return names
    return None


def run_module(
    module: nn.Module, model: Model, names: Sequence[str], feed: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The module's outputs on one feed, by name; a sequence is a list of arrays.

    Args:
        module: imported from `model`, wrapped or not.
        model: says in which order the inputs come.
        names: of the outputs in the module's order.
        feed: arrays by input name.
    """
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    device = tensor.device if tensor is not None else torch.device("cpu")
    inputs = [to_tensor(as_fed(feed[info.name], info.dtype)).to(device) for info in model.inputs]
    with torch.no_grad():
        results = module(*inputs)
    found = results if isinstance(results, tuple) else [results]
    return {name: _any_arrays(result) for name, result in zip(names, found, strict=True)}


def _any_arrays(result: Any) -> Any:
    """A tensor as an array, a sequence of them as a list."""
    return any_array(result) if isinstance(result, torch.Tensor) else [any_array(tensor) for tensor in result]
