"""Trials: the scale that they are judged by, and that side by side gives what one by one does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from nets import RUNTIME, Feed, context, net, normal, perturbed, weight
from onnx import ModelProto

from onnxfuse.errors import NotApplicableError
from onnxfuse.fitting.trials import Distance, Measure, Trials
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import output_error

BODY = "h = Gemm(x, w0, b) r = Relu(h) y = Gemm(r, w1, o) z = Gemm(r, w2)"
WEIGHTS = {"w0": (6, 16), "b": (16,), "w1": (16, 4), "o": 5 * normal(4), "w2": (16, 3)}


def distance(before: list[Feed], after: list[Feed], samples: list[int], measure: Measure) -> float:
    found = Distance(measure)
    for a, b, count in zip(before, after, samples, strict=True):
        found.add(a, b, count)
    return found.value


def change(trials: Trials, model: Model, base: Model, ctx: Context) -> float:
    return trials.changes([model], lambda own: own, ctx, base)[0]


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
        assert change(trials, other, model, ctx) == pytest.approx(expected, rel=1e-9)
    assert change(trials, model.copy(), model, ctx) == 0


def test_divergence_of_classes() -> None:
    a, b = normal(8, 5), normal(8, 5, seed=1)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a.astype(float), b.astype(float)))
    expected = (p * np.log(p / q)).sum(1).mean()
    parts = [{"y": x[:3]} for x in (a, b)], [{"y": x[3:]} for x in (a, b)]
    before, after = zip(*parts, strict=True)
    assert distance([*before], [*after], [3, 5], "kl") == pytest.approx(expected)


def test_classes_that_a_mask_makes_impossible_do_not_diverge() -> None:
    a, b = normal(8, 5), normal(8, 5, seed=1)
    plain = distance([{"y": a[:, :3]}], [{"y": b[:, :3]}], [8], "kl")
    for fill in (-np.inf, -1e9):
        masked = [np.where(np.arange(5) < 3, x, np.float32(fill)) for x in (a, b)]
        assert distance([{"y": masked[0]}], [{"y": masked[1]}], [8], "kl") == pytest.approx(plain)


def test_a_mask_hides_no_change() -> None:
    a, b = normal(8, 5), normal(8, 5, seed=1)
    plain = distance([{"y": a[:, :3]}], [{"y": b[:, :3]}], [8], "error")
    for fill in (-np.inf, -1e9):
        masked = [np.where(np.arange(5) < 3, x, np.float32(fill)) for x in (a, b)]
        assert distance([{"y": masked[0]}], [{"y": masked[1]}], [8], "error") == pytest.approx(plain)


def test_what_is_not_finite_or_of_another_shape_is_infinitely_far() -> None:
    good, bad = {"y": normal(4, 3)}, {"y": normal(4, 3)}
    bad["y"][0, 0] = np.nan
    measures: tuple[Measure, ...] = ("error", "kl")
    for measure in measures:
        assert distance([good], [bad], [4], measure) == math.inf
        assert distance([good], [{"y": normal(4, 2)}], [4], measure) == math.inf


def test_side_by_side_as_one_by_one() -> None:
    model, ctx = two_outputs()
    ctx.runtime = Runtime("cpu", threads=3)
    trials = Trials.of(ctx, 120)
    amounts = [0.1 * n for n in range(1, 9)]
    changes = trials.changes(amounts, lambda amount: perturbed(model, "w0", amount=amount), ctx, model)
    assert changes == [
        change(trials, perturbed(model, "w0", amount=amount), model, ctx) for amount in amounts
    ]


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

    changes = trials.changes([0, 1, 2], lambda job: model.copy(), ctx, model, fit=fit)
    assert changes[0] == 0
    assert changes[1] == math.inf
    assert 0 < changes[2] < math.inf
    assert all(own.calibration is trials.calibration for own in seen)
    assert len({id(own.original) for own in seen} | {id(ctx.original)}) == 4


def test_only_what_lies_behind_the_rewrite_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers before a rewrite are in no session of a trial; those it needs are read from one run."""
    model, ctx = two_outputs()
    protos: list[ModelProto] = []
    real = Model.extract

    def extract(self: Model, inputs: list[str], outputs: list[str]) -> ModelProto:
        protos.append(real(self, inputs, outputs))
        return protos[-1]

    monkeypatch.setattr(Model, "extract", extract)
    trials = Trials.of(ctx, 120)
    jobs = [("w2",), ("w1",), ("w0",)]
    changes = trials.changes(jobs, lambda names: perturbed(model, *names), ctx, model)
    for names, change in zip(jobs, changes, strict=True):
        error = output_error(model, perturbed(model, *names), trials.calibration.held_out, RUNTIME)
        assert change == pytest.approx(sum(value**2 for value in error.outputs.values()), rel=1e-5)
    parts = sorted((len(p.graph.node), [i.name for i in p.graph.input]) for p in protos)
    assert parts == [(1, ["r"]), (1, ["r"]), (4, ["x"])]


def test_a_rewrite_behind_a_skip_reads_both_sides() -> None:
    body = "h = Gemm(x, w0) r = Relu(h) g = Gemm(r, w1) s = Add(g, r) y = Gemm(s, w2)"
    model = net(body, {"w0": (6, 8), "w1": (8, 8), "w2": (8, 3)})
    ctx = context(model, {"x": normal(200, 6)})
    trials = Trials.of(ctx, 120)
    other = perturbed(model, "w1")
    error = output_error(model, other, trials.calibration.held_out, RUNTIME)
    assert change(trials, other, model, ctx) == pytest.approx(error.outputs["y"] ** 2, rel=1e-5)


def test_the_original_is_what_a_second_pass_is_held_against() -> None:
    """Behind a rewrite that an earlier pass made, not only the new one counts."""
    model, ctx = two_outputs()
    first = perturbed(model, "w0")
    trials = Trials.of(ctx, 120)
    error = output_error(model, first, trials.calibration.held_out, RUNTIME)
    expected = sum(value**2 for value in error.outputs.values())
    assert change(trials, first.copy(), first, ctx) == pytest.approx(expected, rel=1e-5)


def test_no_more_samples_than_the_figure_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ctx = two_outputs()
    ctx = context(model, {"x": normal(3000, 6)})
    taken: list[int] = []
    real = Distance.add

    def add(self: Distance, before: Feed, after: Feed, samples: int) -> None:
        taken.append(samples)
        real(self, before, after, samples)

    monkeypatch.setattr(Distance, "add", add)
    trials = Trials.of(ctx, 2400)
    whole = (
        output_error(model, perturbed(model, "w1"), trials.calibration.held_out, RUNTIME).outputs["y"] ** 2
    )
    assert change(trials, perturbed(model, "w1"), model, ctx) == pytest.approx(whole, rel=0.3)
    assert 4 * 16 <= sum(taken) < trials.calibration.held_out.samples / 2
    taken.clear()
    assert change(trials, perturbed(model, "w0", "w1", amount=30.0), model, ctx) > 4
    assert taken == [16]  # hopeless


def test_the_first_batches_are_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples may be sorted by class: four of sixteen batches come from each quarter of them."""
    model, ctx = two_outputs()
    ctx = context(model, {"x": np.sort(normal(3000, 6), axis=0)})
    seen: list[float] = []
    real = Distance.add

    def add(self: Distance, before: Feed, after: Feed, samples: int) -> None:
        seen.append(float(before["z"].mean()))
        real(self, before, after, samples)

    monkeypatch.setattr(Distance, "add", add)
    monkeypatch.setattr("onnxfuse.fitting.trials.ENOUGH", 0.0)
    trials = Trials.of(ctx, 768)
    change(trials, perturbed(model, "w1"), model, ctx)
    ordered = np.argsort(np.argsort(seen))
    assert sorted(ordered[:4] // 4) == [0, 1, 2, 3]
