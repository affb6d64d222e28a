"""What the matrix found, for people: the committed JSON and log, and the README's family table."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.matrix.results import CHECKOUT, CellResult, versions

FOLDER = CHECKOUT / "docs" / "matrix"
SUMMARY = FOLDER / "matrix.json"
LOG = FOLDER / "log.md"
README = CHECKOUT / "README.md"
BEGIN, END = "<!-- matrix: begin, written by `python -m tests.matrix table --write` -->", "<!-- matrix: end -->"
FORMAT_VERSION = 1

Summary = dict[str, Any]


def summary(results: Sequence[CellResult], families: Mapping[str, Callable[..., Path]], *, seed: int) -> Summary:
    """All that the log and the table are made of."""
    return {
        "format_version": FORMAT_VERSION,
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--", "spotserve", "tests")),
        "code": sorted({one.digest for one in results}),
        "seed": seed,
        "hardware": hardware(),
        "versions": versions(),
        "totals": totals(results),
        "families": [[name, architecture_of(name, writer, results)] for name, writer in families.items()],
        "cells": [_cell(one) for one in results],
    }


def architecture_of(name: str, writer: Callable[..., Path], results: Iterable[CellResult]) -> str:
    """What `config.json` names: as a result has it, else as the registry says."""
    known = {one.family: one.architecture for one in results if one.architecture}
    return known.get(name) or str(getattr(writer, "keywords", {}).get("architecture", ""))


def totals(results: Sequence[CellResult]) -> dict[str, Any]:
    """Sums over all cells."""
    statuses = [one.status for one in results]
    return {
        "cells": {status: statuses.count(status) for status in sorted(set(statuses))},
        "cases": sum(one.num_passed() for one in results),
        "failed_cases": sum(len(one.failures()) for one in results),
        "tokens": sum(one.tokens for one in results),
        "seconds": round(sum(one.seconds for one in results)),
    }


def hardware() -> dict[str, Any]:
    """The machine, as far as it matters."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cell(one: CellResult) -> dict[str, Any]:
    return {
        "family": one.family,
        "dtype": one.dtype,
        "part": one.part,
        "degrees": one.degrees,
        "linear": one.linear,
        "status": one.status,
        "tokens": one.tokens,
        "seconds": round(one.seconds, 1),
        "passed": {case.name: case.tokens for case in one.cases if case.status == "passed"},
        "failed": {case.name: case.error for case in one.failures()},
        "not_possible": {case.name: case.error for case in one.cases if case.status == "unsupported"},
        "evidence": {case.name: case.evidence for case in one.cases if case.evidence and one.part == "service"},
        "error": one.error,
    }


def write_summary(folder: Path, content: Summary) -> None:
    """Leave JSON and log with the results."""
    (folder / "matrix.json").write_text(json_text(content), encoding="utf-8")
    (folder / "log.md").write_text(log_text(content), encoding="utf-8")


def write_pages(content: Summary) -> None:
    """Write what is committed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    SUMMARY.write_text(json_text(content), encoding="utf-8")
    LOG.write_text(log_text(content), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), content), encoding="utf-8")


def read_summary() -> Summary:
    """The committed JSON."""
    content: Summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    return content


def json_text(content: Summary) -> str:
    """One line per cell, so that a diff shows which changed."""
    cells = ",\n".join(json.dumps(cell) for cell in content["cells"])
    rest = json.dumps({key: value for key, value in content.items() if key != "cells"}, indent=1)
    return rest.removesuffix("\n}") + ',\n "cells": [\n' + cells + "\n]\n}\n"


def with_table(readme: str, content: Summary) -> str:
    """The README with this table between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"README.md lacks {BEGIN}"
    assert end, f"README.md lacks {END}"
    return f"{before}{begin}\n{family_table(content)}\n{end}{after}"


def family_table(content: Summary) -> str:
    """One row per family."""
    heads = ("Family", "Architecture", "float32, as `transformers`", "Any cut, batch, chunk: same bits")
    rows: list[tuple[str, ...]] = [(*heads, "Preempted daemons, (D, P, M)", "Does not pass")]
    rows.append(("---",) * len(rows[0]))
    rows += [_family_row(name, architecture, content) for name, architecture in content["families"]]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    count = content["totals"]
    lines += [
        "",
        f"Tokens compared and equal; {_number(count['tokens'])} in {_number(count['cases'])} cases altogether.",
    ]
    lines += ["The log, cell by cell, is [docs/matrix/log.md](docs/matrix/log.md)."]
    return "\n".join(lines)


def _family_row(name: str, architecture: str, content: Summary) -> tuple[str, ...]:
    cells = [cell for cell in content["cells"] if cell["family"] == name]
    engine = [cell for cell in cells if cell["part"] == "engine"]
    service = [cell for cell in cells if cell["part"] == "service"]
    against = sum(tokens for cell in cells for case, tokens in cell["passed"].items() if is_against(cell, case))
    cuts = {case.split()[1] for cell in engine for case in cell["passed"] if case.startswith("churn")}
    same = sum(tokens for cell in engine for case, tokens in cell["passed"].items() if not is_against(cell, case))
    served = [cell for cell in service if cell["passed"]]
    wrong = [_place(cell) for cell in cells if cell["status"] not in ("passed", "unsupported")]
    return (
        name,
        f"`{architecture}`",
        _number(against) if against else "not run",
        f"{_number(same)} at {len(cuts)} (P, M)" if same else "not run",
        f"{_number(sum(cell['tokens'] for cell in served))} at {_degrees(served)}" if served else "not run",
        ", ".join(wrong) or ("–" if cells else "not run"),
    )


def is_against(cell: Mapping[str, Any], case: str) -> bool:
    """Whether a case of an engine cell compares with `transformers`."""
    is_named = case.startswith("transformers") or case == "alone"
    return bool(cell["part"] == "engine" and cell["dtype"] == "float32" and is_named)


def _degrees(cells: Sequence[Mapping[str, Any]]) -> str:
    found = sorted({tuple(cell["degrees"]) for cell in cells})
    return ", ".join("({}, {}, {})".format(*degrees) for degrees in found)


def _place(cell: Mapping[str, Any]) -> str:
    return f"{_where(cell)}: {', '.join(cell['failed']) or cell['status']}"


def _number(value: int) -> str:
    return f"{value:,}".replace(",", "\N{NO-BREAK SPACE}")


def log_text(content: Summary) -> str:
    """The log of a run."""
    machine, count = content["hardware"], content["totals"]
    changed = ", with changes that were not committed yet" if content["changed_since_commit"] else ""
    lines = ["# Log of the matrix", "", "Written by `python -m tests.matrix table --write` after `make test-all`.", ""]
    lines += [
        f"- Commit {content['commit']}{changed}; digest of the code and its versions {', '.join(content['code'])}.",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}.",
        "- " + ", ".join(f"{name} {number}" for name, number in content["versions"].items()) + ".",
        f"- Seed {content['seed']}: which family is served at which degrees, weights, prompts, arrivals, evictions.",
        "- Cells: " + ", ".join(f"{number} {status}" for status, number in count["cells"].items()) + ".",
        f"- {_number(count['cases'])} cases passed, {count['failed_cases']} failed; {_number(count['tokens'])} tokens "
        f"compared and equal; {count['seconds']} s of cells, several at a time.",
        "",
        "## Cells",
        "",
        "| Cell | Status | Cases | Tokens | Seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {_name(cell)} | {cell['status']} | {len(cell['passed'])} | {_number(cell['tokens'])} | {cell['seconds']} |"
        for cell in content["cells"]
    ]
    lines += ["", "## Failures", "", *(_failures(content) or ["None."])]
    lines += ["", "## Not possible", "", *(_not_possible(content) or ["None."])]
    lines += ["", "## What the services saw", "", *(_evidence(content) or ["Nothing yet."])]
    return "\n".join(lines) + "\n"


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['family']} {_where(cell)}"


def _where(cell: Mapping[str, Any]) -> str:
    degrees = "" if cell["degrees"] is None else " ({}, {}, {})".format(*cell["degrees"])
    kind = "" if cell["linear"] == "plain" else f" {cell['linear']}"
    return f"{cell['dtype']} {cell['part']}{degrees}{kind}"


def _failures(content: Summary) -> list[str]:
    lines = []
    for cell in content["cells"]:
        for case, error in cell["failed"].items():
            lines.append(f"- {_name(cell)}, {case}: `{_quoted(error)}`")
        if cell["status"] not in ("passed", "unsupported") and not cell["failed"]:
            lines.append(f"- {_name(cell)}: `{_quoted(cell['error'])}`")
    return lines


def _quoted(text: str | None) -> str:
    return (text or "").replace("`", "'")


def _not_possible(content: Summary) -> list[str]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for cell in content["cells"]:
        for case, reason in cell["not_possible"].items():
            what = _name(cell) if cell["part"] == "service" else case.removeprefix("churn ")
            by_reason.setdefault((cell["family"], reason), []).append(what)
    return [f"- {family}: {reason} ({', '.join(dict.fromkeys(what))})" for (family, reason), what in by_reason.items()]


def _evidence(content: Summary) -> list[str]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in content["cells"]:
        for case, evidence in cell["evidence"].items():
            found.setdefault(case, []).append(evidence)
    lines = []
    for case, seen in found.items():
        keys = [key for key, value in seen[0].items() if isinstance(value, int)]
        spans = [f"{key} {min(one.get(key, 0) for one in seen)}–{max(one.get(key, 0) for one in seen)}" for key in keys]
        lines.append(f"- {case}, {len(seen)} daemons: " + ", ".join(spans))
    return lines
