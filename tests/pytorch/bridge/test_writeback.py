"""from_torch: what comes back is what changed, byte for byte, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from nets import compute, net, normal
from onnx import TensorProto, helper, numpy_helper
from test_importer import with_if

from onnxfuse.errors import InputError, VerificationError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.bridge.writeback import from_torch

IMAGE = "float[N,3,9,9] x"
NORMED = {"w": (4, 3, 3, 3), "s": (4,), "b": (4,), "m": (4,), "v": np.ones(4, np.float32)}


def stored(model: Model) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in model.to_proto().graph.initializer}


def test_an_untouched_module_gives_the_same_bytes() -> None:
    model = net("c = Conv(x, w) y = BatchNormalization(c, s, b, m, v)", NORMED, IMAGE)
    before = model.to_proto().SerializeToString(deterministic=True)
    assert from_torch(to_torch(model), model).to_proto().SerializeToString(deterministic=True) == before


def test_trained_weights_and_statistics_come_back_and_the_model_stays() -> None:
    model = net("c = Conv(x, w) y = BatchNormalization(c, s, b, m, v)", NORMED, IMAGE)
    before = stored(model)
    module = to_torch(model).train()
    x = torch.from_numpy(normal(6, 3, 9, 9))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(x).square().sum().backward()
    optimizer.step()
    result = from_torch(module, model)
    assert module.training
    assert stored(model) == before
    for name, found in stored(result).items():
        assert found == module.state_dict()[name].numpy().tobytes()
        assert found != before[name]
    (wanted,) = compute(result, {"x": x.numpy()}, "y")
    with torch.no_grad():
        np.testing.assert_allclose(module.eval()(x).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_only_what_changed_is_replaced() -> None:
    model = net("h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)", {"w1": (6, 5), "w2": (5, 4)})
    module = to_torch(model)
    with torch.no_grad():
        module.w2[0, 0] += 1
    before, after = model.to_proto(), from_torch(module, model).to_proto()
    assert after.graph.initializer[0] == before.graph.initializer[0]
    assert after.graph.initializer[1] != before.graph.initializer[1]
    assert list(after.graph.node) == list(before.graph.node)


def test_weights_in_constant_nodes_bodies_and_sparse_or_tied_ones_come_back() -> None:
    model = with_if([], [helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])], [])
    module = to_torch(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    result = from_torch(module, model)
    bodies = {a.name: a.g for a in result.to_proto().graph.node[0].attribute}
    old = {a.name: a.g for a in model.to_proto().graph.node[0].attribute}
    for name, body in bodies.items():
        change = numpy_helper.to_array(body.initializer[0]) - numpy_helper.to_array(old[name].initializer[0])
        np.testing.assert_allclose(change, 1, rtol=1e-6)
    x = normal(3, 6)
    for condition in (True, False):
        (wanted,) = compute(result, {"x": x, "c": np.array(condition)}, "y")
        with torch.no_grad():
            found = module(torch.from_numpy(x), torch.tensor(condition)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_weight_in_a_constant_node_comes_back() -> None:
    proto = net("y = MatMul(x, k)", {"k": (6, 4)}).to_proto()
    value = proto.graph.initializer.pop()
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    model = Model.load(proto)
    module = to_torch(model)
    with torch.no_grad():
        module.k.mul_(2)
    result = from_torch(module, model)
    np.testing.assert_array_equal(result.weight(result.tensor("k")), 2 * numpy_helper.to_array(value))


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = MatMul(x, w) copy = Identity(w)"])
def test_a_model_that_returns_a_weight(body: str) -> None:
    proto = net(body, {"w": (6, 4)}).to_proto()
    name = "copy" if "copy" in body else "w"
    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [6, 4]))
    module = to_torch(proto)
    with torch.no_grad():
        module.w[0, 0] += 1
    result = from_torch(module, proto)
    assert stored(result)["w"] == module.w.detach().numpy().tobytes()


@pytest.mark.parametrize(
    "body",
    [
        "n = BatchNormalization(x, s, b, m, v) y = LeakyRelu(n)",
        "y = LayerNormalization(x, w)",
    ],
)
def test_attributes_left_out_are_single_precision_in_double_models(body: str) -> None:
    """ONNX's defaults are 1e-5f and 0.01f, which the noise of doubles tells from 1e-5 and 0.01."""
    weights = {name: np.abs(normal(6, seed=k).astype(np.float64)) / 99 for k, name in enumerate("sbmv")}
    model = net(body, weights | {"w": np.ones(2)}, "double[3,6,2] x", "double[3,6,2] y")
    from_torch(to_torch(model), model, calib={"x": np.random.default_rng(0).standard_normal((3, 6, 2)) / 99})


def test_wrapped_modules_and_others_of_the_same_names_are_taken() -> None:
    model = net("y = MatMul(x, w)", {"w": (6, 4)})
    module = to_torch(model)
    with torch.no_grad():
        module.w.add_(1)
    wanted = stored(from_torch(module, model))
    assert stored(from_torch(torch.compile(module, backend="eager"), model)) == wanted

    class Native(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(module.w.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    assert stored(from_torch(Native(), model)) == wanted


def test_a_module_that_computes_something_else_is_found_out() -> None:
    model = net("y = MatMul(x, w)", {"w": (6, 4)})

    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w * 1.001

    with pytest.raises(VerificationError, match="does not compute what the model computes"):
        from_torch(Other(), model)


def test_a_missing_weight_another_shape_another_type_and_nan_are_named() -> None:
    model = net("h = MatMul(x, w) y = Add(h, b)", {"w": (6, 4), "b": (4,)})

    def module(**tensors: torch.Tensor) -> torch.nn.Module:
        found = torch.nn.Module()
        for name, tensor in {"w": torch.ones(6, 4), "b": torch.ones(4), **tensors}.items():
            found.register_buffer(name, tensor)
        return found

    lacking = module()
    del lacking.b
    with pytest.raises(InputError, match="the module has no 'b'"):
        from_torch(lacking, model)
    with pytest.raises(InputError, match=r"'w' is torch.float32 \[4, 6\] in the module.* float32 \[6, 4\]"):
        from_torch(module(w=torch.ones(4, 6)), model)
    with pytest.raises(InputError, match=r"'b' is torch\.float64"):
        from_torch(module(b=torch.ones(4, dtype=torch.float64)), model)
    with pytest.raises(InputError, match="'b' has a NaN"):
        from_torch(module(b=torch.full((4,), torch.nan)), model)


def test_external_data_half_floats_and_metadata_survive(tmp_path) -> None:
    weights = {"w": normal(6, 4).astype(np.float16), "b": normal(4).astype(np.float16)}
    model = net("h = MatMul(x, w) y = Add(h, b)", weights, "float16[N,6] x", "float16[N,4] y")
    proto = model.to_proto()
    helper.set_model_props(proto, {"characters": "abc"})
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, size_threshold=0)
    model = Model.load(path)
    module = to_torch(model)
    with torch.no_grad():
        module.w.add_(1)
    result = from_torch(module, model)
    result.save(tmp_path / "out.onnx")
    again = onnx.load(tmp_path / "out.onnx")
    assert {p.key: p.value for p in again.metadata_props} == {"characters": "abc"}
    found = {t.name: numpy_helper.to_array(t) for t in again.graph.initializer}
    np.testing.assert_array_equal(found["w"], module.w.detach().numpy())
    np.testing.assert_array_equal(found["b"], weights["b"])
