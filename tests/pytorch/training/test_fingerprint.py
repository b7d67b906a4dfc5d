"""What a checkpoint belongs to."""

from __future__ import annotations

import pytest
from nets import net, normal

import onnxfuse
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.training.fingerprint import fingerprint


def found(model: Model) -> tuple[str, str]:
    """The fingerprint of a model that is trained on nothing, and its module's code."""
    module = onnxfuse.to_torch(model)
    return fingerprint(model, module, (None,), None, ("decided",)), module.code


def test_where_our_functions_are_defined_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": normal(6, 4, seed=1), "rows": [0, 2, -1]}
    model = net("y = Gather<axis = 0>(w, i)", weights, x="int64[N] i")
    before, code = found(model)
    calls = [node for node in onnxfuse.to_torch(model).graph.nodes if node.op == "call_function"]
    own = [node.target for node in calls if node.target.__module__.startswith("onnxfuse.")]
    assert own, code
    for function in own:
        monkeypatch.setattr(function, "__module__", "onnxfuse.elsewhere")
    after, moved = found(model)
    assert moved != code
    assert after == before


def test_weights_and_code_matter() -> None:
    model = net("y = Relu(x)", {}, x="float[N,3] x")
    other = net("y = Neg(x)", {}, x="float[N,3] x")
    assert found(model)[0] != found(other)[0]
    dense = [net("y = MatMul(x, w)", {"w": normal(3, 2, seed=seed)}, x="float[N,3] x") for seed in (1, 2)]
    assert found(dense[0])[0] != found(dense[1])[0]
