"""The operators that onnxfuse knows, and what each of its analyses knows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnxfuse.ops.coverage import FACETS, OperatorInfo
from onnxfuse.ops.table import OPS, Key, Op, Trait


def operators() -> list[OperatorInfo]:
    """All rows of the table of operators, in its order, with the rules there are for each."""
    coverage = _coverage()
    return [_info(key, op, {facet: coverage[facet](key) for facet in FACETS}) for key, op in OPS.items()]


def _info(key: Key, op: Op, facets: Mapping[str, str]) -> OperatorInfo:
    traits = tuple(str(trait.name).lower() for trait in Trait if trait in op.traits and trait.value)
    return OperatorInfo(op.name, key[0], op.kind.name.lower(), traits, op.operands, op.weights, facets)


def _coverage() -> Mapping[str, Callable[[Key], str]]:
    from onnxfuse.analysis.cost import RULES as cost_rules
    from onnxfuse.analysis.intervals.rules import RULES as interval_rules
    from onnxfuse.analysis.regions.rules import RULES as region_rules
    from onnxfuse.channels.rules import RULES as channel_rules

    return {
        "channels": channel_rules.coverage,
        "regions": region_rules.coverage,
        "bounds": interval_rules.coverage,
        "macs": cost_rules.coverage,
        "torch": _torch_coverage(),
    }


def _torch_coverage() -> Callable[[Key], str]:
    try:
        from onnxfuse.pytorch.bridge.rules import RULES
    except ImportError:
        return lambda key: "torch is not installed"
    return RULES.coverage
