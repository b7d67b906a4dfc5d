"""merge: which layers share, what weight they get, and what the pass claims."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import claimed, claimed_feeds, columns, compute, context, fitted, held, net, normal, weight

from onnxfuse import retrain
from onnxfuse.errors import InputError, NotApplicableError, VerificationError
from onnxfuse.findings import Reached
from onnxfuse.fitting.trials import Trials
from onnxfuse.ir.marks import GRADIENT_KEY
from onnxfuse.ir.model import Model
from onnxfuse.numerics.similarity import freeze_share
from onnxfuse.numerics.weight_sharing import RIDGE
from onnxfuse.passes.merge import Merge
from onnxfuse.passes.prune import Prune
from onnxfuse.pipeline.base import Context, Contract
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import make_pass
from onnxfuse.pipeline.records import StepReport
from onnxfuse.pytorch.bridge.importer import to_torch

CHAIN = """h0 = Gemm(x, w0, b0) r0 = Relu(h0) h1 = Gemm(r0, w1, b1) r1 = Relu(h1) h2 = Gemm(r1, w2, b2)
    r2 = Relu(h2) h3 = Gemm(r2, w3, b3) r3 = Relu(h3) y = Gemm(r3, w4, b4)"""


def chain(width: int = 8, **own: np.ndarray) -> Model:
    """Five dense layers, three of them of one shape."""
    weights: dict[str, Any] = {"w0": (6, width), "w4": (width, 4), "b4": (4,)}
    for number in range(1, 4):
        weights |= {f"w{number}": (width, width), f"b{number}": (width,)}
    weights["b0"] = (width,)
    return net(CHAIN, {**weights, **own})


def run(model: Model, ctx: Context, **options: Any) -> tuple[Model, StepReport]:
    outcome = PassManager([Merge(**options)]).run(model, ctx)
    (step,) = outcome.steps
    return outcome.model, step


def done(model: Model, ctx: Context, **options: Any) -> tuple[Model, StepReport]:
    made, step = run(model, ctx, **options)
    assert step.committed, step.reason
    return made, step


def sharing(model: Model) -> list[set[str]]:
    """Outputs of the operators that read one weight, where several do."""
    users: dict[str, set[str]] = {}
    for node in model.nodes:
        if node.op in ("Gemm", "MatMul", "Conv"):
            users.setdefault(node.inputs[1].name, set()).add(node.outputs[0].name)
    return [nodes for nodes in users.values() if len(nodes) > 1]


@pytest.fixture(scope="module")
def dense() -> tuple[Model, Context]:
    model = chain()
    return model, context(model, {"x": normal(400, 6, seed=7)}, batch_size=50)


PLAIN = {"align": False, "refit": False}


# --- the shared weight --------------------------------------------------------------------------------------


def test_mean(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made, step = done(model, ctx, layers=0.2, mode="mean", criterion="euclidean", **PLAIN)
    (pair,) = sharing(made)
    numbers = sorted(name[1] for name in pair)
    a, b = (weight(model, f"w{n}") for n in numbers)
    (name,) = {node.inputs[1].name for node in made.nodes if node.outputs[0].name in pair}
    np.testing.assert_allclose(weight(made, name), (a + b) / 2, rtol=1e-6)
    (bias,) = {node.inputs[2].name for node in made.nodes if node.outputs[0].name in pair}
    expected = (weight(model, f"b{numbers[0]}") + weight(model, f"b{numbers[1]}")) / 2
    np.testing.assert_allclose(weight(made, bias), expected, rtol=1e-6)
    assert step.after.parameters == step.before.parameters - a.size - 8
    assert step.after.nodes == step.before.nodes
    assert any("latency does not" in note for note in step.notes)


def test_freeze_keeps_the_layer_nearest_to_the_middle(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made, _ = done(model, ctx, layers=0.4, mode="freeze", criterion="euclidean", **PLAIN)
    assert sharing(made) == [{"h1", "h2", "h3"}]
    node = next(node for node in made.nodes if node.outputs[0].name == "h1")
    assert node.inputs[1].name == "w2"
    np.testing.assert_array_equal(weight(made, "w2"), weight(model, "w2"))


def test_freeze_has_the_gradients_of_equation_6(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made, _ = done(model, ctx, layers=0.2, mode="freeze", criterion="euclidean", **PLAIN)
    (pair,) = sharing(made)
    shares = {
        node.outputs[0].name: float(node.metadata[GRADIENT_KEY])
        for node in made.nodes
        if GRADIENT_KEY in node.metadata
    }
    assert shares.keys() == pair
    assert sum(shares.values()) == pytest.approx(1)
    (kept,) = {node.inputs[1].name for node in made.nodes if node.outputs[0].name in pair}
    (other,) = {f"w{name[1]}" for name in pair} - {kept}
    gamma = freeze_share(weight(model, kept).T, weight(model, other).T)
    assert shares[f"h{kept[1]}"] == pytest.approx(gamma, rel=1e-4)


def test_mix_draws_every_number_from_one_of_them(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made, _ = done(model, ctx, layers=0.4, mode="mix", criterion="euclidean", **PLAIN)
    mixed = weight(made, "w2")
    own = np.stack([weight(model, f"w{n}") for n in (1, 2, 3)])
    from_each = (mixed == own).reshape(3, -1)
    assert from_each.any(0).all()
    assert (from_each.mean(1) > 0.15).all()
    again, _ = done(model, ctx, layers=0.4, mode="mix", criterion="euclidean", **PLAIN)
    np.testing.assert_array_equal(weight(again, "w2"), mixed)


@pytest.mark.parametrize("mode", ["mean", "freeze"])
def test_torch_has_one_parameter_that_stays_one(dense: tuple[Model, Context], mode: str) -> None:
    model, ctx = dense
    made, _ = done(model, ctx, layers=0.4, mode=mode, criterion="euclidean")
    module = to_torch(made)
    names = dict(module.named_parameters())
    assert {"w0", "w2", "w4"} == {name for name in names if name.startswith("w")}
    x = fitted(ctx)["x"]
    result = retrain(made, {"x": x}, teacher=model, epochs=2, lr=3e-3)
    assert result.ok, result.reason
    assert sharing(result.model) == [{"h1", "h2", "h3"}]
    assert np.abs(weight(result.model, "w2") - weight(made, "w2")).max() > 1e-4
    before, after = (
        np.square(compute(own, held(ctx))[0] - compute(model, held(ctx))[0]).mean()
        for own in (made, result.model)
    )
    assert after < before


def test_fit_is_the_regression_on_all_inputs(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made, _ = done(model, ctx, layers=0.4, mode="fit", criterion="euclidean", **PLAIN)
    x = fitted(ctx)
    inputs = dict(zip("123", compute(model, x, "r0", "r1", "r2"), strict=True))
    mean = np.mean([weight(model, f"w{n}") for n in inputs], axis=0).astype(np.float64)
    left, right, energy = [], [], 0.0
    for n, rows_ in inputs.items():
        centred = rows_.astype(np.float64) - rows_.mean(0)
        own = centred @ weight(model, f"w{n}").astype(np.float64)
        scale = np.sqrt((own**2).sum())
        left.append(centred / scale)
        right.append(own / scale)
        energy += (centred**2).sum() / scale**2
    pull = np.sqrt(RIDGE * energy / 8)
    expected = np.linalg.lstsq(
        np.vstack([*left, pull * np.eye(8)]), np.vstack([*right, pull * mean]), rcond=None
    )[0]
    np.testing.assert_allclose(weight(made, "w2"), expected, atol=2e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_fit_of_convolutions(groups: int) -> None:
    body = f"""c0 = Conv<pads=[1,1,1,1]>(x, k0) r0 = Relu(c0)
        c1 = Conv<pads=[1,1,1,1], group={groups}>(r0, k1) r1 = Relu(c1)
        c2 = Conv<pads=[2,2,2,2], dilations=[2,2], group={groups}>(r1, k2) r2 = Relu(c2) y = Conv(r2, k3)"""
    shapes = {
        "k0": (4, 3, 3, 3),
        "k1": (4, 4 // groups, 3, 3),
        "k2": (4, 4 // groups, 3, 3),
        "k3": (2, 4, 1, 1),
    }
    model = net(body, shapes, x="float[N,3,6,6] x", y="float[A,B,C,D] y")
    ctx = context(model, {"x": normal(40, 3, 6, 6, seed=2)})
    made, step = done(model, ctx, layers=0.25, criterion="euclidean", **PLAIN)
    x = fitted(ctx)
    one, two = compute(model, x, "r0", "r1")
    off = []
    for inputs, name, spread in ((one, "k1", 1), (two, "k2", 2)):
        wide = np.zeros((4, 4, 1 + 2 * spread, 1 + 2 * spread))  # a dilated kernel as a plain one
        target = wide.copy()
        for out in range(4):
            inside = slice((out * groups // 4) * 4 // groups, (out * groups // 4 + 1) * 4 // groups)
            wide[out, inside, ::spread, ::spread] = weight(made, "k1")[out]
            target[out, inside, ::spread, ::spread] = weight(model, name)[out]
        patches = columns(inputs, wide.shape[2:], (1, 1), (spread,) * 4)
        patches -= patches.mean(0)
        wanted = patches @ target.reshape(4, -1).T
        off.append(((patches @ wide.reshape(4, -1).T - wanted) ** 2).sum() / (wanted**2).sum())
    mean = done(model, ctx, layers=0.25, criterion="euclidean", mode="mean", **PLAIN)[1]
    assert sum(off) < 2
    errors = [sum(p.error / p.variance for p in own.predictions[:2]) for own in (step, mean)]
    assert errors[0] < errors[1]


# --- claims -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fit", "mean", "freeze", "mix"])
@pytest.mark.parametrize("refit", [True, False])
def test_every_layer_that_shares_has_an_error_that_is_measured(
    dense: tuple[Model, Context], mode: str, refit: bool
) -> None:
    model, ctx = dense
    made, step = done(model, ctx, layers=0.4, mode=mode, refit=refit, criterion="aligned")
    assert step.contract is Contract.APPROXIMATE
    claims = {claim.tensor: claim for claim in step.predictions}
    assert {"h1", "h2", "h3"} <= claims.keys()
    for claim in claims.values():
        ours, theirs = (compute(own, claimed(ctx, claim), claim.tensor)[0] for own in (made, model))
        if claim.channels is not None:
            theirs = theirs[:, list(claim.channels)]
        error = ((ours.astype(np.float64) - theirs) ** 2).sum(1).mean()
        assert claim.error == pytest.approx(error, rel=1e-3, abs=1e-9)


def test_refit_mends(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    errors = [
        done(model, ctx, layers=0.4, criterion="euclidean", refit=refit)[1].verification.output_error.worst
        for refit in (False, True)
    ]
    assert errors[1] < 0.8 * errors[0]
    made, _ = done(model, ctx, layers=0.4, criterion="euclidean")
    assert sharing(made) == [{"h1", "h2", "h3"}]
    biases = [node.inputs[2].name for node in made.nodes if node.outputs[0].name in ("h1", "h2", "h3")]
    assert len(set(biases)) == 3


def test_on_one_input_fit_has_the_least_error_of_all() -> None:
    """Two layers that read the same: what the others leave is more than the regression does."""
    body = "a = Gemm(x, wa, ba) b = Gemm(x, wb, bb) ra = Relu(a) sb = Tanh(b) s = Add(ra, sb) y = Gemm(s, w)"
    model = net(body, {"wa": (6, 5), "ba": (5,), "wb": (6, 5), "bb": (5,), "w": (5, 3)})
    x = normal(300, 6) @ normal(6, 6, seed=3)
    ctx = context(model, {"x": x})
    errors = {}
    for mode in ("fit", "mean", "freeze", "mix"):
        _, step = done(model, ctx, layers=0.3, criterion="euclidean", mode=mode, align=False)
        claims = [claim for claim in step.predictions if claim.tensor in "ab"]
        errors[mode] = sum(claim.error / claim.variance for claim in claims)
    assert min(errors, key=lambda mode: errors[mode]) == "fit"


# --- which layers -------------------------------------------------------------------------------------------


def test_twins_come_first_by_every_criterion() -> None:
    base = normal(8, 8, seed=5) / 3
    near = base + 0.01 * normal(8, 8, seed=6)
    model = chain(w1=base.astype(np.float32), w3=near.astype(np.float32))
    ctx = context(model, {"x": normal(200, 6)})
    for criterion in ("euclidean", "covariance", "kl", "wasserstein", "aligned", "centroids", "output"):
        made, _ = done(model, ctx, layers=0.2, criterion=criterion)
        assert sharing(made) == [{"h1", "h3"}], criterion
    made, _ = done(model, ctx, layers=0.2, criterion="euclidean", pairs="adjacent")
    assert {"h1", "h3"} not in sharing(made)


def test_by_output_the_pair_that_changes_it_least(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made, _ = done(model, ctx, layers=0.2, mode="mean", align=False)
    (pair,) = sharing(made)
    trials = Trials.of(ctx, 768)
    changes = {}
    for a, b in (("1", "2"), ("1", "3"), ("2", "3")):
        trial = model.copy()
        mean = (weight(model, f"w{a}") + weight(model, f"w{b}")) / 2
        for n in (a, b):
            trial.set_weight(trial.tensor(f"w{n}"), mean)
        changes[frozenset((f"h{a}", f"h{b}"))] = trials.changes([trial], lambda own: own, ctx, model)[0]
    assert frozenset(pair) == min(changes, key=lambda own: changes[own])


def test_where_parameters_count_it_is_the_loss_for_each() -> None:
    """Two small layers lose less than two large ones, and save less: what is asked for decides."""
    body = """l0 = Gemm(x, w0) l1 = Gemm(l0, wa) m1 = Relu(l1) l2 = Gemm(m1, wb) l3 = Gemm(l2, w3)
        s0 = Gemm(x, v0) s1 = Gemm(s0, va) r1 = Relu(s1) s2 = Gemm(r1, vb) s3 = Gemm(s2, v3)
        y = Add(l3, s3)"""
    large, small = normal(24, 24, seed=1) / 5, normal(4, 4, seed=2) / 2
    weights = {"w0": (6, 24), "wa": large, "wb": large + normal(24, 24, seed=3) / 250, "w3": (24, 3)}
    weights |= {"v0": (6, 4), "va": small, "vb": small + normal(4, 4, seed=4) / 250, "v3": (4, 3)}
    model = net(body, {name: np.float32(w) if not isinstance(w, tuple) else w for name, w in weights.items()})
    ctx = context(model, {"x": normal(300, 6)})
    assert sharing(done(model, ctx, layers=0.13)[0]) == [{"s1", "s2"}]
    exact = partial(done, model, ctx, refit=False)  # a refit would add biases
    assert sharing(exact(params=0.99)[0]) == [{"s1", "s2"}]  # 16 of 1436 are 0.011
    assert sharing(exact(params=0.61)[0]) == [{"l1", "l2"}]  # 576 are 0.401


def test_hidden_channels_in_another_order_are_no_difference() -> None:
    """The second block is the first, shuffled: aligned, the two share without any error."""
    order = np.random.default_rng(1).permutation(10)
    one = {"wa": normal(8, 10, seed=1) / 3, "va": normal(10, 8, seed=2) / 6}
    two = {"wb": one["wa"][:, order], "vb": one["va"][order]}
    body = """h = Gemm(x, w0) a = Gemm(h, wa) ra = Relu(a) oa = Gemm(ra, va) s = Add(oa, h)
        b = Gemm(s, wb) rb = Relu(b) ob = Gemm(rb, vb) t = Add(ob, s) y = Gemm(t, w1)"""
    model = net(body, {"w0": (6, 8), **one, **two, "w1": (8, 4)})
    ctx = context(model, {"x": normal(200, 6)})
    made, step = done(model, ctx, layers=0.3, criterion="aligned")
    assert sharing(made) == [{"a", "b"}, {"oa", "ob"}]
    assert step.verification.comparison is not None  # that the new order changes nothing
    assert step.verification.output_error.worst < 1e-4
    _, step = done(model, ctx, layers=0.3, criterion="aligned", align=False)
    assert step.verification.output_error.worst > 0.05


def test_attention_shares_each_with_its_like() -> None:
    models = Path(__file__).parents[2] / "models"
    model = Model.load(models / "tiny_transformer.onnx")
    ctx = context(model, dict(_arrays(models / "tiny_transformer.npz", 96)), batch_size=32)
    made, step = done(model, ctx, layers=0.7, criterion="wasserstein", refit=False)
    for change in step.changes:
        parts = {name.split("/")[1].split(".")[-1] for name in change.nodes}
        assert len(parts) == 1, parts
    assert {change.detail["role"] for change in step.changes} >= {"query", "key", "value", "output"}
    assert made.outputs[0].name == "logits"


def _arrays(path: Path, count: int) -> Mapping[str, np.ndarray]:
    with np.load(path) as data:
        return {name: data[name][:count] for name in data.files if name != "labels"}


# --- budgets ------------------------------------------------------------------------------------------------


def test_parameters(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    _, step = done(model, ctx, params=0.8)
    left = step.after.parameters / step.before.parameters
    assert 0.6 < left <= 0.8
    assert step.reached == Reached("params", "parameters", False, 0.8, left)
    _, refused = run(model, ctx, params=0.2)
    assert not refused.committed
    assert refused.exit_code == VerificationError.exit_code
    assert "when all share that can" in refused.reason


TWO_SIZES = """h0 = Gemm(x, w0) r0 = Relu(h0) h1 = Gemm(r0, w1) r1 = Relu(h1) h2 = Gemm(r1, w2) r2 = Relu(h2)
    h3 = Gemm(r2, w3) r3 = Relu(h3) s0 = Gemm(r3, v0) t0 = Relu(s0) s1 = Gemm(t0, v1) t1 = Relu(s1)
    s2 = Gemm(t1, v2) t2 = Relu(s2) y = Gemm(t2, w)"""


@pytest.mark.parametrize("share", [0.95, 0.9, 0.8, 0.75, 0.6, 0.55])
def test_of_all_that_can_share_what_comes_nearest_to_the_budget(share: float) -> None:
    """Three large layers and two small ones: two and one give up their weights at most."""
    large, small = 12 * 12, 5 * 5
    shapes: dict[str, Any] = {"w0": (6, 12), "w": (5, 4), "v0": (12, 5), "v1": (5, 5), "v2": (5, 5)}
    model = net(TWO_SIZES, {**shapes, "w1": (12, 12), "w2": (12, 12), "w3": (12, 12)})
    ctx = context(model, {"x": normal(200, 6)})
    full = 72 + 20 + 60 + 3 * large + 2 * small
    left = {full - i * large - j * small for i in range(3) for j in range(2)}
    best = max(own for own in left if own <= share * full)
    _, step = run(model, ctx, params=share, refit=False)
    assert step.committed, step.reason
    assert step.after.parameters == pytest.approx(best, abs=0.01 * full)
    assert step.reached.reached == step.after.parameters / full
    assert ("comes nearer" in step.notes[0]) == (step.after.parameters < (share - 0.01) * full)


def test_more_layers_than_have_one_like_them(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    _, step = run(model, ctx, layers=0.8)
    assert not step.committed
    assert "4 of 5 layers" in step.reason or "only 2 have another" in step.reason


def test_within_the_error_bound() -> None:
    base = normal(8, 8, seed=5) / 3
    model = chain(w1=base, w3=(base + 0.02 * normal(8, 8, seed=6)).astype(np.float32))
    ctx = context(model, {"x": normal(200, 6)})
    made, step = done(model, ctx)
    assert sharing(made) == [{"h1", "h3"}]
    assert step.verification.output_error.worst <= 0.1
    assert "1 layers lost" in step.notes[0] or "with one more" in step.notes[0]
    _, none = run(chain(), context(chain(), {"x": normal(200, 6)}, max_error=1e-6))
    assert not none.changes
    assert "no two layers can share within 1e-06 (--max-error)" in none.notes[0]


def test_equal_weights_share_exactly() -> None:
    base = normal(8, 8, seed=5) / 3
    model = chain(w1=base, w3=base.copy())
    ctx = context(model, {"x": normal(100, 6)})
    made, step = done(model, ctx, layers=0)
    assert step.contract is Contract.EXACT
    assert sharing(made) == [{"h1", "h3"}]
    np.testing.assert_array_equal(compute(made, held(ctx))[0], compute(model, held(ctx))[0])
    _, nothing = run(chain(), context(chain(), {"x": normal(40, 6)}), layers=0)
    assert not nothing.changes


def test_in_two_steps_as_far_as_in_one(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    whole = Merge(layers=0.4, criterion="euclidean")
    half, rest = whole.partly(0.5), whole.partly(1.0, 0.5)
    outcome = PassManager([half, rest]).run(model, ctx)
    assert all(step.committed for step in outcome.steps), [step.reason for step in outcome.steps]
    assert sharing(outcome.model) == [{"h1", "h2", "h3"}]
    assert outcome.steps[0].after.parameters > outcome.steps[1].after.parameters
    budget = Merge(params=0.64)
    assert budget.partly(0.5).options.params == pytest.approx(0.82)
    assert budget.partly(1.0, 0.5).options.params == pytest.approx(0.64)  # of the model before both
    assert Merge().partly(0.5) is None


# --- kinds of graphs ----------------------------------------------------------------------------------------


def test_batch_normalisation_stays_each_layers_own() -> None:
    body = """c0 = Conv<pads=[1,1,1,1]>(x, k0) r0 = Relu(c0)
        c1 = Conv<pads=[1,1,1,1]>(r0, k1) n1 = BatchNormalization(c1, s1, o1, m1, v1) r1 = Relu(n1)
        c2 = Conv<pads=[1,1,1,1]>(r1, k2) n2 = BatchNormalization(c2, s2, o2, m2, v2) r2 = Relu(n2)
        g = GlobalAveragePool(r2) f = Flatten(g) y = Gemm(f, w)"""
    weights: dict[str, Any] = {"k0": (4, 3, 3, 3), "k1": (4, 4, 3, 3), "k2": (4, 4, 3, 3), "w": (4, 3)}
    for n in "12":
        weights |= {f"s{n}": (4,), f"o{n}": (4,), f"m{n}": (4,), f"v{n}": np.abs(normal(4)) + 0.5}
    model = net(body, weights, x="float[N,3,6,6] x")
    ctx = context(model, {"x": normal(60, 3, 6, 6)})
    made, _ = done(model, ctx, layers=0.25)
    assert sharing(made) == [{"c1", "c2"}]
    norms = [node for node in made.nodes if node.op == "BatchNormalization"]
    assert not {t.name for t in norms[0].inputs[1:]} & {t.name for t in norms[1].inputs[1:]}


def test_tied_weights_join_as_one_layer() -> None:
    model = chain()
    model.nodes[4].inputs[1] = model.tensor("w1")  # h2 reads h1's weight
    model.prune()
    ctx = context(model, {"x": normal(200, 6)})
    made, step = done(model, ctx, layers=0.25, mode="mean", criterion="euclidean", **PLAIN)
    assert sharing(made) == [{"h1", "h2", "h3"}]
    node = next(node for node in made.nodes if node.outputs[0].name == "h1")
    expected = (2 * weight(model, "w1") + weight(model, "w3")) / 3
    np.testing.assert_allclose(weight(made, node.inputs[1].name), expected, rtol=1e-5, atol=1e-7)
    assert len(step.changes) == 1


def test_matmuls_with_their_bias_in_an_add() -> None:
    body = """m0 = MatMul(x, w0) h0 = Add(m0, b0) r0 = Relu(h0) m1 = MatMul(r0, w1) h1 = Add(b1, m1)
        r1 = Relu(h1) m2 = MatMul(r1, w2) h2 = Add(m2, b2) r2 = Relu(h2) y = MatMul(r2, w3)"""
    shapes = {"w0": (6, 5), "b0": (5,), "w1": (5, 5), "b1": (5,), "w2": (5, 5), "b2": (5,), "w3": (5, 3)}
    model = net(body, shapes, x="float[N,T,6] x", y="float[A,T,B] y")
    ctx = context(model, {"x": normal(60, 7, 6)})
    made, _ = done(model, ctx, layers=0.25, mode="mean", **PLAIN)
    adds = [node for node in made.nodes if node.outputs[0].name in ("h1", "h2")]
    (bias,) = {t.name for node in adds for t in node.inputs if made.is_weight(t)}
    np.testing.assert_allclose(weight(made, bias), (weight(model, "b1") + weight(model, "b2")) / 2, rtol=1e-6)
    made, step = done(model, ctx, layers=0.25)
    assert sharing(made) == [{"m1", "m2"}]
    assert {"h1", "h2"} <= {claim.tensor for claim in step.predictions}


def test_weights_in_constant_nodes_and_in_the_list_of_inputs() -> None:
    values = [normal(5, 5, seed=n) for n in (1, 2)]
    model = chain(width=5)
    proto = model.to_proto()
    kept = [t for t in proto.graph.initializer if t.name not in ("w1", "w2")]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, value in zip(("w1", "w2"), values, strict=True):
        node = onnx.helper.make_node(
            "Constant", [], [name], name=name, value=onnx.numpy_helper.from_array(value, name)
        )
        proto.graph.node.insert(0, node)
    listed = onnx.helper.make_tensor_value_info("w3", onnx.TensorProto.FLOAT, [5, 5])
    proto.graph.input.append(listed)
    model = Model.load(proto)
    ctx = context(model, {"x": normal(200, 6)})
    made, step = run(model, ctx, layers=0.4, mode="mean", criterion="euclidean")
    assert step.committed, step.reason
    assert sharing(made) == [{"h1", "h2", "h3"}]
    again = Model.load(made.to_proto())
    np.testing.assert_array_equal(compute(again, held(ctx))[0], compute(made, held(ctx))[0])


def test_a_weight_that_others_read_stays() -> None:
    shapes = {"w0": (6, 8), "w4": (8, 4), "b4": (4,), "b0": (8,)}
    shapes |= {f"{n}{i}": (8, 8) if n == "w" else (8,) for i in range(1, 4) for n in "wb"}
    model = net(CHAIN + " q = Gather(w1, i) ", {**shapes, "i": np.array([1])}, y="float[A,B] y, float[C,D] q")
    ctx = context(model, {"x": normal(100, 6)})
    made, step = done(model, ctx, layers=0.2)
    assert sharing(made) == [{"h2", "h3"}]
    assert any(skip.nodes == ("h1",) and "Gather" in skip.reason for skip in step.skipped)


def test_only(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made, _ = done(model, ctx, layers=0.5, only="h[12]")
    assert sharing(made) == [{"h1", "h2"}]
    _, step = run(model, ctx, only="nothing*")
    assert "no two layers with names matching 'nothing*'" in step.notes[0]


def test_too_many_pairs_to_try(dense: tuple[Model, Context], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ctx = dense
    monkeypatch.setattr("onnxfuse.passes.merge.MOST_TRIALS", 2)
    _, step = run(model, ctx, layers=0.2)
    assert step.exit_code == NotApplicableError.exit_code
    assert "give a criterion on weights" in step.reason


def test_float16() -> None:
    model = chain()
    proto = model.to_proto()
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    half = Model.load(proto)
    ctx = context(half, {"x": normal(200, 6).astype(np.float16)})
    made, step = run(half, ctx, layers=0.2)
    assert step.committed, step.reason
    (pair,) = sharing(made)
    name = next(node for node in made.nodes if node.outputs[0].name in pair).inputs[1].name
    assert weight(made, name).dtype == np.float16


def test_equal_seeds_give_equal_bytes(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    made = [run(model, ctx, layers=0.4)[0].to_proto().SerializeToString() for _ in range(2)]
    assert made[0] == made[1]


PAD = "pads=[1,1,1,1]"
KINDS: dict[str, tuple[str, dict[str, Any], str, set[str]]] = {
    "residual blocks": (
        f"""c = Conv<{PAD}>(x, k0) a1 = Conv<{PAD}>(c, ka) r1 = Relu(a1) b1 = Conv<{PAD}>(r1, kb)
        s1 = Add(b1, c) a2 = Conv<{PAD}>(s1, kc) r2 = Relu(a2) b2 = Conv<{PAD}>(r2, kd) s2 = Add(b2, s1)
        y = Conv(s2, k1)""",
        {"k0": (5, 4, 3, 3), "ka": (6, 5, 3, 3), "kb": (5, 6, 3, 3), "kc": (6, 5, 3, 3), "kd": (5, 6, 3, 3),
         "k1": (2, 5, 1, 1)},
        "float[N,4,5,6] x",
        {"a1", "a2"},
    ),
    "depthwise": (
        f"""c = Conv<{PAD}, group=4>(x, ka, ba) r = Relu(c) d = Conv<pads=[1,1,1,1], group=4>(r, kb, bb)
        q = Relu(d) y = Conv(q, k1)""",
        {"ka": (4, 1, 3, 3), "ba": (4,), "kb": (4, 1, 3, 3), "bb": (4,), "k1": (2, 4, 1, 1)},
        "float[N,4,5,6] x",
        {"c", "d"},
    ),
    "grouped, other strides and pads": (
        """c = Conv<pads=[1,1,1,1], group=2>(x, ka) r = Relu(c)
        d = Conv<pads=[0,0,0,0], strides=[2,2], group=2>(r, kb) q = Relu(d) y = Conv(q, k1)""",
        {"ka": (4, 2, 3, 3), "kb": (4, 2, 3, 3), "k1": (2, 4, 1, 1)},
        "float[N,4,7,7] x",
        {"c", "d"},
    ),
    "side by side": (
        f"""a = Conv<{PAD}>(x, ka) b = Conv<{PAD}>(x, kb) r = Relu(a) q = Relu(b) c = Concat<axis=1>(r, q)
        y = Conv(c, k1)""",
        {"ka": (3, 4, 3, 3), "kb": (3, 4, 3, 3), "k1": (2, 6, 1, 1)},
        "float[N,4,5,6] x",
        {"a", "b"},
    ),
    "flattened": (
        """f = Flatten(x) a = Gemm<transB=1>(f, wa, ba) r = Relu(a) b = Gemm<transB=1>(f, wb, bb) t = Tanh(b)
        m = Mul(r, t) y = Gemm(m, w)""",
        {"wa": (5, 24), "ba": (5,), "wb": (5, 24), "bb": (5,), "w": (5, 3)},
        "float[N,4,2,3] x",
        {"a", "b"},
    ),
    "one axis": (
        "c = Conv<pads=[1,1]>(x, ka) r = Relu(c) d = Conv<pads=[1,1]>(r, kb) q = Relu(d) y = Conv(q, k1)",
        {"ka": (4, 4, 3), "kb": (4, 4, 3), "k1": (2, 4, 1)},
        "float[N,4,9] x",
        {"c", "d"},
    ),
    "a branch that captures": (
        """a = Gemm(x, wa) r = Relu(a) s = ReduceMean<keepdims=0>(r) z = Constant<value_float=0.0>()
        g = Greater(s, z) c = If(g) <then_branch = t () => (float[A,B] p) { p = Relu(r) },
            else_branch = e () => (float[A,B] q) { q = Neg(r) }>
        b = Gemm(c, wb) q2 = Relu(b) y = Gemm(q2, w)""",
        {"wa": (6, 6), "wb": (6, 6), "w": (6, 3)},
        "float[N,6] x",
        {"a", "b"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_on_every_kind_of_graph(kind: str) -> None:
    body, weights, x, expected = KINDS[kind]
    shape = [int(size) for size in x[x.index(",") + 1 : x.index("]")].split(",")]
    rank = "A,B" if "Gemm" in body else "A,B,C,D" if len(shape) > 2 else "A,B,C"
    model = net(body, weights, x=x, y=f"float[{rank}] y")
    ctx = context(model, [{"x": normal(10, *shape, seed=seed)} for seed in range(12)], held_out=0.3)
    made, step = done(model, ctx, params=0.999, criterion="aligned")
    assert expected in sharing(made)
    assert [node.op for node in made.nodes] == [node.op for node in model.nodes]
    for claim in step.predictions:
        feeds = claimed_feeds(ctx, claim)
        ours, theirs = (
            np.concatenate(
                [np.moveaxis(compute(own, feed, claim.tensor)[0], claim.channel_axis, -1) for feed in feeds]
            )
            for own in (made, model)
        )
        if claim.channels is not None:
            theirs = theirs[..., list(claim.channels)]
        error = ((ours.astype(np.float64) - theirs) ** 2).sum(-1).mean()
        assert claim.error == pytest.approx(error, rel=5e-3, abs=1e-9), claim.tensor
    for batch in (1, 3):
        feed = {"x": normal(batch, *shape, seed=5)}
        assert compute(made, feed)[0].shape == compute(model, feed)[0].shape


def test_pruned_layers_stay(dense: tuple[Model, Context]) -> None:
    model, ctx = dense
    outcome = PassManager([Prune(amount=0.3, only="h[13]"), Merge(layers=0.1)]).run(model, ctx)
    _, step = outcome.steps
    assert not step.changes
    assert [skip.nodes for skip in step.skipped if "pruned or clustered" in skip.reason] == [("h1",), ("h3",)]


def test_a_criterion_that_there_is_not_is_told_all_that_there_are() -> None:
    with pytest.raises(
        InputError, match=r"option 'criterion' should be 'euclidean', .* or 'output', not 'cosine'"
    ):
        make_pass("merge", {"criterion": "cosine"})


def test_layers_whose_error_can_not_be_predicted_stay(
    dense: tuple[Model, Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ctx = dense
    monkeypatch.setattr("onnxfuse.fitting.sites.MOST_UNKNOWNS", 7)  # each of the three like layers has 8
    made, step = run(model, ctx, layers=0.2)
    assert not sharing(made)
    assert {("h1",), ("h2",), ("h3",)} <= {s.nodes for s in step.skipped if "too many to solve" in s.reason}
    base = weight(model, "w1")
    twins = chain(w1=base, w3=base.copy())
    assert sharing(done(twins, context(twins, {"x": normal(40, 6)}), layers=0)[0]) == [{"h1", "h3"}]


def test_transposed_convolutions_are_refused() -> None:
    body = "c = ConvTranspose(x, ka) r = Relu(c) d = ConvTranspose(r, kb) q = Relu(d) y = Conv(q, k1)"
    weights = {"ka": (4, 4, 3, 3), "kb": (4, 4, 3, 3), "k1": (2, 4, 1, 1)}
    model = net(body, weights, x="float[N,4,5,6] x", y="float[A,B,C,D] y")
    _, step = run(model, context(model, {"x": normal(40, 4, 5, 6)}), params=0.9)
    assert not step.changes
    assert any("ConvTranspose can't be predicted" in skip.reason for skip in step.skipped)
