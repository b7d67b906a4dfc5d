"""What `verify` holds a model to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One thing that a model was held to, in words, and why it was not kept; None if it was. `broken` says
    that it was not."""

    name: str
    broken: str
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None
