"""Do two models compute the same? The judge behind every pass and behind `onnxfuse verify A B`.

Tolerance is measured, not chosen. Floating-point arithmetic leaves a model's output uncertain by an amount
that depends on the model and on the samples; that amount, the *noise floor*, is how far the first model
differs from itself when nothing that matters changes (on a few samples, and on all where by these a
comparison would fail):

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

NaN and infinity are no numbers: they must be where the first model has them, with the same sign, and the
other elements are measured as usual. Outputs that are not floating-point must be equal. Sequences and maps
are compared element by element. Outputs are matched by name; the same batches run at several sizes.

Relative errors are root mean square difference over root mean square deviation of the first model's output
from its mean over the samples, so 1 is what predicting the mean would give: sqrt(sum |a - b|^2 / sum |a -
mean(a)|^2). Where the output has no sample axis, or there is but one sample, the mean is over all elements;
an output that does not vary at all is measured against its own root mean square, and one that is zero
throughout, which has no scale, in units of the spacing of its type's floats at 1.

Elements whose scale dwarfs the rest, such as the fill of a mask or pixels beside probabilities, are compared
apart (`populations`): differences, floors and spreads are those of elements of one scale, and the worst of
them counts. So a large number that a model puts into its output hides no error of the others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxfuse.data.rows import first_rows
from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.verification.interface import interface_problems
from onnxfuse.verification.noise import BATCH_SIZES, MULTIPLE, NOISE_SAMPLES, Run, floor_of, noise_variants
from onnxfuse.verification.records import Basis, Comparison, OutputDifference, OutputError, OutputPart
from onnxfuse.verification.tally import Differences, Tally, quotient

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Batch, BatchStream
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.runtime.session import Runtime, Session
    from onnxfuse.verification.populations import Population


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


def compare(
    a: Model,
    b: Model,
    batches: Collection[Batch] | BatchStream,
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
    batches: Collection[Batch] | BatchStream,
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
    batches: Collection[Batch] | BatchStream,
    runtime: Runtime,
    multiple: float,
    labels: tuple[str, str],
) -> Comparison:
    """The outputs of `base`, a session of `a` made with `kind`, beside those of `other`."""
    variants = noise_variants(a, runtime, base, **kind)
    found, complete = _judged(a, base, variants, other, batches, multiple, labels, NOISE_SAMPLES)
    if not (complete or found.passed or found.problems):
        found, _ = _judged(a, base, variants, other, batches, multiple, labels, math.inf)
    return found


def _judged(
    a: Model,
    base: Session,
    variants: Sequence[Run],
    other: Run,
    batches: Iterable[Batch],
    multiple: float,
    labels: tuple[str, str],
    noisy: float,
) -> tuple[Comparison, bool]:
    """A comparison in floors of the first `noisy` samples or a few more, and whether those are all."""
    pair = Differences(labels, 1 + len(variants))
    sizes: dict[int, None] = {}
    samples, floored = 0, 0
    for feed, outputs, rows in _feeds(a, batches, base.run):
        try:
            theirs = other(feed)
        except NotApplicableError as error:
            failure = f"{labels[1]} fails where {labels[0]} runs, with a batch of {rows}: {error}"
            return Comparison((), multiple, samples, (*sizes, rows), (failure,)), True
        if floored < noisy:
            floored += rows
            pair.add(outputs, chain([theirs], _runs(variants, feed)), rows)
        else:
            pair.add(outputs, [theirs], rows)
        sizes[rows] = None
        samples += rows
    return Comparison(output_differences(pair), multiple, samples, tuple(sizes)), floored == samples


def _runs(variants: Sequence[Run], feed: Feed) -> Iterator[Mapping[str, Any]]:
    """The outputs of each variant, one at a time: those of a large network fill the memory."""
    return (variant(feed) for variant in variants)


def output_differences(pair: Differences) -> tuple[OutputDifference, ...]:
    """The differences of all outputs as they are reported: of the first stream, in noise floors from those
    after it."""
    return tuple(_output_difference(name, tally) for name, tally in pair.tallies.items())


def _output_difference(name: str, tally: Tally) -> OutputDifference:
    """The difference of one output."""
    if tally.problem or tally.exact:
        share = tally.unequal / tally.count if tally.count else 0.0
        return OutputDifference(name, share, 0.0, 0.0, np.inf if tally.unequal else 0.0, tally.problem)
    found = [_part(population, tally.eps) for population in tally.populations()]
    bases = [part.basis for part in found]
    return OutputDifference(
        name,
        max((part.relative for part in found), default=0.0),
        max((part.max_abs for part in found), default=0.0),
        max((part.floor for part in found), default=0.0),
        max((part.ratio for part in found), default=0.0),
        parts=tuple(found) if len(found) > 1 else (),
        basis="spread" if "spread" in bases or not bases else bases[0],
        nonfinite=tally.nonfinite,
    )


def _part(population: Population, eps: float) -> OutputPart:
    """The difference of the elements of one scale; `eps` is the spacing of their type's floats at 1."""
    count, unit = max(population.elements, 1), population.unit
    rms = math.sqrt(float(population.squares[0]) / count) * unit
    peak = float(population.peaks[0]) * unit
    floor = floor_of(population, eps, 1)
    scale, basis = _scale(population, eps)
    return OutputPart(
        elements=population.elements,
        scale=math.sqrt(population.square / count) * unit,
        relative=quotient(rms, scale),
        max_abs=peak,
        floor=quotient(floor.rms, scale),
        ratio=max(quotient(rms, floor.rms), quotient(peak, floor.peak)),
        basis=basis,
        where=population.where,
    )


def _scale(population: Population, eps: float) -> tuple[float, Basis]:
    """What an error is relative to, and which of the three that is.

    A deviation within a few spacings of floats is rounding, as of -1e9 + x.
    """
    if not population.square:
        return eps, "spacing"
    rounding = max(1e-12, (MULTIPLE * eps) ** 2)
    varies = population.deviation > rounding * population.square
    square = population.deviation if varies else population.square
    return math.sqrt(square / population.elements) * population.unit, "spread" if varies else "size"


def output_error(a: Model, b: Model, batches: Iterable[Batch], runtime: Runtime) -> OutputError:
    """The relative error of `b`'s outputs against `a`'s, which `--max-error` bounds.

    For outputs that are not floating-point it is the share of elements that differ.

    Args:
        a, b: the models.
        batches: fed to both, whole.
        runtime: runs both.

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
    return OutputError.of(found, samples)


def differences(
    runs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any], int]],
    labels: tuple[str, str] = ("the original", "the result"),
) -> tuple[OutputDifference, ...]:
    """Differences of the second's outputs from the first's, over all batches, in floors of rounding alone.

    Args:
        runs: for each batch the outputs of both by name, and its number of samples.
        labels: what messages call the two.
    """
    pair = Differences(labels)
    for outputs, others, samples in runs:
        pair.add(outputs, [others], samples)
    return output_differences(pair)
