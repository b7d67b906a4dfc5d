"""What calibration and a whole compress cost, in units of plain inference, and their memory.

    python tests/benchmarks/bench_cost.py            # some ten minutes
    python tests/benchmarks/bench_cost.py --quick

ResNet-32, 3,000 CIFAR-10 training images, batches of 64, the same number of ONNX Runtime threads
everywhere.

- **survey**: one tapped run with the moments of all of fuse's candidates, over a plain run that returns
  nothing but the outputs. `run` is until the last batch is in, `all` includes the solves. Sessions are
  made inside the time on our side, outside it on the plain side. Mark: 1.5.
- **compress**: `fuse:max_blocks=8,max_ops=2`, with every check; with and without the latency measurement
  at the end, which lasts a fixed 4 seconds. Mark: 30.
- **memory**: the largest resident size of a process that compresses with 1,000 and with 10,000 samples
  from an `.npz`. Mark: 1.1 times.

Loading, inspecting and saving large graphs is measured by `bench_graph.py`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import (
    MB,
    interleaved,
    machine,
    median_ratio,
    normalised_cifar,
    parser,
    passed,
    peak_memory,
    seconds,
    shared,
    table,
    write_json,
)

from onnxfuse import compress
from onnxfuse.data.calibration import Calibration
from onnxfuse.fitting.local_fits import Candidate, fit_locally
from onnxfuse.ir.model import Model
from onnxfuse.passes.fuse import Fuse
from onnxfuse.pipeline.base import Context, Pass
from onnxfuse.pipeline.records import StepReport
from onnxfuse.progress import Advance, NoProgress
from onnxfuse.runtime import latency
from onnxfuse.runtime.session import Runtime

SURVEY_MARK, COMPRESS_MARK, MEMORY_MARK = 1.5, 30.0, 1.1
SEARCHES = {"fuse": Fuse(), "fuse:max_ops=2": Fuse(max_ops=2)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=("survey", "compress", "memory"), help="one part")
    arguments.add_argument(
        "--peak", nargs=2, metavar=("DATA", "BLOCKS"), help="print own peak memory and exit"
    )
    options = arguments.parse_args()
    if options.peak:
        print(json.dumps(peak(Path(options.peak[0]), int(options.peak[1]), options.threads)))
        return
    images, blocks, repeats = (300, 2, 3) if options.quick else (3000, 8, 7)
    print(machine(options.threads))
    found: dict[str, Any] = {"machine": machine(options.threads), "images": images, "blocks": blocks}
    parts = [options.only] if options.only else ["survey", "compress", "memory"]
    if "memory" in parts:  # first, while this process is small
        found["memory"] = memory(blocks, options.quick, options.threads)
    if {"survey", "compress"} & set(parts):
        model = Model.load(shared() / "models" / "cifar_resnet32.onnx")
        data = {model.inputs[0].name: normalised_cifar("train", images)[0]}
        runtime = Runtime("cpu", options.threads)
        print(f"\n{images:,} images, {runtime.threads} threads of ONNX Runtime on both sides")
        if "survey" in parts:
            found["survey"] = surveys(model, data, runtime, repeats)
        if "compress" in parts:
            found["compress"] = whole(model, data, runtime, blocks)
    write_json(options.json, found)


# --- survey -------------------------------------------------------------------------------------------------


class Clock(NoProgress):
    """Notes when the last step of a task was made."""

    def __init__(self) -> None:
        self.last = 0.0

    def task(self, description: str, total: float | None = None) -> Advance:
        def advance(amount: float = 1) -> None:
            self.last = time.perf_counter()

        return advance


def surveys(
    model: Model, data: dict[str, np.ndarray], runtime: Runtime, repeats: int
) -> list[dict[str, Any]]:
    """Plain run and survey, interleaved, for every way to look for candidates."""
    calibration = Calibration.open(data, model)
    context = Context(model, calibration, runtime)
    session = runtime.session(model)

    def plain() -> None:
        for part in (calibration.fit, calibration.held_out):
            for batch in part:
                session.run(batch.feed)

    results: list[dict[str, Any]] = []
    for name, pass_ in SEARCHES.items():
        # The very candidates that the pass would survey.
        candidates = [candidate for candidate, _ in pass_._candidates(model.copy(), context)[0]]
        runs: list[float] = []
        base, times = interleaved(
            [
                lambda: seconds(plain),
                lambda c=candidates, r=runs: surveyed(model, c, calibration, runtime, r),  # type: ignore[misc]
            ],
            repeats,
        )
        results.append(
            {
                "search": name,
                "candidates": len(candidates),
                "views": len({candidate.view for candidate in candidates}),
                "columns": sorted(candidate.columns for candidate in candidates),
                "plain_seconds": statistics.median(base),
                "run": median_ratio(runs, base),
                "all": median_ratio(times, base),
            }
        )
    print(f"median, least and largest ratio of {repeats} rounds; mark {SURVEY_MARK}")
    table(
        ("survey of", "regions", "plain s", "run / plain", "all / plain", "within"),
        [
            (
                row["search"],
                row["candidates"],
                f"{row['plain_seconds']:.2f}",
                "{:.2f} ({:.2f}-{:.2f})".format(*row["run"]),
                "{:.2f} ({:.2f}-{:.2f})".format(*row["all"]),
                passed(row["all"][0], SURVEY_MARK),
            )
            for row in results
        ],
    )
    return results


def surveyed(
    model: Model, candidates: list[Candidate], calibration: Calibration, runtime: Runtime, runs: list[float]
) -> float:
    """Seconds of a survey; appends those until the last batch was in."""
    clock = Clock()
    start = time.perf_counter()
    fit_locally(model, candidates, calibration, runtime, progress=clock)
    end = time.perf_counter()
    runs.append(clock.last - start)
    return end - start


# --- compress -----------------------------------------------------------------------------------------------


@contextmanager
def timed_latency() -> Iterator[list[float]]:
    """Collects how long compress's own latency measurement takes."""
    found: list[float] = []
    measure = latency.Stopwatch._block

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = measure(*arguments, **named)
        found.append(time.perf_counter() - start)
        return result

    with mock.patch.object(latency.Stopwatch, "_block", timed):
        yield found


class Tasks(NoProgress):
    """Adds up the seconds between the start of a task and its last step, by the task's name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def task(self, description: str, total: float | None = None) -> Advance:
        start = time.perf_counter()
        before = self.seconds.get(description, 0.0)

        def advance(amount: float = 1) -> None:
            self.seconds[description] = before + time.perf_counter() - start

        return advance


def whole(model: Model, data: dict[str, np.ndarray], runtime: Runtime, blocks: int) -> dict[str, Any]:
    """One compress between two plain runs."""
    session = runtime.session(model)
    batches = Calibration.open(data, model, held_out=0.0).fit

    def plain() -> float:
        return seconds(lambda: [session.run(batch.feed) for batch in batches])

    plain()
    base = [plain() for _ in range(3)]
    tasks = Tasks()
    start = time.perf_counter()
    with timed_latency() as measured:
        result = compress(
            model,
            f"fuse:max_blocks={blocks},max_ops=2",
            calib=data,
            provider="cpu",
            threads=runtime.threads,
            progress=tasks,
        )
    total = time.perf_counter() - start
    base += [plain() for _ in range(3)]
    unit = statistics.median(base)
    step: StepReport = result.steps[0]
    parts = {
        "whole compress": total,
        "without its latency measurement": total - sum(measured),
        "  the pass": step.seconds,
        **{f"    {name}": spent for name, spent in tasks.seconds.items()},
        "  its verification": step.verify_seconds,
    }
    print(
        f"\ncompress with {blocks} blocks fused (exit code {result.exit_code}); plain inference {unit:.2f} s"
    )
    table(
        ("part", "seconds", "x plain", "mark", "within"),
        [
            (name, f"{spent:.2f}", f"{spent / unit:.1f}", *(marked(spent / unit, name)))
            for name, spent in parts.items()
        ],
    )
    return {"plain_seconds": unit, "exit_code": result.exit_code, "seconds": parts}


def marked(ratio: float, name: str) -> tuple[str, str]:
    return ("", "") if name.startswith(" ") else (f"{COMPRESS_MARK:g}", passed(ratio, COMPRESS_MARK))


# --- memory -------------------------------------------------------------------------------------------------


def memory(blocks: int, quick: bool, threads: int | None) -> list[dict[str, Any]]:
    """Peaks of processes that differ in nothing but the number of samples."""
    counts = (100, 1000) if quick else (1000, 10000)
    model = Model.load(shared() / "models" / "cifar_resnet32.onnx")
    images = normalised_cifar("train", max(counts))[0]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            path = Path(folder) / f"{count}.npz"
            arrays: dict[str, Any] = {model.inputs[0].name: images[:count]}
            np.savez(path, **arrays)
            command = [sys.executable, __file__, "--peak", str(path), str(blocks)]
            command += ["--threads", str(threads)] if threads else []
            run = subprocess.run(command, capture_output=True, check=True, text=True)
            results.append({"samples": count, "file": path.stat().st_size, **json.loads(run.stdout)})
    first = results[0]["peak"]
    print(f"\npeak memory of a process that fuses {blocks} blocks")
    table(
        ("samples", "file MB", "seconds", "peak MB", "ratio", "mark", "within"),
        [
            (
                f"{row['samples']:,}",
                f"{row['file'] / MB:.0f}",
                f"{row['seconds']:.1f}",
                f"{row['peak'] / MB:.0f}",
                f"{row['peak'] / first:.3f}",
                MEMORY_MARK,
                passed(row["peak"] / first, MEMORY_MARK),
            )
            for row in results
        ],
    )
    return results


def peak(data: Path, blocks: int, threads: int | None) -> dict[str, float]:
    """In a process of its own."""
    start = time.perf_counter()
    before = peak_memory()
    passes: list[Pass] = [Fuse(max_blocks=blocks, max_ops=2)]
    result = compress(
        shared() / "models" / "cifar_resnet32.onnx", passes, calib=data, provider="cpu", threads=threads
    )
    if not result.ok:
        raise SystemExit(f"compress failed: {result.reason}")
    return {"seconds": time.perf_counter() - start, "imported": before, "peak": peak_memory()}


if __name__ == "__main__":
    main()
