"""The guide tells the truth: its examples run, its tables are those of the code, its references lead on.

A fenced Python block that begins with the path of a file, as `# onnxfuse/ops/table.py`, is a quotation if
there is such a file: its lines must stand there. If there is none, it is written to that place in an empty
folder. All other blocks are run there, those of one section (`##`) in a row.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer.main
from test_layers import LAYERS

import onnxfuse.cli
import onnxfuse.commands
from onnxfuse.cli.app import app
from onnxfuse.pipeline.recipe import parse_recipe
from onnxfuse.report.pass_table import built_in, refreshed

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", "onnxfuse/README.md", "passes/README.md"),
    *("models/README.md", "tests/README.md", "tests/benchmarks/README.md"),
]
METADATA = re.compile(r"onnxfuse\.[a-z_]+")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- examples -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced Python block of a page: its code, and the line that it begins in."""

    page: str
    line: int
    code: str

    @property
    def path(self) -> str | None:
        """The file that it is a piece of, or is to become."""
        first = self.code.partition("\n")[0]
        return first[2:] if re.fullmatch(r"# [\w/]+\.py", first) else None


def sections(name: str) -> Iterator[tuple[str, list[Block]]]:
    """Sections of a page that have Python blocks."""
    title, found, line = "", [], 1
    for part in re.split(r"(^## [^\n]*\n|^```python\n.*?^```\n)", page(name), flags=re.M | re.S):
        if part.startswith("## "):
            yield title, found
            title, found = part[3:].strip(), []
        elif part.startswith("```python"):
            found.append(Block(name, line + 1, part.partition("\n")[2].rpartition("```")[0]))
        line += part.count("\n")
    yield title, found


EXAMPLES = [
    pytest.param(blocks, id=f"{name}: {title}")
    for name in PAGES
    for title, blocks in sections(name)
    if blocks
]

NEW = {
    block.path
    for name in PAGES
    for _, blocks in sections(name)
    for block in blocks
    if block.path and not (ROOT / block.path).exists()
}
"""Files that the examples would add."""


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder but for the shipped models, where commands can be added to onnxfuse for a while."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    for package in (onnxfuse.commands, onnxfuse.cli):
        folder = tmp_path.joinpath(*package.__name__.split("."))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    modules, commands = set(sys.modules), list(app.registered_commands)
    yield tmp_path
    app.registered_commands[:] = commands
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("blocks", EXAMPLES)
def test_examples_run(blocks: list[Block], workshop: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.path is None:
            code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
            exec(compile(code, str(ROOT / block.page), "exec"), names)
        elif not (ROOT / block.path).exists():
            target = workshop / block.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.code, encoding="utf-8")
            importlib.invalidate_caches()
    for block in blocks:
        if block.path and block.path.startswith("onnxfuse/") and not (ROOT / block.path).exists():
            module = block.path.removesuffix(".py").replace("/", ".")
            assert module in sys.modules, f"line {block.line}: {block.path} is neither there nor used"


def test_quotations_are_what_stands_there() -> None:
    quoted = 0
    for name in PAGES:
        for block in (block for _, blocks in sections(name) for block in blocks):
            if block.path is not None and (ROOT / block.path).exists():
                quoted += 1
                text = "\n".join(line.strip() for line in block.code.splitlines()[1:])
                source = "\n".join(line.strip() for line in page(block.path).splitlines())
                assert text.strip() in source, f"{name}, line {block.line}: not in {block.path}"
    assert quoted


# --- commands -----------------------------------------------------------------------------------------------


def commands(name: str) -> Iterator[list[str]]:
    """The command lines of a page that start onnxfuse, without its name."""
    for line in page(name).splitlines():
        found = re.match(r"(?: {4}|.*-m )onnxfuse ([a-z].*)", line)
        if found is not None:
            yield shlex.split(found[1].partition("`")[0], comments=True)


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_these_options(name: str) -> None:
    known: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command, *arguments in commands(name):
        options = {option for parameter in known[command].params for option in parameter.opts}
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
            if argument.startswith("-"):
                assert argument in options, f"{command} {argument}"
            if argument == "--passes":
                assert parse_recipe(following)


# --- tables -------------------------------------------------------------------------------------------------


def test_passes_readme_is_current() -> None:
    text = page("passes/README.md")
    stale = "passes/README.md is stale: python -m onnxfuse.report.pass_table passes/README.md"
    assert refreshed(text, built_in()) == text, stale


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.onnx")), ids=lambda path: path.stem)
def test_models_readme_says_what_the_files_say(path: Path) -> None:
    proto = onnx.load(path)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    (row,) = re.findall(rf"^\| `{path.stem}` \|.*$", page("models/README.md"), flags=re.M)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:6] == [
        f"{int(facts['parameters']):,}",
        f"{len(proto.graph.node)}",
        f"{int(facts['test_rows']):,}",
        f"{100 * float(facts['test_accuracy']):.2f} %",
    ]
    (data,) = re.findall(rf"^\| {cells[6]} \|.*$", page("models/README.md"), flags=re.M)
    assert facts["data"] in data
    assert facts["data_licence"] in data
    if "test_nll" in facts:
        assert f"{facts['test_nll']} nats" in page("models/README.md")


def test_the_picture_of_the_layers_is_what_is_held() -> None:
    (picture,) = re.findall(r"^```text\n(.*?)^```", page("onnxfuse/README.md"), flags=re.M | re.S)
    lines = [line.strip() for line in picture.splitlines() if re.match(r"  \w", line)]
    shown = [tuple(re.split(r"\s{2,}", line)[0].split(", ")) for line in reversed(lines)]
    assert shown == list(LAYERS[:-1])  # the last are the program and the face


# --- references ---------------------------------------------------------------------------------------------


def heading_anchors(text: str) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (ROOT / name).parent / file if file else ROOT / name
        assert place.exists(), target
        if anchor:
            assert anchor in heading_anchors(place.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    """Paths from the top of the project, and names in backticks of files beside the page."""
    text = page(name)
    for path in re.findall(r"(?<![\w/.])((?:models|onnxfuse|passes|tests)/[\w/]+\.\w+)", text):
        assert (ROOT / path).exists() or path in NEW, path
    for file in re.findall(r"`([a-z_]\w*\.py)`", text):
        assert ((ROOT / name).parent / file).exists(), file


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings of a module, those of attributes included, each with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value


@cache
def resolves(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[length:]:
                value = getattr(value, part)
        except AttributeError:
            return False
        return True
    return False


@cache
def metadata_keys() -> frozenset[str]:
    """Keys of metadata in users' files, which look like names in the package."""
    found: set[str] = set()
    for path in (ROOT / "onnxfuse").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                value = node.value.value
                if isinstance(value, str) and METADATA.fullmatch(value):
                    found.add(value)
    return frozenset(found)


SOURCES = sorted([*(ROOT / "onnxfuse").rglob("*.py"), *(ROOT / "passes").glob("*.py")])
MODULES = {path.parent.name if path.stem == "__init__" else path.stem for path in SOURCES}
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\([^`]*\))?`")
FILES = (".py", ".json", ".txt", ".md", ".npz", ".npy", ".onnx", ".yaml")


@cache
def variables(path: Path) -> frozenset[str]:
    """Names in a module that stand for values: `site.sizes` is then no module's."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return frozenset(found | stored)


def meanings(name: str, package: str, values: frozenset[str]) -> list[str]:
    """The full names that a dotted name may stand for; none where it is no reference."""
    first = name.partition(".")[0]
    if first == "onnxfuse":
        return [name]
    if first in values or first not in MODULES:
        return []
    return [f"onnxfuse.{name}", f"{package}.{name}"]


def test_references_lead_somewhere() -> None:
    """Dotted names in backticks whose first part is the package or the name of a module."""
    texts = [(ROOT / name, 1, page(name)) for name in PAGES if name != "CHANGELOG.md"]
    texts += [(path, line, text) for path in SOURCES for line, text in docstrings(path)]
    dead = []
    for path, line, text in texts:
        place = path.relative_to(ROOT)
        package = ".".join(place.parts[:-1]) if place.parts[0] == "onnxfuse" else "onnxfuse.passes"
        values = variables(path) if path.suffix == ".py" else frozenset()
        for name in NAME.findall(text):
            found = meanings(name, package, values)
            known = name.endswith(FILES) or name in metadata_keys() or any(map(resolves, found))
            if found and not known:
                dead.append(f"{place}:{line} `{name}`")
    assert not dead, "\n".join(dead)
