from __future__ import annotations

import pytest

from onnxfuse.errors import InputError
from onnxfuse.pipeline.schedule import parse_schedule


def test_uniform() -> None:
    schedule = parse_schedule("uniform:steps=4")
    assert schedule.shares() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert schedule.epochs(8) == [2, 2, 2, 2]
    assert sum(schedule.epochs(10)) == 10


def test_exponential_goes_far_early_and_trains_long_late() -> None:
    schedule = parse_schedule("exponential:steps=3")
    assert schedule.shares() == pytest.approx([4 / 7, 6 / 7, 1.0])
    assert schedule.epochs(14) == [2, 4, 8]
    assert schedule.epochs(2) == [1, 1, 1]


def test_the_whole_way_is_exactly_the_whole_way() -> None:
    for steps in range(1, 33):
        for kind in ("uniform", "exponential"):
            assert parse_schedule(f"{kind}:steps={steps}").shares()[-1] == 1.0


@pytest.mark.parametrize(
    "text", ["", "uniform", "linear:steps=3", "uniform:steps=0", "uniform:steps=x", "uniform:steps=-1"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write uniform:steps=4 or exponential:steps=4"):
        parse_schedule(text)


@pytest.mark.parametrize("steps", [33, 10**12])
def test_too_many_steps(steps: int) -> None:
    with pytest.raises(InputError, match="1 to 32 steps"):
        parse_schedule(f"uniform:steps={steps}")
