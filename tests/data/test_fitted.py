"""What was fitted is known again, wherever it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxfuse.data import fitted as module
from onnxfuse.data.calibration import Calibration
from onnxfuse.data.fitted import KEY, Fitted, data_digest
from onnxfuse.ir.model import Model

TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[batch,6] x) => (float[batch,6] y) { y = Neg(x) }'
X = np.random.default_rng(0).standard_normal((100, 6)).astype(np.float32)


def model(inputs: str = "float[batch,6] x") -> Model:
    return Model.load(onnx.parser.parse_model(TEXT.replace("float[batch,6] x", inputs)))


def opened(source: Any, **options: Any) -> Calibration:
    return Calibration.open(source, options.pop("model", model()), **options)


def rows(calibration: Calibration, part: str) -> np.ndarray:
    return np.concatenate([batch.feed["x"] for batch in getattr(calibration, part)])


def of_first(count: int) -> Fitted:
    return Fitted.of([{"x": X[:count]}], model().inputs)


def noted(found: Fitted) -> Model:
    made = model()
    found.note(made)
    return Model.load(made.to_proto())


def containers(folder: Path) -> dict[str, Any]:
    np.savez(folder / "x.npz", x=X, labels=np.zeros(len(X), int))
    (folder / "npy").mkdir()
    np.save(folder / "npy" / "x.npy", np.asfortranarray(X))
    (folder / "chunks").mkdir()
    for number, part in enumerate(np.split(X, [30, 70])):
        np.savez(folder / "chunks" / f"{number}.npz", x=part)
    return {
        "npz": folder / "x.npz",
        "npy": folder / "npy",
        "chunks": folder / "chunks",
        "array": X,
        "feeds": [{"x": X[start : start + 10]} for start in range(0, 100, 10)],
    }


def test_digests_do_not_depend_on_the_container(tmp_path: Path) -> None:
    wanted = data_digest([{"x": X}], model().inputs)
    assert len(wanted) == 16
    for name, source in containers(tmp_path).items():
        calibration = opened(source, held_out=0.0, batch_size=7)
        assert data_digest(calibration.fit.feeds(), model().inputs) == wanted, name
        fresh = calibration.fit.fresh(of_first(40), model().inputs)
        units = np.arange(10) >= 4 if name == "feeds" else np.arange(100) >= 40
        np.testing.assert_array_equal(fresh, units, name)
    assert data_digest([{"x": X[::-1]}], model().inputs) == wanted
    assert data_digest([{"x": X[:99]}], model().inputs) != wanted


def test_text_is_a_sample_as_well() -> None:
    inputs = model("string[batch] x").inputs
    words = np.array(["a", "bc", "d"], object)
    assert data_digest([{"x": words}], inputs) == data_digest([{"x": words[::-1]}], inputs)
    assert data_digest([{"x": words}], inputs) != data_digest([{"x": words[:2]}], inputs)


def test_order_and_selection_do_not_matter() -> None:
    chosen = np.random.default_rng(1).permutation(100)[:50]
    fresh = opened(X[chosen], held_out=0.0).fit.fresh(of_first(40), model().inputs)
    np.testing.assert_array_equal(fresh, chosen >= 40)
    foreign = np.random.default_rng(2).standard_normal((50, 6)).astype(np.float32)
    assert opened(foreign, held_out=0.0).fit.fresh(of_first(40), model().inputs).all()


def test_a_feed_is_fitted_where_one_of_its_samples_is() -> None:
    feeds = [{"x": X[:5]}, {"x": X[35:60]}, {"x": X[60:]}]
    fresh = opened(feeds, held_out=0.0).fit.fresh(of_first(40), model().inputs)
    np.testing.assert_array_equal(fresh, [False, False, True])


def test_it_goes_through_the_file() -> None:
    run = {"command": "compress", "seed": 3}
    found = Fitted.read(noted(of_first(40).of_run(run)))
    np.testing.assert_array_equal(found.digests, of_first(40).digests)
    assert (found.runs, found.lost) == ((run,), False)
    assert not Fitted.read(model())
    both = found.joined(Fitted.of([{"x": X[30:60]}], model().inputs))
    np.testing.assert_array_equal(both.digests, of_first(60).digests)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "[" * 100_000),
        '{"below":1,"digests":"%","runs":[]}',
        '{"below":1e999,"digests":"","runs":[]}',
        '{"below":1,"digests":"AAA=","runs":[{"data":[]}]}',
        '{"below":1,"digests":"","runs":[[1]]}',
    ],
)
def test_a_damaged_record_is_lost_and_not_empty(text: str) -> None:
    made = model()
    made.set_note(KEY, text)
    found = Fitted.read(made)
    assert found
    assert found.lost
    assert Fitted.read(noted(found)).lost


def test_of_many_samples_a_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then those of the others whose digest is small enough to tell are new, and none that were fitted."""
    monkeypatch.setattr(module, "MOST", 20)
    kept = of_first(60)
    assert len(kept.digests) == 20
    fresh = opened(X, held_out=0.0).fit.fresh(kept, model().inputs)
    assert not fresh[:60].any()
    assert 3 < fresh[60:].sum() < 30
    joined = kept.joined(Fitted.of([{"x": X[60:80]}], model().inputs))
    fresh = opened(X, held_out=0.0).fit.fresh(joined, model().inputs)
    assert not fresh[:80].any()


def test_held_out_samples_are_new_to_the_model() -> None:
    first = opened(X)
    chained = noted(Fitted.of(first.fit.feeds(), model().inputs))
    for options in ({}, {"seed": 5}, {"held_out": 0.5}):
        again = opened(X, model=chained, **options)
        np.testing.assert_array_equal(rows(again, "held_out"), rows(first, "held_out"))
        assert not again.refitted
    few = opened(X, model=chained, held_out=0.1, seed=9)
    assert few.held_out.samples == 10
    assert {row.tobytes() for row in rows(few, "held_out")} < {
        row.tobytes() for row in rows(first, "held_out")
    }


def test_a_model_of_other_samples_does_not_change_the_split() -> None:
    other = noted(Fitted.of([{"x": X + 1}], model().inputs))
    for part in ("fit", "held_out"):
        np.testing.assert_array_equal(rows(opened(X, model=other), part), rows(opened(X), part))


def test_where_all_were_fitted_the_calibration_says_so() -> None:
    again = opened(X, model=noted(of_first(100)))
    assert again.refitted
    np.testing.assert_array_equal(rows(again, "held_out"), rows(opened(X), "held_out"))


def test_whole_batches() -> None:
    fixed = model("float[8,6] x")
    first = opened(X[:96], model=fixed)
    Fitted.of(first.fit.feeds(), fixed.inputs).note(fixed)
    again = opened(X[:96], model=fixed, seed=4)
    np.testing.assert_array_equal(rows(again, "held_out"), rows(first, "held_out"))
    every = opened(X[:96], model=fixed, held_out=0.0).fit
    rest = every.only(every.fresh(Fitted.read(fixed), fixed.inputs))
    assert rest is not None
    assert rest.samples == first.held_out.samples
