"""Sizes on disk against what the file system and gzip say."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import onnx
from nets import net

from onnxfuse.ir.file_size import file_size


def test_a_file_and_the_same_gzipped(tmp_path: Path) -> None:
    model = net("y = MatMul(x, w)", {"w": np.zeros((6, 400), np.float32)})
    path = tmp_path / "m.onnx"
    model.save(path)
    found = file_size(path, gzipped=True)
    assert found.bytes == path.stat().st_size > 9600
    assert found.gzipped is not None
    assert abs(found.gzipped - len(gzip.compress(path.read_bytes(), 6))) < 64
    assert found.gzipped < 1000
    assert file_size(path, gzipped=False).gzipped is None


def test_external_data_counts(tmp_path: Path) -> None:
    proto = net("y = MatMul(x, w)", {"w": (6, 4000)}).to_proto()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="w.data", size_threshold=0)
    found = file_size(path, gzipped=True)
    assert found.bytes == path.stat().st_size + (tmp_path / "w.data").stat().st_size
    assert found.gzipped is not None
    assert 0.8 * 96000 < found.gzipped < found.bytes * 1.01
