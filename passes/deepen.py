"""deepen: more layers or residual blocks, without a change of the function (EXACT).

`r2r`, at an operator with weights: a residual branch of operators like it behind its activation psi,

    x -> x + [V, -V] psi([U; U] x)                       (R2DeeperR, equations (19) to (27))

U and V free, the hidden width and the number of layers to choose. The branch ends in a linear operator: with
a ReLU behind that, its gradient would be zero at once and for ever. At a sum v = u + F(u): a copy of the
whole block whose last operator is zero (`onnxfuse.blocks`), be F two convolutions, an inverted residual or
half a transformer layer.

`net2net`, at an operator with weights: x -> psi(I x), which is x where x = psi(.) and psi is idempotent: ReLU
and Clip are, sigmoid, tanh and the smooth ones are not, and are refused.

New operators have the kernel and the groups of the one they stand behind, stride 1, and its weights'
standard deviation. An operator whose weights are shared gets layers behind every node that uses them, which
again share theirs. Layers only go where an operator with weights still follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxfuse import sites
from onnxfuse.blocks import Block, before, copy_block, find_blocks
from onnxfuse.constants import label
from onnxfuse.graph import Model, Node
from onnxfuse.layers import (
    IDEMPOTENT,
    Layer,
    add_branches,
    add_identities,
    attach,
    detach,
    find_layers,
    followed,
    unused_prefix,
)
from onnxfuse.pass_manager import Change, Context, Contract, Pass, PassOptions, PassResult, Skip

NAME = "deepen"
Scheme = Literal["r2r", "net2net"]


class DeepenOptions(PassOptions):
    """Options of `deepen`."""

    sites: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {"all": 1},
        min_length=1,
        description="behind which operators with weights, or residual sums, by name or pattern, and how many "
        "times; all: every residual sum, or in a network that has none every operator",
    )
    scheme: Scheme = Field("r2r", description="residual branches that are zero; identity layers")
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


@dataclass(frozen=True, eq=False)
class Site:
    """Where a network may be deepened: behind a layer, or with a copy of a chain of residual blocks.

    Attributes:
        names: of the operators, or of the sum.
        place: the layer, or the blocks in a row; None where there is an `obstacle`.
        obstacle: why nothing can be added there.
        sum: whether it is a residual sum.
    """

    names: tuple[str, ...]
    place: Layer | Sequence[Block] | None
    obstacle: str | None
    sum: bool


class Deepen(Pass):
    """A residual branch, an identity layer or a copy of a block at each chosen site."""

    name = NAME
    contract = Contract.EXACT
    summary = "adds layers or residual blocks that change nothing yet"
    Options = DeepenOptions
    options: DeepenOptions
    example: ClassVar[str] = "deepen:sites={conv1: 1},scheme=net2net"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for a site that isn't there, NotApplicableError for one that was named and can't
        be deepened."""
        known = find_sites(model, self.options.scheme, self.options.blocks)
        sums = [site for site in known if site.sum and site.obstacle is None]
        asked = sites.choose(
            self.options.sites,
            {site: site.names for site in known},
            "operator or residual sum",
            everything=sums or [site for site in known if not site.sum],
        )
        changes: list[Change] = []
        skipped: list[Skip] = []
        refused: dict[str, list[str]] = {}
        done: list[str] = []
        random = np.random.default_rng(context.seed)
        # Sums first: what is put behind a layer inside a block would otherwise belong to the block or not.
        for site in sorted(asked, key=lambda site: not site.sum):
            words, count = asked[site]
            if site.obstacle is None:
                changes.append(Change(site.names, self._deepen(model, site, count, random)))
                done.append(words)
            else:
                refused.setdefault(words, []).append(site.obstacle)
                skipped.append(Skip(site.names, site.obstacle))
        sites.refuse_named(refused, done, "deepened")
        return PassResult(model, changes, skipped, notes=[] if changes else [sites.idle(NAME, skipped)])

    def _deepen(self, model: Model, site: Site, count: int, random: np.random.Generator) -> str:
        """What was done, in words."""
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


def find_sites(model: Model, scheme: Scheme, blocks: int = 1) -> list[Site]:
    """Every place where layers may be added, and every residual sum, with what stands in the way."""
    leading = followed(model)
    found = []
    for layer in find_layers(model):
        reason = _layer_obstacle(model, layer, scheme)
        if any(end not in leading for end in layer.ends):
            reason = "no operator with weights follows it"
        found.append(Site(layer.names, None if reason else layer, reason, False))
    every = find_blocks(model)
    for node in every:
        chain = _chain(model, every, node, blocks)
        if scheme == "net2net":
            chain = "net2net adds layers, not blocks: name an operator"
        elif node.outputs[0] not in leading:
            chain = "no operator with weights follows it"
        reason, place = (chain, None) if isinstance(chain, str) else (None, chain)
        found.append(Site((label(node),), place, reason, True))
    return found


def _layer_obstacle(model: Model, layer: Layer, scheme: Scheme) -> str | None:
    if layer.ops[0].dtype.kind != "f":
        return f"its weights are {layer.ops[0].dtype}"
    other = next((psi for psi in layer.activations if psi and psi.op not in IDEMPOTENT), None)
    if scheme == "net2net" and other is not None:
        return f"{other.op} applied twice is not {other.op} applied once, as net2net needs; r2r can"
    return None


def _chain(model: Model, every: Mapping[Node, Block | str], node: Node, blocks: int) -> list[Block] | str:
    """The last blocks before a sum and that of the sum, in order, or why they can't be copied."""
    chain: list[Block] = []
    while len(chain) < blocks:
        block = every.get(node)
        if not isinstance(block, Block):
            return block or f"there are only {len(chain)} residual blocks in a row"
        chain.insert(0, block)
        previous = before(model, block)
        if previous is None:
            break
        node = previous
    return chain if len(chain) == blocks else f"there are only {len(chain)} residual blocks in a row"
