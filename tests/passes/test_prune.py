"""`prune` against a sort, the zeros it leaves through refits, files and further runs."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from nets import (
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

from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError
from onnxfuse.ir.marks import ZEROS, promises
from onnxfuse.ir.model import Model
from onnxfuse.passes.prune import Prune, smallest_mask
from onnxfuse.passes.refit import Refit
from onnxfuse.pipeline.base import Context, Contract
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import parse_recipe

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("w0", "w1", "w2")


step = partial(one_step, Prune)
run = partial(alone, Prune)


def zeros(model: Model, *names: str) -> int:
    return sum(int((weight(model, name) == 0).sum()) for name in names or NAMES)


# Which weights ------------------------------------------------------------------------------------


def test_the_smallest_of_equal_ones_the_first() -> None:
    sizes = np.array([2, 1, 3, 1, 1, 0, 2], np.float32)
    expected = {0: [], 1: [5], 2: [1, 5], 3: [1, 3, 5], 4: [1, 3, 4, 5], 5: [0, 1, 3, 4, 5]}
    for count, places in expected.items():
        assert np.flatnonzero(smallest_mask(sizes, count)).tolist() == places
    assert smallest_mask(sizes, 7).all()
    many = np.random.default_rng(0).integers(0, 40, 1000).astype(np.float32)
    for count in (1, 17, 500, 999):
        order = np.argsort(many, kind="stable")[:count]
        np.testing.assert_array_equal(np.flatnonzero(smallest_mask(many, count)), np.sort(order))


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_so_many_of_the_smallest(scope: str, amount: float) -> None:
    model, ctx = dense()
    found = run(model, ctx, amount=amount, scope=scope, refit=False).model
    before = [np.abs(weight(model, name)).reshape(-1) for name in NAMES]
    after = [weight(found, name).reshape(-1) for name in NAMES]
    parts = [(np.concatenate(before), np.concatenate(after))] if scope == "global" else zip(before, after)  # noqa: B905
    for old, new in parts:
        count = round(amount * old.size)
        np.testing.assert_array_equal(np.flatnonzero(new == 0), np.sort(np.argsort(old)[:count]))
        stays = new != 0
        np.testing.assert_array_equal(np.abs(new[stays]), old[stays])
    assert zeros(found, "b0", "b1") == 0


def test_zeros_that_are_there_count() -> None:
    sparse = normal(20, 24, seed=9)
    sparse[:, ::2] = 0
    model, ctx = dense(w1=sparse)
    total = sum(weight(model, name).size for name in NAMES)
    found = run(model, ctx, amount=0.5).model
    assert zeros(found) == round(0.5 * total)
    result = run(model, ctx, amount=0.3)
    assert not result.changes
    assert result.notes == ["as many weights are zero already"]
    layer = run(model, ctx, amount=0.4, scope="layer")
    assert [change.detail["weight"] for change in layer.changes if "zeros" in change.detail] == ["w0", "w2"]
    np.testing.assert_array_equal(weight(layer.model, "w1") == 0, sparse == 0)


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_floating_types_keep_their_type(dtype: str) -> None:
    kind = np.dtype("float64" if dtype == "double" else dtype)
    model = net(
        "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)",
        {"w1": normal(6, 24).astype(kind), "w2": normal(24, 12).astype(kind)},
        f"{dtype}[N,6] x",
        f"{dtype}[A,B] y",
    )
    found, report = step(model, context(model, {"x": normal(200, 6).astype(kind)}), amount=0.5)
    assert report.committed, report.reason
    assert {t.dtype for t in found.initializers} == {kind}
    assert zeros(found, "w1", "w2") == round(0.5 * (6 * 24 + 24 * 12))


# Errors, biases, what is behind -------------------------------------------------------------------


@pytest.mark.parametrize("refit", [False, True])
def test_every_pruned_operator_comes_with_its_error(refit: bool) -> None:
    model, ctx = dense()
    found, report = step(model, ctx, amount=0.6, refit=refit)
    assert report.committed, report.reason
    assert report.contract is Contract.APPROXIMATE
    assert [claim.tensor for claim in report.predictions] == ["a", "h", "y"]
    for claim, change in zip(report.predictions, report.changes, strict=True):
        a, b = (rows(compute(m, claimed(ctx, claim), claim.tensor)[0]) for m in (model, found))
        assert claim.error == pytest.approx(((a - b) ** 2).sum(1).mean(), rel=1e-4)
        a, b = (rows(compute(m, fitted(ctx), claim.tensor)[0]) for m in (model, found))
        off, base = (rows(compute(m, held(ctx), claim.tensor)[0]) for m in (found, model))
        relative = ((off - base) ** 2).sum(1).mean() / base.var(0).sum()
        assert change.detail["relative_error"] == pytest.approx(relative, rel=1e-3)
        if refit and claim.tensor == "h":  # y has no bias, and no other does better for a
            np.testing.assert_allclose(b.mean(0), a.mean(0), atol=1e-5)
    assert zeros(found) == round(0.6 * (24 * 6 + 20 * 24 + 20 * 3))
    assert (weight(found, "b1") == weight(model, "b1")).all() != refit
    json.dumps([dict(change.detail) for change in report.changes])
    (note,) = report.notes
    assert (
        note == "410 of 684 weights are zero: neither latency nor the plain file shrinks, the packed one does"
    )


def test_operators_that_are_not_pruned_are_refitted_and_those_before_stay() -> None:
    model, ctx = dense()
    found, report = step(model, ctx, amount=0.6, only="h")
    assert report.committed, report.reason
    assert zeros(found, "w1") == round(0.6 * 480)
    np.testing.assert_array_equal(weight(found, "w0"), weight(model, "w0"))
    assert not np.array_equal(weight(found, "w2"), weight(model, "w2"))
    assert [change.nodes for change in report.changes] == [("h",), ("y",)]
    plain, _ = step(model, ctx, amount=0.6, only="h", refit=False)
    np.testing.assert_array_equal(weight(plain, "w2"), weight(model, "w2"))

    def error(other: Model) -> float:
        a, b = (compute(m, held(ctx))[0] for m in (model, other))
        return float(((a - b) ** 2).sum())

    assert error(found) < error(plain)


def test_without_an_amount_it_goes_as_far_as_the_bound_allows() -> None:
    model, ctx = dense()
    counts = [0]
    for bound in (0.2, 0.5):
        ctx.max_error = bound
        found, report = step(model, ctx)
        assert report.committed, report.reason
        assert report.verification is not None
        assert report.verification.output_error is not None
        assert report.verification.output_error.worst <= bound
        assert f"held-out output error within {bound:g} (--max-error); with " in report.notes[0]
        counts.append(zeros(found))
    assert counts[0] < counts[1] < counts[2]
    ctx.max_error = 1e-5
    found, report = step(model, ctx)
    assert found is model
    assert report.notes == ("not even 0.05 of the weights zero is within 1e-05 (--max-error)",)
    alone = Context(model, Calibration.open({"x": normal(64, 6)}, model, held_out=0.0), RUNTIME)
    assert "give amount instead" in run(model, alone).notes[0]


def test_a_bound_that_is_broken_rolls_it_back() -> None:
    model, ctx = dense()
    ctx.max_error = 1e-3
    found, report = step(model, ctx, amount=0.9)
    assert not report.committed
    assert report.exit_code == 1
    assert found is model


# Zeros stay ---------------------------------------------------------------------------------------


def test_marks_and_zeros_survive_files_refits_and_further_runs(tmp_path: Path) -> None:
    model, ctx = dense()
    first = Prune(amount=0.6).partly(0.5)
    assert first is not None
    assert first.options.amount == 0.3
    once = PassManager([first]).run(model, ctx).model
    once.save(tmp_path / "once.onnx")
    once = Model.load(tmp_path / "once.onnx")
    assert [promises(n) for n in once.nodes if n.op == "Gemm"] == [{ZEROS}] * 3
    outcome = PassManager([Prune(amount=0.6), Refit(), Prune(amount=0.4)]).run(once, ctx)
    assert all(report.committed for report in outcome.steps)
    assert zeros(outcome.model) == round(0.6 * 684)
    for name in NAMES:
        assert (weight(outcome.model, name)[weight(once, name) == 0] == 0).all()
    assert not outcome.steps[2].changes


def test_the_packed_file_is_smaller(tmp_path: Path) -> None:
    model = Model.load(MODELS / "digits_mlp.onnx")
    ctx = Context(model, Calibration.open(MODELS / "digits_mlp.npz", model, limit=200), RUNTIME)
    found, report = step(model, ctx, amount=0.8, refit=False)
    assert report.committed, report.reason
    model.save(tmp_path / "a.onnx")
    found.save(tmp_path / "b.onnx")
    a, b = ((tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert abs(len(b) - len(a)) < 2000
    assert len(gzip.compress(b)) < 0.5 * len(gzip.compress(a))
    assert Prune.packed
    assert not Refit.packed


# Which operators ----------------------------------------------------------------------------------


def test_a_tied_weight_is_pruned_once_for_all_its_users() -> None:
    model = net(
        """h = MatMul(x, w) hb = Add(h, c) r = Relu(hb) k = MatMul(r, w) q = Relu(k)
        v = Gemm(q, u) t = Relu(v) y = Gemm(t, u)""",
        {"w": (12, 12), "c": (12,), "u": (12, 12)},
        "float[N,12] x",
    )
    ctx = context(model, {"x": normal(200, 12)})
    found, report = step(model, ctx, amount=0.5)
    assert report.committed, report.reason
    assert [c.nodes for c in report.changes] == [("h", "k"), ("v", "y")]
    assert [claim.tensor for claim in report.predictions] == ["hb", "k", "v", "y"]
    assert zeros(found, "w", "u") == 144
    assert {t.name for t in found.initializers} == {"w", "c", "u"}


def test_a_gemms_alpha_does_not_part_tied_weights() -> None:
    model = net(
        "h = Gemm<alpha=0.5>(x, w, b) r = Relu(h) y = Gemm<alpha=2.0>(r, w, c)",
        {"w": (6, 6), "b": (6,), "c": (6,)},
    )
    found, report = step(model, context(model, {"x": normal(200, 6)}), amount=0.5)
    assert report.committed, report.reason
    assert {t.name for t in found.initializers} == {"w", "b", "c"}
    assert zeros(found, "w") == 18


def test_what_is_refused() -> None:
    model = net(
        """e = Gather(w, i) s = ReduceMean<axes=[1],keepdims=0>(e) h = Gemm(s, w) r = Relu(h) k = Gemm(r, v)
        m = MatMul(k, h) z = Relu(m)
        y = If(flag) <then_branch = t () => (float[A,B] p) { p = MatMul(z, v) },
                      else_branch = f () => (float[A,B] q) { q = Identity(z) }>""",
        {"w": (6, 6), "v": (6, 6)},
        x="int64[N,4] i, bool flag",
    )
    feeds = [{"i": np.random.default_rng(k).integers(0, 6, (6, 4)), "flag": np.array(True)} for k in range(6)]
    result = run(model, context(model, feeds), amount=0.5)
    assert not result.changes
    assert {skip.nodes[0]: skip.reason for skip in result.skipped} == {
        "h": "its weight is also used by 'e' (Gather)",
        "k": "its weight is also used by a body of 'y' (If)",
        "m": "the weight of MatMul is computed, not constant",
    }
    assert result.notes == ["no weight of this model can be pruned"]


def test_convolutions_with_groups_and_all_else() -> None:
    model = net(
        """a = Conv<pads=[1,1,1,1], group=2, strides=[2,1]>(x, w0) n = BatchNormalization(a, g, b, m, v)
        r = Relu(n) d = Conv<pads=[2,2,2,2], group=8, dilations=[2,2]>(r, w1, b1) s = Add(d, r)
        y = Conv(s, w2)""",
        {
            "w0": (8, 2, 3, 3),
            "g": np.ones(8, np.float32),
            "b": normal(8),
            "m": normal(8),
            "v": np.ones(8, np.float32),
            "w1": (8, 1, 3, 3),
            "b1": (8,),
            "w2": (3, 8, 1, 1),
        },
        "float[N,4,H,W] x",
        "float[A,B,C,D] y",
    )
    ctx = context(model, {"x": normal(40, 4, 9, 8)})
    found, report = step(model, ctx, amount=0.4, scope="layer")
    assert report.committed, report.reason
    for name in ("w0", "w1", "w2"):
        assert zeros(found, name) == round(0.4 * weight(model, name).size)
    assert [claim.tensor for claim in report.predictions] == ["a", "s", "y"]


def test_a_transformer() -> None:
    model = Model.load(MODELS / "tiny_transformer.onnx")
    ctx = Context(model, Calibration.open(MODELS / "tiny_transformer.npz", model, limit=120), RUNTIME)
    found, report = step(model, ctx, amount=0.3, only="*layers.3*", mask="attention_mask")
    assert report.committed, report.reason
    assert len([change for change in report.changes if "zeros" in change.detail]) == 6
    assert {claim.mask for claim in report.predictions} >= {"attention_mask"}
    again, _ = step(model, ctx, amount=0.3, only="*layers.3*", mask="attention_mask")
    protos = [m.to_proto().SerializeToString(deterministic=True) for m in (found, again)]
    assert protos[0] == protos[1]


def test_options() -> None:
    (pass_,) = parse_recipe("prune:amount=0.5,scope=layer")
    assert pass_.options.model_dump()["scope"] == "layer"
    assert Prune().partly(0.5) is None
    for text in ("prune:amount=0", "prune:amount=1", "prune:scope=all"):
        with pytest.raises(InputError):
            parse_recipe(text)
    model, ctx = dense()
    assert run(model, ctx, amount=0.5, only="z*").notes == [
        "no weight of this model with a name matching 'z*' can be pruned"
    ]


RECURRENT = """t = Transpose<perm=[1,0,2]>(x) s, h, c = LSTM<hidden_size=6>(t, w, r, b) q = Squeeze(h, i0)
    m = Gemm(q, v) y = Tanh(m)"""
OTHERS = {
    "LSTM": (
        RECURRENT,
        {"w": (1, 24, 5), "r": (1, 24, 6), "b": (1, 48), "v": (6, 3), "i0": np.array([0])},
        "wr",
        "A,B",
    ),
    "ConvTranspose": (
        "u = Unsqueeze(x, i1) a = ConvTranspose<strides=[2,2]>(u, w, b) r = Relu(a) y = Conv(r, v)",
        {"w": (1, 4, 2, 2), "b": (4,), "v": (2, 4, 1, 1), "i1": np.array([1])},
        "w",
        "A,B,C,D",
    ),
    "Einsum": (
        'a = Einsum<equation="nti,hid->nhtd">(x, w) r = Relu(a) y = Einsum<equation="nhtd,hdo->nto">(r, v)',
        {"w": (2, 5, 4), "v": (2, 4, 3)},
        "wv",
        "A,B,C",
    ),
    "stacked MatMul": (
        "u = Unsqueeze(x, i1) y = MatMul(u, w)",
        {"w": (3, 5, 4), "i1": np.array([1])},
        "w",
        "A,B,C,D",
    ),
    "weight first": ("t = Transpose<perm=[0,2,1]>(x) y = MatMul(w, t)", {"w": (4, 5)}, "w", "A,B,C"),
}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_whatever_multiplies_by_a_stored_weight(case: str, refit: bool) -> None:
    body, weights, names, places = OTHERS[case]
    model = net(body, weights, "float[N,7,5] x", f"float[{places}] y")
    ctx = context(model, {"x": normal(48, 7, 5)})
    found, report = step(model, ctx, amount=0.4, scope="layer", refit=refit)
    assert report.committed, report.reason
    assert not report.skipped
    for name in names:
        assert zeros(found, name) == round(0.4 * weight(model, name).size)
        same = weight(found, name) == weight(model, name)
        np.testing.assert_array_equal(weight(found, name)[~same], 0)
    for change in report.changes:
        assert 0 < change.detail["relative_error"] < 10
    claims = {claim.tensor: claim for claim in report.predictions}
    for tensor, claim in claims.items():
        old, new = (compute(m, claimed(ctx, claim), tensor)[0] for m in (model, found))
        axis = claim.channel_axis
        wanted = np.square((new - old).astype(np.float64)).sum(axis).mean()
        assert claim.error == pytest.approx(wanted, rel=1e-3)
    assert {node.op for node in found.nodes if promises(node)} >= {case.split()[-1]} & {"LSTM", "Einsum"}
