"""The walk's frontier: both networks, run stretch by stretch from tensor to tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.data.calibration import BatchStream
from onnxfuse.fitting.sites import nodes_behind, tensors_read
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ops.table import OPS, Kind
from onnxfuse.runtime.session import Runtime, Session
from onnxfuse.runtime.spool import Spool

_DRAWING = OPS.of_kind(Kind.RANDOM)


class ReadOnce:
    """Batches by number, for many steps over them; the samples themselves are read at the first one only."""

    def __init__(self, parts: Sequence[BatchStream]) -> None:
        self._parts = parts
        self._known: list[tuple[int, bool]] = []

    def feeds(self, *, with_inputs: bool) -> Iterator[tuple[int, bool, Feed]]:
        """Of each batch its number, whether it is held out, and its inputs, {} without `with_inputs`."""
        if not with_inputs:
            for index, held in self._known:
                yield index, held, {}
            return
        for number, part in enumerate(self._parts):
            for batch in part:
                self._known.append((batch.index, number > 0))
                yield batch.index, number > 0, batch.feed


class Frontier:
    """One of the two networks, run as far as the walk has come.

    The graph's inputs are handed over at the first step, and stored where later ones read them. What depends
    on stored tensors alone is computed anew at each step that reads it: the walk changes them on its way.

    Attributes:
        given: by step, the shared tensors that it has to be handed.
    """

    def __init__(
        self,
        model: Model,
        needs: Sequence[set[str]],
        shared: set[str],
        prefix: str,
        spool: Spool,
        runtime: Runtime,
    ) -> None:
        """Plan which nodes run at which step.

        Args:
            model: the network.
            needs: the tensors wanted at each step.
            shared: tensors that aren't computed here, but handed over.
            prefix: what tells this network's tensors in `spool` from those of another.
            spool: where tensors wait for later steps.
            runtime: runs the steps.
        """
        self._model = model
        self._runtime = runtime
        self._spool = spool
        self._prefix = prefix
        self._needs = needs
        self._inputs = set() if shared else {info.name for info in model.inputs}
        self._made = dict.fromkeys(self._inputs, 0)  # step at which a tensor appears
        self._last: dict[str, int] = {}  # last step at which it is read
        self._reads: list[set[str]] = []  # what a step's nodes read from outside the step
        self.given: list[set[str]] = []
        self._prepared = _prepared(model, set().union(*needs))
        shared = shared - {tensor.name for node in self._prepared for tensor in node.outputs}
        done: set[Node] = set()
        for step, names in enumerate(needs):
            self._plan(step, names, shared, done)

    def _plan(self, step: int, names: set[str], shared: set[str], done: set[Node]) -> None:
        model = self._model
        nodes = nodes_behind(model, names, shared, done)
        done.update(node for node in nodes if node not in self._prepared)
        inner = {tensor.name for node in nodes for tensor in node.outputs if tensor.name}
        made = {tensor.name for node in nodes if node in done for tensor in node.outputs if tensor.name}
        read = {
            tensor.name
            for node in nodes
            for tensor in tensors_read(model, node)
            if tensor.name not in inner and not model.is_weight(tensor)
        }
        self._made.update(dict.fromkeys(made, step))
        self._reads.append(read)
        self.given.append((read | names) & shared)
        self._last.update(dict.fromkeys((*read, *made, *names), step))

    def stretch(self, step: int) -> Stretch:
        """The part of the network between the site before and this one, with the weights it now has."""
        new = [name for name, made in self._made.items() if made == step]
        stored = [name for name in new if self._last.get(name, -1) > step]
        wanted = [name for name in self._needs[step] if self._made.get(name) == step]
        outputs = sorted({*stored, *wanted} - self._inputs)
        reads = sorted(self._reads[step])
        session = self._runtime.session(self._model.extract(reads, outputs)) if outputs else None
        return Stretch(self, session, reads, stored, sorted(self._needs[step]))

    def finish(self, step: int) -> None:
        """Forget what no later step reads."""
        for name, last in self._last.items():
            if last == step:
                self._spool.drop(f"{self._prefix}:{name}")

    def get(self, name: str, batch: int, feed: Feed) -> np.ndarray:
        """A tensor of one batch: handed over in `feed`, or stored by an earlier step.

        Args:
            name: of the tensor.
            batch: the batch's number.
            feed: what is handed over.
        """
        return feed[name] if name in feed else self._spool.get(f"{self._prefix}:{name}", batch)

    def put(self, name: str, batch: int, array: np.ndarray) -> None:
        """Store a tensor of one batch for later steps.

        Args:
            name: of the tensor.
            batch: the batch's number.
            array: its value.
        """
        self._spool.put(f"{self._prefix}:{name}", batch, array)


def _prepared(model: Model, needed: set[str]) -> set[Node]:
    """The nodes whose outputs depend on stored tensors alone, but for those that are needed themselves."""
    found: set[Node] = set()
    for node in model.nodes:
        if node.bodies or not node.inputs or node.key in _DRAWING:
            continue
        stored = all(model.is_weight(t) or model.producer(t) in found for t in node.inputs if t.name)
        if stored and needed.isdisjoint(tensor.name for tensor in node.outputs):
            found.add(node)
    return found


@dataclass(frozen=True)
class Stretch:
    """The nodes of one step, ready to run batch by batch."""

    front: Frontier
    session: Session | None
    reads: Sequence[str]
    stored: Sequence[str]
    needs: Sequence[str]

    def run(self, batch: int, feed: Feed) -> Feed:
        """The tensors that the step needs, by name; those that later steps read are stored.

        Args:
            batch: the batch's number.
            feed: what is handed over: the graph's inputs, and the tensors of `Frontier.given`.
        """
        found: Feed = {}
        if self.session is not None:
            found = self.session.run({name: self.front.get(name, batch, feed) for name in self.reads})
        for name in self.stored:
            self.front.put(name, batch, found[name] if name in found else feed[name])
        return {
            name: found[name] if name in found else self.front.get(name, batch, feed) for name in self.needs
        }
