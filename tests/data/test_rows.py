"""A few rows for shapes: as many as the model takes, tried once."""

from __future__ import annotations

import numpy as np
import pytest
from nets import RUNTIME, net

from onnxfuse.data.calibration import Calibration
from onnxfuse.data.rows import few_rows
from onnxfuse.ir.model import Model
from onnxfuse.runtime.session import Runtime


def opened(model: Model, rows: int = 8) -> Calibration:
    data = {"x": np.arange(rows * 6, dtype=np.float32).reshape(rows, 6)}
    return Calibration.open(data, model, held_out=0.0)


def test_the_first_rows_and_the_model_remembers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("y = Relu(x)", {})
    fit = opened(model).fit
    found = few_rows(model, fit, 2, RUNTIME)
    np.testing.assert_array_equal(found["x"], np.arange(12, dtype=np.float32).reshape(2, 6))
    assert len(few_rows(model, fit, 1, RUNTIME)["x"]) == 1
    monkeypatch.delattr(Runtime, "session")
    assert few_rows(model, fit, 2, RUNTIME) is found
    assert few_rows(model.copy(), fit, 1, RUNTIME)["x"].shape == (1, 6)


def test_all_rows_where_the_model_takes_no_fewer() -> None:
    """A Reshape to eight rows; inference would not notice."""
    model = net("y = Reshape(x, k)", {"k": np.array([8, 3, 2])})
    assert len(few_rows(model, opened(model).fit, 2, RUNTIME)["x"]) == 8


def test_other_samples_are_other_rows() -> None:
    model = net("y = Relu(x)", {})
    few_rows(model, opened(model).fit, 2, RUNTIME)
    data = {"x": np.full((4, 6), 7, np.float32)}
    assert few_rows(model, Calibration.open(data, model, held_out=0.0).fit, 2, RUNTIME)["x"][0, 0] == 7
