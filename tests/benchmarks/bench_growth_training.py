"""Growing a trained network, in small: the experiment of Painter's section 6 on Fashion-MNIST.

    ONNXFUSE_SHARED=FOLDER python tests/benchmarks/bench_growth_training.py [--plot FILE.png]

A teacher, a residual network with BatchNormalization, is trained; then students are made from it, wider or
deeper, by every scheme, by random padding (new weights at random: the function is lost), and from scratch
(the wider or deeper network from random weights). All students train alike, three seeds. Told is the
validation accuracy after every epoch, against epochs and against multiply-accumulates (three times those of
inference a training step; the teacher's are not counted), and how many of these a student needs to be where
one from scratch ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx.parser
import torch
from common import fashion_mnist, fill, machine, number, parser, table, write_json
from onnx import numpy_helper

from onnxfuse.analysis.cost import measure
from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Model
from onnxfuse.numerics.random_weights import deviation_of, uniform
from onnxfuse.passes.deepen import Deepen
from onnxfuse.passes.widen import Widen
from onnxfuse.pipeline.base import Context, Pass
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.runtime.session import Runtime

WIDTH = 6
RATIO = 2.0
TEACHER = 3  # times as many epochs as a student: it is to be a trained network
BATCH = 128
RATE = 3e-3


@dataclass(frozen=True)
class Data:
    x: torch.Tensor
    y: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor


Student = Callable[[Model, Context, np.random.Generator], Model]


def main() -> int:
    options = _options()
    print(machine(), end="\n\n")
    torch.set_num_threads(2)
    data = _data(*((1000, 500) if options.quick else (8_000, 5_000)))
    epochs, seeds = (1, 1) if options.quick else (options.epochs, 3)
    start = time.perf_counter()
    runs: dict[str, list[dict[str, object]]] = {}
    for seed in range(seeds):
        teacher, curve = _trained(_network(seed), data, TEACHER * epochs, seed)
        runs.setdefault("teacher", []).append({"curve": curve, "macs": _macs(teacher)})
        for name, student in STUDENTS.items():
            made = student(teacher, _context(teacher, data, seed), np.random.default_rng(seed))
            _, curve = _trained(made, data, epochs, seed + 100)
            runs.setdefault(name, []).append({"curve": curve, "macs": _macs(made)})
            print(f"seed {seed}, {name}: {' '.join(f'{a:.3f}' for a in curve)}", flush=True)
    _report(runs, epochs, len(data.x))
    print(f"\n{time.perf_counter() - start:.0f} seconds")
    write_json(options.json, runs)
    if options.plot is not None:
        _plot(runs, options.plot, len(data.x))
    return 0


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--epochs", type=int, default=5, metavar="N")
    made.add_argument("--plot", type=Path, metavar="FILE", help="curves, as a picture (needs matplotlib)")
    return made.parse_args()


def _data(count: int, validation: int) -> Data:
    (x, y), (x_val, y_val) = fashion_mnist("train"), fashion_mnist("test")
    parts = [(x[:count] - 0.286) / 0.353, y[:count], (x_val[:validation] - 0.286) / 0.353, y_val[:validation]]
    return Data(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


# The network ----------------------------------------------------------------------------------------


def _network(seed: int) -> Model:
    """Stem, two residual blocks at two resolutions, mean, classifier, from random weights."""
    w = WIDTH
    shapes = {"k0": (w, 1, 3, 3), "k1": (w, w, 3, 3), "k2": (w, w, 3, 3), "k3": (2 * w, w, 3, 3)}
    shapes |= {"k4": (2 * w, 2 * w, 3, 3), "k5": (2 * w, 2 * w, 3, 3), "wy": (10, 2 * w), "by": (10,)}
    body = f"""{_conv("r0", "x", 0, 2)} {_block("1", "r0", 1)}
        {_conv("r3", "s1", 3, 2)} {_block("2", "r3", 4)}
        g = GlobalAveragePool(s2) f = Flatten(g) y = Gemm<transB=1>(f, wy, by)"""
    for index in range(6):
        shapes |= {f"{part}{index}": shapes[f"k{index}"][:1] for part in "abmv"}
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,1,28,28] x) => (float[N,10] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(seed)
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array(_fresh(name, shape, random), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return Model.load(proto)


def _fresh(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """He-initialised kernels, identity normalisation, no bias."""
    part = name.rsplit(".", 1)[-1][0]
    if part in "kw":
        return random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
    return np.full(shape, 1.0 if part in "av" else 0.0, np.float32)


def _conv(out: str, x: str, index: int, stride: int = 1, relu: str = "Relu") -> str:
    head = f"c{index} = Conv<pads=[1,1,1,1], strides=[{stride},{stride}]>({x}, k{index})"
    norm = f"BatchNormalization(c{index}, a{index}, b{index}, m{index}, v{index})"
    return f"{head} n{index} = {norm} {out} = {relu}(n{index})" if relu else f"{head} {out} = {norm}"


def _block(name: str, x: str, index: int) -> str:
    return f"""{_conv(f"r{name}", x, index)} {_conv(f"n{index + 1}", f"r{name}", index + 1, relu="")}
        t{name} = Add(n{index + 1}, {x}) s{name} = Relu(t{name})"""


# Students -------------------------------------------------------------------------------------------


def _grown(*passes: Pass) -> Student:
    def student(teacher: Model, context: Context, random: np.random.Generator) -> Model:
        outcome = PassManager(list(passes)).run(teacher, context)
        for step in outcome.steps:
            if not step.committed or not step.changes:
                sys.exit(f"{step.name}: {step.reason or step.notes}")
        return outcome.model

    return student


def _padded(grown: Student) -> Student:
    """New kernels at random, what reads them too: a scheme that preserves nothing."""

    def student(teacher: Model, context: Context, random: np.random.Generator) -> Model:
        made = grown(teacher, context, random)
        old = {t.name: teacher.weight(t) for t in teacher.initializers}
        for tensor in made.initializers:
            value = made.weight(tensor, writable=True)
            assert value is not None
            before = old.get(tensor.name)
            if value.ndim > 1 and (before is None or before.shape != value.shape):
                source = value if before is None else before
                deviation = deviation_of(source) or float(np.sqrt(2 / np.prod(value.shape[1:])))
                drawn = uniform(random, value.shape, deviation).astype(value.dtype)
                if before is not None:
                    drawn[tuple(map(slice, before.shape))] = before
                made.set_weight(tensor, drawn)
            elif before is None:
                made.set_weight(tensor, _fresh(tensor.name, value.shape, random))
        return made

    return student


def _scratch(grown: Student) -> Student:
    def student(teacher: Model, context: Context, random: np.random.Generator) -> Model:
        made = grown(teacher, context, random)
        for tensor in made.initializers:
            value = made.weight(tensor)
            assert value is not None
            made.set_weight(tensor, _fresh(tensor.name, value.shape, random))
        return made

    return student


_WIDE = {s: _grown(Widen(sites={"all": RATIO}, scheme=s)) for s in ("r2r", "net2net", "netmorph")}
_COPY = _grown(Deepen(sites={"all": 1}))
STUDENTS: dict[str, Student] = {
    **{f"wider, {scheme}": student for scheme, student in _WIDE.items()},
    "wider, random padding": _padded(_WIDE["netmorph"]),
    "wider, scratch": _scratch(_WIDE["netmorph"]),
    "deeper, r2r copy of block": _COPY,
    "deeper, r2r branch": _grown(Deepen(sites={"c[14]": 1})),
    "deeper, net2net": _grown(Deepen(sites={"c[14]": 2}, scheme="net2net")),
    "deeper, random padding": _padded(_COPY),
    "deeper, scratch": _scratch(_COPY),
}


def _context(model: Model, data: Data, seed: int) -> Context:
    calibration = Calibration.open({"x": data.x[:256].numpy()}, model, held_out=0.25)
    return Context(model, calibration, Runtime("cpu"), seed)


def _macs(model: Model) -> int:
    found = measure(model, {"x": np.zeros((1, 1, 28, 28), np.float32)}, Runtime("cpu")).macs
    assert found is not None
    return found


# Training -------------------------------------------------------------------------------------------


def _trained(model: Model, data: Data, epochs: int, seed: int) -> tuple[Model, list[float]]:
    """The model after training, and its validation accuracy before and after every epoch."""
    from onnxfuse.pytorch.bridge.writeback import from_torch

    torch.manual_seed(seed)
    module = to_torch(model)
    optimizer = torch.optim.Adam(module.parameters(), RATE)
    steps = epochs * -(-len(data.x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve = [_accuracy(module, data)]
    for _ in range(epochs):
        module.train()
        for rows in torch.randperm(len(data.x)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
            schedule.step()
        curve.append(_accuracy(module, data))
    return from_torch(module.eval(), model), curve


def _accuracy(module: torch.nn.Module, data: Data) -> float:
    module.eval()
    with torch.no_grad():
        found = torch.cat([module(x).argmax(1) for x in data.x_val.split(1000)])
    return float((found == data.y_val).float().mean())


# Telling --------------------------------------------------------------------------------------------


def _curves(runs: dict[str, list[dict[str, object]]], name: str) -> np.ndarray:
    return np.array([run["curve"] for run in runs[name]])


def _report(runs: dict[str, list[dict[str, object]]], epochs: int, images: int) -> None:
    print()
    rows = []
    for name, own in runs.items():
        curves = _curves(runs, name)
        step = 3 * int(str(own[0]["macs"])) * images
        goal = _curves(runs, f"{name.split(',')[0]}, scratch")[:, -1].mean() if "," in name else 2.0
        reached = np.flatnonzero(curves.mean(0) >= goal)
        final = f"{100 * curves[:, -1].mean():.1f} +- {100 * curves[:, -1].std(ddof=len(curves) > 1):.1f}"
        start, first = 100 * curves[:, 0].mean(), 100 * curves[:, 1].mean()
        cost = number(step * int(reached[0])) if len(reached) else "-"
        rows.append((name, number(step), f"{start:.1f}", f"{first:.1f}", final, cost))
    header = (
        "validation accuracy, %",
        "MACs an epoch",
        "before",
        "epoch 1",
        f"epoch {epochs}",
        "MACs to scratch's end",
    )
    table(header, rows)
    print(
        fill(
            "before: before any training of the student; the last column: until the mean accuracy is that "
            "of the network from scratch after its last epoch."
        )
    )


def _plot(runs: dict[str, list[dict[str, object]]], path: Path, images: int) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharey=True)
    for row, form in enumerate(("wider", "deeper")):
        for name in (n for n in runs if n.startswith(form)):
            mean = _curves(runs, name).mean(0)
            epochs = np.arange(len(mean))
            flops = 3 * int(str(runs[name][0]["macs"])) * images * epochs
            for axis, at in zip(axes[row], (epochs, flops), strict=True):
                axis.plot(at, mean, label=name, marker=".")
        axes[row][0].set(xlabel="epochs", ylabel="validation accuracy")
        axes[row][1].set(xlabel="multiply-accumulates of training")
        axes[row][1].legend(fontsize=8)
    axes[0][0].set_ylim(0.5, None)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
