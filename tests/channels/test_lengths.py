"""Lists of lengths: values and tags through the operators that exporters build shapes of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import net

from onnxfuse.channels.dims import Axis
from onnxfuse.channels.lengths import (
    Mixed,
    Numbers,
    evaluate_lengths,
    of_constant,
    of_shape,
    size_product,
    worth_reading,
)

N, C, H = Axis(7, dynamic=True), Axis(12), Axis(5)
SHAPE = of_shape([N, C, H])


def run(text: str, **known: Any) -> Numbers:
    """One node `y = ...` of which every input is known; plain arrays are constants."""
    declared = ", ".join(f"int64[I{i}] {name}" for i, name in enumerate(known))
    node = net(f"y = {text}", {}, declared, "int64[O] y").nodes[0]
    inputs = [known[t.name] if t.name else None for t in node.inputs]
    found = evaluate_lengths(
        node, [i if i is None or isinstance(i, Numbers) else of_constant(np.array(i)) for i in inputs], 17
    )
    assert found is not None
    return found[0]


def tags(numbers: Numbers) -> list[Any]:
    return numbers.tags.reshape(-1).tolist()


def test_what_moves_elements_moves_their_tags() -> None:
    assert tags(SHAPE) == [N, C, H]
    one = run("Gather(s, i)", s=SHAPE, i=1)
    assert (one.value.shape, int(one.value), tags(one)) == ((), 12, [C])
    assert tags(run("Unsqueeze(s, i)", s=one, i=[0])) == [C]
    assert tags(run("Slice(s, a, b)", s=SHAPE, a=[1], b=[9])) == [C, H]
    joined = run("Concat<axis=0>(c, s, c)", c=[3, -1], s=SHAPE)
    assert joined.value.tolist() == [3, -1, 7, 12, 5, 3, -1]
    assert tags(joined) == [None, None, N, C, H, None, None]
    pairs = run("Reshape(s, t)", s=run("Concat<axis=0>(s, c)", s=SHAPE, c=[1]), t=[2, 2])
    assert tags(run("Transpose<perm=[1,0]>(p)", p=pairs)) == [N, H, C, None]
    assert tags(run("Identity(s)", s=SHAPE)) == [N, C, H]


def test_arithmetic_mixes() -> None:
    half = run("Div(s, two)", s=SHAPE, two=[2])
    assert half.value.tolist() == [3, 6, 2]
    assert tags(half) == [Mixed(frozenset([d])) for d in (N, C, H)]
    assert tags(run("Mul(a, b)", a=half, b=SHAPE))[1] == Mixed(frozenset([C]))
    total = run("ReduceProd<keepdims=0>(s)", s=SHAPE)
    assert (int(total.value), total.depends()) == (420, {N, C, H})
    assert not total.fixed
    assert run("Add(a, b)", a=[1], b=[2]).fixed
    size = size_product(SHAPE)
    assert (int(size.value), size.depends()) == (420, {N, C, H})
    assert size_product(of_constant(np.array([2, 3]))).fixed


def test_a_choice_keeps_the_tag_of_what_is_chosen() -> None:
    """As torch writes an Expand that leaves some axes: -1 becomes 1, all else stays."""
    wanted = run("Concat<axis=0>(s, c)", s=SHAPE, c=[-1, 4])
    left = run("Equal(s, m)", s=wanted, m=[-1])
    assert left.fixed  # no length is negative
    target = run("Where(m, o, s)", m=left, o=[1] * 5, s=wanted)
    assert target.value.tolist() == [7, 12, 5, 1, 4]
    assert tags(target) == [N, C, H, None, None]
    unknown = run("Equal(s, m)", s=SHAPE, m=[12])
    assert tags(unknown) == [Mixed(frozenset([d])) for d in (N, C, H)]
    assert run("Where(m, o, s)", m=unknown, o=[1] * 3, s=SHAPE).depends() == {N, C, H}


@pytest.mark.parametrize(
    "text", ["ConstantOfShape(s)", "Tile(c, s)", "Slice(c, s, s)", "Relu(s)", "Range(s, s, s)"]
)
def test_what_is_no_list_of_lengths(text: str) -> None:
    """Its own shape depends on lengths, or it is computed by an operator that has no place here."""
    declared = "int64[A] s, int64[B] c" if "c" in text else "int64[A] s"
    node = net(f"y = {text}", {}, declared, "int64[O] y").nodes[0]
    known = {"s": run("Gather(s, i)", s=SHAPE, i=[1]), "c": of_constant(np.arange(20))}
    assert evaluate_lengths(node, [known[t.name] for t in node.inputs], 17) is None


def test_made_of_constants() -> None:
    assert run("ConstantOfShape(n)", n=[3]).value.tolist() == [0, 0, 0]
    assert run("Range(a, b, c)", a=np.array(2), b=np.array(8), c=np.array(3)).value.tolist() == [2, 5]


def test_what_is_worth_reading() -> None:
    assert worth_reading(np.dtype(np.int64), (256,))
    assert not worth_reading(np.dtype(np.int64), (257,))
    assert not worth_reading(np.dtype(np.int8), (4,))
    assert worth_reading(np.dtype(np.float32), (1,))
    assert not worth_reading(np.dtype(np.float32), (2,))
