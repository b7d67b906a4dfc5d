"""The package's face: names that are what they should be, whatever was imported before, and no sooner than
asked for."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from runs import W2, X, network, reference, run

import onnxfuse
from onnxfuse.pipeline.recipe import parse_recipe

FUNCTIONS = {
    *("compress", "grow", "retrain", "inspect", "verify", "diff"),
    *("load", "save", "operators", "to_torch", "from_torch"),
}


def test_every_name_is_there() -> None:
    assert onnxfuse.__version__
    assert set(dir(onnxfuse)) == set(onnxfuse.__all__)
    assert set(onnxfuse.__all__) > FUNCTIONS
    for name in set(onnxfuse.__all__) - {"__version__", "passes"}:
        kind = types.FunctionType if name in FUNCTIONS else type
        assert isinstance(getattr(onnxfuse, name), kind), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnxfuse.nothing


IMPORTING = """
import importlib, pkgutil, sys, types
import onnxfuse
import onnxfuse.passes
names = [found.name for package in (onnxfuse, onnxfuse.passes)
         for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
names = sorted({name for name in names if not name.endswith(".__main__")}, reverse=ORDER == "backward")
if ORDER == "late":
    for name in onnxfuse.__all__:
        getattr(onnxfuse, name)
for name in names:
    importlib.import_module(name)
assert len(names) > 100, names
from onnxfuse import compress, diff, grow, inspect, load, retrain, save, verify
for name in onnxfuse.__all__:
    value = getattr(onnxfuse, name)
    assert callable(value) or name == "__version__", name
    assert not isinstance(value, types.ModuleType) or name == "passes", name
assert isinstance(verify, types.FunctionType)
assert isinstance(onnxfuse.passes.fuse, types.ModuleType)
assert "fuse" in [info.name for info in onnxfuse.passes()]
"""


@pytest.mark.parametrize("order", ["backward", "late"])
def test_no_submodule_takes_the_place_of_a_name(order: str, tmp_path: Path) -> None:
    """In a process of its own, where every submodule is imported."""
    code = f"ORDER = {order!r}\n{IMPORTING}"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import onnxfuse",
        "import onnxfuse; dir(onnxfuse); from onnxfuse import InputError",
        "from onnxfuse.cli import main; main(['--help'])",
        "from onnxfuse.cli import main; main(['--version'])",
        "from onnxfuse.cli import main; main(['passes', '--help'])",
    ],
)
def test_nothing_heavy_is_loaded_unasked(code: str) -> None:
    heavy = "{'onnx', 'onnxruntime', 'onnx_graphsurgeon', 'numpy', 'scipy', 'torch'}"
    check = f"import sys\n{code}\nfound = {heavy} & set(sys.modules)\nsys.exit(str(found) if found else 0)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


def test_passes_is_the_package_and_the_list() -> None:
    import onnxfuse.passes.fuse

    assert onnxfuse.passes is sys.modules["onnxfuse.passes"]
    assert onnxfuse.passes.fuse.Fuse.name == "fuse"
    found = {info.name: info for info in onnxfuse.passes()}
    assert {"fold", "fuse", "refit"} <= found.keys()
    assert (found["fold"].contract, found["fuse"].contract) == ("exact", "approximate")
    option = next(option for option in found["fuse"].options if option.name == "max_blocks")
    assert (option.type, option.default) == ("int | None", "None")
    for info in found.values():
        assert info.summary
        assert parse_recipe(info.example)


def test_load_and_save(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    model = onnxfuse.load(network())
    assert onnxfuse.load(model) is model
    onnxfuse.save(model, output)
    np.testing.assert_allclose(run(output, X), reference(X), rtol=1e-5, atol=1e-5)
    assert onnxfuse.load(str(output)).path == output
    with pytest.raises(onnxfuse.InputError, match="its folder does not exist"):
        onnxfuse.save(model, tmp_path / "no" / "out.onnx")
    with pytest.raises(onnxfuse.InputError, match=r"none\.onnx"):
        onnxfuse.load(tmp_path / "none.onnx")


class Rescale(onnxfuse.Pass):
    """What a third party can write with the names of the face alone."""

    name = "rescale"
    summary = "a pass for tests: moves a factor from one weight to the other"
    contract = onnxfuse.Contract.EXACT

    class Options(onnxfuse.PassOptions):
        factor: float = 2.0

    options: Options

    def run(self, model: onnxfuse.Model, context: onnxfuse.Context) -> onnxfuse.PassResult:
        for name, factor in (("w1", self.options.factor), ("w2", 1 / self.options.factor)):
            tensor = model.tensor(name)
            model.set_weight(tensor, (model.weight(tensor) * factor).astype(np.float32))
        change = onnxfuse.Change(("h", "y"), f"moved a factor of {self.options.factor:g}")
        return onnxfuse.PassResult(model, [change], [onnxfuse.Skip(("r",), "has no weight")])


def test_a_third_party_pass_needs_nothing_else() -> None:
    result = onnxfuse.compress(network(), [Rescale(factor=4.0)], calib={"x": X}, provider="cpu")
    assert result, result.reason
    assert result.steps[0].skipped[0].reason == "has no weight"
    np.testing.assert_array_equal(result.model.weight(result.model.tensor("w2")), W2 / np.float32(4))


def test_to_torch_and_back() -> None:
    import torch

    model = onnxfuse.load(network())
    module = onnxfuse.to_torch(model)
    np.testing.assert_allclose(
        module(torch.from_numpy(X)).detach().numpy(), reference(X), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        module.get_parameter("w2").mul_(2)
    back = onnxfuse.from_torch(module, model, calib=X)
    np.testing.assert_array_equal(back.weight(back.tensor("w2")), 2 * W2)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("to_torch", lambda: onnxfuse.to_torch(network())),
        ("from_torch", lambda: onnxfuse.from_torch(object(), network())),  # type: ignore[arg-type]
        ("retraining", lambda: onnxfuse.retrain(network(), {"x": X})),
    ],
)
def test_what_needs_torch_says_so(what: str, call: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(call)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    message = rf"^{what} needs PyTorch: pip install 'onnxfuse\[torch\]'$"
    with pytest.raises(onnxfuse.InputError, match=message):
        call()
