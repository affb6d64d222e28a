"""The import walk: cli -> app -> {api, cloud, runtime, sim, solvers, store} -> core, no torch in the control plane."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "spotserve"

LEAVES = ("api", "cloud", "runtime", "sim", "solvers", "store")
EVERYONE = ("errors", "log")
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "log": frozenset(),
    "core": frozenset({"core", "errors"}),
    **{leaf: frozenset({leaf, "core", *EVERYONE}) for leaf in LEAVES},
    "app": frozenset({"app", *LEAVES, "core", *EVERYONE}),
    "cli": frozenset({"cli", "app", *LEAVES, "core", *EVERYONE}),
}

MODULE_OF = {"grpcio": "grpc", "grpcio_tools": "grpc_tools", "protobuf": "google"}
"""Where a distribution is not called like the module it brings."""

CONTROL_PLANE = ("app", "api", "cli", "store", "cloud", "sim", "solvers", "core")
ENGINE_LIBRARIES = frozenset({"torch", "transformers", "accelerate", "safetensors"})
ONLY_IN: dict[str, frozenset[str]] = {
    **dict.fromkeys(ENGINE_LIBRARIES, frozenset({"runtime"})),
    "ortools": frozenset({"solvers"}),
    "scipy": frozenset({"solvers"}),
}

CORE_LIBRARIES = frozenset({"pydantic", "pydantic_core", "transitions", "spotserve"})
CORE_BANNED_STDLIB = frozenset(
    {
        *("asyncio", "concurrent", "datetime", "glob", "http", "io", "logging", "mmap", "multiprocessing", "os"),
        *("pathlib", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess"),
        *("sys", "tempfile", "threading", "time", "urllib", "uuid"),
    }
)
CORE_BANNED_CALLS = frozenset({"open", "print", "input"})


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: who, what, where, and whether importing the importer runs it."""

    importer: str
    target: str
    line: int
    at_import: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def area_of(module: str) -> str:
    """`spotserve.core.plan` -> `core`; the package itself -> ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8"), str(path)) for module, path in SOURCES.items()}


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    """Every import of a module, lazy ones too; `from package import submodule` names the submodule."""
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in lazy
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = resolve(module, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(module, inner if inner in SOURCES else base, node.lineno, at_import)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def resolve(module: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    is_package = SOURCES[module].name == "__init__.py"
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, node.module] if node.module else base)


IMPORTS = [found for module, tree in TREES.items() for found in imports_of(module, tree)]


def told(wrong: list[Import]) -> list[str]:
    return [f"{found.importer}:{found.line} imports {found.target}" for found in wrong]


def test_imports_go_one_way() -> None:
    """Tests that no package imports a sibling or what is above it."""
    wrong = [
        found
        for found in IMPORTS
        if found.target.split(".")[0] == "spotserve"
        and area_of(found.target)
        and area_of(found.importer)
        and area_of(found.target) not in MAY_IMPORT[area_of(found.importer)]
    ]
    assert [] == told(wrong)


def test_every_package_has_a_rule() -> None:
    """Tests that a new package cannot escape the walk by having no rule."""
    assert set() == {area_of(module) for module in SOURCES} - set(MAY_IMPORT) - {"", "__main__", "builtin"}


def test_libraries_stay_where_they_belong() -> None:
    """Tests that torch lives in runtime only and ortools and scipy in solvers only, lazy imports included."""
    wrong = [
        found
        for found in IMPORTS
        if (top := found.target.split(".")[0]) in ONLY_IN and area_of(found.importer) not in ONLY_IN[top]
    ]
    assert [] == told(wrong)


def declared_libraries(*, dev: bool) -> set[str]:
    """The top-level modules of the dependencies in pyproject.toml."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + (project["optional-dependencies"]["dev"] if dev else [])
    names = {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in lines}
    return {MODULE_OF.get(name, name) for name in names}


def test_every_library_is_declared() -> None:
    """Tests that whatever the package imports is a dependency in pyproject.toml, and none comes by accident."""
    known = declared_libraries(dev=False) | set(sys.stdlib_module_names) | {"spotserve"}
    assert [] == told([found for found in IMPORTS if found.target.split(".")[0] not in known])


def test_every_library_of_the_tests_is_declared() -> None:
    """Tests that the tests import nothing that a fresh `make setup` does not install."""
    known = (
        declared_libraries(dev=True) | set(sys.stdlib_module_names) | {"spotserve", "tests", "benchmarks", "_pytest"}
    )
    wrong = [
        f"{path.name}:{node.lineno} imports {name}"
        for path in sorted((PACKAGE.parent / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."])
        if not (isinstance(node, ast.ImportFrom) and node.level) and name.split(".")[0] not in known
    ]
    assert [] == wrong


def test_core_imports_only_values() -> None:
    """Tests that core knows the standard library without clock and I/O, pydantic and transitions, nothing else."""
    wrong = [
        found
        for found in IMPORTS
        if area_of(found.importer) == "core"
        and (top := found.target.split(".")[0]) not in CORE_LIBRARIES
        and (top not in sys.stdlib_module_names or top in CORE_BANNED_STDLIB)
    ]
    assert [] == told(wrong)


@pytest.mark.parametrize("area", ["core", "sim"])
def test_pure_packages_draw_no_global_randomness(area: str) -> None:
    """Tests that `random.Random` is the only thing that core and sim take from `random`, and they do no I/O."""
    nodes = [(module, node) for module, tree in TREES.items() if area_of(module) == area for node in ast.walk(tree)]
    drawn = [
        f"{module}:{node.lineno} uses random.{node.attr}"
        for module, node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "random" and node.attr != "Random"
    ]
    called = [
        f"{module}:{node.lineno} calls {node.func.id}"
        for module, node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CORE_BANNED_CALLS
    ]
    assert [] == drawn + called


def reached_from(start: str) -> dict[str, str]:
    """What importing `start` runs: module or library -> who imported it first."""
    first_importer = {start: ""}
    open_modules = [start]
    while open_modules:
        module = open_modules.pop()
        for found in IMPORTS:
            if found.importer == module and found.at_import and found.target not in first_importer:
                first_importer[found.target] = module
                if found.target in SOURCES:
                    open_modules.append(found.target)
    return first_importer


@pytest.mark.parametrize("area", CONTROL_PLANE)
def test_control_plane_never_reaches_torch(area: str) -> None:
    """Tests that no chain of imports leads from the control plane to torch or transformers."""
    wrong = [
        f"{module} reaches {target} through {importer}"
        for module in SOURCES
        if area_of(module) == area
        for target, importer in reached_from(module).items()
        if target.split(".")[0] in ENGINE_LIBRARIES
    ]
    assert [] == wrong


def test_control_plane_runs_without_torch() -> None:
    """Tests that a fresh Python that imports the CLI and every control-plane module has loaded no torch."""
    modules = [module for module in SOURCES if area_of(module) in CONTROL_PLANE]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        f"print(sorted(set({sorted(ENGINE_LIBRARIES)!r}) & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script, "spotserve.cli.main", *modules], capture_output=True, text=True, env=environment
    )
    assert (0, "[]\n") == (done.returncode, done.stdout), done.stderr


def test_walk_sees_a_planted_violation() -> None:
    """Tests that the walk itself can fail: a sibling import and a lazy torch import are both found."""
    tree = ast.parse("import spotserve.store\ndef late():\n    import torch\n")
    found = list(imports_of("spotserve.api", tree))
    assert [("spotserve.store", True), ("torch", False)] == [(one.target, one.at_import) for one in found]
