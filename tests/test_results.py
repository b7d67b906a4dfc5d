"""Records of results: how they show themselves, and that they are what `--json` prints."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from runs import LABELS, W2, Scale, X, compress, network

import onnxfuse
from onnxfuse.cli.app import main
from onnxfuse.results import Shown


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "model.onnx")
    proto = network()
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(W2 * np.float32(1.5), "w2"))
    onnx.save(proto, "other.onnx")
    np.savez("data.npz", x=X, labels=LABELS)
    return tmp_path


class Cells(HTMLParser):
    """The text of all cells, and the tags that were used."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def check(result: Shown, headline: str, facts: dict[str, str]) -> None:
    """The headline is in all of them, the facts are in `str` and in the table."""
    assert repr(result) == f"<{type(result).__name__}: {headline}>"
    lines = str(result).splitlines()
    assert lines[0] == headline
    shown = dict(line.split("  ", 1) for line in lines[1:])
    assert {key: shown.get(key, "").strip() for key in facts} == facts
    table = Cells(result._repr_html_())
    assert table.tags == {"table", "caption", "tr", "th", "td"}
    assert table.cells[0] == headline
    for key, value in facts.items():
        assert table.cells[table.cells.index(key) + 1] == value


def test_a_run_that_went_well() -> None:
    result = compress("model.onnx", "fold", output="out.onnx")
    assert result
    facts = {
        "model": "model.onnx",
        "fold": "1 change",
        "parameters": "160 -> 160 (x 1.000)",
        "MACs": "160 -> 160 (x 1.000)",
        "nodes": "4 -> 3 (x 0.750)",
        "output error": "0",
    }
    check(result, "compress done, written to 'out.onnx'", facts)
    assert result.report.metric is not None
    before = f"{result.report.metric.scores.before:.4g}"
    assert f"top1          {before} of the original, {before} of the result" in str(result).splitlines()
    assert any(line.startswith("latency ") for line in str(result).splitlines())
    check(compress("model.onnx", "fold"), "compress done, not written", {})


def test_a_run_that_failed() -> None:
    result = compress("model.onnx", [Scale(1.05)], max_error=0.01)
    assert not result
    assert result.ok is False
    facts = {"scale": f"no: {result.steps[0].reason}", "nodes": "4 -> 4 (x 1.000)"}
    check(result, f"compress failed (exit code 1): {result.reason}", facts)


def test_warnings_are_among_the_facts() -> None:
    result = compress("model.onnx", "fold", calib=None)
    check(result, "compress done, not written", {"warning": result.report.warnings[0]})


def test_what_grew() -> None:
    result = onnxfuse.grow("model.onnx", widen={"all": 2}, calib="data.npz", report="report")
    assert result
    check(result, "grow done, not written", {"widen": "1 change", "parameters": "160 -> 320 (x 2.000)"})
    assert result.to_dict()["onnxfuse"] == "grow"
    assert json.loads(Path("report/report.json").read_text()) == result.to_dict()


def test_retrained() -> None:
    result = onnxfuse.retrain("other.onnx", "data.npz", epochs=3, lr=0.01, output="out.onnx")
    assert result, result.reason
    found = result.report.retraining
    trained = "160 parameters on 160 samples"
    facts = {"model": "other.onnx", "trained": trained, "best epoch": f"{found.best} of 3"}
    check(result, "retrain done, written to 'out.onnx'", facts)
    assert " of the original, " in str(result)
    failed = onnxfuse.retrain("model.onnx", {"x": X}, teacher="model.onnx", epochs=1)
    assert not failed
    assert repr(failed).startswith("<RetrainResult: retrain failed (exit code 1): training never got better ")


def test_verified() -> None:
    same = onnxfuse.verify("model.onnx", "model.onnx", calib="data.npz")
    assert same
    check(same, "same", {"allowed": "8 noise floors", "output 'y'": "relative error 0"})
    other = onnxfuse.verify("model.onnx", "other.onnx", calib="data.npz", max_error=0.1)
    assert not other
    first = str(other.divergence).removeprefix("first at ")
    facts = {"allowed": "within 0.1", "first difference": first}
    check(other, f"not within 0.1: {other.reason}", facts)


def test_compared() -> None:
    result = onnxfuse.diff("model.onnx", "other.onnx", calib="data.npz")
    headline = "3 nodes the same, 1 changed, 0 only in A, 0 only in B"
    check(result, headline, {"parameters": "160 -> 160 (x 1.000)"})
    assert result  # two models may differ


def test_inspected() -> None:
    result = onnxfuse.inspect("model.onnx", measure_latency=False)
    facts = {
        "input": "x: float32 [batch, 6]",
        "output": "y: float32 [batch, 4]",
        "parameters": "160 (640 B)",
        "MACs": "160",
        "operators": "2 MatMul, 1 Identity, 1 Relu",
        "linear operators": "2",
        "regions": "1",
    }
    check(result, "model.onnx, 4 nodes", facts)


def test_names_from_files_are_only_text() -> None:
    """Neither markup in a notebook, nor codes on a terminal, nor lines of their own."""
    proto = network()
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "<b>x</b>\x1b[31m\n"
    onnx.save(proto, "<i>&.onnx")
    result = onnxfuse.inspect("<i>&.onnx", measure_latency=False)
    assert "<b>" not in result._repr_html_()
    assert "<i>" not in result._repr_html_()
    assert "<caption>&lt;i&gt;&amp;.onnx, 4 nodes</caption>" in result._repr_html_()
    for text in (repr(result), str(result), result._repr_html_()):
        assert "\x1b" not in text
    assert "\n" not in repr(result)
    assert "<b>x</b>\\x1b[31m\\n: float32 [batch, 6]" in str(result)


def test_long_lists_are_cut() -> None:
    outputs = ", ".join(f"float[N,6] y{index}" for index in range(30))
    nodes = "\n".join(f"y{index} = Relu(x)" for index in range(30))
    text = f'<ir_version: 8, opset_import: ["" : 17]> many (float[N,6] x) => ({outputs}) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    found = str(onnxfuse.verify(model, model, calib=X))
    assert found.count("relative error") == 10
    assert "and 20 more" in found


COMMANDS = {
    "compress": (["model.onnx", "--passes", "fold", "--calib", "data.npz"], "compress.compress"),
    "grow": (["model.onnx", "--widen", "all=2", "--calib", "data.npz"], "grow.grow"),
    "retrain": (["other.onnx", "--data", "data.npz", "--epochs", "1", "--lr", "0.01"], "retrain.retrain"),
    "verify": (["model.onnx", "other.onnx"], "compare.verify"),
    "diff": (["model.onnx", "other.onnx"], "compare.diff"),
    "inspect": (["model.onnx", "--channels", "--grow", "--similarity"], "inspect.inspect"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_what_the_command_line_prints(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, function = COMMANDS[command]
    module, name = function.split(".")
    original = getattr(__import__(f"onnxfuse.commands.{module}", fromlist=[name]), name)
    results = []

    def keep(*given: Any, **named: Any) -> Any:
        results.append(original(*given, **named))
        return results[-1]

    monkeypatch.setattr(f"onnxfuse.commands.{function}", keep)
    main([command, *arguments, "--json"])
    (result,) = results
    printed = capsys.readouterr().out
    assert printed == result.to_json() + "\n"
    assert json.loads(printed) == result.to_dict()
    assert result.to_dict()["onnxfuse"] == command
    assert printed.startswith(f'{{\n  "onnxfuse": "{command}",\n  "format": 3,\n')
