"""Sites in a network that a user names: by name, by pattern, or all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from onnxfuse.errors import InputError, NotApplicableError, unknown_name
from onnxfuse.findings import Change, Skip
from onnxfuse.pipeline.base import PassResult

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model

ALL = "all"
Site = TypeVar("Site")
SiteValue = TypeVar("SiteValue")


def choose(
    asked: Mapping[str, SiteValue],
    known: Mapping[Site, Sequence[str]],
    what: str,
    everything: Collection[Site] | None = None,
) -> dict[Site, tuple[str, SiteValue]]:
    """The sites that are asked for, each with the words that asked for it and the value that goes with them.

    What comes later in `asked` counts more. A name that is the first of some site means that site alone.

    Args:
        asked: names, patterns (fnmatch) or `ALL`, with their values.
        known: every site with its names, the one that it is listed by first.
        what: such sites in words, for messages.
        everything: what `ALL` stands for; None: all of them.

    Raises:
        InputError: nothing is called so.
    """
    found: dict[Site, tuple[str, SiteValue]] = {}
    for words, value in asked.items():
        meant = [site for site, names in known.items() if names[0] == words]
        if words == ALL:
            meant = list(known if everything is None else everything)
        elif not meant:
            meant = [site for site, names in known.items() if any(fnmatchcase(name, words) for name in names)]
        if not meant and words != ALL:
            raise InputError(unknown_name(what, words, [names[0] for names in known.values()]))
        for site in meant:
            found.pop(site, None)
            found[site] = words, value
    return found


def is_name(words: str) -> bool:
    """Whether words mean one site, so that a refusal there is a refusal of the request."""
    return words != ALL and not any(letter in words for letter in "*?[")


class Answers:
    """Changes and refusals at the sites that a pass was asked for.

    Attributes:
        changes: lines of the report for what was done.
        skipped: sites at which nothing could be done, with reasons.
    """

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.skipped: list[Skip] = []
        self._met: set[str] = set()
        self._reasons: dict[str, str] = {}

    def done(self, words: str, *changes: Change) -> None:
        """Note what was done where `words` asked for it."""
        self._met.add(words)
        self.changes += changes

    def refuse(self, words: str, names: tuple[str, ...], reason: str) -> None:
        """Note that nothing can be done at a site.

        Args:
            words: those that asked for it.
            names: of the site.
            reason: why nothing can be done.
        """
        self._reasons.setdefault(words, reason)
        self.skipped.append(Skip(names, reason))

    def check(self, verb: str) -> None:
        """Raise an error for a site that was asked for by name and at which nothing can be done; what a
        pattern meets may be left.

        Args:
            verb: what was to be done, in words: "widened".

        Raises:
            NotApplicableError: with the first reason.
        """
        for words, reason in self._reasons.items():
            if is_name(words) and words not in self._met:
                raise NotApplicableError(f"'{words}' can't be {verb}: {reason}")

    def result(self, model: Model, verb: str) -> PassResult:
        """The result of the pass that made these changes of `model`; `verb` is what it does: "widen"."""
        notes = [] if self.changes else [idle(verb, self.skipped)]
        return PassResult(model, self.changes, self.skipped, notes=notes)


def idle(verb: str, skipped: Sequence[Skip]) -> str:
    """The reason why a pass had nothing to do; `verb` is what it does: "widen"."""
    if not skipped:
        return f"there is nothing to {verb}"
    return f"nothing to {verb}; the first of {len(skipped)}: '{skipped[0].nodes[0]}', {skipped[0].reason}"
