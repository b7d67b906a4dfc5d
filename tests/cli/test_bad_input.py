"""Whatever a user gives that can't work: one clear line on stderr, the right exit code, and not one file more
or less than before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from nets import MLP as TEXT
from onnx import TensorProto, external_data_helper, numpy_helper

from onnxfuse.cli.app import main

RANDOM = np.random.default_rng(3)
W1 = RANDOM.standard_normal((6, 512)).astype(np.float32)
W2 = RANDOM.standard_normal((512, 4)).astype(np.float32)
X = RANDOM.standard_normal((40, 6)).astype(np.float32)
LABELS = RANDOM.integers(0, 4, 40)


def network(text: str = TEXT) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend([numpy_helper.from_array(W1, "w1"), numpy_helper.from_array(W2, "w2")])
    return proto


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a good model and good samples in it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    onnx.save(network(), work / "good.onnx")
    np.savez(work / "good.npz", x=X, labels=LABELS)
    return work


def contents(folder: Path) -> dict[str, bytes | None]:
    places = sorted(folder.rglob("*"))
    return {str(place): place.read_bytes() if place.is_file() else None for place in places}


Refused = Callable[..., str]


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; what it said."""

    def run(*arguments: str, code: int = 2) -> str:
        before = contents(folder)
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("onnxfuse: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert contents(folder) == before
        return err.removeprefix("onnxfuse: error: ").strip()

    return run


# --- model files --------------------------------------------------------------------------------------------


def _truncated(folder: Path) -> None:
    (folder / "bad.onnx").write_bytes(network().SerializeToString()[:-100])


def _text(folder: Path) -> None:
    (folder / "bad.onnx").write_text("<html>404 not found</html>\n")


def _saved(change: Callable[[onnx.ModelProto], object], text: str = TEXT) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        proto = network(text)
        change(proto)
        (folder / "bad.onnx").write_bytes(proto.SerializeToString())

    return make


def _no_producer(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].input[0] = "nowhere"


def _cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "r"


def _bad_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("no_such", 1))


def _wrong_size(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = 7


def _operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type = "Sparkle"


def _opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 99


def _ir(proto: onnx.ModelProto) -> None:
    proto.ir_version = 99


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "no such file: 'bad.onnx'"),
    "empty": (lambda folder: (folder / "bad.onnx").touch(), "'bad.onnx' is empty"),
    "truncated": (_truncated, "'bad.onnx' is not an ONNX model, or it is truncated"),
    "not ONNX": (_text, "'bad.onnx' is not an ONNX model"),
    "folder": (lambda folder: (folder / "bad.onnx").mkdir(), "'bad.onnx' is a folder"),
    "undefined name": (_saved(_no_producer), "reads 'nowhere', which nothing produces"),
    "cycle": (_saved(_cycle), "the graph has a cycle"),
    "bad attribute": (_saved(_bad_attribute), "no_such"),
    "weight of another size": (_saved(_wrong_size), "w1"),
    "unknown operator": (_saved(_operator), "Sparkle"),
    "too new an opset": (_saved(_opset), "uses opset 99; the installed onnx"),
    "too new a format": (_saved(_ir), "has ONNX IR version 99"),
}


@pytest.mark.parametrize("command", ["compress", "retrain", "inspect", "verify", "diff"])
@pytest.mark.parametrize("case", FILES)
def test_model_files(command: str, case: str, folder: Path, refused: Refused) -> None:
    make, said = FILES[case]
    make(folder)
    others = ["good.onnx"] if command in ("verify", "diff") else []
    others += ["--data", "good.npz"] if command == "retrain" else []
    assert said in refused(command, "bad.onnx", *others)


def test_second_model(refused: Refused) -> None:
    assert refused("verify", "good.onnx", "none.onnx") == "no such file: 'none.onnx'"
    assert refused("diff", "good.onnx", "none.onnx") == "no such file: 'none.onnx'"


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "a NaN"), (np.inf, "an infinite")])
def test_weights_that_are_no_numbers(value: float, kind: str, folder: Path, refused: Refused) -> None:
    proto = network()
    weight = W1.copy()
    weight[2, 3] = value
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    onnx.save(proto, folder / "bad.onnx")
    said = f"weight 'w1' has {kind} value"
    assert refused("compress", "bad.onnx") == said
    assert refused("retrain", "bad.onnx", "--data", "good.npz") == said
    assert refused("retrain", "good.onnx", "--data", "good.npz", "--teacher", "bad.onnx") == said


def test_unknown_domain(folder: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime can't run it, so nothing can be proved; its structure can still be looked at."""
    proto = network()
    proto.graph.node[1].domain = "acme"
    proto.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    onnx.save(proto, folder / "bad.onnx")
    assert "ONNX Runtime cannot load the model" in refused("compress", "bad.onnx", code=3)
    assert "ONNX Runtime cannot load the model" in refused("verify", "bad.onnx", "good.onnx", code=3)
    assert main(["inspect", "bad.onnx"]) == 0
    out, err = capsys.readouterr()
    assert "acme::Relu" in out
    assert err.startswith("onnxfuse: warning: ONNX Runtime cannot load the model")


# --- external data ------------------------------------------------------------------------------------------


def _external(folder: Path, location: str) -> Path:
    """A model in its own folder whose first weight is said to lie at `location`; data/ is beside it."""
    home = folder / "home"
    home.mkdir()
    (folder / "outside.bin").write_bytes(W1.tobytes())
    proto = network()
    external_data_helper.set_external_data(proto.graph.initializer[0], location)
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    (home / "bad.onnx").write_bytes(proto.SerializeToString())
    return home / "bad.onnx"


def test_external_data(folder: Path, refused: Refused) -> None:
    path = _external(folder, "weights.bin")
    assert "weights.bin" in refused("compress", str(path))
    (path.parent / "weights.bin").write_bytes(W1.tobytes()[:-4])
    assert "weights.bin" in refused("compress", str(path))
    (path.parent / "weights.bin").unlink()
    (path.parent / "weights.bin").symlink_to(folder / "outside.bin")
    assert "link" in refused("compress", str(path))


@pytest.mark.parametrize("place", ["../outside.bin", "absolute"])
def test_external_data_outside(place: str, folder: Path, refused: Refused) -> None:
    path = _external(folder, str(folder / "outside.bin") if place == "absolute" else place)
    assert "outside" in refused("compress", str(path))


# --- calibration --------------------------------------------------------------------------------------------

SAMPLES: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "wrong name": ({"z": X}, "has no array 'x'; the model's inputs are 'x'"),
    "array too many": ({"x": X, "z": X}, "has an array 'z' that is no input"),
    "wrong type": ({"x": X.astype(np.float64)}, "input 'x' wants float32, got float64"),
    "wrong size": ({"x": X[:, :5]}, "input 'x' wants shape"),
    "wrong rank": ({"x": X[:, 0]}, "input 'x' wants shape"),
    "no rows": ({"x": X[:0]}, "has no rows"),
    "one row": ({"x": X[:1]}, "too few samples"),
    "labels of other rows": ({"x": X, "labels": LABELS[:7]}, "different numbers of rows"),
    "NaN": (
        {"x": np.where(np.arange(40)[:, None] == 17, np.float32(np.nan), X)},
        "NaN or infinity in row 17",
    ),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples(case: str, folder: Path, refused: Refused) -> None:
    arrays, said = SAMPLES[case]
    np.savez(folder / "bad.npz", **arrays)
    assert said in refused("compress", "good.onnx", "--calib", "bad.npz")
    assert said in refused("retrain", "good.onnx", "--data", "bad.npz")


def test_sample_places(folder: Path, refused: Refused) -> None:
    calib = ("compress", "good.onnx", "--calib")
    assert refused(*calib, "none.npz") == "no calibration data at 'none.npz'"
    assert "calibration data must be" in refused(*calib, "good.onnx")
    (folder / "bad.npz").write_bytes((folder / "good.npz").read_bytes()[:200])
    assert "bad.npz" in refused(*calib, "bad.npz")
    (folder / "bad.json").write_text("{")
    assert "bad.json" in refused(*calib, "bad.json")
    (folder / "load.py").write_text("def load_data():\n    yield {'x': 1}\n    raise OSError('lost')\n")
    assert "load.py:load_data" in refused(*calib, "load.py:load_data")
    (folder / "load.py").write_text("def load_data():\n    raise OSError('disk\\ngone')\n")
    assert refused(*calib, "load.py:load_data") == "'load.py:load_data' raised OSError: disk gone"
    assert "defines no function 'other'" in refused(*calib, "load.py:other")


# --- metrics and budgets ------------------------------------------------------------------------------------

METRICS = {
    "def score(outputs, labels):\n    raise KeyError('no such output')": "raised KeyError",
    "def score(outputs, labels):\n    return 'good'": "returned a str",
    "def score(outputs, labels):\n    return 0.5": "a vector",
    "def score(outputs, labels):\n    return [float('nan')] * len(labels)": "NaN or infinity",
    "def score(outputs, labels):\n    return [1.0]": "1 scores for a batch of",
    "def other(outputs, labels):\n    return [1.0]": "defines no function 'score'",
    "import no_such_module": "raised ModuleNotFoundError",
    "def score(": "raised SyntaxError",
}


@pytest.mark.parametrize("source", METRICS)
def test_metric_scripts(source: str, folder: Path, refused: Refused) -> None:
    (folder / "metric.py").write_text(source)
    run = ("compress", "good.onnx", "--calib", "good.npz", "--metric", "metric.py:score")
    assert METRICS[source] in refused(*run)


def test_metric_without_what_it_needs(folder: Path, refused: Refused) -> None:
    np.savez(folder / "bare.npz", x=X)
    bare = ("compress", "good.onnx", "--calib", "bare.npz")
    assert "needs labels" in refused(*bare, "--metric", "top1")
    assert refused(*bare, "--max-drop", "0.01").startswith("--max-drop needs labels")
    assert "unknown metric 'f1'" in refused(*bare, "--metric", "f1")
    run = ("compress", "good.onnx", "--calib", "good.npz", "--max-drop", "0.1")
    assert "held-out" in refused(*run, "--held-out", "0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-error", "0"], "--max-error must be a number above 0"),
        (["--max-error", "nan"], "--max-error must be a number above 0"),
        (["--max-error", "little"], "Invalid value for '--max-error'"),
        (["--max-drop", "-1"], "--max-drop must be a number of at least 0"),
        (["--max-drop", "1"], "for 1 % write --max-drop 0.01"),
        (["--max-error", "5"], "for 5 % write --max-error 0.05"),
        (["--confidence", "95"], "for 95 % write --confidence 0.95"),
        (["--metric", "agreement", "--max-drop", "2"], "for 2 % write --max-drop 0.02"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--held-out", "1.5"], "held-out share"),
        (["--memory", "0.1MB"], "memory must be at least 1MB"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--samples", "0"], "Invalid value for '--samples'"),
        (["--provider", "abacus"], "provider 'abacus' is not in this build"),
        (["--passes", "fold,"], "empty place"),
        (["--passes", "melt"], "there is no pass 'melt'"),
        (["--passes", "fold:fast=1"], "there is no option 'fast'"),
        (["--passes", "fuse:max_blocks=many"], "max_blocks"),
        (["--passes", "fuse:max_blocks=0"], "max_blocks"),
        (["--recipe", "none.yaml"], "cannot read the recipe 'none.yaml'"),
        (["--recipe", "good.npz"], "recipe 'good.npz'"),
        (["--passes", "fold", "--recipe", "none.yaml"], "not both"),
        (["--no-such-flag"], "No such option"),
        (["another.onnx"], "unexpected extra argument"),
    ],
)
def test_flags(arguments: list[str], said: str, refused: Refused) -> None:
    assert said in refused("compress", "good.onnx", *arguments)


@pytest.mark.parametrize("text", ["passes: [fold", "passes: [{fuse: {kernel: big}}]", "3", "passes: []"])
def test_recipes(text: str, folder: Path, refused: Refused) -> None:
    (folder / "recipe.yaml").write_text(text)
    assert refused("compress", "good.onnx", "--recipe", "recipe.yaml").startswith("recipe 'recipe.yaml': ")


# --- retraining ---------------------------------------------------------------------------------------------

TRAIN = ("retrain", "good.onnx", "--data", "good.npz")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--epochs", "many"], "Invalid value for '--epochs'"),
        (["--lr", "-0.1"], "--lr must be above 0 and at most 1e+09, not -0.1"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--lr", "nan"], "not nan"),
        (["--lr", "1e39"], "not 1e+39"),
        (["--weight-decay", "-1"], "--weight-decay must be between 0 and 1e+09, not -1"),
        (["--patience", "0"], "--patience must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--held-out", "1"], "held-out share"),
        (["--optimizer", "adam"], "there is no optimizer 'adam'; did you mean 'adamw'? known: adamw, sgd"),
        (["--loss", "cee"], "there is no loss 'cee'; did you mean 'ce'? known: ce, mse, distill"),
        (["--loss", "distill"], "--loss distill needs a --teacher"),
        (["--loss", "mse"], "has the shape of no output: 'y'"),
        (["--metric", "f1"], "unknown metric 'f1'"),
        (["--metric", "cosine"], "metric cosine compares with an original"),
        (["--metric", "mse"], "metric mse wants labels of the shape of output 'y'"),
        (["--provider", "abacus"], "provider 'abacus' is not in this build"),
        (["--device", "abacus"], "unknown device 'abacus'; choose from auto, cpu, cuda"),
        (["--device", "meta"], "unknown device 'meta'"),
        (["--freeze", "w3"], "--freeze w3: no weight has such a name; there are 'w"),
        (["--freeze", "w*"], "--freeze leaves nothing to train"),
        (["--match", "h"], "--match needs a --teacher"),
        (["--teacher", "none.onnx"], "no such file: 'none.onnx'"),
        (["--teacher", "good.onnx", "--match", "w1"], "there is no tensor of the model named 'w1'"),
        (["--teacher", "good.onnx", "--loss", "ce"], "--loss ce learns nothing from the teacher"),
    ],
)
def test_flags_of_retrain(arguments: list[str], said: str, refused: Refused) -> None:
    assert said in refused(*TRAIN, *arguments)


def test_retrain_without_data(refused: Refused) -> None:
    assert "Missing option '--data'" in refused("retrain", "good.onnx")
    assert refused("retrain", "good.onnx", "--data", "none.npz") == "no calibration data at 'none.npz'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refused: Refused) -> None:
    assert "finds 0 CUDA devices here" in refused(*TRAIN, "--device", "cuda")


LABELLED: dict[str, tuple[np.ndarray, list[str], str]] = {
    "too large": (
        np.where(np.arange(40) == 7, 4, LABELS),
        [],
        "'bad.npz' array 'labels' holds 4 in row 7, output 'y' has the classes 0 to 3",
    ),
    "negative": (np.where(np.arange(40) == 9, -1, LABELS), [], "holds -1 in row 9"),
    "fractions": (LABELS + 0.25, ["--loss", "ce"], "in row 0: --loss ce wants class numbers as integers"),
    "NaN": (np.where(np.arange(40) == 3, np.nan, 1.0), [], "array 'labels' holds NaN or infinity in row 3"),
    "too many": (np.zeros((40, 2), np.int64), [], "holds no class numbers of any output: 'y' [32, 4]"),
    "text": (np.array(["a"] * 40), [], "must hold numbers"),
}


@pytest.mark.parametrize("case", LABELLED)
def test_labels_to_train_on(case: str, folder: Path, refused: Refused) -> None:
    labels, arguments, said = LABELLED[case]
    np.savez(folder / "bad.npz", x=X, labels=labels)
    assert said in refused("retrain", "good.onnx", "--data", "bad.npz", *arguments)


def test_teachers_of_another_kind(folder: Path, refused: Refused) -> None:
    onnx.save(
        network(TEXT.replace("y = MatMul", "z = MatMul").replace("] y)", "] z)")), folder / "named.onnx"
    )
    said = refused(*TRAIN, "--teacher", "named.onnx")
    assert said == (
        "the teacher does not fit: output 'y' is in the model 'good.onnx' and not in the teacher 'named.onnx'"
    )
    narrow = network(TEXT.replace("float[batch,4] y", "float[batch,3] y"))
    narrow.graph.initializer[1].CopyFrom(numpy_helper.from_array(W2[:, :3].copy(), "w2"))
    onnx.save(narrow, folder / "narrow.onnx")
    said = refused(*TRAIN, "--teacher", "narrow.onnx")
    assert "output 'y' is [batch, 4] in the model 'good.onnx' and [batch, 3] in the teacher" in said


def test_a_model_that_torch_cannot_run(folder: Path, refused: Refused) -> None:
    """ONNX Runtime can. The node is named, and nothing is left behind."""
    text = TEXT.replace("float[batch,4] y", "float d").replace("y = MatMul(i, w2)", "d = Det(i)")
    proto = network(text.replace("mlp (float[batch,6] x)", "mlp (float[4,6] x)"))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(W1[:, :4].copy(), "w1"))
    proto.graph.node[3].name = "the_determinant"
    onnx.save(proto, folder / "bad.onnx")
    np.savez(folder / "bad.npz", x=X)
    said = refused("retrain", "bad.onnx", "--data", "bad.npz", "--teacher", "bad.onnx", code=3)
    assert "node 'the_determinant' (Det) can't be imported to PyTorch: there is no rule" in said


def test_one_row_to_train_on(folder: Path, refused: Refused) -> None:
    np.savez(folder / "one.npz", x=X[:1], labels=LABELS[:1])
    assert "too few samples, 1" in refused("retrain", "good.onnx", "--data", "one.npz")


def test_output_places_of_retrain(folder: Path, refused: Refused) -> None:
    (folder / "link.onnx").symlink_to("good.onnx")
    onnx.save(network(), folder / "big.onnx")
    for same in ("good.onnx", "link.onnx"):
        assert refused(*TRAIN, "-o", same) == f"the output '{same}' is the input file; choose another name"
    assert "is the input file" in refused(*TRAIN, "--teacher", "big.onnx", "-o", "big.onnx")
    assert refused(*TRAIN, "-o", "none/out.onnx") == "cannot write 'none/out.onnx': its folder does not exist"
    assert refused(*TRAIN, "-o", "/dev/null") == "cannot write '/dev/null': it is not a regular file"
    (folder / "out.onnx.checkpoint").write_text("notes of mine")
    assert "'out.onnx.checkpoint' is no checkpoint of onnxfuse" in refused(*TRAIN, "-o", "out.onnx")


def test_a_training_that_goes_nowhere_leaves_nothing(refused: Refused) -> None:
    said = refused(*TRAIN, "--lr", "1e9", "--epochs", "2", "-q", code=1)
    assert said.startswith("training never got better than the start")


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")
def test_full_disk_while_training(folder: Path) -> None:
    before = contents(folder)
    process = start(folder, *TRAIN, "--epochs", "2", "-o", "out.onnx", "-q", limit=LIMIT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("onnxfuse: error: cannot write the checkpoint 'out.onnx.checkpoint': ")
    assert err.count("\n") == 1
    assert contents(folder) == before


# --- places to write to -------------------------------------------------------------------------------------


def test_output_places(folder: Path, refused: Refused) -> None:
    (folder / "link.onnx").symlink_to("good.onnx")
    os.link(folder / "good.onnx", folder / "hard.onnx")
    run = ("compress", "good.onnx", "--calib", "good.npz", "-o")
    for same in ("good.onnx", "link.onnx", "hard.onnx", f"../{folder.name}/good.onnx"):
        assert refused(*run, same) == f"the output '{same}' is the input file; choose another name"
    assert refused(*run, "none/out.onnx") == "cannot write 'none/out.onnx': its folder does not exist"
    assert refused(*run, ".") == "cannot write '.': it is a folder"
    assert refused(*run, "/dev/null") == "cannot write '/dev/null': it is not a regular file"
    (folder / "file").touch()
    assert "cannot write the report" in refused("compress", "good.onnx", "--report", "file/report")
    assert "file" in refused("compress", "good.onnx", "--dump", "file/dump")


def test_dry_run_checks_the_output_too(refused: Refused) -> None:
    assert "is the input file" in refused("compress", "good.onnx", "-o", "good.onnx", "--dry-run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_is_not_writable(folder: Path, refused: Refused) -> None:
    (folder / "locked").mkdir(mode=0o555)
    assert "not writable" in refused("compress", "good.onnx", "-o", "locked/out.onnx")
    assert "not writable" in refused("compress", "good.onnx", "--report", "locked/report")


def test_folder_said_to_be_not_writable(
    folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as above for root, whom permissions don't stop."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "not writable" in refused("compress", "good.onnx", "-o", "out.onnx")


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell that runs the tests may ignore it
{limit}
from onnxfuse.cli import main
sys.exit(main())
"""
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"


def start(folder: Path, *arguments: str, limit: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN.format(limit=limit), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")
def test_full_disk(folder: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails half-way."""
    before = contents(folder)
    run = ("compress", "good.onnx", "--calib", "good.npz", "--passes", "fold", "-o", "out.onnx", "-q")
    process = start(folder, *run, limit=LIMIT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == f"onnxfuse: error: cannot write 'out.onnx': {os.strerror(errno.EFBIG)}\n"
    assert contents(folder) == before


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")
def test_full_disk_leaves_an_older_output_alone(folder: Path) -> None:
    (folder / "out.onnx").write_bytes(b"older")
    before = contents(folder)
    run = ("compress", "good.onnx", "--calib", "good.npz", "--passes", "fold", "-o", "out.onnx", "-q")
    process = start(folder, *run, limit=LIMIT)
    process.communicate(timeout=120)
    assert process.returncode == 2
    assert contents(folder) == before


SLOW_METRIC = """
import pathlib, time
def score(outputs, labels):
    if pathlib.Path("seen").exists():
        pathlib.Path("waiting").touch()
        time.sleep(60)
    pathlib.Path("seen").touch()
    return [1.0] * len(labels)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")
def test_interrupt(folder: Path) -> None:
    """Ctrl-C once the passes have run and the result is being judged."""
    (folder / "metric.py").write_text(SLOW_METRIC)
    before = contents(folder)
    run = ("compress", "good.onnx", "--calib", "good.npz", "--metric", "metric.py:score", "--passes", "fold")
    process = start(folder, *run, "--report", "report")
    deadline = time.monotonic() + 120
    while not (folder / "waiting").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "onnxfuse: interrupted; no model was written\n"
    (folder / "seen").unlink()
    (folder / "waiting").unlink()
    assert contents(folder) == before


def test_interrupt_while_writing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    before = contents(folder)
    monkeypatch.setattr(os, "fsync", interrupt)
    run = ("compress", "good.onnx", "--calib", "good.npz", "--passes", "fold", "-o", "out.onnx")
    assert main(run) == 130
    assert capsys.readouterr().err == "onnxfuse: interrupted; no model was written\n"
    assert contents(folder) == before
