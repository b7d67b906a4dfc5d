"""What training keeps: zeros, equal values, and the shares that merged layers have in a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import net, normal, weight

from onnxfuse import retrain
from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.marks import GRADIENT_KEY, KEPT_KEY, VALUES, ZEROS
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.training.keeping import projection

BODY = "h = Gemm(x, w1) r = Relu(h) y = Gemm(r, w2)"
X = normal(64, 6)


def marked(mark: str, w1: np.ndarray) -> Model:
    model = net(BODY, {"w1": w1, "w2": (8, 4)})
    model.nodes[0].metadata[KEPT_KEY] = mark
    return model


def pruned() -> np.ndarray:
    value = normal(6, 8, seed=3)
    value[np.abs(value) < 0.7] = 0
    return value


def clustered() -> np.ndarray:
    return np.round(normal(6, 8, seed=3)).astype(np.float32)


def trained(model: Model, **options: Any) -> Model:
    found = retrain(
        model, {"x": X, "labels": normal(64, 4, seed=9)}, loss="mse", epochs=3, lr=0.02, **options
    )
    assert found.ok, found.reason
    return found.model


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_stay(optimizer: str) -> None:
    model = marked(ZEROS, pruned())
    after = weight(trained(model, optimizer=optimizer), "w1")
    np.testing.assert_array_equal(after == 0, pruned() == 0)
    assert np.abs(after - pruned()).max() > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_equal_values_stay_equal(optimizer: str) -> None:
    before = clustered()
    after = weight(trained(marked(VALUES, before), optimizer=optimizer), "w1")
    values, places = np.unique(before, return_inverse=True)
    own = [np.unique(after.reshape(-1)[places.reshape(-1) == n]) for n in range(len(values))]
    assert all(len(found) == 1 for found in own)
    assert np.abs(after - before).max() > 1e-3


def test_both() -> None:
    before = clustered()
    after = weight(trained(marked(f"{VALUES} {ZEROS}", before)), "w1")
    np.testing.assert_array_equal(after[before == 0], 0)
    assert len(np.unique(after)) == len(np.unique(before))
    free = weight(trained(marked(VALUES, before)), "w1")
    assert (free[before == 0] != 0).all()


def test_the_mark_survives_a_file(tmp_path: Any) -> None:
    model = marked(ZEROS, pruned())
    model.save(tmp_path / "m.onnx")
    after = weight(trained(Model.load(tmp_path / "m.onnx")), "w1")
    np.testing.assert_array_equal(after == 0, pruned() == 0)


def test_a_shared_value_moves_by_the_mean_of_its_copies() -> None:
    before = clustered()
    model = marked(VALUES, before)
    module = to_torch(model)
    put_back = projection(module, model)
    step = normal(6, 8, seed=11)
    with torch.no_grad():
        module.get_parameter("w1").add_(torch.from_numpy(step))
    assert put_back is not None
    put_back()
    expected = before.copy()
    for value in np.unique(before):
        expected[before == value] += step[before == value].mean()
    np.testing.assert_allclose(module.get_parameter("w1").detach().numpy(), expected, atol=1e-6)


def test_nothing_to_keep() -> None:
    model = net(BODY, {"w1": (6, 8), "w2": (8, 4)})
    assert projection(to_torch(model), model) is None


def test_what_is_not_trained_is_left() -> None:
    model = marked(ZEROS, pruned())
    module = to_torch(model, trainable=lambda weight: weight.name == "w2")
    assert projection(module, model) is None
    np.testing.assert_array_equal(weight(trained(model, freeze=["w1"]), "w1"), pruned())


# --- shares of a gradient -----------------------------------------------------------------------------------

TIED = "h = MatMul(x, w) r = Relu(h) y = MatMul(r, w)"


def tied(first: str | None, second: str | None) -> Model:
    model = net(TIED, {"w": (6, 6)})
    for node, share in ((model.nodes[0], first), (model.nodes[2], second)):
        if share is not None:
            node.metadata[GRADIENT_KEY] = share
    return model


def gradient(model: Model, **options: Any) -> np.ndarray:
    module = to_torch(model, **options)
    loss = (module(torch.from_numpy(X)) ** 2).sum()
    (found,) = torch.autograd.grad(loss, [module.get_parameter("w")])
    return found.numpy()


def apart() -> tuple[np.ndarray, np.ndarray]:
    """The gradient through each of the two places, by hand."""
    w = [torch.tensor(weight(tied(None, None), "w"), requires_grad=True) for _ in range(2)]
    loss = (torch.relu(torch.from_numpy(X) @ w[0]) @ w[1]).square().sum()
    first, second = torch.autograd.grad(loss, w)
    return first.numpy(), second.numpy()


def test_merged_layers_have_their_shares() -> None:
    first, second = apart()
    model = tied("0.3", "0.7")
    np.testing.assert_allclose(
        gradient(model, shared_gradients=True), 0.3 * first + 0.7 * second, rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(gradient(model), first + second, rtol=1e-4, atol=1e-3)
    x = torch.from_numpy(X)
    assert torch.equal(to_torch(model, shared_gradients=True)(x), to_torch(model)(x))


@pytest.mark.parametrize("share", ["half", "nan", "", "inf"])
def test_a_share_that_is_no_number(share: str) -> None:
    with pytest.raises(NotApplicableError, match=rf"onnxfuse\.gradient is '{share}', no number"):
        to_torch(tied(share, None), shared_gradients=True)


def test_retraining_uses_the_shares() -> None:
    """With all of it at one place, the other has no say: as if its weight were another, frozen one."""
    data = {"x": X, "labels": normal(64, 6, seed=9)}
    found = {}
    for shares in (("1", "0"), ("0", "1"), ("0.5", "0.5")):
        result = retrain(tied(*shares), data, loss="mse", epochs=1, lr=0.02, batch_size=64, optimizer="sgd")
        found[shares] = weight(result.model, "w") - weight(tied(*shares), "w")
    half = (found["1", "0"] + found["0", "1"]) / 2
    assert not np.allclose(found["1", "0"], found["0", "1"], atol=1e-5)
    assert np.corrcoef(found["0.5", "0.5"].ravel(), half.ravel())[0, 1] > 0.5


def test_zeros_stay_behind_a_transpose() -> None:
    body = "t = Transpose<perm=[1,0]>(w1) h = MatMul(x, t) y = MatMul(h, w2)"
    model = net(body, {"w1": pruned(), "w2": (6, 4)}, "float[N,8] x")
    next(node for node in model.nodes if node.op == "MatMul").metadata[KEPT_KEY] = ZEROS
    module = to_torch(model)
    put_back = projection(module, model)
    assert put_back is not None
    w1 = dict(module.named_parameters())["w1"]
    zero = w1.detach() == 0
    with torch.no_grad():
        w1.add_(1.0)
    put_back()
    assert not w1.detach()[zero].any()
    assert w1.detach()[~zero].all()
