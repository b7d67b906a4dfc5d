"""Normalisations: numbers from ONNX Runtime, gradients and statistics from native modules."""

from __future__ import annotations

import copy

import numpy as np
import onnx.reference
import pytest
import torch
from nets import compute, net, normal
from rule_checks import agrees, agrees_on, compiles_and_exports, is_plain, trains_like
from torch import nn

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(normal(*shape, seed=seed)) + np.float32(0.5)


def statistics(channels: int) -> dict[str, np.ndarray]:
    return {
        "s": positive(channels, seed=1),
        "b": normal(channels, seed=2),
        "m": normal(channels, seed=3),
        "v": positive(channels, seed=4),
    }


def batch_norm(shape: tuple[int, ...], attributes: str = "epsilon=0.01", opset: int = 17) -> Model:
    sizes = ",".join(map(str, shape))
    body = f"y = BatchNormalization<{attributes}>(x, s, b, m, v)"
    return net(
        body, statistics(shape[0]), f"float[N,{sizes}] x" if shape[1:] else "float[N,4] x", "float y", opset
    )


def native_batch_norm(kind: type[nn.Module], momentum: float, epsilon: float) -> nn.Module:
    native = kind(4, eps=epsilon, momentum=momentum)
    keys = {"s": "weight", "b": "bias", "m": "running_mean", "v": "running_var"}
    state = {keys[name]: torch.from_numpy(value) for name, value in statistics(4).items()}
    native.load_state_dict(state, strict=False)
    return native


@pytest.mark.parametrize("opset", [9, 14, 15, 17])
@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 5, 6), (4, 2, 3, 4)])
def test_batch_norm(shape: tuple[int, ...], opset: int) -> None:
    model = batch_norm(shape, opset=opset)
    for batch in (2, 5):
        agrees(model, {"x": normal(batch, *shape)})
    if opset == 17:
        compiles_and_exports(to_torch(model), shape)


@pytest.mark.parametrize(
    ("shape", "kind"), [((4,), nn.BatchNorm1d), ((4, 7), nn.BatchNorm1d), ((4, 5, 6), nn.BatchNorm2d)]
)
def test_batch_norm_trains_as_torchs_own(shape: tuple[int, ...], kind: type[nn.Module]) -> None:
    module = to_torch(batch_norm(shape, "epsilon=0.01, momentum=0.7"))
    native = native_batch_norm(kind, 0.3, 0.01)
    for seed in range(3):
        x = torch.from_numpy(normal(6, *shape, seed=seed))
        trains_like(module, native, x, {"s": native.weight, "b": native.bias})
        torch.testing.assert_close(module.m, native.running_mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(module.v, native.running_var, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(module.eval()(x), native.eval()(x))


def test_batch_norm_in_eval_mode_leaves_its_statistics() -> None:
    module = to_torch(batch_norm((4, 5, 6)))
    before = copy.deepcopy(module.state_dict())
    module(torch.randn(3, 4, 5, 6)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.s.grad is not None
    module.train()(torch.randn(3, 4, 5, 6))
    assert not torch.equal(before["m"], module.m)
    assert not torch.equal(before["v"], module.v)


def test_a_single_batch_norm_can_be_frozen() -> None:
    module = to_torch(batch_norm((4, 5, 6))).train()
    module.get_submodule("_ops.y").eval()
    before = module.m.clone()
    x = torch.randn(3, 4, 5, 6)
    y = module(x)
    assert torch.equal(before, module.m)
    torch.testing.assert_close(y, module.eval()(x))


def test_batch_norm_of_a_file_for_training() -> None:
    body = "y, mean, var = BatchNormalization<training_mode=1, momentum=0.7>(x, s, b, m, v)"
    model = net(body, statistics(4), "float[N,4,5,6] x", "float y, float mean, float var")
    x = normal(3, 4, 5, 6)
    module = agrees(model, {"x": x})
    assert np.array_equal(module.m.numpy(), statistics(4)["m"])
    found = module.train()(torch.from_numpy(x))
    for ours, wanted in zip(found, compute(model, {"x": x}), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), wanted, rtol=1e-5, atol=1e-5)
    native = native_batch_norm(nn.BatchNorm2d, 0.3, 1e-5)
    native(torch.from_numpy(x))
    torch.testing.assert_close(module.m, native.running_mean)
    torch.testing.assert_close(module.v, native.running_var)


def test_batch_norm_with_computed_statistics_changes_no_input() -> None:
    body = "y = BatchNormalization(x, s, b, m, v)"
    model = net(body, {"s": positive(4), "b": normal(4)}, "float[N,4,6] x, float[4] m, float[4] v", "float y")
    feed = {"x": normal(3, 4, 6), "m": normal(4), "v": positive(4)}
    module = agrees(model, feed)
    m, v = torch.from_numpy(feed["m"].copy()), torch.from_numpy(feed["v"].copy())
    y = module.train()(torch.from_numpy(feed["x"]), m, v)
    assert np.array_equal(m.numpy(), feed["m"])
    assert abs(float(y.detach().mean((0, 2))[0] - module.b.detach()[0])) < 1e-5


def test_batch_norm_of_half_precision_with_wide_statistics() -> None:
    weights = statistics(4)
    weights["s"], weights["b"] = weights["s"].astype(np.float16), weights["b"].astype(np.float16)
    body = "y = BatchNormalization(x, s, b, m, v)"
    model = net(body, weights, "float16[N,4,6] x", "float16[N,4,6] y")
    x = normal(3, 4, 6).astype(np.float16)
    module = to_torch(model)
    (wanted,) = onnx.reference.ReferenceEvaluator(model.to_proto()).run(None, {"x": x})
    found = module(torch.from_numpy(x))
    assert found.dtype == torch.float16
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-2)
    module.train()(torch.from_numpy(x)).sum().backward()
    assert module.s.grad.dtype == torch.float16
    assert module.m.dtype == torch.float32


def test_saved_statistics_are_refused() -> None:
    body = "y, a, c, d, e = BatchNormalization(x, s, b, m, v)"
    with pytest.raises(NotApplicableError, match=r"\(BatchNormalization\).*saved statistics"):
        to_torch(net(body, statistics(4), "float[N,4,6] x", "float y, float d", opset=9))


@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 6), (4, 2, 3, 4)])
def test_instance_norm(shape: tuple[int, ...]) -> None:
    module = agrees_on(
        "y = InstanceNormalization<epsilon=0.01>(x, s, b)", {"s": positive(4), "b": normal(4)}, shape
    )
    compiles_and_exports(module, shape)


@pytest.mark.parametrize("axis", [-1, -2, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(axis: int, bias: bool) -> None:
    shape = (3, 4, 5)
    weights = {"s": positive(*shape[axis if axis < 0 else axis - 1 :])}
    if bias:
        weights["b"] = normal(*weights["s"].shape)
    body = f"y = LayerNormalization<axis={axis}, epsilon=0.01>(x, {', '.join(weights)})"
    module = agrees_on(body, weights, shape)
    assert is_plain(module)
    if axis == -1:
        compiles_and_exports(module, shape)


def test_layer_norm_by_weights_that_are_broadcast() -> None:
    for scale, bias in (((1,), (5,)), ((5,), (1,)), ((1, 5), (4, 5)), ((5,), (4, 5))):
        body = "y = LayerNormalization<axis=-2>(x, s, b)"
        agrees_on(body, {"s": positive(*scale), "b": normal(*bias)}, (3, 4, 5))


def test_layer_norm_by_a_computed_weight() -> None:
    model = net("y = LayerNormalization(x, s)", {}, "float[N,4,5] x, float[5] s", "float y")
    agrees(model, {"x": normal(2, 4, 5), "s": positive(5)})


def test_layer_norm_with_statistics() -> None:
    body = "y, mean, deviation = LayerNormalization<axis=1, epsilon=0.01>(x, s, b)"
    weights = {"s": positive(4, 5), "b": normal(4, 5)}
    model = net(body, weights, "float[N,4,5] x", "float y, float mean, float deviation")
    agrees(model, {"x": normal(3, 4, 5)})


def test_layer_norm_statistics_of_half_precision_are_wide() -> None:
    body = "y, mean, deviation = LayerNormalization<epsilon=0.01>(x, s)"
    declared = "float16[N,5] y, float[N,1] mean, float[N,1] deviation"
    model = net(body, {"s": positive(5).astype(np.float16)}, "float16[N,5] x", declared)
    y, mean, deviation = to_torch(model)(torch.ones(2, 5, dtype=torch.float16))
    assert (y.dtype, mean.dtype, deviation.dtype) == (torch.float16, torch.float32, torch.float32)
    np.testing.assert_allclose(deviation.numpy(), 10, rtol=1e-6)


def test_layer_and_instance_norms_train_like_native_ones() -> None:
    x = torch.randn(3, 4, 5, 6)
    weights = {"s": positive(6), "b": normal(6)}
    layer = nn.LayerNorm(6, 0.01)
    layer.load_state_dict({"weight": torch.from_numpy(weights["s"]), "bias": torch.from_numpy(weights["b"])})
    body = "y = LayerNormalization<epsilon=0.01>(x, s, b)"
    module = to_torch(net(body, weights, "float[N,4,5,6] x", "float y"))
    trains_like(module, layer, x, {"s": layer.weight, "b": layer.bias})
    weights = {"s": positive(4), "b": normal(4)}
    state = {"weight": torch.from_numpy(weights["s"]), "bias": torch.from_numpy(weights["b"])}
    instance = nn.InstanceNorm2d(4, 0.01, affine=True)
    group = nn.GroupNorm(2, 4, 0.01)
    for native, op, opset in (
        (instance, "InstanceNormalization<epsilon=0.01>", 17),
        (group, "GroupNormalization<num_groups=2, epsilon=0.01>", 21),
    ):
        native.load_state_dict(state)
        module = to_torch(net(f"y = {op}(x, s, b)", weights, "float[N,4,5,6] x", "float y", opset))
        trains_like(module, native, x, {"s": native.weight, "b": native.bias})


def test_group_norm() -> None:
    body = "y = GroupNormalization<num_groups=2, epsilon=0.01>(x, s, b)"
    module = agrees_on(body, {"s": positive(6), "b": normal(6)}, (6, 4, 5), 21)
    assert is_plain(module)
    compiles_and_exports(module, (6, 4, 5))


@pytest.mark.parametrize("opset", [18, 20])
def test_group_norm_by_weights_of_the_groups(opset: int) -> None:
    """The first form of the operator, which ONNX has withdrawn and ONNX Runtime runs."""
    body = "y = GroupNormalization<num_groups=3>(x, s, b)"
    agrees_on(body, {"s": positive(3), "b": normal(3)}, (6, 4, 5), opset)


def test_batch_norm_by_place() -> None:
    """spatial=0 of the oldest operator sets; trained, it updates the statistics of each place."""
    weights = {name: positive(3, 4, 5) for name in "sbmv"}
    module = agrees_on("y = BatchNormalization<spatial=0>(x, s, b, m, v)", weights, (3, 4, 5), 7)
    x = torch.randn(8, 3, 4, 5)
    y = module.train()(x)
    torch.testing.assert_close(y.mean(0), module.b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.m, 0.9 * torch.from_numpy(weights["m"]) + 0.1 * x.mean(0))


def test_batch_norm_by_the_batch_of_a_single_value() -> None:
    model = net(
        "y, m2, v2 = BatchNormalization<training_mode=1>(x, s, b, m, v)",
        {name: positive(3) for name in "sbmv"},
        "float[1,3,1,1] x",
        "float y",
    )
    agrees(model, {"x": normal(1, 3, 1, 1)}, 1e-4)


def test_hardmax_over_nothing() -> None:
    agrees(net("y = Hardmax(x)", {}, "float[2,0] x", "float[2,0] y"), {"x": np.zeros((2, 0), np.float32)})


def test_norms_over_a_single_element() -> None:
    """Its deviation is 0, and the bias is left."""
    weights = {"s": positive(3), "b": normal(3), "one": positive(1)}
    agrees_on("y = InstanceNormalization(x, s, b)", weights, (3, 1, 1), tolerance=1e-4)
    agrees_on("y = LayerNormalization(x, one)", weights, (3, 1))
    model = net("y = GroupNormalization<num_groups=3>(x, s, b)", weights, "float[1,3,1] x", "float y", 21)
    agrees(model, {"x": normal(1, 3, 1)})


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_norm_under_its_old_name(axis: int) -> None:
    scale = positive(*(3, 4, 5)[axis if axis < 0 else 0 :])
    agrees_on(f"y = SimplifiedLayerNormalization<axis={axis}>(x, s)", {"s": scale}, (3, 4, 5))
    body = f"n, y = SimplifiedLayerNormalization<axis={axis}, epsilon=0.01>(x, s)"
    agrees_on(body, {"s": scale}, (3, 4, 5))


@pytest.mark.parametrize(("axis", "scale"), [(-1, (5,)), (2, (4, 5)), (-2, (5,)), (1, (1, 4, 5))])
def test_rms_norm(axis: int, scale: tuple[int, ...]) -> None:
    body = f"y = RMSNormalization<axis={axis}, epsilon=0.01>(x, s)"
    model = net(body, {"s": positive(*scale)}, "float[N,3,4,5] x", "float y", 23)
    x = normal(2, 3, 4, 5)
    (wanted,) = onnx.reference.ReferenceEvaluator(model.to_proto()).run(None, {"x": x})
    np.testing.assert_allclose(to_torch(model)(torch.from_numpy(x)).detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [-1, 1])
def test_lp_normalization(p: int, axis: int) -> None:
    module = agrees_on(f"y = LpNormalization<p={p}, axis={axis}>(x)", {}, (4, 5))
    zeros = module(torch.zeros(1, 4, 5))
    assert torch.equal(zeros, torch.zeros(1, 4, 5))
    assert torch.isfinite(module(torch.full((1, 4, 5), 1e-30))).all()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_lrn(size: int) -> None:
    module = agrees_on(f"y = LRN<size={size}, alpha=0.3, beta=0.6, bias=1.5>(x)", {}, (7, 4, 3))
    assert is_plain(module)


def test_lrn_of_an_even_number_of_neighbors_is_refused() -> None:
    with pytest.raises(NotApplicableError, match=r"\(LRN\).*even"):
        to_torch(net("y = LRN<size=2>(x)", {}, "float[N,7,4,3] x", "float y"))


@pytest.mark.parametrize("axes", ["", "<axes=[0,2]>", "<axes=[1,2,3]>"])
def test_mean_variance_normalization(axes: str) -> None:
    agrees_on(f"y = MeanVarianceNormalization{axes}(x)", {}, (4, 5, 6))
