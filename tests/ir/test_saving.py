"""Saving: the file appears whole or not at all, and nothing that was read is written to."""

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError
from onnxfuse.ir import external_data, saving
from onnxfuse.ir.external_data import DataFolder
from onnxfuse.ir.model import Model

WEIGHTS = {
    "w": np.arange(1200, dtype=np.float32).reshape(30, 40) / 1200,
    "b": np.arange(40, dtype=np.float32),
    "v": np.ones((40, 30), np.float32) / 40,
}
X = np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 30)


def network(external: bool = False) -> ModelProto:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N,30] x) => (float[N,30] y)
        { [first] h = Gemm(x, w, b) r = Relu(h) [last] y = MatMul(r, v) }"""
    )
    offset = 0
    for name, array in WEIGHTS.items():
        tensor = numpy_helper.from_array(array, name)
        tensor.doc_string = f"about {name}"
        if external:
            external_data.point(tensor, "weights.bin", offset, array.nbytes)
        model.graph.initializer.append(tensor)
        offset += array.nbytes
    return model


def write(folder: Path, external: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "m.onnx"
    path.write_bytes(network(external).SerializeToString())
    if external:
        (folder / "weights.bin").write_bytes(b"".join(a.tobytes() for a in WEIGHTS.values()))
    return path


def run(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    result: np.ndarray = onnxruntime.InferenceSession(path, options).run(None, {"x": X})[0]
    return result


def expected(**weights: np.ndarray) -> np.ndarray:
    w = WEIGHTS | weights
    result: np.ndarray = np.maximum(X @ w["w"] + w["b"], 0) @ w["v"]
    return result


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def references(path: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return {
        t.name: {e.key: e.value for e in t.external_data}
        for t in external_data.model_tensors(model)
        if external_data.is_external(t)
    }


# What is written


def test_a_file_is_the_model(tmp_path: Path) -> None:
    model = Model.load(write(tmp_path))
    out = tmp_path / "out.onnx"
    model.save(out)
    assert onnx.load(out) == network()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx"]
    model.save(str(out))
    assert onnx.load(out) == network()


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    Model.load(write(tmp_path)).save(tmp_path / "out.onnx")
    assert stat.S_IMODE((tmp_path / "out.onnx").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_edits_are_written_inline(tmp_path: Path) -> None:
    model = Model.load(write(tmp_path))
    new = WEIGHTS["w"].T.copy().T * 2  # not contiguous
    assert not new.flags.c_contiguous
    model.set_weight(model.tensor("w"), new)
    model.save(tmp_path / "out.onnx")
    np.testing.assert_allclose(run(tmp_path / "out.onnx"), expected(w=new), rtol=1e-5)
    saved = onnx.load(tmp_path / "out.onnx").graph.initializer[0]
    assert saved.doc_string == "about w"
    assert not references(tmp_path / "out.onnx")


def test_references_stay_in_the_same_folder(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    before = snapshot(tmp_path)
    Model.load(path).save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx", load_external_data=False) == network(external=True)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {str(tmp_path / "out.onnx")}


def test_references_from_another_folder_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_data, "CHUNK", 1000)
    path = write(tmp_path / "in", external=True)
    out = tmp_path / "out" / "o.onnx"
    out.parent.mkdir()
    Model.load(path).save(out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["o.onnx", "o.onnx.data"]
    assert {r["location"] for r in references(out).values()} == {"o.onnx.data"}
    (tmp_path / "in" / "weights.bin").unlink()
    np.testing.assert_allclose(run(out), expected(), rtol=1e-5)
    again = Model.load(out)
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(again.weight(again.tensor(name)), array)
    assert [t.doc_string for t in onnx.load(out, load_external_data=False).graph.initializer] == [
        f"about {name}" for name in WEIGHTS
    ]


def test_tensors_that_share_a_range_share_its_copy(tmp_path: Path) -> None:
    path = write(tmp_path / "in", external=True)
    model = onnx.load(path, load_external_data=False)
    tied = model.graph.initializer.add()
    tied.CopyFrom(model.graph.initializer[0])
    tied.name = "tied"
    path.write_bytes(model.SerializeToString())
    out = tmp_path / "o.onnx"
    Model.load(path).save(out)
    found = references(out)
    assert found["tied"] == found["w"]
    assert (tmp_path / "o.onnx.data").stat().st_size < 2 * 4800 + 3 * 4096 + 200


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_an_edited_external_tensor_stays_external(
    same_folder: bool, contiguous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_data, "CHUNK", 1000)
    path = write(tmp_path / "in", external=True)
    out = tmp_path / ("in" if same_folder else "out") / "o.onnx"
    out.parent.mkdir(exist_ok=True)
    model = Model.load(path)
    new = np.asarray(WEIGHTS["w"] * 2, order="C" if contiguous else "F")
    small = WEIGHTS["b"] + 1  # less than a kilobyte: not worth a reference
    model.set_weight(model.tensor("w"), new)
    model.set_weight(model.tensor("b"), small)
    model.save(out)
    found = references(out)
    assert found["w"]["location"] == "o.onnx.data"
    assert all(int(r["offset"]) % 4096 == 0 for r in found.values() if r["location"] == "o.onnx.data")
    assert found["v"]["location"] == ("weights.bin" if same_folder else "o.onnx.data")
    assert set(found) == {"w", "v"}
    np.testing.assert_allclose(run(out), expected(w=new, b=small), rtol=1e-5)
    assert onnx.load(out, load_external_data=False).graph.initializer[0].doc_string == "about w"


def test_a_new_shape_for_an_external_tensor(tmp_path: Path) -> None:
    model = Model.load(write(tmp_path / "in", external=True))
    model.set_weight(model.tensor("v"), np.ones((40, 50), np.float32))
    model.save(tmp_path / "o.onnx")
    again = Model.load(tmp_path / "o.onnx")
    np.testing.assert_array_equal(again.weight(again.tensor("v")), np.ones((40, 50)))


@pytest.mark.parametrize("dtype", ["int4", "bfloat16", "float16", "bool"])
def test_edited_external_tensors_of_other_types(dtype: str, tmp_path: Path) -> None:
    import ml_dtypes

    array = (np.arange(5001) % 2).astype(getattr(ml_dtypes, dtype, None) or dtype)
    model = Model.load(write(tmp_path, external=True))
    model.nodes[0].inputs[0] = model.tensor("x")
    model.set_weight(model.tensor("w"), array)
    model.save(tmp_path / "o.onnx")
    assert set(references(tmp_path / "o.onnx")) == {"w", "b", "v"}
    again = Model.load(tmp_path / "o.onnx")
    found = again.weight(again.tensor("w"))
    assert found is not None
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_references_in_bodies_and_attributes_are_copied_too(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool f) => (float[2] y) {
        y = If(f) < then_branch = a () => (float[2] p) { p = Mul(x, inside) },
                    else_branch = b () => (float[2] q) { q = Relu(x) } > }"""
    )
    tensor = TensorProto(name="inside", data_type=TensorProto.FLOAT, dims=[2])
    external_data.point(tensor, "k.bin", 0, 8)
    model.graph.node[0].attribute[0].g.initializer.append(tensor)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "k.bin").write_bytes(np.array([3, 4], np.float32).tobytes())
    path = tmp_path / "in" / "m.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = Model.load(path)
    loaded.save(tmp_path / "o.onnx")
    assert references(tmp_path / "o.onnx")["inside"]["location"] == "o.onnx.data"
    again = Model.load(tmp_path / "o.onnx")
    body = again.nodes[0].attrs["then_branch"]
    np.testing.assert_array_equal(
        external_data.read(body.initializer[0], DataFolder.of_model(tmp_path / "m.onnx")), [3, 4]
    )
    assert loaded.to_proto().SerializeToString() == path.read_bytes()


def test_a_model_over_the_limit_moves_its_initializers_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PROTOBUF_LIMIT", 6000)
    path = write(tmp_path)
    model = Model.load(path)
    model.set_weight(model.tensor("v"), WEIGHTS["v"] * 2)
    model.add_weight("spare", np.zeros(3, np.float32))
    model.save(tmp_path / "o.onnx")
    assert set(references(tmp_path / "o.onnx")) == {"w", "v"}
    np.testing.assert_allclose(run(tmp_path / "o.onnx"), expected(v=WEIGHTS["v"] * 2), rtol=1e-5)
    before = (tmp_path / "o.onnx").read_bytes()
    monkeypatch.setattr(saving, "PROTOBUF_LIMIT", 100)
    with pytest.raises(InputError, match="over 2 GB"):
        model.save(tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == before


def test_typed_data_moves_out_as_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = network()
    values = np.arange(500, dtype=np.float16)
    proto.graph.initializer.append(helper.make_tensor("k", TensorProto.FLOAT16, [500], values))
    proto.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [2], [b"a" * 2000, b"b"]))
    monkeypatch.setattr(saving, "PROTOBUF_LIMIT", 6000)
    Model.load(proto).save(tmp_path / "o.onnx")
    assert "s" not in references(tmp_path / "o.onnx")
    again = Model.load(tmp_path / "o.onnx")
    np.testing.assert_array_equal(again.weight(again.tensor("k")), values)


@pytest.mark.slow
def test_a_model_over_2_gb(tmp_path: Path) -> None:
    """Two tensors of 1.2 GB, one of them edited: written, read back, run."""
    size = 300_000_000
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (int64[1] i) => (float[1] y, float[1] z)
        { y = Gather(a, i) z = Gather(b, i) }"""
    )
    for name in "ab":
        tensor = proto.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=[size])
        external_data.point(tensor, "weights.bin", 0 if name == "a" else 4 * size, 4 * size)
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "weights.bin", "wb") as file:
        file.truncate(8 * size)
        file.seek(8 * size - 4)
        file.write(np.float32(7).tobytes())
    (tmp_path / "in" / "m.onnx").write_bytes(proto.SerializeToString())
    model = Model.load(tmp_path / "in" / "m.onnx")
    array = np.zeros(size, np.float32)
    array[-1] = 5
    model.set_weight(model.tensor("a"), array)
    model.add_weight("third", array)  # inline, it would not fit
    model.save(tmp_path / "o.onnx")
    del array
    again = Model.load(tmp_path / "o.onnx")
    assert set(references(tmp_path / "o.onnx")) == {"a", "b", "third"}
    assert again.shapes()["y"].shape == (1,)
    session = onnxruntime.InferenceSession(tmp_path / "o.onnx")
    assert session.run(None, {"i": np.array([size - 1])}) == [5, 7]


# Where it may go


def test_the_input_is_never_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    (tmp_path / "soft.onnx").symlink_to(path)
    os.link(path, tmp_path / "hard.onnx")
    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = Model.load("m.onnx")
    before = snapshot(tmp_path)
    monkeypatch.chdir("/")
    names = ("m.onnx", "soft.onnx", "hard.onnx", "folder/m.onnx", "x/../m.onnx")
    for target in (tmp_path / name for name in names):
        with pytest.raises(InputError, match=r"input|folder"):
            model.save(target)
    assert snapshot(tmp_path) == before
    linked = Model.load(tmp_path / "soft.onnx")
    with pytest.raises(InputError, match="input"):
        linked.save(path)


def test_a_data_file_of_the_input_is_never_written(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    os.link(tmp_path / "weights.bin", tmp_path / "hard.bin")
    before = snapshot(tmp_path)
    for name in ("weights.bin", "hard.bin"):
        with pytest.raises(InputError, match="data file of the input"):
            Model.load(path).save(tmp_path / name)
    assert snapshot(tmp_path) == before


def test_the_new_data_file_avoids_the_inputs(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "o.onnx.data"
    (tmp_path / "weights.bin").rename(tmp_path / "o.onnx.data")
    path.write_bytes(proto.SerializeToString())
    before = (tmp_path / "o.onnx.data").read_bytes()
    model = Model.load(path)
    model.set_weight(model.tensor("w"), WEIGHTS["w"] * 3)
    model.save(tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx.data").read_bytes() == before
    assert references(tmp_path / "o.onnx")["w"]["location"] == "o.onnx.1.data"
    np.testing.assert_allclose(run(tmp_path / "o.onnx"), expected(w=WEIGHTS["w"] * 3), rtol=1e-5)


@pytest.mark.parametrize("target", ["missing/o.onnx", ".", "/dev/null", "x" * 300, "a\0b"])
def test_places_that_can_not_be_written(target: str, tmp_path: Path) -> None:
    model = Model.load(write(tmp_path))
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        model.save(tmp_path / target)
    assert snapshot(tmp_path) == before


def test_a_data_file_that_can_not_be_written(tmp_path: Path) -> None:
    model = Model.load(write(tmp_path / "in", external=True))
    (tmp_path / "o.onnx").write_bytes(b"old")
    (tmp_path / "o.onnx.data").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        model.save(tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == b"old"


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    model = Model.load(write(tmp_path))
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    (tmp_path / "o.onnx").symlink_to(other)
    model.save(tmp_path / "o.onnx")
    assert other.read_bytes() == b"mine"
    assert not (tmp_path / "o.onnx").is_symlink()


# Failure on the way


@pytest.mark.parametrize("external", [True, False])
def test_a_full_disk_leaves_nothing(external: bool, tmp_path: Path) -> None:
    """A real failing write: the process may write no file longer than a few kilobytes."""
    path = write(tmp_path / "in", external)
    out = tmp_path / "out"
    out.mkdir()
    (out / "o.onnx").write_bytes(b"old")
    model = Model.load(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*o\.onnx.*large"):
            model.save(out / "o.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [("o.onnx", b"old")]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()]
)
@pytest.mark.parametrize("at", range(9))
def test_a_failure_at_any_step_leaves_nothing_half_done(
    error: BaseException, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails at the n-th file system call: then there is the old output, or none, or the new one whole."""
    path = write(tmp_path / "in", external=True)
    out = tmp_path / "out"
    out.mkdir()
    target, data = out / "o.onnx", out / "o.onnx.data"
    first = Model.load(path)
    first.set_weight(first.tensor("b"), WEIGHTS["b"] * 0)
    first.save(target)
    old = run(target)
    before = snapshot(tmp_path / "in")
    calls = 0

    def failing(original):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls - 1 == at:
                raise error
            return original(*args, **kwargs)

        return wrapper

    model = Model.load(path)
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    monkeypatch.setattr(external_data, "point", failing(external_data.point))
    try:
        model.save(target)
        failed = False
    except (InputError, KeyboardInterrupt, MemoryError) as caught:
        failed = True
        if isinstance(error, OSError):
            assert "No space left" in str(caught)  # noqa: PT017
    monkeypatch.undo()
    assert snapshot(tmp_path / "in") == before
    assert {p.name for p in out.iterdir()} <= {"o.onnx", "o.onnx.data"}
    assert failed == (at < 7 or (at == 7 and not isinstance(error, OSError)))
    if target.exists():
        result = run(target)
        assert np.allclose(result, expected(), rtol=1e-5) or np.array_equal(result, old)
    else:
        assert failed
        assert data.exists() == (at == 5)  # the old data, when its model had to go and no new one came


def test_an_interrupt_from_outside_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of writing, in a process of its own."""
    path = write(tmp_path / "in", external=True)
    out = tmp_path / "out"
    out.mkdir()
    code = f"""
import os, signal
from onnxfuse.ir import external_data
from onnxfuse.ir.model import Model
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
original = external_data.chunks
def slow(source, step=1):
    for i, piece in enumerate(original(source, 100)):
        if i == 5:
            os.kill(os.getpid(), signal.SIGINT)
        yield piece
external_data.chunks = slow
model = Model.load({str(path)!r})
model.save({str(out / "o.onnx")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode != 0
    assert b"KeyboardInterrupt" in done.stderr
    assert list(out.iterdir()) == []
