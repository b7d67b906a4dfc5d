"""Receptive-field arithmetic against ONNX Runtime and against brute force over positions."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.numerics.receptive_field import Geometry, WindowAxis, unite, window

SIZES = range(1, 40)


@st.composite
def axes(draw, crops: bool = False):
    kernel = draw(st.integers(1, 5))
    low = -2 if crops else 0
    return WindowAxis(kernel, draw(st.integers(1, 3)), draw(st.integers(low, 3)), draw(st.integers(low, 3)))


def reads(chain: list[WindowAxis], position: int) -> tuple[int, int]:
    """First and last input that output `position` reads, one operator at a time."""
    first = last = position
    for axis in reversed(chain):
        first, last = first * axis.stride - axis.begin, last * axis.stride - axis.begin + axis.kernel - 1
    return first, last


def size_after(chain: list[WindowAxis], n: int) -> int | None:
    """Output size one operator at a time; None where an operator has no output."""
    for axis in chain:
        if n + axis.begin + axis.end < axis.kernel:
            return None
        n = (n + axis.begin + axis.end - axis.kernel) // axis.stride + 1
    return n


def compose(chain: list[WindowAxis]) -> WindowAxis:
    whole = WindowAxis()
    for axis in chain:
        whole = whole.then(axis)
    return whole


@given(st.lists(axes(crops=True), min_size=1, max_size=5))
def test_a_chain_is_one_operator_for_every_size(chain):
    whole = compose(chain)
    for n in SIZES:
        size = size_after(chain, n)
        if size is not None:
            assert whole.size(n) == size
    for position in (-3, 0, 1, 7):
        first = position * whole.stride - whole.begin
        assert reads(chain, position) == (first, first + whole.kernel - 1)


@given(st.lists(axes(crops=True), min_size=1, max_size=4), st.integers(1, 30))
def test_pads_for_keeps_every_size_and_centres(chain, kernel):
    whole = compose(chain)
    pads = whole.pads_for(kernel)
    candidates = [b for b in range(whole.slack + kernel + 1) if inside(whole, kernel, b)]
    if pads is None:
        assert not candidates
        return
    fitted = WindowAxis(kernel, whole.stride, *pads)
    assert min(pads) >= 0
    assert all(fitted.size(n) == whole.size(n) for n in SIZES)
    off = [abs((kernel - 1) / 2 - b - ((whole.kernel - 1) / 2 - whole.begin)) for b in candidates]
    assert pads[0] == candidates[int(np.argmin(off))]


def inside(whole: WindowAxis, kernel: int, begin: int) -> bool:
    """Whether the window lies in the receptive field, or around it if it is larger."""
    first, last = -begin, -begin + kernel - 1
    field = -whole.begin, -whole.begin + whole.kernel - 1
    if kernel <= whole.kernel:
        return field[0] <= first and last <= field[1]
    return first <= field[0] and field[1] <= last


@pytest.mark.parametrize(
    ("axis", "kernel", "pads"),
    [
        (WindowAxis(5, 1, 2, 2), 3, (1, 1)),
        (WindowAxis(5, 1, 2, 2), 5, (2, 2)),
        (WindowAxis(5, 1, 2, 2), 4, (1, 2)),  # half a pixel off: the smaller begin
        (WindowAxis(7, 2, 3, 3), 3, (1, 1)),
        (WindowAxis(7, 2, 3, 3), 1, (0, 0)),
        (WindowAxis(8, 2, 3, 3), 3, (0, 1)),
        (WindowAxis(5, 1, 0, 0), 3, None),  # no pads: a smaller window has more positions
        (WindowAxis(5, 1, 0, 0), 5, (0, 0)),
        (WindowAxis(5, 1, 0, 0), 7, (1, 1)),
        (WindowAxis(3, 1, 0, 2), 1, (0, 0)),  # centred would need pads (-1, 1)
        (WindowAxis(5, 1, 2, 2), 0, None),
    ],
)
def test_pads_for_examples(axis, kernel, pads):
    assert axis.pads_for(kernel) == pads


def test_geometry_speaks_onnx_order():
    geometry = Geometry.of([WindowAxis(5, 1, 2, 1), WindowAxis(3, 2, 0, 4)])
    assert geometry == Geometry((5, 3), (1, 2), (2, 0, 1, 4))
    assert geometry.size((10, 10)) == (9, 6)
    assert geometry.axes == (WindowAxis(5, 1, 2, 1), WindowAxis(3, 2, 0, 4))
    assert geometry.pads_for((5, 3)) == (2, 0, 1, 4)
    assert geometry.pads_for(5) == (2, 1, 1, 5)
    assert geometry.pads_for((1, 3)) is None


@given(st.lists(axes(), min_size=1, max_size=3), st.lists(axes(), min_size=1, max_size=3))
def test_branches_unite_at_their_places(left, right):
    a, b = compose(left), compose(right)
    both = unite(a, b)
    agree = [n for n in range(40, 80) if a.size(n) == b.size(n)]
    if isinstance(both, str):
        assert a.stride != b.stride or not agree
        return
    assert agree
    assert all(both.size(n) == a.size(n) for n in agree)
    for position in (0, 3):
        first = position * both.stride - both.begin
        firsts, lasts = zip(reads(left, position), reads(right, position), strict=True)
        assert (first, first + both.kernel - 1) == (min(firsts), max(lasts))
    # A branch of size 1 is broadcast over a larger one.
    assert all(both.size(n) == max(a.size(n), b.size(n)) for n in range(40, 80))


def test_reasons_of_branches_that_cannot_meet():
    assert "strides 1 and 2" in unite(WindowAxis(3, 1, 1, 1), WindowAxis(1, 2))
    assert "different sizes" in unite(WindowAxis(3, 1, 1, 1), WindowAxis(3, 1, 0, 0))


# One operator against ONNX Runtime


def run_pool(n: int, attributes: dict[str, object]) -> np.ndarray | None:
    """Output of a MaxPool over 0..n-1 in ONNX Runtime, None where it refuses."""
    node = helper.make_node("MaxPool", ["x"], ["y"], **attributes)
    return run([node], np.arange(n, dtype=np.float32), [])


def run(nodes, x, weights) -> np.ndarray | None:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, None])],
        weights,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x.reshape(1, 1, -1)})[0].reshape(-1)
    except Exception:
        return None


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 2),
    begin=st.integers(0, 3),
    end=st.integers(0, 3),
    auto_pad=st.sampled_from(["NOTSET"] * 4 + ["VALID", "SAME_UPPER", "SAME_LOWER"]),
    ceil_mode=st.booleans(),
    known=st.booleans(),
)
def test_a_pooling_is_its_window(kernel, stride, dilation, begin, end, auto_pad, ceil_mode, known):
    if auto_pad != "NOTSET":
        dilation, begin, end = 1, 0, 0
    extent = dilation * (kernel - 1) + 1
    begin, end = min(begin, kernel - 1), min(end, kernel - 1)  # what the runtime allows
    attributes = {
        "kernel_shape": [kernel],
        "strides": [stride],
        "dilations": [dilation],
        "ceil_mode": int(ceil_mode),
        "auto_pad": auto_pad,
    }
    if auto_pad == "NOTSET":
        attributes["pads"] = [begin, end]
    for n in (1, 2, 3, 6, 7, 8, 9):
        axis = window(
            kernel,
            stride,
            dilation,
            begin,
            end,
            auto_pad=auto_pad,
            ceil_mode=ceil_mode,
            size=n if known else None,
        )
        if isinstance(axis, str):
            assert (auto_pad, ceil_mode) != ("NOTSET", False)
            return
        if n + begin + end < extent and not auto_pad.startswith("SAME"):
            continue  # no window fits; ONNX Runtime's pooling rounds towards zero there and makes one up
        got = run_pool(n, attributes)
        if auto_pad.startswith("SAME") and kernel < stride and got is None:
            continue  # the runtime's poolings refuse a negative pad
        assert got is not None
        assert axis.size(n) == len(got)
        # The maximum of 0..n-1 over a window is the last input that it reads.
        for position, value in enumerate(got):
            first = position * stride - axis.begin
            taps = [first + i * dilation for i in range(kernel) if 0 <= first + i * dilation < n]
            assert not taps or value == max(taps)


@settings(max_examples=40, deadline=None)
@given(st.lists(axes(), min_size=2, max_size=4), st.integers(1, 24))
def test_a_chain_of_convolutions_reads_its_window(chain, n):
    """Sizes and supports of a real chain: outputs answer to inputs in their window and to no others."""
    if size_after(chain, n) is None:
        return
    whole = compose(chain)
    nodes, weights = [], []
    for i, axis in enumerate(chain):
        weights.append(numpy_helper.from_array(np.ones((1, 1, axis.kernel), np.float32), f"w{i}"))
        source, target = "x" if i == 0 else f"t{i}", "y" if i == len(chain) - 1 else f"t{i + 1}"
        pads = [axis.begin, axis.end]
        nodes.append(helper.make_node("Conv", [source, f"w{i}"], [target], strides=[axis.stride], pads=pads))
    base = run(nodes, np.zeros(n, np.float32), weights)
    assert base is not None
    assert len(base) == whole.size(n)
    exact = all(a.begin == a.end == 0 for a in chain[1:])
    for i in range(n):
        answer = run(nodes, np.eye(n, dtype=np.float32)[i], weights)
        touched = set(np.flatnonzero(answer))
        starts = {p: p * whole.stride - whole.begin for p in range(len(base))}
        expected = {p for p, first in starts.items() if first <= i < first + whole.kernel}
        assert touched <= expected
        if exact and all(a.stride <= a.kernel for a in chain):
            assert touched == expected


def test_reasons_of_windows_that_shift():
    assert "dynamic" in window(3, 2, auto_pad="SAME_UPPER")
    assert "dynamic" in window(2, 2, 1, 1, 1, ceil_mode=True)
    assert "ceil_mode with auto_pad" in window(2, 2, auto_pad="VALID", ceil_mode=True)
    assert "unknown" in window(2, 2, auto_pad="SAME")
    assert window(3, 1, 2, auto_pad="SAME_LOWER") == WindowAxis(5, 1, 2, 2)
    assert window(2, 1, auto_pad="SAME_UPPER") == WindowAxis(2, 1, 0, 1)
    assert window(2, 1, auto_pad="SAME_LOWER") == WindowAxis(2, 1, 1, 0)
    assert window(3, 2, ceil_mode=True) == WindowAxis(3, 2, 0, 1)
