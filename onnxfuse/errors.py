"""Errors a user can cause. Each message is the one line shown on stderr; each class knows its exit code."""


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
