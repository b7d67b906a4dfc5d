"""Every model of the shared folder through the command line: inspect, and compress.

    python tests/benchmarks/bench_wild.py                               # fold,fuse: some ten minutes
    python tests/benchmarks/bench_wild.py --passes select:ratio=0.25    # any others
    python tests/benchmarks/bench_wild.py --only silero                 # names that contain "silero"

Image classifiers get real, labelled samples, the others made-up ones. Each model is run as a user would,
by the installed `onnxfuse`, and then judged here, by the onnx and onnxruntime packages alone:

- no traceback on stderr, an exit code of 0 to 3, a file exactly where the exit code is 0;
- metadata, doc strings, opsets, producer, inputs and outputs are the original's;
- the result loads, and its relative error on the held-out samples is the one that the report states.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from common import (
    SVHN_MEAN,
    SVHN_STD,
    cifar,
    fill,
    machine,
    mnist,
    mnist_as_svhn,
    normalise,
    normalised_cifar,
    number,
    parser,
    shared,
    table,
    write_json,
)

from onnxfuse.data.calibration import Calibration
from onnxfuse.data.fitted import KEY as FITTED
from onnxfuse.ir.model import Model

PASSES = "fold,fuse"
IMAGES, QUICK_IMAGES = 1500, 200
MADE_UP = 64
EXIT_CODES = range(4)
AGREE = 1e-3
"""Relative difference between the reported output error and the one found here; floats don't add up the same
with another number of threads."""


def _residual(limit: int) -> tuple[np.ndarray, np.ndarray]:
    return normalised_cifar("train", limit)


def _raw(limit: int) -> tuple[np.ndarray, np.ndarray]:
    return cifar("train", limit)


def _digits(limit: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = mnist(limit)
    return normalise(images, (0.1307,), (0.3081,)), labels


def _enlarged(limit: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = mnist_as_svhn(limit)
    return normalise(images, SVHN_MEAN, SVHN_STD), labels


SAMPLES: Mapping[str, Callable[[int], tuple[np.ndarray, np.ndarray]]] = {
    "cifar_resnet20": _residual,
    "cifar_resnet32": _residual,
    "cifar_10_model": _raw,
    "ccexam_mnist": _digits,
    "ccexam_svhn": _enlarged,
}
"""Real samples by model: images as the network wants them, and labels."""

FEEDS = {
    "silero_vad_16k_op15": """
import numpy as np


def load_data():
    random = np.random.default_rng(0)
    for _ in range(16):
        level = 10 ** random.uniform(-3, 0, (4, 1))
        yield {
            "input": (level * random.normal(size=(4, 576))).astype("f4"),
            "state": random.normal(0, 0.3, (2, 4, 128)).astype("f4"),
            "sr": np.array(16000),
        }
"""
}
"""Made-up samples for models with an input that has but one sensible value (here the sampling rate)."""


@dataclass
class Record:
    """What became of one model."""

    name: str
    samples: str
    inspect: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    seconds: float = 0.0
    said: str = ""
    found_error: float | None = None
    problems: list[str] = field(default_factory=list)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="TEXT", help="models whose names contain this")
    arguments.add_argument("--max-error", metavar="X", help="passed on to compress; default: none")
    arguments.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds for one command")
    arguments.add_argument("--passes", default=PASSES, help=f"default: {PASSES}")
    options = arguments.parse_args()
    paths = [p for p in sorted((shared() / "models").glob("*.onnx")) if (options.only or "") in p.stem]
    print(machine(options.threads), flush=True)
    bound = ["--max-error", options.max_error] if options.max_error else []
    bound += ["--threads", str(options.threads)] if options.threads else []
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            start = time.perf_counter()
            records.append(
                tried(
                    path, Path(folder), options.quick, ["--passes", options.passes, *bound], options.timeout
                )
            )
            print(f"  {path.stem}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    show(records, options.passes)
    write_json(
        options.json, {"machine": machine(options.threads), "records": [asdict(record) for record in records]}
    )
    sys.exit(1 if any(record.problems for record in records) else 0)


def tried(path: Path, folder: Path, quick: bool, more: Sequence[str], timeout: float) -> Record:
    """One model: inspected, compressed with `more` options, judged."""
    record = Record(path.stem, "made up")
    data = samples(record, path, folder, quick)
    record.inspect = parsed(
        record, "inspect", command(record, ["inspect", str(path), "--channels", "--json"], timeout)
    )
    output = folder / f"{path.stem}.onnx"
    calib = ["--samples", str(MADE_UP)] if data is None else ["--calib", data]
    options = ["-o", str(output), "--json", *calib, *more]
    start = time.perf_counter()
    compressed = command(record, ["compress", str(path), *options], timeout)
    record.seconds = time.perf_counter() - start
    if compressed is None:
        return record
    record.exit_code = compressed.returncode
    record.said = compressed.stderr.strip()
    record.report = parsed(record, "compress", compressed)
    if output.exists() != (record.exit_code == 0):
        record.problems.append(f"exit code {record.exit_code}, and a file {output.exists()}")
    if output.exists():
        record.problems += lost(onnx.load(path), onnx.load(output))
        judge(record, path, output, data)
    return record


def samples(record: Record, path: Path, folder: Path, quick: bool) -> str | None:
    """What goes behind --calib; None where there is nothing better than made-up samples."""
    if path.stem in SAMPLES:
        images, labels = SAMPLES[path.stem](QUICK_IMAGES if quick else IMAGES)
        file = folder / f"{path.stem}.npz"
        arrays: dict[str, Any] = {Model.load(path).inputs[0].name: images, "labels": labels}
        np.savez(file, **arrays)
        record.samples = f"{len(images):,} real"
        return str(file)
    if path.stem in FEEDS:
        script = folder / f"{path.stem}_feeds.py"
        script.write_text(FEEDS[path.stem])
        return f"{script}:load_data"
    return None


# --- running ------------------------------------------------------------------------------------------------


def command(
    record: Record, arguments: Sequence[str], timeout: float
) -> subprocess.CompletedProcess[str] | None:
    """Run `onnxfuse`; notes a crash or a time-out."""
    program = shutil.which("onnxfuse", path=str(Path(sys.executable).parent)) or shutil.which("onnxfuse")
    start = [program] if program else [sys.executable, "-m", "onnxfuse"]
    try:
        done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        record.problems.append(f"{arguments[0]} did not end within {timeout:g} s")
        return None
    if "Traceback" in done.stderr or done.returncode not in EXIT_CODES:
        record.problems.append(f"{arguments[0]} crashed: {done.stderr.strip().splitlines()[-1]}")
    return done


def parsed(record: Record, what: str, done: subprocess.CompletedProcess[str] | None) -> dict[str, Any]:
    """The JSON that a command printed; {} where it had bad input and printed none."""
    if done is None or not done.stdout:
        return {}
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        record.problems.append(f"{what} --json printed no JSON: {error}")
        return {}
    return found


# --- judging ------------------------------------------------------------------------------------------------


def lost(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """What of the header and the interface is not as it was."""
    facts: Mapping[str, Callable[[onnx.ModelProto], object]] = {
        "metadata": lambda m: sorted((p.key, p.value) for p in m.metadata_props if p.key != FITTED),
        "graph metadata": lambda m: sorted((p.key, p.value) for p in m.graph.metadata_props),
        "doc string": lambda m: (m.doc_string, m.graph.doc_string),
        "graph name": lambda m: m.graph.name,
        "opsets": lambda m: sorted((o.domain, o.version) for o in m.opset_import),
        "version": lambda m: (m.ir_version, m.model_version, m.domain),
        "producer": lambda m: (m.producer_name, m.producer_version),
        "inputs": lambda m: [v.SerializeToString(deterministic=True) for v in true_inputs(m)],
        "outputs": lambda m: [v.SerializeToString(deterministic=True) for v in m.graph.output],
        "weights listed as inputs": lambda m: len(m.graph.input) > len(true_inputs(m)),
    }
    return [f"{name} changed" for name, fact in facts.items() if fact(before) != fact(after)]


def true_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def judge(record: Record, before: Path, after: Path, data: str | None) -> None:
    """The output error by ONNX Runtime and NumPy alone, on the samples that compress held out."""
    model = Model.load(before)
    limit = None if data else MADE_UP
    calibration = Calibration.open(data, model, limit=limit)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        sessions = [
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for path in (before, after)
        ]
        names = [output.name for output in sessions[0].get_outputs()]
        runs = [[session.run(names, batch.feed) for batch in calibration.held_out] for session in sessions]
    except Exception as error:  # ORT's exceptions share no base class
        record.problems.append(f"the result does not run: {error}")
        return
    stated = (record.report.get("output_error") or {}).get("outputs", {})
    for index, name in enumerate(names):
        a, b = ([run[index] for run in batches] for batches in runs)
        found = relative_error(a, b, [batch.samples for batch in calibration.held_out])
        record.found_error = max(record.found_error or 0.0, found)
        if not np.isfinite(found):
            record.problems.append(f"output '{name}' is not finite")
        elif name not in stated:
            record.problems.append(f"the report has no error of output '{name}'")
        elif abs(found - stated[name]) > AGREE * stated[name] + 1e-5:
            record.problems.append(f"output '{name}': error {found:.6g}, the report says {stated[name]:.6g}")


def relative_error(a: Sequence[np.ndarray], b: Sequence[np.ndarray], samples: Sequence[int]) -> float:
    """Root mean square difference over root mean square deviation from the mean over samples, or over all
    elements where the first axis does not count samples."""
    if any(not np.isfinite(x.astype(np.float64)).all() for x in b):
        return float("nan")
    if a[0].dtype.kind != "f":
        unequal = sum(int(np.count_nonzero(x != y)) for x, y in zip(a, b, strict=True))
        return unequal / max(sum(x.size for x in a), 1)
    left, right = ([x.astype(np.float64) for x in part] for part in (a, b))
    distance = sum(float(((x - y) ** 2).sum()) for x, y in zip(left, right, strict=True))
    by_sample = all(x.ndim and len(x) == count for x, count in zip(left, samples, strict=True))
    if len({x.shape[1:] for x in left}) == 1 and by_sample and sum(samples) > 1:
        rows = np.concatenate(left)
        spread = float(((rows - rows.mean(axis=0)) ** 2).sum())
    else:
        flat = np.concatenate([x.reshape(-1) for x in left])
        spread = float(((flat - flat.mean()) ** 2).sum())
    return float(np.sqrt(distance / spread)) if spread > 0 else float(np.sqrt(distance))


# --- showing ------------------------------------------------------------------------------------------------


def show(records: Sequence[Record], passes: str) -> None:
    print("\ninspect")
    table(
        ("model", "opset", "nodes", "linear", "regions", "groups", "parameters", "MACs", "ms"),
        [inspect_row(record) for record in records],
    )
    print(f"\ncompress --passes {passes}")
    table(
        ("model", "changes", "error", "MACs", "latency", "exit", "s", "sound"),
        [compress_row(record) for record in records],
    )
    print(
        "\ngroups: of channels, those that can be cut / all. changes: of each pass; of fuse\n"
        "and select rewrites + operators refitted. error: of the worst output, on held-\n"
        "out samples. MACs, latency: result / original. sound: checks passed."
    )
    for record in records:
        print(f"\n{record.name}, {record.samples} samples")
        for line in details(record):
            print(fill(f"  {line}", "    "))


def inspect_row(record: Record) -> tuple[object, ...]:
    found = record.inspect
    if not found:
        return (short(record.name), *["-"] * 8)
    cost, timed = found["cost"], found["latency"]
    return (
        short(record.name),
        found["opsets"].get("ai.onnx", "?"),
        cost["nodes"],
        len(found["linear"]),
        len(found["regions"]),
        f"{sum(not group['frozen'] for group in found['channels'])}/{len(found['channels'])}",
        number(cost["parameters"]),
        number(cost["macs"]),
        f"{timed['timings'][0]['median_ms']:.3g}" if timed else "-",
    )


def compress_row(record: Record) -> tuple[object, ...]:
    report = record.report
    macs = [report[side]["macs"] for side in ("before", "after")] if report else [None, None]
    error = report.get("output_error")
    latency = report.get("latency")
    return (
        short(record.name),
        ", ".join(map(done, report.get("steps", ()))) or "-",
        f"{error['worst']:.2g}" if error else "-",
        f"{macs[1] / macs[0]:.3f}" if error and macs[0] and macs[1] else "-",
        "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})".format(**latency["timings"][1]) if latency else "-",
        "-" if record.exit_code is None else record.exit_code,
        f"{record.seconds:.0f}",
        "NO" if record.problems else "yes",
    )


def short(name: str) -> str:
    """Names as they fit a table."""
    return name if len(name) <= 19 else f"{name[:9]}..{name[-8:]}"


def done(step: dict[str, Any]) -> str:
    """How much a pass changed."""
    if not step["committed"]:
        return "undone"
    made = sum("region" in change["detail"] or "group" in change["detail"] for change in step["changes"])
    return f"{made} + {len(step['changes']) - made}" if made else str(len(step["changes"]))


def details(record: Record) -> list[str]:
    """What a table has no room for."""
    lines = [f"PROBLEM: {problem}" for problem in record.problems]
    frozen = [group["frozen"] for group in record.inspect.get("channels") or () if group["frozen"]]
    if frozen:
        lines.append(f"frozen groups: {kinds(frozen)}")
    for step in record.report.get("steps", ()):
        if step["changes"] and step["name"] == "fold":
            lines.append(f"fold did: {kinds([change['what'] for change in step['changes']])}")
        lines += [f"{step['name']}: {note}" for note in step["notes"]]
        if step["reason"]:
            lines.append(f"{step['name']} was undone: {step['reason']}")
        if step["skipped"]:
            lines.append(f"{step['name']} refused: {kinds([skip['reason'] for skip in step['skipped']])}")
    metric = record.report.get("metric")
    if metric:
        scores = metric["scores"]
        lines.append(f"{metric['name']} on held-out samples: {scores['before']:.4f} to {scores['after']:.4f}")
    said = record.said.splitlines() if "Traceback" not in record.said else []
    said = [line for line in said if "CALIBRATION" not in line]
    return [*lines, *(line[:300] for line in said)] or ["nothing to say"]


def kinds(texts: Sequence[str], most: int = 3) -> str:
    """The most frequent of some sentences, alike but for numbers and names, with how often each came."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(re.sub(r"'[^']*'|\b\d[\d.e+-]*|nan|inf", "#", text), []).append(text)
    counts = Counter({key: len(group) for key, group in groups.items()})
    parts = [f"{count}x {groups[key][0]}" for key, count in counts.most_common(most)]
    rest = sum(counts.values()) - sum(count for _, count in itertools.islice(counts.most_common(), most))
    return "; ".join(parts) + (f"; {rest} others" if rest else "")


if __name__ == "__main__":
    main()
