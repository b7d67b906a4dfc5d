"""The installed passes and their options, as people read them."""

from __future__ import annotations

from dataclasses import dataclass

from onnxfuse.pipeline.discovery import discover
from onnxfuse.pipeline.recipe import Option, options_of


@dataclass(frozen=True)
class PassInfo:
    """One installed pass; `example` is a piece of `--passes`."""

    name: str
    contract: str
    summary: str
    options: tuple[Option, ...]
    example: str


def passes() -> list[PassInfo]:
    """All installed passes, by name.

    Raises:
        InputError: an installed package's pass can't be loaded.
    """
    return [
        PassInfo(
            name, kind.contract.value, kind.summary, tuple(options_of(kind)), getattr(kind, "example", name)
        )
        for name, kind in discover().items()
    ]
