"""Where training runs: the device, and the processes that torchrun has started.

    torchrun --nproc-per-node 4 -m onnxfuse retrain model.onnx --data train.npz

Each process runs the same program and trains on its share; the first one alone judges and writes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import distributed

from onnxfuse.errors import InputError, OnnxfuseError

T = TypeVar("T")
_PATIENCE = datetime.timedelta(hours=2)  # the others wait while the first process verifies


def started() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(wanted: str) -> torch.device:
    """A device of torch: "auto" is a GPU where there is one; under torchrun each process has its own.

    Raises:
        InputError: there is no such device here.
    """
    there = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if there else "cpu") if wanted == "auto" else wanted)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device '{wanted}'; choose from auto, cpu, cuda")
    if device.type == "cpu":
        return device
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    count = torch.cuda.device_count() if there else 0
    if index >= count:
        raise InputError(f"--device {wanted}: torch {torch.__version__} finds {count} CUDA devices here")
    # cuBLAS is deterministic with a workspace of fixed size; read when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", index)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The processes of torchrun as one group of torch.distributed; nothing where there is but one, or where
    the caller has set up a group."""
    if started()[1] == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def processes() -> tuple[int, int]:
    """(rank, number of processes) of the group; (0, 1) without one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def shared(value: T, device: torch.device) -> T:
    """The first process's value, in all of them."""
    if processes()[1] == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, 0, device=device)
    found: T = box[0]
    return found


def on_first(function: Callable[[], T], device: torch.device) -> T:
    """What `function` returns in the first process, the only one to call it.

    Raises:
        OnnxfuseError: what it raised there, in all processes.
    """
    result: tuple[T | None, OnnxfuseError | None] = None, None
    if processes()[0] == 0:
        try:
            result = function(), None
        except OnnxfuseError as error:
            if processes()[1] == 1:
                raise
            result = None, error
    value, failure = shared(result, device)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]
