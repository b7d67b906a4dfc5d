"""onnx's own test cases of every operator in the table: none gives wrong numbers, none crashes."""

from __future__ import annotations

import re

import torch
from node_cases import FAILED, NEWER, REFUSED, Outcome, cases, outcome

UNSIGNED = "torch does no arithmetic on uint(16|32|64)$"
FEED = "^no torch tensor can be fed as (object|(int|uint|float)[248])"
ELEMENT = "torch has no element type (U?INT|FLOAT)[248]"

REFUSALS = {
    "Add": UNSIGNED,
    "BitShift": UNSIGNED,
    "BitwiseAnd": UNSIGNED,
    "BitwiseNot": UNSIGNED,
    "BitwiseOr": UNSIGNED,
    "BitwiseXor": UNSIGNED,
    "Cast": ELEMENT,
    "CastLike": ELEMENT,
    "Col2Im": "input 'image_shape' must not be computed from data$",
    "Div": UNSIGNED,
    "Equal": UNSIGNED,
    "Greater": UNSIGNED,
    "GreaterOrEqual": UNSIGNED,
    "Less": UNSIGNED,
    "LessOrEqual": UNSIGNED,
    "Max": UNSIGNED,
    "Min": UNSIGNED,
    "Mod": UNSIGNED,
    "Mul": UNSIGNED,
    "Pow": UNSIGNED,
    "SpaceToDepth": re.escape(NEWER),
    "Sub": UNSIGNED,
    "TopK": UNSIGNED,
}
"""Why cases of an operator may be refused; of any operator, for inputs of a type that torch lacks."""


def outcomes() -> list[Outcome]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [outcome(case) for case in cases()]
    finally:
        torch.set_num_threads(threads)


def test_no_case_fails_and_refusals_are_the_known_ones() -> None:
    """One test, so that no two workers run all cases each."""

    def known(o: Outcome) -> bool:
        reasons = (FEED, REFUSALS.get(o.op.removesuffix(" (expanded)"), "^$"))
        return any(re.search(reason, o.reason) for reason in reasons)

    found = outcomes()
    failed = [f"{o.case}: {o.reason}" for o in found if o.status == FAILED]
    refused = [f"{o.case}: {o.reason}" for o in found if o.status == REFUSED and not known(o)]
    assert (failed, refused) == ([], [])
