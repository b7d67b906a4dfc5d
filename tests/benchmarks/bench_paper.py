"""FuseInit's cases on the networks that ship: two neighbouring layers become one.

    python tests/benchmarks/bench_paper.py

**Fitted pairs.** Every region with two linear operators in `models/*.onnx`, from the rows of the `.npz`
beside it: dense-dense (per token in the transformer, padding left out), conv-dense, conv-conv. `joint`
solves all columns together (Theorem 1), with the ridge that is best on a fifth of the fitted samples;
`per ch.` solves each input channel of a convolution alone (Theorem 2, `mode=paper`). Both errors are mean
squared errors over the target's variance on the quarter of the samples that neither has seen: 1 is what
the mean would give.

**Exact pairs.** Two convolutions, or dense layers, with nothing in between, which `fold` joins where one
operator computes the very same: the largest difference between ONNX Runtime's outputs in float32 over odd
and even input sizes. Outputs have unit variance. Mark: 1e-5.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from common import machine, parser, passed, table, write_json
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.analysis.regions.region import Region
from onnxfuse.analysis.regions.search import find_regions
from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.moments import Moments, add_patches
from onnxfuse.numerics.ridge import choose_ridge, per_channel, solve
from onnxfuse.numerics.sampling import gather
from onnxfuse.passes.fold import Fold
from onnxfuse.pipeline.base import Context
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.runtime.observed_shapes import shapes_on
from onnxfuse.runtime.session import Runtime

MODELS = Path(__file__).parents[2] / "models"
EXACT_MARK = 1e-5
LARGEST_AUTO = 3
TEST_SHARE, CHOOSE_EVERY = 0.25, 5


def main() -> None:
    options = parser(__doc__).parse_args()
    runtime = Runtime("cpu", options.threads)
    print(machine(options.threads))
    pairs = [pair for path in sorted(MODELS.glob("*.onnx")) for pair in fitted(path, runtime, options.quick)]
    show_fitted(pairs)
    exact = list(exact_pairs(runtime, options.quick))
    show_exact(exact)
    write_json(
        options.json,
        {
            "machine": machine(options.threads),
            "fitted": [asdict(pair) for pair in pairs],
            "exact": [asdict(pair) for pair in exact],
        },
    )


# --- fitted pairs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """One pair: relative held-out errors; `alone` is Theorem 2's, None where it does not apply."""

    model: str
    pair: str
    kind: str
    features: str
    kernel: str
    columns: int
    rows: int
    ridge: float
    joint: float
    alone: float | None


def fitted(path: Path, runtime: Runtime, quick: bool) -> list[Fitted]:
    """All pairs of one model, each with the kernel sizes that fuse offers."""
    model = Model.load(path)
    data = path.with_suffix(".npz")
    calibration = Calibration.open(
        data, model, limit=150 if quick else None, batch_size=16, held_out=TEST_SHARE
    )
    shapes = shapes_on(model, next(iter(calibration.fit)).feed, Runtime("cpu"))
    regions = [region for region in find_regions(model, shapes, max_ops=2)[0] if region.linear_ops == 2]
    # Of regions over the same operators the last takes in the skip.
    widest = list({(region.u, region.kind, region.sites): region for region in regions}.values())
    views = [(region, kernel) for region in widest for kernel in kernels(region)]
    fed = {info.name for info in model.inputs}
    taps = {name for region in widest for name in (region.u, region.v)} - fed
    session = runtime.session(model, taps=sorted(taps), outputs=())
    sums = [[Moments(columns(*view), view[0].out_features) for _ in range(3)] for view in views]
    for part, test in ((calibration.fit, False), (calibration.held_out, True)):
        for number, batch in enumerate(part):
            found = {**batch.feed, **session.run(batch.feed)}
            which = 2 if test else int(number % CHOOSE_EVERY == 0)
            for view, moments in zip(views, sums, strict=True):
                add(moments[which], found, *view)
    return [solved(path.stem, *view, *moments) for view, moments in zip(views, sums, strict=True)]


def kernels(region: Region) -> list[tuple[int, ...]]:
    """The whole receptive field, and what fuse takes unasked."""
    if region.geometry is None:
        return [()]
    field = region.geometry.kernel
    small = tuple(min(size, LARGEST_AUTO) for size in field)
    return [
        kernel for kernel in dict.fromkeys((small, field)) if region.geometry.pads_for(kernel) is not None
    ]


def columns(region: Region, kernel: tuple[int, ...]) -> int:
    return region.in_features * math.prod(kernel)


def add(moments: Moments, found: Feed, region: Region, kernel: tuple[int, ...]) -> None:
    """One batch's rows: every position."""
    x, y = found[region.u], found[region.v]
    if region.geometry is not None:
        pads = region.geometry.pads_for(kernel)
        assert pads is not None
        add_patches(
            moments,
            x,
            y,
            None,
            kernel=kernel,
            strides=region.geometry.strides,
            dilations=(1,) * len(kernel),
            pads=pads,
        )
        return
    rows = x.reshape(len(x), -1) if region.kind == "flatten" else gather(x, None, -1)
    mask = found.get("attention_mask") if region.kind == "token" else None
    weights = None if mask is None else mask.reshape(-1).astype(np.float64)
    moments.add(rows, gather(y, None, -1), weights)


def solved(
    name: str, region: Region, kernel: tuple[int, ...], fit: Moments, choose: Moments, test: Moments
) -> Fitted:
    """Both solutions from the same samples."""
    ridge, _ = choose_ridge(fit, choose)
    both = fit + choose
    alone = None
    if region.kind == "conv":
        alone = test.relative_error(per_channel(both, region.in_features))
    return Fitted(
        model=name,
        pair=pair_name(*map(short, region.sites)),
        kind=kind(region),
        features=f"{region.in_features}->{region.out_features}",
        kernel="x".join(map(str, kernel)),
        columns=columns(region, kernel),
        rows=int(both.n),
        ridge=ridge,
        joint=test.relative_error(solve(both, ridge)),
        alone=alone,
    )


def short(site: str) -> str:
    """`/blocks.0.conv1/Conv` -> `blocks.0.conv1`"""
    return site.strip("/").rsplit("/", 1)[0]


def pair_name(first: str, second: str) -> str:
    """`blocks.0.conv1..conv2`"""
    same = first.rpartition(".")[0] == second.rpartition(".")[0]
    return f"{first}..{second.rpartition('.')[2] if same else second}"


def kind(region: Region) -> str:
    names = {"conv": "conv-conv", "flatten": "conv-dense", "dense": "dense-dense", "token": "token"}
    return names[region.kind] + (" +skip" if region.residual else "")


def show_fitted(pairs: Sequence[Fitted]) -> None:
    print("\nfitted pairs: held-out relative mean squared error")
    for name, group in itertools.groupby(pairs, lambda pair: pair.model):
        print(f"\n{name}")
        table(
            ("pair", "kind", "features", "kernel", "joint", "per ch."),
            [
                (
                    pair.pair,
                    pair.kind,
                    pair.features,
                    pair.kernel,
                    f"{pair.joint:.4f}",
                    "" if pair.alone is None else f"{pair.alone:.3g}",
                )
                for pair in group
            ],
            text=2,
        )


# --- exact pairs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """One pair of linear layers; `nodes` are left after fold, `difference` is the largest."""

    layers: str
    kernels: str
    strides: tuple[int, int]
    sizes: tuple[int, ...]
    nodes: int
    difference: float


def exact_pairs(runtime: Runtime, quick: bool) -> list[Exact]:
    """Expanded pairs 4 -> 32 -> 4, kernels odd and even, strides 1 and 2, sizes odd and even."""
    sizes = (15, 16) if quick else (14, 15, 16, 17, 18, 19)
    found = [dense_pair(runtime)]
    for axes, (first, second) in itertools.product((1, 2), ((3, 1), (4, 1), (1, 3), (2, 3), (3, 2), (3, 3))):
        for strides in itertools.product((1, 2), (1, 2)):
            model = conv_pair(axes, (first, second), strides)
            nodes, difference = folded(model, runtime, [(2, 4, *(size,) * axes) for size in sizes])
            found.append(
                Exact(f"{axes}-D conv-conv", f"{first}, {second}", strides, sizes, nodes, difference)
            )
    return found


def conv_pair(axes: int, kernels: tuple[int, int], strides: tuple[int, int]) -> Model:
    """The first one pads, the second does not: that case is exact."""
    random = np.random.default_rng(0)
    weights, nodes, x = [], [], "x"
    for index, (before, after) in enumerate(((4, 32), (32, 4))):
        kernel = (kernels[index],) * axes
        shape = (after, before, *kernel)
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        weights.append(numpy_helper.from_array((random.normal(size=shape) * scale).astype("f4"), f"w{index}"))
        weights.append(numpy_helper.from_array(random.normal(size=after).astype("f4") * 0.1, f"b{index}"))
        pads = [kernels[0] // 2 if index == 0 else 0] * (2 * axes)
        y = "y" if index else "h"
        nodes.append(
            helper.make_node(
                "Conv",
                [x, f"w{index}", f"b{index}"],
                [y],
                name=f"conv{index}",
                strides=[strides[index]] * axes,
                pads=pads,
            )
        )
        x = y
    return built(nodes, weights, ["N", 4, *(f"S{axis}" for axis in range(axes))], axes + 2)


def dense_pair(runtime: Runtime) -> Exact:
    random = np.random.default_rng(0)
    shapes = ((32, 128), (128, 32))
    weights = [
        numpy_helper.from_array((random.normal(size=shape) / math.sqrt(shape[0])).astype("f4"), f"w{index}")
        for index, shape in enumerate(shapes)
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "w0"], ["h"], name="dense0"),
        helper.make_node("Gemm", ["h", "w1"], ["y"], name="dense1"),
    ]
    model = built(nodes, weights, ["N", 32], 2)
    nodes_left, difference = folded(model, runtime, [(16, 32)])
    return Exact("dense-dense", "", (1, 1), (32,), nodes_left, difference)


def built(nodes: list, weights: list, shape: list[int | str], rank: int) -> Model:
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        weights,
    )
    return Model.load(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))


def folded(model: Model, runtime: Runtime, shapes: Sequence[tuple[int, ...]]) -> tuple[int, float]:
    """(nodes left, largest difference of the outputs) after fold, over inputs of these shapes."""
    random = np.random.default_rng(1)
    feeds = [{"x": random.normal(size=shape).astype(np.float32)} for shape in shapes]
    calibration = Calibration.open(feeds, model, held_out=0.0)
    outcome = PassManager([Fold()]).run(model, Context(model, calibration, runtime))
    if not outcome.steps[0].committed:
        raise SystemExit(f"fold was rolled back: {outcome.steps[0].reason}")
    before, after = runtime.session(model), runtime.session(outcome.model)
    return len(outcome.model.nodes), max(
        float(np.abs(before.run(feed)["y"] - after.run(feed)["y"]).max()) for feed in feeds
    )


def show_exact(pairs: Sequence[Exact]) -> None:
    sizes = ", ".join(map(str, pairs[-1].sizes))
    print(f"\nexact pairs: largest difference by strides, over sizes {sizes}")
    print("('kept' where fold leaves two operators, because one would cost more)\n")
    rows = []
    strides = list(dict.fromkeys(pair.strides for pair in pairs))
    for (layers, kernel), group in itertools.groupby(pairs, lambda pair: (pair.layers, pair.kernels)):
        found = {pair.strides: pair for pair in group}
        cells = [
            "" if pair is None else f"{pair.difference:.1e}" if pair.nodes == 1 else "kept"
            for pair in map(found.get, strides)
        ]
        rows.append((layers, kernel, *cells))
    table(("layers", "kernels", *(f"{a}, {b}" for a, b in strides)), rows, text=2)
    worst = max(pair.difference for pair in pairs)
    print(f"largest: {worst:.1e}, mark {EXACT_MARK:.0e}, within: {passed(worst, EXACT_MARK)}")


if __name__ == "__main__":
    main()
