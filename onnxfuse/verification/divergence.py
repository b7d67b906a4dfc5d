"""The search for the first tensor in which two models differ, to explain a comparison that failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from onnxfuse.data.rows import first_rows
from onnxfuse.verification.compare import output_differences
from onnxfuse.verification.noise import FEW_ROWS, MULTIPLE, noise_variants
from onnxfuse.verification.records import Divergence, OutputDifference
from onnxfuse.verification.tally import Differences

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Batch
    from onnxfuse.ir.model import Feed, Model
    from onnxfuse.runtime.session import Runtime

_CHUNK = 64  # tensors tapped at a time in search of a divergence


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
    few = first_rows(model, batch, FEW_ROWS)
    if few is not None:
        yield few, FEW_ROWS, _CHUNK
    yield batch.feed, batch.samples, max(1, _CHUNK * FEW_ROWS // max(batch.samples, FEW_ROWS))


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
    pair = Differences(labels)
    others = runtime.session(b, taps=tensors, outputs=()).run(feed)
    pair.add(outputs, [others], rows)
    different = {
        name
        for name, tally in pair.tallies.items()
        if tally.problem or tally.unequal or any(part.peaks[0] > 0 for part in tally.populations())
    }
    if not different:
        return []
    variants = noise_variants(a, runtime, base, taps=tensors, outputs=())
    pair = Differences(labels, 1 + len(variants))
    pair.add(outputs, chain([others], (variant(feed) for variant in variants)), rows)
    return [found for found in output_differences(pair) if found.name in different]
