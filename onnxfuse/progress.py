"""Interfaces through which long loops and passes say how far they are and what happened.

What shows progress on a terminal or writes the journal to a file implements them elsewhere
(`onnxfuse.pipeline.instruments`).
"""

from __future__ import annotations

from typing import Protocol

from onnxfuse.findings import Json


class Advance(Protocol):
    """Moves one progress task forward."""

    def __call__(self, amount: float = 1) -> None: ...


class Progress(Protocol):
    """Where long loops say how far they are: `advance = progress.task("moments", total=40)`, then
    `advance()`."""

    def task(self, description: str, total: float | None = None) -> Advance: ...


class NoProgress:
    """The progress of a run that nobody watches."""

    def task(self, description: str, total: float | None = None) -> Advance:
        return _stand_still


def _stand_still(amount: float = 1) -> None:
    pass


class Journal(Protocol):
    """Takes one event, with figures: `context.journal("ridge", tensor="v", ridge=1e-3)`."""

    def __call__(self, event: str, **figures: Json) -> None: ...


def no_journal(event: str, **figures: Json) -> None:
    """The journal of a run that keeps none."""
