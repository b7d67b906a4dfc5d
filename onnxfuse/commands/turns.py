"""Retraining after the passes, or by turns with them (`onnxfuse.pipeline.schedule`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.commands.bridge import require_torch
from onnxfuse.commands.judge import Verdict, is_changed
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.pipeline.schedule import parse_schedule

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from onnxfuse.data.calibration import Data
    from onnxfuse.ir.model import Model
    from onnxfuse.pipeline.base import Context, Pass
    from onnxfuse.pipeline.recipe import RecipeRetraining
    from onnxfuse.pipeline.records import Outcome, StepReport
    from onnxfuse.pytorch.training.request import Request, Training
    from onnxfuse.pytorch.training.retraining import Retrained


def retraining() -> ModuleType:
    """The module that retrains.

    Raises:
        InputError: torch is not installed.
    """
    require_torch("retraining")
    from onnxfuse.pytorch.training import retraining as found

    return found


@dataclass(frozen=True)
class Asked:
    """Retraining that a run was asked for: the samples, and how to train on them."""

    data: Data
    request: Request

    def open(self, model: Model) -> Training:
        """The samples, opened for `model`.

        Raises:
            InputError: bad samples.
        """
        return self.request.open(self.data, model)


def asked_for(
    data: Data,
    epochs: int | None,
    lr: float | None,
    recipe: RecipeRetraining | None,
    *,
    max_error: float | None,
    batch_size: int,
    held_out: float,
    seed: int,
) -> Asked | None:
    """The retraining of a run, None if none was asked for.

    Args:
        data, epochs, lr: arguments, which come before the recipe's.
        recipe: what the recipe says of it.
        max_error: a bound of the relative output error, which training then minimizes ("mse").
        batch_size, held_out, seed: of the training.

    Raises:
        InputError: it can't be had.
    """
    if data is None and recipe is None:
        if epochs is not None or lr is not None:
            raise InputError(f"{'--epochs' if epochs is not None else '--lr'} needs --retrain")
        return None
    module = retraining()
    if module.started()[1] > 1:
        raise InputError("compress runs in one process; run 'onnxfuse retrain' on its output under torchrun")
    if recipe is not None:
        data = recipe.data if data is None else data
        epochs = recipe.epochs if epochs is None else epochs
        lr = recipe.lr if lr is None else lr
    settings = module.Settings(lr=lr, seed=seed, **({} if epochs is None else {"epochs": epochs}))
    loss = None if max_error is None else "mse"
    return Asked(data, module.Request(settings, loss, batch_size, held_out))


@dataclass(frozen=True)
class Turn:
    """Some passes, each with its place in the plan, and the retraining behind them, if there is one."""

    passes: list[Pass]
    places: list[int]
    training: Training | None


def by_turns(plan: Sequence[Pass], schedule: str | None, training: Training | None) -> list[Turn]:
    """The turns that a schedule makes of the passes and the epochs.

    Args:
        plan: the passes in order.
        schedule: such as "uniform:steps=4"; None is one turn.
        training: behind each turn, with the epochs of all.

    Raises:
        InputError: it has another form, or there is nothing to do by turns.
    """
    if schedule is None:
        return [Turn(list(plan), list(range(len(plan))), training)]
    found = parse_schedule(schedule)
    if training is None:
        raise InputError("--schedule needs --retrain: it is about retraining between passes")
    stepwise = [pass_.partly(1.0) is not None for pass_ in plan]
    if not any(stepwise):
        raise InputError(
            "--schedule needs a pass with a goal to be reached in steps, such as merge:layers=0.25"
        )
    first = stepwise.index(True)
    shares, lengths = found.shares(), found.epochs(training.request.settings.epochs)
    steps: list[tuple[list[Pass], list[int], int]] = []
    waiting = 0
    for done, share, epochs in zip([0.0, *shares], shares, lengths, strict=False):
        now: dict[int, Pass] = {}
        for place, pass_ in enumerate(plan):
            own = (
                pass_.partly(share, done)
                if stepwise[place]
                else pass_
                if place > first or not steps
                else None
            )
            if own is not None:
                now[place] = own
        if now:
            steps.append((list(now.values()), list(now), epochs + waiting))
            waiting = 0
        elif steps:  # nothing new to do: what is there is trained the longer
            steps[-1] = (*steps[-1][:2], steps[-1][2] + epochs)
        else:
            waiting += epochs
    return [Turn(passes, places, _lasting(training, epochs)) for passes, places, epochs in steps]


def _lasting(training: Training, epochs: int) -> Training:
    """The training with this number of epochs."""
    request = training.request
    settings = replace(request.settings, epochs=epochs)
    return replace(training, request=replace(request, settings=settings))


class Trainer:
    """The training between the turns of passes and after the last.

    Attributes:
        tails: the outcome of each.
        refusal: why one could not be done.
    """

    def __init__(self, turns: Sequence[Turn], context: Context, checkpoint: Path | None) -> None:
        """Prepare, with the run's context and the file that keeps the state of a training, None for none."""
        self._context, self._checkpoint = context, checkpoint
        ends = np.cumsum([len(turn.passes) for turn in turns]).tolist()
        self._places = [place for turn in turns for place in turn.places]
        self._given = {self._places[0]: context.original}  # to each pass of the plan in its first turn
        self._trainings = {end: turn.training for end, turn in zip(ends, turns, strict=True)}
        self._last = ends[-1]
        self.tails: list[Retrained] = []
        self.refusal: Verdict | None = None

    def between(self, steps: Sequence[StepReport], model: Model, context: Context) -> tuple[Model, Context]:
        """Model and context for the next pass. Training moves inner tensors: the trained model is then what
        the passes of the next turn are held against. Their goals stay shares of what each got in the first
        turn, so that the last turn comes to the whole goal however far those before it came.

        Args:
            steps: the passes so far.
            model: after them.
            context: of the passes.
        """
        if len(steps) == self._last:
            return model, context
        trained = self._trained(steps, model)
        original = context.original if trained is model else trained
        place = self._places[len(steps)]
        first = self._given.get(place)
        self._given.setdefault(place, trained)
        return trained, replace(context, original=original, first=first)

    def finish(self, outcome: Outcome) -> Model:
        """The model after the last turn and its training."""
        return self._trained(outcome.steps, outcome.model)

    def clear(self) -> None:
        """Remove the checkpoints from which a killed run would have gone on."""
        for tail in self.tails:
            if tail.checkpoint is not None:
                tail.checkpoint.remove()

    def _trained(self, steps: Sequence[StepReport], model: Model) -> Model:
        training = self._trainings.get(len(steps))
        if training is None or self.refusal is not None or not is_changed(steps):
            return model
        place = self._checkpoint
        if place is not None and len(self._trainings) > 1:
            place = place.with_name(f"{place.name}.{len(self.tails) + 1}")
        try:
            tail = _retrained(model, training, self._context, place)
        except NotApplicableError as error:
            self.refusal = Verdict(error.exit_code, f"retraining: {error}")
            return model
        self.tails.append(tail)
        return model if tail.model is None else tail.model


def _retrained(model: Model, training: Training, context: Context, place: Path | None) -> Retrained:
    """The model retrained, with the original as teacher, and without the samples it is going to be judged
    on."""
    held_out = context.calibration.held_out
    found: Retrained = retraining().retrain(
        model,
        training,
        context.runtime,
        teacher=context.original,
        checkpoint=place,
        unseen=held_out if held_out.samples and not context.calibration.synthetic else None,
        progress=context.progress,
    )
    return found
