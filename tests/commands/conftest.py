from pathlib import Path

import onnx
import pytest
from runs import network


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the network of `runs`, alone in its folder."""
    onnx.save(network(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"
