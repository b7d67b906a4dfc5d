"""to_torch: names, ties, training mode, dynamic sizes, bodies, hostile names; numbers from ONNX Runtime."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import onnx
import pytest
import torch
from nets import compute, net, normal
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError, ModelWarning, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.bridge.rules import TABLE, register

IMAGE = "float[N,3,H,W] x"


def agrees(model: Model, feed: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """The import computes what ONNX Runtime computes."""
    module = to_torch(model)
    names = [info.name for info in model.outputs]
    with torch.no_grad():
        found = module(*(torch.from_numpy(feed[info.name]) for info in model.inputs))
    for ours, wanted in zip([found] if len(names) == 1 else found, compute(model, feed, *names), strict=True):
        np.testing.assert_allclose(ours.numpy(), wanted, atol=tolerance, rtol=tolerance)


def test_weights_are_parameters_under_their_own_dotted_names() -> None:
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "layer.0.weight", "layer.0.bias"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [
                numpy_helper.from_array(normal(4, 3, 3, 3), "layer.0.weight"),
                numpy_helper.from_array(normal(4), "layer.0.bias"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    module = to_torch(proto)
    assert set(dict(module.named_parameters())) == {"layer.0.weight", "layer.0.bias"}
    assert module.get_parameter("layer.0.weight").shape == (4, 3, 3, 3)
    for batch in (1, 5):
        agrees(Model.load(proto), {"x": normal(batch, 3, 8, 8)})


def test_every_initializer_is_there_used_or_not() -> None:
    model = net(
        "s = Reshape(x, shape) y = MatMul(s, w)",
        {"shape": np.array([0, 6]), "w": (6, 4), "left": np.ones(3, np.int64)},
    )
    state = to_torch(model).state_dict()
    assert set(state) == {"shape", "w", "left"}
    assert state["shape"].tolist() == [0, 6]


@pytest.mark.parametrize(
    "name", ['a"b', "forward", "training", "a..b", ".a", "a.", "_ops.x", "x\ny", "class", "0"]
)
def test_names_that_python_or_torch_cannot_hold_get_another_key(name: str) -> None:
    model = net("y = Add(x, w)", {"w": (6,)})
    proto = model.to_proto()
    proto.graph.initializer[0].name = name
    proto.graph.node[0].input[1] = name
    agrees(Model.load(proto), {"x": normal(3, 6)})
    module = to_torch(proto)
    assert len(module.state_dict()) == 1
    copy.deepcopy(module)


def test_a_name_that_is_the_prefix_of_another() -> None:
    model = net("h = Add(x, w) y = Add(h, v)", {"w": (6,), "v": (6,)})
    proto = model.to_proto()
    proto.graph.initializer[1].name = proto.graph.node[1].input[1] = "w.scale"
    agrees(Model.load(proto), {"x": normal(3, 6)})
    assert len(to_torch(proto).state_dict()) == 2


def test_code_injected_through_a_name_is_not_run() -> None:
    model = net("y = Add(x, w)", {"w": (6,)})
    proto = model.to_proto()
    evil = 'w")\n    raise SystemExit\n    ("'
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = evil
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "x, y=print('run')):\n  #"
    to_torch(Model.load(proto))(torch.zeros(2, 6))


def test_a_shared_initializer_is_one_parameter() -> None:
    model = net("h = MatMul(x, w) r = Relu(h) y = MatMul(r, w)", {"w": (6, 6)})
    module = to_torch(model)
    assert [name for name, _ in module.named_parameters()] == ["w"]
    module(torch.ones(2, 6)).sum().backward()
    w = module.w.detach().clone().requires_grad_()
    (torch.relu(torch.ones(2, 6) @ w) @ w).sum().backward()
    torch.testing.assert_close(module.w.grad, w.grad)


def test_ties_on_purpose_are_silent_and_merged_constants_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_torch(net("h = MatMul(x, w) y = MatMul(h, w)", {"w": (6, 6)}))
    with pytest.warns(ModelWarning, match=r"'one' is shared by .*merged"):
        to_torch(net("h = Mul(x, one) y = Add(h, one)", {"one": np.ones(6, np.float32)}))


def test_a_tied_embedding_is_one_parameter_and_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = net(
            "e = Gather(table, x) t = Transpose<perm=[1,0]>(table) y = MatMul(e, t)",
            {"table": (7, 5)},
            "int64[N,T] x",
            "float[N,T,7] y",
        )
        module = to_torch(model)
    assert [name for name, _ in module.named_parameters()] == ["table"]
    agrees(model, {"x": np.array([[1, 6], [0, 3]])})


def test_batchnorm_follows_training_mode_with_torchs_own_statistics() -> None:
    weights = {
        "w": (4, 3, 3, 3),
        "s": (4,),
        "b": (4,),
        "m": np.zeros(4, np.float32),
        "v": np.ones(4, np.float32),
    }
    model = net("c = Conv(x, w) y = BatchNormalization<momentum=0.8>(c, s, b, m, v)", weights, IMAGE)
    module = to_torch(model)
    assert not module.training
    assert {name for name, _ in module.named_parameters()} == {"w", "s", "b"}
    assert {"m", "v"} <= {name for name, _ in module.named_buffers()}
    native = torch.nn.BatchNorm2d(4, momentum=0.2)
    native.load_state_dict(
        {"weight": module.s, "bias": module.b, "running_mean": module.m, "running_var": module.v},
        strict=False,
    )
    x = torch.from_numpy(normal(5, 3, 9, 9))
    agrees(model, {"x": x.numpy()})
    module.train(), native.train()
    torch.testing.assert_close(module(x), native(torch.conv2d(x, module.w)))
    torch.testing.assert_close(module.m, native.running_mean)
    torch.testing.assert_close(module.v, native.running_var)
    again = module.m.clone()
    module.eval()(x)
    assert torch.equal(again, module.m)


def test_dropout_follows_training_mode() -> None:
    module = to_torch(net("y = Dropout(x, r)", {"r": np.float32(0.5)}))
    x = torch.ones(4, 600)
    assert torch.equal(module(x), x)
    torch.manual_seed(0)
    dropped = module.train()(x)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_only_floats_in_weight_slots_are_trainable() -> None:
    mask = np.where(np.tri(4) > 0, 0, -1e9).astype(np.float32)
    model = net(
        """m = Add(x, mask) p = Pow(m, two) g = Mul(p, gain) q = Mul(g, zero) t = Tile(q, reps)
        y = Add(t, inf)""",
        {
            "mask": mask,
            "two": np.float32(2),
            "gain": np.full((4,), 0.5, np.float32),
            "zero": np.tri(4, dtype=np.float32),
            "reps": np.array([1, 1]),
            "inf": np.full((4, 4), -np.inf, np.float32),
        },
        "float[4,4] x",
    )
    assert [name for name, _ in to_torch(model).named_parameters()] == ["gain"]
    everything = to_torch(model, trainable=lambda weight: weight.is_float)
    assert {name for name, _ in everything.named_parameters()} == {"mask", "two", "gain", "zero", "inf"}


def test_an_integer_cannot_be_trainable() -> None:
    with pytest.raises(InputError, match="'w' can't be trainable: it holds int64"):
        to_torch(net("y = Gather(x, w)", {"w": np.array([0])}), trainable=lambda weight: True)


def test_weights_in_constant_nodes_and_transposed_ones_train() -> None:
    value = numpy_helper.from_array(normal(4, 6), "value")
    model = net("t = Transpose<perm=[1,0]>(k) y = MatMul(x, t)", {"k": (4, 6)})
    proto = model.to_proto()
    del proto.graph.initializer[:]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    module = to_torch(proto)
    assert [name for name, _ in module.named_parameters()] == ["k"]
    agrees(Model.load(proto), {"x": normal(3, 6)})


def test_initializers_that_are_also_inputs_are_weights() -> None:
    proto = net("y = MatMul(x, w)", {"w": (6, 4)}).to_proto()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4]))
    module = to_torch(proto)
    assert module.meta == {**module.meta, "inputs": ["x"], "outputs": ["y"]}
    assert [name for name, _ in module.named_parameters()] == ["w"]
    agrees(Model.load(proto), {"x": normal(3, 6)})


def test_shape_arithmetic_leaves_no_trace_but_sizes() -> None:
    model = net(
        """s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, axis) k = Concat<axis=0>(u, minus)
        r = Reshape(x, k) y = MatMul(r, w)""",
        {"zero": np.int64(0), "axis": np.array([0]), "minus": np.array([-1]), "w": (12, 4)},
        "float[N,3,4] x",
    )
    module = to_torch(model)
    calls = [node for node in module.graph.nodes if node.op.startswith("call")]
    assert [str(node.target).split(".")[-1] for node in calls if "matmul" not in str(node.target)] == [
        "size",
        "reshape",
    ]
    for batch in (1, 7):
        agrees(model, {"x": normal(batch, 3, 4)})
    exported = torch.export.export(
        module, (torch.zeros(2, 3, 4),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    )
    assert exported.module()(torch.zeros(5, 3, 4)).shape == (5, 4)
    assert torch.compile(module, backend="eager", fullgraph=True)(torch.zeros(3, 3, 4)).shape == (3, 4)


def branch(name: str, weight: np.ndarray) -> onnx.GraphProto:
    """x @ k + w, with `k` a weight of the branch itself, of the same name in both, and `w` from outside."""
    return helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "k"], [f"{name}_h"]),
            helper.make_node("Add", [f"{name}_h", "w"], [name]),
        ],
        name,
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "k")],
    )


def with_if(
    condition: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], extra: list[onnx.TensorProto]
) -> Model:
    both = {
        "then_branch": branch("a", normal(6, 4, seed=1)),
        "else_branch": branch("b", normal(6, 4, seed=2)),
    }
    graph = helper.make_graph(
        [*condition, helper.make_node("If", ["c"], ["h"], **both), helper.make_node("Relu", ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6]), *inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(normal(4, seed=3), "w"), *extra],
    )
    return Model.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_if_with_a_condition_from_the_data() -> None:
    model = with_if([], [helper.make_tensor_value_info("c", TensorProto.BOOL, [])], [])
    module = to_torch(model)
    assert len(list(module.parameters())) == 3  # both branches' own, and the one they share
    for condition in (True, False):
        agrees(model, {"x": normal(3, 6), "c": np.array(condition)})
        module.zero_grad()
        module(torch.from_numpy(normal(3, 6)), torch.tensor(condition)).sum().backward()
        assert sum(p.grad is not None for p in module.parameters()) == 2


def test_if_with_a_condition_on_shapes() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Greater", ["n", "two"], ["c"]),
    ]
    extra = [numpy_helper.from_array(np.int64(0), "zero"), numpy_helper.from_array(np.int64(2), "two")]
    model = with_if(nodes, [], extra)
    for batch in (1, 2, 3, 8):
        agrees(model, {"x": normal(batch, 6)})


def test_if_with_a_constant_condition_is_inlined() -> None:
    model = with_if([], [], [numpy_helper.from_array(np.array(False), "c")])
    module = to_torch(model)
    assert not any(node.op == "call_module" for node in module.graph.nodes)
    agrees(model, {"x": normal(3, 6)})


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
    g (float[N,6] x) => (float[N,4] y) { h = f.twice(x) y = MatMul(h, w) }
    <domain: "f", opset_import: ["" : 17]> twice (a) => (b) {
        c = Constant<value = float {2.0}>() b = Mul(a, c)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(normal(6, 4), "w"))
    model = Model.load(proto)
    assert [name for name, _ in to_torch(model).named_parameters()] == ["w"]
    agrees(model, {"x": normal(3, 6)})


def with_functions(calls: str, functions: str) -> Model:
    header = '<ir_version: 9, opset_import: ["" : 17, "f" : 1]>'
    text = f"{header} g (float[N,6] x) => (float[N,6] y) {{ {calls} }} {functions}"
    return Model.load(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    ("calls", "own"),
    [
        ("y = f.leak(x)", "<slope>"),
        ("y = f.leak<slope=0.5>(x)", "<slope>"),
        ("y = f.outer(x)", "<slope: float = 0.5>"),
        ("y = f.outer(x)", "<slope>"),
        ("h = f.outer<slope=0.125>(x) y = f.leak(h)", "<slope: float = 0.5>"),
    ],
)
def test_attributes_of_functions_have_their_defaults(calls: str, own: str) -> None:
    """Also of a function that another one calls, with an attribute that is handed on or not."""
    functions = f"""<domain: "f", opset_import: ["" : 17, "f" : 1]> outer {own} (a) => (b) {{
        b = f.leak<slope: float = @slope>(a)
    }}
    <domain: "f", opset_import: ["" : 17]> leak <slope: float = 0.25> (a) => (b) {{
        b = LeakyRelu<alpha: float = @slope>(a)
    }}"""
    agrees(with_functions(calls, functions), {"x": normal(3, 6)})


def test_functions_of_older_operator_sets_and_with_domains_of_their_own() -> None:
    """Sets whose operators mean the same, and a domain that the model itself does not import."""
    old = """<domain: "f", opset_import: ["" : 16, "com.microsoft" : 1]> old (a) => (b) {
        c = Relu(a) b = com.microsoft.Gelu(c)
    }"""
    agrees(with_functions("y = f.old(x)", old), {"x": normal(3, 6)})


def test_inner_tensors_can_be_returned() -> None:
    model = net("h = MatMul(x, w) r = Relu(h) y = Softmax(r)", {"w": (6, 4)})
    module = to_torch(model, outputs=["y", "h"])
    x = torch.from_numpy(normal(3, 6))
    y, h = module(x)
    torch.testing.assert_close(h, x @ module.w)
    torch.testing.assert_close(y, torch.softmax(torch.relu(h), 1))
    with pytest.raises(KeyError):
        to_torch(model, outputs=["nowhere"])


def test_what_an_output_does_not_need_is_not_imported() -> None:
    proto = net("h = Relu(x) y = Relu(h)", {}).to_proto()
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Zap", "com.acme"
    to_torch(proto, outputs=["h"])
    with pytest.raises(NotApplicableError, match="Zap"):
        to_torch(proto)


def test_an_operator_without_a_rule_names_its_node() -> None:
    proto = net("y = Relu(x)", {}).to_proto()
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))
    proto.graph.node[0].op_type, proto.graph.node[0].domain, proto.graph.node[0].name = (
        "Zap",
        "com.acme",
        "z1",
    )
    with pytest.raises(NotApplicableError, match=r"node 'z1' \(Zap\).*no rule.*com.acme::Zap.*register"):
        to_torch(proto)


def test_users_can_register_an_operator() -> None:
    proto = net("y = Relu(x)", {}).to_proto()
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))
    node = proto.graph.node[0]
    node.CopyFrom(helper.make_node("Scale", ["x", "w", ""], ["y"], domain="com.acme", by=3.0))
    proto.graph.initializer.append(numpy_helper.from_array(normal(6), "w"))
    register("com.acme::Scale", lambda x, w, bias=None, by=1.0: x * w * by, weights=[1])
    try:
        module = to_torch(proto)
        x = torch.from_numpy(normal(3, 6))
        torch.testing.assert_close(module(x), x * module.w * 3)
        assert [name for name, _ in module.named_parameters()] == ["w"]
    finally:
        del TABLE["com.acme", "Scale"]


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_float_types(dtype: type) -> None:
    kind = {np.float64: "double", np.float16: "float16"}[dtype]
    weights = {"w": normal(6, 4).astype(dtype), "b": normal(4).astype(dtype)}
    model = net("h = MatMul(x, w) y = Add(h, b)", weights, f"{kind}[N,6] x", f"{kind}[N,4] y")
    agrees(model, {"x": normal(3, 6).astype(dtype)}, 1e-2 if dtype == np.float16 else 1e-12)


def test_deepcopy_and_state_dict_round_trip() -> None:
    model = net(
        "c = Conv(x, w, b) r = Relu(c) y = GlobalAveragePool(r)", {"w": (4, 3, 3, 3), "b": (4,)}, IMAGE
    )
    module = to_torch(model)
    with torch.no_grad():
        module.w.add_(1)
    twin, other = copy.deepcopy(module), to_torch(model)
    other.load_state_dict(module.state_dict())
    x = torch.from_numpy(normal(2, 3, 8, 8))
    assert torch.equal(twin(x), module(x))
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        twin.w.zero_()
    assert not torch.equal(twin(x), module(x))


def test_it_is_left_in_eval_mode_and_the_model_untouched() -> None:
    model = net("y = MatMul(x, w)", {"w": (6, 4)})
    before = model.to_proto().SerializeToString()
    module = to_torch(model)
    with torch.no_grad():
        module.w.add_(1)
    assert not module.training
    assert model.to_proto().SerializeToString() == before


def test_what_a_rule_has_no_room_for_is_refused_by_name() -> None:
    """Nothing has run the model: ranks and attributes may be such that no runtime takes them."""
    sizes = {"two": np.array(2), "many": np.array([[3, 4]])}
    model = net("s = Shape(x) t = Concat<axis = 0>(s, two, many) y = Reshape(x, t)", sizes)
    with pytest.raises(
        NotApplicableError, match=r"'t' \(Concat\) can't be imported to PyTorch: it does not take"
    ):
        to_torch(model)
