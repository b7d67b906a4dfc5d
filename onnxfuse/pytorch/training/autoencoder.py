"""Denoising autoencoders of one hidden layer that stand for a linear operator.

y = W x + b goes through a code of r numbers, z = psi(E x + c) and y' = D z + d. What counts is what the
network's own activation g makes of it (O'Neill et al. 2021, "Compression Without Retraining": autoencoders
"use the same activation functions for reconstruction as the original architecture"), so trained is

    |g(D psi(E (x + noise) + c) + d + s) - g(t)|^2

(noise after Vincent et al. 2008), with x and s, the other operand of a sum where y is a branch of one, as the
network computes them whose earlier layers are replaced already, and t what the original computes: their
"student rollout". Without an activation behind g is the identity.

Training starts at the first r principal components U of S W x, E = U^T S W, with D and d the regression of
t - s on the code. S is diagonal: an output's error counts as much as g lets pass, by the root mean square of
g' at the targets. With psi = ReLU the code is moved two standard deviations up, so that nearly all of it
passes. Each epoch is judged on rows that no step sees, and the best, the start included, is what is kept:
noise and few rows can make a start worse, but not the result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from onnxfuse.fitting.paired_rows import PairedRows
from onnxfuse.ir.model import Model
from onnxfuse.numerics.affine import Affine
from onnxfuse.pytorch.bridge.importer import to_torch

RATE = 3e-3
"""Of Adam, under one cosine to zero."""

BATCH = 256
SHIFT = 2.0
"""Standard deviations by which a code is moved up before a ReLU."""

_LEAST_SPREAD = 1e-3  # standard deviation, relative to the largest, up to which numbers are scaled


Activation = Callable[[Tensor], Tensor]


def through(model: Model, ends: tuple[str, str] | None) -> Activation | None:
    """What a model makes of rows of one tensor element by element, as a function of torch tensors.

    Args:
        model: with the nodes between.
        ends: names of the tensor and of what becomes of it; None gives None.
    """
    if ends is None:
        return None
    first, last = ends
    return to_torch(Model.load(model.extract([first], [last])), trainable=lambda weight: False)


@dataclass(frozen=True)
class Autoencoder:
    """The two maps, and the error of g(D psi(E x + c) + d + s) on the rows that judged: at the start and as
    kept, relative to the variance of g(t)."""

    encode: Affine
    decode: Affine
    start: float
    error: float


def fit(
    weight: np.ndarray,
    rows: PairedRows,
    held: PairedRows,
    *,
    rank: int,
    relu: bool = False,
    through: Activation | None = None,
    epochs: int = 10,
    noise: float = 0.1,
    seed: int = 0,
    key: str = "",
) -> Autoencoder:
    """Train an autoencoder of `rank` hidden units in the place of an affine map.

    Args:
        weight: W (dy, dx) of the map, whose output's principal components are the start.
        rows: to train on.
        held: that judge.
        rank: at most min(dy, dx).
        relu: whether psi is a ReLU, or nothing.
        through: g, element by element; None is the identity.
        epochs: over the rows; 0 keeps the start.
        noise: standard deviation of what is added to an input, as a share of that input's own.
        seed, key: of order and noise.
    """
    random = torch.Generator().manual_seed(_seed(seed, key))
    with _one_thread():
        units = _Units.of(weight, rows)
        seen, judged = (_Seen.of(part, units, relu, through) for part in (rows, held))
        code = _start(units, seen, rows, rank)
        kept = units.maps(code, relu)
        best = start = judged.loss(code) / judged.variance
        trained = [tensor.requires_grad_() for tensor in (code if relu else code[:1] + code[2:])]
        optimizer = torch.optim.Adam(trained, lr=RATE)
        steps = max(epochs * math.ceil(len(seen.x) / BATCH), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        jitter = noise * seen.x.std(0, correction=0)
        for _ in range(epochs):
            for at in torch.randperm(len(seen.x), generator=random).split(BATCH):
                part = seen.take(at)
                if noise:
                    part = replace(part, x=part.x + jitter * torch.randn(part.x.shape, generator=random))
                optimizer.zero_grad()
                (part.squares(code) / seen.variance).backward()
                optimizer.step()
                schedule.step()
            error = judged.loss(code) / judged.variance
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

    map: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    middle: np.ndarray
    size: float

    @classmethod
    def of(cls, weight: np.ndarray, rows: PairedRows) -> _Units:
        center, spread = rows.x.mean(0, dtype=np.float64), _floored(rows.x.std(0, dtype=np.float64))
        y = rows.target - rows.rest
        return cls(weight, center, spread, y.mean(0, dtype=np.float64), math.sqrt(y.var(0).sum()) or 1.0)

    @property
    def weight(self) -> np.ndarray:
        """The map between standard units, which has no bias."""
        return self.map * self.spread / self.size

    def standard(self, rows: np.ndarray) -> Tensor:
        """Inputs in standard units."""
        return torch.from_numpy((rows - self.center.astype(np.float32)) / self.spread.astype(np.float32))

    def output(self, y: Tensor) -> Tensor:
        """Outputs in the units of the data."""
        return y * self.size + torch.from_numpy(self.middle).float()

    def maps(self, code: _Code, relu: bool) -> tuple[Affine, Affine]:
        """Both maps in the units of the data; without a ReLU the first needs no bias and has none."""
        encode, shift, decode, bias = (tensor.detach().double().numpy().copy() for tensor in code)
        encode = encode / self.spread
        shift = shift - encode @ self.center
        decode = decode * self.size
        bias = bias * self.size + self.middle
        if not relu:
            bias, shift = bias + decode @ shift, np.zeros_like(shift)
        return Affine(encode, shift), Affine(decode, bias)


@dataclass(frozen=True)
class _Seen:
    """Rows as tensors: inputs in standard units, the rest and g(t) in those of the data."""

    x: Tensor
    rest: Tensor | None
    target: Tensor
    units: _Units
    relu: bool
    through: Activation | None

    @classmethod
    def of(cls, rows: PairedRows, units: _Units, relu: bool, through: Activation | None) -> _Seen:
        target = torch.from_numpy(rows.target)
        rest = torch.from_numpy(rows.rest) if isinstance(rows.rest, np.ndarray) else None
        with torch.no_grad():
            behind = target if through is None else through(target)
        return cls(units.standard(rows.x), rest, behind, units, relu, through)

    @property
    def variance(self) -> float:
        """The variance of g(t), summed over its features."""
        mean = self.target.mean(0)
        return (self.target - mean).double().square().sum(1).mean().item() or 1.0

    def take(self, at: Tensor) -> _Seen:
        """These rows alone."""
        rest = None if self.rest is None else self.rest[at]
        return replace(self, x=self.x[at], rest=rest, target=self.target[at])

    def code(self, encode: Tensor, shift: Tensor) -> Tensor:
        """z of all rows (n, r)."""
        inner = self.x @ encode.T + shift
        return inner.relu() if self.relu else inner

    def squares(self, code: _Code) -> Tensor:
        """The mean squared error, summed over the features."""
        encode, shift, decode, bias = code
        y = self.units.output(self.code(encode, shift) @ decode.T + bias)
        if self.rest is not None:
            y = y + self.rest
        return ((y if self.through is None else self.through(y)) - self.target).square().sum(1).mean()

    @torch.no_grad()
    def loss(self, code: _Code) -> float:
        return self.squares(code).item()


def _start(units: _Units, seen: _Seen, rows: PairedRows, rank: int) -> _Code:
    """The projection on the first principal components of what passes of W x, its code of unit variance, and
    the regression of the output on that code."""
    weight = units.weight * _passed(rows.target, seen.through)[:, None]
    y = seen.x.double().numpy() @ weight.T
    basis = np.linalg.eigh(y.T @ y)[1][:, ::-1][:, :rank]
    spread = _floored((y @ basis).std(0))
    encode = torch.from_numpy(basis.T @ weight / spread[:, None]).float()
    shift = torch.full((rank,), SHIFT if seen.relu else 0.0)
    wanted = (rows.target.astype(np.float64) - rows.rest - units.middle) / units.size
    code = np.column_stack([seen.code(encode, shift).double().numpy(), np.ones(len(wanted))])
    solved = np.linalg.lstsq(code, wanted, rcond=None)[0].T
    decode, bias = (torch.from_numpy(part.copy()).float() for part in (solved[:, :rank], solved[:, rank]))
    return [encode, shift, decode, bias]


def _passed(target: np.ndarray, through: Activation | None) -> np.ndarray:
    """The root mean square (dy,) of g' at the targets (n, dy)."""
    if through is None:
        return np.ones(target.shape[1])
    at = torch.from_numpy(target).requires_grad_()
    (slope,) = torch.autograd.grad(through(at).sum(), at)
    return _floored(slope.double().square().mean(0).sqrt().numpy())


def _floored(spread: np.ndarray) -> np.ndarray:
    """Standard deviations to divide by: none of them is far below the largest."""
    return np.maximum(spread, _LEAST_SPREAD * spread.max()) if spread.any() else np.ones_like(spread)


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
