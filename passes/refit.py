"""Re-solve the linear operators of a rewritten graph against the original (APPROXIMATE).

Any approximate rewrite leaves the layers behind it with inputs they were not trained for. Each is solved
again, from the inputs it now gets to the outputs the original has, shrunk towards the weights it has; see
`onnxfuse.fitting.walk`.
"""

from __future__ import annotations

from typing import ClassVar

from onnxfuse.fitting.rewriting import Mask, settled, walked
from onnxfuse.fitting.sites import check_mask
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult


class RefitOptions(PassOptions):
    """Options of `refit`."""

    mask: Mask = None


class Refit(Pass):
    """Every linear operator behind a change, in topological order."""

    name = "refit"
    contract = Contract.APPROXIMATE
    summary = "re-solve linear operators behind earlier rewrites against the original network"
    Options = RefitOptions
    options: RefitOptions
    example: ClassVar[str] = "refit:mask=attention_mask"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, NotApplicableError for activations that are not finite."""
        check_mask(model, self.options.mask)
        solved, skipped = walked(context.original, model, context, mask=self.options.mask)
        result = settled(model, [], solved, skipped)
        if not solved and not skipped:
            result.notes.append("the model computes what the original does: nothing to refit")
        return result
