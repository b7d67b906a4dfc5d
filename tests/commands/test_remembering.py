"""No command measures a model on what it was fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from runs import LABELS, Scale, X, compress, held_out, network, reference, run

from onnxfuse import diff, retrain, verify
from onnxfuse.commands.remembering import ALL_FITTED, REFITTED
from onnxfuse.data.fitted import KEY
from onnxfuse.ir.model import Model

FUSE = "fuse:max_blocks=1,ridge=1e-9"
DATA = {"x": X, "labels": LABELS}


def error(model: Model | Path, x: np.ndarray) -> float:
    """The relative error of a model on some samples."""
    found = verify(network(), model, calib={"x": x}, max_error=1.0, provider="cpu")
    (output,) = found.comparison.outputs
    return output.relative


def test_verify_gives_the_error_that_compress_reported(path: Path) -> None:
    output = path.with_name("out.onnx")
    report = compress(path, FUSE, output=output).report
    assert report.output_error is not None
    found = verify(path, output, calib={"x": X}, max_error=1.0, provider="cpu")
    assert found.comparison.outputs[0].relative == pytest.approx(report.output_error.worst)
    assert (found.samples.held_out, found.samples.fitted) == (40, 160)
    assert "160 others are left out" in found.samples.description
    shuffled = np.random.default_rng(0).permutation(X)
    assert error(output, shuffled) == pytest.approx(report.output_error.worst)
    side = diff(path, output, calib={"x": X}, provider="cpu")
    assert side.samples == found.samples
    assert side.outputs is not None
    assert side.outputs.samples == 40 + 1 + 3


def test_other_samples_are_all_used(path: Path) -> None:
    output = path.with_name("out.onnx")
    compress(path, FUSE, output=output)
    found = verify(path, output, calib={"x": X + 1}, max_error=1.0, provider="cpu")
    assert (found.samples.held_out, found.samples.fitted, found.warnings) == (200, 0, ())


def test_samples_made_up_are_samples(path: Path) -> None:
    output = path.with_name("out.onnx")
    report = compress(path, FUSE, calib=None, output=output).report
    found = verify(path, output, max_error=1.0, provider="cpu")
    assert found.samples.held_out == report.samples.held_out


def test_exact_passes_fit_nothing(path: Path) -> None:
    assert compress(path).model.note(KEY) is None


def test_a_chain_of_runs(path: Path) -> None:
    """What any turn has fitted is held out by none after it, whatever its seed."""
    first = compress(path, [Scale(1.05)], calib={"x": X})
    second = compress(first.model, FUSE, calib={"x": X}, seed=7, max_error=None)
    x, _ = held_out(path)
    assert second.report.samples.held_out == 40
    assert REFITTED not in second.report.warnings
    found = verify(path, second.model, calib={"x": X}, max_error=1.0, provider="cpu")
    assert (found.samples.held_out, found.samples.fitted) == (40, 160)
    y = reference(x)
    out = run(second.model.to_proto(), x)
    expected = np.sqrt(np.sum((out - y) ** 2) / np.sum((y - y.mean(axis=0)) ** 2))
    assert found.comparison.outputs[0].relative == pytest.approx(expected, rel=1e-3)
    entries = json.loads(second.model.note(KEY) or "")["runs"]
    assert [(entry["command"], entry["seed"], entry["fitted"]) for entry in entries] == [
        ("compress", 0, 160),
        ("compress", 7, 160),
    ]
    assert entries[0]["data"] == entries[1]["data"]


def test_all_fitted_is_said(path: Path) -> None:
    output = path.with_name("out.onnx")
    compress(path, FUSE, held_out=0.0, calib={"x": X}, output=output)
    found = verify(path, output, calib={"x": X}, max_error=1.0, provider="cpu")
    assert ALL_FITTED in found.warnings
    assert found.samples.held_out == 200
    assert REFITTED in compress(output, calib={"x": X}).report.warnings


@pytest.mark.parametrize(("x", "said"), [(X, "THESE SAMPLES WERE FITTED"), (X[1:], "can't be read any more")])
def test_a_lost_record_is_said(x: np.ndarray, said: str, path: Path) -> None:
    model = compress(path, FUSE, calib={"x": X}).model
    record = json.loads(model.note(KEY) or "")
    model.set_note(KEY, json.dumps({**record, "digests": "?"}))
    found = verify(path, model, calib={"x": x}, max_error=1.0, provider="cpu")
    assert any(said in warning for warning in found.warnings)
    assert found.samples.held_out == len(x)


def test_training_fits_too(path: Path) -> None:
    off = network(w2=(np.random.default_rng(0).standard_normal((16, 4))).astype(np.float32))
    result = retrain(off, {"x": X}, teacher=path, epochs=1, lr=0.01, provider="cpu")
    assert result, result.reason
    found = verify(path, result.model, calib={"x": X}, max_error=1.0, provider="cpu")
    assert (found.samples.held_out, found.samples.fitted) == (40, 160)


def test_the_rest_of_the_metadata_stays(path: Path) -> None:
    proto = network()
    proto.metadata_props.add(key="author", value="someone")
    output = path.with_name("out.onnx")
    compress(proto, FUSE, output=output)
    found = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert (found["author"], list(found)) == ("someone", ["author", KEY])
