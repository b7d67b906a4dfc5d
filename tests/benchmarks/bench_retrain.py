"""ResNet-32 with 8 of its 15 blocks fused, retrained from the original as teacher, without labels.

    python tests/benchmarks/bench_retrain.py            # three seeds, some half an hour on two cores
    python tests/benchmarks/bench_retrain.py --quick    # few images, one seed

10,000 training images without labels; the first 3,000 are the calibration of `fuse`. Rows:

- *fused*: what `fuse:max_blocks=8` leaves, not retrained.
- *fused, retrained*: two epochs from the original's logits.
- *fused, BatchNorm, retrained*: the `batchnorm` pass first (the file has its BatchNorms folded away).
- *random*: the same graph with He-normal weights, BatchNorm inserted, the same two epochs.
- *random, same budget*: as many epochs as fit into the seconds that fusing and retraining took together.

The learning rates (`RATES`) were chosen on 2,000 other training images; a random start wants a higher one.
Accuracy in per cent on 5,000 test images, by ONNX Runtime: mean, and deviation over the seeds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
from common import machine, normalised_cifar, parser, shared, table, write_json

import onnxfuse
from onnxfuse import compress
from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Model
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import evaluate, top1

BLOCKS, EPOCHS = 8, 2
RATES = {"plain": 1e-4, "normed": 3e-4, "random": 1e-3}


@dataclass
class Row:
    """One way to a network of this shape."""

    name: str
    epochs: float
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    options = parser(__doc__).parse_args()
    images, fitted, tests, seeds = (600, 300, 500, 1) if options.quick else (10_000, 3_000, 5_000, 3)
    runtime = Runtime("cpu", options.threads)
    original = Model.load(shared() / "models" / "cifar_resnet32.onnx")
    name = original.inputs[0].name
    x = normalised_cifar("train", images)[0]
    inputs, labels = normalised_cifar("test", tests)
    test = Calibration.open({name: inputs, "labels": labels}, original, held_out=0.0).fit

    def accuracy(model: Model) -> float:
        return 100 * float(evaluate(runtime.session(model), test, top1).mean())

    print(machine(options.threads))
    start = time.perf_counter()
    fused = compress(original, f"fuse:max_blocks={BLOCKS},max_ops=2", calib={name: x[:fitted]}).model
    fusing = time.perf_counter() - start
    normed = compress(fused, "batchnorm", calib={name: x[:fitted]}).model
    print(f"original {accuracy(original):.2f}; fused in {fusing:.0f} s: {accuracy(fused):.2f}", flush=True)

    def retrain(model: Model, kind: str, epochs: int, seed: int) -> Model:
        found = onnxfuse.retrain(
            model, {name: x}, teacher=original, epochs=epochs, lr=RATES[kind], held_out=0.1, seed=seed
        )
        return found.model

    rows = {
        "fused": Row("fused", 0, [accuracy(fused)], [fusing]),
        "plain": Row("fused, retrained", EPOCHS),
        "normed": Row("fused, BatchNorm, retrained", EPOCHS),
        "random": Row("random", EPOCHS),
        "budget": Row("random, same budget", 0),
    }
    for seed in range(seeds):
        took = run(rows["plain"], lambda s=seed: retrain(fused, "plain", EPOCHS, s), accuracy)
        run(rows["normed"], lambda s=seed: retrain(normed, "normed", EPOCHS, s), accuracy)
        fresh = reinitialised(normed, seed)
        alone = run(rows["random"], lambda s=seed, m=fresh: retrain(m, "random", EPOCHS, s), accuracy)
        epochs = max(EPOCHS, round((fusing + took) / (alone / EPOCHS)))
        rows["budget"].epochs = epochs
        run(rows["budget"], lambda s=seed, m=fresh, e=epochs: retrain(m, "random", e, s), accuracy)
    print()
    table(
        ("network", "epochs", "accuracy", "deviation", "seconds"),
        [
            (
                row.name,
                f"{row.epochs:g}",
                f"{statistics.mean(row.accuracies):.2f}",
                f"{statistics.stdev(row.accuracies):.2f}" if len(row.accuracies) > 1 else "-",
                f"{statistics.mean(row.seconds):.0f}",
            )
            for row in rows.values()
        ],
    )
    write_json(
        options.json,
        {
            "machine": machine(options.threads),
            "original": accuracy(original),
            "rows": [asdict(row) for row in rows.values()],
        },
    )


def run(row: Row, make: Callable[[], Model], accuracy: Callable[[Model], float]) -> float:
    """Make a network and score it; the seconds that making it took."""
    start = time.perf_counter()
    model = make()
    row.seconds.append(time.perf_counter() - start)
    row.accuracies.append(accuracy(model))
    print(f"  {row.name}: {row.accuracies[-1]:.2f} in {row.seconds[-1]:.0f} s", flush=True)
    return row.seconds[-1]


def reinitialised(model: Model, seed: int) -> Model:
    """The same graph as if it had never been trained: He-normal weights, zero biases, fresh BatchNorms."""
    random = np.random.default_rng(seed)
    result = model.copy()
    for node in result.nodes:
        if node.op in ("Conv", "Gemm"):
            weight = result.weight(node.inputs[1])
            fan_in = int(np.prod(weight.shape[1:]))
            new = random.standard_normal(weight.shape) * np.sqrt(2 / fan_in)
            result.set_weight(node.inputs[1], new.astype(weight.dtype))
            if len(node.inputs) > 2:
                result.set_weight(node.inputs[2], np.zeros_like(result.weight(node.inputs[2])))
        elif node.op == "BatchNormalization":
            for tensor, value in zip(node.inputs[1:], (1, 0, 0, 1), strict=True):
                result.set_weight(tensor, np.full_like(result.weight(tensor), value))
    return result


if __name__ == "__main__":
    main()
