"""Where a training stands, in a file, so that a run that was killed goes on where it was.

The file appears whole or not at all, and loads with `weights_only`: it runs no code. It says what it belongs
to, a fingerprint of model, data and settings; another run leaves it unused.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from onnxfuse.errors import InputError
from onnxfuse.ir import saving

_FORMAT = 1


class Checkpoint:
    """A file that keeps the state of one training."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """
        Args:
            path: the file; its folder must exist.
            fingerprint: of what is trained, on what and how.

        Raises:
            InputError: no file can be written there.
        """
        saving.check_target(path, None)
        self.path = path
        self.fingerprint = fingerprint
        self._staged = path.with_name(f".{path.name}.tmp")

    def load(self) -> tuple[dict[str, Any] | None, str | None]:
        """(the state, None) where there is one of this training; (None, None) where there is no file;
        (None, why not) of another training.

        Raises:
            InputError: the file is something else, which must not be overwritten.
        """
        if not self.path.exists():
            return None, None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the bytes of some other file lead to
            raise self._foreign() from error
        if not isinstance(found, dict) or found.get("onnxfuse") != "checkpoint":
            raise self._foreign()
        if (found["format"], found["fingerprint"]) != (_FORMAT, self.fingerprint):
            return (
                None,
                f"'{self.path}' is of another model, other data or other settings: training starts anew",
            )
        return found["state"], None

    def _foreign(self) -> InputError:
        return InputError(f"'{self.path}' is no checkpoint of onnxfuse; move it away, or choose another name")

    def save(self, state: dict[str, Any]) -> None:
        """Replace what the file holds.

        Raises:
            InputError: it can't be written.
        """
        content = {
            "onnxfuse": "checkpoint",
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "state": state,
        }
        try:
            with open(self._staged, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._staged, self.path)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise InputError(f"cannot write the checkpoint '{self.path}': {reason}") from error
        finally:
            with contextlib.suppress(OSError):
                self._staged.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget the state; the training is over."""
        for path in (self._staged, self.path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
