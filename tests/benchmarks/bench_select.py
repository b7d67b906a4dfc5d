"""Accuracy without any training against MACs and latency: `select`, beside other pruners on the same
networks.

    python tests/benchmarks/bench_select.py                          # five networks: some forty minutes
    python tests/benchmarks/bench_select.py --only resnet32 --criteria    # and each criterion by itself
    python tests/benchmarks/bench_select.py --only resnet32 --fuse   # select and fuse together

3,000 unlabelled images are the calibration, images that nobody has seen give the accuracy. The rivals have an
environment of their own (`rivals_pruning.py`); `--rivals FOLDER` takes what that script wrote to
FOLDER/MODEL-*, given what `--data FOLDER` wrote there as its DATA.

Drops are in points (hundredths), with the 95% interval of a paired bootstrap over the test images. `ahead`
is how far the best rival at the same budget lies behind, paired alike. Latency is the median ratio to the
original with its 95% interval, all networks interleaved, one thread. `x plain` is the whole compress,
checks and its own latency measurement included, as a multiple of plain inference over the calibration
images; memory is the peak of a process that does nothing else.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import rivals_pruning
from common import (
    MB,
    SVHN_MEAN,
    SVHN_STD,
    cifar,
    machine,
    mnist,
    mnist_as_svhn,
    normalise,
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
from onnxfuse.analysis.cost import measure
from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import OnnxfuseError
from onnxfuse.ir.model import Model
from onnxfuse.numerics.significance import PairedDifference, paired_difference
from onnxfuse.runtime.latency import Timing, latency
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import evaluate, top1

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Calibration images and labels, test images and labels."""

BUDGETS = (0.9, 0.8, 0.7, 0.5)
MARKS = {0.9: 0.5, 0.8: 2.0, 0.7: 2.5, 0.5: 5.0}
"""Points that ResNet-32 may lose at each share of its MACs."""

CRITERIA = (
    "criterion=magnitude,compensate=false",
    "criterion=magnitude",
    "criterion=moments,compensate=false",
)
FUSED = (
    "select:macs={0}",
    "select:macs=0.9,fuse:max_blocks=4,max_ops=2",
    "fuse:max_blocks=4,max_ops=2,select:macs={0}",
)
CALIBRATION = 3000


def _resnet() -> Split:
    return (*normalised_cifar("train", CALIBRATION), *normalised_cifar("test", 5000))


def _raw() -> Split:
    return (*cifar("train", CALIBRATION), *cifar("test", 5000))


def _digits() -> Split:
    images, labels = mnist(5000)
    images = normalise(images, (0.1307,), (0.3081,))
    return images[:CALIBRATION], labels[:CALIBRATION], images[CALIBRATION:], labels[CALIBRATION:]


def _enlarged() -> Split:
    images, labels = mnist_as_svhn(5000)
    images = normalise(images, SVHN_MEAN, SVHN_STD)
    return images[:CALIBRATION], labels[:CALIBRATION], images[CALIBRATION:], labels[CALIBRATION:]


NETWORKS: Mapping[str, Callable[[], Split]] = {
    "cifar_resnet20": _resnet,
    "cifar_resnet32": _resnet,
    "cifar_10_model": _raw,
    "ccexam_mnist": _digits,
    "ccexam_svhn": _enlarged,
}


@dataclass
class Entry:
    """One pruned network. Accuracy and drop are in points; `macs` is the share that is left."""

    who: str
    budget: float
    macs: float
    accuracy: float
    drop: tuple[float, float, float]
    seconds: float
    latency_1: tuple[float, float, float] = (0.0, 0.0, 0.0)
    latency_64: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass
class Network:
    """One original, what it is judged on, and everything that was made of it."""

    name: str
    original: Model
    images: np.ndarray
    tests: np.ndarray
    labels: np.ndarray
    runtime: Runtime

    def __post_init__(self) -> None:
        self.input = self.original.inputs[0].name
        self.test = Calibration.open(
            {self.input: self.tests, "labels": self.labels}, self.original, held_out=0.0
        ).fit
        self.before = self.scores(self.original)
        batches = Calibration.open({self.input: self.images}, self.original, held_out=0.0).fit
        session = self.runtime.session(self.original)
        self.plain = min(seconds(lambda: [session.run(b.feed) for b in batches]) for _ in range(3))

    def scores(self, model: Model) -> np.ndarray:
        return evaluate(self.runtime.session(model), self.test, top1)

    def macs(self, model: Model) -> float:
        sample = {self.input: self.tests[:1]}
        return (measure(model, sample, Runtime("cpu")).macs or 0) / (
            measure(self.original, sample, Runtime("cpu")).macs or 1
        )

    def entry(self, who: str, budget: float, model: Model, took: float) -> tuple[Entry, np.ndarray]:
        scores = self.scores(model)
        change = paired_difference(self.before, scores)
        return Entry(who, budget, self.macs(model), 100 * change.after, _points(change, -1), took), scores

    def timed(self, models: Sequence[Model], batch: int, budget: float) -> list[Timing]:
        feed = {self.input: np.ascontiguousarray(self.tests[:batch])}
        found = latency([self.original, *models], Runtime("cpu", 1), feed, seconds=budget)
        return list(found.timings[1:])


def _points(change: PairedDifference, sign: int) -> tuple[float, float, float]:
    low, high = sorted((sign * 100 * change.low, sign * 100 * change.high))
    return sign * 100 * change.difference, low, high


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="TEXT", default="", help="networks whose names contain this")
    arguments.add_argument("--rivals", type=Path, metavar="FOLDER", help="what rivals_pruning.py made")
    arguments.add_argument("--data", type=Path, metavar="FOLDER", help="only write rivals_pruning.py's DATA")
    arguments.add_argument("--criteria", action="store_true", help="each criterion by itself, too")
    arguments.add_argument("--fuse", action="store_true", help="select and fuse together")
    options = arguments.parse_args()
    names = [name for name in NETWORKS if options.only in name]
    if options.data is not None:
        for name in names:
            images, labels, *_ = NETWORKS[name]()
            model = Model.load(shared() / "models" / f"{name}.onnx")
            np.savez(options.data / f"{name}.npz", **{model.inputs[0].name: images, "labels": labels})
        return
    print(machine(options.threads), flush=True)
    found = {name: network(name, options) for name in names}
    write_json(options.json, {"machine": machine(options.threads), "networks": found})


def network(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """All about one network, printed on the way."""
    images, _, tests, labels = NETWORKS[name]()
    if options.quick:
        images, tests, labels = images[:300], tests[:500], labels[:500]
    original = Model.load(shared() / "models" / f"{name}.onnx")
    net = Network(name, original, images, tests, labels, Runtime("cpu", options.threads))
    print(f"\n{name}: accuracy {net.before.mean():.2%}, plain inference {net.plain:.2f} s", flush=True)
    made: list[tuple[Entry, np.ndarray, Model]] = []
    recipes = FUSED if options.fuse else ("select:macs={0}",)
    if options.criteria:
        recipes = (*recipes, *(f"select:macs={{0}},{text}" for text in CRITERIA))
    for recipe in recipes:
        for budget in BUDGETS[:1] if options.quick else BUDGETS:
            if "{0}" not in recipe and budget != BUDGETS[0]:
                continue
            start = time.perf_counter()
            result = compress(
                original,
                recipe.format(budget),
                calib={net.input: images},
                provider="cpu",
                threads=options.threads,
            )
            took = time.perf_counter() - start
            if not result.ok:
                print(f"  {recipe.format(budget)}: {result.reason}", flush=True)
                continue
            entry, scores = net.entry(recipe.format(budget), budget, result.model, took)
            made.append((entry, scores, result.model))
            print(f"  {entry.who}: {entry.accuracy:.2f}, {took:.1f} s", flush=True)
    for entry, scores, model in rivals(net, options.rivals):
        made.append((entry, scores, model))
    if not made:
        return []
    for batch in (1, 64):
        timings = net.timed([model for *_, model in made], batch, 1.0 * len(made))
        for (entry, *_), timing in zip(made, timings, strict=True):
            setattr(entry, f"latency_{batch}", (timing.ratio, timing.ratio_low, timing.ratio_high))
    show(net, made)
    if not options.quick:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held = pool.apply(peak, (name, "select:macs=0.7", options.threads))
        print(f"  memory of compress at 0.7: {held / MB:.0f} MB", flush=True)
    return [asdict(entry) for entry, *_ in made]


def rivals(net: Network, folder: Path | None) -> list[tuple[Entry, np.ndarray, Model]]:
    """What others made of the network; failures are printed."""
    found = []
    for place in sorted(folder.glob(f"*{net.name}*")) if folder is not None else ():
        if not (place / rivals_pruning.RECORD).exists():
            continue
        for outcome in rivals_pruning.read(place):
            who = f"{outcome.tool} {outcome.criterion}"
            if outcome.file is None:
                print(f"  {who} at {outcome.target:g}: {outcome.failure}"[:160], flush=True)
                continue
            try:
                model = Model.load(place / outcome.file)
                found.append((*net.entry(who, outcome.target, model, outcome.seconds or 0.0), model))
            except OnnxfuseError as error:
                print(f"  {who} at {outcome.target:g}: {error}", flush=True)
    return found


def show(net: Network, made: Sequence[tuple[Entry, np.ndarray, Model]]) -> None:
    ours = [item for item in made if item[0].who.startswith(("select", "fuse"))]
    others = [item for item in made if not item[0].who.startswith(("select", "fuse"))]
    print()
    table(
        ("budget", "MACs", "accuracy", "drop (95%)", "mark", "best rival", "ahead (95%)"),
        [
            (
                f"{e.budget:g}",
                f"{e.macs:.3f}",
                f"{e.accuracy:.2f}",
                _interval(e.drop),
                _mark(net, e),
                *_ahead(e, s, others),
            )
            for e, s, _ in ours
            if e.who == f"select:macs={e.budget:g}"
        ],
    )
    print()
    table(
        ("network", "budget", "MACs", "accuracy", "latency, batch 1", "batch 64", "s"),
        [
            (
                e.who.replace("select:", "").replace("criterion=", "")[:44],
                f"{e.budget:g}",
                f"{e.macs:.2f}",
                f"{e.accuracy:.1f}",
                "{:.2f} ({:.2f}-{:.2f})".format(*e.latency_1),
                "{:.2f}".format(*e.latency_64),
                f"{e.seconds:.0f}",
            )
            for e, *_ in made
        ],
    )
    times = [e.seconds / net.plain for e, *_ in ours if e.who == f"select:macs={e.budget:g}"]
    print(f"  x plain: {', '.join(f'{value:.0f}' for value in times)}", flush=True)


def _interval(values: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def _mark(net: Network, entry: Entry) -> str:
    if net.name != "cifar_resnet32":
        return ""
    return f"{MARKS[entry.budget]:g}: {passed(entry.drop[0], MARKS[entry.budget])}"


def _ahead(
    entry: Entry, scores: np.ndarray, others: Sequence[tuple[Entry, np.ndarray, Model]]
) -> tuple[str, str]:
    """The best of the others with about the same share of MACs, and how far it lies behind."""
    near = [item for item in others if item[0].budget == entry.budget]
    if not near:
        return "", ""
    best, theirs, _ = max(near, key=lambda item: item[0].accuracy)
    change = paired_difference(theirs, scores)
    return f"{best.accuracy:.2f} {best.who}", _interval(_points(change, 1))


def peak(name: str, passes: str, threads: int | None) -> int:
    """Bytes at most, in a process that has done nothing before."""
    images = NETWORKS[name]()[0]
    model = Model.load(shared() / "models" / f"{name}.onnx")
    before = peak_memory()
    compress(model, passes, calib={model.inputs[0].name: images}, provider="cpu", threads=threads)
    return peak_memory() - before + images.nbytes


if __name__ == "__main__":
    main()
