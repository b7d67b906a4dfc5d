"""The PyTorch round trip: import a model, retrain it, write the weights back to the same graph.

- `bridge`: the model as a torch.fx GraphModule, and its weights back into the graph.
- `training`: the training loop, what to train for, and retraining from data to verdict.

The names below are the package's face. Each is imported when it is first asked for: they need the extra
`torch` (`pip install 'onnxfuse[torch]'`), and records of a training are read without it. The package stands
above growth; passes, results and commands use it, those that can do without torch inside functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxfuse.pytorch.bridge.importer import operators, to_torch
    from onnxfuse.pytorch.bridge.registry import register
    from onnxfuse.pytorch.bridge.weights import Weight, is_trainable
    from onnxfuse.pytorch.bridge.writeback import from_torch

_HOMES = {
    "Weight": "weights",
    "from_torch": "writeback",
    "is_trainable": "weights",
    "operators": "importer",
    "register": "rules",
    "to_torch": "importer",
}

__all__ = ["Weight", "from_torch", "is_trainable", "operators", "register", "to_torch"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.bridge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
