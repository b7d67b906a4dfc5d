"""What all graphs of one import share: the stored tensors, and the module that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.pytorch.bridge.keys import CALLED, Keys, put
from onnxfuse.pytorch.bridge.tensors import to_tensor, torch_type
from onnxfuse.pytorch.bridge.weights import Weight


class Store:
    """The stored tensors of a model as Parameters and buffers of one module.

    Attributes:
        modules: holds them under their keys, and what the model's graph calls.
        calls: the names taken in its submodule `CALLED`.
        weights: by scope and name.
        trainable: the keys of those that are Parameters.
        opsets: the version of each domain.
        shared_gradients: whether shares of a gradient that nodes have noted count (`to_torch`).
    """

    def __init__(
        self,
        weights: Iterable[Weight],
        trainable: Callable[[Weight], bool],
        opsets: Mapping[str, int],
        shared_gradients: bool,
    ) -> None:
        """
        Args:
            weights: in the order in which the module lists them.
            trainable: which become Parameters.
            opsets: the version of each domain, as the model imports them.
            shared_gradients: see the attribute.

        Raises:
            InputError: a trainable tensor that is not floating-point.
        """
        self.modules = holder()
        self.calls = Keys()
        self.weights = {(weight.scope, weight.name): weight for weight in weights}
        self.opsets = {"" if domain == "ai.onnx" else domain: version for domain, version in opsets.items()}
        self.shared_gradients = shared_gradients
        self.trainable: set[str] = set()
        for weight in self.weights.values():
            tensor = to_tensor(weight.load())
            if trainable(weight):
                if not weight.is_float:
                    raise InputError(f"'{weight.name}' can't be trainable: it holds {weight.dtype}")
                self.trainable.add(weight.key)
                tensor = nn.Parameter(tensor)
            put(self.modules, weight.key, tensor)

    def constant(self, name: str, load: Callable[[], np.ndarray] | None) -> str:
        """The key of a constant that is no weight, registered as a buffer.

        Raises:
            NotApplicableError: torch lacks its element type.
        """
        array = load() if load is not None else np.empty(0)
        if torch_type(array.dtype) is None:
            raise NotApplicableError(
                f"tensor '{name}' can't be imported to PyTorch: torch has no {array.dtype}"
            )
        return self.buffer(name, to_tensor(array))

    def buffer(self, name: str, tensor: torch.Tensor) -> str:
        """The key of a tensor that is no state of the model, registered as a buffer."""
        key = f"{CALLED}.{self.calls.claim(name.replace('.', '_'))}"
        put(self.modules, key, tensor)
        return key


def holder() -> nn.Module:
    """A module that holds nothing yet, but can take what a graph calls."""
    module = nn.Module()
    module.add_module(CALLED, nn.Module())
    return module
