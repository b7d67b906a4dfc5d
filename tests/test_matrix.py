"""Every pass on every kind of graph: committed or refused with a reason, structure, metadata, what ONNX
Runtime computes at several batch sizes, and errors as claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import pytest
from channel_cases import CASES as CHANNEL_CASES
from nets import RUNTIME, Feed, claimed, claimed_feeds, compute, net, normal, weight
from onnx import helper

from onnxfuse.data.calibration import Calibration
from onnxfuse.findings import Prediction
from onnxfuse.ir.editing import PASS_KEY
from onnxfuse.ir.marks import promises
from onnxfuse.ir.model import Model
from onnxfuse.passes.autoencode import Autoencode
from onnxfuse.passes.batchnorm import Batchnorm
from onnxfuse.passes.cluster import Cluster
from onnxfuse.passes.deepen import Deepen
from onnxfuse.passes.fold import Fold
from onnxfuse.passes.fuse import Fuse
from onnxfuse.passes.kernel import Kernel
from onnxfuse.passes.lowrank import Lowrank
from onnxfuse.passes.merge import Merge
from onnxfuse.passes.prune import Prune
from onnxfuse.passes.refit import Refit
from onnxfuse.passes.select import Select
from onnxfuse.passes.widen import Widen
from onnxfuse.pipeline.base import Context, Contract, Pass
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.records import StepReport

LINEAR = ("Conv", "Gemm", "MatMul")
MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Case:
    """A graph, one sample's shape for each input, and what is expected of it.

    `fused` are the operators that fuse must put in (an empty tuple: it must refuse, with `refusal` in a
    reason), `gone` operators that fold or fuse must have removed all of, `only` and `kernel` options of fuse.
    """

    body: str
    weights: dict[str, Any]
    shape: tuple[int, ...]
    rank: int
    fused: tuple[str, ...] = ("Conv",)
    gone: tuple[str, ...] = ()
    refusal: str = ""
    x: str = ""
    more: dict[str, np.ndarray] = field(default_factory=dict)
    edit: Callable[[onnx.ModelProto], None] | None = None
    blocks: int = 1
    kernel: Any = "composed"
    only: str = "[hv]"

    def model(self) -> Model:
        sizes = ",".join(["N", *map(str, self.shape)])
        scalars = "".join(f", {_TYPES[array.dtype.kind]} {name}" for name, array in self.more.items())
        y = f"float[{','.join('ABCDE'[: self.rank])}] y"
        # Half bent, so that few samples tell a good fit from a bad one.
        body = self.body.replace("r = Relu(", "r = LeakyRelu<alpha = 0.5>(")
        proto = net(body, self.weights, (self.x or f"float[{sizes}] x") + scalars, y).to_proto()
        if self.edit is not None:
            self.edit(proto)
        proto.doc_string = "made for a test"
        proto.producer_name, proto.producer_version, proto.model_version = "tests", "1.2", 7
        proto.metadata_props.add(key="author", value="someone")
        proto.graph.doc_string = "a graph"
        proto.graph.output[0].doc_string = "the result"
        return Model.load(proto)


_TYPES = {"f": "float", "i": "int64", "b": "bool"}

TWO = "h = Conv<pads = [1,1,1,1]>(x, w1, b1) r = Relu(h) v = Conv<pads = [1,1,1,1]>(r, w2) q = Relu(v)"
TWO_WEIGHTS = {"w1": (12, 3, 3, 3), "b1": (12,), "w2": (4, 12, 3, 3)}
ACROSS = "g = GlobalAveragePool(q) f = Flatten(g) y = Gemm(f, w3)"
NORM = {
    "gamma": 1 + normal(12, seed=1) / 4,
    "beta": normal(12, seed=2),
    "mean": normal(12, seed=3) / 4,
    "var": np.abs(normal(12, seed=4)) + 0.5,
}


def constant_nodes(proto: onnx.ModelProto) -> None:
    """All initializers as Constant nodes."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes += proto.graph.node
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)


def listed_as_inputs(proto: onnx.ModelProto) -> None:
    """All initializers listed among the inputs, as old exporters do."""
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


CASES = {
    "conv": Case(f"{TWO} {ACROSS}", {**TWO_WEIGHTS, "w3": (4, 2)}, (3, 6, 7), 2),
    "conv to the end": Case(TWO.replace("q = Relu(v)", "y = Relu(v)"), TWO_WEIGHTS, (3, 6, 7), 4),
    "strides and pooling": Case(
        """h = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w1, b1) r = Relu(h)
        p = AveragePool<kernel_shape = [2,2]>(r) v = Conv<pads = [1,1,1,1]>(p, w2)
        y = Relu(v)""",
        TWO_WEIGHTS,
        (3, 9, 8),
        4,
        kernel=7,
    ),
    "batch norm": Case(
        f"""h = Conv<pads = [1,1,1,1]>(x, w1, b1) n = BatchNormalization(h, gamma, beta, mean, var)
        r = Relu(n) v = Conv<pads = [1,1,1,1]>(r, w2) q = Relu(v) {ACROSS}""",
        {**TWO_WEIGHTS, **NORM, "w3": (4, 2)},
        (3, 6, 6),
        2,
        gone=("BatchNormalization",),
        only="[nv]",
    ),
    "residual": Case(
        f"""c = Conv(x, w0) u = Relu(c) h = Conv<pads = [1,1,1,1]>(u, w1) r = Relu(h)
        k = Conv<pads = [1,1,1,1]>(r, w2) v = Add(k, u) q = Relu(v) {ACROSS}""",
        {"w0": (4, 3, 1, 1), "w1": (12, 4, 3, 3), "w2": (4, 12, 3, 3), "w3": (4, 2)},
        (3, 6, 6),
        2,
        gone=("Add",),
        only="[hk]",
    ),
    "concat": Case(
        """u = Conv<pads = [1,1,1,1]>(x, w0) h = Conv<pads = [1,1,1,1]>(u, w1) r = Relu(h)
        v = Conv<pads = [1,1,1,1]>(r, w2) q = Relu(v) c = Concat<axis = 1>(u, q) y = Conv(c, w3)""",
        {"w0": (4, 3, 3, 3), "w1": (12, 4, 3, 3), "w2": (4, 12, 3, 3), "w3": (2, 8, 1, 1)},
        (3, 5, 5),
        4,
    ),
    "flatten": Case(
        "h = Conv(x, w1, b1) r = Relu(h) f = Flatten(r) v = Gemm(f, w3) y = Relu(v)",
        {"w1": (12, 3, 2, 2), "b1": (12,), "w3": (12 * 9, 5)},
        (3, 4, 4),
        2,
        fused=("Gemm",),
        gone=("Conv",),
    ),
    "flatten by a reshape": Case(
        """h = Conv(x, w1, b1) r = Relu(h) n = Shape(r) i = Gather(n, zero) j = Unsqueeze(i, axis)
        t = Concat<axis = 0>(j, rest) f = Reshape(r, t) v = Gemm(f, w3) y = Relu(v)""",
        {
            "w1": (12, 3, 2, 2),
            "b1": (12,),
            "w3": (12 * 9, 5),
            "zero": np.array(0),
            "axis": np.array([0]),
            "rest": np.array([-1]),
        },
        (3, 4, 4),
        2,
        fused=("Gemm",),
        gone=("Conv", "Reshape", "Shape", "Concat"),
    ),
    "grouped": Case(
        f"""h = Conv<pads = [1,1,1,1], group = 2>(x, w1, b1) r = Relu(h) v = Conv<pads = [1,1,1,1]>(r, w2)
        q = Relu(v) e = Conv<group = 2>(q, w4) {ACROSS.replace("(q)", "(e)")}""",
        {"w1": (24, 2, 3, 3), "b1": (24,), "w2": (4, 24, 3, 3), "w4": (4, 2, 1, 1), "w3": (4, 2)},
        (4, 6, 6),
        2,
    ),
    "depthwise": Case(
        f"""e = Conv(x, w0) a = Relu(e) h = Conv<pads = [1,1,1,1], group = 24>(a, w1) r = Relu(h)
        v = Conv(r, w2) q = Relu(v) d = Conv<pads = [1,1,1,1], group = 4>(q, w4)
        {ACROSS.replace("(q)", "(d)")}""",
        {"w0": (24, 3, 1, 1), "w1": (24, 1, 3, 3), "w2": (4, 24, 1, 1), "w4": (4, 1, 3, 3), "w3": (4, 2)},
        (3, 6, 6),
        2,
        only="[ehv]",
    ),
    "attention": Case(
        """k0 = MatMul(x, wq) k1 = MatMul(x, wk) k2 = MatMul(x, wv) kt = Transpose<perm = [0,2,1]>(k1)
        a = MatMul(k0, kt) p = Softmax<axis = 2>(a) c = MatMul(p, k2) o = MatMul(c, wo) s = Add(x, o)
        l = LayerNormalization(s, ls) h = MatMul(l, w1) hb = Add(h, b1) r = Relu(hb) d = MatMul(r, w2)
        v = Add(s, d) y = MatMul(v, w3)""",
        {
            "wq": (8, 8),
            "wk": (8, 8),
            "wv": (8, 8),
            "wo": (8, 8),
            "ls": np.ones(8, np.float32),
            "w1": (8, 32),
            "b1": (32,),
            "w2": (32, 8),
            "w3": (8, 3),
        },
        (5, 8),
        3,
        fused=("MatMul",),
        gone=("LeakyRelu",),
        only="[hd]",
    ),
    "tied weights": Case(
        """h = MatMul(x, w) r = Relu(h) k = MatMul(r, w) q = Relu(k) v = MatMul(q, u) t = Relu(v)
        y = MatMul(t, z)""",
        {"w": (12, 12), "u": (12, 6), "z": (6, 3)},
        (12,),
        2,
        fused=("Gemm",),
        only="*",
    ),
    "dynamic sizes": Case(
        TWO.replace("q = Relu(v)", "y = Relu(v)"), TWO_WEIGHTS, (3, 6, 6), 4, x="float[N,3,H,W] x"
    ),
    "captured by a branch": Case(
        """c = Gemm(x, w0) u = Relu(c) h = Gemm(u, w1) r = Relu(h) v = Gemm(r, w2)
        y = If(flag) <then_branch = t () => (float[A,B] p) { p = Add(v, u) },
                      else_branch = e () => (float[A,B] q) { q = Mul(v, u) }>""",
        {"w0": (6, 8), "w1": (8, 24), "w2": (24, 8)},
        (6,),
        2,
        fused=("Gemm",),
        more={"flag": np.array(True)},
    ),
    "an inner tensor captured": Case(
        """h = Gemm(x, w1) r = Relu(h) v = Gemm(r, w2)
        y = If(flag) <then_branch = t () => (float[A,B] p) { p = Concat<axis = 1>(v, r) },
                      else_branch = e () => (float[A,B] q) { q = Concat<axis = 1>(r, v) }>""",
        {"w1": (6, 24), "w2": (24, 8)},
        (6,),
        2,
        fused=(),
        refusal="used by the body of another node",
        more={"flag": np.array(True)},
    ),
    "weights in Constant nodes": Case(
        f"{TWO} {ACROSS}", {**TWO_WEIGHTS, "w3": (4, 2)}, (3, 6, 6), 2, edit=constant_nodes
    ),
    "weights listed as inputs": Case(
        f"{TWO} {ACROSS}", {**TWO_WEIGHTS, "w3": (4, 2)}, (3, 6, 6), 2, edit=listed_as_inputs
    ),
    "one axis": Case(
        "h = Conv<pads = [2,2]>(x, w1) r = Relu(h) v = Conv<pads = [1,1], strides = [2]>(r, w2) y = Relu(v)",
        {"w1": (12, 2, 5), "w2": (4, 12, 3)},
        (2, 20),
        3,
    ),
    "three axes": Case(
        """h = Conv<pads = [1,1,1,1,1,1]>(x, w1) r = Relu(h) v = Conv<pads = [0,1,1,0,1,1]>(r, w2)
        y = Relu(v)""",
        {"w1": (12, 2, 3, 3, 3), "w2": (3, 12, 1, 3, 3)},
        (2, 3, 4, 5),
        5,
    ),
    "two regions": Case(
        """h = Conv<pads = [1,1]>(x, w1) r = Relu(h) u = Conv<pads = [1,1]>(r, w2) s = Softmax<axis = 1>(u)
        e = Conv<pads = [1,1]>(s, w3) d = Relu(e) v = Conv<pads = [1,1]>(d, w4) y = Relu(v)""",
        {"w1": (12, 3, 3), "w2": (4, 12, 3), "w3": (12, 4, 3), "w4": (4, 12, 3)},
        (3, 15),
        3,
        fused=("Conv", "Conv"),
        blocks=2,
        only="*",
    ),
    "nothing to fuse": Case(
        "h = Conv(x, w1) y = Softmax<axis = 1>(h)",
        {"w1": (4, 3, 1, 1)},
        (3, 4, 4),
        4,
        fused=(),
        refusal="'y' is an output of the graph",
    ),
}


def samples(case: Case, count: int = 96) -> Feed | list[Feed]:
    x = normal(count, *case.shape)
    if not case.more:
        return {"x": x}
    return [{"x": part, **case.more} for part in np.split(x, 6)]


def run(case: Case, passes: Sequence[Any]) -> tuple[Model, Model, Context, tuple[StepReport, ...]]:
    model = case.model()
    before = model.to_proto().SerializeToString(deterministic=True)
    ctx = Context(model, Calibration.open(samples(case), model, batch_size=12, held_out=0.3), RUNTIME)
    outcome = PassManager(passes).run(model, ctx)
    assert model.to_proto().SerializeToString(deterministic=True) == before
    return model, outcome.model, ctx, outcome.steps


@pytest.mark.parametrize("name", CASES)
def test_every_pass_on_every_kind_of_graph(name: str) -> None:
    case = CASES[name]
    passes = [Fold(), _fuse(case), Refit()]
    model, found, ctx, steps = run(case, passes)
    for step in steps:
        assert step.committed, f"{step.name}: {step.reason}"
    _check_structure(case, model, found, steps[1])
    _check_kept(model, found)
    _check_outputs(case, model, found)
    _check_claims(model, found, ctx, steps)


def _fuse(case: Case) -> Fuse:
    return Fuse(max_blocks=case.blocks, shortlist=2, kernel=case.kernel, only=case.only)


def _check_structure(case: Case, model: Model, found: Model, fuse: StepReport) -> None:
    operators = [node.op for node in found.nodes]
    put_in = [node for node in found.nodes if node.name.endswith("_fused")]
    assert tuple(node.op for node in put_in) == case.fused
    assert all(node.metadata[PASS_KEY] == "fuse" for node in put_in)
    assert not set(case.gone) & set(operators)
    if case.fused:
        assert sum(op in LINEAR for op in operators) < sum(node.op in LINEAR for node in model.nodes)
        assert fuse.after.macs is not None
        assert fuse.before.macs is not None
        assert fuse.after.macs < fuse.before.macs
        saved = sum(change.detail["macs_saved"] for change in fuse.changes if "macs_saved" in change.detail)
        assert fuse.after.macs == pytest.approx(fuse.before.macs * (1 - saved), rel=1e-6)
    else:
        assert operators == [node.op for node in model.nodes]
        assert not fuse.changes
        assert any(case.refusal in skip.reason for skip in fuse.skipped), fuse.skipped
    produced = {t.name for node in found.nodes for t in node.outputs} | {t.name for t in found.initializers}
    produced |= {info.name for info in found.inputs}
    assert all(t.name in produced for node in found.nodes for t in node.inputs if t.name)
    used = {t.name for node in found.nodes for t in node.inputs}
    assert {t.name for t in found.initializers} <= used  # nothing is left over


def _check_kept(model: Model, found: Model) -> None:
    before, after = model.to_proto(), found.to_proto()
    onnx.checker.check_model(after)
    for attribute in ("doc_string", "producer_name", "producer_version", "model_version", "ir_version"):
        assert getattr(after, attribute) == getattr(before, attribute)
    assert list(after.metadata_props) == list(before.metadata_props)
    assert list(after.opset_import) == list(before.opset_import)
    assert after.graph.doc_string == before.graph.doc_string
    assert list(after.graph.output) == list(before.graph.output)
    weights = {t.name for t in before.graph.initializer}
    assert [i for i in after.graph.input if i.name not in weights] == [
        i for i in before.graph.input if i.name not in weights
    ]


def _check_outputs(case: Case, model: Model, found: Model) -> None:
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *case.shape, seed=batch), **case.more}
        (expected,), (got,) = compute(model, feed), compute(found, feed)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        if not case.fused:
            np.testing.assert_array_equal(got, expected)
        elif batch == 9:
            error = ((got - expected) ** 2).sum() / ((expected - expected.mean(0)) ** 2).sum()
            assert 0 < error < 0.7


def _check_claims(model: Model, found: Model, ctx: Context, steps: Sequence[StepReport]) -> None:
    """The last claim about each tensor, measured here on all rows."""
    claims = {}
    for step in steps:
        if step.contract is Contract.APPROXIMATE and step.changes:
            assert step.verification is not None
            assert len(step.verification.predictions) == len(step.predictions) > 0
            assert all(check.passed for check in step.verification.predictions)
            assert step.verification.output_error is not None
            claims.update({claim.tensor: claim for claim in step.predictions})
    if not claims:
        return
    for claim in claims.values():
        feeds = claimed_feeds(ctx, claim) if len(model.inputs) > 1 else [claimed(ctx, claim)]
        error, variance = _measured(model, found, claim, feeds)
        assert error == pytest.approx(claim.error, rel=5e-3, abs=1e-9)
        assert variance == pytest.approx(claim.variance, rel=1e-4)


def _measured(model: Model, found: Model, claim: Prediction, feeds: Sequence[Feed]) -> tuple[float, float]:
    """Error and variance of one tensor on all rows."""
    assert claim.positions is None
    rows: list[list[np.ndarray]] = [[], []]
    for feed in feeds:
        (y,), (x,) = compute(model, feed, claim.reference), compute(found, feed, claim.tensor)
        if claim.channels is not None:
            y = np.take(y, claim.channels, claim.channel_axis)
        for side, value in enumerate((y, x)):
            last = np.moveaxis(value, claim.channel_axis, -1)
            rows[side].append(last.reshape(-1, last.shape[-1]).astype(np.float64))
    a, b = map(np.concatenate, rows)
    return float(((a - b) ** 2).sum(1).mean()), float(a.var(0).sum())


@pytest.mark.parametrize("name", ["conv", "residual", "attention", "captured by a branch"])
def test_each_pass_alone(name: str) -> None:
    for pass_ in (Fold(), Fuse(max_blocks=1, shortlist=1), Fuse(shortlist=1), Refit()):
        model, found, _, (step,) = run(CASES[name], [pass_])
        assert step.committed, step.reason
        assert step.changes or step.notes or pass_.name == "fold"
        _check_kept(model, found)
        if isinstance(pass_, Refit):
            assert not step.changes
            assert found is model


@pytest.mark.parametrize("name", CASES)
def test_batchnorm_in_and_out_on_every_kind_of_graph(name: str) -> None:
    case = CASES[name]
    model, found, ctx, (step,) = run(case, [Batchnorm(only="*")])
    assert step.committed, step.reason
    _check_kept(model, found)
    sites = [n for n in model.nodes if n.op in ("Conv", "Gemm")]
    assert len(step.changes) == len(sites) - len(step.skipped)
    added = [n for n in found.nodes if n.metadata.get(PASS_KEY) == "batchnorm"]
    assert [n.op for n in added] == ["BatchNormalization"] * len(step.changes)
    assert len(found.nodes) == len(model.nodes) + len(added)
    assert bool(sites) == bool(added)
    assert step.changes or step.notes
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *case.shape, seed=batch), **case.more}
        (expected,), (got,) = compute(model, feed), compute(found, feed)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())
    folded, back = (PassManager([Fold()]).run(m, ctx).model for m in (model, found))
    assert [(n.op, [t.name for t in n.outputs]) for n in back.nodes] == [
        (n.op, [t.name for t in n.outputs]) for n in folded.nodes
    ]
    for tensor in folded.initializers:
        old, new = folded.weight(tensor), back.weight(back.tensor(tensor.name))
        assert old is not None
        assert new is not None
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_autoencode_on_every_kind_of_graph(name: str) -> None:
    case = CASES[name]
    model, found, ctx, steps = run(case, [Autoencode(rank=2, epochs=1)])
    (step,) = steps
    assert step.committed, step.reason
    _check_kept(model, found)
    pairs = [change for change in step.changes if "rank" in change.detail]
    sites = [node for node in model.nodes if node.op in LINEAR]
    told = {name for item in (*step.changes, *step.skipped) for name in item.nodes}
    assert {site.name or site.outputs[0].name for site in sites} <= told
    added = [n for n in found.nodes if n.metadata.get(PASS_KEY) == "autoencode" and n.op in LINEAR]
    assert len(added) == 2 * len(pairs)
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *case.shape, seed=batch), **case.more}
        (expected,), (got,) = compute(model, feed), compute(found, feed)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    _check_claims(model, found, ctx, steps)


@pytest.mark.parametrize("name", CASES)
def test_merge_on_every_kind_of_graph(name: str) -> None:
    case = CASES[name]
    model, found, ctx, (step,) = run(case, [Merge(params=0.999, samples=64)])
    assert step.committed, step.reason
    _check_kept(model, found)
    assert [node.op for node in found.nodes] == [node.op for node in model.nodes]
    assert step.changes or "share a weight" in step.notes[0]
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *case.shape, seed=batch), **case.more}
        (expected,), (got,) = compute(model, feed), compute(found, feed)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    _check_claims(model, found, ctx, [step])


@pytest.mark.parametrize("name", CHANNEL_CASES)
def test_merge_on_every_kind_of_coupling(name: str) -> None:
    """Layers share wherever there are two of one kind; a new order of channels was held against the old."""
    case = CHANNEL_CASES[name]
    model = case.model()
    feeds = [case.feed(model, 12, seed=seed) for seed in range(10)]
    ctx = Context(model, Calibration.open(feeds, model, batch_size=12, held_out=0.3), RUNTIME)
    outcome = PassManager([Merge(params=0.999, criterion="aligned")]).run(model, ctx)
    (step,) = outcome.steps
    assert step.committed, step.reason
    if not step.changes:
        assert "share a weight" in step.notes[0]
        return
    assert step.after.parameters < step.before.parameters
    onnx.checker.check_model(outcome.model.to_proto(), full_check=True)
    for batch in (1, 5):
        feed = case.feed(model, batch, seed=batch)
        for got, before in zip(compute(outcome.model, feed), compute(model, feed), strict=True):
            assert got.shape == before.shape
    for claim in step.predictions:
        error, variance = _measured(model, outcome.model, claim, claimed_feeds(ctx, claim))
        assert error == pytest.approx(claim.error, rel=5e-3, abs=1e-3 * variance)


def test_passes_that_compress_in_a_row() -> None:
    """Each goes on from the one before and keeps its own promise against the original."""
    model = Model.load(MODELS / "digits_resnet.onnx")
    with np.load(MODELS / "digits_resnet.npz") as data:
        feed = {name: data[name][:96] for name in data.files if name != "labels"}
    ctx = Context(model, Calibration.open(feed, model, batch_size=48), RUNTIME)
    passes = [
        Fold(),
        Select(ratio=0.25),
        Fuse(max_blocks=1, shortlist=1),
        Merge(layers=0.2, criterion="aligned"),
        Prune(amount=0.2),
        Cluster(values=64),
    ]
    outcome = PassManager(passes).run(model, ctx)
    for step in outcome.steps:
        assert step.committed, f"{step.name}: {step.reason}"
        assert step.changes, step.name
    _check_kept(model, outcome.model)
    parameters = [step.after.parameters for step in outcome.steps]
    assert parameters[1] > parameters[2] > parameters[3] > 0
    for node in outcome.model.nodes:
        if node.op == "Conv" and promises(node):
            value = weight(outcome.model, node.inputs[1].name)
            assert len(np.unique(value)) <= 64
    users = [n.inputs[1].name for n in outcome.model.nodes if n.op in LINEAR]
    assert len(set(users)) < len(users)
    claims = outcome.steps[-1].predictions
    assert len(claims) > 2
    for claim in claims:
        if claim.positions is None:
            error, _ = _measured(model, outcome.model, claim, claimed_feeds(ctx, claim))
            assert error == pytest.approx(claim.error, rel=5e-3)


@pytest.mark.parametrize("name", CASES)
def test_select_on_every_kind_of_graph(name: str) -> None:
    case = CASES[name]
    model, found, ctx, steps = run(case, [Select(ratio=0.25), Refit()])
    for step in steps:
        assert step.committed, f"{step.name}: {step.reason}"
    _check_kept(model, found)
    if case.fused:
        assert steps[0].after.parameters < steps[0].before.parameters
        _check_outputs(case, model, found)
        _check_claims(model, found, ctx, steps)


REWRITES: dict[str, Callable[[], Pass]] = {
    "lowrank": lambda: Lowrank(rank=0.4),
    "cluster": lambda: Cluster(values=3),
    "cluster with a codebook": lambda: Cluster(values=3, codebook=True),
    "prune": lambda: Prune(amount=0.4, scope="layer"),
}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("which", REWRITES)
@pytest.mark.parametrize("name", CASES)
def test_other_weights_on_every_kind_of_graph(name: str, which: str, refit: bool) -> None:
    """Other weights, or two operators in place of one: as far off as was claimed, and still that network."""
    case = CASES[name]
    pass_ = REWRITES[which]()
    pass_ = type(pass_)(**{**pass_.options.model_dump(exclude_none=True), "refit": refit})
    model, found, ctx, (step,) = run(case, [pass_])
    assert step.committed, step.reason
    _check_kept(model, found)
    _check_claims(model, found, ctx, [step])
    linear = {n.name or n.outputs[0].name for n in model.nodes if n.op in LINEAR}
    refused = {skip.nodes[0] for skip in step.skipped}
    done = {name for change in step.changes for name in change.nodes}
    assert linear <= refused | done
    assert step.changes or step.notes
    assert step.changes or name == "nothing to fuse"
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *case.shape, seed=batch), **case.more}
        (expected,), (got,) = compute(model, feed), compute(found, feed)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert np.isfinite(got).all()


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("name", CHANNEL_CASES)
def test_select_on_every_kind_of_coupling(name: str, compensate: bool) -> None:
    """All groups narrower: the cut was held against the masked network, errors against what was predicted."""
    case = CHANNEL_CASES[name]
    model = case.model()
    feeds = [case.feed(model, 12, seed=seed) for seed in range(10)]
    ctx = Context(model, Calibration.open(feeds, model, batch_size=12, held_out=0.3), RUNTIME)
    outcome = PassManager([Select(ratio=0.3, compensate=compensate, only="*")]).run(model, ctx)
    (step,) = outcome.steps
    assert step.committed, step.reason
    assert len([c for c in step.changes if "group" in c.detail]) >= 1
    assert step.after.parameters < step.before.parameters
    assert step.verification is not None
    assert step.verification.comparison is not None
    assert step.verification.comparison.passed
    onnx.checker.check_model(outcome.model.to_proto(), full_check=True)
    for batch in (1, 5):
        feed = case.feed(model, batch, seed=batch)
        for got, before in zip(compute(outcome.model, feed), compute(model, feed), strict=True):
            assert got.shape == before.shape
            assert np.isfinite(got).all()
    for claim in step.predictions:
        error, variance = _measured(model, outcome.model, claim, claimed_feeds(ctx, claim))
        assert error == pytest.approx(claim.error, rel=5e-3, abs=1e-3 * variance)


@pytest.mark.parametrize("scheme", ["r2r", "net2net"])
@pytest.mark.parametrize("name", CASES)
def test_growth_on_every_kind_of_graph(name: str, scheme: str) -> None:
    """Larger kernels, twice the channels, more layers: each committed, the function the original's."""
    case = CASES[name]
    passes = [Kernel(sites={"all": 5}), Widen(sites={"all": 2}, scheme=scheme), Deepen(scheme=scheme)]
    model, found, _, steps = run(case, passes)
    for step in steps:
        assert step.committed, f"{step.name}: {step.reason}"
        assert step.changes or step.notes
    _check_kept(model, found)
    kernels = {n.inputs[1].name for n in model.nodes if n.op in ("Conv", "ConvTranspose")}
    assert len(steps[0].changes) == sum(max(weight(model, kernel).shape[2:]) < 5 for kernel in kernels)
    size = sum(found.weight(t).size for t in found.tensors() if found.is_weight(t))
    before = sum(model.weight(t).size for t in model.tensors() if model.is_weight(t))
    assert (size > before) == any(step.changes for step in steps)
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *case.shape, seed=batch), **case.more}
        (expected,), (got,) = compute(model, feed), compute(found, feed)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_mlp", "digits_resnet", "mnist1d_conv", "tiny_transformer"])
def test_shipped_models(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    ctx = Context(model, Calibration.open(MODELS / f"{name}.npz", model), RUNTIME)
    mask = "attention_mask" if name == "tiny_transformer" else None
    passes = [Batchnorm(), Fold(), Fuse(max_blocks=1, mask=mask, shortlist=4), Refit(mask=mask)]
    outcome = PassManager(passes).run(model, ctx)
    for step in outcome.steps:
        assert step.committed, f"{step.name}: {step.reason}"
    error = outcome.steps[2].verification and outcome.steps[2].verification.output_error
    assert error
    assert 0 < error.worst < 0.3
    assert len(outcome.model.nodes) < len(model.nodes)
