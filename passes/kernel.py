"""kernel: larger convolution kernels, without a change of the function (EXACT).

Kernel size morphing (Wei et al., 2016): a kernel gets a border of zeros, and the pads grow by as much, times
the dilation. Every output is the same sum plus products with zero, at the same places, for convolutions and
transposed ones, any stride, and a border that is wider at the end by one where the sizes differ by an odd
number. The new taps train from the first step on: their gradient does not depend on their being zero.

A kernel that several convolutions share grows once, and the pads of all of them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from onnxfuse.findings import Change
from onnxfuse.growth.kernels import enlarge, find_kernels, kernel_obstacle
from onnxfuse.ir.model import Model
from onnxfuse.pipeline import choosing
from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult

NAME = "kernel"


class KernelOptions(PassOptions):
    """Options of `kernel`."""

    sites: dict[str, Annotated[int, Field(gt=1)]] = Field(
        {"all": 5},
        min_length=1,
        description="which convolutions, by name or pattern (all: all), and the size that their kernels are "
        "to have along every axis",
    )


class Kernel(Pass):
    """A border of zeros around each chosen kernel."""

    name = NAME
    contract = Contract.EXACT
    grows = True
    summary = "makes convolution kernels larger by taps that change nothing yet"
    Options = KernelOptions
    options: KernelOptions
    example: ClassVar[str] = "kernel:sites={conv1: 5}"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for a site that isn't there, NotApplicableError for one that was named and can't
        get such a kernel."""
        known = find_kernels(model)
        shapes = model.shapes()
        answers = choosing.Answers()
        asked = choosing.choose(self.options.sites, known, "convolution")
        for weight, (words, size) in asked.items():
            names = tuple(known[weight])
            reason = kernel_obstacle(model, weight, size, shapes)
            if reason is None:
                answers.done(words, Change(names, enlarge(model, weight, size, shapes)))
            else:
                answers.refuse(words, names, reason)
        answers.check("given a larger kernel")
        return answers.result(model, "enlarge")
