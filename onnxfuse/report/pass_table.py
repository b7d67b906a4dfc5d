"""The passes and their options as Markdown, for passes/README.md.

    python -m onnxfuse.report.pass_table passes/README.md

puts it between the two marks of that file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from onnxfuse.pipeline.catalog import PassInfo, passes
from onnxfuse.pipeline.discovery import load_pass

BEGIN = "<!-- generated: do not edit by hand -->"
END = "<!-- end -->"


def pass_table(infos: Iterable[PassInfo]) -> str:
    """A table of the passes, and for each a section with its options."""
    known = list(infos)
    rows = ((f"[`{info.name}`](#{info.name})", info.contract.upper(), info.summary) for info in known)
    lines = [*_table(("pass", "promises", "does"), rows)]
    for info in known:
        lines += ["", f"### {info.name}", "", f"{info.contract.upper()}; for instance `{info.example}`.", ""]
        options = ((f"`{o.name}`", f"`{o.type}`", f"`{o.default}`", o.help) for o in info.options)
        lines += _table(("option", "type", "default", "means"), options) if info.options else ["No options."]
    return "\n".join(lines)


def refreshed(text: str, infos: Iterable[PassInfo]) -> str:
    """The text with what stands between the marks made anew.

    Raises:
        ValueError: it lacks the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no '{BEGIN}' with '{END}' behind it")
    return f"{before}{BEGIN}\n\n{pass_table(infos)}\n\n{END}{after}"


def built_in() -> list[PassInfo]:
    """The passes that come with onnxfuse, by name."""
    return [info for info in passes() if load_pass(info.name).__module__.startswith("onnxfuse.passes.")]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(refreshed(page.read_text(encoding="utf-8"), built_in()), encoding="utf-8")
