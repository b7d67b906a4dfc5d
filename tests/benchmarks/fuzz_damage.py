"""Damages to bytes, nodes, attributes, types and names."""

from __future__ import annotations

from random import Random

from fuzz_drawing import (
    FLOATS,
    LISTS,
    NAMES,
    ODD,
    a_name,
    a_node,
    a_value,
    all_nodes,
    an_owner,
    made,
    of_bytes,
    part,
    some_nodes,
)
from onnx import AttributeProto, ModelProto, helper

# --- bytes --------------------------------------------------------------------------------------------------


@of_bytes
def bits_flipped(data: bytearray, draw: Random) -> None:
    """Anywhere, or where the structure is dense: near the end, behind the weights."""
    start = 0 if draw.random() < 0.5 else max(len(data) - 400, 0)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        data[draw.randrange(start, len(data))] ^= 1 << draw.randrange(8)


@of_bytes
def truncated(data: bytearray, draw: Random) -> None:
    del data[draw.choice((0, 1, draw.randrange(len(data)), len(data) - 1)) :]


@of_bytes
def bytes_dropped_or_inserted(data: bytearray, draw: Random) -> None:
    at, size = draw.randrange(len(data)), draw.choice((1, 2, 7, 100))
    if draw.random() < 0.5:
        del data[at : at + size]
    else:
        data[at:at] = draw.randbytes(size)


@of_bytes
def another_file(data: bytearray, draw: Random) -> None:
    """No ONNX file at all, or two of them in a row, which protobuf merges."""
    others = (
        b"",
        b"\n",
        b"PK\x03\x04",
        b"<html>",
        b"{}",
        bytes(1000),
        draw.randbytes(300),
        bytes(data) * 2,
    )
    data[:] = draw.choice(others)


# --- nodes --------------------------------------------------------------------------------------------------


@part
def node_deleted(model: ModelProto, draw: Random) -> None:
    if nodes := some_nodes(model, draw):
        del nodes[draw.randrange(len(nodes))]


@part
def node_doubled(model: ModelProto, draw: Random) -> None:
    """With the same outputs or with new ones."""
    if nodes := some_nodes(model, draw):
        twin = nodes.add()
        twin.CopyFrom(nodes[draw.randrange(len(nodes) - 1)])
        if draw.random() < 0.5:
            twin.output[:] = [f"{name}_twin" for name in twin.output]


@part
def node_rewired(model: ModelProto, draw: Random) -> None:
    """An input is another tensor: earlier, later (a cycle), of another type, missing."""
    node = a_node(model, draw)
    if node is not None and node.input:
        node.input[draw.randrange(len(node.input))] = a_name(model, draw)


@part
def nodes_in_another_order(model: ModelProto, draw: Random) -> None:
    nodes = list(model.graph.node)
    draw.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@part
def cycle(model: ModelProto, draw: Random) -> None:
    """A node reads what depends on it."""
    node = a_node(model, draw)
    if node is not None and node.input and node.output:
        node.input[draw.randrange(len(node.input))] = draw.choice([*node.output, *made(model)])


@part
def inputs_more_or_fewer(model: ModelProto, draw: Random) -> None:
    node = a_node(model, draw)
    if node is not None:
        chosen = node.input if draw.random() < 0.7 else node.output
        if draw.random() < 0.5 and chosen:
            del chosen[draw.randrange(len(chosen))]
        else:
            chosen.extend([a_name(model, draw)] * draw.choice((1, 1, 3, 300)))


@part
def operator_swapped(model: ModelProto, draw: Random) -> None:
    node = a_node(model, draw)
    other = a_node(model, draw)
    if node is not None and other is not None:
        more = ("Nothing", "", "If", "Loop", "Constant", "Identity", "Reshape", "LSTM", "Attention", "MatMul")
        node.op_type = draw.choice((other.op_type, *more))


@part
def domain_swapped(model: ModelProto, draw: Random) -> None:
    node = a_node(model, draw)
    if node is not None:
        node.domain = draw.choice(("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "mine", "nowhere", "\u202e"))


# --- attributes ---------------------------------------------------------------------------------------------


@part
def attribute_removed(model: ModelProto, draw: Random) -> None:
    owner = an_owner(model, draw)
    if owner is not None:
        del owner.attribute[draw.randrange(len(owner.attribute))]


@part
def attribute_doubled(model: ModelProto, draw: Random) -> None:
    owner = an_owner(model, draw)
    if owner is not None:
        owner.attribute.add().CopyFrom(draw.choice(owner.attribute))


@part
def attribute_retyped(model: ModelProto, draw: Random) -> None:
    """Another type, with or without a value of that type."""
    owner = an_owner(model, draw)
    if owner is None:
        return
    attribute = draw.choice(owner.attribute)
    if draw.random() < 0.5:
        attribute.type = draw.choice(AttributeProto.AttributeType.values())
    else:
        values = (3, 0.5, b"\xff\xfe", "text", [1, 2], [0.5], ["a"], helper.make_tensor("t", 1, [1], [1.0]))
        attribute.CopyFrom(helper.make_attribute(attribute.name or "a", draw.choice(values)))


@part
def attribute_of_odd_value(model: ModelProto, draw: Random) -> None:
    """Numbers huge or negative, lists too long or empty, text that means nothing."""
    owner = an_owner(model, draw, (AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT,
                                   AttributeProto.STRING))  # fmt: skip
    if owner is None:
        return
    attribute = draw.choice(owner.attribute)
    if attribute.type == AttributeProto.INT:
        attribute.i = draw.choice(ODD)
    elif attribute.type == AttributeProto.INTS:
        length = draw.choice((0, 1, len(attribute.ints), len(attribute.ints) + 1, 200))
        attribute.ints[:] = [draw.choice(ODD) for _ in range(length)]
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = draw.choice(FLOATS)
    elif attribute.type == AttributeProto.STRING:
        attribute.s = draw.choice((b"", b"\xff\x00", b"ij,jk->ik", b"...", b"linear", b"a" * 10_000))


@part
def attribute_added(model: ModelProto, draw: Random) -> None:
    node = a_node(model, draw)
    if node is not None:
        names = ("axis", "axes", "perm", "group", "pads", "strides", "kernel_shape", "to", "keepdims",
                 "alpha", "num_outputs", "hidden_size", "transA", "body", "value", "auto_pad")  # fmt: skip
        value = draw.choice((draw.choice(ODD), [draw.choice(ODD) for _ in range(4)], 0.5, "SAME_UPPER"))
        node.attribute.append(helper.make_attribute(draw.choice(names), value))


@part
def attribute_refers(model: ModelProto, draw: Random) -> None:
    """A reference to an attribute of the function around, where there is none or none of that name."""
    owner = an_owner(model, draw)
    if owner is not None:
        draw.choice(owner.attribute).ref_attr_name = draw.choice(("alpha", "beta", "axis"))


# --- types and shapes ---------------------------------------------------------------------------------------


@part
def dimension_odd(model: ModelProto, draw: Random) -> None:
    """0, -1, huge, contradicting, a symbol, none at all; of inputs, outputs and tensors between."""
    value = a_value(model, draw)
    dims = None if value is None else value.type.tensor_type.shape.dim
    if dims:
        dim = dims[draw.randrange(len(dims))]
        if draw.random() < 0.7:
            dim.dim_value = draw.choice(ODD)
        else:
            dim.dim_param = draw.choice((*NAMES, "N", "N + 1", "-1"))


@part
def rank_changed(model: ModelProto, draw: Random) -> None:
    value = a_value(model, draw)
    if value is None:
        return
    shape = value.type.tensor_type.shape
    kind = draw.randrange(4)
    if kind == 0:
        value.type.tensor_type.ClearField("shape")
    elif kind == 1 and shape.dim:
        del shape.dim[draw.randrange(len(shape.dim))]
    elif kind == 2:
        for _ in range(draw.choice((1, 2, 70))):
            shape.dim.add().dim_value = draw.choice(ODD)
    else:
        del shape.dim[:]


@part
def type_swapped(model: ModelProto, draw: Random) -> None:
    """Another element type, one that does not exist, no type, or no tensor at all."""
    value = a_value(model, draw)
    if value is None:
        return
    kind = draw.randrange(5)
    if kind == 0:
        value.ClearField("type")
    elif kind == 1:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 2:
        value.type.optional_type.elem_type.tensor_type.elem_type = 1
    else:
        value.type.tensor_type.elem_type = draw.choice((*range(27), 99, -1))


@part
def stale_shape_noted(model: ModelProto, draw: Random) -> None:
    """A `value_info` that lies about an inner tensor."""
    name = draw.choice([*made(model), "nothing"])
    shape = draw.choice(([], [1], [-1, 4], ["N", "N", "N"], [2**40], None))
    model.graph.value_info.append(helper.make_tensor_value_info(name, draw.choice((1, 7, 8, 10)), shape))


# --- names --------------------------------------------------------------------------------------------------


@part
def name_replaced(model: ModelProto, draw: Random) -> None:
    """Of a node, tensor, graph or dimension: empty, another's, with control characters, very long."""
    values = [
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
        *model.graph.node,
        model.graph,
    ]
    draw.choice(values).name = a_name(model, draw) if draw.random() < 0.4 else draw.choice(NAMES)


@part
def tensor_renamed_everywhere(model: ModelProto, draw: Random) -> None:
    """A good model but for the name: empty, odd, or that of another tensor."""
    old, new = a_name(model, draw), draw.choice((*NAMES, a_name(model, draw)))
    for node in all_nodes(model):
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.graph.value_info):
        value.name = new if value.name == old else value.name


@part
def listed_twice(model: ModelProto, draw: Random) -> None:
    chosen = getattr(model.graph, draw.choice(LISTS))
    if chosen:
        chosen.add().CopyFrom(chosen[draw.randrange(len(chosen) - 1) if len(chosen) > 1 else 0])


@part
def removed_from_a_list(model: ModelProto, draw: Random) -> None:
    chosen = getattr(model.graph, draw.choice(LISTS))
    if chosen:
        if draw.random() < 0.2:
            del chosen[:]
        else:
            del chosen[draw.randrange(len(chosen))]


@part
def input_or_output_added(model: ModelProto, draw: Random) -> None:
    """An inner tensor, a weight or an input becomes an output; a weight or nothing becomes an input."""
    chosen = draw.choice((model.graph.input, model.graph.output))
    shape = draw.choice((None, [], [3], ["N", 6], [0]))
    chosen.append(helper.make_tensor_value_info(a_name(model, draw), draw.choice((1, 1, 7, 8)), shape))
