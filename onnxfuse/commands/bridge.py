"""The way to PyTorch and back, for those who may not have it: torch is an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from onnxfuse.commands.loading import ModelSource
from onnxfuse.data.calibration import Data
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model

if TYPE_CHECKING:
    from torch import fx, nn

    from onnxfuse.pytorch.bridge.weights import Weight


def require_torch(what: str) -> None:
    """Check that torch is installed, for `what` ("retraining").

    Raises:
        InputError: it is not; names the extra.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(f"{what} needs PyTorch: pip install 'onnxfuse[torch]'") from error


def to_torch(
    model: ModelSource,
    *,
    trainable: Callable[[Weight], bool] | None = None,
    outputs: Sequence[str] | None = None,
    shared_gradients: bool = False,
) -> fx.GraphModule:
    """The model as a module, in eval mode; `onnxfuse.pytorch.to_torch` says more.

    Args:
        model: is left as it is.
        trainable: which stored tensors become Parameters; default `onnxfuse.pytorch.is_trainable`.
        outputs: names of tensors to return instead of the model's outputs; inner ones may be among them.
        shared_gradients: whether operators that `merge` gave one weight have the shares in its gradient that
            it noted on them; without, the gradient is their sum, as usual.

    Raises:
        InputError: torch is not installed; a file that can't be read; a trainable tensor that is not
            floating-point.
        NotApplicableError: an operator without a rule, or used in a way that its rule doesn't know.
    """
    require_torch("to_torch")
    from onnxfuse.pytorch.bridge import importer

    return importer.to_torch(model, trainable=trainable, outputs=outputs, shared_gradients=shared_gradients)


def from_torch(module: nn.Module, model: ModelSource, *, calib: Data = None, provider: str = "auto") -> Model:
    """A copy of the model with the module's weights, checked in ONNX Runtime beside the module.

    Args:
        module: imported from `model` by `to_torch`, trained or not; wrapped or not.
        model: is left as it is.
        calib: samples to compare on; None makes some up.
        provider: of ONNX Runtime.

    Raises:
        InputError: torch is not installed; the module lacks a weight, or has it in another shape or type, or
            with NaN or infinity.
        VerificationError: module and model compute different things, beyond float noise.
        NotApplicableError: ONNX Runtime can't run the model.
    """
    require_torch("from_torch")
    from onnxfuse.pytorch.bridge import writeback

    return writeback.from_torch(module, model, calib=calib, provider=provider)
