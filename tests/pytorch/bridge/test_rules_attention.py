"""Attention, rotary embeddings and the fused operators of com.microsoft: numbers from ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import compute, net, normal
from onnx import helper, numpy_helper
from rule_checks import agrees

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.pytorch.bridge.importer import to_torch

QKV = {"q": normal(2, 4, 5, 8, seed=1), "k": normal(2, 4, 7, 8, seed=2), "v": normal(2, 4, 7, 6, seed=3)}
INPUTS = "float[N,4,5,8] q, float[N,4,7,8] k, float[N,4,7,6] v"


def attention(attributes: str = "", more: str = "", names: str = "q, k, v", outputs: str = "y") -> Model:
    declared = ", ".join(f"float {name}" for name in outputs.split(", ") if name)
    body = f"{outputs} = Attention{attributes}({names})"
    return net(body, {}, INPUTS + more, declared, 23)


@pytest.mark.parametrize(
    "attributes", ["", "<is_causal=1>", "<scale=0.2>", "<softcap=0.5>", "<softcap=0.5, is_causal=1>"]
)
def test_attention(attributes: str) -> None:
    agrees(attention(attributes), QKV)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (1, 4, 5, 7)])
def test_attention_with_a_mask(shape: tuple[int, ...], causal: int) -> None:
    sizes = ",".join(map(str, shape))
    for kind, mask in (
        ("bool", np.random.default_rng(0).random(shape) > 0.4),
        ("float", normal(*shape, seed=4)),
    ):
        model = attention(f"<is_causal={causal}>", f", {kind}[{sizes}] m", "q, k, v, m")
        agrees(model, {**QKV, "m": mask})


def test_a_query_that_may_look_nowhere_sees_zeros() -> None:
    mask = np.ones((5, 7), bool)
    mask[2] = False
    for softcap in ("", "<softcap=0.5>"):
        model = attention(softcap, ", bool[5,7] m", "q, k, v, m")
        found = to_torch(model)(*map(torch.from_numpy, [*QKV.values(), mask]))
        assert torch.equal(found[:, :, 2], torch.zeros(2, 4, 6))
        assert torch.isfinite(found).all()


def test_attention_by_fewer_heads_of_keys() -> None:
    feed = {"q": normal(2, 4, 5, 8), "k": normal(2, 2, 7, 8), "v": normal(2, 2, 7, 6)}
    inputs = "float[N,4,5,8] q, float[N,2,7,8] k, float[N,2,7,6] v"
    agrees(net("y = Attention(q, k, v)", {}, inputs, "float y", 23), feed)
    flat = {"q": normal(2, 5, 32), "k": normal(2, 7, 16), "v": normal(2, 7, 12)}
    inputs = "float[N,5,32] q, float[N,7,16] k, float[N,7,12] v"
    body = "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)"
    agrees(net(body, {}, inputs, "float y", 23), flat)


def test_attention_with_a_cache() -> None:
    more = ", float[N,4,3,8] pk, float[N,4,3,6] pv"
    feed = {**QKV, "pk": normal(2, 4, 3, 8, seed=5), "pv": normal(2, 4, 3, 6, seed=6)}
    for attributes in ("", "<is_causal=1>"):
        agrees(attention(attributes, more, "q, k, v, , pk, pv", "y, nk, nv"), feed)


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_over_keys_that_count(causal: int) -> None:
    body = f"y = Attention<is_causal={causal}>(q, k, v, , , , n)"
    model = net(body, {}, INPUTS + ", int64[N] n", "float y", 24)
    q, k, v = (torch.from_numpy(value) for value in QKV.values())
    found = to_torch(model)(q, k, v, torch.tensor([7, 3]))
    for sample, count in enumerate((7, 3)):
        allowed = torch.ones(5, count, dtype=torch.bool).tril(count - 5 if causal else 9)
        wanted = F.scaled_dot_product_attention(
            q[sample], k[sample, :, :count], v[sample, :, :count], allowed
        )
        torch.testing.assert_close(found[sample], wanted)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_scores_as_an_output(mode: int) -> None:
    body = f"y, , , s = Attention<qk_matmul_output_mode={mode}, softcap=0.5>(q, k, v, m)"
    model = net(body, {}, INPUTS + ", float[5,7] m", "float y, float s", 23)
    q, k, v = (torch.from_numpy(value) for value in QKV.values())
    mask = torch.from_numpy(normal(5, 7, seed=7))
    y, scores = to_torch(model)(q, k, v, mask)
    plain = q @ k.transpose(2, 3) / 8**0.5
    capped = torch.tanh(plain / 0.5) * 0.5
    masked = capped + mask
    forms = {0: capped, 1: capped, 2: masked, 3: masked.softmax(-1)}
    torch.testing.assert_close(scores, forms[mode])
    torch.testing.assert_close(y, masked.softmax(-1) @ v)


def test_attention_trains_like_torchs() -> None:
    q, k, v = (torch.from_numpy(value).requires_grad_() for value in QKV.values())
    found = torch.autograd.grad(to_torch(attention("<is_causal=1>"))(q, k, v).square().sum(), (q, k, v))
    native = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for ours, wanted in zip(found, torch.autograd.grad(native.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("size", [0, 4])
def test_rotary_embedding(interleaved: int, size: int) -> None:
    half = (size or 8) // 2
    feed = {"x": normal(2, 3, 5, 8), "c": normal(9, half, seed=1), "s": normal(9, half, seed=2)}
    feed["p"] = np.array([[0, 3, 8, 2, 2], [5, 4, 3, 2, 1]])
    body = f"y = RotaryEmbedding<interleaved={interleaved}, rotary_embedding_dim={size}"
    inputs = f"float[N,3,5,8] x, float[9,{half}] c, float[9,{half}] s, int64[N,5] p"
    agrees(net(f"{body}, num_heads=3>(x, c, s, p)", {}, inputs, "float y", 23), feed)
    flat = {**feed, "x": feed["x"].transpose(0, 2, 1, 3).reshape(2, 5, 24)}
    inputs = inputs.replace("[N,3,5,8]", "[N,5,24]")
    agrees(net(f"{body}, num_heads=3>(x, c, s, p)", {}, inputs, "float y", 23), flat)


def microsoft(
    op: str,
    weights: list[np.ndarray | None],
    x: np.ndarray,
    outputs: tuple[str, ...] = ("y",),
    **attributes: object,
) -> Model:
    """One node of com.microsoft, all of its inputs but the first stored."""
    names = [f"w{place}" if weight is not None else "" for place, weight in enumerate(weights)]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], outputs, domain="com.microsoft", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", *x.shape[1:]])],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs if name],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True) if w is not None],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return Model.load(helper.make_model(graph, opset_imports=opsets, ir_version=8))


X = normal(3, 4, 6)
IMAGES = normal(2, 3, 8, 8)
KERNEL = [normal(4, 3, 3, 3), normal(4)]
TOKENS = [normal(3, 4, 6, seed=3), normal(6, seed=1), normal(6, seed=2), normal(6, seed=4)]


@pytest.mark.parametrize(
    ("op", "x", "weights", "attributes", "trained"),
    [
        ("FastGelu", X, [normal(6)], {}, ["w0"]),
        ("FastGelu", X, [], {}, []),
        ("BiasGelu", X, [normal(6)], {}, ["w0"]),
        ("QuickGelu", X, [], {"alpha": 1.5}, []),
        ("SkipLayerNormalization", X, TOKENS, {"epsilon": 0.01}, ["w1", "w2", "w3"]),
        ("SkipLayerNormalization", X, TOKENS[:2], {}, ["w1"]),
        ("SkipSimplifiedLayerNormalization", X, TOKENS[:3], {"epsilon": 0.01}, ["w1", "w2"]),
        ("FusedMatMul", X, [normal(5, 6)], {"transB": 1, "alpha": 0.3}, ["w0"]),
        ("FusedMatMul", X, [normal(3, 4, 5)], {"transA": 1}, ["w0"]),
        ("FusedConv", IMAGES, KERNEL, {"pads": [1, 1, 1, 1], "activation": "Relu"}, ["w0", "w1"]),
        ("FusedConv", IMAGES, KERNEL, {"activation": "Clip", "activation_params": [-0.2, 0.4]}, ["w0", "w1"]),
        ("FusedConv", IMAGES, [*KERNEL, normal(2, 4, 6, 6)], {"activation": "Sigmoid"}, ["w0", "w1"]),
        ("FusedGemm", X[0], [normal(5, 6), normal(5)],
         {"transB": 1, "activation": "LeakyRelu", "activation_alpha": 0.3}, ["w0", "w1"]),
        ("FusedGemm", X[0], [normal(6, 5)], {"alpha": 0.5, "activation": "Tanh"}, ["w0"]),
    ],
)  # fmt: skip
def test_fused_operators(
    op: str,
    x: np.ndarray,
    weights: list[np.ndarray | None],
    attributes: dict[str, object],
    trained: list[str],
) -> None:
    module = agrees(microsoft(op, weights, x, **attributes), {"x": x})
    assert sorted(name for name, _ in module.named_parameters()) == trained


def test_the_sum_before_a_normalisation_is_an_output() -> None:
    for op, weights in (("SkipLayerNormalization", TOKENS), ("SkipSimplifiedLayerNormalization", TOKENS[:3])):
        agrees(microsoft(op, weights, X, ("y", "", "", "sum")), {"x": X})
        with pytest.raises(NotApplicableError, match="mean and deviation"):
            to_torch(microsoft(op, weights, X, ("y", "mean", "", "sum")))


def test_what_fused_operators_refuse() -> None:
    with pytest.raises(NotApplicableError, match="activation 'HardSigmoid'"):
        to_torch(microsoft("FusedConv", [*KERNEL], IMAGES, activation="HardSigmoid"))
    with pytest.raises(NotApplicableError, match="transposed batches"):
        to_torch(microsoft("FusedMatMul", [normal(4, 6)], X, transBatchA=1))


def test_compute_is_what_it_is_compared_with() -> None:
    """ONNX Runtime's own answer is no copy of the import's: a changed weight shows."""
    model = microsoft("BiasGelu", [normal(6)], X)
    with torch.no_grad():
        module = to_torch(model)
        module.w0 += 1
    assert np.abs(module(torch.from_numpy(X)).detach().numpy() - compute(model, {"x": X})[0]).max() > 0.1
