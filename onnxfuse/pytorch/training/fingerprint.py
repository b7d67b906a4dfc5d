"""What a checkpoint belongs to: a fingerprint of model, data and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import fx

from onnxfuse.ir.marks import KEPT_KEY
from onnxfuse.ir.model import Model
from onnxfuse.ir.protos import light_graph
from onnxfuse.pytorch.training.sampling import Pool


def fingerprint(
    model: Model,
    module: fx.GraphModule,
    pools: Iterable[Pool | None],
    teacher: Model | None,
    decided: tuple[object, ...],
) -> str:
    """A digest of everything that decides what a training does.

    Args:
        model: what is trained; its notes of what is to be kept count.
        module: `to_torch` of the model, whose code, Parameters and buffers count.
        pools: the samples to train on and those held out, None for none.
        teacher: what is learned from, if not labels.
        decided: settings, objective and device, by their `repr`.
    """
    digest = hashlib.sha256()
    digest.update(repr((*decided, torch.__version__, _code(module))).encode())
    digest.update(repr([node.metadata.get(KEPT_KEY) for node in model.nodes]).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for pool in pools:
        if pool is not None:
            digest.update(f"{pool.digest} {pool.items}".encode())
    if teacher is not None:
        _digest_model(digest, teacher)
    return digest.hexdigest()


def _code(module: fx.GraphModule) -> str:
    """The module's code with our own functions by their bare names: where they are defined is no matter."""
    code: str = module.code
    for node in module.graph.nodes:
        home = getattr(node.target, "__module__", None) or ""
        if node.op == "call_function" and home.split(".")[0] == "onnxfuse":
            name = node.target.__name__
            code = code.replace(f"{home}.{name}".replace(".", "_"), name)
    return code


def _digest_model(digest: hashlib._Hash, model: Model) -> None:
    """Graph and weights; external ones are read one at a time."""
    digest.update(light_graph(model.to_proto().graph).SerializeToString(deterministic=True))
    for tensor in model.initializers:
        array = model.weight(tensor)
        assert array is not None
        digest.update(
            np.ascontiguousarray(array).tobytes() if array.dtype.kind != "O" else repr(array).encode()
        )
