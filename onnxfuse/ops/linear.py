"""One view of everything that is an affine operator: Conv, Gemm, MatMul, each with an optional bias Add
behind it.

A pass that solves for weights thinks of `y = W x + b` with W a matrix of shape (out, in), or, for a
convolution, (out, in / groups * prod(kernel)), the columns in im2col order (channel-major, then the taps in
row-major order). ONNX stores the same thing in four layouts. This module is the only place that knows them:

    operator        stored weight                   W                                        b
    Conv            (out, in/g, *kernel)            reshape(out, -1)                         B
    ConvTranspose   (in, out/g, *kernel)            per group: swap in and out               B
    Gemm            (in, out), or (out, in)         alpha * transpose to (out, in)           beta * C
    MatMul          (in, out)                       transpose                                0

to which the constant of a following Add is added where that Add is nothing but a bias. What is stored may be
laid out anew before the operator reads it (`ops.layouts`). Reading gives float64; writing goes back to the
stored layout, dtype and initializer names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import Shapes
from onnxfuse.ops.layouts import StoredWeight, is_shared, is_stored, stored_weight

LinearKind = Literal["conv", "conv_transpose", "dense", "token"]

FLOATING = ("float16", "float32", "float64", "bfloat16")
"""Names of the types that weights have."""


@dataclass(frozen=True, eq=False)
class LinearOp:
    """An affine operator of a graph: a node, its weight, and the bias Add behind it if there is one.

    `kind` says what a row is: "conv" a spatial position of (N, C, *S); "dense" a row of a matrix; "token"
    every leading index of a tensor whose last axis holds the features (also used where the rank is
    unknown). `pads` is (begin..., end...); None where auto_pad makes it depend on an input size that isn't
    static. `shared` is true when the weight or bias has another user: another node, a subgraph, a graph
    output.
    """

    model: Model = field(repr=False)
    node: Node
    bias_node: Node | None
    kind: LinearKind
    in_features: int
    out_features: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] | None = ()
    shared: bool = False

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The operator's node, then its bias Add if there is one."""
        return (self.node,) if self.bias_node is None else (self.node, self.bias_node)

    @property
    def name(self) -> str:
        """The node's `site_name`."""
        return self.node.site_name

    @property
    def x(self) -> str:
        """Name of the input tensor."""
        return str(self.node.inputs[0].name)

    @property
    def y(self) -> str:
        """Name of the output tensor, after the bias Add."""
        return str(self.nodes[-1].outputs[0].name)

    @property
    def weight_input(self) -> Tensor:
        """The weight as the operator reads it, in its own layout."""
        return self.node.inputs[1]

    @property
    def stored(self) -> StoredWeight:
        """The stored weight, and how it is laid out for the operator."""
        return _known(self.model, self.weight_input)

    @property
    def weight_tensor(self) -> Tensor:
        """The stored weight."""
        return self.stored.tensor

    @property
    def own_bias(self) -> Tensor | None:
        """The bias input of the node itself (Conv's B, Gemm's C), if it has one."""
        return optional_input(self.node, 2)

    @property
    def added_bias(self) -> Tensor | None:
        """The constant of the bias Add, as that reads it, if there is one."""
        return None if self.bias_node is None else constant_operand(self.model, self.bias_node)

    @property
    def columns(self) -> int:
        """Columns of the weight matrix: in_features / groups * prod(kernel)."""
        return self.in_features // self.groups * math.prod(self.kernel)

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the stored weight."""
        return self.stored.dtype

    @property
    def weight(self) -> np.ndarray:
        """The weight as a float64 matrix (out, in / groups * prod(kernel))."""
        return _from_layout(self, _widened(read_value(self.model, self.weight_input)))

    @property
    def has_bias(self) -> bool:
        """Whether there is any place that a bias is stored in."""
        return self.own_bias is not None or self.bias_node is not None

    @property
    def bias(self) -> np.ndarray:
        """The whole bias, float64 (out,): the node's own and the added one; zeros where there is none."""
        total = np.zeros(self.out_features)
        if self.own_bias is not None:
            total += float(self.node.attrs.get("beta", 1.0)) * flat_value(self.model, self.own_bias)
        if self.added_bias is not None:
            total += flat_value(self.model, self.added_bias)
        return total


def linear_op(
    model: Model, node: Node, shapes: Shapes | None = None, *, transposed: bool = False
) -> LinearOp | str:
    """The affine operator at `node` (Conv, Gemm or MatMul with constant weights), or the reason it is none.

    Args:
        model: has the node.
        node: the operator.
        shapes: as `Model.shapes` returns them; they tell a dense MatMul from a per-token one and settle
            auto_pad. None: the shapes stored in the graph are used.
        transposed: whether ConvTranspose is admitted, as kind "conv_transpose".
    """
    describe = _OPERATORS.get(node.op) if is_main_domain(node) else None
    if describe is None:
        return f"{node.op} is not a linear operator"
    if node.op == "ConvTranspose" and not transposed:
        return "ConvTranspose is not a linear operator that can be solved for"
    stored = stored_weight(model, node.inputs[1]) if len(node.inputs) > 1 else None
    if stored is None:
        return f"the weight of {node.op} is computed, not constant"
    info = _weight_shape(stored)
    if isinstance(info, str):
        return info
    op = describe(model, node, info, shapes or {})
    if isinstance(op, str):
        return op
    own = op.own_bias
    if own is not None:
        bias = stored_weight(model, own)
        if bias is None:
            return f"the bias of {node.op} is computed, not constant"
        size = math.prod(bias.shape)
        if size not in (1, op.out_features):
            return f"the bias of {node.op} has {size} values for {op.out_features} outputs"
    return _with_bias_add(model, op, shapes or {})


def is_main_domain(node: Node) -> bool:
    """Whether the node's operator is one of ONNX's own."""
    return node.domain in ("", "ai.onnx", None)


def optional_input(node: Node, index: int) -> Tensor | None:
    """Input `index` of a node, None where it is absent or left empty."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def channel_vector(shape: Sequence[int], channels: int, axis: int, rank: int | None) -> bool:
    """Whether a constant broadcasts to one value per channel (or one for all) over a tensor.

    It must not make the tensor larger: no more dimensions, nothing but 1 or `channels` on the channel axis, 1
    elsewhere.

    Args:
        shape: of the constant.
        channels: size of the tensor's channel axis.
        axis: the channel axis. A negative one counts from the end, and then the rank need not be known for
            constants of at most one dimension.
        rank: of the tensor, None if unknown.
    """
    if rank is None:
        return axis == -1 and len(shape) <= 1 and (not shape or shape[0] in (1, channels))
    if len(shape) > rank:
        return False
    from_end = axis - rank if axis >= 0 else axis
    return all(
        size == 1 or (size == channels and position == from_end)
        for position, size in zip(range(-len(shape), 0), shape, strict=True)
    )


# ---- recognizing -----------------------------------------------------------------------------------------


def _weight_shape(stored: StoredWeight) -> tuple[int, ...] | str:
    if stored.dtype.name not in FLOATING:
        return f"weights {stored.tensor.name} are {stored.dtype}, not floating point"
    if 0 in stored.shape:
        return f"weights {stored.tensor.name} are empty"
    return stored.shape


def _conv(model: Model, node: Node, shape: tuple[int, ...], shapes: Shapes) -> LinearOp | str:
    if len(shape) < 3:
        return f"the weight of {node.op} has rank {len(shape)}"
    kernel, axes = shape[2:], len(shape) - 2
    groups = int(node.attrs.get("group", 1))
    transposed = node.op == "ConvTranspose"
    if shape[0] % groups:
        return f"{shape[0]} channels do not divide into {groups} groups"
    strides = tuple(int(s) for s in node.attrs.get("strides", (1,) * axes))
    dilations = tuple(int(d) for d in node.attrs.get("dilations", (1,) * axes))
    return LinearOp(
        model=model,
        node=node,
        bias_node=None,
        kind="conv_transpose" if transposed else "conv",
        in_features=shape[0] if transposed else shape[1] * groups,
        out_features=shape[1] * groups if transposed else shape[0],
        groups=groups,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=None if transposed else _conv_pads(node, kernel, strides, dilations, shapes),
    )


def _conv_pads(
    node: Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], shapes: Shapes
) -> tuple[int, ...] | None:
    """Explicit pads, begin then end; SAME_* is resolved where strides are 1 or the input size is static."""
    mode = _text(node.attrs.get("auto_pad", "NOTSET"))
    axes = len(kernel)
    if mode in ("NOTSET", ""):
        return tuple(int(p) for p in node.attrs.get("pads", (0,) * (2 * axes)))
    if mode == "VALID":
        return (0,) * (2 * axes)
    shape = _shape(node.inputs[0], shapes)
    begin, end = [], []
    for axis in range(axes):
        size = shape[2 + axis] if shape is not None and len(shape) == axes + 2 else None
        extent = (kernel[axis] - 1) * dilations[axis] + 1
        if strides[axis] == 1:
            total = extent - 1
        elif isinstance(size, int):
            outputs = -(-size // strides[axis])
            total = max((outputs - 1) * strides[axis] + extent - size, 0)
        else:
            return None
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return (*begin, *end)


def _gemm(model: Model, node: Node, shape: tuple[int, ...], shapes: Shapes) -> LinearOp | str:
    if int(node.attrs.get("transA", 0)):
        return "Gemm with a transposed input"
    if len(shape) != 2:
        return f"the weight of Gemm has rank {len(shape)}"
    if float(node.attrs.get("alpha", 1.0)) == 0.0:
        return "Gemm with alpha = 0"
    out, inner = shape if int(node.attrs.get("transB", 0)) else shape[::-1]
    return LinearOp(model=model, node=node, bias_node=None, kind="dense", in_features=inner, out_features=out)


def _matmul(model: Model, node: Node, shape: tuple[int, ...], shapes: Shapes) -> LinearOp | str:
    if len(shape) != 2:
        return f"the weight of MatMul has rank {len(shape)}"
    rank = _rank(node.inputs[0], shapes)
    kind: LinearKind = "dense" if rank == 2 else "token"
    return LinearOp(
        model=model, node=node, bias_node=None, kind=kind, in_features=shape[0], out_features=shape[1]
    )


_OPERATORS = {"Conv": _conv, "ConvTranspose": _conv, "Gemm": _gemm, "MatMul": _matmul}

WEIGHTED = frozenset(_OPERATORS)
"""Names of the operators, in ONNX's own domain, that `linear_op` can describe."""

LINEAR_OPERATORS = WEIGHTED - {"ConvTranspose"}
"""Those that it describes without being asked for transposed ones."""


def _with_bias_add(model: Model, op: LinearOp, shapes: Shapes) -> LinearOp:
    """Take a following Add along where it is a bias and nothing else sees the sum without it."""
    add = _bias_add(model, op, shapes)
    found = replace(op, bias_node=add)
    constants = [(op.node, t) for t in (op.weight_input, op.own_bias) if t is not None]
    if add is not None:
        constants.append((add, constant_operand(model, add)))
    return replace(found, shared=any(is_shared(model, tensor, node) for node, tensor in constants))


def _bias_add(model: Model, op: LinearOp, shapes: Shapes) -> Node | None:
    y = op.node.outputs[0]
    users = model.consumers(y)
    if len(users) != 1 or users[0].op != "Add" or model.is_output(y) or model.captured(y):
        return None
    add = users[0]
    weights = [found for t in add.inputs if t is not y and (found := stored_weight(model, t)) is not None]
    if not is_main_domain(add) or len(weights) != 1:
        return None
    axis, rank = output_axis(op, shapes)
    return add if channel_vector(weights[0].shape, op.out_features, axis, rank) else None


def output_axis(op: LinearOp, shapes: Shapes) -> tuple[int, int | None]:
    """The channel axis of the operator's output and its rank (None: unknown; then the axis is -1)."""
    if op.kind in ("conv", "conv_transpose"):
        return 1, len(op.kernel) + 2
    if op.node.op == "Gemm":
        return 1, 2
    rank = _rank(op.node.inputs[0], shapes)
    return -1, rank


def _shape(tensor: Tensor, shapes: Shapes) -> Sequence[int | str | None] | None:
    info = shapes.get(tensor.name)
    if info is not None:
        return info.shape
    return getattr(tensor, "shape", None)


def _rank(tensor: Tensor, shapes: Shapes) -> int | None:
    shape = _shape(tensor, shapes)
    return None if shape is None else len(shape)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def constant_operand(model: Model, add: Node) -> Tensor:
    """The stored operand of an Add, as it reads it."""
    return next(t for t in add.inputs if is_stored(model, t))


def read_value(model: Model, tensor: Tensor) -> np.ndarray:
    """The value of a weight, as a node reads it.

    Raises:
        ValueError: it is computed.
    """
    stored = _known(model, tensor)
    value = model.weight(stored.tensor)
    assert value is not None
    return stored.laid_out(value)


def flat_value(model: Model, tensor: Tensor) -> np.ndarray:
    """The value of a weight as a float64 vector."""
    return _widened(read_value(model, tensor)).reshape(-1)


def _widened(value: np.ndarray) -> np.ndarray:
    """The value in float64; NumPy would print a warning of a signaling NaN."""
    with np.errstate(invalid="ignore"):
        return value.astype(np.float64)


def _known(model: Model, tensor: Tensor) -> StoredWeight:
    """The stored tensor of a weight. ValueError: it is computed."""
    stored = stored_weight(model, tensor)
    if stored is None:
        raise ValueError(f"{tensor.name} is not a weight")
    return stored


# ---- layouts ---------------------------------------------------------------------------------------------


def _from_layout(op: LinearOp, stored: np.ndarray) -> np.ndarray:
    """The matrix (out, in / groups * prod(kernel)) of a stored weight."""
    match op.node.op:
        case "Conv":
            return stored.reshape(op.out_features, op.columns)
        case "ConvTranspose":
            return _swap_groups(stored, op.groups).reshape(op.out_features, op.columns)
        case "Gemm":
            alpha = float(op.node.attrs.get("alpha", 1.0))
            return alpha * (stored if int(op.node.attrs.get("transB", 0)) else stored.T)
        case _:
            return stored.T


def to_layout(op: LinearOp, weight: np.ndarray) -> np.ndarray:
    """A matrix (out, in / groups * prod(kernel)) as the operator stores it (see the module's table)."""
    match op.node.op:
        case "Conv":
            return weight.reshape(op.out_features, -1, *op.kernel)
        case "ConvTranspose":
            return _swap_groups(weight.reshape(op.out_features, -1, *op.kernel), op.groups)
        case "Gemm" if int(op.node.attrs.get("transB", 0)):
            return weight
        case _:
            return weight.T


def _swap_groups(stored: np.ndarray, groups: int) -> np.ndarray:
    """(g*a, b, *k) -> (g*b, a, *k): exchanges the two channel axes inside each group; its own inverse."""
    a, b, kernel = stored.shape[0] // groups, stored.shape[1], stored.shape[2:]
    return stored.reshape(groups, a, b, *kernel).swapaxes(1, 2).reshape(groups * b, a, *kernel)
