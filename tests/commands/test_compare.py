"""`verify` and `diff`: two models side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import MLP as TEXT
from runs import W1, W2, X, compress, network, reference

from onnxfuse import diff, verify
from onnxfuse.commands.loading import MADE_UP


def test_verify(path: Path) -> None:
    folded = compress(path).model
    same = verify(path, folded, calib={"x": X})
    assert (same.passed, same.reason, same.divergence) == (True, None, None)
    other = verify(path, network(w2=W2 * np.float32(1.01)), calib={"x": X})
    assert not other.passed
    assert other.divergence is not None
    assert other.divergence.tensor == "y"
    (output,) = other.comparison.outputs
    y = reference(np.concatenate([X[:1], X[:3], X]))  # batches of one and of three, then all
    expected = 0.01 * np.sqrt(np.sum(y**2) / np.sum((y - y.mean(axis=0)) ** 2))
    assert output.relative == pytest.approx(expected, rel=1e-3)
    assert verify(path, network(w2=W2 * np.float32(1.01)), calib={"x": X}, max_error=2 * expected).passed
    tight = verify(path, network(w2=W2 * np.float32(1.01)), calib={"x": X}, max_error=0.5 * expected)
    assert "above" in str(tight.reason)


def test_verify_of_nan_and_interfaces(path: Path) -> None:
    nan = verify(path, network(w2=np.full_like(W2, np.nan)), max_error=10.0)
    assert "NaN" in str(nan.reason)
    assert nan.warnings[0] == MADE_UP
    other = verify(
        path, network(TEXT.replace("y = MatMul", "z = MatMul").replace("] y)", "] z)")), max_error=10.0
    )
    assert (other.passed, other.comparison.outputs) == (False, ())
    assert "output 'y'" in str(other.reason)


def test_diff(path: Path) -> None:
    text = TEXT.replace("r = Relu(h)", "r = LeakyRelu<alpha = 0.5>(h)").replace("i = Identity(r)\n", "")
    w2 = W2.copy()
    w2[0] *= 2
    found = diff(path, network(text.replace("MatMul(i", "MatMul(r"), w2=w2), calib={"x": X})
    structure = found.structure
    assert [(node.key, node.op) for node in structure.only_a] == [("i", "Identity")]
    assert structure.only_b == ()
    assert structure.same == 1
    relu, last = structure.changed
    assert (relu.key, relu.what) == ("r", ("operator Relu -> LeakyRelu", "alpha none -> 0.5"))
    assert last.what == ("input 0 'i' -> 'r'",)
    (weight,) = last.weights
    assert weight.relative == pytest.approx(np.linalg.norm(W2[0]) / np.linalg.norm(W2), rel=1e-6)
    assert [found.costs[0].nodes, found.costs[1].nodes] == [4, 3]
    assert found.outputs is not None
    assert found.outputs.outputs[0].relative > 0.01


def test_diff_of_shapes_attributes_and_models_that_do_not_run(path: Path) -> None:
    wide = network(w1=np.hstack([W1, W1]), w2=np.vstack([W2, W2]))
    first = diff(path, wide).structure.changed[0].weights[0]
    assert (first.shape_a, first.shape_b, first.relative) == ((6, 16), (6, 32), None)
    same = diff(path, network())
    assert (same.structure.changed, same.structure.same) == ((), 4)
    strange = network()
    strange.graph.node[1].domain = "acme"
    strange.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    found = diff(path, strange)
    assert found.outputs is None
    assert any(warning.startswith("the outputs are not compared: ") for warning in found.warnings)
    assert found.structure.changed[0].what == ("operator Relu -> acme::Relu",)
