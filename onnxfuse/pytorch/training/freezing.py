"""Which weights a retraining trains, and which stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.rules.normalization import BatchNorm
from onnxfuse.pytorch.bridge.weights import Weight, is_trainable, stored

_TOO_NARROW = ("float16", "bfloat16")


def trained_weights(model: Model, freeze: Sequence[str]) -> set[tuple[Any, str]]:
    """The weights to train, by scope and name.

    Raises:
        InputError: a pattern matches no weight, or all of them are frozen.
        NotApplicableError: there is nothing to train, or only in a type too narrow for it.
    """
    trainable = [weight for weight in stored(model) if is_trainable(weight)]
    if not trainable:
        raise NotApplicableError("the model has no weights that could be trained")
    frozen = {(weight.scope, weight.name) for weight in _frozen(model, freeze)}
    left = [weight for weight in trainable if (weight.scope, weight.name) not in frozen]
    if not left:
        raise InputError("--freeze leaves nothing to train")
    for weight in left:
        if weight.dtype.name in _TOO_NARROW:
            raise NotApplicableError(
                f"weight '{weight.name}' is {weight.dtype}, too narrow to train; "
                "convert the model to float32 first"
            )
    return {(weight.scope, weight.name) for weight in left}


def frozen_norms(module: fx.GraphModule, model: Model, freeze: Sequence[str]) -> list[nn.Module]:
    """The BatchNorms whose scale is frozen: they normalize by their statistics, which stay, as in eval
    mode.

    Args:
        module: `to_torch` of the model.
        model: whose weights the patterns are about.
        freeze: patterns (fnmatch) of initializers.
    """
    if not freeze:
        return []
    frozen = {weight.key for weight in _frozen(model, freeze)}
    found: list[nn.Module] = []
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        norm = module.get_submodule(str(node.target))
        if isinstance(norm, BatchNorm) and _attribute(node.args[1]) in frozen:
            found.append(norm)
    return found


def _frozen(model: Model, patterns: Sequence[str]) -> list[Weight]:
    weights = stored(model)
    names = [weight.name for weight in weights]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.strip("*?"), names, n=3, cutoff=0.4)
            shown = ", ".join(f"'{name}'" for name in near or names[:3])
            raise InputError(f"--freeze {pattern}: no weight has such a name; there are {shown}, ...")
    return [weight for weight in weights if any(_matches(weight.name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _attribute(node: Any) -> str | None:
    """The weight that a node of torch.fx fetches, through a change of its type."""
    while isinstance(node, fx.Node) and node.op == "call_method":
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None
