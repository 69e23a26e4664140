"""The house: a room imports only from rooms above it, pure rooms import types only, and rooms say what they hand on."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "segflow"
PROJECT = (PACKAGE.parent / "pyproject.toml").read_text()
# A room imports only from rooms on lines above its own.
LADDER = [
    {"errors", "arguments", "version"},
    {"runtime", "tasks"},
    {"store", "data"},
    {"training", "model", "properties"},
    {"methods"},
    {"stage"},
    {"curvature"},
    {"groups"},
    {"results"},
    {"report", "scoring"},
    {"checks", "evaluation"},
    {"analyzer"},
    {"__init__"},  # the package's own face
    {"integrations", "examples"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LADDER) for room in rooms}
# Tensors in, tensors out. Of other rooms they use types, errors, and what is as pure as they are: how a run is cut into
# segments, and formulas of optimizers.
PURE = (
    "methods/",
    "curvature/kronecker.py",
    "curvature/preconditioner.py",
    "training/optimizers.py",
    "training/motion.py",
    "training/histories.py",
    "training/observed.py",
)
PURE_MAY_USE = {
    "errors",
    "arguments",
    "training/segments",
    "training/optimizers",
    "training/per_step",
    "model/one_hot",
    "model/tokens",
}
LINES = 400  # more than this warns: ideas decide where a file ends, not a ruler


class Import(NamedTuple):
    """One module that a file imports: where it stands, as parts below the package; typing: for annotations only."""

    file: Path
    target: tuple[str, ...]
    typing: bool


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[Import]:
    """Every import of the package in a file: anywhere in it, relative or absolute, by statement or by function."""
    inside = path.relative_to(package).parts
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        for words in _targets(node, inside):
            yield Import(path, _existing(words, package), id(node) in typing)


def _targets(node: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(node, ast.ImportFrom):
        module = tuple((node.module or "").split(".")) if node.module else ()
        if node.level:
            base = (*inside[: len(inside) - node.level], *module)
        elif module[:1] == ("segflow",):
            base = module[1:]
        else:
            return
        yield from ((*base, alias.name) for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "segflow")
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in ("import_module", "__import__", "run_module"):
            given = node.args[0]
            assert isinstance(given, ast.Constant), f"{inside}: imports what is not written down"
            words = str(given.value).lstrip(".").split(".")
            if words[0] == "segflow" or str(given.value).startswith("."):
                yield tuple(words[1:] if words[0] == "segflow" else words)


def _existing(words: tuple[str, ...], package: Path) -> tuple[str, ...]:
    """The module among the words: what comes after it is a name in it. () is the package's own face."""
    for end in range(len(words), 0, -1):
        place = package.joinpath(*words[:end])
        if place.with_suffix(".py").exists() or (place / "__init__.py").exists():
            return words[:end]
    return words[:1] if words[:1] == ("examples",) else ()


def room(words: tuple[str, ...]) -> str:
    return words[0].removesuffix(".py") if words else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for path in FILES for found in imports_of(path)]


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_rooms_import_only_from_rooms_above_them() -> None:
    wrong = [
        f"{_name(found.file)} imports {'.'.join(found.target)}"
        for found in IMPORTS
        if (own := room(found.file.relative_to(PACKAGE).parts)) != room(found.target)
        and LEVEL[room(found.target)] >= LEVEL[own]
    ]
    assert not wrong


def test_files_of_one_room_import_in_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for found in IMPORTS:
        own = found.file.relative_to(PACKAGE).with_suffix("").parts
        if room(own) == room(found.target) and own[-1] != "__init__":
            edges.setdefault("/".join(own), set()).add("/".join(found.target))
    try:
        tuple(TopologicalSorter(edges).static_order())
    except CycleError as problem:
        pytest.fail(f"a circle: {' <- '.join(problem.args[1])}")


def test_every_room_has_a_place_on_the_ladder_and_is_installed() -> None:
    assert {room(path.relative_to(PACKAGE).parts) for path in FILES} <= set(LEVEL)
    folders = {path.parent.relative_to(PACKAGE.parent) for path in FILES}
    listed = set(re.findall(r'"(segflow[.\w]*)"', re.findall(r"packages = \[(.*?)\]", PROJECT, re.DOTALL)[0]))
    assert listed == {".".join(folder.parts) for folder in folders} | {"segflow.examples"}


def test_pure_rooms_import_types_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for found in IMPORTS
        if (name := _name(found.file)).startswith(PURE) and not found.typing
        if (target := "/".join(found.target)) not in PURE_MAY_USE and room(found.target) != name.split("/")[0]
    ]
    assert not wrong


def test_only_the_runtime_talks_to_accelerate_and_torch_distributed() -> None:
    talking = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            full = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            if any(name.startswith(("accelerate", "torch.distributed")) for name in full):
                talking.add(_name(path))
    assert talking and all(name.startswith("runtime/") for name in talking)


def test_the_engine_names_no_single_method_but_the_default() -> None:
    """What a method is follows from its plan and its own word; its class may stand in advice to users only."""
    from segflow import methods

    single = {
        name for name in methods.__all__ if callable(getattr(getattr(methods, name), "plan", None)) and name != "Method"
    } - {"AutomaticMethod"}
    named = {
        (_name(path), node.id if isinstance(node, ast.Name) else node.attr)
        for path in FILES
        if not _name(path).startswith(("methods/", "demo", "__init__"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.Attribute)
        and (node.id if isinstance(node, ast.Name) else node.attr) in single
    }
    assert "Source" in single and named == {("analyzer.py", "Source")}


def test_every_room_says_what_it_hands_on_or_that_it_is_an_engine_room() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            module = import_module(".".join(("segflow", *path.relative_to(PACKAGE).parts[:-1])))
            text = module.__doc__ or ""
            assert bool(getattr(module, "__all__", ())) != ("Engine room" in text), _name(path)
            assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


def test_functions_stay_short() -> None:
    lengths = []
    for path in FILES:
        text = path.read_text()
        if (lines := len(text.splitlines())) > LINES:
            warnings.warn(f"{_name(path)} has {lines} lines", stacklevel=1)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lengths.append((body[-1].end_lineno - body[0].lineno + 1 if body else 0, _name(path), node.name))
    longest = max(lengths)
    assert longest[0] <= 45, longest
    assert sorted(length for length, _, _ in lengths)[int(0.9 * len(lengths))] < 18


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    for name in ("low/__init__.py", "high.py", "low/own.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "low" / "file.py").write_text(
        "from ..high import x\n"
        "def later():\n    from .own import y\n    import segflow.high\n    import_module('segflow.high.z')\n"
        "if TYPE_CHECKING:\n    from segflow.high import T\n"
    )
    found = [(one.target, one.typing) for one in imports_of(tmp_path / "low" / "file.py", tmp_path)]
    assert sorted(found) == [
        (("high",), False),
        (("high",), False),
        (("high",), False),
        (("high",), True),
        (("low", "own"), False),
    ]
