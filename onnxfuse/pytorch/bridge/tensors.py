"""Arrays of NumPy as tensors of torch and back, byte by byte, and their element types."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, helper


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor with a copy of the array's bytes; its type must be one that torch has (`torch_type`)."""
    copy = np.array(array, order="C")
    if copy.dtype.name == "bfloat16":
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def to_array(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """The array of that type with the tensor's bytes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy().view(dtype)


def any_array(tensor: torch.Tensor) -> np.ndarray:
    """The array with the tensor's bytes, of the type that stands for its elements in NumPy."""
    if tensor.dtype == torch.bfloat16:
        return to_array(tensor, np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)))
    return tensor.detach().cpu().numpy()


def torch_type(dtype: np.dtype | None) -> torch.dtype | None:
    """The torch element type; None where torch has none (strings, 4-bit integers) or nothing is known."""
    if dtype is None:
        return None
    if dtype.name == "bfloat16":
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        return None
