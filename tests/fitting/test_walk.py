"""The walk against numpy's least squares on what plain ONNX Runtime computes for both networks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from nets import (
    RUNTIME,
    Feed,
    columns,
    compute,
    context,
    fitted,
    held,
    least_squares,
    net,
    normal,
    perturbed,
    rows,
    weight,
)

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.fitting import walk as walk_module
from onnxfuse.fitting.sites import How, RefitSite, check_mask, refit_sites, unchanged
from onnxfuse.fitting.walk import REFIT_RIDGES, TRIAL_REFIT_RIDGE, Solved, walk
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.numerics.sampling import sample_positions
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.pipeline.base import Context
from onnxfuse.runtime.observed_shapes import shapes_on
from onnxfuse.runtime.spool import Spool
from onnxfuse.verification.predictions import check_predictions


def node_of(model: Model, y: str) -> Node:
    return next(node for node in model.nodes if node.outputs[0].name == y)


def op_at(model: Model, y: str) -> LinearOp:
    """The linear operator whose node computes `y`."""
    op = linear_op(model, node_of(model, y), model.shapes())
    assert isinstance(op, LinearOp)
    return op


def site(model: Model, y: str, **options: Any) -> RefitSite:
    op = op_at(model, y)
    return RefitSite(op, op.y, op.y, **options)


def solve(
    original: Model, rewritten: Model, sites: Sequence[RefitSite], ctx: Context, **options: Any
) -> list[Solved]:
    """Walk, and hold the walk to its own claims."""
    options.setdefault("seed", ctx.seed)
    solved = walk(original, rewritten, sites, ctx.calibration, RUNTIME, **options)
    claims = [item.prediction() for item in solved]
    for check in check_predictions(original, rewritten, claims, ctx.calibration, RUNTIME, options["seed"]):
        assert check.passed, check.reason
        assert check.variance == pytest.approx(
            next(claim.variance for claim in claims if claim.tensor == check.tensor), rel=1e-4
        )
    for item in solved:
        if item.held_before is not None:
            assert item.held_error <= item.held_before * (1 + 1e-6) + 1e-12
    return solved


def assert_solution(
    model: Model, y: str, x: np.ndarray, target: np.ndarray, ridge: float, prior: np.ndarray | None = None
) -> None:
    """The operator at `y` holds the ridge regression of `target` on `x`."""
    op = op_at(model, y)
    expected_weight, expected_bias = least_squares(x, target, ridge, prior)
    scale = np.abs(expected_weight).max()
    np.testing.assert_allclose(op.weight, expected_weight, atol=1e-4 * scale)
    np.testing.assert_allclose(op.bias, expected_bias, atol=2e-4 * max(scale, np.abs(expected_bias).max()))


DENSE = "h1 = Gemm(x, w1, b1) r1 = Relu(h1) h2 = Gemm(r1, w2, b2) r2 = Relu(h2) y = Gemm(r2, w3, b3)"
DENSE_WEIGHTS = {"w1": (6, 16), "b1": (16,), "w2": (16, 10), "b2": (10,), "w3": (10, 4), "b3": (4,)}


@pytest.fixture(scope="module")
def dense() -> tuple[Model, Context]:
    model = net(DENSE, DENSE_WEIGHTS)
    return model, context(model, {"x": normal(400, 6)}, batch_size=50)


# --- what is unchanged --------------------------------------------------------------------------------------


def test_unchanged_ends_at_the_first_node_that_computes_something_else(dense: tuple[Model, Context]) -> None:
    model, _ = dense
    assert unchanged(model, model.copy()) == {"x", "h1", "r1", "h2", "r2", "y"}
    assert unchanged(model, perturbed(model, "w2")) == {"x", "h1", "r1"}
    renamed = model.copy()
    node_of(renamed, "h1").inputs[1] = renamed.add_weight("other_name", weight(model, "w1").copy())
    assert unchanged(model, renamed) == unchanged(model, model)
    scaled = model.copy()
    node_of(scaled, "h2").attrs["alpha"] = 2.0
    assert unchanged(model, scaled) == {"x", "h1", "r1"}
    spliced = model.copy()
    node_of(spliced, "r2").inputs[0] = spliced.tensor("h1")
    assert unchanged(model, spliced) == {"x", "h1", "r1", "h2"}


def test_unchanged_compares_optional_inputs_and_captured_tensors() -> None:
    clip = net("h = Clip(x, , high) y = Relu(h)", {"high": np.float32(1)}, y="float[N,6] y")
    bounded = clip.copy()
    node_of(bounded, "h").inputs[1] = bounded.add_weight("low", np.array(-1, np.float32))
    assert unchanged(clip, bounded) == {"x"}
    assert unchanged(bounded, clip) == {"x"}
    branchy = net(BRANCHES, BRANCH_WEIGHTS, x="float[N,6] x, bool flag")
    assert unchanged(branchy, branchy.copy()) >= {"h1", "c", "y"}
    assert unchanged(branchy, perturbed(branchy, "w1")) == {"x", "flag"}
    assert unchanged(branchy, perturbed(branchy, "side")) == {"x", "flag", "h1", "r1"}


BRANCHES = """h1 = Gemm(x, w1) r1 = Relu(h1)
    c = If(flag) <then_branch = t () => (float[A,B] p) { p = Add(r1, side) },
                  else_branch = e () => (float[A,B] q) { q = Mul(r1, h1) }>
    y = Gemm(c, w2)"""
BRANCH_WEIGHTS = {"w1": (6, 16), "side": (16,), "w2": (16, 4)}


# --- sites --------------------------------------------------------------------------------------------------


def named(sites: Sequence[RefitSite]) -> list[tuple[str, str, str | None]]:
    return [(s.op.y, s.tensor, s.rest) for s in sites]


def reasons(original: Model, rewritten: Model, **options: Any) -> dict[str, str]:
    return {skip.nodes[0]: skip.reason for skip in refit_sites(original, rewritten, **options)[1]}


def test_sites_are_what_lies_behind_a_change_in_order(dense: tuple[Model, Context]) -> None:
    model, _ = dense
    sites, skipped = refit_sites(model, perturbed(model, "w2"))
    assert named(sites) == [("h2", "h2", None), ("y", "y", None)]
    assert not skipped
    assert not any(s.how == "fresh" for s in sites)
    assert refit_sites(model, model.copy()) == ([], [])


def test_what_an_exact_pass_left_behind_is_not_solved_again(dense: tuple[Model, Context]) -> None:
    model, _ = dense
    before = perturbed(model, "w1", amount=1e-7)
    sites, _ = refit_sites(model, perturbed(before, "w3"), before=before)
    assert named(sites) == [("y", "y", None)]


def test_a_fresh_node_is_a_site_for_its_tensor(dense: tuple[Model, Context]) -> None:
    model, _ = dense
    rewritten = fused(model)
    sites, _ = refit_sites(model, rewritten, [(node_of(rewritten, "h2"), "h2")])
    assert [(s.tensor, s.how) for s in sites] == [("h2", "fresh"), ("y", "refit")]


def test_shared_weights_are_left_alone_with_a_reason() -> None:
    model = net(
        "h1 = MatMul(x, w) r1 = Relu(h1) h2 = MatMul(r1, w) r2 = Relu(h2) y = MatMul(r2, v)",
        {"w": (6, 6), "v": (6, 3)},
    )
    sites, skipped = refit_sites(model, perturbed(model, "w"))
    assert named(sites) == [("y", "y", None)]
    assert [skip.nodes for skip in skipped] == [("h1",), ("h2",)]
    assert all("other users" in skip.reason for skip in skipped)


def test_what_cannot_be_a_site_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(
        """h1 = MatMul(x, w1) t = Transpose(h1) c = MatMul(h1, t) h2 = MatMul(h1, w2) y = MatMul(h2, w3)
        z = Relu(c)""",
        {"w1": (6, 12), "w2": (12, 5), "w3": (5, 3)},
        y="float[A,B] y, float[C,D] z",
    )
    assert "computed, not constant" in reasons(model, perturbed(model, "w1"))["c"]
    other = net("h3 = MatMul(x, w1) y = MatMul(h3, w3)", {"w1": (6, 12), "w3": (12, 3)})
    assert reasons(model, other)["h3"] == "its output 'h3' is not a tensor of the original"
    wider = net("h2 = MatMul(x, w1) y = MatMul(h2, w3)", {"w1": (6, 7), "w3": (7, 3)})
    assert "another shape" in reasons(model, wider)["h2"]
    monkeypatch.setattr("onnxfuse.fitting.sites.MOST_UNKNOWNS", 11)
    assert set(reasons(model, perturbed(model, "w1"))) == {"c", "h2"}
    assert "12 unknowns" in reasons(model, perturbed(model, "w1"))["h2"]


def test_pads_that_depend_on_a_dynamic_size_are_skipped() -> None:
    text = 'h = Conv<pads = [1,1]>(x, w1) y = Conv<strides = [2], auto_pad = "SAME_UPPER">(h, w2)'
    weights = {"w1": (4, 2, 3), "w2": (3, 4, 3)}
    model = net(text, weights, x="float[N,2,L] x", y="float[A,B,C] y")
    assert "pads depend" in reasons(model, perturbed(model, "w1"))["y"]
    fixed = net(text, weights, x="float[N,2,10] x", y="float[A,B,C] y")
    sites, skipped = refit_sites(fixed, perturbed(fixed, "w1"))
    assert [s.tensor for s in sites] == ["h", "y"]
    assert not skipped


def test_vectors_have_no_batch_axis() -> None:
    model = net(
        "h = MatMul(x, w1) y = MatMul(h, w2)", {"w1": (6, 5), "w2": (5, 4)}, x="float[6] x", y="float[A] y"
    )
    found = reasons(model, perturbed(model, "w1"))
    assert set(found) == {"h", "y"}
    assert all("no batch axis" in reason for reason in found.values())


RESIDUAL = """h = Gemm(x, w0) r = Relu(h) b = Gemm(r, w1) s = Add(b, h) q = Relu(s) y = Gemm(q, w2)"""
RESIDUAL_WEIGHTS = {"w0": (6, 8), "w1": (8, 8), "w2": (8, 3)}


def test_a_branch_of_a_sum_is_solved_for_the_sum() -> None:
    model = net(RESIDUAL, RESIDUAL_WEIGHTS)
    sites, _ = refit_sites(model, perturbed(model, "w0"))
    assert named(sites) == [("h", "h", None), ("b", "s", "h"), ("y", "y", None)]


def test_of_two_branches_the_later_one_is_solved_for_the_sum() -> None:
    model = net(
        "h = Gemm(x, w0) r = Relu(h) b = Gemm(r, w1) c = Gemm(h, w2) d = Tanh(c) s = Add(b, d) y = Relu(s)",
        {"w0": (6, 8), "w1": (8, 8), "w2": (8, 8)},
    )
    sites, _ = refit_sites(model, perturbed(model, "w0"))
    # d depends on c, which is solved after b: when b's turn comes, d is not yet what it will be.
    assert named(sites) == [("h", "h", None), ("b", "b", None), ("c", "c", None)]
    direct = net(
        "h = Gemm(x, w0) r = Relu(h) b = Gemm(r, w1) c = Gemm(h, w2) s = Add(b, c) y = Relu(s)",
        {"w0": (6, 8), "w1": (8, 8), "w2": (8, 8)},
    )
    sites, _ = refit_sites(direct, perturbed(direct, "w0"))
    assert named(sites) == [("h", "h", None), ("b", "b", None), ("c", "s", "b")]


@pytest.mark.parametrize(
    ("tail", "outputs", "more"),
    [
        ("s = Add(b, h) t = Relu(b) u = Add(s, t) y = Relu(u)", "float[A,B] y", {}),  # b is used elsewhere
        ("s = Add(b, h) y = Relu(s)", "float[A,B] y, float[C,D] b", {}),  # b is an output
        ("s = Add(b, b) y = Relu(s)", "float[A,B] y", {}),
        ("m = ReduceMean<axes = [1]>(h) s = Add(b, m) y = Relu(s)", "float[A,B] y", {}),  # m is broadcast
        ("s = Sub(b, h) y = Relu(s)", "float[A,B] y", {}),
    ],
)
def test_other_sums_leave_the_branch_its_own_output(tail: str, outputs: str, more: dict[str, Any]) -> None:
    model = net(f"h = Gemm(x, w0) r = Relu(h) b = Gemm(r, w1) {tail}", RESIDUAL_WEIGHTS, y=outputs)
    sites, _ = refit_sites(model, perturbed(model, "w0"))
    assert ("b", "b", None) in named(sites)


def test_a_mask_must_be_an_input(dense: tuple[Model, Context]) -> None:
    check_mask(dense[0], None)
    check_mask(dense[0], "x")
    with pytest.raises(InputError, match=r"no input 'mask'; its inputs are x$"):
        check_mask(dense[0], "mask")


# --- numbers ------------------------------------------------------------------------------------------------


def fused(model: Model, *, bias: bool = True) -> Model:
    """DENSE with one Gemm of arbitrary weights for the first two."""
    copy = model.copy()
    inner = [node_of(copy, name) for name in ("h1", "r1", "h2")]
    x, h2 = copy.tensor("x"), copy.tensor("h2")
    copy.remove(inner)
    weights = [copy.add_weight("fused.weight", normal(6, 10, seed=9))]
    if bias:
        weights.append(copy.add_weight("fused.bias", normal(10, seed=10)))
    copy.add_node("Gemm", [x, *weights], [h2], by="test")
    copy.prune()
    return copy


def test_a_fresh_dense_site_is_plain_least_squares(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = fused(model)
    (solved,) = solve(model, rewritten, [site(rewritten, "h2", how="fresh")], ctx, ridge=1e-12)
    x, target = compute(model, fitted(ctx), "x", "h2")
    assert_solution(rewritten, "h2", x, target, 0.0)
    assert solved.ridge == 1e-12
    assert solved.held_before is None
    now, before = compute(rewritten, held(ctx), "h2")[0], compute(model, held(ctx), "h2")[0]
    error = ((now - before) ** 2).sum(1).mean()
    assert solved.held_error == pytest.approx(error, rel=1e-4)
    assert solved.relative == pytest.approx(error / before.var(0).sum(), rel=1e-4)
    assert solved.error < solved.held_error


def test_a_fresh_site_is_given_a_bias_where_it_has_none(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = fused(model, bias=False)
    solve(model, rewritten, [site(rewritten, "h2", how="fresh")], ctx, ridge=1e-12)
    assert_solution(rewritten, "h2", *compute(model, fitted(ctx), "x", "h2"), 0.0)


def test_a_refit_site_shrinks_towards_its_weights_by_the_ridge_that_is_best_held_out(
    dense: tuple[Model, Context],
) -> None:
    model, ctx = dense
    rewritten = perturbed(model, "w1", amount=0.5)
    prior = op_at(rewritten, "h2").weight
    (solved,) = solve(model, rewritten, [site(rewritten, "h2")], ctx)
    inputs = {
        part: compute(rewritten, feed, "r1")[0] for part, feed in (("fit", fitted(ctx)), ("held", held(ctx)))
    }
    targets = {
        part: compute(model, feed, "h2")[0] for part, feed in (("fit", fitted(ctx)), ("held", held(ctx)))
    }
    errors = {}
    for ridge in REFIT_RIDGES:
        w, b = least_squares(inputs["fit"], targets["fit"], ridge, prior)
        errors[ridge] = ((inputs["held"] @ w.T + b - targets["held"]) ** 2).sum(1).mean()
    best = min(errors, key=lambda ridge: errors[ridge])
    assert solved.ridge == best
    assert solved.held_error == pytest.approx(errors[best], rel=1e-4)
    assert_solution(rewritten, "h2", inputs["fit"], targets["fit"], best, prior)
    before = inputs["held"] @ prior.T + op_at(model, "h2").bias - targets["held"]
    assert solved.held_before == pytest.approx((before**2).sum(1).mean(), rel=1e-4)
    np.testing.assert_array_equal(
        weight(model, "w2"), weight(perturbed(model, "w1"), "w2")
    )  # the original stays


def test_many_columns_choose_among_fewer_ridges(
    dense: tuple[Model, Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ctx = dense
    monkeypatch.setattr(walk_module, "EIGEN_COLUMNS", 15)
    rewritten = perturbed(model, "w1", amount=0.5)
    prior = op_at(rewritten, "h2").weight
    (solved,) = solve(model, rewritten, [site(rewritten, "h2")], ctx)
    assert solved.ridge in (1e-3, 1e-2, 1e-1)
    x, target = compute(rewritten, fitted(ctx), "r1")[0], compute(model, fitted(ctx), "h2")[0]
    assert_solution(rewritten, "h2", x, target, solved.ridge, prior)


def test_a_later_site_sees_what_the_earlier_ones_became(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = fused(model)
    sites, _ = refit_sites(model, rewritten, [(node_of(rewritten, "h2"), "h2")])
    prior = op_at(rewritten, "y").weight
    _, last = solve(model, rewritten, sites, ctx)
    x, target = compute(rewritten, fitted(ctx), "r2")[0], compute(model, fitted(ctx), "y")[0]
    assert last.ridge is not None
    assert_solution(rewritten, "y", x, target, last.ridge, prior)
    one_shot, _ = least_squares(compute(model, fitted(ctx), "r2")[0], target, last.ridge, prior)
    assert np.abs(one_shot - op_at(rewritten, "y").weight).max() > 0.01


def test_a_branch_repairs_the_skip() -> None:
    model = net(RESIDUAL, RESIDUAL_WEIGHTS)
    ctx = context(model, {"x": normal(400, 6)}, batch_size=100)
    rewritten = perturbed(model, "w0")
    prior = op_at(rewritten, "b").weight
    op = op_at(rewritten, "b")
    (solved,) = solve(model, rewritten, [RefitSite(op, "s", "s", "h")], ctx)
    r, h = compute(rewritten, fitted(ctx), "r", "h")
    (total,) = compute(model, fitted(ctx), "s")
    assert solved.ridge is not None
    assert_solution(rewritten, "b", r, total - h, solved.ridge, prior)
    assert solved.prediction().tensor == "s"


GEOMETRIES = [
    ("float[N,2,9,8] x", (3, 3), (1, 1), (1, 1, 1, 1)),
    ("float[N,2,9,8] x", (3, 2), (2, 1), (0, 1, 2, 0)),
    ("float[N,2,9,8] x", (4, 4), (2, 2), (1, 2, 2, 1)),
    ("float[N,2,20] x", (5,), (3,), (2, 1)),
    ("float[N,2,5,4,4] x", (2, 3, 1), (1, 2, 1), (0, 1, 0, 1, 1, 0)),
]


@pytest.mark.parametrize(("x", "kernel", "strides", "pads"), GEOMETRIES)
def test_a_fresh_conv_is_least_squares_on_padded_patches(
    x: str, kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...]
) -> None:
    axes = len(kernel)
    sizes = f"{'B,C,D,E,F'[: 2 * axes + 1]}"
    same = ", ".join(["1"] * 2 * axes)
    attributes = f"<strides = {list(strides)}, pads = {list(pads)}>"
    model = net(
        f"a = Conv<pads = [{same}]>(x, w1) r = Sigmoid(a) h = Conv{attributes}(r, w2) y = Relu(h)",
        {"w1": (5, 2, *(3,) * axes), "w2": (3, 5, *kernel)},
        x=x,
        y=f"float[A,{sizes}] y",
    )
    shape = tuple(int(size) for size in x.split("]")[0].split(",")[1:])
    ctx = context(model, {"x": normal(24, *shape)}, batch_size=5)
    rewritten = model.copy()
    source, target = rewritten.tensor("x"), rewritten.tensor("h")
    rewritten.remove([node_of(rewritten, name) for name in "arh"])
    start = rewritten.add_weight("w", normal(3, 2, *kernel))
    rewritten.add_node(
        "Conv", [source, start], [target], {"strides": list(strides), "pads": list(pads)}, by="test"
    )
    rewritten.prune()
    (solved,) = solve(model, rewritten, [site(rewritten, "h", how="fresh")], ctx, ridge=1e-12)
    assert solved.positions is None
    patches = columns(fitted(ctx)["x"], kernel, strides, pads)
    assert_solution(rewritten, "h", patches, rows(compute(model, fitted(ctx), "h")[0]), 0.0)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_conv_is_a_regression_for_each_group(groups: int) -> None:
    model = net(
        f"""a = Conv<pads = [1,1]>(x, w1) r = Relu(a) h = Conv<group = {groups}, pads = [1,1]>(r, w2, b2)
        y = Relu(h)""",
        {"w1": (4, 2, 3), "w2": (8, 4 // groups, 3), "b2": (8,)},
        x="float[N,2,11] x",
        y="float[A,B,C] y",
    )
    ctx = context(model, {"x": normal(60, 2, 11)})
    rewritten = perturbed(model, "w1")
    prior = op_at(rewritten, "h").weight
    (solved,) = solve(model, rewritten, [site(rewritten, "h")], ctx)
    assert solved.ridge is not None
    r = compute(rewritten, fitted(ctx), "r")[0]
    target = rows(compute(model, fitted(ctx), "h")[0])
    op = op_at(rewritten, "h")
    for x, group in zip(np.split(r, groups, axis=1), np.split(np.arange(8), groups), strict=True):
        patches = columns(x, (3,), (1,), (1, 1))
        expected, bias = least_squares(patches, target[:, group], solved.ridge, prior[group])
        np.testing.assert_allclose(op.weight[group], expected, atol=1e-4)
        np.testing.assert_allclose(op.bias[group], bias, atol=2e-4)


TOKENS = "h1 = MatMul(x, w1) r1 = Gelu(h1) h2 = MatMul(r1, w2) r2 = Tanh(h2) y = MatMul(r2, w3)"
TOKENS = TOKENS.replace("Gelu", "Sigmoid")
TOKEN_WEIGHTS = {"w1": (6, 12), "w2": (12, 8), "w3": (8, 5)}


def test_tokens_are_rows_and_a_missing_bias_becomes_an_add() -> None:
    model = net(TOKENS, TOKEN_WEIGHTS, x="float[N,T,6] x", y="float[A,B,C] y")
    ctx = context(model, {"x": normal(40, 7, 6)})
    rewritten = perturbed(model, "w1")
    prior = op_at(rewritten, "h2").weight
    (solved,) = solve(model, rewritten, [site(rewritten, "h2")], ctx)
    add = node_of(rewritten, "h2")
    assert add.op == "Add"
    x, target = compute(rewritten, fitted(ctx), "r1")[0], compute(model, fitted(ctx), "h2")[0]
    weight_now, bias_now = least_squares(x.reshape(-1, 12), target.reshape(-1, 8), solved.ridge or 0.0, prior)
    np.testing.assert_allclose(weight(rewritten, "w2").T, weight_now, atol=1e-4)
    np.testing.assert_allclose(weight(rewritten, add.inputs[1].name), bias_now, atol=1e-4)
    assert solved.prediction().channel_axis == -1


def test_a_bias_of_the_tensors_rank_is_counted_where_ranks_are_not_declared() -> None:
    body = TOKENS.replace("h2 = MatMul(r1, w2)", "p = MatMul(r1, w2) h2 = Add(p, b2)")
    model = net(body, {**TOKEN_WEIGHTS, "b2": normal(1, 1, 8)}, x="float[N,T,6] x", y="float[A,B,C] y")
    ctx = context(model, {"x": normal(40, 7, 6)})
    rewritten = perturbed(model, "w1")
    sites, _ = refit_sites(model, rewritten)
    assert [s.tensor for s in sites] == ["h1", "h2", "y"]
    solved = solve(model, rewritten, sites[1:], ctx)  # checks the claimed errors, which need the bias
    assert solved[0].ridge is not None


@pytest.mark.parametrize("symbols", ["N,T", "N,L"])
def test_padding_rows_are_left_out(symbols: str) -> None:
    model = net(TOKENS, TOKEN_WEIGHTS, x=f"float[N,T,6] x, int64[{symbols}] mask", y="float[A,B,C] y")
    x, mask = normal(60, 7, 6), np.random.default_rng(0).integers(0, 3, (60, 7))
    x[mask == 0] *= 20
    ctx = context(model, {"x": x, "mask": mask})
    rewritten = perturbed(model, "w1")
    prior = op_at(rewritten, "h2").weight
    sites, _ = refit_sites(model, rewritten, mask="mask")
    (solved,) = solve(model, rewritten, sites[1:2], ctx)
    chosen = fitted(ctx)["mask"] != 0
    (r1,), (h2,) = compute(rewritten, fitted(ctx), "r1"), compute(model, fitted(ctx), "h2")
    expected, _ = least_squares(r1[chosen], h2[chosen], solved.ridge or 0.0, prior)
    np.testing.assert_allclose(weight(rewritten, "w2").T, expected, atol=1e-4)
    with_padding, _ = least_squares(r1.reshape(-1, 12), h2.reshape(-1, 8), solved.ridge or 0.0, prior)
    assert np.abs(with_padding - expected).max() > 0.01
    assert solved.prediction().mask == "mask"


def test_a_mask_of_other_dimensions_is_not_used() -> None:
    model = net(TOKENS, TOKEN_WEIGHTS, x="float[N,T,6] x, int64[N,L] mask", y="float[A,B,C] y")
    mask = np.zeros((60, 4), np.int64)
    ctx = context(model, {"x": normal(60, 7, 6), "mask": mask})
    rewritten = perturbed(model, "w1")
    sites, _ = refit_sites(model, rewritten, mask="mask")
    assert all(item.prediction().mask is None for item in solve(model, rewritten, sites, ctx))


def test_sampled_positions_are_those_of_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(
        "a = Conv<pads = [1,1]>(x, w1) r = Relu(a) h = Conv<pads = [1,1]>(r, w2) y = Relu(h)",
        {"w1": (4, 2, 3), "w2": (3, 4, 3)},
        x="float[N,2,50] x",
        y="float[A,B,C] y",
    )
    ctx = context(model, {"x": normal(60, 2, 50)}, batch_size=15)
    monkeypatch.setattr(walk_module, "LEAST_WALK_ROWS", 1)
    monkeypatch.setattr(walk_module, "WALK_ROWS_PER_COLUMN", 20)
    rewritten = perturbed(model, "w1")
    prior = op_at(rewritten, "h").weight
    (solved,) = solve(model, rewritten, [site(rewritten, "h")], ctx, seed=3)
    assert solved.positions == 6  # 20 rows for each of 12 columns, from 45 samples
    kept: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for batch in ctx.calibration.fit:
        at = sample_positions(3, "h", batch.index, batch.samples, 50, 6)
        assert at is not None
        chosen = (np.arange(batch.samples)[:, None] * 50 + at).reshape(-1)
        kept.append(columns(compute(rewritten, batch.feed, "r")[0], (3,), (1,), (1, 1))[chosen])
        targets.append(rows(compute(model, batch.feed, "h")[0])[chosen])
    assert_solution(rewritten, "h", np.concatenate(kept), np.concatenate(targets), solved.ridge or 0.0, prior)
    again, other = perturbed(model, "w1"), perturbed(model, "w1")
    solve(model, again, [site(again, "h")], ctx, seed=3)
    solve(model, other, [site(other, "h")], ctx, seed=4)
    np.testing.assert_array_equal(weight(again, "w2"), weight(rewritten, "w2"))
    assert np.abs(weight(other, "w2") - weight(rewritten, "w2")).max() > 1e-4


def test_rows_are_counted_whatever_the_first_axis_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens first, samples second: a batch of 30 samples of 3 tokens has 3 'rows' of 30 positions."""
    model = net(TOKENS, TOKEN_WEIGHTS, x="float[T,batch,6] x", y="float[A,B,C] y")
    ctx = context(model, {"x": normal(3, 240, 6)}, batch_size=30)
    assert ctx.calibration.fit.samples == 180
    monkeypatch.setattr(walk_module, "LEAST_WALK_ROWS", 400)
    monkeypatch.setattr(walk_module, "WALK_ROWS_PER_COLUMN", 1)
    rewritten = perturbed(model, "w1")
    (solved,) = solve(model, rewritten, [site(rewritten, "h2")], ctx)
    assert solved.positions == 23  # of 30, in 3 rows of 6 batches: 400 at least


def test_batches_of_other_sizes_are_taken_as_they_come() -> None:
    model = net(
        "a = Conv<pads = [1,1,1,1]>(x, w1) r = Relu(a) h = Conv<pads = [1,1,1,1]>(r, w2) y = Relu(h)",
        {"w1": (4, 2, 3, 3), "w2": (3, 4, 3, 3)},
        x="float[N,2,H,W] x",
        y="float[A,B,C,D] y",
    )
    feeds = [{"x": normal(5 + i, 2, 4 + i, 9 - i, seed=i)} for i in range(5)]
    ctx = context(model, feeds)
    rewritten = perturbed(model, "w1")
    prior = op_at(rewritten, "h").weight
    (solved,) = solve(model, rewritten, [site(rewritten, "h")], ctx)
    patches, targets = [], []
    for batch in ctx.calibration.fit:
        patches.append(columns(compute(rewritten, batch.feed, "r")[0], (3, 3), (1, 1), (1, 1, 1, 1)))
        targets.append(rows(compute(model, batch.feed, "h")[0]))
    assert_solution(
        rewritten, "h", np.concatenate(patches), np.concatenate(targets), solved.ridge or 0.0, prior
    )


def test_paper_mode_solves_each_channel_alone() -> None:
    model = net(
        "a = Conv<pads = [1,1]>(x, w1) r = Relu(a) h = Conv<pads = [1,1]>(r, w2, b) y = Relu(h)",
        {"w1": (4, 3, 3), "w2": (3, 4, 3), "b": (3,)},
        x="float[N,3,12] x",
        y="float[A,B,C] y",
    )
    mixed = np.einsum("nct,dc->ndt", normal(40, 3, 12), np.array([[1, 1, 0], [1, 0.5, 0], [0, 1, 1]]))
    ctx = context(model, {"x": mixed.astype(np.float32)})
    found = {}
    for paper in (False, True):
        rewritten = perturbed(model, "w1")
        (solved,) = solve(model, rewritten, [site(rewritten, "h", how="fresh")], ctx, paper=paper)
        found[paper] = solved
    r, h = compute(rewritten, fitted(ctx), "r")[0], rows(compute(model, fitted(ctx), "h")[0])
    op = op_at(rewritten, "h")
    for channel in range(4):
        alone, _ = least_squares(columns(r[:, [channel]], (3,), (1,), (1, 1)), h)
        np.testing.assert_allclose(op.weight.reshape(3, 4, 3)[:, channel], alone, atol=1e-4)
    np.testing.assert_allclose(
        op.bias, h.mean(0) - op.weight @ columns(r, (3,), (1,), (1, 1)).mean(0), atol=1e-4
    )
    assert found[True].relative > 2 * found[False].relative


def test_trials_take_one_ridge_and_fewer_rows(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = fused(model)
    sites, _ = refit_sites(model, rewritten, [(node_of(rewritten, "h2"), "h2")])
    prior = op_at(rewritten, "y").weight
    solved = solve(model, rewritten, sites, ctx, quick=True, ridge=1e-9)
    assert [item.ridge for item in solved] == [
        1e-9,
        TRIAL_REFIT_RIDGE,
    ]  # the ridge asked for is for fresh sites
    x, target = compute(rewritten, fitted(ctx), "r2")[0], compute(model, fitted(ctx), "y")[0]
    assert_solution(rewritten, "y", x, target, TRIAL_REFIT_RIDGE, prior)


# --- what stays ---------------------------------------------------------------------------------------------


def test_weights_that_are_best_stay_bit_for_bit(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    same = model.copy()
    solved = solve(model, same, [site(same, name) for name in ("h1", "h2", "y")], ctx)
    assert [item.ridge for item in solved] == [None] * 3
    for name in DENSE_WEIGHTS:
        np.testing.assert_array_equal(weight(same, name), weight(model, name))
    assert solved[0].held_before == pytest.approx(0.0, abs=1e-9)


def test_weights_stay_where_a_fit_would_only_overfit() -> None:
    """The targets are off by what no affine map can follow; 16 samples suggest otherwise."""
    model = net(
        "h = Gemm(x, w1) t = Mul(x, far) n = Sin(t) m = Gemm(n, w2) y = Add(h, m)",
        {"w1": (30, 4), "far": np.float32(1000), "w2": (30, 4)},
        x="float[N,30] x",
    )
    ctx = context(model, {"x": normal(32, 30, seed=1)}, held_out=0.5)
    rewritten = net("y = Gemm(x, w1)", {"w1": (30, 4)}, x="float[N,30] x")
    (solved,) = solve(model, rewritten, [site(rewritten, "y")], ctx)
    assert solved.ridge is None
    assert solved.error > 0.1
    np.testing.assert_array_equal(weight(rewritten, "w1"), weight(model, "w1"))


def test_a_site_without_held_out_samples_is_judged_on_the_fitted_ones() -> None:
    model = net(DENSE, DENSE_WEIGHTS)
    ctx = context(model, {"x": normal(100, 6)}, held_out=0.0)
    rewritten = perturbed(model, "w1")
    (solved,) = solve(model, rewritten, [site(rewritten, "h2")], ctx)
    assert solved.held_error == pytest.approx(solved.error)


def test_half_precision_weights_are_judged_as_stored() -> None:
    """Rounded weights leave an error of their own, and the claim includes it."""
    half = {name: (normal(*shape) / 4).astype(np.float16) for name, shape in DENSE_WEIGHTS.items()}
    model = net(DENSE, half, x="float16[N,6] x", y="float16[A,B] y")
    ctx = context(model, {"x": normal(200, 6).astype(np.float16)})
    rewritten = perturbed(model, "w1")
    (solved,) = walk(model, rewritten, [site(rewritten, "h1")], ctx.calibration, RUNTIME)
    exact = weight(rewritten, "w1")
    assert exact.dtype == np.float16
    x = fitted(ctx)["x"].astype(np.float64)
    error = x @ exact.astype(np.float64) + op_at(rewritten, "h1").bias - compute(model, fitted(ctx), "h1")[0]
    assert solved.error == pytest.approx((error**2).sum(1).mean(), rel=1e-3)


def test_no_sites_no_work(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    assert walk(model, model.copy(), [], ctx.calibration, RUNTIME) == []


# --- how it runs --------------------------------------------------------------------------------------------

WIDE = """a = Gemm(x, w0) r = Relu(a) b = Gemm(r, w1) s = Add(b, a) q = Relu(s) c = Gemm(q, w2)
    d = Concat<axis = 1>(c, r) e = Gemm(d, w3) f = Add(e, b) g = Relu(f)
    k = Concat<axis = 1>(g, x) y = Gemm(k, w4)"""
WIDE_WEIGHTS = {"w0": (6, 8), "w1": (8, 8), "w2": (8, 8), "w3": (16, 8), "w4": (14, 3)}


def test_the_spools_limit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(WIDE, WIDE_WEIGHTS)
    ctx = context(model, {"x": normal(200, 6)})
    found = []
    for limit in (0, 3000, 1 << 30):
        monkeypatch.setattr(walk_module, "Spool", lambda _, limit=limit: Spool(limit))
        rewritten = perturbed(model, "w0")
        sites, _ = refit_sites(model, rewritten)
        assert len(sites) == 5
        solved = solve(model, rewritten, sites, ctx)
        found.append(([weight(rewritten, name) for name in WIDE_WEIGHTS], [item.error for item in solved]))
    for weights, errors in found[1:]:
        assert errors == found[0][1]
        for ours, first in zip(weights, found[0][0], strict=True):
            np.testing.assert_array_equal(ours, first)


class Recorder:
    """A runtime that notes the operators of every model it is given."""

    def __init__(self) -> None:
        self.models: list[onnx.ModelProto] = []

    def session(self, model: onnx.ModelProto, **options: Any) -> Any:
        self.models.append(model)
        return RUNTIME.session(model, **options)


def test_every_node_is_run_once_and_what_is_shared_only_by_the_original() -> None:
    model = net(WIDE, WIDE_WEIGHTS)
    ctx = context(model, {"x": normal(100, 6)})
    rewritten = perturbed(model, "w1")
    sites, _ = refit_sites(model, rewritten)
    recorder = Recorder()
    walk(model, rewritten, sites, ctx.calibration, recorder)  # type: ignore[arg-type]
    times = Counter(name for proto in recorder.models for node in proto.graph.node for name in node.output)
    assert times["a"] == times["r"] == 1
    assert max(times[name] for name in "bsqcdefgky") == 2
    assert times["y"] == 1  # the original's; nothing asks for the rewritten one


def test_the_frontier_is_forgotten_as_the_walk_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(WIDE, WIDE_WEIGHTS)
    ctx = context(model, {"x": normal(100, 6)})
    spools: list[Spool] = []

    class Noted(Spool):
        most = 0

        def put(self, name: str, batch: int, array: np.ndarray) -> None:
            super().put(name, batch, array)
            self.most = max(self.most, len(self._memory))

        def __exit__(self, *exception: object) -> None:
            spools.append(self)
            assert not self._memory  # all was dropped before the end
            super().__exit__(*exception)

    monkeypatch.setattr(walk_module, "Spool", Noted)
    rewritten = perturbed(model, "w0")
    sites, _ = refit_sites(model, rewritten)
    walk(model, rewritten, sites, ctx.calibration, RUNTIME)
    assert spools[0].most <= 10  # type: ignore[attr-defined]


def test_samples_are_read_once(dense: tuple[Model, Context], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ctx = dense
    read = []
    source = type(ctx.calibration.fit._source)
    real = source.read
    monkeypatch.setattr(source, "read", lambda self, groups: read.append(1) or real(self, groups))
    rewritten = perturbed(model, "w1")
    walk(model, rewritten, refit_sites(model, rewritten)[0], ctx.calibration, RUNTIME)
    assert len(read) == 2  # the fit samples, the held-out ones


def test_a_branch_that_captures_tensors_is_walked_through() -> None:
    model = net(BRANCHES, BRANCH_WEIGHTS, x="float[N,6] x, bool flag")
    for flag in (True, False):
        feeds = [{"x": normal(30, 6, seed=i), "flag": np.array(flag)} for i in range(6)]
        ctx = context(model, feeds)
        rewritten = perturbed(model, "w1")
        sites, _ = refit_sites(model, rewritten)
        assert named(sites) == [("h1", "h1", None), ("y", "y", None)]
        prior = op_at(rewritten, "y").weight
        (solved,) = solve(model, rewritten, sites[1:], ctx)
        x = np.concatenate([compute(rewritten, b.feed, "c")[0] for b in ctx.calibration.fit])
        y = np.concatenate([compute(model, b.feed, "y")[0] for b in ctx.calibration.fit])
        assert_solution(rewritten, "y", x, y, solved.ridge or 0.0, prior)


def test_shapes_that_only_a_run_shows_make_sites_too() -> None:
    model = net(
        """h = Gemm(x, w0) n = Shape(i) z = NonZero(i) t = Transpose(z) g = GatherND(h, t) y = Gemm(g, w1)
        m = Identity(n)""",
        {"w0": (6, 8), "w1": (8, 3)},
        x="float[N,6] x, float[N] i",
        y="float[A,B] y, int64[C] m",
    )
    ctx = context(model, {"x": normal(80, 6), "i": np.ones(80, np.float32)})
    rewritten = perturbed(model, "w0")
    feed: Feed = next(iter(ctx.calibration.fit)).feed
    sites, skipped = refit_sites(model, rewritten, known=shapes_on(model, feed, RUNTIME))
    assert [s.tensor for s in sites] == ["h", "y"], skipped
    solve(model, rewritten, sites, ctx)


# --- errors -------------------------------------------------------------------------------------------------

ROOTED = "s = Sqrt(x) h1 = Gemm(s, w1) r1 = Relu(h1) y = Gemm(r1, w2)"


@pytest.mark.parametrize("part", ["fit", "held_out"])
@pytest.mark.parametrize("how", ["fresh", "refit"])
def test_activations_that_are_not_finite_are_refused(part: str, how: How) -> None:
    model = net(ROOTED, {"w1": (6, 8), "w2": (8, 3)})
    x = np.abs(normal(100, 6))
    ctx = context(model, {"x": x})
    poisoned = getattr(ctx.calibration, part)
    first = next(iter(poisoned)).feed["x"][0]
    x[(x == first).all(1)] = -1
    ctx = context(model, {"x": x})
    rewritten = perturbed(model, "w1")
    before = weight(rewritten, "w2").copy()
    with pytest.raises(NotApplicableError, match="finite"):
        walk(model, rewritten, [site(rewritten, "y", how=how)], ctx.calibration, RUNTIME)
    np.testing.assert_array_equal(weight(rewritten, "w2"), before)


def test_a_full_disk_is_an_input_error(dense: tuple[Model, Context], monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def refuse(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(walk_module, "Spool", lambda _: Spool(0))
    model, ctx = dense
    rewritten = perturbed(model, "w1")
    with pytest.raises(InputError, match="No space left"):
        walk(model, rewritten, refit_sites(model, rewritten)[0], ctx.calibration, RUNTIME)


def test_a_rest_that_broadcasts_only_in_the_run_is_refused() -> None:
    model = net(
        "h = Gemm(x, w0) b = Gemm(h, w1) s = Add(b, z) y = Relu(s)",
        {"w0": (6, 8), "w1": (8, 4)},
        x="float[N,6] x, float[M,4] z",
    )
    feeds = [{"x": normal(20, 6, seed=i), "z": normal(1, 4, seed=i)} for i in range(4)]
    ctx = context(model, feeds)
    rewritten = perturbed(model, "w0")
    sites, _ = refit_sites(model, rewritten)
    assert named(sites)[-1] == ("b", "s", "z")
    with pytest.raises(NotApplicableError, match="'z' does not have the shape of 's'"):
        walk(model, rewritten, sites, ctx.calibration, RUNTIME)


# --- sites whose weights are not to move --------------------------------------------------------------------


def test_a_bias_site_moves_the_bias_alone(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = perturbed(model, "w2")
    before = weight(rewritten, "w2").copy()
    (solved,) = solve(model, rewritten, [site(rewritten, "h2", how="bias")], ctx)
    assert solved.ridge == math.inf
    np.testing.assert_array_equal(weight(rewritten, "w2"), before)
    x = [batch.feed for batch in ctx.calibration.fit]
    now = np.concatenate([RUNTIME.session(rewritten, taps=["h2"]).run(feed)["h2"] for feed in x])
    wanted = np.concatenate([RUNTIME.session(model, taps=["h2"]).run(feed)["h2"] for feed in x])
    np.testing.assert_allclose(now.mean(0), wanted.mean(0), atol=1e-5)
    assert abs(weight(rewritten, "b2") - weight(model, "b2")).max() > 1e-3


def test_a_kept_site_is_measured_and_left(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = perturbed(model, "w2")
    kept = {name: weight(rewritten, name).copy() for name in ("w2", "b2")}
    (solved,) = solve(model, rewritten, [site(rewritten, "h2", how="keep")], ctx)
    assert solved.ridge is None
    assert solved.error > 1e-3 * solved.variance
    for name, value in kept.items():
        np.testing.assert_array_equal(weight(rewritten, name), value)


def test_shared_weights_get_a_bias_refit_and_fixed_nodes_stay() -> None:
    body = "h1 = Gemm(x, w1, b1) r1 = Relu(h1) h2 = Gemm(r1, w, b2) r2 = Relu(h2) y = Gemm(r2, w, b3)"
    shapes = {"w1": (6, 8), "b1": (8,), "w": (8, 8), "b2": (8,), "b3": (8,)}
    model = net(body, shapes)
    rewritten = perturbed(model, "w1")
    sites, skipped = refit_sites(model, rewritten, fixed=[node_of(rewritten, "h1")])
    assert [(s.op.y, s.how) for s in sites] == [("h1", "bias"), ("h2", "bias"), ("y", "bias")]
    assert not skipped
    unbiased = net(body.replace(", b2", ""), {k: v for k, v in shapes.items() if k != "b2"})
    rewritten = perturbed(unbiased, "w1")
    sites, skipped = refit_sites(unbiased, rewritten)
    assert [(s.op.y, s.how) for s in sites] == [("h1", "refit"), ("y", "bias")]
    assert "other users" in skipped[0].reason


def test_a_fixed_node_is_a_site_where_nothing_has_changed() -> None:
    model = net("h = Gemm(x, w1, b1) r = Relu(h) y = Gemm(r, w2)", {"w1": (6, 8), "b1": (8,), "w2": (8, 3)})
    rewritten = model.copy()
    sites, skipped = refit_sites(model, rewritten, fixed=[node_of(rewritten, "h")])
    assert [(s.op.y, s.how) for s in sites] == [("h", "bias")]
    assert not skipped
    ctx = context(model, {"x": normal(64, 6)})
    (solved,) = walk(model, rewritten, sites, ctx.calibration, RUNTIME)
    assert solved.ridge is None
    assert solved.error < 1e-10
    assert rewritten.to_proto() == model.to_proto()


# --- claims about some of the batches -----------------------------------------------------------------------


def test_a_claim_is_about_some_batches_and_the_fit_about_all(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = perturbed(model, "w1")
    (solved,) = solve(model, rewritten, [site(rewritten, "h1")], ctx, ridge=1e-3)
    claim = solved.prediction()
    assert claim.batches is not None
    x = np.concatenate([b.feed["x"] for b in ctx.calibration.fit if b.index in claim.batches])
    assert 64 <= len(x) < ctx.calibration.fit.samples
    off = compute(rewritten, {"x": x}, "h1")[0].astype(np.float64) - compute(model, {"x": x}, "h1")[0]
    assert claim.error == pytest.approx((off**2).sum(1).mean(), rel=1e-4)
    off = compute(rewritten, fitted(ctx), "h1")[0].astype(np.float64) - compute(model, fitted(ctx), "h1")[0]
    assert solved.error == pytest.approx((off**2).sum(1).mean(), rel=1e-4)
    assert solved.error != pytest.approx(claim.error, rel=1e-4)


@pytest.mark.parametrize("wrong", ["claim", "weight", "batches"])
def test_what_is_wrong_shows_on_the_claimed_batches(wrong: str, dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    rewritten = perturbed(model, "w1")
    (solved,) = solve(model, rewritten, [site(rewritten, "h1")], ctx, ridge=1e-3)
    claim = solved.prediction()
    assert claim.batches is not None
    if wrong == "claim":
        claim = replace(claim, error=1.01 * claim.error)
    elif wrong == "batches":
        claim = replace(claim, batches=tuple(number + 1 for number in claim.batches))
    else:
        values = weight(rewritten, "w1").copy()
        values.flat[np.abs(values).argmin()] += 1e-3 * np.abs(values).max()
        rewritten.tensor("w1").values = values  # type: ignore[attr-defined]
    (check,) = check_predictions(model, rewritten, [claim], ctx.calibration, RUNTIME, ctx.seed)
    assert not check.passed
