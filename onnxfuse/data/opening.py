"""The source that a path, a function in a script, an array, a dict or an iterable stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxfuse.data.feed_source import FeedSource, JsonFeeds, spooled
from onnxfuse.data.npz import StoredArray, npy_array, npz_arrays
from onnxfuse.data.row_source import RowSource
from onnxfuse.data.sources import Source
from onnxfuse.data.userscript import UserFunction, is_script
from onnxfuse.errors import InputError
from onnxfuse.ir.shapes import TensorInfo


def open_source(source: Any, inputs: Sequence[TensorInfo], limit: int | None) -> Source:
    """The samples that `source` stands for.

    Args:
        source: a path, `script.py:function`, an array, a dict of arrays, or feeds.
        inputs: of the model.
        limit: the number of samples after which a stream that must be spooled ends; None reads all.

    Raises:
        InputError: nothing there, of no known kind, or it does not fit `inputs`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _open_feeds(source, "the samples", inputs, limit)
    text = os.fspath(source)
    if is_script(text):
        function = UserFunction.load(text, default="load_data")
        return _open_feeds(function(), function.name, inputs, limit, function)
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, inputs)
    if not path.exists():
        raise InputError(f"no calibration data at '{path}'")
    if path.suffix == ".npz":
        return RowSource(f"'{path}'", {name: [array] for name, array in npz_arrays(path).items()}, inputs)
    if path.suffix == ".json":
        return FeedSource(f"'{path}'", JsonFeeds(path), inputs)
    kinds = ".npz, a folder of .npy or .npz, a feed .json or script.py:load_data"
    raise InputError(f"calibration data must be a {kinds}, not '{path}'")


def _open_feeds(
    items: Any, name: str, inputs: Sequence[TensorInfo], limit: int | None, script: UserFunction | None = None
) -> Source:
    """Feeds from Python: one dict of whole arrays is rows, and so is one array for the only input; a sequence
    of feeds is used in place, the rest spooled."""
    if isinstance(items, np.ndarray):
        items = {_only(name, inputs): items}
    if isinstance(items, Mapping):
        return RowSource(name, {key: [_in_memory(name, key, value)] for key, value in items.items()}, inputs)
    if isinstance(items, Sequence) and not isinstance(items, (str, bytes)):
        return FeedSource(name, items, inputs)
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
        raise InputError(f"{name} is a {type(items).__name__}, not an iterable of feed dicts")
    return spooled(name, items if script is None else script.iterate(items), inputs, limit)


def _only(name: str, inputs: Sequence[TensorInfo]) -> str:
    """The name of the only input, for samples that are a bare array."""
    if len(inputs) != 1:
        listed = ", ".join(f"'{info.name}'" for info in inputs) or "none"
        raise InputError(f"{name}: one array is for a model with one input; give a dict of arrays: {listed}")
    return inputs[0].name


def _in_memory(name: str, key: str, value: Any) -> StoredArray:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise InputError(f"{name} array '{key}' is a {type(value).__name__}, not a NumPy array")
    array = np.asarray(value)
    return StoredArray(f"{name} array '{key}'", array.dtype, array.shape, array=array)


def _open_folder(folder: Path, inputs: Sequence[TensorInfo]) -> RowSource:
    """One `.npy` for each input, or `.npz` chunks that continue one another, 2 before 10."""
    files = sorted((f for f in folder.iterdir() if f.suffix in (".npy", ".npz")), key=_natural)
    kinds = {file.suffix for file in files}
    if len(kinds) != 1:
        problem = "mixes .npy and .npz files" if kinds else "holds no .npy or .npz file"
        raise InputError(f"'{folder}' {problem}; it must hold one .npy for each input, or .npz chunks")
    arrays: dict[str, list[StoredArray]] = {}
    if kinds == {".npy"}:
        names = {_file_name(info.name): info.name for info in inputs}
        arrays = {names.get(file.stem, file.stem): [npy_array(file)] for file in files}
        return RowSource(f"'{folder}'", arrays, inputs)
    for file in files:
        chunk = npz_arrays(file)
        if arrays and chunk.keys() != arrays.keys():
            raise InputError(
                f"'{file}' holds the arrays {sorted(chunk)}, '{files[0]}' holds {sorted(arrays)}"
            )
        for name, stored in chunk.items():
            arrays.setdefault(name, []).append(stored)
    return RowSource(f"'{folder}'", arrays, inputs)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _file_name(name: str) -> str:
    """An input's name as a file can carry it: `serving/input:0` is `serving_input_0`."""
    return re.sub(r"[^\w.-]", "_", name)
