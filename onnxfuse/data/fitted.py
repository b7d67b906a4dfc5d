"""The samples that a model was fitted to, remembered in the model: no later error is measured on them.

What a pass or a training has fitted flatters the result, whoever measures it and whenever. So the output of a
run carries, in its metadata under `KEY`, a digest of every sample that was fitted, in this run or in an
earlier one that its input came from, and for each run the seed, the split and a digest of all its data.
`verify` and `diff` leave these samples out; a later run draws its held-out samples from the others.

A sample's digest is 32 bits of the SHA-256 of its rows, one array after the other by name: the same in an
`.npz`, a folder, a feed or an array, in any order and in any selection, whatever the labels. Rows are
digested as they stream by. A foreign sample is taken for a fitted one about once in a million.

At most `MOST` digests are kept, the smallest ones (a bottom-k sketch: E. Cohen, H. Kaplan, Summarizing data
using bottom-k sketches, PODC 2007), and `below`, under which all are known. Of data larger than that, samples
whose digest lies below serve to measure, a random part of those that were not fitted; of the others nobody
can tell.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.data.batch_axes import batch_axes

if TYPE_CHECKING:
    from onnxfuse.findings import Json
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.ir.shapes import TensorInfo

KEY = "onnxfuse.fitted"
MOST = 4096
"""Digests that are kept: 22 kB of text."""

_ALL = 1 << 32
_DTYPE = np.dtype("<u4")
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
    binascii.Error,
)
"""What a record that somebody has changed may raise."""


def sample_digests(feed: Feed, inputs: Sequence[TensorInfo]) -> list[bytes]:
    """A digest of each sample of a feed, 32 bytes, the same wherever the sample comes from.

    Args:
        feed: a batch.
        inputs: of the model, whose declared shapes say where the rows of an array are.
    """
    axes = dict(sorted(batch_axes(inputs).items()))
    arrays = [np.moveaxis(feed[name], axis, 0) for name, axis in axes.items() if axis is not None]
    if not arrays:
        return [hashlib.sha256(b"".join(_content(feed[name]) for name in axes)).digest()]
    return [
        hashlib.sha256(b"".join(_content(np.asarray(array[row], array.dtype)) for array in arrays)).digest()
        for row in range(len(arrays[0]))
    ]


def _content(array: np.ndarray) -> bytes:
    return repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()


def _short(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digest[:4] for digest in digests), _DTYPE)


@dataclass(frozen=True)
class Fitted:
    """The samples that a model was fitted to.

    Attributes:
        digests: of the samples, ascending: uint32 (n,).
        below: all digests of fitted samples under this number are among them.
        runs: one entry for each run that has fitted some.
        lost: whether the model says that there were some and no longer which.
    """

    digests: np.ndarray = field(default_factory=lambda: np.empty(0, _DTYPE))
    below: int = _ALL
    runs: tuple[Mapping[str, Json], ...] = ()
    lost: bool = False

    @classmethod
    def of(cls, feeds: Iterable[Feed], inputs: Sequence[TensorInfo]) -> Fitted:
        """All samples of some feeds, for a model of these inputs."""
        found = [_short(sample_digests(feed, inputs)) for feed in feeds]
        return cls(np.unique(np.concatenate(found)) if found else np.empty(0, _DTYPE))._bounded()

    @classmethod
    def read(cls, *models: Model) -> Fitted:
        """The samples that some of the models were fitted to."""
        found = cls()
        for model in models:
            text = model.note(KEY)
            found = found if text is None else found.joined(_parsed(text))
        return found

    def __bool__(self) -> bool:
        return bool(self.lost or len(self.digests))

    def joined(self, other: Fitted) -> Fitted:
        """The samples of both."""
        runs = (*self.runs, *(run for run in other.runs if run not in self.runs))
        below = min(self.below, other.below)
        digests = np.union1d(self.digests, other.digests).astype(_DTYPE)
        return Fitted(digests[digests < below], below, runs, self.lost or other.lost)._bounded()

    def of_run(self, run: Mapping[str, Json]) -> Fitted:
        """The same samples, fitted in the run that the entry is about."""
        return Fitted(self.digests, self.below, (*self.runs, run), self.lost)

    def note(self, model: Model) -> None:
        """Write it into a model's metadata."""
        record = {
            "below": self.below,
            "digests": None if self.lost else base64.b64encode(self.digests.tobytes()).decode(),
            "runs": list(self.runs),
        }
        model.set_note(KEY, json.dumps(record, separators=(",", ":")))

    def fresh(self, feeds: Iterable[Feed], units: Sequence[int], inputs: Sequence[TensorInfo]) -> np.ndarray:
        """Whether each unit was not fitted, as far as can be told: bool (units,).

        Args:
            feeds: of all units, in order.
            units: how many each feed has: rows, or one that is the whole.
            inputs: of the model.
        """
        known, hit = [], []
        for feed, count in zip(feeds, units, strict=True):
            digests = _short(sample_digests(feed, inputs))
            parts = digests[None] if count == 1 else digests[:, None]
            known.append((parts < self.below).any(axis=1))
            hit.append(np.isin(parts, self.digests).any(axis=1))
        fitted = np.concatenate(hit)
        return np.concatenate(known) & ~fitted if fitted.any() else np.ones(len(fitted), bool)

    def _bounded(self) -> Fitted:
        if len(self.digests) <= MOST:
            return self
        return Fitted(self.digests[:MOST], int(self.digests[MOST]), self.runs, self.lost)


def data_digest(feeds: Iterable[Feed], inputs: Sequence[TensorInfo]) -> str:
    """A digest of some samples in whatever order: 16 hexadecimal digits, the sum of 64 bits of each.

    Args:
        feeds: have the samples.
        inputs: of the model.
    """
    total = sum(
        int.from_bytes(digest[:8], "little") for feed in feeds for digest in sample_digests(feed, inputs)
    )
    return f"{total % (1 << 64):016x}"


def _parsed(text: str) -> Fitted:
    """The record as `Fitted.note` wrote it; `lost` where somebody has changed it."""
    runs: tuple[Mapping[str, Json], ...] = ()
    try:
        record = json.loads(text)
        runs = tuple(dict(run) for run in record["runs"])
        digests = np.frombuffer(base64.b64decode(record["digests"], validate=True), _DTYPE)
        return Fitted(np.unique(digests), int(record["below"]), runs)
    except _DAMAGE:
        return Fitted(runs=runs, lost=True)
