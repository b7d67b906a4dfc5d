"""Retraining from data to a model: what changes and what does not, equal bytes, kills and processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import RUNTIME, compute, net, normal, perturbed, weight
from onnx import numpy_helper
from torch.nn import functional as F

import onnxfuse
from onnxfuse.cli.app import main
from onnxfuse.data.calibration import Calibration
from onnxfuse.data.fitted import KEY
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.training.retraining import NO_NORMALIZATION, ONE_AT_A_TIME
from onnxfuse.results import RetrainResult

RANDOM = np.random.default_rng(4)
BODY = "h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) y = MatMul(r, w2)"
TRUE = {"w1": (6, 16), "b1": normal(16, seed=9) * np.float32(0.3), "w2": (16, 4)}
X = normal(300, 6)


def mlp(**weights: Any) -> Model:
    return net(BODY, {**TRUE, **weights})


TEACHER = mlp()
LABELS = compute(TEACHER, {"x": X})[0].argmax(1)
STUDENT = perturbed(TEACHER, "w1", "w2", amount=0.5)
DATA = {"x": X, "labels": LABELS}

CONV = """c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1) n = BatchNormalization(c, s, o, m, v)
r = Relu(n) d = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(r, w2)
e = BatchNormalization(d, s2, o2, m2, v2) q = Add(e, r) p = GlobalAveragePool(q) f = Flatten(p)
y = Gemm<transB = 1>(f, w3, b3)"""
IMAGES = normal(120, 3, 6, 6)


def cnn(seed: int = 0) -> Model:
    norm = {
        "s": np.ones(8, np.float32),
        "o": np.zeros(8, np.float32),
        "m": np.zeros(8, np.float32),
        "v": np.ones(8, np.float32),
    }
    weights = {
        "w1": (8, 3, 3, 3),
        "w2": (8, 8, 3, 3),
        "w3": (4, 8),
        "b3": normal(4, seed=seed),
        **norm,
        **{f"{key}2": value.copy() for key, value in norm.items()},
    }
    return net(CONV, weights, x="float[N,3,6,6] x", y="float[N,4] y")


def retrain(model: Any = STUDENT, data: Any = None, **more: Any) -> RetrainResult:
    return onnxfuse.retrain(
        model, DATA if data is None else data, **{"epochs": 5, "lr": 0.01, "provider": "cpu", **more}
    )


def split(data: dict[str, np.ndarray], model: Model, held_out: float = 0.2) -> tuple[Any, Any]:
    """The fitted and the held-out part of arrays, as feeds with labels."""
    calibration = Calibration.open(data, model, held_out=held_out)
    parts = []
    for part in (calibration.fit, calibration.held_out):
        batches = list(part)
        arrays = {name: np.concatenate([b.feed[name] for b in batches]) for name in batches[0].feed}
        labels = None if batches[0].labels is None else np.concatenate([b.labels for b in batches])
        parts.append((arrays, labels))
    return parts[0], parts[1]


# --- what comes out -----------------------------------------------------------------------------------------


def test_from_labels(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    result = retrain(output=output)
    assert (result.ok, result.exit_code, result.reason, result.written) == (True, 0, None, output)
    found = result.report.retraining
    _, (held, labels) = split(DATA, STUDENT)
    for model, loss, score in (
        (STUDENT, found.loss.before, found.metric.scores.before),
        (Model.load(output), found.loss.after, found.metric.scores.after),
    ):
        y = torch.from_numpy(compute(model, held)[0])
        assert loss == pytest.approx(float(F.cross_entropy(y, torch.from_numpy(labels))), rel=1e-4)
        assert score == pytest.approx(float((y.argmax(1).numpy() == labels).mean()))
    assert found.loss.after < 0.8 * found.loss.before
    assert found.metric.scores.after > found.metric.scores.before
    assert found.history[found.best].held_out == pytest.approx(found.loss.after, rel=1e-4)
    assert found.history[0].held_out == pytest.approx(found.loss.before, rel=1e-4)
    assert (found.trained, found.scored, found.samples.fitted, found.samples.held_out) == (
        176,
        "top1",
        240,
        60,
    )
    assert list(tmp_path.iterdir()) == [output]
    content = json.loads(json.dumps(result.to_dict()))
    assert len(content["retraining"]["history"]) == 6


def test_nothing_but_weights_and_what_was_fitted_changes(tmp_path: Path) -> None:
    proto = STUDENT.to_proto()
    proto.metadata_props.add(key="classes", value="a,b,c,d")
    proto.graph.node[0].doc_string = "the first"
    onnx.save(proto, tmp_path / "in.onnx")
    before = (tmp_path / "in.onnx").read_bytes()
    assert retrain(tmp_path / "in.onnx", output=tmp_path / "out.onnx").ok
    after = onnx.load(tmp_path / "out.onnx")
    assert (tmp_path / "in.onnx").read_bytes() == before
    changed = [
        t.name for t, u in zip(proto.graph.initializer, after.graph.initializer, strict=True) if t != u
    ]
    assert sorted(changed) == ["b1", "w1", "w2"]
    for tensor in (*proto.graph.initializer, *after.graph.initializer):
        tensor.ClearField("raw_data")
    (fitted,) = (entry for entry in after.metadata_props if entry.key == KEY)
    after.metadata_props.remove(fitted)
    assert proto == after


def test_from_a_teacher_without_labels() -> None:
    result = retrain(data={"x": X}, teacher=TEACHER, epochs=20)
    _, (held, _) = split({"x": X}, STUDENT)
    target, before, after = (compute(model, held)[0] for model in (TEACHER, STUDENT, result.model))
    assert np.square(after - target).mean() < 0.3 * np.square(before - target).mean()
    assert result.report.retraining.metric is None
    assert result.report.retraining.teacher == "in memory"


def test_matched_tensors_follow_the_teacher() -> None:
    student = mlp(w1=weight(STUDENT, "w1"), w2=weight(STUDENT, "w2"))
    plain = retrain(student, {"x": X}, teacher=TEACHER, epochs=10).model
    matched = retrain(student, {"x": X}, teacher=TEACHER, epochs=10, match=["a"]).model
    target = compute(TEACHER, {"x": X}, "a")[0]
    errors = [np.square(compute(model, {"x": X}, "a")[0] - target).mean() for model in (plain, matched)]
    assert errors[1] < 0.5 * errors[0]


def test_batchnorm_statistics_come_back() -> None:
    """One step over all samples at a rate of nearly nothing: the statistics are the batch's, by hand."""
    model = cnn()
    data = {"x": IMAGES, "labels": RANDOM.integers(0, 4, 120)}
    result = retrain(model, data, epochs=1, lr=1e-12, batch_size=120, held_out=0.0)
    c = compute(model, {"x": IMAGES}, "c")[0].astype(np.float64)
    np.testing.assert_allclose(weight(result.model, "m"), c.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weight(result.model, "v"), c.var((0, 2, 3), ddof=1), rtol=1e-4)


def test_frozen_weights() -> None:
    model, labels = cnn(), RANDOM.integers(0, 4, 120)
    data = {"x": IMAGES, "labels": labels}
    names = [tensor.name for tensor in model.initializers]
    result = retrain(model, data, epochs=2, held_out=0.0, freeze=["w1", "s"])
    same = [name for name in names if np.array_equal(weight(model, name), weight(result.model, name))]
    assert sorted(same) == ["m", "s", "v", "w1"]
    result = retrain(model, data, epochs=2, held_out=0.0, freeze=["w?"])
    same = [name for name in names if np.array_equal(weight(model, name), weight(result.model, name))]
    assert sorted(same) == ["w1", "w2", "w3"]
    with pytest.raises(InputError, match="--freeze q3: no weight has such a name; there are 'w3'"):
        retrain(model, data, freeze=["w1", "q3"])
    with pytest.raises(InputError, match="--freeze leaves nothing to train"):
        retrain(model, data, freeze=["*"])


def test_a_pattern_with_brackets_may_be_a_name() -> None:
    model = net("y = MatMul(x, q)", {"q": (6, 4)})
    proto = model.to_proto()
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "layer[0].w"
    model = Model.load(proto)
    with pytest.raises(InputError, match="leaves nothing to train"):
        retrain(model, freeze=["layer[0].w"])


def test_no_better_than_the_start(tmp_path: Path) -> None:
    result = retrain(TEACHER, lr=1.0, epochs=2, output=tmp_path / "out.onnx")
    assert (result.ok, result.exit_code, result.written) == (False, 1, None)
    assert str(result.reason).startswith("training never got better than the start: held-out loss ")
    loss = result.report.retraining.history[1].loss
    assert str(result.reason).endswith(
        f"; epoch 1 raised the training loss to {loss:.4g}: a smaller --lr may help"
    )
    assert result.model is TEACHER
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_becomes_nan(tmp_path: Path) -> None:
    rows = [{"x": X[i : i + 30] * np.float32(1e15), "labels": LABELS[i : i + 30]} for i in range(0, 300, 30)]
    student = mlp(w1=weight(STUDENT, "w1") * np.float32(1e-15), w2=weight(STUDENT, "w2"))
    result = retrain(student, rows, lr=1e9, epochs=3, output=tmp_path / "out.onnx")
    assert result.exit_code == 1
    assert "never got better than the start" in str(result.reason)
    assert "became NaN or infinite in epoch 1, a smaller --lr may help" in str(result.reason)
    assert list(tmp_path.iterdir()) == []


def test_the_best_is_kept_when_the_loss_becomes_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxfuse.pytorch.training import training

    rates = training.learning_rate
    monkeypatch.setattr(
        training,
        "learning_rate",
        lambda settings, step, total: 1e38 if step == 9 else rates(settings, step, total),
    )
    result = retrain(output=tmp_path / "out.onnx")
    assert result.ok
    found = result.report.retraining
    assert found.best == 2
    assert found.stopped in result.report.warnings[0]
    assert "epoch 3: the weights of epoch 2 are kept" in result.report.warnings[0]
    _, (held, labels) = split(DATA, STUDENT)
    y = torch.from_numpy(compute(Model.load(tmp_path / "out.onnx"), held)[0])
    loss = float(F.cross_entropy(y, torch.from_numpy(labels)))
    assert loss == pytest.approx(found.history[2].held_out, rel=1e-4)


def test_without_held_out_samples() -> None:
    result = retrain(held_out=0.0)
    assert result.ok
    assert result.report.retraining.loss is None
    assert result.report.retraining.best == 5
    assert "no samples are held out: the result was not measured" in result.report.warnings
    with pytest.raises(InputError, match="--patience needs held-out samples"):
        retrain(held_out=0.0, patience=1)
    with pytest.raises(InputError, match="a metric needs held-out samples"):
        retrain(held_out=0.0, metric="top1")


def test_a_metric_that_falls_is_said() -> None:
    """Squared error as the loss, of a target that has nothing to do with the score."""
    script = "def score(outputs, labels):\n    return -abs(outputs['y'] - 3).sum(axis=1)\n"
    Path("score.py").write_text(script)
    result = retrain(data={"x": X, "labels": np.full((300, 4), -3, np.float32)}, metric="score.py:score")
    assert result.ok
    assert result.report.warnings[0].startswith("metric score.py:score FELL, from -")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_labels_that_serve_no_metric() -> None:
    """With a teacher, labels of another kind are no obstacle."""
    result = retrain(data={"x": X, "labels": RANDOM.integers(0, 9, (300, 3))}, teacher=TEACHER)
    assert result.ok
    assert any(
        warning.startswith("the labels are not used as a metric: ") for warning in result.report.warnings
    )
    squares = retrain(data={"x": X, "labels": compute(TEACHER, {"x": X})[0]})
    assert squares.report.retraining.scored == "mse"
    assert squares.report.retraining.objective == ("mean squared error of 'y' against the labels",)


def test_networks_without_normalization_are_warned_of() -> None:
    body = (
        " ".join(f"t{i + 1} = Conv(t{i}, w{i})" for i in range(3))
        + " p = GlobalAveragePool(t3) y = Flatten(p)"
    )
    model = net(body, {f"w{i}": (4, 4, 1, 1) for i in range(3)}, x="float[N,4,5,5] t0", y="float[N,4] y")
    data = {"t0": normal(40, 4, 5, 5), "labels": RANDOM.integers(0, 4, 40)}
    assert NO_NORMALIZATION in retrain(model, data, epochs=1, held_out=0.0).report.warnings
    labels = RANDOM.integers(0, 4, 120)
    normed = retrain(cnn(), {"x": IMAGES, "labels": labels}, epochs=1, held_out=0.0)
    assert NO_NORMALIZATION not in normed.report.warnings


def test_what_the_import_warns_of_is_collected() -> None:
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    body = CONV.replace("s2, o2, m2, v2", "s, o, m2, v2")
    norms = {"s": ones, "o": zeros, "m": zeros, "v": ones, "m2": zeros, "v2": ones}
    weights = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (4, 8), "b3": (4,), **norms}
    model = net(body, weights, x="float[N,3,6,6] x", y="float[N,4] y")
    data = {"x": IMAGES, "labels": RANDOM.integers(0, 4, 120)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = retrain(model, data, epochs=1, held_out=0.0)
    assert any("'s' is shared by" in warning for warning in result.report.warnings)


def test_data_in_feeds_and_fixed_batches() -> None:
    feeds = [{"x": X[i : i + 30], "labels": LABELS[i : i + 30]} for i in range(0, 300, 30)]
    result = retrain(data=feeds)
    assert result.ok
    assert result.report.retraining.samples.fitted == 240
    fixed = net(BODY, {key: weight(STUDENT, key) for key in TRUE}, x="float[20,6] x", y="float[20,4] y")
    result = retrain(fixed)
    assert result.ok
    assert (result.report.retraining.samples.fitted, result.report.retraining.samples.held_out) == (240, 60)


def test_one_sample_at_a_time() -> None:
    fixed = net(BODY, {key: weight(STUDENT, key) for key in TRUE}, x="float[1,6] x", y="float[1,4] y")
    result = retrain(fixed, epochs=1)
    assert result.ok
    assert ONE_AT_A_TIME in result.report.warnings
    assert ONE_AT_A_TIME not in retrain(epochs=1).report.warnings


def test_class_numbers_with_gaps_and_in_a_column() -> None:
    labels = np.where(LABELS == 3, 0, LABELS)  # class 3 never comes
    one = retrain(data={"x": X, "labels": labels}).model
    two = retrain(data={"x": X, "labels": labels[:, None].astype(np.int32)}).model
    np.testing.assert_array_equal(weight(one, "w1"), weight(two, "w1"))


def test_weights_too_narrow_to_train() -> None:
    model = net(
        "y = MatMul(x, w)", {"w": normal(6, 4).astype(np.float16)}, x="float16[N,6] x", y="float16[N,4] y"
    )
    with pytest.raises(NotApplicableError, match="weight 'w' is float16, too narrow to train"):
        retrain(model, {"x": X.astype(np.float16), "labels": LABELS})
    with pytest.raises(NotApplicableError, match="no weights that could be trained"):
        retrain(net("y = Relu(x)", {}, y="float[N,6] y"), {"x": X, "labels": LABELS})


def test_data_is_a_must() -> None:
    with pytest.raises(InputError, match="retraining needs samples"):
        onnxfuse.retrain(STUDENT, None)


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"retraining needs PyTorch: pip install 'onnxfuse\[torch\]'"):
        retrain()


# --- the same bytes -----------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    names = ("a.onnx", "b.onnx", "c.onnx")
    for name, seed in zip(names, (0, 0, 1), strict=True):
        torch.manual_seed(hash(name))
        np.random.seed(len(name))
        assert retrain(output=name, seed=seed).ok
    a, b, c = (Path(name).read_bytes() for name in names)
    assert a == b
    assert a != c


def test_a_checkpoint_of_another_training_is_not_taken_up(tmp_path: Path) -> None:
    """Whatever would change the result changes the fingerprint: model, data, teacher, settings."""
    states = tmp_path / "states"

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxfuse.Model, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            retrain(epochs=2, teacher=TEACHER, output="out.onnx", checkpoint=states)
    kept = states.read_bytes()
    other_data = {"x": X, "labels": np.where(np.arange(300) == 7, (LABELS + 1) % 4, LABELS)}
    cases: list[dict[str, Any]] = [
        {"epochs": 3},
        {"lr": 0.02},
        {"seed": 1},
        {"batch_size": 32},
        {"optimizer": "sgd"},
        {"freeze": ["b1"]},
        {"weight_decay": 0.0},
        {"held_out": 0.3},
        {"data": other_data},
        {"model": perturbed(STUDENT, "w2")},
        {"teacher": STUDENT},
        {"loss": "mse"},
        {"match": ["h"]},
    ]
    for case in cases:
        states.write_bytes(kept)
        result = retrain(**{"epochs": 2, "teacher": TEACHER, "checkpoint": states, **case})
        assert result.report.retraining.resumed is None, case
        assert any("training starts anew" in warning for warning in result.report.warnings), case
    states.write_bytes(kept)
    result = retrain(epochs=2, teacher=TEACHER, checkpoint=states)
    assert result.report.retraining.resumed == 2
    assert not states.exists()


def test_the_state_stays_when_the_model_could_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise InputError("cannot write 'out.onnx': No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "save", full)
        with pytest.raises(InputError, match="No space"):
            retrain(output="out.onnx")
    assert Path("out.onnx.checkpoint").exists()
    assert retrain(output="out.onnx").report.retraining.resumed == 5
    assert [path.name for path in Path().iterdir()] == ["out.onnx"]


COUNTING = """
import pathlib, time
def score(outputs, labels):
    calls = pathlib.Path("calls")
    count = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (count + 1))
    if count == 4 and not pathlib.Path("waiting").exists():
        pathlib.Path("waiting").touch()
        time.sleep(60)
    return (outputs["y"].argmax(1) == labels).astype(float)
"""
RUN = (
    *("retrain", "in.onnx", "--data", "data.npz", "-o", "out.onnx", "--provider", "cpu"),
    *("--epochs", "4", "--lr", "0.01", "--metric", "score.py:score"),
)


def prepare() -> None:
    onnx.save(STUDENT.to_proto(), "in.onnx")
    np.savez("data.npz", **DATA)
    Path("score.py").write_text(COUNTING)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_killed_run_goes_on(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed while its third epoch is being judged; the same command then ends with the very same file."""
    prepare()
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from onnxfuse.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *RUN], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("waiting").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if how == "kill":
        process.kill()
        process.wait(timeout=60)
    else:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == (
            "onnxfuse: the same command goes on from 'out.onnx.checkpoint'\n"
            "onnxfuse: interrupted; no model was written\n"
        )
    assert Path("out.onnx.checkpoint").exists()
    assert not Path("out.onnx").exists()
    assert main([*RUN, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["retraining"]["resumed"] == 2
    assert [epoch["number"] for epoch in report["retraining"]["history"]] == [0, 1, 2, 3, 4]
    resumed = Path("out.onnx").read_bytes()
    assert not Path("out.onnx.checkpoint").exists()
    assert main([*RUN, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["retraining"]["resumed"] is None
    assert resumed == Path("out.onnx").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == [
        "calls", "data.npz", "in.onnx", "out.onnx", "score.py", "waiting"]  # fmt: skip


# --- processes ----------------------------------------------------------------------------------------------


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "onnxfuse", *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_do_what_one_does() -> None:
    """The same batches shared out: the same gradients but for rounding, of a network without BatchNorm. One
    of its outputs has no part in the loss."""
    two = net(
        BODY + " z = MatMul(r, w3)",
        {**{key: weight(STUDENT, key) for key in TRUE}, "w3": (16, 3)},
        y="float[N,4] y, float[N,3] z",
    )
    onnx.save(two.to_proto(), "in.onnx")
    np.savez("data.npz", **DATA)
    run = (
        "retrain",
        "in.onnx",
        "--data",
        "data.npz",
        "--epochs",
        "3",
        "--provider",
        "cpu",
        "--batch-size",
        "40",
        "--optimizer",
        "sgd",
    )
    found = torchrun(*run, "-o", "both.onnx", "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["retraining"]["processes"] == 2
    assert main([*run, "-o", "alone.onnx", "-q"]) == 0
    both, alone = Model.load("both.onnx"), Model.load("alone.onnx")
    for name in TRUE:
        assert np.abs(weight(alone, name) - weight(STUDENT, name)).max() > 1e-3
        np.testing.assert_allclose(weight(both, name), weight(alone, name), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(weight(both, "w3"), weight(two, "w3"))
    single = onnxfuse.retrain(
        "in.onnx", "data.npz", epochs=3, provider="cpu", batch_size=40, optimizer="sgd"
    ).report
    for one, other in zip(report["retraining"]["history"], single.retraining.history, strict=True):
        assert one["held_out"] == pytest.approx(other.held_out, rel=1e-4)
        assert one["metric"] == pytest.approx(other.metric)
        assert one["loss"] == (None if other.loss is None else pytest.approx(other.loss, rel=1e-4))
    assert sorted(path.name for path in Path().iterdir()) == [
        "alone.onnx",
        "both.onnx",
        "data.npz",
        "in.onnx",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_fail_as_one() -> None:
    prepare()
    found = torchrun(
        "retrain", "in.onnx", "--data", "data.npz", "--lr", "1e9", "--epochs", "2", "-o", "out.onnx"
    )
    assert found.returncode != 0
    assert found.stderr.count("error: training never got better than the start") == 1
    assert not Path("out.onnx").exists()
    np.savez("data.npz", x=X, labels=LABELS + 7)
    found = torchrun("retrain", "in.onnx", "--data", "data.npz", "-o", "out.onnx")
    assert found.stderr.count("onnxfuse: error: 'data.npz' array 'labels' holds") == 1
    onnx.save(cnn().to_proto(), "in.onnx")
    np.savez("data.npz", x=IMAGES, labels=RANDOM.integers(0, 4, 120))
    found = torchrun(
        "retrain", "in.onnx", "--data", "data.npz", "--held-out", "0", "--epochs", "2", "-o", "out.onnx", "-q"
    )
    assert found.returncode == 0, found.stderr  # statistics of two processes


def test_sessions_of_the_result_match_the_module() -> None:
    """What is written computes what was trained: the import of the result gives the same outputs."""
    result = retrain()
    module = to_torch(result.model)
    with torch.no_grad():
        y = module(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(RUNTIME.session(result.model).run({"x": X})["y"], y, rtol=1e-4, atol=1e-5)
    assert numpy_helper.to_array(result.model.to_proto().graph.initializer[0]).dtype == np.float32
