"""Its place puts this folder on the path of every test below it, for `nets`."""

import os
from pathlib import Path

# Workers of pytest-xdist share the cores: second threads would only wait for each other's. NumPy, PyTorch and
# what they stand on read this when they are loaded, here and in the programs that tests start.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import onnx  # noqa: E402
import pytest  # noqa: E402
from runs import network  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the network of `runs`, alone in its folder."""
    onnx.save(network(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"
