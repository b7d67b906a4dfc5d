"""There and back on every kind of graph, and on the networks that ship: what is imported computes the same, a
training step reaches every weight, and what is written back computes what the trained module computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import RUNTIME, compute, normal
from test_matrix import CASES

from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.bridge.weights import is_trainable, stored
from onnxfuse.pytorch.bridge.writeback import from_torch, run_module
from onnxfuse.verification.compare import compare_run

MODELS = Path(__file__).parents[3] / "models"


def step(module: torch.nn.Module, feed: dict[str, np.ndarray], model: Model) -> None:
    """One step of gradient descent on the squares of the outputs, in training mode."""
    module.train()
    outputs = module(*(torch.from_numpy(np.array(feed[info.name])) for info in model.inputs))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    sum(output.square().mean() for output in outputs if output.is_floating_point()).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    module.eval()


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str) -> None:
    case = CASES[name]
    model = case.model()
    before = model.to_proto().SerializeToString(deterministic=True)
    module = to_torch(model)
    assert from_torch(module, model).to_proto().SerializeToString(deterministic=True) == before
    for batch in (1, 2, 9):
        feed = {"x": normal(batch, *case.shape, seed=batch), **case.more}
        (wanted,) = compute(model, feed)
        np.testing.assert_allclose(run_module(module, model, ["y"], feed)["y"], wanted, rtol=1e-4, atol=1e-5)
    initial = {key: value.clone() for key, value in module.state_dict().items()}
    step(module, feed, model)
    trained = dict(module.named_parameters())
    result = from_torch(module, model)
    assert {weight.key for weight in stored(model) if is_trainable(weight)} == set(trained)
    moved = [key for key in trained if not torch.equal(trained[key], initial[key])]
    assert len(moved) >= len(trained) - 1  # the bias in front of a BatchNorm has no effect
    for weight in stored(result):
        assert weight.load().tobytes() == module.state_dict()[weight.key].numpy().tobytes()
    (wanted,) = compute(result, feed)
    np.testing.assert_allclose(run_module(module, model, ["y"], feed)["y"], wanted, rtol=1e-4, atol=1e-5)
    assert [n.label for n in result.nodes] == [n.label for n in model.nodes]
    assert model.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ["digits_mlp", "digits_resnet", "mnist1d_conv", "tiny_transformer"])
def test_shipped_models(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    samples = Calibration.open(MODELS / f"{name}.npz", model, limit=96, held_out=0.0).fit
    module = to_torch(model)
    names = [info.name for info in model.outputs]
    found = compare_run(
        model, lambda feed: run_module(module, model, names, feed), samples, RUNTIME, tensors=names
    )
    assert found.passed, found.reason
    step(module, next(iter(samples)).feed, model)
    from_torch(module, model, calib=MODELS / f"{name}.npz")
