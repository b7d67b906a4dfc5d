"""The command line: what goes to stdout, what to stderr, exit codes, help. What is computed is tested in
tests/commands, bad input in test_bad_input.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnx.parser
import pytest
from nets import MLP as TEXT
from onnx import numpy_helper
from runs import timed

import onnxfuse
from onnxfuse.cli.app import main
from onnxfuse.commands.loading import MADE_UP
from onnxfuse.findings import Change, Skip
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.report.compress_view import compress_view
from onnxfuse.report.inspect_view import inspect_view
from onnxfuse.report.tables import plain_text
from onnxfuse.runtime.latency import UNSTABLE, Stopwatch

RANDOM = np.random.default_rng(3)
W1 = RANDOM.standard_normal((6, 16)).astype(np.float32)
W2 = RANDOM.standard_normal((16, 4)).astype(np.float32)
X = RANDOM.standard_normal((100, 6)).astype(np.float32)
LABELS = (np.maximum(X @ W1, 0) @ W2).argmax(axis=1)
COMMANDS = ("compress", "grow", "retrain", "inspect", "verify", "diff", "passes", "operators")


def network() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.extend([numpy_helper.from_array(W1, "w1"), numpy_helper.from_array(W2, "w2")])
    return proto


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    onnx.save(network(), "mlp.onnx")
    np.savez("mlp.npz", x=X, labels=LABELS)
    return tmp_path


Captured = pytest.CaptureFixture[str]
RUN = ("compress", "mlp.onnx", "--calib", "mlp.npz", "--passes", "fold")
RETRAIN = ("retrain", "other.onnx", "--data", "mlp.npz", "--epochs", "3", "--lr", "0.01")


def save_other() -> None:
    """A network to retrain: its last weights are off."""
    proto = network()
    noise = np.random.default_rng(5).standard_normal(W2.shape).astype(np.float32)
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(W2 + noise, "w2"))
    onnx.save(proto, "other.onnx")


# --- output -------------------------------------------------------------------------------------------------


def test_one_command(folder: Path, capsys: Captured) -> None:
    assert main(["compress", "mlp.onnx", "--calib", "mlp.npz", "--max-error", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("\nwrote mlp-compressed.onnx\n")
    assert max(map(len, out.splitlines())) <= 80
    for word in ("fold", "fuse", "parameters", "MACs", "latency", "top1", "held-out samples, 1 allowed"):
        assert word in out
    assert Model.load("mlp-compressed.onnx").outputs[0].name == "y"


def test_an_older_output_is_replaced(folder: Path) -> None:
    (folder / "out.onnx").write_bytes(b"older")
    assert main([*RUN, "-o", "out.onnx", "-q"]) == 0
    assert len(Model.load("out.onnx").nodes) == 3
    assert sorted(file.name for file in folder.iterdir()) == ["mlp.npz", "mlp.onnx", "out.onnx"]


def test_dry_run_writes_nothing(folder: Path, capsys: Captured) -> None:
    assert main([*RUN, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("\ndry run: would have written mlp-compressed.onnx\n")
    assert sorted(file.name for file in folder.iterdir()) == ["mlp.npz", "mlp.onnx"]


@pytest.mark.parametrize(
    "arguments",
    [
        (*RUN, "-v"),
        (*RUN, "--retrain", "mlp.npz", "--epochs", "1"),
        RETRAIN,
        ("inspect", "mlp.onnx"),
        ("verify", "mlp.onnx", "mlp.onnx"),
        ("diff", "mlp.onnx", "mlp.onnx"),
        ("passes",),
    ],
)
def test_json_and_nothing_else_on_stdout(arguments: tuple[str, ...], capsys: Captured) -> None:
    save_other()
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["onnxfuse"], content["format"]) == (arguments[0], 3)


def test_json_of_a_failed_run(capsys: Captured) -> None:
    code = main(["compress", "mlp.onnx", "--calib", "mlp.npz", "--passes", "fuse:max_blocks=1", "--json",
                 "--max-error", "1e-9"])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 1
    assert json.loads(out)["exit_code"] == 1
    assert err.startswith("onnxfuse: error: pass 'fuse': ")
    assert err.endswith("; no model was written\n")
    assert not Path("mlp-compressed.onnx").exists()


def test_nothing_to_do(capsys: Captured) -> None:
    main([*RUN, "-o", "once.onnx", "-q"])
    assert main(["compress", "once.onnx", "--passes", "fold", "-q"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "no pass changed the model" in err


def test_quiet_says_only_what_must_be_said(capsys: Captured) -> None:
    assert main([*RUN, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["compress", "mlp.onnx", "--passes", "fold", "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"onnxfuse: warning: {MADE_UP}\n"


def test_a_slower_result_is_loud(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "latency", lambda _: timed(1.5))
    assert main(RUN) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^latency +1\.000 ms +1\.500 ms +x 1\.500 \(95%: 1\.500", out, re.MULTILINE)
    assert re.search(r"^  A/A control +x 1\.000 \(99%: 0\.990 to 1\.010\)$", out, re.MULTILINE)
    assert "SLOWER" in out
    assert err == ("onnxfuse: warning: SLOWER THAN THE ORIGINAL: latency x 1.500 (95%: 1.500 to 1.500)\n")


def test_a_busy_machine_is_loud(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    unstable = replace(timed(1.5), unstable=f"{UNSTABLE} (for a reason)")
    monkeypatch.setattr(Stopwatch, "latency", lambda _: unstable)
    assert main([*RUN, "--report", "report"]) == 0
    out, err = capsys.readouterr()
    assert "SLOWER" not in out
    assert " ".join(out.split()).count("unstable: machine busy (for a reason)") == 1
    said = "latency unstable: machine busy (for a reason): measure again when less else runs"
    assert err == f"onnxfuse: warning: {said}\n"
    found = json.loads(Path("report/report.json").read_text())
    assert found["latency"]["unstable"] == "unstable: machine busy (for a reason)"
    assert found["latency"]["control"] == {"ratio": 1.0, "low": 0.99, "high": 1.01}
    assert found["slower"] is False


def test_verbose_lists_changes(capsys: Captured) -> None:
    assert main([*RUN, "-v", "--dry-run"]) == 0
    assert "fold: 1 change\n" in capsys.readouterr().out


def test_verify(capsys: Captured) -> None:
    assert main([*RUN, "-o", "out.onnx", "-q"]) == 0
    assert main(["verify", "mlp.onnx", "out.onnx", "--calib", "mlp.npz"]) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[-1], err) == ("same", "")
    proto = network()
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(W2 * np.float32(1.5), "w2"))
    onnx.save(proto, "other.onnx")
    assert main(["verify", "mlp.onnx", "other.onnx", "--calib", "mlp.npz"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "different"
    assert "tensor 'y'" in out
    assert err.startswith("onnxfuse: error: output 'y' differs by ")
    assert main(["verify", "mlp.onnx", "other.onnx", "--calib", "mlp.npz", "--max-error", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "within 1"
    assert main(["verify", "mlp.onnx", "other.onnx", "-q", "--calib", "mlp.npz"]) == 1
    assert main(["diff", "mlp.onnx", "other.onnx", "--calib", "mlp.npz"]) == 0
    assert "w2 [16, 4]: changed by 0.5 relative" in capsys.readouterr().out


def test_verify_in_a_pipeline(capsys: Captured) -> None:
    proto = network()
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(W2 * np.float32(1.01), "w2"))
    onnx.save(proto, "other.onnx")
    promise = (
        "verify",
        "mlp.onnx",
        "other.onnx",
        "--calib",
        "mlp.npz",
        "--metric",
        "top1",
        "--junit",
        "ci.xml",
    )
    assert main([*promise, "--max-drop", "0.01", "--report", "report"]) == 1
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert out.splitlines()[-1] == "not top1 down by at most 0.01"
    assert "top1" in out
    assert "differs" not in out  # nobody has asked for equal outputs
    assert err.startswith(
        "onnxfuse: error: top1 may drop by 0.037, more than --max-drop 0.01: on 100 held-out "
    )
    assert 'failures="1"' in Path("ci.xml").read_text()
    assert sorted(os.listdir("report")) == ["report.json", "report.txt"]
    assert main([*promise, "--max-drop", "0.01", "--confidence", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], [promise["passed"] for promise in found["promises"]]) == (True, [True, True])
    assert (found["metric"]["name"], found["metric"]["scores"]["test"]) == ("top1", "McNemar")
    assert 'failures="0"' in Path("ci.xml").read_text()


def test_retrain(capsys: Captured) -> None:
    save_other()
    assert main(RETRAIN) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("\nwrote other-retrained.onnx\n")
    assert max(map(len, out.splitlines())) <= 80
    for word in (
        "cross-entropy of 'y' against the labels, 4 classes on axis 1",
        "160 parameters on 80 samples, batches of 64, adamw at 0.01, weight decay",
        "held-out loss",
        "in ONNX Runtime, on 20 held-out samples",
        "top1",
    ):
        assert word in out
    assert len(re.findall(r"^ +[0-3]  ", out, re.MULTILINE)) == 4
    assert main([*RETRAIN, "--teacher", "mlp.onnx", "--loss", "mse", "-o", "taught.onnx", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    more = ("--teacher", "mlp.onnx", "-o", "taught.onnx", "--match", "h", "--freeze", "w1")
    assert main([*RETRAIN, *more]) == 0
    out, _ = capsys.readouterr()
    for word in ("relative squared error of tensor 'h' against the teacher", "teacher  mlp.onnx", "64 param"):
        assert word in out
    assert main(["retrain", "mlp.onnx", "--data", "mlp.npz", "--teacher", "mlp.onnx", "--epochs", "1"]) == 1
    out, err = capsys.readouterr()
    assert "epoch" in out
    assert err.startswith("onnxfuse: error: training never got better than the start: held-out loss ")
    assert err.endswith("; no model was written\n")


def test_a_long_training_is_shown_in_part(capsys: Captured) -> None:
    save_other()
    assert main([*RETRAIN, "--epochs", "90", "--patience", "200"]) == 0
    out = capsys.readouterr().out
    shown = [int(line.split()[0]) for line in out.splitlines() if re.match(r"^ +\d+  +\S", line)]
    assert {0, 90} <= set(shown)
    assert 15 < len(shown) < 25
    assert len(re.findall(r"  best$", out, re.MULTILINE)) == 1


def test_compress_and_retrain(capsys: Captured) -> None:
    assert main(["compress", "mlp.onnx", "--calib", "mlp.npz", "--passes", "fuse:max_blocks=1",
                 "--retrain", "mlp.npz", "--epochs", "2", "--lr", "0.01"]) == 0  # fmt: skip
    out, _ = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    for word in (
        "fuse",
        "retraining\n",
        "divergence of 'y' from the teacher, temperature 2",
        "latency",
        "top1",
    ):
        assert word in out
    assert out.endswith("\nwrote mlp-compressed.onnx\n")


def test_other_processes_are_silent(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun the first process speaks and writes."""
    save_other()
    monkeypatch.setenv("RANK", "1")
    assert main([*RETRAIN, "--json"]) == 0
    assert main([*RETRAIN, "--lr", "-1"]) == 2
    assert capsys.readouterr() == ("", "")
    assert not Path("other-retrained.onnx").exists()


def test_inspect(capsys: Captured) -> None:
    assert main(["inspect", "mlp.onnx", "--no-latency"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "x: float32 [batch, 6]" in out
    assert "2 MatMul, 1 Identity, 1 Relu" in out
    assert "latency" not in out
    assert "h..y (2 MatMul) 6->4" in out


def test_passes(capsys: Captured) -> None:
    assert main(["passes"]) == 0
    out, _ = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    for word in ("fold  (exact)", "fuse  (approximate)", "max_blocks", "example: --passes fuse:"):
        assert word in out


# --- readable tables ----------------------------------------------------------------------------------------


class Talkative(Pass):
    """Does nothing to the function, and has much to say."""

    name = "talkative"
    contract = Contract.EXACT
    summary = "a pass for tests"

    def run(self, model: Model, context: Context) -> PassResult:
        skipped = [Skip((f"n{i}", f"m{i}"), f"would cost {i}.5 times as much") for i in range(40)]
        skipped += [Skip(("a", "b", "c"), "the same reason")] * 3
        skipped += [Skip(("l" * 300,), f"{'k' * 300}..{'j' * 300} is [bold]long[/bold]\x1b[31m\n")]
        return PassResult(model, [Change(("i",), "nothing")], skipped, notes=["a note\x1b[2J"])


def test_explanations_are_grouped_and_stay_within_the_page() -> None:
    report = onnxfuse.compress("mlp.onnx", [Talkative()], calib={"x": X}).report
    text = plain_text(compress_view(report, explain=True))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    assert "[bold]long[/bold]" in text
    assert "  40 x would cost 0.5..39.5 times as much" in lines
    assert "      n1 .. m1: 1.5" in lines
    assert "      and 32 more" in lines
    at = lines.index("  3 x the same reason")
    assert lines[at + 1] == "      a .. c (3 nodes)"
    assert "talkative: 44 not done" in lines


def test_names_from_a_model_are_only_text() -> None:
    proto = network()
    for node in proto.graph.node:
        node.name = f"\x1b[31m[red]{node.output[0]}[/red]\n"
    proto.graph.node[3].name += "very/long/" * 30
    proto.metadata_props.add(key="[bold]\x07", value="")
    found = onnxfuse.inspect(proto, measure_latency=False)
    text = plain_text(inspect_view(found))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]" in text
    assert text.count("[31m[red]h[/red]") == 2  # in the table of linear operators, and as a region


def test_many_nodes_make_no_long_report(capsys: Captured) -> None:
    text = [
        "<ir_version: 8, opset_import: ['' : 17]>".replace("'", '"'),
        "g (float[N,6] t0) => (float[N,6] t40) {",
    ]
    text += [f"t{i + 1} = MatMul(t{i}, w)" for i in range(40)]
    proto = onnx.parser.parse_model("\n".join([*text, "}"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.eye(6, dtype=np.float32), "w"))
    onnx.save(proto, "long.onnx")
    assert main(["inspect", "long.onnx", "--no-latency"]) == 0
    out = capsys.readouterr().out
    assert "linear operators: 40" in out
    assert "and 30 more, 75.0%" in out
    assert len(out.splitlines()) < 60


# --- help and usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: Captured) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(rf"Examples?:\n +onnxfuse {command}", out)
    assert max(map(len, out.splitlines())) <= 80


def test_help_lists_all_commands(capsys: Captured) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert main(["-h"]) == 0
    assert capsys.readouterr().out == out
    assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in COMMANDS)
    assert "..." not in out[out.index("Commands:") :]


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"onnxfuse {onnxfuse.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["melt"], "No such command 'melt' (try 'onnxfuse --help')"),
        (["compress"], "Missing argument 'model'"),
        (["verify", "mlp.onnx"], "Missing argument 'b'"),
        (["inspect", "mlp.onnx", "--json=yes"], "--json"),
    ],
)
def test_usage_errors(arguments: list[str], line: str, capsys: Captured) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("onnxfuse: error: ")
    assert line.lower() in err.lower()


def broken(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("by\nzero")


def test_a_bug_is_no_failed_check(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 70, a traceback, and a last line that says whose fault it is."""
    monkeypatch.setattr("onnxfuse.commands.inspect.inspect", broken)
    assert main(["inspect", "mlp.onnx"]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    last = err.splitlines()[-1]
    assert last.startswith("onnxfuse: error: this is a bug in onnxfuse, not in what you gave it: Zero")
    assert "report it" in last


def test_too_little_memory_is_no_bug(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 16.0 GiB for an array")

    monkeypatch.setattr("onnxfuse.commands.inspect.inspect", starved)
    assert main(["inspect", "mlp.onnx"]) == 3
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("onnxfuse: error: out of memory (Unable to allocate 16.0 GiB")
    assert "--batch-size" in err


def test_a_bug_as_json(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxfuse.commands.compare.verify", broken)
    assert main(["verify", "mlp.onnx", "mlp.onnx", "--json"]) == 70
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["onnxfuse"], found["error"], found["exit_code"]) == ("verify", "Bug", 70)
    assert "in broken\n" in found["traceback"]
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "reason"),
    [
        (["inspect", "none.onnx", "--json"], "InputError", 2, "no such file: 'none.onnx'"),
        (["verify", "--json", "mlp.onnx"], "UsageError", 2, "Missing argument 'B'"),
        (["melt", "--json"], "UsageError", 2, "No such command 'melt'"),
        (["inspect", "mlp.onnx", "--json"], "NotApplicableError", 3, "not here"),
        (["inspect", "mlp.onnx", "--json"], "Interrupted", 130, "interrupted"),
    ],
)
def test_errors_as_json(
    arguments: list[str],
    kind: str,
    code: int,
    reason: str,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusal = {"NotApplicableError": onnxfuse.NotApplicableError("not here")}
    stop = {**refusal, "Interrupted": KeyboardInterrupt()}.get(kind)
    if stop is not None:
        monkeypatch.setattr("onnxfuse.commands.inspect.inspect", Mock(side_effect=stop))
    assert main(arguments) == code
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["onnxfuse"], found["format"], found["error"]) == (arguments[0], 3, kind)
    assert found["exit_code"] == code
    assert found["reason"].lower().startswith(reason.lower())
    assert "traceback" not in found
    assert err.count("\n") == 1
    assert err.endswith(f"{found['reason']}\n")


# --- as a process -------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "COLUMNS": "80"}


def onnxfuse_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnxfuse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **options)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from onnxfuse.cli import main; main(['compress', '--help']); "
        "heavy = {'onnx', 'onnxruntime', 'numpy', 'scipy', 'torch'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    start = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert time.perf_counter() - start < 20  # a loaded machine; idle, it is 0.2 s


def test_a_piped_run_has_no_colours_and_no_progress() -> None:
    found = onnxfuse_process(*RUN)
    assert (found.returncode, found.stderr) == (0, "")
    assert "\x1b" not in found.stdout
    assert all(line == line.rstrip() for line in found.stdout.splitlines())


def test_names_that_the_locale_lacks(folder: Path) -> None:
    proto = network()
    proto.metadata_props.add(key="类别", value="")
    onnx.save(proto, "mlp.onnx")
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "onnxfuse", "inspect", "mlp.onnx", "--no-latency"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    assert "\\u7c7b" in found.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize(
    "arguments", [("inspect", "mlp.onnx", "--no-latency"), ("passes", "--json"), ("--help",)]
)
def test_a_reader_that_leaves_is_no_error(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "onnxfuse", *arguments]
    with open(writer, "wb") as stream:
        found = subprocess.run(
            command, stdout=stream, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=120
        )
    assert (found.returncode, found.stderr) == (141, "")


def test_inspect_lists_channel_groups_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(Path(__file__).parents[2] / "models" / "digits_resnet.onnx")
    assert main(["inspect", model, "--no-latency", "--channels"]) == 0
    shown = capsys.readouterr().out
    assert "channel groups, " in shown
    assert "frozen, it reaches the graph output 'logits'" in shown
    assert main(["inspect", model, "--no-latency", "--channels", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["channels"]
    (found,) = [g for g in groups if g["name"] == "/blocks.1.conv1/Conv"]
    assert (found["size"], found["frozen"]) == (16, None)
    assert {(t["weight"], t["axis"]) for t in found["touches"]} >= {
        ("blocks.1.conv1.weight", 0),
        ("blocks.1.bn1.running_var", 0),
        ("blocks.1.conv2.weight", 1),
    }
    assert main(["inspect", model, "--no-latency", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["channels"] is None
