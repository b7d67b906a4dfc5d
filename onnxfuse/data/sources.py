"""Sources of samples, read as a stream.

A source is either *rows* (`row_source`: arrays by input name whose rows are samples; batches are cut from
them) or *feeds* (`feed_source`: one dict of arrays after another, each a batch as it is). Both are addressed
by units, a unit being a row or a feed: `read` gets groups of ascending unit numbers and returns one feed for
each, holding no more than that. `opening` finds the source that a path or an object stands for.

Types, shapes, names and counts are checked when a source is opened, values (NaN, infinity) while it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from onnxfuse.ir.model import Feed

Reading = tuple[Feed, "np.ndarray | None"]
"""A feed, and the labels of its samples if there are any."""


class Source(Protocol):
    """Samples in units (rows or feeds), each unit a number below `count`."""

    name: str
    count: int
    labels: str | None
    batch: int | None  # units that make one batch, where the model or the data dictates it
    exact: bool  # a batch of fewer units can't be run

    def samples(self, units: np.ndarray) -> int:
        """The number of samples in these units."""
        ...

    def read(self, groups: Iterable[np.ndarray]) -> Iterator[Reading]:
        """One feed and its labels for each group of ascending units."""
        ...
