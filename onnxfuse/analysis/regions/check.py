"""The check of a region's geometry by running it.

The rules claim that a Conv or Gemm has v's shape for every u. Here the region and such an operator are run at
many sizes, and their shapes compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxfuse.analysis.regions.region import Region
from onnxfuse.analysis.regions.view import Shape
from onnxfuse.errors import OnnxfuseError
from onnxfuse.ir.model import Model

if TYPE_CHECKING:
    from onnxfuse.ir.model import Feed
    from onnxfuse.runtime.session import Runtime


@dataclass(frozen=True)
class GeometryCheck:
    """Outcome of `check_geometry`.

    `sizes` are the shapes of u that were run, each with the shape of v; `reason` says what failed, or why
    nothing could be run.
    """

    passed: bool
    sizes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    reason: str | None = None


TRIED_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17, 30, 32, 33)


def check_geometry(
    model: Model,
    region: Region,
    runtime: Runtime,
    feeds: Iterable[Feed] = (),
    *,
    kernels: Sequence[int | Sequence[int]] | None = None,
) -> GeometryCheck:
    """Compare shapes of v with those of the operator that would replace the region, both run by ONNX Runtime.

    The region alone is run on inputs of several batch and, where they are dynamic, other sizes; sizes at
    which the region itself fails are passed over. Where it cannot run alone, each of `feeds` runs through the
    whole model.

    Args:
        model: the model that `region` is of.
        region: what `find_regions` found.
        runtime: runs both.
        feeds: samples for the whole model, needed where data from outside enters the region.
        kernels: of the replacement, for kind "conv"; None tries 1, 3 and the receptive field, where possible.
    """
    if region.geometry is not None and kernels is None:
        kernels = [1, 3, region.geometry.kernel]
    try:
        replacements = [runtime.session(p) for p in _replacements(model, region, kernels or [1])]
    except OnnxfuseError as error:
        return GeometryCheck(False, (), str(error))
    if not replacements:
        return GeometryCheck(False, (), "no kernel of the wanted sizes has pads that are not negative")
    dtype = _dtype(model, region.u)
    sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
    try:
        runs = list(_run_alone(model, region, runtime, dtype))
        if not runs:
            runs = list(_run_whole(model, region, runtime, feeds))
    except OnnxfuseError as error:
        return GeometryCheck(False, (), str(error))
    for u_shape, v_shape in runs:
        sizes[u_shape] = v_shape
        for session in replacements:
            got = list(session.run({"u": np.zeros(u_shape, dtype)})["v"].shape)
            got[1 if region.kind == "conv" else -1] = region.out_features
            if tuple(got) != v_shape:
                given = f"'{region.u}' of {list(u_shape)} gives '{region.v}' of {list(v_shape)}"
                reason = f"{given}, the replacement {got}"
                return GeometryCheck(False, tuple(sizes.items()), reason)
    if not sizes:
        return GeometryCheck(False, (), "the region could not be run at any size")
    return GeometryCheck(True, tuple(sizes.items()))


def _dtype(model: Model, name: str) -> np.dtype:
    found = model.shapes()[name].dtype
    return np.dtype(np.float32) if found is None else found


def _run_alone(
    model: Model, region: Region, runtime: Runtime, dtype: np.dtype
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of u and v from runs of the region by itself; none if other data enters it."""
    if region.sides or region.u_shape is None:
        return
    try:
        session = runtime.session(model.extract([region.u], [region.v]))
    except OnnxfuseError:
        return
    generator = np.random.default_rng(0)
    for shape in _shapes_to_try(region, model.shapes()[region.u].shape):
        try:
            result = session.run({region.u: generator.standard_normal(shape).astype(dtype)})
        except OnnxfuseError:  # too small for some window inside, or a batch size fixed by a Reshape
            continue
        if region.geometry is not None and min(region.geometry.size(shape[2:])) < 1:
            continue  # a pooling that ONNX Runtime runs although no window fits
        yield shape, result[region.v].shape


def _shapes_to_try(region: Region, declared: Shape | None) -> list[tuple[int, ...]]:
    """Shapes of u: fixed sizes as they are, dynamic ones varied together, axes mostly unlike each other."""
    known = declared if declared is not None else region.u_shape or ()
    seen = region.u_shape or known
    fields = region.geometry.kernel if region.geometry is not None else (1,)
    steps = region.geometry.strides if region.geometry is not None else (1,)
    # Around the receptive field as well: a region without pads runs at no smaller size.
    sizes = [*TRIED_SIZES, *(max(fields) + max(steps) * i + i % 2 for i in range(4))]
    shapes = []
    for turn, size in enumerate(sizes):
        shape = [d if isinstance(d, int) else size + (a - 1) * (turn % 3) for a, d in enumerate(known)]
        if not isinstance(known[0], int):
            shape[0] = 1 + turn % 3
        if region.kind == "flatten":  # all but the batch is fixed, though perhaps only a run told its size
            shape[1:] = [d if isinstance(d, int) else s for d, s in zip(seen[1:], shape[1:], strict=True)]
        else:
            shape[1 if region.kind == "conv" else -1] = region.in_features
        shapes.append(tuple(shape))
    return list(dict.fromkeys(shapes))


def _run_whole(
    model: Model, region: Region, runtime: Runtime, feeds: Iterable[Feed]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    session = None
    for feed in feeds:
        session = session or runtime.session(model, outputs=[region.u, region.v])
        result = session.run(feed)
        yield result[region.u].shape, result[region.v].shape


def _replacements(
    model: Model, region: Region, kernels: Sequence[int | Sequence[int]]
) -> Iterator[onnx.ModelProto]:
    """The single operator as a model of its own, for each kernel that has pads.

    Its weights are zero, and of its outputs only one channel is computed: sizes are all that is asked for.
    """
    dtype = _dtype(model, region.u)
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    if region.geometry is None:
        weight = np.zeros((region.in_features, 1), dtype)
        nodes = [helper.make_node("MatMul", ["u" if region.kind != "flatten" else "flat", "w"], ["v"])]
        if region.kind == "flatten":
            nodes.insert(0, helper.make_node("Flatten", ["u"], ["flat"]))
        yield _model(nodes, weight, kind, None)
        return
    for kernel in kernels:
        sizes = (kernel,) * len(region.geometry.kernel) if isinstance(kernel, int) else tuple(kernel)
        pads = region.geometry.pads_for(sizes)
        if pads is None:
            continue
        weight = np.zeros((1, region.in_features, *sizes), dtype)
        node = helper.make_node("Conv", ["u", "w"], ["v"], strides=region.geometry.strides, pads=pads)
        yield _model([node], weight, kind, len(sizes) + 2)


def _model(
    nodes: Sequence[onnx.NodeProto], weight: np.ndarray, kind: int, rank: int | None
) -> onnx.ModelProto:
    shape = None if rank is None else [None] * rank
    graph = helper.make_graph(
        nodes,
        "replacement",
        [helper.make_tensor_value_info("u", kind, shape)],
        [helper.make_tensor_value_info("v", kind, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
