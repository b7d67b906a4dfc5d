"""Random small graphs of the usual parts: every cut equals the masked network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx.checker
from channel_cases import close, ints, norm, parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import RUNTIME, compute, context, net, normal

from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import find_groups
from onnxfuse.channels.masking import mask
from onnxfuse.ir.model import Model
from onnxfuse.passes.select import Select
from onnxfuse.pipeline.manager import UNSEEN, PassManager


@dataclass
class Builder:
    """A network under construction: maps (N, channels, 4, 4) by name with their channels."""

    draw: st.DrawFn
    maps: list[tuple[str, int]] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)

    def name(self) -> str:
        return f"t{len(self.body)}"

    def one(self) -> tuple[str, int]:
        """Some map, rather a late one."""
        return self.maps[-1 - self.draw(st.integers(0, min(3, len(self.maps) - 1)))]

    def put(self, text: str, channels: int) -> tuple[str, int]:
        """`text` computes the new map."""
        name = self.name()
        self.body.append(f"{name} = {text}")
        self.maps.append((name, channels))
        return name, channels

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = shape
        return name

    def constant(self, *values: int) -> str:
        name = f"k{len(self.weights)}"
        self.weights[name] = ints(*values)
        return name

    # Parts

    def conv(self, source: tuple[str, int] | None = None, out: int | None = None) -> tuple[str, int]:
        x, channels = source or self.one()
        out = out or self.draw(st.sampled_from((3, 4, 6, 8)))
        bias = f", {self.weight(out)}" if self.draw(st.booleans()) else ""
        if self.draw(st.booleans()):
            return self.put(f"Conv<pads=[1,1,1,1]>({x}, {self.weight(out, channels, 3, 3)}{bias})", out)
        return self.put(f"ConvTranspose({x}, {self.weight(channels, out, 1, 1)}{bias})", out)

    def grouped(self) -> None:
        x, channels = self.one()
        groups = self.draw(st.sampled_from([g for g in (2, 3, 4, 6, 8) if channels % g == 0] or [1]))
        out = groups * self.draw(st.integers(1, 3))
        kernel = self.weight(out, channels // groups, 3, 3)
        self.put(f"Conv<pads=[1,1,1,1], group={groups}>({x}, {kernel}, {self.weight(out)})", out)

    def depthwise(self) -> None:
        x, channels = self.one()
        self.put(f"Conv<pads=[1,1,1,1], group={channels}>({x}, {self.weight(channels, 1, 3, 3)})", channels)

    def activation(self) -> None:
        x, channels = self.one()
        self.put(f"{self.draw(st.sampled_from(('LeakyRelu', 'Sigmoid', 'Tanh', 'Softplus')))}({x})", channels)

    def batch_norm(self) -> None:
        x, channels = self.one()
        own = norm(f"n{len(self.weights)}", channels, len(self.weights))
        self.weights |= own
        self.put(f"BatchNormalization({', '.join([x, *own])})", channels)

    def affine(self) -> None:
        x, channels = self.one()
        scaled = self.put(f"Mul({x}, {self.weight(channels, 1, 1)})", channels)
        self.put(f"Add({self.weight(1, channels, 1, 1)}, {scaled[0]})", channels)

    def residual(self) -> None:
        x, channels = self.one()
        other = next((m for m in self.maps if m[1] == channels and m[0] != x), None)
        y, _ = other if other is not None and self.draw(st.booleans()) else self.conv(None, channels)
        self.put(f"{self.draw(st.sampled_from(('Add', 'Sub', 'Max')))}({x}, {y})", channels)

    def padded(self) -> None:
        """The shortcut of a stage that grows."""
        x, channels = self.one()
        before, behind = self.draw(st.integers(0, 2)), self.draw(st.integers(1, 2))
        pads = self.constant(0, before, 0, 0, 0, behind, 0, 0)
        y = self.put(f"Pad({x}, {pads})", channels + before + behind)
        z = self.conv(None, y[1])
        self.put(f"Add({y[0]}, {z[0]})", y[1])

    def concat(self) -> None:
        (x, a), (y, b) = self.one(), self.one()
        if a + b <= 24:
            self.put(f"Concat<axis=1>({x}, {y})", a + b)

    def split(self) -> None:
        x, channels = self.one()
        if channels == 1:
            return
        first = self.draw(st.integers(1, channels - 1))
        parts = self.constant(first, channels - first)
        name = self.name()
        self.body.append(f"{name}, {name}b = Split<axis=1>({x}, {parts})")
        self.maps += [(name, first), (f"{name}b", channels - first)]

    def crop(self) -> None:
        x, channels = self.one()
        start = self.draw(st.integers(-channels, channels - 1))
        size = channels - start % channels
        end = start + self.draw(st.integers(1, size)) if start >= 0 else 2**31 - 1
        kept = min(end, channels) - start % channels
        bounds = (self.constant(v) for v in (start, end, 1))
        self.put(f"Slice({', '.join([x, *bounds])})", kept)

    def shuffle(self) -> None:
        x, channels = self.one()
        rows = self.draw(st.sampled_from([r for r in range(2, channels + 1) if channels % r == 0] or [1]))
        apart = self.put(f"Reshape({x}, {self.constant(0, rows, channels // rows, 4, 4)})", 0)
        turned = self.put(f"Transpose<perm=[0,2,1,3,4]>({apart[0]})", 0)
        del self.maps[-2:]
        self.put(f"Reshape({turned[0]}, {self.constant(0, channels, 4, 4)})", channels)

    def gate(self) -> None:
        x, channels = self.one()
        pooled = self.put(f"GlobalAveragePool({x})", channels)
        hidden = self.weight(3, channels, 1, 1)
        squeezed = self.put(f"Conv({pooled[0]}, {hidden}, {self.weight(3)})", 3)
        back = self.put(f"Conv({squeezed[0]}, {self.weight(channels, 3, 1, 1)})", channels)
        sigmoid = self.put(f"Sigmoid({back[0]})", channels)
        del self.maps[-4:]
        self.put(f"Mul({x}, {sigmoid[0]})", channels)

    def layer_norm(self) -> None:
        x, channels = self.one()
        last = self.put(f"Transpose<perm=[0,2,3,1]>({x})", channels)
        own = f"{self.weight(channels)}, {self.weight(channels)}"
        normed = self.put(f"LayerNormalization<epsilon=0.1>({last[0]}, {own})", channels)
        del self.maps[-2:]
        self.put(f"Transpose<perm=[0,3,1,2]>({normed[0]})", channels)

    def attention(self) -> None:
        """Channels attend to each other's heads over the positions."""
        x, channels = self.one()
        heads = self.draw(st.sampled_from([h for h in (1, 2, 3, 4) if channels % h == 0]))
        shape = self.constant(0, heads, channels // heads, 16)
        rows = self.put(f"Reshape({x}, {shape})", 0)
        columns = self.put(f"Transpose<perm=[0,1,3,2]>({rows[0]})", 0)
        scores = self.put(f"MatMul({columns[0]}, {rows[0]})", 0)
        shares = self.put(f"Softmax({scores[0]})", 0)
        mixed = self.put(f"MatMul({rows[0]}, {shares[0]})", 0)
        del self.maps[-5:]
        self.put(f"Reshape({mixed[0]}, {self.constant(0, -1, 4, 4)})", channels)

    def softmax(self) -> None:
        x, channels = self.one()
        self.put(f"Softmax<axis=1>({x})", channels)


PARTS = (
    *("conv", "conv", "grouped", "depthwise", "activation", "activation", "batch_norm", "affine", "residual"),
    *(
        "residual",
        "padded",
        "concat",
        "concat",
        "split",
        "crop",
        "shuffle",
        "gate",
        "layer_norm",
        "attention",
    ),
    "softmax",
)


@st.composite
def networks(draw: st.DrawFn) -> Model:
    builder = Builder(draw)
    builder.maps.append(("x", 3))
    builder.conv()
    builder.conv()
    del builder.maps[0]
    for part in draw(st.lists(st.sampled_from(PARTS), min_size=2, max_size=8)):
        getattr(builder, part)()
    (a, m), (b, n) = builder.maps[-1], builder.one()
    last = builder.put(f"Concat<axis=1>({a}, {b})", m + n)
    if draw(st.booleans()):
        builder.body.append(f"f = Flatten({last[0]}) y = Gemm(f, {builder.weight((m + n) * 16, 3)})")
    else:
        builder.body.append(f"g = GlobalAveragePool({last[0]}) f = Flatten(g)")
        builder.body.append(f"y = Gemm<transB=1>(f, {builder.weight(3, m + n)})")
    return net(" ".join(builder.body), builder.weights, "float[N,3,4,4] x")


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None
)
@given(networks(), st.data())
def test_every_cut_is_the_masked_network(model: Model, data: st.DataObject) -> None:
    groups = find_groups(model, {"x": normal(2, 3, 4, 4)}, RUNTIME)
    choice = {}
    for group in groups.free:
        # One index of each leaf stays, so that no axis becomes empty.
        offsets = np.cumsum([0, *(leaf.size for leaf in group.leaves[:-1])])
        least = [
            offset + data.draw(st.integers(0, leaf.size - 1))
            for leaf, offset in zip(group.leaves, offsets, strict=True)
        ]
        more = data.draw(st.sets(st.integers(0, group.size - 1)))
        choice[group] = np.array(sorted({*least, *more}))
    cut, masked = model.copy(), mask(model, choice)
    take(cut, choice)
    onnx.checker.check_model(cut.to_proto(), full_check=True)
    removed = any(len(kept) < group.size for group, kept in choice.items())
    size, before = (sum(math.prod(v.shape) for v in parameters(m).values()) for m in (cut, model))
    assert (size < before) == removed
    for batch in (1, 3):
        feed = {"x": normal(batch, 3, 4, 4, seed=batch)}
        close(compute(cut, feed)[0], compute(masked, feed)[0])


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None
)
@given(networks(), st.sampled_from([0.2, 0.5, 0.8]), st.booleans(), st.sampled_from([None, 1, 3]))
def test_select_keeps_its_word(model: Model, ratio: float, compensate: bool, step: int | None) -> None:
    """The manager holds every cut against the masked network, and errors against what was predicted."""
    ctx = context(model, {"x": normal(48, 3, 4, 4, seed=1)})
    (report,) = PassManager([Select(ratio=ratio, compensate=compensate, step=step)]).run(model, ctx).steps
    if report.reason == UNSEEN:  # a network whose output hangs on nothing that was cut
        return
    assert report.committed, report.reason
    assert bool(report.changes) == (report.after.parameters < report.before.parameters)
