"""Two models side by side, node by node.

Nodes are matched by name; nodes without a name, or whose name is not unique, by the name of their first
output. A matched pair differs in operator, attributes, wiring (names of inputs and outputs) or weights. The
relative change of a weight is |b - a| / |a| in the Frobenius norm; one whose shape changed has none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node


@dataclass(frozen=True)
class NodeSummary:
    """A node that only one of the models has; `key` is its name or its first output."""

    key: str
    op: str


@dataclass(frozen=True)
class WeightChange:
    """A weight input that differs. `relative` is None where shapes or types do."""

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    relative: float | None


@dataclass(frozen=True)
class NodeChange:
    """A node that both models have and that differs: a line for everything but weights, and the weights."""

    key: str
    op: str
    what: tuple[str, ...]
    weights: tuple[WeightChange, ...]


@dataclass(frozen=True)
class Structure:
    """The structural difference of two models; `same` counts the nodes in which they agree."""

    only_a: tuple[NodeSummary, ...]
    only_b: tuple[NodeSummary, ...]
    changed: tuple[NodeChange, ...]
    same: int


def structure(a: Model, b: Model) -> Structure:
    """Match the nodes of the main graphs and compare them, weights one at a time.

    Raises:
        InputError: external data is gone.
    """
    ours, theirs = _keyed(a), _keyed(b)
    changed = []
    for key in ours:
        if key in theirs and (change := _compare(key, a, ours[key], b, theirs[key])):
            changed.append(change)
    only_a = tuple(NodeSummary(key, node.op) for key, node in ours.items() if key not in theirs)
    only_b = tuple(NodeSummary(key, node.op) for key, node in theirs.items() if key not in ours)
    return Structure(only_a, only_b, tuple(changed), len(ours) - len(only_a) - len(changed))


def _keyed(model: Model) -> dict[str, Node]:
    nodes = [node for node in model.nodes if node.constant_form is None]
    names = Counter(node.name for node in nodes)
    return {_key(node, names): node for node in nodes}


def _key(node: Node, names: Counter[str]) -> str:
    if node.name and names[node.name] == 1:
        return str(node.name)
    return next((str(tensor.name) for tensor in node.outputs if tensor.name), "")


def _compare(key: str, a: Model, ours: Node, b: Model, theirs: Node) -> NodeChange | None:
    what = []
    if (ours.op, ours.domain) != (theirs.op, theirs.domain):
        what.append(f"operator {_operator(ours)} -> {_operator(theirs)}")
    what += _attributes(ours, theirs)
    weights = []
    if len(ours.inputs) != len(theirs.inputs):
        what.append(f"{len(ours.inputs)} -> {len(theirs.inputs)} inputs")
    for index, (x, y) in enumerate(zip(ours.inputs, theirs.inputs, strict=False)):
        left, right = a.weight(x), b.weight(y)
        if (left is None) != (right is None):
            what.append(f"input {index} '{y.name}' became {'computed' if right is None else 'constant'}")
        elif left is None or right is None:
            if x.name != y.name:
                what.append(f"input {index} '{x.name}' -> '{y.name}'")
        elif change := _weight(str(x.name), left, right):
            weights.append(change)
    names = [[tensor.name for tensor in node.outputs] for node in (ours, theirs)]
    if names[0] != names[1]:
        what.append(f"outputs {', '.join(names[0])} -> {', '.join(names[1])}")
    return NodeChange(key, ours.op, tuple(what), tuple(weights)) if what or weights else None


def _operator(node: Node) -> str:
    return f"{node.domain}::{node.op}" if node.domain else str(node.op)


def _attributes(ours: Node, theirs: Node) -> list[str]:
    found = []
    for name in sorted(ours.attrs.keys() | theirs.attrs.keys()):
        values = [node.attrs.get(name) for node in (ours, theirs)]
        left, right = (_plain(value) for value in values)
        if left != right:
            said = [_text(value) for value in values]
            found.append(f"{name} {said[0]} -> {said[1]}" if said[0] != said[1] else f"{name} differs")
    return found


def _plain(value: object) -> object:
    """An attribute's value as something that `==` compares: arrays and subgraphs as their bytes."""
    if isinstance(value, Constant):
        value = value.values
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if hasattr(value, "SerializeToString"):
        return value.SerializeToString(deterministic=True)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, (Constant, np.ndarray)):
        return f"tensor {list(value.shape or ())}"
    if hasattr(value, "SerializeToString"):
        return "a subgraph"
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _weight(name: str, a: np.ndarray, b: np.ndarray) -> WeightChange | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return WeightChange(name, a.shape, b.shape, None)
    if np.array_equal(a, b) or a.dtype.kind not in "fiubc":
        return None if a.tobytes() == b.tobytes() else WeightChange(name, a.shape, b.shape, None)
    before, after = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    size = float(np.linalg.norm(before))
    change = float(np.linalg.norm(after - before))
    return WeightChange(name, a.shape, b.shape, change / size if size else float("inf"))
