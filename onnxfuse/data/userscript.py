"""Functions of the user's own: `script.py:load_data`, `metric.py:score`.

What goes wrong in them is the user's to solve, so it arrives as one line that names the script, the
function and the exception. What they print goes to stderr, because stdout may be carrying `--json`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxfuse.errors import InputError


def is_script(spec: str) -> bool:
    """Whether `spec` has the form `file.py` or `file.py:function`."""
    return spec.endswith(".py") or ".py:" in spec


@dataclass(frozen=True)
class UserFunction:
    """A function of a user's script; what goes wrong in it is reported as the script's."""

    name: str
    folder: Path
    function: Callable[..., Any]

    @classmethod
    def load(cls, spec: str, default: str) -> UserFunction:
        """The function that `file.py:function` names; `file.py` alone means the one called `default`.

        Raises:
            InputError: no such file or function, or the script raises while it is imported.
        """
        file, colon, name = spec.rpartition(":")
        path, name = (Path(file), name) if colon and file.endswith(".py") else (Path(spec), default)
        try:
            source = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read '{path}': {error.strerror or error}") from error
        module = ModuleType(f"onnxfuse_user_{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses and pickles look their module up there
        with _blaming(f"'{path}'", path.parent):
            exec(compile(source, str(path), "exec"), module.__dict__)
        found = getattr(module, name, None)
        if not callable(found):
            raise InputError(f"'{path}' defines no function '{name}'")
        return cls(f"'{path}:{name}'", path.parent, found)

    def __call__(self, *arguments: Any) -> Any:
        with _blaming(self.name, self.folder):
            return self.function(*arguments)

    def iterate(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items one by one, for a generator that the function returned."""
        with _blaming(self.name, self.folder):
            iterator = iter(items)
        while True:
            with _blaming(self.name, self.folder):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


@contextlib.contextmanager
def _blaming(who: str, folder: Path) -> Iterator[None]:
    """Run user code that may import from `folder`: exceptions become an InputError naming `who`."""
    added = str(folder.resolve())
    sys.path.insert(0, added)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{who} raised {type(error).__name__}{': ' + said if said else ''}") from error
    finally:
        if added in sys.path:
            sys.path.remove(added)
