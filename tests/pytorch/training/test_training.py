"""The training loop beside a plain one written by hand around a native module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from nets import net, normal
from torch import Tensor, nn
from torch.nn import functional as F

from onnxfuse.data.calibration import Batch
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch
from onnxfuse.pytorch.training.training import OPTIMIZERS, Settings, Trained, learning_rate, train
from onnxfuse.verification.metrics import top1

RANDOM = np.random.default_rng(0)
X = normal(60, 3, 6, 6)
LABELS = RANDOM.integers(0, 4, 60)

CNN = """c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1)
n = BatchNormalization<momentum = 0.8>(c, s, o, m, v) r = Relu(n)
p = GlobalAveragePool(r) f = Flatten(p) y = Gemm<transB = 1>(f, w2, b2)"""
WEIGHTS = {
    "w1": (8, 3, 3, 3),
    "b1": normal(8, seed=5) * np.float32(0.1),
    "s": np.linspace(0.5, 1.5, 8, dtype=np.float32),
    "o": normal(8, seed=6) * np.float32(0.1),
    "m": normal(8, seed=7) * np.float32(0.1),
    "v": np.linspace(0.5, 2, 8, dtype=np.float32),
    "w2": (4, 8),
    "b2": normal(4, seed=8) * np.float32(0.1),
}
NATIVE = {"w1": "0.weight", "b1": "0.bias", "s": "1.weight", "o": "1.bias", "m": "1.running_mean",
          "v": "1.running_var", "w2": "5.weight", "b2": "5.bias"}  # fmt: skip


def cnn() -> Model:
    return net(CNN, WEIGHTS, x="float[N,3,6,6] x", y="float[N,4] y")


def native() -> nn.Sequential:
    """The same network in plain torch."""
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))  # fmt: skip
    state = to_torch(cnn()).state_dict()
    layers.load_state_dict({NATIVE[key]: value for key, value in state.items()}, strict=False)
    return layers


class Fixed:
    """The same batches of ten in every epoch, first row first."""

    steps = 6

    def epoch(self, number: int) -> Iterator[Batch]:
        for step in range(self.steps):
            rows = slice(10 * step, 10 * step + 10)
            yield Batch({"x": X[rows]}, LABELS[rows], step, 10)


class CrossEntropy:
    """An objective that writes down every training step's loss; `change` may spoil it."""

    tensors = ("y",)

    def __init__(self, change: Callable[[Tensor, int], Tensor] = lambda loss, step: loss) -> None:
        self.losses: list[float] = []
        self.change = change

    def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        assert batch.labels is not None
        loss = F.cross_entropy(outputs["y"].float(), torch.from_numpy(batch.labels), reduction="none")
        if torch.is_grad_enabled():
            loss = self.change(loss, len(self.losses))
            self.losses.append(float(loss.detach().mean()))
        return loss


HELD = [Batch({"x": X[40:53]}, LABELS[40:53], 0, 13), Batch({"x": X[53:]}, LABELS[53:], 1, 7)]


def run(module: nn.Module, objective: Any = None, **more: Any) -> Trained:
    settings = {key: more.pop(key) for key in list(more) if key in Settings.__dataclass_fields__}
    return train(module, Fixed(), objective or CrossEntropy(), Settings(**settings), **more)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


# --- the same numbers as a plain loop -----------------------------------------------------------------------


def plain_loop(layers: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> list[float]:
    """What anybody would write: warm-up and cosine by torch's own schedulers, gradients clipped to 1;
    and torch's own way to running statistics of the last weights."""
    total = 6 * epochs
    warm = max(1, round(0.05 * total))
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / warm)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warm)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warm])
    losses = []
    layers.train()
    for step in range(total):
        rows = slice(10 * (step % 6), 10 * (step % 6) + 10)
        loss = F.cross_entropy(layers(torch.from_numpy(X[rows])), torch.from_numpy(LABELS[rows]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    torch.optim.swa_utils.update_bn([torch.from_numpy(X[at : at + 10]) for at in range(0, 60, 10)], layers)
    return losses


@pytest.mark.parametrize("epochs", [1, 8])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_step_as_in_a_plain_loop(name: str, epochs: int) -> None:
    layers = native()
    decayed = [layers[0].weight, layers[5].weight]
    others = [layers[0].bias, layers[1].weight, layers[1].bias, layers[5].bias]
    rate, decay = 0.02, 0.3
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = (
        torch.optim.AdamW(groups, lr=rate)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    )
    expected = plain_loop(layers, optimizer, epochs)
    module, objective = to_torch(cnn()), CrossEntropy()
    found = run(module, objective, optimizer=name, lr=rate, weight_decay=decay, epochs=epochs)
    assert len(objective.losses) == len(expected) == 6 * epochs
    np.testing.assert_allclose(objective.losses, expected, rtol=1e-5)
    for key, path in NATIVE.items():
        torch.testing.assert_close(module.state_dict()[key], layers.state_dict()[path], rtol=1e-4, atol=1e-6)
    means = [np.mean(expected[6 * number : 6 * number + 6]) for number in range(epochs)]
    np.testing.assert_allclose([epoch.loss for epoch in found.history[1:]], means, rtol=1e-5)
    assert [epoch.number for epoch in found.history] == list(range(epochs + 1))
    assert (found.best, found.resumed, found.stopped, found.diverged) == (epochs, None, None, False)


def test_learning_rates() -> None:
    settings = Settings(lr=0.5)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert rates[5:] == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 95)) for step in range(95)])
    assert rates[-1] < 2e-4
    assert learning_rate(settings, 0, 1) == 0.5
    assert [Settings(optimizer=name).rate for name in OPTIMIZERS] == [1e-4, 1e-3]
    assert [Settings(optimizer=name).decay for name in OPTIMIZERS] == [1e-2, 1e-4]


# --- the held-out loss --------------------------------------------------------------------------------------


def held_out_loss(module: nn.Module) -> tuple[float, float]:
    """Loss and accuracy in eval mode, by hand."""
    with torch.no_grad():
        y = module.eval()(torch.from_numpy(X[40:]))
    labels = torch.from_numpy(LABELS[40:])
    return float(F.cross_entropy(y, labels)), float((y.argmax(1) == labels).double().mean())


def test_held_out_figures_and_the_best_epoch() -> None:
    """Trained on labels that are none of the held-out ones, the loss there falls and then rises."""
    module = to_torch(cnn())
    start = held_out_loss(module)
    states = {}
    found = run(
        module, lr=0.1, epochs=12, held_out=HELD, metric=top1,
        keep=lambda state: states.update({len(state["history"]) - 1: copy.deepcopy(state["module"])}),
    )  # fmt: skip
    losses = [epoch.held_out for epoch in found.history]
    assert (found.history[0].held_out, found.history[0].metric) == pytest.approx(start)
    assert found.history[0].loss is None
    assert found.best == int(np.argmin(losses))
    for number, state in states.items():
        module.load_state_dict(state)
        epoch = found.history[number]
        assert (epoch.held_out, epoch.metric) == pytest.approx(held_out_loss(module))


def test_the_module_ends_with_the_best_weights() -> None:
    """From the fifth epoch on the loss is turned round, so that the network gets worse again."""
    module = to_torch(cnn())
    found = run(
        module,
        CrossEntropy(lambda loss, step: loss if step < 24 else -loss),
        lr=0.05,
        epochs=8,
        held_out=HELD,
    )
    assert 0 < found.best < 8
    assert held_out_loss(module)[0] == pytest.approx(found.history[found.best].held_out)
    assert not module.training
    worse = run(to_torch(cnn()), CrossEntropy(lambda loss, step: -loss), lr=0.05, epochs=2, held_out=HELD)
    assert worse.best == 0


def test_a_start_that_is_best_is_restored_with_its_statistics() -> None:
    module = to_torch(cnn())
    before = state_of(module)
    found = run(module, CrossEntropy(lambda loss, step: -loss), lr=0.05, epochs=2, held_out=HELD)
    assert found.best == 0
    assert same(before, module.state_dict())


def test_patience() -> None:
    turned = CrossEntropy(lambda loss, step: -loss)
    found = run(to_torch(cnn()), turned, lr=0.05, epochs=9, patience=3, held_out=HELD)
    assert len(found.history) == 4
    assert (found.best, found.stopped) == (0, "the held-out loss has not improved for 3 epochs")
    assert not found.diverged
    assert run(to_torch(cnn()), turned, lr=0.05, epochs=3, patience=3, held_out=HELD).stopped is None


def test_without_held_out_samples_the_last_epoch_counts() -> None:
    found = run(to_torch(cnn()), epochs=3)
    assert [(epoch.held_out, epoch.metric) for epoch in found.history] == [(None, None)] * 4
    assert found.best == 3


# --- divergence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_the_best(value: float) -> None:
    module = to_torch(cnn())
    objective = CrossEntropy(lambda loss, step: loss if step < 15 else loss * value)
    found = run(module, objective, lr=0.05, epochs=8, held_out=HELD)
    assert len(objective.losses) == 16
    assert [epoch.number for epoch in found.history] == [0, 1, 2]
    assert found.diverged
    assert found.stopped == "the loss became NaN or infinite in epoch 3"
    assert found.best > 0
    assert held_out_loss(module)[0] == pytest.approx(found.history[found.best].held_out)


def test_a_gradient_that_is_no_number_stops() -> None:
    """The square root of 0 is 0; its slope is not."""
    objective = CrossEntropy(lambda loss, step: loss + (loss - loss).sqrt() if step == 8 else loss)
    found = run(to_torch(cnn()), objective, epochs=4)
    assert found.stopped == "the gradient became NaN or infinite in epoch 2"
    assert (found.best, found.diverged) == (1, True)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_absurd_learning_rate(name: str) -> None:
    module = to_torch(cnn())
    before = state_of(module)
    found = run(module, lr=1e30, optimizer=name, epochs=3, held_out=HELD)
    assert found.best == 0
    assert same(before, module.state_dict())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values())


def test_a_weight_that_is_no_number_after_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim, "SGD", Overflowing)
    monkeypatch.setattr(Fixed, "steps", 1)
    module = to_torch(cnn())
    before = state_of(module)
    found = run(module, optimizer="sgd", epochs=2)
    assert found.stopped == "a weight became NaN or infinite in epoch 1"
    assert (found.best, found.diverged) == (0, True)
    assert same(before, module.state_dict())


# --- what must not move -------------------------------------------------------------------------------------


def test_frozen_norms_keep_their_statistics_and_use_them() -> None:
    module = to_torch(cnn(), trainable=lambda weight: weight.name not in ("s", "o", "m", "v"))
    (norm,) = [inner for inner in module.modules() if type(inner).__name__ == "BatchNorm"]
    layers = native()
    for name in ("1.weight", "1.bias"):
        layers.get_parameter(name).requires_grad_(False)
    expected = []
    optimizer = torch.optim.SGD(
        [p for p in layers.parameters() if p.requires_grad], lr=0.1, momentum=0.9, nesterov=True
    )
    layers.train()
    layers[1].eval()
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(Settings(lr=0.1), step, 6)
        rows = slice(10 * step, 10 * step + 10)
        loss = F.cross_entropy(layers(torch.from_numpy(X[rows])), torch.from_numpy(LABELS[rows]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    before, objective = state_of(module), CrossEntropy()
    run(module, objective, lr=0.1, optimizer="sgd", weight_decay=0.0, epochs=1, frozen=[norm])
    np.testing.assert_allclose(objective.losses, expected, rtol=1e-5)
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in ("s", "o", "m", "v"))
    assert not any(torch.equal(before[key], after[key]) for key in ("w1", "b1", "w2", "b2"))
    run(module, epochs=1)
    assert not torch.equal(before["m"], module.state_dict()["m"])


def test_torch_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    random = torch.get_rng_state()
    run(to_torch(dropping()), epochs=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(InputError, match="there is nothing to train"):
        run(to_torch(cnn(), trainable=lambda weight: False), epochs=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.are_deterministic_algorithms_enabled()


# --- the same bytes -----------------------------------------------------------------------------------------


def dropping() -> Model:
    body = CNN.replace("y = Gemm<transB = 1>(f", "d = Dropout(f, ratio, yes) y = Gemm<transB = 1>(d")
    more = {"ratio": np.float32(0.4), "yes": np.array(True)}
    return net(body, {**WEIGHTS, **more}, x="float[N,3,6,6] x", y="float[N,4] y")


def test_dropout_is_drawn_from_the_seed_and_the_epoch() -> None:
    torch.manual_seed(1)
    first, second, other = CrossEntropy(), CrossEntropy(), CrossEntropy()
    modules = [to_torch(dropping()) for _ in range(3)]
    run(modules[0], first, epochs=2, lr=1e-12)
    torch.manual_seed(2)
    run(modules[1], second, epochs=2, lr=1e-12)
    run(modules[2], other, epochs=2, lr=1e-12, seed=1)
    assert first.losses == second.losses
    assert same(modules[0].state_dict(), modules[1].state_dict())
    assert first.losses != other.losses
    assert first.losses[:6] != pytest.approx(first.losses[6:], rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_training_ends_the_same(name: str, after: int) -> None:
    whole = to_torch(dropping())
    states: dict[int, Any] = {}

    def keep(state: Any) -> None:
        states[len(state["history"]) - 1] = copy.deepcopy(state)

    settings = {"lr": 0.05, "optimizer": name, "epochs": 4, "held_out": HELD, "metric": top1}
    expected = run(whole, keep=keep, **settings)
    assert sorted(states) == [1, 2, 3, 4]
    resumed = to_torch(dropping())
    found = run(resumed, resume=states[after], **settings)
    assert same(whole.state_dict(), resumed.state_dict())
    assert found.resumed == after
    assert found.best == expected.best
    for one, other in zip(found.history, expected.history, strict=True):
        assert (one.loss, one.held_out, one.metric) == (other.loss, other.held_out, other.metric)
    again = run(to_torch(dropping()), resume=states[4], **settings)
    assert (again.resumed, again.best, len(again.history)) == (4, expected.best, 5)


def test_a_training_that_had_stopped_is_not_resumed_beyond_that() -> None:
    states: list[Any] = []
    turned = CrossEntropy(lambda loss, step: -loss)
    settings = {"lr": 0.05, "epochs": 9, "patience": 2, "held_out": HELD}
    expected = run(
        to_torch(cnn()), turned, keep=lambda state: states.append(copy.deepcopy(state)), **settings
    )
    found = run(to_torch(cnn()), turned, resume=states[-1], **settings)
    assert (len(found.history), found.stopped) == (len(expected.history), expected.stopped)


# --- precision, outputs, failures ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision(precision: torch.dtype) -> None:
    """On the CPU, where it serves this test alone: close to float32, not equal, weights and judging in
    float32."""
    plain, mixed = CrossEntropy(), CrossEntropy()
    expected = run(to_torch(cnn()), plain, lr=0.01, epochs=2, held_out=HELD)
    module = to_torch(cnn())
    found = run(module, mixed, lr=0.01, epochs=2, held_out=HELD, precision=precision)
    assert mixed.losses != plain.losses
    np.testing.assert_allclose(mixed.losses, plain.losses, rtol=0.02)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    assert found.history[0].held_out == expected.history[0].held_out
    assert found.best == 2


def test_outputs_and_progress() -> None:
    """Inner tensors as outputs; the bar moves once a step and tells the last figures."""

    class Told:
        def __init__(self) -> None:
            self.tasks: list[tuple[str, float | None]] = []
            self.steps = 0

        def task(self, description: str, total: float | None = None) -> Callable[..., None]:
            self.tasks.append((description, total))
            return self.advance

        def advance(self, amount: float = 1) -> None:
            self.steps += 1

    class Inner:
        tensors = ("f",)

        def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
            assert sorted(outputs) == (["f"] if torch.is_grad_enabled() else ["f", "y"])
            return outputs["f"].square().mean()

    told = Told()
    module = to_torch(cnn(), outputs=["y", "f"])
    found = run(module, Inner(), epochs=2, held_out=HELD, metric=top1, progress=told)
    assert (told.steps, [total for _, total in told.tasks]) == (12, [6, 6])
    assert told.tasks[0][0].startswith("epoch 1/2 (held-out ")
    assert (
        f"loss {found.history[1].loss:.4g}, held-out {found.history[1].held_out:.4g}, metric "
        in told.tasks[1][0]
    )
    assert found.history[2].loss < found.history[1].loss


def test_nothing_to_train() -> None:
    module = to_torch(cnn(), outputs=["y", "f"])
    for key in ("w1", "b1", "s", "o"):
        module.get_parameter(key).requires_grad_(False)

    class Inner(CrossEntropy):
        tensors: Sequence[str] = ("f",)

        def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
            return outputs["f"].mean()

    with pytest.raises(InputError, match="nothing that is trained has an effect on the loss"):
        run(module, Inner(), epochs=1)


def test_a_single_value_for_batchnorm() -> None:
    body = "n = BatchNormalization(x, s, o, m, v) y = Gemm<transB = 1>(n, w2, b2)"
    model = net(
        body,
        {key: WEIGHTS[key] for key in ("s", "o", "m", "v", "w2", "b2")},
        x="float[N,8] x",
        y="float[N,4] y",
    )

    class Single(Fixed):
        def epoch(self, number: int) -> Iterator[Batch]:
            yield Batch({"x": normal(1, 8)}, LABELS[:1], 0, 1)

    with pytest.raises(InputError, match="give a larger --batch-size"):
        train(to_torch(model), Single(), CrossEntropy(), Settings(epochs=1))
