"""The algebra of index maps: what unification ties, against a position-by-position reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxfuse.channels.dims import (
    Axis,
    AxisKind,
    ClashError,
    crossed,
    equal,
    factor,
    find,
    freeze_leaves,
    indices,
    kind,
    leaves,
    length,
    multiplicity,
    parts,
    places,
    product_of,
    segment,
    structure_text,
    sum_of,
    unify,
)


def cells(dim: Axis) -> list[frozenset[tuple[int, int]]]:
    """For each position the channels (leaf, index) it stands and falls with, from the definition alone."""
    dim = find(dim)
    if kind(dim) is AxisKind.LEAF:
        return [frozenset([(id(dim), i)]) for i in range(dim.size)]
    own = [cells(part) for part in parts(dim)]
    if kind(dim) is AxisKind.SUM:
        return list(itertools.chain.from_iterable(own))
    return [frozenset().union(*combination) for combination in itertools.product(*own)]


def left(dim: Axis, kept: dict[Axis, np.ndarray]) -> list[int]:
    """Positions none of whose channels is gone."""
    gone = {(id(leaf), i) for leaf, own in kept.items() for i in range(leaf.size) if i not in own}
    return [position for position, own in enumerate(cells(dim)) if not own & gone]


def tied(a: Axis, b: Axis) -> bool:
    return cells(a) == cells(b)


def test_concat_of_two_meets_one_axis() -> None:
    a, b, c = Axis(3), Axis(5), Axis(8)
    unify(sum_of([a, b]), c)
    assert tied(c, sum_of([a, b]))
    assert [leaf.size for leaf in leaves(c)] == [3, 5]
    assert structure_text(c, [find(b)]) == "3 + [5]"
    assert indices(c, {find(a): np.array([2]), find(b): np.array([0, 4])}).tolist() == [2, 3, 7]


def test_concats_with_other_boundaries_get_a_common_refinement() -> None:
    a, b, c, d = Axis(3), Axis(5), Axis(6), Axis(2)
    unify(sum_of([a, b]), sum_of([c, d]))
    assert tied(sum_of([a, b]), sum_of([c, d]))
    assert [leaf.size for leaf in leaves(sum_of([c, d]))] == [3, 3, 2]


def test_halves_swapped_are_tied_pairwise() -> None:
    """Rotary embeddings: x added to its halves in the other order."""
    d = Axis(8)
    a, b = segment(d, [4, 4])
    unify(d, sum_of([b, a]))
    assert len(leaves(d)) == 1
    assert places(d, leaves(d)[0]).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_rotation_by_one_ties_everything() -> None:
    d = Axis(5)
    a, b = segment(d, [1, 4])
    unify(d, sum_of([b, a]))
    assert len(leaves(d)) == 1
    assert multiplicity(d, leaves(d)[0]) == 5


def test_heads_and_their_dimensions_are_two_ways_to_cut() -> None:
    d = Axis(12)
    heads, size = factor(d, [3, 4])
    assert structure_text(d, [heads]) == "[3] x 4"
    assert places(d, heads).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert places(d, size).tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    kept = {heads: np.array([0, 2]), size: np.array([1, 3])}
    assert indices(d, kept).tolist() == [1, 3, 9, 11]
    assert length(d, kept) == 4
    # growing: the second head twice, in both copies its first dimension only
    assert indices(d, {heads: np.array([1, 1]), size: np.array([0])}).tolist() == [4, 4]


def test_factors_get_a_common_refinement() -> None:
    """Grouped-query attention: eight heads are two times four."""
    heads, groups, repeats = Axis(8), Axis(2), Axis(4)
    unify(product_of([heads, Axis(16)]), product_of([groups, repeats, Axis(16)]))
    assert structure_text(heads) == "2 x 4"
    assert tied(heads, product_of([groups, repeats]))


def test_rows_of_a_concat_are_tied() -> None:
    """Three weights one after the other, reshaped to 3 x heads x size."""
    q, k, v = Axis(12), Axis(12), Axis(12)
    three, heads, _ = factor(sum_of([q, k, v]), [3, 3, 4])
    assert tied(q, k)
    assert tied(k, v)
    assert all(leaf.frozen for leaf in leaves(three))
    assert places(sum_of([q, k, v]), heads).shape == (3, 12)


def test_whole_rows_of_unequal_parts() -> None:
    """A grouped convolution behind a Concat of 4 and 8 channels, in groups of 2."""
    a, b = Axis(4), Axis(8)
    groups, inner = factor(sum_of([a, b]), [6, 2])
    assert [leaf.size for leaf in leaves(groups)] == [2, 4]
    assert structure_text(a) == "2 x 2"
    assert structure_text(b) == "4 x 2"
    assert leaves(b)[1] is find(inner)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: unify(Axis(3), Axis(4)), "axes of 3 and 4 meet"),
        (lambda: segment(product_of([Axis(3), Axis(4)]), [6, 6]), "blocks of 4"),
        (lambda: factor(product_of([Axis(3), Axis(4)]), [4, 3]), "a factor of 3"),
        (lambda: factor(sum_of([Axis(3), Axis(5)]), [4, 2]), "no whole rows of 2"),
        (lambda: factor(Axis(6), [4, 2]), "can't be arranged"),
        (lambda: segment(Axis(6), [4, 3]), "can't be split"),
    ],
)
def test_what_does_not_fit_is_refused(make, reason) -> None:
    with pytest.raises(ClashError, match=reason):
        make()


def test_an_axis_is_no_part_of_itself() -> None:
    batch, channels = Axis(1, dynamic=True, frozen="dynamic"), Axis(4)
    with pytest.raises(ClashError, match="part of itself"):
        unify(product_of([batch, channels]), channels)


def test_frozen_and_dynamic_pass_on_to_what_an_axis_turns_out_to_be() -> None:
    d = Axis(6, frozen="input", dynamic=True, channel=True)
    for leaf in factor(d, [2, 3]):
        assert (leaf.frozen, leaf.dynamic, leaf.channel) == ("input", True, True)
    a, b = Axis(2), Axis(4)
    unify(d := Axis(6, frozen="output"), sum_of([a, b]))
    assert [leaf.frozen for leaf in leaves(d)] == ["output", "output"]
    freeze_leaves(d, "another reason")
    assert {leaf.frozen for leaf in leaves(d)} == {"output"}


def test_channels_and_places_unified_are_channels() -> None:
    places_, channels = Axis(4, position=True), Axis(4)
    unify(places_, channels)
    assert not find(places_).position


def test_crossed() -> None:
    d, e = Axis(4), Axis(3)
    assert crossed(product_of([d, e])) == []
    assert crossed(sum_of([d, d])) == []
    assert crossed(product_of([d, e, d])) == [d]
    assert crossed(sum_of([e, product_of([d, sum_of([d, e])])])) == [d]


def test_a_static_axis_of_size_one_is_left_out_of_products() -> None:
    d, one, batch = Axis(4), Axis(1), Axis(1, dynamic=True)
    assert product_of([one, d]) is d
    assert one.frozen
    assert len(parts(product_of([batch, d]))) == 2
    assert factor(d, [1, 4])[1] is d


# Any expression -----------------------------------------------------------------------------------


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Axis, list[Axis]]:
    """An axis made of a few leaves, some of them in several places."""
    stock = [Axis(draw(st.integers(1, 3))) for _ in range(3)]
    every = list(stock)
    for _ in range(draw(st.integers(1, 4))):
        chosen = draw(st.lists(st.sampled_from(every), min_size=1, max_size=3))
        made = (sum_of if draw(st.booleans()) else product_of)(chosen)
        if made.size <= 60 and not crossed(made):
            every.append(made)
    return every[-1], stock


@settings(deadline=None)
@given(expressions(), st.data())
def test_indices_are_the_positions_with_nothing_gone(
    made: tuple[Axis, list[Axis]], data: st.DataObject
) -> None:
    dim, _ = made
    kept = {
        leaf: np.array(sorted(data.draw(st.sets(st.integers(0, leaf.size - 1), min_size=1))))
        for leaf in leaves(dim)
    }
    assert indices(dim, kept).tolist() == left(dim, kept)
    assert length(dim, kept) == len(left(dim, kept))


@settings(deadline=None)
@given(expressions(), st.data())
def test_places_are_where_a_channel_lies(made: tuple[Axis, list[Axis]], data: st.DataObject) -> None:
    dim, _ = made
    leaf = data.draw(st.sampled_from(leaves(dim)))
    found = places(dim, leaf)
    assert found.shape == (leaf.size, multiplicity(dim, leaf))
    for index in range(leaf.size):
        assert found[index].tolist() == [p for p, own in enumerate(cells(dim)) if (id(leaf), index) in own]


@settings(deadline=None)
@given(expressions(), st.data())
def test_places_of_copies(made: tuple[Axis, list[Axis]], data: st.DataObject) -> None:
    """After a take, row i of the map is where the i-th entry lies, be it a copy of another or not: together
    the rows hold each place once, and the old places behind them are those of the channel it copies."""
    dim, _ = made
    kept = {
        leaf: np.array(data.draw(st.lists(st.integers(0, leaf.size - 1), min_size=1, max_size=5)))
        for leaf in leaves(dim)
    }
    leaf = data.draw(st.sampled_from(leaves(dim)))
    found = places(dim, leaf, kept)
    assert len(found) == len(kept[leaf])
    assert np.unique(found).size == found.size
    old = indices(dim, kept)
    where = {index: set(places(dim, leaf)[index].tolist()) for index in range(leaf.size)}
    for index, own in zip(kept[leaf], found, strict=True):
        assert set(old[own].tolist()) <= where[index]
        alone = {**kept, leaf: np.array([index])}
        assert old[own].tolist() == [p for p in indices(dim, alone).tolist() if p in where[index]]


@settings(deadline=None)
@given(expressions(), st.data())
def test_repeated_channels_come_out_where_they_are_asked_for(
    made: tuple[Axis, list[Axis]], data: st.DataObject
) -> None:
    """Taking some, then some of what is left, is taking once."""
    dim, _ = made
    first, both = {}, {}
    for leaf in leaves(dim):
        own = data.draw(st.lists(st.integers(0, leaf.size - 1), min_size=1, max_size=4))
        again = data.draw(st.lists(st.integers(0, len(own) - 1), min_size=1, max_size=4))
        first[leaf] = np.array(own)
        both[leaf] = np.array(own)[again]
        first[leaf, "again"] = np.array(again)
    once = {leaf: own for leaf, own in first.items() if isinstance(leaf, Axis)}
    taken = indices(dim, once)
    # The same expression over the leaves at their new sizes.
    copies = {leaf: Axis(len(own)) for leaf, own in once.items()}
    copy = rebuilt(dim, copies)
    then = indices(copy, {copies[leaf]: first[leaf, "again"] for leaf in once})
    assert indices(dim, both).tolist() == taken[then].tolist()


def rebuilt(dim: Axis, copies: dict[Axis, Axis]) -> Axis:
    """The expression over other leaves; one that has become a single index must not disappear."""
    dim = find(dim)
    if kind(dim) is AxisKind.LEAF:
        return copies[dim]
    own = [rebuilt(part, copies) for part in parts(dim)]
    if kind(dim) is AxisKind.SUM:
        return sum_of(own)
    for part in own:
        for leaf in leaves(part):
            leaf.dynamic = leaf.dynamic or leaf.size == 1
    return product_of(own)


@settings(max_examples=300, deadline=None)
@given(expressions(), expressions())
def test_what_is_unified_is_the_same_everywhere(
    first: tuple[Axis, list[Axis]], second: tuple[Axis, list[Axis]]
) -> None:
    (a, ours), (b, theirs) = first, second
    small, large = sorted((a, b), key=lambda dim: dim.size)
    if small.size < large.size:
        small = sum_of([small, Axis(large.size - small.size)])
    before = [(dim, dim.size) for dim in (*ours, *theirs)]
    try:
        unify(small, large)
    except ClashError:
        return
    assert tied(small, large)
    assert equal(small, large)
    assert all(len(cells(dim)) == size for dim, size in before)
