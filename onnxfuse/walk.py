"""One walk over two networks that re-solves the linear operators of one against the other.

A rewritten network is off at every layer behind a rewrite. Each linear operator y = W x + b can repair some
of that: with x as the *rewritten* network now computes it, and t as the *original* network computed the same
tensor, the best weights are a regression of t on x (FuseInit, Ghods et al. 2020, Theorem 1 with a0 from the
rewritten network). Sites are taken in topological order, so each sees what the sites before it became.

- A *fresh* site (the operator that replaces a fused region) is solved from nothing, under a small ridge.
- A *refit* site is shrunk towards the weights it has. The ridge is chosen on held-out samples, and where the
  weights it has are best there, they stay.
- At a *bias* site the weights are somebody else's too, or zeros and shared values that are to stay: the bias
  alone is solved. A *keep* site is only measured.
- Where y goes into a sum y + r and nowhere else, the regression is of (original sum - rewritten r): the
  branch repairs the skip too.

The networks are not run once for each site. Both advance from one site to the next over all batches, and
only the tensors at the frontier are kept (`Spool`), so the whole walk costs about one inference of each
network, the moments, and the solves. A site's fit samples give the weights, its held-out samples choose the
ridge and measure the error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from onnx import NodeProto
from threadpoolctl import threadpool_limits

from onnxfuse.calibration import Batches, Calibration
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.findings import Change, Prediction, Skip
from onnxfuse.graph import DEFAULT_DOMAINS, Constant, Model, Node, Tensor, TensorInfo
from onnxfuse.linear import LinearOp, linear_op, write_weights
from onnxfuse.marks import kept
from onnxfuse.moments import Moments, add_patches
from onnxfuse.numerics.affine import Affine
from onnxfuse.numerics.sampling import RowSampler, per_sample, row_shape
from onnxfuse.observe import Background
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.regions import site_name
from onnxfuse.runtime import Feed, Runtime, Session
from onnxfuse.shapes import fill
from onnxfuse.solve import RIDGES, best_bias, choose_ridge, generalized_cross_validation, per_channel, solve
from onnxfuse.spool import Spool

REFIT_RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
"""Ridges tried where an operator is shrunk towards its own weights."""

ROWS_PER_COLUMN = 64
"""Sampled rows per unknown of an output; more hardly change the fit."""

LEAST_ROWS = 1 << 14

TRIAL_RIDGE, TRIAL_REFIT_RIDGE = 3e-3, 1e-1
"""Ridges where none is searched for: from nothing, and towards the weights that are there. With few rows only
a strong pull keeps a refit from adding noise."""

EIGEN_COLUMNS = 1536
"""With more columns than this an eigendecomposition costs more than factoring the Gram for a few ridges."""

MOST_COLUMNS = 6144
"""More unknowns for each output than this are not solved for: two Gram matrices of that size take 600 MB."""

SETTLED = 1e-10
"""Relative error of float noise: weights that leave no more stay."""

LINEAR = ("Conv", "Gemm", "MatMul")

How = Literal["fresh", "refit", "bias", "keep"]

_FEW_RIDGES = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class RefitSite:
    """A linear operator of the rewritten model, and what it is solved for.

    Attributes:
        op: the operator; its weights are replaced.
        tensor: the tensor that is compared: the operator's output, or the sum it is a branch of.
        reference: the tensor of the original that `tensor` should equal.
        rest: the other operand of that sum, None without one.
        how: "fresh" solves from nothing, "refit" from the weights the operator has, "bias" solves for the
            bias alone; "keep" leaves the operator as it is.
        mask: name of a graph input. Where it has the leading dimensions of `tensor`, rows where it is 0 are
            left out.
        channels: the channels of `reference` that `tensor` has, None for all.
    """

    op: LinearOp
    tensor: str
    reference: str
    rest: str | None = None
    how: How = "refit"
    mask: str | None = None
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Solved:
    """A site after its solution. Errors are mean squared errors of `site.tensor`, summed over channels.

    Attributes:
        site: the site.
        ridge: relative ridge; None where the weights stayed as they were, infinite where the bias alone
            moved.
        error, variance: of the fit samples; variance is the reference's, about its mean.
        held_error, held_variance: of the held-out samples, or of the fit samples where none are held out.
        held_before: the held-out error of the weights that were there, None for a fresh site.
        positions: sampled in each sample, None for all.
    """

    site: RefitSite
    ridge: float | None
    error: float
    variance: float
    held_error: float
    held_variance: float
    held_before: float | None
    positions: int | None

    @property
    def relative(self) -> float:
        """Held-out error as a share of the held-out variance."""
        return self.held_error / self.held_variance if self.held_variance > 0 else math.inf

    def prediction(self) -> Prediction:
        """The claim for the verifier."""
        return Prediction(
            self.site.tensor,
            self.site.reference,
            self.error,
            self.variance,
            self.positions,
            channel_axis(self.site.op),
            self.site.mask,
            self.site.channels,
        )


def refit_change(solved: Solved) -> Change:
    """The record of one operator that was solved again."""
    before = (solved.held_before or 0.0) / solved.held_variance if solved.held_variance else 0.0
    what, ridge = ("bias refit", None) if solved.ridge == math.inf else ("refit", solved.ridge)
    return Change(
        (solved.site.op.name,),
        f"{what}: relative error {before:.3g} -> {solved.relative:.3g}",
        {
            "tensor": solved.site.tensor,
            "ridge": ridge,
            "relative_error_before": before,
            "relative_error": solved.relative,
        },
    )


# --- sites --------------------------------------------------------------------------------------------------


def unchanged(original: Model, rewritten: Model) -> set[str]:
    """Names of the tensors that both models compute in the same way, inputs among them."""
    same = {info.name for info in original.inputs} & {info.name for info in rewritten.inputs}
    before = {node.outputs[0].name: node for node in original.nodes if node.outputs}
    for node in rewritten.nodes:
        twin = before.get(node.outputs[0].name) if node.outputs else None
        if twin is not None and _alike(original, twin, rewritten, node, same):
            same.update(tensor.name for tensor in node.outputs if tensor.name)
    return same


def _alike(a: Model, first: Node, b: Model, second: Node, same: set[str]) -> bool:
    """Whether the two nodes say the same and read the same. Weights may have other names."""
    if _operation(first, a.opset) != _operation(second, b.opset) or len(first.inputs) != len(second.inputs):
        return False
    pairs = [(a.tensor(name), b.tensor(name)) for name in first.captured]
    pairs += zip(first.inputs, second.inputs, strict=True)
    return all(
        (x.name == y.name and (not x.name or x.name in same)) or _equal_weights(a, b, x, y) for x, y in pairs
    )


def _operation(node: Node, opset: int) -> tuple[object, ...]:
    """What a node does, whatever it reads and is called."""
    proto = NodeProto()
    proto.CopyFrom(node.proto(opset))
    proto.ClearField("input")
    proto.ClearField("name")
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")
    if proto.domain in DEFAULT_DOMAINS:
        proto.ClearField("domain")  # absent, empty or spelled out
    proto.attribute.sort(key=lambda attribute: attribute.name)
    return (proto.SerializeToString(deterministic=True),)


def _equal_weights(a: Model, b: Model, x: Tensor, y: Tensor) -> bool:
    if not (a.is_weight(x) and b.is_weight(y)):
        return False
    if isinstance(x, Constant) and isinstance(y, Constant) and x.stamp == y.stamp:
        return True  # one and the same value: no need to read it
    ours, theirs = a.weight(x), b.weight(y)
    return ours is not None and theirs is not None and np.array_equal(ours, theirs)


def tensors_read(model: Model, node: Node) -> list[Tensor]:
    """All tensors that a node depends on, those that its bodies capture among them."""
    return [*(t for t in node.inputs if t.name), *(model.tensor(name) for name in node.captured)]


def refit_sites(
    original: Model,
    rewritten: Model,
    fresh: Sequence[tuple[Node, str]] = (),
    mask: str | None = None,
    feed: Feed | None = None,
    before: Model | None = None,
    fixed: Collection[Node] = (),
) -> tuple[list[RefitSite], list[Skip]]:
    """The linear operators of `rewritten` that are worth solving again, in topological order.

    Args:
        original: what to solve for.
        rewritten: what to solve.
        fresh: nodes to be solved from nothing, each with the tensor of both models that it stands for.
        mask: see `RefitSite`.
        feed: samples for shapes that can't be inferred.
        before: what `rewritten` was made from, where that isn't the original; what it computes alike is left.
        fixed: nodes whose weights are to stay as they are. Each is a site, behind a change or not: a place to
            solve for its bias, or, where it has none, to measure. The weights of nodes that are marked so
            (`marks`) stay too.

    Returns:
        The sites: the fresh and the fixed ones, and every linear operator behind a change whose output (or
        the sum that its output goes into) exists in the original; where its weight has other users, for its
        bias alone. And a Skip with the reason for each linear operator behind a change that is none.
    """
    same = unchanged(before or original, rewritten)
    known = original.shapes(feed)
    shapes = {
        name: fill(info, _cut_info(rewritten, known.get(name))) for name, info in rewritten.shapes().items()
    }
    new = dict(fresh)
    asked = set(fixed)
    stay = asked | {node for node in rewritten.nodes if kept(node)}
    ops: list[tuple[LinearOp, How]] = []
    skipped: list[Skip] = []
    for node in rewritten.nodes:
        if node.op not in LINEAR or (node.outputs[0].name in same and node not in asked):
            continue
        op = linear_op(rewritten, node, shapes)
        if isinstance(op, str):
            skipped.append(Skip((site_name(node),), op))
        elif reason := _unsolvable(op, owned=node in new or node in stay):
            skipped.append(Skip((op.name,), reason))
        else:
            ops.append((op, _how(op, node in new, node in stay)))
    last_site = _last_sites(rewritten, {op.y: number for number, (op, _) in enumerate(ops)})
    sites: list[RefitSite] = []
    for number, (op, how) in enumerate(ops):
        if op.node in new:
            tensor, rest = new[op.node], None
            channels = kept_channels(rewritten, tensor, channel_axis(op))
            assert not isinstance(channels, str)
        else:
            target = _target(rewritten, op, number, last_site, shapes, known)
            if isinstance(target, str):
                skipped.append(Skip((op.name,), target))
                continue
            tensor, rest, channels = target
        own = mask if op.kind == "token" else None
        sites.append(RefitSite(op, tensor, tensor, rest, how, own, channels))
    return sites, skipped


def _unsolvable(op: LinearOp, owned: bool) -> str | None:
    """Why an operator can't be solved again, None if it can. `owned`: its weights are the caller's affair."""
    if op.shared and not op.has_bias and not owned:
        return "its weight has other users, which a refit would change"
    if op.kind == "conv" and op.pads is None:
        return "its pads depend on an input size that isn't static"
    if op.columns > MOST_COLUMNS:
        return f"{op.columns} unknowns for each output are too many to solve for"
    return None


def _target(
    model: Model,
    op: LinearOp,
    number: int,
    last_site: Mapping[str, int],
    shapes: Mapping[str, TensorInfo],
    known: Mapping[str, TensorInfo],
) -> tuple[str, str | None, tuple[int, ...] | None] | str:
    """The tensor that an operator is solved for, the other operand where that is a sum, and the original's
    channels that it has; or why there is none.

    Args:
        model: the operator's own, rewritten.
        op: an operator that isn't fresh.
        number: the operator's, in topological order.
        last_site: by tensor, the last operator that it depends on; one that depends on this operator or a
            later one isn't final when this one is solved, and can't be subtracted from a sum.
        shapes: of the model's tensors.
        known: of the original's tensors.
    """
    axis = channel_axis(op)
    found = _sum_with(model, op, shapes)
    if found is not None and last_site.get(found[1], -1) < number:
        channels = _comparable(model, found[0], axis, shapes, known)
        if not isinstance(channels, str):
            return *found, channels
    channels = _comparable(model, op.y, axis, shapes, known)
    return channels if isinstance(channels, str) else (op.y, None, channels)


def _how(op: LinearOp, is_new: bool, stays: bool) -> How:
    if is_new:
        return "fresh"
    if op.shared or stays:
        return "bias" if op.has_bias else "keep"
    return "refit"


def check_mask(model: Model, mask: str | None) -> None:
    """Raise InputError unless `mask` is None or a graph input."""
    names = [info.name for info in model.inputs]
    if mask is not None and mask not in names:
        raise InputError(f"mask: the model has no input '{mask}'; its inputs are {', '.join(names)}")


def _last_sites(model: Model, sites: Mapping[str, int]) -> dict[str, int]:
    """By tensor: the place of the last site that it depends on (absent without one)."""
    last: dict[str, int] = {}
    for node in model.nodes:
        reach = max((last[t.name] for t in tensors_read(model, node) if t.name in last), default=-1)
        for tensor in node.outputs:
            found = max(reach, sites.get(tensor.name, -1))
            if found >= 0:
                last[tensor.name] = found
    return last


def _sum_with(model: Model, op: LinearOp, shapes: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """(sum, other operand) if the operator's output goes into a sum of equal shapes and nowhere else."""
    y = model.tensor(op.y)
    readers = model.consumers(y)
    if len(readers) != 1 or readers[0].op != "Add" or model.is_output(y) or model.captured(y):
        return None
    add = readers[0]
    rest = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
    total = add.outputs[0].name
    if rest is y or model.is_weight(rest):
        return None
    infos = [shapes.get(name) for name in (op.y, rest.name, total)]
    found = [info.shape for info in infos if info is not None and info.shape is not None]
    if len(found) < 3 or len({len(shape) for shape in found}) != 1:
        return None
    # A size that broadcasts would make the rest too small to subtract from the sum.
    if any(1 in sizes and len(set(sizes)) > 1 for sizes in zip(*found, strict=True)):
        return None
    return total, rest.name


def channel_axis(op: LinearOp) -> int:
    """The axis of an operator's output that its channels are on: 1 of a convolution, else the last."""
    return 1 if op.kind == "conv" else -1


def kept_channels(model: Model, name: str, axis: int) -> tuple[int, ...] | str | None:
    """The channels of the original's tensor that the model's of the same name has left, None for all; or why
    that is no matter of one axis.

    Args:
        model: the one that was cut.
        name: of the tensor.
        axis: of its channels.
    """
    maps = model.index_maps.get(name, ())
    if maps is None:
        return f"which indices of '{name}' are left differs from run to run"
    changed = {number: places for number, places in enumerate(maps) if places is not None}
    if not changed:
        return None
    if set(changed) != {axis % len(maps)}:
        return f"'{name}' was cut along other axes than its channels"
    return tuple(changed[axis % len(maps)].tolist())


def _cut_info(model: Model, info: TensorInfo | None) -> TensorInfo | None:
    """What is known of the original's tensor, for the model's of the same name."""
    maps = None if info is None else model.index_maps.get(info.name, ())
    if info is None or info.shape is None or not maps:
        return info if maps is not None else None
    sizes = (size if own is None else len(own) for size, own in zip(info.shape, maps, strict=True))
    return replace(info, shape=tuple(sizes))


def _comparable(
    model: Model,
    name: str,
    axis: int,
    shapes: Mapping[str, TensorInfo],
    known: Mapping[str, TensorInfo],
) -> tuple[int, ...] | str | None:
    """`kept_channels` of a tensor, or why it can't be compared with the original's of the same name."""
    if name not in known:
        return f"its output '{name}' is not a tensor of the original"
    ours, theirs = shapes[name].shape, known[name].shape
    if ours is None or theirs is None:
        return f"the shape of its output '{name}' is not known"
    if len(ours) < 2:
        return f"its output '{name}' has no batch axis"
    channels = kept_channels(model, name, axis)
    if isinstance(channels, str):
        return channels
    sizes = list(theirs)
    if channels is not None:
        sizes[axis] = len(channels)
    clash = any(
        a != b and isinstance(a, int) and isinstance(b, int) for a, b in zip(ours, sizes, strict=False)
    )
    if clash or len(ours) != len(theirs):
        return f"its output '{name}' has another shape in the original"
    return channels


# --- the walk -----------------------------------------------------------------------------------------------


def walk(
    original: Model,
    rewritten: Model,
    sites: Sequence[RefitSite],
    calibration: Calibration,
    runtime: Runtime,
    *,
    seed: int = 0,
    ridge: float | None = None,
    paper: bool = False,
    quick: bool = False,
    progress: Progress | None = None,
) -> list[Solved]:
    """Solve the sites in order, writing the new weights into `rewritten`.

    Args:
        original: gives the targets; is not changed.
        rewritten: its sites' weights are replaced.
        sites: in the topological order of `rewritten`.
        calibration: the fit samples give the weights, the held-out ones choose the ridge (where none are held
            out, generalized cross-validation does).
        runtime: runs both.
        seed: of the sampled positions.
        ridge: for fresh sites; None chooses it on the held-out samples.
        paper: solve fresh convolutions one input channel at a time (FuseInit, Theorem 2).
        quick: for trials: fit samples only and fewer rows of them, products in single precision, ridges not
            searched.
        progress: told of every site.

    Raises:
        NotApplicableError: the activations aren't finite, or the original's tensor has another shape.
        InputError: bad samples; no room for intermediate tensors.
    """
    advance = (progress or NoProgress()).task("fitting", total=len(sites))
    solved: list[Solved] = []
    # ONNX Runtime and BLAS take turns many times a second: two pools of threads on the same cores get in each
    # other's way, and products of this size gain little from more than one.
    with Spool() as spool, threadpool_limits(1, "blas"), Background() as background:
        needs = [{site.op.x, *filter(None, (site.rest, site.mask))} for site in sites]
        # What both networks compute alike is computed once, by the original.
        right = Frontier(rewritten, needs, unchanged(original, rewritten), "b", spool, runtime)
        asked = [{site.reference} | given for site, given in zip(sites, right.given, strict=True)]
        left = Frontier(original, asked, set(), "a", spool, runtime)
        batches = _ReadOnce([calibration.fit] if quick else [calibration.fit, calibration.held_out])
        for step, site in enumerate(sites):
            fit = _SiteFit(site, seed, len(calibration.fit), quick)
            targets, inputs = left.stretch(step), right.stretch(step)
            for batch, held, feed in batches.feeds(with_inputs=step == 0):
                known = targets.run(batch, feed)
                found = inputs.run(batch, known)
                # The moments of one batch are summed while the networks run the next.
                background.call(fit.add, batch, held, known[site.reference], found)
            background.wait()
            left.finish(step)
            right.finish(step)
            solved.append(fit.solve(rewritten, ridge, paper))
            advance()
    return solved


class _ReadOnce:
    """Batches by number, for many steps over them; the samples themselves are read at the first one only."""

    def __init__(self, parts: Sequence[Batches]) -> None:
        self._parts = parts
        self._known: list[tuple[int, bool]] = []

    def feeds(self, *, with_inputs: bool) -> Iterator[tuple[int, bool, Feed]]:
        """Of each batch its number, whether it is held out, and its inputs, {} without `with_inputs`."""
        if not with_inputs:
            for index, held in self._known:
                yield index, held, {}
            return
        for number, part in enumerate(self._parts):
            for batch in part:
                self._known.append((batch.index, number > 0))
                yield batch.index, number > 0, batch.feed


class Frontier:
    """One of the two networks, run as far as the walk has come.

    The graph's inputs are handed over at the first step, and stored where later ones read them.

    Attributes:
        given: by step, the shared tensors that it has to be handed.
    """

    def __init__(
        self,
        model: Model,
        needs: Sequence[set[str]],
        shared: set[str],
        prefix: str,
        spool: Spool,
        runtime: Runtime,
    ) -> None:
        """Plan which nodes run at which step.

        Args:
            model: the network.
            needs: the tensors wanted at each step.
            shared: tensors that aren't computed here, but handed over.
            prefix: what tells this network's tensors in `spool` from those of another.
            spool: where tensors wait for later steps.
            runtime: runs the steps.
        """
        self._model = model
        self._runtime = runtime
        self._spool = spool
        self._prefix = prefix
        self._needs = needs
        self._inputs = set() if shared else {info.name for info in model.inputs}
        self._made = dict.fromkeys(self._inputs, 0)  # step at which a tensor appears
        self._last: dict[str, int] = {}  # last step at which it is read
        self._reads: list[set[str]] = []  # what a step's nodes read from outside the step
        self.given: list[set[str]] = []
        done: set[Node] = set()
        for step, names in enumerate(needs):
            self._plan(step, names, shared, done)

    def _plan(self, step: int, names: set[str], shared: set[str], done: set[Node]) -> None:
        model = self._model
        nodes: list[Node] = []
        stack = [model.tensor(name) for name in names if name not in shared]
        while stack:
            node = model.producer(stack.pop())
            if node is not None and node not in done:
                done.add(node)
                nodes.append(node)
                stack.extend(tensor for tensor in tensors_read(model, node) if tensor.name not in shared)
        made = {tensor.name for node in nodes for tensor in node.outputs if tensor.name}
        read = {
            tensor.name
            for node in nodes
            for tensor in tensors_read(model, node)
            if tensor.name not in made and not model.is_weight(tensor)
        }
        self._made.update(dict.fromkeys(made, step))
        self._reads.append(read)
        self.given.append((read | names) & shared)
        self._last.update(dict.fromkeys((*read, *made, *names), step))

    def stretch(self, step: int) -> Stretch:
        """The part of the network between the site before and this one, with the weights it now has."""
        new = [name for name, made in self._made.items() if made == step]
        stored = [name for name in new if self._last.get(name, -1) > step]
        wanted = [name for name in self._needs[step] if self._made.get(name) == step]
        outputs = sorted({*stored, *wanted} - self._inputs)
        reads = sorted(self._reads[step])
        session = self._runtime.session(self._model.extract(reads, outputs)) if outputs else None
        return Stretch(self, session, reads, stored, sorted(self._needs[step]))

    def finish(self, step: int) -> None:
        """Forget what no later step reads."""
        for name, last in self._last.items():
            if last == step:
                self._spool.drop(f"{self._prefix}:{name}")

    def get(self, name: str, batch: int, feed: Feed) -> np.ndarray:
        """A tensor of one batch: handed over in `feed`, or stored by an earlier step."""
        return feed[name] if name in feed else self._spool.get(f"{self._prefix}:{name}", batch)

    def put(self, name: str, batch: int, array: np.ndarray) -> None:
        """Store a tensor of one batch for later steps."""
        self._spool.put(f"{self._prefix}:{name}", batch, array)


@dataclass(frozen=True)
class Stretch:
    """The nodes of one step, ready to run batch by batch."""

    front: Frontier
    session: Session | None
    reads: Sequence[str]
    stored: Sequence[str]
    needs: Sequence[str]

    def run(self, batch: int, feed: Feed) -> Feed:
        """The tensors that the step needs, by name; those that later steps read are stored.

        Args:
            batch: the batch's number.
            feed: what is handed over: the graph's inputs, and the tensors of `Frontier.given`.
        """
        found: Feed = {}
        if self.session is not None:
            found = self.session.run({name: self.front.get(name, batch, feed) for name in self.reads})
        for name in self.stored:
            self.front.put(name, batch, found[name] if name in found else feed[name])
        return {
            name: found[name] if name in found else self.front.get(name, batch, feed) for name in self.needs
        }


class _RowVariance:
    """Variance of rows about their mean, summed over channels; streamed."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._sum: np.ndarray | float = 0.0
        self._square = 0.0

    def add(self, rows: np.ndarray, weights: np.ndarray | None) -> None:
        wide = rows.astype(np.float64) if weights is None else rows[weights > 0].astype(np.float64)
        self._rows += len(wide)
        self._sum = self._sum + wide.sum(axis=0)
        self._square += float(np.vdot(wide, wide))

    @property
    def variance(self) -> float:
        mean = self._sum / self._rows
        return max(self._square / self._rows - float(np.vdot(mean, mean)), 0.0)


class _SiteFit:
    """Moments of one site, fitted and held out, and its solution."""

    def __init__(self, site: RefitSite, seed: int, batches: int, quick: bool) -> None:
        """Nothing is counted yet.

        Args:
            site: what is solved for.
            seed: of the sampled positions.
            batches: the number of batches of fit samples.
            quick: see `walk`.
        """
        self.site = site
        self.sampler = RowSampler(seed, site.tensor, site.mask)
        self.quick = quick
        op = site.op
        self.moments = [
            Moments(op.columns * op.groups, op.out_features, op.groups, single=quick) for _ in range(2)
        ]
        # Where something is subtracted from it, the reference's spread is not that of the moments' target.
        self.spreads: Sequence[Moments | _RowVariance] = self.moments
        if site.rest is not None:
            self.spreads = [_RowVariance(), _RowVariance()]
        self.batches = batches
        self.positions: int | None = None
        self.is_first = True

    def add(self, batch: int, held: bool, reference: np.ndarray, found: Feed) -> None:
        """Take in one batch.

        Args:
            batch: its number.
            held: whether its samples are held out.
            reference: the original's tensor.
            found: the rewritten network's tensors, by name.
        """
        op, x, axis = self.site.op, found[self.site.op.x], channel_axis(self.site.op)
        if self.site.channels is not None:
            reference = np.take(reference, self.site.channels, axis)
        target = self._target(reference, found)
        shape = row_shape(target.shape, axis)
        if self.is_first:
            self.is_first = False
            self.positions = self._positions(shape)
            if self.site.mask is not None and found[self.site.mask].shape != shape:
                self.site = replace(self.site, mask=None)
                self.sampler = replace(self.sampler, mask=None)
        rows = self.sampler.sample(batch, shape, self.positions, found)
        moments = self.moments[held]
        spread = self.spreads[held]
        if isinstance(spread, _RowVariance):
            spread.add(rows.vectors(reference, axis), rows.weights)
        if op.kind == "conv":
            assert op.pads is not None
            add_patches(
                moments,
                x,
                target,
                rows.positions,
                kernel=op.kernel,
                strides=op.strides,
                dilations=op.dilations,
                pads=op.pads,
            )
            return
        moments.add(rows.vectors(x, -1), rows.vectors(target, -1), rows.weights)

    def _target(self, reference: np.ndarray, found: Feed) -> np.ndarray:
        """The tensor that the operator's output is to equal."""
        if self.site.rest is None:
            return reference
        rest = found[self.site.rest]
        if rest.shape != reference.shape:
            raise NotApplicableError(f"'{self.site.rest}' does not have the shape of '{self.site.tensor}'")
        return reference - rest

    def _positions(self, shape: Sequence[int]) -> int | None:
        """Positions in each sample of batches whose rows are of this shape, None for all."""
        rows = max(LEAST_ROWS, ROWS_PER_COLUMN * self.site.op.columns)
        count = per_sample(rows // 8 if self.quick else rows, self.batches * shape[0])
        return count if count < math.prod(shape[1:]) else None

    def solve(self, model: Model, ridge: float | None, paper: bool) -> Solved:
        """Write the best weights into `model`, where they are better than those that are there.

        Args:
            model: the rewritten network.
            ridge, paper: see `walk`.
        """
        op, judge = self.site.op, 1 if self.moments[1].n else 0
        fit, held = self.moments[0], self.moments[judge]
        y, prior = op.y, None if self.site.how == "fresh" else op.weight
        before = None if prior is None else held.error(Affine(prior, op.bias))
        used: float | None = None
        settled = before is not None and before <= SETTLED * held.variance
        if self.site.how != "keep" and not settled:
            used, affine = self._solution(fit, held, prior, ridge, paper)
            after = held.error(affine)
            if not math.isfinite(after):
                raise NotApplicableError(f"'{self.site.tensor}' is not finite on the held-out samples")
            if before is None or after < before:
                weight = None if self.site.how == "bias" else affine.weight
                write_weights(model, op, weight, affine.bias, by="refit")
            else:
                used = None
        stored = _stored(model, op, y)
        return Solved(
            self.site,
            used,
            fit.error(stored),
            self.spreads[0].variance,
            held.error(stored),
            self.spreads[judge].variance,
            before,
            self.positions,
        )

    def _solution(
        self, fit: Moments, held: Moments, prior: np.ndarray | None, ridge: float | None, paper: bool
    ) -> tuple[float, Affine]:
        """Ridge and weights, by how the site and the walk's options have them solved."""
        if self.site.how == "bias":
            assert prior is not None
            return math.inf, best_bias(fit, prior)
        if paper and prior is None and self.site.op.kind == "conv":
            return 0.0, per_channel(fit, self.site.op.in_features)
        if prior is None and ridge is not None:
            return ridge, solve(fit, ridge)
        if self.quick:
            used = TRIAL_RIDGE if prior is None else TRIAL_REFIT_RIDGE
            return used, solve(fit, used, prior)
        return _choose(fit, held, prior)


def _stored(model: Model, op: LinearOp, y: str) -> Affine:
    """The weights that the model now holds: rounded to their dtype, the bias perhaps in a new Add."""
    last = model.producer(model.tensor(y))
    now = op if last is op.node else replace(op, bias_node=last)
    return Affine(now.weight, now.bias)


def _choose(fit: Moments, held: Moments, prior: np.ndarray | None) -> tuple[float, Affine]:
    """The ridge with the least held-out error (cross-validated where none are held out), and its solution."""
    ridges = RIDGES if prior is None else REFIT_RIDGES
    if fit.dx // fit.groups > EIGEN_COLUMNS:
        found = [(ridge, solve(fit, ridge, prior)) for ridge in _FEW_RIDGES]
        return found[-1] if held is fit else min(found, key=lambda pair: held.error(pair[1]))
    if held is fit:
        return generalized_cross_validation(fit, ridges, prior)
    return choose_ridge(fit, held, ridges, prior)
