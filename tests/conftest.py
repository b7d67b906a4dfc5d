"""Its place puts this folder on the path of every test below it, for `nets`."""

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Workers of pytest-xdist share the cores: second threads would only wait for each other's. NumPy, PyTorch and
# what they stand on read this when they are loaded, here and in the programs that tests start.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# Programs that tests start are to import what is installed, not what lies in the folder that they start in:
# in the checkout, passes/ is not in its place.
os.environ["PYTHONSAFEPATH"] = "1"

# What is imported and collected stays to the end: the garbage collector need not go through it every time.
gc.disable()

import onnx  # noqa: E402
import pytest  # noqa: E402
from runs import network  # noqa: E402


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _quick_timings() -> Iterator[None]:
    """Latencies from four blocks of a moment each, with wide intervals: nothing that a test says of
    other things may depend on how busy the machine is."""
    from onnxfuse.runtime import latency

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCKS": 4, "LEAST_BLOCKS": 4, "MOST_ROUNDS": 2}.items():
            patch.setattr(latency, name, value)
        patch.setattr(latency, "READING_SECONDS", 1e-9)
        for name in ("CONFIDENCE", "CONTROL_CONFIDENCE"):
            patch.setattr(latency, name, 0.9999)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the network of `runs`, alone in its folder."""
    onnx.save(network(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The file that an exporter makes of one of the `architectures`: written once, for all workers."""
    from architectures import ARCHITECTURES, export  # with torch, which takes seconds

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)

    @cache
    def file(name: str, how: str) -> Path:
        path = folder / f"{name}.{how}.onnx"
        if not path.exists():
            mine = tmp_path_factory.mktemp("export") / path.name
            export(ARCHITECTURES[name], how, mine)
            mine.replace(path)  # whole or not there: another worker may look
        return path

    return file
