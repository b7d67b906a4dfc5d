"""The judge, tried on pairs of models whose difference is known. Every check is shown to be able to fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.data.calibration import Batch, Calibration
from onnxfuse.data.rows import first_rows
from onnxfuse.errors import InputError, VerificationError
from onnxfuse.findings import Prediction
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.sampling import sample_positions
from onnxfuse.runtime.memory import Budget
from onnxfuse.runtime.session import Runtime
from onnxfuse.verification.compare import compare, output_error
from onnxfuse.verification.divergence import first_divergence
from onnxfuse.verification.interface import structure_problem
from onnxfuse.verification.noise import MULTIPLE, NOISE_SAMPLES
from onnxfuse.verification.predictions import check_predictions
from onnxfuse.verification.records import OutputError


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime("cpu", threads=2)


def parsed(text: str, **weights: np.ndarray) -> Model:
    """A model from ONNX text; `weights` become its initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    proto.graph.initializer.extend(
        numpy_helper.from_array(
            np.asarray(value, np.float32 if np.asarray(value).dtype.kind == "f" else None), name
        )
        for name, value in weights.items()
    )
    return Model.load(proto)


def batches(*shape: int, rows: int = 8, count: int = 2, name: str = "x", seed: int = 0) -> list[Batch]:
    random = np.random.default_rng(seed)
    return [
        Batch({name: random.standard_normal((rows, *shape)).astype(np.float32)}, None, index, rows)
        for index in range(count)
    ]


RANDOM = np.random.default_rng(7)
W1, W2 = RANDOM.standard_normal((6, 16)), RANDOM.standard_normal((16, 4))
MLP = """mlp (float[N,6] x) => (float[N,4] y) {
    h = MatMul(x, w1)
    r = Relu(h)
    y = MatMul(r, w2)
}"""


def mlp(w1: np.ndarray = W1, w2: np.ndarray = W2) -> Model:
    return parsed(MLP, w1=w1, w2=w2)


# --- compare ------------------------------------------------------------------------------------------------


def test_a_model_equals_itself_at_every_batch_size(runtime: Runtime) -> None:
    found = compare(mlp(), mlp(), batches(6), runtime)
    assert found.passed
    assert found.reason is None
    assert found.batch_sizes == (1, 3, 8)
    assert found.samples == 1 + 3 + 8 + 8
    (output,) = found.outputs
    assert output.name == "y"
    assert output.relative == output.max_abs == output.ratio == 0
    assert 0 < output.floor < 1e-5


CONV_BN = """conv_bn (float[N,3,8,8] x) => (float[N,5,8,8] y) {
    c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b)
    y = BatchNormalization(c, scale, shift, mean, var)
}"""
CONV = """conv (float[N,3,8,8] x) => (float[N,5,8,8] y) {
    y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b)
}"""


def conv_bn() -> tuple[Model, Model]:
    """A convolution with BatchNormalization, and the same folded by hand."""
    random = np.random.default_rng(3)
    w, b = random.standard_normal((5, 3, 3, 3)), random.standard_normal(5)
    scale, shift, mean = (random.standard_normal(5) for _ in range(3))
    var = random.uniform(0.2, 4, 5)
    factor = scale / np.sqrt(var + 1e-5)
    folded = parsed(CONV, w=w * factor[:, None, None, None], b=(b - mean) * factor + shift)
    return parsed(CONV_BN, w=w, b=b, scale=scale, shift=shift, mean=mean, var=var), folded


def test_a_folded_batch_norm_passes_and_a_weight_off_by_a_thousandth_fails(runtime: Runtime) -> None:
    original, folded = conv_bn()
    found = compare(original, folded, batches(3, 8, 8), runtime)
    assert found.passed, found.reason
    assert found.outputs[0].ratio > 0
    weight = folded.weight(folded.tensor("w"))
    assert weight is not None
    wrong = weight.copy()
    wrong[2, 1, 0, 2] += 1e-3 * np.abs(weight).max()
    folded.set_weight(folded.tensor("w"), wrong)
    found = compare(original, folded, batches(3, 8, 8), runtime)
    assert not found.passed
    assert "output 'y' differs" in (found.reason or "")
    assert "times the noise floor" in (found.reason or "")


def test_one_wrong_element_among_many_fails_by_its_peak(runtime: Runtime) -> None:
    text = "add (float[N,4000] x) => (float[N,4000] y) { y = Add(x, b) }"
    offset = np.zeros(4000)
    offset[1234] = 2e-5
    original, result = parsed(text, b=np.zeros(4000)), parsed(text, b=offset)
    (feed,) = batches(4000, count=1)
    found = compare(original, result, [feed], runtime)
    (output,) = found.outputs
    assert output.relative < MULTIPLE * output.floor  # the root mean square alone lets it pass
    assert not found.passed


def test_relative_error_is_against_deviation_from_the_mean_over_samples(runtime: Runtime) -> None:
    shift = "shift (float[8,3] x) => (float[8,3] y) { y = Add(x, b) }"
    (batch,) = batches(3, count=1)
    batch.feed["x"] += np.array([100, 0, -50], np.float32)
    found = compare(parsed(shift, b=[0.0] * 3), parsed(shift, b=[0.25] * 3), [batch], runtime)
    x = batch.feed["x"].astype(np.float64)
    expected = np.sqrt(0.25**2 * x.size / ((x - x.mean(axis=0)) ** 2).sum())
    assert found.outputs[0].relative == pytest.approx(expected, rel=1e-5)
    assert found.outputs[0].max_abs == pytest.approx(0.25, rel=1e-4)


def test_swapped_outputs_fail(runtime: Runtime) -> None:
    text = "two (float[N,6] x) => (float[N,6] a, float[N,6] b) {{ {} = Relu(x) {} = Abs(x) }}"
    one, other = parsed(text.format("a", "b")), parsed(text.format("b", "a"))
    found = compare(one, other, batches(6), runtime)
    assert not found.passed
    assert {output.name for output in found.outputs if output.ratio > MULTIPLE} == {"a", "b"}


def test_outputs_are_matched_by_name_and_their_order_is_structure(runtime: Runtime) -> None:
    text = "two (float[N,6] x) => (float[N,6] {}, float[N,6] {}) {{ a = Relu(x) b = Abs(x) }}"
    one, other = parsed(text.format("a", "b")), parsed(text.format("b", "a"))
    assert compare(one, other, batches(6), runtime).passed
    assert structure_problem(one, other, runtime) == "the order of the outputs changed"


LOG = "log (float[N,6] x) => (float[N,6] y) {{ a = Abs(x) b = {}(x) y = {}({}) }}"


@pytest.mark.parametrize(("op", "kind"), [("Sqrt", "NaN"), ("Log", "NaN"), ("Reciprocal", "infinity")])
def test_nan_and_infinity_must_be_in_both(op: str, kind: str, runtime: Runtime) -> None:
    bad = parsed(f"bad (float[N,6] x) => (float[N,6] y) {{ y = {op}(x) }}")
    good = parsed("good (float[N,6] x) => (float[N,6] y) { y = Abs(x) }")
    data = batches(6)
    if op == "Reciprocal":
        data[1].feed["x"][0, 0] = 0
    for pair, owner in (((good, bad), "the result"), ((bad, good), "the original")):
        found = compare(*pair, data, runtime)
        assert not found.passed
        assert f"output 'y' of {owner} has {kind} in" in (found.reason or "")
    found = compare(bad, bad, data, runtime)
    assert found.passed, found.reason
    x = np.concatenate([data[0].feed["x"][:1], data[0].feed["x"][:3], *(batch.feed["x"] for batch in data)])
    assert found.outputs[0].nonfinite == np.count_nonzero(x == 0 if op == "Reciprocal" else x < 0)
    assert "is infinite or NaN in" in found.notes[0]


def test_integer_outputs_must_be_equal(runtime: Runtime) -> None:
    text = "classes (float[N,4] x) => (int64[N,1] y) {{ z = Mul(x, s) y = ArgMax<axis = 1>({}) }}"
    one = parsed(text.format("x"), s=np.ones(4))
    assert compare(one, parsed(text.format("z"), s=np.full(4, 2.0)), batches(4), runtime).passed
    found = compare(one, parsed(text.format("z"), s=[1.0, 1, 1, 3]), batches(4), runtime)
    assert not found.passed
    assert "must be equal" in (found.reason or "")
    assert 0 < found.outputs[0].relative < 1


def test_sequences_are_compared_element_by_element(runtime: Runtime) -> None:
    text = """pieces (float[N,6] x) => (seq(float[N,2]) y) {{
        z = Mul(x, s)
        y = SplitToSequence<axis = 1>(z, sizes)
    }}"""
    sizes = np.full(3, 2, np.int64)
    one, wrong = parsed(text.format(), s=np.ones(6), sizes=sizes), np.ones(6)
    assert compare(one, parsed(text.format(), s=wrong, sizes=sizes), batches(6), runtime).passed
    wrong[3] = 1.001
    found = compare(one, parsed(text.format(), s=wrong, sizes=sizes), batches(6), runtime)
    assert [output.name for output in found.outputs if output.ratio > MULTIPLE] == ["y[1]"]
    fewer = parsed(
        """pieces (float[N,6] x) => (seq(float[N,2]) y) {
            z = Slice(x, from, to, axis)
            y = SplitToSequence<axis = 1>(z, sizes)
        }""",
        **{"from": np.array([0]), "to": np.array([4]), "axis": np.array([1]), "sizes": np.array([2, 2])},
    )
    found = compare(one, fewer, batches(6), runtime)
    assert found.reason == "output 'y[2]' is in the original and not in the result"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "m (float[N,6] x) => (float[N,6] z) { z = Abs(x) }",
            "output 'y' is in the original and not in the result",
        ),
        (
            "m (float[N,6] u) => (float[N,6] y) { y = Abs(u) }",
            "input 'x' is in the original and not in the result",
        ),
        (
            "m (float[N,6] x) => (double[N,6] y) { y = Cast<to = 11>(x) }",
            "output 'y' is float32 in the original",
        ),
        ("m (float[N,6] x) => (float[6,N] y) { y = Transpose(x) }", "output 'y'"),
        (
            "m (float[N,5] x) => (float[N,5] y) { y = Abs(x) }",
            "input 'x' is [N, 6] in the original and [N, 5]",
        ),
        (
            "m (float[N,6] x) => (float[N,6] y, float[N,6] z) { y = Abs(x) z = Abs(x) }",
            "output 'z' is in the result and not in the original",
        ),
    ],
)
def test_differences_of_interface_fail_with_a_clear_line(text: str, problem: str, runtime: Runtime) -> None:
    original = parsed("m (float[N,6] x) => (float[N,6] y) { y = Abs(x) }")
    found = compare(original, parsed(text), batches(6), runtime)
    assert not found.passed
    assert (found.reason or "").startswith(problem) or f"output '{problem}" in (found.reason or "")


def test_shapes_that_only_a_run_shows_fail(runtime: Runtime) -> None:
    original = parsed("m (float[N,6] x) => (float[A,B] y) { y = Abs(x) }")
    result = parsed("m (float[N,6] x) => (float[A,B] y) { y = Transpose(x) }")
    reason = compare(original, result, batches(6), runtime).reason
    assert reason == "output 'y' has shape [1, 6] in the original and [6, 1] in the result"


def test_a_result_that_runs_at_one_batch_size_only_fails(runtime: Runtime) -> None:
    text = "m (float[N,6] x) => (float[N,6] y) {{ a = Abs(x) y = Reshape(a, shape) }}"
    original = parsed(text.format(), shape=np.array([-1, 6]))
    result = parsed(text.format(), shape=np.array([8, 6]))
    reason = compare(original, result, batches(6), runtime).reason or ""
    assert reason.startswith("the result fails where the original runs, with a batch of 1")


def test_batch_sizes_that_the_original_refuses_prove_nothing(runtime: Runtime) -> None:
    text = "m (float[N,6] x) => (float[N,6] y) {{ a = Abs(x) y = Reshape(a, shape) }}"
    model = parsed(text.format(), shape=np.array([8, 6]))
    found = compare(model, model, batches(6), runtime)
    assert found.passed
    assert found.batch_sizes == (8,)


def test_outputs_that_are_mostly_noise_are_said_to_be(runtime: Runtime) -> None:
    model = parsed("m (float[N,6] x) => (float[N,6] y) { a = Mul(x, big) y = Sin(a) }", big=np.full(6, 1e6))
    found = compare(model, model, batches(6), runtime)
    assert found.passed
    assert "test it little" in found.notes[0]


# --- noise floor --------------------------------------------------------------------------------------------


def test_the_noise_floor_grows_with_the_condition_of_the_model(runtime: Runtime) -> None:
    text = "m (float[N,6] x) => (float[N,6] y) { a = Mul(x, s) b = Sin(a) y = Mul(b, t) }"
    data = batches(6)
    models = [
        parsed(text, s=np.full(6, s), t=np.full(6, t)) for s, t in ((1.0, 1.0), (1.0, 100.0), (1000.0, 1.0))
    ]
    floors = [compare(model, model, data, runtime).outputs[0].floor for model in models]
    assert floors[1] == pytest.approx(floors[0], rel=0.5)  # relative: the output's scale does not matter
    assert floors[2] > 50 * floors[0] > 0


def test_the_noise_floor_is_never_below_the_spacing_of_floats(runtime: Runtime) -> None:
    text = "add (float[N,4000] x) => (float[N,4000] y) { y = Add(x, b) }"
    offset = np.zeros(4000)
    offset[1234] = 1e-3
    data = batches(4000, count=1)
    (output,) = compare(parsed(text, b=np.zeros(4000)), parsed(text, b=offset), data, runtime).outputs
    spacing = np.finfo(np.float32).eps * np.abs(data[0].feed["x"])
    peak = output.max_abs / output.ratio  # of one element in four thousand it is the peak that tells
    assert np.sqrt(np.mean(spacing**2)) < spacing.max() * 0.999 <= peak < 3 * spacing.max()
    scale = np.sqrt(np.mean((data[0].feed["x"] - data[0].feed["x"].mean(0)) ** 2))
    assert np.sqrt(np.mean(spacing**2)) * 0.999 <= output.floor * scale <= peak


def test_integer_inputs_are_not_nudged(runtime: Runtime) -> None:
    model = parsed(
        "m (int64[N] x) => (float[N,4] y) { y = Gather(table, x) }", table=RANDOM.standard_normal((5, 4))
    )
    data = [Batch({"x": np.array([0, 4, 2, 1])}, None, 0, 4)]
    assert compare(model, model, data, runtime).passed


# --- output error -------------------------------------------------------------------------------------------


def test_inputs_that_must_be_exact_are_not_nudged(runtime: Runtime) -> None:
    """ONNX Runtime refuses a Resize whose batch axis is scaled by anything but 1."""
    resize = parsed(
        """g (float[1,2,4,4] x, float[4] scales) => (float[A,B,C,D] y) {
        y = Resize<mode="linear">(x, , scales)
    }"""
    )
    feed = {
        "x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    assert compare(resize, resize, [Batch(feed, None, 0, 1)], runtime).passed


@pytest.mark.parametrize("kind", ["float8e5m2", "float8e4m3fn"])
def test_small_floats_are_compared(kind: str, runtime: Runtime) -> None:
    code = getattr(TensorProto, kind.upper())
    text = f"""<ir_version: 9, opset_import: ["" : 19]> g (float[N,6] x) => ({kind}[N,6] y) {{
        y = Cast<to={code}>(x)
    }}"""
    model = Model.load(onnx.parser.parse_model(text))
    assert compare(model, model, batches(6), runtime).passed


def test_output_error_matches_numpy(runtime: Runtime) -> None:
    result = mlp(w2=W2 + 0.1 * RANDOM.standard_normal(W2.shape))
    data = batches(6, count=3)
    found = output_error(mlp(), result, data, runtime)
    x = np.concatenate([batch.feed["x"] for batch in data]).astype(np.float64)
    w2 = result.weight(result.tensor("w2"))
    assert w2 is not None
    y, z = np.maximum(x @ W1, 0) @ W2, np.maximum(x @ W1, 0) @ w2
    expected = np.sqrt(((y - z) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum())
    assert found.worst == found.outputs["y"] == pytest.approx(expected, rel=1e-4)
    assert found.samples == 24


def test_output_error_refuses_nan_and_other_shapes(runtime: Runtime) -> None:
    with pytest.raises(VerificationError, match="has NaN"):
        output_error(mlp(), mlp(w2=np.full((16, 4), np.nan)), batches(6), runtime)
    other = parsed("m (float[N,6] x) => (float[N,6] y) { y = Abs(x) }")
    with pytest.raises(VerificationError, match=r"output 'y' is \[N, 4\]"):
        output_error(mlp(), other, batches(6), runtime)


# --- first divergence ---------------------------------------------------------------------------------------

CHAIN = """chain (float[N,6] x) => (float[N,6] y) {{
    a = Mul(x, one)
    b = {}(a)
    c = Clip(b, low, high)
    d = Add(c, one)
    y = {}(d)
}}"""
LIMITS = {"one": np.ones(6), "low": np.float32(0), "high": np.float32(0.001)}


def test_the_first_diverging_tensor_is_named_though_later_ones_agree(runtime: Runtime) -> None:
    a, b = (
        parsed(CHAIN.format(first, last), **LIMITS) for first, last in (("Exp", "Abs"), ("Softplus", "Neg"))
    )
    for model in (a, b):
        model.nodes[1].name = "the_culprit"
    found = first_divergence(a, b, batches(6, count=1)[0], runtime)
    assert found is not None
    assert (found.tensor, found.node, found.op) == ("b", "the_culprit", "Exp")
    assert "tensor 'b' (Exp 'the_culprit')" in str(found)
    same = first_divergence(a, a.copy(), batches(6, count=1)[0], runtime)
    assert same is None


def test_divergence_is_found_beyond_the_first_chunk_of_taps(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxfuse.verification.divergence._CHUNK", 2)
    a, b = (parsed(CHAIN.format("Exp", last), **LIMITS) for last in ("Abs", "Neg"))
    found = first_divergence(a, b, batches(6, count=1)[0], runtime)
    assert found is not None
    assert found.tensor == "y"


def test_divergence_in_a_late_row_only_is_found(runtime: Runtime) -> None:
    text = "m (float[N,6] x) => (float[N,6] y) {{ a = {}(x) y = Identity(a) }}"
    (batch,) = batches(6, count=1)
    batch.feed["x"] = np.abs(batch.feed["x"])
    batch.feed["x"][7, 2] *= -1
    found = first_divergence(parsed(text.format("Relu")), parsed(text.format("Abs")), batch, runtime)
    assert found is not None
    assert found.tensor == "a"


def test_divergence_by_nan(runtime: Runtime) -> None:
    a = parsed("m (float[N,6] x) => (float y) { a = Abs(x) y = ReduceSum<keepdims = 0>(a) }")
    b = parsed("m (float[N,6] x) => (float y) { a = Sqrt(x) y = ReduceSum<keepdims = 0>(a) }")
    found = first_divergence(a, b, batches(6, count=1)[0], runtime)
    assert found is not None
    assert "'a' of the result has NaN" in str(found)


# --- predictions --------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """As much of a Calibration as `check_predictions` reads."""

    fit: list[Batch]
    budget: Budget = Budget()  # noqa: RUF009


CONVS = """convs (float[N,2,7,7] x) => (float[N,3,7,7] y) {
    v = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
    y = Relu(v)
}"""


def conv_pair() -> tuple[Model, Model]:
    random = np.random.default_rng(5)
    w = random.standard_normal((3, 2, 3, 3))
    return parsed(CONVS, w=w), parsed(CONVS, w=w + 0.2 * random.standard_normal(w.shape))


def local_error(data: list[Batch], positions: int | None, seed: int, runtime: Runtime) -> tuple[float, float]:
    """Mean over rows of the squared error of `v`, and its variance, by NumPy from the tapped tensors."""
    original, result = conv_pair()
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in data:
        v, z = (
            runtime.session(m, taps=["v"]).run(batch.feed)["v"].astype(np.float64) for m in (original, result)
        )
        v, z = v.reshape(*v.shape[:2], -1), z.reshape(*z.shape[:2], -1)
        at = sample_positions(seed, "v", batch.index, len(v), v.shape[2], positions)
        for sample in range(len(v)):
            chosen = slice(None) if at is None else at[sample]
            rows.append((v[sample][:, chosen].T, z[sample][:, chosen].T))
    v, z = (np.concatenate(part) for part in zip(*rows, strict=True))
    return float(((v - z) ** 2).sum(axis=1).mean()), float(((v - v.mean(axis=0)) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("positions", [None, 5])
def test_a_right_prediction_passes_and_a_slightly_wrong_one_fails(
    positions: int | None, runtime: Runtime
) -> None:
    original, result = conv_pair()
    data = batches(2, 7, 7, count=3)
    error, variance = local_error(data, positions, 11, runtime)
    claims = [Prediction("v", "v", error * factor, variance, positions) for factor in (1, 1.01, 0.99, np.nan)]
    checks = check_predictions(original, result, claims, Fit(data), runtime, 11)
    assert [check.passed for check in checks] == [True, False, False, False]
    assert checks[0].measured == pytest.approx(error, rel=1e-6)
    assert checks[0].variance == pytest.approx(variance, rel=1e-6)
    assert "tensor 'v': predicted a mean squared error of" in (checks[1].reason or "")


def test_positions_depend_on_the_seed(runtime: Runtime) -> None:
    original, result = conv_pair()
    data = batches(2, 7, 7, count=1, rows=4)
    error, variance = local_error(data, 3, 11, runtime)
    claim = Prediction("v", "v", error, variance, 3)
    for seed, passed in ((11, True), (12, False)):
        (check,) = check_predictions(original, result, [claim], Fit(data), runtime, seed)
        assert check.passed is passed


def test_tokens_have_their_channels_last(runtime: Runtime) -> None:
    text = "tokens (float[N,5,6] x) => (float[N,5,4] y) { y = MatMul(x, w) }"
    w, d = RANDOM.standard_normal((6, 4)), 0.1 * RANDOM.standard_normal((6, 4))
    data = batches(5, 6, count=1)
    x = data[0].feed["x"].astype(np.float64).reshape(-1, 6)
    claim = Prediction("y", "y", float(((x @ d) ** 2).sum(axis=1).mean()), 1.0, None, channel_axis=-1)
    wrong = Prediction("y", "y", claim.error, 1.0, None, channel_axis=1)
    checks = check_predictions(
        parsed(text, w=w),
        parsed(text, w=w + d),
        [claim, wrong],
        Fit(data),
        runtime,
        0,
    )
    assert checks[0].passed, checks[0].reason
    assert not checks[1].passed  # five tokens taken for channels: 5/4 times the rows, not the same mean


def test_exact_zero_is_predicted_within_float_noise(runtime: Runtime) -> None:
    original, folded = conv_bn()
    data = batches(3, 8, 8)
    (check,) = check_predictions(
        original,
        folded,
        [Prediction("y", "y", 0.0, 1.0)],
        Fit(data),
        runtime,
        0,
    )
    assert 0 < check.measured <= check.tolerance < 1e-8 * check.variance
    assert check.passed


def test_predictions_about_tensors_that_are_not_there(runtime: Runtime) -> None:
    original, result = conv_pair()
    data = Fit(batches(2, 7, 7))
    for claim in (Prediction("gone", "v", 1.0, 1.0), Prediction("v", "gone", 1.0, 1.0)):
        with pytest.raises(InputError, match="no tensor named 'gone'"):
            check_predictions(original, result, [claim], data, runtime, 0)
    (check,) = check_predictions(
        original,
        result,
        [Prediction("v", "x", 1.0, 1.0)],
        data,
        runtime,
        0,
    )
    assert not check.passed
    assert "has shape" in (check.reason or "")


# --- structure ----------------------------------------------------------------------------------------------


def test_an_invalid_graph_is_named(runtime: Runtime) -> None:
    broken = mlp()
    broken.nodes[1].attrs["alpha"] = 1.0
    assert "no valid ONNX model" in (structure_problem(mlp(), broken, runtime) or "")
    assert structure_problem(mlp(), mlp(), runtime) is None


def test_a_changed_output_type_is_structure(runtime: Runtime) -> None:
    text = "m (float[N,6] x) => ({}[N,6] y) {{ y = Cast<to = {}>(x) }}"
    single, double = parsed(text.format("float", 1)), parsed(text.format("double", 11))
    expected = "output 'y' is float32 in the model before and float64 in the result"
    assert structure_problem(single, double, runtime) == expected


def test_a_graph_that_does_not_load_is_named(runtime: Runtime) -> None:
    broken = mlp(w2=RANDOM.standard_normal((15, 4)))
    assert "ONNX Runtime cannot load the model" in (structure_problem(mlp(), broken, runtime) or "")


def test_the_checker_works_without_bulky_weights(runtime: Runtime) -> None:
    w = RANDOM.standard_normal((64, 64))
    big = parsed("m (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", w=w)
    assert structure_problem(big, big.copy(), runtime) is None


def test_real_calibration_fits(runtime: Runtime) -> None:
    model = mlp()
    calibration = Calibration.open(None, model)
    assert compare(model, model, calibration.held_out, runtime).passed


def test_first_rows_cuts_the_batch_axis_wherever_it_is() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, "batch", 4])
    graph = helper.make_graph([helper.make_node("Add", ["x", "state"], ["y"])], "g", [x, state], [y])
    model = Model.load(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))
    random = np.random.default_rng(0)
    feed = {"x": random.random((5, 4), np.float32), "state": random.random((2, 5, 4), np.float32)}
    cut = first_rows(model, Batch(feed, None, 0, 5), 3)
    assert cut is not None
    np.testing.assert_array_equal(cut["x"], feed["x"][:3])
    np.testing.assert_array_equal(cut["state"], feed["state"][:, :3])
    assert first_rows(model, Batch(feed, None, 0, 5), 5) is None


def test_an_error_above_a_bound_is_told() -> None:
    error = OutputError({"a": 0.1, "b": 0.3}, 4)
    assert error.over(0.3, "--max-error") is None
    assert error.over(0.2, "--max-error") == "the relative error of output 'b' is 0.3, above --max-error 0.2"
    where = error.over(0.2, "", " on held-out samples")
    assert where == "the relative error of output 'b' on held-out samples is 0.3, above 0.2"
    assert OutputError({"a": float("nan")}, 4).over(1.0, "") is not None


def test_the_worst_error_does_not_depend_on_the_order_of_the_outputs() -> None:
    for outputs in ({"a": 0.1, "b": float("nan")}, {"b": float("nan"), "a": 0.1}):
        error = OutputError(outputs, 4)
        assert error.worst == np.inf
        assert "output 'b'" in str(error.over(1.0, ""))


# --- several scales -----------------------------------------------------------------------------------------

MASKED = """masked (float[N,6] x) => (float[N,4] y) {
    l = MatMul(x, w)
    s = ReduceSum<keepdims = 1>(x, axis)
    positive = Greater(s, zero)
    hidden = And(positive, mask)
    y = Where(hidden, fill, l)
}"""


def masked(scale: float, fill: float) -> Model:
    few = {"axis": np.array([1]), "zero": np.float32(0), "mask": np.array([True, False, True, False])}
    return parsed(MASKED, w=W1[:, :4] * scale, fill=np.float32(fill), **few)


@pytest.mark.parametrize("fill", [-1e4, -1e9, float(np.finfo(np.float32).min), -np.inf])
def test_the_judge_sees_what_a_mask_leaves(fill: float, runtime: Runtime) -> None:
    data = batches(6, rows=40)
    found = compare(masked(1, fill), masked(1.5, fill), data, runtime)
    assert not found.passed
    x = np.concatenate([batch.feed["x"] for batch in data]).astype(np.float64)
    hidden = (x.sum(1) > 0)[:, None] & np.array([True, False, True, False])
    y = np.ma.array(x @ W1[:, :4], mask=hidden)
    expected = np.sqrt((0.25 * y**2).sum() / ((y - y.mean(0)) ** 2).sum())
    error = output_error(masked(1, fill), masked(1.5, fill), data, runtime)
    assert error.worst == pytest.approx(expected, rel=1e-5)
    assert compare(masked(1, fill), masked(1, fill), data, runtime).passed
    if np.isfinite(fill):
        count = hidden.size - np.count_nonzero(hidden)
        assert f"{count} elements at scale" in str(error.over(0.1, ""))
        assert f"at scale {abs(fill):.3g}" in str(error.parts["y"][1])


def test_a_reference_that_is_zero_is_measured_against_the_spacing_of_floats(runtime: Runtime) -> None:
    text = "m (float[N,6] x) => (float[N,6] y) { y = Mul(x, k) }"
    zero, small = parsed(text, k=np.float32(0)), parsed(text, k=np.float32(1e-3))
    found = compare(zero, small, batches(6), runtime)
    assert not found.passed
    assert "from zero, which it is throughout" in str(found.reason)
    assert "is zero throughout: its error has no scale" in found.notes[0]
    assert output_error(zero, small, batches(6), runtime).worst > 1e3
    assert compare(zero, parsed(text, k=np.float32(1e-8)), batches(6), runtime).passed


# --- noise floors, measured on few samples and once ---------------------------------------------------------


class Counted:
    """A runtime that counts the rows of runs with a single thread, which only noise floors ask for."""

    def __init__(self, runtime: Runtime) -> None:
        self.providers, self.threads, self.rows, self._runtime = runtime.providers, 2, 0, runtime

    def session(self, model: Model, *, threads: int | None = None, **options: Any) -> Any:
        session = self._runtime.session(model, threads=threads, **options)
        run = session.run

        def counted(feed: Feed, *names: Any) -> Feed:
            self.rows += len(feed["x"]) if threads == 1 else 0
            return run(feed, *names)

        session.run = counted  # type: ignore[method-assign]
        return session


def test_floors_of_a_few_samples_pass_and_of_all_fail(runtime: Runtime) -> None:
    few, every = Counted(runtime), Counted(runtime)
    data = batches(6, count=12)
    total = sum(batch.samples for batch in data)
    passed = compare(mlp(), mlp(), data, few)  # type: ignore[arg-type]
    assert passed.passed
    assert passed.samples == total + 4  # with those of one and of three rows
    assert NOISE_SAMPLES <= few.rows < NOISE_SAMPLES + data[0].samples < total
    w2 = mlp().weight(mlp().tensor("w2"))
    assert w2 is not None
    failed = compare(mlp(), mlp(w2=w2 * 1.001), data, every)  # type: ignore[arg-type]
    assert not failed.passed
    assert every.rows == few.rows + total + 4  # judged by the floors on all


def test_a_weight_off_by_a_thousandth_is_seen_on_the_samples_of_a_check(runtime: Runtime) -> None:
    """Some weights of a small network, one after the other: what all samples show, the few show, too."""
    model = mlp()
    data = Calibration.open({"x": RANDOM.standard_normal((200, 6)).astype(np.float32)}, model)
    few = data.fit.some(32).joined(data.held_out.some(32))
    assert few.samples == 64
    for name in ("w1", "w2"):
        weight = model.weight(model.tensor(name))
        assert weight is not None
        for place in range(0, weight.size, 32):
            off = weight.copy()
            off.flat[place] += 1e-3 * np.abs(weight).max()
            wrong = mlp(**{name: off})
            if compare(model, wrong, data.fit, runtime).passed:
                continue  # nothing that these samples show
            assert not compare(model, wrong, few, runtime).passed


def test_floors_of_tensors_are_measured_once(runtime: Runtime) -> None:
    original, result = conv_pair()
    data = batches(2, 7, 7, count=2, rows=4)
    error, variance = local_error(data, None, 0, runtime)
    counted = Counted(runtime)
    claim = Prediction("v", "v", error, variance)
    tolerances = []
    for _ in range(2):
        (check,) = check_predictions(original, result, [claim], Fit(data), counted, 0)  # type: ignore[arg-type]
        tolerances.append(check.tolerance)
    assert counted.rows == 4
    assert tolerances[0] == tolerances[1]
