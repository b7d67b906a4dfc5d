"""The rival structured pruners, at given shares of the MACs, as ONNX files for one table with `select`.

    python3 -m venv VENV; VENV/bin/pip install 'torch>=2.6,<2.14' -e . onnxsim==0.8.1 torch-pruning==1.6.1
    VENV/bin/python tests/benchmarks/rivals_pruning.py MODEL DATA --targets 0.9 0.8 0.7 0.5 -o FOLDER

DATA is an .npz: the model's input by its name (calibration rows) and, for Taylor, `labels`. FOLDER gets
`<tool>-<criterion>-<target>.onnx` and `rivals.json`, what was done: seconds, the true share of the MACs, or
why there is no file. Nothing is retrained. The rivals need an environment of their own; whoever compares only
reads the folder (`read`).

onnxsim works on the ONNX file. Torch-Pruning works on modules, so what `to_torch` imports has its
convolutions, linear layers and batch normalisations replaced by the modules of torch.nn, with the same
weights (`as_modules`); what is left of the weights goes back into the ONNX file under the old names
(`write_back`), so that a rival's file differs from the original in the sizes of weights and nothing else.

A criterion is the tool's ranking, and how it is applied:

    l2, wanda, taylor   norms of weights; of weights and activations; weight times gradient (needs labels)
    -global             one ranking over all layers instead of the same share in each (either tool's option)
    -hidden             layers that feed a residual sum stay whole (Torch-Pruning's `ignored_layers`)
    -ridge              onnxsim's fine-tuning by ridge regression afterwards

Torch-Pruning fails on all of a CIFAR ResNet whose shortcuts pad channels, written in torch by hand just as
well: it takes the padding for an operation that leaves channels alone. Hence -hidden. onnxsim leaves channels
whole that go into a Flatten, a BatchNormalization, or a residual sum with such a shortcut.
"""

from __future__ import annotations

import argparse
import copy
import json
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from onnxfuse.analysis.cost import measure
from onnxfuse.ir.model import Model
from onnxfuse.runtime.session import Runtime

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

Feeds = Mapping[str, np.ndarray]

ONNXSIM = "onnxsim"
TORCH_PRUNING = "torch-pruning"
RECORD = "rivals.json"
TARGETS = (0.9, 0.8, 0.7, 0.5)
BATCH = 50
"""Rows that a tool is given at a time."""

RANKING_ROWS = 300
"""Rows for the search by activations; the file itself comes of all rows."""

FEW = 8
"""Rows for a check that a model runs."""

CLOSE = 0.005
"""A share of the MACs this near to its target is the target."""

FAR = 0.03
"""A share of the MACs farther than that from its target is none of that target."""

MOST_SPARSITY = 0.98
NARROW = 1e-3
"""Sparsities nearer to each other than that are not told apart."""

EVALUATIONS = 12
"""Sparsities tried for one target, at most."""

AGREEMENT = 1e-3
"""How much outputs may differ between torch and ONNX Runtime, relative to the largest."""


class RivalError(Exception):
    """A tool failed at a point, or made something that is no use."""


@dataclass(frozen=True)
class Outcome:
    """What became of one tool, criterion and target.

    Attributes:
        file: in the folder; None if it failed.
        ratio: of the MACs, to the original's.
        sparsity: the tool's own knob.
        seconds: one pruning at that sparsity, calibration, gradients and fine-tuning included.
        search_seconds: to find the sparsity; what earlier targets of the same criterion found is reused.
        evaluations: prunings that took.
        failure: why there is no file.
        failed_at: sparsities at which the tool failed during the search, with the reason.
    """

    tool: str
    version: str
    criterion: str
    target: float
    file: str | None = None
    ratio: float | None = None
    sparsity: float | None = None
    seconds: float | None = None
    search_seconds: float = 0.0
    evaluations: int = 0
    failure: str | None = None
    failed_at: dict[str, str] = field(default_factory=dict)


def read(folder: Path) -> list[Outcome]:
    """What `main` wrote to a folder.

    Raises:
        FileNotFoundError: nobody wrote there.
    """
    return [Outcome(**row) for row in json.loads((folder / RECORD).read_text())["outcomes"]]


# --- MACs and the search for a sparsity ---------------------------------------------------------------------


def macs(model: ModelProto, feeds: Feeds) -> int:
    """MACs of one row.

    Raises:
        RivalError: the model doesn't load, or its shapes don't fit together.
    """
    try:
        cost = measure(Model.load(model), {name: rows[:1] for name, rows in feeds.items()}, Runtime("cpu"))
    except Exception as error:  # whatever a broken file may raise
        raise RivalError(f"the pruned model can't be read: {_told(error)}") from error
    if cost.macs is None:
        raise RivalError(f"the MACs of the pruned model can't be counted: {cost}")
    return cost.macs


def _told(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def runs(model: ModelProto, feeds: Feeds) -> np.ndarray:
    """The first output of the first rows in ONNX Runtime.

    Raises:
        RivalError: the model doesn't run.
    """
    few = {name: np.ascontiguousarray(rows[:FEW]) for name, rows in feeds.items()}
    try:
        return next(iter(Runtime("cpu").session(Model.load(model)).run(few).values()))
    except Exception as error:  # whatever a broken file may raise
        raise RivalError(f"the pruned model doesn't run: {_told(error)}") from error


@dataclass
class Search:
    """A bisection over a tool's sparsity for shares of the MACs, with a memory.

    A sparsity at which the tool fails counts as too much. What has been tried serves the next target, too.

    Attributes:
        ratio: the share of the MACs that a sparsity leaves; raises where the tool fails.
        found: what has been tried.
        failed: where it failed, and why.
    """

    ratio: Callable[[float], float]
    found: dict[float, float] = field(default_factory=dict)
    failed: dict[float, str] = field(default_factory=dict)

    def sparsity(self, target: float) -> float:
        """The sparsity whose share of the MACs is nearest to the target.

        Raises:
            RivalError: none is near, or the tool fails before it gets there.
        """
        for _ in range(EVALUATIONS):
            low, high = self._bracket(target)
            if self._distance(target) <= CLOSE or high - low < NARROW:
                break
            self._try((low + high) / 2)
        return self._nearest(target)

    @property
    def evaluations(self) -> int:
        """Prunings so far."""
        return len(self.found) + len(self.failed)

    def _bracket(self, target: float) -> tuple[float, float]:
        """Between which sparsities the target lies, by what has been tried."""
        low = max((s for s, share in self.found.items() if share > target), default=0.0)
        above = [s for s in (*self.found, *self.failed) if s > low]
        return low, min(above, default=MOST_SPARSITY)

    def _try(self, sparsity: float) -> None:
        try:
            self.found[sparsity] = self.ratio(sparsity)
        except Exception as error:  # a rival may raise anything
            self.failed[sparsity] = _told(error)

    def _distance(self, target: float) -> float:
        return min((abs(share - target) for share in self.found.values()), default=1.0)

    def _nearest(self, target: float) -> float:
        if not self.found:
            raise RivalError(f"fails at every sparsity: {next(iter(self.failed.values()), 'none was tried')}")
        best = min(self.found, key=lambda sparsity: abs(self.found[sparsity] - target))
        if abs(self.found[best] - target) <= FAR:
            return best
        reasons = [reason for sparsity, reason in sorted(self.failed.items()) if sparsity > best]
        because = f"; with more sparsity, {reasons[0]}" if reasons else ""
        raise RivalError(f"the nearest it gets is {self.found[best]:.3f} of the MACs{because}")


@dataclass(frozen=True)
class Rival:
    """One tool and criterion.

    Attributes:
        prune: the pruned model at a sparsity.
        search: finds sparsities; rivals whose files have the same sizes share one.
        finish: what is done to the pruned model last.
        before: seconds of what was computed once for all sparsities.
    """

    tool: str
    criterion: str
    prune: Callable[[float], ModelProto]
    search: Search
    finish: Callable[[ModelProto], ModelProto] | None = None
    before: Callable[[], float] | None = None

    def run(self, sparsity: float) -> ModelProto:
        """The pruned model, finished."""
        pruned = self.prune(sparsity)
        return self.finish(pruned) if self.finish is not None else pruned


# --- onnxsim ------------------------------------------------------------------------------------------------


def onnxsim_prune(
    path: Path,
    feeds: Feeds,
    macs_ratio: float,
    criterion: str = "wanda",
    fine_tune: bool = False,
    *,
    everywhere: bool = False,
) -> ModelProto:
    """onnxsim's structured pruning at a share of the MACs.

    Args:
        criterion: "l2" or "wanda".
        fine_tune: whether its ridge regression follows.
        everywhere: one ranking over all layers (its `global_sparsity`).

    Raises:
        RivalError: it doesn't get there.
    """
    rival = onnxsim_rival(onnx.load(path), feeds, criterion, everywhere)
    if fine_tune:
        rival = with_ridge(rival, onnx.load(path), feeds)
    return rival.run(rival.search.sparsity(macs_ratio))


def onnxsim_rival(original: ModelProto, feeds: Feeds, criterion: str, everywhere: bool) -> Rival:
    """`criterion` is "l2" or "wanda"."""
    prune = partial(_onnxsim_cut, original, feeds, criterion, everywhere)
    # Few rows will do for the search; the norms of weights won't, since Wanda cuts fewer layers than L2 does.
    few = {name: rows[:RANKING_ROWS] for name, rows in feeds.items()}
    sized = partial(_onnxsim_cut, original, few, criterion, everywhere)
    search = Search(_share(sized, original, feeds))
    return Rival(ONNXSIM, f"{criterion}-global" if everywhere else criterion, prune, search)


def with_ridge(rival: Rival, original: ModelProto, feeds: Feeds) -> Rival:
    """The same with onnxsim's fine-tuning afterwards."""

    def finish(pruned: ModelProto) -> ModelProto:
        import onnxsim

        return onnxsim.apply_pruning_finetune(original, pruned, calibration_data=list(batches(feeds)))

    return Rival(ONNXSIM, f"{rival.criterion}-ridge", rival.prune, rival.search, finish)


def onnxsim_rivals(original: ModelProto, feeds: Feeds) -> list[Rival]:
    """All criteria of onnxsim."""
    plain = [
        onnxsim_rival(original, feeds, criterion, everywhere)
        for everywhere in (False, True)
        for criterion in ("l2", "wanda")
    ]
    return [*plain, *(with_ridge(rival, original, feeds) for rival in plain)]


def _onnxsim_cut(
    original: ModelProto, feeds: Feeds, criterion: str, everywhere: bool, sparsity: float
) -> ModelProto:
    """One pruning by onnxsim."""
    import onnxsim

    if criterion == "l2":
        return onnxsim.apply_structured_pruning(original, sparsity=sparsity, global_sparsity=everywhere)
    return onnxsim.apply_structured_wanda_pruning(
        original, calibration_data=list(batches(feeds)), sparsity=sparsity, global_sparsity=everywhere
    )


def batches(feeds: Feeds) -> Iterator[dict[str, np.ndarray]]:
    """The rows, some at a time."""
    count = min(len(rows) for rows in feeds.values())
    for start in range(0, count, BATCH):
        yield {name: np.ascontiguousarray(rows[start : start + BATCH]) for name, rows in feeds.items()}


def _share(
    prune: Callable[[float], ModelProto], original: ModelProto, feeds: Feeds
) -> Callable[[float], float]:
    """The share of the MACs that a pruning leaves."""
    total = macs(original, feeds)
    return lambda sparsity: macs(prune(sparsity), feeds) / total


# --- Torch-Pruning ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modules:
    """A network as Torch-Pruning wants it.

    Attributes:
        module: made of torch.nn layers.
        names: for each of those, the initializers behind its parameters and buffers.
        last: the layers that give the outputs: their width is the task's.
        summed: layers that feed a sum of several.
    """

    module: fx.GraphModule
    names: dict[str, dict[str, str]]
    last: list[str]
    summed: list[str]


def torch_prune(
    path: Path,
    feeds: Feeds,
    macs_ratio: float,
    criterion: str = "taylor",
    labels: np.ndarray | None = None,
    *,
    everywhere: bool = False,
    hidden: bool = False,
) -> ModelProto:
    """Torch-Pruning at a share of the MACs, without retraining.

    Args:
        criterion: "l2" or "taylor"; the latter needs labels.
        everywhere: one ranking over all layers (its `global_pruning`).
        hidden: whether layers that feed a residual sum are left alone.

    Raises:
        RivalError: it doesn't get there, or the network can't be given to it.
    """
    twin = Twin(onnx.load(path), feeds, labels)
    rival = torch_rival(twin, criterion, everywhere, hidden)
    return rival.run(rival.search.sparsity(macs_ratio))


class Twin:
    """A model, and the same as modules.

    Args:
        labels: class of each row.
    """

    def __init__(self, original: ModelProto, feeds: Feeds, labels: np.ndarray | None) -> None:
        self.original = original
        self.feeds = feeds
        self.labels = labels

    @cached_property
    def modules(self) -> Modules:
        """The modules, checked against ONNX Runtime.

        Raises:
            RivalError: they don't do the same.
        """
        made = as_modules(self.original)
        agree(made.module, self.original, self.feeds)
        return made

    @cached_property
    def gradients(self) -> tuple[dict[str, torch.Tensor], float]:
        """Of the cross-entropy over all rows, by parameter, and how many seconds they took.

        Raises:
            RivalError: there are no labels.
        """
        import torch
        from torch.nn.functional import cross_entropy

        if self.labels is None:
            raise RivalError("the gradients need labels")
        module = copy.deepcopy(self.modules.module)
        start = time.perf_counter()
        classes = torch.as_tensor(self.labels, dtype=torch.int64)
        for index, batch in enumerate(batches(self.feeds)):
            truth = classes[index * BATCH : (index + 1) * BATCH]
            loss = cross_entropy(module(*_tensors(batch)), truth, reduction="sum") / len(classes)
            loss.backward()
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return found, time.perf_counter() - start


def torch_rivals(twin: Twin) -> list[Rival]:
    """All criteria of Torch-Pruning; those that leave sums alone only where there are some."""
    try:
        scopes = (False, True) if twin.modules.summed else (False,)
    except Exception:  # each of its rivals will fail and tell why
        scopes = (False,)
    return [
        torch_rival(twin, criterion, everywhere, hidden)
        for criterion in ("l2", "taylor")
        for everywhere in (False, True)
        for hidden in scopes
    ]


def torch_rival(twin: Twin, criterion: str, everywhere: bool, hidden: bool) -> Rival:
    """`criterion` is "l2" or "taylor"."""
    prune = partial(_torch_cut, twin, criterion, everywhere, hidden)
    name = f"{criterion}{'-global' * everywhere}{'-hidden' * hidden}"
    search = Search(_share(prune, twin.original, twin.feeds))
    return Rival(
        TORCH_PRUNING,
        name,
        prune,
        search,
        before=(lambda: twin.gradients[1]) if criterion == "taylor" else None,
    )


def _torch_cut(twin: Twin, criterion: str, everywhere: bool, hidden: bool, sparsity: float) -> ModelProto:
    """One pruning by Torch-Pruning, checked: the file does what the pruned module does."""
    import torch
    import torch_pruning

    modules = twin.modules
    module = copy.deepcopy(modules.module)
    if criterion == "taylor":
        gradients, _ = twin.gradients
        for name, parameter in module.named_parameters():
            parameter.grad = gradients.get(name, torch.zeros_like(parameter))
        importance = torch_pruning.importance.GroupTaylorImportance()
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    kept = [*modules.last, *(modules.summed if hidden else [])]
    pruner = torch_pruning.pruner.BasePruner(
        module,
        _tensors({name: rows[:1] for name, rows in twin.feeds.items()}),
        importance=importance,
        global_pruning=everywhere,
        pruning_ratio=sparsity,
        ignored_layers=[module.get_submodule(name) for name in kept],
    )
    pruner.step()
    pruned = write_back(twin.original, module, modules.names)
    agree(module, pruned, twin.feeds)
    return pruned


def _tensors(feeds: Feeds) -> tuple[torch.Tensor, ...]:
    import torch

    return tuple(torch.as_tensor(rows) for rows in feeds.values())


def agree(module: nn.Module, model: ModelProto, feeds: Feeds) -> None:
    """See that a module and a model give the same outputs.

    Raises:
        RivalError: they don't, or one of them doesn't run.
    """
    import torch

    few = {name: np.ascontiguousarray(rows[:FEW]) for name, rows in feeds.items()}
    try:
        with torch.no_grad():
            ours = module(*_tensors(few))
    except Exception as error:  # whatever torch may raise
        raise RivalError(f"the pruned module doesn't run: {_told(error)}") from error
    theirs = runs(model, feeds)
    scale = max(float(np.abs(theirs).max()), 1e-6)
    if ours.shape != theirs.shape or not np.abs(ours.numpy() - theirs).max() <= AGREEMENT * scale:
        raise RivalError("torch and ONNX Runtime give different outputs")


def as_modules(original: ModelProto) -> Modules:
    """What the bridge imports, with torch.nn layers in place of functions that take weights.

    Raises:
        RivalError: a weight goes in elsewhere.
    """
    from torch import fx

    from onnxfuse.pytorch.bridge.importer import to_torch
    from onnxfuse.pytorch.bridge.weights import stored

    loaded = Model.load(original)
    module = to_torch(loaded)
    initializers = {weight.key: weight.name for weight in stored(loaded)}
    names: dict[str, dict[str, str]] = {}
    for node in list(module.graph.nodes):
        sources = _weight_sources(node, module)
        if sources:
            path = f"layer{len(names)}"
            layer = _layer(node, module, {slot: module_tensor(module, key) for slot, key in sources.items()})
            module.add_submodule(path, layer)
            names[path] = {slot: initializers[key] for slot, key in sources.items()}
            _replace(node, path)
    module.graph.eliminate_dead_code()
    result = fx.GraphModule(module, module.graph).eval()
    free = [name for name, _ in result.named_parameters() if name.split(".")[0] not in names]
    if free:
        raise RivalError(f"weights outside of convolutions, linear layers and normalisations: {free}")
    return Modules(result, names, _reached(result, _outputs, names), _reached(result, _sums, names))


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_CONV_SLOTS = ("weight", "bias")
_NORM_SLOTS = ("weight", "bias", "running_mean", "running_var")


def _weight_sources(node: fx.Node, module: nn.Module) -> dict[str, str]:
    """The attribute paths of what a node's layer holds, by the names that torch.nn has for it."""
    from onnxfuse.pytorch.bridge.rules.normalization import BatchNorm

    if node.op == "call_function" and node.target.__name__ in (*_CONVOLUTIONS, "linear"):
        slots = _CONV_SLOTS
    elif node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), BatchNorm):
        slots = _NORM_SLOTS
    else:
        return {}
    given = dict(zip(slots, node.args[1:], strict=False))
    computed = [slot for slot, arg in given.items() if arg is not None and arg.op != "get_attr"]
    if computed:
        raise RivalError(f"the {computed[0]} of '{node.name}' is computed")
    return {slot: str(arg.target) for slot, arg in given.items() if arg is not None}


def module_tensor(module: nn.Module, path: str) -> torch.Tensor:
    """A parameter or buffer by its attribute path."""
    above, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(above), leaf)


def _layer(node: fx.Node, module: nn.Module, held: Mapping[str, torch.Tensor]) -> nn.Module:
    """The torch.nn layer that does what a node does, with copies of its weights."""
    from torch import nn

    weight = held["weight"]
    if node.op == "call_module":
        norm = module.get_submodule(str(node.target))
        layer: nn.Module = nn.BatchNorm2d(len(weight), norm.epsilon, norm.momentum)
    elif node.target.__name__ == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], "bias" in held)
    else:
        kind = getattr(nn, node.target.__name__.capitalize())
        inputs = weight.shape[1] * node.kwargs.get("groups", 1)
        layer = kind(inputs, len(weight), tuple(weight.shape[2:]), bias="bias" in held, **node.kwargs)
    layer.load_state_dict({slot: tensor.detach() for slot, tensor in held.items()}, strict=False)
    return layer


def _replace(node: fx.Node, path: str) -> None:
    """A call of the layer in place of the node."""
    graph = node.graph
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.call_module(path, (node.args[0],)))
    graph.erase_node(node)


def _outputs(node: fx.Node) -> bool:
    return node.op == "output"


def _sums(node: fx.Node) -> bool:
    """Whether a node adds two tensors."""
    return node.op == "call_function" and node.target is operator.add and len(node.all_input_nodes) == 2


def _reached(module: fx.GraphModule, goal: Callable[[fx.Node], bool], layers: Mapping[str, Any]) -> list[str]:
    """The layers whose output gets to such a node without another layer between."""
    linear = {path for path, slots in layers.items() if "running_mean" not in slots}
    found: dict[str, None] = {}
    for node in module.graph.nodes:
        stack = list(node.all_input_nodes) if goal(node) else []
        while stack:
            source = stack.pop()
            if source.target in linear:
                found[str(source.target)] = None
            else:
                stack.extend(source.all_input_nodes)
    return list(found)


def write_back(original: ModelProto, module: nn.Module, names: Mapping[str, Mapping[str, str]]) -> ModelProto:
    """The model with the weights that its layers have now."""
    weights = {
        name: module_tensor(module, f"{path}.{slot}").detach().numpy()
        for path, slots in names.items()
        for slot, name in slots.items()
    }
    pruned = ModelProto()
    pruned.CopyFrom(original)
    for tensor in pruned.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights[tensor.name]), tensor.name))
    del pruned.graph.value_info[:]
    return pruned


# --- all of them --------------------------------------------------------------------------------------------


def outcome(rival: Rival, target: float, original: ModelProto, feeds: Feeds, folder: Path) -> Outcome:
    """Run one rival at one target; the file goes to the folder."""
    known = Outcome(rival.tool, version(rival.tool), rival.criterion, target)
    before = rival.search.evaluations
    start = time.perf_counter()
    try:
        known = replace(known, sparsity=rival.search.sparsity(target))
    except RivalError as error:
        known = replace(known, failure=str(error))
    known = replace(
        known,
        search_seconds=time.perf_counter() - start,
        evaluations=rival.search.evaluations - before,
        failed_at={f"{s:.4f}": reason for s, reason in sorted(rival.search.failed.items())},
    )
    return known if known.sparsity is None else _pruned(rival, known, original, feeds, folder)


def _pruned(rival: Rival, known: Outcome, original: ModelProto, feeds: Feeds, folder: Path) -> Outcome:
    """The pruning at the sparsity that was found, timed."""
    start = time.perf_counter()
    try:
        model = rival.run(known.sparsity or 0.0)
        seconds = time.perf_counter() - start + (rival.before() if rival.before is not None else 0.0)
        ratio = macs(model, feeds) / macs(original, feeds)
        if abs(ratio - known.target) > FAR:
            raise RivalError(f"all rows leave {ratio:.3f} of the MACs")
        runs(model, feeds)
    except Exception as error:  # a rival may raise anything
        return replace(known, failure=str(error) if isinstance(error, RivalError) else _told(error))
    file = f"{rival.tool}-{rival.criterion}-{known.target:g}.onnx"
    onnx.save(model, folder / file)
    return replace(known, file=file, ratio=ratio, seconds=seconds)


def load(original: ModelProto, data: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Calibration rows by input, and labels if there are some.

    Raises:
        KeyError: an input is missing.
    """
    stored = {tensor.name for tensor in original.graph.initializer}
    with np.load(data) as arrays:
        feeds = {info.name: arrays[info.name] for info in original.graph.input if info.name not in stored}
        return feeds, arrays.get("labels")


def run(
    path: Path,
    data: Path,
    targets: Sequence[float],
    folder: Path,
    tools: Sequence[str],
    criteria: Sequence[str] | None = None,
) -> list[Outcome]:
    """Run the rivals and write the folder; its record is replaced.

    Args:
        criteria: no others than these; None for all.
    """
    original = onnx.load(path)
    feeds, labels = load(original, data)
    folder.mkdir(parents=True, exist_ok=True)
    rivals = onnxsim_rivals(original, feeds) if ONNXSIM in tools else []
    if TORCH_PRUNING in tools:
        rivals += torch_rivals(Twin(original, feeds, labels))
    if criteria is not None:
        rivals = [rival for rival in rivals if rival.criterion in criteria]
    outcomes = []
    for rival in rivals:
        for target in targets:
            outcomes.append(outcome(rival, target, original, feeds, folder))
            print(line(outcomes[-1]), flush=True)
            write(folder, path, outcomes)
    return outcomes


def write(folder: Path, path: Path, outcomes: Sequence[Outcome]) -> None:
    """The record of what was done so far."""
    found = {"model": str(path), "outcomes": [asdict(item) for item in outcomes]}
    (folder / RECORD).write_text(json.dumps(found, indent=2) + "\n")


def line(item: Outcome) -> str:
    """An outcome for the terminal."""
    head = f"{item.tool} {item.criterion} {item.target:g}:"
    if item.failure is not None:
        return f"{head} FAILED, {item.failure}"
    return f"{head} {item.ratio:.4f} of the MACs, {item.seconds:.1f} s, search {item.search_seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS), metavar="SHARE")
    parser.add_argument(
        "--tools", nargs="+", choices=(ONNXSIM, TORCH_PRUNING), default=[ONNXSIM, TORCH_PRUNING]
    )
    parser.add_argument(
        "--criteria", nargs="+", metavar="NAME", help="no others than these, e.g. l2 wanda-ridge"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch_pruning")
    run(options.model, options.data, options.targets, options.output, options.tools, options.criteria)


if __name__ == "__main__":
    main()
