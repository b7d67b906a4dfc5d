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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import InputError, NotApplicableError, unknown_name
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ops.table import OPS, Kind
from onnxfuse.pytorch.bridge.weights import to_tensor
from onnxfuse.pytorch.training.sampling import Pool, Shuffled
from onnxfuse.runtime.feeds import format_shape
from onnxfuse.runtime.session import Runtime, Session
from onnxfuse.verification.interface import interface_problems

KINDS = ("ce", "mse", "distill")
TEMPERATURE = 2.0
Outputs = Mapping[str, Tensor]

_MEASURED = 4  # batches on which a teacher's variance is measured
# What ends in one of these holds no class scores.
_ACTIVATIONS = OPS.of_kind(Kind.ACTIVATION)
_PROBABILITY = 1e-3  # how far from 1 the probabilities of a sample may add up to


class Teacher:
    """A model in ONNX Runtime that gives some of its tensors for any feed."""

    def __init__(self, model: Model, runtime: Runtime, tensors: Sequence[str]) -> None:
        self._session = runtime.session(model, outputs=tensors)

    def __call__(self, feed: Feed) -> Feed:
        return self._session.run(feed)


@dataclass(frozen=True)
class Scores:
    """Where the class scores of an output are.

    Attributes:
        tensor: holds them; the output itself, or what goes into its Softmax.
        axis: that of the classes.
        probabilities: they have gone through a Softmax that can't be taken off, so their logarithm counts.
    """

    tensor: str
    axis: int
    probabilities: bool = False

    def read(self, values: Tensor) -> Tensor:
        """The scores as logits, float32."""
        values = values.float()
        return values.clamp_min(torch.finfo(torch.float32).tiny).log() if self.probabilities else values


@dataclass(frozen=True)
class Term:
    """One tensor's loss: `loss(tensor, target, samples)` is (samples,), or (1,) where the tensor has no axis
    of samples. `target` names the teacher's tensor; None stands for the labels."""

    tensor: str
    target: str | None
    loss: Callable[[Tensor, Tensor, int], Tensor]
    about: str


class Objective:
    """The sum of some terms, for each sample of a batch.

    Attributes:
        tensors: of the model, that the terms are about.
        about: a line for each term.
    """

    def __init__(self, terms: Sequence[Term], teacher: Teacher | None) -> None:
        self._terms = tuple(terms)
        self._teacher = teacher
        self.tensors = tuple(dict.fromkeys(term.tensor for term in terms))
        self.about = tuple(term.about for term in terms)

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
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

    def _loss(self, term: Term, output: Tensor, taught: Feed, batch: Batch) -> Tensor:
        target = batch.labels if term.target is None else taught[term.target]
        assert target is not None
        return term.loss(output, to_tensor(target).to(output.device), batch.samples)


# --- losses -------------------------------------------------------------------------------------------------


def _by_sample(losses: Tensor, samples: int) -> Tensor:
    """The mean of each sample, or of everything where the first axis doesn't count samples."""
    if losses.ndim and len(losses) == samples:
        return losses.reshape(samples, -1).mean(1)
    return losses.mean().reshape(1)


def cross_entropy(scores: Scores) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Against class numbers, in whatever axes of size 1."""

    def loss(output: Tensor, labels: Tensor, samples: int) -> Tensor:
        logits = scores.read(output).movedim(scores.axis, -1)
        classes = logits.shape[-1]
        flat = F.cross_entropy(
            logits.reshape(-1, classes), labels.reshape(-1).to(torch.int64), reduction="none"
        )
        return _by_sample(flat.reshape(logits.shape[:-1]), samples)

    return loss


def divergence(ours: Scores, theirs: Scores) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Kullback-Leibler divergence from the teacher's softened classes, times the squared temperature."""

    def loss(output: Tensor, target: Tensor, samples: int) -> Tensor:
        student = F.log_softmax(ours.read(output) / TEMPERATURE, dim=ours.axis)
        teacher = F.log_softmax(theirs.read(target) / TEMPERATURE, dim=theirs.axis)
        found = F.kl_div(student, teacher, reduction="none", log_target=True).sum(ours.axis)
        return _by_sample(found * TEMPERATURE**2, samples)

    return loss


def squared_error(scale: float = 1.0) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Mean squared error over `scale`; the target may lack or have axes of size 1."""

    def loss(output: Tensor, target: Tensor, samples: int) -> Tensor:
        return _by_sample((output.float() - target.reshape(output.shape).float()).square() / scale, samples)

    return loss


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
    plan = _Plan(model, teacher, pools, runtime, size, name, seed)
    labels = plan.labels.dtype if plan.labels is not None else None
    kind = kind or default_kind(teacher is not None, labels)
    if kind not in KINDS:
        raise InputError(unknown_name("loss", kind, KINDS))
    pairs = plan.pairs(match)
    terms = [*_MAKERS[kind](plan), *plan.matched(pairs)]
    targets = [term.target for term in terms if term.target is not None]
    if teacher is not None and not targets:
        raise InputError(
            f"--loss {kind} learns nothing from the teacher; leave it out, or take --loss distill"
        )
    return Objective(terms, Teacher(teacher, runtime, targets) if teacher is not None else None)


def _ce(plan: _Plan) -> list[Term]:
    labels = plan.wanted_labels("ce")
    if labels.dtype.kind not in "iub":
        raise InputError(_not_classes(plan))
    fitting = [
        (name, scores)
        for name in plan.outputs
        if (scores := plan.scores(name)) is not None and _fits(labels, plan.ours[name], scores.axis)
    ]
    if not fitting:
        raise InputError(
            f"{plan.label_name} of shape {format_shape(labels.shape)} holds no class numbers of any output: "
            + ", ".join(f"'{name}' {format_shape(plan.ours[name].shape)}" for name in plan.outputs)
        )
    name, scores = fitting[0]
    classes = plan.ours[name].shape[scores.axis]
    _check_classes(plan, name, classes)
    about = (
        f"cross-entropy of {_said(name, scores)} against the labels, {classes} classes on axis {scores.axis}"
    )
    return [Term(scores.tensor, None, cross_entropy(scores), about)]


def _mse(plan: _Plan) -> list[Term]:
    if plan.teacher is not None:
        return [plan.relative(name, name, "output") for name in plan.outputs]
    labels = plan.wanted_labels("mse")
    for name in plan.outputs:
        if _squeezed(plan.ours[name].shape) == _squeezed(labels.shape):
            return [Term(name, None, squared_error(), f"mean squared error of '{name}' against the labels")]
    raise InputError(
        f"{plan.label_name} of shape {format_shape(labels.shape)} has the shape of no output: "
        + ", ".join(f"'{name}' {format_shape(plan.ours[name].shape)}" for name in plan.outputs)
    )


def _distill(plan: _Plan) -> list[Term]:
    if plan.teacher is None:
        raise InputError("--loss distill needs a --teacher")
    return [plan.distilled(name) for name in plan.outputs]


_MAKERS: Mapping[str, Callable[[_Plan], list[Term]]]


class _Plan:
    """What is known of both models before a loss is chosen: their outputs on one batch."""

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
        self.model, self.teacher, self.pools = model, teacher, pools
        self.label_name = name
        self._runtime = runtime
        self._sample = _random_batches(pools[0], size, seed)
        batch = self._sample[0]
        self.labels = batch.labels
        self.ours = _run(model, runtime, batch)
        self.outputs = [info.name for info in model.outputs if self.ours[info.name].dtype.kind == "f"]
        if not self.outputs:
            raise NotApplicableError("no output of the model is floating-point: there is nothing to train")
        self.theirs: Feed = {}
        if teacher is not None:
            _check_teacher(model, teacher)
            self.theirs = _run(teacher, runtime, batch)
            for name in self.outputs:
                self._check_alike(name, name, self.theirs[name])

    def wanted_labels(self, kind: str) -> np.ndarray:
        if self.labels is None:
            raise InputError(f"--loss {kind} needs labels: give them as an array 'labels' in the data")
        return self.labels

    def all_labels(self) -> Iterator[tuple[Callable[[int], str], np.ndarray]]:
        """All labels, and for each array of them what messages call its rows."""
        for pool in self.pools:
            for start, labels in pool.labels():
                yield partial(pool.where, start), labels

    def scores(self, name: str) -> Scores | None:
        """The class scores of an output; None where it has no axis for classes."""
        return find_scores(self.model, name, self.ours)

    def distilled(self, name: str) -> Term:
        """The loss of one output against the teacher's."""
        assert self.teacher is not None
        ours, theirs = find_scores(self.model, name, self.ours), find_scores(self.teacher, name, self.theirs)
        regression = self.labels is not None and self.labels.dtype.kind == "f"
        if ours is None or theirs is None or ours.axis != theirs.axis or regression:
            return self.relative(name, name, "output")
        ends = {_ends_in_softmax(self.model, name, ours), _ends_in_softmax(self.teacher, name, theirs)}
        array = self.ours[name]
        # A matrix for each sample may be anything, features too: class numbers that fit tell.
        labelled = (
            self.labels is not None
            and self.labels.dtype.kind in "iub"
            and _fits(self.labels, array, ours.axis)
        )
        flat = array.ndim == 2 and array.shape[1] > 1
        plain = (flat or labelled) and not _is_activated(self.model, name)
        if ends == {True} or (ends == {False} and plain):
            about = f"divergence of {_said(name, ours)} from the teacher, temperature {TEMPERATURE:g}"
            return Term(ours.tensor, theirs.tensor, divergence(ours, theirs), about)
        return self.relative(name, name, "output")

    def relative(self, ours: str, theirs: str, what: str) -> Term:
        """Relative squared error of a tensor against one of the teacher's."""
        scale = self._variance(theirs)
        other = "" if ours == theirs else f"'s '{theirs}'"
        about = f"relative squared error of {what} '{ours}' against the teacher{other}"
        return Term(ours, theirs, squared_error(scale), about)

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

    def matched(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Term]:
        if not pairs:
            return
        assert self.teacher is not None
        feed = self._sample[0].feed
        ours = Teacher(self.model, self._runtime, [name for name, _ in pairs])(feed)
        theirs = Teacher(self.teacher, self._runtime, [name for _, name in pairs])(feed)
        for name, other in pairs:
            self.ours[name] = ours[name]
            self._check_alike(name, other, theirs[other])
            if ours[name].dtype.kind != "f":
                raise InputError(f"--match {name}: the tensor is {ours[name].dtype}, not floating-point")
            yield self.relative(name, other, "tensor")

    def _check_alike(self, ours: str, theirs: str, other: np.ndarray) -> None:
        mine = self.ours[ours]
        if mine.shape != other.shape:
            raise InputError(
                f"'{ours}' has shape {format_shape(mine.shape)} in the model and '{theirs}' "
                f"{format_shape(other.shape)} in the teacher"
            )


_MAKERS = {"ce": _ce, "mse": _mse, "distill": _distill}


def _said(name: str, scores: Scores) -> str:
    """An output and where its scores are, for people."""
    if scores.tensor != name:
        return f"'{name}' (before its Softmax: '{scores.tensor}')"
    return f"'{name}' (probabilities)" if scores.probabilities else f"'{name}'"


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """Like `unknown_name`, for more names than a line can list."""
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


# --- class scores -------------------------------------------------------------------------------------------


def softmax_of(model: Model, output: str) -> Node | None:
    """The Softmax that an output comes from, through nothing but Identity."""
    node = model.producer(model.tensor(output))
    while node is not None and node.op == "Identity" and not node.domain:
        node = model.producer(node.inputs[0])
    return node if node is not None and node.op == "Softmax" and not node.domain else None


def find_scores(model: Model, output: str, values: Mapping[str, np.ndarray]) -> Scores | None:
    """Where the class scores of an output are, judged by the graph and by the values of one batch.

    The classes are on the axis of the graph's own Softmax; without one on the last axis of up to three, else
    on axis 1, where images have their channels.
    """
    array = values[output]
    if array.ndim < 2:
        return None
    node = softmax_of(model, output)
    if node is not None:
        axis = _softmax_axis(node, model.opset, array.shape)
        if axis is not None:
            return Scores(node.inputs[0].name, axis)
    axis = array.ndim - 1 if array.ndim <= 3 else 1
    total = array.astype(np.float64).sum(axis)
    probabilities = array.shape[axis] > 1 and array.min() >= 0 and np.abs(total - 1).max() < _PROBABILITY
    return Scores(output, axis, bool(probabilities))


def _softmax_axis(node: Node, opset: int, shape: tuple[int, ...]) -> int | None:
    """The axis that a Softmax normalises; None where it is several, as before opset 13 it can be."""
    axis = int(node.attrs.get("axis", -1 if opset >= 13 else 1)) % len(shape)
    several = opset < 13 and any(size > 1 for size in shape[axis + 1 :])
    return None if several else axis


def _ends_in_softmax(model: Model, output: str, scores: Scores) -> bool:
    return scores.probabilities or scores.tensor != output


def _is_activated(model: Model, output: str) -> bool:
    node = model.producer(model.tensor(output))
    return node is not None and node.key in _ACTIVATIONS


# --- labels -------------------------------------------------------------------------------------------------


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _fits(labels: np.ndarray, output: np.ndarray, axis: int) -> bool:
    """Whether the output has several classes, and there is a label for each place that holds their scores."""
    places = [size for at, size in enumerate(output.shape) if at != axis]
    return output.shape[axis] > 1 and _squeezed(labels.shape) == _squeezed(places)


def _not_classes(plan: _Plan) -> str:
    """What is wrong with floating-point labels as class numbers, by the first that shows it."""
    advice = "--loss ce wants class numbers as integers, --loss mse takes floats"
    for place, labels in plan.all_labels():
        odd = np.argwhere(labels != np.floor(labels))
        if len(odd):
            value = labels[tuple(odd[0])]
            return f"{plan.label_name} holds {value:g} in {place(int(odd[0][0]))}: {advice}"
    assert plan.labels is not None
    return f"{plan.label_name} is {plan.labels.dtype}: {advice}; convert it with .astype('int64')"


def _check_classes(plan: _Plan, output: str, classes: int) -> None:
    for place, labels in plan.all_labels():
        bad = np.argwhere((labels < 0) | (labels >= classes))
        if len(bad):
            value = labels[tuple(bad[0])]
            raise InputError(
                f"{plan.label_name} holds {value} in {place(int(bad[0][0]))}, "
                f"output '{output}' has the classes 0 to {classes - 1}"
            )
