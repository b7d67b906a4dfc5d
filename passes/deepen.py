"""deepen: more layers or residual blocks, without a change of the function (EXACT).

`r2r`, at an operator with weights: a residual branch of operators like it behind its activation psi,

    x -> x + [V, -V] psi([U; U] x)                       (R2DeeperR, equations (19) to (27))

U and V free, the hidden width and the number of layers to choose. The branch ends in a linear operator: with
a ReLU behind that, its gradient would be zero at once and for ever. At a sum v = u + F(u): a copy of the
whole block whose last operator is zero (`onnxfuse.analysis.residual_blocks`), be F two convolutions, an
inverted residual or half a transformer layer.

`net2net`, at an operator with weights: x -> psi(I x), which is x where x = psi(.) and psi is idempotent: ReLU
and Clip are, sigmoid, tanh and the smooth ones are not, and are refused.

New operators have the kernel and the groups of the one they stand behind, stride 1, and its weights'
standard deviation. An operator whose weights are shared gets layers behind every node that uses them, which
again share theirs. Layers only go where an operator with weights still follows.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from onnxfuse.analysis.layers import Layer
from onnxfuse.findings import Change
from onnxfuse.growth.block_copies import copy_block
from onnxfuse.growth.deepening import add_branches, add_identities, attach, detach, unused_prefix
from onnxfuse.growth.depth import DeepeningSite, DepthScheme, find_sites
from onnxfuse.ir.model import Model
from onnxfuse.pipeline import choosing
from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult

NAME = "deepen"


class DeepenOptions(PassOptions):
    """Options of `deepen`."""

    sites: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {"all": 1},
        min_length=1,
        description="behind which operators with weights, or residual sums, by name or pattern, and how many "
        "times; all: every residual sum, or in a network that has none every operator",
    )
    scheme: DepthScheme = Field("r2r", description="residual branches that are zero; identity layers")
    inner: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        [1.0],
        min_length=1,
        description="r2r at an operator: widths between the layers of a branch, in channels of the operator; "
        "the last is made even",
    )
    blocks: int = Field(
        1,
        ge=1,
        description="r2r at a sum: so many residual blocks in a row, the last that of the sum, are copied "
        "together: 2 for attention and MLP of a transformer layer",
    )


class Deepen(Pass):
    """A residual branch, an identity layer or a copy of a block at each chosen site."""

    name = NAME
    contract = Contract.EXACT
    grows = True
    summary = "adds layers or residual blocks that change nothing yet"
    Options = DeepenOptions
    options: DeepenOptions
    example: ClassVar[str] = "deepen:sites={conv1: 1},scheme=net2net"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for a site that isn't there, NotApplicableError for one that was named and can't
        be deepened."""
        known = find_sites(model, self.options.scheme, self.options.blocks)
        sums = [site for site in known if site.sum and site.obstacle is None]
        asked = choosing.choose(
            self.options.sites,
            {site: site.names for site in known},
            "operator or residual sum",
            everything=sums or [site for site in known if not site.sum],
        )
        answers = choosing.Answers()
        random = np.random.default_rng(context.seed)
        # Sums first: what is put behind a layer inside a block would otherwise belong to the block or not.
        for site in sorted(asked, key=lambda site: not site.sum):
            words, count = asked[site]
            if site.obstacle is None:
                answers.done(words, Change(site.names, self._deepen(model, site, count, random)))
            else:
                answers.refuse(words, site.names, site.obstacle)
        answers.check("deepened")
        return answers.result(model, NAME)

    def _deepen(self, model: Model, site: DeepeningSite, count: int, random: np.random.Generator) -> str:
        """Deepen the network at a site; returns what was done, in words."""
        times = "" if count == 1 else f", {count} times"
        if isinstance(site.place, Layer):
            if self.options.scheme == "net2net":
                add_identities(model, site.place, count, NAME)
                return f"identity layer behind it{times}"
            add_branches(model, site.place, self.options.inner, count, random, NAME)
            return f"zero branch of {len(self.options.inner) + 1} operators behind it{times}"
        assert site.place is not None
        end = site.place[-1].add.outputs[0]
        x = detach(model, end)
        for _ in range(count):
            prefix = unused_prefix(model, f"{site.names[0]}.copy")
            for block in site.place:
                x = copy_block(model, block, x, prefix, NAME)
        attach(model, x, end)
        return f"copy of {'the block' if len(site.place) == 1 else f'{len(site.place)} blocks'}{times}"
