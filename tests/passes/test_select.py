"""`select` against the masked network, zeroed weights, numpy's least squares, and enumeration."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from channel_cases import sized, zeroed
from nets import (
    RUNTIME,
    alone,
    claimed,
    compute,
    context,
    fitted,
    held,
    least_squares,
    net,
    normal,
    one_step,
    weight,
)
from runs import timed

from onnxfuse import compress
from onnxfuse.analysis.cost import measure
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import find_groups
from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError, NotApplicableError, VerificationError
from onnxfuse.findings import Reached
from onnxfuse.fitting import compensating
from onnxfuse.fitting.trials import Trials
from onnxfuse.ir.model import Model
from onnxfuse.passes.refit import Refit
from onnxfuse.passes.select import Select
from onnxfuse.pipeline.base import Context, Contract, PassResult
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import parse_recipe
from onnxfuse.pipeline.records import StepReport
from onnxfuse.runtime import latency
from onnxfuse.runtime.latency import UNSTABLE, Stopwatch
from onnxfuse.verification.compare import output_error

RESIDUAL = """
    a = Conv<pads=[1,1,1,1]>(x, w0, b0)
    r = Relu(a)
    h = Conv<pads=[1,1,1,1]>(r, w1, b1)
    g = Relu(h)
    i = Conv<pads=[1,1,1,1]>(g, w2, b2)
    s = Add(i, r)
    t = Relu(s)
    p = GlobalAveragePool(t)
    f = Flatten(p)
    y = Gemm<transB=1>(f, w3, b3)
"""
RESIDUAL_WEIGHTS = sized("w0:16,3,3,3 b0:16 w1:16,16,3,3 b1:16 w2:16,16,3,3 b2:16 w3:5,16 b3:5")
MLP = """
    a = Gemm<transB=1>(x, w0, b0)
    r = Relu(a)
    h = Gemm<transB=1>(r, w1, b1)
    g = Relu(h)
    y = Gemm<transB=1>(g, w2, b2)
"""


def residual(count: int = 96) -> tuple[Model, Context]:
    model = net(RESIDUAL, RESIDUAL_WEIGHTS, "float[N,3,6,6] x")
    return model, context(model, {"x": normal(count, 3, 6, 6, seed=3)})


def mlp(count: int = 400, hidden: int = 16, **weights: np.ndarray) -> tuple[Model, Context]:
    shapes = sized(f"w0:{hidden},6 b0:{hidden} w1:8,{hidden} b1:8 w2:3,8 b2:3")
    model = net(MLP, {**shapes, **weights})
    return model, context(model, {"x": normal(count, 6, seed=3)})


select = partial(alone, Select)
step = partial(one_step, Select)


def cuts(result: PassResult | StepReport) -> dict[str, tuple[int, list[int]]]:
    """By group: the width left and what was removed."""
    found = [change.detail for change in result.changes if "group" in change.detail]
    return {str(d["group"]): (int(d["width"]), list(d["removed"])) for d in found}  # type: ignore[call-overload, arg-type]


def share_of_macs(model: Model, cut: Model, ctx: Context) -> float:
    sample = {name: value[:1] for name, value in fitted(ctx).items()}
    after, before = measure(cut, sample, RUNTIME).macs, measure(model, sample, RUNTIME).macs
    assert after is not None
    assert before
    return after / before


# Contracts ----------------------------------------------------------------------------------------


def test_without_compensation_the_result_is_the_network_with_zeroed_weights() -> None:
    model, ctx = residual()
    found, report = step(model, ctx, ratio=0.25, compensate=False)
    assert report.committed, report.reason
    assert report.contract is Contract.MASKED
    groups = find_groups(model, fitted(ctx), RUNTIME)
    choice = {
        groups[name]: np.setdiff1d(np.arange(groups[name].size), removed)
        for name, (_, removed) in cuts(report).items()
    }
    assert {len(kept) for kept in choice.values()} == {12}
    for batch in (1, 7):
        feed = {"x": normal(batch, 3, 6, 6, seed=batch)}
        (got,), (expected,) = compute(found, feed), compute(zeroed(model, choice), feed)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_manager_rolls_back_a_cut_that_is_not_the_masked_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ctx = residual()

    def spoiled(cut: Model, choice: Any, *, by: str = "") -> None:
        take(cut, choice, by=by)
        cut.set_weight(cut.tensor("b3"), weight(cut, "b3") + np.float32(0.01))

    monkeypatch.setattr("onnxfuse.passes.select.take", spoiled)
    for compensate in (True, False):
        found, report = step(model, ctx, ratio=0.25, compensate=compensate)
        assert not report.committed
        assert found is model
        assert "noise floor" in str(report.reason)


def test_every_refitted_operator_is_off_by_what_was_predicted() -> None:
    model, ctx = residual(400)
    found, report = step(model, ctx, ratio=0.25)
    assert report.committed, report.reason
    assert report.contract is Contract.APPROXIMATE
    assert report.verification is not None
    assert report.verification.comparison is not None  # the cut was held against the masked network too
    assert len(report.predictions) >= 3
    for claim in report.predictions:
        x = claimed(ctx, claim)
        (ours,), (theirs,) = compute(found, x, claim.tensor), compute(model, x, claim.reference)
        if claim.channels is not None:
            theirs = np.take(theirs, claim.channels, claim.channel_axis)
        assert claim.positions is None
        error = np.mean(np.sum((ours.astype(float) - theirs) ** 2, axis=claim.channel_axis))
        assert error == pytest.approx(claim.error, rel=1e-3)


def test_a_wrong_index_map_breaks_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ctx = residual(400)
    result = select(model, ctx, ratio=0.25)
    claim = next(p for p in result.predictions if p.channels is not None)
    wrong = [
        p if p is not claim else type(p)(**{**vars(p), "channels": tuple(reversed(claim.channels or ()))})
        for p in result.predictions
    ]
    monkeypatch.setattr(Select, "run", lambda *_: PassResult(**{**vars(result), "predictions": wrong}))
    outcome = PassManager([Select(ratio=0.25)]).run(model, ctx)
    assert not outcome.steps[0].committed
    assert claim.tensor in str(outcome.steps[0].reason)


# Which channels -----------------------------------------------------------------------------------


def test_one_channel_less_is_the_best_of_all_by_numpys_least_squares() -> None:
    model, ctx = mlp(hidden=8)
    result = select(model, ctx, ratio=0.125, only="a", step=1)
    ((width, removed),) = cuts(result).values()
    assert width == 7
    r, h = (value.astype(float) for value in compute(model, fitted(ctx), "r", "h"))
    errors = []
    for gone in range(8):
        rest = np.delete(r, gone, axis=1)
        w, b = least_squares(rest, h)
        errors.append(np.mean((rest @ w.T + b - h) ** 2))
    assert removed == [int(np.argmin(errors))]


def test_of_two_equal_channels_only_one_goes_and_nothing_is_lost() -> None:
    w0, b0 = normal(8, 6, seed=1), normal(8, seed=2)
    w0[5], b0[5] = w0[2], b0[2]
    model, ctx = mlp(hidden=8, w0=w0, b0=b0)
    result = select(model, ctx, ratio=0.125, only="a", step=1)
    ((_, removed),) = cuts(result).values()
    assert removed in ([2], [5])
    x = held(ctx)
    (got,), (expected,) = compute(result.model, x), compute(model, x)
    np.testing.assert_allclose(got, expected, atol=0.02 * expected.std())


def test_a_recurrent_network_makes_up_for_twins_by_both_of_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unit 3 of each layer is unit 1 once more: its part goes over to the other, in W and in R."""
    body = """h, h1, h2 = LSTM<hidden_size=4>(x, w1, r1) s = Squeeze(h, one)
        k, k1, k2 = LSTM<hidden_size=4>(s, w2, r2) t = Squeeze(k, one) y = MatMul(t, w3)"""
    weights = {**sized("w1:1,16,5 r1:1,16,4 w2:1,16,4 r2:1,16,4 w3:4,2"), "one": np.array([1])}
    model = net(body, weights, "float[T,N,5] x", "float[A,B,C] y")
    for name in ("w1", "r1", "w2", "r2"):
        value = 6 * weight(model, name)
        value[0, 3::4] = value[0, 1::4]
        model.set_weight(model.tensor(name), value)
    ctx = context(model, [{"x": normal(7, 12, 5, seed=seed)} for seed in range(12)])
    monkeypatch.setattr("onnxfuse.channels.moments_seen.RIDGES", (1e-6,))
    result = select(model, ctx, ratio=0.25, step=1)
    assert [removed for _, removed in cuts(result).values()] in ([[a], [b]] for a in (1, 3) for b in (1, 3))
    x = {"x": normal(7, 9, 5, seed=50)}
    (got,), (expected,) = compute(result.model, x), compute(model, x)
    np.testing.assert_allclose(got, expected, atol=0.03 * expected.std())


def test_a_group_is_ranked_by_all_who_read_it() -> None:
    body = """a = Gemm<transB=1>(x, w0, b0) r = Relu(a) p = Gemm<transB=1>(r, w1) q = Gemm<transB=1>(r, w2)
        y = Add(p, q)"""
    ones = np.ones((4, 8), np.float32)
    first, second = ones.copy(), ones.copy()
    first[:, [0, 1]] = 0  # matters to the second only
    second[:, [1, 2]] = 0  # 1 matters to nobody
    model = net(body, {**sized("w0:8,6 b0:8"), "w1": first, "w2": second})
    ctx = context(model, {"x": normal(400, 6, seed=3)})
    ((_, removed),) = cuts(select(model, ctx, ratio=0.125, step=1)).values()
    assert removed == [1]


def test_magnitude_ranks_by_the_weights() -> None:
    scale = np.array([1, 3, 0.1, 2, 1, 0.2, 5, 1], np.float32)
    model, ctx = mlp(
        hidden=8, w0=np.ones((8, 6), np.float32) * scale[:, None], w1=np.ones((8, 8), np.float32) * scale
    )
    ((_, removed),) = cuts(select(model, ctx, ratio=0.25, only="a", step=1, criterion="magnitude")).values()
    assert removed == [2, 5]


def test_channels_that_are_always_zero_go_first_and_exactly() -> None:
    w0, b0 = normal(16, 6, seed=1), normal(16, seed=2)
    w0[[3, 4, 7, 11, 12]], b0[[3, 4, 7, 11, 12]] = 0, -0.5
    model, ctx = mlp(w0=w0, b0=b0)
    found, report = step(model, ctx, ratio=0)
    assert report.contract is Contract.EXACT
    assert report.committed, report.reason
    # Five are zero for every input; twelve is a multiple of the step that eleven is not.
    assert len(cuts(report)["a"][1]) == 4
    assert set(cuts(report)["a"][1]) < {3, 4, 7, 11, 12}
    x = {"x": 100 * normal(50, 6, seed=9)}
    np.testing.assert_allclose(compute(found, x)[0], compute(model, x)[0], rtol=1e-4, atol=1e-3)
    _, report = step(model, ctx, ratio=0.5)
    assert set(cuts(report)["a"][1]) >= {3, 4, 7, 11, 12}
    assert any("5 of them zero for every input" in change.what for change in report.changes)


def test_what_the_samples_never_activate_is_called_just_that() -> None:
    w0, b0 = normal(16, 6, seed=1), normal(16, seed=2)
    b0[[2, 9]] = -100
    model, ctx = mlp(w0=w0, b0=b0)
    _, report = step(model, ctx, ratio=0)
    assert not report.changes  # they may be active on other samples
    _, report = step(model, ctx, ratio=0.25, compensate=False, only="a")
    assert set(cuts(report)["a"][1]) >= {2, 9}
    assert "2 never active on the samples" in report.changes[0].what


# Budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.4])
def test_a_budget_of_macs_is_met_and_not_undershot_by_much(budget: float) -> None:
    model, ctx = residual()
    found, report = step(model, ctx, macs=budget)
    assert report.committed, report.reason
    share = share_of_macs(model, found, ctx)
    assert budget - 0.06 < share <= budget
    assert f"{share:.3g} of the MACs are left, {budget:g} asked" in report.notes
    assert report.reached == Reached("macs", "MACs", False, budget, pytest.approx(share))


def test_a_budget_of_parameters_is_met() -> None:
    model, ctx = residual()
    _, report = step(model, ctx, params=0.5)
    assert report.committed, report.reason
    assert report.after.parameters <= 0.5 * report.before.parameters


def test_a_budget_that_the_narrowest_widths_miss_is_refused() -> None:
    model, ctx = residual()
    found, report = step(model, ctx, macs=0.001)
    assert not report.committed
    assert report.exit_code == VerificationError.exit_code
    assert found is model
    assert "can't be met: the narrowest widths leave" in str(report.reason)


def test_a_latency_that_cannot_be_met_is_refused() -> None:
    model, ctx = mlp()
    with pytest.raises(
        VerificationError, match=r"a latency of 0\.01 can't be met: the best that was measured"
    ):
        select(model, ctx, latency=0.01)


def test_a_latency_that_a_busy_machine_cannot_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unstable = replace(timed(0.5), unstable=f"{UNSTABLE} (for a reason)")
    monkeypatch.setattr(Stopwatch, "latency", lambda _: unstable)
    model, ctx = mlp()
    with pytest.raises(
        VerificationError, match=r"a latency of 0\.9 can't be decided: unstable: machine busy"
    ):
        select(model, ctx, latency=0.9)


@pytest.mark.slow
def test_a_latency_budget_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BLOCKS": 8, "MOST_ROUNDS": 9, "CONFIDENCE": 0.95}.items():
        monkeypatch.setattr(latency, name, value)
    shapes = sized("w0:256,512 b0:256 w1:1024,256 b1:1024 w2:3,1024 b2:3")
    model = net(MLP, shapes, "float[N,512] x")
    ctx = context(model, {"x": normal(256, 512, seed=3)})
    found, report = step(model, ctx, latency=0.7)
    assert report.committed, report.reason
    assert share_of_macs(model, found, ctx) < 0.9


def test_without_a_goal_the_error_bound_decides() -> None:
    model, ctx = residual(400)
    ctx.max_error = 0.3
    found, report = step(model, ctx)
    assert report.committed, report.reason
    assert report.verification is not None
    assert report.verification.output_error is not None
    assert report.verification.output_error.worst <= 0.3
    assert share_of_macs(model, found, ctx) < 0.96
    ctx.max_error = 1e-9
    _, report = step(model, ctx)
    assert not report.changes
    assert "not even 5% of the MACs go within 1e-09 (--max-error)" in report.notes


def test_what_hardly_matters_is_cut_before_what_does() -> None:
    w1 = normal(8, 16, seed=1)
    w1[:, 4:] *= 1e-3
    model, ctx = mlp(w1=w1, b1=np.full(8, 3, np.float32))  # all of h is active
    found = cuts(select(model, ctx, macs=0.6))
    assert set(found["a"][1]) <= set(range(4, 16))
    assert len(found["a"][1]) >= 8
    assert "h" not in found


# Refusals and edges -------------------------------------------------------------------------------


def test_frozen_groups_are_listed_with_the_reason() -> None:
    model, ctx = residual()
    result = select(model, ctx, ratio=0.25)
    reasons = {skip.nodes[0]: skip.reason for skip in result.skipped}
    assert "5 channels stay: it reaches the graph output 'y'" in reasons["y"]
    assert "graph input 'x'" in reasons["a input"]


def test_only_the_groups_that_are_named() -> None:
    model, ctx = residual()
    assert list(cuts(select(model, ctx, ratio=0.25, only="h"))) == ["h"]
    result = select(model, ctx, ratio=0.25, only="nothing")
    assert not result.changes
    assert result.notes == ["no channel group of this model with a name matching 'nothing' can be cut"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("select:ratio=0.2,macs=0.5", "give one of ratio, macs, params and latency, not ratio and macs"),
        ("select:ratio=1", "ratio"),
        ("select:macs=0", "macs"),
        ("select:criterion=size", "criterion"),
        ("select:step=0", "step"),
    ],
)
def test_bad_options(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_recipe(text)


def test_an_unknown_mask_is_refused() -> None:
    model, ctx = residual()
    with pytest.raises(InputError, match="the model has no input 'z'"):
        select(model, ctx, ratio=0.25, mask="z")


def test_macs_that_cannot_be_counted_are_refused() -> None:
    model = net(
        """a = Gemm<transB=1>(x, w0, b0) r = Relu(a) h = Gemm<transB=1>(r, w1)
        e = Loop(trips, go) <body = inside (int64 i, bool c) => (bool d, float[1] v) {
            d = Identity(c) v = Einsum<equation="ij,jk->ik">(m, m) }>
        y = Add(h, h)""",
        {**sized("w0:8,6 b0:8 w1:4,8"), "trips": np.array(2), "go": np.array(True), "m": normal(2, 2)},
    )
    ctx = context(model, {"x": normal(64, 6)})
    with pytest.raises(NotApplicableError, match="can't be counted; give ratio, params or latency"):
        select(model, ctx, macs=0.5)
    assert cuts(select(model, ctx, ratio=0.25))


def test_equal_seeds_give_equal_bytes() -> None:
    model, ctx = residual()
    first, second = (
        select(model, ctx, macs=0.7).model.to_proto().SerializeToString(deterministic=True) for _ in "ab"
    )
    assert first == second


def test_the_model_given_stays_as_it_is() -> None:
    model, ctx = residual()
    before = model.to_proto().SerializeToString(deterministic=True)
    step(model, ctx, macs=0.7)
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert not model.index_maps


# With other passes --------------------------------------------------------------------------------


def test_refit_and_a_second_select_know_the_channels_that_are_left() -> None:
    model, ctx = residual(400)
    passes = [Select(ratio=0.25, compensate=False), Refit(), Select(ratio=0.25, only="h"), Refit()]
    outcome = PassManager(passes).run(model, ctx)
    assert all(item.committed for item in outcome.steps), [item.reason for item in outcome.steps]
    assert weight(outcome.model, "w1").shape == (9, 12, 3, 3)
    claims = [claim for item in outcome.steps for claim in item.predictions if claim.tensor == "h"]
    assert {len(claim.channels or ()) for claim in claims} == {9, 12}
    last = claims[-1]
    x = claimed(ctx, last)
    (ours,), (theirs,) = compute(outcome.model, x, "h"), compute(model, x, "h")
    error = np.mean(np.sum((ours.astype(float) - theirs[:, list(last.channels or ())]) ** 2, axis=1))
    assert error == pytest.approx(last.error, rel=1e-3)


def test_select_and_fuse_work_on_each_others_results(tmp_path: Any) -> None:
    model, ctx = residual(400)
    x = {"x": np.concatenate([fitted(ctx)["x"], held(ctx)["x"]])}
    for passes in ("select:ratio=0.25,fuse:max_blocks=1", "fuse:max_blocks=1,select:ratio=0.25"):
        result = compress(
            model, passes, calib=x, provider="cpu", threads=1, output=tmp_path / f"{len(passes)}.onnx"
        )
        assert result.ok, result.reason
        assert all(s.changes for s in result.steps)


def test_compress_writes_and_reports(tmp_path: Any) -> None:
    model, ctx = residual(200)
    x = {"x": np.concatenate([fitted(ctx)["x"], held(ctx)["x"]])}
    result = compress(
        model,
        "select:macs=0.7",
        calib=x,
        provider="cpu",
        threads=1,
        output=tmp_path / "o.onnx",
        report=tmp_path / "r",
    )
    assert result.ok, result.reason
    record = json.loads((tmp_path / "r" / "report.json").read_text())
    assert record["steps"][0]["changes"][0]["detail"]["width"] < 16
    again = Model.load(tmp_path / "o.onnx")
    np.testing.assert_array_equal(compute(again, held(ctx))[0], compute(result.model, held(ctx))[0])
    assert RUNTIME.session(again) is not None


def wide(count: int) -> tuple[Model, Context]:
    """A hidden layer with more columns than there are samples."""
    model = net(
        "a = Gemm(x, w0, b0) r = Relu(a) y = Gemm(r, w1)", sized("w0:16,96 b0:96 w1:96,8"), "float[N,16] x"
    )
    return model, context(model, {"x": normal(count, 16, seed=3)})


def test_a_trial_loses_what_the_network_loses_on_samples_that_nobody_has_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """96 columns from 40 samples: asked on those that were fitted, the loss of half of them seems to be 0."""
    model, ctx = wide(50)
    found: list[tuple[Model, float]] = []
    real = Trials.changes

    def changes(self: Trials, jobs: Any, rewrite: Any, *args: Any) -> list[float]:
        losses = real(self, jobs, rewrite, *args)
        found.extend(zip(map(rewrite, jobs), losses, strict=True))
        return losses

    monkeypatch.setattr(Trials, "changes", changes)
    Select(macs=0.8).run(model.copy(), ctx)
    fresh = Calibration.open({"x": normal(2000, 16, seed=9)}, model).fit
    assert len(found) == 4
    for made, loss in found:
        assert 0.4 < loss / output_error(model, made, fresh, RUNTIME).worst ** 2 < 2.5


def test_a_trial_is_not_judged_on_what_it_was_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ctx = wide(50)
    fitted_to: list[int] = []

    def noted(*args: Any, **more: Any) -> None:
        fitted_to.extend({own.samples for own in args[4].values()})
        compensating.compensate(*args, **more)

    monkeypatch.setattr("onnxfuse.passes.select.compensate", noted)
    Select(macs=0.8).run(model.copy(), ctx)
    *trials, last = fitted_to
    judged = ctx.calibration.part(768).held_out.samples
    assert set(trials) == {ctx.calibration.fit.samples - judged}
    assert last == ctx.calibration.fit.samples
