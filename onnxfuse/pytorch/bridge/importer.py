"""to_torch: an ONNX model as a torch.fx GraphModule that trains and goes back to the same graph.

One table from operator to plain torch functions (`rules`), one walk over the nodes. Weights keep their names,
their ONNX layout (a Gemm's transB, an LSTM's gate order are permuted in forward, never in storage) and their
ties, so that `from_torch` is a byte copy. What ONNX computes on shapes becomes plain Python numbers
(`values`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import fx, nn

from onnxfuse.ir.functions import without_functions
from onnxfuse.ir.model import LoadableModel, Model
from onnxfuse.pytorch.bridge.keys import CALLED, put
from onnxfuse.pytorch.bridge.operator import of_node
from onnxfuse.pytorch.bridge.rules import TABLE
from onnxfuse.pytorch.bridge.scopes import ModelScope
from onnxfuse.pytorch.bridge.store import Store
from onnxfuse.pytorch.bridge.weights import Weight, check_ties, is_trainable, stored


def operators() -> set[str]:
    """The operators that can be imported: "Conv", "com.acme::Op"."""
    return {*(f"{domain}::{name}" if domain else name for domain, name in TABLE), "Constant"}


def to_torch(
    model: Model | LoadableModel,
    *,
    trainable: Callable[[Weight], bool] | None = None,
    outputs: Sequence[str] | None = None,
    shared_gradients: bool = False,
) -> fx.GraphModule:
    """The model as a module, in eval mode.

    It takes the model's inputs by position, as tensors of the declared types, and returns a tensor if the
    model has one output, else a tuple. Every initializer is a Parameter or buffer under its own name
    (`weights.stored` lists the few that need another). BatchNorm and Dropout follow `train()` and `eval()`.
    `module.meta["inputs"]` and `module.meta["outputs"]` list the names, `module.meta["types"]` the types of
    the inputs (NumPy).

    Args:
        model: is left as it is.
        trainable: which stored tensors become Parameters; default `onnxfuse.pytorch.is_trainable`.
        outputs: names of tensors to return instead of the model's outputs; inner ones may be among them.
        shared_gradients: whether operators that `merge` gave one weight have the shares in its gradient that
            it noted on them; without, the gradient is their sum, as usual.

    Raises:
        InputError: a file that can't be read; a trainable tensor that is not floating-point.
        NotApplicableError: an operator without a rule, or used in a way that its rule doesn't know.
        KeyError: no tensor of a name in `outputs`.

    Warns:
        ModelWarning: tensors that are shared by unlike layers.
    """
    loaded = model if isinstance(model, Model) else Model.load(model)
    weights = stored(loaded)
    check_ties(weights)
    flat = without_functions(loaded)
    names = list(outputs) if outputs is not None else [info.name for info in loaded.outputs]
    opsets = {o.domain: o.version for o in flat.source.opset_import}
    store = Store(weights, trainable or is_trainable, opsets, shared_gradients)
    module = fx.GraphModule(store.modules, _graph(flat, names, store), class_name="OnnxModule")
    _complete(module, store.modules)
    module.meta["inputs"] = [info.name for info in flat.inputs]
    module.meta["types"] = [info.dtype for info in flat.inputs]
    module.meta["outputs"] = names
    return module.eval()


def _graph(model: Model, outputs: Sequence[str], store: Store) -> fx.Graph:
    """The graph of what the outputs need."""
    scope = ModelScope(store)
    infos = model.shapes()
    for info in model.inputs:
        scope.add_input(info)
    for tensor in model.initializers:
        weight = store.weights.get(((), tensor.name))
        scope.keep(tensor.name, weight.load if weight else partial(getattr, tensor, "values"))
    needed = _needed(model, outputs)
    for node in model.nodes:
        if node.constant_form:
            name = node.outputs[0].name
            scope.keep(name, partial(_value_of, model, name))
        elif node in needed:
            scope.run(of_node(node), infos)
    scope.finish(outputs)
    return scope.graph


def _value_of(model: Model, name: str) -> np.ndarray:
    value = model.weight(model.tensor(name))
    if value is None:
        raise AssertionError(f"'{name}' is no constant")
    return value


def _needed(model: Model, outputs: Sequence[str]) -> set[Any]:
    """The nodes that these tensors depend on."""
    stack = [node for name in outputs for node in model.tensor(name).inputs]
    found: set[Any] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            sources = [*node.inputs, *(model.tensor(name) for name in node.captured)]
            stack.extend(n for tensor in sources for n in tensor.inputs)
    return found


def _complete(module: nn.Module, source: nn.Module) -> None:
    """Make up for what torch.fx leaves undone when it copies what the graph uses: weights that nothing uses,
    and constants that are not part of the state."""
    constants = module.get_submodule(CALLED) if CALLED in module._modules else nn.Module()
    constants._non_persistent_buffers_set.update(constants._buffers)
    there = {key for key, _ in (*module.named_parameters(), *module.named_buffers())}
    for key, tensor in (*source.named_parameters(), *source.named_buffers()):
        if key not in there:
            put(module, key, tensor)
