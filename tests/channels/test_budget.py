"""Widths under a budget: costs against those of networks really cut, choices against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from channel_cases import CASES, found, sized
from nets import RUNTIME, net, normal

from onnxfuse.analysis.cost import measure
from onnxfuse.channels import budget
from onnxfuse.channels.budget import LossCurve, Total, choose_widths
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import Group, find_groups
from onnxfuse.ir.model import Model

BODY = """a = Conv(x, w0) r = Relu(a) h = Conv<pads=[1,1,1,1]>(r, w1) g = Relu(h) i = Conv(g, w2) j = Relu(i)
    y = Conv(j, w3)"""


def three() -> tuple[Model, list[Group], Total]:
    model = net(
        BODY, sized("w0:8,3,1,1 w1:6,8,3,3 w2:8,6,1,1 w3:2,8,1,1"), "float[N,3,4,4] x", "float[A,B,C,D] y"
    )
    groups = find_groups(model, {"x": normal(2, 3, 4, 4)}, RUNTIME)
    return model, groups.free, budget.macs(model, groups, groups.free)


@pytest.mark.parametrize("name", CASES)
def test_costs_are_those_of_the_network_cut(name: str) -> None:
    case = CASES[name]
    model = case.model()
    feed = case.feed(model, 2)
    groups = found(case, model)
    macs = None if name == "If on another tensor" else budget.macs(model, groups, groups.free)
    parameters = budget.parameters(model, groups, groups.free)
    full = {group: group.size for group in groups.free}
    random = np.random.default_rng(0)
    for _ in range(3):
        wanted = {
            group: int(random.integers(max(1, group.size // 2), group.size + 1)) for group in groups.free
        }
        cut = model.copy()
        take(
            cut, {group: np.sort(random.choice(group.size, width, False)) for group, width in wanted.items()}
        )
        before, after = measure(model, feed, RUNTIME), measure(cut, feed, RUNTIME)
        assert parameters.at(full) - parameters.at(wanted) == before.parameters - after.parameters
        if macs is not None and before.macs is not None and after.macs is not None:
            assert (macs.at(full), macs.at(wanted)) == (before.macs, after.macs)
        state = dict(full)
        for group, width in wanted.items():  # one by one it adds up
            saved = parameters.saved(state, group, width)
            assert saved == parameters.at(state) - parameters.at({**state, group: width})
            state[group] = width


@pytest.mark.parametrize("target", [0.95, 0.8, 0.6, 0.4, 0.25])
def test_the_greedy_choice_is_near_the_best_of_all(target: float) -> None:
    _, groups, total = three()
    random = np.random.default_rng(1)
    candidates = [list(range(group.size, 0, -1)) for group in groups]
    full = total.at({group: group.size for group in groups})
    ratios = []
    for _ in range(20):
        curves = [
            LossCurve(group, own, np.cumsum([0, *random.exponential(size=len(own) - 1)]).tolist())
            for group, own in zip(groups, candidates, strict=True)
        ]
        found = choose_widths(curves, total, target * full)
        assert found is not None
        assert total.at(found) <= target * full

        def loss(plan: dict[Group, int], curves: list[LossCurve] = curves) -> float:
            return sum(curve.losses[curve.widths.index(plan[curve.group])] for curve in curves)

        plans = (dict(zip(groups, own, strict=True)) for own in itertools.product(*candidates))
        best = min(loss(plan) for plan in plans if total.at(plan) <= target * full)
        ratios.append(loss(found) / best)
    assert min(ratios) >= 1 - 1e-9
    assert np.median(ratios) < 1.1


def test_a_bad_step_in_front_of_a_good_one_is_skipped() -> None:
    _, groups, total = three()
    first, second, third = groups
    curves = [
        LossCurve(
            first, [8, 6, 4], [0.0, 5.0, 5.1]
        ),  # the first step saves little for its loss, both together much
        LossCurve(second, [6], [0.0]),
        LossCurve(third, [8, 6], [0.0, 4.0]),
    ]
    plan = choose_widths(curves, total, total.at({first: 6, second: 6, third: 8}) - 1)
    assert plan == {first: 4, second: 6, third: 8}


def test_what_was_saved_too_much_is_given_back() -> None:
    _, groups, total = three()
    first, second, third = groups
    curves = [
        LossCurve(first, [8, 1], [0.0, 2.0]),
        LossCurve(second, [6], [0.0]),
        LossCurve(third, [8, 7], [0.0, 0.001]),
    ]
    plan = choose_widths(curves, total, 0.9 * total.at({g: g.size for g in groups}))
    assert plan == {first: 1, second: 6, third: 8}


def test_what_cannot_be_met() -> None:
    _, groups, total = three()
    curves = [LossCurve(group, [group.size, 2], [0.0, 1.0]) for group in groups]
    least = total.at(dict.fromkeys(groups, 2))
    assert choose_widths(curves, total, least - 1) is None
    assert choose_widths(curves, total, least) == dict.fromkeys(groups, 2)


def test_what_is_left_of_a_budget_is_spent_on_widths_between_the_steps() -> None:
    _, groups, total = three()
    random = np.random.default_rng(2)
    full = total.at({group: group.size for group in groups})
    for _ in range(10):
        fine = [
            LossCurve(
                group,
                list(range(group.size, 0, -1)),
                np.cumsum([0, *random.exponential(size=group.size - 1)]).tolist(),
            )
            for group in groups
        ]
        coarse = [curve.at([group.size, 4]) for curve, group in zip(fine, groups, strict=True)]
        chosen = choose_widths(coarse, total, 0.7 * full)
        assert chosen is not None
        found = budget.filled(fine, chosen, total, 0.7 * full)
        assert total.at(chosen) <= total.at(found) <= 0.7 * full
        assert all(found[group] >= chosen[group] for group in groups)
        wider = ({**found, group: found[group] + 1} for group in groups if found[group] < group.size)
        assert all(total.at(other) > 0.7 * full for other in wider)  # no room for one channel more
