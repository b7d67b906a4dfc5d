"""`compress`: what it decides, and that the figures it reports are right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from runs import LABELS, W2, Refusing, Scale, X, compress, held_out, network, reference, run, timed

from onnxfuse.commands.compress import SLOWER
from onnxfuse.commands.loading import MADE_UP
from onnxfuse.data.calibration import Batch, BatchStream, Calibration
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.significance import mcnemar
from onnxfuse.pipeline.base import Context, PassResult
from onnxfuse.pipeline.recipe import parse_recipe
from onnxfuse.results import as_json
from onnxfuse.runtime.latency import Stopwatch
from onnxfuse.runtime.session import Session


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
    report = compress(path, [Scale(1.05), *parse_recipe("fold")]).report
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
    won, lost = int(np.sum(after > before)), int(np.sum(after < before))
    assert scores.p_value == pytest.approx(mcnemar(won, lost))


def test_labels_that_are_no_classes_are_left_alone(path: Path) -> None:
    report = compress(path, calib={"x": X, "labels": X[:, :1]}).report
    assert report.metric is None
    assert any(warning.startswith("the labels are not used: ") for warning in report.warnings)


def test_samples_that_prove_nothing_are_refused(path: Path) -> None:
    for x, said in (
        (np.repeat(X[:1], 200, 0), "all 200 samples are the same"),
        (X[:2], "1 of 2 samples is held out"),
    ):
        with pytest.raises(InputError, match=said):
            compress(path, [Scale(1.05)], calib={"x": x})
        assert compress(path, calib={"x": x}).report.warnings  # nothing is fitted
    report = compress(path, [Scale(1.05)], calib={"x": X[:20]}).report
    assert any(warning.startswith("FEW SAMPLES: 4 of 20") for warning in report.warnings)


def test_labels_at_chance_level_are_a_warning_and_hold_no_drop(path: Path) -> None:
    labels = np.random.default_rng(2).integers(0, 4, len(X))
    report = compress(path, calib={"x": X, "labels": labels}).report
    assert any(warning.startswith("NO BETTER THAN CHANCE") for warning in report.warnings)
    with pytest.raises(InputError, match="--max-drop can't be held: NO BETTER THAN CHANCE"):
        compress(path, calib={"x": X, "labels": labels}, max_drop=0.1)


def test_max_drop(path: Path) -> None:
    output = path.with_name("out.onnx")
    result = compress(path, [Scale(-1.0)], max_drop=0.1, output=output)
    assert (result.exit_code, result.written) == (1, None)
    assert str(result.reason).startswith("top1 drops by ")
    np.testing.assert_array_equal(result.model.weight(result.model.tensor("w2")), W2)
    assert not output.exists()
    assert compress(path, [Scale(-1.0)], max_drop=0.99, output=output).ok


def test_max_drop_is_held_by_the_interval(path: Path) -> None:
    """No loss on 40 samples does not show that less than a hundredth is lost."""
    close = [Scale(1.0001)]
    result = compress(path, close, max_drop=0.01)
    assert (result.exit_code, str(result.reason).split(" held-out")[0]) == (
        1,
        "top1 may drop by 0.0876, more than --max-drop 0.01: on 40",
    )
    assert compress(path, close, max_drop=0.09).ok
    assert compress(path, close, max_drop=0.07, confidence=0.9).ok
    point = compress(path, close, max_drop=0.01, confidence="none")
    assert point.ok
    assert any("finer than 40 held-out samples tell" in warning for warning in point.report.warnings)
    proved = compress(path, "fold", max_drop=0.0)
    assert proved.ok
    assert not any("--max-drop" in warning for warning in proved.report.warnings)


def test_labels_are_not_needed(path: Path) -> None:
    bare = {"x": X}
    x, _ = held_out(path)
    report = compress(path, [Scale(-1.0)], metric="agreement", calib=bare).report
    expected = np.mean(reference(x).argmax(axis=1) == reference(x, -1.0).argmax(axis=1))
    assert report.metric is not None
    assert (report.metric.scores.before, report.metric.scores.after) == (1, pytest.approx(expected))
    result = compress(path, [Scale(-1.0)], metric="cosine", max_drop=0.5, calib=bare)
    assert str(result.reason).startswith("cosine drops by 2, from 1 to -1")
    with pytest.raises(InputError, match="or a metric that needs none: --metric agreement"):
        compress(path, max_drop=0.1, calib=bare)


def test_a_recipe_may_ask_for_a_drop(path: Path) -> None:
    recipe = path.with_name("recipe.yaml")
    recipe.write_text(
        "passes: [{fuse: {max_blocks: 1}}]\nmetric: agreement\nmax_drop: 0.9\nconfidence: none\n"
    )
    metric = compress(path, None, recipe=recipe).report.metric
    assert metric is not None
    assert (metric.name, metric.max_drop, metric.held_by) == ("agreement", 0.9, "change")
    metric = compress(path, None, recipe=recipe, confidence=0.8).report.metric
    assert metric is not None
    assert (metric.held_by, metric.scores.confidence) == ("interval", 0.8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_drop": 1.0}, "for 1 % write --max-drop 0.01"),
        ({"max_drop": 5, "metric": "agreement"}, "agreement is at most 1; for 5 % write --max-drop 0.05"),
        ({"max_error": 5}, "for 5 % write --max-error 0.05"),
        ({"confidence": 95}, "for 95 % write --confidence 0.95"),
        ({"confidence": "sure"}, "or none, not sure"),
        ({"confidence": 0.05}, "from 0.5 to 1"),
    ],
)
def test_units(given: dict[str, Any], said: str, path: Path) -> None:
    with pytest.raises(InputError, match=said):
        compress(path, **given)


def test_other_metrics_have_units_of_their_own(path: Path) -> None:
    assert compress(path, metric="nll", max_drop=5.0).ok


def test_a_metric_of_the_users(path: Path) -> None:
    script = path.with_name("metric.py")
    script.write_text("def size(outputs, labels):\n    return -abs(outputs['y']).sum(axis=1)\n")
    report = compress(path, [Scale(1.05)], metric=f"{script}:size", calib={"x": X}).report
    x, _ = held_out(path)
    assert report.metric is not None
    assert report.metric.scores.before == pytest.approx(-np.abs(reference(x)).sum(axis=1).mean(), rel=1e-5)
    assert report.metric.scores.after == pytest.approx(1.05 * report.metric.scores.before, rel=1e-5)
    assert report.metric.scores.test == "t"


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


def test_where_nothing_changes_one_sample_is_run_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To see whether the model runs on so few; nothing is timed, and the samples are not read through."""
    folded = compress(path, "fold").model
    rows: list[int] = []
    read: list[int] = []
    run, batches = Session.run, BatchStream.__iter__

    def counting(self: Session, feed: Feed, outputs: Sequence[str] | None = None) -> Feed:
        rows.append(len(feed["x"]))
        return run(self, feed, outputs)

    def reading(self: BatchStream) -> Iterator[Batch]:
        for batch in batches(self):
            read.append(batch.samples)
            yield batch

    monkeypatch.setattr(Session, "run", counting)
    monkeypatch.setattr(Session, "bind", None)
    monkeypatch.setattr(BatchStream, "__iter__", reading)
    assert compress(folded, "fold", calib={"x": X}, batch_size=32).exit_code == 3
    assert rows == [1]
    assert read == [32]


def test_nothing_to_do_is_exit_code_3(path: Path) -> None:
    once = compress(path).model
    result = compress(once, output=path.with_name("out.onnx"))
    assert (result.exit_code, result.written) == (3, None)
    assert str(result.reason).startswith("no pass changed the model (fold: ")


@pytest.mark.parametrize(("ratio", "slower"), [(1.2, True), (1.005, False), (0.8, False)])
def test_a_slower_result_is_never_silent(
    ratio: float, slower: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "latency", lambda _: timed(ratio))
    report = compress(path).report
    assert report.slower is slower
    assert any(SLOWER in warning for warning in report.warnings) is slower


def test_latency_is_taken_after_passes_that_change_something_and_at_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Heard(Scale):
        def run(self, model: Model, context: Context) -> PassResult:
            said.append("pass")
            return super().run(model, context)

    real = Stopwatch._block

    def noted(self: Stopwatch, others: Sequence[Model]) -> Any:
        said.append(" ".join(node.op for model in others for node in model.nodes) or "control")
        return real(self, others)

    monkeypatch.setattr(Stopwatch, "_block", noted)
    result = compress(path, [Heard(1.0001), "fold"])
    made = " ".join(node.op for node in result.model.nodes)
    assert said == ["pass", "control", "control", *4 * [made]]
    assert result.report.latency is not None
    before, after = result.report.latency.timings
    assert after.ratio == pytest.approx(after.median_ms / before.median_ms, rel=1e-9)
    assert (result.report.latency.threads, result.report.latency.blocks) == (1, 4)


def test_made_up_samples_are_never_silent(path: Path) -> None:
    report = compress(path, calib=None).report
    assert report.samples.synthetic
    assert report.warnings[0] == MADE_UP


def test_a_recipe_and_what_beats_it(path: Path) -> None:
    recipe = path.with_name("recipe.yaml")
    recipe.write_text("passes: [{fuse: {max_blocks: 1}}]\nmax_error: 1.0e-6\nseed: 7\n")
    result = compress(path, None, recipe=recipe)
    assert (result.exit_code, result.report.seed, result.report.output_bound) == (1, 7, 1e-6)
    assert compress(path, None, recipe=recipe, max_error=1.0, seed=8).report.seed == 8
    assert compress(path, None, recipe=recipe, max_error=1.0).ok
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
    assert (content["onnxfuse"], content["format"], content["exit_code"]) == ("compress", 3, 0)
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


# --- memory -------------------------------------------------------------------------------------------------


def test_the_budget_is_in_the_report_and_decides_the_batches() -> None:
    wide = network(
        """<ir_version: 8, opset_import: ["" : 17]> wide (float[N,S,6] x) => (float[N,S,4] y)
        { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"""
    )
    samples = np.random.default_rng(0).standard_normal((12, 300, 6)).astype(np.float32)
    found = []
    for memory in ("1MB", "1GB"):
        result = compress(wide, "prune:amount=0.3", calib=samples, memory=memory)
        facts = as_json(result.report, "compress")["samples"]
        found.append((facts["memory"], facts["batch"]))

    assert [memory for memory, _ in found] == [10**6, 10**9]
    assert found[0][1] < 6 < found[1][1]


def test_what_is_no_size_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"memory must be a size such as 512MB or 1\.5GB, not 'much'"):
        compress(path, memory="much")
