"""`compress`: passes over a model, proved and written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from onnxfuse.analysis.declarations import contradiction_warnings
from onnxfuse.commands.judge import (
    Allowance,
    Confidence,
    Scorer,
    Verdict,
    check_limits,
    conclude,
    confidence_of,
)
from onnxfuse.commands.loading import (
    MADE_UP,
    ModelSource,
    PathOrText,
    check_output,
    checkpoint_of,
    file_of,
    load,
    samples_of,
)
from onnxfuse.commands.remembering import REFITTED, remember, was_fitted
from onnxfuse.commands.turns import Trainer, Turn, asked_for, by_turns
from onnxfuse.data.calibration import Calibration, Data
from onnxfuse.data.fitted import Fitted
from onnxfuse.data.rows import few_rows
from onnxfuse.data.sufficiency import doubts_of
from onnxfuse.errors import InputError
from onnxfuse.ir.file_size import FileSize, file_size
from onnxfuse.ops.finite import check_finite
from onnxfuse.pipeline import recipe as recipes
from onnxfuse.pipeline.base import Context, Contract, Pass
from onnxfuse.pipeline.instruments import Dumps, Instrument, JournalFile, LatencyControl
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import Passes, RecipeSettings
from onnxfuse.pipeline.records import Outcome
from onnxfuse.progress import NoProgress
from onnxfuse.report.files import check_folder, write_report
from onnxfuse.results import Report, Result
from onnxfuse.runtime.latency import Stopwatch, interval_text
from onnxfuse.runtime.memory import Budget
from onnxfuse.runtime.session import Runtime

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.progress import Progress
    from onnxfuse.pytorch.training.retraining import Retrained

DEFAULT_PASSES = "fold,fuse"
SLOWER = "SLOWER THAN THE ORIGINAL"


def compress(
    model: ModelSource,
    passes: Passes | None = None,
    *,
    recipe: PathOrText | None = None,
    output: PathOrText | None = None,
    calib: Data = None,
    held_out: float = 0.2,
    samples: int | None = None,
    batch_size: int = 64,
    memory: str | None = None,
    max_error: float | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    confidence: Confidence = None,
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
        passes: such as "fold,fuse:kernel=3", or a list of names, `{name: {option: value}}` and pass objects,
            in any mixture; None means `DEFAULT_PASSES`.
        recipe: a YAML file with passes and settings instead; an argument given here beats its settings.
        output: where to write the result; None writes nothing.
        calib: samples, as `Calibration.open` takes them: a path, arrays by input name, or the one array of a
            model with one input; None makes some up, with a warning.
        held_out: share of the samples that no pass may fit, on which all errors are measured.
        samples: use about this many; None uses all.
        batch_size: the most rows of a batch, where model and data leave that open; there are fewer where
            `memory` asks for it.
        memory: what a run may take beside the models, such as "512MB" or "2GB": batches, sums and tensors
            that wait keep to it. None is a quarter of what is free, 1 GB at most. Equal results take equal
            numbers here.
        max_error: the relative error of any output allowed; None leaves a bound to the passes.
        max_drop: the drop of the metric allowed, in its own unit: 0.01 is one point of top1. Needs labels, or
            a metric that needs none.
        metric: "top1", "mse", "nll", "agreement" (top1 against the original's classes) or "cosine" (of the
            original's first output and the result's), which need no labels, or "file.py:function"; None takes
            top1 where the labels are class numbers.
        confidence: of the paired interval of the metric's change, whose low end is held to `max_drop`; "none"
            holds the change itself to it; None is 0.95. Where all passes are exact, the change itself counts.
        retrain: samples to retrain on after the passes, with the original as teacher; labels among them
            only serve a metric. `max_error` and `max_drop` are then held on the retrained model alone: no
            pass hears of `max_error`, so each goes as far as its own options say. With `max_error`, training
            minimizes what that bounds (loss "mse"), else what "distill" is.
        epochs, lr: of retraining; None as in `retrain`.
        schedule: "uniform:steps=4" or "exponential:steps=4": passes and retraining by turns, each turn going
            on from the last with goals (merge:layers, prune:amount, ...) that come nearer to the whole one
            (`onnxfuse.pipeline.schedule`). Passes without such a goal run in the first turn only if they come
            before the first that has one, else in every turn. The epochs are those of all turns together.
        provider, threads: of ONNX Runtime; without `threads` it has all cores, and one for timings.
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
    given = {
        "max_error": max_error,
        "max_drop": max_drop,
        "metric": metric or None,
        "confidence": confidence,
        "seed": seed,
    }
    settings = settings.model_copy(update={key: value for key, value in given.items() if value is not None})
    seed = settings.seed or 0
    check_limits(settings.max_error, settings.max_drop, seed, settings.metric)
    allowed = Allowance(settings.metric, settings.max_drop, confidence_of(settings.confidence))
    asked = asked_for(
        retrain,
        epochs,
        lr,
        settings.retrain,
        max_error=settings.max_error,
        batch_size=batch_size,
        held_out=held_out,
        seed=seed,
    )
    original = load(model)
    if output is not None:
        check_output(output, original)
    if report is not None:
        check_folder(Path(report))
    check_finite(original)
    runtime = Runtime(provider, threads)
    calibration = Calibration.open(
        calib,
        original,
        limit=samples,
        batch_size=batch_size,
        budget=Budget.of(memory),
        held_out=held_out,
        seed=seed,
    )
    # Samples that are fitted must be able to prove it; others are looked at when there is something to prove.
    fitting = any(pass_.contract is Contract.APPROXIMATE for pass_ in plan)
    doubts = doubts_of(calibration, original.inputs, approximate=True) if fitting else None
    sample = few_rows(original, calibration.fit, 1, runtime)
    scorer = Scorer.make(allowed, calibration.held_out, calibration.labels, original, runtime)
    training = None if asked is None else asked.open(original)
    context = Context(original, calibration, runtime, seed, settings.max_error, progress or NoProgress())
    heard = [*instruments, *_dumping(dump, context)]
    turns = by_turns(plan, schedule or (settings.retrain.schedule if settings.retrain else None), training)
    run = _Run(plan, turns, context, sample, scorer, output, dry_run, doubts)
    done = run.go(heard)
    record = _report(run, done, time.perf_counter() - start)
    if report is not None:
        write_report(Path(report), record, "compress")
    verdict = done.verdict
    result = done.model if verdict.exit_code == 0 else original
    return Result(result, record, verdict.exit_code, verdict.reason, done.written, "compress")


def _plan(passes: Passes | None, recipe: PathOrText | None) -> tuple[list[Pass], RecipeSettings]:
    """The passes, and the settings that came with them."""
    if recipe is not None and passes is not None:
        raise InputError("give passes or a recipe, not both")
    if recipe is not None:
        found = recipes.load_recipe(Path(recipe))
        return list(found.passes), found.settings
    return recipes.make_passes(DEFAULT_PASSES if passes is None else passes), RecipeSettings.model_validate(
        {}
    )


def _dumping(folder: PathOrText | None, context: Context) -> list[Instrument]:
    """Instruments that write a journal, and the models between passes, to a folder; `context` gets the
    journal, too."""
    if folder is None:
        return []
    journal = JournalFile(Path(folder) / "journal.jsonl")
    context.journal = journal
    return [Dumps(Path(folder)), journal]


@dataclass(frozen=True)
class _Done:
    """A run that has ended: what the passes did, the model with its last training, the verdict on it, where
    it was written, and the trainings."""

    outcome: Outcome
    model: Model
    verdict: Verdict
    written: Path | None
    tails: Sequence[Retrained]


@dataclass(frozen=True)
class _Run:
    """A run that can begin: all of it opened and checked. `context.max_error` is the whole run's."""

    plan: Sequence[Pass]
    turns: Sequence[Turn]
    context: Context
    sample: Feed
    scorer: Scorer
    output: PathOrText | None
    dry: bool
    doubts: Sequence[str] | None

    def go(self, instruments: Sequence[Instrument]) -> _Done:
        """Run the passes and the trainings, judge the result, and write it if it holds.

        Raises:
            InputError: samples that only a pass could find to be bad; the output can't be written.
        """
        trained = any(turn.training is not None for turn in self.turns)
        # Where training follows, the bound is on what it leaves: the passes don't hear of it.
        context = replace(self.context, max_error=None) if trained else self.context
        watch = Stopwatch(context.original, context.runtime, self.sample, seed=context.seed)
        target = None if self.dry else self.output
        trainer = Trainer(self.turns, context, None if target is None else checkpoint_of(target))
        passes = [pass_ for turn in self.turns for pass_ in turn.passes]
        manager = PassManager(passes, [LatencyControl(watch), *instruments])
        outcome = manager.run(context.original, context, trainer.between)
        _raise_input_errors(outcome)
        model = trainer.finish(outcome)
        verdict = trainer.refusal or conclude(
            outcome, model, bool(trainer.tails), self.context, self.scorer, watch
        )
        written = None
        if verdict.exit_code == 0:
            self._remember(model, outcome, trainer.tails)
        if verdict.exit_code == 0 and target is not None:
            model.save(target)
            written = Path(target)
        trainer.clear()
        return _Done(outcome, model, verdict, written, trainer.tails)

    def _remember(self, model: Model, outcome: Outcome, tails: Sequence[Retrained]) -> None:
        seed, calibration = self.context.seed, self.context.calibration
        if was_fitted(outcome.steps):
            fitted = Fitted.of(calibration.fit.feeds(), model.inputs)
            remember(model, fitted, calibration, {"command": "compress", "seed": seed})
        for tail in tails:
            if tail.model is not None:
                remember(model, tail.fitted, tail.samples, {"command": "retrain", "seed": seed})


def _raise_input_errors(outcome: Outcome) -> None:
    """Input that only a pass could find to be bad (a NaN among the samples) is bad input all the same."""
    for step in outcome.steps:
        if not step.committed and step.exit_code == InputError.exit_code:
            raise InputError(f"pass '{step.name}': {step.reason}")


def _report(run: _Run, done: _Done, seconds: float) -> Report:
    """The report of a run."""
    context, steps, verdict = run.context, done.outcome.steps, done.verdict
    return Report(
        version=version("onnxfuse"),
        model=str(context.original.path) if context.original.path else None,
        output=None if run.output is None else str(run.output),
        written=done.written is not None,
        exit_code=verdict.exit_code,
        reason=verdict.reason,
        warnings=_warnings(run, done),
        seed=context.seed,
        samples=samples_of(context.calibration),
        providers=tuple(context.runtime.providers),
        threads=context.runtime.threads,
        steps=steps,
        sizes={name: array.shape for name, array in run.sample.items()},
        before=steps[0].before,
        after=steps[-1].after,
        latency=verdict.latency,
        slower=verdict.slower,
        output_bound=context.max_error,
        output_error=verdict.output_error,
        metric=verdict.metric,
        retrainings=tuple(tail.record for tail in done.tails),
        files=_files(run, done.written),
        seconds=seconds,
    )


def _warnings(run: _Run, done: _Done) -> tuple[str, ...]:
    verdict = done.verdict
    error = verdict.output_error
    found = [MADE_UP] if run.context.calibration.synthetic else _doubts(run, done)
    if run.context.calibration.refitted:
        found.append(REFITTED)
    found += contradiction_warnings(run.context.original, run.sample, run.context.runtime)
    if verdict.latency is not None and verdict.slower:
        found.append(f"{SLOWER}: latency {interval_text(verdict.latency.timings[1])}")
    if verdict.latency is not None and verdict.latency.unstable is not None:
        found.append(f"latency {verdict.latency.unstable}: measure again when less else runs")
    if run.scorer.note:
        found.append(run.scorer.note)
    if verdict.metric is not None and verdict.metric.note is not None:
        found.append(verdict.metric.note)
    if verdict.exit_code == 0 and verdict.output_error is None:
        found.append("no samples are held out: the output error was not measured")
    found += [] if error is None else error.notes
    for step in done.outcome.steps:
        marked = [note for note in step.notes if note.startswith("warning: ")]
        found += [f"{step.name}: {note.removeprefix('warning: ')}" for note in marked]
        found += [f"{step.name}: {note}" for note in (step.verification.notes if step.verification else ())]
    for tail in done.tails:
        found += [f"retraining: {warning}" for warning in tail.warnings]
        if tail.reason is not None:
            found.append(f"retraining: {tail.reason}; what the passes made is kept")
    return tuple(dict.fromkeys(found))


def _doubts(run: _Run, done: _Done) -> list[str]:
    if run.doubts is not None:
        return list(run.doubts)
    if not any(step.changes for step in done.outcome.steps):
        return []
    return doubts_of(run.context.calibration, run.context.original.inputs, approximate=False)


def _files(run: _Run, written: Path | None) -> tuple[FileSize, FileSize] | None:
    """Sizes of the original's file and the result's, where there are both."""
    source = file_of(run.context.original)
    if written is None or source is None:
        return None
    packed = any(pass_.packed for pass_ in run.plan)
    try:
        return file_size(source, gzipped=packed), file_size(written, gzipped=packed)
    except OSError:
        return None  # the original has gone meanwhile
