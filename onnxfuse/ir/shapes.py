"""The type and shape of a tensor as far as they are known, and the ways to combine two such records."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorShapeProto, ValueInfoProto, helper

from onnxfuse.ir.external_data import numpy_dtype

AxisSize = int | str | None
"""The size of an axis: a number, the name of a dynamic dimension, or None where it is unknown."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, type and shape, as far as they are known.

    `shape` has sizes, names of dynamic dimensions, and None for what is unknown; None as a whole says that
    not even the rank is known. `dtype` None: the type is unknown, or not that of a dense tensor.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[AxisSize, ...] | None

    @property
    def complete(self) -> bool:
        """Whether nothing is unknown (a named dynamic dimension is known)."""
        return self.dtype is not None and self.shape is not None and None not in self.shape


Shapes = Mapping[str, TensorInfo]
"""Types and shapes of tensors, by name."""


def info_of(value: ValueInfoProto) -> TensorInfo:
    """The record of a declared value; "" and "?" and negative sizes count as unknown."""
    if value.type.WhichOneof("value") != "tensor_type":
        return TensorInfo(value.name, None, None)
    tensor = value.type.tensor_type
    shape = tuple(map(_dim, tensor.shape.dim)) if tensor.HasField("shape") else None
    return TensorInfo(value.name, numpy_dtype(tensor.elem_type), shape)


def _dim(dim: TensorShapeProto.Dimension) -> AxisSize:
    if dim.WhichOneof("value") == "dim_value":
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param if isinstance(dim.dim_param, str) and dim.dim_param not in ("", "?") else None


def value_info(info: TensorInfo) -> ValueInfoProto:
    """The declaration of a tensor; unknown dimensions stay open."""
    if info.dtype is None:
        return ValueInfoProto(name=info.name)
    return helper.make_tensor_value_info(info.name, helper.np_dtype_to_tensor_dtype(info.dtype), info.shape)


def merge(first: TensorInfo, second: TensorInfo | None) -> TensorInfo:
    """Both records in one. Where they contradict, the first wins, except that a size beats a name."""
    if second is None:
        return first
    dtype = first.dtype if first.dtype is not None else second.dtype
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return TensorInfo(first.name, dtype, first.shape if first.shape is not None else second.shape)
    pairs = zip(first.shape, second.shape, strict=True)
    return TensorInfo(first.name, dtype, tuple(_more_precise(a, b) for a, b in pairs))


def _more_precise(first: AxisSize, second: AxisSize) -> AxisSize:
    if first is None or (isinstance(first, str) and isinstance(second, int)):
        return second
    return first


def fill(info: TensorInfo, run: TensorInfo | None) -> TensorInfo:
    """`info` with what it leaves unknown taken from a run; named dimensions keep their names. Where the two
    contradict each other, the run is right."""
    if run is None:
        return info
    if info.shape is None or contradicts(info, run):
        return run
    if info.complete or run.shape is None:
        return info
    shape = tuple(r if d is None else d for d, r in zip(info.shape, run.shape, strict=True))
    return TensorInfo(info.name, run.dtype, shape)


def contradicts(first: TensorInfo, second: TensorInfo | None) -> bool:
    """Whether two records can't both be true: their ranks differ, or a size that both know."""
    if second is None or first.shape is None or second.shape is None:
        return False
    if len(first.shape) != len(second.shape):
        return True
    pairs = zip(first.shape, second.shape, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def agrees(declared: TensorInfo, inferred: TensorInfo | None) -> bool:
    """Whether inference knows the tensor and says nothing else of it than was declared."""
    if inferred is None or inferred.dtype is None or inferred.shape is None:
        return False
    if declared.dtype not in (None, inferred.dtype):
        return False
    if declared.shape is None:
        return True
    if len(declared.shape) != len(inferred.shape):
        return False
    pairs = zip(declared.shape, inferred.shape, strict=True)
    return all(a == b or not isinstance(a, int) for a, b in pairs)  # an edit may have made a fixed size open
