"""Runs cells, each in a process of its own with a time limit, and keeps one result file for each.

A cell that fails, hangs or dies is recorded with its error, whatever it left running is ended, and the next one is run.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import psutil

from spotserve.runtime.forkserver_client import SOCKET_VARIABLE, launch
from tests.e2e.scene import LAUNCHED
from tests.matrix.cells import Cell
from tests.matrix.engine import run_engine
from tests.matrix.references import subject
from tests.matrix.results import (
    MODEL_CODE,
    CellResult,
    Journal,
    code_digest,
    error_line,
    new_result,
    path_of,
    read_result,
    write_result,
)
from tests.matrix.service import run_service

LIMITS_S = {"engine": 300.0, "service": 420.0}
"""Several times what a cell takes on two quiet cores."""
KILL_AFTER_S = 40.0
"""Beyond its limit, before a cell that does not end itself is killed."""
POLL_S = 0.1


class CellEndedError(BaseException):
    """A cell has to end now. Not an `Exception`, so that no case takes it for a failure of its own."""

    def __init__(self, *, is_late: bool) -> None:
        super().__init__()
        self.is_late = is_late


def run_cells(cells: Sequence[Cell], out: Path, *, seed: int, jobs: int, digest: str) -> None:
    """Run cells, several at a time; every result is in `out` when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.matrix.schedule"])
    waiting = list(reversed(cells))
    running: dict[Cell, tuple[BaseProcess, float]] = {}
    num_done = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Like Ctrl-C: what runs is ended properly.
    has_daemons = any(cell.part == "service" for cell in cells)
    with shared_forkserver(out) if has_daemons else nullcontext():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop()
                    process: BaseProcess = context.Process(
                        target=run_cell, args=(cell, out, seed, digest), name=cell.name
                    )
                    process.start()
                    running[cell] = (process, time.monotonic())
                for cell, (process, begun_s) in list(running.items()):
                    if not is_over(cell, process, begun_s):
                        continue
                    del running[cell]
                    num_done += 1
                    tell(cell, record_end(cell, process, out, digest), f"{num_done}/{len(cells)}")
                time.sleep(POLL_S)
        finally:
            # Interrupted: what runs is ended and has no result, so that the next run takes it up again.
            for cell, (process, _) in running.items():
                end_tree(process, work_folder(out, cell))
                path_of(out, cell).unlink(missing_ok=True)


def is_over(cell: Cell, process: BaseProcess, begun_s: float) -> bool:
    """Whether a cell's process has ended; one far beyond its limit is killed."""
    if process.exitcode is not None:
        return True
    if time.monotonic() - begun_s > LIMITS_S[cell.part] + KILL_AFTER_S:
        process.kill()
    return False


def record_end(cell: Cell, process: BaseProcess, out: Path, digest: str) -> CellResult:
    """The result of an ended process; one that died leaves processes and says nothing, so both is done here."""
    process.join()
    result = read_result(path_of(out, cell))
    if result is None or result.status == "running" or result.digest != digest:
        earlier = result if result is not None and result.digest == digest else None
        result = earlier or new_result(cell, digest)
        result.status = "crashed"
        result.error = f"its process ended with {process.exitcode}, {result.error or 'before its first case'}"
        write_result(result, path_of(out, cell))
    end_workers(work_folder(out, cell))
    if result.status in ("passed", "unsupported"):
        shutil.rmtree(work_folder(out, cell), ignore_errors=True)
    return result


def tell(cell: Cell, result: CellResult, place: str) -> None:
    """One line per cell."""
    line = f"[{place}] {result.status:9} {cell.name}: {result.num_passed()} cases, {result.tokens} tokens"
    line += f", {result.seconds:.0f} s"
    print(line + (f"\n    {result.error}" if result.error else ""), flush=True)


def run_cell(cell: Cell, out: Path, seed: int, digest: str) -> None:
    """Run one cell in this process, which is its own."""
    _redirect(out / "logs" / f"{cell.name}.log")
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _end)
    signal.alarm(int(LIMITS_S[cell.part]))
    work = work_folder(out, cell)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    result = new_result(cell, digest)
    journal = Journal(result, path_of(out, cell))
    journal.write()
    try:
        given = subject(cell.family, models_folder(out, seed), seed=seed)
        result.architecture = given.architecture
        if cell.part == "engine":
            run_engine(cell, given, journal, seed=seed)
        else:
            run_service(cell, given, journal, folder=work)
        journal.finish()
    except CellEndedError as ended:
        # One that was interrupted stays `running`, which is no result.
        if ended.is_late:
            journal.end("timeout", f"not over after {LIMITS_S[cell.part]:.0f} s")
    except Exception as error:  # noqa: BLE001 - whatever it was is the cell's result
        journal.end("failed", error_line(error))
    finally:
        signal.alarm(0)


def _end(number: int, _: FrameType | None) -> None:
    raise CellEndedError(is_late=number == signal.SIGALRM)


def _redirect(path: Path) -> None:
    """What the cell says goes to its log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.flush()


def work_folder(out: Path, cell: Cell) -> Path:
    """Where a cell's daemons keep their state; left behind by a cell that failed."""
    return out / "work" / cell.name


def models_folder(out: Path, seed: int) -> Path:
    """Models and references of the code that makes them."""
    return out / "models" / code_digest(seed=seed, code=MODEL_CODE)


@contextmanager
def shared_forkserver(out: Path) -> Iterator[None]:
    """One forkserver for all daemons, as its imports take longer than a daemon's start."""
    out.mkdir(parents=True, exist_ok=True)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"spotserve-matrix-{os.getpid()}"
    process = launch(path, log=out / "forkserver.log", is_shared=True, parent_pid=os.getpid())
    os.environ[SOCKET_VARIABLE] = str(path)
    try:
        yield
    finally:
        os.environ.pop(SOCKET_VARIABLE)
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


def end_tree(process: BaseProcess, work: Path) -> None:
    """End a cell that runs: it may clean up, then everything it started is killed."""
    if process.pid is None or process.exitcode is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.join(10.0)
    process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    end_workers(work)


def end_workers(work: Path) -> None:
    """Kill what the daemons below a folder launched and left: their logs name each process group."""
    for log in work.glob("*/*.stderr"):
        for _, group in re.findall(LAUNCHED, log.read_text(errors="replace")):
            if is_ours(int(group)):
                with suppress(ProcessLookupError):
                    os.killpg(int(group), signal.SIGKILL)


def is_ours(group: int) -> bool:
    """Whether the leader of a group is a worker of ours: a pid may long be somebody else's."""
    with suppress(psutil.Error):
        return any("spotserve" in word for word in psutil.Process(group).cmdline())
    return False
