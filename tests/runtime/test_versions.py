"""Versions of ONNX that onnx knows, and ONNX Runtime doesn't."""

from __future__ import annotations

import onnx
import pytest

import onnxfuse
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.runtime.versions import check_runs, runtime_accepts

TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'


def test_versions_that_onnx_knows_and_onnx_runtime_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.parser.parse_model(TEXT)
    onnxfuse.load(proto)
    monkeypatch.setattr("onnxfuse.runtime.versions.runtime_accepts", lambda opset, ir: opset < 17)
    for check in (onnxfuse.load, lambda source: check_runs(Model.load(source))):
        with pytest.raises(InputError, match="too new for the installed ONNX Runtime: upgrade") as caught:
            check(proto)
        assert "(opset 17, IR version 8)" in str(caught.value)


@pytest.mark.parametrize("opset", [9, 13, 17, 21])
def test_the_probe_of_onnx_runtime_accepts_what_it_runs(opset: int) -> None:
    assert runtime_accepts(opset, 8)
    assert not runtime_accepts(opset, 1000)
