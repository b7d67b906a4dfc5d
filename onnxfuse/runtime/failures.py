"""Exceptions of ONNX Runtime as errors of onnxfuse.

They share no base class, span several lines and name places in its C++ sources; users get the one line that
is about their model.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from onnxfuse.errors import NotApplicableError


@contextlib.contextmanager
def failing_clearly() -> Iterator[None]:
    """Turn whatever ONNX Runtime raises in the block into a NotApplicableError of one line.

    Raises:
        NotApplicableError: the block raised anything.
    """
    try:
        yield
    except Exception as error:  # ORT's exceptions share no base class
        raise NotApplicableError(f"the model fails in ONNX Runtime: {one_line(error)}") from error


_NOISE = (
    (r"\[ONNXRuntimeError\] : \d+ : \w+ : ", ""),
    (r"\S+\.(?:h|cc|cpp|cuh?):\d+ .*?\)(?: const)? ", ""),  # a C++ source line and the function's signature
    (
        r"Non-zero status code returned while running (\w+) node\. Name:('[^']*') Status Message: ",
        r"\1 node \2: ",
    ),
    (r"(\w+) node '': ", r"a nameless \1 node: "),
    (r"\s+", " "),
)


def one_line(error: Exception) -> str:
    """The message of an exception without ONNX Runtime's error codes and C++ locations."""
    text = str(error)
    for pattern, replacement in _NOISE:
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(".")
