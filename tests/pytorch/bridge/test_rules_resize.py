"""Resize, Upsample, GridSample and AffineGrid: numbers from ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from nets import net, normal
from rule_checks import agrees, agrees_on, compiles_and_exports, is_plain, trains_like
from torch import nn

from onnxfuse.errors import NotApplicableError
from onnxfuse.pytorch.bridge.importer import to_torch

SHAPE = (2, 5, 6)
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
INTERPOLATE = "torch.nn.functional.interpolate"


def scales(*numbers: float) -> dict[str, np.ndarray]:
    return {"k": np.array([1, 1, *numbers], np.float32)}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nearest(coordinates: str, rounding: str) -> None:
    settings = f'coordinate_transformation_mode="{coordinates}", nearest_mode="{rounding}"'
    for factors in ((2, 2), (3, 1), (1.5, 0.5), (0.7, 0.6), (0.25, 2.3)):
        agrees_on(f"y = Resize<{settings}>(x, , k)", scales(*factors), SHAPE)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nearest_elements_of_every_ratio(rounding: str) -> None:
    """One pixel of the wrong place is a large error: all ratios of small sizes, scales and sizes."""
    for coordinates in ("asymmetric", "half_pixel"):
        settings = f'coordinate_transformation_mode="{coordinates}", nearest_mode="{rounding}"'
        for before, after in itertools.product((3, 4, 7, 10), (1, 5, 8, 11, 14, 41)):
            feed = {"x": np.arange(before, dtype=np.float32).reshape(1, 1, before)}
            model = net(
                f"y = Resize<{settings}>(x, , , k)",
                {"k": np.array([1, 1, after])},
                "float[1,1,N] x",
                "float y",
            )
            agrees(model, feed)
            ratio = {"k": np.array([1, 1, after / before], np.float32)}
            agrees(net(f"y = Resize<{settings}>(x, , k)", ratio, "float[1,1,N] x", "float y"), feed)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_interpolation(mode: str, coordinates: str) -> None:
    settings = f'mode="{mode}", coordinate_transformation_mode="{coordinates}"'
    for factors in ((2, 2), (3, 1), (1.5, 0.5), (0.7, 0.6), (0.2, 2.3)):
        agrees_on(f"y = Resize<{settings}>(x, , k)", scales(*factors), SHAPE)
    for sizes in ((10, 12), (3, 7), (1, 9), (5, 1)):
        model = net(
            f"y = Resize<{settings}>(x, , , k)",
            {"k": np.array([2, 2, *sizes])},
            "float[2,2,5,6] x",
            "float y",
        )
        agrees(model, {"x": normal(2, *SHAPE)})


@pytest.mark.parametrize(
    "settings",
    [
        "cubic_coeff_a=-0.5",
        "exclude_outside=1",
        'exclude_outside=1, coordinate_transformation_mode="asymmetric"',
        "antialias=1",
        "antialias=1, exclude_outside=1, cubic_coeff_a=-0.5",
        'coordinate_transformation_mode="half_pixel_symmetric"',
    ],
)
def test_finer_points_of_interpolation(settings: str) -> None:
    for mode in ("linear", "cubic"):
        if "exclude" in settings and mode == "linear":
            continue
        for factors in ((2, 3), (0.5, 0.6), (0.3, 1.4)):
            agrees_on(f'y = Resize<mode="{mode}", {settings}>(x, , k)', scales(*factors), SHAPE, opset=19)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_crops(mode: str) -> None:
    body = f"""y = Resize<mode="{mode}", coordinate_transformation_mode="tf_crop_and_resize",
    extrapolation_value=7.0>(x, roi, k)"""
    for start, end in ((0.1, 0.8), (-0.2, 1.3), (0.7, 0.2)):
        roi = np.array([0, 0, start, 0.1, 1, 1, end, 0.9], np.float32)
        agrees_on(body, {"roi": roi, **scales(2, 0.6)}, SHAPE)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_axes_and_aspect_ratio(policy: str) -> None:
    body = f'y = Resize<mode="linear", axes=[3,2], keep_aspect_ratio_policy="{policy}">(x, , , k)'
    agrees_on(body, {"k": np.array([9, 8])}, SHAPE, opset=18)
    agrees_on(
        'y = Resize<mode="linear", axes=[-1]>(x, , k)', {"k": np.array([2], np.float32)}, SHAPE, opset=18
    )


def test_channels_last() -> None:
    model = net(
        'y = Resize<mode="nearest">(x, , , k)', {"k": np.array([2, 10, 12, 3])}, "float[2,5,6,3] x", "float y"
    )
    agrees(model, {"x": normal(2, 5, 6, 3)})


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 5)])
def test_other_ranks(shape: tuple[int, ...]) -> None:
    factors = {"k": np.array([1, 1, *[2, 3, 1.5][: len(shape) - 1]], np.float32)}
    for mode in ("nearest", "linear"):
        agrees_on(f'y = Resize<mode="{mode}">(x, , k)', factors, shape)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ('mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"', (2, 3)),
        ('mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"', (0.5, 1.5)),
        ('mode="nearest", coordinate_transformation_mode="asymmetric"', (2, 1)),
        ('mode="nearest"', (2, 3)),
        ('mode="linear"', (2, 0.5)),
        ('mode="linear", coordinate_transformation_mode="align_corners"', (2, 1.5)),
        ('mode="linear", coordinate_transformation_mode="pytorch_half_pixel"', (2, 1.5)),
        ('mode="cubic"', (2, 0.5)),
    ],
)
def test_what_torch_can_is_a_call_of_interpolate(settings: str, factors: tuple[float, float]) -> None:
    module = agrees_on(f"y = Resize<{settings}>(x, , k)", scales(*factors), SHAPE)
    assert INTERPOLATE in module.code
    assert is_plain(module)
    compiles_and_exports(module, SHAPE)


def test_to_the_size_of_another_tensor() -> None:
    body = """s = Shape<end=2>(x) t = Shape<start=2>(o) k = Concat<axis=0>(s, t)
    y = Resize<mode="{}", {}>(x, , , k)"""
    inputs = "float[N,2,H,W] x, float[N,1,A,B] o"
    model = net(body.format("linear", 'coordinate_transformation_mode="half_pixel"'), {}, inputs, "float y")
    for size in ((5, 6), (10, 7)):
        module = agrees(model, {"x": normal(2, 2, 5, 6), "o": normal(2, 1, *size)})
    assert INTERPOLATE in module.code
    assert is_plain(module)
    asymmetric = 'coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
    model = net(body.format("nearest", asymmetric), {}, inputs, "float y")
    for size in ((5, 6), (10, 12), (10, 7), (14, 41), (3, 2)):
        agrees(model, {"x": normal(2, 2, 5, 6), "o": normal(2, 1, *size)})


def test_sizes_and_scales_that_are_fed() -> None:
    model = net('y = Resize<mode="linear">(x, , , k)', {}, "float[N,2,5,6] x, int64[4] k", "float y")
    agrees(model, {"x": normal(2, *SHAPE), "k": np.array([2, 2, 7, 9])})
    model = net('y = Resize<mode="linear">(x, , k)', {}, "float[N,2,5,6] x, float[4] k", "float y")
    agrees(model, {"x": normal(2, *SHAPE), "k": np.array([1, 1, 2, 0.6], np.float32)})


def test_empty_inputs_count_as_none() -> None:
    empty = {"roi": np.zeros(0, np.float32), "s": np.zeros(0, np.float32), "k": np.array([2, 2, 10, 9])}
    model = net('y = Resize<mode="linear">(x, roi, s, k)', empty, "float[N,2,5,6] x", "float y", 11)
    agrees(model, {"x": normal(2, *SHAPE)})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_as_it_was_in_operator_set_10(mode: str) -> None:
    for factors in ((2, 3), (1.5, 2), (0.7, 0.6), (0.5, 2)):
        agrees_on(f'y = Resize<mode="{mode}">(x, k)', scales(*factors), SHAPE, opset=10)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample(mode: str) -> None:
    for factors in ((2, 3), (1, 4)):
        module = agrees_on(f'y = Upsample<mode="{mode}">(x, k)', scales(*factors), SHAPE, opset=9)
        assert (INTERPOLATE in module.code) == (mode == "nearest")


def test_nearest_of_integers() -> None:
    model = net("y = Resize(x, , k)", scales(2, 1.5), "int32[1,2,5,6] x", "int32 y")
    agrees(model, {"x": np.arange(60, dtype=np.int32).reshape(1, 2, 5, 6)})
    linear = net('y = Resize<mode="linear">(x, , k)', scales(2, 1.5), "int32[1,2,5,6] x", "int32 y")
    with pytest.raises(NotApplicableError, match=r"\(Resize\).*floating point"):
        to_torch(linear)


@pytest.mark.parametrize(
    ("settings", "native"),
    [
        ('mode="linear", coordinate_transformation_mode="asymmetric"', None),
        ('mode="linear"', nn.Upsample(scale_factor=2, mode="bilinear")),
        ('mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
         nn.Upsample(scale_factor=2)),
        ('mode="cubic"', nn.Upsample(scale_factor=2, mode="bicubic")),
    ],
)  # fmt: skip
def test_gradients(settings: str, native: nn.Module | None) -> None:
    module = to_torch(net(f"y = Resize<{settings}>(x, , k)", scales(2, 2), "float[N,2,5,6] x", "float y"))
    if native is not None:
        trains_like(module, native, torch.randn(2, *SHAPE), {})
    else:
        x = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample(mode: str, padding: str, align: int) -> None:
    newer = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    feed = {"x": normal(2, *SHAPE), "g": normal(2, 4, 3, 2, seed=1)}
    for opset, name in ((16, mode), (20, newer)):
        body = f'y = GridSample<mode="{name}", padding_mode="{padding}", align_corners={align}>(x, g)'
        model = net(body, {}, "float[N,2,5,6] x, float[N,4,3,2] g", "float y", opset)
        agrees(model, feed, 1e-4)


def test_grids_in_three_dimensions() -> None:
    feed = {"x": normal(2, 2, 3, 4, 5), "g": normal(2, 4, 3, 2, 3, seed=1)}
    inputs = "float[N,2,3,4,5] x, float[N,4,3,2,3] g"
    agrees(net("y = GridSample(x, g)", {}, inputs, "float y", 20), feed)
    with pytest.raises(NotApplicableError, match=r"\(GridSample\).*two dimensions"):
        to_torch(net('y = GridSample<mode="cubic">(x, g)', {}, inputs, "float y", 20))


@pytest.mark.parametrize("align", [0, 1])
def test_affine_grid(align: int) -> None:
    size = {"k": np.array([2, 3, 4, 5])}
    body = f"y = AffineGrid<align_corners={align}>(x, k)"
    agrees(net(body, size, "float[2,2,3] x", "float y", 20), {"x": normal(2, 2, 3)})
