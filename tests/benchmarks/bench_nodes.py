"""onnx's own test cases of single operators through the PyTorch import: how many pass, which are refused.

    python tests/benchmarks/bench_nodes.py      # a minute

Cases whose operators all have a rule are imported, run, and compared with the outputs that onnx expects, at
the case's tolerance (tests/node_cases.py).
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from common import fill, machine, parser, table, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from node_cases import FAILED, PASSED, REFUSED, STORED, Outcome, all_cases, cases, outcome

STATUSES = (PASSED, STORED, REFUSED, FAILED)


def main() -> None:
    options = parser(__doc__).parse_args()
    print(f"{machine(options.threads)}, onnx {version('onnx')}, torch {version('torch')}")
    chosen = cases()[:: 20 if options.quick else 1]
    outcomes = [outcome(case) for case in chosen]
    show(outcomes)
    write_json(options.json, {"machine": machine(options.threads), "cases": [asdict(o) for o in outcomes]})
    sys.exit(1 if any(o.status == FAILED for o in outcomes) else 0)


def show(outcomes: Sequence[Outcome]) -> None:
    counts = Counter(o.status for o in outcomes)
    operators = {o.op.removesuffix(" (expanded)") for o in outcomes}
    print(f"\n{len(outcomes)} of {len(all_cases())} cases, of {len(operators)} operators")
    table(("", "cases"), [(status, counts[status]) for status in STATUSES])
    print(
        fill(
            f'"{STORED}": refused as it stands, where what exporters store is an input; passed with all '
            "inputs but the first stored."
        )
    )
    for status in (REFUSED, FAILED):
        print(f"\n{status}")
        for reason, by_op in grouped(o for o in outcomes if o.status == status).items():
            ops = ", ".join(f"{count} {op}" for op, count in sorted(by_op.items()))
            print(fill(f"  {reason}: {ops}", "    "))


def grouped(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """Operators with how many cases each, by reason."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for o in outcomes:
        reason = re.sub(r"node '[^']*' \(\w+\) can't be imported to PyTorch: ", "", o.reason)
        found[reason][o.op] += 1
    return dict(found)


if __name__ == "__main__":
    main()
