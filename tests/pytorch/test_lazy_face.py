"""What `import onnxfuse.pytorch` costs, and gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import onnxfuse.pytorch


def test_records_are_read_without_torch() -> None:
    code = (
        "import sys; import onnxfuse.pytorch; "
        "from onnxfuse.pytorch.training.records import Epoch, Retraining; "
        "assert 'torch' not in sys.modules; "
        "from onnxfuse.pytorch import to_torch; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there() -> None:
    assert dir(onnxfuse.pytorch) == onnxfuse.pytorch.__all__
    for name in onnxfuse.pytorch.__all__:
        assert getattr(onnxfuse.pytorch, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'to_tensorflow'"):
        onnxfuse.pytorch.to_tensorflow  # noqa: B018
