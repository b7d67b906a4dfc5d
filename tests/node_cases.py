"""onnx's own test cases of single operators, through the import.

Every case is a graph with inputs and the outputs to expect. Operators that an operator set redefines have
cases in that set only: sets newer than ONNX Runtime knows are declared as the newest that it does (they add
types), older ones than onnxfuse reads as the oldest. What an exporter writes as constants (weights,
axes, shapes, pads) a case feeds as inputs; where the import refuses that, the case is tried once more with
all inputs but the first stored in the graph.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import torch
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import operators, to_torch
from onnxfuse.pytorch.bridge.tensors import to_tensor, torch_type
from onnxfuse.runtime.session import Runtime

NEWER = "the operator set is newer than ONNX Runtime's"
PASSED, STORED, REFUSED, FAILED = "passed", "passed with stored inputs", "refused", "failed"

DISPUTED = (
    "test_resize_downsample_scales_linear_align_corners",
    "test_resize_downsample_scales_cubic_align_corners",
)
"""Cases that ONNX Runtime answers otherwise than onnx does; the import has to agree with ONNX Runtime."""

OLDEST_OPSET, IR_VERSION = 7, 10

RANDOM = ("test_bernoulli", "test_training_dropout")
"""Cases whose expected outputs come from NumPy's random numbers."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case. `op` is the operator it is about."""

    case: str
    op: str
    status: str
    reason: str = ""


def cases() -> list[Any]:
    """Cases all of whose operators can be imported, but for those that are random."""
    known = operators()
    return [
        case
        for case in all_cases()
        if _operators(case.model.graph) <= known
        and not case.model.functions
        and not case.name.startswith(RANDOM)
    ]


@functools.cache
def all_cases() -> list[Any]:
    """Every case of the installed onnx."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # cases divide by zero on purpose
        found: list[Any] = collect_testcases(None)
    return found


@functools.cache
def _by_name() -> dict[str, Any]:
    return {case.name: case for case in all_cases()}


def _operators(graph: GraphProto) -> set[str]:
    found = set()
    for node in graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        found.add(f"{domain}::{node.op_type}" if domain else node.op_type)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                found |= _operators(body)
    return found


def outcome(case: Any) -> Outcome:
    """Import the case and run it."""
    op = _subject(case)
    feeds = [[array(value) for value in inputs] for inputs, _ in case.data_sets]
    expected = [[array(value) for value in outputs] for _, outputs in case.data_sets]
    status, reason = _tried(case, case.model, feeds, expected)
    if status == REFUSED and len(feeds[0]) > 1 and all(isinstance(a, np.ndarray) for a in feeds[0]):
        stored = _with_stored_inputs(case.model, feeds[0])
        again, why = _tried(case, stored, [feeds[0][:1]], expected[:1])
        if again != REFUSED:
            status, reason = (STORED if again == PASSED else again), why
    return Outcome(case.name, op, status, reason)


def _subject(case: Any) -> str:
    """The operator; one that is written out as the function which defines it is "Op (expanded)"."""
    base = case.name.split("_expanded")[0]
    op = _by_name().get(base, case).model.graph.node[0].op_type
    return op if base == case.name else f"{op} (expanded)"


def _tried(
    case: Any, proto: ModelProto, feeds: Sequence[list[Any]], expected: Sequence[list[Any]]
) -> tuple[str, str]:
    if unknown := sorted(
        {str(getattr(a, "dtype", "list")) for feed in feeds for a in feed if not _has_torch(a)}
    ):
        return REFUSED, f"no torch tensor can be fed as {unknown[0]}"
    try:
        module = to_torch(Model.load(_declared(proto)))
    except NotApplicableError as error:
        return REFUSED, str(error)
    except InputError as error:
        lowered = _declared(proto).opset_import[0].version < proto.opset_import[0].version
        return (REFUSED, NEWER) if lowered else (FAILED, f"import: {error}")
    except Exception as error:  # a crash of any kind is a failure
        return FAILED, f"import: {type(error).__name__}: {error}"
    for feed, wanted in zip(feeds, expected, strict=True):
        try:
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints tracebacks
                found = module(*(_tensor(value) for value in feed))
        except NotApplicableError as error:
            return REFUSED, str(error)
        except Exception as error:
            return FAILED, f"run: {type(error).__name__}: {error}"
        if case.name in DISPUTED:
            wanted = _by_onnx_runtime(proto, feed)
        if problem := _difference(wanted, found, case.rtol, case.atol):
            return FAILED, problem
    return PASSED, ""


def _declared(proto: ModelProto) -> ModelProto:
    """The model with an operator set that onnxfuse and ONNX Runtime know (module docstring)."""
    changed = ModelProto()
    changed.CopyFrom(proto)
    changed.ir_version = min(changed.ir_version, IR_VERSION)
    for opset in changed.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = min(max(opset.version, OLDEST_OPSET), _newest_opset())
    return changed


@functools.cache
def _newest_opset() -> int:
    newest = onnx.defs.onnx_opset_version()
    while True:
        try:
            Model.load(onnx.parser.parse_model(_IDENTITY % newest))
        except InputError:
            newest -= 1
        else:
            return newest


_IDENTITY = '<ir_version: 10, opset_import: ["" : %d]> g (float[1] x) => (float[1] y) { y = Identity(x) }'


def _with_stored_inputs(proto: ModelProto, feed: Sequence[Any]) -> ModelProto:
    """The case with initializers for all inputs but the first."""
    changed = ModelProto()
    changed.CopyFrom(proto)
    del changed.graph.input[1:]
    for info, value in zip(proto.graph.input[1:], feed[1:], strict=True):
        changed.graph.initializer.append(numpy_helper.from_array(value, info.name))
    return changed


def _by_onnx_runtime(proto: ModelProto, feed: Sequence[Any]) -> list[Any]:
    model = Model.load(_declared(proto))
    names = [info.name for info in model.inputs]
    return list(Runtime("cpu").session(model).run(dict(zip(names, feed, strict=True))).values())


def array(value: Any) -> Any:
    """An input or output of a case as an array, a list of them, or None."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, (list, tuple)):
        return [array(item) for item in value]
    return None if value is None else np.asarray(value)


def _has_torch(value: Any) -> bool:
    """Whether torch has tensors of this type."""
    if isinstance(value, list):
        return all(_has_torch(item) for item in value)
    return value is None or torch_type(value.dtype) is not None


def _tensor(value: Any) -> Any:
    if isinstance(value, list):
        return [_tensor(item) for item in value]
    if value is None:
        return None
    return to_tensor(value)


def _difference(wanted: Sequence[Any], found: Any, rtol: float, atol: float) -> str:
    """What is wrong with the outputs; "" if nothing is."""
    results = list(found) if isinstance(found, (tuple, list)) and len(wanted) > 1 else [found]
    if len(results) != len(wanted):
        return f"{len(results)} outputs, not {len(wanted)}"
    for number, (a, b) in enumerate(_leaves(wanted, results)):
        if not isinstance(b, torch.Tensor):
            return f"output {number} is a {type(b).__name__}"
        dtype = str(b.dtype).removeprefix("torch.")
        if dtype != a.dtype.name or tuple(b.shape) != a.shape:
            return f"output {number} is {dtype} {list(b.shape)}, not {a.dtype} {list(a.shape)}"
        complex_type = a.dtype.kind == "c"
        wide, exact = (np.complex128 if complex_type else np.float64), a.dtype.kind in "iub"
        x, y = a.astype(wide), b.to(torch.complex128 if complex_type else torch.float64).numpy()
        # a sum is as exact as its largest term: two last places of the output's largest element
        noise = (
            0.0 if exact else 2 * torch.finfo(b.dtype).eps * float(np.abs(x[np.isfinite(x)]).max(initial=0))
        )
        if not (np.array_equal(x, y) if exact else np.allclose(y, x, rtol, atol + noise, equal_nan=True)):
            return f"output {number} has other values, by {np.nanmax(np.abs(x - y)):.2g} at most"
    return ""


def _leaves(wanted: Sequence[Any], found: Sequence[Any]) -> Iterator[tuple[np.ndarray, Any]]:
    for a, b in zip(wanted, found, strict=True):
        if isinstance(a, list):
            yield from _leaves(a, list(b))
        else:
            yield a, b
