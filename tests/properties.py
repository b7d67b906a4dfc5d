"""What a good import of an ONNX file into PyTorch keeps, as functions of the file and the module.

Nothing here knows whose import it is: other converters are held to the same. They rename weights and store
them in other layouts, so tensors are matched by *content*: two tensors are the same if their sorted values
are.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model

WEIGHT_SLOTS: Mapping[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "Concat": (0, 1, 2, 3),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "GRU": (1, 2, 3),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "Mul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
}
"""Where a stored float tensor of several elements is a weight, or at least may be."""

_CARRIERS = {
    "Cast",
    "CastLike",
    "Expand",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_MASKED = 100
"""Stored tensors with values of this size are masks and limits."""

Scope = tuple[str, ...]


@dataclass
class Stored:
    """A tensor stored in a file: an initializer or the value of a Constant node, with the operators and slots
    that use it, directly or through operators that only hand it on."""

    scope: Scope
    name: str
    array: np.ndarray
    initializer: bool
    uses: list[tuple[str, int]] = field(default_factory=list)

    @property
    def is_weight(self) -> bool:
        """Whether training is expected to reach it."""
        if self.array.dtype.kind != "f" or self.array.size < 2 or np.abs(self.array).max() >= _MASKED:
            return False
        return any(slot in WEIGHT_SLOTS.get(op, ()) for op, slot in self.uses)

    @property
    def is_shared(self) -> bool:
        """Whether several operators compute with it; some exporters also ask for its shape, or take an LSTM's
        weights apart and put them together again."""
        return sum(op not in ("Shape", "Concat") for op, _ in self.uses) > 1


def stored_tensors(proto: ModelProto) -> list[Stored]:
    """All of them, those in bodies included."""
    return list(_walk(proto.graph, (), {}))


def _walk(graph: GraphProto, scope: Scope, outer: Mapping[str, Stored]) -> Iterator[Stored]:
    known = dict(outer)
    mine = []
    for tensor in graph.initializer:
        known[tensor.name] = Stored(scope, tensor.name, numpy_helper.to_array(tensor), True)
        mine.append(known[tensor.name])
    for node in graph.node:
        value = constant(node)
        if value is not None:
            name = node.output[0]
            known[name] = Stored(scope, name, numpy_helper.to_array(value), False)
            mine.append(known[name])
        for slot, name in enumerate(node.input):
            if name in known:
                if node.op_type not in _CARRIERS:
                    known[name].uses.append((node.op_type, slot))
                elif slot == 0:
                    known.update((output, known[name]) for output in node.output)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node or body.initializer:
                    yield from _walk(body, (*scope, node.output[0], attribute.name), known)
    yield from mine


def constant(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node with a tensor of floats."""
    if node.op_type != "Constant":
        return None
    found = [attribute.t for attribute in node.attribute if attribute.name == "value"]
    return found[0] if found and found[0].data_type == TensorProto.FLOAT else None


# --- matching by content ------------------------------------------------------------------------------------


def fingerprint(values: np.ndarray | Tensor) -> str:
    """Equal for tensors of the same values, in whatever order and shape."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    ordered = np.sort(np.ascontiguousarray(array).reshape(-1))
    return f"{array.dtype} {array.size} {hashlib.sha1(ordered.tobytes()).hexdigest()}"


def _held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def counterparts(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names in `ours` to the names in `theirs` of tensors of the same content, where there are any."""
    by_content: dict[str, list[str]] = {}
    for name, tensor in theirs.items():
        by_content.setdefault(fingerprint(tensor), []).append(name)
    keys = {name: fingerprint(tensor) for name, tensor in ours.items()}
    return {name: by_content[key] for name, key in keys.items() if key in by_content}


# --- what is kept -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How many of how many; `lost` names some of the others."""

    kept: int
    total: int
    lost: tuple[str, ...] = ()

    @property
    def all(self) -> bool:
        return self.kept == self.total


def _share(kept: Mapping[str, bool]) -> Share:
    return Share(sum(kept.values()), len(kept), tuple(name for name, good in kept.items() if not good)[:5])


def names_kept(proto: ModelProto, module: nn.Module) -> Share:
    """Initializers of the main graph whose names are keys of the state_dict, with their very bytes."""
    state = module.state_dict()
    kept = {}
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        there = state.get(tensor.name)
        kept[tensor.name] = (
            there is not None
            and tuple(there.shape) == array.shape
            and there.cpu().contiguous().numpy().tobytes() == array.tobytes()
        )
    return _share(kept)


def native_names_kept(native: nn.Module, module: nn.Module) -> Share:
    """Keys of the native state_dict that the import has, in the same shape; of tied tensors one of the names.
    BatchNorm's batch counters are not counted: no exporter writes them."""
    state = module.state_dict()
    aliases: dict[int, list[str]] = {}
    for name, tensor in native.state_dict(keep_vars=True).items():
        if not name.endswith("num_batches_tracked"):
            aliases.setdefault(id(tensor), []).append(name)
    theirs = native.state_dict()
    return _share(
        {
            names[0]: any(name in state and state[name].shape == theirs[name].shape for name in names)
            for names in aliases.values()
        }
    )


def ties_kept(proto: ModelProto, module: nn.Module) -> Share:
    """Float weights that several nodes share and the module holds exactly once."""
    weights = [tensor for tensor in stored_tensors(proto) if tensor.array.dtype.kind == "f"]
    in_file = Counter(fingerprint(tensor.array) for tensor in weights)
    in_module = Counter(fingerprint(tensor) for tensor in _held(module).values())
    return _share(
        {
            tensor.name: in_module[key] == in_file[key]
            for tensor in weights
            if tensor.is_shared and tensor.is_weight
            for key in [fingerprint(tensor.array)]
        }
    )


def project(outputs: object, seed: int = 0) -> Tensor:
    """A loss: a random projection of all floating-point outputs."""
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
    random = torch.Generator().manual_seed(seed)
    parts = [(t * torch.randn(t.shape, generator=random)).mean() for t in tensors if t.is_floating_point()]
    return torch.stack(parts).sum()


def gradients(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of a projection of the outputs in eval mode, by parameter; those that got none are absent."""
    module.eval()
    module.zero_grad()
    project(module(*inputs)).backward()
    found = {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def weights_with_gradient(proto: ModelProto, module: nn.Module, found: Mapping[str, Tensor]) -> Share:
    """Float weights of the file that are parameters of the module with a gradient.

    All-zero gradients count: whether a ReLU is dead is not the import's doing (`gradients_equal` is the
    sharper question).
    """
    reached = Counter(fingerprint(p) for name, p in module.named_parameters() if name in found)
    kept = {}
    for tensor in stored_tensors(proto):
        if tensor.is_weight:
            key = fingerprint(tensor.array)
            kept["/".join((*tensor.scope, tensor.name))] = reached[key] > 0
            reached[key] -= 1
    return _share(kept)


def gradients_equal(
    native: nn.Module, theirs: Mapping[str, Tensor], module: nn.Module, inputs: Sequence[Tensor]
) -> Share:
    """Native parameters whose counterpart in the import gets the same gradient, up to float noise.

    Parameters without a counterpart (folded, or stored twice by the exporter) are not counted.
    """
    ours = gradients(native, inputs)
    # a gradient may be zero but for rounding (a key's bias, under a softmax): the scale is the network's
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    trained = dict(module.named_parameters())
    same = {}
    for name, others in counterparts(dict(native.named_parameters()), _held(module)).items():
        parameters = [other for other in others if other in trained]
        if name in ours and len(parameters) < 2:
            a = ours[name].reshape(-1).sort().values
            b = theirs.get("".join(parameters), torch.zeros_like(a)).reshape(-1).sort().values
            same[name] = bool(parameters) and bool((a - b).abs().max() <= 1e-5 * scale)
    return _share(same)


def buffers_kept(native: nn.Module, module: nn.Module) -> Share:
    """Native float buffers (masks, tables of angles, running statistics) that the import does not train."""
    buffers = {n: b for n, b in native.named_buffers() if b.is_floating_point() and b.numel() > 1}
    held, trained = _held(module), dict(module.named_parameters())
    return _share({n: not trained.keys() & set(o) for n, o in counterparts(buffers, held).items()})


def statistics_equal(native: nn.Module, module: nn.Module, inputs: Sequence[Tensor]) -> Share:
    """Running statistics of BatchNorm that equal the native module's after a training step of both.

    Statistics without a counterpart (folded away by the exporter) are not counted. Both modules are changed.
    """
    buffers = {n: b for n, b in native.named_buffers() if n.endswith(("running_mean", "running_var"))}
    held = _held(module)
    pairs = counterparts(buffers, held)
    for trained in (native, module):
        trained.train()
        optimizer = torch.optim.SGD(trained.parameters(), 0.01)
        project(trained(*inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.eval()
    return _share(
        {
            name: any(torch.allclose(held[other].reshape(-1), buffers[name], 1e-5, 1e-6) for other in others)
            for name, others in pairs.items()
        }
    )


# --- written back -------------------------------------------------------------------------------------------


def emptied(proto: ModelProto) -> bytes:
    """The file but for the values of its stored tensors."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    _empty(copy.graph)
    return copy.SerializeToString(deterministic=True)


def _empty(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _drop_values(tensor)
    for node in graph.node:
        if not node.name:
            node.ClearField("name")  # absent or empty is one
        if constant(node) is not None:
            for attribute in node.attribute:
                _drop_values(attribute.t)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _empty(body)


def _drop_values(tensor: TensorProto) -> None:
    """Keeps name, type, dimensions and doc string."""
    kept = TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, doc_string=tensor.doc_string
    )
    tensor.CopyFrom(kept)


def statistics(proto: ModelProto) -> set[tuple[Scope, str]]:
    """The running statistics of BatchNormalization."""
    slots = {("BatchNormalization", 3), ("BatchNormalization", 4)}
    return {(t.scope, t.name) for t in stored_tensors(proto) if slots & set(t.uses)}


def changed_tensors(before: ModelProto, after: ModelProto) -> set[tuple[Scope, str]]:
    """Stored tensors whose bytes differ."""
    return {
        (a.scope, a.name)
        for a, b in zip(stored_tensors(before), stored_tensors(after), strict=True)
        if a.array.tobytes() != b.array.tobytes()
    }


@dataclass(frozen=True)
class RoundTrip:
    """What from_torch did.

    Attributes:
        untouched: an import that nobody changed gave back the very bytes of the model.
        only_weights: after a change of some weights, all but stored values is as it was.
        these_weights: the stored values that differ are exactly the changed ones.
        changed: how many those are.
        module: with the changes.
        result: the model with the changes.
    """

    untouched: bool
    only_weights: bool
    these_weights: bool
    changed: int
    module: nn.Module
    result: Model


def round_trip(model: Model, samples: Sequence[Mapping[str, np.ndarray]]) -> RoundTrip:
    """from_torch of an untouched import, and of one with every second Parameter and every second running
    statistic changed."""
    from onnxfuse.pytorch.bridge.importer import to_torch  # other converters' environments have no onnxfuse
    from onnxfuse.pytorch.bridge.weights import stored
    from onnxfuse.pytorch.bridge.writeback import from_torch

    before = model.to_proto()
    module = to_torch(model)
    same = from_torch(module, model, calib=samples).to_proto()
    names = {w.key: (tuple(itertools.chain.from_iterable(w.scope)), w.name) for w in stored(model)}
    moving = statistics(before)
    changed = [key for key, _ in module.named_parameters()][::2]
    changed += [key for key in module.state_dict() if names[key] in moving][::2]
    with torch.no_grad():
        for key in changed:
            module.state_dict()[key].mul_(1.03).add_(1e-3)
    result = from_torch(module, model, calib=samples)
    after = result.to_proto()
    return RoundTrip(
        untouched=same.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True),
        only_weights=emptied(before) == emptied(after),
        these_weights=changed_tensors(before, after) == {names[key] for key in changed},
        changed=len(changed),
        module=module,
        result=result,
    )


# --- a module like any other --------------------------------------------------------------------------------


def _close(a: object, b: object) -> bool:
    """Equal up to float noise, relative to the largest element."""
    left, right = ([t] if isinstance(t, Tensor) else list(t) for t in (a, b))  # type: ignore[call-overload]
    return len(left) == len(right) and all(
        bool((x.double() - y.double()).abs().max() <= 1e-5 * x.abs().max() + 1e-6)
        for x, y in zip(left, right, strict=True)
    )


def copies(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """AssertionError unless a deepcopy computes the same and shares nothing."""
    with torch.no_grad():
        before = module(*inputs)
        twin = copy.deepcopy(module)
        assert _close(before, twin(*inputs))
        for parameter in twin.parameters():
            parameter.zero_()
        assert _close(before, module(*inputs))


def reloads(module: nn.Module, again: nn.Module, inputs: Sequence[Tensor]) -> None:
    """AssertionError unless `again`, a second import, takes over the module's state through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
        again.load_state_dict(torch.load(file))
        assert _close(module(*inputs), again(*inputs))


def compiles(module: nn.Module, inputs: Sequence[Tensor], backend: str) -> None:
    """AssertionError unless torch.compile makes one graph of it, forward and backward, that computes the
    same."""
    torch.compiler.reset()
    module.eval()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert _close(module(*inputs), compiled(*inputs))
    eager = gradients(module, inputs)
    project(compiled(*inputs)).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == (name in eager)
        assert parameter.grad is None or _close(parameter.grad, eager[name])
    module.zero_grad()


def exports(module: nn.Module, inputs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """AssertionError unless torch.export takes it with a dynamic batch, and the program runs on `others`,
    too."""
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=shapes).module()
    assert _close(module(*others), program(*others))
