"""The file that a killed training goes on from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from onnxfuse.errors import InputError
from onnxfuse.pytorch.training.checkpoint import Checkpoint

STATE = {
    "weights": {"a.b": torch.arange(6.0).reshape(2, 3)},
    "history": [{"loss": 0.5, "metric": None}],
    "best": 1,
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx.checkpoint"
    checkpoint = Checkpoint(path, "mine")
    assert checkpoint.load() == (None, None)
    checkpoint.save({**STATE, "best": 0})
    checkpoint.save(STATE)
    state, why = Checkpoint(path, "mine").load()
    assert why is None
    assert state is not None
    assert torch.equal(state["weights"]["a.b"], STATE["weights"]["a.b"])
    assert (state["history"], state["best"]) == (STATE["history"], 1)
    assert list(tmp_path.iterdir()) == [path]
    checkpoint.remove()
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_training_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx.checkpoint"
    Checkpoint(path, "mine").save(STATE)
    state, why = Checkpoint(path, "other").load()
    assert state is None
    assert str(path) in str(why)
    assert "training starts anew" in str(why)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"some notes of the user's"])
def test_files_that_are_none_are_not_overwritten(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no checkpoint of onnxfuse"):
        Checkpoint(path, "mine").load()
    assert path.read_bytes() == content


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "boom"),)

    path = tmp_path / "bomb"
    torch.save({"onnxfuse": "checkpoint", "format": 1, "fingerprint": "mine", "state": Bomb()}, path)
    with pytest.raises(InputError, match="is no checkpoint"):
        Checkpoint(path, "mine").load()
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="is no checkpoint"):
        Checkpoint(path, "mine").load()
    assert not (tmp_path / "boom").exists()


def test_a_failed_write_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.checkpoint"
    checkpoint = Checkpoint(path, "mine")
    checkpoint.save(STATE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write the checkpoint '.*': No space left on device"):
        checkpoint.save({"best": 7})
    assert list(tmp_path.iterdir()) == [path]
    state, _ = checkpoint.load()
    assert state is not None
    assert state["best"] == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its folder does not exist"):
        Checkpoint(tmp_path / "none" / "c", "mine")
    with pytest.raises(InputError, match="is a folder"):
        Checkpoint(tmp_path, "mine")
