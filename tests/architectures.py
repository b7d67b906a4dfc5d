"""Small networks of the usual families in plain torch, and their ONNX files by each of torch's exporters.

The bridge to PyTorch is judged on them: the native module beside its import. Every network takes a width, so
that tests are quick and timings are of a sensible size; weights are random, normalisations get statistics
and affine parameters that are not the identity, so that an ignored one shows.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPORTERS = ("dynamo", "unoptimised", "torchscript")
"""torch.onnx.export as it is called by default, with `optimize=False`, and with `dynamo=False`."""

TOKENS = 50
"""Size of the vocabularies."""

LONGEST = 64
"""Positions that embeddings know; also the largest batch and sequence of the exports."""


@dataclass(frozen=True)
class Architecture:
    """A network to export.

    Attributes:
        name: identifies it.
        kind: "cnn", "transformer", "recurrent" or "dense".
        make: the module at a width; width 1 is tiny.
        inputs: example inputs by name, for a batch size and a length (of sequences).
        dynamic: the axes that the exported file leaves open: by input, axis to name.
        batch_norm: whether it has BatchNorm.
    """

    name: str
    kind: str
    make: Callable[[int], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    dynamic: Mapping[str, Mapping[int, str]]
    batch_norm: bool = False

    def module(self, width: int = 1, seed: int = 0) -> nn.Module:
        """The native module, in eval mode, equal for equal seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _settled(self.make(width)).eval()

    def example(self, batch: int, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """Inputs by name, equal for equal seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(batch, length)


def _settled(module: nn.Module) -> nn.Module:
    """As after some training: no two weights are equal, which exporters would merge, and normalisations have
    neither the statistics nor the affine parameters of the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
        for part in module.modules():
            if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
                part.weight.mul_(torch.empty_like(part.weight).uniform_(0.7, 1.3))
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.running_mean is not None
                assert part.running_var is not None
                nn.init.normal_(part.running_mean, 0, 0.1)
                nn.init.uniform_(part.running_var, 0.7, 1.3)
    return module


# --- convolutional ------------------------------------------------------------------------------------------


def _conv(
    inside: int,
    outside: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class Head(nn.Sequential):
    """Global average pooling and a linear layer."""

    def __init__(self, channels: int, classes: int = 10) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def vgg(width: int) -> nn.Module:
    c = 8 * width
    return nn.Sequential(
        _conv(3, c), _conv(c, c), nn.MaxPool2d(2), _conv(c, 2 * c), nn.MaxPool2d(2), _conv(2 * c, 2 * c),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * c * 16, 4 * c), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(4 * c, 10),
    )  # fmt: skip


class BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = nn.Identity() if inside == outside else _conv(inside, outside, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


def resnet(width: int) -> nn.Module:
    c = 8 * width
    return nn.Sequential(
        nn.Conv2d(3, c, 7, 2, 3, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        BasicBlock(c, c, 1), BasicBlock(c, 2 * c, 2), BasicBlock(2 * c, 2 * c, 1), Head(2 * c),
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(channels // 4, 2), 1)
        self.expand = nn.Conv2d(max(channels // 4, 2), channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int, act: type[nn.Module], gate: type[nn.Module]
    ) -> None:
        super().__init__()
        hidden = 2 * inside
        self.body = nn.Sequential(
            _conv(inside, hidden, 1, act=act),
            _conv(hidden, hidden, kernel, stride, hidden, act=act),
            SqueezeExcite(hidden, nn.ReLU, gate),
            _conv(hidden, outside, 1, act=None),
        )
        self.residual = inside == outside and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet(width: int) -> nn.Module:
    c = 8 * width
    args = (nn.Hardswish, nn.Hardsigmoid)
    return nn.Sequential(
        _conv(3, c, 3, 2, act=nn.ReLU6), InvertedResidual(c, c, 3, 1, *args),
        InvertedResidual(c, 2 * c, 5, 2, *args), InvertedResidual(2 * c, 2 * c, 5, 1, *args),
        _conv(2 * c, 4 * c, 1, act=nn.Hardswish), Head(4 * c),
    )  # fmt: skip


def efficientnet(width: int) -> nn.Module:
    c = 8 * width
    args = (nn.SiLU, nn.Sigmoid)
    return nn.Sequential(
        _conv(3, c, 3, 2, act=nn.SiLU), InvertedResidual(c, c, 3, 1, *args),
        InvertedResidual(c, 2 * c, 5, 2, *args), InvertedResidual(2 * c, 2 * c, 3, 1, *args),
        _conv(2 * c, 4 * c, 1, act=nn.SiLU), Head(4 * c),
    )  # fmt: skip


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inside), nn.Conv2d(inside, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet(width: int) -> nn.Module:
    c, g = 8 * width, 4 * width
    return nn.Sequential(
        nn.Conv2d(3, c, 3, 1, 1, bias=False), DenseLayer(c, g), DenseLayer(c + g, g),
        nn.BatchNorm2d(c + 2 * g), nn.ReLU(), nn.Conv2d(c + 2 * g, c, 1, bias=False), nn.AvgPool2d(2),
        DenseLayer(c, g), DenseLayer(c + g, g), nn.BatchNorm2d(c + 2 * g), nn.ReLU(), Head(c + 2 * g),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            _conv(half, half, 1), _conv(half, half, 3, groups=half, act=None), _conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, 1)
        y = torch.cat([kept, self.branch(worked)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet(width: int) -> nn.Module:
    c = 8 * width
    return nn.Sequential(_conv(3, c, 3, 2), ShuffleUnit(c), ShuffleUnit(c), nn.MaxPool2d(2), Head(c))


class UNet(nn.Module):
    """Two levels down and up: one transposed convolution, one bilinear upsampling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 8 * width
        self.enter, self.down1, self.down2 = _conv(3, c), _conv(c, 2 * c), _conv(2 * c, 4 * c)
        self.up1 = nn.ConvTranspose2d(4 * c, 2 * c, 2, 2)
        self.merge1 = _conv(4 * c, 2 * c)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.merge2 = _conv(3 * c, c)
        self.leave = nn.Conv2d(c, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        a = self.enter(image)
        b = self.down1(F.max_pool2d(a, 2))
        c = self.down2(F.max_pool2d(b, 2))
        b = self.merge1(torch.cat([self.up1(c), b], 1))
        return self.leave(self.merge2(torch.cat([self.up2(b), a], 1)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        c = 8 * width
        self.stem = nn.Conv2d(3, c, 4, 4)
        self.blocks = nn.Sequential(ConvNeXtBlock(c), ConvNeXtBlock(c))
        self.down_norm, self.down = nn.GroupNorm(1, c), nn.Conv2d(c, 2 * c, 2, 2)
        self.last = ConvNeXtBlock(2 * c)
        self.norm, self.head = nn.LayerNorm(2 * c), nn.Linear(2 * c, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.down(self.down_norm(self.blocks(self.stem(image))))
        return self.head(self.norm(self.last(x).mean((-2, -1))))


class GroupNormNet(nn.Module):
    """Group and instance normalisation, PReLU, reflection padding, asymmetric stride."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 8 * width
        self.conv1, self.norm1, self.act1 = nn.Conv2d(3, c, 3), nn.GroupNorm(4, c), nn.PReLU(c)
        self.conv2, self.norm2 = nn.Conv2d(c, c, 3, (2, 1), 1), nn.InstanceNorm2d(c, affine=True)
        self.conv3 = nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=2)
        self.norm3 = nn.GroupNorm(2, c)
        self.head = Head(c)

    def forward(self, image: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(F.pad(image, (1, 1, 1, 1), mode="reflect"))))
        x = F.leaky_relu(self.norm2(self.conv2(x)), 0.1)
        return self.head(x + F.elu(self.norm3(self.conv3(x))))


def conv1d(width: int) -> nn.Module:
    c = 8 * width

    def block(inside: int, outside: int, kernel: int, dilation: int) -> list[nn.Module]:
        pad = dilation * (kernel - 1) // 2
        return [nn.Conv1d(inside, outside, kernel, 1, pad, dilation), nn.BatchNorm1d(outside), nn.ReLU()]

    return nn.Sequential(
        *block(2, c, 5, 1), nn.MaxPool1d(2), *block(c, c, 3, 2), *block(c, 2 * c, 3, 4),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * c, 6),
    )  # fmt: skip


# --- transformers -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention written out: one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        n, length, d = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5
        if bias is not None:
            scores = scores + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, d))


class EncoderBlock(nn.Module):
    """Attention and MLP, normalised before ("pre") or after ("post") each."""

    def __init__(self, width: int, heads: int, order: str) -> None:
        super().__init__()
        self.attention, self.order = Attention(width, heads), order
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.order == "pre":
            x = x + self.attention(self.norm1(x), bias)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, bias))
        return self.norm2(x + self.mlp(x))


class Bert(nn.Module):
    """Token, position and segment embeddings, padding mask, pooled by the mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 16 * width
        self.tokens, self.positions = nn.Embedding(TOKENS, d), nn.Embedding(LONGEST, d)
        self.segments, self.norm = nn.Embedding(2, d), nn.LayerNorm(d)
        self.layers = nn.ModuleList(EncoderBlock(d, 4, "post") for _ in range(2))
        self.pooler, self.head = nn.Linear(d, d), nn.Linear(d, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.tokens(input_ids) + self.positions(position) + self.segments(token_type_ids))
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, bias)
        return x, self.head(torch.tanh(self.pooler(x[:, 0])))


class StockEncoder(nn.Module):
    """torch's own encoder layers under an embedding, with a padding mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 16 * width
        self.embed = nn.Embedding(TOKENS, d)
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.encoder(
            self.embed(tokens) * math.sqrt(self.embed.embedding_dim), src_key_padding_mask=padding
        )
        kept = (~padding).to(x.dtype)[..., None]
        return self.head((x * kept).sum(1) / kept.sum(1))


class GptBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, d = x.shape
        parts = self.c_attn(self.ln_1(x)).split(d, 2)
        q, k, v = (p.view(n, length, self.heads, d // self.heads).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(n, length, d))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Causal attention, embedding and output layer tied."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 16 * width
        self.wte, self.wpe = nn.Embedding(TOKENS, d), nn.Embedding(LONGEST, d)
        self.h = nn.ModuleList(GptBlock(d, 4) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(d), nn.Linear(d, TOKENS, bias=False)
        nn.init.normal_(self.wte.weight, 0, 0.1)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).uniform_(0.7, 1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaBlock(nn.Module):
    """Rotary positions, two query heads to a key head, gated MLP."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)
        angles = torch.outer(torch.arange(float(LONGEST)), 100 ** -torch.linspace(0, 1, self.size // 2))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin(), persistent=False)

    def rotate(self, x: Tensor, length: int) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos[:length] + torch.cat([-b, a], -1) * self.sin[:length]

    def forward(self, x: Tensor) -> Tensor:
        n, length, d = x.shape
        y = self.norm1(x)
        q = self.q(y).view(n, length, self.heads, self.size).transpose(1, 2)
        k, v = (m(y).view(n, length, self.heads // 2, self.size).transpose(1, 2) for m in (self.k, self.v))
        q, k = self.rotate(q, length), self.rotate(k, length)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        hidden = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.size) + hidden
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, d))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        d = 16 * width
        self.embed = nn.Embedding(TOKENS, d)
        self.layers = nn.ModuleList(LlamaBlock(d, 4) for _ in range(2))
        self.norm, self.head = RmsNorm(d), nn.Linear(d, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Vit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        d = 16 * width
        self.patch = nn.Conv2d(3, d, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, d) * 0.1)
        self.position = nn.Parameter(torch.randn(1, 17, d) * 0.1)
        self.blocks = nn.Sequential(EncoderBlock(d, 4, "pre"), EncoderBlock(d, 4, "pre"))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class SwinBlock(nn.Module):
    """Attention in windows, shifted by a roll, with a table of relative position biases."""

    relative_position_index: Tensor
    attn_mask: Tensor

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.2)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = (at[:, :, None] - at[:, None, :] + window - 1).permute(1, 2, 0)
        self.register_buffer("relative_position_index", offset[..., 0] * (2 * window - 1) + offset[..., 1])
        if shift:
            region = torch.zeros(1, side, side, 1)
            cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for label, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
                region[:, rows, columns] = label
            region = self.windows(region).squeeze(-1)
            mask = (region[:, None, :] != region[:, :, None]).float() * -100.0
            self.register_buffer("attn_mask", mask)

    def windows(self, x: Tensor) -> Tensor:
        n, w, count = x.shape[0], self.window, self.side // self.window
        x = x.view(n, count, w, count, w, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, w * w, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        n, side, _, d = x.shape
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        area, count = self.window**2, side // self.window
        table = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = table.view(area, area, -1).permute(2, 0, 1)[None]
        if self.shift:
            bias = (bias + self.attn_mask[:, None]).repeat(n, 1, 1, 1)
        y = self.attention(self.windows(y), bias)
        y = (
            y.view(n, count, count, self.window, self.window, d)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(n, side, side, d)
        )
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        d = 8 * width
        self.patch, self.norm0 = nn.Conv2d(3, d, 4, 4), nn.LayerNorm(d)
        self.blocks = nn.Sequential(SwinBlock(d, 2, 8, 4, 0), SwinBlock(d, 2, 8, 4, 2))
        self.merge, self.last = PatchMerging(d), SwinBlock(2 * d, 4, 4, 4, 0)
        self.norm, self.head = nn.LayerNorm(2 * d), nn.Linear(2 * d, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm0(self.patch(image).permute(0, 2, 3, 1))
        return self.head(self.norm(self.last(self.merge(self.blocks(x)))).mean((1, 2)))


# --- recurrent and dense ------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Embedding, two bidirectional recurrent layers, last state and mean into a classifier."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], width: int) -> None:
        super().__init__()
        d = 16 * width
        self.embed = nn.Embedding(TOKENS, d)
        self.rnn = cell(d, d, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4 * d, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        y, state = self.rnn(self.embed(tokens))
        last = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([y.mean(1), last[-1], last[-2]], -1))


class Mixer(nn.Module):
    class Block(nn.Module):
        def __init__(self, tokens: int, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.tokens = nn.Sequential(
                nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
            )
            self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 16 * width
        self.patch = nn.Conv2d(3, d, 8, 8)
        self.blocks = nn.Sequential(self.Block(16, d), self.Block(16, d))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.patch(image).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


def mlp(width: int) -> nn.Module:
    d = 16 * width
    return nn.Sequential(
        nn.Linear(12, d), nn.BatchNorm1d(d), nn.ReLU(), nn.Dropout(0.2), nn.Linear(d, d), nn.Tanh(),
        nn.Linear(d, d), nn.Softplus(), nn.Linear(d, 4), nn.LogSoftmax(-1),
    )  # fmt: skip


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 8 * width
        self.encoder = nn.Linear(12, d)
        self.decoder_bias = nn.Parameter(torch.randn(12) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(self.encoder(x)), self.encoder.weight.t(), self.decoder_bias)


class Siamese(nn.Module):
    """One network on two inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 16 * width
        self.net = nn.Sequential(nn.Linear(12, d), nn.ReLU(), nn.Linear(d, d), nn.LayerNorm(d))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.net(left), self.net(right)
        return (a - b).abs().sum(-1), F.normalize(a, dim=-1)


# --- the list -----------------------------------------------------------------------------------------------


def _images(batch: int, length: int) -> dict[str, Tensor]:
    return {"image": torch.randn(batch, 3, 32, 32)}


def _signals(batch: int, length: int) -> dict[str, Tensor]:
    return {"signal": torch.randn(batch, 2, 64)}


def _features(batch: int, length: int) -> dict[str, Tensor]:
    return {"features": torch.randn(batch, 12)}


def _pairs(batch: int, length: int) -> dict[str, Tensor]:
    return {"left": torch.randn(batch, 12), "right": torch.randn(batch, 12)}


def _tokens(batch: int, length: int) -> dict[str, Tensor]:
    return {"tokens": torch.randint(1, TOKENS, (batch, length))}


def _padded(batch: int, length: int) -> dict[str, Tensor]:
    kept = torch.arange(length) < torch.randint(length // 2, length + 1, (batch, 1))
    return {"tokens": torch.randint(1, TOKENS, (batch, length)) * kept}


def _masked(batch: int, length: int) -> dict[str, Tensor]:
    tokens = _padded(batch, length)["tokens"]
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "token_type_ids": torch.randint(0, 2, tokens.shape),
    }


_ROWS = {0: "batch"}
_SEQUENCE = {0: "batch", 1: "length"}
_IMAGE = {"image": _ROWS}
_TEXT = {"tokens": _SEQUENCE}

ARCHITECTURES = {
    made.name: made
    for made in (
        Architecture("vgg", "cnn", vgg, _images, _IMAGE, True),
        Architecture("resnet", "cnn", resnet, _images, _IMAGE, True),
        Architecture("mobilenet", "cnn", mobilenet, _images, _IMAGE, True),
        Architecture("efficientnet", "cnn", efficientnet, _images, _IMAGE, True),
        Architecture("densenet", "cnn", densenet, _images, _IMAGE, True),
        Architecture("shufflenet", "cnn", shufflenet, _images, _IMAGE, True),
        Architecture("unet", "cnn", UNet, _images, _IMAGE, True),
        Architecture("convnext", "cnn", ConvNeXt, _images, _IMAGE),
        Architecture("groupnorm", "cnn", GroupNormNet, _images, _IMAGE),
        Architecture("conv1d", "cnn", conv1d, _signals, {"signal": _ROWS}, True),
        Architecture(
            "bert",
            "transformer",
            Bert,
            _masked,
            dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), _SEQUENCE),
        ),
        Architecture("encoder", "transformer", StockEncoder, _padded, _TEXT),
        Architecture("gpt", "transformer", Gpt, _tokens, _TEXT),
        Architecture("llama", "transformer", Llama, _tokens, _TEXT),
        Architecture("vit", "transformer", Vit, _images, _IMAGE),
        Architecture("swin", "transformer", Swin, _images, _IMAGE),
        Architecture("mixer", "transformer", Mixer, _images, _IMAGE),
        Architecture("lstm", "recurrent", lambda width: Recurrent(nn.LSTM, width), _tokens, _TEXT),
        Architecture("gru", "recurrent", lambda width: Recurrent(nn.GRU, width), _tokens, _TEXT),
        Architecture("mlp", "dense", mlp, _features, {"features": _ROWS}, True),
        Architecture("autoencoder", "dense", TiedAutoencoder, _features, {"features": _ROWS}),
        Architecture("siamese", "dense", Siamese, _pairs, dict.fromkeys(("left", "right"), _ROWS)),
    )
}
"""By name."""


# --- exporting ----------------------------------------------------------------------------------------------


class ExportFailedError(Exception):
    """torch's exporter gave up."""


def export(architecture: Architecture, how: str, path: Path, width: int = 1) -> nn.Module:
    """Write the architecture's ONNX file at `path`.

    What becomes of BatchNorm and Dropout is the exporter's choice (torch 2.13). The default one folds
    BatchNorm into the convolution before it in whatever mode the module is. `optimize=False` keeps it;
    Dropout it keeps from train mode only, with training_mode=True, which ONNX Runtime drops when it optimises
    and applies when it doesn't. TorchScript folds BatchNorm unless told `training=PRESERVE`, and from train
    mode it then writes BatchNormalization with training_mode=1, which never uses its statistics. So all
    networks are exported in eval mode here, those with BatchNorm through TorchScript with PRESERVE.

    Args:
        architecture: from `ARCHITECTURES`.
        how: one of `EXPORTERS`.
        path: of the file.
        width: of the network.

    Returns:
        The native module, in eval mode.

    Raises:
        ExportFailedError: with the exporter's message in one line.
    """
    module = architecture.module(width)
    example = architecture.example(3)
    with _quietly():
        try:
            if how == "torchscript":
                _by_torchscript(architecture, module, example, path)
            else:
                _by_dynamo(architecture, module, example, path, optimize=how == "dynamo")
        except Exception as error:  # the exporters' exceptions share no base class
            raise ExportFailedError(" ".join(str(error).split())[-300:]) from error
    return module.eval()


def _by_dynamo(
    architecture: Architecture,
    module: nn.Module,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    optimize: bool,
) -> None:
    least = {"batch": 1, "length": 4}
    dimensions = {name: torch.export.Dim(name, min=size, max=LONGEST) for name, size in least.items()}
    shapes = tuple(
        {axis: dimensions[label] for axis, label in architecture.dynamic[name].items()} for name in example
    )
    program = torch.onnx.export(
        module, tuple(example.values()), input_names=list(example), dynamic_shapes=shapes,
        dynamo=True, optimize=optimize, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(path)


def _by_torchscript(
    architecture: Architecture, module: nn.Module, example: Mapping[str, Tensor], path: Path
) -> None:
    mode = torch.onnx.TrainingMode.PRESERVE if architecture.batch_norm else torch.onnx.TrainingMode.EVAL
    torch.onnx.export(
        module, tuple(example.values()), path, dynamo=False, training=mode, input_names=list(example),
        dynamic_axes={name: dict(axes) for name, axes in architecture.dynamic.items()},
    )  # fmt: skip


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporters print, warn and log a lot."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
