"""The rules for ONNX's own operators and those of ONNX Runtime, a module for each family of operators.

A module here imports `rule` from `registry`, helpers from `operands` and `hostmath`, and other families where
they share code. It is found by its place: importing this package imports them all, so that `TABLE` is full
for whoever takes it from here, and `register` replaces a rule rather than being replaced. `weights` and
`importer` stand above.
"""

from __future__ import annotations

import importlib
import pkgutil

from onnxfuse.ops.facet import Facet
from onnxfuse.ops.table import Op
from onnxfuse.pytorch.bridge.registry import TABLE, register

__all__ = ["RULES", "TABLE", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _missing(op: Op) -> str:
    return "read as a stored value" if op.name == "Constant" else "refused: no rule"


RULES = Facet(TABLE, lambda op: None, _missing)
"""The table, with what it means to be missing from it; no kind has a default: functions are too different."""
