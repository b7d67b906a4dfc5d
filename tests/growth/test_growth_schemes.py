"""The schemes side by side: Table 1 of Painter's paper, every cell measured.

    .                                  r2r                  net2net             netmorph
    function preserved                 yes                  yes (*)             yes
    activations, to widen              any, by channel      any, by channel     any, by channel (**)
    activations, to deepen             any                  idempotent          -
    noise needed                       no                   yes                 no
    residual sums                      yes                  yes (***)           yes
    free new weights, to widen         half                 none                half
    old weights kept                   yes                  no                  yes
    new layers, to deepen              2 or more            1 or more           -
    new channels                       even                 any                 any

(*) the paper has "in expectation", for BatchNormalization with the statistics of a batch; here it is that of
inference, and noise sums to zero. (**) the paper asks for psi(0) = 0 because it may set what computes the new
channels to zero; here what reads them is zero, so that nothing is asked. (***) the paper has no; here all
channels of a residual sum are one group, and replicated alike.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from channel_cases import CASES, Case, close, found, parameters, sized
from growth_checks import case_context, gradients
from nets import compute, weight

from onnxfuse.errors import InputError
from onnxfuse.growth.depth import find_sites
from onnxfuse.ir.model import Model
from onnxfuse.passes.deepen import Deepen
from onnxfuse.passes.widen import Widen
from onnxfuse.pipeline.recipe import make_pass
from onnxfuse.pytorch.bridge.importer import to_torch

SCHEMES = ("r2r", "net2net", "netmorph")
DENSE = Case(
    "h = MatMul(x, w1) r = Tanh(h) y = MatMul(r, w2)", sized("w1:5,8 w2:8,3"), (8,), 2, x="float[N,5] x"
)


def widened(case: Case, scheme: str, seed: int = 0, **options: float) -> tuple[Model, Model]:
    model = case.model()
    pass_ = make_pass("widen", {"sites": {"all": options.pop("ratio", 2.0)}, "scheme": scheme, **options})
    return model, pass_.run(model.copy(), case_context(case, model, seed)).model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("psi", ["Tanh", "Sigmoid", "Cos", "Softplus", "Exp", "HardSwish", "Gelu"])
def test_function_and_activations_to_widen(scheme: str, psi: str) -> None:
    """Any that works channel by channel, with psi(0) = 0 or without."""
    case = replace(DENSE, body=DENSE.body.replace("Tanh", psi), opset=20)
    model, grown = widened(case, scheme)
    assert weight(grown, "w1").shape == (5, 16)
    for batch in (1, 6):
        feed = case.feed(model, batch)
        close(compute(grown, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize("psi", ["Relu", "Clip", "Tanh", "Sigmoid", "Cos", "Elu"])
def test_activations_to_deepen(psi: str) -> None:
    case = replace(DENSE, body=DENSE.body.replace("Tanh", psi))
    can = {}
    for scheme in ("r2r", "net2net"):
        (site,) = (s for s in find_sites(case.model(), scheme) if s.names == ("h",))
        can[scheme] = site.obstacle is None
    # Cos isn't known as an activation, so the layer ends before it and nothing is applied twice.
    assert can == {"r2r": True, "net2net": psi in ("Relu", "Clip", "Cos")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_noise(scheme: str) -> None:
    """Without it copies of net2net get equal gradients for ever; the twins of r2r opposite ones at once."""
    model, grown = widened(DENSE, scheme, noise=0)
    module = to_torch(grown)
    for step in range(3):
        gradients(module, DENSE.feed(model, 8, seed=step), ["x"], step)
    w1 = dict(module.named_parameters())["w1"].detach().numpy()
    pairs = [(a, b) for a in range(16) for b in range(a) if np.allclose(w1[:, a], w1[:, b], atol=1e-6)]
    assert len(pairs) == (8 if scheme == "net2net" else 0)
    _, noisy = widened(DENSE, "net2net", noise=0.3)
    feed = DENSE.feed(model, 5)
    close(compute(noisy, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_residual_sums(scheme: str) -> None:
    model, grown = widened(CASES["residual"], scheme)
    assert weight(grown, "w0").shape[0] == weight(grown, "w2").shape[0] == 16
    feed = CASES["residual"].feed(model, 4)
    close(compute(grown, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize(("scheme", "share"), [("r2r", 0.5), ("net2net", 0.0), ("netmorph", 0.5)])
def test_degrees_of_freedom(scheme: str, share: float) -> None:
    """The rank of the new weights over many draws: how many numbers are chosen, out of those that are new."""
    draws = []
    for seed in range(80):
        _, grown = widened(DENSE, scheme, seed, ratio=1.5 if scheme == "r2r" else 2.0, noise=0)
        new = [weight(grown, "w1")[:, 8:].ravel(), weight(grown, "w2")[8:].ravel()]
        order = np.argsort(weight(grown, "w1")[0, 8:])  # net2net only chooses which channel comes when
        if scheme == "net2net":
            new = [weight(grown, "w1")[:, 8:][:, order].ravel(), weight(grown, "w2")[8:][order].ravel()]
        draws.append(np.concatenate(new))
    table = np.array(draws, np.float64)
    free = np.linalg.matrix_rank(table - table.mean(0), tol=1e-4)
    # netmorph chooses what computes the new channels, 5 of 8 numbers each; r2r one twin of two.
    expected = {"r2r": share * table.shape[1], "net2net": 0, "netmorph": table.shape[1] * 5 / 8}
    assert free == expected[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_old_weights_are_kept(scheme: str) -> None:
    model, grown = widened(CASES["plain"], scheme)
    kept = {
        name: np.array_equal(weight(grown, name)[tuple(map(slice, value.shape))], value)
        for name, value in parameters(model).items()
    }
    reading = {"w2", "wy"}
    assert kept == {name: scheme != "net2net" or name not in reading for name in kept}


def test_new_layers() -> None:
    model = DENSE.model()
    counts = {}
    for scheme, options in {"r2r": [{}, {"inner": [1, 1, 1]}], "net2net": [{}]}.items():
        case = replace(DENSE, body=DENSE.body.replace("Tanh", "Relu"))
        model = case.model()
        for more in options:
            pass_ = Deepen(sites={"h": 1}, scheme=scheme, **more)
            grown = pass_.run(model.copy(), case_context(case, model)).model
            counts[scheme, len(more)] = sum(n.op == "MatMul" for n in grown.nodes) - 2
    assert counts == {("r2r", 0): 2, ("r2r", 1): 4, ("net2net", 0): 1}
    with pytest.raises(InputError, match="'r2r' or 'net2net'"):
        make_pass("deepen", {"scheme": "netmorph"})


@pytest.mark.parametrize(("scheme", "more"), [("r2r", 4), ("net2net", 3), ("netmorph", 3)])
def test_new_channels(scheme: str, more: int) -> None:
    model = DENSE.model()
    grown = Widen(sites={"h": 1.4}, scheme=scheme).run(model.copy(), case_context(DENSE, model)).model
    (group,) = found(DENSE, grown).free
    assert group.size == 8 + more
