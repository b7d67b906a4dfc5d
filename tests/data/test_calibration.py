"""Samples from every source: what is read, how it is split, what is refused, and memory that stays flat."""

import base64
import gc
import io
import json
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxfuse.data.batch_axes import batch_axes, fixed_batch
from onnxfuse.data.calibration import Batch, Calibration
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.session import Runtime, Session


def model(inputs: str, body: str = "y = Relu(x)", output: str = "float[K] y", weights: str = "") -> Model:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({output}) {weights} {{ {body} }}'
    return Model.load(onnx.parser.parse_model(text))


VECTORS = "float[batch,3] x"


def rows(count: int, width: int = 3) -> np.ndarray:
    """Row i holds i in every column, so that a row tells where it came from."""
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], width, axis=1)


def seen(batches: Any, name: str = "x") -> list[int]:
    return [int(row) for batch in batches for row in batch.feed[name][:, 0]]


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


# --- the split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, 64, 100, 333])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_fit_and_held_out_part_the_samples(tmp_path: Path, count: int, batch_size: int) -> None:
    path = save_npz(tmp_path / "d.npz", x=rows(count), labels=np.arange(count))
    calibration = Calibration.open(path, model(VECTORS), batch_size=batch_size)
    fit, held = seen(calibration.fit), seen(calibration.held_out)
    assert sorted(fit + held) == list(range(count))
    assert len(held) == max(1, round(0.2 * count))
    assert (calibration.fit.samples, calibration.held_out.samples) == (len(fit), len(held))
    assert calibration.samples == count
    batches = [*calibration.fit, *calibration.held_out]
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert len(calibration.fit) + len(calibration.held_out) == len(batches)
    assert max(batch.samples for batch in batches) <= batch_size
    for batch in batches:
        assert batch.labels is not None
        assert batch.samples == len(batch.labels) == len(batch.feed["x"])
        np.testing.assert_array_equal(batch.labels, batch.feed["x"][:, 0])


def test_the_split_is_a_matter_of_data_and_seed_alone(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", x=rows(100))
    same = [Calibration.open(path, model(VECTORS), batch_size=size, seed=3) for size in (4, 64)]
    assert seen(same[0].held_out) == seen(same[1].held_out) == seen(same[0].held_out)
    assert seen(Calibration.open(path, model(VECTORS), seed=4).held_out) != seen(same[0].held_out)


@pytest.mark.parametrize("period", [5, 10, 250])
def test_ordered_data_splits_fairly(tmp_path: Path, period: int) -> None:
    """Classes that take turns, or that come one after the other: each is held out about as often."""
    count = 1000
    classes = np.arange(count) % period if period < 100 else np.arange(count) // period
    path = save_npz(tmp_path / "d.npz", x=rows(count), y=classes)
    held = Calibration.open(path, model(VECTORS)).held_out
    shares = np.bincount(np.concatenate([batch.labels for batch in held if batch.labels is not None]))
    assert shares.min() > 0.5 * shares.mean()


def test_nothing_held_out(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", x=rows(10))
    calibration = Calibration.open(path, model(VECTORS), held_out=0)
    assert seen(calibration.fit) == list(range(10))
    assert list(calibration.held_out) == []
    assert (len(calibration.held_out), calibration.held_out.samples) == (0, 0)


def test_a_large_share_leaves_something_to_fit() -> None:
    calibration = Calibration.open({"x": rows(4)}, model(VECTORS), held_out=0.95)
    assert (calibration.fit.samples, calibration.held_out.samples) == (1, 3)


def test_limit_spreads_over_the_file(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", x=rows(1000))
    calibration = Calibration.open(path, model(VECTORS), limit=50)
    used = sorted(seen(calibration.fit) + seen(calibration.held_out))
    assert len(set(used)) == len(used) == 50
    assert [row // 20 for row in used] == list(range(50))
    assert Calibration.open(path, model(VECTORS), limit=5000).samples == 1000


@pytest.mark.parametrize(
    ("count", "samples", "expected"), [(400, 96, 96), (400, 9999, 320), (20, 1, 2), (25, 16, 16), (8, 4, 4)]
)
def test_a_part_for_trials(count: int, samples: int, expected: int) -> None:
    """Fit samples, spread, with no sample on both sides, even where they are a single batch."""
    calibration = Calibration.open({"x": rows(count)}, model(VECTORS), batch_size=8)
    part = calibration.part(samples)
    fit, held = seen(part.fit), seen(part.held_out)
    assert len(fit) + len(held) == expected
    assert len(held) == (expected + 1) // 3
    assert not set(fit) & set(held)
    assert set(fit) | set(held) <= set(seen(calibration.fit))
    indices = [batch.index for batch in [*part.fit, *part.held_out]]
    assert indices == list(range(len(indices)))
    if expected > 2:
        assert max(fit + held) - min(fit + held) > 0.6 * count


@pytest.mark.parametrize(("count", "samples"), [(400, 96), (400, 9999), (20, 1), (8, 4)])
def test_all_apart_from_those_that_trials_judge_on(count: int, samples: int) -> None:
    calibration = Calibration.open({"x": rows(count)}, model(VECTORS), batch_size=8)
    judged = seen(calibration.part(samples).held_out)
    apart = calibration.apart(samples)
    assert seen(apart.held_out) == judged
    assert sorted(seen(apart.fit) + judged) == sorted(seen(calibration.fit))
    assert set(seen(calibration.part(samples).fit)) <= set(seen(apart.fit))


def test_a_part_of_a_single_sample() -> None:
    part = Calibration.open({"x": rows(2)}, model(VECTORS), held_out=0.5).part(4)
    assert seen(part.fit) == seen(part.held_out)


def test_a_part_of_feeds() -> None:
    feeds = [{"x": rows(8) + 8 * i} for i in range(10)]
    part = Calibration.open(feeds, model(VECTORS)).part(24)
    assert (len(part.fit), len(part.held_out)) == (2, 1)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"held_out": 1.0}, {"held_out": -0.1}, {"limit": 0}])
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        Calibration.open({"x": rows(10)}, model(VECTORS), **options)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_too_few_samples(share: float) -> None:
    needed = 2 if share else 1
    enough = Calibration.open({"x": rows(needed)}, model(VECTORS), held_out=share)
    assert enough.samples == needed
    with pytest.raises(
        InputError, match="no rows" if not share else "too few samples, 1; it takes at least 2"
    ):
        Calibration.open({"x": rows(needed - 1)}, model(VECTORS), held_out=share)


# --- the same rows from every kind of file -----------------------------------------------------------


def _compressed(path: Path) -> Path:
    np.savez_compressed(path / "d.npz", x=rows(50), y=np.arange(50))
    return path / "d.npz"


def _folder_of_npy(path: Path) -> Path:
    np.save(path / "x.npy", rows(50))
    np.save(path / "y.npy", np.arange(50))
    (path / "notes.txt").write_text("not samples")
    return path


def _folder_of_chunks(path: Path) -> Path:
    """Of unequal lengths, one empty, with names whose alphabetical order is another."""
    for name, (start, stop) in {"c1": (0, 3), "c2": (3, 20), "c9": (20, 20), "c10": (20, 50)}.items():
        save_npz(path / f"{name}.npz", x=rows(50)[start:stop], y=np.arange(start, stop))
    return path


def _fortran(path: Path) -> Path:
    return save_npz(path / "d.npz", x=np.asfortranarray(rows(50)), y=np.arange(50))


def _old_header(path: Path) -> Path:
    with zipfile.ZipFile(path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"x": rows(50), "y": np.arange(50)}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, version=(2, 0))
    return path / "d.npz"


def _script(path: Path) -> str:
    (path / "values.py").write_text("COUNT = 50\n")
    (path / "data.py").write_text(
        "import numpy as np\n"
        "from values import COUNT\n"
        "def load_data():\n"
        "    print('loading')\n"
        "    for i in range(COUNT):\n"
        "        yield {'x': np.full((1, 3), i, np.float32), 'y': np.array([i])}\n"
    )
    return str(path / "data.py")


def _encode(array: np.ndarray) -> dict[str, str]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return {"array": base64.b64encode(buffer.getvalue()).decode(), "polygraphy_class": "ndarray"}


def _polygraphy(path: Path) -> Path:
    feeds = [{"x": _encode(rows(50)[i : i + 5]), "y": _encode(np.arange(i, i + 5))} for i in range(0, 50, 5)]
    (path / "feeds.json").write_text(json.dumps(feeds, indent=" "))
    return path / "feeds.json"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "npz": lambda path: save_npz(path / "d.npz", x=rows(50), y=np.arange(50)),
    "compressed npz": _compressed,
    "Fortran order": _fortran,
    "header version 2": _old_header,
    "folder of npy": _folder_of_npy,
    "folder of chunks": _folder_of_chunks,
    "script": _script,
    "script and function": lambda path: _script(path) + ":load_data",
    "polygraphy": _polygraphy,
    "text path": lambda path: str(save_npz(path / "d.npz", x=rows(50), y=np.arange(50))),
    "dict": lambda path: {"x": rows(50), "y": np.arange(50)},
    "list": lambda path: [{"x": rows(50)[i : i + 5], "y": np.arange(i, i + 5)} for i in range(0, 50, 5)],
    "generator": lambda path: ({"x": rows(50)[i : i + 5], "y": np.arange(i, i + 5)} for i in range(0, 50, 5)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_rows(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    calibration = Calibration.open(SOURCES[kind](tmp_path), model(VECTORS), batch_size=8)
    assert calibration.samples == 50
    assert not calibration.synthetic
    assert calibration.labels == "y"
    for _ in range(2):  # re-iterable
        fit, held = seen(calibration.fit), seen(calibration.held_out)
        assert sorted(fit + held) == list(range(50))
        assert len(held) == 10
        for batch in calibration.fit:
            assert set(batch.feed) == {"x"}
            assert batch.feed["x"].dtype == np.float32
            np.testing.assert_array_equal(batch.labels, batch.feed["x"][:, 0])
    assert capfd.readouterr().out == ""  # what the user's script prints goes to stderr


def test_two_iterations_at_once(tmp_path: Path) -> None:
    calibration = Calibration.open(_compressed(tmp_path), model(VECTORS), batch_size=8)
    for one, other in zip(calibration.fit, calibration.fit, strict=True):
        np.testing.assert_array_equal(one.feed["x"], other.feed["x"])


def test_labels_only_under_a_known_name_that_is_no_input() -> None:
    two = model("float[batch,3] x, float[batch,3] y", "z = Add(x, y)", "float[batch,3] z")
    calibration = Calibration.open({"x": rows(9), "y": rows(9), "labels": np.arange(9)}, two)
    assert calibration.labels == "labels"
    assert Calibration.open({"x": rows(9), "y": rows(9)}, two).labels is None


def test_chunks_come_in_natural_order(tmp_path: Path) -> None:
    calibration = Calibration.open(_folder_of_chunks(tmp_path), model(VECTORS), held_out=0, batch_size=8)
    assert seen(calibration.fit) == list(range(50))


def test_names_that_files_cannot_carry(tmp_path: Path) -> None:
    renamed = model(VECTORS).to_proto()
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "serving/x:0"
    np.save(tmp_path / "serving_x_0.npy", rows(10))
    calibration = Calibration.open(tmp_path, Model.load(renamed))
    assert sorted(seen(calibration.fit, "serving/x:0") + seen(calibration.held_out, "serving/x:0")) == list(
        range(10)
    )


def test_a_shuffling_loader_is_read_once() -> None:
    class Loader:
        calls = 0

        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            Loader.calls += 1
            for i in np.random.default_rng(Loader.calls).permutation(20):
                yield {"x": np.full((2, 3), i, np.float32)}

    calibration = Calibration.open(Loader(), model(VECTORS))
    assert seen(calibration.fit) == seen(calibration.fit)
    assert Loader.calls == 1


def test_limit_ends_an_endless_generator() -> None:
    def endless() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield {"x": rows(4)}

    assert Calibration.open(endless(), model(VECTORS), limit=30).samples == 32


def test_polygraphys_first_encoding(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows(2))
    feed = {"x": {"array": buffer.getvalue().decode("latin-1"), "__polygraphy_encoded_ndarray": True}}
    (tmp_path / "old.json").write_text(json.dumps([feed, feed]))
    calibration = Calibration.open(tmp_path / "old.json", model(VECTORS))
    assert seen(calibration.fit) == [0, 1]


# --- the batch axis ----------------------------------------------------------------------------------


def info(name: str, *shape: int | str | None) -> TensorInfo:
    return TensorInfo(name, np.dtype(np.float32), shape)


AXES = {
    "named": (
        [info("x", "batch", 16), info("h", 2, "batch", 8), info("s")],
        {"x": 0, "h": 1, "s": None},
        None,
    ),
    "state first": ([info("h", 2, "N", 8), info("x", "N", 16)], {"h": 1, "x": 0}, None),
    "sequence first": ([info("x", "seq", "batch_size", 8)], {"x": 1}, None),
    "numbered": (
        [info("x", "batch", 8), info("z", "batch_1", 8), info("w", "T")],
        {"x": 0, "z": 0, "w": None},
        None,
    ),
    "named and nameless": ([info("x", "batch", 8), info("z", None, 8)], {"x": 0, "z": 0}, None),
    "generated names": ([info("x", "unk__1", 8), info("z", "unk__2", 8)], {"x": 0, "z": 0}, None),
    "any name": ([info("x", "frames", 8), info("m", 4, "frames")], {"x": 0, "m": 1}, None),
    "nameless": ([info("x", None, 8), info("c", 4)], {"x": 0, "c": None}, None),
    "state is fixed": ([info("x", "T", 8), info("h", 1, 1, 128)], {"x": 0, "h": None}, None),
    "fixed": ([info("x", 10, 3), info("m", 10), info("c", 4)], {"x": 0, "m": 0, "c": None}, 10),
    "one": ([info("x", 1, 3, 8, 8)], {"x": 0}, 1),
    "scalars": ([info("x"), info("y")], {"x": None, "y": None}, None),
    "unknown rank": ([TensorInfo("x", np.dtype(np.float32), None)], {"x": 0}, None),
}


@pytest.mark.parametrize("case", AXES)
def test_batch_axes(case: str) -> None:
    inputs, axes, fixed = AXES[case]
    assert batch_axes(inputs) == axes
    assert fixed_batch(inputs, axes) == fixed


def test_rows_along_another_axis(tmp_path: Path) -> None:
    recurrent = model("float[2,batch,3] h, float[batch,3] x", "y = Add(h, x)", "float[2,batch,3] y")
    states = np.stack([rows(30), 100 + rows(30)])
    calibration = Calibration.open(
        save_npz(tmp_path / "d.npz", x=rows(30), h=states), recurrent, batch_size=4
    )
    assert calibration.samples == 30
    for batch in [*calibration.fit, *calibration.held_out]:
        np.testing.assert_array_equal(batch.feed["h"], np.stack([batch.feed["x"], 100 + batch.feed["x"]]))


def test_a_value_for_all_batches(tmp_path: Path) -> None:
    scaled = model("float[batch,3] x, float s", "y = Mul(x, s)", "float[batch,3] y")
    path = save_npz(tmp_path / "d.npz", x=rows(30), s=np.array(7, np.float32))
    for batch in Calibration.open(path, scaled, batch_size=4).fit:
        assert batch.feed["s"].shape == ()
        assert batch.feed["s"] == 7
    assert len(Calibration.open(path, scaled, batch_size=4).fit) == 6


def test_stacked_feeds(tmp_path: Path) -> None:
    """One more axis than the input has: each row is a whole feed, in a batch of its own."""
    scaled = model("float[batch,3] x, float s", "y = Mul(x, s)", "float[batch,3] y")
    stacked = np.stack([rows(4) + i for i in range(6)])
    scales = np.arange(6, dtype=np.float32)
    for source in (save_npz(tmp_path / "d.npz", x=stacked, s=scales), {"x": stacked, "s": scales}):
        calibration = Calibration.open(source, scaled)
        assert (len(calibration.fit), len(calibration.held_out), calibration.samples) == (5, 1, 6)
        for batch in [*calibration.fit, *calibration.held_out]:
            assert batch.samples == 1
            np.testing.assert_array_equal(batch.feed["x"], rows(4) + batch.feed["s"])
            Runtime("cpu").session(scaled).run(batch.feed)


@pytest.mark.parametrize("name", ["x", "s", "c"])
def test_stacked_feeds_that_are_not_finite(tmp_path: Path, name: str) -> None:
    """`c` is the same for all batches."""
    scaled = model(
        "float[batch,3] x, float s, float[2] c", "y = Mul(x, s) z = Neg(c)", "float[batch,3] y, float[2] z"
    )
    arrays = {
        "x": np.zeros((6, 4, 3), np.float32),
        "s": np.zeros(6, np.float32),
        "c": np.zeros(2, np.float32),
    }
    arrays[name][{"x": (3, 2, 1), "s": 3, "c": 1}[name]] = np.nan
    message = f"array '{name}' holds NaN or infinity" + ("; remove" if name == "c" else " in row 3; remove")
    for source in (save_npz(tmp_path / "d.npz", **arrays), arrays):
        calibration = Calibration.open(source, scaled)
        with pytest.raises(InputError, match=message):
            list(calibration.fit), list(calibration.held_out)


def test_fixed_batches_drop_the_remainder() -> None:
    fixed = model("float[10,3] x", output="float[10,3] y")
    calibration = Calibration.open({"x": rows(57)}, fixed, batch_size=64)
    sizes = [batch.samples for batch in [*calibration.fit, *calibration.held_out]]
    assert sizes == [10] * 5
    assert calibration.held_out.samples == 10
    assert "7 left over because the model wants batches of 10" in calibration.description
    assert len(set(seen(calibration.fit) + seen(calibration.held_out))) == 50
    session = Runtime("cpu").session(fixed)
    for batch in calibration.fit:
        session.run(batch.feed)
    with pytest.raises(InputError, match="too few samples, 19; it takes at least 20"):
        Calibration.open({"x": rows(19)}, fixed)


# --- refusals ----------------------------------------------------------------------------------------

X = rows(10)
BAD_ARRAYS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "wrong name": ({"input": X}, "has no array 'x'; the model's inputs are 'x', it has 'input'"),
    "unknown extra": (
        {"x": X, "mask": X},
        "has an array 'mask' that is no input; .* labels may be called labels, y",
    ),
    "nothing": ({}, "has no array 'x'; .* it has nothing"),
    "float64": ({"x": X.astype(np.float64)}, r"array 'x': input 'x' wants float32, got float64; convert"),
    "bytes": ({"x": X.astype(np.uint8)}, "wants float32, got uint8"),
    "width": ({"x": rows(10, 4)}, r"array 'x': input 'x' wants shape \[\?, 3\], got \[10, 4\]"),
    "rank": ({"x": X[:, 0]}, r"wants shape \[\?, 3\], got \[10\]"),
    "no rows": ({"x": X[:0]}, "has no rows"),
    "row counts": ({"x": X, "labels": np.arange(9)}, "different numbers of rows: 'x' 10, 'labels' 9"),
    "text labels": ({"x": X, "labels": np.array(["a"] * 10)}, "array 'labels' must hold numbers"),
    "scalar labels": ({"x": X, "labels": np.array(3)}, "array 'labels' must hold numbers, one row"),
}


def one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_do_not_fit(tmp_path: Path, case: str) -> None:
    arrays, message = BAD_ARRAYS[case]
    path = save_npz(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        Calibration.open(path, model(VECTORS))
    one_line(error, str(path))
    with pytest.raises(InputError, match=message):
        Calibration.open(arrays, model(VECTORS))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    bad = rows(40)
    bad[23, 1] = value
    message = "array 'x' holds NaN or infinity in row 23"
    for source in (save_npz(tmp_path / "d.npz", x=bad), {"x": bad}):
        calibration = Calibration.open(source, model(VECTORS), batch_size=8)
        with pytest.raises(InputError, match=message) as error:
            list(calibration.fit), list(calibration.held_out)
        one_line(error)
    calibration = Calibration.open([{"x": bad[i : i + 4]} for i in range(0, 40, 4)], model(VECTORS))
    with pytest.raises(InputError, match="feed 5 array 'x' holds NaN or infinity"):
        list(calibration.fit), list(calibration.held_out)


BAD_FEEDS = {
    "no dict": ([{"x": X}, (X,)], "feed 1 is a tuple; each must be a dict"),
    "missing": ([{"x": X}, {}], "feed 1 has no array 'x'"),
    "unknown": ([{"x": X, "z": X}], "feed 0 has an array 'z' that is no input"),
    "type": ([{"x": X.astype(int)}], "feed 0: input 'x' wants float32, got int64"),
    "list": ([{"x": X.tolist()}], "feed 0: input 'x' wants a NumPy array, got list"),
    "shape": ([{"x": X[0]}], r"feed 0: input 'x' wants shape \[batch, 3\], got \[3\]"),
    "empty": ([], "has no feeds"),
    "no rows": ([{"x": X[:0]}], "feed 0 has no rows"),
    "one": ([{"x": X}], "too few batches, 1; it takes at least 2"),
    "some labels": ([{"x": X, "y": X[:, 0]}, {"x": X}], "some have none"),
    "labels": ([{"x": X, "y": X[:3, 0]}], r"feed 0: 'y' has shape \[3\], not one row for each of 10 samples"),
}


@pytest.mark.parametrize("case", BAD_FEEDS)
@pytest.mark.parametrize("kind", [list, iter])
def test_feeds_that_do_not_fit(case: str, kind: Callable[[Any], Any]) -> None:
    feeds, message = BAD_FEEDS[case]
    with pytest.raises(InputError, match=message) as error:
        Calibration.open(kind(feeds), model(VECTORS))
    one_line(error, "the samples")


def test_feeds_whose_inputs_disagree() -> None:
    two = model("float[batch,3] x, float[batch,3] z", "y = Add(x, z)", "float[batch,3] y")
    with pytest.raises(InputError, match=r"feed 0: the arrays have different numbers of rows: \[9, 10\]"):
        Calibration.open([{"x": X, "z": X[:9]}], two)


BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("no.npz", None, "no calibration data at"),
    "no zip": ("d.npz", b"hello", "not a zip file"),
    "empty": ("d.npz", b"", "not a zip file"),
    "unknown kind": (
        "d.txt",
        b"1 2 3",
        "must be a .npz, a folder of .npy or .npz, a feed .json or script.py",
    ),
    "no json": ("d.json", b"{", "cannot read"),
    "json of no list": ("d.json", b'{"x": 1}', "is not a feed JSON"),
    "json of no arrays": (
        "d.json",
        b'[{"x": 1}]',
        "feed 0 array 'x' is not a NumPy array as Polygraphy saves it",
    ),
    "json of no npy": ("d.json", b'[{"x": {"array": "aGVsbG8="}}]', "cannot read .* feed 0 array 'x'"),
    "missing script": ("no.py", None, "cannot read '.*no.py': No such file"),
    "broken script": (
        "d.py",
        b"import nonsense_of_mine",
        "raised ModuleNotFoundError: No module named 'nonsense",
    ),
    "syntax": ("d.py", b"def load_data(:", "raised SyntaxError"),
    "exit": ("d.py", b"import sys; sys.exit(3)", "raised SystemExit: 3"),
    "no function": ("d.py", b"x = 1", "defines no function 'load_data'"),
    "raises": (
        "d.py",
        b"def load_data():\n    raise KeyError('lost\\nthings')",
        "load_data' raised KeyError",
    ),
    "raises late": (
        "d.py",
        b"def load_data():\n    yield from []\n    open('/no/file')",
        "raised FileNotFoundError",
    ),
    "no iterable": ("d.py", b"def load_data():\n    return 3", "is a int, not an iterable of feed dicts"),
    "a text": ("d.py", b"def load_data():\n    return 'x'", "is a str, not an iterable of feed dicts"),
    "nothing": ("d.py", b"def load_data():\n    yield from []", "has no feeds"),
    "no feeds": (
        "d.py",
        b"def load_data():\n    yield 1\n    yield 2",
        "feed 0 is a int; each must be a dict",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        Calibration.open(path, model(VECTORS))
    one_line(error, name)


def test_a_truncated_npz(tmp_path: Path) -> None:
    """The directory of a zip is at its end, so a cut file is no zip."""
    path = save_npz(tmp_path / "d.npz", x=rows(100))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"cannot read .*not a zip file"):
        Calibration.open(path, model(VECTORS))


def test_a_damaged_npz(tmp_path: Path) -> None:
    bytes_in = model("uint8[batch,3] x", "y = Identity(x)", "uint8[batch,3] y")
    noise = np.random.default_rng(0).integers(0, 99, (5000, 3)).astype(np.uint8)
    np.savez_compressed(tmp_path / "d.npz", x=noise)
    data = bytearray((tmp_path / "d.npz").read_bytes())
    data[3000:3100] = bytes(100)
    (tmp_path / "d.npz").write_bytes(data)
    calibration = Calibration.open(tmp_path / "d.npz", bytes_in)
    with pytest.raises(InputError, match=r"cannot read .*d\.npz' array 'x'"):
        list(calibration.fit)


def test_a_truncated_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(100))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:-20])
    calibration = Calibration.open(tmp_path, model(VECTORS))
    with pytest.raises(InputError, match=r"cannot read .*x\.npy': the file is truncated"):
        list(calibration.fit), list(calibration.held_out)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "d.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(InputError, match="Python objects"):
        Calibration.open(path, model(VECTORS))


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.npy or \.npz file"):
        Calibration.open(tmp_path, model(VECTORS))
    save_npz(tmp_path / "a.npz", x=rows(5))
    save_npz(tmp_path / "b.npz", x=rows(5), y=np.arange(5))
    with pytest.raises(InputError, match=r"b\.npz' holds the arrays \['x', 'y'\]"):
        Calibration.open(tmp_path, model(VECTORS))
    save_npz(tmp_path / "b.npz", x=rows(5, 4))
    with pytest.raises(InputError, match=r"b\.npz' array 'x': input 'x' wants shape"):
        Calibration.open(tmp_path, model(VECTORS))
    np.save(tmp_path / "x.npy", rows(5))
    with pytest.raises(InputError, match="mixes"):
        Calibration.open(tmp_path, model(VECTORS))


def test_chunks_that_do_not_continue_one_another(tmp_path: Path) -> None:
    free = model("float[batch,width] x", output="float[batch,width] y")
    save_npz(tmp_path / "a.npz", x=rows(5, 3))
    save_npz(tmp_path / "b.npz", x=rows(5, 4))
    with pytest.raises(InputError, match=r"b\.npz' array 'x' is float32 \[5, 4\], it does not continue"):
        Calibration.open(tmp_path, free)


def test_chunks_that_disagree_on_a_constant(tmp_path: Path) -> None:
    scaled = model("float[batch,3] x, float s", "y = Mul(x, s)", "float[batch,3] y")
    for name, scale in {"a": 1, "b": 2}.items():
        save_npz(tmp_path / f"{name}.npz", x=rows(5), s=np.array(scale, np.float32))
    with pytest.raises(InputError, match=r"b\.npz' array 's' differs"):
        list(Calibration.open(tmp_path, scaled).fit)


# --- made-up samples ---------------------------------------------------------------------------------


def first(calibration: Calibration) -> Batch:
    return next(iter(calibration.fit))


def test_made_up_samples() -> None:
    calibration = Calibration.open(None, model(VECTORS))
    assert calibration.synthetic
    assert (calibration.labels, calibration.samples) == (None, 256)
    assert "made-up samples for 'x' [64, 3]" in calibration.description
    batches = [*calibration.fit, *calibration.held_out]
    values = np.concatenate([batch.feed["x"] for batch in batches])
    assert len(np.unique(values)) > 700
    assert abs(values.mean()) < 0.2
    assert 0.8 < values.std() < 1.2
    again = [*calibration.fit, *calibration.held_out]
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one.feed["x"], other.feed["x"])
        assert one.samples == 64
    other_seed = Calibration.open(None, model(VECTORS), seed=1)
    assert not np.array_equal(first(other_seed).feed["x"], batches[0].feed["x"])


def test_made_up_samples_of_a_given_number() -> None:
    calibration = Calibration.open(None, model(VECTORS), limit=40, batch_size=4)
    assert calibration.samples == 40
    assert len(calibration.fit) == 8


def test_large_samples_are_fewer() -> None:
    big = model("float[batch,1000000] x", output="float[batch,1000000] y")
    assert Calibration.open(None, big).samples == 16


def test_dynamic_sizes_are_found_by_running() -> None:
    """A convolution's input, and a Reshape that wants exactly 224 columns."""
    picky = model(
        "float[N,1,H,W] x",
        "a = Reshape(x, s) y = Relu(a)",
        "float[N,224] y",
        weights="<int64[2] s = {-1, 50176}>",
    )
    assert first(Calibration.open(None, picky)).feed["x"].shape[2:] == (224, 224)
    image = model("float[N,3,H,W] x", output="float[N,3,H,W] y")
    assert first(Calibration.open(None, image)).feed["x"].shape == (64, 3, 64, 64)


def test_one_name_one_size() -> None:
    shared = model("float[batch,T] x, float[batch,T,1] z, float[T] w", "a = Mul(x, w) y = MatMul(a, z)")
    feed = first(Calibration.open(None, shared)).feed
    assert {name: array.shape for name, array in feed.items()} == {
        "x": (64, 16),
        "z": (64, 16, 1),
        "w": (16,),
    }


def test_a_dimension_named_like_the_batch_has_its_size() -> None:
    square = model("float[batch,3] x, float[batch,batch] s", "y = MatMul(s, x)", "float[batch,3] y")
    assert first(Calibration.open(None, square)).feed["s"].shape == (64, 64)


def test_nameless_dimensions() -> None:
    nameless = model(
        "float[?,1,?,?] x, int64[?,?] ids", "y = Relu(x) z = Identity(ids)", "float[K] y, int64[K] z"
    )
    feed = first(Calibration.open(None, nameless)).feed
    assert (feed["x"].shape, feed["ids"].shape) == ((64, 1, 64, 64), (64, 16))


def test_models_for_single_samples() -> None:
    single = model("float[batch,4] x", "y = Reshape(x, s)", "float[4] y", weights="<int64[1] s = {4}>")
    calibration = Calibration.open(None, single)
    assert first(calibration).feed["x"].shape == (1, 4)
    assert first(calibration).samples == 1


def test_numbers_that_say_where_to_look_are_no_indices_of_what_is_found() -> None:
    """`at` says where a table is cut; what the pieces index is no bound on it."""
    cutting = model(
        "int64[batch] ids, int64[1] at, int64[batch] mask",
        "e = Add(at, one) p = Slice(places, at, e) y = Gather(small, p) z = Identity(ids) m = Identity(mask)",
        "float[K] y, int64[batch] z, int64[batch] m",
        weights="<float[1] small = {1}, int64[1] one = {1}, int64[3] places = {0,0,0}>",
    )
    batch = first(Calibration.open(None, cutting, seed=1))
    drawn = [first(Calibration.open(None, cutting, seed=seed)).feed["at"][0] for seed in range(20)]
    assert set(drawn) == {0, 1}
    assert set(batch.feed["mask"]) == {1}


def test_fixed_batches_of_made_up_samples() -> None:
    calibration = Calibration.open(None, model("float[10,3] x", output="float[10,3] y"))
    assert {batch.samples for batch in calibration.fit} == {10}


def test_indices_stay_within_their_tables() -> None:
    """Through Cast and Unsqueeze, into two tables: the smaller one counts."""
    embedding = model(
        "int64[batch,T] ids, int64[batch] kind, bool[batch] flag, int64[batch,T] attention_mask, int64 rate, "
        "uint8[batch,T] raw, float16[batch,T] half",
        """a = Gather<axis = 1>(large, ids)
           i = Cast<to = 7>(ids)
           u = Unsqueeze(i, axis)
           b = Gather(small, u)
           o = OneHot(kind, depth, values)
           n = Identity(flag)
           m = Identity(attention_mask)
           r = Identity(rate)
           w = Identity(raw)
           h = Identity(half)""",
        "float[K] a, float[K] b, float[batch,5] o, bool[batch] n, int64[batch,T] m, int64 r, "
        "uint8[batch,T] w, float16[batch,T] h",
        weights="<float[3,2] small = {1,2,3,4,5,6}, float[1,7] large = {1,2,3,4,5,6,7}, "
        "int64[1] axis = {-1}, int64 depth = {5}, float[2] values = {0,1}>",
    )
    calibration = Calibration.open(None, embedding)
    feeds = [batch.feed for batch in [*calibration.fit, *calibration.held_out]]
    values = {
        name: np.concatenate([np.atleast_1d(feed[name]).ravel() for feed in feeds]) for name in feeds[0]
    }
    assert set(values["ids"]) == {0, 1, 2}
    assert set(values["kind"]) == {0, 1, 2, 3, 4}
    assert set(values["flag"]) == {False, True}
    assert set(values["attention_mask"]) == {1}
    assert set(values["rate"]) == {1}
    assert len(np.unique(values["raw"])) > 200
    assert {name: array.dtype.name for name, array in feeds[0].items()} == {
        "ids": "int64",
        "kind": "int64",
        "flag": "bool",
        "attention_mask": "int64",
        "rate": "int64",
        "raw": "uint8",
        "half": "float16",
    }


@pytest.mark.parametrize(("codes", "top"), [("0, 1, 2, 3, 4", 4), ("5, 1, 2, 3, 4", 1)])
def test_one_hot_by_comparison(codes: str, top: int) -> None:
    """Equal with 0, 1, 2, ... is a lookup; with anything else it is not."""
    compare = model(
        "int32[batch,T,1] x", "y = Equal(x, c)", "bool[batch,T,5] y", weights=f"<int32[5] c = {{{codes}}}>"
    )
    assert first(Calibration.open(None, compare)).feed["x"].max() == top


def test_a_model_that_made_up_samples_do_not_suit() -> None:
    picky = model(
        "float[batch,W] x", "y = Reshape(x, s)", "float[K,7919] y", weights="<int64[2] s = {-1, 7919}>"
    )
    with pytest.raises(
        InputError, match=r"give real ones with --calib \(the model fails in ONNX Runtime"
    ) as error:
        Calibration.open(None, picky)
    one_line(error, "Reshape")


def test_no_rows_cannot_be_made_up() -> None:
    for shape in ("0,3", "0"):
        with pytest.raises(InputError, match="0 rows"):
            Calibration.open(None, model(f"float[{shape}] x", "y = Relu(x)", f"float[{shape}] y"))


def test_shapes_that_cannot_be_made_up() -> None:
    proto = model(VECTORS).to_proto()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="the shape of input 'x' is not declared; give samples with --calib"):
        Calibration.open(None, Model.load(proto))


def test_types_that_cannot_be_made_up() -> None:
    with pytest.raises(InputError, match="samples of text for input 'x' cannot be made up; give real ones"):
        Calibration.open(None, model("string[batch] x", "y = Identity(x)", "string[batch] y"))
    sequence = model("seq(float[N]) s", "y = ConcatFromSequence<axis=0>(s)", "float[M] y")
    with pytest.raises(InputError, match="input 's' is not a tensor but a sequence") as error:
        Calibration.open(None, sequence)
    assert "--calib" not in str(error.value)


def test_made_up_bfloat16() -> None:
    found = Calibration.open(None, model("bfloat16[batch,3] x", "y = Cast<to=1>(x)", "float[batch,3] y"))
    values = first(found).feed["x"]
    assert values.dtype.name == "bfloat16"
    assert 0.5 < values.astype(np.float32).std() < 1.5


def test_no_made_up_sample_is_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many dimensions are open: a batch that is tried after the first holds 32 MB at most."""
    picky = model(
        "float[A,B,C,D] x", "y = Reshape(x, s)", "float[K,7919] y", weights="<int64[2] s = {-1, 7919}>"
    )
    sizes = []
    run = Session.run

    def watched(self: Session, feed: dict[str, np.ndarray], *rest: Any) -> Any:
        sizes.append(feed["x"].nbytes)
        return run(self, feed, *rest)

    monkeypatch.setattr(Session, "run", watched)
    with pytest.raises(InputError, match="give real ones with --calib"):
        Calibration.open(None, picky)
    assert len(sizes) > 6
    assert max(sizes) <= 2**25


@pytest.mark.parametrize("shape", ["batch,3,1099511627776", "4611686018427387904,4611686018427387904"])
def test_declared_sizes_that_fill_any_memory_are_not_made_up(shape: str) -> None:
    with pytest.raises(InputError, match=r"declares takes [\d,]+ GiB") as error:
        Calibration.open(None, model(f"float[{shape}] x", "y = Relu(x)", f"float[{shape}] y"))
    one_line(error, "give real ones with --calib")


def test_sizes_are_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = model("float[A,B] x", "y = Reshape(x, s)", "float[K,7919] y", weights="<int64[2] s = {-1, 7919}>")
    seconds = iter(range(0, 1000, 4))  # more than five have gone after the second try
    monkeypatch.setattr("onnxfuse.data.synthetic.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    tried = []
    run = Session.run

    def watched(self: Session, *arguments: Any) -> Any:
        tried.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(Session, "run", watched)
    with pytest.raises(InputError, match="give real ones with --calib"):
        Calibration.open(None, picky)
    assert len(tried) == 2


# --- memory ------------------------------------------------------------------------------------------


def write_npz(path: Path, count: int, width: int, compressed: bool) -> None:
    """An `.npz` of `count` rows, written without holding it."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    with (
        zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        block = np.random.default_rng(0).integers(0, 9, (500, width)).astype(np.float32)
        for _ in range(count // 500):
            member.write(block.tobytes())


def peak(path: Path, width: int) -> int:
    """The most memory that Python and NumPy held while every batch was read once, in bytes."""
    target = model(f"float[batch,{width}] x", output=f"float[batch,{width}] y")
    gc.collect()
    tracemalloc.start()
    try:
        calibration = Calibration.open(path, target)
        for batches in (calibration.fit, calibration.held_out):
            for _ in batches:
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_does_not_grow_with_the_samples(tmp_path: Path, compressed: bool) -> None:
    """1 MB and 10 MB of samples, batches of 128 kB."""
    for name, count in {"small": 500, "large": 5000}.items():
        write_npz(tmp_path / f"{name}.npz", count, 500, compressed)
    peak(tmp_path / "small.npz", 500)  # what is imported and cached once
    small, large = (peak(tmp_path / f"{name}.npz", 500) for name in ("small", "large"))
    assert large < small + 300_000


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_resident_memory_does_not_grow_either(tmp_path: Path, compressed: bool) -> None:
    """20 MB and 200 MB of samples, run through ONNX Runtime in fresh processes: within 10%."""
    script = (
        "import resource, sys\n"
        "import onnx\n"
        "from onnxfuse.data.calibration import Calibration\n"
        "from onnxfuse.ir.model import Model\n"
        "from onnxfuse.runtime.session import Runtime\n"
        "head = '<ir_version: 8, opset_import: [\"\" : 17]> g (float[batch,5000] x) => '\n"
        "text = head + '(float[batch,5000] y) { y = Relu(x) }'\n"
        "model = Model.load(onnx.parser.parse_model(text))\n"
        "calibration = Calibration.open(sys.argv[1], model)\n"
        "session = Runtime('cpu', threads=1).session(model)\n"
        "for batches in (calibration.fit, calibration.held_out):\n"
        "    for batch in batches:\n"
        "        session.run(batch.feed)\n"
        "print(calibration.samples, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    found = {}
    for count in (1000, 10000):
        path = tmp_path / f"{count}.npz"
        write_npz(path, count, 5000, compressed)
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
        )
        samples, resident = map(int, done.stdout.split())
        assert samples == count
        found[count] = resident
    assert found[10000] < 1.1 * found[1000]


def test_no_files_stay_open(tmp_path: Path) -> None:
    path = _folder_of_chunks(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        calibration = Calibration.open(path, model(VECTORS), batch_size=2)
        for batches in (calibration.fit, calibration.held_out):
            iterator = iter(batches)
            next(iterator)
            del iterator
        list(calibration.fit)
        gc.collect()


def test_an_input_of_unknown_rank_may_be_fed_a_scalar() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x, float[] w) => (float[N,3] y) '
        "{ y = Mul(x, w) }"
    )
    assert not proto.graph.input[1].type.tensor_type.HasField("shape")
    feeds = [{"x": np.ones((4, 3), np.float32), "w": np.array(2, np.float32)}] * 3
    calibration = Calibration.open(feeds, Model.load(proto))
    assert [batch.feed["w"].shape for batch in calibration.fit] == [(), ()]


def test_no_sample_is_made_up_with_more_axes_than_numpy_has() -> None:
    many = ",".join(["1"] * 65)
    with pytest.raises(InputError, match="'x' has 65 axes, and NumPy 64 at most"):
        Calibration.open(None, model(f"float[{many}] x", "y = Identity(x)", f"float[{many}] y"))


# --- some of a stream ---------------------------------------------------------------------------------------


def test_some_samples_are_spread_over_the_stream() -> None:
    x = np.arange(100, dtype=np.float32)[:, None].repeat(3, axis=1)
    fit = Calibration.open({"x": x}, model(VECTORS), held_out=0.0, batch_size=7).fit
    some = fit.some(10)
    assert [value for feed in some.feeds() for value in feed["x"][:, 0]] == list(range(0, 100, 10))
    joined = some.joined(fit.some(3))
    assert [v for feed in joined.feeds() for v in feed["x"][:, 0]] == [
        0,
        10,
        20,
        30,
        33,
        40,
        50,
        60,
        66,
        70,
        80,
        90,
    ]
    assert fit.some(1000).samples == 100


def test_batches_by_their_numbers() -> None:
    calibration = Calibration.open({"x": rows(100)}, model(VECTORS), batch_size=7)
    stream = calibration.held_out
    known = {batch.index: batch for batch in stream}
    numbers = stream.numbers(10)
    assert numbers is not None
    assert len(numbers) == 2
    assert set(numbers) <= known.keys()
    for batch in stream.numbered(numbers):
        np.testing.assert_array_equal(batch.feed["x"], known[batch.index].feed["x"])
        assert batch.samples == known[batch.index].samples
    assert stream.numbers(20) is None
