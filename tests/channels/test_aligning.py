"""Putting channels in order: what was shuffled comes back, and no function changes."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from nets import RUNTIME, compute, net, normal, weight

from onnxfuse.channels.aligning import align
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import find_groups
from onnxfuse.ir.model import Model

# Two branches on one input: their hidden channels are groups of their own.
BRANCHES = """a1 = Gemm(x, wa1, ba1) ra = Relu(a1) a2 = Gemm(ra, wa2)
    b1 = Gemm(x, wb1, bb1) rb = Relu(b1) b2 = Gemm(rb, wb2) y = Add(a2, b2)"""


def branches(hidden: int = 7, seed: int = 3) -> tuple[Model, np.ndarray]:
    """The second branch is the first with its hidden channels shuffled; and the shuffle."""
    order = np.random.default_rng(seed).permutation(hidden)
    first = {"wa1": normal(6, hidden), "ba1": normal(hidden, seed=1), "wa2": normal(hidden, 5, seed=2)}
    second = {"wb1": first["wa1"][:, order], "bb1": first["ba1"][order], "wb2": first["wa2"][order]}
    return net(BRANCHES, {**first, **second}), order


def test_shuffled_channels_come_back() -> None:
    model, _ = branches()
    found = find_groups(model, {"x": normal(3, 6)}, RUNTIME)
    chosen = align(model, found, [("wa1", "wb1"), ("wa2", "wb2")])
    assert [group.name for group in chosen] == ["b1"]
    made = model.copy()
    take(made, chosen)
    for a, b in (("wa1", "wb1"), ("ba1", "bb1"), ("wa2", "wb2")):
        np.testing.assert_array_equal(weight(made, a), weight(made, b))
    x = {"x": normal(9, 6, seed=8)}
    np.testing.assert_allclose(compute(made, x)[0], compute(model, x)[0], atol=1e-5)


def test_all_weights_a_group_lies_on_count_together() -> None:
    """The best common order by trying all: rows of one weight say one thing, columns of the next another."""
    model = net(
        BRANCHES.replace(", ba1", "").replace(", bb1", ""),
        {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())},
    )
    pairs = [("wa1", "wb1"), ("wa2", "wb2")]
    chosen = align(model, find_groups(model, {"x": normal(3, 6)}, RUNTIME), pairs)

    def likeness(order: tuple[int, ...]) -> float:
        at = list(order)
        one = (weight(model, "wa1") * weight(model, "wb1")[:, at]).sum()
        two = (weight(model, "wa2") * weight(model, "wb2")[at]).sum()
        norms = [np.linalg.norm(weight(model, a)) * np.linalg.norm(weight(model, b)) for a, b in pairs]
        return float(one / norms[0] + two / norms[1])

    best = max(permutations(range(5)), key=likeness)
    (order,) = chosen.values()
    assert tuple(order) == best


SHAPES = {"wa1": (6, 5), "wa2": (5, 4), "wb1": (6, 5), "wb2": (5, 4)}


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_and_their_normalisation(kernel: int) -> None:
    hidden = 6
    order = np.random.default_rng(0).permutation(hidden)
    first = {
        "k1": normal(hidden, 3, kernel, kernel),
        "s": normal(hidden, seed=1),
        "k2": normal(4, hidden, 1, 1),
    }
    first |= {"o": normal(hidden, seed=5), "m": normal(hidden, seed=6), "v": np.abs(normal(hidden, seed=7))}
    second = {name: value[order] if name != "k2" else value[:, order] for name, value in first.items()}
    weights = {**{f"a{n}": v for n, v in first.items()}, **{f"b{n}": v for n, v in second.items()}}
    pads = kernel // 2
    body = " ".join(
        f"""{p}1 = Conv<pads=[{pads},{pads},{pads},{pads}]>(x, {p}k1)
        {p}n = BatchNormalization({p}1, {p}s, {p}o, {p}m, {p}v) {p}r = Relu({p}n) {p}2 = Conv({p}r, {p}k2)"""
        for p in "ab"
    )
    model = net(f"{body} y = Add(a2, b2)", weights, x="float[N,3,5,5] x", y="float[A,B,C,D] y")
    chosen = align(
        model, find_groups(model, {"x": normal(2, 3, 5, 5)}, RUNTIME), [("ak1", "bk1"), ("ak2", "bk2")]
    )
    made = model.copy()
    take(made, chosen)
    for name in first:
        np.testing.assert_array_equal(weight(made, f"a{name}"), weight(made, f"b{name}"))


def test_channels_that_both_layers_lie_on_stay() -> None:
    """Layers of one residual stream read and write the same channels: there is nothing to put in order."""
    body = "h = Gemm(x, w0) a = Gemm(h, w1) s = Add(a, h) b = Gemm(s, w2) y0 = Add(b, s) y = Gemm(y0, w3)"
    model = net(body, {"w0": (6, 8), "w1": (8, 8), "w2": (8, 8), "w3": (8, 4)})
    assert align(model, find_groups(model, {"x": normal(3, 6)}, RUNTIME), [("w1", "w2")]) == {}


def test_layers_in_a_row_share_channels_and_only_free_ends_move() -> None:
    """w1's outputs are w2's inputs: in line with w1's, w2's outputs may move, and then nothing else."""
    model = net(
        "h = Gemm(x, w0) a = Gemm(h, w1) r = Relu(a) b = Gemm(r, w2) s = Relu(b) y = Gemm(s, w3)",
        {"w0": (6, 8), "w1": (8, 8), "w2": (8, 8), "w3": (8, 4)},
    )
    chosen = align(model, find_groups(model, {"x": normal(3, 6)}, RUNTIME), [("w1", "w2")])
    made = model.copy()
    take(made, chosen)
    x = {"x": normal(9, 6, seed=8)}
    np.testing.assert_allclose(compute(made, x)[0], compute(model, x)[0], atol=1e-5)
    before, after = (np.linalg.norm(weight(own, "w1") - weight(own, "w2")) for own in (model, made))
    assert chosen
    assert after < before


def test_a_graph_output_keeps_its_order() -> None:
    body = "h = Gemm(x, w0) a = Relu(h) y = Gemm(a, w1) g = Gemm(a, w2) r = Relu(g) z = Gemm(r, w3)"
    shapes = {"w0": (6, 8), "w1": (8, 5), "w2": (8, 5), "w3": (5, 3)}
    model = net(body, shapes, y="float[A,B] y, float[C,D] z")
    found = find_groups(model, {"x": normal(3, 6)}, RUNTIME)
    assert align(model, found, [("w2", "w1")]) == {}
    assert [group.name for group in align(model, found, [("w1", "w2")])] == ["g"]
