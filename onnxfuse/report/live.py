"""Progress bars for work that no pass manager surrounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxfuse.pipeline.instruments import RichProgress

if TYPE_CHECKING:
    from rich.console import Console

    from onnxfuse.ir.model import Model
    from onnxfuse.pipeline.base import Pass
    from onnxfuse.progress import Advance


class LiveProgress(RichProgress):
    """Bars of passes while passes run; before and after, one bar that each new task takes over. A context
    manager: leaving it clears the screen."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._in_passes = False

    def task(self, description: str, total: float | None = None) -> Advance:
        if not self._in_passes:
            for old in self._bars.task_ids:
                self._bars.remove_task(old)
            self._bars.start()
        return super().task(description, total)

    def started(self, passes: Sequence[Pass], model: Model) -> None:
        self._in_passes = True
        super().started(passes, model)

    def finished(self) -> None:
        super().finished()
        self._in_passes = False
        self._open.clear()

    def __enter__(self) -> LiveProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finished()
