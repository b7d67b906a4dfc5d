"""Constant values that are the same are shared: readers of an alias read the weight itself, and what is
computed twice from the same constants is computed once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import GraphProto

from onnxfuse.analysis.constant_folding import is_deterministic
from onnxfuse.analysis.noops import handed_on
from onnxfuse.findings import Change
from onnxfuse.fitting.folding.no_ops import bypass
from onnxfuse.fitting.folding.workspace import Edit, Workspace
from onnxfuse.ir import bodies
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node, Tensor
from onnxfuse.ops.layouts import weight_type

_LITERAL = 64
"""Elements up to which constants that no training changes are the same where their values are."""


def share_constants(workspace: Workspace) -> list[Change]:
    """Let whatever reads an alias of a weight read the weight, and share equal constant subexpressions."""
    changes = [Change(edit.nodes, edit.what, edit.detail) for edit in _aliases(workspace)]
    changes += _body_aliases(workspace.model)
    if merged := _merge_equal(workspace):
        changes.append(Change(tuple(merged), "computed from the same constants as others: shared"))
    return changes


def _aliases(workspace: Workspace) -> Iterator[Edit]:
    """The edits, made, that take operators that do nothing from between weights and their readers."""
    for node in list(workspace.model.nodes):
        if not node.outputs or not any(workspace.model.is_weight(t) for t in node.inputs):
            continue
        source = handed_on(workspace.model, node, workspace.shapes)
        if source is None or not workspace.model.is_weight(source):
            continue
        edit = bypass(workspace, node, source, f"readers of {node.op} read '{source.name}' itself: removed")
        if isinstance(edit, Edit):
            edit.make()
            yield edit


def _body_aliases(model: Model) -> list[Change]:
    """The same for what the Identities inside of subgraphs hand on."""
    changes = []
    for node in model.nodes:
        graphs = {key: body for key, body in node.attrs.items() if isinstance(body, GraphProto)}
        found = {key: bodies.without_aliases(body) for key, body in graphs.items()}
        for key, body in found.items():
            if body is not None:
                model.set_body(node, key, body)
                changes.append(Change((node.site_name,), f"Identities inside {node.op} removed"))
    return changes


def _merge_equal(workspace: Workspace) -> list[str]:
    """Names of the nodes whose readers now read an equal node's results."""
    model = workspace.model
    first: dict[object, Node] = {}
    constant: set[Tensor] = set()
    merged = []
    for node in list(model.nodes):
        inputs = [t for t in node.inputs if t.name]
        if not is_deterministic(node) or not all(t in constant or model.is_weight(t) for t in inputs):
            continue
        constant.update(node.outputs)
        twin, name = first.setdefault(_key(model, node), node), node.site_name
        if twin is not node and _take_over(workspace, node, twin):
            merged.append(name)
    return merged


def _take_over(workspace: Workspace, node: Node, twin: Node) -> bool:
    """Let the readers of a node's outputs read those of its twin; False where its outputs must stay."""
    model, pairs = workspace.model, list(zip(node.outputs, twin.outputs, strict=True))
    if any(model.is_output(old) or not workspace.can_all_read(old, new) for old, new in pairs):
        return False
    for old, new in pairs:
        workspace.read_instead(old, new)
    model.remove([node])
    return True


def _key(model: Model, node: Node) -> object:
    """What a node computes: equal keys, equal results."""
    attributes = sorted((name, _content(value)) for name, value in node.attrs.items())
    inputs = tuple(_identity(model, tensor) for tensor in node.inputs)
    return node.key, repr(attributes), inputs, tuple(bool(t.name) for t in node.outputs)


def _content(value: object) -> object:
    if isinstance(value, Constant):
        array = value.values
        return array.dtype.str, array.shape, array.tobytes()
    return value


def _identity(model: Model, tensor: Tensor) -> object:
    """A tensor; a literal by its value: integers, and numbers in Constant nodes, that nothing trains."""
    if not tensor.name:
        return None
    if not model.is_weight(tensor):
        return tensor
    dtype, shape = weight_type(model, tensor)
    elements = math.prod(shape)
    number = elements == 1 and not isinstance(tensor, Constant)
    if not number and not (dtype.kind in "iub" and elements <= _LITERAL):
        return tensor
    value = model.weight(tensor)
    assert value is not None
    return dtype.str, shape, value.tobytes()
