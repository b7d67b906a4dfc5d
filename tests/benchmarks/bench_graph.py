"""What a model costs to load, look at, copy, take apart and save.

    python tests/benchmarks/bench_graph.py            # time by number of nodes, and memory
    python tests/benchmarks/bench_graph.py --no-large # without the 3 GB model

Time: a chain of Conv, Relu, Add of 3,000, 10,000 and 30,000 nodes; CPU seconds of one process, the best of
three. Linear means that the microseconds per node stay the same. There is nothing to fold in it.

Memory: the peak resident size of a process that loads a 3 GB model with external data, edits one tensor of
`EDITED` bytes and saves the result, into the same folder and into another one. The bound is 1.2 times the
edited bytes plus 300 MB. The data file is sparse, so it takes no room on the disk.

Round trip: with ONNXFUSE_SHARED set to a folder that has `models/*.onnx`, whether each of them comes out
byte for byte, loaded, copied and exported, and how many shapes inference leaves open.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxfuse import compress, inspect
from onnxfuse.ir import external_data
from onnxfuse.ir.model import Model

SIZES = (3_000, 10_000, 30_000)
TENSORS = 12
EDITED = 256 << 20
MB = 1 << 20


def chain(count: int) -> ModelProto:
    """About `count` nodes: Conv, Relu and Add over and over, each with a weight of its own."""
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    nodes, weights, x = [], [], "x"
    for i in range(count // 3):
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes += [
            helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"),
            helper.make_node("Add", [f"r{i}", x], [f"a{i}"], name=f"add{i}"),
        ]
        x = f"a{i}"
    shape = ["N", 4, 8, 8]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def seconds(action: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def steps(count: int, folder: Path) -> dict[str, float]:
    """Seconds of each step on a chain of `count` nodes."""
    path = folder / f"{count}.onnx"
    path.write_bytes(chain(count).SerializeToString())
    model = Model.load(path)

    def inferred() -> None:
        model.nodes[0].metadata["run"] = str(time.perf_counter())  # an edit, so nothing is cached
        model.shapes()

    middle = count // 6
    samples = np.random.default_rng(0).normal(size=(64, 4, 8, 8)).astype(np.float32)
    result = {
        "load": seconds(lambda: Model.load(path)),
        "shapes": seconds(inferred),
        "shapes again": seconds(model.shapes),
        "copy": seconds(model.copy),
        "to_proto": seconds(model.to_proto),
        "extract 9 nodes": seconds(lambda: model.extract([f"a{middle}"], [f"a{middle + 3}"])),
        "save": seconds(lambda: model.save(folder / "out.onnx")),
        "load and inspect": seconds(lambda: inspect(path, measure_latency=False)),
        "load and fold": seconds(lambda: compress(path, "fold", calib=samples)),
    }

    def edit() -> None:
        copy = model.copy()
        for node in [n for n in copy.nodes if n.op == "Relu"]:
            x, y = node.inputs[0], node.outputs[0]
            copy.remove([node])
            copy.add_node("LeakyRelu", [x], [y], {"alpha": 0.1}, by="benchmark", replaces=[node.name])
        copy.prune()
        copy.to_proto()

    result["replace every Relu"] = seconds(edit)
    return result


def time_table() -> None:
    with tempfile.TemporaryDirectory() as name:
        results = {count: steps(count, Path(name)) for count in SIZES}
    print(f"{'us per node':20}" + "".join(f"{count:>10,}" for count in SIZES))
    for step in results[SIZES[0]]:
        print(f"{step:20}" + "".join(f"{results[count][step] / count * 1e6:10.1f}" for count in SIZES))
    totals = "  ".join(f"{n:,}: {results[n]['load and inspect']:.2f} s" for n in SIZES)
    print(f"load and inspect: {totals}")


def large(folder: Path) -> Path:
    """A 3 GB model: a chain of MatMul whose weights are holes in a data file."""
    side = int((EDITED // 4) ** 0.5)
    graph = ModelProto().graph
    x = "x"
    for i in range(TENSORS):
        tensor = graph.initializer.add(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[side, side])
        external_data.point(tensor, "weights.bin", i * EDITED, EDITED)
        graph.node.append(helper.make_node("MatMul", [x, f"w{i}"], [f"y{i}"]))
        x = f"y{i}"
    graph.name = "large"
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", side]))
    graph.output.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", side]))
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    with open(folder / "weights.bin", "wb") as file:
        file.truncate(TENSORS * EDITED)
    path = folder / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def edit_one(source: str, target: str) -> None:
    """In a process of its own: load, edit one tensor, save; prints seconds and peak memory."""
    start = time.perf_counter()
    model = Model.load(source)
    model.shapes()
    loaded = time.perf_counter()
    tensor = model.tensor("w3")
    array = model.weight(tensor, writable=True)
    assert array is not None
    array += 1
    model.set_weight(tensor, array)
    del array
    model.save(target)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"load": loaded - start, "edit and save": done - loaded, "peak": peak}))


def memory_table() -> None:
    bound = 1.2 * EDITED + 300 * MB
    with tempfile.TemporaryDirectory() as name:
        path = large(Path(name))
        (Path(name) / "other").mkdir()
        for where in ("out.onnx", "other/out.onnx"):
            command = [sys.executable, __file__, "--edit", str(path), str(path.parent / where)]
            result = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            peak = result.pop("peak")
            place = "same folder " if where == "out.onnx" else "other folder"
            times = ", ".join(f"{step} {value:.2f} s" for step, value in result.items())
            print(
                f"{TENSORS * EDITED / MB:,.0f} MB model, {EDITED / MB:.0f} MB edited, {place}: {times}, "
                f"peak {peak / MB:.0f} MB of {bound / MB:.0f} MB"
            )


def round_trips(folder: Path) -> None:
    """One line for each model: what it is, whether it survives, what inference leaves open."""
    print(f"{'model':36}{'nodes':>6}{'load ms':>9}{'shapes ms':>10}{'open':>6}  round trip")
    for path in sorted(folder.glob("*.onnx")):
        load = seconds(lambda path=path: Model.load(path))
        model = Model.load(path)
        start = time.process_time()
        found = model.shapes()
        inference = time.process_time() - start
        parts = (onnx.load(path), Model.load(path).to_proto(), model.copy().to_proto())
        same = len({part.SerializeToString(deterministic=True) for part in parts}) == 1
        unknown = sum(not info.complete for info in found.values())
        print(
            f"{path.name:36}{len(model.nodes):6}{load * 1e3:9.1f}{inference * 1e3:10.1f}{unknown:6}  "
            f"{'identical' if same else 'DIFFERENT'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-large", action="store_true", help="leave out the 3 GB model")
    parser.add_argument("--edit", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.edit:
        edit_one(*options.edit)
        return
    time_table()
    if "ONNXFUSE_SHARED" in os.environ:
        round_trips(Path(os.environ["ONNXFUSE_SHARED"]) / "models")
    if not options.no_large:
        memory_table()


if __name__ == "__main__":
    main()
