"""Does a restructuring change anything? Records what commands of onnxfuse do, and compares later states.

    python tests/benchmarks/snapshots.py record before.json     # 340 CPU seconds
    ... change the code ...
    python tests/benchmarks/snapshots.py compare before.json    # one line for each difference; exit code 1
    python tests/benchmarks/snapshots.py compare before.json --only 'fuse*' --only 'error*'
    python tests/benchmarks/snapshots.py list                   # the cases and their commands

A case is one or more commands that run one after the other in a folder of their own, which holds a copy of
`models/` and the inputs that `prepare` makes. Of each command are kept: the exit code, stdout (the report,
where it is `--json`), stderr, and every file that was written or changed: of models and other binary files
size and SHA-256, of reports and journals the content. All thirteen passes run, on all five shipped networks.

Commands go through `python -m onnxfuse` of the interpreter that runs this script, outside any checkout. The
script needs nothing of onnxfuse but that it is installed: one checkout's script can record another's code.

Times are masked, and what follows from them: the keys `MASKED`, in text the places `TIMES`, and the warnings
`SLOWER`. Everything else must be equal to the last bit. A snapshot holds for one machine and one set of
packages: float sums differ between processors and between versions of ONNX Runtime, NumPy and torch.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx

FORMAT = 1
MODELS = Path(__file__).resolve().parents[2] / "models"
LIMIT = 300
"""Seconds that one command may take."""

SHOWN = 110
"""Characters of a value in a difference."""

ABSENT = "(absent)"

# --- what is alike on every run -----------------------------------------------------------------------------

ON_CPU = "--provider cpu --threads 2"
PINNED = {
    **dict.fromkeys(("compress", "grow", "verify", "diff", "inspect"), ON_CPU),
    "retrain": "--provider cpu --device cpu",
}
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "2"),
    "COLUMNS": "100",
    "PYTHONIOENCODING": "utf-8",
}
UNSET = ("PYTHONPATH", "RANK", "FORCE_COLOR", "TTY_COMPATIBLE")

# --- what is masked -----------------------------------------------------------------------------------------

MASK = "#"
MASKED = {
    "seconds": "of a run, a pass, an epoch",
    "verify_seconds": "of the checks of a pass",
    "latency": "of the original and the result: times, their ratios, rounds",
    "slower": "follows from latency",
    "threads": "the machine's cores where retrain runs; texts show those of the other commands",
    "version": "of onnxfuse",
}
"""Keys of reports whose values are masked, wherever they are; null stays null."""

MASKED_IN_JOURNALS = {**MASKED, "at": "seconds since the start of the run"}
SLOWER = re.compile(r"SLOWER THAN THE ORIGINAL: latency|latency unstable: ")
"""Warnings that are left out, on stderr and in reports."""

TIMES = (
    re.compile(r"^latency +(\S.*)$"),
    re.compile(r"^  A/A control +(\S.*)$"),
    re.compile(r"^ *\w+ +(?:exact|approximate|masked) .* (\d+\.\d)$"),  # seconds of a pass
    re.compile(r"^ +\d+ .* (\d+\.\d)(?: +(?:best|start))?$"),  # seconds of an epoch
)
"""Lines of text whose first group is masked. Columns are as wide as their widest entry, so spaces and the
wrapping of the last column do not count in the paragraph around such a line."""

# --- cases --------------------------------------------------------------------------------------------------

MLP, RESNET, CONV, LM, TRANSFORMER = (
    f"models/{name}"
    for name in ("digits_mlp", "digits_resnet", "mnist1d_conv", "tiny_lm", "tiny_transformer")
)


def compress(model: str, passes: str, more: str = "--json", *, samples: int = 120, out: str = "out") -> str:
    """A `compress` of a shipped network with some of its samples."""
    data = f"--calib {model}.npz --samples {samples}"
    return f"compress {model}.onnx {data} --passes '{passes}' -o {out}.onnx {more}"


def grow(model: str, how: str) -> str:
    """A `grow` of a shipped network."""
    return f"grow {model}.onnx --calib {model}.npz --samples 100 {how} -o out.onnx --json"


CASES: dict[str, tuple[str, ...]] = {
    # passes
    "fold-fuse": (compress(RESNET, "fold,fuse:max_blocks=3"),),
    "fuse-error": (f"compress {MLP}.onnx --calib {MLP}.npz --max-error 0.2 --json",),
    "fuse-composed": (compress(CONV, "fuse:max_blocks=2,kernel=composed"),),
    "fuse-paper": (compress(CONV, "fuse:max_blocks=1,mode=paper,refit=false", "--explain"),),
    "fuse-mask": (compress(TRANSFORMER, "fuse:max_blocks=1,mask=attention_mask,shortlist=4"),),
    "fuse-merge": (compress(RESNET, "fuse:max_blocks=2,merge:layers=0.2", "--report report"),),
    "merge-params": (compress(TRANSFORMER, "merge:params=0.9,mask=attention_mask"),),
    "merge-adjacent": (
        compress(
            LM, "merge:layers=0.1,criterion=wasserstein,pairs=adjacent,only=/layers.?.[qk]*", samples=40
        ),
    ),
    "merge-mean": (compress(RESNET, "merge:layers=0.2,mode=mean,criterion=aligned", "-v"),),
    "select-macs": (compress(CONV, "fold,select:macs=0.7"),),
    "select-ratio": (compress(RESNET, "select:ratio=0.25", "--explain"),),
    "select-heads": (compress(TRANSFORMER, "select:ratio=0.25,samples=48,mask=attention_mask"),),
    "select-cut": (compress(CONV, "select:params=0.8,criterion=magnitude,compensate=false"),),
    "lowrank": (
        compress(MLP, "lowrank:params=0.5"),
        compress(CONV, "lowrank:rank=8,method=svd,refit=false"),
    ),
    "prune": (compress(MLP, "prune:amount=0.5"), compress(CONV, "prune:amount=0.4,scope=layer", "-v")),
    "cluster": (compress(CONV, "cluster:values=16"), compress(MLP, "cluster:values=8,codebook=true")),
    "autoencode": (compress(MLP, "autoencode:params=0.5,epochs=2,only=/dense2*"),),
    "refit": (compress(CONV, "prune:amount=0.5,refit=false,refit", "--dump dump"),),
    "batchnorm": (compress(CONV, "batchnorm"), compress(RESNET, "fold,batchnorm:only=/blocks.?.conv1*")),
    "recipe": (f"compress {CONV}.onnx --calib {CONV}.npz --recipe recipe.yaml --report report --explain",),
    "made-up-samples": (f"compress {MLP}.onnx --passes fold,fuse:max_blocks=1 --dry-run",),
    "external-data": (
        "compress external.onnx --calib models/digits_mlp.npz --passes fuse:max_blocks=1 -o out.onnx --json",
    ),
    # growth
    "grow-r2r": (grow(CONV, "--widen all=1.5 --deepen '*conv*' --kernel all=7"),),
    "grow-net2net": (grow(TRANSFORMER, "--widen all=2 --deepen '*expand*' --scheme net2net --seed 3"),),
    "grow-netmorph": (grow(CONV, "--widen all=1.25 --scheme netmorph"),),
    "deepen-blocks": (compress(TRANSFORMER, "deepen:sites={/layers.1/Add_2: 1},blocks=2", "-v"),),
    "widen-skip": (compress(RESNET, "widen:sites={/conv/Conv: 2},skip=fold,kernel:sites={/conv/Conv: 5}"),),
    # retraining
    "retrain-labels": (
        f"retrain {MLP}.onnx --data {MLP}.npz --epochs 1 --optimizer sgd --freeze 'dense1.*' -o out.onnx",
    ),
    "retrain-teacher": (
        compress(MLP, "fuse:max_blocks=1", "-q", out="small"),
        f"retrain small.onnx --data {MLP}.npz --teacher {MLP}.onnx --epochs 1 --json",
    ),
    "compress-retrain": (
        compress(RESNET, "fold,fuse:max_blocks=3", f"--retrain {RESNET}.npz --epochs 1 --lr 0.001"),
    ),
    "compress-schedule": (
        compress(
            MLP,
            "prune:amount=0.6,merge:layers=0.25",
            f"--retrain {MLP}.npz --epochs 2 --schedule uniform:steps=2",
        ),
    ),
    # looking
    "inspect": tuple(
        f"inspect {model}.onnx --no-latency --channels --grow --json" for model in (MLP, RESNET, CONV, LM)
    ),
    "inspect-similarity": (
        f"inspect {TRANSFORMER}.onnx --no-latency --similarity --json",
        f"inspect {RESNET}.onnx --no-latency --similarity --criterion aligned --json",
    ),
    "inspect-text": (
        f"inspect {RESNET}.onnx",
        f"inspect {CONV}.onnx --no-latency --channels",
        f"inspect {CONV}.onnx --no-latency --grow",
        f"inspect {TRANSFORMER}.onnx --no-latency --similarity --criterion euclidean --heads",
    ),
    "verify-diff": (
        compress(RESNET, "fold", "-q", out="same"),
        f"verify {RESNET}.onnx same.onnx --calib {RESNET}.npz",
        compress(RESNET, "fuse:max_blocks=1", "-q", out="other"),
        f"verify {RESNET}.onnx other.onnx --calib {RESNET}.npz --json",
        f"verify {RESNET}.onnx other.onnx --calib {RESNET}.npz --max-error 0.5",
        f"diff {RESNET}.onnx other.onnx --calib {RESNET}.npz",
        f"diff {RESNET}.onnx same.onnx --json",
    ),
    "passes": ("passes", "passes --json"),
    "help": ("--help", *(f"{name} --help" for name in ("compress", "retrain"))),
    # what can't be done
    "error-file": ("compress missing.onnx", "inspect broken.onnx", f"verify {MLP}.onnx {CONV}.onnx"),
    "error-samples": (
        f"compress {MLP}.onnx --calib {CONV}.npz",
        f"compress {MLP}.onnx --calib unlabelled.npz --max-drop 0.01 --passes fold",
        f"retrain {MLP}.onnx --data unlabelled.npz",
    ),
    "error-passes": (
        compress(MLP, "fold,melt"),
        compress(MLP, "fuse:blocks=3"),
        compress(MLP, "select:macs=0.5,ratio=0.5"),
        compress(MLP, "prune:amount=2"),
        compress(MLP, "prune:only=*classify"),
    ),
    "error-options": (
        f"compress {MLP}.onnx --fast",
        f"compress {MLP}.onnx --max-error 0",
        f"inspect {MLP}.onnx --criterion kl",
        f"grow {MLP}.onnx",
        "shrink",
    ),
    "error-budget": (compress(MLP, "fuse:max_blocks=1", "--max-error 0.000001 --report report"),),
    "error-nothing": (compress(MLP, "batchnorm"), compress(LM, "kernel:sites={all: 5}", samples=20)),
}

RECIPE = """\
passes:
  - fold
  - select: {params: 0.8}
  - fuse: {max_blocks: 1, kernel: 3}
  - merge: {layers: 0.2, criterion: euclidean}
  - cluster: {values: 64}
"""


def prepare(folder: Path) -> None:
    """Fill a case's folder."""
    (folder / "models").mkdir()
    for path in sorted(MODELS.glob("*.onnx")) + sorted(MODELS.glob("*.npz")):
        shutil.copy(path, folder / "models")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "broken.onnx").write_bytes((MODELS / "digits_mlp.onnx").read_bytes()[:5000])
    with np.load(MODELS / "digits_mlp.npz") as data:
        np.savez(folder / "unlabelled.npz", **{name: data[name] for name in data.files if name != "labels"})
    onnx.save_model(
        onnx.load(MODELS / "digits_mlp.onnx"),
        folder / "external.onnx",
        save_as_external_data=True,
        location="external.data",
        size_threshold=256,
    )


# --- recording ----------------------------------------------------------------------------------------------


def run_case(commands: Sequence[str]) -> list[dict[str, Any]]:
    """What each command did, in order."""
    with tempfile.TemporaryDirectory(prefix="snapshot") as place:
        folder = Path(place).resolve()
        prepare(folder)
        return [run_command(command, folder) for command in commands]


def run_command(command: str, folder: Path) -> dict[str, Any]:
    """Exit code, output and files of one command."""
    words = shlex.split(command)
    words += shlex.split(PINNED.get(words[0], "")) if "--help" not in words else []
    before = digests(folder)
    done = run_python(["-m", "onnxfuse", *words], folder)
    report = "--json" in words and done.returncode in (0, 1, 3) and done.stdout.startswith("{")
    return {
        "command": command,
        "exit": done.returncode,
        "stdout": masked(json.loads(done.stdout)) if report else masked_text(done.stdout),
        "stderr": [line for line in done.stderr.splitlines() if not SLOWER.search(line)],
        "files": {
            name: content(folder / name, digest)
            for name, digest in sorted(digests(folder).items())
            if before.get(name) != digest
        },
    }


def run_python(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """This interpreter, in a folder where it finds no package but installed ones."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET} | ENVIRONMENT
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def content(path: Path, digest: str) -> Any:
    """What is kept of a file."""
    if path.suffix == ".json":
        return masked(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [masked(json.loads(line), MASKED_IN_JOURNALS) for line in lines]
    if path.suffix == ".txt":
        return masked_text(path.read_text(encoding="utf-8"))
    return {"bytes": path.stat().st_size, "sha256": digest}


def masked(value: Any, keys: Mapping[str, str] = MASKED) -> Any:
    """A report without what differs from run to run."""
    if isinstance(value, dict):
        return {
            key: MASK if key in keys and item is not None else masked(item, keys)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [masked(item, keys) for item in value if not (isinstance(item, str) and SLOWER.search(item))]
    return value


def masked_text(text: str) -> list[str]:
    """The lines of a text without what differs from run to run."""
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not SLOWER.search(line)]
        without = [masked_line(line) for line in lines]
        if without != lines:
            unwrapped = re.sub(r"\n {12,}", " ", "\n".join(without))
            without = re.sub(" +", " ", unwrapped).splitlines()
        found += [*without, ""]
    return found[:-1]


def masked_line(line: str) -> str:
    for pattern in TIMES:
        if match := pattern.match(line):
            return line[: match.start(1)] + MASK + line[match.end(1) :]
    return line


# --- comparing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A place where two snapshots differ, and what is there in each."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {shown(self.before)} -> {shown(self.after)}"


def shown(value: Any) -> str:
    if value is ABSENT:
        return ABSENT
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def differences(before: Any, after: Any, path: str) -> Iterator[Difference]:
    """Where two values differ, as deep as both have the same kind of container."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from differences(before.get(key, ABSENT), after.get(key, ABSENT), f"{path}.{key}")
        if set(before) == set(after) and list(before) != list(after):
            yield Difference(f"{path} (order of keys)", list(before), list(after))
    elif isinstance(before, list) and isinstance(after, list):
        for index, one, other in aligned(before, after):
            yield from differences(one, other, f"{path}[{index}]")
    elif type(before) is not type(after) or before != after:
        yield Difference(path, before, after)


def aligned(before: list[Any], after: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Pairs of entries with their index; where the lengths differ, equal entries find each other."""
    if len(before) == len(after):
        yield from ((str(i), one, other) for i, (one, other) in enumerate(zip(before, after, strict=True)))
        return
    texts = [[json.dumps(item) for item in items] for items in (before, after)]
    for tag, i, i_end, j, j_end in SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        if tag != "equal":
            rows = zip_longest(before[i:i_end], after[j:j_end], fillvalue=ABSENT)
            yield from ((str(i + k), one, other) for k, (one, other) in enumerate(rows))


# --- the command line ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare", "list"))
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.json")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="cases by name; repeatable")
    options = parser.parse_args()
    chosen = [name for name in CASES if wanted(name, options.only)]
    if not chosen:
        parser.error("no case has such a name")
    if options.action == "list":
        for name in chosen:
            print(name, *(f"    {command}" for command in CASES[name]), sep="\n")
        return
    if options.file is None:
        parser.error(f"{options.action} needs FILE.json")
    if options.action == "record":
        cases = {}
        for name, found in record(chosen):
            cases[name] = found
            text = json.dumps({"format": FORMAT, "cases": cases}, indent=1)
            options.file.write_text(f"{text}\n", encoding="utf-8")
        return
    sys.exit(compare(json.loads(options.file.read_text(encoding="utf-8")), chosen, options.only))


def wanted(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def record(names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The cases' names and what they do."""
    with tempfile.TemporaryDirectory() as place:
        found = run_python(["-c", "import onnxfuse; print(onnxfuse.__file__)"], Path(place))
    if found.returncode:
        sys.exit(found.stderr)
    print(f"onnxfuse is {found.stdout.strip()}", file=sys.stderr)
    for name in names:
        start = time.perf_counter()
        outcomes = run_case(CASES[name])
        codes = " ".join(str(outcome["exit"]) for outcome in outcomes)
        said = f"{name}: exit {codes}, {time.perf_counter() - start:.1f} s"
        print(said, file=sys.stderr, flush=True)
        yield name, outcomes


def compare(snapshot: Mapping[str, Any], names: Sequence[str], patterns: Sequence[str] | None) -> int:
    """Print every difference as it is found; the exit code."""
    if snapshot["format"] != FORMAT:
        sys.exit(f"the snapshot has format {snapshot['format']}, not {FORMAT}")
    recorded = {name: found for name, found in snapshot["cases"].items() if wanted(name, patterns)}
    count = 0
    absent = ((name, ABSENT) for name in recorded if name not in names)
    for name, found in chain(record(names), absent):
        for difference in differences(recorded.get(name, ABSENT), found, name):
            print(difference, flush=True)
            count += 1
    print(f"{len(names)} cases, {count} differences", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    main()
