"""Observers of a run of passes: progress bars, dumped models, a journal.

An instrument overrides the moments it cares about; the manager calls each in turn. None of them can change a
result. `RichProgress` and `JournalFile` are also what goes into `Context.progress` and `Context.journal`, so
that one object hears both the manager and the passes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from onnxfuse.errors import InputError

if TYPE_CHECKING:
    from onnxfuse.findings import Json
    from onnxfuse.ir.model import Model
    from onnxfuse.pipeline.base import Pass
    from onnxfuse.pipeline.records import StepReport
    from onnxfuse.progress import Advance
    from onnxfuse.runtime.latency import Stopwatch


class Instrument:
    """Hears a pass manager's run; does nothing. Indices count passes from 1."""

    def started(self, passes: Sequence[Pass], model: Model) -> None:
        """Before the first pass; `model` is what it will get."""

    def before(self, index: int, pass_: Pass, model: Model) -> None:
        """Before a pass.

        Args:
            index: of the pass.
            pass_: the pass.
            model: what it will get.
        """

    def after(self, index: int, step: StepReport, model: Model) -> None:
        """After a pass was committed or rolled back.

        Args:
            index: of the pass.
            step: its report.
            model: what the next pass gets.
        """

    def finished(self) -> None:
        """At the end, also when a pass raised or the user interrupted."""


class RichProgress(Instrument):
    """Progress bars on a terminal; nothing at all where the console is not one."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._open: list[TaskID] = []

    def task(self, description: str, total: float | None = None) -> Advance:
        """A bar below the pass's own, gone when the pass ends."""
        task = self._bars.add_task(description, total=total)
        self._open.append(task)

        def advance(amount: float = 1) -> None:
            self._bars.advance(task, amount)

        return advance

    def started(self, passes: Sequence[Pass], model: Model) -> None:
        self._bars.start()
        self._passes = self._bars.add_task("passes", total=len(passes))

    def before(self, index: int, pass_: Pass, model: Model) -> None:
        self._bars.update(self._passes, description=f"pass {pass_.name}")

    def after(self, index: int, step: StepReport, model: Model) -> None:
        for task in self._open:
            self._bars.remove_task(task)
        self._open.clear()
        self._bars.advance(self._passes)

    def finished(self) -> None:
        self._bars.stop()


class Dumps(Instrument):
    """The model after every committed pass as `folder/003_fuse.onnx`, and the one before the first as
    `000_input.onnx`.

    Raises:
        InputError: the folder can't be made or written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        _make_folder(self.folder)

    def started(self, passes: Sequence[Pass], model: Model) -> None:
        model.save(self.folder / "000_input.onnx")

    def after(self, index: int, step: StepReport, model: Model) -> None:
        if step.committed:
            model.save(self.folder / f"{index:03d}_{step.name}.onnx")


class JournalFile(Instrument):
    """One JSON object a line, written as things happen (`at`: seconds since the start): what passes say
    through `context.journal`, and each step.

    Raises:
        InputError: the file can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        _make_folder(Path(path).parent)
        try:
            self._file: IO[str] = open(path, "w", encoding="utf-8")  # noqa: SIM115 - open until `finished`
        except OSError as error:
            raise InputError(f"cannot write the journal '{path}': {error.strerror}") from error
        self._start = time.perf_counter()
        self._pass: str | None = None

    def __call__(self, event: str, **figures: Json) -> None:
        at = round(time.perf_counter() - self._start, 6)
        line = {"at": at, "pass": self._pass, "event": event, **figures}
        self._file.write(json.dumps(json_value(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def before(self, index: int, pass_: Pass, model: Model) -> None:
        self._pass = pass_.name
        self("start", index=index, options=pass_.options.model_dump(mode="json"))

    def after(self, index: int, step: StepReport, model: Model) -> None:
        self("end", **json_value(asdict(step)))
        self._pass = None

    def finished(self) -> None:
        self._file.close()


class LatencyControl(Instrument):
    """Times the original against itself after passes that changed something: how the machine drifts over the
    run belongs to the interval of a latency."""

    def __init__(self, watch: Stopwatch, most: int = 4) -> None:
        """Takes blocks with `watch`, `most` of them at most, evenly spread over the passes."""
        self._watch, self._most = watch, most
        self._every, self._changed = 1, 0

    def started(self, passes: Sequence[Pass], model: Model) -> None:
        self._every = -(-len(passes) // self._most)

    def after(self, index: int, step: StepReport, model: Model) -> None:
        if not step.committed or not step.changes:
            return
        if self._changed % self._every == 0:
            self._watch.control()
        self._changed += 1


def json_value(value: Any) -> Any:
    """`value` as JSON takes it: NumPy scalars and arrays become numbers and lists, NaN and infinities null,
    enumerations their values, keys strings."""
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, np.ndarray):
        return json_value(value.tolist())
    if isinstance(value, np.generic):
        return json_value(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value.value if hasattr(value, "value") else value


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder '{folder}': {error.strerror}") from error
