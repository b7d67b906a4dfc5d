"""Where a network can grow, and the passes that make it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from onnxfuse.channels.groups import ChannelGroups
from onnxfuse.growth import widening
from onnxfuse.growth.depth import DepthScheme, find_sites
from onnxfuse.growth.kernels import find_kernels, kernel_obstacle
from onnxfuse.ir.model import Model
from onnxfuse.ops.layouts import weight_type
from onnxfuse.pipeline.base import Pass
from onnxfuse.pipeline.recipe import make_pass

_DOUBLE = 2.0  # the ratio at which groups are asked: net2net can keep statistics at whole ones only


@dataclass(frozen=True)
class GrowthSite:
    """A place where a network may grow.

    Attributes:
        form: "widen", "deepen" or "kernel".
        name: what `grow` calls it by.
        what: what is there, in words: "16 channels", "residual sum", "3x3 kernel".
        schemes: those that can; of a kernel, which has no schemes, the form itself.
        refused: why not, by scheme.
    """

    form: str
    name: str
    what: str
    schemes: tuple[str, ...]
    refused: Mapping[str, str]


def growth_sites(model: Model, groups: ChannelGroups) -> tuple[GrowthSite, ...]:
    """All sites where a network may grow, in the order of the forms; `groups` are the model's."""
    return (*_widths(groups), *_depths(model), *_kernels(model))


def growth_passes(
    widen: Mapping[str, float],
    deepen: Mapping[str, int],
    kernel: Mapping[str, int],
    scheme: str,
    noise: float | None,
) -> list[Pass]:
    """The passes for what is asked. Kernels first and depth last, so that patterns mean what the network had
    before.

    Args:
        widen: ratio by site.
        deepen: number of layers or blocks by site.
        kernel: size by site.
        scheme: of new channels and layers.
        noise: see `widening.widen`; None: the default of the pass.

    Raises:
        InputError: a wrong value, or a scheme that a pass doesn't have.
    """
    asked: list[tuple[str, dict[str, Any]]] = []
    if kernel:
        asked.append(("kernel", {"sites": kernel}))
    if widen:
        more = {} if noise is None else {"noise": noise}
        asked.append(("widen", {"sites": widen, "scheme": scheme, **more}))
    if deepen:
        asked.append(("deepen", {"sites": deepen, "scheme": scheme}))
    return [make_pass(name, options) for name, options in asked]


def _widths(groups: ChannelGroups) -> Iterator[GrowthSite]:
    for group in groups:
        found = {}
        for scheme in get_args(widening.WidthScheme):
            found[scheme] = widening.width_obstacle(group, scheme, widening.additions(group, scheme, _DOUBLE))
        yield _site("widen", group.name, f"{group.size} channels", found)


def _depths(model: Model) -> Iterator[GrowthSite]:
    schemes = get_args(DepthScheme)
    for own in zip(*(find_sites(model, scheme) for scheme in schemes), strict=True):
        found = {scheme: site.obstacle for scheme, site in zip(schemes, own, strict=True)}
        yield _site("deepen", own[0].names[0], "residual sum" if own[0].sum else "layer", found)


def _kernels(model: Model) -> Iterator[GrowthSite]:
    shapes = model.shapes()
    for weight, names in find_kernels(model).items():
        size = weight_type(model, weight)[1][2:] if model.is_weight(weight) else ()
        reason = kernel_obstacle(model, weight, max(size, default=1) + 1, shapes)
        yield _site(
            "kernel", names[0], f"{'x'.join(map(str, size)) or 'computed'} kernel", {"kernel": reason}
        )


def _site(form: str, name: str, what: str, found: Mapping[str, str | None]) -> GrowthSite:
    refused = {scheme: reason for scheme, reason in found.items() if reason is not None}
    return GrowthSite(form, name, what, tuple(s for s in found if s not in refused), refused)
