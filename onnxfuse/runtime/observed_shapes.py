"""Types and shapes as a run shows them, where inference leaves them open.

`Model.shapes` knows what the file declares and what ONNX infers. The sizes that a feed gives to dynamic
dimensions, and the types behind operators that inference does not know, take a run: the model is tapped, a
few tensors at a time.
"""

from __future__ import annotations

import numpy as np

from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.shapes import TensorInfo, fill
from onnxfuse.runtime.session import Runtime

TAPS_AT_ONCE = 64


def shapes_on(model: Model, feed: Feed | None, runtime: Runtime) -> dict[str, TensorInfo]:
    """Type and shape of every tensor of the main graph, by name: `Model.shapes`, completed by a run.

    The model remembers the latest runs until it is edited, so the same feed is not run twice.

    Args:
        model: is not changed.
        feed: gives what is still unknown the concrete sizes that it has there; None leaves that open.
        runtime: where the model is run if it has to be.

    Raises:
        InputError: a feed that does not fit the inputs.
        NotApplicableError: ONNX Runtime can't run the model.
    """
    found = model.shapes()
    if feed is None or (all(info.complete for info in found.values()) and not model.unproved()):
        return found
    runs = model.observations()
    run = next((result for known, result in runs if _same_arrays(known, feed)), None)
    if run is None:
        run = observed(model, found, feed, runtime)
        runs[:] = [(dict(feed), run), *runs[:1]]
    return {name: fill(info, run.get(name)) for name, info in found.items()}


def observed(
    model: Model, found: dict[str, TensorInfo], feed: Feed, runtime: Runtime
) -> dict[str, TensorInfo]:
    """Types and shapes on this feed, of the inputs and of what `found` leaves unknown or only the file says.

    The tensors are fetched a few at a time, so memory stays near that of a plain run.

    Args:
        model: is not changed.
        found: what is known without a run, by name.
        feed: what is run.
        runtime: where it is run.
    """
    unproved = model.unproved()
    unknown = (n for n, info in found.items() if (not info.complete or n in unproved) and n not in feed)
    wanted = [name for name in unknown if not model.is_weight(model.tensor(name))]
    result = {name: TensorInfo(name, array.dtype, array.shape) for name, array in feed.items()}
    session = runtime.session(model, taps=wanted, optimize=False)
    for start in range(0, len(wanted), TAPS_AT_ONCE):
        for name, array in session.run(feed, wanted[start : start + TAPS_AT_ONCE]).items():
            if isinstance(array, np.ndarray):  # else a sequence or a map
                result[name] = TensorInfo(name, array.dtype, array.shape)
    return result


def _same_arrays(a: Feed, b: Feed) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
