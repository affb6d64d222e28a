"""Tidiness as a test: nothing that can execute data, nothing swallowed, no file without a noun."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("spotserve", "tests", "examples", "benchmarks")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".proto", ".sh", ""}

BANNED_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"})
BANNED_CALLS = frozenset({"eval", "exec", "torch.load", "numpy.load", "np.load", "yaml.load", "os.system"})
NOUNLESS = frozenset({"utils", "util", "helpers", "helper", "manager", "common", "misc"})
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
MACHINE_PATH = re.compile(r"(?:^|[\s\"'`(=:])/(?:wo" + r"rk|ho" + r"me|ro" + r"ot|op" + r"t/(?:pypi|wheels))/")
MAX_LINES = 1000


def code_files() -> list[Path]:
    return [
        path
        for folder in CODE_FOLDERS
        for path in sorted((CHECKOUT / folder).rglob("*.py"))
        if "proto" not in path.relative_to(CHECKOUT).parts
    ]


def text_files() -> list[Path]:
    roots = [CHECKOUT / name for name in (*CODE_FOLDERS, "docs", "schemas", "plans", ".ci")]
    nested = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    top = [path for path in sorted(CHECKOUT.iterdir()) if path.is_file()]
    return [path for path in nested + top if path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(CHECKOUT)}:{line}"


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) for everything in a module that may not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {name}") for name in names if name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Call):
            if dotted(node.func) in BANNED_CALLS:
                yield node.lineno, f"calls {dotted(node.func)}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "trust_remote_code" and not is_false:
                    yield node.lineno, "passes trust_remote_code"
        elif isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "has a bare except"
            elif dotted(node.type) in {"Exception", "BaseException"} and only_passes(node.body):
                yield node.lineno, f"swallows {dotted(node.type)}"


def only_passes(body: list[ast.stmt]) -> bool:
    return all(isinstance(statement, ast.Pass | ast.Continue) for statement in body)


def test_nothing_executes_data_or_swallows_errors() -> None:
    """Tests that no module unpickles, evaluates, trusts remote code or hides an exception."""
    found = [f"{where(path, line)} {what}" for path in code_files() for line, what in findings(tree_of(path))]
    assert [] == found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "load(path, trust_remote_code=True)",
        "try:\n    pass\nexcept:\n    raise",
        "try:\n    pass\nexcept Exception:\n    pass",
    ],
)
def test_each_ban_can_fail(source: str) -> None:
    """Tests that a planted violation of each kind is found."""
    assert 1 == len(list(findings(ast.parse(source))))


def test_files_are_nouns() -> None:
    """Tests that no file has a name that says nothing."""
    assert [] == [where(path, 1) for path in code_files() if path.stem.removeprefix("test_") in NOUNLESS]


def test_nothing_is_left_unfinished() -> None:
    """Tests that no note-to-self and no path of somebody's machine is in the tree."""
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if UNFINISHED.search(line) or MACHINE_PATH.search(line):
                found.append(f"{where(path, number)} {line.strip()[:100]}")
    assert [] == found


def test_modules_say_what_they_are() -> None:
    """Tests that every module with code begins with a docstring."""
    trees = {path: tree_of(path) for path in code_files()}
    assert [] == [where(path, 1) for path, tree in trees.items() if tree.body and ast.get_docstring(tree) is None]


def test_no_file_is_a_book(record_property: pytest.RecordProperty) -> None:
    """Tests that no module grows past the bound, and reports the longest ones (`pytest -s` shows them)."""
    lengths = sorted(
        ((len(path.read_text(encoding="utf-8").splitlines()), where(path, 1)) for path in code_files()), reverse=True
    )
    for length, place in lengths[:10]:
        print(f"{length:5} {place}")
        record_property(place, length)
    assert [] == [f"{place} has {length} lines" for length, place in lengths if length > MAX_LINES]
