"""Growth on models from the wild: is every pass exact, wherever a model has a site?

    ONNXFUSE_SHARED=FOLDER python tests/benchmarks/bench_grow.py

For each ONNX file in FOLDER/models and each form of growth: at how many places, out of how many, how far the
outputs move in noise floors (8 are allowed), parameters and the time of the pass. Samples are made up to the
inputs' types and shapes. Exit code 1 where a pass breaks its promise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import fill, machine, number, parser, shared, table, write_json

from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import OnnxfuseError
from onnxfuse.ir.model import Model
from onnxfuse.passes.deepen import Deepen
from onnxfuse.passes.kernel import Kernel
from onnxfuse.passes.widen import Widen
from onnxfuse.pipeline.base import Context, Pass
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.records import StepReport
from onnxfuse.runtime.session import Runtime

FORMS: dict[str, list[Pass]] = {
    "widen r2r x 1.5": [Widen(sites={"all": 1.5})],
    "widen net2net x 1.5": [Widen(sites={"all": 1.5}, scheme="net2net")],
    "widen net2net x 2": [Widen(sites={"all": 2}, scheme="net2net")],
    "widen netmorph x 1.5": [Widen(sites={"all": 1.5}, scheme="netmorph")],
    "deepen r2r": [Deepen(sites={"*": 1})],
    "deepen net2net": [Deepen(sites={"*": 1}, scheme="net2net")],
    "kernel 5": [Kernel(sites={"all": 5})],
    "all three": [Kernel(sites={"all": 5}), Widen(sites={"all": 1.25}), Deepen(sites={"all": 1})],
}


def main() -> int:
    options = _options()
    print(machine(options.threads), end="\n\n")
    found = {}
    for path in sorted((shared() / "models").glob("*.onnx")):
        if options.only in path.stem:
            found[path.stem] = _measure(path, options)
    write_json(options.json, found)
    every = [(model, row) for model, rows in found.items() for row in rows]
    broken = [f"{model}: {row['form']}: {row['reason']}" for model, row in every if row["reason"]]
    print("\n".join(broken) or "every pass kept its promise")
    return 1 if broken else 0


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--only", default="", metavar="TEXT", help="models with this in their name")
    return made.parse_args()


def _measure(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    model = Model.load(path)
    count = 4 if options.quick else 8
    calibration = Calibration.open(None, model, limit=count, batch_size=count // 2, held_out=0.5)
    context = Context(model, calibration, Runtime("cpu", options.threads))
    rows = []
    for form, passes in FORMS.items():
        start = time.perf_counter()
        steps = PassManager(passes).run(model, context).steps
        rows.append(_row(form, steps, time.perf_counter() - start))
    print(fill(f"{path.stem}: {number(steps[0].before.parameters)} parameters"))
    cells = [(*list(row.values())[:4], number(row["parameters"]), f"{row['seconds']:.1f}") for row in rows]
    table(("", "done", "not", "floors", "parameters", "seconds"), cells)
    print(flush=True)
    return rows


def _row(form: str, steps: Sequence[StepReport], seconds: float) -> dict[str, Any]:
    compared = [s.verification.comparison for s in steps if s.verification and s.verification.comparison]
    ratios = [output.ratio for comparison in compared for output in comparison.outputs]
    reasons = [str(s.reason) for s in steps if not s.committed]
    return {
        "form": form,
        "done": sum(len(s.changes) for s in steps),
        "not done": sum(len(s.skipped) for s in steps),
        "floors": f"{max(ratios):.2f}" if ratios else "-",
        "parameters": steps[-1].after.parameters,
        "seconds": seconds,
        "reason": reasons[0] if reasons else "",
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OnnxfuseError as error:
        sys.exit(f"bench_grow: {error}")
