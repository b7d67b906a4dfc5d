"""Which stored tensors a model has, under which keys, and what is trainable."""

from __future__ import annotations

import numpy as np
import onnx.parser
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import net, normal
from onnx import TensorProto, helper, numpy_helper
from test_importer import with_if
from torch import nn

from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.keys import Keys, put
from onnxfuse.pytorch.bridge.tensors import to_array, to_tensor
from onnxfuse.pytorch.bridge.weights import is_trainable, stored

PARTS = st.sampled_from(
    ["a", "b", "weight", "0", "", "training", "_ops", "forward", 'q"', "\\", "é", "x/y", "::"]
)
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=12)


@given(NAMES)
@settings(max_examples=200, deadline=None)
def test_every_key_can_be_registered_and_is_written_as_source_code(names: list[str]) -> None:
    keys = Keys()
    module = nn.Module()
    for name in names:
        key = keys.claim(name)
        put(module, key, torch.zeros(1))
        assert not set(key) & set("\"'\\\n")
        if key == name:
            assert module.get_buffer(name) is not None
    assert len(module.state_dict()) == len(names)


@given(
    st.lists(st.sampled_from(["a", "b", "c.d", "layers.0.weight", "x/y_z", "onnx::MatMul_12"]), unique=True)
)
def test_legal_names_are_their_own_keys(names: list[str]) -> None:
    keys = Keys()
    assert [keys.claim(name) for name in names] == names


def test_a_weight_knows_where_it_is_used_through_what_hands_it_on() -> None:
    model = net(
        "t = Transpose<perm=[1,0]>(w) h = MatMul(x, t) e = Gather(w, i) s = ReduceSum(e) y = Add(h, s)",
        {"w": (4, 6), "i": np.array([1])},
    )
    found = {weight.name: weight for weight in stored(model)}
    assert {(use.op, use.slot) for use in found["w"].uses} == {("MatMul", 1), ("Gather", 0)}
    assert is_trainable(found["w"])
    assert not is_trainable(found["i"])


def test_weights_that_only_functions_read_are_weights() -> None:
    """What lies in a function itself is not: it is none of the module's."""
    text = """<ir_version: 9, opset_import: ["" : 17, "f" : 1]>
    g (float[N,6] x) => (float[N,6] y) { h = f.outer(x, w) y = f.linear(h, i) }
    <domain: "f", opset_import: ["" : 17, "f" : 1]> outer (a, w) => (c) { c = f.linear(a, w) }
    <domain: "f", opset_import: ["" : 17]> linear (a, w) => (c) {
        k = Constant<value = float[2] {1, 2}>() s = ReduceSum(k) m = MatMul(a, w) c = Mul(m, s)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(normal(6, 6), name) for name in "wi")
    found = stored(Model.load(proto))
    assert [(weight.name, [(use.op, use.slot) for use in weight.uses]) for weight in found] == [
        ("w", [("MatMul", 1)]),
        ("i", [("MatMul", 1)]),
    ]
    assert all(is_trainable(weight) for weight in found)


def test_a_class_token_in_a_concat_is_a_weight_and_a_mask_is_not() -> None:
    model = net(
        "k = Concat<axis=1>(token, x) h = Add(k, mask) i = Add(h, windows) y = Mul(i, gate)",
        {
            "windows": -100 * np.tri(3, 6, dtype=np.float32),
            "token": np.full((1, 1, 6), 0.1, np.float32),
            "mask": np.array([[0.0, np.finfo(np.float32).min]], np.float32).repeat(3, 1)[None].repeat(1, 0),
            "gate": np.tri(6, dtype=np.float32)[:3],
        },
        "float[1,2,6] x",
    )
    trainable = {weight.name for weight in stored(model) if is_trainable(weight)}
    assert trainable == {"token"}


def test_constants_of_constant_nodes_are_weights_if_they_are_floats_of_some_size() -> None:
    proto = net("y = Add(x, k)", {"k": (6,)}).to_proto()
    value = proto.graph.initializer.pop()
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["one"], value_float=1.0))
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["many"], value_floats=[1.0, 2.0]))
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["axes"], value_ints=[1, 2]))
    found = {weight.name: weight.initializer for weight in stored(Model.load(proto))}
    assert found == {"k": False, "many": False}


def test_strings_and_types_that_torch_lacks_are_left_out() -> None:
    proto = net("y = Relu(x)", {}).to_proto()
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"]))
    assert stored(Model.load(proto)) == []


def test_bytes_survive_torch() -> None:
    bfloat16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    nan = np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32).view(np.float32)
    for array in (
        nan,
        np.float64(3).reshape(()),
        np.arange(6, dtype=np.float16).reshape(2, 3).T,
        np.array([1.5, -2.0]).astype(bfloat16),
        np.array([True, False]),
        np.zeros((0, 4), np.int32),
        np.arange(4, dtype=np.uint16),
    ):
        again = to_array(to_tensor(array), array.dtype)
        assert again.dtype == array.dtype
        assert again.shape == array.shape
        assert again.tobytes() == np.ascontiguousarray(array).tobytes()


def test_tensors_of_bodies_are_found_with_the_way_to_them() -> None:
    model = with_if([], [helper.make_tensor_value_info("c", TensorProto.BOOL, [])], [])
    found = {(weight.scope, weight.name) for weight in stored(model)}
    assert found == {((), "w"), ((("h", "then_branch"),), "k"), ((("h", "else_branch"),), "k")}
    keys = [weight.key for weight in stored(model)]
    assert len(set(keys)) == 3
    assert all(is_trainable(weight) for weight in stored(model))


def test_a_running_variance_is_no_weight_even_where_it_is_a_scale_too() -> None:
    ones = np.ones(3, np.float32)
    model = net(
        "y = BatchNormalization(x, ones, zeros, zeros, ones)",
        {"ones": ones, "zeros": 0 * ones},
        "float[N,3,H,W] x",
    )
    assert not any(is_trainable(weight) for weight in stored(model))
