"""A denoising autoencoder in the place of a linear operator (APPROXIMATE).

An operator y = W x + b becomes two through a narrower code, z = E x and y' = D z + d, or z = ReLU(E x + c):
of a convolution the first keeps kernel, strides and pads, and the second is 1x1. It is one of the methods
that O'Neill et al. 2021 ("Compressing Deep Neural Networks via Layer Fusion") compare theirs with.

1. **Train** each pair, from input to output, with noise on its inputs: x as the network computes it whose
   earlier operators are replaced already, against what the original computes behind its activation, which is
   the paper's order and error ("student rollout"; `onnxfuse.pytorch.training.autoencoder`). The activation is
   all that follows element by element, a GELU of five operators as well (`_behind`); where y is a branch of a
   sum, the pair makes up for the other branch, too.
2. **Walk** (`onnxfuse.fitting.walk`): the pairs are measured, and all other linear operators behind the first
   are solved again. With `refit=false` they stay as they are.

A linear code is the default: y is linear in x, and the best linear code on the sampled rows is where training
starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from onnxfuse.errors import InputError
from onnxfuse.findings import Change, Skip
from onnxfuse.fitting.paired_rows import paired_rows
from onnxfuse.fitting.rewriting import (
    Mask,
    finished,
    first_feed,
    known_shapes,
    nothing,
    settled,
    unmeasurable,
    walked,
)
from onnxfuse.fitting.search import SearchResult
from onnxfuse.fitting.sites import MOST_UNKNOWNS, RefitSite, check_mask, refit_sites, tensors_read
from onnxfuse.fitting.walk import Solved
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Variable
from onnxfuse.numerics.affine import Affine
from onnxfuse.ops.linear import LINEAR_OPERATORS, LinearOp, is_main_domain, linear_op
from onnxfuse.ops.linear_building import add_linear
from onnxfuse.ops.table import OPS, Kind
from onnxfuse.pipeline import choosing
from onnxfuse.pipeline.base import Context, Contract, Pass, PassResult
from onnxfuse.pipeline.goals import Goals, Share
from onnxfuse.runtime.observed_shapes import shapes_on

if TYPE_CHECKING:
    from onnxfuse.pytorch.training.autoencoder import Autoencoder

NAME = "autoencode"

_ELEMENTWISE = OPS.of_kind(Kind.ACTIVATION).names | {"Add", "Sub", "Mul", "Div", "Erf", "Pow", "Identity"}

SHARE = 0.5
"""Share of the parameters that is left, unasked."""


class AutoencodeOptions(Goals):
    """Options of `autoencode`."""

    goals: ClassVar = {"params": None, "rank": None}

    only: str = Field("*", description="name or pattern of the linear operators to replace")
    params: Share | None = Field(
        None, description="share of each operator's parameters that may be left; default: 0.5"
    )
    rank: PositiveInt | None = Field(None, description="numbers in every code, in place of params")
    activation: Literal["none", "relu"] = Field("none", description="of the code")
    epochs: int = Field(10, ge=0, description="of training; the best is kept, the start included")
    noise: NonNegativeFloat = Field(
        0.1, description="standard deviation of the noise on an input in training, as a share of its own"
    )
    refit: bool = Field(True, description="solve again the linear operators behind that are not replaced")
    mask: Mask = None


@dataclass(frozen=True)
class _Plan:
    """An operator and the size of its code."""

    op: LinearOp
    rank: int
    relu: bool

    @property
    def before(self) -> int:
        """Parameters of the operator."""
        return self.op.out_features * (self.op.columns + self.op.has_bias)

    @property
    def after(self) -> int:
        """Parameters of the two in its place."""
        return self.rank * (self.op.columns + self.op.out_features + self.relu) + self.op.out_features


class Autoencode(Pass):
    """Two thin operators in the place of a thick one."""

    name = NAME
    contract = Contract.APPROXIMATE
    summary = "put a denoising autoencoder, two operators and a narrow code between, in a layer's place"
    Options = AutoencodeOptions
    options: AutoencodeOptions
    example: ClassVar[str] = "autoencode:params=0.5"

    def run(self, model: Model, context: Context) -> PassResult:
        """Raises InputError for bad samples, a name that nothing has, or where there is no PyTorch;
        NotApplicableError for activations that are not finite or a named operator that can't be replaced."""
        training = _training()
        check_mask(model, self.options.mask)
        plans, skipped = self._plans(model, context)
        if not plans:
            return nothing(model, skipped, choosing.idle("replace", skipped))
        made, trained, pairs = self._train(training, model, plans, context)
        decoders = [decoder for _, decoder in pairs]
        solved, left = walked(
            model, made, context, mask=self.options.mask, refit=self.options.refit, kept=decoders
        )
        encoders = {(encoder.name,) for encoder, _ in pairs}
        left = [skip for skip in left if skip.nodes not in encoders]
        by_node = {item.site.op.node: item for item in solved}
        changes = [
            _change(plan, own, by_node[decoder])
            for plan, own, decoder in zip(plans, trained, decoders, strict=True)
        ]
        share = sum(plan.after for plan in plans) / sum(plan.before for plan in plans)
        note = f"{share:.3g} of the parameters of {len(plans)} operators are left"
        return finished(
            model, SearchResult(settled(made, changes, solved, left, own=decoders), [note]), skipped
        )

    # Which operators, and how narrow

    def _plans(self, model: Model, context: Context) -> tuple[list[_Plan], list[Skip]]:
        """The operators that are replaced and by what, and why others are not."""
        shapes = shapes_on(model, first_feed(context), context.runtime)
        known = {node: (node.site_name,) for node in model.nodes if node.op in LINEAR_OPERATORS}
        asked = choosing.choose({self.options.only: None}, known, "linear operator")
        plans: list[_Plan] = []
        answers = choosing.Answers()
        for node in (node for node in known if node in asked):
            op = linear_op(model, node, shapes)
            plan = op if isinstance(op, str) else self._plan(op)
            if isinstance(plan, str):
                answers.refuse(self.options.only, known[node], plan)
            else:
                plans.append(plan)
        trial = model.copy()
        nodes = {_replace(trial, plan, *_nothing(plan))[1]: plan for plan in plans}
        foreign = unmeasurable(model, trial, nodes, context)
        for node, reason in foreign.items():
            answers.refuse(self.options.only, (nodes[node].op.name,), reason)
        plans = [plan for node, plan in nodes.items() if node not in foreign]
        if plans:
            answers.done(self.options.only)
        answers.check("replaced")
        return plans, answers.skipped

    def _plan(self, op: LinearOp) -> _Plan | str:
        """The two operators that may replace one, or why none may."""
        if op.shared:
            return "its weight has other users"
        if op.groups > 1:
            return "a grouped convolution"
        if op.pads is None:
            return "its pads depend on an input size that isn't static"
        if op.columns > MOST_UNKNOWNS:
            return f"{op.columns} unknowns for each output are too many to solve for"
        relu = self.options.activation == "relu"
        full = min(op.columns, op.out_features)
        if self.options.rank is not None:
            if self.options.rank > full:
                return f"a code of {self.options.rank} numbers is wider than the rank of its weight, {full}"
            return _Plan(op, self.options.rank, relu)
        share = SHARE if self.options.params is None else self.options.params
        one, none = _Plan(op, 1, relu), _Plan(op, 0, relu)
        rank = math.floor((share * one.before - none.after) / (one.after - none.after))
        if rank < 1:
            return f"no code is so narrow that {share:g} of its {one.before} parameters are left"
        return _Plan(op, rank, relu)

    # Training

    def _train(
        self, training: ModuleType, model: Model, plans: Sequence[_Plan], context: Context
    ) -> tuple[Model, list[Autoencoder], list[tuple[Node, Node]]]:
        """The model with all pairs, each trained in the network that those before it are in; the pairs."""
        advance = context.progress.task("training codes", total=len(plans))
        sites = self._sites(model, plans, context)
        made, found, pairs = model.copy(), [], []
        for plan in plans:
            site = sites[plan.op.y]
            fitted, held = paired_rows(context.original, made, plan.op, site, context)
            own = training.fit(
                plan.op.weight,
                fitted,
                held if len(held) else fitted,
                rank=plan.rank,
                relu=plan.relu,
                through=training.through(model, behind(model, site.tensor)),
                epochs=self.options.epochs,
                noise=self.options.noise,
                seed=context.seed,
                key=plan.op.y,
            )
            context.journal("autoencode", operator=plan.op.name, start=own.start, error=own.error)
            found.append(own)
            pairs.append(_replace(made, plan, own.encode, own.decode))
            advance()
        return made, found, pairs

    def _sites(self, model: Model, plans: Sequence[_Plan], context: Context) -> dict[str, RefitSite]:
        """What the pairs are held against, by their output."""
        trial = model.copy()
        nodes = [_replace(trial, plan, *_nothing(plan))[1] for plan in plans]
        sites, _ = refit_sites(
            context.original,
            trial,
            (),
            self.options.mask,
            known_shapes(context),
            before=model,
            fixed=nodes,
        )
        return {site.op.y: site for site in sites}


def _training() -> ModuleType:
    """The module that trains. It needs torch, which is an extra.

    Raises:
        InputError: torch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("autoencode needs PyTorch: pip install 'onnxfuse[torch]'") from error
    from onnxfuse.pytorch.training import autoencoder

    return autoencoder


def behind(model: Model, tensor: str) -> tuple[str, str] | None:
    """The tensor and what becomes of it element by element, where nothing else is made of it; else None.

    Args:
        model: whose nodes read the tensor.
        tensor: an operator's output, or the sum that it goes into.
    """
    inside, ends = {tensor}, {info.name for info in model.outputs}
    for node in model.nodes:
        read = {own.name for own in tensors_read(model, node)}
        if not read & inside:
            continue
        if (
            node.op in _ELEMENTWISE
            and is_main_domain(node)
            and all(_number(model, name) for name in read - inside)
        ):
            inside.add(node.outputs[0].name)
        else:
            ends |= read
    found = inside & ends
    return (tensor, found.pop()) if len(found) == 1 and tensor not in found else None


def _number(model: Model, name: str) -> bool:
    """Whether a tensor is a single number that is stored."""
    value = model.weight(model.tensor(name))
    return value is not None and value.size == 1


def _change(plan: _Plan, found: Autoencoder, solved: Solved) -> Change:
    """The report's line for one operator."""
    names = tuple(node.site_name for node in plan.op.nodes)
    return Change(
        names,
        f"through a code of {plan.rank} numbers, relative error {solved.relative:.3g}",
        {
            "tensor": solved.site.tensor,
            "rank": plan.rank,
            "parameters": plan.after,
            "parameters_before": plan.before,
            "relative_error": solved.relative,
            "relative_error_alone": found.error,
            "relative_error_untrained": found.start,
            "ridge": solved.ridge,
        },
    )


def _nothing(plan: _Plan) -> tuple[Affine, Affine]:
    """Encoder and decoder that are zero."""
    op, rank = plan.op, plan.rank
    first = Affine(np.zeros((rank, op.columns)), np.zeros(rank))
    return first, Affine(np.zeros((op.out_features, rank)), np.zeros(op.out_features))


def _replace(model: Model, plan: _Plan, encode: Affine, decode: Affine) -> tuple[Node, Node]:
    """Put two operators in one's place; returns the nodes that hold their weights.

    Args:
        model: may be a copy of the one the operator is in: nodes are found by what they compute.
        plan: the operator.
        encode: weights of the first, a bias only in front of a ReLU.
        decode: weights of the second; of a convolution it is 1x1.
    """
    op, kind = plan.op, plan.op.node.op
    made = {node.outputs[0].name for node in op.nodes}
    old = [node for node in model.nodes if node.outputs and node.outputs[0].name in made]
    own: dict[str, Any] = {"by": NAME, "replaces": [node.site_name for node in old]}
    x, y = model.tensor(op.x), model.tensor(op.y)
    model.remove(old)
    first, second = f"{op.name}_encode", f"{op.name}_decode"
    ones = [1] * len(op.kernel)
    front: dict[str, Any] = {"transB": 1} if kind == "Gemm" else {}
    behind = dict(front)
    if kind == "Conv":
        front = {"kernel_shape": list(op.kernel)}
        front |= {name: list(getattr(op, name)) for name in ("strides", "dilations", "pads")}
        behind = {"kernel_shape": ones}
    e, c, d, b = (a.astype(op.dtype) for a in (encode.weight, encode.bias, decode.weight, decode.bias))
    z, bias = Variable(model.unique_name(f"{first}d")), c if plan.relu else None
    encoder = add_linear(model, kind, x, e, bias, z, first, kernel=op.kernel, attrs=front, **own)
    if plan.relu:
        z = model.add_node("Relu", [z], [f"{first}d_relu"], name=f"{first}_relu", **own).outputs[0]
    decoder = add_linear(model, kind, z, d, b, y, second, kernel=ones, attrs=behind, **own)
    model.prune()
    return encoder, decoder
