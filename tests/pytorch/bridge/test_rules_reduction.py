"""Reductions in every form that operator sets have given them: numbers from ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import net, normal
from rule_checks import agrees, agrees_on, compiles_and_exports, is_plain

from onnxfuse.errors import NotApplicableError
from onnxfuse.pytorch.bridge.importer import to_torch

KINDS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
POSITIVE = "a = Abs(x)  "


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 1])
def test_axes_as_attribute(kind: str, keep: int) -> None:
    for axes in ("[1]", "[-1,1]"):
        body = f"{POSITIVE} y = Reduce{kind}<axes={axes}, keepdims={keep}>(a)"
        module = agrees_on(body, {}, (3, 4), 11, 1e-4)
        assert is_plain(module) or (kind == "Prod" and axes != "[1]")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 1])
def test_axes_as_input(kind: str, keep: int) -> None:
    body = f"{POSITIVE} y = Reduce{kind}<keepdims={keep}>(a, d)"
    agrees_on(body, {"d": np.array([0, -1])}, (3, 4), 18, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_axes(kind: str) -> None:
    for opset in (11, 18):
        agrees_on(f"{POSITIVE} y = Reduce{kind}(a)", {}, (3, 4), opset, 1e-4)
    agrees_on(
        f"{POSITIVE} y = Reduce{kind}<keepdims=0>(a, d)", {"d": np.array([], np.int64)}, (3, 4), 18, 1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_axes(kind: str) -> None:
    body = f"{POSITIVE} y = Reduce{kind}<noop_with_empty_axes=1>(a)"
    module = to_torch(net(body, {}, "float[N,3] x", "float[N,3] y", 18))
    x = np.abs(normal(4, 3))
    wanted = {"LogSum": np.log(x), "SumSquare": x * x}.get(kind, x)
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Max", "Mean", "Min", "Prod", "Sum", "SumSquare", "L1"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_keep_their_type(kind: str, dtype: str) -> None:
    if (kind, dtype) == ("Mean", "int64"):
        pytest.skip("ONNX Runtime has no such mean")
    model = net(
        f"y = Reduce{kind}<keepdims=0>(x, d)", {"d": np.array([1])}, f"{dtype}[N,3] x", f"{dtype}[N] y", 18
    )
    agrees(model, {"x": np.array([[5, -3, 2], [-7, -1, 1]], dtype)})


def test_a_scalar() -> None:
    for kind in KINDS:
        model = net(f"y = Reduce{kind}(x)", {}, "float x", "float y", 18)
        agrees(model, {"x": np.array(2, np.float32)})


def test_the_extremes_of_nothing() -> None:
    x = torch.zeros(2, 0, 3)
    for kind, limit in (("Max", -np.inf), ("Min", np.inf)):
        model = net(f"y = Reduce{kind}(x, d)", {"d": np.array([1])}, "float[2,0,3] x", "float[2,1,3] y", 18)
        assert torch.equal(to_torch(model)(x), torch.full((2, 1, 3), limit))
    model = net("y = ReduceMax(x, d)", {"d": np.array([1])}, "int32[2,0,3] x", "int32[2,1,3] y", 18)
    assert to_torch(model)(x.int()).unique().tolist() == [-(2**31)]


def test_the_mean_of_nothing_is_0_as_in_onnx_runtime() -> None:
    model = net("y = ReduceMean(x, d)", {"d": np.array([1])}, "float[2,0] x", "float[2,1] y", 18)
    agrees(model, {"x": np.zeros((2, 0), np.float32)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", ["", ", none"])
def test_a_reduction_over_no_axes_is_one_of_each_element(kind: str, axes: str) -> None:
    """So the norm is the absolute value; keepdims has nothing to keep or drop."""
    x = np.array([[-2, 3, 0.5]], np.float32)
    body = f"y = Reduce{kind}<noop_with_empty_axes=1, keepdims=0>(x{axes})"
    model = net(body, {"none": np.zeros(0, np.int64)}, "float[N,3] x", "float[N,3] y", 18)
    agrees(model, {"x": np.abs(x) if kind == "LogSum" else x})


def test_the_gradient_of_a_norm_at_zero() -> None:
    module = to_torch(
        net("y = ReduceL2<keepdims=0>(x, d)", {"d": np.array([1])}, "float[N,3] x", "float[N] y", 18)
    )
    x = torch.zeros(2, 3, requires_grad=True)
    module(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_reductions_of_a_shape() -> None:
    body = """s = Shape(x)  p = ReduceProd<keepdims=0>(s)  a = ReduceMax(s, d)  c = ReduceMin<keepdims=0>(s)
              e = ReduceSum(s)  f = Add(p, c)  g = Mul(a, e)  h = Squeeze(g)  k = Sub(f, h)  l = Cast<to=1>(k)
              y = Add(x, l)"""
    module = agrees_on(body, {"d": np.array([0])}, (3, 4), 18)
    assert "_host_tensor" not in module.code
    compiles_and_exports(module, (3, 4))


def test_axes_by_data_are_refused() -> None:
    model = net("y = ReduceSum(x, d)", {}, "float[N,3] x, int64[1] d", "float[A,B] y", 18)
    with pytest.raises(NotApplicableError, match=r"'y' \(ReduceSum\) .* input 'd' must be a constant"):
        to_torch(model)
