"""The spool gives back what was put, from memory or from disk, and says clearly when there is no room."""

from __future__ import annotations

import errno
import tempfile
from typing import Any

import numpy as np
import pytest

from onnxfuse.errors import InputError
from onnxfuse.runtime.spool import Spool

ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.arange(12, dtype=np.float64).reshape(3, 4)[:, ::2],
    np.arange(5, dtype=np.float16),
    np.arange(6, dtype=np.int64).reshape(1, 2, 3).transpose(2, 0, 1),
    np.array([True, False, True]),
    np.array(3.5, np.float32),
    np.empty((0, 4), np.float32),
    np.array(["text", "more"], object),
]


@pytest.mark.parametrize("limit", [0, 60, 1 << 20])
def test_gives_back_what_was_put_in_any_order(limit: int) -> None:
    with Spool(limit) as spool:
        for batch, array in enumerate(ARRAYS):
            spool.put("a", batch, array)
            spool.put("b", batch, array[::-1] if array.ndim else array)
        for batch, array in reversed(list(enumerate(ARRAYS))):
            for name, expected in (("b", array[::-1] if array.ndim else array), ("a", array)):
                found = spool.get(name, batch)
                assert found.dtype == expected.dtype
                assert found.shape == expected.shape
                np.testing.assert_array_equal(found, expected)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The temporary files that were opened."""
    opened = []
    real = tempfile.TemporaryFile

    def note(**options: Any) -> Any:
        opened.append(real(**options))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", note)
    return opened


def test_only_what_exceeds_the_limit_goes_to_disk(files: list[Any]) -> None:
    block = np.zeros(100, np.uint8)
    with Spool(250) as spool:
        spool.put("a", 0, block)
        spool.put("a", 1, block)
        assert not files
        spool.put("b", 0, block)
        spool.put("b", 1, block)
        assert [file.seek(0, 2) for file in files] == [200]  # one file for each name


def test_dropping_makes_room_and_forgets(files: list[Any]) -> None:
    block = np.zeros(100, np.uint8)
    with Spool(100) as spool:
        spool.put("a", 0, block)
        spool.put("b", 0, block)
        spool.drop("a")
        spool.drop("b")
        assert files[0].closed
        for name in "ab":
            with pytest.raises(KeyError):
                spool.get(name, 0)
        spool.put("c", 0, block)
        assert len(files) == 1
        spool.drop("never put")


def test_leaving_closes_the_files_even_after_an_error(files: list[Any]) -> None:
    def fail() -> None:
        with Spool(0) as spool:
            spool.put("a", 0, np.ones(3))
            spool.put("b", 0, np.ones(3))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(files) == 2
    assert all(file.closed for file in files)


class Full:
    """A file on a full disk: takes a few bytes, then none."""

    def __init__(self, **_: object) -> None:
        self.room = 5

    def seek(self, *_: int) -> int:
        return 0

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = min(self.room, len(data)), 0
        return taken

    def close(self) -> None:
        pass


def test_a_full_disk_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with Spool(0) as spool, pytest.raises(InputError, match=r"No space left on device; .*TMPDIR") as caught:
        spool.put("a", 0, np.ones(3))
    assert tempfile.gettempdir() in str(caught.value)


def test_no_temporary_file_at_all_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with Spool(0) as spool, pytest.raises(InputError, match="Permission denied"):
        spool.put("a", 0, np.ones(3))


def test_a_short_write_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempfile.TemporaryFile

    class Slow:
        def __init__(self, **options: Any) -> None:
            self.file = real(**options)

        def write(self, data: memoryview) -> int:
            return self.file.write(data[:3])

        def readinto(self, data: memoryview) -> int:
            return self.file.readinto(data[:5])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(tempfile, "TemporaryFile", Slow)
    with Spool(0) as spool:
        spool.put("a", 0, np.arange(9.0))
        spool.put("a", 1, -np.arange(9.0))
        np.testing.assert_array_equal(spool.get("a", 0), np.arange(9.0))
        np.testing.assert_array_equal(spool.get("a", 1), -np.arange(9.0))


def test_a_damaged_file_does_not_hang(files: list[Any]) -> None:
    with Spool(0) as spool:
        spool.put("a", 0, np.arange(9.0))
        files[0].truncate(10)
        with pytest.raises(EOFError):
            spool.get("a", 0)
