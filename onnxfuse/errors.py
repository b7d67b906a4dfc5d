"""Errors a user can cause. Each message is the one line shown on stderr; each class knows its exit code."""

import difflib
from collections.abc import Sequence


class OnnxfuseError(Exception):
    """Base of every error that is the user's to solve, not a bug in onnxfuse."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        """Keeps `message` one line: names come from files, and may hold line ends or terminal codes."""
        super().__init__(
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        )


class InputError(OnnxfuseError):
    """A bad file, flag, option or calibration sample."""


class VerificationError(OnnxfuseError):
    """A verification or a budget failed; no output was written."""

    exit_code = 1


class NotApplicableError(OnnxfuseError):
    """A well-formed model that the request can't be applied to."""

    exit_code = 3


class ModelWarning(UserWarning):
    """Something about a model that its user should know, and that stops nothing."""


def unknown_name(kind: str, name: str, allowed: Sequence[str]) -> str:
    """The message for a name that does not exist: what may have been meant, and what there is.

    Args:
        kind: what such names stand for, in words.
        name: the name as it was given.
        allowed: the names that exist.
    """
    near = difflib.get_close_matches(name, allowed, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ";"
    return f"there is no {kind} '{name}'{guess} known: {', '.join(allowed) or 'none'}"
