"""Damages to stored tensors, versions, metadata, subgraphs and functions."""

from __future__ import annotations

from random import Random

from fuzz_drawing import LOCATIONS, NAMES, ODD, a_name, a_tensor, all_nodes, import_domain, part
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, TensorProto, helper

# --- tensors ------------------------------------------------------------------------------------------------


@part
def dims_of_a_tensor(model: ModelProto, draw: Random) -> None:
    tensor = a_tensor(model, draw)
    if tensor is None:
        return
    if tensor.dims and draw.random() < 0.7:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(ODD)
    else:
        tensor.dims[:] = draw.choice(([], [0], [-1], [1] * 70, [2**40, 2**40], [0, 2**62], [1, *tensor.dims]))


@part
def data_of_a_tensor(model: ModelProto, draw: Random) -> None:
    """Too short, too long, none, in a field of another type, in two fields."""
    tensor = a_tensor(model, draw)
    if tensor is None:
        return
    kind = draw.randrange(5)
    if kind == 0:
        tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
    elif kind == 1:
        tensor.raw_data += bytes(draw.choice((1, 4, 1000)))
    elif kind == 2:
        tensor.ClearField("raw_data")
    elif kind == 3:
        tensor.float_data.extend([1.0, 2.0])
    else:
        tensor.string_data.append(b"\xff")


@part
def values_of_a_tensor(model: ModelProto, draw: Random) -> None:
    """The size stays: zeros, NaN, infinities and huge whole numbers, noise."""
    tensor = a_tensor(model, draw)
    if tensor is not None and tensor.raw_data:
        size = len(tensor.raw_data)
        pattern = draw.choice((bytes(4), b"\xff" * 4, b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", None))
        tensor.raw_data = draw.randbytes(size) if pattern is None else (pattern * (size // 4 + 1))[:size]


@part
def type_of_a_tensor(model: ModelProto, draw: Random) -> None:
    tensor = a_tensor(model, draw)
    if tensor is not None:
        tensor.data_type = draw.choice((*range(27), 99, -1))


@part
def external_data(model: ModelProto, draw: Random) -> None:
    """A tensor that lies outside: places of all kinds, ranges of all kinds."""
    tensor = a_tensor(model, draw)
    if tensor is None:
        return
    if draw.random() < 0.7:
        tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    if draw.random() < 0.8:
        del tensor.external_data[:]
    entries = [("location", draw.choice(LOCATIONS) if draw.random() < 0.6 else "weights.bin")]
    sizes = ("", "0", "4", "-4", "1e3", "0x10", " 8", "99999999999999999999999", str(2**63), "\u0664")
    entries += [(key, draw.choice(sizes)) for key in ("offset", "length") if draw.random() < 0.6]
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)


@part
def sparse_tensor(model: ModelProto, draw: Random) -> None:
    sparse = model.graph.sparse_initializer.add()
    name = a_name(model, draw)
    sparse.values.CopyFrom(helper.make_tensor(name, 1, [2], [1.0, 2.0]))
    rows = draw.choice(([0, 1], [1, 0], [5, 99], [-1, 0], [2**62, 1]))
    sparse.indices.CopyFrom(helper.make_tensor(f"{name}_at", 7, [2], rows))
    sparse.dims[:] = draw.choice(([6], [4, 4], [0], [2**40], [-1], []))


# --- the model ----------------------------------------------------------------------------------------------


@part
def versions(model: ModelProto, draw: Random) -> None:
    """The IR's, an operator set's; an import removed, doubled, of another domain."""
    kind = draw.randrange(5)
    if kind == 0:
        model.ir_version = draw.choice((*range(14), *ODD))
    elif kind == 1 and model.opset_import:
        draw.choice(model.opset_import).version = draw.choice((*range(1, 28), *ODD))
    elif kind == 2:
        model.opset_import.add(
            domain=draw.choice(("", "ai.onnx", "mine")), version=draw.choice((1, 7, 13, 99))
        )
    elif kind == 3 and model.opset_import:
        del model.opset_import[draw.randrange(len(model.opset_import))]
    elif model.opset_import:
        draw.choice(model.opset_import).domain = draw.choice(("ai.onnx", "nowhere", "com.microsoft", ""))


@part
def metadata(model: ModelProto, draw: Random) -> None:
    for _ in range(draw.choice((1, 2, 3))):
        key = draw.choice(("", "onnxfuse", "onnxfuse.calibration", "names", *NAMES))
        model.metadata_props.add(key=key, value=draw.choice((*NAMES, "{", "[1]", "null", '{"a": 1}')))
    model.producer_name, model.doc_string = draw.choice(NAMES), draw.choice(NAMES)


@part
def subgraph_changed(model: ModelProto, draw: Random) -> None:
    """The body of an If, Loop or Scan: outputs gone, names shadowed, types gone, an inner node lost."""
    bodies = [a.g for node in all_nodes(model) for a in node.attribute if a.type == AttributeProto.GRAPH]
    if not bodies:
        return
    body, kind = draw.choice(bodies), draw.randrange(6)
    if kind == 0:
        del body.output[draw.randrange(len(body.output) + 1) :]
    elif kind == 1:
        body.input.append(helper.make_tensor_value_info(a_name(model, draw), 1, ["N"]))
    elif kind == 2 and body.node:
        body.node[0].output[:] = [a_name(model, draw)]
    elif kind == 3 and body.node:
        del body.node[draw.randrange(len(body.node))]
    elif kind == 4:
        body.initializer.append(helper.make_tensor(a_name(model, draw), 1, [2], [1.0, 2.0]))
    else:
        for value in (*body.input, *body.output):
            value.ClearField("type")


@part
def nested(model: ModelProto, draw: Random) -> None:
    """If in If, so many times, around nothing but a tensor from outside, or around a copy of the graph."""
    body = GraphProto(name="inner")
    body.output.add(name="v")
    if draw.random() < 0.5:
        body.node.add(op_type="Identity", input=[a_name(model, draw)], output=["v"])
    else:
        body.CopyFrom(model.graph if len(model.graph.node) < 40 else body)
    condition = a_name(model, draw)
    for _ in range(draw.choice((1, 2, 5, 20, 28))):
        outer = GraphProto(name="outer")
        outer.output.add(name="v")
        node = outer.node.add(op_type="If", input=[condition], output=["v"])
        for branch in ("then_branch", "else_branch")[
            : draw.choice((1, 1, 1, 2)) if body.ByteSize() < 10**5 else 1
        ]:
            node.attribute.append(helper.make_attribute(branch, body))
        body = outer
    model.graph.node.extend(body.node)


@part
def function_calls_itself(model: ModelProto, draw: Random) -> None:
    """Alone or through others; or many calls in calls that would never end to expand."""
    import_domain(model, "mine")
    kind, calls = draw.randrange(3), draw.choice((2, 8, 30, 70))
    names = [f"F{number}" for number in range(calls)]
    for number, name in enumerate(names):
        function = FunctionProto(name=name, domain="mine", input=["v"], output=["w"])
        function.opset_import.extend([helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)])
        last = number + 1 == calls
        callee = name if kind == 0 else names[0] if kind == 1 and last else "" if last else names[number + 1]
        if callee:
            function.node.add(op_type=callee, domain="mine", input=["v"], output=["u"])
            function.node.add(op_type=callee, domain="mine", input=["u"], output=["w"])
        else:
            function.node.add(op_type="Relu", input=["v"], output=["w"])
        model.functions.append(function)
    model.graph.node.add(op_type=names[0], domain="mine", input=[a_name(model, draw)], output=["called"])
    if draw.random() < 0.7:
        model.graph.output.append(helper.make_tensor_value_info("called", 1, None))


@part
def function_changed(model: ModelProto, draw: Random) -> None:
    """A parameter gone or added, its name another's, its imports gone, itself gone or there twice."""
    if not model.functions:
        return
    function, kind = draw.choice(model.functions), draw.randrange(6)
    if kind == 0:
        del function.input[draw.randrange(len(function.input) + 1) :]
    elif kind == 1:
        function.output.append(draw.choice(("nothing", *function.input)))
    elif kind == 2:
        function.name = draw.choice(("Relu", "", "Dense", "MatMul"))
    elif kind == 3:
        del function.opset_import[:]
    elif kind == 4:
        model.functions.remove(function)
    else:
        model.functions.add().CopyFrom(function)


@part
def huge_result(model: ModelProto, draw: Random) -> None:
    """A small file whose tensors would fill any memory."""
    size = draw.choice((2**26, 2**33, 2**40, 2**62))
    model.graph.initializer.append(helper.make_tensor("huge_shape", 7, [1], [size]))
    kind = draw.randrange(3)
    if kind == 0:
        model.graph.node.add(op_type="ConstantOfShape", input=["huge_shape"], output=["huge"])
    else:
        model.graph.initializer.append(helper.make_tensor("huge_seed", 1, [1], [1.0]))
        op = "Expand" if kind == 1 else "Tile"
        model.graph.node.add(op_type=op, input=["huge_seed", "huge_shape"], output=["huge"])
    if draw.random() < 0.5:
        model.graph.output.append(helper.make_tensor_value_info("huge", 1, None))
    else:
        model.graph.node.add(op_type="ReduceSum", input=["huge"], output=["huge_sum"])
        model.graph.output.append(helper.make_tensor_value_info("huge_sum", 1, None))


@part
def rare_fields(model: ModelProto, draw: Random) -> None:
    """Training information, quantization notes, fields of no version yet; or no nodes."""
    kind = draw.randrange(4)
    if kind == 0:
        model.training_info.add().algorithm.CopyFrom(model.graph)
    elif kind == 1:
        note = model.graph.quantization_annotation.add(tensor_name=a_name(model, draw))
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="nothing")
    elif kind == 2:
        model.MergeFromString(b"\xfa\x3e\x03abc")  # field 1007, of no version yet
    else:
        del model.graph.node[:]
