"""Which constants to store: the minimum cut against every choice there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from onnxfuse.analysis.constant_choice import State, Step, cheapest, parts

KEPT, STORED, DROPPED = State.KEPT, State.STORED, State.DROPPED


def cost(steps: list[Step], states: tuple[State, ...]) -> int | None:
    """The cost of a choice; None where something that is needed isn't there."""
    total = 0
    for index, (step, state) in enumerate(zip(steps, states, strict=True)):
        if state is DROPPED:
            if step.needed or any(states[i] is KEPT for i, s in enumerate(steps) if index in s.parents):
                return None
        elif state is STORED:
            total += step.store
        elif step.keep is None:
            return None
        else:
            total += step.keep
    return total


def random_steps(seed: int) -> list[Step]:
    rng = np.random.default_rng(seed)
    steps = [Step(int(rng.integers(1, 20)), None) for _ in range(3)]
    for index in range(3, 7):
        parents = np.flatnonzero(rng.random(index) < 0.4).tolist()
        steps.append(
            Step(int(rng.integers(1, 20)), int(rng.integers(1, 6)), bool(rng.random() < 0.5), parents)
        )
    return steps


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_is_cheaper(seed: int) -> None:
    steps = random_steps(seed)
    costs = (cost(steps, states) for states in product(State, repeat=len(steps)))
    assert cost(steps, tuple(cheapest(steps))) == min(c for c in costs if c is not None)


def test_a_weight_goes_into_what_is_made_of_it_unless_something_else_is_larger() -> None:
    weight, transposed, squared = Step(100, None), Step(100, 3, True, [0]), Step(100, 3, True, [0])
    assert cheapest([weight, transposed]) == [DROPPED, STORED]
    assert cheapest([weight, transposed, squared]) == [STORED, KEPT, KEPT]
    assert cheapest([weight, Step(300, 3, True, [0])]) == [STORED, KEPT]
    total = Step(1, 3, True, [1])
    assert cheapest([weight, Step(300, 3, False, [0]), total]) == [DROPPED, DROPPED, STORED]
    assert cheapest([]) == []


def test_parts() -> None:
    steps = [
        Step(1, None),
        Step(1, None),
        Step(1, 1, True, [1]),
        Step(1, 1, True, [0]),
        Step(1, 1, True, [2]),
    ]
    assert parts(steps) == [[0, 3], [1, 2, 4]]


def test_long_chains_are_no_matter() -> None:
    steps = [Step(2, None), *(Step(2, 1, index == 3000, [index - 1]) for index in range(1, 3001))]
    assert cheapest(steps) == [DROPPED] * 3000 + [STORED]
