"""The built-in passes, one a module. Entry points name them, as `onnxfuse.passes.fuse:Fuse`; nothing else
imports them.

`onnxfuse.passes` is two things: this package, whose name is fixed by the entry points, and the function of
the face that lists the installed passes. Importing a submodule sets it as an attribute of its parent, so that
a function of this name would be replaced as soon as any pass is loaded. Therefore the package itself can be
called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxfuse.pipeline.catalog import PassInfo


class _Passes(ModuleType):
    def __call__(self) -> list[PassInfo]:
        """All installed passes, built in or not (`onnxfuse.pipeline.catalog.passes`)."""
        from onnxfuse.pipeline.catalog import passes

        return passes()


sys.modules[__name__].__class__ = _Passes
