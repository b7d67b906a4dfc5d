"""Edits of subgraphs, each of which gives a new one: the graphs themselves are never written to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnx import GraphProto, NodeProto

from onnxfuse.ir import protos


def reading(body: GraphProto, old: str, new: str) -> GraphProto | None:
    """The subgraph with another outer tensor read in the place of one.

    Args:
        body: the subgraph.
        old: name of a tensor that it reads from outside.
        new: name of the tensor that it is to read.

    Returns:
        None where it can't: it hands the tensor on as its own output, or calls something of its own `new`.
    """
    if any(value.name == old for value in body.output) or new in protos.inner_names(body):
        return None
    result = GraphProto()
    result.CopyFrom(body)
    return result if _rename(result.node, old, new) else None


def without_aliases(body: GraphProto) -> GraphProto | None:
    """The subgraph with whatever reads the output of an Identity reading its input, and without the
    Identities that have no use then; None where nothing changes."""
    result = GraphProto()
    result.CopyFrom(body)
    return result if _drop_aliases(result) else None


def _drop_aliases(graph: GraphProto) -> bool:
    outputs = {value.name for value in graph.output}
    changed = False
    for node in [n for n in graph.node if n.op_type == "Identity" and n.domain in protos.DEFAULT_DOMAINS]:
        source, alias = node.input[0], node.output[0]
        if not any(alias in _read(other) for other in graph.node) or not _rename(graph.node, alias, source):
            continue
        changed = True
        if alias not in outputs:
            graph.node.remove(node)
            for value in [v for v in graph.value_info if v.name == alias]:
                graph.value_info.remove(value)
    for node in graph.node:
        for body in protos.bodies(node):
            changed |= _drop_aliases(body)
    return changed


def _read(node: NodeProto) -> set[str]:
    """Names that the node and its subgraphs read."""
    return set(node.input).union(*map(protos.captured_names, protos.bodies(node)))


def _rename(nodes: Iterable[NodeProto], old: str, new: str) -> bool:
    """Let nodes read another tensor, in place; False, and nothing done, where a subgraph of theirs can't."""
    users = [node for node in nodes if old in _read(node)]
    inner: list[tuple[Any, GraphProto]] = []
    for node in users:
        for body in protos.bodies(node):
            if old in protos.captured_names(body):
                changed = reading(body, old, new)
                if changed is None:
                    return False
                inner.append((body, changed))
    for body, changed in inner:
        body.CopyFrom(changed)
    for node in users:
        node.input[:] = [new if name == old else name for name in node.input]
    return True
