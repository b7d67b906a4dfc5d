"""onnxfuse: a graph-level model compiler over ONNX.

    import onnxfuse

    result = onnxfuse.compress("model.onnx", "fold,fuse", calib="samples.npz", output="smaller.onnx")
    print(result.ok, result.report.after.parameters)

All of the API is in `onnxfuse.api`; what needs torch is in `onnxfuse.pytorch`. Either is imported when it is
first asked for, because ONNX and ONNX Runtime take a second to load and `onnxfuse --help` should not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxfuse.api import Result, compress, diff, grow, inspect, retrain
    from onnxfuse.errors import InputError, NotApplicableError, OnnxfuseError, VerificationError
    from onnxfuse.graph import Model

    __version__: str

__all__ = [
    "InputError",
    "Model",
    "NotApplicableError",
    "OnnxfuseError",
    "Result",
    "VerificationError",
    "__version__",
    "compress",
    "diff",
    "grow",
    "inspect",
    "retrain",
]

_HOMES = {
    "api": ("Result", "compress", "diff", "grow", "inspect", "retrain"),
    "errors": ("InputError", "NotApplicableError", "OnnxfuseError", "VerificationError"),
    "graph": ("Model",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("onnxfuse")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"onnxfuse.{home}"), name)
    raise AttributeError(f"module 'onnxfuse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
