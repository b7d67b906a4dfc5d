"""What the training scripts beside this file share: data split, training loop, export.

The scripts need `pip install '.[test]'`. Seeds are fixed and torch runs on one thread with deterministic
kernels, so a script writes the same files again on the same machine with the same versions. Each leaves
two:

- `NAME.onnx`: the trained network, weights inside, first dimension named `batch`, output `logits`;
- `NAME.npz`: the inputs by name and `labels`. Its rows are *test* rows: no weight was trained on them, so
  an accuracy measured on them is a held-out one. (How long to train, and how to train the transformer's
  embedding, was settled in a few trials that looked at it.)
"""

import argparse
import ast
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import remove_optional_bias_from_conv_rule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

OPSET = 18
BATCH = 64
CLASSES = tuple("0123456789")
DIGITS_SOURCE = (
    "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998), UCI; from scikit-learn"
)
DIGITS_LICENCE = "CC-BY-4.0"
DIGITS_TEST_ROWS = 600


def setup(description: str) -> Path:
    """Parse the command line, make torch deterministic, and return the folder to write to."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument(
        "--out", type=Path, default=here, help="folder to write to (default: beside the script)"
    )
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    return out


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: (train x, train labels, test x, test labels); x is (n, 8, 8) float32 in [0, 1].

    The rows come in runs by one writer, so a seeded, stratified draw takes the test rows instead of a cut.
    """
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8) / 16).astype(np.float32)
    parts = train_test_split(x, y, test_size=DIGITS_TEST_ROWS, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return train_x, train_y, test_x, test_y


def shifted(images: Tensor) -> Tensor:
    """Each (n, h, w) image moved by -1, 0 or 1 pixel along both axes at random, zeros moving in."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    _, height, width = images.shape
    offsets = torch.randint(0, 3, (2, len(images), 1))
    rows = (torch.arange(height) + offsets[0]).unsqueeze(2)
    columns = (torch.arange(width) + offsets[1]).unsqueeze(1)
    return padded[torch.arange(len(images)).view(-1, 1, 1), rows, columns]


def train(
    network: nn.Module,
    batch: Callable[[Tensor], Sequence[Tensor]],
    labels: Tensor,
    *,
    epochs: int,
    rate: float,
) -> None:
    """AdamW on the cross entropy under one cosine of the learning rate; leaves the network in eval mode.

    `batch` maps row numbers to the network's inputs for these rows, augmented or not.
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    steps = epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps, pct_start=0.1)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = cross_entropy(network(*batch(rows)), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all labels, one for each place of the (..., classes) logits."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


class TransformerLayer(nn.Module):
    """Pre-norm layer on (n, length, width), GELU inside.

    `bias`, added to the attention's scores, is very negative where a token is not to look: (length, length)
    for what is ahead, (n, 1, 1, length) for padding.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.project(self.attend(self.norm1(x), bias))
        return x + self.contract(self.gelu(self.expand(self.norm2(x))))

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(2, (self.heads, self.size)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(self.size) + bias
        return (scores.softmax(3) @ value).transpose(1, 2).flatten(2)


def publish(
    network: nn.Module,
    name: str,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    out: Path,
    *,
    about: str,
    data: str,
    data_licence: str,
    axes: Mapping[int, str] | None = None,
    keep_batchnorm: bool = False,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write `out/NAME.onnx` and `out/NAME.npz`, compare ONNX Runtime with torch, print the result.

    `inputs` are the test rows by input name, in the order of the network's arguments, and `axes` names the
    dimensions that may vary (the same for all inputs). torch's exporter folds BatchNorm into the convolution
    before it unless `keep_batchnorm`. `facts` go into the metadata besides, or in place of, the usual ones.
    """
    with torch.no_grad():
        logits = network(*inputs.values())
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    parameters = sum(p.numel() for p in network.parameters())
    proto = export(network, {key: x[:3] for key, x in inputs.items()}, axes or {0: "batch"}, keep_batchnorm)
    proto.graph.name = name
    proto.doc_string = " ".join(about.split())
    usual = {
        "script": f"models/{name}.py",
        "licence": "Apache-2.0",
        "data": data,
        "data_licence": data_licence,
        "labels": ",".join(CLASSES),
        "test_rows": str(len(labels)),
        "test_accuracy": f"{accuracy:.4f}",
        "parameters": str(parameters),
    }
    onnx.helper.set_model_props(proto, usual | dict(facts or {}))
    onnx.checker.check_model(proto, full_check=True)
    difference = compare(proto, {key: x.numpy() for key, x in inputs.items()}, logits.numpy())
    onnx.save(proto, out / f"{name}.onnx")
    np.savez_compressed(
        out / f"{name}.npz", **{key: x.numpy() for key, x in inputs.items()}, labels=labels.numpy()
    )
    print(
        f"{name}: test accuracy {accuracy:.4f} on {len(labels)} rows, {parameters:,} parameters, "
        f"{(out / f'{name}.onnx').stat().st_size:,} bytes, largest difference from torch {difference:.1e}"
    )


def compare(proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray], logits: np.ndarray) -> float:
    """Largest difference of ONNX Runtime from torch's `logits` for 1, 7 and all rows; exits above 1e-4."""
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    difference = 0.0
    for rows in (1, 7, len(logits)):
        (result,) = session.run(["logits"], {key: x[:rows] for key, x in inputs.items()})
        difference = max(difference, float(np.abs(result - logits[:rows]).max()))
    if not difference < 1e-4:
        raise SystemExit(f"the exported file differs from torch by {difference}")
    return difference


def export(
    network: nn.Module, example: Mapping[str, Tensor], axes: Mapping[int, str], keep_batchnorm: bool
) -> onnx.ModelProto:
    """`network` as ONNX, with names a reader can follow and no trace of the machine it was exported on."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            network,
            tuple(example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=["logits"],
            dynamic_shapes=tuple(dict(axes) for _ in example),
            optimize=not keep_batchnorm,
            verbose=False,
        )
    assert program is not None
    if keep_batchnorm:
        optimizer.fold_constants(program.model)
        # Without its optimiser torch writes a bias of zeros to every convolution that has none.
        rewriter.rewrite(program.model, [remove_optional_bias_from_conv_rule])
        optimizer.remove_unused_nodes(program.model)
    proto = program.model_proto
    rename(proto.graph, keep=set(network.state_dict()))
    strip(proto)
    return proto


def rename(graph: onnx.GraphProto, keep: set[str]) -> None:
    """Name nodes and tensors after their torch module: `/blocks.0.conv1/Conv`, and `..._output_0`.

    Graph inputs, outputs and the initializers in `keep` (parameters under their torch names) keep theirs.
    """
    kept = keep | {value.name for value in (*graph.input, *graph.output)}
    new: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.node:
        base = f"{module_of(node)}/{node.op_type}"
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
        for kind, names in (("input", node.input), ("output", node.output)):
            for i, old in enumerate(names):
                if old and old not in kept:
                    names[i] = new.setdefault(old, f"{node.name}_{kind}_{i}")
    for item in (*graph.initializer, *graph.value_info):
        item.name = new.get(item.name, item.name)


def module_of(node: onnx.NodeProto) -> str:
    """Slash and dotted name of the innermost torch module around a node, nothing at the top level."""
    notes = {item.key: item.value for item in node.metadata_props}
    *modules, _function = ast.literal_eval(notes["pkg.torch.onnx.name_scopes"])
    inner = modules[-1] if modules else ""
    return f"/{inner}" if inner and not inner.startswith("_") else ""


def strip(proto: onnx.ModelProto) -> None:
    """Drop torch's notes (stack traces with local paths among them)."""
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    for item in (proto, graph, *graph.node, *graph.initializer, *values):
        del item.metadata_props[:]
