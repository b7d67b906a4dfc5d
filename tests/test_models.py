"""The networks that ship in models/: sound files, and the accuracy that their metadata states."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxfuse.verification.metrics import METRICS

MODELS = Path(__file__).parent.parent / "models"
# Lowest accuracy on the rows of the .npz; chance is 0.1, and for tiny_lm, always a space, 0.19.
BARS = {
    "digits_mlp": 0.96,
    "digits_resnet": 0.98,
    "mnist1d_conv": 0.95,
    "tiny_lm": 0.6,
    "tiny_transformer": 0.93,
}
# Largest nats per character of tiny_lm, and how its text begins.
NLL, OPENING = 1.3, "to be angry? Then Jonah went out of the city"
# Largest size of the .onnx in bytes.
SIZES = dict.fromkeys(BARS, 1_000_000) | {"tiny_lm": 2_500_000}

every_model = pytest.mark.parametrize("name", BARS)


@cache
def proto(name: str) -> onnx.ModelProto:
    return onnx.load(MODELS / f"{name}.onnx", load_external_data=False)


@cache
def samples(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(inputs by name, labels)"""
    with np.load(MODELS / f"{name}.npz") as data:
        arrays = dict(data)
    return arrays, arrays.pop("labels")


def logits(name: str, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logits"], feed)[0]


@cache
def reference(name: str) -> np.ndarray:
    """The logits of all rows."""
    return logits(name, samples(name)[0])


def test_each_network_has_its_script_its_samples_and_a_bar() -> None:
    assert {path.stem for path in MODELS.glob("*.onnx")} == set(BARS)
    assert {path.stem for path in MODELS.glob("*.npz")} == set(BARS)
    assert {path.stem for path in MODELS.glob("*.py")} == {*BARS, "common"}


@every_model
def test_small_valid_and_self_contained(name: str) -> None:
    content = (MODELS / f"{name}.onnx").read_bytes()
    assert len(content) < SIZES[name]
    assert (MODELS / f"{name}.npz").stat().st_size < 500_000
    onnx.checker.check_model(content, full_check=True)
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in proto(name).graph.initializer)
    assert not any(trace in content for trace in (b".py:", b"site-packages", b"/home/", b"/root/"))


@every_model
def test_names_and_metadata(name: str) -> None:
    model = proto(name)
    facts = {item.key: item.value for item in model.metadata_props}
    assert model.doc_string
    assert model.graph.name == name
    assert facts["data_licence"] in {"CC-BY-4.0", "Apache-2.0", "public domain"}
    assert (MODELS.parent / facts["script"]).is_file()
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@every_model
def test_samples_fit_the_inputs(name: str) -> None:
    inputs, labels = samples(name)
    assert list(inputs) == [value.name for value in proto(name).graph.input]
    for value in proto(name).graph.input:
        array, tensor = inputs[value.name], value.type.tensor_type
        assert array.dtype == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        assert array.shape[0] == len(labels)
        for size, dim in zip(array.shape, tensor.shape.dim, strict=True):
            assert dim.dim_param or size == dim.dim_value
    assert labels.dtype == np.int64
    assert name == "tiny_lm" or set(labels) == set(range(10))


@every_model
def test_accuracy_is_what_the_metadata_says(name: str) -> None:
    _, labels = samples(name)
    accuracy = float((reference(name).argmax(-1) == labels).mean())
    stated = {item.key: item.value for item in proto(name).metadata_props}
    assert accuracy >= BARS[name]
    assert int(stated["test_rows"]) == len(labels)
    # One label may sit on the fence between two classes on another CPU.
    assert accuracy == pytest.approx(float(stated["test_accuracy"]), abs=1 / labels.size + 5e-5)


@every_model
@pytest.mark.parametrize("rows", [1, 7])
def test_batch_size_does_not_matter(name: str, rows: int) -> None:
    inputs, _ = samples(name)
    part = logits(name, {key: array[:rows] for key, array in inputs.items()})
    assert part.shape == (rows, *reference(name).shape[1:])
    np.testing.assert_allclose(part, reference(name)[:rows], atol=1e-4)


def test_the_resnet_keeps_its_batchnorm_in_inference_form() -> None:
    nodes = [node for node in proto("digits_resnet").graph.node if node.op_type == "BatchNormalization"]
    assert len(nodes) == 15
    for node in nodes:
        assert len(node.output) == 1
        assert not any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)


def test_the_transformer_ignores_padding() -> None:
    inputs, _ = samples("tiny_transformer")
    ids, mask = (inputs[key][:50] for key in ("input_ids", "attention_mask"))
    assert (mask == 0).any()
    reference = logits("tiny_transformer", {"input_ids": ids, "attention_mask": mask})
    garbage = {"input_ids": np.where(mask == 0, 77, ids), "attention_mask": mask}
    np.testing.assert_allclose(logits("tiny_transformer", garbage), reference, atol=1e-4)
    longer = {"input_ids": np.pad(ids, ((0, 0), (0, 9))), "attention_mask": np.pad(mask, ((0, 0), (0, 9)))}
    np.testing.assert_allclose(logits("tiny_transformer", longer), reference, atol=1e-4)


def test_the_language_model_reads_its_own_text() -> None:
    """A contiguous text: what follows a row is the row behind it, one character on."""
    inputs, labels = samples("tiny_lm")
    ids = inputs["input_ids"]
    assert ids.shape == labels.shape == (600, 64)
    np.testing.assert_array_equal(ids.reshape(-1)[1:], labels.reshape(-1)[:-1])
    (characters,) = (item.value for item in proto("tiny_lm").metadata_props if item.key == "labels")
    assert len(characters) == len(set(characters)) == reference("tiny_lm").shape[-1]
    assert "".join(characters[i] for i in ids[0]).startswith(OPENING)


def test_the_language_model_is_as_sure_as_the_metadata_says() -> None:
    found = -METRICS["nll"]({"logits": reference("tiny_lm")}, samples("tiny_lm")[1]).mean()
    (stated,) = (item.value for item in proto("tiny_lm").metadata_props if item.key == "test_nll")
    assert found == pytest.approx(float(stated), abs=1e-3)
    assert found < NLL


def test_the_language_model_does_not_look_ahead() -> None:
    """What comes later changes nothing, and a text may be shorter than the context."""
    ids = samples("tiny_lm")[0]["input_ids"][:20]
    expected = reference("tiny_lm")[:20]
    other = np.concatenate([ids[:, :40], ids[::-1, 40:]], axis=1)
    found = logits("tiny_lm", {"input_ids": other})
    np.testing.assert_allclose(found[:, :40], expected[:, :40], atol=1e-4)
    assert np.abs(found[:, 41:] - expected[:, 41:]).max() > 1
    np.testing.assert_allclose(logits("tiny_lm", {"input_ids": ids[:, :40]}), expected[:, :40], atol=1e-4)
