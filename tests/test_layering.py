"""A module imports only modules above it in this list (DESIGN: the house from top to bottom)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "segflow"
HOUSE = [
    "errors",
    "interrupts",
    "peers",
    "ranks",
    "progress",
    "files",
    "lock",
    "store",
    "upkeep",
    "journal",
    "units",
    "data",
    "draws",
    "task",
    "tasks",
    "property",
    "properties",
    "optimizers",
    "trajectory",
    "record",
    "layers",
    "capture",
    "lens",
    "kronecker",
    "outer",
    "spectra",
    "plans",
    "projection",
    "segments",
    "methods",
    "baselines",
    "whitening",
    "clustering",
    "groups",
    "tiling",
    "workspace",
    "setup",
    "stages",
    "passes",
    "curvature",
    "factors",
    "representation",
    "features",
    "queries",
    "propertyside",
    "iteration",
    "fitted",
    "trainside",
    "scoring",
    "scores",
    "trees",
    "refinement",
    "checks",
    "labelling",
    "analyzer",
    "evaluation",
    "report",
]
TOP = ["__init__", "cli", "__main__"]  # the package's own face stands above all


def _place(module: str) -> int:
    return [*HOUSE, *TOP].index(module)


def _imports(path: Path) -> set[str]:
    """Modules of segflow that a file imports, as the first word below the package."""
    inside = path.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*inside[: len(inside) - node.level], *(node.module or "").split(".")]
            words = [word for word in base if word]
            found |= {words[0]} if words else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segflow"):
            found.add((node.module or "").split(".")[1] if "." in (node.module or "") else "__init__")
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("segflow.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_upward(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    below = {name for name in _imports(path) - {own} if _place(name) >= _place(own)}
    assert not below, f"{own} imports {below}, which stand below it"


def test_every_module_has_a_place() -> None:
    own = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert own == {*HOUSE, *TOP}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_ranks_talks_to_accelerate_and_torch_distributed(path: Path) -> None:
    text = path.read_text()
    talks = "import accelerate" in text or "from accelerate" in text or "torch.distributed" in text
    assert talks == (path.name == "ranks.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 45, f"{path.name}: {node.name} has {lines} lines"
