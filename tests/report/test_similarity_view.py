"""`inspect --similarity`: what is compared, the tables, the JSON, and the heat maps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from nets import net

from onnxfuse import inspect
from onnxfuse.analysis.layer_similarity import Likeness, nearest_layers, shown, similarities
from onnxfuse.analysis.weight_layers import find_weight_layers
from onnxfuse.cli.app import main
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.numerics.similarity import distance
from onnxfuse.report.similarity_view import similarity_view
from onnxfuse.report.tables import plain_text

TRANSFORMER = Path(__file__).parents[2] / "models" / "tiny_transformer.onnx"
Captured = pytest.CaptureFixture[str]


def deep(*widths: int) -> Model:
    """Dense layers of these widths, one behind the other."""
    body = "".join(f"h{i + 1} = MatMul(h{i}, w{i}) " for i in range(len(widths) - 1))
    weights = {f"w{i}": widths[i : i + 2] for i in range(len(widths) - 1)}
    return net(body, weights, x=f"float[N,{widths[0]}] h0", y=f"float[A,B] h{len(widths) - 1}")


def test_the_distances_are_those_of_the_criterion() -> None:
    model = deep(6, 6, 9, 6, 6, 4)
    layers, _ = find_weight_layers(model)
    found = similarities(model, "wasserstein", by_heads=False, seed=0)
    (of_six,) = found  # the layer with 9 inputs has none like it
    assert (of_six.role, of_six.criterion, of_six.title) == ("dense", "wasserstein", "dense, 4/6/9 x 6")
    assert of_six.names == ("h1", "h2", "h4", "h5")
    assert of_six.shapes == ((6, 6), (9, 6), (6, 6), (4, 6))
    own = [layers[place].matrix for place in (0, 1, 3, 4)]
    expected = [[distance(a, b, "wasserstein") for b in own] for a in own]
    np.testing.assert_allclose(np.array(of_six.distances, float), expected, atol=1e-12)
    (by_rows,) = similarities(model, "aligned", by_heads=False, seed=0)
    comparable = [[value is not None for value in row] for row in by_rows.distances]
    assert comparable == [[a.shape == b.shape for b in own] for a in own]


def test_kernels_and_groups_are_not_mixed() -> None:
    model = net(
        """a = Conv<pads = [1, 1, 1, 1]>(x, wa) b = Conv<pads = [1, 1, 1, 1]>(a, wb) c = Conv(b, wc)
        d = Conv<pads = [1, 1, 1, 1], group = 9>(c, wd)""",
        {"wa": (9, 1, 3, 3), "wb": (1, 9, 3, 3), "wc": (9, 1, 1, 1), "wd": (9, 1, 3, 3)},
        x="float[N,1,8,8] x",
        y="float[N,9,8,8] d",
    )
    assert similarities(model, "kl", by_heads=False, seed=0) == ()


def test_heads_are_compared_with_heads() -> None:
    model = Model.load(TRANSFORMER)
    layers = {layer.name: layer for layer in find_weight_layers(model)[0]}
    found = similarities(model, "euclidean", by_heads=True, seed=0)
    assert [(one.role, len(one.names)) for one in found] == [
        ("query heads", 16),
        ("key heads", 16),
        ("value heads", 16),
        ("output heads", 16),
        ("token", 4),
        ("token", 4),
    ]
    query, output = found[0], found[3]
    assert query.names[5] == "/layers.1.query/MatMul[1]"
    assert (query.shapes[0], output.shapes[0]) == ((16, 64), (64, 16))
    first, second = (layers[f"/layers.{block}.query/MatMul"].matrix for block in (0, 1))
    expected = distance(first[:16], second[16:32], "euclidean")
    assert query.distances[0][5] == pytest.approx(expected)
    first, second = (layers[f"/layers.{block}.project/MatMul"].matrix for block in (0, 1))
    expected = distance(first[:, :16], second[:, 16:32], "euclidean")
    assert output.distances[0][5] == pytest.approx(expected)


def test_packed_heads_are_compared_part_by_part() -> None:
    model = net(
        """a = MatMul(x, w) q, k, v = Split<axis = 2>(a, sizes) qh = Reshape(q, shape)
        kh = Reshape(k, shape) vh = Reshape(v, shape) qt = Transpose<perm = [0, 2, 1, 3]>(qh)
        kt = Transpose<perm = [0, 2, 3, 1]>(kh) vt = Transpose<perm = [0, 2, 1, 3]>(vh)
        s = MatMul(qt, kt) p = Softmax(s) y = MatMul(p, vt)""",
        {"w": (8, 24), "sizes": np.array([8, 8, 8]), "shape": np.array([0, 5, 2, 4])},
        x="float[N,5,8] x",
        y="float[N,2,5,4] y",
    )
    found = similarities(model, "euclidean", by_heads=True, seed=0)
    assert [one.role for one in found] == [f"query+key+value heads, part {n} of 3" for n in (1, 2, 3)]
    matrix = find_weight_layers(model)[0][0].matrix
    expected = distance(matrix[8:12], matrix[12:16], "euclidean")
    assert found[1].distances[0][1] == pytest.approx(expected)


def test_weights_that_are_no_numbers_are_not_compared() -> None:
    model = deep(6, 6, 6, 6)
    bad = np.full((6, 6), np.nan, np.float32)
    model.set_weight(model.tensor("w1"), bad)
    (found,) = similarities(model, "wasserstein", by_heads=False, seed=0)
    assert [value is None for value in found.distances[0]] == [False, True, False]
    assert found.distances[1] == (None, None, None)


def test_namesakes_stay_apart() -> None:
    model = deep(6, 6, 6, 6)
    for node in model.nodes:
        node.name = "same"
    (found,) = similarities(model, "wasserstein", by_heads=False, seed=0)
    assert found.names == ("same", "same#2", "same#3")


# ---- console ---------------------------------------------------------------------------------------------


def made_up(size: int, name: str = "layer") -> Likeness:
    values = np.abs(np.subtract.outer(np.arange(size), np.arange(size))) / 10.0
    return Likeness(
        "dense",
        "kl",
        tuple(f"{name}{i}" for i in range(size)),
        ((4, 4),) * size,
        tuple(tuple(float(value) for value in row) for row in values),
    )


def test_few_layers_are_a_matrix() -> None:
    lines = plain_text(similarity_view([made_up(3)])).splitlines()
    assert lines == [
        "",
        "dense, 4 x 4: kl distance of 3 layers",
        "                1     2",
        "  1  layer0",
        "  2  layer1  0.10",
        "  3  layer2  0.20  0.10",
    ]


def test_many_layers_have_their_nearest() -> None:
    text = plain_text(similarity_view([made_up(9)]))
    assert "dense, 4 x 4: kl distance of 9 layers" in text
    assert "  5  layer4  4: 0.10  6: 0.10  3: 0.20" in text
    assert text.endswith("Of many the nearest others are shown; --json has all.\n")


@pytest.mark.parametrize("size", [8, 9, 120])
def test_tables_fit(size: int) -> None:
    found = made_up(size, name="/a/very/long/name/of/some/layer/somewhere/in/a/network/MatMul")
    values = [[None if i == 3 else 123456.0 * i for i in range(size)] for _ in range(size)]
    wide = Likeness(found.role, "kl", found.names, found.shapes, tuple(map(tuple, values)))
    for one in (found, wide):
        assert max(map(len, plain_text(similarity_view([one])).splitlines())) <= 80


def test_nothing_to_compare() -> None:
    assert plain_text(similarity_view([])) == "\nno two layers can be compared\n"


def test_numbers_are_short() -> None:
    numbers = (None, 0.0, 0.126, 99.994, 100.4, 99999.2, 123456.0, 3e120)
    texts = [shown(value) for value in numbers]
    assert texts == ["-", "0.00", "0.13", "99.99", "100", "99999", "1e+05", "3e+120"]


def test_nearest() -> None:
    values = ((0.0, 3.0, None), (3.0, 0.0, 1.0), (None, 1.0, 0.0))
    found = Likeness("dense", "aligned", ("a", "b", "c"), ((2, 2),) * 3, values)
    assert nearest_layers(found, 1) == [(1.0, 2), (3.0, 0)]
    assert nearest_layers(found, 0) == [(3.0, 1)]


# ---- command line ----------------------------------------------------------------------------------------


INSPECT = ["inspect", str(TRANSFORMER), "--no-latency"]


def test_inspect_tells_what_is_asked(capsys: Captured) -> None:
    assert main([*INSPECT, "--similarity"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "query, 64 x 64: wasserstein distance of 4 layers" in out
    assert "  4  /layers.3.key/MatMul  0.56  0.56  0.53" in out
    assert main([*INSPECT, "--similarity", "--criterion", "covariance", "--heads", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["similarity"]
    assert [len(one["names"]) for one in found] == [16, 16, 16, 16, 4, 4]
    assert {one["criterion"] for one in found} == {"covariance"}
    assert np.array(found[0]["distances"]).shape == (16, 16)
    assert main([*INSPECT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["similarity"] is None


@pytest.mark.parametrize("option", [["--heads"], ["--plot", "x.png"], ["--criterion", "kl"]])
def test_options_that_need_similarity(option: list[str], capsys: Captured) -> None:
    assert main([*INSPECT, *option]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"onnxfuse: error: {option[0]} needs --similarity\n")
    assert not Path("x.png").exists()


def test_unknown_criterion(capsys: Captured) -> None:
    assert main([*INSPECT, "--similarity", "--criterion", "cosine"]) == 2
    assert (
        "there is no criterion 'cosine'; did you mean 'covariance'? known: euclidean, covariance,"
        in capsys.readouterr().err
    )


# ---- plot ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plot(folder: Path, capsys: Captured) -> None:
    import matplotlib.image

    assert main([*INSPECT, "--similarity", "--plot", "layers.png"]) == 0
    assert [path.name for path in folder.iterdir()] == ["layers.png"]
    picture = matplotlib.image.imread("layers.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 800
    assert len(np.unique(picture[:, :, 0])) > 50  # not an empty page


def test_names_are_no_mathematics(folder: Path) -> None:
    model = deep(6, 6, 6, 6)
    for node, name in zip(model.nodes, ("$\\frac$", "a_b$c", "\x1b[31m"), strict=True):
        node.name = name
    found = inspect(model, measure_latency=False, similarity="aligned", plot="names.png")
    assert found.warnings == ()
    assert (folder / "names.png").exists()


def test_plot_of_one_pair_and_of_none(folder: Path) -> None:
    inspect(deep(6, 6, 6), measure_latency=False, similarity="kl", plot="pair.png")
    assert (folder / "pair.png").exists()
    inspect(deep(6, 6, 3, 6), measure_latency=False, similarity="aligned", plot="unlike.png")
    assert (folder / "unlike.png").exists()
    found = inspect(deep(6, 4, 3), measure_latency=False, similarity="kl", plot="none.png")
    assert found.warnings == ("no two layers can be compared: nothing was plotted",)
    assert not (folder / "none.png").exists()


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("layers.pdf", "--plot 'layers.pdf' must end in .png"),
        ("missing/layers.png", "cannot write 'missing/layers.png': its folder does not exist"),
        ("folder.png", "cannot write 'folder.png': it is a folder"),
        ("model.png", "the output 'model.png' is the input file; choose another name"),
    ],
)
def test_where_no_plot_can_be(folder: Path, plot: str, message: str) -> None:
    (folder / "folder.png").mkdir()
    content = TRANSFORMER.read_bytes()
    (folder / "model.png").write_bytes(content)
    with pytest.raises(InputError) as caught:
        inspect("model.png", measure_latency=False, similarity="kl", plot=plot)
    assert str(caught.value) == message
    assert (folder / "model.png").read_bytes() == content


def test_a_plot_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "old.png").write_bytes(b"older")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"cannot write 'old.png': No space left on device"):
        inspect(deep(6, 6, 6), measure_latency=False, similarity="kl", plot="old.png")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("old.png", b"older")]


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*INSPECT, "--similarity", "--plot", "layers.png"]) == 2
    assert capsys.readouterr() == (
        "",
        "onnxfuse: error: --plot needs Matplotlib: pip install 'onnxfuse[plot]'\n",
    )
    assert main([*INSPECT, "--similarity"]) == 0
