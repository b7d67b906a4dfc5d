"""ONNX Runtime itself, imported and kept silent: every other module has `ort` from here.

Some builds print while they are imported, and again whenever a device or a model displeases them. What is
printed is kept off the screen; errors arrive as exceptions all the same.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def captured_output() -> Iterator[list[str]]:
    """Keep what C++ and Python code prints off the screen; the list gets the text when the block ends."""
    text: list[str] = []
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile())
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed or absent stream
                stream.flush()
                saved = os.dup(descriptor)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, descriptor)
                os.dup2(spool.fileno(), descriptor)
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            yield text
        finally:
            spool.seek(0)
            text.append(spool.read().decode(errors="replace") + printed.getvalue())


with captured_output():  # some builds log a failed device discovery while they are imported
    import onnxruntime as ort

SILENT, TALKING = 4, 3  # ORT's severities "fatal" and "error"; errors arrive as exceptions all the same
ort.set_default_logger_severity(SILENT)
