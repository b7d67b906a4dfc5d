"""Places that a user names."""

from __future__ import annotations

import pytest

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.findings import Skip
from onnxfuse.pipeline.choosing import Answers, choose, idle, is_name

KNOWN = {1: ["conv1", "other"], 2: ["conv1#2"], 3: ["fc", "conv1"], 4: ["head"]}


def test_names_patterns_and_all() -> None:
    assert choose({"conv1": 5}, KNOWN, "site") == {1: ("conv1", 5)}  # the first name of a place counts alone
    assert choose({"other": 5}, KNOWN, "site") == {1: ("other", 5)}
    assert choose({"conv1*": 5}, KNOWN, "site") == dict.fromkeys((1, 2, 3), ("conv1*", 5))
    assert choose({"all": 5}, KNOWN, "site") == dict.fromkeys(KNOWN, ("all", 5))
    assert choose({"all": 5}, KNOWN, "site", everything=[3]) == {3: ("all", 5)}
    assert choose({"all": 5, "fc": 6}, KNOWN, "site")[3] == ("fc", 6)
    assert choose({"fc": 6, "all": 5}, KNOWN, "site")[3] == ("all", 5)
    assert choose({"all": 5}, {}, "site") == {}
    for words in ("conv2", "x*"):
        with pytest.raises(InputError, match=r"there is no site '.*known: conv1, conv1#2, fc, head"):
            choose({"fc": 1, words: 1}, KNOWN, "site")


def test_only_what_is_named_is_refused() -> None:
    assert [is_name(words) for words in ("conv1", "all", "conv*", "c?", "[ab]")] == [True] + [False] * 4
    patterns = Answers()
    for words in ("conv*", "all"):
        patterns.refuse(words, ("conv1",), "why")
    patterns.check("cut")
    several = Answers()  # of several sites of that name one could
    several.refuse("fc", ("fc",), "why")
    several.done("fc")
    several.check("cut")
    named = Answers()
    named.done("conv*")
    for reason in ("why", "more"):
        named.refuse("fc", ("fc",), reason)
    with pytest.raises(NotApplicableError, match="'fc' can't be cut: why"):
        named.check("cut")
    assert named.skipped == [Skip(("fc",), "why"), Skip(("fc",), "more")]


def test_idle() -> None:
    assert idle("cut", []) == "there is nothing to cut"
    assert (
        idle("cut", [Skip(("a", "b"), "why"), Skip(("c",), "more")])
        == "nothing to cut; the first of 2: 'a', why"
    )
