"""FuseInit's tables: is a fused network a better start than a random one?

    python tests/benchmarks/bench_fuseinit.py               # five seeds, some half an hour on two cores
    python tests/benchmarks/bench_fuseinit.py --quick       # one seed, few images: does the script run?
    python tests/benchmarks/bench_fuseinit.py --data mnist1d

A deep network is trained from random weights; its last two linear layers are fused into one
(`onnxfuse compress`) and the result is retrained (`onnxfuse retrain`, labels); and so on, a layer at a time.
Each shallower network is set beside two of the same graph with random weights: one trained for the same
epochs as the fused one was retrained (`random`, what the paper compares with), and one trained for all the
epochs that the chain of networks behind the fused one took (`same budget`). Test accuracy in per cent, mean
and deviation over the seeds; the difference to both with the deviation of its mean (paired by seed).

- *Fashion-MNIST* (Table II; Ghods et al. 2020): 3x3 convolutions with 2, 4, 8 and 16 channels, every second
  one with stride 2, ReLU, one dense layer; the last convolution and the dense layer become one dense layer.
  20,000 training images.
- *mnist1d* (Tables III and IV have 1-D data): convolutions of 5 samples with 16, 32, 32 and 48 channels, the
  third with stride 2, one dense layer; the last two convolutions become one.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from common import fashion_mnist, machine, parser, table, write_json
from onnx import TensorProto, helper, numpy_helper

import onnxfuse
from onnxfuse import compress
from onnxfuse.data.calibration import Calibration
from onnxfuse.ir.model import Model
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.metrics import evaluate, top1

CALIBRATION = 3000


@dataclass(frozen=True)
class Setting:
    """A data set and the network for it: channels, kernel, strides; `dense`: fuse the last convolution with
    the dense layer, else the last two convolutions."""

    name: str
    channels: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dense: bool
    epochs: int
    batch: int
    rate: float
    data: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Depth:
    """All networks with so many convolutions: accuracies in per cent, one for each seed."""

    layers: int
    graph: str
    budget: int
    start: list[float] = field(default_factory=list)
    fused: list[float] = field(default_factory=list)
    random: list[float] = field(default_factory=list)
    same_budget: list[float] = field(default_factory=list)


def fashion() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    (x, y), (tx, ty) = fashion_mnist("train"), fashion_mnist("test")
    return x[:20_000], y[:20_000], tx, ty


def mnist1d() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from mnist1d.data import get_dataset_args, make_dataset

    data = make_dataset(get_dataset_args())
    x, tx = (data[key].astype(np.float32)[:, None] for key in ("x", "x_test"))
    return x, data["y"].astype(np.int64), tx, data["y_test"].astype(np.int64)


SETTINGS = {
    "fashion": Setting("Fashion-MNIST", (2, 4, 8, 16), (3, 3), (1, 2, 1, 2), True, 10, 128, 4e-3, fashion),
    "mnist1d": Setting("mnist1d", (16, 32, 32, 48), (5,), (1, 1, 2, 1), False, 20, 64, 3e-3, mnist1d),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", choices=sorted(SETTINGS), action="append")
    arguments.add_argument("--seeds", type=int, default=5, metavar="N")
    options = arguments.parse_args()
    seeds, rows = (1, 600) if options.quick else (options.seeds, None)
    print(machine(options.threads))
    found = {}
    for key in options.data or sorted(SETTINGS):
        setting = SETTINGS[key]
        depths = experiment(
            setting, range(seeds), rows, 1 if options.quick else setting.epochs, options.threads
        )
        show(setting, depths)
        found[key] = [asdict(depth) for depth in depths]
    write_json(options.json, {"machine": machine(options.threads), **found})


def experiment(
    setting: Setting, seeds: Sequence[int], rows: int | None, epochs: int, threads: int | None
) -> list[Depth]:
    x, y, test_x, test_y = setting.data()
    train = {"x": x[:rows], "labels": y[:rows]}
    runtime = Runtime("cpu", threads)
    shape = tuple(x.shape[1:])
    deepest = len(setting.channels)
    depths = [Depth(deepest, "", epochs)]
    test = Calibration.open({"x": test_x, "labels": test_y}, network(setting, shape, 0), held_out=0.0).fit

    def accuracy(model: Model) -> float:
        return 100 * float(evaluate(runtime.session(model), test, top1).mean())

    def fit(model: Model, epochs: int, seed: int) -> Model:
        more = {"batch_size": setting.batch, "lr": setting.rate, "held_out": 0.1, "weight_decay": 0.0}
        return onnxfuse.retrain(model, train, epochs=epochs, seed=seed, **more).model

    for seed in seeds:
        deep = fit(network(setting, shape, seed), epochs, seed)
        depths[0].random.append(accuracy(deep))
        for step in range(1, deepest):
            fused = fuse_last(deep, setting.dense, {"x": x[:CALIBRATION]})
            if len(depths) == step:
                depths.append(Depth(deepest - step, describe(fused), epochs * (step + 1)))
            depth = depths[step]
            depth.start.append(accuracy(fused))
            deep = fit(fused, epochs, seed)
            depth.fused.append(accuracy(deep))
            fresh = reinitialised(fused, seed)
            depth.random.append(accuracy(fit(fresh, epochs, seed)))
            depth.same_budget.append(accuracy(fit(fresh, depth.budget, seed)))
            print(
                f"  {setting.name}, seed {seed}, {depth.layers} convolutions: fused {depth.start[-1]:.2f}, "
                f"retrained {depth.fused[-1]:.2f}, random {depth.random[-1]:.2f}, "
                f"same budget {depth.same_budget[-1]:.2f}",
                flush=True,
            )
    return depths


# --- networks -----------------------------------------------------------------------------------------------


def network(setting: Setting, shape: Sequence[int], seed: int) -> Model:
    """Convolutions with ReLU and one dense layer, He-normal weights; nodes `layer1`, `layer2`, ..."""
    random = np.random.default_rng(seed)
    nodes, weights = [], []

    def add(name: str, shape: Sequence[int]) -> list[str]:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        weights.append(numpy_helper.from_array(_normal(random, shape, scale), f"{name}.weight"))
        weights.append(numpy_helper.from_array(np.zeros(shape[0], np.float32), f"{name}.bias"))
        return [f"{name}.weight", f"{name}.bias"]

    last, wide, sizes = "x", shape[0], list(shape[1:])
    for number, (channels, stride) in enumerate(zip(setting.channels, setting.strides, strict=True), start=1):
        name = f"layer{number}"
        names = add(name, (channels, wide, *setting.kernel))
        pads = [k // 2 for k in setting.kernel] * 2
        nodes.append(
            helper.make_node(
                "Conv",
                [last, *names],
                [f"c{number}"],
                name,
                pads=pads,
                strides=[stride] * len(setting.kernel),
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        last, wide, sizes = f"r{number}", channels, [-(-size // stride) for size in sizes]
    nodes.append(helper.make_node("Flatten", [last], ["flat"]))
    name = f"layer{len(setting.channels) + 1}"
    names = add(name, (10, wide * int(np.prod(sizes))))
    nodes.append(helper.make_node("Gemm", ["flat", *names], ["logits"], name, transB=1))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    return Model.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def _normal(random: np.random.Generator, shape: Sequence[int], scale: float) -> np.ndarray:
    return (scale * random.standard_normal(shape)).astype(np.float32)


def linear(model: Model) -> list:
    return [node for node in model.nodes if node.op in ("Conv", "Gemm", "MatMul")]


def fuse_last(model: Model, dense: bool, samples: dict[str, np.ndarray]) -> Model:
    """The last two convolutions, or the last one and the dense layer, as one operator."""
    model = model.copy()
    layers = linear(model)
    for number, node in enumerate(layers, start=1):
        node.name = f"layer{number}"
    first = len(layers) - (1 if dense else 2)
    wanted = f"fuse:max_blocks=1,max_ops=2,only=layer[{first}{first + 1}]"
    result = compress(model, wanted, calib=samples)
    if not result.ok:
        raise SystemExit(f"layers {first} and {first + 1} could not be fused: {result.reason}")
    return result.model


def describe(model: Model) -> str:
    shapes = (model.weight(node.inputs[1]).shape for node in linear(model))
    return " ".join("x".join(map(str, shape)) for shape in shapes)


def reinitialised(model: Model, seed: int) -> Model:
    """The same graph with He-normal weights and zero biases."""
    random = np.random.default_rng(1000 + seed)
    result = model.copy()
    for node in linear(result):
        shape = result.weight(node.inputs[1]).shape
        result.set_weight(node.inputs[1], _normal(random, shape, np.sqrt(2 / np.prod(shape[1:]))))
        if len(node.inputs) > 2:
            result.set_weight(node.inputs[2], np.zeros_like(result.weight(node.inputs[2])))
    return result


# --- printing -----------------------------------------------------------------------------------------------


def show(setting: Setting, depths: Sequence[Depth]) -> None:
    deep = depths[0]
    print(f"\n{setting.name}: {deep.layers} convolutions from random weights {spread(deep.random)}")
    table(
        ("convolutions", "fused", "retrained", "random", "same budget", "- random", "- budget"),
        [
            (
                depth.layers,
                spread(depth.start),
                spread(depth.fused),
                spread(depth.random),
                spread(depth.same_budget),
                difference(depth.fused, depth.random),
                difference(depth.fused, depth.same_budget),
            )
            for depth in depths[1:]
        ],
    )


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} +-{statistics.stdev(values):.2f}"


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    found = [x - y for x, y in zip(a, b, strict=True)]
    mean = f"{statistics.mean(found):+.2f}"
    return mean if len(found) < 2 else f"{mean} +-{statistics.stdev(found) / len(found) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
