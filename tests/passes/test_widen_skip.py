"""widen with skip=fold: one operator's output grows, and residual sums take x + (x_L - x_R) of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx.checker
import pytest
import torch
from channel_cases import Case, close, norm, parameters, sized
from growth_checks import case_context, doubled, gradients, in_float64, wide
from nets import compute, context, weight
from onnx import helper

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.passes.widen import Widen
from onnxfuse.pipeline.base import PassResult
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import make_pass
from onnxfuse.pytorch.bridge.importer import to_torch

PAD = "pads=[1,1,1,1]"
HEAD = "gap = GlobalAveragePool(last) flat = Flatten(gap) y = Gemm(flat, wy, by)"
BLOCK = Case(
    f"""a = Conv<{PAD}>(x, w0, b0) u = LeakyRelu(a) c = Conv<{PAD}>(u, w1) r = LeakyRelu(c)
    d = Conv(r, w2) s = Add(d, u) last = LeakyRelu(s) {HEAD}""",
    sized("w0:8,3,3,3 b0:8 w1:10,8,3,3 w2:8,10,1,1 wy:8,4 by:4"),
    (),
    0,
)
CASES = {
    "block": BLOCK,
    "the skip first, summed by Sum": replace(BLOCK, body=BLOCK.body.replace("Add(d, u)", "Sum(u, d)")),
    "batch norm and a pool": Case(
        f"""a = Conv<{PAD}>(x, w0) n = BatchNormalization(a, ng, nb, nm, nv) p = Relu(n)
        u = MaxPool<kernel_shape=[2,2],strides=[2,2]>(p) c = Conv<{PAD}>(u, w1)
        m = BatchNormalization(c, mg, mb, mm, mv) r = Relu(m) d = Conv<{PAD}>(r, w2) s = Add(d, u)
        last = Relu(s) {HEAD}""",
        sized("w0:8,3,3,3 w1:10,8,3,3 w2:8,10,3,3 wy:8,4 by:4") | norm("n", 8, 1) | norm("m", 10, 5),
        (),
        0,
    ),
    "MLP of a transformer": Case(
        """e = MatMul(x, w0) a = Add(e, pos) h = MatMul(a, w1) hb = Add(h, b1) g = Tanh(hb) o = MatMul(g, w2)
        s = Add(a, o) y = MatMul(s, wy)""",
        sized("w0:5,8 pos:4,8 w1:8,12 b1:12 w2:12,8 wy:8,3"),
        (),
        0,
        x="float[N,4,5] x",
        y="float[A,B,C] y",
    ),
    "two blocks in a row": Case(
        f"""a = Conv<{PAD}>(x, w0, b0) u = Elu(a) c = Conv<{PAD}>(u, w1) r = Relu(c) d = Conv(r, w2)
        s = Add(d, u) v = Relu(s) f = Conv(v, w3) g = Relu(f) k = Conv(g, w4) t = Add(k, v) last = Relu(t)
        {HEAD}""",
        sized("w0:8,3,3,3 b0:8 w1:10,8,3,3 w2:8,10,1,1 w3:6,8,1,1 w4:8,6,1,1 wy:8,4 by:4"),
        (),
        0,
    ),
    "two sums of one tensor, and a graph output behind": Case(
        """a = MatMul(x, w0) c = MatMul(a, w1) s = Add(c, a) r = Relu(s) d = MatMul(r, w2) y = Add(a, d)""",
        sized("w0:5,8 w1:8,8 w2:8,8"),
        (),
        0,
        x="float[N,5] x",
    ),
    "beside other channels": Case(
        """a = MatMul(x, w0) b = MatMul(x, w) h = Concat<axis=1>(b, a, b) r = Tanh(h) d = MatMul(r, w1)
        s = Add(d, r) y = MatMul(s, wy)""",
        sized("w0:5,8 w:5,4 w1:16,16 wy:16,3"),
        (),
        0,
        x="float[N,5] x",
    ),
}
SITE = {"MLP of a transformer": "e"}
OLD = {"w0", "b0", "w1", "pos", "ng", "nb", "nm", "nv"}  # what has the channels that grow


def folded(model: Model, case: Case, sites: dict[str, float], seed: int = 0) -> PassResult:
    return Widen(sites=sites, skip="fold").run(model.copy(), case_context(case, model, seed))


def dense(body: str, weights: str, **more: Any) -> Case:
    return Case(body, sized(weights), (), 0, x="float[N,5] x", **more)


def grown_sizes(model: Model, grown: Model) -> dict[str, tuple[int, ...]]:
    old = parameters(model)
    return {k: v.shape for k, v in parameters(grown).items() if k in old and v.shape != old[k].shape}


@pytest.mark.parametrize("ratio", [1.5, 3.0, 4.5])
@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("name", CASES)
def test_exact_and_nothing_else_grows(name: str, opset: int, ratio: float) -> None:
    """By the pass manager's measure and without it; behind the sum everything is as it was."""
    case = replace(CASES[name], opset=opset)
    model = case.model()
    step_pass = Widen(sites={SITE.get(name, "a"): ratio}, skip="fold")
    outcome = PassManager([step_pass]).run(model, case_context(case, model))
    (step,) = outcome.steps
    assert step.committed, step.reason
    assert [c.what for c in step.changes] == [f"8 channels become {round(8 * ratio)}"]
    grown = outcome.model
    onnx.checker.check_model(grown.to_proto(), full_check=True)
    assert set(grown_sizes(model, grown)) == OLD & set(case.weights)
    for key in parameters(model).keys() - grown_sizes(model, grown).keys():
        np.testing.assert_array_equal(weight(grown, key), weight(model, key), err_msg=key)
    for batch in (1, 4):
        feed = case.feed(model, batch, seed=batch)
        for got, expected in zip(compute(grown, feed), compute(model, feed), strict=True):
            close(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_exact_in_float64(name: str) -> None:
    case = CASES[name]
    model = doubled(case.model())
    calibration = context(model, [wide(case.feed(model, 4))], held_out=0.0)
    result = Widen(sites={SITE.get(name, "a"): 2.5}, skip="fold").run(model.copy(), calibration)
    assert result.changes
    for batch in (1, 3):
        feed = wide(case.feed(model, batch, seed=batch))
        (expected, *_), (got, *_) = in_float64(model, feed), in_float64(result.model, feed)
        assert got.dtype == np.float64
        assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(("ratio", "pairs"), [(1.5, 2), (3.0, 8), (4.5, 14)])
def test_the_sum_takes_x_and_the_difference_of_twins(ratio: float, pairs: int) -> None:
    """Twins in the operator's weights and in what reads them; and with the second twins moved by hand, the
    sum moves as x + x_L - x_R says."""
    model = BLOCK.model()
    grown = folded(model, BLOCK, {"a": ratio}).model
    w0, w1 = weight(grown, "w0"), weight(grown, "w1")
    assert len(w0) == 8 + 2 * pairs
    np.testing.assert_array_equal(w0[8::2], w0[9::2])
    np.testing.assert_array_equal(w1[:, 8::2], -w1[:, 9::2])
    assert len(np.unique(w1[:, 8::2])) == w1[:, 8::2].size
    np.testing.assert_array_equal(w0[:8], weight(model, "w0"))
    np.testing.assert_array_equal(w1[:, :8], weight(model, "w1"))
    old = {t.name for n in model.nodes for t in n.outputs}
    made = [n for n in grown.to_proto().graph.node if n.output[0] not in old]
    assert sorted({n.op_type for n in made} - {"Concat"}) == ["Add", "Slice", "Sub"]
    assert all("widen" in [p.value for p in n.metadata_props] for n in made)
    apart = np.random.default_rng(0).standard_normal(w0.shape).astype(np.float32)
    grown.set_weight(grown.tensor("w0"), apart)
    feed = BLOCK.feed(model, 3)
    u, d, s = compute(grown, feed, "u", "d", "s")
    used = min(8, pairs)
    expected = u[:, :8].copy()
    expected[:, :used] += (u[:, 8::2] - u[:, 9::2])[:, :used]
    np.testing.assert_allclose(s - d, expected, atol=1e-5)
    assert np.abs(s - d - u[:, :8]).max() > 0.1


def test_large_twins_leave_the_sum_alone() -> None:
    """(x + x_L) - x_R would be rounded to what a float next to 1e6 holds; the difference of twins is zero."""
    model = BLOCK.model()
    grown = folded(model, BLOCK, {"a": 3}).model
    grown.set_weight(grown.tensor("b0"), np.r_[weight(model, "b0"), np.full(16, 1e6, np.float32)])
    (total,) = (node for node in grown.nodes if node.outputs[0].name == "s")
    (name,) = (t.name for t in total.inputs if t.name != "d")
    feed = BLOCK.feed(model, 3)
    np.testing.assert_allclose(compute(grown, feed, name)[0], compute(model, feed, "u")[0], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_new_weights_learn_and_the_function_departs(name: str) -> None:
    case = CASES[name]
    case = replace(case, body=case.body.replace(" Relu(", " LeakyRelu("))
    model = case.model()
    grown = folded(model, case, {SITE.get(name, "a"): 2}).model
    module = to_torch(grown)
    feed = case.feed(model, 8)
    with torch.no_grad():
        before = module(torch.from_numpy(feed["x"])).numpy()
    close(before, compute(model, feed)[0])
    found = gradients(module, feed, ["x"], 0)
    learning = grown_sizes(model, grown).keys() & found.keys()
    assert {"w0", "w1"} <= learning
    for key in learning:
        assert (found[key] != 0).mean() > 0.97, key
    with torch.no_grad():
        after = module(torch.from_numpy(feed["x"])).numpy()
    assert np.abs(after - before).max() > 1e-3
    w0 = dict(module.named_parameters())["w0"].detach().numpy()
    rows = (w0 if w0.ndim == 4 else w0.T).reshape(16, -1)
    assert len(np.unique(rows, axis=0)) == 16


def test_the_group_grows_by_default() -> None:
    model = BLOCK.model()
    sizes = grown_sizes(model, Widen(sites={"a": 2}).run(model.copy(), case_context(BLOCK, model)).model)
    assert {"w0", "w1", "w2", "wy"} <= set(sizes)


def test_again_and_all() -> None:
    """What was folded can grow on; and all operators at once, each alone."""
    case = CASES["two blocks in a row"]
    model = grown = case.model()
    feed = case.feed(model, 3)
    for seed, ratio in enumerate((3.0, 1.5, 2.0)):
        grown = folded(grown, case, {"a": ratio}, seed).model
        assert weight(grown, "w2").shape == (8, 10, 1, 1)
        close(compute(grown, feed)[0], compute(model, feed)[0])
    assert len(weight(grown, "w0")) > 48
    result = folded(model, case, {"all": 2})
    assert {c.nodes[0] for c in result.changes} == {"a", "c", "f"}
    assert len(weight(result.model, "w0")) == 16
    assert weight(result.model, "w2").shape == (8, 20, 1, 1)
    close(compute(result.model, feed)[0], compute(model, feed)[0])


def test_sites_of_one_shape_get_weights_of_their_own() -> None:
    case = dense(
        """a = MatMul(x, w0) r = Tanh(a) b = MatMul(r, w1) c = MatMul(x, w2) q = Tanh(c) d = MatMul(q, w3)
        y = Add(b, d)""",
        "w0:5,6 w1:6,3 w2:5,6 w3:6,3",
    )
    grown = folded(case.model(), case, {"a": 2, "c": 2}).model
    first, second = (weight(grown, n)[:, 6:] / weight(case.model(), n).std() for n in ("w0", "w2"))
    assert np.abs(first - second).max() > 0.1


def test_operators_with_the_same_weights_grow_as_one() -> None:
    """Both skips are folded, so that neither sum grows."""
    case = dense(
        """a = MatMul(x, w0) c = MatMul(a, w1) s = Add(c, a) z = Neg(x) b = MatMul(z, w0) d = MatMul(b, w2)
        t = Add(b, d) k = Mul(s, t) y = MatMul(k, w3)""",
        "w0:5,8 w1:8,8 w2:8,8 w3:8,3",
    )
    model = case.model()
    result = folded(model, case, {"a": 2, "b": 1.5})
    assert [c.what for c in result.changes] == ["8 channels become 16"]
    assert grown_sizes(model, result.model) == {"w0": (5, 16), "w1": (16, 8), "w2": (16, 8)}
    feed = case.feed(model, 3)
    close(compute(result.model, feed)[0], compute(model, feed)[0])


# Refused --------------------------------------------------------------------------------------------


def refusal(case: Case, site: str = "a") -> str:
    model = case.model()
    with pytest.raises(NotApplicableError) as caught:
        folded(model, case, {site: 2})
    return str(caught.value)


def test_what_only_sums_read() -> None:
    assert "only residual sums read the channels" in refusal(BLOCK, "d")


def test_a_layer_norm_that_reads_them() -> None:
    case = dense(
        "a = MatMul(x, w0) n = LayerNormalization(a, g, b) c = MatMul(n, w1) s = Add(c, a) y = MatMul(s, w2)",
        "w0:5,8 g:8 b:8 w1:8,8 w2:8,3",
    )
    assert "takes statistics over the channels" in refusal(case)


def test_a_graph_output() -> None:
    body = "y = MatMul(x, w0) c = MatMul(y, w1) s = Add(c, y) z = MatMul(s, w2)"
    case = dense(body, "w0:5,8 w1:8,8 w2:8,3", y="float[A,B] y, float[C,D] z")
    assert "it reaches the graph output 'y'" in refusal(case, "y")


def in_a_body(proto: onnx.ModelProto) -> None:
    """What the last sum takes second becomes a or -a, by an If."""
    out = helper.make_tensor_value_info("o", 1, None)
    bodies = [
        helper.make_graph([helper.make_node(op, ["a"], ["o"])], op, [], [out]) for op in ("Identity", "Neg")
    ]
    node = helper.make_node("If", ["yes"], ["m"], then_branch=bodies[0], else_branch=bodies[1])
    proto.graph.initializer.append(helper.make_tensor("yes", 9, [], [True]))
    (at,) = (i for i, n in enumerate(proto.graph.node) if n.output[0] == "k")
    proto.graph.node[at].input[1] = "m"
    proto.graph.node.insert(at, node)


def test_what_a_body_captures() -> None:
    case = dense(
        "a = MatMul(x, w0) c = MatMul(a, w1) s = Add(c, a) k = Add(s, c) y = MatMul(k, w2)",
        "w0:5,8 w1:8,8 w2:8,3",
    )
    assert len(folded(case.model(), case, {"a": 2}).changes) == 1
    assert "If has no rule" in refusal(replace(case, edit=in_a_body))


def test_weights_that_both_sides_of_the_sum_share() -> None:
    case = dense(
        """a = MatMul(x, w0) c = MatMul(a, w1) r = Tanh(c) d = MatMul(r, w2) s = Add(d, a)
        e = MatMul(s, w1) g = Tanh(e) y = MatMul(g, w3)""",
        "w0:5,8 w1:8,6 w2:6,8 w3:6,3",
    )
    assert "has these channels for other reasons, too" in refusal(case)


def test_a_sum_that_stretches() -> None:
    case = Case(
        f"""a = Conv(x, w0) c = GlobalAveragePool(a) d = Conv(c, w1) s = Add(d, a) last = Relu(s) {HEAD}""",
        sized("w0:8,3,3,3 w1:8,8,1,1 wy:8,4 by:4"),
        (),
        0,
    )
    assert "stretches one of its inputs" in refusal(case)


def test_an_axis_merged_with_others() -> None:
    case = Case(
        """a = Conv(x, w0) f = Flatten(a) c = MatMul(f, w1) r = Tanh(c) d = MatMul(r, w2) s = Add(d, f)
        y = MatMul(s, w3)""",
        sized("w0:8,3,5,5 w1:32,6 w2:6,32 w3:32,3"),
        (),
        0,
    )
    assert "takes the channels on an axis merged with others" in refusal(case)


def test_an_opset_without_steps() -> None:
    case = dense(
        """a = MatMul(x, w0) c = MatMul(a, w1) s = Add(c, a) y = MatMul(s, w2)""",
        "w0:5,8 w1:8,8 w2:8,3",
        opset=9,
    )
    assert "takes opset 10 or newer" in refusal(case)


def test_bad_options() -> None:
    with pytest.raises(InputError, match="skip=fold takes the twins of r2r, not net2net"):
        make_pass("widen", {"skip": "fold", "scheme": "net2net"})
    with pytest.raises(InputError, match="'group' or 'fold'"):
        make_pass("widen", {"skip": "none"})
    with pytest.raises(InputError, match="there is no operator 'k'; known: a, d, c, y"):
        folded(BLOCK.model(), BLOCK, {"k": 2})
