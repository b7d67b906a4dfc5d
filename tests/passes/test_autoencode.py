"""autoencode: two thin operators for each thick one, what they compute, what they claim, and refusals."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from nets import Feed, claimed, compute, context, fitted, held, net, normal, weight

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.editing import PASS_KEY, REPLACES_KEY
from onnxfuse.ir.model import Model
from onnxfuse.passes.autoencode import Autoencode, behind
from onnxfuse.pipeline.base import Context, Contract
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.records import StepReport


def spread(*shape: int, seed: int = 0) -> np.ndarray:
    """Inputs whose features (axis 1) differ much in size."""
    scale = np.linspace(2, 0.05, shape[1], dtype=np.float32)
    return normal(*shape, seed=seed) * scale.reshape(1, -1, *[1] * (len(shape) - 2)) + np.float32(0.3)


def run(model: Model, feed: Feed, **options: Any) -> tuple[Model, StepReport, Context]:
    ctx = context(model, feed, batch_size=50)
    outcome = PassManager([Autoencode(**options)]).run(model, ctx)
    (step,) = outcome.steps
    assert step.committed, step.reason
    assert step.contract is Contract.APPROXIMATE
    return outcome.model, step, ctx


def made(model: Model) -> list[str]:
    return [node.op for node in model.nodes if node.metadata.get(PASS_KEY) == "autoencode"]


def error(model: Model, other: Model, feed: Feed, name: str = "y") -> float:
    a, b = (compute(m, feed, name)[0].astype(np.float64) for m in (model, other))
    return float(np.square(a - b).sum() / np.square(a - a.mean(0)).sum())


DENSE = {"w": (16, 12), "b": normal(12, seed=9)}
CASES: dict[str, tuple[str, dict[str, Any], str, str, tuple[int, ...], list[str]]] = {
    "Gemm": ("y = Gemm(x, w, b)", DENSE, "float[N,16] x", "float[A,B] y", (16,), ["Gemm", "Gemm"]),
    "Gemm with factors": (
        "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)",
        {"w": normal(12, 16), "b": normal(12, seed=9)},
        "float[N,16] x",
        "float[A,B] y",
        (16,),
        ["Gemm", "Gemm"],
    ),
    "dense MatMul": (
        "y = MatMul(x, w)",
        {"w": (16, 12)},
        "float[N,16] x",
        "float[A,B] y",
        (16,),
        ["MatMul", "MatMul", "Add"],
    ),
    "tokens and a bias": (
        "h = MatMul(x, w) y = Add(b, h)",
        DENSE,
        "float[N,T,16] x",
        "float[A,B,C] y",
        (5, 16),
        ["MatMul", "MatMul", "Add"],
    ),
    "convolution": (
        "y = Conv<pads=[1,0,2,1], strides=[2,1], dilations=[1,2]>(x, w, b)",
        {"w": (12, 4, 3, 2), "b": normal(12, seed=9)},
        "float[N,4,H,W] x",
        "float[A,B,C,D] y",
        (4, 8, 7),
        ["Conv", "Conv"],
    ),
    "convolution of a line": (
        'h = Conv<auto_pad="SAME_UPPER">(x, w) y = Add(h, c)',
        {"w": (12, 4, 4), "c": normal(12, 1, seed=9)},
        "float[N,4,L] x",
        "float[A,B,C] y",
        (4, 9),
        ["Conv", "Conv"],
    ),
}


def case(name: str) -> tuple[Model, Feed, list[str]]:
    body, weights, x, y, shape, ops = CASES[name]
    return net(body, weights, x=x, y=y), {"x": spread(200, *shape)}, ops


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("name", CASES)
def test_two_operators_and_a_code(name: str, activation: str) -> None:
    model, feed, ops = case(name)
    found, step, ctx = run(model, feed, rank=5, activation=activation, epochs=2)
    if activation == "relu":
        ops = [*ops[:1], *(["Add"] if ops[0] == "MatMul" else []), "Relu", *ops[1:]]
    assert [node.op for node in found.nodes] == ops == made(found)
    for node in found.nodes:
        assert json.loads(node.metadata[REPLACES_KEY]) == [n.outputs[0].name for n in model.nodes]
    (change,) = step.changes
    assert change.nodes == tuple(n.outputs[0].name for n in model.nodes)
    assert change.detail["rank"] == 5
    assert step.after.parameters == change.detail["parameters"]
    assert step.before.parameters == change.detail["parameters_before"]
    assert error(model, found, held(ctx)) < 0.6
    for batch in (1, 7):
        x = spread(batch, *feed["x"].shape[1:], seed=batch)
        (y,), (z) = compute(model, {"x": x}), compute(found, {"x": x})
        assert z[0].shape == y.shape


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_full_rank_is_exact(name: str, refit: bool) -> None:
    model, feed, _ = case(name)
    found, _, ctx = run(model, feed, rank=12, epochs=2, refit=refit)
    assert error(model, found, held(ctx)) < 1e-9


def test_a_convolution_keeps_its_geometry() -> None:
    model, feed, _ = case("convolution")
    found, _, ctx = run(model, feed, rank=5, refit=False)
    first, second = found.nodes
    assert weight(found, first.inputs[1].name).shape == (5, 4, 3, 2)
    assert weight(found, second.inputs[1].name).shape == (12, 5, 1, 1)
    x = torch.nn.functional.pad(torch.from_numpy(held(ctx)["x"]), (0, 1, 1, 2))
    e, d, b = (torch.from_numpy(weight(found, t.name).copy()) for t in (first.inputs[1], *second.inputs[1:]))
    code = torch.nn.functional.conv2d(x, e, stride=(2, 1), dilation=(1, 2))
    expected = torch.nn.functional.conv2d(code, d, b)
    np.testing.assert_allclose(compute(found, held(ctx))[0], expected.numpy(), atol=1e-4)


def test_it_beats_the_plain_decomposition_of_the_weight() -> None:
    """Inputs of unequal sizes: the largest singular values of the weight aren't what matters."""
    model, feed, _ = case("tokens and a bias")
    plain = model.copy()
    u, s, v = np.linalg.svd(weight(model, "w").astype(np.float64))
    plain.set_weight(plain.tensor("w"), ((u[:, :4] * s[:4]) @ v[:4]).astype(np.float32))
    feed["x"] = spread(200, 16, 5).swapaxes(1, 2).copy()
    for options in ({}, {"refit": False}, {"epochs": 0}, {"activation": "relu"}):
        found, _, ctx = run(model, feed, rank=4, **options)
        assert error(model, found, held(ctx)) < 0.8 * error(model, plain, held(ctx))


BODY = """h1 = Gemm(x, w1, b1) r1 = Relu(h1) h2 = Gemm(r1, w2) s = Add(h2, h1) r2 = Relu(s)
h3 = Gemm(r2, w3) y = Softmax(h3)"""
WEIGHTS = {"w1": (12, 24), "b1": normal(24), "w2": (24, 24), "w3": (24, 10)}


def deep() -> Model:
    return net(BODY, WEIGHTS, x="float[N,12] x")


@pytest.mark.parametrize("refit", [False, True])
def test_every_claim_is_what_is_measured(refit: bool) -> None:
    """Of each pair with all before it replaced; where a pair is a branch, of the sum."""
    model = deep()
    found, step, ctx = run(model, {"x": spread(400, 12)}, params=0.6, refit=refit)
    assert [claim.tensor for claim in step.predictions] == ["h1", "s", "h3"]
    for claim, change in zip(step.predictions, step.changes, strict=True):
        ours, theirs = (
            compute(m, claimed(ctx, claim), claim.tensor)[0].astype(float) for m in (found, model)
        )
        assert claim.error == pytest.approx(np.square(ours - theirs).sum(1).mean(), rel=1e-3)
        assert claim.variance == pytest.approx(theirs.var(0).sum(), rel=1e-5)
        assert change.detail["relative_error"] == pytest.approx(
            error(model, found, held(ctx), claim.tensor), rel=0.05
        )


def test_later_operators_make_up_for_earlier_ones() -> None:
    model, feed = deep(), {"x": spread(400, 12)}
    found, step, ctx = run(model, feed, only="h1", params=0.5)
    assert [change.nodes for change in step.changes] == [("h1",), ("h2",), ("h3",)]
    assert "code of" in step.changes[0].what
    assert all("refit" in change.what for change in step.changes[1:])
    alone, lone, _ = run(model, feed, only="h1", params=0.5, refit=False)
    assert len(lone.changes) == len(lone.predictions) == 1
    assert error(model, found, held(ctx), "h3") < error(model, alone, held(ctx), "h3")
    np.testing.assert_array_equal(weight(alone, "w2"), weight(model, "w2"))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_share_of_parameters_holds_for_each(share: float) -> None:
    _, step, _ = run(deep(), {"x": spread(200, 12)}, params=share, epochs=0)
    for change in step.changes:
        before, after = change.detail["parameters_before"], change.detail["parameters"]
        assert isinstance(before, int)
        assert isinstance(after, int)
        assert after <= share * before
        assert after > share * before - 24 - 24 - 24
    assert "of the parameters of 3 operators are left" in step.notes[0]


def test_equal_seeds_give_equal_bytes() -> None:
    def bytes_of(seed: int) -> bytes:
        model = deep()
        ctx = context(model, {"x": spread(200, 12)}, batch_size=50, seed=seed)
        made = Autoencode(params=0.5, activation="relu", epochs=4, refit=False).run(model, ctx).model
        return made.to_proto().SerializeToString(deterministic=True)

    assert bytes_of(0) == bytes_of(0)
    assert bytes_of(0) != bytes_of(1)


def test_padding_is_left_out() -> None:
    model = net(
        "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)",
        {"w1": (16, 12), "w2": (12, 8)},
        x="float[N,T,16] x, int64[N,T] mask",
        y="float[A,B,C] y",
    )
    x = spread(200, 16, 5).swapaxes(1, 2).copy()
    mask = np.random.default_rng(0).integers(0, 2, (200, 5))
    garbage = np.where(mask[..., None] == 0, 50 * normal(200, 5, 16, seed=5), x).astype(np.float32)
    results = [run(model, {"x": own, "mask": mask}, rank=4, mask="mask")[0] for own in (x, garbage)]
    for tensor in results[0].initializers:
        np.testing.assert_array_equal(weight(results[0], tensor.name), weight(results[1], tensor.name))
    careless, _, ctx = run(model, {"x": garbage, "mask": mask}, rank=4)
    real = {"x": held(ctx)["x"][:, :, :], "mask": held(ctx)["mask"]}
    seen = real["mask"] == 1
    (y,), (good,), (bad,) = (compute(m, real) for m in (model, results[1], careless))
    assert np.square(good - y)[seen].mean() < np.square(bad - y)[seen].mean()


REFUSED = {
    "groups": (
        "y = Conv<group=2>(x, w)",
        {"w": (12, 2, 3)},
        "float[N,4,L] x",
        "float[A,B,C] y",
        {"rank": 2},
        "can't be replaced: a grouped convolution",
    ),
    "shared": (
        "a = MatMul(x, w) y = MatMul(a, w)",
        {"w": (6, 6)},
        "float[N,6] x",
        "float[A,B] y",
        {"rank": 2},
        "can't be replaced: its weight has other users",
    ),
    "wide": (
        "y = MatMul(x, w)",
        {"w": (6, 4)},
        "float[N,6] x",
        "float[A,B] y",
        {"rank": 5},
        "a code of 5 numbers is wider than the rank of its weight, 4",
    ),
    "narrow": (
        "y = MatMul(x, w)",
        {"w": (6, 2)},
        "float[N,6] x",
        "float[A,B] y",
        {"params": 0.5},
        "no code is so narrow that 0.5 of its 12 parameters are left",
    ),
    "computed": (
        "v = Relu(w) y = MatMul(x, v)",
        {"w": (6, 4)},
        "float[N,6] x",
        "float[A,B] y",
        {"rank": 2},
        "the weight of MatMul is computed, not constant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    """By name an error; by a pattern a note."""
    body, weights, x, y, options, reason = REFUSED[name]
    model = net(body, weights, x=x, y=y)
    shape = (4, 9) if name == "groups" else (6,)
    ctx = context(model, {"x": normal(40, *shape)})
    with pytest.raises(NotApplicableError, match=reason):
        Autoencode(only="y", **options).run(model.copy(), ctx)
    result = Autoencode(**options).run(model.copy(), ctx)
    assert not result.changes
    assert result.skipped[-1].nodes == ("y",)
    assert result.skipped[-1].reason in reason
    assert "nothing to replace" in result.notes[0]


def test_what_the_original_does_not_have_is_left() -> None:
    model, feed = deep(), {"x": spread(200, 12)}
    ctx = context(model, feed, batch_size=50)
    outcome = PassManager([Autoencode(rank=8, only="h1"), Autoencode(rank=6)]).run(model, ctx)
    assert all(step.committed for step in outcome.steps)
    skip = next(skip for skip in outcome.steps[1].skipped if skip.nodes == ("h1_encode",))
    assert "is not a tensor of the original" in skip.reason
    assert len(outcome.steps[1].changes) == len(outcome.steps[1].predictions) == 3


def test_bad_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    ctx = context(model, {"x": spread(40, 12)})
    with pytest.raises(InputError, match="there is no linear operator 'h9'"):
        Autoencode(only="h9").run(model, ctx)
    with pytest.raises(InputError, match="no input 'padding'"):
        Autoencode(mask="padding").run(model, ctx)
    with pytest.raises(pydantic.ValidationError, match="give one of params and rank"):
        Autoencode(params=0.5, rank=3)
    loud = net(
        "r = Div(x, z) y = MatMul(r, w)", {"w": (12, 6), "z": np.zeros(12, np.float32)}, x="float[N,12] x"
    )
    with pytest.raises(NotApplicableError, match="'r' is not finite on the samples"):
        Autoencode(rank=3).run(loud, context(loud, {"x": spread(40, 12)}))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'onnxfuse\[torch\]'"):
        Autoencode(rank=3).run(model, ctx)


GELU = "d = Div(h, k) e = Erf(d) p = Add(e, one) m = Mul(h, p) g = Mul(m, half)"
NUMBERS = {"k": np.float32(1.4142135), "one": np.float32(1), "half": np.float32(0.5)}
BEHIND: dict[str, tuple[str, tuple[str, str] | None]] = {
    "a ReLU": ("r = Relu(h) y = MatMul(r, w2)", ("h", "r")),
    "a ReLU with two readers": ("r = Relu(h) a = MatMul(r, w2) b = MatMul(r, w2) y = Add(a, b)", ("h", "r")),
    "the output": ("y = Tanh(h)", ("h", "y")),
    "a GELU of five operators": (GELU + " y = MatMul(g, w2)", ("h", "g")),
    "nothing": ("y = MatMul(h, w2)", None),
    "another reader": ("r = Relu(h) s = Add(r, h) y = MatMul(s, w2)", ("h", "s")),
    "two ends": ("r = Relu(h) t = Tanh(h) a = MatMul(r, w2) b = MatMul(t, w2) y = Add(a, b)", None),
    "a number for each channel": ("s = PRelu(h, c) y = MatMul(s, w2)", None),
    "a softmax": ("s = Softmax(h) y = MatMul(s, w2)", None),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_is_behind_an_operator(name: str) -> None:
    body, expected = BEHIND[name]
    weights = {"w1": (12, 8), "w2": (8, 6), "c": np.full(8, 0.1, np.float32), **NUMBERS}
    read = {"w1", *re.findall(r"\w+", body)}
    used = {key: value for key, value in weights.items() if key in read}
    assert behind(net("h = Gemm(x, w1) " + body, used, x="float[N,12] x"), "h") == expected


@pytest.mark.parametrize("activation", ["r = Relu(h)", GELU.replace("g = ", "r = ")])
def test_training_goes_through_the_activation(activation: str) -> None:
    """Large outputs are cut off: a pair has to follow the others."""
    large = np.repeat(np.float32([1, 5]), [6, 18])
    weights = {
        "w1": normal(12, 24) * large,
        "b1": np.repeat(np.float32([0, -500]), [6, 18]),
        "w2": (24, 6),
        **(NUMBERS if "Erf" in activation else {}),
    }
    model = net(f"h = Gemm(x, w1, b1) {activation} y = Gemm(r, w2)", weights, x="float[N,12] x")
    found, step, ctx = run(model, {"x": spread(600, 12)}, only="h", rank=6, refit=False, epochs=2)
    (ours,), (theirs,) = (compute(m, held(ctx), "r") for m in (found, model))
    error_behind = np.square(ours - theirs).sum() / np.square(theirs - theirs.mean(0)).sum()
    assert error_behind < 1e-3 < 0.3 < error(model, found, held(ctx), "h")
    assert step.changes[0].detail["relative_error_alone"] == pytest.approx(error_behind, rel=0.02, abs=1e-6)


def test_a_pair_is_trained_on_what_the_pairs_before_it_leave() -> None:
    """Its decoder, with nothing trained, is the regression of the original's tensor on its code."""
    model = net("h = Gemm(x, w1) y = Gemm(h, w2)", {"w1": (12, 16), "w2": (16, 8)}, x="float[N,12] x")
    found, _, ctx = run(model, {"x": spread(400, 12)}, rank=3, epochs=0, refit=False)
    code = found.nodes[2].outputs[0].name
    (z,), (y,) = (compute(m, fitted(ctx), name) for m, name in ((found, code), (model, "y")))
    known = np.column_stack([z, np.ones(len(z))]).astype(np.float64)
    expected = known @ np.linalg.lstsq(known, y.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(compute(found, fitted(ctx))[0], expected, atol=2e-3)
