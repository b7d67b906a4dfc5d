"""Bad files: each one gets one clear line, and none a traceback, a crash or a hang."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError, OnnxfuseError
from onnxfuse.ir.model import Model
from onnxfuse.ops.finite import check_finite


def parse(body: str, header: str = 'ir_version: 8, opset_import: ["" : 17]') -> ModelProto:
    return onnx.parser.parse_model(f"<{header}>\n{body}")


def network() -> ModelProto:
    """Convolutions, a Constant node, a subgraph and a function: a bit of everything for a fuzzer to break."""
    model = parse(
        """g (float[N,2,6,6] x, bool flag) => (float[N,4] y)
        <int64[2] target = {-1, 4}, float[4] c = {1, 2, 3, 4}>
        {
            a = Conv<pads = [1, 1, 1, 1]>(x, w)
            b = local.leaky(a)
            p = GlobalAveragePool(b)
            r = Reshape(p, target)
            k = Constant<value = float[4] {0.5, 1, 1.5, 2}>()
            y = If(flag) <then_branch = yes () => (float[N,4] t) { t = Mul(r, c) },
                          else_branch = no () => (float[N,4] e) { e = Add(r, k) }>
        }
        <domain: "local", opset_import: ["" : 17]> leaky (u) => (v) { v = LeakyRelu<alpha = 0.1>(u) }""",
        'ir_version: 8, opset_import: ["" : 17, "local" : 1]',
    )
    weight = np.random.default_rng(0).normal(size=(4, 2, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


def refused(source: object, *words: str) -> str:
    """The one line with which the model is refused; it must have these words."""
    with pytest.raises(InputError) as caught:
        Model.load(source)  # type: ignore[arg-type]
    line = str(caught.value)
    assert "\n" not in line
    assert line.strip()
    for word in words:
        assert word in line
    return line


# Files


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    refused(path, "no such file", str(path))
    refused(str(path), "no such file", str(path))
    path.write_bytes(b"")
    refused(path, "empty", str(path))
    refused(tmp_path, "folder", str(tmp_path))
    path.write_text("hello, this is not a model\n")
    refused(path, "not an ONNX model", str(path))
    path.write_bytes(b"\x12\x05hello")  # a valid message with nothing but a producer name
    refused(path, "not an ONNX model", "no graph")
    refused(b"", "not an ONNX model")
    refused("\0", "cannot read")
    refused(tmp_path / ("x" * 300), "cannot read")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_a_file_over_2_gb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with open(path, "wb") as file:
        file.truncate(2**31 + 1)
    refused(path, "over 2 GB")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(path, "cannot read", "Permission denied")


def test_every_truncation_is_an_input_error_or_a_smaller_model() -> None:
    data = network().SerializeToString()
    complete = network()
    del complete.functions[:]  # what is left calls an operator that only the runtime can say no to
    accepted = []
    for size in range(len(data)):
        try:
            Model.load(data[:size])
            accepted.append(size)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert accepted == [len(complete.SerializeToString())]


# Versions


@pytest.mark.parametrize(
    ("opset", "ir", "words"),
    [
        (onnx.defs.onnx_opset_version() + 1, 8, ("opset", "upgrade onnx")),
        (17, onnx.IR_VERSION + 1, ("IR version", "upgrade onnx")),
        (6, 8, ("opset 6", "version_converter")),
        (17, 2, ("IR version 2", "export the model again")),
        (17, 0, ("ir_version is missing",)),
    ],
)
def test_versions_outside_the_supported(opset: int, ir: int, words: tuple[str, ...]) -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model.ir_version = ir
    model.opset_import[0].version = opset
    refused(model, *words)


def test_no_opset_import_at_all() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    del model.opset_import[:]
    refused(model, "operator set")


def test_a_missing_ir_version_is_not_taken_for_missing_operator_sets() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model.ClearField("ir_version")
    assert "operator set" not in refused(model, "ir_version is missing")


# Wiring


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "g (float[N] x) => (float[N] y) { [n] y = Add(x, gone) }",
            ("'n' (Add)", "'gone'", "nothing produces"),
        ),
        ("g (float[N] x) => (float[N] y) { a = Relu(x) }", ("output 'y'",)),
        ("g (float[N] x) => (float[N] y) { y = Relu(x) y = Neg(x) }", ("'y'", "produced more than once")),
        ("g (float[N] x) => (float[N] y) { x = Relu(x) y = Neg(x) }", ("'x'", "more than once")),
        ("g (float[N] x, float[N] x) => (float[N] y) { y = Relu(x) }", ("'x' is an input more than once",)),
        ("g (float[N] x) => (float[N] y, float[N] y) { y = Relu(x) }", ("'y' is an output more than once",)),
        (
            "g (float[N] x) => (float[N] y) <float[1] w = {1}, float[1] w = {2}> { y = Mul(x, w) }",
            ("'w' is an initializer more than once",),
        ),
        ("g (float[N] x) => (float[N] y) <float[1] y = {1}> { y = Relu(x) }", ("'y' is produced more than",)),
        ("g (float[N] x) => () { y = Relu(x) }", ("no outputs",)),
        (
            "g (float[N] x) => (float[N] y) { a = Add(x, b) b = Relu(a) y = Neg(b) }",
            ("cycle",),
        ),
        ("g (float[N] x) => (float[N] y) { y = Foo(x) }", ("Foo",)),
        ("g (float[N] x) => (float[N] y) { y = their.own.Foo(x) }", ("their.own", "Foo")),
        ("g (float[N] x) => (float[N] y) { [n] y = Relu<alpha = 1.0>(x) }", ("alpha", "n", "Relu")),
        ("g (float[N] x) => (float[N] y) { [n] y = LeakyRelu<alpha = 1>(x) }", ("alpha", "n")),
        ("g (float[N] x) => (float[N] y) { [n] y = Relu(x, x) }", ("n", "Relu")),
        (
            """g (float[N] x, bool f) => (float[N] y) { y = If(f) < then_branch = a () => (float[N] p)
            { p = Add(x, lost) }, else_branch = b () => (float[N] q) { q = Relu(x) } > }""",
            ("lost",),
        ),
        (
            """g (float[N] x, bool f) => (float[N] y) { y = If(f) < then_branch = a () => (float[N] p)
            { p = Foo(x) }, else_branch = b () => (float[N] q) { q = Relu(x) } > }""",
            ("Foo",),
        ),
    ],
)
def test_invalid_graphs(body: str, words: tuple[str, ...]) -> None:
    refused(parse(body), *words)


def functions(*bodies: tuple[str, ...]) -> ModelProto:
    """A model that calls d.f0, where function i runs a chain of the operators in `bodies[i]`."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    made = []
    for i, ops in enumerate(bodies):
        names = ["in", *(f"t{k}" for k in range(len(ops) - 1)), "out"]
        nodes = [
            helper.make_node(op, [names[k]], [names[k + 1]], domain="d" if op.startswith("f") else "")
            for k, op in enumerate(ops)
        ]
        made.append(helper.make_function("d", f"f{i}", ["in"], ["out"], nodes, imports))
    model = parse("g (float[N] x) => (float[N] y) { y = d.f0(x) }")
    model.opset_import.add(domain="d", version=1)
    model.functions.extend(made)
    return model


@pytest.mark.parametrize(
    ("bodies", "word"),
    [
        ([("f0",)], "recursive"),
        ([("Relu", "f1"), ("f2", "Neg"), ("f0",)], "recursive"),
        ([(f"f{i + 1}",) for i in range(5000)] + [("Relu",)], "nested too deeply"),
        ([(f"f{i + 1}", f"f{i + 1}") for i in range(40)] + [("Relu",)], "expand to over 1,000,000"),
    ],
)
def test_functions_that_would_never_end(bodies: list[tuple[str, ...]], word: str) -> None:
    refused(functions(*bodies), word)


def test_functions_in_functions() -> None:
    model = Model.load(functions(*((f"f{i + 1}", f"f{i + 1}") for i in range(5)), ("Relu", "Neg")))
    assert model.shapes()["y"].shape == ("N",)


def test_nodes_out_of_order_are_sorted() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Neg(b) b = Relu(a) a = Abs(x) }")
    loaded = Model.load(model)
    assert [n.op for n in loaded.nodes] == ["Abs", "Relu", "Neg"]
    assert [n.op_type for n in loaded.to_proto().graph.node] == ["Abs", "Relu", "Neg"]


def test_what_onnx_runtime_accepts_is_accepted() -> None:
    """The checker alone would refuse these."""
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model.graph.name = ""
    model.graph.output[0].ClearField("type")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    loaded = Model.load(model)
    assert loaded.inputs[0].shape == (None,)
    assert loaded.outputs[0].shape is None


def test_a_custom_operator_in_an_imported_domain_is_left_to_the_runtime() -> None:
    model = parse(
        "g (float[N] x) => (float[N] y) { y = my.own.Foo<level = 3>(x) }",
        'ir_version: 8, opset_import: ["" : 17, "my.own" : 1]',
    )
    loaded = Model.load(model)
    assert loaded.nodes[0].domain == "my.own"
    assert loaded.shapes()["y"].shape == ("N",)


@pytest.mark.parametrize(
    ("text", "opset", "runs"),
    [
        ("y = SimplifiedLayerNormalization<epsilon = 0.001>(x, s)", 17, True),
        ("y = SimplifiedLayerNormalization(x, s)", 8, True),
        ("y = GroupNormalization<num_groups = 2>(x, s2, s2)", 18, True),
        ("y = GroupNormalization<num_groups = 2>(x, s2, s2)", 20, True),
        ("y = GroupNormalization<num_groups = 2>(x, s2, s2)", 17, False),
        ("y = ScaledTanh<alpha = 2.0, beta = 0.5>(x)", 9, True),
        ("y = Affine<alpha = 2.0, beta = 0.5>(x)", 7, True),
        ("y = Softmaxx(x)", 17, False),
    ],
)
def test_operators_that_only_onnx_runtime_has_in_onnx_s_domain(text: str, opset: int, runs: bool) -> None:
    """What loads is what ONNX Runtime runs, and it is written as it was read."""
    header = f'ir_version: 8, opset_import: ["" : {opset}]'
    weights = "<float[4] s = {1, 2, 3, 4}, float[2] s2 = {1, 2}>"
    model = parse(f"g (float[N,4] x) => (float[N,M] y) {weights} {{ {text} }}", header)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.ones((2, 4), np.float32)})
    except Exception:
        assert not runs
        refused(model, "not a valid model")
    else:
        assert runs
        assert Model.load(model).to_proto() == model


def test_operators_that_only_onnx_runtime_has_in_bodies_and_functions() -> None:
    model = parse(
        """g (float[N,4] x, bool flag) => (float[N,4] y) <float[4] s = {1, 2, 3, 4}> {
            a = local.norm(x, s)
            y = If(flag) <then_branch = yes () => (float[N,4] t) { t = SimplifiedLayerNormalization(a, s) },
                          else_branch = no () => (float[N,4] e) { e = Neg(a) }>
        }
        <domain: "local", opset_import: ["" : 17]>
        norm (u, s) => (v) { v = SimplifiedLayerNormalization(u, s) }""",
        'ir_version: 8, opset_import: ["" : 17, "local" : 1]',
    )
    assert Model.load(model).to_proto() == model
    model.graph.node[1].attribute[0].g.node[0].op_type = "ComplicatedLayerNormalization"
    refused(model, "ComplicatedLayerNormalization")


def test_an_attribute_that_refers_to_a_function_around_is_in_one() -> None:
    """ONNX Runtime would take the default; also in a branch, where it would be the branch that is missing."""
    model = network()
    model.graph.node[0].attribute[0].ref_attr_name = "alpha"
    refused(model, "attribute 'pads' of node 'a' (Conv) refers to 'alpha' of a function")
    model = network()
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    branch.node[0].attribute.append(helper.make_attribute("axis", 1))
    branch.node[0].attribute[0].ref_attr_name = "beta"
    refused(model, "attribute 'axis' of node 't' (Mul) refers to 'beta'")


# Tensors


def edited(change: Callable[[TensorProto], None]) -> ModelProto:
    model = parse("g (float[N] x) => (float[N] y) { y = Mul(x, w) }")
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    change(tensor)
    model.graph.initializer.append(tensor)
    return model


def set_field(**fields: object) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        for name, value in fields.items():
            tensor.ClearField(name)
            if isinstance(value, list):
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_field(raw_data=b"\0" * 15),
        set_field(raw_data=b""),
        set_field(dims=[5]),
        set_field(dims=[-4]),
        set_field(dims=[2**62, 2**62]),
        set_field(data_type=0),
        set_field(data_type=99),
        set_field(data_type=TensorProto.DOUBLE),
        set_field(data_type=TensorProto.STRING),
        lambda t: t.ClearField("raw_data"),
        lambda t: (t.ClearField("raw_data"), t.float_data.extend([1, 2, 3]))[0],
        lambda t: t.segment.SetInParent(),
    ],
)
def test_tensors_whose_data_do_not_fit(change: Callable[[TensorProto], None]) -> None:
    refused(edited(change), "'w'")


@pytest.mark.parametrize("name", [n for n in TensorProto.DataType.keys() if n not in ("UNDEFINED", "STRING")])  # noqa: SIM118
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_every_type(name: str, raw: bool) -> None:
    """Each element type in both of its encodings, with an odd number of elements."""
    elem_type = TensorProto.DataType.Value(name)
    values = np.array([0, 1, 1], np.float32).astype(helper.tensor_dtype_to_np_dtype(elem_type))
    tensor = numpy_helper.from_array(values, "k")
    if not raw:
        tensor = helper.make_tensor("k", elem_type, [3], values)
    assert tensor.HasField("raw_data") == raw
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model.graph.initializer.append(tensor)
    loaded = Model.load(model)
    found = loaded.weight(loaded.tensor("k"))
    assert found is not None
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found.astype(np.complex128), values.astype(np.complex128))
    loaded.shapes()
    loaded.set_weight(loaded.tensor("k"), found)
    saved = loaded.to_proto().graph.initializer[0]
    assert saved.data_type == elem_type
    assert numpy_helper.to_array(saved).tobytes() == values.tobytes()


def test_string_tensors() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model.graph.initializer.append(helper.make_tensor("k", TensorProto.STRING, [2], [b"a", b"b"]))
    loaded = Model.load(model)
    assert list(loaded.weight(loaded.tensor("k"))) == ["a", "b"]  # type: ignore[arg-type]
    check_finite(loaded)
    model.graph.initializer[0].string_data.append(b"c")
    refused(model, "'k'")


def test_bad_tensors_are_found_wherever_they_are() -> None:
    bad = numpy_helper.from_array(np.zeros(3, np.float32), "bad")
    bad.dims[0] = 4
    model = network()
    model.graph.node[4].attribute[0].t.CopyFrom(bad)
    refused(model, "'bad'")
    model = network()
    model.graph.node[5].attribute[1].g.initializer.append(bad)
    refused(model, "'bad'")
    model = network()
    model.functions[0].node.append(helper.make_node("Constant", [], ["z"], value=bad))
    refused(model, "'bad'")


def test_sparse_indices_outside_the_shape() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    sparse = model.graph.sparse_initializer.add(dims=[2])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "k"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([7], np.int64), "i"))
    loaded = Model.load(model)
    with pytest.raises(InputError, match="'k'"):
        loaded.weight(loaded.tensor("k"))


# Hostile files


def survive(data: bytes) -> bool:
    """Loads and uses a model; whether it was accepted. Anything but an OnnxfuseError is a failure."""
    try:
        model = Model.load(data)
        model.shapes()
        for tensor in model.tensors():
            model.weight(tensor)
        check_finite(model)
        model.copy().to_proto().SerializeToString()
    except OnnxfuseError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = network().SerializeToString()
    assert survive(data)
    for _ in range(250):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            broken[position] ^= 1 << rng.integers(8)
        survive(bytes(broken))


@pytest.mark.parametrize("seed", range(2))
def test_bytes_cut_out_doubled_or_random(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = network().SerializeToString()
    for _ in range(150):
        start, end = sorted(rng.integers(0, len(data), 2))
        survive(data[:start] + data[end:])
        survive(data[:end] + data[start:])
        survive(rng.bytes(int(rng.integers(1, 200))))


def test_deep_nesting() -> None:
    """A body in a body, a thousand times over: protobuf's own limit on nesting must catch it."""
    node = helper.make_node("Relu", ["x"], ["y0"])
    body = helper.make_graph([node], "b", [], [onnx.ValueInfoProto(name="y0")]).SerializeToString()
    for _ in range(1000):  # GraphProto in AttributeProto in NodeProto in GraphProto, field by field
        attribute = b"\x0a\x01g\x32" + varint(len(body)) + body + b"\xa0\x01\x05"
        inner = b"\x12\x01y\x22\x02If\x2a" + varint(len(attribute)) + attribute
        body = b"\x0a" + varint(len(inner)) + inner
    model = b"\x08\x08\x3a" + varint(len(body)) + body + b"\x42\x02\x10\x11"
    assert not survive(model)


def varint(number: int) -> bytes:
    result = b""
    while number > 127:
        result += struct.pack("B", number & 127 | 128)
        number >>= 7
    return result + struct.pack("B", number)


def test_dimensions_that_overflow() -> None:
    model = parse(
        """g (float[9223372036854775807,9223372036854775807] x) => (float[N] y)
        <int64[1] big = {9223372036854775807}>
        { a = Flatten(x) b = ConstantOfShape(big) c = Expand(x, big) d = Tile(b, big) y = Relu(b) }"""
    )
    shapes = Model.load(model).shapes()
    assert shapes["x"].shape == (2**63 - 1, 2**63 - 1)


def test_names_that_are_not_text() -> None:
    data = network().SerializeToString()
    refused(data.replace(b"target", b"targe\xff"), "not UTF-8")
