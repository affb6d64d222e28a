"""Results of cells: one JSON file each, written whole, skipped by a later run of the same code."""

from __future__ import annotations

import hashlib
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spotserve.core.spec import LinearKind
from spotserve.runtime.profiles import write_whole
from tests.matrix.cells import Cell, Degrees

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL_CODE = ("tests/matrix/references.py", "tests/runtime/families.py")
CODE = (
    *("spotserve", "tests/matrix", "tests/runtime/models.py", "tests/runtime/families.py"),
    *("tests/e2e/daemon.py", "tests/e2e/scene.py", "tests/e2e/models.py", "tests/e2e/history.py"),
)
VERSIONED = ("torch", "transformers", "safetensors", "numpy", "ortools")
MAX_ERROR_CHARS = 600


@dataclass(slots=True)
class Case:
    """One comparison of a cell. `tokens` counts those that were compared and equal."""

    name: str
    status: str = "passed"
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class CellResult:
    """What became of a cell: running, passed, failed (a case did), crashed, timeout, or unsupported (no case ran)."""

    family: str
    dtype: str
    part: str
    degrees: Degrees | None
    linear: LinearKind
    digest: str
    architecture: str = ""
    status: str = "running"
    cases: list[Case] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return Cell(self.family, self.dtype, self.part, self.degrees, self.linear)

    @property
    def tokens(self) -> int:
        """Tokens compared and equal, in cases that passed."""
        return sum(case.tokens for case in self.cases if case.status == "passed")

    def failures(self) -> list[Case]:
        """The cases that did not pass."""
        return [case for case in self.cases if case.status == "failed"]

    def num_passed(self) -> int:
        """Cases that passed."""
        return sum(case.status == "passed" for case in self.cases)


def new_result(cell: Cell, digest: str) -> CellResult:
    """The result of a cell that has not begun."""
    return CellResult(cell.family, cell.dtype, cell.part, cell.degrees, cell.linear, digest)


class Journal:
    """Takes the cases of one cell and keeps the file up to date: a killed cell still says how far it was."""

    def __init__(self, result: CellResult, path: Path) -> None:
        self.result = result
        self._path = path
        self._begun_s = time.monotonic()

    def take(self, name: str, run: Callable[[Case], None]) -> bool:
        """Run one case; whatever it raises is its result. Returns whether it passed."""
        case = Case(name)
        begun_s = time.monotonic()
        self.result.error = f"ended during {name}"
        self.write()
        try:
            run(case)
        except Exception as error:  # noqa: BLE001 - any failure of a case is a result, and the next case is run
            case.status, case.error = "failed", error_line(error)
        case.seconds = round(time.monotonic() - begun_s, 3)
        self.result.cases.append(case)
        return case.status == "passed"

    def leave_out(self, name: str, reason: str) -> None:
        """List a case that the model does not allow."""
        self.result.cases.append(Case(name, status="unsupported", error=reason))

    def finish(self) -> None:
        """The verdict of a cell that came to its end."""
        statuses = {case.status for case in self.result.cases}
        self.result.status = next((status for status in ("failed", "passed") if status in statuses), "unsupported")
        wrong = [case for case in self.result.cases if case.status == self.result.status != "passed"]
        self.result.error = f"{wrong[0].name}: {wrong[0].error}" if wrong else None
        self.write()

    def end(self, status: str, error: str) -> None:
        """The verdict of a cell that did not."""
        self.result.status = status
        self.result.error = f"{error}, {self.result.error}" if self.result.error else error
        self.write()

    def write(self) -> None:
        """Keep what is known."""
        self.result.seconds = round(time.monotonic() - self._begun_s, 3)
        write_result(self.result, self._path)


def error_line(error: BaseException) -> str:
    """Where in our code it happened and what it said, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(CHECKOUT) in frame.filename]
    where = f"{Path(frames[-1].filename).relative_to(CHECKOUT)}:{frames[-1].lineno}: " if frames else ""
    text = " ".join(str(error).split()) or (frames[-1].line or "" if frames else "")
    line = f"{where}{type(error).__name__}: {text}"
    # What a process said last is at the end.
    return line if len(line) <= MAX_ERROR_CHARS else f"{line[:200]} … {line[-MAX_ERROR_CHARS + 200 :]}"


def write_result(result: CellResult, path: Path) -> None:
    """Write one result whole."""
    write_whole(path, json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")


def read_result(path: Path) -> CellResult | None:
    """The result in a file; None when there is none."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return result_of(content)


def result_of(content: dict[str, Any]) -> CellResult:
    """A result from its JSON."""
    degrees = content.pop("degrees")
    cases = [Case(**case) for case in content.pop("cases")]
    return CellResult(**content, degrees=None if degrees is None else tuple(degrees), cases=cases)


def path_of(folder: Path, cell: Cell) -> Path:
    """The file of a cell's result."""
    return folder / "cells" / f"{cell.name}.json"


def versions() -> dict[str, str]:
    """What the result depends on beside our own code."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def code_digest(*, seed: int, code: Iterable[str] = CODE) -> str:
    """A digest of every file that a result depends on, of the versions and of the seed."""
    digest = hashlib.sha256(json.dumps([versions(), seed], sort_keys=True).encode())
    for name in code:
        place = CHECKOUT / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(CHECKOUT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
