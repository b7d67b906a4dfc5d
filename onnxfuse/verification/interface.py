"""Comparison without a run: do two models have the same inputs and outputs, and is a rewrite valid?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.protos import light_graph
from onnxfuse.runtime.feeds import format_shape

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model
    from onnxfuse.ir.shapes import TensorInfo
    from onnxfuse.runtime.session import Runtime


def structure_problem(before: Model, after: Model, runtime: Runtime) -> str | None:
    """Why `after` is no valid rewrite of `before`, judged without running it; None if it is one.

    Inputs and outputs must be the same, in the same order; the ONNX checker must not object to anything it
    did not object to before; ONNX Runtime must load it.

    Args:
        before: the model that was rewritten.
        after: the rewritten one.
        runtime: loads it.
    """
    if problems := interface_problems(before, after, ("the model before", "the result")):
        return problems[0]
    for kind, ours, theirs in (
        ("inputs", before.inputs, after.inputs),
        ("outputs", before.outputs, after.outputs),
    ):
        if [info.name for info in ours] != [info.name for info in theirs]:
            return f"the order of the {kind} changed"
    complaint = _checker_complaint(after)
    if complaint is not None and complaint != _checker_complaint(before):
        return f"the result is no valid ONNX model: {complaint}"
    try:
        runtime.session(after)
    except NotApplicableError as error:
        return f"the result: {error}"
    return None


def _checker_complaint(model: Model) -> str | None:
    """The ONNX checker's first line about the graph. It goes without bulky weights: the checker wants their
    values, external files included, and fails above 2 GB, but says nothing about values that is worth
    that."""
    proto = model.to_proto()
    light = light_graph(proto.graph, keep_dims=False)
    proto.graph.CopyFrom(light)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def interface_problems(a: Model, b: Model, labels: tuple[str, str]) -> list[str]:
    """Differences between two models' inputs and outputs by name, type and declared shape, a line each.

    Args:
        a, b: the models.
        labels: what the lines call the two.
    """
    problems: list[str] = []
    for kind, left, right in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        ours, theirs = {info.name: info for info in left}, {info.name: info for info in right}
        for names, owner, other in ((ours, *labels), (theirs, *reversed(labels))):
            missing = [name for name in names if name not in (theirs if names is ours else ours)]
            problems.extend(f"{kind} '{name}' is in {owner} and not in {other}" for name in missing)
        for name in ours.keys() & theirs.keys():
            if difference := _declared_difference(ours[name], theirs[name]):
                problems.append(
                    f"{kind} '{name}' is {difference[0]} in {labels[0]} and {difference[1]} in {labels[1]}"
                )
    return problems


def _declared_difference(a: TensorInfo, b: TensorInfo) -> tuple[str, str] | None:
    """Types or shapes of two declarations that contradict each other, in words; None where none do. An
    unknown or dynamic size contradicts nothing."""
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        return str(a.dtype), str(b.dtype)
    if a.shape is None or b.shape is None:
        return None
    sizes = zip(a.shape, b.shape, strict=False)
    clash = any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in sizes)
    if clash or len(a.shape) != len(b.shape):
        return format_shape(a.shape), format_shape(b.shape)
    return None
