"""A denoising autoencoder in the place of a linear operator (APPROXIMATE).

An operator y = W x + b becomes two through a narrower code, z = E x and y' = D z + d, or z = ReLU(E x + c):
of a convolution the first keeps kernel, strides and pads, and the second is 1x1. It is one of the methods
that O'Neill et al. 2021 ("Compressing Deep Neural Networks via Layer Fusion") compare theirs with.

1. **Train** each pair on the operator's own inputs, in the model as it is, with noise on them; see
   `onnxfuse.pytorch.autoencoder`.
2. **Walk** (`onnxfuse.walk`): from the first pair on, the second operators and all linear operators behind
   are solved again, from the inputs that the rewritten network gives them to what the original computes. That
   is the paper's order, where a layer's reconstruction accounts for the errors of those before it. With
   `refit=false` the pairs are only measured.

A linear code is the default: y is linear in x, the best linear code on the sampled rows is where training
starts, and on the networks in `models/` neither an epoch of noise nor a code of ReLUs came out better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from onnxfuse import sites
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.graph import Model, Tensor
from onnxfuse.linear import LINEAR, LinearOp, linear_op
from onnxfuse.moments import gather, output_size, patches, sample_positions
from onnxfuse.pass_manager import Change, Context, Contract, Pass, PassOptions, PassResult, Skip
from onnxfuse.regions import site_name
from onnxfuse.runtime import Feed
from onnxfuse.solve import Affine
from onnxfuse.walk import MOST_COLUMNS, Site, Solved, check_mask, refit_change, refit_sites, walk

if TYPE_CHECKING:
    from onnxfuse.calibration import Batch
    from onnxfuse.pytorch.autoencoder import Autoencoder

NAME = "autoencode"

SHARE = 0.5
"""Share of the parameters that is left, unasked."""

ROWS_PER_COLUMN, LEAST_ROWS = 16, 1 << 13
"""Sampled rows to train on, per unknown of a code's number."""

MEMORY = 1 << 28
"""Bytes of rows that are kept at a time."""


class AutoencodeOptions(PassOptions):
    """Options of `autoencode`."""

    only: str = Field("*", description="name or pattern of the linear operators to replace")
    params: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of each operator's parameters that may be left; default: 0.5"
    )
    rank: PositiveInt | None = Field(None, description="numbers in every code, in place of params")
    activation: Literal["none", "relu"] = Field("none", description="of the code")
    epochs: int = Field(10, ge=0, description="of training; the best is kept, the start included")
    noise: NonNegativeFloat = Field(
        0.1, description="standard deviation of the noise on an input in training, as a share of its own"
    )
    refit: bool = Field(True, description="solve again the second operators, and the linear ones behind")
    mask: str | None = Field(
        None, description="graph input that is 0 where a token is padding; those rows are left out"
    )

    @model_validator(mode="after")
    def _one_size(self) -> AutoencodeOptions:
        if self.params is not None and self.rank is not None:
            raise ValueError("give one of params and rank")
        return self


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
            return PassResult(model, skipped=skipped, notes=[sites.idle("replace", skipped)])
        found = self._train(training, model, plans, context)
        rewritten = model.copy()
        pairs = {
            plan.op.y: _replace(rewritten, plan, own.encode, own.decode)
            for plan, own in zip(plans, found, strict=True)
        }
        places, left = self._sites(model, rewritten, pairs, context)
        solved = walk(
            context.original,
            rewritten,
            places,
            context.calibration,
            context.runtime,
            seed=context.seed,
            progress=context.progress,
        )
        by_output = {item.site.op.y: item for item in solved}
        changes = [_change(plan, own, by_output[plan.op.y]) for plan, own in zip(plans, found, strict=True)]
        told = [item for item in solved if item.site.op.y in pairs or item.ridge is not None]
        share = sum(plan.after for plan in plans) / sum(plan.before for plan in plans)
        return PassResult(
            rewritten,
            changes + [refit_change(item) for item in told if item.site.op.y not in pairs],
            list(dict.fromkeys(skipped + left)),
            [item.prediction() for item in told],
            [f"{share:.3g} of the parameters of {len(plans)} operators are left"],
        )

    # Which operators, and how narrow

    def _plans(self, model: Model, context: Context) -> tuple[list[_Plan], list[Skip]]:
        shapes = model.shapes(next(iter(context.calibration.fit)).feed)
        known = {node: (site_name(node),) for node in model.nodes if node.op in LINEAR}
        asked = sites.choose({self.options.only: None}, known, "linear operator")
        plans: list[_Plan] = []
        skipped: list[Skip] = []
        for node in (node for node in known if node in asked):
            op = linear_op(model, node, shapes)
            plan = op if isinstance(op, str) else self._plan(op)
            if isinstance(plan, str):
                skipped.append(Skip(known[node], plan))
            else:
                plans.append(plan)
        plans, foreign = self._comparable(model, plans, context)
        skipped += foreign
        refused = {self.options.only: [skip.reason for skip in skipped]} if skipped else {}
        sites.refuse_named(refused, [self.options.only] if plans else [], "replaced")
        return plans, skipped

    def _plan(self, op: LinearOp) -> _Plan | str:
        if op.shared:
            return "its weight has other users"
        if op.groups > 1:
            return "a grouped convolution"
        if op.pads is None:
            return "its pads depend on an input size that isn't static"
        if op.columns > MOST_COLUMNS:
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

    def _comparable(
        self, model: Model, plans: Sequence[_Plan], context: Context
    ) -> tuple[list[_Plan], list[Skip]]:
        """Those whose output can be held against the original's; and why not the others."""
        trial = model.copy()
        for plan in plans:
            op, rank = plan.op, plan.rank
            nothing = Affine(np.zeros((rank, op.columns)), np.zeros(rank))
            _replace(
                trial, plan, nothing, Affine(np.zeros((op.out_features, rank)), np.zeros(op.out_features))
            )
        feed = next(iter(context.calibration.fit)).feed
        places, skipped = refit_sites(
            context.original, trial, mask=self.options.mask, feed=feed, before=model
        )
        there = {site.op.y for site in places}
        why = {name: skip.reason for skip in skipped for name in skip.nodes}
        good = [plan for plan in plans if plan.op.y in there]
        return good, [
            Skip((plan.op.name,), why[_names(plan.op)[1]]) for plan in plans if plan.op.y not in there
        ]

    # Training

    def _train(
        self, training: ModuleType, model: Model, plans: Sequence[_Plan], context: Context
    ) -> list[Autoencoder]:
        advance = context.progress.task("training codes", total=len(plans))
        found: list[Autoencoder] = []
        for part in _affordable(plans):
            rows = _rows(model, [plan.op for plan in part], self.options.mask, context)
            for plan in part:
                fitted, held = rows[plan.op]
                found.append(
                    training.fit(
                        Affine(plan.op.weight, plan.op.bias),
                        fitted,
                        held if len(held) else fitted,
                        rank=plan.rank,
                        relu=plan.relu,
                        epochs=self.options.epochs,
                        noise=self.options.noise,
                        seed=context.seed,
                        key=plan.op.y,
                    )
                )
                context.journal(
                    "autoencode", operator=plan.op.name, start=found[-1].start, error=found[-1].error
                )
                advance()
        return found

    def _sites(
        self, model: Model, rewritten: Model, pairs: Mapping[str, tuple[str, str]], context: Context
    ) -> tuple[list[Site], list[Skip]]:
        """Places to solve, or of the pairs alone to measure; and what is skipped, but for the encoders."""
        feed = next(iter(context.calibration.fit)).feed
        places, skipped = refit_sites(
            context.original, rewritten, mask=self.options.mask, feed=feed, before=model
        )
        if not self.options.refit:
            return [replace(site, how="keep") for site in places if site.op.y in pairs], []
        encoders = {(encoder,) for encoder, _ in pairs.values()}
        return places, [skip for skip in skipped if skip.nodes not in encoders]


def _training() -> ModuleType:
    """What needs torch, which is an extra."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("autoencode needs PyTorch: pip install 'onnxfuse[torch]'") from error
    from onnxfuse.pytorch import autoencoder

    return autoencoder


def _change(plan: _Plan, found: Autoencoder, solved: Solved) -> Change:
    names = tuple(map(site_name, plan.op.nodes))
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


# --- rows ---------------------------------------------------------------------------------------------------


def _wanted(op: LinearOp) -> int:
    """Rows to train on, as far as memory allows."""
    return min(max(LEAST_ROWS, ROWS_PER_COLUMN * op.columns), max(MEMORY // (4 * op.columns), 1))


def _affordable(plans: Sequence[_Plan]) -> Iterator[list[_Plan]]:
    """Runs of operators whose rows fit in memory together."""
    part: list[_Plan] = []
    taken = 0
    for plan in plans:
        size = 4 * plan.op.columns * _wanted(plan.op)
        if part and taken + size > MEMORY:
            yield part
            part, taken = [], 0
        part.append(plan)
        taken += size
    yield part


def _rows(
    model: Model, ops: Sequence[LinearOp], mask: str | None, context: Context
) -> dict[LinearOp, tuple[np.ndarray, np.ndarray]]:
    """Inputs of operators as rows (n, columns) float32, of the fit samples and of the held-out ones.

    Raises NotApplicableError where they aren't finite, or all are padding.
    """
    fed = {info.name for info in model.inputs}
    taps = sorted({op.x for op in ops} - fed)
    session = context.runtime.session(model, taps=taps, outputs=()) if taps else None
    parts = context.calibration.fit, context.calibration.held_out
    found: dict[LinearOp, list[list[np.ndarray]]] = {op: [[], []] for op in ops}
    for number, part in enumerate(parts):
        for batch in part:
            seen = {**batch.feed, **(session.run(batch.feed) if session is not None else {})}
            for op in ops:
                found[op][number].append(_sampled(op, batch, seen, len(parts[0]), mask, context.seed))
    rows = {op: _joined(op, own) for op, own in found.items()}
    for op, own in rows.items():
        if not all(np.isfinite(array).all() for array in own):
            raise NotApplicableError(f"'{op.x}' is not finite on the samples")
        if not len(own[0]):
            raise NotApplicableError(f"all rows of '{op.x}' are padding")
    return rows


def _joined(op: LinearOp, parts: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    none = np.empty((0, op.columns), np.float32)
    fitted, held = (np.concatenate([none, *part]) for part in parts)
    return fitted, held


def _sampled(op: LinearOp, batch: Batch, seen: Feed, batches: int, mask: str | None, seed: int) -> np.ndarray:
    """Rows of one batch, at sampled positions; padding tokens are left out."""
    x = seen[op.x]
    count = -(-_wanted(op) // (batches * len(x)))
    geometry: dict[str, Any] = {
        "kernel": op.kernel,
        "strides": op.strides,
        "dilations": op.dilations,
        "pads": op.pads,
    }
    inner = output_size(x.shape[2:], **geometry) if op.kind == "conv" else x.shape[1:-1]
    positions = sample_positions(seed, op.y, batch.index, len(x), math.prod(inner), count)
    if op.kind == "conv":
        return patches(x, positions, **geometry).astype(np.float32, copy=False)
    rows = gather(x, positions, -1).astype(np.float32, copy=False)
    if op.kind == "token" and mask is not None and batch.feed[mask].shape == x.shape[:-1]:
        rows = rows[gather(batch.feed[mask][..., None], positions, -1)[:, 0] != 0]
    return rows


# --- rewriting ----------------------------------------------------------------------------------------------


def _names(op: LinearOp) -> tuple[str, str]:
    """Of the two operators in its place."""
    return f"{op.name}_encode", f"{op.name}_decode"


def _replace(model: Model, plan: _Plan, encode: Affine, decode: Affine) -> tuple[str, str]:
    """Put two operators in one's place; returns their names.

    `model` may be a copy of the one the operator is in: nodes are found by what they compute.
    """
    op = plan.op
    made = {node.outputs[0].name for node in op.nodes}
    old = [node for node in model.nodes if node.outputs and node.outputs[0].name in made]
    replaced = [site_name(node) for node in old]
    x, y = model.tensor(op.x), model.tensor(op.y)
    model.remove(old)
    first, second = _names(op)
    thin = _Thin(model, op, replaced)
    code = thin.add(x, encode.weight, encode.bias if plan.relu else None, f"{first}d", first)
    if plan.relu:
        relu = model.add_node(
            "Relu", [code], [f"{first}d_relu"], name=f"{first}_relu", by=NAME, replaces=replaced
        )
        code = relu.outputs[0]
    thin.add(code, decode.weight, decode.bias, y, second, behind=True)
    model.prune()
    return first, second


@dataclass(frozen=True)
class _Thin:
    """Makes operators like `op`, in whose place they are."""

    model: Model
    op: LinearOp
    replaces: Sequence[str]

    def add(
        self,
        x: Tensor,
        weight: np.ndarray,
        bias: np.ndarray | None,
        out: Tensor | str,
        name: str,
        *,
        behind: bool = False,
    ) -> Tensor:
        """One with these weights (out, columns); `behind` the first of the two a convolution is 1x1."""
        kind, attrs = self.op.node.op, dict[str, Any]()
        stored = weight
        if kind == "Conv":
            kernel = (1,) * len(self.op.kernel) if behind else self.op.kernel
            stored = weight.reshape(len(weight), -1, *kernel)
            attrs["kernel_shape"] = list(kernel)
            if not behind:
                attrs |= {name: list(getattr(self.op, name)) for name in ("strides", "dilations", "pads")}
        elif kind == "Gemm":
            attrs["transB"] = 1
        else:
            stored = weight.T
        constants = [self._constant(f"{name}.weight", stored)]
        if bias is not None:
            constants.append(self._constant(f"{name}.bias", bias))
        if kind != "MatMul" or bias is None:
            return self._node(kind, [x, *constants], out, name, attrs)
        product = self._node(kind, [x, constants[0]], f"{name}_product", name, attrs)
        return self._node("Add", [product, constants[1]], out, f"{name}_bias", {})

    def _constant(self, name: str, values: np.ndarray) -> Tensor:
        return self.model.add_weight(name, np.ascontiguousarray(values).astype(self.op.dtype))

    def _node(
        self, op: str, inputs: list[Tensor], out: Tensor | str, name: str, attrs: Mapping[str, Any]
    ) -> Tensor:
        made = self.model.add_node(op, inputs, [out], attrs, name, by=NAME, replaces=self.replaces)
        return made.outputs[0]
