"""Attribute paths: under which name a module holds each Parameter and buffer."""

from __future__ import annotations

import keyword
import re

import torch
from torch import fx, nn

CALLED = "_ops"
"""The submodule with what a GraphModule calls (bodies, BatchNorms) and constants that are no weights. Nothing
in it is part of the state_dict."""

_RESERVED = set(dir(nn.Module())) | set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) | {"self"}


class Keys:
    """Attribute paths, each claimed once: none is a prefix of another, or hides an attribute of a module."""

    def __init__(self) -> None:
        self._leaves: set[str] = set()
        self._modules: set[str] = {CALLED}

    def claim(self, name: str) -> str:
        """`name` if it can be a path, else one made from it."""
        key = self._legal(name)
        base, count = key, 0
        while not self._free(key):
            count += 1
            key = f"{base.replace('.', '_')}_{count}"
        self._leaves.add(key)
        parts = key.split(".")
        self._modules.update(".".join(parts[:end]) for end in range(1, len(parts)))
        return key

    def _free(self, key: str) -> bool:
        parts = key.split(".")
        above = {".".join(parts[:end]) for end in range(1, len(parts))}
        taken = key in self._leaves or key in self._modules or above & self._leaves or parts[0] == CALLED
        return not taken and not any(part in _RESERVED or keyword.iskeyword(part) for part in parts)

    @staticmethod
    def _legal(name: str) -> str:
        """The name as torch.fx can write it between double quotes, without empty parts between its dots."""
        clean = re.sub(r"[\"'\\{}]|[^\x20-\x7e]", "_", name)
        parts = clean.split(".")
        return clean if all(parts) else clean.replace(".", "_") or "_"


def put(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Register a Parameter or buffer.

    Args:
        module: holds it; modules on the way to it are made.
        key: its attribute path.
        tensor: becomes a buffer, if it is no Parameter.
    """
    *above, leaf = key.split(".")
    for name in above:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)
