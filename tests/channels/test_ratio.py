"""One share of every layer, against enumeration of all widths and the shapes of weights really cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from channel_cases import ints, positive, sized
from nets import RUNTIME, net, normal, weight

from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import Group, find_groups
from onnxfuse.channels.ratio import Block, at_share, blocks, removed
from onnxfuse.ir.model import Model

RATIOS = (0.1, 0.25, 0.5, 0.77, 0.9, 0.99)


def plain(width: int) -> Model:
    shapes = sized(f"w0:{width},3,1,1 w1:4,{width},1,1")
    return net("a = Conv(x, w0) r = Relu(a) y = Conv(r, w1)", shapes, "float[N,3,2,2] x", "float[A,B,C,D] y")


def attention(heads: int, queries: int, values: int) -> Model:
    weights: dict[str, Any] = sized(
        f"wq:8,{heads * queries} wk:8,{heads * queries} wv:8,{heads * values} wo:{heads * values},5"
    )
    lists = {"qk": ints(0, 0, heads, queries), "of": ints(0, 0, heads, values), "back": ints(0, 0, -1)}
    return net(
        """q0 = MatMul(x, wq) q1 = Reshape(q0, qk) q = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, qk) k = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(x, wv) v1 = Reshape(v0, of) v = Transpose<perm=[0,2,1,3]>(v1)
        s = MatMul(q, k) p = Softmax(s) o = MatMul(p, v) o1 = Transpose<perm=[0,2,1,3]>(o)
        o2 = Reshape(o1, back) y = MatMul(o2, wo)""",
        weights | lists,
        "float[N,T,8] x",
        "float[A,B,C] y",
    )


def grouped(groups: int, each: int) -> Model:
    """A GroupNorm as exporters write it out."""
    c = groups * each
    return net(
        """a = Conv(x, w0) s = Shape(a) f = Reshape(a, to) n = InstanceNormalization(f, one, zero)
        i = Reshape(n, s) m = Mul(i, g) y = Conv(m, w1)""",
        sized(f"w0:{c},3,1,1 zero:{groups} g:{c},1,1 w1:4,{c},1,1")
        | {"to": ints(0, groups, -1), "one": positive(groups)},
        "float[N,3,2,2] x",
        "float[A,B,C,D] y",
    )


def found(model: Model) -> list[Group]:
    shape = (2, 3, 8) if model.inputs[0].shape == ("N", "T", 8) else (2, 3, 2, 2)
    return find_groups(model, {"x": normal(*shape)}, RUNTIME).free


def cut(model: Model, widths: dict[Group, int]) -> Model:
    made = model.copy()
    take(made, {group: np.arange(width) for group, width in widths.items() if width < group.size})
    return made


def candidates(group: Group, step: int) -> list[int]:
    return [group.size, *range((group.size - 1) // step * step, 0, -step)]


@pytest.mark.parametrize("width", [2, 3, 7, 16, 24, 40])
def test_a_layer_of_one_group_gets_the_nearest_width(width: int) -> None:
    model = plain(width)
    (group,) = found(model)
    (block,) = blocks([group])
    for ratio, step in itertools.product(RATIOS, (1, 2, 4, 8)):
        ((kept,),) = at_share(block, 1 - ratio, {group: width}, {group: candidates(group, step)})
        assert 0 < kept == len(weight(cut(model, {group: kept}), "w0"))
        allowed = [width, *(n for n in range(1, width) if n % step == 0)]
        best = min(abs(n - width * (1 - ratio)) for n in allowed)
        assert abs(kept - width * (1 - ratio)) == pytest.approx(best)
        if step == 1 and width * (1 - ratio) >= 0.5:
            assert abs(1 - kept / width - ratio) <= 0.5 / width + 1e-9


MULTIPLIED = {
    "4 heads of 8": (attention(4, 8, 8), ["wq", "wk", "wv"]),
    "6 heads of 8 and 4": (attention(6, 8, 4), ["wq", "wk", "wv"]),
    "3 heads of 5 and 7": (attention(3, 5, 7), ["wq", "wk", "wv"]),
    "4 groups of 8": (grouped(4, 8), ["w0"]),
    "3 groups of 5": (grouped(3, 5), ["w0"]),
}


@pytest.mark.parametrize("name", MULTIPLIED)
def test_what_is_multiplied_loses_the_share_once(name: str) -> None:
    model, weights = MULTIPLIED[name]
    groups = found(model)
    (block,) = blocks(groups)
    full = {group: group.size for group in groups}
    axes = [0 if name.startswith(("3 g", "4 g")) else 1] * len(weights)
    before = [weight(model, w).shape[axis] for w, axis in zip(weights, axes, strict=True)]
    for ratio, step in itertools.product(RATIOS, (1, 2, 4)):
        lists = {group: candidates(group, step) for group in groups}
        plans = at_share(block, 1 - ratio, full, lists)
        # Every axis of the block, counted by hand: its products at all widths that are allowed.
        own = [tuple(block.groups[place] for place in product) for product in block.products]

        def off(widths: dict[Group, int], own: Any = own, ratio: float = ratio) -> float:
            sizes = [np.prod([g.size for g in members]) for members in own]
            left = [np.prod([widths[g] for g in members]) for members in own]
            return float(sum(abs(a - (1 - ratio) * b) for a, b in zip(left, sizes, strict=True)))

        every = [dict(zip(groups, ws, strict=True)) for ws in itertools.product(*lists.values())]
        best, whole = min(map(off, every)), sum(np.prod([g.size for g in members]) for members in own)
        for plan in (plans[0], plans[-1]):
            widths = dict(zip(block.groups, plan, strict=True))
            assert off(widths) <= max(best, 0.01 * whole) + 1e-6
            made = cut(model, widths)
            after = [weight(made, w).shape[axis] for w, axis in zip(weights, axes, strict=True)]
            assert min(after) >= 1
            if step == 1 and ratio <= 0.5:
                for a, b in zip(after, before, strict=True):
                    assert abs(1 - a / b - ratio) <= 0.1, (name, ratio, widths)
        assert off(dict(zip(block.groups, plans[0], strict=True))) == pytest.approx(best)


def test_a_quarter_is_a_quarter_and_not_44_percent() -> None:
    for model, axis in ((attention(8, 8, 8), 1), (grouped(4, 8), 0)):
        groups = found(model)
        (block,) = blocks(groups)
        full = {group: group.size for group in groups}
        plans = at_share(block, 0.75, full, {group: candidates(group, 1) for group in groups})
        name = "wv" if axis else "w0"
        for plan in plans:
            widths = dict(zip(block.groups, plan, strict=True))
            kept = weight(cut(model, widths), name).shape[axis]
            assert kept / weight(model, name).shape[axis] == pytest.approx(0.75, abs=0.02)
        lost = removed([block], full, dict(zip(block.groups, plans[0], strict=True)))
        assert lost.share == pytest.approx(0.25, abs=0.01)


def test_the_share_is_of_what_there_was_first() -> None:
    """In later turns groups are narrower than what the ratio is of."""
    (group,) = found(plain(12))
    assert at_share(Block((group,), ((0,),)), 0.5, {group: 16}, {group: candidates(group, 1)}) == [(8,)]
    assert at_share(Block((group,), ((0,),)), 0.9, {group: 16}, {group: candidates(group, 1)}) == [(12,)]
