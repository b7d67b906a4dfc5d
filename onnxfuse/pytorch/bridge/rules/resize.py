"""Resize, Upsample, and sampling by grids.

torch's `interpolate` where it computes just what the node asks for. For all else, each axis in turn becomes a
weighted sum of gathered neighbors, as ONNX defines it, with coordinates in float32 as ONNX Runtime has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call

_HALF_WAY = 1e-6
_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


@rule("Upsample")
def upsample(call: Call) -> fx.Node:
    scales = call.attr("scales") or call.sizes(1)
    return _resize(call, scales, None, {"mode": call.attr("mode", "nearest"), **_FIRST})


# Upsample, and Resize as it was in operator set 10: ONNX Runtime rounds up where an axis shrinks.
_FIRST = {"coordinates": "asymmetric", "nearest": "simple"}


@rule("Resize")
def resize_rule(call: Call) -> fx.Node:
    mode = call.attr("mode", "nearest")
    if call.opset < 11:
        return _resize(call, call.sizes(1), None, {"mode": mode, **_FIRST})
    how = {
        "mode": mode,
        "coordinates": call.attr("coordinate_transformation_mode", "half_pixel"),
        "nearest": call.attr("nearest_mode", "round_prefer_floor"),
        "cubic": call.attr("cubic_coeff_a", -0.75),
        "exclude_outside": bool(call.attr("exclude_outside", 0)),
        "antialias": bool(call.attr("antialias", 0)),
        "policy": call.attr("keep_aspect_ratio_policy", "stretch"),
    }
    if how["coordinates"] == "tf_crop_and_resize":
        how |= {"roi": call.sizes(1), "extrapolation": call.attr("extrapolation_value", 0.0)}
    scales = call.sizes(2) if call.has(2) else []
    if scales != []:
        return _resize(call, scales, None, how)
    return _resize(call, None, call.sizes(3), how)


def _resize(call: Call, scales: Any, sizes: Any, how: dict[str, Any]) -> fx.Node:
    """interpolate if that is the same, else `resize`."""
    x, rank, axes = call.tensor(0), call.rank(0), call.attr("axes")
    dtype = call.dtype(0)
    floats = dtype is None or dtype.is_floating_point
    if how["mode"] != "nearest" and not floats:
        call.refuse("only floating point is interpolated, but for mode 'nearest'")
    given = scales if sizes is None else sizes
    if rank is None and axes is None and isinstance(given, list):
        rank = len(given)
    if rank is not None and isinstance(given, list) and floats:
        axes = range(rank) if axes is None else [axis % rank for axis in axes]
        by_axis = dict(zip(axes, given, strict=True))
        found = None
        if sizes is None:
            found = _by_scales(by_axis, rank, how)
        elif how.get("policy", "stretch") == "stretch":
            found = _by_sizes(call, by_axis, rank, how)
        if found is not None:
            return call.emit(F.interpolate, x, **found)
        axes = list(axes)
    return call.emit(resize, x, scales, sizes, axes, **how)


def _by_scales(by_axis: dict[int, Any], rank: int, how: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of interpolate for these scales; None if it can't do that."""
    scales = [by_axis.get(axis, 1.0) for axis in range(rank)]
    if not all(isinstance(scale, float | int) for scale in scales) or scales[:2] != [1, 1]:
        return None
    # With others, torch may round the size of the output differently.
    if not all(float(scale).as_integer_ratio()[1] <= 1024 for scale in scales):
        return None
    spatial = [float(scale) for scale in scales[2:]]
    mode = _torch_mode(rank, how, spatial)
    return mode and {"scale_factor": spatial, **mode}


def _by_sizes(call: Call, by_axis: dict[int, Any], rank: int, how: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of interpolate for these sizes; None if it can't do that."""
    now = [call.scope.size(call.tensor(0), axis) for axis in range(rank)]
    known = call.known_sizes(0) or [None] * rank
    if any(by_axis.get(axis, now[axis]) not in (now[axis], known[axis]) for axis in (0, 1)):
        return None
    sizes = [by_axis.get(axis, now[axis]) for axis in range(2, rank)]
    mode = _torch_mode(rank, how, None)
    if mode and how["coordinates"] == "pytorch_half_pixel" and not _all_beyond_one(sizes):
        return None
    return mode and {"size": sizes, **mode}


def _all_beyond_one(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size > 1 for size in sizes)


def _torch_mode(rank: int, how: dict[str, Any], scales: Sequence[float] | None) -> dict[str, Any] | None:
    """The mode of interpolate that computes the same; None if there is none."""
    mode, coordinates = how["mode"], how["coordinates"]
    if rank not in _MODES or how.get("antialias"):
        return None
    if mode == "nearest":
        # For sizes, torch multiplies by a rounded ratio where ONNX divides: other elements, now and then.
        return None if scales is None else _nearest_mode(coordinates, how["nearest"], scales)
    corners = coordinates == "align_corners"
    # With pytorch_half_pixel a single output is taken from the first input, unlike in PyTorch.
    grows = scales is None or all(scale >= 1 for scale in scales)
    if not (corners or coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and grows)):
        return None
    if mode == "linear":
        return {"mode": _MODES[rank], "align_corners": corners}
    plain = mode == "cubic" and rank == 4 and not how["exclude_outside"]
    if plain and math.isclose(how["cubic"], -0.75):
        return {"mode": "bicubic", "align_corners": corners}
    return None


def _nearest_mode(coordinates: str, rounding: str, scales: Sequence[float]) -> dict[str, Any] | None:
    """torch has two ways of rounding; with some scales, ONNX's others never differ from them."""
    if coordinates == "asymmetric":
        down = rounding == "floor" or (rounding == "simple" and min(scales) >= 1)
        if (down and all(map(_torch_divides, scales))) or (
            rounding == "round_prefer_floor" and set(scales) <= {1.0, 2.0}
        ):
            return {"mode": "nearest"}
    elif coordinates == "half_pixel" and rounding.startswith("round"):
        # Nothing is half-way between two elements then.
        return {"mode": "nearest-exact"} if all(scale.is_integer() for scale in scales) else None
    return None


def _torch_divides(scale: float) -> bool:
    """Whether multiplying by the rounded inverse, as torch does, finds the elements that dividing finds."""
    places = np.arange(16384, dtype=np.float32)
    return np.array_equal(np.floor(places * np.float32(1 / scale)), np.floor(places / np.float32(scale)))


# --- when interpolate won't do -----------------------------------------------------------------------------


def resize(
    x: Tensor,
    scales: Sequence[float] | None,
    sizes: Sequence[int] | None,
    axes: Sequence[int] | None,
    mode: str,
    coordinates: str,
    nearest: str,
    cubic: float = -0.75,
    exclude_outside: bool = False,
    antialias: bool = False,
    policy: str = "stretch",
    roi: Sequence[float] = (),
    extrapolation: float = 0.0,
) -> Tensor:
    """ONNX's Resize, one axis after the other.

    Args:
        scales, sizes: one of them, by axis.
        axes: that they are for; default all.
        roi: starts, then ends, for coordinates "tf_crop_and_resize".
    """
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    if sizes is not None:
        scales = [float(np.float32(size / x.size(axis))) for size, axis in zip(sizes, axes, strict=True)]
        if policy != "stretch":
            common = min(scales) if policy == "not_larger" else max(scales)
            scales = [common] * len(axes)
            sizes = [int(np.float32(common) * np.float32(x.size(axis)) + 0.5) for axis in axes]
    else:
        assert scales is not None
        # In float32, as ONNX Runtime multiplies.
        sizes = [
            int(np.float32(scale) * np.float32(x.size(a))) for scale, a in zip(scales, axes, strict=True)
        ]
    if mode == "nearest" and coordinates == "asymmetric" and nearest == "floor" and _multiple(x, axes, sizes):
        spatial = [
            int(sizes[axes.index(axis)]) if axis in axes else x.size(axis) for axis in range(2, x.dim())
        ]
        return F.interpolate(x, spatial)
    for number, (axis, scale, size) in enumerate(zip(axes, scales, sizes, strict=True)):
        start, end = (roi[number], roi[number + len(axes)]) if roi else (0.0, 1.0)
        if scale == 1 and size == x.size(axis) and (start, end) == (0.0, 1.0):
            continue
        places = _coordinates(coordinates, x.size(axis), size, scale, start, end, x.device)
        if mode == "nearest":
            how = nearest if nearest != "simple" else "floor" if scale >= 1 else "ceil"
            y = x.index_select(axis, _rounded(places, how).clamp(0, x.size(axis) - 1))
        else:
            y = _weighted(x, axis, places, mode, scale if antialias else 1.0, cubic, exclude_outside)
        if coordinates == "tf_crop_and_resize":
            outside = (places < 0) | (places > x.size(axis) - 1)
            y = torch.where(outside.reshape(-1, *[1] * (x.dim() - axis - 1)), extrapolation, y)
        x = y
    return x


def _multiple(x: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether only spatial axes grow, to multiples of their size: interpolate picks the same elements."""
    pairs = list(zip(axes, sizes, strict=True))
    channels = all(size == x.size(axis) for axis, size in pairs if axis < 2)
    return channels and 3 <= x.dim() <= 5 and all(size % x.size(axis) == 0 for axis, size in pairs)


def _coordinates(
    how: str, before: int, after: int, scale: float, start: float, end: float, device: torch.device
) -> Tensor:
    """The places along an axis of `before` elements at which the `after` new ones lie."""
    x = torch.arange(after, dtype=torch.float32, device=device)
    if how == "asymmetric":
        return x / scale
    if how == "align_corners":
        return x * (before - 1) / (after - 1) if after > 1 else x
    if how == "tf_crop_and_resize":
        if after == 1:
            return x + 0.5 * (start + end) * (before - 1)
        return start * (before - 1) + x * ((end - start) * (before - 1) / (after - 1))
    if how == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if how == "pytorch_half_pixel" and after == 1:
        return x
    offset = before / 2 * (1 - after / (scale * before)) if how == "half_pixel_symmetric" else 0.0
    return offset + (x + 0.5) / scale - 0.5


def _rounded(places: Tensor, how: str) -> Tensor:
    """The nearest elements; like ONNX Runtime, with some tolerance of what is half-way."""
    if how == "floor":
        found = places.floor()
    elif how == "ceil":
        found = places.ceil()
    elif how == "round_prefer_ceil":
        found = (places.double() + (0.5 + _HALF_WAY)).floor()
    else:
        found = (places.double() - (0.5 + _HALF_WAY)).ceil()
    return found.long()


def _weighted(
    x: Tensor, axis: int, places: Tensor, mode: str, scale: float, a: float, exclude_outside: bool
) -> Tensor:
    """The sum of neighbors along an axis by their distances; the filter is wider where `scale` shrinks."""
    scale = min(scale, 1.0)
    reach = math.ceil((2 if mode == "cubic" else 1) / scale)
    neighbors = places.floor()[:, None] + torch.arange(1 - reach, reach + 1, device=x.device)
    distances = ((neighbors - places[:, None]) * scale).abs()
    weights = _cubic(distances, a) if mode == "cubic" else (1 - distances).clamp(min=0)
    last = x.size(axis) - 1
    if exclude_outside:
        weights = weights * ((neighbors >= 0) & (neighbors <= last))
    weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype)
    indices = neighbors.long().clamp(0, last)
    shape = [-1] + [1] * (x.dim() - axis - 1)
    parts = [
        x.index_select(axis, indices[:, tap]) * weights[:, tap].reshape(shape)
        for tap in range(indices.size(1))
    ]
    return torch.stack(parts).sum(0)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic filter."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


# --- grids -------------------------------------------------------------------------------------------------

_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


@rule("GridSample")
def grid_sample(call: Call) -> fx.Node:
    mode = call.attr("mode", "linear" if call.opset >= 20 else "bilinear")
    mode = _GRID_MODES.get(mode, mode)
    if mode == "bicubic" and call.rank(0) != 4:
        call.refuse("torch samples cubically in two dimensions only")
    return call.emit(
        F.grid_sample, call.tensor(0), call.tensor(1), mode, call.attr("padding_mode", "zeros"),
        bool(call.attr("align_corners", 0)),
    )  # fmt: skip


@rule("AffineGrid")
def affine_grid(call: Call) -> fx.Node:
    return call.emit(F.affine_grid, call.tensor(0), call.sizes(1), bool(call.attr("align_corners", 0)))
