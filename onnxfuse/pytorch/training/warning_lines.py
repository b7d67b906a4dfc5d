"""Warnings as lines of a report."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

from onnxfuse.errors import ModelWarning


@contextlib.contextmanager
def collecting(into: list[str], wanted: Callable[[warnings.WarningMessage], bool]) -> Iterator[None]:
    """Warnings of one kind as lines; others go on to where they would have gone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ModelWarning)
        yield
    for warning in caught:
        if wanted(warning):
            into.append(" ".join(str(warning.message).split()))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def is_of_model(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, ModelWarning)


def is_of_kernel(warning: warnings.WarningMessage) -> bool:
    """Whether torch says that an operator has no deterministic kernel on the device."""
    return "deterministic" in str(warning.message)
