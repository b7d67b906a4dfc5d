"""kernel: zeros around a kernel and as much more padding, for every form of convolution; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.checker
import pytest
from channel_cases import CASES, close
from growth_checks import case_context, doubled, gradients, in_float64, wide
from nets import Feed, compute, context, net, normal, weight

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.passes.kernel import Kernel
from onnxfuse.pipeline.manager import PassManager
from onnxfuse.pipeline.recipe import make_pass
from onnxfuse.pipeline.records import StepReport
from onnxfuse.pytorch.bridge.importer import to_torch

# attributes, weights, one sample's shape, new size, then the pads it must have, begin and end
FORMS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int, list[int]]] = {
    "plain": ("Conv<pads=[1,1,1,1]>", (4, 3, 3, 3), (3, 7, 6), 5, [2, 2, 2, 2]),
    "no pads": ("Conv<kernel_shape=[3,3]>", (4, 3, 3, 3), (3, 7, 6), 7, [2, 2, 2, 2]),
    "from a point": ("Conv", (4, 3, 1, 1), (3, 7, 6), 3, [1, 1, 1, 1]),
    "by an odd number": ("Conv<pads=[1,1,1,1]>", (4, 3, 3, 3), (3, 7, 6), 6, [2, 2, 3, 3]),
    "an even kernel": ("Conv<strides=[2,2]>", (4, 3, 2, 2), (3, 8, 6), 4, [1, 1, 1, 1]),
    "not square": ("Conv<pads=[0,1,0,1]>", (4, 3, 1, 3), (3, 7, 6), 5, [2, 2, 2, 2]),
    "strides": ("Conv<pads=[1,0,0,1], strides=[2,3]>", (4, 3, 3, 3), (3, 9, 8), 5, [2, 1, 1, 2]),
    "dilations": ("Conv<pads=[2,3,2,3], dilations=[2,3]>", (4, 3, 3, 3), (3, 9, 8), 5, [4, 6, 4, 6]),
    "grouped": ("Conv<group=3, pads=[1,1,1,1]>", (6, 2, 3, 3), (6, 7, 6), 5, [2, 2, 2, 2]),
    "depthwise": ("Conv<group=3, pads=[1,1,1,1]>", (6, 1, 3, 3), (3, 7, 6), 5, [2, 2, 2, 2]),
    "one axis": ("Conv<pads=[1,1], dilations=[3]>", (4, 3, 3), (3, 20), 5, [4, 4]),
    "three axes": ("Conv<pads=[1,0,1,1,0,1]>", (4, 2, 3, 1, 3), (2, 4, 5, 5), 3, [1, 1, 1, 1, 1, 1]),
    "same, upper": ('Conv<auto_pad="SAME_UPPER">', (4, 3, 2, 3), (3, 7, 6), 5, [1, 2, 3, 2]),
    "same, lower": ('Conv<auto_pad="SAME_LOWER">', (4, 3, 2, 3), (3, 7, 6), 5, [2, 2, 2, 2]),
    "same with strides": (
        'Conv<auto_pad="SAME_UPPER", strides=[2,2]>',
        (4, 3, 3, 3),
        (3, 7, 6),
        5,
        [2, 1, 2, 2],
    ),
    "valid": ('Conv<auto_pad="VALID">', (4, 3, 3, 3), (3, 7, 6), 5, [1, 1, 1, 1]),
    "transposed": (
        "ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,0], dilations=[1,2]>",
        (3, 4, 3, 3),
        (3, 5, 6),
        5,
        [2, 3, 2, 3],
    ),
    "transposed, grouped": (
        "ConvTranspose<group=2, strides=[3,2]>",
        (4, 3, 2, 2),
        (4, 5, 6),
        5,
        [1, 1, 2, 2],
    ),
}


def enlarged(model: Model, feed: Feed, sites: dict[str, int]) -> tuple[Model, StepReport]:
    """By the pass manager, which verifies it."""
    outcome = PassManager([Kernel(sites=sites)]).run(model, context(model, feed))
    assert outcome.steps[0].committed, outcome.steps[0].reason
    return outcome.model, outcome.steps[0]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_convolution(form: str) -> None:
    op, shape, sample, size, pads = FORMS[form]
    rank = len(sample)
    sizes = ",".join(["N", *map(str, sample)])
    y = f"float[{','.join('ABCDE'[: rank + 1])}] y"
    model = net(f"h = {op}(x, w) y = Relu(h)", {"w": shape}, f"float[{sizes}] x", y)
    result, step = enlarged(model, {"x": normal(16, *sample)}, {"all": size})
    old, new = weight(model, "w"), weight(result, "w")
    assert new.shape == (*old.shape[:2], *[size] * (rank - 1))
    begin = [(size - k) // 2 for k in old.shape[2:]]
    middle = (slice(None), slice(None), *(slice(b, b + k) for b, k in zip(begin, old.shape[2:], strict=True)))
    np.testing.assert_array_equal(new[middle], old)
    assert np.count_nonzero(new) == np.count_nonzero(old)
    node = result.nodes[0]
    assert node.attrs["pads"] == pads
    assert "auto_pad" not in node.attrs
    assert node.attrs.get("kernel_shape", [size] * (rank - 1)) == [size] * (rank - 1)
    assert len(step.changes) == 1
    onnx.checker.check_model(result.to_proto(), full_check=True)
    for batch in (1, 3):
        feed = {"x": normal(batch, *sample, seed=batch)}
        close(compute(result, feed)[0], compute(model, feed)[0])


@pytest.mark.parametrize("name", CASES)
def test_exact_on_every_kind_of_graph(name: str) -> None:
    case = CASES[name]
    model = case.model()
    outcome = PassManager([Kernel()]).run(model, case_context(case, model))
    (step,) = outcome.steps
    assert step.committed, step.reason
    kernels = {n.inputs[1].name for n in model.nodes if n.op in ("Conv", "ConvTranspose")}
    assert len(step.changes) == len(kernels)
    for kernel in kernels:
        assert weight(outcome.model, kernel).shape[2:] == (5, 5)
    for batch in (1, 4):
        feed = case.feed(model, batch, seed=batch)
        close(compute(outcome.model, feed)[0], compute(model, feed)[0])
    wider = doubled(model)
    if kernels:
        result = Kernel().run(wider.copy(), case_context(case, model)).model
        feed = wide(case.feed(model, 3))
        got, expected = in_float64(result, feed)[0], in_float64(wider, feed)[0]
        assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def test_five_times_over() -> None:
    model = grown = CASES["plain"].model()
    feed = CASES["plain"].feed(model, 16)
    for size in (4, 5, 6, 7, 9):
        grown, _ = enlarged(grown, feed, {"*": size})
    assert weight(grown, "w1").shape == (8, 3, 9, 9)
    close(compute(grown, feed)[0], compute(model, feed)[0])


def test_new_taps_learn_at_once() -> None:
    case = CASES["plain"]
    model = case.model()
    grown = Kernel().run(model.copy(), case_context(case, model)).model
    found = gradients(to_torch(grown), case.feed(model, 8), ["x"], 0)
    for name in ("w1", "w2"):
        new = weight(grown, name) == 0
        assert new.sum() > new.size / 2
        assert (found[name][new] != 0).mean() > 0.9


SHARED = "a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv(b, w) d = Relu(c) "


def shared(more: str = "y = Relu(d)", **weights: Any) -> Model:
    return net(SHARED + more, {"w": (3, 3, 3, 3), **weights}, "float[N,3,8,8] x", "float[A,B,C,D] y")


def test_a_shared_kernel_grows_once_and_all_its_users_are_padded() -> None:
    model = shared()
    result, step = enlarged(model, {"x": normal(16, 3, 8, 8)}, {"c": 5})
    assert [change.nodes for change in step.changes] == [("a", "c")]
    assert [n.attrs["pads"] for n in result.nodes if n.op == "Conv"] == [[2] * 4, [1] * 4]


@pytest.mark.parametrize(
    ("model", "site", "message"),
    [
        (shared(), {"a": 3}, "its kernel is 3x3 already"),
        (shared(), {"a": 2}, "its kernel is 3x3 already"),
        (shared("v = Mul(d, w) y = Relu(v)"), {"a": 5}, r"'v' \(Mul\) uses 'w', too"),
        (
            net(
                'h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) y = Relu(h)',
                {"w": (4, 3, 3, 3)},
                "float[N,3,H,W] x",
                "float[A,B,C,D] y",
            ),
            {"h": 5},
            r"the pads of 'h' \(Conv\) depend on sizes that aren't fixed",
        ),
        (
            net(
                'h = ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) y = Relu(h)',
                {"w": (3, 4, 3, 3)},
                "float[N,3,8,8] x",
                "float[A,B,C,D] y",
            ),
            {"h": 5},
            r"the pads of 'h' \(ConvTranspose\) depend on sizes",
        ),
        (
            net(
                "v = Exp(w) h = Conv(x, v) y = Relu(h)",
                {"w": (4, 3, 3, 3)},
                "float[N,3,8,8] x",
                "float[A,B,C,D] y",
            ),
            {"h": 5},
            "the weight 'v' is computed, not constant",
        ),
    ],
)
def test_refusals(model: Model, site: dict[str, int], message: str) -> None:
    feed = {"x": normal(16, 3, 8, 8)}
    with pytest.raises(NotApplicableError, match=f"can't be given a larger kernel: {message}"):
        Kernel(sites=site).run(model.copy(), context(model, feed))
    found = Kernel(sites={"*": next(iter(site.values()))}).run(model.copy(), context(model, feed))
    assert not found.changes
    assert len(found.skipped) == len(found.notes) == 1


def test_a_model_without_convolutions() -> None:
    model = net("y = MatMul(x, w)", {"w": (6, 3)})
    found = Kernel().run(model.copy(), context(model, {"x": normal(8, 6)}))
    assert found.notes == ["there is nothing to enlarge"]


def test_bad_options() -> None:
    with pytest.raises(InputError, match="should be greater than 1"):
        make_pass("kernel", {"sites": {"a": 1}})
    model = shared()
    with pytest.raises(InputError, match="there is no convolution 'k'; known: a"):
        Kernel(sites={"k": 5}).run(model.copy(), context(model, {"x": normal(16, 3, 8, 8)}))
