"""constants.py by itself: the budget, external data, subgraph captures, what shapes prove."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.analysis.constant_folding import (
    fold_constants,
    integers,
    overridable,
    to_initializer,
)
from onnxfuse.ir.model import Model

NODE = helper.make_node


def build(nodes, weights, shape=("n", 4), opset=17) -> onnx.ModelProto:
    """A model x -> y with these nodes and initializers."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def stored(model: Model) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.to_proto().graph.initializer}


EXPANDED = [NODE("Expand", ["one", "to"], ["e"]), NODE("Add", ["x", "e"], ["y"])]
EXPANDING = {"one": np.ones(1, np.float32), "to": np.array([100, 4])}


def test_what_would_be_larger_than_what_goes_stays():
    model = Model.load(build(EXPANDED, EXPANDING, shape=("n", 4)))
    folded = fold_constants(model)
    assert folded.evaluated == []
    assert next(iter(folded.refused.values())).startswith("the 400 numbers that Expand computes would come")


def test_a_chain_counts_by_its_end_alone():
    nodes = [*EXPANDED[:1], NODE("ReduceSum", ["e"], ["s"]), NODE("Add", ["x", "s"], ["y"])]
    model = Model.load(build(nodes, EXPANDING))
    folded = fold_constants(model)
    assert (folded.evaluated, folded.stored) == (["e", "s"], ["s"])
    assert stored(model)["s"].item() == 400


def test_a_chain_is_stored_where_it_is_smallest():
    """The square of the weight stays as the Expand of it would be larger; the weight itself goes."""
    nodes = [
        NODE("Mul", ["w", "w"], ["q"]),
        NODE("Expand", ["q", "to"], ["e"]),
        NODE("Add", ["x", "e"], ["y"]),
    ]
    model = Model.load(build(nodes, {"w": np.float32([[1, 2, 3, 4]]), "to": np.array([100, 4])}))
    assert fold_constants(model).stored == ["q"]
    assert [n.op for n in model.nodes] == ["Expand", "Add"]
    assert stored(model)["q"].tolist() == [[1, 4, 9, 16]]


def test_two_results_of_one_constant_are_more_than_it():
    weight = np.arange(400.0, dtype=np.float32).reshape(4, 100)
    nodes = [
        NODE("Transpose", ["w"], ["a"], perm=[1, 0]),
        NODE("Exp", ["w"], ["b"]),
        NODE("MatMul", ["x", "b"], ["h"]),
        NODE("MatMul", ["h", "a"], ["y"]),
    ]
    model = Model.load(build(nodes, {"w": weight / 400}))
    assert fold_constants(model).stored == []
    assert len(model.nodes) == 4


def test_what_fails_leaves_its_constants_in_use():
    """The Reshape can't be computed, so the weight stays, and its exponential would come on top of it."""
    nodes = [
        NODE("Reshape", ["w", "bad"], ["r"]),
        NODE("Exp", ["w"], ["e"]),
        NODE("Sum", ["x", "r", "e"], ["y"]),
    ]
    model = Model.load(build(nodes, {"w": np.ones(6, np.float32), "bad": np.array([4])}))
    folded = fold_constants(model)
    assert folded.stored == []
    assert {node.op for node in folded.refused} == {"Reshape", "Exp"}


def test_large_external_data_is_left_outside(tmp_path):
    nodes = [NODE("Transpose", ["w"], ["t"], perm=[1, 0]), NODE("MatMul", ["x", "t"], ["y"])]
    for size, goes in ((64, True), (600, False)):
        proto = build(nodes, {"w": np.ones((size, size), np.float32)}, shape=("n", size))
        path = tmp_path / f"{size}.onnx"
        onnx.save_model(proto, path, save_as_external_data=True, location=f"{size}.data", size_threshold=0)
        model = Model.load(path)
        folded = fold_constants(model)
        assert (folded.evaluated == ["t"]) == goes
        assert goes or "external data" in next(iter(folded.refused.values()))


def test_results_of_unknown_size_are_not_computed():
    nodes = [
        NODE("NonZero", ["flags"], ["nz"]),
        NODE("Squeeze", ["nz", "zero"], ["to"]),
        NODE("Expand", ["one", "to"], ["e"]),
        NODE("Add", ["x", "e"], ["y"]),
    ]
    weights = {"flags": np.array([0, 0, 0, 1]), "zero": np.array([0]), "one": np.ones(1, np.float32)}
    model = Model.load(build(nodes, weights, shape=(2, 3)))
    assert "unknown" in next(iter(fold_constants(model).refused.values()))
    assert len(model.nodes) == 4


def test_a_graph_output_keeps_its_node():
    nodes = [NODE("Exp", ["w"], ["k"]), NODE("Add", ["k", "x"], ["y"])]
    proto = build(nodes, {"w": np.ones(4, np.float32)})
    proto.graph.output.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, None))
    model = Model.load(proto)
    assert fold_constants(model).evaluated == []
    assert [n.op for n in model.nodes] == ["Exp", "Add"]


def test_shape_start_and_end():
    nodes = [NODE("Shape", ["x"], ["s"], start=1, end=-1), NODE("Reshape", ["x", "s"], ["y"])]
    model = Model.load(build(nodes, {}, shape=(2, 3, 4)))
    fold_constants(model)
    assert stored(model)["s"].tolist() == [3]
    dynamic = Model.load(build(nodes, {}, shape=(2, "n", 4)))
    fold_constants(dynamic)
    assert [n.op for n in dynamic.nodes] == ["Shape", "Reshape"]


@pytest.mark.parametrize(
    ("bounds", "steps", "value"),
    [((0, 2), None, [2, 3]), ((1, 100), [2], [3, 5]), ((3, 0), [-2], None), ((-2, -1), None, [5])],
)
def test_slices_of_a_shape(bounds, steps, value):
    ints = {"a": np.array(bounds[:1]), "b": np.array(bounds[1:]), "zero": np.array([0])}
    ints |= {"s": np.array(steps)} if steps else {}
    nodes = [
        NODE("Shape", ["x"], ["shape"]),
        NODE("Slice", ["shape", "a", "b", "zero", *["s"] * bool(steps)], ["sizes"]),
        NODE("Concat", ["sizes", "batch"], ["to"], axis=0),
        NODE("Shape", ["x"], ["whole"]),
        NODE("Gather", ["whole", "last"], ["batch"]),
        NODE("Expand", ["x", "to"], ["y"]),
    ]
    nodes[2], nodes[3], nodes[4] = nodes[3], nodes[4], nodes[2]
    model = Model.load(build(nodes, {**ints, "last": np.array([4])}, shape=(2, 3, 4, 5, "n")))
    fold_constants(model)
    assert stored(model)["sizes"].tolist() == value if value else "sizes" not in stored(model)


def test_size():
    nodes = [NODE("Size", ["x"], ["s"]), NODE("Cast", ["s"], ["c"], to=1), NODE("Div", ["x", "c"], ["y"])]
    model = Model.load(build(nodes, {}, shape=(2, 3)))
    fold_constants(model)
    assert stored(model)["s"].item() == 6
    # As a float it would be a parameter that the file did not have.
    assert [n.op for n in model.nodes] == ["Cast", "Div"]


def test_several_outputs_of_one_node():
    nodes = [
        NODE("Split", ["w", "sizes"], ["a", "b"], axis=1),
        NODE("MatMul", ["x", "a"], ["h"]),
        NODE("MatMul", ["x", "b"], ["k"]),
        NODE("Concat", ["h", "k"], ["y"], axis=1),
    ]
    weight = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    model = Model.load(build(nodes, {"w": weight, "sizes": np.array([2, 3])}))
    assert fold_constants(model).stored == ["a", "b"]
    np.testing.assert_array_equal(stored(model)["a"], weight[:, :2])
    np.testing.assert_array_equal(stored(model)["b"], weight[:, 2:])


def test_a_captured_constant_is_stored_for_the_body():
    inner = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    branch = helper.make_graph([NODE("Add", ["k", "k"], ["t"])], "body", [], [inner])
    outer = helper.make_tensor_value_info("u", TensorProto.FLOAT, None)
    other = helper.make_graph([NODE("Neg", ["k"], ["u"])], "body", [], [outer])
    nodes = [
        NODE("Exp", ["w"], ["k"]),
        NODE("ReduceMax", ["x"], ["m"], keepdims=0),
        NODE("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        NODE("If", ["c"], ["y"], then_branch=branch, else_branch=other),
    ]
    model = Model.load(build(nodes, {"w": np.zeros(3, np.float32)}))
    fold_constants(model)
    assert [n.op for n in model.nodes] == ["ReduceMax", "Cast", "If"]
    assert stored(model)["k"].tolist() == [1, 1, 1]
    assert model.captured(model.tensor("k"))


def test_a_node_with_a_body_is_not_evaluated():
    info = helper.make_tensor_value_info
    branch = helper.make_graph([NODE("Neg", ["x"], ["t"])], "then", [], [info("t", 1, [4])])
    other = helper.make_graph([NODE("Exp", ["x"], ["u"])], "else", [], [info("u", 1, [4])])
    nodes = [NODE("If", ["c"], ["h"], then_branch=branch, else_branch=other), NODE("Relu", ["h"], ["y"])]
    model = Model.load(build(nodes, {"c": np.array(True)}, shape=(4,)))
    assert fold_constants(model).evaluated == []


def test_helpers():
    proto = build([NODE("Add", ["x", "w"], ["y"])], {"w": np.ones(4, np.float32), "i": np.array([[1, 2]])})
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    model = Model.load(proto)
    assert overridable(model, model.tensor("w"))
    assert not overridable(model, model.tensor("i"))
    assert integers(model, model.tensor("i")) == [1, 2]
    assert integers(model, model.tensor("w")) is None
    assert integers(model, None) is None
    with pytest.raises(ValueError, match="computed"):
        to_initializer(model, model.tensor("y"), np.ones(4, np.float32))
