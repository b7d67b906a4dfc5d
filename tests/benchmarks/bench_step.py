"""A training step of the PyTorch import beside the native module's; and is it a module like any other?

    python tests/benchmarks/bench_step.py                     # some twenty minutes
    python tests/benchmarks/bench_step.py --only resnet,gpt --compiler aot_eager

A step is forward, loss, backward and an AdamW step, at a batch size for which the native module takes some
50 ms on one thread. Native module and imports (one for each of torch's exporters) take turns; a ratio is
of medians of blocks of rounds, with its 95% interval. Then: torch.compile with one graph, forward and
backward; torch.export with a dynamic batch; deepcopy; the state_dict through a file.
"""

import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import fill, machine, parser, seconds, table, write_json
from torch import Tensor, nn

from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.runtime.latency import Timing, timings_from

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import properties
from architectures import ARCHITECTURES, EXPORTERS, Architecture, ExportFailedError, export

WIDTHS = {"cnn": 4, "transformer": 8, "recurrent": 8}
MARKS = {"cnn": 1.15, "transformer": 1.15, "recurrent": 1.5}
LENGTH = 48
STEP = 0.05
"""Seconds of the native step that the batch is chosen for."""

MOST = 256
THREADS = (1, 2)
ROUNDS, QUICK_ROUNDS, BLOCKS = 40, 3, 8
CHECKS = ("compile", "export", "deepcopy", "state")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="NAMES", help="architectures, separated by commas")
    arguments.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    options = arguments.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    chosen = [a for a in ARCHITECTURES.values() if a.kind in WIDTHS]
    if options.only:
        chosen = [ARCHITECTURES[name] for name in options.only.split(",")]
    print(f"{machine(1)}, torch {version('torch')}", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as place:
        for architecture in chosen:
            start = time.perf_counter()
            found.append(measured(architecture, Path(place), options.quick, options.compiler))
            print(f"  {architecture.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    show(found)
    write_json(options.json, {"machine": machine(1), "torch": version("torch"), "found": found})
    slow = [f for f in found for times in f["timings"].values() if any(over(f, t) for t in times.values())]
    sys.exit(1 if slow else 0)


def measured(architecture: Architecture, place: Path, quick: bool, compiler: str) -> dict[str, Any]:
    """Timings by threads and exporter, and checks by exporter, of one architecture."""
    width = WIDTHS.get(architecture.kind, 4)
    native = architecture.module(width)
    modules: dict[str, nn.Module] = {}
    checks: dict[str, dict[str, str]] = {}
    for how in EXPORTERS:
        path = place / f"{architecture.name}.{how}.onnx"
        try:
            export(architecture, how, path, width)
        except ExportFailedError as error:
            checks[how] = {"exporter": str(error)}
            continue
        modules[how] = to_torch(path)
        checks[how] = checked(architecture, path, compiler)
    torch.set_num_threads(1)
    length = LENGTH if architecture.name != "encoder" else 12  # TorchScript fixes that one's length
    rows = batch_size(architecture, native, length)
    inputs = list(architecture.example(rows, length).values())
    timings = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        timings[threads] = timed(native, modules, inputs, QUICK_ROUNDS if quick else ROUNDS)
    torch.set_num_threads(1)
    return {
        "name": architecture.name,
        "kind": architecture.kind,
        "rows": rows,
        "timings": timings,
        "checks": checks,
    }


# --- time ---------------------------------------------------------------------------------------------------


def stepper(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """One training step, again and again."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        properties.project(module(*inputs)).backward()
        optimizer.step()

    return step


def batch_size(architecture: Architecture, native: nn.Module, length: int) -> int:
    """The power of two at which the native step first takes `STEP` seconds."""
    rows = 1
    while rows < MOST:
        step = stepper(native, list(architecture.example(rows, length).values()))
        step()
        if min(seconds(step) for _ in range(3)) >= STEP:
            break
        rows *= 2
    return rows


def timed(
    native: nn.Module, modules: dict[str, nn.Module], inputs: Sequence[Tensor], rounds: int
) -> dict[str, dict[str, Any]]:
    """Timings by exporter, and of the native module."""
    steps = [stepper(module, inputs) for module in (native, *modules.values())]
    for step in steps:
        step()
        step()
    random = np.random.default_rng(0)
    times = np.zeros((rounds, len(steps)))
    for number in range(rounds):
        for index in random.permutation(len(steps)):
            times[number, index] = 1e9 * seconds(steps[index])
    blocks = np.array([np.median(part, axis=0) for part in np.array_split(times, min(rounds, BLOCKS))])
    timings: Sequence[Timing] = timings_from(blocks)
    return {name: asdict(timing) for name, timing in zip(("native", *modules), timings, strict=True)}


def over(found: dict[str, Any], timing: dict[str, Any]) -> bool:
    return bool(timing["ratio"] > MARKS[found["kind"]])


# --- checks -------------------------------------------------------------------------------------------------


def checked(architecture: Architecture, path: Path, compiler: str) -> dict[str, str]:
    """By check: "yes", or what went wrong."""
    inputs, others = (list(architecture.example(rows).values()) for rows in (3, 5))
    questions: dict[str, Callable[[nn.Module], None]] = {
        "compile": lambda module: properties.compiles(module, inputs, compiler),
        "export": lambda module: properties.exports(module, inputs, others),
        "deepcopy": lambda module: properties.copies(module, inputs),
        "state": lambda module: properties.reloads(module, to_torch(path), inputs),
    }
    found = {}
    for name, question in questions.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                question(to_torch(path))
                found[name] = "yes"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


# --- showing ------------------------------------------------------------------------------------------------


def show(found: Sequence[dict[str, Any]]) -> None:
    for threads in THREADS:
        print(f"\na training step, import / native, {threads} thread{'s' * (threads > 1)}")
        table(
            ("", "rows", "native ms", *EXPORTERS, "ok"),
            [time_row(f, f["timings"][threads]) for f in found],
        )
    marks = ", ".join(f"{kind} {mark:g}" for kind, mark in MARKS.items())
    print(fill(f"in brackets: 95% interval of the median ratio. ok: at most {marks}."))
    print("\nworks: " + ", ".join(CHECKS))
    table(
        ("", *EXPORTERS), [(f["name"], *(check_cell(f["checks"][how]) for how in EXPORTERS)) for f in found]
    )
    for f in found:
        for how in EXPORTERS:
            for check, said in f["checks"][how].items():
                if said != "yes":
                    print(fill(f"{f['name']} {how}, {check}: {said}", "  "))


def time_row(found: dict[str, Any], times: dict[str, dict[str, Any]]) -> tuple[object, ...]:
    cells = [
        f"{t['ratio']:.2f} ({t['ratio_low']:.2f}-{t['ratio_high']:.2f})" if (t := times.get(how)) else "-"
        for how in EXPORTERS
    ]
    good = not any(over(found, timing) for timing in times.values())
    return (
        found["name"],
        found["rows"],
        f"{times['native']['median_ms']:.0f}",
        *cells,
        "yes" if good else "NO",
    )


def check_cell(checks: dict[str, str]) -> str:
    if "exporter" in checks:
        return "no export"
    wrong = [name for name in CHECKS if checks[name] != "yes"]
    return f"not {', '.join(wrong)}" if wrong else "all"


if __name__ == "__main__":
    main()
