"""Rules of regions: for each operator, how its outputs depend on the tensor that enters the region.

Regions are found by abstract interpretation: `u`, the tensor that enters, gets a `Flow`; each operator has a
rule that makes its outputs' flows from its inputs'; and what a tensor's flow says decides whether it can be
`v`. There are three views of the data, chosen at `u`:

- a *map* (N, C, *S): the tensor's axes are known one by one (`layout`: "N", "C", the number of a spatial
  axis, or None for an axis of size 1 that some Unsqueeze made), and each spatial axis has its window on u
  (`axes`, see `numerics.receptive_field`). Transposes to channels-last, a MatMul on the channel axis, a
  LayerNorm over channels are all fine.
- a *sample*: what a map becomes where its geometry is lost (flattened, pooled over the whole image). Only the
  batch axis is still known, as axis 0. A fully connected operator on the flattened u can stand for it.
- *tokens* (..., F): features on the last axis. Everything may happen in between, mixing of tokens included,
  for the fit is per token; `aligned` says that the leading axes are still u's, else shapes have to tell.

Rules are data: `RULES` has the rules by operator. A rule returns flows, or the reason why the operator
cannot be inside a region. An operator without a rule ends every region; nothing is guessed.
"""

from __future__ import annotations

from onnxfuse.analysis.regions.facts import RegionNode
from onnxfuse.analysis.regions.linear_rules import LINEAR_DEFAULTS, LINEAR_RULES, MASKING
from onnxfuse.analysis.regions.shape_rules import SHAPE_RULES
from onnxfuse.analysis.regions.view import Flow
from onnxfuse.ops.facet import Facet, keyed
from onnxfuse.ops.table import Kind, Op

_MEETING = {"Attention", *MASKING}  # where data from outside may meet the region's


def _missing(op: Op) -> str:
    if op.kind in (Kind.SHAPE, Kind.FILL, Kind.RANDOM):
        return "stays outside: holds none of a region's data"
    return "ends a region: no rule"


RULES = Facet(keyed({**LINEAR_RULES, **SHAPE_RULES}), lambda op: LINEAR_DEFAULTS.get(op.kind), _missing)
"""By operator: how its outputs' flows come from its inputs'."""


def apply_rule(site: RegionNode) -> list[Flow | None] | str:
    """Flows of a node's outputs, or the reason why the node can't be inside a region."""
    node = site.node
    entry = RULES.get(node.key)
    if entry is None:
        return f"no rule for operator {node.domain + '::' if node.domain else ''}{node.op}"
    for index, tensor in site.others():
        if node.op not in _MEETING and site.foreign(index, tensor):
            return f"'{tensor.name}' enters from outside"
    if not entry.every_input and any(site.flow(i) is not None for i in range(1, len(site.flows))):
        return "its parameters depend on the data"
    try:
        result = entry.rule(site)
    except IndexError:  # what ONNX Runtime refuses is inspected, too, and nothing has checked its ranks
        return f"{site.node.op} takes no inputs of these ranks"
    if isinstance(result, str):
        return result
    if isinstance(result, Flow):
        return [result, *([None] * (len(node.outputs) - 1))]
    return result
