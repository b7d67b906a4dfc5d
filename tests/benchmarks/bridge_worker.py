"""One converter from ONNX to PyTorch, put to work on a list of files; started by bench_bridge.py.

    python bridge_worker.py CONVERTER JOBS.json RESULTS.jsonl

It runs in the converter's own environment, where onnxfuse need not be: torch, onnx and NumPy are enough. A
job is a file, feeds, and the native architecture if there is one; a result is what `properties` say of the
module, and its outputs as .npz files for the caller to judge. A job that hangs is cut short.
"""

import contextlib
import io
import json
import logging
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import properties
from architectures import ARCHITECTURES

SECONDS = 120


def _onnxfuse(path: str) -> nn.Module:
    from onnxfuse.pytorch.bridge.importer import to_torch

    return to_torch(path)


def _onnx2torch(path: str) -> nn.Module:
    _stand_in_torchvision()
    from onnx2torch import convert

    return convert(path)


def _onnx2pytorch(path: str) -> nn.Module:
    _stand_in_torchvision()
    from onnx2pytorch import ConvertModel

    return ConvertModel(onnx.load(path))


CONVERTERS: dict[str, Callable[[str], nn.Module]] = {
    "onnxfuse": _onnxfuse,
    "onnx2torch": _onnx2torch,
    "onnx2pytorch": _onnx2pytorch,
}


def _stand_in_torchvision() -> None:
    """Both import it for operators on boxes that no model here has; it isn't to be had for every torch."""
    names = {
        "torchvision": (),
        "torchvision.ops": ("roi_align", "roi_pool", "deform_conv2d", "nms", "box_convert"),
        "torchvision.io": ("decode_image", "ImageReadMode"),
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        vars(module).update(dict.fromkeys(members))
        sys.modules.setdefault(name, module)


def main() -> None:
    converter, jobs, results = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with results.open("a") as file:
        for job in json.loads(jobs.read_text()):
            with _silently():
                found = work(CONVERTERS[converter], job, converter)
            file.write(json.dumps(found) + "\n")
            file.flush()


def work(convert: Callable[[str], nn.Module], job: dict[str, Any], name: str) -> dict[str, Any]:
    """One job; whatever goes wrong becomes a reason in one line."""
    found: dict[str, Any] = {"name": job["name"]}
    try:
        with _limited(SECONDS):
            module = convert(job["path"])
    except BaseException as error:
        return {**found, "reason": _line(error)}
    proto = onnx.load(job["path"])
    native = None
    if job["architecture"]:
        native = ARCHITECTURES[job["architecture"]].module()
    feeds = [dict(np.load(path)) for path in job["feeds"]]
    inputs = [[torch.from_numpy(feed[key]) for key in job["inputs"]] for feed in feeds]
    questions: dict[str, Callable[[], Any]] = {
        "outputs": lambda: _outputs(module, inputs, Path(job["outputs"]), name),
        "names": lambda: asdict(properties.names_kept(proto, module)),
        "ties": lambda: asdict(properties.ties_kept(proto, module)),
        **_training(proto, module, inputs[0], native),
    }
    if name == "onnxfuse":
        questions["written"] = lambda: _written(job, feeds, inputs)
    if native is not None:
        if job["native names"]:
            questions["native names"] = lambda: asdict(properties.native_names_kept(native, module))
        questions["buffers"] = lambda: asdict(properties.buffers_kept(native, module))
        questions["statistics"] = lambda: asdict(properties.statistics_equal(native, module, inputs[0]))
    for question, answer in questions.items():  # the last one changes the module
        try:
            with _limited(SECONDS):
                found[question] = answer()
        except BaseException as error:
            found[question] = {"error": _line(error)}
    return found


def _training(
    proto: onnx.ModelProto, module: nn.Module, inputs: list[Tensor], native: nn.Module | None
) -> dict[str, Callable[[], Any]]:
    """The questions about gradients; they are computed once."""
    gradients: dict[str, Tensor] = {}

    def reached() -> Any:
        gradients.update(properties.gradients(module, inputs))
        return asdict(properties.weights_with_gradient(proto, module, gradients))

    questions: dict[str, Callable[[], Any]] = {"gradient": reached}
    if native is not None:
        questions["same gradient"] = lambda: asdict(
            properties.gradients_equal(native, gradients, module, inputs)
        )
    return questions


def _outputs(module: nn.Module, inputs: list[list[Tensor]], folder: Path, name: str) -> list[str]:
    """Files with the outputs of each feed in order, "0" the first; or "!" and why there is none."""
    found = []
    module.eval()
    for number, tensors in enumerate(inputs):
        try:
            with torch.no_grad():
                results = module(*tensors)
            listed = [results] if isinstance(results, Tensor) else list(results)
            path = folder / f"{name}.{number}.npz"
            np.savez(path, **{str(k): result.numpy() for k, result in enumerate(listed)})
            found.append(str(path))
        except Exception as error:
            found.append(f"!{_line(error)}")
    return found


def _written(job: dict[str, Any], feeds: list[dict[str, np.ndarray]], inputs: list[list[Tensor]]) -> Any:
    """The round trip; model and outputs with the changes go to files."""
    from onnxfuse.ir.model import Model

    trip = properties.round_trip(Model.load(job["path"]), [feeds[0]])
    folder = Path(job["outputs"])
    trip.result.save(folder / "written.onnx")
    return {
        "untouched": trip.untouched,
        "only weights": trip.only_weights,
        "these weights": trip.these_weights,
        "changed": trip.changed,
        "path": str(folder / "written.onnx"),
        "outputs": _outputs(trip.module, inputs, folder, "written"),
    }


class _TooLongError(BaseException):
    """Nothing in a converter catches it."""


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLongError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _line(error: BaseException) -> str:
    """One line, with the place if the message alone says nothing."""
    text = " ".join(str(error).split())[:200]
    if len(text) < 20:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{text} ({Path(last.filename).name}:{last.lineno})"
    return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
