"""The command line, a module a command: parse, call `onnxfuse.commands`, print, exit code.

Above everything else; nothing imports it. ONNX and ONNX Runtime are imported by the commands that need them,
so that help comes at once.
"""

from onnxfuse.cli.app import main

__all__ = ["main"]
