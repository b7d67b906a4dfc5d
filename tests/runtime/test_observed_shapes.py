"""Shapes at the sizes of a feed, against those of the arrays that ONNX Runtime computes: without a run where
they follow from the inputs, else by a run of what they depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from nets import RUNTIME
from onnxruntime import InferenceSession

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.observed_shapes import run_shapes, shapes_on
from onnxfuse.runtime.session import Runtime

FLOAT = np.dtype(np.float32)
LIES = "<float[7,7] a, float[9,9,9] b, int64[5] s, float[3] c>"
X = {"x": np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2)}


def model(body: str, before: str = "", header: str = 'ir_version: 8, opset_import: ["" : 17]') -> Model:
    """A model from x to y, with other outputs' and inner tensors' declarations `before` it."""
    text = f"<{header}> g (float[N,C,H,W] x) => (float[1,1] y) {before} {{ {body} }}"
    return Model.load(onnx.parser.parse_model(text))


def computed(found: Model, feed: Feed) -> dict[str, TensorInfo]:
    """Types and shapes of the arrays that ONNX Runtime returns, of every computed tensor."""
    proto = found.to_proto()
    names = [name for node in proto.graph.node for name in node.output if name]
    del proto.graph.output[:], proto.graph.value_info[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    arrays = InferenceSession(proto.SerializeToString()).run(names, feed)
    return {name: TensorInfo(name, a.dtype, a.shape) for name, a in zip(names, arrays, strict=True)}


class Counting(Runtime):
    """A runtime that counts its sessions, and the nodes and outputs of each model."""

    def __init__(self) -> None:
        super().__init__("cpu", threads=1)
        self.made: list[tuple[int, int]] = []

    def session(self, source: Any, **options: Any) -> Any:
        proto = source if isinstance(source, onnx.ModelProto) else source.to_proto()
        self.made.append((len(proto.graph.node), len(proto.graph.output)))
        return super().session(source, **options)


STATIC = {
    "a chain of operators": "a = Relu(x) b = Transpose<perm=[0, 1, 3, 2]>(a) y = MatMul(a, b)",
    "a flattened batch": """s = Shape(x) one = Constant<value_ints=[0]>() n = Gather(s, one)
        rest = Constant<value_ints=[-1]>() t = Concat<axis=0>(n, rest) a = Reshape(x, t) y = Relu(a)""",
    "half the height": """s = Shape(x) two = Constant<value_int=2>() h = Gather<axis=0>(s, two)
        half = Div(h, two) zero = Constant<value_ints=[0]>() ax = Constant<value_ints=[2]>()
        e = Unsqueeze(half, zero) a = Slice(x, zero, e, ax) y = Relu(a)""",
    "padding by a computed list": """p = Constant<value_ints=[0,0,1,1]>() f = Cast<to=1>(p) d = Mul(f, f)
        q = Cast<to=7>(d) z = Constant<value_ints=[0,0,2,2]>() r = Concat<axis=0>(z, q) a = Pad(x, r)
        y = Relu(a)""",
    "numbers that depend on such a shape": """m = Constant<value_float=1.5>() s = Shape(x) f = Cast<to=1>(s)
        g = Mul(f, m) t = Cast<to=7>(g) k = Constant<value_ints=[1,1,1,1]>() c = ConstantOfShape(t)
        s2 = Shape(c) f2 = Cast<to=1>(s2) g2 = Floor(f2) t2 = Cast<to=7>(g2) d = ConstantOfShape(t2)
        y = Relu(d)""",
    "the number of elements": """n = Size(x) u = Constant<value_ints=[0]>() m = Unsqueeze(n, u)
        a = Reshape(x, m) y = Relu(a)""",
    "a part of a shape": "s = Shape<start=1, end=3>(x) m = Constant<value_ints=[2]>() t = Mul(s, m)"
    " a = ConstantOfShape(t) y = Relu(a)",
}


@pytest.mark.parametrize("case", STATIC)
@pytest.mark.parametrize("lies", ["", LIES])
def test_what_follows_from_the_inputs_is_not_run(case: str, lies: str) -> None:
    """Whatever the file declares of other tensors, and of the output."""
    found, runtime = model(STATIC[case], lies), Counting()
    shapes = run_shapes(found, X, runtime)
    assert runtime.made == []
    assert {name: shapes[name] for name in computed(found, X)} == computed(found, X)
    assert shapes["x"] == TensorInfo("x", FLOAT, (2, 3, 4, 2))


COUNTED = "a = Relu(x) z = NonZero(a) f = Cast<to=1>(z) y = Relu(f) b = Neg(a) d = MatMul(b, b)"


def test_only_what_stays_unknown_is_run() -> None:
    found, runtime = model(COUNTED, LIES), Counting()
    square = {"x": np.arange(48, dtype=np.float32).reshape(2, 3, 8, 1)[..., :1].repeat(8, axis=3)}
    shapes = run_shapes(found, square, runtime)
    assert runtime.made == [(4 + 3, 3)]  # Relu, NonZero, Cast, Relu; the shapes of z, f and y
    assert {name: shapes[name] for name in computed(found, square)} == computed(found, square)


def test_sizes_that_depend_on_values_are_those_of_the_feed() -> None:
    found = model("a = Relu(x) z = NonZero(a) y = Cast<to=1>(z)")
    assert run_shapes(found, X, RUNTIME)["z"].shape == (4, 47)
    assert run_shapes(found, {"x": np.zeros_like(X["x"])}, RUNTIME)["z"].shape == (4, 0)


def test_types_that_only_a_run_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxfuse.runtime.observed_shapes.TAPS_AT_ONCE", 1)
    header = 'ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]'
    found = model("a = com.microsoft.Trilu(x) b = com.microsoft.Trilu(a) y = Relu(b)", header=header)
    shapes = run_shapes(found, X, RUNTIME)
    assert {name: shapes[name] for name in "aby"} == computed(found, X)


def test_a_sequence_has_no_type_of_a_tensor() -> None:
    found = model("q = SequenceConstruct(x, x) i = Constant<value_int=1>() y = SequenceAt(q, i)")
    shapes = run_shapes(found, X, RUNTIME)
    assert shapes["q"] == TensorInfo("q", None, None)
    assert shapes["y"] == TensorInfo("y", FLOAT, (2, 3, 4, 2))


@pytest.mark.parametrize("body", ["y = Relu(x)", COUNTED])
def test_what_is_no_feed_of_the_model(body: str) -> None:
    with pytest.raises(InputError):
        run_shapes(model(body), {"wrong": np.ones(3, np.float32)}, RUNTIME)
    with pytest.raises(InputError):
        run_shapes(model(body), {"x": np.ones((2, 3, 4), np.float32)}, RUNTIME)


def test_a_run_that_fails() -> None:
    header = 'ir_version: 8, opset_import: ["" : 17, "my.own" : 1]'
    with pytest.raises(NotApplicableError):
        run_shapes(model("y = my.own.Foo(x)", header=header), X, RUNTIME)


# Kept, and with the names of dimensions


@pytest.fixture
def pooled() -> Model:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,H,W] x) => (float y) {
        c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        z = NonZero(c)
        y = GlobalAveragePool(c)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].ClearField("type")
    return Model.load(proto)


def test_the_sizes_of_a_feed_complete_what_inference_leaves_open(pooled: Model) -> None:
    assert pooled.shapes()["c"].shape == ("N", 3, None, None)
    feed = {"x": np.ones((2, 3, 8, 10), np.float32)}
    found = shapes_on(pooled, feed, RUNTIME)
    assert found["c"] == TensorInfo("c", FLOAT, ("N", 3, 4, 5))
    assert found["z"].shape == (4, 2 * 3 * 4 * 5)
    assert found["y"].shape == ("N", 3, 1, 1)
    assert found["x"].shape == ("N", 3, "H", "W")
    assert all(info.complete for info in found.values())
    assert pooled.shapes()["c"].shape == ("N", 3, None, None)


def test_runs_are_not_repeated_until_an_edit(pooled: Model) -> None:
    runtime = Counting()
    feed = {"x": np.ones((2, 3, 8, 10), np.float32)}
    shapes_on(pooled, feed, runtime)
    shapes_on(pooled.copy(), feed, runtime)
    run_shapes(pooled, dict(feed), runtime)
    assert len(runtime.made) == 1
    pooled.nodes[0].attrs["strides"] = [4, 4]
    assert shapes_on(pooled, feed, runtime)["c"].shape == ("N", 3, 2, 3)
    assert len(runtime.made) == 2


def test_a_complete_model_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("onnxfuse.runtime.observed_shapes.run_shapes")
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }'
    found = Model.load(onnx.parser.parse_model(text))
    assert shapes_on(found, {"x": np.ones((2, 4), np.float32)}, RUNTIME)["y"].shape == ("N", 4)
