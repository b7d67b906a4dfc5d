"""Numbers and names as people read them."""

from __future__ import annotations

import pytest

from onnxfuse.wording import counted, in_bytes, in_macs, milliseconds, printable, shortened, three_digits


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (286_400, "286 kB"), (2.5e9, "2.5 GB"), (7e15, "7e+03 TB")],
)
def test_sizes(value: float, shown: str) -> None:
    assert in_bytes(value) == shown


def test_numbers() -> None:
    assert [in_macs(value) for value in (None, 160, 71_450, 2_010_000)] == ["?", "160", "71.5 k", "2.01 M"]
    assert [counted(number, "node") for number in (0, 1, 1200)] == ["0 nodes", "1 node", "1,200 nodes"]
    assert counted(2, "batch", "batches") == "2 batches"
    assert (three_digits(0.092834), milliseconds(0.1923)) == ("0.0928", "0.1923 ms")


def test_names() -> None:
    assert printable("a\x1b[31m\nb\u200b") == "a\\x1b[31m\\nb\\u200b"
    assert printable("Schicht 类") == "Schicht 类"
    assert shortened("layer1.conv", 11) == "layer1.conv"
    assert shortened("block.layer1.conv", 11) == "...er1.conv"
    assert len(shortened("\n" * 20, 9)) == 9
