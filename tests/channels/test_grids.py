"""grids.py: steps of integer tensors, held against ONNX's reference implementation at other sizes."""

from __future__ import annotations

import numpy as np
import pytest
from nets import RUNTIME, compute, net, normal

from onnxfuse.channels.grids import Grid, of_table
from onnxfuse.channels.groups import find_groups
from onnxfuse.channels.tracing import trace


@pytest.mark.parametrize(
    ("table", "steps"),
    [
        (np.arange(12).reshape(3, 4), (4, 1)),
        (np.arange(12).reshape(3, 4).T, (1, 4)),
        (np.full((2, 1, 3), 7), (0, 0, 0)),
        (np.array([5, 3, 1]), (-2,)),
        (np.array(9), ()),
        (np.array([[0, 1], [2, 4]]), None),
        (np.array([0, 1, 3]), None),
        (np.arange(3.0), None),
        (np.zeros((0, 3), np.int64), None),
    ],
)
def test_tables(table: np.ndarray, steps: tuple[int, ...] | None) -> None:
    found = of_table(table)
    assert (None if found is None else found.steps) == steps
    if found is not None:
        assert found.counts(table.size) == np.array_equal(table.reshape(-1), np.arange(table.size))


BODY = """n = Shape<start=0, end=1>(x) count = Squeeze(n) r = Range(zero, count, one) far = Mul(r, stride)
    up = Unsqueeze(far, last) places = Add(up, table) h = MatMul(x, eye) flat = Reshape(h, all)
    y = Gather(flat, places)"""


WEIGHTS = {
    "zero": np.array(0),
    "one": np.array(1),
    "stride": np.array(6),
    "last": np.array([1]),
    "table": np.arange(6),
    "all": np.array([-1]),
    "eye": np.eye(6, dtype=np.float32),
}


def places(**more: object) -> tuple[Grid | None, bool]:
    """The grid of the places, and whether the Gather is told to be a view."""
    model = net(BODY, WEIGHTS | more, x="float[N,6] x")
    system = trace(model, {"x": normal(3, 6)}, RUNTIME)
    for batch in (1, 2, 5):
        x = normal(batch, 6, seed=batch)
        found, y = compute(model, {"x": x}, "places", "y")
        if system.views:
            np.testing.assert_array_equal(found, np.arange(batch * 6).reshape(batch, 6))
            np.testing.assert_array_equal(y, x)
    return system.grids["places"], bool(system.views)


def test_places_that_count_through_a_flat_tensor() -> None:
    grid, is_view = places()
    assert grid is not None
    assert (grid.start, grid.steps, grid.sizes) == (0, (6, 1), (3, 6))
    assert is_view


@pytest.mark.parametrize(
    "more",
    [
        {"stride": np.array(5)},
        {"table": np.arange(6)[::-1].copy()},
        {"table": np.arange(5)},
        {"table": np.array([0, 1, 2, 3, 5, 4])},
    ],
    ids=["other steps", "backwards", "too few", "uneven"],
)
def test_other_places_are_no_view(more: dict[str, np.ndarray]) -> None:
    assert not places(**more)[1]


def test_a_range_of_another_axis_is_no_view() -> None:
    """Here its length is the batch's by chance, so the sizes of this run alone would not tell."""
    model = net(
        f"{BODY.replace('Shape<start=0, end=1>(x)', 'Shape<start=0, end=1>(z)')}",
        WEIGHTS,
        x="float[N,6] x, float[M] z",
    )
    feed = {"x": normal(3, 6), "z": normal(3)}
    assert not trace(model, feed, RUNTIME).views
    assert not find_groups(model, feed, RUNTIME).free
