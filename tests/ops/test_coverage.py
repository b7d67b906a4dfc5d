"""What the analyses know of operators: a rule, a default or a stated reason, for every row."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from onnxfuse.analysis.cost import RULES as COSTS
from onnxfuse.analysis.intervals.rules import RULES as INTERVALS
from onnxfuse.analysis.regions.rules import RULES as REGIONS
from onnxfuse.channels.rules import RULES as CHANNELS
from onnxfuse.commands.operators import operators
from onnxfuse.ops.coverage import FACETS, OperatorInfo
from onnxfuse.ops.facet import Facet
from onnxfuse.ops.table import OPS, Kind
from onnxfuse.pytorch.bridge.rules import RULES as TORCH
from onnxfuse.report.operators_view import operators_view

ALL: dict[str, Facet] = {
    "channels": CHANNELS,
    "regions": REGIONS,
    "bounds": INTERVALS,
    "macs": COSTS,
    "torch": TORCH,
}


@pytest.mark.parametrize("info", operators(), ids=lambda info: f"{info.domain}::{info.name}")
def test_every_row_and_facet_is_a_rule_a_default_or_a_reason(info: OperatorInfo) -> None:
    key = info.domain, info.name
    assert list(info.facets) == list(FACETS)
    for name, facet in ALL.items():
        said = info.facets[name]
        assert (said in ("rule", "default")) == (facet.get(key) is not None)
        assert said in ("rule", "default") or len(said.split()) > 2


def test_all_that_an_analysis_has_a_rule_for_is_in_the_table() -> None:
    assert {(info.domain, info.name) for info in operators()} == {*OPS}
    for facet in ALL.values():
        assert {*facet.rules} <= {*OPS}


def test_an_elementwise_operator_needs_no_rule_but_its_function() -> None:
    for key in OPS.of_kind(Kind.ACTIVATION, Kind.ELEMENTWISE):
        assert all(ALL[name].get(key) is not None for name in ("channels", "regions", "macs"))


def test_rules_do_not_repeat_a_default() -> None:
    for facet in ALL.values():
        for key, rule in facet.rules.items():
            row = OPS.get(*key)
            assert row is not None
            assert facet.default(row) is not rule, key


def test_the_view_fits_80_columns_and_has_every_operator() -> None:
    infos = operators()
    paper = io.StringIO()
    for part in operators_view(infos):
        Console(file=paper, width=80).print(part)
    lines = paper.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(info.name[:20] in line for line in lines) for info in infos)
    assert "frozen: no rule" in paper.getvalue()


def test_without_torch_the_facet_says_so() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from onnxfuse.commands.operators import operators\n"
        "print({info.facets['torch'] for info in operators()})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "{'torch is not installed'}"
