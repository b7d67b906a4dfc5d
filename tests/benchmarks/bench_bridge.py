"""ONNX files into PyTorch and back: what an import computes, keeps and trains; beside other converters.

    python tests/benchmarks/bench_bridge.py                      # some ten minutes
    python tests/benchmarks/bench_bridge.py --only gpt           # files whose names contain "gpt"
    python tests/benchmarks/bench_bridge.py --others OTHER/bin/python

Files: all in the shared folder's models/, the shipped ones, and small networks of the usual families,
exported by each of torch's exporters (tests/architectures.py). OTHER is an environment with the same
torch, onnx, onnx2torch and onnx2pytorch; each converter runs in a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_wild
import numpy as np
import onnx
from bench_wild import Record, kinds, short
from common import fill, machine, parser, shared, table, write_json

from onnxfuse.data.calibration import Batch, Calibration
from onnxfuse.data.rows import first_rows
from onnxfuse.errors import NotApplicableError, OnnxfuseError
from onnxfuse.ir.model import Model
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import compare_run
from onnxfuse.verification.noise import BATCH_SIZES, MULTIPLE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from architectures import ARCHITECTURES, EXPORTERS, ExportFailedError, export

ROWS = 5
"""Rows of the largest batch; verify cuts it to its other sizes."""

SHORT = {"dynamo": "dyn", "unoptimised": "uno", "torchscript": "ts"}
QUICK = ("resnet", "gpt", "lstm")
OURS, OTHERS = "onnxfuse", ("onnx2torch", "onnx2pytorch")
TIMEOUT = 900
"""Seconds for one converter's process; what it was at is then skipped."""


@dataclass
class Subject:
    """A file, what to feed it, and where it comes from."""

    name: str
    path: Path
    folder: Path
    batches: list[Batch]
    architecture: str | None = None
    how: str | None = None
    feeds: list[Path] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.name}.{self.how}" if self.how else self.name

    @property
    def label(self) -> str:
        return f"{self.name} {SHORT[self.how]}" if self.how else short(self.name)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="TEXT", default="", help="files whose names contain this")
    arguments.add_argument("--others", metavar="PYTHON", help="interpreter that has the other converters")
    options = arguments.parse_args()
    print(machine(options.threads or 1) + f", torch {version('torch')}", flush=True)
    runtime = Runtime("cpu", threads=options.threads or 1)
    with tempfile.TemporaryDirectory() as place:
        subjects, problems = gathered(Path(place), options.only, options.quick, runtime)
        converters = {OURS: sys.executable}
        if options.others:
            converters.update(dict.fromkeys(OTHERS, options.others))
        found = {}
        for converter, python in converters.items():
            start = time.perf_counter()
            results = run(converter, python, subjects, Path(place))
            found[converter] = {s.key: judged(s, results.get(s.key, {}), runtime) for s in subjects}
            print(f"  {converter}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    show(subjects, found, problems)
    write_json(options.json, {"machine": machine(options.threads or 1), "skipped": problems, "found": found})
    bad = [key for key, result in found[OURS].items() if not fine(result)]
    sys.exit(1 if bad else 0)


# --- files --------------------------------------------------------------------------------------------------


def gathered(place: Path, only: str, quick: bool, runtime: Runtime) -> tuple[list[Subject], dict[str, str]]:
    """The files that ONNX Runtime runs, and why others were left out."""
    problems: dict[str, str] = {}
    subjects = []
    shipped = Path(__file__).resolve().parents[2] / "models"
    for path in sorted([*(shared() / "models").glob("*.onnx"), *shipped.glob("*.onnx")]):
        if only in path.stem and not quick:
            folder = place / path.stem
            folder.mkdir()
            try:
                subjects.append(Subject(path.stem, path, folder, wild_batches(path, folder)))
            except OnnxfuseError as error:
                problems[path.stem] = str(error)
    for name, architecture in ARCHITECTURES.items():
        for how in EXPORTERS:
            key = f"{name}.{how}"
            if only in key and (not quick or name in QUICK):
                folder = place / key
                folder.mkdir()
                path = folder / "model.onnx"
                try:
                    export(architecture, how, path)
                except ExportFailedError as error:
                    problems[key] = f"the exporter gives up: {error}"
                    continue
                examples = [architecture.example(ROWS), architecture.example(2, length=9)]
                batches = [
                    Batch({k: v.numpy() for k, v in inputs.items()}, None, number, rows)
                    for number, (inputs, rows) in enumerate(zip(examples, (ROWS, 2), strict=True))
                ]
                subjects.append(Subject(name, path, folder, batches, name, how))
    return [s for s in subjects if prepared(s, runtime, problems)], problems


def wild_batches(path: Path, folder: Path) -> list[Batch]:
    """One batch, of real samples where there are some."""
    model = Model.load(path)
    data = bench_wild.samples(Record(path.stem, ""), path, folder, True)
    samples = Calibration.open(data, model, limit=ROWS, batch_size=ROWS, held_out=0.0)
    return [next(iter(samples.fit))]


def prepared(subject: Subject, runtime: Runtime, problems: dict[str, str]) -> bool:
    """Writes the feeds, those at smaller sizes too; drops batches that ONNX Runtime itself refuses: some
    exporters fix the length of a sequence."""
    model = Model.load(subject.path)
    session = runtime.session(model)
    good = []
    for batch in subject.batches:
        try:
            session.run(batch.feed)
            good.append(batch)
        except OnnxfuseError as error:
            problems[f"{subject.key}, batch {batch.index}"] = str(error)
    subject.batches = good
    if not good:
        return False
    cuts = [first_rows(model, good[0], size) for size in BATCH_SIZES]
    feeds = [good[0].feed, *(cut for cut in cuts if cut is not None), *(b.feed for b in good[1:])]
    for number, feed in enumerate(feeds):
        subject.feeds.append(subject.folder / f"feed.{number}.npz")
        np.savez(subject.feeds[-1], **feed)
    return True


# --- converters ---------------------------------------------------------------------------------------------


def run(converter: str, python: str, subjects: Sequence[Subject], place: Path) -> dict[str, dict[str, Any]]:
    """The worker's answers by subject. A process that dies or hangs loses the job it was at, no other."""
    results = place / f"{converter}.jsonl"
    results.touch()
    found: dict[str, dict[str, Any]] = {}
    left = list(subjects)
    while left:
        jobs = place / f"{converter}.json"
        jobs.write_text(json.dumps([job(s) for s in left]))
        worker = [
            python,
            str(Path(__file__).with_name("bridge_worker.py")),
            converter,
            str(jobs),
            str(results),
        ]
        said = ""
        try:
            done = subprocess.run(worker, capture_output=True, text=True, timeout=TIMEOUT)
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            said = f"took more than {TIMEOUT} s"
        found = {line["name"]: line for line in map(json.loads, results.read_text().splitlines())}
        left = [s for s in left if s.key not in found]
        if left:
            lost = {"name": left[0].key, "reason": f"the process died: {said}"}
            with results.open("a") as file:
                file.write(json.dumps(lost) + "\n")
            found[left.pop(0).key] = lost
    return found


def job(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.key,
        "path": str(subject.path),
        "feeds": [str(feed) for feed in subject.feeds],
        "inputs": [info.name for info in Model.load(subject.path).inputs],
        "architecture": subject.architecture,
        "native names": subject.how == "unoptimised",
        "outputs": str(subject.folder),
    }


# --- judging ------------------------------------------------------------------------------------------------


def judged(subject: Subject, result: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    """The worker's answers with outputs compared to ONNX Runtime's: "floors" is the worst difference in
    noise floors, None where there is something else to say in "differs"."""
    result.setdefault("reason", None)
    if result["reason"]:
        return result
    model = Model.load(subject.path)
    result["floors"], result["differs"] = compared(subject, model, result["outputs"], runtime)
    written = result.get("written")
    if written and "error" not in written:
        changed = Model.load(written["path"])
        written["floors"], written["differs"] = compared(subject, changed, written["outputs"], runtime)
    result["batch norm"] = any(
        node.op_type == "BatchNormalization" for node in onnx.load(subject.path).graph.node
    )
    return result


def compared(
    subject: Subject, model: Model, outputs: Any, runtime: Runtime
) -> tuple[float | None, str | None]:
    """The worst output's difference to ONNX Runtime in noise floors, over all batches; or a problem."""
    if "error" in outputs:
        return None, outputs["error"]
    names = [info.name for info in model.outputs]
    by_feed = dict(zip(subject.feeds, outputs, strict=True))

    def looked_up(feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        path = next(p for p in subject.feeds if same_feed(p, feed))
        if by_feed[path].startswith("!"):
            raise NotApplicableError(by_feed[path][1:])
        stored = np.load(by_feed[path])
        return {name: stored[str(number)] for number, name in enumerate(names) if str(number) in stored}

    found = compare_run(model, looked_up, subject.batches, runtime, tensors=names)
    if found.problems:
        return None, found.problems[0]
    problem = next((output.problem for output in found.outputs if output.problem), None)
    worst = max((output.ratio for output in found.outputs), default=0.0)
    return (None, problem) if problem else (worst, None if found.passed else found.reason)


def same_feed(path: Path, feed: Mapping[str, np.ndarray]) -> bool:
    stored = np.load(path)
    return all(np.array_equal(stored[name], array) for name, array in feed.items())


def fine(result: Mapping[str, Any]) -> bool:
    """Whether everything that was asked of an import is so."""
    questions = ("gradient", "names", "native names", "ties", "same gradient", "statistics")
    shares = [result.get(question) for question in questions]
    good = not result["reason"] and result["differs"] is None and all(complete(s) for s in shares if s)
    return bool(good and written_back(result.get("written")))


def complete(share: Mapping[str, Any]) -> bool:
    return "error" not in share and share["kept"] == share["total"]


def written_back(written: Mapping[str, Any] | None) -> bool:
    if not written or "error" in written:
        return False
    exact = written["untouched"] and written["only weights"] and written["these weights"]
    return bool(exact and written["differs"] is None)


# --- showing ------------------------------------------------------------------------------------------------


SIZES = ", ".join(map(str, sorted({*BATCH_SIZES, 2, ROWS})))
LEGEND = f"""
differs: from ONNX Runtime in eval mode, at most, in noise floors, over batches
of {SIZES} rows; {MULTIPLE:g} pass. gradient: weights that one backward pass
reaches. names: initializers in the state_dict, byte for byte. native: keys of
the native state_dict, for the exporter that keeps them. ties: shared weights
that are one Parameter. same: native parameters whose counterpart gets the same
gradient. stats: running statistics equal to the native ones after a training
step. back: from_torch is exact, untouched and after a change."""


def show(
    subjects: Sequence[Subject], found: Mapping[str, Mapping[str, Any]], problems: Mapping[str, str]
) -> None:
    print("\nimport by onnxfuse")
    rows = [row(s, found[OURS][s.key]) for s in subjects]
    table(("file", "differs", "gradient", "names", "native", "ties", "same", "stats", "back"), rows)
    print(LEGEND)
    for subject in subjects:
        for line in details(found[OURS][subject.key]):
            print(fill(f"{subject.label}: {line}", "  "))
    for name, reason in problems.items():
        print(fill(f"left out: {name}: {reason}", "  "))
    if len(found) > 1:
        print("\nbeside other converters: noise floors, or no import")
        table(
            ("file", *found),
            [(s.label, *(verdict(found[name][s.key]) for name in found)) for s in subjects],
        )
    print(f"\nof {len(subjects)} files")
    table(("", *found), summary(subjects, found))
    for name, results in found.items():
        reasons = [plain(r["reason"]) for r in results.values() if r["reason"]]
        differing = [r["differs"] for r in results.values() if not r["reason"] and r["differs"]]
        for what, texts in (("no import", reasons), ("wrong", differing)):
            if texts:
                print(fill(f"{name}, {what}: {kinds(texts, 6)}", "  "))


def plain(reason: str) -> str:
    """onnx2torch's longest message so that missing operators are told apart."""
    return re.sub(r"Converter is .*operation_type='(\w+)', version=\d+.*", r"no converter for \1", reason)


def row(subject: Subject, result: Mapping[str, Any]) -> tuple[str, ...]:
    if result["reason"]:
        return (subject.label, "NO", *["-"] * 7)
    return (
        subject.label,
        verdict(result),
        percent(result["gradient"]),
        fraction(result["names"]),
        fraction(result.get("native names")),
        fraction(result["ties"]),
        fraction(result.get("same gradient")),
        fraction(result.get("statistics")) if result["batch norm"] else "-",
        "yes" if written_back(result["written"]) else "NO",
    )


def verdict(result: Mapping[str, Any]) -> str:
    if result["reason"]:
        return "-"
    if result["floors"] is None:
        return "fails"
    return f"{result['floors']:.1f}" + (" NO" if result["differs"] else "")


def percent(share: Mapping[str, Any]) -> str:
    if "error" in share:
        return "error"
    return f"{share['kept'] / share['total']:.0%}" if share["total"] else "-"


def fraction(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "-"
    if "error" in share:
        return "error"
    if not share["total"]:
        return "-"
    return "all" if complete(share) else f"{share['kept']}/{share['total']}"


def details(result: Mapping[str, Any]) -> list[str]:
    """What the table has no room for."""
    lines = [result["reason"]] if result["reason"] else []
    if result.get("differs"):
        lines.append(result["differs"])
    for question in ("gradient", "names", "native names", "ties", "same gradient", "buffers", "statistics"):
        share = result.get(question)
        if share and "error" in share:
            lines.append(f"{question}: {share['error']}")
        elif share and share["lost"]:
            lines.append(f"{question}: not {', '.join(share['lost'])}")
    written = result.get("written")
    if written and "error" in written:
        lines.append(f"written back: {written['error']}")
    elif written and not written_back(written):
        wrong = [key for key in ("untouched", "only weights", "these weights") if not written[key]]
        lines.append(f"written back: {', '.join(wrong) or written['differs']}")
    return lines


QUESTIONS: Mapping[str, Callable[[Mapping[str, Any]], bool | None]] = {
    "imported": lambda r: True,
    "within the noise floors": lambda r: r["differs"] is None and r["floors"] is not None,
    "gradient to every weight": lambda r: complete(r["gradient"]),
    "names kept": lambda r: complete(r["names"]),
    "native names kept": lambda r: asked(r, "native names"),
    "ties kept": lambda r: asked(r, "ties"),
    "gradients as native": lambda r: asked(r, "same gradient"),
    "native buffers not trained": lambda r: asked(r, "buffers"),
    "statistics as native": lambda r: asked(r, "statistics") if r["batch norm"] else None,
    "written back": lambda r: written_back(r.get("written")),
}
"""Answers about a module; None where the question has no subject."""


def asked(result: Mapping[str, Any], question: str) -> bool | None:
    share = result.get(question)
    return None if share is None or share.get("total") == 0 else complete(share)


def summary(subjects: Sequence[Subject], found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """How many files each converter does well on, of those that the question is about for any converter."""
    rows = []
    for question, answer in QUESTIONS.items():
        answers = {
            name: {s.key: None if results[s.key]["reason"] else answer(results[s.key]) for s in subjects}
            for name, results in found.items()
        }
        idle = {
            s.key
            for s in subjects
            if any(not results[s.key]["reason"] for results in found.values())
            and all(given[s.key] is None for given in answers.values())
        }
        total = len(subjects) - len(idle)
        rows.append((question, *(f"{sum(map(bool, given.values()))}/{total}" for given in answers.values())))
    return rows


if __name__ == "__main__":
    main()
