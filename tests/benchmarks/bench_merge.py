"""Layers that share weights, and the comparators of the paper, at equal size on disk: Layer Fusion in small.

    ONNXFUSE_SHARED=FOLDER python tests/benchmarks/bench_merge.py --only resnet32 [--plot FILE.png]
    python tests/benchmarks/bench_merge.py --only lm        # the shipped model; see below
    ... --keep FOLDER             # every row as soon as it is there: a run that was stopped goes on
    ... --quick                                             # few samples, few settings

Two networks: ResNet-32 on CIFAR-10 (accuracy on 3,000 test images; calibration on 400 others, unlabelled)
and the shipped language model `models/tiny_lm.onnx` (perplexity of a character on its 600 test rows;
calibration and training on its training text, for which `models/tiny_lm.py` names the package). At 0.9, 0.75
and 0.5 of the parameters:

1. `merge` by every criterion and in every mode, without retraining; at 0.5 also as the paper has it (nothing
   aligned, nothing refitted).
2. The comparators at the same size: prune and cluster by their gzipped files, the others by their parameters.
3. Retrained on 2,000 samples with the original as teacher, two epochs in batches of 64: first all criteria
   and comparators at 0.5, then the best of each mode and the comparators at 0.9 and 0.75, then more seeds of
   what leads, and by turns (`exponential:steps=4`). The learning rate is one for all rows of a network; of
   1e-4, 3e-4, 1e-3 and 3e-3 (`--rates`) the best at which no seed fails.

Sizes are those of the gzipped files beside the gzipped original. Differences to the original come with 95 %
intervals from a paired bootstrap over the test samples; over seeds with the standard deviation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from common import machine, normalised_cifar, parser, shared, table, write_json

import onnxfuse
from onnxfuse.data.calibration import BatchStream, Calibration
from onnxfuse.errors import OnnxfuseError
from onnxfuse.ir.file_size import file_size
from onnxfuse.ir.model import Model
from onnxfuse.numerics.significance import paired_difference
from onnxfuse.numerics.similarity import CRITERIA
from onnxfuse.passes.autoencode import Autoencode
from onnxfuse.passes.cluster import Cluster
from onnxfuse.passes.lowrank import Lowrank
from onnxfuse.passes.merge import Merge
from onnxfuse.passes.prune import Prune
from onnxfuse.pipeline.base import Context, Pass
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.results import RetrainResult
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import Metric, evaluate, nll, top1

GOALS = (0.9, 0.75, 0.5)
MODES = ("fit", "mean", "freeze", "mix")
EPOCHS, SEEDS = 2, 3
SCHEDULE = "exponential:steps=4"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RETRAINED = ("output", "euclidean", "covariance", "kl", "wasserstein")
HEADLINERS = ("prune, global", "cluster, 256 values", "lowrank, data", "lowrank, svd", "autoencode")


@dataclass
class Task:
    """A network, its samples, and what its outputs are worth."""

    name: str
    unit: str
    model: Model
    calibration: dict[str, np.ndarray]
    training: dict[str, np.ndarray]
    test: BatchStream
    metric: Metric
    shown: Callable[[float], float]
    rate: float
    folder: Path | None = None
    before: np.ndarray = field(default_factory=lambda: np.empty(0))
    runtime: Runtime = field(default_factory=lambda: Runtime("cpu"))

    def scores(self, model: Model) -> np.ndarray:
        return evaluate(self.runtime.session(model), self.test, self.metric)

    def context(self, seed: int = 0) -> Context:
        calibration = Calibration.open(self.calibration, self.model, held_out=0.2, seed=seed)
        return Context(self.model, calibration, self.runtime, seed)


@dataclass
class Row:
    """One way to one size."""

    name: str
    goal: float
    score: float | None
    low: float
    high: float
    size: float
    seconds: float
    retrained: list[float] = field(default_factory=list)
    model: Model | None = None


def resnet32(quick: bool) -> Task:
    calibration, training, tests = (300, 300, 500) if quick else (400, 2_000, 3_000)
    model = Model.load(shared() / "models" / "cifar_resnet32.onnx")
    name = model.inputs[0].name
    x = normalised_cifar("train", calibration + training)[0]
    inputs, labels = normalised_cifar("test", tests)
    test = Calibration.open({name: inputs, "labels": labels}, model, held_out=0.0).fit
    return Task(
        "ResNet-32, CIFAR-10",
        "accuracy, %",
        model,
        {name: x[:calibration]},
        {name: x[calibration:]},
        test,
        top1,
        lambda mean: 100 * mean,
        3e-4,
    )


def lm(quick: bool) -> Task:
    calibration, training = (64, 128) if quick else (160, 2_000)
    folder = Path(__file__).parents[2] / "models"
    model = Model.load(folder / "tiny_lm.onnx")
    rows = _text(folder)
    chosen = rows[np.random.default_rng(0).permutation(len(rows))[: calibration + training], :-1]
    with np.load(folder / "tiny_lm.npz") as data:
        held = dict(data)
    test = Calibration.open(held, model, held_out=0.0).fit
    return Task(
        "8-layer transformer, characters",
        "perplexity",
        model,
        {"input_ids": chosen[:calibration]},
        {"input_ids": chosen[calibration:]},
        test,
        nll,
        lambda mean: float(np.exp(-mean)),
        1e-3,
    )


def _text(folder: Path) -> np.ndarray:
    """The rows that the language model was trained on, by its script (which has a `common` of its own)."""
    script = (
        "import sys, numpy, tiny_lm; rows = tiny_lm.split(tiny_lm.bible.scripture_content.strip())[0]; "
        "numpy.save(sys.argv[1], rows.numpy())"
    )
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.npy"
        if subprocess.run([sys.executable, "-c", script, str(path)], cwd=folder).returncode:
            sys.exit("the language model's text is not there: models/tiny_lm.py says what to install")
        return np.load(path)


TASKS = {"resnet32": resnet32, "lm": lm}


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--only", choices=list(TASKS), required=True)
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="rows that are there, to go on from")
    made.add_argument("--rates", action="store_true", help="only the held-out loss by learning rate")
    made.add_argument("--plot", type=Path, metavar="FILE", help="scores against sizes (needs matplotlib)")
    options = made.parse_args()
    print(machine(options.threads), end="\n\n")
    task = TASKS[options.only](options.quick)
    if options.keep is not None:
        task.folder = options.keep / options.only
        task.folder.mkdir(parents=True, exist_ok=True)
    task.before = task.scores(task.model)
    print(f"{task.name}: {task.unit} {task.shown(float(task.before.mean())):.3f}\n", flush=True)
    start = time.perf_counter()
    if options.rates:
        _rates(task)
        return 0
    criteria: Sequence[str] = ("output", "wasserstein") if options.quick else ("output", *CRITERIA)
    goals = GOALS[-1:] if options.quick else GOALS
    rows: list[Row] = []
    for goal in goals:
        for criterion in criteria:
            for mode in MODES:
                merge = Merge(params=goal, criterion=criterion, mode=mode)
                rows.append(_row(task, f"{mode}, {criterion}", goal, [merge]))
                if mode != "fit" and criterion != "output" and goal == goals[-1]:
                    plain = Merge(params=goal, criterion=criterion, mode=mode, align=False, refit=False)
                    rows.append(_row(task, f"{mode}, {criterion}, plain", goal, [plain]))
        rows += [_row(task, name, goal, passes) for name, passes in _comparators(task, goal)]
    _retrain(task, rows, 1 if options.quick else SEEDS)
    _report(task, rows, goals)
    print(f"\n{time.perf_counter() - start:.0f} seconds")
    for row in rows:
        row.model = None
    write_json(options.json, {"task": task.name, "rows": [asdict(row) for row in rows]})
    if options.plot is not None:
        _plot(task, rows, options.plot)
    return 0


# Compressing ----------------------------------------------------------------------------------------


def _row(task: Task, name: str, goal: float, passes: Sequence[Pass]) -> Row:
    kept = _kept(task, name, goal)
    if kept is not None:
        return kept
    start = time.perf_counter()
    outcome = PassManager(passes).run(task.model, task.context())
    took = time.perf_counter() - start
    failed = next((step for step in outcome.steps if not step.committed or not step.changes), None)
    if failed is not None:
        print(f"{goal:g} {name}: {failed.reason or failed.notes}", flush=True)
        return _keep(task, Row(name, goal, None, 0, 0, 1, took))
    return _keep(task, _judged(task, name, goal, outcome.model, took))


def _place(task: Task, name: str, goal: float) -> Path | None:
    """Where a row is kept, without its suffix."""
    return (
        None if task.folder is None else task.folder / f"{goal:g} {name}".replace(" ", "_").replace(",", "")
    )


def _kept(task: Task, name: str, goal: float) -> Row | None:
    """A row of a former run."""
    place = _place(task, name, goal)
    if place is None or not place.with_name(place.name + ".json").exists():
        return None
    row = Row(**json.loads(place.with_name(place.name + ".json").read_text()))
    file = place.with_name(place.name + ".onnx")
    row.model = Model.load(file) if file.exists() else None
    return row


def _keep(task: Task, row: Row) -> Row:
    """The row, stored where rows are kept."""
    place = _place(task, row.name, row.goal)
    if place is not None:
        file = place.with_name(place.name + ".onnx")
        if row.model is not None and not file.exists():
            row.model.save(file)
        text = json.dumps(asdict(replace(row, model=None)))
        place.with_name(place.name + ".json").write_text(text)
    return row


def _judged(task: Task, name: str, goal: float, model: Model, took: float) -> Row:
    change = paired_difference(task.before, task.scores(model))
    low, high = (task.shown(change.before + end) for end in (change.low, change.high))
    size = _size(model) / _size(task.model)
    score = task.shown(change.after)
    print(f"{goal:g} {name}: {score:.3f} ({low:.3f} to {high:.3f}), {size:.3f}, {took:.1f} s", flush=True)
    return Row(name, goal, score, low, high, size, took, model=model)


def _size(model: Model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save(path)
        found = file_size(path, gzipped=True).gzipped
    assert found is not None
    return found


def _comparators(task: Task, goal: float) -> Iterable[tuple[str, list[Pass]]]:
    yield "prune, global", [Prune(amount=_amount(task.model, goal), scope="global")]
    yield "prune, by layer", [Prune(amount=_amount(task.model, goal), scope="layer")]
    yield "cluster, 256 values", [Cluster(values=256, amount=_share_clustered(task, goal))]
    for method in ("svd", "randomised", "data"):
        yield f"lowrank, {method}", [Lowrank(params=goal, method=method)]
    yield "autoencode", [Autoencode(params=goal)]


def _amount(model: Model, goal: float) -> float:
    """The share of the weights of operators that has to be zero for the gzipped file to be so large."""
    weights = {node.inputs[1].name for node in model.nodes if node.op in ("Conv", "Gemm", "MatMul")}
    names = [name for name in weights if model.is_weight(model.tensor(name))]
    values = {name: np.array(model.weight(model.tensor(name))) for name in names}
    everything = np.sort(np.abs(np.concatenate([value.ravel() for value in values.values()])))
    whole, low, high = _size(model), 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        trial, cut = model.copy(), everything[int(middle * (len(everything) - 1))]
        for name, value in values.items():
            trial.set_weight(trial.tensor(name), np.where(np.abs(value) <= cut, 0, value).astype(value.dtype))
        low, high = (low, middle) if _size(trial) <= goal * whole else (middle, high)
    return high


def _share_clustered(task: Task, goal: float) -> float:
    whole = PassManager([Cluster(values=256, refit=False)]).run(task.model, task.context()).model
    return min((1 - goal) / (1 - _size(whole) / _size(task.model)), 1.0)


# Retraining -----------------------------------------------------------------------------------------


def _retrain(task: Task, rows: list[Row], seeds: int) -> None:
    """Retrain in the order of worth, so that a run that is stopped has what counts."""
    last = min(row.goal for row in rows)
    best = _best(task, rows)
    able = [row for row in rows if row.model is not None and not row.name.endswith("plain")]
    once = [row for row in able if row.goal == last and _wanted(row, best)]
    milder = [
        row for row in able if row.goal != last and _is_one(row, best) and _kind(row) in ("fit", *HEADLINERS)
    ]
    for row in (*once, *milder):
        _add_seeds(task, row, 1)
    leading = [row for row in once if _is_one(row, best) and _kind(row) in (*MODES, *HEADLINERS)]
    for row in leading:
        _add_seeds(task, row, seeds)
    _by_turns(task, rows, next(row for row in best if row.goal == last and _kind(row) in MODES), seeds)


def _wanted(row: Row, best: Sequence[Row]) -> bool:
    """Whether a row is retrained at the smallest size: of merges by the paper's criteria, or the best."""
    criterion = row.name.partition(", ")[2]
    return _kind(row) not in MODES or criterion in RETRAINED or _is_one(row, best)


def _is_one(row: Row, best: Sequence[Row]) -> bool:
    return any(row is other for other in best)


def _add_seeds(task: Task, row: Row, seeds: int) -> None:
    assert row.model is not None
    if len(row.retrained) >= seeds:
        return
    for seed in range(len(row.retrained), seeds):
        row.retrained.append(_trained(task, row.model, seed))
        _keep(task, row)
    print(f"{row.goal:g} {row.name} retrained: {np.round(row.retrained, 3).tolist()}", flush=True)


def _by_turns(task: Task, rows: list[Row], best: Row, seeds: int) -> None:
    """The best merge retrained by turns, and for as long at once."""
    name = f"merge by turns, {SCHEDULE}"
    by_turns = _kept(task, name, best.goal) or Row(name, best.goal, None, 0, 0, 1, 0)
    mode, criterion = best.name.split(", ")
    for seed in range(len(by_turns.retrained), seeds):
        result = onnxfuse.compress(
            task.model,
            [Merge(params=best.goal, criterion=criterion, mode=mode)],
            calib=task.calibration,
            retrain=task.training,
            epochs=2 * EPOCHS,
            lr=task.rate,
            schedule=SCHEDULE,
            seed=seed,
        )
        by_turns.retrained.append(task.shown(float(task.scores(result.model).mean())))
        by_turns.size = _size(result.model) / _size(task.model)
        _keep(task, by_turns)
    name = f"{best.name}, {2 * EPOCHS} epochs at once"
    once = _kept(task, name, best.goal) or Row(name, best.goal, best.score, 0, 0, best.size, 0)
    assert best.model is not None
    for seed in range(len(once.retrained), seeds):
        once.retrained.append(_trained(task, best.model, seed, 2 * EPOCHS))
        _keep(task, once)
    rows += [by_turns, once]
    for row in (by_turns, once):
        print(f"{row.name}: {np.round(row.retrained, 3).tolist()}", flush=True)


def _rates(task: Task) -> None:
    """The held-out loss, before and after every epoch, of a merged and a pruned network at each rate."""
    goal = GOALS[-1]
    for name, passes in (
        ("fit, output", [Merge(params=goal)]),
        ("prune, global", [Prune(amount=_amount(task.model, goal))]),
    ):
        row = _row(task, name, goal, passes)
        assert row.model is not None
        for rate in RATES:
            task.rate = rate
            found = _retraining(task, row.model, 0, EPOCHS).report.retraining
            losses = [epoch.held_out for epoch in found.history]
            print(f"{name}, {rate:g}: {np.round(np.array(losses, float), 4).tolist()}", flush=True)


def _best(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Of every size: the best merge of every mode, and every comparator."""
    worse = -1 if task.metric is top1 else 1
    found: dict[tuple[str, float], Row] = {}
    for row in rows:
        if row.score is None or row.name.endswith("plain"):
            continue
        key = _kind(row), row.goal
        if key not in found or worse * row.score < worse * (found[key].score or 0):
            found[key] = row
    return sorted(found.values(), key=lambda row: worse * (row.score or 0))


def _kind(row: Row) -> str:
    """The mode of a merge, or the comparator."""
    mode = row.name.split(",")[0]
    return mode if mode in MODES else row.name


def _retraining(task: Task, model: Model, seed: int, epochs: int) -> RetrainResult:
    return onnxfuse.retrain(
        model, task.training, teacher=task.model, epochs=epochs, lr=task.rate, held_out=0.1, seed=seed
    )


def _trained(task: Task, model: Model, seed: int, epochs: int = EPOCHS) -> float:
    """The score after retraining; that of the start where no epoch was better on the held-out samples."""
    try:
        result = _retraining(task, model, seed, epochs)
    except OnnxfuseError as failure:
        print(f"not retrained: {failure}")
        return float("nan")
    if not result:
        print(f"not retrained: {result.reason}", flush=True)
    return task.shown(float(task.scores(result.model if result else model).mean()))


# Telling --------------------------------------------------------------------------------------------


def _report(task: Task, rows: Sequence[Row], goals: Sequence[float]) -> None:
    print(f"\n{task.name}: {task.unit}; original {task.shown(float(task.before.mean())):.3f}\n")
    names = list(dict.fromkeys(row.name for row in rows))
    found = {(row.name, row.goal): row for row in rows}
    lines = []
    for name in names:
        own = [found.get((name, goal)) for goal in goals]
        cells = ["-" if row is None or row.score is None else f"{row.score:.2f}" for row in own]
        last = own[-1]
        trained = "-" if last is None or not last.retrained else _spread(last.retrained)
        size = "-" if last is None or last.size == 1 else f"{last.size:.2f}"
        lines.append((name, *cells, trained, size))
    table(("without retraining", *(f"{goal:g}" for goal in goals), "retrained", "size"), lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return f"{mean} +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def _plot(task: Task, rows: Sequence[Row], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    best = _best(task, rows)
    kinds = list(dict.fromkeys(map(_kind, best)))
    for kind in kinds:
        own = sorted((row for row in best if _kind(row) == kind), key=lambda row: row.size)
        mark = "o" if kind in MODES else "x"
        label = f"merge, {kind}" if kind in MODES else kind
        axes[0].plot([r.size for r in own], [r.score for r in own], marker=mark, label=label)
        trained = [row for row in own if row.retrained]
        axes[1].plot(
            [r.size for r in trained], [np.mean(r.retrained) for r in trained], marker=mark, label=label
        )
    for axis, title in zip(axes, ("without retraining", f"retrained for {EPOCHS} epochs"), strict=True):
        axis.axhline(task.shown(float(task.before.mean())), color="grey", linewidth=0.8)
        axis.set(xlabel="gzipped size, share of the original", title=title)
        if task.metric is not top1:
            axis.set_yscale("log")
    axes[0].set_ylabel(task.unit)
    axes[1].legend(fontsize=8)
    figure.suptitle(task.name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
