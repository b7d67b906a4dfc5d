"""refit as a pass: what it changes, claims, reports and leaves."""

from __future__ import annotations

import numpy as np
import pytest
from nets import compute, context, held, net, normal, perturbed, weight

from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.passes.refit import Refit
from onnxfuse.pipeline.base import Context, Contract
from onnxfuse.pipeline.manager import PassManager

BODY = "h1 = Gemm(x, w1) r1 = Relu(h1) h2 = Gemm(r1, w2) r2 = Relu(h2) y = Gemm(r2, w3)"
WEIGHTS = {"w1": (6, 16), "w2": (16, 10), "w3": (10, 4)}


@pytest.fixture(scope="module")
def original() -> tuple[Model, Context]:
    model = net(BODY, WEIGHTS)
    return model, context(model, {"x": normal(300, 6)}, batch_size=50)


def output_error(model: Model, other: Model, ctx: Context) -> float:
    a, b = compute(model, held(ctx))[0], compute(other, held(ctx))[0]
    return float(((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum())


def test_a_rewritten_network_comes_back_towards_the_original() -> None:
    model = net(f"{BODY} z = Gemm(x, w1)", WEIGHTS, y="float[A,B] y, float[C,D] z")
    ctx = context(model, {"x": normal(300, 6)}, batch_size=50)
    broken = model.copy()
    halved = weight(model, "w1").copy()
    halved[:, ::2] = 0  # half of the hidden units are gone, and w1 stays so: it has two users
    broken.set_weight(broken.tensor("w1"), halved)
    before = output_error(model, broken, ctx)
    outcome = PassManager([Refit()]).run(broken, ctx)
    (step,) = outcome.steps
    assert step.committed, step.reason
    assert step.contract is Contract.APPROXIMATE
    assert output_error(model, outcome.model, ctx) < 0.7 * before
    assert [change.nodes for change in step.changes] == [("h2",), ("y",)]
    assert len(step.predictions) == 2
    assert [skip.nodes for skip in step.skipped] == [("h1",), ("z",)]
    for change in step.changes:
        after, start = change.detail["relative_error"], change.detail["relative_error_before"]
        assert isinstance(after, float)
        assert isinstance(start, float)
        assert after < start
        assert f"{after:.3g}" in change.what
    off = compute(outcome.model, held(ctx), "h2")[0] - compute(model, held(ctx), "h2")[0]
    variance = compute(model, held(ctx), "h2")[0].var(0).sum()
    assert step.changes[0].detail["relative_error"] == pytest.approx(
        (off**2).sum(1).mean() / variance, rel=1e-3
    )


def test_an_exact_refit_undoes_a_change_of_weights(original: tuple[Model, Context]) -> None:
    model, ctx = original
    outcome = PassManager([Refit()]).run(perturbed(model, "w1"), ctx)
    assert outcome.steps[0].committed
    assert output_error(model, outcome.model, ctx) < 1e-4  # x still says all that h1 was


def test_the_original_itself_is_left_alone(original: tuple[Model, Context]) -> None:
    model, ctx = original
    outcome = PassManager([Refit()]).run(model, ctx)
    (step,) = outcome.steps
    assert step.committed
    assert not step.changes
    assert not step.skipped
    assert step.notes == ("the model computes what the original does: nothing to refit",)
    assert outcome.model is model


def test_float_noise_is_not_refitted(original: tuple[Model, Context]) -> None:
    """Another pass's exact rewrite leaves rounding behind; nothing is to be gained there."""
    model, ctx = original
    same = model.copy()
    same.set_weight(same.tensor("w1"), np.nextafter(weight(model, "w1"), np.float32(1)))
    outcome = PassManager([Refit()]).run(same, ctx)
    (step,) = outcome.steps
    assert step.committed
    assert not step.changes
    for name in WEIGHTS:
        np.testing.assert_array_equal(weight(outcome.model, name), weight(same, name))


def test_a_mask_that_is_no_input_is_an_input_error(original: tuple[Model, Context]) -> None:
    model, ctx = original
    with pytest.raises(InputError, match="no input 'padding'"):
        Refit(mask="padding").run(perturbed(model, "w1"), ctx)


def test_a_mask_leaves_padding_out() -> None:
    model = net(
        "h1 = MatMul(x, w1) r1 = Relu(h1) y = MatMul(r1, w2)",
        {"w1": (6, 16), "w2": (16, 4)},
        x="float[N,T,6] x, int64[N,T] mask",
        y="float[A,B,C] y",
    )
    x, mask = normal(60, 5, 6), np.random.default_rng(0).integers(0, 2, (60, 5))
    x[mask == 0] *= 20
    ctx = context(model, {"x": x, "mask": mask})
    step = PassManager([Refit(mask="mask")]).run(perturbed(model, "w1"), ctx).steps[0]
    assert step.committed, step.reason
    assert step.predictions
    assert {claim.mask for claim in step.predictions} == {"mask"}
