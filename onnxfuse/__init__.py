"""onnxfuse: a graph-level model compiler over ONNX.

    import onnxfuse

    result = onnxfuse.compress("model.onnx", "fold,fuse", calib="samples.npz", output="smaller.onnx")
    print(result)

This is the face of the package: everything that users and authors of passes need is a name here. Each is
imported when it is first asked for, because ONNX and ONNX Runtime take a second to load and `onnxfuse --help`
should not. No submodule has the name of a function, but for `passes`, a package that can be called.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxfuse.commands.bridge import from_torch, to_torch
    from onnxfuse.commands.compare import diff, verify
    from onnxfuse.commands.compress import compress
    from onnxfuse.commands.grow import grow
    from onnxfuse.commands.inspect import inspect
    from onnxfuse.commands.loading import load, save
    from onnxfuse.commands.operators import operators
    from onnxfuse.commands.retrain import retrain
    from onnxfuse.errors import InputError, ModelWarning, NotApplicableError, OnnxfuseError, VerificationError
    from onnxfuse.findings import Change, Prediction, Skip
    from onnxfuse.ir.model import Model
    from onnxfuse.ops.coverage import OperatorInfo
    from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult
    from onnxfuse.pipeline.catalog import PassInfo, passes
    from onnxfuse.results import (
        DiffResult,
        Inspection,
        Report,
        Result,
        RetrainReport,
        RetrainResult,
        VerifyResult,
    )

    __version__: str

_HOMES = {
    "commands.bridge": ("from_torch", "to_torch"),
    "commands.compare": ("diff", "verify"),
    "commands.compress": ("compress",),
    "commands.grow": ("grow",),
    "commands.inspect": ("inspect",),
    "commands.loading": ("load", "save"),
    "commands.operators": ("operators",),
    "commands.retrain": ("retrain",),
    "errors": ("InputError", "ModelWarning", "NotApplicableError", "OnnxfuseError", "VerificationError"),
    "findings": ("Change", "Prediction", "Skip"),
    "ir.model": ("Model",),
    "ops.coverage": ("OperatorInfo",),
    "pipeline.base": ("Context", "Contract", "Pass", "PassOptions", "PassResult"),
    "pipeline.catalog": ("PassInfo",),
    "results": (
        "DiffResult",
        "Inspection",
        "Report",
        "Result",
        "RetrainReport",
        "RetrainResult",
        "VerifyResult",
    ),
}

__all__ = [
    "Change",
    "Context",
    "Contract",
    "DiffResult",
    "InputError",
    "Inspection",
    "Model",
    "ModelWarning",
    "NotApplicableError",
    "OnnxfuseError",
    "OperatorInfo",
    "Pass",
    "PassInfo",
    "PassOptions",
    "PassResult",
    "Prediction",
    "Report",
    "Result",
    "RetrainReport",
    "RetrainResult",
    "Skip",
    "VerificationError",
    "VerifyResult",
    "__version__",
    "compress",
    "diff",
    "from_torch",
    "grow",
    "inspect",
    "load",
    "operators",
    "passes",
    "retrain",
    "save",
    "to_torch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("onnxfuse")
    if name == "passes":
        return importlib.import_module("onnxfuse.passes")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"onnxfuse.{home}"), name)
    raise AttributeError(f"module 'onnxfuse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
