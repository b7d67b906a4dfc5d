"""The memory that a run may take beside the models themselves, and work in parts that fit into it.

What lives at once are the tensors of one batch (in ONNX Runtime and, where they are tapped, beside it), sums
such as Gram matrices, and tensors that wait for their next use. Each has a share of one budget. Batches have
as many rows as their share allows, so memory depends on neither the number of samples nor their size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from onnxfuse.errors import InputError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

MOST = 10**9
"""Bytes of a budget that nobody has set, where enough is free."""

_LEAST = 10**6
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(KB|MB|GB)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take beside the models, and the shares of what takes them.

    Attributes:
        total: all of it.
    """

    total: int = MOST

    @classmethod
    def of(cls, text: str | None) -> Budget:
        """The budget that "512MB" or "1.5GB" says (a GB is 1e9 bytes); None takes a quarter of what is free,
        `MOST` at most.

        The quarter is rounded down to a power of two: a run must not depend on what else the machine does.

        Raises:
            InputError: not such a text, or less than 1 MB.
        """
        if text is None:
            free = free_memory()
            return cls(MOST if free is None or free >= 4 * MOST else max(_rounded(free // 4), _LEAST))
        found = _SIZE.fullmatch(text)
        if found is None:
            raise InputError(f"memory must be a size such as 512MB or 1.5GB, not '{text}'")
        total = round(float(found[1]) * _UNITS[found[2].upper()])
        if total < _LEAST:
            raise InputError(f"memory must be at least 1MB, not {text.strip()}")
        return cls(total)

    @property
    def batch(self) -> int:
        """Bytes of all tensors of a batch together."""
        return self.total // 2

    @property
    def taps(self) -> int:
        """Bytes of the tensors that a run hands out of a batch; those of two batches are there at a time."""
        return self.batch // 2

    @property
    def sums(self) -> int:
        """Bytes of the sums, such as Gram matrices, that one run accumulates."""
        return self.total // 4

    @property
    def spool(self) -> int:
        """Bytes of tensors that wait in memory for their next use."""
        return self.total // 10


def _rounded(number: int) -> int:
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def free_memory() -> int | None:
    """Bytes that this process can still take: what the machine has available, and its control group leaves;
    None where the system doesn't say."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit, used = (
            int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current")
        )
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        found.append(max(limit - used + cached, 0))
    return min(found, default=None)


def in_budget(items: Iterable[T], needs: Callable[[T], Mapping[K, int]], budget: int) -> Iterator[list[T]]:
    """Runs of `items`, in order, each as long as its needs together stay within the budget.

    Args:
        items: what is to be divided.
        needs: bytes by what takes them; what several items of a run need is counted once.
        budget: bytes; an item that needs more by itself is a run by itself.
    """
    run: list[T] = []
    held: dict[K, int] = {}
    for item in items:
        own = needs(item)
        held |= own
        if run and sum(held.values()) > budget:
            yield run
            run, held = [], {**own}
        run.append(item)
    if run:
        yield run
