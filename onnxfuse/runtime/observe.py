"""Running a model over batches with inner tensors tapped, and handing each batch's tensors to observers.

A network's activations over all samples don't fit in memory, so statistics are sums that grow batch by batch:
an observer takes one batch's tensors, keeps what it needs of them and lets go of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from onnxfuse.ir.model import Feed, Model
from onnxfuse.progress import Advance, NoProgress
from onnxfuse.runtime.session import Runtime


class Fed(Protocol):
    """A batch: what is fed at a time, with whatever else an observer wants to know of it."""

    @property
    def feed(self) -> Feed: ...


B = TypeVar("B", bound=Fed)


class TappedModel:
    """A model that returns inner tensors and graph inputs alike, by name. One session serves many runs."""

    def __init__(self, model: Model, tensors: Iterable[str], runtime: Runtime) -> None:
        """Make a session that computes `tensors`, and nothing that none of them depends on.

        Args:
            model: is left as it is.
            tensors: names of tensors of the main graph.
            runtime: runs it.

        Raises:
            InputError: no tensor of that name.
            NotApplicableError: ONNX Runtime refuses the model.
        """
        fed = {info.name for info in model.inputs}
        taps = [name for name in dict.fromkeys(tensors) if name not in fed]
        self._session = runtime.session(model, taps=taps, outputs=()) if taps else None

    def run(self, feed: Feed) -> Feed:
        """The graph's inputs and the tapped tensors by name; raises as `Session.run` does."""
        return {**feed, **(self._session.run(feed) if self._session is not None else {})}


def observe(
    tapped: TappedModel,
    batches: Iterable[B],
    observers: Sequence[Callable[[B, Feed], None]],
    advance: Advance | None = None,
) -> None:
    """Run over batches, and call every observer with each batch and its tensors.

    Args:
        tapped: the model.
        batches: in the order in which they are to be seen.
        observers: called in turn; they leave the arrays as they are.
        advance: told of every batch.

    Raises:
        InputError: the batches can't be read or do not fit the model.
        NotApplicableError: ONNX Runtime fails on the way.
    """
    advance = advance or NoProgress().task("")
    for batch in batches:
        tensors = tapped.run(batch.feed)
        for observer in observers:
            observer(batch, tensors)
        del tensors  # before those of the next batch come
        advance()


class Background:
    """A thread beside the caller's, for one call at a time: sums of one batch while a network runs the next.

    A context manager. Calls are made in the order they came, each after the one before; what one of them
    raises is raised by the next, or by `wait`.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Wait for the call before, then start `function(*args)`."""
        self.wait()
        self._pending = self._worker.submit(function, *args)

    def wait(self) -> None:
        """Wait for the last call, and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.shutdown()
