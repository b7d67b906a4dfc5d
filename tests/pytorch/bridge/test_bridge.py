"""Networks of the usual families, exported by torch, imported, trained, written back; beside the originals.

By default TorchScript's exports, which take no time, and a few of `optimize=False`; all others are slow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import properties
import pytest
import torch
from architectures import ARCHITECTURES, EXPORTERS, Architecture

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import ModelWarning
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.bridge.writeback import run_module
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import compare, compare_run

QUICK = {
    ("resnet", "unoptimised"),
    ("gpt", "unoptimised"),
    ("lstm", "unoptimised"),
    ("groupnorm", "unoptimised"),
}
FIXED = {
    ("encoder", "torchscript"): "the exporter fixes the length",
    ("lstm", "unoptimised"): "the exporter fixes the length",
    ("gru", "unoptimised"): "the exporter fixes the length",
}
BUFFERS_TRAINED = {"llama": "tables of angles look like any weight"}
RUNTIME = Runtime("cpu", threads=1)

Exported = Callable[[str, str], Path]


def _case(name: str, how: str) -> object:
    quick = how == "torchscript" or (name, how) in QUICK
    return pytest.param(name, how, marks=() if quick else pytest.mark.slow, id=f"{name}-{how}")


every_export = pytest.mark.parametrize(
    ("name", "how"), [_case(name, how) for name in ARCHITECTURES for how in EXPORTERS]
)


def _batches(architecture: Architecture, how: str) -> list[Batch]:
    """Five rows, which `verify` also cuts to one and three, and two rows of another length."""
    lengths = {5: 12, 2: 12 if (architecture.name, how) in FIXED else 9}
    return [
        Batch({k: v.numpy() for k, v in architecture.example(rows, length).items()}, None, number, rows)
        for number, (rows, length) in enumerate(lengths.items())
    ]


def _inputs(name: str, rows: int = 3) -> list[torch.Tensor]:
    return list(ARCHITECTURES[name].example(rows).values())


@every_export
def test_computes_what_onnx_runtime_does(name: str, how: str, exported: Exported) -> None:
    model = Model.load(exported(name, how))
    names = [info.name for info in model.outputs]
    run = partial(run_module, to_torch(model), model, names)
    found = compare_run(model, run, _batches(ARCHITECTURES[name], how), RUNTIME, tensors=names)
    assert found.passed, found.reason
    assert set(found.batch_sizes) == {1, 2, 3, 5}


@every_export
def test_keeps_names_ties_and_gradients(name: str, how: str, exported: Exported) -> None:
    path, native = exported(name, how), ARCHITECTURES[name].module()
    proto = Model.load(path).to_proto()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", ModelWarning
        )  # none of these files has a weight that is shared by chance
        module = to_torch(path)
    found = properties.gradients(module, _inputs(name))
    shares = {
        "names": properties.names_kept(proto, module),
        "ties": properties.ties_kept(proto, module),
        "gradient": properties.weights_with_gradient(proto, module, found),
        "same gradient": properties.gradients_equal(native, found, module, _inputs(name)),
    }
    if how == "unoptimised":
        shares["native names"] = properties.native_names_kept(native, module)
    if name not in BUFFERS_TRAINED:
        shares["buffers"] = properties.buffers_kept(native, module)
    assert {question: share for question, share in shares.items() if not share.all} == {}
    assert shares["gradient"].total > 0
    assert shares["ties"].total > 0 or name not in ("siamese",)


@every_export
def test_batch_norm_trains_as_the_native_one(name: str, how: str, exported: Exported) -> None:
    if not ARCHITECTURES[name].batch_norm:
        pytest.skip("no BatchNorm")
    native, module = ARCHITECTURES[name].module(), to_torch(exported(name, how))
    share = properties.statistics_equal(native, module, _inputs(name))
    assert share.all, share.lost
    kept = sum(key.endswith("running_var") for key in native.state_dict())
    assert share.total == 2 * kept or how == "dynamo"


@every_export
def test_weights_go_back_to_the_same_graph(name: str, how: str, exported: Exported) -> None:
    model = Model.load(exported(name, how))
    batches = _batches(ARCHITECTURES[name], how)
    trip = properties.round_trip(model, [batches[0].feed])
    assert (trip.untouched, trip.only_weights, trip.these_weights) == (True, True, True)
    assert trip.changed > 0
    names = [info.name for info in model.outputs]
    run = partial(run_module, trip.module.eval(), trip.result, names)
    found = compare_run(trip.result, run, batches, RUNTIME, tensors=names)
    assert found.passed, found.reason
    assert not compare(model, trip.result, batches, RUNTIME).passed, "the changes had no effect"


@every_export
def test_is_a_module_like_any_other(name: str, how: str, exported: Exported) -> None:
    path = exported(name, how)
    properties.copies(to_torch(path), _inputs(name))
    properties.reloads(to_torch(path), to_torch(path), _inputs(name))


@pytest.mark.parametrize(("name", "how"), [_case(n, "unoptimised") for n in ("resnet", "gpt")])
def test_is_one_graph_for_torch(name: str, how: str, exported: Exported) -> None:
    path = exported(name, how)
    properties.exports(to_torch(path), _inputs(name), _inputs(name, 5))
    properties.compiles(to_torch(path), _inputs(name), "aot_eager")
