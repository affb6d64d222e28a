"""How many faults of the checker its tests notice: `python -m tests.mutation.checker [--sample N] [--out FILE]`.

Every mutant of `core/check*.py` (with `--modules`, of `core/finding.py` and `core/cells.py`, by which they judge) runs
in a fork of a process that has collected the checker's tests and made their plans, so that a mutant costs what it takes
to run the tests until one fails, and not what it takes to start pytest.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from spotserve.core import canonical, strict_json
from tests.mutation.mutants import Mutant, mutants, run_in

CHECKOUT = Path(__file__).resolve().parents[2]
MODULES = tuple(
    f"spotserve.core.{name}"
    for name in (
        "cells",
        "finding",
        "check_world",
        "check_memory",
        "check_content",
        "check_requests",
        "check_order",
        "check",
    )
)
"""In the order of their imports: after a mutant of one, those behind it are run again as they are."""

TESTS = tuple(
    f"tests/core/{name}.py"
    for name in (
        "test_check_mutations",
        "test_check",
        "test_check_rules",
        "test_check_edges",
        "test_check_limits",
        "test_check_relays",
        "test_cells",
    )
)
LIMIT_S = 30
FLOOR = 0.9


@dataclass(frozen=True, slots=True)
class Case:
    """One test with its parameters: a call that raises if it fails."""

    name: str
    call: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Score:
    """Which mutants the tests noticed."""

    killed: tuple[Mutant, ...]
    survived: tuple[Mutant, ...]
    total: int
    """Mutants that there are, judged or not."""

    @property
    def rate(self) -> float:
        """Killed over all."""
        return len(self.killed) / max(1, len(self.killed) + len(self.survived))


class Collected:
    """A pytest plugin that keeps the collected tests."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Called by pytest when all is collected."""
        self.items = list(items)


def collect(seed: int) -> list[Case]:
    """The checker's tests as plain calls, their plans made beforehand; the fixtures that they use are given here."""
    collected = Collected()
    paths = [str(CHECKOUT / path) for path in TESTS]
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *paths], plugins=[collected])
    modules = {item.module.__name__: item.module for item in collected.items}
    for module in modules.values():
        _remember_plans(module)
    plans = modules["tests.core.test_check_mutations"].made_plans(seed)
    return [Case(item.nodeid, _call(item, plans, seed)) for item in collected.items]


def _remember_plans(module: ModuleType) -> None:
    """Plan and write each plan once: the solvers are not what is tested."""
    for name in ("spare_plan", "loss_plan", "restart_plan", "layered_plan", "shrinking_plan"):
        if hasattr(module, name):
            setattr(module, name, functools.cache(getattr(module, name)))
    if not hasattr(module, "random_problem"):
        return
    make, problem_of = module.make_plan, module.random_problem  # type: ignore[attr-defined]
    problems = functools.cache(problem_of)
    made: dict[int, tuple[int, Any]] = {}
    written: dict[int, tuple[Any, str]] = {}

    def planned_once(problem: Any) -> Any:
        if id(problem) not in made or problem is not problems(made[id(problem)][0]):
            return make(problem)
        return made[id(problem)][1]

    def problem_once(seed: int) -> Any:
        problem = problems(seed)
        if id(problem) not in made:
            made[id(problem)] = seed, make(problem)
        return problem

    def written_once(value: Any) -> str:
        if isinstance(value, dict):
            return canonical.canonical_json(value)
        if id(value) not in written:
            written[id(value)] = value, canonical.canonical_json(value)
        return written[id(value)][1]

    vars(module).update(make_plan=planned_once, random_problem=problem_once, canonical_json=written_once)


def remember_reading() -> None:
    """Read each document and digest each value once: that is not what is mutated, and most of the time."""
    documents: dict[bytes, Any] = {}
    values: dict[int, tuple[Any, Any]] = {}
    digests: dict[int, tuple[Any, str]] = {}
    parse, shaped, digest = strict_json.parse, strict_json.shaped, canonical.digest

    def parsed_once(data: bytes) -> Any:
        if data not in documents:
            documents[data] = parse(data)
        return documents[data]

    def shaped_once(kind: Any, document: Any) -> Any:
        if id(document) not in values:
            values[id(document)] = document, shaped(kind, document)
        return values[id(document)][1]

    def digested_once(value: Any) -> str:
        if id(value) not in digests:
            digests[id(value)] = value, digest(value)
        return digests[id(value)][1]

    strict_json.parse, strict_json.shaped, canonical.digest = parsed_once, shaped_once, digested_once
    vars(importlib.import_module(MODULES[-1])).update(parse=parsed_once, shaped=shaped_once, digest=digested_once)


def _call(item: Any, plans: Any, seed: int) -> Callable[[], None]:
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    names = item._fixtureinfo.argnames

    if "mutation" in parameters:
        return _spoiled(item.module, parameters["mutation"], plans, random.Random(f"{seed}:{item.nodeid}"))

    def call() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            given = {"plans": plans, "seed": seed, "monkeypatch": monkeypatch, **parameters}
            given["rng"] = random.Random(f"{seed}:{item.nodeid}")
            item.function(**{name: given[name] for name in names})

    return call


def _spoiled(module: ModuleType, mutation: Any, plans: Any, rng: random.Random) -> Callable[[], None]:
    """`test_each_fault_has_its_code` on plans that were spoiled beforehand."""
    files = module.spoiled_plans(mutation, plans, rng)  # type: ignore[attr-defined]

    def call() -> None:
        for data in files:
            found = module.verify(data)  # type: ignore[attr-defined]
            assert mutation.code in {finding.code for finding in found}

    return call


def install(mutant: Mutant, sources: dict[str, CodeType]) -> None:
    """Put a mutant in the place of its module, for the checker and for everything that has imported from it."""
    loaded = {name: sys.modules[name] for name in MODULES}
    old = {name: dict(module.__dict__) for name, module in loaded.items()}
    for name in MODULES[MODULES.index(mutant.module) :]:
        run_in(loaded[name], mutant.code if name == mutant.module else sources[name])
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith(
            ("tests.core", "spotserve.core.check", "spotserve.core.finding")
        ):
            continue
        for name, value in list(vars(module).items()):
            origin = getattr(value, "__module__", None)
            if origin in old and old[origin].get(name) is value:
                setattr(module, name, vars(loaded[origin])[name])


def judged(
    chosen: Iterable[Mutant], cases: Sequence[Case], sources: dict[str, CodeType], jobs: int
) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether a test failed on it; one that takes too long has been noticed as well."""
    running: dict[int, Mutant] = {}
    gc.freeze()
    for mutant in chosen:
        if len(running) >= jobs:
            child, status = os.wait()
            yield running.pop(child), status != 0
        child = os.fork()
        if child == 0:
            _judge(mutant, cases, sources)
        running[child] = mutant
    while running:
        child, status = os.wait()
        yield running.pop(child), status != 0


def _judge(mutant: Mutant, cases: Sequence[Case], sources: dict[str, CodeType]) -> None:
    """The child's life: exit 0 if every test passes."""
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # Of its own time on a core: other load is no fault of a mutant.
    with suppress(BaseException):
        install(mutant, sources)
        for case in cases:
            case.call()
        os._exit(0)
    os._exit(1)


def run(
    *,
    names: Sequence[str],
    sample: int | None,
    seed: int,
    jobs: int,
    budget_s: float | None,
    told: Callable[[str], None],
) -> Score:
    """Judge every mutant, or so many drawn by `seed`."""
    cases = collect(seed)
    remember_reading()
    began = time.monotonic()
    for case in cases:
        case.call()  # What is read and planned once is read and planned now.
    began = time.monotonic()
    for case in cases:
        case.call()
    told(f"{len(cases)} tests pass without a mutant in {time.monotonic() - began:.1f} s")
    paths = {name: Path(str(importlib.import_module(name).__file__)) for name in MODULES}
    sources = {name: compile(path.read_text(), str(path), "exec") for name, path in paths.items()}
    every = [mutant for name in MODULES if name.rsplit(".", 1)[-1] in names for mutant in mutants(name, paths[name])]
    chosen: Iterable[Mutant] = random.Random(seed).sample(
        every, len(every) if sample is None else min(sample, len(every))
    )
    order = sorted(cases, key=lambda case: ("whole_plans" not in case.name, TESTS[0] not in case.name))
    killed, survived = [], []
    if budget_s is not None:
        chosen = _until(time.monotonic() + budget_s, chosen)
    for mutant, noticed in judged(chosen, order, sources, jobs):
        (killed if noticed else survived).append(mutant)
        if not noticed:
            told(f"survives: {mutant.told}")
        if (len(killed) + len(survived)) % 50 == 0:
            told(f"{len(killed)} killed, {len(survived)} survived, {time.monotonic() - began:.0f} s")
    return Score(
        tuple(killed), tuple(sorted(survived, key=lambda one: (MODULES.index(one.module), one.line))), len(every)
    )


def _until(end_s: float, chosen: Iterable[Mutant]) -> Iterator[Mutant]:
    """Those that are begun before the end."""
    return itertools.takewhile(lambda _: time.monotonic() < end_s, chosen)


def report(score: Score, *, seed: int, total_count: int, command: str) -> str:
    """The committed results: a table by module, and every survivor."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = ["# Mutation testing of the checker", "", f"`{command}`, commit {commit or 'unknown'}, seed {seed}", ""]
    judged_count = len(score.killed) + len(score.survived)
    lines += [f"{judged_count} of {total_count} mutants, drawn at random.", ""] if judged_count < total_count else []
    lines += ["| module | mutants | killed | share |", "|---|---:|---:|---:|"]
    for name in (*MODULES, ""):
        killed = sum(1 for one in score.killed if one.module == name or not name)
        total = killed + sum(1 for one in score.survived if one.module == name or not name)
        if total:
            title = name.removeprefix("spotserve.core.") or "all"
            lines.append(f"| {title} | {total} | {killed} | {100 * killed / total:.1f} % |")
    lines += ["", "## Survivors", ""]
    lines += [f"- `{one.told.replace(chr(10), ' ')}`" for one in score.survived] or ["none"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    checks = [name.rsplit(".", 1)[-1] for name in MODULES]
    parser.add_argument(
        "--modules",
        nargs="*",
        default=[name for name in checks if name.startswith("check")],
        choices=checks,
        help="default: check*.py",
    )
    parser.add_argument("--sample", type=int, help="so many mutants instead of all")
    parser.add_argument("--seconds", type=float, help="begin no mutant after so long; they come in random order")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results there")
    options = parser.parse_args()
    score = run(
        names=options.modules,
        sample=options.sample,
        seed=options.seed,
        jobs=options.jobs,
        budget_s=options.seconds,
        told=lambda line: print(line, flush=True),
    )
    words = " ".join(["python -m tests.mutation.checker", *sys.argv[1:]])
    text = report(score, seed=options.seed, total_count=score.total, command=words)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    sys.exit(score.rate < FLOOR)


if __name__ == "__main__":
    main()
