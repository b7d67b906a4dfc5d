"""Recipes, short and long, and every way of getting one wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pydantic
import pytest

from onnxfuse.errors import InputError
from onnxfuse.ir.model import Model
from onnxfuse.pipeline.base import Context, Contract, Pass, PassOptions, PassResult
from onnxfuse.pipeline.discovery import _entries
from onnxfuse.pipeline.recipe import load_recipe, options_of, parse_recipe, read_recipe


class Idle(Pass):
    contract = Contract.EXACT
    summary = "does nothing"

    def run(self, model: Model, context: Context) -> PassResult:
        return PassResult(model)


class Fold(Idle):
    name = "fold"


class Fuse(Idle):
    name = "fuse"

    class Options(PassOptions):
        kernel: int | None = pydantic.Field(None, ge=1, le=15, description="side of the fitted kernel")
        max_blocks: int = 8
        mode: Literal["joint", "paper"] = "joint"
        kernels: tuple[int, ...] = ()
        ridge: float = 1e-3
        residual: bool = True
        only: str | None = None


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Entry:
        def __init__(self, kind: type[Idle]) -> None:
            self.name, self.value, self.load = kind.name, f"tests:{kind.name}", lambda: kind

    monkeypatch.setattr("onnxfuse.pipeline.discovery.entry_points", lambda group: [Entry(Fuse), Entry(Fold)])
    _entries.cache_clear()
    yield
    _entries.cache_clear()


def shown(passes: tuple[Pass, ...] | list[Pass]) -> list[tuple[str, dict[str, object]]]:
    return [(item.name, item.options.model_dump(exclude_unset=True)) for item in passes]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fold", [("fold", {})]),
        ("fold,fuse", [("fold", {}), ("fuse", {})]),
        (" fold , fuse ", [("fold", {}), ("fuse", {})]),
        ("fuse,fuse", [("fuse", {}), ("fuse", {})]),
        (
            "fold,fuse:kernel=3,max_blocks=4,fold",
            [("fold", {}), ("fuse", {"kernel": 3, "max_blocks": 4}), ("fold", {})],
        ),
        ("fuse:mode=paper, ridge = 1e-2", [("fuse", {"mode": "paper", "ridge": 0.01})]),
        ("fuse:kernels=[1,3],residual=no", [("fuse", {"kernels": (1, 3), "residual": False})]),
        ("fuse:kernel=null", [("fuse", {"kernel": None})]),
        ("fuse:mode='paper'", [("fuse", {"mode": "paper"})]),
        ("fuse:only=*x,kernel=3", [("fuse", {"only": "*x", "kernel": 3})]),
        ("fuse:only=*", [("fuse", {"only": "*"})]),
        ("fuse:only=*/conv[0-9]?", [("fuse", {"only": "*/conv[0-9]?"})]),
    ],
)
def test_short_form(text: str, expected: list[tuple[str, dict[str, object]]]) -> None:
    assert shown(parse_recipe(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' has an empty place where a pass should be; write fold,fuse:kernel=3"),
        ("fold,,fuse", "'fold,,fuse' has an empty place where a pass should be; write fold,fuse:kernel=3"),
        ("fold,", "'fold,' has an empty place where a pass should be; write fold,fuse:kernel=3"),
        ("fse", "there is no pass 'fse'; did you mean 'fuse'? known: fold, fuse"),
        ("zzz", "there is no pass 'zzz'; known: fold, fuse"),
        ("kernel=3,fuse", "'kernel=3' is an option and no pass stands before it; write pass:option=value"),
        ("fuse:kernel", "pass 'fuse': 'kernel' is not an option; write fuse:option=value"),
        ("fuse:", "pass 'fuse': '' is not an option; write fuse:option=value"),
        ("fuse:kernel=", "pass 'fuse': 'kernel=' is not an option; write fuse:option=value"),
        ("fuse:kernel=3,kernel=5", "pass 'fuse': option 'kernel' is given twice"),
        (
            "fuse:kernal=3",
            "pass 'fuse': there is no option 'kernal'; did you mean 'kernel'? "
            "known: kernel, max_blocks, mode, kernels, ridge, residual, only",
        ),
        ("fold:kernel=3", "pass 'fold': there is no option 'kernel'; known: none"),
        ("fuse:kernel=0", "pass 'fuse': option 'kernel' should be greater than or equal to 1, not 0"),
        ("fuse:mode=best", "pass 'fuse': option 'mode' should be 'joint' or 'paper', not 'best'"),
        ("fuse:kernel=[1", "pass 'fuse': the value of option 'kernel' cannot be read: [1"),
    ],
)
def test_short_form_refusals_are_one_line_that_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(text)
    assert str(caught.value) == message


def test_a_value_of_the_wrong_type_is_named() -> None:
    with pytest.raises(
        InputError, match=r"^pass 'fuse': option 'kernel' should be a valid integer.*, not 'big'$"
    ):
        parse_recipe("fuse:kernel=big")


LONG = """
passes:
  - fold
  - fuse: {kernel: 3, max_blocks: 4}
  - fuse:
      mode: paper
  - fold: {}
  - fold:
  - fuse:ridge=0.5
max_error: 0.05
seed: 3
"""


def test_long_form(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(LONG)
    recipe = load_recipe(path)
    assert shown(recipe.passes) == [
        ("fold", {}),
        ("fuse", {"kernel": 3, "max_blocks": 4}),
        ("fuse", {"mode": "paper"}),
        ("fold", {}),
        ("fold", {}),
        ("fuse", {"ridge": 0.5}),
    ]
    assert (recipe.settings.max_error, recipe.settings.seed, recipe.settings.metric) == (0.05, 3, None)


@pytest.mark.parametrize(
    "text", ["[fold, fuse]", "fold,fuse", "passes: fold,fuse", "passes: [{fold: {}}, {fuse: {}}]"]
)
def test_long_form_may_be_short(text: str) -> None:
    assert shown(read_recipe(text).passes) == [("fold", {}), ("fuse", {})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no 'passes'; write passes: [fold, {fuse: {kernel: 3}}]"),
        ("seed: 3", "it has no 'passes'; write passes: [fold, {fuse: {kernel: 3}}]"),
        ("passes: []", "'passes' must be a list of names or of name: {option: value}"),
        ("passes: {fuse: {}}", "'passes' must be a list of names or of name: {option: value}"),
        ("passes: [3]", "3 is not a pass; write a name or name: {option: value}"),
        (
            "passes: [{fold: {}, fuse: {}}]",
            "{'fold': {}, 'fuse': {}} is not a pass; write a name or name: {option: value}",
        ),
        ("passes: [{fuse: 3}]", "{'fuse': 3} is not a pass; write a name or name: {option: value}"),
        (
            "passes: [{fuse: {kernel: 99}}]",
            "pass 'fuse': option 'kernel' should be less than or equal to 15, not 99",
        ),
        (
            "passes: [fold]\nmax_eror: 1",
            "the recipe: there is no option 'max_eror'; did you mean 'max_error'? "
            "known: passes, max_error, max_drop, metric, confidence, seed, retrain",
        ),
        ("passes: [fold]\nmax_error: -1", "the recipe: option 'max_error' should be greater than 0, not -1"),
        ("passes: [fold]\nseed: 1\nseed: 2", "not valid YAML in line 3: 'seed' is given twice"),
        ("passes: [{fuse: {kernel: 3, kernel: 5}}]", "not valid YAML in line 1: 'kernel' is given twice"),
        ("passes: [fold", "not valid YAML in line 1: expected ',' or ']', but got '<stream end>'"),
        ("passes: !!python/name:os.system", None),
    ],
)
def test_long_form_refusals(text: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"recipe '{path}': ")
    if message is not None:
        assert line.removeprefix(f"recipe '{path}': ") == message


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the recipe .*No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_recipe(tmp_path / "binary")


def test_options_for_people() -> None:
    first, second, third, *_ = options_of(Fuse)
    assert (first.name, first.type, first.default) == ("kernel", "int | None", "None")
    assert first.help == "side of the fitted kernel"
    assert (second.type, second.default) == ("int", "8")
    assert third.type == "Literal['joint', 'paper']"


def test_retraining_is_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("passes: [fold]\nretrain: {data: train.npz, epochs: 3, lr: 0.01}")
    found = load_recipe(path).settings.retrain
    assert found is not None
    assert (found.data, found.epochs, found.lr) == ("train.npz", 3, 0.01)
    for wrong in ("{epochs: 3}", "{data: a.npz, epochs: 0}", "{data: a.npz, speed: 1}"):
        path.write_text(f"passes: [fold]\nretrain: {wrong}")
        with pytest.raises(InputError):
            load_recipe(path)
