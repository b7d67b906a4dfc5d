"""Types and shapes as a run meets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.ir.shapes import TensorInfo

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model


TAPS_AT_ONCE = 64


def run(model: Model, found: dict[str, TensorInfo], feed: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    """Types and shapes as ONNX Runtime meets them on this feed, of what `found` leaves unknown.

    The tensors are fetched a few at a time, so memory stays near that of a plain run.
    """
    from onnxfuse.runtime.session import Runtime  # a session is made from a model

    unknown = (name for name, info in found.items() if not info.complete and name not in feed)
    wanted = [name for name in unknown if not model.is_weight(model.tensor(name))]
    result = {name: TensorInfo(name, array.dtype, array.shape) for name, array in feed.items()}
    session = Runtime("cpu").session(model, taps=wanted, optimize=False)
    for start in range(0, len(wanted), TAPS_AT_ONCE):
        for name, array in session.run(feed, wanted[start : start + TAPS_AT_ONCE]).items():
            if isinstance(array, np.ndarray):  # else a sequence or a map
                result[name] = TensorInfo(name, array.dtype, array.shape)
    return result
