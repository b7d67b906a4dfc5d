"""grow as a user meets it: the function, the command, what inspect lists, recipes; the shipped networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from channel_cases import CASES
from nets import compute

import onnxfuse
from onnxfuse.cli.app import main
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.passes.deepen import Deepen
from onnxfuse.passes.kernel import Kernel
from onnxfuse.passes.widen import Widen
from onnxfuse.pipeline.recipe import parse_recipe, read_recipe

MODELS = Path(__file__).parents[2] / "models"
LARGER = ("digits_resnet", "mnist1d_conv", "tiny_transformer")
RESNET = str(MODELS / "digits_resnet.onnx")
DATA = str(MODELS / "digits_resnet.npz")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def feed() -> dict[str, np.ndarray]:
    with np.load(DATA) as data:
        return {name: data[name][:8] for name in data if name != "labels"}


@pytest.mark.parametrize(
    "name",
    ["digits_mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)],
)
@pytest.mark.parametrize("scheme", ["r2r", "net2net"])
def test_shipped_networks(name: str, scheme: str) -> None:
    """Everything at once, held against the original's noise floor, and its accuracy to the last sample."""
    model = MODELS / f"{name}.onnx"
    sites = onnxfuse.inspect(model, measure_latency=False, growth=True).growth
    assert sites is not None
    asked: dict[str, dict[str, Any]] = {}
    for form, value in {"widen": 2.0, "deepen": 1, "kernel": 7}.items():
        can = form if form == "kernel" else scheme
        asked[form] = {site.name: value for site in sites if site.form == form and can in site.schemes}
    result = onnxfuse.grow(model, **asked, scheme=scheme, calib=MODELS / f"{name}.npz", samples=64)
    assert result.ok, result.reason
    assert [step.name for step in result.steps] == [f for f in ("kernel", "widen", "deepen") if asked[f]]
    assert [len(step.changes) for step in result.steps] == [len(asked[step.name]) for step in result.steps]
    assert result.report.output_error is not None
    assert result.report.output_error.worst < 1e-4
    assert result.report.metric is not None
    scores = result.report.metric.scores
    assert scores.before == scores.after
    assert result.report.after.parameters > 2 * result.report.before.parameters


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["grow", RESNET, "--widen", "all=1.5", "--widen", "/conv/Conv=2", "--deepen", "/blocks.1/Add"]
    arguments += ["--deepen", "/blocks.2/Add=2", "--kernel", "/conv*=5", "--calib", DATA, "--samples", "32"]
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert out.endswith("\nwrote digits_resnet-grown.onnx\n")
    assert [line.split()[0] for line in out.splitlines() if " exact " in line] == [
        "kernel",
        "widen",
        "deepen",
    ]
    grown = Model.load("digits_resnet-grown.onnx")
    value = grown.weight(grown.tensor("conv.weight"))
    assert value is not None
    assert value.shape == (32, 1, 5, 5)
    assert sum(".copy" in node.name and node.op == "Add" for node in grown.nodes) == 3
    (got,), (expected,) = compute(grown, feed()), compute(Model.load(RESNET), feed())
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_command_is_the_function(folder: Path) -> None:
    assert (
        main(["grow", RESNET, "--deepen", "all", "--scheme", "r2r", "--seed", "3", "-q", "-o", "a.onnx"]) == 0
    )
    result = onnxfuse.grow(RESNET, deepen={"all": 1}, seed=3, output="b.onnx")
    assert result.ok
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "say what is to grow: --widen, --deepen or --kernel"),
        (("--widen", "all"), 2, "--widen 'all' is not of the form SITE=NUMBER"),
        (("--kernel", "all=five"), 2, "--kernel 'all=five' is not of the form SITE=NUMBER"),
        (("--deepen", "all=x"), 2, "--deepen 'all=x' is not of the form SITE=NUMBER"),
        (("--widen", "all=0.5"), 2, "pass 'widen': option 'sites.all' should be greater than 1, not 0.5"),
        (("--widen", "conv9=2"), 2, "pass 'widen': there is no channel group 'conv9'; known: /conv/Conv"),
        (("--deepen", "all", "--scheme", "netmorph"), 2, "pass 'deepen': option 'scheme' should be 'r2r'"),
        (
            ("--widen", "/classify/Gemm=2"),
            3,
            "'/classify/Gemm' can't be widened: it reaches the graph output",
        ),
        (("--kernel", "/conv/Conv=3"), 3, "can't be given a larger kernel: its kernel is 3x3 already"),
        (("--deepen", "/blocks.0/Add", "--scheme", "net2net"), 3, "net2net adds layers, not blocks"),
    ],
)
def test_what_the_user_can_get_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    """One line, an exit code, no file."""
    assert main(["grow", RESNET, *arguments, "--calib", DATA, "--samples", "16", "-q"]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert list(folder.iterdir()) == []


def test_nothing_to_grow_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["L2 norm over channels"].model().save("norm.onnx")
    assert main(["grow", "norm.onnx", "--widen", "all=2", "-q"]) == 3
    assert "no pass changed the model (widen: nothing to widen; the first of" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["norm.onnx"]


def test_inspect_lists_what_can_grow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", RESNET, "--no-latency", "--grow"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "widen: 11 sites, 9 can grow",
        "  /blocks.1.conv1/Conv (16 channels): r2r, net2net, netmorph",
        "  /classify/Gemm (10 channels): no, it reaches the graph output 'logits'",
        "  /blocks.1/Add (residual sum): r2r",
        "      not net2net: net2net adds layers, not blocks: name an operator",
        "kernel: 16 sites, 16 can grow",
        "  /blocks.4.skip/Conv (1x1 kernel)",
    ):
        assert line in shown.splitlines()
    assert main(["inspect", RESNET, "--no-latency", "--grow", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["growth"]
    assert {
        "form": "kernel",
        "name": "/conv/Conv",
        "what": "3x3 kernel",
        "schemes": ["kernel"],
        "refused": {},
    } in listed
    assert main(["inspect", RESNET, "--no-latency", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["growth"] is None


def test_the_sites_of_a_network() -> None:
    model = CASES["plain"].model()
    found = onnxfuse.inspect(model, measure_latency=False, growth=True).growth
    assert found is not None
    assert [(s.form, s.name) for s in found if s.schemes] == [
        ("widen", "a"),
        ("widen", "b"),
        ("deepen", "a"),
        ("deepen", "b"),
        ("kernel", "a"),
        ("kernel", "b"),
    ]


def test_recipes() -> None:
    widen, deepen, kernel = parse_recipe(
        "widen:sites={all: 1.5, conv1: 2},scheme=net2net,noise=0.2,"
        "deepen:sites={conv1: 2},inner=[0.5, 1],kernel:sites={'conv*': 7}"
    )
    assert isinstance(widen, Widen)
    assert widen.options == Widen.Options(sites={"all": 1.5, "conv1": 2}, scheme="net2net", noise=0.2)
    assert isinstance(deepen, Deepen)
    assert deepen.options == Deepen.Options(sites={"conv1": 2}, inner=[0.5, 1])
    assert isinstance(kernel, Kernel)
    assert kernel.options == Kernel.Options(sites={"conv*": 7})
    found = read_recipe("passes: [widen: {sites: {all: 2}}, deepen: {blocks: 2}]").passes
    assert [p.options.model_dump() for p in found] == [
        Widen.Options(sites={"all": 2}).model_dump(),
        Deepen.Options(blocks=2).model_dump(),
    ]
    with pytest.raises(InputError, match=r"option 'sites\.conv1'"):
        parse_recipe("widen:sites={conv1: wide}")


def test_options_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(dict[str, float]; default {'all': 1.5})" in shown
    assert "(list[float]; default [1.0])" in shown
