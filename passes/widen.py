"""widen: more channels, neurons or heads, without a change of the function (EXACT).

The schemes, and why they are exact, are in `onnxfuse.growth.widening`; which channels must grow together is
what `onnxfuse.channels` finds. So a residual stage is widened as a whole, a depthwise convolution with the
one in front, heads as heads, and weights that several nodes share are widened once. With `skip=fold` residual
sums end what grows: there the twins of r2r are folded back (`onnxfuse.growth.skips`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from onnxfuse.channels.groups import Group, find_groups
from onnxfuse.data.rows import few_rows
from onnxfuse.findings import Change
from onnxfuse.growth import skips
from onnxfuse.growth.widening import New, additions, widen, width_obstacle
from onnxfuse.ir.model import Feed, Model
from onnxfuse.pipeline import choosing
from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult

NAME = "widen"
_ROWS = 2  # of one row, a batch that may grow can't be told from an axis of size 1


class WidenOptions(PassOptions):
    """Options of `widen`."""

    sites: dict[str, Annotated[float, Field(gt=1, allow_inf_nan=False)]] = Field(
        {"all": 1.5},
        min_length=1,
        description="which channels, by name or pattern of an operator that computes them (all: all), and "
        "how many times as many there are to be",
    )
    scheme: Literal["r2r", "net2net", "netmorph"] = Field(
        "r2r", description="twins that cancel; copies that share; channels that nothing reads yet"
    )
    noise: float = Field(
        0.1,
        ge=0,
        description="net2net: how far the shares of copies differ, in standard deviations of the weights; 0 "
        "leaves the copies alike for ever",
    )
    skip: Literal["group", "fold"] = Field(
        "group",
        description="what is added by a residual sum grows together; or, of r2r, what the named operators "
        "compute grows alone, and the sum takes x + (x_L - x_R) of it",
    )

    @model_validator(mode="after")
    def _twins_fold(self) -> WidenOptions:
        if self.skip == "fold" and self.scheme != "r2r":
            raise ValueError(f"skip=fold takes the twins of r2r, not {self.scheme}")
        return self


class Widen(Pass):
    """More channels in each chosen group."""

    name = NAME
    contract = Contract.EXACT
    grows = True
    summary = "adds channels, neurons or heads that change nothing yet"
    Options = WidenOptions
    options: WidenOptions
    example: ClassVar[str] = "widen:sites={conv1: 2},scheme=r2r"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for a site that isn't there, NotApplicableError for one that was named and can't
        be widened."""
        feed = few_rows(model, context.calibration.fit, _ROWS, context.runtime)
        groups = find_groups(model, feed, context.runtime)
        if self.options.skip == "fold":
            return self._alone(model, feed, skips.producers(groups), context)
        asked = choosing.choose(self.options.sites, {g: _names(g) for g in groups}, "channel group")
        plan: dict[Group, New] = {}
        answers = choosing.Answers()
        for group, (words, ratio) in asked.items():
            new = additions(group, self.options.scheme, ratio)
            reason = width_obstacle(group, self.options.scheme, new)
            if reason is None:
                plan[group] = new
                answers.done(words, _change(group, sum(new.values())))
            else:
                answers.refuse(words, (group.name,), reason)
        answers.check("widened")
        widen(model, plan, self.options.scheme, noise=self.options.noise, seed=context.seed, by=NAME)
        return answers.result(model, NAME)

    def _alone(self, model: Model, feed: Feed, operators: list[str], context: Context) -> PassResult:
        """One operator after the other, since each changes what the next one is added to."""
        asked = choosing.choose(self.options.sites, {name: [name] for name in operators}, "operator")
        answers = choosing.Answers()
        grown: set[str] = set()
        for number, (name, (words, ratio)) in enumerate(asked.items()):
            if name in grown:
                answers.done(words)
                continue
            plan = skips.plan(model, feed, context.runtime, name, ratio)
            skips.carry_out(model, plan, seed=(context.seed, number), by=NAME)
            for group, new in plan.wanted.items():
                answers.done(words, _change(group, sum(new.values())))
                grown.update(skips.producers(group))
            for reason in plan.refused.values():
                answers.refuse(words, (name,), reason)
        answers.check("widened")
        return answers.result(model, NAME)


def _names(group: Group) -> list[str]:
    """The names of a group: its own, then those of all operators that compute its channels."""
    return [group.name, *(node for t in group.touches if "producer" in t.roles for node in t.nodes)]


def _change(group: Group, new: int) -> Change:
    size = group.size + new
    detail = {"before": group.size, "after": size}
    return Change((group.name,), f"{group.size} channels become {size}", detail)
