"""The functions behind the command line: what they decide, and that the figures they report are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from nets import MLP as TEXT
from onnx import numpy_helper
from scipy import stats

import onnxfuse
from onnxfuse import api, cost
from onnxfuse.calibration import Calibration
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.findings import Change, Prediction
from onnxfuse.graph import Model
from onnxfuse.instruments import Instrument
from onnxfuse.pass_manager import Context, Contract, Pass, PassResult
from onnxfuse.report.record import as_json
from onnxfuse.significance import mcnemar, paired_difference

RANDOM = np.random.default_rng(3)
W1 = RANDOM.standard_normal((6, 16)).astype(np.float32)
W2 = RANDOM.standard_normal((16, 4)).astype(np.float32)
X = RANDOM.standard_normal((200, 6)).astype(np.float32)


def reference(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    return np.maximum(x @ W1, 0) @ (scale * W2)


# Right for about nine samples in ten.
LABELS = np.where(RANDOM.random(200) < 0.9, reference(X).argmax(axis=1), 0)


def network(text: str = TEXT, *, w1: np.ndarray = W1, w2: np.ndarray = W2) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend([numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(w2, "w2")])
    return proto


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(network(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(model: Path | onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model.read_bytes()
    (y,) = ort.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(y)


def held_out(model: Path) -> tuple[np.ndarray, np.ndarray]:
    """The samples that `compress` holds out, and their labels."""
    calibration = Calibration.open({"x": X, "labels": LABELS}, Model.load(model))
    batches = list(calibration.held_out)
    return np.concatenate([b.feed["x"] for b in batches]), np.concatenate([b.labels for b in batches])


class Scale(Pass):
    """Multiplies the last weight by a factor; says so, or lies."""

    name = "scale"
    contract = Contract.APPROXIMATE
    summary = "a pass for tests"

    def __init__(self, factor: float, claim: Callable[[float], float] = lambda error: error) -> None:
        super().__init__()
        self.factor = factor
        self.claim = claim

    def run(self, model: Model, context: Context) -> PassResult:
        y = np.concatenate([reference(batch.feed["x"]) for batch in context.calibration.fit])
        error = float(np.mean(np.sum(((self.factor - 1) * y) ** 2, axis=1)))
        variance = float(np.sum(y.var(axis=0)))
        model.set_weight(model.tensor("w2"), (W2 * self.factor).astype(np.float32))
        change = Change(("y",), f"scaled by {self.factor}")
        return PassResult(model, [change], predictions=[Prediction("y", "y", self.claim(error), variance)])


class Refusing(Pass):
    name = "refusing"
    contract = Contract.EXACT
    summary = "a pass for tests"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def run(self, model: Model, context: Context) -> PassResult:
        raise self.error


def compress(model: Any, passes: Any = "fold", **arguments: Any) -> api.Result:
    return api.compress(
        model, passes, **{"calib": {"x": X, "labels": LABELS}, "provider": "cpu", **arguments}
    )


# --- compress -----------------------------------------------------------------------------------------------


def test_what_was_proved_is_written(path: Path) -> None:
    before = path.read_bytes()
    output = path.with_name("out.onnx")
    result = compress(path, output=output)
    assert (result.ok, result.exit_code, result.reason) == (True, 0, None)
    assert result.written == output
    assert path.read_bytes() == before
    assert [node.op_type for node in onnx.load(output).graph.node] == ["MatMul", "Relu", "MatMul"]
    np.testing.assert_allclose(run(output, X), reference(X), rtol=1e-5, atol=1e-5)
    assert [node.op for node in result.model.nodes] == ["MatMul", "Relu", "MatMul"]


def test_nothing_is_written_unasked(path: Path) -> None:
    assert compress(path).written is None
    assert compress(path, output=path.with_name("out.onnx"), dry_run=True).written is None
    assert list(path.parent.iterdir()) == [path]


def test_sources_of_a_model(path: Path) -> None:
    for source in (str(path), path.read_bytes(), network(), Model.load(path)):
        assert compress(source).ok


def test_the_reported_error_is_that_on_held_out_samples(path: Path) -> None:
    report = compress(path, [Scale(1.05)]).report
    x, _ = held_out(path)
    y = reference(x)
    expected = np.sqrt(np.sum((0.05 * y) ** 2) / np.sum((y - y.mean(axis=0)) ** 2))
    assert report.output_error is not None
    assert report.output_error.samples == len(x) == 40
    assert report.output_error.outputs["y"] == pytest.approx(expected, rel=1e-4)
    assert report.samples.fitted == 160


def test_the_error_of_a_run_counts_from_the_original(path: Path) -> None:
    report = compress(path, [Scale(1.05), *onnxfuse.recipe.parse_recipe("fold")]).report
    assert report.output_error is not None
    assert report.output_error.worst == pytest.approx(compress(path, [Scale(1.05)]).report.output_error.worst)


def test_max_error(path: Path) -> None:
    output = path.with_name("out.onnx")
    result = compress(path, [Scale(1.05)], max_error=0.01, output=output)
    assert (result.exit_code, result.written) == (1, None)
    assert result.reason is not None
    assert "above the allowed 0.01" in result.reason
    assert not output.exists()
    np.testing.assert_array_equal(result.model.weight(result.model.tensor("w2")), W2)
    assert compress(path, [Scale(1.05)], max_error=0.1, output=output).ok
    assert output.exists()


def test_max_error_needs_samples_to_hold_it_on(path: Path) -> None:
    result = compress(path, [Scale(1.05)], max_error=0.2, held_out=0.0, calib={"x": X})
    assert result.exit_code == 1
    assert "no held-out samples" in str(result.reason)


def test_exact_passes_are_measured_without_held_out_samples_too(path: Path) -> None:
    report = compress(path, held_out=0.0, calib={"x": X}).report
    assert report.output_error is not None
    assert report.output_error.samples == 200
    report = compress(path, [Scale(1.05)], held_out=0.0, calib={"x": X}).report
    assert report.output_error is None
    assert any("not measured" in warning for warning in report.warnings)


def test_top1_of_labels(path: Path) -> None:
    report = compress(path, [Scale(-1.0)]).report
    x, labels = held_out(path)
    before = (reference(x).argmax(axis=1) == labels).astype(float)
    after = (reference(x, -1.0).argmax(axis=1) == labels).astype(float)
    assert report.metric is not None
    scores = report.metric.scores
    assert (report.metric.name, scores.samples) == ("top1", 40)
    assert (scores.before, scores.after) == (before.mean(), after.mean())
    assert scores.low < scores.difference < scores.high
    assert scores.p_value == pytest.approx(mcnemar(before, after))


def test_labels_that_are_no_classes_are_left_alone(path: Path) -> None:
    report = compress(path, calib={"x": X, "labels": X[:, :1]}).report
    assert report.metric is None
    assert any(warning.startswith("the labels are not used: ") for warning in report.warnings)


def test_max_drop(path: Path) -> None:
    output = path.with_name("out.onnx")
    result = compress(path, [Scale(-1.0)], max_drop=0.1, output=output)
    assert (result.exit_code, result.written) == (1, None)
    assert str(result.reason).startswith("top1 drops by ")
    np.testing.assert_array_equal(result.model.weight(result.model.tensor("w2")), W2)
    assert not output.exists()
    assert compress(path, [Scale(-1.0)], max_drop=1.0, output=output).ok


def test_a_metric_of_the_users(path: Path) -> None:
    script = path.with_name("metric.py")
    script.write_text("def size(outputs, labels):\n    return -abs(outputs['y']).sum(axis=1)\n")
    report = compress(path, [Scale(1.05)], metric=f"{script}:size", calib={"x": X}).report
    x, _ = held_out(path)
    assert report.metric is not None
    assert report.metric.scores.before == pytest.approx(-np.abs(reference(x)).sum(axis=1).mean(), rel=1e-5)
    assert report.metric.scores.after == pytest.approx(1.05 * report.metric.scores.before, rel=1e-5)
    assert report.metric.scores.p_value is None


def test_a_lie_is_exit_code_1(path: Path) -> None:
    output = path.with_name("out.onnx")
    result = compress(path, [Scale(1.05, claim=lambda error: 0.5 * error)], output=output)
    assert (result.exit_code, output.exists()) == (1, False)
    assert str(result.reason).startswith("pass 'scale': tensor 'y': predicted")


def test_a_pass_that_cannot_be_applied_is_exit_code_3(path: Path) -> None:
    output = path.with_name("out.onnx")
    refusing = Refusing(NotApplicableError("not for this model"))
    result = compress(path, [Scale(1.0001), refusing], output=output)
    assert (result.exit_code, output.exists()) == (3, False)
    assert result.reason == "pass 'refusing': not for this model"
    assert [step.committed for step in result.steps] == [True, False]


def test_input_that_only_a_pass_finds_bad_is_raised(path: Path) -> None:
    with pytest.raises(InputError, match="pass 'refusing': bad samples"):
        compress(path, [Refusing(InputError("bad samples"))])


def test_nothing_to_do_is_exit_code_3(path: Path) -> None:
    once = compress(path).model
    result = compress(once, output=path.with_name("out.onnx"))
    assert (result.exit_code, result.written) == (3, None)
    assert str(result.reason).startswith("no pass changed the model (fold: ")


@pytest.mark.parametrize(("ratios", "slower"), [((1.2, 1.1, 1.3), True), ((1.2, 0.9, 1.5), False)])
def test_a_slower_result_is_never_silent(
    ratios: tuple[float, float, float], slower: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(models: list[Model], *_: Any, **__: Any) -> cost.Latency:
        assert len(models) == 2
        same = cost.Timing(1.0, (1.0, 1.0), 1.0, 1.0, 1.0, (1.0, 1.0))
        other = cost.Timing(1.2, (1.2, 1.2), *ratios, (1.0, 1.0))
        return cost.Latency((same, other), 10, ("CPUExecutionProvider",), 1)

    monkeypatch.setattr(api, "latency", pretend)
    report = compress(path).report
    assert report.slower is slower
    assert any(api.SLOWER in warning for warning in report.warnings) is slower


def test_slower_counts_only_if_it_can_be_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([1.3, 1.2, 0.9, 1.4])

    def pretend(*_: Any, **__: Any) -> cost.Latency:
        timings = [cost.Timing(t, (t, t), t, t, t, (t, t)) for t in (1.0, next(ratios))]
        return cost.Latency(tuple(timings), 10, ("CPUExecutionProvider",), 1)

    monkeypatch.setattr(api, "latency", pretend)
    report = compress(path).report
    assert not report.slower
    assert report.latency is not None
    assert report.latency.timings[1].ratio == 0.9


def test_made_up_samples_are_never_silent(path: Path) -> None:
    report = compress(path, calib=None).report
    assert report.samples.synthetic
    assert report.warnings[0] == api.MADE_UP


def test_a_recipe_and_what_beats_it(path: Path) -> None:
    recipe = path.with_name("recipe.yaml")
    recipe.write_text("passes: [{fuse: {max_blocks: 1}}]\nmax_error: 1.0e-6\nseed: 7\n")
    result = compress(path, None, recipe=recipe)
    assert (result.exit_code, result.report.seed, result.report.output_bound) == (1, 7, 1e-6)
    assert compress(path, None, recipe=recipe, max_error=2.0, seed=8).report.seed == 8
    assert compress(path, None, recipe=recipe, max_error=2.0).ok
    with pytest.raises(InputError, match="not both"):
        compress(path, "fold", recipe=recipe)


def test_dumps_and_journal(path: Path) -> None:
    folder = path.parent / "dump"
    compress(path, dump=folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "000_input.onnx",
        "001_fold.onnx",
        "journal.jsonl",
    ]
    events = [json.loads(line)["event"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert events == ["start", "end"]


def test_report_files(path: Path) -> None:
    folder = path.parent / "deep" / "report"
    result = compress(path, report=folder)
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.txt"]
    content = json.loads((folder / "report.json").read_text())
    assert content == json.loads(json.dumps(as_json(result.report, "compress")))
    assert (content["onnxfuse"], content["format"], content["exit_code"]) == ("compress", 2, 0)
    assert content["before"]["nodes"], content["after"]["nodes"] == (4, 3)
    assert content["steps"][0]["verification"]["comparison"]["passed"] is True
    text = (folder / "report.txt").read_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "Identity" in text


def test_a_failed_run_is_reported_too(path: Path) -> None:
    folder = path.parent / "report"
    compress(path, [Scale(1.05)], max_error=0.01, report=folder)
    content = json.loads((folder / "report.json").read_text())
    assert (content["exit_code"], content["written"]) == (1, False)
    assert content["reason"] in (folder / "report.txt").read_text()


def test_fuse_end_to_end(path: Path) -> None:
    """u -> v over a Relu: the fused map is the least-squares one, and the run says how far off it is."""
    result = compress(path, "fold,fuse:max_blocks=1,ridge=1e-9")
    assert [node.op for node in result.model.nodes] in (["MatMul", "Add"], ["Gemm"])
    calibration = Calibration.open({"x": X, "labels": LABELS}, Model.load(path))
    fitted = np.concatenate([batch.feed["x"] for batch in calibration.fit])
    design = np.column_stack([fitted, np.ones(len(fitted))])
    solution, *_ = np.linalg.lstsq(design, reference(fitted), rcond=None)
    x, _ = held_out(path)
    expected = np.column_stack([x, np.ones(len(x))]) @ solution
    np.testing.assert_allclose(run(result.model.to_proto(), x), expected, atol=1e-3)
    y = reference(x)
    error = np.sqrt(np.sum((y - expected) ** 2) / np.sum((y - y.mean(axis=0)) ** 2))
    assert result.report.output_error is not None
    assert result.report.output_error.worst == pytest.approx(error, rel=1e-3)


# --- retraining after the passes ----------------------------------------------------------------------------

DATA = {"x": X, "labels": LABELS}


class Listening(Scale):
    """Notes the budget that it is told."""

    def run(self, model: Model, context: Context) -> PassResult:
        self.told = context.max_error
        return super().run(model, context)


def test_retraining_repairs_what_a_pass_did(path: Path) -> None:
    """The budget holds for the retrained model; the pass hears nothing of it."""
    output, wide = path.with_name("out.onnx"), Listening(1.3)
    assert not compress(path, [Listening(1.3)], max_error=0.1, output=output).ok
    result = compress(path, [wide], max_error=0.1, output=output, retrain=DATA, epochs=20, lr=0.01)
    assert result.ok, result.reason
    assert wide.told is None
    assert result.report.output_bound == 0.1
    x, _ = held_out(path)
    y, after = reference(x), run(output, x)
    error = np.sqrt(np.sum((after - y) ** 2) / np.sum((y - y.mean(axis=0)) ** 2))
    assert error < 0.1
    assert result.report.output_error is not None
    assert result.report.output_error.worst == pytest.approx(error, rel=1e-3)
    assert result.report.latency is not None
    found = result.report.retrainings[0]
    assert (found.teacher, found.epochs, found.lr, found.scored) == (str(path), 20, 0.01, "top1")
    assert found.objective == ("relative squared error of output 'y' against the teacher",)
    assert (found.samples.fitted, found.samples.held_out) == (160, 40)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "out.onnx"]


def test_a_budget_that_retraining_does_not_reach(path: Path) -> None:
    output = path.with_name("out.onnx")
    result = compress(path, [Scale(1.3)], max_error=1e-4, output=output, retrain=DATA, epochs=1)
    assert (result.exit_code, output.exists()) == (1, False)
    assert str(result.reason).endswith("above --max-error 0.0001")
    assert list(path.parent.iterdir()) == [path]
    np.testing.assert_array_equal(result.model.weight(result.model.tensor("w2")), W2)


def test_what_the_passes_made_is_kept_where_retraining_does_not_help(path: Path) -> None:
    output = path.with_name("out.onnx")
    result = compress(path, [Scale(1.001)], output=output, retrain={"x": X}, epochs=1, lr=3.0)
    assert result.ok
    warning = result.report.warnings[-1]
    assert warning.startswith("retraining: training never got better than the start: ")
    assert warning.endswith("; what the passes made is kept")
    np.testing.assert_allclose(run(output, X), reference(X, 1.001), rtol=1e-4, atol=1e-4)


def test_what_the_errors_are_measured_on_is_not_trained_on(path: Path) -> None:
    """Some of the samples of --calib, held out there, are among those of --retrain."""
    calib = {"x": X[:97], "labels": LABELS[:97]}
    result = compress(path, [Scale(1.3)], calib=calib, retrain=DATA, epochs=1)
    parts = [
        {row.tobytes() for batch in part for row in batch.feed["x"]}
        for part in (
            Calibration.open(calib, Model.load(path)).held_out,
            Calibration.open(DATA, Model.load(path)).fit,
        )
    ]
    shared = len(parts[0] & parts[1])
    assert shared > 0
    found = result.report.retrainings[0]
    assert found.samples.fitted == 160 - shared
    said = f"retraining: {shared} training samples are held out by --calib: they were left out of training"
    assert said in result.report.warnings
    assert not any(
        "held out by" in warning for warning in compress(path, retrain=DATA, epochs=1).report.warnings
    )


def test_nothing_is_retrained_that_no_pass_changed(path: Path) -> None:
    once = compress(path).model
    result = compress(once, retrain=DATA, epochs=1)
    assert (result.exit_code, result.report.retrainings) == (3, ())
    refusing = Refusing(NotApplicableError("not for this model"))
    result = compress(path, [Scale(1.0001), refusing], retrain=DATA)
    assert (result.exit_code, result.report.retrainings) == (3, ())


class Slope(Pass):
    """Multiplies the last weight by 1 + `rise`, in steps if asked to."""

    name = "slope"
    contract = Contract.APPROXIMATE
    summary = "a pass for tests"

    def __init__(self, rise: float) -> None:
        super().__init__()
        self.rise = rise

    def partly(self, share: float, done: float = 0.0) -> Pass | None:
        return Slope((1 + self.rise * share) / (1 + self.rise * done) - 1)

    def run(self, model: Model, context: Context) -> PassResult:
        before = context.original.to_proto()
        y = np.concatenate([run(before, batch.feed["x"]) for batch in context.calibration.fit])
        w2 = model.weight(model.tensor("w2"))
        model.set_weight(model.tensor("w2"), (w2 * (1 + self.rise)).astype(np.float32))
        error, variance = float(np.mean(np.sum((self.rise * y) ** 2, axis=1))), float(np.sum(y.var(axis=0)))
        return PassResult(model, [Change(("y",), "")], predictions=[Prediction("y", "y", error, variance)])


def test_by_turns(path: Path) -> None:
    """Each turn goes on from the last, on what training has left; exact passes in front run once."""
    output = path.with_name("out.onnx")
    heard: list[tuple[str, float]] = []

    class Twice(Pass):
        name, contract, summary = "twice", Contract.EXACT, "a pass for tests: leaves everything"

        def run(self, model: Model, context: Context) -> PassResult:
            return PassResult(model)

    class Ears(Instrument):
        def before(self, index: int, pass_: Pass, model: Model) -> None:
            heard.append((pass_.name, float(model.weight(model.tensor("w2"))[0, 0])))

    result = compress(
        path,
        [Twice(), Slope(0.6)],
        output=output,
        retrain=DATA,
        max_error=0.3,
        epochs=30,
        lr=0.01,
        schedule="exponential:steps=2",
        instruments=[Ears()],
    )
    assert result.ok, result.reason
    assert [name for name, _ in heard] == ["twice", "slope", "slope"]
    assert [found.epochs for found in result.report.retrainings] == [10, 20]
    assert all(found.teacher == str(path) for found in result.report.retrainings)
    start = float(W2[0, 0])
    assert heard[1][1] == pytest.approx(start)
    assert heard[2][1] != pytest.approx(start * 1.4)  # trained in between
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "out.onnx"]
    y = reference(X)
    error = np.sqrt(np.sum((run(output, X) - y) ** 2) / np.sum((y - y.mean(axis=0)) ** 2))
    assert result.report.output_error is not None
    assert error < 0.2  # it would be more than half without training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "uniform:steps=2"}, "--schedule needs --retrain"),
        ({"schedule": "uniform:steps=2", "retrain": DATA}, "--schedule needs a pass with a goal"),
        ({"schedule": "sometimes", "retrain": DATA}, "--schedule 'sometimes' is no schedule"),
    ],
)
def test_bad_schedules(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        compress(path, "fold", **options)


def test_sizes_on_disk(path: Path) -> None:
    output = path.with_name("out.onnx")
    assert compress(path, [Scale(1.0001)]).report.files is None
    before, after = compress(path, [Scale(1.0001)], output=output).report.files
    assert (before.bytes, after.bytes) == (path.stat().st_size, output.stat().st_size)
    assert before.gzipped is after.gzipped is None

    class Packed(Scale):
        packed = True

    before, after = compress(path, [Packed(1.0001)], output=output).report.files
    assert 0 < after.gzipped < after.bytes
    assert 0 < before.gzipped < before.bytes


def test_a_dry_run_keeps_no_state(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxfuse.pytorch import checkpoint

    def never(*_: object) -> None:
        raise AssertionError("a dry run wrote a checkpoint")

    monkeypatch.setattr(checkpoint.Checkpoint, "save", never)
    output = path.with_name("out.onnx")
    result = compress(path, [Scale(1.3)], output=output, dry_run=True, retrain=DATA, epochs=1, lr=0.01)
    assert (result.ok, result.written) == (True, None)
    with pytest.raises(AssertionError, match="wrote a checkpoint"):
        compress(path, [Scale(1.3)], output=output, retrain=DATA, epochs=1, lr=0.01)


def test_a_recipe_that_retrains(path: Path) -> None:
    np.savez(path.with_name("train.npz"), x=X, labels=LABELS)
    recipe, data = path.with_name("recipe.yaml"), path.with_name("train.npz")
    recipe.write_text(f"passes: [fold]\nretrain: {{data: '{data}', epochs: 2, lr: 0.01}}\n")
    found = compress(path, None, recipe=recipe).report.retrainings[0]
    assert (found.epochs, found.lr) == (2, 0.01)
    found = compress(path, None, recipe=recipe, epochs=1, lr=0.02).report.retrainings[0]
    assert (found.epochs, found.lr) == (1, 0.02)
    recipe.write_text("passes: [fold]\nretrain: {epochs: 2}\n")
    with pytest.raises(InputError, match=r"option 'retrain.data' is required"):
        compress(path, None, recipe=recipe)
    recipe.write_text("passes: [fold]\nretrain: {data: a.npz, epochs: 0}\n")
    with pytest.raises(InputError, match=r"option 'retrain.epochs' .*, not 0"):
        compress(path, None, recipe=recipe)


def test_options_of_retraining_need_it(path: Path) -> None:
    with pytest.raises(InputError, match="--epochs needs --retrain"):
        compress(path, epochs=3)
    with pytest.raises(InputError, match="--lr needs --retrain"):
        compress(path, lr=0.1)
    with pytest.raises(InputError, match="--epochs must be at least 1, not 0"):
        compress(path, retrain=DATA, epochs=0)


def test_data_to_retrain_on_is_looked_at_before_any_pass_runs(path: Path) -> None:
    class Never(Refusing):
        def run(self, model: Model, context: Context) -> PassResult:
            raise AssertionError("a pass ran")

    with pytest.raises(InputError, match=r"no calibration data at 'none\.npz'"):
        compress(path, [Never(InputError("never"))], retrain="none.npz")
    with pytest.raises(InputError, match="input 'x' wants shape"):
        compress(path, [Never(InputError("never"))], retrain={"x": X[:, :5]})


def test_a_result_that_torch_refuses_is_exit_code_3(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxfuse.pytorch import retraining

    def refuse(*_: object, **__: object) -> None:
        raise NotApplicableError("there is no rule")

    monkeypatch.setattr(retraining, "to_torch", refuse)
    output, folder = path.with_name("out.onnx"), path.parent / "report"
    result = compress(path, [Scale(1.3)], output=output, report=folder, retrain=DATA)
    assert (result.exit_code, output.exists()) == (3, False)
    assert result.reason == "retraining: there is no rule"
    assert json.loads((folder / "report.json").read_text())["reason"] == result.reason


def test_compress_runs_in_one_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="compress runs in one process"):
        compress(path, retrain=DATA)


# --- significance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 1), (3, 9), (40, 40), (200, 150)])
def test_mcnemar(lost: int, won: int) -> None:
    before = np.r_[np.ones(lost), np.zeros(won), np.ones(30), np.zeros(10)]
    after = np.r_[np.zeros(lost), np.ones(won), np.ones(30), np.zeros(10)]
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(before, after) == pytest.approx(expected)


@pytest.mark.parametrize("binary", [True, False])
def test_paired_bootstrap(binary: bool) -> None:
    random = np.random.default_rng(5)
    before = random.random(400)
    after = before + random.normal(0.02, 0.1, 400)
    if binary:
        before, after = (before > 0.3).astype(float), (after > 0.3).astype(float)
    found = paired_difference(before, after)
    expected = stats.bootstrap(
        (after - before,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.difference == pytest.approx(float(np.mean(after - before)))
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)
    assert (found.p_value is not None) is binary
    assert found == paired_difference(before, after)


def test_unpaired_scores() -> None:
    with pytest.raises(ValueError, match="can't be paired"):
        paired_difference(np.zeros(3), np.zeros(4))


# --- inspect ------------------------------------------------------------------------------------------------


def test_inspect(path: Path) -> None:
    proto = network()
    proto.producer_name, proto.producer_version = "someone", "1.2"
    proto.metadata_props.add(key="classes", value="a,b,c,d")
    onnx.save(proto, path)
    found = api.inspect(path)
    assert (found.ir_version, found.opsets, found.producer) == (8, {"ai.onnx": 17}, "someone 1.2")
    assert found.metadata == {"classes": "a,b,c,d"}
    assert [info.name for info in (*found.inputs, *found.outputs)] == ["x", "y"]
    assert found.operators == {"MatMul": 2, "Identity": 1, "Relu": 1}
    assert (found.cost.parameters, found.cost.macs, found.cost.bytes) == (160, 160, 640)
    assert found.sizes == {"x": (1, 6)}
    assert [(op.name, op.in_features, op.out_features, op.macs) for op in found.linear] == [
        ("h", 6, 16, 96),
        ("y", 16, 4, 64),
    ]
    assert [op.share for op in found.linear] == pytest.approx([0.6, 0.4])
    assert [(region.u, region.v, region.linear_ops) for region in found.regions] == [("x", "y", 2)]
    assert found.latency is not None
    assert found.warnings == ()


def test_inspect_without_a_run(path: Path) -> None:
    proto = network()
    proto.graph.node[1].domain = "acme"
    proto.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    found = api.inspect(proto)
    assert found.operators["acme::Relu"] == 1
    assert (found.cost.macs, found.latency, found.sizes) == (None, None, {})
    assert len(found.warnings) == 1
    assert len(found.linear) == 2
    assert api.inspect(path, measure_latency=False).latency is None


def test_inspect_warns_of_weights_that_are_no_numbers() -> None:
    found = api.inspect(network(w1=np.full_like(W1, np.nan)))
    assert any("NaN" in warning for warning in found.warnings)


def test_inspect_counts_the_nodes_of_bodies() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x, bool flag) => (float[2] y) {
        y = If (flag) <then_branch = a () => (float[2] p) { p = Relu(x) },
                       else_branch = b () => (float[2] q) { q = Neg(x) }>
    }"""
    assert api.inspect(onnx.parser.parse_model(text)).operators == {"If": 1, "Neg": 1, "Relu": 1}


# --- verify and diff ----------------------------------------------------------------------------------------


def test_verify(path: Path) -> None:
    folded = compress(path).model
    same = api.verify(path, folded, calib={"x": X})
    assert (same.passed, same.reason, same.divergence) == (True, None, None)
    other = api.verify(path, network(w2=W2 * np.float32(1.01)), calib={"x": X})
    assert not other.passed
    assert other.divergence is not None
    assert other.divergence.tensor == "y"
    (output,) = other.comparison.outputs
    y = reference(np.concatenate([X[:1], X[:3], X]))  # batches of one and of three, then all
    expected = 0.01 * np.sqrt(np.sum(y**2) / np.sum((y - y.mean(axis=0)) ** 2))
    assert output.relative == pytest.approx(expected, rel=1e-3)
    assert api.verify(path, network(w2=W2 * np.float32(1.01)), calib={"x": X}, max_error=2 * expected).passed
    tight = api.verify(path, network(w2=W2 * np.float32(1.01)), calib={"x": X}, max_error=0.5 * expected)
    assert "above" in str(tight.reason)


def test_verify_of_nan_and_interfaces(path: Path) -> None:
    nan = api.verify(path, network(w2=np.full_like(W2, np.nan)), max_error=10.0)
    assert "NaN" in str(nan.reason)
    assert nan.warnings[0] == api.MADE_UP
    other = api.verify(
        path, network(TEXT.replace("y = MatMul", "z = MatMul").replace("] y)", "] z)")), max_error=10.0
    )
    assert (other.passed, other.comparison.outputs) == (False, ())
    assert "output 'y'" in str(other.reason)


def test_diff(path: Path) -> None:
    text = TEXT.replace("r = Relu(h)", "r = LeakyRelu<alpha = 0.5>(h)").replace("i = Identity(r)\n", "")
    w2 = W2.copy()
    w2[0] *= 2
    found = api.diff(path, network(text.replace("MatMul(i", "MatMul(r"), w2=w2), calib={"x": X})
    structure = found.structure
    assert [(node.key, node.op) for node in structure.only_a] == [("i", "Identity")]
    assert structure.only_b == ()
    assert structure.same == 1
    relu, last = structure.changed
    assert (relu.key, relu.what) == ("r", ("operator Relu -> LeakyRelu", "alpha none -> 0.5"))
    assert last.what == ("input 0 'i' -> 'r'",)
    (weight,) = last.weights
    assert weight.relative == pytest.approx(np.linalg.norm(W2[0]) / np.linalg.norm(W2), rel=1e-6)
    assert [found.costs[0].nodes, found.costs[1].nodes] == [4, 3]
    assert found.outputs is not None
    assert found.outputs.outputs[0].relative > 0.01


def test_diff_of_shapes_attributes_and_models_that_do_not_run(path: Path) -> None:
    wide = network(w1=np.hstack([W1, W1]), w2=np.vstack([W2, W2]))
    first = api.diff(path, wide).structure.changed[0].weights[0]
    assert (first.shape_a, first.shape_b, first.relative) == ((6, 16), (6, 32), None)
    same = api.diff(path, network())
    assert (same.structure.changed, same.structure.same) == ((), 4)
    strange = network()
    strange.graph.node[1].domain = "acme"
    strange.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    found = api.diff(path, strange)
    assert found.outputs is None
    assert any(warning.startswith("the outputs are not compared: ") for warning in found.warnings)
    assert found.structure.changed[0].what == ("operator Relu -> acme::Relu",)


# --- passes and the package ---------------------------------------------------------------------------------


def test_passes() -> None:
    found = {info.name: info for info in api.passes()}
    assert {"fold", "fuse", "refit"} <= found.keys()
    assert (found["fold"].contract, found["fuse"].contract) == ("exact", "approximate")
    option = next(option for option in found["fuse"].options if option.name == "max_blocks")
    assert (option.type, option.default) == ("int | None", "None")
    for info in found.values():
        assert info.summary
        assert onnxfuse.recipe.parse_recipe(info.example)


def test_package_exports() -> None:
    assert onnxfuse.compress is api.compress
    assert onnxfuse.Model is Model
    assert onnxfuse.__version__
    assert set(dir(onnxfuse)) == set(onnxfuse.__all__)
    for name in onnxfuse.__all__:
        assert getattr(onnxfuse, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnxfuse.nothing
