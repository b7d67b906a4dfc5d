"""What a training has to leave as it is inside the weights that it moves.

`prune` and `cluster` note on nodes that the zeros of their weights are to stay zeros, or that numbers which
are equal are to stay equal (`onnxfuse.ir.marks`). After every step of the optimizer such weights are put back
where that holds: zeros become zeros again, and equal numbers their mean, which moves a shared number by the
mean of its copies' steps (Han et al. 2016, section 3.3, with a mean for the sum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from onnxfuse.ir.marks import VALUES, ZEROS, promises
from onnxfuse.ir.model import Model
from onnxfuse.ops.shared_weights import multiplied
from onnxfuse.pytorch.bridge.weights import stored

Projection = Callable[[], None]


def projection(module: nn.Module, model: Model) -> Projection | None:
    """A function that puts a module's weights back after a step; None where nothing is to be kept.

    Args:
        module: `to_torch` of the model, its weights not moved yet.
        model: whose nodes say what is to be kept.
    """
    keys = {weight.name: weight.key for weight in stored(model) if not weight.scope}
    promised: dict[str, set[str]] = {}
    for node in model.nodes:
        marks = promises(node) & {ZEROS, VALUES}
        for tensor in multiplied(model, node) if marks else ():
            if tensor.name in keys:
                promised.setdefault(keys[tensor.name], set()).update(marks)
    trained = dict(module.named_parameters())
    found = [_of_weight(trained[key], marks) for key, marks in promised.items() if key in trained]
    return None if not found else lambda: _run(found)


def _of_weight(weight: nn.Parameter, marks: Iterable[str]) -> Projection:
    gone = (weight.detach() == 0) if ZEROS in marks else None
    if VALUES not in marks:
        assert gone is not None
        return lambda: _zero(weight, gone)
    values, places = torch.unique(weight.detach(), return_inverse=True)
    counts = torch.bincount(places.reshape(-1), minlength=len(values))

    def put_back() -> None:
        sums = torch.zeros(len(values), dtype=torch.float64, device=weight.device)
        sums.index_add_(0, places.reshape(-1).to(weight.device), weight.detach().reshape(-1).double())
        means = (sums / counts.to(weight.device)).to(weight.dtype)
        with torch.no_grad():
            weight.copy_(means[places.to(weight.device)])
        if gone is not None:
            _zero(weight, gone)

    return put_back


def _zero(weight: nn.Parameter, gone: Tensor) -> None:
    with torch.no_grad():
        weight.masked_fill_(gone.to(weight.device), 0)


def _run(projections: Iterable[Projection]) -> None:
    for put_back in projections:
        put_back()
