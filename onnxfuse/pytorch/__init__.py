"""The PyTorch round trip: import a model, retrain it, write the weights back to the same graph.

Needs the extra `torch`: `pip install 'onnxfuse[torch]'`.
"""

from onnxfuse.pytorch.bridge.importer import operators, to_torch
from onnxfuse.pytorch.bridge.rules import register
from onnxfuse.pytorch.bridge.weights import Weight, is_trainable
from onnxfuse.pytorch.bridge.writeback import from_torch

__all__ = ["Weight", "from_torch", "is_trainable", "operators", "register", "to_torch"]
