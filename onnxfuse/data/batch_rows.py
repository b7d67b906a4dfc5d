"""The bytes of a model's tensors on a feed, and the number of rows of a batch that fit into a budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from onnxfuse.analysis.cost import shapes_at
from onnxfuse.errors import NotApplicableError
from onnxfuse.ops.linear import LINEAR_OPERATORS, is_main_domain

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.ir.nodes import Node
    from onnxfuse.runtime.session import Runtime


def tensor_bytes(model: Model, feed: Feed, runtime: Runtime) -> dict[str, int]:
    """Bytes of every tensor that a model takes or computes on a feed, by name; stored weights aren't counted.

    Args:
        model: has the tensors.
        feed: fits its inputs.
        runtime: runs the model, where shapes can't be told without.

    Raises:
        InputError, NotApplicableError: as `analysis.cost.shapes_at`.
    """
    found = {}
    for name, info in shapes_at(model, feed, runtime).items():
        if info.dtype is not None and info.shape is not None and not model.is_weight(model.tensor(name)):
            sizes = [size for size in info.shape if isinstance(size, int)]
            found[name] = math.prod(sizes) * info.dtype.itemsize
    return found


def rows_within(model: Model, row: Feed, limit: int, runtime: Runtime) -> int | None:
    """The most rows of a batch on which a run with taps takes a limited number of bytes, at least one; None
    where the model doesn't run on a single row: a Reshape to fixed sizes takes whole batches alone.

    The run is one that taps whatever a linear operator reads or writes, which is about what passes tap in
    the widest of their runs. (One that would hold more is divided by its taps.) Taps count twice: those of
    one batch are summed up while the next one runs.

    Args:
        model: is run.
        row: one row for its inputs.
        limit: bytes.
        runtime: see `tensor_bytes`.
    """
    try:
        sizes = tensor_bytes(model, row, runtime)
    except NotApplicableError:
        return None
    linear = [node for node in model.nodes if is_main_domain(node) and node.op in LINEAR_OPERATORS]
    taps = {tensor.name for node in linear for tensor in (*node.inputs, *node.outputs)}
    kept = sum(sizes.get(name, 0) for name in taps)
    return max(1, limit // max(peak_bytes(model.nodes, sizes, taps) + kept, 1))


def peak_bytes(nodes: Collection[Node], sizes: Mapping[str, int], taps: Collection[str]) -> int:
    """The most bytes that tensors take at a time in a run that lets go of each behind its last reader.

    Args:
        nodes: in the order in which they run.
        sizes: bytes of tensors by name; those without a size take nothing.
        taps: tensors that are kept to the end.
    """
    last: dict[str, int] = {}
    for place, node in enumerate(nodes):
        last.update(dict.fromkeys(_touched(node), place))
    made = {tensor.name for node in nodes for tensor in node.outputs}
    now = peak = sum(size for name, size in sizes.items() if name not in made)
    for place, node in enumerate(nodes):
        now += sum(sizes.get(tensor.name, 0) for tensor in node.outputs)
        peak = max(peak, now)
        done = {name for name in _touched(node) if name not in taps and last[name] == place}
        now -= sum(sizes.get(name, 0) for name in done)
    return peak


def _touched(node: Node) -> set[str]:
    """Names of the tensors that a node reads, in its bodies too, or writes."""
    return {tensor.name for tensor in (*node.inputs, *node.outputs)}.union(node.captured)
