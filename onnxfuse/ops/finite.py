"""The check that no stored value is NaN, or infinite where that would spoil every result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from onnxfuse.errors import InputError
from onnxfuse.ir.external_data import graph_tensors, node_tensors
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node
from onnxfuse.ir.validation import find_nonfinite, nonfinite
from onnxfuse.ops.table import OPS, Kind, Trait

PARAMETERS = OPS.weighted() - OPS.having(Trait.AFFINE).of_kind(Kind.ELEMENTWISE)
"""Operators whose weights must be finite. Elsewhere (a mask added before Softmax, a bound of Clip) an
infinity is meant."""


def check_finite(model: Model) -> None:
    """Stream all stored values; refuse NaN anywhere, and Inf where an operator of `PARAMETERS` reads it.

    Raises:
        InputError: names the tensor.
    """
    for tensor in model.initializers:
        _check(tensor.name, tensor, model.consumers(tensor))
    for node in model.nodes:
        for key, value in node.attrs.items():
            if isinstance(value, Constant) and node.constant_form:
                _check(node.outputs[0].name, value, model.consumers(node.outputs[0]))
            elif isinstance(value, Constant):
                _check(f"{key} of {node.label}", value, ())
    bodies = (graph_tensors(body) for node in model.nodes for body in node.bodies)
    functions = (node_tensors(node) for function in model.source.functions for node in function.node)
    for proto in itertools.chain.from_iterable((*bodies, *functions)):
        if find_nonfinite(proto, model.data) == "NaN":
            raise InputError(f"tensor '{proto.name}' has a NaN value")


def _check(name: str, tensor: Constant, users: Iterable[Node]) -> None:
    stored = tensor.stored
    found = nonfinite(tensor.values) if stored is None else find_nonfinite(stored.values_proto, stored.folder)
    if found == "NaN" or (found and any(node.key in PARAMETERS for node in users)):
        raise InputError(f"weight '{name}' has {'a NaN' if found == 'NaN' else 'an infinite'} value")
