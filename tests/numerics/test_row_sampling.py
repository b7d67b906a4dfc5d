"""Patches against torch; positions against their promises; sampled rows of a batch against both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from onnxfuse.numerics.affine import Affine
from onnxfuse.numerics.sampling import (
    RowSampler,
    gather,
    output_size,
    patches,
    per_sample,
    row_shape,
    sample_positions,
)


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(11)


GEOMETRIES = [
    # spatial, kernel, strides, dilations, pads, groups
    ((11,), (3,), (1,), (1,), (1, 1), 1),
    ((11,), (4,), (2,), (2,), (0, 3), 2),
    ((7, 9), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1),
    ((8, 8), (2, 4), (2, 3), (1, 1), (0, 2, 1, 1), 1),
    ((9, 8), (3, 2), (2, 1), (2, 3), (3, 0, 1, 2), 2),
    ((6, 5), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0), 4),
    ((8, 9), (3, 3), (1, 2), (1, 1), (-1, 2, 1, -2), 1),
    ((2, 2), (3, 3), (1, 1), (1, 1), (3, 3, 3, 3), 1),
    ((5, 4, 6), (3, 2, 3), (1, 2, 2), (1, 1, 2), (1, 0, 2, 1, 1, 1), 2),
]


def convolve(
    x: np.ndarray, weight: np.ndarray, strides: Any, dilations: Any, pads: Any, groups: int
) -> np.ndarray:
    axes = x.ndim - 2
    both = [amount for axis in reversed(range(axes)) for amount in (pads[axis], pads[axes + axis])]
    padded = torch.nn.functional.pad(torch.from_numpy(x), both)
    function = getattr(torch.nn.functional, f"conv{axes}d")
    result: np.ndarray = function(
        padded, torch.from_numpy(weight), stride=strides, dilation=dilations, groups=groups
    ).numpy()
    return result


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("count", [None, 3])
def test_patches_make_the_convolution(rng: Generator, geometry: tuple[Any, ...], count: int | None) -> None:
    spatial, kernel, strides, dilations, pads, groups = geometry
    x = rng.normal(size=(3, 4, *spatial))
    weight = rng.normal(size=(8, 4 // groups, *kernel))
    expected = convolve(x, weight, strides, dilations, pads, groups)
    size = output_size(spatial, kernel, strides, dilations, pads)
    assert size == expected.shape[2:]
    at = sample_positions(0, "v", 0, 3, int(np.prod(size)), count)
    columns = patches(x, at, kernel=kernel, strides=strides, dilations=dilations, pads=pads)
    affine = Affine(weight.reshape(8, -1), np.zeros(8))
    np.testing.assert_allclose(affine(columns, groups), gather(expected, at), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if len(g[0]) == 2 and min(g[4]) >= 0])
def test_patches_are_unfold(rng: Generator, geometry: tuple[Any, ...]) -> None:
    spatial, kernel, strides, dilations, (top, left, bottom, right), _ = geometry
    x = rng.normal(size=(2, 4, *spatial)).astype(np.float32)
    padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right, top, bottom))
    unfolded = torch.nn.functional.unfold(padded, kernel, dilation=dilations, stride=strides).numpy()
    ours = patches(
        x, None, kernel=kernel, strides=strides, dilations=dilations, pads=(top, left, bottom, right)
    )
    assert ours.dtype == np.float32
    assert np.array_equal(ours, unfolded.transpose(0, 2, 1).reshape(ours.shape))


def test_patches_of_a_transposed_tensor(rng: Generator) -> None:
    last = rng.normal(size=(2, 6, 5, 3))
    x = last.transpose(0, 3, 1, 2)
    geometry: dict[str, Any] = {
        "kernel": (3, 3),
        "strides": (1, 1),
        "dilations": (1, 1),
        "pads": (1, 1, 1, 1),
    }
    assert np.array_equal(patches(x, None, **geometry), patches(x.copy(), None, **geometry))
    assert np.array_equal(gather(x, None), gather(last, None, channel_axis=-1))


def test_patches_do_not_alter_their_source(rng: Generator) -> None:
    x = rng.normal(size=(1, 1, 4))
    before = x.copy()
    patches(x, None, kernel=(1,), strides=(1,), dilations=(1,), pads=(0, 0))[:] = 0
    assert np.array_equal(x, before)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_gather_takes_the_positions(rng: Generator, channel_axis: int) -> None:
    y = rng.normal(size=(2, 3, 4, 5))
    at = np.array([[0, 7, 19], [1, 2, 3]])
    found = gather(y if channel_axis == 1 else np.moveaxis(y, 1, -1), at, channel_axis)
    expected = [y[n, :, p // 5, p % 5] for n in range(2) for p in at[n]]
    assert np.array_equal(found, expected)
    assert np.array_equal(gather(y[:, :, 0, 0], None), y[:, :, 0, 0])
    with pytest.raises(ValueError, match="axis"):
        gather(y, at, 2)


def test_geometry_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="fit into"):
        output_size((3,), (5,), (1,), (1,), (0, 0))
    with pytest.raises(ValueError, match="axes"):
        output_size((3, 3), (1,), (1,), (1,), (0, 0))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40), size=st.integers(1, 200), count=st.integers(1, 60), samples=st.integers(1, 9)
)
def test_positions_are_distinct_sorted_and_repeatable(seed: int, size: int, count: int, samples: int) -> None:
    at = sample_positions(seed, "tensor", 3, samples, size, count)
    if count >= size:
        assert at is None
        return
    assert at is not None
    assert at.shape == (samples, count)
    assert (np.diff(at, axis=1) > 0).all()
    assert at.min() >= 0
    assert at.max() < size
    again = sample_positions(seed, "tensor", 3, samples, size, count)
    assert again is not None
    assert np.array_equal(at, again)


def test_positions_depend_on_seed_key_and_batch() -> None:
    draws = [sample_positions(*k, 50, 100, 5) for k in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert first is not None
            assert second is not None
            assert not np.array_equal(first, second)
    assert sample_positions(0, "a", 0, 50, 100, None) is None
    with pytest.raises(ValueError, match="position"):
        sample_positions(0, "a", 0, 50, 100, 0)


@pytest.mark.parametrize(("size", "count"), [(10, 3), (10, 7), (64, 8)])
def test_every_position_has_the_same_chance(size: int, count: int) -> None:
    at = sample_positions(5, "v", 0, 20000, size, count)
    assert at is not None
    share = np.bincount(at.ravel(), minlength=size) / 20000
    sigma = np.sqrt(count / size * (1 - count / size) / 20000)
    assert np.abs(share - count / size).max() < 5 * sigma


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_rows_are_those_of_the_positions(rng: Generator, channel_axis: int, count: int | None) -> None:
    y = rng.normal(size=(4, 2, 3, 5))
    shape = row_shape(y.shape, channel_axis)
    assert shape == ((4, 3, 5) if channel_axis == 1 else (4, 2, 3))
    rows = RowSampler(7, "v").sample(2, shape, count, {})
    expected = sample_positions(7, "v", 2, 4, int(np.prod(shape[1:])), count)
    assert np.array_equal(rows.positions, expected) if count else rows.positions is expected is None
    assert np.array_equal(rows.vectors(y, channel_axis), gather(y, expected, channel_axis))
    assert rows.present is rows.weights is None
    assert rows.without_padding(y) is y


@pytest.mark.parametrize("count", [None, 4])
def test_rows_of_padding_are_told_apart(rng: Generator, count: int | None) -> None:
    """A mask counts where it isn't zero, whatever number it has there."""
    y, mask = rng.normal(size=(3, 9, 2)), rng.integers(0, 3, (3, 9))
    y[mask == 0] = 1e6
    rows = RowSampler(7, "v", "m").sample(2, (3, 9), count, {"m": mask, "x": y})
    assert rows.present is not None
    assert 0 < rows.present.sum() < len(rows.present) == 3 * (count or 9)
    assert np.array_equal(rows.weights, rows.vectors(y, -1).max(axis=1) < 1e6)
    assert np.array_equal(rows.without_padding(rows.vectors(y, -1)), rows.vectors(y, -1)[rows.present])


def test_a_mask_of_another_shape_is_none_of_these_rows() -> None:
    for shape in ((3, 4), (3,), (9, 3), (3, 9, 1)):
        rows = RowSampler(0, "v", "m").sample(0, (3, 9), 2, {"m": np.zeros(shape)})
        assert rows.present is rows.weights is None


def test_as_many_positions_as_make_the_rows() -> None:
    assert [per_sample(rows, 4) for rows in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
