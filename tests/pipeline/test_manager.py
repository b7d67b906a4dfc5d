"""Passes that keep their contract and passes that break it, each by a little: the manager must tell them
apart."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import pydantic
import pytest
from onnx import numpy_helper
from rich.console import Console

from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.findings import Change, Prediction, Skip
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult
from onnxfuse.pipeline.discovery import _entries, discover, load_pass, pass_names
from onnxfuse.pipeline.instruments import Dumps, Instrument, JournalFile, RichProgress, json_value
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.records import StepReport
from onnxfuse.runtime.session import Runtime

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
mlp (float[N,6] x) => (float[N,4] y) {
    h = MatMul(x, w1)
    r = Relu(h)
    y = MatMul(r, w2)
}"""
RANDOM = np.random.default_rng(7)
W1, W2 = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((6, 16), (16, 4)))
X = RANDOM.standard_normal((100, 6)).astype(np.float32)


@pytest.fixture
def model() -> Model:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.extend([numpy_helper.from_array(W1, "w1"), numpy_helper.from_array(W2, "w2")])
    return Model.load(proto)


@pytest.fixture
def context(model: Model) -> Context:
    return Context(model, Calibration.open({"x": X}, model, batch_size=20), Runtime("cpu", threads=2))


Rewrite = Callable[[Model, Context], PassResult]


def make(contract: Contract, rewrite: Rewrite, name: str = "sample") -> Pass:
    """A pass from one function."""

    class Sample(Pass):
        summary = "a pass for tests"

        def run(self, model: Model, context: Context) -> PassResult:
            return rewrite(model, context)

    Sample.name = name
    sample = Sample()
    sample.contract = contract
    return sample


def scaled(factor: float, *, weights: tuple[str, ...] = ("w2",), **result: object) -> Rewrite:
    """Multiplies weights; says that it changed them."""

    def rewrite(model: Model, context: Context) -> PassResult:
        for name in weights:
            tensor = model.tensor(name)
            value = model.weight(tensor)
            assert value is not None
            model.set_weight(tensor, (value * np.float32(factor)).astype(np.float32))
        return PassResult(model, [Change(("node",), f"scaled by {factor}")], **result)  # type: ignore[arg-type]

    return rewrite


def first_weight(model: Model) -> np.ndarray:
    value = model.weight(model.tensor("w2"))
    assert value is not None
    return value


def run_one(pass_: Pass, model: Model, context: Context) -> tuple[Model, StepReport]:
    outcome = PassManager([pass_]).run(model, context)
    (step,) = outcome.steps
    return outcome.model, step


def assert_rolled_back(found: Model, step: StepReport, model: Model, reason: str, exit_code: int = 1) -> None:
    assert not step.committed
    assert step.exit_code == exit_code
    assert reason in (step.reason or "")
    assert found is model
    np.testing.assert_array_equal(first_weight(model), W2)
    assert step.before == step.after


# --- EXACT --------------------------------------------------------------------------------------------------


def doubled_and_halved(model: Model, context: Context) -> PassResult:
    """Twice the weights, half of the product: the same function in another order of rounding."""
    node = model.nodes[-1]
    weight = model.add_weight("w2_tripled", W2 * np.float32(3))
    third = model.add_weight("third", np.float32(1 / 3))
    output = node.outputs[0]
    node.outputs.clear()
    model.remove([node])
    (product,) = model.add_node(
        "MatMul", [node.inputs[0] if node.inputs else model.tensor("r"), weight], ["p"], by="t"
    ).outputs
    model.add_node("Mul", [product, third], [output], by="t")
    return PassResult(model, [Change((node.name,), "split a product")], [Skip(("other",), "not linear")])


def test_an_exact_pass_that_keeps_its_contract_is_committed(model: Model, context: Context) -> None:
    found, step = run_one(make(Contract.EXACT, doubled_and_halved), model, context)
    assert step.committed
    assert step.reason is None
    assert step.exit_code == 0
    assert [node.op for node in found.nodes] == ["MatMul", "Relu", "MatMul", "Mul"]
    assert [node.op for node in model.nodes] == ["MatMul", "Relu", "MatMul"]
    assert step.verification is not None
    assert step.verification.comparison is not None
    assert step.verification.comparison.batch_sizes == (1, 3, 20, 12)
    assert step.changes[0].what == "split a product"
    assert step.skipped == (Skip(("other",), "not linear"),)
    assert step.before.macs == 6 * 16 + 16 * 4
    assert step.after.parameters == step.before.parameters + 1


def test_an_exact_pass_that_is_wrong_by_a_little_is_rolled_back(model: Model, context: Context) -> None:
    found, step = run_one(make(Contract.EXACT, scaled(1 + 1e-4)), model, context)
    assert_rolled_back(found, step, model, "output 'y' differs by")
    assert "first at tensor 'y' (MatMul" in (step.reason or "")


def test_an_exact_pass_that_makes_nan_is_rolled_back(model: Model, context: Context) -> None:
    found, step = run_one(make(Contract.EXACT, scaled(np.inf)), model, context)
    assert_rolled_back(found, step, model, "has NaN in")


def test_a_pass_that_leaves_an_invalid_graph_is_rolled_back(model: Model, context: Context) -> None:
    def rewrite(model: Model, context: Context) -> PassResult:
        model.nodes[1].inputs.clear()
        return PassResult(model, [Change((), "cut a wire")])

    found, step = run_one(make(Contract.EXACT, rewrite), model, context)
    assert_rolled_back(found, step, model, "no valid ONNX model")


def test_a_pass_that_does_not_load_is_rolled_back(model: Model, context: Context) -> None:
    def rewrite(model: Model, context: Context) -> PassResult:
        model.set_weight(model.tensor("w2"), np.ones((15, 4), np.float32))
        return PassResult(model, [Change((), "wrong size")])

    found, step = run_one(make(Contract.EXACT, rewrite), model, context)
    assert_rolled_back(found, step, model, "ONNX Runtime")


# --- MASKED -------------------------------------------------------------------------------------------------


def without_channel(model: Model, channel: int) -> Model:
    """The model with one hidden channel times zero."""
    masked = model.copy()
    value = first_weight(masked).copy()
    value[channel] = 0
    masked.set_weight(masked.tensor("w2"), value)
    return masked


@pytest.mark.parametrize(
    ("declared", "reason"), [(3, None), (4, "output 'y' differs"), (None, "no masked model")]
)
def test_a_masked_pass_equals_the_model_it_declares(
    declared: int | None, reason: str | None, model: Model, context: Context
) -> None:
    def rewrite(model: Model, context: Context) -> PassResult:
        oracle = None if declared is None else without_channel(model, declared)
        keep = np.arange(16) != 3
        model.set_weight(model.tensor("w1"), np.ascontiguousarray(W1[:, keep]))
        model.set_weight(model.tensor("w2"), np.ascontiguousarray(W2[keep]))
        return PassResult(model, [Change((), "removed channel 3")], oracle=oracle)

    found, step = run_one(make(Contract.MASKED, rewrite), model, context)
    if reason is None:
        assert step.committed, step.reason
        assert first_weight(found).shape == (15, 4)
        assert step.after.parameters == step.before.parameters - 10
    else:
        assert_rolled_back(found, step, model, reason)


# --- APPROXIMATE --------------------------------------------------------------------------------------------


def fit_rows(context: Context) -> np.ndarray:
    return np.concatenate([batch.feed["x"] for batch in context.calibration.fit]).astype(np.float64)


def shrunk(context: Context, factor: float, claimed: float = 1.0) -> Rewrite:
    """Multiplies the last weight by `factor` and predicts `claimed` times the error that this makes."""
    y = np.maximum(fit_rows(context) @ W1, 0) @ W2
    error = float((((1 - factor) * y) ** 2).sum(axis=1).mean())
    variance = float(((y - y.mean(axis=0)) ** 2).sum(axis=1).mean())
    return scaled(factor, predictions=[Prediction("y", "y", claimed * error, variance)])


def test_an_approximate_pass_whose_prediction_holds_is_committed(model: Model, context: Context) -> None:
    found, step = run_one(make(Contract.APPROXIMATE, shrunk(context, 0.9)), model, context)
    assert step.committed, step.reason
    assert step.verification is not None
    (check,) = step.verification.predictions
    assert check.measured == pytest.approx(check.predicted, rel=1e-4)
    assert step.verification.output_error is not None
    assert step.verification.output_error.samples == context.calibration.held_out.samples > 0
    assert 0.05 < step.verification.output_error.worst < 0.3
    np.testing.assert_allclose(first_weight(found), 0.9 * W2, rtol=1e-6)


@pytest.mark.parametrize("claimed", [0.99, 1.01, 0.0, -1.0, float("nan")])
def test_a_wrong_prediction_is_rolled_back(claimed: float, model: Model, context: Context) -> None:
    found, step = run_one(make(Contract.APPROXIMATE, shrunk(context, 0.9, claimed)), model, context)
    assert_rolled_back(found, step, model, "tensor 'y': predicted a mean squared error of")


def test_a_change_without_a_prediction_is_rolled_back(model: Model, context: Context) -> None:
    found, step = run_one(make(Contract.APPROXIMATE, scaled(0.9)), model, context)
    assert_rolled_back(found, step, model, "predicted no error")


def test_an_error_above_the_budget_is_rolled_back_and_one_below_is_not(
    model: Model, context: Context
) -> None:
    context.max_error = 0.05
    found, step = run_one(make(Contract.APPROXIMATE, shrunk(context, 0.9)), model, context)
    assert_rolled_back(found, step, model, "above the allowed 0.05")
    assert "held-out" in (step.reason or "")
    _, step = run_one(make(Contract.APPROXIMATE, shrunk(context, 0.98)), model, context)
    assert step.committed, step.reason


def test_outputs_that_do_not_vary_prove_nothing(model: Model, context: Context) -> None:
    one = next(iter(context.calibration.fit)).feed["x"][:1]
    context.calibration = Calibration.open({"x": np.repeat(one, 64, 0)}, model)
    found, step = run_one(make(Contract.APPROXIMATE, shrunk(context, 0.9)), model, context)
    assert_rolled_back(found, step, model, "the outputs are the same for all held-out samples")


def test_a_change_that_the_samples_do_not_show_is_rolled_back(model: Model, context: Context) -> None:
    """A dead Relu hides everything before it from the outputs, on these samples."""
    proto = model.to_proto()
    proto.graph.initializer.append(numpy_helper.from_array(np.full((1, 16), -1e6, np.float32), "far"))
    proto.graph.node.insert(1, onnx.helper.make_node("Add", ["h", "far"], ["dead"]))
    proto.graph.node[2].input[0] = "dead"
    hidden = Model.load(proto)
    context.original = hidden
    h = np.concatenate([batch.feed["x"] @ W1 for batch in context.calibration.fit])
    error, variance = float(np.mean(np.sum((0.1 * h) ** 2, axis=1))), float(np.sum(h.var(axis=0)))
    claims = [Prediction("h", "h", error, variance)]
    found, step = run_one(
        make(Contract.APPROXIMATE, scaled(0.9, weights=("w1",), predictions=claims)), hidden, context
    )
    assert_rolled_back(found, step, hidden, "nothing is proved")
    claims = [Prediction("h", "h", 1e-16 * error, variance)]
    _, step = run_one(
        make(Contract.APPROXIMATE, scaled(1.0, weights=("w1",), predictions=claims)), hidden, context
    )
    assert step.committed, step.reason


def test_predictions_refer_to_the_original_and_not_to_the_model_before(
    model: Model, context: Context
) -> None:
    first = make(Contract.APPROXIMATE, shrunk(context, 0.9))
    for claimed, committed in (
        (1.0, False),
        ((0.19 / 0.1) ** 2, True),
    ):  # the second makes it 0.81 of the original
        second = make(Contract.APPROXIMATE, shrunk(context, 0.9, claimed))
        outcome = PassManager([first, second]).run(model, context)
        assert [step.committed for step in outcome.steps] == [True, committed]


# --- transactions -------------------------------------------------------------------------------------------


def test_a_refusal_is_rolled_back_with_its_exit_code_and_the_next_pass_runs(
    model: Model, context: Context
) -> None:
    def refuse(model: Model, context: Context) -> PassResult:
        model.remove([model.nodes[-1]])
        raise NotApplicableError("nothing here is linear")

    passes = [make(Contract.EXACT, refuse, "a"), make(Contract.EXACT, doubled_and_halved, "b")]
    outcome = PassManager(passes).run(model, context)
    first, second = outcome.steps
    assert (first.committed, first.reason, first.exit_code) == (False, "nothing here is linear", 3)
    assert first.verification is None
    assert second.committed
    assert len(outcome.model.nodes) == 4


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_bugs_and_interrupts_propagate_and_leave_the_model_alone(
    error: type[BaseException], model: Model, context: Context
) -> None:
    heard: list[str] = []

    class Ears(Instrument):
        def finished(self) -> None:
            heard.append("finished")

    def rewrite(model: Model, context: Context) -> PassResult:
        scaled(2.0)(model, context)
        raise error

    with pytest.raises(error):
        PassManager([make(Contract.EXACT, rewrite)], [Ears()]).run(model, context)
    assert heard == ["finished"]
    np.testing.assert_array_equal(first_weight(model), W2)


def copied_weight(model: Model, context: Context) -> PassResult:
    """w2 twice: as it is in one Add, and as it was."""
    node = model.nodes[-1]
    half = np.float32(0.5)
    weight = first_weight(model)
    other = model.add_weight("w2_copy", weight * half)
    model.set_weight(node.inputs[1], weight * half)
    y, r = node.outputs[0], node.inputs[0]
    node.outputs.clear()
    parts = [
        model.add_node("MatMul", [r, w], [n], by="sample") for w, n in ((node.inputs[1], "a"), (other, "b"))
    ]
    model.remove([node])
    model.add_node("Add", [part.outputs[0] for part in parts], [y], by="sample")
    return PassResult(model, [Change(("node",), "halved")])


@pytest.mark.parametrize("grows", [False, True])
def test_a_pass_that_makes_the_model_larger_is_loud_unless_that_is_its_job(
    grows: bool, model: Model, context: Context
) -> None:
    pass_ = make(Contract.EXACT, copied_weight)
    type(pass_).grows = grows
    _, step = run_one(pass_, model, context)
    assert step.committed
    assert (step.before.parameters, step.after.parameters) == (160, 224)
    said = "warning: THE MODEL GREW: 160 parameters became 224 and 640 bytes of weights became 896"
    assert step.notes == (() if grows else (said,))


def test_a_pass_that_reports_no_change_changes_nothing(model: Model, context: Context) -> None:
    def rewrite(model: Model, context: Context) -> PassResult:
        model.set_weight(model.tensor("w2"), W2 * 2)
        return PassResult(model, skipped=[Skip(("n",), "no region")], notes=["nothing to do"])

    found, step = run_one(make(Contract.EXACT, rewrite), model, context)
    assert found is model
    assert step.committed
    assert step.verification is None
    assert step.skipped[0].reason == "no region"
    assert step.notes == ("nothing to do",)


def test_each_pass_gets_what_the_last_committed_one_left(model: Model, context: Context) -> None:
    seen: list[float] = []

    def look(model: Model, context: Context) -> PassResult:
        seen.append(float(first_weight(model)[0, 0] / W2[0, 0]))
        return PassResult(model)

    approximate = make(Contract.APPROXIMATE, shrunk(context, 0.5))
    wrong = make(Contract.EXACT, scaled(3.0))
    PassManager([make(Contract.EXACT, look), approximate, wrong, make(Contract.EXACT, look)]).run(
        model, context
    )
    assert seen == pytest.approx([1.0, 0.5])


# --- options and discovery ----------------------------------------------------------------------------------


class Numbered(Pass):
    """A pass with an option."""

    name = "numbered"
    summary = "for tests"
    contract = Contract.EXACT

    class Options(PassOptions):
        kernel: int = pydantic.Field(3, ge=1)

    def run(self, model: Model, context: Context) -> PassResult:
        return PassResult(model)


def test_options_are_validated_however_they_are_given() -> None:
    assert Numbered().options.model_dump() == {"kernel": 3}
    assert Numbered(kernel=5).options == Numbered(Numbered.Options(kernel=5)).options
    for bad in ({"kernel": 0}, {"kernal": 3}):
        with pytest.raises(pydantic.ValidationError):
            Numbered(**bad)


class FakeEntry:
    """What importlib.metadata gives for an entry point."""

    def __init__(self, name: str, value: str, target: object) -> None:
        self.name, self.value, self.target = name, value, target

    def load(self) -> object:
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[FakeEntry]:
    entries: list[FakeEntry] = [FakeEntry("numbered", "a:Numbered", Numbered)]
    monkeypatch.setattr(
        "onnxfuse.pipeline.discovery.entry_points",
        lambda group: entries if group == "onnxfuse.passes" else [],
    )
    _entries.cache_clear()
    yield entries
    _entries.cache_clear()


def test_passes_are_found_by_entry_point(installed: list[FakeEntry]) -> None:
    assert discover() == {"numbered": Numbered}
    with pytest.raises(InputError, match=r"no pass 'numberd'; did you mean 'numbered'\? known: numbered"):
        load_pass("numberd")


def test_broken_plugins_are_named_and_harm_no_other_pass(installed: list[FakeEntry]) -> None:
    installed += [FakeEntry("broken", "b:B", ImportError("no module c")), FakeEntry("list", "c:C", list)]
    assert pass_names() == ["broken", "list", "numbered"]
    assert load_pass("numbered") is Numbered
    with pytest.raises(InputError, match=r"pass 'broken' \(b:B\) cannot be loaded: no module c"):
        load_pass("broken")
    with pytest.raises(InputError, match="is not an onnxfuse"):
        load_pass("list")


def test_two_packages_with_one_pass_name_are_refused(installed: list[FakeEntry]) -> None:
    installed.append(FakeEntry("numbered", "b:Other", Numbered))
    with pytest.raises(InputError, match="two installed packages have a pass 'numbered'"):
        pass_names()


# --- instruments --------------------------------------------------------------------------------------------


def test_dumps_are_numbered_and_hold_committed_passes_only(
    model: Model, context: Context, tmp_path: Path
) -> None:
    passes = [
        make(Contract.EXACT, doubled_and_halved, "fold"),
        make(Contract.EXACT, scaled(3.0, weights=("w1",)), "wrong"),
        make(Contract.EXACT, lambda model, context: PassResult(model), "idle"),
    ]
    folder = tmp_path / "new" / "dumps"
    PassManager(passes, [Dumps(folder)]).run(model, context)
    assert sorted(path.name for path in folder.iterdir()) == [
        "000_input.onnx",
        "001_fold.onnx",
        "003_idle.onnx",
    ]
    assert len(onnx.load(folder / "001_fold.onnx").graph.node) == 4


def test_the_journal_is_json_lines_of_what_happened(model: Model, context: Context, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = JournalFile(path)
    context.journal = journal

    def rewrite(model: Model, context: Context) -> PassResult:
        context.journal("ridge", tensor="v", ridge=float(np.float32(0.5)), lost=float("nan"))
        return shrunk(context, 0.9)(model, context)

    passes = [make(Contract.APPROXIMATE, rewrite), make(Contract.EXACT, scaled(2.0), "wrong")]
    PassManager(passes, [journal]).run(model, context)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["pass"], line["event"]) for line in lines] == [
        ("sample", "start"),
        ("sample", "ridge"),
        ("sample", "end"),
        ("wrong", "start"),
        ("wrong", "end"),
    ]
    assert lines[1]["ridge"] == 0.5
    assert lines[1]["lost"] is None
    assert lines[2]["committed"] is True
    assert lines[2]["contract"] == "approximate"
    assert lines[2]["verification"]["predictions"][0]["tensor"] == "y"
    assert lines[4]["committed"] is False
    assert lines[4]["verification"]["divergence"]["tensor"] == "y"
    times = [line["at"] for line in lines]
    assert times == sorted(times)


def test_places_that_cannot_be_written_are_one_line_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        Dumps(tmp_path / "file" / "folder")
    with pytest.raises(InputError, match="cannot write the journal"):
        JournalFile(tmp_path)


def test_seconds_count_for_every_pass(model: Model, context: Context) -> None:
    idle = make(Contract.EXACT, lambda model, context: PassResult(model), "idle")
    start = time.perf_counter()
    steps = PassManager([idle, idle]).run(model, context).steps
    assert [step.name for step in steps] == ["idle", "idle"]
    assert time.perf_counter() - start >= sum(step.seconds for step in steps) > 0
    assert all(step.seconds > 0 and step.verify_seconds >= 0 for step in steps)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_only(terminal: bool, model: Model, context: Context) -> None:
    screen = io.StringIO()
    progress = RichProgress(Console(file=screen, force_terminal=terminal, width=80))
    context.progress = progress

    def rewrite(model: Model, context: Context) -> PassResult:
        advance = context.progress.task("moments", total=2)
        advance()
        advance(0.5)
        progress._bars.refresh()
        return PassResult(model)

    PassManager([make(Contract.EXACT, rewrite, "slow")], [progress]).run(model, context)
    shown = screen.getvalue()
    assert ("moments" in shown and "pass slow" in shown) if terminal else shown == ""


def test_nobody_watching_is_fine(context: Context) -> None:
    advance = context.progress.task("moments", total=2)
    advance()
    context.journal("event", figure=1)


def test_plain_makes_json_of_reports() -> None:
    value = {"a": np.float32(0.5), "b": np.array([1, 2]), "c": (float("inf"), Contract.EXACT), 4: None}
    assert json_value(value) == {"a": 0.5, "b": [1, 2], "c": [None, "exact"], "4": None}


class Declared(Pass):
    """Its contract depends on its options."""

    name: ClassVar[str] = "declared"
    summary: ClassVar[str] = "for tests"

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        self.contract = contract

    def run(self, model: Model, context: Context) -> PassResult:
        return scaled(0.9)(model, context)


def test_the_contract_is_the_instances(model: Model, context: Context) -> None:
    reasons = [run_one(Declared(contract), model, context)[1].reason or "" for contract in Contract]
    assert "differs by" in reasons[0]
    assert "no masked model" in reasons[1]
    assert "predicted no error" in reasons[2]
