"""Do two models compute the same? The judge behind every pass and behind `onnxfuse verify A B`.

Tolerance is measured, not chosen. Floating-point arithmetic leaves a model's output uncertain by an amount
that depends on the model and on the samples; that amount, the *noise floor*, is how far the first model
differs from itself when nothing that matters changes:

- ONNX Runtime's graph optimizations off (other kernels, other summation order, folded weights);
- one thread instead of many;
- every floating-point input moved to a neighboring float, up or down at random, three times (conditioning).

The floor of an output is the largest of these differences, and never less than the spacing of floats at the
output's own size. Two numbers are kept, the root mean square over all elements and the peak: the
first sees a small change that is everywhere, the second a large change of one element. A difference counts
when either exceeds `MULTIPLE` times its floor.

Why eight: on thirteen trained models (residual and mobile CNNs, text detection and recognition, an LSTM; 36k
to 2.7M parameters; ONNX Runtime on CPU), every linear operator rescaled and its output scaled back, every
convolution split over its input channels, every BatchNormalization folded, reach 3.2 floors at most (median
1.0; 24 of 29 reach 1.5 at most). One weight of the network off by a thousandth of its tensor's largest: of
145 such that change the output at all, 99 exceed eight floors (the median of these has 80), 35 lie between
one and eight, 11 below one. The floors lie between 3e-7 and 1e-4 relative; one model, fed with noise it
answers with a saturated sigmoid, has 3e-2, and the comparison says so (`Comparison.notes`).

NaN and infinity fail wherever they come from. Outputs that are not floating-point must be equal. Sequences
and maps are compared element by element. Outputs are matched by name; the same batches run at several sizes.

Relative errors are root mean square difference over root mean square deviation of the first model's output
from its mean over the samples, so 1 is what predicting the mean would give: sqrt(sum |a - b|^2 / sum |a -
mean(a)|^2). Where the output has no sample axis, or there is but one sample, the mean is over all elements;
an output that does not vary at all is measured against its own root mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.numerics.sampling import RowSampler, row_shape
from onnxfuse.protos import light_graph
from onnxfuse.runtime import format_shape
from onnxfuse.samples import batch_axes, fixed_batch

if TYPE_CHECKING:
    from onnxfuse.calibration import Batch, Calibration
    from onnxfuse.findings import Prediction
    from onnxfuse.graph import Model, TensorInfo
    from onnxfuse.runtime import Feed, Runtime, Session

MULTIPLE = 8.0
"""How many noise floors a difference may reach; the module docstring has the evidence."""

BATCH_SIZES = (1, 3)
"""Rows that the first batch is cut to, beside its full size, where the model's batch axis is dynamic."""

INSENSITIVE = 1e-2
"""Relative noise floor above which a comparison says that the samples test little."""

PREDICTION_TOLERANCE = 1e-3
"""Relative difference allowed between a predicted and a measured error, beside what float noise explains."""

_NUDGES = 3  # draws of moved inputs
_FEW = 4  # rows of a batch that a search for a divergence and a tensor's noise floor begin with
_CHUNK = 64  # tensors tapped at a time in search of a divergence

Floors = Mapping[str, "Floor"]
Run = Callable[["Feed"], dict[str, Any]]


@dataclass(frozen=True)
class Floor:
    """How far an output differs from itself, in its own unit: root mean square and largest difference."""

    rms: float
    peak: float


@dataclass(frozen=True)
class OutputDifference:
    """One output of two models.

    `relative` and `floor` are relative errors (module docstring); for outputs that are not floating-point,
    `relative` is the share of elements that differ. `max_abs` is in the output's unit. `ratio` is the
    difference in noise floors, the larger of root mean square and peak. `problem` is a difference of kind:
    NaN, shape, type.
    """

    name: str
    relative: float
    max_abs: float
    floor: float
    ratio: float
    problem: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models' outputs side by side. `problems` are differences of interface, which leave nothing to
    run."""

    outputs: tuple[OutputDifference, ...]
    multiple: float
    samples: int
    batch_sizes: tuple[int, ...]
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems and all(self._passes(output) for output in self.outputs)

    def _passes(self, output: OutputDifference) -> bool:
        return output.problem is None and output.ratio <= self.multiple

    @property
    def reason(self) -> str | None:
        """One line: why it did not pass; None if it did."""
        if self.problems:
            return self.problems[0]
        failed = [output for output in self.outputs if not self._passes(output)]
        if not failed:
            return None
        worst = max(failed, key=lambda output: (output.problem is not None, output.ratio))
        if worst.problem:
            return f"output {worst.problem}"
        if np.isinf(worst.ratio):
            return f"output '{worst.name}' must be equal and {worst.relative:.2%} of its elements differ"
        return (
            f"output '{worst.name}' differs by {worst.relative:.2g} relative ({worst.max_abs:.2g} at most), "
            f"{worst.ratio:.3g} times the noise floor; {self.multiple:g} times is allowed"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What weakens a comparison that passed: outputs that these samples hardly determine."""
        return tuple(
            f"output '{output.name}' is noise to {output.floor:.0%} on these samples, which test it little"
            for output in self.outputs
            if output.floor > INSENSITIVE
        )


@dataclass(frozen=True)
class Divergence:
    """The first tensor, in topological order, at which two models differ beyond its own noise floor."""

    tensor: str
    node: str
    op: str
    relative: float
    floor: float
    problem: str | None = None

    def __str__(self) -> str:
        where = f"first at tensor '{self.tensor}' ({self.op} '{self.node}')"
        return f"{where}: {self.problem or f'{self.relative:.2g} relative, noise floor {self.floor:.2g}'}"


@dataclass(frozen=True)
class PredictionCheck:
    """A predicted error, the measured one and how far apart they may be: squared units, summed over
    channels."""

    tensor: str
    predicted: float
    measured: float
    tolerance: float
    variance: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and abs(self.measured - self.predicted) <= self.tolerance

    @property
    def reason(self) -> str | None:
        if self.passed:
            return None
        if self.problem:
            return self.problem
        return (
            f"tensor '{self.tensor}': predicted a mean squared error of {self.predicted:.6g}, measured "
            f"{self.measured:.6g} (tolerance {self.tolerance:.2g})"
        )


@dataclass(frozen=True)
class OutputError:
    """Relative error of each output (module docstring) over `samples` samples."""

    outputs: Mapping[str, float]
    samples: int

    @property
    def worst(self) -> float:
        """The largest of them; 0 without outputs."""
        return max(self.outputs.values(), default=0.0)

    def over(self, bound: float, called: str, where: str = "") -> str | None:
        """Why the worst output breaks a bound; None if it does not.

        Args:
            bound: on the relative error.
            called: the bound in words, "the allowed"; may be empty.
            where: of what the error is, in words.
        """
        if self.worst <= bound:
            return None
        name = max(self.outputs, key=lambda output: self.outputs[output])
        above = f"{called} {bound:g}".lstrip()
        return f"the relative error of output '{name}'{where} is {self.worst:.3g}, above {above}"


# --- outputs, one at a time ---------------------------------------------------------------------------------


def _leaves(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in an output: itself, or the elements of a sequence, a map or an optional."""
    if value is None:
        return
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _leaves(f"{name}[{key!r}]", value[key])
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    else:
        yield name, np.asarray(value)


def _is_float(array: np.ndarray) -> bool:
    """Floating-point or complex; `V` are the small floats that NumPy itself does not know (bfloat16,
    float8)."""
    return array.dtype.kind in "fcV"


def _epsilon(dtype: np.dtype) -> float:
    """Spacing of floats at 1; eight bits of mantissa are taken for types that NumPy does not know."""
    return float(np.finfo(dtype).eps) if dtype.kind in "fc" else 2.0**-7


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


class _Spread:
    """Streaming deviation of an output from its mean over the samples (axis 0), or over all elements."""

    def __init__(self) -> None:
        self.elements = 0
        self.rows = 0
        self.square = 0.0
        self._total: np.ndarray | None = None  # per element of a row, None once rows differ in shape
        self._sum: complex = 0.0
        self._by_row = True

    def add(self, x: np.ndarray, samples: int) -> None:
        self.elements += x.size
        self.square += float(np.vdot(x, x).real)
        self._sum += complex(x.sum())
        self._by_row &= x.ndim > 0 and x.shape[0] == samples
        self._by_row &= self._total is None or (self._by_row and self._total.shape == x.shape[1:])
        if self._by_row:
            self._total = x.sum(axis=0) + (0 if self._total is None else self._total)
            self.rows += samples

    @property
    def scale(self) -> float:
        """Root mean square deviation; the root mean square itself where there is no deviation."""
        if self.elements == 0:
            return 0.0
        if self._by_row and self.rows > 1 and self._total is not None:
            mean = float(np.vdot(self._total, self._total).real) / self.rows
        else:
            mean = abs(self._sum) ** 2 / self.elements
        deviation = self.square - mean
        return float(np.sqrt((deviation if deviation > 1e-12 * self.square else self.square) / self.elements))


class _Tally:
    """Streaming difference of one output between two runs, a and b."""

    def __init__(self) -> None:
        self.count = 0
        self.square = 0.0
        self.peak = 0.0
        self.unequal = 0
        self.exact = False  # not floating-point: must be equal
        self.problem: str | None = None

    def add(self, name: str, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> None:
        self.problem = self.problem or _mismatch(name, a, b, labels)
        if self.problem:
            return
        self.count += a.size
        if not _is_float(a):
            self.exact = True
            self.unequal += int(np.count_nonzero(a != b))
        elif a.size:
            distance = np.abs(_wide(a) - _wide(b))
            self.square += float(np.vdot(distance, distance))
            self.peak = max(self.peak, float(distance.max()))

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.square / self.count)) if self.count else 0.0


def _mismatch(name: str, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> str | None:
    """A difference of kind between two arrays, or a value that no comparison survives."""
    if a.dtype != b.dtype:
        return f"'{name}' is {a.dtype} in {labels[0]} and {b.dtype} in {labels[1]}"
    if a.shape != b.shape:
        return f"'{name}' has shape {list(a.shape)} in {labels[0]} and {list(b.shape)} in {labels[1]}"
    if _is_float(a):
        for array, label in ((a, labels[0]), (b, labels[1])):
            finite = np.isfinite(_wide(array))
            if not finite.all():
                kind = "NaN" if np.isnan(_wide(array)).any() else "infinity"
                return (
                    f"'{name}' of {label} has {kind} in {np.count_nonzero(~finite)} of {array.size} elements"
                )
    return None


class _Pair:
    """Streaming differences of all outputs between two runs."""

    def __init__(self, labels: tuple[str, str]) -> None:
        self.tallies: dict[str, _Tally] = {}
        self.labels = labels

    def add(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        for name, value in a.items():
            left, right = dict(_leaves(name, value)), dict(_leaves(name, b[name]))
            for leaf in left.keys() ^ right.keys():
                owner, other = self.labels if leaf in left else self.labels[::-1]
                tally = self.tallies.setdefault(leaf, _Tally())
                tally.problem = f"'{leaf}' is in {owner} and not in {other}"
            for leaf in left.keys() & right.keys():
                self.tallies.setdefault(leaf, _Tally()).add(leaf, left[leaf], right[leaf], self.labels)


class _Floors:
    """Streaming noise floor of one model's outputs, from variants that ought to compute the same."""

    def __init__(self, variants: Sequence[Run]) -> None:
        self.variants = variants
        self.pairs = [_Pair(("itself", "itself")) for _ in variants]
        self.smallest: dict[str, tuple[float, float, int]] = {}  # sum of squares, peak, count, in last places

    def add(self, feed: Feed, outputs: Mapping[str, Any]) -> None:
        for variant, pair in zip(self.variants, self.pairs, strict=True):
            again = variant(feed)
            pair.add({name: outputs[name] for name in again}, again)
        for name, value in outputs.items():
            for leaf, array in _leaves(name, value):
                if _is_float(array) and array.size:
                    size = np.abs(_wide(array)) * _epsilon(array.dtype)
                    square, peak, count = self.smallest.get(leaf, (0.0, 0.0, 0))
                    entry = (
                        square + float(np.vdot(size, size)),
                        max(peak, float(size.max())),
                        count + size.size,
                    )
                    self.smallest[leaf] = entry

    def result(self) -> dict[str, Floor]:
        floors = {}
        for leaf, (square, peak, count) in self.smallest.items():
            seen = [pair.tallies[leaf] for pair in self.pairs if leaf in pair.tallies]
            rms = max([float(np.sqrt(square / count)), *(tally.rms for tally in seen)])
            floors[leaf] = Floor(rms, max([peak, *(tally.peak for tally in seen)]))
        return floors


# --- variants that change nothing that matters --------------------------------------------------------------


def _nudged(feed: Feed, random: np.random.Generator) -> Feed:
    """Every floating-point input moved to a neighboring float, up or down at random."""

    def nudge(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f":
            return array
        towards = np.where(random.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype)
        return np.asarray(np.nextafter(array, towards))

    return {name: nudge(array) for name, array in feed.items()}


def _variants(model: Model, runtime: Runtime, base: Session, **kind: Any) -> list[Run]:
    """Runs that ought to give what `base` does, a session of `model`; `kind` are the options that it was made
    with."""
    random = np.random.default_rng(0)
    runs: list[Run] = [runtime.session(model, optimize=False, **kind).run]
    if runtime.threads > 1:
        runs.append(runtime.session(model, threads=1, **kind).run)
    if any(info.dtype is not None and info.dtype.kind == "f" for info in base.inputs):
        runs.extend([lambda feed: base.run(_nudged(feed, random))] * _NUDGES)
    return runs


def _feeds(model: Model, batches: Iterable[Batch], run: Run) -> Iterator[tuple[Feed, Any, int]]:
    """Each batch's feed, the outputs of `run`, and the number of rows; the first batch also cut to
    `BATCH_SIZES`, where `run` accepts that.

    A dimension can be declared dynamic and still be fixed by a Reshape inside; sizes that the first model
    itself refuses prove nothing about the second.
    """
    for number, batch in enumerate(batches):
        if number == 0:
            for size in BATCH_SIZES:
                cut = first_rows(model, batch, size)
                if cut is None:
                    continue
                try:
                    outputs = run(cut)
                except NotApplicableError:
                    continue
                yield cut, outputs, size
        yield batch.feed, run(batch.feed), batch.samples


def first_rows(model: Model, batch: Batch, size: int) -> Feed | None:
    """The first rows of a batch, cut along the dynamic batch axes of the inputs; None where that is no cut.

    Args:
        model: whose inputs are fed.
        batch: the batch.
        size: the number of rows.
    """
    every = batch_axes(model.inputs)
    axes = {name: axis for name, axis in every.items() if axis is not None}
    rows = {batch.feed[name].shape[axis] for name, axis in axes.items() if batch.feed[name].ndim > axis}
    if rows != {batch.samples} or size >= batch.samples or fixed_batch(model.inputs, every) is not None:
        return None
    cut = {name: np.take(batch.feed[name], range(size), axis=axis) for name, axis in axes.items()}
    return {**batch.feed, **cut}


def few_rows(model: Model, batches: Iterable[Batch], size: int) -> Feed:
    """The first rows of the first batch, or all of it where that is no cut.

    Args:
        model: whose inputs are fed.
        batches: at least one.
        size: the number of rows.
    """
    batch = next(iter(batches))
    return first_rows(model, batch, size) or batch.feed


# --- the questions ------------------------------------------------------------------------------------------


def structure_problem(before: Model, after: Model, runtime: Runtime) -> str | None:
    """Why `after` is no valid rewrite of `before`, judged without running it; None if it is one.

    Inputs and outputs must be the same, in the same order; the ONNX checker must not object to anything it
    did not object to before; ONNX Runtime must load it.

    Args:
        before: the model that was rewritten.
        after: the rewritten one.
        runtime: loads it.
    """
    if problems := interface_problems(before, after, ("the model before", "the result")):
        return problems[0]
    for kind, ours, theirs in (
        ("inputs", before.inputs, after.inputs),
        ("outputs", before.outputs, after.outputs),
    ):
        if [info.name for info in ours] != [info.name for info in theirs]:
            return f"the order of the {kind} changed"
    complaint = _checker_complaint(after)
    if complaint is not None and complaint != _checker_complaint(before):
        return f"the result is no valid ONNX model: {complaint}"
    try:
        runtime.session(after)
    except NotApplicableError as error:
        return f"the result: {error}"
    return None


def _checker_complaint(model: Model) -> str | None:
    """The ONNX checker's first line about the graph. It goes without bulky weights: the checker wants their
    values, external files included, and fails above 2 GB, but says nothing about values that is worth
    that."""
    proto = model.to_proto()
    light = light_graph(proto.graph, keep_dims=False)
    proto.graph.CopyFrom(light)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def interface_problems(a: Model, b: Model, labels: tuple[str, str]) -> list[str]:
    """Differences between two models' inputs and outputs by name, type and declared shape, a line each.

    Args:
        a, b: the models.
        labels: what the lines call the two.
    """
    problems: list[str] = []
    for kind, left, right in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        ours, theirs = {info.name: info for info in left}, {info.name: info for info in right}
        for names, owner, other in ((ours, *labels), (theirs, *reversed(labels))):
            missing = [name for name in names if name not in (theirs if names is ours else ours)]
            problems.extend(f"{kind} '{name}' is in {owner} and not in {other}" for name in missing)
        for name in ours.keys() & theirs.keys():
            if difference := _declared_difference(ours[name], theirs[name]):
                problems.append(
                    f"{kind} '{name}' is {difference[0]} in {labels[0]} and {difference[1]} in {labels[1]}"
                )
    return problems


def _declared_difference(a: TensorInfo, b: TensorInfo) -> tuple[str, str] | None:
    """Types or shapes of two declarations that contradict each other, in words; None where none do. An
    unknown or dynamic size contradicts nothing."""
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        return str(a.dtype), str(b.dtype)
    if a.shape is None or b.shape is None:
        return None
    sizes = zip(a.shape, b.shape, strict=False)
    clash = any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in sizes)
    if clash or len(a.shape) != len(b.shape):
        return format_shape(a.shape), format_shape(b.shape)
    return None


def compare(
    a: Model,
    b: Model,
    batches: Iterable[Batch],
    runtime: Runtime,
    *,
    multiple: float = MULTIPLE,
    labels: tuple[str, str] = ("the original", "the result"),
) -> Comparison:
    """The outputs of two models side by side, each difference in noise floors of the first model.

    Args:
        a, b: the models.
        batches: fed to both, whole; the first one also cut to `BATCH_SIZES`.
        runtime: runs both.
        multiple: how many noise floors a difference may reach.
        labels: what the messages call the two.

    Raises:
        InputError: the batches do not fit `a`.
        NotApplicableError: `a` fails on a batch, or one of the two does not load.
    """
    problems = interface_problems(a, b, labels)
    if problems:
        return Comparison((), multiple, 0, (), tuple(problems))
    other = runtime.session(b).run
    return _compared(a, runtime.session(a), {}, other, batches, runtime, multiple, labels)


def compare_run(
    a: Model,
    run: Run,
    batches: Iterable[Batch],
    runtime: Runtime,
    *,
    tensors: Sequence[str],
    labels: tuple[str, str] = ("the model", "the module"),
) -> Comparison:
    """Tensors of a model beside something else that computes them, as `compare` has two models' outputs.

    Args:
        a: the model.
        run: takes a feed and returns the tensors by name.
        batches: fed to both, as in `compare`.
        runtime: runs the model.
        tensors: names of tensors of `a`.
        labels: what the messages call the two.

    Raises:
        InputError, NotApplicableError: as `compare`.
    """
    kind: dict[str, Any] = {"taps": tuple(tensors), "outputs": ()}
    base = runtime.session(a, **kind)
    return _compared(a, base, kind, run, batches, runtime, MULTIPLE, labels)


def _compared(
    a: Model,
    base: Session,
    kind: dict[str, Any],
    other: Run,
    batches: Iterable[Batch],
    runtime: Runtime,
    multiple: float,
    labels: tuple[str, str],
) -> Comparison:
    """The outputs of `base`, a session of `a` made with `kind`, beside those of `other`."""
    floors = _Floors(_variants(a, runtime, base, **kind))
    pair = _Pair(labels)
    spreads: dict[str, _Spread] = {}
    sizes: dict[int, None] = {}
    samples = 0
    for feed, outputs, rows in _feeds(a, batches, base.run):
        try:
            pair.add(outputs, other(feed))
        except NotApplicableError as error:
            failure = f"{labels[1]} fails where {labels[0]} runs, with a batch of {rows}: {error}"
            return Comparison((), multiple, samples, (*sizes, rows), (failure,))
        floors.add(feed, outputs)
        _add_spreads(spreads, outputs, rows)
        sizes[rows] = None
        samples += rows
    known = floors.result()
    found = tuple(_difference(name, tally, spreads.get(name), known) for name, tally in pair.tallies.items())
    return Comparison(found, multiple, samples, tuple(sizes))


def _add_spreads(spreads: dict[str, _Spread], outputs: Mapping[str, Any], rows: int) -> None:
    for name, value in outputs.items():
        for leaf, array in _leaves(name, value):
            if _is_float(array):
                spreads.setdefault(leaf, _Spread()).add(_wide(array), rows)


def _difference(name: str, tally: _Tally, spread: _Spread | None, floors: Floors) -> OutputDifference:
    if tally.problem or tally.exact or spread is None:
        share = tally.unequal / tally.count if tally.count else 0.0
        return OutputDifference(name, share, 0.0, 0.0, np.inf if tally.unequal else 0.0, tally.problem)
    floor = floors.get(name, Floor(0.0, 0.0))
    ratio = max(_quotient(tally.rms, floor.rms), _quotient(tally.peak, floor.peak))
    relative, relative_floor = _quotient(tally.rms, spread.scale), _quotient(floor.rms, spread.scale)
    return OutputDifference(name, relative, tally.peak, relative_floor, ratio)


def _quotient(value: float, unit: float) -> float:
    return value / unit if unit > 0 else (np.inf if value > 0 else 0.0)


def output_error(a: Model, b: Model, batches: Iterable[Batch], runtime: Runtime) -> OutputError:
    """Relative error of `b`'s outputs against `a`'s over all of `batches`: what `--max-error` bounds.

    For outputs that are not floating-point it is the share of elements that differ.

    Raises:
        VerificationError: NaN or infinity, or outputs of another shape or type.
        InputError, NotApplicableError: as `compare`.
    """
    labels = ("the original", "the result")
    if problems := interface_problems(a, b, labels):
        raise VerificationError(problems[0])
    base, other = runtime.session(a), runtime.session(b)
    samples = 0

    def runs() -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], int]]:
        nonlocal samples
        for batch in batches:
            samples += batch.samples
            yield base.run(batch.feed), other.run(batch.feed), batch.samples

    found = differences(runs(), labels)
    if problem := next((output.problem for output in found if output.problem), None):
        raise VerificationError(f"output {problem}")
    return OutputError({output.name: output.relative for output in found}, samples)


def differences(
    runs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any], int]],
    labels: tuple[str, str] = ("the original", "the result"),
) -> list[OutputDifference]:
    """How far the second's outputs are from the first's, over all batches; noise floors are left out.

    Args:
        runs: for each batch the outputs of both by name, and its number of samples.
        labels: what the messages call the two.
    """
    pair = _Pair(labels)
    spreads: dict[str, _Spread] = {}
    for outputs, others, samples in runs:
        pair.add(outputs, others)
        _add_spreads(spreads, outputs, samples)
    return [_difference(name, tally, spreads.get(name), {}) for name, tally in pair.tallies.items()]


def first_divergence(
    a: Model,
    b: Model,
    batch: Batch,
    runtime: Runtime,
    *,
    multiple: float = MULTIPLE,
    labels: tuple[str, str] = ("the original", "the result"),
) -> Divergence | None:
    """The first tensor, in the topological order of `a`, that both models have and compute differently; None
    where there is none.

    Every tensor is held against its own noise floor. Tensors are tapped a few dozen at a time, in order, up
    to the first that diverges: a later tensor may agree again (a dead channel, a saturated sigmoid), so
    halving the interval would not find it. For explaining a failed comparison, not for making one: names that
    were given a new meaning diverge rightly.

    Args:
        a, b: the models.
        batch: fed to both; a few rows of it first.
        runtime: runs both.
        multiple: how many noise floors a difference may reach.
        labels: what the messages call the two.

    Raises:
        InputError, NotApplicableError: as `compare`.
    """
    theirs = {tensor.name for node in b.nodes for tensor in node.outputs if tensor.name}
    common = {
        tensor.name: node
        for node in a.nodes
        for tensor in node.outputs
        if tensor.name in theirs
        and not a.is_weight(tensor)
        and (tensor.name in a.index_maps) == (tensor.name in b.index_maps)  # a cut one can't be compared
    }
    names = list(common)
    for feed, rows, chunk in _attempts(a, batch):
        for start in range(0, len(names), chunk):
            tensors = names[start : start + chunk]
            found = _differing(a, b, tensors, feed, rows, runtime, labels)
            beyond = [output for output in found if output.problem or output.ratio > multiple]
            for name in tensors:
                node = common[name]
                for at in beyond:
                    if at.name == name or at.name.startswith(f"{name}["):
                        return Divergence(at.name, node.name, node.op, at.relative, at.floor, at.problem)
    return None


def _attempts(model: Model, batch: Batch) -> Iterator[tuple[Feed, int, int]]:
    """Feeds with their rows and the number of tensors to tap at a time: a few rows, then all of them for
    where those show nothing.

    Inner tensors of a whole batch can be large; the product of rows and taps is what bounds the memory.
    """
    few = first_rows(model, batch, _FEW)
    if few is not None:
        yield few, _FEW, _CHUNK
    yield batch.feed, batch.samples, max(1, _CHUNK * _FEW // max(batch.samples, _FEW))


def _differing(
    a: Model,
    b: Model,
    tensors: Sequence[str],
    feed: Feed,
    rows: int,
    runtime: Runtime,
    labels: tuple[str, str],
) -> list[OutputDifference]:
    """Differences of `tensors` on one batch, those alone that differ at all: noise floors take time."""
    base = runtime.session(a, taps=tensors, outputs=())
    outputs = base.run(feed)
    pair = _Pair(labels)
    pair.add(outputs, runtime.session(b, taps=tensors, outputs=()).run(feed))
    different = [name for name, tally in pair.tallies.items() if tally.problem or tally.unequal or tally.peak]
    if not different:
        return []
    floors = _Floors(_variants(a, runtime, base, taps=tensors, outputs=()))
    floors.add(feed, outputs)
    spreads: dict[str, _Spread] = {}
    _add_spreads(spreads, outputs, rows)
    known = floors.result()
    return [_difference(name, pair.tallies[name], spreads.get(name), known) for name in different]


def check_predictions(
    original: Model,
    result: Model,
    predictions: Sequence[Prediction],
    calibration: Calibration,
    runtime: Runtime,
    seed: int,
) -> list[PredictionCheck]:
    """The predicted errors beside the measured ones: both whole models, tapped, over the fit samples, at the
    claimed positions.

    A prediction holds when |measured - predicted| <= `PREDICTION_TOLERANCE` * predicted + 2 n sqrt(predicted)
    + n^2, where n is the length of the float noise on a row: `MULTIPLE` noise floors of the reference, times
    the square root of the number of channels. (With e the error of a row and n noise on it, |e + n|^2 differs
    from |e|^2 by at most 2 |e| |n| + |n|^2.)

    Args:
        original: has the references.
        result: has the tensors.
        predictions: the claims.
        calibration: its fit samples are measured on.
        runtime: runs both.
        seed: of the sampled positions, that of the claims.

    Raises:
        InputError: a prediction names a tensor that is not there.
    """
    if not predictions:
        return []
    references = list(dict.fromkeys(p.reference for p in predictions))
    tensors = list(dict.fromkeys(p.tensor for p in predictions))
    before = runtime.session(original, taps=references, outputs=())
    after = runtime.session(result, taps=tensors, outputs=())
    floors: dict[str, Floor] | None = None
    measured = [_Measured(prediction, seed) for prediction in predictions]
    for batch in calibration.fit:
        if floors is None:
            few = first_rows(original, batch, _FEW) or batch.feed
            noise = _Floors(_variants(original, runtime, before, taps=references, outputs=()))
            noise.add(few, before.run(few))
            floors = noise.result()
        outputs = before.run(batch.feed)
        rewritten = after.run(batch.feed)
        for item in measured:
            item.add(batch, outputs[item.claim.reference], rewritten[item.claim.tensor])
    return [item.check(floors or {}) for item in measured]


class _Measured:
    """The error of one prediction's tensor, streamed. `problem` says why there is none."""

    def __init__(self, claim: Prediction, seed: int) -> None:
        self.claim = claim
        self.sampler = RowSampler(seed, claim.tensor, claim.mask)
        self.rows = 0
        self.channels = 0
        self.error = 0.0
        self.total: np.ndarray | float = 0.0
        self.square = 0.0
        self.problem: str | None = None

    def add(self, batch: Batch, reference: np.ndarray, tensor: np.ndarray) -> None:
        claim = self.claim
        if claim.channels is not None:
            reference = np.take(reference, claim.channels, claim.channel_axis)
        self.problem = self.problem or _mismatch(
            claim.tensor, reference, tensor, ("the original", "the result")
        )
        if self.problem:
            return
        shape = row_shape(reference.shape, claim.channel_axis)
        rows = self.sampler.sample(batch.index, shape, claim.positions, batch.feed)
        both = (np.moveaxis(x, claim.channel_axis, 1) for x in (reference, tensor))
        a, b = (rows.without_padding(_wide(rows.vectors(x))) for x in both)
        self.rows += a.shape[0]
        self.channels = a.shape[1]
        self.error += float(np.vdot(a - b, a - b))
        self.total = self.total + a.sum(axis=0)
        self.square += float(np.vdot(a, a))

    def check(self, floors: Floors) -> PredictionCheck:
        claim = self.claim
        if self.problem or not self.rows:
            problem = f"tensor {self.problem}" if self.problem else "there are no samples to measure it on"
            return PredictionCheck(claim.tensor, claim.error, np.nan, 0.0, claim.variance, problem)
        noise = MULTIPLE * floors[claim.reference].rms * np.sqrt(self.channels)
        error = max(claim.error, 0.0)
        tolerance = PREDICTION_TOLERANCE * error + 2 * noise * np.sqrt(error) + noise**2
        variance = (self.square - float(np.vdot(self.total, self.total)) / self.rows) / self.rows
        return PredictionCheck(claim.tensor, claim.error, self.error / self.rows, float(tolerance), variance)
