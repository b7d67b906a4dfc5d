"""Conv, ConvTranspose, Gemm and MatMul: numbers from ONNX Runtime, gradients from native modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import net, normal
from rule_checks import agrees, agrees_on, compiles_and_exports, is_plain, trains_like
from torch import nn

from onnxfuse.errors import NotApplicableError
from onnxfuse.pytorch.bridge.importer import to_torch

CONVS = {
    "plain": ("", (4, 3, 3, 3), (3, 8, 9)),
    "stride, pads": ("<strides=[2,1], pads=[1,2,1,2]>", (4, 3, 3, 3), (3, 8, 9)),
    "dilation": ("<dilations=[2,1], kernel_shape=[3,3]>", (4, 3, 3, 3), (3, 8, 9)),
    "groups": ("<group=3>", (6, 1, 2, 3), (3, 8, 9)),
    "1-D": ("<pads=[2,2], dilations=[2]>", (4, 3, 3), (3, 11)),
    "3-D": ("<strides=[1,2,1], pads=[1,0,1,1,0,1]>", (2, 3, 3, 2, 3), (3, 5, 6, 4)),
    "valid": ('<auto_pad="VALID", strides=[2,2]>', (4, 3, 3, 3), (3, 8, 9)),
    "same, stride 1": ('<auto_pad="SAME_UPPER">', (4, 3, 3, 5), (3, 8, 9)),
}
UNEVEN = {
    "uneven pads": ("<pads=[0,1,2,0]>", (4, 3, 3, 3), (3, 8, 9)),
    "upper, even kernel": ('<auto_pad="SAME_UPPER">', (4, 3, 2, 4), (3, 8, 9)),
    "lower, even kernel": ('<auto_pad="SAME_LOWER", strides=[1,1]>', (4, 3, 2, 4), (3, 8, 9)),
    "upper, strides": ('<auto_pad="SAME_UPPER", strides=[2,3]>', (4, 3, 3, 2), (3, 8, 9)),
    "lower, strides": ('<auto_pad="SAME_LOWER", strides=[3,2]>', (4, 3, 5, 3), (3, 8, 9)),
    "upper, stride beyond kernel": ('<auto_pad="SAME_UPPER", strides=[2,3]>', (4, 3, 1, 2), (3, 8, 9)),
    "1-D lower, strides": ('<auto_pad="SAME_LOWER", strides=[2]>', (4, 3, 4), (3, 11)),
}


@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str) -> None:
    attributes, kernel, shape = CONVS[name]
    module = agrees_on(f"y = Conv{attributes}(x, w, b)", {"w": kernel, "b": (kernel[0],)}, shape)
    assert is_plain(module)
    assert "pad(" not in module.code
    agrees_on(f"y = Conv{attributes}(x, w)", {"w": kernel}, shape)


@pytest.mark.parametrize("name", UNEVEN)
def test_conv_with_padding_that_torch_has_not(name: str) -> None:
    attributes, kernel, shape = UNEVEN[name]
    module = agrees_on(f"y = Conv{attributes}(x, w, b)", {"w": kernel, "b": (kernel[0],)}, shape)
    if name in ("uneven pads", "upper, strides"):
        compiles_and_exports(module, shape)


def test_conv_says_no_more_than_it_has_to() -> None:
    module = to_torch(
        net("y = Conv<strides=[2,2], pads=[0,0,0,0]>(x, w)", {"w": (4, 3, 3, 3)}, "float[N,3,8,8] x")
    )
    (node,) = (node for node in module.graph.nodes if node.op == "call_function")
    assert node.kwargs == {"stride": (2, 2)}


@pytest.mark.parametrize("attributes", ["", "<kernel_shape=[3,2]>"])
def test_conv_by_a_kernel_that_is_computed(attributes: str) -> None:
    model = net(f"y = Conv{attributes}(x, k)", {}, "float[N,3,8,9] x, float[4,3,3,2] k", "float y")
    agrees(model, {"x": normal(2, 3, 8, 9), "k": normal(4, 3, 3, 2)})


def test_auto_pad_of_a_kernel_of_unknown_size_is_refused() -> None:
    model = net('y = Conv<auto_pad="SAME_UPPER">(x, k)', {}, "float[N,3,8,9] x, float[4,3,A,B] k", "float y")
    with pytest.raises(NotApplicableError, match=r"\(Conv\).*auto_pad needs"):
        to_torch(model)


def test_auto_pad_with_strides_far_beyond_the_kernel_is_refused() -> None:
    model = net(
        'y = Conv<auto_pad="SAME_UPPER", strides=[4,4]>(x, w)', {"w": (4, 3, 2, 2)}, "float[N,3,8,9] x"
    )
    with pytest.raises(NotApplicableError, match=r"\(Conv\).*strides beyond the window"):
        to_torch(model)


def test_conv_over_four_axes_is_refused() -> None:
    model = net("y = Conv(x, w)", {"w": (1, 1, 1, 1, 1, 1)}, "float[1,1,2,2,2,2] x", "float y")
    with pytest.raises(NotApplicableError, match="no convolution over 4 axes"):
        to_torch(model)


TRANSPOSED = {
    "plain": "",
    "stride, pads": "<strides=[2,3], pads=[1,0,1,0]>",
    "output_padding": "<strides=[2,3], output_padding=[1,2]>",
    "uneven pads that torch has": "<strides=[3,2], pads=[1,1,0,0]>",
    "uneven pads": "<strides=[2,2], pads=[0,0,1,2]>",
    "dilation": "<dilations=[2,1], pads=[1,0,1,0]>",
    "upper": '<auto_pad="SAME_UPPER", strides=[2,3]>',
    "lower": '<auto_pad="SAME_LOWER", strides=[2,1], dilations=[1,2]>',
    "stride beyond kernel": '<auto_pad="SAME_UPPER", strides=[4,5]>',
    "output_shape": "<strides=[2,2], output_shape=[9,12]>",
    "output_shape, upper": '<auto_pad="SAME_UPPER", strides=[2,2], output_shape=[9,12]>',
    "output_shape beyond": "<strides=[2,2], output_shape=[12,14]>",
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose(name: str) -> None:
    body = f"y = ConvTranspose{TRANSPOSED[name]}(x, w, b)"
    module = agrees_on(body, {"w": (3, 4, 3, 3), "b": (4,)}, (3, 5, 6))
    if name in ("uneven pads", "upper", "output_shape"):
        compiles_and_exports(module, (3, 5, 6))
    agrees_on(body.replace(", b", ""), {"w": (3, 4, 3, 3)}, (3, 5, 6))


@pytest.mark.parametrize("name", ["plain", "stride, pads", "output_padding", "uneven pads that torch has"])
def test_conv_transpose_is_torchs_own_where_it_can_be(name: str) -> None:
    body = f"y = ConvTranspose{TRANSPOSED[name]}(x, w)"
    assert is_plain(to_torch(net(body, {"w": (3, 4, 3, 3)}, "float[N,3,5,6] x", "float y")))


def test_conv_transpose_in_groups_and_other_ranks() -> None:
    agrees_on("y = ConvTranspose<group=3, strides=[2]>(x, w, b)", {"w": (3, 2, 4), "b": (6,)}, (3, 7))
    agrees_on("y = ConvTranspose<group=2, pads=[0,1,0,0,0,1]>(x, w)", {"w": (4, 1, 2, 3, 2)}, (4, 3, 4, 3))


def test_conv_transpose_by_a_kernel_that_is_computed() -> None:
    model = net('y = ConvTranspose<auto_pad="SAME_LOWER", strides=[2,2]>(x, k)', {},
                "float[N,3,4,5] x, float[3,2,3,3] k", "float y")  # fmt: skip
    agrees(model, {"x": normal(2, 3, 4, 5), "k": normal(3, 2, 3, 3)})


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (4,), (1, 4), (5, 4), (5, 1)])
@pytest.mark.parametrize("factors", ["alpha=1.0", "alpha=0.5, beta=2.0"])
def test_gemm(transposed: int, bias: tuple[int, ...] | None, factors: str) -> None:
    weights = {"w": normal(4, 6) if transposed else normal(6, 4)}
    if bias is not None:
        weights["b"] = np.asarray(normal(*bias, seed=3), np.float32)
    names = ", ".join(weights)
    model = net(f"y = Gemm<transB={transposed}, {factors}>(x, {names})", weights, "float[5,6] x", "float y")
    assert is_plain(agrees(model, {"x": normal(5, 6)}))


def test_gemm_of_a_transposed_input() -> None:
    model = net("y = Gemm<transA=1>(w, x)", {"w": normal(6, 4)}, "float[6,N] x", "float y")
    agrees(model, {"x": normal(6, 3)})


def test_gemm_of_integers() -> None:
    model = net("y = Gemm<alpha=2.0>(x, w, b)", {"w": np.arange(6).reshape(3, 2), "b": np.array([1, -1])},
                "int64[N,3] x", "int64 y")  # fmt: skip
    found = to_torch(model)(torch.tensor([[1, 2, 3]]))
    assert found.tolist() == [[2 * (0 + 4 + 12) + 1, 2 * (1 + 6 + 15) - 1]]


def test_a_linear_layer_is_a_call_of_linear() -> None:
    native = nn.Linear(6, 4)
    weights = {"w": native.weight.detach().numpy(), "b": native.bias.detach().numpy()}
    module = to_torch(net("y = Gemm<transB=1>(x, w, b)", weights))
    assert "linear(" in module.code
    trains_like(module, native, torch.randn(5, 6), {"w": native.weight, "b": native.bias})
    compiles_and_exports(module, (6,))


@pytest.mark.parametrize(
    ("weight", "shape"), [((6, 4), (6,)), ((6, 4), (2, 3, 6)), ((3, 6, 4), (3, 2, 6)), ((6,), (2, 6))]
)
def test_matmul(weight: tuple[int, ...], shape: tuple[int, ...]) -> None:
    module = agrees_on("y = MatMul(x, w)", {"w": normal(*weight)}, shape)
    assert is_plain(module)
    assert set(dict(module.named_parameters())) == {"w"}


def test_convolutions_train_like_native_ones() -> None:
    x = torch.randn(2, 4, 9, 8)
    conv = nn.Conv2d(4, 6, 3, (2, 1), 1, groups=2)
    weights = {"w": conv.weight.detach().numpy(), "b": conv.bias.detach().numpy()}
    body = "y = Conv<strides=[2,1], pads=[1,1,1,1], group=2>(x, w, b)"
    module = to_torch(net(body, weights, "float[N,4,9,8] x", "float y"))
    trains_like(module, conv, x, {"w": conv.weight, "b": conv.bias})
    up = nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1)
    weights = {"w": up.weight.detach().numpy(), "b": up.bias.detach().numpy()}
    body = "y = ConvTranspose<strides=[2,2], pads=[1,1,0,0]>(x, w, b)"
    module = to_torch(net(body, weights, "float[N,4,9,8] x", "float y"))
    trains_like(module, up, x, {"w": up.weight, "b": up.bias})
