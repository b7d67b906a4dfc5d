"""Is the interval of a latency right? Equal measurements, each in a process of its own.

    python tests/benchmarks/bench_latency.py              # on an idle machine, some four minutes
    python tests/benchmarks/bench_latency.py --loaded     # the same beside a busy process on each core
    ONNXFUSE_SHARED=FOLDER python tests/benchmarks/bench_latency.py --model cifar_resnet32

Three pairs of networks: a shipped one against itself; against itself with a quarter of its channels cut; a
chain of dense layers against one that is 24/19 = 1.26 times as long. `--model` takes a real network against
itself, and with a quarter cut, instead. Each run measures as `compress` does.

- covered: runs whose 95% interval holds the long-run ratio, the geometric mean over all runs (against itself:
  1). Mark: 36 of 40.
- false: runs that say "slower" or "faster" (the interval leaves out all within 1% of 1) where the long-run
  ratio does not, or says the contrary. A run that calls itself unstable says nothing. Mark: none the wrong
  way round.
- unstable: runs that say so.
- had a core: share of the time that the timed thread had one; how busy the machine was.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import machine, parser, shared, table, write_json
from onnx import TensorProto, helper, numpy_helper, save

import onnxfuse
from onnxfuse.data.calibration import Calibration
from onnxfuse.data.rows import few_rows
from onnxfuse.runtime.latency import SAME, Timing, latency
from onnxfuse.runtime.providers import available_cores
from onnxfuse.runtime.session import Runtime

SHIPPED = Path(__file__).parents[2] / "models" / "digits_resnet.onnx"
RUNS, QUICK_RUNS, SHARE = 40, 3, 0.9
WIDTH, ROWS, SHORT, LONG = 256, 16, 19, 24


@dataclass(frozen=True)
class Pair:
    """Two files; `ratio` of their latencies, if it is known."""

    name: str
    a: Path
    b: Path
    ratio: float | None = None


@dataclass(frozen=True)
class Run:
    """One measurement of one pair."""

    before: Timing
    after: Timing
    control: tuple[float, float]
    unstable: str | None
    cpu_share: float
    seconds: float


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--loaded", action="store_true", help="beside a busy process on each core")
    arguments.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"default {RUNS}")
    arguments.add_argument("--model", metavar="NAME", help="of ONNXFUSE_SHARED's models")
    options = arguments.parse_args()
    count = QUICK_RUNS if options.quick else options.runs
    threads = options.threads or 1
    state = f"beside {available_cores()} busy processes" if options.loaded else "nothing started beside it"
    print(f"{machine(threads)}\n{count} runs, {state}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = pairs_in(Path(folder), options.model)
        with busy(available_cores() if options.loaded else 0):
            runs = measured(pairs, count, threads)
    good = show(pairs, runs)
    found = [
        {"name": pair.name, "runs": [asdict(run) for run in own]}
        for pair, own in zip(pairs, runs, strict=True)
    ]
    write_json(options.json, {"machine": machine(threads), "loaded": options.loaded, "pairs": found})
    sys.exit(0 if good else 1)


# --- networks -----------------------------------------------------------------------------------------------


def pairs_in(folder: Path, name: str | None) -> list[Pair]:
    """The pairs; what has to be made for them is written to `folder`."""
    path = SHIPPED if name is None else shared() / "models" / f"{name}.onnx"
    result = onnxfuse.compress(path, "select:ratio=0.25,compensate=false", provider="cpu")
    if not result:
        sys.exit(f"{path}: {result.reason}")
    narrow = folder / "narrow.onnx"
    onnxfuse.save(result.model, narrow)
    found = [Pair(f"{path.stem}, itself", path, path, 1.0), Pair(f"{path.stem}, a quarter cut", path, narrow)]
    if name is None:
        short, long = chain(SHORT, folder), chain(LONG, folder)
        found.append(Pair(f"{SHORT} layers, {LONG} layers", short, long))
    return found


def chain(length: int, folder: Path) -> Path:
    """A file with so many dense layers that share a weight."""
    names = ["x", *(f"h{i}" for i in range(length - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, WIDTH]) for name in "xy")
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    graph = helper.make_graph(
        nodes, "chain", [x], [y], [numpy_helper.from_array(weight.astype(np.float32), "w")]
    )
    path = folder / f"{length}.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# --- runs ---------------------------------------------------------------------------------------------------


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that use a core each, as far as they get one."""
    workers = [multiprocessing.get_context("spawn").Process(target=toil, daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def toil() -> None:
    """Sort and add up, forever: caches are used, too."""
    values = np.random.default_rng(0).standard_normal(2**18)
    while True:
        np.sort(values).sum()


def measured(pairs: Sequence[Pair], count: int, threads: int) -> list[list[Run]]:
    """The runs of each pair, the pairs by turns, every round of them in a new process."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rounds = []
        with suppress(KeyboardInterrupt):  # the table is of the rounds that there are
            for found in pool.imap(measure, [(pairs, threads)] * count):
                rounds.append(found)
                said = ", ".join(f"{run.after.ratio:.3f}" for run in found)
                print(f"  {len(rounds)}: {said}", flush=True)
    return [list(own) for own in zip(*rounds, strict=True)]


def measure(task: tuple[Sequence[Pair], int]) -> list[Run]:
    """One run of each pair."""
    pairs, threads = task
    found = []
    for pair in pairs:
        a, b = onnxfuse.load(pair.a), onnxfuse.load(pair.b)
        runtime = Runtime("cpu", threads)
        feed = few_rows(a, Calibration.open(None, a, limit=2, held_out=0.0, seed=0).fit, 1, runtime)
        start = time.perf_counter()
        timed = latency([a, b], runtime, feed)
        took = time.perf_counter() - start
        control = (timed.control.low, timed.control.high)
        share = 1.0 if timed.cpu_share is None else timed.cpu_share
        found.append(Run(*timed.timings, control, timed.unstable, share, took))
    return found


# --- verdicts -----------------------------------------------------------------------------------------------


def side(low: float, high: float) -> int:
    """1 for slower, -1 for faster, 0 for neither."""
    return int(low > 1 + SAME) - int(high < 1 - SAME)


def show(pairs: Sequence[Pair], runs: Sequence[Sequence[Run]]) -> bool:
    """Print the table; whether the marks are met."""
    rows, good = [], True
    for pair, own in zip(pairs, runs, strict=True):
        logs = np.log([run.after.ratio for run in own])
        long_run = pair.ratio or float(np.exp(logs.mean()))
        covered = sum(run.after.ratio_low <= long_run <= run.after.ratio_high for run in own)
        said = [side(run.after.ratio_low, run.after.ratio_high) for run in own if run.unstable is None]
        truth = side(long_run, long_run)
        contrary = sum(verdict == -truth != 0 for verdict in said)
        false = sum(verdict not in (0, truth) for verdict in said)
        good &= covered >= SHARE * len(own) and not contrary
        rows.append(
            (
                pair.name,
                f"{np.median([run.before.median_ms for run in own]):.4g}",
                f"{long_run:.3f}",
                f"{np.exp(logs.min()):.3f}-{np.exp(logs.max()):.3f}",
                f"{np.median([run.after.ratio_high / run.after.ratio_low - 1 for run in own]) / 2:.1%}",
                f"{covered}/{len(own)}",
                false,
                sum(run.unstable is not None for run in own),
                f"{np.mean([run.cpu_share for run in own]):.0%}",
                f"{np.mean([run.seconds for run in own]):.1f}",
            )
        )
    print()
    header = ("pair", "ms", "ratio", "of runs", "+-", "covered", "false", "unstable", "had a core", "s")
    table(header, rows)
    print(f"\nmarks: {'met' if good else 'NOT met'}")
    return good


if __name__ == "__main__":
    main()
