"""Damaged and odd files through the program: does it ever do anything but work, or refuse in one line?

    python tests/benchmarks/bench_fuzz.py                       # 20,000 files
    python tests/benchmarks/bench_fuzz.py --count 300 --jobs 1  # two minutes
    python tests/benchmarks/bench_fuzz.py --only 1234           # one file once more, and what was said

Networks of every kind (fuzz_seeds.py) are damaged by a grammar (fuzz_damage*.py). Each goes through `inspect`
(a fifth of them with --channels, --grow or --similarity), `compress --passes fold`, `verify` (against the
result of fold, else against itself) and, where it loads, `to_torch`. Something is broken where

- an exit code is none of those documented, a traceback is printed, or an exception is not onnxfuse's own;
- a refusal isn't one line, or what is printed is neither that nor a warning; `--json` prints no JSON;
- the file is changed, an output is there that should not be, or is not there, or can't be read;
- the result of fold differs from its original, or a file from itself;
- a step takes over 20 seconds of processor time, or more memory than --memory on top of what the process
  has, and isn't refused for it;
- the process dies, in ONNX Runtime's or onnx's own code, too.

A file depends on --seed and its number alone. Commands run in forked processes that have everything imported;
the clock of `compress` is given less to do than usual, all else is as on the command line. Files that broke
something, and what was said, are kept in --keep.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common import fill, machine, table, write_json
from forking import Death, forked, preload
from fuzz_drawing import BYTES, PARTS
from fuzz_making import made
from fuzz_running import STEPS, Outcome, run_one
from fuzz_seeds import DATA, DATA_FILE


def main() -> None:
    options = arguments()
    memory = options.memory << 30
    preload()
    if options.only is not None:
        show_one(run_one(options.seed, options.only, memory, lambda step: None))
        return
    print(f"{machine(1)}; seed {options.seed}", flush=True)
    outcomes = []
    for number, found in forked(
        range(options.first, options.first + options.count),
        lambda number, began: run_one(options.seed, number, memory, began),
        options.jobs,
        options.seconds,
    ):
        outcome = _dead(options.seed, number, found) if isinstance(found, Death) else found
        outcomes.append(outcome)
        if outcome.broken:
            keep(outcome, options.keep, options.seed)
            print(
                f"{number} ({', '.join(outcome.damages)} of {outcome.net}): {outcome.broken[0]}", flush=True
            )
        if len(outcomes) % 500 == 0:
            print(f"{len(outcomes):,} of {options.count:,}", flush=True)
    show(outcomes)
    write_json(options.json, {"machine": machine(1), "files": [asdict(outcome) for outcome in outcomes]})
    sys.exit(1 if any(outcome.broken for outcome in outcomes) else 0)


def _dead(seed: int, number: int, death: Death) -> Outcome:
    net, _, damages = made(seed, number)
    return Outcome(number, net, damages, broken=[f"{death.step}: {death.reason}"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="files; default 20,000")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first; default 0")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes side by side; default 2")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for what broke; default a new folder")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run this file alone, here")
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="of a step; default 20")
    parser.add_argument("--memory", type=int, default=4, metavar="GIB", help="of a step; default 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes here, too")
    found = parser.parse_args()
    if found.keep is None and found.only is None:
        found.keep = Path(tempfile.mkdtemp(prefix="fuzz-"))
    return found


def keep(outcome: Outcome, folder: Path, seed: int) -> None:
    """Write the file and what went wrong."""
    place = folder / f"{outcome.number}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.onnx").write_bytes(made(seed, outcome.number)[1])
    (place / DATA_FILE).write_bytes(DATA)
    text = [
        f"number {outcome.number}, seed {seed}, {outcome.net}: {', '.join(outcome.damages)}",
        *outcome.broken,
    ]
    (place / "what.txt").write_text("\n\n".join([*text, *outcome.said]), errors="backslashreplace")


def show_one(outcome: Outcome) -> None:
    print(f"{outcome.net}: {', '.join(outcome.damages)}")
    for step, code in outcome.codes.items():
        print(f"{step}: {code}, {outcome.seconds[step]:.2f} s, {outcome.peak[step] >> 20} MB")
    print("\n".join([*outcome.broken, *outcome.said]))


def show(outcomes: Sequence[Outcome]) -> None:
    print()
    table(
        ("exit code", *STEPS),
        [
            (name, *(sum(o.codes.get(step) == code for o in outcomes) for step in STEPS))
            for code, name in CODES.items()
        ]
        + [("broken", *(sum(step in o.broken_steps for o in outcomes) for step in STEPS))],
    )
    print("\nprocessor seconds and memory on top of the process")
    table(
        ("", *STEPS),
        [
            (
                "median, s",
                *(f"{_quantile([o.seconds[s] for o in outcomes if s in o.seconds], 0.5):.2f}" for s in STEPS),
            ),
            ("most, s", *(f"{max((o.seconds.get(s, 0) for o in outcomes), default=0):.2f}" for s in STEPS)),
            ("most, MB", *(max((o.peak.get(s, 0) for o in outcomes), default=0) >> 20 for s in STEPS)),
        ],
    )
    print()
    table(
        ("damage", "files", "refused", "inspected", "folded", "verified", "in torch", "broken"),
        _rows(outcomes),
    )
    print("\nwhat broke")
    for reason, numbers in _grouped(outcomes).items():
        print(fill(f"  {len(numbers)}: {reason} ({', '.join(map(str, numbers[:6]))})", "    "))


CODES = {0: "0 done", 1: "1 failed its check", 2: "2 bad input", 3: "3 not applicable"}


def _rows(outcomes: Sequence[Outcome]) -> list[tuple[object, ...]]:
    """By damage; files with several are "several"."""
    found: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        found[outcome.damages[0] if len(outcome.damages) == 1 else "several"].append(outcome)
    rows = []
    for damage in (*BYTES, *PARTS, "several"):
        files = found[damage]
        done = [sum(o.codes.get(step) == 0 for o in files) for step in STEPS]
        refused = sum(o.codes.get("inspect") == 2 for o in files)
        rows.append((damage, len(files), refused, *done, sum(bool(o.broken) for o in files)))
    sums = [sum(row[column] for row in rows) for column in range(1, len(rows[0]))]
    return [*rows, ("all", *sums)]


def _grouped(outcomes: Sequence[Outcome]) -> dict[str, list[int]]:
    """Numbers of files by what broke, numbers and names in it left out, the most frequent first."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for outcome in outcomes:
        for reason in outcome.broken:
            found[re.sub(r"\d+|'[^']*'", "*", reason)].append(outcome.number)
    order = Counter({reason: len(numbers) for reason, numbers in found.items()}).most_common()
    return {reason: found[reason] for reason, _ in order}


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else 0.0


if __name__ == "__main__":
    main()
