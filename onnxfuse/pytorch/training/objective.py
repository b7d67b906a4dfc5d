"""What a model is trained for: losses of its outputs, against labels or against a teacher.

- `ce`: cross-entropy of class scores against class numbers, on the first output that the labels fit. Where
  the graph ends in a Softmax, the scores are what goes into it.
- `mse`: mean squared error of the first output that the labels fit; with a teacher, relative squared error of
  every floating-point output.
- `distill`: every floating-point output against the teacher's. Class scores by the Kullback-Leibler
  divergence at temperature 2, times 4, which keeps the gradient's size (Hinton, Vinyals, Dean 2015,
  arXiv:1503.02531, section 2); scores are what goes into a final Softmax, and outputs that end in no
  activation and are of shape (n, classes) or fit labels that are class numbers, one for each token. Other
  outputs by relative squared error.

Inner tensors can be matched with the teacher's besides, by relative squared error too. *Relative* is divided
by the teacher's variance from sample to sample, measured once on some training samples: 1 is what predicting
the mean would give, whatever the tensor's unit, and the loss of a sample doesn't depend on its batch. The
losses of all these tensors are added up.

The teacher runs in ONNX Runtime, batch by batch, so anything that ONNX Runtime runs can teach.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import InputError, NotApplicableError, unknown_name
from onnxfuse.ir.model import Feed, Model
from onnxfuse.pytorch.bridge.tensors import to_tensor
from onnxfuse.pytorch.training.labels import Labels
from onnxfuse.pytorch.training.losses import (
    TEMPERATURE,
    SampleLoss,
    cross_entropy,
    softened_divergence,
    squared_error,
)
from onnxfuse.pytorch.training.sampling import Pool, Shuffled
from onnxfuse.pytorch.training.scores import find_scores, is_activated, softmax_of
from onnxfuse.runtime.feeds import format_shape
from onnxfuse.runtime.narrow import NARROW
from onnxfuse.runtime.session import Runtime, Session
from onnxfuse.verification.interface import interface_problems

KINDS = ("ce", "mse", "distill")

_MEASURED = 4  # batches on which a teacher's variance is measured


class Teacher:
    """A model in ONNX Runtime that gives some of its tensors for any feed."""

    def __init__(self, model: Model, runtime: Runtime, tensors: Sequence[str]) -> None:
        self._session = runtime.session(model, outputs=tensors)

    def __call__(self, feed: Feed) -> Feed:
        return self._session.run(feed)


@dataclass(frozen=True)
class LossTerm:
    """One tensor's loss: `loss(tensor, target, samples)` is (samples,), or (1,) where the tensor has no axis
    of samples. `target` names the teacher's tensor; None stands for the labels."""

    tensor: str
    target: str | None
    loss: SampleLoss
    about: str


class Objective:
    """The sum of some terms, for each sample of a batch.

    Attributes:
        tensors: of the model, that the terms are about.
        about: a line for each term.
    """

    def __init__(self, terms: Sequence[LossTerm], teacher: Teacher | None) -> None:
        self._terms = tuple(terms)
        self._teacher = teacher
        self.tensors = tuple(dict.fromkeys(term.tensor for term in terms))
        self.about = tuple(term.about for term in terms)

    def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The losses of a batch: (samples,), or (1,) where some output has no axis of samples.

        Args:
            outputs: holds at least `tensors`.
            batch: what they were computed from.
        """
        taught = self._teacher(batch.feed) if self._teacher is not None else {}
        losses = [self._loss(term, outputs[term.tensor], taught, batch) for term in self._terms]
        if len({len(loss) for loss in losses}) > 1:
            losses = [loss.mean().reshape(1) for loss in losses]
        return torch.stack(losses).sum(0)

    def _loss(self, term: LossTerm, output: Tensor, taught: Feed, batch: Batch) -> Tensor:
        target = batch.labels if term.target is None else taught[term.target]
        assert target is not None
        return term.loss(output, to_tensor(target).to(output.device), batch.samples)


# --- which losses -------------------------------------------------------------------------------------------


def default_kind(taught: bool, labels: np.dtype | None) -> str:
    """The loss where nobody names one.

    Raises:
        InputError: there is neither a teacher nor a label.
    """
    if taught:
        return "distill"
    if labels is None:
        raise InputError(
            "there is nothing to train for: give labels as an array 'labels' in the data, "
            "or a --teacher, the original for instance"
        )
    return "mse" if labels.kind == "f" else "ce"


def make_objective(
    kind: str | None,
    model: Model,
    pools: Sequence[Pool],
    runtime: Runtime,
    *,
    size: int,
    name: str = "the array of labels",
    teacher: Model | None = None,
    match: Sequence[str] = (),
    seed: int = 0,
) -> Objective:
    """The losses of `model` on some samples.

    Args:
        kind: one of `KINDS`; None takes `default_kind`.
        model, teacher: of the same inputs and outputs.
        pools: the training samples, and others whose labels are to be checked as well.
        runtime: where both run.
        size: rows of a batch, where the pools leave that open.
        name: what messages call the labels.
        match: inner tensors, "NAME" or "NAME=NAME IN THE TEACHER".
        seed: of the samples that the teacher's variance is measured on.

    Raises:
        InputError: labels that are missing, of another kind or that fit no output; a teacher with other
            outputs; no such inner tensor.
        NotApplicableError: ONNX Runtime can't run one of the models.
    """
    known = _Known(model, teacher, pools, runtime, size, name, seed)
    labels = known.labels.sample
    if kind is None and teacher is None and known.labels.one_hot is not None:
        raise InputError(f"{known.labels.one_hot}; --loss mse would meet the numbers as they are")
    kind = kind or default_kind(teacher is not None, labels.dtype if labels is not None else None)
    if kind not in KINDS:
        raise InputError(unknown_name("loss", kind, KINDS))
    pairs = known.pairs(match)
    terms = [*_MAKERS[kind](known), *known.matched(pairs)]
    targets = [term.target for term in terms if term.target is not None]
    if teacher is not None and not targets:
        raise InputError(
            f"--loss {kind} learns nothing from the teacher; leave it out, or take --loss distill"
        )
    return Objective(terms, Teacher(teacher, runtime, targets) if teacher is not None else None)


def _ce(known: _Known) -> list[LossTerm]:
    labels = known.labels.wanted("ce")
    if not known.labels.integral:
        raise InputError(known.labels.why_no_classes())
    fitting = [
        (name, scores)
        for name in known.outputs
        if (scores := find_scores(known.model, name, known.ours)) is not None
        and known.labels.fit_classes(known.ours[name], scores.axis)
    ]
    if not fitting and known.labels.one_hot is not None:
        raise InputError(known.labels.one_hot)
    if not fitting:
        raise InputError(
            f"{known.labels.name} of shape {format_shape(labels.shape)} holds no class numbers "
            "of any output: "
            + ", ".join(f"'{name}' {format_shape(known.ours[name].shape)}" for name in known.outputs)
        )
    name, scores = fitting[0]
    classes = known.ours[name].shape[scores.axis]
    known.labels.check_classes(name, classes)
    said = scores.named(name)
    about = f"cross-entropy of {said} against the labels, {classes} classes on axis {scores.axis}"
    return [LossTerm(scores.tensor, None, cross_entropy(scores), about)]


def _mse(known: _Known) -> list[LossTerm]:
    if known.teacher is not None:
        return [known.relative(name, name, "output") for name in known.outputs]
    labels = known.labels.wanted("mse")
    for name in known.outputs:
        if known.labels.fit_shape(known.ours[name].shape):
            return [
                LossTerm(name, None, squared_error(), f"mean squared error of '{name}' against the labels")
            ]
    raise InputError(
        f"{known.labels.name} of shape {format_shape(labels.shape)} has the shape of no output: "
        + ", ".join(f"'{name}' {format_shape(known.ours[name].shape)}" for name in known.outputs)
    )


def _distill(known: _Known) -> list[LossTerm]:
    if known.teacher is None:
        raise InputError("--loss distill needs a --teacher")
    return [known.distilled(name) for name in known.outputs]


_MAKERS = {"ce": _ce, "mse": _mse, "distill": _distill}


class _Known:
    """Both models and their outputs on one batch, as known before a loss is chosen."""

    def __init__(
        self,
        model: Model,
        teacher: Model | None,
        pools: Sequence[Pool],
        runtime: Runtime,
        size: int,
        name: str,
        seed: int,
    ) -> None:
        self.model, self.teacher = model, teacher
        self._runtime = runtime
        self._sample = _random_batches(pools[0], size, seed)
        batch = self._sample[0]
        self.labels = Labels(name, batch.labels, pools)
        self.ours = _run(model, runtime, batch)
        self.outputs = [info.name for info in model.outputs if _is_floating(self.ours[info.name])]
        if not self.outputs:
            raise NotApplicableError("no output of the model is floating-point: there is nothing to train")
        self.theirs: Feed = {}
        if teacher is not None:
            _check_teacher(model, teacher)
            self.theirs = _run(teacher, runtime, batch)
            for name in self.outputs:
                self._check_alike(name, name, self.theirs[name])

    def distilled(self, name: str) -> LossTerm:
        """The loss of one output against the teacher's."""
        assert self.teacher is not None
        ours, theirs = find_scores(self.model, name, self.ours), find_scores(self.teacher, name, self.theirs)
        if ours is None or theirs is None or ours.axis != theirs.axis or self.labels.numeric:
            return self.relative(name, name, "output")
        ends = {ours.normalized(name), theirs.normalized(name)}
        array = self.ours[name]
        # A matrix for each sample may be anything, features too: class numbers that fit tell.
        labeled = self.labels.integral and self.labels.fit_classes(array, ours.axis)
        flat = array.ndim == 2 and array.shape[1] > 1
        plain = (flat or labeled) and not is_activated(self.model, name)
        if ends == {True} or (ends == {False} and plain):
            about = f"divergence of {ours.named(name)} from the teacher, temperature {TEMPERATURE:g}"
            return LossTerm(ours.tensor, theirs.tensor, softened_divergence(ours, theirs), about)
        return self.relative(name, name, "output")

    def relative(self, ours: str, theirs: str, what: str) -> LossTerm:
        """Relative squared error of a tensor against one of the teacher's."""
        scale = self._variance(theirs)
        other = "" if ours == theirs else f"'s '{theirs}'"
        about = f"relative squared error of {what} '{ours}' against the teacher{other}"
        return LossTerm(ours, theirs, squared_error(scale), about)

    def _variance(self, tensor: str) -> float:
        """The teacher's variance from sample to sample; its mean square where it doesn't vary, or 1."""
        assert self.teacher is not None
        teacher = Teacher(self.teacher, self._runtime, [tensor])
        deviation, freedom, square, count = 0.0, 0, 0.0, 0
        for batch in self._sample:
            values = teacher(batch.feed)[tensor].astype(np.float64)
            rows = len(values) if values.ndim and len(values) == batch.samples and batch.samples > 1 else 0
            mean = values.mean(0) if rows else values.mean()
            deviation += float(np.square(values - mean).sum())
            freedom += values.size - values.size // rows if rows else values.size - 1
            square += float(np.square(values).sum())
            count += values.size
        if deviation > 1e-12 * square:
            return deviation / freedom
        return square / count if square else 1.0

    def pairs(self, match: Sequence[str]) -> list[tuple[str, str]]:
        """The tensors to match, by name in the model and in the teacher."""
        if match and self.teacher is None:
            raise InputError("--match needs a --teacher")
        found = []
        for text in match:
            here = _tensor_names(self.model)
            ours, equals, theirs = text.partition("=")
            if text in here or not equals:
                ours = theirs = text
            assert self.teacher is not None
            for name, names, owner in (
                (ours, here, "model"),
                (theirs, _tensor_names(self.teacher), "teacher"),
            ):
                if name not in names:
                    raise InputError(f"--match {text}: {_unknown(f'tensor of the {owner}', name, names)}")
            found.append((ours, theirs))
        return found

    def matched(self, pairs: Sequence[tuple[str, str]]) -> Iterator[LossTerm]:
        if not pairs:
            return
        assert self.teacher is not None
        feed = self._sample[0].feed
        ours = Teacher(self.model, self._runtime, [name for name, _ in pairs])(feed)
        theirs = Teacher(self.teacher, self._runtime, [name for _, name in pairs])(feed)
        for name, other in pairs:
            self.ours[name] = ours[name]
            self._check_alike(name, other, theirs[other])
            if not _is_floating(ours[name]):
                raise InputError(f"--match {name}: the tensor is {ours[name].dtype}, not floating-point")
            yield self.relative(name, other, "tensor")

    def _check_alike(self, ours: str, theirs: str, other: np.ndarray) -> None:
        mine = self.ours[ours]
        if mine.shape != other.shape:
            raise InputError(
                f"'{ours}' has shape {format_shape(mine.shape)} in the model and '{theirs}' "
                f"{format_shape(other.shape)} in the teacher"
            )


def _is_floating(value: Any) -> bool:
    """Whether an output can be trained: floats in a tensor, no sequence."""
    return isinstance(value, np.ndarray) and (value.dtype.kind == "f" or value.dtype in NARROW)


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """The message of `unknown_name`, for more names than a line can list."""
    near = difflib.get_close_matches(name, list(names), n=3)
    guess = f"; did you mean {', '.join(repr(n) for n in near)}?" if near else ""
    return f"there is no {kind} named '{name}'{guess}"


def _tensor_names(model: Model) -> dict[str, None]:
    """The computed tensors of the main graph."""
    return dict.fromkeys(t.name for node in model.nodes for t in node.outputs if t.name)


def _random_batches(pool: Pool, size: int, seed: int) -> list[Batch]:
    batches = Shuffled(pool, size, seed).epoch(0)
    return [batch for batch, _ in zip(batches, range(_MEASURED), strict=False)]


def _run(model: Model, runtime: Runtime, batch: Batch) -> Feed:
    """The outputs of a model on a batch, and the inputs of the Softmaxes that they end in."""
    names = [info.name for info in model.outputs]
    taps = [node.inputs[0].name for name in names if (node := softmax_of(model, name)) is not None]
    session: Session = runtime.session(model, taps=taps)
    return session.run(batch.feed)


def _check_teacher(model: Model, teacher: Model) -> None:
    labels = (_called(model, "the model"), _called(teacher, "the teacher"))
    problems = interface_problems(model, teacher, labels)
    if problems:
        raise InputError(f"the teacher does not fit: {problems[0]}")


def _called(model: Model, what: str) -> str:
    return f"{what} '{model.path}'" if model.path else what
