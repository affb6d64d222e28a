"""Who decides what, read from the source: the daemon's side, the simulator's, and what both may call.

A decision is what the journal keeps for a replay: the commands of an entry, and of the events those that no outside
fact settles (a plan or its refusal, an eviction, how far a quiesced replica is, a rate worth telling). `core` and
`solvers` decide; a side carries out, and tells facts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "spotserve"
DAEMON_PARTS = ("api", "app", "cloud", "runtime", "store")
STRANGERS = ("world", "checkers", "faults", "streams")
"""The swarm's world and its checkers: they break what they play, and judge it by rules of their own on purpose."""
DECIDING = ("spotserve.core.", "spotserve.solvers.")
DECISIONS = ("commands", "plan", "plan_run", "state")
"""Modules of core whose values are decisions: nobody but core and solvers makes any."""
QUESTIONS = frozenset({"PlanningProblem"})
"""Of those modules: what a side asks with, and no answer to anything."""
REDUCERS = frozenset({"step", "fold", "decide", "apply", "make_plan", "begin", "drive_run", "answer_triggers", "admit"})
"""What turns events into decisions: `core.loop` calls it, no side does by itself."""
COMPOSERS = {
    "app/parts.py": "folds the journal of an earlier daemon",
    "store/journal.py": "reads such a fold",
    "store/recording.py": "folds a journal that is replayed",
}
"""Files that begin with an empty state, or one of a snapshot, and step what was decided long ago."""


def is_simulator(path: Path) -> bool:
    """Whether a file of the package simulates, the swarm and its strangers apart."""
    parts = path.relative_to(PACKAGE).parts
    swarm = "swarm" in parts or path.stem in STRANGERS or path.stem.startswith("virtual_")
    return parts[0] == "sim" and not swarm


def sources(*, simulator: bool) -> dict[str, str]:
    """The files of a side, by their path in the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    ours = [
        path
        for path in paths
        if (is_simulator(path) if simulator else path.relative_to(PACKAGE).parts[0] in DAEMON_PARTS)
    ]
    return {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in ours}


@dataclass(slots=True)
class Side:
    """What the files of a side use of `core` and `solvers`.

    Attributes:
        imported: full names, with the files that import each.
        attributes: every name behind a dot.
        calls: (file, line, full name) of each call of something imported, or of something behind an imported module.
    """

    imported: dict[str, set[str]] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    calls: list[tuple[str, int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, files: dict[str, str]) -> Side:
        """Read the files."""
        side = cls()
        for name, text in files.items():
            side.read(name, ast.parse(text))
        return side

    def read(self, name: str, tree: ast.Module) -> None:
        """One more file."""
        known = dict(_imports(tree))
        for full in known.values():
            self.imported.setdefault(full, set()).add(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                self.attributes.add(node.attr)
            if isinstance(node, ast.Call):
                self.calls.append((name, node.lineno, _called(node.func, known)))

    def functions(self) -> dict[str, set[str]]:
        """The functions among what is imported, and who imports them."""
        return {full: names for full, names in self.imported.items() if isfunction(resolved(full))}


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name here, full name) of everything from `core` and `solvers`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(DECIDING):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(DECIDING):
                    yield alias.asname or alias.name, alias.name


def _called(function: ast.expr, known: dict[str, str]) -> str:
    """The full name of what is called, as far as names go; what hangs on a value keeps only its last name."""
    trail: list[str] = []
    while isinstance(function, ast.Attribute):
        trail.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name) and function.id in known:
        return ".".join([known[function.id], *reversed(trail)])
    return "." + trail[0] if trail else getattr(function, "id", "")


def resolved(full: str) -> object:
    """What a full name stands for: a module, or something in one."""
    module, _, name = full.rpartition(".")
    found = getattr(import_module(module), name, None)
    return import_module(full) if found is None else found


def made_decisions(side: Side) -> list[str]:
    """Calls by which a side makes a command, a plan, a step or a state, or has one made outside the loop."""
    wrong = []
    for name, line, full in side.calls:
        module, _, last = full.rpartition(".")
        is_ours = full.startswith(DECIDING)
        is_value = is_ours and module.rpartition(".")[2] in DECISIONS and last not in QUESTIONS
        is_reduced = (is_ours and last in REDUCERS) or full in (".step", ".fold")
        if name not in COMPOSERS and (is_reduced or (is_value and isclass(resolved(full)))):
            wrong.append(f"{name}:{line} calls {full}")
    return wrong


def one_sided(here: Side, there: Side, allowed: Iterable[str]) -> list[str]:
    """Functions of `core` and `solvers` that this side calls, and the other does not."""
    other = there.functions()
    known = tuple(allowed)
    return [
        f"{full} ({', '.join(sorted(names))})"
        for full, names in sorted(here.functions().items())
        if full not in other and not full.startswith(known)
    ]
