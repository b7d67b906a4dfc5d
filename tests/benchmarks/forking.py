"""Work in forked processes that may die or hang: what the process was at is told, another does the rest."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import typer

import onnxfuse
from onnxfuse.pipeline.catalog import passes
from onnxfuse.runtime import latency

Began = Callable[[str], None]
"""To be called with the name of each step before it begins."""

ITEMS_A_PROCESS = 250
WALL = 15  # times the limit of processor time: then a step hangs without using any


def preload() -> None:
    """Import whatever a command may import, and build the command line, so that forked processes need not;
    shorten timings."""
    for module in pkgutil.walk_packages(onnxfuse.__path__, "onnxfuse."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert onnxfuse.to_torch
    assert passes()
    typer.main.get_command = functools.cache(typer.main.get_command)
    latency.BLOCKS = latency.LEAST_BLOCKS = 4
    latency.BLOCK_SECONDS, latency.WARMUP = 0.002, 1


@dataclass(frozen=True)
class Death:
    """Of a process: the step that it was at, and why it is no more."""

    step: str
    reason: str


@dataclass
class _Worker:
    """A forked process, the items that it has yet to do, and what it is at."""

    process: Any
    pipe: Connection
    left: list[Any]
    step: str = "start"
    cpu: float = 0.0
    wall: float = field(default_factory=time.monotonic)

    def began(self, step: str) -> None:
        self.step, self.cpu, self.wall = step, _processor_seconds(self.process.pid), time.monotonic()

    def hangs(self, seconds: float) -> bool:
        """Whether the step takes too much processor time, or so long that it must wait for something."""
        spent = _processor_seconds(self.process.pid) - self.cpu
        return spent > seconds or time.monotonic() - self.wall > WALL * seconds


def forked(
    items: Sequence[Any], work: Callable[[Any, Began], Any], jobs: int, seconds: float
) -> Iterator[tuple[Any, Any]]:
    """Each item with what came of it, as it comes: what `work` returned, or a `Death`.

    Args:
        items: to be worked on.
        work: gets an item and a function that it tells of each step before it begins.
        jobs: processes side by side.
        seconds: processor time that a step may take.
    """
    chunks = [list(items[at : at + ITEMS_A_PROCESS]) for at in range(0, len(items), ITEMS_A_PROCESS)]
    workers: list[_Worker] = []
    while chunks or workers:
        while chunks and len(workers) < jobs:
            workers.append(_started(chunks.pop(0), work))
        ready = set(wait([worker.pipe for worker in workers], timeout=1.0))
        for worker in list(workers):
            death = None
            if worker.pipe in ready:
                try:
                    kind, message = worker.pipe.recv()
                except EOFError:
                    death = _death(worker)
                else:
                    if kind == "step":
                        worker.began(message)
                    else:
                        yield worker.left.pop(0), message
            if death is None and worker.hangs(seconds):
                worker.process.kill()
                worker.process.join()
                death = Death(worker.step, f"takes over {seconds:g} s")
            if death is not None:
                workers.remove(worker)
                if worker.left:
                    yield worker.left.pop(0), death
                if worker.left:
                    chunks.insert(0, worker.left)


def _started(items: list[Any], work: Callable[[Any, Began], Any]) -> _Worker:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_run, args=(items, work, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, list(items))


def _run(items: Sequence[Any], work: Callable[[Any, Began], Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for item in items:
        pipe.send(("result", work(item, lambda step: pipe.send(("step", step)))))
    sys.stdout.flush()
    os._exit(0)  # ONNX Runtime may crash where it tidies up after what was damaged


def _death(worker: _Worker) -> Death:
    worker.process.join()
    code = worker.process.exitcode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Death(worker.step, f"the process dies of {how}")


def _processor_seconds(process: int) -> float:
    """User and system time so far; 0 where there is no /proc, and only the wall clock tells."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
