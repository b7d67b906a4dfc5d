"""Marks go through files, and whoever solves for weights heeds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nets import context, net, normal, perturbed, weight

from onnxfuse.fitting.sites import refit_sites
from onnxfuse.ir.marks import KEPT_KEY, VALUES, ZEROS, keep, promises
from onnxfuse.ir.model import Model
from onnxfuse.passes.select import Select
from onnxfuse.pipeline.manager import PassManager

BODY = "h = Gemm(x, w1) r = Relu(h) k = Gemm(r, w2, b2) q = Relu(k) y = Gemm(q, w3)"
WEIGHTS = {"w1": (6, 16), "w2": (16, 12), "b2": (12,), "w3": (12, 4)}


def marked(*what: str) -> Model:
    model = net(BODY, WEIGHTS)
    for item in what:
        keep(model.nodes[2], item)
    return model


def test_marks_add_up_and_survive_a_file(tmp_path: Path) -> None:
    model = marked(VALUES, ZEROS, VALUES)
    assert model.nodes[2].metadata[KEPT_KEY] == "zeros values"
    model.save(tmp_path / "m.onnx")
    again = Model.load(tmp_path / "m.onnx")
    assert [promises(node) for node in again.nodes] == [
        frozenset(what) for what in ((), (), {ZEROS, VALUES}, (), ())
    ]


def test_marked_operators_are_not_refitted() -> None:
    model = marked(ZEROS)
    sites, _ = refit_sites(model, perturbed(model, "w1"))
    assert [(site.op.y, site.how) for site in sites] == [("h", "refit"), ("k", "bias"), ("y", "refit")]


def test_select_cuts_marked_operators_and_leaves_what_stays() -> None:
    model = marked(ZEROS)
    value = weight(model, "w2").copy()
    value[:, ::2] = 0
    model.set_weight(model.tensor("w2"), value)
    ctx = context(model, {"x": normal(200, 6)})
    outcome = PassManager([Select(ratio=0.25)]).run(model, ctx)
    (step,) = outcome.steps
    assert step.committed, step.reason
    removed = {str(c.detail["group"]): c.detail["removed"] for c in step.changes if "group" in c.detail}
    assert len(removed) == 2
    rows, columns = (np.delete(np.arange(n), removed[group]) for n, group in ((16, "h"), (12, "k")))  # type: ignore[arg-type]
    np.testing.assert_array_equal(weight(outcome.model, "w2"), value[np.ix_(rows, columns)])
