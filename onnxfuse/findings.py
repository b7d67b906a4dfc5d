"""Records of what a pass made, refused and claims.

They are plain values without behavior, so that analyses can hand them out without knowing what a pass is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


@dataclass(frozen=True)
class Change:
    """One rewrite that was made: the nodes it replaced, one line that says what became of them, and
    figures."""

    nodes: tuple[str, ...]
    what: str
    detail: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """One rewrite that was not made: the nodes it is about and the reason."""

    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Reached:
    """How far a pass was asked to go, and how far it went.

    `goal` is the name of the option that asked. `asked` and `reached` are shares of `what`: those that are
    gone where `gone`, else those that are left.
    """

    goal: str
    what: str
    gone: bool
    asked: float
    reached: float


@dataclass(frozen=True)
class Prediction:
    """A claim about one tensor of the rewritten model, made from moments.

    Over the fit samples, at the positions that `numerics.sampling.RowSampler(context.seed, tensor, mask)`
    draws, |tensor - reference|^2 summed over `channel_axis` and averaged over rows (samples x positions)
    equals `error`.

    `tensor` names a tensor of the rewritten model, `reference` one of `context.original` with the same
    shape, up to `channels`. `error` and `variance` (the reference's, about its mean, also summed over
    channels) are in squared units of the tensor. `positions` is the number of positions sampled in each
    sample; None means all of them. `mask` names a graph input of the tensor's leading dimensions: rows where
    it is 0 don't count. `channels` are those of the reference that the tensor has, in its order; None means
    all. `batches` are numbers of batches of the fit samples: the claim is about these alone; None means all.
    """

    tensor: str
    reference: str
    error: float
    variance: float
    positions: int | None = None
    channel_axis: int = 1
    mask: str | None = None
    channels: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
