"""If: that the right branch is run, trained, and switched to train mode."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nets import normal
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_graph
from rule_checks import agrees

from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch

BATCH_NORM = "c = Conv(x, w) {y} = BatchNormalization<momentum=0.7>(c, s, b, m, v)"


def with_branches(condition: str, then: str, otherwise: str, inputs: str, **weights: np.ndarray) -> Model:
    """A model that computes `c`, then `y` in one of two branches, then `z` of that."""
    graph = parse_graph(f"g ({inputs}) => (float z) {{ {condition} z = Neg(y) }}")
    branches = {
        f"{name}_branch": parse_graph(f"{name} () => (float {name}_y) {{ {body} }}")
        for name, body in (("then", then), ("else", otherwise))
    }
    graph.node.insert(len(graph.node) - 1, helper.make_node("If", ["c"], ["y"], **branches))
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Model.load(proto)


STATISTICS = {
    "w": normal(4, 3, 1, 1),
    "s": np.full(4, 0.5, np.float32),
    "b": normal(4),
    "m": np.zeros(4, np.float32),
    "v": np.ones(4, np.float32),
}


def test_batch_norm_in_a_branch_follows_the_mode_of_the_whole() -> None:
    model = with_branches(
        "",
        BATCH_NORM.replace("c =", "h =").replace("(c,", "(h,").format(y="then_y"),
        "else_y = Conv(x, w)",
        "float[N,3,5,5] x, bool c",
        **STATISTICS,
    )
    module = to_torch(model)
    assert set(dict(module.named_parameters())) == {"w", "s", "b"}
    x = normal(6, 3, 5, 5)
    for condition in (True, False):
        agrees(model, {"x": x, "c": np.array(condition)})
    native = torch.nn.BatchNorm2d(4, momentum=0.3)
    data = torch.from_numpy(x)
    module.train()
    module(data, torch.tensor(False))
    assert torch.equal(module.m, torch.zeros(4))
    module(data, torch.tensor(True))
    native(torch.conv2d(data, module.w))
    torch.testing.assert_close(module.m, native.running_mean)
    torch.testing.assert_close(module.v, native.running_var)
    module.eval()(data, torch.tensor(True))
    torch.testing.assert_close(module.m, native.running_mean)


def test_only_the_branch_that_ran_gets_gradients() -> None:
    model = with_branches(
        "",
        "then_y = MatMul(x, a)",
        "else_y = MatMul(x, k)",
        "float[N,6] x, bool c",
        a=normal(6, 4),
        k=normal(6, 4),
    )
    for condition, trained, left in ((True, "a", "k"), (False, "k", "a")):
        module = to_torch(model)
        module(torch.ones(2, 6), torch.tensor([condition])).sum().backward()
        torch.testing.assert_close(module.get_parameter(trained).grad, torch.full((6, 4), -2.0))
        assert module.get_parameter(left).grad is None


def test_a_condition_on_shapes_asks_for_no_tensor() -> None:
    model = with_branches(
        "s = Shape(x) n = Gather(s, zero) c = Greater(n, two)",
        "then_y = MatMul(x, a)",
        "r = MatMul(x, a) else_y = Relu(r)",
        "float[N,6] x",
        a=normal(6, 4),
        zero=np.int64(0),
        two=np.int64(2),
    )
    module = to_torch(model)
    assert "2 < size" in module.code
    for batch in (1, 2, 3, 5):
        agrees(model, {"x": normal(batch, 6)})
        x = torch.from_numpy(normal(batch, 6))
        torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize("condition", [True, False])
def test_a_constant_condition_leaves_one_branch(condition: bool) -> None:
    model = with_branches(
        "", "then_y = MatMul(x, a)", "else_y = Relu(x)", "float[N,6] x", a=normal(6, 6), c=np.array(condition)
    )
    module = agrees(model, {"x": normal(3, 6)})
    assert ("matmul" in module.code) == condition
    assert ("relu" in module.code) != condition
    assert set(module.state_dict()) == {"a", "c"}


def test_branches_in_branches() -> None:
    deep = parse_graph("deep () => (float p) { p = MatMul(x, a) }")
    flat = parse_graph("flat () => (float q) { q = Sigmoid(x) }")
    node = helper.make_node("If", ["d"], ["then_y"], then_branch=deep, else_branch=flat)
    graph = parse_graph("g (float[N,6] x, bool c, bool d) => (float y) { y = Neg(x) }")
    then = helper.make_graph(
        [node], "then", [], [helper.make_tensor_value_info("then_y", TensorProto.FLOAT, None)]
    )
    otherwise = parse_graph("otherwise () => (float else_y) { else_y = Tanh(x) }")
    del graph.node[:]
    graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=otherwise))
    graph.initializer.append(numpy_helper.from_array(normal(6, 6), "a"))
    model = Model.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    for c in (True, False):
        for d in (True, False):
            module = agrees(model, {"x": normal(3, 6), "c": np.array(c), "d": np.array(d)})
    assert set(module.state_dict()) == {"a"}
    other = copy.deepcopy(module)
    arguments = (torch.ones(2, 6), torch.tensor(True), torch.tensor(True))
    with torch.no_grad():
        module.a.zero_()
    assert module(*arguments).abs().max() == 0
    assert other(*arguments).abs().max() > 0


def test_several_outputs() -> None:
    then = parse_graph("then () => (float p, float q) { p = Relu(x) q = MatMul(x, a) }")
    otherwise = parse_graph("otherwise () => (float r, float s) { r = MatMul(x, a) s = Identity(x) }")
    graph = parse_graph("g (float[N,6] x, bool c) => (float y, float z) { y = Neg(x) }")
    del graph.node[:]
    graph.node.append(helper.make_node("If", ["c"], ["y", "z"], then_branch=then, else_branch=otherwise))
    graph.initializer.append(numpy_helper.from_array(normal(6, 6), "a"))
    model = Model.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    for c in (True, False):
        agrees(model, {"x": normal(3, 6), "c": np.array(c)})
