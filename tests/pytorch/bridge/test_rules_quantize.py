"""Quantised tensors and products of them, Fourier transforms and windows: numbers from ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import net, normal
from onnx import TensorProto, helper
from rule_checks import agrees, agrees_on

from onnxfuse.errors import NotApplicableError
from onnxfuse.pytorch.bridge.importer import to_torch

SCALE = np.float32(0.05)
NUMBERS = np.random.default_rng(0)
HALVES = (np.arange(-20, 20, dtype=np.float32) / 2 + 0.0).reshape(2, 20)
"""What lies half-way between two integers shows how they are rounded."""


def integers(low: int, high: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    return NUMBERS.integers(low, high, shape).astype(dtype)


@pytest.mark.parametrize(("dtype", "name"), [(np.uint8, "uint8"), (np.int8, "int8"), (np.int16, "int16")])
def test_quantised_and_back(dtype: type, name: str) -> None:
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
    weights = {"s": np.float32(1), "z": np.array(3, dtype)}
    model = net(body, weights, "float[N,20] x", f"{name} q, float d", 21)
    agrees(model, {"x": HALVES})
    agrees(model, {"x": HALVES * 10000})


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scales_by_index_along_an_axis(axis: int) -> None:
    size = (2, 3, 4)[axis]
    weights = {"s": np.abs(normal(size)) / 20, "z": integers(100, 140, size)}
    body = f"q = QuantizeLinear<axis={axis}>(x, s, z) d = DequantizeLinear<axis={axis}>(q, s, z)"
    agrees(net(body, weights, "float[2,3,4] x", "uint8 q, float d", 21), {"x": normal(2, 3, 4)})


def test_scales_by_blocks() -> None:
    weights = {"s": np.abs(normal(2, 2, 4)) / 20, "z": integers(100, 140, 2, 2, 4)}
    body = """q = QuantizeLinear<axis=1, block_size=2>(x, s, z)
    d = DequantizeLinear<axis=1, block_size=2>(q, s, z)"""
    agrees(net(body, weights, "float[2,3,4] x", "uint8 q, float d", 21), {"x": normal(2, 3, 4)})


def test_without_a_zero_point() -> None:
    agrees(net("q = QuantizeLinear(x, s)", {"s": SCALE}, "float[N,20] x", "uint8 q"), {"x": HALVES})
    model = net("y = DequantizeLinear(x, s)", {"s": SCALE}, "int32[N,3] x", "float y")
    agrees(model, {"x": np.array([[1, -2, 70000]], np.int32)})


@pytest.mark.parametrize(
    ("number", "name"), [(TensorProto.INT4, "int4"), (TensorProto.FLOAT8E4M3FN, "float8_e4m3fn")]
)
def test_a_type_that_torch_lacks_is_named(number: int, name: str) -> None:
    weights = {"s": np.float32(0.1), "w": np.zeros((6, 2), np.int8)}
    proto = net("d = DequantizeLinear(w, s) y = MatMul(x, d)", weights, opset=21).to_proto()
    proto.ir_version = 10
    proto.graph.initializer[1].CopyFrom(helper.make_tensor("w", number, [6, 2], list(range(-6, 6))))
    with pytest.raises(NotApplicableError, match=rf"floats from {name} are not supported, only from uint8"):
        to_torch(proto)


def test_what_stands_for_no_number_is_refused() -> None:
    with pytest.raises(NotApplicableError, match=r"\(QuantizeLinear\).*not supported"):
        to_torch(
            net("y = QuantizeLinear<output_dtype=17>(x, s)", {"s": SCALE}, "float[N] x", "float8e4m3fn y", 21)
        )


def test_dynamic_quantization() -> None:
    body = "q, s, z = DynamicQuantizeLinear(x)"
    model = net(body, {}, "float[N,20] x", "uint8 q, float s, uint8 z")
    for x in (HALVES, np.abs(HALVES) + 1, -np.abs(HALVES) - 1, normal(3, 20)):
        agrees(model, {"x": x})


def test_products_of_integers() -> None:
    a, b = integers(0, 255, 2, 3, 5), integers(0, 255, 5, 4)
    body = "y = MatMulInteger(x, b, az, bz)"
    for zeros in ({"az": np.uint8(7), "bz": np.uint8(100)}, {"az": np.uint8(7), "bz": integers(0, 255, 4)}):
        agrees(net(body, {"b": b, **zeros}, "uint8[N,3,5] x", "int32 y"), {"x": a})
    agrees(net("y = MatMulInteger(x, b)", {"b": b}, "uint8[N,3,5] x", "int32 y"), {"x": a})


def test_products_of_quantised_matrices() -> None:
    weights = {"xs": SCALE, "xz": np.uint8(7), "b": integers(0, 255, 5, 4), "bs": SCALE, "bz": np.uint8(100),
               "ys": np.float32(0.7), "yz": np.uint8(120)}  # fmt: skip
    body = "y = QLinearMatMul(x, xs, xz, b, bs, bz, ys, yz)"
    agrees(net(body, weights, "uint8[N,3,5] x", "uint8 y"), {"x": integers(0, 255, 2, 3, 5)})


CONV = "strides=[2,1], pads=[1,0,1,2], dilations=[1,2]"


def test_convolutions_of_integers() -> None:
    x = integers(0, 255, 2, 3, 7, 8)
    for attributes in (CONV, 'auto_pad="SAME_UPPER", strides=[2,2]'):
        weights = {"w": integers(0, 255, 4, 3, 3, 2), "xz": np.uint8(90), "wz": np.uint8(100)}
        model = net(f"y = ConvInteger<{attributes}>(x, w, xz, wz)", weights, "uint8[N,3,7,8] x", "int32 y")
        agrees(model, {"x": x})


def test_convolutions_of_quantised_tensors() -> None:
    weights = {
        "xs": SCALE,
        "xz": np.uint8(90),
        # Seven bits: on processors without VNNI ONNX Runtime's kernel saturates the sum of two products.
        "w": integers(-64, 63, 4, 3, 3, 2, dtype=np.int8),
        "ws": np.abs(normal(4)) / 50,
        "wz": np.zeros(4, np.int8),
        "ys": np.float32(0.2),
        "yz": np.uint8(120),
        "b": integers(-3000, 3000, 4, dtype=np.int32),
    }
    body = f"y = QLinearConv<{CONV}>(x, {', '.join(weights)})"
    agrees(net(body, weights, "uint8[N,3,7,8] x", "uint8 y"), {"x": integers(0, 255, 2, 3, 7, 8)})


def test_the_rest_of_a_quantised_network_trains() -> None:
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)"
    weights = {"s": SCALE, "z": np.uint8(128), "w": normal(6, 4)}
    module = to_torch(net(body, weights, "float[N,6] x", "float y"))
    assert [name for name, _ in module.named_parameters()] == ["w"]
    module(torch.randn(3, 6)).sum().backward()
    assert module.w.grad.abs().sum() > 0


# --- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attributes", "last"), [("", 1), ("", 2), ("inverse=1", 2), ("onesided=1", 1)])
def test_fourier_transforms(attributes: str, last: int) -> None:
    for axis, length in ((1, None), (2, None), (1, 8), (2, 3)):
        weights = {} if length is None else {"n": np.int64(length)}
        names = ", ".join(["x", *weights])
        comma = f", {attributes}" if attributes else ""
        agrees_on(f"y = DFT<axis={axis}{comma}>({names})", weights, (5, 6, last), 17, 1e-4)
        weights["axis"] = np.int64(axis)
        names = ", ".join(["x", "n" if length else "", "axis"])
        agrees_on(f"y = DFT<{attributes or 'inverse=0'}>({names})", weights, (5, 6, last), 20, 1e-4)


def test_a_transform_undone_is_the_signal() -> None:
    body = "f = DFT<axis=1, onesided=1>(x) y = DFT<axis=1, onesided=1, inverse=1>(f)"
    x = torch.randn(3, 8, 1)
    torch.testing.assert_close(to_torch(net(body, {}, "float[N,8,1] x", "float y"))(x), x)


@pytest.mark.parametrize("onesided", [0, 1])
def test_short_time_fourier_transforms(onesided: int) -> None:
    body = f"y = STFT<onesided={onesided}>"
    step, window = {"k": np.int64(3)}, {"w": np.abs(normal(8)), "n": np.int64(8)}
    agrees_on(f"{body}(x, k, w)", {**step, "w": window["w"]}, (20, 1), tolerance=1e-4)
    agrees_on(f"{body}(x, k, , n)", {**step, "n": window["n"]}, (20, 1), tolerance=1e-4)
    agrees_on(f"{body}(x, k, w, n)", {**step, **window}, (20, 1), tolerance=1e-4)
    if not onesided:
        agrees_on(f"{body}(x, k, w)", {**step, "w": window["w"]}, (20, 2), tolerance=1e-4)


@pytest.mark.parametrize("op", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_windows(op: str, periodic: int) -> None:
    body = f"w = {op}<periodic={periodic}>(n) y = Mul(x, w)"
    agrees_on(body, {"n": np.int64(10)}, (10,))
    from_shape = f"n = Shape<start=1>(x) s = Squeeze(n) w = {op}<periodic={periodic}>(s) y = Mul(x, w)"
    agrees_on(from_shape, {}, (10,))


def test_a_window_of_integers_is_refused() -> None:
    with pytest.raises(NotApplicableError, match=r"\(HannWindow\).*no floating-point"):
        to_torch(
            net(
                "w = HannWindow<output_datatype=7>(n) y = Mul(x, w)",
                {"n": np.int64(3)},
                "int64[3] x",
                "int64 y",
            )
        )
