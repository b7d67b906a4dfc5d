"""Denoising autoencoders of one hidden layer that follow an affine map.

y = W x + b goes through a code of r numbers, z = psi(E x + c) and y' = D z + d, trained on
|D psi(E (x + noise) + c) + d - W x - b|^2 (O'Neill et al. 2021, "Baselines", after Vincent et al. 2008).

Without psi the best code is known: y' is the projection of y on its first r principal components, E = U^T W
and D = U. (It is the reduced-rank regression of y on x, which is exact before the rank is cut.) Training
starts there; with psi = ReLU the code is moved two standard deviations up, so that nearly all of it passes.
Each epoch is judged on rows that no step sees, and the best, the start included, is what is kept: noise and
few rows can make a start worse, but not the result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxfuse.numerics.affine import Affine

RATE = 3e-3
"""Of Adam, under one cosine to zero."""

BATCH = 256
SHIFT = 2.0
"""Standard deviations by which a code is moved up before a ReLU."""

_LEAST_SPREAD = 1e-3  # standard deviation, relative to the largest, up to which numbers are scaled


@dataclass(frozen=True)
class Autoencoder:
    """The two maps, and the error of D psi(E x + c) + d on the rows that judged: at the start and as kept,
    relative to the variance of W x + b."""

    encode: Affine
    decode: Affine
    start: float
    error: float


def fit(
    target: Affine,
    rows: np.ndarray,
    held: np.ndarray,
    *,
    rank: int,
    relu: bool = False,
    epochs: int = 10,
    noise: float = 0.1,
    seed: int = 0,
    key: str = "",
) -> Autoencoder:
    """Train an autoencoder of `rank` hidden units to follow an affine map.

    Args:
        target: W (dy, dx) and b (dy,).
        rows: inputs x to train on, (n, dx) float32.
        held: inputs that judge, (m, dx) float32.
        rank: at most min(dy, dx).
        relu: whether psi is a ReLU, or nothing.
        epochs: over the rows; 0 keeps the start.
        noise: standard deviation of what is added to an input, as a share of that input's own.
        seed, key: of order and noise.
    """
    random = torch.Generator().manual_seed(_seed(seed, key))
    with _one_thread():
        units = _Units.of(target, rows)
        x, judge = units.standard(rows), units.standard(held)
        weight = torch.from_numpy(units.weight).float()
        y, judged = x @ weight.T, judge @ weight.T
        code = _start(units.weight, x, rank, relu)
        kept = units.maps(code, relu)
        variance = (judged - judged.mean(0)).double().square().sum(1).mean().item() or 1.0
        best = start = _loss(code, judge, judged, relu).item() / variance
        trained = [tensor.requires_grad_() for tensor in (code if relu else code[:1] + code[2:])]
        optimizer = torch.optim.Adam(trained, lr=RATE)
        steps = max(epochs * math.ceil(len(x) / BATCH), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        jitter = noise * x.std(0, correction=0)
        for _ in range(epochs):
            for at in torch.randperm(len(x), generator=random).split(BATCH):
                seen = x[at]
                if noise:
                    seen = seen + jitter * torch.randn(seen.shape, generator=random)
                optimizer.zero_grad()
                _loss(code, seen, y[at], relu).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                error = _loss(code, judge, judged, relu).item() / variance
            if error < best:
                best, kept = error, units.maps(code, relu)
    return Autoencoder(*kept, start, best)


_Code = list[Tensor]  # E (r, dx), c (r,), D (dy, r), d (dy,), in standard units


@dataclass(frozen=True)
class _Units:
    """Standard units: inputs of mean 0 and variance 1, outputs of mean 0 and total variance 1.

    Adam takes steps of one size for all weights, so all should be of one size. Inputs that hardly ever move
    have less than variance 1: steps for them would be leaps.
    """

    target: Affine
    center: np.ndarray
    spread: np.ndarray
    size: float

    @classmethod
    def of(cls, target: Affine, rows: np.ndarray) -> _Units:
        center, spread = rows.mean(0, dtype=np.float64), _floored(rows.std(0, dtype=np.float64))
        y = rows @ target.weight.T.astype(np.float32)
        return cls(target, center, spread, math.sqrt(y.var(0).sum()) or 1.0)

    @property
    def weight(self) -> np.ndarray:
        """The map between standard units, which has no bias."""
        return self.target.weight * self.spread / self.size

    def standard(self, rows: np.ndarray) -> Tensor:
        """Inputs in standard units."""
        return torch.from_numpy((rows - self.center.astype(np.float32)) / self.spread.astype(np.float32))

    def maps(self, code: _Code, relu: bool) -> tuple[Affine, Affine]:
        """Both maps in the units of the data; without a ReLU the first needs no bias and has none."""
        encode, shift, decode, bias = (tensor.detach().double().numpy().copy() for tensor in code)
        encode = encode / self.spread
        shift = shift - encode @ self.center
        decode = decode * self.size
        bias = bias * self.size + self.target.weight @ self.center + self.target.bias
        if not relu:
            bias, shift = bias + decode @ shift, np.zeros_like(shift)
        return Affine(encode, shift), Affine(decode, bias)


def _start(weight: np.ndarray, x: Tensor, rank: int, relu: bool) -> _Code:
    """The projection on the first principal components of W x, its code of unit variance."""
    y = x.double().numpy() @ weight.T
    basis = np.linalg.eigh(y.T @ y)[1][:, ::-1][:, :rank]
    spread = _floored((y @ basis).std(0))
    shift = np.full(rank, SHIFT if relu else 0.0)
    decode = basis * spread
    parts = (basis.T @ weight / spread[:, None], shift, decode, -decode @ shift)
    return [torch.from_numpy(part).float() for part in parts]


def _floored(spread: np.ndarray) -> np.ndarray:
    """Standard deviations to divide by: none of them is far below the largest."""
    return np.maximum(spread, _LEAST_SPREAD * spread.max()) if spread.any() else np.ones_like(spread)


def _loss(code: _Code, x: Tensor, y: Tensor, relu: bool) -> Tensor:
    encode, shift, decode, bias = code
    inner = x @ encode.T + shift
    off = (inner.relu() if relu else inner) @ decode.T + bias - y
    return off.square().sum(1).mean()


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7], "little")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The steps are small, and what comes out must not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
