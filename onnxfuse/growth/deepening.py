"""New layers in a graph: branches and identities behind the layers that are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxfuse.analysis.layers import Layer
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor, Variable
from onnxfuse.numerics.random_weights import behind, uniform
from onnxfuse.ops.linear import LinearOp
from onnxfuse.ops.linear_building import add_linear, laid_out


def detach(model: Model, tensor: Tensor) -> Tensor:
    """The values of a tensor under another name: something else can now compute it for all that read it.

    A nameless node was called by the tensor; it keeps that as its name.
    """
    node = model.producer(tensor)
    assert node is not None
    node.name = node.site_name
    raw = Variable(model.unique_name(f"{tensor.name}_before"))
    node.outputs[node.outputs.index(tensor)] = raw
    return raw


def attach(model: Model, computed: Tensor, tensor: Tensor) -> None:
    """Let `computed` take over the name and the readers of a detached tensor.

    Args:
        model: edited in place.
        computed: output of some node.
        tensor: one that `detach` has left without a node.
    """
    node = model.producer(computed)
    assert node is not None
    node.outputs[node.outputs.index(computed)] = tensor


def unused_prefix(model: Model, base: str) -> str:
    """The words `base` and a number, with which the name of no node begins."""
    names = [node.name for node in model.nodes]
    number = 1
    while any(name.startswith(f"{base}{number}.") for name in names):
        number += 1
    return f"{base}{number}"


def add_branches(
    model: Model, layer: Layer, inner: Sequence[float], count: int, random: np.random.Generator, by: str
) -> None:
    """Put x + [V, -V] psi([U; U] ...) behind a layer, with a ReLU where it has no psi.

    Args:
        model: edited in place.
        layer: of it.
        inner: the widths between the layers of the branch, in output channels of the operator; the last is
            that of U and its twin together, made even.
        count: of branches.
        random: for the free weights.
        by: name of the pass.
    """
    stacks = [_twin_stack(layer.ops[0], inner, random) for _ in range(count)]
    _append(model, layer, stacks, "r2r", by, around=True)


def add_identities(model: Model, layer: Layer, count: int, by: str) -> None:
    """Put psi(I x) behind a layer whose psi is idempotent, or which has none.

    Args:
        model: edited in place.
        layer: of it.
        count: how many times.
        by: name of the pass.
    """
    op = layer.ops[0]
    inside = op.out_features // op.groups
    middle = 0
    for size in op.kernel:
        middle = middle * size + (size - 1) // 2
    taps = np.zeros((op.out_features, inside, math.prod(op.kernel)))
    taps[:, :, middle] = np.arange(op.out_features)[:, None] % inside == np.arange(inside)
    weight = taps.reshape(op.out_features, inside, *op.kernel)
    _append(model, layer, [[weight]] * count, "identity", by, around=False)


def _twin_stack(op: LinearOp, inner: Sequence[float], random: np.random.Generator) -> list[np.ndarray]:
    """Weights (out, in / groups, *kernel) of a branch that is zero: free ones, then [U; U] and [V, -V] in
    each group, twins side by side as in `growth.widening`."""
    kernel = op.weight

    def free(out: int, inside: int, sums: int) -> np.ndarray:
        deviation = behind(kernel, sums * math.prod(op.kernel))
        return uniform(random, (out, inside, *op.kernel), deviation)

    before = op.out_features // op.groups
    found = []
    for width in inner[:-1]:
        size = max(1, round(width * op.out_features / op.groups))
        found.append(free(op.groups * size, before, before))
        before = size
    half = max(1, round(inner[-1] * op.out_features / op.groups / 2))
    found.append(np.repeat(free(op.groups * half, before, before), 2, axis=0))
    v = np.repeat(free(op.out_features, half, 2 * half), 2, axis=1)
    v[:, 1::2] *= -1
    found.append(v)
    return found


def _append(
    model: Model, layer: Layer, stacks: Sequence[Sequence[np.ndarray]], what: str, by: str, *, around: bool
) -> None:
    """Put stacks of operators behind the layer, one behind the other, at each of its places with the same
    weights. `around`: each is a branch that ends without an activation and is added to what it reads."""
    op = layer.ops[0]
    for stack in stacks:
        prefix = unused_prefix(model, f"{op.name}.{what}")
        stored = [_store(model, op, weight, f"{prefix}.{i}") for i, weight in enumerate(stack)]
        for place, (end, psi) in enumerate(zip(layer.ends, layer.activations, strict=True)):
            tag = f"{prefix}.{place}" if len(layer.ends) > 1 else prefix
            x = y = detach(model, end)
            for index, weights in enumerate(stored):
                y = _linear(model, op, y, weights, f"{tag}.{index}", by)
                if not around or index < len(stored) - 1:
                    y = _activated(model, psi, y, f"{tag}.{index}.act", by, relu=around)
            if around:
                y = model.add_node("Add", [x, y], [f"{tag}.out"], name=f"{tag}.add", by=by).outputs[0]
            attach(model, y, end)


def _store(model: Model, op: LinearOp, weight: np.ndarray, prefix: str) -> list[Tensor]:
    """A weight (out, in / groups, *kernel) in the layout of operators like this one, and a bias of zeros if
    it has one."""
    flat = weight.reshape(len(weight), -1).astype(op.dtype)
    value = laid_out(_kind(op), flat, op.kernel, transposed=True)
    stored: list[Tensor] = [model.add_weight(f"{prefix}.weight", value)]
    if op.has_bias:
        stored.append(model.add_weight(f"{prefix}.bias", np.zeros(len(weight), op.dtype)))
    return stored


def _linear(model: Model, op: LinearOp, x: Tensor, weights: Sequence[Tensor], name: str, by: str) -> Tensor:
    """The output of an operator like `op` on x that leaves places where they are.

    Args:
        model: edited in place.
        op: what it is like.
        x: its input.
        weights: its weight, and its bias if it has one.
        name: of its node.
        by: name of the pass.
    """
    kind, bias = _kind(op), weights[1] if len(weights) > 1 else None
    attrs: dict[str, Any] = {"transB": 1} if kind == "Gemm" else {}
    if kind == "Conv":
        attrs = {"kernel_shape": list(op.kernel), "group": op.groups}
        attrs["pads"] = [(k - 1) // 2 for k in op.kernel] + [k // 2 for k in op.kernel]
    inner = (f"{name}.out", f"{name}.bias")
    last = f"{name}.biased" if kind == "MatMul" and bias is not None else f"{name}.out"
    y = Variable(model.unique_name(last))
    add_linear(model, kind, x, weights[0], bias, y, name, attrs=attrs, inner=inner, by=by)
    return y


def _kind(op: LinearOp) -> str:
    """The operator that a new layer behind `op` is of."""
    return op.node.op if op.node.op in ("Gemm", "MatMul") else "Conv"


def _activated(model: Model, psi: Node | None, x: Tensor, name: str, by: str, *, relu: bool) -> Tensor:
    """The tensor psi(x); where there is no psi, ReLU of x or x itself."""
    if psi is None and not relu:
        return x
    op, attrs, more = ("Relu", {}, []) if psi is None else (psi.op, psi.attrs, psi.inputs[1:])
    return model.add_node(op, [x, *more], [f"{name}.out"], attrs, name, by=by).outputs[0]
