"""Rules for operators and biases that do nothing, and for rearrangements in a row."""

from __future__ import annotations

import math

import numpy as np

from onnxfuse.analysis.constant_folding import integers
from onnxfuse.analysis.noops import handed_on, permutation
from onnxfuse.fitting.folding.workspace import Decision, Edit, Workspace, refuse
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import is_main_domain, optional_input
from onnxfuse.ops.table import OPS, Kind, Trait

_REPEATING = ("Expand", "Tile", "Reshape", "Unsqueeze", "Cast", "CastLike", "Identity")
"""Operators that make zeros of a zero, in another shape or type."""

_SAME_ORDER = OPS.of_kind(Kind.MOVE).having(Trait.SAME_ORDER)


def remove_no_op(workspace: Workspace, node: Node) -> Decision:
    """Take out a node whose output is its input."""
    source = handed_on(workspace.model, node, workspace.shapes)
    if source is None:
        return None
    return bypass(workspace, node, source, f"{node.op} does nothing here: removed")


def bypass(workspace: Workspace, node: Node, source: Tensor, what: str) -> Decision:
    """Let everything that reads the node's output read `source` instead.

    An output that is pinned to its name is taken over by the source's producer, if that can give its own up.
    If it can't, the node stays for that name alone: whatever else reads it reads the source.

    Args:
        workspace: of the node.
        node: has one output, to be removed.
        source: the tensor that its output equals.
        what: the edit in words.
    """
    model, target = workspace.model, node.outputs[0]
    if not target.outputs and not workspace.pinned(target):  # dead as it came; not ours to clean up
        return None
    if workspace.pinned(target) and _can_give_up_name(workspace, source):
        return _renamed(workspace, node, source, what)
    follow = workspace.can_all_read(target, source)
    stays = model.is_output(target) or not follow
    if stays and not target.outputs and not (follow and model.captured(target)):
        return refuse(
            node, f"{node.op} does nothing, but connects '{source.name}' to '{target.name}': both stay"
        )

    def make() -> list[Node]:
        users = workspace.read_instead(target, source)
        if not stays:
            dropped = list(node.inputs)
            workspace.overriding(t for t in dropped if t is not source)
            model.remove([node])
            workspace.release(dropped)
        return users

    return Edit(
        (node.site_name,), f"'{source.name}' is read as it is, not through {node.op}" if stays else what, make
    )


def _can_give_up_name(workspace: Workspace, source: Tensor) -> bool:
    model = workspace.model
    return model.producer(source) is not None and not model.is_weight(source) and not workspace.pinned(source)


def _renamed(workspace: Workspace, node: Node, source: Tensor, what: str) -> Edit:
    """The edit that gives the source the name of the node's output."""
    model, target = workspace.model, node.outputs[0]
    producer = model.producer(source)
    assert producer is not None

    def make() -> list[Node]:
        workspace.overriding(node.inputs)
        dropped = [t for t in node.inputs if t is not source]
        model.remove([node])
        producer.outputs[next(i for i, t in enumerate(producer.outputs) if t is source)] = target
        users = workspace.read_instead(source, target)
        workspace.release(dropped)
        return [producer, *users]

    return Edit((node.site_name,), what, make)


def join_transposes(workspace: Workspace, node: Node) -> Decision:
    """Join two Transposes in a row: output axis i is axis first[second[i]] of the input."""
    before = workspace.model.producer(node.inputs[0])
    if before is None or before.op != "Transpose" or not is_main_domain(before):
        return None
    first, second = (permutation(workspace.model, n, workspace.shapes) for n in (before, node))
    if first is None or second is None or len(first) != len(second):
        return None
    perm = [first[p] for p in second]
    if perm == sorted(perm):
        return bypass(workspace, node, before.inputs[0], "a Transpose undoes the one before it: removed")
    if workspace.only_user(node.inputs[0]) is not node:
        return None
    names = (before.site_name, node.site_name)

    def make() -> list[Node]:
        between = node.inputs[0]
        node.attrs["perm"] = perm
        node.inputs[0] = before.inputs[0]
        workspace.mark(node, names)
        workspace.release([between])
        return [node]

    return Edit(names, "two Transposes joined", make)


def join_reshapes(workspace: Workspace, node: Node) -> Decision:
    """Take out what rearranges before a Reshape, which need not care for the shape of its input unless it
    copies sizes from it."""
    before = workspace.model.producer(node.inputs[0])
    if before is None or before.key not in _SAME_ORDER:
        return None
    target = integers(workspace.model, optional_input(node, 1))
    if target is None or 0 in target or workspace.only_user(node.inputs[0]) is not node:
        return None
    names = (before.site_name, node.site_name)

    def make() -> list[Node]:
        between = node.inputs[0]
        node.inputs[0] = before.inputs[0]
        workspace.mark(node, names)
        workspace.release([between])
        return [node]

    return Edit(names, f"{before.op} before Reshape removed", make)


def drop_zero_bias(workspace: Workspace, node: Node) -> Decision:
    """Take out a bias that is computed as a row of zeros: exporters expand a zero where a layer has none."""
    bias = optional_input(node, 2)
    if bias is None or workspace.model.is_weight(bias) or not _is_zero(workspace.model, bias):
        return None

    def make() -> list[Node]:
        node.inputs.pop()
        workspace.release([bias])
        return [node]

    return Edit((node.site_name,), f"a bias of zeros, computed for {node.op}: removed", make)


def _is_zero(model: Model, tensor: Tensor) -> bool:
    """Whether nothing but a zero is in a tensor, as far as one can tell without computing it."""
    if model.is_weight(tensor):
        dtype, shape = weight_type(model, tensor)
        return dtype.kind in "fiu" and math.prod(shape) == 1 and not np.any(model.weight(tensor))
    node = model.producer(tensor)
    if node is None or not is_main_domain(node):
        return False
    if node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        return value is None or not np.any(value.values)
    return node.op in _REPEATING and _is_zero(model, node.inputs[0])


def constant_if(workspace: Workspace, node: Node) -> Decision:
    """Refuse an If one of whose branches can never run: say that both stay."""
    constant = workspace.model.is_weight(node.inputs[0])
    return refuse(node, "the condition is constant, but branches are not inlined") if constant else None
