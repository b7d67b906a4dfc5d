"""References into data files: what is read, what is checked, and what is refused."""

import math
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError
from onnxfuse.ir import external_data
from onnxfuse.ir.external_data import DataFolder
from onnxfuse.ir.model import Model
from onnxfuse.ops.finite import check_finite

W = np.arange(12, dtype=np.float32).reshape(3, 4)
TARGET = np.array([-1, 2], np.int64)


def make(folder: Path, location: str = "weights.bin", **entries: str) -> Path:
    """A model in `folder` whose weights lie in `location`, with the entries of w's reference replaced."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3] x) => (float[M,2] y) { h = MatMul(x, w) y = Reshape(h, target) }"""
    )
    content = b"\0" * 100 + W.tobytes() + b"\0" * 4 + TARGET.tobytes()
    for name, array, offset in (("w", W, 100), ("target", TARGET, 100 + W.nbytes + 4)):
        tensor = model.graph.initializer.add(
            name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype)
        )
        external_data.point(tensor, location, offset, array.nbytes)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / location
    if ".." not in location and not Path(location).is_absolute() and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path | bytes | ModelProto, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        Model.load(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("location", ["weights.bin", "sub/weights.bin", "./weights.bin"])
def test_weights_are_read_from_beside_the_model(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "model", location)
    model = Model.load(path)
    monkeypatch.chdir(tmp_path / "model")
    relative = Model.load("m.onnx")
    monkeypatch.chdir(tmp_path)
    for loaded in (model, relative, model.copy()):
        np.testing.assert_array_equal(loaded.weight(loaded.tensor("w")), W)
        assert loaded.external_dir == tmp_path / "model"
    assert model.to_proto().SerializeToString() == path.read_bytes()


def test_small_shapes_in_external_data_count_for_inference(tmp_path: Path) -> None:
    shapes = Model.load(make(tmp_path)).shapes()
    assert shapes["h"].shape == ("N", 4)
    assert shapes["y"].shape is not None
    assert shapes["y"].shape[1] == 2


def test_only_the_tensors_own_range_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    read: list[tuple[int, int]] = []
    original = external_data.chunks

    def spy(source: external_data.Reference, step: int = external_data.CHUNK):  # type: ignore[no-untyped-def]
        read.append((source.offset, source.length))
        return original(source, step)

    monkeypatch.setattr(external_data, "chunks", spy)
    model = Model.load(path)
    assert read == []
    model.weight(model.tensor("w"))
    assert read == [(100, W.nbytes)]


@pytest.mark.parametrize("step", [1, 7, 48, 100])
def test_chunks_cover_the_range(step: int, tmp_path: Path) -> None:
    path = make(tmp_path)
    source = external_data.Reference(path.parent / "weights.bin", 100, W.nbytes)
    pieces = list(external_data.chunks(source, step))
    assert b"".join(pieces) == W.tobytes()
    assert all(len(piece) <= step for piece in pieces)


@pytest.mark.parametrize("name", ["BFLOAT16", "FLOAT8E5M2", "INT4", "UINT4", "BOOL", "FLOAT16", "COMPLEX64"])
def test_every_type_from_a_file(name: str, tmp_path: Path) -> None:
    elem_type = TensorProto.DataType.Value(name)
    values = np.array([[0, 1, 1]]).astype(helper.tensor_dtype_to_np_dtype(elem_type))
    inline = numpy_helper.from_array(values, "k")
    (tmp_path / "k.bin").write_bytes(inline.raw_data)
    external_data.point(inline, "k.bin", 0, len(inline.raw_data))
    found = external_data.read(inline, DataFolder.of_model(tmp_path / "m.onnx"))
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()
    assert found.shape == values.shape


def test_an_offset_and_length_are_optional(tmp_path: Path) -> None:
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[2, 2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="k.bin")
    (tmp_path / "k.bin").write_bytes(W.tobytes())
    np.testing.assert_array_equal(
        external_data.read(tensor, DataFolder.of_model(tmp_path / "m.onnx")), [[0, 1], [2, 3]]
    )


# What is refused


@pytest.mark.parametrize(
    "location",
    [
        "../weights.bin",
        "sub/../../weights.bin",
        "..",
        "/etc/passwd",
        "C:\\weights.bin",
        "\\\\server\\share",
        "..\\w.bin",
    ],
)
def test_locations_outside_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 1000)
    refused(make(tmp_path / "model", location), "'w'", "outside", "refused")


def test_a_location_that_no_file_system_takes(tmp_path: Path) -> None:
    path = make(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "w" * 5000
    path.write_bytes(model.SerializeToString())
    refused(path, "'w'", "too long")


def test_a_location_that_says_nothing(tmp_path: Path) -> None:
    for text in ("", ".", "a\0b"):
        path = make(tmp_path)
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].external_data[0].value = text
        path.write_bytes(model.SerializeToString())
        refused(path, "'w'", "without a file name")


def test_a_symbolic_link_to_the_data(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    data = tmp_path / "model" / "weights.bin"
    data.rename(tmp_path / "elsewhere.bin")
    data.symlink_to(tmp_path / "elsewhere.bin")
    refused(path, "'w'", "symbolic link", "refused")


def test_a_symbolic_link_on_the_way_to_the_data(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "sub/weights.bin")
    (tmp_path / "model" / "sub").rename(tmp_path / "elsewhere")
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "elsewhere")
    refused(path, "symbolic link")


def cached(tmp_path: Path, location: str = "weights.bin") -> Path:
    """A model in a cache as Hugging Face has it: names in a snapshot are links into one folder."""
    made = make(tmp_path / "made", location)
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "1a2b"
    blobs.mkdir(parents=True)
    (snapshot / location).parent.mkdir(parents=True)
    for file, blob in ((made, "aa"), (made.parent / location, "bb")):
        place = snapshot / file.relative_to(made.parent)
        file.rename(blobs / blob)
        place.symlink_to(os.path.relpath(blobs / blob, place.parent))
    return snapshot / "m.onnx"


@pytest.mark.parametrize("location", ["weights.bin", "sub/weights.bin"])
def test_links_in_a_cache_are_followed_beside_what_the_model_s_own_leads_to(
    tmp_path: Path, location: str
) -> None:
    path = cached(tmp_path, location)
    model = Model.load(path)
    np.testing.assert_array_equal(model.weight(model.tensor("w")), W)
    model.save(path.parent / "out.onnx")  # is no link, so it has data of its own
    assert not (path.parent / "out.onnx.data").is_symlink()
    again = Model.load(path.parent / "out.onnx")
    np.testing.assert_array_equal(again.weight(again.tensor("w")), W)


@pytest.mark.parametrize("target", ["secret.bin", "repo/blobs/link", "repo/blobs/sub/secret.bin"])
def test_a_link_in_a_cache_that_leads_elsewhere_is_refused(tmp_path: Path, target: str) -> None:
    """Also where it leads to a link beside the model that leads on."""
    path = cached(tmp_path)
    (tmp_path / "repo" / "blobs" / "sub").mkdir()
    for name in ("secret.bin", "repo/blobs/sub/secret.bin"):
        (tmp_path / name).write_bytes(b"\0" * 1000)
    (tmp_path / "repo" / "blobs" / "link").symlink_to(tmp_path / "secret.bin")
    (path.parent / "weights.bin").unlink()
    (path.parent / "weights.bin").symlink_to(tmp_path / target)
    refused(path, "'w'", "symbolic link", "outside", "refused")


def test_a_link_that_stays_in_the_model_s_folder(tmp_path: Path) -> None:
    path = make(tmp_path)
    (tmp_path / "weights.bin").rename(tmp_path / "real.bin")
    (tmp_path / "weights.bin").symlink_to("real.bin")
    model = Model.load(path)
    np.testing.assert_array_equal(model.weight(model.tensor("w")), W)
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "weights.bin").symlink_to("weights.bin")  # to itself
    refused(path, "'w'")


@pytest.mark.parametrize("dims", [[2**40, 2**22], [-4], [2**62, 2**62]])
def test_a_sparse_tensor_that_no_memory_holds(dims: list[int]) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "at")
    with pytest.raises(InputError, match="sparse tensor 's'"):
        external_data.dense(onnx.SparseTensorProto(values=values, indices=indices, dims=dims), None)


def test_a_missing_or_short_data_file(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = tmp_path / "weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    refused(path, "'target'", "too short")
    data.unlink()
    refused(path, "'w'", "missing", str(data))
    data.mkdir()
    refused(path, "'w'", "not a file")


def test_a_data_file_that_shrinks_after_loading(tmp_path: Path) -> None:
    model = Model.load(make(tmp_path))
    os.truncate(tmp_path / "weights.bin", 120)
    with pytest.raises(InputError, match="too short"):
        model.weight(model.tensor("w"))
    with pytest.raises(InputError, match="too short"):
        check_finite(model)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("length", "47"),
        ("length", "49"),
        ("length", "-48"),
        ("offset", "-1"),
        ("offset", "one"),
        ("offset", "1e3"),
        ("offset", "9" * 30),
        ("offset", "1000000"),
        ("offset", "\u0663"),
    ],
)
def test_ranges_that_do_not_fit(entry: str, value: str, tmp_path: Path) -> None:
    refused(make(tmp_path, **{entry: value}), "'w'")


def test_without_a_path_there_is_no_folder(tmp_path: Path) -> None:
    path = make(tmp_path)
    refused(path.read_bytes(), "'w'", "weights.bin", "path")
    refused(onnx.load(path, load_external_data=False), "'w'", "weights.bin")


def test_external_strings(tmp_path: Path) -> None:
    path = make(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].data_type = TensorProto.STRING
    path.write_bytes(model.SerializeToString())
    refused(path, "'w'", "no fixed size")


def test_references_in_bodies_and_attributes_are_checked_too(tmp_path: Path) -> None:
    tensor = TensorProto(name="inside", data_type=TensorProto.FLOAT, dims=[2])
    external_data.point(tensor, "../secret", 0, 8)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N] x, bool f) => (float[N] y) {
        y = If(f) < then_branch = a () => (float[N] p) { p = Neg(x) },
                    else_branch = b () => (float[N] q) { q = Relu(x) } > }"""
    )
    model.graph.node[0].attribute[0].g.initializer.append(tensor)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, "'inside'", "outside")


def test_non_finite_values_in_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    check_finite(Model.load(path))
    monkeypatch.setattr(external_data, "CHUNK", 16)
    data = tmp_path / "weights.bin"
    for value, word in ((math.nan, "NaN"), (math.inf, "infinite")):
        bad = W.copy()
        bad[-1, -1] = value
        data.write_bytes(data.read_bytes()[:100] + bad.tobytes() + data.read_bytes()[148:])
        with pytest.raises(InputError, match=f"'w' has an? {word}"):
            check_finite(Model.load(path))
