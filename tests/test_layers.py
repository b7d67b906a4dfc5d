"""The layers: every import goes downward, no module imports itself through others, every package ships.

`onnxfuse/README.md` says what lives where. Imports inside functions and under TYPE_CHECKING count: a circle
that is hidden is one all the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("errors", "findings", "progress", "wording"),
    ("numerics",),
    ("ir",),
    ("runtime",),
    ("ops",),
    ("analysis",),
    ("data",),
    ("verification",),
    ("pipeline",),
    ("channels",),
    ("fitting",),
    ("growth",),
    ("pytorch",),
    ("passes",),
    ("results",),
    ("report",),
    ("commands",),
    ("cli",),
    ("__main__", "__init__"),
)
"""From the bottom up; the last are the program and the face."""

FLOORS = {name: floor for floor, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    """The dotted name under which a file is installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "passes":
        parts.insert(0, "onnxfuse")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in (*ROOT.glob("onnxfuse/**/*.py"), *ROOT.glob("passes/*.py"))}


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The modules of onnxfuse that a file imports, wherever it does."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "onnxfuse")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onnxfuse":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def layer(module: str) -> str:
    return (*module.split("."), "__init__")[1]


@cache
def nodes() -> dict[str, list[ast.AST]]:
    """The nodes of every module's syntax tree."""
    return {name: list(ast.walk(ast.parse(path.read_text()))) for name, path in MODULES.items()}


@cache
def graph() -> dict[str, list[str]]:
    """The modules that each module imports."""
    return {name: sorted(set(imports(found))) for name, found in nodes().items()}


def upward(graph: dict[str, list[str]]) -> list[str]:
    """Imports of what stands on a floor above."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if FLOORS[layer(other)] > FLOORS[layer(module)]
    ]


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Circles of modules, each as the way around."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append(way[way.index(module) :])
        elif module not in done:
            for other in graph.get(module, ()):
                visit(other, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in MODULES} == set(FLOORS)


def test_imports_go_downward() -> None:
    assert upward(graph()) == []


def test_no_circles() -> None:
    assert circles(graph()) == []


@pytest.mark.parametrize(
    "text",
    [
        "from onnxfuse.pipeline.base import Pass",
        "from onnxfuse.pipeline import base",
        "import onnxfuse.pipeline.base",
        "def f():\n    from onnxfuse.pipeline.base import Pass",
        "if TYPE_CHECKING:\n    from onnxfuse.pipeline.base import Pass",
    ],
)
def test_an_upward_import_is_seen_wherever_it_hides(text: str) -> None:
    assert upward({"onnxfuse.ir.model": list(imports(ast.walk(ast.parse(text))))}) != []


def test_a_circle_is_seen() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"]}) == [["a", "b", "c"]]


def test_no_module_is_relative() -> None:
    """Relative imports would hide from the tests above."""
    for name, found in nodes().items():
        assert not [node for node in found if isinstance(node, ast.ImportFrom) and node.level], name


def test_every_package_is_installed() -> None:
    """What setuptools is told is what there is: passes/ is onnxfuse.passes."""
    listed = re.search(r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    packages = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("onnxfuse/**/*.py")
    }
    assert set(re.findall(r'"([\w.]+)"', listed.group(1))) == packages | {"onnxfuse.passes"}


def test_modules_are_short() -> None:
    assert {
        name: lines for name, path in MODULES.items() if (lines := path.read_text().count("\n")) > 500
    } == {}


def test_functions_are_short() -> None:
    long = {}
    for name, found in nodes().items():
        for node in found:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                if lines > 60:
                    long[f"{name}.{node.name}"] = lines
    assert long == {}
