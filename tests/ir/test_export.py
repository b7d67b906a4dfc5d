"""Parts of a model taken out: they compute what they computed inside."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import RUNTIME
from onnx import ModelProto, numpy_helper

from onnxfuse.errors import InputError
from onnxfuse.ir import external_data, shapes
from onnxfuse.ir.model import Model
from onnxfuse.runtime.observed_shapes import shapes_on

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)


def parse(body: str, header: str = 'ir_version: 8, opset_import: ["" : 17]') -> ModelProto:
    return onnx.parser.parse_model(f"<{header}>\n{body}")


def network() -> ModelProto:
    """Weights of all kinds, a residual, an If that captures, a function, two inputs."""
    model = parse(
        """g (float[N,4] x, float[N,4] z, bool flag, float[4] listed) => (float[N,4] y, float[N,4] other)
        <float[4] listed = {1, 2, 3, 4}, float[4] scale = {2, 2, 2, 2}, float[4] unused = {0, 0, 0, 0}>
        {
            a = MatMul(x, w)
            k = Constant<value = float[4] {0.5, 0.5, 0.5, 0.5}>()
            b = Add(a, k)
            c = local.leaky(b)
            d = Add(c, a)
            e = If(flag) <then_branch = yes () => (float[N,4] p) { p = Mul(d, scale) },
                          else_branch = no () => (float[N,4] q) { q = Identity(d) }>
            f = Mul(e, listed)
            y = Add(f, z)
            other = Neg(z)
        }
        <domain: "local", opset_import: ["" : 17]> leaky (u) => (v) { v = LeakyRelu<alpha = 0.1>(u) }""",
        'ir_version: 8, opset_import: ["" : 17, "local" : 1], producer_name: "maker"',
    )
    model.graph.initializer.append(numpy_helper.from_array(RNG.normal(size=(4, 4)).astype(np.float32), "w"))
    return model


def run(proto: ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def everything(proto: ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The value of every tensor in the main graph."""
    tapped = ModelProto()
    tapped.CopyFrom(proto)
    given = {o.name for o in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name not in given]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return run(tapped, feed) | feed


def initializers(proto: ModelProto) -> list[str]:
    return [t.name for t in proto.graph.initializer]


@pytest.mark.parametrize(
    ("inputs", "outputs", "weights"),
    [
        (["x"], ["a"], ["w"]),
        (["x"], ["d"], ["w"]),
        (["a"], ["d"], []),
        (["a", "c"], ["d"], []),
        (["d", "flag"], ["e"], ["scale"]),
        (["d", "flag"], ["f", "e"], ["listed", "scale"]),
        (["x", "flag", "z"], ["y", "other"], ["listed", "scale", "w"]),
        (["x", "w"], ["b"], []),
        (["x", "k"], ["b"], ["w"]),
        (["a"], ["a"], []),
        (["a", "z"], ["b", "other"], []),
        ([], ["k"], []),
        (["x"], ["w", "a"], ["w"]),
    ],
)
@pytest.mark.parametrize("flag", [True, False])
def test_a_part_computes_what_it_computed_inside(
    inputs: list[str], outputs: list[str], weights: list[str], flag: bool
) -> None:
    original = network()
    feed = {"x": X, "z": X[:, ::-1].copy(), "flag": np.array(flag)}
    values = everything(original, feed) | {
        t.name: numpy_helper.to_array(t) for t in original.graph.initializer
    }
    model = Model.load(original)
    part = model.extract(inputs, outputs)
    assert [v.name for v in part.graph.input] == inputs
    assert sorted(initializers(part)) == weights
    found = run(part, {name: values[name] for name in inputs})
    assert list(found) == outputs
    for name in outputs:
        np.testing.assert_allclose(found[name], values[name], rtol=1e-5, atol=1e-6)
    assert Model.load(part).opset == 17


def test_a_part_has_the_nodes_between_and_no_others() -> None:
    part = Model.load(network()).extract(["a"], ["d"])
    assert [n.output[0] for n in part.graph.node] == ["k", "b", "c", "d"]
    assert [f.name for f in part.functions] == ["leaky"]
    assert (part.ir_version, part.producer_name) == (8, "maker")


def test_dynamic_dimensions_stay_dynamic() -> None:
    model = Model.load(
        parse(
            """g (float[N,3,H,W] x) => (float[N,3,A,B] y) {
            a = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) y = Relu(a)
        }"""
        )
    )
    shapes_on(model, {"x": np.ones((2, 3, 8, 8), np.float32)}, RUNTIME)
    part = model.extract(["a"], ["y"])
    assert shapes.info_of(part.graph.input[0]).shape == ("N", 3, None, None)
    for size in ((1, 3, 4, 4), (5, 3, 7, 2)):
        assert run(part, {"a": np.ones(size, np.float32)})["y"].shape == size


def test_an_unknown_type_needs_a_run() -> None:
    """Nothing infers through the custom operator, but a run of ONNX Runtime's own does."""
    model = Model.load(
        parse(
            "g (float[N,4] x) => (float[N,4] y) { a = com.microsoft.Trilu(x) y = Relu(a) }",
            'ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]',
        )
    )
    with pytest.raises(InputError, match="type of tensor 'a' is unknown"):
        model.extract(["a"], ["y"])
    shapes_on(model, {"x": X}, RUNTIME)
    part = model.extract(["a"], ["y"])
    assert shapes.info_of(part.graph.input[0]).shape == (None, None)
    np.testing.assert_array_equal(run(part, {"a": X})["y"], np.maximum(X, 0))


@pytest.mark.parametrize(
    ("inputs", "outputs", "missing"),
    [(["c"], ["d"], "'x'"), (["d"], ["e"], "'flag'"), (["flag"], ["e"], "'x'"), (["x"], ["y"], "'flag'|'z'")],
)
def test_a_part_must_depend_on_its_inputs_only(inputs: list[str], outputs: list[str], missing: str) -> None:
    with pytest.raises(InputError, match=missing):
        Model.load(network()).extract(inputs, outputs)


def test_one_output_of_a_node_is_fed_and_another_computed() -> None:
    proto = parse("g (float[N,4] x) => (float[N,2] y) { a, b = Split<axis = 1>(x) c = Neg(a) y = Sub(c, b) }")
    part = Model.load(proto).extract(["x", "a"], ["y"])
    a = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(run(part, {"x": X, "a": a})["y"], -a - X[:, 2:])


def test_names_that_do_not_exist() -> None:
    model = Model.load(network())
    for inputs, outputs in ((["nothing"], ["d"]), (["a"], ["nothing"]), (["p"], ["e"])):
        with pytest.raises(KeyError):
            model.extract(inputs, outputs)


def test_edits_show_in_the_next_part() -> None:
    model = Model.load(network())
    before = run(model.extract(["a"], ["b"]), {"a": X})["b"]
    model.set_weight(model.tensor("k"), np.full(4, 2, np.float32))
    np.testing.assert_allclose(run(model.extract(["a"], ["b"]), {"a": X})["b"], before + 1.5, rtol=1e-5)
    last = model.producer(model.tensor("d"))
    assert last is not None
    last.inputs[0] = model.tensor("b")
    part = model.extract(["a"], ["d"])
    np.testing.assert_allclose(run(part, {"a": X})["d"], 2 * X + 2, rtol=1e-5)
    node = model.add_node("Neg", [model.tensor("d")], ["minus"], by="test")
    part = model.extract(["a"], [node.outputs[0].name])
    np.testing.assert_allclose(run(part, {"a": X})["minus"], -2 * X - 2, rtol=1e-5)


def test_a_new_weight_and_an_edited_one_come_along() -> None:
    model = Model.load(network())
    model.set_weight(model.tensor("w"), np.eye(4, dtype=np.float32))
    first = model.producer(model.tensor("a"))
    assert first is not None
    first.inputs[1] = model.add_weight("w", np.eye(4, dtype=np.float32) * 3)
    part = model.extract(["x"], ["a"])
    assert initializers(part) == ["w_1"]
    np.testing.assert_allclose(run(part, {"x": X})["a"], 3 * X)


def test_external_weights_are_brought_in(tmp_path: Path) -> None:
    model = network()
    w = model.graph.initializer[-1]
    value = numpy_helper.to_array(w)
    (tmp_path / "w.bin").write_bytes(w.raw_data)
    external_data.point(w, "w.bin", 0, value.nbytes)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = Model.load(tmp_path / "m.onnx")
    part = loaded.extract(["x"], ["a"])
    assert not external_data.is_external(part.graph.initializer[0])
    np.testing.assert_allclose(run(part, {"x": X})["a"], X @ value, rtol=1e-5, atol=1e-6)
    assert external_data.is_external(loaded.to_proto().graph.initializer[-1])


def test_sparse_weights_come_along() -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { y = Mul(x, k) }")
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([5.0], np.float32), "k"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([2], np.int64), "i"))
    part = Model.load(model).extract(["x"], ["y"])
    np.testing.assert_allclose(run(part, {"x": X})["y"], X * [0, 0, 5, 0], rtol=1e-6)


def test_a_part_that_starts_at_no_tensor() -> None:
    proto = parse(
        "g (float[N,4] x) => (float[N,4] y) { s = SequenceConstruct(x) y = ConcatFromSequence<axis=0>(s) }"
    )
    with pytest.raises(InputError, match="type of tensor 's'"):
        Model.load(proto).extract(["s"], ["y"])


@pytest.mark.parametrize("order", [1, -1])
def test_a_sub_model_of_a_sorted_file(order: int) -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) b = Neg(a) y = Abs(b) }")
    nodes = list(model.graph.node)[::order]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    part = Model.load(model).extract(["x"], ["b"])
    assert [n.op_type for n in part.graph.node] == ["Relu", "Neg"]
