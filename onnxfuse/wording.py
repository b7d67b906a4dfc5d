"""Numbers and names as people read them, for results, reports and messages alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10


def printable(text: object) -> str:
    """The text with control characters escaped: names come from files, and could drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shortened(text: object, width: int) -> str:
    """The printable text in at most `width` characters; of a long one the end, which tells more."""
    shown = printable(text)
    return shown if len(shown) <= width else f"...{shown[3 - width :]}"


def counted(number: int, what: str, many: str = "") -> str:
    """A number of things: "1 node", "1,200 nodes".

    Args:
        number: how many.
        what: one of them.
        many: a plural that takes more than an s.
    """
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def three_digits(value: float) -> str:
    """A number with three significant digits: "0.0123"."""
    return f"{value:.3g}"


def whole(value: int) -> str:
    """A whole number with all its digits, in groups of three: "1,200"."""
    return f"{value:,}"


def in_bytes(value: float) -> str:
    """A size in memory or on disk, with its decimal unit: "286 kB"."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def in_macs(value: float | None) -> str:
    """A number of multiply-accumulates: "2.01 M"; "?" where it is not known."""
    return "?" if value is None else _scaled(value, ("", "k", "M", "G", "T"))


def milliseconds(value: float) -> str:
    """A time in milliseconds with four digits: two of them have the ratio that is printed beside them."""
    return f"{value:.{max(0, 3 - floor(log10(value)))}f} ms"


def _scaled(value: float, units: Sequence[str]) -> str:
    index = 0
    while value >= 1000 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.0f} {units[index]}".strip() if index == 0 else f"{value:.3g} {units[index]}"
