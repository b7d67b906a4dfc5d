"""LSTM, GRU and RNN: numbers from ONNX Runtime and onnx's reference, gradients from native modules."""

from __future__ import annotations

import itertools

import numpy as np
import onnx.reference
import pytest
import torch
from nets import net, normal
from rule_checks import agrees, compiles_and_exports
from torch import Tensor, nn

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
NATIVE = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX's gates in torch's order: i, o, f, c of i, f, c, o; z, r, h of r, z, h."""

TIME, INPUT, HIDDEN = 5, 3, 4
DIRECTIONS = ("forward", "reverse", "bidirectional")


def recurrent(
    op: str,
    direction: str = "forward",
    *,
    attributes: str = "",
    bias: bool = True,
    lengths: list[int] | None = None,
    states: int = 0,
    peepholes: bool = False,
    scale: float = 1.0,
    layout: int = 0,
) -> Model:
    """One node, batch 3; `states`: 1 for an initial hidden state, 2 for an initial cell state, 3 for both."""
    count, gates = 2 if direction == "bidirectional" else 1, GATES[op]
    state = (3, count, HIDDEN) if layout else (count, 3, HIDDEN)
    weights = {
        "w": normal(count, gates * HIDDEN, INPUT, seed=1),
        "r": normal(count, gates * HIDDEN, HIDDEN, seed=2) / np.float32(2),
        "b": normal(count, 2 * gates * HIDDEN, seed=3) if bias else None,
        "lengths": None if lengths is None else np.array(lengths, np.int32),
        "h": normal(*state, seed=4) * np.float32(scale) if states & 1 else None,
        "c": normal(*state, seed=5) * np.float32(scale) if states & 2 else None,
        "p": normal(count, 3 * HIDDEN, seed=6) if peepholes else None,
    }
    names = [name if value is not None else "" for name, value in weights.items()]
    outputs = "y, last, cell" if op == "LSTM" else "y, last"
    if op != "LSTM":
        names = names[:5]
    while not names[-1]:
        names.pop()
    body = (
        f'{outputs} = {op}<hidden_size={HIDDEN}, direction="{direction}", layout={layout}{attributes}>'
        f"(x, {', '.join(names)})"
    )
    x = f"float[3,T,{INPUT}] x" if layout else f"float[T,3,{INPUT}] x"
    stored = {name: weights[name] for name in names if name}
    return net(body, stored, x, ", ".join(f"float {name}" for name in outputs.split(", ")))


def sequence() -> dict[str, np.ndarray]:
    return {"x": normal(TIME, 3, INPUT, seed=9)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
def test_torchs_own_layer(op: str, direction: str) -> None:
    attributes = ", linear_before_reset=1" if op == "GRU" else ""
    for bias, states in itertools.product((True, False), (0, 1, 2, 3) if op == "LSTM" else (0, 1)):
        model = recurrent(op, direction, attributes=attributes, bias=bias, states=states)
        module = agrees(model, sequence())
        assert "by_steps" not in module.code


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
def test_lengths(op: str, direction: str) -> None:
    for lengths in ([5, 5, 5], [2, 5, 1]):
        states = 3 if op == "LSTM" else 1
        agrees(recurrent(op, direction, lengths=lengths, states=states), sequence())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gru_with_reset_before_the_matrix(direction: str) -> None:
    for bias in (True, False):
        agrees(recurrent("GRU", direction, bias=bias, states=1), sequence())


@pytest.mark.parametrize("attributes", ["", ", input_forget=1", ", clip=0.4", ", input_forget=1, clip=0.4"])
@pytest.mark.parametrize("peepholes", [True, False])
def test_lstm_with_peepholes_clipping_and_coupled_gates(peepholes: bool, attributes: str) -> None:
    for direction in ("forward", "bidirectional"):
        model = recurrent("LSTM", direction, attributes=attributes, peepholes=peepholes, states=3, scale=2)
        agrees(model, sequence())


@pytest.mark.parametrize("op", ["GRU", "RNN"])
def test_clipping(op: str) -> None:
    agrees(recurrent(op, attributes=", clip=0.3"), sequence())
    if op == "GRU":
        agrees(recurrent(op, attributes=", clip=0.3, linear_before_reset=1"), sequence())


@pytest.mark.parametrize(
    "names",
    [
        '"Relu"',
        '"Sigmoid"',
        '"Softsign"',
        '"Softplus"',
        '"LeakyRelu"',
        '"Elu"',
        '"HardSigmoid"',
        '"LeakyRelu"], activation_alpha=[0.3',
        '"Elu"], activation_alpha=[0.3',
        '"ThresholdedRelu"], activation_alpha=[0.3',
        '"Affine"], activation_alpha=[0.3], activation_beta=[0.1',
        '"ScaledTanh"], activation_alpha=[0.3], activation_beta=[0.7',
        '"HardSigmoid"], activation_alpha=[0.3], activation_beta=[0.4',
    ],
)
def test_activations(names: str) -> None:
    agrees(recurrent("RNN", attributes=f", activations=[{names}]"), sequence())


def test_activations_of_each_gate_and_direction() -> None:
    names = '"HardSigmoid","Softsign","Tanh","Sigmoid","LeakyRelu","Elu"'
    alphas = "activation_alpha=[0.3,0.2,0.5], activation_beta=[0.4]"
    agrees(recurrent("LSTM", "bidirectional", attributes=f", activations=[{names}], {alphas}"), sequence())
    names = '"Sigmoid","Softsign","HardSigmoid","Tanh"'
    agrees(recurrent("GRU", "bidirectional", attributes=f", activations=[{names}]"), sequence())


def test_activations_that_nothing_defines_are_refused() -> None:
    with pytest.raises(NotApplicableError, match=r"\(RNN\).*'Mish' is not supported"):
        to_torch(recurrent("RNN", attributes=', activations=["Mish"]'))
    with pytest.raises(NotApplicableError, match=r"\(RNN\).*'Affine' needs activation_alpha"):
        to_torch(recurrent("RNN", attributes=', activations=["Affine"]'))


@pytest.mark.parametrize("attributes", ["", ", clip=9.0"])
@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str, attributes: str) -> None:
    # ONNX Runtime has no layout 1: the same weights and the other layout, transposed, must agree.
    states = 3 if op == "LSTM" else 1
    for direction in DIRECTIONS:
        first = to_torch(recurrent(op, direction, attributes=attributes, states=states, layout=1))
        second = to_torch(recurrent(op, direction, attributes=attributes, states=states))
        second.load_state_dict(
            {k: v.transpose(0, 1) if k in "hc" else v for k, v in first.state_dict().items()}
        )
        x = torch.from_numpy(sequence()["x"])
        y, *last = first(x.transpose(0, 1))
        wanted, *states_wanted = second(x)
        torch.testing.assert_close(y.permute(1, 2, 0, 3), wanted)
        for ours, theirs in zip(last, states_wanted, strict=True):
            torch.testing.assert_close(ours.transpose(0, 1), theirs)


def test_batch_first_is_onnxs_layout() -> None:
    model = recurrent("LSTM", layout=1)
    x = normal(3, TIME, INPUT)
    (wanted, *_) = onnx.reference.ReferenceEvaluator(model.to_proto()).run(None, {"x": x})
    np.testing.assert_allclose(to_torch(model)(torch.from_numpy(x))[0].detach(), wanted, atol=1e-5)


def native_weights(op: str, native: nn.Module, directions: int) -> dict[str, Tensor]:
    """The weights of torch's layer as ONNX stacks them; gradients flow back to the layer's own."""

    def reordered(tensor: Tensor) -> Tensor:
        parts = tensor.chunk(GATES[op])
        return torch.cat([parts[place] for place in ORDER[op]])

    w, r, b = [], [], []
    for suffix in ("", "_reverse")[:directions]:
        w.append(reordered(getattr(native, f"weight_ih_l0{suffix}")))
        r.append(reordered(getattr(native, f"weight_hh_l0{suffix}")))
        biases = [reordered(getattr(native, f"bias_{part}_l0{suffix}")) for part in ("ih", "hh")]
        b.append(torch.cat(biases))
    return {"w": torch.stack(w), "r": torch.stack(r), "b": torch.stack(b)}


@pytest.mark.parametrize("attributes", ["", ", clip=99.0"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("op", GATES)
def test_gradients_are_those_of_torchs_layer(op: str, directions: int, attributes: str) -> None:
    """By torch's own layer, and (with a clip that does nothing) by the explicit loop."""
    torch.manual_seed(0)
    native = NATIVE[op](INPUT, HIDDEN, bidirectional=directions == 2)
    stacked = native_weights(op, native, directions)
    reset = ", linear_before_reset=1" if op == "GRU" else ""
    model = recurrent(op, DIRECTIONS[2 * (directions - 1)], attributes=attributes + reset)
    module = to_torch(model)
    assert ("by_steps" in module.code) == bool(attributes)
    with torch.no_grad():
        for name, value in stacked.items():
            module.get_parameter(name).copy_(value)
    x = torch.randn(TIME, 2, INPUT)
    y = module(x)[0]
    wanted = native(x)[0].unflatten(2, (directions, HIDDEN)).transpose(1, 2)
    torch.testing.assert_close(y, wanted)
    factor = torch.randn_like(y)
    found = torch.autograd.grad((y * factor).sum(), list(module.parameters()))
    right = torch.autograd.grad((wanted * factor).sum(), list(native.parameters()))
    # The stacked layout of torch's gradients is that of its weights.
    with torch.no_grad():
        for parameter, gradient in zip(native.parameters(), right, strict=True):
            parameter.copy_(gradient)
        gradients = native_weights(op, native, directions)
    for (name, _), ours in zip(module.named_parameters(), found, strict=True):
        torch.testing.assert_close(ours, gradients[name])


@pytest.mark.parametrize("op", GATES)
def test_compile_and_export(op: str) -> None:
    body = f"t = Transpose<perm=[1,0,2]>(x) y = {op}<hidden_size={HIDDEN}>(t, w, r)"
    weights = {"w": (1, GATES[op] * HIDDEN, INPUT), "r": (1, GATES[op] * HIDDEN, HIDDEN)}
    module = to_torch(net(body, weights, f"float[N,{TIME},{INPUT}] x", "float y"))
    compiles_and_exports(module, (TIME, INPUT))


def test_an_output_may_be_left_out() -> None:
    weights = {"w": (1, 4 * HIDDEN, INPUT), "r": (1, 4 * HIDDEN, HIDDEN)}
    body = f"y, last, cell = LSTM<hidden_size={HIDDEN}>(x, w, r)"
    model = net(body, weights, f"float[T,3,{INPUT}] x", "float cell")
    proto = model.to_proto()
    proto.graph.node[0].output[:2] = ["", ""]
    agrees(Model.load(proto), sequence())
