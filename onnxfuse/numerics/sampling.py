"""Rows of a network's tensors at sampled positions: which ones, and the patches and channel vectors there.

A convolution is a dense operator on patches. Only the patches at sampled output positions are gathered: a
full patch Gram for one 3x3 layer with 64 channels costs as much as a whole small network, and a few positions
per sample say nearly as much, because neighboring patches repeat each other.

Equal seeds and keys give equal rows (`RowSampler`), which is how the error that a pass predicted can be
measured by someone else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RowSampler:
    """Sampled rows of one tensor, batch by batch.

    Attributes:
        seed: of the draws.
        key: what tells this tensor's draws from those of others, usually its name.
        mask: name of a graph input that is 0 where a row is padding, None without one. It counts only where
            its shape is that of the rows: (N, *spatial).
    """

    seed: int
    key: str
    mask: str | None = None

    def sample(
        self, batch: int, shape: Sequence[int], count: int | None, feed: Mapping[str, npt.NDArray[Any]]
    ) -> SampledRows:
        """The sampled rows of one batch.

        Args:
            batch: the batch's number: others have other positions.
            shape: (N, *spatial), the tensor's shape without its channels.
            count: positions in each sample, None for all of them.
            feed: the graph's inputs, of which `mask` is one.
        """
        samples, *spatial = shape
        positions = sample_positions(self.seed, self.key, batch, samples, prod(spatial), count)
        mask = None if self.mask is None else feed[self.mask]
        if mask is None or mask.shape != tuple(shape):
            return SampledRows(positions, None)
        return SampledRows(positions, gather(mask[..., None], positions, -1)[:, 0] != 0)


@dataclass(frozen=True)
class SampledRows:
    """Positions (N, P) in the samples of one batch, None for all of them; and which of the N * P rows are
    there, False for padding, None where all are."""

    positions: npt.NDArray[np.int64] | None
    present: npt.NDArray[np.bool_] | None

    @property
    def weights(self) -> npt.NDArray[np.float64] | None:
        """Weights of the rows for `Moments.add`: 1, and 0 for padding; None where all are 1."""
        return None if self.present is None else self.present.astype(np.float64)

    def vectors(self, y: npt.NDArray[Any], channel_axis: int = 1) -> npt.NDArray[Any]:
        """Channel vectors of y at the positions, padding included; see `gather`."""
        return gather(y, self.positions, channel_axis)

    def without_padding(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Those of all rows (N * P, ...) that are there."""
        return rows if self.present is None else rows[self.present]


def row_shape(shape: Sequence[int], channel_axis: int) -> tuple[int, ...]:
    """(N, *spatial): a tensor's shape without its channels."""
    axis = channel_axis % len(shape)
    return (*shape[:axis], *shape[axis + 1 :])


def per_sample(rows: int, samples: int) -> int:
    """Positions in each of `samples` samples that make at least `rows` rows together."""
    return -(-rows // samples)


def sample_positions(
    seed: int, key: str, batch: int, samples: int, size: int, count: int | None
) -> npt.NDArray[np.int64] | None:
    """Positions to look at in each sample: (samples, count), sorted and distinct; None for all.

    The positions depend on nothing but the arguments, so two runs over the same batches see the same ones.
    They are stratified: one per equal stretch, the stretches turned by a random amount per sample. Every
    position has the same chance, and the spread beats independent draws.

    Args:
        seed, key, batch: what tells these draws from others.
        samples: in the batch.
        size: the number of positions there are in a sample.
        count: how many to draw, None for all of them.

    Raises:
        ValueError: a count below 1.
    """
    if count is None or count >= size:
        return None
    if count < 1:
        raise ValueError("at least one position per sample is needed")
    digest = hashlib.sha256(f"{seed}\0{key}\0{batch}".encode()).digest()
    random = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    edges = np.arange(count + 1) * size // count
    inside = (random.random((samples, count)) * np.diff(edges)).astype(np.int64)
    turned = (edges[:-1] + inside + random.integers(size, size=(samples, 1))) % size
    return np.sort(turned, axis=1)


def output_size(
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> tuple[int, ...]:
    """Spatial size of a Conv's output.

    Args:
        spatial: size of its input.
        kernel, strides, dilations: one per spatial axis.
        pads: as in ONNX, all begins and then all ends; negative ones crop.

    Raises:
        ValueError: numbers that don't fit one another, or a kernel that doesn't fit the input.
    """
    axes = len(spatial)
    if not len(kernel) == len(strides) == len(dilations) == axes or len(pads) != 2 * axes:
        raise ValueError(f"geometry doesn't fit {axes} spatial axes")
    sizes = tuple(
        (size + begin + end - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, dilation, begin, end in zip(
            spatial, kernel, strides, dilations, pads[:axes], pads[axes:], strict=True
        )
    )
    if min(sizes, default=1) < 1:
        raise ValueError(f"kernel {tuple(kernel)} doesn't fit into {tuple(spatial)} with pads {tuple(pads)}")
    return sizes


def patches(
    x: npt.NDArray[Any],
    positions: npt.NDArray[np.int64] | None,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> npt.NDArray[Any]:
    """The zero-padded patches that a Conv sees at some of its output positions.

    Args:
        x: (N, C, *spatial), one to three spatial axes (or any number).
        positions: flat (C-ordered) output positions per sample, (N, P); None for all of them.
        kernel, strides, dilations: one per spatial axis.
        pads: all begins, then all ends, as in ONNX.

    Returns:
        (N * P, C * prod(kernel)), samples outermost, of x's type; columns in the order of an ONNX Conv weight
        (channel, then kernel), so that patches @ W.reshape(M, -1).T is the convolution. Group g of a grouped
        Conv sees the g-th of `groups` equal runs of columns, as `Moments` has it.
    """
    samples, channels, *spatial = x.shape
    sizes = output_size(spatial, kernel, strides, dilations, pads)
    if positions is None:
        positions = np.broadcast_to(np.arange(prod(sizes)), (samples, prod(sizes)))
    rows, taps = positions.size, prod(kernel)
    index = np.zeros((rows, 1), dtype=np.intp)
    outside = np.zeros((rows, 1), dtype=bool)
    for axis, at in enumerate(np.unravel_index(positions.ravel(), sizes)):
        steps = np.arange(kernel[axis]) * dilations[axis] - pads[axis]
        where = at[:, None] * strides[axis] + steps
        beyond = (where < 0) | (where >= spatial[axis])
        where[beyond] = 0
        index = (index[:, :, None] * spatial[axis] + where[:, None, :]).reshape(rows, -1)
        outside = (outside[:, :, None] | beyond[:, None, :]).reshape(rows, -1)
    sample = np.repeat(np.arange(samples), positions.shape[1])[:, None]
    # Index arrays shared by all channels, and no padded copy of x: only what is asked for is touched.
    found = x.reshape(samples, channels, -1)[sample, :, index]  # (rows, taps, C)
    found[outside] = 0
    return found.swapaxes(1, 2).reshape(rows, channels * taps)


def gather(
    y: npt.NDArray[Any], positions: npt.NDArray[np.int64] | None, channel_axis: int = 1
) -> npt.NDArray[Any]:
    """Channel vectors at some positions: (N * P, C), in the order of `patches`.

    Args:
        y: (N, C, *spatial), or (N, *spatial, C) with channel_axis -1.
        positions: flat positions (N, P), None for all of them.
        channel_axis: 1 or the last.

    Raises:
        ValueError: another channel axis.
    """
    if channel_axis not in (1, -1, y.ndim - 1):
        raise ValueError("channels must be the second axis or the last")
    samples, channels = len(y), y.shape[channel_axis]
    if channel_axis == 1:
        flat = y.reshape(samples, channels, -1)
        found = flat.swapaxes(1, 2) if positions is None else flat[np.arange(samples)[:, None], :, positions]
    else:
        flat = y.reshape(samples, -1, channels)
        found = flat if positions is None else flat[np.arange(samples)[:, None], positions]
    return found.reshape(-1, channels)
