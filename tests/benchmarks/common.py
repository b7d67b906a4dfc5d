"""What the benchmark scripts beside this file share: data, tables, the machine, the command line.

Real models and images are looked for in the folder that the environment variable `ONNXFUSE_SHARED` names:
ONNX files in `models/`, and in `data/` the labelled images with their reader `load.py`.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np

from onnxfuse.runtime.providers import available_cores

WIDTH = 80
MB = 1 << 20
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)


# --- data ---------------------------------------------------------------------------------------------------


def shared() -> Path:
    """The folder with real models and data."""
    folder = os.environ.get("ONNXFUSE_SHARED")
    if not folder:
        sys.exit("set ONNXFUSE_SHARED to the folder that holds models/ and data/")
    return Path(folder)


def _reader() -> ModuleType:
    """`load.py` of the data folder."""
    spec = importlib.util.spec_from_file_location("shared_data", shared() / "data" / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar(split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `limit` images of "train" or "test", float32 (n, 3, 32, 32) in 0..255, and labels (n,)."""
    images, labels = _reader().cifar10(split, limit)
    return _channels_first(images), labels.astype(np.int64)


def mnist(limit: int) -> tuple[np.ndarray, np.ndarray]:
    """`limit` of the 5,000 digits, spread over the classes, float32 (n, 1, 28, 28) in 0..255, and labels."""
    images, labels = _reader().mnist_5k()
    chosen = np.random.default_rng(0).permutation(len(images))[:limit]
    return images[chosen, None].astype(np.float32), labels[chosen].astype(np.int64)


def mnist_as_svhn(limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The same digits enlarged to 32 x 32 (nearest pixel), three equal channels."""
    images, labels = mnist(limit)
    at = np.arange(32) * 28 // 32
    return np.repeat(images[:, :, at[:, None], at], 3, axis=1), labels


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of "train" (60,000) or "test" (10,000), float32 (n, 1, 28, 28) in 0..1, and labels (n,)."""
    images, labels = _reader().fashion_mnist(split)
    return images[:, None].astype(np.float32) / np.float32(255), labels.astype(np.int64)


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """0..255 -> (x / 255 - mean) / std per channel, float32."""
    shift, scale = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (mean, std))
    return ((images / np.float32(255) - shift) / scale).astype(np.float32)


def normalised_cifar(split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """`cifar`, as the residual networks want it."""
    images, labels = cifar(split, limit)
    return normalise(images, CIFAR_MEAN, CIFAR_STD), labels


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)


# --- measuring ----------------------------------------------------------------------------------------------


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(actions: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """What each action returns, `repeats` times, taking turns so that slow moments of the machine hit all."""
    rounds = [[action() for action in actions] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def median_ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and largest of the ratios round by round."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far.

    On Linux getrusage would do too, were it not that a process inherits the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if found:
            return int(found[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- printing -----------------------------------------------------------------------------------------------


def machine(threads: int | None = None) -> str:
    """One or two lines: processor, cores, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    flags = " ".join(line for line in lines if line.startswith("flags")).split()
    simd = next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags), "")
    used = f"{threads or available_cores()} of {available_cores()} cores used"
    parts = [f"{cpu} {simd}".strip(), used, f"Python {platform.python_version()}"]
    parts += [f"{name} {found}" for name in ("onnxruntime", "numpy", "onnxfuse") if (found := _version(name))]
    return fill(", ".join(parts))


def _version(name: str) -> str | None:
    for package in (name, f"{name}-gpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, text: int = 1) -> None:
    """Print columns, the first `text` of them left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        parts = [
            cell.ljust(width) if index < text else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(parts).rstrip())


def fill(line: str, indent: str = "") -> str:
    """The line, wrapped."""
    return textwrap.fill(line, WIDTH, subsequent_indent=indent)


def number(value: float | None) -> str:
    """Three digits and a unit prefix: 1.82 M."""
    if value is None:
        return "?"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def passed(value: float, mark: float) -> str:
    """Whether a figure is at most its mark."""
    return "yes" if value <= mark else "NO"


# --- command line -------------------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that all scripts have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="few samples: does the script run?")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    made.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime; default: all cores")
    return made


def write_json(path: Path | None, found: object) -> None:
    """Write the figures, if somebody asked for them."""
    if path is not None:
        path.write_text(json.dumps(found, indent=2, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    return str(value)
