"""Records of what `inspect` lists: linear operators and regions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSummary:
    """One operator that multiplies by constant weights. `macs` at the inspected sizes, None where unknown;
    `share` of the model's."""

    name: str
    op: str
    kind: str
    in_features: int
    out_features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int
    macs: int | None
    share: float | None


@dataclass(frozen=True)
class RegionSummary:
    """One region that an affine operator could stand for: its text by
    `analysis.regions.region.describe_region`, its tensors, and the linear operators inside. Regions nest and
    overlap, so there are more than can be fused."""

    text: str
    u: str
    v: str
    kind: str
    linear_ops: int
    sites: tuple[str, ...]
