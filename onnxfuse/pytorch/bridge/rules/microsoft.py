"""Operators of the domain com.microsoft, into which ONNX Runtime's optimizers fuse those of ONNX."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from onnxfuse.ir.protos import as_default
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.rules.linear import conv, gemm
from onnxfuse.pytorch.bridge.rules.windows import known_shape
from onnxfuse.pytorch.bridge.values import Call

_DOMAIN = "com.microsoft::"


@rule(_DOMAIN + "FastGelu")
def fast_gelu(call: Call) -> fx.Node:
    x = call.emit(torch.add, call.tensor(0), call.tensor(1)) if call.has(1) else call.tensor(0)
    return call.emit(F.gelu, x, approximate="tanh")


@rule(_DOMAIN + "BiasGelu")
def bias_gelu(call: Call) -> fx.Node:
    return call.emit(F.gelu, call.emit(torch.add, call.tensor(0), call.tensor(1)))


@rule(_DOMAIN + "QuickGelu")
def quick_gelu(call: Call) -> fx.Node:
    x = call.tensor(0)
    gate = call.emit(torch.sigmoid, call.emit(torch.mul, x, call.attr("alpha", 1.702)))
    return call.emit(torch.mul, x, gate)


@rule(_DOMAIN + "ScaledSiLU")
def scaled_silu(call: Call) -> fx.Node:
    scale = call.tensor(1) if call.has(1) else call.attr("alpha", 1.0)
    return call.emit(F.silu, call.emit(torch.mul, call.tensor(0), scale))


@rule(_DOMAIN + "SkipLayerNormalization")
def skip_layer_normalization(call: Call) -> Any:
    total, shape = _with_skip(call, 4)
    y = call.emit(F.layer_norm, total, shape, call.tensor(2), call.optional(3), call.attr("epsilon", 1e-12))
    return y, None, None, total


@rule(_DOMAIN + "SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(call: Call) -> Any:
    total, shape = _with_skip(call, 3)
    y = call.emit(F.rms_norm, total, shape, call.tensor(2), call.attr("epsilon", 1e-12))
    return y, None, None, total


def _with_skip(call: Call, bias: int) -> tuple[fx.Node, tuple[int, ...]]:
    """The tensor to normalize, a sum of the inputs and of a bias in input `bias`, and the weight's shape."""
    if call.wants(1) or call.wants(2):
        call.refuse("mean and deviation are not supported as outputs")
    shape = known_shape(call, 2)
    if shape is None:
        call.refuse("the size of its weight is not known")
    total = call.emit(torch.add, call.tensor(0), call.tensor(1))
    return call.emit(torch.add, total, call.tensor(bias)) if call.has(bias) else total, shape


@rule(_DOMAIN + "FusedMatMul")
def fused_matmul(call: Call) -> fx.Node:
    if call.attr("transBatchA", 0) or call.attr("transBatchB", 0):
        call.refuse("transposed batches are not supported")
    a, b = call.tensor(0), call.tensor(1)
    # ONNX Runtime leaves vectors as they are.
    if call.attr("transA", 0) and call.rank(0) != 1:
        a = call.method("transpose", a, -2, -1)
    if call.attr("transB", 0) and call.rank(1) != 1:
        b = call.method("transpose", b, -2, -1)
    product, alpha = call.emit(torch.matmul, a, b), call.attr("alpha", 1.0)
    return product if alpha == 1 else call.emit(torch.mul, product, alpha)


@rule(_DOMAIN + "FusedConv")
def fused_conv(call: Call) -> fx.Node:
    y = conv(call)
    if call.has(3):
        y = call.emit(torch.add, y, call.tensor(3))
    return _activated(call, y, call.attr("activation_params") or [])


@rule(_DOMAIN + "FusedGemm")
def fused_gemm(call: Call) -> fx.Node:
    given = [call.attr(name) for name in ("activation_alpha", "activation_beta")]
    return _activated(call, gemm(call), [number for number in given if number is not None])


def _activated(call: Call, y: fx.Node, numbers: list[float]) -> fx.Node:
    """The activation that is fused behind."""
    activation = call.attr("activation") or ""
    plain = {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
    if activation in plain:
        return call.emit(plain[activation], y)
    if activation == "LeakyRelu":
        return call.emit(F.leaky_relu, y, numbers[0] if numbers else as_default(0.01))
    if activation == "Clip" and len(numbers) == 2:
        return call.emit(torch.clamp, y, *numbers)
    if activation:
        call.refuse(f"its activation '{activation}' is not supported")
    return y
