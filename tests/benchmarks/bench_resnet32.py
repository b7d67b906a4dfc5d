"""How many residual blocks of a trained ResNet-32 can one convolution each stand for?

    python tests/benchmarks/bench_resnet32.py            # 2, 3, 4, 6, 8 and 15 of 15 blocks: some ten minutes
    python tests/benchmarks/bench_resnet32.py --quick    # 2 blocks, few images

3,000 training images without labels are the calibration, 5,000 test images give the accuracy, nothing is
trained. The drop is in points (hundredths), with the 95% interval of a paired bootstrap over the test
images and McNemar's p; `mark` is the drop allowed, `known` the drop that a shared-order prototype had
(ranking by output change, sequential fit, downstream refit).

Latency is the median ratio to the original with its 95% interval, all networks interleaved in
one run, one thread. `x plain` is the whole compress, checks and its own latency measurement included, as
a multiple of plain inference over the calibration images with the same threads.
"""

import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
from common import machine, normalised_cifar, parser, passed, seconds, shared, table, write_json

import onnxfuse
from onnxfuse.analysis.cost import measure
from onnxfuse.data.calibration import BatchStream, Calibration
from onnxfuse.ir.model import Model
from onnxfuse.numerics.significance import paired_difference
from onnxfuse.runtime.latency import Latency, latency
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import evaluate, top1

MARKS = {2: 0.5, 3: 1.0, 4: 1.5, 6: 4.0, 8: 5.5, 15: 20.0}
"""Blocks fused: points of accuracy that may be lost."""

KNOWN = {2: 82.9 - 83.0, 3: 82.9 - 82.3, 4: 82.9 - 81.7, 6: 82.9 - 79.4, 8: 82.9 - 77.9, 15: 82.9 - 64.3}
"""Points that the prototype lost."""

TIMED_THREADS = 1


@dataclass(frozen=True)
class Row:
    """One number of blocks: accuracy, drop and its interval are in points."""

    asked: int
    fused: int
    refitted: int
    accuracy: float
    drop: float
    low: float
    high: float
    p_value: float
    mark: float
    known: float
    output_error: float
    macs: float
    seconds: float
    plain: float
    latency_1: tuple[float, float, float] = (0.0, 0.0, 0.0)
    latency_64: tuple[float, float, float] = (0.0, 0.0, 0.0)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", type=int, nargs="+", choices=sorted(MARKS), metavar="Q")
    options = arguments.parse_args()
    images, tests, timed = (300, 500, 2.0) if options.quick else (3000, 5000, 20.0)
    blocks = options.blocks or ([2] if options.quick else sorted(MARKS))
    original = Model.load(shared() / "models" / "cifar_resnet32.onnx")
    runtime = Runtime("cpu", options.threads)
    name = original.inputs[0].name
    calibration = {name: normalised_cifar("train", images)[0]}
    inputs, labels = normalised_cifar("test", tests)
    test = Calibration.open({name: inputs, "labels": labels}, original, held_out=0.0).fit
    before = evaluate(runtime.session(original), test, top1)
    plain = plain_seconds(original, calibration, runtime)
    print(machine(options.threads))
    print(f"{images:,} calibration and {tests:,} test images; original: accuracy {before.mean():.2%},")
    print(f"plain inference over the calibration images {plain:.2f} s")
    rows, models = [], []
    for q in blocks:
        row, model = compress(original, q, calibration, test, before, plain, runtime)
        rows.append(row)
        models.append(model)
        print(f"  {q} blocks: accuracy {row.accuracy:.2f}, {row.seconds:.1f} s", flush=True)
    timings = [
        latency(
            [original, *models],
            Runtime("cpu", TIMED_THREADS),
            {name: np.ascontiguousarray(inputs[:size])},
            seconds=timed * len(models),
        )
        for size in (1, 64)
    ]
    rows = [with_latency(row, index, *timings) for index, row in enumerate(rows, start=1)]
    show(rows)
    write_json(
        options.json,
        {
            "machine": machine(options.threads),
            "images": images,
            "tests": tests,
            "accuracy": float(before.mean()),
            "plain_seconds": plain,
            "latency_threads": TIMED_THREADS,
            "rounds": [timing.rounds for timing in timings],
            "rows": [asdict(row) for row in rows],
        },
    )


def plain_seconds(model: Model, calibration: dict[str, np.ndarray], runtime: Runtime) -> float:
    """The original over all calibration images in batches of 64: the median of five runs after one."""
    session = runtime.session(model)
    batches = Calibration.open(calibration, model, held_out=0.0).fit
    times = [seconds(lambda: [session.run(batch.feed) for batch in batches]) for _ in range(6)]
    return statistics.median(times[1:])


def compress(
    original: Model,
    q: int,
    calibration: dict[str, np.ndarray],
    test: BatchStream,
    before: np.ndarray,
    plain: float,
    runtime: Runtime,
) -> tuple[Row, Model]:
    """Fuse `q` blocks and score the result."""
    start = time.perf_counter()
    result = onnxfuse.compress(
        original,
        f"fuse:max_blocks={q},max_ops=2",
        calib=calibration,
        provider="cpu",
        threads=runtime.threads,
    )
    took = time.perf_counter() - start
    if not result.ok:
        raise SystemExit(f"compress failed: {result.reason}")
    scores = paired_difference(before, evaluate(runtime.session(result.model), test, top1))
    changes = result.steps[0].changes
    fused = sum("region" in change.detail for change in changes)
    sample = {original.inputs[0].name: next(iter(test)).feed[original.inputs[0].name][:1]}
    macs = [measure(model, sample, Runtime("cpu")).macs or 0 for model in (original, result.model)]
    error = result.report.output_error
    row = Row(
        asked=q,
        fused=fused,
        refitted=len(changes) - fused,
        accuracy=100 * scores.after,
        drop=-100 * scores.difference,
        low=-100 * scores.high,
        high=-100 * scores.low,
        p_value=1.0 if scores.p_value is None else scores.p_value,
        mark=MARKS[q],
        known=KNOWN[q],
        output_error=float("nan") if error is None else error.worst,
        macs=macs[1] / macs[0],
        seconds=took,
        plain=took / plain,
    )
    return row, result.model


def with_latency(row: Row, index: int, single: Latency, many: Latency) -> Row:
    one, batch = (
        (timing.ratio, timing.ratio_low, timing.ratio_high)
        for timing in (single.timings[index], many.timings[index])
    )
    return Row(**{**asdict(row), "latency_1": one, "latency_64": batch})


def show(rows: list[Row]) -> None:
    print()
    table(
        ("blocks", "accuracy", "drop", "95% interval", "p", "mark", "within", "known"),
        [
            (
                row.fused if row.fused == row.asked else f"{row.fused} of {row.asked}",
                f"{row.accuracy:.2f}",
                f"{row.drop:.2f}",
                f"{row.low:.2f} to {row.high:.2f}",
                f"{row.p_value:.2g}",
                f"{row.mark:.1f}",
                passed(row.drop, row.mark),
                f"{row.known:.1f}",
            )
            for row in rows
        ],
    )
    print()
    table(
        ("blocks", "latency, batch 1", "latency, batch 64", "MACs", "error", "seconds", "x plain"),
        [
            (
                row.fused,
                "{:.3f} ({:.3f}-{:.3f})".format(*row.latency_1),
                "{:.3f} ({:.3f}-{:.3f})".format(*row.latency_64),
                f"{row.macs:.3f}",
                f"{row.output_error:.3f}",
                f"{row.seconds:.1f}",
                f"{row.plain:.1f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
