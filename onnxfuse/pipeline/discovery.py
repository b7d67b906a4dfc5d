"""Installed passes, found through the entry-point group."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from onnxfuse.errors import InputError, unknown_name
from onnxfuse.pipeline.base import Pass

GROUP = "onnxfuse.passes"
"""The entry-point group in which passes are found."""


@cache
def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise InputError(
                f"two installed packages have a pass '{entry.name}': {other.value} and {entry.value}"
            )
    return dict(sorted(found.items()))


def pass_names() -> list[str]:
    """The names of all installed passes, without importing them."""
    return list(_entries())


def load_pass(name: str) -> type[Pass]:
    """The installed pass of that name.

    Raises:
        InputError: there is none, or what is installed can't be imported or isn't a pass.
    """
    entry = _entries().get(name)
    if entry is None:
        raise InputError(unknown_name("pass", name, pass_names()))
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"pass '{name}' ({entry.value}) cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise InputError(f"pass '{name}' ({entry.value}) is not an onnxfuse.Pass")
    return found


def discover() -> dict[str, type[Pass]]:
    """All installed passes by name: those of onnxfuse, and third parties' in the entry-point group
    `GROUP`."""
    return {name: load_pass(name) for name in pass_names()}
