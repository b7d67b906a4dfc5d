"""The model under edit: what it knows of itself, what an edit changes, and what it leaves alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError
from onnxfuse.ir.editing import PASS_KEY, REPLACES_KEY
from onnxfuse.ir.graph import CycleError
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Constant, Node, Variable
from onnxfuse.ops.finite import check_finite

W = np.array([[1, 2, 0], [0, 1, 1], [2, 0, 1], [1, 1, 1]], np.float32)
SCALE = np.array([1, 2, 3, 4], np.float32)
X = np.array([[1, 2, 3, 4], [-1, 0, 1, 0]], np.float32)


def parse(body: str, header: str = 'ir_version: 8, opset_import: ["" : 17]') -> ModelProto:
    return onnx.parser.parse_model(f"<{header}>\n{body}")


def rich() -> ModelProto:
    """A model with everything that a round trip could lose."""
    model = parse(
        """g (float[N,4] x, bool flag, float[3] bias) => (float[N,3] y, float[N,4] s)
        <float[3] bias = {1, -1, 0.5}, float[4] scale = {1, 2, 3, 4}, float[2] unused = {7, 8}>
        {
            [product] h = MatMul(x, w)
            [sum] a = Add(h, bias)
            [call] t = local.twice(a)
            [floor] zero = Constant<value_float = 0.0>()
            [clip] y = Clip(t, zero)
            [choice] s = If(flag) <
                then_branch = yes () => (float[N,4] p) { inner = Constant<value_float = 2.0>()
                    q = Mul(x, scale) p = Mul(q, inner) },
                else_branch = no () => (float[N,4] n) { n = Identity(x) }
            >
            [dead] nowhere = Exp(h)
        }
        <domain: "local", opset_import: ["" : 20]> twice (u) => (v) { v = Add(u, u) }""",
        'ir_version: 10, opset_import: ["" : 20, "local" : 1], producer_name: "maker", '
        'producer_version: "1.2", domain: "org.example", model_version: 7, doc_string: "about", '
        'metadata_props: ["author" : "someone", "character" : "a b c"]',
    )
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(W, "w"))
    graph.doc_string = "the graph"
    graph.metadata_props.add(key="graph key", value="graph value")
    graph.node[0].doc_string = "a product"
    graph.node[0].metadata_props.add(key="namespace", value="net/first")
    graph.initializer[-1].doc_string = "a weight"
    graph.initializer[-1].metadata_props.add(key="source", value="training")
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 3]))
    graph.value_info[0].doc_string = "hidden"
    annotation = graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unused")
    sparse = graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([5.0], np.float32), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([2], np.int64), "sparse_indices"))
    training = model.training_info.add()
    training.algorithm.name = "step"
    training.initialization.name = "init"
    return model


def run(model: Model | ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = model.to_proto() if isinstance(model, Model) else model
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    outputs = session.run(None, feed)
    return dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))


def data(proto: object) -> bytes:
    return proto.SerializeToString(deterministic=True)  # type: ignore[attr-defined,no-any-return]


def without(proto: ModelProto, *names: str) -> tuple[bytes, list[bytes]]:
    """The model as bytes with the nodes of those names set apart."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.node[:]
    return data(copy), [data(n) for n in proto.graph.node if n.name not in names]


# Preservation


@pytest.mark.parametrize("form", ["proto", "bytes", "path"])
def test_round_trip_keeps_every_byte(form: str, tmp_path: Path) -> None:
    original = rich()
    path = tmp_path / "m.onnx"
    path.write_bytes(data(original))
    source = {"proto": original, "bytes": data(original), "path": path}[form]
    model = Model.load(source)
    assert data(model.to_proto()) == data(original)
    assert data(model.copy().to_proto()) == data(original)
    assert model.path == (path if form == "path" else None)


def test_looking_does_not_touch() -> None:
    original = rich()
    model = Model.load(original)
    for tensor in model.tensors():
        model.weight(tensor)
        model.consumers(tensor)
    model.shapes()
    model.prune()
    check_finite(model)
    assert data(model.to_proto()) == data(original)


def test_the_callers_proto_is_neither_kept_nor_changed() -> None:
    original = rich()
    before = data(original)
    model = Model.load(original)
    model.set_weight(model.tensor("w"), W * 2)
    model.nodes[0].attrs["alpha"] = 1.0
    model.to_proto()
    assert data(original) == before
    original.graph.node[0].op_type = "Other"
    assert next(n for n in model.to_proto().graph.node if n.name == "sum").op_type == "Add"
    original.graph.node[1].op_type = "Other"
    assert next(n for n in model.to_proto().graph.node if n.name == "sum").op_type == "Add"


def test_an_edit_changes_its_own_node_only() -> None:
    original = rich()
    model = Model.load(original)
    clip = next(n for n in model.nodes if n.op == "Clip")
    clip.inputs.append(model.add_weight("six", np.float32(6)))
    edited = model.to_proto()
    assert list(edited.graph.node[4].input) == ["t", "zero", "six"]
    assert edited.graph.initializer[-1].name == "six"
    del edited.graph.initializer[-1]
    assert without(edited, "clip") == without(original, "clip")


def test_an_edited_node_keeps_what_was_not_edited() -> None:
    body = "[n] y = Gemm<transB = 1, alpha = 0.5, beta = 1.0>(x, w)"
    original = parse(f"g (float[N,4] x, float[4,4] w) => (float[N,4] y) {{ {body} }}")
    original.graph.node[0].doc_string = "kept"
    original.graph.node[0].attribute[1].doc_string = "replaced with its attribute"
    original.graph.node[0].attribute[2].doc_string = "kept too"
    model = Model.load(original)
    node = model.nodes[0]
    node.attrs["alpha"] = 2  # an int for a float attribute
    node.metadata["note"] = "edited"
    proto = model.to_proto().graph.node[0]
    assert (proto.doc_string, proto.attribute[2].doc_string) == ("kept", "kept too")
    assert [a.name for a in proto.attribute] == ["transB", "alpha", "beta"]
    assert (proto.attribute[1].f, proto.attribute[1].type) == (2.0, onnx.AttributeProto.FLOAT)
    assert {p.key: p.value for p in proto.metadata_props} == {"note": "edited"}


def test_metadata_alone_is_an_edit() -> None:
    original = rich()
    model = Model.load(original)
    model.nodes[0].metadata["onnxfuse.pass"] = "test"
    props = model.to_proto().graph.node[0].metadata_props
    assert [(p.key, p.value) for p in props] == [("namespace", "net/first"), ("onnxfuse.pass", "test")]
    del model.nodes[0].metadata["onnxfuse.pass"]
    assert data(model.to_proto()) == data(original)


def test_renaming_an_initializer() -> None:
    original = rich()
    model = Model.load(original)
    model.tensor("w").name = "kernel"
    proto = model.to_proto()
    assert proto.graph.initializer[-1].name == proto.graph.node[0].input[1] == "kernel"
    assert (proto.graph.initializer[-1].doc_string, original.graph.initializer[-1].name) == ("a weight", "w")
    np.testing.assert_array_equal(model.weight(model.tensor("kernel")), W)
    with pytest.raises(KeyError):
        model.tensor("w")
    run(model, {"x": X, "flag": np.array(True)})


def test_arrays_put_straight_into_attributes_are_seen() -> None:
    model = Model.load(parse("g () => (float[N] y) { y = Constant<value = float[1] {1}>() }"))
    for value in (2.0, 3.0):
        model.nodes[0].attrs["value"] = np.array([value], np.float32)
        proto = model.to_proto().graph.node[0].attribute[0].t
        assert numpy_helper.to_array(proto) == value
        assert model.weight(model.tensor("y")) == value


def test_undoing_an_edit_restores_the_original_bytes() -> None:
    original = rich()
    model = Model.load(original)
    node = model.nodes[0]
    w = node.inputs[1]
    node.inputs[1] = model.tensor("x")
    node.attrs["extra"] = 1
    assert data(model.to_proto()) != data(original)
    node.inputs[1] = w
    del node.attrs["extra"]
    assert data(model.to_proto()) == data(original)


def test_an_edited_weight_keeps_its_notes_and_place() -> None:
    original = rich()
    model = Model.load(original)
    model.set_weight(model.tensor("w"), W + 1)
    edited = model.to_proto()
    assert [t.name for t in edited.graph.initializer] == ["bias", "scale", "unused", "w"]
    w = edited.graph.initializer[-1]
    assert (w.doc_string, w.metadata_props[0].value) == ("a weight", "training")
    np.testing.assert_array_equal(numpy_helper.to_array(w), W + 1)
    w.CopyFrom(original.graph.initializer[-1])
    assert data(edited) == data(original)


# Looking


def test_inputs_and_outputs_are_the_users() -> None:
    model = Model.load(rich())
    assert [(i.name, i.dtype, i.shape) for i in model.inputs] == [
        ("x", np.float32, ("N", 4)),
        ("flag", np.bool_, ()),
    ]
    assert [(o.name, o.shape) for o in model.outputs] == [("y", ("N", 3)), ("s", ("N", 4))]
    assert model.opset == 20
    assert model.external_dir is None


def test_links_between_nodes_and_tensors() -> None:
    model = Model.load(rich())
    h, x, scale = model.tensor("h"), model.tensor("x"), model.tensor("scale")
    assert model.producer(h) is model.nodes[0]
    assert model.producer(x) is None
    assert [n.name for n in model.consumers(h)] == ["sum", "dead"]
    assert [n.name for n in model.consumers(x)] == ["product", "choice"]
    assert [n.name for n in model.consumers(scale)] == ["choice"]
    assert model.captured(x)
    assert model.captured(scale)
    assert not model.captured(h)
    assert model.is_output(model.tensor("y"))
    assert not model.is_output(h)
    with pytest.raises(KeyError):
        model.tensor("inner")


def test_a_node_that_uses_a_tensor_twice_is_one_consumer() -> None:
    model = Model.load(parse("g (float[N] x) => (float[N] y) { y = Mul(x, x) }"))
    assert model.consumers(model.tensor("x")) == [model.nodes[0]]


def test_nodes_and_tensors_are_told_apart_by_identity() -> None:
    model = Model.load(parse("g (float[N] x) => (float[N] y) { a = Relu(x) b = Relu(x) y = Add(a, b) }"))
    first, second = model.nodes[:2]
    second.outputs.clear()
    assert first != second
    assert len({first, second, *first.inputs, *second.inputs}) == 3


# Weights

FORMS = {
    "value": ("<value = float[2] {1, 2}>", np.array([1, 2], np.float32)),
    "value_float": ("<value_float = 3.0>", np.array(3, np.float32)),
    "value_floats": ("<value_floats = [3.0, 4.0]>", np.array([3, 4], np.float32)),
    "value_int": ("<value_int = 5>", np.array(5, np.int64)),
    "value_ints": ("<value_ints = [5, 6]>", np.array([5, 6], np.int64)),
    "value_string": ('<value_string = "a">', np.array("a", object)),
    "value_strings": ('<value_strings = ["a", "b"]>', np.array(["a", "b"], object)),
}


@pytest.mark.parametrize("form", FORMS)
def test_constant_nodes_are_weights_in_every_form(form: str) -> None:
    text, value = FORMS[form]
    model = Model.load(parse(f"g (float[N] x) => (float[N] y) {{ [c] k = Constant{text}() y = Relu(x) }}"))
    tensor = model.tensor("k")
    assert model.is_weight(tensor)
    found = model.weight(tensor)
    assert found is not None
    np.testing.assert_array_equal(found, value)
    assert found.dtype == value.dtype
    before = data(model.to_proto())
    copy = model.copy()
    model.set_weight(tensor, np.ones(3, np.float16))
    np.testing.assert_array_equal(model.weight(tensor), np.ones(3))
    constant = model.to_proto().graph.node[0]
    assert [a.name for a in constant.attribute] == ["value"]
    np.testing.assert_array_equal(numpy_helper.to_array(constant.attribute[0].t), np.ones(3, np.float16))
    assert data(copy.to_proto()) == before


def test_a_sparse_constant_node_is_a_weight() -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [4.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1, 2], [1, 0])
    node = helper.make_node(
        "Constant", [], ["k"], sparse_value=helper.make_sparse_tensor(values, indices, [2, 2])
    )
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    proto.graph.node.append(node)
    model = Model.load(proto)
    np.testing.assert_array_equal(model.weight(model.tensor("k")), [[0, 0], [4, 0]])
    assert data(model.to_proto()) == data(proto)


@pytest.mark.parametrize("name", ["w", "bias", "sparse"])
def test_initializers_are_weights(name: str) -> None:
    expected = {"w": W, "bias": [1, -1, 0.5], "sparse": [0, 0, 5, 0]}[name]
    model = Model.load(rich())
    tensor = model.tensor(name)
    assert isinstance(tensor, Constant)
    assert model.is_weight(tensor)
    np.testing.assert_array_equal(model.weight(tensor), expected)
    new = np.asarray(expected, np.float32) * 2
    model.set_weight(tensor, new)
    np.testing.assert_array_equal(model.weight(tensor), new)
    saved = {t.name: t for t in model.to_proto().graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(saved[name]), new)
    assert len(model.to_proto().graph.sparse_initializer) == (name != "sparse")


def test_what_is_no_weight() -> None:
    model = Model.load(rich())
    for name in ("x", "h"):
        assert not model.is_weight(model.tensor(name))
        assert model.weight(model.tensor(name)) is None
        with pytest.raises(ValueError, match="not a weight"):
            model.set_weight(model.tensor(name), W)


def test_a_weight_is_read_only_unless_private() -> None:
    model = Model.load(rich())
    for _ in range(2):  # as stored, then as edited
        shared = model.weight(model.tensor("w"))
        private = model.weight(model.tensor("w"), writable=True)
        assert shared is not None
        assert private is not None
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 9
        private[0] = 9
        np.testing.assert_array_equal(model.weight(model.tensor("w")), W)
        model.set_weight(model.tensor("w"), W.copy())


def test_an_initializer_listed_as_input_stays_one() -> None:
    original = rich()
    model = Model.load(original)
    model.set_weight(model.tensor("bias"), np.array([3], np.float32))
    proto = model.to_proto()
    assert [v.name for v in proto.graph.input] == ["x", "flag", "bias"]
    assert [d.dim_value for d in proto.graph.input[2].type.tensor_type.shape.dim] == [1]
    expected = np.clip(2 * (X @ W + 3), 0, None)
    np.testing.assert_allclose(run(model, {"x": X, "flag": np.array(True)})["y"], expected)
    total = next(n for n in model.nodes if n.name == "sum")
    total.inputs[1] = model.add_weight("bias", np.zeros(3, np.float32))
    model.prune()
    assert [v.name for v in model.to_proto().graph.input] == ["x", "flag"]
    assert [v.name for v in model.copy().to_proto().graph.input] == ["x", "flag"]


def test_before_ir_4_new_weights_are_listed_as_inputs() -> None:
    proto = parse(
        "g (float[N] x, float[1] w) => (float[N] y) <float[1] w = {2}> { y = Mul(x, w) }",
        'ir_version: 3, opset_import: ["" : 9]',
    )
    model = Model.load(proto)
    model.nodes[0].inputs[1] = model.add_weight("w", np.array([4], np.float32))
    model.prune()
    edited = model.to_proto()
    assert [v.name for v in edited.graph.input] == ["x", "w_1"]
    onnx.checker.check_model(edited)
    np.testing.assert_array_equal(run(edited, {"x": X[0]})["y"], X[0] * 4)


def test_arrays_of_the_other_byte_order_are_converted() -> None:
    model = Model.load(rich())
    model.set_weight(model.tensor("w"), W.astype(">f4"))
    np.testing.assert_array_equal(model.weight(model.tensor("w")), W)
    np.testing.assert_array_equal(numpy_helper.to_array(model.to_proto().graph.initializer[-1]), W)


# Editing


def test_a_new_node_says_where_it_comes_from() -> None:
    model = Model.load(rich())
    total = next(n for n in model.nodes if n.name == "sum")
    a, sources = total.outputs[0], list(total.inputs)
    model.remove([total])
    node = model.add_node("Sub", sources, [a], name="new", by="test", replaces=["sum", 'a "b"'])
    proto = next(n for n in model.to_proto().graph.node if n.name == "new")
    props = {p.key: p.value for p in proto.metadata_props}
    assert props[PASS_KEY] == "test"
    assert json.loads(props[REPLACES_KEY]) == ["sum", 'a "b"']
    assert [n.name for n in model.nodes].index("new") == 1
    assert model.producer(model.tensor("a")) is node
    expected = np.clip(2 * (X @ W - [1, -1, 0.5]), 0, None)
    np.testing.assert_allclose(run(model, {"x": X, "flag": np.array(False)})["y"], expected)


def test_attributes_take_the_types_of_the_schema() -> None:
    model = Model.load(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"))
    x, y = model.tensor("x"), model.tensor("y")
    model.remove(model.nodes)
    leaky = model.add_node("LeakyRelu", [x], ["a"], {"alpha": 1}, by="test")
    axes = model.add_node("Gemm", [x, x], ["b"], {"transB": np.int64(1), "alpha": np.float32(2)}, by="test")
    model.add_node("Transpose", [x], ["c"], {"perm": np.array([0])}, by="test")
    model.add_node("ConstantOfShape", [x], ["d"], {"value": np.array([1], np.int64)}, by="test")
    model.add_node("MaxPool", [x], ["e"], {"pads": [], "auto_pad": "SAME_UPPER"}, by="test")
    model.add_node("Relu", [x], [y], by="test")
    kinds = {
        (n.op_type, a.name): (a.type, helper.get_attribute_value(a))
        for n in model.to_proto().graph.node
        for a in n.attribute
    }
    types = onnx.AttributeProto
    assert kinds[leaky.op, "alpha"] == (types.FLOAT, 1.0)
    assert kinds[axes.op, "transB"] == (types.INT, 1)
    assert kinds[axes.op, "alpha"] == (types.FLOAT, 2.0)
    assert kinds["Transpose", "perm"] == (types.INTS, [0])
    assert kinds["ConstantOfShape", "value"][0] == types.TENSOR
    assert kinds["MaxPool", "pads"] == (types.INTS, [])
    assert kinds["MaxPool", "auto_pad"] == (types.STRING, b"SAME_UPPER")


def test_new_nodes_are_sorted_into_place_and_nothing_else_moves() -> None:
    original = rich()
    model = Model.load(original)
    names = [n.name for n in model.nodes]
    clip = next(n for n in model.nodes if n.name == "clip")
    t = clip.inputs[0]
    first = model.add_node("Neg", [t], ["minus"], name="first", by="test")
    second = model.add_node("Neg", [first.outputs[0]], ["plus"], name="second", by="test")
    clip.inputs[0] = second.outputs[0]
    at = names.index("clip")
    assert [n.name for n in model.nodes] == [*names[:at], "first", "second", *names[at:]]


def test_rewiring_alone_is_sorted_on_export() -> None:
    model = Model.load(parse("g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Neg(x) }"))
    model.nodes[0].inputs[0] = model.tensor("z")
    assert [n.op_type for n in model.to_proto().graph.node] == ["Neg", "Relu"]


def test_an_edit_that_makes_a_cycle_is_a_bug() -> None:
    model = Model.load(parse("g (float[N] x) => (float[N] y) { a = Relu(x) y = Neg(a) }"))
    model.nodes[0].inputs[0] = model.tensor("y")
    with pytest.raises(CycleError, match="cycle"):
        model.to_proto()


def test_what_add_node_refuses() -> None:
    model = Model.load(rich())
    x = model.tensor("x")
    for taken in ("h", "w", "x"):
        with pytest.raises(ValueError, match="already"):
            model.add_node("Relu", [x], [model.tensor(taken)], by="test")
    with pytest.raises(ValueError, match="import"):
        model.add_node("FusedConv", [x], ["q"], domain="com.microsoft", by="test")


def test_names_are_unique_against_bodies_too() -> None:
    model = Model.load(rich())
    assert model.unique_name("fresh") == "fresh"
    for taken in ("h", "w", "x", "inner", "p", "unused"):
        assert model.unique_name(taken) == f"{taken}_1"
    assert model.unique_name("h") == "h_1"
    node = model.add_node("Relu", [model.tensor("x")], ["h"], by="test")
    assert node.outputs[0].name == "h_1"
    assert model.add_weight("h", W).name == "h_2"
    model.remove([node])
    model.prune()
    assert model.unique_name("h_1") == "h_1_1"


def test_optional_inputs_and_outputs_can_be_left_out() -> None:
    model = Model.load(rich())
    clip = next(n for n in model.nodes if n.name == "clip")
    t, y = clip.inputs[0], clip.outputs[0]
    model.remove([clip])
    model.add_node("Clip", [t, Variable(""), model.add_weight("six", np.float32(6))], [y], by="test")
    proto = next(n for n in model.to_proto().graph.node if n.op_type == "Clip")
    assert list(proto.input) == ["t", "", "six"]
    expected = np.minimum(2 * (X @ W + [1, -1, 0.5]), 6)
    np.testing.assert_allclose(run(model, {"x": X, "flag": np.array(True)})["y"], expected)


def test_prune_drops_what_edits_made_dead_and_nothing_else() -> None:
    model = Model.load(rich())
    call = next(n for n in model.nodes if n.name == "call")
    call.inputs[0] = model.add_weight("five", np.full((2, 3), 5, np.float32))
    model.prune()
    assert [n.name for n in model.nodes] == ["product", "call", "floor", "clip", "choice", "dead"]
    assert [t.name for t in model.initializers] == ["scale", "unused", "w", "sparse", "five"]
    assert model.to_proto().graph.quantization_annotation[0].tensor_name == "h"
    run(model, {"x": X, "flag": np.array(True)})


def test_what_is_said_of_a_tensor_goes_with_it() -> None:
    model = Model.load(rich())
    model.remove([n for n in model.nodes if n.name == "dead"])
    total = next(n for n in model.nodes if n.name == "sum")
    total.inputs[0] = model.tensor("bias")
    model.prune()
    proto = model.to_proto()
    assert not proto.graph.quantization_annotation
    assert not proto.graph.value_info


def test_prune_keeps_what_a_body_captures() -> None:
    model = Model.load(
        parse(
            """g (float[N] x, bool flag) => (float[N] y) {
                a = Relu(x)
                b = Neg(a)
                y = If(flag) < then_branch = yes () => (float[N] p) {
                        p = If(flag) < then_branch = deep () => (float[N] q) { q = Identity(b) },
                                       else_branch = flat () => (float[N] r) { r = Identity(x) } >
                    }, else_branch = no () => (float[N] n) { n = Identity(x) } >
            }"""
        )
    )
    model.prune()
    assert [n.op for n in model.nodes] == ["Relu", "Neg", "If"]
    assert model.consumers(model.tensor("b")) == [model.nodes[2]]
    negate = model.nodes[1]
    a, b = negate.inputs[0], negate.outputs[0]
    model.remove([negate])
    model.add_node("Abs", [a], [b], by="test")
    model.prune()
    assert [n.op for n in model.nodes] == ["Relu", "Abs", "If"]
    feed = {"x": X[0] * -1, "flag": np.array(True)}
    np.testing.assert_array_equal(run(model, feed)["y"], np.maximum(-X[0], 0))
    model.remove([model.nodes[2]])
    assert not model.captured(b)


def test_a_body_can_be_replaced() -> None:
    model = Model.load(rich())
    choice = next(n for n in model.nodes if n.name == "choice")
    body = onnx.GraphProto()
    body.CopyFrom(choice.attrs["then_branch"])
    body.node[1].op_type = "Add"
    body.node[1].input[1] = "six"
    body.node[2].output[0] = body.output[0].name = "sum"
    model.add_weight("six", np.full(4, 6, np.float32))
    model.set_body(choice, "then_branch", body)
    assert not model.captured(model.tensor("scale"))
    assert model.consumers(model.tensor("six")) == [choice]
    assert model.unique_name("sum") == "sum_1"
    model.prune()
    assert [t.name for t in model.initializers] == ["bias", "unused", "w", "sparse", "six"]
    out = run(model, {"x": X, "flag": np.array(True)})["s"]
    np.testing.assert_allclose(out, (X + 6) * 2)


def test_copies_are_independent() -> None:
    original = rich()
    model = Model.load(original)
    copy = model.copy()
    copy.nodes[0].inputs[1] = copy.add_weight("v", W * 2)
    copy.set_weight(copy.tensor("scale"), SCALE * 2)
    copy.nodes[0].metadata["k"] = "v"
    copy.nodes[4].attrs["x"] = 1
    copy.prune()
    assert data(model.to_proto()) == data(original)
    assert "v" not in {t.name for t in model.initializers}
    edited = data(copy.to_proto())
    assert copy.add_weight("mine", W).name == "mine"
    assert model.unique_name("mine") == "mine"
    copy.prune()
    again = copy.copy()
    assert data(again.to_proto()) == edited
    model.remove([n for n in model.nodes if n.name == "dead"])
    assert data(copy.to_proto()) == edited
    again.prune()
    assert data(again.to_proto()) == edited
    nodes = {id(n) for n in model.nodes} | {id(t) for t in model.tensors()}
    assert not nodes & ({id(n) for n in copy.nodes} | {id(t) for t in copy.tensors()})


def test_a_copy_shares_the_weights() -> None:
    model = Model.load(rich())
    array = np.ones((4, 3), np.float32)
    model.set_weight(model.tensor("w"), array)
    for one in (model, model.copy()):
        shared = one.weight(one.tensor("w"))
        assert shared is not None
        assert np.shares_memory(shared, array)


def test_list_attributes_of_a_copy_are_its_own() -> None:
    model = Model.load(parse("g (float[N,M] x) => (float[N,M] y) { y = Transpose<perm = [1, 0]>(x) }"))
    copy = model.copy()
    copy.nodes[0].attrs["perm"][:] = [0, 1]
    assert model.nodes[0].attrs["perm"] == [1, 0]
    assert list(copy.to_proto().graph.node[0].attribute[0].ints) == [0, 1]


def test_attributes_without_a_plain_form_survive() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    proto.graph.node.append(helper.make_node("Optional", [], ["o"], type=kind))
    pickled = helper.make_node("Blob", [], ["b"], domain="my.own", blob=b"\xff\xfe")
    proto.graph.node.append(pickled)
    proto.opset_import.add(domain="my.own", version=1)
    model = Model.load(proto)
    assert model.nodes[2].attrs["blob"] == b"\xff\xfe"
    assert data(model.to_proto()) == data(proto)
    model.nodes[1].name = "renamed"
    model.nodes[2].name = "renamed too"
    edited = model.to_proto().graph.node
    assert edited[1].attribute[0] == proto.graph.node[1].attribute[0]
    assert edited[2].attribute[0] == pickled.attribute[0]


@pytest.mark.parametrize(
    "kind",
    [
        helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2])),
        helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None)),
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)),
        helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [2]),
    ],
)
def test_inputs_that_are_no_tensors(kind: onnx.TypeProto) -> None:
    value = helper.make_value_info("x", kind)
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    graph.output[0].name = "y"
    graph.value_info.append(onnx.ValueInfoProto(name="other"))
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    model = Model.load(proto)
    assert model.inputs[0].dtype is None
    assert model.shapes()["y"].dtype is None
    assert model.to_proto().graph.input[0] == value


def test_the_ai_onnx_domain_is_the_default_one() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = ai.onnx.Relu(x) }")
    proto.opset_import[0].domain = "ai.onnx"
    model = Model.load(proto)
    assert (model.nodes[0].domain, model.opset) == ("", 17)
    assert model.shapes()["y"].shape == ("N",)
    run(model, {"x": X[0]})
    assert data(model.to_proto()) == data(proto)


@pytest.mark.parametrize("count", [200, 2000])
def test_editing_is_linear(count: int) -> None:
    """Adding and removing nodes one by one looks at each node a bounded number of times."""
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model = Model.load(proto)
    looks = 0
    original = Model._sources

    def counted(self: Model, node: Node):  # type: ignore[no-untyped-def]
        nonlocal looks
        looks += 1
        return original(self, node)

    Model._sources = counted  # type: ignore[method-assign]
    try:
        tensor = model.tensor("x")
        for _ in range(count):
            tensor = model.add_node("Relu", [tensor], ["r"], by="test").outputs[0]
        added = list(model.nodes)[1:]
        for node in added:
            model.remove([node])
        assert [n.op for n in model.nodes] == ["Relu"]
    finally:
        Model._sources = original  # type: ignore[method-assign]
    assert looks <= 2 * count + 10


def test_only_one_module_imports_graphsurgeon() -> None:
    package = Path(__file__).parents[2] / "onnxfuse"
    users = [p.name for p in package.rglob("*.py") if "import onnx_graphsurgeon" in p.read_text()]
    assert users == ["nodes.py"]


def test_loading_prints_nothing() -> None:
    code = "import sys; from onnxfuse.ir.model import Model; Model.load(sys.stdin.buffer.read()).shapes()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=data(rich()), capture_output=True, env=os.environ, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        ("w", np.nan, "'w' has a NaN"),
        ("w", np.inf, "'w' has an infinite"),
        ("unused", np.inf, None),
        ("unused", np.nan, "'unused' has a NaN"),
        ("scale", -np.inf, None),
        ("sparse", np.nan, "'sparse' has a NaN"),
    ],
)
@pytest.mark.parametrize("edited", [True, False])
def test_non_finite_weights(place: str, value: float, word: str | None, edited: bool) -> None:
    proto = rich()
    stored = {t.name: t for t in proto.graph.initializer} | {
        "sparse": proto.graph.sparse_initializer[0].values
    }
    array = numpy_helper.to_array(stored[place]).copy()
    array.reshape(-1)[-1] = value
    if not edited:
        stored[place].CopyFrom(numpy_helper.from_array(array, place))
    model = Model.load(proto)
    if edited:
        model.set_weight(model.tensor(place), array)
    if word is None:
        check_finite(model)
    else:
        with pytest.raises(InputError, match=word):
            check_finite(model)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16", "float8_e4m3fn"])
def test_nan_of_every_float_type(dtype: str) -> None:
    import ml_dtypes

    array = np.array([1, np.nan], getattr(ml_dtypes, dtype, None) or dtype)
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    proto.graph.initializer.append(numpy_helper.from_array(array, "k"))
    with pytest.raises(InputError, match="'k' has a NaN"):
        check_finite(Model.load(proto))


def test_nan_in_a_constant_node_a_body_or_a_function() -> None:
    proto = rich()
    bad = numpy_helper.from_array(np.array([np.nan], np.float32), "inside")
    body = proto.graph.node[5].attribute[0].g
    body.initializer.append(bad)
    with pytest.raises(InputError, match="'inside' has a NaN"):
        check_finite(Model.load(proto))
    proto = rich()
    proto.functions[0].node.append(helper.make_node("Constant", [], ["z"], value=bad))
    with pytest.raises(InputError, match="'inside' has a NaN"):
        check_finite(Model.load(proto))
    proto = rich()
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=bad))
    with pytest.raises(InputError, match="'k' has a NaN"):
        check_finite(Model.load(proto))
