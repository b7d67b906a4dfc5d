"""The command line, a module a command: parse, call `onnxfuse.commands`, print, exit code.

`main` is the program; `app` has its commands and errors, `options` what several commands share, `output` what
goes to which stream. ONNX and ONNX Runtime are imported by the commands that need them, so that help comes at
once.

The highest floor: only `python -m onnxfuse` imports it.
"""

from onnxfuse.cli.app import main

__all__ = ["main"]
