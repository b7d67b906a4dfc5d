"""Element types that NumPy lacks (bfloat16, float8), on their way into ONNX Runtime and out of it.

Arrays of these types are those of ml_dtypes, as ONNX's helpers make them. The functions of ONNX Runtime take
and give only what NumPy knows, so they pass as `OrtValue`s: as their bits.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
from onnx import TensorProto, helper

from onnxfuse.runtime.onnx_runtime import ort

_NUMBERS = [
    number for name, number in TensorProto.DataType.items() if name.startswith(("BFLOAT16", "FLOAT8"))
]
NARROW: dict[np.dtype, int] = {
    np.dtype(helper.tensor_dtype_to_np_dtype(number)): number for number in _NUMBERS
}
"""ONNX's numbers of the element types that pass as bits."""

_BY_NUMBER = {number: dtype for dtype, number in NARROW.items()}
_SPELLED = {
    "tensor(" + name.lower() + ")" for name, number in TensorProto.DataType.items() if number in _NUMBERS
}


def stands_for(given: np.dtype, wanted: np.dtype) -> bool:
    """Whether arrays of one type may be fed to inputs of another: float32 is rounded to a narrow type;
    unsigned integers of its size are its bits, and so are the raw bytes that `np.save` makes of such arrays.
    """
    bits = (np.dtype(f"u{wanted.itemsize}"), np.dtype(f"V{wanted.itemsize}"))
    return wanted in NARROW and (given == np.float32 or given in bits)


def as_fed(array: np.ndarray, wanted: np.dtype | None) -> np.ndarray:
    """The array as an input of that type takes it, by the rules of `stands_for`."""
    if wanted is None or array.dtype == wanted or not stands_for(array.dtype, wanted):
        return array
    return array.astype(wanted) if array.dtype == np.float32 else array.view(wanted)


def is_narrow(type_name: str) -> bool:
    """Whether ONNX Runtime's name of a type ("tensor(bfloat16)") is that of a narrow one."""
    return type_name in _SPELLED


def ort_value(array: np.ndarray, device: str = "cpu", device_id: int = 0) -> ort.OrtValue:
    """The array, of any type, as a value of ONNX Runtime's; on the CPU it lives as long as the array does."""
    number = NARROW.get(array.dtype)
    if number is None:
        return ort.OrtValue.ortvalue_from_numpy(array, device, device_id)
    bits = np.ascontiguousarray(array).view(f"u{array.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, number)


def array_of(value: ort.OrtValue) -> np.ndarray:
    """A value as an array in the memory of the CPU, of which it may be a view."""
    dtype = _BY_NUMBER.get(value.element_type()) if value.is_tensor() else None
    if dtype is None:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    size = math.prod(shape) * dtype.itemsize
    found = np.empty(shape, dtype)
    if size:
        ctypes.memmove(found.ctypes.data, value.data_ptr(), size)
    return found
