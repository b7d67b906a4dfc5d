"""The bytes that a model takes on disk, as it is and compressed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxfuse.ir.external_data import is_external, location, model_tensors

READ_AT_ONCE = 1 << 20
LEVEL = 6
"""Level of compression: gzip's default."""


@dataclass(frozen=True)
class FileSize:
    """Bytes of a model on disk, external data included, and of the same gzipped (None: not measured)."""

    bytes: int
    gzipped: int | None


def file_size(path: Path, *, gzipped: bool) -> FileSize:
    """The size of a model file together with the data files that it refers to.

    Args:
        path: the model file.
        gzipped: whether to compress them too, one by one; they are read in pieces.

    Raises:
        OSError: a file can't be read.
    """
    proto = onnx.load(path, load_external_data=False)
    names = {location(tensor) for tensor in model_tensors(proto) if is_external(tensor)}
    files = [path, *(path.parent / name for name in sorted(names))]
    packed = sum(map(_gzipped, files)) if gzipped else None
    return FileSize(sum(file.stat().st_size for file in files), packed)


def _gzipped(path: Path) -> int:
    packer = zlib.compressobj(LEVEL, wbits=31)  # 31: a gzip header
    total = 0
    with path.open("rb") as file:
        while piece := file.read(READ_AT_ONCE):
            total += len(packer.compress(piece))
    return total + len(packer.flush())
