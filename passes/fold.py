"""fold: every simplification that leaves the function as it is, to a fixed point (EXACT).

1. Constants: readers of an alias read the weight itself, and equal constant subexpressions are shared
   (`onnxfuse.fitting.folding.sharing`); what depends on nothing but constants, and shapes that are static, is
   computed once (`onnxfuse.analysis.constant_folding`).
2. BatchNormalization, and scaling or shifting by a constant per channel, into the linear operator before it,
   or into the one behind it (`onnxfuse.fitting.folding.affine`).
3. Operators that do nothing (`onnxfuse.analysis.noops`): Identity, Dropout in inference, a Reshape to the
   same shape; Transposes and Reshapes in a row (`onnxfuse.fitting.folding.no_ops`).
4. Two linear operators with nothing between them become one where that is exact and takes no more
   multiplications (`onnxfuse.fitting.folding.pairs`). A factorized pair d -> r -> d stays a pair, an expanded
   one is contracted.

Nothing of it stores more parameters than before, and no tie is cut: what several operators read changes only
if they all take the same (`onnxfuse.fitting.folding.absorbing`), and a constant that would be stored on top
of what stays in use is left to the graph.

The walk keeps a list of nodes still to look at. A rule only decides; its edit is made afterwards, and puts
the nodes around it back on the list. Every edit removes a node or moves a constant towards its operator, so
the number of looks is linear in that of the nodes. Numbers are float64 until they are stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import ClassVar

from onnxfuse.analysis.constant_folding import fold_constants
from onnxfuse.analysis.noops import OPERATORS
from onnxfuse.findings import Change, Json, Skip
from onnxfuse.fitting.folding.affine import fold_affine
from onnxfuse.fitting.folding.no_ops import (
    constant_if,
    drop_zero_bias,
    join_reshapes,
    join_transposes,
    remove_no_op,
)
from onnxfuse.fitting.folding.pairs import join_linear
from onnxfuse.fitting.folding.sharing import share_constants
from onnxfuse.fitting.folding.workspace import Edit, Rule, Workspace
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ops.channel_affine import AFFINE_OPERATORS
from onnxfuse.ops.linear import LINEAR_OPERATORS, WEIGHTED, is_main_domain
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult

NAME = "fold"

_RULES: dict[str, tuple[Rule, ...]] = dict.fromkeys(OPERATORS, (remove_no_op,))
for _name in AFFINE_OPERATORS:
    _RULES[_name] = (*_RULES.get(_name, ()), fold_affine)
for _name in WEIGHTED:
    _RULES[_name] = (drop_zero_bias, join_linear) if _name in LINEAR_OPERATORS else (drop_zero_bias,)
_RULES["Transpose"] += (join_transposes,)
_RULES["Reshape"] += (join_reshapes,)
_RULES["If"] = (constant_if,)


class Fold(Pass):
    """Constants, BatchNorms, operators that do nothing and linear pairs, folded away; exact."""

    name = NAME
    contract = Contract.EXACT
    summary: ClassVar[str] = (
        "folds constants, BatchNorms and no-ops away; joins linear pairs where exact and cheaper"
    )

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite `model` until nothing more can be folded."""
        folding = _Folding(model)
        folding.run()
        return PassResult(
            model=model,
            changes=folding.changes,
            skipped=folding.skips(),
            notes=folding.notes(),
        )


class _Folding:
    """One run of the pass over one model: the nodes still to look at, and what was done and refused."""

    def __init__(self, model: Model) -> None:
        self._workspace = Workspace(model, NAME)
        self._model = model
        self.changes: list[Change] = []
        self._reasons: dict[Node, Skip] = {}
        self._uncomputed: dict[Node, Skip] = {}
        self._queue: deque[Node] = deque()
        self._queued: set[Node] = set()

    def run(self) -> None:
        """Fold constants, then everything else, until a round changes nothing."""
        done = -1
        while done != len(self.changes):
            done = len(self.changes)
            self._reasons.clear()
            self._uncomputed.clear()
            self._fold_constants()
            self._walk()
            self._model.prune()

    def skips(self) -> list[Skip]:
        """The refusals, in the order of the nodes."""
        return [
            found[n] for n in self._model.nodes for found in (self._uncomputed, self._reasons) if n in found
        ]

    def notes(self) -> list[str]:
        """A note on the weights that a user can no longer feed, if any were folded."""
        overridden = list(self._workspace.overridden)
        if not overridden:
            return []
        names = ", ".join(f"'{n}'" for n in overridden[:3])
        more = f" and {len(overridden) - 3} more" if len(overridden) > 3 else ""
        return [f"initializers that are also graph inputs were folded at their stored values: {names}{more}"]

    def _fold_constants(self) -> None:
        self._workspace.shapes = self._model.proven()
        self.changes += share_constants(self._workspace)
        folded = fold_constants(self._model, self._workspace.shapes)
        self._workspace.shapes = folded.shapes
        self._workspace.overridden.update(dict.fromkeys(folded.overridden))
        for node, reason in folded.refused.items():
            self._uncomputed[node] = Skip((node.site_name,), reason)
        if folded.shape_nodes:
            names = tuple(folded.shape_nodes)
            self.changes.append(Change(names, "static shapes became constants"))
        if folded.evaluated:
            detail: dict[str, Json] = {"nodes": len(folded.evaluated), "stored": folded.stored}
            self.changes.append(Change(tuple(folded.evaluated), "constants computed once", detail))

    def _walk(self) -> None:
        self._enqueue(self._model.nodes)
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(node)
            if node.outputs:
                self._look_at(node)

    def _enqueue(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.outputs and node not in self._queued:
                self._queued.add(node)
                self._queue.append(node)

    def _look_at(self, node: Node) -> None:
        self._reasons.pop(node, None)
        for rule in _RULES.get(node.op, ()) if is_main_domain(node) else ():
            decision = rule(self._workspace, node)
            if isinstance(decision, Edit):
                self.changes.append(Change(decision.nodes, decision.what, decision.detail))
                self._enqueue(self._around(decision.make()))
                return
            if decision is not None:
                self._reasons[node] = decision

    def _around(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes, what feeds them and what they feed."""
        found: dict[Node, None] = {}
        for node in nodes:
            found[node] = None
            for tensor in node.inputs:
                found.update(dict.fromkeys(tensor.inputs))
            for tensor in node.outputs:
                found.update(dict.fromkeys(self._model.consumers(tensor)))
        return list(found)
