"""LSTM, GRU and RNN.

The weights stay as ONNX stores them, both directions stacked and the gates in ONNX's order. Each call
permutes them with one `cat`, whose gradient is one `cat` too, and runs torch's own fast layer. What that
can't do (lengths, peepholes, clipping, other activations, GRU's reset before the matrix) is an explicit loop
over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call

_CELL_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "Sigmoid": lambda x, alpha, beta: torch.sigmoid(x),
    "Tanh": lambda x, alpha, beta: torch.tanh(x),
    "Relu": lambda x, alpha, beta: torch.relu(x),
    "Softsign": lambda x, alpha, beta: F.softsign(x),
    "Softplus": lambda x, alpha, beta: F.softplus(x),
    "Affine": lambda x, alpha, beta: alpha * x + beta,
    "LeakyRelu": lambda x, alpha, beta: F.leaky_relu(x, alpha),
    "ThresholdedRelu": lambda x, alpha, beta: F.threshold(x, alpha, 0.0),
    "ScaledTanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "HardSigmoid": lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
    "Elu": lambda x, alpha, beta: F.elu(x, alpha),
}
_DEFAULTS = {"LeakyRelu": (0.01, 0.0), "HardSigmoid": (0.2, 0.5), "Elu": (1.0, 0.0)}
"""Alpha and beta where the node gives none."""

_USES_ALPHA = {"Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu"}
_USES_BETA = {"Affine", "ScaledTanh", "HardSigmoid"}

Activation = tuple[str, float, float]


# --- rules -------------------------------------------------------------------------------------------------


@rule("LSTM")
def lstm_rule(call: Call) -> Any:
    activations = _activations(call, ["Sigmoid", "Tanh", "Tanh"])
    plain = activations is None and not (call.has(4) or call.has(7) or call.attr("input_forget", 0))
    if plain and call.attr("clip") is None:
        result = call.emit(lstm, *_inputs(call, 0, 1, 2, 3, 5, 6), **_layout(call))
    else:
        result = call.emit(
            lstm_by_steps,
            *_inputs(call, 0, 1, 2, 3, 4, 5, 6, 7),
            **_layout(call),
            activations=activations or _default(call, ["Sigmoid", "Tanh", "Tanh"]),
            clip=call.attr("clip"),
            coupled=bool(call.attr("input_forget", 0)),
        )
    return tuple(call.item(result, index) for index in range(call.outputs))


@rule("GRU")
def gru_rule(call: Call) -> Any:
    activations = _activations(call, ["Sigmoid", "Tanh"])
    after = bool(call.attr("linear_before_reset", 0))
    if activations is None and after and not call.has(4) and call.attr("clip") is None:
        result = call.emit(gru, *_inputs(call, 0, 1, 2, 3, 5), **_layout(call))
    else:
        result = call.emit(
            gru_by_steps,
            *_inputs(call, 0, 1, 2, 3, 4, 5),
            **_layout(call),
            activations=activations or _default(call, ["Sigmoid", "Tanh"]),
            clip=call.attr("clip"),
            reset_after=after,
        )
    return tuple(call.item(result, index) for index in range(call.outputs))


@rule("RNN")
def rnn_rule(call: Call) -> Any:
    activations = _activations(call, ["Tanh"])
    names = {name for name, _, _ in activations or [("Tanh", 0.0, 0.0)]}
    if names in ({"Tanh"}, {"Relu"}) and not call.has(4) and call.attr("clip") is None:
        result = call.emit(rnn, *_inputs(call, 0, 1, 2, 3, 5), **_layout(call), relu=names == {"Relu"})
    else:
        result = call.emit(
            rnn_by_steps,
            *_inputs(call, 0, 1, 2, 3, 4, 5),
            **_layout(call),
            activations=activations or _default(call, ["Tanh"]),
            clip=call.attr("clip"),
        )
    return tuple(call.item(result, index) for index in range(call.outputs))


def _inputs(call: Call, *indices: int) -> list[fx.Node | None]:
    return [call.optional(index) for index in indices]


def _layout(call: Call) -> dict[str, Any]:
    return {
        "direction": call.attr("direction", "forward"),
        "batch_first": bool(call.attr("layout", 0)),
    }


def _default(call: Call, names: Sequence[str]) -> list[Activation]:
    directions = 2 if call.attr("direction") == "bidirectional" else 1
    return [(name, 0.0, 0.0) for name in [*names] * directions]


def _activations(call: Call, default: Sequence[str]) -> list[Activation] | None:
    """The activations of all directions with alpha and beta; None if they are the default ones."""
    names = call.attr("activations")
    alphas, betas = list(call.attr("activation_alpha") or []), list(call.attr("activation_beta") or [])
    if not names:
        return None
    found = []
    for name in names:
        if name not in _CELL_ACTIVATIONS:
            call.refuse(f"activation '{name}' is not supported")
        if name in _USES_ALPHA and not alphas and name not in _DEFAULTS:
            call.refuse(f"activation '{name}' needs activation_alpha")
        alpha, beta = _DEFAULTS.get(name, (0.0, 0.0))
        if name in _USES_ALPHA and alphas:
            alpha = alphas.pop(0)
        if name in _USES_BETA and betas:
            beta = betas.pop(0)
        found.append((name, alpha, beta))
    plain = [name for name, _, _ in found] == [*default] * (len(found) // len(default))
    return None if plain else found


# --- torch's own layers ------------------------------------------------------------------------------------


def _per_direction(tensor: Tensor) -> Sequence[Tensor]:
    """The stacked tensors of the directions; a single one without a copy, forward and backward."""
    return (tensor.squeeze(0),) if tensor.size(0) == 1 else tensor.unbind(0)


def _flat_weights(
    w: Tensor, r: Tensor, b: Tensor | None, permute: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """The weights as torch wants them: W, R and both biases of each direction, gates in torch's order."""
    pairs = zip(_per_direction(permute(w, 1)), _per_direction(permute(r, 1)), strict=True)
    if b is None:
        return [tensor for pair in pairs for tensor in pair]
    of_w, of_r = permute(b.unflatten(1, (2, -1)), 2).unbind(1)
    biases = zip(_per_direction(of_w), _per_direction(of_r), strict=True)
    return [tensor for pair, bias in zip(pairs, biases, strict=True) for tensor in (*pair, *bias)]


def _ifco(gates: Tensor, axis: int) -> Tensor:
    """LSTM gates from ONNX's order (i, o, f, c) to torch's (i, f, c, o)."""
    hidden = gates.size(axis) // 4
    i, o, fc = gates.split([hidden, hidden, 2 * hidden], axis)
    return torch.cat((i, fc, o), axis)


def _rzh(gates: Tensor, axis: int) -> Tensor:
    """GRU gates from ONNX's order (z, r, h) to torch's (r, z, h)."""
    z, r, h = gates.chunk(3, axis)
    return torch.cat((r, z, h), axis)


def _same(gates: Tensor, axis: int) -> Tensor:
    return gates


def _initial(x: Tensor, r: Tensor, state: Tensor | None, batch_first: bool) -> Tensor:
    """The state to start from, (directions, batch, hidden)."""
    if state is None:
        return x.new_zeros(r.size(0), x.size(0 if batch_first else 1), r.size(-1))
    return state.transpose(0, 1) if batch_first else state


def _run(
    layer: Callable[..., Any], x: Tensor, state: Any, flat: list[Tensor], direction: str, batch_first: bool
) -> tuple[Tensor, ...]:
    """The outputs of a layer of torch, all in ONNX's layout."""
    time = 1 if batch_first else 0
    if direction == "reverse":
        x = x.flip(time)
    bidirectional = direction == "bidirectional"
    biases = len(flat) == (8 if bidirectional else 4)
    y, *states = layer(x, state, flat, biases, 1, 0.0, False, bidirectional, batch_first)
    if direction == "reverse":
        y = y.flip(time)
    y = y.unflatten(2, (2, -1)) if bidirectional else y.unsqueeze(2)
    if batch_first:
        return y, *(s.transpose(0, 1) for s in states)
    return y.transpose(1, 2), *states


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    direction: str,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """ONNX's LSTM: all hidden states, the last hidden state, the last cell state."""
    hidden = _initial(x, r, h, batch_first)
    cell = hidden if h is None and c is None else _initial(x, r, c, batch_first)
    return _run(torch.lstm, x, (hidden, cell), _flat_weights(w, r, b, _ifco), direction, batch_first)


def gru(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, h: Tensor | None, direction: str, batch_first: bool
) -> tuple[Tensor, ...]:
    """ONNX's GRU with the reset after the matrix: all hidden states, the last one."""
    state = _initial(x, r, h, batch_first)
    return _run(torch.gru, x, state, _flat_weights(w, r, b, _rzh), direction, batch_first)


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    h: Tensor | None,
    direction: str,
    batch_first: bool,
    relu: bool,
) -> tuple[Tensor, ...]:
    """ONNX's RNN: all hidden states, the last one."""
    state = _initial(x, r, h, batch_first)
    layer = torch.rnn_relu if relu else torch.rnn_tanh
    return _run(layer, x, state, _flat_weights(w, r, b, _same), direction, batch_first)


# --- explicit loops ----------------------------------------------------------------------------------------


def _by_steps(
    x: Tensor,
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    r: Tensor,
    direction: str,
    batch_first: bool,
    cell: Callable[[int, Tensor], Callable[..., tuple[Tensor, ...]]],
) -> tuple[Tensor, ...]:
    """The outputs of a cell, run step by step.

    Args:
        lengths: of the sequences; beyond them outputs are zero and states stay.
        states: to start from: the hidden state first.
        cell: of the number of a direction and the input (time, batch, input); gives the function that makes
            new states of a time and the states.
    """
    sequence = x.transpose(0, 1) if batch_first else x
    starts = [_initial(x, r, state, batch_first) for state in states]
    time = sequence.size(0)
    outputs, finals = [], []
    for number in range(r.size(0)):
        step = cell(number, sequence)
        now = tuple(start[number] for start in starts)
        backwards = direction == "reverse" or number == 1
        hidden: list[Tensor] = []
        for t in reversed(range(time)) if backwards else range(time):
            new = step(t, *now)
            if lengths is None:
                now = new
                hidden.append(now[0])
            else:
                alive = (lengths > t)[:, None]
                now = tuple(torch.where(alive, a, b) for a, b in zip(new, now, strict=True))
                hidden.append(torch.where(alive, now[0], 0.0))
        outputs.append(torch.stack(hidden[::-1] if backwards else hidden))
        finals.append(now)
    if batch_first:
        y = torch.stack(outputs, 2).transpose(0, 1)
        return y, *(torch.stack(final, 1) for final in zip(*finals, strict=True))
    return torch.stack(outputs, 1), *(torch.stack(final) for final in zip(*finals, strict=True))


def _gate_functions(
    activations: Sequence[Activation], number: int, count: int, clip: float | None
) -> list[Callable[[Tensor], Tensor]]:
    """The activations of one direction, after clipping."""

    def function(name: str, alpha: float, beta: float) -> Callable[[Tensor], Tensor]:
        plain = _CELL_ACTIVATIONS[name]
        if clip is None:
            return lambda x: plain(x, alpha, beta)
        return lambda x: plain(x.clamp(-clip, clip), alpha, beta)

    return [function(*activation) for activation in activations[number * count : (number + 1) * count]]


def _bias(b: Tensor | None, number: int) -> tuple[Tensor | None, Tensor | None]:
    """The biases of W and R of one direction."""
    if b is None:
        return None, None
    of_w, of_r = b[number].chunk(2)
    return of_w, of_r


def lstm_by_steps(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    peepholes: Tensor | None,
    direction: str,
    batch_first: bool,
    activations: Sequence[Activation],
    clip: float | None,
    coupled: bool,
) -> tuple[Tensor, ...]:
    """`lstm` with everything that ONNX knows; `coupled`: the forget gate is 1 - the input gate."""

    def cell(number: int, sequence: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        # As in ONNX Runtime, the gates are clipped, the cell state is not.
        f, g, _ = _gate_functions(activations, number, 3, clip)
        k = _gate_functions(activations, number, 3, None)[2]
        of_w, of_r = _bias(b, number)
        inputs = F.linear(sequence, w[number], of_w)
        recurrent = r[number]
        p_i, p_o, p_f = (0.0, 0.0, 0.0) if peepholes is None else peepholes[number].chunk(3)

        def step(t: int, hidden: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
            i, o, forget, new = (inputs[t] + F.linear(hidden, recurrent, of_r)).chunk(4, -1)
            i = f(i + p_i * memory)
            forget = 1 - i if coupled else f(forget + p_f * memory)
            memory = forget * memory + i * g(new)
            return f(o + p_o * memory) * k(memory), memory

        return step

    return _by_steps(x, lengths, (h, c), r, direction, batch_first, cell)


def gru_by_steps(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor | None,
    direction: str,
    batch_first: bool,
    activations: Sequence[Activation],
    clip: float | None,
    reset_after: bool,
) -> tuple[Tensor, ...]:
    """`gru` with everything that ONNX knows; `reset_after`: the reset gate comes after the matrix."""

    def cell(number: int, sequence: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        f, g = _gate_functions(activations, number, 2, clip)
        of_w, of_r = _bias(b, number)
        inputs = F.linear(sequence, w[number], of_w)
        hidden_size = r.size(-1)
        gates, candidate = r[number].split([2 * hidden_size, hidden_size])
        gates_bias, candidate_bias = (
            (None, None) if of_r is None else of_r.split([2 * hidden_size, hidden_size])
        )

        def step(t: int, hidden: Tensor) -> tuple[Tensor, ...]:
            zr, new = inputs[t].split([2 * hidden_size, hidden_size], -1)
            z, reset = f(zr + F.linear(hidden, gates, gates_bias)).chunk(2, -1)
            if reset_after:
                new = g(new + reset * F.linear(hidden, candidate, candidate_bias))
            else:
                new = g(new + F.linear(reset * hidden, candidate, candidate_bias))
            return ((1 - z) * new + z * hidden,)

        return step

    return _by_steps(x, lengths, (h,), r, direction, batch_first, cell)


def rnn_by_steps(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor | None,
    direction: str,
    batch_first: bool,
    activations: Sequence[Activation],
    clip: float | None,
) -> tuple[Tensor, ...]:
    """`rnn` with everything that ONNX knows."""

    def cell(number: int, sequence: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        (f,) = _gate_functions(activations, number, 1, clip)
        of_w, of_r = _bias(b, number)
        inputs = F.linear(sequence, w[number], of_w)
        recurrent = r[number]

        def step(t: int, hidden: Tensor) -> tuple[Tensor, ...]:
            return (f(inputs[t] + F.linear(hidden, recurrent, of_r)),)

        return step

    return _by_steps(x, lengths, (h,), r, direction, batch_first, cell)
