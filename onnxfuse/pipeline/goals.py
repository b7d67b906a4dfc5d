"""Options that say how far a pass is to go, and how they scale where it goes there in several steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Field, model_validator

from onnxfuse.pipeline.base import PassOptions

Share = Annotated[float, Field(gt=0, lt=1)]

GoalStep: TypeAlias = Callable[[Any, float, float], Any]
"""From a goal, how far along the way a step is to come and how far the step before it came (0 to 1): the goal
of that step, None where there is none."""


class Goals(PassOptions):
    """Options some of which are goals: each by itself says how far to go, so that one at most may be given.

    Attributes:
        goals: the names of these options, each with how it scales; None: not at all.
    """

    goals: ClassVar[Mapping[str, GoalStep | None]] = {}

    @model_validator(mode="after")
    def _one_goal(self) -> Goals:
        given = [name for name in self.goals if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {self.listed_goals('and')}, not {' and '.join(given)}")
        return self

    @property
    def goal(self) -> tuple[str, Any] | None:
        """Name and value of the goal that is given."""
        found = ((name, getattr(self, name)) for name in self.goals)
        return next(((name, value) for name, value in found if value is not None), None)

    @classmethod
    def listed_goals(cls, last: str) -> str:
        """The goals as words: "a, b or c", where `last` is "or"."""
        *first, final = cls.goals
        return f"{', '.join(first)} {last} {final}" if first else final

    def partly(self, share: float, done: float = 0.0) -> Mapping[str, object] | None:
        """The goal of a step that comes to `share` of the way, as settings; None if there is no such step."""
        step = None if self.goal is None else self.goals[self.goal[0]]
        if self.goal is None or step is None or share <= done:
            return None
        value = step(self.goal[1], share, done)
        return None if value is None else {self.goal[0]: value}


def left_of_all(goal: float, share: float, done: float) -> float:
    """The share that a step may leave, where the goal is a share of what there was before all steps.

    Args:
        goal: of all steps together.
        share: how far along the way the step is to come, 0 to 1.
        done: how far the step before it came.
    """
    return 1 - share * (1 - goal)


def gone_of_all(goal: float, share: float, done: float) -> float | None:
    """The share that is gone after a step, where the goal is a share of what there was before all steps;
    arguments as `left_of_all`."""
    return goal * share if goal else None


def number_taken(goal: int, share: float, done: float) -> int | None:
    """The number of things that a step takes, at least one at the first step and none at some later ones;
    arguments as `left_of_all`."""
    before = max(1, round(done * goal)) if done > 0 else 0
    return max(max(1, round(share * goal)) - before, 0) or None
