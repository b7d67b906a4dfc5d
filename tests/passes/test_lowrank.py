"""`lowrank` against numpy's SVD and the principal components of what ONNX Runtime computes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import (
    DENSE,
    DENSE_WEIGHTS,
    RUNTIME,
    alone,
    claimed,
    compute,
    context,
    dense,
    fitted,
    held,
    net,
    normal,
    one_step,
    rows,
    weight,
)

from onnxfuse.analysis.cost import measure
from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError, VerificationError
from onnxfuse.findings import Reached
from onnxfuse.ir.editing import PASS_KEY, REPLACES_KEY
from onnxfuse.ir.marks import ZEROS, promises
from onnxfuse.ir.model import Model
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.passes.lowrank import Lowrank
from onnxfuse.passes.prune import Prune
from onnxfuse.pipeline.base import Context, Contract, PassResult
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import parse_recipe
from onnxfuse.pipeline.records import StepReport

MODELS = Path(__file__).parents[2] / "models"


step = partial(one_step, Lowrank)
run = partial(alone, Lowrank)


def operators(model: Model) -> list[str]:
    return [node.op for node in model.nodes]


def ranks(result: PassResult | StepReport) -> dict[str, int]:
    found = [change.detail for change in result.changes if "rank" in change.detail]
    return {str(detail["operator"]): int(detail["rank"]) for detail in found}  # type: ignore[call-overload]


def op_of(model: Model, name: str) -> LinearOp:
    node = next(n for n in model.nodes if n.name == name or n.outputs[0].name == name)
    op = linear_op(model, node, model.shapes())
    assert isinstance(op, LinearOp)
    return op


def parameters(model: Model, ctx: Context) -> int:
    return measure(model, fitted(ctx), RUNTIME).parameters


def of_rank(rank: int, *shape: int, seed: int) -> np.ndarray:
    out = shape[0]
    product = normal(out, rank, seed=seed) @ normal(rank, int(np.prod(shape[1:])), seed=seed + 1)
    return (product / np.sqrt(rank * np.prod(shape[1:]))).reshape(shape).astype(np.float32)


# One becomes two ----------------------------------------------------------------------------------

EXACT: dict[str, tuple[str, dict[str, Any], str, str, tuple[int, ...], list[str]]] = {
    "gemm": (
        "h = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b) y = Relu(h)",
        {"w": of_rank(2, 9, 6, seed=1), "b": (9,)},
        "float[N,6] x",
        "float[A,B] y",
        (6,),
        ["Gemm", "Gemm", "Relu"],
    ),
    "gemm as it is stored by default": (
        "h = Gemm(x, w) y = Relu(h)",
        {"w": of_rank(2, 6, 9, seed=1)},
        "float[N,6] x",
        "float[A,B] y",
        (6,),
        ["Gemm", "Gemm", "Relu"],
    ),
    "matmul": (
        "h = MatMul(x, w) y = Relu(h)",
        {"w": of_rank(2, 6, 9, seed=1)},
        "float[N,6] x",
        "float[A,B] y",
        (6,),
        ["MatMul", "MatMul", "Relu"],
    ),
    "tokens and a bias": (
        "h = MatMul(x, w) k = Add(b, h) y = Relu(k)",
        {"w": of_rank(2, 6, 9, seed=1), "b": normal(1, 1, 9)},
        "float[N,T,6] x",
        "float[A,B,C] y",
        (5, 6),
        ["MatMul", "MatMul", "Add", "Relu"],
    ),
    "conv": (
        "h = Conv<pads=[2,1,0,1], strides=[2,1], dilations=[1,2]>(x, w, b) y = Relu(h)",
        {"w": of_rank(2, 8, 3, 3, 3, seed=1), "b": (8,)},
        "float[N,3,H,W] x",
        "float[A,B,C,D] y",
        (3, 9, 8),
        ["Conv", "Conv", "Relu"],
    ),
    "conv padded by itself": (
        'h = Conv<auto_pad="SAME_UPPER", strides=[2]>(x, w) y = Relu(h)',
        {"w": of_rank(2, 8, 3, 4, seed=1)},
        "float[N,3,11] x",
        "float[A,B,C] y",
        (3, 11),
        ["Conv", "Conv", "Relu"],
    ),
}


@pytest.mark.parametrize("method", ["svd", "randomised", "data"])
@pytest.mark.parametrize("name", EXACT)
def test_a_weight_of_low_rank_is_split_exactly(name: str, method: str) -> None:
    body, weights, x, y, shape, expected = EXACT[name]
    model = net(body, weights, x, y)
    ctx = context(model, {"x": normal(64, *shape, seed=5) + 1})
    result = run(model, ctx, rank=2, method=method, refit=False)
    found = result.model
    without_new_bias = [op for op in operators(found) if op != "Add" or "Add" in expected]
    assert without_new_bias == expected
    assert found.tensor("h").name == "h"
    for batch in (1, 3):
        feed = {"x": normal(batch, *shape, seed=batch)}
        (a,), (b,) = compute(model, feed), compute(found, feed)
        np.testing.assert_allclose(b, a, atol=2e-6 * max(1, np.abs(a).max()), rtol=1e-4)
    down, up = (n for n in found.nodes if n.op in ("Conv", "Gemm", "MatMul"))
    assert [n.metadata[PASS_KEY] for n in (down, up)] == ["lowrank"] * 2
    assert json.loads(up.metadata[REPLACES_KEY]) == ["h"]
    stored = {t.name for t in found.initializers}
    assert {"h_down.weight", "h_up.weight"} <= stored
    assert "w" not in stored
    assert "b" in stored or "b" not in weights
    verification = PassManager([Lowrank(rank=2, method=method)]).run(model, ctx).steps[0]
    assert verification.committed, verification.reason


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_floating_types_keep_their_type(dtype: str) -> None:
    kind = np.dtype("float64" if dtype == "double" else dtype)
    model = net(
        "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)",
        {"w1": normal(6, 24).astype(kind), "w2": normal(24, 12).astype(kind)},
        f"{dtype}[N,6] x",
        f"{dtype}[A,B] y",
    )
    found, report = step(model, context(model, {"x": normal(200, 6).astype(kind)}), rank=3)
    assert report.committed, report.reason
    assert {t.dtype for t in found.initializers} == {kind}


# Numbers ------------------------------------------------------------------------------------------


def test_svd_is_numpys() -> None:
    rank = 5
    model, ctx = dense()
    found = run(model, ctx, rank=rank, method="svd", only="h", refit=False).model
    u, s, v = np.linalg.svd(weight(model, "w1").astype(np.float64), full_matrices=False)
    product = op_of(found, "h_up").weight @ op_of(found, "h_down").weight
    np.testing.assert_allclose(product, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-6)
    np.testing.assert_array_equal(weight(found, "b1"), weight(model, "b1"))


@pytest.mark.parametrize("kind", ["gemm", "conv"])
def test_data_keeps_the_principal_components_of_the_outputs(kind: str) -> None:
    rank = 4
    if kind == "gemm":
        model, ctx = dense()
        name, stored = "h", "w1"
    else:
        model = net(
            "a = Conv<pads=[1,1,1,1]>(x, w0) r = Relu(a) v = Conv<pads=[1,0,1,0],strides=[2,1]>(r, w1, b1) "
            "y = Relu(v)",
            {"w0": (6, 2, 3, 3), "w1": (10, 6, 3, 3), "b1": (10,)},
            "float[N,2,6,6] x",
            "float[A,B,C,D] y",
        )
        ctx = context(model, {"x": normal(60, 2, 6, 6)})
        name, stored = "v", "w1"
    result = run(model, ctx, rank=rank, only=name, refit=False)
    seen = rows(compute(model, fitted(ctx), name)[0])
    mean = seen.mean(0)
    vectors = np.linalg.eigh(np.cov(seen.T))[1][:, -rank:]
    matrix = weight(model, stored).reshape(seen.shape[1], -1).astype(np.float64)
    found = result.model
    product = op_of(found, f"{name}_up").weight @ op_of(found, f"{name}_down").weight
    np.testing.assert_allclose(product, vectors @ (vectors.T @ matrix), atol=5e-3)  # but for the ridge
    again = rows(compute(found, fitted(ctx), name)[0])
    np.testing.assert_allclose(again, (seen - mean) @ vectors @ vectors.T + mean, atol=2e-2)
    np.testing.assert_allclose(again.mean(0), mean, atol=1e-5)
    (claim,) = result.predictions
    again, seen = (rows(compute(own, claimed(ctx, claim), name)[0]) for own in (found, model))
    assert claim.error == pytest.approx(((again - seen) ** 2).sum(1).mean(), rel=1e-4)
    plain = run(model, ctx, rank=rank, only=name, refit=False, method="svd").predictions[0]
    assert claim.error < plain.error


def test_a_mask_leaves_padding_out() -> None:
    model = net(
        "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)",
        {"w1": (6, 16), "w2": (16, 4)},
        x="float[N,T,6] x, int64[N,T] mask",
        y="float[A,B,C] y",
    )
    x, mask = normal(60, 5, 6), np.random.default_rng(0).integers(0, 2, (60, 5))
    x[mask == 0] *= 20
    ctx = context(model, {"x": x, "mask": mask})
    found, report = step(model, ctx, rank=2, only="h", mask="mask", refit=False)
    assert report.committed, report.reason
    assert [claim.mask for claim in report.predictions] == ["mask"]
    (seen,) = compute(model, fitted(ctx), "h")
    vectors = np.linalg.eigh(np.cov(seen[fitted(ctx)["mask"] == 1].T))[1][:, -2:]
    product = op_of(found, "h_up").weight @ op_of(found, "h_down").weight
    np.testing.assert_allclose(product, vectors @ (vectors.T @ weight(model, "w1").T), atol=5e-3)


def test_refit_makes_up_for_it() -> None:
    model, ctx = dense()
    errors = {}
    for refit in (False, True):
        found, report = step(model, ctx, rank=3, only="h", refit=refit)
        assert report.committed, report.reason
        assert report.verification is not None
        assert report.verification.output_error is not None
        errors[refit] = report.verification.output_error.worst
        moved = not np.array_equal(weight(found, "w2"), weight(model, "w2"))
        assert moved == refit
        np.testing.assert_array_equal(weight(found, "w0"), weight(model, "w0"))  # before the change
    assert errors[True] < errors[False]


def test_biases_that_a_refit_adds_leave_no_budget_unmet() -> None:
    """Operators without a bias get one, which a budget has to leave room for whatever the ranks leave."""
    body = (
        "h = Gemm(x, w0) r = Relu(h) g = Gemm(r, w1) s = Relu(g) f = Gemm(s, w2) t = Relu(f) y = Gemm(t, w3)"
    )
    model = net(body, {"w0": (6, 24), "w1": (24, 40), "w2": (40, 24), "w3": (24, 3)})
    ctx = context(model, {"x": normal(200, 6, seed=3)})
    full = parameters(model, ctx)
    for share in (0.9, 0.8, 0.75, 0.7, 0.6, 0.5):
        result = run(model, ctx, params=share)
        left = parameters(result.model, ctx) / full
        assert share - 0.07 < left <= share
        assert result.reached == Reached("params", "parameters", False, share, left)


# How far ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "randomised", "data"])
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_budget_of_parameters_is_met(share: float, method: str) -> None:
    model, ctx = dense()
    found, report = step(model, ctx, params=share, method=method)
    assert report.committed, report.reason
    left = parameters(found, ctx) / parameters(model, ctx)
    assert share - 0.06 < left <= share
    assert f"{left:.3g} of the parameters" in report.notes[0]


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_a_budget_of_macs_is_met(share: float) -> None:
    model = net(
        "a = Conv<pads=[1,1,1,1]>(x, w0) r = Relu(a) h = Conv<pads=[1,1,1,1],strides=[2,2]>(r, w1) "
        "q = Relu(h) y = Conv(q, w2)",
        {"w0": (12, 3, 3, 3), "w1": (16, 12, 3, 3), "w2": (8, 16, 1, 1)},
        "float[N,3,8,8] x",
        "float[A,B,C,D] y",
    )
    ctx = context(model, {"x": normal(40, 3, 8, 8)})
    _, report = step(model, ctx, macs=share)
    assert report.committed, report.reason
    assert report.before.macs is not None
    assert report.after.macs is not None
    assert share - 0.1 < report.after.macs / report.before.macs <= share


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_an_impossible_budget_is_refused(budget: str) -> None:
    model, ctx = dense()
    with pytest.raises(
        VerificationError, match=r"0\.05 of the .* can't be met: rank 1 throughout leaves 0\."
    ):
        run(model, ctx, **{budget: 0.05})
    found, report = step(model, ctx, **{budget: 0.05})
    assert report.exit_code == 1
    assert not report.committed
    assert found is model


def test_ranks_go_where_they_cost_least() -> None:
    """One layer is of rank 3 in truth: it is cut to that before another loses anything."""
    weights = {**DENSE_WEIGHTS, "w1": of_rank(3, 20, 24, seed=7)}
    model = net(DENSE, weights)
    ctx = context(model, {"x": normal(300, 6)})
    total = parameters(model, ctx)
    saved = 20 * 24 - 3 * (20 + 24)
    for method in ("svd", "data"):
        result = run(model, ctx, params=1 - saved / total + 1e-3, method=method, refit=False)
        assert ranks(result) == {"h": 3}


def test_without_a_goal_it_goes_as_far_as_the_bound_allows() -> None:
    model, ctx = dense()
    lefts = [parameters(model, ctx)]
    for bound in (0.25, 0.6):
        ctx.max_error = bound
        found, report = step(model, ctx)
        assert report.committed, report.reason
        assert report.verification is not None
        assert report.verification.output_error is not None
        assert report.verification.output_error.worst <= bound
        assert f"held-out output error within {bound:g} (--max-error); with " in report.notes[0]
        lefts.append(parameters(found, ctx))
    assert lefts[2] < lefts[1] < lefts[0]
    ctx.max_error = 1e-4
    found, report = step(model, ctx)
    assert report.committed
    assert found is model
    assert "is within 0.0001 (--max-error)" in report.notes[0]


def test_a_bound_that_is_broken_rolls_it_back() -> None:
    model, ctx = dense()
    ctx.max_error = 1e-4
    found, report = step(model, ctx, rank=1)
    assert not report.committed
    assert report.exit_code == 1
    assert found is model


def test_a_rank_may_be_a_share_of_the_full_one() -> None:
    model, ctx = dense()
    result = run(model, ctx, rank=0.25, refit=False)
    assert ranks(result) == {"a": 2, "h": 5, "y": 1}  # of 6, 20 and 3
    result = run(model, ctx, rank=4, refit=False)
    assert ranks(result) == {"a": 4, "h": 4}
    assert {skip.nodes: skip.reason for skip in result.skipped} == {
        ("y",): "rank 4 would not make it smaller: at most 2 does"
    }


def test_options() -> None:
    (whole, share) = parse_recipe("lowrank:rank=4,lowrank:rank=0.5,method=svd")
    assert whole.options.model_dump()["rank"] == 4
    assert share.options.model_dump()["rank"] == 0.5
    with pytest.raises(InputError, match="one of params, macs and rank"):
        parse_recipe("lowrank:rank=4,params=0.5")
    with pytest.raises(InputError, match="no input 'm'"):
        run(*dense(), rank=2, mask="m")


# Again --------------------------------------------------------------------------------------------


def test_a_second_run_takes_ranks_from_the_pair() -> None:
    model, ctx = dense()
    once = run(model, ctx, rank=8, method="svd", refit=False, only="h").model
    twice = run(once, ctx, rank=3, method="svd", refit=False, only="h")
    assert operators(twice.model) == operators(once)
    assert ranks(twice) == {"h": 3}
    assert twice.changes[0].detail["rank_before"] == 8
    direct = run(model, ctx, rank=3, method="svd", refit=False, only="h").model
    for name in ("h_down.weight", "h_up.weight"):
        assert weight(twice.model, name).shape == weight(direct, name).shape
    feed = held(ctx)
    np.testing.assert_allclose(compute(twice.model, feed)[0], compute(direct, feed)[0], atol=1e-5)
    assert not run(twice.model, ctx, rank=3, only="h").changes


def test_factors_that_were_pruned_lose_their_zeros_and_their_mark() -> None:
    model, ctx = dense()
    outcome = PassManager([Lowrank(rank=8, only="h"), Prune(amount=0.5), Lowrank(rank=4, only="h")]).run(
        model, ctx
    )
    assert all(report.committed for report in outcome.steps)
    marked = {node.name or node.outputs[0].name: promises(node) for node in outcome.model.nodes}
    assert marked["a"] == {ZEROS}
    assert not marked["h_up"]
    assert (weight(outcome.model, "h_up.weight") != 0).all()
    reasons = {skip.nodes[0]: skip.reason for skip in outcome.steps[1].skipped}
    assert reasons == {"h_down": "its output 'h_down' is not a tensor of the original"}


def test_a_budget_is_a_share_of_what_there_was_unfactored(tmp_path: Path) -> None:
    """So schedules come to the same end, through files too, and asking again does nothing."""
    model, ctx = dense()
    goal = Lowrank(params=0.5)
    now, total = model, parameters(model, ctx)
    for share in (0.4, 0.8, 1.0):
        part = goal.partly(share)
        assert part is not None
        outcome = PassManager([part]).run(now, ctx)
        assert outcome.steps[0].committed, outcome.steps[0].reason
        assert 1 - share * 0.5 - 0.06 < parameters(outcome.model, ctx) / total <= 1 - share * 0.5
        outcome.model.save(tmp_path / f"{share}.onnx")
        now = Model.load(tmp_path / f"{share}.onnx")
    assert len([n for n in now.nodes if n.op == "Gemm"]) <= 6
    outcome = PassManager([goal]).run(now, ctx)
    assert not outcome.steps[0].changes
    assert "of the parameters are left already" in outcome.steps[0].notes[0]


def test_partly() -> None:
    assert Lowrank(params=0.5).partly(0.5).options.params == 0.75  # type: ignore[union-attr]
    assert Lowrank(macs=0.4).partly(0.5).options.macs == 0.7  # type: ignore[union-attr]
    assert Lowrank(rank=0.2).partly(0.25).options.rank == 0.8  # type: ignore[union-attr]
    assert Lowrank(rank=4).partly(0.5) is None
    assert Lowrank().partly(0.5) is None


# Refusals -----------------------------------------------------------------------------------------


def refusals(model: Model, ctx: Context, **options: Any) -> dict[str, str]:
    result = run(model, ctx, **{"rank": 2, **options})
    return {skip.nodes[0]: skip.reason for skip in result.skipped}


def test_what_is_refused() -> None:
    model = net(
        """a = Conv<group=2>(x, w0) r = Relu(a) g = GlobalAveragePool(r) f = Flatten(g) h = MatMul(f, w1)
        q = Relu(h) k = MatMul(q, w1) t = Relu(k) e = MatMul(t, w2) u = Transpose(e) p = MatMul(u, k)
        y = Gemm(e, w3)""",
        {"w0": (8, 2, 3, 3), "w1": (8, 8), "w2": (8, 1), "w3": (1, 6)},
        "float[N,4,5,5] x",
        "float[A,B] y",
    )
    reasons = refusals(model, context(model, {"x": normal(40, 4, 5, 5)}))
    assert reasons["a"] == "it has 2 groups"
    assert reasons["h"] == reasons["k"] == "its weight has other users"
    assert reasons["e"] == "8 weights: even rank 1 would not make it smaller"
    assert reasons["y"] == "6 weights: even rank 1 would not make it smaller"
    assert reasons["p"] == "the weight of MatMul is computed, not constant"
    note = run(model, context(model, {"x": normal(40, 4, 5, 5)}), rank=2, only="z*").notes
    assert note == ["no operator of this model with a name matching 'z*' can be split"]


def test_a_weight_that_a_body_reads_is_refused() -> None:
    model = net(
        """h = Gemm(x, w) r = Relu(h)
        y = If(flag) <then_branch = t () => (float[A,B] p) { p = MatMul(r, w) },
                      else_branch = e () => (float[A,B] q) { q = Identity(r) }>""",
        {"w": (6, 6)},
        x="float[N,6] x, bool flag",
    )
    feeds = [{"x": normal(12, 6, seed=i), "flag": np.array(True)} for i in range(5)]
    assert refusals(model, context(model, feeds))["h"] == "its weight has other users"


def test_activations_that_are_not_finite_are_refused() -> None:
    model = net(
        "h = Gemm(x, w) e = Exp(h) g = Mul(e, e) k = Gemm(g, v) t = Tanh(k) y = Gemm(t, u)",
        {"w": normal(6, 8) * 100, "v": (8, 8), "u": (8, 8)},
    )
    _, report = step(model, context(model, {"x": normal(64, 6)}), rank=2, only="k")
    assert report.exit_code == 3
    assert report.reason == "'k' is not finite on the samples"


def test_macs_that_can_not_be_counted_can_not_be_shared_out() -> None:
    model = net(
        """h = Gemm(x, w) r = Relu(h)
        y = Loop(n, , r) <body = b (int64 i, bool c, float[A,B] v) => (bool d, float[A,B] z)
            { d = Identity(c) z = MatMul(v, u) }>""",
        {"w": (6, 8), "u": (8, 8)},
        x="float[N,6] x, int64 n",
    )
    feeds = [{"x": normal(12, 6, seed=i), "n": np.array(2)} for i in range(5)]
    _, report = step(model, context(model, feeds), macs=0.5)
    assert report.exit_code == 3
    assert report.reason is not None
    assert "a share of the MACs needs their number" in report.reason


# Whole networks -----------------------------------------------------------------------------------


def test_a_transformer() -> None:
    model = Model.load(MODELS / "tiny_transformer.onnx")
    ctx = Context(model, Calibration.open(MODELS / "tiny_transformer.npz", model, limit=120), RUNTIME)
    found, report = step(model, ctx, rank=0.3, only="*layers.3*", mask="attention_mask")
    assert report.committed, report.reason
    assert report.contract is Contract.APPROXIMATE
    assert len(ranks(report)) == 6
    assert report.after.parameters < report.before.parameters
    assert report.after.macs is not None
    assert report.before.macs is not None
    assert report.after.macs < report.before.macs
    json.dumps([dict(change.detail) for change in report.changes])
    assert not [skip for skip in report.skipped if "_down" in skip.nodes[0]]
    assert len({n.name for n in found.nodes}) == len(found.nodes)


def test_the_same_seed_gives_the_same_model() -> None:
    model, ctx = dense()
    protos = [
        run(model, ctx, params=0.6, method=method).model.to_proto().SerializeToString(deterministic=True)
        for method in ("randomised", "data")
        for _ in range(2)
    ]
    assert protos[0] == protos[1]
    assert protos[2] == protos[3]
