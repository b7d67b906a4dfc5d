"""`grow`: a network made larger, its function unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxfuse.commands.compress import compress
from onnxfuse.commands.loading import ModelSource, PathOrText
from onnxfuse.errors import InputError
from onnxfuse.growth.plan import growth_passes
from onnxfuse.report.files import check_folder, write_report
from onnxfuse.results import Result


def grow(
    model: ModelSource,
    *,
    widen: Mapping[str, float] | None = None,
    deepen: Mapping[str, int] | None = None,
    kernel: Mapping[str, int] | None = None,
    scheme: str = "r2r",
    noise: float | None = None,
    report: PathOrText | None = None,
    **options: Any,
) -> Result:
    """Make a network wider, deeper, or its kernels larger, with its function unchanged.

    Sites are named by name, by pattern (fnmatch) or as "all"; `inspect(model, growth=True)` lists them.

    Args:
        model: is left as it is.
        widen: by site, how many times as many channels there are to be.
        deepen: by site, how many layers or blocks are added.
        kernel: by site, the size of the kernels.
        scheme: "r2r", "net2net", or to widen "netmorph".
        noise: of net2net, as the pass `widen` has it.
        report: folder for `report.json` and `report.txt`; written for a failed run, too.
        options: the other arguments of `compress`.

    Raises:
        InputError, NotApplicableError: as `compress`.
    """
    plan = growth_passes(widen or {}, deepen or {}, kernel or {}, scheme, noise)
    if not plan:
        raise InputError("say what is to grow: --widen, --deepen or --kernel")
    if report is not None:
        check_folder(Path(report))
    result = replace(compress(model, plan, **options), command="grow")
    if report is not None:
        write_report(Path(report), result.report, result.command)
    return result
