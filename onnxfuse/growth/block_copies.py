"""Copies of residual blocks that compute nothing yet."""

from __future__ import annotations

import numpy as np

from onnxfuse.analysis.residual_blocks import Block, is_own
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Tensor


def copy_block(model: Model, block: Block, x: Tensor, prefix: str, by: str) -> Tensor:
    """The tensor x + F'(E(x)) of a new copy of a block (`analysis.residual_blocks`).

    Args:
        model: edited in place.
        block: of it.
        x: what the copy reads.
        prefix: that names of new nodes and tensors begin with.
        by: name of the pass.
    """
    twins: dict[Tensor, Tensor] = {block.u: x}
    nodes = block.branch
    if block.entry is not None:
        del twins[block.u]
        twins[block.entry.inputs[0]] = x
        nodes = (block.entry, *nodes)
    zero = set(block.last)
    for node in nodes:
        for tensor in node.inputs:
            if tensor not in twins and is_own(model, tensor):
                value = model.weight(tensor)
                assert value is not None
                own = np.zeros_like(value) if tensor in zero else value.copy()
                twins[tensor] = model.add_weight(f"{prefix}.{tensor.name}", own)
        made = model.add_node(
            node.op,
            [twins.get(t, t) for t in node.inputs],
            [f"{prefix}.{t.name}" if t.name else "" for t in node.outputs],
            node.attrs,
            f"{prefix}.{node.site_name}",
            domain=node.domain,
            by=by,
        )
        twins.update(zip(node.outputs, made.outputs, strict=True))
    end = next(t for t in block.add.inputs if t is not block.u)
    name = f"{prefix}.{block.add.site_name}"
    return model.add_node("Add", [x, twins[end]], [f"{name}.out"], name=name, by=by).outputs[0]
