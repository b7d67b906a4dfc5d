"""Shapes: declared, inferred and run, and what an edit does to them."""

import numpy as np
import onnx
import pytest
from nets import RUNTIME
from onnx import ModelProto, helper, numpy_helper
from onnxruntime import InferenceSession

from onnxfuse.ir import protos, shapes
from onnxfuse.ir.model import Model
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.observed_shapes import run_shapes, shapes_on

FLOAT = np.dtype(np.float32)


def parse(body: str, header: str = 'ir_version: 8, opset_import: ["" : 17]') -> ModelProto:
    """A model from text, in which `float y` of an output says nothing of its shape."""
    model = onnx.parser.parse_model(f"<{header}>\n{body}")
    for output in model.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.ClearField("type")
    return model


def test_types_and_shapes_of_everything() -> None:
    model = Model.load(
        parse(
            """g (float[N,4] x, int64[K] i) => (float[N,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> {
                k = Constant<value_ints = [1, 2]>()
                h = MatMul(x, w)
                s = Shape(h)
                r = Reshape(x, k)
                e = Gather(x, i)
                y = Relu(h)
            }"""
        )
    )
    assert model.shapes() == {
        "x": TensorInfo("x", FLOAT, ("N", 4)),
        "i": TensorInfo("i", np.dtype(np.int64), ("K",)),
        "w": TensorInfo("w", FLOAT, (4, 2)),
        "k": TensorInfo("k", np.dtype(np.int64), (2,)),
        "h": TensorInfo("h", FLOAT, ("N", 2)),
        "s": TensorInfo("s", np.dtype(np.int64), (2,)),
        "r": TensorInfo("r", FLOAT, (1, 2)),
        "e": TensorInfo("e", FLOAT, ("K", 4)),
        "y": TensorInfo("y", FLOAT, ("N", 2)),
    }


def test_unknown_dimensions_are_none_and_named_ones_keep_their_names() -> None:
    model = parse(
        "g (float[unk__7,3,H,W] x) => (float y) { c = Relu(x) y = MaxPool<kernel_shape = [2, 2]>(c) }"
    )
    names = ("", "?", -1, None)
    for name in names:
        value = onnx.ValueInfoProto()
        value.CopyFrom(model.graph.input[0])
        dim = value.type.tensor_type.shape.dim[2]
        dim.Clear()
        if isinstance(name, int):
            dim.dim_value = name
        elif name is not None:
            dim.dim_param = name
        assert shapes.info_of(value).shape == ("unk__7", 3, None, "W")
    found = Model.load(model).shapes()
    assert found["c"].shape == ("unk__7", 3, "H", "W")
    assert found["y"].shape == ("unk__7", 3, None, None)
    assert not found["y"].complete
    assert found["c"].complete


def test_declarations_help_where_inference_can_not() -> None:
    model = parse(
        "g (float[N,4] x) => (float[N,2] y) <float[N,3] h> { h = my.own.Foo(x) y = my.own.Bar(h) }",
        'ir_version: 8, opset_import: ["" : 17, "my.own" : 1]',
    )
    found = Model.load(model).shapes()
    assert found["h"] == TensorInfo("h", FLOAT, ("N", 3))
    assert found["y"] == TensorInfo("y", FLOAT, ("N", 2))


@pytest.mark.parametrize("as_node", [True, False])
def test_bulky_values_stay_out_of_inference(as_node: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Conv weight of 1 MB is not passed on, a Reshape's target is; the result knows both."""
    model = parse(
        """g (float[N,256,4,4] x) => (float[M,16] y) <int64[2] target = {-1, 16}>
        { h = Conv(x, w) y = Reshape(h, target) }"""
    )
    weight = numpy_helper.from_array(np.ones((256, 256, 2, 2), np.float32), "w")
    if as_node:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    else:
        model.graph.initializer.append(weight)
    seen: list[int] = []
    original = onnx.shape_inference.infer_shapes

    def spy(light: ModelProto, **options: object) -> ModelProto:
        seen.append(light.ByteSize())
        return original(light, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", spy)
    found = Model.load(model).shapes()
    assert found["h"].shape == ("N", 256, 3, 3)
    assert found["y"].shape == ("M", 16)
    assert found["w"] == TensorInfo("w", FLOAT, (256, 256, 2, 2))
    assert seen
    assert max(seen) < protos.SMALL


def test_functions_and_bodies_take_part() -> None:
    model = parse(
        """g (float[N,4] x, bool flag) => (float y, float z) {
            y = local.twice(x)
            z = If(flag) <then_branch = a () => (float[N,4] p) { p = Neg(y) },
                          else_branch = b () => (float[N,4] q) { q = Relu(x) }>
        }
        <domain: "local", opset_import: ["" : 17]> twice (u) => (v) { v = Concat<axis = 1>(u, u) }""",
        'ir_version: 8, opset_import: ["" : 17, "local" : 1]',
    )
    found = Model.load(model).shapes()
    assert found["y"].shape == ("N", 8)
    assert found["z"].dtype == FLOAT


def test_a_failing_inference_leaves_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(parse("g (float[N,4] x) => (float[N,4] y) { h = Relu(x) y = Relu(h) }"))
    tried = []

    def failing(light: ModelProto, **options: object) -> ModelProto:
        tried.append(options["data_prop"])
        raise RuntimeError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", failing)
    found = model.shapes()
    assert tried == [True, False]
    assert found["x"].shape == ("N", 4)
    assert found["h"] == TensorInfo("h", None, None)


def test_a_contradiction_does_not_crash() -> None:
    model = parse("g (float[N,4] x) => (float[N,9] y) <float[7] h> { h = Relu(x) y = Relu(h) }")
    found = Model.load(model).shapes()
    assert set(found) == {"x", "h", "y"}


def test_operators_that_onnx_does_not_know_keep_types_and_shapes() -> None:
    model = Model.load(
        parse(
            """g (float[N,4] x, float[4] s) => (float y, float z) {
                a = SimplifiedLayerNormalization(x, s)
                b, b1, b2, c = com.microsoft.SkipSimplifiedLayerNormalization(a, x, s)
                d = com.microsoft.FastGelu(b)
                e, e1, e2, y = com.microsoft.SkipLayerNormalization(d, c, s)
                z = Relu(e)
            }""",
            'ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]',
        )
    )
    for name in "abcdeyz":
        assert model.shapes()[name] == TensorInfo(name, FLOAT, ("N", 4))
    nodes = "n = GroupNormalization<num_groups=2>(x, s, s) y = Neg(n)"
    text = f"g (float[N,4] x, float[2] s) => (float y) {{ {nodes} }}"
    model = Model.load(parse(text, 'ir_version: 8, opset_import: ["" : 18]'))
    assert model.shapes()["y"] == TensorInfo("y", FLOAT, ("N", 4))


def test_a_batch_axis_made_dynamic_leaves_no_fixed_sizes_behind() -> None:
    model = Model.load(parse("g (float[N,4] x) => (float[1,4] y) <float[1,4] h> { h = Relu(x) y = Neg(h) }"))
    assert {model.shapes()[name].shape for name in "xhy"} == {("N", 4)}


def test_a_stale_declaration_gives_way_to_what_follows_from_the_operators() -> None:
    """Of an output and an inner tensor, in size and in rank; names of dimensions stay."""
    model = Model.load(
        parse(
            """g (float[N,4] x) => (float[M,9] y) <float[N,7] h, float[N] r, float[4,5] w = {1}> {
                h = MatMul(x, w) r = Relu(h) y = Neg(r)
            }""".replace("{1}", "{" + ",".join("1" * 20) + "}")
        )
    )
    found = model.shapes()
    assert [found[name].shape for name in "hr"] == [("N", 5), ("N", 5)]
    assert found["y"].shape == ("N", 5)
    assert not model.unproved()


STALE = parse(
    """g (float[N,4] x) => (float[N,9] y)
    <float[N,4] a, float[N,7] h, float[4,4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> {
        a = com.microsoft.FusedMatMul(x, w) h = Neg(a) y = com.microsoft.FusedMatMul(h, w)
    }""",
    'ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]',
)


def test_a_stale_declaration_gives_way_to_a_run_where_inference_is_blind() -> None:
    model = Model.load(STALE)
    assert model.shapes()["y"].shape == ("N", 9)
    assert model.unproved() >= {"a", "y"}
    found = shapes_on(model, {"x": np.ones((2, 4), np.float32)}, RUNTIME)
    assert [found[name].shape for name in "xay"] == [("N", 4), ("N", 4), (2, 4)]
    assert found["h"].shape[1] == 4


@pytest.mark.parametrize(
    "pool",
    [
        "MaxPool<kernel_shape=[1], strides=[3], ceil_mode=1>",
        "AveragePool<kernel_shape=[1], strides=[3], ceil_mode=1>",
        'LpPool<kernel_shape=[2], dilations=[2], auto_pad="SAME_UPPER">',
        'MaxPool<kernel_shape=[2], dilations=[2], auto_pad="SAME_LOWER">',
    ],
)
def test_windows_that_onnx_counts_and_onnx_runtime_does_not(pool: str) -> None:
    """The fifth window of the first two would begin behind the data."""
    text = f"g (float[2,3,12] x) => (float[2,3,L] y) {{ p = {pool}(x) y = Relu(p) }}"
    model = Model.load(parse(text, 'ir_version: 8, opset_import: ["" : 19]'))
    x = np.ones((2, 3, 12), np.float32)
    (real,) = InferenceSession(model.to_proto().SerializeToString()).run(None, {"x": x})
    declared = onnx.shape_inference.infer_shapes(model.to_proto(), data_prop=True).graph.value_info[0]
    assert shapes.info_of(declared).shape != real.shape
    for name in "py":
        assert model.shapes()[name].shape in (None, (2, 3, "L"), (2, 3, None))
        assert run_shapes(model, {"x": x}, RUNTIME)[name].shape == real.shape


def test_windows_that_both_count_are_known() -> None:
    text = "g (float[N,3,12] x) => (float y) { y = MaxPool<kernel_shape=[3], strides=[3], ceil_mode=1>(x) }"
    assert Model.load(parse(text)).shapes()["y"].shape == ("N", 3, 4)


def test_what_follows_does_not_believe_declarations() -> None:
    model = Model.load(parse("g (float[n,6] x) => (float[1,6] y) <float[1,6] h> { h = Tanh(x) y = Exp(h) }"))
    assert {model.proven()[name].shape for name in "xhy"} == {("n", 6)}


# After edits


def convolutions() -> ModelProto:
    model = parse(
        """g (float[N,3,8,8] x) => (float y) <float[N,4,8,8] a, float[N,4,8,8] b, float[N,5,8,8] c>
        { a = Conv(x, w) b = Relu(a) [last] c = Conv(b, v) y = GlobalAveragePool(c) }"""
    )
    for name, shape in (("w", (4, 3, 1, 1)), ("v", (5, 4, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.value_info[1].doc_string = "kept while true"
    return model


def test_declared_shapes_follow_an_edit() -> None:
    original = convolutions()
    model = Model.load(original)
    model.shapes()
    model.set_weight(model.tensor("w"), np.ones((2, 3, 1, 1), np.float32))
    model.set_weight(model.tensor("v"), np.ones((5, 2, 1, 1), np.float32))
    assert model.shapes()["a"].shape == ("N", 2, 8, 8)
    assert model.shapes()["b"].shape == ("N", 2, 8, 8)
    edited = {v.name: shapes.info_of(v).shape for v in model.to_proto().graph.value_info}
    assert edited == {"a": ("N", 2, 8, 8), "b": ("N", 2, 8, 8), "c": ("N", 5, 8, 8)}
    onnx.shape_inference.infer_shapes(model.to_proto(), check_type=True, strict_mode=True)


def test_declared_shapes_follow_an_edit_through_a_body() -> None:
    model = parse(
        """g (float[N,4] x, bool flag) => (float y) <float[N,4] b, float[N,4] s> {
            b = Identity(x)
            s = If(flag) <then_branch = one () => (float p) { p = Neg(b) },
                          else_branch = two () => (float q) { q = Relu(b) }>
            y = Abs(s)
        }"""
    )
    for attribute in model.graph.node[1].attribute:
        attribute.g.output[0].ClearField("type")
    loaded = Model.load(model)
    loaded.nodes[0].op, loaded.nodes[0].attrs = "Concat", {"axis": 1}
    loaded.nodes[0].inputs.append(loaded.tensor("x"))
    assert loaded.shapes()["s"].shape == ("N", 8)
    assert {v.name: shapes.info_of(v).shape for v in loaded.to_proto().graph.value_info} == {
        "b": ("N", 8),
        "s": ("N", 8),
    }


def test_declared_shapes_that_still_hold_are_kept_as_they_were() -> None:
    original = convolutions()
    model = Model.load(original)
    model.set_weight(model.tensor("w"), np.full((4, 3, 1, 1), 2, np.float32))
    assert list(model.to_proto().graph.value_info) == list(original.graph.value_info)
    model.nodes[0].attrs["dilations"] = [1, 1]
    assert list(model.to_proto().graph.value_info) == list(original.graph.value_info)


def test_declared_shapes_that_nothing_confirms_are_dropped() -> None:
    model = parse(
        """g (float[N,4] x) => (float y) <float[N,4] a, float[N,9] b, float[N,4] c>
        { a = Relu(x) b = my.own.Foo(a) c = Neg(x) y = my.own.Foo(b, c) }""",
        'ir_version: 8, opset_import: ["" : 17, "my.own" : 1]',
    )
    loaded = Model.load(model)
    loaded.nodes[1].attrs["level"] = 2
    assert [v.name for v in loaded.to_proto().graph.value_info] == ["a", "c"]
    assert loaded.shapes()["b"] == TensorInfo("b", None, None)


def test_declarations_of_tensors_that_are_gone_are_dropped() -> None:
    model = Model.load(convolutions())
    a, b = model.tensor("a"), model.tensor("b")
    last = next(n for n in model.nodes if n.name == "last")
    last.inputs[0] = a
    model.prune()
    assert model.producer(b) is None or b not in model.tensors()
    assert [v.name for v in model.to_proto().graph.value_info] == ["a", "c"]


def test_an_edit_behind_the_models_back_is_seen() -> None:
    """Shapes are cached, but by what the graph says, not by whether a method was called."""
    model = Model.load(parse("g (float[2,4] x) => (float y) { [t] y = Transpose<perm = [1, 0]>(x) }"))
    assert model.shapes()["y"].shape == (4, 2)
    model.nodes[0].attrs["perm"][:] = [0, 1]
    assert model.shapes()["y"].shape == (2, 4)
    model.nodes[0].op, model.nodes[0].attrs = "Relu", {}
    assert model.shapes()["y"].shape == (2, 4)
    model.nodes[0].op = "Shape"
    assert model.shapes()["y"].shape == (2,)


def test_a_new_array_of_another_shape_is_seen() -> None:
    model = Model.load(convolutions())
    for channels in (2, 3, 4, 5, 6, 7):
        model.set_weight(model.tensor("w"), np.ones((channels, 3, 1, 1), np.float32))
        assert model.shapes()["a"].shape == ("N", channels, 8, 8)


def test_sparse_weights_have_shapes() -> None:
    model = parse("g (float[N,4] x) => (float y) { y = Mul(x, k) }")
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([5.0], np.float32), "k"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([2], np.int64), "i"))
    found = Model.load(model).shapes()
    assert found["k"] == TensorInfo("k", FLOAT, (4,))
    assert found["y"].shape == ("N", 4)


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ((None, 3), ("N", None), ("N", 3)),
        (("N", 3), (2, "M"), (2, 3)),
        ((2, 3), (5, 5), (2, 3)),
        (None, (1,), (1,)),
        ((1, 2), (1,), (1, 2)),
        ((None,), (None,), (None,)),
    ],
)
def test_merging(first: shapes.TensorInfo, second: object, merged: object) -> None:
    result = shapes.merge(TensorInfo("t", None, first), TensorInfo("t", FLOAT, second))  # type: ignore[arg-type]
    assert result == TensorInfo("t", FLOAT, merged)  # type: ignore[arg-type]


def test_names_survive_a_run_that_fills_the_rest() -> None:
    info = TensorInfo("t", FLOAT, ("N", None))
    assert shapes.fill(info, TensorInfo("t", FLOAT, (2, 3))).shape == ("N", 3)
    assert shapes.fill(info, TensorInfo("t", FLOAT, (2, 3, 4))).shape == (2, 3, 4)
    assert shapes.fill(info, None) == info
