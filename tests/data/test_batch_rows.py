"""Rows of a batch by the memory that its tensors take."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from onnxfuse.data.batch_rows import peak_bytes, rows_within, tensor_bytes
from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Model
from onnxfuse.runtime.memory import Budget
from onnxfuse.runtime.session import Runtime

RUNTIME = Runtime("cpu")


def chain(side: str = "S") -> Model:
    """Two convolutions with things between that no tap keeps; every tensor is as large as the input."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N, 1, {side}, {side}] x) =>
        (float[N, 1, {side}, {side}] y) <float[1, 1, 1, 1] w = {{2}}>
        {{ a = Conv(x, w) b = Relu(a) c = Neg(b) d = Exp(c) e = Conv(d, w) y = Relu(e) }}"""
    )
    return Model.load(proto)


def images(count: int, side: int) -> np.ndarray:
    return np.zeros((count, 1, side, side), np.float32)


def test_the_bytes_are_those_of_a_run() -> None:
    feed = {"x": images(3, 5)}
    found = tensor_bytes(chain(), feed, RUNTIME)
    assert found == dict.fromkeys("xabcdey", 3 * 5 * 5 * 4)


def test_the_peak_keeps_taps_and_lets_go_of_the_rest() -> None:
    model = chain()
    sizes = {"x": 1, "a": 10, "b": 100, "c": 1000, "d": 10_000, "e": 100_000, "y": 1_000_000}
    # By hand: node by node what is live. The outputs stay to their last reader, so y is held with e alone.
    assert peak_bytes(model.nodes, sizes, ()) == 1_100_000
    assert peak_bytes(model.nodes, sizes, ("x", "a", "d", "e")) == 1_110_011


def test_what_a_body_reads_stays_until_then() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N] x, bool t) => (float[N] y)
        { a = Neg(x) b = Exp(x) y = If(t) <
            then_branch = f () => (float[N] p) { p = Abs(a) },
            else_branch = h () => (float[N] q) { q = Abs(b) }
        > }"""
    )
    sizes = {"x": 0, "t": 0, "a": 1, "b": 10, "y": 100}
    assert peak_bytes(Model.load(proto).nodes, sizes, ()) == 111


@pytest.mark.parametrize("side", [8, 16, 32])
def test_batches_take_the_same_memory_at_any_size(side: int) -> None:
    """x, a, d, e are kept, and two others live: six tensors of a row's size at the most."""
    limit = 6 * 64 * 32 * 32
    row = {"x": images(1, side)}
    rows = rows_within(chain(), row, limit, RUNTIME)
    assert rows is not None
    assert limit / 2 < rows * 6 * row["x"].nbytes <= 6 * 4 * 64 * 32 * 32


def test_calibration_keeps_to_the_budget_and_to_the_batch_size() -> None:
    x = images(40, 256)  # 256 KB a row
    small = Calibration.open({"x": x}, chain(), budget=Budget(10**7))
    assert small.rows == max(len(batch.feed["x"]) for batch in small.fit) < 8
    assert sum(batch.samples for batch in small.fit) == small.fit.samples
    assert Calibration.open({"x": x}, chain(), budget=Budget(10**6)).rows == 1
    assert Calibration.open({"x": x}, chain(), budget=Budget(10**9), batch_size=5).rows == 5
    large = Calibration.open({"x": x}, chain(), budget=Budget(10**9))
    held = [np.concatenate([b.feed["x"] for b in c.held_out]) for c in (small, large)]
    np.testing.assert_array_equal(*held)


def test_made_up_samples_keep_to_the_budget() -> None:
    wide = chain("256")
    assert Calibration.open(None, wide, budget=Budget(10**6)).rows == 1
    assert Calibration.open(None, wide, budget=Budget(10**9)).rows > 4


def test_a_model_that_takes_no_single_row_gets_batches_as_asked() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 6] x) => (float[4, 6] y)
        <int64[2] s = {4, 6}> { a = Relu(x) y = Reshape(a, s) }"""
    )
    data = {"x": np.zeros((16, 6), np.float32)}
    found = Calibration.open(data, Model.load(proto), batch_size=4, held_out=0.5)
    assert [batch.samples for batch in found.fit] == [4, 4]
