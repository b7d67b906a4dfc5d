"""deepen: zero branches, identity layers and copies of blocks; where they go, how they learn, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.checker
import pytest
import torch
from channel_cases import CASES, POOLED, close, norm, parameters, positive, sized
from growth_checks import case_context, doubled, gradients, in_float64, wide
from nets import Feed, compute, context, net, normal, weight

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.growth.depth import find_sites
from onnxfuse.ir.editing import PASS_KEY
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.passes.deepen import Deepen
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import make_pass
from onnxfuse.pipeline.records import StepReport
from onnxfuse.pytorch.bridge.importer import to_torch

SCHEMES = ("r2r", "net2net")
IMAGE, MAP = "float[N,3,6,6] x", "float[A,B,C,D] y"
TOKENS = {"x": "float[N,T,12] x", "y": "float[A,B,C] y"}


def deepened(model: Model, feed: Feed, **options: Any) -> tuple[Model, StepReport]:
    """By the pass manager, which verifies it."""
    outcome = PassManager([Deepen(**options)]).run(model, context(model, feed))
    assert outcome.steps[0].committed, outcome.steps[0].reason
    return outcome.model, outcome.steps[0]


def added(model: Model) -> list[Node]:
    return [node for node in model.nodes if node.metadata.get(PASS_KEY) == "deepen"]


def new_weights(before: Model, after: Model) -> dict[str, np.ndarray]:
    old = parameters(before)
    return {name: value for name, value in parameters(after).items() if name not in old}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_exact_on_every_kind_of_graph(name: str, scheme: str) -> None:
    """At every place at once; what was there keeps its weights; in float64 to the last places."""
    case = CASES[name]
    model = case.model()
    known = find_sites(model, scheme)
    asked = {site.names[0]: 1 for site in known if site.obstacle is None}
    if not asked:
        return
    outcome = PassManager([Deepen(sites=asked, scheme=scheme)]).run(model, case_context(case, model))
    (step,) = outcome.steps
    assert step.committed, step.reason
    assert len(step.changes) == len(asked)
    grown = outcome.model
    for key, value in parameters(model).items():
        np.testing.assert_array_equal(weight(grown, key), value)
    assert len(added(grown)) == len(grown.nodes) - len(model.nodes) >= len(asked)
    onnx.checker.check_model(grown.to_proto(), full_check=True)
    for batch in (1, 4):
        feed = case.feed(model, batch, seed=batch)
        for got, expected in zip(compute(grown, feed), compute(model, feed), strict=True):
            close(got, expected)
    wider = doubled(model)
    grown = Deepen(sites=asked, scheme=scheme).run(wider.copy(), case_context(case, model)).model
    feed = wide(case.feed(model, 3))
    got, expected = in_float64(grown, feed)[0], in_float64(wider, feed)[0]
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


# A branch behind an operator --------------------------------------------------------------------------------

TAIL = "g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, wy)"
LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    # up to a tensor r of 8 channels, weights, one sample's shape, groups
    "conv": ("h = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(h)", sized("w:8,3,3,3 b:8"), (3, 6, 6), 1),
    "strided": (
        "h = Conv<strides=[2,2], dilations=[2,2]>(x, w) r = Tanh(h)",
        sized("w:8,3,3,3"),
        (3, 9, 9),
        1,
    ),
    "even": ("h = Conv(x, w) r = Relu(h)", sized("w:8,3,2,4"), (3, 6, 6), 1),
    "grouped": ("h = Conv<group=4>(x, w, b) r = Relu(h)", sized("w:8,2,3,3 b:8"), (8, 6, 6), 4),
    "depthwise": ("h = Conv<group=8>(x, w, b) r = Relu(h)", sized("w:8,1,3,3 b:8"), (8, 6, 6), 8),
    "transposed": ("h = ConvTranspose<strides=[2,2]>(x, w) r = Relu(h)", sized("w:3,8,2,2"), (3, 4, 4), 1),
    "no activation": ("r = Conv(x, w, b)", sized("w:8,3,3,3 b:8"), (3, 6, 6), 1),
    "clip": (
        "h = Conv(x, w, b) r = Clip(h, low, high)",
        sized("w:8,3,3,3 b:8") | {"low": np.float32(0), "high": np.float32(6)},
        (3, 6, 6),
        1,
    ),
    "batch norm": (
        "h = Conv(x, w) n = BatchNormalization(h, ng, nb, nm, nv) r = LeakyRelu<alpha=0.3>(n)",
        sized("w:8,3,3,3") | norm("n", 8, 1),
        (3, 6, 6),
        1,
    ),
}
DENSE: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "gemm": ("h = Gemm<transB=1>(x, w, b) r = Relu(h) y = Gemm(r, wy)", sized("w:8,6 b:8 wy:8,4"), (6,)),
    "matmul": (
        "a = MatMul(x, w) h = Add(a, b) r = Relu(h) y = MatMul(r, wy)",
        sized("w:6,8 b:8 wy:8,4"),
        (6,),
    ),
    "bare matmul": ("h = MatMul(x, w) r = Gelu(h) y = MatMul(r, wy)", sized("w:6,8 wy:8,4"), (6,)),
    "tokens": ("h = MatMul(x, w) r = Relu(h) y = MatMul(r, wy)", sized("w:6,8 wy:8,4"), (5, 6)),
}


def layer(name: str) -> tuple[Model, tuple[int, ...], int]:
    """A model, one sample's shape, groups of its first operator."""
    if name in DENSE:
        body, weights, sample = DENSE[name]
        groups = 1
    else:
        body, weights, sample, groups = LAYERS[name]
        body, weights = f"{body} {TAIL}", weights | sized("wy:8,4")
    sizes = ",".join(["N", *map(str, sample)])
    y = f"float[{','.join('ABC'[: 3 if name == 'tokens' else 2])}] y"
    return net(body, weights, f"float[{sizes}] x", y, opset=20), sample, groups


def first(model: Model) -> str:
    return str(model.nodes[0].name or model.nodes[0].outputs[0].name)


@pytest.mark.parametrize("inner", [[1.0], [0.5], [0.5, 2.0], [1.0, 1.0, 0.1]])
@pytest.mark.parametrize("name", [*LAYERS, *DENSE])
def test_a_zero_branch_behind_every_form_of_layer(name: str, inner: list[float]) -> None:
    """[U; U] then [V, -V] in each group, of the kernel's standard deviation, the last operator bare, the sum
    behind the activation."""
    model, sample, groups = layer(name)
    grown, _ = deepened(model, {"x": normal(16, *sample)}, sites={first(model): 1}, inner=inner)
    nodes = added(grown)
    operators = [n for n in nodes if n.op in ("Conv", "Gemm", "MatMul")]
    assert len(operators) == len(inner) + 1
    kernel = weight(model, "w")
    canonical = [v.T if n.op == "MatMul" else v for n in operators for v in [weight(grown, n.inputs[1].name)]]
    channels = 8 // groups
    widths = [groups * max(1, round(share * channels)) for share in inner[:-1]]
    widths.append(groups * 2 * max(1, round(inner[-1] * channels / 2)))
    assert [w.shape[0] for w in canonical] == [*widths, 8]
    assert [w.shape[1] for w in canonical] == [w // groups for w in (8, *widths)]
    assert all(w.shape[2:] == kernel.shape[2:] for w in canonical if len(kernel.shape) > 2)
    u, v = canonical[-2:]
    np.testing.assert_array_equal(u[::2], u[1::2])
    np.testing.assert_array_equal(v[:, ::2], -v[:, 1::2])
    for w, free in zip(canonical, [*canonical[:-2], u[::2], v[:, ::2]], strict=True):
        deviation = min(kernel.std(), np.sqrt(2 / w[0].size))
        assert np.abs(free).max() <= np.sqrt(3) * deviation * (1 + 1e-6)
        if free.size > 50:
            assert free.std() == pytest.approx(deviation, rel=0.25)
    total = nodes[-1]
    assert total.op == "Add"
    assert total.outputs[0].name == "r"
    last = grown.producer(total.inputs[1])
    assert last is not None
    assert last is operators[-1] or (last.op == "Add" and last.inputs[0].inputs[0] is operators[-1])
    activations = [n.op for n in model.nodes if n.op in ("Relu", "Tanh", "Clip", "LeakyRelu", "Gelu")] or [
        "Relu"
    ]
    assert [n.op for n in nodes if n.op in activations] == activations[:1] * len(inner)
    biased = any(len(n.inputs) > 2 and n.op in ("Conv", "Gemm") for n in model.nodes[:1]) or name == "matmul"
    assert sum(value.ndim == 1 for value in new_weights(model, grown).values()) == biased * len(operators)
    for batch in (1, 3):
        feed = {"x": normal(batch, *sample, seed=batch)}
        close(compute(grown, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize("name", [*LAYERS, *DENSE])
def test_an_identity_layer_behind_every_form_of_layer(name: str) -> None:
    model, sample, _ = layer(name)
    psi = [n.op for n in model.nodes if n.op in ("Relu", "Tanh", "Clip", "LeakyRelu", "Gelu")]
    site = {first(model): 1}
    if psi and psi[0] in ("Tanh", "LeakyRelu", "Gelu"):
        ctx = context(model, {"x": normal(16, *sample)})
        with pytest.raises(NotApplicableError, match=f"{psi[0]} applied twice is not {psi[0]} applied once"):
            Deepen(sites=site, scheme="net2net").run(model.copy(), ctx)
        return
    grown, _ = deepened(model, {"x": normal(16, *sample)}, sites=site, scheme="net2net")
    nodes = added(grown)
    (operator,) = (n for n in nodes if n.op in ("Conv", "Gemm", "MatMul"))
    assert [n.op for n in nodes if n.op in psi] == psi[:1]
    value = weight(grown, operator.inputs[1].name)
    assert np.count_nonzero(value) == value.sum() == 8
    feed = {"x": normal(5, *sample, seed=1)}
    np.testing.assert_array_equal(compute(grown, feed, "r")[0], compute(model, feed, "r")[0])


@pytest.mark.parametrize(
    "op", ["Relu", "Clip", "ThresholdedRelu", "Abs", "Sigmoid", "Elu", "HardSwish", "Erf"]
)
def test_net2net_takes_what_is_idempotent(op: str) -> None:
    model = net(f"h = MatMul(x, w) r = {op}(h) y = MatMul(r, wy)", sized("w:6,8 wy:8,4"))
    feed = {"x": 3 * normal(16, 6)}
    (twice,) = compute(net(f"h = {op}(x) y = {op}(h)", {}), feed)
    idempotent = np.array_equal(twice, compute(net(f"y = {op}(x)", {}), feed)[0])
    (site,) = (s for s in find_sites(model, "net2net") if s.names == ("h",))
    assert (site.obstacle is None) is idempotent


def test_several_times_and_over_again() -> None:
    model, sample, _ = layer("conv")
    feed = {"x": normal(16, *sample)}
    grown, step = deepened(model, feed, sites={"h": 3})
    assert step.changes[0].what == "zero branch of 2 operators behind it, 3 times"
    assert [n.op for n in added(grown)] == ["Conv", "Relu", "Conv", "Add"] * 3
    for _ in range(4):
        grown, _ = deepened(grown, feed, sites={"h": 1})
    for scheme in SCHEMES:
        grown, _ = deepened(grown, feed, sites={"h": 1}, scheme=scheme)
    names = [n.name for n in added(grown)]
    assert len(set(names)) == len(names)
    close(compute(grown, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize("name", [*LAYERS, *DENSE])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_new_weights_learn_and_twins_part(name: str, scheme: str) -> None:
    """The first step moves every new weight, through a branch that is zero; then twins differ."""
    model, sample, _ = layer(name)
    known = [s for s in find_sites(model, scheme) if s.obstacle is None]
    if not known:
        return
    grown, _ = deepened(model, {"x": normal(16, *sample)}, sites={first(model): 1}, scheme=scheme)
    module = to_torch(grown)
    found = gradients(module, {"x": normal(32, *sample, seed=3)}, ["x"], 0)
    trained = {key: p.detach().numpy() for key, p in module.named_parameters()}
    new = new_weights(model, grown)
    bounds = {"low", "high"}
    assert set(new) - bounds <= set(found)
    for key in set(new) - bounds:
        assert (found[key] != 0).mean() > 0.7, key
    if scheme == "r2r":
        u, _ = (n for n in added(grown) if n.op in ("Conv", "Gemm", "MatMul"))
        rows = trained[u.inputs[1].name]
        rows = rows.T if u.op == "MatMul" else rows
        assert (rows[::2] != rows[1::2]).mean() > 0.7


def test_a_relu_behind_a_zero_branch_would_be_dead() -> None:
    """Why a branch ends in a linear operator: the same network with a ReLU in front of the sum learns nothing
    in it, for ever."""
    model, feed = block("convolutions")
    grown, _ = deepened(model, feed, sites={"s": 1})
    total = added(grown)[-1]
    total.inputs[1] = grown.add_node("Relu", [total.inputs[1]], ["dead"], by="test").outputs[0]
    module = to_torch(grown)
    for step in range(3):
        found = gradients(module, feed, ["x"], step)
        assert not any(found[key].any() for key in new_weights(model, grown))
        assert found["w1"].any()


def test_operators_that_share_weights_get_layers_that_share_weights() -> None:
    case = CASES["two branches with shared weights"]
    model = case.model()
    feed = case.feed(model, 16)
    for scheme, count in (("r2r", 2), ("net2net", 1)):
        grown, step = deepened(model, [feed, feed], sites={"b": 1}, scheme=scheme)
        assert step.changes[0].nodes == ("a", "b")
        convolutions = [n for n in added(grown) if n.op == "Conv"]
        assert len(convolutions) == 2 * count
        assert len({n.inputs[1] for n in convolutions}) == count
        (got,), (expected,) = compute(grown, feed), compute(model, feed)
        close(got, expected)


# Copies of blocks -------------------------------------------------------------------------------------------

BN = f"n = BatchNormalization(d, ng, nb, nm, nv) s = Add(n, u) last = Relu(s) {POOLED}"
BLOCKS: dict[str, tuple[str, dict[str, Any], dict[str, str], list[str]]] = {
    # nodes with a sum s, weights, inputs and outputs, operators of a copy
    "convolutions": (
        f"""a = Conv<pads=[1,1,1,1]>(x, w0) u = Relu(a) c = Conv<pads=[1,1,1,1]>(u, w1, b1) r = Relu(c)
        d = Conv<pads=[1,1,1,1]>(r, w2, b2) s = Add(u, d) last = Relu(s) {POOLED}""",
        sized("w0:8,3,3,3 w1:10,8,3,3 b1:10 w2:8,10,3,3 b2:8 wy:8,4 by:4"),
        {"x": IMAGE},
        ["Relu", "Conv", "Relu", "Conv", "Add"],
    ),
    "batch norm at the end": (
        f"""a = Conv<pads=[1,1,1,1]>(x, w0) u = Relu(a) c = Conv<pads=[1,1,1,1]>(u, w1) r = Relu(c)
        d = Conv<pads=[1,1,1,1]>(r, w2) {BN}""",
        sized("w0:8,3,3,3 w1:10,8,3,3 w2:8,10,3,3 wy:8,4 by:4") | norm("n", 8, 1),
        {"x": IMAGE},
        ["Relu", "Conv", "Relu", "Conv", "BatchNormalization", "Add"],
    ),
    "norm before, in a stream": (
        """u = MatMul(x, w0) n = LayerNormalization(u, g, b) h = MatMul(n, w1) r = Gelu(h) k = MatMul(r, w2)
        kb = Add(k, b2) t = Mul(kb, scale) s = Add(u, t) m = LayerNormalization(s, g2, b3)
        y = MatMul(m, w3)""",
        sized("w0:12,12 w1:12,20 w2:20,12 w3:12,4 b:12 b2:12 b3:12 scale:12")
        | {"g": positive(12), "g2": positive(12, seed=3)},
        TOKENS,
        ["LayerNormalization", "MatMul", "Gelu", "MatMul", "Add", "Mul", "Add"],
    ),
    "norm behind": (
        """e = MatMul(x, w0) u = LayerNormalization(e, g, b) h = MatMul(u, w1) r = Relu(h) k = MatMul(r, w2)
        s = Add(k, u) m = LayerNormalization(s, g2, b3) y = MatMul(m, w3)""",
        sized("w0:12,12 w1:12,20 w2:20,12 w3:12,4 b:12 b3:12")
        | {"g": positive(12), "g2": positive(12, seed=3)},
        TOKENS,
        ["LayerNormalization", "MatMul", "Relu", "MatMul", "Add"],
    ),
    "a weight prepared, a mask from elsewhere": (
        """u = MatMul(x, w0) wt = Transpose(w1) h = MatMul(u, wt) z = Abs(x) o = ReduceMax<axes=[-1]>(z)
        hm = Mul(h, o) r = Relu(hm) k = MatMul(r, w2) s = Add(u, k) y = MatMul(s, w3)""",
        sized("w0:12,12 w1:20,12 w2:20,12 w3:12,4"),
        TOKENS,
        ["Transpose", "MatMul", "Mul", "Relu", "MatMul", "Add"],
    ),
}


def block(name: str) -> tuple[Model, Feed]:
    body, weights, ends, _ = BLOCKS[name]
    opset = 17 if "axes=" in body else 20
    model = net(body, weights, ends["x"], ends.get("y", "float[A,B] y"), opset)
    return model, {"x": normal(16, 3, 6, 6) if ends["x"] == IMAGE else normal(16, 5, 12)}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_copy_of_a_block(name: str) -> None:
    """The nodes of the block and of what leads to it, on weights of their own, equal but for the last, which
    are zero; behind the sum, before its activation; all of it learns by the second step."""
    model, feed = block(name)
    grown, step = deepened(model, feed, sites={"s": 1})
    assert [c.what for c in step.changes] == ["copy of the block"]
    nodes = added(grown)
    assert [n.op for n in nodes] == BLOCKS[name][3]
    assert nodes[-1].outputs[0].name == "s"
    zeros = 0
    for key, value in new_weights(model, grown).items():
        original = weight(model, key.split(".", 2)[2])
        assert not value.any() or np.array_equal(value, original)
        zeros += not value.any()
    assert zeros == (1 if name in ("norm behind", "a weight prepared, a mask from elsewhere") else 2)
    for key, value in parameters(model).items():
        np.testing.assert_array_equal(weight(grown, key), value)
    for batch in (1, 3):
        few = {"x": normal(batch, *feed["x"].shape[1:], seed=batch)}
        close(compute(grown, few)[0], compute(model, few)[0])
    module = to_torch(grown)
    steps = [gradients(module, feed, ["x"], seed) for seed in range(2)]
    for key in new_weights(model, grown):
        if key in steps[0]:
            own = weight(grown, key)
            assert steps[0][key].any() is np.bool_(not own.any()), key
            assert (steps[1][key] != 0).mean() > 0.5, key


def test_a_chain_of_blocks_is_copied_together() -> None:
    """Attention and MLP of a layer with heads and norms: two output projections are zero."""
    body = """u = MatMul(x, w0)
        n = LayerNormalization(u, g, b) q0 = MatMul(n, wq) q1 = Reshape(q0, heads)
        q = Transpose<perm=[0,2,1,3]>(q1) k0 = MatMul(n, wk) k1 = Reshape(k0, heads)
        k = Transpose<perm=[0,2,3,1]>(k1) v0 = MatMul(n, wv) v1 = Reshape(v0, heads)
        v = Transpose<perm=[0,2,1,3]>(v1) c = MatMul(q, k) p = Softmax(c) o = MatMul(p, v)
        o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, back) ao = MatMul(o2, wo) s1 = Add(u, ao)
        m = LayerNormalization(s1, g2, b3) h = MatMul(m, w1) r = Gelu(h) f = MatMul(r, w2) s2 = Add(s1, f)
        l = LayerNormalization(s2, g, b) y = MatMul(l, w3)"""
    weights = sized("w0:12,12 wq:12,12 wk:12,12 wv:12,12 wo:12,12 w1:12,20 w2:20,12 w3:12,4 b:12 b3:12")
    weights |= {"g": positive(12), "g2": positive(12, seed=3)}
    weights |= {"heads": np.array([0, 0, 3, 4]), "back": np.array([0, 0, -1])}
    model = net(body, weights, TOKENS["x"], TOKENS["y"], opset=20)
    feed = {"x": normal(16, 5, 12)}
    grown, step = deepened(model, feed, sites={"s2": 2}, blocks=2)
    assert step.changes[0].what == "copy of 2 blocks, 2 times"
    inside = [n.op for n in model.nodes][1:-2]
    assert sorted(n.op for n in added(grown)) == sorted(2 * inside)
    new = new_weights(model, grown)
    assert {key.split(".")[-1] for key, value in new.items() if not value.any()} == {"wo", "w2"}
    assert len(new) == 2 * 10
    close(compute(grown, feed)[0], compute(model, feed)[0])
    module = to_torch(grown)
    moved = [gradients(module, feed, ["x"], seed) for seed in range(2)][-1]
    assert all(np.abs(moved[key]).max() > 1e-6 for key in new)
    both, _ = deepened(model, feed)
    assert len([n for n in added(both) if n.op == "Add"]) == 2  # all: each sum, once
    with pytest.raises(NotApplicableError, match="there are only 2 residual blocks in a row"):
        Deepen(sites={"s2": 1}, blocks=3).run(model.copy(), context(model, feed))


def test_blocks_and_layers_at_once_and_over_again() -> None:
    model, feed = block("convolutions")
    grown = model
    for _ in range(3):
        grown, step = deepened(grown, feed, sites={"s": 2, "[ad]": 1})
        assert len(step.changes) == 3
    # Two copies, each with the branches that the block has by then, and two branches.
    assert len([n for n in added(grown) if n.op == "Add"]) == 4 + 6 + 8
    close(compute(grown, feed)[0], compute(model, feed)[0])


def residual(branch: str, more: str = "", **weights: Any) -> Model:
    body = f"u = MatMul(x, w0) {branch} s = Add(u, k) y = MatMul(s, w3)"
    return net(body, sized(f"w0:6,6 w3:6,4 {more}") | weights)


def test_a_weight_behind_a_transpose_is_copied_with_it() -> None:
    model = residual("v = Transpose(w1) k = MatMul(u, v)", "w1:6,6")
    feed = {"x": normal(16, 6)}
    grown, step = deepened(model, feed, sites={"s": 1})
    (copy,) = new_weights(model, grown).values()
    assert copy.shape == (6, 6)
    assert not copy.any()
    np.testing.assert_array_equal(weight(grown, "w1"), weight(model, "w1"))
    np.testing.assert_array_equal(compute(grown, feed)[0], compute(model, feed)[0])
    assert step.changes


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            residual("h = MatMul(u, w1) k = Relu(h)", "w1:6,6"),
            r"ends in 'k' \(Relu\): behind that a zero branch",
        ),
        (residual("h = MatMul(u, w1) k = Softmax(h)", "w1:6,6"), r"ends in 'k' \(Softmax\), not in a linear"),
        (residual("v = Neg(w1) k = MatMul(u, v)", "w1:6,6"), "not in a linear operator"),
        (residual("a = MatMul(u, w1) h = Relu(a) k = MatMul(h, w1)", "w1:6,6"), "more than once"),
        (
            residual(
                """h = If(flag) <then_branch = t () => (float[A,B] p) { p = Neg(u) },
                else_branch = e () => (float[A,B] q) { q = Exp(u) }> k = MatMul(h, w1)""",
                "w1:6,6",
                flag=np.array(True),
            ),
            "its branch runs a subgraph",
        ),
    ],
)
def test_blocks_that_can_not_be_copied(model: Model, message: str) -> None:
    with pytest.raises(NotApplicableError, match=f"'s' can't be deepened: .*{message}"):
        Deepen(sites={"s": 1}).run(model.copy(), context(model, {"x": normal(16, 6)}))


def test_sums_that_are_no_blocks() -> None:
    """Two branches, a bias, a mask: nothing goes around."""
    body = "a = MatMul(x, w1) b = MatMul(x, w2) s = Add(a, b) t = Add(s, c) y = MatMul(t, w3)"
    model = net(body, sized("w1:6,8 w2:6,8 c:8 w3:8,4"))
    assert [site.names for site in find_sites(model, "r2r") if site.sum] == []
    _, step = deepened(model, {"x": normal(16, 6)})
    assert [c.nodes for c in step.changes] == [("a",), ("b",)]  # all: every operator, for want of sums
    assert [s.reason for s in step.skipped] == ["no operator with weights follows it"]


# Which ------------------------------------------------------------------------------------------------------


def asked(sites: dict[str, int], name: str = "convolutions", **options: Any) -> Sequence[tuple[str, ...]]:
    model, feed = block(name)
    return [c.nodes for c in Deepen(sites=sites, **options).run(model.copy(), context(model, feed)).changes]


def test_sites_are_names_patterns_or_all() -> None:
    assert asked({"all": 1}) == [("s",)]
    assert asked({"a": 1}) == [("a",)]
    assert asked({"*": 1}) == [("s",), ("a",), ("c",), ("d",)]
    assert asked({"*": 1}, scheme="net2net") == [("a",), ("c",), ("d",)]
    with pytest.raises(InputError, match="there is no operator or residual sum 'k'; known: a, c, d, y, s"):
        asked({"k": 1})
    with pytest.raises(
        NotApplicableError, match="'y' can't be deepened: no operator with weights follows it"
    ):
        asked({"y": 1})
    with pytest.raises(NotApplicableError, match="'s' can't be deepened: net2net adds layers, not blocks"):
        asked({"s": 1}, scheme="net2net")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": {"a": 0}}, "option 'sites.a' should be greater than or equal to 1"),
        ({"scheme": "netmorph"}, "option 'scheme' should be 'r2r' or 'net2net'"),
        ({"inner": []}, "option 'inner'"),
        ({"inner": [0]}, "option 'inner.0' should be greater than 0"),
        ({"blocks": 0}, "option 'blocks'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_pass("deepen", options)


def test_what_a_body_captures_is_the_deepened_tensor() -> None:
    body = """h = MatMul(x, w) r = Relu(h)
        c = If(flag) <then_branch = t () => (float[A,B] p) { p = Neg(r) },
                      else_branch = e () => (float[A,B] q) { q = Exp(r) }> y = MatMul(c, wy)"""
    model = net(body, sized("w:6,8 wy:8,4"), "float[N,6] x, bool flag")
    feed = {"x": normal(4, 6), "flag": np.array(True)}
    grown, _ = deepened(model, [feed, feed], sites={"h": 1})
    assert grown.producer(grown.tensor("r")).op == "Add"
    close(compute(grown, feed)[0], compute(model, feed)[0])


def test_torch_sees_the_same_function() -> None:
    """A reference that shares no code with the passes' own check."""
    model, feed = block("convolutions")
    grown, _ = deepened(model, feed, sites={"s": 1, "c": 1})
    with torch.no_grad():
        got = to_torch(grown)(torch.from_numpy(feed["x"])).numpy()
    close(got, compute(model, feed)[0])
