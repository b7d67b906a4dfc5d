"""Attention and rotary embeddings, as the single operators of operator set 23."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call

_PRECISIONS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""ONNX's numbers of the floating-point types."""

SCORES, CAPPED, MASKED, PROBABILITIES = range(4)
"""What the output `qk_matmul_output` may be."""


@rule("Attention")
def attention_rule(call: Call) -> Any:
    settings = {
        "heads": call.attr("q_num_heads"),
        "kv_heads": call.attr("kv_num_heads"),
        "scale": call.attr("scale"),
        "causal": bool(call.attr("is_causal", 0)) or None,
        "softcap": call.attr("softcap") or None,
        "window": _window(call),
        "precision": _PRECISIONS.get(call.attr("softmax_precision")),
        "shown": call.attr("qk_matmul_output_mode", SCORES) if call.wants(3) else None,
    }
    inputs = [call.optional(index) for index in range(len(call.inputs))]
    result = call.emit(attention, *inputs, **{k: v for k, v in settings.items() if v is not None})
    return tuple(call.item(result, index) for index in range(call.outputs))


def _window(call: Call) -> tuple[int, int] | None:
    """The distances that a query may look before and after its own place, -1 for no limit; None for none."""
    found = call.attr("left_window_size", -1), call.attr("right_window_size", -1)
    return None if found == (-1, -1) else found


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window: tuple[int, int] | None = None,
    precision: torch.dtype | None = None,
    shown: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """ONNX's Attention: the result, keys and values with those of the past before them, and the scores.

    Args:
        q, k, v: (batch, heads, time, size), or (batch, time, heads * size) if `heads` says how many.
        lengths: how many keys of each sample count.
        softcap: scores are squashed to within it.
        window: how far before and after its own place a query may look; -1 for no limit on that side.
        precision: of the softmax.
        shown: which form of the scores to return; None for none.
    """
    flat = q.dim() == 3
    if flat:
        q, k, v = (
            x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    keys, values = k, v
    groups = q.size(1) // k.size(1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    simple = softcap is None and shown is None and precision in (None, q.dtype)
    if simple and mask is None and past_key is None and lengths is None and window is None:
        y, scores = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale), None
    else:
        before = 0 if past_key is None else past_key.size(2)
        left, right = window or (-1, -1)
        bias = _bias(q, k.size(2), mask, lengths, before, left, 0 if causal else right)
        if simple:
            y, scores = F.scaled_dot_product_attention(q, k, v, bias, scale=scale), None
        else:
            y, scores = _written_out(q, k, v, bias, scale, softcap, precision, shown)
    return y.transpose(1, 2).flatten(2) if flat else y, keys, values, scores


def _bias(
    q: Tensor, keys: int, mask: Tensor | None, lengths: Tensor | None, before: int, left: int, right: int
) -> Tensor:
    """The addend of the scores: the mask, and minus infinity where a query may not look.

    Args:
        before: how many keys precede that of the first query.
        left, right: how far before and after its own place it may look; -1 for no limit.
    """
    bias = q.new_zeros(q.size(2), keys)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf).to(q.dtype)
        bias = bias + F.pad(mask, (0, keys - mask.size(-1)), value=-math.inf)
    start: int | Tensor = before if lengths is None else lengths.reshape(-1, 1, 1, 1) - q.size(2)
    place = torch.arange(keys, device=q.device)
    ahead = place - torch.arange(q.size(2), device=q.device)[:, None] - start
    if right >= 0:
        bias = bias.masked_fill(ahead > right, -math.inf)
    if left >= 0:
        bias = bias.masked_fill(ahead < -left, -math.inf)
    return bias if lengths is None else bias.masked_fill(place >= lengths.reshape(-1, 1, 1, 1), -math.inf)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float | None,
    softcap: float | None,
    precision: torch.dtype | None,
    shown: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, and the scores in the form that `shown` names."""
    root = math.sqrt(1 / math.sqrt(q.size(3)) if scale is None else scale)
    scores = (q * root) @ (k * root).transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    masked = scores + bias
    probabilities = torch.softmax(masked, 3, precision)
    # A query that may look nowhere sees zeros.
    nowhere = bias.amax(-1, keepdim=True) == -math.inf
    probabilities = probabilities.masked_fill(nowhere, 0.0).to(q.dtype)
    forms = {MASKED: masked, PROBABILITIES: probabilities}
    return probabilities @ v, forms.get(SCORES if shown is None else shown, scores)


@rule("RotaryEmbedding")
def rotary_embedding_rule(call: Call) -> fx.Node:
    settings = {
        "interleaved": bool(call.attr("interleaved", 0)),
        "size": call.attr("rotary_embedding_dim", 0),
        "heads": call.attr("num_heads", 0),
    }
    inputs = [call.optional(index) for index in range(len(call.inputs))]
    return call.emit(rotary_embedding, *inputs, **{k: v for k, v in settings.items() if v})


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor | None = None,
    *,
    interleaved: bool = False,
    size: int = 0,
    heads: int = 0,
) -> Tensor:
    """ONNX's RotaryEmbedding.

    Args:
        x: (batch, heads, time, size), or (batch, time, heads * size) if `heads` says how many.
        cos, sin: by position and pair; by sample and time and pair without `position`.
        interleaved: whether pairs are neighbors, rather than halves.
        size: how many elements are turned; 0 for all.
    """
    flat = x.dim() == 3
    if flat:
        x = x.unflatten(2, (heads, -1)).transpose(1, 2)
    if position is not None:
        cos, sin = cos[position], sin[position]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = (x[..., :size], x[..., size:]) if size else (x, x[..., :0])
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = cos * a - sin * b, sin * a + cos * b
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.cat((turned, rest), -1) if size else turned
    return y.transpose(1, 2).flatten(2) if flat else y
