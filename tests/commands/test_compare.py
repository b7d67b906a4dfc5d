"""`verify` and `diff`: two models side by side."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import MLP as TEXT
from runs import W1, W2, X, compress, network, reference

from onnxfuse import InputError, VerifyResult, diff, verify
from onnxfuse.commands import compare
from onnxfuse.commands.loading import MADE_UP
from onnxfuse.report.compare_view import verify_view
from onnxfuse.report.tables import plain_text
from onnxfuse.runtime.latency import Control, Latency, Timing


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


def promised(result: VerifyResult) -> list[tuple[str, bool]]:
    return [(promise.name, promise.passed) for promise in result.promises]


def test_promises(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = network(w2=W2 * np.float32(1.01))
    interface = ("same inputs and outputs", True)
    found = verify(path, other, calib={"x": X}, metric="agreement", max_drop=0.05)
    assert promised(found) == [interface, ("agreement down by at most 0.05", True)]
    assert (found.passed, found.verdict) == (True, "agreement down by at most 0.05")
    found = verify(path, other, calib={"x": X}, metric="cosine", max_error=0.1)
    assert promised(found) == [interface, ("within 0.1", True)]
    assert found.metric is not None
    assert found.metric.scores.after == pytest.approx(1)
    found = verify(path, network(w2=-W2), calib={"x": X}, metric="agreement", max_drop=0.05, max_error=0.1)
    assert promised(found)[1:] == [("within 0.1", False), ("agreement down by at most 0.05", False)]
    assert found.verdict == "not within 0.1, not agreement down by at most 0.05"
    assert str(found.promises[2].reason).startswith("agreement drops by ")
    same = verify(path, path, calib={"x": X}, metric="agreement", max_drop=0.0)
    assert same.passed  # the noise floor has proved it, whatever the number of samples


@pytest.mark.parametrize(
    ("confidence", "unstable", "passed"), [(None, None, False), ("none", None, True), ("none", "busy", False)]
)
def test_latency_is_promised(
    confidence: str | None, unstable: str | None, passed: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Timing(1.0, (1.0, 1.0), 1.0, 1.0, 1.0), Timing(0.8, (0.8, 0.8), 0.8, 0.7, 0.95)
    control = Control(1.0, 0.99, 1.01)
    timed = Latency((first, second), control, 1, 1, ("CPUExecutionProvider",), 1, "cpu", None, unstable)
    monkeypatch.setattr(compare, "latency", lambda *_, **__: timed)
    found = verify(path, path, calib={"x": X}, max_latency=0.9, confidence=confidence)
    assert promised(found)[1:] == [("same", True), ("latency at most 0.9", passed)]
    if unstable is None and not passed:
        assert found.reason == (
            "latency is x 0.800 (95%: 0.700 to 0.950) of the original's, not surely within --max-latency 0.9"
        )
    assert "A/A control" in plain_text(verify_view(found))


def test_limits_of_latency(path: Path) -> None:
    with pytest.raises(InputError, match=r"it is a ratio.*for 70 % write --max-latency 0.7"):
        verify(path, path, max_latency=70)


def test_damage_breaks_every_promise_on_outputs(path: Path) -> None:
    nan = network(w2=np.full_like(W2, np.nan))
    found = verify(path, nan, calib={"x": X}, metric="agreement", max_drop=0.5, max_error=0.5)
    assert [promise.passed for promise in found.promises] == [True, False, False]
    assert all("NaN" in str(promise.reason) for promise in found.promises[1:])


def test_reports_of_verify(path: Path) -> None:
    folder, junit = path.with_name("report"), path.parent / "ci" / "junit.xml"
    found = verify(path, network(w2=-W2), calib={"x": X}, max_error=0.1, report=folder, junit=junit)
    assert json.loads((folder / "report.json").read_text()) == found.to_dict()
    text = (folder / "report.txt").read_text()
    assert str(found.reason) in text
    assert max(map(len, text.splitlines()[:-1])) <= 80
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert suite.attrib["failures"] == "1"
    with pytest.raises(InputError):
        verify(path, path, calib={"x": X[:, :2]}, junit=junit)
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert (suite.attrib["errors"], suite.find("testcase/error") is not None) == ("1", True)


def test_verify_of_nan_and_interfaces(path: Path) -> None:
    nan = verify(path, network(w2=np.full_like(W2, np.nan)), max_error=1.0)
    assert "NaN" in str(nan.reason)
    assert nan.warnings[0] == MADE_UP
    other = verify(
        path, network(TEXT.replace("y = MatMul", "z = MatMul").replace("] y)", "] z)")), max_error=1.0
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
