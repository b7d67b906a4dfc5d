"""The labels of some samples, and whether they are what a loss against them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from onnxfuse.data.sample_checks import is_one_hot
from onnxfuse.errors import InputError
from onnxfuse.pytorch.training.sampling import Pool


class Labels:
    """The labels of some samples.

    Attributes:
        name: what messages call their array.
        sample: those of one batch; None where there are none.
    """

    def __init__(self, name: str, sample: np.ndarray | None, pools: Sequence[Pool]) -> None:
        """
        Args:
            name: what messages call their array.
            sample: those of one batch; None where there are none.
            pools: whose labels are to be checked.
        """
        self.name, self.sample = name, sample
        self._pools = pools

    @property
    def numeric(self) -> bool:
        """Whether they are floating-point: values to be met, not classes."""
        return self.sample is not None and self.sample.dtype.kind == "f"

    @property
    def integral(self) -> bool:
        """Whether they may be class numbers by their type."""
        return self.sample is not None and self.sample.dtype.kind in "iub"

    @property
    def one_hot(self) -> str | None:
        """The reason why they are no class numbers, where they are a 1 for the class among zeros."""
        for axis in (-1, 1):
            if self.sample is not None and is_one_hot(self.sample, axis):
                return (
                    f"{self.name} is one-hot: --loss ce wants class numbers, as labels.argmax({axis}) gives"
                )
        return None

    def wanted(self, kind: str) -> np.ndarray:
        """Those of one batch.

        Raises:
            InputError: there are none, which a loss of that kind needs.
        """
        if self.sample is None:
            raise InputError(f"--loss {kind} needs labels: give them as an array 'labels' in the data")
        return self.sample

    def fit_classes(self, output: np.ndarray, axis: int) -> bool:
        """Whether an output has several classes on that axis, and there is a label for each place that holds
        their scores."""
        places = [size for at, size in enumerate(output.shape) if at != axis]
        return output.shape[axis] > 1 and self.fit_shape(places)

    def fit_shape(self, shape: Sequence[int]) -> bool:
        """Whether they are of that shape, axes of size 1 aside."""
        return self.sample is not None and _squeezed(self.sample.shape) == _squeezed(shape)

    def why_no_classes(self) -> str:
        """The reason why floating-point labels are no class numbers, by the first that shows it."""
        if self.one_hot is not None:
            return self.one_hot
        advice = "--loss ce wants class numbers as integers, --loss mse takes floats"
        for place, labels in self._all():
            odd = np.argwhere(labels != np.floor(labels))
            if len(odd):
                value = labels[tuple(odd[0])]
                return f"{self.name} holds {value:g} in {place(int(odd[0][0]))}: {advice}"
        assert self.sample is not None
        return f"{self.name} is {self.sample.dtype}: {advice}; convert it with .astype('int64')"

    def check_classes(self, output: str, classes: int) -> None:
        """Check that all are class numbers of an output.

        Raises:
            InputError: one is not; says which.
        """
        for place, labels in self._all():
            bad = np.argwhere((labels < 0) | (labels >= classes))
            if len(bad):
                value = labels[tuple(bad[0])]
                raise InputError(
                    f"{self.name} holds {value} in {place(int(bad[0][0]))}, "
                    f"output '{output}' has the classes 0 to {classes - 1}"
                )

    def _all(self) -> Iterator[tuple[Callable[[int], str], np.ndarray]]:
        """All of them, array by array, and what messages call the rows of each."""
        for pool in self._pools:
            for start, labels in pool.labels():
                yield partial(pool.where, start), labels


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
