"""onnx's own test cases through `inspect`, `fold` and `verify x x`: how many pass, how many are refused, why.

    python tests/benchmarks/bench_backend.py            # five minutes
    python tests/benchmarks/bench_backend.py --light    # and nine architectures of 5 to 550 MB

The cases are those of single operators and the models that the wheel of onnx ships. Each is given its own
inputs as the one sample; where they are no arrays (sequences, optional values), samples are made up, as they
are for the architectures. What is refused for the operator set that it declares is tried once more with
another one: newer ones than ONNX Runtime knows are declared as its newest, older ones than onnxfuse reads are
converted by onnx.version_converter.

What fold made is held against the case by ONNX Runtime as it comes, its optimizations off, and must have
every output of the case, within 1e-5 of its largest element. Anything else than onnxfuse's own errors is a
crash.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from common import fill, machine, parser, table, write_json
from forking import Began, Death, forked, preload
from onnx import ModelProto, TensorProto, numpy_helper

import onnxfuse
from onnxfuse.errors import OnnxfuseError
from onnxfuse.runtime.versions import runtime_accepts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from node_cases import RANDOM, all_cases, array

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
KINDS = ("simple", "pytorch-operator", "pytorch-converted")
STEPS = ("inspect", "fold", "verify")
PASSED, NOTHING, REFUSED, FAILED, WRONG, CRASHED = STATUSES = (
    "passed", "nothing to fold", "refused", "failed its check", "WRONG", "CRASHED",
)  # fmt: skip
OLDEST, CONVERTED, IR_VERSION = 7, 13, 10
CLOSE = 1e-5


@dataclass
class Case:
    """A model, and inputs by name; none where they are no arrays."""

    name: str
    kind: str
    proto: ModelProto
    feed: dict[str, np.ndarray] | None


@dataclass
class Found:
    """What became of a case, by step, and whether its operator set was changed for it."""

    name: str
    kind: str
    statuses: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    changed: bool = False


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--light", action="store_true", help="the architectures, too; takes 3 GB of memory")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side; default 1")
    options = made.parse_args()
    versions = f"onnx {onnx.__version__}"
    print(f"{machine(1)}, {versions}", flush=True)
    cases = list(_cases(options.light))[:: 40 if options.quick else 1]
    preload()
    outcomes = []
    for number, found in forked(
        range(len(cases)), lambda n, began: tried(cases[n], began), options.jobs, 120
    ):
        case = cases[number]
        if isinstance(found, Death):
            found = Found(case.name, case.kind, {found.step: CRASHED}, {found.step: found.reason})
        outcomes.append(found)
        if len(outcomes) % 200 == 0:
            print(f"{len(outcomes):,} of {len(cases):,}", flush=True)
    show(outcomes)
    write_json(options.json, {"machine": f"{machine(1)}, {versions}", "cases": [asdict(o) for o in outcomes]})
    sys.exit(1 if any({WRONG, CRASHED} & set(o.statuses.values()) for o in outcomes) else 0)


def _cases(light: bool) -> Iterator[Case]:
    for case in all_cases():
        inputs = [array(value) for value in case.data_sets[0][0]]
        yield Case(case.name, "single operators", case.model, _feed(case.model, inputs))
    for kind in KINDS:
        for path in sorted((DATA / kind).glob("*/model.onnx")):
            proto = onnx.load(path)
            yield Case(path.parent.name, kind, proto, _feed(proto, _stored_inputs(path.parent, proto)))
    for path in sorted((DATA / "light").glob("*.onnx")) if light else ():
        yield Case(path.stem, "light", onnx.load(path), None)


def _stored_inputs(folder: Path, proto: ModelProto) -> list[Any]:
    """Arrays of the first data set; None for what is no tensor."""
    found: list[Any] = []
    for number, value in enumerate(proto.graph.input):
        path = folder / "test_data_set_0" / f"input_{number}.pb"
        is_tensor = value.type.HasField("tensor_type") and path.exists()
        found.append(numpy_helper.to_array(TensorProto.FromString(path.read_bytes())) if is_tensor else None)
    return found


def _feed(proto: ModelProto, inputs: Sequence[Any]) -> dict[str, np.ndarray] | None:
    if not inputs or not all(isinstance(value, np.ndarray) for value in inputs):
        return None
    return {info.name: value for info, value in zip(proto.graph.input, inputs, strict=False)}


def tried(case: Case, began: Began) -> Found:
    """All steps, with the operator set as it is, and else with another one."""
    found = _steps(case, case.proto, began)
    if found.statuses["inspect"] == REFUSED and "opset" in found.reasons["inspect"]:
        other = _with_another_opset(case.proto)
        if other is not None:
            found = _steps(case, other, began)
            found.changed = True
    return found


def _with_another_opset(proto: ModelProto) -> ModelProto | None:
    """None where the converter of onnx can't."""
    opset = _opset(proto)
    if opset < OLDEST:
        try:
            return onnx.version_converter.convert_version(proto, CONVERTED)
        except Exception:
            return None
    changed = ModelProto()
    changed.CopyFrom(proto)
    changed.ir_version = min(changed.ir_version, IR_VERSION)
    for entry in changed.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = next(n for n in range(opset, 0, -1) if runtime_accepts(n, IR_VERSION))
    return changed


def _opset(proto: ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), OLDEST)


def _steps(case: Case, proto: ModelProto, began: Began) -> Found:
    found = Found(case.name, case.kind)
    actions = {"inspect": _inspected, "fold": _folded, "verify": _verified}
    for step in STEPS:
        began(step)
        try:
            status, reason = actions[step](case, proto)
        except OnnxfuseError as error:
            status, reason = REFUSED, str(error)
        except Exception as error:
            status, reason = CRASHED, f"{type(error).__name__}: {error}"
        found.statuses[step], found.reasons[step] = status, reason
    return found


def _inspected(case: Case, proto: ModelProto) -> tuple[str, str]:
    onnxfuse.inspect(proto, calib=case.feed and [case.feed], measure_latency=False, provider="cpu", threads=1)
    return PASSED, ""


def _folded(case: Case, proto: ModelProto) -> tuple[str, str]:
    held_out = 0.2 if case.feed is None else 0.0
    calib = case.feed and [case.feed]
    result = onnxfuse.compress(proto, "fold", calib=calib, held_out=held_out, provider="cpu", threads=1)
    if result.exit_code == 3:
        return NOTHING, ""
    if result.exit_code:
        return FAILED, result.reason or ""
    problem = "" if case.feed is None else _difference(proto, result.model.to_proto(), case.feed)
    return (WRONG, problem) if problem else (PASSED, "")


def _verified(case: Case, proto: ModelProto) -> tuple[str, str]:
    result = onnxfuse.verify(proto, proto, calib=case.feed and [case.feed], provider="cpu", threads=1)
    if result.passed:
        return PASSED, ""
    random = case.name.startswith(RANDOM) or "random" in case.name
    return (FAILED if random else WRONG), result.reason or ""


def _difference(before: ModelProto, after: ModelProto, feed: dict[str, np.ndarray]) -> str:
    """What is wrong with the outputs of the second; "" if nothing is."""
    wanted, got = _outputs(before, feed), _outputs(after, feed)
    if wanted.keys() != got.keys():
        return f"outputs {list(got)}, not {list(wanted)}"
    for name, a in wanted.items():
        for x, y in zip(*(v if isinstance(v, list) else [v] for v in (a, got[name])), strict=True):
            if not _equal(x, y):
                return f"'{name}' has other values"
    return ""


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.dtype.kind not in "fc":
        return np.array_equal(a, b)
    scale = np.abs(a[np.isfinite(a)]).max(initial=0) * (1e3 if a.dtype.itemsize < 4 else 1)
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=float(scale) * CLOSE, equal_nan=True)


def _outputs(proto: ModelProto, feed: dict[str, np.ndarray]) -> dict[str, Any]:
    """By a session of ONNX Runtime's own."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


# --- tables -------------------------------------------------------------------------------------------------


def show(outcomes: Sequence[Found]) -> None:
    for kind in dict.fromkeys(o.kind for o in outcomes):
        chosen = [o for o in outcomes if o.kind == kind]
        changed = sum(o.changed for o in chosen)
        print(f"\n{len(chosen)} cases: {kind}; {changed} of them with another operator set than they declare")
        counts = {step: Counter(o.statuses.get(step) for o in chosen) for step in STEPS}
        table(("", *STEPS), [(status, *(counts[step][status] for step in STEPS)) for status in STATUSES])
    print()
    reasons = {
        step: Counter(_kind(o.reasons[step]) for o in _those(outcomes, step, REFUSED)) for step in STEPS
    }
    order = sum(reasons.values(), Counter()).most_common()
    table(
        ("refused, because", *STEPS),
        [(kind, *(reasons[step][kind] for step in STEPS)) for kind, _ in order],
    )
    for status in (FAILED, WRONG, CRASHED):
        print(f"\n{status}")
        for step in STEPS:
            for o in _those(outcomes, step, status):
                print(fill(f"  {step} of {o.name}: {o.reasons[step]}", "    "))


def _those(outcomes: Sequence[Found], step: str, status: str) -> list[Found]:
    return [o for o in outcomes if o.statuses.get(step) == status]


REASONS = {
    r"holds NaN or infinity": "a sample holds NaN or infinity",
    r"weight .* has a": "a weight is NaN or infinite",
    r"has no rows|0 rows": "a sample has no rows",
    r"not a tensor but a sequence": "an input is a sequence or optional",
    r"too new|No Op registered|uses opset|attribute: mode": "an operator newer than ONNX Runtime's set",
    r"Numpy_type|Numpy type|Creation of OrtValues": "no way to feed or fetch such a type in Python",
    r"ONNX Runtime cannot load": "ONNX Runtime has no kernel for it, or refuses it",
    r"fails in ONNX Runtime": "ONNX Runtime fails on the sample",
}
"""Kinds of reason by what they say, the first that is found."""


def _kind(reason: str) -> str:
    return next((kind for text, kind in REASONS.items() if re.search(text, reason)), reason[:100])


if __name__ == "__main__":
    main()
