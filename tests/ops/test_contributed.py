"""Contributed operators, known by a row and what is their own: ScaledSiLU, FusedConv, FusedGemm, FusedMatMul.

Held against ONNX Runtime, whose operators they are, and against the same computation in ONNX's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from channel_cases import Case, check, drawn, found
from nets import RUNTIME, compute, normal
from onnx import numpy_helper

from onnxfuse.analysis.cost import measure
from onnxfuse.analysis.intervals.rules import intervals
from onnxfuse.analysis.regions.linear_rules import CURVED
from onnxfuse.analysis.regions.search import find_regions
from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.runtime.session import Runtime

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
SILU = "com.microsoft.ScaledSiLU"
Shape = tuple[int, ...]


def load(body: str, x: str, y: str, **weights: Any) -> Model:
    """A graph of contributed operators; skips the test where the installed ONNX Runtime lacks one."""
    proto = onnx.parser.parse_model(f"{HEAD} g ({x}) => ({y}) {{ {body} }}")
    for name, value in weights.items():
        array = normal(*value, seed=len(name)) if isinstance(value, tuple) else np.asarray(value)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = Model.load(proto)
    try:
        Runtime("cpu").session(model)
    except NotApplicableError as error:
        pytest.skip(str(error))
    return model


def torch_agrees(model: Model, x: np.ndarray) -> None:
    expected = torch.from_numpy(compute(model, {"x": x})[0])
    torch.testing.assert_close(to_torch(model)(torch.from_numpy(x)), expected, rtol=1e-5, atol=1e-5)


# ScaledSiLU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [f"{SILU}(x)", f"{SILU}<alpha=1.7>(x)", f"{SILU}<alpha=-0.5>(x)", f"{SILU}<alpha=9.0>(x, s)"],
)
def test_scaled_silu(text: str) -> None:
    model = load(f"y = {text}", "float[N,6] x", "float[N,6] y", s=np.float32(0.25))
    scale = 0.25 if "s)" in text else 1.7 if "1.7" in text else -0.5 if "-0.5" in text else 1.0
    x = 3 * normal(8, 6)
    z = scale * x.astype(np.float64)
    np.testing.assert_allclose(compute(model, {"x": x})[0], z / (1 + np.exp(-z)), rtol=1e-5, atol=1e-7)
    torch_agrees(model, x)


@pytest.mark.parametrize("text", [f"{SILU}<alpha=1.7>(c)", f"{SILU}<alpha=-0.5>(c)", f"{SILU}(c, s)"])
def test_bounds_of_scaled_silu(text: str) -> None:
    """From x in [-2, 3]: met by the curve of a fine grid, and no wider than that by more than a hair."""
    model = load(
        f"c = Clip(x, lo, hi) y = {text}",
        "float[N,6] x",
        "float[N,6] y",
        s=np.float32(0.25),
        lo=np.float32(-2),
        hi=np.float32(3),
    )
    bound = intervals(model, model.shapes())["y"]
    y = compute(model, {"x": np.linspace(-2, 3, 6000, dtype=np.float32).reshape(-1, 6)})[0]
    assert bound.low.min() <= y.min() <= bound.low.min() + 1e-3
    assert bound.high.max() - 1e-3 <= y.max() <= bound.high.max()


def test_scaled_silu_in_a_region_and_behind_a_channel() -> None:
    body = f"a = Conv(x, w1) b = {SILU}<alpha=1.5>(a) y = Conv(b, w2)"
    weights = {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)}
    model = load(body, "float[N,3,6,6] x", "float[N,4,6,6] y", **weights)
    assert ("com.microsoft", "ScaledSiLU") in CURVED
    assert [(region.u, region.v) for region in find_regions(model)[0]] == [("x", "y")]
    case = Case("", {}, (8,), 1)
    (group,) = (group for group in found(case, model) if not group.frozen)
    assert group.size == 8
    check(case, model, drawn([group], 0.5))
    assert measure(model, {"x": normal(2, 3, 6, 6)}, RUNTIME).macs == 2 * 36 * (8 * 3 + 4 * 8)


# FusedConv, FusedGemm, FusedMatMul ------------------------------------------------------------------

FUSED = {
    "FusedConv": (
        """a = Conv(x, w1) b = com.microsoft.FusedConv<activation="Relu">(a, w2, b2)
        y = Conv(b, w3)""",
        {"w1": (8, 3, 1, 1), "w2": (6, 8, 1, 1), "b2": (6,), "w3": (4, 6, 1, 1)},
        (8, 6),
        36 * (8 * 3 + 6 * 8 + 4 * 6),
    ),
    "FusedConv with a sum": (
        """a = Conv(x, w1) b = com.microsoft.FusedConv<activation="Relu">(a, w2, b2, a)
        y = Conv(b, w3)""",
        {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "b2": (8,), "w3": (4, 8, 1, 1)},
        (8,),
        36 * (8 * 3 + 8 * 8 + 4 * 8),
    ),
    "FusedGemm": (
        """a = Gemm(x, w1)
        b = com.microsoft.FusedGemm<activation="Relu", transB=1, alpha=0.5, beta=2.0>(a, w2, b2)
        y = Gemm(b, w3)""",
        {"w1": (5, 8), "w2": (6, 8), "b2": (6,), "w3": (6, 4)},
        (8, 6),
        5 * 8 + 8 * 6 + 6 * 4,
    ),
    "FusedMatMul": (
        "a = MatMul(x, w1) b = com.microsoft.FusedMatMul<alpha=0.5>(a, w2) y = MatMul(b, w3)",
        {"w1": (5, 8), "w2": (8, 6), "w3": (6, 4)},
        (8, 6),
        5 * 8 + 8 * 6 + 6 * 4,
    ),
    "FusedMatMul transposed": (
        "a = MatMul(x, w1) b = com.microsoft.FusedMatMul<transB=1>(a, w2) y = MatMul(b, w3)",
        {"w1": (5, 8), "w2": (6, 8), "w3": (6, 4)},
        (8, 6),
        5 * 8 + 8 * 6 + 6 * 4,
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_channels_and_macs_of_fused_operators(name: str) -> None:
    body, weights, free, macs = FUSED[name]
    maps = "Conv" in name
    x, y = ("float[N,3,6,6] x", "float[N,4,6,6] y") if maps else ("float[N,5] x", "float[N,4] y")
    model = load(body, x, y, **weights)
    case = Case("", {}, free, 1)
    groups = [group for group in found(case, model) if not group.frozen]
    assert tuple(group.size for group in groups) == free
    check(case, model, drawn(groups, 0.5))
    assert measure(model, {"x": normal(1, *((3, 6, 6) if maps else (5,)))}, RUNTIME).macs == macs
    torch_agrees(model, normal(3, *((3, 6, 6) if maps else (5,))))


@pytest.mark.parametrize(
    ("attributes", "a", "b", "y"),
    [
        ("", (4, 2, 3), (4, 3, 5), (4, 2, 5)),
        ("<transA=1>", (4, 3, 2), (4, 3, 5), (4, 2, 5)),
        ("<transA=1, transB=1>", (4, 3, 2), (4, 5, 3), (4, 2, 5)),
        ("<transA=1>", (3,), (3, 5), (5,)),
    ],
)
def test_macs_of_products(attributes: str, a: Shape, b: Shape, y: Shape) -> None:
    x, result = (",".join(map(str, shape)) for shape in (a, y))
    body = f"y = com.microsoft.FusedMatMul{attributes}(x, w)"
    model = load(body, f"float[{x}] x", f"float[{result}] y", w=b)
    assert compute(model, {"x": normal(*a)})[0].shape == y
    assert measure(model, {"x": normal(*a)}, RUNTIME).macs == int(np.prod(y)) * 3


def test_what_products_of_transposed_batches_cost_is_not_known() -> None:
    body = "y = com.microsoft.FusedMatMul<transBatchA=1>(x, w)"
    model = load(body, "float[2,4,3] x", "float[4,2,5] y", w=(4, 3, 5))
    found_ = measure(model, {"x": normal(2, 4, 3)}, RUNTIME)
    assert found_.macs is None
    assert "transposed batches" in (found_.macs_reason or "")
    groups = found(Case("", {}, (), 1), model)
    assert all("transposed batches" in (group.frozen or "") for group in groups if group.touches)
