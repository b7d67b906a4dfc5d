"""Places in a network that a user names: by name, by pattern, or all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from onnxfuse.errors import InputError, NotApplicableError, unknown_name
from onnxfuse.findings import Skip

ALL = "all"
Place = TypeVar("Place")
Value = TypeVar("Value")


def choose(
    asked: Mapping[str, Value],
    known: Mapping[Place, Sequence[str]],
    what: str,
    everything: Collection[Place] | None = None,
) -> dict[Place, tuple[str, Value]]:
    """The places that are asked for, each with the words that asked for it and the value that goes with them.

    What comes later in `asked` counts more. A name that is the first of some place means that place alone.

    Args:
        asked: names, patterns (fnmatch) or `ALL`, with their values.
        known: every place with its names, the one that it is listed by first.
        what: such places in words, for messages.
        everything: what `ALL` stands for; None: all of them.

    Raises:
        InputError: nothing is called so.
    """
    found: dict[Place, tuple[str, Value]] = {}
    for words, value in asked.items():
        meant = [place for place, names in known.items() if names[0] == words]
        if words == ALL:
            meant = list(known if everything is None else everything)
        elif not meant:
            meant = [
                place for place, names in known.items() if any(fnmatchcase(name, words) for name in names)
            ]
        if not meant and words != ALL:
            raise InputError(unknown_name(what, words, [names[0] for names in known.values()]))
        for place in meant:
            found.pop(place, None)
            found[place] = words, value
    return found


def is_name(words: str) -> bool:
    """Whether words mean one place, so that a refusal there is a refusal of the request."""
    return words != ALL and not any(letter in words for letter in "*?[")


def refuse_named(refused: Mapping[str, Sequence[str]], done: Sequence[str], verb: str) -> None:
    """Raise an error for a place that was asked for by name and at which nothing can be done; what a pattern
    meets may be left.

    Args:
        refused: reasons by the words that asked.
        done: words by which something was found to do.
        verb: what was to be done, in words: "widened".

    Raises:
        NotApplicableError: with the first reason.
    """
    for words, reasons in refused.items():
        if is_name(words) and words not in done:
            raise NotApplicableError(f"'{words}' can't be {verb}: {reasons[0]}")


def idle(verb: str, skipped: Sequence[Skip]) -> str:
    """The reason why a pass had nothing to do; `verb` is what it does."""
    if not skipped:
        return f"there is nothing to {verb}"
    return f"nothing to {verb}; the first of {len(skipped)}: '{skipped[0].nodes[0]}', {skipped[0].reason}"
