"""`inspect`: the figures it tells of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from runs import W1, network

from onnxfuse import inspect


def test_inspect(path: Path) -> None:
    proto = network()
    proto.producer_name, proto.producer_version = "someone", "1.2"
    proto.metadata_props.add(key="classes", value="a,b,c,d")
    onnx.save(proto, path)
    found = inspect(path)
    assert (found.ir_version, found.opsets, found.producer) == (8, {"ai.onnx": 17}, "someone 1.2")
    assert found.metadata == {"classes": "a,b,c,d"}
    assert [info.name for info in (*found.inputs, *found.outputs)] == ["x", "y"]
    assert found.operators == {"MatMul": 2, "Identity": 1, "Relu": 1}
    assert (found.cost.parameters, found.cost.macs, found.cost.bytes) == (160, 160, 640)
    assert found.sizes == {"x": (1, 6)}
    assert [(op.name, op.in_features, op.out_features, op.macs) for op in found.linear] == [
        ("h", 6, 16, 96),
        ("y", 16, 4, 64),
    ]
    assert [op.share for op in found.linear] == pytest.approx([0.6, 0.4])
    assert [(region.u, region.v, region.linear_ops) for region in found.regions] == [("x", "y", 2)]
    assert found.latency is not None
    assert found.warnings == ()


def test_inspect_without_a_run(path: Path) -> None:
    proto = network()
    proto.graph.node[1].domain = "acme"
    proto.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    found = inspect(proto)
    assert found.operators["acme::Relu"] == 1
    assert (found.cost.macs, found.latency, found.sizes) == (None, None, {})
    assert len(found.warnings) == 1
    assert len(found.linear) == 2
    assert inspect(path, measure_latency=False).latency is None


def test_inspect_warns_of_weights_that_are_no_numbers() -> None:
    found = inspect(network(w1=np.full_like(W1, np.nan)))
    assert any("NaN" in warning for warning in found.warnings)


def test_inspect_counts_the_nodes_of_bodies() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x, bool flag) => (float[2] y) {
        y = If (flag) <then_branch = a () => (float[2] p) { p = Relu(x) },
                       else_branch = b () => (float[2] q) { q = Neg(x) }>
    }"""
    assert inspect(onnx.parser.parse_model(text)).operators == {"If": 1, "Neg": 1, "Relu": 1}
