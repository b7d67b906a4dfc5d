"""Where a network can become deeper: behind which layers, and by copies of which residual blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onnxfuse.analysis.layers import IDEMPOTENT, Layer, find_layers, followed
from onnxfuse.analysis.residual_blocks import Block, before, find_blocks
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node

DepthScheme = Literal["r2r", "net2net"]


@dataclass(frozen=True, eq=False)
class DeepeningSite:
    """Where a network may be deepened: behind a layer, or with a copy of a chain of residual blocks.

    Attributes:
        names: of the operators, or of the sum.
        place: the layer, or the blocks in a row; None where there is an `obstacle`.
        obstacle: why nothing can be added there.
        sum: whether it is a residual sum.
    """

    names: tuple[str, ...]
    place: Layer | Sequence[Block] | None
    obstacle: str | None
    sum: bool


def find_sites(model: Model, scheme: DepthScheme, blocks: int = 1) -> list[DeepeningSite]:
    """Every place where layers may be added, and every residual sum, with what stands in the way.

    Args:
        model: stays as it is.
        scheme: of the new layers.
        blocks: number of residual blocks in a row that are to be copied.
    """
    leading = followed(model)
    found = []
    for layer in find_layers(model):
        reason = _layer_obstacle(model, layer, scheme)
        if any(end not in leading for end in layer.ends):
            reason = "no operator with weights follows it"
        found.append(DeepeningSite(layer.names, None if reason else layer, reason, False))
    every = find_blocks(model)
    for node in every:
        chain = _chain(model, every, node, blocks)
        if scheme == "net2net":
            chain = "net2net adds layers, not blocks: name an operator"
        elif node.outputs[0] not in leading:
            chain = "no operator with weights follows it"
        reason, place = (chain, None) if isinstance(chain, str) else (None, chain)
        found.append(DeepeningSite((node.site_name,), place, reason, True))
    return found


def _layer_obstacle(model: Model, layer: Layer, scheme: DepthScheme) -> str | None:
    if layer.ops[0].dtype.kind != "f":
        return f"its weights are {layer.ops[0].dtype}"
    other = next((psi for psi in layer.activations if psi and psi.key not in IDEMPOTENT), None)
    if scheme == "net2net" and other is not None:
        return f"{other.op} applied twice is not {other.op} applied once, as net2net needs; r2r can"
    return None


def _chain(model: Model, every: Mapping[Node, Block | str], node: Node, blocks: int) -> list[Block] | str:
    """The last blocks before a sum and that of the sum, in order, or why they can't be copied."""
    chain: list[Block] = []
    while len(chain) < blocks:
        block = every.get(node)
        if not isinstance(block, Block):
            return block or f"there are only {len(chain)} residual blocks in a row"
        chain.insert(0, block)
        previous = before(model, block)
        if previous is None:
            break
        node = previous
    return chain if len(chain) == blocks else f"there are only {len(chain)} residual blocks in a row"
