"""Losses: the numbers are torch's own, of what the graph says its outputs are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import RUNTIME, compute, net, normal, perturbed
from torch import Tensor
from torch.nn import functional as F

from onnxfuse.data.calibration import Batch, Calibration
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.training.objective import Objective, make_objective
from onnxfuse.pytorch.training.sampling import Pool
from onnxfuse.pytorch.training.scores import find_scores

MLP = "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)"
WEIGHTS = {"w1": (6, 16), "w2": (16, 4)}
X = normal(40, 6)
CLASSES = np.random.default_rng(0).integers(0, 4, 40)


def mlp(tail: str = "", opset: int = 17) -> Model:
    """Two layers; `tail` makes `y` out of `logits`."""
    body = MLP if not tail else MLP.replace("y =", "logits =") + tail
    return net(body, WEIGHTS, opset=opset)


def pools(model: Model, data: Any, held_out: float = 0.0) -> list[Pool]:
    calibration = Calibration.open(data, model, held_out=held_out, batch_size=16)
    parts = [calibration.fit, *([calibration.held_out] if held_out else [])]
    return [Pool(part, model.inputs) for part in parts]


def objective(
    model: Model, data: Any, kind: str | None = None, held_out: float = 0.0, **more: Any
) -> Objective:
    return make_objective(kind, model, pools(model, data, held_out), RUNTIME, size=16, **more)


def losses(
    found: Objective, model: Model, feed: dict[str, np.ndarray], labels: np.ndarray | None = None
) -> Tensor:
    """The objective of a model's own tensors, by a session of the test's."""
    tensors = dict(zip(found.tensors, compute(model, feed, *found.tensors), strict=True))
    outputs = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return found(outputs, Batch(feed, labels, 0, len(next(iter(feed.values())))))


def tensor(model: Model, name: str, x: np.ndarray = X) -> Tensor:
    return torch.from_numpy(compute(model, {"x": x}, name)[0])


# --- cross-entropy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "taken"),
    [
        ("", "y"),
        ("y = Softmax<axis=-1>(logits)", "logits"),
        ("p = Softmax<axis=1>(logits) y = Identity(p)", "logits"),
        ("y = LogSoftmax<axis=-1>(logits)", "y"),
    ],
)
@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_cross_entropy(tail: str, taken: str, shape: tuple[int, ...]) -> None:
    model = mlp(tail)
    labels = CLASSES.reshape(shape)
    found = objective(model, {"x": X, "labels": labels})
    assert found.tensors == (taken,)
    expected = F.cross_entropy(tensor(mlp(), "y"), torch.from_numpy(CLASSES), reduction="none")
    torch.testing.assert_close(losses(found, model, {"x": X}, labels), expected)


def test_probabilities_behind_more_than_a_softmax_count_by_their_logarithm() -> None:
    model = mlp("p = Softmax<axis=-1>(logits) y = Clip(p)")
    found = objective(model, {"x": X, "labels": CLASSES})
    assert found.tensors == ("y",)
    assert "probabilities" in found.about[0]
    expected = F.cross_entropy(tensor(mlp(), "y"), torch.from_numpy(CLASSES), reduction="none")
    torch.testing.assert_close(losses(found, model, {"x": X}, CLASSES), expected)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint16", "bool"])
def test_types_of_class_numbers(kind: str) -> None:
    labels = (CLASSES % 2).astype(kind)
    found = objective(mlp(), {"x": X, "labels": labels})
    expected = F.cross_entropy(tensor(mlp(), "y"), torch.from_numpy(CLASSES % 2), reduction="none")
    torch.testing.assert_close(losses(found, mlp(), {"x": X}, labels), expected)


@pytest.mark.parametrize(
    ("shape", "body", "axis", "labels"),
    [
        ((8, 5, 3), "y = Identity(x)", 2, (8, 5)),  # tokens
        ((8, 3, 4, 5), "y = Identity(x)", 1, (8, 4, 5)),  # images
        ((8, 3, 1, 1), "y = Identity(x)", 1, (8,)),
        ((8, 3, 5), "y = Softmax<axis=1>(x)", 1, (8, 5)),
        ((8, 4, 5, 3), "y = Softmax<axis=-1>(x)", 3, (8, 4, 5)),
    ],
)
def test_the_axis_of_the_classes(
    shape: tuple[int, ...], body: str, axis: int, labels: tuple[int, ...]
) -> None:
    dims = ",".join(["N", *map(str, shape[1:])])
    model = net(body, {}, x=f"float[{dims}] x", y=f"float[{dims}] y")
    x, truth = normal(*shape), np.random.default_rng(1).integers(0, 3, labels)
    found = objective(model, {"x": x, "labels": truth})
    assert found.about[0].endswith(f"3 classes on axis {axis}")
    flat = np.moveaxis(x, axis, -1).reshape(-1, 3)
    each = F.cross_entropy(torch.from_numpy(flat), torch.from_numpy(truth.reshape(-1)), reduction="none")
    torch.testing.assert_close(losses(found, model, {"x": x}, truth), each.reshape(8, -1).mean(1))


def test_a_softmax_over_several_axes_is_not_taken_off() -> None:
    """Before operator set 13 a Softmax normalises all axes from its own on."""
    model = net("y = Softmax<axis=1>(x)", {}, x="float[N,5,3] x", y="float[N,5,3] y", opset=11)
    array = compute(model, {"x": normal(8, 5, 3)})[0]
    scores = find_scores(model, "y", {"y": array})
    assert scores is not None
    assert (scores.tensor, scores.axis, scores.probabilities) == ("y", 2, False)
    one = net("y = Softmax<axis=1>(x)", {}, x="float[N,5,1] x", y="float[N,5,1] y", opset=11)
    scores = find_scores(one, "y", {"y": compute(one, {"x": normal(8, 5, 1)})[0]})
    assert scores is not None
    assert (scores.tensor, scores.axis) == ("x", 1)


def test_the_first_output_that_fits() -> None:
    body = f"{MLP} e = ReduceSum<keepdims=1>(y, axes) n = Shape(x)"
    model = net(body, {**WEIGHTS, "axes": np.array([1])}, y="int64[2] n, float[N,1] e, float[N,4] y")
    assert objective(model, {"x": X, "labels": CLASSES}).tensors == ("y",)


# --- labels -------------------------------------------------------------------------------------------------


def bad_labels(value: Any, row: int = 17, kind: str = "int64") -> dict[str, np.ndarray]:
    labels = CLASSES.astype(kind)
    labels[row] = value
    return {"x": X, "labels": labels}


@pytest.mark.parametrize("held_out", [0.0, 0.4])
@pytest.mark.parametrize("value", [4, -1, 255])
@pytest.mark.parametrize("row", [0, 17, 39])
def test_labels_out_of_range(value: int, row: int, held_out: float) -> None:
    said = f"'l.npz' array 'y' holds {value} in row {row}, output 'y' has the classes 0 to 3"
    with pytest.raises(InputError, match=said):
        objective(mlp(), bad_labels(value, row), "ce", held_out, name="'l.npz' array 'y'")


def test_labels_out_of_range_in_a_feed() -> None:
    feeds = [{"x": X[:3], "labels": np.array([0, 1, 2])}, {"x": X[:2], "labels": np.array([3, 9])}]
    with pytest.raises(InputError, match="holds 9 in row 1 of feed 1"):
        objective(mlp(), feeds)


def test_labels_that_are_no_classes() -> None:
    with pytest.raises(InputError, match=r"holds 0\.5 in row 17: --loss ce wants class numbers as integers"):
        objective(mlp(), bad_labels(0.5, 17, "float32"), "ce")
    with pytest.raises(InputError, match=r"is float64: .*astype\('int64'\)"):
        objective(mlp(), {"x": X, "labels": CLASSES.astype(np.float64)}, "ce")
    with pytest.raises(
        InputError, match=r"of shape \[16, 2\] holds no class numbers of any output: 'y' \[16, 4\]"
    ):
        objective(mlp(), {"x": X, "labels": np.zeros((40, 2), np.int64)}, "ce")
    with pytest.raises(InputError, match="--loss ce needs labels"):
        objective(mlp(), {"x": X}, "ce")
    with pytest.raises(InputError, match="nothing to train for: give labels as an array 'labels'"):
        objective(mlp(), {"x": X})


@pytest.mark.parametrize("kind", ["int64", "float32", "bool"])
def test_one_hot_labels_are_told_how_to_become_classes(kind: str) -> None:
    data = {"x": X, "labels": np.eye(4)[CLASSES].astype(kind)}
    for loss in ("ce", None):
        with pytest.raises(
            InputError, match=r"one-hot: --loss ce wants class numbers, as labels\.argmax\(-1\)"
        ):
            objective(mlp(), data, loss)


# --- squared error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", [normal(40, 4, seed=3), normal(40, 1, 4, seed=3), np.eye(4, dtype=np.int64)[CLASSES]]
)
def test_squared_error_of_labels(labels: np.ndarray) -> None:
    kind = None if labels.dtype.kind == "f" else "mse"
    found = objective(mlp(), {"x": X, "labels": labels}, kind)
    target = torch.from_numpy(labels.reshape(40, 4)).float()
    expected = F.mse_loss(tensor(mlp(), "y"), target, reduction="none").mean(1)
    torch.testing.assert_close(losses(found, mlp(), {"x": X}, labels), expected)


def test_squared_error_of_labels_that_fit_nothing() -> None:
    with pytest.raises(InputError, match=r"of shape \[16, 3\] has the shape of no output: 'y' \[16, 4\]"):
        objective(mlp(), {"x": X, "labels": normal(40, 3)})


def test_squared_error_of_a_teacher() -> None:
    two = net(f"{MLP} z = Sigmoid(h)", WEIGHTS, y="float[N,4] y, float[N,16] z")
    teacher = perturbed(two, "w1", "w2")
    found = make_objective("mse", two, pools(two, {"x": X}), RUNTIME, size=40, teacher=teacher)
    assert found.tensors == ("y", "z")
    each = []
    for name in ("y", "z"):
        ours, theirs = (tensor(model, name).double().numpy() for model in (two, teacher))
        each.append(relative(ours, theirs, theirs))
    np.testing.assert_allclose(losses(found, two, {"x": X}).numpy(), each[0] + each[1], rtol=1e-4)


# --- distillation -------------------------------------------------------------------------------------------


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hinton's: KL(teacher || student) of the softened classes, times T squared."""
    p = torch.softmax(teacher.double() / 2, -1)
    return ((p * (p.log() - torch.log_softmax(student.double() / 2, -1))).sum(-1) * 4).float()


@pytest.mark.parametrize(("tail", "taken"), [("", "y"), ("y = Softmax<axis=-1>(logits)", "logits")])
def test_distillation_of_classes(tail: str, taken: str) -> None:
    model = mlp(tail)
    teacher = perturbed(model, "w1", "w2")
    found = objective(model, {"x": X}, teacher=teacher)
    assert found.tensors == (taken,)
    assert "divergence" in found.about[0]
    expected = kl(tensor(model, taken), tensor(teacher, taken))
    assert expected.mean() > 0.01
    torch.testing.assert_close(losses(found, model, {"x": X}), expected, rtol=1e-4, atol=1e-6)


def relative(student: np.ndarray, teacher: np.ndarray, everything: np.ndarray) -> np.ndarray:
    """Squared error of each sample over the teacher's variance about its mean over the samples."""
    variance = np.square(everything - everything.mean(0)).sum() / ((len(everything) - 1) * everything[0].size)
    return np.square(student - teacher).reshape(len(student), -1).mean(1) / variance


@pytest.mark.parametrize(
    "tail", ["y = Sigmoid(logits)", "t = Tanh(logits) y = Identity(t)", "y = Relu(logits)"]
)
def test_distillation_of_other_outputs_is_relative(tail: str) -> None:
    """The scale is the teacher's variance: measured on batches of 16, here with all samples in one."""
    model = mlp(tail.replace("t = Tanh(logits) y = Identity(t)", "y = Tanh(logits)"))
    teacher = perturbed(model, "w1", "w2")
    parts = pools(model, {"x": X})
    found = make_objective(None, model, parts, RUNTIME, size=40, teacher=teacher)
    y, t = (compute(m, {"x": X})[0].astype(np.float64) for m in (model, teacher))
    np.testing.assert_allclose(losses(found, model, {"x": X}).numpy(), relative(y, t, t), rtol=1e-4)
    assert "relative squared error of output 'y'" in found.about[0]


@pytest.mark.parametrize("activation", ["Gelu", "Swish", "Mish", "Selu", "Celu", "ThresholdedRelu"])
def test_no_class_scores_behind_an_activation(activation: str) -> None:
    model = mlp(f"y = {activation}(logits)", opset=24 if activation == "Swish" else 20)
    found = objective(model, {"x": X}, teacher=perturbed(model, "w1", "w2"))
    assert "relative squared error of output 'y'" in found.about[0]


def test_float_labels_make_no_classes_of_an_output() -> None:
    teacher = perturbed(mlp(), "w2")
    found = objective(mlp(), {"x": X, "labels": normal(40, 4)}, teacher=teacher)
    assert "relative" in found.about[0]
    assert "divergence" in objective(mlp(), {"x": X, "labels": CLASSES}, teacher=teacher).about[0]


def test_distillation_of_tokens() -> None:
    """(n, tokens, classes) holds class scores where class numbers fit it, and may be features where not."""
    body = {"x": "float[N,5,6] x", "y": "float[N,5,4] y"}
    model = net(MLP, WEIGHTS, **body)
    teacher = perturbed(model, "w1", "w2")
    x, labels = normal(40, 5, 6), np.random.default_rng(1).integers(0, 4, (40, 5))
    found = objective(model, {"x": x, "labels": labels}, teacher=teacher)
    assert "divergence" in found.about[0]
    expected = kl(tensor(model, "y", x), tensor(teacher, "y", x)).mean(1)
    torch.testing.assert_close(losses(found, model, {"x": x}, labels), expected, rtol=1e-4, atol=1e-6)
    assert "relative" in objective(model, {"x": x}, teacher=teacher).about[0]
    each = objective(model, {"x": x, "labels": labels[:, 0]}, teacher=teacher)
    assert "relative" in each.about[0]


def test_one_column_is_no_class() -> None:
    """The divergence of a single class is always 0."""
    model = net("y = MatMul(x, w)", {"w": (6, 1)})
    found = objective(model, {"x": X}, teacher=perturbed(model, "w"))
    assert "relative" in found.about[0]
    assert losses(found, model, {"x": X}).min() > 0


def test_a_softmax_in_one_of_the_two_only() -> None:
    plain, ended = mlp(), mlp("y = Softmax<axis=-1>(logits)")
    for model, teacher in ((plain, ended), (ended, plain)):
        found = objective(model, {"x": X}, teacher=teacher)
        assert found.tensors == ("y",)
        assert "relative" in found.about[0]


def test_a_teacher_that_never_varies() -> None:
    model = net("y = Mul(x, w)", {"w": np.full(6, 0.5, np.float32)}, y="float[N,6] y")
    constant = net(
        "z = Mul(x, w) y = Add(z, c)",
        {"w": np.zeros(6, np.float32), "c": np.full(6, 3, np.float32)},
        y="float[N,6] y",
    )
    labels = {"x": X, "labels": X}  # floats: the output is no class
    found = objective(model, labels, "distill", teacher=constant)
    expected = np.square(0.5 * X - 3).mean(1) / 9
    np.testing.assert_allclose(losses(found, model, {"x": X}).numpy(), expected, rtol=1e-5)


def test_matched_tensors() -> None:
    model = mlp()
    other = net(MLP.replace("h", "g").replace("r =", "s =").replace("(r,", "(s,"), WEIGHTS)
    teacher = perturbed(other, "w1")
    parts = pools(model, {"x": X})
    found = make_objective("distill", model, parts, RUNTIME, size=40, teacher=teacher, match=["h=g", "r=s"])
    assert found.tensors == ("y", "h", "r")
    assert found.about[1] == "relative squared error of tensor 'h' against the teacher's 'g'"
    expected = kl(tensor(model, "y"), tensor(teacher, "y")).numpy().astype(np.float64)
    for ours, theirs in (("h", "g"), ("r", "s")):
        mine, target = (tensor(m, n).double().numpy() for m, n in ((model, ours), (teacher, theirs)))
        expected += relative(mine, target, target)
    np.testing.assert_allclose(losses(found, model, {"x": X}).numpy(), expected, rtol=1e-4)
    both = objective(model, {"x": X, "labels": CLASSES}, "ce", teacher=perturbed(model, "w1"), match=["h"])
    assert both.tensors == ("y", "h")


def test_what_has_no_axis_of_samples_counts_as_a_whole() -> None:
    model = net(
        "t = Transpose<perm=[1,0]>(x) y = Mul(t, w)", {"w": np.ones((6, 1), np.float32)}, y="float[6,N] y"
    )
    teacher = perturbed(model, "w")
    found = make_objective("mse", model, pools(model, {"x": X}), RUNTIME, size=40, teacher=teacher)
    target = tensor(teacher, "y")
    expected = F.mse_loss(tensor(model, "y"), target) / target.var()
    torch.testing.assert_close(losses(found, model, {"x": X}), expected.reshape(1))
    mixed = net(
        "t = Transpose<perm=[1,0]>(x) y = Mul(t, w) z = Relu(x)",
        {"w": np.ones((6, 1), np.float32)},
        y="float[6,N] y, float[N,6] z",
    )
    found = make_objective(
        "mse", mixed, pools(mixed, {"x": X}), RUNTIME, size=40, teacher=perturbed(mixed, "w")
    )
    torch.testing.assert_close(losses(found, mixed, {"x": X}), expected.reshape(1))


# --- teachers that don't fit --------------------------------------------------------------------------------


def test_teachers_that_do_not_fit() -> None:
    model = mlp()
    wide = net("y = MatMul(x, w)", {"w": (6, 5)})
    renamed = net(MLP.replace("y =", "z ="), WEIGHTS, y="float[N,4] z")
    more = net(f"{MLP} z = Relu(y)", WEIGHTS, y="float[N,4] y, float[N,4] z")
    other = net("y = MatMul(a, w)", {"w": (6, 4)}, x="float[N,6] a")
    with pytest.raises(
        InputError, match=r"'y' has shape \[16, 4\] in the model and 'y' \[16, 5\] in the teacher"
    ):
        objective(model, {"x": X}, teacher=wide)
    for teacher, said in (
        (renamed, "output 'y' is in the model and not in the teacher"),
        (more, "output 'z' is in the teacher and not in the model"),
        (other, "input 'x' is in the model and not in the teacher"),
    ):
        with pytest.raises(InputError, match=f"the teacher does not fit: {said}"):
            objective(model, {"x": X}, teacher=teacher)


def test_wishes_that_cannot_be_had() -> None:
    model, teacher = mlp(), perturbed(mlp(), "w1")
    data = {"x": X, "labels": CLASSES}
    with pytest.raises(InputError, match="--loss distill needs a --teacher"):
        objective(model, data, "distill")
    with pytest.raises(InputError, match="--match needs a --teacher"):
        objective(model, data, match=["h"])
    with pytest.raises(InputError, match="--loss ce learns nothing from the teacher"):
        objective(model, data, "ce", teacher=teacher)
    with pytest.raises(InputError, match="there is no tensor of the model named 'hh'; did you mean 'h'"):
        objective(model, data, teacher=teacher, match=["hh"])
    with pytest.raises(InputError, match="there is no tensor of the teacher named 'rr'"):
        objective(model, data, teacher=teacher, match=["h=rr"])
    with pytest.raises(
        InputError, match=r"'h' has shape \[16, 16\] in the model and 'y' \[16, 4\] in the teacher"
    ):
        objective(model, data, teacher=teacher, match=["h=y"])
    with pytest.raises(InputError, match="there is no loss 'hinge'"):
        objective(model, data, "hinge")


def test_nothing_but_integers_comes_out() -> None:
    model = net(f"{MLP} c = ArgMax<axis=1>(y)", WEIGHTS, y="int64[N,1] c")
    with pytest.raises(NotApplicableError, match="no output of the model is floating-point"):
        objective(model, {"x": X, "labels": CLASSES})
