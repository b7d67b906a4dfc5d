"""Passes and samples in all the forms in which Python gives them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from runs import LABELS, Scale, X, compress, network

import onnxfuse
from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.passes.fuse import Fuse

# --- passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [
        "fold,fuse:max_blocks=1",
        ["fold", {"fuse": {"max_blocks": 1}}],
        ["fold,fuse:max_blocks=1"],
        ("fold", "fuse:max_blocks=1"),
        [{"fold": None}, {"fuse": {"max_blocks": 1}}],
        ["fold", Fuse(max_blocks=1)],
    ],
)
def test_forms_of_passes(passes: Any) -> None:
    steps = compress(network(), passes).steps
    assert [step.name for step in steps] == ["fold", "fuse"]
    assert steps[1].options["max_blocks"] == 1


def test_passes_that_are_mixed_run_in_order() -> None:
    scale = Scale(1.0001)
    result = compress(network(), [{"fold": {}}, scale])
    assert [step.name for step in result.steps] == ["fold", "scale"]
    assert result.steps[1].options == {}


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("melt", "there is no pass 'melt'; "),
        (["fold", "fusee"], "there is no pass 'fusee'; did you mean 'fuse'?"),
        ([{"fuse": {"blocks": 3}}], "pass 'fuse': there is no option 'blocks'"),
        ([{"fuse": {"max_blocks": "many"}}], "pass 'fuse': option 'max_blocks' "),
        ([], "'passes' must be a list of names or of name: {option: value}"),
        (3, "'passes' must be a list of names or of name: {option: value}"),
        ({"fuse": {}}, "'passes' must be a list of names or of name: {option: value}"),
        (Fuse(), "'passes' must be a list of names or of name: {option: value}"),
        ([3], "3 is not a pass; write a name or name: {option: value}"),
        ([Fuse], "is not a pass; write a name or name: {option: value}"),
        ([None], "None is not a pass; write a name or name: {option: value}"),
        ([{"fuse": 3}], "{'fuse': 3} is not a pass; write a name or name: {option: value}"),
        ([{"fold": {}, "fuse": {}}], "{'fold': {}, 'fuse': {}} is not a pass; "),
        ([{}], "{} is not a pass; "),
    ],
)
def test_bad_forms_of_passes(passes: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        compress(network(), passes)


# --- samples ------------------------------------------------------------------------------------------------

TWO = """<ir_version: 8, opset_import: ["" : 17]>
two (float[N,6] a, float[N,6] b) => (float[N,6] y) { y = Add(a, b) }"""


@pytest.fixture
def other() -> onnx.ModelProto:
    """The same network, its last weights a little off."""
    proto = network()
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[1])
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weight * np.float32(1.01), "w2"))
    return proto


def test_one_array_is_the_samples_of_the_only_input(other: onnx.ModelProto) -> None:
    named = compress(network(), "fold", calib={"x": X})
    bare = compress(network(), "fold", calib=X)
    assert bare.report.samples == named.report.samples
    assert bare.report.output_error == named.report.output_error
    grown = onnxfuse.grow(network(), widen={"all": 2}, calib=X, provider="cpu")
    assert grown, grown.reason
    assert (grown.report.samples.fitted, grown.report.samples.synthetic) == (160, False)
    verdicts = [onnxfuse.verify(network(), other, calib=calib) for calib in (X, {"x": X})]
    assert verdicts[0] == verdicts[1]
    assert (verdicts[0].samples.fitted, verdicts[0].samples.held_out) == (0, len(X))
    found = onnxfuse.diff(network(), other, calib=X)
    assert found.outputs == verdicts[0].comparison
    assert onnxfuse.inspect(network(), calib=X[:3], measure_latency=False).sizes == {"x": (1, 6)}


def test_one_array_to_retrain_on(other: onnx.ModelProto) -> None:
    more = {"teacher": network(), "loss": "mse", "epochs": 1, "provider": "cpu", "device": "cpu"}
    results = [onnxfuse.retrain(other, data, **more) for data in (X, {"x": X})]
    weights = [result.model.weight(result.model.tensor("w2")) for result in results]
    np.testing.assert_array_equal(*weights)
    result = compress(network(), [Scale(1.05)], retrain=X, epochs=1)
    assert result.report.retrainings[0].samples.fitted == 160


def test_one_array_from_a_script(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    script = tmp_path / "data.py"
    script.write_text(f"import numpy\ndef load_data():\n    return numpy.load({str(tmp_path / 'x.npy')!r})\n")
    found = Calibration.open(f"{script}:load_data", Model.load(network()), held_out=0.0)
    np.testing.assert_array_equal(np.concatenate([batch.feed["x"] for batch in found.fit]), X)


def test_one_array_is_not_for_several_inputs() -> None:
    said = "the samples: one array is for a model with one input; give a dict of arrays: 'a', 'b'"
    message = re.escape(said)
    proto = onnx.parser.parse_model(TWO)
    with pytest.raises(InputError, match=message):
        compress(proto, "fold", calib=X)
    with pytest.raises(InputError, match=message):
        onnxfuse.verify(proto, proto, calib=X)
    with pytest.raises(InputError, match=message):
        onnxfuse.diff(proto, proto, calib=X)
    with pytest.raises(InputError, match=message):
        onnxfuse.inspect(proto, calib=X)
    with pytest.raises(InputError, match=message):
        onnxfuse.grow(proto, widen={"all": 2}, calib=X)
    with pytest.raises(InputError, match=message):
        onnxfuse.retrain(proto, X)


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        (X[:, :5], "the samples array 'x': input 'x' wants shape [?, 6], got [200, 5]"),
        (X.astype(np.float64), "the samples array 'x': input 'x' wants float32, got float64"),
        (X[:0], "the samples has no rows"),
        (LABELS, "the samples array 'x': input 'x' wants float32, got int64"),
    ],
)
def test_one_array_must_fit(calib: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        compress(network(), "fold", calib=calib)
