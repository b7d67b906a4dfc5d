"""to_torch: an ONNX model as a torch.fx GraphModule that trains and goes back to the same graph.

One table from operator to plain torch functions (`rules`), one walk over the nodes. Weights keep their names,
their ONNX layout (a Gemm's transB, an LSTM's gate order are permuted in forward, never in storage) and their
ties, so that `from_torch` is a byte copy. What ONNX computes on shapes becomes plain Python numbers
(`values`).
"""

from __future__ import annotations

import contextlib
import keyword
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx.inliner
import torch
from onnx import GraphProto, NodeProto
from torch import fx, nn

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir import shapes
from onnxfuse.ir.marks import GRADIENT_KEY
from onnxfuse.ir.model import LoadableModel, Model
from onnxfuse.pytorch.bridge.rules import TABLE
from onnxfuse.pytorch.bridge.values import MOST_ON_HOST, Call, Host, Operator, Value, is_fixed, object_array
from onnxfuse.pytorch.bridge.weights import (
    CALLED,
    Keys,
    Weight,
    check_ties,
    constant_value,
    is_trainable,
    of_node,
    of_proto,
    stored,
    to_tensor,
    torch_type,
)


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
    `module.meta["inputs"]` and `module.meta["outputs"]` list the names.

    Args:
        model: is left as it is.
        trainable: which stored tensors become Parameters; default `weights.is_trainable`.
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
    flat = _without_functions(loaded)
    names = list(outputs) if outputs is not None else [info.name for info in loaded.outputs]
    opsets = {o.domain: o.version for o in flat.source.opset_import}
    root = _Root(weights, trainable or is_trainable, opsets, shared_gradients)
    root.run_model(flat, names)
    module = fx.GraphModule(root.modules, root.graph, class_name="OnnxModule")
    _complete(module, root.modules)
    module.meta["inputs"] = [info.name for info in flat.inputs]
    module.meta["outputs"] = names
    return module.eval()


def _without_functions(model: Model) -> Model:
    """The model with its local functions inlined."""
    if not model.source.functions:
        return model
    flat = onnx.inliner.inline_local_functions(model.to_proto())
    return Model.load(flat, folder=model.folder)


def _complete(module: nn.Module, source: nn.Module) -> None:
    """Makes up for what torch.fx leaves undone when it copies what the graph uses: weights that nothing uses,
    and constants that are not part of the state."""
    constants = module.get_submodule(CALLED) if CALLED in module._modules else nn.Module()
    constants._non_persistent_buffers_set.update(constants._buffers)
    there = {key for key, _ in (*module.named_parameters(), *module.named_buffers())}
    for key, tensor in (*source.named_parameters(), *source.named_buffers()):
        if key not in there:
            _put(module, key, tensor)


def _put(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Registers a Parameter or buffer under an attribute path."""
    *above, leaf = key.split(".")
    for name in above:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def _host_tensor(elements: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor."""
    return torch.tensor(elements, dtype=dtype, device=device)


def _share_of_gradient(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """The tensor itself; what flows back into it is multiplied by the share."""
    return tensor.detach() + share * (tensor - tensor.detach())


# --- scopes ------------------------------------------------------------------------------------------------


class Scope:
    """One graph being built: that of the model, or that of a body.

    Attributes:
        graph: what has been emitted so far.
        modules: holds what the graph refers to by attribute path.
    """

    def __init__(self, path: tuple[tuple[str, str], ...]) -> None:
        self.graph = fx.Graph()
        self.modules = nn.Module()
        self.modules.add_module(CALLED, nn.Module())
        self.path = path
        self._values: dict[str, Value] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._calls = Keys()

    # what differs between the model and a body

    @property
    def root(self) -> _Root:
        raise NotImplementedError

    def find(self, name: str) -> Value | None:
        """The value of that name, from outside if need be."""
        raise NotImplementedError

    def fetch(self, key: str) -> fx.Node:
        """The node that yields a Parameter or buffer of the module."""
        raise NotImplementedError

    def device(self) -> fx.Node:
        """The node that yields the device of the first input."""
        raise NotImplementedError

    # what rules ask for

    def tensor(self, value: Value) -> fx.Node:
        """The value as a tensor."""
        if value.node is None and value.stored:
            if value.key is None:
                value.key = self.root.constant(value.name, value.load)
            value.node = self.fetch(value.key)
        elif value.node is None:
            value.node = self._from_host(value)
        return value.node

    def _from_host(self, value: Value) -> fx.Node:
        if value.host is None:
            raise AssertionError(f"'{value.name}' is neither tensor nor host value")
        dtype = value.dtype or _type_of(value.host)
        if is_fixed(value.host):
            array = np.array(value.host.tolist())
            tensor = torch.tensor(array).to(dtype)
            return self.fetch(self.root.buffer(value.name, tensor))
        return self.graph.call_function(_host_tensor, (value.host.tolist(), dtype, self.device()))

    def host(self, value: Value) -> Host | None:
        """The numbers of the value, if they are known on the host: shapes, and small constants."""
        if value.host is None and value.load is not None and not value.trainable and value.dtype is not None:
            most = 1 if value.dtype.is_floating_point else MOST_ON_HOST
            if math.prod(size or 0 for size in value.sizes or ()) <= most:
                value.host = object_array(value.load().tolist())
        return value.host

    def size(self, node: fx.Node, axis: int) -> fx.Node:
        """The node that yields one size of a tensor."""
        if (node, axis) not in self._sizes:
            self._sizes[node, axis] = self.graph.call_method("size", (node, axis))
        return self._sizes[node, axis]

    def module(self, module: nn.Module, operator: Operator, args: tuple[Any, ...]) -> fx.Node:
        """A call of a module, registered under the name of its node."""
        name = self._calls.claim((operator.outputs[0] or "call").replace(".", "_"))
        self.modules.get_submodule(CALLED).add_module(name, module)
        return self.graph.call_module(f"{CALLED}.{name}", args)

    def body(self, key: str, operator: Operator) -> tuple[fx.GraphModule, list[Any]]:
        """A body as a module, and the arguments to call it with: what it captures."""
        body = _Body(self, (*self.path, (operator.outputs[0], key)))
        graph = operator.attributes[key]
        results = body.run_body(graph)
        body.graph.output(tuple(body.tensor(result) for result in results))
        body.graph.eliminate_dead_code(_has_effects)
        return fx.GraphModule(body.modules, body.graph, class_name="OnnxBody"), list(body.captured)

    def inline(self, key: str, operator: Operator) -> list[Value]:
        """The outputs of a body that is run right here."""
        outer, path = dict(self._values), self.path
        self.path = (*path, (operator.outputs[0], key))
        results = self.run_body(operator.attributes[key])
        self._values, self.path = outer, path
        return results

    # running nodes

    def run_body(self, graph: GraphProto) -> list[Value]:
        """Imports a body's nodes; its outputs."""
        infos = {v.name: shapes.info_of(v) for v in (*graph.value_info, *graph.output)}
        for proto in graph.initializer:
            self.store(proto.name, partial(onnx.numpy_helper.to_array, proto))
        for node in graph.node:
            self.run_proto(node, infos)
        return [self.look_up(output.name) for output in graph.output]

    def run_proto(self, node: NodeProto, infos: dict[str, shapes.TensorInfo]) -> None:
        value = constant_value(node)
        if value is None:
            self.run(of_proto(node), infos)
        else:
            self.store(node.output[0], partial(np.asarray, value))

    def _with_share(self, value: Value, share: str, operator: Operator) -> Value:
        """The value, of whose gradient through this operator only a share counts."""
        try:
            factor = float(share)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise NotApplicableError(f"node {operator.label}: {GRADIENT_KEY} is '{share}', no number")
        found = Value(value.name, value.dtype, value.rank, sizes=value.sizes)
        found.node = self.graph.call_function(_share_of_gradient, (self.tensor(value), factor))
        return found

    def _all_on_host(self, values: Iterable[Value]) -> bool:
        return all(self.host(value) is not None for value in values)

    def store(self, name: str, load: Callable[[], np.ndarray]) -> None:
        """Notes a stored value of this scope."""
        weight = self.root.weights.get((self.path, name))
        if weight is None:
            array = load()
            value = Value(name, torch_type(array.dtype), array.ndim, load=load, sizes=array.shape)
        else:
            value = Value(name, torch_type(weight.dtype), len(weight.shape), load=load, sizes=weight.shape)
            value.key, value.trainable = weight.key, weight.key in self.root.trainable
        self._values[name] = value

    def look_up(self, name: str) -> Value:
        found = self.find(name)
        if found is None:
            raise AssertionError(f"'{name}' has no producer")
        return found

    def run(self, operator: Operator, infos: dict[str, shapes.TensorInfo]) -> None:
        """Imports one node."""
        rule = TABLE.get(operator.key)
        inputs = [self.look_up(name) if name else None for name in operator.inputs]
        share = operator.metadata.get(GRADIENT_KEY) if self.root.shared_gradients else None
        if share is not None and len(inputs) > 1 and inputs[1] is not None:
            inputs[1] = self._with_share(inputs[1], share, operator)
        call = Call(self, operator, inputs, self.root.opsets.get(operator.domain, 0))
        if rule is None:
            call.refuse(
                f"there is no rule for operator '{operator.kind}'; "
                "teach it one with onnxfuse.pytorch.register"
            )
        result = None
        there = [value for value in inputs if value is not None]
        if rule.host is not None and _belongs_on_host(there) and self._all_on_host(there):
            result = rule.host(call, *(None if value is None else value.host for value in inputs))
        if result is None:
            result = rule.function(call)
        results = result if isinstance(result, tuple) else (result,)
        for name, found in zip(operator.outputs, results, strict=False):
            if name:
                self._values[name] = _as_value(name, found, infos.get(name))
        for name in operator.outputs[len(results) :]:
            if name:
                call.refuse(f"its output '{name}' is not supported")


def _belongs_on_host(there: Sequence[Value]) -> bool:
    """Whether there is a host value among the inputs, or nothing but integers: weights stay tensors."""
    integers = all(v.dtype is not None and not v.dtype.is_floating_point for v in there if v.stored)
    return bool(there) and (integers or any(not value.stored for value in there))


def _as_value(name: str, found: Any, info: shapes.TensorInfo | None) -> Value:
    known = Value(name) if info is None else _declared(info)
    if isinstance(found, Value):
        rank = known.rank if found.rank is None else found.rank
        same = Value(name, found.dtype or known.dtype, rank, found.node, found.host, found.load, found.key)
        same.trainable = found.trainable
        same.sizes = known.sizes if found.sizes is None else found.sizes
        return same
    if isinstance(found, np.ndarray):
        return Value(name, known.dtype or _type_of(found), found.ndim, host=found)
    known.node = found
    return known


def _declared(info: shapes.TensorInfo) -> Value:
    """A value of which only type and shape are known yet."""
    if info.shape is None:
        return Value(info.name, torch_type(info.dtype))
    sizes = tuple(size if isinstance(size, int) else None for size in info.shape)
    return Value(info.name, torch_type(info.dtype), len(sizes), sizes=sizes)


def _type_of(host: Host) -> torch.dtype:
    """The element type of numbers that nothing declares."""
    kinds = {type(element) for element in host.flat if not isinstance(element, fx.Node)}
    if float in kinds:
        return torch.float32
    return torch.bool if kinds == {bool} else torch.int64


class _Root(Scope):
    """The model's own graph, and the weights of all scopes."""

    def __init__(
        self,
        weights: Iterable[Weight],
        trainable: Callable[[Weight], bool],
        opsets: dict[str, int],
        shared_gradients: bool,
    ) -> None:
        super().__init__(())
        self.shared_gradients = shared_gradients
        self.weights = {(weight.scope, weight.name): weight for weight in weights}
        self.opsets = {"" if domain == "ai.onnx" else domain: version for domain, version in opsets.items()}
        self.trainable: set[str] = set()
        self._inputs: list[fx.Node] = []
        for weight in self.weights.values():
            tensor = to_tensor(weight.load())
            if trainable(weight):
                if not weight.is_float:
                    raise InputError(f"'{weight.name}' can't be trainable: it holds {weight.dtype}")
                self.trainable.add(weight.key)
                tensor = nn.Parameter(tensor)
            _put(self.modules, weight.key, tensor)

    @property
    def root(self) -> _Root:
        return self

    def find(self, name: str) -> Value | None:
        return self._values.get(name)

    def fetch(self, key: str) -> fx.Node:
        if key not in self._attributes:
            self._attributes[key] = self.graph.get_attr(key)
        return self._attributes[key]

    def device(self) -> fx.Node:
        if not self._inputs:
            raise NotApplicableError("a model without inputs can't be imported to PyTorch")
        if "" not in self._attributes:
            self._attributes[""] = self.graph.call_function(getattr, (self._inputs[0], "device"))
        return self._attributes[""]

    def constant(self, name: str, load: Callable[[], np.ndarray] | None) -> str:
        """Registers a constant that is no weight; its key."""
        array = load() if load is not None else np.empty(0)
        if torch_type(array.dtype) is None:
            raise NotApplicableError(
                f"tensor '{name}' can't be imported to PyTorch: torch has no {array.dtype}"
            )
        return self.buffer(name, to_tensor(array))

    def buffer(self, name: str, tensor: torch.Tensor) -> str:
        """Registers a tensor that is no state of the model; its key."""
        key = f"{CALLED}.{self._calls.claim(name.replace('.', '_'))}"
        _put(self.modules, key, tensor)
        return key

    def run_model(self, model: Model, outputs: Sequence[str]) -> None:
        """Imports what the outputs need."""
        infos = model.shapes()
        arguments = _Arguments()
        for info in model.inputs:
            node = self.graph.placeholder(arguments.claim(info.name))
            self._inputs.append(node)
            self._values[info.name] = _declared(info)
            self._values[info.name].node = node
        for tensor in model.initializers:
            weight = self.weights.get(((), tensor.name))
            self.store(tensor.name, weight.load if weight else partial(getattr, tensor, "values"))
        needed = _needed(model, outputs)
        for node in model.nodes:
            if node.constant_form:
                tensor = node.outputs[0]
                self.store(tensor.name, partial(_value_of, model, tensor.name))
            elif node in needed:
                self.run(of_node(node), infos)
        results = [self.tensor(self.look_up(name)) for name in outputs]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        self.graph.eliminate_dead_code(_has_effects)


class _Body(Scope):
    """The graph of a body. What it captures become its arguments, in the order of `captured`."""

    def __init__(self, parent: Scope, path: tuple[tuple[str, str], ...]) -> None:
        super().__init__(path)
        self.parent = parent
        self.captured: dict[fx.Node, fx.Node] = {}

    @property
    def root(self) -> _Root:
        return self.parent.root

    def find(self, name: str) -> Value | None:
        if name not in self._values:
            outer = self.parent.find(name)
            if outer is None:
                return None
            self._values[name] = self._captured_value(outer)
        return self._values[name]

    def _captured_value(self, outer: Value) -> Value:
        value = Value(outer.name, outer.dtype, outer.rank, load=outer.load, sizes=outer.sizes, key=outer.key)
        value.trainable = outer.trainable
        if outer.stored:
            return value
        if outer.host is not None:
            value.host = object_array(outer.host.tolist())
            flat = value.host.reshape(-1)
            for place, element in enumerate(flat):
                flat[place] = self._capture(element) if isinstance(element, fx.Node) else element
            value.host = flat.reshape(outer.host.shape)
            return value
        value.node = self._capture(self.parent.tensor(outer))
        return value

    def _capture(self, outer: fx.Node) -> fx.Node:
        if outer not in self.captured:
            first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
            with self.graph.inserting_before(first) if first is not None else contextlib.nullcontext():
                self.captured[outer] = self.graph.placeholder(f"captured_{len(self.captured)}")
        return self.captured[outer]

    def fetch(self, key: str) -> fx.Node:
        return self._capture(self.parent.fetch(key))

    def device(self) -> fx.Node:
        return self._capture(self.parent.device())


def _has_effects(node: fx.Node) -> bool:
    """Whether a node stays even if nothing uses it."""
    return node.op in ("placeholder", "output")


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


class _Arguments:
    """Names of inputs as Python arguments, each once."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def claim(self, name: str) -> str:
        clean = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not clean or clean[0].isdigit() or keyword.iskeyword(clean) or clean == "self":
            clean = f"_{clean}" if clean else "x"
        found, count = clean, 0
        while found in self._used:
            count += 1
            found = f"{clean}_{count}"
        self._used.add(found)
        return found
