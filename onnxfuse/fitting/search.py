"""The search for how far a rewrite may go: as far as the bound on the output error allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.findings import Reached
from onnxfuse.pipeline.base import Context, PassResult
from onnxfuse.pipeline.goals import Goals
from onnxfuse.verification.compare import output_error

CAREFUL = 0.1
"""Bound on the relative output error where the user gives neither a bound nor how far to go."""

Level = TypeVar("Level", int, float)
T = TypeVar("T")


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a pass, or of a search for how far it may go.

    Attributes:
        made: what it makes of the model; None where it does nothing.
        notes: lines on how far that is, or why nowhere.
        count: of a search, the number of levels up to the one that it found.
        reached: how far that is, where a share was asked for.
    """

    made: PassResult | None
    notes: list[str] = field(default_factory=list)
    count: int = 0
    reached: Reached | None = None


def farthest(
    levels: Sequence[Level],
    make: Callable[[Level], PassResult],
    context: Context,
    options: Goals,
    *,
    said: Callable[[Level], str],
    more: Callable[[Level], str] | None = None,
    none: Callable[[str, float], str],
    guess: int | None = None,
    event: tuple[str, str] = ("probe", "level"),
) -> SearchResult:
    """The last of `levels` at which the output error on the held-out samples is within the bound.

    By bisection: the error is taken to grow from level to level.

    Args:
        levels: from mild to harsh.
        make: the result at a level; one that fails counts as beyond the bound.
        context: gives the bound (`error_bound`), the samples and the original.
        options: of the pass; the goals in them are what to give where there are no held-out samples.
        said: how far a level goes, in words.
        more: how far the next level would go, in words; default: `said`.
        none: the note where not even the first level will do, from the bound in words and that level's
            error (infinite without any level).
        guess: number of levels to try first; default: half of them.
        event: name of the journal's event and of its figure that holds the level.
    """
    if not context.calibration.held_out.samples:
        listed = options.listed_goals("or")
        return SearchResult(None, [f"no held-out samples to hold the error bound on; give {listed} instead"])
    bound, source = error_bound(context)
    errors: dict[int, float] = {}

    def attempt(count: int) -> PassResult | None:
        made, errors[count] = probe(lambda: make(levels[count - 1]), context)
        context.journal(event[0], **{event[1]: levels[count - 1]}, output_error=errors[count])
        return made if errors[count] <= bound else None

    best, count = longest(len(levels), (len(levels) + 1) // 2 if guess is None else guess, attempt)
    within = f"within {bound:g} ({source})"
    if best is None:
        return SearchResult(None, [none(within, errors.get(1, math.inf))])
    note = f"{said(levels[count - 1])}: held-out output error {within}"
    if count + 1 in errors:
        note += f"; with {(more or said)(levels[count])} it would be {errors[count + 1]:.3g}"
    return SearchResult(best, [note], count)


def error_bound(context: Context) -> tuple[float, str]:
    """The bound on the relative output error, and where it comes from."""
    if context.max_error is None:
        return CAREFUL, "the careful default"
    return context.max_error, "--max-error"


def probe(make: Callable[[], PassResult], context: Context) -> tuple[PassResult | None, float]:
    """A result and its model's output error on the held-out samples; None and infinity where that fails."""
    try:
        made = make()
        error = output_error(context.original, made.model, context.calibration.held_out, context.runtime)
    except (NotApplicableError, VerificationError) as failure:
        context.journal("probe failed", failure=str(failure))
        return None, math.inf
    return made, error.worst


def longest(count: int, guess: int, attempt: Callable[[int], T | None]) -> tuple[T | None, int]:
    """The outcome of `attempt` for the largest number that it accepts, and that number; None and 0 where it
    does not accept even 1.

    Args:
        count: the largest number to try.
        guess: the number to try first.
        attempt: returns None where it refuses; every number below an accepted one is taken to be accepted.
    """
    best: T | None = None
    low, high, middle = 0, count, min(max(guess, 1), count)
    while low < high:
        found = attempt(middle)
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle
        # The guess is usually near: look beside it before halving what is left.
        middle = min(low + 1, high) if best is not None and middle == guess else (low + high + 1) // 2
    return best, low
