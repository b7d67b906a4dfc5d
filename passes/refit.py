"""Re-solve the linear operators of a rewritten graph against the original (APPROXIMATE).

Any approximate rewrite leaves the layers behind it with inputs they were not trained for. Each is solved
again, from the inputs it now gets to the outputs the original has, shrunk towards the weights it has; see
`onnxfuse.walk`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from onnxfuse.graph import Model
from onnxfuse.pass_manager import Context, Contract, Pass, PassOptions, PassResult
from onnxfuse.walk import check_mask, refit_change, refit_sites, walk


class RefitOptions(PassOptions):
    """Options of `refit`."""

    mask: str | None = Field(
        None, description="graph input that is 0 where a token is padding; those rows are left out"
    )


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
        feed = next(iter(context.calibration.fit)).feed
        sites, skipped = refit_sites(context.original, model, mask=self.options.mask, feed=feed)
        solved = walk(
            context.original,
            model,
            sites,
            context.calibration,
            context.runtime,
            seed=context.seed,
            progress=context.progress,
        )
        notes = [] if sites or skipped else ["the model computes what the original does: nothing to refit"]
        moved = [item for item in solved if item.ridge is not None]
        return PassResult(
            model,
            changes=[refit_change(item) for item in moved],
            skipped=skipped,
            predictions=[item.prediction() for item in moved],
            notes=notes,
        )
