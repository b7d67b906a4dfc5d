"""`cluster`: few values, their errors, and codebooks that compute the very same weights."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from nets import (
    RUNTIME,
    alone,
    claimed,
    compute,
    context,
    dense,
    held,
    net,
    normal,
    one_step,
    rows,
    takes,
    weight,
)

from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError
from onnxfuse.ir.marks import VALUES, ZEROS, promises
from onnxfuse.ir.model import Model
from onnxfuse.numerics.kmeans import kmeans, nearest
from onnxfuse.passes.cluster import Cluster
from onnxfuse.passes.fold import Fold
from onnxfuse.passes.prune import Prune
from onnxfuse.passes.refit import Refit
from onnxfuse.pipeline.base import Context, Contract
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import parse_recipe

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("w0", "w1", "w2")


step = partial(one_step, Cluster)
run = partial(alone, Cluster)


def distinct(model: Model, name: str) -> int:
    return len(np.unique(weight(model, name)))


def output_names(model: Model, op: str) -> list[str]:
    return [node.outputs[0].name for node in model.nodes if node.op == op]


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [2, 5, 16])
def test_each_weight_gets_so_many_values(values: int) -> None:
    model, ctx = dense()
    found, report = step(model, ctx, values=values)
    assert report.committed, report.reason
    for name in NAMES:
        old, new = weight(model, name), weight(found, name)
        table = kmeans(old, values).astype(np.float32)
        np.testing.assert_array_equal(new, table[nearest(old, table)])
        assert distinct(found, name) == values
        assert new.dtype == np.float32
    assert distinct(found, "b1") == 20
    own = [change for change in report.changes if "values" in change.detail]
    assert [change.detail["values"] for change in own] == [values] * 3


def test_more_values_than_weights_change_nothing_but_are_marked() -> None:
    model, ctx = dense()
    found = run(model, ctx, values=100, refit=False).model
    np.testing.assert_array_equal(weight(found, "w2"), weight(model, "w2"))
    assert distinct(found, "w0") == 100


@pytest.mark.parametrize("dtype", ["float16", "double"])
@pytest.mark.parametrize("codebook", [False, True])
def test_other_floating_types_keep_their_type(dtype: str, codebook: bool) -> None:
    kind = np.dtype("float64" if dtype == "double" else dtype)
    model = net(
        "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)",
        {"w1": normal(6, 24).astype(kind), "w2": normal(24, 12).astype(kind)},
        f"{dtype}[N,6] x",
        f"{dtype}[A,B] y",
    )
    ctx = context(model, {"x": normal(200, 6).astype(kind)})
    found, report = step(model, ctx, values=8, codebook=codebook)
    assert report.committed, report.reason
    assert {t.dtype for t in found.initializers} == ({kind, np.dtype(np.uint8)} if codebook else {kind})


# Errors, and how far ------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_every_clustered_operator_comes_with_its_error(refit: bool, codebook: bool) -> None:
    model, ctx = dense()
    found, report = step(model, ctx, values=4, refit=refit, codebook=codebook)
    assert report.committed, report.reason
    assert report.contract is Contract.APPROXIMATE
    assert {claim.tensor for claim in report.predictions} == {"a", "h", "y"}
    for claim in report.predictions:
        a, b = (rows(compute(m, claimed(ctx, claim), claim.tensor)[0]) for m in (model, found))
        assert claim.error == pytest.approx(((a - b) ** 2).sum(1).mean(), rel=1e-4)
    by_name = {change.nodes[0]: change.detail for change in report.changes}
    off, base = (rows(compute(m, held(ctx), "y")[0]) for m in (found, model))
    relative = ((off - base) ** 2).sum(1).mean() / base.var(0).sum()
    assert by_name["y"]["relative_error"] == pytest.approx(relative, rel=1e-3)
    json.dumps([dict(detail) for detail in by_name.values()])


def test_operators_that_are_not_clustered_are_refitted() -> None:
    model, ctx = dense()
    found, report = step(model, ctx, values=3, only="h")
    assert report.committed, report.reason
    np.testing.assert_array_equal(weight(found, "w0"), weight(model, "w0"))
    assert not np.array_equal(weight(found, "w2"), weight(model, "w2"))
    plain, _ = step(model, ctx, values=3, only="h", refit=False)
    np.testing.assert_array_equal(weight(plain, "w2"), weight(model, "w2"))

    def error(other: Model) -> float:
        a, b = (compute(m, held(ctx))[0] for m in (model, other))
        return float(((a - b) ** 2).sum())

    assert error(found) < error(plain)


def test_without_a_number_as_few_values_as_the_bound_allows() -> None:
    model, ctx = dense()
    found = {}
    for bound in (0.02, 0.3):
        ctx.max_error = bound
        clustered, report = step(model, ctx)
        assert report.committed, report.reason
        assert report.verification is not None
        assert report.verification.output_error is not None
        assert report.verification.output_error.worst <= bound
        found[bound] = distinct(clustered, "w1")
        assert report.notes[0].startswith(f"{found[bound]} values: held-out output error within {bound:g}")
    assert found[0.3] < found[0.02]
    assert all(count in (2, 4, 8, 16, 32, 64, 128, 256) for count in found.values())


def test_a_bound_that_is_broken_rolls_it_back() -> None:
    model, ctx = dense()
    ctx.max_error = 1e-3
    found, report = step(model, ctx, values=2)
    assert not report.committed
    assert report.exit_code == 1
    assert found is model


def test_an_amount_takes_operators_of_least_error_first() -> None:
    few = np.random.default_rng(0).integers(0, 8, (20, 24)).astype(np.float32) / 8 - 0.5
    model, ctx = dense(w1=few)
    result = run(model, ctx, values=8, amount=0.5, refit=False)
    assert [change.nodes for change in result.changes] == [("h",)]  # 480 of 684, and exact
    result = run(model, ctx, values=8, amount=0.75, refit=False)
    assert len(result.changes) == 2
    assert len(run(model, ctx, values=8, refit=False).changes) == 3


# Codebooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [16, 300])
def test_a_codebook_computes_the_very_same_weights(values: int, tmp_path: Path) -> None:
    model = Model.load(MODELS / "digits_mlp.onnx")
    ctx = Context(model, Calibration.open(MODELS / "digits_mlp.npz", model, limit=200), RUNTIME)
    plain, _ = step(model, ctx, values=values)
    coded, report = step(model, ctx, values=values, codebook=True)
    assert report.committed, report.reason
    gathers = [node for node in coded.nodes if node.op == "Gather"]
    assert len(gathers) == len([c for c in report.changes if "values" in c.detail]) == 4
    proto = coded.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    for gather in gathers:
        user = coded.consumers(gather.outputs[0])[0]
        name = next(n for n in plain.nodes if n.outputs[0].name == user.outputs[0].name).inputs[1].name
        computed = compute(coded, held(ctx), gather.outputs[0].name)[0]
        np.testing.assert_array_equal(computed, weight(plain, name))
        index = weight(coded, f"{name}_index")
        assert index.dtype == (np.uint8 if values <= 256 else np.uint16)
        assert index.shape == computed.shape
        assert weight(coded, f"{name}_table").shape == (len(np.unique(computed)),)
    for got, expected in zip(compute(coded, held(ctx)), compute(plain, held(ctx)), strict=True):
        np.testing.assert_array_equal(got, expected)
    small = {name: value[:3] for name, value in held(ctx).items()}
    (by_reference,) = onnx.reference.ReferenceEvaluator(proto).run(None, small)
    np.testing.assert_allclose(by_reference, compute(plain, small)[0], rtol=1e-4, atol=1e-4)
    sizes = {}
    for name, other in (("model", model), ("plain", plain), ("coded", coded)):
        other.save(tmp_path / f"{name}.onnx")
        data = (tmp_path / f"{name}.onnx").read_bytes()
        sizes[name] = len(data), len(gzip.compress(data))
    assert sizes["coded"][0] < (0.3 if values <= 256 else 0.6) * sizes["model"][0]
    assert abs(sizes["plain"][0] - sizes["model"][0]) < 2000
    assert sizes["plain"][1] < (0.4 if values <= 256 else 0.6) * sizes["model"][1]
    assert Cluster.packed
    again = Model.load(tmp_path / "coded.onnx")
    assert all(VALUES in promises(node) for node in again.nodes if node.op == "Gemm")


def test_later_passes_refuse_a_coded_weight_and_fold_keeps_it_coded() -> None:
    model, ctx = dense()
    coded, _ = step(model, ctx, values=8, codebook=True, only="h")
    outcome = PassManager([Prune(amount=0.5), Refit(), Fold()]).run(coded, ctx)
    assert all(report.committed for report in outcome.steps)
    reasons = {skip.nodes[0]: skip.reason for skip in outcome.steps[0].skipped}
    assert reasons == {"h": "the weight of Gemm is computed, not constant"}
    assert "Gather" in [node.op for node in outcome.model.nodes]
    assert outcome.steps[2].after.bytes <= outcome.steps[2].before.bytes


def test_a_tied_weight_gets_one_codebook() -> None:
    model = net(
        """h = MatMul(x, w) hb = Add(h, c) r = Relu(hb) k = MatMul(r, w) q = Relu(k)
        v = Gemm<alpha=0.5>(q, u, d) t = Relu(v) y = Gemm(t, u)""",
        {"w": (12, 12), "c": (12,), "u": (12, 12), "d": (12,)},
        "float[N,12] x",
    )
    ctx = context(model, {"x": normal(200, 12)})
    plain, report = step(model, ctx, values=6)
    assert report.committed, report.reason
    assert sorted(c.nodes for c in report.changes) == [("h", "k"), ("v", "y")]
    assert (distinct(plain, "w"), distinct(plain, "u")) == (6, 6)
    coded, report = step(model, ctx, values=6, codebook=True)
    assert report.committed, report.reason
    assert sorted(output_names(coded, "Gather")) == ["u_values", "w_values"]
    for got, expected in zip(compute(coded, held(ctx)), compute(plain, held(ctx)), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert {t.name for t in coded.initializers} >= {"w_table", "w_index", "u_table", "u_index", "c", "d"}
    assert "w" not in {t.name for t in coded.initializers}


# Again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", [False, True])
def test_what_is_clustered_counts_and_stays(codebook: bool, tmp_path: Path) -> None:
    model, ctx = dense()
    goal = Cluster(values=8, codebook=codebook)
    now, done = model, []
    for share in (0.05, 0.5, 1.0):
        part = goal.partly(share)
        assert part is not None
        assert part.options.amount == pytest.approx(share)
        outcome = PassManager([part]).run(now, ctx)
        assert outcome.steps[0].committed, outcome.steps[0].reason
        outcome.model.save(tmp_path / f"{share}.onnx")
        later = Model.load(tmp_path / f"{share}.onnx")
        marked = {n.outputs[0].name for n in later.nodes if VALUES in promises(n)}
        for name in done:  # whatever was clustered before has the same weights
            before, after = (_weight_of(m, name) for m in (now, later))
            np.testing.assert_array_equal(after, before)
        done, now = sorted(marked), later
    assert done == ["a", "h", "y"]
    assert all(len(np.unique(_weight_of(now, name))) == 8 for name in done)
    again = run(now, ctx, values=8, codebook=codebook)
    assert not again.changes
    assert again.notes == ["as much is clustered already"]


def _weight_of(model: Model, output: str) -> np.ndarray:
    tensor = next(n for n in model.nodes if n.outputs[0].name == output).inputs[1]
    if model.is_weight(tensor):
        return weight(model, tensor.name)
    return compute(model, {"x": normal(1, 6)}, tensor.name)[0]


@pytest.mark.parametrize("codebook", [False, True])
def test_weights_of_few_values_are_marked_and_coded_as_they_are(codebook: bool) -> None:
    few = np.random.default_rng(0).integers(0, 8, (20, 24)).astype(np.float32) / 8 - 0.5
    model, ctx = dense(w1=few)
    found, report = step(model, ctx, values=8, only="h", codebook=codebook)
    assert report.committed, report.reason
    np.testing.assert_array_equal(_weight_of(found, "h"), few)
    (change,) = report.changes
    assert change.nodes == ("h",)
    assert change.detail["relative_error"] == pytest.approx(0, abs=1e-10)
    for got, expected in zip(compute(found, held(ctx)), compute(model, held(ctx)), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_fewer_values_are_a_new_clustering() -> None:
    model, ctx = dense()
    once = run(model, ctx, values=16, refit=False).model
    twice = run(once, ctx, values=4, refit=False)
    assert len(twice.changes) == 3
    assert distinct(twice.model, "w1") == 4


@pytest.mark.parametrize("values", [2, 8])
@pytest.mark.parametrize("codebook", [False, True])
def test_zeros_of_pruned_operators_stay_and_no_others_come(values: int, codebook: bool) -> None:
    model, ctx = dense()
    outcome = PassManager([Prune(amount=0.6), Cluster(values=values, codebook=codebook)]).run(model, ctx)
    assert all(report.committed for report in outcome.steps)
    pruned = PassManager([Prune(amount=0.6)]).run(model, ctx).model
    for name in ("a", "h", "y"):
        new, old = _weight_of(outcome.model, name), _weight_of(pruned, name)
        np.testing.assert_array_equal(new == 0, old == 0)
        assert len(np.unique(new)) == values
    marks = [promises(n) for n in outcome.model.nodes if n.op == "Gemm"]
    assert marks == [{ZEROS, VALUES}] * 3


def test_zeros_of_operators_that_are_not_pruned_are_numbers_like_others() -> None:
    few = np.where(normal(20, 24, seed=9) > 0, 0.0, normal(20, 24, seed=8)).astype(np.float32)
    model, ctx = dense(w1=few)
    found = run(model, ctx, values=2, refit=False, only="h").model
    table = kmeans(few, 2).astype(np.float32)
    np.testing.assert_array_equal(weight(found, "w1"), table[nearest(few, table)])


def test_an_operator_of_nothing_but_zeros() -> None:
    model, ctx = dense(w1=np.zeros((20, 24), np.float32))
    model.nodes[2].metadata["onnxfuse.kept"] = ZEROS
    result = run(model, ctx, values=4, only="h", codebook=True)
    assert [change.detail["values"] for change in result.changes if "values" in change.detail] == [1]
    assert not _weight_of(result.model, "h").any()


# Which operators ----------------------------------------------------------------------------------


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
    result = run(model, context(model, feeds), values=4)
    assert not result.changes
    reasons = {skip.nodes[0]: skip.reason for skip in result.skipped}
    assert reasons["h"] == "its weight is also used by 'e' (Gather)"
    assert reasons["k"] == "its weight is also used by a body of 'y' (If)"
    assert result.notes == ["no weight of this model can be clustered"]


def test_options() -> None:
    (pass_,) = parse_recipe("cluster:values=16,codebook=true")
    assert pass_.options.model_dump()["codebook"] is True
    for text in ("cluster:values=1", "cluster:values=65537", "cluster:amount=0", "cluster:amount=1.1"):
        with pytest.raises(InputError):
            parse_recipe(text)


def test_a_transformer() -> None:
    model = Model.load(MODELS / "tiny_transformer.onnx")
    ctx = Context(model, Calibration.open(MODELS / "tiny_transformer.npz", model, limit=120), RUNTIME)
    found, report = step(model, ctx, values=8, only="*layers.3*", mask="attention_mask", codebook=True)
    assert report.committed, report.reason
    assert len(output_names(found, "Gather")) - len(output_names(model, "Gather")) == 6
    assert {claim.mask for claim in report.predictions} >= {"attention_mask"}
    again, _ = step(model, ctx, values=8, only="*layers.3*", mask="attention_mask", codebook=True)
    protos = [m.to_proto().SerializeToString(deterministic=True) for m in (found, again)]
    assert protos[0] == protos[1]


def test_large_weights_take_little_time() -> None:
    model = net("h = Gemm(x, w1) r = Relu(h) y = Gemm(r, w2)", {"w1": (6, 1000), "w2": (1000, 1000)})
    ctx = context(model, {"x": normal(64, 6)})
    assert takes(lambda: run(model, ctx, values=256, refit=False), 6)
