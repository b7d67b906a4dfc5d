"""The PyTorch round trip: import a model, retrain it, write the weights back to the same graph.

Needs the extra `torch`: `pip install 'onnxfuse[torch]'`.
"""

from onnxfuse.pytorch.importer import operators, to_torch
from onnxfuse.pytorch.rules import register
from onnxfuse.pytorch.weights import Weight, is_trainable
from onnxfuse.pytorch.writeback import from_torch

__all__ = ["Weight", "from_torch", "is_trainable", "operators", "register", "to_torch"]
