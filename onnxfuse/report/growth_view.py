"""Where a network can grow, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxfuse.report.tables import heading, paragraph
from onnxfuse.wording import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxfuse.growth.plan import GrowthSite


def growth_view(sites: Sequence[GrowthSite]) -> Iterator[RenderableType]:
    """For each form of growth the places where it can be, with the schemes that can, then the others with the
    reason."""
    for form in dict.fromkeys(site.form for site in sites):
        own = [site for site in sites if site.form == form]
        free = [site for site in own if site.schemes]
        yield heading(f"{form}: {counted(len(own), 'site')}, {len(free)} can grow")
        for site in free:
            schemes = "" if site.schemes == (form,) else f": {', '.join(site.schemes)}"
            yield paragraph(f"{site.name} ({site.what}){schemes}", 2)
            for scheme, reason in site.refused.items():
                yield paragraph(f"not {scheme}: {reason}", 6)
        for site in own:
            if not site.schemes:
                yield paragraph(f"{site.name} ({site.what}): no, {next(iter(site.refused.values()))}", 2)
