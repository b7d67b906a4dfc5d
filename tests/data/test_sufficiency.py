"""Samples that prove little are said to, and refused where something would be fitted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from nets import net, normal

from onnxfuse.data.calibration import Calibration
from onnxfuse.data.sufficiency import doubts_of
from onnxfuse.errors import InputError

MODEL = net("y = MatMul(x, w)", {"w": (6, 4)}, x="float[N,6] x")


def doubts(
    x: np.ndarray | Sequence[Mapping[str, np.ndarray]], *, approximate: bool = True, held_out: float = 0.2
) -> list[str]:
    data = {"x": x} if isinstance(x, np.ndarray) else x
    calibration = Calibration.open(data, MODEL, held_out=held_out, batch_size=16)
    return doubts_of(calibration, MODEL.inputs, approximate=approximate)


def test_enough_samples_that_differ_raise_no_doubt() -> None:
    assert doubts(normal(80, 6)) == []
    assert doubts(normal(16, 6), approximate=False, held_out=0.0) == []


def test_equal_samples_are_refused_where_something_is_fitted() -> None:
    with pytest.raises(InputError, match="all 160 samples are the same"):
        doubts(np.repeat(normal(1, 6), 160, 0))
    with pytest.raises(InputError, match="all 160 samples are the same"):
        doubts([{"x": np.repeat(normal(1, 6), 20, 0)}] * 8)
    (said,) = doubts(np.zeros((40, 6), np.float32), approximate=False, held_out=0.0)
    assert said.startswith("EQUAL SAMPLES: all 40 samples are the same")


def test_samples_that_were_fitted_as_well_are_not_held_out() -> None:
    (said,) = doubts(np.tile(normal(16, 6), (10, 1)))
    assert said.startswith("EQUAL SAMPLES: 32 of 32 held-out samples are among the fitted ones")
    assert doubts(np.concatenate([normal(158, 6), normal(2, 6)])) == []  # a few happen


def test_few_samples_are_told_how_many_would_do() -> None:
    (said,) = doubts(normal(20, 6))
    assert said.startswith("FEW SAMPLES: 4 of 20 samples are held out")
    assert "80 samples would hold out 16" in said
    for count in (2, 5):
        with pytest.raises(InputError, match=f"1 of {count} samples is held out.*samples would hold out 16"):
            doubts(normal(count, 6))
    (said,) = doubts(normal(3, 6), approximate=False, held_out=0.0)
    assert said.startswith("FEW SAMPLES: there are 3 samples")


def test_a_third_is_what_so_many_samples_tell() -> None:
    """Root mean squares of 16 squared errors that vary as those of a normal variable do."""
    errors = np.random.default_rng(0).standard_normal((20_000, 16))
    assert np.mean(np.abs(np.sqrt((errors**2).mean(1)) - 1) < 1 / 3) == pytest.approx(0.95, abs=0.02)


def test_made_up_samples_have_a_warning_of_their_own() -> None:
    assert doubts_of(Calibration.open(None, MODEL, limit=2), MODEL.inputs, approximate=True) == []


def test_an_input_that_is_called_like_labels() -> None:
    model = net("z = Add(x, y)", {}, x="float[N,6] x, float[N,6] y", y="float[N,6] z")
    calibration = Calibration.open({"x": normal(90, 6), "y": normal(90, 6)}, model)
    (said,) = doubts_of(calibration, model.inputs, approximate=False)
    assert said.startswith("array 'y' is fed to the model's input of that name")
