"""Pools: numbers from ONNX Runtime, gradients from native modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import net, normal
from rule_checks import agrees, agrees_on, compiles_and_exports, is_plain, trains_like
from torch import nn

from onnxfuse.errors import NotApplicableError
from onnxfuse.pytorch.bridge.importer import to_torch

SHAPE = (3, 9, 10)

PLAIN = {
    "stride": "kernel_shape=[3,2], strides=[2,2]",
    "no stride": "kernel_shape=[3,2]",
    "pads": "kernel_shape=[3,2], pads=[1,1,1,1]",
    "ceil": "kernel_shape=[2,3], strides=[2,2], ceil_mode=1",
    "ceil, pads": "kernel_shape=[3,3], strides=[2,3], pads=[1,1,1,1], ceil_mode=1",
    "valid": 'kernel_shape=[2,3], strides=[2,2], auto_pad="VALID"',
    "same, stride 1": 'kernel_shape=[3,5], auto_pad="SAME_LOWER"',
}
UNEVEN = {
    "uneven pads": "kernel_shape=[3,3], strides=[2,2], pads=[0,1,2,0]",
    "pads beyond half": "kernel_shape=[3,3], strides=[2,2], pads=[2,2,2,2]",
    "ceil, uneven pads": "kernel_shape=[3,3], strides=[2,3], pads=[0,0,1,2], ceil_mode=1",
    "ceil, uneven pads, cut": "kernel_shape=[2,2], strides=[3,3], pads=[0,1,1,1], ceil_mode=1",
    "upper": 'kernel_shape=[2,3], strides=[2,2], auto_pad="SAME_UPPER"',
    "lower": 'kernel_shape=[2,4], strides=[2,3], auto_pad="SAME_LOWER"',
    "same, stride 1, even": 'kernel_shape=[2,4], auto_pad="SAME_UPPER"',
}
COMPILED = ("ceil", "ceil, uneven pads", "upper")


@pytest.mark.parametrize("name", [*PLAIN, *UNEVEN])
def test_max_pool(name: str) -> None:
    module = agrees_on(f"y = MaxPool<{(PLAIN | UNEVEN)[name]}>(x)", {}, SHAPE)
    assert is_plain(module) == (
        name in PLAIN or name in ("uneven pads", "pads beyond half", "same, stride 1, even")
    )
    if name in COMPILED:
        compiles_and_exports(module, SHAPE)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", [*PLAIN, *UNEVEN])
def test_where_max_pool_found_it(name: str, order: int) -> None:
    body = f"y, i = MaxPool<{(PLAIN | UNEVEN)[name]}, storage_order={order}>(x)"
    model = net(body, {}, "float[N,3,9,10] x", "float y, int64 i")
    agrees(model, {"x": normal(2, *SHAPE)})


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", [*PLAIN, *UNEVEN])
def test_average_pool(name: str, count: int) -> None:
    attributes = f"{(PLAIN | UNEVEN)[name]}, count_include_pad={count}"
    module = agrees_on(f"y = AveragePool<{attributes}>(x)", {}, SHAPE, opset=19)
    if name in COMPILED:
        compiles_and_exports(module, SHAPE)
    if name in PLAIN:
        assert is_plain(module)


@pytest.mark.parametrize("name", [*PLAIN, *UNEVEN])
def test_lp_pool(name: str) -> None:
    agrees_on(f"y = LpPool<{(PLAIN | UNEVEN)[name]}, p=3>(x)", {}, SHAPE, opset=18, tolerance=1e-4)


@pytest.mark.parametrize(
    "attributes",
    [
        "dilations=[2,3]",
        "dilations=[2,1], strides=[2,2], pads=[1,0,2,1]",
        "dilations=[2,2], strides=[3,2], ceil_mode=1",
    ],
)
def test_dilated_pools(attributes: str) -> None:
    for op in ("MaxPool", "AveragePool", "AveragePool<count_include_pad=1,", "LpPool"):
        head = op if "<" in op else f"{op}<"
        agrees_on(f"y = {head}kernel_shape=[3,2], {attributes}>(x)", {}, SHAPE, opset=19, tolerance=1e-4)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_pools_of_other_ranks(op: str) -> None:
    agrees_on(f"y = {op}<kernel_shape=[3], strides=[2], pads=[1,0]>(x)", {}, (3, 9))
    agrees_on(f"y = {op}<kernel_shape=[3,2,2], strides=[2,1,2], pads=[1,0,1,1,1,0]>(x)", {}, (2, 6, 5, 7))
    with pytest.raises(NotApplicableError, match="no pooling over 4 axes"):
        to_torch(net(f"y = {op}<kernel_shape=[1,1,1,1]>(x)", {}, "float[1,1,2,2,2,2] x", "float y"))


def test_auto_pad_of_dilated_windows_is_refused() -> None:
    body = 'y = MaxPool<kernel_shape=[2,2], dilations=[2,2], auto_pad="SAME_UPPER">(x)'
    with pytest.raises(NotApplicableError, match=r"\(MaxPool\).*auto_pad"):
        to_torch(net(body, {}, "float[N,3,9,10] x", "float y"))


def test_max_pool_of_bytes() -> None:
    body = "y = MaxPool<kernel_shape=[2,2], pads=[1,1,0,0]>(x)"
    model = net(body, {}, "uint8[N,3,4,4] x", "uint8[N,3,4,4] y")
    agrees(model, {"x": np.random.default_rng(0).integers(0, 255, (2, 3, 4, 4)).astype(np.uint8)})


@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 6), (3, 4, 2, 5)])
def test_pools_over_all_of_space(shape: tuple[int, ...]) -> None:
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool<p=3>"):
        agrees_on(f"y = {op}(x)", {}, shape)


def test_pools_over_all_of_space_of_a_tensor_of_unknown_rank() -> None:
    # Nothing says what comes out of a reshape to a shape that is fed.
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        model = net(f"h = Reshape(x, s) y = {op}(h)", {}, "float[N,12] x, int64[K] s", "float y")
        for shape in ([2, 3, 4], [2, 3, 2, 2]):
            agrees(model, {"x": normal(2, 12), "s": np.array(shape)})


def test_max_unpool_undoes_max_pool() -> None:
    body = """p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
    y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(p, i)"""
    agrees_on(body, {}, (3, 6, 8))
    native, unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
    x = torch.randn(2, 3, 6, 8)
    module = to_torch(net(body, {}, "float[N,3,6,8] x", "float y"))
    torch.testing.assert_close(module(x), unpool(*native(x)))


def test_max_unpool_to_a_shape() -> None:
    model = net("y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(x, i, s)", {"s": np.array([1, 1, 5, 6])},
                "float[1,1,2,2] x, int64[1,1,2,2] i", "float y")  # fmt: skip
    found = to_torch(model)(torch.tensor([[[[1.0, 2], [3, 4]]]]), torch.tensor([[[[0, 6], [8, 15]]]]))
    wanted = torch.zeros(5, 6)
    wanted[0, 0], wanted[1, 2], wanted[2, 0], wanted[3, 3] = 1, 2, 3, 4
    assert torch.equal(found, wanted[None, None])


@pytest.mark.parametrize(
    ("body", "native"),
    [
        ("y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", nn.MaxPool2d(3, 2, 1)),
        ("y = AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1, count_include_pad=1>(x)",
         nn.AvgPool2d(2, 2, ceil_mode=True)),
        ("y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)",
         nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        ("y = GlobalAveragePool(x)", nn.AdaptiveAvgPool2d(1)),
        ("y = GlobalMaxPool(x)", nn.AdaptiveMaxPool2d(1)),
    ],
)  # fmt: skip
def test_gradients_are_those_of_native_pools(body: str, native: nn.Module) -> None:
    module = to_torch(net(body, {}, "float[N,3,9,9] x", "float y"))
    x = torch.randn(2, 3, 9, 9)
    trains_like(module, native, x, {})
    trains_like(module, native, x.round(), {})  # equal elements share nothing
