"""The rows of the table: what they name exists, and what they say is true of the reference implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxfuse.ops.table import MICROSOFT, OPS, Key, Kind, Op, Trait, parse_key

FIRST = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)
GRID = np.linspace(-6, 6, 481, dtype=np.float32)
POINTWISE = OPS.of_kind(Kind.ACTIVATION, Kind.ELEMENTWISE)
RUNTIMES_OWN = {"SimplifiedLayerNormalization"}  # in ONNX's domain, but ONNX Runtime's alone
NEWEST = 28  # the operator set that the table was last held against
SCHEMAS = {schema.name: schema for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}

ATTRIBUTES: Mapping[str, Mapping[str, Any]] = {
    "Cast": {"to": onnx.TensorProto.DOUBLE},
    "DepthToSpace": {"blocksize": 2},
    "SpaceToDepth": {"blocksize": 2},
    "GlobalLpPool": {"p": 2},
    "AveragePool": {"kernel_shape": [2, 2]},
    "LpPool": {"kernel_shape": [2, 2]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Concat": {"axis": 1},
    "ThresholdedRelu": {"alpha": 0.7},
    "Shrink": {"lambd": 0.7, "bias": 0.3},
    "Split": {"num_outputs": 2},
}
INTEGERS: Mapping[str, list[Any]] = {
    "Expand": [[3, 2, 4, 6, 6]],
    "Reshape": [[4, -1]],
    "Squeeze": [],
    "Unsqueeze": [[0]],
    "Slice": [[1], [3], [2]],
    "Tile": [[1, 2, 1, 1]],
    "Gather": [[1, 0, 1]],
    "GatherND": [[[1, 0], [0, 3]]],
    "CenterCropPad": [[3, 4, 4, 9]],
    "Pad": [[0, 0, 1, 1, 0, 0, 0, 2]],
    "Trilu": [],
    "CumSum": [1],
    "ReverseSequence": [[3, 2, 2, 1, 1, 1]],
}
UNTRIED = {
    "Col2Im": "its input is laid out as columns",
    "ConstantOfShape": "its input is a shape",
    "GlobalLpPool": "the reference implementation lacks it",
    "Scatter": "deprecated",
    "TensorScatter": "writes one tensor into another",
}
"""Rows with a trait that are not run, and why."""


def run(op: str, *inputs: np.ndarray, **attributes: Any) -> np.ndarray:
    """The operator's first output by the reference implementation, of the newest version that is defined."""
    names = [f"i{index}" for index in range(len(inputs))]
    outputs = [f"o{index}" for index in range(attributes.get("num_outputs", 1))]
    node = helper.make_node(op, names, outputs, **attributes)
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype), value.shape
        )
        for name, value in zip(names, inputs, strict=True)
    ]
    graph = helper.make_graph([node], "one", infos, [helper.make_empty_tensor_value_info(outputs[0])])
    opset = helper.make_opsetid("", onnx.defs.onnx_opset_version())
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[opset]))
    with np.errstate(all="ignore"):
        (found,) = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    return np.asarray(found)


def applied(op: Op, *data: np.ndarray) -> np.ndarray:
    """The operator on tensors, with parameters that suit `FIRST`."""
    more = [np.array(value, np.int64) for value in INTEGERS.get(op.name, [])]
    if op.name == "GatherElements":
        more = [np.arange(FIRST[:1].size).reshape(FIRST[:1].shape) % 2]
    if op.name == "Compress":
        more = [np.array([True, False, True])]
    if op.name == "CastLike":
        more = [np.zeros(1, np.float64)]
    if op.name == "Clip":
        more = [np.float32(-0.5), np.float32(0.8)]
    if op.name == "Where":
        data = (data[0] > 0.3, *data)
    if op.name == "ReverseSequence":
        return run(op.name, data[0].reshape(4, 6, -1), more[0], time_axis=0, batch_axis=1)
    return run(op.name, *data, *more, **ATTRIBUTES.get(op.name, {}))


def operands(op: Op, x: np.ndarray) -> list[np.ndarray]:
    return [x] if op.operands == 1 else [x, x[::-1].copy()]


def rows(*traits: Trait) -> list[Op]:
    """The rows with these traits that the reference implementation can be asked about."""
    found = OPS.having(*traits).items()
    return [op for (domain, name), op in found if not domain and name not in UNTRIED and name in SCHEMAS]


def ids(op: Op) -> str:
    return op.name


@pytest.mark.parametrize("key", list(OPS), ids="::".join)
def test_every_operator_exists(key: Key) -> None:
    domain, name = key
    older = onnx.defs.onnx_opset_version() < NEWEST
    assert domain == MICROSOFT or name in RUNTIMES_OWN or name in SCHEMAS or older


@pytest.mark.parametrize("name", sorted(OPS.names & SCHEMAS.keys()))
def test_slots_exist(name: str) -> None:
    op, schema = OPS.get("", name), SCHEMAS[name]
    assert op is not None
    most = 10**9 if schema.max_input == 2**31 - 1 else len(schema.inputs)
    assert all(0 <= slot < most for slot in op.weights)
    assert op.operands is None or op.operands <= most or not schema.inputs


@pytest.mark.parametrize("op", rows(Trait.IDEMPOTENT), ids=ids)
def test_idempotent(op: Op) -> None:
    once = applied(op, GRID if op.kind is not Kind.MOVE else FIRST)
    np.testing.assert_array_equal(applied(op, once), once)


@pytest.mark.parametrize("op", rows(Trait.MONOTONE), ids=ids)
def test_monotone(op: Op) -> None:
    assert op.operands == 1
    y = applied(op, GRID if op.kind is not Kind.MOVE else FIRST.reshape(-1)[None])
    if op.kind is not Kind.MOVE:
        defined = y[~np.isnan(y)]
        assert (np.diff(defined) >= -1e-6).all()
        assert len(defined) > 80


@pytest.mark.parametrize("op", rows(Trait.KEEPS_ZERO), ids=ids)
def test_zeros_give_zeros(op: Op) -> None:
    assert not applied(op, *operands(op, np.zeros_like(FIRST))).any()


def test_what_does_not_keep_zero_does_not_say_so() -> None:
    """Of element-wise functions of floats all that keep it say so."""
    for (domain, name), op in POINTWISE.items():
        if domain or op.operands != 1 or name not in SCHEMAS or name in ("BitwiseNot", "Not", "Clip"):
            continue
        zero = applied(op, np.zeros(1, np.float32))
        assert (zero.dtype.kind == "f" and not zero.any()) == (Trait.KEEPS_ZERO in op.traits), name


@pytest.mark.parametrize("op", rows(Trait.AFFINE), ids=ids)
def test_affine(op: Op) -> None:
    """f(x) + f(y) = f(x + y) + f(0)."""
    x, y = FIRST, FIRST[:, ::-1].copy()
    zero = np.zeros_like(x)
    fx, fy, total, none = (applied(op, *operands(op, value)) for value in (x, y, x + y, zero))
    np.testing.assert_allclose(fx + fy, total + none, atol=1e-5)


@pytest.mark.parametrize("op", rows(Trait.SCALES), ids=ids)
def test_scales(op: Op) -> None:
    x, scale = FIRST, np.float32(0.25)
    np.testing.assert_allclose(applied(op, 2 * x, scale), 2 * applied(op, x, scale))
    np.testing.assert_allclose(applied(op, x, scale) / x, np.full_like(x, applied(op, np.float32(1), scale)))


@pytest.mark.parametrize("op", rows(Trait.ADDS), ids=ids)
def test_adds(op: Op) -> None:
    np.testing.assert_array_equal(applied(op, FIRST, GRID[:6]), FIRST + GRID[:6])


@pytest.mark.parametrize("op", rows(Trait.SELECTS), ids=ids)
def test_selects(op: Op) -> None:
    known = {*FIRST.reshape(-1).tolist(), 0.0, float(np.float32(-0.5)), float(np.float32(0.8))}
    assert set(applied(op, *operands(op, FIRST)).reshape(-1).tolist()) <= known


@pytest.mark.parametrize("op", rows(Trait.SAME_ELEMENTS), ids=ids)
def test_same_elements(op: Op) -> None:
    y = applied(op, FIRST)
    np.testing.assert_array_equal(np.sort(y, None), np.sort(FIRST, None))
    if Trait.SAME_ORDER in op.traits:
        np.testing.assert_array_equal(y.reshape(-1), FIRST.reshape(-1))


def test_other_moves_keep_not_all_elements_or_say_so() -> None:
    for op in rows(Trait.SELECTS):
        if op.kind is Kind.MOVE and Trait.SAME_ELEMENTS not in op.traits and op.operands == 1:
            assert applied(op, FIRST).size != FIRST.size or (applied(op, FIRST) == 0).any(), op.name


@pytest.mark.parametrize("op", rows(Trait.CARRIES_WEIGHTS), ids=ids)
def test_carried_elements_are_the_operands(op: Op) -> None:
    values = applied(op, *operands(op, FIRST)).reshape(-1)
    assert np.isin(values, [*FIRST.reshape(-1), 0]).all()


def test_traits_that_follow_from_others() -> None:
    def within(inner: Trait, outer: Trait) -> bool:
        return {*OPS.having(inner)} <= {*OPS.having(outer)}

    assert within(Trait.SAME_ORDER, Trait.SAME_ELEMENTS)
    assert within(Trait.SAME_ELEMENTS, Trait.SELECTS)
    assert within(Trait.ADDS, Trait.AFFINE)
    assert {*OPS.having(Trait.CONVOLVES)} <= {*OPS.of_kind(Kind.LINEAR).weighted()}


def test_queries() -> None:
    assert OPS.get(MICROSOFT, "Gelu") is OPS.get("", "Gelu")
    assert OPS.get(MICROSOFT, "Relu") is None
    gelu = OPS.of_kind(Kind.ACTIVATION)
    assert (MICROSOFT, "Gelu") in gelu
    assert "BiasGelu" not in gelu.names
    assert len(gelu - gelu) == 0
    assert {*(gelu | OPS.of_kind(Kind.POOL))} == {*gelu, *OPS.of_kind(Kind.POOL)}
    assert {*gelu.unary()} | {*(gelu - gelu.unary())} == {*gelu}


@pytest.mark.parametrize(
    ("text", "key"),
    [("Conv", ("", "Conv")), ("ai.onnx::Conv", ("", "Conv")), ("com.acme::a::Op", ("com.acme::a", "Op"))],
)
def test_keys(text: str, key: Key) -> None:
    assert parse_key(text) == key
