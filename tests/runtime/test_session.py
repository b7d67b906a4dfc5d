"""Sessions: what they return, what they refuse, and that nothing reaches the screen."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.feeds import check_type
from onnxfuse.runtime.handover import _serialized
from onnxfuse.runtime.onnx_runtime import captured_output, ort
from onnxfuse.runtime.providers import _load_failure, available_cores
from onnxfuse.runtime.session import Runtime, Session

CPU = "CPUExecutionProvider"
X = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)
W = np.array([[1, 2], [0, 1], [1, 0]], np.float32)


def parse(body: str, header: str = 'ir_version: 8, opset_import: ["" : 17]') -> onnx.ModelProto:
    return onnx.parser.parse_model(f"<{header}>\n{body}")


def affine() -> onnx.ModelProto:
    """y = relu(x w + c): an initializer, a Constant node, one output."""
    return parse(
        """g (float[N,3] x) => (float[N,2] y) <float[3,2] w = {1, 2, 0, 1, 1, 0}> {
            c = Constant<value = float[2] {0.5, -0.5}>()
            a = MatMul(x, w)
            b = Add(a, c)
            y = Relu(b)
        }"""
    )


def test_run_returns_outputs_by_name() -> None:
    session = Runtime("cpu").session(affine())
    assert session.inputs == [TensorInfo("x", np.dtype(np.float32), ("N", 3))]
    assert session.output_names == ["y"]
    assert session.providers == [CPU]
    outputs = session.run({"x": X})
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], np.maximum(X @ W + [0.5, -0.5], 0), rtol=1e-6)


@pytest.mark.parametrize("optimize", [True, False])
def test_taps_on_every_kind_of_tensor(optimize: bool) -> None:
    """Inner tensors, a graph input, an initializer, a Constant node's output, an output as it is."""
    model = affine()
    before = model.SerializeToString()
    session = Runtime("cpu").session(model, taps=["a", "x", "w", "c", "y", "a"], optimize=optimize)
    assert session.output_names == ["y", "a", "x", "w", "c"]
    outputs = session.run({"x": X})
    np.testing.assert_allclose(outputs["a"], X @ W, rtol=1e-6)
    np.testing.assert_array_equal(outputs["x"], X)
    np.testing.assert_array_equal(outputs["w"], W)
    np.testing.assert_array_equal(outputs["c"], np.array([0.5, -0.5], np.float32))
    np.testing.assert_allclose(outputs["y"], np.maximum(outputs["a"] + outputs["c"], 0), rtol=1e-6)
    assert model.SerializeToString() == before


def test_only_what_is_wanted_is_computed() -> None:
    """Without output y the Gather that fails is never run; nodes that only a body uses stay."""
    model = parse(
        """g (float[N,3] x, int64[M] i, bool c) => (float[M,3] y, float[N,3] z) {
            a = Abs(x)
            inner = Neg(a)
            y = Gather(a, i)
            z = If (c) <
                then_branch = t () => (float[N,3] tz) { tz = Identity(inner) },
                else_branch = e () => (float[N,3] ez) { ez = Neg(inner) }
            >
        }"""
    )
    feed = {"x": X, "i": np.array([7]), "c": np.array(True)}
    only_tap = Runtime("cpu").session(model, taps=["a"], outputs=())
    assert only_tap.output_names == ["a"]
    np.testing.assert_array_equal(only_tap.run(feed)["a"], np.abs(X))
    for condition in (True, False):
        branch = Runtime("cpu").session(model, outputs=["z"]).run({**feed, "c": np.array(condition)})
        np.testing.assert_array_equal(branch["z"], np.abs(X) * (-1 if condition else 1))
    with pytest.raises(NotApplicableError):
        Runtime("cpu").session(model, taps=["a"]).run(feed)


def test_run_can_return_some_outputs() -> None:
    session = Runtime("cpu").session(affine(), taps=["a", "b"])
    assert list(session.run({"x": X}, ["b"])) == ["b"]
    assert session.run({"x": X}, []) == {}
    with pytest.raises(InputError, match="'nothing' is not among"):
        session.run({"x": X}, ["nothing"])


@pytest.mark.parametrize("name", ["nothing", ""])
def test_a_tap_on_no_tensor(name: str) -> None:
    with pytest.raises(InputError, match="no tensor named"):
        Runtime("cpu").session(affine(), taps=[name])


def test_a_model_under_edit() -> None:
    session = Runtime("cpu").session(Model.load(affine()), taps=["a"])
    np.testing.assert_allclose(session.run({"x": X})["a"], X @ W, rtol=1e-6)


def test_initializers_listed_as_inputs_are_no_inputs() -> None:
    model = affine()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 2]))
    session = Runtime("cpu").session(model)
    assert [info.name for info in session.inputs] == ["x"]
    session.run({"x": X})


FEEDS = {
    "missing": ({}, "no array for input 'x'; the model's inputs are 'x'"),
    "unknown": ({"x": X, "z": X}, "no input 'z'; its inputs are 'x'"),
    "float64": ({"x": X.astype(np.float64)}, r"wants float32, got float64; .* .astype\('float32'\)"),
    "integers": ({"x": X.astype(np.uint8)}, "wants float32, got uint8"),
    "swapped": ({"x": X.astype(">f4")}, "wants float32, got >f4"),
    "rank": ({"x": X[0]}, r"wants shape \[N, 3\], got \[3\]"),
    "size": ({"x": X[:, :2]}, r"wants shape \[N, 3\], got \[2, 2\]"),
    "list": ({"x": X.tolist()}, "wants a NumPy array, got list"),
}


@pytest.mark.parametrize("case", FEEDS)
def test_feeds_that_do_not_fit(case: str) -> None:
    feed, message = FEEDS[case]
    session = Runtime("cpu").session(affine())
    for use in (session.run, session.bind):
        with pytest.raises(InputError, match=message) as caught:
            use(feed)
        assert "\n" not in str(caught.value)


def test_an_input_of_unknown_rank_takes_any() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    session = Runtime("cpu").session(model)
    assert session.inputs[0].shape is None
    assert session.run({"x": X})["y"].shape == X.shape


def test_text_inputs() -> None:
    check_type(TensorInfo("s", np.dtype(object), (None,)), np.array(["a"]).dtype, (1,))
    with pytest.raises(InputError, match="wants object, got float32"):
        check_type(TensorInfo("s", np.dtype(object), (None,)), X.dtype, (1,))


def test_arrays_that_are_not_contiguous() -> None:
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    session = Runtime("cpu").session(affine(), taps=["a"])
    np.testing.assert_allclose(session.run({"x": wide.T})["a"], wide.T @ W)
    bound = session.bind({"x": wide.T})
    bound.run()
    np.testing.assert_allclose(bound.fetch()["a"], wide.T @ W)


def test_scalars_stay_scalars() -> None:
    session = Runtime("cpu").session(parse("g (float x) => (float y) { y = Neg(x) }"))
    feed = {"x": np.array(3, np.float32)}
    bound = session.bind(feed)
    bound.run()
    assert session.run(feed)["y"].shape == bound.fetch()["y"].shape == ()


def test_bound_runs() -> None:
    session = Runtime("cpu").session(affine(), taps=["a"])
    bound = session.bind({"x": X})
    for _ in range(3):
        bound.run()
    fetched = bound.fetch()
    assert list(fetched) == ["y", "a"]
    for name, array in session.run({"x": X}).items():
        np.testing.assert_array_equal(fetched[name], array)


def test_bound_feed_outlives_the_callers_array() -> None:
    session = Runtime("cpu").session(affine(), taps=["x"])
    bound = session.bind({"x": X.copy()})
    junk = [np.full_like(X, 9) for _ in range(100)]
    bound.run()
    np.testing.assert_array_equal(bound.fetch()["x"], X)
    assert len(junk) == 100


def test_failing_runs_are_one_clear_line(capfd: pytest.CaptureFixture[str]) -> None:
    model = parse(
        """g (float[N,3] x) => (float[M,4] y) <int64[2] s = {-1, 4}> {
            [shaper] y = Reshape(x, s)
        }"""
    )
    session = Runtime("cpu").session(model)
    for use in (session.run, lambda feed: session.bind(feed).run()):
        with pytest.raises(NotApplicableError) as caught:
            use({"x": X})
        line = str(caught.value)
        assert "Reshape node 'shaper'" in line
        assert "cannot be reshaped" in line
        assert not any(noise in line for noise in ("\n", "onnxruntime_src", ".h:", "ONNXRuntimeError"))
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_nameless_failing_node() -> None:
    model = parse(
        """g (int64[M] i) => (float[M] y) <float[2] w = {1, 2}> {
            y = Gather(w, i)
        }"""
    )
    with pytest.raises(
        NotApplicableError, match=r"a nameless Gather node: indices element out of data bounds"
    ):
        Runtime("cpu").session(model).run({"i": np.array([5])})


BROKEN = {
    "operator": ("g (float[N] x) => (float[N] y) { y = Foo(x) }", "Foo"),
    "type": ("g (float[N] x) => (int64[N] y) { y = Relu(x) }", "Type Error"),
    "kernel": (
        "g (int16[N] x) => (int16[N] y) { y = Relu(x) }",
        "could not|Could not find an implementation for Relu",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("optimize", [True, False])
def test_models_that_do_not_load(case: str, optimize: bool, capfd: pytest.CaptureFixture[str]) -> None:
    body, message = BROKEN[case]
    with pytest.raises(NotApplicableError, match=message) as caught:
        Runtime("cpu").session(parse(body), optimize=optimize)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_warnings_stay_off_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime warns about an unused initializer and about an output of another shape than declared."""
    model = parse(
        """g (float[N,3] x) => (float[N,7] y) <float[1] unused = {1}> {
            y = Relu(x)
        }"""
    )
    Runtime("cpu").session(model).run({"x": X})
    assert capfd.readouterr() == ("", "")


def two_weights() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(300, dtype=np.float32).reshape(3, 100), "big")
    shape = numpy_helper.from_array(np.array([-1, 50], np.int64), "shape")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "big"], ["a"]), helper.make_node("Reshape", ["a", "shape"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight, shape],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    model.producer_name = "copied like every other field"
    return model


def narrow(kind: str) -> onnx.ModelProto:
    """y = -2 x in a type that NumPy lacks, and z = x as it comes out of that."""
    number = TensorProto.DataType.Value(kind.upper())
    return parse(
        f"""g ({kind}[N,3] x) => ({kind}[N,3] y, float[N,3] z) <float f = {{-2}}> {{
            z = Cast<to = 1>(x) p = Mul(z, f) y = Cast<to = {number}>(p)
        }}""",
        'ir_version: 9, opset_import: ["" : 19]',
    )


@pytest.mark.parametrize("kind", ["bfloat16", "float8e4m3fn", "float8e5m2"])
@pytest.mark.parametrize("rows", [2, 0])
def test_types_that_numpy_lacks(kind: str, rows: int) -> None:
    """In their own type, as their bits or the raw bytes of np.save, and as float32, which is rounded."""
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind.upper())))
    given = np.array([[1.1, -2, 0], [-4, 0.3, 6]], np.float32)[:rows]
    held = given.astype(dtype)
    assert not rows or (held.astype(np.float32) != given).any()
    session = Runtime("cpu").session(narrow(kind))
    for array in (
        held,
        held.view(f"u{dtype.itemsize}"),
        held.view(f"V{dtype.itemsize}"),
        given,
        given.T.copy().T,
    ):
        for outputs in (session.run({"x": array}), _bound(session, {"x": array})):
            np.testing.assert_array_equal(outputs["z"], held.astype(np.float32))
            assert outputs["y"].dtype == dtype
            np.testing.assert_array_equal(outputs["y"].astype(np.float32), -2 * held.astype(np.float32))
    assert session.run({"x": held}, ["z"])["z"].shape == (rows, 3)
    with pytest.raises(
        InputError, match=rf"wants {dtype}, got float64; give float32, which is rounded to it, or"
    ):
        session.run({"x": given.astype(np.float64)})


def _bound(session: Session, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    bound = session.bind(feed)
    bound.run()
    return bound.fetch()


def test_a_sequence_is_refused_for_what_it_is() -> None:
    model = parse("g (seq(float[N]) s) => (float[M] y) { y = ConcatFromSequence<axis = 0>(s) }")
    with pytest.raises(InputError, match="input 's' is not a tensor but a sequence") as error:
        Runtime("cpu").session(model).run({"s": X})
    assert "--calib" not in str(error.value)


def test_external_data_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_weights()
    expected = Runtime("cpu").session(model).run({"x": X})["y"]
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = Model.load(path)
    assert loaded.external_dir == tmp_path
    np.testing.assert_array_equal(Runtime("cpu").session(loaded).run({"x": X})["y"], expected)


def test_a_stale_shape_inside_does_not_reach_the_plan_of_memory() -> None:
    model = parse(
        """g (float[N,3] x) => (float[N,3] y) <float[3,3] h> { h = Neg(x) y = Abs(h) }""",
    )
    loaded = Model.load(model)
    bound = Runtime("cpu").session(loaded).bind({"x": X})
    bound.run()
    np.testing.assert_array_equal(bound.fetch()["y"], abs(X))
    assert loaded.to_proto() == model


@pytest.mark.parametrize("linked", ["both", "data", "one"])
def test_external_data_behind_links(tmp_path: Path, linked: str) -> None:
    """As in a cache, where names are links into another folder; ONNX Runtime itself refuses most of them."""
    model = two_weights()
    expected = Runtime("cpu").session(model).run({"x": X})["y"]
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    onnx.save_model(
        model, tmp_path / "blobs" / "a", save_as_external_data=True, location="w.bin", size_threshold=100
    )
    (tmp_path / "blobs" / "w.bin").rename(tmp_path / "blobs" / "b")
    path = tmp_path / "snapshot" / "model.onnx"
    path.symlink_to("../blobs/a")
    (tmp_path / "snapshot" / "w.bin").symlink_to("../blobs/b")
    if linked == "one":
        (tmp_path / "snapshot" / "w.bin").unlink()
        (tmp_path / "blobs" / "b").rename(tmp_path / "snapshot" / "w.bin")
    if linked == "data":
        path.unlink()
        (tmp_path / "blobs" / "a").rename(path)
        (tmp_path / "blobs" / "b").rename(tmp_path / "snapshot" / "b")
        (tmp_path / "snapshot" / "w.bin").unlink()
        (tmp_path / "snapshot" / "w.bin").symlink_to("b")
    loaded = Model.load(path)
    before = loaded.to_proto().SerializeToString()
    np.testing.assert_array_equal(Runtime("cpu").session(loaded).run({"x": X})["y"], expected)
    assert loaded.to_proto().SerializeToString() == before


@pytest.mark.parametrize("optimize", [True, False])
def test_models_past_the_protobuf_limit(monkeypatch: pytest.MonkeyPatch, optimize: bool) -> None:
    """The path for models over 2 GiB, taken at 1000 bytes: large initializers travel beside the model."""
    model = two_weights()
    expected = X @ np.arange(300, dtype=np.float32).reshape(3, 100)
    monkeypatch.setattr("onnxfuse.runtime.handover._PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr("onnxfuse.runtime.handover._KEPT_BYTES", 100)
    session = Runtime("cpu").session(model, taps=["a", "big"], optimize=optimize)
    del model
    outputs = session.run({"x": X})
    np.testing.assert_allclose(outputs["a"], expected, rtol=1e-6)
    np.testing.assert_allclose(outputs["y"], expected.reshape(-1, 50), rtol=1e-6)
    np.testing.assert_array_equal(outputs["big"], np.arange(300).reshape(3, 100))


def test_past_the_limit_with_external_data_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_weights()
    second = numpy_helper.from_array(np.full((50, 2), 0.5, np.float32), "second")
    model.graph.initializer.append(second)
    model.graph.node.append(helper.make_node("MatMul", ["y", "second"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    expected = Runtime("cpu").session(model).run({"x": X})["z"]
    stored = model.graph.initializer[2]
    (tmp_path / "second.bin").write_bytes(stored.raw_data)
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    stored.external_data.add(key="location", value="second.bin")
    onnx.save_model(model, tmp_path / "m.onnx")
    monkeypatch.setattr("onnxfuse.runtime.handover._PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr("onnxfuse.runtime.handover._KEPT_BYTES", 100)
    outputs = Runtime("cpu").session(Model.load(tmp_path / "m.onnx")).run({"x": X})
    np.testing.assert_allclose(outputs["z"], expected, rtol=1e-6)


def test_too_large_even_without_initializers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxfuse.runtime.handover._PROTOBUF_LIMIT", 10)
    with pytest.raises(NotApplicableError, match="over 2 GiB"):
        Runtime("cpu").session(two_weights())


@pytest.mark.parametrize("name", ["cpu", "CPU", CPU])
def test_provider_names(name: str) -> None:
    assert Runtime(name).providers == [CPU]


def test_an_unknown_provider() -> None:
    with pytest.raises(InputError, match=r"'quantum' is not in this build .* choose from auto, .*cpu"):
        Runtime("quantum")


def test_threads_below_one() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Runtime("cpu", threads=0)
    assert Runtime("cpu", threads=3).threads == 3


def test_a_provider_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build lists a provider which sessions do not get: auto passes over it, asking for it is refused."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(
        "onnxfuse.runtime.session.probe_provider", lambda provider, device: (CPU, "libcuda.so is missing")
    )
    assert Runtime().providers == [CPU]
    with pytest.raises(InputError, match=r"'cuda' cannot be used on this machine: libcuda\.so is missing"):
        Runtime("cuda")


def test_a_provider_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr("onnxfuse.runtime.session.probe_provider", lambda provider, device: (provider, ""))
    assert Runtime().providers == ["CUDAExecutionProvider", CPU]


def test_the_probe_believes_the_session() -> None:
    """Every provider of this build, in a fresh process: what is promised is what a session gets, silently."""
    script = (
        "import onnxruntime as ort\n"
        "from onnxfuse.errors import InputError\n"
        "from onnxfuse.runtime.providers import probe_provider\n"
        "from onnxfuse.runtime.session import Runtime\n"
        "assert Runtime().providers[0] in ('CPUExecutionProvider', 'CUDAExecutionProvider')\n"
        "for name in ort.get_available_providers():\n"
        "    got, reason = probe_provider(name, 0)\n"
        "    assert (got == name) == (not reason or got == name)\n"
        "    try:\n"
        "        assert Runtime(name).providers[0] == name\n"
        "    except InputError as error:\n"
        "        assert got != name and reason in str(error)\n"
        "        assert 'CUDA' not in name or 'could not make a session' not in reason\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_a_session_is_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = ort.InferenceSession

    def spy(model: bytes, options: Any, **arguments: Any) -> Any:
        made.append((options, arguments))
        return original(model, options, **arguments)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    levels = ort.GraphOptimizationLevel
    machine = Runtime("cpu", threads=3)
    machine.session(affine())
    machine.session(affine(), optimize=False, threads=1)
    assert made[0][0].graph_optimization_level == levels.ORT_ENABLE_ALL
    assert made[1][0].graph_optimization_level == levels.ORT_DISABLE_ALL
    assert [options.intra_op_num_threads for options, _ in made] == [3, 1]
    assert all(arguments["enable_fallback"] == 0 for _, arguments in made)  # it prints, and moves in silence


def test_sessions_that_others_make_are_silent_too() -> None:
    """What ONNX Runtime logs outside of any session, here about providers that do not load."""
    script = (
        "import onnxfuse.runtime.session, onnx, onnxruntime as ort\n"
        "text = '<ir_version: 8, opset_import: [\"\" : 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'\n"
        "model = onnx.parser.parse_model(text).SerializeToString()\n"
        "providers = [p for p in ort.get_available_providers() if p != 'TensorrtExecutionProvider']\n"
        "ort.InferenceSession(model, providers=providers)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


LOGS = {
    "[E] Failed to load library /a/b.so with error: libfoo.so.1: missing\n[m": "libfoo.so.1: missing",
    "y Please install TensorRT libraries as said, and more": "Please install TensorRT libraries as said",
    "CUDA failure 100: no CUDA-capable device is detected ; GPU=-1": (
        "CUDA failure 100: no CUDA-capable device is detected"
    ),
    "": "ONNX Runtime could not make a session with it",
}


@pytest.mark.parametrize("log", LOGS)
def test_the_reason_a_provider_gives(log: str) -> None:
    assert _load_failure(log) == LOGS[log]


def test_cores_are_bounded_by_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, str] = {}
    monkeypatch.setattr("onnxfuse.runtime.providers._read", lambda path: files.get(path, ""))
    monkeypatch.setattr(
        "onnxfuse.runtime.providers.os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False
    )
    assert available_cores() == 4
    for cpu in range(4):  # two cores of two hyperthreads
        files[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 2},{cpu % 2 + 2}"
    assert available_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert available_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "50000 100000"
    assert available_cores() == 1
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000"
    assert available_cores() == 2
    del files["/sys/fs/cgroup/cpu.max"]
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1"
    files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000"
    assert available_cores() == 2
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "100000"
    assert available_cores() == 1


def test_capturing_restores_the_streams(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_output() as text:
        print("from python")
        os.write(1, b"to stdout ")
        os.write(2, b"to stderr")
    assert all(part in text[0] for part in ("from python", "to stdout", "to stderr"))
    print("seen")
    os.write(2, b"seen too")
    assert capfd.readouterr() == ("seen\n", "seen too")


def test_what_protobuf_refuses_counts_as_too_large() -> None:
    class Huge:
        def SerializeToString(self) -> bytes:
            raise EncodeError("Failed to serialize proto")

    assert _serialized(Huge()) is None  # type: ignore[arg-type]
