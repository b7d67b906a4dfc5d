"""Weights behind a Transpose, as PyTorch's exporter writes them: every pass does to them what it does to the
same weights stored straight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import compute, context, net, normal, one_step

from onnxfuse.ir.model import Model
from onnxfuse.passes.cluster import Cluster
from onnxfuse.passes.fuse import Fuse
from onnxfuse.passes.lowrank import Lowrank
from onnxfuse.passes.merge import Merge
from onnxfuse.passes.prune import Prune
from onnxfuse.pipeline.base import Pass

NAMES = ("w0", "w1", "w2", "w3")
SHAPES = dict(zip(NAMES, ((6, 16), (16, 16), (16, 16), (16, 3)), strict=True))


def network(*, transposed: bool, aliased: bool = False) -> Model:
    weights = {name: normal(*shape, seed=i) / 4 for i, (name, shape) in enumerate(SHAPES.items())}
    alias = "".join(f"a{name} = Identity({name}) " for name in NAMES) if aliased else ""
    source = "a" if aliased else ""
    laid = "".join(f"t{name} = Transpose<perm=[1,0]>({source}{name}) " for name in NAMES)
    v = "t" if transposed else ""
    body = f"""a = MatMul(x, {v}w0) r = Relu(a) b = MatMul(r, {v}w1) s = Relu(b)
        c = MatMul(s, {v}w2) u = Relu(c) y = MatMul(u, {v}w3)"""
    if transposed:
        weights = {name: np.ascontiguousarray(value.T) for name, value in weights.items()}
    return net(alias + (laid if transposed else "") + body, weights, x="float[N,5,6] x", y="float[A,B,C] y")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Merge, {"layers": 0.25, "criterion": "euclidean"}),
        (Lowrank, {"params": 0.6}),
        (Prune, {"amount": 0.5}),
        (Cluster, {"values": 4}),
        (Cluster, {"values": 4, "codebook": True}),
        (Fuse, {"max_blocks": 1}),
    ],
    ids=lambda value: value.name if isinstance(value, type) else None,
)
def test_as_if_it_were_stored_straight(kind: type[Pass], options: dict[str, Any]) -> None:
    x = normal(96, 5, 6)
    outputs, changes = [], []
    for model in (
        network(transposed=False),
        network(transposed=True),
        network(transposed=True, aliased=True),
    ):
        made, report = one_step(kind, model, context(model, {"x": x}), **options)
        outputs.append(compute(made, {"x": x[:7]})[0])
        changes.append([change.what.split(",")[0] for change in report.changes])
    assert changes[0]
    assert changes[1] == changes[2] == changes[0]
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], rtol=1e-3, atol=1e-4)
