"""Mini-batches: every sample once in an epoch, whatever it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import net, normal

from onnxfuse.data.calibration import Batch, Calibration
from onnxfuse.data.fitted import sample_digests
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.training.sampling import Pool, Shuffled

X = normal(23, 6)
LABELS = np.arange(23)


def model(x: str = "float[N,6] x") -> Model:
    return net("y = Relu(x)", {}, x=x)


def pool(data: Any, of: Model | None = None, **more: Any) -> Pool:
    found = of or model()
    calibration = Calibration.open(data, found, batch_size=5, held_out=0.0)
    return Pool(calibration.fit, found.inputs, **more)


def rows(batches: Sequence[Batch], name: str = "x") -> np.ndarray:
    return np.concatenate([batch.feed[name] for batch in batches])


def sources(folder: Path) -> dict[str, Any]:
    np.savez(folder / "plain.npz", x=X, labels=LABELS)
    np.savez_compressed(folder / "packed.npz", x=X, labels=LABELS)
    (folder / "apart").mkdir()
    np.save(folder / "apart" / "x.npy", X)
    np.save(folder / "apart" / "labels.npy", LABELS)
    return {
        "memory": {"x": X, "labels": LABELS},
        "plain": folder / "plain.npz",
        "packed": folder / "packed.npz",
        "folder": folder / "apart",
    }


@pytest.mark.parametrize("kind", ["memory", "plain", "packed", "folder"])
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_every_row_once_in_an_epoch(kind: str, limit: int, tmp_path: Path) -> None:
    found = pool(sources(tmp_path)[kind], limit=limit)
    batches = Shuffled(found, 5, seed=3)
    first, second = list(batches.epoch(1)), list(batches.epoch(2))
    assert [batch.samples for batch in first] == [5, 5, 5, 5, 3]
    assert batches.steps == 5
    for epoch in (first, second):
        labels = np.concatenate([batch.labels for batch in epoch])
        assert sorted(labels) == list(range(23))
        assert not np.array_equal(labels, LABELS)
        np.testing.assert_array_equal(rows(epoch), X[labels])
    assert not np.array_equal(rows(first), rows(second))
    np.testing.assert_array_equal(rows(first), rows(list(batches.epoch(1))))
    np.testing.assert_array_equal(rows(first), rows(list(Shuffled(found, 5, seed=3).epoch(1))))
    assert not np.array_equal(rows(first), rows(list(Shuffled(found, 5, seed=4).epoch(1))))
    np.testing.assert_array_equal(rows(list(found.in_order(4))), X)


def test_the_order_does_not_depend_on_where_the_samples_lie(tmp_path: Path) -> None:
    pools = [pool(source, limit=limit) for source in sources(tmp_path).values() for limit in (1 << 30, 0)]
    epochs = [rows(list(Shuffled(found, 5, 0).epoch(1))) for found in pools]
    assert all(np.array_equal(epoch, epochs[0]) for epoch in epochs)
    assert len({found.digest for found in pools}) == 1


def test_the_digest_is_of_values_and_labels() -> None:
    changed = X.copy()
    changed[7, 3] += 1
    labels = LABELS.copy()
    labels[7] += 1
    found = [({"x": x, "labels": y}) for x, y in ((X, LABELS), (changed, LABELS), (X, labels))]
    assert len({pool(data).digest for data in found}) == 3


def test_a_last_row_alone_is_left_out() -> None:
    """BatchNorm can't train on it; where it is all there is, it is not hidden."""
    batches = Shuffled(pool({"x": X}), 11, 0)
    assert [batch.samples for batch in batches.epoch(1)] == [11, 11]
    assert batches.steps == 2
    assert [batch.samples for batch in Shuffled(pool({"x": X[:1]}), 11, 0).epoch(1)] == [1]
    assert Shuffled(pool({"x": X}), 1, 0).steps == 23


def test_a_model_of_one_batch_size_gets_no_other() -> None:
    fixed = model("float[4,6] x")
    found = pool({"x": X, "labels": LABELS}, fixed)
    batches = Shuffled(found, 64, 0)
    assert [batch.samples for batch in batches.epoch(1)] == [4] * 5
    labels = np.concatenate([batch.labels for batch in batches.epoch(1)])
    assert len(set(labels)) == 20
    assert not np.array_equal(labels, np.sort(labels))
    assert [batch.samples for batch in found.in_order(64)] == [4] * 5
    with pytest.raises(InputError, match="too few samples to train on, 20: it takes at least 24"):
        Shuffled(found, 64, 0, world=6)


def test_inputs_with_the_batch_elsewhere_or_nowhere() -> None:
    two = net("y = Relu(x)", {}, x="float[2,batch,3] x, float[4] scale")
    x, scale = normal(2, 7, 3), normal(4)
    found = pool({"x": x, "scale": scale, "labels": np.arange(7)}, two)
    for batch in Shuffled(found, 3, 0).epoch(1):
        np.testing.assert_array_equal(batch.feed["x"], x[:, batch.labels])
        np.testing.assert_array_equal(batch.feed["scale"], scale)


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_feeds_stay_whole(limit: int) -> None:
    sizes = (3, 5, 2, 4)
    feeds = [{"x": normal(size, 6, seed=i), "labels": np.full(size, i)} for i, size in enumerate(sizes)]
    found = pool(feeds, limit=limit)
    assert (found.items, found.samples, found.whole) == (4, 14, True)
    batches = Shuffled(found, 64, 0)
    orders = [[int(batch.labels[0]) for batch in batches.epoch(number)] for number in range(1, 6)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(map(tuple, orders))) > 1
    for batch in batches.epoch(1):
        np.testing.assert_array_equal(batch.feed["x"], feeds[batch.labels[0]]["x"])
        assert batch.samples == sizes[batch.labels[0]]
    assert found.where(2, 1) == "row 1 of feed 2"
    assert [start for start, _ in found.labels()] == [0, 1, 2, 3]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch(world: int) -> None:
    found = pool({"x": X, "labels": LABELS})
    alone = [batch.labels for batch in Shuffled(found, 6, 0).epoch(1)]
    shares = [Shuffled(found, 6, 0, rank, world) for rank in range(world)]
    together = [[batch.labels for batch in share.epoch(1)] for share in shares]
    assert len({tuple(len(part) for part in parts) for parts in together}) == 1
    for step in range(3):
        joined = np.concatenate([parts[step] for parts in together])
        np.testing.assert_array_equal(joined, alone[step])
    assert {share.steps for share in shares} == {4 if world == 2 else 3}  # of the last 5 rows, 2 each or 1
    with pytest.raises(InputError, match="less than a row for each of 3 processes"):
        Shuffled(found, 2, 0, 0, 3)


def test_rows_are_numbered_as_in_the_data() -> None:
    x = np.hstack([np.arange(23, dtype=np.float32)[:, None], np.zeros((23, 5), np.float32)])
    calibration = Calibration.open({"x": x}, model(), batch_size=5, held_out=0.3)
    found = Pool(calibration.fit, model().inputs, without=sample_digests({"x": x[:4]}, model().inputs))
    for item in range(found.items):
        number = int(found.take(np.array([item])).feed["x"][0, 0])
        assert found.where(item, 0) == f"row {number}"
        assert found.where(0, item) == f"row {number}"


def test_samples_that_others_hold_are_left_out() -> None:
    taken = sample_digests({"x": X[[2, 9, 9]]}, model().inputs)
    found = pool({"x": X, "labels": LABELS}, without=set(taken))
    assert (found.shared, found.leaves_out, found.samples) == (2, True, 21)
    seen = np.concatenate([batch.labels for batch in Shuffled(found, 7, 0).epoch(1)])
    assert sorted({2, 9} | set(seen)) == list(range(23))
    assert not {2, 9} & set(seen)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in found.labels()]), np.sort(seen))
    feeds = [{"x": X[start : start + 5]} for start in range(0, 20, 5)]
    found = pool(feeds, without=set(taken))
    assert (found.shared, found.items, found.samples) == (2, 2, 10)
    np.testing.assert_array_equal(rows(list(found.in_order(1))), X[10:20])


def test_samples_that_nearly_all_are_shared_stay() -> None:
    zeros = {"x": np.zeros((23, 6), np.float32)}
    found = pool(zeros, without=set(sample_digests(zeros, model().inputs)))
    assert (found.shared, found.leaves_out, found.samples) == (23, False, 23)


def test_a_model_that_takes_one_row_at_a_time() -> None:
    found = pool({"x": X, "labels": LABELS}, model("float[1,6] x"))
    batches = list(Shuffled(found, 64, 0).epoch(1))
    assert [batch.samples for batch in batches] == [1] * 23
    assert sorted(int(batch.labels[0]) for batch in batches) == list(range(23))
    assert found.where(7, 0) == "row 7"
