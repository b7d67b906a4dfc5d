"""The view of a node that rules of intervals get, and what a rule returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.analysis.constant_folding import integers
from onnxfuse.analysis.intervals.interval import FORMATS, UNBOUNDED, Dims, Format, Interval
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import Shapes, TensorInfo
from onnxfuse.ops.view import ModelNodeView


@dataclass(frozen=True, eq=False)
class IntervalNode(ModelNodeView):
    """A node, and what is known where it stands."""

    model: Model
    node: Node
    shapes: Shapes
    known: Mapping[str, Interval]

    def at(self, slot: int) -> Interval:
        """Bounds of an input."""
        tensor = self.tensor(slot)
        return UNBOUNDED if tensor is None else self.known.get(tensor.name, UNBOUNDED)

    def operands(self) -> list[Interval]:
        """Bounds of all inputs, for broadcasting."""
        return [self.at(slot) for slot in range(len(self.node.inputs)) if self.has(slot)]

    def dims(self, slot: int) -> Dims | None:
        """Sizes of an input; those that bounds are kept for are known in any case."""
        found = type_info(self.shapes, self.node.inputs[slot]).shape
        if found is None:
            return None
        return tuple(n if n > 1 else dim for n, dim in zip(self.at(slot).shape, found, strict=True))

    @property
    def format(self) -> Format:
        dtype = type_info(self.shapes, self.node.outputs[0]).dtype
        return FORMATS["bfloat16" if dtype is None or dtype.name not in FORMATS else dtype.name]

    def constant(self, slot: int) -> np.ndarray | None:
        tensor = self.tensor(slot)
        return None if tensor is None else self.model.weight(tensor)

    def listed(self, slot: int, what: str) -> list[int] | None:
        return integers(self.model, self.tensor(slot))

    @property
    def padded(self) -> bool:
        """Whether a window may reach beyond the input."""
        auto = self.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "")
        return auto or any(self.attribute("pads", ())) or bool(self.attribute("ceil_mode", 0))


IntervalResult = Interval | Sequence[Interval | None] | None
IntervalRule = Callable[[IntervalNode], IntervalResult]


def type_info(shapes: Shapes, tensor: Tensor) -> TensorInfo:
    """The record of a tensor, an empty one where nothing is known of it."""
    return shapes.get(tensor.name) or TensorInfo(tensor.name, None, None)
