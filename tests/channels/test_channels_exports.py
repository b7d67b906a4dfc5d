"""Coupled channels of networks as PyTorch's exporters write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from architectures import ARCHITECTURES
from channel_cases import close, drawn, parameters
from nets import RUNTIME, Feed, compute

from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import find_groups
from onnxfuse.channels.masking import mask
from onnxfuse.ir.model import Model

QUICK = {
    # Hidden size, unless it is an output; of each block heads, their dimensions, the MLP; the pooler.
    ("bert", "torchscript"): (4, 4, 64, 4, 4, 64, 16),
    ("gpt", "torchscript"): (16, 4, 4, 4, 64, 4, 4, 4, 64),
    ("vit", "torchscript"): (16, 4, 4, 64, 4, 4, 64),
    # Key heads and query heads to one of them; rotated pairs of dimensions share one table in all blocks.
    ("llama", "torchscript"): (16, 2, 2, 2, 4, 32, 2, 2, 4, 32),
    ("lstm", "torchscript"): (16, 16),
    ("shufflenet", "torchscript"): (2, 2, 4, 4, 4),
    ("groupnorm", "torchscript"): (4, 2, 2, 4),
}
SLOW = [
    (name, how) for name in ARCHITECTURES for how in ("dynamo", "torchscript") if (name, how) not in QUICK
]


Exported = Callable[[str, str], Path]


def samples(name: str, batch: int) -> Feed:
    model_inputs = ARCHITECTURES[name].example(batch, seed=batch)
    return {key: value.numpy() for key, value in model_inputs.items()}


def check(name: str, model: Model) -> tuple[int, ...]:
    """Sizes of the groups; the cut of each, and of all at once, equals the masked network."""
    groups = find_groups(model, samples(name, 3), RUNTIME)
    for choice in (*(drawn([group], 0.6) for group in groups.free), drawn(groups.free, 0.75, seed=1)):
        cut, masked = model.copy(), mask(model, choice)
        take(cut, choice)
        assert sum(v.size for v in parameters(cut).values()) < sum(v.size for v in parameters(model).values())
        for batch in (2, 5):
            feed = samples(name, batch)
            results = zip(compute(cut, feed), compute(masked, feed), compute(model, feed), strict=True)
            for got, expected, original in results:
                close(got, expected)
                assert np.isfinite(got).all()
                assert got.shape == original.shape
    return tuple(group.size for group in groups.free)


@pytest.mark.parametrize(("name", "how"), QUICK)
def test_quick_exports(name: str, how: str, exported: Exported) -> None:
    assert check(name, Model.load(exported(name, how))) == QUICK[name, how]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), SLOW)
def test_all_exports(name: str, how: str, exported: Exported) -> None:
    assert check(name, Model.load(exported(name, how)))
