"""Weights that make up for channels that were cut, in all operators that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxfuse.channels.consumers import Consumer, RowView
from onnxfuse.channels.groups import ChannelGroups, Choice, Group
from onnxfuse.channels.importance import compensation
from onnxfuse.channels.moments_seen import Statistics
from onnxfuse.ir.model import Model


def compensate(
    cut: Model,
    model: Model,
    found: ChannelGroups,
    consumers: Mapping[Group, Sequence[Consumer]],
    known: Mapping[RowView, Statistics],
    choice: Choice,
    *,
    done: set[object],
    by: str,
) -> None:
    """Give those who read the cut groups the weights that are best without them.

    Args:
        cut: `model` cut by `choice`; edited in place.
        model: before the cut.
        found: its channel groups.
        consumers: who reads each group.
        known: what they see; readers of which nothing is known stay as they are.
        choice: the indices that were kept.
        done: readers that have their weights already; grows by those that get them now.
        by: name of the pass.
    """
    # A recurrent operator reads by two weights, its input and its own state: each is a reader by itself.
    readers: dict[object, list[tuple[Consumer, np.ndarray]]] = {}
    for group, kept in choice.items():
        gone = np.setdiff1d(np.arange(group.size), kept)
        for consumer in consumers[group]:
            key = consumer.node, consumer.view, consumer.stored
            readers.setdefault(key, []).append((consumer, consumer.places[gone].reshape(-1)))
    for reader, own in readers.items():
        consumer = own[0][0]
        if consumer.view not in known or reader in done or not consumer.writable(model):
            continue
        done.add(reader)
        gone = np.unique(np.concatenate([places for _, places in own]))
        fitted = compensation(consumer, model, known[consumer.view], gone)
        if fitted is not None:
            consumer.write(cut, *fitted, found, choice, by=by)
