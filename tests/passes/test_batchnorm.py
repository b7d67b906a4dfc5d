"""batchnorm: what is put where, with which numbers, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from nets import Feed, compute, context, fitted, net, normal, weight
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxfuse.cli.app import main
from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError
from onnxfuse.ir.editing import PASS_KEY
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.passes import batchnorm
from onnxfuse.passes.batchnorm import Batchnorm
from onnxfuse.passes.fold import Fold
from onnxfuse.pipeline.base import Context, Contract
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import make_pass
from onnxfuse.pipeline.records import StepReport
from onnxfuse.runtime.session import Session

MODELS = Path(__file__).parents[2] / "models"
NORM = {
    "gamma": 1 + normal(4, seed=1) / 4,
    "beta": normal(4, seed=2),
    "mean": normal(4, seed=3),
    "var": np.abs(normal(4, seed=4)) + 0.5,
}

BODIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    # nodes, weights, one sample's shape, rank of y
    "plain": ("h = Conv(x, w, b) y = Relu(h)", {"w": (4, 3, 3, 3), "b": (4,)}, (3, 6, 5), 4),
    "no bias": ("h = Conv<pads = [1,1,1,1]>(x, w) y = Relu(h)", {"w": (4, 3, 3, 3)}, (3, 6, 5), 4),
    "one axis": ("h = Conv<strides = [2]>(x, w, b) y = Relu(h)", {"w": (4, 3, 3), "b": (4,)}, (3, 11), 3),
    "three axes": ("h = Conv(x, w) y = Relu(h)", {"w": (4, 2, 2, 2, 2)}, (2, 4, 3, 5), 5),
    "grouped": ("h = Conv<group = 2>(x, w) y = Relu(h)", {"w": (6, 2, 3, 3)}, (4, 6, 6), 4),
    "depthwise": (
        "h = Conv<group = 4, pads = [1,1,1,1]>(x, w, b) y = Relu(h)",
        {"w": (8, 1, 3, 3), "b": (8,)},
        (4, 6, 6),
        4,
    ),
    "padded by itself": (
        'h = Conv<auto_pad = "SAME_UPPER", strides = [2,2]>(x, w) y = Relu(h)',
        {"w": (4, 3, 3, 3)},
        (3, 7, 6),
        4,
    ),
    "transposed": (
        "h = ConvTranspose<group = 2, strides = [2,2]>(x, w, b) y = Relu(h)",
        {"w": (4, 3, 3, 3), "b": (6,)},
        (4, 4, 3),
        4,
    ),
    "a bias of its own": (
        "k = Conv(x, w) h = Add(k, b) y = Relu(h)",
        {"w": (4, 3, 3, 3), "b": normal(1, 4, 1, 1)},
        (3, 6, 5),
        4,
    ),
    "dense": ("h = Gemm<transB = 1>(x, w, b) y = Relu(h)", {"w": (4, 6), "b": (4,)}, (6,), 2),
}


def model_of(name: str) -> Model:
    body, weights, shape, rank = BODIES[name]
    sizes = ",".join(["N", *map(str, shape)])
    return net(body, weights, f"float[{sizes}] x", f"float[{','.join('ABCDE'[:rank])}] y")


def samples(name: str, count: int = 45) -> Feed:
    return {"x": 2 * normal(count, *BODIES[name][2], seed=9) + 1}


def insert(model: Model, ctx: Context, **options: Any) -> tuple[Model, StepReport]:
    outcome = PassManager([Batchnorm(**options)]).run(model, ctx)
    (step,) = outcome.steps
    assert step.committed, step.reason
    return outcome.model, step


def image(body: str, weights: Mapping[str, Any], y: str = "float[A,B,C,D] y", **more: Any) -> Model:
    return net(body, weights, "float[N,3,6,6] x", y, **more)


def images(count: int = 40) -> Feed:
    return {"x": normal(count, 3, 6, 6)}


def norms(model: Model) -> list[Node]:
    return [node for node in model.nodes if node.op == "BatchNormalization"]


def stored(model: Model, node: Node) -> list[np.ndarray]:
    return [weight(model, tensor.name).astype(np.float64) for tensor in node.inputs[1:]]


def reference(model: Model, feed: Feed, name: str) -> np.ndarray:
    """A tensor by onnx's own evaluator."""
    proto = model.to_proto()
    (first, *_) = proto.graph.node
    if first.op_type == "ConvTranspose":  # where onnx's own is wrong about groups
        w, b = (torch.from_numpy(weight(model, n).copy()) for n in "wb")
        x = torch.from_numpy(feed["x"])
        return torch.nn.functional.conv_transpose2d(x, w, b, stride=2, groups=2).numpy()
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return np.asarray(ReferenceEvaluator(proto).run(None, feed)[0])


def moments(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = y.astype(np.float64)
    axes = (0, *range(2, y.ndim))
    return y.mean(axes), y.var(axes)


def reasons(step: StepReport) -> dict[str, str]:
    return {skip.nodes[0]: skip.reason for skip in step.skipped}


# ---- what is inserted ----------------------------------------------------------------------------------


def test_the_pass_itself() -> None:
    assert Batchnorm.contract is Contract.EXACT
    assert isinstance(make_pass("batchnorm", {"only": "c*"}), Batchnorm)
    with pytest.raises(InputError, match="momentum"):
        make_pass("batchnorm", {"momentum": 0.5})


@pytest.mark.parametrize("name", BODIES)
def test_statistics_are_those_of_the_operators_output(name: str) -> None:
    model = model_of(name)
    ctx = context(model, samples(name), batch_size=7)
    found, step = insert(model, ctx, only="*" if name == "dense" else None)
    mean, variance = moments(reference(model, fitted(ctx), "h"))
    (node,) = norms(found)
    assert [t.name for t in node.outputs] == ["h"]
    assert node.attrs["momentum"] == 0.9
    assert node.attrs["epsilon"] == pytest.approx(1e-5)
    scale, bias, running_mean, running_var = stored(found, node)
    np.testing.assert_allclose(running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(running_var, variance, rtol=1e-5)
    np.testing.assert_array_equal(bias, running_mean)
    np.testing.assert_allclose(scale, np.sqrt(running_var + 1e-5), rtol=2e-7)
    assert all(weight(found, t.name).dtype == np.float32 for t in node.inputs[1:])
    operator = "k" if name == "a bias of its own" else "h"
    assert step.changes[0].nodes == (operator,)
    assert step.changes[0].detail == {"tensor": "h", "channels": len(mean)}
    parts = ("weight", "bias", "running_mean", "running_var")
    assert [t.name for t in node.inputs[1:]] == [f"{operator}.bn.{part}" for part in parts]
    assert node.name == f"{operator}.bn"
    assert node.metadata == {PASS_KEY: "batchnorm"}


@pytest.mark.parametrize("name", BODIES)
def test_the_function_stays_and_fold_takes_all_of_it_back(name: str) -> None:
    model = model_of(name)
    ctx = context(model, samples(name))
    found, step = insert(model, ctx, only="*" if name == "dense" else None)
    assert step.contract is Contract.EXACT
    assert step.verification is not None
    assert step.verification.comparison is not None
    assert len(found.nodes) == len(model.nodes) + 1
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *BODIES[name][2], seed=batch)}
        (expected,), (got,) = compute(model, feed), compute(found, feed)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
    (before, after) = (PassManager([Fold()]).run(m, ctx).model for m in (model, found))
    assert [(n.op, n.name, n.outputs[0].name) for n in before.nodes] == [
        (n.op, n.name, n.outputs[0].name) for n in after.nodes
    ]
    np.testing.assert_array_equal(weight(after, "w"), weight(before, "w"))  # to the bit
    for tensor in after.initializers:
        old = weight(before, tensor.name) if tensor.name != "w_bias" or "b" in BODIES[name][1] else 0.0
        np.testing.assert_allclose(weight(after, tensor.name), old, rtol=1e-6, atol=1e-6)


def test_a_chain_where_each_sees_what_the_one_before_gives() -> None:
    body = "h = Conv<pads = [1,1,1,1]>(x, w1) r = Relu(h) k = Conv(r, w2) s = Relu(k) y = Conv(s, w3)"
    model = image(body, {"w1": (8, 3, 3, 3), "w2": (6, 8, 3, 3), "w3": (2, 6, 1, 1)})
    ctx = context(model, images())
    found, step = insert(model, ctx)
    assert [c.nodes for c in step.changes] == [("h",), ("k",), ("y",)]
    assert [n.op for n in found.nodes] == [
        *("Conv", "BatchNormalization", "Relu") * 2,
        *("Conv", "BatchNormalization"),
    ]
    for node, name in zip(norms(found), "hky", strict=True):
        mean, variance = moments(compute(model, fitted(ctx), name)[0])
        np.testing.assert_allclose(stored(found, node)[2], mean, atol=1e-6)
        np.testing.assert_allclose(stored(found, node)[3], variance, rtol=1e-5)


def test_with_the_statistics_of_a_batch_it_gives_the_same_on_the_calibration_samples() -> None:
    """What a training step sees first is what the network computed before."""
    model = model_of("plain")
    ctx = context(model, samples("plain"))
    found, _ = insert(model, ctx)
    scale, bias, mean, variance = map(torch.from_numpy, stored(found, norms(found)[0]))
    h = torch.from_numpy(compute(model, fitted(ctx), "h")[0]).double()
    trained = torch.nn.functional.batch_norm(h, mean, variance, scale, bias, training=True, eps=1e-5)
    torch.testing.assert_close(trained, h, rtol=0, atol=1e-5)


def test_held_out_samples_are_left_alone() -> None:
    model = model_of("plain")
    x = samples("plain")["x"]
    ctx = context(model, {"x": x}, batch_size=5)
    spoiled = x.copy()
    for batch in ctx.calibration.held_out:
        for row in batch.feed["x"]:
            spoiled[(x == row).all((1, 2, 3))] *= 50
    assert not np.array_equal(x, spoiled)
    found, _ = insert(model, ctx)
    other, _ = insert(model, context(model, {"x": spoiled}, batch_size=5))
    for a, b in zip(stored(found, norms(found)[0]), stored(other, norms(other)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mean_that_is_large_beside_the_spread_costs_no_digits() -> None:
    model = model_of("plain")
    model.set_weight(model.tensor("b"), np.array([2e6, -2e6, 1e3, 0], np.float32))
    ctx = context(model, samples("plain"), batch_size=8)
    found, _ = insert(model, ctx)
    mean, variance = moments(compute(model, fitted(ctx), "h")[0])
    np.testing.assert_allclose(stored(found, norms(found)[0])[2], mean, rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(stored(found, norms(found)[0])[3], variance, rtol=1e-6)


def test_channels_that_never_vary() -> None:
    weights = normal(4, 3, 3, 3)
    weights[1:3] = 0
    model = image("h = Conv(x, w, b) y = Relu(h)", {"w": weights, "b": np.array([1, 0, 7, 2], np.float32)})
    found, _ = insert(model, context(model, images()))
    scale, bias, mean, variance = stored(found, norms(found)[0])
    np.testing.assert_allclose(variance[1:3], 0, atol=1e-9)
    np.testing.assert_allclose(scale[1:3], np.sqrt(1e-5), rtol=1e-6)
    np.testing.assert_array_equal(mean[1:3], [0, 7])
    np.testing.assert_array_equal(bias, mean)
    assert variance.min() >= 0


# ---- where it goes -----------------------------------------------------------------------------------------


def test_all_that_read_the_output_read_it_behind() -> None:
    """A graph output, two nodes and the bodies of a third; every one of them by the name it had."""
    model = net(
        """h = Conv(x, w) r = Relu(h) s = Add(h, h)
        y = If(flag) <then_branch = t () => (float[A,B,C,D] p) { p = Add(h, r) },
                      else_branch = e () => (float[A,B,C,D] q) { q = Mul(h, s) }>""",
        {"w": (4, 3, 3, 3)},
        "float[N,3,6,6] x, bool flag",
        "float[A,B,C,D] y, float[E,F,G,H] h",
    )
    x = normal(40, 3, 6, 6)
    feeds = [{"x": part, "flag": np.array(number % 2 == 0)} for number, part in enumerate(np.split(x, 4))]
    ctx = context(model, feeds)
    found, _ = insert(model, ctx)
    (node,) = norms(found)
    assert [info.name for info in found.outputs] == ["y", "h"]
    (conv,) = [n for n in found.nodes if n.op == "Conv"]
    assert found.consumers(conv.outputs[0]) == [node]
    assert {n.op for n in found.consumers(found.tensor("h"))} == {"Relu", "Add", "If"}
    for feed in feeds:
        for expected, got in zip(compute(model, feed), compute(found, feed), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_tied_weights_stay_tied_and_each_operator_has_its_own() -> None:
    body = "h = Conv<pads = [1,1,1,1]>(x, w) r = Relu(h) y = Conv<pads = [1,1,1,1]>(r, w)"
    model = image(body, {"w": (3, 3, 3, 3)})
    ctx = context(model, images())
    found, _ = insert(model, ctx)
    first, second = norms(found)
    assert [n.inputs[1].name for n in found.nodes if n.op == "Conv"] == ["w", "w"]
    assert not {t.name for t in first.inputs} & {t.name for t in second.inputs}
    for node, name in ((first, "h"), (second, "y")):
        mean, _ = moments(compute(model, fitted(ctx), name)[0])
        np.testing.assert_allclose(stored(found, node)[2], mean, atol=1e-6)


def test_names_that_are_taken_get_a_number() -> None:
    proto = image("h = Conv(x, w) y = Add(h, k)", {"w": (4, 3, 3, 3), "k": (4, 1, 1)}).to_proto()
    proto.graph.initializer[1].name = proto.graph.node[1].input[1] = "h.bn.weight"
    model = Model.load(proto)
    found, _ = insert(model, context(model, images()))
    assert [t.name for t in norms(found)[0].inputs[1:]] == [
        *("h.bn.weight_1", "h.bn.bias", "h.bn.running_mean", "h.bn.running_var")
    ]


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        ("y = BatchNormalization(h, gamma, beta, mean, var)", "BatchNormalization"),
        ("r = Relu(h) y = BatchNormalization(r, gamma, beta, mean, var)", "BatchNormalization"),
        (
            "m = Mul(h, k) c = Clip(m, low) n = InstanceNormalization(c, gamma, beta) y = Relu(n)",
            "InstanceNormalization",
        ),
        (
            "t = Transpose<perm = [0,2,3,1]>(h) y = LayerNormalization(t, gamma, beta)",
            "LayerNormalization",
        ),
    ],
)
def test_what_is_normalized_already_is_left(tail: str, why: str) -> None:
    weights = {"w": (4, 3, 3, 3), "k": np.float32(2), "low": np.float32(-1)}
    weights |= {name: value for name, value in NORM.items() if name in tail}
    body = f"h = Conv(x, w) {tail}"
    model = image(body, {name: value for name, value in weights.items() if name in body})
    found, step = insert(model, context(model, images()))
    assert found is model
    assert not step.changes
    assert reasons(step) == {"h": f"{why} follows already"}
    note = f"nowhere to insert one; the first of 1 operators is 'h', {why} follows already"
    assert step.notes == (note,)


@pytest.mark.parametrize("tail", ["r = Add(h, x0)", "p = MaxPool<kernel_shape = [1,1]>(h) r = Conv(p, v)"])
def test_a_normalization_of_something_else_does_not_count(tail: str) -> None:
    body = f"x0 = Conv(x, u) h = Conv(x, w) {tail} y = BatchNormalization(r, gamma, beta, mean, var)"
    weights = {"u": (4, 3, 1, 1), "w": (4, 3, 1, 1), "v": (4, 4, 1, 1)}
    model = image(body, {**{n: s for n, s in weights.items() if f" {n})" in body}, **NORM})
    _, step = insert(model, context(model, images()))
    assert "h" in [change.nodes[0] for change in step.changes]


def test_weights_that_are_computed_are_refused() -> None:
    model = image("u = Relu(w) h = Conv(x, u) y = Relu(h)", {"w": (4, 3, 3, 3)})
    _, step = insert(model, context(model, images()))
    assert reasons(step) == {"h": "the weight of Conv is computed, not constant"}


def test_other_floats_are_refused() -> None:
    array = TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[2, 3, 1, 1], raw_data=bytes(12))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [info("x", TensorProto.BFLOAT16, ["n", 3, 4, 4])],
        [info("y", TensorProto.BFLOAT16, None)],
        [array],
    )
    model = Model.load(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 22)]))
    result = Batchnorm().run(model.copy(), None)  # type: ignore[arg-type]
    assert [skip.reason for skip in result.skipped] == ["statistics of bfloat16 are not kept"]


# ---- only ------------------------------------------------------------------------------------------------


def test_only_chooses_by_name_and_brings_in_gemm() -> None:
    body = "a1 = Conv(x, w1) r = Relu(a1) b1 = Conv(r, w2) f = Flatten(b1) a2 = Gemm(f, w3) y = Relu(a2)"
    model = image(body, {"w1": (4, 3, 3, 3), "w2": (2, 4, 3, 3), "w3": (8, 5)}, "float[A,B] y")
    ctx = context(model, images())
    chosen = {
        only: [change.nodes[0] for change in insert(model, ctx, only=only)[1].changes]
        for only in (None, "*", "a*", "b?")
    }
    assert chosen == {None: ["a1", "b1"], "*": ["a1", "b1", "a2"], "a*": ["a1", "a2"], "b?": ["b1"]}


@pytest.mark.parametrize(
    ("only", "note"),
    [
        (None, "the main graph has no Conv or ConvTranspose"),
        ("z*", "no Conv, ConvTranspose or Gemm of the main graph has a name that matches 'z*'"),
    ],
)
def test_a_model_without_a_site_says_why(only: str | None, note: str) -> None:
    model = net("h = Gemm(x, w) y = Relu(h)", {"w": (6, 4)})
    found, step = insert(model, context(model, {"x": normal(20, 6)}), only=only)
    assert found is model
    assert step.notes == (note,)
    assert not step.changes
    assert not step.skipped


# ---- samples ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::RuntimeWarning:onnxfuse.passes")
@pytest.mark.parametrize("sample", [0, 3, 39])
def test_values_that_are_not_finite_leave_that_operator_alone(sample: int) -> None:
    """Only the operator concerned: the other one's statistics are sound."""
    body = "h = Conv(x, w) e = Exp(h) k = Conv(e, v) l = Less(k, k) c = Cast<to = 1>(l) y = Add(h, c)"
    model = image(body, {"w": (2, 3, 1, 1), "v": (2, 2, 1, 1)})
    x = images()["x"]
    x[sample] *= 1e4
    found, step = insert(model, context(model, {"x": x}, held_out=0.0))
    assert [change.nodes for change in step.changes] == [("h",)]
    assert reasons(step) == {"k": "its output is not finite on the calibration samples"}
    assert len(norms(found)) == 1


def test_an_operator_that_computes_nothing_is_left_alone() -> None:
    body = "g = Gather(x, none) k = Conv(g, v) s = ReduceSum<keepdims = 0>(k) h = Conv(x, w) y = Add(h, s)"
    model = image(body, {"none": np.zeros(0, np.int64), "w": (2, 3, 1, 1), "v": (2, 3, 1, 1)})
    _, step = insert(model, context(model, images()))
    assert [change.nodes for change in step.changes] == [("h",)]
    assert reasons(step) == {"k": "its output is empty on the calibration samples"}


def test_fixed_batch() -> None:
    model = net("h = Conv(x, w) y = Relu(h)", {"w": (4, 3, 3, 3)}, "float[8,3,6,6] x", "float[8,4,4,4] y")
    ctx = context(model, images(48))
    found, _ = insert(model, ctx)
    mean, variance = moments(compute(model, next(iter(ctx.calibration.fit)).feed, "h")[0])
    assert len(ctx.calibration.fit) > 1
    every = [compute(model, batch.feed, "h")[0] for batch in ctx.calibration.fit]
    mean, variance = moments(np.concatenate(every))
    np.testing.assert_allclose(stored(found, norms(found)[0])[2], mean, atol=1e-6)
    np.testing.assert_allclose(stored(found, norms(found)[0])[3], variance, rtol=1e-5)


def test_maps_of_several_sizes() -> None:
    """Every position of every sample counts the same."""
    model = net("h = Conv(x, w) y = Relu(h)", {"w": (4, 3, 3, 3)}, "float[N,3,H,W] x", "float[A,B,C,D] y")
    feeds = [{"x": 3 * normal(n, 3, s, 12 - s, seed=n)} for n, s in ((3, 5), (1, 7), (4, 8), (2, 4))]
    ctx = context(model, feeds, held_out=0.0)
    found, _ = insert(model, ctx)
    rows = [np.moveaxis(compute(model, feed, "h")[0], 1, -1).reshape(-1, 4) for feed in feeds]
    values = np.concatenate(rows).astype(np.float64)
    np.testing.assert_allclose(stored(found, norms(found)[0])[2], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(stored(found, norms(found)[0])[3], values.var(0), rtol=1e-5)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each run of a session."""
    seen: list[int] = []
    original = Session.run

    def run(self: Session, feed: Feed, outputs: Any = None) -> Feed:
        seen.append(len(feed["x"]))
        return original(self, feed, outputs)

    monkeypatch.setattr(Session, "run", run)
    return seen


def test_one_run_gives_all_statistics(runs: list[int]) -> None:
    model = image("h = Conv(x, w) r = Relu(h) y = Conv(r, v)", {"w": (4, 3, 3, 3), "v": (2, 4, 1, 1)})
    ctx = context(model, images(), batch_size=8, held_out=0.2)
    runs.clear()
    Batchnorm().run(model.copy(), ctx)
    assert runs == [1, 8, 8, 8, 8]  # the first tells how much a sample gives


def test_a_batch_that_gives_too_much_is_fed_in_pieces(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every input that has a row for each sample is cut; one of unknown rank may be a scalar."""
    proto = net(
        "k = Mul(x, s) l = Mul(k, t) h = Conv(l, w) y = Relu(h)",
        {"w": (4, 3, 3, 3)},
        "float[N,3,6,6] x, float[N,3,1,1] s, float t",
        "float[A,B,C,D] y",
    ).to_proto()
    proto.graph.input[2].type.tensor_type.ClearField("shape")
    model = Model.load(proto)
    rows = zip(np.split(normal(40, 3, 6, 6), 5), np.split(normal(40, 3, 1, 1, seed=1), 5), strict=True)
    feeds = [{"x": x, "s": s, "t": np.array(2, np.float32)} for x, s in rows]
    ctx = context(model, feeds, held_out=0.2)
    whole = Batchnorm().run(model.copy(), ctx).model
    del runs[:]
    monkeypatch.setattr(batchnorm, "TAPPED", 3 * 4 * 16 * 4 + 5)
    pieces = Batchnorm().run(model.copy(), ctx).model
    assert runs == [1, *[3, 3, 2] * 4]
    for a, b in zip(stored(whole, norms(whole)[0]), stored(pieces, norms(pieces)[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-7)


def test_a_batch_that_a_reshape_fixes_is_fed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "TAPPED", 1)
    model = net(
        "f = Reshape(x, shape) h = Conv(f, w) y = Relu(h)",
        {"w": (4, 3, 3, 3), "shape": np.array([8, 3, 6, 6])},
        "float[N,3,6,6] x",
        "float[A,B,C,D] y",
    )
    found, _ = insert(model, context(model, [{"x": normal(8, 3, 6, 6, seed=i)} for i in range(4)]))
    assert len(norms(found)) == 1


# ---- types and versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 18, 21, 22])
def test_every_opset(opset: int) -> None:
    model = image("h = Conv(x, w, b) y = Relu(h)", {"w": (4, 3, 3, 3), "b": (4,)}, opset=opset)
    found, step = insert(model, context(model, images()))
    assert step.changes
    onnx.checker.check_model(found.to_proto(), full_check=True)
    feed = {"x": normal(3, 3, 6, 6, seed=5)}
    np.testing.assert_allclose(compute(found, feed)[0], compute(model, feed)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [9, 13, 14, 17])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_half_and_double(dtype: type, opset: int) -> None:
    """Doubles by Gemm: ONNX Runtime has no Conv of them on a CPU."""
    half = dtype is np.float16
    weights = {"w": normal(4, 3, 3, 3) / 5 if half else normal(6, 4), "b": normal(4)}
    kind, sizes, rank = ("float16", "3,6,6", "A,B,C,D") if half else ("double", "6", "A,B")
    model = net(
        f"h = {'Conv' if half else 'Gemm'}(x, w, b) y = Relu(h)",
        {name: value.astype(dtype) for name, value in weights.items()},
        f"{kind}[N,{sizes}] x",
        f"{kind}[{rank}] y",
        opset=opset,
    )
    ctx = context(model, {"x": normal(60, *map(int, sizes.split(","))).astype(dtype)})
    found, _ = insert(model, ctx, only="*")
    (node,) = norms(found)
    assert all(weight(found, t.name).dtype == dtype for t in node.inputs[1:])
    eps = float(np.finfo(dtype).eps)
    mean, variance = moments(compute(model, fitted(ctx), "h")[0])
    scale, bias, running_mean, running_var = stored(found, node)
    # Double sums go astray by more than a last place.
    np.testing.assert_allclose(running_mean, mean, rtol=eps if half else 1e-13)
    np.testing.assert_allclose(running_var, variance, rtol=2 * eps if half else 1e-13)
    np.testing.assert_array_equal(bias, running_mean)
    # As they are stored, the four are the identity to half a place.
    assert np.abs(scale / np.sqrt(running_var + node.attrs["epsilon"]) - 1).max() <= (
        eps / 4 if half else eps
    )
    back = PassManager([Fold()]).run(found, ctx).model
    np.testing.assert_allclose(weight(back, "w"), weight(model, "w"), rtol=0 if half else 2 * eps)


def test_a_variance_beyond_half_precision() -> None:
    weights = {"w": np.full((2, 1, 1, 1), 1000, np.float16)}
    model = net("h = Conv(x, w) y = Relu(h)", weights, "float16[N,1,6,6] x", "float16[A,B,C,D] y")
    _, step = insert(model, context(model, {"x": normal(40, 1, 6, 6).astype(np.float16)}))
    assert reasons(step) == {"h": "its mean or variance is beyond what float16 can hold"}


def test_a_file_whose_initializers_must_be_listed_as_inputs() -> None:
    """IR version 3."""
    proto = image("h = Conv(x, w) y = Relu(h)", {"w": (4, 3, 3, 3)}, opset=9).to_proto()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    model = Model.load(proto)
    found, _ = insert(model, context(model, images()))
    after = found.to_proto()
    onnx.checker.check_model(after)
    ort.InferenceSession(after.SerializeToString(), providers=["CPUExecutionProvider"])


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = MODELS / "mnist1d_conv.onnx", tmp_path / "out.onnx"
    arguments = ["compress", str(source), "--calib", str(source.with_suffix(".npz")), "--json"]
    assert main([*arguments, "--passes", "batchnorm", "-o", str(target)]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    model, found = Model.load(source), Model.load(target)
    convs = [node.name for node in model.nodes if node.op == "Conv"]
    assert [change["nodes"] for change in step["changes"]] == [[name] for name in convs]
    assert len(norms(found)) == len(convs)
    calibration = Calibration.open(source.with_suffix(".npz"), model)
    feed = {"signal": next(iter(calibration.held_out)).feed["signal"]}
    np.testing.assert_allclose(compute(found, feed)[0], compute(model, feed)[0], rtol=1e-4, atol=1e-4)
    assert main([*arguments, "--passes", "batchnorm,fold", "-o", str(target), "--dry-run"]) == 0


def test_the_command_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    source = MODELS / "digits_mlp.onnx"
    assert (
        main(["compress", str(source), "--calib", str(source.with_suffix(".npz")), "--passes", "batchnorm"])
        == 3
    )
    captured = capsys.readouterr()
    assert "the main graph has no Conv or ConvTranspose" in captured.out + captured.err


def test_fold_keeps_a_tie_that_the_pass_has_not_changed() -> None:
    model = net(
        "a = Conv(x, w, b) r = Relu(a) y = Conv(r, w, c)",
        {"w": (3, 3, 3, 3), "b": (3,), "c": (3,)},
        "float[N,3,9,9] x",
        "float[N,3,5,5] y",
    )
    ctx = context(model, {"x": normal(32, 3, 9, 9)})
    outcome = PassManager([Batchnorm(), Fold()]).run(model, ctx)
    convs = [node for node in outcome.model.nodes if node.op == "Conv"]
    assert len(outcome.model.nodes) == 3
    assert convs[0].inputs[1] is convs[1].inputs[1]
    assert weight(outcome.model, "w").tobytes() == weight(model, "w").tobytes()
