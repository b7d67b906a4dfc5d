"""Coupled channels on every kind of graph: which there are, and that a cut equals the masked network."""

from __future__ import annotations

import numpy as np
import pytest
from channel_cases import CASES, check, close, drawn, found, parameters
from nets import compute, weight

from onnxfuse.channels.edits import take
from onnxfuse.channels.masking import mask
from onnxfuse.ir.model import Model


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    case = CASES[name]
    groups = found(case, case.model())
    assert tuple(group.size for group in groups.free) == case.free
    assert len(groups.frozen) == case.frozen, [g.frozen for g in groups.frozen]
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        for touch in group.touches:
            axis = weight(groups.system.model, touch.weight).shape[touch.axis]
            assert touch.map.shape[0] == group.size
            assert len(np.unique(touch.map)) == touch.map.size <= axis


@pytest.mark.parametrize("name", CASES)
def test_a_cut_is_the_masked_network(name: str) -> None:
    """Each group alone, then all at once; what is cut away mattered."""
    case = CASES[name]
    model = case.model()
    groups = found(case, model)
    feed = case.feed(model, 3)
    for group in groups.free:
        cut = check(case, model, drawn([group], 0.7))
        assert np.abs(compute(cut, feed)[0] - compute(model, feed)[0]).max() > 1e-4
    everything = check(case, model, drawn(groups.free, 0.6, seed=1))
    assert sum(v.size for v in parameters(everything).values()) < sum(
        v.size for v in parameters(model).values()
    )


@pytest.mark.parametrize("name", CASES)
def test_to_the_last_channel(name: str) -> None:
    """One index of each group is left; then the groups of what is left are those, with one index."""
    case = CASES[name]
    model = case.model()
    groups = found(case, model)
    check(case, model, {group: np.array([group.size - 1]) for group in groups.free})


@pytest.mark.parametrize("name", CASES)
def test_all_indices_change_nothing(name: str) -> None:
    case = CASES[name]
    model = case.model()
    copy = model.copy()
    take(copy, {group: np.arange(group.size) for group in found(case, model).free})
    assert copy.to_proto() == model.to_proto()


@pytest.mark.parametrize("name", CASES)
def test_a_permutation_leaves_the_function(name: str) -> None:
    """All channels in another order: nothing that sums up over them can tell."""
    case = CASES[name]
    model = case.model()
    choice = {}
    for group in found(case, model).free:
        # Channels side by side in several places keep to their places.
        inside = [np.roll(np.arange(leaf.size), 1) for leaf in group.leaves]
        offsets = np.cumsum([0, *(leaf.size for leaf in group.leaves)])
        choice[group] = np.concatenate([own + offset for own, offset in zip(inside, offsets, strict=False)])
    permuted = model.copy()
    take(permuted, choice)
    assert any(not np.array_equal(value, weight(model, name)) for name, value in parameters(permuted).items())
    feed = case.feed(model, 3)
    close(compute(permuted, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_growing_is_taking_with_repetitions(name: str) -> None:
    """Some channels twice or three times, what reads them divided by that: the function stays (Net2Wider).
    Taking the original indices gives the original file back."""
    case = CASES[name]
    model = case.model()
    groups = found(case, model)
    random = np.random.default_rng(0)
    choice = {
        group: np.sort(np.concatenate([np.arange(group.size), random.integers(0, group.size, 3)]))
        for group in groups.free
    }
    grown = model.copy()
    edits = take(grown, choice)
    plain = parameters(grown)
    for group in groups.free:
        times = np.bincount(choice[group], minlength=group.size)
        for touch in group.touches:
            if "consumer" in touch.roles:
                value = weight(grown, touch.weight)
                share = np.ones(weight(model, touch.weight).shape[touch.axis])
                share[touch.map] = 1 / times[:, None]
                share = share[edits.weights[touch.weight, touch.axis]]
                scaled = np.moveaxis(np.moveaxis(value, touch.axis, -1) * share, -1, touch.axis)
                grown.set_weight(grown.tensor(touch.weight), scaled.astype(value.dtype))
    for batch in (1, 4):
        feed = case.feed(model, batch)
        close(compute(grown, feed)[0], compute(model, feed)[0])
    for name_, value in plain.items():
        grown.set_weight(grown.tensor(name_), value)
    again = {group.name: group for group in found(case, grown).free}
    back = {again[g.name]: np.unique(indices, return_index=True)[1] for g, indices in choice.items()}
    take(grown, back)
    now = parameters(grown)
    for group in groups.free:
        for touch in group.touches:
            np.testing.assert_array_equal(now[touch.weight], weight(model, touch.weight))


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_knows_the_indices_it_has_left(name: str) -> None:
    """`Model.index_maps` after one cut and after two: what is computed there is what the masked network
    computes at those places."""
    case = CASES[name]
    model = case.model()
    feed = case.feed(model, 3)
    groups = found(case, model)
    first = drawn(groups.free, 0.8)
    cut, masked = model.copy(), mask(model, first)
    take(cut, first)
    assert cut.index_maps
    again = {group: np.arange(group.size)[::-1][: max(1, group.size - 1)] for group in found(case, cut).free}
    twice = cut.copy()
    take(twice, again)
    for reference, after, maps in (
        (masked, cut, cut.index_maps),
        (mask(cut, again), twice, {k: _since(cut, twice, k) for k in twice.index_maps}),
    ):
        alive = {t.name for n in after.nodes for t in n.outputs} & {
            t.name for n in reference.nodes for t in n.outputs
        }
        names = [key for key, own in maps.items() if own is not None and key in alive]
        assert names
        for key, got, whole in zip(
            names, compute(after, feed, *names), compute(reference, feed, *names), strict=True
        ):
            for axis, places in enumerate(maps[key] or ()):
                if places is not None:
                    whole = np.take(whole, places, axis)
            close(got, whole)


def _since(cut: Model, twice: Model, name: str) -> tuple[np.ndarray | None, ...] | None:
    """The second cut's share of a composed index map."""
    before, after = cut.index_maps.get(name, ()), twice.index_maps[name]
    if before is None or after is None:
        return None
    shares = []
    for number, own in enumerate(after):
        old = before[number] if before else None
        if own is None or old is None:
            shares.append(own)
        else:
            where = {int(place): index for index, place in enumerate(old)}
            shares.append(np.array([where[int(place)] for place in own]))
    return tuple(shares)
