"""widen: exact on every kind of graph by every scheme that can be; which numbers go where; refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx.checker
import pytest
from channel_cases import CASES, Case, close, found, parameters, sized
from growth_checks import case_context, doubled, gradients, in_float64, new_elements, wide
from nets import compute, context, net, normal, weight

from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import Group
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.passes.widen import Widen
from onnxfuse.pipeline.base import Context, PassResult
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import make_pass
from onnxfuse.pytorch.bridge.importer import to_torch

SCHEMES = ("r2r", "net2net", "netmorph")
STATISTICS = "takes statistics over the channels, which stay only if all are repeated equally often"
ALONE = "sums up over the channels without stored weights"
BOTH = "both computes and reads the channels"

# Groups that can't be widened, by their structure, with the reason.
NEVER = {
    "attention": ("3 x [4]", ALONE),
    "grouped-query attention": ("2 x 3 x [4]", ALONE),
    "fused query, key and value, rotary": ("[2]", ALONE),
    "the Attention operator": ("[4]", ALONE),
    "the Attention operator, heads apart": ("3 x [4]", ALONE),
    "L2 norm over channels": ("[8]", ALONE),
    "key-value heads repeated by Tile and by Concat": ("2 x 2 x [4]", ALONE),
    "key-value heads repeated by a computed list": ("2 x 2 x [4]", ALONE),
}
UNLESS_ALL_ALIKE = {
    "embedding and layer norm": "[12]",
    "layer norm written out": "[12]",
    "rms norm": "[12]",
    "group norm written out": "[3]",
    "spatial gate": "[8]",
}


def refusals(name: str, scheme: str, ratio: float) -> list[tuple[str, str]]:
    """What must be refused: part of a structure and of a reason."""
    listed = [NEVER[name]] if name in NEVER else []
    if name in UNLESS_ALL_ALIKE and not (scheme == "net2net" and ratio == 2):
        listed.append((UNLESS_ALL_ALIKE[name], STATISTICS))
    if name == "tied weights" and scheme != "netmorph":
        listed.append(("[12]", BOTH))
    return listed


def widened(model: Model, ctx: Context, **options: Any) -> PassResult:
    return Widen(**options).run(model.copy(), ctx)


def wanted_size(group: Group, scheme: str, ratio: float) -> int:
    """Leaf by leaf, to the nearest; of twins an even number more, one pair or one channel at least."""
    total = 0
    for leaf in group.leaves:
        more = max(1, round(leaf.size * (ratio - 1)))
        total += leaf.size + more + (more % 2 if scheme == "r2r" else 0)
    return total


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_exact_on_every_kind_of_graph(name: str, scheme: str) -> None:
    """Verified as the pass manager does, and here without any of it; sizes as asked; what can't be is refused
    with its reason."""
    case = CASES[name]
    model = case.model()
    for ratio in (1.5, 2.0):
        outcome = PassManager([Widen(sites={"all": ratio}, scheme=scheme)]).run(
            model, case_context(case, model)
        )
        (step,) = outcome.steps
        assert step.committed, step.reason
        groups = list(found(case, model))
        refused = refusals(name, scheme, ratio)
        free = {g.name for g in groups if g.frozen is None}
        skipped = {s.nodes[0]: s.reason for s in step.skipped}
        assert {c.nodes[0] for c in step.changes} == free - set(skipped)
        assert set(skipped) - free == {g.name for g in groups if g.frozen}
        assert len(free & set(skipped)) == len(refused)
        for part, reason in refused:
            own = [g for g in groups if g.name in free & set(skipped) and part in g.structure]
            assert any(reason in skipped[g.name] for g in own)
        for old, new in zip(groups, found(case, outcome.model), strict=True):
            changed = old.name not in skipped
            assert new.size == (wanted_size(old, scheme, ratio) if changed else old.size)
        onnx.checker.check_model(outcome.model.to_proto(), full_check=True)
        for batch in (1, 4):
            feed = case.feed(model, batch, seed=batch)
            for got, expected in zip(compute(outcome.model, feed), compute(model, feed), strict=True):
                close(got, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_exact_in_float64(name: str, scheme: str) -> None:
    case = CASES[name]
    model = doubled(case.model())
    feed = wide(case.feed(model, 4))
    calibration = context(model, [feed], held_out=0.0)
    result = widened(model, calibration, sites={"all": 2.0}, scheme=scheme, noise=0.5)
    free = [group for group in found(case, case.model()) if group.frozen is None]
    assert len(result.changes) == len(free) - len(refusals(name, scheme, 2.0))
    for batch in (1, 3):
        feed = wide(case.feed(model, batch, seed=batch))
        (expected, *_), (got, *_) = in_float64(model, feed), in_float64(result.model, feed)
        assert got.dtype == np.float64
        assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "name", ["plain", "residual", "shortcut of Slice and Pad", "attention", "LSTM", "concat"]
)
def test_five_times_over(name: str, scheme: str) -> None:
    case = CASES[name]
    model = grown = case.model()
    for seed in range(5):
        step_context = case_context(case, model, seed)
        outcome = PassManager([Widen(sites={"all": 1.3}, scheme=scheme)]).run(grown, step_context)
        assert outcome.steps[0].committed, outcome.steps[0].reason
        grown = outcome.model
    for old, new in zip(found(case, model).free, found(case, grown).free, strict=True):
        assert (new.size > 2 * old.size) == (new.size > old.size)
    feed = case.feed(model, 3, seed=7)
    close(compute(grown, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_and_back(name: str, scheme: str) -> None:
    """Taking the original channels gives every original weight back, but for what net2net has shared out."""
    case = CASES[name]
    model = case.model()
    grown = widened(model, case_context(case, model), sites={"all": 2}, scheme=scheme).model
    back = grown.copy()
    choice, reading = {}, set()
    for old, new in zip(found(case, model), found(case, grown), strict=True):
        if old.frozen is None and new.size > old.size:
            sizes = [leaf.size for leaf in new.leaves]
            offsets = np.cumsum([0, *sizes[:-1]])
            choice[new] = np.concatenate(
                [np.arange(leaf.size) + offset for leaf, offset in zip(old.leaves, offsets, strict=True)]
            )
            reading |= {touch.weight for touch in old.touches if "consumer" in touch.roles}
    take(back, choice)
    for key, value in parameters(back).items():
        if value.dtype.kind == "f" and not (scheme == "net2net" and key in reading):
            np.testing.assert_array_equal(value, weight(model, key), err_msg=key)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "dense", "batch norm", "residual", "concat", "grouped", "depthwise", "flatten to dense"),
        *("inverted residual with SE", "embedding and layer norm", "attention", "LSTM"),
    ],
)
def test_new_weights_learn_and_twins_part(name: str, scheme: str) -> None:
    """Every new element gets a gradient: at once, or of netmorph, where one zero may stand behind another, in
    the third step at the latest. Then no new channel is another's copy, neither in what computes it nor in
    what reads it."""
    case = CASES[name]
    model = replace(case, body=case.body.replace("Relu(", "LeakyRelu(")).model()
    grown = widened(model, case_context(case, model), sites={"all": 2}, scheme=scheme).model
    module = to_torch(grown)
    inputs = [info.name for info in grown.inputs]
    seen: dict[str, np.ndarray] = {}
    for step in range(3 if scheme == "netmorph" else 1):
        for key, gradient in gradients(module, case.feed(model, 8, seed=step), inputs, step).items():
            seen[key] = seen.get(key, np.zeros(gradient.shape, bool)) | (gradient != 0)
    trained = {key: p.detach().numpy() for key, p in module.named_parameters()}
    checked = 0
    for key, new in new_elements(case, model, grown).items():
        if key in seen:
            # A kernel's outer taps may see nothing but padding, and a bias before a softmax moves nothing.
            share = seen[key][new].mean() if new.any() else 1.0
            assert share > 0.95 or key == "bk", (key, share)
            checked += int(new.any())
    assert checked >= 2
    for group in found(case, grown).free:
        for touch in group.touches:
            if touch.weight in trained and {"producer", "consumer"} & set(touch.roles):
                front = np.moveaxis(trained[touch.weight], touch.axis, 0)[touch.map]
                rows = front.reshape(len(touch.map), -1)
                assert len(np.unique(rows, axis=0)) == len(rows), touch.weight


def test_without_noise_copies_of_net2net_stay_copies() -> None:
    case = CASES["dense"]
    model = case.model()
    grown = widened(model, case_context(case, model), sites={"h": 2}, scheme="net2net", noise=0).model
    module = to_torch(grown)
    for step in range(3):
        gradients(module, case.feed(model, 8, seed=step), ["x"], step)
    w1 = dict(module.named_parameters())["w1"].detach().numpy()
    assert len(np.unique(w1.round(5), axis=1).T) == 12
    assert np.abs(w1[:, :12] - weight(model, "w1")).max() > 1e-3


# The numbers ----------------------------------------------------------------------------------------


def plain(ratio: float, **options: Any) -> tuple[Model, Model]:
    """A convolution widened, with bias and what reads it."""
    case = CASES["plain"]
    model = case.model()
    return model, widened(model, case_context(case, model), sites={"a": ratio}, **options).model


def test_r2r_is_twins_that_cancel() -> None:
    """Equations (8) and (9), and the standard deviations of the kernels that are joined."""
    model, grown = plain(6, scheme="r2r")
    w1, b1, w2 = (weight(grown, name) for name in ("w1", "b1", "w2"))
    np.testing.assert_array_equal(w1[:8], weight(model, "w1"))
    np.testing.assert_array_equal(w1[8::2], w1[9::2])
    np.testing.assert_array_equal(b1[:8], weight(model, "b1"))
    np.testing.assert_array_equal(b1[8::2], b1[9::2])
    np.testing.assert_array_equal(w2[:, :8], weight(model, "w2"))
    np.testing.assert_array_equal(w2[:, 8::2], -w2[:, 9::2])
    for new, old in ((w1[8::2], weight(model, "w1")), (w2[:, 8::2], weight(model, "w2"))):
        assert len(np.unique(new)) == new.size
        assert new.std() == pytest.approx(old.std(), rel=0.1)
        assert np.abs(new).max() <= np.sqrt(3) * old.std() * (1 + 1e-6)
        assert abs(new.mean()) < 0.15 * old.std()


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_net2net_shares_among_copies(noise: float) -> None:
    """Equation (6): rows of the producer by a map g, columns of the consumer divided; noise sums to zero."""
    model, grown = plain(2.5, scheme="net2net", noise=noise)
    old1, old2 = weight(model, "w1"), weight(model, "w2")
    w1, b1, w2 = (weight(grown, name) for name in ("w1", "b1", "w2"))
    assert len(w1) == 20
    g = np.array([int(np.flatnonzero((old1 == row).all(axis=(1, 2, 3)))[0]) for row in w1])
    np.testing.assert_array_equal(g[:8], np.arange(8))
    times = np.bincount(g, minlength=8)
    assert set(times) == {2, 3}  # as evenly as can be
    np.testing.assert_array_equal(b1, weight(model, "b1")[g])
    equal = old2[:, g] / times[g][:, None, None]
    off = w2 - equal
    if noise == 0:
        np.testing.assert_allclose(w2, equal, rtol=1e-6)
    else:
        assert off.std() == pytest.approx(noise * old2.std(), rel=0.35)
        for channel in range(8):
            np.testing.assert_allclose(w2[:, g == channel].sum(axis=1), old2[:, channel], atol=1e-6)


def test_netmorph_is_read_by_nothing() -> None:
    """Equation (7), with the zeros in what reads the new channels."""
    model, grown = plain(1.6, scheme="netmorph")
    w1, w2 = weight(grown, "w1"), weight(grown, "w2")
    assert len(w1) == 13
    np.testing.assert_array_equal(w1[:8], weight(model, "w1"))
    assert np.abs(w1[8:]).min() > 0
    np.testing.assert_array_equal(w2[:, :8], weight(model, "w2"))
    assert not w2[:, 8:].any()


def test_normalisation_is_that_of_the_channel_copied() -> None:
    case = CASES["batch norm"]
    model = case.model()
    grown = widened(model, case_context(case, model), sites={"a": 2}).model
    old = np.stack([weight(model, f"n{k}") for k in "gbmv"])
    new = np.stack([weight(grown, f"n{k}") for k in "gbmv"])
    sources = [int(np.flatnonzero((row == old.T).all(axis=1))[0]) for row in new.T]
    assert sources[:8] == list(range(8))
    assert sources[8::2] == sources[9::2]
    assert len(set(sources[8::2])) == 4


def test_one_weight_at_several_nodes_is_widened_once() -> None:
    case = CASES["two branches with shared weights"]
    model = case.model()
    grown = widened(model, case_context(case, model), sites={"b": 2}).model
    assert weight(grown, "w1").shape == (12, 3, 3, 3)
    assert weight(grown, "w2").shape == (5, 24, 3, 3)
    assert [t.name for t in grown.initializers] == [t.name for t in model.initializers]


def test_a_single_weight_has_a_spread() -> None:
    """A kernel of one number has the standard deviation zero, and new weights must not all be zero."""
    model = net(
        "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)", {"w1": (6, 2), "w2": np.ones((2, 1), np.float32)}
    )
    grown = widened(model, context(model, {"x": normal(8, 6)}), sites={"h": 2}).model
    assert np.abs(weight(grown, "w2")).min() > 0


def test_equal_seeds_give_equal_bytes() -> None:
    case = CASES["plain"]
    model = case.model()
    first, second, other = (
        Widen()
        .run(model.copy(), case_context(case, model, seed))
        .model.to_proto()
        .SerializeToString(deterministic=True)
        for seed in (1, 1, 2)
    )
    assert first == second != other


# Which --------------------------------------------------------------------------------------------------


def changes(sites: dict[str, float], **options: Any) -> dict[str, str]:
    case = CASES["residual"]
    model = case.model()
    return {
        c.nodes[0]: c.what for c in widened(model, case_context(case, model), sites=sites, **options).changes
    }


def test_sites_are_names_patterns_or_all() -> None:
    assert changes({"c": 2}) == {"c": "10 channels become 20"}
    assert changes({"d": 1.5}) == {"a": "8 channels become 12"}  # by another operator that computes them
    assert changes({"[ce]": 1.2}) == {"c": "10 channels become 12", "e": "5 channels become 7"}
    assert changes({"all": 2, "c": 1.5}) == {
        "a": "8 channels become 16",
        "e": "5 channels become 11",
        "c": "10 channels become 16",
    }
    assert changes({"c": 1.5, "all": 2})["c"] == "10 channels become 20"


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"there is no channel group 'k'; known: a, .*c, e, y"):
        changes({"k": 2})
    with pytest.raises(InputError, match="there is no channel group 'k\\*'"):
        changes({"a": 2, "k*": 2})


def test_what_is_named_and_frozen_is_refused_with_its_reason() -> None:
    with pytest.raises(NotApplicableError, match="'y' can't be widened: it reaches the graph output 'y'"):
        changes({"y": 2})
    case = CASES["rms norm"]
    model = case.model()
    with pytest.raises(
        NotApplicableError, match=f"'h' can't be widened: 'n' \\(RMSNormalization\\) {STATISTICS}"
    ):
        widened(model, case_context(case, model), sites={"h": 2})


def test_a_pattern_leaves_what_is_frozen_and_says_so() -> None:
    case = CASES["rms norm"]
    model = case.model()
    result = widened(model, case_context(case, model), sites={"*": 2})
    assert not result.changes
    assert result.notes == [
        f"nothing to widen; the first of {len(result.skipped)}: "
        f"'{result.skipped[0].nodes[0]}', {result.skipped[0].reason}"
    ]
    assert result.model.to_proto() == model.to_proto()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": {"a": 1}}, "option 'sites.a' should be greater than 1, not 1"),
        ({"sites": {"a": float("inf")}}, "should be a finite number"),
        ({"sites": {}}, "option 'sites'"),
        ({"scheme": "net3net"}, "'r2r', 'net2net' or 'netmorph'"),
        ({"noise": -1}, "option 'noise'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_pass("widen", options)


def test_weights_that_can_not_be_shared_out() -> None:
    """Quantized or computed from other weights: what reads the channels can't be set."""
    body = "h = MatMul(x, w1) r = Relu(h) {} y = MatMul(r, v)"
    scaled = Case(body.format("v = Exp(w2)"), sized("w1:5,8 w2:8,3"), (8,), 2, x="float[N,5] x")
    model = scaled.model()
    with pytest.raises(NotApplicableError, match="'v' \\(Exp\\) changes 'w2' before it reads the channels"):
        widened(model, case_context(scaled, model), sites={"h": 2})
    moved = replace(scaled, body=body.format("v = Transpose(w2)"), weights=sized("w1:5,8 w2:3,8"))
    model = moved.model()
    grown = widened(model, case_context(moved, model), sites={"h": 2}).model
    assert weight(grown, "w2").shape == (3, 16)
    quantized = {"w2": np.arange(24, dtype=np.int8).reshape(8, 3), "s": np.float32(0.1)}
    eight = replace(
        scaled, body=body.format("v = DequantizeLinear(w2, s)"), weights=sized("w1:5,8") | quantized
    )
    model = eight.model()
    with pytest.raises(NotApplicableError, match="'w2', which reads the channels, is stored as int8"):
        widened(model, case_context(eight, model), sites={"h": 2})


def test_the_pass_leaves_its_input_alone() -> None:
    case = CASES["plain"]
    model = case.model()
    before = model.to_proto().SerializeToString(deterministic=True)
    outcome = PassManager([Widen()]).run(model, case_context(case, model))
    assert outcome.steps[0].committed
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_a_layer_without_channels_is_left_alone() -> None:
    weights = {"w": np.zeros((6, 0), np.float32), "w2": np.zeros((0, 5), np.float32)}
    model = net("h = MatMul(x, w) r = Relu(h) y = MatMul(r, w2)", weights)
    with pytest.raises(NotApplicableError, match="no channels that new ones could be copies of"):
        widened(model, context(model, {"x": normal(8, 6)}), sites={"h": 2})
