"""Made-up samples, for a model that came without any.

They keep the shapes and types of the inputs and nothing else, so what is measured on them says little about
real data; whoever asks for them is told so loudly. Floats are standard normal. Integers that look
something up (Gather, one-hot) stay within the table, bytes take their whole range, masks are ones, other
integers are 0 or 1. Dynamic sizes are tried, likely ones first, until ONNX Runtime runs the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from onnxfuse.data.batch_axes import batch_axes
from onnxfuse.data.batch_rows import rows_within
from onnxfuse.data.sources import Reading
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.table import OPS, Trait
from onnxfuse.runtime.feeds import NO_TENSOR, format_shape
from onnxfuse.runtime.memory import Budget
from onnxfuse.runtime.narrow import NARROW
from onnxfuse.runtime.session import Runtime

_MOST, _LEAST = 256, 16  # samples where nobody says how many: as many as
_BYTES = 2**24  # holds, because large samples are slow to run
_SPATIAL, _SEQUENCE = 64, 16
_LARGEST = 2**25  # bytes of a batch that is tried
_HUGE = 2**30  # bytes of a batch that is never made, whatever the model declares
_MOST_AXES = 64  # of an array
_PATIENCE = 5.0  # seconds after which no more sizes are tried
_OTHER_SIZES = (64, 32, 16, 224, 128, 256, 512, 640, 1)

# Operators whose output holds the very integers of their inputs, so that a bound on it is a bound on them.
_PASSING = OPS.having(Trait.CARRIES_WEIGHTS)

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Symbol = str | tuple[str, int]  # a dynamic dimension: its name, or the input and axis where it stands
Template = dict[str, tuple[int | Symbol, ...]]
_BATCH: Symbol = ("", 0)


class Synthetic:
    """Random feeds: a source whose units are batches."""

    batch: int | None = 1
    exact = False
    labels: str | None = None

    def __init__(self, model: Model, batch_size: int, samples: int | None, seed: int, budget: Budget) -> None:
        """Find sizes at which the model runs.

        Args:
            model: its inputs are imitated.
            batch_size: the most rows of a batch, where the model leaves that open.
            samples: about how many to make; None for 16 to 256, depending on their size.
            seed: of the random numbers.
            budget: of memory; there are fewer rows where samples are large.

        Raises:
            InputError: the model ran on none of the sizes that were tried, or takes no rows at all.
            NotApplicableError: ONNX Runtime cannot load the model.
        """
        self._seed = seed
        self._draws = {info.name: _draw(model, info) for info in model.inputs}
        template = _template(model.inputs)
        sizes = self._sizes_that_run(model, template)
        row = _concrete(template, {**sizes, _BATCH: 1})
        row_bytes = sum(math.prod(shape) * _item_size(model, name) for name, shape in row.items())
        wanted = samples or min(max(_BYTES // max(row_bytes, 1), _LEAST), _MOST)
        if sizes[_BATCH] > 1:
            fitting = rows_within(model, self._feed(0, row), budget.batch, Runtime("cpu")) or batch_size
            sizes[_BATCH] = max(1, min(batch_size, wanted // 4, fitting))
        self._shapes = _concrete(template, sizes)
        self._rows = _rows(model.inputs, self._shapes)
        if not self._rows:
            raise InputError("the inputs are declared with 0 rows: no samples can be made up for them")
        self.count = max(2, -(-wanted // self._rows))
        shapes = ", ".join(f"'{name}' {format_shape(shape)}" for name, shape in self._shapes.items())
        self.name = f"made-up samples for {shapes}"

    def _sizes_that_run(self, model: Model, template: Template) -> dict[Symbol, int]:
        session = Runtime("cpu").session(model, optimize=False)  # for one run, optimizing takes longer
        failure: NotApplicableError | str | None = None
        end = time.monotonic() + _PATIENCE
        for sizes in _candidates(model.inputs, template):
            shapes = _concrete(template, sizes)
            size = sum(math.prod(shape) * _item_size(model, name) for name, shape in shapes.items())
            if size > (_HUGE if failure is None else _LARGEST):
                failure = failure or f"a batch of the sizes that it declares takes {size / 2**30:,.0f} GiB"
                continue
            try:
                session.run(self._feed(0, shapes))
            except NotApplicableError as error:
                failure = failure or error
            else:
                return sizes
            if time.monotonic() > end:
                break
        raise InputError(f"made-up samples do not suit this model, give real ones with --calib ({failure})")

    def _feed(self, unit: int, shapes: dict[str, tuple[int, ...]]) -> Feed:
        random = np.random.default_rng((self._seed, unit))
        return {name: self._draws[name](random, shape) for name, shape in shapes.items()}

    def samples(self, units: np.ndarray) -> int:
        return len(units) * self._rows

    def read(self, groups: Iterable[np.ndarray]) -> Iterator[Reading]:
        for units in groups:
            yield self._feed(int(units[0]), self._shapes), None


def _template(inputs: Sequence[TensorInfo]) -> Template:
    """Each input's shape with a symbol for what is dynamic; equal symbols must get equal sizes."""
    axes = batch_axes(inputs)
    template: Template = {}
    batch_names = set()
    for info in inputs:
        if info.shape is None:
            raise InputError(f"the shape of input '{info.name}' is not declared; give samples with --calib")
        axis = axes[info.name]
        if axis is not None:
            batch_names.add(info.shape[axis])
    for info in inputs:
        dims = enumerate(info.shape or ())
        template[info.name] = tuple(
            dim
            if isinstance(dim, int)
            else _BATCH
            if axis == axes[info.name] or (dim is not None and dim in batch_names)
            else dim or (info.name, axis)
            for axis, dim in dims
        )
    return template


def _concrete(template: Template, sizes: dict[Symbol, int]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)
        for name, dims in template.items()
    }


def _candidates(inputs: Sequence[TensorInfo], template: Template) -> Iterator[dict[Symbol, int]]:
    """Sizes for all symbols, likely ones first, each with 2 samples and with 1: some models take no more."""
    hints: dict[Symbol, int] = {}
    for info in inputs:
        dims = template[info.name]
        image = len(dims) >= 4 or (len(dims) == 3 and not isinstance(dims[2], int))
        for dim in dims:
            if not isinstance(dim, int) and dim != _BATCH:
                floats = info.dtype is not None and (info.dtype.kind == "f" or info.dtype in NARROW)
                hints.setdefault(dim, _SPATIAL if image and floats else _SEQUENCE)
    options = [hints, *(dict.fromkeys(hints, size) for size in _OTHER_SIZES if hints)]
    for option in options:
        for rows in (2, 1):
            yield {**option, _BATCH: rows}


def _rows(inputs: Sequence[TensorInfo], shapes: dict[str, tuple[int, ...]]) -> int:
    axes = batch_axes(inputs)
    return next((shapes[name][axis] for name, axis in axes.items() if axis is not None), 1)


def _item_size(model: Model, name: str) -> int:
    return next(info.dtype.itemsize for info in model.inputs if info.name == name and info.dtype is not None)


def _draw(model: Model, info: TensorInfo) -> Draw:
    """The recipe for an input's values."""
    dtype = info.dtype
    if dtype is None:
        raise InputError(NO_TENSOR.format(name=info.name))
    if (axes := len(info.shape or ())) > _MOST_AXES:
        raise InputError(f"input '{info.name}' has {axes} axes, and NumPy {_MOST_AXES} at most")
    if dtype.kind not in "fbiu" and dtype not in NARROW:
        raise InputError(
            f"samples of {'text' if dtype.kind == 'O' else dtype} for input '{info.name}' cannot be made up; "
            "give real ones with --calib"
        )
    if dtype.kind == "f" or dtype in NARROW:
        return lambda random, shape: random.standard_normal(shape, np.float32).astype(dtype)
    bound = _index_bound(model, model.tensor(info.name))
    if bound is None and (info.shape == () or "mask" in info.name.lower()):
        return lambda random, shape: np.ones(shape, dtype)
    low, high = (0, bound) if bound is not None else (0, 2)
    if bound is None and dtype.itemsize == 1 and dtype.kind != "b":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max + 1
    return lambda random, shape: random.integers(low, high, shape).astype(dtype)


def _index_bound(model: Model, tensor: Tensor) -> int | None:
    """The size of the smallest table that `tensor` indexes; None if it indexes none."""
    shapes = model.shapes()
    bounds: list[int] = []
    seen = {tensor}
    stack = [tensor]
    while stack:
        current = stack.pop()
        for node in model.consumers(current):
            rule = _TABLES.get(node.op)
            bound = rule(model, node, current, shapes) if rule else None
            if bound is not None:
                bounds.append(bound)
            elif _hands_on(node, current):
                fresh = [out for out in node.outputs if out not in seen]
                seen.update(fresh)
                stack.extend(fresh)
    return min(bounds, default=None)


def _hands_on(node: Node, tensor: Tensor) -> bool:
    """Whether the outputs of a node hold the elements of one of its inputs: not of one that says where to
    cut, or what shape to take."""
    row = _PASSING.get(*node.key)
    return row is not None and any(operand is tensor for operand in node.inputs[: row.operands])


def _gathered(model: Model, node: Node, index: Tensor, shapes: dict[str, TensorInfo]) -> int | None:
    shape = shapes[node.inputs[0].name].shape
    size = shape[node.attrs.get("axis", 0)] if shape and node.inputs[1] is index else None
    return size if isinstance(size, int) else None


def _one_hot(model: Model, node: Node, index: Tensor, shapes: dict[str, TensorInfo]) -> int | None:
    depth = model.weight(node.inputs[1]) if node.inputs[0] is index else None
    return None if depth is None else int(depth.reshape(-1)[0])


def _compared(model: Model, node: Node, index: Tensor, shapes: dict[str, TensorInfo]) -> int | None:
    """One-hot spelled as a comparison with 0, 1, 2, ..."""
    others = [model.weight(tensor) for tensor in node.inputs if tensor is not index]
    if len(others) != 1 or others[0] is None or others[0].size < 2:
        return None
    return others[0].size if np.array_equal(others[0].reshape(-1), np.arange(others[0].size)) else None


# For each operator that looks something up: the size of the table that a tensor indexes, None if it does not.
_TABLES = {"Gather": _gathered, "OneHot": _one_hot, "Equal": _compared}
