"""Trials: the scale that they are judged by, and that side by side gives what one by one does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from nets import RUNTIME, context, net, normal, perturbed, weight

from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting.trials import Trials, output_change
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import output_error

BODY = "h = Gemm(x, w0, b) r = Relu(h) y = Gemm(r, w1, o) z = Gemm(r, w2)"
WEIGHTS = {"w0": (6, 16), "b": (16,), "w1": (16, 4), "o": 5 * normal(4), "w2": (16, 3)}


def two_outputs() -> tuple[Model, Context]:
    model = net(BODY, WEIGHTS, y="float[A,B] y, float[C,D] z")
    return model, context(model, {"x": normal(200, 6)}, batch_size=24)


def test_a_change_is_the_squared_error_that_max_error_bounds() -> None:
    model, ctx = two_outputs()
    trials = Trials.of(ctx, 120)
    for names in (("w1",), ("w2",), ("w0", "w1")):
        other = perturbed(model, *names)
        error = output_error(model, other, trials.calibration.held_out, RUNTIME)
        expected = sum(value**2 for value in error.outputs.values())
        assert trials.change(other, RUNTIME) == pytest.approx(expected, rel=1e-9)
    assert trials.change(model.copy(), RUNTIME) == 0


def test_divergence_of_classes() -> None:
    a, b = normal(8, 5), normal(8, 5, seed=1)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a.astype(float), b.astype(float)))
    expected = (p * np.log(p / q)).sum(1).mean()
    parts = [{"y": x[:3]} for x in (a, b)], [{"y": x[3:]} for x in (a, b)]
    before, after = zip(*parts, strict=True)
    assert output_change(before, after, [3, 5], "kl") == pytest.approx(expected)


def test_classes_that_a_mask_makes_impossible_do_not_diverge() -> None:
    a, b = normal(8, 5), normal(8, 5, seed=1)
    plain = output_change([{"y": a[:, :3]}], [{"y": b[:, :3]}], [8], "kl")
    for fill in (-np.inf, -1e9):
        masked = [np.where(np.arange(5) < 3, x, np.float32(fill)) for x in (a, b)]
        assert output_change([{"y": masked[0]}], [{"y": masked[1]}], [8], "kl") == pytest.approx(plain)


def test_a_mask_hides_no_change() -> None:
    a, b = normal(8, 5), normal(8, 5, seed=1)
    plain = output_change([{"y": a[:, :3]}], [{"y": b[:, :3]}], [8], "error")
    for fill in (-np.inf, -1e9):
        masked = [np.where(np.arange(5) < 3, x, np.float32(fill)) for x in (a, b)]
        assert output_change([{"y": masked[0]}], [{"y": masked[1]}], [8], "error") == pytest.approx(plain)


def test_what_is_not_finite_or_of_another_shape_is_infinitely_far() -> None:
    good, bad = {"y": normal(4, 3)}, {"y": normal(4, 3)}
    bad["y"][0, 0] = np.nan
    for measure in ("error", "kl"):
        assert output_change([good], [bad], [4], measure) == math.inf  # type: ignore[arg-type]
        assert output_change([good], [{"y": normal(4, 2)}], [4], measure) == math.inf  # type: ignore[arg-type]


def test_side_by_side_as_one_by_one() -> None:
    model, ctx = two_outputs()
    ctx.runtime = Runtime("cpu", threads=3)
    trials = Trials.of(ctx, 120)
    amounts = [0.1 * n for n in range(1, 9)]
    changes = trials.changes(amounts, lambda amount: perturbed(model, "w0", amount=amount), ctx)
    one = ctx.runtime.single()
    assert changes == [trials.change(perturbed(model, "w0", amount=amount), one) for amount in amounts]


def test_what_fits_gets_a_context_of_its_own_and_failures_are_infinitely_far() -> None:
    model, ctx = two_outputs()
    trials = Trials.of(ctx, 120)
    seen: list[Context] = []

    def fit(job: int, made: Model, own: Context) -> Model:
        seen.append(own)
        if job == 1:
            raise NotApplicableError("no")
        made.set_weight(made.tensor("w1"), weight(made, "w1") * np.float32(1 + job))
        return made

    changes = trials.changes([0, 1, 2], lambda job: model.copy(), ctx, fit=fit)
    assert changes[0] == 0
    assert changes[1] == math.inf
    assert 0 < changes[2] < math.inf
    assert all(own.calibration is trials.calibration for own in seen)
    assert len({id(own.original) for own in seen} | {id(ctx.original)}) == 4
