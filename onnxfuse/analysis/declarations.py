"""Shapes that a file declares and a run contradicts.

Exporters write down shapes that hold no longer (a batch of one, sizes from before an edit), or give one name
to two dimensions. ONNX Runtime runs such a model all the same. Whoever counts takes the shapes of a run, and
says where the file says something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxfuse.ir.shapes import AxisSize, TensorInfo, info_of
from onnxfuse.runtime.observed_shapes import run_shapes

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.runtime.session import Runtime

LISTED = 3
"""Contradictions that are told one by one."""


@dataclass(frozen=True)
class Contradiction:
    """A tensor, the shape that the file declares for it, and the one that it has in a run."""

    name: str
    declared: tuple[AxisSize, ...]
    run: tuple[AxisSize, ...]

    def __str__(self) -> str:
        shapes = [", ".join("?" if d is None else str(d) for d in own) for own in (self.declared, self.run)]
        return f"'{self.name}' is declared as [{shapes[0]}] and is [{shapes[1]}] in a run"


def contradictions(model: Model, feed: Feed, runtime: Runtime) -> list[Contradiction]:
    """The tensors whose declared shapes a run contradicts: another number of axes, another size, or the name
    of a dimension that has another size elsewhere.

    Args:
        model: as it was loaded; what was edited since is not looked at.
        feed: fits its inputs.
        runtime: runs the model.

    Raises:
        InputError, NotApplicableError: as `runtime.observed_shapes.run_shapes`.
    """
    run = run_shapes(model, feed, runtime)
    pairs = [(info, run[info.name].shape) for info in _declared(model) if info.name in run]
    sizes: dict[str, Counter[int]] = {}
    fed: dict[str, int] = {}
    for info, found in pairs:
        for dim, size in zip(info.shape or (), found or (), strict=False):
            if isinstance(dim, str) and isinstance(size, int):
                sizes.setdefault(dim, Counter())[size] += 1
                if info.name in feed:
                    fed.setdefault(dim, size)
    named = {dim: own.most_common(1)[0][0] for dim, own in sizes.items()} | fed

    def agrees(dim: AxisSize, size: AxisSize) -> bool:
        expected = named.get(dim) if isinstance(dim, str) else dim
        return expected is None or size is None or expected == size

    return [
        Contradiction(info.name, info.shape, found)
        for info, found in pairs
        if info.shape is not None
        and found is not None
        and (len(info.shape) != len(found) or not all(map(agrees, info.shape, found)))
    ]


def contradiction_warnings(model: Model, feed: Feed, runtime: Runtime) -> list[str]:
    """`contradictions` as warnings, those beyond the first few as a number."""
    found = contradictions(model, feed, runtime)
    said = [f"{own}: counts are of the run" for own in found[:LISTED]]
    if len(found) > LISTED:
        said.append(f"{len(found) - LISTED} more tensors have other shapes in a run than the file declares")
    return said


def _declared(model: Model) -> Iterator[TensorInfo]:
    graph, stale = model.source.graph, model.stale_names()
    yield from model.inputs
    for value in (*graph.output, *graph.value_info):
        if value.name not in stale:
            yield info_of(value)
