"""What the command line does, as functions: `compress`, `grow`, `retrain`, `inspect`, `verify`, `diff`,
`passes`.

Each takes a model as a path, bytes, a ModelProto or a `Model`, and samples as a path or as arrays
(`Calibration.open` lists the kinds), and returns plain dataclasses; nothing is printed. Bad input and models
that ONNX Runtime can't run raise an `OnnxfuseError`; a `compress` or `retrain` that failed its checks is a
result whose `ok` is False.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse import growth as growing
from onnxfuse import likeness, saving, verification
from onnxfuse import recipe as recipes
from onnxfuse.calibration import Calibration, Data
from onnxfuse.channels import find_groups
from onnxfuse.channels.summary import summarise
from onnxfuse.cost import count, latency, measure
from onnxfuse.difference import Structure, structure
from onnxfuse.errors import InputError, NotApplicableError, OnnxfuseError, VerificationError
from onnxfuse.filesize import file_size
from onnxfuse.graph import Model, Source
from onnxfuse.inspection import Inspection, examine
from onnxfuse.instruments import Dumps, Instrument, Journal
from onnxfuse.metrics import Metric, evaluate, load_metric
from onnxfuse.pass_manager import (
    Context,
    Contract,
    NoProgress,
    Outcome,
    Pass,
    PassManager,
    StepReport,
    discover,
    unknown_name,
)
from onnxfuse.recipe import Option, Settings, options_of
from onnxfuse.report import plots
from onnxfuse.report.files import check_folder, write_report
from onnxfuse.report.record import FileSize, MetricChange, Report, RetrainReport, Samples
from onnxfuse.runtime import Runtime
from onnxfuse.schedule import parse_schedule
from onnxfuse.significance import paired_difference
from onnxfuse.similarity import CRITERIA, Criterion
from onnxfuse.verification import Comparison, Divergence, OutputError

if TYPE_CHECKING:
    from onnxfuse.cost import Cost, Latency
    from onnxfuse.pass_manager import Progress
    from onnxfuse.pytorch.retraining import Request, Retrained, Training
    from onnxfuse.runtime import Feed

DEFAULT_PASSES = "fold,fuse"
MADE_UP = (
    "NO CALIBRATION DATA: everything is fitted to and measured on made-up samples, which say little about "
    "real data; give real ones with --calib"
)
SLOWER = "SLOWER THAN THE ORIGINAL"

_TIMED_ROUNDS, _TIMED_SECONDS, _TIMED_ATTEMPTS = 1000, 4.0, 3
_SAME_LATENCY = 1.01  # what two sessions of one model may differ by

ModelSource = Model | Source
PathOrText = str | PathLike[str]


@dataclass(frozen=True)
class Result:
    """What `compress` did.

    Attributes:
        model: the compressed model; the given one where `ok` is False.
        report: everything that was found out on the way.
        exit_code: 0; 1: a check or a budget failed; 3: no pass had anything to do, or one can't be applied.
        reason: one line why it is not 0.
        written: where the model was written; None where nothing was.
    """

    model: Model
    report: Report
    exit_code: int
    reason: str | None
    written: Path | None

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def steps(self) -> tuple[StepReport, ...]:
        return self.report.steps


@dataclass(frozen=True)
class RetrainResult:
    """What `retrain` did.

    Attributes:
        model: the retrained model; the given one where `ok` is False.
        report: everything that was found out on the way.
        exit_code: 0; 1: training never got better than the start, or its result failed verification.
        reason: one line why it is not 0.
        written: where the model was written; None where nothing was.
    """

    model: Model
    report: RetrainReport
    exit_code: int
    reason: str | None
    written: Path | None

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found. `max_error` is the relative error allowed, None where the noise floor decided;
    `divergence` is the first tensor that differs, where one does and both models have it."""

    passed: bool
    reason: str | None
    comparison: Comparison
    divergence: Divergence | None
    max_error: float | None
    samples: Samples
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DiffResult:
    """What `diff` found: structure, costs at one sample of `a`, outputs. `outputs` is None where they could
    not be compared; a warning says why."""

    structure: Structure
    costs: tuple[Cost, Cost]
    outputs: Comparison | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PassInfo:
    """One installed pass."""

    name: str
    contract: str
    summary: str
    options: tuple[Option, ...]
    example: str


# --- compress -----------------------------------------------------------------------------------------------


def compress(
    model: ModelSource,
    passes: str | Sequence[Pass] | None = None,
    *,
    recipe: PathOrText | None = None,
    output: PathOrText | None = None,
    calib: Data = None,
    held_out: float = 0.2,
    samples: int | None = None,
    batch_size: int = 64,
    max_error: float | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    retrain: Data = None,
    epochs: int | None = None,
    lr: float | None = None,
    schedule: str | None = None,
    provider: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
    report: PathOrText | None = None,
    dump: PathOrText | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
) -> Result:
    """Run passes over a model, prove the result, and write it.

    Args:
        model: is left as it is.
        passes: such as "fold,fuse:kernel=3", or pass objects; None means `DEFAULT_PASSES`.
        recipe: a YAML file with passes and settings instead; an argument given here beats its settings.
        output: where to write the result; None writes nothing.
        calib: samples; None makes some up, with a warning.
        held_out: share of the samples that no pass may fit, on which all errors are measured.
        samples: use about this many; None uses all.
        batch_size: rows in a batch, where model and data leave that open.
        max_error: the relative error of any output allowed; None leaves a bound to the passes.
        max_drop: the drop of the metric allowed, absolute; needs a metric.
        metric: "top1", "mse", "nll" or "file.py:function"; None takes top1 where the labels are class
            numbers.
        retrain: samples to retrain on after the passes, with the original as teacher; labels among them
            only serve a metric. `max_error` and `max_drop` are then held on the retrained model alone: no
            pass hears of `max_error`, so each goes as far as its own options say. With `max_error`, training
            minimises what that bounds (loss "mse"), else what "distill" is.
        epochs, lr: of retraining; None as in `retrain`.
        schedule: "uniform:steps=4" or "exponential:steps=4": passes and retraining by turns, each turn going
            on from the last with goals (merge:layers, prune:amount, ...) that come nearer to the whole one
            (`onnxfuse.schedule`). Passes without such a goal run in the first turn only if they come before
            the first that has one, else in every turn. The epochs are those of all turns together.
        provider, threads: of ONNX Runtime.
        seed: of everything random; None is 0.
        report: folder for `report.json` and `report.txt`; written for a failed run, too.
        dump: folder for the model after every pass, and a journal.
        dry_run: check `output`, but don't write it.
        progress: hears how far long loops are.
        instruments: hear every pass.

    Raises:
        InputError: a bad file, option or sample; the output can't be written.
        NotApplicableError: ONNX Runtime can't load or run the model.
    """
    start = time.perf_counter()
    plan, settings = _plan(passes, recipe)
    max_error = settings.max_error if max_error is None else max_error
    max_drop = settings.max_drop if max_drop is None else max_drop
    seed = seed if seed is not None else settings.seed or 0
    _check_budgets(max_error, max_drop, seed)
    asked = _asked(
        retrain,
        epochs,
        lr,
        settings,
        loss=None if max_error is None else "mse",
        batch_size=batch_size,
        held_out=held_out,
        seed=seed,
    )
    original = _loaded(model)
    if output is not None:
        _check_output(Path(output), original)
    if report is not None:
        check_folder(Path(report))
    original.check_finite()
    runtime = Runtime(provider, threads)
    calibration = Calibration.open(
        calib, original, limit=samples, batch_size=batch_size, held_out=held_out, seed=seed
    )
    sample = verification.few_rows(original, calibration.fit, 1)
    judge = _Judge.make(metric or settings.metric, max_drop, calibration, original, runtime)
    training = None if asked is None else asked[1].open(asked[0], original)
    bound = max_error if asked is None else None
    context = Context(original, calibration, runtime, seed, bound, progress or NoProgress())
    heard = list(instruments)
    if dump is not None:
        journal = Journal(Path(dump) / "journal.jsonl")
        context.journal = journal
        heard += [Dumps(Path(dump)), journal]
    turns = _turns(plan, schedule or (settings.retrain.schedule if settings.retrain else None), training)
    place = None if output is None or dry_run else _checkpoint_of(output)
    loop = _Loop(turns, context, place)
    outcome = PassManager([pass_ for turn in turns for pass_ in turn.passes], heard).run(
        original, context, loop.between
    )
    _raise_input_errors(outcome)
    final = loop.finish(outcome)
    verdict = loop.refusal or _conclude(
        outcome, final, bool(loop.tails), replace(context, max_error=max_error), judge, sample
    )
    written = None
    if verdict.exit_code == 0 and output is not None and not dry_run:
        final.save(output)
        written = Path(output)
    loop.clear()
    record = Report(
        version=_version(),
        model=str(original.path) if original.path else None,
        output=None if output is None else str(output),
        written=written is not None,
        exit_code=verdict.exit_code,
        reason=verdict.reason,
        warnings=_warnings(calibration, outcome, judge, verdict, loop.tails),
        seed=seed,
        samples=_samples(calibration),
        providers=tuple(runtime.providers),
        threads=runtime.threads,
        steps=outcome.steps,
        sizes={name: array.shape for name, array in sample.items()},
        before=outcome.steps[0].before,
        after=outcome.steps[-1].after,
        latency=verdict.latency,
        slower=verdict.slower,
        output_bound=max_error,
        output_error=verdict.output_error,
        metric=verdict.metric,
        retrainings=tuple(tail.record for tail in loop.tails),
        files=_files(original, written, packed=any(pass_.packed for pass_ in plan)),
        seconds=time.perf_counter() - start,
    )
    if report is not None:
        write_report(Path(report), record)
    model = final if verdict.exit_code == 0 else original
    return Result(model, record, verdict.exit_code, verdict.reason, written)


def grow(
    model: ModelSource,
    *,
    widen: Mapping[str, float] | None = None,
    deepen: Mapping[str, int] | None = None,
    kernel: Mapping[str, int] | None = None,
    scheme: str = "r2r",
    noise: float | None = None,
    **options: Any,
) -> Result:
    """Make a network wider, deeper, or its kernels larger, with its function unchanged.

    Sites are named by name, by pattern (fnmatch) or as "all"; `inspect(model, growth=True)` lists them.

    Args:
        model: is left as it is.
        widen: by site, how many times as many channels there are to be.
        deepen: by site, how many layers or blocks are added.
        kernel: by site, the size of the kernels.
        scheme: "r2r", "net2net", or to widen "netmorph".
        noise: of net2net, as the pass `widen` has it.
        options: the other arguments of `compress`.

    Raises:
        InputError, NotApplicableError: as `compress`.
    """
    plan = growing.passes(widen or {}, deepen or {}, kernel or {}, scheme, noise)
    if not plan:
        raise InputError("say what is to grow: --widen, --deepen or --kernel")
    return compress(model, plan, **options)


def _plan(passes: str | Sequence[Pass] | None, recipe: PathOrText | None) -> tuple[list[Pass], Settings]:
    if recipe is not None and passes is not None:
        raise InputError("give passes or a recipe, not both")
    if recipe is not None:
        found = recipes.load_recipe(Path(recipe))
        return list(found.passes), found.settings
    wanted = DEFAULT_PASSES if passes is None else passes
    plan = recipes.parse_recipe(wanted) if isinstance(wanted, str) else list(wanted)
    if not plan:
        raise InputError("no passes were given")
    return plan, Settings.model_validate({})


def _check_budgets(max_error: float | None, max_drop: float | None, seed: int) -> None:
    if max_error is not None and not 0 < max_error < np.inf:
        raise InputError(f"--max-error must be a number above 0, not {max_error:g}")
    if max_drop is not None and not 0 <= max_drop < np.inf:
        raise InputError(f"--max-drop must be a number of at least 0, not {max_drop:g}")
    if seed < 0:
        raise InputError(f"--seed must be at least 0, not {seed}")


def _loaded(model: ModelSource) -> Model:
    return model if isinstance(model, Model) else Model.load(model)


def _check_output(output: Path, model: Model) -> None:
    saving.check_target(output, _file_of(model))


def _file_of(model: Model) -> Path | None:
    return model.folder / model.path.name if model.folder and model.path else None


def _raise_input_errors(outcome: Outcome) -> None:
    """Input that only a pass could find to be bad (a NaN among the samples) is bad input all the same."""
    for step in outcome.steps:
        if not step.committed and step.exit_code == InputError.exit_code:
            raise InputError(f"pass '{step.name}': {step.reason}")


@dataclass(frozen=True)
class _Verdict:
    """The whole-model check at the end of `compress`."""

    exit_code: int = 0
    reason: str | None = None
    output_error: OutputError | None = None
    metric: MetricChange | None = None
    latency: Latency | None = None

    @property
    def slower(self) -> bool:
        """Whether the result takes longer than the original, beyond what chance explains."""
        return self.latency is not None and _is_slower(self.latency)


def _timed(models: Sequence[Model], context: Context, sample: Feed) -> Latency:
    """Latency of the original and the result; one that says "slower" counts if it can be repeated.

    Two sessions of one model differ by up to a percent, and a busy machine can favour one for a while: both
    look like a difference in a single measurement.
    """
    for _ in range(_TIMED_ATTEMPTS):
        found = latency(
            models, context.runtime, sample, repeats=_TIMED_ROUNDS, seconds=_TIMED_SECONDS, seed=context.seed
        )
        if not _is_slower(found):
            break
    return found


def _is_slower(found: Latency) -> bool:
    return found.timings[1].ratio_low > _SAME_LATENCY


def _retrained(model: Model, training: Training, context: Context, place: Path | None) -> Retrained:
    """The passes' result retrained, from the original, and without what it is going to be judged on."""
    held_out = context.calibration.held_out
    found: Retrained = _retraining().retrain(
        model,
        training,
        context.runtime,
        teacher=context.original,
        checkpoint=place,
        unseen=held_out if held_out.samples and not context.calibration.synthetic else None,
        progress=context.progress,
    )
    return found


@dataclass(frozen=True)
class _Turn:
    """Some passes, and the retraining behind them, if there is one."""

    passes: list[Pass]
    training: Training | None


def _turns(plan: Sequence[Pass], schedule: str | None, training: Training | None) -> list[_Turn]:
    """What a schedule makes of the passes and the epochs.

    Raises:
        InputError: it has another form, or there is nothing to do by turns.
    """
    if schedule is None:
        return [_Turn(list(plan), training)]
    found = parse_schedule(schedule)
    if training is None:
        raise InputError("--schedule needs --retrain: it is about retraining between passes")
    first = next((place for place, pass_ in enumerate(plan) if pass_.partly(1.0) is not None), None)
    if first is None:
        raise InputError(
            "--schedule needs a pass with a goal to be reached in steps, such as merge:layers=0.25"
        )
    turns = []
    settings = training.request.settings
    epochs = found.epochs(settings.epochs)
    shares = found.shares()
    for number, (done, share, length) in enumerate(zip([0.0, *shares], shares, epochs, strict=False)):
        passes = [pass_.partly(share, done) or pass_ for pass_ in plan[first if number else 0 :]]
        request = replace(training.request, settings=replace(settings, epochs=length))
        turns.append(_Turn(passes, replace(training, request=request)))
    return turns


class _Loop:
    """Retraining between the turns of passes and after the last.

    Attributes:
        tails: what came of each retraining.
        refusal: why one could not be done.
    """

    def __init__(self, turns: Sequence[_Turn], context: Context, place: Path | None) -> None:
        self._context, self._place = context, place
        ends = np.cumsum([len(turn.passes) for turn in turns]).tolist()
        self._trainings = {end: turn.training for end, turn in zip(ends, turns, strict=True)}
        self._last = ends[-1]
        self.tails: list[Retrained] = []
        self.refusal: _Verdict | None = None

    def between(self, steps: Sequence[StepReport], model: Model, context: Context) -> tuple[Model, Context]:
        """What the passes of the next turn get. Training moves inner tensors: what was trained is then what
        they are held against."""
        trained = model if len(steps) == self._last else self._trained(steps, model)
        return trained, context if trained is model else replace(context, original=trained)

    def finish(self, outcome: Outcome) -> Model:
        """The model after the last turn and its retraining."""
        return self._trained(outcome.steps, outcome.model)

    def _trained(self, steps: Sequence[StepReport], model: Model) -> Model:
        training = self._trainings.get(len(steps))
        if training is None or self.refusal is not None or not _is_changed(steps):
            return model
        place = self._place
        if place is not None and len(self._trainings) > 1:
            place = place.with_name(f"{place.name}.{len(self.tails) + 1}")
        try:
            tail = _retrained(model, training, self._context, place)
        except NotApplicableError as error:
            self.refusal = _Verdict(error.exit_code, f"retraining: {error}")
            return model
        self.tails.append(tail)
        return model if tail.model is None else tail.model

    def clear(self) -> None:
        """Remove what a killed run would have gone on from."""
        for tail in self.tails:
            if tail.checkpoint is not None:
                tail.checkpoint.remove()


def _is_changed(steps: Sequence[StepReport]) -> bool:
    """Whether all passes were committed and some has changed the model."""
    return all(step.committed for step in steps) and any(step.changes for step in steps)


def _files(original: Model, written: Path | None, *, packed: bool) -> tuple[FileSize, FileSize] | None:
    """Sizes of the original's file and the result's, where there are both."""
    source = _file_of(original)
    if written is None or source is None:
        return None
    try:
        return file_size(source, gzipped=packed), file_size(written, gzipped=packed)
    except OSError:
        return None  # the original has gone meanwhile


def _conclude(
    outcome: Outcome, result: Model, trained: bool, context: Context, judge: _Judge, sample: Feed
) -> _Verdict:
    """Hold `result`, what the passes made, trained or not, against the original on samples that no pass has
    fitted."""
    failed = next((step for step in outcome.steps if not step.committed), None)
    if failed is not None:
        return _Verdict(failed.exit_code, f"pass '{failed.name}': {failed.reason}")
    if not _is_changed(outcome.steps):
        return _Verdict(NotApplicableError.exit_code, _idle(outcome.steps))
    try:
        error = _whole_error(outcome, result, trained, context)
    except VerificationError as failure:
        return _Verdict(VerificationError.exit_code, str(failure))
    scores = judge.change(result, context)
    reason = _over_budget(error, context, scores)
    if reason is not None:
        return _Verdict(VerificationError.exit_code, reason, error, scores)
    timed = _timed([context.original, result], context, sample)
    return _Verdict(0, None, error, scores, timed)


def _idle(steps: Sequence[StepReport]) -> str:
    """Why there is nothing to write, from what each pass said."""
    said = [f"{step.name}: {step.notes[-1] if step.notes else 'nothing to do'}" for step in steps]
    return f"no pass changed the model ({'; '.join(said)})"


def _whole_error(outcome: Outcome, result: Model, trained: bool, context: Context) -> OutputError | None:
    """The output error on held-out samples; where there are none, on the fitted ones if nothing did fit."""
    changed = [step for step in outcome.steps if step.changes]
    last = changed[-1].verification
    if not trained and last is not None and last.output_error is not None:
        return last.output_error
    batches = context.calibration.held_out
    if not batches.samples:
        if trained or any(step.contract is Contract.APPROXIMATE for step in changed):
            return None
        batches = context.calibration.fit
    return verification.output_error(context.original, result, batches, context.runtime)


def _over_budget(error: OutputError | None, context: Context, scores: MetricChange | None) -> str | None:
    bound = context.max_error
    if bound is not None and error is None:
        return "there are no held-out samples to hold --max-error on"
    if bound is not None and error is not None and not error.worst <= bound:
        name = max(error.outputs, key=lambda output: error.outputs[output])
        return f"the relative error of output '{name}' is {error.worst:.3g}, above --max-error {bound:g}"
    if scores is None or scores.max_drop is None:
        return None
    drop = scores.scores.before - scores.scores.after
    if not drop <= scores.max_drop:
        found = f"{scores.scores.before:.4g} to {scores.scores.after:.4g}"
        return f"{scores.name} drops by {drop:.3g}, from {found}, more than --max-drop {scores.max_drop:g}"
    return None


@dataclass(frozen=True)
class _Judge:
    """The metric of a run, if it has one, and the original's score of every held-out sample."""

    name: str
    metric: Metric | None
    before: np.ndarray
    max_drop: float | None
    note: str | None = None

    @classmethod
    def make(
        cls,
        spec: str | None,
        max_drop: float | None,
        calibration: Calibration,
        original: Model,
        runtime: Runtime,
    ) -> _Judge:
        """Scores the original before any pass runs, so that a metric that fails does so at once."""
        held_out = calibration.held_out
        if spec is None and not calibration.labels:
            if max_drop is not None:
                raise InputError(
                    "--max-drop needs labels in the calibration data, or a --metric file.py:function"
                )
            return cls("", None, np.empty(0), None)
        if not held_out.samples:
            if spec is not None or max_drop is not None:
                raise InputError("a metric needs held-out samples: give --held-out a share above 0")
            return cls("", None, np.empty(0), None, "the labels are not used: no samples are held out")
        name = spec or "top1"
        metric = load_metric(name)
        try:
            before = evaluate(runtime.session(original), held_out, metric)
        except InputError as error:
            if spec is not None or max_drop is not None:
                raise
            return cls("", None, np.empty(0), None, f"the labels are not used: {error}")
        return cls(name, metric, before, max_drop)

    def change(self, result: Model, context: Context) -> MetricChange | None:
        if self.metric is None:
            return None
        after = evaluate(context.runtime.session(result), context.calibration.held_out, self.metric)
        return MetricChange(
            self.name, paired_difference(self.before, after, seed=context.seed), self.max_drop
        )


def _warnings(
    calibration: Calibration,
    outcome: Outcome,
    judge: _Judge,
    verdict: _Verdict,
    tails: Sequence[Retrained],
) -> tuple[str, ...]:
    found = [MADE_UP] if calibration.synthetic else []
    if verdict.latency is not None and verdict.slower:
        timing = verdict.latency.timings[1]
        found.append(
            f"{SLOWER}: {timing.ratio:.2f} times its latency "
            f"(95% interval {timing.ratio_low:.2f} to {timing.ratio_high:.2f})"
        )
    if judge.note:
        found.append(judge.note)
    if verdict.exit_code == 0 and verdict.output_error is None:
        found.append("no samples are held out: the output error was not measured")
    for step in outcome.steps:
        marked = [note for note in step.notes if note.startswith("warning: ")]
        found += [f"{step.name}: {note.removeprefix('warning: ')}" for note in marked]
        found += [f"{step.name}: {note}" for note in (step.verification.notes if step.verification else ())]
    for tail in tails:
        found += [f"retraining: {warning}" for warning in tail.warnings]
        if tail.reason is not None:
            found.append(f"retraining: {tail.reason}; what the passes made is kept")
    return tuple(dict.fromkeys(found))


def _samples(calibration: Calibration) -> Samples:
    return Samples(
        calibration.description,
        calibration.synthetic,
        calibration.fit.samples,
        calibration.held_out.samples,
        calibration.labels,
    )


def _version() -> str:
    from onnxfuse import __version__

    return __version__


# --- retrain ------------------------------------------------------------------------------------------------


def retrain(
    model: ModelSource,
    data: Data,
    *,
    teacher: ModelSource | None = None,
    loss: str | None = None,
    epochs: int = 10,
    lr: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float | None = None,
    batch_size: int = 64,
    freeze: Sequence[str] = (),
    match: Sequence[str] = (),
    held_out: float = 0.2,
    patience: int | None = None,
    metric: str | None = None,
    seed: int = 0,
    provider: str = "auto",
    device: str = "auto",
    output: PathOrText | None = None,
    checkpoint: PathOrText | None = None,
    progress: Progress | None = None,
) -> RetrainResult:
    """Train a model in PyTorch, from labels or from another model, and write the weights back to its graph.

    Under torchrun every process calls this alike; the first one alone writes.

    Args:
        model: is left as it is.
        data: samples, as `Calibration.open` takes them, with an array `labels` or without.
        teacher: a model of the same inputs and outputs to learn from: the original of a compressed one.
        loss: "ce", cross-entropy against class numbers; "mse"; "distill", to follow the teacher
            (`onnxfuse.pytorch.objective` defines them). None: distill with a teacher, else ce for integer
            labels and mse for floats.
        epochs: passes over the data.
        lr: the highest learning rate; None is 1e-4 for adamw, 1e-3 for sgd; random weights want ten times as
            much.
        optimizer: "adamw" or "sgd" (with Nesterov momentum 0.9).
        weight_decay: of matrices and kernels; None is 1e-2 for adamw, 1e-4 for sgd.
        batch_size: rows of a batch, of all processes together, where model and data leave that open.
        freeze: patterns (fnmatch) of initializers that stay as they are. A BatchNormalization whose scale is
            frozen keeps its statistics, too, and normalises by them.
        match: inner tensors that are to follow the teacher's, "NAME" or "NAME=NAME IN THE TEACHER".
        held_out: share of the samples that no step sees: they choose the best epoch, and measure it.
        patience: stop once the held-out loss has not improved for so many epochs; None never.
        metric: "top1", "mse", "nll" or "file.py:function"; None takes top1 for class numbers, mse for
            other labels.
        seed: of split, order and dropout: equal seeds give equal bytes.
        provider: of ONNX Runtime, where the teacher runs and the result is judged.
        device: of torch: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1".
        output: where to write the result; None writes nothing.
        checkpoint: keeps the state after each epoch, to go on from after a kill; None is `output` with
            `.checkpoint` behind it. It is removed at the end.
        progress: hears of each step.

    Raises:
        InputError: a bad file, option, sample or label; a teacher that doesn't fit; the output can't be
            written; torch is not installed.
        NotApplicableError: an operator that can't be imported to PyTorch; ONNX Runtime can't run a model.
    """
    start = time.perf_counter()
    retraining = _retraining()
    request = retraining.Request(
        settings=retraining.Settings(epochs, optimizer, lr, weight_decay, patience, seed),
        loss=loss,
        batch_size=batch_size,
        held_out=held_out,
        metric=metric,
        freeze=tuple(freeze),
        match=tuple(match),
        device=device,
    )
    loaded = _loaded(model)
    original = None if teacher is None else _loaded(teacher)
    for source in (loaded, *([original] if original is not None else [])):
        source.check_finite()
        if output is not None:
            _check_output(Path(output), source)
    place = Path(checkpoint) if checkpoint is not None else None
    if place is None and output is not None:
        place = _checkpoint_of(output)
    runtime = Runtime(provider)
    training = request.open(data, loaded)
    found = retraining.retrain(
        loaded, training, runtime, teacher=original, checkpoint=place, progress=progress
    )
    first = retraining.started()[0] == 0
    written = None
    if found.model is not None and output is not None and first:
        found.model.save(output)
        written = Path(output)
    if found.checkpoint is not None and first:
        found.checkpoint.remove()
    exit_code = 0 if found.model is not None else VerificationError.exit_code
    report = RetrainReport(
        version=_version(),
        model=str(loaded.path) if loaded.path else None,
        output=None if output is None else str(output),
        written=written is not None,
        exit_code=exit_code,
        reason=found.reason,
        warnings=found.warnings,
        seed=seed,
        providers=tuple(runtime.providers),
        threads=runtime.threads,
        retraining=found.record,
        seconds=time.perf_counter() - start,
    )
    return RetrainResult(found.model or loaded, report, exit_code, found.reason, written)


def _retraining() -> ModuleType:
    """What needs torch, which is an extra."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("retraining needs PyTorch: pip install 'onnxfuse[torch]'") from error
    from onnxfuse.pytorch import retraining

    return retraining


def _checkpoint_of(output: PathOrText) -> Path:
    return Path(f"{output}.checkpoint")


def _asked(
    data: Data, epochs: int | None, lr: float | None, settings: Settings, **others: Any
) -> tuple[Data, Request] | None:
    """The retraining that `compress` was asked for, arguments before the recipe, None if none was.

    Raises:
        InputError: it can't be had.
    """
    asked = settings.retrain
    if data is None and asked is None:
        if epochs is not None or lr is not None:
            raise InputError(f"{'--epochs' if epochs is not None else '--lr'} needs --retrain")
        return None
    retraining = _retraining()
    if retraining.started()[1] > 1:
        raise InputError("compress runs in one process; run 'onnxfuse retrain' on its output under torchrun")
    if asked is not None:
        data = asked.data if data is None else data
        epochs = asked.epochs if epochs is None else epochs
        lr = asked.lr if lr is None else lr
    how = {"lr": lr, "seed": others.pop("seed"), **({} if epochs is None else {"epochs": epochs})}
    return data, retraining.Request(settings=retraining.Settings(**how), **others)


# --- inspect ------------------------------------------------------------------------------------------------


def inspect(
    model: ModelSource,
    *,
    calib: Data = None,
    measure_latency: bool = True,
    channels: bool = False,
    growth: bool = False,
    similarity: str | None = None,
    heads: bool = False,
    plot: PathOrText | None = None,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> Inspection:
    """Tell what is in a model.

    Args:
        model: is left as it is.
        calib: samples whose sizes count for MACs and latency; None makes one up. A model that can't be run
            on made-up samples is inspected without.
        measure_latency: whether to run the model for its latency.
        channels: whether to find the groups of coupled channels, too.
        growth: whether to find where the network can grow, too.
        similarity: the criterion by which to tell how alike the layers are, too; of `similarity.CRITERIA`.
        heads: whether to take the layers of attentions apart into heads for that.
        plot: where to write a picture of it, a .png; needs Matplotlib.
        provider, threads: of ONNX Runtime.
        seed: of made-up samples, and of the criterion "centroids".

    Raises:
        InputError: a bad file or bad samples; the picture can't be drawn or written.
    """
    criterion = _criterion(similarity, heads, plot)
    found = _loaded(model)
    if plot is not None:
        plots.check_plot(Path(plot), _file_of(found))
    runtime = Runtime(provider, threads)
    try:
        calibration = Calibration.open(
            calib, found, limit=None if calib is not None else 2, held_out=0.0, seed=seed
        )
        several: Feed | None = next(iter(calibration.fit)).feed
        feed: Feed | None = verification.few_rows(found, calibration.fit, 1)
        warnings: tuple[str, ...] = ()
    except OnnxfuseError as error:
        if calib is not None:
            raise
        several, feed, warnings = None, None, (str(error),)
    groups = find_groups(found, several) if channels or growth else None
    alike = None if criterion is None else likeness.survey(found, criterion, heads, seed)
    if plot is not None and not alike:
        warnings = (*warnings, "no two layers can be compared: nothing was plotted")
    elif plot is not None and alike:
        plots.heat_maps(alike, Path(plot))
    return examine(
        found,
        feed,
        runtime if measure_latency and feed is not None else None,
        summarise(groups) if groups is not None and channels else None,
        warnings,
        growing.survey(found, groups) if groups is not None and growth else None,
        alike,
    )


def _criterion(name: str | None, heads: bool, plot: PathOrText | None) -> Criterion | None:
    """The criterion of that name; refuses what only means something with one."""
    for asked, option in ((heads, "heads"), (plot is not None, "plot")):
        if asked and name is None:
            raise InputError(f"--{option} needs --similarity")
    found = next((criterion for criterion in CRITERIA if criterion == name), None)
    if name is not None and found is None:
        raise InputError(unknown_name("criterion", name, CRITERIA))
    return found


# --- verify and diff ----------------------------------------------------------------------------------------


def verify(
    a: ModelSource,
    b: ModelSource,
    *,
    calib: Data = None,
    max_error: float | None = None,
    samples: int | None = None,
    batch_size: int = 64,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> VerifyResult:
    """Do two models compute the same?

    Args:
        a: the reference, whose noise floor counts.
        b: the other.
        calib: samples for both; None makes some up, with a warning.
        max_error: pass if the relative error of every output is at most this; None: if every difference is
            within `verification.MULTIPLE` noise floors of `a`.
        samples, batch_size: how many samples, and rows in a batch.
        provider, threads: of ONNX Runtime.
        seed: of made-up samples.

    Raises:
        InputError: a bad file or bad samples.
        NotApplicableError: ONNX Runtime can't load one of the models, or `a` fails on a sample.
    """
    _check_budgets(max_error, None, seed)
    first, second = _loaded(a), _loaded(b)
    runtime = Runtime(provider, threads)
    calibration = Calibration.open(
        calib, first, limit=samples, batch_size=batch_size, held_out=0.0, seed=seed
    )
    comparison = verification.compare(first, second, calibration.fit, runtime, labels=_labels(first, second))
    reason = comparison.reason if max_error is None else _error_reason(comparison, max_error)
    divergence = None
    if reason is not None and not comparison.problems:
        batch = next(iter(calibration.fit))
        divergence = verification.first_divergence(
            first, second, batch, runtime, labels=_labels(first, second)
        )
    warnings = (*([MADE_UP] if calibration.synthetic else []), *comparison.notes)
    return VerifyResult(
        reason is None, reason, comparison, divergence, max_error, _samples(calibration), warnings
    )


def diff(
    a: ModelSource,
    b: ModelSource,
    *,
    calib: Data = None,
    samples: int | None = None,
    batch_size: int = 64,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> DiffResult:
    """Two models side by side: structure, cost, outputs. Arguments and errors as `verify`, except that models
    which can't be run are compared in structure alone."""
    first, second = _loaded(a), _loaded(b)
    runtime = Runtime(provider, threads)
    warnings: list[str] = []
    outputs, feed = None, None
    try:
        calibration = Calibration.open(
            calib, first, limit=samples, batch_size=batch_size, held_out=0.0, seed=seed
        )
        warnings += [MADE_UP] if calibration.synthetic else []
        feed = verification.few_rows(first, calibration.fit, 1)
        outputs = verification.compare(first, second, calibration.fit, runtime, labels=_labels(first, second))
        warnings += outputs.notes
    except OnnxfuseError as error:
        if calib is not None and isinstance(error, InputError):
            raise
        warnings.append(f"the outputs are not compared: {error}")
    costs = _cost(first, feed), _cost(second, feed)
    return DiffResult(structure(first, second), costs, outputs, tuple(warnings))


def _cost(model: Model, feed: Feed | None) -> Cost:
    """At the sizes of `feed`, if the model takes it."""
    if feed is not None:
        with contextlib.suppress(OnnxfuseError):
            return measure(model, feed)
    return count(model, model.shapes())


def _labels(a: Model, b: Model) -> tuple[str, str]:
    """What messages call two models."""
    if a.path and b.path and a.path != b.path:
        return f"'{a.path}'", f"'{b.path}'"
    return "the first model", "the second model"


def _error_reason(comparison: Comparison, max_error: float) -> str | None:
    """Why a comparison does not stay within an error that the user allows."""
    if comparison.problems:
        return comparison.problems[0]
    for output in comparison.outputs:
        if output.problem:
            return f"output {output.problem}"
    worst = max(comparison.outputs, key=lambda output: output.relative, default=None)
    if worst is None or worst.relative <= max_error:
        return None
    return f"the relative error of output '{worst.name}' is {worst.relative:.3g}, above {max_error:g}"


# --- passes -------------------------------------------------------------------------------------------------


def passes() -> list[PassInfo]:
    """All installed passes.

    Raises:
        InputError: an installed package's pass can't be loaded.
    """
    return [
        PassInfo(
            name, kind.contract.value, kind.summary, tuple(options_of(kind)), getattr(kind, "example", name)
        )
        for name, kind in discover().items()
    ]
