"""`onnxfuse passes`."""

from __future__ import annotations

from onnxfuse.cli.options import JsonOption
from onnxfuse.cli.output import show


def passes(json: JsonOption = False) -> int:
    """List the passes and their options.

    A pass of your own is a subclass of onnxfuse.Pass, named in the entry-point group onnxfuse.passes. What
    else it needs is in onnxfuse as well: PassOptions, PassResult, Contract, Context, Model, Change, Skip,
    Prediction.

    \b
    Example:
      onnxfuse passes --json
    """
    from onnxfuse.pipeline import catalog
    from onnxfuse.report.passes_view import passes_view
    from onnxfuse.results import json_text

    found = catalog.passes()
    if json:
        print(json_text({"passes": found}, "passes"))
    else:
        show(passes_view(found))
    return 0
