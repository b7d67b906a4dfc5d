"""Counts and shapes of files that declare what is not so, against sizes worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from nets import RUNTIME, net
from onnx import TensorProto
from test_cost import parsed, zeros

from onnxfuse.analysis.cost import dimension_sizes, measure, shapes_at
from onnxfuse.analysis.declarations import contradiction_warnings, contradictions
from onnxfuse.channels import budget
from onnxfuse.channels.groups import find_groups
from onnxfuse.ir.model import Model
from onnxfuse.runtime.observed_shapes import run_shapes

TRUE = 64 * (4 * 3 * 9 + 4 * 4 * 9)
"""MACs of two convolutions 3 -> 4 -> 4 over 8 x 8 pixels."""


def two(x: str = "N,3,8,8", y: str = "N,4,8,8", h: str = "") -> Model:
    inner = f"<float[{h}] h>" if h else ""
    text = (
        f"c (float[{x}] x) => (float[{y}] y) {inner}"
        + """{
        h = Conv<pads = [1,1,1,1]>(x, w)
        y = Conv<pads = [1,1,1,1]>(h, v)
    }"""
    )
    return parsed(text, w=zeros(4, 3, 3, 3), v=zeros(4, 4, 3, 3))


CASES = {
    "one name for batch and height": (two("x0,3,8,8", "b,4,b,c"), ["y"]),
    "another fixed size of an output": (two(y="N,4,2,2"), ["y"]),
    "sizes inside from before an edit": (two(h="N,4,2,8"), ["h"]),
    "one name for two sizes of the input": (two("a,3,a,8", "a,4,8,8"), ["x"]),
    "one name for batch and width, in and out": (two("a,3,8,a", "a,4,8,a"), ["x", "y"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_shapes_of_a_run_count_and_the_file_is_contradicted(case: str) -> None:
    model, names = CASES[case]
    feed = {"x": zeros(1, 3, 8, 8)}
    assert measure(model, feed, RUNTIME).macs == TRUE
    assert {name: info.shape for name, info in shapes_at(model, feed, RUNTIME).items()} == {
        "x": (1, 3, 8, 8),
        "h": (1, 4, 8, 8),
        "y": (1, 4, 8, 8),
        "w": (4, 3, 3, 3),
        "v": (4, 4, 3, 3),
    }
    assert [found.name for found in contradictions(model, feed, RUNTIME)] == names
    groups = find_groups(model, feed, RUNTIME)
    total = budget.macs(model, groups, groups.free)
    assert total.at({group: group.size for group in groups.free}) == TRUE


def test_a_contradiction_in_words() -> None:
    model, feed = two("x0,3,8,8", "b,4,b,?"), {"x": zeros(1, 3, 8, 8)}
    said = contradiction_warnings(model, feed, RUNTIME)
    assert said == ["'y' is declared as [b, 4, b, ?] and is [1, 4, 8, 8] in a run: counts are of the run"]


def test_what_is_declared_rightly_is_not_contradicted() -> None:
    """A batch of one survives in many files; at a batch of one it is true."""
    model = two(y="1,4,H,W", h="batch,4,8,8")
    assert not contradictions(model, {"x": zeros(1, 3, 8, 8)}, RUNTIME)
    assert dimension_sizes(model, {"x": zeros(1, 3, 8, 8)}, RUNTIME) == {"N": 1, "batch": 1}
    (found,) = contradictions(model, {"x": zeros(3, 3, 8, 8)}, RUNTIME)
    assert (found.name, found.declared, found.run) == ("y", (1, 4, "H", "W"), (3, 4, 8, 8))


def test_many_contradictions_are_told_as_a_number() -> None:
    inner = ", ".join(f"float[{9 + n}] h{n}" for n in range(5))
    chain = " ".join(f"h{n + 1} = Relu(h{n})" for n in range(4))
    model = parsed(f"m (float[N,8] x) => (float[N,8] y) <{inner}> {{ h0 = Relu(x) {chain} y = Relu(h4) }}")
    said = contradiction_warnings(model, {"x": zeros(2, 8)}, RUNTIME)
    assert len(said) == 4
    assert said[-1] == "2 more tensors have other shapes in a run than the file declares"


def test_shapes_are_had_without_onnx_operators() -> None:
    text = """<ir_version: 8, opset_import: ["com.microsoft" : 1]>
    m (float[N,4] x) => (float[N,4] y) { y = com.microsoft.FastGelu(x) }"""
    model = Model.load(onnx.parser.parse_model(text))
    assert run_shapes(model, {"x": np.zeros((3, 4), np.float32)}, RUNTIME)["y"].shape == (3, 4)


@pytest.mark.parametrize("code", [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN])
def test_element_types_without_a_shape_operator(code: int) -> None:
    """Their sizes follow from the feed where inference tells them, else what is declared has to do."""
    model = net(f"a = Cast<to={code}>(x) y = Cast<to=1>(a)", {}, opset=21)
    shapes = run_shapes(model, {"x": np.ones((3, 6), np.float32)}, RUNTIME)
    assert [shapes[name].shape for name in "ay"] == [(3, 6), (3, 6)]
    counted = net(f"z = NonZero(x) f = Cast<to=1>(z) a = Cast<to={code}>(f) y = Cast<to=1>(a)", {}, opset=21)
    shapes = run_shapes(counted, {"x": np.ones((3, 6), np.float32)}, RUNTIME)
    assert shapes["a"].shape == (2, None)
    assert shapes["y"].shape == (2, 18)
