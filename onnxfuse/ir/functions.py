"""Models without local functions: every call replaced by the nodes of its function.

onnx's inliner leaves the defaults of a function's attributes aside (`attribute_proto`): they are written on
the calls first. A call in a function may hand on an attribute that its own caller left out, and only then
does the default of the inner function count: so functions are inlined from the outermost inward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx.inliner
from onnx import FunctionProto, ModelProto, NodeProto

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir import protos
from onnxfuse.ir.model import Model


def without_functions(model: Model) -> Model:
    """The model with its local functions inlined and the main graph's names kept; itself if it has none."""
    if not model.source.functions:
        return model
    flat: Model = model.cached("flat", lambda: Model.load(inlined(model.to_proto()), data=model.data))
    return flat


def inlined(proto: ModelProto) -> ModelProto:
    """The model with its local functions inlined.

    Raises:
        NotApplicableError: onnx can't inline them, for instance because they are of other operator sets.
    """
    result = ModelProto()
    result.CopyFrom(proto)
    _agree_on_operators(result)
    while result.functions:
        _write_defaults(result)
        try:
            result = onnx.inliner.inline_selected_functions(result, _outermost(result.functions))
        except RuntimeError as error:
            raise NotApplicableError(f"the local functions can't be inlined: {error}") from error
    return result


def _agree_on_operators(model: ModelProto) -> None:
    """Give model and functions the same operator sets; loading has checked that theirs mean the same."""
    versions = {o.domain: o.version for o in protos.light_imports(model.opset_import)}
    for function in model.functions:
        for imported in protos.light_imports(function.opset_import):
            if imported.domain not in versions:
                versions[imported.domain] = imported.version
                model.opset_import.append(imported)
    for function in model.functions:
        for imported in function.opset_import:
            imported.version = versions["" if imported.domain in protos.DEFAULT_DOMAINS else imported.domain]


def _outermost(functions: Iterable[FunctionProto]) -> list[tuple[str, str]]:
    """Domain and name of those that no other function calls."""
    called = {(node.domain, node.op_type) for function in functions for node in _all(function.node)}
    names = dict.fromkeys((function.domain, function.name) for function in functions)
    return [name for name in names if name not in called]


def _write_defaults(model: ModelProto) -> None:
    """Give the calls in the main graph and its bodies the attributes that their functions default to."""
    defaults = {(f.domain, f.name, f.overload): f.attribute_proto for f in model.functions}
    for node in _all(model.graph.node):
        given = {attribute.name for attribute in node.attribute}
        wanted = defaults.get((node.domain, node.op_type, node.overload), ())
        node.attribute.extend(attribute for attribute in wanted if attribute.name not in given)


def _all(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes and those of their bodies."""
    for node in nodes:
        yield node
        for body in protos.bodies(node):
            yield from _all(body.node)
