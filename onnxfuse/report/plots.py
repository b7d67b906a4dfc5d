"""Pictures: heat maps of how alike layers are. Needs the extra `plot`: `pip install 'onnxfuse[plot]'`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.analysis.layer_similarity import shown
from onnxfuse.errors import InputError
from onnxfuse.ir import saving
from onnxfuse.report.files import write_whole
from onnxfuse.wording import printable, shortened

if TYPE_CHECKING:
    from onnxfuse.analysis.layer_similarity import Likeness

_LABEL = 28  # characters of a name
_MARKED = 12  # layers up to which a cell has its number written in it
_NAMED = 64  # and up to which each has its name at the side


def check_plot(path: Path, source: Path | None) -> None:
    """Refuses, before a long run, what can't be drawn or written; `source` is not to be overwritten.

    Raises:
        InputError: the place can't be written to, is no .png, or Matplotlib is missing.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot '{path}' must end in .png")
    saving.check_target(path, source)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs Matplotlib: pip install 'onnxfuse[plot]'") from error


def heat_maps(found: Sequence[Likeness], path: Path) -> None:
    """Write a PNG with the distances of each class; it appears whole or not at all.

    Raises:
        InputError: it can't be written.
    """
    from matplotlib.figure import Figure

    across = min(len(found), 3 if max(len(likeness.names) for likeness in found) <= _MARKED else 2)
    down = math.ceil(len(found) / across)
    side = 2.8 + max(0.25 * min(len(likeness.names), _NAMED) for likeness in found)
    figure = Figure((side * across + 0.6, side * down), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).reshape(-1)
    for place, likeness in zip(places, found, strict=False):
        _draw(figure, place, likeness)
    for place in places[len(found) :]:
        place.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    try:
        write_whole(path, picture.getvalue())
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror or error}") from error


def _draw(figure: Any, place: Any, likeness: Likeness) -> None:
    size = len(likeness.names)
    values = np.array(likeness.distances, np.float64)
    np.fill_diagonal(values, np.nan)  # a layer is itself: left grey, as what can't be compared
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    image = place.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=high)
    place.set_facecolor("lightgrey")
    place.set_title(f"{likeness.title}: {likeness.criterion}", fontsize=9, parse_math=False)
    ticks = range(size) if size <= _NAMED else []
    names = [shortened(printable(likeness.names[tick]), _LABEL) for tick in ticks]
    place.set_xticks(ticks, names, rotation=90, fontsize=6, parse_math=False)
    place.set_yticks(ticks, names, fontsize=6, parse_math=False)
    for row in range(size if size <= _MARKED else 0):
        for column in (other for other in range(size) if other != row):
            color = "white" if values[row, column] < (low + high) / 2 else "black"
            text = shown(likeness.distances[row][column])
            place.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=place, shrink=0.8).ax.tick_params(labelsize=6)
