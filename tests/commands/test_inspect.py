"""`inspect`: the figures it tells of a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from runs import W1, network

from onnxfuse import compress, diff, inspect
from onnxfuse.analysis.cost import DECLARED_ONLY


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


@pytest.mark.parametrize(
    "body",
    [
        "y = Conv(v, w)",
        "y = MatMul(s, m)",
        'y = Einsum<equation="abc,cd->abd">(x, m)',
        "h = MatMul(x, m)  r = Relu(h)  t = Transpose<perm=[0,3,1,2]>(r)  y = MatMul(t, m)",
        "c = Conv(x, w)  t = Transpose<perm=[0,5]>(c)  y = Conv(t, w)",
    ],
)
def test_ranks_that_no_operator_takes_are_no_crash(body: str) -> None:
    """ONNX Runtime refuses such a model, so nothing has checked what the rules count on."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,6,8,8] x, float[6] v, float s) '
        "=> (float[A,B,C,D] y) <float[1] w = {1.0}, float[1] m = {1.0}> { " + body + " }"
    )
    proto = onnx.parser.parse_model(text)
    for tensor, dims in zip(proto.graph.initializer, ([6, 6, 1, 1], [6, 6]), strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(dims, np.float32), tensor.name))
    found = inspect(proto, channels=True, growth=True, measure_latency=False)
    assert found.cost.macs is None
    assert "ONNX Runtime cannot load the model" in found.warnings[0]


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


def test_counts_are_of_a_run_and_what_the_file_declares_otherwise_is_told() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[x0,3,8,8] x) => (float[b,4,b,c] y) { y = Conv<pads = [1,1,1,1]>(x, w) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w"))
    said = "'y' is declared as [b, 4, b, c] and is [1, 4, 8, 8] in a run: counts are of the run"
    found = inspect(proto, measure_latency=False)
    assert found.cost.macs == found.linear[0].macs == 64 * 4 * 27
    assert said in found.warnings
    assert said in json.loads(found.to_json())["warnings"]
    other = diff(proto, proto)
    assert [cost.macs for cost in other.costs] == [64 * 4 * 27] * 2
    assert other.warnings.count(said) == 1
    report = compress(proto, "fold", calib={"x": np.ones((8, 3, 8, 8), np.float32)}, provider="cpu").report
    assert (report.before.macs, report.after.macs) == (64 * 4 * 27,) * 2
    assert said in report.warnings


def test_counts_that_no_run_confirms_say_so() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4,6] x) => (float[1,3] y) <int64[1] i = {99}> { r = Gather(x, i) y = MatMul(r, w) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((6, 3), np.float32), "w"))
    for samples in (None, {"x": np.ones((8, 6), np.float32)}):
        found = inspect(proto, calib=samples)
        assert (found.cost.macs, found.sizes, found.latency) == (18, {}, None)
        assert len(found.warnings) == 2
        assert DECLARED_ONLY in found.warnings
    assert DECLARED_ONLY in diff(proto, proto).warnings
