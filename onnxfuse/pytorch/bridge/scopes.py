"""Graphs of torch.fx being built, node by node: that of a model, and those of the bodies in it."""

from __future__ import annotations

import contextlib
import keyword
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto
from torch import fx, nn

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir import shapes
from onnxfuse.ir.marks import GRADIENT_KEY
from onnxfuse.pytorch.bridge.keys import CALLED, Keys
from onnxfuse.pytorch.bridge.operator import Operator, constant_value, of_proto
from onnxfuse.pytorch.bridge.registry import TorchRule
from onnxfuse.pytorch.bridge.rules import TABLE
from onnxfuse.pytorch.bridge.store import Store, holder
from onnxfuse.pytorch.bridge.tensors import torch_type
from onnxfuse.pytorch.bridge.values import MOST_ON_HOST, Call, Host, Value, is_fixed, object_array
from onnxfuse.runtime.failures import one_line


class GraphScope:
    """One graph being built: that of the model, or that of a body.

    Attributes:
        store: the stored tensors of the whole model.
        path: (first output, attribute) of the nodes around it, outermost first.
        graph: what has been emitted so far.
        modules: holds what the graph refers to by attribute path.
    """

    def __init__(
        self, store: Store, path: tuple[tuple[str, str], ...], modules: nn.Module, calls: Keys
    ) -> None:
        """
        Args:
            store: the stored tensors of the whole model.
            path: (first output, attribute) of the nodes around it, outermost first.
            modules: what the graph refers to is registered there.
            calls: the names taken in the submodule of `modules` for what is called.
        """
        self.store = store
        self.graph = fx.Graph()
        self.modules = modules
        self.path = path
        self._values: dict[str, Value] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._calls = calls

    # what differs between the model and a body

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
                value.key = self.store.constant(value.name, value.load)
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
            return self.fetch(self.store.buffer(value.name, tensor))
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
        body = BodyScope(self, (*self.path, (operator.outputs[0], key)))
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
        """The outputs of a body, whose nodes are imported here."""
        infos = {v.name: shapes.info_of(v) for v in (*graph.value_info, *graph.output)}
        for proto in graph.initializer:
            self.keep(proto.name, partial(onnx.numpy_helper.to_array, proto))
        for node in graph.node:
            self.run_proto(node, infos)
        return [self.look_up(output.name) for output in graph.output]

    def run_proto(self, node: NodeProto, infos: dict[str, shapes.TensorInfo]) -> None:
        value = constant_value(node)
        if value is None:
            self.run(of_proto(node), infos)
        else:
            self.keep(node.output[0], partial(np.asarray, value))

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

    def keep(self, name: str, load: Callable[[], np.ndarray]) -> None:
        """Note a stored value of this scope."""
        weight = self.store.weights.get((self.path, name))
        if weight is None:
            array = load()
            value = Value(name, torch_type(array.dtype), array.ndim, load=load, sizes=array.shape)
        else:
            value = Value(name, torch_type(weight.dtype), len(weight.shape), load=load, sizes=weight.shape)
            value.key, value.trainable = weight.key, weight.key in self.store.trainable
        self._values[name] = value

    def look_up(self, name: str) -> Value:
        found = self.find(name)
        if found is None:
            raise AssertionError(f"'{name}' has no producer")
        return found

    def run(self, operator: Operator, infos: dict[str, shapes.TensorInfo]) -> None:
        """Import one node."""
        rule = TABLE.get(operator.key)
        inputs = [self.look_up(name) if name else None for name in operator.inputs]
        share = operator.metadata.get(GRADIENT_KEY) if self.store.shared_gradients else None
        if share is not None and len(inputs) > 1 and inputs[1] is not None:
            inputs[1] = self._with_share(inputs[1], share, operator)
        call = Call(self, operator, inputs, self.store.opsets.get(operator.domain, 0))
        if rule is None:
            call.refuse(
                f"there is no rule for operator '{operator.kind}'; "
                "teach it one with onnxfuse.pytorch.register"
            )
        try:
            result = self._ruled(rule, call)
        except (IndexError, OverflowError, ValueError) as error:  # nothing has run the model
            call.refuse(f"it does not take such inputs or attributes ({one_line(error)})")
        results = result if isinstance(result, tuple) else (result,)
        for name, found in zip(operator.outputs, results, strict=False):
            if name:
                self._values[name] = _as_value(name, found, infos.get(name))
        for name in operator.outputs[len(results) :]:
            if name:
                call.refuse(f"its output '{name}' is not supported")

    def _ruled(self, rule: TorchRule, call: Call) -> Any:
        """What a rule makes of a node: on the host where all is known there."""
        there = [value for value in call.inputs if value is not None]
        if rule.host is not None and _belongs_on_host(there) and self._all_on_host(there):
            found = rule.host(call, *(None if value is None else value.host for value in call.inputs))
            if found is not None:
                return found
        return rule.function(call)


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


class ModelScope(GraphScope):
    """The model's own graph."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, (), store.modules, store.calls)
        self._inputs: list[fx.Node] = []
        self._arguments = _Arguments()

    def add_input(self, info: shapes.TensorInfo) -> None:
        """Make an input of the model the next argument."""
        node = self.graph.placeholder(self._arguments.claim(info.name))
        self._inputs.append(node)
        self._values[info.name] = _declared(info)
        self._values[info.name].node = node

    def finish(self, outputs: Sequence[str]) -> None:
        """Let the graph return these tensors, several of them as a tuple, and drop what they don't need."""
        results = [self.tensor(self.look_up(name)) for name in outputs]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        self.graph.eliminate_dead_code(_has_effects)

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


class BodyScope(GraphScope):
    """The graph of a body. What it captures become its arguments, in the order of `captured`."""

    def __init__(self, parent: GraphScope, path: tuple[tuple[str, str], ...]) -> None:
        super().__init__(parent.store, path, holder(), Keys())
        self.parent = parent
        self.captured: dict[fx.Node, fx.Node] = {}

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


def _host_tensor(elements: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor."""
    return torch.tensor(elements, dtype=dtype, device=device)


def _share_of_gradient(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """The tensor itself; what flows back into it is multiplied by the share."""
    return tensor.detach() + share * (tensor - tensor.detach())
