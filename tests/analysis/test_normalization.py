"""Which networks look as if their normalization had been folded away."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from nets import net
from onnx import helper, numpy_helper
from torch import nn

from onnxfuse.analysis.normalization import lacks_normalization, normalized_by
from onnxfuse.ir.model import Model

ONE = np.ones(3, np.float32)
WEIGHTS = {
    **dict.fromkeys(("w1", "w2", "w3"), (3, 3, 1, 1)),
    "one": ONE,
    "axes": np.array([1]),
    "factor": np.float32(2),
    "yes": np.array(True),
}
CHAIN = "a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) d = Conv(c, w3)"
BRANCH = """If(yes) <then_branch = t () => (float[A,B,C,D] p) { p = Relu(c) },
                     else_branch = e () => (float[A,B,C,D] q) { q = Exp(c) }>"""


def image(body: str) -> Model:
    used = {name: value for name, value in WEIGHTS.items() if name in body}
    return net(body, used, "float[N,3,6,6] x", "float[A,B,C,D] y", opset=21)


@pytest.mark.parametrize(
    ("body", "lacks"),
    [
        (f"{CHAIN} y = Relu(d)", True),
        (f"{CHAIN.replace('c = Conv', 'c = ConvTranspose')} y = Relu(d)", True),
        ("a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) y = Relu(c)", False),
        # Three side by side are not deep; where there is a skip, the long way counts.
        ("a = Conv(x, w1) b = Conv(x, w2) c = Conv(x, w3) y = Sum(a, b, c)", False),
        ("a = Conv(x, w1) c = Conv(a, w2) s = Add(c, x) d = Conv(s, w3) y = Add(d, x)", True),
        (f"a = Conv(x, w1) c = Conv(a, w2) b = {BRANCH} y = Conv(b, w3)", True),
        # With a weight that is computed it is no layer.
        ("u = Relu(w2) a = Conv(x, w1) b = Conv(a, u) y = Conv(b, w3)", False),
        (f"{CHAIN} y = BatchNormalization(d, one, one, one, one)", False),
        (f"n = InstanceNormalization(x, one, one) {CHAIN.replace('(x', '(n')} y = Relu(d)", False),
        (f"{CHAIN} t = Transpose<perm = [0,2,3,1]>(d) y = LayerNormalization(t, one)", False),
        (f"{CHAIN} y = GroupNormalization<num_groups = 1>(d, one, one)", False),
        (
            f"{CHAIN} b2 = {BRANCH.replace('Exp(c)', 'InstanceNormalization(c, one, one)')} y = Add(b2, d)",
            False,
        ),
        # Written out: the mean of the very tensor is subtracted.
        (f"{CHAIN} m = ReduceMean(d, axes) y = Sub(d, m)", False),
        (f"{CHAIN} m = ReduceMean(c, axes) y = Sub(d, m)", True),
        (f"{CHAIN} y = Sub(d, factor)", True),
        (f"{CHAIN} y = LRN<size = 3>(d)", True),
    ],
)
def test_what_lacks_a_normalization(body: str, lacks: bool) -> None:
    assert lacks_normalization(image(body)) is lacks


def test_a_normalization_inside_a_function_counts() -> None:
    """Here in a branch of an If of the function."""
    proto = image(f"{CHAIN} y = Relu(d)").to_proto()
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.graph.initializer.append(numpy_helper.from_array(ONE, "one"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, inputs, [name])], name, [], [onnx.ValueInfoProto(name=name)]
        )
        for name, op, inputs in (
            ("then", "BatchNormalization", ["x", "s", "s", "s", "s"]),
            ("else", "Exp", ["x"]),
        )
    }
    choice = helper.make_node("If", ["flag"], ["y"], **branches)
    imports = [helper.make_opsetid("", 21)]
    proto.functions.append(
        helper.make_function("local", "norm", ["x", "s", "flag"], ["y"], [choice], imports)
    )
    proto.graph.node[-1].CopyFrom(helper.make_node("norm", ["d", "one", "yes"], ["y"], domain="local"))
    assert not lacks_normalization(Model.load(proto))
    branches["then_branch"].node[0].CopyFrom(helper.make_node("Exp", ["x"], ["then"]))
    proto.functions[0].node[0].CopyFrom(helper.make_node("If", ["flag"], ["y"], **branches))
    assert lacks_normalization(Model.load(proto))


@pytest.mark.parametrize("folded", [False, True])
def test_exports_with_their_normalization_and_with_it_folded_away(folded: bool) -> None:
    torch.manual_seed(0)
    layers = [(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    network = nn.Sequential(*sum(layers, ())).eval()
    exported = torch.onnx.export(network, (torch.randn(2, 3, 6, 6),), optimize=folded, verbose=False)
    assert exported is not None
    model = Model.load(exported.model_proto)
    assert any(node.op == "BatchNormalization" for node in model.nodes) is not folded
    assert lacks_normalization(model) is folded


def test_what_normalizes_a_tensor() -> None:
    model = image(f"{CHAIN} e = Mul(d, factor) y = BatchNormalization(e, one, one, one, one)")
    found = {name: normalized_by(model, model.tensor(name)) for name in "xabcde"}
    assert found == {**dict.fromkeys("xabc"), "d": "BatchNormalization", "e": "BatchNormalization"}
