"""Normalization: over the batch, a layer, groups of channels, neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.rules.windows import known_shape
from onnxfuse.pytorch.bridge.values import Call

_NARROW = (torch.float16, torch.bfloat16)


class BatchNorm(nn.Module):
    """BatchNorm as nn.BatchNorm2d does it, of weights and statistics that belong to someone else.

    In train mode it normalizes by the batch and updates the statistics in place, with the variance that
    torch takes for that (divided by n - 1).

    Args:
        epsilon: added to the variance.
        momentum: the share of the batch in the new statistics: 1 - ONNX's.
        running: whether the statistics are there to be updated.
        batch: whether the file itself asks for the statistics of the batch, always.
    """

    def __init__(self, epsilon: float, momentum: float, running: bool = True, batch: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.momentum = momentum
        self.running = running
        self.batch = batch

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
    ) -> torch.Tensor:
        if self.training and self.running:
            return F.batch_norm(x, mean, var, scale, bias, True, self.momentum, self.epsilon)
        if self.training:
            return F.batch_norm(x, None, None, scale, bias, True, self.momentum, self.epsilon)
        if self.batch:  # unlike F.batch_norm this takes a single value, too
            cudnn = torch.backends.cudnn.enabled
            return torch.batch_norm(x, scale, bias, None, None, True, self.momentum, self.epsilon, cudnn)
        return F.batch_norm(x, mean, var, scale, bias, False, self.momentum, self.epsilon)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, momentum={self.momentum}"


@rule("BatchNormalization")
def batch_normalization(call: Call) -> Any:
    momentum = 1 - call.attr("momentum", 0.9)
    running = call.value(3).stored and call.value(4).stored
    # Before operator set 14 the outputs beyond the first mean that the file is one for training.
    batch = bool(call.attr("training_mode", 0)) or call.wants(1)
    module = BatchNorm(call.attr("epsilon", 1e-5), momentum, running, batch)
    x, scale, bias, mean, var = (call.tensor(index) for index in range(5))
    if call.dtype(1) != call.dtype(3):
        scale, bias = call.method("type_as", scale, mean), call.method("type_as", bias, mean)
    if call.opset < 9 and not call.attr("spatial", 1):
        return _batch_normalization_by_place(call, module, x, [scale, bias, mean, var])
    if not call.wants(1):
        return call.module(module, x, scale, bias, mean, var)
    if call.outputs > 3:
        call.refuse("saved statistics of the batch are not supported as outputs")
    # What the statistics become has to be read before the module updates them.
    after = call.emit(updated_statistics, x, mean, var, momentum)
    return call.module(module, x, scale, bias, mean, var), call.item(after, 0), call.item(after, 1)


def _batch_normalization_by_place(call: Call, module: BatchNorm, x: fx.Node, rest: list[fx.Node]) -> fx.Node:
    """The form of old operator sets with weights and statistics for each place: all places are channels."""
    if call.wants(1):
        call.refuse("statistics by place (spatial=0) are not supported as outputs")
    flat = [call.emit(torch.flatten, tensor) for tensor in rest]
    return call.method("view_as", call.module(module, call.emit(torch.flatten, x, 1), *flat), x)


def updated_statistics(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, momentum: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running mean and variance as ONNX defines them: the variance is divided by n."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    batch_var, batch_mean = torch.var_mean(x.to(mean.dtype), axes, correction=0)
    return mean + momentum * (batch_mean - mean), var + momentum * (batch_var - var)


@rule("InstanceNormalization")
def instance_normalization(call: Call) -> fx.Node:
    epsilon = call.attr("epsilon", 1e-5)
    return call.emit(instance_norm, call.tensor(0), call.tensor(1), call.tensor(2), epsilon)


def instance_norm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """InstanceNorm, also of a single place, which F.instance_norm refuses."""
    return torch.instance_norm(x, scale, bias, None, None, True, 0.0, epsilon, torch.backends.cudnn.enabled)


@rule("LayerNormalization")
def layer_normalization(call: Call) -> Any:
    return normalize_layer(call, call.optional(2))


def normalize_layer(call: Call, bias: fx.Node | None) -> Any:
    """LayerNorm of input 0 by the weight in input 1; mean and inverse deviation where they are wanted."""
    axis, epsilon = call.attr("axis", -1), call.attr("epsilon", 1e-5)
    x, scale = call.tensor(0), call.tensor(1)
    shape = _plain_shape(call, axis)
    bias_shape = known_shape(call, 2) if bias is not None else shape
    if shape is not None and bias_shape == shape:
        y = call.emit(F.layer_norm, x, shape, scale, bias, epsilon)
    else:
        y = call.emit(layer_norm, x, axis, scale, bias, epsilon)
    if call.outputs == 1:
        return y
    narrow = call.dtype(0) in _NARROW
    dtype = torch.float32 if narrow and call.attr("stash_type", 1) == 1 else None
    statistics = call.emit(layer_statistics, x, axis, epsilon, dtype)
    return y, call.item(statistics, 0), call.item(statistics, 1)


def _plain_shape(call: Call, axis: int) -> tuple[int, ...] | None:
    """The shape of the normalized axes, if the weight's says it beyond doubt: ones may be broadcast."""
    shape, rank = known_shape(call, 1), call.rank(0)
    axes = -axis if axis < 0 else None if rank is None else rank - axis
    return shape if shape is not None and len(shape) == axes and 1 not in shape else None


def layer_norm(
    x: torch.Tensor, axis: int, scale: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """LayerNorm over all axes from `axis`, by weights that may be broadcast."""
    y = F.layer_norm(x, x.shape[axis:], eps=epsilon) * scale
    return y if bias is None else y + bias


def layer_statistics(
    x: torch.Tensor, axis: int, epsilon: float, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse standard deviation over all axes from `axis`, which stay as ones."""
    axes = list(range(axis % x.dim(), x.dim()))
    var, mean = torch.var_mean(x if dtype is None else x.to(dtype), axes, correction=0, keepdim=True)
    return mean, torch.rsqrt(var + epsilon)


@rule("GroupNormalization")
def group_normalization(call: Call) -> fx.Node:
    groups, epsilon = call.attr("num_groups"), call.attr("epsilon", 1e-5)
    # Up to operator set 20 its weights are by group, a form that onnx has withdrawn and ONNX Runtime runs.
    function = torch.group_norm if call.opset >= 21 else group_norm
    return call.emit(function, call.tensor(0), groups, call.tensor(1), call.tensor(2), epsilon)


def group_norm(
    x: torch.Tensor, groups: int, scale: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """GroupNorm by a scale and a bias of each group."""
    channels = x.shape[1] // groups
    weights = scale.repeat_interleave(channels), bias.repeat_interleave(channels)
    return torch.group_norm(x, groups, *weights, epsilon)


@rule("RMSNormalization")
def rms_normalization(call: Call) -> fx.Node:
    axis, epsilon = call.attr("axis", -1), call.attr("epsilon", 1e-5)
    shape = _plain_shape(call, axis)
    if shape is not None:
        return call.emit(F.rms_norm, call.tensor(0), shape, call.tensor(1), epsilon)
    return call.emit(rms_norm, call.tensor(0), axis, call.tensor(1), epsilon)


@rule("SimplifiedLayerNormalization")
def simplified_layer_normalization(call: Call) -> Any:
    """RMSNorm under the name that ONNX Runtime gave it, before ONNX had one."""
    if call.dtype(0) not in (None, call.dtype(1)):
        call.refuse("its input and its weight are of different types")
    y = rms_normalization(call)
    if call.outputs == 1:
        return y
    if call.dtype(0) in _NARROW:
        call.refuse("the inverse deviation is not supported as an output in half precision")
    return y, call.emit(inverse_rms, call.tensor(0), call.attr("axis", -1), call.attr("epsilon", 1e-5))


def inverse_rms(x: torch.Tensor, axis: int, epsilon: float) -> torch.Tensor:
    """The inverse root mean square over all axes from `axis`, which stay as ones."""
    axes = list(range(axis % x.dim(), x.dim()))
    return torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)


def rms_norm(x: torch.Tensor, axis: int, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm over all axes from `axis`, by a weight that may be broadcast."""
    return F.rms_norm(x, x.shape[axis:], eps=epsilon) * scale


@rule("LpNormalization")
def lp_normalization(call: Call) -> fx.Node:
    # torch divides by at least that much; ONNX leaves a vector of zeros as it is.
    least = torch.finfo(call.dtype(0) or torch.float32).tiny
    return call.emit(F.normalize, call.tensor(0), call.attr("p", 2), call.attr("axis", -1), least)


@rule("LRN")
def lrn(call: Call) -> fx.Node:
    size = call.attr("size")
    alpha, beta, k = call.attr("alpha", 1e-4), call.attr("beta", 0.75), call.attr("bias", 1.0)
    if size % 2 == 0:
        call.refuse("an even number of neighbors is nothing that ONNX Runtime knows")
    return call.emit(F.local_response_norm, call.tensor(0), size, alpha, beta, k)


@rule("MeanVarianceNormalization")
def mean_variance_normalization(call: Call) -> fx.Node:
    return call.emit(standardized, call.tensor(0), call.axes() or [0, 2, 3])


def standardized(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Mean 0 and deviation 1 over those axes; the 1e-9 is of ONNX's definition."""
    var, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    return (x - mean) / (var.sqrt() + 1e-9)
