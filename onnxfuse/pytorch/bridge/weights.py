"""The stored tensors of a model, and what becomes of each in PyTorch.

Every initializer, and every float tensor in a Constant node, gets a *key*: the attribute path under which the
module holds it, and its name in the state_dict. The key is the tensor's own name wherever Python and torch
allow it; ties come for free, since a tensor that several nodes share is one attribute.

What is trainable is a predicate of `Weight`. The default, `is_trainable`, takes float tensors of more than
one element in a weight slot of some operator (its rule says which), as long as they don't look like masks.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, numpy_helper

from onnxfuse.errors import ModelWarning
from onnxfuse.ir import protos
from onnxfuse.ir.functions import without_functions
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant
from onnxfuse.ops.table import OPS, Key, Kind, Trait, parse_key
from onnxfuse.pytorch.bridge.keys import Keys
from onnxfuse.pytorch.bridge.operator import Operator, constant_value, of_node, of_proto
from onnxfuse.pytorch.bridge.rules import TABLE
from onnxfuse.pytorch.bridge.tensors import torch_type

MASKED = 1e4
"""An additive mask holds values of this size or beyond; weights don't."""

_CARRIERS = OPS.having(Trait.CARRIES_WEIGHTS)  # a transposed embedding is still the embedding
# Operators that look at the shape or type of an input and not at its values.
_UNREAD = {*((key, 0) for key in OPS.of_kind(Kind.SHAPE)), (("", "CastLike"), 1)}
_STATISTICS = {(("", "BatchNormalization"), slot) for slot in (3, 4)}
# One matrix may embed tokens and project onto them: layers that are tied on purpose.
_MATRIX = {(("", op), slot) for op, slot in (("Gather", 0), *itertools.product(("MatMul", "Gemm"), (0, 1)))}


@dataclass(frozen=True)
class WeightUse:
    """A place where a stored tensor goes in, by itself or through operators that only hand it on."""

    op: str
    slot: int
    label: str

    @property
    def key(self) -> Key:
        """The operator's key in the tables."""
        return parse_key(self.op)


@dataclass(eq=False)
class Weight:
    """One stored tensor.

    Attributes:
        name: of the tensor in its graph.
        key: its attribute path in the module, and name in the state_dict.
        shape, dtype: as stored (NumPy).
        uses: where it goes in.
        scope: of a tensor in a body: (first output, attribute) of the nodes around it, outermost first.
        initializer: whether it is one; else the value of a Constant node.
        load: reads the value.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    scope: tuple[tuple[str, str], ...]
    initializer: bool
    load: Callable[[], np.ndarray]
    uses: list[WeightUse] = field(default_factory=list)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_float(self) -> bool:
        return _is_float(self.dtype)


def stored(model: Model) -> list[Weight]:
    """The stored tensors that a module holds, main graph first; not of types that torch lacks (strings)."""
    finder = _Finder()
    finder.main(model)
    return finder.found


def is_trainable(weight: Weight) -> bool:
    """The default predicate (module docstring)."""
    if not weight.is_float or weight.size <= 1:
        return False
    slots = [use for use in weight.uses if use.key in TABLE and use.slot in TABLE[use.key].weights]
    if not slots or any((use.key, use.slot) in _STATISTICS for use in weight.uses):
        return False
    return not all(TABLE[use.key].elementwise for use in slots) or not _is_mask(weight.load())


def _is_mask(array: np.ndarray) -> bool:
    """Whether an operand of Add or Mul is there to switch elements off."""
    values = array.astype(np.float32, copy=False)
    if not np.isfinite(values).all() or np.abs(values).max(initial=0) >= MASKED:
        return True
    # Nothing but 0 and one other number: 0 and 1 switch by a product, 0 and -100 (Swin) by a sum.
    other = values[values != 0]
    return bool(values.ndim > 1 and 0 < other.size < values.size and (other == other[0]).all())


def check_ties(weights: Iterable[Weight]) -> None:
    """Warn of tensors that are shared, but not as ties are: exporters merge constants that happen to be
    equal."""
    for weight in weights:
        users = {use.label: (use.key, use.slot) for use in weight.uses}
        kinds = set(users.values())
        if len(users) < 2 or not weight.is_float or weight.size <= 1:
            continue
        if not any(_is_slot(*kind) for kind in kinds):
            continue
        merged = weight.size <= 65536 and len(np.unique(weight.load())) == 1
        unlike = len(kinds) > 1 and not kinds <= _MATRIX
        if unlike or merged or kinds & _STATISTICS:
            names = ", ".join(list(users)[:3]) + (", ..." if len(users) > 3 else "")
            warnings.warn(
                f"'{weight.name}' is shared by {names}: an exporter may have merged equal constants; "
                "they train as one",
                ModelWarning,
                stacklevel=3,
            )


def _is_slot(key: Key, slot: int) -> bool:
    return (key in TABLE and slot in TABLE[key].weights) or (key, slot) in _STATISTICS


# --- finding -----------------------------------------------------------------------------------------------


class _Finder:
    """One walk over a model and its bodies: every stored tensor, and where it goes, into functions too.

    What lies in a function belongs to all its calls, and is none of the module's.
    """

    def __init__(self) -> None:
        self.found: list[Weight] = []
        self._keys = Keys()
        self._own: set[str] = set()

    def main(self, model: Model) -> None:
        self._own = {tensor.name for tensor in model.tensors()}
        for node in model.nodes:
            self._own.update(name for body in node.bodies for name in protos.inner_names(body))
        env: dict[str, list[Weight]] = {}
        for tensor in model.initializers:
            self._add_constant(env, tensor.name, tensor, True)
        for node in without_functions(model).nodes:
            if node.constant_form:
                name = node.outputs[0].name
                value = node.attrs[node.constant_form]
                constant = value if isinstance(value, Constant) else None
                if constant is not None and node.constant_form == "value":
                    self._add_constant(env, name, constant, False)
                elif node.constant_form == "value_floats":
                    self._add(env, name, np.array(value, np.float32), (), False)
            self._use(env, of_node(node), ())

    def _add_constant(
        self, env: dict[str, list[Weight]], name: str, constant: Constant, initializer: bool
    ) -> None:
        dtype = np.dtype(constant.dtype)
        if torch_type(dtype) is not None and (initializer or _wanted(dtype, constant.shape)):
            self._append(
                env, name, tuple(constant.shape), dtype, (), initializer, lambda: np.asarray(constant.values)
            )

    def _body(
        self, graph: GraphProto, outer: Mapping[str, list[Weight]], scope: tuple[tuple[str, str], ...]
    ) -> None:
        env = dict(outer)
        for proto in graph.initializer:
            array = numpy_helper.to_array(proto)
            if torch_type(array.dtype) is not None:
                self._add(env, proto.name, array, scope, True)
        for node in graph.node:
            value = constant_value(node)
            if value is not None and _wanted(value.dtype, value.shape):
                self._add(env, node.output[0], value, scope, False)
            self._use(env, of_proto(node), scope)

    def _add(
        self,
        env: dict[str, list[Weight]],
        name: str,
        array: np.ndarray,
        scope: tuple[tuple[str, str], ...],
        initializer: bool,
    ) -> None:
        self._append(env, name, array.shape, array.dtype, scope, initializer, lambda: array)

    def _append(
        self,
        env: dict[str, list[Weight]],
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        scope: tuple[tuple[str, str], ...],
        initializer: bool,
        load: Callable[[], np.ndarray],
    ) -> None:
        if name not in self._own:
            env.pop(name, None)
            return
        weight = Weight(name, self._keys.claim(name), shape, dtype, scope, initializer, load)
        self.found.append(weight)
        env[name] = [weight]

    def _use(self, env: dict[str, list[Weight]], node: Operator, scope: tuple[tuple[str, str], ...]) -> None:
        carried: list[Weight] = []
        for slot, name in enumerate(node.inputs):
            for weight in env.get(name, ()) if (node.key, slot) not in _UNREAD else ():
                if node.key not in _CARRIERS:
                    weight.uses.append(WeightUse(node.kind, slot, node.label))
                elif slot == 0 or node.op == "Concat":
                    carried.append(weight)
        if carried:
            env.update((name, carried) for name in node.outputs)
        for key, value in node.attributes.items():
            for body in value if isinstance(value, list) else [value]:
                if isinstance(body, GraphProto):
                    self._body(body, env, (*scope, (node.outputs[0], key)))


def _wanted(dtype: np.dtype, shape: Iterable[int]) -> bool:
    """Whether the value of a Constant node is held as a weight may be: a float tensor of some size."""
    return _is_float(dtype) and int(np.prod(tuple(shape), dtype=np.int64)) > 1


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"
