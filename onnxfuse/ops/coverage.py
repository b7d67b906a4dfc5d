"""The record that says of an operator what each analysis knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FACETS = ("channels", "regions", "bounds", "macs", "torch")
"""Analyses that may know an operator: coupled channels, regions that fuse, bounds of values, counts of
multiply-accumulates, the bridge to PyTorch."""


@dataclass(frozen=True)
class OperatorInfo:
    """One operator.

    Attributes:
        name: as ONNX spells it.
        domain: "" for ONNX's own.
        kind: its family, by name.
        traits: their names.
        operands: how many of the first inputs carry data, None for all.
        weights: the inputs for trained weights.
        facets: for each of `FACETS` "rule", "default" (what kind or traits give), or why there is neither.
    """

    name: str
    domain: str
    kind: str
    traits: tuple[str, ...]
    operands: int | None
    weights: tuple[int, ...]
    facets: Mapping[str, str]
