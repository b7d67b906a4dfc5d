"""Checks that the tests of rules share: against ONNX Runtime, against native torch modules, and that what
torch does with modules works on an import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from nets import compute, net, normal
from torch import Tensor, fx, nn

from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch


def agrees(model: Model, feed: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> fx.GraphModule:
    """The import computes what ONNX Runtime computes, of the same type and shape; returns it."""
    module = to_torch(model)
    names = [info.name for info in model.outputs]
    with torch.no_grad():
        found = module(*(torch.from_numpy(feed[info.name]) for info in model.inputs))
    for ours, wanted in zip([found] if len(names) == 1 else found, compute(model, dict(feed)), strict=True):
        assert (ours.numpy().dtype, ours.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(ours.numpy(), wanted, atol=tolerance, rtol=tolerance)
    return module


def agrees_on(
    body: str, weights: Mapping[str, object], shape: Sequence[int], opset: int = 17, tolerance: float = 1e-5
) -> fx.GraphModule:
    """`agrees` for nodes in ONNX text from float x (N, *shape) to y, for two batches."""
    sizes = ",".join(["N", *map(str, shape)])
    model = net(body, weights, f"float[{sizes}] x", "float y", opset)
    agrees(model, {"x": normal(2, *shape, seed=2)}, tolerance)
    return agrees(model, {"x": normal(5, *shape, seed=1)}, tolerance)


def trains_like(module: nn.Module, native: nn.Module, x: Tensor, same: Mapping[str, Tensor]) -> None:
    """In train mode both give the same outputs, and the same gradients to the input and to the weights.

    Args:
        same: the native weight, or a view of it, that each Parameter of the module is a copy of.
    """
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = module.train()(ours), native.train()(theirs)
    torch.testing.assert_close(y, wanted)
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(same)
    weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    found = torch.autograd.grad((y * weight).sum(), [ours, *(parameters[key] for key in same)])
    right = torch.autograd.grad((wanted * weight).sum(), [theirs, *same.values()])
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def is_plain(module: fx.GraphModule) -> bool:
    """Whether its code calls nothing but torch."""
    return "onnxfuse" not in module.code


def compiles_and_exports(module: fx.GraphModule, shape: Sequence[int]) -> None:
    """torch.compile in one graph, and torch.export with a dynamic batch, compute the same."""
    x, other = torch.randn(3, *shape), torch.randn(6, *shape)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(other), module(other))
