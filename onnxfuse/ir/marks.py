"""Marks on operators whose weights hold a promise that whoever changes them later has to keep.

A mark is a node's metadata_props entry, so it goes through saving and loading; what is kept may be several
things at once, as where a pruned operator's other weights were clustered.
"""

from __future__ import annotations

from onnxfuse.ir.nodes import Node

KEPT_KEY = "onnxfuse.kept"

GRADIENT_KEY = "onnxfuse.gradient"
"""On nodes that share a weight: the share that each one's gradient has in that of the weight."""

ZEROS = "zeros"
"""Weights that are zero stay zero."""

VALUES = "values"
"""Weights that are equal stay equal."""


def promises(node: Node) -> frozenset[str]:
    """The promises that hold for a node's weight: `ZEROS`, `VALUES`, both or none."""
    return frozenset(node.metadata.get(KEPT_KEY, "").split())


def keep(node: Node, what: str) -> None:
    """Note on a node that a promise (`ZEROS` or `VALUES`) is to be kept, beside those noted already."""
    node.metadata[KEPT_KEY] = " ".join(sorted({*promises(node), what}, reverse=True))
