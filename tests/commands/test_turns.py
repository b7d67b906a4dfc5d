"""`compress` with retraining after the passes, or between them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from runs import LABELS, W2, Refusing, Scale, X, compress, held_out, reference, run

from onnxfuse.commands.turns import asked_for, by_turns
from onnxfuse.data.calibration import Calibration
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.findings import Change, Prediction
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.instruments import Instrument

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


def test_a_dry_run_keeps_no_state(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxfuse.pytorch.training import checkpoint

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
    from onnxfuse.pytorch.training import retraining

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


class Halving(Pass):
    """Asks for a share of what it was given first, and always goes further."""

    name, contract, summary = "halving", Contract.EXACT, "a pass for tests"

    def __init__(self, goal: float, wholes: list[tuple[float, Model]]) -> None:
        super().__init__()
        self.goal, self.wholes = goal, wholes

    def partly(self, share: float, done: float = 0.0) -> Pass | None:
        return Halving(1 - share * (1 - self.goal), self.wholes) if share > done else None

    def run(self, model: Model, context: Context) -> PassResult:
        self.wholes.append((self.goal, context.whole(model)))
        return PassResult(model)


def test_goals_of_all_turns_are_shares_of_the_first_model(path: Path) -> None:
    wholes: list[tuple[float, Model]] = []
    compress(
        path,
        [Scale(1.1), Halving(0.6, wholes), Slope(0.1)],
        retrain=DATA,
        epochs=3,
        lr=0.01,
        schedule="uniform:steps=3",
    )
    assert [goal for goal, _ in wholes] == pytest.approx([1 - 0.4 / 3, 1 - 0.8 / 3, 0.6])
    first = wholes[0][1]
    scaled = W2 * np.float32(1.1)
    for _, whole in wholes:
        np.testing.assert_allclose(whole.weight(whole.tensor("w2")), scaled, rtol=1e-6)
        assert whole.to_proto().SerializeToString() == first.to_proto().SerializeToString()


class Counting(Pass):
    """Takes two steps in all, however many turns there are."""

    name, contract, summary = "counting", Contract.EXACT, "a pass for tests"

    def __init__(self, steps: int, ran: list[int]) -> None:
        super().__init__()
        self.steps, self.ran = steps, ran

    def partly(self, share: float, done: float = 0.0) -> Pass | None:
        left = round(share * self.steps) - round(done * self.steps)
        return Counting(left, self.ran) if left else None

    def run(self, model: Model, context: Context) -> PassResult:
        self.ran.append(self.steps)
        return PassResult(model)


def test_a_pass_that_has_no_step_in_a_turn_rests(path: Path) -> None:
    """It used to run as a whole there."""
    ran: list[int] = []
    result = compress(
        path,
        [Counting(2, ran), Slope(0.1)],
        retrain=DATA,
        epochs=4,
        lr=0.01,
        schedule="uniform:steps=4",
    )
    assert sum(ran) == 2
    assert [step.name for step in result.steps].count("slope") == 4
    ran.clear()
    turns = by_turns([Counting(2, ran)], "uniform:steps=4", opened(path, 8))
    assert [len(turn.passes) for turn in turns] == [1, 1]
    assert [turn.training.request.settings.epochs for turn in turns if turn.training] == [4, 4]


def opened(path: Path, epochs: int) -> Any:
    asked = asked_for(DATA, epochs, 0.01, None, max_error=None, batch_size=64, held_out=0.2, seed=0)
    assert asked is not None
    return asked.open(Model.load(path))


def wide(path: Path) -> Path:
    """A network of one hidden layer, 7 wide, and one of 64."""
    random = np.random.default_rng(0)
    shapes = {"a": (7, 6), "b": (64, 7), "c": (3, 64)}
    nodes = (
        "h = Gemm<transB=1>(x, a) r = Relu(h) g = Gemm<transB=1>(r, b) s = Relu(g) y = Gemm<transB=1>(s, c)"
    )
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[N,6] x) => (float[N,3] y) {' + nodes + "}"
    )
    proto.graph.initializer.extend(
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    found = path.with_name("wide.onnx")
    onnx.save(proto, found)
    return found


@pytest.mark.parametrize(("goal", "value"), [("ratio", 0.5), ("params", 0.5), ("macs", 0.4)])
def test_the_last_turn_meets_the_whole_goal(path: Path, goal: str, value: float) -> None:
    model = wide(path)
    x = np.random.default_rng(1).normal(size=(120, 6)).astype(np.float32)
    result = compress(
        model,
        f"select:{goal}={value}",
        calib={"x": x},
        retrain={"x": x},
        epochs=3,
        lr=1e-3,
        schedule="uniform:steps=3",
    )
    assert result.ok, result.reason
    told = [step.reached for step in result.steps]
    asked = (
        [1 - k * (1 - value) / 3 for k in (1, 2, 3)]
        if goal != "ratio"
        else [value * k / 3 for k in (1, 2, 3)]
    )
    assert [own.asked for own in told if own] == pytest.approx(asked)
    widths = {name: result.model.weight(result.model.tensor(name)).shape[0] for name in ("a", "b")}
    if goal == "ratio":
        assert widths == {"a": 4, "b": 32}  # 3.5 is as near to 4 as to 3
        assert told[-1].reached == pytest.approx(1 - 36 / 71)
        return
    left = widths["a"] * 6 + widths["a"] * widths["b"] + widths["b"] * 3
    share = result.report.after.parameters / result.report.before.parameters
    assert told[-1].reached == pytest.approx(share if goal == "params" else left / (42 + 448 + 192))
    assert value - 0.06 < told[-1].reached <= value
    for own, step in zip(told, result.steps, strict=True):  # each turn tells of itself, against the original
        before, after = result.report.before, step.after
        figure = after.parameters / before.parameters if goal == "params" else after.macs / before.macs
        assert own.reached == pytest.approx(figure)
        assert step.notes[0].startswith(f"{figure:.3g} of the ")
