"""The cost of a group's width in milliseconds: the nodes around it, cut to each width, timed on this machine.

Multiply-accumulates don't say it. A kernel computes channels by the vector: on a CPU with vectors of
sixteen floats, 63 channels can take longer than 64, and 24 as long as 32. So a group's neighborhood, the
nodes that read or make a tensor with its channels, is taken out of the network, cut, and timed, all widths
interleaved. Neighborhoods of the same operators and shapes, as the blocks of a network have them, are
timed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxfuse.channels.dims import leaves
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import ChannelGroups, Group
from onnxfuse.errors import OnnxfuseError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Node
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.runtime.latency import timed_block
from onnxfuse.runtime.observe import TappedModel
from onnxfuse.runtime.session import Runtime

BLOCKS = 4
"""Blocks (`runtime.latency`) in which one neighborhood is timed at all its widths."""

FASTER = 0.985
"""A width counts as faster than a larger one if it takes at most this share of its time."""


@dataclass(frozen=True)
class _Neighborhood:
    """The tensors that enter and leave the nodes around a group."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def rewarded(
    model: Model,
    found: ChannelGroups,
    candidates: Mapping[Group, Sequence[int]],
    runtime: Runtime,
    feed: Feed,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Group, dict[int, float]]:
    """Milliseconds of each group's neighborhood at its size, and at those widths that are faster than all
    larger ones. A group whose neighborhood can't be run by itself has no entry.

    Args:
        model: the one that the groups were found in.
        found: all its groups.
        candidates: widths, from the group's size downwards.
        runtime: runs the neighborhoods.
        feed: one sample.
        seed: of the order in which they are timed.
        progress: told of every group.
    """
    around = {group: _around(model, found, group) for group in candidates}
    values = TappedModel(model, [name for own in around.values() for name in own.inputs], runtime).run(feed)
    advance = (progress or NoProgress()).task("timing", total=len(candidates))
    known: dict[tuple[object, ...], dict[int, float]] = {}
    result: dict[Group, dict[int, float]] = {}
    for group, widths in candidates.items():
        advance()
        try:
            key = (_signature(model.extract(around[group].inputs, around[group].outputs)), *widths)
            if key not in known:
                known[key] = _timed(model, group, around[group], widths, values, feed, runtime, seed)
        except OnnxfuseError:
            continue
        result[group] = known[key]
    return result


def _around(model: Model, found: ChannelGroups, group: Group) -> _Neighborhood:
    members = set(group.leaves)

    def concerned(node: Node) -> bool:
        tensors = (*node.inputs, *node.outputs)
        return any(
            leaf in members for t in tensors for dim in found.system.axes.get(t, ()) for leaf in leaves(dim)
        )

    nodes = [node for node in model.nodes if node.constant_form is None and concerned(node)]
    inside = set(nodes)
    made = {tensor for node in nodes for tensor in node.outputs if tensor.name}
    inputs = dict.fromkeys(
        t.name for node in nodes for t in node.inputs if t.name and t not in made and not model.is_weight(t)
    )
    outputs = [
        t.name
        for node in nodes
        for t in node.outputs
        if t.name and (model.is_output(t) or any(user not in inside for user in model.consumers(t)))
    ]
    return _Neighborhood(tuple(inputs), tuple(outputs))


def _signature(proto: onnx.ModelProto) -> bytes:
    """A key to the time of a small model: operators, attributes, shapes, how they hang together."""
    names: dict[str, str] = {"": ""}

    def number(name: str) -> str:
        return names.setdefault(name, str(len(names)))

    plain = onnx.GraphProto()
    for value in (*proto.graph.input, *proto.graph.output):
        plain_value = plain.value_info.add()
        plain_value.CopyFrom(value)
        plain_value.name = number(value.name)
    for tensor in proto.graph.initializer:
        plain.initializer.add(name=number(tensor.name), dims=tensor.dims, data_type=tensor.data_type)
    for node in proto.graph.node:
        plain_node = plain.node.add(op_type=node.op_type, domain=node.domain)
        plain_node.input.extend(map(number, node.input))
        plain_node.output.extend(map(number, node.output))
        plain_node.attribute.extend(node.attribute)
    return plain.SerializeToString(deterministic=True)


def _timed(
    model: Model,
    group: Group,
    around: _Neighborhood,
    widths: Sequence[int],
    values: Feed,
    feed: Feed,
    runtime: Runtime,
    seed: int,
) -> dict[int, float]:
    cuts = []
    for width in widths:
        cut = model.copy()
        take(cut, {group: np.arange(width)})
        left = {
            tensor.name for tensor in cut.tensors()
        }  # a number that the cut wrote down is computed no more
        inputs = [name for name in around.inputs if name in left]
        numbers = [name for name in inputs if values[name].dtype.kind in "iu" and name not in feed]
        # Lengths as they are after the cut.
        computed = TappedModel(cut, numbers, runtime).run(feed)
        given = {
            name: computed[name] if name in numbers else _taken(cut, name, values[name]) for name in inputs
        }
        cuts.append((cut.extract(inputs, around.outputs), given))
    random = np.random.default_rng(seed)
    medians = [timed_block(cuts, runtime, random).medians for _ in range(BLOCKS)]
    times = np.exp(np.log(medians).mean(axis=0)) / 1e6
    found: dict[int, float] = {}
    for width, time in zip(widths, times.tolist(), strict=True):
        if not found or time <= FASTER * min(found.values()):
            found[width] = time
    return found


def _taken(cut: Model, name: str, value: np.ndarray) -> np.ndarray:
    for axis, places in enumerate(cut.index_maps.get(name) or ()):
        if places is not None:
            value = np.take(value, places, axis)
    return np.ascontiguousarray(value)
