"""Class scores: where the outputs of a classifier are as logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ops.table import OPS, Kind

_FROM_ONE = 1e-3  # how far from 1 the probabilities of a sample may add up to


@dataclass(frozen=True)
class Scores:
    """The place of an output's class scores.

    Attributes:
        tensor: holds them; the output itself, or what goes into its Softmax.
        axis: that of the classes.
        probabilities: they have gone through a Softmax that can't be taken off, so their logarithm counts.
    """

    tensor: str
    axis: int
    probabilities: bool = False

    def named(self, output: str) -> str:
        """The output and where its scores are, for people."""
        if self.tensor != output:
            return f"'{output}' (before its Softmax: '{self.tensor}')"
        return f"'{output}' (probabilities)" if self.probabilities else f"'{output}'"

    def normalized(self, output: str) -> bool:
        """Whether the output is the scores' Softmax."""
        return self.probabilities or self.tensor != output

    def read(self, values: Tensor) -> Tensor:
        """The scores as logits, float32."""
        values = values.float()
        return values.clamp_min(torch.finfo(torch.float32).tiny).log() if self.probabilities else values


def softmax_of(model: Model, output: str) -> Node | None:
    """The Softmax that an output comes from, through nothing but Identity."""
    node = model.producer(model.tensor(output))
    while node is not None and node.op == "Identity" and not node.domain:
        node = model.producer(node.inputs[0])
    return node if node is not None and node.op == "Softmax" and not node.domain else None


def find_scores(model: Model, output: str, values: Mapping[str, np.ndarray]) -> Scores | None:
    """The place of an output's class scores, judged by the graph and by the values of one batch; None where
    it has no axis for classes.

    The classes are on the axis of the graph's own Softmax; without one on the last axis of up to three, else
    on axis 1, where images have their channels.

    Args:
        model: the output's.
        output: its name.
        values: of the outputs on one batch, by name.
    """
    array = values[output]
    if array.ndim < 2:
        return None
    node = softmax_of(model, output)
    if node is not None:
        axis = _softmax_axis(node, model.opset, array.shape)
        if axis is not None:
            return Scores(node.inputs[0].name, axis)
    axis = array.ndim - 1 if array.ndim <= 3 else 1
    total = array.astype(np.float64).sum(axis)
    probabilities = array.shape[axis] > 1 and array.min() >= 0 and np.abs(total - 1).max() < _FROM_ONE
    return Scores(output, axis, bool(probabilities))


def _softmax_axis(node: Node, opset: int, shape: tuple[int, ...]) -> int | None:
    """The axis that a Softmax normalizes; None where it is several, as before opset 13 it can be."""
    axis = int(node.attrs.get("axis", -1 if opset >= 13 else 1)) % len(shape)
    several = opset < 13 and any(size > 1 for size in shape[axis + 1 :])
    return None if several else axis


def is_activated(model: Model, output: str) -> bool:
    """Whether an output comes from an activation: what does holds no class scores."""
    node = model.producer(model.tensor(output))
    return node is not None and node.key in OPS.of_kind(Kind.ACTIVATION)
