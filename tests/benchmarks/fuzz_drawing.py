"""What damages draw from: odd values, and the nodes, tensors and names of a model; and their register."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

Damage = Callable[[ModelProto, Random], None]
ByteDamage = Callable[[bytearray, Random], None]

BYTES: dict[str, ByteDamage] = {}
PARTS: dict[str, Damage] = {}
"""By name: damages to the bytes of a file, and to a parsed model."""

HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
ODD = (-(2**63), -(2**31), -7, -2, -1, 0, 1, 2, 3, 5, 64, *HUGE)
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 1e-45, 3.4e38)
NAMES = (
    "",
    " ",
    "x",
    "y",
    "a/b",
    "../x",
    "\u202e\u0000",
    "new\nline",
    "\x1b[31mred",
    "%s{0}",
    "N" * 5000,
    "é",
)
LOCATIONS = (
    "", ".", "..", "/etc/passwd", "/dev/zero", "../weights.bin", "a/../../weights.bin", "C:\\weights.bin",
    "..\\weights.bin", "missing.bin", "weights.bin/x", "model.onnx", "weights.bin\0", "file:///etc/passwd",
    "~/weights.bin", "w" * 5000,
)  # fmt: skip
LISTS = ("input", "output", "initializer", "value_info", "node")


def part(damage: Damage) -> Damage:
    PARTS[damage.__name__.replace("_", " ")] = damage
    return damage


def of_bytes(damage: ByteDamage) -> ByteDamage:
    BYTES[damage.__name__.replace("_", " ")] = damage
    return damage


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node, those of subgraphs and functions included."""
    stack = [model.graph.node, *(function.node for function in model.functions)]
    while stack:
        for node in stack.pop():
            yield node
            stack += [a.g.node for a in node.attribute if a.type == AttributeProto.GRAPH]


def a_node(model: ModelProto, draw: Random) -> NodeProto | None:
    found = list(all_nodes(model))
    return draw.choice(found) if found else None


def some_nodes(model: ModelProto, draw: Random) -> Any:
    """The nodes of the graph, of a subgraph or of a function."""
    found = [model.graph.node, *(function.node for function in model.functions)]
    found += [a.g.node for node in all_nodes(model) for a in node.attribute if a.type == AttributeProto.GRAPH]
    return draw.choice([nodes for nodes in found if nodes] or [()])


def an_owner(model: ModelProto, draw: Random, types: tuple[int, ...] = ()) -> NodeProto | None:
    """A node that has attributes, perhaps one of these types."""
    found = [node for node in all_nodes(model) if any(not types or a.type in types for a in node.attribute)]
    return draw.choice(found) if found else None


def a_value(model: ModelProto, draw: Random) -> ValueInfoProto | None:
    found = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return draw.choice(found) if found else None


def a_tensor(model: ModelProto, draw: Random) -> TensorProto | None:
    """An initializer, or the value of a constant."""
    found = list(model.graph.initializer)
    found += [a.t for node in all_nodes(model) for a in node.attribute if a.type == AttributeProto.TENSOR]
    return draw.choice(found) if found else None


def made(model: ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output]


def a_name(model: ModelProto, draw: Random) -> str:
    """That of a tensor, seldom of none."""
    fed = [value.name for value in (*model.graph.input, *model.graph.initializer)]
    return draw.choice([*made(model), *fed, "nothing", ""])


def import_domain(model: ModelProto, domain: str) -> None:
    if all(found.domain != domain for found in model.opset_import):
        model.opset_import.add(domain=domain, version=1)
