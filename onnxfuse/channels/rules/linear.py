"""Axes through operators that multiply by weights, or two tensors with each other: what they sum over ends
here, what they compute starts here."""

from __future__ import annotations

from collections.abc import Mapping

from onnxfuse.channels.dims import Axis, factor, product_of, sum_of
from onnxfuse.channels.rules.elementwise import broadcast
from onnxfuse.channels.site import Axes, ChannelNode, ChannelRule, Role, StopRuleError
from onnxfuse.ops.table import MICROSOFT, Key

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _conv(site: ChannelNode) -> list[Axes | None]:
    x, weight = site.axes(0), site.axes(1)
    groups = int(site.attribute("group", 1))
    site.freeze(x[2:], "a kernel slides over it")
    site.places(weight[2:], "it is a kernel's size")
    out = weight[0]
    if groups == 1:
        site.contract(0, 1, 1, 1)
        site.weight(1, 0, "producer")
    else:
        group, inner = _grouped(site, x[1], groups)
        own, outer = _grouped(site, out, groups)
        site.same(group, own)
        site.same(inner, weight[1])
        _sum_in_groups(site, inner, 1)
        site.weight(1, 0, "along", own)
        site.weight(1, 0, "producer", outer)
    return _convolved(site, out)


def _fused_conv(site: ChannelNode) -> list[Axes | None]:
    """A Conv to whose result another tensor may be added, before an activation."""
    (out,) = _conv(site)
    assert out is not None
    return [broadcast(site, [out, site.axes(3)]) if site.has(3) else out]


def _conv_transpose(site: ChannelNode) -> list[Axes | None]:
    x, weight = site.axes(0), site.axes(1)
    groups = int(site.attribute("group", 1))
    site.freeze(x[2:], "a kernel slides over it")
    site.places(weight[2:], "it is a kernel's size")
    if groups == 1:
        site.contract(0, 1, 1, 0)
        site.weight(1, 1, "producer")
        return _convolved(site, weight[1])
    site.same(x[1], weight[0])
    group, inner = _grouped(site, x[1], groups)
    _sum_in_groups(site, inner, 0)
    site.weight(1, 0, "along", group)
    site.weight(1, 1, "producer")
    return _convolved(site, product_of([group, weight[1]]))


def _grouped(site: ChannelNode, dim: Axis, groups: int) -> Axes:
    """The axis as groups x channels in a group."""
    return site.divided(factor, dim, [groups, dim.size // groups])


def _sum_in_groups(site: ChannelNode, inner: Axis, weight_axis: int) -> None:
    """The operator sums up over the channels of a group, of which a depthwise one has but one."""
    site.number(_grouped(site, site.axes(0)[1], int(site.attribute("group")))[0], attribute="group")
    if inner.size > 1:
        site.weight(1, weight_axis, "consumer", inner)
        site.sums(0, 1, part=inner)


def _convolved(site: ChannelNode, out: Axis) -> list[Axes | None]:
    if site.has(2):
        site.same(out, site.axes(2)[0])
    batch, _, *places = site.axes(0)
    return [(batch, out, *site.sizes(of=places)[2:])]


def _gemm(site: ChannelNode) -> list[Axes | None]:
    a, b = site.axes(0), site.axes(1)
    inner_a = 0 if int(site.attribute("transA", 0)) else 1
    inner_b = 1 if int(site.attribute("transB", 0)) else 0
    site.contract(0, inner_a, 1, inner_b)
    site.weight(0, 1 - inner_a, "producer")
    site.weight(1, 1 - inner_b, "producer")
    out = (a[1 - inner_a], b[1 - inner_b])
    return [broadcast(site, [out, site.axes(2)]) if site.has(2) else out]


def _matmul(site: ChannelNode) -> list[Axes | None]:
    """MatMul and FusedMatMul, which can transpose a matrix and leaves a vector as it is."""
    a, b = site.axes(0), site.axes(1)
    if not a or not b:
        raise StopRuleError(f"{site.op} of a scalar")
    if site.attribute("transBatchA", 0) or site.attribute("transBatchB", 0):
        raise StopRuleError(f"{site.op} of transposed batches")
    inner_a = len(a) - 2 if len(a) > 1 and site.attribute("transA", 0) else len(a) - 1
    inner_b = len(b) - 2 if len(b) > 1 and not site.attribute("transB", 0) else len(b) - 1
    site.contract(0, inner_a, 1, inner_b)
    result: Axes = broadcast(site, [a[:-2], b[:-2]])
    for slot, axes, inner in ((0, a, inner_a), (1, b, inner_b)):
        if len(axes) > 1:
            outer = 2 * len(axes) - 3 - inner
            site.weight(slot, outer, "producer")
            result += (axes[outer],)
    return [result]


def _einsum(site: ChannelNode) -> list[Axes | None]:
    equation = str(site.attribute("equation")).replace(" ", "")
    if "->" not in equation or "." in equation:
        raise StopRuleError(f"the equation '{equation}' is of a form that has no rule")
    terms, out = equation.split("->")
    dims: dict[str, Axis] = {}
    at: dict[str, list[tuple[int, int]]] = {}
    for slot, term in enumerate(terms.split(",")):
        if len(set(term)) < len(term):
            raise StopRuleError("an Einsum takes a diagonal")
        for axis, letter in enumerate(term):
            dim = site.axes(slot)[axis]
            if letter in dims:
                site.same(dims[letter], dim)
            dims.setdefault(letter, dim)
            at.setdefault(letter, []).append((slot, axis))
    for letter, places in at.items():
        data = [place for place in places if not site.is_constant(place[0])]
        if letter not in out:
            for slot, axis in data or places[:1]:
                site.sums(slot, axis)
        for slot, axis in places:
            role: Role = "consumer" if letter not in out else "producer" if len(places) == 1 else "along"
            site.weight(slot, axis, role)
    return [tuple(dims[letter] for letter in out)]


def _recurrent(site: ChannelNode) -> list[Axes | None]:
    """LSTM, GRU, RNN: the rows of the weights are the gates one after the other, each with all hidden
    channels. The hidden channels that a step reads are those of the step before: summed over with R's last
    axis, so it is there that a removed one is zero."""
    gates = _GATES[site.op]
    x, weight, recurrent = site.axes(0), site.axes(1), site.axes(2)
    batch_first = bool(site.attribute("layout", 0))
    steps, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    hidden = recurrent[2]
    directions = weight[0]
    stacked = {1: gates, 2: gates, 3: 2 * gates, 7: 3}  # W, R, B (for input and recurrence), peepholes
    for slot, count in stacked.items():
        if site.has(slot):
            site.same(site.axes(slot)[1], sum_of([hidden] * count))
            site.same(site.axes(slot)[0], directions)
    for slot in (5, 6):  # initial states
        if site.has(slot):
            axes = site.axes(slot)
            site.same(axes[2], hidden)
            site.same(axes[1 if batch_first else 0], directions)
    site.places((directions,), "the directions of a recurrent operator")
    site.freeze((steps,), "its time steps")
    site.contract(0, 2, 1, 2)
    site.weight(1, 1, "producer")
    site.weight(2, 1, "producer")
    site.weight(2, 2, "consumer")
    site.sums(2, 2)
    if "hidden_size" in site.node.attrs:
        site.number(hidden, attribute="hidden_size")
    state = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    y = (batch, steps, directions, hidden) if batch_first else (steps, directions, batch, hidden)
    return [y, state, state]


RULES: Mapping[Key, ChannelRule] = {
    ("", "Conv"): _conv,
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul,
    ("", "Einsum"): _einsum,
    (MICROSOFT, "FusedConv"): _fused_conv,
    (MICROSOFT, "FusedGemm"): _gemm,
    (MICROSOFT, "FusedMatMul"): _matmul,
    **{("", op): _recurrent for op in _GATES},
}
